"""The mock survey: its files are what SDSS and PS1 would serve, and agree with the truth."""
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from specpred import mock_survey as mock
from specpred.config import DamagedFileError, InvalidInputError, MissingInputError, MockParameters
from specpred.cutouts import read_skycell, sky_to_pixel, skycell_path
from specpred.formats import mask_bits, read_sdss
from specpred.formats import specobjid_of_spectrum, spectrum_path
from specpred.mock_galaxies import LOGLAM, R_LIMITS, REDSHIFTS, draw_galaxies, make_light
from specpred.populations import (OLDEST_IONIZING, StellarLibrary, active_nucleus_lines,
    age_weights, broaden, composite_population, interpolation_weights, star_formation_history)
from specpred.surveys import PS1, RUBIN, SURVEYS

PARAMETERS = MockParameters(n_galaxies=12, n_spectra_only=6, galaxies_per_side=3, stamp_size=64)
REAL = Path(os.environ.get("SPECPRED_REAL_DATA", "/nowhere"))/"sdss"


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("survey")
    return folder, mock.make_survey(PARAMETERS, folder, seed=5, progress=False)


@pytest.fixture(scope="module")
def six_bands(tmp_path_factory):
    folder = tmp_path_factory.mktemp("six_bands")
    return folder, mock.make_survey(PARAMETERS, folder, seed=5, survey=RUBIN, progress=False)


def observed(folder, row):
    return read_sdss(folder/"sas"/spectrum_path("26", row.plate, row.mjd, row.fiberid))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.fits")}


def test_catalogue_matches_files(survey):
    folder, truth = survey
    catalogue = pd.read_parquet(folder/"skyserver"/"SpecObj.parquet")
    assert len(catalogue) == 18
    assert catalogue.specObjID.is_unique
    assert catalogue.bestObjID.is_unique
    assert ((catalogue.dec > -30) == (truth.cell >= 0)).all()
    assert (catalogue.petroMag_r - catalogue.extinction_r < R_LIMITS[1]).all()
    assert np.abs(catalogue.z - truth.redshift).max() < 2e-4
    assert len(list((folder/"sas").rglob("*.fits"))) == 18
    for row in catalogue.itertuples():
        spectrum = observed(folder, truth.loc[row.Index])
        assert (spectrum.plate, spectrum.mjd, spectrum.fiberid) == (row.plate, row.mjd, row.fiberID)
        assert row.specObjID == specobjid_of_spectrum(row.plate, row.mjd, row.fiberID, row.run2d)
        assert spectrum.ra == pytest.approx(row.ra, abs=1e-7)
        assert spectrum.redshift == pytest.approx(row.z, abs=1e-6)


def residuals_of(folder, row):
    "Observed minus noiseless flux, `ivar` and whether a pixel is in a sky line, with data only."
    spectrum = observed(folder, row)
    loglam, (flux,) = mock.true_spectra(folder, [row.specobjid])
    first = np.searchsorted(loglam, spectrum.loglam0 - 5e-5)
    covered, good = slice(first, first + len(spectrum.flux)), spectrum.ivar > 0
    assert (spectrum.and_mask[~good] & mask_bits(["NODATA"])).all()
    assert (spectrum.or_mask & spectrum.and_mask == spectrum.and_mask).all()
    in_line = mock.SKY_BRIGHTNESS[covered] > 1.5
    return (spectrum.flux - flux[covered])[good], spectrum.ivar[good], in_line[good]


def test_noise_is_what_ivar_says(survey):
    folder, truth = survey
    widths = []
    for row in truth.itertuples():
        residual, ivar, in_line = residuals_of(folder, row)
        variance = 1/ivar
        # from pixel to pixel, where a smooth error of the calibration cancels
        pulls = np.diff(residual)/np.sqrt(variance[1:] + variance[:-1])
        widths.append(pulls[~(in_line[1:] | in_line[:-1])].std())
    assert np.median(widths) == pytest.approx(1, abs=0.02)
    assert min(widths) > 0.95
    assert max(widths) < 1.45  # where `ivar` is wrong


def observe_many(flux, variance, n=300, **options):
    return [mock.observe_spectrum(flux, variance, np.random.default_rng(k), **options)
        for k in range(n)]


def test_calibration_bends_spectra():
    flux = np.full(len(LOGLAM), 1e4)  # so bright that neither noise nor sky matter
    variance = np.full(len(LOGLAM), 1e-4)
    plate = mock.calibration_error(np.random.default_rng(1))
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
    residuals = np.array([mock.sky_residuals(np.random.default_rng(k)) for k in range(300)])
    lines = mock.SKY_FLUX*(1 - 1/mock.SKY_BRIGHTNESS)
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


def test_truth_holds_the_lines(survey):
    folder, truth = survey
    row = truth.loc[truth.flux_halpha.idxmax()]
    loglam, (flux,) = mock.true_spectra(folder, [row.specobjid])
    distance = np.abs(10**loglam/(1 + row.redshift) - 6564.61)
    continuum = np.median(flux[(distance > 35) & (distance < 60)])
    line = (distance < 8)*(flux - continuum)*np.gradient(10**loglam)
    assert line.sum() == pytest.approx(row.flux_halpha, rel=0.15)  # stellar absorption beneath it
    centroid = (line*10**loglam).sum()/line.sum()/(1 + row.redshift)
    assert centroid == pytest.approx(6564.61, abs=0.5)


@pytest.mark.parametrize("imaging", [PS1, RUBIN], ids=["five bands", "six bands"])
def test_images_hold_the_flux(survey, six_bands, imaging):
    folder, truth = survey if imaging is PS1 else six_bands
    cells = pd.read_parquet(folder/"ps1"/"skycells.parquet")
    assert len(list((folder/"ps1").rglob("*.fits"))) == len(cells)*len(imaging.bands)
    radius = 6/imaging.pixel_scale
    for band in imaging.bands:
        ratios = []
        for row in truth[(truth.cell >= 0) & (truth.petro_r90 < 3.5)].itertuples():
            cell = cells.loc[row.cell]
            path = skycell_path(int(cell.projcell), int(cell.subcell), band)
            counts, header = read_skycell(folder/"ps1"/path)
            x, y = sky_to_pixel(header, row.ra, row.dec)
            assert (x, y) == pytest.approx((row.x, row.y), abs=1e-3)
            yy, xx = np.indices(counts.shape)
            inside = counts[np.hypot(xx - x, yy - y) < radius]
            true = getattr(row, f"bulge_flux_{band}") + getattr(row, f"disk_flux_{band}")
            ratios.append(imaging.to_njy(np.nansum(inside), header["EXPTIME"])/true)
        assert np.median(ratios) == pytest.approx(1, abs=0.08), band


@pytest.mark.parametrize("name", ["ps1", "sdss", "legacy", "rubin"])
def test_noise_of_an_empty_field(tmp_path, name):
    imaging = SURVEYS[name]
    cell = next(mock.layout_skycells(1, 5, side=96).itertuples())
    nothing = pd.DataFrame(dict(x=[], y=[]))
    mock.make_skycell(tmp_path, cell, nothing, imaging, stamp=96, seed=5)
    for conditions in mock.draw_conditions(5, 0, imaging):
        path = tmp_path/skycell_path(cell.projcell, cell.subcell, conditions.band)
        counts, header = read_skycell(path)
        noise = np.nanstd(imaging.to_njy(counts, header["EXPTIME"]))
        assert noise == pytest.approx(conditions.sky_noise, rel=0.05)


def test_the_sample_does_not_depend_on_the_imaging_survey(survey, six_bands):
    same = ["specobjid", "redshift", "petro_r", "petro_r50", "log_mass", "flux_halpha"]
    assert six_bands[1][same].equals(survey[1][same])
    assert [c for c in six_bands[1] if c.startswith("mag_")] == [f"mag_{b}" for b in "ugrizy"]


def test_interrupted_survey_goes_on_and_processes_do_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(mock, "BLOCK", 4)  # so that 18 galaxies are worth several processes
    truth = mock.make_survey(PARAMETERS, tmp_path, seed=5, n_jobs=2, progress=False)
    first = contents(tmp_path)
    paths = sorted(first)
    for path in paths[::4]: (tmp_path/path).unlink()
    unfinished = tmp_path/paths[1].parent/".spec-half.fits.x.tmp"
    unfinished.mkdir()
    kept = (tmp_path/paths[1]).stat().st_mtime_ns
    (tmp_path/"skyserver"/"SpecObj.parquet").unlink()
    again = mock.make_survey(PARAMETERS, tmp_path, seed=5, n_jobs=1, progress=False)
    assert again.equals(truth)
    assert contents(tmp_path) == first
    assert not unfinished.exists()
    assert (tmp_path/paths[1]).stat().st_mtime_ns == kept


@pytest.mark.parametrize("other", [dict(seed=6), dict(seed=5, survey=RUBIN)],
    ids=["seed", "survey"])
def test_two_surveys_do_not_share_a_folder(survey, other):
    with pytest.raises(InvalidInputError, match="another seed"):
        mock.make_survey(PARAMETERS, survey[0], **other, progress=False)


def test_empty_survey(survey, tmp_path):
    assert len(mock.make_survey(MockParameters(), tmp_path, seed=1, progress=False)) == 0
    table, full = (pd.read_parquet(folder/"skyserver"/"SpecObj.parquet")
        for folder in (tmp_path, survey[0]))
    assert len(table) == 0
    assert (table.dtypes == full.dtypes).all()
    assert mock.true_spectra(tmp_path, [1]) is None


def test_a_survey_of_spectra_alone(tmp_path):
    parameters = MockParameters(n_spectra_only=3)
    assert len(mock.make_survey(parameters, tmp_path, seed=3, progress=False)) == 3
    assert all(path.name.startswith("spec-") for path in contents(tmp_path))


def test_plates_hold_640_galaxies():
    _, galaxies = mock.draw_survey(MockParameters(n_galaxies=900, n_spectra_only=1300,
        galaxies_per_side=30), 1)
    assert galaxies.groupby("plate").size().max() == 640
    assert not galaxies.duplicated(["plate", "fiberid"]).any()
    assert galaxies.specobjid.is_unique
    assert (galaxies.groupby("plate").mjd.nunique() == 1).all()


def test_unknown_galaxies_are_named(survey):
    folder, truth = survey
    with pytest.raises(InvalidInputError, match="1 of 2 galaxies.*specobjid 7"):
        mock.true_spectra(folder, [int(truth.specobjid[3]), 7])


def test_library_errors(tmp_path):
    with pytest.raises(MissingInputError, match="git checkout"):
        StellarLibrary.load(tmp_path/"no.h5")
    (tmp_path/"half.h5").write_bytes(b"\x89HDF\r\n\x1a\nhalf")
    with pytest.raises(DamagedFileError, match="not a stellar library"):
        StellarLibrary.load(tmp_path/"half.h5")


def test_a_composite_population_is_a_sum_over_the_library():
    library, rng = StellarLibrary.load(), np.random.default_rng(3)
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
def test_parameters_of_nuclei_raise_their_lines(name, wavelength):
    library, usual = StellarLibrary.load(), dict(seyfert=0.5)
    line = library.line_wavelength.round() == wavelength
    before = active_nucleus_lines(library, [1.0, 2.0], **usual)
    after = active_nucleus_lines(library, [1.0, 2.0], **usual | {name: usual.get(name, 0) + 0.2})
    assert (after[:, line] > 1.1*before[:, line]).all()
    assert before[1] == pytest.approx(2*before[0])
    halpha = np.abs(library.line_wavelength - 6564.61).argmin()
    assert after[:, halpha] == pytest.approx([1, 2])


def test_population_is_bimodal_and_complete():
    galaxies = make_light(StellarLibrary.load(), draw_galaxies(1200, 2)).galaxies
    assert galaxies.redshift.between(*REDSHIFTS).all()
    assert 0.07 < galaxies.redshift.median() < 0.13
    assert np.isfinite(galaxies.select_dtypes("number")).all(axis=None)
    near = galaxies[galaxies.redshift.between(0.05, 0.12)]
    counts, _ = np.histogram(near.mag_g - near.mag_r, bins=np.arange(0.25, 1.2, 0.1))
    blue, red = counts[:5].argmax(), 5 + counts[5:].argmax()
    assert counts[blue:red].min() < 0.8*min(counts[blue], counts[red])  # a valley between two peaks
    forming = galaxies[galaxies.kind == "star-forming"]
    assert np.corrcoef(forming.log_mass, forming.disk_log_z)[0, 1] > 0.4  # mass and metallicity


@settings(max_examples=25, deadline=None)
@given(st.floats(0.7, 12), st.floats(0, 0.999))
def test_broadening_keeps_flux(sigma, fraction):
    spectrum = np.zeros(2000)
    spectrum[900:1100] = 1
    broadened = broaden(spectrum, 100 + fraction, np.full(850, sigma))
    assert broadened.sum() == pytest.approx(100, abs=0.6)
    assert broadened.min() >= 0


@pytest.mark.skipif(not REAL.is_dir(), reason="SPECPRED_REAL_DATA names no folder with sdss/")
def test_noise_is_like_that_of_real_files():
    real = read_sdss(REAL/"spec-0266-51602-0573.fits")  # a faint galaxy
    variance = mock.sdss_variance(np.interp(LOGLAM, real.loglam, real.model))
    ratio = np.sqrt(np.interp(real.loglam, LOGLAM, variance)*real.ivar)
    for part in np.array_split(ratio[real.ivar > 0], 8): assert 0.65 < np.median(part) < 1.5
