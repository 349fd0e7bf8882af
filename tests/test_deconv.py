"""The deconvolution layers equal the published ones, and their formula read literally."""
import itertools
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import unfold

sys.path[:0] = [str(Path(__file__).parent)]
from published_cases import cases, error, fill, x_of  # noqa: E402

from specpred.config import InvalidInputError, SpecpredError  # noqa: E402
from specpred.deconv import ChannelDeconv, Delinear, FastDeconv, inverse_square_root  # noqa: E402

# one of each kind, and the shape of its input
LAYERS = {
    "first layer": (lambda: FastDeconv(5, 8, 3, stride=2, padding=1), (4, 5, 24, 24)),
    "pointwise": (lambda: FastDeconv(8, 6, 1), (4, 8, 16, 16)),
    "groups": (lambda: FastDeconv(8, 8, 3, groups=4), (4, 8, 24, 24)),
    "blocks": (lambda: FastDeconv(12, 4, 3, padding=1, block=4), (4, 12, 24, 24)),
    "freezing": (lambda: FastDeconv(5, 8, 3, freeze=True), (4, 5, 24, 24)),
    "channels": (lambda: ChannelDeconv(4), (4, 10, 24, 24)),
    "vectors": (lambda: ChannelDeconv(4), (64, 10)),
    "linear": (lambda: Delinear(24, 10, block=8), (64, 24))}
LAYER_OF_EACH_CLASS = ("first layer", "pointwise", "channels", "linear")


def training_step(layer, x, seed, run=None):
    "Output, gradients and buffers of one training step; `run` may be a compiled form of the layer."
    x = x.requires_grad_()
    y = (layer if run is None else run)(x)
    (y.float()*x_of(seed, y.shape, corr=False)).sum().backward()
    gradients = {f"grad_{name}": p.grad for name, p in layer.named_parameters()}
    return {"train": y, "grad_x": x.grad, **gradients, **dict(layer.named_buffers())}


def compare(results, arrays, prefix, tolerance=1e-4):
    "Every published array is compared; the tolerance is relative, in norm."
    expected = [key.removeprefix(prefix) for key in arrays if key.startswith(prefix)]
    assert expected
    for key in expected: assert error(results[key], arrays[prefix + key]) < tolerance, key


@pytest.mark.parametrize("i", range(5))
def test_fastdeconv_equals_the_published_layer(i):
    arrays, seed, configs = cases("fastdeconv")
    arguments = dict(configs[i])
    x = x_of(seed + 10*i, arguments.pop("shape"))
    layer = fill(FastDeconv(**arguments)).eval()
    results = {"eval": layer(x), **training_step(layer.train(), x, seed + 10*i + 1)}
    compare(results | {"eval_after": layer.eval()(x)}, arrays, f"{i}/")


@pytest.mark.parametrize("i", range(2))
def test_delinear_equals_the_published_layer(i):
    arrays, seed, configs = cases("delinear_channel", "delinear")
    arguments, shape = configs[i]
    layer, x = fill(Delinear(**arguments)), x_of(seed + 10*i, shape, corr=False) + 0.5
    results = training_step(layer, x, seed + 10*i + 1)
    compare(results | {"eval_after": layer.eval()(x)}, arrays, f"delinear{i}/")


@pytest.mark.parametrize("i", range(2))
def test_channeldeconv_equals_the_published_layer(i):
    arrays, seed, configs = cases("delinear_channel", "channel")
    arguments, shape = configs[i]
    layer, x = ChannelDeconv(**arguments), x_of(seed + 500 + 10*i, shape) + 0.2
    results = training_step(layer, x, seed + 500 + 10*i + 1)
    compare(results | {"eval_after": layer.eval()(x)}, arrays, f"channel{i}/")


def published_inverse_square_root(cov, n_iter):
    "Fifteen products, differentiated by autograd."
    norm = torch.linalg.matrix_norm(cov, keepdim=True)
    identity = torch.eye(cov.shape[-1], dtype=cov.dtype)
    Y, Z = cov/norm, identity
    for _ in range(n_iter):
        T = 0.5*(3*identity - Z @ Y)
        Y, Z = Y @ T, T @ Z
    return Z/norm.sqrt()


def formula(layer, x):
    "W C^(-1/2) (x - mean) + b in training: each patch is whitened, then multiplied by the weights."
    geometry = layer.kernel_size, layer.dilation, layer.padding
    stride = [layer.sampling_stride*s for s in layer.stride]
    shape = layer.groups, layer.num_features, layer.in_channels//(layer.groups*layer.block)
    if layer.kernel_size == (1, 1): sample = x.transpose(0, 1).flatten(1)[:, ::stride[0]*stride[1]]
    else: sample = unfold(x, *geometry, stride).transpose(0, 1)
    sample = sample.reshape(*shape[:2], -1)
    mean = sample.mean(2, keepdim=True)
    cov = torch.einsum("gfm,gkm->gfk", sample - mean, sample - mean)/sample.shape[2]
    cov = cov + layer.eps*torch.eye(shape[1], dtype=x.dtype)
    deconv = published_inverse_square_root(cov, layer.n_iter)
    patches = unfold(x, *geometry, layer.stride).unflatten(1, shape) - mean[..., None]
    whitened = torch.einsum("gkf,ngfbl->ngkbl", deconv, patches)
    weight = layer.weight.view(shape[0], -1, *shape[1:])
    y = torch.einsum("gokb,ngkbl->ngol", weight, whitened).flatten(1, 2)
    return y if layer.bias is None else y + layer.bias[:, None]


def compare_with_formula(x, **arguments):
    layer, x = fill(FastDeconv(**arguments)).double(), x.double().requires_grad_()
    inputs = x, *layer.parameters()
    y = formula(layer, x)
    weights = x_of(7, y.shape, corr=False).double()
    expected = [y, *torch.autograd.grad((y*weights).sum(), inputs)]
    y = layer(x).flatten(2)
    results = [y, *torch.autograd.grad((y*weights).sum(), inputs)]
    for value, same in zip(results, expected, strict=True): assert error(value, same) < 1e-9


@pytest.mark.parametrize("kernel_size,stride,dilation", [
    (1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 1, 2), (3, 2, 1), (5, 2, 2), ((3, 5), (2, 1), (1, 2))])
@pytest.mark.parametrize("groups,block", ((1, 64), (1, 4), (2, 64), (8, 64)))
def test_every_geometry(kernel_size, stride, dilation, groups, block):
    compare_with_formula(x_of(1, (2, 8, 21, 26)), in_channels=8, out_channels=16, stride=stride,
        kernel_size=kernel_size, padding=1, dilation=dilation, groups=groups, block=block)


@pytest.mark.parametrize("sampling_stride,padding,bias",
    [*itertools.product((1, 2, 4), (0, (4, 1)), (True, False))])
def test_sampling_padding_and_bias(sampling_stride, padding, bias):
    compare_with_formula(x_of(2, (3, 6, 17, 11)), in_channels=6, out_channels=4, kernel_size=3,
        padding=padding, sampling_stride=sampling_stride, bias=bias, n_iter=7, eps=1e-2)


def test_many_steps_whiten_exactly():
    layer, x = FastDeconv(3, 27, 3, n_iter=60, sampling_stride=1).double(), x_of(8, (4, 3, 40, 33))
    nn.init.eye_(layer.weight.data.view(27, 27))
    features = layer(x.double()).transpose(0, 1).flatten(1)
    assert error(torch.cov(features, correction=0), torch.eye(27)) < 1e-3


@pytest.mark.parametrize("dtype,tolerance", ((torch.float64, 1e-12), (torch.float32, 1e-4)))
@pytest.mark.parametrize("n_iter", (1, 2, 5, 12))
def test_inverse_square_root_is_the_published_iteration(dtype, tolerance, n_iter):
    X = x_of(5, (3, 40, 500)).double()
    cov = (X @ X.mT/500 + 1e-5*torch.eye(40)).to(dtype).requires_grad_()
    expected = published_inverse_square_root(cov, n_iter)
    G = x_of(6, cov.shape).to(dtype)
    published, = torch.autograd.grad((expected*G).sum(), cov)
    ours, = torch.autograd.grad((inverse_square_root(cov, n_iter)*G).sum(), cov)
    assert error(inverse_square_root(cov, n_iter), expected) < tolerance
    assert error(inverse_square_root(cov[0], n_iter), expected[0]) < tolerance
    assert error((ours + ours.mT)/2, (published + published.mT)/2) < tolerance


def same_step(results, expected, tolerance):
    errors = {key: error(results[key], value) for key, value in expected.items() if value.any()}
    return max(errors.values()) < tolerance


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_takes_statistics_in_float32(name):
    "The same step as plainly in float32, also for images in bfloat16."
    build, shape = LAYERS[name]
    expected = training_step(fill(build()), x_of(9, shape), 10)
    for x in x_of(9, shape), x_of(9, shape).bfloat16():
        with torch.autocast("cpu", torch.bfloat16):
            results = training_step(fill(build()), x, 10)
        assert same_step(results, expected, 0.03)
        assert results["running_deconv"].dtype == torch.float32
        if x.dtype == torch.float32:
            assert error(results["running_deconv"], expected["running_deconv"]) < 1e-5


def compiled(layer):
    "One graph without breaks."
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_can_be_halved(name):
    build, shape = LAYERS[name]
    layer, x = fill(build()), x_of(11, shape)
    layer(x)
    expected = layer.eval()(x)
    y = layer.train().bfloat16()(x.bfloat16())
    assert y.dtype == layer.running_deconv.dtype == torch.bfloat16
    assert error(layer.eval()(x.bfloat16()).float(), expected) < 0.1


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))),
    reason="torch.compile needs a C++ compiler on a CPU")
def test_generated_code():
    layers = [fill(FastDeconv(5, 8, 3, padding=1, n_iter=2)) for _ in range(2)]
    torch._dynamo.reset()
    run, x = torch.compile(layers[1], fullgraph=True), x_of(14, (2, 5, 24, 24))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert error(run(x), layers[0](x)) < 0.01
    assert error(layers[1].running_deconv, layers[0].running_deconv) < 1e-4


def test_compiled_layers_average_nothing_that_is_not_finite():
    layer = nn.Sequential(FastDeconv(5, 8, 3), ChannelDeconv(3), nn.Flatten(), Delinear(288, 2))
    run, x = compiled(layer), x_of(16, (9, 5, 8, 8))
    run(x)
    before = {key: value.clone() for key, value in layer.state_dict().items() if "running" in key}
    for damaged in x*float("nan"), x*1e20:
        run(damaged)
        assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())


def test_freeze_stops_the_statistics():
    layer, means = FastDeconv(5, 8, 3, freeze=True, freeze_iter=2), []
    for step in range(5):
        layer(x_of(step, (2, 5, 16, 16)))
        means.append(layer.running_mean.clone())
    assert not torch.equal(means[1], means[2])
    assert torch.equal(means[2], means[3])
    assert torch.equal(means[3], means[4])
    x = x_of(9, (2, 5, 16, 16))
    assert error(layer(x), layer.eval()(x)) < 1e-6
    with pytest.raises(InvalidInputError, match="2560 NaN"): layer.train()(x*float("nan"))
    assert "counter" not in layer.state_dict()


def test_a_freezing_layer_is_compiled_once():
    layers = [fill(FastDeconv(5, 8, 3, freeze=True, freeze_iter=3)) for _ in range(2)]
    graphs = []
    torch._dynamo.reset()
    run = torch.compile(layers[1], backend=lambda graph, _: graphs.append(1) or graph.forward,
        fullgraph=True)
    for step in range(35):  # frozen from the fifth step to the thirtieth
        x = x_of(step, (2, 5, 8, 8))
        assert error(run(x), layers[0](x)) < 1e-5
        assert torch.equal(layers[0].running_deconv, layers[1].running_deconv)
    assert len(graphs) == 1


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("name", LAYER_OF_EACH_CLASS)
def test_nan_in_training_is_an_error_that_names_the_layer(name, bad):
    build, shape = LAYERS[name]
    layer = build()
    layer.name = "stem.0"
    layer(x_of(0, shape))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for site in (0,)*len(shape), tuple(n - 1 for n in shape), (1, *(n//2 for n in shape[1:])):
        x = x_of(0, shape)
        x[site] = bad
        with pytest.raises(InvalidInputError, match="'stem.0': the input holds 1 NaN or infinite"):
            layer.train()(x)
        assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())
        finite = layer.eval()(x).isfinite().flatten(1).all(1)  # a NaN stays in its own image
        assert finite.sum() == shape[0] - 1 and not finite[site[0]]


@pytest.mark.parametrize("scale", (1e17, 1e20, 1e36))
@pytest.mark.parametrize("name", LAYER_OF_EACH_CLASS)
def test_a_covariance_that_overflows_is_not_averaged_in(name, scale):
    build, shape = LAYERS[name]
    layer = build()
    layer(x_of(0, shape))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(InvalidInputError, match="covariance overflows: the values of the input"):
        layer(x_of(0, shape)*scale)
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", LAYER_OF_EACH_CLASS)
def test_integers_are_refused(name, training):
    build, shape = LAYERS[name]
    with pytest.raises(InvalidInputError, match="floating-point numbers, got torch.int32"):
        build().train(training)(torch.ones(shape, dtype=torch.int32))


def test_a_layer_without_a_name_is_described():
    with pytest.raises(InvalidInputError, match=r"FastDeconv\(5, 8, kernel_size=\(3, 3\).*block=5"):
        FastDeconv(5, 8, 3)(torch.full((1, 5, 8, 8), float("nan")))


@pytest.mark.parametrize("bad,message", (
    (lambda: FastDeconv(5, 8, 3)(torch.zeros(2, 4, 16, 16)), r"images \(N, 5, H, W\)"),
    (lambda: FastDeconv(5, 8, 3)(torch.zeros(5, 16, 16)), r"images \(N, 5, H, W\)"),
    (lambda: FastDeconv(5, 8, 7)(torch.zeros(2, 5, 6, 16)), "at least 7 × 7 pixels"),
    (lambda: FastDeconv(5, 8, 3, 1, 1, 4)(torch.zeros(2, 5, 16, 6)), "at least 7 × 7 pixels"),
    (lambda: FastDeconv(5, 8, 3)(torch.zeros(0, 5, 16, 16)), "empty batch"),
    (lambda: ChannelDeconv(8)(torch.zeros(2, 5, 4, 4)), "C ≥ 8"),
    (lambda: ChannelDeconv(4)(torch.zeros(2, 5, 4)), "C ≥ 4"),
    (lambda: Delinear(8, 3)(torch.zeros(2, 7)), r"\(…, 8\)"),
    (lambda: inverse_square_root(torch.zeros(3, 4)), "square matrices")))
def test_bad_input_is_an_error_of_ours(bad, message):
    with pytest.raises(SpecpredError, match=message): bad()


@pytest.mark.parametrize("arguments", (
    dict(groups=2), dict(in_channels=4, out_channels=7, groups=2), dict(block=0), dict(n_iter=0),
    dict(eps=-1), dict(eps=None), dict(eps=float("inf")), dict(momentum=float("nan")),
    dict(momentum=5), dict(sampling_stride=0), dict(kernel_size=0), dict(kernel_size=(3,)),
    dict(kernel_size=(3, 3, 3)), dict(stride=(1, 2, 3)), dict(padding=-1), dict(padding="same")))
def test_bad_arguments_are_an_error_that_names_them(arguments):
    with pytest.raises(InvalidInputError, match=f"{list(arguments)[-1]}="):
        FastDeconv(**dict(in_channels=5, out_channels=8, kernel_size=3) | arguments)


def test_a_block_that_does_not_divide_the_channels_becomes_their_common_divisor():
    with pytest.warns(UserWarning, match="no common divisor"):
        assert FastDeconv(5, 10, 3, block=3).block == 1
    with pytest.warns(UserWarning, match="no common divisor"):
        assert Delinear(5, 10, block=3).block == 1
    assert FastDeconv(8, 8, [3, 3], groups=2, block=2).block == 4  # groups decide
    assert FastDeconv(96, 8, 3).block == 32
    assert FastDeconv(48, 8, 3).block == 48
    assert Delinear(96, 8, block=64).block == 32
