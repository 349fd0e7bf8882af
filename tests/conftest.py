"Fixtures shared by all tests: one complete smoke run, and the optional folder of real files."
import os, subprocess, sys
from pathlib import Path
import pytest
from specpred.config import get_paths


@pytest.fixture(scope="session")
def smoke_output(tmp_path_factory):
    "What `specpred reproduce --profile smoke` printed, started in a folder that has nothing to do with the checkout."
    data = tmp_path_factory.mktemp("data with space")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    command = [Path(sys.executable).parent/"specpred", "reproduce", "--profile", "smoke", "--data-dir", str(data)]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return get_paths("smoke", data), done.stdout


@pytest.fixture(scope="session")
def smoke_run(smoke_output):
    "Paths of a finished smoke run; tests read it and leave it as it is."
    return smoke_output[0]


@pytest.fixture(scope="session")
def real_data():
    "Folder with a few real SDSS spectra, named by SPECPRED_REAL_DATA."
    folder = os.environ.get("SPECPRED_REAL_DATA")
    if not folder: pytest.skip("SPECPRED_REAL_DATA does not name a folder with real SDSS spectra")
    return Path(folder)
