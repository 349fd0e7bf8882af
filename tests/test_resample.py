"specpred.resample: images of other surveys as images of the model's."
import dataclasses

import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits

from specpred.config import InvalidInputError, SpecpredError
from specpred.cutouts import (NOTHING_STATED, Cutout, Stated, complete_facts, read_cutout,
    skycell_wcs)
from specpred.images import aperture_magnitudes
from specpred.resample import _centre, resample_galaxy, resample_image
from specpred.surveys import LEGACY, PS1

MIDDLE = SkyCoord(150, 2, unit="deg")
RI = dataclasses.replace(PS1, bands=("r", "i"), depth=(23, 23), seeing=(1.19, 1.11))


def blob(size, sigma, x=0.0, y=0.0):
    "A Gaussian of flux 1, elongated along x, `x` and `y` pixels off the middle."
    rows, columns = np.indices((size, size)) - (size - 1)/2
    shape = np.exp(-0.5*(((columns - x)/sigma)**2 + ((rows - y)/sigma*2)**2))
    return shape/shape.sum()


def cutout_of(pixels, scale=0.25, mask=None, stated=NOTHING_STATED, **cards):
    header = skycell_wcs(150, 2, len(pixels), scale).to_header()
    header.update(cards)
    mask = np.zeros(pixels.shape, bool) if mask is None else mask
    return Cutout(np.where(mask, 0, pixels).astype(np.float32), mask, header,
        complete_facts(header, stated))


def test_an_image_on_its_own_pixels_stays_as_it_is():
    pixels = np.random.default_rng(0).normal(size=(40, 40))
    image = resample_image(cutout_of(pixels), MIDDLE, 0.25, 40)
    np.testing.assert_allclose(image.flux, pixels, atol=1e-4)
    assert not image.mask.any()


@pytest.mark.parametrize("scale, size", [(0.1, 160), (0.2, 80), (0.396, 41), (0.5, 32)])
def test_flux_is_conserved_at_any_scale(scale, size):
    image = resample_image(cutout_of(blob(size, 1.2/scale), scale), MIDDLE, 0.25, 60)
    assert image.flux.sum() == pytest.approx(1, abs=1e-4)
    expected = blob(60, 1.2/0.25)
    np.testing.assert_allclose(image.flux, expected, atol=0.01*expected.max())  # pixels integrate


@pytest.mark.parametrize("scale", [0.03, 0.05, 0.06])
def test_fine_pixels_are_summed_first_in_any_spelling(scale):
    size = round(20/scale)
    for spelling in ("CDELT", "CD"):
        cutout = cutout_of(blob(size, 1.2/scale), scale)
        if spelling == "CD":
            for name in ("CDELT1", "CDELT2"): cutout.header.remove(name)
            cutout.header.update(CD1_1=-scale/3600, CD1_2=0.0, CD2_1=0.0, CD2_2=scale/3600)
        image = resample_image(cutout, MIDDLE, 0.25, 60)
        expected = blob(60, 1.2/0.25)
        np.testing.assert_allclose(image.flux, expected, atol=0.015*expected.max())
        assert not image.mask.any()


@pytest.mark.parametrize("scale", [0.168, 0.25, 0.396])
def test_one_pixel_without_data_takes_about_its_own_area(scale):
    size = round(20/scale)
    mask = np.zeros((size, size), bool)
    mask[size//2, size//2] = True
    image = resample_image(cutout_of(blob(size, 1.2/scale), scale, mask), MIDDLE, 0.25, 60)
    assert image.mask.sum() <= 2*max(1, (scale/0.25)**2)
    whole = resample_image(cutout_of(blob(size, 1.2/scale), scale), MIDDLE, 0.25, 60)
    assert abs(image.flux.sum()/whole.flux[~image.mask].sum() - 1) < 0.01


def test_mirrored_and_turned_images_are_put_north_up():
    original = blob(64, 6, x=5, y=9)
    mirrored = cutout_of(original[:, ::-1], CDELT1=0.25/3600)
    turned = cutout_of(np.rot90(original), PC1_1=0.0, PC1_2=-1.0, PC2_1=1.0, PC2_2=0.0)
    for cutout in (mirrored, turned):
        image = resample_image(cutout, MIDDLE, 0.25, 64)
        np.testing.assert_allclose(image.flux, original, atol=1e-5)


def test_pixels_without_data_stay_without():
    mask = np.zeros((64, 64), bool)
    mask[20:24, 30] = True
    image = resample_image(cutout_of(blob(64, 6), mask=mask), MIDDLE, 0.25, 80)
    assert image.mask[28:32, 38].all() and not image.mask[40:60, 20:60].any()
    assert image.mask[:8].all() and not image.flux[image.mask].any()  # beyond the image


def test_calibration_comes_from_each_image():
    pixels = 100*blob(64, 4)
    counts = dict(BUNIT="adu", FILTER="x")
    nanomaggies = cutout_of(pixels, BUNIT="nanomaggy")
    bands = dict(r=cutout_of(pixels, MAGZERO=27.5, **counts), i=nanomaggies)
    flux = resample_galaxy(bands, 60, RI).galaxy.flux.sum((1, 2))
    np.testing.assert_allclose(flux, [100*36.31, 100*3631], rtol=1e-3)

    bands["r"] = cutout_of(pixels, **counts)
    with pytest.raises(InvalidInputError, match="no exposure time in EXPTIME.* --zero-point"):
        resample_galaxy(bands, 60, RI)
    bands["r"] = cutout_of(pixels, stated=Stated(zero_point=30.0), **counts)
    assert resample_galaxy(bands, 60, RI).galaxy.flux[0].sum() == pytest.approx(363.1, rel=1e-3)


def test_an_image_without_coordinates_needs_its_scale():
    pixels, header = 100*blob(41, 3), fits.Header(dict(BUNIT="nJy"))
    def bands(stated):
        facts = complete_facts(header, stated)
        return {b: Cutout(np.float32(pixels), pixels < 0, header, facts) for b in RI.bands}
    with pytest.raises(InvalidInputError, match="pixel scale is unknown"):
        resample_galaxy(bands(Stated()), 40, RI)
    flux = resample_galaxy(bands(Stated(pixel_scale=0.4)), 60, RI).galaxy.flux
    np.testing.assert_allclose(flux.sum((1, 2)), 100, rtol=1e-3)


def test_what_cannot_be_made_equal_is_said():
    image = cutout_of(blob(64, 6), BUNIT="nanomaggy", TELESCOP="SDSS 2.5-M")
    with pytest.raises(InvalidInputError, match="no image in y; SDSS has no y"):
        resample_galaxy(dict.fromkeys("griz", image), 32, PS1)
    notes = resample_galaxy(dict.fromkeys("ri", image), 32, RI).notes
    assert notes[0] == "no colour terms from SDSS to Pan-STARRS1"  # they need g - r
    assert "the seeing of SDSS in r is 1.32 arcsec, that of Pan-STARRS1 1.19" in notes
    unknown = cutout_of(blob(64, 6), BUNIT="nJy")
    assert resample_galaxy(dict.fromkeys("ri", unknown), 32, RI).notes == [
        "its filters are unknown: no colour terms", "its seeing is unknown"]
    same = cutout_of(blob(64, 6), TELESCOP="DECam", BUNIT="nanomaggy", CDELT1=0.25/3600)
    assert resample_galaxy(dict.fromkeys("griz", same), 32, LEGACY).notes == []


def test_flux_is_conserved_in_any_projection():
    "Far from the tangent point, or in plate carrée, pixels have another size than CDELT."
    pixels = blob(81, 8)
    for cards in (dict(CTYPE1="RA---CAR", CTYPE2="DEC--CAR", CRVAL2=0.0, CRPIX2=41 - 2*14400.0),
            dict(CRVAL2=22.0, CRPIX2=41 + 20*14400.0),
            dict(CTYPE1="GLON-TAN", CTYPE2="GLAT-TAN")):
        cutout = cutout_of(pixels, **cards)
        cutout.header.update(NAXIS=2, NAXIS1=81, NAXIS2=81)
        cutout = dataclasses.replace(cutout, facts=complete_facts(cutout.header))
        image = resample_image(cutout, _centre(cutout), 0.2, 80)
        assert image.flux.sum() == pytest.approx(1, abs=2e-3), cards


def test_holes_do_not_ring():
    "A star that is saturated leaves a hole; the pixels around it keep their values."
    star = 1e5*blob(64, 6)*4
    mask = star > 0.5*star.max()
    whole = resample_image(cutout_of(star), MIDDLE, 0.2, 60)
    image = resample_image(cutout_of(star, mask=mask), MIDDLE, 0.2, 60)
    kept = ~image.mask
    assert np.abs(image.flux - whole.flux)[kept].max() < 0.02*whole.flux.max()


def test_images_that_cannot_be_resampled():
    small = cutout_of(blob(20, 3), scale=0.05)
    with pytest.raises(InvalidInputError, match="it covers 1.0 arcsec of 15.0"):
        resample_image(small, MIDDLE, 0.25, 60)
    broken = cutout_of(blob(64, 3), RADESYS="FK5", EQUINOX=1e300, BUNIT="nJy")
    with pytest.raises(SpecpredError): resample_galaxy(dict.fromkeys("ri", broken), 32, RI)
    mixed = dict(r=cutout_of(blob(64, 6), TELESCOP="SDSS", BUNIT="nanomaggy"),
        i=cutout_of(blob(64, 6), TELESCOP="PS1", BUNIT="nJy"))
    with pytest.raises(InvalidInputError, match="of several surveys"):
        resample_galaxy(mixed, 32, RI)
    counts = cutout_of(blob(64, 6), TELESCOP="SDSS", EXPTIME=54.0)  # of an old frame
    with pytest.raises(InvalidInputError, match="no zero point for the unit of the pixels"):
        resample_galaxy(dict.fromkeys("ri", counts), 32, RI)


def test_real_frames_of_sdss_become_what_ps1_saw(real_data):
    "The same galaxy from both surveys: magnitudes, colour terms and the light's distribution."
    gr = dataclasses.replace(PS1, bands=("g", "r"), depth=(23, 23), seeing=(1.31, 1.19))
    cutouts = {band: read_cutout(real_data/f"sdss_images/{band}.fits", band) for band in "gr"}
    there, notes = resample_galaxy(cutouts, 240, gr)
    ours = np.stack([read_cutout(real_data/f"ps1/{band}.fits", band).to_njy(PS1) for band in "gr"])
    assert "the middle of the r image is 3.9 arcsec from that of g" in notes  # they were cut so
    def centred(image):
        row, column = np.unravel_index(image.argmax(), image.shape)
        return image[row - 90:row + 91, column - 90:column + 91]
    there, ours = (np.stack([centred(image) for image in x]) for x in (there.flux, ours))
    magnitudes = [aperture_magnitudes(images, 0.25, 10) for images in (there, ours)]
    print(magnitudes)
    np.testing.assert_allclose(*magnitudes, atol=0.05)
    for mine, other in zip(there, ours, strict=True):
        assert np.corrcoef(mine.ravel(), other.ravel())[0, 1] > 0.95
