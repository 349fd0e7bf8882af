"""Every layer and every model in every way to run it: the same numbers in all memory formats, under
autocast, compiled, exported, and from a file."""
import pytest
import torch
from published_cases import error, fill, x_of
from test_deconv import LAYERS
from torch import nn

from specpred.deconv import FastDeconv
from specpred.models import MODELS
from specpred.weights import load_state, read_weights, write_weights

NARROW = dict(width=0.125)  # an eighth of the channels, for speed


def model(name):
    "A function that builds it, and the shape of its input."
    changes = {"photometry": dict(p=0.)}  # two networks drop different numbers
    narrow = NARROW if name.startswith("xresnet") else changes.get(name, {})
    return lambda: MODELS[name](**narrow), (4, 5, 32, 32)


def pointwise_then_grouped():
    "As in the bottleneck blocks of deconvolved models."
    return nn.Sequential(FastDeconv(8, 16, 1), nn.ReLU(), FastDeconv(16, 16, 3, groups=4))


SMALL = LAYERS | {"pointwise then grouped": (pointwise_then_grouped, (4, 8, 9, 9))}
NETWORKS = SMALL | {name: model(name) for name in MODELS}
SHALLOW = [name for name in NETWORKS if "34" not in name and "50" not in name]


def unchanged(network, x): return network, x


def network_channels_last(network, x):
    return network.to(memory_format=torch.channels_last), x


def input_channels_last(network, x):
    "Only images have this format."
    return network, x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def both_channels_last(network, x):
    return input_channels_last(*network_channels_last(network, x))


def input_strided(network, x):
    "Every other number of a larger tensor."
    return network, torch.stack([x, x], -1)[..., 0]


FORMATS = network_channels_last, input_channels_last, both_channels_last, input_strided


def step(network, x, run=None):
    "Output, gradients and buffers of a training step, then the output in evaluation."
    run, x = network if run is None else run, x.clone().requires_grad_()
    y = run(x)
    (y.to(torch.float64)*x_of(20, y.shape, corr=False)).sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in network.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with torch.no_grad(): evaluated = run.eval()(x)
    return dict(y=y, x=x.grad, evaluated=evaluated, **gradients, **buffers)


def assert_same(results, expected, tolerance):
    "Each within the tolerance in norm, relative to what is above rounding."
    for key, value in expected.items():
        difference = (results[key].double() - value.double()).norm()
        assert difference <= tolerance*max(value.double().norm(), 1e-4), key


@pytest.mark.parametrize("name", NETWORKS)
def test_every_memory_format(name):
    "In float64, so that rounding, which deep networks amplify, hides nothing."
    build, shape = NETWORKS[name]
    x = x_of(9, shape).double()
    expected = step(fill(build()).double(), x)
    assert all(value is not None and value.isfinite().all() for value in expected.values())
    assert expected["x"].shape == shape
    for change in FORMATS if name in SHALLOW else [both_channels_last]:
        network, changed = change(fill(build()).double(), x)
        assert_same(step(network, changed), expected, 1e-7)


@pytest.mark.parametrize("name", SHALLOW)
def test_autocast_and_files(name, tmp_path):
    "bfloat16 under autocast is near float32, statistics included; files and exports are equal."
    build, shape = NETWORKS[name]
    x = x_of(9, shape)
    network, changed = both_channels_last(fill(build()), x)
    with torch.autocast("cpu", torch.bfloat16): results = step(network, changed)
    expected = step(fill(build()), x)
    assert error(results["y"].float(), expected["y"]) < 0.15
    assert error(results["evaluated"].float(), expected["evaluated"]) < 0.05
    assert all(value.isfinite().all() for value in results.values())
    running = [results[key] for key in results if key.endswith("running_deconv")]
    assert all(value.dtype == torch.float32 for value in running)

    write_weights(tmp_path/"weights", network.state_dict(), {})
    again = load_state(build(), read_weights(tmp_path/"weights").tensors).eval()
    exported = torch.export.export(again, (changed,)).module()
    with torch.no_grad():
        assert error(again(x), network(x)) < 1e-6
        assert error(exported(changed), again(x)) < 1e-5


@pytest.mark.parametrize("name, change", [
    *((name, change) for name in SMALL for change in (unchanged, both_channels_last)),
    ("deconv3", both_channels_last), ("xresnet18_hybrid", both_channels_last)])
def test_compiled(name, change):
    "One graph without breaks gives the same training step and evaluation."
    build, shape = NETWORKS[name]
    x = x_of(9, shape)
    network, changed = change(fill(build()), x)
    expected = step(fill(build()), x)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert_same(step(network, changed, compiled), expected, 1e-3)
