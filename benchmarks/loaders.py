"""Images per second over an epoch with everything in the page cache: fastai over one .npy file a
galaxy, as published, beside the loaders of 24_training; and the peak memory of reading batches from
the store for 1,000 and 4,000 galaxies.

python benchmarks/loaders.py (7 minutes), with --quick for a look"""
import argparse
import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.basics import (
    ColReader, ColSplitter, DataBlock, RegressionBlock, Transform, TransformBlock)
from fastai.vision.augment import Dihedral, aug_transforms
from galaxies import galaxies
from interleaved import medians, setting, write
from memory import OwnMemory

from specpred.images import Augmentation, augment, fit_transform, open_images, pack_arrays
from specpred.training import GalaxyImage, Sample, batch_loaders
from specpred.vae import target_columns

FILES = "fastai, .npy, its best number of workers"
NONE, TURNS, ALL = "none", "flips and turns", "flips, turns, rotations"
OURS = {NONE: Augmentation(turns=False, p_rotate=0), TURNS: Augmentation(p_rotate=0),
    ALL: Augmentation()}
FASTAI = {NONE: [], TURNS: [Dihedral(p=1., pad_mode="reflection")],
    ALL: aug_transforms(do_flip=True, flip_vert=True, max_rotate=10., max_zoom=1., max_warp=0.,
        max_lighting=0., p_affine=.75)}


def targets_of(ids):
    "A table with six targets; the first two galaxies are for validation."
    split = np.where(np.arange(len(ids)) < 2, "valid", "train")
    return pd.DataFrame({"specobjid": ids, "split": split}
        | {f"target_{k}": np.zeros(len(ids), "f4") for k in range(1, 7)})


def make_sample(folder, n, size):
    "The same galaxies as a store and as one .npy file each."
    flux, ids = galaxies(n, size), np.arange(n, dtype=np.uint64)
    (folder/"npy").mkdir()
    for k in ids: np.save(folder/f"npy/{k}.npy", flux[k])
    pack_arrays(ids, flux, folder/"images")
    images = open_images(folder/"images")
    return Sample(images, targets_of(ids), fit_transform(flux[:200], images.noise, "linear"))


class Stretch(Transform):
    "The transform of a sample for fastai's batches."
    order = 5
    def __init__(self, transform): self.transform = transform
    def encodes(self, x:GalaxyImage): return self.transform(x)


def npy_loader(folder, sample, augmentation, batch, workers):
    "The published way: fastai reads a file for every galaxy."
    rows = sample.table.assign(is_valid=sample.table.split == "valid")
    images = TransformBlock(batch_tfms=[Stretch(sample.transform)])
    block = DataBlock(blocks=(images, RegressionBlock(n_out=6)),
        get_x=lambda row: GalaxyImage(torch.from_numpy(np.load(folder/f"npy/{row.specobjid}.npy"))),
        get_y=ColReader(target_columns(rows)), splitter=ColSplitter("is_valid"),
        batch_tfms=augmentation)
    return block.dataloaders(rows, bs=batch, num_workers=workers, device="cpu").train


def epoch(loader):
    "Goes once through a loader, and touches every batch as a network would."
    for x, _ in loader: x[0, 0, 0, 0].item()


def alone(loader):
    "The augmentation of a whole epoch on images in memory, without a loader."
    galaxies = loader.dataset
    def step():
        rng = np.random.default_rng(0)
        for _ in range(len(loader)):
            rows = rng.integers(len(galaxies), size=loader.bs)
            augment(galaxies.values, rows, galaxies.augmentation.draw(loader.bs, rng))
    return step


def fastest_of_fastai(folder, sample, name, chosen):
    "The loader with the number of workers that is fastest, and that number."
    loaders = {workers: npy_loader(folder, sample, FASTAI[name], chosen.batch, workers)
        for workers in chosen.workers}
    few = argparse.Namespace(**vars(chosen) | dict(repeats=min(3, chosen.repeats)))
    seconds = medians({w: functools.partial(epoch, loader) for w, loader in loaders.items()}, few)
    workers = min(seconds, key=seconds.get)
    return loaders[workers], workers


def measure_rates(chosen):
    "Images per second by loader and augmentation, and fastai's best number of workers."
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        sample = make_sample(folder, chosen.galaxies, chosen.size)
        steps, workers = {}, {}
        for name in (NONE, TURNS, ALL):
            theirs, workers[name] = fastest_of_fastai(folder, sample, name, chosen)
            steps[FILES, name] = functools.partial(epoch, theirs)
            ours = functools.partial(batch_loaders, sample, chosen.batch, OURS[name], device="cpu")
            streaming, resident = ours(keep=False).train, ours(keep=True).train
            steps["batches, from the store", name] = functools.partial(epoch, streaming)
            steps["batches, from memory", name] = functools.partial(epoch, resident)
            steps["augmentation alone", name] = alone(resident)
            batches = len(resident)
        seconds = medians(steps, chosen)
        return {key: batches*chosen.batch/s for key, s in seconds.items()}, workers


def memory_of_an_epoch(folder):
    "Run in a process of its own: prints the memory that an epoch from the store takes, MB."
    images = open_images(folder)
    transform = fit_transform(images.read_rows(range(64)), images.noise[:64])
    sample = Sample(images, targets_of(images.specobjid), transform)
    with OwnMemory() as memory: epoch(batch_loaders(sample, 64, keep=False, device="cpu").train)
    print(memory.peak)


def measure_memory(size, n):
    "MB for a store of n galaxies, n a multiple of 250: 250 galaxies again and again."
    with tempfile.TemporaryDirectory() as folder:
        store, first = Path(folder)/"images", Path(folder)/"first"
        pack_arrays(np.arange(250), galaxies(250, size), first)
        store.mkdir()
        pixels, table = np.load(first/"flux.npy"), pd.read_parquet(first/"galaxies.parquet")
        repeated = np.lib.format.open_memmap(store/"flux.npy", "w+", pixels.dtype,
            (n, *pixels.shape[1:]))
        for start in range(0, n, 250): repeated[start:start + 250] = pixels
        longer = pd.concat([table]*(n//250), ignore_index=True)
        longer["specobjid"] = np.arange(n, dtype=np.uint64)
        longer.attrs = table.attrs
        longer.to_parquet(store/"galaxies.parquet")
        command = [sys.executable, __file__, "--memory-of", str(store)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def report(rates, workers, memory, chosen):
    names = (NONE, TURNS, ALL)
    lines = ["| images/s (and times fastai) | no augmentation | flips and turns "
        "| flips, turns, rotations |", "|---|---|---|---|"]
    for way in dict.fromkeys(way for way, _ in rates):
        cells = [f"{rates[way, name]:.0f} ({rates[way, name]/rates[FILES, name]:.1f} ×)"
            for name in names]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    best = ", ".join(f"{workers[name]} ({name})" for name in names)
    peaks = ", ".join(f"{mb} MB for {n:,} galaxies" for n, mb in memory.items())
    return [*lines, "", f"Fastai's workers: {best}, the fastest of "
        f"{', '.join(map(str, chosen.workers))}.", "",
        "Peak memory of batches of 64 from the store, without the pages of the mapped file: "
        f"{peaks}."]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--galaxies", type=int, default=1024)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 3, 4],
        help="of fastai's loader, to choose the best from")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds instead of elapsed "
        "ones: for a busy machine, with --threads 1 --workers 0")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.device, chosen.bf16, chosen.compile = "cpu", False, False
    torch.set_num_threads(chosen.threads)
    if chosen.memory_of:
        memory_of_an_epoch(chosen.memory_of)
        sys.exit()
    if chosen.quick: chosen.galaxies, chosen.repeats, chosen.workers = 384, 1, [2]
    rates, workers = measure_rates(chosen)
    memory = {n: measure_memory(chosen.size, n) for n in (1_000, 2_000 if chosen.quick else 4_000)}
    heading = f"{chosen.size} pixels, {chosen.galaxies} galaxies" + ", CPU time"*chosen.cpu_time
    write(heading + ", quick"*chosen.quick,
        [setting(chosen), "", *report(rates, workers, memory, chosen)],
        Path(__file__).with_suffix(".md"), "# What loaders cost\n\nMade by `loaders.py`, with the "
        "published transform (standardised nJy) everywhere; ratios are within one row of rounds.\n")
