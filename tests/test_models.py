"The models equal the published ones; every model trains, fuses, and comes back from its file."
import json
import os

import numpy as np
import pytest
import torch
from fastai.basics import DataLoaders, Learner
from published_cases import REFERENCE, error, fill, x_of
from torch import nn

from specpred import models
from specpred.config import DamagedFileError, InvalidInputError, MissingInputError, WeightsError
from specpred.models import MODELS, TrainedModel, conv3, deconv3, n_params, xresnet18
from specpred.surveys import LEGACY, PS1, RUBIN, ImagingSurvey
from specpred.weights import read_weights, write_weights

PUBLISHED = "xresnet18", "xresnet18_hybrid", "xresnet18_deconv"
N_BANDS = {name: (3, 5, 6)[k % 3] for k, name in enumerate(MODELS)}
SCALE = np.arange(6), np.full(6, 2.)
NARROW = dict(width=0.125)  # an eighth of the channels, for speed


def survey_of(n_bands):
    return ImagingSurvey("test", tuple("abcdefgh"[:n_bands]), 0.3, 25., "nJy", (25.,)*n_bands,
        (1.,)*n_bands, "none")


def facts_of(name, n_bands=5, **arguments):
    "What `save` needs beside the model and the path."
    return dict(name=name, arguments=dict(c_in=n_bands, **arguments), survey=survey_of(n_bands),
        image_stats=([0.1]*n_bands, [2.]*n_bands), target_stats=SCALE)


@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_the_published_model(name):
    arrays = np.load(REFERENCE/"models.npz")
    model, x = fill(MODELS[name]()).eval(), x_of(300, (2, 5, 64, 64))
    assert n_params(model) == arrays[f"{name}/n_params"]
    keys = json.loads((REFERENCE/"state_dict_keys.json").read_text())[name]
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == keys
    with torch.no_grad():
        outputs = {"eval": model(x), "train": model.train()(x), "eval_after": model.eval()(x)}
    for key, value in outputs.items(): assert error(value, arrays[f"{name}/{key}"]) < 1e-4, key


@pytest.mark.parametrize("name", MODELS)
def test_every_model(name, tmp_path):
    "Any number of bands; gradients; the same numbers when fused and when read from a file."
    torch.manual_seed(1)
    n_bands, narrow = N_BANDS[name], NARROW if name.startswith("xresnet") else {}
    model, x = MODELS[name](c_in=n_bands, **narrow), x_of(301, (2, n_bands, 32, 32))
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        fused, expected = models.fuse(model), model.eval()(x)
        assert expected.shape == (2, 6) and expected.isfinite().all()
        assert error(fused(x), expected) < 1e-4
        models.save(model, tmp_path/"a", **facts_of(name, n_bands, **narrow))
        assert torch.equal(models.load(tmp_path/"a").model(x), expected)
        assert torch.equal(model(x), expected)  # the model itself is left as it is
    assert not {"FastDeconv", "BatchNorm2d"} & {type(m).__name__ for m in fused.modules()}
    assert os.listdir(tmp_path) == ["a"]


def test_fusing_leaves_the_model_as_it_is():
    model = xresnet18().train()
    y = model(x_of(301, (2, 5, 48, 48)))
    attributes = [(module, key, value) for module in model.modules()
                  for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
    assert any(value.grad_fn is not None for *_, value in attributes)  # the attention's weight
    fused = models.fuse(model)
    assert all(getattr(module, key) is value for module, key, value in attributes)
    assert model.training
    y.sum().backward()
    assert not any(p.requires_grad for p in fused.parameters())


@pytest.mark.parametrize("name", ("deconv3", "xresnet18_hybrid"))
def test_a_fused_model_can_be_exported(name, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = fill(MODELS[name]()).eval(), x_of(301, (4, 5, 48, 48))
    fused, sizes = models.fuse(model), ({0: torch.export.Dim("batch", min=1, max=1024)},)
    program = torch.export.export(fused, (x,), dynamic_shapes=sizes)
    torch.onnx.export(program, (x,), tmp_path/"model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path/"model.onnx",
        providers=["CPUExecutionProvider"])
    with torch.no_grad(): expected = model(x)
    for n in (1, 4):
        output, = session.run(None, {session.get_inputs()[0].name: x[:n].numpy()})
        assert error(output, expected[:n]) < 1e-4
        assert error(program.module()(x[:n]), expected[:n]) < 1e-4


@pytest.mark.parametrize("name", ("deconv3", "xresnet18_hybrid", "xresnet18_deconv"))
def test_a_nan_is_reported_with_the_name_of_the_layer(name):
    model, x = MODELS[name](), x_of(302, (2, 5, 48, 48))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x[1, 2, 20, 22] = float("nan")
    with pytest.raises(InvalidInputError, match="FastDeconv '0.0'.*1 NaN"): model(x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("arguments", (dict(groups=7), dict(width=0.3), dict(c_in=-1),
    dict(n_out=-1), dict(c_in="x"), dict(n_out=2.5), dict(act_cls="Sigmoid"), dict(layers=3)))
@pytest.mark.parametrize("name", ("conv3", "deconv3", "xresnet18", "xresnet18_hybrid"))
def test_arguments_that_make_no_network(name, arguments):
    with pytest.raises(InvalidInputError, match=f"There is no {name}"): MODELS[name](**arguments)


def test_another_number_of_bands():
    x = torch.zeros(2, 3, 48, 48)
    with pytest.raises(InvalidInputError, match="expected images"): deconv3()(x)


@pytest.mark.parametrize("survey, channels", ((PS1, "yzirg"), (RUBIN, ()), (LEGACY, ("z", "g"))))
def test_a_weights_file_needs_nothing_else(survey, channels, tmp_path):
    arguments = dict(sa=False, act_cls="ReLU", groups=32, c_in=len(channels or survey.bands))
    stats = [0.1]*arguments["c_in"], [2.]*arguments["c_in"]
    model = fill(xresnet18(**arguments))
    models.save(model, tmp_path/"a", name="xresnet18", arguments=arguments, survey=survey,
        channels=channels, image_stats=stats, target_stats=SCALE, provenance={"seed": 3})
    trained = models.load(tmp_path/"a")
    assert (trained.name, trained.survey, trained.provenance) == ("xresnet18", survey, {"seed": 3})
    assert trained.channels == (tuple(channels) or survey.bands)
    assert trained.arguments["act_cls"] == "ReLU" and trained.arguments["n_out"] == 6
    assert trained.image_stats.std == (2.,)*arguments["c_in"]
    x = x_of(305, (3, len(survey.bands), 32, 32))
    order = [survey.bands.index(band) for band in trained.channels]
    with torch.no_grad(): expected = model.eval()((x[:, order] - 0.1)/2)*2 + torch.arange(6)
    assert error(trained.predict(x), expected) < 1e-5


def test_weights_of_another_model(tmp_path):
    with pytest.raises(WeightsError, match="is no xresnet18.*missing: 0.1.weight"):
        models.save(MODELS["xresnet18_hybrid"](), tmp_path/"a", **facts_of("xresnet18"))
    for changes in (dict(name="resnet"), dict(image_stats=([0.], [1.])), dict(target_stats=([0.],)),
            dict(target_stats=(SCALE[0], np.zeros(6))), dict(target_stats=(SCALE[0], [np.nan]*6)),
            dict(channels="aabcd"), dict(channels="abc"), dict(arguments={"c": 1}),
            dict(provenance={"loss": np.nan}), dict(provenance=object())):
        with pytest.raises(InvalidInputError):
            models.save(conv3(), tmp_path/"a", **facts_of("conv3") | changes)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("changes, message", (
    (dict(name="xresnet18"), "missing.*unexpected"), (dict(name="os.system"), "no model"),
    (dict(name=[1]), "cannot be used"), (dict(arguments={"pretrained": 1}), "no argument"),
    (dict(arguments=3), "cannot be used"), (dict(arguments={"n_out": 7}), "another shape"),
    (dict(arguments={"n_out": 10**9}), "another shape"),
    (dict(arguments={"c_in": "x"}), "no deconv3"),
    (dict(image_stats=[[0], [1]]), "image_stats"), (dict(target_stats=None), "target_stats"),
    (dict(channels=["a"]*5), "different bands"), (dict(channels=5), "cannot be used"),
    (dict(survey=None), "cannot be used"), (dict(survey={"name": "x"}), "cannot be used"),
    (dict(kind="SpectrumModel"), "expected 'TrainedModel'")))
def test_metadata_that_does_not_fit(changes, message, tmp_path):
    models.save(deconv3(), tmp_path/"a", **facts_of("deconv3"))
    metadata, tensors = read_weights(tmp_path/"a")
    write_weights(tmp_path/"a", tensors, metadata | changes)
    with pytest.raises(WeightsError, match=f"(?s){message}"): models.load(tmp_path/"a")


@pytest.mark.parametrize("device", ("cuda:99", "no such device"))
def test_a_device_that_is_not_there(device, tmp_path):
    models.save(conv3(), tmp_path/"a", **facts_of("conv3"))
    with pytest.raises(InvalidInputError, match=f"device '{device}' cannot be used"):
        models.load(tmp_path/"a", device)


COUNTS = x_of(304, (128, 5, 32, 32))*torch.arange(1, 6)[:, None, None]
IMAGE_STATS = models.image_stats(COUNTS)


def learner(model, folder):
    "A fastai learner around a model, with an optimizer that has taken a step."
    learn = Learner(DataLoaders([], []), model, loss_func=nn.functional.mse_loss, path=folder,
        model_dir="")
    learn.create_opt()
    model(x_of(303, (2, 5, 32, 32))).sum().backward()
    learn.opt.hypers[0]["lr"] = np.float64(1e-3)  # as schedules leave it
    learn.opt.step()
    return learn


@pytest.mark.parametrize("name, with_opt", (("conv3", True), ("deconv3", False),
    ("xresnet18_hybrid", True)))
def test_published_weights_are_recognised_and_used(name, with_opt, tmp_path):
    model = MODELS[name]()
    learner(model, tmp_path).save("weights", with_opt=with_opt)
    published = models.load_published(tmp_path/"weights.pth", IMAGE_STATS, SCALE)
    assert published.name == name and published.channels == tuple("yzirg")
    yzirg = COUNTS.flip(1)
    std, mean = torch.std_mean(yzirg, dim=(0, 2, 3), keepdim=True)
    with torch.no_grad(): expected = model.eval()(((yzirg - mean)/std)[:4])*2 + torch.arange(6)
    assert error(published.predict(COUNTS[:4]), expected) < 1e-4


def test_bare_and_old_weights_files_are_read(tmp_path):
    file = tmp_path/"a"
    torch.save(conv3().state_dict(), file, _use_new_zipfile_serialization=False)
    assert models.load_published(file, IMAGE_STATS, SCALE).name == "conv3"
    arguments = dict(act_cls="ReLU", sa=False)
    torch.save(xresnet18(**arguments).state_dict(), file)
    published = models.load_published(file, IMAGE_STATS, SCALE, **arguments)
    assert published.name == "xresnet18" and published.arguments["act_cls"] == "ReLU"


def test_predictions_of_other_batches_and_of_bad_images():
    trained = TrainedModel(fill(conv3()), "conv3", {}, IMAGE_STATS, SCALE, channels="yzirg")
    whole = trained.predict(COUNTS)
    assert whole.shape == (128, 6) and whole.dtype == np.float32
    assert trained.predict(COUNTS[:0]).shape == (0, 6)
    in_batches = trained.predict(COUNTS.numpy(), batch_size=50)
    np.testing.assert_allclose(in_batches, whole, rtol=1e-5, atol=1e-5)
    for images, message in ((COUNTS[:, :4], "shape"), (COUNTS[0], "shape"), (COUNTS.log(), "NaN"),
            ("images", "no array"), (None, "shape")):
        with pytest.raises(InvalidInputError, match=message): trained.predict(images)
    with pytest.raises(InvalidInputError, match="128 cutouts"): models.image_stats(COUNTS[:127])
    with pytest.raises(InvalidInputError, match="NaN"): models.image_stats(COUNTS.log())


def test_predictions_see_images_as_in_training():
    stretched = dict(stretch="asinh", softening=[1., 2., 3., 4., 5.], image_size=24)
    trained = TrainedModel(fill(conv3()), "conv3", {}, IMAGE_STATS, SCALE, provenance=stretched)
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGE_STATS)
    softened = torch.arcsinh(COUNTS[:, :, 4:-4, 4:-4]/torch.arange(1, 6)[:, None, None])
    with torch.no_grad(): expected = trained.model((softened - mean)/std)
    assert error(trained.predict_targets(COUNTS), expected) < 1e-5
    for changes in (dict(stretch="log"), dict(softening=[1.])):
        trained.provenance = stretched | changes
        with pytest.raises(WeightsError, match="stretch"): trained.predict(COUNTS)
    trained.provenance = dict(image_size=64)
    with pytest.raises(InvalidInputError, match="cropped"): trained.predict(COUNTS)


def test_published_weights_that_do_not_fit(tmp_path):
    file = tmp_path/"a"
    def load(**arguments): return models.load_published(file, IMAGE_STATS, SCALE, **arguments)
    with pytest.raises(MissingInputError): load()
    torch.save(conv3().state_dict(), file)
    with pytest.raises(WeightsError, match="missing: 0.0.bias"): load(name="deconv3")
    with pytest.raises(InvalidInputError, match="dropout"): load(dropout=1)
    with pytest.raises(InvalidInputError, match="image_stats"):
        models.load_published(file, (0, 1), SCALE)
    torch.save(xresnet18(n_out=7).state_dict(), file)
    with pytest.raises(WeightsError, match=r"11.weight \(7, 512\), not \(6, 512\)"): load()
    torch.save(conv3(), file)
    with pytest.raises(WeightsError, match="more than weights"): load()
    torch.save([1, 2], file)
    with pytest.raises(WeightsError, match="no weights by name"): load()
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(DamagedFileError): load()
