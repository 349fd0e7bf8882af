"The local archive: requests that lead elsewhere or make no sense, and its command."
import http.client
import json
import shutil
import subprocess
import sys

import httpx
import pandas as pd
import pytest

from specpred.catalogue import catalogue_query
from specpred.config import InvalidInputError, MissingInputError
from specpred.cutouts import skycell_path
from specpred.local_archive import Faults, LocalArchive, serve


def raw_status(port, path):
    "Status for a path that is sent as it is, which httpx would tidy."
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    return connection.getresponse().status


def test_only_the_catalogues_query_is_answered(mock):
    good = catalogue_query(5, 1)
    with serve(mock) as urls:
        def status(sql, **more):
            url = f"{urls.skyserver_url}/SkyServerWS/SearchTools/SqlSearch"
            return httpx.get(url, params=dict(cmd=sql, format="csv") | more).status_code
        assert status(good) == status(good.replace("\n", "  ")) == 200
        for sql in ("SELECT TOP 10 * FROM SpecObj", "DROP TABLE SpecObj", f"{good} --", "",
                good.replace("s.z > 0", "s.z > 1"), good.replace("TOP 5", "TOP 5.5")):
            assert status(sql) == 400, sql


@pytest.mark.parametrize("path", ["/sas/../survey.json", "/sas/%2e%2e/survey.json", "/etc/passwd",
    "/sas//etc/passwd", "/sas/..%5c..", "/sas/%00", f"/sas/{'x'*400}.fits", f"/sas/{'x/'*3000}a",
    "/cgi-bin/fitscut.cgi?ra=1&dec=1&size=9&format=fits&red=/../survey.json",
    "/cgi-bin/fitscut.cgi?ra=1&dec=1&size=9&format=fits&red=/etc/passwd",
    "/cgi-bin/fitscut.cgi?ra=1&dec=1&size=9&format=fits&red=%00",
    f"/cgi-bin/fitscut.cgi?ra=1&dec=1&size=9&format=fits&red=/{'x'*400}.fits",
    "/cgi-bin/fitscut.cgi?ra=1&dec=1&size=999999999&format=fits&red=/x.fits",
    "/cgi-bin/fitscut.cgi", "/cgi-bin/ps1filenames.py?ra=x&dec=1&filters=g",
    "/cgi-bin/ps1filenames.py?ra=1&dec=1&filters=g&filters=../../x"])
def test_nothing_outside_the_folder_is_served(mock, path):
    with serve(mock) as urls:
        status = raw_status(httpx.URL(urls.sas_url).port, path)
        assert status in (400, 404) or (status == 200 and "filenames" in path)


def test_a_folder_without_a_survey_is_refused(tmp_path):
    with pytest.raises(MissingInputError, match="holds no survey"):
        LocalArchive(tmp_path)


def test_the_server_outlives_files_that_it_cannot_read(mock, tmp_path):
    shutil.copytree(mock, tmp_path/"mock")
    for path in (tmp_path/"mock/ps1").rglob("*.fits"):
        path.write_bytes(b"no FITS")
    cell = pd.read_parquet(mock/"ps1/skycells.parquet").iloc[0]
    with serve(tmp_path/"mock") as urls:
        query = dict(ra=cell.ra, dec=cell.dec, filters="g")
        for _ in range(2):
            answer = httpx.get(f"{urls.ps1_url}/ps1filenames.py", params=query)
            assert answer.status_code == 500


def test_images_in_any_band_are_listed(mock, tmp_path):
    shutil.copytree(mock, tmp_path/"mock")
    cell = pd.read_parquet(mock/"ps1/skycells.parquet").iloc[0]
    path = tmp_path/"mock/ps1"/skycell_path(int(cell.projcell), int(cell.subcell), "g")
    shutil.copy(path, str(path).replace(".stk.g.", ".stk.u."))
    listing = LocalArchive(tmp_path/"mock").filenames(str(cell.ra), str(cell.dec), "ugx")
    assert [line.split()[4] for line in listing.decode().splitlines()[1:]] == ["u", "g"]


@pytest.mark.parametrize("change", [dict(passing=1.5), dict(lasting=-0.1), dict(kinds=("rain",)),
    dict(kinds=()), dict(latency=float("nan")), dict(retry_after=-1), dict(rate=1)])
def test_faults_have_limits(change):
    with pytest.raises(InvalidInputError, match=next(iter(change))):
        Faults(**change)


def test_the_command_line_serves_and_downloads(mock, tmp_path, monkeypatch, capsys):
    from specpred.cli import main

    def specpred(*words):
        monkeypatch.setattr(sys, "argv", ["specpred", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, capsys.readouterr().out

    code = ("import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
        "from specpred.cli import main; main()")
    serving = ["archive", "serve", str(mock), "--port", "0", "--faults", "lasting=0.2 seed=3"]
    command = [sys.executable, "-c", code, json.dumps(sys.path), *serving]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            server.stdout.readline()
            words = server.stdout.readline().split()[1:]  # the command that it suggests
            status, text = specpred(*words, "--data-dir", tmp_path, "--set", "images.size=24",
                "--set", "archives.wait=0.001,0.002", "--set", "archives.split=1,0,0,0")
            assert status == 0 and "files have arrived" in text and "not found" in text
        finally:
            server.terminate()
    status, text = specpred("download", "--data-dir", tmp_path, "--status")
    assert status == 0 and "not found" in text
    for words, message in ((["download", "--data-dir", tmp_path/"none", "--status"], "no download"),
            (["archive", "serve", tmp_path], "holds no survey"),
            (["download", "--table", tmp_path/"none.csv", "--dry-run"], "none.csv"),
            (["archive", "serve", mock, "--faults", "rain=1"], "rain")):
        status, text = specpred(*words)
        assert status.startswith("error: ") and message in status and not text
