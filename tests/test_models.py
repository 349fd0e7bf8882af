"""The models equal the published ones; folding, export, and weights files."""
import functools, json, sys
from pathlib import Path
import numpy as np, pytest, torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parent)]
from published_cases import REFERENCE, error, fill, x_of
from fastai.layers import Mish
from specpred import models
from specpred.config import DamagedFileError, InvalidInputError, MissingInputError, WeightsError
from specpred.models import MODELS, conv3, n_params, xresnet18

ARGUMENTS = dict(c_in=5, n_out=6, sa=True, act_cls=Mish, groups=64, reduction=8)
PUBLISHED = ("xresnet18", "xresnet18_hybrid", "xresnet18_deconv")


@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_the_published_model(name):
    arrays = np.load(REFERENCE/"models.npz")
    model, x = fill(MODELS[name](**ARGUMENTS)).eval(), x_of(300, (2, 5, 64, 64))
    assert n_params(model) == arrays[f"{name}/n_params"]
    with torch.no_grad(): got = {"eval": model(x), "train": model.train()(x), "eval_after": model.eval()(x)}
    for key, value in got.items(): assert error(value, arrays[f"{name}/{key}"]) < 1e-4, key


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_shapes_are_the_published_ones(name):
    published = json.loads((REFERENCE/"state_dict_keys.json").read_text())[name]
    assert {key: list(value.shape) for key, value in MODELS[name](**ARGUMENTS).state_dict().items()} == published


@pytest.mark.parametrize("name,number", (("conv3", 29_734), ("deconv3", 29_606)))
def test_baselines_have_the_published_size(name, number):
    assert n_params(MODELS[name]()) == number


@functools.cache
def _state_after_a_step(name):
    torch.manual_seed(1)
    model = MODELS[name]()
    y = model(x_of(301, (2, 5, 48, 48)))
    y.sum().backward()
    assert y.shape == (2, 6) and y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    return model.state_dict()

def after_a_step(name):
    "A model in evaluation mode with running statistics of its own, and an input."
    model = MODELS[name]()
    model.load_state_dict(_state_after_a_step(name))
    return model.eval(), x_of(301, (4, 5, 48, 48))


@pytest.mark.parametrize("name", ("conv3", "deconv3", "xresnet18", "xresnet18_hybrid", "xresnet18_deconv", "xresnet34_hybrid", "xresnet50_hybrid"))
def test_every_kind_of_model_trains(name): _state_after_a_step(name)


@pytest.mark.parametrize("name", ("xresnet34", "xresnet34_deconv", "xresnet50", "xresnet50_deconv"))
def test_deeper_models_evaluate(name):
    with torch.no_grad(): assert MODELS[name](n_out=3).eval()(x_of(301, (2, 5, 48, 48))).shape == (2, 3)


@pytest.mark.parametrize("name", ("conv3", "deconv3", *PUBLISHED, "xresnet50_hybrid"))
def test_fused_model_is_the_same(name):
    model, x = after_a_step(name)
    with torch.no_grad():
        before = model(x)
        fused = models.fuse(model)
        assert error(fused(x), before) < 1e-4
        assert torch.equal(model(x), before)  # the model itself is left alone
    assert not {"FastDeconv", "BatchNorm2d"} & {type(m).__name__ for m in fused.modules()}
    if name != "xresnet18_deconv":  # and can be trained and folded again
        model.train()(x).sum().backward()
        assert error(models.fuse(model)(x), model.eval()(x)) < 1e-4


def test_folding_leaves_the_model_as_it_is():
    model = MODELS["xresnet18"]().train()
    y = model(x_of(301, (2, 5, 48, 48)))
    attributes = {(name, key): value for name, module in model.named_modules() for key, value in vars(module).items() if isinstance(value, torch.Tensor)}
    assert any(value.grad_fn is not None for value in attributes.values())  # the weight of the attention
    models.fuse(model)
    assert all(getattr(model.get_submodule(name), key) is value for (name, key), value in attributes.items()) and model.training
    y.sum().backward()


@pytest.mark.parametrize("name", ("deconv3", *PUBLISHED))
def test_fused_model_can_be_exported(name):
    model, x = after_a_step(name)
    fused = models.fuse(model)
    program = torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},))
    for n in (2, 4): assert error(program.module()(x[:n]), fused(x[:n])) < 1e-5


@pytest.mark.parametrize("name", ("deconv3", *PUBLISHED))
def test_onnx(name, tmp_path):
    pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = after_a_step(name)
    with torch.no_grad(): expected = model(x)
    torch.onnx.export(models.fuse(model), (x,), tmp_path/"model.onnx", dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},), verbose=False)
    session = onnxruntime.InferenceSession(tmp_path/"model.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 4):
        got, = session.run(None, {session.get_inputs()[0].name: x[:n].numpy()})
        assert error(got, expected[:n]) < 1e-4


@pytest.mark.parametrize("name,place", (("deconv3", "0.0"), ("xresnet18_hybrid", "0.0"), ("xresnet18_deconv", "0.0")))
def test_a_nan_is_reported_with_the_name_of_the_layer(name, place):
    model, x = MODELS[name](), x_of(302, (2, 5, 48, 48))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x[1, 2, 20, 22] = float("nan")
    with pytest.raises(InvalidInputError, match=f"FastDeconv '{place}'.*1 NaN"): model(x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("arguments", (dict(groups=7), dict(widen=0.3), dict(c_in=0), dict(stem_szs=(32, 64)), dict(stem_szs=(32, 32, 48)), dict(n_out=-1),
                                       dict(c_in="x"), dict(stem_szs=32), dict(stem_szs=()), dict(n_out=2.5)))
@pytest.mark.parametrize("name", ("xresnet18", "xresnet18_hybrid"))
def test_sizes_that_do_not_fit_together(name, arguments):
    with pytest.raises(InvalidInputError): MODELS[name](**arguments)


@pytest.mark.parametrize("arguments", (dict(c_in=0), dict(c_in="x"), dict(n_out=-1)))
@pytest.mark.parametrize("name", ("conv3", "deconv3"))
def test_sizes_of_the_baselines(name, arguments):
    with pytest.raises(InvalidInputError, match="positive integers"): MODELS[name](**arguments)


def test_wrong_bands():
    with pytest.raises(InvalidInputError, match="expected images"): MODELS["xresnet18_hybrid"]()(torch.zeros(2, 3, 48, 48))


STATS = dict(image_stats=([0.1]*5, [2.0]*5), target_stats={"mean": [0]*6, "std": [1]*6})


@pytest.mark.parametrize("name", ("deconv3", "xresnet18", "xresnet18_hybrid", "xresnet50_hybrid"))
def test_a_weights_file_needs_nothing_else(name, tmp_path):
    arguments = {} if name in ("conv3", "deconv3") else dict(sa=False, act_cls="ReLU", groups=32)
    model, x = fill(MODELS[name](**({**arguments, "act_cls": nn.ReLU} if arguments else {}))).eval(), x_of(301, (2, 5, 48, 48))
    models.save(model, tmp_path/"a.safetensors", name=name, arguments=arguments, channels="yzirg", provenance={"seed": 3}, **STATS)
    trained = models.load(tmp_path/"a.safetensors")
    with torch.no_grad(): assert torch.equal(trained.model(x), model(x))
    assert (trained.name, trained.channels, trained.provenance) == (name, "yzirg", {"seed": 3})
    assert trained.image_stats.std == (2.0,)*5 and trained.target_stats == ((0.0,)*6, (1.0,)*6)
    assert not trained.model.training and all(trained.arguments[key] == value for key, value in arguments.items())
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_weights_of_another_model(tmp_path):
    with pytest.raises(WeightsError, match="no xresnet18.*missing: 0.1.weight"):
        models.save(MODELS["xresnet18_hybrid"](), tmp_path/"a.safetensors", name="xresnet18", arguments={}, **STATS)
    with pytest.raises(WeightsError, match="of another shape: 11.weight"):
        models.load_weights(MODELS["xresnet18"](), MODELS["xresnet18"](n_out=5).state_dict())
    assert not list(tmp_path.iterdir())


def rewritten(path, **changes):
    "The weights file with other metadata."
    from safetensors import safe_open
    from safetensors.torch import save_file
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    save_file(tensors, path, metadata | changes)


@pytest.mark.parametrize("changes,message", (
    (dict(name='"xresnet18"'), "not those of xresnet18.*missing.*unexpected"), (dict(name='"os.system"'), "no model"),
    (dict(name="deconv3"), "cannot be used"), (dict(name="[1]"), "cannot be used"),
    (dict(arguments='{"pretrained": true}'), "no argument pretrained"), (dict(arguments="3"), "cannot be used"),
    (dict(arguments='{"n_out": 7}'), "n_out|target_stats"), (dict(arguments='{"c_in": "x"}'), "cannot be used|image_stats"),
    (dict(image_stats='{"mean": [0], "std": [1]}'), "image_stats"), (dict(target_stats='{"mean": [0,0,0,0,0,NaN], "std": [1,1,1,1,1,1]}'), "target_stats"),
    (dict(channels='"ggggg"'), "different bands"), (dict(channels='"gri"'), "different bands"), (dict(channels="5"), "different bands"),
    (dict(provenance='"x"'), "provenance"), (dict(provenance="null"), "provenance"),
    (dict(target_stats='{"mean": [0,0,0,0,0,0], "std": [1,1,1,1,1,0]}'), "target_stats"), (dict(format="other"), "no metadata of ours")))
def test_metadata_that_does_not_fit(changes, message, tmp_path):
    models.save(MODELS["deconv3"](), tmp_path/"a.safetensors", name="deconv3", arguments={}, **STATS)
    rewritten(tmp_path/"a.safetensors", **changes)
    with pytest.raises(WeightsError, match=f"(?s){message}"): models.load(tmp_path/"a.safetensors")


def test_enormous_arguments_are_refused_before_anything_is_built(tmp_path):
    models.save(MODELS["xresnet18"](), tmp_path/"a.safetensors", name="xresnet18", arguments={}, **STATS)
    rewritten(tmp_path/"a.safetensors", arguments='{"widen": 4096.0, "act_cls": "Mish"}')
    with pytest.raises(WeightsError, match="another shape"): models.load(tmp_path/"a.safetensors")


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(MissingInputError): models.load(tmp_path/"none.safetensors")
    models.save(MODELS["deconv3"](), tmp_path/"a.safetensors", name="deconv3", arguments={}, **STATS)
    whole = (tmp_path/"a.safetensors").read_bytes()
    for damage in (whole[:1000], whole[:-10], b"", b"\xff"*100, b"PK\x03\x04"):
        (tmp_path/"a.safetensors").write_bytes(damage)
        with pytest.raises(DamagedFileError): models.load(tmp_path/"a.safetensors")


@pytest.mark.parametrize("bad", (dict(image_stats=([0]*4, [1]*4)), dict(image_stats=([0]*5, [0]*5)), dict(target_stats=None), dict(channels="gri"),
                                 dict(channels="ggggg"), dict(channels="abcde"), dict(channels=["g", "r", "i", "z", 5]), dict(provenance=["a"]),
                                 dict(arguments={"c_in": "x"}), dict(arguments={"stem_szs": 32}), dict(provenance={"a": object()}),
                                 dict(arguments={"act_cls": "Sigmoid"}), dict(arguments={"c": 1}), dict(name="resnet")))
def test_what_cannot_be_saved(bad, tmp_path):
    with pytest.raises(InvalidInputError):
        models.save(MODELS["xresnet18"](), tmp_path/"a.safetensors", **(dict(name="xresnet18", arguments={}, **STATS) | bad))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ("xresnet18", "xresnet18_hybrid"))
def test_autocast(name):
    model, x = fill(MODELS[name](**ARGUMENTS)), x_of(303, (2, 5, 64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        y.float().square().sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())
    assert error(y.float(), fill(MODELS[name](**ARGUMENTS))(x)) < 0.1


def learner(model, folder):
    "A fastai learner around a model, with an optimizer that has taken a step."
    from fastai.basics import DataLoaders, Learner
    learn = Learner(DataLoaders([], []), model, loss_func=nn.functional.mse_loss, path=folder, model_dir="")
    learn.create_opt()
    model(x_of(303, (2, 5, 32, 32))).sum().backward()
    learn.opt.hypers[0]["lr"] = np.float64(1e-3)  # as schedules leave it
    learn.opt.step()
    return learn

COUNTS, TARGET_STATS = x_of(304, (128, 5, 32, 32))*torch.arange(1, 6)[:, None, None], (np.arange(6), np.full(6, 2.))


@pytest.mark.parametrize("with_opt", (True, False))
@pytest.mark.parametrize("name", ("conv3", "deconv3", *PUBLISHED))
def test_published_weights_are_recognised_and_used(name, with_opt, tmp_path):
    model = MODELS[name]()
    learner(model, tmp_path).save("weights", with_opt=with_opt)
    published = models.load_published(tmp_path/"weights.pth", models.image_stats(COUNTS), TARGET_STATS)
    assert published.name == name and published.channels == "yzirg" and not published.model.training
    yzirg = COUNTS[:, [4, 3, 2, 1, 0]]
    std, mean = torch.std_mean(yzirg, dim=(0, 2, 3), keepdim=True)
    with torch.no_grad(): expected = model.eval()((yzirg - mean)/std)*2 + torch.arange(6)
    assert error(published.predict(COUNTS), expected) < 1e-4
    assert torch.equal(published.in_channel_order(COUNTS), yzirg)
    models.save(published.model, tmp_path/"ours.safetensors", name=name, arguments=published.arguments, image_stats=published.image_stats,
        target_stats=published.target_stats, channels=published.channels, provenance=published.provenance)
    assert np.array_equal(models.load(tmp_path/"ours.safetensors").predict(COUNTS), published.predict(COUNTS))


@pytest.mark.parametrize("device", ("cuda:99", "no such device"))
def test_a_device_that_is_not_there(device, tmp_path):
    models.save(conv3(), tmp_path/"a.safetensors", name="conv3", arguments={}, **STATS)
    with pytest.raises(InvalidInputError, match=f"device '{device}' cannot be used"): models.load(tmp_path/"a.safetensors", device)


def test_predictions_by_batches_and_of_images_that_are_none():
    trained = models.TrainedModel(after_a_step("conv3")[0], "conv3", {}, models.image_stats(COUNTS), models._stats(TARGET_STATS, 6, ""), "yzirg", {})
    whole = trained.predict(COUNTS)
    assert whole.shape == (128, 6) and whole.dtype == np.float32 and trained.predict(COUNTS[:0]).shape == (0, 6)
    np.testing.assert_allclose(trained.predict(COUNTS.numpy(), batch_size=50), whole, rtol=1e-5, atol=1e-5)
    for images, message in ((COUNTS[:, :4], "shape"), (torch.cat([COUNTS, COUNTS[:, :1]], 1), "shape"), (COUNTS[0], "shape"),
            (COUNTS.log(), "NaN"), ("images", "no array"), (None, "shape")):
        with pytest.raises(InvalidInputError, match=message): trained.predict(images)


def test_arguments_are_told_alike_by_all_files(tmp_path):
    torch.save(xresnet18().state_dict(), tmp_path/"weights.pth")
    published = models.load_published(tmp_path/"weights.pth", models.image_stats(COUNTS), TARGET_STATS)
    models.save(published.model, tmp_path/"a.safetensors", name="xresnet18", arguments=published.arguments, **STATS)
    assert json.loads(json.dumps(published.arguments)) == models.load(tmp_path/"a.safetensors").arguments and published.arguments["act_cls"] == "Mish"
    with pytest.raises(InvalidInputError, match="c_in"): models.load_published(tmp_path/"weights.pth", models.image_stats(COUNTS), TARGET_STATS, c_in="x")
    with pytest.raises(InvalidInputError, match="3 different bands"):
        models.load_published(tmp_path/"weights.pth", models.image_stats(COUNTS), TARGET_STATS, c_in=3)
    for channels in ("ggggg", "grizx", "gri"):
        with pytest.raises(InvalidInputError, match="5 different bands"): models.image_stats(COUNTS, channels)


def test_bare_and_old_weights_files_are_read(tmp_path):
    torch.save(conv3().state_dict(), tmp_path/"bare.pth", _use_new_zipfile_serialization=False)
    assert models.load_published(tmp_path/"bare.pth", models.image_stats(COUNTS), TARGET_STATS).name == "conv3"
    torch.save(xresnet18(act_cls=nn.ReLU, sa=False).state_dict(), tmp_path/"relu.pth")
    assert models.load_published(tmp_path/"relu.pth", models.image_stats(COUNTS), TARGET_STATS, act_cls="ReLU", sa=False).name == "xresnet18"


def test_published_weights_need_statistics(tmp_path):
    torch.save(conv3().state_dict(), tmp_path/"weights.pth")
    with pytest.raises(InvalidInputError, match="image_stats.*128 cutouts.*target_stats"):
        models.load_published(tmp_path/"weights.pth", image_stats=models.image_stats(COUNTS))
    with pytest.raises(InvalidInputError, match="128 cutouts"): models.image_stats(COUNTS[:127])
    with pytest.raises(InvalidInputError, match="128 cutouts"): models.image_stats(COUNTS[:, :4])
    with pytest.raises(InvalidInputError, match="NaN"): models.image_stats(COUNTS.log())


class Malicious:
    def __init__(self, command): self.command = command
    def __reduce__(self): return __import__("os").system, (self.command,)


@pytest.mark.parametrize("zipped", (True, False))
def test_a_malicious_weights_file_is_refused_and_does_nothing(tmp_path, zipped):
    marker = tmp_path/"marker"
    torch.save({"model": conv3().state_dict(), "opt": Malicious(f"touch {marker}")}, tmp_path/"weights.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="system"): models.load_published(tmp_path/"weights.pth", models.image_stats(COUNTS), TARGET_STATS)
    assert not marker.exists()


def test_published_weights_that_do_not_fit(tmp_path):
    path, stats = tmp_path/"weights.pth", models.image_stats(COUNTS)
    torch.save(conv3().state_dict(), path)
    with pytest.raises(WeightsError, match="missing: 0.0.bias, 0.0.running_mean"): models.load_published(path, stats, TARGET_STATS, name="deconv3")
    torch.save(xresnet18(n_out=7).state_dict(), path)
    with pytest.raises(WeightsError, match=r"11.weight \(7, 512\), not \(6, 512\)"): models.load_published(path, stats, TARGET_STATS)
    with pytest.raises(InvalidInputError, match="dropout"): models.load_published(path, stats, TARGET_STATS, dropout=1)
    torch.save(conv3(), path)
    with pytest.raises(WeightsError, match="not weights alone"): models.load_published(path, stats, TARGET_STATS)
    torch.save([1, 2], path)
    with pytest.raises(WeightsError, match="no weights by name"): models.load_published(path, stats, TARGET_STATS)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DamagedFileError): models.load_published(path, stats, TARGET_STATS)
    with pytest.raises(MissingInputError): models.load_published(tmp_path/"nothing.pth", stats, TARGET_STATS)


def test_stretched_models_are_not_fed_linear_images(tmp_path):
    models.save(conv3(), tmp_path/"w.safetensors", name="conv3", arguments={}, image_stats=(np.zeros(5), np.ones(5)),
        target_stats=TARGET_STATS, provenance=dict(stretch="asinh"))
    with pytest.raises(InvalidInputError, match="asinh"): models.load(tmp_path/"w.safetensors").predict(COUNTS)
