"""Predicting a HATS catalogue: galaxies per second with one and two processes, and their memory.

    python benchmarks/survey.py > benchmarks/survey.md

The catalogue has 50 partitions of 40 galaxies and a column of images of 64 pixels. Processes have
one core each and have loaded the weights before the clock starts. Memory is noted by the process
itself, each time it has written a partition."""
import os
import tempfile
import time
from pathlib import Path

import dask
import lsdb
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
from astropy_healpix import HEALPix
from distributed import Client, LocalCluster, WorkerPlugin

from specpred import runner, survey
from specpred.inputs import name_galaxies, read_image
from specpred.predict import example_galaxies

N_PARTITIONS, N_GALAXIES, PROCESSES = 50, 40, (1, 2)


def write_catalogue(path):
    "Galaxies in 50 HEALPix pixels of order 2: the two installed ones, brighter and fainter."
    rng, model = np.random.default_rng(0), survey.load_predictor().model
    pixels = np.repeat(np.arange(N_PARTITIONS), N_GALAXIES)
    n = len(pixels)
    ra, dec = HEALPix(4, "nested").healpix_to_lonlat(pixels, *rng.uniform(0.01, 0.99, (2, n)))
    files = name_galaxies(example_galaxies(), model.survey.bands).values()
    two = np.stack([read_image(paths, model).flux.ravel() for paths in files])
    images = two[rng.integers(0, 2, n)]*rng.uniform(0.7, 1.3, (n, 1)).astype(np.float32)
    images = pd.Series(list(images), dtype=pd.ArrowDtype(pa.list_(pa.float32())))
    frame = pd.DataFrame(dict(id=np.arange(n), ra=ra.deg, dec=dec.deg, image=images))
    made = lsdb.from_dataframe(frame, lowest_order=2, highest_order=2, margin_threshold=None)
    made.write_catalog(path, as_collection=False, progress_bar=False)


class Memory(WorkerPlugin):
    "Notes the memory of a process after each partition that it has written."
    def __init__(self, log): self.log = log

    def transition(self, key, start, finish, **kwargs):
        if finish != "memory" or "perform_write" not in str(key): return
        with open(self.log/str(os.getpid()), "a") as log:
            print(psutil.Process().memory_info().rss/2**20, file=log)


def load(name): survey.load_predictor()


def measure(catalogue, folder, n_processes):
    "Seconds of a run, and MB of each process after each of its partitions."
    log = folder/f"memory of {n_processes}"
    log.mkdir()
    with dask.config.set(survey.KEEP_MEMORY):  # as `predict_catalog` starts processes
        cluster = LocalCluster(n_workers=n_processes, threads_per_worker=1, dashboard_address=None,
            env=dict(OMP_NUM_THREADS="1"))
    with cluster, Client(cluster) as client:
        client.register_plugin(Memory(log))
        names = list(cluster.scheduler.workers)
        client.gather([client.submit(load, name, workers=name) for name in names])
        started = time.perf_counter()
        counts = survey.predict_catalog(catalogue, folder/f"spectra of {n_processes}",
            scheduler=cluster.scheduler_address, progress=False)
        seconds = time.perf_counter() - started
    assert sum(counts.values()) == N_PARTITIONS*N_GALAXIES, counts
    return seconds, [np.loadtxt(path) for path in log.iterdir()]


def main():
    print("# How fast a survey is predicted\n")
    print(f"{runner.describe_device()}; processes of one core each. Made by "
        f"`benchmarks/survey.py`: {N_PARTITIONS} partitions of {N_GALAXIES} galaxies with images "
        "of 64 pixels, from a HATS catalogue to a HATS catalogue.\n")
    print("| processes | seconds | galaxies/s | against one process |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_catalogue(folder/"hats")
        results = {n: measure(folder/"hats", folder, n) for n in PROCESSES}
    for n, (seconds, _) in results.items():
        print(f"| {n} | {seconds:.0f} | {N_PARTITIONS*N_GALAXIES/seconds:.0f} | "
            f"{results[1][0]/seconds:.2f} |")
    (memory,) = results[1][1]
    assert len(memory) == N_PARTITIONS
    print("\n| partitions written by one process | its memory, MB |\n|---|---|")
    for n in (1, 10, 20, 30, 40, 50): print(f"| {n} | {memory[n - 1]:.0f} |")


if __name__ == "__main__": main()
