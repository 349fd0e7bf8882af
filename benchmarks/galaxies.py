"Images for the benchmarks of stores and loaders: bright disks on noise, which compress like real."
import numpy as np

from specpred.config import random_generator

NOISE = np.array([30, 40, 45, 90, 200], "f4")  # nJy a pixel, in the bands of Pan-STARRS1


def galaxies(n, size, seed=0):
    "(n, bands, size, size) float32 nJy."
    rng = random_generator(seed, "benchmark")
    y, x = np.mgrid[:size, :size] - (size - 1)/2
    disk = np.exp(-np.hypot(x, 1.3*y)/(size/18)).astype("f4")
    flux = rng.standard_normal((n, len(NOISE), size, size), dtype="f4")*NOISE[:, None, None]
    return flux + disk*rng.lognormal(8, 1, (n, len(NOISE), 1, 1)).astype("f4")
