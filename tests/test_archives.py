"Downloads through failures: hostile servers, damaged files, kills, and archives that stop to answer."
import faulthandler, gzip, io, json, os, random, signal, subprocess, sys, threading, time, tracemalloc, warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx, numpy as np, pandas as pd, pytest
from astropy.io import fits
from astropy.table import Table
from hypothesis import given, settings, strategies as st

from specpred.archives import (BANDS, FAULTS, ArchiveClient, ArchiveURLs, DownloadState, Faults, LocalArchive, RefusedError, BusyError, NotFoundError,
    _fetch_all, _files_of_survey, _miniature_survey, _miniature_spectrum, catalogue_query, check_cutout, check_spectrum, cutout_params,
    describe_download, download, fetch_catalogue, losses, open_fits, plan_download, read_cutout_names, read_skyserver_csv, read_table, serve,
    spectrum_name, spectrum_path, specobjid_of_position, split_by_sky)
from specpred.config import (ArchiveError, ArchiveParameters, DamagedFileError, InvalidInputError,
    MissingInputError, ProfileError, SpecpredError, SpectraParameters, get_profile)

SIZE = 24


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("survey")
    table = _miniature_survey(folder, n_cells=5, per_side=3, stamp=40)
    return folder, table


def downloaded(raw) -> dict:
    "Every file under its final name."
    return {p.relative_to(raw).as_posix(): p.read_bytes() for part in ("spectra", "cutouts") for p in (raw/part).rglob("*.fits") if ".tmp" not in str(p)}


def n_arrived(raw) -> int:
    "How many there are, also while a download is changing the folder."
    return sum(len(files) for part in ("spectra", "cutouts") for folder, _, files in os.walk(raw/part) if ".tmp" not in folder)


@pytest.fixture
def server():
    "A server whose answers the test writes: a function of the handler."
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def log_message(self, *message): pass
        def do_GET(self): self.server.answer(self)
        def send(self, status, body=b"", **headers):
            self.send_response(status)
            for key, value in ({"Content-Length": len(body)} | {k.replace("_", "-"): v for k, v in headers.items()}).items():
                self.send_header(key, str(value))
            self.end_headers()
            self.wfile.write(body)
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{made.server_port}"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown(), made.server_close()


# 500 galaxies are 3,000 files
N_GALAXIES, N_KILLS = (int(os.environ.get(f"SPECPRED_{name}", n)) for name, n in (("GALAXIES", 500), ("KILLS", 20)))
# 10 % of the requests fail; a 404 cannot be told from a lasting one, so that it is none of those that pass
FAULTY = Faults(passing=0.07, lasting=0.03, seed=11, kinds=FAULTS[:-1], latency=0.05, retry_after=0.05)
PATIENT = dict(attempts=12, wait=(0.01, 0.05))
REASONS = {"truncated": "truncated", "page": "a web page", "band": "another band", "empty": "empty",
    "corrupted": "a damaged header", "missing": "not found"}


def what_was_meant(name, target) -> tuple:
    "Status and cause that a file has to end with."
    fault = Faults(lasting=FAULTY.lasting, seed=FAULTY.seed).choose(target, 1)
    if fault is None or (name.startswith("spectra") and fault in ("band", "empty")): return "good", ""
    return ("missing" if fault == "missing" else "bad"), REASONS[fault]


def end_state(raw) -> tuple:
    "What became of every file, and what lies in raw/."
    with DownloadState(raw/"state.sqlite") as state:
        rows = state.database.execute("SELECT name, request, status, size, sha256, error FROM file WHERE wanted ORDER BY name").fetchall()
    quarantined = {p.relative_to(raw).as_posix(): p.read_bytes() for p in (raw/"quarantine").rglob("*") if p.is_file()}
    return rows, downloaded(raw), quarantined, pd.read_parquet(raw/"catalogue.parquet").to_dict("records")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    "A survey of `N_GALAXIES`, and of each of its files the request for it and its content."
    folder = tmp_path_factory.mktemp("large survey")
    table = _miniature_survey(folder, n_cells=5, per_side=round((N_GALAXIES/5)**0.5), stamp=40)
    files = _files_of_survey(folder, table, SIZE)
    assert len(files) == 6*len(table) - 5
    return folder, files


@pytest.fixture(scope="module")
def through_faults(large, tmp_path_factory):
    "The large survey downloaded through faults, with lists of cutouts in their older form."
    raw = tmp_path_factory.mktemp("through faults")/"raw"
    with serve(large[0], faults=FAULTY, badflag=False) as urls:
        return raw, download(ArchiveParameters(**vars(urls), **PATIENT), raw, SIZE, 1)


def test_every_good_file_arrives_through_faults_and_every_bad_one_is_explained(large, through_faults):
    files, (raw, catalogue) = large[1], through_faults
    arrived, seen = downloaded(raw), Counter()
    with DownloadState(raw/"state.sqlite") as state:
        for name, (target, content) in files.items():
            outcome, kept = state[name], raw/"quarantine"/name
            assert (outcome.status, outcome.cause) == what_was_meant(name, target), (name, outcome)
            assert arrived.pop(name, None) == (content if outcome.status == "good" else None)
            assert kept.is_file() == (outcome.status == "bad")
            if outcome.status == "bad": assert kept.read_bytes() != content and kept.with_name(f"{kept.name}.reason").read_text().strip() == outcome.error
            seen[outcome.cause] += 1
    assert not arrived and not (raw/".partial").exists()
    if len(files) > 2000: assert set(seen) == {"", *REASONS.values()}
    lost = {name.split("/")[1] for name, (target, _) in files.items() if name.startswith("cutouts") and what_was_meant(name, target)[0] != "good"}
    inside = catalogue[catalogue.dec > -30]
    assert set(inside[~inside.has_images].specobjid.astype(str)) == lost
    assert (catalogue.status == "complete").equals(catalogue.has_images & catalogue.has_spectrum)
    by_cause = losses(catalogue)
    assert by_cause.galaxies["complete"] == (catalogue.status == "complete").sum() and by_cause.only_this.sum() <= len(catalogue)


def test_what_arrived_through_faults_goes_through_the_next_stages(through_faults, tmp_path):
    from specpred.images import pack_images
    from specpred.eigenspectra import build_store, load_store
    raw, catalogue = through_faults
    complete = catalogue[catalogue.has_images].head(40)
    assert pack_images(complete.specobjid.to_numpy(), raw/"cutouts", tmp_path/"images.zarr", SIZE, n_jobs=1, progress=False) == {}
    narrow = SpectraParameters(n_bins=80, loglam0=3.566, dloglam=0.0002, n_components=2, n_iter=2)
    left_out = build_store(catalogue, raw/"spectra", tmp_path/"spectra", narrow, progress=False)
    assert left_out["no spectrum"] == (~catalogue.has_spectrum).sum() and set(left_out) <= {"no spectrum"}
    assert sorted(load_store(tmp_path/"spectra").specobjid) == sorted(catalogue.specobjid[catalogue.has_spectrum])


# a process that has imported everything, and forks a download for each line that it reads
FORKING = """
import json, os, sys
path, parameters, raw, size = json.loads(sys.argv[1])
sys.path[:] = path
from specpred.archives import ArchiveParameters, download
for _ in sys.stdin:
    if (pid := os.fork()) == 0:
        download(ArchiveParameters(**parameters), raw, size, 1, progress=False)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_a_download_killed_at_random_moments_ends_in_the_same_state(large, through_faults, tmp_path):
    raw, rng, n_files, moments = tmp_path/"raw", random.Random(2), len(large[1]), []
    with serve(large[0], faults=FAULTY) as urls:
        parameters = vars(urls) | PATIENT
        command = [sys.executable, "-c", FORKING, json.dumps((sys.path, parameters, str(raw), SIZE))]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
            ask = lambda: (parent.stdin.write("\n"), parent.stdin.flush(), int(parent.stdout.readline()))[2]
            for k in range(N_KILLS):
                pid, at_most, start = ask(), n_files*(k + 1)/(N_KILLS + 2), time.monotonic()
                while n_arrived(raw) < at_most - rng.random()*n_files/(N_KILLS + 2) and time.monotonic() < start + 60: time.sleep(0.05)
                time.sleep(rng.uniform(0, 0.1))
                os.kill(pid, signal.SIGKILL)
                assert int(parent.stdout.readline()) == -signal.SIGKILL and not (raw/"catalogue.parquet").exists()
                moments.append(n_arrived(raw))
                arrived = downloaded(raw)
                assert all(content == large[1][name][1] for name, content in arrived.items())
            assert ask() and parent.stdout.readline() == "0\n"
            parent.stdin.close()
    assert len(set(moments)) > N_KILLS/2 and moments == sorted(moments)
    for here, there in zip(end_state(raw), end_state(through_faults[0])): assert here == there
    assert not [p for p in raw.rglob("*") if ".tmp" in p.name or p.name == ".partial"]


def test_good_files_stay_when_other_numbers_change(survey, tmp_path):
    raw = tmp_path/"raw"
    with serve(survey[0]) as urls:
        first = download(ArchiveParameters(**vars(urls)), raw, SIZE, 1)
        stamp = {p: p.stat().st_mtime_ns for p in raw.rglob("*.fits")}
        again = download(ArchiveParameters(**vars(urls), split=(0.5, 0.125, 0.125, 0.25)), raw, SIZE, 1)
        assert stamp == {p: p.stat().st_mtime_ns for p in raw.rglob("*.fits")}
        assert again.drop(columns="split").equals(first.drop(columns="split")) and not again.split.equals(first.split)
        download(ArchiveParameters(**vars(urls)), raw, SIZE + 2, 1)  # another size is another cutout
    assert {p.name for p in raw.rglob("*.fits") if p.stat().st_mtime_ns == stamp.get(p)} == {p.name for p in (raw/"spectra").iterdir()}


def test_a_local_survey_stands_in_and_another_one_replaces_everything(survey, tmp_path):
    raw, other = tmp_path/"raw", tmp_path/"other"
    assert len(download(ArchiveParameters(), raw, SIZE, 1, survey[0])) == 46
    _miniature_survey(other, n_cells=3, per_side=1, stamp=40, seed=3)
    assert len(download(ArchiveParameters(), raw, SIZE, 1, other)) == 4
    assert len(list((raw/"spectra").iterdir())) == 4


def test_an_archive_that_stops_to_answer_ends_the_download_but_not_what_has_arrived(survey, tmp_path):
    raw = tmp_path/"raw"
    with serve(survey[0]) as urls:
        parameters = ArchiveParameters(**vars(urls))
        download(parameters, raw, SIZE, 1)
    for spectrum in list((raw/"spectra").iterdir()): spectrum.unlink()
    with pytest.raises(ArchiveError, match="SAS gives nothing any more: ConnectError"):
        download(parameters, raw, SIZE, 1, client=ArchiveClient(8, attempts=2, wait=(0.01, 0.02)))
    assert len(list((raw/"cutouts").rglob("*.fits"))) == 45*5


def test_the_server_dies_with_its_parent(survey):
    code = "import json, sys, time; sys.path[:] = json.loads(sys.argv[1]); from specpred.archives import serve\n" \
           "with serve(sys.argv[2]) as urls: print(urls.sas_url, flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code, json.dumps(sys.path), str(survey[0])], stdout=subprocess.PIPE, text=True)
    url = parent.stdout.readline().strip()
    assert httpx.get(url).status_code == 404
    parent.kill(), parent.wait(), parent.stdout.close()
    with pytest.raises(httpx.TransportError):
        for _ in range(100): httpx.get(url), time.sleep(0.1)


def test_retries_are_for_what_may_pass_and_wait_as_told(server):
    asked = []
    def answer(handler):
        asked.append((handler.path, time.monotonic()))
        if handler.path == "/busy" and len(asked) == 1: return handler.send(429, Retry_After="1")
        handler.send({"/busy": 200, "/missing": 404, "/refused": 400}[handler.path], b"yes")
    server.answer = answer
    with ArchiveClient(wait=(0.01, 0.02)) as client:
        assert client.get(f"{server.url}/busy") .content == b"yes"
        assert asked[1][1] - asked[0][1] >= 1
        for path, kind in (("missing", NotFoundError), ("refused", RefusedError)):
            before = len(asked)
            with pytest.raises(kind): client.get(f"{server.url}/{path}")
            assert len(asked) == before + 1


def test_no_more_requests_at_once_than_allowed(server):
    now, most, lock = [0], [0], threading.Lock()
    def answer(handler):
        with lock: now[0], most[0] = now[0] + 1, max(most[0], now[0] + 1)
        time.sleep(0.05)
        with lock: now[0] -= 1
        handler.send(200, b"x")
    server.answer = answer
    with ArchiveClient(3) as client:
        threads = [threading.Thread(target=client.get, args=(f"{server.url}/{i}",)) for i in range(12)]
        for t in threads: t.start()
        for t in threads: t.join()
    assert most[0] == 3


def endless(handler):
    handler.send_response(200), handler.end_headers()
    try:
        while True: handler.wfile.write(b"0"*65536)
    except OSError: handler.close_connection = True


@pytest.mark.parametrize("answer", [
    lambda h: h.send(302, Location="http://127.0.0.2/elsewhere"), lambda h: h.send(302, Location="file:///etc/passwd"),
    lambda h: h.send(302, Location=h.path), lambda h: h.send(302), lambda h: h.send(302, Location="http://[/"),
    lambda h: h.send(302, Location="http://xn--zzzzzzz9999/"),
    lambda h: h.send(200, gzip.compress(bytes(10**7)), Content_Encoding="gzip"),
    lambda h: h.send(200, b"", Content_Length=10**12), endless, lambda h: h.send(503, Retry_After="864000")],
    ids=["other host", "file", "circle", "nowhere", "nonsense", "no host name", "compressed", "huge", "endless", "closed for days"])
def test_unsafe_answers_are_refused(server, answer):
    server.answer = answer
    with ArchiveClient(attempts=2, wait=(0.01, 0.02), timeout=5) as client, pytest.raises(RefusedError): client.get(f"{server.url}/file", max_bytes=10**6)


def test_when_one_request_is_told_to_wait_all_do(server):
    arrivals = []
    def answer(handler):
        arrivals.append(time.monotonic())
        handler.send(429, Retry_After="1") if len(arrivals) == 1 else handler.send(200, b"x")
    server.answer = answer
    with ArchiveClient(concurrency=1, wait=(0.01, 0.02)) as client, ThreadPoolExecutor(8) as pool:
        assert [a.content for a in pool.map(lambda k: client.get(f"{server.url}/{k}"), range(8))] == [b"x"]*8
    assert min(arrivals[1:]) - arrivals[0] > 0.95


def test_a_client_that_is_stopped_does_not_sit_out_a_pause(server):
    server.answer = lambda h: h.send(429, Retry_After="60")
    with ArchiveClient() as client:
        threading.Timer(0.3, client.stopping.set).start()
        started = time.monotonic()
        with pytest.raises((BusyError, RefusedError)): client.get(f"{server.url}/file")
        assert time.monotonic() - started < 20


@pytest.mark.parametrize("status, headers", [(403, {}), (503, dict(Retry_After="86400"))], ids=["refused", "closed"])
def test_an_archive_that_does_not_want_us_is_left_in_peace(large, server, tmp_path, status, headers):
    folder, files = large
    asked = Counter()
    with serve(folder) as urls:
        def answer(handler):
            asked[handler.path.split("?")[0]] += 1
            if "fitscut" in handler.path: return handler.send(status, b"go away", **headers)
            relayed = httpx.get(urls.ps1_url.replace("/cgi-bin", "") + handler.path)
            handler.send(relayed.status_code, relayed.content)
        server.answer = answer
        parameters = ArchiveParameters(**vars(urls) | dict(ps1_url=f"{server.url}/cgi-bin"))
        with pytest.raises(ArchiveError, match="PS1 gives nothing any more") as raised: download(parameters, tmp_path/"raw", SIZE, 1, progress=False)
        n_spectra = sum(name.startswith("spectra/") for name in files)
        assert asked["/cgi-bin/fitscut.cgi"] < 5*N_GALAXIES/2 and len(list((tmp_path/"raw/spectra").iterdir())) == n_spectra  # the other archive goes on
        assert "Run this again" in str(raised.value)


def test_an_archive_that_is_closed_already_for_lists_is_asked_no_more(large, server, tmp_path):
    asked = []
    server.answer = lambda handler: (asked.append(handler.path), handler.send(503, Retry_After="86400"))
    large_table = pd.read_parquet(large[0]/"skyserver/SpecObj.parquet")[["ra", "dec"]]
    large_table.to_csv(tmp_path/"own.csv", index=False)
    with pytest.raises(ArchiveError, match="PS1 gives nothing any more: list of files, closed"):
        download(ArchiveParameters(skyserver_url=server.url, sas_url=server.url, ps1_url=server.url, table=f"{tmp_path}/own.csv", concurrency=2), tmp_path/"raw", SIZE, 1, progress=False)
    assert len(asked) <= 20


def test_an_error_that_nobody_thought_of_costs_one_file(survey, tmp_path, monkeypatch):
    import specpred.archives
    check = specpred.archives.check_spectrum
    def unlucky(content, plate, mjd, fiberid):
        if fiberid == 3: raise ZeroDivisionError("nobody thought of this")
        check(content, plate, mjd, fiberid)
    monkeypatch.setattr(specpred.archives, "check_spectrum", unlucky)
    catalogue = download(ArchiveParameters(), tmp_path/"raw", SIZE, 1, survey[0], progress=False)
    assert catalogue.has_spectrum.sum() == 45 and catalogue.has_images.sum() == 45
    assert catalogue.status[catalogue.fiberid == 3].tolist() == ["spectrum failed (ZeroDivisionError)"]


def test_an_answer_that_only_drips_is_given_up(server):
    def answer(handler):
        handler.send_response(200), handler.send_header("Content-Length", "1000"), handler.end_headers()
        try:
            for _ in range(200): handler.wfile.write(b"x"), time.sleep(0.05)
        except OSError: handler.close_connection = True
    server.answer = answer
    with ArchiveClient(attempts=1, timeout=0.4) as client:
        with pytest.raises(BusyError, match="slow: "): client.get(f"{server.url}/file")
        server.answer = lambda handler: (time.sleep(1), handler.send(200, b"x"))
        with pytest.raises(BusyError, match="ReadTimeout"): client.get(f"{server.url}/file")
        assert client.get(f"{server.url}/file", timeout=10*client.timeout).content == b"x"  # as the query of the catalogue is


def test_what_an_archive_says_is_printed_without_its_control_characters(server, survey, tmp_path):
    server.answer = lambda handler: handler.send(400, b"no\x1b[2J\r\n\x07\xe2\x80\xaemore")
    survey[1][["ra", "dec"]].head(2).to_csv(tmp_path/"own.csv", index=False)
    with pytest.raises(ArchiveError) as raised:
        download(ArchiveParameters(skyserver_url=server.url, sas_url=server.url, ps1_url=server.url, table=f"{tmp_path}/own.csv"), tmp_path/"raw", SIZE, 1, progress=False)
    with DownloadState(tmp_path/"raw/state.sqlite") as state:
        state.database.execute("UPDATE file SET error = 'so\x1b[31m\nit: goes' WHERE name LIKE '%/g.fits'")
    said = describe_download(tmp_path/"raw")
    assert "no [2J more" in said and "so [31m it" in said
    for text in (said, str(raised.value)): assert all(line.isprintable() for line in text.split("\n"))


def test_files_that_are_no_longer_right_do_not_stay(survey, tmp_path):
    table, raw = survey[1][["ra", "dec", "plate", "mjd", "fiberID", "run2d", "specObjID"]].head(3).copy(), tmp_path/"raw"
    def fetch(urls, **settings):
        table.to_csv(tmp_path/"own.csv", index=False)
        return download(ArchiveParameters(**vars(urls), table=f"{tmp_path}/own.csv", wait=(0.01, 0.02), **settings), raw, SIZE, 1, progress=False)
    with serve(survey[0]) as urls:
        fetch(urls)
        table.loc[0, "ra"] += 10  # where PS1 has nothing
        assert len(downloaded(raw)) == 18 and fetch(urls).has_images.sum() == 2 and len(downloaded(raw)) == 13
        table.loc[1, "ra"] += 0.3/3600
        kept, port = downloaded(raw), httpx.URL(urls.sas_url).port
    assert fetch(urls, attempts=1).has_images.sum() == 1 and downloaded(raw) == kept  # nobody answers, which says nothing about the files
    with serve(survey[0], port=port, faults=Faults(lasting=1.0, lasting_kinds=("truncated",))): fetch_bad = fetch(urls, bad_attempts=1)
    assert (not fetch_bad.has_images[fetch_bad.specobjid == table.specObjID[1]].any()
        and len(list((raw/"quarantine").rglob("*.fits"))) == 5 and len(downloaded(raw)) == 8)
    with serve(survey[0], port=port): assert fetch(urls).has_images.sum() == 2
    assert not [p for p in (raw/"quarantine").rglob("*") if p.is_file()]


def test_what_an_archive_did_not_have_is_asked_for_again_when_told_to(survey, tmp_path):
    folder, table = survey
    lost = folder/"sas"/spectrum_path("26", *table[["plate", "mjd", "fiberID"]].iloc[0])
    content = lost.read_bytes()
    with serve(folder) as urls:
        get = lambda **more: download(ArchiveParameters(**vars(urls)), tmp_path/"raw", SIZE, 1, progress=False, **more).has_spectrum.all()
        lost.unlink()
        try: assert not get()
        finally: lost.write_bytes(content)
        assert not get() and get(retry_missing=True) and get()


def test_a_record_of_another_layout_or_a_full_disk_is_said_in_our_words(survey, tmp_path):
    import sqlite3
    raw = tmp_path/"raw"
    download(ArchiveParameters(), raw, SIZE, 1, survey[0], progress=False)
    with pytest.raises(ArchiveError, match="Cannot use .*state.sqlite: .*readonly"), DownloadState(raw/"state.sqlite") as state:
        state.database.execute("PRAGMA query_only = 1")
        state.want([("spectra/a.fits", "a")])
    for change in ("ALTER TABLE file RENAME COLUMN status TO state", "DROP TABLE file; CREATE TABLE file (x)"):
        with sqlite3.connect(raw/"state.sqlite") as database: database.executescript(change)
        database.close()
        for use in (lambda: describe_download(raw), lambda: download(ArchiveParameters(), raw, SIZE, 1, survey[0], progress=False)):
            with pytest.raises(DamagedFileError, match="state.sqlite is no record of a download"): use()


def test_touched_files_are_read_once(survey, tmp_path, monkeypatch):
    import hashlib
    raw, read, digest = tmp_path/"raw", [], hashlib.file_digest
    download(ArchiveParameters(), raw, SIZE, 1, survey[0], progress=False)
    for path in raw.rglob("*.fits"): os.utime(path)
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: (read.append(1), digest(file, kind))[1])
    for n in (271, 271):
        download(ArchiveParameters(), raw, SIZE, 1, survey[0], progress=False)
        assert len(read) == n


def test_the_bar_of_a_download_that_goes_on_starts_where_that_was(survey, tmp_path, monkeypatch):
    import specpred.archives
    bars, tqdm = [], specpred.archives.tqdm
    class Bar(tqdm):
        def __init__(self, *arguments, **settings): bars.append(self), super().__init__(*arguments, **settings)
    monkeypatch.setattr(specpred.archives, "tqdm", Bar)
    for lost in (0, 46):
        download(ArchiveParameters(), tmp_path/"raw", SIZE, 1, survey[0])
        with DownloadState(tmp_path/"raw/state.sqlite") as state: state.database.execute("UPDATE file SET status = 'failed' WHERE name LIKE 'spectra/%'")
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [(0, 271, 271), (225, 271, 271)]


@pytest.mark.parametrize("change", ["archives.wait=1", "archives.wait=5,1", "archives.wait=-1,-2", "archives.attempts=0", 
    "archives.timeout=-1", "archives.concurrency=0", "archives.concurrency=-4", "images.size=-5", "images.size=0", "archives.n_max=0",
    "archives.split=0.5,0.5", "archives.nside=0", "archives.release=../x", "archives.ps1_url=foo", "seed=-1"])
def test_a_setting_that_nothing_can_be_downloaded_with_is_named(survey, tmp_path, change):
    with pytest.raises(ProfileError, match=f"Cannot set {change.partition('=')[0]}="): get_profile("paper", [change])


def test_nothing_is_asked_for_with_a_size_or_seed_that_cannot_be(survey, tmp_path):
    for use in (download, plan_download):
        for wrong, name in (((0, 1), "size"), ((24, -1), "seed")):
            with pytest.raises(InvalidInputError, match=f"^{name}="): use(ArchiveParameters(), tmp_path/"raw", *wrong, survey[0])
    assert not (tmp_path/"raw").exists()


def test_what_came_over_the_network_is_never_removed(survey, tmp_path):
    raw = tmp_path/"raw"
    with serve(survey[0]) as urls: download(ArchiveParameters(**vars(urls)), raw, SIZE, 1, progress=False)
    (raw/"mine.txt").write_text("mine")
    before = {p: p.read_bytes() for p in raw.rglob("*") if p.is_file()}
    for parameters, folder in ((ArchiveParameters(**vars(urls) | dict(skyserver_url="http://127.0.0.1:9")), None), (ArchiveParameters(), survey[0])):
        with pytest.raises(InvalidInputError, match="Nothing was changed"): download(parameters, raw, SIZE, 1, folder, progress=False)
    with pytest.raises(ArchiveError):  # nobody answers
        download(ArchiveParameters(**{k: f"{u}/" for k, u in vars(urls).items()}, attempts=1), raw, SIZE, 7, progress=False)
    (raw/"source.json").write_text("{")
    with pytest.raises(InvalidInputError, match="source.json is damaged"): download(ArchiveParameters(**vars(urls)), raw, SIZE, 1, progress=False)
    before.pop(raw/"source.json")
    assert {p: p.read_bytes() for p in before} == before


def test_memory_does_not_grow_with_the_number_of_files(tmp_path, monkeypatch):
    "Ten times as many spectra, from no archive at all: what is known of them is on the disk, and not in lists."
    monkeypatch.setattr(os, "fsync", lambda file: None)  # 3,000 of them are minutes on some disks
    monkeypatch.setattr(ArchiveClient, "_get_once", lambda self, url, *limits: _miniature_spectrum(
        *(int(word) for word in url.path.rpartition("/")[2].removeprefix("spec-").removesuffix(".fits").split("-")), np.random.default_rng(0)))
    peaks = {}
    for n in (300, 3000):
        k = np.arange(n)
        table = pd.DataFrame(dict(ra=k*360/n, dec=-40.0, plate=266 + k//640, mjd=51602, fiberid=1 + k % 640))
        table.to_csv(tmp_path/f"{n}.csv", index=False)
        catalogue, raw = read_table(tmp_path/f"{n}.csv"), tmp_path/f"raw of {n}"
        raw.mkdir()
        with DownloadState(raw/"state.sqlite") as state, ArchiveClient() as client:
            tracemalloc.start()
            _fetch_all(catalogue, SIZE, "dr17", raw, state, client, ArchiveURLs.local(9), progress=False)
            peaks[n] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert n_arrived(raw) == n
    growth = (peaks[3000] - peaks[300])/2700
    assert growth < 500, peaks  # bytes a file: a copy of the catalogue has 200; an outcome would have 600 and a file 20,000


def test_a_kill_before_the_first_file_leaves_nothing_in_the_way(survey, tmp_path):
    (tmp_path/"raw/.source.json.abc.tmp").mkdir(parents=True)
    assert len(download(ArchiveParameters(), tmp_path/"raw", SIZE, 1, survey[0], progress=False)) == len(survey[1])


def test_a_client_can_be_used_again(survey, tmp_path):
    with serve(survey[0]) as urls, ArchiveClient() as client:
        for k in range(2): download(ArchiveParameters(**vars(urls)), tmp_path/f"{k}", SIZE, 1, progress=False, client=client)
    assert downloaded(tmp_path/"0") == downloaded(tmp_path/"1")


def test_few_galaxies_of_ones_own_are_all_test(survey, tmp_path):
    survey[1].head(2).rename(columns=dict(specObjID="specobjid", fiberID="fiberid"))[
        ["ra", "dec", "z", "plate", "mjd", "fiberid", "run2d"]].to_csv(tmp_path/"own.csv", index=False)
    with serve(survey[0]) as urls: own = download(ArchiveParameters(**vars(urls), table=f"{tmp_path}/own.csv"), tmp_path/"raw", SIZE, 1, progress=False)
    assert set(own.split) == {"test"} and own.has_spectrum.all()


def test_two_reductions_of_one_spectrum_are_refused(survey, tmp_path):
    row = survey[1].head(1)[["ra", "dec", "z", "plate", "mjd", "fiberID"]]
    pd.concat([row.assign(run2d=r) for r in ("26", "103")]).to_csv(tmp_path/"own.csv", index=False)
    with pytest.raises(InvalidInputError, match="several reductions"):
        download(ArchiveParameters(table=f"{tmp_path}/own.csv"), tmp_path/"raw", SIZE, 1, survey[0], progress=False)


@pytest.mark.parametrize("text, message", [("ra,dec,z\n150.0,2.0,0.1,\n", "4 fields, the header 3"),
    ("ra,ra,dec\n1,2,3\n", "two columns are called 'ra'"), ("# nothing\n", "nothing in it")])
def test_tables_whose_rows_do_not_fit_their_header_are_refused(text, message, tmp_path):
    (tmp_path/"own.csv").write_text(text)
    with pytest.raises((DamagedFileError, InvalidInputError), match=message): read_table(tmp_path/"own.csv")


def test_redirects_on_the_same_host_are_followed(server):
    server.answer = lambda h: h.send(301, Location="/there") if h.path == "/here" else h.send(200, b"found")
    with ArchiveClient() as client: assert client.get(f"{server.url}/here").content == b"found"


NASTY = ("-1", "0", "1", "2", "7", "2147483648", "99999999999", "-9223372036854775808", "1E308", "T", "'x'", "'9999999E'", "'1PE(99999999)'", "'1QB(9)'",
         "'(9999,9999)'", "'GZIP_1'", "'PLIO_1'", "'HCOMPRESS_1'", "'RICE_1'", "'NOCOMPRESS'", "", "NaN", "&")


def mutated(content:bytes, rng) -> bytes:
    "A FITS file with a few things wrong: bytes, values of header cards, lost, repeated or exchanged blocks, or the end missing."
    data = bytearray(content)
    cards = [at for at in range(0, len(data), 80) if data[at + 8:at + 10] == b"= " and data[at:at + 1].isalpha()]
    structural = [at for at in cards if data[at:at + 8].strip() and any(word in data[at:at + 8] for word in (
        b"AXIS", b"BITPIX", b"COUNT", b"TF", b"ZTILE", b"ZCMP", b"ZVAL", b"THEAP", b"TZERO", b"TDIM"))]
    for _ in range(rng.integers(1, 4)):
        kind, at = rng.integers(6), int(rng.integers(len(data)))
        block = at//2880*2880
        if kind == 0: data[at:at + 40] = rng.bytes(min(40, len(data) - at))
        elif kind == 1: data[at] ^= 1 << rng.integers(8)
        elif kind in (2, 3):
            card = int(rng.choice(structural if kind == 2 and structural else cards))
            data[card + 10:card + 80] = NASTY[rng.integers(len(NASTY))].rjust(20).ljust(70).encode()
        elif kind == 4: data[block:block + 2880] = data[block:block + 2880]*int(rng.integers(3))
        else: del data[at:]
        if len(data) < 100: return bytes(data)
    return bytes(data)


def read_mutated_files(seed, n, folder, survey):
    "Hands `n` mutated files to every reader of FITS; returns how many were read and refused, and the longest time, seconds."
    import resource
    from specpred.images import read_cutout
    from specpred.formats import read_sdss
    stack, path = next(Path(survey).rglob("*.stk.r.unconv.fits")).read_bytes(), Path(folder)/"file.fits"
    spectrum, rng = _miniature_spectrum(266, 51602, 1, np.random.default_rng(seed)), np.random.default_rng(seed)
    archive, row = LocalArchive(survey), pd.read_parquet(Path(survey)/"skyserver/SpecObj.parquet").iloc[0]
    at = dict(ra=str(row.ra), dec=str(row.dec), size=str(SIZE), format="fits")
    cutout = archive.cutout(at | dict(red=read_cutout_names(archive.filenames(at))["g"]))
    Table(dict(ra=[1.0, 2.0], dec=[3.0, 4.0], specobjid=np.array([1, 2**64 - 1], np.uint64), run2d=["26", "26"])).write(path, overwrite=True)
    of_cutout = lambda content: check_cutout(content, "g", row.ra, row.dec, SIZE)
    cases = ((spectrum, (lambda content: check_spectrum(content, 266, 51602, 1), lambda _: read_sdss(path))),
             (cutout, (of_cutout, lambda _: read_cutout(path))), (stack, (lambda _: read_cutout(path), of_cutout)),
             (path.read_bytes(), (lambda _: read_table(path),)))
    signal.signal(signal.SIGALRM, lambda *_: (faulthandler.dump_traceback(), os._exit(3)))
    peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])/1000
    before, seen, longest = peak(), Counter(), 0
    limit = int(Path("/proc/self/statm").read_text().split()[0])*resource.getpagesize() + (2 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for k in range(n):
        content, readers = cases[k % len(cases)]
        path.write_bytes(content := mutated(content, rng))
        for reader in readers:
            signal.alarm(20)
            started = time.perf_counter()
            try: reader(content), seen.update(["read"])
            except SpecpredError as error:
                assert str(error)
                seen.update(["too much memory" if "MemoryError" in str(error) else "refused"])
            longest = max(longest, time.perf_counter() - started)
    signal.alarm(0)
    return dict(seen, longest=longest, megabytes=peak() - before)


def test_mutated_files_only_ever_raise_our_errors(survey, tmp_path):
    "In a process of its own, whose address space is limited to what it has after the imports and 2 GB."
    code = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import test_archives, warnings; warnings.simplefilter('ignore')\n" \
           "print(json.dumps(test_archives.read_mutated_files(5, 2000, *sys.argv[2:])))"
    here = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run([sys.executable, "-c", code, json.dumps(here), str(tmp_path), str(survey[0])], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["read"] > 100 and seen["refused"] > 1000 and "too much memory" not in seen and seen["megabytes"] < 500, seen


def one_galaxy(**changes) -> bytes:
    "SkyServer's answer with one row, some of it changed."
    columns = [c.split(".")[1].rstrip(",") for c in catalogue_query(1, 1).split() if c[:2] in ("s.", "p.")][:25]
    row = dict.fromkeys(columns, "1") | dict(specObjID="299489676975171584", plate="266", mjd="51602", fiberID="1", run2d="26",
        ra="30", dec="5", z="0.1", primTarget="64") | changes
    return (",".join(row) + "\n" + ",".join(row.values()) + "\n").encode()


@pytest.mark.parametrize("changes", [dict(specObjID="../../x"), dict(specObjID="2.9948967697517158e17"), dict(specObjID="-1"), dict(specObjID=str(2**64)),
    dict(run2d="../26"), dict(run2d="26/.."), dict(plate="-1"), dict(fiberID="../1"), dict(mjd="1e5"), dict(ra="nan"), dict(dec="-91"),
    dict(z="abc"), dict(z="-0.5"), dict(z="7"), dict(z=""), dict(primTarget="8"), dict(petroMag_r="inf")])
def test_rows_that_lead_elsewhere_or_were_not_asked_for_are_refused(changes):
    assert len(read_skyserver_csv(one_galaxy())) == 1
    with pytest.raises(ArchiveError): read_skyserver_csv(one_galaxy(**changes))


@pytest.mark.parametrize("name", ["http://elsewhere.org/rings.v3.skycell/1405/053/rings.v3.skycell.1405.053.stk.g.unconv.fits", "//elsewhere.org/a.fits",
    "/rings.v3.skycell/../../etc/passwd", "/rings.v3.skycell/1405/053/rings.v3.skycell.1405.054.stk.g.unconv.fits",
    "/rings.v3.skycell/1405/053/rings.v3.skycell.1405.053.stk.g.unconv.fits&format=jpg", "file:///etc/passwd"])
def test_lists_of_files_that_lead_elsewhere_are_not_followed(server, survey, tmp_path, name):
    "The other host and everything else is never asked; the galaxies end with the reason."
    asked, row = [], survey[1].iloc[0]
    pd.DataFrame(dict(ra=[row.ra], dec=[row.dec])).to_csv(tmp_path/"own.csv", index=False)
    listing = f"projcell subcell ra dec filter mjd type filename shortname badflag\n1405 053 1 1 g 5 stack {name} {name.rpartition('/')[2]} 0\n".encode()
    server.answer = lambda handler: (asked.append(handler.path.partition("?")[0]), handler.send(200, listing))
    here = ArchiveParameters(skyserver_url=server.url, sas_url=server.url, ps1_url=server.url, table=str(tmp_path/"own.csv"), wait=(0.01, 0.02))
    with pytest.raises(ArchiveError, match="list of files, a foreign file name"): download(here, tmp_path/"raw", SIZE, 1, progress=False)
    assert asked == ["/ps1filenames.py"]*2
    assert {p.name for p in (tmp_path/"raw").iterdir()} == {"source.json", "state.sqlite"}


def compression_bomb(path):
    "A few kB that claim to unpack to a terabyte."
    hdu = fits.CompImageHDU(np.zeros((64, 64), np.float32))
    hdu.writeto(path)
    content = path.read_bytes()
    for axis in (b"1", b"2"):
        at = content.index(b"ZNAXIS" + axis)
        content = content[:at + 10] + b"500000".rjust(20) + content[at + 30:]
    return path.write_bytes(content)


def test_files_that_claim_to_be_huge_are_refused(samples, tmp_path):
    from specpred.images import read_cutout
    path = tmp_path/"file.fits"
    compression_bomb(path)
    with pytest.raises(DamagedFileError, match="unpacks to more than"): read_cutout(path)
    with pytest.raises(DamagedFileError): check_cutout(path.read_bytes(), "g", 1.0, 1.0, SIZE)
    spectrum, cutout = samples
    for content, key, check in ((spectrum, b"NAXIS2  ", lambda c: check_spectrum(c, 266, 51602, 1)),
            (cutout, b"NAXIS2  ", lambda c: check_cutout(c, "g", 1.0, 1.0, SIZE))):
        at = content.index(key)
        with pytest.raises(DamagedFileError, match="truncated"): check(content[:at + 10] + b"999999999999".rjust(20) + content[at + 30:])


def test_a_tile_that_unpacks_to_more_than_its_header_says_is_refused(tmp_path):
    path, pixels = tmp_path/"stack.fits", np.random.default_rng(0).normal(size=(64, 64)).astype("f4")
    fits.CompImageHDU(pixels, compression_type="GZIP_1", quantize_level=0, tile_shape=(64, 64)).writeto(path)
    with open_fits(path) as hdus: assert (hdus[1].data == pixels).all()
    content = path.read_bytes()
    start = content.index(b"\x1f\x8b\x08")  # of the only tile
    length = int.from_bytes(content[start - 8:start - 4], "big")
    bomb = gzip.compress(bytes(2**22))
    assert len(bomb) < length
    path.write_bytes(content[:start] + bomb + bytes(length - len(bomb)) + content[start + length:])
    with pytest.raises(DamagedFileError, match="a tile unpacks to more than"):
        with open_fits(path) as hdus: hdus[1].data.sum()


def test_a_cutout_of_mostly_nothing_is_refused(survey, samples):
    position = survey[1][["ra", "dec"]].iloc[0]
    with fits.open(io.BytesIO(samples[1])) as hdus: header, pixels = hdus[0].header, hdus[0].data.copy()
    for empty in (6, 14):
        pixels.ravel()[:empty*pixels.size//20] = np.nan
        stream = io.BytesIO()
        fits.PrimaryHDU(pixels, header).writeto(stream)
        if empty == 6: check_cutout(stream.getvalue(), "g", *position, SIZE)
        else:
            with pytest.raises(DamagedFileError, match="empty: 30% of the pixels are finite"): check_cutout(stream.getvalue(), "g", *position, SIZE)


@pytest.fixture(scope="module")
def samples(survey):
    "A spectrum and a cutout."
    archive, row = LocalArchive(survey[0]), survey[1].iloc[0]
    at = dict(ra=str(row.ra), dec=str(row.dec), size=str(SIZE), format="fits")
    return _miniature_spectrum(266, 51602, 1, np.random.default_rng(0)), archive.cutout(at | dict(red=read_cutout_names(archive.filenames(at))["g"]))


def test_other_sql_gets_skyservers_kind_of_error(survey):
    with serve(survey[0]) as urls:
        for sql in ("SELECT TOP 10 * FROM SpecObj", "DROP TABLE SpecObj", catalogue_query(5, 1) + " --", ""):
            answer = httpx.get(f"{urls.skyserver_url}/SkyServerWS/SearchTools/SqlSearch", params=dict(cmd=sql, format="csv"))
            assert answer.status_code == 400 and {"Error Code", "Error Type", "Error Message"} == set(answer.json())
        good = dict(cmd=catalogue_query(5, 1), format="csv")
        search = f"{urls.skyserver_url}/SkyServerWS/SearchTools/SqlSearch"
        for wrong, status in ((dict(good, cmd=good["cmd"].replace("s.z > 0", "s.z > 1.2.3")), 400),
                (dict(good, cmd=good["cmd"].replace("p.modelMag_g", "s.modelMag_g")), 400), (dict(good, format="json"), 400), (good, 200)):
            assert httpx.get(search, params=wrong).status_code == status
        for path in (f"sas/{'x'*400}.fits", f"sas/{'x/'*3000}a", "sas/%00",
                "cgi-bin/fitscut.cgi?ra=1&dec=1&format=fits&red=/rings.v3.skycell/" + "x"*400 + ".fits", "cgi-bin/ps1filenames.py?ra=٣&dec=nan"):
            assert httpx.get(f"{urls.sas_url.removesuffix('sas')}{path}").status_code in (400, 404)


def test_what_the_local_server_trips_over_is_an_answer_too(survey, tmp_path):
    import shutil
    shutil.copytree(survey[0], tmp_path/"survey")
    for path in (tmp_path/"survey/ps1").rglob("*.fits"): path.write_bytes(b"no FITS")
    with serve(tmp_path/"survey") as urls:
        answer = httpx.get(f"{urls.ps1_url}/ps1filenames.py", params=dict(ra=survey[1].ra[0], dec=survey[1].dec[0]))
        assert answer.status_code == 500 and answer.json()["Error Code"] == 500


coordinates = st.tuples(st.floats(0, 359.999), st.floats(-29, 90))

@settings(max_examples=40, deadline=None)
@given(st.lists(coordinates, min_size=1, max_size=8), st.sampled_from(["csv", "fits", "parquet", "vot"]), st.booleans())
def test_any_positions_in_any_format_become_a_catalogue(tmp_path_factory, positions, kind, with_ids):
    path, ids = tmp_path_factory.mktemp("table")/f"own.{kind}", np.uint64(2**64 - 1) - np.arange(len(positions), dtype=np.uint64)
    table = pd.DataFrame(positions, columns=["RA", "DEC"]).assign(
        name="x", **({"specObjID": ids.astype(str) if kind == "vot" else ids} if with_ids else {}))
    {"csv": lambda: table.to_csv(path, index=False), "parquet": lambda: table.to_parquet(path)}.get(kind, lambda: Table.from_pandas(table).write(
        path, format="votable" if kind == "vot" else kind))()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # positions that repeat
        read = read_table(path)
    assert read.specobjid.dtype == np.uint64 and read.specobjid.is_unique and (read.plate == 0).all()
    np.testing.assert_allclose(read[["ra", "dec"]], [positions[i] for i in read.table_row], rtol=0, atol=1e-9)
    if with_ids: assert read.specobjid.tolist() == [int(ids[i]) for i in read.table_row]
    else: assert set(read.specobjid) == set(specobjid_of_position(*np.transpose(positions))) and (read.specobjid >> np.uint64(50) == 16_383).all()


@pytest.mark.parametrize("content, named", [("ra,dec,plate,mjd,fiberid\n1,2,266,51602,\n", "'plate', row 1"), ("ra,dec\n1,2\n3,x\n", "'dec', row 2"),
    ("ra,dec\n361,2\n", "'ra', row 1"), ("ra,dec,z\n1,2,99\n", "'z', row 1"), ("RAJ2000,dec,plate,mjd,fiber\n1,2,266,51602,9999\n", "'fiber', row 1"),
    ("RAJ2000,dec\n-9999,2\n", "'RAJ2000', row 1"), ("ra,dec,plate,MJD,Fiber\n1,2,266,51602,1\n5,2,266,51602,1\n", "'plate', row 2"),
    ("ra,dec,fiber\n1,2,9\n", "has fiber, and no column 'plate'"), ("rra,dec\n1,2\n", "is it 'rra'"),
    ("ra,dec,specobjid\n1,2,-5\n", "'specobjid', row 1"), ("ra,dec\n1\n", "own.csv: row 1 has 1 fields"),
    ("ra,dec,plate,mjd,fiberid\n1,2,99999,51602,1\n", "'plate', row 1"), ("ra;dec\n1;2\n", "separate columns by commas"),
    ("ra,dec,plate,mjd,fiberid\n1,2,266.5,51602,1\n", "'plate', row 1"), ("ra,dec,specobjid\n1,2,299489676975171584.0\n", "'specobjid', row 1")])
def test_what_is_wrong_with_a_table_is_said_by_column(tmp_path, content, named):
    (tmp_path/"own.csv").write_text(content)
    with pytest.raises(InvalidInputError, match=named): read_table(tmp_path/"own.csv")


def test_whole_numbers_with_a_point_are_whole_numbers(tmp_path):
    "As pandas writes a column with gaps."
    pd.DataFrame(dict(ra=[1., 2.], dec=[3., 4.], plate=[266, None], mjd=[51602, None], fiberid=[162, None])).to_csv(tmp_path/"own.csv", index=False)
    assert "266.0" in (tmp_path/"own.csv").read_text()
    assert sorted(read_table(tmp_path/"own.csv")[["plate", "mjd", "fiberid"]].values.tolist()) == [[0, 0, 0], [266, 51602, 162]]


def test_missing_measurements_magnitudes_and_hashes_in_a_table_are_what_they_are(tmp_path):
    def read(text):
        (tmp_path/"own.csv").write_text(text)
        return read_table(tmp_path/"own.csv", "dr16")
    table = read("# of 2026\n#\nra,dec,modelMag_g,z,zwarning,plate,mjd,fiberid,class\n"
        "1,2,-9999,-9999.0,-9999,4055,55359,1,SDSS#1\n3,4,17.5,0.1,4,266,51602,2,b\n")
    assert table.sort_values("ra")[["modelmag_g", "redshift"]].isna().values.tolist() == [[True, True], [False, False]]
    assert table.sort_values("ra")[["class", "zwarning", "run2d"]].values.tolist() == [["SDSS#1", 0, "v5_13_0"], ["b", 4, "26"]]
    with pytest.warns(UserWarning, match="'Z' is taken for a magnitude"): assert read("ra,dec,g,r,i,Z\n1,2,13,12,11.5,11.2\n").redshift.isna().all()
    assert read("ra,dec,g,r,i,z,zspec\n1,2,13,12,11.5,11.2,0.1\n").redshift.tolist() == read("ra,dec,r,z\n1,2,12,0.1\n").redshift.tolist() == [0.1]


def test_tables_of_other_kinds_are_refused(tmp_path):
    floats = pd.DataFrame(dict(ra=[1.0], dec=[2.0], specobjid=[2.99e17]))
    floats.to_parquet(tmp_path/"floats.parquet"), (tmp_path/"page.fits").write_text("<html>"), (tmp_path/"own.txt").write_text("ra,dec")
    own = Table(dict(ra=[1.0], dec=[2.0]))
    own["ra"].unit = "km"
    own.write(tmp_path/"km.fits")
    laughs = '<!DOCTYPE x [<!ENTITY a "ha">' + "".join(
        f'<!ENTITY {b} "{f"&{a};"*10}">' for a, b in zip("abcdefghi", "bcdefghij")) + "]><VOTABLE>&j;</VOTABLE>"
    (tmp_path/"laughs.xml").write_text(laughs)
    for name, kind, said in (("floats.parquet", InvalidInputError, "column 'specobjid'.*float64"),
            ("page.fits", DamagedFileError, "a web page"), ("own.txt", InvalidInputError, "ending"),
            ("km.fits", InvalidInputError, "column 'ra'.*km"), ("laughs.xml", DamagedFileError, "votable"), ("none.csv", MissingInputError, "no table")):
        with pytest.raises(kind, match=said): read_table(tmp_path/name)


def test_a_table_with_plates_brings_spectra_and_one_changed_row_asks_for_one_galaxy(survey, tmp_path):
    table = survey[1][["ra", "dec", "plate", "mjd", "fiberID", "run2d", "z"]].copy()
    table.to_csv(tmp_path/"own.csv", index=False)
    with serve(survey[0]) as urls:
        here = ArchiveParameters(**vars(urls), table=str(tmp_path/"own.csv"))
        catalogue = download(here, tmp_path/"raw", SIZE, 1, progress=False)
        assert catalogue.specobjid.tolist() == sorted(survey[1].specObjID) and catalogue.has_spectrum.all() and catalogue.has_images.sum() == 45
        assert plan_download(here, tmp_path/"raw", SIZE, 1).startswith("271 files, 271 of them")
        table.loc[3, "ra"] += 0.5/3600
        table.to_csv(tmp_path/"own.csv", index=False)
        assert "5 to download: 6 requests" in plan_download(here, tmp_path/"raw", SIZE, 1)
        assert download(here, tmp_path/"raw", SIZE, 1, progress=False).has_images.sum() == 45
    assert "271 of 271 files have arrived" in describe_download(tmp_path/"raw")


def test_the_command_line_serves_downloads_and_tells_what_is_missing(survey, tmp_path, monkeypatch, capsys):
    from specpred.cli import main
    def specpred(*words) -> tuple:
        monkeypatch.setattr(sys, "argv", ["specpred", *map(str, words)])
        with pytest.raises(SystemExit) as end: main()
        return end.value.code or 0, capsys.readouterr().out

    code = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from specpred.cli import main; main()"
    command = [sys.executable, "-c", code, json.dumps(sys.path), "archive", "serve", str(survey[0]), "--port", "0", "--faults", "lasting=0.2 seed=3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            server.stdout.readline()
            words = server.stdout.readline().split()[1:]  # what it says that one should type
            status, said = specpred(*words, "--data-dir", tmp_path, "--set", "images.size=24", "--set", "archives.wait=0.01,0.02")
            assert status == 0 and "of 271 files have arrived" in said and "truncated" in said
        finally: server.terminate()
    status, said = specpred("download", "--data-dir", tmp_path, "--status")
    assert status == 0 and "not found" in said and said.count("after 3 requests: truncated") == 3
    for wrong, message in ((["download", "--data-dir", tmp_path/"none", "--status"], "holds no download yet"),
            (["archive", "serve", tmp_path], "holds no survey"), (["download", "--table", tmp_path/"none.csv", "--dry-run"], "There is no table"),
            (["download", "--dry-run", "--set", "archives.concurrency=0"], "archives.concurrency=0"),
            (["archive", "serve", survey[0], "--faults", "rain=1"], "no setting of faults")):
        status, said = specpred(*wrong)
        assert status.startswith("error: ") and message in status and "\n" not in status and not said
    done = subprocess.run([*command[:4], "download", "--status", "--profile", "smok"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: There is no profile 'smok'") and done.stderr.count("\n") == 1


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_any_answer_to_a_query_is_read_or_refused(content):
    for read in (read_skyserver_csv, read_cutout_names):
        try: read(content)
        except SpecpredError as error: assert str(error)


CELLS = st.one_of(st.sampled_from(["", "-1", "0", "-9999", "nan", "inf", "-inf", "null", "1e400", "99999999999999999999999", "0x10", "1_0", "٣",
    "../x", "a,b", '"', "'", "#", "\n", "\x00", "1;2", "10:20:30", "<b>", "26", "v5_7_0", "2.5"]), st.floats(-400, 400).map(str),
    st.integers(-10, 2**64).map(str), st.text(max_size=6))

@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_catalogue_with_any_cells_is_sound_or_refused(tmp_path_factory, data):
    "A good table of three rows, of which a few cells or names of columns are anything."
    names, *rows = (line.split(",") for line in (one_galaxy() + b"".join(
        one_galaxy(specObjID=str(k), fiberID=str(k)).split(b"\n")[1] + b"\n" for k in (7, 8))).decode().splitlines())
    lines = [names, *rows]
    for _ in range(data.draw(st.integers(1, 3))): lines[data.draw(st.integers(0, 3))][data.draw(st.integers(0, len(names) - 1))] = data.draw(CELLS)
    content = "".join(",".join(line) + "\n" for line in lines).encode("utf-8", "surrogatepass")
    path = tmp_path_factory.getbasetemp()/"cells.csv"
    path.write_bytes(content)
    for read, low, high in ((read_skyserver_csv, 0, 0.360001), (lambda _: read_table(path), -0.1, 12)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                table = read(content)
        except SpecpredError as error: assert str(error)
        else:
            assert table.specobjid.dtype == np.uint64 and table.specobjid.is_unique and 0 < len(table) <= 3
            assert table.ra.between(0, 360).all() and table.dec.between(-90, 90).all() and table.redshift.dropna().between(low, high).all()
            assert table.run2d.str.fullmatch(r"([0-9]{2,3}|v[0-9]+(_[0-9]+){1,2})?").all() and not np.isinf(table.select_dtypes(float)).any().any()
            for row in table[table.plate > 0].itertuples(): assert spectrum_path(row.run2d, row.plate, row.mjd, row.fiberid).count("/") == 8
            if low == 0: assert (table.redshift > 0).all() and (table.primtarget & 70).all() and (table.plate > 0).all()


def test_more_rows_than_asked_for_are_refused(server):
    server.answer = lambda handler: handler.send(200, one_galaxy() + one_galaxy(specObjID="7").split(b"\n")[1] + b"\n")
    with ArchiveClient(bad_attempts=1) as client:
        assert fetch_catalogue(client, server.url, catalogue_query(2, 1))
        with pytest.raises(ArchiveError, match="2 rows, asked for 1 at most"): fetch_catalogue(client, server.url, catalogue_query(1, 1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(200, 2000), st.sampled_from([2.0, 5.0, 10.0]))
def test_blocks_are_whole_and_fractions_near(seed, n, block_deg):
    rng = np.random.default_rng(seed)
    ra, dec = rng.uniform(0, 360, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))
    block, split = split_by_sky(ra, dec, (0.6, 0.2, 0.2), block_deg, seed)
    table = pd.DataFrame(dict(block=block, split=split, inside=dec > -30))
    assert (table.groupby("block").split.nunique() == 1).all() and (table.split[~table.inside] == "train").all()
    largest, inside = table[table.inside].groupby("block").size().max(), table[table.inside]
    for name, fraction in dict(valid=0.2, test=0.2).items(): assert abs((inside.split == name).sum() - fraction*len(inside)) <= largest
