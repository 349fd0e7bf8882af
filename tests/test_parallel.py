"""Two processes that train together on a CPU: the steps are those of one process that averages the
gradients of the same shares; killed trainings go on; errors end all processes; files are written
once. One start of two processes makes what most tests look at, since each takes seconds to
import."""
import contextlib
import json
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastai.basics import Callback

from specpred.config import (
    InvalidInputError,
    Paths,
    SpecpredError,
    TrainingError,
    TrainingParameters,
    get_paths,
    repo_root,
)
from specpred.images import Augmentation, open_images, pack_arrays
from specpred.models import load, predict_batches
from specpred.parallel import in_parallel, processes, wait_for_all
from specpred.surveys import PS1
from specpred.training import (
    batch_loaders,
    fit,
    make_learner,
    make_sample,
    rmse,
    save_checkpoint,
    target_columns,
    train_model,
    train_models,
)

ONE, THREE = (TrainingParameters(epochs=n, batch_size=6) for n in (1, 3))
NETWORKS = {"deconv3": THREE, "conv3": THREE, "photometry": ONE, "xresnet18_hybrid-specpred": ONE}
STATS = np.zeros(6), np.ones(6)


def make_galaxies(folder):
    "48 galaxies of which 24 train; target 1 is the brightness."
    rng = np.random.default_rng(0)
    flux = 1000*rng.lognormal(size=(48, 1, 1, 1)) + rng.normal(0, 50, (48, 5, 24, 24))
    pack_arrays(np.arange(100, 148), flux.astype("f4"), folder/"images")
    targets = rng.normal(size=(48, 6)).astype("f4")
    targets[:, 0] = np.log(flux.mean((1, 2, 3)))
    table = pd.DataFrame(targets, columns=[f"target_{k}" for k in range(1, 7)])
    split = np.resize(["train", "train", "train", "valid", "test", "calib"], 48)
    table.assign(specobjid=np.arange(100, 148), split=split).to_parquet(folder/"latents.parquet")


def read_sample(folder):
    return make_sample(open_images(folder/"images"), pd.read_parquet(folder/"latents.parquet"))


def train(sample, checkpoint, name="deconv3", parameters=THREE, cbs=()):
    augmentation = Augmentation(max_shift=1)
    dls = batch_loaders(sample, parameters.batch_size, augmentation, device="cpu")
    return train_model(name, dls, parameters, 0, checkpoint, progress=False, cbs=cbs)


class Interrupt(Callback):
    order = 99
    def before_epoch(self):
        if self.epoch == 1: raise KeyboardInterrupt


class NoNumber(Callback):
    "In the second batch of the second epoch the targets of the second process are NaN."
    def before_batch(self):
        if self.training and self.epoch == 1 and self.iter == 1 and processes().rank == 1:
            self.learn.yb = (torch.nan*self.yb[0],)


def message_of(function, *arguments, **options):
    "The error's type and text."
    try: function(*arguments, **options)
    except SpecpredError as error: return type(error).__name__, str(error)


def write_alone(folder):
    with wait_for_all():
        if processes().rank == 0: raise InvalidInputError("the first process cannot write")


def unwrapped_after_errors(sample):
    "Whether a learner is as before after an error within `in_parallel`."
    learn = make_learner("conv3", batch_loaders(sample, 6, device="cpu"))
    model = learn.model
    with contextlib.suppress(KeyboardInterrupt), in_parallel(learn):
        assert learn.model is not model and len(learn.dls.one_batch()[0]) == 3
        raise KeyboardInterrupt
    return learn.model is model and len(learn.dls.one_batch()[0]) == 6


def one_of_two(rank, folder):
    "All that the tests look at, by one of two processes."
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=timedelta(minutes=3))
    sample, made, saved = read_sample(folder), {}, []
    def save_counted(path, *arguments):
        saved.append(str(path))
        save_checkpoint(path, *arguments)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("specpred.training.save_checkpoint", save_counted)
        for name, parameters in NETWORKS.items():
            learn, history = train(sample, folder/f"{name}.state", name, parameters)
            made[name] = learn.model.state_dict(), history.to_dict()
        with pytest.raises(KeyboardInterrupt): train(sample, folder/"cut", cbs=[Interrupt()])
        made["resumed"] = train(sample, folder/"cut").learn.model.state_dict()
        several = TrainingParameters(models=("conv3",), epochs=1, batch_size=6, seeds=2)
        made["last"] = train_models(sample, STATS, several, 0, Paths(folder), progress=False)
        made["saved"] = saved
    made["errors"] = dict(
        unwrapped=unwrapped_after_errors(sample),
        nan=message_of(train, sample, folder/"nan", "conv3", cbs=[NoNumber()]),
        divided=message_of(train, sample, folder/"odd",
            parameters=TrainingParameters(batch_size=5)),
        alone=message_of(write_alone, folder),
        fit=message_of(fit, np.ones((9, 5, 8, 8)), np.arange(9), survey=PS1))
    torch.save(made, folder/f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    make_galaxies(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    mp.spawn(one_of_two, args=(folder,), nprocs=2)
    return [torch.load(folder/f"{rank}.pt", weights_only=False) for rank in (0, 1)]


class SharesInTurn(Callback):
    """One process that takes the second process's share of each batch, then the first one's, whose
    buffers stay, and averages the gradients."""
    def before_batch(self):
        if not self.training: return
        (x,), (y,), buffers = self.xb, self.yb, [b.clone() for b in self.model.buffers()]
        rmse(self.model(x[1::2]), y[1::2]).backward()
        for buffer, value in zip(self.model.buffers(), buffers, strict=True): buffer.copy_(value)
        self.learn.xb, self.learn.yb = (x[::2],), (y[::2],)

    def before_step(self):
        for p in self.model.parameters(): p.grad /= 2


def difference(a, b):
    "Largest, of the numbers of two state dicts."
    assert list(a) == list(b)
    return max(float((value.double() - b[key].double()).abs().max()) for key, value in a.items())


@pytest.mark.parametrize("name", ["deconv3", "conv3"])
def test_steps_are_those_of_one_process_that_averages_gradients(folder, ranks, name):
    learn, history = train(read_sample(folder), folder/f"{name}.alone", name, cbs=[SharesInTurn()])
    state, recorded = ranks[0][name]
    apart = difference(state, learn.model.state_dict())
    print(f"{name}: parameters and buffers differ by at most {apart:.1e}")
    assert apart < 1e-5
    metrics = [column for column in history if column.startswith("rmse")]
    assert len(metrics) == 7
    np.testing.assert_allclose(pd.DataFrame(recorded)[metrics], history[metrics], atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_both_processes_have_the_same_network_and_metrics(folder, ranks, name):
    (first, one), (second, other) = (rank[name] for rank in ranks)
    assert difference(first, second) == 0
    one.pop("seconds")
    other.pop("seconds")
    assert one == other and len(one["epoch"]) == NETWORKS[name].epochs
    # the metrics are those of the network over all valid galaxies
    sample = read_sample(folder)
    learn = make_learner(name, batch_loaders(sample, 6, device="cpu"))
    learn.model.load_state_dict(first)
    valid = sample.rows("valid")
    batches = [sample.images.read(valid.specobjid)]
    predicted = torch.tensor(predict_batches(learn.model, batches, sample.transform))
    found = rmse(predicted, torch.tensor(valid[target_columns(valid)].to_numpy()))
    np.testing.assert_allclose(found, list(one["rmse"].values())[-1], rtol=1e-3)


def test_an_interrupted_training_ends_with_the_same_weights(ranks):
    for rank in ranks: assert difference(rank["resumed"], rank["deconv3"][0]) == 0


def test_the_first_process_alone_writes(folder, ranks):
    assert len(ranks[0]["saved"]) == (3 + 3 + 1 + 1) + (1 + 2) + 2 and not ranks[1]["saved"]
    pd.testing.assert_frame_equal(ranks[0]["last"], ranks[1]["last"])
    for seed in (0, 1):
        trained = load(Paths(folder).weights("conv3", seed))
        assert trained.provenance["processes"] == 2
        assert len(pd.read_csv(Paths(folder).history("conv3", seed))) == 1
    assert not list(Paths(folder).models.glob("*.checkpoint"))


def test_a_checkpoint_of_two_processes_is_not_gone_on_with_alone(folder, ranks):
    with pytest.raises(TrainingError, match="another training: processes is 1 and was 2"):
        train(read_sample(folder), folder/"conv3.state", "conv3")


def test_errors_end_both_processes(ranks):
    first, second = (rank["errors"] for rank in ranks)
    assert first == second and first["unwrapped"]
    kind, text = first["nan"]
    assert kind == "TrainingError" and "batch 2 of epoch 2 is nan" in text
    assert len(text.partition("specobjid ")[2].partition(")")[0].split(", ")) == 6
    assert first["divided"] == ("InvalidInputError", "a batch of 5 galaxies cannot be divided "
        "among 2 processes: set training.batch_size to a multiple of 2.")
    assert first["alone"] == ("InvalidInputError", "the first process cannot write")
    assert "need a folder" in first["fit"][1]


def test_a_batch_system_that_counts_processes_starts_none(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"): monkeypatch.setenv(name, "4")
    assert processes() == (0, 1, 1)


def torchrun(*arguments):
    "`specpred train` in two processes, whatever GPUs there are."
    bin = Path(sys.executable).parent
    no_gpu = os.environ | dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    command = [bin/"torchrun", "--standalone", "--nproc_per_node=2", "--no-python"]
    return subprocess.run([*command, bin/"specpred", "train", *arguments], env=no_gpu,
        capture_output=True, text=True, timeout=300)


def test_what_torchrun_has_trained_is_kept_by_the_stage(smoke_run, tmp_path):
    paths = get_paths("smoke", tmp_path)
    paths.root.mkdir()
    for name in ("images", "vae", "latents"):
        getattr(paths, name).symlink_to(getattr(smoke_run, name))
    done = torchrun("--profile", "smoke", "--data-dir", str(tmp_path),
        "--set", "training.models=conv3", "--set", "training.epochs=1", "--tensorboard")
    assert done.returncode == 0, done.stderr
    assert len(re.findall("conv3 12345", done.stdout)) == 1
    assert load(paths.weights("conv3", 12345)).provenance["processes"] == 2
    assert len(list((paths.tensorboard/"conv3-12345").iterdir())) == 1  # of the first process
    # the stage keeps weights while no module that its notebook imports has changed
    notebook = repo_root()/"nbs"/"24_training.ipynb"
    imported = re.findall(r"from specpred\.(\w+)", notebook.read_text())
    started = json.loads((paths.manifests/"24_training.started.json").read_text())
    assert {*imported} - {"config", "stages"} <= {*started["code"]}


def test_an_error_of_all_processes_is_said_once():
    done = torchrun("--profile", "nowhere")
    assert done.returncode == 1 and done.stderr.count("There is no profile 'nowhere'") == 1
