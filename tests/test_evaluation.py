"""The information ladder: errors fall where a rung says something new and nowhere else, its
galaxies are observed like the survey's and are none of them, and without couplings structure says
nothing more than magnitudes."""
import numpy as np
import pandas as pd
import pytest

from specpred import evaluation
from specpred.config import MockParameters, SpectraParameters, random_generator
from specpred.evaluation import (
    LADDER_QUANTITIES,
    RUNGS,
    climb,
    ladder_rungs,
    ladder_table,
    magnitude_and_colours,
    make_ladder_sample,
    predict_by_boosting,
)
from specpred.lines import RestFrameSpectra, dn4000
from specpred.mock_light import draw_light, spectrum_at
from specpred.spectrograph import LOGLAM
from specpred.populations import FineBasis, StellarLibrary
from specpred.spectra import rebin
from specpred.surveys import PS1

SIZE = 64  # pixels


def sample_of(n, n_jobs=1):
    return make_ladder_sample(
        n, MockParameters(), PS1, SIZE, SpectraParameters(), 3, n_jobs, progress=False
    )


@pytest.fixture(scope="module")
def sample():
    "Enough galaxies that all subclasses are among them."
    return sample_of(24)


@pytest.fixture(scope="module")
def invented():
    """Three rungs of one column each and two quantities of unit variance: the first is told by the
    first two columns, 0.5 of the variance each, the second by noise."""
    rng = random_generator(0, "test ladder")
    columns = rng.normal(size=(2500, 3))
    told = (columns[:, 0] + columns[:, 1])/np.sqrt(2)
    quantities = pd.DataFrame(dict(redshift=told, target_1=rng.normal(size=2500), target_2=told))
    rungs = {f"rung {k}": pd.DataFrame(columns[:, k:k + 1]) for k in range(3)}
    return rungs, quantities


@pytest.fixture(scope="module")
def table(invented):
    rungs, quantities = invented
    predictions = climb(rungs, quantities, 500, 100, 0, n_jobs=1, progress=False)
    ladder = ladder_table(predictions, quantities[-500:], random_generator(1))
    return ladder.set_index(["quantity", "rung"])


def test_errors_fall_where_a_rung_says_something_new(table):
    redshift = table.loc["redshift"]
    assert redshift.error["rung 0"] == pytest.approx(np.sqrt(0.5), abs=0.05)
    assert redshift.error["rung 1"] < 0.25
    assert redshift.step_lower["rung 1"] > 0.5
    assert redshift.step_lower["rung 2"] < 0.02
    assert redshift.gain["rung 2"] == pytest.approx(
        1 - redshift.error["rung 2"]/redshift.error["rung 0"]
    )


def test_targets_are_pooled(table):
    "One is noise and one is told: half of the variance is left."
    assert list(table.index.unique("quantity")) == ["redshift", "targets"]
    assert table.error["targets", "rung 2"] == pytest.approx(np.sqrt(0.5), abs=0.07)


def test_intervals_hold_the_value_and_are_paired(table):
    for name in ("error", "gain", "step"):
        assert (table[f"{name}_lower"] <= table[name] + 1e-9).all()
        assert (table[f"{name}_upper"] >= table[name] - 1e-9).all()
    # errors of a quantity rise and fall together: their ratio is known better than they are
    noise = table.loc["targets"].loc["rung 2"]
    assert noise.step_upper - noise.step_lower < (noise.error_upper - noise.error_lower)/noise.error


def test_the_interval_of_an_error_is_that_of_theory(table):
    "The rms of 500 Gaussians has an error of 1/sqrt(1000) of itself, and so has their scatter."
    rng = random_generator(2)
    truth = pd.DataFrame(dict(redshift=rng.normal(size=500)))
    predicted = {"noise": truth + 0.5*rng.normal(size=(500, 1))}
    row = ladder_table(predicted, truth, rng).iloc[0]
    expected = 2*1.96*row.error*np.sqrt(2/1000)
    assert row.error_upper - row.error_lower == pytest.approx(expected, rel=0.2)


def test_quantities_that_few_galaxies_have(invented):
    rungs, quantities = invented
    some = quantities.redshift.where(quantities.target_1 > 0).to_frame()
    predictions = climb(rungs, some, 500, 50, 0, n_jobs=1, progress=False)
    ladder = ladder_table(predictions, some[-500:], random_generator(1))
    assert (ladder.n_test == some[-500:].redshift.notna().sum()).all()
    assert np.isfinite(ladder.error).all() and ladder.error.iloc[-1] < 0.4
    few = some.redshift.where(some.index % 100 == 0).to_frame()
    predictions = climb(rungs, few, 500, 50, 0, n_jobs=1, progress=False)
    assert all(p.isna().all(axis=None) for p in predictions.values())


def test_boosting_takes_what_was_not_measured():
    rng = random_generator(3)
    features = rng.normal(size=(400, 2))
    target = features[:, :1].copy()
    features[::7] = np.nan
    predicted = predict_by_boosting(features[:300], target[:300], features[300:], 50, 0)
    assert np.isfinite(predicted).all()
    assert np.corrcoef(predicted[:, 0], target[300:, 0])[0, 1] > 0.8


def test_sample_is_observed_like_the_survey(sample):
    n, parameters = len(sample.galaxies), SpectraParameters()
    assert sample.flux.shape == sample.missing.shape == sample.true.shape == (n, parameters.n_bins)
    both = ~sample.missing & np.isfinite(sample.true)
    assert 0.7 < both.mean() < 1
    ratio = (sample.flux/sample.true)[both & (sample.true > 0)]
    assert np.median(ratio) == pytest.approx(1, abs=0.02)
    brightness = sample.galaxies.petro_r
    assert np.abs(sample.photometry.total_r - brightness).median() < 0.15


def test_its_galaxies_are_not_in_the_survey(sample):
    survey = draw_light(StellarLibrary.load(), 24, 3, "survey", 0).galaxies
    assert not set(sample.galaxies.redshift) & set(survey.redshift)


def test_sample_does_not_depend_on_processes(monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", 3)
    for one, two in zip(sample_of(7), sample_of(7, n_jobs=2), strict=True):
        if isinstance(one, pd.DataFrame): pd.testing.assert_frame_equal(one, two)
        else: np.testing.assert_array_equal(one, two)


def test_lines_are_asked_of_star_forming_galaxies_only(sample):
    quantities = evaluation._true_quantities(sample, SpectraParameters())
    star_forming = sample.galaxies.subclass.isin(["STARFORMING", "STARBURST"])
    assert 0 < star_forming.sum() < len(sample.galaxies)
    for name in ("oiii_hbeta", "gas_metallicity"):
        assert (quantities[name].notna() == star_forming).all()
    assert quantities[["dn4000", "halpha_ew", "redshift"]].notna().all(axis=None)
    assert set(quantities) | {"targets"} == set(LADDER_QUANTITIES)


def test_rungs_hold_every_measured_column_once(sample):
    rungs = ladder_rungs(sample, PS1.bands)
    assert tuple(rungs) == RUNGS
    assert all(len(columns) == len(sample.galaxies) for columns in rungs.values())
    measured = [rungs[name] for name in ("catalogue shapes", "measured structure")]
    names = [name for columns in measured for name in columns]
    assert len(names) == len(set(names))
    assert set(sample.structure) - set(names) == {"position_angle"}


def ladder_of_truth(n=1400, **couplings):
    "Physical quantities from noise-free magnitudes, and from these with the true structure."
    library = StellarLibrary.load()
    fine, light = FineBasis.of(library), draw_light(library, n, 5, "test ladder", **couplings)
    table = light.galaxies
    flux = [spectrum_at(fine, light, k).flux for k in range(n)]
    rest = rebin(flux, None, LOGLAM[0], table.redshift.to_numpy())
    quantities = table[["log_ssfr", "oxygen"]].clip(lower=-14)
    quantities["dn4000"], _ = dn4000(RestFrameSpectra.of(rest.flux, missing=rest.missing))
    magnitudes = table[[f"mag_{band}" for band in PS1.bands]].to_numpy()
    colours = pd.DataFrame(magnitude_and_colours(magnitudes))
    rungs = {"magnitudes": colours, "structure": table[[*evaluation.STRUCTURE]]}
    predictions = climb(rungs, quantities, n//4, 200, 0, n_jobs=1, progress=False)
    ladder = ladder_table(predictions, quantities[-(n//4):], random_generator(6))
    return ladder[ladder.rung == "structure"].set_index("quantity")


def test_without_couplings_structure_says_nothing_more():
    "Gains beyond three standard deviations, of which 95 % intervals have 1.96."
    without, with_all = ladder_of_truth(couplings="none"), ladder_of_truth(couplings="all")
    assert (without.gain < 3/1.96*(without.gain - without.gain_lower)).all(), without.gain
    assert (with_all.gain > 3/1.96*(with_all.gain - with_all.gain_lower)).any(), with_all.gain
