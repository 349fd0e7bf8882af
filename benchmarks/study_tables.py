"""Tables and a figure of the runs of `study.py`: study.md, study/spectra.csv, figures/study.png.

    python benchmarks/study_tables.py               of the predictions that are committed
    python benchmarks/study_tables.py --data-dir D  and of the spectra that they decode to"""
import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from study import (
    BASELINES,
    BRANCH_TRIALS,
    NETWORK_TRIALS,
    PROTOCOL,
    RESULTS,
    plan,
    read_rows,
    survey_sample,
)
from tqdm.auto import tqdm

from specpred.config import get_paths, get_profile
from specpred.evaluation import (
    core_rmse,
    fractional_error,
    load_reference,
    pooled_rmse,
    rmse_per_target,
    score_lines,
)
from specpred.lines import measure_spectra
from specpred.plotting import BLUE, GREEN, ORANGE, RED
from specpred.vae import SpectrumModel

REFERENCE = "xresnet18_hybrid"  # by the published recipe; the others' errors minus its own
RANGES = ((3388, 4500), (4500, 6500), (6500, 8311))  # Angstrom, at rest
BEST = "xresnet18_hybrid-specpred"
CLAIMS = (  # of Wu & Peek (2020), table 1, and our own; the first has the smaller error
    ("the hybrid is better than the CNN", REFERENCE, "xresnet18"),
    ("the hybrid is better than deconvolutions everywhere", REFERENCE, "xresnet18_deconv"),
    ("the CNN is better than deconvolutions everywhere", "xresnet18", "xresnet18_deconv"),
    ("three deconvolutions are better than three convolutions", "deconv3", "conv3"),
    ("the hybrid is better than three deconvolutions", REFERENCE, "deconv3"),
    ("images say more than magnitudes: the published hybrid", REFERENCE, "boosting on magnitudes"),
    ("images say more than magnitudes: all photometry", "boosting on all photometry",
        "boosting on magnitudes"),
    ("images say more than magnitudes: our hybrid", BEST, "boosting on magnitudes"),
    ("our recipe is better than the published one", BEST, REFERENCE),
    ("a network adds to its branch of photometry", BEST, "photometry"),
    ("the hybrid is better than the CNN, by our recipe", BEST, "xresnet18-specpred"))
CURVES = {  # of the learning curve, with colours
    "boosting on magnitudes": ORANGE, REFERENCE: BLUE, "photometry": GREEN, BEST: RED}
FITTED_TO = 4000  # training galaxies at most; beyond them the fit is a prediction


def load(label): return np.float64(np.load(RESULTS/f"{label}.npy"))


def compared(rows):
    "The runs that are no trials, with all training galaxies of the profile."
    return rows[(rows.n_train == 0) & (rows.trial == "")]


def difference(predictions, others, truth, measure, rng, n_draws=500):
    """Mean error over the seeds of one model minus that of another, with a bootstrap error over
    galaxies and seeds."""
    def mean(these, rows): return np.mean([measure(p[rows], truth[rows]) for p in these])
    def draw():
        rows = rng.integers(0, len(truth), len(truth))
        one, other = ([these[k] for k in rng.integers(0, len(these), len(these))]
            for these in (predictions, others))
        return mean(one, rows) - mean(other, rows)
    everything = slice(None)
    return mean(predictions, everything) - mean(others, everything), \
        np.std([draw() for _ in range(n_draws)])


def markdown(head, lines):
    lines = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    return ["| " + " | ".join(head) + " |", "|---"*len(head) + "|", *lines, ""]


def model_table(rows, truth, rng):
    whole = compared(rows)
    reference = [load(label) for label in whole[whole.name == REFERENCE].label]
    lines = []
    for name, runs in whole.groupby("name", sort=False):
        predictions = [load(label) for label in runs.label]
        errors = [pooled_rmse(p, truth) for p in predictions]
        scatter = f" ± {np.std(errors, ddof=1):.3f}" if len(errors) > 1 else ""
        minus = "" if name == REFERENCE else "{:+.3f} ± {:.3f}".format(
            *difference(predictions, reference, truth, pooled_rmse, rng))
        per_target = np.mean([rmse_per_target(p, truth) for p in predictions], 0)
        n_parameters = runs.parameters.iloc[0]
        lines.append([name, len(runs), f"{np.mean(errors):.3f}{scatter}",
            f"{np.mean([core_rmse(p, truth) for p in predictions]):.3f}", minus,
            *(f"{e:.2f}" for e in per_target),
            f"{n_parameters:,.0f}" if np.isfinite(n_parameters) else ""])
    targets = (f"target {k + 1}" for k in range(truth.shape[1]))
    return markdown(("model", "seeds", "RMSE ± scatter of seeds", "without the worst 1 %",
        f"minus {REFERENCE}", *targets, "parameters"), lines)


def verdict(sigma):
    if sigma < -2: return "supported"
    return "contradicted" if sigma > 2 else "undecided"


def claim_table(rows, truth, rng):
    whole = compared(rows).groupby("name").label.apply(lambda labels: [*map(load, labels)])
    lines = []
    for claim, one, other in CLAIMS:
        cells = []
        for measure in (pooled_rmse, core_rmse):
            value, error = difference(whole[one], whole[other], truth, measure, rng)
            cells += [f"{value:+.3f} ± {error:.3f}", f"{verdict(value/error)}, "
                f"{abs(value/error):.1f} σ"]
        lines.append([claim, *cells])
    return markdown(("claim", "difference of RMSE", "", "without the worst 1 %", ""), lines)


def ratio(lines):
    "log10([O III]/Hβ) where both lines are seen."
    seen = (lines.oiii_5007_ew > 1) & (lines.hbeta_ew > 1)
    return np.log10((lines.oiii_5007_ew/lines.hbeta_ew).where(seen))


def spectra_scores(labels, profile, data_dir):
    "Errors of the spectra that predictions decode to, a row a run."
    paths = get_paths(profile.name, data_dir)
    test = survey_sample(profile, data_dir).rows("test").specobjid.to_numpy()
    reference, model = load_reference(test, paths), SpectrumModel.load(paths.vae)
    grid = dict(loglam0=profile.spectra.loglam0, dloglam=profile.spectra.dloglam)
    true = measure_spectra(reference.true, missing=np.isnan(reference.true), **grid)
    signal = np.median(np.where(reference.missing, 0, reference.observed/reference.error), 1)
    faint = signal < np.median(signal)
    scores = []
    for label in tqdm(labels, "spectra"):
        spectra = model.decode(np.float32(load(label)))
        def error(low=0, high=10**6, chosen=slice(None), spectra=spectra):
            bins = (model.wavelength >= low) & (model.wavelength < high)
            errors = fractional_error(spectra[chosen][:, bins], reference.true[chosen][:, bins])
            return 100*np.nanmedian(errors)
        measured = measure_spectra(spectra, **grid)
        lines = score_lines(measured, true).set_index("quantity")
        off = (ratio(measured) - ratio(true)).dropna()
        scores.append(dict(label=label, spectrum=error(),
            **{f"{low}-{high}": error(low, high) for low, high in RANGES},
            faint=error(chosen=faint), bright=error(chosen=~faint),
            dn4000=lines.scatter.dn4000, halpha=lines.scatter.halpha_ew,
            halpha_rank=lines.rank_correlation.halpha_ew,
            oiii_hbeta=1.4826*(off - off.median()).abs().median()))
    return pd.DataFrame(scores)


def spectra_table(rows):
    scores = pd.read_csv(RESULTS/"spectra.csv").set_index("label")
    lines = []
    for name, runs in compared(rows).groupby("name", sort=False):
        mean = scores.loc[runs.label].mean()
        percents = [f"{mean[column]:.1f}" for column in scores.columns[:6]]
        lines.append([name, *percents, f"{mean.dn4000:.3f}", f"{mean.halpha:.1f}",
            f"{mean.halpha_rank:.2f}", f"{mean.oiii_hbeta:.2f}"])
    ranges = (f"{low} to {high} Å" for low, high in RANGES)
    return markdown(("model", "spectrum, %", *ranges, "fainter half", "brighter half", "Dn4000",
        "Hα, Å", "Hα, rank", "log [O III]/Hβ"), lines)


class PowerLaw:
    "error = scale (n / 1000)^-slope, fitted to the sizes up to `FITTED_TO`, and bootstrap draws."
    def __init__(self, runs, truth, rng, n_draws=500):
        runs = runs[runs.n <= FITTED_TO].sort_values("n")
        predictions, x = [load(label) for label in runs.label], np.log(runs.n.to_numpy()/1000)
        def fit(rows):
            errors = [pooled_rmse(p[rows], truth[rows]) for p in predictions]
            return np.polyfit(x, np.log(errors), 1)
        self.fit = fit(slice(None))
        self.draws = [fit(rng.integers(0, len(truth), len(truth))) for _ in range(n_draws)]

    def at(self, n):
        "Value and error at `n` galaxies."
        value, *draws = (np.exp(np.polyval(f, np.log(n/1000))) for f in (self.fit, *self.draws))
        return value, np.std(draws)

    @property
    def slope(self): return -self.fit[0], np.std([d[0] for d in self.draws])


def curve_runs(rows): return rows[(rows.trial == "") & (rows.seed == 0)]


def curve_table(rows, fits):
    runs = curve_runs(rows)
    sizes = sorted(runs.n.unique())
    lines = []
    for name, some in runs.groupby("name", sort=False):
        if some.n.nunique() < 2 or name == "mean": continue
        errors = some.set_index("n").rmse_test.reindex(sizes)
        fitted = fits.get(name)
        ends = ["{:.3f} ± {:.3f}".format(*value) for value in
            (fitted.slope, fitted.at(16_000), fitted.at(64_000))] if fitted else ["", "", ""]
        lines.append([name, *("" if np.isnan(e) else f"{e:.3f}" for e in errors), *ends])
    return markdown(("model", *(f"{n:,}" for n in sizes), "slope", "law at 16,000",
        "law at 64,000"), lines)


def trial_table(rows):
    lines = []
    for name, trials in ((BEST, NETWORK_TRIALS), ("photometry", BRANCH_TRIALS)):
        runs = rows[(rows.name == name) & (rows.seed == 0)].set_index("trial")
        runs = runs.loc[[trial for trial in trials if trial in runs.index]]
        for run in runs.itertuples():
            difference = run.rmse_valid - runs.rmse_valid.iloc[0]  # of the recipe as it is
            lines.append([name.removesuffix("-specpred"), run.Index, f"{run.rmse_valid:.3f}",
                f"{difference:+.3f}", f"{run.parameters:,.0f}", run.machine])
    head = "network", "what differs", "RMSE, valid", "difference", "parameters", "on"
    return markdown(head, lines)


def protocol_table(rows):
    lines = []
    for name, runs in rows[rows.trial == PROTOCOL].groupby("name", sort=False):
        best, last = runs.rmse_best_epoch, runs.rmse_valid
        lines.append([name, len(runs), f"{best.mean():.3f} ± {best.std():.3f}",
            f"{last.mean():.3f} ± {last.std():.3f}", f"{100*(1 - best.mean()/last.mean()):.0f} %"])
    return markdown(("model", "seeds", "best epoch", "last epoch", "flattered by"), lines)


def figure(rows, truth, fits, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), width_ratios=(1.15, 1),
        layout="constrained")
    whole = compared(rows)
    names = [name for name in whole.groupby("name").rmse_test.mean().sort_values().index
        if name != "mean"]
    colour = {name: "0.5" for name in names} | CURVES
    for k, name in enumerate(names):
        runs = whole[whole.name == name]
        left.plot(runs.rmse_test, [k]*len(runs), "o", ms=5, color=colour[name])
        cores = [core_rmse(load(label), truth) for label in runs.label]
        left.plot(cores, [k]*len(runs), "o", ms=5, mfc="w", color=colour[name])
    left.plot([], [], "o", color="0.5", label="all galaxies")
    left.plot([], [], "o", color="0.5", mfc="w", label="without the worst 1 %")
    left.legend(frameon=False, fontsize=7, loc="lower right")
    left.set_yticks(range(len(names)), names, fontsize=7)
    left.set(xlabel="RMSE of the standardised latents")
    left.grid(axis="x", color="0.9")
    n = np.geomspace(450, 70_000)
    for name, fitted in fits.items():
        values, errors = np.array([fitted.at(each) for each in n]).T
        inside = n <= FITTED_TO
        right.fill_between(n, values - errors, values + errors, color=CURVES[name], alpha=.15, lw=0)
        right.plot(n[inside], values[inside], color=CURVES[name], lw=1)
        right.plot(n[~inside], values[~inside], ":", color=CURVES[name], lw=1)
        runs = curve_runs(rows)
        runs = runs[runs.name == name]
        right.plot(runs.n, runs.rmse_test, "o", ms=4, color=CURVES[name], label=name)
    right.set(xscale="log", yscale="log", xlabel="training galaxies", ylabel="RMSE")
    ticks = (0.4, 0.5, 0.6, 0.7, 0.8)
    right.set_yticks(ticks, ticks)
    right.yaxis.set_minor_formatter("")
    right.set_ylim(0.38, 0.85)
    right.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder that holds study/, to measure spectra anew")
    chosen = parser.parse_args()
    rows, truth, rng = read_rows(), np.load(RESULTS/"targets.npy"), np.random.default_rng(0)
    profile = get_profile("study")
    order = {name: k for k, name in enumerate((*BASELINES, *profile.training.models))}
    rows["order"] = rows.name.map(order)
    rows = rows.sort_values(["order", "n", "seed"])
    if chosen.data_dir:
        scores = spectra_scores(compared(rows).label, profile, chosen.data_dir)
        scores.round(4).to_csv(RESULTS/"spectra.csv", index=False)
    fits = {name: PowerLaw(runs, truth, rng) for name, runs in curve_runs(rows).groupby("name")
        if name in CURVES}
    left = [run.label for run in plan() if run.label not in set(rows.label)]
    tables = dict(models=model_table(rows, truth, rng), claims=claim_table(rows, truth, rng),
        spectra=spectra_table(rows), curve=curve_table(rows, fits), trials=trial_table(rows),
        protocol=protocol_table(rows))
    text = Path(__file__).with_name("study_text.md").read_text().format(
        done=f"{len(plan()) - len(left)} of {len(plan())}", machines=machines(rows),
        left=", ".join(left) or "none",
        **{name: "\n".join(lines) for name, lines in tables.items()})
    Path(__file__).with_name("study.md").write_text(text)
    figure(rows, truth, fits, Path(__file__).parents[1]/"figures"/"study.png")
    print(text)


def machines(rows):
    "Which machine made what, for the head of the page."
    return "; ".join(f"{machine}, torch {version}: {len(some)} runs"
        for (machine, version), some in rows.groupby(["machine", "torch"], sort=False))


if __name__ == "__main__": main()
