"""What the spectra cost: gap filling beside the published recipe, samples on disk, and files to a
store. Each case runs in a process of its own, whose largest memory is reported. `--quick` tries
everything on a small scale."""
import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory import OwnMemory, peak_memory

RESULTS = Path(__file__).with_suffix(".md")
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def sample(n, bins=1000, seed=0):
    "Spectra of 20 smooth shapes with noise, and gaps at both ends and at single bins."
    import numpy as np
    rng = np.random.default_rng(seed)
    shapes = np.cumsum(rng.standard_normal((20, bins)), 1)/20
    missing = np.empty((n, bins), bool)
    flux, at = np.empty((n, bins), np.float32), np.arange(bins)
    for start in range(0, n, 4096):
        rows = slice(start, min(start + 4096, n))
        m = rows.stop - start
        block = 4 + rng.standard_normal((m, 20))*0.8**np.arange(20) @ shapes
        block += 0.05*rng.standard_normal((m, bins))
        flux[rows] = block*rng.lognormal(0, 1, (m, 1))
        blue, red = rng.integers(-60, 250, (m, 1)), rng.integers(750, 1060, (m, 1))
        missing[rows] = (at < blue) | (at >= red) | (rng.random((m, bins)) < 0.01)
    return flux, missing


@case
def recipe(folder, n):
    from literal_pca import literal_pca
    x, missing = sample(n)
    start = time.perf_counter()
    literal_pca(x, missing, 10, 20)
    return dict(seconds=time.perf_counter() - start)


@case
def ours(folder, n):
    from specpred.eigenspectra import iterative_pca
    x, missing = sample(n)
    start = time.perf_counter()
    iterative_pca(x, missing, 10, 20)
    return dict(seconds=time.perf_counter() - start)


@case
def on_disk(folder, n):
    "Writes single-precision spectra for `out_of_core`, whose memory is not that of making them."
    import numpy as np
    for name, values in zip(("flux", "missing"), sample(n), strict=True):
        np.save(folder/f"{name}.npy", values)
    return {}


@case
def out_of_core(folder, n):
    "Spectra and result on disk."
    import numpy as np
    from specpred.eigenspectra import iterative_pca
    flux, missing = (np.load(folder/f"{name}.npy", mmap_mode="r") for name in ("flux", "missing"))
    out = np.lib.format.open_memmap(folder/"out.npy", "w+", np.float32, (n, 1000))
    start = time.perf_counter()
    with OwnMemory() as own: iterative_pca(flux, missing, 10, 20, out=out)
    return dict(seconds=time.perf_counter() - start, own=own.peak)


def make_files(folder, n):
    "n spec-lite files: 60 galaxies of the mock survey under many names."
    from dataclasses import replace

    import numpy as np
    import pandas as pd
    from specpred.config import MockParameters
    from specpred.formats import (read_sdss, sdss_spectrum_bytes, spectrum_name,
        spectrum_path)
    from specpred.mock_survey import make_survey
    few = MockParameters(n_galaxies=1, n_spectra_only=59, galaxies_per_side=1, stamp_size=48)
    survey = make_survey(few, folder/"mock", 1, n_jobs=1, progress=False)
    paths = [spectrum_path("26", g.plate, g.mjd, g.fiberid) for g in survey.itertuples()]
    spectra = [read_sdss(folder/"mock"/"sas"/path) for path in paths]
    (folder/"spectra").mkdir()
    splits = ("train", "train", "train", "valid", "test")
    rows = []
    for i in range(n):
        name = dict(plate=1 + i//640, mjd=51602, fiberid=1 + i % 640)
        spectrum = replace(spectra[i % len(spectra)], **name)
        (folder/"spectra"/spectrum_name(**name)).write_bytes(sdss_spectrum_bytes(spectrum))
        rows.append(dict(specobjid=np.uint64(2**60 + i), **name, has_spectrum=True,
            split=splits[i % 5], redshift=survey.z_observed.iloc[i % len(spectra)]))
    pd.DataFrame(rows).to_parquet(folder/"catalogue.parquet")


@case
def store(folder, n):
    import pandas as pd
    from specpred.config import SpectraParameters
    from specpred.eigenspectra import build_store
    catalogue = pd.read_parquet(folder/"catalogue.parquet").iloc[:n]
    start = time.perf_counter()
    left_out = build_store(catalogue, folder/"spectra", folder/f"store-{n}", SpectraParameters(),
        progress=False)
    if left_out: raise SystemExit(f"spectra were left out: {left_out}")
    return dict(seconds=time.perf_counter() - start)


def measure(name, n, folder, threads):
    "Runs a case in another process: seconds, and its largest memory in MB."
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    command = [sys.executable, __file__, "--case", name, "--n", str(n), "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True,
        env=os.environ | dict.fromkeys(variables, str(threads)))
    if done.returncode: raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def setting(threads):
    import numpy as np
    load = os.getloadavg()[0]
    return (f"{os.cpu_count()} cores {platform.machine()}, {threads} threads, "
        f"numpy {np.__version__}, load average {load:.1f} at the start; every case in a process of "
        "its own, memory is that of the whole process at its peak.")


def compare_with_recipe(n, folder, chosen):
    rounds = [[measure(name, n, folder, chosen.threads)["seconds"] for name in ("recipe", "ours")]
        for _ in range(chosen.repeats)]
    theirs, own = map(min, zip(*rounds, strict=True))
    return ["## Filling gaps, 10 eigenvectors, 20 iterations", "",
        "| spectra × bins | published recipe, s | ours, s | ratio |", "|---|---|---|---|",
        f"| {n} × 1000 | {theirs:.1f} | {own:.2f} | **{theirs/own:.1f}** |", ""]


def samples_on_disk(sizes, folder, chosen):
    lines = ["| spectra × 1000 bins, single precision on disk | s | peak memory of its own, MB "
        "| with the pages of the files, MB |", "|---|---|---|---|"]
    for n in sizes:
        measure("on_disk", n, folder, chosen.threads)
        result = measure("out_of_core", n, folder, chosen.threads)
        numbers = [f"{result[name]:.0f}" for name in ("seconds", "own", "memory")]
        lines.append(f"| {n} | {' | '.join(numbers)} |")
    return [*lines, ""]


def files_to_store(sizes, folder, chosen):
    make_files(Path(folder), max(sizes))
    lines = ["## Files to store", "", "Lite files, read, rebinned, masked, filled with a basis "
        "fitted on three fifths of them, and written.", "",
        "| files | s | spectra/s | peak memory, MB |", "|---|---|---|---|"]
    for n in sizes:
        result = measure("store", n, folder, chosen.threads)
        rate = n/result["seconds"]
        lines.append(f"| {n} | {result['seconds']:.1f} | **{rate:.0f}** | {result['memory']:.0f} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3,
        help="rounds of the comparison with the recipe; the fastest counts")
    for hidden in ("--case", "--n", "--folder"): parser.add_argument(hidden, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        result = CASES[chosen.case](Path(chosen.folder), int(chosen.n))
        print(json.dumps(result | dict(memory=peak_memory())))
        return
    few, many, files = (500, 8000, 600) if chosen.quick else (2000, 64_000, 3000)
    lines = ["# What the spectra cost", "", f"Made by `spectra.py`. {setting(chosen.threads)}", ""]
    with tempfile.TemporaryDirectory() as folder:
        lines += compare_with_recipe(few, folder, chosen)
        lines += samples_on_disk((many//2, many), folder, chosen)
        lines += files_to_store((files//3, files), folder, chosen)
    print("\n".join(lines))
    if not chosen.quick: RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__": main()
