"specpred.vae: the published numbers, training that survives interruption, and files that are what they claim to be."
import io, json, pickle, subprocess, sys, zlib
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file, save_file

from specpred.config import (DamagedFileError, InvalidInputError, MissingInputError, SpecpredError,
    VAEParameters, WeightsError, replace)
from specpred.vae import (InfoVAE, SpectrumModel, Training, bin_weights, fit, infovae_loss, kld, latent_pca, load_latent_pca, load_published, mmd, new_vae,
    plot_traversals, search, target_stats)

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
    vae.load_state_dict({k: torch.tensor(np.random.default_rng(zlib.crc32(k.encode())).standard_normal(tuple(v.shape))
        /np.sqrt(max(1, np.prod(v.shape[1:]))), dtype=torch.float32) for k, v in vae.state_dict().items()})
    with torch.no_grad():
        (mu, logvar), decoded = vae.encode(reference["x"]), vae.decode(reference["z"])
    terms = infovae_loss(reference["x"], reference["w"], reference["decoded"], reference["mu"], reference["logvar"], reference["z"],
        reference["true"], 500., 0.2)
    found = dict(mu=mu, logvar=logvar, decoded=decoded, mmd=mmd(reference["true"], reference["z"]),
        kld=kld(reference["mu"], reference["logvar"]), nll=terms.nll)
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
    for norm in ([0.], [np.nan], [-5.], [1., 1.]):
        with pytest.raises(InvalidInputError, match="norm"): bin_weights(error, missing, norm)


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
    parameters = replace(SMALL, epochs=100, lr=1e-9, stop_patience=3)
    assert len(fit(new_vae(50, parameters, 1), flux - flux.mean(0), np.full(flux.shape, 1e4), parameters, 1, progress=False)) == 4


def test_the_history_marks_the_epoch_whose_weights_are_kept():
    "The losses of the weights that come back are those of that row, which need not be the smallest."
    flux = spectra()
    x, weights = flux - flux.mean(0), np.full(flux.shape, 1e4)
    parameters = replace(SMALL, epochs=60, lr=1e-3, lambda_=5.)
    training = Training(vae := new_vae(50, parameters, 1), x, weights, parameters, 1)
    while not training.finished: training.step()
    training.history.append(training.history[-1] | dict(valid_total=training.best*0.9995))  # better, but by less than 0.1 %
    assert (training.table().kept.sum() == 1
        and training.table().valid_total[training.table().kept].item() == training.best > training.table().valid_total.min())
    history = fit(vae := new_vae(50, parameters, 1), x, weights, parameters, 1, progress=False)
    judge = Training(vae, x, weights, parameters, 1)
    from specpred.vae import _epoch
    again = _epoch(vae, *judge.sets["valid"], parameters, torch.Generator().manual_seed(0))
    assert again["total"] == pytest.approx(history[history.kept].valid_total.item(), rel=1e-6)


@pytest.mark.parametrize("setting", (dict(epochs=0), dict(batch_size=0), dict(valid_fraction=0.), dict(valid_fraction=2.), dict(lr=-1.),
    dict(lr=float("nan")), dict(n_latents=0), dict(hidden=(5,)), dict(hidden=(0, 3)), dict(n_trials=0), dict(alpha=2.), dict(lambda_=-1.),
    dict(n_targets=9), dict(stop_patience=0), dict(plateau_patience=-1), dict(trial_epochs=0)))
def test_settings_that_cannot_be_are_named(setting):
    with pytest.raises(InvalidInputError, match=f"{next(iter(setting))}="): replace(SMALL, **setting)


@pytest.mark.parametrize("arguments", (dict(hidden=(3, 4, 5)), dict(dropout=3), dict(n_bins=0), dict(hidden=(0, 3)), dict(n_latents=2.5)))
def test_networks_that_cannot_be(arguments):
    with pytest.raises(InvalidInputError, match="There is no autoencoder"): InfoVAE(**arguments)


@pytest.mark.parametrize("spoil, words", [(lambda x, w: x.__setitem__((3, 3), np.nan), "row 3"), (lambda x, w: w.__setitem__((5, 0), -1), "row 5")])
def test_training_names_bad_rows(spoil, words):
    x, weights = spectra(), np.ones((200, 50), np.float32)
    spoil(x, weights)
    with pytest.raises(InvalidInputError, match=words): fit(new_vae(50, SMALL, 1), x, weights, SMALL, 1, progress=False)


def test_a_loss_that_explodes_is_reported():
    flux = spectra()
    parameters = replace(SMALL, lr=1e9)
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


@pytest.mark.parametrize("changes", (dict(mean=np.zeros(49)), dict(mean=np.full(50, np.nan)), dict(mean=["a"]*50), dict(target_std=np.zeros(3)),
    dict(target_std=np.full(3, np.nan)), dict(target_std=-np.ones(3)), dict(components=np.ones(4)), dict(components=np.ones((3, 5))),
    dict(target_mean=np.full(3, np.inf)), dict(wavelength=None)))
def test_parts_that_make_no_bundle(model, changes):
    parts = {name: getattr(model, name) for name in SpectrumModel._tensors}
    SpectrumModel(model.vae, **parts)
    with pytest.raises(InvalidInputError, match=next(iter(changes))): SpectrumModel(model.vae, **parts | changes)


def test_weights_that_are_no_numbers_make_no_bundle(model, tmp_path):
    spoilt = InfoVAE(50, 4, (24, 12))
    spoilt.encd.weight.data[3, 3] = np.nan
    with pytest.raises(InvalidInputError, match="weights"): SpectrumModel(spoilt, **{name: getattr(model, name) for name in SpectrumModel._tensors})
    torch.save(spoilt, tmp_path/"vae.pkl")
    with pytest.raises(WeightsError, match="NaN"): load_published(tmp_path/"vae.pkl")


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
            (tensors, good | {"arguments": json.dumps(dict(n_bins=51, n_latents=4, hidden=[24, 12]))}, "of another shape: vae.encd.weight"),
            (tensors, good | {"arguments": json.dumps(dict(n_bins=10**9, n_latents=10**6, hidden=[10**9, 10**9]))}, "another shape"),
            (tensors | {"target_std": torch.zeros(3, dtype=torch.float64)}, good, "target_std must be positive"),
            (tensors, good | {"arguments": "[1"}, "does not describe"), (tensors, good | {"arguments": '{"size": 3}'}, "does not describe")):
        save_file(case, bad, metadata)
        with pytest.raises(WeightsError, match=words): SpectrumModel.load(bad)
    bad.write_bytes(file.read_bytes()[:500])
    with pytest.raises(DamagedFileError): SpectrumModel.load(bad)
    bad.write_bytes(b"not safetensors at all")
    with pytest.raises(DamagedFileError): SpectrumModel.load(bad)


class Malicious:
    def __init__(self, command): self.command = command
    def __reduce__(self): return __import__("os").system, (self.command,)


@pytest.fixture
def published(tmp_path, model):
    "Files as the published ones: a pickled network, a pickled PCA, an array, and the catalogue's targets."
    from sklearn.decomposition import PCA
    flux = spectra()
    pca = PCA(3, svd_solver="full").fit(model.latents(flux).astype(float))
    torch.save(model.vae, tmp_path/"vae.pkl"), np.save(tmp_path/"meanspec.npy", flux.mean(0))
    (tmp_path/"pca.pkl").write_bytes(pickle.dumps(pca))
    pd.DataFrame(pca.transform(model.latents(flux)), columns=["VAE1", "VAE2", "VAE3"]).assign(ra=1.).to_csv(tmp_path/"catalogue.csv", index=False)
    return tmp_path


@pytest.mark.parametrize("write", (torch.save, lambda m, f: torch.save(m, f, _use_new_zipfile_serialization=False),
    lambda m, f: f.write_bytes(pickle.dumps(m)), lambda m, f: f.write_bytes(pickle.dumps(m, protocol=2))),
    ids=("zip", "legacy", "pickle", "pickle 2"))
def test_published_autoencoder_in_every_format(published, model, write):
    write(model.vae, published/"vae.pkl")
    loaded = load_published(published/"vae.pkl")
    assert loaded.hidden == (24, 12) and loaded.n_latents == 4 and not loaded.training
    assert all(torch.equal(v, model.vae.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_published_files_make_a_bundle(published, model):
    stats = target_stats(published/"catalogue.csv")
    bundle = SpectrumModel.from_published(*(published/f for f in ("vae.pkl", "pca.pkl", "meanspec.npy")), stats, wavelength=model.wavelength)
    np.testing.assert_allclose(bundle.decode(bundle.encode(spectra())), model.decode(model.encode(spectra())), atol=1e-5)
    np.testing.assert_allclose(np.abs(bundle.encode(spectra())), np.abs(model.encode(spectra())), atol=1e-3)
    bundle.save(published/"bundle.safetensors")
    assert (SpectrumModel.load(published/"bundle.safetensors").encode(spectra()) == bundle.encode(spectra())).all()
    by_path = SpectrumModel.from_published(*(published/f for f in ("vae.pkl", "pca.pkl", "meanspec.npy")),
        str(published/"catalogue.csv"), wavelength=model.wavelength)
    assert (by_path.target_std == bundle.target_std).all()
    for wrong in ((np.zeros(3),), 5, (np.zeros(3), np.zeros(3)), (np.zeros(3), np.full(3, np.nan)), ([0]*2, [1]*2)):
        with pytest.raises(InvalidInputError, match="target_"):
            SpectrumModel.from_published(*(published/f for f in ("vae.pkl", "pca.pkl", "meanspec.npy")), wrong)
    with pytest.raises(InvalidInputError, match=r"target_stats\('catalogue.csv'\)"):
        SpectrumModel.from_published(*(published/f for f in ("vae.pkl", "pca.pkl", "meanspec.npy")))


@pytest.mark.parametrize("write", (lambda m, f: f.write_bytes(pickle.dumps(m)), torch.save,
    lambda m, f: torch.save(m, f, _use_new_zipfile_serialization=False),
    lambda m, f: torch.save(torch.nn.ModuleDict({"encd": torch.nn.Linear(2, 2)}) and [m], f)),
    ids=("pickle", "zip", "legacy", "inside a list"))
def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path, write):
    marker, file = tmp_path/"marker", tmp_path/"vae.pkl"
    write(Malicious(f"touch {marker}"), file)
    for read in (load_published, load_latent_pca):
        with pytest.raises(WeightsError, match=r"(posix|nt|os)\.system"): read(file)
    assert not marker.exists()


def test_a_malicious_storage_is_refused_and_does_nothing(tmp_path):
    "torch's own way to pickle a tensor holds a second file, which torch would read without restriction."
    marker, file, inner = tmp_path/"marker", tmp_path/"vae.pkl", io.BytesIO()
    torch.save(Malicious(f"touch {marker}"), inner)
    class Storage:
        def __reduce__(self): return torch.storage._load_from_bytes, (inner.getvalue(),)
    file.write_bytes(pickle.dumps(Storage()))
    with pytest.raises((WeightsError, DamagedFileError)): load_published(file)
    assert not marker.exists()


@pytest.mark.parametrize("name", ("eval", "exec", "getattr", "__import__"))
def test_harmless_looking_words_are_refused(tmp_path, name):
    file = tmp_path/"vae.pkl"
    file.write_bytes(f"cbuiltins\n{name}\n(V1\ntR.".encode())
    with pytest.raises(WeightsError, match=f"builtins.{name}"): load_published(file)


def text(word): return b"X" + len(word).to_bytes(4, "little") + word.encode()

def pca_with(array:bytes) -> bytes:
    "A pickled PCA whose arrays are all made by these opcodes."
    return b"\x80\x02csklearn.decomposition._pca\nPCA\n)\x81}(" + b"".join(
        text(name) + array for name in ("components_", "mean_", "explained_variance_ratio_")) + b"ub."

DTYPE_OF_OBJECTS, EIGHT_BYTES = b"cnumpy\ndtype\n" + text("O") + b"\x85R", b"c_codecs\nencode\n" + text("AAAAAAAA") + text("latin1") + b"\x86R"
# ndarray((1,), dtype("O"), b"AAAAAAAA"): an object at an address of the file's choice
ADDRESS = b"cnumpy\nndarray\n(K\x01\x85" + DTYPE_OF_OBJECTS + EIGHT_BYTES + b"tR"
RECONSTRUCTED = (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text("b") + b"tR(K\x01%s"
    + b"cnumpy\ndtype\n" + text("%s") + b"\x85R\x89" + EIGHT_BYTES + b"tb")
ENORMOUS = b"cnumpy\nndarray\n(J\x00\xc2\xeb\x0b\x85" + text("b") + b"tR"  # 200 MB

@pytest.mark.parametrize("array", (ADDRESS, ENORMOUS, RECONSTRUCTED.replace(b"%s", b"K\x01\x85", 1).replace(text("%s"), text("O")),
    RECONSTRUCTED.replace(b"%s", b"J\x00\xc2\xeb\x0b\x85", 1).replace(text("%s"), text("f8")),
    b"cnumpy.core.numeric\n_frombuffer\n(" + EIGHT_BYTES + DTYPE_OF_OBJECTS + b"K\x01\x85" + text("C") + b"tR",
    b"cnumpy.core.multiarray\nscalar\n" + DTYPE_OF_OBJECTS + EIGHT_BYTES + b"\x86R"),
    ids=("address", "enormous", "objects", "too few bytes", "buffer", "scalar"))
def test_arrays_that_numpy_would_take_on_trust_are_refused(tmp_path, array):
    "In a process of its own, which numpy would crash or which may use no more than 100 MB beyond what it has."
    (tmp_path/"pca.pkl").write_bytes(pca_with(array))
    code = ("import resource, sys\nfrom specpred.config import DamagedFileError, WeightsError\nfrom specpred.vae import load_latent_pca\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load_latent_pca(sys.argv[1])\nexcept (WeightsError, DamagedFileError) as error: print('refused', error)\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e5")
    done = subprocess.run([sys.executable, "-c", code, tmp_path/"pca.pkl"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("refused"), done.stderr[-500:]


def test_the_same_array_with_numbers_is_read(tmp_path):
    array = RECONSTRUCTED.replace(b"%s", b"K\x01K\x01\x86", 1).replace(text("%s"), text("f8"))
    (tmp_path/"pca.pkl").write_bytes(pca_with(array))
    with pytest.raises(WeightsError, match=r"components \(1, 1\), mean \(1, 1\)"): load_latent_pca(tmp_path/"pca.pkl")


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    network = InfoVAE(50, 4, (24, 12))
    for size, stride in (((10**6,), (0,)), ((2,), (10**6,)), ((10**6,), (1,))):
        class Enlarged(torch.nn.Parameter):
            def __reduce_ex__(self, protocol):
                return torch._utils._rebuild_tensor_v2, (torch.storage.TypedStorage(
                    wrap_storage=torch.zeros(3).untyped_storage(), dtype=torch.float32, _internal=True), 0, size, stride, False, {})
        network.mu.register_parameter("bias", Enlarged(torch.zeros(4)))
        torch.save(network, tmp_path/"vae.pkl")
        with pytest.raises(WeightsError, match="larger than its storage"): load_published(tmp_path/"vae.pkl")


def test_torchscript_and_compressed_archives_are_refused(tmp_path):
    import zipfile
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path/"script.pt")
    with zipfile.ZipFile(tmp_path/"bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive: archive.writestr("bomb/data.pkl", bytes(10**7))
    for name in ("script", "bomb"):
        with pytest.raises(WeightsError, match="TorchScript or a compressed"): load_published(tmp_path/f"{name}.pt")


def test_other_published_files_are_named(published, model):
    with pytest.raises(WeightsError, match="holds no InfoVAE"): load_published(published/"pca.pkl")
    with pytest.raises(WeightsError, match="holds no fitted PCA"): load_latent_pca(published/"vae.pkl")
    with pytest.raises(MissingInputError): load_published(published/"nothing.pkl")
    data = (published/"vae.pkl").read_bytes()
    for n in (0, 10, 500, len(data) - 100):
        (published/"cut.pkl").write_bytes(data[:n])
        with pytest.raises(DamagedFileError): load_published(published/"cut.pkl")
    changed = InfoVAE(50, 4, (24, 12))
    changed.outp = torch.nn.Linear(24, 51)
    torch.save(changed, published/"vae.pkl")
    with pytest.raises(WeightsError, match="outp.bias"): load_published(published/"vae.pkl")


def test_mutated_pickles_end_in_our_errors(published):
    rng, data = np.random.default_rng(0), (published/"pca.pkl").read_bytes()
    for _ in range(300):
        mutated = bytearray(data)
        for at in rng.integers(len(data), size=3): mutated[at] = rng.integers(256)
        (published/"mutated.pkl").write_bytes(mutated)
        try: components, centre, fraction = load_latent_pca(published/"mutated.pkl")
        except SpecpredError: continue
        assert components.shape == (3, 4) and centre.shape == (4,) and fraction.shape == (3,)


@pytest.mark.parametrize("table,message", (("ra,dec\n1,2\n", "VAE1"), ("VAE1,VAE3\n1,2\n3,4\n", "VAE1"),
    ("VAE1,VAE2\n1,x\n3,4\n", "must be finite"), ("VAE1\n1\n1\n", "no standard deviation")))
def test_a_catalogue_without_targets_is_refused(tmp_path, table, message):
    (tmp_path/"catalogue.csv").write_text(table)
    with pytest.raises(InvalidInputError, match=message): target_stats(tmp_path/"catalogue.csv")
    with pytest.raises(InvalidInputError, match="no CSV table"): target_stats(tmp_path)


def test_an_interrupted_search_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    flux = spectra()
    x, weights = flux - flux.mean(0), np.full(flux.shape, 1e4)
    parameters = replace(SMALL, n_trials=4, trial_epochs=2)
    best, whole = search(x, weights, parameters, 1, tmp_path/"whole.csv", progress=False)
    assert len(whole) == 4 and whole.lambda_.nunique() == 4 and whole.score.notna().all()
    assert (best.lambda_, *best.hidden) == tuple(whole.loc[whole.score.idxmin(), ["lambda_", "outer", "inner"]])
    calls, train = [], fit
    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        return train(*args, **kwargs)
    monkeypatch.setattr("specpred.vae.fit", interrupted)
    with pytest.raises(KeyboardInterrupt): search(x, weights, parameters, 1, tmp_path/"cut.csv", progress=False)
    again, resumed = search(x, weights, parameters, 1, tmp_path/"cut.csv", progress=False)
    assert len(calls) == 5 and again == best and resumed.drop(columns="key").equals(whole.drop(columns="key"))
    longer = search(x, weights, replace(parameters, n_trials=5), 1, tmp_path/"cut.csv", progress=False)[1]
    assert len(calls) == 6 and longer[:4].equals(resumed)  # a longer search keeps what it has
    search(x + 0.01, weights, parameters, 1, tmp_path/"cut.csv", progress=False)
    assert len(calls) == 10  # other spectra: the old trials do not count
    only, none = search(x, weights, replace(parameters, n_trials=1), 1, tmp_path/"cut.csv", progress=False)
    assert len(calls) == 10 and only == replace(parameters, n_trials=1) and len(none) == 0  # nothing to choose from


@pytest.mark.parametrize("axis,n", (("target", 3), ("latent", 4)))
def test_traversals_show_every_line_to_its_top(model, axis, n):
    import matplotlib.pyplot as plt
    figure = plot_traversals(model, axis)
    panels = [ax for ax in figure.axes if ax.lines]
    assert len(panels) == n and panels[0].get_title() == f"{axis} 1"
    tops = [line.get_ydata().max() for ax in panels for line in ax.lines]
    assert max(tops) < panels[0].get_ylim()[1]
    moved = panels[0].lines[-1].get_ydata() - panels[0].lines[0].get_ydata()
    assert np.abs(moved).max() > 1e-4
    np.testing.assert_allclose(panels[0].lines[2].get_ydata(), model.decode((-model.target_mean/model.target_std)[None])[0], atol=1e-4)
    plt.close(figure)
    with pytest.raises(InvalidInputError, match="target"): plot_traversals(model, "spectrum")
