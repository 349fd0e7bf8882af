"""A training step (forward and backward) of FastDeconv beside nn.Conv2d and beside the published arithmetic in plain autograd."""
import torch
from torch import nn
from interleaved import arguments, medians, setting, write
from plain_deconv import PlainDeconv
from specpred.deconv import FastDeconv

CASES = (("32 → 32, 3 × 3, 112 × 112", (32, 32, 3), 1, 112, True),
         ("5 → 32, 3 × 3, stride 2, 224 × 224, first layer", (5, 32, 3), 2, 224, False),
         ("the same, with the gradient of the images", (5, 32, 3), 2, 224, True),
         ("64 → 64, 3 × 3, 56 × 56", (64, 64, 3), 1, 56, True))


def training_step(layer, x, bf16):
    def step():
        x.grad = None
        layer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16): y = layer(x)
        y.backward(torch.ones_like(y))
    return step


if __name__ == "__main__":
    chosen = arguments(__doc__, repeats=15)
    rows = ["| layer | `Conv2d`, ms | published arithmetic | FastDeconv | published / `Conv2d` | FastDeconv / `Conv2d` |", "|---|---|---|---|---|---|"]
    for title, sizes, stride, side, needs_gradient in CASES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(chosen.batch, sizes[0], side, side, generator=generator)
        x = (x + x.roll(1, -1) + x.roll(1, -2) + 0.5*x.roll(1, 1)).to(chosen.device)  # correlated, as images are
        if chosen.bf16: x = x.contiguous(memory_format=torch.channels_last)
        layers = {kind: kind(*sizes, stride=stride, padding=1).to(chosen.device) for kind in (nn.Conv2d, PlainDeconv, FastDeconv)}
        run = {kind: torch.compile(layer) if chosen.compile else layer for kind, layer in layers.items()}
        x.requires_grad_(needs_gradient)
        time = medians({kind: training_step(layer, x, chosen.bf16) for kind, layer in run.items()}, chosen)
        conv, plain, ours = (1e3*time[kind] for kind in (nn.Conv2d, PlainDeconv, FastDeconv))
        rows.append(f"| {title} | {conv:.1f} | {plain:.1f} | {ours:.1f} | {plain/conv:.2f} | **{ours/conv:.2f}** |")
    write(f"Layers: a training step{', bf16' if chosen.bf16 else ''}{', compiled' if chosen.compile else ''}, {chosen.device}",
        [setting(chosen), "", *rows])
