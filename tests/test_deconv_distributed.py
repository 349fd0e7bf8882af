"""FastDeconv under DistributedDataParallel: each process uses the statistics of its own batch, and
the buffers are those of rank 0, as for batch normalisation."""
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = [str(Path(__file__).parent)]
from published_cases import error, fill, x_of  # noqa: E402

from specpred.deconv import FastDeconv  # noqa: E402


def network():
    deconvs = FastDeconv(5, 8, 3, padding=1), FastDeconv(8, 4, 3)
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return fill(nn.Sequential(deconvs[0], nn.ReLU(), deconvs[1], *pool)).double()


def batch_of(rank, step): return x_of(10*step + rank, (4, 5, 20, 20)).double()


def gradients_of(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def train(rank, folder):
    "Two steps of gradient descent on each of two processes."
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = DistributedDataParallel(network())
    optimizer, gradients = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(2):
        gradients.append(gradients_of(model, batch_of(rank, step)))
        optimizer.step()
    torch.save(dict(gradients=gradients, state=model.module.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    mp.spawn(train, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path/f"{rank}.pt") for rank in (0, 1)]

    # one process that does the same in turn
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        buffers, gradients = [b.clone() for b in model.buffers()], []
        for rank in (1, 0):  # rank 0 last: its buffers stay
            for buffer, value in zip(model.buffers(), buffers, strict=True): buffer.copy_(value)
            gradients.append(gradients_of(model, batch_of(rank, step)))
        for i, p in enumerate(model.parameters()):
            p.grad = (gradients[0][i] + gradients[1][i])/2
            for rank in ranks: assert error(rank["gradients"][step][i], p.grad) < 1e-9
        optimizer.step()

    first, second = (rank["state"] for rank in ranks)
    for key, value in model.state_dict().items(): assert error(first[key], value) < 1e-9, key
    for key, _ in model.named_parameters(): assert torch.equal(first[key], second[key]), key
    # each replica has averaged in its own last batch
    assert error(second["0.running_deconv"], first["0.running_deconv"]) > 1e-3
