"""Four posteriors beside each other on the test galaxies of the profile `study`, their speed, and a
recalibration from noisy spectra; with the tables of 26_calibration and 27_domain: uncertainty.md.

    for stage in 11 14 15 18 21; do specpred reproduce --profile study --only $stage; done
    specpred reproduce --profile study --only 24_training --set training.models=photometry \
        --set training.seeds=5
    for stage in 25 26 27; do
        specpred reproduce --profile study --only $stage --set posterior.model=photometry; done
    python benchmarks/uncertainty.py

takes half an hour on two cores."""
import argparse
import platform
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.stats import kstest
from sklearn.metrics import roc_auc_score
from study_tables import markdown

from specpred import config, models
from specpred.calibration import (
    LEVELS,
    QUANTITIES,
    Bands,
    Calibration,
    describe,
    grid_of,
    known_columns,
    load_reference,
    mean_difference,
    observed_columns,
    plot_bands,
    points_near,
    ranks,
    reference_magnitude,
    stretch_scores,
    summarise_coverage,
    tarp,
)
from specpred.domain import Domain
from specpred.images import open_images
from specpred.mock_galaxies import COSMOLOGY, draw_parameters
from specpred.mock_light import make_light
from specpred.mock_survey import observe_stamps, stellar_library
from specpred.plotting import COLOURS, RED
from specpred.posterior import (
    GaussianErrors,
    SpectrumPosterior,
    energy_score,
    even_normal,
    fit_posterior,
    with_features,
)
from specpred.stages import read_manifest
from specpred.training import make_sample, target_columns
from specpred.vae import SpectrumModel

HERE = Path(__file__).parent
NETWORK, MEMBERS = "photometry", 5
FACTOR, STEP = 0.6, 0.5  # of the spoiled posterior: band lengths, and shift in 68 % half-widths


class Study:
    "Galaxies, networks and what 25_posterior to 27_domain have made."

    def __init__(self, data_dir):
        self.profile = config.get_profile("study")
        self.paths = config.get_paths(self.profile, data_dir)
        self.decoder = SpectrumModel.load(self.paths.vae)
        self.grid = grid_of(self.decoder.wavelength)
        self.images = open_images(self.paths.images)
        latents = pd.read_parquet(self.paths.latents)
        self.sample = make_sample(
            self.images, latents, self.profile.training.stretch, self.profile.seed)
        self.networks = [with_features(models.load(self.paths.weights(NETWORK, seed)))
            for seed in range(self.profile.seed, self.profile.seed + MEMBERS)]
        self.posterior = SpectrumPosterior.load(
            self.paths.posterior, self.networks[0], self.decoder)
        self.calibration = Calibration.load(self.paths.calibration)
        self.domain = Domain.load(self.paths.domain)

    def ids(self, split): return self.sample.rows(split).specobjid

    def outputs(self, network, split):
        "Of a network with features."
        batches = self.images.batches(self.ids(split))
        return models.predict_batches(
            network.model, batches, network.transform, network.symmetric)

    def targets(self, split):
        rows = self.sample.rows(split)
        return rows[target_columns(rows)].to_numpy(np.float32)

    def magnitude(self, split):
        batches = self.images.batches(self.ids(split))
        return np.concatenate([reference_magnitude(flux, self.images.survey) for flux in batches])

    @cached_property
    def test(self):
        "What the posterior says of the test galaxies."
        return describe(self.posterior, self.outputs(self.networks[0], "test"), n_jobs=-1)

    @cached_property
    def truth(self):
        "True columns of the test galaxies."
        return known_columns(load_reference(self.ids("test"), self.paths), self.grid)[0]


def compare(study) -> pd.DataFrame:
    "One row a posterior."
    settings, seed = study.profile.posterior, study.profile.seed
    parts = [{split: (study.outputs(network, split), study.targets(split))
        for split in ("train", "valid", "test")} for network in study.networks]
    outputs, truth = map(torch.as_tensor, parts[0]["test"])
    normal = torch.from_numpy(even_normal(settings.n_draws, truth.shape[1], seed))
    log_density, draws, seconds = {}, {}, {}

    def fitted(density, part, seed):
        chosen = config.replace(settings, density=density)
        began = time.time()
        posterior = fit_posterior(part["train"], part["valid"], chosen, seed, False).posterior
        return posterior, time.time() - began

    for density in ("flow", "gaussian"):
        posterior, seconds[density] = fitted(density, parts[0], seed)
        with torch.no_grad(): log_density[density] = posterior.log_prob(outputs, truth).numpy()
        draws[density] = posterior.draw(outputs, normal).numpy()
    for density in ("gaussian", "flow"):
        members = [fitted(density, part, seed + k) for k, part in enumerate(parts)]
        name = f"ensemble of {MEMBERS}, {density}"
        seconds[name] = sum(time for _, time in members)
        own = [torch.as_tensor(part["test"][0]) for part in parts]
        with torch.no_grad():
            each = [m.log_prob(x, truth) for (m, _), x in zip(members, own, strict=True)]
        log_density[name] = (torch.stack(each).logsumexp(0) - np.log(MEMBERS)).numpy()
        some = [m.draw(x, normal[k::MEMBERS]) for k, ((m, _), x) in
            enumerate(zip(members, own, strict=True))]
        draws[name] = torch.cat(some, 1).numpy()
    constant = GaussianErrors.of(study.networks[0])
    errors = torch.distributions.MultivariateNormal(
        torch.tensor(constant.bias), torch.tensor(constant.covariance))
    log_density["constant"] = errors.log_prob(outputs[:, :truth.shape[1]] - truth).numpy()
    draws["constant"] = constant.draw(outputs, normal).numpy()
    return _table(draws, log_density, seconds, outputs.numpy(), truth.numpy(), seed)


def _table(draws, log_density, seconds, outputs, truth, seed):
    rng, rows = config.random_generator(seed, "compare"), []
    points = points_near(outputs[:, :truth.shape[1]], truth, rng)
    score = {name: energy_score(drawn, truth) for name, drawn in draws.items()}
    for name, drawn in draws.items():
        apart = mean_difference(score[name], score["constant"], rng)
        rank = ranks(drawn, truth)
        off = np.mean([kstest(rank[:, k], "uniform").statistic for k in range(truth.shape[1])])
        rows.append(dict(posterior=name, neg_log_density=-log_density[name].mean(),
            energy_score=score[name].mean(), minus_constant=apart.value, lower=apart.lower,
            upper=apart.upper, rank_off=off,
            tarp_off=kstest(tarp(drawn, truth, points), "uniform").statistic,
            fit_seconds=seconds.get(name, 0.)))
    return pd.DataFrame(rows)


def speed(study) -> dict:
    "Milliseconds a galaxy for 128 draws, without and with lines, network not included."
    outputs, found = study.outputs(study.networks[0], "valid")[:256], {}
    for name, options in {"one process": dict(n_measured=0),
            "two processes": dict(n_measured=0, n_jobs=2),
            "with lines of 64 draws, one process": dict()}.items():
        describe(study.posterior, outputs, **options)  # processes start
        began = time.time()
        describe(study.posterior, outputs, **options)
        found[name] = 1e3*(time.time() - began)/len(outputs)
    return found


def spoiled(described):
    "Bands that are too short and off their place."
    bands = described.bands
    return described._replace(
        bands=Bands(bands.median + STEP*bands.half_width(), FACTOR*bands.below, FACTOR*bands.above))


def recalibration(study, n) -> pd.DataFrame:
    """Coverage of the true test spectra by bands that were spoiled, and recalibrated on n noisy
    spectra of valid galaxies."""
    base, n_bins, rows = study.calibration, len(study.decoder.wavelength), {}
    outputs = study.outputs(study.networks[0], "valid")[:n]
    described = dict(valid=describe(study.posterior, outputs, n_jobs=-1), test=study.test)
    magnitude = dict(valid=study.magnitude("valid")[:n], test=study.magnitude("test"))
    noisy, truth = load_reference(study.ids("valid")[:n], study.paths), study.truth
    columns = observed_columns(
        noisy.observed, noisy.error, noisy.missing, noisy.targets, study.grid)
    for name, change in dict(unchanged=lambda d: d, spoiled=spoiled).items():
        test = change(described["test"])
        new = base.recalibrated(change(described["valid"]), *columns, magnitude["valid"], n_bins)
        for which, calibration in dict(before=base, after=new).items():
            bands = calibration(test.bands, magnitude["test"], test.spread)
            covered = np.where(np.isfinite(truth), stretch_scores(bands, truth) <= 1, np.nan)
            over_bins = np.nanmean(covered, 1)[:, :n_bins]
            rows[name, which] = dict(zip([f"{level:.0%}" for level in LEVELS],
                np.nanmean(over_bins, 1), strict=True))
            apart = np.abs(over_bins - np.array(LEVELS)[:, None])
            rows[name, which]["median deviation at 68 %"] = np.nanmedian(apart[1])
    table = pd.DataFrame(rows).T
    return table.rename_axis(["posterior", "recalibration"]).reset_index()


SIZES = "radius", "half_light_radius", "bulge_radius", "disk_scale", "clump_size"


def far_away(study, n=300) -> dict:
    "A row of the table, of massive galaxies that are moved to redshifts of 0.4 to 0.5."
    rng = config.random_generator(study.profile.seed, "far")
    table = draw_parameters(4*n, rng, "all").nlargest(n, "log_mass").reset_index(drop=True)
    redshift = rng.uniform(0.4, 0.5, n)
    scale = [COSMOLOGY.kpc_proper_per_arcmin(z).value for z in (table.redshift, redshift)]
    table[[*SIZES]] *= (scale[0]/scale[1])[:, None]
    survey, size = study.images.survey, study.images.shape[-1]
    light = make_light(stellar_library(), table.assign(redshift=redshift), survey)
    usual = np.concatenate(list(study.images.batches(study.ids("test")[:n])))
    far = np.nan_to_num(observe_stamps(light, survey, size, study.profile.seed))
    score = [study.domain.judge(flux, survey).score for flux in (usual, far)]
    return dict(damage="redshift 0.4 to 0.5", flagged=(score[1] > 1).mean(),
        score=roc_auc_score(np.repeat([0, 1], n), np.concatenate(score)))


def draw_figure(study, out):
    described, truth = study.test, study.truth
    flux = np.concatenate(list(study.images.batches(study.ids("test"))))
    reasons = study.domain.judge(flux, study.images.survey).reasons
    flagged = np.array([bool(words) for words in reasons])
    place = study.magnitude("test"), described.spread
    bands = study.calibration(described.bands, *place, flagged)
    wave, coverage = study.decoder.wavelength, pd.read_csv(out/"coverage.csv")
    n_bins, k = len(wave), len(wave) + QUANTITIES.index("halpha_ew")
    figure = Figure(figsize=(11, 9), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 1.3))
    order = np.argsort(described.spread)
    order = order[~flagged[order]]
    rows = dict(narrow=order[len(order)//20], wide=order[-len(order)//20])
    if flagged.any(): rows["flagged"] = flagged.argmax()
    for ax, (name, row) in zip(top.subplots(len(rows), 1, sharex=True), rows.items(), strict=True):
        plot_bands(ax, wave, bands, row, truth[row, :n_bins])
        words = f": {reasons[row]}" if reasons[row] else " band"
        ax.set_title(name + words, fontsize=9)
    ax.set_xlabel("rest-frame wavelength (Å)")
    top.axes[0].legend(frameon=False, fontsize=8, ncols=3, loc="lower right")
    left, middle, right = bottom.subplots(1, 3)
    for which, style in dict(flow="-", constant=":").items():
        table = coverage[(coverage.posterior == which) & coverage.cell.str.startswith("spread")]
        means = table.groupby(["cell", "level"]).coverage.mean().unstack("cell")
        for (cell, line), colour in zip(means.items(), COLOURS, strict=False):
            label = cell.replace("spread", "fifth") if which == "flow" else None
            left.plot(means.index, line, style, marker=".", color=colour, label=label)
    left.plot([0.5, 0.95], [0.5, 0.95], "k", lw=0.6)
    left.set(xlabel="level", ylabel="coverage",
        title="by predicted spread (dotted: constant)")
    left.legend(frameon=False, fontsize=7)
    found = ranks(described.targets, truth[:, -described.targets.shape[-1]:])
    middle.hist(found, np.linspace(0, 1, 13), density=True, histtype="step",
        color=COLOURS[:found.shape[1]])
    middle.axhline(1, color="k", lw=0.6)
    middle.set(xlabel="rank of the true target among draws", ylabel="density", ylim=(0, 2),
        title="six targets, before calibration")
    width = bands.half_width()[:, k]
    error = np.abs(truth - bands.median)[:, k]
    right.loglog(width, error, ".", ms=2, color=RED)
    right.loglog(*2*[np.quantile(width, (0.01, 0.99))], "k", lw=0.8)
    right.set(xlabel="half-width of the 68 % band (Å)", ylabel="|error| (Å)",
        ylim=(1e-2, None), title="Hα equivalent width")
    for ax in (left, middle, right): ax.title.set_fontsize(9)
    figure.savefig(HERE.parent/"figures"/"uncertainty.png", dpi=100)


def shown(table, digits=3) -> str:
    "A table for the page."
    lines = [[f"{v:.{digits}f}" if isinstance(v, float) else v for v in row]
        for row in table.itertuples(index=False)]
    return "\n".join(markdown(list(table.columns), lines))


def write_page(study, out):
    tables = {path.stem: pd.read_csv(path) for path in out.glob("*.csv")}
    tables["coverage"] = summarise_coverage(tables["coverage"])
    tables["auc"] = tables["auc"].astype(object).where(tables["auc"].notna(), "")
    facts = read_manifest("27_domain", study.paths)["facts"]
    machine = f"{platform.machine()}, {torch.get_num_threads()} cores, torch {torch.__version__}"
    text = (HERE/"uncertainty_text.md").read_text().format(machine=machine,
        auc_of_agn=facts["auc_of_agn"], **{name: shown(table) for name, table in tables.items()})
    (HERE/"uncertainty.md").write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", help="folder that holds study/")
    study = Study(parser.parse_args().data_dir)
    out = HERE/"uncertainty"
    out.mkdir(exist_ok=True)
    compare(study).to_csv(out/"posteriors.csv", index=False)
    recalibration(study, 300).to_csv(out/"recalibration.csv", index=False)
    times = pd.Series(speed(study), name="ms a galaxy").rename_axis("on one core each")
    times.to_csv(out/"speed.csv")
    for name in ("coverage", "wavelengths", "sharpness", "classes"):
        table = pd.read_csv(study.paths.calibration_tables/f"{name}.csv")
        table.round(4).to_csv(out/f"{name}.csv", index=False)
    auc = pd.read_csv(study.paths.domain_tables/"auc.csv").round(4)
    auc = pd.concat([auc, pd.DataFrame([far_away(study)])], ignore_index=True)
    auc.round(4).to_csv(out/"auc.csv", index=False)
    draw_figure(study, out)
    write_page(study, out)


if __name__ == "__main__": main()
