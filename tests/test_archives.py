"Downloads through failures: hostile servers, damaged files, kills, and archives that stop to answer."
import gzip, json, os, random, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx, numpy as np, pandas as pd, pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from specpred.archives import (BANDS, ArchiveClient, DownloadState, Faults, LocalArchive, RefusedError, BusyError, NotFoundError, _miniature_survey,
    _miniature_spectrum, check_cutout, check_spectrum, cutout_params, download, read_cutout_names, read_skyserver_csv, serve, spectrum_name,
    spectrum_path, split_by_sky)
from specpred.config import ArchiveError, ArchiveParameters, DamagedFileError, SpecpredError

SIZE = 24


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("survey")
    table = _miniature_survey(folder, n_cells=5, per_side=3, stamp=40)
    return folder, table


@pytest.fixture(scope="module")
def expected(survey):
    "Every file of the survey under the name that it gets in raw/."
    folder, table = survey
    archive, files = LocalArchive(folder), {}
    for row in table.itertuples():
        name = spectrum_name(row.plate, row.mjd, row.fiberID)
        files[f"spectra/{name}"] = (folder/"sas"/spectrum_path(row.run2d, row.plate, row.mjd, row.fiberID)).read_bytes()
        at = dict(ra=f"{row.ra:.8f}", dec=f"{row.dec:.8f}", size=str(SIZE), format="fits")
        for band, stack in read_cutout_names(archive.filenames(at)).items():
            files[f"cutouts/{row.specObjID}/{band}.fits"] = archive.cutout(at | dict(red=stack))
    assert len(files) == 46 + 45*5
    return files


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
            for key, value in ({"Content-Length": len(body)} | {k.replace("_", "-"): v for k, v in headers.items()}).items(): self.send_header(key, str(value))
            self.end_headers()
            self.wfile.write(body)
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{made.server_port}"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown(), made.server_close()


def test_every_good_file_arrives_through_faults_and_every_bad_one_is_explained(survey, expected, tmp_path):
    kinds = ("latency", "error", "unavailable", "reset", "short", "truncated", "page", "band", "empty", "corrupted")
    faults = Faults(passing=0.1, lasting=0.1, seed=11, kinds=kinds)
    with serve(survey[0], faults=faults) as urls:
        parameters, client = ArchiveParameters(**vars(urls)), ArchiveClient(8, attempts=10, wait=(0.01, 0.1), bad_attempts=6)
        catalogue = download(parameters, tmp_path/"raw", SIZE, 1, client=client)
    arrived, statuses = downloaded(tmp_path/"raw"), {}
    assert arrived.items() <= expected.items()
    with DownloadState(tmp_path/"raw/state.sqlite") as state:
        for name in expected:
            outcome = state[name]
            statuses.setdefault(outcome.status, []).append(name)
            assert (outcome.status == "good") == (name in arrived)
            if outcome.status == "bad": assert (tmp_path/"raw/quarantine"/f"{name}.reason").read_text().strip() == outcome.error != ""
    assert set(statuses) == {"good", "bad", "missing"} and len(statuses["good"]) > 0.8*len(expected)
    lost = {name.split("/")[1] for s in ("bad", "missing") for name in statuses[s] if name.startswith("cutouts")}
    inside = catalogue[catalogue.dec > -30]
    assert set(inside[~inside.has_images].specobjid.astype(str)) == lost
    assert (catalogue.status == "complete").equals(catalogue.has_images & catalogue.has_spectrum)


DOWNLOAD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from specpred.archives import *
from specpred.config import ArchiveParameters
download(ArchiveParameters(**json.loads(sys.argv[2])), sys.argv[3], int(sys.argv[4]), 1, progress=False)
"""


def test_a_killed_download_goes_on_and_ends_the_same(survey, expected, tmp_path):
    raw, when = tmp_path/"raw", sorted(random.Random(2).sample(range(1, 200), 4))
    with serve(survey[0], faults=Faults(passing=0.5, kinds=("latency",))) as urls:
        command = [sys.executable, "-c", DOWNLOAD, json.dumps(sys.path), json.dumps(vars(urls)), str(raw), str(SIZE)]
        for n_files in when:
            process = subprocess.Popen(command)
            while process.poll() is None and n_arrived(raw) < n_files: time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert n_files <= len(downloaded(raw)) < len(expected) and downloaded(raw).items() <= expected.items()
            assert not (raw/"catalogue.parquet").exists()
        catalogue = download(ArchiveParameters(**vars(urls)), raw, SIZE, 1)
        clean = download(ArchiveParameters(**vars(urls)), tmp_path/"clean", SIZE, 1)
    assert downloaded(raw) == expected and catalogue.equals(clean)
    assert not list(raw.rglob("*.tmp*"))


def test_good_files_stay_when_other_numbers_change(survey, tmp_path):
    raw = tmp_path/"raw"
    with serve(survey[0]) as urls:
        first = download(ArchiveParameters(**vars(urls)), raw, SIZE, 1)
        stamp = {p: p.stat().st_mtime_ns for p in raw.rglob("*.fits")}
        again = download(ArchiveParameters(**vars(urls), split=(0.5, 0.25, 0.25)), raw, SIZE, 1)
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
    with pytest.raises(ArchiveError, match="does not answer"):
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
    lambda h: h.send(302, Location=h.path), lambda h: h.send(302), lambda h: h.send(302, Location="http://[/"), lambda h: h.send(200, gzip.compress(bytes(10**7)), Content_Encoding="gzip"),
    lambda h: h.send(200, b"", Content_Length=10**12), endless, lambda h: h.send(503, Retry_After="864000")],
    ids=["other host", "file", "circle", "nowhere", "nonsense", "compressed", "huge", "endless", "closed for days"])
def test_unsafe_answers_are_refused(server, answer):
    server.answer = answer
    with ArchiveClient(attempts=2, wait=(0.01, 0.02), timeout=5) as client, pytest.raises(RefusedError): client.get(f"{server.url}/file", max_bytes=10**6)


def test_redirects_on_the_same_host_are_followed(server):
    server.answer = lambda h: h.send(301, Location="/there") if h.path == "/here" else h.send(200, b"found")
    with ArchiveClient() as client: assert client.get(f"{server.url}/here").content == b"found"


@pytest.fixture(scope="module")
def samples(survey, expected):
    folder, table = survey
    row = table.iloc[0]
    return _miniature_spectrum(266, 51602, 1, np.random.default_rng(0)), expected[f"cutouts/{row.specObjID}/g.fits"], float(row.ra), float(row.dec)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.booleans(), st.lists(st.tuples(st.integers(0, 12_000), st.binary(min_size=1, max_size=80)), max_size=4), st.integers(-9000, 9000))
def test_mutated_files_only_ever_raise_our_errors(samples, is_spectrum, patches, cut):
    content = bytearray(samples[0] if is_spectrum else samples[1])
    for at, patch in patches: content[at % len(content):at % len(content) + len(patch)] = patch
    content = bytes(content[:cut] if cut < 0 else content)
    try: check_spectrum(content, 266, 51602, 1) if is_spectrum else check_cutout(content, "g", samples[2], samples[3], SIZE)
    except DamagedFileError as error: assert str(error)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_any_answer_to_a_query_is_read_or_refused(content):
    for read in (read_skyserver_csv, read_cutout_names):
        try: read(content)
        except SpecpredError as error: assert str(error)


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
