"""The mock survey as a whole: its files are what SDSS and PS1 would serve, and agree with the truth beside them."""
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import given, settings, strategies as st

from specpred import mock_survey as mock
from specpred.config import DamagedFileError, InvalidInputError, MissingInputError, MockParameters

PARAMETERS = MockParameters(n_galaxies=12, n_spectra_only=6, galaxies_per_side=3, stamp_size=64)
REAL = Path(os.environ.get("SPECPRED_REAL_DATA", "/nowhere"))/"sdss"


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("survey")
    truth = mock.make_survey(PARAMETERS, folder, seed=5, n_jobs=1, progress=False)
    return folder, truth, pd.read_parquet(folder/"skyserver"/"SpecObj.parquet")


def spectrum(folder, row):
    return folder/"sas"/mock.spectrum_path(row.plate, row.mjd, row.fiberid)


def test_catalogue_matches_files(survey):
    folder, truth, catalogue = survey
    assert len(catalogue) == 18 and catalogue.specObjID.is_unique and catalogue.bestObjID.is_unique
    assert catalogue.specObjID.dtype == np.uint64 and (catalogue.specObjID == truth.specobjid).all()
    assert ((catalogue.dec > -30) == (truth.cell >= 0)).all()
    assert (catalogue.petroMag_r - catalogue.extinction_r < mock.R_LIMIT).all()
    assert np.abs(catalogue.z - truth.redshift).max() < 2e-4
    written = {p.name for p in (folder/"sas").rglob("*.fits")}
    assert written == {mock.spectrum_name(r.plate, r.mjd, r.fiberid) for r in truth.itertuples()}
    for row in truth.itertuples():
        with fits.open(spectrum(folder, row)) as hdus:
            hdus.verify("exception")
            one = hdus[2].data[0]
            assert int(one["SPECOBJID"]) == row.specobjid and one["CLASS"] == "GALAXY" and one["PRIMTARGET"] == 64
            assert abs(one["PLUG_RA"] - row.ra) < 1e-7 and abs(one["Z"] - row.z_observed) < 1e-6


def test_specobjid_decodes(survey):
    for row in survey[1].itertuples():
        number = int(row.specobjid)
        assert number >> 50 == row.plate and (number >> 38) & 0xFFF == row.fiberid
        assert ((number >> 24) & 0x3FFF) + 50000 == row.mjd and (number >> 10) & 0x3FFF == mock.RUN2D


def test_noise_is_what_ivar_says(survey):
    folder, truth, _ = survey
    pulls = []
    for row in truth.itertuples():
        loglam, flux = mock.true_spectra(folder, [row.specobjid])
        coadd = fits.getdata(spectrum(folder, row), 1)
        at = np.searchsorted(loglam, coadd["loglam"] - 5e-5)
        good = coadd["ivar"] > 0
        assert np.all(coadd["and_mask"][~good] & (1 << 24)) and np.all((coadd["or_mask"] & coadd["and_mask"]) == coadd["and_mask"])
        pulls.append(((coadd["flux"] - flux[0][at])*np.sqrt(coadd["ivar"]))[good])
    pulls = np.concatenate(pulls)
    assert abs(pulls.mean()) < 0.02 and abs(pulls.std() - 1) < 0.02


def test_truth_holds_the_lines(survey):
    folder, truth, _ = survey
    row = truth.loc[truth.flux_halpha.idxmax()]
    loglam, flux = mock.true_spectra(folder, [row.specobjid])
    rest = 10**loglam/(1 + row.redshift)
    width = np.gradient(10**loglam)
    near, beside = np.abs(rest - 6564.61) < 8, (np.abs(rest - 6564.61) > 35) & (np.abs(rest - 6564.61) < 60)
    above = (flux[0] - np.median(flux[0][beside]))*width
    centroid = (above*rest)[near].sum()/above[near].sum()
    assert abs(centroid - 6564.61) < 0.5
    assert abs(above[near].sum()/row.flux_halpha - 1) < 0.15  # stellar absorption beneath the line


def test_images_hold_the_flux(survey):
    folder, truth, _ = survey
    cells = pd.read_parquet(folder/"ps1"/"skycells.parquet")
    assert len(cells) == 2 and len(list((folder/"ps1").rglob("*.fits"))) == 10
    for band in mock.BANDS:
        ratios = []
        for cell in cells.itertuples():
            counts, header = mock.read_skycell(folder/"ps1"/mock.skycell_path(cell.projcell, cell.subcell, band))
            assert counts.shape == (192, 192) and header["FILTER"].startswith(band) and header["BSOFTEN"] > 0
            flux = counts*mock.NJY_PER_COUNT_PER_S/header["EXPTIME"]
            for row in truth[truth.cell == cell.Index].itertuples():
                x, y = WCS(header).all_world2pix(row.ra, row.dec, 0)
                assert abs(x - row.x) < 1e-3 and abs(y - row.y) < 1e-3
                if row.petro_r90 > 3.5: continue
                yy, xx = np.indices(flux.shape)
                ratios.append(np.nansum(flux[np.hypot(xx - x, yy - y) < 24])/(row._asdict()[f"bulge_flux_{band}"] + row._asdict()[f"disk_flux_{band}"]))
        assert abs(np.median(ratios) - 1) < 0.08, (band, ratios)


def test_interrupted_survey_goes_on_and_processes_do_not_matter(survey, tmp_path):
    folder, truth, _ = survey
    again = mock.make_survey(PARAMETERS, tmp_path, seed=5, n_jobs=2, progress=False)
    files = sorted(p.relative_to(folder) for p in folder.rglob("*.fits"))
    for name in files[::4]: (tmp_path/name).unlink()
    half = tmp_path/files[1].parent/".spec-half.fits.1.tmp"
    half.write_bytes(b"half a spectrum")
    kept = (tmp_path/files[1]).stat().st_mtime_ns
    (tmp_path/"skyserver"/"SpecObj.parquet").unlink()
    mock.make_survey(PARAMETERS, tmp_path, seed=5, n_jobs=1, progress=False)
    assert again.equals(truth) and not half.exists() and (tmp_path/files[1]).stat().st_mtime_ns == kept
    assert all((tmp_path/name).read_bytes() == (folder/name).read_bytes() for name in files)


def test_other_seed_is_another_survey(survey, tmp_path):
    folder, truth, _ = survey
    with pytest.raises(InvalidInputError, match="other parameters or another seed"): mock.make_survey(PARAMETERS, folder, seed=6, progress=False)
    other = mock.draw_galaxies(12, 6, "with images")
    assert not np.isclose(other.redshift, truth.redshift[:12]).any()


@pytest.mark.parametrize("wrong", [dict(n_galaxies=-1), dict(n_galaxies=5, stamp_size=4), dict(n_galaxies=5, galaxies_per_side=0)])
def test_impossible_parameters_are_refused(wrong, tmp_path):
    with pytest.raises(InvalidInputError, match=list(wrong)[-1]): mock.make_survey(MockParameters(**wrong), tmp_path/"new", seed=1)
    assert not (tmp_path/"new").exists()


def test_empty_survey(survey, tmp_path, capsys):
    assert len(mock.make_survey(MockParameters(), tmp_path, seed=1)) == 0
    table = pd.read_parquet(tmp_path/"skyserver"/"SpecObj.parquet")
    assert len(table) == 0 and (table.dtypes == survey[2].dtypes).all()
    assert "catalogue is empty" in capsys.readouterr().out
    assert mock.true_spectra(tmp_path, [1]) is None


def test_a_survey_of_spectra_alone(tmp_path):
    truth = mock.make_survey(MockParameters(n_galaxies=0, n_spectra_only=3), tmp_path, seed=3, n_jobs=1, progress=False)
    assert len(truth) == len(list(tmp_path.rglob("spec-*.fits"))) == 3 and not list(tmp_path.rglob("*.stk.*"))


def test_unknown_galaxies_are_named(survey):
    with pytest.raises(InvalidInputError, match="1 of 2 galaxies.*specobjid 7"): mock.true_spectra(survey[0], [int(survey[1].specobjid[3]), 7])


def test_library_errors(tmp_path):
    with pytest.raises(MissingInputError, match="git checkout"): mock.StellarLibrary.load(tmp_path/"no.h5")
    (tmp_path/"half.h5").write_bytes(b"\x89HDF\r\n\x1a\nhalf")
    with pytest.raises(DamagedFileError, match="not a stellar library"): mock.StellarLibrary.load(tmp_path/"half.h5")


def test_damaged_skycell(tmp_path):
    (tmp_path/"cell.fits").write_bytes(b"SIMPLE  =   no")
    with pytest.raises(DamagedFileError, match="not a PS1 stack image"): mock.read_skycell(tmp_path/"cell.fits")


def test_population_is_bimodal_and_complete():
    galaxies, bulge, disk = mock.make_light(mock.StellarLibrary.load(), mock.draw_galaxies(2500, 2))
    assert galaxies.redshift.between(*mock.REDSHIFTS).all() and 0.07 < galaxies.redshift.median() < 0.13
    assert np.isfinite(galaxies.select_dtypes("number")).all(axis=None)
    near = galaxies[galaxies.redshift.between(0.05, 0.12)]
    counts, _ = np.histogram(near.mag_g - near.mag_r, bins=np.arange(0.25, 1.2, 0.1))
    blue, red = counts[:5].max(), counts[5:].max()
    assert counts[counts[:5].argmax():5 + counts[5:].argmax()].min() < 0.8*min(blue, red)  # a valley between two peaks
    forming = galaxies[galaxies.kind == "star-forming"]
    assert np.corrcoef(forming.log_mass, forming.disk_log_z)[0, 1] > 0.4  # mass-metallicity relation


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e5, 1e7), st.floats(0.1, 1e3), st.floats(-50, 50))
def test_asinh_scale_has_an_inverse(counts, bsoften, boffset):
    assert np.isclose(mock.asinh_unscale(mock.asinh_scale(counts, bsoften, boffset), bsoften, boffset), counts, rtol=1e-9, atol=1e-9*bsoften)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.7, 12), st.floats(0, 0.999))
def test_broadening_keeps_flux(sigma, fraction):
    spectrum = np.zeros(2000)
    spectrum[900:1100] = 1
    broadened = mock.broaden(spectrum, 100 + fraction, np.full(850, sigma))
    assert abs(broadened.sum() - 100) < 0.6 and broadened.min() >= 0


@pytest.mark.skipif(not REAL.is_dir(), reason="SPECPRED_REAL_DATA does not name a folder with sdss/")
def test_layout_is_that_of_real_files(survey):
    folder, truth, _ = survey
    with fits.open(spectrum(folder, truth.iloc[0])) as ours, fits.open(REAL/"spec-0266-51602-0573.fits") as real:
        assert [h.name for h in ours] == [h.name for h in real[:4]]
        for k in (1, 2, 3):
            assert ours[k].columns.names == real[k].columns.names and ours[k].columns.formats == real[k].columns.formats
            assert set(ours[k].header) == set(real[k].header)
        assert set(ours[0].header) - set(real[0].header) == set()
        assert {type(ours[0].header[key]) for key in ("PLATEID", "MJD", "FIBERID")} == {int}
        for key in ("COEFF1", "VACUUM", "BUNIT", "NWORDER", "WFITTYPE", "DC-FLAG"): assert ours[0].header[key] == real[0].header[key], key
        assert list(ours[3].data["LINENAME"]) == list(real[3].data["LINENAME"])
        assert np.abs(ours[3].data["LINEWAVE"] - real[3].data["LINEWAVE"]).max() < 1e-3


@pytest.mark.skipif(not REAL.is_dir(), reason="SPECPRED_REAL_DATA does not name a folder with sdss/")
def test_noise_is_like_that_of_real_files():
    with fits.open(REAL/"spec-0266-51602-0573.fits") as hdus: coadd = hdus[1].data  # a faint galaxy
    ours = np.sqrt(np.interp(coadd["loglam"], mock.LOGLAM, mock.sdss_variance(np.interp(mock.LOGLAM, coadd["loglam"], coadd["model"]))))
    ratio = ours*np.sqrt(coadd["ivar"])
    for part in np.array_split(ratio[coadd["ivar"] > 0], 8): assert 0.65 < np.median(part) < 1.5, np.median(part)
