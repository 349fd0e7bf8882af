"""The comparison of record: every model by its recipe, three seeds of the most important ones, a
learning curve and trials of recipes, on the images and latents of a run of the profile `study`.

    for stage in 11 14 15 18 21; do specpred reproduce --profile study --only $stage; done
    python benchmarks/study.py --more 60100
    python benchmarks/study_tables.py

takes many hours on two cores, less on a GPU with --jobs 10, run by run: each leaves a row in
study/runs.csv and its predictions of the test galaxies in study/, so that a later call goes on with
those that are missing; one that was interrupted goes on after its last epoch. --more draws further
galaxies, for the far end of the learning curve."""
import argparse
import datetime
import platform
import time
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd
import psutil
import torch
from fastai.basics import Callback, MSELossFlat
from torch.nn.functional import smooth_l1_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from specpred.config import find_training, get_paths, get_profile, random_generator, replace
from specpred.eigenspectra import load_store
from specpred.evaluation import (
    encode_spectra,
    magnitude_and_colours,
    observe_galaxies,
    pooled_rmse,
    predict_by_boosting,
    predict_by_neighbors,
)
from specpred.images import Augmentation, aperture_magnitudes, open_images, pack_arrays
from specpred.mock_survey import draw_survey
from specpred.models import n_params, predict_batches
from specpred.photometry import ring_table
from specpred.surveys import SURVEYS
from specpred.training import (
    Sample,
    batch_loaders,
    make_sample,
    published_protocol,
    target_columns,
    train_model,
)
from specpred.vae import SpectrumModel

RESULTS = Path(__file__).parent/"study"
BASELINES = ("mean", "nearest neighbours", "boosting on magnitudes", "boosting on all photometry")
CURVE = (500, 1000, 2000, 16_000)  # training galaxies, besides all of the profile
PROTOCOL = "published protocol"


class AverageWeights(Callback):
    "Ends with an exponential moving average of the weights."
    def before_fit(self):
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.99),
            use_buffers=False)

    def after_batch(self):
        if self.training: self.average.update_parameters(self.model)

    def after_fit(self):
        for own, mean in zip(self.model.parameters(), self.average.module.parameters(),
                strict=True):
            own.data.copy_(mean.data)


class AddNoise(Callback):
    "Adds up to a tenth of the pixels' scatter to the training images."
    def before_batch(self):
        if not self.training: return
        x = self.xb[0]
        level = 0.1*torch.rand(len(x), 1, 1, 1, device=x.device)
        self.learn.xb = (x + level*torch.randn_like(x),)


class Blur(Callback):
    "Mixes each training image with its mean over 3 x 3 pixels: seeing that differs."
    def before_batch(self):
        if not self.training: return
        x = self.xb[0]
        share = torch.rand(len(x), 1, 1, 1, device=x.device)
        self.learn.xb = (x.lerp(torch.nn.functional.avg_pool2d(x, 3, 1, 1), share),)


class Loss(Callback):
    "Another loss."
    def __init__(self, function): self.function = function

    def before_fit(self): self.learn.loss_func = self.function


class Trial(NamedTuple):
    "What differs from the recipe, with a network at full width."
    recipe: dict = {}
    parameters: dict = {}
    callbacks: object = tuple  # makes them


NETWORK_TRIALS = {  # of the hybrid
    "width 1": Trial(),
    "width 1/2": Trial(dict(width=0.5)),
    "width 1/4": Trial(dict(width=0.25)),
    "without the branch": Trial(dict(photometry=False)),
    "without the mean over turns": Trial(dict(symmetric=False)),
    "shifts up to 2 pixels": Trial(dict(max_shift=2)),
    "learning rate 1e-3": Trial(dict(lr=1e-3)),
    "batches of 128": Trial(parameters=dict(batch_size=128)),
}

BRANCH_TRIALS = {  # of what is no matter of the network: quick
    "photometry": Trial(),
    "averaged weights": Trial(callbacks=lambda: [AverageWeights()]),
    "noise": Trial(callbacks=lambda: [AddNoise()]),
    "Huber loss": Trial(callbacks=lambda: [Loss(smooth_l1_loss)]),
    "learning rate 5e-3": Trial(dict(lr=5e-3)),
    "blur": Trial(callbacks=lambda: [Blur()]),
    "20 epochs": Trial(parameters=dict(epochs=20)),
    "weight decay 0.2": Trial(dict(weight_decay=0.2)),
    "squared error": Trial(callbacks=lambda: [Loss(MSELossFlat())]),
    "Ranger, 3e-2, decay 0.01": Trial(dict(optimizer="ranger", lr=3e-2, weight_decay=0.01)),
    "bfloat16": Trial(parameters=dict(bf16=True)),
}

TRIALS = NETWORK_TRIALS | BRANCH_TRIALS


class Run(NamedTuple):
    name: str  # of a baseline or a training
    seed: int = 0  # added to the profile's
    n_train: int = 0  # 0: all of the profile
    trial: str = ""  # in `TRIALS`, or `PROTOCOL`

    @property
    def label(self):
        words = f"{self.name}-{self.n_train or 'all'}-{self.seed}"
        if self.trial: words += f"-{self.trial}"
        return words.replace(" ", "_").replace("/", "_")


def plan():
    "All runs, those that tell most first."
    models = ("photometry", "xresnet18_hybrid", "xresnet18_hybrid-specpred", "xresnet18",
        "xresnet18-specpred")
    near, far = CURVE[:3], CURVE[3]
    runs = [Run(name, 0, n) for name in BASELINES for n in (0, *near)]
    runs += [Run(name, seed) for seed in range(3) for name in models]
    runs += [Run(name, 0, n) for n in near for name in models[:3]]
    runs += [Run(name) for name in ("conv3", "deconv3", "xresnet18_deconv")]
    runs += [Run(name, seed, trial=PROTOCOL) for seed in range(3)
        for name in ("xresnet18_hybrid", "xresnet18")]
    runs += [Run(name, 0, far) for name in (*models[:3], *BASELINES[1:])]
    runs += [Run("xresnet18_hybrid-specpred", trial=trial) for trial in NETWORK_TRIALS]
    return runs + [Run("photometry", trial=trial) for trial in BRANCH_TRIALS]


def survey_sample(profile, data_dir):
    paths = get_paths(profile, data_dir)
    images, latents = open_images(paths.images), pd.read_parquet(paths.latents)
    return make_sample(images, latents, profile.training.stretch, profile.seed)


def more_folder(profile, data_dir): return get_paths(profile, data_dir).root/"more"


def n_available(profile, data_dir):
    "Training galaxies that there are images of."
    table = more_folder(profile, data_dir)/"latents.parquet"
    if not table.is_file(): return len(survey_sample(profile, data_dir).rows("train"))
    return int(pd.read_parquet(table).split.isin(["train", "more"]).sum())


def observed_and_encoded(places, profile, data_dir, seed):
    "Images and targets of galaxies beyond those of the survey."
    paths, survey = get_paths(profile, data_dir), SURVEYS[profile.images.survey]
    observed = observe_galaxies(places, survey, profile.images.size, profile.spectra,
        profile.mock.couplings, seed)
    store, model = load_store(paths.spectra), SpectrumModel.load(paths.vae)
    targets = encode_spectra(observed.flux, observed.missing, store, model, profile.spectra)
    return observed.images, targets


def draw_more(n, profile, data_dir, n_jobs):
    """Galaxies of the same sky, in a store with those of the survey; their targets are the
    encodings by the survey's autoencoder."""
    folder, sample = more_folder(profile, data_dir), survey_sample(profile, data_dir)
    if (folder/"latents.parquet").is_file(): return
    seed = int(random_generator(profile.seed, "more galaxies").integers(2**31))
    mock = replace(profile.mock, n_galaxies=0, n_spectra_only=n)
    _, places = draw_survey(mock, seed, sample.images.survey)
    blocks = [places[i:i + 200] for i in range(0, n, 200)]
    parallel = joblib.Parallel(n_jobs, return_as="generator")
    parts = parallel(joblib.delayed(observed_and_encoded)(block, profile, data_dir, seed)
        for block in blocks)
    images, targets = zip(*tqdm(parts, "more galaxies", len(blocks)), strict=True)
    known, targets = sample.table, pd.concat(targets, ignore_index=True)
    new = targets.assign(split="more", specobjid=np.arange(n, dtype=np.uint64)).dropna()
    new = new[~new.specobjid.isin(known.specobjid)]
    pixels = np.concatenate([sample.images.read(known.specobjid),
        np.concatenate(images)[new.specobjid.astype(int)]])
    table = pd.concat([known, new[known.columns]], ignore_index=True)
    folder.mkdir(exist_ok=True, parents=True)
    problems = pack_arrays(table.specobjid, pixels, folder/"images")
    table[~table.specobjid.isin(list(problems))].to_parquet(folder/"latents.parquet")


def sample_of(run, profile, data_dir):
    "The sample with the training galaxies of this run."
    sample = survey_sample(profile, data_dir)
    if run.trial == PROTOCOL: return published_protocol(sample)
    if not run.n_train: return sample
    train = sample.rows("train")
    others = sample.table[sample.table.split != "train"]
    images = sample.images
    if run.n_train > len(train):
        folder = more_folder(profile, data_dir)
        images, table = open_images(folder/"images"), pd.read_parquet(folder/"latents.parquet")
        train = pd.concat([train, table[table.split == "more"].assign(split="train")])
    else:
        order = random_generator(profile.seed, "learning curve").permutation(len(train))
        train = train.iloc[order]
    table = pd.concat([train[:run.n_train], others], ignore_index=True)
    return Sample(images, table, sample.transform)


def by_baseline(name, sample, settings, seed):
    "Predictions of the valid and the test galaxies."
    train, valid, test = (sample.rows(split) for split in ("train", "valid", "test"))
    targets, images = train[target_columns(train)].to_numpy(), sample.images
    def measured(rows):
        if name == "boosting on all photometry":
            return np.concatenate([ring_table(images.read(part), images.bands)
                for part in np.array_split(rows.specobjid, len(rows)//1000 + 1)])
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
    return dict(valid=both[:len(valid)], test=both[len(valid):])


def by_training(run, sample, parameters, seed, folder):
    "Predictions of the valid and the test galaxies by a network, and facts of its training."
    training, trial = find_training(run.name), Trial()
    if run.trial in TRIALS:
        trial = TRIALS[run.trial]
        changes = dict(width=1) | trial.recipe
        training = training._replace(recipe=replace(training.recipe, **changes))
    parameters = replace(parameters, **trial.parameters)
    augmentation = Augmentation(max_shift=training.recipe.max_shift)
    dls = batch_loaders(sample, parameters.batch_size, augmentation)
    checkpoint = folder/f"{run.label}.checkpoint"
    named = training if run.trial in TRIALS else run.name  # a name has the seed of the stage
    learn, history = train_model(named, dls, parameters, seed, checkpoint, progress=False,
        cbs=trial.callbacks())
    predictions = {}
    for split in {"valid", "test"} & set(sample.table.split):
        batches = sample.images.batches(sample.rows(split).specobjid)
        predictions[split] = predict_batches(learn.model, batches, sample.transform,
            training.symmetric)
    checkpoint.unlink()
    seconds = history.seconds.median()*len(history)  # a paused machine does not count
    n_images = len(history)*len(sample.rows("train"))
    return predictions, dict(epochs=len(history), train_seconds=round(seconds, 1),
        images_per_second=round(n_images/seconds, 1), parameters=n_params(learn.model),
        rmse_best_epoch=round(history.rmse.min(), 5))


def machine():
    gpu = torch.cuda.is_available() and torch.cuda.get_device_name()
    return gpu or f"{platform.machine()}, {psutil.cpu_count()} cores"


def do(run, profile, data_dir):
    "One run: its row, and its predictions in a file."
    start, seed = time.perf_counter(), profile.seed + run.seed
    sample, facts = sample_of(run, profile, data_dir), {}
    if run.name in BASELINES:
        predictions = by_baseline(run.name, sample, profile.evaluation, seed)
    else:
        root = get_paths(profile, data_dir).root
        predictions, facts = by_training(run, sample, profile.training, seed, root)
    # trials are judged on the valid galaxies alone; the published protocol calls the test ones so
    if run.trial: predictions.pop("test", None)
    errors = {f"rmse_{split}": round(pooled_rmse(p, targets_of(sample, split)), 5)
        for split, p in predictions.items()}
    if "test" in predictions: np.save(RESULTS/f"{run.label}.npy", np.float16(predictions["test"]))
    return run._asdict() | dict(label=run.label, n=len(sample.rows("train"))) | errors | facts | \
        dict(seconds=round(time.perf_counter() - start, 1), machine=machine(),
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


def read_rows():
    records = RESULTS/"runs.csv"
    if not records.is_file(): return pd.DataFrame(columns=["label"])
    return pd.read_csv(records, dtype=dict(trial=str)).fillna(dict(trial=""))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="study")
    parser.add_argument("--data-dir", help="folder that holds <profile>/")
    parser.add_argument("--more", type=int, default=0,
        help="galaxies beyond the survey's; without them the curve ends earlier")
    parser.add_argument("--runs", type=int, default=10**6, help="at most so many in this call")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", default="", help="runs whose label has this in it")
    chosen = parser.parse_args()
    profile = get_profile(chosen.profile)
    RESULTS.mkdir(exist_ok=True)
    check_targets(targets_of(survey_sample(profile, chosen.data_dir), "test"))
    if chosen.more: draw_more(chosen.more, profile, chosen.data_dir, n_jobs=-1)
    rows, available = read_rows(), n_available(profile, chosen.data_dir)
    missing = [run for run in plan() if run.label not in set(rows.label)
        and chosen.only in run.label and run.n_train <= available][:chosen.runs]
    doing = joblib.Parallel(chosen.jobs, return_as="generator_unordered")(
        joblib.delayed(do)(run, profile, chosen.data_dir) for run in missing)
    for row in tqdm(doing, "runs", len(missing)):
        rows = pd.concat([rows, pd.DataFrame([row])], ignore_index=True)
        rows.to_csv(RESULTS/"runs.csv", index=False)
        error = row.get("rmse_test", row["rmse_valid"])
        print(f"{row['label']}: {error:.4f} in {row['seconds']:.0f} s", flush=True)


if __name__ == "__main__": main()
