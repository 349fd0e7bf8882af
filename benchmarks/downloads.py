"""How fast a sample downloads from a local archive, beside astropy's download_file.

    python benchmarks/downloads.py              some minutes
    python benchmarks/downloads.py --rounds 1 --galaxies 20
"""
import argparse
import contextlib
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from astropy.utils.data import conf, download_file

from specpred.config import ArchiveParameters, MockParameters
from specpred.download import ArchiveClient, download
from specpred.local_archive import ArchiveURLs, Faults, serve_forever
from specpred.mock_survey import make_survey
from specpred.surveys import PS1

RESULTS = Path(__file__).with_suffix(".md")
SIZE, LATENCY = 32, 0.1  # pixels; seconds


class LoggingClient(ArchiveClient):
    "Keeps the addresses of all requests."
    def __init__(self, parameters):
        super().__init__(parameters)
        self.log = []

    def request(self, url, *limits):
        self.log.append(str(url))
        return super().request(url, *limits)


@contextlib.contextmanager
def served(mock, latency):
    "Serves the mock survey in a process of its own; every answer takes `latency` seconds longer."
    faults = Faults(passing=1.0, kinds=("latency",), latency=latency) if latency else None
    context = multiprocessing.get_context("spawn")
    ports = context.SimpleQueue()
    process = context.Process(target=serve_forever, args=(mock, 0, faults, ports.put), daemon=True)
    process.start()
    try:
        yield ArchiveURLs.local(ports.get())
    finally:
        process.terminate()


def with_specpred(urls, folder, concurrency):
    "Downloads everything; the addresses of all requests."
    parameters = ArchiveParameters(**asdict(urls), concurrency=concurrency, split=(1, 0, 0, 0))
    client = LoggingClient(parameters)
    download(parameters, folder/"raw", PS1, SIZE, seed=1, progress=False, client=client)
    return client.log


def with_astropy(addresses, folder):
    "The same requests one at a time, as the published script makes them."
    with conf.set_temp("allow_internet", True):
        for n, address in enumerate(addresses):
            path = download_file(address, cache=False, show_progress=False)
            shutil.move(path, folder/f"{n}.fits")


def seconds(function, *arguments):
    "How long it takes with a new folder."
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        function(*arguments, Path(folder))
        return time.perf_counter() - start


def requests_per_second(mock, latency, rounds):
    "Median rate of each candidate; they take turns."
    with served(mock, latency) as urls, tempfile.TemporaryDirectory() as folder:
        addresses = with_specpred(urls, Path(folder), 8)
        candidates = {"astropy's download_file": lambda folder: with_astropy(addresses, folder)}
        for n in (1, 8, 32):
            candidates[f"specpred, {n} at once"] = (
                lambda folder, n=n: with_specpred(urls, folder, n))
        times = {name: [] for name in candidates}
        for _ in range(rounds):
            for name, candidate in candidates.items():
                times[name].append(seconds(candidate))
    return {name: len(addresses)/statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--galaxies", type=int, default=96)
    chosen = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        mock = Path(folder)/"mock"
        numbers = MockParameters(n_galaxies=chosen.galaxies, stamp_size=40)
        make_survey(numbers, mock, seed=1, progress=False)
        quick = requests_per_second(mock, 0, chosen.rounds)
        slow = requests_per_second(mock, LATENCY, 1)
    base = next(iter(quick))
    lines = ["# What a download costs", "",
        f"Made by `downloads.py`: {os.cpu_count()} cores {platform.machine()}, client and server "
        f"on the same machine, cutouts of {SIZE} pixels, {chosen.galaxies} galaxies, median of "
        f"{chosen.rounds} rounds in turn (with the delay one round), load average {load:.1f} "
        "before. specpred checks every file and writes it to the disk for good (fsync); "
        "download_file does neither.", "",
        f"| | requests/s | times astropy's | requests/s, answers {LATENCY} s later "
        "| times astropy's |", "|---|---|---|---|---|"]
    for name in quick:
        lines.append(f"| {name} | {quick[name]:.0f} | {quick[name]/quick[base]:.1f} "
            f"| {slow[name]:.0f} | {slow[name]/slow[base]:.1f} |")
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
