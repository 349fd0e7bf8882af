"""Files for other programs: onnxruntime computes from them what PyTorch computes."""
import json
import sys

import numpy as np
import pytest
import torch
from published_cases import fill

from specpred.config import InvalidInputError, MissingExtraError
from specpred.models import MODELS, TrainedModel
from specpred.onnx_export import export_decoder, export_network
from specpred.surveys import PS1
from specpred.vae import InfoVAE, SpectrumModel

NARROW = dict(width=0.125)


def run(path, name, values):
    "What onnxruntime makes of an input, and the metadata of the file."
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    output, = session.run(None, {name: values})
    metadata = session.get_modelmeta().custom_metadata_map
    return output, {key: json.loads(value) for key, value in metadata.items()}


@pytest.fixture(autouse=True)
def packages():
    for name in ("onnx", "onnxscript"): pytest.importorskip(name)


def images(n, size, seed=0):
    "Galaxies of one to fifty thousand nJy a pixel at the most, in noise."
    rng = np.random.default_rng(seed)
    y, x = np.indices((size, size)) - (size - 1)/2
    peak = 10**rng.uniform(3, 4.7, (n, 5, 1, 1))
    cy, cx = rng.uniform(-2, 2, (2, n, 1, 1, 1))
    radius = np.hypot(y - cy, 1.5*(x - cx))/rng.uniform(1.5, 4, (n, 5, 1, 1))
    return (peak*np.exp(-radius) + rng.normal(0, 50, (n, 5, size, size))).astype(np.float32)


def trained_network(name, size, channels=PS1.bands, arguments=None, **provenance):
    "Random weights and statistics; a branch knows the scale of its features."
    std = [1000. if provenance["stretch"] == "linear" else .5]*5
    stretch = dict(stretch=provenance["stretch"], softening=[500.]*5, mean=[.2]*5, std=std)
    arguments = arguments or {}
    if name == "photometry" or "photometry" in arguments: arguments["transform"] = stretch
    model = fill(MODELS[name](**arguments))
    trained = TrainedModel(model, name, arguments, ([.2]*5, std), ([0]*6, [1]*6), PS1, channels,
        dict(softening=[500.]*5, image_size=size, **provenance))
    branch = model if name == "photometry" else getattr(model, "branch", None)
    if branch: branch.standardise([trained.transform(torch.from_numpy(images(64, size, seed=1)))])
    return trained


@pytest.mark.parametrize("name, size, options", [
    ("deconv3", 20, dict(stretch="linear", channels=tuple("yzirg"), image_unit="counts")),
    ("photometry", 33, dict(stretch="asinh")),
    ("xresnet18_hybrid", 32, dict(stretch="asinh", symmetric=True,
        arguments=NARROW | dict(photometry=True))),
    ("xresnet18_deconv", 32, dict(stretch="image", symmetric=True, arguments=NARROW))])
def test_a_network_from_its_file(name, size, options, tmp_path):
    "The same targets as PyTorch's for batches of any length; an empty image is no exception."
    trained, flux = trained_network(name, size, **options), images(5, size)
    flux[4] = 0
    export_network(trained, tmp_path/"network.onnx", sample="invented")
    expected = trained.predict_targets(flux)
    assert expected[:4].std(0).min() > 1e-3
    for n in (1, 5):
        targets, metadata = run(tmp_path/"network.onnx", "flux", flux[:n])
        assert np.abs(targets - expected[:n]).max() < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["network.onnx"]
    facts = dict(kind="network", model=name, survey="Pan-STARRS1", bands=list("grizy"), size=size,
        pixel_scale=0.25, symmetric=trained.symmetric, unit=options.get("image_unit", "nJy"))
    assert facts.items() <= metadata.items()
    assert metadata["provenance"]["sample"] == "invented" and "specpred" in metadata["versions"]


def test_the_export_leaves_the_network_as_it_is(tmp_path):
    trained, flux = trained_network("deconv3", 20, stretch="linear"), images(2, 20)
    before = trained.predict_targets(flux)
    for name in "ab": export_network(trained, tmp_path/name)
    assert (tmp_path/"a").read_bytes() == (tmp_path/"b").read_bytes()
    assert np.array_equal(trained.predict_targets(flux), before)
    del trained.provenance["image_size"]
    with pytest.raises(InvalidInputError, match="give export_network a size"):
        export_network(trained, tmp_path/"c")
    export_network(trained, tmp_path/"c", size=24)
    assert run(tmp_path/"c", "flux", images(2, 24))[1]["size"] == 24


def test_a_decoder_from_its_file(tmp_path):
    rng, n_bins = np.random.default_rng(0), 60
    axes = np.linalg.qr(rng.normal(size=(10, 10)))[0][:6]
    model = SpectrumModel(fill(InfoVAE(n_bins, 10, (30, 20))), np.geomspace(3400, 8300, n_bins),
        rng.random(n_bins), axes, rng.normal(size=10), rng.normal(size=6), rng.uniform(.5, 2, 6))
    export_decoder(model, tmp_path/"decoder.onnx", sample="invented")
    targets = rng.normal(0, 2, (7, 6)).astype(np.float32)
    for n in (1, 7):
        spectrum, metadata = run(tmp_path/"decoder.onnx", "targets", targets[:n])
        assert np.abs(spectrum - model.decode(targets[:n])).max() < 1e-5
    assert metadata["wavelength"] == model.wavelength.tolist()
    assert metadata["provenance"] == dict(sample="invented")
    assert metadata["kind"] == "decoder" and metadata["n_targets"] == 6


@pytest.mark.parametrize("package", ("onnx", "onnxscript"))
def test_missing_packages(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    said = rf'{package} is not installed: pip install "specpred\[onnx\]"'
    with pytest.raises(MissingExtraError, match=said):
        export_network(trained_network("conv3", 20, stretch="linear"), tmp_path/"network.onnx")
    assert not list(tmp_path.iterdir())
