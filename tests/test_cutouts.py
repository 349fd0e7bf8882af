"specpred.cutouts: what a header says of its image, in the words of many surveys."
import io
import math

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_scales

from specpred.config import DamagedFileError, InvalidInputError
from specpred.cutouts import (ImageFacts, Stated, band_of, complete_facts, differences,
    image_facts, read_cutout, read_cutouts, sky_to_pixel, skycell_bytes, skycell_wcs, unit_of)
from specpred.surveys import LEGACY, PS1, RUBIN, SURVEYS

DECAM = dict(TELESCOP="CTIO 4.0-m telescope", INSTRUME="DECam",
    FILTER="z DECam SDSS c0004 9260.0 1520.0", BUNIT="electron/s", MAGZERO=30.2, PIXSCAL1=0.27)
LEGACY_SERVICE = dict(SURVEY="LegacySurvey", BANDS="grz", BUNIT="nanomaggy", CD1_1=-7.28e-5,
    CD1_2=0, CD2_1=0, CD2_2=7.28e-5, CTYPE1="RA---TAN", CTYPE2="DEC--TAN")
HSC = dict(INSTRUME="Hyper Suprime-Cam", FILTER="HSC-Y", FLUXMAG0=6.30957344e10,
    CD1_1=-4.667e-5, CD2_2=4.667e-5, CTYPE1="RA---TAN", CTYPE2="DEC--TAN")
RUBIN_COADD = dict(TELESCOP="Simonyi Survey Telescope", FILTER="i_39", BUNIT="nJy",
    CDELT1=-5.5556e-5, CDELT2=5.5556e-5, CTYPE1="RA---TAN", CTYPE2="DEC--TAN")
HUBBLE = dict(TELESCOP="HST", INSTRUME="ACS", FILTER1="F606W", BUNIT="ELECTRONS/S", EXPTIME="n/a",
    CD1_1=-1.39e-5, CD2_2=1.39e-5, CTYPE1="RA---TAN", CTYPE2="DEC--TAN")


@pytest.mark.parametrize("cards, band, survey, unit, zero_point, scale", [
    (DECAM, "z", LEGACY, "count/s", 30.2, 0.27),
    (LEGACY_SERVICE, "", LEGACY, "nanomaggy", 22.5, 0.262),
    (HSC, "y", None, "", 27.0, 0.168),
    (RUBIN_COADD, "i", RUBIN, "nJy", 31.4, 0.2),
    (HUBBLE, "F606W", None, "count/s", math.nan, 0.05)])
def test_headers_of_surveys(cards, band, survey, unit, zero_point, scale):
    facts = image_facts(fits.Header(cards))
    assert facts.band == band and facts.unit == unit
    named = [known for known in SURVEYS.values() if known.is_named_in(facts.telescope)]
    assert named == ([survey] if survey else [])
    np.testing.assert_allclose([facts.zero_point, *facts.pixel_scale], [zero_point, scale, scale],
        rtol=2e-3)
    if survey is not RUBIN: assert differences(facts, PS1)


@pytest.mark.parametrize("text, band", [
    ("g.00000", "g"), ("r", "r"), ("SDSS i", "i"), ("zp1", "z"), ("y", "y"), ("HSC-R", "r"),
    ("DES_g", "g"), ("u'", "u"), ("ip", "i"), ("PS1 y", "y"), ("R", "R"), ("I", "I"), ("VR", "VR"),
    ("ZTF_g", "g"), ("HSC-R2", "r"), ("PS1:g", "g"), ("Sloan g", "g"), ("OMEGACAM g_SDSS", "g"),
    ("OCAM_g_SDSS", "g"), ("zr", "r"), ("bokr", "r"), ("MzLS z", "z"), ("gSDSS", "g"),
    ("Ks", "Ks"), ("rr", "rr"), ("F814W", "F814W")])
def test_spellings_of_bands(text, band): assert band_of(text) == band


@pytest.mark.parametrize("text, unit, zero_point", [
    ("nanomaggies", "nanomaggy", 22.5), ("nmgy", "nanomaggy", 22.5), ("Jy", "Jy", 8.9),
    ("10^-6 Jy", "10^-6 Jy", 23.9), ("DN", "count", math.nan), ("counts/sec", "count/s", math.nan),
    ("njy", "nJy", 31.4), ("microJy", "uJy", 23.9), ("nJy/pixel", "nJy", 31.4), ("mgy", "maggy", 0),
    ("e/s", "count/s", math.nan), ("electrons", "count", math.nan), ("MJy/sr", "MJy/sr", math.nan),
    ("erg/s/cm2/Hz", "erg/s/cm2/Hz", -48.6), ("furlong", "furlong", math.nan)])
def test_spellings_of_units(text, unit, zero_point):
    assert unit_of(text)[0] == unit
    assert unit_of(text)[1] == pytest.approx(zero_point, abs=2e-3, nan_ok=True)


@pytest.mark.filterwarnings("ignore::astropy.wcs.FITSFixedWarning")
@pytest.mark.parametrize("seed", range(30))
def test_any_world_coordinate_system_gives_the_scale_that_astropy_gives(seed):
    rng = np.random.default_rng(seed)
    header = fits.Header(dict(CTYPE1="RA---TAN", CTYPE2="DEC--TAN", CRVAL1=10.0, CRVAL2=20.0))
    matrix = rng.normal(0, 1e-4, (2, 2))
    names = [("CD{}_{}", 1), ("PC{}_{}", 2e-4), ("PC00{}00{}", 2e-4)][seed % 3]
    for i, j in np.ndindex(2, 2): header[names[0].format(i + 1, j + 1)] = matrix[i, j]/names[1]
    if names[1] != 1: header.update(CDELT1=names[1], CDELT2=names[1])
    if seed % 2:  # declination first is legal, too
        header.update(CTYPE1="DEC--TAN", CTYPE2="RA---TAN", CRVAL1=20.0, CRVAL2=10.0)
        matrix = matrix[::-1]
    facts = image_facts(header)
    expected = proj_plane_pixel_scales(WCS(header))*3600
    np.testing.assert_allclose(facts.pixel_scale, expected, rtol=1e-9)
    assert facts.mirrored == (np.linalg.det(matrix) > 0)
    x, y = np.linalg.solve(matrix, [0, 1])
    assert math.tan(math.radians(facts.rotation)) == pytest.approx(-x/y)


def test_a_header_without_sky_coordinates_says_no_scale():
    for cards in ({}, dict(CTYPE1="LINEAR", CTYPE2="LINEAR", CDELT1=1.0, CDELT2=1.0),
            dict(CTYPE1="RA---TAN", CTYPE2="DEC--TAN")):
        assert np.isnan(image_facts(fits.Header(cards)).pixel_scale).all()
    singular = dict(CTYPE1="RA---TAN", CTYPE2="DEC--TAN", CD1_1=1e-4)
    with pytest.raises(DamagedFileError, match="singular"): image_facts(fits.Header(singular))


@pytest.mark.parametrize("changes, said", [
    (dict(), ""), (dict(telescope=""), ""), (dict(unit="nJy", zero_point=31.4), ""),
    (dict(pixel_scale=(0.252, 0.25)), ""), (dict(rotation=-15.0), ""),
    (dict(telescope="SDSS 2.5-M"), "taken by 'SDSS 2.5-M', not Pan-STARRS1"),
    (dict(pixel_scale=(0.396, 0.396)), "pixels of 0.396 x 0.396 arcsec, not 0.25"),
    (dict(pixel_scale=(0.25, 0.5)), "pixels of 0.25 x 0.5 arcsec, not 0.25"),
    (dict(unit="nanomaggy", zero_point=22.5), "unit nanomaggy, not count"),
    (dict(zero_point=30.0), "zero point 30.00 mag, not 32.34"),
    (dict(unit="count/s", zero_point=25.0), ""),
    (dict(unit="count/s", zero_point=26.0), "zero point 26.00 mag, not 25.00"),
    (dict(mirrored=True), "east to the right of north, not to the left"),
    (dict(rotation=90.0), "north 90 degrees from up, not 0")])
def test_what_is_not_of_the_survey_is_said_with_both_values(changes, said):
    usual = dict(band="g", telescope="PS1", unit="count", exptime=860.0, pixel_scale=(0.25, 0.25),
        zero_point=25 + 2.5*math.log10(860))
    assert "; ".join(differences(ImageFacts(**usual | changes), PS1)) == said


def test_user_and_header_have_to_agree():
    header = fits.Header(dict(BUNIT="nanomaggy"))
    assert complete_facts(header, Stated(pixel_scale=0.396)).pixel_scale == (0.396, 0.396)
    assert complete_facts(header, Stated(unit="nmgy")).zero_point == 22.5
    for stated, text in ((Stated(unit="count"), "unit nanomaggy, you say count"),
            (Stated(zero_point=25.0), "zero point 22.5, you say 25"),
            (Stated(zero_point=25.0, unit="nJy"), "but that of nJy is 31.40")):
        with pytest.raises(InvalidInputError, match=text): complete_facts(header, stated)
    for cards in (dict(MAGZPT=30.0), {"HIERARCH FPA.ZP": 30.0, "EXPTIME": 1.0}):
        with pytest.raises(InvalidInputError, match="zero point 30, you say 25"):
            complete_facts(fits.Header(cards), Stated(zero_point=25.0))
    blank = fits.Header(dict(BUNIT="", MAGZERO="", SECPIX="", EXPTIME=True))
    facts = complete_facts(blank, Stated(0.3, 25.0, "count"))
    assert (facts.pixel_scale, facts.zero_point, facts.unit) == ((0.3, 0.3), 25.0, "count")
    assert math.isnan(facts.exptime)


@pytest.mark.parametrize("cards, zero_point", [
    ({"HIERARCH FPA.ZP": 25.0, "EXPTIME": 100.0}, 30.0),
    ({"HIERARCH FPA.ZP": 25.0, "EXPTIME": 100.0, "BUNIT": "count/s"}, 25.0),
    (dict(BUNIT="MJy/sr", MAGZP=20.0), math.nan), (dict(BUNIT="AB", MAGZP=20.0), math.nan),
    (dict(BUNIT="-1 Jy"), math.nan), (dict(BUNIT="nanomaggy", MAGZERO=22.5), 22.5)])
def test_zero_points(cards, zero_point):
    assert image_facts(fits.Header(cards)).zero_point == pytest.approx(zero_point, nan_ok=True)


def test_a_unit_and_a_zero_point_that_contradict_each_other():
    with pytest.raises(DamagedFileError, match="30.0 mag, and the unit nanomaggy"):
        image_facts(fits.Header(dict(BUNIT="nanomaggy", MAGZERO=30.0)))


@pytest.mark.parametrize("cards, scale", [
    (dict(CUNIT1="arcsec", CUNIT2="deg", CDELT1=-0.4, CDELT2=0.4/3600), 0.4),
    (dict(CUNIT1="", CUNIT2="DEGREES", CDELT1=-0.4/3600, CDELT2=0.4/3600), 0.4),
    (dict(PC1_1=-0.4/3600, PC2_2=0.4/3600), 0.4),
    (dict(CDELT1=-0.4/3600, CDELT2=0.4/3600, CTYPE1="ra---tan", CTYPE2="dec--tan"), 0.4),
    (dict(CDELT1=-0.4/3600, CDELT2=0.4/3600, CTYPE1="GLON-TAN", CTYPE2="GLAT-TAN"), 0.4),
    (dict(CDELT1=-0.4/3600, CDELT2=0.4/3600, CTYPE1="RA---SIN", CTYPE2="DEC--SIN"), 0.4)])
def test_pixel_scales_in_other_words(cards, scale):
    usual = dict(NAXIS=2, NAXIS1=9, NAXIS2=9, CTYPE1="RA---TAN", CTYPE2="DEC--TAN", CRVAL1=30.0,
        CRVAL2=40.0, CRPIX1=5.0, CRPIX2=5.0)
    facts = image_facts(fits.Header(usual | cards))
    assert facts.pixel_scale == pytest.approx((scale, scale), rel=1e-4)
    assert facts.rotation == pytest.approx(0, abs=0.1) or cards["CTYPE1"].startswith("GLON")


def test_the_scale_is_that_in_the_middle_of_the_image():
    "Plate carrée: a degree of right ascension is half as wide at 60 degrees."
    header = fits.Header(dict(NAXIS=2, NAXIS1=9, NAXIS2=9, CTYPE1="RA---CAR", CTYPE2="DEC--CAR",
        CRVAL1=30.0, CRVAL2=0.0, CRPIX1=5.0, CRPIX2=5 - 60*9000.0, CDELT1=-0.4/3600,
        CDELT2=0.4/3600))
    assert image_facts(header).pixel_scale == pytest.approx((0.2, 0.4), rel=1e-3)


def test_pc_counts_more_than_crota2():
    header = fits.Header(dict(CTYPE1="RA---TAN", CTYPE2="DEC--TAN", CDELT1=-1e-4, CDELT2=1e-4,
        CROTA2=0.0, PC1_1=0.0, PC1_2=1.0, PC2_1=-1.0, PC2_2=0.0))
    assert abs(image_facts(header).rotation) == pytest.approx(90)


def written(path, *hdus):
    first = [] if isinstance(hdus[0], fits.PrimaryHDU) else [fits.PrimaryHDU()]
    fits.HDUList([*first, *hdus]).writeto(path)
    return path


def test_one_file_may_hold_all_bands(tmp_path):
    pixels = [np.full((8, 9), k, np.float32) for k in range(5)]
    by_extname = written(tmp_path/"extname.fits",
        *(fits.ImageHDU(one, name=band) for one, band in zip(pixels, "grizy", strict=True)))
    headers = [fits.Header(dict(FILTER=f"{band}.00000")) for band in "grizy"]
    by_filter = written(tmp_path/"filter.fits", *map(fits.ImageHDU, pixels, headers))
    cube = written(tmp_path/"cube.fits",
        fits.PrimaryHDU(np.array(pixels), fits.Header(dict(BANDS="g,r,i,z,y"))))
    for path in (by_extname, by_filter, cube):
        assert {band: one.pixels[0, 0] for band, one in read_cutouts(path).items()} == dict(
            zip("grizy", range(5), strict=True))
    unnamed = written(tmp_path/"unnamed.fits", fits.PrimaryHDU(np.array(pixels)))
    with pytest.raises(DamagedFileError, match="a cube of 5 images, and BANDS is ''"):
        read_cutouts(unnamed)


def test_weights_and_errors_are_no_bands(tmp_path):
    r = fits.Header(dict(FILTER="r"))
    image = fits.ImageHDU(np.ones((8, 8), np.float32), r, name="SCI")
    for name in ("WHT", "r_err", "VARIANCE", "MASK", "SEGM", "SKY"):
        weights = fits.ImageHDU(np.zeros((8, 8), np.float32), r, name=name)
        path = written(tmp_path/f"{name}.fits", weights, image)
        assert read_cutout(path, "r").pixels.all()
    twice = written(tmp_path/"twice.fits", image, fits.ImageHDU(np.zeros((8, 8)), r, name="B"))
    with pytest.raises(DamagedFileError, match="two images of the band r"): read_cutouts(twice)


def test_names_of_extensions_with_more_than_a_band(tmp_path):
    images = [fits.ImageHDU(np.ones((8, 8)), name=f"{word}_{band}") for word, band in zip(
        ("SCI", "image", "flux", "data", "img"), "grizy", strict=True)]
    assert set(read_cutouts(written(tmp_path/"named.fits", *images))) == set("grizy")
    exposed = fits.ImageHDU(np.ones((8, 8)), fits.Header(dict(FILTER="g")), name="exposure_g")
    assert set(read_cutouts(written(tmp_path/"exposed.fits", exposed))) == {"g"}


def test_an_extension_inherits_what_the_first_header_says(tmp_path):
    primary = fits.PrimaryHDU()
    primary.header.update({"INSTRUME": "DECam", "FILTER": "r", "EXPTIME": 90.0,
        "HIERARCH FPA.ZP": 25.0})
    image = fits.ImageHDU(np.ones((8, 8), np.float32), fits.Header(dict(EXPTIME=30.0)))
    fits.HDUList([primary, image]).writeto(tmp_path/"mef.fits")
    facts = read_cutout(tmp_path/"mef.fits", "r").facts
    assert (facts.band, facts.telescope, facts.exptime) == ("r", "DECam", 30)
    assert facts.zero_point == pytest.approx(25 + 2.5*math.log10(30))
    with fits.open(tmp_path/"mef.fits", mode="update") as hdus:
        hdus[1].header["MAGZPT"] = 27.0
        hdus[0].header.update(CTYPE1="RA---TAN", CTYPE2="DEC--TAN", CDELT1=-1e-4, CDELT2=1e-4)
    facts = read_cutout(tmp_path/"mef.fits", "r").facts
    assert facts.zero_point == 27 and facts.pixel_scale == pytest.approx((0.36, 0.36))


def test_middles_of_images_are_compared():
    def facts(**cards):
        header = skycell_wcs(150, 2, 33).to_header()
        header.update(dict(NAXIS=2, NAXIS1=33, NAXIS2=33) | cards)
        return image_facts(header)
    assert facts().separation(facts(CRVAL2=2 + 3/3600)) == pytest.approx(3, abs=1e-6)
    # another tangent point, the same middle
    other = skycell_wcs(151, 3, 33).to_header()
    x, y = sky_to_pixel(other, 150, 2)
    moved = facts(CRVAL1=151.0, CRVAL2=3.0, CRPIX1=17 - x + 16, CRPIX2=17 - y + 16)
    assert facts().separation(moved) == pytest.approx(0, abs=1e-3)
    carree = dict(CTYPE1="RA---CAR", CTYPE2="DEC--CAR", CRVAL2=0.0, CRPIX2=17 - 2*14400.0)
    assert facts().separation(facts(**carree)) == pytest.approx(0, abs=0.01)
    for cards in (dict(CRVAL1="10:00:00"), dict(CTYPE1="LINEAR")):
        assert math.isnan(facts().separation(facts(**cards)))



def test_numbers_that_stand_for_none_are_masked(tmp_path):
    pixels = np.ones((4, 4), np.float32)
    pixels[0] = [np.nan, np.inf, -1e30, 3.4e38]
    cutout = read_cutout(written(tmp_path/"r.fits", fits.PrimaryHDU(pixels)), "r")
    assert cutout.mask.sum() == 4 and not cutout.pixels[0].any()


def test_axes_of_one_pixel_and_names_of_planes(tmp_path):
    flat = written(tmp_path/"flat.fits", fits.PrimaryHDU(np.ones((1, 1, 8, 8), np.float32)))
    assert read_cutout(flat, "g").pixels.shape == (8, 8)
    cube = np.ones((3, 8, 8), np.float32)
    for k, names in enumerate(("g r z", "g, r, z", "GRZ")):
        path = written(tmp_path/f"{k}.fits", fits.PrimaryHDU(cube, fits.Header(dict(BANDS=names))))
        assert set(read_cutouts(path)) == set("grz")


def test_a_foreign_filter_is_not_taken_for_a_band(tmp_path):
    image = fits.PrimaryHDU(np.ones((8, 8), np.float32), fits.Header(dict(FILTER="R")))
    path = written(tmp_path/"r.fits", image)
    with pytest.raises(DamagedFileError, match="holds the R band by its header, not r"):
        read_cutout(path, "r")


def test_a_stack_and_an_image_of_unknown_exposure(tmp_path):
    counts = np.random.default_rng(0).normal(0, 10, (64, 64))
    counts[:3] = np.nan
    (tmp_path/"stack.fits").write_bytes(
        skycell_bytes(counts, skycell_wcs(180, 30, 64), "i", 700.0, noise=10.0))
    cutout = read_cutout(tmp_path/"stack.fits", "i")
    assert cutout.facts.telescope == "PS1" and not differences(cutout.facts, PS1)
    assert cutout.mask.sum() == 3*64 and not cutout.pixels[:3].any()
    np.testing.assert_allclose(cutout.pixels[3:], counts[3:], atol=1)
    np.testing.assert_allclose(cutout.to_njy(PS1), cutout.pixels*(363.1/700), rtol=1e-5)

    silent = read_cutout(written(tmp_path/"silent.fits", fits.PrimaryHDU(np.ones((8, 8)))), "g")
    np.testing.assert_allclose(silent.to_njy(LEGACY), 3631, rtol=1e-5)
    with pytest.raises(DamagedFileError, match="no exposure time in EXPTIME"): silent.to_njy(PS1)


@pytest.mark.parametrize("card", ["BUNIT   = 'nJy", "BANDS   = grizy", "EXPTIME = '1e3",
    "CDELT1  = 'x", "FILTER  = = ="])
def test_cards_that_cannot_be_parsed(tmp_path, card):
    header = fits.Header(dict(BUNIT="nJy", BANDS="grizy", EXPTIME=1e3, FILTER="g", CDELT1=1.0,
        CTYPE1="RA---TAN", CTYPE2="DEC--TAN"))
    stream = io.BytesIO()
    fits.PrimaryHDU(np.ones((5, 8, 8), np.float32), header).writeto(stream)
    content = stream.getvalue()
    at = content.index(card[:9].encode())
    (tmp_path/"cube.fits").write_bytes(content[:at] + card.ljust(80).encode() + content[at + 80:])
    with pytest.raises(DamagedFileError): read_cutouts(tmp_path/"cube.fits")


def test_real_cutouts_say_what_they_are(real_data):
    for band in "griz":
        facts = read_cutout(real_data/f"ps1/{band}.fits", band).facts
        assert facts.band == band and facts.exptime > 700 and not facts.unstated()
        assert differences(facts, PS1) == []
    facts = read_cutout(real_data/"sdss_images/g.fits", "g").facts
    assert (facts.unit, facts.zero_point, round(facts.rotation)) == ("nanomaggy", 22.5, -90)
    assert len(differences(facts, PS1)) == 4
