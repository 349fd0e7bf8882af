"""A training step of each model, what each form of the arithmetic gains, and folded models."""
from statistics import median

import torch
from interleaved import arguments, label, ratio, rounds, setting, write
from plain_deconv import FORMS, in_form

from specpred.models import MODELS, fuse

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
    x = torch.randn(chosen.batch, 5, chosen.side, chosen.side,
        generator=torch.Generator().manual_seed(0)).to(chosen.device)
    x = x + x.roll(1, -1) + x.roll(1, -2) + 0.5*x.roll(1, 1)
    return x.contiguous(memory_format=torch.channels_last) if chosen.bf16 else x


def table(steps, chosen, heading):
    "Measures and writes: seconds, and the ratio to the first candidate."
    seconds = rounds(steps, chosen)
    first = next(iter(steps))
    rows = [f"| model | seconds | / {first} |", "|---|---|---|"]
    for name, times in seconds.items():
        rows.append(f"| {name} | {median(times):.3f} | **{ratio(times, seconds[first]):.2f}** |")
    write(f"{heading} at {chosen.side} px{label(chosen)}", [setting(chosen), "", *rows])


def table_of_forms(steps, chosen):
    "What each form gains: the ratio to the form before it, and of the last to the first."
    rows = ["| arithmetic | " + " | ".join(steps) + " |", "|---|" + "---|"*len(steps)]
    columns = [rounds({form: in_form(step, steps_of) for form, steps_of in FORMS.items()}, chosen)
               for step in steps.values()]
    forms = list(FORMS)
    for before, form in zip(forms, forms[1:], strict=False):
        cells = [f"{ratio(seconds[form], seconds[before]):.3f}" for seconds in columns]
        rows.append(f"| {form} / {before} | {' | '.join(cells)} |")
    cells = [f"**{ratio(seconds[forms[-1]], seconds[forms[0]]):.3f}**" for seconds in columns]
    rows.append(f"| all / {forms[0]} | {' | '.join(cells)} |")
    heading = f"What each form gains: a training step at {chosen.side} px{label(chosen)}"
    write(heading, [setting(chosen), "", *rows])


def main():
    chosen = arguments(__doc__, repeats=7)
    torch.manual_seed(0)
    models = {name: MODELS[name]() for name in NAMES}
    x = images(chosen)
    steps = {name: training_step(prepared(model, chosen), x, chosen.bf16)
             for name, model in models.items()}
    table(steps, chosen, "Models: a training step")
    table_of_forms({name: steps[name] for name in NAMES[1:]}, chosen)

    forms = {"xresnet18, as trained": models["xresnet18"].eval()}
    forms |= {f"{name}, folded": fuse(model.cpu()) for name, model in models.items()}
    steps = {name: evaluation(prepared(model, chosen), x, chosen.bf16)
             for name, model in forms.items()}
    table(steps, chosen, "Models: evaluation")


if __name__ == "__main__": main()
