"""The mock survey: its files are what SDSS and PS1 would serve, and agree with the truth."""
import numpy as np
import pandas as pd
import pytest

from specpred import mock_survey as mock
from specpred.config import (
    DamagedFileError,
    InvalidInputError,
    MockParameters,
    SpecpredError,
    random_generator,
)
from specpred.cutouts import read_skycell, sky_to_pixel, skycell_path, skycell_wcs
from specpred.formats import mask_bits, read_sdss
from specpred.formats import specobjid_of_spectrum, spectrum_path
from specpred.mock_light import R_LIMITS, aperture, draw_light, light_within
from specpred.populations import StellarLibrary
from specpred.spectrograph import SKY_BRIGHTNESS
from specpred.surveys import AB_ZERO, PS1, RUBIN, SURVEYS

PARAMETERS = MockParameters(n_galaxies=12, n_spectra_only=6, galaxies_per_side=3, stamp_size=64)


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
    in_line = SKY_BRIGHTNESS[covered] > 1.5
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
    light = draw_light(StellarLibrary.load(), len(truth), 5, "survey", 0, survey=imaging)
    radius = 6.0  # arcsec
    ratios = []  # by galaxy and band
    for row in truth[truth.cell >= 0].itertuples():
        k, cell = row.Index, cells.loc[row.cell]
        entering = aperture(radius=radius, seeing=1.1)
        expected = (np.einsum("cs,csb->b", light_within(light.maps[k], entering), light.flux[k])
            + light.nuclei.flux[k])
        ratios.append([])
        for band, flux in zip(imaging.bands, expected, strict=False):
            path = skycell_path(int(cell.projcell), int(cell.subcell), band)
            counts, header = read_skycell(folder/"ps1"/path)
            x, y = sky_to_pixel(header, row.ra, row.dec)
            error = np.hypot(x - row.x, y - row.y)*imaging.pixel_scale
            assert error < 5*mock.CENTRING_ERROR
            yy, xx = np.indices(counts.shape)
            inside = counts[np.hypot(xx - row.x, yy - row.y) < radius/imaging.pixel_scale]
            seen = np.nanmean(inside)*np.pi*(radius/imaging.pixel_scale)**2
            ratios[-1].append(imaging.to_njy(seen, header["EXPTIME"])/flux)
    # neighbours and lost pixels are in some
    assert np.median(ratios, axis=0) == pytest.approx(1, abs=0.05)


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
    spectrum = next(tmp_path/path for path in paths if path.name.startswith("spec-")
        and (tmp_path/path).is_file())
    kept = spectrum.stat().st_mtime_ns
    (tmp_path/"skyserver"/"SpecObj.parquet").unlink()
    again = mock.make_survey(PARAMETERS, tmp_path, seed=5, n_jobs=1, progress=False)
    assert again.equals(truth)
    assert contents(tmp_path) == first
    assert not unfinished.exists()
    assert spectrum.stat().st_mtime_ns == kept


@pytest.mark.parametrize("other", [dict(seed=6), dict(survey=RUBIN),
    dict(parameters=PARAMETERS.model_copy(update=dict(couplings="none")))],
    ids=["seed", "survey", "couplings"])
def test_two_surveys_do_not_share_a_folder(survey, other):
    usual = dict(parameters=PARAMETERS, folder=survey[0], seed=5, progress=False)
    with pytest.raises(InvalidInputError, match="another seed"): mock.make_survey(**usual | other)


def test_a_survey_without_couplings(tmp_path):
    parameters = MockParameters(n_spectra_only=4, couplings="none")
    truth = mock.make_survey(parameters, tmp_path, seed=3, progress=False)
    assert not truth.populations_apart.any()
    light = draw_light(StellarLibrary.load(), 4, 3, "survey", 0, couplings="none")
    assert (truth.log_mass == light.galaxies.log_mass).all()


@pytest.mark.parametrize("below", [".", "below"])
def test_a_folder_that_cannot_be_written(tmp_path, below):
    (tmp_path/"file").write_text("")
    with pytest.raises(SpecpredError, match="cannot be written"):
        mock.make_survey(PARAMETERS, tmp_path/"file"/below, seed=1, progress=False)


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


def test_positions_have_a_centring_error():
    cells, galaxies = mock.draw_survey(MockParameters(n_galaxies=900, galaxies_per_side=15), 1)
    for cell in cells.itertuples():
        inside = galaxies[galaxies.cell == cell.Index]
        wcs = skycell_wcs(cell.ra, cell.dec, cell.side, PS1.pixel_scale)
        found = np.transpose(wcs.all_world2pix(inside.ra, inside.dec, 0))
        error = (found - inside[["x", "y"]].to_numpy())*PS1.pixel_scale
        assert error.std(0) == pytest.approx(mock.CENTRING_ERROR, rel=0.2)
        assert error.mean(0) == pytest.approx(0, abs=0.03)


def test_neighbours_follow_the_counts():
    rng, n, side = random_generator(1, "neighbours"), 400, 60.0
    sources = [source for _ in range(n) for source in mock.draw_sources(side, PS1, rng)]
    area = n*(side/3600)**2  # square degrees
    for is_star, (below_20, below_23) in ((True, (3000, 7500)), (False, (1050, 21_000))):
        r = np.array([-2.5*np.log10(source.flux[1]/AB_ZERO) for source in sources
            if (source.scale == 0) == is_star])
        assert len(r)/area == pytest.approx(below_23, rel=4/np.sqrt(below_23*area))
        bright = (r < 19.8).sum()/area
        assert bright == pytest.approx(below_20, rel=4/np.sqrt(below_20*area) + 0.05)
    assert all(max(abs(source.x), abs(source.y)) <= side/2 for source in sources)


def test_stamps_are_repeated_and_told_apart():
    light = draw_light(StellarLibrary.load(), 3, 2)
    stamps = mock.observe_stamps(light, PS1, 48, seed=4)
    assert stamps.shape == (3, 5, 48, 48)
    assert np.array_equal(stamps, mock.observe_stamps(light, PS1, 48, seed=4), equal_nan=True)
    assert not np.array_equal(stamps, mock.observe_stamps(light, PS1, 48, seed=5), equal_nan=True)
    assert np.isnan(stamps).mean() < 0.1


def test_unknown_galaxies_are_named(survey):
    folder, truth = survey
    with pytest.raises(InvalidInputError, match="1 of 2 galaxies.*specobjid 7"):
        mock.true_spectra(folder, [int(truth.specobjid[3]), 7])


def test_a_damaged_truth_is_named(tmp_path):
    (tmp_path/"truth.h5").write_bytes(b"not HDF5")
    with pytest.raises(DamagedFileError, match=r"truth.h5 cannot be read"):
        mock.true_spectra(tmp_path, [1])


def test_a_seed_below_zero_leaves_nothing_behind(tmp_path):
    with pytest.raises(InvalidInputError, match="seed=-1"):
        mock.make_survey(PARAMETERS, tmp_path/"survey", seed=-1, progress=False)
    assert not (tmp_path/"survey").exists()


def test_unknown_couplings_are_named_before_anything_is_written(tmp_path):
    with pytest.raises(InvalidInputError, match="'legs' is none of"):
        mock.make_survey(MockParameters(n_galaxies=2, couplings="legs"), tmp_path/"new", seed=1)
    assert not (tmp_path/"new").exists()
