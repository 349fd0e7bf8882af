"""What the network should see: a small model trained on each transform of the images, several
times, on the store of a finished run.

python benchmarks/transforms.py --data-dir data/demo (6 minutes), with --quick for a look. The
choice is made on the valid galaxies."""
import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from interleaved import setting, write
from tqdm.auto import tqdm

from specpred.config import TrainingParameters
from specpred.images import Augmentation, fit_transform, open_images
from specpred.training import Sample, batch_loaders, make_sample, train_model

CHOICES = {  # stretch, softening in units of the noise, largest shift
    "raw, standardised per band (published)": ("linear", 3., 0),
    "asinh, softening 1 × noise": ("asinh", 1., 0),
    "asinh, softening 3 × noise": ("asinh", 3., 0),
    "asinh, softening 10 × noise": ("asinh", 10., 0),
    "each image by its own r.m.s.": ("image", 3., 0),
    "asinh, 3 × noise, moved by up to 2 pixels": ("asinh", 3., 2)}


def errors(sample, stretch, factor, max_shift, chosen):
    "Valid RMSE after the last epoch, for each seed."
    images, train = sample.images, sample.rows("train").specobjid.to_numpy()
    noise = images.noise[images.rows(train)]
    transform = fit_transform(images.read(train[:2000]), noise, stretch, factor)
    parameters = TrainingParameters(epochs=chosen.epochs, batch_size=chosen.batch, lr=chosen.lr)
    dls = batch_loaders(Sample(images, sample.table, transform), chosen.batch,
        Augmentation(max_shift=max_shift))
    with tempfile.TemporaryDirectory() as tmp:
        return [train_model(chosen.model, dls, parameters, seed, Path(tmp)/f"{seed}.pt",
            progress=False).history.rmse.iloc[-1] for seed in range(chosen.seeds)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default="data/demo",
        help="folder of a run: the images and latents.parquet in it are used")
    parser.add_argument("--model", default="conv3")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[""],
        help="parts of the names of the inputs to try; all of them without it")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    if chosen.quick: chosen.epochs, chosen.seeds = 2, 1
    chosen.device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen.cpu_time, chosen.bf16, chosen.compile, chosen.repeats = False, False, False, 1
    torch.set_num_threads(chosen.threads)
    images = open_images(chosen.data_dir/"images")
    sample = make_sample(images, pd.read_parquet(chosen.data_dir/"latents.parquet"))
    rows = ["| network input | RMSE of the valid galaxies | between seeds |", "|---|---|---|"]
    tried = [name for name in CHOICES if any(part in name for part in chosen.only)]
    for name in tqdm(tried):
        rmse = errors(sample, *CHOICES[name], chosen)
        scatter = f"{np.std(rmse, ddof=1):.4f}" if len(rmse) > 1 else "–"
        rows.append(f"| {name} | {np.mean(rmse):.4f} | {scatter} |")
        print(rows[-1], flush=True)
    counts = sample.table.split.value_counts()
    heading = f"Transforms: {chosen.model}, {images.shape[-1]} pixels, {counts['train']} galaxies"
    write(heading + ", quick"*chosen.quick, [setting(chosen),
        f"{chosen.epochs} epochs, batches of {chosen.batch}, largest learning rate {chosen.lr}, "
        f"{chosen.seeds} seeds each; {counts['valid']} valid galaxies.", "", *rows],
        Path(__file__).with_name("images.md"), "# What stores and transforms of images cost and "
        "give\n\nMade by `images.py` and `transforms.py`.\n")
