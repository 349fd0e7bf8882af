"specpred.predict and its command: which images are predicted, and what is said of the others."
import gzip
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Table
from typer.testing import CliRunner

import specpred
from specpred import cli, models
from specpred.calibration import Bands, bands_of_draws
from specpred.cli import app
from specpred.config import (
    ArchiveParameters, DamagedFileError, InvalidInputError, MissingInputError, Paths, SpecpredError,
    WeightsError, data_file)
from specpred.cutouts import Stated, skycell_wcs
from specpred.formats import SDSSSpectrum, sdss_spectrum_bytes
from specpred.images import open_images, pack_arrays
from specpred.inputs import (
    coordinate_names, fetch_cutouts, find_galaxies, name_galaxies, read_image, write_cube,
    write_cubes)
from specpred.local_archive import serve
from specpred.predict import (
    PRETRAINED, GalaxiesFailed, Predictor, compare, example_galaxies, follow_bands, predict_files)
from specpred.surveys import PS1, SDSS
from specpred.vae import InfoVAE, SpectrumModel
from specpred.weights import read_weights

SIZE = 32
pytestmark = pytest.mark.usefixtures("any_colours")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    "A small untrained network and a decoder, saved as a profile's."
    import torch
    torch.manual_seed(0)
    paths = Paths(tmp_path_factory.mktemp("trained")/"demo")
    n = len(PS1.bands)
    provenance = dict(image_size=SIZE, seed=1, stretch="asinh", softening=(100.,)*n,
        residual_covariance=(0.5*np.eye(6)).tolist(), residual_mean=[0.]*6, max_mask_fraction=0.2)
    arguments = dict(c_in=n, n_out=6)
    models.save(models.MODELS["conv3"](**arguments), paths.weights("conv3", 0), name="conv3",
        arguments=arguments, image_stats=((0.5,)*n, (1.,)*n), target_stats=((0.,)*6, (1.,)*6),
        survey=PS1, channels=PS1.bands, provenance=provenance)
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(10, 6)))[0].T
    SpectrumModel(InfoVAE(60, hidden=(40, 20)).eval(), wavelength=10**np.linspace(3.53, 3.9, 60),
        mean=np.full(60, 0.13), components=axes, centre=np.zeros(10), target_mean=np.zeros(6),
        target_std=np.ones(6)).save(paths.vae)
    pd.DataFrame(dict(rmse=[1.])).to_csv(paths.history("conv3", 0), index=False)
    return paths


@pytest.fixture(scope="module")
def predictor(paths): return Predictor.of_run(paths)


def example_flux(size=40):
    "A galaxy with noise in five bands, nJy."
    rows, columns = np.indices((size, size)) - (size - 1)/2
    galaxy = 5e4*np.exp(-np.hypot(rows, columns)/3)
    return galaxy + np.random.default_rng(0).normal(0, 50, (5, size, size))


def write_bands(folder, flux, exptime=700., scale=0.25, bands="grizy", **cards):
    "PS1's cutouts, changed by cards; those of None are left out."
    folder.mkdir(parents=True, exist_ok=True)
    for band, image in zip(bands, flux, strict=False):
        header = skycell_wcs(180, 30, image.shape[-1], scale).to_header()
        header.update({"EXPTIME": exptime, "HIERARCH FPA.FILTERID": f"{band}.00000",
            "HIERARCH FPA.TELESCOPE": "PS1", "HIERARCH FPA.ZP": 25.0})
        for name, value in cards.items():
            if value is None: header.remove(name, ignore_missing=True)
            else: header[name] = value
        counts = np.asarray(image*exptime/363.1, np.float32)
        fits.writeto(folder/f"{band}.fits", counts, header, overwrite=True)
    return folder


def quietly(*args, **kwargs):
    "The result, and the texts of warnings."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = predict_files(*args, **kwargs)
    return result, [str(one.message) for one in caught if one.category is UserWarning]


def test_a_sound_folder_is_predicted_without_a_warning(predictor, tmp_path):
    galaxy = write_bands(tmp_path/"ngc", example_flux())
    written, texts = quietly([galaxy], predictor, tmp_path/"out")
    assert [path.name for path in written] == ["ngc.ecsv", "ngc.png", "summary.csv"] and not texts
    (row,) = pd.read_csv(written[-1]).to_dict("records")
    assert (row["galaxy"], row["status"], row["mask_fraction"]) == ("ngc", "predicted", 0)


SDSS_CARDS = {"FPA.TELESCOPE": None, "FPA.ZP": None, "FPA.FILTERID": None, "EXPTIME": "53.9",
    "ORIGIN": "SDSS", "BUNIT": "nanomaggy"}


@pytest.mark.parametrize("scale, cards, said", [
    (0.396, SDSS_CARDS, "taken by 'SDSS', not Pan-STARRS1; pixels of 0.396 x 0.396 arcsec, not"),
    (0.263, {"FPA.TELESCOPE": "DECam", "BUNIT": "electron"}, "taken by 'DECam'"),
    (0.396, {}, "pixels of 0.396 x 0.396 arcsec, not 0.25"),
    (0.25, {"BUNIT": "nanomaggy"}, "unit nanomaggy, not count"),
    (0.25, {"FPA.ZP": 27.0}, "zero point 34.11 mag, not 32.11"),
    (0.25, {"CDELT1": 0.25/3600}, "east to the right of north, not to the left"),
    (0.25, {"PC1_1": 0.0, "PC1_2": 1.0, "PC2_1": -1.0, "PC2_2": 0.0}, "north 90 degrees from up")])
def test_images_of_another_kind_are_refused_with_both_values(
    predictor, tmp_path, scale, cards, said):
    galaxy = write_bands(tmp_path/"ngc", example_flux(), scale=scale, **cards)
    with pytest.raises(InvalidInputError, match=said):
        predict_files([galaxy], predictor, tmp_path/"out")
    (row,) = pd.read_csv(tmp_path/"out/summary.csv").to_dict("records")
    assert row["status"] == "failed" and said in row["reason"]
    assert not list((tmp_path/"out").glob("*.ecsv"))


def test_a_wrong_or_missing_band_is_an_error(predictor, tmp_path):
    swapped = write_bands(tmp_path/"swapped", example_flux(), bands="girzy")
    (swapped/"r.fits").rename(swapped/"i.fits")
    with pytest.raises(SpecpredError, match="i.fits holds the r band by its header, not i"):
        predict_files([swapped], predictor, tmp_path/"out")
    sdss = write_bands(tmp_path/"sdss", example_flux()[:4], **SDSS_CARDS)
    for resample, said in ((False, "taken by 'SDSS'"), (True, "no image in y; SDSS has no y")):
        with pytest.raises(InvalidInputError, match=said):
            predict_files([sdss], predictor, tmp_path/"out", resample=resample)
    ps1 = write_bands(tmp_path/"ps1", example_flux()[:4])
    with pytest.raises(InvalidInputError, match="ps1: no image in y$"):
        predict_files([ps1], predictor, tmp_path/"out")


def test_resampled_images_give_what_the_survey_s_own_would(predictor, tmp_path):
    model = predictor.model
    direct = write_bands(tmp_path/"direct", example_flux(size=64))
    rubin = {"FPA.TELESCOPE": None, "TELESCOP": "Rubin", "BUNIT": "nJy", "FPA.ZP": None}
    rows, columns = np.indices((100, 100)) - 49.5
    flux = np.repeat(5e4*0.64*np.exp(-np.hypot(rows, columns)/3*0.8)[None], 5, axis=0)
    other = write_bands(tmp_path/"other", flux*363.1/700, scale=0.2, **rubin)
    files = [sorted(folder.iterdir()) for folder in (direct, other)]
    ours, theirs = read_image(files[0], model), read_image(files[1], model, resample=True)
    np.testing.assert_allclose(theirs.flux[:, 10:22, 10:22].sum((1, 2)),
        ours.flux[:, 10:22, 10:22].sum((1, 2)), rtol=0.01)
    assert "no colour terms from Rubin to Pan-STARRS1" in theirs.notes
    with pytest.raises(InvalidInputError, match="taken by 'Rubin'"): read_image(files[1], model)


def test_what_a_header_does_not_say_is_a_warning_or_said_by_the_user(predictor, tmp_path):
    silent = tmp_path/"silent"
    silent.mkdir()
    for band, image in zip("grizy", example_flux(), strict=True):
        fits.writeto(silent/f"{band}.fits", np.float32(image))
    with pytest.raises(SpecpredError, match="no exposure time .* --unit and --zero-point"):
        predict_files([silent], predictor, tmp_path/"out")
    _, texts = quietly([silent], predictor, tmp_path/"out", stated=Stated(zero_point=31.4))
    assert texts == ["silent: the headers say nothing of pixel scale, telescope: taken for "
        "Pan-STARRS1's"]
    _, texts = quietly([silent], predictor, tmp_path/"out", stated=Stated(0.25, unit="nJy"))
    assert texts == ["silent: the headers say nothing of telescope: taken for Pan-STARRS1's"]
    with pytest.raises(InvalidInputError, match="pixels of 0.4 x 0.4 arcsec, not 0.25"):
        predict_files([silent], predictor, tmp_path/"out", stated=Stated(0.4, unit="nJy"))


@pytest.mark.parametrize("hole, refused", [
    (np.s_[:, :, 20:], True), (np.s_[2, 16:24, 16:24], True), (np.s_[1, 4:12, 4:12], False)])
def test_masked_pixels_are_said_and_limited(predictor, tmp_path, hole, refused):
    "Half of the image and the nucleus are too much; a corner is a warning and a column."
    flux = example_flux()
    flux[hole] = np.nan
    galaxy = write_bands(tmp_path/"ngc", flux)
    if refused:
        with pytest.raises(InvalidInputError, match="of a band or of its core has no data"):
            predict_files([galaxy], predictor, tmp_path/"out")
        return
    written, texts = quietly([galaxy], predictor, tmp_path/"out")
    assert texts == ["ngc: some pixels have no data, see mask_fraction"]
    (row,) = pd.read_csv(written[-1]).to_dict("records")
    assert row["status"] == "flagged"
    assert row["mask_fraction"] == pytest.approx(64/SIZE**2, abs=1e-3)


@pytest.mark.parametrize("image", [np.zeros((5, 40, 40)), np.full((5, 40, 40), 300.),
    np.random.default_rng(0).normal(0, 50, (5, 40, 40)), np.tile(np.arange(40.), (5, 40, 1))])
def test_an_image_that_shows_nothing_is_an_error(predictor, tmp_path, image):
    with pytest.raises(InvalidInputError, match="no source in the middle|in g is constant"):
        predict_files([write_bands(tmp_path/"ngc", image)], predictor, tmp_path/"out")


def test_a_band_that_is_blank_or_of_another_place_is_an_error(predictor, tmp_path):
    blank = example_flux()
    blank[2] = 0
    with pytest.raises(InvalidInputError, match="the image in i is constant"):
        predict_files([write_bands(tmp_path/"blank", blank)], predictor, tmp_path/"out")
    mixed = write_bands(tmp_path/"mixed", example_flux())
    with fits.open(mixed/"r.fits", mode="update") as hdus: hdus[0].header["CRVAL2"] += 4/3600
    with pytest.raises(InvalidInputError, match="the image in r shows a place 4.0 arcsec from"):
        predict_files([mixed], predictor, tmp_path/"out")


def test_odd_pixels_are_noted(predictor, tmp_path):
    flux = example_flux()
    flux[0, :, :8] = 0
    flux[3] += 1000
    _, texts = quietly([write_bands(tmp_path/"ngc", flux)], predictor, tmp_path/"out")
    assert "20% of the image in g has the value 0: are these data?" in texts[0]
    assert "the border of the image in z is" in texts[0] and "sky subtracted" in texts[0]


def test_odd_pixels_are_noted_in_images_of_other_surveys(predictor, tmp_path):
    flux = example_flux(size=60)
    flux[0, :, :20] = 0
    flux[1] *= 1e5
    rubin = {"FPA.TELESCOPE": None, "TELESCOP": "Rubin", "BUNIT": "nJy", "FPA.ZP": None}
    galaxy = write_bands(tmp_path/"ngc", flux - 9000*(np.arange(5) == 3)[:, None, None], **rubin)
    _, texts = quietly([galaxy], predictor, tmp_path/"out", resample=True)
    for said in ("33% of the image in g has the value 0", "the border of the image in z is at -",
            "the magnitude in r is"):
        assert said in texts[0]


def test_a_galaxy_that_cannot_be_read_does_not_stop_the_others(predictor, tmp_path):
    sound = write_bands(tmp_path/"sound", example_flux())
    odd = write_bands(tmp_path/"odd", example_flux(), CRVAL1="10:00:00.0", CRPIX2="x")
    bad = write_bands(tmp_path/"bad", example_flux(), CD1_1="x", CUNIT1="furlong")
    with pytest.raises(SpecpredError, match="bad: .*2 others are in"):
        predict_files([bad, odd, sound], predictor, tmp_path/"out")
    assert (tmp_path/"out/sound.ecsv").is_file() and (tmp_path/"out/odd.ecsv").is_file()


def test_folders_that_hold_something_else(predictor, tmp_path):
    folder = tmp_path/"folder"
    folder.mkdir()
    (folder/"cutout_g.txt").write_text("")
    with pytest.raises(MissingInputError, match="holds no g.fits and so on; it holds cutout_g.txt"):
        predict_files([folder], predictor, tmp_path/"out")
    sound = write_bands(tmp_path/"NGC1", example_flux())
    (sound/"g").mkdir()
    (sound/"r.txt").write_text("notes")
    written, _ = quietly([sound], predictor, tmp_path/"out")
    assert written[0].name == "NGC1.ecsv"
    (sound/"g.fits.gz").write_bytes(gzip.compress((sound/"g.fits").read_bytes()))
    with pytest.raises(InvalidInputError, match="two images of the band 'g'"):
        predict_files([sound], predictor, tmp_path/"out")


@pytest.mark.parametrize("content", ["name,x\n1,2\n", ""])
def test_another_summary_is_not_overwritten(predictor, tmp_path, content):
    (tmp_path/"summary.csv").write_text(content)
    galaxy = write_bands(tmp_path/"ngc", example_flux())
    with pytest.raises(InvalidInputError, match="is no summary of predictions"):
        predict_files([galaxy], predictor, tmp_path)
    assert (tmp_path/"summary.csv").read_text() == content


def test_a_summary_keeps_earlier_galaxies(predictor, tmp_path):
    for name in ("001", "ngc", "001"):
        quietly([write_bands(tmp_path/name, example_flux())], predictor, tmp_path/"out")
    table = pd.read_csv(tmp_path/"out/summary.csv", dtype=str)
    assert sorted(table.galaxy) == ["001", "ngc"]


def test_a_band_that_the_survey_s_seeing_is_not_known_for(predictor, tmp_path):
    "DES has a Y that the Legacy Surveys have not."
    cards = {"FPA.TELESCOPE": None, "FPA.ZP": None, "FPA.FILTERID": None, "TELESCOP": "DECam",
        "MAGZERO": 30.0}
    galaxy = write_bands(tmp_path/"des", example_flux(), **cards)
    _, texts = quietly([galaxy], predictor, tmp_path/"out", resample=True)
    assert "the seeing of Legacy Surveys in y is unknown" in texts[0]


def test_forms_in_which_a_galaxy_may_come(predictor, tmp_path):
    "A folder, packed files, five files, five extensions and a cube give the same spectrum."
    folder = write_bands(tmp_path/"folder", example_flux())
    packed = write_bands(tmp_path/"packed", example_flux())
    for path in list(packed.iterdir()):
        (packed/f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    loose = write_bands(tmp_path/"loose", example_flux())
    hdus = [fits.PrimaryHDU()]
    for band in "grizy":
        pixels, header = fits.getdata(folder/f"{band}.fits", header=True)
        header.remove("FPA.FILTERID")
        hdus.append(fits.ImageHDU(pixels, header, name=band))
    fits.HDUList(hdus).writeto(tmp_path/"extensions.fits")
    write_cube(tmp_path/"cube.fits", example_flux(), PS1)
    given = [folder, packed, *loose.iterdir(), tmp_path/"extensions.fits", tmp_path/"cube.fits"]
    written, texts = quietly(given, predictor, tmp_path/"out")
    tables = [path for path in written if path.suffix == ".ecsv"]
    assert {path.stem for path in tables} == {"folder", "packed", "loose", "extensions", "cube"}
    first, *others = (np.array(Table.read(path)["flux"]) for path in tables)
    for other in others: np.testing.assert_allclose(other, first, rtol=1e-3)
    assert not texts
    with pytest.raises(MissingInputError):
        predict_files([tmp_path/"none"], predictor, tmp_path/"out")


INSTALLED_ANYWHERE = """
import sys, warnings
warnings.simplefilter("ignore")
import specpred, specpred.config
assert specpred.__file__.startswith(sys.argv[1]), specpred.__file__
try: specpred.config.repo_root()
except specpred.config.MissingInputError: pass
else: raise AssertionError("this is a checkout")
from specpred.predict import Predictor, example_galaxies, predict_files
slow_to_import = {"fastai", "galsim", "papermill", "sklearn"} & set(sys.modules)
assert not slow_to_import, slow_to_import
predict_files(example_galaxies(), Predictor.load(), sys.argv[2], plot=False)
"""


def test_the_package_alone_predicts_its_examples(tmp_path):
    "Away from the checkout, as pip installs it; the numbers are those of the checkout."
    package = Path(specpred.__file__).parent
    shutil.copytree(package, tmp_path/"site/specpred", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path/"site/specpred/data").mkdir()
    shutil.copy(data_file("stellar_library.h5"), tmp_path/"site/specpred/data")
    done = subprocess.run([sys.executable, "-c", INSTALLED_ANYWHERE, str(tmp_path/"site"),
        str(tmp_path/"out")], cwd=tmp_path/"site", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    predict_files(example_galaxies(), Predictor.load(), tmp_path/"here", plot=False)
    for name in ("quiescent", "star-forming"):
        there, here = (Table.read(tmp_path/where/f"{name}.ecsv") for where in ("out", "here"))
        np.testing.assert_allclose(there["flux"], here["flux"], rtol=1e-4)
        assert "mock sky" in here.meta["sample"] and here.meta["flag"] == ""
        assert {"model", "limits", "specpred", "date", "wavelengths", "band"} <= set(here.meta)


def test_threads_do_not_mix_galaxies():
    predictor = Predictor.load()
    flux = np.stack([read_image(sorted(folder.iterdir()), predictor.model).flux
        for folder in example_galaxies()])
    alone = predictor.predict(flux, n_draws=16)
    with ThreadPoolExecutor(4) as threads:
        predicted = threads.map(lambda _: predictor.predict(flux, n_draws=16), range(24))
        for spectra in predicted: np.testing.assert_array_equal(spectra.flux, alone.flux)


def test_the_examples_are_told_apart():
    predictor = Predictor.load()
    flux = np.stack([read_image(sorted(folder.iterdir()), predictor.model).flux
        for folder in example_galaxies()])
    predicted = predictor.predict(flux, quantities=True)
    quiescent, forming = predicted.lines.loc["halpha"]
    assert quiescent["ew_upper"] < forming["ew_lower"]
    assert quiescent["ew_lower"] <= quiescent["ew"] <= quiescent["ew_upper"]
    assert (predicted.quantities.dn4000[0] > 1.7) and (predicted.quantities.dn4000[1] < 1.6)


def test_observed_flux_has_the_light_of_the_image():
    installed, redshift = Predictor.load(), 0.0502
    flux = read_image(sorted(example_galaxies()[0].iterdir()), installed.model).flux
    predicted = installed.predict(flux[None])
    table = predicted.observed(redshift)
    from speclite.filters import load_filter
    curve = load_filter(f"{PS1.filters}-r")
    magnitude = curve.get_ab_magnitude(table["flux"], table["wavelength"])
    assert magnitude == pytest.approx(-2.5*np.log10(predicted.light[0, 1]/3.631e12), abs=0.01)
    assert (table["lower"] <= table["flux"]).all() and (table["flux"] <= table["upper"]).all()
    ratio = table["wavelength"]/predicted.observed(redshift, medium="air")["wavelength"]
    assert 1.00025 < ratio.min() < ratio.max() < 1.0003
    for wrong in (dict(redshift=np.nan), dict(redshift=-0.1), dict(redshift=2.),
            dict(redshift=0.1, medium="water")):
        with pytest.raises(InvalidInputError): predicted.observed(**wrong)


@pytest.mark.parametrize("part", ["network", "decoder", "posterior", "calibration", "domain"])
def test_a_damaged_or_foreign_folder_of_weights_is_refused(tmp_path, part):
    folder = Path(shutil.copytree(PRETRAINED/"mock-sky", tmp_path/"mine"))
    file = folder/f"{part}.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DamagedFileError, match=part): Predictor.load(folder)
    file.write_bytes((folder/("domain" if part != "domain" else "network")).with_suffix(
        ".safetensors").read_bytes())
    with pytest.raises(WeightsError): Predictor.load(folder)
    (folder/"about.json").write_text("[1")
    with pytest.raises(DamagedFileError, match="about.json"): Predictor.load(folder)
    shutil.copy(PRETRAINED/"mock-sky/about.json", folder)
    file.unlink()
    with pytest.raises(MissingInputError, match=part): Predictor.load(folder)
    with pytest.raises(MissingInputError, match="one of mock-sky"): Predictor.load(tmp_path/"none")


def test_a_saved_predictor_predicts_the_same(tmp_path):
    first = Predictor.load()
    first.save(tmp_path/"mine")
    for file in (PRETRAINED/"mock-sky").iterdir():  # rounded once, it stays what it is
        assert sum(one.stat().st_size for one in (tmp_path/"mine").iterdir()) < 5e6
        if file.name == "about.json": continue
        ours = read_weights(tmp_path/"mine"/file.name).tensors
        for name, tensor in read_weights(file).tensors.items(): assert ours[name].equal(tensor)


def test_positions_are_downloaded_once_and_predicted(mock, predictor, tmp_path):
    galaxies = pd.read_parquet(next(mock.glob("skyserver/*.parquet")))[["ra", "dec"]].head(3)
    south = pd.DataFrame(dict(ra=[10.], dec=[-60.]))
    wanted = pd.concat([galaxies, south], ignore_index=True)
    files = fetch_cutouts(wanted, predictor.model, tmp_path, ArchiveParameters(), mock)
    absent = [name for name, value in files.items() if isinstance(value, SpecpredError)]
    assert len(files) == 4 and absent == coordinate_names(south.ra, south.dec)
    with pytest.raises(GalaxiesFailed, match="images outside PS1"):
        predict_files(files, predictor, tmp_path/"out", plot=False)
    table = pd.read_csv(tmp_path/"out/summary.csv")
    assert sorted(table.status.replace("flagged", "predicted")) == ["failed"] + 3*["predicted"]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.fits")}
    assert len(stamps) == 15
    again = fetch_cutouts(galaxies.head(1), predictor.model, tmp_path, ArchiveParameters(), mock)
    assert len(again) == 1 and set(again) < set(files)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    with pytest.raises(InvalidInputError, match="no rows"):
        fetch_cutouts(wanted.head(0), predictor.model, tmp_path, ArchiveParameters(), mock)


def test_the_command_downloads_a_position_and_a_table(mock, paths, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    galaxy = pd.read_parquet(next(mock.glob("skyserver/*.parquet"))).iloc[0]
    (tmp_path/"mine.csv").write_text(f"RAJ2000,DEJ2000\n{galaxy.ra},{galaxy.dec}\n")
    (tmp_path/"none.csv").write_text("name,rra\nngc,3\n")
    with serve(mock) as urls:
        archives = [f"--set=archives.{name}={url}" for name, url in vars(urls).items()]
        def run(*arguments):
            return CliRunner().invoke(app, ["predict", *arguments, *archives,
                "--profile", "demo", "--data-dir", str(paths.root.parent), "--out", str(tmp_path)])
        for given in (("--position", f"{galaxy.ra} {galaxy.dec}"),
                ("--table", str(tmp_path/"mine.csv"))):
            done = run(*given)
            assert done.exit_code == 0, (done.output, done.exception)
            (row,) = pd.read_csv(tmp_path/"summary.csv").to_dict("records")
            assert row["galaxy"] == coordinate_names([galaxy.ra], [galaxy.dec])[0]
            assert (tmp_path/f"{row['galaxy']}.ecsv").is_file()
        wrong = run("--position", "400 2")
        assert isinstance(wrong.exception, InvalidInputError)
        wrong = run("--table", str(tmp_path/"none.csv"))
        assert isinstance(wrong.exception, InvalidInputError) and "ra" in str(wrong.exception)


@pytest.mark.parametrize("array, said", [
    (np.zeros((5, 40, 40)), "shape"), (np.zeros((2, 3, 40, 40)), "shape"),
    (np.array([["a"]*5]*5), "shape"), (np.array([None, {}], dtype=object), "no .npy file"),
    (None, "no .npy file")])
def test_arrays_of_another_kind_are_refused(tmp_path, array, said):
    path = tmp_path/"images.npy"
    if array is None: path.write_bytes(b"")
    else: np.save(path, array, allow_pickle=True)
    with pytest.raises(SpecpredError, match=said):
        write_cubes(path, tmp_path/"cubes", "grizy", 0.25, PS1)
    assert not (tmp_path/"cubes").exists()


@pytest.mark.parametrize("kind", ["fits", "parquet"])
def test_the_command_makes_one_table_of_an_array(paths, tmp_path, kind):
    flux = np.stack([example_flux(), 2*example_flux(), example_flux()])
    flux[2, 3] = np.nan  # a band without data
    np.save(tmp_path/"mine.npy", flux[:, [0, 2, 1, 3, 4]])
    out = tmp_path/f"spectra.{kind}"
    def run(*more):
        return CliRunner().invoke(app, ["predict", "--images", str(tmp_path/"mine.npy"),
            "--bands", "girzy", *more, "--out", str(out), "--profile", "demo",
            "--data-dir", str(paths.root.parent)])
    assert run().exit_code == 2  # no pixel scale
    elsewhere = run("--pixel-scale", "0.4")
    assert isinstance(elsewhere.exception, GalaxiesFailed) and not out.exists()
    assert "3 failed" in elsewhere.output and "pixels of 0.4" in str(elsewhere.exception)
    done = run("--pixel-scale", "0.25")
    assert isinstance(done.exception, GalaxiesFailed) and "000002" in str(done.exception)
    assert "2 predicted, 1 failed" in done.output
    table = pd.read_parquet(out) if kind == "parquet" else fits.getdata(out)
    assert list(table["status"]) == ["predicted", "predicted", "failed"]
    direct = Predictor.of_run(paths).predict(np.float32(flux[:2]))
    for row in range(2):
        np.testing.assert_allclose(table["flux"][row], direct.flux[row], rtol=1e-3, atol=1e-5)
    assert np.isnan(np.array(table["flux"][2], float)).all()
    content = out.read_bytes()
    again = run("--pixel-scale", "0.25")
    assert isinstance(again.exception, InvalidInputError) and "exists" in str(again.exception)
    assert out.read_bytes() == content


def test_some_that_fail_are_exit_code_3(predictor, tmp_path):
    sound = write_bands(tmp_path/"sound", example_flux())
    bad = write_bands(tmp_path/"bad", example_flux()[:3])
    empty = tmp_path/"empty.fits"
    empty.write_bytes(b"")
    with pytest.raises(GalaxiesFailed, match="2 of 3 galaxies") as failed:
        predict_files([bad, empty, sound], predictor, tmp_path/"out", plot=False)
    assert failed.value.exit_code == 3
    table = pd.read_csv(tmp_path/"out/summary.csv").set_index("galaxy")
    assert table.status.to_dict() == dict(bad="failed", empty="failed", sound="predicted")
    assert "no image in" in table.reason["bad"]
    assert table.reason["empty"].count("empty.fits") == 1
    assert not (tmp_path/"out/sound.png").exists() and (tmp_path/"out/sound.ecsv").exists()


def test_the_command_says_what_it_does_not_know(paths, tmp_path):
    sound = write_bands(tmp_path/"sound", example_flux())
    sdss = write_bands(tmp_path/"sdss", example_flux(), scale=0.396)
    of_run = "--profile", "demo", "--data-dir", str(paths.root.parent)
    def run(*arguments):
        return CliRunner().invoke(app, ["predict", *map(str, arguments),
            "--out", str(tmp_path/"out"), *of_run])
    done = run(sound)
    assert done.exit_code == 0 and "1 predicted" in done.output, done.output
    failed = run(sound, sdss)
    assert isinstance(failed.exception, GalaxiesFailed) and "0.396" in str(failed.exception)
    table = pd.read_csv(tmp_path/"out/summary.csv").set_index("galaxy").status.to_dict()
    assert table == dict(sound="predicted", sdss="failed")
    assert run(sdss, "--resample").exit_code == 0
    contradicted = run(sound, "--pixel-scale", "0.4")
    assert "says pixel scale 0.25, you say 0.4" in str(contradicted.exception)
    unclear = CliRunner().invoke(app, ["predict", str(sound), "--example"])
    assert unclear.exit_code == 2 and "--example" in unclear.output


def test_names_or_headers_say_the_band(predictor, tmp_path):
    "Two galaxies in one folder by their names; files without names are one galaxy of their folder."
    named, numbered = tmp_path/"named", tmp_path/"numbered"
    numbered.mkdir()
    for k, name in enumerate(("ngc1", "ngc2")):
        bands = write_bands(tmp_path/f"bands{k}", (k + 1)*example_flux())
        named.mkdir(exist_ok=True)
        for number, band in enumerate("grizy"):
            shutil.copy(bands/f"{band}.fits", named/f"{name}_{band}.fits")
            if k == 0: shutil.copy(bands/f"{band}.fits", numbered/f"image {number}.fits")
    loose = name_galaxies(sorted(named.iterdir()), PS1.bands)
    assert {name: len(files) for name, files in loose.items()} == dict(ngc1=5, ngc2=5)
    expected = read_image(sorted((tmp_path/"bands0").iterdir()), predictor.model).flux
    for given in ([numbered], sorted(numbered.iterdir()), sorted(named.glob("ngc1*"))):
        (files,) = name_galaxies(given, PS1.bands).values()
        np.testing.assert_array_equal(read_image(files, predictor.model).flux, expected)
    with pytest.raises(InvalidInputError, match="two images of the band 'g'"):
        read_image(name_galaxies([named], PS1.bands)["named"], predictor.model)
    silent = write_bands(tmp_path/"silent", example_flux(), **{"FPA.FILTERID": None})
    for number, path in enumerate(sorted(silent.iterdir())): path.rename(silent/f"{number}.fits")
    with pytest.raises(InvalidInputError, match="neither name nor header"):
        read_image(name_galaxies([silent], PS1.bands)["silent"], predictor.model)


def test_a_file_that_unpacks_to_too_much_is_an_error(predictor, tmp_path):
    with gzip.open(tmp_path/"bomb.fits.gz", "wb", 1) as file:
        file.write(b"SIMPLE  =                    T".ljust(2880))
        for _ in range(300): file.write(bytes(1 << 20))
    assert (tmp_path/"bomb.fits.gz").stat().st_size < 3e6
    with pytest.raises(GalaxiesFailed, match="unpacks to more than 256 MB"):
        predict_files([tmp_path/"bomb.fits.gz"], predictor, tmp_path/"out")


def test_a_folder_that_cannot_be_written_is_one_message(paths, tmp_path, monkeypatch, capsys):
    (tmp_path/"file").write_text("")
    galaxy = write_bands(tmp_path/"ngc", example_flux())
    monkeypatch.setattr(sys, "argv", ["specpred", "predict", str(galaxy), "--profile", "demo",
        "--data-dir", str(paths.root.parent), "--out", str(tmp_path/"file/out")])
    with pytest.raises(SystemExit) as end: cli.main()
    assert str(end.value).startswith("error: ") and "Not a directory" in str(end.value)


def stamps(folder): return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.ecsv")}


def test_an_interrupted_run_goes_on(predictor, tmp_path, monkeypatch):
    "Ctrl-C after the first of three batches; the second call predicts the other two."
    galaxies = [write_bands(tmp_path/f"galaxy{k}", (k + 1)*example_flux()) for k in range(3)]
    predict, calls = Predictor.predict, []
    def interrupted(self, flux, **options):
        calls.append(len(flux))
        if len(calls) == 2: raise KeyboardInterrupt
        return predict(self, flux, **options)
    monkeypatch.setattr(Predictor, "predict", interrupted)
    def run(): return predict_files(galaxies, predictor, tmp_path/"out", batch_size=1, plot=False)
    with pytest.raises(KeyboardInterrupt): run()
    first = stamps(tmp_path/"out")
    assert list(first) == ["galaxy0.ecsv"]
    run()
    assert len(calls) == 4
    assert len(stamps(tmp_path/"out")) == 3 and stamps(tmp_path/"out").items() >= first.items()
    assert list(pd.read_csv(tmp_path/"out/summary.csv").galaxy) == ["galaxy0", "galaxy1", "galaxy2"]


def test_what_has_changed_is_predicted_again(predictor, tmp_path):
    galaxies = [write_bands(tmp_path/f"galaxy{k}", (k + 1)*example_flux()) for k in range(2)]
    out = tmp_path/"out"
    def again(who, **options):
        before = stamps(out) if out.exists() else {}
        predict_files(galaxies, who, out, **dict(plot=False) | options)
        return {name for name, stamp in stamps(out).items() if before.get(name) != stamp}
    both = {"galaxy0.ecsv", "galaxy1.ecsv"}
    assert again(predictor) == both
    assert again(predictor) == set()
    write_bands(galaxies[1], 3*example_flux())
    assert again(predictor) == {"galaxy1.ecsv"}
    assert again(predictor, n_samples=2) == both
    (out/"galaxy0.ecsv").unlink()
    assert again(predictor, n_samples=2) == {"galaxy0.ecsv"}
    assert again(predictor, n_samples=2, plot=True) == both  # the plots were missing
    other = Predictor(predictor.model, predictor.decoder, about=predictor.about)
    assert again(other, n_samples=2, plot=True) == set()
    moved = predictor.model.model.state_dict()
    changed = models.TrainedModel(models.MODELS["conv3"](c_in=5, n_out=6), "conv3",
        predictor.model.arguments, predictor.model.image_stats, predictor.model.target_stats,
        provenance=predictor.model.provenance)
    assert not all(moved[name].equal(t) for name, t in changed.model.state_dict().items())
    assert again(Predictor(changed, predictor.decoder), n_samples=2, plot=True) == both


def test_moved_draws_have_the_bands_and_keep_their_ranks():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(2, 8000, 3)).astype(np.float32)
    drawn = bands_of_draws(draws)
    wanted = Bands(drawn.median + 5, 2*drawn.below, np.maximum.accumulate(
        drawn.above*np.array([1, 3, 2, 4])[:, None, None], 0))
    moved = follow_bands(draws, drawn, wanted)
    for found, expected in zip(bands_of_draws(moved), wanted, strict=True):
        np.testing.assert_allclose(found, expected, atol=0.05)
    in_order = np.take_along_axis(moved, draws.argsort(1), 1)
    assert (np.diff(in_order, axis=1) > -1e-5).all()
    np.testing.assert_allclose(follow_bands(draws, drawn, drawn), draws, atol=1e-5)


def test_samples_are_written(paths, tmp_path):
    sound = write_bands(tmp_path/"sound", example_flux())
    done = CliRunner().invoke(app, ["predict", str(sound), "--samples", "16", "--profile", "demo",
        "--data-dir", str(paths.root.parent), "--out", str(tmp_path/"all.fits")])
    assert done.exit_code == 0, done.output
    samples = fits.getdata(tmp_path/"all.fits")["samples"]
    assert samples.shape == (1, 60, 16)
    table = Table.read(tmp_path/"all/sound.ecsv")
    np.testing.assert_allclose(samples[0], table["samples"], rtol=1e-5)
    spectra = Predictor.of_run(paths).predict(sound, n_samples=512)
    np.testing.assert_allclose(spectra.samples[0, :16].T, samples[0], rtol=1e-4, atol=1e-5)
    lower, upper = spectra.lower[:, None], spectra.upper[:, None]
    inside = (spectra.samples >= lower) & (spectra.samples <= upper)
    assert inside.mean() == pytest.approx(0.68, abs=0.03)


def test_one_call_takes_positions_tables_and_stores(mock, predictor, tmp_path):
    galaxies = pd.read_parquet(next(mock.glob("skyserver/*.parquet")))[["ra", "dec"]].head(2)
    wanted = pd.concat([galaxies, pd.DataFrame(dict(ra=[10.], dec=[-60.])), galaxies.tail(1)],
        ignore_index=True)
    options = dict(folder=tmp_path, archives=ArchiveParameters(), mock=mock, n_draws=8)
    of_frame = predictor.predict(wanted, **options)
    assert of_frame.names == coordinate_names(wanted.ra, wanted.dec)
    assert of_frame.reasons[2].startswith("failed: ") and np.isnan(of_frame.flux[2]).all()
    np.testing.assert_array_equal(of_frame.flux[1], of_frame.flux[3])
    assert np.isfinite(of_frame.flux[[0, 1, 3]]).all()
    others = SkyCoord(wanted.ra, wanted.dec, unit="deg"), Table.from_pandas(wanted)
    for what in others:
        np.testing.assert_array_equal(predictor.predict(what, **options).flux, of_frame.flux)
    files = find_galaxies(galaxies, predictor.model, **{k: options[k] for k in
        ("folder", "archives", "mock")})
    flux = np.stack([read_image(one, predictor.model).flux for one in files.values()])
    pack_arrays([7, 5], flux, tmp_path/"store", PS1, dtype="float32")
    store = open_images(tmp_path/"store")
    of_store = predictor.predict(store, n_draws=8)
    assert of_store.names == [str(s) for s in store.specobjid]
    np.testing.assert_allclose(of_store.flux[list(store.specobjid).index(7)], of_frame.flux[0],
        rtol=1e-3, atol=1e-4)
    pack_arrays([7, 5], flux, tmp_path/"other", SDSS, dtype="float32")
    with pytest.raises(InvalidInputError, match="images of SDSS, 0.396 arcsec"):
        predictor.predict(open_images(tmp_path/"other"))
    with pytest.raises(InvalidInputError, match="needs ra and dec"):
        predictor.predict(pd.DataFrame(dict(x=[1.])))
    with pytest.raises(SpecpredError, match="images outside PS1"):
        predictor.predict(wanted.iloc[[2]], **options)


def test_a_prediction_is_compared_with_a_spectrum(tmp_path):
    predict_files(example_galaxies()[:1], Predictor.load(), tmp_path, plot=False)
    table = Table.read(tmp_path/"quiescent.ecsv")
    loglam = np.arange(3.58, 3.92, 1e-4)
    own = np.interp(loglam, np.log10(table["wavelength"]*1.0502), table["flux"])
    noise = 0.1*np.median(own)
    flux = own + np.random.default_rng(0).normal(0, noise, len(own))
    spectrum = SDSSSpectrum(np.float32(flux*100), np.full(len(own), (noise*100)**-2, np.float32),
        np.zeros(len(own), np.int32), loglam[0], 0.0502, object_class="GALAXY", plate=266,
        mjd=51602, fiberid=1, or_mask=np.zeros(len(own), np.int32), model=np.float32(own*100))
    (tmp_path/"spec.fits").write_bytes(sdss_spectrum_bytes(spectrum))
    numbers = compare(tmp_path/"quiescent.ecsv", spectrum).numbers()
    assert 0.8 < numbers["chi2 a bin, noise alone"] < 1.3
    assert numbers["chi2 a bin, noise and 68 % band"] < numbers["chi2 a bin, noise alone"]
    assert numbers["inside the 95 % band"] > 0.93
    done = CliRunner().invoke(app, ["compare", str(tmp_path/"quiescent.ecsv"),
        str(tmp_path/"spec.fits")])
    assert done.exit_code == 0 and "noise alone" in done.output, (done.output, done.exception)
    assert (tmp_path/"quiescent-compared.png").is_file()
    shifted = compare(tmp_path/"quiescent.ecsv", spectrum, redshift=0.03).numbers()
    assert shifted["chi2 a bin, noise alone"] > 1.5*numbers["chi2 a bin, noise alone"]
    with pytest.raises(InvalidInputError, match="at a redshift of 5"):
        compare(tmp_path/"quiescent.ecsv", spectrum, redshift=5.)
    (tmp_path/"none.ecsv").write_text("a,b\n1,2\n")
    with pytest.raises(DamagedFileError, match="none.ecsv"): compare(tmp_path/"none.ecsv", spectrum)
    wrong = CliRunner().invoke(app, ["compare", str(tmp_path/"no.ecsv"), str(tmp_path/"spec.fits")])
    assert isinstance(wrong.exception, MissingInputError)


def test_acknowledgements_are_printed_on_request():
    done = CliRunner().invoke(app, ["info", "--acknowledgements"])
    assert done.exit_code == 0
    for words in ("Alfred P. Sloan Foundation", "Gordon and Betty Moore Foundation"):
        assert words in done.output
