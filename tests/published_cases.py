"""The inputs and weights behind the arrays in tests/reference/ (see its README.md)."""
import json
import zlib
from pathlib import Path

import numpy as np
import torch

REFERENCE = Path(__file__).parent/"reference"


def fill(module):
    "Weights and buffers drawn from a generator seeded by each key."
    state = module.state_dict()
    for key, value in state.items():
        n = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(tuple(value.shape))
        if key.endswith("num_batches_tracked"): a = np.zeros(value.shape)
        elif key.endswith("running_var"): a = 1 + 0.1*np.abs(n)
        elif key.endswith("running_deconv"):
            a = np.eye(value.shape[-1]) + 0.005*(n + n.swapaxes(-1, -2))
        elif key.endswith("running_mean"): a = 0.05*n
        elif value.ndim == 1 and key.endswith("weight"): a = 1 + 0.1*n
        else: a = n/np.sqrt(max(1, np.prod(value.shape[1:])))
        state[key] = torch.as_tensor(a, dtype=value.dtype)
    module.load_state_dict(state)
    return module


def x_of(seed, shape, corr=True):
    "Gaussian noise, correlated along rows, columns and channels unless told otherwise."
    x = np.random.default_rng(seed).standard_normal(shape)
    if corr: x = x + np.roll(x, 1, -1) + np.roll(x, 1, -2) + 0.5*np.roll(x, 1, 1) + 0.3
    return torch.as_tensor(x, dtype=torch.float32)


def cases(name, kind=None):
    "The arrays of a file, its first seed and the list of its cases."
    arrays = np.load(REFERENCE/f"{name}.npz")
    configs = json.loads(str(arrays["configs"]))
    return arrays, int(arrays["seed0"]), configs[kind] if kind else configs


def error(a, b):
    "Relative difference of two arrays in norm."
    a, b = (torch.as_tensor(v).detach().double() for v in (a, b))
    assert a.shape == b.shape, (a.shape, b.shape)
    return ((a - b).norm()/b.norm()).item()
