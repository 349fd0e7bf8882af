"""Fixtures shared by all tests: one complete smoke run, and the optional folder of real files.

All tests that need the smoke run go to one of the processes that run tests, which starts with
them. Other tests of one file stay together, each notebook is by itself."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from specpred.config import MockParameters, get_paths


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if "smoke_output" in item.fixturenames: group = "smoke"
        elif item.path.name == "test_notebooks.py": group = item.name
        else: group = item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: "smoke_output" not in item.fixturenames)


@pytest.fixture(scope="session")
def smoke_output(tmp_path_factory):
    "Paths of a smoke run that was started far from the checkout, and what it printed."
    data = tmp_path_factory.mktemp("data with space")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    command = [Path(sys.executable).parent/"specpred", "reproduce", "--profile", "smoke",
        "--data-dir", str(data)]
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


@pytest.fixture(scope="session")
def mock(tmp_path_factory):
    "A small mock survey; tests read it and leave it as it is."
    from specpred.mock_survey import make_survey
    folder = tmp_path_factory.mktemp("mock")
    numbers = MockParameters(n_galaxies=40, n_spectra_only=6, galaxies_per_side=2, stamp_size=40)
    make_survey(numbers, folder, seed=1, n_jobs=1, progress=False)
    return folder
