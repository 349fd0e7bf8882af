"specpred.survey: whole catalogues, and what happens to them when processes, disks and rows fail."
import ast
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from specpred import survey
from specpred.cli import app
from specpred.config import (
    ArchiveError, InvalidInputError, MissingExtraError, MissingInputError, SpecpredError)
from specpred.images import pack_arrays
from specpred.inputs import name_galaxies, read_image, write_cube
from specpred.predict import PRETRAINED, GalaxiesFailed, Predictor, example_galaxies
from specpred.surveys import PS1

lsdb = pytest.importorskip("lsdb")
cloudpickle = pytest.importorskip("cloudpickle")
distributed = pytest.importorskip("distributed")
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not import this file

LISTS = pd.ArrowDtype(pa.list_(pa.float32()))
POISON = {3: [1., 2.], 20: None, 31: [np.nan]*5*64*64, 33: [7.]*5*64*64}


def examples():
    "Images of the two installed galaxies, (2, bands, 64, 64) nJy."
    model = survey.load_predictor().model
    files = name_galaxies(example_galaxies(), PS1.bands).values()
    return np.stack([read_image(paths, model).flux for paths in files])


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    flux = examples()[rng.integers(0, 2, 36)]*rng.uniform(0.7, 1.3, (36, 1, 1, 1))
    flux[12, :, 32, 32] *= 1e33  # passes all checks of images, and is too much for the network
    return flux.astype(np.float32)


@pytest.fixture(scope="module")
def frame(images):
    "Rows of a catalogue with large identifiers; some images are none."
    made = lsdb.generate_catalog(36, 1, seed=1, ra_range=(0, 40), dec_range=(-20, 20),
        margin_threshold=None, partition_rows=36)
    frame = pd.DataFrame(made.compute()[["ra", "dec"]]).reset_index(drop=True)
    frame.insert(0, "id", 2**63 + 7 + np.arange(36, dtype=np.uint64))
    column = [POISON.get(k, image.ravel()) for k, image in enumerate(images)]
    return frame.assign(image=pd.Series(column, dtype=LISTS))


def write_hats(frame, path):
    made = lsdb.from_dataframe(frame, margin_threshold=None, partition_rows=7, lowest_order=1,
        highest_order=6)
    made.write_catalog(path, catalog_name="made", as_collection=False, progress_bar=False,
        create_per_partition_statistics=False)
    return path


@pytest.fixture(scope="module")
def hats(frame, tmp_path_factory):
    path = write_hats(frame, tmp_path_factory.mktemp("survey")/"hats")
    assert len(list(path.glob("dataset/Norder*/*/*.parquet"))) >= 6
    return path


KILLED = """
import os, signal, sys
from specpred import survey
original, calls = survey.predict_partition, []
def predict(frame, **options):
    if len(frame): calls.append(len(frame))
    if len(calls) == 6: os.kill(os.getpid(), signal.SIGKILL)
    return original(frame, **options)
survey.predict_partition = predict
survey.predict_catalog(*sys.argv[1:], scheduler="synchronous", progress=False)
"""


@pytest.fixture(scope="module", autouse=True)
def killed(hats):
    "Where a run in a process of its own writes, and that process, which dies by itself."
    out = hats.parent/"killed"
    process = subprocess.Popen([sys.executable, "-c", KILLED, hats, out], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True)
    yield out, process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def expected(frame): return survey.predict_partition(frame)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    "Two processes of one thread, which import while the first tests run."
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None,
            env=dict(OMP_NUM_THREADS="1")) as cluster, distributed.Client(cluster) as client:
        loading = [client.submit(load, name, workers=name) for name in cluster.scheduler.workers]
        yield cluster
    assert len(loading) == 2


def load(name): survey.load_predictor()


@pytest.fixture(scope="module")
def finished(hats, cluster):
    "A catalogue that two processes made, what it is made from, and the counts."
    out = hats.parent/"spectra"
    return out, hats, run(hats, out, cluster)


def run(hats, out, cluster=None, **options):
    "Predicts a catalogue on the cluster, or in this process."
    scheduler = cluster.scheduler_address if cluster else "synchronous"
    return survey.predict_catalog(hats, out, scheduler=scheduler, progress=False, **options)


def partitions(out): return sorted(out.glob("dataset/Norder*/*/*.parquet"))
def times(files): return {file: file.stat().st_mtime_ns for file in files}


def assert_same(result, expected):
    "The same galaxies, each once, with the same predictions; in any order."
    assert sorted(result.id) == sorted(expected.id)
    result = result.set_index("id").loc[expected.id]
    expected = expected.set_index("id")
    for name in ("status", "reason"): assert result[name].tolist() == expected[name].tolist()
    for name in ("mask_fraction", "target_1", "target_6", "light_r", "ra"):
        ours, theirs = (f[name].astype(float) for f in (result, expected))
        np.testing.assert_allclose(ours, theirs, 1e-5, 1e-6)  # sums of other batches round apart
    for name in ("wavelength", "flux", "lower", "upper"):
        ours, theirs = (f[f"spectrum.{name}"] for f in (result, expected))
        assert np.array_equal(ours.index, theirs.index)
        np.testing.assert_allclose(ours.astype(float), theirs.astype(float), 1e-5, 1e-7)


def assert_complete(out, expected, counts):
    assert_same(lsdb.open_catalog(out).compute(), expected)
    assert counts == {name: (expected.status == name).sum() for name in counts}
    assert not (out/"done").exists() and not (out/"hists").exists()
    assert json.loads((out/"specpred.json").read_text())["galaxies"] == counts


# --- one partition

def test_a_partition_keeps_rows_identifiers_and_order(frame, expected):
    assert expected.index.equals(frame.index) and expected.id.tolist() == frame.id.tolist()
    assert expected.id.dtype == np.uint64 and expected.id.min() > 2**63
    sound = expected[expected.status != "failed"]
    flux = np.stack([spectrum.flux for spectrum in sound.spectrum])
    direct = survey.load_predictor().predict(
        np.stack([image for image in frame.image[sound.index]]).reshape(-1, 5, 64, 64))
    np.testing.assert_allclose(flux, direct.flux, 1e-5, 1e-7)
    np.testing.assert_allclose(sound.light_g.astype(float), direct.light[:, 0], 1e-5)
    np.testing.assert_allclose(sound.target_2.astype(float), direct.targets[:, 1], 1e-5)


def test_poisonous_rows_fail_alone_and_say_why(expected):
    failed = expected[expected.status == "failed"]
    assert failed.index.tolist() == sorted([*POISON, 12])
    said = {3: "shape (2,)", 20: "no image", 31: "has no data", 33: "is constant",
        12: "not finite"}
    for row, text in said.items(): assert text in failed.reason[row]
    assert failed.target_1.isna().all() and all(len(s) == 0 for s in failed.spectrum)
    assert expected.status[0] == "predicted" and len(expected.spectrum[0]) == 1000


def test_an_empty_partition_has_the_same_columns(frame, expected):
    empty = survey.predict_partition(frame.iloc[:0])
    assert len(empty) == 0 and empty.dtypes.to_dict() == expected.dtypes.to_dict()
    only_failed = survey.predict_partition(frame.iloc[3:4])
    assert only_failed.dtypes.to_dict() == expected.dtypes.to_dict()


def test_two_galaxies_may_have_one_index(frame, expected):
    some = frame.iloc[5:8].set_axis([9, 9, 8])
    result = survey.predict_partition(some)
    assert result.index.tolist() == [9, 9, 8]
    assert_same(result, expected.iloc[5:8])


def test_the_size_of_batches_changes_nothing(frame, expected):
    assert_same(survey.predict_partition(frame, batch_size=7), expected)


@pytest.mark.parametrize("form", ["lists of lists", "arrays", "tensors", "bands", "file of bands"])
def test_images_come_in_any_form(frame, images, expected, form, tmp_path):
    import nested_pandas
    rows = slice(5, 8)
    some, flux = frame.iloc[rows].drop(columns="image"), images[rows]
    if form == "lists of lists":
        column = pd.Series(pd.array(flux.tolist(), pd.ArrowDtype(pa.array(flux.tolist()).type)))
    elif form == "arrays": column = pd.Series(list(flux))
    elif form == "tensors":
        tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(flux))
        column = pd.Series(tensors, dtype=pd.ArrowDtype(tensors.type))
    else:
        lists = [pa.array(list(flux[:, k].reshape(3, -1))) for k in range(5)]
        bands = pa.StructArray.from_arrays(lists, list(PS1.bands))
        column = pd.Series(bands, dtype=nested_pandas.NestedDtype(bands.type))
    some = nested_pandas.NestedFrame(some).assign(image=column.set_axis(some.index))
    if form.startswith("file"):
        some.to_parquet(tmp_path/"some.parquet")
        some = nested_pandas.read_parquet(tmp_path/"some.parquet")
    assert_same(survey.predict_partition(some), expected.iloc[rows])


def test_images_come_from_folders(images, tmp_path):
    some = pd.DataFrame(dict(id=np.arange(4, dtype=np.uint64) + 2**63))
    ids = some.id.tolist()
    for k in (0, 1): write_cube(tmp_path/f"cubes/{ids[k]}.fits", images[k], PS1)
    (tmp_path/f"cubes/{ids[2]}.fits").write_text("<html>")
    pack_arrays(some.id[:3], np.where(np.arange(3)[:, None, None, None] < 2, images[:3], np.nan),
        tmp_path/"store", dtype="float32")
    direct = survey.load_predictor().predict(images[:2])
    for name, said in (("cubes", ["a web page", "There is no file"]),
            ("store", ["not usable", "not in the image store"])):
        result = survey.predict_partition(some, cutouts=tmp_path/name)
        assert list(result.columns[:2]) == ["id", "status"]
        assert result.status.tolist()[2:] == ["failed"]*2
        for reason, text in zip(result.reason[2:], said, strict=True): assert text in reason
        np.testing.assert_allclose(np.stack([s.flux for s in result.spectrum[:2]]), direct.flux,
            1e-5, 1e-7)


def test_cutouts_of_another_survey_are_refused(images, tmp_path):
    other = replace(PS1, pixel_scale=0.4)
    write_cube(tmp_path/"cubes/1.fits", images[0], other)
    pack_arrays([1], images[:1], tmp_path/"store", other)
    (tmp_path/"empty").mkdir()
    one = pd.DataFrame(dict(id=[1]))
    for name, said in (("cubes", "pixels of 0.4"), ("store", "0.4 arcsec a pixel"),
            ("empty", "no file is called <id>.fits")):
        with pytest.raises(InvalidInputError, match=said):
            survey.predict_partition(one, cutouts=tmp_path/name)


def test_the_archive_is_asked_by_position(frame, images, expected, tmp_path, monkeypatch):
    asked = []
    def fetch(positions, model, folder, parameters, mock):
        asked.append((positions.ra.tolist(), folder))
        names = survey.coordinate_names(positions.ra, positions.dec)
        files = [[tmp_path/f"{k}.fits"] for k in (5, 6)]
        return dict(zip(names, [*files, MissingInputError("404")], strict=True))
    monkeypatch.setattr(survey, "fetch_cutouts", fetch)
    for k in (5, 6): write_cube(tmp_path/f"{k}.fits", images[k], PS1)
    some = frame.iloc[5:9].rename(columns=dict(ra="RA", dec="DE"))
    some.loc[8, "RA"] = np.nan
    archive = survey.Archive(tmp_path/"cache")
    columns = survey.Columns("id", "RA", "DE")
    result = survey.predict_partition(some, cutouts=archive, columns=columns)
    assert asked[0][0] == frame.ra[5:8].tolist() and tmp_path/"cache" in asked[0][1].parents
    assert result.status.tolist()[2:] == ["failed"]*2
    assert "404" in result.reason[7] and "no position" in result.reason[8]
    assert_same(result.iloc[:2].rename(columns=dict(RA="ra")), expected.iloc[5:7])
    with pytest.raises(InvalidInputError, match="no column ra, dec; it has id, RA, DE"):
        survey.predict_partition(some.drop(columns="image"), cutouts=archive)
    def down(*args): raise ArchiveError("down for maintenance")
    monkeypatch.setattr(survey, "fetch_cutouts", down)
    with pytest.raises(ArchiveError): survey.predict_partition(some, None, archive, columns)


def test_weights_are_read_once_and_again_when_they_change(tmp_path):
    folder = shutil.copytree(PRETRAINED/"mock-sky", tmp_path/"mine")
    first = survey.load_predictor(folder)
    assert survey.load_predictor(str(folder)) is first
    os.utime(folder/"about.json", ns=(1, 1))
    assert survey.load_predictor(folder) is not first


# --- whole catalogues

def test_two_processes_give_what_one_gives(finished, expected, cluster):
    out, hats, counts = finished
    assert_complete(out, expected, counts)
    record = json.loads((out/"specpred.json").read_text())
    assert record["predictor"] == Predictor.load().about | dict(folder=str(PRETRAINED/"mock-sky"))
    result = lsdb.open_catalog(out)
    assert str(result.dtypes["id"]).startswith("uint64")
    assert result.dtypes["spectrum"] == expected.dtypes["spectrum"]
    before = times(partitions(out))
    assert run(hats, out, cluster) == counts and times(partitions(out)) == before


class KillOnce(distributed.WorkerPlugin):
    """Notes the galaxies that are predicted. The first process whose earlier partitions are all on
    disk dies at its next one."""
    name = "kill once"
    def __init__(self, out, log): self.out, self.log = out, log

    def setup(self, worker):
        from specpred import survey
        self.original, seen = survey.predict_partition, []
        def is_written(place):
            notes = [note.name.split("_") for note in self.out.glob("done/*_done")]
            return any(place >> 2*(29 - int(order)) == int(pixel) for order, pixel, _ in notes)
        def predict(frame, **options):
            if not len(frame): return self.original(frame, **options)
            if seen and all(is_written(place) for place in seen):
                try: os.close(os.open(self.log/"killed", os.O_CREAT | os.O_EXCL))
                except FileExistsError: pass
                else: os.kill(os.getpid(), signal.SIGKILL)
            seen.append(int(frame.index[0]))
            with open(self.log/f"{os.getpid()}.txt", "a") as log: print(*frame.id, file=log)
            return self.original(frame, **options)
        survey.predict_partition = predict

    def teardown(self, worker):
        from specpred import survey
        survey.predict_partition = self.original


def test_a_killed_process_costs_its_current_partition_only(hats, expected, cluster, tmp_path):
    out, log = tmp_path/"out", tmp_path/"log"
    log.mkdir()
    with distributed.Client(cluster) as client:
        client.register_plugin(KillOnce(out, log))
        try: counts = run(hats, out, cluster)
        finally: client.unregister_worker_plugin("kill once")
    assert (log/"killed").exists() and len(list(log.glob("*.txt"))) >= 2
    assert_complete(out, expected, counts)
    predicted = Counter(" ".join(path.read_text() for path in log.glob("*.txt")).split())
    assert predicted == dict.fromkeys(map(str, expected.id), 1)


def test_a_killed_run_goes_on_and_half_written_files_are_made_again(
    killed, hats, expected, cluster):
    out, process = killed
    _, printed = process.communicate(timeout=400)
    assert process.returncode == -signal.SIGKILL, printed
    notes = [path.name.split("_")[:2] for path in (out/"done").iterdir()]
    files = [survey._partition_file(out, int(order), int(pixel)) for order, pixel in notes]
    cut, without_note, without_count, empty, whole = files
    cut.write_bytes(cut.read_bytes()[:-100])
    (out/f"done/{'_'.join(notes[1])}_done").unlink()  # as killed between the two notes
    (out/f"hists/{'_'.join(notes[2])}_histogram.npz").write_bytes(b"PK")
    empty.write_bytes(b"")
    before = times(files)
    counts = run(hats, out, cluster)
    assert_complete(out, expected, counts)
    same = [file for file in files if file.stat().st_mtime_ns == before[file]]
    assert same == [whole]


def test_killed_before_its_last_lines_a_run_is_only_finished(finished, expected, tmp_path):
    out = shutil.copytree(finished[0], tmp_path/"spectra")
    record = json.loads((out/"specpred.json").read_text())
    del record["galaxies"], record["finished"]
    (out/"specpred.json").write_text(json.dumps(record))
    (out/"done").mkdir()  # LSDB was removing its notes
    (out/"done/1_17_done").touch()
    before = times(partitions(out))
    assert_complete(out, expected, run(finished[1], out))
    assert times(partitions(out)) == before


def test_a_full_disk_stops_the_run_which_then_goes_on(hats, expected, tmp_path, monkeypatch):
    out, calls, write = tmp_path/"out", [], pq.ParquetWriter.write_table
    def full(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3: raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(survey.RunStopped, match="No space left on device.*same call goes on"):
            run(hats, out)
    files = [survey._partition_file(out, *map(int, path.name.split("_")[:2]))
        for path in (out/"done").iterdir()]
    before = times(files)
    assert len(before) == 2
    assert_complete(out, expected, run(hats, out))
    assert times(files) == before


def test_errors_of_dask_say_that_the_call_goes_on(tmp_path):
    class KilledWorker(Exception): pass
    with pytest.raises(survey.RunStopped, match="too little memory.*the same call goes on"):
        with survey._stops_explained(tmp_path): raise KilledWorker("task x")
    with pytest.raises(InvalidInputError, match="^as it is$"):
        with survey._stops_explained(tmp_path): raise InvalidInputError("as it is")


def test_a_folder_belongs_to_one_run(finished, frame, tmp_path):
    (out, hats, _), mine = finished, tmp_path/"mine"
    predictor = Predictor.load()
    next(predictor.model.model.parameters()).data += 0.01
    predictor.save(mine)
    with pytest.raises(InvalidInputError, match="from other weights"): run(hats, out, model=mine)
    other = write_hats(frame.iloc[:30], tmp_path/"other")
    with pytest.raises(InvalidInputError, match="from other catalogue"): run(other, out)
    (tmp_path/"mine/read me.txt").touch()
    with pytest.raises(InvalidInputError, match="holds other files"): run(hats, mine)
    with survey.only_one(out, "prediction"), pytest.raises(SpecpredError, match="under way"):
        run(hats, out)


def test_what_is_missing_is_named(hats, tmp_path, monkeypatch):
    out = tmp_path/"out"
    with pytest.raises(MissingInputError, match="is no HATS catalogue"): run(tmp_path, out)
    with pytest.raises(InvalidInputError, match="no column objid; it has id, ra, dec, image"):
        run(hats, out, id_column="objid")
    with pytest.raises(MissingInputError, match="flux' are neither a folder nor one of the col"):
        run(hats, out, cutouts="flux")
    with pytest.raises(MissingInputError, match="no predictor"): run(hats, out, model="none")
    monkeypatch.setitem(sys.modules, "lsdb", None)
    with pytest.raises(MissingExtraError, match=r'pip install "specpred\[survey\]"'):
        run(hats, out)
    assert not out.exists()
    tree = ast.parse(Path(survey.__file__).read_text())
    imported = {name.name for node in tree.body if isinstance(node, ast.Import)
        for name in node.names}
    assert not imported & {"lsdb", "hats", "nested_pandas", "distributed", "dask"}


# --- plain Parquet

def test_plain_parquet_gives_the_same_and_skips_what_is_done(frame, expected, cluster, tmp_path):
    folder, out = tmp_path/"in", tmp_path/"out"
    (folder/"south").mkdir(parents=True)
    pieces = {folder/"a.parquet": slice(0, 30), folder/"south/b.parquet": slice(30, 36)}
    for path, rows in pieces.items(): frame.iloc[rows].to_parquet(path)
    frame.iloc[:0].to_parquet(folder/"none.parquet")
    options = dict(scheduler=cluster.scheduler_address, progress=False)
    counts = survey.predict_parquet(folder, out, **options)
    assert sum(counts.values()) == 36 and counts["failed"] == 5
    import nested_pandas
    made = {path.relative_to(out) for path in out.rglob("*.parquet")}
    assert made == {path.relative_to(folder) for path in folder.rglob("*.parquet")}
    both = [nested_pandas.read_parquet(out/path.relative_to(folder)) for path in pieces]
    assert_same(pd.concat(both), expected)
    before = times(out/name for name in made)
    assert survey.predict_parquet(folder, out, **options) == counts
    assert times(out/name for name in made) == before
    half = out/"a.parquet"
    half.write_bytes(half.read_bytes()[:-100])
    frame.iloc[30:35].to_parquet(folder/"south/b.parquet")
    assert sum(survey.predict_parquet(folder, out, **options).values()) == 35
    (folder/"south/b.parquet").write_bytes(b"PAR1")
    with pytest.raises(SpecpredError, match="south/b.parquet"):
        survey.predict_parquet(folder, out, **options)


def test_plain_parquet_refuses_what_cannot_be(frame, tmp_path):
    with pytest.raises(MissingInputError, match="holds no file"):
        survey.predict_parquet(tmp_path, tmp_path/"out")
    frame.drop(columns=["ra", "dec"]).iloc[:2].to_parquet(tmp_path/"a.parquet")
    with pytest.raises(InvalidInputError, match="lies in the folder"):
        survey.predict_parquet(tmp_path, tmp_path/"out")
    with pytest.raises(InvalidInputError, match="no column ra, dec; it has id, image"):
        survey.predict_parquet(tmp_path, tmp_path.parent/"out", cutouts="archive")


def test_the_command_predicts_catalogues_and_folders(frame, hats, tmp_path):
    (tmp_path/"in").mkdir()
    frame.iloc[:4].to_parquet(tmp_path/"in/a.parquet")
    def run(*words):
        words = ["predict", *map(str, words), "--scheduler", "synchronous"]
        return CliRunner().invoke(app, words)
    of_folder = run("--parquet", tmp_path/"in", "--out", tmp_path/"out")
    assert isinstance(of_folder.exception, GalaxiesFailed), of_folder.output
    assert "3 predicted, 1 failed" in of_folder.output
    of_catalogue = run("--hats", hats, "--out", tmp_path/"spectra")
    assert "5 failed" in of_catalogue.output
    assert len(lsdb.open_catalog(tmp_path/"spectra")) == 36
    assert run("--hats", hats, "--plot").exit_code == 2
    assert isinstance(run("--hats", tmp_path/"in").exception, MissingInputError)
