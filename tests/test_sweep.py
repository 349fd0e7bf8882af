"""Sweeps: every combination once, failures in the table, nothing done twice."""
import pandas as pd
import pytest

from specpred.config import MissingInputError, ProfileError, SpecpredError, get_paths, get_profile
from specpred.runner import _dask, combinations, sweep


def test_combinations_are_checked_before_anything_is_trained():
    smoke = get_profile("smoke")
    found = combinations(smoke, ["conv3"], range(3), {"training.batch_size": [16, 32]})
    assert len({each.label for each in found}) == 6
    profiles = [get_profile(smoke, each.overrides) for each in found]
    assert {p.seed for p in profiles} == {smoke.seed + k for k in range(3)}
    assert [p.training.batch_size for p in profiles] == [16, 32]*3
    with pytest.raises(ProfileError, match="did you mean 'training.batch_size'"):
        combinations(smoke, ["conv3"], [0], {"training.batch_siz": [16]})


def test_a_sweep_without_data_or_scheduler_says_so(smoke_run, tmp_path):
    with pytest.raises(MissingInputError, match="run specpred reproduce"):
        sweep("smoke", ["conv3"], data_dir=tmp_path, progress=False)
    with pytest.raises(SpecpredError, match="no Dask scheduler answers at tcp://127.0.0.1:1"):
        sweep("smoke", ["conv3"], data_dir=linked(smoke_run, tmp_path), progress=False,
            scheduler="tcp://127.0.0.1:1")


def linked(smoke_run, folder):
    "A data folder with the inputs of a training."
    paths = get_paths("smoke", folder)
    paths.root.mkdir()
    for name in ("images", "vae", "latents"):
        getattr(paths, name).symlink_to(getattr(smoke_run, name))
    return folder


def test_every_combination_is_trained_once(smoke_run, tmp_path):
    data_dir, arguments = linked(smoke_run, tmp_path), dict(overrides=["training.epochs=1"])
    damaged = get_paths("smoke", get_paths("smoke", data_dir).sweep/"conv3-1")
    damaged.root.mkdir(parents=True)
    (tmp_path/"no_table").write_text("no table")
    damaged.latents.symlink_to(tmp_path/"no_table")

    def run():
        return sweep("smoke", ["conv3"], (0, 1), data_dir=data_dir, n_jobs=2, progress=False,
            **arguments).set_index("seed")
    table = run()
    assert table.error[0] == "" and "24_training failed" in table.error[1]
    assert table.rmse.notna().tolist() == [True, False]
    paths = get_paths("smoke", get_paths("smoke", data_dir).sweep/"conv3-0")
    history = pd.read_csv(paths.history("conv3", 12345))
    assert len(history) == 1 and table.rmse[0] == history.rmse.iloc[-1]

    damaged.latents.unlink()  # the next call links the right one
    again = run()
    assert (again.error == "").all() and again.rmse.nunique() == 2
    assert again.finished[0] == table.finished[0]  # was not done twice
    kept = pd.read_parquet(get_paths("smoke", data_dir).sweep/"results.parquet")
    pd.testing.assert_frame_equal(kept.set_index("seed"), again)


def test_processes_are_as_many_as_asked_for():
    with _dask(None, 3) as client: assert len(client.scheduler_info()["workers"]) == 3
