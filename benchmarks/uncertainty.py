"""Four posteriors beside each other on the test galaxies of the profile `study`, their speed, and a
recalibration from noisy spectra; with the tables of 26_calibration and 27_domain: uncertainty.md.

    for stage in 11 14 15 18 21; do specpred reproduce --profile study --only $stage; done
    specpred reproduce --profile study --only 24_training --set training.models=photometry \
        --set training.seeds=5
    for stage in 25 26 27; do specpred reproduce --profile study --only $stage; done
    python benchmarks/uncertainty.py

takes half an hour on two cores."""
import argparse
import platform
import time
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
    WHOLE,
    Bands,
    Calibration,
    describe,
    grid_of,
    known_columns,
    load_reference,
    mean_difference,
    observed_columns,
    points_near,
    ranks,
    stretch_scores,
    tarp,
)
from specpred.domain import Domain
from specpred.images import aperture_magnitudes, open_images
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
        self.images = open_images(self.paths.images)
        latents = pd.read_parquet(self.paths.latents)
        self.sample = make_sample(
            self.images, latents, self.profile.training.stretch, self.profile.seed)

    def parts(self, seed):
        "Outputs of the network with features, and targets, by split."
        network, parts = self.network(seed), {}
        for split in ("train", "valid", "calib", "test"):
            rows = self.sample.rows(split)
            batches = self.images.batches(rows.specobjid)
            outputs = models.predict_batches(
                network.model, batches, network.transform, network.symmetric)
            parts[split] = outputs, rows[target_columns(rows)].to_numpy(np.float32)
        return parts

    def network(self, seed):
        return with_features(models.load(self.paths.weights(NETWORK, self.profile.seed + seed)))

    def magnitude(self, split):
        batches = self.images.batches(self.sample.rows(split).specobjid)
        scale = self.images.survey.pixel_scale
        return np.concatenate([aperture_magnitudes(flux, scale)[:, 1] for flux in batches])


def compare(study) -> pd.DataFrame:
    "One row a posterior."
    settings, seed = study.profile.posterior, study.profile.seed
    parts = [study.parts(k) for k in range(MEMBERS)]
    outputs, truth = map(torch.as_tensor, parts[0]["test"])
    normal = torch.from_numpy(even_normal(settings.n_draws, truth.shape[1], seed))
    log_density, draws, seconds = {}, {}, {}

    def fitted(density, part, seed):
        chosen = settings.model_copy(update=dict(density=density))
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
    constant = GaussianErrors.of(study.network(0))
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
    network = study.network(0)
    posterior = SpectrumPosterior.load(study.paths.posterior, network, study.decoder)
    outputs, found = study.parts(0)["test"][0][:256], {}
    for name, options in {"one process": dict(n_measured=0),
            "two processes": dict(n_measured=0, n_jobs=2),
            "with lines of 64 draws, one process": dict()}.items():
        describe(posterior, outputs, **options)  # processes start
        began = time.time()
        describe(posterior, outputs, **options)
        found[name] = 1e3*(time.time() - began)/len(outputs)
    return found


def spoiled(described):
    "Bands that are too short and off their place."
    bands = described.bands
    step = STEP*(bands.below[1] + bands.above[1])/2
    return described._replace(
        bands=Bands(bands.median + step, FACTOR*bands.below, FACTOR*bands.above))


def recalibration(study, n) -> pd.DataFrame:
    """Coverage of the true test spectra by bands that were spoiled, and recalibrated on n noisy
    spectra of valid galaxies."""
    network, parts = study.network(0), study.parts(0)
    posterior = SpectrumPosterior.load(study.paths.posterior, network, study.decoder)
    base, grid = Calibration.load(study.paths.calibration), grid_of(study.decoder.wavelength)
    n_bins, rows = len(study.decoder.wavelength), {}
    described, reference, magnitude = {}, {}, {}
    for split in ("valid", "test"):
        count = n if split == "valid" else None
        described[split] = describe(posterior, parts[split][0][:count], n_jobs=-1)
        ids = study.sample.rows(split).specobjid[:count]
        reference[split], magnitude[split] = load_reference(ids, study.paths), \
            study.magnitude(split)[:count]
    noisy = reference["valid"]
    columns = observed_columns(
        noisy.observed, noisy.error, noisy.missing, noisy.targets, grid)
    truth, _ = known_columns(reference["test"], grid)
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
    domain, ids = Domain.load(study.paths.domain), study.sample.rows("test").specobjid[:n]
    usual = np.concatenate(list(study.images.batches(ids)))
    far = np.nan_to_num(observe_stamps(light, survey, size, study.profile.seed))
    score = [domain.judge(flux, survey).score for flux in (usual, far)]
    return dict(damage="redshift 0.4 to 0.5", flagged=(score[1] > 1).mean(),
        score=roc_auc_score(np.repeat([0, 1], n), np.concatenate(score)))


def describe_test(study):
    "What the figure shows: bands, truth, draws, flags."
    network, seed = study.network(0), study.profile.seed
    flow = SpectrumPosterior.load(study.paths.posterior, network, study.decoder)
    calibration = Calibration.load(study.paths.calibration)
    outputs, targets = study.parts(0)["test"]
    described = describe(flow, outputs, n_jobs=-1)
    ids = study.sample.rows("test").specobjid
    flux = np.concatenate(list(study.images.batches(ids)))
    domain = Domain.load(study.paths.domain)
    reasons = domain.judge(flux, study.images.survey).reasons
    flagged = np.array([bool(words) for words in reasons])
    bands = calibration(described.bands, study.magnitude("test"), described.spread, flagged)
    truth, _ = known_columns(load_reference(ids, study.paths), grid_of(study.decoder.wavelength))
    assert seed == flow.seed and len(targets) == len(truth)
    return bands, truth, described, reasons


def draw_figure(study, out):
    bands, truth, described, reasons = describe_test(study)
    wave, coverage = study.decoder.wavelength, pd.read_csv(out/"coverage.csv")
    n_bins, k = len(wave), len(wave) + QUANTITIES.index("halpha_ew")
    figure = Figure(figsize=(11, 9), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 1.3))
    flagged = np.flatnonzero([bool(words) for words in reasons])
    order = np.argsort(described.spread)
    order = order[~np.isin(order, flagged)]
    rows = dict(narrow=order[len(order)//20], wide=order[-len(order)//20])
    if len(flagged): rows["flagged"] = flagged[0]
    lower, upper = (ends[..., :n_bins] for ends in bands.ends())
    for ax, (name, row) in zip(top.subplots(len(rows), 1, sharex=True), rows.items(), strict=True):
        for level, alpha in ((3, 0.2), (1, 0.35)):
            ax.fill_between(wave, lower[level, row], upper[level, row], color=RED, alpha=alpha,
                lw=0, label=f"{LEVELS[level]:.0%} band")
        ax.plot(wave, truth[row, :n_bins], "k", lw=0.6, label="true spectrum")
        words = f": {reasons[row]}" if reasons[row] else " band"
        ax.set_title(name + words, fontsize=9)
        ax.set(ylabel="normalised flux", xlim=wave[[0, -1]],
            ylim=(0, 1.5*np.nanquantile(truth[row, :n_bins], 0.98)))
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
    width = (bands.below[WHOLE] + bands.above[WHOLE])[:, k]/2
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


def summed_coverage(table) -> pd.DataFrame:
    "One row a posterior and level."
    table = table.assign(deviation=(table.coverage - table.level).abs())
    grouped = table.groupby(["posterior", "level"], sort=False)
    return grouped.agg(cells=("beyond", "size"), beyond=("beyond", lambda b: int((b > 0).sum())),
        median_deviation=("deviation", "median"), largest_deviation=("deviation", "max"),
        half_width=("within", "median")).reset_index()


def write_page(study, out):
    tables = {path.stem: pd.read_csv(path) for path in out.glob("*.csv")}
    tables["coverage"] = summed_coverage(tables["coverage"])
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
