"specpred.eigenspectra: the published numbers, the recipe, memory, and a store that notices damage."
import dataclasses
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from specpred.config import (DamagedFileError, InvalidInputError, MissingInputError,
    SpectraParameters, replace)
from specpred.eigenspectra import SpectrumBasis, build_store, fill, iterative_pca, load_store
from specpred.formats import (SDSSSpectrum, mask_bits, read_sdss, sdss_spectrum_bytes,
    spectrum_name)
from specpred.spectra import LogGrid, galactic_ebv, prepare

REFERENCE = Path(__file__).parent/"reference"
sys.path[:0] = [str(REFERENCE.parents[1]/"benchmarks")]
from literal_pca import literal_pca  # noqa: E402


def galaxy_like(n, bins=300, seed=4):
    "Spectra of eight smooth shapes with noise, and a gap at the blue end."
    rng = np.random.default_rng(seed)
    shapes = np.cumsum(rng.standard_normal((8, bins)), 1)/20
    flux = 4 + rng.standard_normal((n, 8))*0.8**np.arange(8) @ shapes
    flux += 0.05*rng.standard_normal((n, bins))
    return flux*rng.lognormal(0, 1, (n, 1)), np.arange(bins) < rng.integers(0, bins//3, (n, 1))


def test_pca_equals_the_published_numbers():
    reference = np.load(REFERENCE/"iterative_pca.npz")
    fit = iterative_pca(reference["X"], reference["M"], n_components=4, n_iter=12, norm="l2")
    for value, name in ((fit.filled, "filled"), (fit.basis.mean, "mu"), (fit.norms, "norms")):
        np.testing.assert_allclose(value, reference[name], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(fit.basis.eigenvalues, reference["evals"][:4], rtol=1e-5)
    garbage = np.where(reference["M"], np.nan, reference["X"])  # values in missing bins are ignored
    np.testing.assert_array_equal(iterative_pca(garbage, reference["M"], 4, 12).filled, fit.filled)


def test_pca_equals_the_recipe():
    x, missing = galaxy_like(700, seed=1)
    filled, mean, vectors, values = literal_pca(x, missing, 5, 6)
    fit = iterative_pca(x, missing, 5, 6)
    np.testing.assert_allclose(fit.normalised, filled, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(fit.basis.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(fit.basis.eigenvalues, values, rtol=1e-10)
    np.testing.assert_allclose(np.abs(fit.basis.eigenvectors), np.abs(vectors), atol=1e-9)
    told = fit.coefficients @ fit.basis.eigenvectors + fit.basis.mean
    np.testing.assert_allclose(told[missing], fit.normalised[missing], atol=1e-12)


def test_fill_completes_others_as_the_fit_would_have():
    rng = np.random.default_rng(2)
    shapes = np.cumsum(rng.standard_normal((3, 200)), 1)/20
    complete = (4 + rng.standard_normal((300, 3)) @ shapes)*rng.lognormal(0, 1, (300, 1))
    first = rng.integers(0, 170, (300, 1))
    missing = (np.arange(200) >= first) & (np.arange(200) < first + 30)
    fit = iterative_pca(complete[:200], missing[:200], 4, 40)
    others = fill(complete[200:], missing[200:], fit.basis)
    np.testing.assert_allclose(others.filled, complete[200:], rtol=2e-3)  # noiseless
    again = fill(complete[:5], missing[:5], fit.basis)
    np.testing.assert_allclose(again.normalised, fit.normalised[:5], rtol=1e-3)


def test_pca_does_not_depend_on_where_spectra_lie(tmp_path):
    x, missing = galaxy_like(2600)  # three blocks
    x = x.astype(np.float32)
    chosen = np.random.default_rng(5).random(len(x)) < 0.8
    here = iterative_pca(x[chosen], missing[chosen], 5, 8)
    np.save(tmp_path/"flux.npy", x)
    np.save(tmp_path/"missing.npy", missing)
    flux, gaps = (np.load(tmp_path/f"{name}.npy", mmap_mode="r") for name in ("flux", "missing"))
    out = np.full(x.shape, np.nan)
    there = iterative_pca(flux, gaps, 5, 8, rows=chosen, out=out)
    others = fill(flux, gaps, there.basis, rows=~chosen)
    np.testing.assert_allclose(out[chosen], here.normalised, rtol=1e-10)
    assert np.isnan(out[~chosen]).all()
    for name in ("norms", "coefficients"):
        np.testing.assert_allclose(getattr(there, name), getattr(here, name), rtol=1e-10)
    expected = fill(x[~chosen], missing[~chosen], here.basis)
    np.testing.assert_allclose(others.normalised, expected.normalised, rtol=1e-7)


def good_sample(n=40, bins=60):
    rng = np.random.default_rng(3)
    shapes = np.cumsum(rng.standard_normal((2, bins)), 1)/10
    noise = 0.01*rng.standard_normal((n, bins))
    return 3 + rng.standard_normal((n, 2)) @ shapes + noise, np.zeros((n, bins), bool)


@pytest.mark.parametrize("array, index, value, words", [
    ("missing", np.s_[:, [3, 17]], True, "bins 3, 17"), ("missing", np.s_[5], True, "row 5"),
    ("missing", np.s_[[5, 7, 8], 2:], True, "rows 5, 7, 8"), ("x", np.s_[7, 30], np.nan, "row 7"),
    ("x", np.s_[9, 1], np.inf, "row 9"), ("x", 4, 0, "row 4")])
def test_pca_names_unusable_rows_and_bins(array, index, value, words):
    x, missing = good_sample()
    dict(x=x, missing=missing)[array][index] = value
    with pytest.raises(InvalidInputError, match=words): iterative_pca(x, missing, 3, 4)
    later = np.arange(42) >= 2  # rows are those of the whole table
    shifted = np.pad(x, ((2, 0), (0, 0))), np.pad(missing, ((2, 0), (0, 0)))
    if "bins" not in words:
        number = int(words.split()[1].strip(",")) + 2
        with pytest.raises(InvalidInputError, match=str(number)):
            iterative_pca(*shifted, 3, 4, rows=later)


def test_coefficients_that_nothing_measures_name_the_row():
    vectors = np.zeros((2, 60))
    vectors[[0, 1], [0, 1]] = 1
    basis = SpectrumBasis(np.full(60, 0.1), vectors, np.ones(2), 3, "l2", 10)
    x, missing = good_sample(5)
    missing[3, :2] = True
    with pytest.raises(InvalidInputError, match="Leave out row 3"): fill(x, missing, basis)


def test_pca_refuses_shapes_and_numbers():
    x, missing = good_sample()
    for arguments in ((x, missing[:, 1:], 3), (x, missing.astype(int), 3), (x, missing, 0),
            (x, missing, 60), (x[:3], missing[:3], 3)):
        with pytest.raises(InvalidInputError): iterative_pca(*arguments)
    for more in (dict(n_iter=0), dict(norm="max"), dict(rows=np.zeros(40, bool)),
            dict(rows=np.arange(40)), dict(rows=np.ones(30, bool)), dict(out=np.empty((41, 60)))):
        with pytest.raises(InvalidInputError):
            iterative_pca(x, missing, **dict(n_components=3, n_iter=4) | more)
    basis = iterative_pca(x, missing, 3, 4).basis
    with pytest.raises(InvalidInputError): fill(x[:, :50], missing[:, :50], basis)
    with pytest.raises(InvalidInputError): fill(x, missing, basis, out=np.empty((39, 60)))


@pytest.mark.parametrize("kind", [lambda x: x.astype(np.float32), np.asfortranarray,
    lambda x: np.repeat(x, 2, 1)[:, ::2], lambda x: x.astype(">f8")])
def test_gap_filling_leaves_its_input_as_it_was(kind):
    x, missing = good_sample()
    missing[np.random.default_rng(5).random(x.shape) < 0.1] = True
    expected, read_only = iterative_pca(x, missing, 3, 4), kind(x)
    read_only.flags.writeable = missing.flags.writeable = False
    fit = iterative_pca(read_only, missing, 3, 4)
    np.testing.assert_allclose(fit.filled, expected.filled, rtol=1e-4)
    np.testing.assert_allclose(fill(read_only, missing, fit.basis).filled,
        fill(x, missing, expected.basis).filled, rtol=1e-4)
    np.testing.assert_array_equal(read_only, kind(x))


def test_gap_filling_takes_no_more_memory_for_more_spectra(tmp_path):
    "Beside the result: norms and coefficients, 4 numbers a spectrum; a spectrum has 300."
    peaks = {}
    for n in (2048, 8192):
        x, missing = good_sample(n, 300)
        missing[:, :5] = np.arange(n)[:, None] % 3 == 0
        np.save(tmp_path/"x.npy", x.astype(np.float32))
        np.save(tmp_path/"missing.npy", missing)
        mapped = [np.load(tmp_path/f"{name}.npy", mmap_mode="r") for name in ("x", "missing")]
        out = np.lib.format.open_memmap(tmp_path/"out.npy", "w+", np.float32, (n, 300))
        tracemalloc.start()
        fit = iterative_pca(*mapped, 3, 2, out=out)
        fill(*mapped, fit.basis, out=out)
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # bytes a spectrum; one in double precision has 2,400
    assert (peaks[8192] - peaks[2048])/6144 < 240, peaks


@pytest.fixture
def sixteen(tmp_path):
    "Files of sixteen galaxies, their table, and parameters for a sample so small."
    table = pd.DataFrame(dict(specobjid=2**60 + np.arange(16, dtype=np.uint64), plate=266,
        mjd=51602, fiberid=1 + np.arange(16), redshift=np.linspace(0.01, 0.2, 16),
        has_spectrum=True, split=["train", "train", "train", "test"]*4, extinction_r=0.1))
    n = 3830
    for g in table.itertuples():
        flux = 10 + np.random.default_rng(g.fiberid).normal(0, 1, n).astype(np.float32)
        spectrum = SDSSSpectrum(flux, np.ones(n, np.float32), np.zeros(n, np.uint32), 3.58,
            g.redshift, 0, "GALAXY", "", 150., 2., g.plate, g.mjd, g.fiberid,
            np.zeros(n, np.uint32), flux)
        file = tmp_path/spectrum_name(g.plate, g.mjd, g.fiberid)
        file.write_bytes(sdss_spectrum_bytes(spectrum))
    parameters = SpectraParameters(n_components=2, n_iter=3, n_bins=900, loglam0=3.57,
        extinction="F99")
    return table, tmp_path, parameters


def test_unusable_rows_are_left_out_and_counted(sixteen):
    table, folder, parameters = sixteen
    other = folder/spectrum_name(266, 51602, 3)
    (folder/spectrum_name(266, 51602, 2)).write_bytes(other.read_bytes())
    table.loc[5, "extinction_r"] = np.nan
    table.loc[6, "extinction_r"] = -9999
    table.loc[8, "redshift"] = np.nan
    table.loc[9, "has_spectrum"] = False
    table.loc[11, "redshift"] = 3
    left_out = build_store(table, folder, folder/"store", parameters, progress=False)
    assert left_out == {"file of another spectrum": 1, "no extinction": 2, "no redshift": 1,
        "no spectrum": 1, "more than 50% of the bins missing": 1}
    store = load_store(folder/"store")
    np.testing.assert_array_equal(store.specobjid, table.specobjid.drop([1, 5, 6, 8, 9, 11]))
    row = table.loc[10]
    alone = prepare([read_sdss(folder/spectrum_name(row.plate, row.mjd, row.fiberid))],
        [row.redshift], LogGrid(900, 3.57), ebv=galactic_ebv([0.1]))
    at = store.specobjid == row.specobjid
    np.testing.assert_allclose(store.flux[at], alone.flux, rtol=1e-6)
    known = ~store.missing[at]
    filled = (store.filled*store.norm[:, None])[at]
    np.testing.assert_allclose(filled[known], store.flux[at][known], rtol=1e-5)


def test_spectra_of_other_positions_are_left_out(sixteen):
    table, folder, parameters = sixteen
    table = table.assign(ra=150.0, dec=2.0)
    table.loc[3, "ra"] += 0.5/3600
    table.loc[4, "ra"] = 27.95
    for limit, n_elsewhere in ((3, 1), (0.1, 2)):
        left_out = build_store(table, folder, folder/"store", parameters, limit, progress=False)
        assert left_out == {"spectrum of another position": n_elsewhere}


def test_fibres_of_several_diameters_are_reported(sixteen):
    table, folder, parameters = sixteen
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        build_store(table, folder, folder/"store", parameters, progress=False)
    assert (load_store(folder/"store").fibre_diameter == 3).all()
    table.loc[[0, 5], "plate"] = 3586, 3510
    for row in table.loc[[0, 5]].itertuples():
        spectrum = read_sdss(folder/spectrum_name(266, row.mjd, row.fiberid))
        content = sdss_spectrum_bytes(dataclasses.replace(spectrum, plate=row.plate))
        (folder/spectrum_name(row.plate, row.mjd, row.fiberid)).write_bytes(content)
    with pytest.warns(UserWarning, match="mixed: 2 of 2 arcsec, 14 of 3 arcsec"):
        build_store(table, folder, folder/"store", parameters, progress=False)
    assert (load_store(folder/"store").fibre_diameter == np.where(table.plate > 266, 2, 3)).all()


def test_settings_of_a_profile_enter_the_store(sixteen):
    table, folder, parameters = sixteen
    file = folder/spectrum_name(266, 51602, 1)
    flagged = read_sdss(file)
    flagged.and_mask[1000:1040] |= mask_bits(["BRIGHTSKY"])
    file.write_bytes(sdss_spectrum_bytes(flagged))

    def store_with(**changes):
        settings = replace(parameters, **changes)
        build_store(table, folder, folder/"store", settings, progress=False)
        return load_store(folder/"store")

    plain = store_with()
    assert store_with(bad_bits=("BRIGHTSKY",)).missing[0].sum() > plain.missing[0].sum() + 5
    assert np.nanmedian(plain.flux/store_with(extinction="none").flux) > 1.05


def test_catalogues_that_are_refused(sixteen):
    table, folder, parameters = sixteen
    for wrong, words in ((pd.concat([table, table[:1]]), "listed twice"),
            (table.drop(columns="redshift"), "no column redshift"),
            (table.drop(columns=["split", "mjd"]), "no column mjd, split"),
            (table.drop(columns="extinction_r"), "no column extinction_r"),
            (table.assign(has_spectrum=False), "training"),
            (table.assign(split="test"), "training")):
        with pytest.raises(InvalidInputError, match=words):
            build_store(wrong, folder, folder/"store", parameters, progress=False)
    assert {path.suffix for path in folder.iterdir()} == {".fits"}  # nothing half-made is left
    with pytest.raises(MissingInputError): load_store(folder/"store")


def test_a_damaged_store_is_noticed(sixteen):
    table, folder, parameters = sixteen
    build_store(table, folder, folder/"store", parameters, progress=False)
    files = sorted((folder/"store").iterdir())
    assert len(load_store(folder/"store").norm) == 16 and len(files) == 13
    for file in files:
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[len(content)//2] ^= 8
        for damaged in (None, content[:len(content)//2], flipped, b""):
            if damaged is None: file.unlink()
            else: file.write_bytes(damaged)
            if file.name == "store.json" and damaged is flipped: continue  # of settings only
            with pytest.raises(DamagedFileError, match="18_eigenspectra makes it"):
                load_store(folder/"store")
        file.write_bytes(content)
    assert len(load_store(folder/"store").norm) == 16
