"""FastDeconv under DistributedDataParallel: statistics of each process's own batch, buffers of rank 0, as for batch normalisation."""
import sys
from pathlib import Path
import torch
import torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = [str(Path(__file__).parent)]
from published_cases import error, fill, x_of
from specpred.deconv import FastDeconv


def network(): return fill(nn.Sequential(FastDeconv(5, 8, 3, padding=1), nn.ReLU(), FastDeconv(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())).double()

def batch_of(rank, step): return x_of(10*step + rank, (4, 5, 20, 20)).double()


def train(rank, folder):
    "Two steps of gradient descent on each of two processes."
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = DistributedDataParallel(network())
    optimizer, gradients = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(2):
        optimizer.zero_grad()
        model(batch_of(rank, step)).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
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
            for buffer, value in zip(model.buffers(), buffers): buffer.copy_(value)
            model.zero_grad()
            model(batch_of(rank, step)).square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        for p, a, b in zip(model.parameters(), *gradients): p.grad = (a + b)/2
        for rank in ranks:
            for p, gradient in zip(model.parameters(), rank["gradients"][step]): assert error(gradient, p.grad) < 1e-9
        optimizer.step()

    parameters = dict(model.named_parameters())
    for key, value in model.state_dict().items():
        assert error(ranks[0]["state"][key], value) < 1e-9, key
        if key in parameters: assert torch.equal(ranks[0]["state"][key], ranks[1]["state"][key]), key
    # each replica has averaged in its own last batch
    assert error(ranks[1]["state"]["0.running_deconv"], ranks[0]["state"]["0.running_deconv"]) > 1e-3
