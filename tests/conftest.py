"""Fixtures shared by all tests: one complete smoke run, and the optional folder of real files.

Two processes run the tests, each a file at a time. The file that makes the smoke run comes first,
that which shows it comes last, so that neither process waits for the other."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from specpred.config import MockParameters, get_paths


def pytest_collection_modifyitems(items):
    place = {"test_pipeline.py": 0, "test_site.py": 2}
    items.sort(key=lambda item: place.get(item.path.name, 1))


@pytest.fixture(scope="session")
def smoke_output(tmp_path_factory, worker_id):
    "Paths of a smoke run that was started far from the checkout, and what it printed."
    shared = tmp_path_factory.getbasetemp()
    if worker_id != "master": shared = shared.parent  # of all processes
    data, printed = shared/"data with space", shared/"printed.txt"
    with FileLock(shared/"smoke.lock"):
        if not printed.exists():
            command = [Path(sys.executable).parent/"specpred", "reproduce", "--profile", "smoke",
                "--data-dir", str(data)]
            done = subprocess.run(command, cwd=shared, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            printed.write_text(done.stdout)
    return get_paths("smoke", data), printed.read_text()


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


@pytest.fixture
def any_colours(monkeypatch):
    "The spectra of an untrained decoder have no galaxy's colours."
    monkeypatch.setattr("specpred.domain.COLOURS_APART", np.inf)
