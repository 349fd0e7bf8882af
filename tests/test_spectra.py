"specpred.spectra: rebinning conserves flux and errors, dust, and real SDSS files."
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specpred.config import InvalidInputError
from specpred.formats import SDSSSpectrum, read_sdss
from specpred.spectra import (GRID, LogGrid, deredden, extinction, galactic_ebv,
    neighbour_covariance, prepare, rebin)

sys.path[:0] = [str(Path(__file__).resolve().parents[1]/"benchmarks")]
from real_spectra import mean_between  # noqa: E402

redshifts = st.floats(0, 0.36)
seeds = st.integers(0, 2**32 - 1)
starts = st.floats(3.45, 3.5)  # log10 of the first pixel: the grid is always covered
N_NATIVE = 6200
often = settings(max_examples=12, deadline=None)


def native_edges(loglam0, n, dloglam=1e-4):
    return 10**(loglam0 + dloglam*(np.arange(n + 1) - 0.5))


def native_spectrum(seed, n=N_NATIVE):
    return np.random.default_rng(seed).lognormal(0, 1, n)


def integral(edges, flux, at):
    "Integral of the native pixels between neighbouring wavelengths, another way."
    return np.diff(np.interp(at, edges, np.append(0, np.cumsum(flux*np.diff(edges)))))


@often
@given(seeds, starts, st.lists(redshifts, min_size=1, max_size=4))
def test_the_integral_over_wavelength_is_conserved(seed, loglam0, z):
    flux = np.stack([native_spectrum(seed + i) for i in range(len(z))])
    out = rebin(flux, None, loglam0, z)
    assert not out.missing.any()
    for i in range(len(z)):
        edges = native_edges(loglam0, N_NATIVE)/(1 + z[i])
        expected = integral(edges, flux[i], GRID.edges)
        assert (out.flux[i]*GRID.widths).sum() == pytest.approx(expected.sum(), rel=1e-10)
        np.testing.assert_allclose(out.flux[i]*GRID.widths, expected, rtol=1e-6)


@often
@given(seeds, st.floats(3.55, 3.65), redshifts, st.integers(2000, 4000))
def test_the_integral_over_the_covered_range_is_conserved(seed, loglam0, z, n):
    flux = native_spectrum(seed, n)
    out = rebin(flux, None, loglam0, z, min_coverage=1)
    edges = native_edges(loglam0, n)/(1 + z)
    covered = (GRID.edges[:-1] >= edges[0]) & (GRID.edges[1:] <= edges[-1])
    assert not out.missing[0][covered].any()
    assert out.missing[0][~covered].sum() >= (~covered).sum() - 2
    first, last = np.flatnonzero(covered)[[0, -1]]
    expected = integral(edges, flux, GRID.edges[[first, last + 1]])[0]
    light = (out.flux[0]*GRID.widths)[first:last + 1].sum()
    assert light == pytest.approx(expected, rel=1e-6)


@often
@given(st.floats(-1e3, 1e3), starts, redshifts, st.floats(0.5e-4, 4e-4))
def test_a_constant_stays_constant(level, loglam0, z, dloglam):
    n = int(0.65/dloglam)
    out = rebin(np.full(n, level), None, loglam0, z, dloglam=dloglam)
    np.testing.assert_allclose(out.flux[~out.missing], level, rtol=1e-10, atol=1e-12)


@often
@given(st.floats(3500, 8200), redshifts, starts, st.floats(150, 400))
def test_a_lines_flux_and_centroid_survive(centre, z, loglam0, sigma):
    # a line much narrower than a bin of 269 km/s can be anywhere in it
    x = loglam0 + 1e-4*np.arange(N_NATIVE) - np.log10(1 + z)
    width = sigma/299792.458/np.log(10)
    native = np.exp(-0.5*((x - np.log10(centre))/width)**2)
    lo, hi = 10**(np.log10(centre) + np.array([-6, 6])*width)
    if not GRID.edges[0] < lo < hi < GRID.edges[-1]: return  # cut off by the edge of the grid
    out = rebin(native, None, loglam0, z).flux[0]*GRID.widths
    expected = (native*np.diff(native_edges(loglam0, N_NATIVE))/(1 + z)).sum()
    assert out.sum() == pytest.approx(expected, rel=1e-6)
    bin_width = np.interp(centre, GRID.wavelength, GRID.widths)
    assert abs((out*GRID.wavelength).sum()/out.sum() - centre) < 0.05*bin_width


@often
@given(seeds, starts, redshifts, st.sampled_from([2, 4, 5, 10]))
def test_rebinning_twice_is_once_onto_the_coarser_grid(seed, loglam0, z, factor):
    coarse = LogGrid(GRID.n_bins//factor, GRID.loglam0 + GRID.dloglam*(factor - 1)/2,
        GRID.dloglam*factor)
    flux = native_spectrum(seed)
    once = rebin(flux, None, loglam0, z, coarse).flux
    fine = rebin(flux, None, loglam0, z).flux
    twice = rebin(fine, None, GRID.loglam0, 0, coarse, GRID.dloglam).flux
    np.testing.assert_allclose(twice, once, rtol=1e-9)


@often
@given(seeds, redshifts)
def test_a_galaxy_put_at_a_redshift_comes_back(seed, z):
    flux = native_spectrum(seed, GRID.n_bins)
    back = rebin(flux, None, GRID.loglam0 + np.log10(1 + z), z, GRID, GRID.dloglam)
    np.testing.assert_allclose(back.flux[0], flux, rtol=1e-6)


@often
@given(seeds, st.lists(redshifts, min_size=2, max_size=6))
def test_spectra_do_not_influence_each_other(seed, z):
    rng, shape = np.random.default_rng(seed), (len(z), 4000)
    flux, ivar = rng.normal(1, 1, shape), rng.exponential(1, shape)*(rng.random(shape) > 0.05)
    loglam0 = rng.uniform(3.55, 3.6, len(z))
    together = rebin(flux, ivar, loglam0, z)
    for i in range(len(z)):
        alone = rebin(flux[i], ivar[i], loglam0[i], z[i])
        for name in ("flux", "error", "missing"):
            np.testing.assert_array_equal(getattr(together, name)[i], getattr(alone, name)[0])


def test_published_errors_are_the_mean_of_the_pixels_errors():
    sigma, grid = np.random.default_rng(0).uniform(0.5, 2, 5000), LogGrid(60, 3.6)
    published = rebin(np.ones(5000), sigma**-2, 3.55, 0.05, grid, error="published").error
    mean = rebin(sigma, None, 3.55, 0.05, grid).flux
    np.testing.assert_allclose(published, mean, rtol=1e-9)
    propagated = rebin(np.ones(5000), sigma**-2, 3.55, 0.05, grid).error
    assert 1.8 < np.mean(published/propagated) < 2.2


@often
@given(seeds, redshifts)
def test_errors_are_those_of_the_linear_map(seed, z):
    "The matrix from pixels to bins, column by column, gives the same covariances."
    rng, small, n = np.random.default_rng(seed), LogGrid(12, 3.6), 90
    loglam0 = 3.598 + np.log10(1 + z)
    ivar = rng.uniform(0.5, 2, n)*(rng.random(n) > 0.1)
    bins = rebin(np.eye(n), np.broadcast_to(ivar, (n, n)), loglam0, z, small)
    weights = np.nan_to_num(bins.flux)
    variance = np.divide(1, ivar, where=ivar > 0, out=np.zeros(n))
    full = weights.T @ np.diag(variance) @ weights
    np.testing.assert_allclose(np.nan_to_num(bins.error[0])**2, np.diag(full), rtol=1e-9)
    neighbours = neighbour_covariance(ivar, loglam0, z, small)[0]
    np.testing.assert_allclose(neighbours, np.diag(full, 1), atol=1e-12)
    np.testing.assert_allclose(np.diag(full, 2), 0, atol=1e-12)


def test_what_was_not_measured_is_missing_and_not_zero():
    flux, ivar = np.ones((2, 3800))
    ivar[1000:1100] = ivar[2000] = 0
    flux[1000:1100] = 1e9
    flux[[2000, 3000]] = np.nan, np.inf
    out = rebin(flux, ivar, 3.58, 0.1)
    loglam, missing = GRID.loglam + np.log10(1.1), out.missing[0]
    assert missing[(loglam < 3.579) | (loglam > 3.961)].all()
    assert np.isnan(out.flux[0][loglam < 3.579]).all()
    assert missing[(loglam > 3.6802) & (loglam < 3.6896)].all()
    np.testing.assert_allclose(out.flux[0][~missing], 1, rtol=1e-12)  # bad pixels leave no trace
    assert not missing[np.abs(loglam - 3.78) < 3e-4].any()  # one lost pixel of four is no gap


@pytest.mark.parametrize("bad", [dict(redshift=np.nan), dict(redshift=-1.),
    dict(redshift=[0.1, 0.2]), dict(loglam0=np.nan), dict(loglam0=3800.),
    dict(loglam0=[3.5, 3.5]), dict(dloglam=0), dict(ivar=np.ones(7)), dict(flux=np.ones((2, 2, 9))),
    dict(flux=np.ones((0, 4000))), dict(error="rms"), dict(min_coverage=np.nan),
    dict(min_coverage=2)])
def test_rebin_refuses(bad):
    arguments = dict(flux=np.ones(4000), ivar=None, loglam0=3.58, redshift=0.1) | bad
    with pytest.raises(InvalidInputError): rebin(**arguments)
    if not set(bad) & {"error", "flux", "ivar", "min_coverage"}:
        arguments = dict(ivar=np.ones((3, 4000)), loglam0=3.58, redshift=0.1) | bad
        with pytest.raises(InvalidInputError): neighbour_covariance(**arguments)


def test_impossible_grids_and_samples_are_refused():
    for wrong in (dict(n_bins=0), dict(dloglam=0.), dict(dloglam=-1e-4), dict(loglam0=3388.),
            dict(loglam0=np.nan)):
        with pytest.raises(InvalidInputError): LogGrid(**wrong)
    with pytest.raises(InvalidInputError, match="no spectrum to prepare"): prepare([])
    ones = np.ones(3000, np.float32)
    spectrum = SDSSSpectrum(ones, ones, np.zeros(3000, np.uint32), 3.58, 0.1, 0, "GALAXY", "",
        150., 2., 266, 51602, 1)
    for wrong in (dict(redshift=[0.1, 0.2]), dict(ebv=np.array([0.1, 0.2]))):
        with pytest.raises(InvalidInputError, match="spectrum"): prepare([spectrum], **wrong)


@often
@given(st.sampled_from(["F99", "CCM89"]), st.floats(0, 1), seeds)
def test_dust_is_undone_and_signal_to_noise_stays(law, ebv, seed):
    rng, loglam = np.random.default_rng(seed), 3.58 + 1e-4*np.arange(3800)
    flux, ivar = rng.normal(5, 1, (3, 3800)), rng.uniform(0, 2, (3, 3800))
    dusty = flux*10**(-0.4*extinction(loglam, ebv, law))
    clean, clean_ivar = deredden(dusty, ivar, loglam, [ebv]*3, law)
    np.testing.assert_allclose(clean, flux, rtol=1e-10)
    np.testing.assert_allclose(clean**2*clean_ivar, dusty**2*ivar, rtol=1e-10)
    assert np.all(np.diff(extinction(loglam, 1., law)) < 0)  # blue light loses more
    assert extinction(np.log10(6165.), galactic_ebv(0.1, law), law) == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [dict(law="SMC"), dict(ebv=np.nan), dict(ebv=-1.), dict(ebv=30.),
    dict(ebv=[0.1, 0.1])])
def test_deredden_refuses(bad):
    arguments = dict(flux=np.ones(10), ivar=np.ones(10), loglam=np.full(10, 3.7), ebv=0.1) | bad
    with pytest.raises(InvalidInputError): deredden(**arguments)


def test_a_real_galaxy_bin_by_bin(real_data):
    "The rebinned flux is the mean of the native pixels in each bin, and Hα is where it should be."
    spectrum = read_sdss(real_data/"sdss/spec-1045-52725-0628.fits")
    out = prepare([spectrum])
    edges = native_edges(spectrum.loglam0, len(spectrum.flux))/(1 + spectrum.redshift)
    flux, good, missing = spectrum.flux.astype(float), spectrum.ivar > 0, out.missing[0]
    assert 0.05 < missing.mean() < 0.25
    for i in np.flatnonzero(~missing):
        direct = mean_between(edges, flux, good, GRID.edges[i], GRID.edges[i + 1])
        assert out.flux[0, i] == pytest.approx(direct, rel=1e-6)
    halpha = np.abs(GRID.wavelength - 6564.61) < 40
    peak = GRID.wavelength[halpha][np.argmax(out.flux[0, halpha])]
    assert abs(peak - 6564.61) < 6 and not missing[halpha].any()
