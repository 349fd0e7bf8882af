"""Loaders of whole batches: the galaxies of the store, the same numbers from the same seed, and
trainings that an interruption does not change."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import Callback, Learner, defaults

from specpred.config import InvalidInputError, Paths, TrainingParameters
from specpred.images import Augmentation, fit_transform, open_images, pack_arrays, turn
from specpred.models import MODELS, load, predict_targets
from specpred.surveys import RUBIN
from specpred.training import (
    GalaxySet, Sample, batch_loaders, make_sample, rmse, target_columns, train_model, train_models)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    "50 galaxies of a survey with six bands; target 1 is the brightness."
    rng = np.random.default_rng(0)
    flux = 1000*rng.lognormal(size=(50, 1, 1, 1)) + rng.normal(0, 50, (50, 6, 24, 24))
    ids = np.arange(100, 150).astype(np.uint64)
    folder = tmp_path_factory.mktemp("sample")
    pack_arrays(ids, flux.astype("f4"), folder/"images", RUBIN)
    split = np.array(["train", "train", "train", "valid", "calib", "test"])[np.arange(50) % 6]
    targets = {f"target_{k}": rng.normal(size=50).astype("f4") for k in range(1, 7)}
    latents = pd.DataFrame({"specobjid": ids, "split": split} | targets)
    latents["target_1"] = np.log(flux.mean((1, 2, 3))).astype("f4")
    return make_sample(open_images(folder/"images"), latents)


def loaders(sample, **options):
    return batch_loaders(sample, **{"batch_size": 8, "device": "cpu"} | options)


@pytest.mark.parametrize("keep", [True, False])
def test_every_training_galaxy_comes_once_an_epoch_turned_exactly(sample, keep):
    train, seen = sample.rows("train"), []
    flux = sample.images.read(train.specobjid)
    stored = torch.as_tensor(sample.transform(flux)).half().float()
    for x, y in loaders(sample, augmentation=Augmentation(p_rotate=0.), keep=keep).train:
        assert x.bands == RUBIN.bands
        for image, target in zip(x, y, strict=True):
            k = int((np.abs(train.target_1.to_numpy() - target[0].item())).argmin())
            errors = [(image - turn(stored[k], code)).abs().max() for code in range(8)]
            assert min(errors) < 1e-2
            seen.append(k)
    assert sorted(set(seen)) == sorted(seen) != seen and len(seen) == len(train)//8*8


def test_an_epoch_follows_from_seed_and_number(sample):
    ahead, direct = loaders(sample, seed=3), loaders(sample, seed=3)
    for _ in range(3): last = list(ahead.train)
    direct.train.epoch = 2
    again = list(direct.train)
    for pair, other in zip(last, again, strict=True):
        assert torch.equal(pair[0], other[0]) and torch.equal(pair[1], other[1])
    other = loaders(sample, seed=4)
    other.train.epoch = 2
    assert not torch.equal(next(iter(other.train))[1], again[0][1])


@pytest.mark.parametrize("keep", [True, False])
def test_a_learner_takes_them_as_they_are(sample, keep, tmp_path):
    torch.manual_seed(0)
    dls = loaders(sample, keep=keep)
    learn = Learner(dls, MODELS["conv3"](c_in=6, n_out=6), loss_func=rmse, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-2)
        loss = learn.validate()[0]
        predicted, targets = learn.get_preds(ds_idx=1)
    valid = sample.rows("valid")
    np.testing.assert_array_equal(targets, valid[target_columns(valid)])
    flux = [sample.images.read(valid.specobjid)]
    expected = predict_targets(learn.model, flux, sample.transform)
    np.testing.assert_allclose(predicted, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(loss, rmse(predicted, targets), rtol=1e-5)
    learn.dls.show_batch(max_n=4)
    assert len(plt.gcf().axes) == 4
    plt.close("all")


def test_an_interrupted_training_ends_with_the_same_weights(sample, tmp_path):
    parameters = TrainingParameters(epochs=3, batch_size=8, max_shift=1)
    class Interrupt(Callback):
        order = 99
        def before_epoch(self):
            if self.epoch == 2: raise KeyboardInterrupt
    def train(name):
        dls = loaders(sample, augmentation=Augmentation(max_shift=1))
        return train_model("conv3", dls, parameters, 0, tmp_path/name, progress=False)

    whole, history = train("whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(defaults, "callbacks", [*defaults.callbacks, Interrupt])
        with pytest.raises(KeyboardInterrupt): train("cut")
    resumed, again = train("cut")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    assert history.drop(columns="seconds").equals(again.drop(columns="seconds"))


def test_the_order_of_models_does_not_matter(sample, tmp_path):
    stats = dict(mean=np.zeros(6), std=np.ones(6))
    for name, models in (("ab", ("conv3", "deconv3")), ("b", ("deconv3",))):
        parameters = TrainingParameters(models=models, epochs=1, batch_size=8)
        train_models(sample, stats, parameters, 0, Paths(tmp_path/name), progress=False)
    both, alone = (load(Paths(tmp_path/name).weights("deconv3", 0)).model.state_dict()
        for name in ("ab", "b"))
    assert all(torch.equal(both[key], alone[key]) for key in both)


def test_a_saturated_star_stays_finite(tmp_path):
    flux = np.random.default_rng(0).normal(0, 1, (4, 5, 16, 16)).astype("f4")
    transform = fit_transform(flux, np.ones((4, 5)), "linear")
    flux[2, :, 8, 8] = 1e9
    pack_arrays(np.arange(4), flux, tmp_path/"a")
    table = pd.DataFrame({"specobjid": np.arange(4), "split": "train", "target_1": 0.})
    stars = GalaxySet(Sample(open_images(tmp_path/"a"), table, transform), "train")
    assert torch.isfinite(stars.read(np.arange(4))).all()


def test_loaders_of_what_does_not_fit_are_refused(sample):
    for size in (0, 7.5):
        with pytest.raises(InvalidInputError, match="whole number"):
            loaders(sample, batch_size=size)
    images, table = sample.images, sample.table
    with pytest.raises(InvalidInputError, match="in valid"):
        loaders(Sample(images, table[table.split != "valid"], sample.transform))
    with pytest.raises(InvalidInputError, match="in train"):
        make_sample(images, table[table.split != "train"])
    with pytest.raises(InvalidInputError, match="nothing to learn"):
        make_sample(images, table[["specobjid", "split"]])
