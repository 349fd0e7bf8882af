"""How fast and with how much memory a sample downloads from a local archive that never fails, beside astropy's download_file one at a time.

    python benchmarks/downloads.py           about five minutes
    python benchmarks/downloads.py --quick   a minute, small numbers
"""
import argparse, json, os, platform, shutil, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np
from specpred.archives import BANDS, PS1_SOUTH, Faults, _files_of_survey, _miniature_survey, download, serve
from specpred.config import ArchiveParameters

RESULTS = Path(__file__).with_suffix(".md")
BASE, CONCURRENCY = "astropy's download_file", (1, 8, 32)


def one_at_a_time(survey, table, urls, size, folder):
    "Every file, and the lists of those of each galaxy, by `astropy.utils.data.download_file` without its cache, moved into `folder`; the number of files."
    from astropy.utils.data import conf, download_file
    get = lambda url: download_file(url, cache=False, show_progress=False)
    files = _files_of_survey(survey, table, size)
    with conf.set_temp("allow_internet", True):
        for row in table[table.dec > PS1_SOUTH].itertuples():
            os.remove(get(f"{urls.ps1_url}/ps1filenames.py?ra={row.ra:.8f}&dec={row.dec:.8f}&size={size}&format=fits&filters={BANDS}"))
        for n, (target, _) in enumerate(files.values()): shutil.move(get(urls.sas_url.removesuffix("/sas") + target), folder/f"{n}.fits")
    return len(files)


def rates(where, size, latency, rounds):
    "Median files per second of each candidate, taken in turn, on the survey and its table that `where` has for it; `latency` makes every answer wait."
    found = {name: [] for name in where}
    faults = Faults(passing=1.0, kinds=("latency",), latency=latency) if latency else None
    for turn in range(rounds):
        for name, (survey, table) in where.items():
            with serve(survey, faults=faults) as urls, tempfile.TemporaryDirectory() as tmp:
                started = time.perf_counter()
                if name == BASE: n = one_at_a_time(survey, table, urls, size, Path(tmp))
                else:
                    catalogue = download(ArchiveParameters(**vars(urls), concurrency=name), Path(tmp)/"raw", size, 1, progress=False)
                    n = int(catalogue.has_spectrum.sum() + 5*catalogue.has_images.sum())
                found[name].append(n/(time.perf_counter() - started))
                print(f"round {turn + 1}, {name}: {found[name][-1]:.0f} files/s", flush=True)
    return {name: float(np.median(values)) for name, values in found.items()}


MEMORY = """
import json, sys
path, urls, raw, size, n_max = json.loads(sys.argv[1])
sys.path[:] = path
from specpred.archives import ArchiveParameters, download
# getrusage's peak would be that of the process that started this one
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])/1000
before = peak()
n = len(download(ArchiveParameters(**urls, n_max=n_max), raw, size, 1, progress=False))
print(json.dumps([n, before, peak()]))
"""


def memory(survey, size, n_max):
    "Galaxies, and the peak memory of a downloading process before and after, MB."
    with serve(survey) as urls, tempfile.TemporaryDirectory() as tmp:
        arguments = json.dumps((sys.path, vars(urls), f"{tmp}/raw", size, n_max))
        return json.loads(subprocess.run([sys.executable, "-c", MEMORY, arguments], check=True, capture_output=True, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small numbers, for trying; writes nothing")
    quick, size = parser.parse_args().quick, 24
    per_side, n_small, n_large, rounds = (2, 5, 12, 1) if quick else (7, 167, 1667, 3)
    with tempfile.TemporaryDirectory() as tmp:
        survey, little, many = (Path(tmp)/name for name in ("survey", "little", "many"))
        table, short = (_miniature_survey(folder, n_cells=3, per_side=n, stamp=40) for folder, n in ((survey, per_side), (little, 2 if quick else 3)))
        _miniature_survey(many, n_cells=17 if not quick else 3, per_side=10 if not quick else per_side, stamp=40)
        plain = rates(dict.fromkeys((BASE, *CONCURRENCY), (survey, table)), size, 0, rounds)
        # one request at a time is as slow for a few galaxies as for many
        slow = rates({name: (survey, table) if name in CONCURRENCY[1:] else (little, short) for name in plain}, size, 0.1, 1)
        few, lots = memory(many, size, n_small), memory(many, size, n_large)
    rows = [f"| {name if isinstance(name, str) else f'specpred, {name} at once'} | {plain[name]:.0f} | {plain[name]/plain[BASE]:.1f} | "
        f"{slow[name]:.0f} | {slow[name]/slow[BASE]:.1f} |" for name in plain]
    lines = ["# What a download costs", "", f"Made by `downloads.py`: {os.cpu_count()} cores {platform.machine()}, Python "
        f"{platform.python_version()}, client and server on the same machine, cutouts of {size} pixels, {len(table)} galaxies, median of {rounds} "
        f"rounds in turn (with the delay one round, and {len(short)} galaxies where it is one request at a time), load average "
        f"{os.getloadavg()[0]:.1f}. specpred checks every file and writes it to the disk for good (fsync); download_file does neither.", "",
        f"| | files/s | times {BASE} | files/s where every answer takes 0.1 s longer | times {BASE} |", "|---|---|---|---|---|", *rows, "",
        "| galaxies | files | memory before, MB | at most, MB | growth, MB |", "|---|---|---|---|---|",
        *(f"| {n:,} | {6*n:,} | {before:.0f} | {after:.0f} | {after - before:.0f} |" for n, before, after in (few, lots))]
    print("\n".join(lines))
    if not quick: RESULTS.write_text("\n".join(lines) + "\n")
