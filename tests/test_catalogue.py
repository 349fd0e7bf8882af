"specpred.catalogue: SkyServer's answers, tables of one's own, and the split by sky."

import gzip
import re
import warnings
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits, votable
from astropy.table import Column, MaskedColumn, Table
from hypothesis import given, settings
from hypothesis import strategies as st

from specpred import catalogue as chapter
from specpred.catalogue import (
    SPLITS,
    catalogue_query,
    read_skyserver_csv,
    read_table,
    split_by_sky,
    split_catalogue,
)
from specpred.config import (
    ArchiveError,
    ArchiveParameters,
    DamagedFileError,
    InvalidInputError,
    MissingInputError,
    SpecpredError,
    get_profile,
)
from specpred.formats import (
    specobjid_of_position,
    specobjid_of_spectrum,
    spectrum_of_specobjid,
    spectrum_path,
)


def one_galaxy(**changes) -> bytes:
    "SkyServer's answer with one row, some of it changed."
    query = catalogue_query(1, 1).partition("FROM")[0].replace(",", "").split()
    columns = [word.split(".")[1] for word in query if word[:2] in ("s.", "p.")]
    row = (
        dict.fromkeys(columns, "1")
        | dict(
            specObjID="299489676975171584",
            plate="266",
            mjd="51602",
            fiberID="1",
            run2d="26",
            ra="30",
            dec="5",
            z="0.1",
            primTarget="64",
        )
        | changes
    )
    return (",".join(row) + "\n" + ",".join(row.values()) + "\n").encode()


def write(folder, text: str, name="own.csv"):
    "A text file, and its path."
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    "changes",
    [
        dict(specObjID="../../x"),
        dict(specObjID="2.9948967697517158e17"),
        dict(specObjID="-1"),
        dict(specObjID=str(2**64)),
        dict(run2d="../26"),
        dict(run2d="26/.."),
        dict(plate="-1"),
        dict(fiberID="../1"),
        dict(mjd="1e5"),
        dict(ra="nan"),
        dict(dec="-91"),
        dict(z="abc"),
        dict(z="-0.5"),
        dict(z="7"),
        dict(z=""),
        dict(primTarget="8"),
        dict(petroMag_r="inf"),
    ],
)
def test_rows_that_lead_elsewhere_or_were_not_asked_for_are_refused(changes):
    assert len(read_skyserver_csv(one_galaxy())) == 1
    with pytest.raises(ArchiveError):
        read_skyserver_csv(one_galaxy(**changes))


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=400))
def test_any_answer_to_a_query_is_read_or_refused(content):
    try:
        read_skyserver_csv(content)
    except SpecpredError as error:
        assert str(error).isprintable()


CELLS = st.one_of(
    st.sampled_from(
        [
            "",
            "-1",
            "0",
            "-9999",
            "nan",
            "inf",
            "-inf",
            "null",
            "1e400",
            "99999999999999999999999",
            "0x10",
            "1_0",
            "٣",
            "../x",
            "a,b",
            '"',
            "'",
            "#",
            "\n",
            "\x00",
            "1;2",
            "10:20:30",
            "<b>",
            "26",
            "v5_7_0",
            "2.5",
        ]
    ),
    st.floats(-400, 400).map(str),
    st.integers(-10, 2**64).map(str),
    st.text(max_size=6),
)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_catalogue_with_any_cells_is_sound_or_refused(tmp_path_factory, data):
    "A good table of three rows, of which a few cells or names of columns are anything."
    rows = [one_galaxy()] + [
        one_galaxy(specObjID=k, fiberID=k).split(b"\n", 1)[1] for k in ("7", "8")
    ]
    lines = [line.split(",") for line in b"".join(rows).decode().splitlines()]
    for _ in range(data.draw(st.integers(1, 3))):
        row, column = data.draw(st.integers(0, 3)), data.draw(st.integers(0, len(lines[0]) - 1))
        lines[row][column] = data.draw(CELLS)
    content = "".join(",".join(line) + "\n" for line in lines).encode("utf-8", "surrogatepass")
    path = tmp_path_factory.getbasetemp() / "cells.csv"
    path.write_bytes(content)
    for source, read in ((content, read_skyserver_csv), (path, read_table)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                table = read(source)
        except SpecpredError as error:
            assert str(error)
        else:
            check_sound(table, selected=read is read_skyserver_csv)


def check_sound(table, selected: bool):
    "Asserts what holds for every catalogue, and for one from SkyServer."
    assert table.specobjid.dtype == np.uint64 and table.specobjid.is_unique and 0 < len(table) <= 3
    assert table.ra.between(0, 360).all() and table.dec.between(-90, 90).all()
    assert table.redshift.dropna().between(-0.1, 12).all()
    assert not np.isinf(table.select_dtypes(float)).any().any()
    for row in table[table.plate > 0].itertuples():
        assert spectrum_path(row.run2d, row.plate, row.mjd, row.fiberid).count("/") == 8
    if selected:
        assert (table.plate > 0).all() and (table.primtarget & 70).all()
        assert table.redshift.between(0, 0.360001, inclusive="neither").all()


POSITIONS = st.lists(st.tuples(st.floats(0, 359.999), st.floats(-29, 90)), min_size=1, max_size=8)


@settings(max_examples=20, deadline=None)
@given(POSITIONS, st.sampled_from(["csv", "fits", "parquet", "vot"]), st.booleans())
def test_any_positions_in_any_format_become_a_catalogue(
    tmp_path_factory, positions, kind, with_ids
):
    path = tmp_path_factory.mktemp("table") / f"own.{kind}"
    ids = np.uint64(2**64 - 1) - np.arange(len(positions), dtype=np.uint64)
    table = pd.DataFrame(positions, columns=["RA", "DEC"]).assign(name="x")
    if with_ids:
        table["specObjID"] = ids.astype(str) if kind == "vot" else ids
    if kind == "csv":
        table.to_csv(path, index=False)
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        Table.from_pandas(table).write(path, format="votable" if kind == "vot" else "fits")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # positions that repeat
        read = read_table(path)
    assert (
        read.specobjid.dtype == np.uint64 and read.specobjid.is_unique and (read.plate == 0).all()
    )
    written = [positions[i] for i in read.table_row]
    np.testing.assert_allclose(read[["ra", "dec"]], written, rtol=0, atol=1e-9)
    if with_ids:
        assert read.specobjid.tolist() == ids[read.table_row].tolist()
    else:
        assert set(read.specobjid) == set(specobjid_of_position(*np.transpose(positions)))


@pytest.mark.parametrize(
    "content, named",
    [
        ("ra,dec,plate,mjd,fiberid\n1,2,266,51602,\n", "'plate', row 1"),
        ("ra,dec\n1,2\n3,x\n", "'dec', row 2"),
        ("ra,dec\n361,2\n", "'ra', row 1"),
        ("RAJ2000,dec\n-9999,2\n", "'RAJ2000', row 1"),
        ("ra,dec\n-9,-9\n", "'ra', row 1"),
        ("ra,dec\n-13,2\n200,3\n", "'ra', row 1.*expected 0 to 360"),
        ("ra,dec\n09 46 48,2\n", "'ra', row 1.*or both ra and dec"),
        ("ra,dec\n09 66 48,-01 00 00\n", "'ra', row 1"),
        ("ra,dec\n146:42:00,-01 00 00\n", "'ra', row 1: '146:42:00'"),
        ("ra,dec\n146h42m,-01 00 00\n", "'ra', row 1: '146h42m'"),
        ("ra,dec\n09 46 48,-01 00 00\n,\n09 46 48,-01 00 00\n", "'ra', row 2: ''"),
        ("RAJ2000,dec,plate,mjd,fiber\n1,2,266,51602,9999\n", "'fiber', row 1"),
        ("ra,dec,plate,MJD,Fiber\n1,2,266,51602,1\n5,2,266,51602,1\n", "'plate', row 2"),
        ("ra,dec,plate,mjd,fiberid\n1,2,266,51602,1\n3,4,,51602,9\n", "'plate', row 2: ''"),
        ("id,ra_hours,ra_rad,gal_lon,ecl_lon,ra_gal\n1,2,3,4,5,6\n", "dec; it has"),
        ("ra_hours,dec\n1,2\n", "dec; it has"),
        ("rra,dec\n1,2\n", "is it 'rra'"),
        ("XMM_RA,XMM_DEC,e_XMM_RA\n1,2,3\n", "is it 'XMM_RA', 'XMM_DEC'.*it has .*'e_XMM_RA'"),
        ("RA_1,DEC_2,RAJ2000\n1,2,3\n", "no columns ra and dec"),
        ("ra,dec,specobjid\n1,2,-5\n", "'specobjid', row 1"),
        ("ra,dec\n1\n", "own.csv: row 1 has 1 fields"),
        ("ra,dec\n1,2,3\n", "own.csv: row 1 has 3 fields"),
        ("ra,dec\n", "no rows"),
        ("", "own.csv: not CSV: empty or binary"),
        ("# nothing\n", "own.csv: not CSV: empty or binary"),
        ("\0\1ra,dec\n\0,\1\n", "own.csv: not CSV: empty or binary"),
        ("ra;dec\n1,5;2,5\n", "row 1 has 3 fields.*Commas separate columns"),
        ("ra,dec,ra\n1,2,1\n", "'ra' and 'ra' both mean ra"),
        ("ra;dec\n1;2\n", "separate columns by commas"),
        ("ra,dec,plate,mjd,fiberid\n1,2,99999,51602,1\n", "'plate', row 1"),
        ("ra,dec,plate,mjd,fiberid\n1,2,266.5,51602,1\n", "'plate', row 1"),
        ("ra,dec,specobjid\n1,2,2.99489676975172e+17\n", "'specobjid', row 1"),
        ("ra,dec,specobjid\n1,2,2.9949e+17\n", "'specobjid', row 1"),  # decodes by chance
        (
            "specobjid,ra,dec,plate,mjd,fiberid\n3.722360139651588e+18,1,2,266,51602,1\n",
            "'plate', row 1: '266'; expected 3306",
        ),
        (
            "specobjid,ra,dec,plate,mjd,fiberid\n1,150,-5,266,51602,1\n2,146,-1,266,51602,1\n",
            "'specobjid', row 2: '2'; expected one position",
        ),
        (
            "ra,dec,plate,mjd,fiberid,run2d\n1,2,266,51602,1,26\n1,2,266,51602,1,103\n",
            "'plate', row 2: .* one run2d",
        ),
        ("ra,dec,plate,mjd,fiberid,run2d\n1,2,266,51602,1,../x\n", "'run2d', row 1"),
        ("ra,dec,plate,mjd,fiberid,run2d\n1,2,266,51602,1,v4_0\n", "'run2d', row 1"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_by_column(tmp_path, content, named):
    with pytest.raises(InvalidInputError, match=named):
        read_table(write(tmp_path, content))


def test_whole_numbers_with_a_point_are_whole_numbers(tmp_path):
    "As pandas writes a column with gaps."
    table = pd.DataFrame(
        dict(
            ra=[1.0, 2.0], dec=[3.0, 4.0], plate=[266, None], mjd=[51602, None], fiberid=[162, None]
        )
    )
    table.to_csv(tmp_path / "own.csv", index=False)
    assert "266.0" in (tmp_path / "own.csv").read_text()
    names = read_table(tmp_path / "own.csv")[["plate", "mjd", "fiberid"]].to_numpy().tolist()
    assert sorted(names) == [[0, 0, 0], [266, 51602, 162]]


def test_missing_measurements_and_reductions(tmp_path):
    table = read_table(
        write(
            tmp_path,
            "# of 2026\n#\nra,dec,modelMag_g,z,zwarning,plate,mjd,fiberid,class\n"
            "1,2,-9999,-9999.0,-9999,4055,55359,1,SDSS#1\n3,4,17.5,0.1,4,266,51602,2,b\n",
        ),
        "dr16",
    ).sort_values("ra")
    assert table[["modelmag_g", "redshift"]].isna().to_numpy().tolist() == [
        [True, True],
        [False, False],
    ]
    assert table[["class", "zwarning", "run2d"]].to_numpy().tolist() == [
        ["SDSS#1", 0, "v5_13_0"],
        ["b", 4, "26"],
    ]


def test_z_beside_magnitudes_is_a_magnitude(tmp_path):
    with pytest.warns(UserWarning, match="'Z' is taken for a magnitude"):
        table = read_table(write(tmp_path, "ra,dec,g,r,i,Z\n1,2,13,12,11.5,11.2\n"))
    assert table.redshift.isna().all()
    for text in (
        "ra,dec,g,r,i,z,zspec\n1,2,13,12,11.5,11.2,0.1\n",
        "ra,dec,g,r,i,z,zsp\n1,2,13,12,11.5,11.2,0.1\n",
        "ra,dec,r,z\n1,2,12,0.1\n",
        "ra_1,dec_1,z_1,ra_2,dec_2,z_2\n1,2,0.1,1,2,3\n",
    ):
        assert read_table(write(tmp_path, text)).redshift.tolist() == [0.1]


def test_tables_of_other_kinds_are_refused(tmp_path):
    pd.DataFrame(dict(ra=[1.0], dec=[2.0], specobjid=[2.99e17])).to_parquet(
        tmp_path / "floats.parquet"
    )
    own = Table(dict(ra=[1.0], dec=[2.0]))
    own["ra"].unit = "km"
    own.write(tmp_path / "km.fits")
    entities = "".join(
        f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    write(
        tmp_path, f'<!DOCTYPE x [<!ENTITY a "ha">{entities}]><VOTABLE>&i;</VOTABLE>', "laughs.xml"
    )
    write(tmp_path, "<html>", "page.fits")
    write(tmp_path, "ra,dec", "own.txt")
    for name, kind, message in (
        ("floats.parquet", InvalidInputError, "'specobjid', row 1"),
        ("page.fits", DamagedFileError, "a web page"),
        ("own.txt", InvalidInputError, "ending"),
        ("km.fits", InvalidInputError, "column 'ra'.*km"),
        ("laughs.xml", DamagedFileError, "votable"),
        ("none.csv", MissingInputError, "no table"),
    ):
        with pytest.raises(kind, match=message):
            read_table(tmp_path / name)


FIRST = 299489676975171584  # plate 266, MJD 51602, fibre 1, run2d 26
NEGATIVE = specobjid_of_spectrum(8954, 57453, 1, "v5_13_2")  # above 2**63


def read_quietly(path, **keywords) -> pd.DataFrame:
    "The catalogue in the order of the file, and its warnings as one text in `attrs`."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = read_table(path, **keywords).sort_values("table_row", ignore_index=True)
    table.attrs["warnings"] = "\n".join(str(warning.message) for warning in caught)
    return table


SPECTRUM = ["plate", "mjd", "fiberid", "run2d"]
NO_SPECTRUM, FIRST_SPECTRUM = [0, 0, 0, ""], [266, 51602, 1, "26"]


@pytest.mark.parametrize(
    "text, expected, warning",
    [
        (
            "#Table1\nobjID,ra,dec,type,specObjID\n12,146.7,-1.0,3,299489676975171584\n"
            "13,146.8,-1.1,3,0\n",
            [FIRST_SPECTRUM, NO_SPECTRUM],
            "of 2: specObjID 1",
        ),
        (
            "ra,dec,plate,mjd,fiberid\n1,2,266,51602,1\n3,4,0,0,0\n5,6,-1,-1,-1\n",
            [FIRST_SPECTRUM, NO_SPECTRUM, NO_SPECTRUM],
            "of 3: plate 2, mjd 2, fiberid 2",
        ),
        (
            "specObjID,bestObjID,ra,dec\n299489676975171584,0,1,2\n",
            [FIRST_SPECTRUM],
            "of 1: bestObjID 1",
        ),
        (
            "objID,ra,dec,u,g,r,i,z,mjd,run\n12,1,2,19,18,17,17,16,51075,756\n",
            [NO_SPECTRUM],
            "taken for a magnitude",
        ),
        ("ra,dec,MJD\n1,2,57023.4\n", [NO_SPECTRUM], ""),
        ("ra,dec,TARGETID,FIBER\n1,2,39627,4999\n", [NO_SPECTRUM], "not read, .*: 'FIBER'"),
        ("ra,dec,plate\n1,2,XE123\n", [NO_SPECTRUM], "not read, .*: 'plate'"),
        ("ra,dec,lmjd,mjd,fiberid\n1,2,1,55874,3\n", [NO_SPECTRUM], "read, .*: 'mjd', 'fiberid'"),
        (
            "ra,dec,specobjid,FIELD,MJD,FIBERID\n1,2,100160005999900060103,101,59701,3\n",
            [NO_SPECTRUM],
            "specobjid 1",
        ),
        (
            "specobjid_1,ra_1,dec_1,z_1,ra_2,dec_2,z_2\n299489676975171584,1,2,0.1,9,9,9\n",
            [FIRST_SPECTRUM],
            "",
        ),
        (
            "plate_x,mjd_x,fiberid_x,ra_x,dec_x,ra_y,dec_y\n266,51602,1,1,2,9,9\n",
            [FIRST_SPECTRUM],
            "",
        ),
        ("SpObjID,RA_ICRS,DE_ICRS,zsp\n299489676975171584,1,2,0.1\n", [FIRST_SPECTRUM], ""),
        (
            "ra,dec,plate,mjd,fiberid,run2d\n1,2,266,51602,1,26.0\n3,4,,,,\n",
            [FIRST_SPECTRUM, NO_SPECTRUM],
            "plate 1",
        ),
        (
            "specObjID,ra,dec,plate,mjd,fiberID\n3722360139651588096,1,2,3306,54922,491\n",
            [[3306, 54922, 491, "104"]],
            "",
        ),
        (
            "specObjID,ra,dec,plate,mjd,fiberID\n3.722360139651588e+18,183,0,3306,54922,491\n",
            [[3306, 54922, 491, "104"]],
            "",
        ),
        (
            "specObjID,ra,dec,plate,mjd,fiberid\n299489676975171584.0,1,2,0,0,0\n"
            "2.9948967697517158e+17,1,2,266,51602,1\n0.0,3,4,,,\n",
            [FIRST_SPECTRUM, NO_SPECTRUM],
            "specObjID 1.*1 rows repeat",
        ),
        (
            "specObjID,ra,dec,plate,mjd,fiberid\n299489000000000000,1,2,266,51602,1\n"
            "299489000000000000,3,4,3306,54922,491\n",
            [FIRST_SPECTRUM, [3306, 54922, 491, "26"]],
            "2 rows have a specobjid of no spectrum .* e.g. 299489000000000000",
        ),
        (
            "specobjid,ra,dec\n999,1,2\n999,3,4\n299489676975171584,5,6\n",
            [NO_SPECTRUM, NO_SPECTRUM, FIRST_SPECTRUM],
            "2 rows have a specobjid of no spectrum .* e.g. 999",
        ),
        ("specObjID,ra,dec,mjd\n299489676975171584,1,2,51075\n", [FIRST_SPECTRUM], ""),
        ("specObjID,ra,dec,plate\n299489676975171584,1,2,266\n", [FIRST_SPECTRUM], ""),
        ("ra,dec,PLATEID,MJD,FIBERID\n1,2,266,51602,1\n", [FIRST_SPECTRUM], ""),
        (
            "ra,dec,PLATE,PLATEID,MJD,FIBERID\n1,2,266,299489402097264640,51602,1\n",
            [FIRST_SPECTRUM],
            "not read, .*'PLATEID'",
        ),
    ],
)
def test_tables_as_people_have_them(tmp_path, text, expected, warning):
    table = read_quietly(write(tmp_path, text))
    assert table[SPECTRUM].to_numpy().tolist() == expected
    assert re.search(warning, table.attrs["warnings"], re.DOTALL)
    assert bool(warning) == bool(table.attrs["warnings"])


@pytest.mark.parametrize("text", [
    "#ra,dec,z\n146.7,-1.0,0.02\n", "# made by hand, 2020\n# ra, dec, z\n146.7,-1.0,0.02\n",
    "# ra, dec in degrees, J2000\nra,dec,z\n146.7,-1.0,0.02\n",
    "ra,dec,z\n# of 2020, by hand, 5\" fibre\n146.7,-1.0,0.02\n  # the end\n   \n"])
def test_comments_stand_anywhere_and_a_header_may_be_one(tmp_path, text):
    (row,) = read_quietly(write(tmp_path, text)).itertuples()
    assert (row.ra, row.dec, row.redshift) == (146.7, -1.0, 0.02)


@pytest.mark.parametrize("none", ["-9", "99.0", "-1", "-9999", "N/A", "", "null", "-", "1e20", "x"])
def test_a_redshift_that_is_none_stops_nothing(tmp_path, none):
    table = read_quietly(write(tmp_path, f"ra,dec,z,petroMag_r\n1,2,0.02,17\n3,4,{none},inf\n"))
    assert table.redshift[0] == 0.02 and np.isnan(table.redshift[1])
    assert np.isnan(table.petromag_r[1])
    assert table.attrs["warnings"] == "own.csv: rows without a value, of 2: z 1, petroMag_r 1."


@pytest.mark.parametrize(
    "none",
    "-9 0.0 -1.0 -9999 N/A 999999 -32768 ~ 32767 65535 2147483647 4294967295 ".split(" "),
)
def test_a_plate_that_is_none_is_no_plate(tmp_path, none):
    row = ",".join([none] * 3)
    table = read_quietly(write(tmp_path, f"ra,dec,plate,mjd,fiberid\n1,2,{row}\n"))
    assert table[SPECTRUM].to_numpy().tolist() == [NO_SPECTRUM]
    assert "of 1: plate 1, mjd 1, fiberid 1" in table.attrs["warnings"]


@pytest.mark.parametrize("ending", ["fits", "vot"])
def test_masked_values_are_absent(tmp_path, ending):
    masked = {
        name: MaskedColumn([value, 7], mask=[False, True])
        for name, value in dict(plate=266, mjd=51602, fiberid=1, z=0.1, run2d="26").items()
    }
    own = Table(dict(ra=[1.0, 3.0], dec=[2.0, 4.0]) | masked)
    own.write(tmp_path / f"own.{ending}", format="votable" if ending == "vot" else "fits")
    table = read_quietly(tmp_path / f"own.{ending}")
    assert table[SPECTRUM].to_numpy().tolist() == [FIRST_SPECTRUM, NO_SPECTRUM]
    assert np.isnan(table.redshift[1]) and "z 1" in table.attrs["warnings"]


@pytest.mark.parametrize(
    "identifiers",
    [
        np.array([FIRST, NEGATIVE], np.uint64),
        np.array([FIRST, NEGATIVE], np.uint64).view(np.int64),
        [f" {FIRST} ", str(NEGATIVE)],
        [str(FIRST).encode(), b"   " + str(NEGATIVE).encode()],
        [Decimal(FIRST), Decimal(int(NEGATIVE))],
        [f"{FIRST:022d}", str(int(NEGATIVE) - 2**64)],
        [f"{float(FIRST)}", str(NEGATIVE)],
    ],
)
def test_identifiers_in_any_type_name_their_spectra(tmp_path, identifiers):
    own = pd.DataFrame(dict(ra=[1.0, 3.0], dec=[2.0, 4.0], SPECOBJID=identifiers))
    own.to_parquet(tmp_path / "own.parquet")
    table = read_quietly(tmp_path / "own.parquet")
    assert table.specobjid.tolist() == [FIRST, int(NEGATIVE)]
    assert table[SPECTRUM].to_numpy().tolist() == [FIRST_SPECTRUM, [8954, 57453, 1, "v5_13_2"]]


@pytest.mark.parametrize("ending", ["fits", "vot", "parquet"])
def test_identifiers_in_columns_of_floats_name_their_spectra(tmp_path, ending):
    own = pd.DataFrame(dict(ra=[1.0, 3.0], dec=[2.0, 4.0], SPECOBJID=[FIRST, np.nan]))
    path = tmp_path / f"own.{ending}"
    if ending == "parquet":
        own.to_parquet(path)
    else:
        Table.from_pandas(own).write(path, format="votable" if ending == "vot" else "fits")
    table = read_quietly(path)
    assert table[SPECTRUM].to_numpy().tolist() == [FIRST_SPECTRUM, NO_SPECTRUM]
    assert table.specobjid.tolist() == [FIRST, specobjid_of_position(3, 4)]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 14_999),
    st.integers(50_000, 66_383),
    st.integers(1, 640),
    st.sampled_from(["26", "103", "104", "v5_4_45", "v5_13_2", "v6_0_4"]),
)
def test_identifiers_hold_the_name_of_their_spectrum(plate, mjd, fiberid, run2d):
    names = spectrum_of_specobjid(specobjid_of_spectrum(plate, mjd, fiberid, run2d))
    assert [values.item() for values in names] == [plate, mjd, fiberid, run2d]


def test_identifiers_that_lost_digits_come_from_the_spectrum_or_are_refused(tmp_path):
    rows = "2.99489676975172e+17,1,2,266,51602,1\n299489951853079000.0,3,4,266,51602,2\n"
    table = read_quietly(write(tmp_path, f"specObjID,ra,dec,plate,mjd,fiberid\n{rows}"))
    expected = specobjid_of_spectrum(266, 51602, [1, 2], ["26", "26"]).tolist()
    assert table.specobjid.tolist() == expected
    assert "specObjID 2" in table.attrs["warnings"]
    path = write(tmp_path, f"specObjID,ra,dec,plate,mjd,fiberid\n{rows}3e17,5,6,,,\n")
    with pytest.raises(InvalidInputError, match="row 3: '3e17'.*Floats keep 16.*as text"):
        read_quietly(path)


def test_identifiers_of_other_surveys_name_no_spectrum(tmp_path):
    of_dr7 = 266 << 48 | 51602 << 32 | 1 << 22
    sdss_v = "100160005999900060103"  # more than 64 bits
    dr18 = 16000 << 50 | 1 << 38 | 9999 << 24 | 10_003 << 10  # a field in the bits of the plate
    other_run2d = FIRST + ((16_001 - 26) << 10)  # v6_60_1
    cells = [of_dr7, sdss_v, dr18, 1237648720693755918, 2**64, other_run2d]
    rows = "".join(f"{cell},{k},2\n" for k, cell in enumerate(cells))
    table = read_quietly(write(tmp_path, f"specobjid,ra,dec\n{rows}"))
    assert table[SPECTRUM].to_numpy().tolist() == [NO_SPECTRUM] * 6
    assert table.specobjid[[0, 2, 3]].tolist() == [of_dr7, dr18, 1237648720693755918]
    assert (table.specobjid[[1, 4]] == specobjid_of_position([1, 4], [2, 2])).all()
    assert "4 rows have a specobjid of no spectrum" in table.attrs["warnings"]
    assert "of 6: specobjid 2" in table.attrs["warnings"]


def test_a_catalogue_of_our_own_is_read_again_without_a_word(tmp_path):
    table = read_table(write(tmp_path, "ra,dec,plate,mjd,fiberid\n1,2,4055,55359,1\n"), "dr16")
    table = pd.concat([table, read_table(write(tmp_path, "ra,dec\n3,4\n"))])
    table[["specobjid", "ra", "dec"]].to_csv(tmp_path / "again.csv", index=False)
    again = read_quietly(tmp_path / "again.csv")
    assert again.specobjid.tolist() == table.specobjid.tolist()
    assert again.run2d.tolist() == ["v5_13_0", ""] and not again.attrs["warnings"]


@pytest.mark.parametrize(
    "changes",
    [dict(plate=267), dict(mjd=51603), dict(fiberid=2), dict(run2d="103"), dict(run2d="v5_13_2")],
)
def test_an_identifier_of_another_spectrum_is_refused(tmp_path, changes):
    row = dict(specobjid=FIRST, ra=1, dec=2) | dict(zip(SPECTRUM, FIRST_SPECTRUM, strict=True))
    rows = pd.DataFrame([row | dict(specobjid="", fiberid=7, run2d="26"), row | changes])
    rows.to_csv(tmp_path / "own.csv", index=False)
    ((name, value),) = changes.items()
    expected = row[name]
    message = f"'{name}', row 2: '{value}'; expected {expected} as in specobjid {FIRST}"
    with pytest.raises(InvalidInputError, match=message):
        read_quietly(tmp_path / "own.csv")


def test_the_index_of_a_parquet_file_is_a_column(tmp_path):
    own = pd.DataFrame(dict(ra=[1.0, 3.0], dec=[2.0, 4.0]), index=[FIRST, int(NEGATIVE)])
    own.rename_axis("specobjid").to_parquet(tmp_path / "own.parquet")
    assert read_quietly(tmp_path / "own.parquet").specobjid.tolist() == [FIRST, int(NEGATIVE)]
    own.set_axis([0, 0]).to_parquet(tmp_path / "own.parquet")
    assert read_quietly(tmp_path / "own.parquet").ra.tolist() == [1, 3]


@pytest.mark.parametrize(
    "ra, dec",
    [
        ("PLUG_RA", "PLUG_DEC"),
        ("TARGET_RA", "TARGET_DEC"),
        ("RAdeg", "DEdeg"),
        ("raMean", "decMean"),
        ("raStack", "decStack"),
        ("alpha", "delta"),
        ("ALPHA_J2000", "DELTA_J2000"),
        ("RA_1", "DEC_1"),
        ("meanra", "meandec"),
        ("RA(deg)", "DEC(deg)"),
        ("RA (deg)", "DEC (deg)"),
        ("RA_d", "DEC_d"),
        ("RACAT", "DECCAT"),
        ("FIBER_RA", "FIBER_DEC"),
        ("_RA.icrs", "_DE.icrs"),
        ("RA_ICRS", "DE_ICRS"),
        ("Right Ascension", "Declination"),
        ("R.A.", "Decl."),
        ("RAJ2000", "dec"),
    ],
)
def test_names_of_positions(tmp_path, ra, dec):
    table = read_quietly(write(tmp_path, f"{ra},{dec},{ra}_err,rad\n1,2,3,4\n"))
    assert table[["ra", "dec"]].to_numpy().tolist() == [[1, 2]] and not table.attrs["warnings"]


@pytest.mark.parametrize(
    "text, read",
    [
        ("_RAJ2000,_DEJ2000,RAJ2000,DEJ2000\n1,2,09 46 48.0,-01 00 00\n", "'_RAJ2000' and"),
        ("RA,DEC,RA_d,DEC_d\n09 46 48.0,-01 00 00,1,2\n", "'RA_d' and 'DEC_d'"),
        ("RA_1,DEC_1,ra,dec\n3,4,1,2\n", None),
        ("RA_2,DEC_2,RA_1,DEC_1\n3,4,1,2\n", None),
        ("TARGET_RA,RA,TARGET_DEC\n1,3,2\n", None),
    ],
)
def test_of_several_positions_degrees_of_one_pair_are_read(tmp_path, text, read):
    table = read_quietly(write(tmp_path, text))
    assert table[["ra", "dec"]].to_numpy().tolist() == [[1, 2]]
    assert read in table.attrs["warnings"] if read else not table.attrs["warnings"]


def test_hours_and_degrees_below_zero_are_read_with_a_warning(tmp_path):
    rows = "09 46 48.0,-01 00 00\n10h46m48s,-01d00m00s\n11:46:48,-1:00:00\n"
    table = read_quietly(write(tmp_path, f"RA,DEC\n{rows}"))
    np.testing.assert_allclose(table[["ra", "dec"]], [[146.7, -1], [161.7, -1], [176.7, -1]])
    assert "hours and degrees with minutes" in table.attrs["warnings"]
    table = read_quietly(write(tmp_path, "RA,DEC\n-13.3,2\n179,4\n"))
    np.testing.assert_allclose(table.ra, [346.7, 179])
    assert "360 degrees are added in 1 rows" in table.attrs["warnings"]


@pytest.mark.parametrize(
    "ra, dec",
    [
        ("09 46.8", "\N{MINUS SIGN}01 00"),
        ("146d42m", "-1:00.0"),
        ("09h46.8m ", "-01°00′00″"),
        ("09\xa046\xa048", "-1 0"),
    ],
)
def test_hours_and_degrees_may_lack_seconds(tmp_path, ra, dec):
    table = read_quietly(write(tmp_path, f"RA,DEC\n{ra},{dec}\n10 46 48,-01 00 00\n"))
    np.testing.assert_allclose(table[["ra", "dec"]], [[146.7, -1], [161.7, -1]])


def test_right_ascensions_that_may_be_hours_are_warned_of(tmp_path):
    for n_rows, message in ((20, "'RA': all values are below 24 and read as degrees"), (19, "")):
        text = "RA,DEC\n" + "".join(f"{k},{k}\n" for k in range(n_rows))
        warned = read_quietly(write(tmp_path, text)).attrs["warnings"]
        assert message in warned and bool(message) == bool(warned)


@pytest.mark.parametrize("ra", ["\N{MINUS SIGN}13.3", "-13.3\xa0", " -13.3 "])
def test_signs_and_spaces_of_word_processors_are_read(tmp_path, ra):
    np.testing.assert_allclose(read_quietly(write(tmp_path, f"ra,dec\n{ra},2\n")).ra, 346.7)


def two_tables() -> list:
    "Two tables with other positions."
    return [Table(dict(ra=[1.0], dec=[2.0])), Table(dict(ra=[3.0], dec=[2.0]))]


@pytest.mark.parametrize(
    "frame, stated",
    [
        (dict(EQUINOX=1950.0), "1950.0"),
        (dict(RADESYS="FK4"), "FK4"),
        (dict(RADESYS="GALACTIC"), "GALACTIC"),
        (dict(RADESYS="FK5", EQUINOX=2000.0), None),
        (dict(B="eq_FK4 B1950"), "eq_FK4 B1950"),
        (dict(B="eq_FK4 B1950", J="eq_FK5 J2000"), None),
        (dict(J="ICRS"), None),
    ],
)
def test_positions_in_another_stated_frame_are_refused(tmp_path, frame, stated):
    own = Table(dict(ra=[1.0], dec=[2.0]))
    path = tmp_path / ("own.fits" if set(frame) <= {"EQUINOX", "RADESYS"} else "own.vot")
    if path.suffix == ".fits":
        own.meta |= frame
        own.write(path)
    else:
        file = votable.from_table(own)
        for name, system in frame.items():
            system, _, equinox = system.partition(" ")
            coosys = votable.tree.CooSys(ID=name, system=system, equinox=equinox or None)
            file.resources[0].coordinate_systems.append(coosys)
        file.to_xml(str(path))
    if stated is None:
        assert read_quietly(path).ra.tolist() == [1]
    else:
        with pytest.raises(InvalidInputError, match=f"in the frame {stated}; .*icrs"):
            read_quietly(path)


@pytest.mark.parametrize(
    "columns",
    [
        dict(ra=[[1.0], [3.0]], dec=[[2.0], [4.0]], mag=np.ones((2, 5))),
        dict(RA_1=[1.0, 3.0], DEC_1=[2.0, 4.0]),
        dict(ra=[1.0, 3.0], dec=[2.0, 4.0], coord=SkyCoord([1.0, 3.0], [2.0, 4.0], unit="deg")),
        dict(ra=Column([1.0, 3.0], unit="deg J2000"), dec=Column([2.0, 4.0], unit="deg J2000")),
    ],
)
@pytest.mark.filterwarnings("ignore::astropy.units.UnitsWarning")
def test_columns_of_other_forms(tmp_path, columns):
    Table(columns).write(tmp_path / "own.fits")
    read = read_quietly(tmp_path / "own.fits")[["ra", "dec"]]
    np.testing.assert_allclose(read, [[1, 2], [3, 4]])


@pytest.mark.parametrize("ending", ["fits", "vot"])
def test_of_several_tables_one_is_chosen(tmp_path, ending):
    path = tmp_path / f"own.{ending}"
    if ending == "fits":
        hdus = fits.HDUList([fits.PrimaryHDU(), *map(fits.table_to_hdu, two_tables())])
        for hdu, name in zip(hdus[1:], ("galaxies", "stars"), strict=True):
            hdu.name = name
        hdus.writeto(path)
    else:
        file, other = map(votable.from_table, two_tables())
        file.resources[0].tables.append(other.get_first_table())
        for table, name in zip(file.iter_tables(), ("galaxies", "stars"), strict=True):
            table.name = name
        file.to_xml(str(path))
    for name, ra in (("Galaxies", 1), ("stars", 3), ("1", 1), (2, 3)):
        assert read_quietly(path, table_name=name).ra.tolist() == [ra]
    listed = r"1 '(?i:galaxies)' \(1 rows, 2 columns\), 2 '"
    for name in (None, "3"):
        with pytest.raises(InvalidInputError, match=listed):
            read_quietly(path, table_name=name)
    with pytest.raises(InvalidInputError, match="is one table"):
        read_quietly(write(tmp_path, "ra,dec\n1,2\n"), table_name="stars")


def test_the_table_of_a_profile_is_chosen_by_name_or_number():
    for name in ("GALAXIES", 2, None):
        profile = get_profile("paper", [f"archives.table_name={name}"])
        assert profile.archives.table_name == name


def test_columns_of_a_votable_are_called_by_their_names(tmp_path):
    file = votable.from_table(Table(dict(col1=[1.0], col2=[2.0])))
    for column, name in zip(file.get_first_table().fields, ("RAJ2000", "DEJ2000"), strict=True):
        column.name = name
    file.to_xml(str(tmp_path / "own.vot"))
    assert read_quietly(tmp_path / "own.vot").ra.tolist() == [1]


@pytest.mark.parametrize("ending", ["csv", "fits", "vot", "xml"])
def test_packed_tables_are_read_up_to_a_size(tmp_path, ending, monkeypatch):
    own = Table(dict(ra=[1.0], dec=[2.0]))
    form = dict(csv="ascii.csv", fits="fits").get(ending, "votable")
    own.write(tmp_path / f"own.{ending}", format=form)
    packed = gzip.compress((tmp_path / f"own.{ending}").read_bytes())
    for name in (f"own.{ending}.gz", f"unnamed.{ending}"):
        (tmp_path / name).write_bytes(packed)
        assert read_quietly(tmp_path / name).ra.tolist() == [1]
    (tmp_path / f"cut.{ending}.gz").write_bytes(packed[:-9])
    with pytest.raises(DamagedFileError):
        read_quietly(tmp_path / f"cut.{ending}.gz")
    monkeypatch.setattr(chapter, "_MAX_BYTES", 10)
    with pytest.raises(InvalidInputError, match="unpacks to more than"):
        read_quietly(tmp_path / f"own.{ending}.gz")


def test_folders_of_parquet_files_are_one_table(tmp_path):
    own = pd.DataFrame(
        dict(
            ra=[1.0, 3.0, 5.0],
            dec=[2.0, 4.0, 6.0],
            plate=[266, 266, 267],
            mjd=51602,
            fiberid=[1, 2, 1],
        )
    )
    own.to_parquet(tmp_path / "own", partition_cols=["plate"])
    table = read_quietly(tmp_path / "own")
    assert sorted(table.plate) == [266, 266, 267] and sorted(table.ra) == [1, 3, 5]
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInputError, match="no .parquet file"):
        read_quietly(tmp_path / "empty")


def test_files_of_a_folder_may_have_other_columns_and_types(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    write(folder, "about", "README.md")
    (folder / "_delta_log").mkdir()
    pd.DataFrame(dict(ra=["x"])).to_parquet(folder / "_delta_log" / "0.parquet")
    first = pd.DataFrame(dict(ra=[1], dec=[2.0], SPECOBJID=[int(NEGATIVE) - 2**64]))
    first.set_index("SPECOBJID", drop=False).to_parquet(folder / "a.pq")
    second = pd.DataFrame(dict(ra=[3.5], dec=np.float32([4.0]), z=[0.1]))
    second.to_parquet(folder / "b.parquet")
    table = read_quietly(folder)
    assert table.ra.tolist() == [1, 3.5] and table.redshift.tolist()[1] == 0.1
    assert table.specobjid[0] == NEGATIVE
    second.assign(dec="north").to_parquet(folder / "c.parquet")
    with pytest.raises(DamagedFileError, match="Unable to merge: Field dec"):
        read_quietly(folder)


def test_text_in_other_encodings_is_read(tmp_path):
    path = tmp_path / "own.csv"
    path.write_bytes("ra,dec,name\n1,2,Seyfert \xe9toile\x85\n".encode("latin-1"))
    table = read_quietly(path)
    assert table.ra.tolist() == [1] and "read as Latin-1" in table.attrs["warnings"]
    path.write_text("ra,dec,name\n1,2,étoile\n", encoding="utf-16")
    assert read_quietly(path).ra.tolist() == [1]


@pytest.mark.parametrize(
    "name, release",
    [("spec-0266-51602-0001.fits", "26"), ("spec-3586-55181-0003.fits", "v5_11_0")],
)
def test_tables_in_real_spectra(real_data, name, release):
    path = real_data / "sdss" / name
    with pytest.raises(InvalidInputError, match="tables: 1 'COADD'"):
        read_quietly(path)
    row = read_quietly(path, table_name="2").iloc[0]
    numbers = [int(number) for number in name[5:-5].split("-")]
    assert row[SPECTRUM].tolist() == [*numbers, release]
    assert row.specobjid == specobjid_of_spectrum(*numbers, release)


def random_sky(seed, n) -> tuple:
    "Positions all over the sky."
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 360, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 8, 16, 32]))
def test_blocks_are_whole_and_fractions_near(seed, nside):
    ra, dec = random_sky(seed, 4000)
    sky = split_by_sky(ra, dec, (0.6, 0.1, 0.1, 0.2), nside, seed)
    table = pd.DataFrame(dict(block=sky.block, split=sky.split, inside=dec > -30))
    assert (table.groupby("block").split.nunique() == 1).all()
    assert (table.split[~table.inside] == "train").all()
    inside = table[table.inside]
    scatter = (1 / inside.block.nunique() + 1 / len(inside)) ** 0.5
    for name, fraction in zip(SPLITS[1:], (0.1, 0.1, 0.2), strict=True):
        # blocks at the southern edge are train
        assert (
            abs((inside.split == name).mean() - fraction)
            < 4 * scatter * fraction**0.5 + 0.1 * fraction
        )


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.permutations(range(500)))
def test_a_galaxy_keeps_its_part_when_others_come_and_go(seed, order):
    ra, dec = random_sky(3, 500)
    before = split_by_sky(ra, dec, seed=seed)
    rows = order[:300]
    extra = random_sky(4, 200)
    after = split_by_sky(np.append(ra[rows], extra[0]), np.append(dec[rows], extra[1]), seed=seed)
    np.testing.assert_array_equal(after.block[:300], before.block[rows])
    np.testing.assert_array_equal(after.split[:300], before.split[rows])


def test_other_seeds_are_other_splits_and_an_empty_part_is_an_error():
    ra, dec = random_sky(5, 1000)
    first, second = (split_by_sky(ra, dec, seed=seed).split for seed in (1, 2))
    assert 0.3 < (first == second).mean() < 0.7
    with pytest.raises(
        InvalidInputError, match="No galaxy is in the part valid: 2 galaxies lie in 1 blocks"
    ):
        split_by_sky([1.0, 1.1], [0.0, 0.1], (0.6, 0.1, 0.1, 0.2), 1, 3)
    assert set(split_by_sky(ra, dec, (1, 0, 0, 0)).split) == {"train"}
    assert set(split_by_sky([1.0, 2.0], [-40, -50]).split) == {"train"}
    with pytest.raises(InvalidInputError, match="finite"):
        split_by_sky([1.0], [91.0])
    with pytest.raises(InvalidInputError, match="power of 2"):
        split_by_sky(ra, dec, nside=12)


def test_few_galaxies_of_ones_own_are_all_test(tmp_path):
    own = ArchiveParameters(table=str(tmp_path / "own.csv"))
    few = read_table(write(tmp_path, "ra,dec,plate,mjd,fiberid\n1,2,266,51602,1\n"))
    assert split_catalogue(few, own, 1).split.tolist() == ["test"]
    ra, dec = random_sky(6, 500)
    many = pd.DataFrame(dict(ra=ra, dec=dec, plate=266))
    assert set(split_catalogue(many, own, 1).split) == set(SPLITS)
    assert set(split_catalogue(many.assign(plate=0), own, 1).split) == {"test"}
    with pytest.raises(InvalidInputError, match="No galaxy"):
        split_catalogue(few, ArchiveParameters(), 1)
