"""The comparison of record: every model by its recipe, three seeds of the most important ones, and
a learning curve, on the images and latents of a run of the profile `study`.

    for stage in 11 14 15 18 21; do specpred reproduce --profile study --only $stage; done
    python benchmarks/study.py

takes hours on two cores, run by run: each leaves a row in study/runs.csv and its predictions of
the test galaxies in study/, so that a later call goes on with those that are missing; one that
was interrupted goes on after its last epoch. At the end, and with --table, study.md is made."""
import argparse
import datetime
import platform
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import psutil
import torch

from specpred.config import find_training, get_paths, get_profile, random_generator
from specpred.evaluation import (
    core_rmse,
    magnitude_and_colours,
    pooled_rmse,
    predict_by_boosting,
    predict_by_neighbors,
    rmse_per_target,
)
from specpred.images import aperture_magnitudes, open_images
from specpred.models import n_params, predict_batches
from specpred.photometry import ring_table
from specpred.training import Sample, batch_loaders, make_sample, target_columns, train_model

RESULTS = Path(__file__).parent/"study"
REFERENCE = "xresnet18_hybrid"  # whose errors the others' are compared with
BASELINES = ("mean", "nearest neighbours", "boosting on magnitudes", "boosting on all photometry")


class Run(NamedTuple):
    name: str  # of a baseline or a training
    seed: int = 0  # added to the profile's
    n_train: int = 0  # 0: all

    @property
    def label(self): return f"{self.name.replace(' ', '_')}-{self.n_train or 'all'}-{self.seed}"


def plan():
    "All runs, those that tell most first."
    curve = (500, 1000, 2000)
    important = ("photometry", "xresnet18_hybrid", "xresnet18_hybrid-specpred", "xresnet18",
        "xresnet18-specpred")
    runs = [Run(name, 0, n) for name in BASELINES for n in (0, *curve)]
    runs += [Run("photometry", seed) for seed in range(3)]
    runs += [Run("photometry", 0, n) for n in curve] + [Run(name) for name in important[1:]]
    runs += [Run(name, 0, n) for n in curve for name in important[1:3]]
    runs += [Run(name, seed) for seed in (1, 2) for name in important[1:]]
    return runs + [Run(name) for name in ("conv3", "deconv3", "xresnet18_deconv")]


def subsample(sample, n, seed):
    "The sample with n of its training galaxies."
    train = sample.rows("train")
    chosen = train.iloc[random_generator(seed, "learning curve").permutation(len(train))[:n]]
    others = sample.table[sample.table.split != "train"]
    return Sample(sample.images, pd.concat([chosen, others], ignore_index=True), sample.transform)


def by_baseline(name, sample, settings, seed):
    "Predictions of the valid and the test galaxies."
    train, valid, test = (sample.rows(split) for split in ("train", "valid", "test"))
    targets, images = train[target_columns(train)].to_numpy(), sample.images
    def measured(rows):
        if name == "boosting on all photometry":
            return ring_table(images.read(rows.specobjid), images.bands)
        scale = images.survey.pixel_scale
        return aperture_magnitudes(images.read(rows.specobjid), scale)
    def predict(rows):
        if name == "mean": return np.broadcast_to(targets.mean(0), (len(rows), targets.shape[1]))
        known, wanted = measured(train), measured(rows)
        if name == "nearest neighbours":
            return predict_by_neighbors(known, targets, wanted, settings.n_neighbors)
        if name == "boosting on magnitudes":
            known, wanted = map(magnitude_and_colours, (known, wanted))
        return predict_by_boosting(known, targets, wanted, settings.boosting_iterations, seed)
    both = predict(pd.concat([valid, test]))
    return [both[:len(valid)], both[len(valid):]], {}


def by_training(run, sample, parameters, seed, folder):
    "The same of a network, and facts of its training."
    dls = batch_loaders(sample, parameters.batch_size)
    checkpoint = folder/f"{run.label}.checkpoint"
    learn, history = train_model(run.name, dls, parameters, seed, checkpoint, progress=False)
    predictions = []
    for split in ("valid", "test"):
        batches = sample.images.batches(sample.rows(split).specobjid)
        symmetric = find_training(run.name).symmetric
        predictions.append(predict_batches(learn.model, batches, sample.transform, symmetric))
    checkpoint.unlink()
    seconds = history.seconds.median()*len(history)  # a paused machine does not count
    return predictions, dict(epochs=len(history), train_seconds=round(seconds, 1),
        images_per_second=round(len(history)*len(sample.rows("train"))/seconds, 1),
        parameters=n_params(learn.model))


def do(run, sample, profile, folder):
    "One run: its row, and its predictions in a file."
    start, seed = time.perf_counter(), profile.seed + run.seed
    if run.n_train: sample = subsample(sample, run.n_train, profile.seed)
    if run.name in BASELINES:
        predictions, facts = by_baseline(run.name, sample, profile.evaluation, seed)
    else:
        predictions, facts = by_training(run, sample, profile.training, seed, folder)
    truths = [targets_of(sample, split) for split in ("valid", "test")]
    errors = dict(zip(("rmse_valid", "rmse_test"), map(pooled_rmse, predictions, truths),
        strict=True))
    np.save(RESULTS/f"{run.label}.npy", np.float16(predictions[1]))
    return run._asdict() | dict(label=run.label, n=len(sample.rows("train"))) | {
        name: round(error, 5) for name, error in errors.items()} | facts | dict(
        seconds=round(time.perf_counter() - start, 1),
        machine=f"{platform.machine()}, {psutil.cpu_count()} cores",
        torch=torch.__version__, date=datetime.date.today().isoformat())


def targets_of(sample, split):
    rows = sample.rows(split)
    return rows[target_columns(rows)].to_numpy(np.float32)


def check_targets(truth):
    "Keeps the test targets. Runs on other ones, made elsewhere, cannot be compared."
    path = RESULTS/"targets.npy"
    if not path.is_file(): np.save(path, truth)
    known = np.load(path)
    if known.shape != truth.shape or not np.allclose(known, truth, atol=0.02):
        raise SystemExit(f"{path} holds the targets of other galaxies or of another autoencoder. "
            "Remove the folder to start anew.")


def difference(predictions, reference, truth, rng, n_draws=500):
    """Mean RMSE of some seeds minus that of others, with an error that resamples galaxies and
    seeds alike."""
    def mean(these, rows):
        return np.mean([pooled_rmse(p[rows], truth[rows]) for p in these])
    def draw():
        rows = rng.integers(0, len(truth), len(truth))
        pairs = ([these[k] for k in rng.integers(0, len(these), len(these))]
            for these in (predictions, reference))
        one, other = (mean(these, rows) for these in pairs)
        return one - other
    everything = np.arange(len(truth))
    value = mean(predictions, everything) - mean(reference, everything)
    return value, np.std([draw() for _ in range(n_draws)])


def table(rows, truth):
    "Lines of Markdown: all models at full size, then the learning curve."
    def load(label): return np.float64(np.load(RESULTS/f"{label}.npy"))
    rng, whole = np.random.default_rng(0), rows[rows.n_train == 0]
    reference = [load(label) for label in whole[whole.name == REFERENCE].label]
    lines = [f"| model | seeds | RMSE | between seeds | best 99 % | minus {REFERENCE} | "
        + " | ".join(f"target {k + 1}" for k in range(truth.shape[1])) + " | s | images/s |",
        "|---"*(8 + truth.shape[1]) + "|"]
    for name, runs in whole.groupby("name", sort=False):
        predictions = [load(label) for label in runs.label]
        errors = [pooled_rmse(p, truth) for p in predictions]
        per_target = np.mean([rmse_per_target(p, truth) for p in predictions], 0)
        minus = "" if name == REFERENCE or not reference else "{:+.3f} ± {:.3f}".format(
            *difference(predictions, reference, truth, rng))
        cells = [name, len(runs), f"{np.mean(errors):.3f}",
            f"{np.std(errors, ddof=1):.3f}" if len(errors) > 1 else "",
            f"{np.mean([core_rmse(p, truth) for p in predictions]):.3f}", minus,
            *(f"{e:.3f}" for e in per_target),
            f"{runs.train_seconds.fillna(runs.seconds).mean():.0f}",
            f"{runs.images_per_second.mean():.0f}" if runs.epochs.notna().all() else ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    sizes = sorted(rows.n.unique())
    lines += ["", "| model | " + " | ".join(f"{n} galaxies" for n in sizes) + " |",
        "|---"*(1 + len(sizes)) + "|"]
    for name, runs in rows.groupby("name", sort=False):
        if runs.n.nunique() < 2: continue
        mean = runs.groupby("n").rmse_test.mean().reindex(sizes)
        lines.append(f"| {name} | " + " | ".join("" if np.isnan(e) else f"{e:.3f}" for e in mean)
            + " |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="study")
    parser.add_argument("--data-dir", help="folder that holds <profile>/")
    parser.add_argument("--runs", type=int, default=10**6, help="at most so many in this call")
    parser.add_argument("--table", action="store_true", help="only make study.md")
    chosen = parser.parse_args()
    profile, paths = get_profile(chosen.profile), get_paths(chosen.profile, chosen.data_dir)
    RESULTS.mkdir(exist_ok=True)
    records = RESULTS/"runs.csv"
    rows = pd.read_csv(records) if records.is_file() else pd.DataFrame(columns=["label"])
    rows = rows.astype({name: int for name in ("n", "n_train", "seed") if name in rows})
    missing = [run for run in plan() if run.label not in set(rows.label)]
    if not chosen.table:
        images, latents = open_images(paths.images), pd.read_parquet(paths.latents)
        sample = make_sample(images, latents, profile.training.stretch, profile.seed)
        check_targets(targets_of(sample, "test"))
        for run in missing[:chosen.runs]:
            row = do(run, sample, profile, paths.root)
            rows = pd.concat([rows, pd.DataFrame([row])], ignore_index=True)
            rows.to_csv(records, index=False)
            print(f"{run.label}: {row['rmse_test']:.4f} in {row['seconds']:.0f} s", flush=True)
    left = [run for run in plan() if run.label not in set(rows.label)]
    lines = ["# The comparison of record\n", "Made by `study.py`.\n",
        f"{len(rows)} of {len(plan())} runs are done. Root-mean-square errors of the standardised "
        f"latents of {len(np.load(RESULTS/'targets.npy'))} test galaxies; networks after "
        f"{profile.training.epochs} epochs in batches of {profile.training.batch_size}. "
        "Times are those of a machine that had other work now and then. "
        f"{', '.join(rows.machine.unique())}; PyTorch {', '.join(rows.torch.unique())}.\n",
        *table(rows, np.load(RESULTS/"targets.npy"))]
    if left: lines.append(f"\nMissing: {', '.join(run.label for run in left)}.")
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__": main()
