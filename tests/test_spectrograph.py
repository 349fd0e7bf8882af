"""The spectrograph: resolution, noise, sky, calibration and lost pixels."""
import os
from pathlib import Path

import numpy as np
import pytest

from specpred import spectrograph
from specpred.formats import DLOGLAM, mask_bits, read_sdss
from specpred.spectrograph import (KM_S_PER_PIXEL, LOGLAM, SKY_BRIGHTNESS, WAVELENGTH,
    gaussian_lines, observe_spectrum, pixel_of, sdss_wdisp)

REAL = Path(os.environ.get("SPECPRED_REAL_DATA", "/nowhere"))/"sdss"


def observe_many(flux, variance, n=300, **options):
    return [observe_spectrum(flux, variance, np.random.default_rng(k), **options)
        for k in range(n)]


@pytest.mark.parametrize("velocity", [0, 60, 1300])
def test_lines_keep_flux_place_and_width(velocity):
    wavelength, flux = np.array([4500.0, 5007.3, 6562.8]), np.array([1.0, 2.0, 0.5])
    for one, area in zip(wavelength, flux, strict=True):
        line = gaussian_lines(np.array([one]), np.array([area]), velocity)
        assert line.sum() == pytest.approx(area, rel=1e-6)
        pixel = np.arange(len(LOGLAM))
        centre = (line*pixel).sum()/area
        assert centre == pytest.approx(pixel_of(one), abs=1e-3)
        width = np.sqrt((line*(pixel - centre)**2).sum()/area)
        sigma = np.hypot(velocity/KM_S_PER_PIXEL, sdss_wdisp(one))
        assert width == pytest.approx(np.hypot(sigma, 1/np.sqrt(12)), rel=0.01)
    together = gaussian_lines(wavelength, flux, velocity)
    assert together.sum() == pytest.approx(flux.sum(), rel=1e-6)


def test_lines_outside_the_spectrum_are_lost():
    at_edge = gaussian_lines(WAVELENGTH[:1], np.ones(1))
    assert at_edge.sum() == pytest.approx(0.5 + 0.5*at_edge[0], abs=1e-6)
    assert gaussian_lines(np.array([2000.0, 12_000.0]), np.ones(2)).sum() == 0


def test_pixels_of_wavelengths():
    assert pixel_of(WAVELENGTH) == pytest.approx(np.arange(len(LOGLAM)), abs=1e-6)
    assert KM_S_PER_PIXEL == pytest.approx(299_792*np.log(10)*DLOGLAM, rel=1e-5)
    assert np.ptp(sdss_wdisp(WAVELENGTH)) < 0.6


def test_noise_is_the_variance():
    flux, variance = np.full(len(LOGLAM), 5.0), np.linspace(1, 4, len(LOGLAM))**2*1e4
    spectra = observe_many(flux, variance, 100)
    pulls = np.array([np.where(s.ivar > 0, (s.flux - 5)*np.sqrt(s.ivar), np.nan) for s in spectra])
    by_part = np.array([np.nanstd(part) for part in np.array_split(pulls, 6, axis=1)])
    assert by_part == pytest.approx(1, abs=0.12)  # some `ivar` are wrong
    assert np.nanmean(pulls) == pytest.approx(0, abs=0.01)


def test_masks_of_lost_pixels():
    for s in observe_many(np.ones(len(LOGLAM)), np.ones(len(LOGLAM)), 20):
        assert (s.and_mask[s.ivar == 0] & mask_bits(["NODATA"])).all()
        assert not (s.and_mask[s.ivar > 0] & mask_bits(["NODATA"])).any()
        assert (s.or_mask & s.and_mask == s.and_mask).all()
        assert (s.ivar == 0).mean() < 0.02


def test_calibration_bends_spectra():
    flux = np.full(len(LOGLAM), 1e4)  # so bright that neither noise nor sky matter
    variance = np.full(len(LOGLAM), 1e-4)
    plate = spectrograph.calibration_error(np.random.default_rng(1))
    spectra = observe_many(flux, variance, calibration=plate)
    ratio = np.array([s.flux for s in spectra])/flux
    ratio = np.where([s.ivar > 0 for s in spectra], ratio, np.nan)
    centre = np.nanmean(ratio, axis=0)
    assert centre == pytest.approx(plate, abs=0.01)  # the plate's part is common
    scatter = np.nanstd(ratio, axis=0)
    assert scatter[:50] == pytest.approx(0.021, abs=0.006)
    assert scatter[1000:] == pytest.approx(0.009, abs=0.005)
    steps = np.abs(np.diff(ratio, axis=1))
    assert np.nanmax(steps) < 1e-3  # smooth
    good = spectra[0].ivar > 0
    assert (spectra[0].ivar*variance*ratio[0]**2)[good] == pytest.approx(1, rel=1e-3)


def test_residuals_of_the_sky_are_in_lines_and_common_to_them():
    residuals = np.array([spectrograph.sky_residuals(np.random.default_rng(k)) for k in range(300)])
    lines = spectrograph.SKY_FLUX*(1 - 1/SKY_BRIGHTNESS)
    strong = lines > 10
    share = residuals[:, strong].std()/lines[strong].mean()
    assert 0.01 < share < 0.03
    assert np.abs(residuals[:, lines < 0.01]).max() < 0.03
    peaks = [np.abs(LOGLAM - np.log10(w*1.000277)).argmin() for w in (8399.2, 8885.9, 5577.3)]
    correlation = np.corrcoef(residuals[:, peaks].T)
    assert correlation[0, 1] > 0.7  # both of OH
    assert abs(correlation[0, 2]) < 0.2  # oxygen


def test_some_ivar_are_too_large():
    spectra = observe_many(np.zeros(len(LOGLAM)), np.full(len(LOGLAM), 1e4))
    widths = np.array([(s.flux*np.sqrt(s.ivar))[s.ivar > 0].std() for s in spectra])
    assert np.median(widths) == pytest.approx(1, abs=0.02)
    assert 0.05 < (widths > 1.08).mean() < 0.2
    assert widths.max() < 1.5


@pytest.mark.skipif(not REAL.is_dir(), reason="SPECPRED_REAL_DATA names no folder with sdss/")
def test_noise_is_like_that_of_real_files():
    real = read_sdss(REAL/"spec-0266-51602-0573.fits")  # a faint galaxy
    variance = spectrograph.sdss_variance(np.interp(LOGLAM, real.loglam, real.model))
    ratio = np.sqrt(np.interp(real.loglam, LOGLAM, variance)*real.ivar)
    for part in np.array_split(ratio[real.ivar > 0], 8): assert 0.65 < np.median(part) < 1.5
