"Loaders of whole batches: the same galaxies as in the store, the same numbers from the same seed, and a Learner that notices no difference."
from types import SimpleNamespace
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from fastai.basics import Callback, Learner, defaults, load_learner
from specpred import images as store_module, training
from specpred.config import DamagedFileError, InvalidInputError, Paths, TrainingParameters
from specpred.images import Augmentation, fit_transform, open_images, pack_arrays, turn
from specpred.models import MODELS, load
from specpred.training import ImageSource, batch_loaders, choose_memory, make_loaders, predict_targets, rmse, train_model, train_models, training_table


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    "40 galaxies: store, table and transform; target 1 is the brightness."
    rng = np.random.default_rng(0)
    flux = (1000*rng.lognormal(size=(40, 1, 1, 1)) + rng.normal(0, 50, (40, 5, 24, 24))).astype("f4")
    ids = np.arange(100, 140).astype(np.uint64)
    folder = tmp_path_factory.mktemp("sample")
    pack_arrays(ids, flux, folder/"images.zarr")
    split = np.array(["train", "train", "train", "valid", "test"])[np.arange(40) % 5]
    latents = pd.DataFrame({"specobjid": ids, "split": split} | {f"target_{k}": rng.normal(size=40).astype("f4") for k in range(1, 7)})
    latents["target_1"] = np.log(flux.mean((1, 2, 3)))
    images = open_images(folder/"images.zarr")
    return images, training_table(images, latents), fit_transform(flux, images.noise)


def loaders(sample, **options):
    return batch_loaders(*sample, **{"batch_size": 8, "device": "cpu"} | options)


def test_every_training_galaxy_comes_once_an_epoch_turned_exactly(sample):
    images, table, transform = sample
    dls = loaders(sample, augmentation=Augmentation(p_rotate=0.))
    train = table[table.split == "train"]
    seen = []
    for x, y in dls.train:
        for image, target in zip(x, y):
            k = int((np.abs(train.target_1.to_numpy() - target[0].item())).argmin())
            original = torch.as_tensor(transform(images.read(train.specobjid.iloc[[k]])[0])).half().float()
            assert any(torch.equal(torch.as_tensor(image), turn(original, code)) for code in range(8))
            seen.append(k)
    assert sorted(seen) == list(range(24)) and seen != sorted(seen)


def test_an_epoch_follows_from_seed_and_number(sample):
    ahead, direct, other = loaders(sample, seed=3), loaders(sample, seed=3), loaders(sample, seed=4)
    for _ in range(3): last = list(ahead.train)
    direct.train.epoch = 2
    again = list(direct.train)
    assert all(torch.equal(a, b) for pair in zip(last, again) for a, b in zip(*pair))
    other.train.epoch = 2
    assert not torch.equal(next(iter(other.train))[1], again[0][1])


def test_batches_that_are_held_stay_as_they_are(sample):
    dls = loaders(sample)
    held = list(dls.train)
    copies = [x.clone() for x, _ in held]
    for _ in range(2): list(dls.train)
    assert all(torch.equal(x, copy) for (x, _), copy in zip(held, copies))


@pytest.mark.parametrize("keep", [True, False])
def test_a_learner_takes_them_as_they_are(sample, keep, tmp_path):
    images, table, transform = sample
    torch.manual_seed(0)
    learn = Learner(loaders(sample, keep=keep), MODELS["conv3"](c_in=5, n_out=6), loss_func=rmse, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=5, show_plot=False)
        learn.fit_one_cycle(1, 1e-2)
        loss = learn.validate()[0]
        predicted, targets = learn.get_preds(ds_idx=1)
        on_train, train_targets = learn.get_preds(dl=learn.dls.train.new(augmentation=Augmentation(turns=False, p_rotate=0.)))
    valid, train = (table[table.split == s] for s in ("valid", "train"))
    columns = [f"target_{k}" for k in range(1, 7)]
    np.testing.assert_array_equal(targets, valid[columns])
    np.testing.assert_allclose(predicted, predict_targets(learn.model, [images.read(valid.specobjid)], transform), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(loss, rmse(predicted, targets), rtol=1e-5)
    np.testing.assert_array_equal(train_targets, train[columns])  # get_preds undoes the shuffling
    np.testing.assert_allclose(on_train, predict_targets(learn.model, [images.read(train.specobjid)], transform), rtol=1e-3, atol=1e-3)
    learn.dls.show_batch(max_n=4)
    assert len(plt.gcf().axes) == 4
    plt.close("all")


def test_an_interrupted_training_ends_with_the_same_weights(sample, tmp_path):
    images, table, transform = sample
    parameters = TrainingParameters(epochs=3, batch_size=8, max_shift=1)
    dls = lambda: make_loaders(images, table, transform, parameters, progress=False)
    whole, history = train_model("conv3", dls(), parameters, 0, tmp_path/"whole.pt", progress=False)

    class Interrupt(Callback):
        order = 99
        def before_epoch(self):
            if self.epoch == 2: raise KeyboardInterrupt
    cut = dls()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(defaults, "callbacks", [*defaults.callbacks, Interrupt])
        with pytest.raises(KeyboardInterrupt): train_model("conv3", cut, parameters, 0, tmp_path/"cut.pt", progress=False)
    resumed, again = train_model("conv3", dls(), parameters, 0, tmp_path/"cut.pt", progress=False)
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values()): assert torch.equal(a, b)
    assert history.drop(columns="seconds").equals(again.drop(columns="seconds"))


def test_the_order_of_models_does_not_matter(sample, tmp_path):
    images, table, _ = sample
    stats = dict(mean=np.zeros(6), std=np.ones(6))
    for name, models in (("ab", ("conv3", "deconv3")), ("b", ("deconv3",))):
        train_models(images, table, stats, TrainingParameters(models=models, epochs=1, batch_size=8), 0, Paths(tmp_path/name), progress=False)
    both, alone = (load(Paths(tmp_path/name).weights("deconv3", 0)).model.state_dict() for name in ("ab", "b"))
    assert all(torch.equal(both[key], alone[key]) for key in both)


def test_images_go_where_there_is_room(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10e9))
    monkeypatch.setattr(training, "_job_memory", lambda: float("inf"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4e9, 8e9))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_memory(10**9, gpu)[0] == gpu and "GPU memory, of which 4,000 MB" in choose_memory(10**9, gpu)[1]
    assert choose_memory(3*10**9, gpu)[0] == cpu and choose_memory(3*10**9, cpu)[0] == cpu
    place, reason = choose_memory(6*10**9, gpu)
    assert place is None and "read from disk batch by batch" in reason
    monkeypatch.setattr(training, "_job_memory", lambda: 1e9)  # of a job on a large machine
    assert choose_memory(10**9, cpu)[0] is None and choose_memory(4*10**8, cpu)[0] == cpu


def test_the_limit_of_a_job_is_the_tightest_above_it(tmp_path):
    (tmp_path/"old").write_text("12:cpu:/x\n9:memory:/slurm/job\n")
    for folder, limit in (("memory", 9e9), ("memory/slurm", 3e9), ("memory/slurm/job", 5e9)):
        (tmp_path/folder).mkdir(exist_ok=True)
        for name, number in {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": 1e9}.items(): (tmp_path/folder/name).write_text(f"{number:.0f}\n")
        (tmp_path/folder/"memory.stat").write_text("inactive_file 200000000\n")
    assert training._job_memory(tmp_path, tmp_path/"old") == 2.2e9
    (tmp_path/"new").write_text("0::/\n")
    (tmp_path/"memory.max").write_text("max\n")
    assert training._job_memory(tmp_path, tmp_path/"new") == float("inf")


def test_threads_are_as_many_as_cores_of_the_job(monkeypatch):
    monkeypatch.setattr(store_module.os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert store_module.usable_cores() == 3


def test_images_that_are_kept_are_not_copied(sample):
    images, table, transform = sample
    source = ImageSource(images, table.specobjid, transform, "cpu", keep=True)
    for device in ("cpu", torch.device("cpu"), torch.device("cpu", 0)): assert source.take([1], device)[0] is source.values


def test_a_saturated_star_stays_finite(tmp_path):
    flux = np.random.default_rng(0).normal(0, 1, (4, 5, 16, 16)).astype("f4")
    fitted = fit_transform(flux, np.ones((4, 5)), "linear")
    flux[2, :, 8, 8] = 1e9
    pack_arrays(np.arange(4), flux, tmp_path/"a.zarr")
    source = ImageSource(open_images(tmp_path/"a.zarr"), np.arange(4), fitted, "cpu")
    assert torch.isfinite(source.values).all()


def test_damage_met_on_the_way_names_the_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "SHARD", 16)
    flux = np.random.default_rng(0).normal(0, 1, (40, 5, 16, 16)).astype("f4")
    pack_arrays(np.arange(40), flux, tmp_path/"a.zarr")
    images = open_images(tmp_path/"a.zarr")
    table = pd.DataFrame({"specobjid": np.arange(40), "split": ["train"]*36 + ["valid"]*4, "target_1": np.zeros(40, "f4")})
    dls = batch_loaders(images, table, fit_transform(flux, images.noise), 8, keep=False, device="cpu")
    shard = tmp_path/"a.zarr/flux/c/1/0/0/0"
    shard.write_bytes(bytes(100) + shard.read_bytes()[100:])
    with pytest.raises(DamagedFileError, match="flux/c/1/0/0/0 is damaged: the checksum of galaxy 16"): list(dls.train)


def test_a_learner_shows_predicts_and_travels(sample, tmp_path):
    images, table, transform = sample
    torch.manual_seed(0)
    learn = Learner(loaders(sample), MODELS["conv3"](c_in=5, n_out=6), loss_func=rmse, path=tmp_path)
    test = table[table.split == "test"]
    expected = predict_targets(learn.model, [images.read(test.specobjid)], transform)
    with learn.no_bar(), learn.no_logging():
        learn.show_results(max_n=4, figsize=(5, 5))
        assert len(plt.gcf().axes) == 4 and all(ax.get_title().count("\n") == 1 for ax in plt.gcf().axes)
        plt.close("all")
        for items in (test, test.specobjid, test.specobjid.to_numpy()):
            predicted, targets = learn.get_preds(dl=learn.dls.test_dl(items))
            np.testing.assert_allclose(predicted, expected, rtol=1e-3, atol=1e-3)
            if items is test: np.testing.assert_array_equal(targets, test[[f"target_{k}" for k in range(1, 7)]])
        for item in (test.iloc[2], int(test.specobjid.iloc[2])):
            image, *_, one = learn.predict(item, with_input=True)
            np.testing.assert_allclose(one, expected[2], rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(image, images.read(test.specobjid.iloc[[2]])[0], rtol=2e-2, atol=2)
        before = learn.dls
        learn.export("learner.pkl")
        assert learn.dls is before and len(learn.dls.train.dataset) == 24
        loaded = load_learner(tmp_path/"learner.pkl")
        assert [len(dl) for dl in loaded.dls] == [0, 0]
        with loaded.no_bar(): np.testing.assert_allclose(loaded.get_preds(dl=loaded.dls.test_dl(test))[0], expected, rtol=1e-3, atol=1e-3)


def test_loaders_of_what_does_not_fit_are_refused(sample):
    images, table, transform = sample
    train = loaders(sample).train
    for wrong, say in ((dict(shufle=False), "no setting shufle"), (dict(bs=0), "whole number of galaxies"),
            (dict(positions=np.arange(3)), "3 galaxies cannot have 24"), (dict(positions=np.arange(24) + 100), "positions must be from 0")):
        with pytest.raises(InvalidInputError, match=say): train.new(**wrong)
    for size in (0, 7.5):
        with pytest.raises(InvalidInputError, match="whole number of galaxies"): loaders(sample, batch_size=size)
    for split in ("train", "valid"):
        with pytest.raises(InvalidInputError, match=f"is in {split}"): batch_loaders(images, table[table.split != split], transform)
    with pytest.raises(InvalidInputError, match="nothing to learn"): batch_loaders(images, table[["specobjid", "split"]], transform)
