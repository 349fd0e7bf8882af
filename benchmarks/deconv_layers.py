"""A training step (forward and backward) of FastDeconv beside nn.Conv2d and the published steps."""
import torch
from interleaved import arguments, label, ratio, rounds, setting, write
from plain_deconv import FORMS, in_form
from torch import nn

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


def measure(sizes, stride, side, needs_gradient, chosen):
    "Seconds in each round of the convolution, the published steps and the library's."
    x = torch.randn(chosen.batch, sizes[0], side, side, generator=torch.Generator().manual_seed(0))
    # correlated, as images are
    x = (x + x.roll(1, -1) + x.roll(1, -2) + 0.5*x.roll(1, 1)).to(chosen.device)
    if chosen.bf16: x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_(needs_gradient)
    layers = [kind(*sizes, stride=stride, padding=1).to(chosen.device)
              for kind in (nn.Conv2d, FastDeconv, FastDeconv)]
    if chosen.compile: layers = [torch.compile(layer) for layer in layers]
    conv, published, ours = (training_step(layer, x, chosen.bf16) for layer in layers)
    steps = dict(conv=conv, published=in_form(published, FORMS["published steps"]), ours=ours)
    return rounds(steps, chosen)


def main():
    chosen = arguments(__doc__, repeats=15)
    rows = ["| layer | published steps / `Conv2d` | `FastDeconv` / `Conv2d` |", "|---|---|---|"]
    for title, *case in CASES:
        seconds = measure(*case, chosen)
        published, ours = (ratio(seconds[name], seconds["conv"]) for name in ("published", "ours"))
        rows.append(f"| {title} | {published:.2f} | **{ours:.2f}** |")
    write(f"Layers: a training step{label(chosen)}", [setting(chosen), "", *rows])


if __name__ == "__main__": main()
