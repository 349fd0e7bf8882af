"""What is said of the uncertainty of a prediction: the posterior's draws, bands that hold what they
promise, and images that are not to be believed."""
import dataclasses
import re
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import test_predict
import torch
from astropy.table import Table
from scipy.stats import kstest, norm
from test_predict import example_flux, quietly, write_bands

from specpred import models
from specpred.calibration import (
    CLASSES, LEVELS, QUANTITIES, WHOLE, Bands, Calibration, Described, Groups, bands_of_draws,
    calibrate, class_probabilities, conformal_factors, coverage_by_cell, crps, describe,
    grouped_factors, interval_score, mean_difference, points_near, quintiles, ranks, spectral_class,
    stretch_scores, tarp, whole_scores)
from specpred.config import (
    DamagedFileError, InvalidInputError, MissingInputError, Paths, PosteriorParameters,
    WeightsError, random_generator)
from specpred.domain import Domain, fit_domain, image_faults, image_features, off_centre
from specpred.posterior import (
    GaussianErrors, SpectrumPosterior, SpectrumResidual, energy_score, even_normal, fit_posterior,
    fit_residual)
from specpred.predict import ObservedSpectra, Predictor, normalise, predict_files, recalibrate
from specpred.surveys import PS1
from specpred.vae import InfoVAE, SpectrumModel

Z = norm.ppf((1 + np.array(LEVELS))/2)  # half lengths of the bands of a standard normal
trained = test_predict.paths  # a fixture: a small untrained network and a decoder


# The distribution of the targets

def parabola(n, seed):
    "Outputs of a network (two predictions, three features), and targets along a curve."
    rng = np.random.default_rng(seed)
    along = rng.normal(0, 1, n)
    seen = along + rng.normal(0, 0.7, n)
    targets = np.column_stack([along, along**2 - 1]) + rng.normal(0, 0.1, (n, 2))
    return np.column_stack([seen/1.5, seen**2/2 - 1, rng.normal(size=(n, 3))]), targets


def fit(density, seed=0, epochs=8, **changed):
    parameters = PosteriorParameters(epochs=epochs, n_components=3, density=density, **changed)
    return fit_posterior(parabola(1000, 1), parabola(300, 2), parameters, seed, progress=False)


@pytest.fixture(scope="module", params=["flow", "gaussian"])
def fitted(request):
    return fit(request.param).posterior


@pytest.fixture(scope="module")
def flow():
    return fit("flow").posterior


def outputs_of(n, seed=3):
    return torch.tensor(parabola(n, seed)[0], dtype=torch.float32)


@torch.no_grad()
def density_on_grid(posterior, outputs, n=300):
    "Axes of arsinh of the targets, and the share of the probability in each cell of the grid."
    mean, std = posterior.target_mean, posterior.target_std
    axes = [torch.linspace(-7, 7, n)*std[k] + mean[k] for k in range(2)]
    first, second = torch.meshgrid(*axes, indexing="ij")
    stretched = torch.stack([first.ravel(), second.ravel()], 1)
    log_density = posterior.log_prob(outputs.expand(n*n, -1), stretched.sinh())
    log_density += stretched.cosh().log().sum(1)  # cells are of equal size in arsinh
    cell = (axes[0][1] - axes[0][0])*(axes[1][1] - axes[1][0])
    return [axis.numpy() for axis in axes], (log_density.exp()*cell).reshape(n, n).numpy()


def test_the_density_integrates_to_one_and_draws_follow_it(fitted):
    for row in (0, 4):
        outputs = outputs_of(5)[row:row + 1]
        axes, share = density_on_grid(fitted, outputs)
        assert share.sum() == pytest.approx(1, abs=0.02)
        normal = torch.tensor(even_normal(4096, 2, 0))
        draws = np.arcsinh(fitted.draw(outputs, normal)[0].numpy())
        for k in range(2):
            marginal = share.sum(1 - k)/share.sum()
            mean = float(marginal @ axes[k])
            std = float(np.sqrt(marginal @ (axes[k] - mean)**2))
            assert draws[:, k].mean() == pytest.approx(mean, abs=0.05*std)
            assert draws[:, k].std() == pytest.approx(std, rel=0.05)
            for p in (0.05, 0.25, 0.5, 0.75, 0.95):
                below = np.interp(np.quantile(draws[:, k], p), axes[k], np.cumsum(marginal))
                assert below == pytest.approx(p, abs=0.03)


def test_the_flow_follows_a_curve_that_a_gaussian_cannot():
    outputs, targets = (torch.tensor(a, dtype=torch.float32) for a in parabola(500, 4))
    density = {name: fit(name).posterior.log_prob(outputs, targets).mean().item()
        for name in ("flow", "gaussian")}
    assert density["flow"] > density["gaussian"] + 0.5


def test_a_seed_gives_the_same_posterior_and_another_seed_another():
    first, again, other = (fit("flow", seed, epochs=2) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first.history, again.history)
    states = [one.posterior.state_dict() for one in (first, again, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert any(not torch.equal(value, states[2][name]) for name, value in states[0].items())


def test_fitting_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    fit("gaussian", epochs=1)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


def test_the_best_epoch_is_kept():
    found = fit("gaussian", lr=0.3)
    outputs, targets = (torch.tensor(a, dtype=torch.float32) for a in parabola(300, 2))
    loss = -found.posterior.log_prob(outputs, targets).mean().item()
    assert loss == pytest.approx(found.history.valid.min(), abs=1e-5)


@pytest.mark.parametrize("change, said", [
    (lambda x, y: (np.where(np.arange(len(x))[:, None] == 7, np.nan, x), y),
        "outputs of 1 galaxies are not finite, the first is number 7"),
    (lambda x, y: (x, np.where(np.arange(len(x))[:, None] > 97, np.inf, y)),
        "targets of 2 galaxies are not finite, the first is number 98"),
    (lambda x, y: (x[:50], y), r"outputs \(50, 5\) and targets \(100, 2\)"),
    (lambda x, y: (x[:, :1], y), r"outputs \(100, 1\) and targets \(100, 2\)"),
    (lambda x, y: (x, y[:, 0]), r"targets \(100,\)"),
    (lambda x, y: (x[:0], y[:0]), r"outputs \(0, 5\)")])
def test_galaxies_that_nothing_can_be_fitted_to(change, said):
    good, bad = parabola(100, 0), change(*parabola(100, 0))
    for train, valid in ((bad, good), (good, bad)):
        with pytest.raises(InvalidInputError, match=said):
            fit_posterior(train, valid, PosteriorParameters(epochs=1), 0, progress=False)


def test_draws_of_the_normal_distribution_are_even():
    even = even_normal(128, 6, 3)
    assert even.shape == (128, 6) and even.dtype == np.float32
    np.testing.assert_array_equal(even, even_normal(128, 6, 3))
    assert not np.array_equal(even, even_normal(128, 6, 4))
    p = np.array([0.025, 0.16, 0.5, 0.84, 0.975])
    def worst(draws): return np.abs(np.quantile(draws, p, 0) - norm.ppf(p)[:, None]).mean()
    random = [np.random.default_rng(k).standard_normal((128, 6)) for k in range(20)]
    assert worst(even) < min(map(worst, random))/2
    assert np.abs(np.corrcoef(even.T) - np.eye(6)).max() < 0.1
    for n in (1, 3, 100): assert even_normal(n, 2, 0).shape == (n, 2)


# The distribution of the spectra

def small_decoder(n_targets=2, n_bins=60, step=0.0065):
    "Its spectra are nearly flat, with an L2 norm of about 1."
    torch.manual_seed(1)
    vae = InfoVAE(n_bins, hidden=(40, 20)).eval()
    with torch.no_grad():
        for parameter in vae.outp.parameters(): parameter.mul_(0.02)
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(10, n_targets)))[0].T
    return SpectrumModel(vae,
        wavelength=10**(3.53 + step*np.arange(n_bins)), mean=np.full(n_bins, n_bins**-0.5),
        components=axes, centre=np.zeros(10), target_mean=np.zeros(n_targets),
        target_std=np.ones(n_targets))


def some_residual(n_bins=60):
    rng = np.random.default_rng(2)
    loadings, variance = 0.01*rng.normal(size=(3, n_bins)), rng.uniform(1e-5, 1e-4, n_bins)
    return SpectrumResidual(*map(np.float32, (loadings, variance)), np.array([0.7, 0.3]))


@pytest.fixture(scope="module")
def spectrum_posterior(flow):
    return SpectrumPosterior(flow, some_residual(), small_decoder(), seed=4)


def test_draws_of_a_galaxy_do_not_depend_on_the_others(fitted):
    posterior = SpectrumPosterior(fitted, some_residual(), small_decoder(), seed=4)
    outputs = outputs_of(40)
    together = posterior.draw(outputs, 32)
    for row in (0, 17, 39):
        alone = posterior.draw(outputs[row:row + 1], 32)
        np.testing.assert_allclose(alone.targets[0], together.targets[row], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(alone.spectra[0], together.spectra[row], atol=1e-5)


def test_descriptions_do_not_depend_on_the_size_of_blocks(spectrum_posterior):
    outputs = outputs_of(40)
    whole, blocks = (describe(spectrum_posterior, outputs, 32, 0, block=n) for n in (40, 7))
    for name in ("median", "below", "above"):
        np.testing.assert_allclose(
            getattr(blocks.bands, name), getattr(whole.bands, name), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(blocks.spread, whole.spread, atol=1e-4)
    n_bins, n_targets = 60, 2
    assert whole.bands.median.shape == (40, n_bins + len(QUANTITIES) + n_targets)
    of_targets = bands_of_draws(whole.targets).median
    np.testing.assert_array_equal(whole.bands.median[:, -n_targets:], of_targets)


def test_outputs_that_are_not_finite_are_refused(spectrum_posterior):
    outputs = outputs_of(5).numpy()
    outputs[2, 4] = np.nan
    outputs[3, 0] = np.inf
    with pytest.raises(InvalidInputError, match="output for 2 images is not finite"):
        spectrum_posterior.draw(outputs)


@pytest.mark.parametrize("shape, n_draws", [((5,), 8), ((5, 4), 8), ((5, 5), 0)])
def test_outputs_of_another_shape_are_refused(spectrum_posterior, shape, n_draws):
    with pytest.raises(InvalidInputError, match="expected outputs"):
        spectrum_posterior.draw(np.zeros(shape), n_draws)


def test_no_galaxies_have_no_draws(spectrum_posterior):
    targets, spectra = spectrum_posterior.draw(np.zeros((0, 5)), 8)
    assert targets.shape == (0, 8, 2) and spectra.shape == (0, 8, 60)
    with pytest.raises(InvalidInputError, match="no galaxies"):
        describe(spectrum_posterior, np.zeros((0, 5)), n_measured=0)


def test_valid_galaxies_need_the_columns_of_the_training_ones():
    outputs, targets = parabola(50, 1)
    for valid in ((outputs, targets[:, :1]), (outputs[:, :4], targets)):
        with pytest.raises(InvalidInputError, match="the same columns"):
            fit_posterior((outputs, targets), valid, PosteriorParameters(), 0, progress=False)


def test_constant_errors_are_taken_off_the_prediction():
    bias, covariance = np.array([0.3, -0.2]), np.array([[0.5, 0.2], [0.2, 0.3]])
    outputs = torch.tensor([[1., 2., 9.], [-1., 0., 9.]])
    draws = GaussianErrors(bias, covariance).draw(outputs, even_normal(2048, 2, 0)).numpy()
    np.testing.assert_allclose(draws.mean(1), outputs[:, :2].numpy() - bias, atol=0.01)
    for own in draws: np.testing.assert_allclose(np.cov(own.T), covariance, atol=0.02)


def noisy_spectra(n=6000, n_bins=30, growth=(0.4, 0.6), seed=0):
    "Targets, decoded spectra, what is left besides, its covariance, and three times as much noise."
    rng = np.random.default_rng(seed)
    shapes, variance = rng.normal(size=(2, n_bins)), rng.uniform(0.2, 0.6, n_bins)
    targets, decoded = rng.normal(size=(n, 4)), rng.normal(size=(n, n_bins))
    left = rng.normal(size=(n, 2)) @ shapes + rng.normal(size=(n, n_bins))*variance**0.5
    left *= np.sqrt(growth[0] + growth[1]*(targets**2).mean(1))[:, None]
    error = rng.uniform(1, 3, (n, n_bins))
    noise = error*rng.normal(size=error.shape)
    return targets, decoded, left, shapes.T @ shapes + np.diag(variance), error, noise


def covariance_of(residual):
    return residual.loadings.T @ residual.loadings + np.diag(residual.variance)


def correlation(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def test_what_the_decoder_leaves_out_is_found_under_larger_noise():
    targets, decoded, left, true, error, noise = noisy_spectra()
    assert (error**2).mean() > 2*np.diag(true).mean()
    nothing = np.zeros(error.shape, bool)
    found = fit_residual(decoded + left + noise, error, nothing, decoded, targets, 2)
    assert correlation(covariance_of(found), true) > 0.97
    assert np.trace(covariance_of(found)) == pytest.approx(np.trace(true), rel=0.05)
    np.testing.assert_allclose(found.growth, (0.4, 0.6), atol=0.12)
    with_noise = fit_residual(
        decoded + left + noise, 0*error, nothing, decoded, targets, 2)
    assert np.trace(covariance_of(with_noise)) > 2.5*np.trace(true)


def test_deviations_are_constant_where_they_do_not_grow():
    targets, decoded, left, _, error, _ = noisy_spectra(growth=(1., 0.))
    growth = fit_residual(decoded + left, 0*error, error < 0, decoded, targets, 2).growth
    np.testing.assert_allclose(growth, (1, 0), atol=0.06)


@pytest.mark.parametrize("flux, error",
    [(np.nan, np.inf), (1e6, np.nan), (0., np.inf), (np.inf, 0)])
def test_what_is_in_missing_bins_does_no_harm(flux, error):
    targets, decoded, left, true, sigma, noise = noisy_spectra()
    missing = np.random.default_rng(1).uniform(size=sigma.shape) < 0.3
    missing[:, 0] = True  # never measured
    observed, sigma = decoded + left + noise, sigma.copy()
    clean = fit_residual(np.where(missing, 0, observed), np.where(missing, 1, sigma), missing,
        decoded, targets, 2)
    found = fit_residual(np.where(missing, flux, observed), np.where(missing, error, sigma),
        missing, decoded, targets, 2)
    for name in ("loadings", "variance", "growth"):
        np.testing.assert_array_equal(getattr(found, name), getattr(clean, name))
    assert correlation(covariance_of(found)[1:, 1:], true[1:, 1:]) > 0.95
    assert (found.variance >= 0).all() and np.abs(covariance_of(found)[0]).max() < 1e-6


def test_draws_of_the_residual_have_its_covariance():
    residual = some_residual()
    draws = residual.unit_draws(4096, seed=0)
    off = np.cov(draws.T) - covariance_of(residual)
    assert np.abs(off).max() < 0.08*covariance_of(residual).max()
    targets = np.array([[0., 0.], [3., 1.]])
    np.testing.assert_allclose(residual.scale(targets), np.sqrt([0.7, 0.7 + 0.3*5]))
    assert not SpectrumResidual.none(9).unit_draws(16, 0).any()


# Files

def network_of(seed):
    "A small untrained network."
    torch.manual_seed(seed)
    n = len(PS1.bands)
    return models.TrainedModel(models.MODELS["conv3"](c_in=n, n_out=2), "conv3",
        dict(c_in=n, n_out=2), image_stats=((0.5,)*n, (1.,)*n), target_stats=((0.,)*2, (1.,)*2),
        provenance=dict(image_size=32))


def test_a_posterior_is_read_as_it_was_written(spectrum_posterior, tmp_path):
    network, path = network_of(0), tmp_path/"posterior.safetensors"
    spectrum_posterior.save(path, network, model="conv3-0")
    again = SpectrumPosterior.load(path, network, spectrum_posterior.decoder)
    outputs = outputs_of(5)
    for old, new in zip(spectrum_posterior.draw(outputs), again.draw(outputs), strict=True):
        np.testing.assert_array_equal(new, old)
    with pytest.raises(WeightsError, match="made for another network than this conv3's"):
        SpectrumPosterior.load(path, network_of(1), spectrum_posterior.decoder)
    other = dataclasses.replace(spectrum_posterior.decoder, vae=InfoVAE(60, hidden=(40, 20)))
    with pytest.raises(WeightsError, match="made for another decoder"):
        SpectrumPosterior.load(path, network, other)


def test_a_posterior_knows_all_of_its_decoder_and_network(spectrum_posterior, tmp_path):
    "The same autoencoder with other axes, or images stretched otherwise, give other spectra."
    path, network = tmp_path/"posterior.safetensors", network_of(0)
    decoder = spectrum_posterior.decoder
    spectrum_posterior.save(path, network)
    turned = dataclasses.replace(decoder, components=decoder.components[::-1].copy())
    with pytest.raises(WeightsError, match="another decoder"):
        SpectrumPosterior.load(path, network, turned)
    mean, std = network.image_stats
    other = dataclasses.replace(network, image_stats=(mean, tuple(2*s for s in std)))
    with pytest.raises(WeightsError, match="another network"):
        SpectrumPosterior.load(path, other, decoder)
    with pytest.raises(InvalidInputError, match="needs the decoder"):
        SpectrumPosterior.load(path, network, None)
    constant = dataclasses.replace(
        spectrum_posterior, targets=GaussianErrors(np.zeros(2), np.eye(2)))
    with pytest.raises(InvalidInputError, match="nothing to save"): constant.save(path, network)


def normal_bands(median, width):
    "Bands of normal distributions, whose medians and widths are (N, M)."
    return Bands(median, *2*[Z[:, None, None]*(width + 0*median)])


def described(median, width, spread=None):
    "What a posterior would say that has normal distributions."
    spread = np.log(width + 0*median).mean(1) if spread is None else spread
    nothing = np.zeros((len(median), 1, 1))
    return Described(normal_bands(median, width), spread, nothing, nothing)


def a_calibration(n=900, n_bins=6, n_columns=8, seed=0, error=1.):
    "A calibration from galaxies with normal errors, their description, values and magnitudes."
    rng = np.random.default_rng(seed)
    width = rng.uniform(0.5, 2, (n, 1))
    median = rng.normal(size=(n, n_columns))
    values = median + error*width*rng.normal(size=median.shape)
    said, magnitude = described(median, width), rng.uniform(14, 18, n)
    return calibrate(said, values, None, magnitude, n_bins), said, values, magnitude


def test_a_calibration_is_read_as_it_was_written(tmp_path):
    calibration, said, _, magnitude = a_calibration()
    calibration.save(tmp_path/"calibration.safetensors", profile="demo")
    again = Calibration.load(tmp_path/"calibration.safetensors")
    place = said.bands, magnitude, said.spread
    flagged = np.arange(len(magnitude)) % 3 == 0
    for of in (lambda c: c(*place, flagged), lambda c: c.whole_bands(*place, 6)):
        for old, new in zip(of(calibration), of(again), strict=True):
            np.testing.assert_array_equal(new, old)
    assert again.n == calibration.n == 900


@pytest.mark.parametrize("what", ["posterior", "calibration", "domain"])
def test_files_that_cannot_be_read(what, spectrum_posterior, domain, tmp_path):
    "Those of another kind, cut short and absent."
    network, path = network_of(0), tmp_path/"file.safetensors"
    saved = dict(posterior=lambda p: spectrum_posterior.save(p, network),
        calibration=a_calibration()[0].save, domain=domain.save)
    load = dict(posterior=lambda p: SpectrumPosterior.load(p, network, spectrum_posterior.decoder),
        calibration=Calibration.load, domain=Domain.load)[what]
    for kind, save in saved.items():
        if kind == what: continue
        save(path)
        with pytest.raises(WeightsError, match="holds '.*'; expected '"): load(path)
    saved[what](path)
    load(path)
    content = path.read_bytes()
    for n in (0, 50, len(content)//2, len(content) - 1):
        path.write_bytes(content[:n])
        with pytest.raises(DamagedFileError, match="file.safetensors"): load(path)
    with pytest.raises(MissingInputError, match="none.safetensors"):
        load(tmp_path/"none.safetensors")


# Scores

def test_scores_are_those_of_their_formulas():
    rng = np.random.default_rng(0)
    for n in (2, 7, 10):
        draws, truth = rng.normal(size=(4, n, 3)), rng.normal(size=(4, 3))
        near = np.linalg.norm(draws - truth[:, None], axis=-1).mean(1)
        pairs = np.linalg.norm(draws[:, :, None] - draws[:, None], axis=-1).sum((1, 2))/(n*(n - 1))
        np.testing.assert_allclose(energy_score(draws, truth), near - pairs/2)
        one = np.abs(draws[:, :, None] - draws[:, None]).sum((1, 2))/(n*(n - 1))
        expected = np.abs(draws - truth[:, None]).mean(1) - one/2
        np.testing.assert_allclose(crps(draws, truth), expected)
    lower, upper, truth = np.array([[-1., 0, 0, -1], [1, 1, 2, 3], [0, 1.5, -0.5, 3]])
    expected = [2, 1 + 2/0.2*0.5, 2 + 2/0.2*0.5, 4]
    np.testing.assert_allclose(interval_score(lower, upper, truth, level=0.8), expected)


def opinions_of(n_dims, n=700, n_draws=128):
    "Truth, what a network predicts from a noisy view of it, and draws of several posteriors."
    rng = np.random.default_rng(n_dims)
    truth = rng.normal(size=(n, n_dims))
    predicted = (truth + rng.normal(size=truth.shape))/2
    def about(shift=0., width=1.):
        noise = rng.normal(size=(n, n_draws, n_dims))
        return predicted[:, None] + shift + width*np.sqrt(0.5)*noise
    opinions = dict(honest=about(), biased=about(shift=0.4), overconfident=about(width=0.6),
        hesitant=about(width=1.6), prior=rng.normal(size=(n, n_draws, n_dims)))
    return truth, predicted, opinions


@pytest.mark.parametrize("n_dims", [2, 6])
def test_only_the_honest_posterior_passes(n_dims):
    truth, predicted, opinions = opinions_of(n_dims)
    points = points_near(predicted, truth, np.random.default_rng(0))
    energy = {name: energy_score(draws, truth).mean() for name, draws in opinions.items()}
    crpss = {name: crps(draws, truth).mean() for name, draws in opinions.items()}
    for name, draws in opinions.items():
        p = kstest(tarp(draws, truth, points), "uniform").pvalue
        assert (p > 0.01) if name == "honest" else (p < 0.05), (name, p)
        if name != "honest":
            assert energy[name] > energy["honest"] and crpss[name] > crpss["honest"], name
    assert kstest(ranks(opinions["honest"], truth)[:, 0], "uniform").pvalue > 0.01


def test_the_best_interval_is_the_true_one():
    truth = np.random.default_rng(0).normal(size=20000)
    for level in (0.5, 0.9):
        ends = {width: width*norm.ppf((1 + level)/2) for width in (0.7, 1, 1.4)}
        mean = {k: interval_score(-end, end, truth, level).mean() for k, end in ends.items()}
        assert min(mean, key=mean.get) == 1


def test_ranks_of_unknown_truths_are_unknown():
    draws = np.arange(4.)[None, :, None] + np.zeros((1, 4, 3))
    (below, middle, unknown), = ranks(draws, np.array([[-1., 1.5, np.nan]]))
    assert 0 < below < 0.2 and 0.4 < middle < 0.6 and np.isnan(unknown)


def test_the_difference_of_paired_scores():
    "Its interval holds the truth about as often as it says; unknown scores are left out."
    held = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        shared, other = 5*rng.normal(size=60), rng.normal(size=60)
        scores = shared + other + 0.2
        scores[:5] = np.nan
        found = mean_difference(scores, shared, rng, n_draws=200)
        held.append(found.lower <= 0.2 <= found.upper)
        assert found.value == pytest.approx(0.2 + other[5:].mean())
    assert 0.86 <= np.mean(held) <= 1


# Bands

def test_bands_are_quantiles_of_the_draws_that_are_known():
    draws = np.random.default_rng(0).normal(size=(3, 50, 4))
    draws[0, 7:, 1] = np.nan
    draws[1, :, 2] = np.nan
    bands = bands_of_draws(draws)
    lower, upper = bands.ends()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nothing is known of one
        def quantile(p): return np.nanquantile(draws, p, 1, method="hazen")
        np.testing.assert_allclose(bands.median, quantile(0.5), atol=1e-6)
        for k, level in enumerate(LEVELS):
            np.testing.assert_allclose(lower[k], quantile((1 - level)/2), atol=1e-6)
            np.testing.assert_allclose(upper[k], quantile((1 + level)/2), atol=1e-6)


def test_conformal_factors_hold_what_they_promise():
    "On average over samples of 150: the stated level, and no more than 1/151 above."
    n, repetitions = 150, 4000
    rng = np.random.default_rng(0)
    bands = Bands(np.full((n, repetitions), 3.), np.ones((4, n, repetitions)),
        2*np.ones((4, n, repetitions)))
    errors = rng.normal(size=(n, repetitions))
    scores = stretch_scores(bands, 3 + np.where(errors > 0, 2, 1)*errors)
    coverage = (2*norm.cdf(conformal_factors(scores)) - 1).mean(1)
    assert (coverage > np.array(LEVELS) - 0.002).all(), coverage
    assert (coverage < np.array(LEVELS) + 1/(n + 1) + 0.002).all(), coverage


@pytest.mark.parametrize("sigma", [0.5, 1.5])
def test_noise_comes_off_the_distance(sigma):
    "Factors from noisy values are right for noiseless ones; without the correction they are not."
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(1500, 20))
    observed, bands = truth + sigma*rng.normal(size=truth.shape), normal_bands(0*truth, 0.7)
    def coverage(noise):
        factors = conformal_factors(stretch_scores(bands, observed, noise))
        return (2*norm.cdf(0.7*Z[:, None]*factors) - 1).mean(1)
    np.testing.assert_allclose(coverage(sigma), LEVELS, atol=0.03)
    assert (coverage(0.) > np.array(LEVELS) + 0.02).all()


@pytest.mark.parametrize("n", [100, 399, 400, 801, 1603, 2222, 5000])
def test_groups_are_large_enough_and_new_galaxies_have_one(n):
    rng = np.random.default_rng(n)
    magnitude, spread = rng.uniform(14, 18, n), rng.normal(size=n)
    groups = Groups.of(magnitude, spread)
    sizes = np.bincount(groups(magnitude, spread), minlength=len(groups))
    assert len(sizes) == len(groups) and sizes.min() >= min(n, 200)
    assert n < 400 or len(groups) > 1
    ends = np.array([-np.inf, -5, 16, 40, np.inf])
    new = groups(*(axis.ravel() for axis in np.meshgrid(ends, ends)))
    assert new.min() == 0 and new.max() == len(groups) - 1


def test_galaxies_of_one_magnitude_have_groups():
    spread = np.random.default_rng(0).normal(size=2000)
    group = Groups.of(np.full(2000, 17.), spread)(np.full(2000, 17.), spread)
    assert np.bincount(group).max() <= 1000


def test_coverage_is_right_within_groups_where_a_single_factor_is_not():
    "Errors grow with the magnitude, and less than the posterior's spread says."
    def simulate(n, seed):
        rng = np.random.default_rng(seed)
        magnitude, width = rng.uniform(14, 18, n), rng.uniform(0.5, 3, n)
        errors = np.exp(0.4*(magnitude - 16))*np.sqrt(width)
        median = np.zeros((n, 10))
        said = described(median, width[:, None])
        return said, errors[:, None]*rng.normal(size=median.shape), magnitude
    said, values, magnitude = simulate(2000, 0)
    groups = Groups.of(magnitude, said.spread)
    group = groups(magnitude, said.spread)
    scores = stretch_scores(said.bands, values)
    new, truth, faintness = simulate(6000, 1)
    new_group = groups(faintness, new.spread)
    new_scores = stretch_scores(new.bands, truth)
    assert len(groups) == 9
    factors = dict(one=conformal_factors(scores)[:, None].repeat(9, 1),
        own=grouped_factors(scores, group, 9))
    off = {}
    for name, values in factors.items():
        inside = new_scores <= values[:, new_group]
        by_group = np.stack([inside[:, new_group == k].mean((1, 2)) for k in range(9)])
        off[name] = np.abs(by_group - LEVELS).max(0)
    assert (off["own"] < 0.05).all(), off
    assert (off["one"][:3] > 0.08).all(), off


def test_bins_that_few_galaxies_have_get_factors():
    calibration, said, values, magnitude = a_calibration(n=450)
    values = values.copy()
    values[10:, 0] = np.nan  # ten galaxies
    values[60:, 1] = np.nan  # enough for all groups together, not for one
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse = calibrate(said, values, None, magnitude, 6)
    assert len(sparse.groups) == 2 and np.isfinite(sparse.factors).all()
    assert (sparse.factors[:, 0, :2] == sparse.factors[:, 1, :2]).all()
    np.testing.assert_array_equal(sparse.factors[..., 2:], calibration.factors[..., 2:])
    assert np.isfinite(sparse.whole).all() and np.isfinite(sparse.sample).all()


def test_a_wider_level_holds_a_narrower_one():
    "Whatever the factors and bands are."
    calibration, said, _, magnitude = a_calibration()
    rng = np.random.default_rng(0)
    wild = dataclasses.replace(calibration, factors=rng.uniform(0, 2, calibration.factors.shape),
        whole=rng.uniform(0, 2, calibration.whole.shape))
    place = said.bands, magnitude, said.spread
    flagged = rng.uniform(size=len(magnitude)) < 0.3
    for bands in (wild(*place, flagged), wild.whole_bands(*place, 6)):
        lower, upper = bands.ends()
        assert (np.diff(lower, axis=0) <= 0).all() and (np.diff(upper, axis=0) >= 0).all()
        assert (bands.below >= 0).all() and (bands.above >= 0).all()


def test_a_hundred_galaxies_are_enough_to_calibrate_on():
    with pytest.warns(UserWarning, match="99 galaxies are too few to calibrate on: 100 are"):
        assert a_calibration(n=99)[0] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibration = a_calibration(n=100)[0]
    assert calibration.n == 100 and len(calibration.groups) == 1


@pytest.mark.parametrize("width", [0.5, 2.])
def test_calibrated_bands_hold_new_galaxies(width):
    "Of a posterior that is too sure of itself, and one that is not sure enough."
    calibration, *_ = a_calibration(error=1/width)
    _, new, truth, magnitude = a_calibration(n=3000, seed=1, error=1/width)
    lower, upper = calibration(new.bands, magnitude, new.spread).ends()
    inside = (lower <= truth) & (truth <= upper)
    np.testing.assert_allclose(inside.mean((1, 2)), LEVELS, atol=0.025)


def correlated(n, n_bins, seed, error=1.3, shift=0.):
    "Spectra that deviate from their medians in many bins at once; magnitudes."
    rng = np.random.default_rng(seed)
    distance = np.subtract.outer(np.arange(n_bins), np.arange(n_bins))/6
    root = np.linalg.cholesky(np.exp(-0.5*distance**2) + 0.05*np.eye(n_bins))/np.sqrt(1.05)
    width, median = rng.uniform(0.5, 2, (n, 1)), rng.normal(size=(n, n_bins))
    truth = median + width*(shift + error*rng.normal(size=median.shape) @ root.T)
    return described(median, width), truth, rng.uniform(14, 18, n)


def test_whole_spectra_are_inside_the_band_for_whole_spectra():
    n_bins = 40
    said, values, magnitude = correlated(900, n_bins, 0)
    calibration = calibrate(said, values, None, magnitude, n_bins)
    new, truth, faintness = correlated(4000, n_bins, 1)
    place = new.bands, faintness, new.spread
    lower, upper = calibration.whole_bands(*place, n_bins).ends()
    inside = ((lower <= truth) & (truth <= upper)).all(-1).mean(-1)
    np.testing.assert_allclose(inside, LEVELS, atol=0.04)
    lower, upper = calibration(*place).ends()
    assert ((lower <= truth) & (truth <= upper)).all(-1).mean(-1)[-1] < 0.8


def test_the_largest_noise_of_many_bins_comes_off_for_whole_spectra():
    "Where spectra are medians and noise, the stated share of them needs no band."
    rng = np.random.default_rng(0)
    bands, noise = normal_bands(np.zeros((3000, 80)), 1.), rng.uniform(0.5, 2, (3000, 80))
    scores = whole_scores(bands, noise*rng.normal(size=noise.shape), noise)
    np.testing.assert_allclose((scores == 0).mean(1), LEVELS, atol=0.03)


def test_flagged_galaxies_get_bands_no_narrower_than_the_sample():
    calibration, said, values, magnitude = a_calibration()
    place = said.bands, magnitude, said.spread
    flagged = np.arange(len(magnitude)) % 4 == 0
    usual, found = calibration(*place), calibration(*place, flagged)
    for name in ("median", "below", "above"):
        old, new = (np.moveaxis(getattr(each, name), -2, 0) for each in (usual, found))
        np.testing.assert_array_equal(new[~flagged], old[~flagged])
        assert (new[flagged] >= old[flagged]).all()
    lower, upper = (end[:, flagged] for end in found.ends())
    for k, level in enumerate(LEVELS):
        low, high = np.quantile(values, [(1 - level)/2, (1 + level)/2], axis=0)
        assert (lower[k] <= low + 1e-5).all() and (upper[k] >= high - 1e-5).all()
    assert (found.above[:, flagged] > usual.above[:, flagged]).any()


# Another sky

def test_another_sky_is_calibrated_from_noisy_spectra():
    "Errors there are larger by 1/0.6 and medians off; noise is 1.5 times the errors."
    n_columns, n_bins = 50, 48
    said, values, magnitude = correlated(900, n_columns, 0, error=1.)
    mock = calibrate(said, values, None, magnitude, n_bins)
    sky = dict(error=1/0.6, shift=0.8)
    there, truth, faintness = correlated(600, n_columns, 1, **sky)
    noise = 1.5/0.6*there.bands.above[WHOLE]
    observed = truth + noise*np.random.default_rng(2).normal(size=truth.shape)
    observed[:100, 30:] = np.nan
    calibration = mock.recalibrated(there, observed, noise, faintness, n_bins)
    new, truth, faintness = correlated(4000, n_columns, 3, **sky)

    def covered(calibration):
        bands = calibration(new.bands, faintness, new.spread)
        lower, upper = bands.ends()
        off = ((truth - bands.median)/new.bands.above[WHOLE]).mean(0)
        return ((lower <= truth) & (truth <= upper)).mean((1, 2)), off

    coverage, off = covered(calibration)
    np.testing.assert_allclose(coverage, LEVELS, atol=0.04)
    assert abs(off.mean()) < 0.1 and np.abs(off).max() < 0.5
    before, off = covered(mock)
    assert (before < np.array(LEVELS) - 0.1).all() and off.mean() > 0.7
    assert calibration.n == 600 and mock.n == 900 and not mock.shift.any()


def test_another_sky_takes_a_hundred_galaxies():
    calibration, said, values, magnitude = a_calibration(n=200)
    said = said._replace(bands=Bands(*(part[..., :99, :] for part in said.bands)),
        spread=said.spread[:99])
    with pytest.raises(InvalidInputError, match="99 galaxies are too few to calibrate on; 100 are"):
        calibration.recalibrated(said, values[:99], 0*values[:99], magnitude[:99], 6)


def test_columns_that_another_sky_does_not_show_stay_as_they_are():
    "Unknown ones keep factor and median; bands without length move nothing."
    calibration, n = a_calibration(n_bins=6, n_columns=8)[0], 300
    seen = described(np.zeros((n, 8)), np.ones((n, 8)))
    flat = seen._replace(bands=Bands(seen.bands.median,
        *(np.where(np.arange(8) == 6, 0, part) for part in seen.bands[1:])))
    values = np.random.default_rng(0).normal(0, 3, (n, 8))
    values[:, 7] = np.nan
    again = calibration.recalibrated(flat, values, np.zeros((n, 8)), np.full(n, 16.), 6)
    assert np.isfinite(again.shift).all() and again.shift[6] == again.shift[7] == 0
    np.testing.assert_array_equal(again.factors[..., 7], calibration.factors[..., 7])
    assert (again.factors[..., 0] > 2*calibration.factors[..., 0]).all()


def test_observed_spectra_are_normalised_with_their_gaps_filled():
    rng = np.random.default_rng(0)
    shape = 1 + np.sin(np.arange(200)/20)**2
    true = shape/np.linalg.norm(shape)
    flux, ivar = np.stack([true]*3), np.full((3, 200), 1/0.01**2)
    ivar[0, 50:120] = 0
    flux[1, :30] = np.nan
    flux[1, 40:50] = np.inf
    predicted = np.stack([true]*3)*[[0.7], [1.], [1.4]]  # their own scale does not matter
    for unit in (1e-16, 1., 1e17):
        for scale in (1, rng.uniform(1, 9, (3, 1))):
            spectra = ObservedSpectra(flux*unit*scale, ivar/(unit*scale)**2)
            found, error, missing = normalise(spectra, predicted)
            np.testing.assert_allclose(found[~missing], np.stack([true]*3)[~missing], rtol=1e-6)
            np.testing.assert_allclose(error, np.where(missing, 0, 0.01), rtol=1e-6)
            assert missing.sum(1).tolist() == [70, 40, 0]


N_BINS = 450  # narrow ones, in which lines are measured


@pytest.fixture(scope="module")
def narrow(trained):
    "A predictor with a calibration and narrow bins, images, its description of them."
    model, decoder = models.load(trained.weights("conv3", 0)), small_decoder(6, N_BINS, 7e-4)
    residual = SpectrumResidual(np.zeros((1, N_BINS), np.float32),
        np.full(N_BINS, 1e-6, np.float32), np.array([1., 0.]))  # two percent of the flux
    posterior = SpectrumPosterior(GaussianErrors(np.zeros(6), 1e-4*np.eye(6)), residual, decoder, 0)
    images = toy_galaxies(110, size=32, seed=8)
    outputs = Predictor(model, decoder, posterior).network.predict_targets(images)
    said = describe(posterior, outputs, 16, 8)
    rng = np.random.default_rng(0)
    middle = (said.bands.above + said.bands.below)[WHOLE]/2
    values = said.bands.median + middle*rng.normal(size=middle.shape)
    calibration = calibrate(said, values, None, np.linspace(14, 18, 110), N_BINS)
    return Predictor(model, decoder, posterior, calibration), images, said


def observed_like(said, error, seed=1):
    "Noisy spectra whose true ones are as far from the medians as `error` bands of 68 %."
    rng, (median, below, above) = np.random.default_rng(seed), said.bands
    length = (above + below)[WHOLE, :, :N_BINS]/2
    truth = median[:, :N_BINS] + error*length*rng.normal(size=length.shape)
    return truth + length*rng.normal(size=length.shape), length**-2


def test_a_predictor_is_recalibrated(narrow):
    predictor, images, said = narrow
    flux, ivar = observed_like(said, 2.5)
    ivar = ivar.copy()
    ivar[:, 200:230] = 0
    again = recalibrate(predictor, images, ObservedSpectra(flux, ivar), 16, progress=False)
    before, after = (one.calibration.factors[:, 0, :N_BINS] for one in (predictor, again))
    assert np.median(after/before) == pytest.approx(2.5, rel=0.2)
    assert again.calibration.n == 110
    narrower, wider = (one.predict(images[:3], 16) for one in (predictor, again))
    assert ((wider.upper - wider.lower) > (narrower.upper - narrower.lower)).all()
    np.testing.assert_array_equal(wider.targets, narrower.targets)


def test_the_unit_of_observed_spectra_does_not_matter(narrow):
    predictor, images, said = narrow
    flux, ivar = (np.float64(part) for part in observed_like(said, 2.5))
    both = [recalibrate(predictor, images, ObservedSpectra(flux*unit, ivar/unit**2), 16, False)
        for unit in (1., 1e-19)]
    np.testing.assert_allclose(*(one.calibration.factors for one in both), rtol=1e-3)


def test_what_a_predictor_cannot_be_recalibrated_from(narrow):
    predictor, images, said = narrow
    flux, ivar = observed_like(said, 1.)
    def refused(said, predictor=predictor, images=images, flux=flux, ivar=ivar):
        with pytest.raises(InvalidInputError, match=said):
            recalibrate(predictor, images, ObservedSpectra(flux, ivar), 16, progress=False)
    bare = Predictor(predictor.model, predictor.decoder, predictor.posterior)
    refused("no calibration to start from", predictor=bare)
    refused(r"flux of the spectra must have the shape \(110, 450\)", flux=flux[:109])
    refused(r"ivar of the spectra must have the shape \(110, 450\).*got \(110, 400\)",
        ivar=ivar[:, :400])
    refused("99 of 99 galaxies have", images=images[:99], flux=flux[:99], ivar=ivar[:99])
    gaps = ivar.copy()
    gaps[:11, 200:] = 0  # more than half is missing
    refused("99 of 110 galaxies have", ivar=gaps)
    blank = images.copy()
    blank[:15] = random_generator(0, "sky").normal(0, 30, blank[:15].shape)
    refused("95 of 110 galaxies have", images=blank)


# Coverage of parts of the sample

def coverage_of_fifths(seed, doubled):
    "Cells beyond the band: with errors that are as stated, or twice as large in the last fifth."
    rng = np.random.default_rng(seed)
    def simulate(n, doubled):
        x = rng.uniform(size=n)
        errors = rng.normal(size=(n, 1))*np.where(doubled & (x > 0.8), 2, 1)[:, None]
        return stretch_scores(normal_bands(np.zeros((n, 1)), 1.), errors), x
    calib, (test, x) = simulate(600, False)[0], simulate(1500, doubled)
    group = [np.zeros(scores.shape[1], int) for scores in (calib, test)]
    cells = quintiles(pd.DataFrame(dict(x=x)))
    table = coverage_by_cell((calib, group[0]), (test, group[1]), cells, ["y"], rng, 150)
    assert table.n.sum() == 4*1500
    return table[(table.coverage - table.level).abs() > table.within]


def test_a_miscalibrated_cell_is_found_and_honest_ones_are_not():
    for seed in range(5): assert "x 5" in coverage_of_fifths(seed, True).cell.unique(), seed
    beyond = sum(len(coverage_of_fifths(seed, False)) > 0 for seed in range(10, 22))
    assert beyond <= 2  # of 12, for 5 percent each


def test_unknown_properties_belong_to_no_fifth():
    values = np.r_[np.arange(100.), [np.nan]*20]
    cells = quintiles(pd.DataFrame(dict(x=values)))
    assert list(cells) == [f"x {k}" for k in range(1, 6)]
    assert [cell.sum() for cell in cells.values()] == [20]*5
    assert not any(cell[100:].any() for cell in cells.values())


# Classes

def lines(halpha_ew, halpha=1., nii=1., oiii=1., hbeta=1.):
    known = dict(halpha_ew=halpha_ew, halpha_flux=halpha, nii_6584_flux=nii, oiii_5007_flux=oiii,
        hbeta_flux=hbeta)
    return [known.get(name, 0.) for name in QUANTITIES]


def test_classes_of_spectra():
    known = [lines(2.9, 30, 8, 3, 9), lines(30, 30, 8, 3, 9), lines(30, 30, 20, 6, 9),
        lines(30, 30, 30, 60, 9), lines(np.nan), lines(30, 30, 0, 0, 0), lines(30, 1, 9, 1, 9)]
    found = spectral_class(np.array(known))
    expected = [*CLASSES, None, "star-forming", "AGN"]
    assert [CLASSES[k] if k >= 0 else None for k in found] == expected


def test_probabilities_of_classes_sum_to_one_where_h_alpha_is_known():
    rng = np.random.default_rng(0)
    quantities = np.exp(rng.normal(size=(50, 16, len(QUANTITIES)), scale=1.5))
    quantities[0, :, QUANTITIES.index("halpha_ew")] = np.nan
    quantities[1, :, QUANTITIES.index("hbeta_flux")] = np.nan
    shares = class_probabilities(quantities)
    assert shares.shape == (50, len(CLASSES)) and (shares.max(0) > 0).all()
    np.testing.assert_allclose(shares.sum(1), np.r_[0, np.ones(49)])


# Images unlike the others

def toy_galaxies(n, size=48, seed=0):
    "Round galaxies of all brightnesses with colours, and noise of 30 nJy."
    rng = random_generator(seed, "toy")
    r = np.hypot(*np.mgrid[:size, :size] - (size - 1)/2)
    colours = 0.2*np.arange(5) + rng.normal(0, 0.05, (n, 5))
    light = 10**rng.uniform(3, 4, n)[:, None]*10**colours
    shape = np.exp(-r/rng.uniform(3, 6, (n, 1, 1, 1)))
    noise = rng.normal(0, 30, (n, 5, size, size))
    return np.float32(light[..., None, None]*shape + noise)


@pytest.fixture(scope="module")
def domain():
    features = [image_features(toy_galaxies(n, seed=k), PS1.bands)
        for k, n in enumerate((600, 300))]
    return fit_domain(*features, n_components=16)


def blank_sky(flux): return random_generator(0, "sky").normal(0, 30, flux.shape)


def constant_band(flux):
    flux[:, 2] = 7
    return flux


def saturated(flux):
    for band in flux[:, 1]: np.minimum(band, np.quantile(band, 0.995), out=band)
    return flux


@pytest.mark.parametrize("damage, said, share", [
    (blank_sky, "no source in the middle", 1),
    (constant_band, "the band i is constant", 1),
    (saturated, "the band r is saturated", 0.9),
    (lambda flux: np.roll(flux, 10, -1), "the source is 2.5 arcsec off centre", 0.7),
    (lambda flux: flux[:, ::-1], "unlike the training images", 0.5)])
def test_damaged_images_are_flagged_with_the_reason(domain, damage, said, share):
    flux = toy_galaxies(100, seed=5)
    assert sum(said in reason for reason in domain.judge(flux, PS1).reasons) <= 5
    found = domain.judge(np.float32(damage(flux)), PS1)
    named = np.array([said in reason for reason in found.reasons])
    assert named.mean() >= share
    assert (found.score[named] > 1).all()
    assert [bool(reason) for reason in found.reasons] == (found.score > 1).tolist()


def test_few_new_images_of_the_same_kind_are_flagged(domain):
    found = domain.judge(toy_galaxies(300, seed=6), PS1)
    assert (found.score > 1).mean() < 0.05 and (found.score < 0.9).mean() > 0.8


def test_a_domain_is_read_as_it_was_written(domain, tmp_path):
    domain.save(tmp_path/"domain.safetensors", profile="demo")
    again, flux = Domain.load(tmp_path/"domain.safetensors"), toy_galaxies(10, seed=7)
    old, new = (each.judge(flux, PS1) for each in (domain, again))
    np.testing.assert_array_equal(new.score, old.score)
    assert new.reasons == old.reasons


def test_a_domain_needs_ten_galaxies_of_each():
    features = np.random.default_rng(0).normal(size=(40, 12)).astype(np.float32)
    for train, held_out in ((9, 40), (40, 9), (0, 40)):
        with pytest.raises(InvalidInputError, match=f"{train} and {held_out} galaxies are too few"):
            fit_domain(features[:train], features[:held_out])
    assert np.isfinite(fit_domain(features[:10], features[10:20]).distance(features)).all()


def test_measurements_that_are_no_numbers_do_not_matter(domain):
    features = image_features(toy_galaxies(6, seed=7), PS1.bands).copy()
    usual = domain.distance(features)
    features[1, 4], features[2, 5], features[3, 6] = np.nan, np.inf, -np.inf
    features[4] = np.nan
    with np.errstate(over="ignore"): found = domain.distance(features)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[[0, 5]], usual[[0, 5]])
    assert found[4] > domain.limit


def test_a_domain_is_fitted_in_spite_of_measurements_that_are_no_numbers(domain):
    features = image_features(toy_galaxies(40, seed=9), PS1.bands).copy()
    features[3, 5] = np.nan
    fitted = fit_domain(features[:30], features[30:])
    assert np.isfinite(fitted.distance(features)).all()
    assert domain.judge(np.zeros((0, 5, 48, 48)), PS1).reasons == []


def test_the_centre_is_measured_in_arcsec():
    flux = toy_galaxies(4, seed=9)*10
    for pixels, tolerance in ((0, 0.1), (4, 0.15), (8, 0.15)):
        offsets = off_centre(np.roll(flux, (pixels, -pixels), (-2, -1)), PS1)
        expected = pixels*np.sqrt(2)*PS1.pixel_scale
        np.testing.assert_allclose(offsets, expected, atol=tolerance)
    assert image_faults(flux, PS1) == [[], [], [], []]


# From images to bands and flags

@pytest.fixture(scope="module")
def run(trained):
    "A profile whose network has a posterior, a calibration and a domain as well."
    model, decoder = models.load(trained.weights("conv3", 0)), SpectrumModel.load(trained.vae)
    predictor = Predictor(model, decoder)
    outputs = predictor.network.predict_targets(toy_galaxies(300, size=32, seed=1))
    targets = outputs[:, :6] + 0.5*np.random.default_rng(0).normal(size=(300, 6))
    fitted = fit_posterior((outputs, targets), (outputs, targets),
        PosteriorParameters(epochs=2, n_components=3), 0, progress=False)
    posterior = SpectrumPosterior(fitted.posterior, some_residual(), decoder, seed=1)
    posterior.save(trained.posterior, model, model="conv3-0")
    said = describe(posterior, outputs, 64, 0)
    values = np.column_stack([decoder.decode(targets), np.zeros((300, len(QUANTITIES))), targets])
    calibrate(said, values, None, np.linspace(14, 18, 300), 60).save(trained.calibration)
    features = [image_features(toy_galaxies(n, size=32, seed=k), PS1.bands)
        for k, n in ((1, 300), (2, 200))]
    fit_domain(*features, n_components=16).save(trained.domain)
    return trained


@pytest.fixture(scope="module")
def predictor(run):
    return Predictor.of_run(run)


def mixed_images():
    "Eight good images, of which the fourth is made a blank sky."
    flux = toy_galaxies(8, size=32, seed=4)
    flux[3] = blank_sky(flux[3])
    return flux


def test_spectra_of_other_colours_than_their_images_are_flagged(predictor):
    said = predictor.predict(mixed_images()).reasons[5]
    assert re.fullmatch(r"its colours are \d\.\d\d mag from those of the predicted spectrum", said)


def test_a_blank_image_is_flagged_among_good_ones(predictor, any_colours):
    found = predictor.predict(mixed_images(), n_draws=64)
    assert [k for k, reason in enumerate(found.reasons) if reason] == [3]
    assert found.reasons[3].startswith("no source in the middle")
    for inner, outer in (("lower", "lower_95"), ("flux", "lower"), ("flux", "whole_lower")):
        assert (getattr(found, outer) <= getattr(found, inner)).all()
    for inner, outer in (("upper", "upper_95"), ("flux", "upper"), ("flux", "whole_upper")):
        assert (getattr(found, outer) >= getattr(found, inner)).all()
    low, high = predictor.calibration.sample[:, -1, :60]
    assert (found.lower_95[3] <= low + 1e-6).all() and (found.upper_95[3] >= high - 1e-6).all()


def test_the_others_are_predicted_as_without_it(predictor):
    flux = mixed_images()
    together, alone = predictor.predict(flux, 64), predictor.predict(np.delete(flux, 3, 0), 64)
    for name in ("targets", "flux", "lower", "upper", "lower_95", "upper_95", "whole_upper"):
        np.testing.assert_allclose(
            np.delete(getattr(together, name), 3, 0), getattr(alone, name), rtol=1e-3, atol=1e-5)


def test_images_that_are_no_images_still_raise(predictor):
    flux = toy_galaxies(3, size=32)
    holes = flux.copy()
    holes[1, 2, 5, 5] = np.nan
    with pytest.raises(InvalidInputError, match="NaN"): predictor.predict(holes)
    with pytest.raises(InvalidInputError, match="bands"): predictor.predict(flux[:, :4])
    with pytest.raises(InvalidInputError, match="cropped"): predictor.predict(flux[..., :20, :20])


def test_without_posterior_or_decoder_images_are_flagged_all_the_same(predictor, any_colours):
    bare = Predictor(predictor.model, predictor.decoder)
    assert predictor.calibration is not None and predictor.domain is not None
    found, targets = bare.predict(mixed_images(), 64), Predictor(predictor.model)
    assert found.whole_lower is None and found.flux.shape == (8, 60)
    for reasons in (found.reasons, targets.predict(mixed_images()).reasons):
        assert [k for k, reason in enumerate(reasons) if reason] == [3]
    spread = bare.decoder.decode(np.random.default_rng(0).normal(size=(2000, 6)))
    low, high = np.quantile(spread, (0.1, 0.9), axis=0)
    assert (found.lower_95[3] <= low).all() and (found.upper_95[3] >= high).all()


def test_a_flagged_file_is_predicted_and_says_why(trained, tmp_path):
    flux = example_flux(size=60)
    good = write_bands(tmp_path/"good", flux[:, 10:50, 10:50])
    moved = write_bands(tmp_path/"moved", flux[:, 10:50, 2:42])  # 2 arcsec
    written, texts = quietly([good, moved], Predictor.of_run(trained, "conv3"), tmp_path/"out")
    said = "the source is 2.0 arcsec off centre"
    table = pd.read_csv(written[-1], keep_default_na=False).set_index("galaxy")
    assert "off centre" not in table.reason["good"] and said in table.reason["moved"]
    assert table.status["moved"] == "flagged"
    metas = {name: Table.read(tmp_path/f"out/{name}.ecsv").meta for name in ("good", "moved")}
    assert said in metas["moved"]["flag"] and said not in metas["good"]["flag"]
    assert any(said in note for note in metas["moved"]["notes"])
    assert any(text.startswith("moved") and said in text for text in texts)


def test_a_posterior_of_another_model_is_warned_of(run, tmp_path):
    other = Paths(shutil.copytree(run.root, tmp_path/"demo"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Predictor.of_run(other).calibration is not None
    for path in (other.weights("conv3", 0), other.history("conv3", 0)):
        shutil.copy(path, path.with_name(path.name.replace("conv3", "twin")))
    with pytest.warns(UserWarning, match="of demo is that of conv3-0; the band of twin-0"):
        predictor = Predictor.of_run(other, "twin")
    assert predictor.calibration is None and isinstance(predictor.posterior.targets, GaussianErrors)
    assert predictor.domain is not None


def test_files_that_do_not_belong_together_are_refused(run):
    twin = models.load(run.weights("conv3", 0))
    with torch.no_grad(): next(twin.model.parameters()).add_(0.1)
    decoder = SpectrumModel.load(run.vae)
    with pytest.raises(WeightsError, match="another network"):
        SpectrumPosterior.load(run.posterior, twin, decoder)
    with pytest.raises(WeightsError, match="holds 'Domain'; expected 'Calibration'"):
        Predictor.of_files(run.weights("conv3", 0), run.vae, run.posterior, run.domain)
    galaxies, predictor = [run.root/"nothing"], Predictor.of_run(run)
    with pytest.raises(MissingInputError): predict_files(galaxies, predictor, run.root/"out")
