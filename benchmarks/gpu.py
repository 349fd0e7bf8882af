"""Training throughput on a CUDA machine: mock galaxies rendered by all cores, training steps fed by
the project's own loader and learner, and where the time of a step goes.

    python benchmarks/gpu.py                          everything, about a quarter of an hour
    python benchmarks/gpu.py --parts train profile    with the galaxies of an earlier call
    python benchmarks/gpu.py --table                  only the table of the results so far
    python benchmarks/gpu.py --dry-run                tiny, with or without a GPU

Each result is appended to a JSON-lines file as soon as it is measured. The next call goes on from
there, so remove that file to measure anew. The table goes to gpu.md beside this file, or to the
folder in a dry run."""
import argparse
import gc
import json
import os
import shutil
import subprocess
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import joblib
import numpy as np
import pandas as pd
import torch
from fastai.basics import Callback, CancelFitException, DataLoaders
from interleaved import processor
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm.auto import tqdm

from specpred.config import TrainingParameters, find_training, random_generator, seed_everything
from specpred.deconv import FastDeconv
from specpred.images import Augmentation, ImageStore, sky_statistics, storage_scale
from specpred.models import PhotometryBranch
from specpred.surveys import PS1
from specpred.training import (
    BatchLoader, EpochCheckpoint, GalaxySet, Sample, learning_rate, make_learner, make_sample)

SEED = 1
BLOCK = 25  # galaxies that a process renders at a time
TARGETS = ("log_mass", "redshift", "log_sfr", "mean_age", "oxygen", "av_stars")
PARTS = ("render", "train", "profile")
SECONDS = dict(render=420, train=400, profile=120)  # limits of the parts


class Variant(NamedTuple):
    bf16: bool = True  # autocast
    compiled: bool = False
    channels_last: bool = False
    deterministic: bool = True  # as `seed_everything` wants it
    graphs: bool = False  # CUDA graphs of the compiled model


ALL = "bf16, compiled, channels last, not deterministic"
VARIANTS = {
    "bf16": Variant(),
    "bf16, compiled": Variant(compiled=True),
    "bf16, CUDA graphs": Variant(compiled=True, graphs=True),
    "bf16, channels last": Variant(channels_last=True),
    "float32": Variant(bf16=False),
    "bf16, not deterministic": Variant(deterministic=False),
    ALL: Variant(True, True, True, False)}


class Scale(NamedTuple):
    "How large a run is."
    models: tuple  # the most important first
    variants: tuple  # the first chooses the best batch
    batches: tuple  # the first for all variants, and the best of the others
    warm_up: int  # steps before the timed ones
    seconds: float  # of the timed steps
    profiled: int  # steps
    fit_on: int  # galaxies that the transform and the branch of photometry are fitted on
    backend: str  # of torch.compile


FULL = Scale(("xresnet18_hybrid", "xresnet18_hybrid-specpred", "xresnet18", "xresnet18_deconv"),
    tuple(VARIANTS), (128, 512, 1024), 6, 2., 10, 512, "inductor")
DRY = Scale(("deconv3", "photometry"), ("bf16", ALL, "float32"), (4, 8), 2, 0., 2, 8, "eager")


# Results

def driver():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try: return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
    except FileNotFoundError: return "unknown"


def machine(device):
    "What a result is valid for."
    if device.type == "cpu": return dict(device=processor(), driver="none")
    return dict(device=torch.cuda.get_device_name(device), driver=driver())


class Results:
    "Rows of a JSON-lines file, each with `facts`."
    def __init__(self, path, **facts):
        self.path, self.facts = Path(path), facts
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.rows = [json.loads(line) for line in lines]

    def find(self, **key):
        "Rows of this machine that have these entries."
        wanted = self.facts | key
        return [row for row in self.rows if all(row.get(k) == v for k, v in wanted.items())]

    def add(self, **row):
        row = self.facts | row
        self.rows.append(row)
        with open(self.path, "a") as file: file.write(json.dumps(row) + "\n")
        print({k: v for k, v in row.items() if k not in self.facts}, flush=True)


# Galaxies

class Gallery(NamedTuple):
    "Maps of files with N galaxies, shared by the processes that fill them."
    pixels: np.ndarray  # (N, bands, size, size) half precision, in units of `scale`
    noise: np.ndarray  # (N, bands) nJy a pixel
    scale: np.ndarray  # (N, bands) nJy
    targets: np.ndarray  # (N, 6) not standardised
    done: np.ndarray  # (N,) bool


def open_gallery(folder, n, size):
    "The gallery in a folder, empty where there is none."
    bands = len(PS1.bands)
    shapes = Gallery((bands, size, size), (bands,), (bands,), (len(TARGETS),), ())._asdict()
    types = Gallery("f2", "f4", "f4", "f4", "?")._asdict()
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = 2*n*bands*size**2, shutil.disk_usage(folder).free
    # the files are sparse: a process that fills them on a full disk is killed without a message
    if not (folder/"pixels.npy").exists() and needed > free:
        raise SystemExit(f"{folder} needs {needed/1e9:.0f} GB, and {free/1e9:.0f} GB are free.")
    maps = []
    for name, shape in shapes.items():
        path = folder/f"{name}.npy"
        if path.exists(): maps.append(np.load(path, mmap_mode="r+"))
        else: maps.append(np.lib.format.open_memmap(path, "w+", types[name], (n, *shape)))
    return Gallery(*maps)


def can_render():
    "Whether all that the mock's renderer imports is installed."
    try:
        import specpred.mock_survey  # noqa: F401
    except ImportError as error:
        print(f"Random images, since the mock's renderer cannot be imported: {error}")
        return False
    return True


def mock_galaxies(first, n, size):
    "Images (n, bands, size, size) in nJy, NaN where pixels are lost, and targets (n, 6)."
    from threadpoolctl import threadpool_limits

    from specpred.mock_light import draw_light
    from specpred.mock_survey import observe_stamps, stellar_library
    with threadpool_limits(limits=1):
        light = draw_light(stellar_library(), n, SEED, "gpu", first, survey=PS1)
        flux = observe_stamps(light, PS1, size, SEED, first)
    return flux, light.galaxies[list(TARGETS)].to_numpy(np.float32)


def random_galaxies(first, n, size):
    rng = random_generator(SEED, "gpu", first)
    flux = 100*rng.standard_normal((n, len(PS1.bands), size, size), np.float32)
    return flux, rng.standard_normal((n, len(TARGETS)), np.float32)


def render_block(folder, first, n, total, size, kind):
    "Fills the rows of a block; returns which."
    flux, targets = (mock_galaxies if kind == "mock" else random_galaxies)(first, n, size)
    mask = ~np.isfinite(flux)
    flux = np.where(mask, 0, flux)
    noise = sky_statistics(flux, mask)[1]
    scale = np.stack([storage_scale(*one, "float16") for one in zip(flux, noise, strict=True)])
    gallery, rows = open_gallery(folder, total, size), slice(first, first + n)
    gallery.pixels[rows] = flux/scale[:, :, None, None]
    gallery.noise[rows], gallery.scale[rows], gallery.targets[rows] = noise, scale, targets
    return rows


def render(gallery, folder, kind, n_jobs, limit, results):
    "Renders the blocks that are missing until the time is over."
    total, size = len(gallery.done), gallery.pixels.shape[-1]
    blocks = [k for k in range(0, total, BLOCK) if not gallery.done[k]]
    if not blocks: return
    start, before = time.monotonic(), gallery.done.sum()
    # joblib asks for the next block when a process is free, so that none begins after the limit
    in_time = (joblib.delayed(render_block)(folder, k, min(BLOCK, total - k), total, size, kind)
        for k in blocks if time.monotonic() - start < limit)
    parallel = joblib.Parallel(n_jobs, batch_size=1, return_as="generator")
    for rows in tqdm(parallel(in_time), "rendering", len(blocks), mininterval=10):
        gallery.done[rows] = True
        gallery.done.flush()
    rendered, seconds = int(gallery.done.sum() - before), time.monotonic() - start
    results.add(part="render", galaxies=rendered, of=total, per_second=rendered/seconds,
        processes=joblib.effective_n_jobs(n_jobs))


# Training data

class Data(NamedTuple):
    train: GalaxySet  # with all images on the device
    valid: GalaxySet
    few: DataLoaders  # some training galaxies, for `make_learner`


def sample_of(gallery, folder, at_most):
    "The galaxies that were rendered, four of them for validation."
    n, bands = gallery.noise.shape
    nothing = np.zeros((n, bands), np.float32)
    images = ImageStore(folder, PS1, gallery.pixels, np.arange(n, dtype=np.uint64),
        np.array(gallery.done), np.zeros(n, np.uint32), mask_fraction=nothing, exptime=nothing,
        sky=nothing, noise=np.array(gallery.noise), scale=np.array(gallery.scale),
        max_mask_fraction=1.)
    rows = np.flatnonzero(gallery.done)[:at_most]
    targets = gallery.targets[rows]
    targets = pd.DataFrame((targets - targets.mean(0))/targets.std(0))
    targets.columns = [f"target_{k + 1}" for k in targets]
    split = np.where(np.arange(len(rows)) < 4, "valid", "train")
    return images, targets.assign(specobjid=images.specobjid[rows], split=split)


def keep_on_device(galaxies, device):
    """Puts the images of a `GalaxySet` on the device, as its `memory` does, with the transform on
    the device: on one core of the CPU it takes minutes."""
    store = galaxies.images
    kept = torch.empty((len(galaxies), *store.shape[1:]), dtype=torch.float16, device=device)
    for part in np.array_split(np.arange(len(galaxies)), len(galaxies)//256 + 1):
        rows = galaxies.rows[part]
        flux = torch.from_numpy(store.pixels[rows]).to(device).float()
        flux *= torch.from_numpy(store.scale[rows]).to(device)[:, :, None, None]
        kept[part[0]:part[-1] + 1] = galaxies.transform(flux).clamp_(-6e4, 6e4)
    galaxies.values = kept


def load_data(gallery, folder, device, scale, results):
    "Training data on the device; measures the loading too."
    at_most = None
    if device.type == "cuda":  # as `training.memory_for` decides
        bytes_each = gallery.pixels[0].nbytes
        at_most = int(torch.cuda.mem_get_info(device)[0]/2/bytes_each)
    images, latents = sample_of(gallery, folder, at_most)
    sample = make_sample(images, latents, n_fit=scale.fit_on)
    few = Sample(images, sample.table.head(scale.fit_on + 4), sample.transform)

    start = time.perf_counter()
    few_kept = GalaxySet(few, "train", Augmentation(), SEED, device)
    synchronize(device)
    by_the_set = len(few_kept)/(time.perf_counter() - start)

    train = GalaxySet(sample, "train", Augmentation(), SEED)
    start = time.perf_counter()
    keep_on_device(train, device)
    synchronize(device)
    on_device = len(train)/(time.perf_counter() - start)
    if not results.find(part="load"):
        results.add(part="load", kept=len(train), by_the_set=by_the_set, on_device=on_device)

    valid = GalaxySet(sample, "valid", memory=device)
    return Data(train, valid, loaders(few_kept, valid, scale.batches[0], device))


def loaders(train, valid, batch, device):
    "As `training.batch_loaders` makes them."
    return DataLoaders(BatchLoader(train, bs=batch, shuffle=True, drop_last=True),
        BatchLoader(valid, bs=batch), device=device)


# Timing

def synchronize(device):
    if device.type != "cpu": torch.accelerator.synchronize()


def step_seconds(step, device, scale):
    "Seconds of a function that is called again and again; it never waits for the device."
    for _ in range(scale.warm_up): step()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(3): step()
    synchronize(device)
    n = max(3, int(3*scale.seconds/(time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(n): step()
    synchronize(device)
    return (time.perf_counter() - start)/n


class Steps(Callback):
    "Calls `begin` after some steps of an epoch and `end` after some more; then ends the fit."
    order = 99  # after all that belongs to the step
    n_steps = None

    def __init__(self, scale, variant=VARIANTS["bf16"]):
        self.scale, self.variant = scale, variant

    def before_epoch(self):
        if self.variant.deterministic: return
        # `EpochCheckpoint` has just asked for the opposite
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = True

    def after_batch(self):
        done = self.iter + 1
        if done == self.scale.warm_up: self.begin()
        elif self.n_steps and done == self.scale.warm_up + self.n_steps:
            self.end()
            raise CancelFitException


class Timer(Steps):
    "Times the steps; the last one before they begin tells how many fit into the time."
    def after_batch(self):
        if self.iter + 2 == self.scale.warm_up: self.mark = self.now()
        super().after_batch()

    def begin(self):
        self.mark, before = self.now(), self.mark
        fit_into_time = int(self.scale.seconds/(self.mark - before))
        self.n_steps = min(max(2, fit_into_time), self.n_iter - self.scale.warm_up)

    def end(self): self.step_seconds = (self.now() - self.mark)/self.n_steps

    def now(self):
        synchronize(self.dls.device)
        return time.perf_counter()


class Prepared(nn.Module):
    "A model under autocast, as by fastai's `to_bf16`, and its input in the model's memory format."
    def __init__(self, model, variant):
        super().__init__()
        self.model, self.variant = model, variant

    def forward(self, x):
        if self.variant.channels_last: x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.variant.bf16):
            return self.model(x).float()


def prepared_learner(name, variant, batch, data, device, scale):
    "The learner of `train_model`, with the model as the variant wants it."
    seed_everything(SEED, "training", name)
    # it measures photometry on all galaxies of the loader: a few are enough here
    learn = make_learner(name, data.few)
    learn.dls = loaders(data.train, data.valid, batch, device)
    enough = scale.warm_up + 2
    if len(learn.dls.train) < enough:
        raise ValueError(f"{len(data.train)} galaxies are less than {enough} batches of {batch}")
    model = learn.model.to(device)
    if variant.channels_last: model = model.to(memory_format=torch.channels_last)
    if variant.compiled:
        torch._dynamo.reset()
        mode = "reduce-overhead" if variant.graphs else None
        model.compile(backend=scale.backend, mode=mode, dynamic=False)
    learn.model = Prepared(model, variant)
    return learn


def fit(learn, name, callback):
    "Trains as `train_model` does, until the callback ends it."
    saver = EpochCheckpoint("never-written", dict(seed=SEED))
    with learn.no_bar(), learn.no_logging():
        rate = learning_rate(find_training(name), TrainingParameters())
        learn.fit_one_cycle(1, rate, cbs=[saver, callback])


def bare_seconds(learn, device, scale):
    "Seconds of a step of the learner's model and optimizer on one batch, without the learner."
    x, y = learn.dls.one_batch()
    x, y = x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)
    def step():
        learn.loss_func(learn.model(x), y).backward()
        learn.opt.step()
        learn.opt.zero_grad()
    learn.model.train()
    return step_seconds(step, device, scale)


def measure_training(name, variant, batch, data, device, scale):
    "Images per second of the learner and of a bare step, and peak memory."
    if device.type == "cuda": torch.cuda.reset_peak_memory_stats(device)
    learn = prepared_learner(name, variant, batch, data, device, scale)
    timer = Timer(scale, variant)
    start = time.perf_counter()
    fit(learn, name, timer)
    measured = dict(training=batch/timer.step_seconds, steps=timer.n_steps,
        fit_seconds=time.perf_counter() - start)
    if device.type == "cuda":
        without_images = torch.cuda.max_memory_allocated(device) - data.train.values.nbytes
        measured["peak_gib"] = without_images/2**30
    return measured | dict(bare=batch/bare_seconds(learn, device, scale))


def free_memory(device):
    gc.collect()
    if device.type == "cuda": torch.cuda.empty_cache()


def attempt(measure, *args):
    "What `measure` returns, or how it failed."
    try: return measure(*args)
    except torch.OutOfMemoryError: return dict(failed="out of memory")
    except Exception as error:  # whatever the compiler or a kernel raises: the others go on
        traceback.print_exc()
        first_line = str(error).strip().partition("\n")[0]
        return dict(failed=f"{type(error).__name__}: {first_line}")


def best_batch(results, name, batches):
    "The one of these with the most images per second."
    rows = [row for batch in batches
        for row in results.find(part="train", model=name, variant="bf16", batch=batch)]
    rows = [row for row in rows if "training" in row]
    return max(rows, key=lambda row: row["training"])["batch"] if rows else None


def configurations(results, scale):
    "Model, variant and batch, the most important first."
    for name in scale.models:
        for batch in scale.batches: yield name, "bf16", batch
    for variant in scale.variants[1:]:
        for name in scale.models:
            best = best_batch(results, name, scale.batches[1:])
            for batch in (scale.batches[0], best):
                if batch: yield name, variant, batch


def train(data, device, scale, limit, results):
    "All configurations that fit into the time."
    start = time.monotonic()
    for batch in scale.batches:
        if results.find(part="loader", batch=batch): continue
        loader = loaders(data.train, data.valid, batch, device).train
        batches = (each for _ in range(10**6) for each in loader)
        seconds = step_seconds(lambda batches=batches: next(batches), device, scale)
        results.add(part="loader", batch=batch, per_second=batch/seconds)
    for name, variant, batch in configurations(results, scale):
        key = dict(part="train", model=name, variant=variant, batch=batch)
        if results.find(**key): continue
        if time.monotonic() - start > limit:
            print(f"The time is over: {name}, {variant}, {batch} and the rest are left out.")
            return
        row = attempt(measure_training, name, VARIANTS[variant], batch, data, device, scale)
        results.add(**key, **row)
        free_memory(device)


# Profile

RANGES = ("augmentation", "photometry", "whitening", "optimizer")
GROUPS = {  # words in the names of operations and of those that call them
    "convolution": ("convolution",),
    "normalisation and activation": ("batch_norm", "batchnorm", "mish", "silu", "relu"),
    "copies": ("copy", "memcpy")}
ELSE = "everything else"


def labelled(label, function):
    def call(*args, **kwargs):
        with record_function(label): return function(*args, **kwargs)
    return call


@contextmanager
def ranges(learn):
    "Marks the parts of a step that names of operations do not tell."
    places = [("augmentation", GalaxySet, "batch"), ("photometry", PhotometryBranch, "forward"),
        ("whitening", FastDeconv, "_statistics"), ("whitening", FastDeconv, "_deconvolved"),
        ("optimizer", learn.opt, "step"), ("optimizer", learn.opt, "zero_grad")]
    with ExitStack() as patches:
        for label, owner, name in places:
            marked = labelled(label, getattr(owner, name))
            patches.enter_context(mock.patch.object(owner, name, marked))
        yield


class Profiler(Steps):
    def begin(self):
        self.n_steps = min(self.scale.profiled, self.n_iter - self.scale.warm_up)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available(): activities.append(ProfilerActivity.CUDA)
        synchronize(self.dls.device)
        self.profile = profile(activities=activities)
        self.profile.start()

    def end(self):
        synchronize(self.dls.device)
        self.profile.stop()


def with_callers(event):
    "An event and those that it lies in, the innermost first."
    while event is not None:
        yield event
        event = event.cpu_parent


def range_of(callers):
    return next((event.name for event in callers if event.name in RANGES), None)


def backward_node(callers):
    "The autograd node in whose backward pass an event is."
    return next((e for e in callers if "evaluate_function" in e.name), None)


def forward_ranges(events):
    "The range, or None, in which each node of the graph was made, by its number."
    found = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        callers = list(with_callers(event))
        # operations that make no node carry the number of the next: the last one made it
        if event.sequence_nr >= 0 and not backward_node(callers):
            found[event.sequence_nr] = range_of(callers)
    return found


def group_of(event, forward):
    callers = list(with_callers(event))
    node = backward_node(callers)
    label = range_of(callers) or (node and forward.get(node.sequence_nr))
    if label: return label
    for caller in callers:
        for group, words in GROUPS.items():
            if any(word in caller.name.lower() for word in words): return group
    return ELSE


def summary(events, n_steps, on_gpu):
    "Milliseconds by group and the largest kernels, launches and waits, all of one step."
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    # ranges also appear on the device, as annotations that span their kernels
    kernels = [event for event in events
        if event.device_type == DeviceType.CUDA and event.name not in RANGES]
    forward, groups = forward_ranges(on_host), Counter()
    for event in on_host:
        if event.name in RANGES and on_gpu: continue
        mine = sum(k.duration for k in event.kernels) if on_gpu else event.self_cpu_time_total
        if mine: groups[group_of(event, forward)] += mine
    total = sum(event.time_range.elapsed_us() for event in kernels)
    if on_gpu: groups[ELSE] += max(0, total - groups.total())  # kernels of no known operation
    top, calls = Counter(), Counter(event.name for event in kernels or on_host)
    for event in kernels or on_host:
        top[event.name] += event.time_range.elapsed_us() if kernels else event.self_cpu_time_total
    names = Counter(event.name for event in on_host)
    waits = {name: n/n_steps for name, n in names.items()
        if "Synchronize" in name or name == "aten::_local_scalar_dense"}
    launches = sum(n for name, n in names.items() if "LaunchKernel" in name)
    ms = 1e-3/n_steps
    return dict(groups={group: ms*us for group, us in groups.most_common()},
        busy_ms=ms*groups.total(), launches=launches/n_steps, waits=waits,
        top=[(name, ms*us, calls[name]/n_steps) for name, us in top.most_common(12)])


def place():
    "The line of this package, or else of fastai, that is running."
    frames = [frame for frame in traceback.extract_stack()
        if not frame.filename.endswith(("torch_core.py", "benchmarks/gpu.py"))]
    for package in ("/specpred/", "/fastai/"):
        mine = [frame for frame in frames if package in frame.filename]
        if mine:
            path = mine[-1].filename.rpartition(package)[2]
            return f"{package[1:]}{path}:{mine[-1].lineno} {mine[-1].name}"
    return "elsewhere"


class Waits(Steps):
    "Counts the places where the host waits for the device."
    def begin(self):
        self.n_steps = min(self.scale.profiled, self.n_iter - self.scale.warm_up)
        self.places, self.contexts = Counter(), ExitStack()
        self.contexts.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = self.count
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
            self.contexts.callback(torch.cuda.set_sync_debug_mode, "default")

    def count(self, message, *args, **kwargs):
        if "synchronizing CUDA operation" in str(message): self.places[place()] += 1

    def end(self): self.contexts.close()


def measure_profile(name, batch, data, device, scale):
    "Where the time of a step goes, and where the host waits."
    learn = prepared_learner(name, VARIANTS["bf16"], batch, data, device, scale)
    timer, profiler, waits = Timer(scale), Profiler(scale), Waits(scale)
    fit(learn, name, timer)
    with ranges(learn): fit(learn, name, profiler)
    fit(learn, name, waits)
    found = summary(profiler.profile.events(), profiler.n_steps, device.type == "cuda")
    print(f"{name}: the largest kernels, ms and calls a step")
    for kernel, ms, calls in found["top"]: print(f"{ms:9.3f} {calls:7.1f}  {kernel[:100]}")
    places = {where: n/waits.n_steps for where, n in waits.places.most_common()}
    return found | dict(step_ms=1e3*timer.step_seconds, places=places)


def profile_models(data, device, scale, limit, results):
    start, batch = time.monotonic(), scale.batches[0]
    for name in scale.models[:2]:
        key = dict(part="profile", model=name, variant="bf16", batch=batch)
        if results.find(**key) or time.monotonic() - start > limit: continue
        results.add(**key, **attempt(measure_profile, name, batch, data, device, scale))
        free_memory(device)


# Table

def training_table(rows):
    lines = ["| model | variant | batch | training, images/s | bare step, images/s "
        "| training / bare | peak, GiB |", "|---|---|---|---|---|---|---|"]
    best = {}
    for row in rows: best[row["model"]] = max(best.get(row["model"], 0), row.get("training", 0))
    for row in rows:
        start = f"| {row['model']} | {row['variant']} | {row['batch']} |"
        if "failed" in row:
            lines.append(f"{start} {row['failed'].replace('|', '/')} | | | |")
            continue
        rate, bare = row["training"], row["bare"]
        shown = f"**{rate:.0f}**" if rate == best[row["model"]] else f"{rate:.0f}"
        peak = f"{row['peak_gib']:.1f}" if "peak_gib" in row else ""
        lines.append(f"{start} {shown} | {bare:.0f} | {rate/bare:.2f} | {peak} |")
    return lines


def profile_lines(row):
    title = f"### A step of {row['model']}, {row['variant']}, batch {row['batch']}"
    if "failed" in row: return [title, "", row["failed"], ""]
    busy, step = row["busy_ms"], row["step_ms"]
    waits = ", ".join(f"{n:.1f} {name}" for name, n in row["waits"].items()) or "none"
    return [title, "", f"{step:.1f} ms without the profiler, of which the device is busy for "
        f"{busy:.1f} ms ({busy/step:.0%}). {row['launches']:.0f} kernel launches. "
        f"Calls that wait for the device: {waits}.", "",
        "| part | ms | share of the busy time |", "|---|---|---|",
        *(f"| {group} | {ms:.2f} | {ms/busy:.0%} |" for group, ms in row["groups"].items()), "",
        "| where the host waits | times a step |", "|---|---|",
        *(f"| {where} | {n:.1f} |" for where, n in row["places"].items()), "",
        "| largest kernels | ms | calls |", "|---|---|---|",
        *(f"| `{name[:80]}` | {ms:.2f} | {n:.0f} |" for name, ms, n in row["top"]), ""]


def section(rows):
    "Of one machine, one kind of images and one size."
    facts, parts = rows[0], {part: [row for row in rows if row["part"] == part]
        for part in ("render", "load", "loader", "train", "profile")}
    lines = [f"## {facts['device']}, {facts['images']} images of {facts['size']} pixels", "",
        f"torch {facts['torch']}, driver {facts['driver']}, {facts['cores']} CPU cores. "
        f"{facts['precision']}.", ""]
    for row in parts["render"]:
        made = "drawn and observed" if facts["images"] == "mock" else "random"
        lines += [f"Rendering: {row['galaxies']} of {row['of']} galaxies, {made}, "
            f"{row['per_second']:.1f} galaxies/s with {row['processes']} processes.", ""]
    for row in parts["load"]:
        lines += [f"{row['kept']} galaxies are kept on the device. Loading: "
            f"{row['by_the_set']:.0f} galaxies/s by `GalaxySet`, {row['on_device']:.0f} with the "
            "transform on the device.", ""]
    if parts["loader"]:
        lines += ["| batch | loader alone, images/s |", "|---|---|",
            *(f"| {row['batch']} | {row['per_second']:.0f} |" for row in parts["loader"]), ""]
    if parts["train"]: lines += [*training_table(parts["train"]), ""]
    for row in parts["profile"]: lines += profile_lines(row)
    return lines


def write_table(rows, path):
    machines = {}
    for row in rows:
        key = tuple(row[k] for k in ("device", "driver", "torch", "images", "size"))
        machines.setdefault(key, []).append(row)
    lines = ["# Training throughput on a GPU", "",
        "Made by `gpu.py`. Training: the project's learner with its recipe, checkpoint callback "
        "and loader, images kept on the device, turned and rotated there. Bare step: the same "
        "model, loss and optimizer on one batch. The larger batch is the best of those that the "
        "bf16 rows show. Peak memory is without the kept images. Deterministic algorithms, as in "
        "a training, where nothing else is said. A model's best is bold.", ""]
    for each in machines.values(): lines += section(each)
    path.write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))


def precision():
    convolutions = "TF32" if torch.backends.cudnn.allow_tf32 else "float32"
    products = "float32" if torch.get_float32_matmul_precision() == "highest" else "TF32"
    return (f"In the float32 rows convolutions may use {convolutions} and matrix products "
        f"{products} (PyTorch's defaults)")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--galaxies", type=int, default=64_000)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--folder", type=Path,
        default=Path(tempfile.gettempdir())/"specpred-gpu", help="of the images")
    parser.add_argument("--results", type=Path, help="JSON lines; default: gpu.jsonl in the folder")
    parser.add_argument("--seconds", type=float,
        help=f"limit of each part; default: {SECONDS}. What was begun is finished")
    parser.add_argument("--jobs", type=int, default=-1, help="processes that render; -1: all cores")
    parser.add_argument("--random", action="store_true", help="random numbers instead of galaxies")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the table")
    parser.add_argument("--dry-run", action="store_true",
        help="40 galaxies of 32 pixels, batches of 4 and 8, few steps, two small models")
    chosen = parser.parse_args()
    if chosen.dry_run: chosen.galaxies, chosen.size, chosen.jobs = 40, 32, 1
    chosen.results = chosen.results or chosen.folder/"gpu.jsonl"
    return chosen


def measure(chosen, device):
    scale = DRY if chosen.dry_run else FULL
    limits = {part: chosen.seconds or SECONDS[part] for part in PARTS}
    kind = "random" if chosen.random or not can_render() else "mock"
    results = Results(chosen.results, **machine(device), torch=torch.__version__, images=kind,
        size=chosen.size, cores=os.cpu_count(), precision=precision())
    folder = chosen.folder/f"{kind}-{chosen.galaxies}-{chosen.size}"
    gallery = open_gallery(folder, chosen.galaxies, chosen.size)
    if "render" in chosen.parts:
        render(gallery, folder, kind, chosen.jobs, limits["render"], results)
    print(f"{gallery.done.sum()} of {chosen.galaxies} galaxies are rendered.", flush=True)
    if not {"train", "profile"} & set(chosen.parts): return
    if not gallery.done.any(): raise SystemExit(f"{folder} has no galaxies: run the part render.")
    data = load_data(gallery, folder, device, scale, results)
    if "train" in chosen.parts: train(data, device, scale, limits["train"], results)
    if "profile" in chosen.parts:
        profile_models(data, device, scale, limits["profile"], results)


def main():
    chosen = arguments()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    if not chosen.table:
        if not torch.cuda.is_available() and not chosen.dry_run:
            raise SystemExit("There is no CUDA device; --dry-run works without one.")
        measure(chosen, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows = Results(chosen.results).rows
    table = chosen.folder/"gpu.md" if chosen.dry_run else Path(__file__).with_suffix(".md")
    write_table(rows, table)


if __name__ == "__main__": main()
