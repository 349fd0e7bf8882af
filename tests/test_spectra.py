"specpred.spectra: properties of the rebinning, the published numbers of the iterative PCA, and real SDSS files where they are to be had."
import sys, tracemalloc
from pathlib import Path

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st

from specpred.config import (DamagedFileError, InvalidInputError, MissingInputError,
    SpectraParameters)
from specpred.spectra import (DLOGLAM, LogGrid, RebinnedSpectra, SDSSSpectrum, build_store, deredden, extinction, fill, from_specutils, galactic_ebv,
    iterative_pca, load_store, mask_bits, neighbour_covariance, noise_spikes, prepare, read_sdss, rebin, to_rest_frame)

REFERENCE = Path(__file__).parent/"reference"
sys.path[:0] = [str(REFERENCE.parents[1]/"benchmarks")]
from literal_pca import literal_pca
from real_spectra import mean_between

redshifts = st.floats(0, 0.36)
seeds = st.integers(0, 2**32 - 1)
starts = st.floats(3.45, 3.5)  # log10 of the first pixel: blue enough to cover the grid at any of these redshifts
N_NATIVE = 6200
GRID = LogGrid()


def native_edges(loglam0, n, dloglam=1e-4):
    return 10**(loglam0 + dloglam*(np.arange(n + 1) - 0.5))


def native_spectrum(seed, n=N_NATIVE):
    return np.random.default_rng(seed).lognormal(0, 1, n)


@settings(max_examples=20, deadline=None)
@given(seeds, starts, st.lists(redshifts, min_size=1, max_size=4))
def test_the_integral_over_wavelength_is_conserved(seed, loglam0, z):
    flux = np.stack([native_spectrum(seed + i) for i in range(len(z))])
    out = rebin(flux, None, loglam0, z)
    assert not out.missing.any()
    for i in range(len(z)):
        edges = native_edges(loglam0, N_NATIVE)/(1 + z[i])
        cumulative = np.append(0, np.cumsum(flux[i]*np.diff(edges)))
        expected = np.diff(np.interp(GRID.edges, edges, cumulative))
        assert (out.flux[i]*GRID.widths).sum() == pytest.approx(expected.sum(), rel=1e-10)
        np.testing.assert_allclose(out.flux[i]*GRID.widths, expected, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(3.55, 3.65), redshifts, st.integers(2000, 4000))
def test_the_integral_over_the_covered_range_is_conserved(seed, loglam0, z, n):
    flux = native_spectrum(seed, n)
    out = rebin(flux, None, loglam0, z, min_coverage=1)
    edges = native_edges(loglam0, n)/(1 + z)
    covered = (GRID.edges[:-1] >= edges[0]) & (GRID.edges[1:] <= edges[-1])
    assert (~out.missing[0])[covered].all() and out.missing[0][~covered].sum() >= (~covered).sum() - 2
    first, last = np.flatnonzero(covered)[[0, -1]]
    expected = np.diff(np.interp(GRID.edges[[first, last + 1]], edges, np.append(0, np.cumsum(flux*np.diff(edges)))))[0]
    assert (out.flux[0]*GRID.widths)[first:last + 1].sum() == pytest.approx(expected, rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.floats(-1e3, 1e3), starts, redshifts, st.floats(0.5e-4, 4e-4))
def test_a_constant_stays_constant(level, loglam0, z, dloglam):
    n = int(0.65/dloglam)
    out = rebin(np.full(n, level), None, loglam0, z, dloglam=dloglam)
    np.testing.assert_allclose(out.flux[~out.missing], level, rtol=1e-10, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.floats(3500, 8200), redshifts, starts, st.floats(150, 400))
def test_a_lines_flux_and_centroid_survive(centre, z, loglam0, sigma):
    # a line much narrower than a bin of 269 km/s can be anywhere in it
    x = loglam0 + 1e-4*np.arange(N_NATIVE) - np.log10(1 + z)
    width = sigma/299792.458/np.log(10)
    native = np.exp(-0.5*((x - np.log10(centre))/width)**2)
    widths = np.diff(native_edges(loglam0, N_NATIVE))/(1 + z)
    out = rebin(native, None, loglam0, z).flux[0]
    # a line at the grid's edge would be cut off
    inside = (10**(np.log10(centre) - 6*width) > GRID.edges[0]) and (10**(np.log10(centre) + 6*width) < GRID.edges[-1])
    if not inside: return
    total = (out*GRID.widths).sum()
    assert total == pytest.approx((native*widths).sum(), rel=1e-6)
    bin_width = np.interp(centre, GRID.wavelength, GRID.widths)
    assert abs((out*GRID.widths*GRID.wavelength).sum()/total - centre) < 0.05*bin_width


@settings(max_examples=15, deadline=None)
@given(seeds, starts, redshifts, st.sampled_from([2, 4, 5, 10]))
def test_rebinning_twice_is_once_onto_the_coarser_grid(seed, loglam0, z, factor):
    coarse = LogGrid(GRID.n_bins//factor, GRID.loglam0 + GRID.dloglam*(factor - 1)/2, GRID.dloglam*factor)
    flux = native_spectrum(seed)
    once = rebin(flux, None, loglam0, z, coarse).flux
    twice = rebin(rebin(flux, None, loglam0, z).flux, None, GRID.loglam0, 0, coarse, GRID.dloglam).flux
    np.testing.assert_allclose(twice, once, rtol=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.floats(3, 4), st.floats(-0.5, 10))
def test_a_round_trip_of_redshift_is_the_identity(loglam, z):
    assert to_rest_frame(to_rest_frame(loglam, z), 1/(1 + z) - 1) == pytest.approx(loglam, abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(seeds, redshifts)
def test_a_galaxy_put_at_a_redshift_comes_back(seed, z):
    flux = native_spectrum(seed, GRID.n_bins)
    back = rebin(flux, None, GRID.loglam0 + np.log10(1 + z), z, GRID, GRID.dloglam)
    np.testing.assert_allclose(back.flux[0], flux, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seeds, st.lists(redshifts, min_size=2, max_size=6))
def test_spectra_do_not_see_each_other(seed, z):
    rng = np.random.default_rng(seed)
    flux, ivar = rng.normal(1, 1, (len(z), 4000)), rng.exponential(1, (len(z), 4000))*(rng.random((len(z), 4000)) > 0.05)
    loglam0 = rng.uniform(3.55, 3.6, len(z))
    together = rebin(flux, ivar, loglam0, z)
    for i in range(len(z)):
        alone = rebin(flux[i], ivar[i], loglam0[i], z[i])
        for name in ("flux", "error", "missing"): np.testing.assert_array_equal(getattr(together, name)[i], getattr(alone, name)[0])


def test_propagated_errors_are_the_scatter_and_published_ones_the_mean():
    rng = np.random.default_rng(0)
    sigma = rng.uniform(0.5, 2, 5000)
    noise = sigma*rng.standard_normal((1500, 5000))
    grid = LogGrid(60, 3.6)
    ivar = np.broadcast_to(sigma**-2, noise.shape)
    out = rebin(noise, ivar, 3.55, 0.05, grid)
    np.testing.assert_allclose(out.flux.std(0), out.error[0], rtol=0.1)
    published = rebin(np.ones(5000), sigma**-2, 3.55, 0.05, grid, error="published")
    np.testing.assert_allclose(published.error[0], rebin(sigma, None, 3.55, 0.05, grid).flux[0], rtol=1e-9)
    assert 1.8 < np.mean(published.error[0]/out.error[0]) < 2.2


@settings(max_examples=10, deadline=None)
@given(seeds, st.lists(redshifts, min_size=1, max_size=3))
def test_covariance_of_neighbours_is_that_of_the_weights(seed, z):
    "The linear map from pixels to bins, column by column, gives the same matrix."
    rng, small, n = np.random.default_rng(seed), LogGrid(12, 3.6), 90
    ivar = rng.uniform(0.5, 2, (len(z), n))*(rng.random((len(z), n)) > 0.1)
    ours = neighbour_covariance(ivar, 3.6 + np.log10(1 + np.array(z)) - 2e-3, z, small)
    for i in range(len(z)):
        weights = np.nan_to_num(rebin(np.eye(n), np.broadcast_to(ivar[i], (n, n)), 3.6 + np.log10(1 + z[i]) - 2e-3, z[i], small).flux)
        full = weights.T @ np.diag(np.divide(1, ivar[i], where=ivar[i] > 0, out=np.zeros(n))) @ weights
        np.testing.assert_allclose(ours[i], np.diag(full, 1), atol=1e-12)
        np.testing.assert_allclose(np.diag(full, 2), 0, atol=1e-12)


def test_what_was_not_measured_is_missing_and_not_zero():
    ivar = np.ones(3800)
    ivar[1000:1100], ivar[2000] = 0, 0
    flux = np.ones(3800)
    flux[1000:1100], flux[2000], flux[3000] = 1e9, np.nan, np.inf
    out = rebin(flux, ivar, 3.58, 0.1)
    loglam = GRID.loglam + np.log10(1.1)
    assert out.missing[0][(loglam < 3.579) | (loglam > 3.961)].all() and np.isnan(out.flux[0][loglam < 3.579]).all()
    assert out.missing[0][(loglam > 3.6802) & (loglam < 3.6896)].all()
    np.testing.assert_allclose(out.flux[0][~out.missing[0]], 1, rtol=1e-12)  # bad pixels leave no trace
    assert not out.missing[0][np.abs(loglam - 3.78) < 3e-4].any()  # one lost pixel of four is no gap


@pytest.mark.parametrize("bad", [dict(redshift=np.nan), dict(redshift=-1.), dict(error="rms"), dict(ivar=np.ones(7)), dict(loglam0=np.nan),
    dict(loglam0=3800.), dict(redshift=[0.1, 0.2]), dict(loglam0=[3.5, 3.5]), dict(flux=np.ones((2, 2, 4000))), dict(flux=np.ones((0, 4000))),
    dict(dloglam=0), dict(min_coverage=np.nan), dict(min_coverage=2)])
def test_rebin_refuses(bad):
    arguments = dict(flux=np.ones(4000), ivar=None, loglam0=3.58, redshift=0.1) | bad
    with pytest.raises(InvalidInputError): rebin(**arguments)
    if not set(bad) & {"error", "flux", "ivar", "min_coverage"}:
        with pytest.raises(InvalidInputError): neighbour_covariance(**dict(ivar=np.ones((3, 4000)), loglam0=3.58, redshift=0.1) | bad)


def test_grids_and_samples_that_cannot_be():
    for wrong in (dict(n_bins=0), dict(dloglam=0.), dict(dloglam=-1e-4), dict(loglam0=3388.), dict(loglam0=np.nan)):
        with pytest.raises(InvalidInputError): LogGrid(**wrong)
    with pytest.raises(InvalidInputError, match="no spectrum to prepare"): prepare([])
    with pytest.raises(InvalidInputError, match="one a spectrum"): prepare([some_spectrum()], redshift=[0.1, 0.2])
    with pytest.raises(InvalidInputError, match="one a spectrum"): prepare([some_spectrum()], ebv=np.array([0.1, 0.2]))


def test_spike_rule_masks_sky_lines_and_spares_the_galaxys():
    flux, error = np.ones((1, 300)), np.ones((1, 300))
    error[0, 80] = 3  # a sky line
    error[0, 200], flux[0, 200] = 3, 50  # an emission line with its photon noise
    spectra = RebinnedSpectra(flux, error, np.zeros((1, 300), bool), np.full(1, 10.))
    assert np.flatnonzero(noise_spikes(spectra)).tolist() == [78, 79, 80, 81, 82]
    assert noise_spikes(spectra, spare_lines=False)[0, 200]


def test_pca_equals_the_published_numbers():
    reference = np.load(REFERENCE/"iterative_pca.npz")
    found = iterative_pca(reference["X"], reference["M"], n_components=4, n_iter=12, norm="l2")
    for name, value in dict(filled=found.filled, mu=found.mean, norms=found.norms).items():
        np.testing.assert_allclose(value, reference[name], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(found.eigenvalues, reference["evals"][:4], rtol=1e-5)
    garbage = np.where(reference["M"], np.nan, reference["X"])  # what stands in missing bins does not matter
    np.testing.assert_array_equal(iterative_pca(garbage, reference["M"], 4, 12).filled, found.filled)


def test_pca_by_krylov_space_equals_the_recipe():
    rng = np.random.default_rng(1)
    shapes = np.cumsum(rng.standard_normal((8, 300)), 1)/20
    x = (4 + rng.standard_normal((700, 8))*0.8**np.arange(8) @ shapes + 0.05*rng.standard_normal((700, 300)))*rng.lognormal(0, 1, (700, 1))
    missing = np.arange(300) < rng.integers(0, 90, (700, 1))
    filled, mean, vectors, values = literal_pca(x, missing, 5, 6)
    found = iterative_pca(x, missing, 5, 6)
    np.testing.assert_allclose(found.normalised, filled, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-8)
    np.testing.assert_allclose(found.eigenvalues, values, rtol=1e-7)
    np.testing.assert_allclose(np.abs(found.eigenvectors), np.abs(vectors), atol=1e-5)
    centred = found.normalised - found.mean
    np.testing.assert_allclose(np.where(missing, found.coefficients @ found.eigenvectors - centred, 0), 0, atol=1e-9)


def test_fill_completes_others_as_the_fit_would_have():
    rng = np.random.default_rng(2)
    shapes = np.cumsum(rng.standard_normal((3, 200)), 1)/20
    complete = (4 + rng.standard_normal((300, 3)) @ shapes)*rng.lognormal(0, 1, (300, 1))
    first = rng.integers(0, 170, (300, 1))
    missing = (np.arange(200) >= first) & (np.arange(200) < first + 30)
    fitted = iterative_pca(complete[:200], missing[:200], 4, 40)
    told = fill(complete[200:], missing[200:], fitted.basis)
    np.testing.assert_allclose(told.filled, complete[200:], rtol=2e-3)  # noiseless: the gaps are known
    np.testing.assert_allclose(fill(complete[:5], missing[:5], fitted).normalised, fitted.normalised[:5], rtol=1e-3)


def galaxy_like(n, bins=300, seed=4):
    rng = np.random.default_rng(seed)
    shapes = np.cumsum(rng.standard_normal((8, bins)), 1)/20
    flux = (4 + rng.standard_normal((n, 8))*0.8**np.arange(8) @ shapes + 0.05*rng.standard_normal((n, bins)))*rng.lognormal(0, 1, (n, 1))
    return flux.astype(np.float32), np.arange(bins) < rng.integers(0, bins//3, (n, 1))


@pytest.mark.parametrize("kind", ["memmap", "zarr", "torch on the cpu"])
def test_pca_does_not_depend_on_where_spectra_lie_or_are_computed(tmp_path, kind):
    import zarr
    x, missing = galaxy_like(2600)  # three blocks
    chosen = np.random.default_rng(5).random(len(x)) < 0.8
    here = iterative_pca(x[chosen], missing[chosen], 5, 8)
    arguments = dict(rows=chosen)
    if kind == "memmap":
        flux, gaps = np.memmap(tmp_path/"flux", np.float32, "w+", shape=x.shape), np.memmap(tmp_path/"missing", bool, "w+", shape=x.shape)
        arguments["out"] = np.memmap(tmp_path/"out", np.float64, "w+", shape=(chosen.sum(), x.shape[1]))
    elif kind == "zarr":
        group = zarr.open_group(tmp_path/"store.zarr", mode="w")
        flux, gaps = (group.create_array(name, shape=x.shape, chunks=(1024, 300), dtype=a.dtype) for name, a in (("flux", x), ("missing", missing)))
        arguments["out"] = group.create_array("out", shape=(int(chosen.sum()), 300), chunks=(1024, 300), dtype="f8")
    else: flux, gaps, arguments["device"] = x, missing, "cpu"
    if kind != "torch on the cpu": flux[:], gaps[:] = x, missing
    there = iterative_pca(flux, gaps, 5, 8, **arguments)
    for name in ("normalised", "norms", "coefficients", "mean", "eigenvectors", "eigenvalues"):
        np.testing.assert_allclose(getattr(there, name)[:], getattr(here, name), rtol=1e-8, atol=1e-9, err_msg=name)
    told = fill(flux, gaps, there, rows=~chosen, device=arguments.get("device"))
    np.testing.assert_allclose(told.normalised, fill(x[~chosen], missing[~chosen], here).normalised, rtol=1e-7)


def test_pca_names_rows_of_the_whole_table():
    x, missing = galaxy_like(60)
    rows = np.arange(60) >= 20
    x[41, 299] = np.nan
    with pytest.raises(InvalidInputError, match="row 41, first in bin 299"): iterative_pca(x, missing, 3, 2, rows=rows)
    for bad in (rows[:30], np.arange(60)):
        with pytest.raises(InvalidInputError, match="booleans"): iterative_pca(x, missing, 3, 2, rows=bad)


def good_sample(n=40, bins=60):
    rng = np.random.default_rng(3)
    return (3 + rng.standard_normal((n, 2)) @ np.cumsum(rng.standard_normal((2, bins)), 1)/10 + 0.01*rng.standard_normal((n, bins)),
        np.zeros((n, bins), bool))


@pytest.mark.parametrize("spoil, words", [
    (lambda x, m: m.__setitem__((slice(None), [3, 17]), True), "bins 3, 17"),
    (lambda x, m: m.__setitem__(12, True), "row 12"),
    (lambda x, m: m.__setitem__((5, slice(2, None)), True), "row 5"),
    (lambda x, m: x.__setitem__((7, 30), np.nan), "row 7, first in bin 30"),
    (lambda x, m: x.__setitem__((9, 1), np.inf), "row 9, first in bin 1"),
    (lambda x, m: x.__setitem__(4, 0), "row 4")])
def test_pca_names_what_is_wrong(spoil, words):
    x, missing = good_sample()
    spoil(x, missing)
    with pytest.raises(InvalidInputError, match=words): iterative_pca(x, missing, 3, 4)


def test_pca_refuses_shapes_and_numbers():
    x, missing = good_sample()
    for arguments in ((x, missing[:, 1:], 3), (x, missing.astype(int), 3), (x, missing, 0), (x, missing, 60), (x[:3], missing[:3], 3)):
        with pytest.raises(InvalidInputError): iterative_pca(*arguments)
    for more in (dict(n_iter=0), dict(rows=np.zeros(40, bool)), dict(out=np.empty((41, 60))), dict(out=np.empty((40, 60), int))):
        with pytest.raises(InvalidInputError): iterative_pca(x, missing, **dict(n_components=3, n_iter=4) | more)
    with pytest.raises(InvalidInputError, match="real"): iterative_pca(x + 0j, missing, 3, 4)
    basis = iterative_pca(x, missing, 3, 4)
    with pytest.raises(InvalidInputError): fill(x[:, :50], missing[:, :50], basis)
    with pytest.raises(InvalidInputError): fill(x, missing, basis, out=np.empty((39, 60)))


@pytest.mark.parametrize("kind", [lambda x: x.astype(np.float32), np.asfortranarray, lambda x: np.repeat(x, 2, 1)[:, ::2], lambda x: x.astype(">f8")])
def test_gap_filling_leaves_what_it_is_given_as_it_was(kind):
    x, missing = good_sample()
    missing[np.random.default_rng(5).random(x.shape) < 0.1] = True
    given, expected = kind(x), iterative_pca(x, missing, 3, 4)
    given.flags.writeable = missing.flags.writeable = False
    found = iterative_pca(given, missing, 3, 4)
    np.testing.assert_allclose(found.filled, expected.filled, rtol=1e-4)
    np.testing.assert_allclose(fill(given, missing, found).filled, fill(x, missing, expected).filled, rtol=1e-4)
    np.testing.assert_array_equal(given, kind(x))


def test_gap_filling_takes_no_more_memory_for_more_spectra(tmp_path):
    "Beside what it answers: norms and coefficients, 5 numbers a spectrum here, while a spectrum has 300."
    peaks = {}
    for n in (2048, 8192):
        x, missing = good_sample(n, 300)
        missing[:, :5] = np.arange(n)[:, None] % 3 == 0
        for name, values in dict(x=x.astype(np.float32), missing=missing).items(): np.save(tmp_path/f"{name}.npy", values)
        given = [np.load(tmp_path/f"{name}.npy", mmap_mode="r") for name in ("x", "missing")]
        out = np.lib.format.open_memmap(tmp_path/"out.npy", "w+", np.float32, (n, 300))
        tracemalloc.start()
        basis = iterative_pca(*given, 3, 2, out=out, device=None)
        fill(*given, basis, out=out)
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (peaks[8192] - peaks[2048])/6144 < 240, peaks  # bytes a spectrum; one in double precision has 2,400


def test_mask_bits_by_name():
    assert mask_bits(["NODATA", "BRIGHTSKY"]) == 2**24 | 2**23
    with pytest.raises(InvalidInputError, match="NODATUM"): mask_bits(["NODATUM"])


def some_spectrum(n=3000, seed=6):
    rng = np.random.default_rng(seed)
    ivar = np.where(rng.random(n) < 0.02, 0, rng.uniform(0.5, 2, n))
    bits = np.where(ivar == 0, mask_bits(["NODATA"]), 0).astype(np.uint32)
    return SDSSSpectrum(rng.normal(10, 3, n).astype(np.float32), ivar.astype(np.float32), bits, 3.5812, 0.1234, 0, "GALAXY", "STARFORMING",
        150.1, 2.2, 266, 51602, 17, bits | mask_bits(["BRIGHTSKY"]), rng.normal(10, 1, n).astype(np.float32))


def write_spspec(path, spectrum, n_rows=5, **cards):
    from astropy.io import fits
    error = np.where(spectrum.ivar > 0, np.maximum(spectrum.ivar, 1e-9)**-0.5, 0)
    hdu = fits.PrimaryHDU(np.stack([spectrum.flux, 0*error, error, spectrum.and_mask, spectrum.model])[:n_rows].astype(np.float32))
    hdu.header.update(dict(COEFF0=spectrum.loglam0, COEFF1=1e-4, Z=spectrum.redshift, RAOBJ=150.1, DECOBJ=2.2,
        PLATEID=266, MJD=51602, FIBERID=17, SPEC_CLN=2) | cards)
    hdu.writeto(path)


def test_files_of_the_old_layout(tmp_path):
    spectrum = some_spectrum()
    for n_rows in (4, 5):
        write_spspec(tmp_path/f"spSpec-51602-0266-01{n_rows}.fit", spectrum, n_rows)
        found = read_sdss(tmp_path/f"spSpec-51602-0266-01{n_rows}.fit")
        np.testing.assert_array_equal(found.flux, spectrum.flux)
        np.testing.assert_allclose(found.ivar, spectrum.ivar, rtol=1e-5)
        np.testing.assert_array_equal(found.and_mask, spectrum.and_mask)
        assert found.model is None and found.or_mask is None  # the data model does not know them
        assert (found.loglam0, found.redshift, found.object_class, found.plate, found.mjd, found.fiberid, found.ra, found.dec) == (
            3.5812, 0.1234, "GALAXY", 266, 51602, 17, 150.1, 2.2)
    whole = (tmp_path/"spSpec-51602-0266-015.fit").read_bytes()
    (tmp_path/"cut.fit").write_bytes(whole[:20_000])
    write_spspec(tmp_path/"coarse.fit", spectrum, COEFF1=2e-4)
    write_spspec(tmp_path/"rows.fit", spectrum, 2)
    write_spspec(tmp_path/"nan.fit", spectrum, Z="unknown")
    for name in ("cut", "coarse", "rows", "nan"):
        with pytest.raises(DamagedFileError): read_sdss(tmp_path/f"{name}.fit")


def test_there_and_back_to_specutils():
    from astropy import units as u
    from astropy.nddata import StdDevUncertainty
    from specutils import Spectrum
    spectrum = some_spectrum()
    theirs = spectrum.to_specutils()
    assert theirs.flux.unit.is_equivalent(u.erg/u.s/u.cm**2/u.AA) and (theirs.mask == (spectrum.ivar == 0)).all()
    np.testing.assert_allclose(theirs.spectral_axis.to_value(u.nm)*10, spectrum.wavelength)
    back = from_specutils(theirs)
    for name in SDSSSpectrum.__dataclass_fields__:
        (np.testing.assert_allclose(getattr(back, name), getattr(spectrum, name), rtol=1e-6) if not isinstance(getattr(back, name), str)
            else (getattr(back, name) == getattr(spectrum, name)))
    plain = Spectrum(flux=np.array([1., 0, 2])*u.Jy, spectral_axis=6000*10**(DLOGLAM*np.arange(3))*u.AA,
        uncertainty=StdDevUncertainty([0.1, 0.2, 0.1]*u.Jy))
    found = from_specutils(plain)
    per_jansky = 1e17*1e-23*2.99792458e18/6000**2
    np.testing.assert_allclose(found.flux[0], per_jansky, rtol=1e-4), np.testing.assert_allclose(found.ivar[0], (0.1*per_jansky)**-2, rtol=1e-4)
    assert found.flux[1] == 0 and found.redshift == 0


def test_specutils_spectra_that_are_none_of_sdss():
    from astropy import units as u
    from specutils import Spectrum
    linear = Spectrum(flux=np.ones(50)*u.Jy, spectral_axis=np.linspace(5000, 6000, 50)*u.AA)
    counts = Spectrum(flux=np.ones(50)*u.count, spectral_axis=6000*10**(DLOGLAM*np.arange(50))*u.AA)
    for wrong in (linear, counts, 17):
        with pytest.raises(InvalidInputError): from_specutils(wrong)
    bare = Spectrum(flux=np.ones(50)*u.Jy, spectral_axis=6000*10**(DLOGLAM*np.arange(50))*u.AA)
    with pytest.raises(InvalidInputError, match="no uncertainty"): from_specutils(bare)
    assert (from_specutils(bare, ivar=np.full(50, 4.)).ivar == 4).all()
    bare.meta["and_mask"] = np.zeros(49, np.uint32)
    for wrong in (dict(ivar=np.ones(50)), dict(ivar=np.ones(49))):
        with pytest.raises(InvalidInputError, match="has the shape"): from_specutils(bare, **wrong)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["F99", "CCM89"]), st.floats(0, 1), seeds)
def test_dust_is_undone_and_signal_to_noise_stays(law, ebv, seed):
    rng = np.random.default_rng(seed)
    flux, ivar, loglam = rng.normal(5, 1, (3, 3800)), rng.uniform(0, 2, (3, 3800)), 3.58 + 1e-4*np.arange(3800)
    clean, surer = deredden(flux*10**(-0.4*extinction(loglam, ebv, law)), ivar, loglam, [ebv]*3, law)
    np.testing.assert_allclose(clean, flux, rtol=1e-10)
    np.testing.assert_allclose(clean**2*surer, (flux*10**(-0.4*extinction(loglam, ebv, law)))**2*ivar, rtol=1e-10)
    assert np.all(np.diff(extinction(loglam, 1., law)) < 0)  # blue light loses more
    assert extinction(np.log10(6165.), galactic_ebv(0.1, law), law) == pytest.approx(0.1)


def test_the_law_is_the_mocks_own():
    from specpred.populations import milky_way_curve
    loglam = np.linspace(3.585, 3.96, 200)
    np.testing.assert_allclose(extinction(loglam, 0.2, "CCM89"), 0.2*milky_way_curve(10**loglam), atol=0.002)


@pytest.mark.parametrize("arguments", [dict(law="SMC"), dict(ebv=np.nan), dict(ebv=-1.), dict(ebv=30.)])
def test_deredden_refuses(arguments):
    with pytest.raises(InvalidInputError): deredden(**(dict(flux=np.ones(10), ivar=np.ones(10), loglam=np.full(10, 3.7), ebv=0.1) | arguments))


def test_bits_and_dust_of_a_profile_enter_the_store(tmp_path):
    from specpred.config import get_profile
    assert get_profile("paper").spectra.extinction == "none"
    flagged = some_spectrum()
    flagged.and_mask[1000:1040] |= mask_bits(["BRIGHTSKY"])
    kept, discarded = prepare([flagged]), prepare([flagged], bad_bits=("BRIGHTSKY",))
    assert discarded.missing.sum() > kept.missing.sum() + 5
    brighter = prepare([flagged], ebv=np.array([0.1]))
    good = ~kept.missing
    ratio = brighter.flux[good]/kept.flux[good]
    assert (ratio > 1.15).all() and ratio.max() < 1.6
    table = pd.DataFrame(dict(specobjid=np.array([1], np.uint64), plate=1, mjd=50000, fiberid=1, redshift=0.1, has_spectrum=True, split="train"))
    with pytest.raises(InvalidInputError, match="extinction_r"):
        build_store(table, tmp_path, tmp_path/"spectra.zarr", get_profile("smoke", ["spectra.extinction=F99"]).spectra, progress=False)


def write_lite(path, redshift, plate, mjd, fiberid, seed=0):
    "A lite file of a made-up galaxy."
    from astropy.io import fits
    rng, n = np.random.default_rng(seed), 3830
    pixels = dict(flux=10 + rng.normal(0, 1, n), loglam=3.58 + 1e-4*np.arange(n), ivar=np.ones(n))
    found = dict(Z=redshift, PLUG_RA=150., PLUG_DEC=2.)
    whole = dict(PLATE=plate, MJD=mjd, FIBERID=fiberid, ZWARNING=0)
    table = lambda *columns: fits.BinTableHDU.from_columns([fits.Column(name, form, array=np.atleast_1d(value)) for name, form, value in columns])
    fits.HDUList([fits.PrimaryHDU(), table(*((k, "E", v) for k, v in pixels.items()), ("and_mask", "J", np.zeros(n, int))),
        table(*((k, "D", v) for k, v in found.items()), *((k, "J", v) for k, v in whole.items()),
            ("CLASS", "6A", "GALAXY"), ("SUBCLASS", "6A", ""))]).writeto(path, overwrite=True)


@pytest.fixture
def sixteen(tmp_path):
    "Files of sixteen galaxies, their table, and parameters for a sample so small."
    table = pd.DataFrame(dict(specobjid=2**60 + np.arange(16, dtype=np.uint64), plate=266, mjd=51602, fiberid=1 + np.arange(16),
        redshift=np.linspace(0.01, 0.2, 16), has_spectrum=True, split=["train", "train", "train", "test"]*4, extinction_r=0.1))
    for g in table.itertuples(): write_lite(tmp_path/f"spec-0266-51602-{g.fiberid:04d}.fits", g.redshift, 266, 51602, g.fiberid, g.fiberid)
    return table, tmp_path, SpectraParameters(n_components=2, n_iter=3, n_bins=900, loglam0=3.57, extinction="F99")


def test_what_is_wrong_with_one_row_costs_that_row_alone(sixteen):
    table, folder, parameters = sixteen
    (folder/"spec-0266-51602-0002.fits").write_bytes((folder/"spec-0266-51602-0003.fits").read_bytes())  # an archive's mistake
    table.loc[5, "extinction_r"], table.loc[6, "extinction_r"], table.loc[8, "redshift"] = np.nan, -9999, np.nan
    left_out = build_store(table, folder, folder/"spectra.zarr", parameters, progress=False)
    assert left_out == {"file of another spectrum": 1, "no extinction": 2, "no redshift": 1}
    store = load_store(folder/"spectra.zarr")
    np.testing.assert_array_equal(store.specobjid, table.specobjid.drop([1, 5, 6, 8]))
    row = table.loc[10]
    alone = prepare([read_sdss(folder/f"spec-0266-51602-{row.fiberid:04d}.fits")], [row.redshift], LogGrid(900, 3.57), ebv=galactic_ebv([0.1]))
    np.testing.assert_allclose(store.flux[store.specobjid == row.specobjid], alone.flux, rtol=1e-6)


def test_catalogues_that_cannot_be(sixteen):
    table, folder, parameters = sixteen
    for wrong, words in ((pd.concat([table, table[:1]]), "listed twice"), (table.drop(columns="redshift"), "no column redshift"),
            (table.drop(columns=["split", "mjd"]), "no column mjd, split")):
        with pytest.raises(InvalidInputError, match=words): build_store(wrong, folder, folder/"spectra.zarr", parameters, progress=False)


@pytest.mark.parametrize("spoil", ["gone", "cut", "bit"])
@pytest.mark.parametrize("chunk", ["flux/c/0/0", "missing/c/0/0", "filled/c/0/0", "norm/c/0", "eigenvectors/c/0/0"])
def test_a_damaged_store_is_noticed(sixteen, spoil, chunk):
    table, folder, parameters = sixteen
    build_store(table, folder, folder/"spectra.zarr", parameters, progress=False)
    assert len(load_store(folder/"spectra.zarr").norm) == 16
    file = folder/"spectra.zarr"/chunk
    content = bytearray(file.read_bytes())
    if spoil == "gone": file.unlink()
    elif spoil == "cut": file.write_bytes(content[:len(content)//2])
    else:
        content[len(content)//2] ^= 8
        file.write_bytes(content)
    with pytest.raises(DamagedFileError, match="12_spectra makes it anew"): load_store(folder/"spectra.zarr")


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(MissingInputError): read_sdss(tmp_path/"spec-0001-50000-0001.fits")
    for content in (b"", b"<html>404</html>", b"SIMPLE  =                    T".ljust(2880)):
        (tmp_path/"bad.fits").write_bytes(content)
        with pytest.raises(DamagedFileError): read_sdss(tmp_path/"bad.fits")


def test_a_store_without_training_spectra_is_refused(tmp_path):
    row = pd.DataFrame(dict(specobjid=np.array([1], np.uint64), plate=1, mjd=50000, fiberid=1, redshift=0.1, has_spectrum=True, split="train"))
    with pytest.raises(InvalidInputError, match="training"): build_store(row, tmp_path, tmp_path/"spectra.zarr", SpectraParameters(), progress=False)
    assert list(tmp_path.iterdir()) == []  # and nothing is left behind
    with pytest.raises(MissingInputError): load_store(tmp_path/"spectra.zarr")


@pytest.mark.parametrize("name, redshift, n, object_class", [
    ("spec-0266-51602-0001.fits", 0.02127545, 3835, "GALAXY"), ("spec-0266-51602-0573.fits", 0.2618579, 3832, "GALAXY"),
    ("spec-1045-52725-0628.fits", 0.03196687, 3816, "GALAXY"), ("spec-3586-55181-0003.fits", 0.5886955, 4625, "GALAXY")])
def test_real_files_read_as_astropy_reads_them(real_data, name, redshift, n, object_class):
    from astropy.io import fits
    spectrum = read_sdss(real_data/"sdss"/name)
    with fits.open(real_data/"sdss"/name) as hdus:
        for column in ("flux", "ivar", "and_mask"): np.testing.assert_array_equal(getattr(spectrum, column), hdus[1].data[column])
        np.testing.assert_allclose(spectrum.loglam, hdus[1].data["loglam"], rtol=0, atol=1e-6)
        assert spectrum.ra == pytest.approx(hdus[2].data["PLUG_RA"][0]) and spectrum.fiberid == hdus[2].data["FIBERID"][0]
    assert len(spectrum.flux) == n and spectrum.object_class == object_class and spectrum.redshift == pytest.approx(redshift, rel=1e-6)


def test_a_real_galaxy_bin_by_bin(real_data):
    "The rebinned flux is the mean of the native pixels in each bin, and the lines of a star-forming galaxy are where they should be."
    spectrum = read_sdss(real_data/"sdss/spec-1045-52725-0628.fits")
    out = prepare([spectrum])
    edges, good = native_edges(spectrum.loglam0, len(spectrum.flux))/(1 + spectrum.redshift), spectrum.ivar > 0
    assert 0.05 < out.missing.mean() < 0.25
    for i in np.flatnonzero(~out.missing[0]):
        direct = mean_between(edges, spectrum.flux.astype(float), good, GRID.edges[i], GRID.edges[i + 1])
        assert out.flux[0, i] == pytest.approx(direct, rel=1e-6)
    halpha = np.abs(GRID.wavelength - 6564.61) < 40
    assert abs(GRID.wavelength[halpha][np.argmax(out.flux[0, halpha])] - 6564.61) < 6 and not out.missing[0, halpha].any()
