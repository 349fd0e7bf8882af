"""What the network should see: a small model trained on each transform of the images, several times, on the store of a finished run.

python benchmarks/transforms.py --data-dir data/demo (6 minutes), with --quick for a look. The choice is made on the valid galaxies."""
import argparse, tempfile
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from interleaved import setting, write
from specpred.config import TrainingParameters
from specpred.images import Augmentation, fit_transform, open_images
from specpred.training import batch_loaders, train_model, training_table

CHOICES = {"raw, standardised per band (published)": ("linear", 3., 0), "asinh, softening 1 × noise": ("asinh", 1., 0),
    "asinh, softening 3 × noise": ("asinh", 3., 0), "asinh, softening 10 × noise": ("asinh", 10., 0),
    "each image by its own r.m.s.": ("image", 3., 0), "asinh, 3 × noise, moved by up to 2 pixels": ("asinh", 3., 2)}


def errors(images, table, stretch, factor, max_shift, chosen):
    "Valid RMSE after the last epoch, for each seed."
    train = table.specobjid[table.split == "train"].to_numpy()
    transform = fit_transform(images.read(train[:2000]), images.noise[images.rows(train)], stretch, factor)
    parameters = TrainingParameters(epochs=chosen.epochs, batch_size=chosen.batch, lr=chosen.lr)
    dls = batch_loaders(images, table, transform, chosen.batch, Augmentation(max_shift=max_shift))
    with tempfile.TemporaryDirectory() as tmp:
        return [train_model(chosen.model, dls, parameters, seed, Path(tmp)/f"{seed}.pt", progress=False)[1].rmse.iloc[-1] for seed in range(chosen.seeds)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default="data/demo", help="folder of a run: images.zarr and latents.parquet in it are used")
    parser.add_argument("--model", default="conv3")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of the inputs to try; all of them without it")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    if chosen.quick: chosen.epochs, chosen.seeds = 2, 1
    chosen.device, chosen.cpu_time, chosen.bf16, chosen.compile, chosen.repeats = "cuda" if torch.cuda.is_available() else "cpu", False, False, False, 1
    torch.set_num_threads(chosen.threads)
    images = open_images(chosen.data_dir/"images.zarr")
    table = training_table(images, pd.read_parquet(chosen.data_dir/"latents.parquet"))
    rows = ["| network input | RMSE of the valid galaxies | between seeds |", "|---|---|---|"]
    for name, choice in tqdm([(name, choice) for name, choice in CHOICES.items() if any(part in name for part in chosen.only)]):
        found = errors(images, table, *choice, chosen)
        rows.append(f"| {name} | {np.mean(found):.4f} | {f'{np.std(found, ddof=1):.4f}' if len(found) > 1 else '–'} |")
        print(rows[-1], flush=True)
    counts = table.split.value_counts()
    write(f"Transforms: {chosen.model}, {images.shape[-1]} pixels, {counts['train']} galaxies" + ", quick"*chosen.quick, [
        f"{chosen.epochs} epochs, batches of {chosen.batch}, largest learning rate {chosen.lr}, {chosen.seeds} seeds each; "
        f"{counts['valid']} valid galaxies.", "", *rows],
        Path(__file__).with_name("images.md"), "# What stores and transforms of images cost and give\n\nMade by `images.py` and `transforms.py`.\n")
