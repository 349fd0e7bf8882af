"specpred.catalogue: SkyServer's answers, tables of one's own, and the split by sky."

import warnings

import numpy as np
import pandas as pd
import pytest
from astropy.table import Table
from hypothesis import given, settings
from hypothesis import strategies as st

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
)
from specpred.formats import specobjid_of_position, spectrum_path


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
        ("ra,dec,z\n1,2,99\n", "'z', row 1"),
        ("RAJ2000,dec\n-9999,2\n", "'RAJ2000', row 1"),
        ("RAJ2000,dec,plate,mjd,fiber\n1,2,266,51602,9999\n", "'fiber', row 1"),
        ("ra,dec,plate,MJD,Fiber\n1,2,266,51602,1\n5,2,266,51602,1\n", "'plate', row 2"),
        ("ra,dec,fiber\n1,2,9\n", "'fiber', row 1"),
        ("rra,dec\n1,2\n", "is it 'rra'"),
        ("ra,dec,specobjid\n1,2,-5\n", "'specobjid', row 1"),
        ("ra,dec\n1\n", "own.csv: row 1 has 1 fields"),
        ("ra,dec\n1,2,3\n", "own.csv: row 1 has 3 fields"),
        ("ra,dec\n", "no rows"),
        ("", "own.csv: not CSV"),
        ("ra,dec,ra\n1,2,1\n", "'ra' and 'ra' both mean ra"),
        ("ra;dec\n1;2\n", "separate columns by commas"),
        ("ra,dec,plate,mjd,fiberid\n1,2,99999,51602,1\n", "'plate', row 1"),
        ("ra,dec,plate,mjd,fiberid\n1,2,266.5,51602,1\n", "'plate', row 1"),
        ("ra,dec,specobjid\n1,2,299489676975171584.0\n", "'specobjid', row 1"),
        ("ra,dec,plate,mjd,fiberid,run2d\n1,2,266,51602,1,../x\n", "'run2d', row 1"),
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
    for text in ("ra,dec,g,r,i,z,zspec\n1,2,13,12,11.5,11.2,0.1\n", "ra,dec,r,z\n1,2,12,0.1\n"):
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
