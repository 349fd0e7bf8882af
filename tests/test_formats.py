"specpred.surveys and specpred.formats: files there and back, damaged ones, and real ones."

import dataclasses
import faulthandler
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from astropy import units as u
from astropy.io import fits
from astropy.nddata import StdDevUncertainty
from astropy.table import Table
from specutils import Spectrum

from specpred import formats
from specpred.config import DamagedFileError, InvalidInputError, MissingInputError, SpecpredError
from specpred.cutouts import (
    check_cutout,
    read_cutouts,
    read_skycell,
    skycell_bytes,
    skycell_wcs,
)
from specpred.formats import (
    DLOGLAM,
    OtherPositionError,
    SDSSSpectrum,
    check_spectrum,
    from_specutils,
    mask_bits,
    read_sdss,
    sdss_spectrum_bytes,
)
from specpred.surveys import PS1, SURVEYS, ImagingSurvey

SIZE = 24


def some_spectrum(n=3000, seed=6) -> SDSSSpectrum:
    rng = np.random.default_rng(seed)
    ivar = np.where(rng.random(n) < 0.02, 0, rng.uniform(0.5, 2, n)).astype(np.float32)
    bits = np.where(ivar == 0, mask_bits(["NODATA"]), 0).astype(np.uint32)
    return SDSSSpectrum(
        rng.normal(10, 3, n).astype(np.float32),
        ivar,
        bits,
        3.5812,
        redshift=0.1234,
        zwarning=0,
        object_class="GALAXY",
        subclass="STARFORMING",
        ra=150.1,
        dec=2.2,
        plate=266,
        mjd=51602,
        fiberid=17,
        or_mask=bits | np.uint32(mask_bits(["BRIGHTSKY"])),
        model=rng.normal(10, 1, n).astype(np.float32),
    )


def fits_bytes(*hdus, **keywords) -> bytes:
    stream = io.BytesIO()
    fits.HDUList(list(hdus)).writeto(stream, **keywords)
    return stream.getvalue()


def cutout_bytes(pixels=None, checksum=False, **cards) -> bytes:
    "A cutout of the g band around (180, 30), as PS1's service answers it."
    header = skycell_wcs(180, 30, SIZE).to_header()
    header.update({"HIERARCH FPA.FILTERID": "g.00000", "EXPTIME": 860.0} | cards)
    if pixels is None:
        pixels = np.random.default_rng(0).normal(size=(SIZE, SIZE))
    return fits_bytes(fits.PrimaryHDU(pixels.astype(np.float32), header), checksum=checksum)


def with_card(content: bytes, keyword: str, value) -> bytes:
    "The file with the value of the first card of that keyword replaced."
    at = content.index(f"{keyword:8}=".encode())
    return content[: at + 10] + str(value).rjust(20).encode() + content[at + 30 :]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(unit="mag"), "unit"),
        (dict(bands=["g"]), "depth needs 1"),
        (dict(pixel_scale=-1), "pixel_scale"),
        (dict(depth=["deep"] * 5), "depth"),
        (dict(bands=["g"] * 5), "repeat"),
    ],
)
def test_surveys_go_through_json_and_broken_ones_are_named(changes, message):
    for survey in SURVEYS.values():
        assert ImagingSurvey.from_dict(json.loads(json.dumps(survey.to_dict()))) == survey
    with pytest.raises(InvalidInputError, match=message):
        ImagingSurvey.from_dict(PS1.to_dict() | changes)


def test_a_spectrum_is_read_as_it_was_written(tmp_path):
    spectrum = some_spectrum()
    (tmp_path / "spec.fits").write_bytes(sdss_spectrum_bytes(spectrum))
    again = read_sdss(tmp_path / "spec.fits")
    for name in SDSSSpectrum.__dataclass_fields__:
        expected = getattr(spectrum, name)
        if name == "redshift":
            expected = float(np.float32(expected))
        np.testing.assert_array_equal(getattr(again, name), expected, err_msg=name)


def test_the_bits_and_numbers_of_a_written_file_are_sdss_own():
    "A few columns of SPECOBJ, as SDSS defines them."
    spectrum = dataclasses.replace(some_spectrum(), plate=266, mjd=51602, fiberid=162)
    content = sdss_spectrum_bytes(spectrum, bestobjid=1237648720693690487, specobj=dict(Z_ERR=1e-5))
    with fits.open(io.BytesIO(content)) as hdus:
        row, good = hdus["SPECOBJ"].data[0], spectrum.ivar > 0
        assert len(row) == 126 and len(hdus["SPZLINE"].data) == 29
        assert (
            row["SPECOBJID"].strip() == "299533932318189568"
            and row["BESTOBJID"] == "1237648720693690487"
        )
        assert row["Z_ERR"] == np.float32(1e-5)
        s_n = (spectrum.flux * np.sqrt(spectrum.ivar))[good]
        assert row["SN_MEDIAN_ALL"] == pytest.approx(np.median(s_n), rel=1e-5)


def write_spspec(path, spectrum, n_rows=5, **cards):
    "A file of data release 7."
    error = np.where(spectrum.ivar > 0, np.maximum(spectrum.ivar, 1e-9) ** -0.5, 0)
    rows = np.stack([spectrum.flux, 0 * error, error, spectrum.and_mask, spectrum.model])
    hdu = fits.PrimaryHDU(rows[:n_rows].astype(np.float32))
    hdu.header.update(
        dict(
            COEFF0=spectrum.loglam0,
            COEFF1=1e-4,
            Z=spectrum.redshift,
            RAOBJ=150.1,
            DECOBJ=2.2,
            PLATEID=266,
            MJD=51602,
            FIBERID=17,
            SPEC_CLN=2,
        )
        | cards
    )
    hdu.writeto(path)


def test_files_of_the_old_layout(tmp_path):
    spectrum = some_spectrum()
    for n_rows in (4, 5):
        path = tmp_path / f"spSpec-{n_rows}.fit"
        write_spspec(path, spectrum, n_rows)
        again = read_sdss(path)
        np.testing.assert_array_equal(again.flux, spectrum.flux)
        np.testing.assert_allclose(again.ivar, spectrum.ivar, rtol=1e-5)
        np.testing.assert_array_equal(again.and_mask, spectrum.and_mask)
        assert again.model is None and again.or_mask is None  # the data model does not know them
        for name in ("loglam0", "redshift", "object_class", "plate", "mjd", "fiberid", "ra", "dec"):
            assert getattr(again, name) == getattr(spectrum, name)
    (tmp_path / "cut.fit").write_bytes((tmp_path / "spSpec-5.fit").read_bytes()[:20_000])
    write_spspec(tmp_path / "coarse.fit", spectrum, COEFF1=2e-4)
    write_spspec(tmp_path / "rows.fit", spectrum, 2)
    write_spspec(tmp_path / "text.fit", spectrum, Z="unknown")
    write_spspec(tmp_path / "plate.fit", spectrum, PLATEID=266.5)
    rows, header = fits.getdata(tmp_path / "spSpec-5.fit", header=True)
    fits.writeto(tmp_path / "cube.fit", np.stack([rows] * 4), header)
    for name in ("cut", "coarse", "rows", "text", "plate", "cube"):
        with pytest.raises(DamagedFileError, match=name):
            read_sdss(tmp_path / f"{name}.fit")


@pytest.mark.parametrize(
    "code, expected", [(0, "UNKNOWN"), (2, "GALAXY"), (6, "STAR"), (-1, "UNKNOWN"), (7, "UNKNOWN")]
)
def test_the_class_in_the_old_layout(tmp_path, code, expected):
    write_spspec(tmp_path / "file.fit", some_spectrum(), SPEC_CLN=code)
    assert read_sdss(tmp_path / "file.fit").object_class == expected


def test_there_and_back_to_specutils():
    spectrum = some_spectrum()
    theirs = spectrum.to_specutils()
    assert theirs.flux.unit.is_equivalent(u.erg / u.s / u.cm**2 / u.AA)
    np.testing.assert_array_equal(theirs.mask, spectrum.ivar == 0)
    np.testing.assert_allclose(theirs.spectral_axis.to_value(u.nm) * 10, spectrum.wavelength)
    back = from_specutils(theirs)
    for name in SDSSSpectrum.__dataclass_fields__:
        mine, original = getattr(back, name), getattr(spectrum, name)
        if isinstance(mine, str):
            assert mine == original
        else:
            np.testing.assert_allclose(mine, original, rtol=1e-6)


def test_units_of_specutils_are_converted():
    plain = Spectrum(
        flux=np.array([1.0, 0, 2]) * u.Jy,
        spectral_axis=6000 * 10 ** (DLOGLAM * np.arange(3)) * u.AA,
        uncertainty=StdDevUncertainty([0.1, 0.2, 0.1] * u.Jy),
    )
    spectrum = from_specutils(plain)
    per_jansky = 1e17 * 1e-23 * 2.99792458e18 / 6000**2
    np.testing.assert_allclose(spectrum.flux[0], per_jansky, rtol=1e-4)
    np.testing.assert_allclose(spectrum.ivar[0], (0.1 * per_jansky) ** -2, rtol=1e-4)
    assert spectrum.flux[1] == 0 and spectrum.redshift == 0


def test_specutils_spectra_that_are_none_of_sdss():
    grid = 6000 * 10 ** (DLOGLAM * np.arange(50)) * u.AA
    linear = Spectrum(flux=np.ones(50) * u.Jy, spectral_axis=np.linspace(5000, 6000, 50) * u.AA)
    counts = Spectrum(flux=np.ones(50) * u.count, spectral_axis=grid)
    for other in (linear, counts, 17):
        with pytest.raises(InvalidInputError):
            from_specutils(other)
    bare = Spectrum(flux=np.ones(50) * u.Jy, spectral_axis=grid)
    with pytest.raises(InvalidInputError, match="no uncertainty"):
        from_specutils(bare)
    assert (from_specutils(bare, ivar=np.full(50, 4.0)).ivar == 4).all()
    with pytest.raises(InvalidInputError, match="several shapes"):
        from_specutils(bare, ivar=np.ones(49))
    bare.meta["and_mask"] = np.zeros(49, np.uint32)
    with pytest.raises(InvalidInputError, match="several shapes"):
        from_specutils(bare, ivar=np.ones(50))


def test_names_in_the_meta_of_specutils_are_integers():
    theirs = some_spectrum().to_specutils()
    theirs.meta.update(plate=266.0, mjd="51602", fiberid=np.int32(17))
    assert from_specutils(theirs).name == "spec-0266-51602-0017.fits"
    for value in (266.5, np.nan, "none", None, [1, 2]):
        theirs.meta["plate"] = value
        with pytest.raises(InvalidInputError, match="plate is"):
            from_specutils(theirs)


def test_missing_and_foreign_files(tmp_path):
    for read in (read_sdss, read_cutouts, read_skycell):
        with pytest.raises(MissingInputError):
            read(tmp_path / "none.fits")
        for content in (b"", b"<html>404</html>", b"SIMPLE  =                    T".ljust(2880)):
            (tmp_path / "other.fits").write_bytes(content)
            with pytest.raises(DamagedFileError, match="other.fits"):
                read(tmp_path / "other.fits")
        with pytest.raises(DamagedFileError):
            read(tmp_path)


SPECTRUM = sdss_spectrum_bytes(some_spectrum())
IDENTITY = (266, 51602, 17)


@pytest.mark.parametrize(
    "content, cause",
    [
        (b"<html>busy</html>", "a web page"),
        (SPECTRUM[:100_007], "truncated"),
        (SPECTRUM[: 2880 * 20], "truncated"),
        (SPECTRUM + b"\x01" * 2880, "a damaged header"),
        (with_card(SPECTRUM, "NAXIS2", 999999999999), "truncated"),
        (with_card(SPECTRUM, "TFIELDS", 99999999999), "a damaged header"),
        (
            SPECTRUM[:200] + bytes(b ^ 0x15 for b in SPECTRUM[200:900]) + SPECTRUM[900:],
            "a damaged header",
        ),
        (sdss_spectrum_bytes(dataclasses.replace(some_spectrum(), fiberid=18)), "another spectrum"),
        (
            sdss_spectrum_bytes(
                dataclasses.replace(some_spectrum(), flux=np.full(3000, np.nan, np.float32))
            ),
            "an empty spectrum",
        ),
        (SPECTRUM.replace(b"'loglam", b"'loglan"), "no spectrum: no column loglam"),
        (cutout_bytes(), "damaged contents"),
    ],
)
def test_wrong_downloads_of_spectra_are_named_by_their_cause(content, cause):
    check_spectrum(SPECTRUM, *IDENTITY)
    with pytest.raises(DamagedFileError, match=f"^{cause}"):
        check_spectrum(content, *IDENTITY)



# other forms of the same file


def end_of_data(content: bytes) -> int:
    "Where the data of the last HDU end, before the padding."
    with fits.open(io.BytesIO(content)) as hdus:
        return hdus[-1].fileinfo()["datLoc"] + hdus[-1].size


@pytest.mark.parametrize("checksum", [False, True])
def test_packed_and_unpadded_files_are_complete(tmp_path, checksum):
    "astropy reads them all and warns of some; nothing warns here."
    cutout = cutout_bytes(checksum=checksum)
    for content in (SPECTRUM, cutout):
        end = end_of_data(content)
        forms = (content[:end], content[: end + 7], content + bytes(1000), content + b" " * 2880)
        forms += (content + b"\n", content + b"\r\n")
        forms += tuple(gzip.compress(form) for form in (content, *forms))
        for form in forms:
            (tmp_path / "file").write_bytes(form)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                if content is SPECTRUM:
                    check_spectrum(form, *IDENTITY)
                    spectrum = read_sdss(tmp_path / "file")
                    np.testing.assert_array_equal(spectrum.flux, some_spectrum().flux)
                else:
                    check_cutout(form, "g", 180, 30, SIZE)
                    assert read_cutouts(tmp_path / "file")["g"].pixels.any()
        lost = content[: end - 1]
        for form in (lost, gzip.compress(lost), gzip.compress(content)[:-30]):
            with pytest.raises(DamagedFileError, match="truncated"):
                read_sdss(form) if content is SPECTRUM else check_cutout(form, "g", 180, 30, SIZE)


def test_a_gzipped_file_that_unpacks_to_too_much_is_refused(monkeypatch):
    monkeypatch.setattr(formats, "_MAX_UNPACKED", 1 << 20)
    bomb = gzip.compress(SPECTRUM + bytes(200 << 20), 1)
    tracemalloc.start()
    with pytest.raises(DamagedFileError, match="unpacks to more than 1 MB"):
        read_sdss(bomb)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def rewritten(content: bytes, change, **cards) -> bytes:
    "The file as astropy writes it again; `change` gets the columns of the first two tables."
    with fits.open(io.BytesIO(content)) as hdus:
        tables = []
        for hdu in hdus[1:3]:
            columns = {name: hdu.data[name].copy() for name in hdu.columns.names}
            table = fits.BinTableHDU(Table(change(columns)), name=hdu.name)
            table.header.update({k: v for k, v in cards.items() if hdu.name == "COADD"})
            tables.append(table)
        return fits_bytes(fits.PrimaryHDU(header=hdus[0].header), *tables)


UNSIGNED = dict(
    and_mask="u4", or_mask="u8", PLATE="u2", MJD="u4", FIBERID="u8", ZWARNING="u2", CLASS="S40"
)


def unsigned(columns: dict) -> dict:
    types = {name: UNSIGNED.get(name, values.dtype) for name, values in columns.items()}
    return {name: values.astype(types[name]) for name, values in columns.items()}


def assert_equal_spectra(one, other, but=()):
    for name in SDSSSpectrum.__dataclass_fields__:
        if name not in but:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_a_file_of_unsigned_numbers_reads_as_the_original():
    spectrum = dataclasses.replace(some_spectrum(), plate=3, fiberid=2)
    spectrum.and_mask[:2] = 0, 2**31 + 5
    content = sdss_spectrum_bytes(spectrum)
    again = rewritten(content, unsigned)
    assert b"2147483648" in again and b"9223372036854775808" in again
    assert_equal_spectra(read_sdss(again), read_sdss(content))
    check_spectrum(again, 3, 51602, 2)


def test_scaled_integers_read_as_astropy_reads_them():
    scaling = dict(TSCAL1=0.25, TZERO1=10.0, TNULL1=-32768, TSCAL2=1e-4, TZERO2=3.5)

    def stored(columns):
        if "loglam" in columns:
            n = np.arange(len(columns["flux"]))
            columns |= dict(flux=(n % 100 - 50).astype(">i2"), loglam=(n + 800).astype(">i4"))
            columns["flux"][7] = -32768
        return columns

    content = rewritten(SPECTRUM, stored, **scaling)
    spectrum = read_sdss(content)
    with fits.open(io.BytesIO(content)) as hdus:
        flux, loglam = hdus[1].data["flux"].copy(), hdus[1].data["loglam"]
    assert flux[3] == 10 - 47 / 4 and loglam[0] == 3.58
    flux[7] = np.nan  # astropy leaves TNULL to its tables
    np.testing.assert_array_equal(spectrum.flux, flux.astype(np.float32))
    np.testing.assert_allclose(spectrum.loglam, loglam, atol=1e-9)


def test_images_of_other_numbers_read_as_the_original(tmp_path):
    spectrum = some_spectrum()
    spectrum.and_mask[:] = np.arange(3000)  # 2**24 is beyond the scaled integers
    write_spspec(tmp_path / "plain.fit", spectrum)
    plain = read_sdss(tmp_path / "plain.fit")
    rows, header = fits.getdata(tmp_path / "plain.fit", header=True)
    double = fits_bytes(fits.PrimaryHDU(rows.astype(float), header))
    assert_equal_spectra(read_sdss(double), plain)
    scaled = fits.PrimaryHDU(rows.astype(float), header)
    scaled.scale("int32", bscale=2.0**-12, bzero=100.0)
    again = read_sdss(fits_bytes(scaled))
    np.testing.assert_allclose(again.flux, plain.flux, atol=2.0**-12)
    np.testing.assert_array_equal(again.and_mask, plain.and_mask)


# SDSS-V

NAME = dict(FIELD=112360, MJD=60000, CATALOGID=27021598108289694)


def sdss5_bytes(objects: dict) -> bytes:
    "A file as release 19 has them: upper case, no plate; `objects` are columns of SPALL."

    def change(columns):
        if "loglam" in columns:
            return {name.upper(): values for name, values in columns.items()}
        kept = {name: columns[name] for name in ("Z", "ZWARNING", "CLASS", "SUBCLASS")}
        return kept | {name: np.array([value]) for name, value in objects.items()}

    return rewritten(SPECTRUM, change)


@pytest.mark.parametrize(
    "objects, ra",
    [
        (dict(PLUG_RA=150.1, PLUG_DEC=2.2, RACAT=9.0, DECCAT=9.0), 150.1),
        (dict(PLUG_RA=-9999.0, PLUG_DEC=-9999.0, RACAT=150.1, DECCAT=2.2), 150.1),
        (dict(RACAT=np.nan, DECCAT=np.nan, FIBER_RA=150.1, FIBER_DEC=2.2), 150.1),
        (dict(RACAT=-999.0, DECCAT=-999.0), np.nan),
        (dict(), np.nan),
    ],
)
def test_spectra_of_sdss_v(objects, ra):
    spectrum, original = read_sdss(sdss5_bytes(NAME | objects)), read_sdss(SPECTRUM)
    other = {"plate", "mjd", "fiberid", "field", "catalogid", "ra", "dec"}
    assert_equal_spectra(spectrum, original, but=other)
    np.testing.assert_equal(spectrum.ra, ra)
    assert (spectrum.field, spectrum.mjd, spectrum.catalogid) == tuple(NAME.values())
    assert spectrum.name == "spec-112360-60000-27021598108289694.fits"
    assert spectrum.fibre_diameter == 2 and original.fibre_diameter == 3
    assert original.name == "spec-0266-51602-0017.fits"
    assert from_specutils(spectrum.to_specutils()).name == spectrum.name


def test_a_plate_of_zero_names_no_spectrum():
    "Some programs fill the columns of both surveys."
    for others in (dict(PLATE=0, FIBERID=0), dict(PLATE=0), dict(PLATE=-1, FIBERID=7)):
        assert read_sdss(sdss5_bytes(NAME | others)).name == read_sdss(sdss5_bytes(NAME)).name
    by_plate = read_sdss(sdss5_bytes(NAME | dict(PLATE=266, FIBERID=17)))
    assert by_plate.name == "spec-0266-60000-0017.fits" and by_plate.catalogid == 0


def test_a_table_that_names_no_spectrum_is_refused():
    for lacking in NAME:
        objects = {name: value for name, value in NAME.items() if name != lacking}
        with pytest.raises(DamagedFileError, match=f"no column {lacking.lower()}"):
            read_sdss(sdss5_bytes(objects))


def with_columns(table: str, **changes) -> bytes:
    "The spectrum with these columns in one of its first two tables, or functions of what it has."

    def change(columns):
        if (table == "COADD") == ("loglam" in columns):
            for name, value in changes.items():
                columns[name] = value(columns[name]) if callable(value) else np.array([value])
        return columns

    return rewritten(SPECTRUM, change)


def test_names_of_other_types_are_read_as_integers():
    content = with_columns("SPECOBJ", PLATE=266.0, MJD=b"51602", FIBERID=b" 17", ZWARNING=0.0)
    check_spectrum(content, *IDENTITY, 150.1, 2.2)
    assert_equal_spectra(read_sdss(content), read_sdss(SPECTRUM))
    assert read_sdss(content).name == "spec-0266-51602-0017.fits"
    numbers = NAME | dict(PLUG_RA=150.1, PLUG_DEC=2.2)
    texts = {name: str(value).encode() for name, value in numbers.items()}
    assert_equal_spectra(read_sdss(sdss5_bytes(texts)), read_sdss(sdss5_bytes(numbers)))


@pytest.mark.parametrize("name", ["PLATE", "MJD", "FIBERID", "ZWARNING"])
@pytest.mark.parametrize("value", [266.5, np.nan, np.inf, b"none", b"", [1, 2]])
def test_names_that_are_no_integers_are_refused(name, value):
    with pytest.raises(DamagedFileError, match=f"no spectrum: {name.lower()} "):
        read_sdss(with_columns("SPECOBJ", **{name: value}))


def test_other_values_that_are_no_numbers_are_refused():
    with pytest.raises(DamagedFileError, match="catalogid is 2.7"):  # the last digits are lost
        read_sdss(sdss5_bytes(NAME | dict(CATALOGID=float(NAME["CATALOGID"]))))
    for name in ("Z", "PLUG_RA"):
        with pytest.raises(DamagedFileError, match=f"no spectrum: {name.lower()} is b'far'"):
            read_sdss(with_columns("SPECOBJ", **{name: b"far"}))
    masked = with_columns("SPECOBJ", MJD=lambda values: np.ma.array(values, mask=[True]))
    with pytest.raises(DamagedFileError, match="mjd is nan"):
        read_sdss(masked)


@pytest.mark.parametrize("name", ["flux", "ivar", "and_mask", "or_mask", "model", "loglam"])
@pytest.mark.parametrize("n", [1, 2])
def test_pixels_of_several_values_are_refused(name, n):
    content = with_columns("COADD", **{name: lambda values: np.stack([values] * n, axis=-1)})
    for read in (read_sdss, lambda content: check_spectrum(content, *IDENTITY)):
        with pytest.raises(DamagedFileError, match=rf"{name} has shape \(3000, {n}\)"):
            read(content)


# positions


def at(ra, dec) -> bytes:
    "The spectrum, with its fibre elsewhere."
    return sdss_spectrum_bytes(dataclasses.replace(some_spectrum(), ra=ra, dec=dec))


def test_the_fibre_is_compared_with_the_galaxy(tmp_path):
    check_spectrum(SPECTRUM, *IDENTITY, 150.1 + 2.9 / 3600, 2.2)
    check_spectrum(at(359.9999, 0.0), *IDENTITY, 0.0001, 0.0)
    check_spectrum(at(10.0, 89.9), *IDENTITY, 10.4, 89.9, max_separation=3)
    for ra, dec in ((150.1 + 3.1 / 3600, 2.2), (27.95, 2.2), (150.1, -2.2)):
        with pytest.raises(OtherPositionError, match="^another position: .* arcsec"):
            check_spectrum(SPECTRUM, *IDENTITY, ra, dec)
    check_spectrum(SPECTRUM, *IDENTITY, 27.95, 2.2, max_separation=648_000)
    for nowhere in (np.nan, -9999.0):
        check_spectrum(at(nowhere, nowhere), *IDENTITY, 27.95, 2.2)
        assert np.isnan(read_sdss(at(nowhere, nowhere)).ra)
    write_spspec(tmp_path / "old.fit", some_spectrum())
    check_spectrum((tmp_path / "old.fit").read_bytes(), *IDENTITY, 150.1, 2.2)
    with pytest.raises(OtherPositionError):
        check_spectrum((tmp_path / "old.fit").read_bytes(), *IDENTITY, 27.95, 2.2)
    write_spspec(tmp_path / "nowhere.fit", some_spectrum(), RAOBJ=-9999.0)
    check_spectrum((tmp_path / "nowhere.fit").read_bytes(), *IDENTITY, 27.95, 2.2)


def mostly_nothing(part):
    pixels = np.ones((SIZE, SIZE))
    pixels.ravel()[: round(part * pixels.size)] = np.nan
    return pixels


@pytest.mark.parametrize(
    "content, cause",
    [
        (cutout_bytes()[:2880], "truncated"),
        (cutout_bytes(np.ones((16, 16))), "another shape"),
        (with_card(cutout_bytes(), "NAXIS", 99999999999), "a damaged header"),
        (with_card(cutout_bytes(), "NAXIS2", 99999999999), "truncated"),
        (cutout_bytes(**{"FPA.FILTERID": "r.00000"}), "another band: r"),
        (cutout_bytes(EXPTIME=0.0), "no exposure time"),
        (cutout_bytes(CRVAL1=180.1), "another position"),
        (cutout_bytes(mostly_nothing(0.7)), "empty: 30%"),
        (SPECTRUM, "another shape"),
        (cutout_bytes(checksum=True)[:-2000] + bytes(2000), "another checksum"),
    ],
)
def test_wrong_downloads_of_cutouts_are_named_by_their_cause(content, cause):
    for sound in (cutout_bytes(), cutout_bytes(checksum=True), cutout_bytes(mostly_nothing(0.3))):
        check_cutout(sound, "g", 180, 30, SIZE)
    with pytest.raises(DamagedFileError, match=f"^{cause}"):
        check_cutout(content, "g", 180, 30, SIZE)


@pytest.mark.parametrize("claim", [dict(ZNAXIS1=500000, ZNAXIS2=500000), dict(ZTILE1=900000000)])
def test_images_that_claim_to_be_huge_are_refused(tmp_path, claim):
    "A few kB that claim to unpack to a terabyte."
    content = fits_bytes(fits.PrimaryHDU(), fits.CompImageHDU(np.zeros((64, 64), np.float32)))
    for keyword, value in claim.items():
        content = with_card(content, keyword, value)
    (tmp_path / "file.fits").write_bytes(content)
    with pytest.raises(DamagedFileError, match="unpacks to more than"):
        read_cutouts(tmp_path / "file.fits")
    with pytest.raises(DamagedFileError):
        check_cutout(content, "g", 180, 30, SIZE)


NASTY = (
    "-1",
    "0",
    "1",
    "2",
    "7",
    "2147483648",
    "99999999999",
    "-9223372036854775808",
    "1E308",
    "T",
    "'x'",
    "'9999999E'",
    "'1PE(99999999)'",
    "'1QB(9)'",
    "'(9999,9999)'",
    "'GZIP_1'",
    "'PLIO_1'",
    "'HCOMPRESS_1'",
    "'RICE_1'",
    "'NOCOMPRESS'",
    "",
    "NaN",
    "&",
)
STRUCTURAL = (
    b"AXIS",
    b"BITPIX",
    b"COUNT",
    b"TF",
    b"ZTILE",
    b"ZCMP",
    b"ZVAL",
    b"THEAP",
    b"TZERO",
    b"TDIM",
)


def mutated(content: bytes, rng) -> bytes:
    "A FITS file with wrong bytes or header values, lost or repeated blocks, or the end missing."
    data = bytearray(content)
    cards = [
        at
        for at in range(0, len(data), 80)
        if data[at + 8 : at + 10] == b"= " and data[at : at + 1].isalpha()
    ]
    structural = [at for at in cards if any(word in data[at : at + 8] for word in STRUCTURAL)]
    for _ in range(rng.integers(1, 4)):
        kind, at = rng.integers(6), int(rng.integers(len(data)))
        block = at // 2880 * 2880
        if kind == 0:
            data[at : at + 40] = rng.bytes(min(40, len(data) - at))
        elif kind == 1:
            data[at] ^= 1 << rng.integers(8)
        elif kind in (2, 3):
            card = int(rng.choice(structural if kind == 2 and structural else cards))
            data[card + 10 : card + 80] = (
                NASTY[rng.integers(len(NASTY))].rjust(20).ljust(70).encode()
            )
        elif kind == 4:
            data[block : block + 2880] = data[block : block + 2880] * int(rng.integers(3))
        else:
            del data[at:]
        if len(data) < 100:
            break
    return bytes(data)


CUBE = fits_bytes(
    fits.PrimaryHDU(
        np.ones((5, 8, 8), np.float32),
        fits.Header(dict(BUNIT="nJy", BANDS="grizy", SURVEY="PS1", PIXSCALE=0.25)),
    )
)


def read_mutated_files(seed, n, folder):
    "Hands `n` mutated files to all readers; how many were read and refused, longest time, memory."
    import resource

    path, rng = Path(folder) / "file.fits", np.random.default_rng(seed)
    stack = skycell_bytes(
        rng.normal(0, 10, (128, 128)), skycell_wcs(180, 30, 128), "g", 700.0, noise=10.0
    )

    def of_cutout(content):
        check_cutout(content, "g", 180, 30, SIZE)

    cases = (
        (SPECTRUM, (lambda content: check_spectrum(content, *IDENTITY), lambda _: read_sdss(path))),
        (cutout_bytes(), (of_cutout, lambda _: read_cutouts(path))),
        (stack, (lambda _: read_cutouts(path), of_cutout)),
        (stack, (read_skycell,)),
        (CUBE, (lambda _: read_cutouts(path),)),
    )
    signal.signal(signal.SIGALRM, lambda *_: (faulthandler.dump_traceback(), os._exit(3)))

    def peak():
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1000

    before, seen = peak(), dict(read=0, refused=0, longest=0)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (
        2 << 30
    )
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for k in range(n):
        content, readers = cases[k % len(cases)]
        content = mutated(content, rng)
        path.write_bytes(content)
        for reader in readers:
            signal.alarm(20)
            started = time.perf_counter()
            try:
                reader(content)
                seen["read"] += 1
            except SpecpredError as error:
                assert str(error)
                seen["refused"] += 1
            seen["longest"] = max(seen["longest"], time.perf_counter() - started)
    signal.alarm(0)
    return seen | dict(megabytes=peak() - before)


def test_mutated_files_only_ever_raise_our_errors(tmp_path):
    "In a process of its own, whose memory is limited to 2 GB after the imports."
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
        "import test_formats, warnings; warnings.simplefilter('ignore')\n"
        "print(json.dumps(test_formats.read_mutated_files(5, 600, sys.argv[2])))"
    )
    here = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(here), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["read"] > 50 and seen["refused"] > 300 and seen["megabytes"] < 500, seen


@pytest.mark.parametrize(
    "name, redshift, n",
    [
        ("spec-0266-51602-0001.fits", 0.02127545, 3835),
        ("spec-0266-51602-0573.fits", 0.2618579, 3832),
        ("spec-1045-52725-0628.fits", 0.03196687, 3816),
        ("spec-3586-55181-0003.fits", 0.5886955, 4625),
    ],
)
def test_real_spectra_read_as_astropy_reads_them(real_data, name, redshift, n):
    path = real_data / "sdss" / name
    spectrum = read_sdss(path)
    check_spectrum(path.read_bytes(), *(int(part) for part in path.stem.split("-")[1:]))
    with fits.open(path) as hdus:
        for column in ("flux", "ivar", "and_mask"):
            np.testing.assert_array_equal(getattr(spectrum, column), hdus[1].data[column])
        np.testing.assert_allclose(spectrum.loglam, hdus[1].data["loglam"], rtol=0, atol=1e-6)
        assert (
            spectrum.ra == pytest.approx(hdus[2].data["PLUG_RA"][0])
            and spectrum.fiberid == hdus[2].data["FIBERID"][0]
        )
    assert spectrum.name == name and spectrum.field == 0  # BOSS's FIELD is the imaging's
    assert spectrum.fibre_diameter == (2 if spectrum.plate == 3586 else 3)
    content = path.read_bytes()
    assert_equal_spectra(read_sdss(rewritten(content, unsigned)), spectrum)
    assert_equal_spectra(read_sdss(gzip.compress(content)), spectrum)
    assert (
        len(spectrum.flux) == n
        and spectrum.object_class == "GALAXY"
        and spectrum.redshift == pytest.approx(redshift, rel=1e-6)
    )
