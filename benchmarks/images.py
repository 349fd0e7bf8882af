"""Why images are stored as a memory map: bytes a galaxy, galaxies read a second, and the time of a
training step whose batches are read from each of several layouts.

python benchmarks/images.py (5 minutes), with --quick for a look, with --size 64 for small images.
Files are in the page cache; every way answers float32 nJy."""
import argparse
import functools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import h5py
import numpy as np
import torch
import zarr
from galaxies import galaxies
from interleaved import medians, setting, write
from numcodecs import blosc

from specpred.images import Augmentation, augment, fit_transform, open_images, pack_arrays
from specpred.models import MODELS

BATCH = 64  # galaxies asked for at once
MAP = "memory map, `ImageStore.read_rows`"
ZARR = "Zarr shards, compressed"
NPY = "one .npy a galaxy"


class ZarrStore:
    """Half precision in shards of 256 galaxies, each galaxy compressed by itself with a checksum,
    read past zarr's own selection, which answers 30 galaxies a second, in two threads."""
    shard = 256

    def __init__(self, folder, pixels, scale):
        self.folder, self.scale, self.shape = folder, scale, pixels.shape[1:]
        codec = zarr.codecs.BloscCodec(cname="zstd", clevel=3, shuffle="shuffle",
            blocksize=pixels[0].nbytes)
        array = zarr.create_array(folder, shape=pixels.shape, dtype=pixels.dtype,
            chunks=(1, *self.shape), shards=(self.shard, *self.shape),
            compressors=[codec, zarr.codecs.Crc32cCodec()])
        array[:] = pixels
        self.places = {k: self.table_of_contents(k) for k in range(-(-len(pixels)//self.shard))}
        self.pool = ThreadPoolExecutor(2)

    def file(self, shard): return self.folder/f"c/{shard}/0/0/0"

    def table_of_contents(self, shard):
        table = self.file(shard).read_bytes()[-(16*self.shard + 4):-4]
        return np.frombuffer(table, "<u8").reshape(-1, 2)

    def read_one(self, row, out):
        shard, place = divmod(int(row), self.shard)
        begin, length = map(int, self.places[shard][place])
        with open(self.file(shard), "rb", buffering=0) as file:
            file.seek(begin)
            packed = file.read(length)
        if google_crc32c.value(packed[:-4]) != int.from_bytes(packed[-4:], "little"): raise OSError
        numbers = np.empty(self.shape, np.float16)
        blosc.decompress(packed[:-4], numbers)
        torch.from_numpy(out).copy_(torch.from_numpy(numbers))
        out *= self.scale[row][:, None, None]

    def __call__(self, rows):
        out = np.empty((len(rows), *self.shape), np.float32)
        list(self.pool.map(self.read_one, rows, out))
        return out


def through_torch(store):
    "The map as a tensor, without numpy's indexing."
    pixels = torch.from_numpy(np.load(store.path/"flux.npy", mmap_mode="c"))
    scale = torch.tensor(store.scale)
    return lambda rows: pixels[rows].float().mul_(scale[rows][:, :, None, None]).numpy()


def two_threads(store):
    "The map, converted in two threads."
    pool = ThreadPoolExecutor(2)
    def read(rows):
        out = np.empty((len(rows), *store.shape[1:]), np.float32)
        multiply = functools.partial(np.multiply, dtype=np.float32)
        list(pool.map(lambda row, image: multiply(store.pixels[row],
            store.scale[row][:, None, None], out=image), rows, out))
        return out
    return read


def npy_files(folder, flux):
    folder.mkdir()
    for k, image in enumerate(flux): np.save(folder/f"{k}.npy", image)
    return lambda rows: np.stack([np.load(folder/f"{k}.npy") for k in rows])


def hdf5(path, flux, chunk, **filters):
    "Chunks of `chunk` galaxies; one read a galaxy is faster than h5py's selection of many."
    with h5py.File(path, "w") as file:
        file.create_dataset("flux", data=flux, chunks=(chunk, *flux.shape[1:]), **filters)
    data = h5py.File(path)["flux"]
    return lambda rows: np.stack([data[k] for k in rows])


def layouts(folder, flux):
    "For every layout its path and a function from rows to images."
    ids = np.arange(len(flux))
    for dtype in ("float16", "float32"): pack_arrays(ids, flux, folder/dtype, dtype=dtype)
    half, single = open_images(folder/"float16"), open_images(folder/"float32")
    return {
        ZARR: (folder/"zarr", ZarrStore(folder/"zarr", half.pixels[:], half.scale)),
        MAP: (half.path, half.read_rows),
        "memory map, `torch.from_numpy`": (half.path, through_torch(half)),
        "memory map, two threads": (half.path, two_threads(half)),
        "memory map, float32": (single.path, single.read_rows),
        NPY: (folder/"npy", npy_files(folder/"npy", flux)),
        "HDF5, float32": (folder/"a.h5", hdf5(folder/"a.h5", flux, 1)),
        "HDF5, float32, gzip 4": (folder/"b.h5",
            hdf5(folder/"b.h5", flux, 1, compression="gzip", shuffle=True))}


def bytes_of(path):
    if path.is_file(): return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def orders(n):
    "Rows of every batch: the file's order, an epoch's permutation, single galaxies from anywhere."
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(n)
    return {"sequential": np.split(np.arange(n), range(BATCH, n, BATCH)),
        "shuffled": np.split(shuffled, range(BATCH, n, BATCH)),
        "one at a time": np.split(shuffled[:128], range(1, min(n, 128)))}


def read_all(read, batches):
    for rows in batches: read(rows)


def reading(ways, n, chosen):
    "Rows of a table: bytes a galaxy, and galaxies a second in each order."
    batches = orders(n)
    seconds = medians({(way, order): functools.partial(read_all, read, batches[order])
        for way, (_, read) in ways.items() for order in batches}, chosen)
    rate = {key: sum(map(len, batches[key[1]]))/s for key, s in seconds.items()}
    table = ["| layout | kB a galaxy | " + ", galaxies/s | ".join(batches) + ", galaxies/s |",
        "|---|---|" + "---|"*len(batches)]
    for way, (path, _) in ways.items():
        cells = [f"{rate[way, order]:.0f} ({rate[way, order]/rate[ZARR, order]:.2f} ×)"
            for order in batches]
        table.append(f"| {way} | {bytes_of(path)/n/1e3:.0f} | {' | '.join(cells)} |")
    return table


class Training:
    "Steps of xresnet18 on batches that one thread reads ahead, as the loaders of 24_training do."
    def __init__(self, transform, n_bands, batch):
        torch.manual_seed(0)
        self.transform, self.batch = transform, batch
        self.model = MODELS["xresnet18"](c_in=n_bands, n_out=6).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-4)

    def input(self, read, rows):
        values = self.transform(read(rows))
        return torch.from_numpy(values).clamp_(-6e4, 6e4).half()

    def __call__(self, read, rows):
        rng = np.random.default_rng(0)
        parts = np.split(rows, range(self.batch, len(rows), self.batch))
        with ThreadPoolExecutor(1) as reader:
            for images in reader.map(functools.partial(self.input, read), parts):
                drawn = Augmentation().draw(len(images), rng)
                self.model(augment(images, range(len(images)), drawn)).square().mean().backward()
                self.optimizer.step()
                self.optimizer.zero_grad()


def training(ways, flux, transform, chosen):
    "Rows of a table: what a training step takes with batches from each layout."
    batch = 32
    rows = np.random.default_rng(0).permutation(len(flux))[:chosen.steps*batch]
    train = Training(transform, flux.shape[1], batch)
    kept = train.input(flux.__getitem__, np.arange(len(flux)))
    class InMemory(Training):
        def input(self, read, rows): return kept[rows]
    resident = InMemory(transform, flux.shape[1], batch)
    steps = {way: functools.partial(train, ways[way][1], rows) for way in (ZARR, MAP, NPY)}
    steps["network input kept in memory"] = functools.partial(resident, None, rows)
    seconds = medians(steps, chosen)
    table = ["| batches from | ms a step | images/s | ratio |", "|---|---|---|---|"]
    for way, s in seconds.items():
        table.append(f"| {way} | {1e3*s/chosen.steps:.0f} | {len(rows)/s:.0f} "
            f"| {s/seconds[ZARR]:.3f} |")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--galaxies", type=int, default=512)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="training steps a round; 0: none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true",
        help="CPU seconds instead of elapsed ones: for a busy machine, with --threads 1")
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    if chosen.quick: chosen.galaxies, chosen.repeats, chosen.steps = 128, 1, 1
    chosen.device, chosen.bf16, chosen.compile, chosen.batch = "cpu", False, False, BATCH
    torch.set_num_threads(chosen.threads)
    flux = galaxies(chosen.galaxies, chosen.size)
    with tempfile.TemporaryDirectory() as folder:
        ways = layouts(Path(folder), flux)
        for _, read in ways.values():
            np.testing.assert_allclose(read(np.array([3, 1])), flux[[3, 1]], rtol=1e-3, atol=1e-3)
        lines = [setting(chosen), f"Batches of {BATCH} except one at a time; in brackets the ratio "
            "to the Zarr shards; everything in the page cache.", "",
            *reading(ways, len(flux), chosen)]
        if chosen.steps:
            noise = open_images(ways[MAP][0]).noise
            lines += ["", "A training step of xresnet18, 32 images, published augmentation:", "",
                *training(ways, flux, fit_transform(flux[:200], noise), chosen)]
    write(f"Stores: {chosen.size} pixels, {chosen.galaxies} galaxies" + ", CPU time"*chosen.cpu_time
        + ", quick"*chosen.quick, lines, Path(__file__).with_suffix(".md"),
        "# What stores and transforms of images cost and give\n\n"
        "Made by `images.py` and `transforms.py`.\n")
