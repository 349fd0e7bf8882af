"The whole pipeline, from nothing to figures, and what happens when something goes wrong."
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from astropy.table import Table
from safetensors.torch import load_file

from specpred.config import _FILES, IMAGE_MODELS, get_paths
from specpred.evaluation import LADDER_QUANTITIES, RUNGS
from specpred.models import MODELS
from specpred.stages import STAGES, only_one, read_manifest

FIGURES = ("gallery", "losses", "latents", "results", "ladder")
SPECPRED = Path(sys.executable).parent/"specpred"


def specpred(*arguments):
    return subprocess.run([SPECPRED, *map(str, arguments)], capture_output=True, text=True)


def reproduce(paths, *arguments):
    "The stages that were run, by the lines that the command printed."
    done = specpred("reproduce", "--profile", "smoke", "--data-dir", paths.root.parent, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"(?m)^(\w+) .* MB ", done.stdout)


def assert_refused(done, *messages):
    "One clear message and no traceback."
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for message in messages: assert message in done.stderr


@pytest.fixture
def copied_run(smoke_run, tmp_path):
    "A copy of the smoke run that a test may change."
    shutil.copytree(smoke_run.root, tmp_path/"smoke", symlinks=True)
    return get_paths("smoke", tmp_path)


def test_every_stage_left_notebook_page_and_manifest(smoke_run):
    for name in STAGES:
        (notebook,) = smoke_run.runs.glob(f"*/{name}.ipynb")
        assert notebook.with_suffix(".html").stat().st_size > 10_000
        manifest = read_manifest(name, smoke_run)
        assert manifest["wall_time_s"] > 0 and manifest["peak_memory_mb"] > 0
        assert manifest["parameters"]["seed"] == 12345


def test_terminal_shows_table_and_figures(smoke_output):
    paths, printed = smoke_output
    for word in ("mean spectrum", "nearest neighbours", "gradient boosting", "xresnet18_hybrid"):
        assert word in printed
    for name in FIGURES:
        assert f"{name}.png" in printed
        assert (paths.figures/f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (paths.figures/f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_splits_are_disjoint_blocks_of_sky(smoke_run):
    catalogue = pd.read_parquet(smoke_run.catalogue)
    assert catalogue.specobjid.is_unique and catalogue.specobjid.dtype == np.uint64
    imaged = catalogue[catalogue.has_images]
    assert set(imaged.split) == {"train", "valid", "calib", "test"}
    assert imaged.groupby("block").split.nunique().max() == 1


def test_results_are_sane(smoke_run):
    summary = pd.read_csv(smoke_run.results/"summary.csv").set_index("model")
    assert np.isfinite(summary.rmse_test).all() and np.isfinite(summary.error_true).all()
    assert 0.6 < summary.rmse_test["mean spectrum"] < 1.5
    assert summary.rmse_test["gradient boosting"] < 0.97*summary.rmse_test["mean spectrum"]
    assert summary.error_true["autoencoder"] < summary.error_true["mean spectrum"]
    assert summary.parameters["xresnet18"] == 6_734_871
    assert summary.parameters["xresnet18_hybrid"] == 6_734_743


def test_ladder_is_complete(smoke_run):
    ladder = pd.read_csv(smoke_run.results/"ladder.csv").set_index(["quantity", "rung"])
    assert set(ladder.index.unique("quantity")) == set(LADDER_QUANTITIES)
    assert all(len(rows) == len(RUNGS) for _, rows in ladder.groupby("quantity"))
    assert np.isfinite(ladder[["error", "gain_lower", "gain_upper"]]).all(axis=None)
    errors = ladder.loc["dn4000"].error
    assert errors["all parameters"] < errors["magnitudes"] < 0.8


def test_predictions_belong_to_held_out_galaxies(smoke_run):
    predictions = pd.read_parquet(smoke_run.predictions)
    split = pd.read_parquet(smoke_run.catalogue).set_index("specobjid").split
    assert "train" not in set(predictions.split)
    assert (split.loc[predictions.specobjid].to_numpy() == predictions.split.to_numpy()).all()


def test_failing_cell_is_named_and_next_call_makes_only_what_is_missing(copied_run):
    away = copied_run.latents.rename(copied_run.root/"away")
    failed = specpred("reproduce", "--profile", "smoke", "--data-dir", copied_run.root.parent,
        "--only", "32_predict")
    assert_refused(failed, "32_predict failed", "start_stage(", ".unfinished.ipynb",
        "MissingInputError: 32_predict reads latents", "specpred reproduce --profile smoke")

    away.rename(copied_run.latents)
    (lost,) = copied_run.runs.glob("*/18_eigenspectra.ipynb")  # as when its saving was interrupted
    lost.rename(lost.with_suffix(".unfinished.ipynb"))
    (page,) = copied_run.runs.glob("*/11_mock_survey.html")
    page.unlink()
    assert reproduce(copied_run) == ["18_eigenspectra", "32_predict"]
    assert page.exists()
    assert reproduce(copied_run) == []


def interrupted(process, file):
    "The output of a process that gets Ctrl-C once there is a file."
    while not file.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=60)


def test_interrupted_training_goes_on_to_the_same_numbers(copied_run, smoke_run):
    before = time.time()
    started = copied_run.manifests/"24_training.started.json"
    started.unlink()
    # a shell starts background jobs with SIGINT ignored, and they hand that on to their children
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([SPECPRED, "reproduce", "--profile", "smoke", "--force",
        "--only", "training", "--data-dir", copied_run.root.parent],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, handler)
    _, stderr = interrupted(process, started)
    assert process.returncode == 130 and "the same command goes on" in stderr
    assert "Traceback" not in stderr
    assert not read_manifest("24_training", copied_run)
    assert len(list(copied_run.runs.glob("*/24_training.ipynb"))) == 1  # that of the copied run

    assert reproduce(copied_run, "--only", "24") == ["24_training"]
    for weights in smoke_run.models.glob("*.safetensors"):
        assert (copied_run.models/weights.name).stat().st_mtime > before
        ours, theirs = load_file(copied_run.models/weights.name), load_file(weights)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    assert reproduce(copied_run, "--only", "28", "--force") == ["28_evaluation"]
    for table in smoke_run.results.glob("*.csv"):
        assert (copied_run.results/table.name).read_bytes() == table.read_bytes()
    ours, theirs = pd.read_parquet(copied_run.predictions), pd.read_parquet(smoke_run.predictions)
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


def test_profiles_know_all_models():
    assert set(IMAGE_MODELS) == set(MODELS)


def test_what_a_stage_uses_is_declared():
    "The sections of the profile and the files that the Run cells of a notebook name."
    folder_of = {name: file.split("/")[0] for name, file in _FILES.items()}
    for stage in STAGES.values():
        cells = json.loads(stage.notebook.read_text())["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        code = "\n".join(source for source in sources if "#| eval: false" in source)
        sections = {name.split(".")[0] for name in stage.parameters} | {"seed", "name"}
        assert set(re.findall(r"run\.profile\.(\w+)", code)) <= sections, stage.name
        declared = {folder_of[name] for name in (*stage.reads, *stage.writes)}
        # the table of a search outlasts its stage, so that a longer search goes on from it
        used = set(re.findall(r"\bpaths\.(\w+)", code)) & {*_FILES} - {"vae_search"}
        assert {folder_of[name] for name in used} <= declared, stage.name


@pytest.mark.parametrize("arguments, message", [
    (["--profile", "dmeo"], "did you mean 'demo'"),
    (["--set", "training.epoch=3"], "did you mean 'training.epochs'"),
    (["--set", "training.models=xresnet19"], "did you mean 'xresnet18'"),
    (["--from", "30_more"], "The choices are: 11_mock_survey"),
    (["--from", "14", "--only", "23"], "not both")])
def test_wrong_arguments_get_one_clear_line(arguments, message, tmp_path):
    assert_refused(specpred("reproduce", *arguments, "--data-dir", tmp_path), message)
    assert not list(tmp_path.iterdir())


def test_one_run_of_a_profile_at_a_time(tmp_path):
    with only_one(tmp_path/"smoke", "run of this profile"):
        done = specpred("reproduce", "--profile", "smoke", "--data-dir", tmp_path)
    assert_refused(done, "another run of this profile is under way")


def test_predict_from_cutouts(smoke_run, tmp_path):
    arguments = ["--profile", "smoke", "--data-dir", smoke_run.root.parent, "--out", tmp_path]
    folder = sorted(smoke_run.raw_cutouts.iterdir())[0]
    done = specpred("predict", folder, "--plot", *arguments)
    assert done.returncode == 0, done.stderr
    table = Table.read(tmp_path/f"{folder.name}.ecsv")
    assert len(table) == 1000 and str(table["wavelength"].unit) == "Angstrom"
    assert (table["lower"] <= table["upper"]).all()
    assert (tmp_path/f"{folder.name}.png").exists()

    (tmp_path/"page.fits").write_text("<html>not found</html>")
    failed = specpred("predict", tmp_path/"page.fits", *arguments)
    assert failed.returncode == 3 and "page.fits" in failed.stderr


def test_info(smoke_run):
    done = specpred("info", "--data-dir", smoke_run.root.parent)
    assert done.returncode == 0
    for name in ("torch", "smoke", "demo", "mock", "paper", "32_predict"):
        assert name in done.stdout


def test_help_needs_no_heavy_import():
    heavy = ("torch", "numpy", "pandas", "matplotlib", "papermill")
    code = f"import sys, specpred.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
