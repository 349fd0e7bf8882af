"benchmarks/gpu.py: every part leaves results, nothing is measured twice, and time has its group."
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from specpred.images import Augmentation
from specpred.training import GalaxySet, make_sample

BENCHMARKS = Path(__file__).resolve().parents[1]/"benchmarks"
sys.path[:0] = [str(BENCHMARKS)]
import gpu  # noqa: E402


def dry_run(folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, BENCHMARKS/"gpu.py", "--dry-run", "--folder", folder],
        capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder/"gpu.jsonl").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    dry_run(folder)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return [json.loads(line) for line in (folder/"gpu.jsonl").read_text().splitlines()]


def of_part(rows, part): return [row for row in rows if row["part"] == part]


def test_every_part_leaves_results(rows):
    assert {row["part"] for row in rows} == {"render", "load", "loader", "train", "profile"}
    assert not [row for row in rows if "failed" in row]
    render, = of_part(rows, "render")
    assert render["galaxies"] == 40 and render["per_second"] > 0 and render["images"] == "mock"
    measured = {(row["model"], row["variant"], row["batch"]) for row in of_part(rows, "train")}
    assert measured == {(model, variant, batch) for model in gpu.DRY.models
        for variant in gpu.DRY.variants for batch in gpu.DRY.batches}
    assert all(row["training"] > 0 and row["bare"] > 0 for row in of_part(rows, "train"))


def test_a_profile_tells_the_parts_of_a_step_apart(rows):
    whitened, measured = (row["groups"] for row in of_part(rows, "profile"))
    assert max(whitened, key=whitened.get) == "whitening" and "photometry" not in whitened
    assert max(measured, key=measured.get) == "photometry" and "whitening" not in measured
    for groups in (whitened, measured): assert {"augmentation", "optimizer"} <= set(groups)


def test_the_table_goes_to_the_folder(folder):
    table = (folder/"gpu.md").read_text()
    for text in ("Rendering: 40 of 40", "| deconv3 | float32 | 8 |", "### A step of photometry"):
        assert text in table


def test_a_second_call_measures_nothing(folder, rows):
    assert [json.loads(line) for line in dry_run(folder).splitlines()] == rows


def test_rendered_galaxies_differ_and_are_kept_as_the_loader_keeps_them(folder):
    place = folder/"mock-40-32"
    gallery = gpu.open_gallery(place, 40, 32)
    assert gallery.done.all() and np.isfinite(gallery.targets).all()
    assert len(np.unique(gallery.targets[:, 0])) == 40
    assert len(np.unique(gallery.pixels[:, 0, 16, 16])) > 30
    images, latents = gpu.sample_of(gallery, place, None)
    train = GalaxySet(make_sample(images, latents), "train", Augmentation())
    gpu.keep_on_device(train, torch.device("cpu"))
    expected = train.read(np.arange(len(train)))
    torch.testing.assert_close(train.values, expected, rtol=2e-3, atol=2e-3)


def test_a_failure_is_a_result():
    def fails(message): raise RuntimeError(message)
    def fills(): raise torch.OutOfMemoryError
    assert gpu.attempt(fails, "no kernel") == {"failed": "RuntimeError: no kernel"}
    assert gpu.attempt(fills) == {"failed": "out of memory"}


def event(name, start, caller=None, kernels=(), number=-1, device="CPU"):
    "A stand-in for what the profiler records, times in microseconds."
    span = SimpleNamespace(start=start, elapsed_us=lambda: sum(kernels))
    launched = [SimpleNamespace(duration=us) for us in kernels]
    return SimpleNamespace(name=name, time_range=span, cpu_parent=caller, kernels=launched,
        sequence_nr=number, device_type=getattr(gpu.DeviceType, device))


def test_kernels_count_for_the_part_that_launched_them_or_whose_gradient_they_are():
    whitening = event("whitening", 0, kernels=[99])  # its own annotation is no kernel
    product = event("aten::mm", 1, whitening, [10], number=7)
    convolution = event("aten::convolution", 2, kernels=[20], number=8)
    backward = event("autograd::engine::evaluate_function: MmBackward0", 3, number=7)
    of_product = event("aten::mm", 4, backward, [30])
    launch = event("cudaLaunchKernel", 1, product)
    wait = event("cudaStreamSynchronize", 5)
    on_device = [event(f"kernel {us}", 9, kernels=[us], device="CUDA") for us in (10, 20, 30, 5)]
    found = gpu.summary([whitening, product, convolution, backward, of_product, launch, wait,
        event("whitening", 9, kernels=[40], device="CUDA"), *on_device], 1, on_gpu=True)
    in_us = {group: round(1e3*ms) for group, ms in found["groups"].items()}
    assert in_us == {"whitening": 40, "convolution": 20, gpu.ELSE: 5}
    assert round(1e3*found["busy_ms"]) == 65 and found["launches"] == 1
    assert found["waits"] == {"cudaStreamSynchronize": 1}
    assert found["top"][0][0] == "kernel 30"
