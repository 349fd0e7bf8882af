"""A training step of each model at 224 pixels beside the published arithmetic, and evaluation of the folded models beside the plain CNN."""
import torch
from torch import nn
from interleaved import arguments, medians, setting, write
from plain_deconv import PlainDeconv
from specpred.deconv import FastDeconv
from specpred.models import MODELS, fuse

NAMES = ("xresnet18", "xresnet18_hybrid", "xresnet18_deconv")


def with_published_arithmetic(model):
    "The same model with every FastDeconv in plain autograd form."
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, FastDeconv):
                plain = PlainDeconv(child.in_channels, child.out_channels, child.kernel_size[0], child.stride[0], child.padding[0], groups=child.groups)
                plain.load_state_dict(child.state_dict())
                setattr(module, name, plain)
    return model


def training_step(model, x, bf16):
    def step():
        model.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16): loss = model(x).square().mean()
        loss.backward()
    return step


def evaluation(model, x, bf16):
    @torch.inference_mode()
    def step():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16): model(x)
    return step


def prepared(model, chosen):
    model = model.to(chosen.device)
    if chosen.bf16: model = model.to(memory_format=torch.channels_last)
    return torch.compile(model) if chosen.compile else model


if __name__ == "__main__":
    chosen = arguments(__doc__, repeats=7)
    x = torch.randn(chosen.batch, 5, 224, 224, generator=torch.Generator().manual_seed(0)).to(chosen.device)
    x = x + x.roll(1, -1) + x.roll(1, -2) + 0.5*x.roll(1, 1)
    if chosen.bf16: x = x.contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    candidates = {name: MODELS[name]() for name in NAMES}
    candidates |= {f"{name}, published arithmetic": with_published_arithmetic(MODELS[name]()) for name in NAMES[1:]}
    time = medians({name: training_step(prepared(model, chosen), x, chosen.bf16) for name, model in candidates.items()}, chosen)
    label = f"{', bf16' if chosen.bf16 else ''}{', compiled' if chosen.compile else ''}, {chosen.device}"
    rows = ["| model | seconds | images/s | / `xresnet18` |", "|---|---|---|---|"]
    rows += [f"| {name} | {s:.3f} | {chosen.batch/s:.0f} | **{s/time['xresnet18']:.2f}** |" for name, s in time.items()]
    write(f"Models: a training step at 224 px{label}", [setting(chosen), "", *rows])

    plain = {"xresnet18, as trained": candidates["xresnet18"].eval()}
    folded = {f"{name}, folded": fuse(candidates[name].cpu()) for name in NAMES}
    plain = {name: model.to(chosen.device) for name, model in plain.items()}
    time = medians({name: evaluation(prepared(model, chosen), x, chosen.bf16) for name, model in (plain | folded).items()}, chosen)
    rows = ["| model | seconds | images/s | / `xresnet18` as trained |", "|---|---|---|---|"]
    rows += [f"| {name} | {s:.3f} | {chosen.batch/s:.0f} | **{s/time['xresnet18, as trained']:.2f}** |" for name, s in time.items()]
    write(f"Models: evaluation at 224 px{label}", [setting(chosen), "", *rows])
