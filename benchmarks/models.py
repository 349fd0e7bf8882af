"""A training step of each model beside the published steps, and evaluation of the fused models."""
import torch
from interleaved import arguments, label, ratio, rounds, setting, write
from plain_deconv import FORMS, in_form

from specpred.models import MODELS, fuse
from specpred.surveys import PS1

NAMES = ("xresnet18", "xresnet18_hybrid", "xresnet18_deconv")


def training_step(model, x, bf16):
    def step():
        model.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            loss = model(x).square().mean()
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


def images(chosen):
    x = torch.randn(chosen.batch, len(PS1.bands), chosen.side, chosen.side,
        generator=torch.Generator().manual_seed(0)).to(chosen.device)
    x = x + x.roll(1, -1) + x.roll(1, -2) + 0.5*x.roll(1, 1)
    return x.contiguous(memory_format=torch.channels_last) if chosen.bf16 else x


def table(steps, chosen, heading):
    "Measures and writes: seconds, and the ratio to the first candidate."
    seconds = rounds(steps, chosen)
    first = next(iter(steps))
    rows = [f"| model | seconds | / {first} |", "|---|---|---|"]
    for name, times in seconds.items():
        median = sorted(times)[len(times)//2]
        rows.append(f"| {name} | {median:.3f} | **{ratio(times, seconds[first]):.2f}** |")
    write(f"{heading} at {chosen.side} px{label(chosen)}", [setting(chosen), "", *rows])


def main():
    chosen = arguments(__doc__, repeats=7)
    torch.manual_seed(0)
    models = {name: MODELS[name]() for name in NAMES}
    x = images(chosen)
    steps = {name: training_step(prepared(model, chosen), x, chosen.bf16)
             for name, model in models.items()}
    published = FORMS["published steps"]
    steps |= {f"{name}, published steps": in_form(steps[name], published) for name in NAMES[1:]}
    table(steps, chosen, "Models: a training step")

    forms = {"xresnet18, as trained": models["xresnet18"].eval()}
    forms |= {f"{name}, fused": fuse(model.cpu()) for name, model in models.items()}
    steps = {name: evaluation(prepared(model, chosen), x, chosen.bf16)
             for name, model in forms.items()}
    table(steps, chosen, "Models: evaluation")


if __name__ == "__main__": main()
