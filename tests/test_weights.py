"specpred.weights: files that are what they claim to be, and pickles that are never executed."
import io
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.decomposition import PCA
from torch import nn

from specpred.config import DamagedFileError, MissingInputError, SpecpredError, WeightsError
from specpred.vae import InfoVAE
from specpred.weights import (fingerprint, load_checkpoint, load_state, published_image_tensors,
    published_pca, published_vae_tensors, read_weights, save_checkpoint, write_weights)

PUBLISHED = published_image_tensors, published_vae_tensors, published_pca


def write_zip(content, path): torch.save(content, path)
def write_stream(content, path): torch.save(content, path, _use_new_zipfile_serialization=False)
def write_pickle(content, path): path.write_bytes(pickle.dumps(content))


WRITE_IN_RANDOM_ORDER = """
import random, sys
import torch
from specpred.weights import write_weights
layers = [(f"layer{k}", torch.full((k + 1, 2, 3, 3), k/3)) for k in range(20)]
tensors = [(name, tensor.to((torch.float32, torch.float64, torch.int64)[k % 3]))
    for k, (name, tensor) in enumerate(layers)]
formats = torch.contiguous_format, torch.channels_last
tensors = [(name, tensor.contiguous(memory_format=random.choice(formats)))
    for name, tensor in tensors]
facts = [(f"fact{k}", {"a": k, "b": [k, "é"]}) for k in range(20)]
write_weights(sys.argv[1], dict(random.sample(tensors, 20)), dict(random.sample(facts, 20)))
"""

def test_equal_contents_give_equal_bytes(tmp_path):
    "In any order, any memory format and any process."
    files = [tmp_path/seed for seed in ("0", "1", "2")]
    for file in files:
        subprocess.run([sys.executable, "-c", WRITE_IN_RANDOM_ORDER, file], check=True,
            env=os.environ | {"PYTHONHASHSEED": file.name})
    contents = {file.read_bytes() for file in files}
    assert len(contents) == 1
    assert read_weights(files[0]).metadata["fact3"] == {"a": 3, "b": [3, "é"]}


def test_tensors_that_share_memory_are_written(tmp_path):
    matrix = torch.arange(6.).view(2, 3)
    tensors = {"whole": matrix, "again": matrix, "row": matrix[1], "turned": matrix.T}
    write_weights(tmp_path/"a", tensors, {})
    read = read_weights(tmp_path/"a").tensors
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_model_without_parameters_is_filled():
    statistics = nn.BatchNorm1d(3, affine=False)
    state = statistics.state_dict() | {"running_mean": torch.arange(3.)}
    assert torch.equal(load_state(statistics, state).running_mean, torch.arange(3.))


@pytest.mark.parametrize("entries", ({}, {"format": "specpred", "name": '"conv3"'},
    {"specpred": "[1"}, {"specpred": "3"}))
def test_files_without_our_metadata_are_refused(tmp_path, entries):
    "Also those of earlier versions, which had one entry for each fact."
    save_file({"a": torch.zeros(2)}, tmp_path/"a", entries)
    with pytest.raises(WeightsError, match="no metadata of ours"): read_weights(tmp_path/"a")


def test_damaged_files_are_refused(tmp_path):
    write_weights(tmp_path/"a", {"a": torch.zeros(100)}, {})
    content = (tmp_path/"a").read_bytes()
    for damaged in (content[:-10], content[:50], b"", b"not safetensors at all"):
        (tmp_path/"a").write_bytes(damaged)
        with pytest.raises(DamagedFileError): read_weights(tmp_path/"a")
    for read in (read_weights, *PUBLISHED):
        with pytest.raises(MissingInputError): read(tmp_path/"nothing")


@pytest.mark.parametrize("content", (b"", b"no checkpoint", {"fingerprint": "another"}, [1]))
def test_a_checkpoint_of_something_else_is_not_used(tmp_path, content):
    if isinstance(content, bytes): (tmp_path/"a").write_bytes(content)
    else: torch.save(content, tmp_path/"a")
    assert load_checkpoint(tmp_path/"a", "ours") is None


def test_a_checkpoint_belongs_to_data_and_settings(tmp_path):
    data = np.arange(6.)
    ours = fingerprint({"lr": 1, "seed": 2}, data)
    save_checkpoint(tmp_path/"a", ours, {"epoch": 3, "weights": [torch.ones(2)]})
    assert load_checkpoint(tmp_path/"a", fingerprint({"seed": 2, "lr": 1}, data))["epoch"] == 3
    others = ({"lr": 1}, data), ({"lr": 1, "seed": 2}, data + 1), ({"lr": 1, "seed": 2}, data[None])
    for other in others: assert load_checkpoint(tmp_path/"a", fingerprint(*other)) is None


@pytest.mark.parametrize("write", (write_zip, write_stream))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_published_autoencoder(tmp_path, write, dtype):
    network = InfoVAE(50, 4, (24, 12)).to(dtype)
    network.dropout, network.score = nn.Dropout(0.1), 3.5  # the published one has these too
    write(network, tmp_path/"a")
    tensors = published_vae_tensors(tmp_path/"a")
    assert tensors.keys() == network.state_dict().keys()
    assert all(torch.equal(value, tensors[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("protocol", (2, 3, 4, 5))
def test_published_axes(tmp_path, protocol):
    pca = PCA(3).fit(np.random.default_rng(0).standard_normal((100, 4)))
    (tmp_path/"a").write_bytes(pickle.dumps(pca, protocol))
    axes = published_pca(tmp_path/"a")
    expected = pca.components_, pca.mean_, pca.explained_variance_ratio_
    assert all(map(np.array_equal, axes, expected))


def test_other_files_are_named(tmp_path):
    write_pickle(PCA(2).fit(np.eye(3)), tmp_path/"pca")
    write_pickle(PCA(2, whiten=True).fit(np.eye(3)), tmp_path/"whitened")
    write_stream(InfoVAE(5, 1, (3, 2)), tmp_path/"vae")
    for read, name, message in ((published_vae_tensors, "pca", "holds no InfoVAE"),
            (published_pca, "vae", "holds no fitted PCA"),
            (published_pca, "whitened", "whiten=True")):
        with pytest.raises(WeightsError, match=message): read(tmp_path/name)
    content = (tmp_path/"vae").read_bytes()
    for n in (0, 10, 500, len(content) - 4):
        (tmp_path/"cut").write_bytes(content[:n])
        with pytest.raises(SpecpredError): published_vae_tensors(tmp_path/"cut")


class Malicious:
    def __init__(self, command): self.command = command
    def __reduce__(self): return __import__("os").system, (self.command,)


@pytest.mark.parametrize("read", PUBLISHED)
@pytest.mark.parametrize("write", (write_zip, write_stream, write_pickle))
def test_a_command_in_a_pickle_is_refused_and_not_run(tmp_path, write, read):
    marker, file = tmp_path/"marker", tmp_path/"a"
    for content in (Malicious(f"touch {marker}"), [nn.Linear(2, 2), Malicious(f"touch {marker}")],
            {"model": {}, "opt": Malicious(f"touch {marker}")}):
        write(content, file)
        with pytest.raises((WeightsError, DamagedFileError), match="is refused|no complete file"):
            read(file)
    assert not marker.exists()


def test_a_file_within_a_tensor_is_not_read(tmp_path):
    "pickle.dump stores a tensor as a second file, which PyTorch would read without restriction."
    marker, inner = tmp_path/"marker", io.BytesIO()
    torch.save(Malicious(f"touch {marker}"), inner)
    class Storage:
        def __reduce__(self): return torch.storage._load_from_bytes, (inner.getvalue(),)
    write_pickle(Storage(), tmp_path/"a")
    for read in PUBLISHED:
        with pytest.raises((WeightsError, DamagedFileError)): read(tmp_path/"a")
    assert not marker.exists()


@pytest.mark.parametrize("name", ("eval", "getattr", "__import__"))
def test_names_that_no_published_file_needs_are_refused(tmp_path, name):
    (tmp_path/"a").write_bytes(f"cbuiltins\n{name}\n(V1\ntR.".encode())
    with pytest.raises(WeightsError, match=f"builtins.{name}"): published_pca(tmp_path/"a")


def test_nothing_that_a_pickle_names_is_called(tmp_path):
    "Names that are expected become records as well: numpy does not even hear of them."
    (tmp_path/"a").write_bytes(b"cnumpy\nsave\n(X\x01\x00\x00\x00bK\x01tR.")
    with pytest.raises(WeightsError, match="holds no fitted PCA"): published_pca(tmp_path/"a")


def text(word): return b"X" + len(word).to_bytes(4, "little") + word.encode()

def pca_with(array:bytes) -> bytes:
    "A pickled PCA whose arrays are all made by these opcodes."
    names = "components_", "mean_", "explained_variance_ratio_"
    items = b"".join(text(name) + array for name in names) + text("whiten") + b"\x89"
    return b"\x80\x02csklearn.decomposition._pca\nPCA\n)\x81}(" + items + b"ub."

OBJECTS = b"cnumpy\ndtype\n" + text("O") + b"\x85R"
EIGHT_BYTES = b"c_codecs\nencode\n" + text("AAAAAAAA") + text("latin1") + b"\x86R"
MANY = b"J\x00\xc2\xeb\x0b\x85"  # 200 million

def reconstructed(shape:bytes, kind:str) -> bytes:
    "Opcodes of an array of eight bytes as pickle protocol 2 writes it."
    dtype = b"cnumpy\ndtype\n" + text(kind) + b"\x85R(K\x03" + text("<") + b"tb"
    return (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text("b")
        + b"tR(K\x01" + shape + dtype + b"\x89" + EIGHT_BYTES + b"tb")

DANGEROUS = {
    # ndarray((1,), dtype("O"), b"AAAAAAAA"): an object at an address of the file's choice
    "address": b"cnumpy\nndarray\n(K\x01\x85" + OBJECTS + EIGHT_BYTES + b"tR",
    "enormous": b"cnumpy\nndarray\n(" + MANY + text("b") + b"tR",
    "objects": reconstructed(b"K\x01\x85", "O"),
    "objects in a record": reconstructed(b"K\x01\x85", "O,O"),
    "too few bytes": reconstructed(MANY, "f8"),
    "buffer": b"cnumpy.core.numeric\n_frombuffer\n(" + EIGHT_BYTES + OBJECTS + b"K\x01\x85"
        + text("C") + b"tR",
    "scalar": b"cnumpy.core.multiarray\nscalar\n" + OBJECTS + EIGHT_BYTES + b"\x86R"}

READ_IN_LITTLE_MEMORY = """
import resource, sys
from specpred.config import DamagedFileError, WeightsError
from specpred.weights import published_pca
for path in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try: published_pca(path)
    except (WeightsError, DamagedFileError) as error: print("refused", error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e5
"""

def test_arrays_that_numpy_would_take_on_trust_are_refused(tmp_path):
    "In another process: numpy would crash it, and it may use 100 MB at most."
    files = [tmp_path/name for name in DANGEROUS]
    for file in files: file.write_bytes(pca_with(DANGEROUS[file.name]))
    command = [sys.executable, "-c", READ_IN_LITTLE_MEMORY, *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.count("refused") == len(files), done.stdout


def test_the_same_array_with_numbers_is_read(tmp_path):
    (tmp_path/"a").write_bytes(pca_with(reconstructed(b"K\x01K\x01\x86", "f8")))
    with pytest.raises(WeightsError, match=r"1 components of 1 latents.*\(1, 1\), \(1, 1\)"):
        published_pca(tmp_path/"a")


@pytest.mark.parametrize("size, stride", (((10**6,), (0,)), ((2,), (10**6,)), ((10**6,), (1,))))
@pytest.mark.parametrize("write", (write_zip, write_stream))
def test_a_tensor_larger_than_its_storage_is_refused(tmp_path, write, size, stride):
    storage = torch.storage.TypedStorage(wrap_storage=torch.zeros(3).untyped_storage(),
        dtype=torch.float32, _internal=True)
    class Enlarged(nn.Parameter):
        def __reduce_ex__(self, protocol):
            return torch._utils._rebuild_tensor_v2, (storage, 0, size, stride, False, {})
    network = InfoVAE(50, 4, (24, 12))
    network.mu.register_parameter("bias", Enlarged(torch.zeros(4)))
    write(network, tmp_path/"a")
    with pytest.raises(WeightsError, match="reshape|strides"): published_vae_tensors(tmp_path/"a")


def test_torchscript_and_compressed_archives_are_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path/"script")
    with zipfile.ZipFile(tmp_path/"compressed", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**7))
    for read in (published_vae_tensors, published_pca):
        with pytest.raises(WeightsError, match="asks for __torch__"): read(tmp_path/"script")
        with pytest.raises(WeightsError, match="compressed"): read(tmp_path/"compressed")


def test_mutated_pickles_end_in_our_errors(tmp_path):
    rng = np.random.default_rng(0)
    content = pickle.dumps(PCA(3).fit(rng.standard_normal((100, 4))))
    for _ in range(300):
        mutated = bytearray(content)
        for at in rng.integers(len(content), size=3): mutated[at] = rng.integers(256)
        (tmp_path/"a").write_bytes(mutated)
        try: axes = published_pca(tmp_path/"a")
        except SpecpredError: continue
        assert axes.components.shape == (3, 4)
        assert axes.centre.shape == (4,)
