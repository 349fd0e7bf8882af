"""Bytes a galaxy and galaxies read per second of the image store, beside one .npy file a galaxy (the published layout) and HDF5.

python benchmarks/images.py (5 minutes), with --quick for a look. Files are in the page cache; every way answers float32 nJy."""
import argparse, functools, tempfile
from pathlib import Path
import h5py
import numpy as np
import torch
import zarr
from numcodecs import blosc
from galaxies import galaxies
from interleaved import medians, setting, write
from specpred.images import open_images, pack_arrays

BATCH = 64  # galaxies asked for at once
CODECS = {"zstd 3, bytes sorted": ("zstd", 3, blosc.SHUFFLE), "zstd 3, bits sorted": ("zstd", 3, blosc.BITSHUFFLE),
    "lz4 5, bits sorted": ("lz4", 5, blosc.BITSHUFFLE)}


def npy_files(folder, flux):
    folder.mkdir()
    for k, image in enumerate(flux): np.save(folder/f"{k}.npy", image)
    return lambda rows: np.stack([np.load(folder/f"{k}.npy") for k in rows])


def hdf5(path, flux, chunk, **filters):
    "Chunks of `chunk` galaxies. h5py's selection of scattered rows is slower than one read for each."
    with h5py.File(path, "w") as file: file.create_dataset("flux", data=flux, chunks=(chunk, *flux.shape[1:]), **filters)
    data = h5py.File(path)["flux"]
    def read(rows):
        together = len(rows) == rows[-1] - rows[0] + 1 and (np.diff(rows) == 1).all()
        return data[rows[0]:rows[-1] + 1] if together else np.stack([data[k] for k in rows])
    return read


def by_zarr(path):
    "The same store through zarr's own selection."
    group = zarr.open_group(path, mode="r")
    scale = group["scale"][:]
    def read(rows): return group["flux"].oindex[rows].astype(np.float32)*scale[rows][:, :, None, None]
    return read


def store(path, flux, dtype):
    pack_arrays(np.arange(len(flux)), flux, path, dtype=dtype)
    return open_images(path).read_rows


def bytes_of(path): return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size


def orders(n):
    "Rows for every batch: the file's order; an epoch's permutation; and single galaxies from anywhere."
    rng = np.random.default_rng(0)
    cut = lambda rows, size: [rows[k:k + size] for k in range(0, len(rows), size)]
    return {"sequential": cut(np.arange(n), BATCH), "shuffled": cut(rng.permutation(n), BATCH), "one at a time": cut(rng.permutation(n)[:128], 1)}


def read_all(read, batches):
    for rows in batches: read(rows)


def measure_codecs(images, chosen):
    "Rows of a table: what codecs make of the numbers of a half-precision store."
    rows = range(min(BATCH, len(images)))
    numbers = [(images.read_rows([k])[0]/images.scale[k][:, None, None]).astype(np.float16) for k in rows]
    packed = {(name, blocks): [blosc.compress(one, cname.encode(), level, shuffle, one.nbytes if blocks == "one a galaxy" else 0) for one in numbers]
        for name, (cname, level, shuffle) in CODECS.items() for blocks in ("one a galaxy", "Blosc's choice")}
    target = np.empty_like(numbers[0])
    def unpack(pieces):
        for piece in pieces: blosc.decompress(piece, target)
    threads = blosc.set_nthreads(1)
    seconds = medians({key: functools.partial(unpack, pieces) for key, pieces in packed.items()}, chosen)
    blosc.set_nthreads(threads)
    return ["| codec of the half-precision store | blocks | kB a galaxy | decoded in one thread, galaxies/s |", "|---|---|---|---|",
        *(f"| {name} | {blocks} | {np.mean(list(map(len, pieces)))/1e3:.0f} | {len(rows)/seconds[name, blocks]:.0f} |"
            for (name, blocks), pieces in packed.items())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--galaxies", type=int, default=512)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    if chosen.quick: chosen.galaxies, chosen.repeats = 128, 1
    chosen.device, chosen.cpu_time, chosen.bf16, chosen.compile, chosen.batch = "cpu", False, False, False, BATCH
    torch.set_num_threads(chosen.threads)
    flux = galaxies(chosen.galaxies, chosen.size)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        ways = {"store, float16": (folder/"a.zarr", store(folder/"a.zarr", flux, "float16")),
            "store, float32": (folder/"b.zarr", store(folder/"b.zarr", flux, "float32")),
            "store, float16, through zarr": (folder/"a.zarr", by_zarr(folder/"a.zarr")),
            "one .npy a galaxy, float32": (folder/"npy", npy_files(folder/"npy", flux)),
            "HDF5, float32": (folder/"c.h5", hdf5(folder/"c.h5", flux, 1)),
            "HDF5, float32, shuffle and gzip 4, 16 a chunk": (folder/"d.h5", hdf5(folder/"d.h5", flux, 16, compression="gzip", shuffle=True))}
        for path, read in ways.values(): np.testing.assert_allclose(read(np.array([3, 1])), flux[[3, 1]], rtol=1e-3, atol=1e-3)
        batches = orders(chosen.galaxies)
        # zarr's own selection is so slow that a part is enough
        asked = {(way, order): rows[:16 if order == "one at a time" else 3] if "through" in way else rows
            for way in ways for order, rows in batches.items()}
        seconds = medians({(way, order): functools.partial(read_all, ways[way][1], rows) for (way, order), rows in asked.items()}, chosen)
        rate = {key: sum(map(len, rows))/seconds[key] for key, rows in asked.items()}
        table = ["| layout | kB a galaxy | " + " | ".join(f"{order}, galaxies/s" for order in batches) + " |", "|---|---|" + "---|"*len(batches)]
        for way, (path, _) in ways.items():
            cells = [f"{rate[way, order]:.0f} ({rate[way, order]/rate['one .npy a galaxy, float32', order]:.2f} ×)" for order in batches]
            table.append(f"| {way} | {bytes_of(path)/len(flux)/1e3:.0f} | {' | '.join(cells)} |")
        table += ["", *measure_codecs(open_images(folder/"a.zarr"), chosen)]
    write(f"Stores: {chosen.size} pixels, {chosen.galaxies} galaxies" + ", quick"*chosen.quick, [setting(chosen),
        f"Batches of {BATCH} except one at a time; in brackets the ratio to one .npy a galaxy; "
        "everything in the page cache, so that .npy files cost no seeks.", "", *table],
        Path(__file__).with_suffix(".md"), "# What stores and transforms of images cost and give\n\nMade by `images.py` and `transforms.py`.\n")
