"""Three pictures that are drawn from the code: the pipeline, the network, and which module imports
which.

`make figures` calls this; the pictures lie in figures/ and are shown on the landing page and in the
site."""
import ast
import re
from pathlib import Path

import torch
from fastai.layers import ResBlock
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

from specpred.config import get_paths, repo_root
from specpred.deconv import FastDeconv
from specpred.models import xresnet18_hybrid
from specpred.plotting import BLUE, GREEN, ORANGE, SKY
from specpred.stages import STAGES, atomic_path

# title and height of each stage: arrows must not cross the boxes of others
TITLES = {
    "11_mock_survey": ("mock survey", 0), "14_download": ("download", 0),
    "15_images": ("images", 0),
    "18_eigenspectra": ("spectra", -1), "19_lines": ("lines", -2), "21_vae": ("autoencoder", -1),
    "24_training": ("training", 0), "25_posterior": ("posterior", 0),
    "26_calibration": ("calibration", 0), "27_domain": ("domain", 1),
    "28_evaluation": ("evaluation", -1), "29_figures": ("figures", -1),
    "32_predict": ("prediction", 0.5)}


def box(ax, x, y, width, height, text, color, **kwargs):
    "A box with rounded corners and a text, centred at x, y."
    corner = x - width/2, y - height/2
    ax.add_patch(FancyBboxPatch(
        corner, width, height, boxstyle="round,pad=0,rounding_size=0.08",
        facecolor=color, alpha=0.25, edgecolor="none"))
    ax.text(x, y, text, ha="center", va="center", **kwargs)


def needed_stages():
    """For each stage that writes files, the stages whose files it reads, without those that another
    one implies."""
    paths = get_paths("demo", "data")
    makers = {getattr(paths, name): stage for stage in STAGES.values() for name in stage.writes}
    needs = {}
    for stage in STAGES.values():
        if not stage.writes: continue
        read = [getattr(paths, name) for name in stage.reads]
        needs[stage.name] = {
            maker.name for path in read for made, maker in makers.items()
            if path == made or made in path.parents}
    reached = {}
    for name, direct in needs.items():
        reached[name] = direct.union(*(reached[other] for other in direct))
    implied = {
        name: set().union(*(reached[other] for other in direct)) for name, direct in needs.items()
    }
    return {name: direct - implied[name] for name, direct in needs.items()}


def draw_pipeline():
    "The stages from left to right, each to the right of those that it needs."
    needs, column = needed_stages(), {}
    for name, direct in needs.items():
        column[name] = 1 + max((column[n] for n in direct), default=-1)
    place = {name: (1.7*column[name], 0.8*TITLES[name][1]) for name in column}
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    ax = figure.subplots()
    for name, (x, y) in place.items():
        box(ax, x, y, 1.3, 0.5, TITLES[name][0], BLUE, fontsize=11)
        for other in needs[name]:
            start = place[other][0] + 0.68, place[other][1]
            ax.add_patch(
                FancyArrowPatch(
                    start, (x - 0.68, y), arrowstyle="-|>", mutation_scale=11, color="0.4"
                )
            )
    ax.set(xlim=(-0.8, 1.7*max(column.values()) + 0.8), ylim=(-2, 1.2), aspect="equal")
    ax.axis("off")
    return figure


def layer_shapes(size=224):
    """Title, channels, side and whether it is deconvolved of the hybrid's layers, from a forward
    pass."""
    shapes = []
    model = xresnet18_hybrid().eval()
    images = torch.zeros(1, model[0][0].in_channels, size, size)

    def record(layer, inputs, output):
        deconvolved = any(isinstance(m, FastDeconv) for m in layer.modules())
        shapes.append((output.shape[1], output.shape[-1], deconvolved))
    stem = list(model)[:3]
    stages = [m for m in model if any(isinstance(c, ResBlock) for c in m.modules())]
    for layer in stem + stages: layer.register_forward_hook(record)
    with torch.no_grad(): model(images)
    return [(images.shape[1], size, False), *shapes]


def draw_network():
    "The hybrid network: a box a layer, as high as its images, labelled with channels and side."
    layers = layer_shapes()
    figure = Figure(figsize=(11, 3), layout="constrained")
    ax = figure.subplots()
    for k, (channels, side, deconvolved) in enumerate(layers):
        color = GREEN if k == 0 else ORANGE if deconvolved else SKY
        box(ax, k, 0, 0.55, 0.5 + side/90, f"{channels} ×\n{side}²", color, fontsize=9)
    n = len(layers)
    box(ax, n, 0, 0.6, 0.8, "6\nlatents", GREEN, fontsize=9)
    box(ax, n + 1.2, 0, 0.9, 0.8, "decoder\n(VAE)", SKY, fontsize=9)
    box(ax, n + 2.5, 0, 1, 0.8, "spectrum\n1000 bins", GREEN, fontsize=9)
    for x in (n - 0.62, n + 0.5, n + 1.78):
        ax.annotate("", (x + 0.25, 0), (x, 0), arrowprops=dict(arrowstyle="-|>", color="0.4"))
    ax.text(0, -1.75, "image", ha="center")
    ax.text(2, -1.75, "deconvolutions", ha="center", color="#8a6000")
    ax.text((3 + n)/2, -1.75, "residual blocks", ha="center", color="#20678c")
    ax.set(xlim=(-0.6, n + 3.2), ylim=(-2, 1.6))
    ax.axis("off")
    return figure


def chapters():
    "Module and notebook of each chapter, in the order of reading."
    pairs = []
    for notebook in sorted((repo_root()/"nbs").glob("*.ipynb")):
        module = re.search(r"#\| default_exp (\w+)", notebook.read_text())
        if module: pairs.append((module[1], notebook.stem))
    return pairs


def modules_in_order():
    """The modules in the order of reading, an appendix's right before the first that imports it, or
    last."""
    modules = [module for module, notebook in chapters() if notebook[0].isdigit()]
    for appendix in [module for module, notebook in chapters() if not notebook[0].isdigit()]:
        importers = [k for k, m in enumerate(modules) if appendix in imports_of(m, [appendix])]
        modules.insert(min(importers, default=len(modules)), appendix)
    return modules


def imports_of(module, modules):
    "The modules of this package that a module imports anywhere."
    tree = ast.parse((repo_root()/"specpred"/f"{module}.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom): continue
        source = (node.module or "").removeprefix("specpred").lstrip(".")
        names |= {source, *(alias.name for alias in node.names)}
    return names & set(modules) - {module}


def draw_modules():
    "The modules in the order of reading, with an arc to each module that one imports."
    modules = modules_in_order()
    place = {module: -k for k, module in enumerate(modules)}
    figure = Figure(figsize=(4.6, 0.25*len(modules) + 0.6), layout="constrained")
    ax = figure.subplots()
    for module, y in place.items():
        ax.text(-0.2, y, module, ha="right", va="center", fontsize=9)
        for other in imports_of(module, modules) - {"config", "stages", "plotting"}:
            ax.add_patch(FancyArrowPatch(
                (0, y), (0, place[other]), connectionstyle="arc3,rad=0.5", color=BLUE, alpha=0.5,
                arrowstyle="-|>", mutation_scale=7, lw=0.8))
    ax.text(
        -3,
        1,
        "arrows lead to what a module imports;\nconfig, stages and plotting are left out",
        fontsize=7,
        color="0.4",
    )
    ax.set(xlim=(-3, 3.5), ylim=(-len(modules), 2))
    ax.axis("off")
    return figure


def draw(folder:Path):
    "Writes all three."
    pictures = dict(pipeline=draw_pipeline, network=draw_network, modules=draw_modules)
    for name, picture in pictures.items():
        with atomic_path(folder/f"{name}.png") as part:
            picture().savefig(part, dpi=110)
            Image.open(part).convert("RGB").quantize(64).save(part, optimize=True)  # a third


if __name__ == "__main__": draw(repo_root()/"figures")
