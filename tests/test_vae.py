"specpred.vae: the published numbers, training that survives interruption, and the spectrum model."
import json
import pickle
import zlib
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import torch
from published_cases import REFERENCE
from sklearn.decomposition import PCA

from specpred import vae
from specpred.config import (DamagedFileError, InvalidInputError, MissingInputError, SpecpredError,
    VAEParameters, WeightsError, replace)
from specpred.vae import (InfoVAE, SpectrumModel, Training, bin_weights, fit, infovae_loss, kld,
    latent_pca, load_published, mmd, new_vae, plot_traversals, random_configurations, search,
    target_stats)
from specpred.weights import read_weights, write_weights

SMALL = VAEParameters(n_latents=4, hidden=(24, 12), n_targets=3, epochs=6, lambda_=50.,
    batch_size=16, lr=5e-3)


def spectra(n=200, bins=50, seed=0):
    "Normalised spectra with a slope, a curvature and a line of random strength."
    rng = np.random.default_rng(seed)
    x = np.linspace(-1, 1, bins)
    slope, curvature, line = rng.uniform(-1, 1, (n, 3)).T[:, :, None]
    flux = 1 + 0.3*slope*x + 0.3*curvature*x**2 + (0.4 + 0.3*line)*np.exp(-0.5*(x/0.1)**2)
    flux += 0.01*rng.standard_normal(flux.shape)
    return (flux/np.linalg.norm(flux, axis=1, keepdims=True)).astype(np.float32)


FLUX = spectra()
X, WEIGHTS = FLUX - FLUX.mean(0), np.full(FLUX.shape, 1e4, np.float32)


def trained(parameters=SMALL, seed=1, checkpoint=None, x=X):
    "A network and its history."
    network = new_vae(50, parameters, seed)
    history = fit(network, x, WEIGHTS, parameters, seed, checkpoint, progress=False)
    return network, history.drop(columns="seconds")


@pytest.fixture(scope="module")
def model():
    wavelength = np.linspace(4000, 5000, 50)
    return SpectrumModel.fit(trained()[0], wavelength, FLUX.mean(0), FLUX, 3)[0]


def parts(model):
    return {field.name: getattr(model, field.name) for field in fields(model)}


def test_state_dict_has_the_published_keys_and_shapes():
    published = json.loads((REFERENCE/"state_dict_keys.json").read_text())["infovae"]
    assert {name: list(value.shape) for name, value in InfoVAE().state_dict().items()} == published


def test_network_and_loss_equal_the_published_numbers():
    arrays = np.load(REFERENCE/"infovae.npz")
    reference = {name: torch.tensor(values) for name, values in arrays.items()}
    network = InfoVAE()
    for name, value in network.state_dict().items():
        noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(value.shape))
        value.copy_(torch.tensor(noise/np.sqrt(max(1, np.prod(value.shape[1:])))))
    with torch.no_grad():
        mu, logvar = network.encode(reference["x"])
        decoded = network.decode(reference["z"])
    r = reference
    terms = infovae_loss(r["x"], r["w"], r["decoded"], r["mu"], r["logvar"], r["z"], r["true"],
        500., 0.2)
    results = terms._asdict() | dict(mu=mu, logvar=logvar, decoded=decoded)
    expected = r | {"total": r["nll"] + 0.8*r["kld"] + (500 + 0.2 - 1)*r["mmd"]*32*10}
    for name, value in results.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_mmd_is_zero_for_equal_sets_and_symmetric():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    b = torch.randn(30, 6, generator=generator, dtype=torch.float64) + 1
    def kernel(u, v): return torch.exp(-((u[:, None] - v)**2).mean(2)).mean()
    assert mmd(a, a) == pytest.approx(0, abs=1e-12)
    assert mmd(a, b).item() == pytest.approx(mmd(b, a).item())
    assert mmd(a, b).item() == pytest.approx((kernel(a, a) + kernel(b, b) - 2*kernel(a, b)).item())
    assert kld(torch.zeros(3, 2), torch.zeros(3, 2)) == 0


def test_weights_of_bins():
    error = np.array([[2., 0.1, np.nan, 2.]])
    missing = np.array([[False, False, False, True]])
    expected = [[1/(4e-6 + 5e-7), 0, 0, 0]]
    np.testing.assert_allclose(bin_weights(error, missing, [1000.], 0.25), expected, rtol=1e-6)
    assert bin_weights(error, missing, [1000.], 0.05)[0, 1] > 0
    for norm in ([0.], [np.nan], [-5.], [1., 1.]):
        with pytest.raises(InvalidInputError, match="norm"): bin_weights(error, missing, norm)


def test_same_seed_same_numbers_and_another_seed_others():
    torch.manual_seed(0)
    first, history = trained(seed=1)
    torch.manual_seed(99)  # PyTorch's global generator has no part in it
    second, again = trained(seed=1)
    assert history.equals(again)
    assert torch.equal(first.outp.weight, second.outp.weight)
    assert not history.equals(trained(seed=2)[1])
    assert history.valid_total.iloc[-1] < history.valid_total.iloc[0]


def test_interrupted_training_continues_with_the_same_numbers(tmp_path):
    whole, expected = trained()
    file, lengths = tmp_path/"checkpoint", []
    for epochs in (1, 4, 6):
        network, history = trained(replace(SMALL, epochs=epochs), checkpoint=file)
        lengths.append(len(history))
    assert lengths == [1, 4, 6]
    assert history.equals(expected)
    for a, b in zip(network.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for other in (dict(seed=2), dict(x=X + 0.01), dict(parameters=replace(SMALL, lr=1e-3))):
        assert not trained(checkpoint=file, **other)[1].head(4).equals(expected.head(4))


def test_training_stops_when_nothing_improves():
    parameters = replace(SMALL, epochs=100, lr=1e-9, stop_patience=3)
    assert len(trained(parameters)[1]) == 4


def test_the_weights_that_are_kept_have_the_loss_that_is_marked():
    "It need not be the smallest: less than 0.1 % is no improvement."
    parameters = replace(SMALL, epochs=60, lr=1e-3, lambda_=5.)
    network, history = trained(parameters)
    kept = history[history.kept]
    assert len(kept) == 1
    held_back = Training(network, X, WEIGHTS, parameters, 1).valid
    loss = vae._epoch(network, held_back, parameters, torch.Generator().manual_seed(0))
    assert loss.total == pytest.approx(kept.valid_total.item(), rel=1e-6)


@pytest.mark.parametrize("change, words", (
    (lambda x, w: x.__setitem__((3, 3), np.nan), "spectra must be finite; row 3"),
    (lambda x, w: w.__setitem__((5, 0), np.inf), "weights must be finite; row 5"),
    (lambda x, w: w.__setitem__((5, 0), -1), "negative")))
def test_training_refuses_bad_spectra(change, words):
    x, weights = X.copy(), WEIGHTS.copy()
    change(x, weights)
    with pytest.raises(InvalidInputError, match=words):
        fit(new_vae(50, SMALL, 1), x, weights, SMALL, 1, progress=False)


def test_a_loss_that_explodes_is_reported():
    with pytest.raises(SpecpredError, match="vae.lr"): trained(replace(SMALL, lr=1e9))


def test_random_configurations_are_drawn_as_published():
    drawn = random_configurations(VAEParameters(n_trials=1000), seed=0)
    assert drawn[0] == VAEParameters(n_trials=1000)
    outer, inner = np.array([c.hidden for c in drawn[1:]]).T
    lambdas = np.array([c.lambda_ for c in drawn[1:]])
    assert inner.min() >= 11 and (inner <= outer).all() and outer.max() <= 2000
    assert lambdas.min() >= 1 and lambdas.max() <= 1e5
    assert np.median(np.log10(lambdas)) == pytest.approx(2.5, abs=0.2)


def test_an_interrupted_search_continues_and_ends_the_same(tmp_path, monkeypatch):
    parameters = replace(SMALL, n_trials=4, trial_epochs=2)
    best, whole = search(X, WEIGHTS, parameters, 1, progress=False)
    assert len(whole) == whole.lambda_.nunique() == 4
    row = whole.loc[whole.score.idxmin()]
    assert (best.lambda_, *best.hidden) == (row.lambda_, row.outer, row.inner)

    file, calls = tmp_path/"checkpoint", []
    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        return fit(*args, **kwargs)
    monkeypatch.setattr(vae, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt): search(X, WEIGHTS, parameters, 1, file, progress=False)
    again, resumed = search(X, WEIGHTS, parameters, 1, file, progress=False)
    assert len(calls) == 5 and again == best and resumed.equals(whole)
    more = search(X, WEIGHTS, replace(parameters, n_trials=5), 1, file, progress=False)[1]
    assert len(calls) == 6 and more[:4].equals(whole)
    search(X + 0.01, WEIGHTS, parameters, 1, file, progress=False)
    assert len(calls) == 10  # other spectra: the trials are not used
    single = replace(parameters, n_trials=1)
    only, none = search(X, WEIGHTS, single, 1, file, progress=False)
    assert len(calls) == 10 and only == single and len(none) == 0


def test_latent_axes_are_orthonormal_and_ordered():
    rng = np.random.default_rng(0)
    mu = rng.standard_normal((500, 5)) @ rng.standard_normal((5, 5))
    components, centre, fraction = latent_pca(mu, 3)
    np.testing.assert_allclose(components @ components.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(centre, mu.mean(0))
    variance = ((mu - centre) @ components.T).var(0)
    np.testing.assert_allclose(variance/mu.var(0).sum(), fraction[:3])
    assert fraction.sum() == pytest.approx(1) and (np.diff(fraction) <= 0).all()
    largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1)
    assert (largest > 0).all()  # the sign of an axis is free
    with pytest.raises(InvalidInputError, match="too few"): latent_pca(mu[:3], 3)


def test_targets_are_standardised_and_decoding_undoes_it(model):
    targets = model.encode(FLUX)
    np.testing.assert_allclose(targets.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(targets.std(0), 1, atol=1e-4)
    latents = model.centre + (targets*model.target_std + model.target_mean) @ model.components
    with torch.no_grad():
        expected = model.vae.decode(torch.tensor(latents, dtype=torch.float32)).numpy() + model.mean
    np.testing.assert_allclose(model.decode(targets), expected, atol=1e-6)
    assert model.decode(np.zeros((0, 3))).shape == (0, 50)
    assert model.reconstruct(FLUX[:1]).shape == (1, 50)


def test_bad_input_is_refused(model):
    for call, x in ((model.encode, np.zeros((2, 49))), (model.encode, np.full((2, 50), np.nan)),
            (model.decode, np.zeros((2, 4))), (model.decode, np.zeros(3)), (model.decode, "x")):
        with pytest.raises(InvalidInputError): call(x)


@pytest.mark.parametrize("name, value", (("mean", np.zeros(49)), ("mean", np.full(50, np.nan)),
    ("mean", ["a"]*50), ("target_std", np.zeros(3)), ("target_std", np.full(3, np.nan)),
    ("components", np.ones(4)), ("components", np.ones((3, 5))), ("wavelength", None)))
def test_parts_that_do_not_fit_together(model, name, value):
    with pytest.raises(InvalidInputError, match=name): SpectrumModel(**parts(model) | {name: value})


def test_a_model_comes_back_from_its_file(model, tmp_path):
    model.save(tmp_path/"vae.safetensors", seed=3)
    again = SpectrumModel.load(tmp_path/"vae.safetensors")
    targets = model.encode(FLUX)
    np.testing.assert_array_equal(again.encode(FLUX), targets)
    np.testing.assert_array_equal(again.decode(targets), model.decode(targets))
    np.testing.assert_array_equal(again.wavelength, model.wavelength)


@pytest.mark.parametrize("sizes, tensors, words", (
    ({}, {"vae.mu.bias": None}, "missing: mu.bias"), ({}, {"extra": torch.zeros(1)}, "extra"),
    ({}, {"mean": torch.zeros(3)}, "mean must have the shape"), ({}, {"centre": None}, "centre"),
    ({}, {"target_std": torch.zeros(3)}, "target_std must be positive"),
    ({}, {"vae.mu.bias": torch.full((4,), torch.nan)}, "NaN"),
    ({"n_bins": 51}, {}, "of another shape: encd.weight"),
    ({"hidden": [24]}, {}, "does not describe"),
    ({"n_bins": 10**9, "hidden": [10**9, 10**9]}, {}, "of another shape"),
    ({"size": 3}, {}, "does not describe"), ({"n_latents": -1}, {}, "does not describe")))
def test_files_of_another_model_are_refused(model, tmp_path, sizes, tensors, words):
    file = tmp_path/"vae.safetensors"
    model.save(file)
    metadata, found = read_weights(file)
    metadata["arguments"] |= sizes
    changed = {name: value for name, value in (found | tensors).items() if value is not None}
    write_weights(file, changed, metadata)
    with pytest.raises(WeightsError, match=words): SpectrumModel.load(file)


@pytest.fixture
def published(tmp_path, model):
    "Files as the published ones, and the catalogue's targets."
    latents = model.latents(FLUX).astype(float)
    pca = PCA(3, svd_solver="full").fit(latents)
    torch.save(model.vae, tmp_path/"vae.pth", _use_new_zipfile_serialization=False)
    (tmp_path/"pca.pkl").write_bytes(pickle.dumps(pca, protocol=3))
    np.save(tmp_path/"meanspec.npy", FLUX.mean(0))
    table = pd.DataFrame(pca.transform(latents), columns=["VAE1", "VAE2", "VAE3"]).assign(ra=1.)
    table.to_csv(tmp_path/"catalogue.csv", index=False)
    return [tmp_path/name for name in ("vae.pth", "pca.pkl", "meanspec.npy", "catalogue.csv")]


def test_published_files_make_a_model(published, model, tmp_path):
    *files, catalogue = published
    stats = target_stats(catalogue)
    ours = SpectrumModel.from_published(*files, stats, wavelength=model.wavelength)
    targets = model.encode(FLUX)
    np.testing.assert_allclose(np.abs(ours.encode(FLUX)), np.abs(targets), atol=1e-3)
    np.testing.assert_allclose(ours.decode(ours.encode(FLUX)), model.decode(targets), atol=1e-5)
    ours.save(tmp_path/"model.safetensors")
    again = SpectrumModel.load(tmp_path/"model.safetensors")
    np.testing.assert_array_equal(again.encode(FLUX), ours.encode(FLUX))
    for wrong in ((np.zeros(3), np.zeros(3)), (np.zeros(3), np.full(3, np.nan)), ([0]*2, [1]*2)):
        with pytest.raises(InvalidInputError, match="target_"):
            SpectrumModel.from_published(*files, wrong)


def test_other_files_than_the_published_ones(published):
    network, pca, mean, catalogue = published
    with pytest.raises(MissingInputError):
        SpectrumModel.from_published(network, pca, "nothing.npy", target_stats(catalogue))
    with pytest.raises(DamagedFileError):
        SpectrumModel.from_published(network, pca, catalogue, target_stats(catalogue))
    torch.save(torch.nn.Linear(2, 2), network)
    with pytest.raises(WeightsError, match="holds another network"): load_published(network)
    changed = InfoVAE(50, 4, (24, 12))
    changed.outp = torch.nn.Linear(24, 51)
    torch.save(changed, network)
    with pytest.raises(WeightsError, match="outp.bias"): load_published(network)


@pytest.mark.parametrize("table, message", (("ra,dec\n1,2\n", "VAE1"),
    ("VAE1,VAE2\n1,x\n3,4\n", "must be numbers"), ("VAE1,VAE2\n1,\n3,4\n", "must be finite"),
    ("VAE1\n1\n1\n", "standard deviation")))
def test_a_catalogue_without_targets_is_refused(tmp_path, table, message):
    (tmp_path/"catalogue.csv").write_text(table)
    with pytest.raises(InvalidInputError, match=message): target_stats(tmp_path/"catalogue.csv")
    with pytest.raises(InvalidInputError, match="no CSV table"): target_stats(tmp_path)


@pytest.mark.parametrize("axis, n", (("target", 3), ("latent", 4)))
def test_traversals(model, axis, n):
    import matplotlib.pyplot as plt
    figure = plot_traversals(model, axis)
    panels = [ax for ax in figure.axes if ax.lines]
    assert len(panels) == n and panels[0].get_title() == f"{axis} 1"
    spectra = np.array([[line.get_ydata() for line in ax.lines] for ax in panels])
    assert np.ptp(spectra[0], axis=0).max() > 1e-4
    assert spectra.max() < panels[0].get_ylim()[1]
    if axis == "target":
        expected = model.decode([[0, 0, 0], [0, 1, 0], [0, 2, 0]])
        np.testing.assert_allclose(spectra[1, 2:], expected, atol=1e-5)
    plt.close(figure)
    with pytest.raises(InvalidInputError, match="target"): plot_traversals(model, "spectrum")
