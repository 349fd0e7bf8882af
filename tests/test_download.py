"The download through failures: hostile answers, damaged files, kills, archives that fail."
import contextlib
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pandas as pd
import pytest

from specpred.config import (ArchiveError, ArchiveParameters, DamagedFileError, InvalidInputError,
    MissingInputError, MockParameters, SpecpredError)
from specpred.download import (ArchiveClient, ArchiveFile, BusyError, DownloadState, Fetcher,
    NotFoundError, Outcomes, RefusedError, describe_download, download, fetch_missing, galaxy_files,
    losses, plan_download)
from specpred.cutouts import PS1_SOUTH
from specpred.local_archive import FAULTS, ArchiveURLs, Faults, serve
from specpred.mock_survey import make_survey
from specpred.stages import only_one
from specpred.surveys import PS1, RUBIN

SIZE, ALL_TRAIN = 24, (1, 0, 0, 0)  # the mock survey has too few blocks of sky to be divided
LOCAL = ArchiveParameters(split=ALL_TRAIN)
# a 404 that passes cannot be told from one that lasts
FAULTY = Faults(passing=0.1, lasting=0.1, seed=11, kinds=FAULTS[:-1], latency=0.02, retry_after=0)
HASTY = dict(attempts=2, wait=(0.001, 0.002))
PATIENT = dict(attempts=12, wait=(0.001, 0.01))


def fetch(parameters, raw, mock=None, size=SIZE, seed=1, **more):
    return download(parameters, raw, PS1, size, seed, mock, progress=False, **more)


def parameters_of(urls, **more):
    return ArchiveParameters(**asdict(urls) | dict(split=ALL_TRAIN) | more)


def files_in(folder):
    "Every file under its final name."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.fits"))
        if p.is_file() and ".tmp" not in str(p)}


@pytest.fixture(scope="module")
def clean(mock, tmp_path_factory):
    "Folder and catalogue of a download without faults."
    raw = tmp_path_factory.mktemp("clean")/"raw"
    return raw, fetch(LOCAL, raw, mock)


@pytest.fixture(scope="module")
def through_faults(mock, tmp_path_factory):
    "Folder and catalogue of a download through faults, and the targets of its files' requests."
    raw, targets = tmp_path_factory.mktemp("faulty")/"raw", {}

    class Client(ArchiveClient):
        def request(self, url, *limits):
            band = url.params.get("red", "").split(".stk.")[-1][:1]
            place = url.params.get("ra"), url.params.get("dec"), band
            targets[place if band else url.path.rpartition("/")[2]] = url.raw_path.decode()
            return super().request(url, *limits)
    with serve(mock, faults=FAULTY) as urls:
        parameters = parameters_of(urls, **PATIENT)
        catalogue = fetch(parameters, raw, client=Client(parameters))
    return raw, catalogue, targets


def test_every_good_file_arrives_and_every_other_is_explained(clean, through_faults):
    raw, catalogue, targets = through_faults
    lasting, seen, files = FAULTY.model_copy(update=dict(passing=0)), Counter(), files_in(clean[0])
    with DownloadState(raw/"state.sqlite") as state:
        for row in catalogue.itertuples():
            for file in galaxy_files(row, PS1.bands, SIZE, LOCAL):
                key = file.name.rpartition("/")[2]
                if file.archive == "PS1":
                    key = f"{row.ra:.8f}", f"{row.dec:.8f}", file.band
                fault = lasting.choose(targets[key], 1)
                if file.archive == "SAS" and fault in ("band", "empty"):
                    fault = None
                expected = {None: "good", "missing": "missing"}.get(fault, "bad")
                assert state.recorded(file).status == expected, (file, fault)
                path, quarantined = raw/file.name, raw/"quarantine"/file.name
                assert path.is_file() == (expected == "good")
                assert quarantined.is_file() == (expected == "bad")
                if expected == "good":
                    assert path.read_bytes() == files[file.name]
                elif expected == "bad":
                    assert quarantined.read_bytes() != files[file.name]
                    reason = quarantined.with_name(f"{quarantined.name}.reason").read_text()
                    assert reason.strip() == state.recorded(file).error
                seen[fault] += 1
    assert set(seen) == {None, "truncated", "page", "band", "empty", "corrupted", "missing"}
    complete = catalogue.has_images & catalogue.has_spectrum
    assert (catalogue.status == "complete").equals(complete) and 0 < complete.sum() < len(catalogue)
    assert losses(catalogue).galaxies["complete"] == complete.sum()


# a process that has imported everything, and forks a download for each line that it reads
FORKING = """
import json, os, sys
path, parameters, raw, size = json.loads(sys.argv[1])
sys.path[:] = path
from specpred.config import ArchiveParameters
from specpred.download import download
from specpred.surveys import PS1
for _ in sys.stdin:
    if (pid := os.fork()) == 0:
        download(ArchiveParameters(**parameters), raw, PS1, size, 1, progress=False)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def n_arrived(raw):
    "How many files there are, also while a download changes the folder."
    return sum(len(files) for folder, _, files in os.walk(raw) if ".tmp" not in folder)


def end_of(raw):
    "What became of every file, what lies in raw/, and the catalogue."
    with DownloadState(raw/"state.sqlite") as state:
        rows = state.database.execute("SELECT * FROM file ORDER BY name").fetchall()
    return rows, files_in(raw), pd.read_parquet(raw/"catalogue.parquet").to_dict("records")


def test_a_download_killed_at_random_moments_ends_in_the_same_state(
        mock, clean, through_faults, tmp_path):
    raw, rng, good, n_kills = tmp_path/"raw", random.Random(2), files_in(clean[0]), 4
    with serve(mock, faults=FAULTY) as urls:
        parameters = asdict(urls) | PATIENT | dict(split=ALL_TRAIN)
        arguments = json.dumps((sys.path, parameters, str(raw), SIZE))
        command = [sys.executable, "-c", FORKING, arguments]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True) as parent:
            def start():
                parent.stdin.write("\n")
                parent.stdin.flush()
                return int(parent.stdout.readline())
            for k in range(n_kills):
                pid, end = start(), time.monotonic() + 20
                wanted = len(good)*(k + rng.random())/(n_kills + 2)
                while n_arrived(raw) < wanted and time.monotonic() < end:
                    time.sleep(0.02)
                os.kill(pid, signal.SIGKILL)
                assert int(parent.stdout.readline()) == -signal.SIGKILL
                assert not (raw/"catalogue.parquet").exists()
                arrived = files_in(raw)
                assert all(arrived[name] == good[name] for name in arrived if name in good)
            start()
            assert parent.stdout.readline() == "0\n"
            parent.stdin.close()
    for here, there in zip(end_of(raw), end_of(through_faults[0]), strict=True):
        assert here == there
    assert not list(raw.rglob(".*.tmp"))


def test_any_surveys_bands_are_fetched(tmp_path):
    numbers = MockParameters(n_galaxies=2, galaxies_per_side=2, stamp_size=40)
    make_survey(numbers, tmp_path/"mock", seed=1, survey=RUBIN, n_jobs=1, progress=False)
    catalogue = download(LOCAL, tmp_path/"raw", RUBIN, SIZE, 1, tmp_path/"mock", progress=False)
    assert catalogue.has_images.all()
    bands = [path.stem for path in (tmp_path/"raw/cutouts").rglob("*.fits")]
    assert sorted(bands) == sorted("ugrizy"*2)


def test_what_arrived_stays_when_other_numbers_change(mock, clean, tmp_path):
    raw = tmp_path/"raw"
    shutil.copytree(clean[0], raw)
    stamps = {p: p.stat().st_mtime_ns for p in raw.rglob("*.fits")}
    again = fetch(ArchiveParameters(split=(0.5, 0, 0, 0.5)), raw, mock)
    assert stamps == {p: p.stat().st_mtime_ns for p in raw.rglob("*.fits")}
    assert again.drop(columns="split").equals(clean[1].drop(columns="split"))
    fetch(LOCAL, raw, mock, size=SIZE + 2)
    kept = {p.parent.name for p in stamps if p.stat().st_mtime_ns == stamps[p]}
    assert kept == {"spectra"}


def test_files_that_became_good_leave_the_quarantine(mock, tmp_path):
    raw = tmp_path/"raw"
    faults = Faults(lasting=0.3, lasting_kinds=("truncated",))
    with serve(mock, faults=faults) as urls:
        fetch(parameters_of(urls, **HASTY), raw)
        port = httpx.URL(urls.sas_url).port
    assert list((raw/"quarantine").rglob("*.fits"))
    with serve(mock, port=port) as urls:
        assert fetch(parameters_of(urls), raw).has_spectrum.all()
    assert not [p for p in (raw/"quarantine").rglob("*") if p.is_file()]


def test_missing_files_are_asked_for_again_on_request(mock, clean, tmp_path):
    shutil.copytree(mock, tmp_path/"mock")
    lost = next((tmp_path/"mock/sas").rglob("*.fits"))
    content = lost.read_bytes()
    lost.unlink()
    get = partial(fetch, LOCAL, tmp_path/"raw", tmp_path/"mock")
    assert (~get().has_spectrum).sum() == 1
    lost.write_bytes(content)
    assert not get().has_spectrum.all() and get(retry_missing=True).equals(clean[1])


def test_an_archive_that_is_down_keeps_what_has_arrived(mock, tmp_path):
    raw = tmp_path/"raw"
    with serve(mock) as urls:
        fetch(parameters_of(urls), raw)
    shutil.rmtree(raw/"spectra")
    with pytest.raises(ArchiveError, match="SAS was skipped after 40 failures.*ConnectError"):
        fetch(parameters_of(urls, **HASTY), raw)
    assert list((raw/"cutouts").rglob("*.fits")) and not (raw/"catalogue.parquet").exists()


@pytest.mark.parametrize("status, headers", [(403, {}), (503, {"Retry-After": "86400"})])
def test_an_archive_that_refuses_is_skipped_and_the_other_goes_on(
        mock, server, tmp_path, status, headers):
    asked = Counter()
    with serve(mock) as urls:
        def answer(handler):
            asked[handler.path.split("?")[0]] += 1
            if "fitscut" in handler.path:
                return handler.send(status, b"go away", **headers)
            relayed = httpx.get(urls.ps1_url.replace("/cgi-bin", "") + handler.path)
            handler.send(relayed.status_code, relayed.content)
        server.answer = answer
        parameters = parameters_of(urls, ps1_url=f"{server.url}/cgi-bin", concurrency=2)
        with pytest.raises(ArchiveError, match="PS1 was skipped"):
            fetch(parameters, tmp_path/"raw")
    assert 40 <= asked["/cgi-bin/fitscut.cgi"] < 40 + 5*2*2
    n_spectra = len(list((mock/"sas").rglob("*.fits")))
    assert len(list((tmp_path/"raw/spectra").iterdir())) == n_spectra


# the client

@pytest.fixture
def server():
    "A server whose answers the test writes: a function of the handler."
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *message): pass

        def do_GET(self): self.server.answer(self)

        def send(self, status, body=b"", **headers):
            self.send_response(status)
            for key, value in ({"Content-Length": len(body)} | headers).items():
                self.send_header(key, str(value))
            self.end_headers()
            self.wfile.write(body)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_only_what_may_pass_is_repeated_after_the_pause_asked_for(server):
    asked = []
    def answer(handler):
        asked.append((handler.path, time.monotonic()))
        if handler.path == "/busy" and len(asked) == 1:
            return handler.send(429, **{"Retry-After": "1"})
        handler.send({"/busy": 200, "/missing": 404, "/refused": 400}[handler.path], b"yes")
    server.answer = answer
    client = ArchiveClient(ArchiveParameters(wait=(0.01, 0.02)))
    assert client.get(f"{server.url}/busy") == b"yes"
    assert asked[1][1] - asked[0][1] >= 1
    for path, kind in (("missing", NotFoundError), ("refused", RefusedError)):
        before = len(asked)
        with pytest.raises(kind):
            client.get(f"{server.url}/{path}")
        assert len(asked) == before + 1


def test_no_more_requests_at_once_than_allowed(server):
    now, most, lock = 0, 0, threading.Lock()
    def answer(handler):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.03)
        with lock:
            now -= 1
        handler.send(200, b"x")
    server.answer = answer
    client = ArchiveClient(ArchiveParameters(concurrency=3))
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda k: client.get(f"{server.url}/{k}"), range(12)))
    assert most == 3


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"0"*65536)
    except OSError:
        handler.close_connection = True


@pytest.mark.parametrize("answer", [
    lambda h: h.send(302, Location="http://127.0.0.2/elsewhere"),
    lambda h: h.send(302, Location="file:///etc/passwd"),
    lambda h: h.send(302, Location=h.path),
    lambda h: h.send(302),
    lambda h: h.send(302, Location="http://[/"),
    lambda h: h.send(302, Location="http://xn--zzzzzzz9999/"),
    lambda h: h.send(200, bytes(10**6 + 1)),
    lambda h: h.send(200, b"", **{"Content-Length": 10**12}) or h.connection.close(),
    endless,
    lambda h: h.send(503, **{"Retry-After": "864000"})],
    ids=["other host", "file", "circle", "nowhere", "nonsense", "no host name", "too long",
        "announced only", "endless", "closed for days"])
def test_unsafe_answers_are_refused(server, answer):
    server.answer = answer
    with pytest.raises((RefusedError, BusyError)):
        client = ArchiveClient(ArchiveParameters(timeout=1, **HASTY))
        client.get(f"{server.url}/file", max_bytes=10**6)


def test_a_compressed_answer_is_not_unpacked(server):
    body = gzip.compress(bytes(10**7))
    server.answer = lambda handler: handler.send(200, body, **{"Content-Encoding": "gzip"})
    assert ArchiveClient().get(f"{server.url}/file", max_bytes=10**6) == body


def test_redirects_on_the_same_host_are_followed(server):
    def answer(handler):
        if handler.path == "/here":
            return handler.send(301, Location="/there")
        handler.send(200, b"found")
    server.answer = answer
    assert ArchiveClient().get(f"{server.url}/here") == b"found"


def test_a_client_that_is_stopped_does_not_sit_out_a_pause(server):
    server.answer = lambda handler: handler.send(429, **{"Retry-After": "60"})
    client = ArchiveClient()
    threading.Timer(0.2, client.stopping.set).start()
    started = time.monotonic()
    with pytest.raises(BusyError):
        client.get(f"{server.url}/file")
    assert time.monotonic() - started < 10


def test_a_silent_archive_is_given_up(server):
    server.answer = lambda handler: time.sleep(1)
    with pytest.raises(BusyError, match="ReadTimeout"):
        ArchiveClient(ArchiveParameters(attempts=1, timeout=0.1)).get(f"{server.url}/file")


# answers that lead elsewhere

def own_table(folder, rows):
    path = folder/"own.csv"
    rows.to_csv(path, index=False)
    return str(path)


@pytest.mark.parametrize("name", [
    "http://elsewhere.org/rings.v3.skycell/1405/053/rings.v3.skycell.1405.053.stk.g.unconv.fits",
    "//elsewhere.org/a.fits", "/rings.v3.skycell/../../etc/passwd", "file:///etc/passwd",
    "/rings.v3.skycell/1405/053/rings.v3.skycell.1405.054.stk.g.unconv.fits",
    "/rings.v3.skycell/1405/053/rings.v3.skycell.1405.053.stk.g.unconv.fits&format=jpg"])
def test_lists_of_images_that_lead_elsewhere_are_not_followed(server, tmp_path, name):
    asked = []
    listing = ("projcell subcell ra dec filter mjd type filename shortname badflag\n"
        f"1405 053 1 1 g 5 stack {name} {name.rpartition('/')[2]} 0\n").encode()
    def answer(handler):
        asked.append(handler.path.partition("?")[0])
        handler.send(200, listing)
    server.answer = answer
    table = own_table(tmp_path, pd.DataFrame(dict(ra=[150.0], dec=[2.0])))
    here = ArchiveParameters(**dict.fromkeys(asdict(ArchiveURLs.local(1)), server.url), table=table,
        **HASTY)
    with pytest.raises(ArchiveError, match="Nothing arrived of any galaxy.*image g bad"):
        fetch(here, tmp_path/"raw")
    assert asked == ["/ps1filenames.py"]*2
    kept = {p.name for p in (tmp_path/"raw").iterdir()}
    assert kept == {"source.json", "state.sqlite"}


def html_page(text):
    return (b"<html><head><title>Skyserver Error</title><script>if (1 < 2) go()</script></head>"
        b"<body bgcolor=white><h2>An error occured</h2><font color=red>" + text + b"<br></font>")


@pytest.mark.parametrize("status, page, kind, n_requests, expected", [
    (500, b'{"Error Code":500,"Error Type":"InternalServerError","Error Message":"Invalid column '
        b'name \'zz\'.","LogMessageID":"1"}', RefusedError, 1, "Invalid column name 'zz'."),
    (500, b'{"ErrorMessage": "Incorrect syntax near\\n \'FORM\'."}', RefusedError, 1,
        "Incorrect syntax near 'FORM'."),
    (500, html_page(b"Incorrect syntax near &#39;FORM&#39;."), RefusedError, 1,
        "Skyserver Error An error occured Incorrect syntax near 'FORM'."),
    (400, b"no <b>such</b>\x1b[31m table\0", RefusedError, 1, "no such [31m table"),
    (500, b'{"message": "The server is out of memory"}', BusyError, 2, "out of memory"),
    (503, html_page(b"come back later" + b"!"*10**6), BusyError, 2, "come back later!!!"),
    (500, b"["*10**5, BusyError, 2, "[[["), (500, b"", BusyError, 2, "busy (500)")])
def test_what_an_archive_says_of_an_error_is_in_the_message(
        server, status, page, kind, n_requests, expected):
    asked = []
    def answer(handler):
        asked.append(handler.path)
        with contextlib.suppress(OSError):  # a client that has read enough
            handler.send(status, page)
    server.answer = answer
    with pytest.raises(kind) as error:
        ArchiveClient(ArchiveParameters(**HASTY)).get(f"{server.url}/SqlSearch")
    assert expected in str(error.value) and len(str(error.value)) < 400
    assert str(error.value).isprintable() and len(asked) == n_requests


@pytest.mark.parametrize("content, expected", [
    (html_page(b"The database isn&#39;t up"), "says: Skyserver Error An error occured The database "
        "isn't up$"), (b"", "says: $"),
    (b'{"Error Message": "Incorrect syntax"}', "says: Incorrect syntax$"),
    (b"#Table1\nspecObjID,plate\n../../x,1\n", "says: #Table1 specObjID,plate ../../x,1$")])
def test_an_answer_that_is_no_catalogue_is_not_kept(server, tmp_path, content, expected):
    server.answer = lambda handler: handler.send(200, content)
    here = ArchiveParameters(**dict.fromkeys(asdict(ArchiveURLs.local(1)), server.url))
    with pytest.raises(ArchiveError, match=expected):
        fetch(here, tmp_path/"raw")
    assert [p.name for p in (tmp_path/"raw").iterdir()] == ["source.json"]


# one folder, one archive, one download

def test_what_came_over_the_network_is_never_removed(mock, tmp_path):
    raw = tmp_path/"raw"
    with serve(mock) as urls:
        fetch(parameters_of(urls), raw)
    before = {p: p.read_bytes() for p in raw.rglob("*.fits")}
    for parameters, survey in ((parameters_of(urls, ps1_url="http://127.0.0.1:9"), None),
            (LOCAL, mock)):
        with pytest.raises(InvalidInputError, match="Nothing was changed"):
            fetch(parameters, raw, survey)
        with pytest.raises(InvalidInputError, match="Nothing was changed"):
            plan_download(parameters, raw, PS1, SIZE, 1, survey)
    with pytest.raises(ArchiveError):  # no server any more, and another query
        fetch(parameters_of(urls, **HASTY), raw, seed=7)
    (raw/"source.json").write_text("{")
    with pytest.raises(InvalidInputError, match="origin of the files"):
        fetch(parameters_of(urls), raw)
    (raw/"source.json").unlink()
    with pytest.raises(InvalidInputError, match="origin of the files"):
        fetch(parameters_of(urls), raw)
    assert before == {p: p.read_bytes() for p in raw.rglob("*.fits")}


def test_another_mock_survey_replaces_the_files_of_the_first(mock, clean, tmp_path):
    shutil.copytree(clean[0], tmp_path/"raw")
    shutil.copytree(mock, tmp_path/"mock")
    table = tmp_path/"mock/skyserver/SpecObj.parquet"
    pd.read_parquet(table).head(5).to_parquet(table)
    assert len(fetch(LOCAL, tmp_path/"raw", tmp_path/"mock")) == 5
    assert len(list((tmp_path/"raw/spectra").iterdir())) == 5


def test_two_downloads_into_one_folder_are_refused(mock, tmp_path):
    with only_one(tmp_path/"raw", "download"):
        with pytest.raises(SpecpredError, match="another download"):
            fetch(LOCAL, tmp_path/"raw", mock)


def test_archives_have_to_be_named_all_or_served(tmp_path):
    with pytest.raises(MissingInputError, match="no mock survey"):
        fetch(LOCAL, tmp_path/"raw")
    with pytest.raises(InvalidInputError, match="sas_url"):
        fetch(ArchiveParameters(sas_url="http://a"), tmp_path/"raw", tmp_path)


@pytest.mark.parametrize("change", ["ALTER TABLE file RENAME COLUMN status TO state",
    "DROP TABLE file; CREATE TABLE file (x)", None])
def test_a_damaged_state_is_named(clean, mock, tmp_path, change):
    shutil.copytree(clean[0], tmp_path/"raw")
    with DownloadState(tmp_path/"raw/state.sqlite") as state:
        state.database.executescript(change or "")
    if change is None:
        (tmp_path/"raw/state.sqlite").write_bytes(b"no database at all"*100)
    with pytest.raises(DamagedFileError, match="state.sqlite is no state of a download"):
        describe_download(tmp_path/"raw")
    with pytest.raises(DamagedFileError, match="state.sqlite is no state of a download"):
        fetch(LOCAL, tmp_path/"raw", mock)


# tables of one's own

def test_positions_bring_cutouts_and_are_all_test(clean, mock, tmp_path):
    inside = clean[1][clean[1].dec > PS1_SOUTH].head(2)
    rows = pd.DataFrame(dict(ra=[*inside.ra, 200.0], dec=[*inside.dec, 60.0]))
    own = fetch(ArchiveParameters(table=own_table(tmp_path, rows)), tmp_path/"raw", mock)
    own = own.sort_values("table_row")
    assert own.has_images.tolist() == [True, True, False]
    assert not own.has_spectrum.any() and set(own.split) == {"test"}
    for ours, theirs in zip(own.specobjid, inside.specobjid, strict=False):
        path = f"cutouts/{{}}/{PS1.bands[0]}.fits"
        assert ((tmp_path/"raw"/path.format(ours)).read_bytes()
            == (clean[0]/path.format(theirs)).read_bytes())


def test_a_changed_row_asks_for_one_galaxy(clean, mock, tmp_path):
    columns = ["ra", "dec", "plate", "mjd", "fiberid", "run2d", "redshift"]
    rows = clean[1][clean[1].dec > PS1_SOUTH][columns].head(3).reset_index(drop=True)
    here = ArchiveParameters(table=own_table(tmp_path, rows))
    own = fetch(here, tmp_path/"raw", mock)
    assert own.has_spectrum.all() and own.has_images.all()
    rows.loc[1, "ra"] += 0.3/3600
    own_table(tmp_path, rows)
    assert "5 to download: 6 requests" in plan_download(here, tmp_path/"raw", PS1, SIZE, 1, mock)
    assert fetch(here, tmp_path/"raw", mock).has_images.all()
    assert "18 of 18 files have arrived" in describe_download(tmp_path/"raw")


class CountingClient(ArchiveClient):
    "Notes the names of the spectra that are asked for."
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.spectra = []

    def request(self, url, *limits):
        if "/spectra/" in url.path:
            self.spectra.append(url.path.rpartition("/")[2])
        return super().request(url, *limits)


def rows_with_spectra(catalogue):
    columns = ["ra", "dec", "plate", "mjd", "fiberid", "run2d", "redshift"]
    return catalogue[catalogue.has_spectrum][columns].reset_index(drop=True)


def test_a_spectrum_of_another_position_is_kept_apart_and_not_asked_for_again(
        clean, mock, tmp_path):
    raw, rows = tmp_path/"raw", rows_with_spectra(clean[1]).head(12)
    right = rows.loc[3, "ra"]
    rows.loc[3, "ra"] = (right + 0.01) % 360
    rows.loc[4, "ra"] = (rows.ra[4] + 1/3600) % 360
    here = ArchiveParameters(table=own_table(tmp_path, rows))
    first, second, third = (CountingClient(here) for _ in range(3))
    own = fetch(here, raw, mock, client=first).set_index("table_row")
    assert len(first.spectra) == 12  # no attempt more at the wrong one
    assert own.has_spectrum.drop(3).all() and "spectrum bad (another position)" in own.status[3]
    (kept,) = (raw/"quarantine").rglob("*.fits")
    reason = kept.with_name(f"{kept.name}.reason").read_text()
    assert "another position: the fibre was at" in reason and not (raw/"spectra"/kept.name).exists()
    again = fetch(here, raw, mock, client=second).set_index("table_row")
    assert again.equals(own) and not second.spectra
    rows.loc[3, "ra"] = right
    own_table(tmp_path, rows)
    assert fetch(here, raw, mock, client=third).has_spectrum.all() and not third.spectra
    assert (raw/"spectra"/kept.name).read_bytes() == (clean[0]/"spectra"/kept.name).read_bytes()
    assert not [p for p in (raw/"quarantine").rglob("*") if p.is_file()]


def spectra_in(folder):
    return {path.name: path.read_bytes() for path in (folder/"spectra").rglob("*.fits")}


@pytest.mark.parametrize("is_old", [False, True], ids=["", "a state without positions"])
def test_a_second_table_is_compared_with_the_spectra_that_arrived(clean, mock, tmp_path, is_old):
    raw, rows = tmp_path/"raw", rows_with_spectra(clean[1]).head(12)
    here = ArchiveParameters(table=own_table(tmp_path, rows))
    assert fetch(here, raw, mock).has_spectrum.all()
    arrived, n_files = spectra_in(raw), len(files_in(raw))
    if is_old:
        with DownloadState(raw/"state.sqlite") as state:
            state.database.execute("UPDATE file SET request = path_of(request)")
    swapped = rows.copy()
    swapped.loc[[3, 4], ["ra", "dec"]] = rows.loc[[4, 3], ["ra", "dec"]].to_numpy()
    own_table(tmp_path, swapped)
    client = CountingClient(here)
    own = fetch(here, raw, mock, client=client).set_index("table_row")
    assert not client.spectra
    assert own.index[~own.has_spectrum].tolist() == [3, 4]
    assert (own.status[[3, 4]].str.contains("another position")).all()
    moved = spectra_in(raw/"quarantine")
    assert len(moved) == 2 and spectra_in(raw) | moved == arrived
    assert not moved.keys() & spectra_in(raw).keys()
    plan = plan_download(here, raw, PS1, SIZE, 1, mock)
    assert f"{n_files} files, of which {n_files} need no download; 0 to download" in plan
    own_table(tmp_path, rows)
    assert "0.00 GB" in plan_download(here, raw, PS1, SIZE, 1, mock)
    own = fetch(here, raw, mock, client=client)
    assert own.has_spectrum.all() and not client.spectra and spectra_in(raw) == arrived


def test_a_smaller_max_separation_is_applied_to_spectra_that_arrived(clean, mock, tmp_path):
    raw, rows = tmp_path/"raw", rows_with_spectra(clean[1]).head(3)
    rows.loc[1, "dec"] += 2/3600
    for limit, has_spectrum in ((3, [True]*3), (1, [True, False, True]), (3, [True]*3)):
        here = ArchiveParameters(table=own_table(tmp_path, rows), max_separation=limit)
        client = CountingClient(here)
        is_first = not raw.exists()
        own = fetch(here, raw, mock, client=client).sort_values("table_row")
        assert own.has_spectrum.tolist() == has_spectrum
        assert len(client.spectra) == (3 if is_first else 0)


def test_a_spectrum_of_another_reduction_is_not_taken_for_the_one_asked_for(clean, mock, tmp_path):
    raw, rows = tmp_path/"raw", rows_with_spectra(clean[1]).head(3)
    rows.loc[1, "ra"] = (rows.ra[1] + 0.01) % 360  # this one goes into quarantine
    here = ArchiveParameters(table=own_table(tmp_path, rows))
    assert fetch(here, raw, mock).has_spectrum.sum() == 2
    rows["run2d"], rows["ra"] = "103", rows_with_spectra(clean[1]).ra.head(3)
    own_table(tmp_path, rows)
    client = CountingClient(here)
    own = fetch(here, raw, mock, client=client)  # the mock survey has no such reduction
    assert len(client.spectra) == 3 and own.status.str.contains("spectrum missing").all()


def test_cutouts_of_another_position_are_no_spectra_of_another_position():
    outcomes = Outcomes(n_spectra=0)
    error = DamagedFileError("another position: the centre is elsewhere")
    for k in range(20):
        outcomes.count(ArchiveFile(f"cutouts/{k}/g.fits", "").with_error(error))
    assert outcomes.n_spectra == outcomes.n_elsewhere == 0


@pytest.mark.parametrize("max_separation", [3, 648_000])
def test_a_table_whose_spectra_are_shifted_stops_the_download(
        clean, mock, tmp_path, max_separation):
    raw, rows = tmp_path/"raw", rows_with_spectra(clean[1])
    names = ["plate", "mjd", "fiberid", "run2d", "redshift"]
    rows[names] = rows[names].reindex(np.roll(rows.index, 1)).to_numpy()
    here = ArchiveParameters(table=own_table(tmp_path, rows), max_separation=max_separation,
        concurrency=1)
    if max_separation > 3:
        assert fetch(here, raw, mock).has_spectrum.all()
        return
    for n_requests in (range(10, 16), range(6)):  # then it looks at what it has first
        client = CountingClient(here)
        with pytest.raises(InvalidInputError, match="10 of 10 spectra .* shifted against"):
            fetch(here, raw, mock, client=client)
        assert len(client.spectra) in n_requests
        assert not (raw/"catalogue.parquet").exists()


def test_a_second_table_whose_spectra_are_shifted_stops_the_download(clean, mock, tmp_path):
    raw, rows = tmp_path/"raw", rows_with_spectra(clean[1])
    here = ArchiveParameters(table=own_table(tmp_path, rows), concurrency=1)
    own, arrived = fetch(here, raw, mock), spectra_in(raw)
    names = ["plate", "mjd", "fiberid", "run2d", "redshift"]
    shifted = rows.copy()
    shifted[names] = rows[names].reindex(np.roll(rows.index, 1)).to_numpy()
    own_table(tmp_path, shifted)
    client = CountingClient(here)
    with pytest.raises(InvalidInputError, match="10 of 10 spectra .* shifted against"):
        fetch(here, raw, mock, client=client)
    assert spectra_in(raw) | spectra_in(raw/"quarantine") == arrived
    own_table(tmp_path, rows)
    assert fetch(here, raw, mock, client=client).equals(own)
    assert spectra_in(raw) == arrived and not client.spectra


def test_a_few_spectra_of_other_positions_do_not_stop_a_download_that_is_nearly_done(
        clean, mock, tmp_path):
    rows = rows_with_spectra(clean[1])
    assert len(rows) > 30
    here = ArchiveParameters(table=own_table(tmp_path, rows.iloc[11:]))
    fetch(here, tmp_path/"raw", mock)
    rows.loc[:10, "dec"] -= 0.01
    own_table(tmp_path, rows)
    assert (~fetch(here, tmp_path/"raw", mock).has_spectrum).sum() == 11


def test_memory_does_not_grow_with_the_number_of_files(tmp_path, monkeypatch):
    "Ten times as many spectra, which arrive from nowhere."
    monkeypatch.setattr(Fetcher, "fetch", lambda self, file, get: file._replace(status="good"))
    files_of, peaks = partial(galaxy_files, bands=PS1.bands, size=SIZE, parameters=LOCAL), {}
    for n in (500, 5000):
        k = np.arange(n)
        table = pd.DataFrame(dict(specobjid=k, ra=k*360/n, dec=-40.0, plate=266 + k//640, mjd=51602,
            fiberid=1 + k % 640, run2d="26"))
        with DownloadState(tmp_path/f"{n}.sqlite") as state:
            fetcher = Fetcher(ArchiveClient(), ArchiveURLs.local(9), tmp_path, PS1.bands, SIZE)
            tracemalloc.start()
            state.enqueue(table, files_of)
            fetch_missing(fetcher, table, files_of, state, progress=False)
            peaks[n] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert state.counts().files.tolist() == [n]
    growth = (peaks[5000] - peaks[500])/4500
    assert growth < 300, peaks  # bytes a file: a row of the table has 60
