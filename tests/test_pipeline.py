"The whole pipeline, from nothing to figures, and what happens when something is wrong on the way."
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from astropy.table import Table
from safetensors.torch import load_file
from specpred.config import _FILES, IMAGE_MODELS, get_paths, get_profile
from specpred.stages import STAGES
from specpred.models import MODELS

FIGURES = ("gallery", "losses", "latents", "results")


def specpred(*arguments, **kwargs):
    return subprocess.run([Path(sys.executable).parent/"specpred", *map(str, arguments)], capture_output=True, text=True, **kwargs)


def reproduce(paths, *arguments):
    return specpred("reproduce", "--profile", "smoke", "--data-dir", paths.root.parent, *arguments)


@pytest.fixture
def copied_run(smoke_run, tmp_path):
    "A copy of the smoke run that a test may spoil."
    shutil.copytree(smoke_run.root, tmp_path/"smoke", symlinks=True)
    return get_paths("smoke", tmp_path)


def test_every_stage_left_notebook_page_and_manifest(smoke_run):
    for name in STAGES:
        (notebook,) = smoke_run.runs.glob(f"*/{name}.ipynb")
        assert notebook.with_suffix(".html").stat().st_size > 10_000
        manifest = json.loads((smoke_run.manifests/f"{name}.json").read_text())
        assert manifest["wall_time_s"] > 0 and manifest["peak_memory_mb"] > 0 and manifest["parameters"]["seed"] == 12345


def test_the_terminal_shows_table_and_figures(smoke_output):
    paths, printed = smoke_output
    for word in ("mean spectrum", "nearest neighbours", "gradient boosting", "xresnet18_hybrid", *(f"{f}.png" for f in FIGURES)):
        assert word in printed
    for name in FIGURES:
        assert (paths.figures/f"{name}.png").read_bytes().startswith(b"\x89PNG") and (paths.figures/f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_splits_are_disjoint_blocks_of_sky(smoke_run):
    catalogue = pd.read_parquet(smoke_run.catalogue)
    assert catalogue.specobjid.is_unique and catalogue.specobjid.dtype == np.uint64
    imaged = catalogue[catalogue.has_images]
    assert imaged.groupby("block").split.nunique().max() == 1
    shares = imaged.split.value_counts(normalize=True)
    for split, share in zip(("train", "valid", "test"), get_profile("smoke").archives.split):
        assert abs(shares[split] - share) < 0.1


def test_results_are_sane(smoke_run):
    summary = pd.read_csv(smoke_run.results/"summary.csv").set_index("model")
    assert np.isfinite(summary.rmse_test).all() and np.isfinite(summary.error_true).all()
    assert 0.6 < summary.rmse_test["mean spectrum"] < 1.5
    assert summary.rmse_test["gradient boosting"] < 0.97*summary.rmse_test["mean spectrum"]
    assert summary.error_true["autoencoder"] < summary.error_true["mean spectrum"]
    assert summary.parameters["xresnet18"] == 6_734_871 and summary.parameters["xresnet18_hybrid"] == 6_734_743


def test_predictions_belong_to_held_out_galaxies(smoke_run):
    predictions = pd.read_parquet(smoke_run.predictions)
    catalogue = pd.read_parquet(smoke_run.catalogue).set_index("specobjid")
    assert set(predictions.split) == {"valid", "test"}
    assert (catalogue.loc[predictions.specobjid].split.to_numpy() == predictions.split.to_numpy()).all()


def test_a_second_run_skips_everything(copied_run):
    done = reproduce(copied_run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("up to date, skipped") == len(STAGES)


def test_a_notebook_that_was_lost_in_an_interruption_is_made_again(copied_run):
    (notebook,) = copied_run.runs.glob("*/18_models.ipynb")
    notebook.rename(notebook.with_suffix(".running.ipynb")), notebook.with_suffix(".html").unlink()
    (page,) = copied_run.runs.glob("*/00_config.html")
    page.unlink()
    done = reproduce(copied_run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if " MB " in line] == ["18_models"]
    assert page.exists() and len(list(copied_run.runs.glob("*/18_models.html"))) == 1 and not list(copied_run.runs.glob("*/*.running.ipynb"))


def test_profiles_know_all_models():
    assert set(IMAGE_MODELS) == set(MODELS)


def test_what_a_stage_uses_is_declared():
    "The sections of the profile and the files that the Run cells of a notebook name."
    for stage in STAGES.values():
        cells = [c for c in json.loads(stage.notebook.read_text())["cells"] if c["cell_type"] == "code" and "#| eval: false" in "".join(c["source"])]
        source = "\n".join("".join(c["source"]) for c in cells)
        sections = set(re.findall(r"run\.profile\.(\w+)\.", source)) | set(
            re.findall(r"\bp\.(\w+)\.", source) if "p, paths = run.profile" in source else [])
        assert sections <= set(stage.parameters), stage.name
        # the table of a search outlasts its stage, so that a longer one goes on from it, and is not made where there is one setting
        files = {f for f in re.findall(r"(?:run\.)?paths\.(\w+)", source) if f in _FILES} - {"vae_search"}
        undeclared = {f for f in files if not any(_FILES[f].split("/")[0] == _FILES[d].split("/")[0] for d in (*stage.reads, *stage.writes))}
        assert not undeclared, stage.name


def test_a_changed_result_reruns_its_stage_only(copied_run):
    (copied_run.figures/"losses.png").write_bytes(b"not a picture any more")
    done = reproduce(copied_run)
    assert done.returncode == 0, done.stdout + done.stderr
    reran = [line.split()[0] for line in done.stdout.splitlines() if " MB " in line]
    assert reran == ["21_figures"] and (copied_run.figures/"losses.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_numbers_from_nothing(copied_run, smoke_run):
    made = [paths for folder in (copied_run.mock, copied_run.models) for paths in folder.rglob("*.*") if paths.is_file()]
    before = {path: path.stat().st_mtime_ns for path in made}
    done = reproduce(copied_run, "--force")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(path.stat().st_mtime_ns > time for path, time in before.items())  # all made again, nothing kept
    for weights in smoke_run.models.glob("*.safetensors"):
        ours, theirs = (load_file(folder/weights.name) for folder in (copied_run.models, smoke_run.models))
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    for name in ("summary.csv", "per_target.csv"):
        assert (copied_run.results/name).read_bytes() == (smoke_run.results/name).read_bytes()
    pd.testing.assert_frame_equal(pd.read_parquet(copied_run.predictions), pd.read_parquet(smoke_run.predictions), check_exact=True)


def test_a_failing_cell_is_named_and_the_next_call_goes_on(copied_run):
    good = copied_run.catalogue.read_bytes()
    pd.DataFrame({"specobjid": [1]}).to_parquet(copied_run.catalogue)
    failed = reproduce(copied_run, "--from", "11_images")
    assert failed.returncode == 1
    for word in ("11_images failed", "has_images", "AttributeError", ".failed.ipynb"): assert word in failed.stderr
    assert "Traceback" not in failed.stderr
    copied_run.catalogue.write_bytes(good)
    done = reproduce(copied_run, "--from", "11_images")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if " MB " in line] == ["11_images"]


def test_an_interrupted_run_says_so_and_leaves_nothing_half_made(tmp_path):
    command = [Path(sys.executable).parent/"specpred", "reproduce", "--profile", "smoke", "--data-dir", tmp_path]
    # a shell starts background jobs with SIGINT ignored, and they hand that on to their children
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    signal.signal(signal.SIGINT, before)
    assert running.stdout.readline().startswith("00_config")  # so 07_mock_survey is under way
    time.sleep(2)
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 130 and "the same command goes on" in stderr and "Traceback" not in stderr
    paths = get_paths("smoke", tmp_path)
    assert [f.stem for f in paths.manifests.glob("0?_*.json") if "started" not in f.name] == ["00_config"]
    assert [f.name for f in paths.runs.glob("*/*.ipynb")] == ["00_config.ipynb"]


@pytest.mark.parametrize("arguments, message", [
    (["--profile", "dmeo"], "did you mean 'demo'"),
    (["--set", "training.epoch=3"], "did you mean 'training.epochs'"),
    (["--set", "training.models=xresnet19"], "expected one of conv3"),
    (["--from", "13_more"], "The stages are: 00_config"),
    (["--from", "08", "--only", "09"], "not both")])
def test_wrong_arguments_get_one_clear_line(arguments, message, tmp_path):
    done = specpred("reproduce", *arguments, "--data-dir", tmp_path)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.ipynb"))


def test_a_stage_without_its_inputs_says_what_to_run(tmp_path):
    done = specpred("reproduce", "--profile", "smoke", "--only", "16_vae", "--data-dir", tmp_path)
    assert done.returncode == 1 and "MissingInputError" in done.stderr and "specpred reproduce" in done.stderr


def test_predict_from_cutouts(smoke_run, tmp_path):
    folder = sorted(smoke_run.raw_cutouts.iterdir())[0]
    done = specpred("predict", folder, "--profile", "smoke", "--data-dir", smoke_run.root.parent, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    table = Table.read(tmp_path/f"{folder.name}.ecsv")
    assert len(table) == 1000 and str(table["wavelength"].unit) == "Angstrom" and (table["lower"] <= table["upper"]).all()
    assert (tmp_path/f"{folder.name}.png").exists()

    for arguments, said in ((["--profile", "smok"], "did you mean 'smoke'"), (["--profile", "smoke", "--model", "nosuch"], "there is xresnet18")):
        wrong = specpred("predict", folder, "--data-dir", smoke_run.root.parent, "--out", tmp_path, *arguments)
        assert wrong.returncode == 1 and said in wrong.stderr and "Traceback" not in wrong.stderr

    (tmp_path/"page.fits").write_text("<html>not found</html>")
    wrong = specpred("predict", tmp_path/"page.fits", "--profile", "smoke", "--data-dir", smoke_run.root.parent, "--out", tmp_path)
    assert wrong.returncode == 1 and "is not a FITS file" in wrong.stderr and "Traceback" not in wrong.stderr


def test_info(smoke_run):
    done = specpred("info", "--data-dir", smoke_run.root.parent)
    assert done.returncode == 0 and "torch" in done.stdout
    for name in ("smoke", "demo", "mock", "paper", "22_predict"): assert name in done.stdout


def test_help_needs_no_heavy_import():
    code = "import sys; import specpred.cli; print([m for m in ('torch', 'numpy', 'pandas', 'matplotlib', 'papermill') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
