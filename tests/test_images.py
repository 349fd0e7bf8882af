"Packing of cutouts: interrupted, damaged and foreign input."
import multiprocessing, sys, warnings
import numpy as np
import pytest
import torch
import xarray
import zarr
from astropy.io import fits
from specpred import images
from specpred.config import DamagedFileError, InvalidInputError, MissingInputError


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
    def interrupted(folder, group, start, *rest):
        if start == interrupt_at: raise KeyboardInterrupt
        starts.append(start)
        write_shard(folder, group, start, *rest)
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


@pytest.fixture
def cut_off(monkeypatch):
    "Runs a packing that is interrupted when 16 galaxies are written."
    monkeypatch.setattr(images, "SHARD", 16)
    write_shard = images._write_shard
    def interrupted(folder, group, start, *rest):
        if start == 16: raise KeyboardInterrupt
        write_shard(folder, group, start, *rest)
    def run(pack):
        with monkeypatch.context() as patch:
            patch.setattr(images, "_write_shard", interrupted)
            with pytest.raises(KeyboardInterrupt): pack()
    return run


def test_other_pixels_under_the_same_numbers_begin_anew(tmp_path, cut_off):
    flux = np.random.default_rng(0).normal(100, 10, (40, 5, 12, 12))
    cut_off(lambda: images.pack_arrays(np.arange(40), flux, tmp_path/"arrays.zarr"))
    images.pack_arrays(np.arange(40), flux + 1000, tmp_path/"arrays.zarr")
    np.testing.assert_allclose(images.open_images(tmp_path/"arrays.zarr").flux[:], flux + 1000, rtol=1e-3)

    for folder in ("raw", "other"): write_cutouts(tmp_path/folder, 40)
    for k in range(40): fits.setval(tmp_path/f"other/{k}/r.fits", "EXPTIME", value=50.)
    pack = lambda folder: images.pack_images(np.arange(40), tmp_path/folder, tmp_path/"a.zarr", 12, n_jobs=1, progress=False)
    cut_off(lambda: pack("raw"))
    pack("other")
    assert (images.open_images(tmp_path/"a.zarr").exptime[:, 1] == 50).all()


def test_a_store_does_not_depend_on_where_it_was_made(tmp_path):
    for folder in ("a", "b"):
        write_cutouts(tmp_path/folder/"raw", 3)
        images.pack_images(np.arange(3), tmp_path/folder/"raw", tmp_path/folder/"images.zarr", 12, n_jobs=1, progress=False)
    first, second = ({p.relative_to(tmp_path/folder): p.read_bytes() for p in (tmp_path/folder/"images.zarr").rglob("*") if p.is_file()}
        for folder in ("a", "b"))
    assert first == second


def test_a_cutout_that_arrives_during_an_interruption_is_taken(tmp_path, cut_off):
    write_cutouts(tmp_path/"raw", 40)
    (tmp_path/"raw/3/g.fits").rename(tmp_path/"late.fits")
    pack = lambda: images.pack_images(np.arange(40), tmp_path/"raw", tmp_path/"a.zarr", 12, n_jobs=1, progress=False)
    cut_off(pack)
    (tmp_path/"late.fits").rename(tmp_path/"raw/3/g.fits")
    assert pack() == {} and images.open_images(tmp_path/"a.zarr").usable.all()


def test_pixels_without_data_do_not_count_as_sky(tmp_path):
    sky = np.random.default_rng(0).normal(50, 10, (2, 5, 64, 64))
    sky[1, :, :12] = np.nan
    images.pack_arrays([0, 1], sky, tmp_path/"a.zarr")
    store = images.open_images(tmp_path/"a.zarr")
    np.testing.assert_allclose(store.sky, 50, atol=2)
    np.testing.assert_allclose(store.noise, 10, rtol=.15)


@pytest.mark.parametrize("spoil, say", [
    (lambda p: p.write_bytes(p.read_bytes()[:3000]), "not a readable FITS"),
    (lambda p: fits.writeto(p, np.zeros((16, 16), "f4"), overwrite=True), "EXPTIME"),
    (lambda p: fits.writeto(p, np.zeros((16, 16), "f4"), fits.Header({"EXPTIME": -1.}), overwrite=True), "EXPTIME is -1"),
    (lambda p: fits.writeto(p, np.full((16, 16), np.nan, "f4"), fits.Header({"EXPTIME": 1.}), overwrite=True), "no finite pixel"),
    (lambda p: [fits.writeto(q, np.zeros((8, 8), "f4"), fits.Header({"EXPTIME": 1.}), overwrite=True) for q in p.parent.iterdir()], "cannot be cropped"),
    (lambda p: fits.writeto(p, np.zeros((20, 20), "f4"), fits.Header({"EXPTIME": 1.}), overwrite=True), "different shapes"),
    (lambda p: fits.writeto(p, np.zeros((16, 16), "f4"), fits.Header({"EXPTIME": 1., "FILTER": "z.00000"}), overwrite=True), "holds the z band"),
    (lambda p: p.unlink(), "has no r.fits")])
def test_a_bad_galaxy_is_named_and_the_others_are_used(tmp_path, spoil, say):
    write_cutouts(tmp_path/"raw", 3)
    spoil(tmp_path/"raw/1/r.fits")
    problems = images.pack_images(np.arange(3), tmp_path/"raw", tmp_path/"a.zarr", 12, n_jobs=1, progress=False)
    assert list(problems) == ["1"] and say in problems["1"]
    opened = images.open_images(tmp_path/"a.zarr")
    assert opened.usable.tolist() == [True, False, True]
    assert not opened.flux[1].any() and opened.usable.tolist() == [k.any() for k in opened.flux[:]]
    assert sum(map(len, opened.batches(np.arange(3), 2))) == 3 and not images.check_images(tmp_path/"a.zarr")


@pytest.mark.parametrize("append", [False, True])
def test_a_shard_of_nothing_but_bad_galaxies_is_written(tmp_path, monkeypatch, append):
    monkeypatch.setattr(images, "SHARD", 16)
    write_cutouts(tmp_path/"raw", 17)
    (tmp_path/"raw/16/g.fits").write_bytes(b"nothing")
    images.pack_images(np.arange(16 if append else 17), tmp_path/"raw", tmp_path/"a.zarr", 12, n_jobs=1, progress=False)
    if append: assert list(images.append_images([16], tmp_path/"raw", tmp_path/"a.zarr", n_jobs=1, progress=False)) == ["16"]
    opened = images.open_images(tmp_path/"a.zarr")
    assert opened.usable.tolist() == [True]*16 + [False] and not images.check_images(tmp_path/"a.zarr")
    assert not opened.read([16]).any() and opened.read([15]).any()


def test_a_store_without_images_that_are_zero_reads_them_as_zero(three_shards):
    "zarr leaves them out unless it is told to write them, as other writers of stores may."
    store, flux = three_shards
    with zarr.config.set({"array.write_empty_chunks": False}): zarr.open_group(store, mode="r+")["flux"][3] = 0
    opened = open_quietly(store)
    opened.damaged.clear()
    np.testing.assert_allclose(opened.read([2, 4]), flux[[2, 4]], rtol=1e-3)
    assert not opened.read([3]).any()


def test_what_is_no_store_is_said_to_be_none(tmp_path):
    (tmp_path/"a.zarr").mkdir()
    with pytest.raises(DamagedFileError, match="rerun 11_images"): images.open_images(tmp_path/"a.zarr")
    (tmp_path/"a.zarr/zarr.json").write_text("[]")
    with pytest.raises(DamagedFileError, match="rerun 11_images"): images.open_images(tmp_path/"a.zarr")
    with pytest.raises(MissingInputError, match="11_images makes it"): images.open_images(tmp_path/"none.zarr")
    with pytest.raises(MissingInputError, match="no cutout"): images.read_cutout(tmp_path/"none.fits")
    with pytest.raises(InvalidInputError, match="no galaxy has all five images"):
        images.pack_images(np.array([], np.uint64), tmp_path, tmp_path/"b.zarr", 8)


def some_flux(n, size=12, seed=1):
    return np.random.default_rng(seed).normal(100, 30, (n, 5, size, size)).astype("f4")


@pytest.fixture
def three_shards(tmp_path, monkeypatch):
    "A store of 40 galaxies in three shards, and their images."
    monkeypatch.setattr(images, "SHARD", 16)
    flux = some_flux(40)
    images.pack_arrays(np.arange(40), flux, tmp_path/"a.zarr")
    return tmp_path/"a.zarr", flux


def open_quietly(store):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return images.open_images(store)


def flip_a_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 8
    path.write_bytes(content)


@pytest.mark.parametrize("spoil, seen_at_once", [
    (lambda p: p.unlink(), True),
    (lambda p: p.write_bytes(p.read_bytes()[:-50]), True),
    (lambda p: flip_a_bit(p, 100), False),
    (lambda p: flip_a_bit(p, -20), False)])
def test_a_damaged_shard_is_named_and_the_others_can_be_read(three_shards, spoil, seen_at_once):
    store, flux = three_shards
    spoil(store/"flux/c/1/0/0/0")
    assert list(images.check_images(store)) == [str(store/"flux/c/1/0/0/0")]
    opened = open_quietly(store)
    assert opened.usable.sum() == (24 if seen_at_once else 40)
    with pytest.raises(DamagedFileError, match="flux/c/1/0/0/0 is damaged.*Rows 16 to 31"): opened.read(np.arange(40))
    good = np.r_[0:16, 32:40]
    np.testing.assert_allclose(opened.read(good), flux[good], rtol=1e-3)


@pytest.mark.parametrize("spoil", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:20])])
def test_damaged_columns_are_noticed(three_shards, spoil):
    store, _ = three_shards
    spoil(store/"noise/c/0/0")
    with pytest.raises(DamagedFileError, match="column.* of .*a.zarr .*rerun 11_images"): images.open_images(store)


def test_a_truncated_description_is_noticed(three_shards):
    store, _ = three_shards
    (store/"zarr.json").write_bytes((store/"zarr.json").read_bytes()[:40])
    with pytest.raises(DamagedFileError, match="not an image store"): images.open_images(store)


def test_a_warning_names_a_shard_that_is_gone(three_shards):
    store, _ = three_shards
    (store/"flux/c/2/0/0/0").unlink()
    with pytest.warns(UserWarning, match="flux/c/2/0/0/0 is damaged: the file is gone"): images.open_images(store)


def test_damaged_shards_are_read_from_cutouts_again(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "SHARD", 16)
    write_cutouts(tmp_path/"raw", 40)
    images.pack_images(np.arange(40), tmp_path/"raw", tmp_path/"a.zarr", 12, n_jobs=1, progress=False)
    before = everything(tmp_path/"a.zarr")
    flip_a_bit(tmp_path/"a.zarr/flux/c/2/0/0/0", 50)
    images.append_images([], tmp_path/"raw", tmp_path/"a.zarr", n_jobs=1, progress=False)
    after = everything(tmp_path/"a.zarr")
    assert not images.check_images(tmp_path/"a.zarr")
    for name in before: np.testing.assert_array_equal(before[name], after[name])


def test_appending_equals_packing_at_once_and_leaves_the_old_store_until_then(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "SHARD", 16)
    write_cutouts(tmp_path/"raw", 40)
    (tmp_path/"raw/30/g.fits").unlink()
    pack = lambda ids, store: images.pack_images(np.arange(ids), tmp_path/"raw", store, 12, n_jobs=1, progress=False)
    pack(40, tmp_path/"whole.zarr"), pack(20, tmp_path/"a.zarr")
    content = lambda: {p.relative_to(tmp_path): p.read_bytes() for p in (tmp_path/"a.zarr").rglob("*") if p.is_file()}
    old, write_shard = content(), images._write_shard
    def interrupted(folder, group, start, *rest):
        if start == 32: raise KeyboardInterrupt
        write_shard(folder, group, start, *rest)
    monkeypatch.setattr(images, "_write_shard", interrupted)
    append = lambda: images.append_images(np.arange(20, 40), tmp_path/"raw", tmp_path/"a.zarr", n_jobs=1, progress=False)
    with pytest.raises(KeyboardInterrupt): append()
    assert content() == old
    monkeypatch.setattr(images, "_write_shard", write_shard)
    assert list(append()) == ["30"]
    whole, appended = everything(tmp_path/"whole.zarr"), everything(tmp_path/"a.zarr")
    for name in whole: np.testing.assert_array_equal(whole[name], appended[name])
    with pytest.raises(InvalidInputError, match="listed twice"): append()


@pytest.mark.parametrize("position, one", [(50, True), (-20, False)])
def test_mending_a_shard_loses_no_galaxy_that_can_be_saved(tmp_path, position, one):
    "A bit of one galaxy is wrong, or of the table of contents, and then all of them have to be read again."
    write_cutouts(tmp_path/"raw", 10)
    images.pack_images(np.arange(10), tmp_path/"raw", tmp_path/"a.zarr", 12, n_jobs=1, progress=False)
    before, shard = everything(tmp_path/"a.zarr"), tmp_path/"a.zarr/flux/c/0/0/0/0"
    flip_a_bit(shard, position)
    damaged, mend = shard.read_bytes(), lambda folder: images.append_images([], folder, tmp_path/"a.zarr", n_jobs=1, progress=False)
    with pytest.raises(DamagedFileError, match="stays as it was"): mend(tmp_path/"nowhere")
    assert shard.read_bytes() == damaged
    if one:  # its cutouts are enough
        for k in range(1, 10): (tmp_path/f"raw/{k}/g.fits").unlink()
    mend(tmp_path/"raw")
    after = everything(tmp_path/"a.zarr")
    for name in before: np.testing.assert_array_equal(before[name], after[name])
    assert not images.check_images(tmp_path/"a.zarr")


def test_galaxies_whose_cutouts_come_late_are_filled_in(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "SHARD", 16)
    write_cutouts(tmp_path/"raw", 40)
    images.pack_images(np.arange(40), tmp_path/"raw", tmp_path/"whole.zarr", 12, n_jobs=1, progress=False)
    late = {k: (tmp_path/f"raw/{k}/i.fits").read_bytes() for k in (7, 20)}
    for k in late: (tmp_path/f"raw/{k}/i.fits").unlink()
    assert list(images.pack_images(np.arange(30), tmp_path/"raw", tmp_path/"a.zarr", 12, n_jobs=1, progress=False)) == ["7", "20"]
    append = lambda ids: images.append_images(ids, tmp_path/"raw", tmp_path/"a.zarr", n_jobs=1, progress=False)
    (tmp_path/"raw/7/i.fits").write_bytes(late[7])
    (tmp_path/"raw/8/i.fits").unlink()  # read once, and not needed any more
    assert list(append([7, 20])) == ["20"]
    (tmp_path/"raw/20/i.fits").write_bytes(late[20])
    assert append([20, *range(30, 40)]) == {}
    whole, filled = everything(tmp_path/"whole.zarr"), everything(tmp_path/"a.zarr")
    for name in whole: np.testing.assert_array_equal(whole[name], filled[name])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_xarray_reads_a_store(tmp_path, dtype):
    flux = some_flux(5)
    images.pack_arrays(np.arange(5), flux, tmp_path/"a.zarr", dtype=dtype)
    data = xarray.open_zarr(tmp_path/"a.zarr", consolidated=False)
    assert data.flux.dims == ("galaxy", "band", "y", "x") and data.flux.dtype == dtype and data.attrs["bands"] == "grizy"
    np.testing.assert_allclose(data.flux.astype("f4")*data.scale, flux, rtol=1e-3 if dtype == "float16" else 0)
    assert (data.usable.values == True).all() and data.noise.dims == ("galaxy", "band")
    np.testing.assert_array_equal((data.flux.astype("f4")*data.scale).values, images.open_images(tmp_path/"a.zarr").flux[:])


def test_half_precision_keeps_faint_sky_and_saturated_stars(tmp_path):
    rng = np.random.default_rng(0)
    flux = rng.normal(0, [[[.01]], [[1]], [[50]], [[1e5]], [[1e-4]]], (2, 5, 40, 40)).astype("f4")
    flux[1, :, 20, 20] = 1e9
    images.pack_arrays([1, 2], flux, tmp_path/"a.zarr")
    store = images.open_images(tmp_path/"a.zarr")
    assert np.isfinite(store.flux[:]).all()
    sky = np.abs(store.read([1])[0] - flux[0])/store.noise[0][:, None, None]
    assert np.sqrt((sky**2).mean()) < 5e-4
    np.testing.assert_allclose(store.read([2])[0, :, 20, 20], 1e9, rtol=1e-3)


def test_arrays_of_wrong_shape_and_empty_bands(tmp_path):
    for wrong in (some_flux(3)[:, :4], some_flux(3)[0], some_flux(2), some_flux(3)[..., :10]):
        with pytest.raises(InvalidInputError, match="expected images"): images.pack_arrays(np.arange(3), wrong, tmp_path/"a.zarr")
    flux = some_flux(3)
    flux[1, 4] = np.nan
    assert images.pack_arrays(np.arange(3), flux, tmp_path/"a.zarr") == {"1": "no data: band y has no finite pixel"}
    assert images.open_images(tmp_path/"a.zarr").usable.tolist() == [True, False, True]
    with pytest.raises(InvalidInputError, match="float16"): images.pack_arrays(np.arange(3), flux, tmp_path/"b.zarr", dtype="int8")
    with pytest.raises(InvalidInputError, match="exptime"): images.pack_arrays(np.arange(3), flux, tmp_path/"b.zarr", exptime=np.ones(3))
    with pytest.raises(InvalidInputError, match="expected images"): images.pack_arrays(np.arange(3), [1, 2, 3], tmp_path/"b.zarr")
    for ids in ([-1, 1, 2], [.5, 1, 2], [[1, 2, 3]]):
        with pytest.raises(InvalidInputError, match="whole numbers from 0"): images.pack_arrays(ids, flux, tmp_path/"b.zarr")
    for wrong in (dict(size=0), dict(size=8, max_mask_fraction=7)):
        with pytest.raises(InvalidInputError): images.pack_images([1], tmp_path, tmp_path/"b.zarr", **wrong)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_images_are_converted_on_their_way(tmp_path, dtype, kind):
    flux = np.random.default_rng(1).normal(100, 10, (9, 5, 12, 12)).astype(np.float32)
    images.pack_arrays(np.arange(9), flux, tmp_path/"a.zarr", dtype=dtype)
    store, order, tolerance = images.open_images(tmp_path/"a.zarr"), [8, 0, 3, 3, 5], 1e-6 if dtype == "float32" and kind == np.float32 else 2e-3
    def in_place(x):
        x -= 1
        return x
    for convert, expected in ((None, flux), (in_place, flux - 1), (lambda x: 2*x, 2*flux), (lambda x: x[:, ::-1], flux[:, :, ::-1])):
        out = np.full((5, 5, 12, 12), np.nan, kind)
        assert store.read_rows(order, convert, out) is out
        np.testing.assert_allclose(out, expected[order], rtol=tolerance)


def test_images_are_read_while_images_are_read_and_after_a_fork(three_shards):
    "The threads that read are kept: they must not wait for each other, nor be looked for in a process that has none of them."
    store = images.open_images(three_shards[0])
    expected = store.read_rows(np.arange(40))
    np.testing.assert_array_equal(store.read_rows(np.arange(40), lambda x: x + store.read_rows([0, 1]).mean()), expected + expected[:2].mean())
    same = lambda: store.read_rows(np.arange(40)).tobytes() == expected.tobytes()
    child = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(0 if same() else 1))
    child.start()
    child.join(60)
    child.kill()
    child.join()
    assert child.exitcode == 0


def test_rows_that_are_not_there(three_shards):
    opened = images.open_images(three_shards[0])
    for rows in ([-1], [40], [.5], np.ones(40, bool), [[1, 2]]):
        with pytest.raises(InvalidInputError, match="positions from 0 to 39"): opened.read_rows(rows)
    for out in (np.empty((2, 5, 12, 12), np.float32), np.empty((1, 5, 12, 12)), np.empty((2, 5, 12, 12), np.float32)[::2, :, ::-1]):
        with pytest.raises(InvalidInputError, match="out must be"): opened.read_rows([3], out=out)
    assert opened.read_rows([]).shape == (0, 5, 12, 12) and opened.flux[-1].shape == (5, 12, 12)


@pytest.mark.parametrize("arguments, say", [(dict(noise=np.zeros((8, 5))), "softening"), (dict(noise=np.ones(5)), "fitted on"),
    (dict(factor=-1.), "softening"), (dict(flux=np.zeros((0, 5, 12, 12))), "fitted on"), (dict(flux=np.full((2, 5, 12, 12), np.nan)), "not finite"),
    (dict(flux=np.ones((2, 5, 12, 12))), "std must be")])
def test_transforms_are_not_fitted_on_what_tells_nothing(arguments, say):
    with pytest.raises(InvalidInputError, match=say): images.fit_transform(**dict(flux=some_flux(8), noise=np.ones((8, 5))) | arguments)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_whole_numbers_are_no_fluxes(kind):
    transform = images.fit_transform(some_flux(8), np.ones((8, 5)))
    with pytest.raises(InvalidInputError, match="floating-point"): transform(kind(np.ones((5, 12, 12), int)))


def test_transforms_and_augmentations_that_cannot_be():
    five = (1.,)*5
    for arguments in (("bogus", five, five, five), ("asinh", (0.,)*5, five, five), ("linear", five, five, (0.,)*5),
            ("linear", five, (np.nan,)*5, five), ("linear", five, five, five[:3])):
        with pytest.raises(InvalidInputError): images.ImageTransform(*arguments)
    for wrong in (dict(max_shift=-1), dict(max_shift=.5), dict(p_rotate=7), dict(max_rotate=-1.)):
        with pytest.raises(InvalidInputError): images.Augmentation(**wrong)
    with pytest.raises(InvalidInputError, match="cannot be moved by 12"): images.shift(torch.zeros(5, 12, 12), 12, 0)


def test_a_store_with_another_order_of_bands_is_refused(tmp_path):
    images.pack_arrays(np.arange(3), some_flux(3), tmp_path/"a.zarr")
    zarr.open_group(tmp_path/"a.zarr", mode="r+").attrs["bands"] = "yzirg"
    with pytest.raises(DamagedFileError, match="has bands yzirg, expected grizy"): images.open_images(tmp_path/"a.zarr")


def test_rotation_is_what_grid_sample_of_an_affine_grid_gives():
    batch, degrees = torch.as_tensor(some_flux(3, 33)), torch.tensor([-10., 3., 7.])
    cos, sin, zero = torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees)), torch.zeros(3)
    matrix = torch.stack([torch.stack([cos, -sin, zero], -1), torch.stack([sin, cos, zero], -1)], 1)
    grid = torch.nn.functional.affine_grid(matrix, batch.shape, align_corners=True)
    expected = torch.nn.functional.grid_sample(batch, grid, padding_mode="reflection", align_corners=True)
    torch.testing.assert_close(images.rotate(batch, degrees), expected, rtol=1e-4, atol=1e-2)
