"Photometry and structure against photutils, statmorph and the noise of the sky."
import warnings
from functools import lru_cache

import galsim
import numpy as np
import pandas as pd
import pytest
import statmorph
from photutils.aperture import CircularAperture
from scipy.ndimage import gaussian_filter, label

from specpred.config import InvalidInputError, random_generator
from specpred.images import aperture_magnitudes
from specpred.photometry import (RingPhotometry, border_noise, growth_curves, growth_radii,
    light_within, measure_photometry, measure_structure, ring_radii, ring_table)

SCALE, SIZE, NOISE = .25, 72, 10.
PSF = galsim.Moffat(beta=3, fwhm=1.2)
BANDS = "gri"


def draw(rng, flux=1e6, **changes):
    "(SIZE, SIZE) nJy: bulge, disk with arms, clumps, through the seeing and off the centre."
    p = dict(bulge=rng.uniform(0, .7), radius=rng.uniform(.7, 1.6), axis_ratio=rng.uniform(.4, 1),
        angle=rng.uniform(0, np.pi), arms=rng.uniform(0, 1), clumps=rng.uniform(0, .6), n=15,
        offset=rng.uniform(-.3, .3, 2)) | changes
    y, x = (np.indices((SIZE, SIZE)) - (SIZE - 1)/2)*SCALE
    along = x*np.cos(p["angle"]) + y*np.sin(p["angle"])
    across = (y*np.cos(p["angle"]) - x*np.sin(p["angle"]))/p["axis_ratio"]
    r, azimuth = np.hypot(along, across), np.arctan2(across, along)
    disk = np.exp(-r/p["radius"])*(1 + p["arms"]*np.cos(2*azimuth - 4*np.log(r + .3)))
    clumps = np.zeros_like(disk)
    for _ in range(p["n"]):
        distance, direction = rng.gamma(2, p["radius"]), rng.uniform(0, 2*np.pi)
        u, v = distance*np.cos(direction), distance*np.sin(direction)
        clumps += rng.exponential()*np.exp(-((along - u)**2 + (across - v)**2)/(2*.25**2))
    disk += min(p["clumps"], .6)*disk.sum()*(clumps/clumps.sum() - disk/disk.sum())
    disk *= (1 - p["bulge"])*flux/disk.sum()
    bulge = galsim.Sersic(n=3, half_light_radius=.5*p["radius"], trunc=5*p["radius"])
    scene = galsim.InterpolatedImage(galsim.Image(disk, scale=SCALE)) + p["bulge"]*flux*bulge
    scene = galsim.Convolve(scene.shift(*p["offset"]), PSF)
    image = galsim.Image(SIZE, SIZE, scale=SCALE)
    return scene.drawImage(image, method="no_pixel").array


def observe(images, rng, noise=NOISE):
    "(n, 3, SIZE, SIZE): the same galaxy in three bands, with noise."
    images = np.repeat(np.asarray(images)[:, None], 3, 1)
    return (images + rng.normal(0, noise, images.shape)).astype("f4")


@lru_cache
def sample(n=80):
    rng = random_generator(1, "test_photometry")
    return observe([draw(rng) for _ in range(n)], rng)


class QuickMorphology(statmorph.SourceMorphology):
    "Without the slow statistics that are not compared."
    multimode = intensity = deviation = outer_asymmetry = shape_asymmetry = 0.


def by_statmorph(image):
    smooth = gaussian_filter(image, 2)
    labels, _ = label(smooth > 1.5*NOISE/(2*2*np.sqrt(np.pi)))
    segment = (labels == labels[SIZE//2, SIZE//2]).astype(int)
    weights = np.full(image.shape, NOISE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = QuickMorphology(image, segment, label=1, weightmap=weights,
            sersic_maxiter=1)
        return dict(concentration=found.concentration, asymmetry_r=found.asymmetry,
            clumpiness_r=found.smoothness, r50=found.r50*SCALE,
            petro_radius=found.rpetro_circ*SCALE, axis_ratio=1/found.elongation_asymmetry)


def test_fluxes_are_those_of_photutils():
    rng = random_generator(2, "test_photometry")
    image = draw(rng, offset=(0, 0))
    centre = [(SIZE - 1)/2]*2
    curve, radii = growth_curves(image[None]), growth_radii(image.shape)
    for arcsec in (1.5, 3., 5., 8.):
        expected = CircularAperture(centre, arcsec/SCALE).do_photometry(image)[0][0]
        magnitude = aperture_magnitudes(image, SCALE, arcsec)
        assert 10**(-.4*(magnitude - 31.4)) == pytest.approx(expected, rel=1e-3)
        at = light_within(curve[:, None], radii, np.array([arcsec/SCALE]))
        assert at[0, 0] == pytest.approx(expected, rel=2e-3)  # interpolated


def test_agrees_with_statmorph():
    flux = sample()
    ours = measure_structure(flux, BANDS, SCALE)
    theirs = pd.DataFrame([by_statmorph(image) for image in flux[:, 1].astype(float)])
    good = ~ours.truncated.astype(bool) & (theirs > -90).all(axis=1)
    assert good.mean() > .8
    # With an even number of pixels the boxcar of statmorph (scipy's uniform_filter) is half a pixel
    # off the centre, and S follows the gradient of the image instead of its clumps.
    odd = (.25*theirs.petro_radius/SCALE).astype(int) % 2 == 1
    for name, least in dict(concentration=.9, asymmetry_r=.9, clumpiness_r=.9, r50=.95,
            petro_radius=.95, axis_ratio=.6).items():
        chosen = good & odd if name == "clumpiness_r" else good
        correlation = ours[name][chosen].corr(theirs[name][chosen], method="spearman")
        assert correlation >= least, (name, correlation)
    ratio = ours[good][["r50", "petro_radius"]]/theirs[good][["r50", "petro_radius"]]
    assert (ratio.median() - 1).abs().max() < .03


def test_rings_have_the_fluxes_of_photutils():
    image = draw(random_generator(2, "test_photometry"), offset=(0, 0), clumps=0)
    image = (image + image[::-1, ::-1])/2  # opposite pixels are equal: none is fainter
    table = ring_table(np.broadcast_to(image, (1, 3, SIZE, SIZE)), BANDS).iloc[0]
    for k, radius in enumerate(ring_radii(SIZE, 10)):
        expected = CircularAperture([(SIZE - 1)/2]*2, radius).do_photometry(image)[0][0]
        flux = 200*np.sinh(table[f"magnitude_r_{k + 1}"]*np.log(10)/2.5)
        assert flux == pytest.approx(expected, rel=1e-3)


def test_rings_agree_with_statmorph():
    flux = sample()
    ours = ring_table(flux, BANDS)
    theirs = pd.DataFrame([by_statmorph(image) for image in flux[:, 1].astype(float)])
    good = (theirs > -90).all(axis=1)
    for name, (column, least) in dict(r50=("radius_r", .95), concentration=("concentration_r", .9),
            asymmetry_r=("asymmetry_r_7", .8)).items():
        correlation = theirs[name][good].corr(ours[column][good], method="spearman")
        assert correlation >= least, (name, correlation)
    # statmorph's axis ratio is noisier than ours
    shape = measure_structure(flux, BANDS, SCALE).axis_ratio
    assert shape[good].corr(ours.mode_2_r_6[good], method="spearman") < -.8


@pytest.mark.parametrize("bands, size", [("u", 17), ("gri", 40), ("ugrizy", 64)])
def test_rings_of_any_bands_and_size(bands, size):
    rng = random_generator(5, "test_photometry")
    flux = rng.normal(50, 10, (3, len(bands), size, size)).astype("f4")
    table = ring_table(flux, bands)
    assert len(table.columns) == RingPhotometry(len(bands)).n_features
    assert np.isfinite(table).all(axis=None)
    turned = ring_table(np.rot90(flux[..., ::-1], axes=(2, 3)).copy(), bands)
    np.testing.assert_allclose(turned, table, atol=1e-4)


def test_neighbours_change_rings_little():
    rng = random_generator(6, "test_photometry")
    flux = observe([draw(rng, offset=(0, 0))], rng)
    y, x = np.indices((SIZE, SIZE)) - (SIZE - 1)/2
    beside = flux + 5000*np.exp(-((y - 22)**2 + (x + 14)**2)/8).astype("f4")
    alone, both = (ring_table(f, BANDS).filter(like="magnitude") for f in (flux, beside))
    assert np.abs(both - alone).max(axis=None) < .05
    added = 2.5*np.log10(beside.sum()/flux.sum())
    assert added > .1


def test_noise_is_estimated_beside_large_galaxies():
    rng = random_generator(3, "test_photometry")
    flux = observe([draw(rng, radius=2., clumps=0) for _ in range(8)], rng)
    assert np.median(border_noise(flux)) == pytest.approx(NOISE, rel=.1)


def test_noise_moves_no_median():
    "The mean over many noises is near the measurement without noise."
    rng = random_generator(4, "test_photometry")
    image = draw(rng, clumps=.3, arms=.5, radius=1.5)
    clean = measure_structure(observe([image], rng, 0), BANDS, SCALE, np.zeros((1, 3))).iloc[0]
    noisy = measure_structure(observe([image]*60, rng), BANDS, SCALE).median()
    for name, eps in dict(petro_radius=.1, r50=.05, concentration=.05, axis_ratio=.02,
            asymmetry_r=.04, clumpiness_r=.02, arm_strength=.05, gradient_g_r=.02).items():
        assert noisy[name] == pytest.approx(clean[name], abs=eps), name


def test_neighbours_and_missing_pixels_change_little():
    rng = random_generator(5, "test_photometry")
    images = np.stack([draw(rng, clumps=0, radius=1.2) for _ in range(20)])
    y, x = np.indices((SIZE, SIZE))
    star = 2e5*np.exp(-((x - 54)**2 + (y - 50)**2)/(2*2**2))/(2*np.pi*2**2)
    alone, disturbed = observe(images, rng), observe(images + star, rng)
    disturbed[:, :, 24:26] = np.nan
    disturbed[:, 0, :, 35] = np.nan
    tables = [pd.concat([f(flux, BANDS, SCALE) for f in (measure_structure, measure_photometry)],
        axis=1) for flux in (alone, disturbed)]
    assert (tables[1].neighbours > 0).all() and (tables[0].neighbours == 0).all()
    change = (tables[1] - tables[0]).abs().median()
    for name, eps in dict(petro_radius=.1, r50=.05, concentration=.1, axis_ratio=.02,
            asymmetry_r=.03, clumpiness_r=.02, total_r=.03, fibre_g=.03, fibre_r=.01).items():
        assert change[name] < eps, (name, change[name])


def test_any_shape_and_number_of_bands():
    flux = sample()[:3, :, 2:-2, 3:-4]
    for bands in ("g", "gr", "gri"):
        table = measure_structure(flux[:, :len(bands)], bands, SCALE)
        assert np.isfinite(table).all(axis=None) and len(table) == 3
    named = measure_structure(flux, ("F1", "F2", "F3"), SCALE, blue="F2", reference="F3")
    assert {"asymmetry_F2", "clumpiness_F3", "gradient_F2_F1"} <= set(named)
    photometry = measure_photometry(flux, BANDS, SCALE)
    assert list(photometry)[:4] == ["fibre_g", "fibre_r", "fibre_i", "aperture_g"]
    assert (photometry.fibre_r > photometry.total_r).all()


def test_a_batch_is_measured_like_its_galaxies():
    flux = sample()[:66]
    table = measure_structure(flux, BANDS, SCALE)
    one = measure_structure(flux[65:], BANDS, SCALE)
    pd.testing.assert_frame_equal(table[65:].reset_index(drop=True), one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0., np.nan, 5., -5.])
def test_empty_images(value):
    flux = np.full((2, 3, SIZE, SIZE), value, "f4")
    flux[1] += random_generator(6, "test_photometry").normal(0, 10, flux[1].shape)
    structure = measure_structure(flux, BANDS, SCALE, np.full((2, 3), 10.))
    assert structure.isna().all(axis=None) or value == 5
    assert measure_photometry(flux, BANDS, SCALE).filter(like="fibre").isna().all(axis=None) \
        == np.isnan(value)


@pytest.mark.parametrize("measure", [measure_structure, measure_photometry])
def test_wrong_input(measure):
    flux = np.zeros((2, 3, 32, 32))
    for bad, bands, options in [(flux[0], BANDS, {}), (flux, "gr", {}), (flux[..., :8], BANDS, {}),
            (flux, BANDS, dict(noise=np.ones(3))), (flux, BANDS, dict(reference="K"))]:
        with pytest.raises(InvalidInputError): measure(bad, bands, SCALE, **options)
