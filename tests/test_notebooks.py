"""The checks beside the definitions in the notebooks. The smoke run makes those of the stages."""
import subprocess
import sys
from pathlib import Path

import pytest

from specpred.stages import STAGES

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path for path in (ROOT/"nbs").glob("*.ipynb") if path.stem not in STAGES)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_checks_in_notebook(notebook):
    command = [Path(sys.executable).parent/"nbdev_test", "--path", notebook, "--n_workers", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    # nbdev_test is content with no notebook at all
    assert done.returncode == 0 and "Success" in done.stdout, done.stdout + done.stderr
