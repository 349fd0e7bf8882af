"""How fast spectra are predicted, against the published way: a pickled model, one .npy at a time.

    python benchmarks/predict.py > benchmarks/predict.md

Loading is included, imports are not. The ways take turns, three times each; the ratios are those of
medians of one run. Images are noise with a source: no network's time depends on what they show."""
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from specpred import models, runner
from specpred.predict import Predictor
from specpred.surveys import PS1

NETWORK, TURNS = "xresnet18_hybrid", 3
N_GALAXIES = {64: 128, 224: 64}


def make_inputs(folder, size, n):
    "A network in both forms of file, and images one by one and together."
    rows, columns = np.indices((size, size)) - (size - 1)/2
    rng = np.random.default_rng(0)
    flux = rng.normal(0, 50, (n, 5, size, size)) + 5e4*np.exp(-np.hypot(rows, columns)/3)
    flux = flux.astype(np.float32)
    for k, image in enumerate(flux): np.save(folder/f"{k}.npy", image)
    np.save(folder/"all.npy", flux)
    arguments = dict(c_in=5, n_out=6)
    network = models.MODELS[NETWORK](**arguments).eval()
    torch.save(network, folder/"network.pkl")
    models.save(network, folder/"network.safetensors", name=NETWORK, arguments=arguments,
        image_stats=((0.,)*5, (1e3,)*5), target_stats=((0.,)*6, (1.,)*6), survey=PS1,
        provenance=dict(image_size=size))


@torch.no_grad()
def published(folder, n):
    network = torch.load(folder/"network.pkl", weights_only=False)  # made above
    decoder = Predictor.load().decoder
    for k in range(n):
        image = torch.from_numpy(np.load(folder/f"{k}.npy"))[None]/1e3
        decoder.decode(network(image).numpy())


def batches(folder, n, bf16=False):
    network = models.load(folder/"network.safetensors")
    network.model = models.fuse(network.model)
    decoder = Predictor.load().decoder
    flux = np.load(folder/"all.npy", mmap_mode="r")
    for start in range(0, n, 32):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            targets = network.predict_targets(flux[start:start + 32])
        decoder.decode(targets)


def batches_bf16(folder, n): batches(folder, n, bf16=True)


def installed(folder, n, quantities=False):
    predictor, flux = Predictor.load(), np.load(folder/"all.npy", mmap_mode="r")
    for start in range(0, n, 64): predictor.predict(flux[start:start + 64], quantities=quantities)


def installed_with_lines(folder, n): installed(folder, n, quantities=True)


WAYS = {f"published way: `{NETWORK}`, pickle, one image at a time": published,
    f"`{NETWORK}`, fused, in batches": batches,
    f"`{NETWORK}`, fused, in batches, bfloat16": batches_bf16,
    "installed weights, with bands and flags": installed,
    "installed weights, with lines, too": installed_with_lines}


def main():
    print("# How fast a spectrum is predicted\n")
    print(f"{runner.describe_device()}. Made by "
        "`benchmarks/predict.py`. Loading of files is included.\n")
    print("| image, pixels | way | galaxies/s | against the published way |\n|---|---|---|---|")
    for size, n in N_GALAXIES.items():
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            make_inputs(folder, size, n)
            seconds = {name: [] for name in WAYS}
            for way in WAYS.values(): way(folder, 32)  # warm caches of files and libraries
            for _ in range(TURNS):
                for name, way in WAYS.items():
                    started = time.perf_counter()
                    way(folder, n)
                    seconds[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        first = medians[next(iter(WAYS))]
        for name, median in medians.items():
            print(f"| {size} | {name} | {n/median:.0f} | {first/median:.2f} |", flush=True)


if __name__ == "__main__": main()
