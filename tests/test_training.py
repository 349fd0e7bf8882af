"""Loaders that make whole batches: the galaxies of the store, the same numbers from the same seed,
and a fastai `Learner` that takes them as its own. Trainings that repeat and resume."""
import contextlib
import dataclasses
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from fastai.basics import Adam, Callback, Learner, defaults, ranger
from specpred import training
from specpred.config import (
    PUBLISHED,
    SPECPRED,
    InvalidInputError,
    MissingExtraError,
    Paths,
    TrainingError,
    TrainingParameters,
    replace,
)
from specpred.images import Augmentation, open_images, pack_arrays, turn
from specpred.models import MODELS, load, n_params, predict_batches
from specpred.photometry import ring_table
from specpred.surveys import SDSS
from specpred.training import (
    GalaxySet,
    TensorBoardLog,
    batch_loaders,
    fit,
    grouped_adam,
    grouped_ranger,
    make_sample,
    memory_for,
    rmse,
    target_columns,
    train_model,
    train_models,
)

STATS = np.zeros(6), np.ones(6)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    "40 galaxies; target 1 is the brightness."
    rng = np.random.default_rng(0)
    flux = 1000*rng.lognormal(size=(40, 1, 1, 1)) + rng.normal(0, 50, (40, 5, 24, 24))
    folder = tmp_path_factory.mktemp("sample")/"images"
    pack_arrays(np.arange(100, 140), flux.astype("f4"), folder)
    split = np.resize(["train", "train", "train", "valid", "test", "calib"], 40)
    targets = rng.normal(size=(40, 6)).astype("f4")
    targets[:, 0] = np.log(flux.mean((1, 2, 3)))
    latents = pd.DataFrame(targets, columns=[f"target_{k}" for k in range(1, 7)])
    return make_sample(
        open_images(folder), latents.assign(specobjid=np.arange(100, 140), split=split)
    )


def loaders(sample, **options):
    return batch_loaders(sample, **{"batch_size": 7, "device": "cpu"} | options)


def predictions(model, sample, rows):
    return predict_batches(model, [sample.images.read(rows.specobjid)], sample.transform)


def same_weights(a, b):
    return all(torch.equal(value, b[key]) for key, value in a.items())


def test_every_training_galaxy_comes_once_an_epoch_turned_exactly(sample):
    dls = loaders(sample, augmentation=Augmentation(p_rotate=0.))
    train = sample.rows("train")
    seen = []
    for x, y in dls.train:
        for image, target in zip(x, y, strict=True):
            k = int(np.abs(train.target_1 - target[0].item()).argmin())
            original = sample.transform(sample.images.read(train.specobjid.iloc[[k]])[0])
            turned = [turn(torch.from_numpy(original), code) for code in range(8)]
            assert any(torch.allclose(image, each, atol=2e-3) for each in turned)
            seen.append(k)
    assert sorted(seen) == list(range(21)) and seen != sorted(seen)


def test_short_epochs_go_through_all_galaxies(sample):
    "Three epochs of eight galaxies of 21 see each once, and the next ones begin anew."
    train = loaders(sample, batch_size=4, epoch_size=8).train
    whole = loaders(sample).train
    assert (len(train), train.n, len(whole), whole.n) == (2, 8, 3, 21)
    seen = np.concatenate([train.order(epoch) for epoch in range(6)])
    assert len(seen) == 48
    for k in range(2): assert sorted(seen[21*k:21*k + 21]) == list(range(21))
    np.testing.assert_array_equal(seen[:21], whole.order(0))
    first = train.specobjids(1, 1)
    np.testing.assert_array_equal(first, train.dataset.images.specobjid[
        train.dataset.rows[seen[12:16]]])
    assert loaders(sample, batch_size=32, epoch_size=5).train.bs == 5


@pytest.mark.parametrize("keep", [True, False])
def test_an_epoch_follows_from_seed_and_number(sample, keep):
    ahead, direct = loaders(sample, seed=3), loaders(sample, seed=3, keep=keep)
    for _ in range(3): last = list(ahead.train)
    direct.train.epoch = 2
    again = list(direct.train)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(last, again, strict=True) for k in (0, 1))
    other = loaders(sample, seed=4)
    other.train.epoch = 2
    assert not torch.equal(next(iter(other.train))[1], again[0][1])


@pytest.mark.parametrize("keep", [True, False])
def test_a_learner_takes_them_as_its_own(sample, keep, tmp_path):
    torch.manual_seed(0)
    model = MODELS["conv3"](c_in=5, n_out=6)
    learn = Learner(loaders(sample, keep=keep), model, loss_func=rmse, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=5, show_plot=False)
        learn.fit_one_cycle(1, 1e-2)
        loss = learn.validate()[0]
        predicted, targets = learn.get_preds(ds_idx=1)
        on_train, train_targets = learn.get_preds(ds_idx=0)
    valid, train = sample.rows("valid"), sample.rows("train")
    np.testing.assert_array_equal(targets, valid[target_columns(valid)])
    expected = predictions(learn.model, sample, valid)
    np.testing.assert_allclose(predicted, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(loss, rmse(predicted, targets), rtol=1e-5)
    # get_preds undoes the shuffling
    np.testing.assert_array_equal(train_targets, train[target_columns(train)])
    assert on_train.shape == (21, 6)
    learn.dls.show_batch(max_n=4)
    assert len(plt.gcf().axes) == 4
    plt.close("all")


def test_batches_can_come_from_processes(sample):
    dls, workers = loaders(sample), loaders(sample, keep=False, num_workers=2)
    for a, b in zip(dls.train, workers.train, strict=True):
        assert torch.equal(torch.as_tensor(a[0]), torch.as_tensor(b[0])) and torch.equal(a[1], b[1])


class Interrupt(Callback):
    order = 99
    def before_epoch(self):
        if self.epoch == 2: raise KeyboardInterrupt


@pytest.mark.parametrize("name, bf16", [("conv3", False), ("deconv3", True), ("photometry", False),
    ("xresnet18_hybrid-specpred", False)])
def test_an_interrupted_training_ends_with_the_same_weights(sample, tmp_path, name, bf16):
    parameters = TrainingParameters(epochs=3, batch_size=7, bf16=bf16)
    def train(checkpoint):
        dls = loaders(sample, augmentation=Augmentation(max_shift=1))
        return train_model(name, dls, parameters, 0, tmp_path/checkpoint, progress=False)
    whole = train("whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(defaults, "callbacks", [*defaults.callbacks, Interrupt])
        with pytest.raises(KeyboardInterrupt): train("cut")
    resumed = train("cut")
    recorded = resumed.learn.recorder  # what fastai's graph of losses shows in a notebook
    assert len(recorded.values) == len(recorded.iters) > 0
    assert all(len(losses) > 1 for losses in recorded.values)
    assert same_weights(whole.learn.model.state_dict(), resumed.learn.model.state_dict())
    pd.testing.assert_frame_equal(
        whole.history.drop(columns="seconds"), resumed.history.drop(columns="seconds"))


def test_bfloat16_wants_a_device_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old GPU")
    with pytest.raises(InvalidInputError, match="an old GPU has no bfloat16; leave it at False"):
        with training._bf16(torch.nn.Linear(2, 2), torch.device("cuda")): pass


@pytest.mark.parametrize("ours, theirs", [(grouped_adam, Adam), (grouped_ranger, ranger)])
def test_optimizers_of_all_parameters_at_once_are_those_of_fastai(ours, theirs):
    def trained(opt_func):
        torch.manual_seed(0)
        first, second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)
        x, parameters = torch.randn(16, 4), [*first.parameters(), *second.parameters()]
        optimizer = opt_func(parameters, lr=0.05, wd=0.2)
        optimizer.state[first.bias]["do_wd"] = False
        for k in range(25):
            # the second layer comes later, so that its count of steps is another one
            y = first(x).mean(1) if k < 3 else second(first(x)).mean(1)
            y.square().mean().backward()
            optimizer.set_hypers(lr=0.05/(1 + k), mom=0.9)
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([p.detach().flatten() for p in parameters])
    assert torch.equal(trained(ours), trained(theirs))


class NoNumber(Callback):
    def after_loss(self):
        if self.training and self.epoch == 1 and self.iter == 1:
            self.learn.loss_grad = torch.nan*self.loss_grad
            self.learn.loss = self.loss_grad.detach()


def test_a_loss_that_is_no_number_names_its_galaxies(sample, tmp_path):
    parameters, seen = TrainingParameters(epochs=3, batch_size=7), []
    class Watch(Callback):
        def before_batch(self):
            if self.training and self.epoch == 1 and self.iter == 1: seen.append(self.yb[0])
    def train(cbs):
        return train_model("conv3", loaders(sample), parameters, 0, tmp_path/"state",
            progress=False, cbs=cbs)
    with pytest.raises(TrainingError, match="batch 2 of epoch 2 is nan") as raised:
        train([NoNumber(), Watch()])
    named = raised.value.args[0].partition("specobjid ")[2].partition(")")[0].split(", ")
    train_rows = sample.rows("train").set_index("specobjid")
    expected = train_rows.loc[[int(n) for n in named], target_columns(train_rows)]
    np.testing.assert_array_equal(np.float32(expected), seen[0])
    resumed = train([])  # from the end of the first epoch
    assert len(resumed.history) == 3 and np.isfinite(resumed.history.rmse).all()


def test_a_batch_that_is_too_large_says_which_one_fits(sample, tmp_path, monkeypatch):
    forward = torch.nn.Sequential.forward
    def small(module, x):
        if len(x) > 3: raise torch.OutOfMemoryError("full")
        return forward(module, x)
    dls = loaders(sample)
    monkeypatch.setattr(torch.nn.Sequential, "forward", small)
    with pytest.raises(TrainingError, match="one of 3 fits: set training.batch_size=3"):
        train_model("conv3", dls, TrainingParameters(batch_size=7), 0, tmp_path/"state",
            progress=False)


@pytest.mark.parametrize("other, problem", [
    (dict(lr=1e-3), "another training: lr is 0.001 and was 0.01"),
    (dict(name="deconv3"), "another training: model is deconv3 and was conv3"),
    (dict(name="conv3-specpred"), "recipe is specpred and was published, optimizer is"),
    (dict(seed=1), "another training: seed is")])
def test_a_checkpoint_of_another_training_stays_as_it_is(sample, tmp_path, other, problem):
    def train(name="conv3", seed=0, **settings):
        parameters = TrainingParameters(**dict(epochs=1, batch_size=7, lr=1e-2) | settings)
        train_model(name, loaders(sample), parameters, seed, tmp_path/"state", progress=False)
    train()
    before = (tmp_path/"state").read_bytes()
    with pytest.raises(TrainingError, match=problem): train(**other)
    assert (tmp_path/"state").read_bytes() == before
    train(keep=True)  # where images are kept does not matter


@pytest.mark.parametrize("content", [b"", b"my thesis"])
def test_a_file_that_is_no_checkpoint_stays_as_it_is(sample, tmp_path, content):
    (tmp_path/"state").write_bytes(content)
    with pytest.raises(TrainingError, match="is no checkpoint of an image model, or damaged"):
        train_model("conv3", loaders(sample), TrainingParameters(batch_size=7), 0,
            tmp_path/"state", progress=False)
    assert (tmp_path/"state").read_bytes() == content


def test_what_killed_runs_left_goes_when_the_weights_are_written(sample, tmp_path):
    paths = Paths(tmp_path)
    left = paths.models/".conv3-0.checkpoint.fy3unm8y.tmp"
    left.mkdir(parents=True)
    (left/"conv3-0.checkpoint").write_bytes(b"half of it")
    parameters = TrainingParameters(models=("conv3",), epochs=1, batch_size=7)
    train_models(sample, STATS, parameters, 0, paths, progress=False)
    made = paths.weights("conv3", 0), paths.history("conv3", 0)
    assert sorted(paths.models.iterdir()) == sorted(made)


def test_tensorboard_has_each_step_once_also_after_an_interruption(sample, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    parameters = TrainingParameters(epochs=3, batch_size=7)
    for interrupted in (True, False):
        cbs = [TensorBoardLog(tmp_path/"log"), *([Interrupt()] if interrupted else [])]
        with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext():
            learn, history = train_model("conv3", loaders(sample), parameters, 0, tmp_path/"state",
                progress=False, cbs=cbs)
    log = EventAccumulator(str(tmp_path/"log")).Reload()
    n_steps = len(learn.dls.train)
    assert [event.step for event in log.Scalars("loss")] == list(range(1, 3*n_steps + 1))
    losses = np.reshape([event.value for event in log.Scalars("loss")], (3, n_steps))
    np.testing.assert_allclose(losses.mean(1), history.train_loss, rtol=1e-6)
    assert {*log.Tags()["scalars"]} == {"loss", "learning_rate", "epoch/train_loss", "epoch/rmse",
        *(f"epoch/rmse_{k}" for k in range(1, 7))}
    rmse_of_epochs = log.Scalars("epoch/rmse")
    assert [event.step for event in rmse_of_epochs] == [n_steps, 2*n_steps, 3*n_steps]
    np.testing.assert_allclose([event.value for event in rmse_of_epochs], history.rmse, rtol=1e-6)
    rates = [event.value for event in log.Scalars("learning_rate")]
    assert max(rates) == pytest.approx(3e-2, rel=0.1) and rates[-1] < 0.1*max(rates)


def test_without_tensorboard_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r'pip install "specpred\[tensorboard\]"'):
        TensorBoardLog(tmp_path)


def test_the_order_of_models_does_not_matter(sample, tmp_path):
    for name, models in dict(ab=("conv3", "deconv3"), b=("deconv3",)).items():
        parameters = TrainingParameters(models=models, epochs=1, batch_size=7)
        train_models(sample, STATS, parameters, 0, Paths(tmp_path/name), progress=False)
    both, alone = (load(Paths(tmp_path/name).weights("deconv3", 0)) for name in ("ab", "b"))
    assert same_weights(both.model.state_dict(), alone.model.state_dict())


@pytest.mark.parametrize("name", ["photometry", "xresnet18-specpred"])
def test_predictions_of_the_own_recipe_do_not_depend_on_the_direction(sample, tmp_path, name):
    parameters, paths = TrainingParameters(models=(name,), epochs=1, batch_size=7), Paths(tmp_path)
    train_models(sample, STATS, parameters, 0, paths, progress=False)
    trained = load(paths.weights(name, 0))
    images = sample.images.read_rows(np.arange(3))
    predicted = trained.predict(images)
    for code in range(1, 8):
        turned = turn(torch.from_numpy(images), code)
        np.testing.assert_allclose(trained.predict(turned), predicted, atol=1e-4)


def test_standardised_photometry(sample, tmp_path):
    parameters = TrainingParameters(epochs=1, batch_size=7)
    learn, _ = train_model("photometry", loaders(sample), parameters, 0, tmp_path/"a", False)
    branch, train = learn.model, sample.rows("train").specobjid
    images = torch.from_numpy(sample.transform(sample.images.read(train)))
    features = ring_table(sample.images.read(train), sample.images.bands).to_numpy()
    np.testing.assert_allclose(branch.features(images), features, atol=0.02)
    # turned and rotated images have nearly the same photometry
    bright = features.std(0) > 0.1
    assert np.median(np.abs(branch.mean.numpy() - features.mean(0))[bright]/features.std(0)[bright]
        ) < 0.1


def test_weights_of_other_bands_say_so(tmp_path):
    rng = np.random.default_rng(1)
    n = len(SDSS.bands)
    flux = rng.lognormal(5, 1, (24, 1, 1, 1)) + rng.normal(0, 5, (24, n, 16, 16))
    pack_arrays(np.arange(24), flux.astype("f4"), tmp_path/"images", SDSS)
    latents = pd.DataFrame(dict(specobjid=np.arange(24), target_1=np.log(flux.mean((1, 2, 3)))))
    latents["split"] = np.resize(["train", "valid", "calib", "train"], 24)
    sample = make_sample(open_images(tmp_path/"images"), latents)
    parameters, paths = (
        TrainingParameters(models=("conv3",), epochs=1, batch_size=4),
        Paths(tmp_path),
    )
    train_models(sample, ([0.], [1.]), parameters, 0, paths, progress=False)
    trained = load(paths.weights("conv3", 0))
    assert trained.survey == SDSS and trained.channels == SDSS.bands
    assert trained.predict(flux).shape == (24, 1)
    with pytest.raises(InvalidInputError, match="bands"): trained.predict(flux[:, :3])


def test_images_go_where_there_is_room(sample, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10e9))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4e9, 8e9))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    galaxy = sample.images.pixels[0].nbytes
    assert memory_for(sample.images, 10**9//galaxy, gpu) == gpu
    assert memory_for(sample.images, 3*10**9//galaxy, gpu) == cpu
    assert memory_for(sample.images, 6*10**9//galaxy, gpu) is None
    assert memory_for(sample.images, 6*10**9//galaxy, gpu, keep=True) == cpu


def test_a_saturated_star_stays_finite(tmp_path):
    flux = np.random.default_rng(0).normal(0, 1, (4, 5, 16, 16)).astype("f4")
    pack_arrays(np.arange(4), flux, tmp_path/"quiet")
    flux[2, :, 8, 8] = 1e9
    pack_arrays(np.arange(4), flux, tmp_path/"images")
    latents = pd.DataFrame(dict(specobjid=np.arange(4), target_1=0., split="train"))
    quiet = make_sample(open_images(tmp_path/"quiet"), latents, "linear")
    sample = type(quiet)(open_images(tmp_path/"images"), quiet.table, quiet.transform)
    values = GalaxySet(sample, "train", memory=torch.device("cpu")).values
    assert values.dtype == torch.float16 and torch.isfinite(values).all()


def test_samples_without_what_is_needed_are_refused(sample):
    table = sample.table
    with pytest.raises(InvalidInputError, match="no column target_1"):
        make_sample(sample.images, table[["specobjid", "split"]])
    with pytest.raises(InvalidInputError, match="in train"):
        make_sample(sample.images, table[table.split != "train"])
    for size in (0, 7.5):
        with pytest.raises(InvalidInputError, match="whole number of galaxies"):
            loaders(sample, batch_size=size)
    with pytest.raises(InvalidInputError, match="in valid"):
        loaders(make_sample(sample.images, table[table.split != "valid"]))


THREE = dataclasses.replace(SDSS, name="three", bands=("g", "r", "i"), depth=SDSS.depth[1:4],
    seeing=SDSS.seeing[1:4])


@pytest.fixture(scope="module")
def pictures():
    "40 images in three bands, and how bright they are."
    rng = np.random.default_rng(2)
    brightness = rng.normal(size=40)
    y, x = np.mgrid[:20, :20] - 9.5
    profile = np.exp(-np.hypot(x, y)/3)
    flux = 3000*np.exp(0.5*brightness)[:, None, None, None]*profile
    return flux + rng.normal(0, 10, (40, 3, 20, 20)), brightness


def test_fit_learns_one_target_and_is_kept(pictures, tmp_path):
    images, brightness = pictures
    options = dict(survey=THREE, model="photometry", epochs=20, batch_size=8, progress=False)
    trained = fit(images, brightness, folder=tmp_path, **options)
    predicted = trained.predict(images)
    assert predicted.shape == (40, 1)
    assert np.std(predicted[:, 0] - brightness) < 0.5*np.std(brightness)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["history.csv", "weights.safetensors"]
    np.testing.assert_array_equal(load(tmp_path/"weights.safetensors").predict(images), predicted)
    np.testing.assert_array_equal(fit(images, brightness, **options).predict(images), predicted)


def test_an_interrupted_fit_goes_on_with_its_own_data_only(pictures, tmp_path):
    options = dict(survey=THREE, model="conv3", epochs=3, batch_size=8, progress=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(defaults, "callbacks", [*defaults.callbacks, Interrupt])
        with pytest.raises(KeyboardInterrupt): fit(*pictures, folder=tmp_path, **options)
    assert len(list(tmp_path.glob("*.checkpoint"))) == 1
    for targets in (-pictures[1], pictures[1]):  # others, then those that were interrupted
        resumed = fit(pictures[0], targets, folder=tmp_path, **options)
        alone = fit(pictures[0], targets, **options)
        assert same_weights(resumed.model.state_dict(), alone.model.state_dict())
    assert not list(tmp_path.glob("*.checkpoint"))


@pytest.mark.parametrize("model", ["conv3", "xresnet18"])
@pytest.mark.parametrize("recipe", [PUBLISHED, SPECPRED])
def test_fit_takes_any_model_and_recipe(pictures, model, recipe):
    targets = np.stack([pictures[1], pictures[1]**2], 1)
    trained = fit(pictures[0], targets, survey=THREE, model=model, recipe=recipe, epochs=1,
        batch_size=1000, progress=False)  # a batch larger than the sample is the sample
    assert trained.predict(pictures[0][:2]).shape == (2, 2)
    assert trained.provenance["recipe"] == recipe.name


def test_fit_trains_narrow_networks(pictures, tmp_path):
    def train(width):
        recipe = replace(SPECPRED, width=width)
        return fit(*pictures, survey=THREE, model="xresnet18", recipe=recipe, epochs=1,
            folder=tmp_path/str(width), progress=False)
    narrow, wide = train(0.125), train(1)
    assert narrow.arguments["width"] == 0.125
    assert 20*n_params(narrow.model.network) < n_params(wide.model.network)
    again = load(tmp_path/"0.125"/"weights.safetensors")
    np.testing.assert_array_equal(again.predict(pictures[0]), narrow.predict(pictures[0]))


def test_fit_leaves_out_galaxies_without_pixels(pictures):
    images = pictures[0].copy()
    images[3, 1] = np.nan
    with pytest.warns(UserWarning, match="1 of 40 galaxies are left out, the first: number 3"):
        fit(images, pictures[1], survey=THREE, model="conv3", epochs=1, progress=False)


@pytest.mark.parametrize("change, message", [
    (lambda x, y: (x[:1], y[:1]), "1 galaxies leave fewer than two for"),
    (lambda x, y: (x, np.where(y > 0, np.nan, y)), "targets that are not finite, the first is"),
    (lambda x, y: ([x[0], x[1, :, :10]], y[:2]), "images all of one size"),
    (lambda x, y: (x, y[:7]), "expected images"), (lambda x, y: (x[0], y), "expected images"),
    (lambda x, y: (x[:, :2], y), "expected images of shape"),
    (lambda x, y: (x, y*0), "is the same"),
    (lambda x, y: (x, list("a"*40)), "arrays of numbers")])
def test_fit_says_what_does_not_fit(pictures, change, message):
    images, targets = change(*pictures)
    with pytest.raises(InvalidInputError, match=message):
        fit(images, targets, survey=THREE, model="conv3", epochs=1, progress=False)


def test_fit_wants_a_known_model(pictures):
    with pytest.raises(InvalidInputError, match="did you mean 'xresnet18'"):
        fit(*pictures, survey=THREE, model="xresnet19", progress=False)


def test_fit_wants_known_parts(pictures):
    with pytest.raises(InvalidInputError, match="split must say train, valid"):
        fit(*pictures, survey=THREE, split=["train"]*39 + ["tset"], progress=False)
