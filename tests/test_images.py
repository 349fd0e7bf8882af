"Packing of cutouts: interrupted, damaged and foreign input; transforms of any number of bands."
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from astropy.io import fits

from specpred import images
from specpred.config import DamagedFileError, InvalidInputError, MissingInputError, SpecpredError
from specpred.images import check_images, open_images, pack_arrays, pack_images
from specpred.surveys import LEGACY, PS1, RUBIN, SDSS
from specpred.training import GalaxyImage

TWO_BANDS = LEGACY.__class__("two bands", ("F115W", "F200W"), 0.03, 31.4, "nJy", (28., 28.),
    (.04, .06), "jwst")


def write_cutouts(folder, n, survey=PS1, size=16):
    rng = np.random.default_rng(0)
    for k in range(n):
        (folder/str(k)).mkdir(parents=True)
        for band in survey.bands:
            header = fits.Header({"EXPTIME": 100., "FILTER": f"{band}.00000"})
            pixels = rng.normal(size=(size, size)).astype("f4")
            fits.writeto(folder/str(k)/f"{band}.fits", pixels, header)


def pack(folder, n, store, size=12, **options):
    return pack_images(np.arange(n), folder, store, size=size, n_jobs=1, progress=False, **options)


def some_flux(n, survey=PS1, size=12, seed=1):
    shape = (n, len(survey.bands), size, size)
    return np.random.default_rng(seed).normal(100, 30, shape).astype("f4")


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def interrupt(monkeypatch):
    "Runs a packing that is interrupted when it has written its first 16 galaxies."
    monkeypatch.setattr(images, "BLOCK", 16)
    def run(packing):
        calls, write_table = [], images._write_table
        def interrupted(*arguments):
            if calls: raise KeyboardInterrupt
            calls.append(write_table(*arguments))
        with monkeypatch.context() as patch:
            patch.setattr(images, "_write_table", interrupted)
            with pytest.raises(KeyboardInterrupt): packing()
    return run


def test_an_interrupted_packing_goes_on(tmp_path, interrupt):
    "What is usable is kept; a cutout that arrived meanwhile is taken."
    write_cutouts(tmp_path/"raw", 40)
    pack(tmp_path/"raw", 40, tmp_path/"whole")
    (tmp_path/"raw/3/g.fits").rename(tmp_path/"late.fits")
    interrupt(lambda: pack(tmp_path/"raw", 40, tmp_path/"cut"))
    assert not (tmp_path/"cut").exists()

    (tmp_path/"late.fits").rename(tmp_path/"raw/3/g.fits")
    for k in (0, 15): shutil.rmtree(tmp_path/f"raw/{k}")  # read before the interruption
    assert pack(tmp_path/"raw", 40, tmp_path/"cut") == {}
    assert contents(tmp_path/"whole") == contents(tmp_path/"cut")


def test_another_request_begins_anew(tmp_path, interrupt):
    for folder in ("raw", "other"): write_cutouts(tmp_path/folder, 20)
    for k in range(20): fits.setval(tmp_path/f"other/{k}/r.fits", "EXPTIME", value=50.)
    interrupt(lambda: pack(tmp_path/"raw", 20, tmp_path/"a"))
    pack(tmp_path/"other", 20, tmp_path/"a")
    assert (open_images(tmp_path/"a").exptime[:, 1] == 50).all()
    interrupt(lambda: pack(tmp_path/"raw", 20, tmp_path/"a"))
    pack(tmp_path/"raw", 20, tmp_path/"a", size=8)
    assert open_images(tmp_path/"a").shape == (20, 5, 8, 8)

    flux = some_flux(20)
    interrupt(lambda: pack_arrays(np.arange(20), flux, tmp_path/"b"))
    pack_arrays(np.arange(20), flux + 1000, tmp_path/"b")
    np.testing.assert_allclose(open_images(tmp_path/"b").read(range(20)), flux + 1000, rtol=1e-3)


def test_a_store_does_not_depend_on_where_it_was_made(tmp_path):
    for folder in ("a", "b"):
        write_cutouts(tmp_path/folder/"raw", 3)
        pack(tmp_path/folder/"raw", 3, tmp_path/folder/"images")
    assert contents(tmp_path/"a/images") == contents(tmp_path/"b/images")


def rewrite(path, pixels, **cards):
    fits.writeto(path, pixels.astype("f4"), fits.Header({"EXPTIME": 1.} | cards), overwrite=True)


@pytest.mark.parametrize("spoil, problem", [
    (lambda p: p.write_bytes(p.read_bytes()[:3000]), "damaged file: "),
    (lambda p: rewrite(p, np.zeros((16, 16)), EXPTIME=-1.), "no exposure time"),
    (lambda p: rewrite(p, np.full((16, 16), np.nan)), "no finite pixel"),
    (lambda p: [rewrite(file, np.zeros((8, 8))) for file in p.parent.iterdir()],
        "an image of 8 x 8 pixels cannot be cropped"),
    (lambda p: rewrite(p, np.zeros((20, 20))), "different shapes"),
    (lambda p: rewrite(p, np.zeros((16, 16)), FILTER="z.00000"), "holds the z band"),
    (lambda p: rewrite(p, np.where(np.arange(16) < 5, np.nan, np.ones((16, 16)))), "masked: 25%"),
    (lambda p: p.unlink(), "missing file: ")])
def test_a_bad_galaxy_is_named_and_the_others_are_used(tmp_path, spoil, problem):
    write_cutouts(tmp_path/"raw", 3)
    spoil(tmp_path/"raw/1/r.fits")
    problems = pack(tmp_path/"raw", 3, tmp_path/"a")
    assert list(problems) == ["1"] and problem in problems["1"]
    store = open_images(tmp_path/"a")
    assert store.usable.tolist() == [True, False, True]
    assert store.read([1]).any() == ("masked" in problem)
    check_images(tmp_path/"a")


@pytest.fixture
def store(tmp_path):
    "Path of a store of 40 galaxies."
    pack_arrays(np.arange(40), some_flux(40), tmp_path/"a")
    return tmp_path/"a"


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 8
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [
    lambda store: (store/"flux.npy").unlink(),
    lambda store: (store/"galaxies.parquet").unlink(),
    lambda store: (store/"flux.npy").write_bytes((store/"flux.npy").read_bytes()[:-50]),
    lambda store: (store/"flux.npy").write_bytes(b""),
    lambda store: np.save(store/"flux.npy", np.zeros((39, 5, 12, 12), "f2")),
    lambda store: np.save(store/"flux.npy", np.array([{}])),  # would be unpickled
    lambda store: (store/"galaxies.parquet").write_bytes(b"PAR1"),
    lambda store: flip_bit(store/"galaxies.parquet", 300)])
def test_what_is_not_whole_is_refused(store, spoil):
    spoil(store)
    with pytest.raises(DamagedFileError, match="delete it and run 15_images again"):
        open_images(store)


def test_where_there_is_no_store(tmp_path):
    with pytest.raises(MissingInputError, match="15_images makes it"): open_images(tmp_path/"none")
    with pytest.raises(DamagedFileError, match="run 15_images again"): open_images(tmp_path)


def test_changed_pixels_are_found(store):
    check_images(store)
    flip_bit(store/"flux.npy", -1)
    with pytest.raises(DamagedFileError, match=r"1 galaxies .*specobjid \[39\]; delete the store"):
        check_images(store)


def test_pickles_do_not_carry_the_images(store):
    opened = open_images(store)
    content = pickle.dumps(opened)
    assert len(content) < 500
    np.testing.assert_array_equal(pickle.loads(content).read([7]), opened.read([7]))


@pytest.mark.parametrize("survey", [PS1, SDSS, LEGACY, RUBIN, TWO_BANDS], ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_any_survey_comes_back(tmp_path, survey, dtype):
    flux = some_flux(9, survey)
    assert pack_arrays(np.arange(9), flux, tmp_path/"a", survey, dtype=dtype) == {}
    opened = open_images(tmp_path/"a")
    assert opened.survey == survey and opened.bands == survey.bands
    assert opened.pixels.dtype == dtype and opened.noise.shape == (9, len(survey.bands))
    order, tolerance = [8, 0, 3, 3, 5], dict(float16=1e-3, float32=0)[dtype]
    np.testing.assert_allclose(opened.read(order), flux[order], rtol=tolerance)
    batches = list(opened.batches(order, 2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(batches), opened.read_rows(order))
    np.testing.assert_array_equal(np.load(tmp_path/"a/flux.npy"), opened.pixels)


def test_cutouts_of_another_survey(tmp_path):
    write_cutouts(tmp_path/"raw", 2, RUBIN)
    assert pack(tmp_path/"raw", 2, tmp_path/"a", survey=RUBIN) == {}
    pixels = fits.getdata(tmp_path/"raw/1/u.fits")[2:-2, 2:-2]  # nJy
    np.testing.assert_allclose(open_images(tmp_path/"a").read([1])[0, 0], pixels, atol=1e-3)


def test_rows_that_are_not_there(store):
    opened = open_images(store)
    for rows in ([-1], [40], [.5], np.ones(40, bool), [[1, 2]]):
        with pytest.raises(InvalidInputError, match="rows"): opened.read_rows(rows)
    assert opened.read_rows([]).shape == (0, 5, 12, 12)


def test_half_precision_keeps_faint_sky_and_saturated_stars(tmp_path):
    sigma = np.reshape([.01, 1, 50, 1e5, 1e-4], (-1, 1, 1))
    flux = np.random.default_rng(0).normal(0, sigma, (2, 5, 40, 40)).astype("f4")
    flux[1, :, 20, 20] = 1e9
    pack_arrays([1, 2], flux, tmp_path/"a")
    opened = open_images(tmp_path/"a")
    assert np.isfinite(opened.read([1, 2])).all()
    sky = np.abs(opened.read([1])[0] - flux[0])/opened.noise[0][:, None, None]
    assert np.sqrt((sky**2).mean()) < 5e-4
    np.testing.assert_allclose(opened.read([2])[0, :, 20, 20], 1e9, rtol=1e-3)


def test_pixels_without_data_do_not_count_as_sky(tmp_path):
    sky = np.random.default_rng(0).normal(50, 10, (2, 5, 64, 64))
    sky[1, :, :12] = np.nan
    pack_arrays([0, 1], sky, tmp_path/"a")
    opened = open_images(tmp_path/"a")
    np.testing.assert_allclose(opened.sky, 50, atol=2)
    np.testing.assert_allclose(opened.noise, 10, rtol=.15)


def test_arrays_that_cannot_be_packed(tmp_path, monkeypatch):
    flux = some_flux(3)
    for wrong in (flux[:, :4], flux[0], flux[:2], flux[..., :10]):
        with pytest.raises(InvalidInputError, match="expected images"):
            pack_arrays(range(3), wrong, tmp_path/"a")
    for ids in ([-1, 1, 2], [.5, 1, 2], [[1, 2, 3]]):
        with pytest.raises(InvalidInputError, match="whole numbers from 0"):
            pack_arrays(ids, flux, tmp_path/"a")
    for options in (dict(dtype="int8"), dict(max_mask_fraction=7)):
        with pytest.raises(InvalidInputError): pack_arrays(range(3), flux, tmp_path/"a", **options)
    with pytest.raises(InvalidInputError, match="listed twice"):
        pack_arrays([1, 1, 2], flux, tmp_path/"a")
    with pytest.raises(InvalidInputError, match="no galaxy has images in all bands"):
        pack_images([], tmp_path, tmp_path/"a")

    flux[1, 4] = np.nan
    problems = pack_arrays(range(3), flux, tmp_path/"a")
    assert problems == {"1": "masked: 100% of a band or of its core"}

    monkeypatch.setattr(images.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(SpecpredError, match="has room for 0.0 GB"):
        pack_arrays(range(3), flux, tmp_path/"b")


@pytest.mark.parametrize("survey", [PS1, SDSS, LEGACY, RUBIN, TWO_BANDS], ids=lambda s: s.name)
def test_light_in_one_band_shows_in_its_colour(survey):
    "i, r and g as red, green and blue, where the survey has them."
    colours = dict(zip("irg", range(3), strict=True)) if "i" in survey.bands else dict(F115W=2)
    for band, channel in colours.items():
        one_band = torch.zeros(len(survey.bands), 8, 8)
        one_band[survey.bands.index(band)] = 1e4
        image = GalaxyImage(one_band, bands=survey.bands)
        assert images.composite(image, image.bands)[4, 4].argmax() == channel
    with pytest.raises(InvalidInputError, match="needs an image"):
        images.composite(one_band[:-1], survey.bands)


@pytest.mark.parametrize("stretch", ["linear", "asinh", "image"])
@pytest.mark.parametrize("survey", [PS1, RUBIN, TWO_BANDS], ids=lambda s: s.name)
def test_transforms_of_any_number_of_bands(survey, stretch):
    flux = some_flux(8, survey)
    transform = images.fit_transform(flux, np.ones(flux.shape[:2]), stretch)
    values = transform(flux)
    np.testing.assert_allclose(values.mean((0, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(values.std((0, 2, 3)), 1, atol=1e-3)
    np.testing.assert_allclose(transform(torch.tensor(flux)).numpy(), values, atol=1e-4)
    back = transform.inverse(values)
    if stretch == "image":  # brightness is gone
        np.testing.assert_allclose(transform(3*flux), values, atol=1e-4)
        assert np.isfinite(transform(0*flux)).all()
    else: np.testing.assert_allclose(back, flux, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(transform.inverse(torch.tensor(values)).numpy(), back, rtol=1e-4)
    for kind in (np.asarray, torch.tensor):
        with pytest.raises(InvalidInputError, match="floating-point"):
            transform(kind(flux.astype(int)))
        with pytest.raises(InvalidInputError, match="bands in axis -3"):
            transform(kind(flux[:, :1]))


@pytest.mark.parametrize("arguments, match", [
    (dict(noise=np.zeros((8, 5))), "softening"), (dict(noise=np.ones(5)), "fitted on"),
    (dict(factor=-1.), "softening"), (dict(flux=np.zeros((0, 5, 12, 12))), "fitted on"),
    (dict(flux=np.full((2, 5, 12, 12), np.nan)), "finite"),
    (dict(flux=np.ones((2, 5, 12, 12))), "std"), (dict(stretch="bogus"), "stretch")])
def test_transforms_that_cannot_be_fitted(arguments, match):
    with pytest.raises(InvalidInputError, match=match):
        images.fit_transform(**dict(flux=some_flux(8), noise=np.ones((8, 5))) | arguments)


def test_transforms_and_augmentations_that_cannot_be():
    ones, zeros = (1., 1.), (0., 0.)
    valid = dict(stretch="asinh", softening=ones, mean=zeros, std=ones)
    images.ImageTransform(**valid)
    for wrong in (dict(stretch="bogus"), dict(softening=zeros), dict(std=zeros), dict(mean=(1.,)),
            dict(mean=(np.nan, 0.)), dict(softening=(), mean=(), std=())):
        with pytest.raises(InvalidInputError): images.ImageTransform(**valid | wrong)
    for wrong in (dict(max_shift=-1), dict(max_shift=.5), dict(p_rotate=7), dict(max_rotate=-1.)):
        with pytest.raises(InvalidInputError): images.Augmentation(**wrong)
    with pytest.raises(InvalidInputError, match="cannot be moved by 12"):
        images.shift(torch.zeros(5, 12, 12), 12, 0)


@pytest.mark.parametrize("cards, problem", [
    (dict(BUNIT="nanomaggy"), "unit nanomaggy, not count"),
    (dict(TELESCOP="SDSS 2.5-M"), "taken by 'SDSS 2.5-M', not Pan-STARRS1"),
    (dict(PIXSCALE=0.396), "pixels of 0.396 x 0.396 arcsec, not 0.25")])
def test_images_of_another_survey_are_not_packed(tmp_path, cards, problem):
    write_cutouts(tmp_path/"raw", 3)
    rewrite(tmp_path/"raw/1/r.fits", np.ones((16, 16)), **cards)
    problems = pack(tmp_path/"raw", 3, tmp_path/"a")
    assert list(problems) == ["1"] and problem in problems["1"]


def test_a_galaxy_without_its_core_is_not_packed(tmp_path):
    flux = np.ones((2, 5, 64, 64))
    flux[1, 2, 28:36, 28:36] = np.nan  # 1.6 % of a band
    problems = pack_arrays([0, 1], flux, tmp_path/"a")
    assert list(problems) == ["1"] and "of its core" in problems["1"]
