"""Timings that a busy machine disturbs as little as possible: the candidates take turns, and the median is reported."""
import argparse, os, platform, random, time
from pathlib import Path
import torch
from tqdm.auto import tqdm

RESULTS = Path(__file__).parent/"deconv.md"
LOAD = os.getloadavg()[0]  # before anything is measured


def arguments(description, repeats):
    "Command line that the benchmarks share."
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds in which every candidate is timed once")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds instead of elapsed ones: for a busy machine, with --threads 1")
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast and channels-last images")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


def medians(steps, chosen):
    """Median seconds of each of the functions `steps`, a dict, timed in turn after one round to warm up, in another order every round: what one
    leaves in the caches helps or harms each of the others."""
    clock = time.process_time if chosen.cpu_time else time.perf_counter
    seconds, order = {name: [] for name in steps}, random.Random(0)
    for turn in tqdm(range(chosen.repeats + 1), leave=False):
        for name, step in order.sample(list(steps.items()), len(steps)):
            start = clock()
            step()
            if chosen.device != "cpu": torch.accelerator.synchronize()
            if turn: seconds[name].append(clock() - start)
    return {name: sorted(times)[len(times)//2] for name, times in seconds.items()}


def setting(chosen):
    "One line on where and how the numbers came about."
    device = (f"{os.cpu_count()} cores {platform.machine()}, {chosen.threads} thread{'s'*(chosen.threads > 1)}" if chosen.device == "cpu"
        else torch.cuda.get_device_name())
    precision = "bfloat16 autocast, channels last" if chosen.bf16 else "float32"
    return (f"{device}, torch {torch.__version__}, {precision}{', torch.compile' if chosen.compile else ''}, batch {chosen.batch}, "
            f"median {'CPU ' if chosen.cpu_time else ''}time of {chosen.repeats} interleaved rounds, load average {LOAD:.1f} before.")


def write(heading, lines, results=RESULTS,
        title="# What deconvolution costs\n\nMade by `deconv_layers.py` and `models.py`; ratios within one row of runs are what to compare.\n"):
    "Replaces the section of that heading in a file of results, deconv.md, or adds it."
    text = results.read_text() if results.exists() else title
    before, found, after = text.partition(f"\n## {heading}\n")
    rest = after.partition("\n## ")[1:] if found else ("", "")
    results.write_text(before.rstrip("\n") + "\n" + f"\n## {heading}\n\n" + "\n".join(lines) + "\n" + "".join(rest))
    print("\n".join(lines))
