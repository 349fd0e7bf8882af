"""Light of mock galaxies: populations, maps, images and spectra agree with each other."""
import shutil

import astropy.units as u
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.ensemble import HistGradientBoostingRegressor
from speclite.filters import load_filter

from specpred import mock_light as mock
from specpred.config import DamagedFileError, InvalidInputError, MissingInputError, repo_root
from specpred.mock_galaxies import KINDS, REDSHIFTS, draw_parameters
from specpred.mock_light import R_LIMITS, STRUCTURE, draw_light, galaxy_image, spectrum_at
from specpred.populations import (OLDEST_IONIZING, FineBasis, StellarLibrary, active_nucleus_lines,
    age_weights, broaden, composite_population, interpolation_weights, star_formation_history)
from specpred.spectrograph import WAVELENGTH
from specpred.surveys import AB_ZERO, PS1, RUBIN

SEEING = np.array([1.31, 1.19, 1.11, 1.07, 1.02])


@pytest.fixture(scope="module")
def library():
    return StellarLibrary.load()


@pytest.fixture(scope="module")
def fine(library):
    return FineBasis.of(library)


@pytest.fixture(scope="module")
def light(library):
    "Some galaxies of each kind."
    drawn = draw_light(library, 400, 3, "tests of light")
    rows = [np.flatnonzero(drawn.galaxies.kind == kind)[:12] for kind in KINDS]
    return mock.take_rows(drawn, np.concatenate(rows))


# Populations

def test_library_errors(tmp_path):
    with pytest.raises(MissingInputError, match="git checkout"):
        StellarLibrary.load(tmp_path/"no.h5")
    (tmp_path/"half.h5").write_bytes(b"\x89HDF\r\n\x1a\nhalf")
    with pytest.raises(DamagedFileError, match="not a stellar library"):
        StellarLibrary.load(tmp_path/"half.h5")


@pytest.mark.parametrize("name", ["log_u", "nebular_age", "line_luminosity"])
def test_a_library_of_another_version(tmp_path, name):
    path = shutil.copy(repo_root()/"data"/"stellar_library.h5", tmp_path)
    with h5py.File(path, "a") as f: del f[name]
    with pytest.raises(DamagedFileError, match=f"not a stellar library.*{name}"):
        StellarLibrary.load(path)


def test_a_composite_population_is_a_sum_over_the_library(library):
    rng = np.random.default_rng(3)
    formed = star_formation_history(rng.uniform(5, 12, 4), rng.uniform(0.5, 5, 4),
        rng.uniform(0.05, 1, 4), 10**rng.uniform(-1, 1, 4))
    log_z, gas_log_z, log_u = rng.uniform((-1, -1, -3.8), (0.4, 0.4, -2), (4, 3)).T
    made = composite_population(library, formed, log_z, gas_log_z, log_u)
    nodes = np.log10(library.metallicity)
    stars, gas = (interpolation_weights(nodes, z) for z in (log_z, gas_log_z))
    ages = age_weights(formed, library.age)
    young = age_weights(formed, library.nebular_age, OLDEST_IONIZING)
    coefficients = (np.einsum("na,nz,azk->nk", ages, stars, library.coefficients)
        + np.einsum("na,nz,azk->nk", young, gas, library.nebular_coefficients))
    ionization = interpolation_weights(library.log_u, log_u)
    lines = np.einsum("nu,nz,na,uzal->nl", ionization, gas, young, library.line_luminosity)
    oxygen = library.line_wavelength.round() == 5008
    assert made.coefficients == pytest.approx(coefficients, rel=1e-6)
    assert made.lines[:, oxygen] == pytest.approx(lines[:, oxygen], rel=1e-6)
    empty = composite_population(library, formed[:0], log_z[:0], gas_log_z[:0], log_u[:0])
    assert empty.lines.shape == (0, len(library.line_wavelength))


@pytest.mark.parametrize("name, wavelength", [("seyfert", 5008), ("ionization", 3870),
    ("nitrogen", 6585), ("neutral", 6302)])
def test_parameters_of_nuclei_raise_their_lines(library, name, wavelength):
    usual = dict(seyfert=0.5)
    line = library.line_wavelength.round() == wavelength
    before = active_nucleus_lines(library, [1.0, 2.0], **usual)
    after = active_nucleus_lines(library, [1.0, 2.0], **usual | {name: usual.get(name, 0) + 0.2})
    assert (after[:, line] > 1.1*before[:, line]).all()
    assert before[1] == pytest.approx(2*before[0])
    halpha = np.abs(library.line_wavelength - 6564.61).argmin()
    assert after[:, halpha] == pytest.approx([1, 2])


@settings(max_examples=25, deadline=None)
@given(st.floats(0.7, 12), st.floats(0, 0.999))
def test_broadening_keeps_flux(sigma, fraction):
    spectrum = np.zeros(2000)
    spectrum[900:1100] = 1
    broadened = broaden(spectrum, 100 + fraction, np.full(850, sigma))
    assert broadened.sum() == pytest.approx(100, abs=0.6)
    assert broadened.min() >= 0


# Samples

def test_seeds_repeat(library):
    first, again = (draw_light(library, 8, 5, "a") for _ in range(2))
    assert first.galaxies.equals(again.galaxies)
    assert (first.flux == again.flux).all()
    for other in ((6, "a"), (5, "b")):
        assert not draw_light(library, 8, *other).galaxies.equals(first.galaxies)


def test_every_survey_sees_the_same_galaxies(library):
    ps1, rubin = (draw_light(library, 8, 5, survey=survey) for survey in (PS1, RUBIN))
    assert [c for c in rubin.galaxies if c.startswith("mag_")] == [f"mag_{b}" for b in "ugrizy"]
    common = [c for c in ps1.galaxies if not c.startswith("mag_")]
    pd.testing.assert_frame_equal(ps1.galaxies[common], rubin.galaxies[common], rtol=1e-5)


@pytest.mark.parametrize("couplings", ["all", "none"])
def test_light_of_galaxies_does_not_depend_on_the_others(library, couplings):
    some = draw_parameters(30, np.random.default_rng(2), couplings)
    all_light, one = mock.make_light(library, some), mock.make_light(library, some[7:8])
    assert one.flux[0] == pytest.approx(all_light.flux[7], rel=1e-4)
    numbers = one.galaxies.select_dtypes("number")
    assert numbers.iloc[0].to_numpy() == pytest.approx(
        all_light.galaxies[numbers.columns].iloc[7].to_numpy(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("n", [0, -2])
def test_a_sample_has_a_galaxy(library, n):
    with pytest.raises(InvalidInputError, match="at least one"): draw_light(library, n, 1)


def test_unknown_couplings_of_a_sample(library):
    with pytest.raises(InvalidInputError, match="'legs' is none of"):
        draw_light(library, 2, 1, couplings="legs")


# Images and spectra

def smooth(light):
    "Rows whose light is well within an image of 60 arcsec, without a nucleus or a cuspy bulge."
    galaxies = light.galaxies
    return np.flatnonzero((galaxies.nucleus == "none") & (galaxies.bulge_light < 0.2)
        & (galaxies.disk_scale < 2) & (galaxies.bulge_sersic <= 2.5) & (galaxies.tidal_tail == 0))


def flux_in_band(galaxies, row, band):
    return AB_ZERO*10**(-0.4*galaxies[f"mag_{band}"].iloc[row])


@pytest.mark.parametrize("barred", [False, True])
def test_an_image_has_the_flux_of_the_truth(light, barred):
    rows = smooth(light)
    rows = rows[(light.galaxies.bar_share[rows] > 0) == barred][:4]
    assert len(rows) == (2 if barred else 4)
    for row in rows:
        image = galaxy_image(light, row, np.full(5, 1.0), 320)
        for band, one in zip(PS1.bands, image, strict=True):
            true = flux_in_band(light.galaxies, row, band)
            outside = 0.0013  # of a Moffat profile of 1", beyond 40"
            tolerance = (5e-3 if barred else 1e-3) + outside
            assert one.sum(dtype=float) == pytest.approx(true, rel=tolerance)


def magnitude(flux, name):
    unit = 1e-17*u.erg/u.s/u.cm**2/u.AA
    return load_filter(name).get_ab_magnitude(flux*unit, WAVELENGTH*u.AA)


def test_a_spectrum_of_all_light_has_the_magnitudes(light, fine):
    inside = np.flatnonzero(light.galaxies.petro_r90 < 8)  # of a radius of 50 arcsec
    for row in inside[::4]:
        flux = spectrum_at(fine, light, row, radius=50).flux
        for band in "gri":
            true = light.galaxies[f"mag_{band}"].iloc[row]
            assert magnitude(flux, f"{PS1.filters}-{band}") == pytest.approx(true, abs=0.01)


@pytest.mark.parametrize("offset", [(0.0, 0.0), (1.2, -0.7)], ids=["centre", "beside"])
def test_fibre_and_image_agree(light, fine, offset):
    scale, size = 0.1, 80
    y, x = (np.indices((size, size)) - (size - 1)/2)*scale
    # parts of pixels in the circle
    inside = np.clip((mock.FIBRE_RADIUS - np.hypot(x, y))/scale + 0.5, 0, 1)
    seeing = np.full(5, mock.FIBRE_SEEING)
    for row in range(0, len(light.maps), 5):
        centre = -np.array(offset)/scale  # the image's centre is on the fibre
        image = galaxy_image(light, row, seeing, size, scale, centre)
        flux = spectrum_at(fine, light, row, offset).flux
        for k, band in enumerate("gri"):
            through_fibre = AB_ZERO*10**(-0.4*magnitude(flux, f"{PS1.filters}-{band}"))
            assert (image[k]*inside).sum() == pytest.approx(through_fibre, rel=0.025)


def test_an_aperture_is_the_sum_of_small_ones(light):
    step = 0.1
    grid = np.arange(-1.45, 1.5, step)
    places = [(x, y) for x in grid for y in grid if np.hypot(x, y) < 1.5]
    area = np.pi*1.5**2/len(places)  # of each place
    for row in (0, 15, 30):
        maps = light.maps[row]
        whole = mock.light_within(maps, mock.aperture(radius=1.5))
        small = sum(mock.light_within(maps, mock.aperture(place, radius=0.05)) for place in places)
        assert small*area/(np.pi*0.05**2) == pytest.approx(whole, rel=0.01, abs=1e-5)


def test_light_in_an_aperture_grows_to_all(light):
    for row in (0, 15, 30):
        maps = light.maps[row]
        radii = (0.2, 0.5, 1.5, 4, 10, 40)
        within = [mock.light_within(maps, mock.aperture(radius=r)).sum() for r in radii]
        assert (np.diff(within) > 0).all()
        assert within[-1] == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("scale", [0.25, 0.396])
@pytest.mark.parametrize("size", [64, 100])
def test_images_are_accurate(light, size, scale):
    rng, errors = np.random.default_rng(size), []
    for row in range(0, len(light.maps), 2 if size == 64 else 4):
        offset = rng.uniform(-0.5, 0.5, 2) if size == 64 else rng.uniform(-5, 5, 2)
        image, better = (galaxy_image(light, row, SEEING, size, scale, offset, **fine)
            for fine in ({}, dict(fine=8)))
        errors.append((np.abs(image - better)/better.max((1, 2), keepdims=True)).max())
    assert max(errors) < 0.005


def test_moving_a_galaxy_moves_its_image(light):
    for row in range(0, len(light.maps), 12):
        here, there = (galaxy_image(light, row, SEEING, 64, offset=(x, 0.3)) for x in (0.2, 3.2))
        assert np.abs(there[:, :, 3:] - here[:, :, :-3]).max() < 1e-4*here.max()


def test_images_add_up(light):
    seeing = np.full(5, 1.2)
    star = mock.Source(2.0, -1.5, np.arange(1, 6)*1e3)
    disk = mock.Source(-2.0, 1.0, np.arange(1, 6)*2e3, 0.5, 0.6, 30.0)
    alone = galaxy_image(light, 0, seeing, 128)
    star_alone = galaxy_image(light, 0, seeing, 128, others=(star,)) - alone
    both = galaxy_image(light, 0, seeing, 128, others=(star, disk)) - alone
    assert star_alone.sum((1, 2)) == pytest.approx(star.flux, rel=0.01)
    assert both.sum((1, 2)) == pytest.approx(3*star.flux, rel=0.02)
    x = np.arange(128) - 63.5
    assert (star_alone.sum(1) @ x)/star.flux == pytest.approx(2/PS1.pixel_scale, abs=0.1)
    assert (star_alone.sum(2) @ x)/star.flux == pytest.approx(-1.5/PS1.pixel_scale, abs=0.1)


@pytest.mark.parametrize("wrong", [dict(size=0), dict(size=-1), dict(seeing=np.zeros(5)),
    dict(seeing=np.full(5, -1.0)), dict(seeing=np.full(5, np.nan)), dict(seeing=np.ones(4)),
    dict(seeing=1.2), dict(seeing=np.full(5, np.inf)), dict(pixel_scale=0), dict(pixel_scale=-0.2),
    dict(offset=(np.nan, 0)), dict(fine=0)], ids=str)
def test_impossible_images(light, wrong):
    with pytest.raises(InvalidInputError, match="above zero"):
        galaxy_image(light, 0, **dict(seeing=np.ones(5), size=32) | wrong)


@pytest.mark.parametrize("wrong", [dict(radius=0), dict(radius=-1), dict(radius=np.nan),
    dict(radius=np.inf), dict(seeing=0), dict(seeing=-1), dict(seeing=np.inf),
    dict(offset=(np.nan, 0))], ids=str)
def test_impossible_apertures(light, fine, wrong):
    with pytest.raises(InvalidInputError, match="above zero"):
        spectrum_at(fine, light, 0, **wrong)


# What looks tell

MAGNITUDES = [f"mag_{band}" for band in PS1.bands]
# A nucleus is seen in an image without noise, whatever its couplings
LOOKS = [*(name for name in STRUCTURE if name != "nucleus_light"), "half_light_radius"]


def errors_without_and_with(table, target, columns, n_train):
    "Errors of boosted trees that get the looks of other galaxies, and of the galaxy itself."
    y = table[target].to_numpy(float)
    looks = table[columns].to_numpy(float)
    for seen in (np.random.default_rng(1).permutation(looks), looks):
        x = np.hstack([table[MAGNITUDES], seen])
        trees = HistGradientBoostingRegressor(max_iter=120, max_leaf_nodes=12, min_samples_leaf=25,
            learning_rate=0.08, random_state=0)
        yield trees.fit(x[:n_train], y[:n_train]).predict(x[n_train:]) - y[n_train:]


def rms_ratio(table, target, columns=LOOKS):
    "Error with the looks over that without, and its bootstrap error."
    without, with_looks = errors_without_and_with(table, target, columns, 2*len(table)//3)
    rows = np.random.default_rng(2).integers(len(without), size=(200, len(without)))
    ratios = np.sqrt((with_looks[rows]**2).mean(1)/(without[rows]**2).mean(1))
    return np.sqrt((with_looks**2).mean()/(without**2).mean()), ratios.std()


def sample(library, n, couplings):
    table = draw_light(library, n, 11, "looks", couplings=couplings).galaxies
    return table.assign(active=table.nucleus != "none", log_ew=np.log10(table.nucleus_ew + 0.1))


@pytest.fixture(scope="module")
def coupled(library):
    return sample(library, 1800, "all")


@pytest.fixture(scope="module")
def uncoupled(library):
    return sample(library, 2400, "none")


@pytest.mark.parametrize("target", ["log_ssfr", "log_burst", "oxygen", "stars_log_z", "av_stars",
    "redshift", "log_mass", "mean_age", "active", "log_ew"])
def test_looks_tell_nothing_without_couplings(uncoupled, target):
    ratio, error = rms_ratio(uncoupled, target)
    assert ratio > 0.98 - 2*error


@pytest.mark.parametrize("target, at_most", [("log_ssfr", 0.45), ("av_stars", 0.7),
    ("mean_age", 0.8), ("stars_log_z", 0.95), ("oxygen", 1.0)])
def test_looks_tell_something_with_couplings(coupled, target, at_most):
    ratio, error = rms_ratio(coupled, target)
    assert ratio < min(at_most, 1 - 2*error)


def test_population_is_bimodal_and_complete(coupled):
    assert coupled.redshift.between(*REDSHIFTS).all()
    assert 0.07 < coupled.redshift.median() < 0.13
    assert np.isfinite(coupled.select_dtypes("number")).all(axis=None)
    dereddened = coupled.petro_r - mock.SDSS_EXTINCTION["r"]*coupled.ebv
    assert dereddened.between(*R_LIMITS).all()
    near = coupled[coupled.redshift.between(0.07, 0.1)]
    counts, _ = np.histogram(near.sdss_g - near.sdss_r - 1.04*near.ebv, np.arange(0.3, 1.2, 0.05))
    blue, red = counts[:10].argmax(), 13 + counts[13:].argmax()
    assert counts[blue:red].min() < 0.9*min(counts[blue], counts[red])  # a valley between two peaks
    forming = coupled[coupled.kind == "star-forming"]
    assert np.corrcoef(forming.log_mass, forming.stars_log_z)[0, 1] > 0.4  # mass and metallicity
