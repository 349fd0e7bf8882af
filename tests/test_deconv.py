"""The deconvolution layers equal the published ones, and the plain autograd form where there are no published arrays."""
import itertools, shutil, sys
from pathlib import Path
import pytest, torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent/"benchmarks")]
from published_cases import cases, error, fill, x_of
from plain_deconv import PlainDeconv
from specpred.config import InvalidInputError, SpecpredError
from specpred.deconv import ChannelDeconv, Delinear, FastDeconv, inverse_square_root

TOLERANCE = 1e-4  # relative, in norm


@pytest.mark.parametrize("i", range(len(cases("fastdeconv")[2])))
def test_fastdeconv_equals_the_published_layer(i):
    arrays, seed, configs = cases("fastdeconv")
    arguments = dict(configs[i])
    x = x_of(seed + 10*i, arguments.pop("shape")).requires_grad_()
    layer = fill(FastDeconv(**arguments)).eval()
    got = {"eval": layer(x)}
    got["train"] = layer.train()(x)
    (got["train"]*x_of(seed + 10*i + 1, got["train"].shape, corr=False)).sum().backward()
    got |= {"grad_x": x.grad, "grad_weight": layer.weight.grad, "grad_bias": layer.bias.grad}
    got |= {"running_mean": layer.running_mean, "running_deconv": layer.running_deconv, "eval_after": layer.eval()(x)}
    assert {key.split("/")[1] for key in arrays if key.startswith(f"{i}/")} == set(got)
    for key, value in got.items(): assert error(value, arrays[f"{i}/{key}"]) < TOLERANCE, key


@pytest.mark.parametrize("i", range(len(cases("delinear_channel", "delinear")[2])))
def test_delinear_equals_the_published_layer(i):
    arrays, seed, configs = cases("delinear_channel", "delinear")
    x = (x_of(seed + 10*i, configs[i][1], corr=False) + 0.5).requires_grad_()
    layer = fill(Delinear(**configs[i][0])).train()
    y = layer(x)
    (y*x_of(seed + 10*i + 1, y.shape, corr=False)).sum().backward()
    got = {"train": y, "grad_x": x.grad, "grad_weight": layer.weight.grad, "grad_bias": layer.bias.grad, "eval_after": layer.eval()(x)}
    for key, value in got.items(): assert error(value, arrays[f"delinear{i}/{key}"]) < TOLERANCE, key


@pytest.mark.parametrize("i", range(len(cases("delinear_channel", "channel")[2])))
def test_channeldeconv_equals_the_published_layer(i):
    arrays, seed, configs = cases("delinear_channel", "channel")
    x = (x_of(seed + 500 + 10*i, configs[i][1]) + 0.2).requires_grad_()
    layer = ChannelDeconv(**configs[i][0]).train()
    y = layer(x)
    (y*x_of(seed + 500 + 10*i + 1, y.shape, corr=False)).sum().backward()
    got = {"train": y, "grad_x": x.grad, "eval_after": layer.eval()(x), "running_deconv": layer.running_deconv}
    for key, value in got.items(): assert error(value, arrays[f"channel{i}/{key}"]) < TOLERANCE, key


def compare_with_plain(x, **arguments):
    "Forward in both modes, all gradients and both buffers of two training steps, against the plain autograd form."
    layers = [fill(kind(**arguments)).double() for kind in (PlainDeconv, FastDeconv)]
    results = []
    for layer in layers:
        image = x.double().requires_grad_()
        outputs = []
        for training in (False, True, True):
            outputs.append(layer.train(training)(image))
            (outputs[-1]*x_of(7, outputs[-1].shape, corr=False)).sum().backward()
        results.append([*outputs, image.grad, *(p.grad for p in layer.parameters()), layer.running_mean, layer.running_deconv, layer.eval()(image)])
    for plain, ours in zip(*results, strict=True): assert error(ours, plain) < 1e-9


@pytest.mark.parametrize("kernel_size,stride,dilation", [*itertools.product((1, 3, 5), (1, 2), (1, 2))])
@pytest.mark.parametrize("groups,block", ((1, 64), (1, 4), (1, 5), (2, 64), (8, 64)))
def test_every_geometry(kernel_size, stride, dilation, groups, block):
    compare_with_plain(x_of(1, (2, 8, 21, 26)), in_channels=8, out_channels=16, kernel_size=kernel_size, stride=stride,
                       padding=kernel_size//2, dilation=dilation, groups=groups, block=block)


@pytest.mark.parametrize("sampling_stride,padding,bias", [*itertools.product((1, 2, 3, 4), (0, 1, 4), (True, False))])
def test_sampling_padding_and_bias(sampling_stride, padding, bias):
    compare_with_plain(x_of(2, (3, 6, 17, 11)), in_channels=6, out_channels=4, kernel_size=3, padding=padding,
                       sampling_stride=sampling_stride, bias=bias, n_iter=7, eps=1e-2, momentum=0.3)


def test_large_blocks():
    "More features than the threshold below which the covariance is multiplied out whole."
    compare_with_plain(x_of(3, (2, 24, 30, 30)), in_channels=24, out_channels=8, kernel_size=3, padding=1)


def test_published_layer_without_bias_is_corrected_by_the_mean():
    layer, same = FastDeconv(5, 8, 3, bias=False), FastDeconv(5, 8, 3)
    same.load_state_dict(layer.state_dict() | {"bias": torch.zeros(8)})
    x = x_of(4, (2, 5, 16, 16)) + 10
    assert error(layer(x), same(x)) < 1e-6 and error(layer.eval()(x), same.eval()(x)) < 1e-6


@pytest.mark.parametrize("dtype,tolerance", ((torch.float64, 1e-12), (torch.float32, 1e-4)))
@pytest.mark.parametrize("n_iter", (1, 2, 5, 12))
def test_inverse_square_root_is_the_coupled_iteration(dtype, tolerance, n_iter):
    X = x_of(5, (3, 40, 500)).double()
    cov = (X @ X.mT/500 + 1e-5*torch.eye(40)).to(dtype).requires_grad_()
    norm = cov.flatten(1).norm(dim=1)[:, None, None]
    Y, Z, I = cov/norm, torch.eye(40, dtype=dtype).expand(3, 40, 40), torch.eye(40, dtype=dtype)
    for _ in range(n_iter):
        T = 0.5*(3*I - Z @ Y)
        Y, Z = Y @ T, T @ Z
    G = x_of(6, cov.shape).to(dtype)
    plain, = torch.autograd.grad((Z/norm.sqrt()*G).sum(), cov)
    ours, = torch.autograd.grad((inverse_square_root(cov, n_iter)*G).sum(), cov)
    assert error(inverse_square_root(cov, n_iter), Z/norm.sqrt()) < tolerance
    assert error(inverse_square_root(cov.mT, n_iter), Z/norm.sqrt()) < tolerance  # a view that is not contiguous
    assert error((ours + ours.mT)/2, (plain + plain.mT)/2) < tolerance


def test_rectangular_kernels_strides_and_padding():
    "What the published layer cannot do: the output in training is that of whitened patches."
    x = x_of(8, (4, 3, 40, 33)).double()
    layer = FastDeconv(3, 4, (3, 5), stride=(2, 1), padding=(0, 2), n_iter=60, sampling_stride=1).double()
    y = layer(x)
    X = nn.functional.unfold(x, (3, 5), padding=(0, 2), stride=(2, 1))
    X = X - X.mean((0, 2), keepdim=True)
    flat = X.transpose(0, 1).flatten(1)
    D = torch.linalg.eigh(flat @ flat.T/flat.shape[1] + 1e-5*torch.eye(45, dtype=x.dtype))
    whitened = (D.eigenvectors @ torch.diag(D.eigenvalues**-0.5) @ D.eigenvectors.T) @ X
    assert error(y, (layer.weight.flatten(1) @ whitened).view_as(y) + layer.bias[:, None, None]) < 1e-6


def test_freeze_stops_the_statistics():
    layer = FastDeconv(5, 8, 3, freeze=True, freeze_iter=2)
    seen = []
    for step in range(5):
        layer(x_of(step, (2, 5, 16, 16)))
        seen.append(layer.running_mean.clone())
    assert not torch.equal(seen[1], seen[2]) and torch.equal(seen[2], seen[3]) and torch.equal(seen[3], seen[4])
    x = x_of(9, (2, 5, 16, 16))
    assert error(layer(x), layer.eval()(x)) < 1e-6
    with pytest.raises(InvalidInputError, match="2560 NaN"): layer.train()(x*float("nan"))
    assert "counter" not in layer.state_dict()


def test_a_freezing_layer_is_compiled_once():
    layers, graphs = [fill(FastDeconv(5, 8, 3, padding=1, freeze=True, freeze_iter=3)) for _ in range(2)], []
    torch._dynamo.reset()
    compiled = torch.compile(layers[1], backend=lambda graph, inputs: graphs.append(1) or graph.forward, fullgraph=True)
    for step in range(35):  # frozen from the fifth step to the thirtieth
        x = x_of(step, (2, 5, 8, 8))
        assert error(compiled(x), layers[0](x)) < 1e-5
        assert torch.equal(layers[0].running_deconv, layers[1].running_deconv)
    assert len(graphs) == 1


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("layer,shape,sites", (
    (FastDeconv(5, 8, 3, stride=2, padding=1), (2, 5, 16, 16), ((0, 0, 0, 0), (1, 4, 15, 15), (0, 2, 4, 5))),
    (FastDeconv(5, 8, 1), (2, 5, 16, 16), ((0, 0, 0, 0), (1, 2, 3, 4))),
    (ChannelDeconv(2), (2, 5, 16, 16), ((0, 0, 0, 0), (1, 4, 3, 4))),
    (Delinear(8, 3), (6, 8), ((0, 0), (5, 7)))))
def test_nan_in_training_is_an_error_that_names_the_layer(layer, shape, sites, bad):
    layer.name = "stem.0"
    layer.train()(x_of(0, shape))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for site in sites:
        x = x_of(0, shape)
        x[site] = bad
        with pytest.raises(InvalidInputError, match=rf"{type(layer).__name__} 'stem.0': the input holds 1 NaN or infinite"): layer(x)
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items() if key != "num_batches_tracked")
    finite = layer.eval()(x).isfinite().flatten(1).all(1)  # in evaluation a NaN stays in its own image
    assert finite.tolist() == [row != site[0] for row in range(shape[0])]


@pytest.mark.parametrize("scale", (1e17, 1e20, 1e36))
@pytest.mark.parametrize("layer,shape", ((FastDeconv(5, 8, 3), (2, 5, 16, 16)), (FastDeconv(5, 8, 1), (2, 5, 16, 16)),
    (ChannelDeconv(2), (2, 5, 16, 16)), (Delinear(8, 3), (6, 8))))
def test_a_covariance_that_overflows_is_not_averaged_in(layer, shape, scale):
    layer.train()(x_of(0, shape))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(InvalidInputError, match="no covariance in torch.float32: its values reach"): layer(x_of(0, shape)*scale)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("layer,shape", ((FastDeconv(5, 8, 3), (2, 5, 16, 16)), (ChannelDeconv(2), (2, 5, 16, 16)), (Delinear(8, 3), (6, 8))))
@pytest.mark.parametrize("training", (True, False))
def test_integers_are_refused(layer, shape, training):
    with pytest.raises(InvalidInputError, match="floating-point numbers, got torch.int32"): layer.train(training)(torch.ones(shape, dtype=torch.int32))


def test_a_layer_without_a_name_is_told_by_its_shape():
    with pytest.raises(InvalidInputError, match=r"FastDeconv\(5, 8, kernel_size=\(3, 3\)"):
        FastDeconv(5, 8, 3)(torch.full((1, 5, 8, 8), float("nan")))


@pytest.mark.parametrize("make", (
    lambda: FastDeconv(5, 8, 3)(torch.zeros(2, 4, 16, 16)), lambda: FastDeconv(5, 8, 3)(torch.zeros(5, 16, 16)),
    lambda: FastDeconv(5, 8, 7)(torch.zeros(2, 5, 6, 16)), lambda: FastDeconv(5, 8, 3, dilation=4, padding=1)(torch.zeros(2, 5, 16, 6)),
    lambda: FastDeconv(5, 8, 3, groups=2), lambda: FastDeconv(4, 7, 3, groups=2), lambda: FastDeconv(4, 8, 3, block=0),
    lambda: FastDeconv(4, 8, 3, n_iter=0), lambda: FastDeconv(4, 8, 3, eps=-1), lambda: FastDeconv(4, 8, 3, sampling_stride=0),
    lambda: ChannelDeconv(8)(torch.zeros(2, 5, 4, 4)), lambda: ChannelDeconv(4)(torch.zeros(2, 5, 4)), lambda: ChannelDeconv(0),
    lambda: Delinear(8, 3)(torch.zeros(2, 7)), lambda: Delinear(8, 3, block=0), lambda: inverse_square_root(torch.zeros(3, 4)),
    lambda: FastDeconv(5, 8, 3)(torch.zeros(0, 5, 16, 16)), lambda: FastDeconv(5, 8, 3, padding="same"), lambda: FastDeconv(5, 8, 0),
    lambda: FastDeconv(5, 8, (3,)), lambda: FastDeconv(5, 8, (3, 3, 3)), lambda: FastDeconv(5, 8, 3, stride=(1, 2, 3)),
    lambda: FastDeconv(5, 8, 3, padding=-1), lambda: FastDeconv(5, 8, 3, eps=None), lambda: FastDeconv(5, 8, 3, eps=float("inf")),
    lambda: FastDeconv(5, 8, 3, momentum=float("nan")), lambda: Delinear(5, 8, momentum=5)))
def test_bad_input_is_an_error_of_ours(make):
    with pytest.raises(SpecpredError): make()


def test_a_block_that_does_not_divide_the_channels_becomes_their_common_divisor():
    with pytest.warns(UserWarning, match="no common divisor"): assert FastDeconv(5, 10, 3, block=3).block == 1
    with pytest.warns(UserWarning, match="no common divisor"): assert Delinear(5, 10, block=3).block == 1
    assert FastDeconv(8, 8, [3, 3], groups=2, block=2).block == 4  # groups decide
    assert FastDeconv(96, 8, 3).block == 32 and FastDeconv(48, 8, 3).block == 48 and Delinear(96, 8, block=64).block == 32


@pytest.mark.parametrize("layer,shape", ((FastDeconv(5, 8, 3, padding=1), (4, 5, 32, 32)), (FastDeconv(8, 8, 3, groups=4), (4, 8, 32, 32)),
                                         (Delinear(24, 10, block=8), (64, 24)), (ChannelDeconv(4), (4, 10, 32, 32))))
@pytest.mark.parametrize("input_dtype", (torch.float32, torch.bfloat16))
def test_autocast_keeps_the_statistics_in_float32(layer, shape, input_dtype):
    fill(layer).train()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    results = []
    for enabled in (False, True):
        layer.load_state_dict(state), layer.zero_grad()
        x = x_of(9, shape).to(input_dtype)
        x = (x if enabled else x.float()).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(x)
            (y.float()*x_of(10, y.shape, corr=False)).sum().backward()  # backward inside autocast: its products must not be cast either
        results.append((y, layer.running_deconv.clone(), x.grad))
    (y, deconv, grad), (y16, deconv16, grad16) = results
    assert deconv16.dtype == torch.float32 and error(deconv16, deconv) < 1e-6
    assert error(y16.float(), y) < 0.02 and grad16.dtype == input_dtype and error(grad16.float(), grad) < 0.03


def test_low_precision_module():
    layer = fill(FastDeconv(5, 8, 3, padding=1)).bfloat16()
    y = layer(x_of(11, (4, 5, 16, 16)).bfloat16())
    assert y.dtype == torch.bfloat16 and error(y.float(), fill(FastDeconv(5, 8, 3, padding=1))(x_of(11, (4, 5, 16, 16)))) < 0.05


def test_channels_last_images():
    x = x_of(12, (2, 8, 20, 20))
    for kernel in (1, 3):
        layers = [fill(FastDeconv(8, 8, kernel, padding=kernel//2)) for _ in range(2)]
        assert error(layers[0](x.to(memory_format=torch.channels_last)), layers[1](x)) < 1e-6


def test_same_input_same_numbers():
    results = []
    for _ in range(2):
        layer, x = fill(FastDeconv(16, 16, 3, padding=1)), x_of(13, (4, 16, 32, 32)).requires_grad_()
        layer(x).square().sum().backward()
        results.append((x.grad, layer.weight.grad, layer.running_deconv))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def one_step(run, layer, x):
    "Outputs, gradients and buffers of a training step."
    y = run(x.requires_grad_())
    (y*x_of(15, y.shape, corr=False)).sum().backward()
    return [y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]


def test_traced_layers():
    "One graph without breaks, as torch.compile needs it, in both modes; a NaN does not reach the averages."
    layers = [nn.Sequential(fill(FastDeconv(5, 8, 3, stride=2, padding=1)), nn.ReLU(), fill(FastDeconv(8, 8, 3, groups=4)),
                            fill(FastDeconv(8, 6, 1)), fill(ChannelDeconv(3)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), fill(Delinear(6, 2)))
              for _ in range(2)]
    compiled = torch.compile(layers[1], fullgraph=True, backend="aot_eager")
    for eager, ours in zip(*(one_step(run, layer, x_of(14, (9, 5, 24, 24))) for run, layer in zip((layers[0], compiled), layers)), strict=True):
        assert error(ours, eager) < 1e-4
    x = x_of(16, (9, 5, 24, 24))
    assert error(layers[1].eval() and compiled(x), layers[0].eval()(x)) < 1e-4
    layers[1].train()
    before = {key: value.clone() for key, value in layers[1].state_dict().items() if "running" in key}
    for spoilt in (torch.full((9, 5, 24, 24), float("nan")), x_of(16, (9, 5, 24, 24))*1e20):
        compiled(spoilt)
        assert all(torch.equal(layers[1].state_dict()[key], value) for key, value in before.items())


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layer():
    layers = [fill(FastDeconv(5, 8, 3, padding=1)) for _ in range(2)]
    runs = layers[0], torch.compile(layers[1], fullgraph=True)
    for eager, ours in zip(*(one_step(run, layer, x_of(14, (2, 5, 24, 24))) for run, layer in zip(runs, layers)), strict=True):
        assert error(ours, eager) < 1e-4
