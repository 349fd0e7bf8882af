"""Images per second over an epoch with everything in the page cache: fastai over one .npy file a galaxy, as published, beside
the loaders of 19_training; and the peak memory of the streaming loader for 1,000 and 10,000 galaxies.

python benchmarks/loaders.py (7 minutes), with --quick for a look"""
import argparse, functools, os, subprocess, sys, tempfile
from pathlib import Path
import numpy as np
import pandas as pd
import torch
import zarr
from fastai.basics import ColReader, ColSplitter, DataBlock, RegressionBlock
from fastai.vision.augment import Dihedral, aug_transforms
from galaxies import galaxies
from interleaved import medians, setting, write
from memory import peak_memory
from specpred.images import _COLUMNS, Augmentation, GrizyImage, _columns_checksum, augment, fit_transform, open_images, pack_arrays
from specpred.training import batch_loaders, grizyImageBlock, target_columns

NONE, TURNS, ALL = "none", "flips and turns", "flips, turns, rotations"
OURS = {NONE: Augmentation(turns=False, p_rotate=0), TURNS: Augmentation(p_rotate=0), ALL: Augmentation()}
FASTAI = {NONE: [], TURNS: [Dihedral(p=1., pad_mode="reflection")],
    ALL: aug_transforms(do_flip=True, flip_vert=True, max_rotate=10., max_zoom=1., max_warp=0., max_lighting=0., p_affine=.75)}


def sample(folder, n, size):
    "The same galaxies as a store and as one .npy file each; the first two and the last two are there for valid and test."
    flux, ids = galaxies(n, size), np.arange(n, dtype=np.uint64)
    (folder/"npy").mkdir()
    for k in ids: np.save(folder/f"npy/{k}.npy", flux[k])
    pack_arrays(ids, flux, folder/"images.zarr")
    split = np.where(ids < 2, "valid", np.where(ids >= n - 2, "test", "train"))
    table = pd.DataFrame({"specobjid": ids, "split": split} | {f"target_{k}": np.zeros(n, "f4") for k in range(1, 7)})
    return open_images(folder/"images.zarr"), table, fit_transform(flux[:200], np.tile([[30., 40, 45, 90, 200]], (n, 1)), "linear")


def npy_loaders(folder, table, transform, augmentation, batch, workers):
    "The published way: fastai reads a file for every galaxy."
    rows = table[table.split != "test"].assign(is_valid=table.split == "valid")
    block = DataBlock(blocks=(grizyImageBlock(transform), RegressionBlock(n_out=6)),
        get_x=lambda row: GrizyImage(torch.from_numpy(np.load(folder/f"npy/{row.specobjid}.npy"))),
        get_y=ColReader(target_columns(table)), splitter=ColSplitter("is_valid"), batch_tfms=augmentation)
    return block.dataloaders(rows, bs=batch, num_workers=workers, device="cpu").train


def epoch(loader):
    "Goes once through a loader, and touches every batch as a network would."
    for x, y in loader: x[0, 0, 0, 0].item()


def memory_of_an_epoch(folder, n):
    "Run in a process of its own: prints the peak memory of an epoch of streaming, MB."
    images = open_images(folder)
    table = pd.DataFrame({"specobjid": images.specobjid[:n], "split": np.where(np.arange(n) < 2, "valid", "train")}
        | {f"target_{k}": np.zeros(n, "f4") for k in range(1, 7)})
    loaders = batch_loaders(images, table, fit_transform(images.flux[:64], images.noise[:64]), 64, keep=False, device="cpu")
    epoch(loaders.train)
    print(peak_memory())


def repeat_shards(store, times):
    "Makes a store `times` as long by linking its shards."
    group = zarr.open_group(store, mode="r+")
    n, shard, records = group["flux"].shape[0], group["flux"].shards[0], group.attrs["shards"]
    assert n % shard == 0
    for name in list(group.array_keys()):
        values = None if name == "flux" else group[name][:]
        group[name].resize((n*times, *group[name].shape[1:]))
        if values is not None: group[name][:] = np.arange(n*times) if name == "specobjid" else np.concatenate([values]*times)
    for k in range(n//shard, n*times//shard):
        (store/f"flux/c/{k}/0/0").mkdir(parents=True)
        os.link(store/f"flux/c/{k % (n//shard)}/0/0/0", store/f"flux/c/{k}/0/0/0")
        records[str(k)] = records[str(k % (n//shard))]
    group.attrs.update(shards=records, columns_crc32c=_columns_checksum({name: group[name][:] for name in _COLUMNS}))


def measure_memory(size, numbers):
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)/"images.zarr"
        pack_arrays(np.arange(256), galaxies(256, size), store)
        repeat_shards(store, -(-max(numbers)//256))
        return {n: int(subprocess.run([sys.executable, __file__, "--memory-of", str(store), "--galaxies", str(n)],
            capture_output=True, text=True, check=True).stdout) for n in numbers}


def measure_rates(chosen):
    "Rows of the table: images per second by loader and augmentation."
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        images, table, transform = sample(folder, chosen.galaxies, chosen.size)
        loaders, workers = {}, {}
        for name in (NONE, TURNS, ALL):
            theirs = {w: npy_loaders(folder, table, transform, FASTAI[name], chosen.batch, w) for w in chosen.workers}
            seconds = medians({w: functools.partial(epoch, loader) for w, loader in theirs.items()},
                argparse.Namespace(**vars(chosen) | dict(repeats=min(3, chosen.repeats))))
            workers[name] = min(seconds, key=seconds.get)
            print(f"fastai, {name}:", ", ".join(f"{w} workers {chosen.galaxies/s:.0f}/s" for w, s in seconds.items()), flush=True)
            loaders["fastai, .npy", name] = theirs[workers[name]]
            ours = functools.partial(batch_loaders, images, table, transform, chosen.batch, OURS[name], device="cpu")
            loaders["batches, streaming", name], loaders["batches, resident", name] = ours(keep=False).train, ours(keep=True).train
        steps = {key: functools.partial(epoch, loader) for key, loader in loaders.items()}
        for name in (NONE, TURNS, ALL): steps["augmentation alone", name] = alone(loaders["batches, resident", name])
        seconds = medians(steps, chosen)
        n = {key: len(loaders.get(key, loaders["batches, resident", key[1]]))*chosen.batch for key in steps}
        return {key: n[key]/s for key, s in seconds.items()}, workers


def alone(loader):
    "The augmentation of a whole epoch on images in memory, without a loader."
    rng, out = np.random.default_rng(0), torch.zeros(loader.bs, *loader.source.values.shape[1:])
    def step():
        order = rng.permutation(loader.n)
        drawn = loader.augmentation.draw(loader.n, rng)
        for k in range(0, len(loader)*loader.bs, loader.bs):
            part = order[k:k + loader.bs]
            augment(loader.source.values, loader.positions[part], {name: v[part] for name, v in drawn.items()}, out)
    return step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--galaxies", type=int, default=1024)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of fastai's loader, to choose the best from")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.device, chosen.cpu_time, chosen.bf16, chosen.compile = "cpu", False, False, False
    torch.set_num_threads(chosen.threads)
    if chosen.memory_of: memory_of_an_epoch(chosen.memory_of, chosen.galaxies), sys.exit()
    if chosen.quick: chosen.galaxies, chosen.repeats, chosen.workers = 384, 1, [2]
    rates, workers = measure_rates(chosen)
    rows = ["| images/s (and times fastai) | no augmentation | flips and turns | flips, turns, rotations |", "|---|---|---|---|"]
    for way in dict.fromkeys(way for way, _ in rates):
        cells = [f"{rates[way, name]:.0f} ({rates[way, name]/rates['fastai, .npy', name]:.1f} ×)" for name in (NONE, TURNS, ALL)]
        rows.append(f"| {way}{', its best number of workers' if 'fastai' in way else ''} | {' | '.join(cells)} |")
    memory = measure_memory(chosen.size, (1_000, 2_000) if chosen.quick else (1_000, 10_000))
    rows += ["", "Fastai's workers: " + ", ".join(f"{w} ({name})" for name, w in workers.items())
        + f", the fastest of {', '.join(map(str, chosen.workers))}.", "",
        f"Flips and turns, resident, are {rates['batches, resident', TURNS]/rates['fastai, .npy', NONE]:.1f} times fastai without any augmentation; "
        f"rotations are {rates['batches, resident', ALL]/rates['fastai, .npy', ALL]:.1f} times fastai's.", "",
        "Peak memory of the streaming loader (batches of 64): " + ", ".join(f"{m} MB for {n:,} galaxies" for n, m in memory.items()) + "."]
    write(f"{chosen.size} pixels, {chosen.galaxies} galaxies" + ", quick" * chosen.quick, [setting(chosen), "", *rows], Path(__file__).with_suffix(".md"),
        "# What loaders cost\n\nMade by `loaders.py`, with the published transform (standardised nJy) everywhere; ratios are within one row of rounds.\n")
