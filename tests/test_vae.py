"specpred.vae: the published numbers, training that survives interruption, and files that are what they claim to be."
import dataclasses, json, zlib
from pathlib import Path

import numpy as np, pytest, torch
from safetensors.torch import load_file, save_file

from specpred.config import DamagedFileError, InvalidInputError, MissingInputError, SpecpredError, VAEParameters, WeightsError
from specpred.vae import InfoVAE, SpectrumModel, Training, bin_weights, fit, infovae_loss, kld, latent_pca, mmd, new_vae

REFERENCE = Path(__file__).parent/"reference"
SMALL = VAEParameters(n_latents=4, hidden=(24, 12), n_targets=3, epochs=6, lambda_=50., batch_size=16, lr=5e-3)


def spectra(n=200, bins=50, seed=0):
    rng = np.random.default_rng(seed)
    x = np.linspace(-1, 1, bins)
    p = rng.uniform(-1, 1, (n, 3))
    flux = 1 + 0.3*p[:, :1]*x + 0.3*p[:, 1:2]*x**2 + (0.4 + 0.3*p[:, 2:])*np.exp(-0.5*(x/0.1)**2)
    flux = (flux + 0.01*rng.standard_normal(flux.shape))
    return (flux/np.linalg.norm(flux, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    flux = spectra()
    vae = new_vae(50, SMALL, 0)
    fit(vae, flux - flux.mean(0), np.full(flux.shape, 1e4), SMALL, 0, progress=False)
    return SpectrumModel.fit(vae, np.linspace(4000, 5000, 50), flux.mean(0), flux, 3)[0]


def test_state_dict_has_the_published_keys_and_shapes():
    published = json.loads((REFERENCE/"state_dict_keys.json").read_text())["infovae"]
    assert {k: list(v.shape) for k, v in InfoVAE(1000, 10, (549, 110)).state_dict().items()} == published


def test_network_and_loss_equal_the_published_numbers():
    reference = {k: torch.tensor(v) for k, v in np.load(REFERENCE/"infovae.npz").items()}
    vae = InfoVAE()
    vae.load_state_dict({k: torch.tensor(np.random.default_rng(zlib.crc32(k.encode())).standard_normal(tuple(v.shape))/np.sqrt(max(1, np.prod(v.shape[1:]))),
        dtype=torch.float32) for k, v in vae.state_dict().items()})
    with torch.no_grad():
        (mu, logvar), decoded = vae.encode(reference["x"]), vae.decode(reference["z"])
    terms = infovae_loss(reference["x"], reference["w"], reference["decoded"], reference["mu"], reference["logvar"], reference["z"], reference["true"], 500., 0.2)
    found = dict(mu=mu, logvar=logvar, decoded=decoded, mmd=mmd(reference["true"], reference["z"]), kld=kld(reference["mu"], reference["logvar"]), nll=terms.nll)
    for name, value in found.items(): torch.testing.assert_close(value, reference[name], rtol=1e-5, atol=1e-5, msg=name)
    expected = reference["nll"] + 0.8*reference["kld"] + (500 + 0.2 - 1)*reference["mmd"]*32*10
    torch.testing.assert_close(terms.total, expected, rtol=1e-5, atol=0)


def test_mmd_is_zero_for_equal_sets_and_symmetric():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 6, generator=generator, dtype=torch.float64), 1 + torch.randn(30, 6, generator=generator, dtype=torch.float64)
    direct = lambda u, v: torch.exp(-((u[:, None] - v)**2).mean(2)).mean()
    assert mmd(a, a) == pytest.approx(0, abs=1e-12) and mmd(a, b) == pytest.approx(mmd(b, a).item())
    assert mmd(a, b).item() == pytest.approx((direct(a, a) + direct(b, b) - 2*direct(a, b)).item())
    assert kld(torch.zeros(3, 2), torch.zeros(3, 2)) == 0


def test_weights_of_bins():
    error = np.array([[2., 0.1, np.nan, 2.]])
    missing = np.array([[False, False, False, True]])
    np.testing.assert_allclose(bin_weights(error, missing, [1000.], 0.25), [[1/(4e-6 + 5e-7), 0, 0, 0]], rtol=1e-6)
    assert bin_weights(error, missing, [1000.], 0.05)[0, 1] > 0


def test_same_seed_same_numbers_and_another_seed_others():
    flux = spectra()
    x, weights = flux - flux.mean(0), np.full(flux.shape, 1e4)
    def train(seed):
        torch.manual_seed(np.random.randint(10**6))  # the global generator has no part in it
        vae = new_vae(50, SMALL, seed)
        return fit(vae, x, weights, SMALL, seed, progress=False).drop(columns="seconds"), vae.state_dict()["outp.weight"]
    (first, a), (second, b), (other, _) = train(1), train(1), train(2)
    assert first.equals(second) and torch.equal(a, b) and not first.equals(other)
    assert first.valid_total.iloc[-1] < first.valid_total.iloc[0]


class Interrupted(Exception): pass


def test_interrupted_training_goes_on_with_the_same_numbers(tmp_path, monkeypatch):
    flux = spectra()
    x, weights = flux - flux.mean(0), np.full(flux.shape, 1e4)
    whole = new_vae(50, SMALL, 1)
    expected = fit(whole, x, weights, SMALL, 1, progress=False).drop(columns="seconds")

    step, epochs = Training.step, []
    def dying_step(self):
        if len(self.history) == 4: raise Interrupted
        epochs.append(len(self.history)), step(self)
    monkeypatch.setattr(Training, "step", dying_step)
    with pytest.raises(Interrupted): fit(new_vae(50, SMALL, 1), x, weights, SMALL, 1, tmp_path/"checkpoint", save_every=0, progress=False)
    monkeypatch.setattr(Training, "step", lambda self: (epochs.append(len(self.history)), step(self)))
    vae = new_vae(50, SMALL, 1)
    history = fit(vae, x, weights, SMALL, 1, tmp_path/"checkpoint", save_every=0, progress=False).drop(columns="seconds")
    assert epochs == [0, 1, 2, 3, 4, 5]  # none twice
    assert history.equals(expected)
    assert all(torch.equal(a, b) for a, b in zip(vae.state_dict().values(), whole.state_dict().values()))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_checkpoint_of_something_else_is_not_used(tmp_path, content):
    flux, file = spectra(), tmp_path/"checkpoint"
    if content is None: torch.save({"fingerprint": "another"}, file)
    else: file.write_bytes(content)
    assert not Training(new_vae(50, SMALL, 1), flux, np.ones(flux.shape), SMALL, 1).restore(file)


def test_training_stops_when_nothing_improves_and_keeps_the_best_epoch():
    flux = spectra()
    parameters = dataclasses.replace(SMALL, epochs=100, lr=1e-9, stop_patience=3)
    assert len(fit(new_vae(50, parameters, 1), flux - flux.mean(0), np.full(flux.shape, 1e4), parameters, 1, progress=False)) == 4


@pytest.mark.parametrize("spoil, words", [(lambda x, w: x.__setitem__((3, 3), np.nan), "row 3"), (lambda x, w: w.__setitem__((5, 0), -1), "row 5")])
def test_training_names_bad_rows(spoil, words):
    x, weights = spectra(), np.ones((200, 50), np.float32)
    spoil(x, weights)
    with pytest.raises(InvalidInputError, match=words): fit(new_vae(50, SMALL, 1), x, weights, SMALL, 1, progress=False)


def test_a_loss_that_explodes_is_reported():
    flux = spectra()
    parameters = dataclasses.replace(SMALL, lr=1e9)
    with pytest.raises(SpecpredError, match="vae.lr"): fit(new_vae(50, parameters, 1), flux, np.full(flux.shape, 1e4), parameters, 1, progress=False)


def test_latent_axes_are_orthonormal_and_ordered():
    mu = np.random.default_rng(0).standard_normal((500, 5)) @ np.random.default_rng(1).standard_normal((5, 5))
    components, centre, fraction = latent_pca(mu, 3)
    np.testing.assert_allclose(components @ components.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(centre, mu.mean(0))
    assert fraction.sum() == pytest.approx(1) and (np.diff(fraction) <= 0).all()
    np.testing.assert_allclose(((mu - centre) @ components.T).var(0)/mu.var(0).sum(), fraction[:3])
    with pytest.raises(InvalidInputError): latent_pca(mu[:3], 3)


def test_targets_are_standardised_and_decoding_undoes_it(model):
    flux = spectra()
    targets = model.encode(flux)
    np.testing.assert_allclose(targets.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(targets.std(0), 1, atol=1e-4)
    z = model.centre + (targets*model.target_std + model.target_mean) @ model.components
    with torch.no_grad(): expected = model.vae.decode(torch.tensor(z, dtype=torch.float32)).numpy() + model.mean
    np.testing.assert_allclose(model.decode(targets), expected, atol=1e-6)
    mean_galaxy = model.decode(np.zeros((1, 3)))
    np.testing.assert_allclose(model.decode(-model.target_mean[None]/model.target_std), mean_galaxy, atol=1e-5)
    assert model.decode(np.zeros((0, 3))).shape == (0, 50) and model.reconstruct(flux[:1]).shape == (1, 50)


def test_bundle_refuses_wrong_input(model):
    for call in (lambda: model.encode(np.zeros((2, 49))), lambda: model.decode(np.zeros((2, 4))), lambda: model.decode(np.zeros(3)),
                 lambda: model.encode(np.full((2, 50), np.nan)), lambda: model.vae.decode(torch.zeros(1, 9))):
        with pytest.raises(InvalidInputError): call()
    with pytest.raises(InvalidInputError, match="mean"):
        SpectrumModel(model.vae, model.wavelength, model.mean[1:], model.components, model.centre, model.target_mean, model.target_std)


def test_a_bundle_comes_back_from_its_file(model, tmp_path):
    model.save(tmp_path/"vae.safetensors", seed=3)
    again = SpectrumModel.load(tmp_path/"vae.safetensors")
    flux = spectra(seed=5)
    np.testing.assert_array_equal(again.encode(flux), model.encode(flux))
    np.testing.assert_array_equal(again.decode(model.encode(flux)), model.decode(model.encode(flux)))
    np.testing.assert_array_equal(again.wavelength, model.wavelength)


def test_foreign_and_damaged_files_are_refused(model, tmp_path):
    file, bad = tmp_path/"vae.safetensors", tmp_path/"bad.safetensors"
    with pytest.raises(MissingInputError): SpectrumModel.load(file)
    model.save(file)
    tensors = load_file(file)
    good = dict(format="specpred.vae.SpectrumModel", arguments=json.dumps(dict(n_bins=50, n_latents=4, hidden=[24, 12])))
    save_file(tensors, bad, good)
    SpectrumModel.load(bad)
    for case, metadata, words in ((tensors, {}, "something else"), ({k: v for k, v in tensors.items() if k != "vae.mu.bias"}, good, "vae.mu.bias"),
            (tensors | {"extra": torch.zeros(1)}, good, "extra"), (tensors | {"mean": torch.zeros(3)}, good, "mean"),
            (tensors, good | {"arguments": json.dumps(dict(n_bins=51, n_latents=4, hidden=[24, 12]))}, "size mismatch"),
            (tensors, good | {"arguments": "[1"}, "does not describe"), (tensors, good | {"arguments": '{"size": 3}'}, "does not describe")):
        save_file(case, bad, metadata)
        with pytest.raises(WeightsError, match=words): SpectrumModel.load(bad)
    bad.write_bytes(file.read_bytes()[:500])
    with pytest.raises(DamagedFileError): SpectrumModel.load(bad)
    bad.write_bytes(b"not safetensors at all")
    with pytest.raises(DamagedFileError): SpectrumModel.load(bad)
