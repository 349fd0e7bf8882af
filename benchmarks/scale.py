"""What a galaxy costs on one core: reading its image, predicting, writing; and its bytes.

    OMP_NUM_THREADS=1 python benchmarks/scale.py

Writes benchmarks/scale.json, from which nbs/appendix_scale.ipynb computes what surveys cost. Files
are in the page cache; each way is timed five times in turn, and the median counts."""
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from specpred import runner
from specpred.images import open_images, pack_arrays
from specpred.inputs import read_image, write_cube
from specpred.predict import Predictor, example_galaxies, write_table
from specpred.surveys import PS1

N, TURNS = 128, 5


def make_inputs(folder, predictor):
    "The star-forming example with other noise, N times, in every form."
    files = sorted(example_galaxies()[1].iterdir())
    image = read_image(files, predictor.model).flux
    rng = np.random.default_rng(0)
    flux = np.float32(image + rng.normal(0, 20, (N, *image.shape)))
    for k, one in enumerate(flux): write_cube(folder/f"{k}.fits", one, PS1)
    pack_arrays(np.arange(1, N + 1), flux, folder/"store", PS1)
    column = pa.array(list(np.float16(np.clip(flux, -6e4, 6e4)).reshape(N, -1)))
    pq.write_table(pa.table(dict(image=column)), folder/"images.parquet")
    return files, flux


def ways(folder, predictor, files, flux):
    "Functions that read, predict or write N galaxies."
    model, store = predictor.model, open_images(folder/"store")
    spectra = predictor.predict(flux)
    rows = pa.table({name: pa.array(list(getattr(spectra, name)))
        for name in ("flux", "lower", "upper")})
    def parquet():
        column = pq.read_table(folder/"images.parquet")["image"].combine_chunks()
        return column.values.to_numpy().astype(np.float32).reshape(flux.shape)
    return {
        "read: five FITS files": lambda: [read_image(files, model) for _ in range(N)],
        "read: a FITS cube": lambda: [read_image([folder/f"{k}.fits"], model) for k in range(N)],
        "read: an image store": lambda: store.read_rows(np.arange(N)),
        "read: a Parquet column": parquet,
        "predict: targets": lambda: model.predict_targets(flux),
        "predict: spectra, bands, flags": lambda: predictor.predict(flux),
        "predict: lines, too": lambda: predictor.predict(flux, quantities=True),
        "write: ECSV tables": lambda: [write_table(folder/"out.ecsv", spectra, k, {})
            for k in range(N)],
        "write: Parquet rows": lambda: pq.write_table(rows, folder/"out.parquet"),
    }


def sizes(folder, files):
    "Bytes of a galaxy on a disk."
    def of(path): return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return {"five FITS files": sum(path.stat().st_size for path in files),
        "a FITS cube": (folder/"0.fits").stat().st_size,
        "an image store": of(folder/"store")//N,
        "a Parquet column": (folder/"images.parquet").stat().st_size//N,
        "a spectrum with band, ECSV": (folder/"out.ecsv").stat().st_size,
        "a spectrum with band, Parquet": (folder/"out.parquet").stat().st_size//N}


def main():
    torch.set_num_threads(1)
    predictor, seconds = Predictor.load(), {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files, flux = make_inputs(folder, predictor)
        todo = ways(folder, predictor, files, flux)
        for _ in range(TURNS):
            for name, way in todo.items():
                started = time.perf_counter()
                way()
                seconds.setdefault(name, []).append(time.perf_counter() - started)
        found = dict(machine=f"one core of: {runner.describe_device()}",
            load_before=round(os.getloadavg()[0], 1), image=list(flux.shape[1:]),
            milliseconds={k: round(1e3*statistics.median(v)/N, 4) for k, v in seconds.items()},
            bytes=sizes(folder, files))
    text = json.dumps(found, indent=1)
    Path(__file__).with_suffix(".json").write_text(text + "\n")
    print(text)


if __name__ == "__main__": main()
