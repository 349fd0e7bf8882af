"Packing of cutouts: interrupted, damaged and foreign input."
import numpy as np
import pytest
import zarr
from astropy.io import fits
from specpred import images
from specpred.config import DamagedFileError, InvalidInputError


def write_cutouts(folder, n, size=16):
    rng = np.random.default_rng(0)
    for k in range(n):
        (folder/str(k)).mkdir(parents=True)
        for band in images.BANDS:
            header = fits.Header({"EXPTIME": 100., "FILTER": f"{band}.00000"})
            fits.writeto(folder/str(k)/f"{band}.fits", rng.normal(size=(size, size)).astype("f4"), header)


def everything(store):
    return {name: array[...] for name, array in zarr.open_group(store, mode="r").arrays()}


def test_an_interrupted_packing_goes_on_from_its_last_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "SHARD", 16)
    write_cutouts(tmp_path/"raw", 40)
    pack = lambda store: images.pack_images(np.arange(40), tmp_path/"raw", store, 12, n_jobs=1, progress=False)
    pack(tmp_path/"whole.zarr")

    write_shard, starts, interrupt_at = images._write_shard, [], 16
    def interrupted(group, start, *rest):
        if start == interrupt_at: raise KeyboardInterrupt
        starts.append(start)
        write_shard(group, start, *rest)
    monkeypatch.setattr(images, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt): pack(tmp_path/"cut.zarr")
    assert not (tmp_path/"cut.zarr").exists()
    interrupt_at = None
    pack(tmp_path/"cut.zarr")
    assert starts == [0, 16, 32]  # the first shard was not read again
    whole, resumed = everything(tmp_path/"whole.zarr"), everything(tmp_path/"cut.zarr")
    for name in whole: np.testing.assert_array_equal(whole[name], resumed[name])


def test_another_request_does_not_take_over_a_partial_store(tmp_path, monkeypatch):
    write_cutouts(tmp_path/"raw", 4)
    monkeypatch.setattr(images, "_write_shard", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): images.pack_images(np.arange(4), tmp_path/"raw", tmp_path/"a.zarr", 12, n_jobs=1, progress=False)
    monkeypatch.undo()
    images.pack_images(np.arange(3), tmp_path/"raw", tmp_path/"a.zarr", 8, n_jobs=1, progress=False)
    assert images.open_images(tmp_path/"a.zarr").flux.shape == (3, 5, 8, 8)


@pytest.mark.parametrize("spoil, say", [
    (lambda p: p.write_bytes(p.read_bytes()[:3000]), "not a readable FITS"),
    (lambda p: fits.writeto(p, np.zeros((16, 16), "f4"), overwrite=True), "EXPTIME"),
    (lambda p: fits.writeto(p, np.zeros((16, 16), "f4"), fits.Header({"EXPTIME": -1.}), overwrite=True), "EXPTIME is -1"),
    (lambda p: fits.writeto(p, np.full((16, 16), np.nan, "f4"), fits.Header({"EXPTIME": 1.}), overwrite=True), "no finite pixel"),
    (lambda p: fits.writeto(p, np.zeros((8, 8), "f4"), fits.Header({"EXPTIME": 1.}), overwrite=True), "cannot be cropped"),
    (lambda p: p.unlink(), "has no r.fits")])
def test_a_bad_galaxy_is_named_and_the_others_are_used(tmp_path, spoil, say):
    write_cutouts(tmp_path/"raw", 3)
    spoil(tmp_path/"raw/1/r.fits")
    problems = images.pack_images(np.arange(3), tmp_path/"raw", tmp_path/"a.zarr", 12, n_jobs=1, progress=False)
    assert list(problems) == ["1"] and say in problems["1"]
    assert images.open_images(tmp_path/"a.zarr").usable.tolist() == [True, False, True]


def test_what_is_no_store_is_said_to_be_none(tmp_path):
    (tmp_path/"a.zarr").mkdir()
    with pytest.raises(DamagedFileError, match="rerun 03_images"): images.open_images(tmp_path/"a.zarr")
    with pytest.raises(InvalidInputError, match="no galaxy has all five images"):
        images.pack_images(np.array([], np.uint64), tmp_path, tmp_path/"b.zarr", 8)
