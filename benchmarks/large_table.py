"""A table of a million positions: what reading and checking it takes, as `specpred predict --table`
does before it asks for the first cutout.

    python benchmarks/large_table.py > benchmarks/large_table.md"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

READ = """
import resource, sys, time
from specpred.catalogue import read_table
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
table = read_table(sys.argv[1])
seconds = time.perf_counter() - started
print(len(table), seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1024)
"""


def main():
    print("# Tables with many rows\n")
    print(f"{os.cpu_count()} cores. Made by `benchmarks/large_table.py`: `read_table` in a process "
        "of its own; memory is what is added to that of the imports at the most.\n")
    print("| rows | kind | file, MB | seconds | memory, MB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for n in (10_000, 100_000, 1_000_000):
            rng = np.random.default_rng(0)
            frame = pd.DataFrame(dict(ra=rng.uniform(0, 360, n), name=[f"galaxy {k}" for k in
                range(n)], dec=rng.uniform(-30, 90, n), magnitude=rng.normal(17, 1, n)))
            for kind in ("csv", "parquet"):
                path = Path(folder)/f"table.{kind}"
                if kind == "csv": frame.to_csv(path, index=False)
                else: frame.to_parquet(path)
                done = subprocess.run([sys.executable, "-W", "ignore", "-c", READ, path],
                    capture_output=True, text=True, check=True)
                rows, seconds, memory = map(float, done.stdout.split())
                assert rows == n, done.stderr
                print(f"| {n:,} | {kind} | {path.stat().st_size/1e6:.1f} | {seconds:.1f} | "
                    f"{memory:.0f} |", flush=True)


if __name__ == "__main__": main()
