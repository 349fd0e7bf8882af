"""Timings that a busy machine disturbs little: candidates take turns, medians are reported."""
import argparse
import os
import platform
import random
import statistics
import time
from pathlib import Path

import psutil
import torch
from tqdm.auto import tqdm

RESULTS = Path(__file__).parent/"deconv.md"
TITLE = """# What deconvolution costs

Made by `deconv_layers.py` and `models.py`; ratios within one table are what to compare.
"""
LOAD = os.getloadavg()[0]  # before anything is measured


def arguments(description, repeats):
    "Command line that the benchmarks share."
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=repeats,
        help="rounds in which every candidate is timed once")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--cpu-time", action="store_true",
        help="CPU seconds instead of elapsed ones: for a busy machine, with --threads 1")
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--side", type=int, default=224, help="pixels, of the models' images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true",
        help="bfloat16 autocast and channels-last images")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


def rounds(steps, chosen):
    """Seconds in each round of each of the functions `steps`, a dict, after one round to warm up.
    Every round has another order, since what one leaves in the caches helps or harms the next."""
    clock = time.process_time if chosen.cpu_time else time.perf_counter
    seconds, order = {name: [] for name in steps}, random.Random(0)
    for turn in tqdm(range(chosen.repeats + 1), leave=False):
        for name, step in order.sample(list(steps.items()), len(steps)):
            start = clock()
            step()
            if chosen.device != "cpu": torch.accelerator.synchronize()
            if turn: seconds[name].append(clock() - start)
    return seconds


def medians(steps, chosen):
    "Median seconds of each of the functions `steps`."
    return {name: statistics.median(times) for name, times in rounds(steps, chosen).items()}


def ratio(times, baseline):
    "Median over rounds of the ratio of two times: load changes between rounds, hardly within one."
    return statistics.median(a/b for a, b in zip(times, baseline, strict=True))


def processor():
    "Name of the processor."
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def setting(chosen):
    "One line on where and how the numbers came about."
    machine = torch.cuda.get_device_name() if chosen.device != "cpu" else (
        f"{os.cpu_count()} cores {platform.machine()} ({processor()}), "
        f"{psutil.virtual_memory().total/2**30:.0f} GiB, {chosen.threads} "
        f"thread{'s'*(chosen.threads > 1)}")
    precision = "bfloat16 autocast, channels last" if chosen.bf16 else "float32"
    return (f"{machine}, torch {torch.__version__}, {precision}"
            f"{', torch.compile' if chosen.compile else ''}, batch {chosen.batch}, "
            f"median {'CPU ' if chosen.cpu_time else ''}time of {chosen.repeats} interleaved "
            f"rounds, load average {LOAD:.1f} before.")


def label(chosen):
    "The end of a heading: what is not the default."
    options = ", bf16"*chosen.bf16 + ", compiled"*chosen.compile
    return f"{options}, {chosen.device}"


def write(heading, lines, results=RESULTS, title=TITLE):
    "Replaces the section of that heading in a file of results, or adds it."
    text = results.read_text() if results.exists() else title
    before, found, after = text.partition(f"\n## {heading}\n")
    rest = after.partition("\n## ")[1:] if found else ("", "")
    section = f"\n## {heading}\n\n" + "\n".join(lines) + "\n"
    results.write_text(before.rstrip("\n") + "\n" + section + "".join(rest))
    print("\n".join(lines))
