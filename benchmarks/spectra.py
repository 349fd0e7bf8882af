"""What the spectra cost: gap filling beside the published recipe, the full sample out of core, and files to store. Each case runs in a
process of its own, whose largest memory is reported. `--quick` tries everything on a small scale."""
import argparse, json, os, platform, subprocess, sys, tempfile, time
from pathlib import Path
from memory import OwnMemory, peak_memory

RESULTS = Path(__file__).with_suffix(".md")
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def sample(n, bins=1000, seed=0):
    "Spectra of 20 smooth shapes with noise, and gaps at both ends and at single bins, as redshift and sky lines make them."
    import numpy as np
    rng = np.random.default_rng(seed)
    shapes = np.cumsum(rng.standard_normal((20, bins)), 1)/20
    missing = np.empty((n, bins), bool)
    flux, at = np.empty((n, bins), np.float32), np.arange(bins)
    for start in range(0, n, 4096):
        rows = slice(start, min(start + 4096, n))
        m = rows.stop - start
        flux[rows] = (4 + rng.standard_normal((m, 20))*0.8**np.arange(20) @ shapes + 0.05*rng.standard_normal((m, bins)))*rng.lognormal(0, 1, (m, 1))
        missing[rows] = (at < rng.integers(-60, 250, (m, 1))) | (at >= rng.integers(750, 1060, (m, 1))) | (rng.random((m, bins)) < 0.01)
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
    from specpred.spectra import iterative_pca
    x, missing = sample(n)
    start = time.perf_counter()
    iterative_pca(x, missing, 10, 20, device=os.environ.get("BENCHMARK_DEVICE"))
    return dict(seconds=time.perf_counter() - start)


@case
def on_disk(folder, n):
    "Writes single-precision spectra for `out_of_core`, whose memory shall not be that of making them."
    import numpy as np
    for name, values in zip(("flux", "missing"), sample(n)): np.save(folder/f"{name}.npy", values)
    return {}


@case
def out_of_core(folder, n):
    "Spectra and result on disk; both sizes that are compared are so large that torch is asked for a GPU."
    import numpy as np, torch
    from specpred.spectra import iterative_pca
    flux, missing = (np.load(folder/f"{name}.npy", mmap_mode="r") for name in ("flux", "missing"))
    out = np.lib.format.open_memmap(folder/"out.npy", "w+", np.float32, (n, 1000))
    start = time.perf_counter()
    with OwnMemory() as own: iterative_pca(flux, missing, 10, 20, out=out, device=os.environ.get("BENCHMARK_DEVICE"))
    return dict(seconds=time.perf_counter() - start, own=own.peak)


def make_files(folder, n):
    "n spec-lite files: 60 galaxies of the mock survey under many names."
    import numpy as np, pandas as pd
    from astropy.io import fits
    from specpred.config import MockParameters
    from specpred.formats import spectrum_path
    from specpred.mock_survey import make_survey
    from specpred.spectra import spectrum_file
    survey = make_survey(MockParameters(n_galaxies=1, n_spectra_only=60, galaxies_per_side=1, stamp_size=48), folder/"mock", 1, n_jobs=1, progress=False)
    (folder/"spectra").mkdir()
    contents = []
    for g in survey.itertuples():
        path = folder/"mock"/"sas"/spectrum_path("26", g.plate, g.mjd, g.fiberid)
        with fits.open(path) as hdus:  # where plate, night and fibre are
            places = {name.lower(): hdus[2].fileinfo()["datLoc"] + hdus[2].data.dtype.fields[name][1] for name in ("PLATE", "MJD", "FIBERID")}
        contents.append((path.read_bytes(), places))
    rows = []
    for i in range(n):
        g, (content, places) = survey.iloc[i % len(survey)], contents[i % len(survey)]
        content, name = bytearray(content), dict(plate=1 + i//640, mjd=51602, fiberid=1 + i % 640)
        for key, value in name.items(): content[places[key]:places[key] + 4] = value.to_bytes(4, "big")
        spectrum_file(folder/"spectra", **name).write_bytes(content)
        rows.append(dict(specobjid=np.uint64(2**60 + i), **name, redshift=g.z_observed, has_spectrum=True,
            split=("train", "train", "train", "valid", "test")[i % 5]))
    pd.DataFrame(rows).to_parquet(folder/"catalogue.parquet")


@case
def store(folder, n):
    import pandas as pd
    from specpred.spectra import build_store
    catalogue = pd.read_parquet(folder/"catalogue.parquet").iloc[:n]
    start = time.perf_counter()
    left_out = build_store(catalogue, folder/"spectra", folder/f"spectra-{n}.zarr", progress=False)
    if left_out: raise SystemExit(f"spectra were left out: {left_out}")
    return dict(seconds=time.perf_counter() - start)


def measure(name, n, folder, threads):
    "Runs a case in another process: seconds, and its largest memory in MB."
    environment = os.environ | {key: str(threads) for key in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run([sys.executable, __file__, "--case", name, "--n", str(n), "--folder", str(folder)],
        capture_output=True, text=True, env=environment)
    if done.returncode: raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def setting(threads):
    import numpy as np
    return (f"{os.cpu_count()} cores {platform.machine()}, {threads} threads, numpy {np.__version__}, load average {os.getloadavg()[0]:.1f} at the start; "
        "every case in a process of its own, memory is that of the whole process, torch and all, at its peak.")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="rounds of the comparison with the recipe; the fastest counts")
    for hidden in ("case", "n", "folder"): parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        found = CASES[chosen.case](Path(chosen.folder), int(chosen.n))
        print(json.dumps(found | dict(memory=peak_memory())))
        return
    few, many, files = (500, 44_000, 600) if chosen.quick else (2000, 64_000, 3000)
    lines = ["# What the spectra cost", "", f"Made by `spectra.py`. {setting(chosen.threads)}", "", "## Filling gaps, 10 eigenvectors, 20 iterations", "",
        "| spectra × bins | published recipe, s | ours, s | ratio |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        rounds = [[measure(name, few, folder, chosen.threads)["seconds"] for name in ("recipe", "ours")] for _ in range(chosen.repeats)]
        theirs, own = (min(r[i] for r in rounds) for i in (0, 1))
        lines += [f"| {few} × 1000 | {theirs:.1f} | {own:.2f} | **{theirs/own:.1f}** |", "",
            "| spectra × 1000 bins, single precision on disk | s | peak memory of its own, MB | with the pages of the files, MB |",
            "|---|---|---|---|"]
        for n in (many//2, many):
            measure("on_disk", n, folder, chosen.threads)
            found = measure("out_of_core", n, folder, chosen.threads)
            lines.append(f"| {n} | {found['seconds']:.0f} | {found['own']:.0f} | {found['memory']:.0f} |")
        lines += ["", "## Files to store", "", "Lite files, read, rebinned, masked, filled with a basis fitted on three fifths of them, and packed.", "",
            "| files | s | spectra/s | peak memory, MB |", "|---|---|---|---|"]
        make_files(Path(folder), files)
        for n in (files//3, files):
            found = measure("store", n, folder, chosen.threads)
            lines.append(f"| {n} | {found['seconds']:.1f} | **{n/found['seconds']:.0f}** | {found['memory']:.0f} |")
    print("\n".join(lines))
    if not chosen.quick: RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__": main()
