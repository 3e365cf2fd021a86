"""Files of the field's formats, written here by other means, and hostile ones."""

import contextlib
import dataclasses
import gzip
import json
import lzma
import os
import pickle
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import zipfile
import zlib

import h5py
import ml_dtypes
import msgpack
import numpy as np
import pytest
from writers import example_proto, fedjax_array, fedjax_data, write_fedjax, write_hdf5, write_tff

import fedjax_lite as fl
from fedjax_lite.data import fedjax_format, tf_example

IDS = ["zoe", "adam", "mia"]


def clients(seed=0):
    """Features by client: images and labels of 3, 1 and 4 examples."""
    rng = np.random.default_rng(seed)
    return {
        name: {
            "x": rng.normal(size=(n, 2, 3)).astype(np.float32),
            "y": rng.integers(-3, 10**6, n),
        }
        for name, n in zip(IDS, (3, 1, 4), strict=True)
    }


def assert_holds(dataset, expected):
    assert list(dataset.client_ids) == list(expected)
    for name, features in expected.items():
        assert dataset[name].keys() == features.keys()
        for feature, values in features.items():
            assert dataset[name][feature].dtype == values.dtype
            np.testing.assert_array_equal(dataset[name][feature], values)


# FedJAX's SQLite.


def fedjax_rows(data):
    return [(name.encode(), fedjax_data(f), len(f["y"])) for name, f in data.items()]


def test_fedjax_sqlite(tmp_path):
    data = clients()
    path = write_fedjax(tmp_path / "d?a#ta.sqlite", fedjax_rows(data))
    expected = {name.encode(): features for name, features in data.items()}
    assert_holds(fl.data.read(path), expected)
    assert_holds(fl.data.read_fedjax_sqlite(path), expected)


def test_fedjax_sqlite_with_text_and_bfloat16(tmp_path):
    text = np.array([b"to be", b"or", b""], object)
    half = np.ones((3, 2), ml_dtypes.bfloat16)
    path = write_fedjax(tmp_path / "a", [(b"w", fedjax_data({"text": text, "half": half}), 3)])
    with pytest.raises(ValueError, match="client b'w': feature 'text' has dtype object; encode"):
        fl.data.read(path)
    dataset = fl.data.read(
        path, transform=lambda f: {"n": np.array([len(t) for t in f["text"]]), "half": f["half"]}
    )
    assert_holds(dataset, {b"w": {"n": np.array([5, 2, 0]), "half": half}})


def packed(value):
    return zlib.compress(msgpack.packb(value))


def array_ext(shape, dtype, content, code=1):
    return packed({"x": msgpack.ExtType(code, msgpack.packb((shape, dtype, content)))})


def strings_ext(content):
    return packed({"x": msgpack.ExtType(4, content)})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((b"a", b"nonsense", 1), "its data cannot be decompressed"),
        ((b"a", fedjax_data({"x": np.zeros(1000)})[:-9], 1000), "its data is truncated"),
        ((b"a", zlib.compress(bytes(10**8)), 1), "decompresses to more than max_client_bytes"),
        ((b"a", "text", 1), "its data is of type str, not a BLOB"),
        ((b"a", packed([1]), 1), "exceeds max_array_len"),
        ((b"a", packed({"x": 1}), 1), "its data is no dict of arrays"),
        ((b"a", packed({1: 1}), 1), "int is not allowed for map key"),
        ((b"a", zlib.compress(b"\x81\xa1x\xdd\x7f\xff\xff\xff"), 1), "exceeds max_array_len"),
        ((b"a", zlib.compress(b"\x81" * 10**5), 1), "its data is no msgpack"),
        ((b"a", packed({"x": msgpack.ExtType(2, b"")}), 1), "extension of type 2, which is no"),
        ((b"a", array_ext([1], "object", b"\0" * 8), 1), "dtype b'object', which is none of num"),
        ((b"a", array_ext([1], "datetime64", b"\0" * 8), 1), "dtype b'datetime64'"),
        ((b"a", array_ext([2**62], "float32", b"\0" * 4), 2**62), "has 4 bytes"),
        ((b"a", array_ext([-1], "float32", b"\0" * 4), 1), r"an array has shape \[-1\]"),
        (
            (b"a", array_ext([1], "float32", b"\0" * 4), 2),
            r"its features have shapes {'x': \(1,\)} for 2 examples",
        ),
        (
            (b"a", array_ext([], "float32", b"\0" * 4), 1),
            r"its features have shapes {'x': \(\)} for 1 examples",
        ),
        ((b"a", strings_ext(b"\x92\x91\x03\xdd\x7f\xff\xff\xff"), 3), "has 2147483647 entries"),
        ((b"a", strings_ext(b"\x92\x91\x01\x91\x05"), 1), "entries of another type"),
        ((b"a", strings_ext(b"\x92\x91\x02\x92\xc4\x01a"), 2), "its data is no msgpack"),
        ((b"a", strings_ext(b"\xc0"), 2), "Unexpected type header"),
        ((b"a", packed({"mask": fedjax_array(np.ones(1))}), 1), 'a feature named "mask"'),
    ],
)
def test_hostile_fedjax_data_is_refused_by_client(tmp_path, row, message):
    path = write_fedjax(tmp_path / "clients.sqlite", [row])
    with pytest.raises(ValueError, match=rf"clients.sqlite: client b'a'.*({message})"):
        fl.data.read_fedjax_sqlite(path, max_client_bytes=10**6)


def test_hostile_sqlite_is_refused(tmp_path):
    path = write_fedjax(tmp_path / "a.sqlite", fedjax_rows(clients()))
    with pytest.raises(ValueError, match=r"a.sqlite cannot be read as SQLite: .*too big"):
        fl.data.read(path, max_client_bytes=50)
    (tmp_path / "cut.sqlite").write_bytes(path.read_bytes()[:-5000])
    (tmp_path / "magic.sqlite").write_bytes(b"SQLite format 3\0" + bytes(1000))
    for name in ("cut", "magic"):
        with pytest.raises(ValueError, match=rf"{name}.sqlite .*(malformed|not a database)"):
            fl.data.read(tmp_path / f"{name}.sqlite")
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("ALTER TABLE federated_data RENAME TO other")
        connection.execute("CREATE VIEW federated_data AS SELECT * FROM other")
    with pytest.raises(ValueError, match="has no table federated_data"):
        fl.data.read(path)
    empty = write_fedjax(tmp_path / "empty.sqlite", [])
    with pytest.raises(ValueError, match=r"empty.sqlite: clients is empty"):
        fl.data.read(empty)
    rows = fedjax_rows(clients())
    other = write_fedjax(
        tmp_path / "other.sqlite", [rows[0], (b"b", fedjax_data({"x": np.ones(1)}), 1)]
    )
    with pytest.raises(ValueError, match=r"other.sqlite: client b'b' has features"):
        fl.data.read(other)


# TFF's SQLite.


def as_rows(data):
    return {
        name: [{"x": x, "y": y} for x, y in zip(f["x"], f["y"], strict=True)]
        for name, f in data.items()
    }


def test_tff_sqlite(tmp_path):
    train, test = clients(), clients(1)
    path = write_tff(tmp_path / "a.sqlite", as_rows(train), "train")
    dataset = fl.data.read(path, shapes={"x": (2, 3)})
    assert list(dataset.client_ids) == sorted(IDS)
    for name in IDS:  # Rows are in the order of the table, which write_tff changed.
        order = np.lexsort(dataset[name]["x"].reshape(-1, 6).T)
        expected = np.lexsort(train[name]["x"].reshape(-1, 6).T)
        for feature in ("x", "y"):
            np.testing.assert_array_equal(
                dataset[name][feature][order], train[name][feature][expected]
            )
    assert fl.data.read(path).features["x"].shape == (6,)
    write_tff(path, as_rows(test), "test")
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\]; choose one"):
        fl.data.read_tff_sqlite(path)
    with pytest.raises(ValueError, match="split is 'dev', and"):
        fl.data.read_tff_sqlite(path, split="dev")
    held_out = fl.data.read_tff_sqlite(path, split="test")
    assert sorted(held_out.examples["y"]) == sorted(np.concatenate([f["y"] for f in test.values()]))


def test_tf_examples_of_every_kind():
    rng = np.random.default_rng(0)
    features = {
        "float": rng.normal(size=5).astype(np.float32),
        "int": np.array([0, 1, -1, 127, 128, 2**62, -(2**63), 2**63 - 1]),
        "bytes": np.array([b"", b"\x00\xff", b"long" * 100], object),
        "ü": np.array([3]),
    }
    parsed = tf_example.parse(example_proto(features))
    assert parsed.keys() == features.keys()
    for name, values in features.items():
        assert parsed[name].dtype == values.dtype
        assert parsed[name].tolist() == values.tolist()
    # Unpacked lists, and a field that no version of the format has.
    entry = b"\x0a\x01k\x12\x06\x1a\x04\x08\x07\x08\x01" + b"\x1d\0\0\0\0"
    message = b"\x0a" + bytes([len(entry) + 2]) + b"\x0a" + bytes([len(entry)]) + entry
    assert tf_example.parse(message)["k"].tolist() == [7, 1]


def test_a_broken_tf_example_is_an_error_or_another_example():
    message = example_proto({"x": np.arange(300), "t": np.array([b"abc"], object)})
    for cut in range(1, len(message)):
        with pytest.raises(ValueError, match=r"tf.train.Example"):
            tf_example.parse(message[:cut])
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(message)
        broken[rng.integers(len(message))] = rng.integers(256)
        with contextlib.suppress(ValueError):
            tf_example.parse(bytes(broken))
    with pytest.raises(ValueError, match="truncated"):
        tf_example.parse(b"\x0a" + b"\xff" * 9 + b"\x01")


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({"a": [b"\x0a\x50"]}, {}, "client 'a': a tf.train.Example is truncated"),
        ({"a": [{"x": 1}, {"y": 1}]}, {}, "client 'a': its examples differ in their features"),
        ({"a": [{"x": [1, 2]}, {"x": 1}]}, {}, "client 'a': its examples differ"),
        ({"a": [{"x": [1, 2]}]}, {"shapes": {"x": (3,)}}, "client 'a': feature 'x' has 2 values"),
        ({"a": [{"x": 1}]}, {"shapes": {"y": ()}}, "client 'a': it has no feature 'y' of shapes"),
        ({"a": [{"x": 1}], "b": [{"y": 1}]}, {}, "client 'b' has features"),
        ({"a": [{"x": np.ones(99)}] * 9}, {"max_client_bytes": 2000}, "exceed max_client_bytes"),
    ],
)
def test_hostile_tff_data_is_refused_by_client(tmp_path, data, options, message):
    path = write_tff(tmp_path / "clients.sqlite", data)
    with pytest.raises(ValueError, match=rf"clients.sqlite.*{message}"):
        fl.data.read_tff_sqlite(path, **options)


def test_tff_counts_are_checked(tmp_path):
    path = write_tff(tmp_path / "a.sqlite", {"a": [{"x": 1}]}, sizes={"a": 2})
    with pytest.raises(
        ValueError, match=r"a.sqlite: client 'a': its features have shapes .* for 2 examples"
    ):
        fl.data.read(path)
    for name, message in (
        ("", "has examples of client 'a' where client_metadata says ''"),
        ("b", "has no examples of client 'b'"),
    ):
        data = {"a": [{"x": 1}], name: []}
        counted = write_tff(tmp_path / f"{name}2.sqlite", data, sizes={name: 1})
        with pytest.raises(ValueError, match=message):
            fl.data.read(counted)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE client_metadata SET client_id = 'b'")
    with pytest.raises(ValueError, match="examples of client 'a' where client_metadata says 'b'"):
        fl.data.read(path)


# TFF's HDF5.


def test_tff_hdf5(tmp_path):
    data = clients()
    path = write_hdf5(tmp_path / "a.h5", data)
    expected = {name: data[name] for name in sorted(data)}
    assert_holds(fl.data.read(path), expected)
    assert_holds(fl.data.read_tff_hdf5(path), expected)


def test_tff_hdf5_with_text(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        text = [f"line {'x' * i}" for i in range(600)]
        file.create_dataset("examples/a/snippets", data=text, dtype=h5py.string_dtype())
    dataset = fl.data.read(
        tmp_path / "a.h5", transform=lambda f: {"n": np.array([len(t) for t in f["snippets"]])}
    )
    np.testing.assert_array_equal(dataset["a"]["n"], 5 + np.arange(600))


def hostile_hdf5(change):
    def build(path):
        write_hdf5(path, clients())
        with h5py.File(path, "a") as file:
            change(file)

    return build


def many_to_one(file):
    # Every entry points to one text: little on disk, much in memory.
    array = file.create_dataset("examples/adam/z", (5000,), h5py.string_dtype())
    array[:] = np.array(["x" * 10**4] * 5000, object)


def virtual(file):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (4,))
    file.create_virtual_dataset("examples/adam/z", layout)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "cannot be read as HDF5"),
        (
            lambda p: p.write_bytes(write_hdf5(p, clients()).read_bytes()[:-600]),
            "cannot be read as HDF5",
        ),
        (lambda p: h5py.File(p, "w").close(), "/ has no 'examples'"),
        (
            hostile_hdf5(lambda f: f.__setitem__("examples/eve", h5py.ExternalLink("b.h5", "/"))),
            "client 'eve': 'eve' is a ExternalLink and not data of this file",
        ),
        (
            hostile_hdf5(lambda f: f.__setitem__("examples/adam/z", h5py.SoftLink("/examples"))),
            "client 'adam': 'z' is a SoftLink",
        ),
        (
            hostile_hdf5(lambda f: f.create_dataset("examples/eve", data=[1])),
            "client 'eve': 'eve' is no Group",
        ),
        (
            hostile_hdf5(lambda f: f.create_group("examples/adam/z")),
            "client 'adam': 'z' is no Dataset",
        ),
        (
            hostile_hdf5(lambda f: f.create_group("examples/eve")),
            "client 'eve': it has no features",
        ),
        (hostile_hdf5(virtual), "client 'adam': feature 'z' lies in another file"),
        (
            hostile_hdf5(
                lambda f: f.create_dataset(
                    "examples/adam/z", (4,), "f4", external=[("other.bin", 0, 16)]
                )
            ),
            "client 'adam': feature 'z' lies in another file",
        ),
        (
            hostile_hdf5(
                lambda f: f.create_dataset("examples/adam/z", (2**50,), "f4", chunks=(9,))
            ),
            "client 'adam': feature 'z' has 4503599627370496 bytes",
        ),
        (hostile_hdf5(many_to_one), "client 'adam': feature 'z' has more text than max_client"),
        (
            hostile_hdf5(lambda f: f.create_dataset("examples/adam/z", data=1)),
            "client 'adam': feature 'z' is a scalar",
        ),
        (
            hostile_hdf5(lambda f: f.create_dataset("examples/adam/z", (1,), h5py.ref_dtype)),
            "client 'adam': feature 'z' has a type of HDF5",
        ),
        (hostile_hdf5(lambda f: f.pop("examples/zoe/y")), "client 'zoe' has features {'x'"),
    ],
)
def test_hostile_hdf5_is_refused_by_client(tmp_path, build, message):
    build(tmp_path / "clients.h5")
    with pytest.raises(ValueError, match=rf"clients.h5.*{message}"):
        fl.data.read_tff_hdf5(tmp_path / "clients.h5", max_client_bytes=10**6)


# LEAF.


def leaf_content(data):
    return {
        "users": list(data),
        "num_samples": [len(features["y"]) for features in data.values()],
        "user_data": {
            name: {feature: np.asarray(values).tolist() for feature, values in features.items()}
            for name, features in data.items()
        },
    }


def write_leaf(path, data, **changes):
    path.write_text(json.dumps({**leaf_content(data), **changes}))
    return path


def test_leaf(tmp_path):
    data = clients()
    assert_holds(fl.data.read(write_leaf(tmp_path / "a", data)), data)
    (tmp_path / "shards").mkdir()
    for i, name in enumerate(IDS):
        write_leaf(tmp_path / f"shards/all_data_{i}.json", {name: data[name]}, hierarchies=[])
    (tmp_path / "shards/README.txt").write_text("not data")
    assert_holds(fl.data.read(tmp_path / "shards"), data)
    assert_holds(fl.data.read_leaf(tmp_path / "shards"), data)


def test_leaf_with_text(tmp_path):
    path = write_leaf(tmp_path / "a", {"a": {"x": ["abc", "de"], "y": ["d", "f"]}})
    dataset = fl.data.read(path, transform=lambda f: {"y": np.array([ord(y) for y in f["y"]])})
    assert dataset["a"]["y"].tolist() == [100, 102]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON file of LEAF: Expecting"),
        ("[" * 10**5, "is no JSON file of LEAF"),
        ("[]", "is no JSON file of LEAF"),
        ('{"users": []}', "it has no 'num_samples'"),
        ({"users": ["zoe", "adam"]}, "it has 2 users and 3 num_samples"),
        ({"users": ["zoe", "adam", "eve"]}, "users and user_data differ in client '(eve|mia)'"),
        ({"users": ["zoe", "adam", "adam"]}, "users and user_data differ in client"),
        ({"num_samples": [3, 1, 5]}, "client 'mia': it has .* where num_samples says 5"),
        ({"user_data": {"zoe": [], "adam": {}, "mia": {}}}, "client 'zoe': its user_data is of"),
        (
            {"user_data": {"zoe": {"x": [[1], [2, 3], [4]], "y": [1, 2, 3]}, "adam": 1, "mia": 1}},
            "client 'zoe': feature 'x' has rows of different lengths",
        ),
        ('{"users": [], "users": []}', "'users' comes twice in an object"),
        ('{"users": [], "num_samples": [], "user_data": {}}', "clients is empty"),
    ],
)
def test_hostile_leaf_is_refused_by_client(tmp_path, content, message):
    path = tmp_path / "clients.json"
    if isinstance(content, str):
        path.write_text(content)
    else:
        write_leaf(path, clients(), **content)
    with pytest.raises(ValueError, match=rf"clients.json.*{message}"):
        fl.data.read_leaf(path)


def test_leaf_shards_with_one_client_twice_are_refused(tmp_path):
    for i in range(2):
        write_leaf(tmp_path / f"{i}.json", clients())
    with pytest.raises(ValueError, match="client_ids names client 'zoe' 2 times"):
        fl.data.read(tmp_path)
    with pytest.raises(ValueError, match=r"0.json is no JSON file of LEAF: it has .* bytes"):
        fl.data.read(tmp_path, max_file_bytes=10)


# Tables.


def as_table(data, seed=0):
    """All rows, shuffled, and the client of each."""
    features = {key: np.concatenate([f[key] for f in data.values()]) for key in ("x", "y")}
    ids = np.repeat(list(data), [len(f["y"]) for f in data.values()])
    order = np.random.default_rng(seed).permutation(len(ids))
    return {key: values[order] for key, values in features.items()}, ids[order]


def assert_same_rows(dataset, data):
    """Equal up to the order of each client's rows."""
    assert list(dataset.client_ids) == sorted(data)
    for name, features in data.items():
        one, other = np.argsort(dataset[name]["y"]), np.argsort(features["y"])
        for feature, values in features.items():
            np.testing.assert_array_equal(dataset[name][feature][one], values[other])


def test_npz(tmp_path):
    data = clients()
    features, ids = as_table(data)
    np.savez_compressed(tmp_path / "a.npz", **features, client_ids=ids)
    dataset = fl.data.read(tmp_path / "a.npz")
    assert_same_rows(dataset, data)
    assert_holds(
        fl.data.read_npz(tmp_path / "a.npz"), {name: dataset[name] for name in sorted(data)}
    )
    with pytest.raises(
        ValueError, match=r"a.npz cannot be read as .npz: its arrays have \d+ bytes"
    ):
        fl.data.read_npz(tmp_path / "a.npz", max_bytes=100)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_hostile_npz_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.npz"
    np.savez(path, x=np.array([Bomb()], object), client_ids=[1])
    with pytest.raises(ValueError, match=r"a.npz cannot be read as .npz: Object arrays"):
        fl.data.read(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"a.npz cannot be read as .npz"):
        fl.data.read_npz(path)
    np.savez(path, x=[1, 2])
    with pytest.raises(ValueError, match=r"it has the arrays .* and no 'client_ids'"):
        fl.data.read(path)
    np.savez(path, x=[1, 2], client_ids=[[1], [2]])
    with pytest.raises(ValueError, match=r"column 'client_ids' has shape \(2, 1\); name one"):
        fl.data.read(path)
    np.savez(path, x=[1, 2], client_ids=[1])
    with pytest.raises(ValueError, match="the table has features of shapes"):
        fl.data.read(path)
    np.savez(path, x=[1, 2], client_ids=[1, 1])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"a.npz cannot be read as .npz"):
        fl.data.read(path)
    np.savez(path, x=["one", "two"], client_ids=[1, 1])
    with pytest.raises(ValueError, match=r"a.npz: client 1: feature 'x' has dtype <U3; encode"):
        fl.data.read(path)
    claim = {"descr": "<f8", "fortran_order": False, "shape": (2**55,)}
    with zipfile.ZipFile(path, "w") as archive, archive.open("x.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, claim)
    with pytest.raises(ValueError, match=r"a.npz cannot be read as .npz: Unable to allocate"):
        fl.data.read(path)
    assert os.listdir(tmp_path) == ["a.npz"]


def test_csv(tmp_path, monkeypatch):
    monkeypatch.setattr(fl.data.tables, "_ROWS_AT_ONCE", 3)
    data = clients()
    features, ids = as_table(data)
    with (tmp_path / "a.csv").open("w") as file:
        print("x0,x1,x2,x3,x4,x5,client_id,y", file=file)
        for x, y, name in zip(features["x"], features["y"], ids, strict=True):
            print(*x.ravel(), f'"{name}"', y, sep=",", file=file)
    columns = {"x": [f"x{i}" for i in range(6)], "y": "y"}
    dataset = fl.data.read(tmp_path / "a.csv", columns=columns)
    flat = {name: {"x": f["x"].reshape(-1, 6), "y": f["y"]} for name, f in data.items()}
    assert_same_rows(dataset, flat)
    assert dataset.features["x"].dtype == np.float32
    plain = fl.data.read_csv(tmp_path / "a.csv")
    assert set(plain.features) == {"y", *columns["x"]}
    assert plain.features["y"].dtype == np.int64
    with (tmp_path / "a.csv").open("a") as file:
        file.write("\n")
    assert fl.data.read_csv(tmp_path / "a.csv").offsets[-1] == 8


def test_columns_make_features_of_any_format(tmp_path):
    text = "who,x1,y,x0\nb,1.5,1,2\na,3.5,0,4\n"
    (tmp_path / "a.csv").write_text("\ufeff" + text)
    (tmp_path / "b.csv").write_text("client_id,text,y\nb,one,3\n")
    assert fl.data.read_csv(tmp_path / "b.csv", columns={"z": "y"})["b"]["z"].tolist() == [3]
    arrays = {"x1": [1.5, 3.5], "y": [1, 0], "x0": [2, 4], "who": ["b", "a"]}
    np.savez(tmp_path / "a.npz", **arrays)
    for name in ("a.csv", "a.npz"):
        for x, expected in (
            (["x0", "x1"], [[4, 3.5], [2, 1.5]]),
            ("*", [[3.5, 4], [1.5, 2]]),
            ("x1", [3.5, 1.5]),
        ):
            dataset = fl.data.read(
                tmp_path / name, client_column="who", columns={"x": x, "label": "y"}
            )
            assert dataset.client_ids == ("a", "b")
            assert dataset.examples["x"].tolist() == expected
            assert dataset.examples["label"].tolist() == [0, 1]
    columns = {"z": ["y"]}
    double = lambda features: {"z": 2 * features["z"]}
    converted = fl.data.convert(
        tmp_path / "a.csv",
        tmp_path / "new",
        columns=columns,
        transform=double,
        client_column="who",
    )
    assert converted.examples["z"].tolist() == [[0], [2]]
    again = fl.data.read(tmp_path / "new", columns={"y": "z"})
    assert again.examples["y"].tolist() == [[0], [2]]
    for options, error, message in (
        ({"columns": {"x": "z"}}, ValueError, "it has no column 'z'; choose among"),
        ({"columns": {"x": "*", "z": ["x0", "x1", "y"]}}, ValueError, "no column is left for"),
        ({"columns": ["x"]}, TypeError, r"columns is \['x'\]; write it as"),
        ({"columns": {"x": 3}}, TypeError, "columns is {'x': 3}; write it as"),
    ):
        with pytest.raises(error, match=message):
            fl.data.read(tmp_path / "a.csv", client_column="who", **options)
    with pytest.raises(ValueError, match=r"save\(\), which has no option 'client_column'"):
        fl.data.read(tmp_path / "new", client_column="who")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, r"its columns are \[\]"),
        (",client_id,a\n0,1,2\n", {}, "column 1 has no name; .* index=False"),
        ("client_id;a\n1;2\n", {}, "begins with 'client_id;a'; separate the columns by commas"),
        ("client_id\n1\n", {}, "client '1': it has no features"),
        ("client_id,a\n1,2\n ,3\n", {}, "column 'client_id' has ' ' in row 2, which names no"),
        ("client_id,a\nnan,2\n", {}, "column 'client_id' has 'nan' in row 1, .* or leave the row"),
        ("a,b\n1,2\n", {}, r"its columns are \['a', 'b'\]; name each once, and choose client_c"),
        ("client_id,a,a\n", {}, "name each once"),
        ("client_id,a\n1,2\n1\n", {}, "row 2 has 1 fields for 2 columns"),
        ("client_id,a\n1,2\n1,\n", {}, "column 'a' has '' in row 2; encode it as a number"),
        ("client_id,a\n1,2\n1,one\n", {}, "column 'a' has 'one' in row 2"),
        ("client_id,a\n", {}, "the table has no rows"),
        ('client_id,a\n1,"2\n', {}, "unexpected end of data"),
        ("client_id,a\n1,2\n", {"columns": {"x": ["a", "b"]}}, "has no column 'b'"),
        ("client_id,a\n1,99999999999999999999\n", {}, "column 'a' .* int64"),
        ("client_id,a\n1," + "9" * 200_000, {}, "field larger than field limit"),
    ],
)
def test_hostile_csv_is_refused_by_row(tmp_path, content, options, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=rf"a.csv.*{message}"):
        fl.data.read(tmp_path / "a.csv", **options)


# Hugging Face.


def write_huggingface(path, data):
    import datasets

    features, ids = as_table(data)
    columns = {"x": features["x"].tolist(), "y": features["y"].tolist(), "client_id": ids.tolist()}
    schema = datasets.Features(
        x=datasets.Array2D((2, 3), "float32"),
        y=datasets.Value("int64"),
        client_id=datasets.Value("string"),
    )
    dataset = datasets.Dataset.from_dict(columns, features=schema)
    datasets.disable_progress_bars()
    dataset.save_to_disk(path)
    return dataset


@pytest.fixture
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))


@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("ignore")  # datasets and its dependencies warn of their own affairs.
def test_huggingface(tmp_path):
    data = clients()
    in_memory = write_huggingface(tmp_path / "a", data)
    for source in (tmp_path / "a", in_memory):
        dataset = fl.data.read_huggingface(source)
        assert_same_rows(dataset, data)
        assert dataset.features["x"].dtype == np.float32
    assert_same_rows(fl.data.read(tmp_path / "a"), data)
    by_label = fl.data.read(tmp_path / "a", client_column="y", transform=lambda f: {"x": f["x"]})
    assert list(by_label.client_ids) == sorted(in_memory["y"])
    with pytest.raises(ValueError, match="client 'adam': feature 'text' has dtype"):
        fl.data.read_huggingface(in_memory.add_column("text", ["a"] * 8))
    with pytest.raises(ValueError, match="client_column is 'user', and the columns are"):
        fl.data.read_huggingface(in_memory, client_column="user")
    with pytest.raises(ValueError, match="column 'n' names no client in 1 rows"):
        fl.data.read_huggingface(in_memory.add_column("n", [1] * 7 + [None]), client_column="n")


@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("ignore")  # datasets and its dependencies warn of their own affairs.
def test_tables_of_other_libraries_are_read_or_told_how(tmp_path):
    import datasets
    import pandas as pd

    data = clients()
    features, ids = as_table(data)
    frame = pd.DataFrame({"x": list(features["x"].reshape(-1, 6)), "y": features["y"], "who": ids})
    frame.to_parquet(tmp_path / "a.parquet")
    table = datasets.Dataset.from_pandas(frame)
    flat = {name: {"x": f["x"].reshape(-1, 6), "y": f["y"]} for name, f in data.items()}
    for source in (frame, tmp_path / "a.parquet", table):
        dataset = fl.data.read(source, client_column="who")
        assert_same_rows(dataset, flat)
        assert dataset.features["x"].dtype == np.float32
        told = fl.data.read(source, client_column="who", columns={"label": "y"})
        assert list(told.features) == ["label"]
    fl.data.convert(frame, tmp_path / "new", client_column="who")
    assert_same_rows(fl.data.read(tmp_path / "new"), flat)

    for missing in (None, np.nan, pd.NA):
        who = ["a", missing, "b", missing, *"abcd"]
        holed = frame.assign(who=pd.Series(who, dtype=object))
        with pytest.raises(ValueError, match=r"column 'who' names no client in 2 rows, .* row 1,"):
            fl.data.read(holed, client_column="who")
        with pytest.raises(ValueError, match=r"client_ids names no client in 2 rows, .* row 1,"):
            fl.FederatedDataset.from_arrays({"y": features["y"]}, who)
    numbers = np.array([1, np.nan, 2])
    np.savez(tmp_path / "a.npz", client_ids=numbers, x=numbers)
    holed = pd.DataFrame({"client_id": numbers, "x": numbers})
    for source in (tmp_path / "a.npz", holed, datasets.Dataset.from_dict(dict(holed))):
        with pytest.raises(ValueError, match=r"'client_ids?' names no client in 1 rows, .* row 1,"):
            fl.data.read(source)
    with pytest.raises(ValueError, match=r"client_ids names no client in 1 rows, .* row 1,"):
        fl.FederatedDataset.from_arrays({"x": numbers}, numbers)

    ragged = pd.DataFrame({"client_id": [1, 1], "x": [[1], [1, 2]]})
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-50])
    for source, error, message in (
        (frame, ValueError, r"columns are \['x', 'y', 'who'\]; .* choose client_column"),
        (ragged, ValueError, "the DataFrame: client 1: feature 'x' has rows of different lengths"),
        (frame.rename(columns={"who": "client_id"})[["y", "y", "client_id"]], ValueError, "each"),
        (tmp_path / "b.parquet", ValueError, "b.parquet cannot be read as parquet: "),
        (datasets.DatasetDict(train=table), ValueError, r"splits \['train'\]; pass one of them"),
        (table.to_iterable_dataset(), TypeError, "IterableDataset, a stream; pass a datasets.Da"),
        ([1], TypeError, "path is of type list; pass the path"),
        (table.data.table, TypeError, r"path is of type Table; pass its to_pandas\(\)"),
    ):
        with pytest.raises(error, match=message):
            fl.data.read(source)

    class TensorDataset(list):
        __module__ = "torch.utils.data.dataset"

    tensors = TensorDataset([(np.zeros(2, np.float32), i) for i in range(4)])
    for source, message in (
        (frame.groupby("who"), r"pass the frame itself: fl.data.read\(frame, client_column='who'"),
        (frame, r"DataFrame; read it: fl.data.read\(table, client_column=..."),
        (table, r"Dataset; read it: fl.data.read\(table, client_column=..."),
        (tensors, r"TensorDataset; .* FederatedDataset.from_rows\("),
    ):
        with pytest.raises(TypeError, match=message):
            fl.FederatedDataset.from_clients(source)
    with pytest.raises(TypeError, match=r"examples is of type DataFrame; read it: fl.data.read"):
        fl.FederatedDataset.from_arrays(frame, ids)
    with pytest.raises(TypeError, match=r"client 'a' is of type DataFrame; pass a non-empty dict"):
        fl.FederatedDataset.from_clients({"a": frame})
    with pytest.raises(TypeError, match=r"client_ids is of type int; pass one client id per row"):
        fl.FederatedDataset.from_arrays({"x": [1]}, 3)
    # What the message about torch says.
    x, y = np.stack([x for x, _ in tensors]), np.array([y for _, y in tensors])
    rows = fl.partition.iid(len(tensors), 2, seed=0)
    assert fl.FederatedDataset.from_rows({"x": x, "y": y}, rows).num_examples.tolist() == [2, 2]


@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("ignore")  # datasets and its dependencies warn of their own affairs.
def test_hostile_huggingface_is_refused(tmp_path):
    write_huggingface(tmp_path / "a", clients())
    state = json.loads((tmp_path / "a/state.json").read_text())
    outside = {**state, "_data_files": [{"filename": "../../x.arrow"}]}
    (tmp_path / "a/state.json").write_text(json.dumps(outside))
    with pytest.raises(ValueError, match=r"state.json names '../../x.arrow', outside of it"):
        fl.data.read(tmp_path / "a")
    (tmp_path / "a/state.json").write_text("{}")
    with pytest.raises(ValueError, match="a is no folder of save_to_disk"):
        fl.data.read(tmp_path / "a")
    (tmp_path / "a/state.json").write_text(json.dumps(state))
    (arrow,) = (tmp_path / "a").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])
    with pytest.raises(ValueError, match="a is no folder of save_to_disk"):
        fl.data.read(tmp_path / "a")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["a"]}')
    with pytest.raises(ValueError, match=r"holds the splits \['a'\]; pass the folder of one"):
        fl.data.read(tmp_path)


# Any format.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"\x00\x01", "a.bin has no known format; pass format=, one of csv, fedjax_sql"),
        (
            "a.csv.gz",
            gzip.compress(b"a", mtime=0),
            "decompress it first: gzip --decompress --keep /.*.csv.gz",
        ),
        ("a.pkl", pickle.dumps({"x": 1}), "a.pkl has no known format"),
    ],
)
def test_unknown_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        fl.data.read(tmp_path / name)


@pytest.mark.parametrize("options", [{}, {"format": "tff_sqlite"}])
def test_compressed_files_are_refused_with_what_decompresses_them(tmp_path, options):
    path = write_tff(tmp_path / "my data.sqlite", {"a": [{"x": 1}]})
    compressed = tmp_path / "my data.sqlite.lzma"
    compressed.write_bytes(lzma.compress(path.read_bytes(), lzma.FORMAT_ALONE))
    path.unlink()
    with pytest.raises(ValueError, match="lzma is compressed; decompress it first: ") as caught:
        fl.data.read(compressed, **options)
    command = shlex.split(str(caught.value).partition(" first: ")[2])
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    subprocess.run(command, check=True)
    assert fl.data.read(path, **options)["a"]["x"].tolist() == [1]


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        fl.data.read(tmp_path / "missing")
    with pytest.raises(ValueError, match="is a folder of no known format"):
        fl.data.read(tmp_path)
    (tmp_path / "cut.h5").write_bytes(write_hdf5(tmp_path / "a.h5", clients()).read_bytes()[:-600])
    with pytest.raises(ValueError, match=r"cut.h5 cannot be read as HDF5: .+; fetch the file anew"):
        fl.data.read(tmp_path / "cut.h5")
    for kind in set(fl.data.formats.FORMATS) - {"huggingface"}:
        with pytest.raises(ValueError, match="missing does not exist; check the path"):
            fl.data.read(tmp_path / "missing", kind)
        if kind not in ("idx", "leaf"):  # Which are folders.
            with pytest.raises(ValueError, match="is a folder; pass a file"):
                fl.data.read(tmp_path, kind)
    with pytest.raises(ValueError, match="format is 'xml'; choose one of"):
        fl.data.read(tmp_path, "xml")


def test_read_opens_what_save_wrote(tmp_path):
    data = clients()
    fl.FederatedDataset.from_clients(data).save(tmp_path / "a")
    assert_holds(fl.data.read(tmp_path / "a", verify=True), data)


def test_unknown_options_are_refused(tmp_path):
    path = write_leaf(tmp_path / "a.json", clients())
    with pytest.raises(ValueError, match="of format leaf, which has no option 'split'; its"):
        fl.data.read(path, split="train")


WRITERS = {
    "a.sqlite": lambda path: write_fedjax(path, fedjax_rows(clients())),
    "b.sqlite": lambda path: write_tff(path, as_rows(clients())),
    "c.h5": lambda path: write_hdf5(path, clients()),
    "d.json": lambda path: write_leaf(path, clients()),
    "e.npz": lambda path: np.savez(
        path, **as_table(clients())[0], client_ids=as_table(clients())[1]
    ),
    "f.csv": lambda path: path.write_text("client_id,x,y\nmia,1,2.5\nadam,-3,4\nzoe,5,nan\n"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_broken_file_is_refused_or_read(tmp_path, name):
    """No damage to any byte ends in anything but an answer or a ValueError."""
    WRITERS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    rng = np.random.default_rng(0)
    for i in range(60):
        broken = bytearray(content)
        if i % 3 == 0:
            del broken[rng.integers(len(content)) :]
        else:
            # Most of an SQLite or HDF5 file is empty space.
            used = np.flatnonzero(np.frombuffer(content, np.uint8))
            for place in rng.choice(used, 1 + i % 5):
                broken[place] = rng.integers(256)
        (tmp_path / name).write_bytes(broken)
        with contextlib.suppress(ValueError):
            fl.data.read(tmp_path / name, max_client_bytes=10**6) if name[0] in "abc" else (
                fl.data.read(tmp_path / name)
            )


# Clients without rows.


def empty_leaf(path, data):
    nothing = {"x": [], "y": []}
    write_leaf(path, {"first": nothing, **data, "late": nothing, "none": nothing})
    content = json.loads(path.read_text())
    content["user_data"]["none"] = {}
    path.write_text(json.dumps(content))


def empty_rows(*names):
    return {name: {"x": np.zeros((0, 2, 3), np.float32), "y": np.zeros(0, int)} for name in names}


@pytest.mark.parametrize(
    ("names", "write"),
    [
        (["first", *IDS, "late", "none"], empty_leaf),
        (
            [b"first", *(name.encode() for name in IDS), b"none"],
            lambda path, data: write_fedjax(
                path,
                [*fedjax_rows({**empty_rows("first"), **data}), (b"none", fedjax_data({}), 0)],
            ),
        ),
        (
            ["", *sorted(IDS), "zz"],
            lambda path, data: write_tff(path, as_rows({**empty_rows("", "zz"), **data})),
        ),
        (
            ["a", *sorted(IDS), "zz"],
            lambda path, data: write_hdf5(path, {**empty_rows("a", "zz"), **data}),
        ),
    ],
    ids=["leaf", "fedjax_sqlite", "tff_sqlite", "tff_hdf5"],
)
def test_clients_without_rows_are_read_and_converted(tmp_path, names, write):
    path, data = tmp_path / "a", clients()
    write(path, data)
    shapes = {"shapes": {"x": (2, 3)}} if "" in names else {}
    for transform in (None, lambda features: {"z": features["x"].sum((1, 2))}):
        dataset = fl.data.read(path, transform=transform, **shapes)
        assert list(dataset.client_ids) == names
        sizes = [
            len(data.get(n if isinstance(n, str) else n.decode(), {"y": ""})["y"]) for n in names
        ]
        assert dataset.num_examples.tolist() == sizes
        new = tmp_path / f"new {transform is None}"
        fl.data.convert(path, new, transform=transform, **shapes)
        dataset.save(tmp_path / f"saved {transform is None}")
        assert files_of(new) == files_of(tmp_path / f"saved {transform is None}")


def test_a_byte_order_mark_is_no_data(tmp_path):
    data = clients()
    path = write_leaf(tmp_path / "a.json", data)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert_holds(fl.data.read(path), data)
    (tmp_path / "a.csv").write_text("client_id,a\n1,2\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"a.csv is no UTF-8: .*; save it as UTF-8"):
        fl.data.read(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b.bin is empty, and has no known format"):
        fl.data.read((tmp_path / "b.csv").rename(tmp_path / "b.bin"))


# Conversion.


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", WRITERS)
def test_convert_equals_read_and_save(tmp_path, name):
    WRITERS[name](tmp_path / name)
    seen = []
    dataset = fl.data.convert(
        tmp_path / name, tmp_path / "new", progress=lambda *counts: seen.append(counts)
    )
    read = fl.data.read(tmp_path / name)
    assert_holds(dataset, {client_id: read[client_id] for client_id in read.client_ids})
    read.save(tmp_path / "saved")
    assert files_of(tmp_path / "new") == files_of(tmp_path / "saved")
    total = None if name == "d.json" else 3
    assert seen == [(1, total), (2, total), (3, total)]
    with pytest.raises(ValueError, match="new exists; remove it"):
        fl.data.convert(tmp_path / name, tmp_path / "new")
    with pytest.raises(ValueError, match="is such a folder already; open it"):
        fl.data.convert(tmp_path / "new", tmp_path / "newer")


def test_convert_applies_a_transform(tmp_path):
    path = write_leaf(tmp_path / "a.json", clients())
    transform = lambda features: {"z": features["x"][::2, 0] * 2}
    dataset = fl.data.convert(path, tmp_path / "new", transform=transform)
    expected = {name: transform(features) for name, features in clients().items()}
    assert_holds(dataset, expected)


def test_a_bad_source_leaves_nothing(tmp_path):
    rows = [*fedjax_rows(clients()), (b"eve", b"nonsense", 1)]
    path = write_fedjax(tmp_path / "a.sqlite", rows)
    with pytest.raises(ValueError, match=r"a.sqlite: client b'eve': its data cannot be decomp"):
        fl.data.convert(path, tmp_path / "new")
    assert os.listdir(tmp_path) == ["a.sqlite"]


SLOW = """
import sys, time
import fedjax_lite.data.writer as writer
from fedjax_lite.data import convert
writer.CHECKPOINT_SECONDS = 0.0
def progress(done, total):
    print(done, flush=True)
    time.sleep(0.02)
convert(sys.argv[1], sys.argv[2], progress=progress)
"""


def test_a_killed_conversion_goes_on(tmp_path, monkeypatch):
    data = {f"client {i}": clients(i)["mia"] for i in range(100)}
    path = write_fedjax(tmp_path / "a.sqlite", fedjax_rows(data))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, path, tmp_path / "new"], stdout=subprocess.PIPE, text=True
    )
    with process:
        while int(process.stdout.readline()) < 20:
            pass
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"has no meta.json: it is no data set, or was never fin"):
        fl.FederatedDataset.open(tmp_path / ".new.partial")
    shutil.copytree(tmp_path / ".new.partial", tmp_path / "as it was left")

    unpacked = []
    unpack = fedjax_format.unpack
    monkeypatch.setattr(fedjax_format, "unpack", lambda *a: unpacked.append(a) or unpack(*a))

    def assert_converts():
        unpacked.clear()
        fl.data.convert(path, tmp_path / "new")
        count = len(unpacked)
        fl.data.read(path).save(tmp_path / "saved")
        assert files_of(tmp_path / "new") == files_of(tmp_path / "saved")
        assert sorted(os.listdir(tmp_path)) == ["a.sqlite", "as it was left", "new", "saved"]
        return count

    assert 0 < assert_converts() <= 80
    shutil.rmtree(tmp_path / "new")
    shutil.rmtree(tmp_path / "saved")
    shutil.copytree(tmp_path / "as it was left", tmp_path / ".new.partial")
    data["client 3"]["y"] += 1
    path.unlink()
    write_fedjax(path, fedjax_rows(data))
    assert assert_converts() == 100  # Of another source, nothing is taken up.


@pytest.mark.parametrize(("name", "calls"), [("", 3), ("double", 1)])
def test_a_conversion_goes_on_if_its_transform_has_a_name(tmp_path, name, calls):
    path = write_leaf(tmp_path / "a.json", clients())
    called = []

    def transform(features):
        if called == ["stop"]:
            raise KeyboardInterrupt
        called.append(features)
        return {"z": 2 * features["x"]}

    def progress(done, total):
        called[:] = ["stop"] if done == 2 else called

    with pytest.raises(KeyboardInterrupt):
        fl.data.convert(
            path, tmp_path / "new", transform=transform, transform_name=name, progress=progress
        )
    called.clear()
    dataset = fl.data.convert(path, tmp_path / "new", transform=transform, transform_name=name)
    assert len(called) == calls
    assert_holds(dataset, {name: {"z": 2 * f["x"]} for name, f in clients().items()})


def test_the_convert_command(tmp_path, capsys):
    from fedjax_lite.cli.convert import Convert, convert
    from fedjax_lite.cli.errors import UsageError

    path = write_tff(tmp_path / "a.sqlite", as_rows(clients()))
    options = Convert(source=path, destination=tmp_path / "new", shapes=("x=2,3",), split="train")
    convert(options)
    out, err = capsys.readouterr()
    assert out == f"3 clients with 8 examples in {tmp_path / 'new'}\n"
    assert err == ""
    assert fl.FederatedDataset.open(tmp_path / "new").features["x"].shape == (2, 3)
    for wrong, message in (
        ({}, "new exists; remove it"),
        ({"destination": tmp_path / "b", "split": "dev"}, "split is 'dev'"),
        ({"destination": tmp_path / "b", "client_column": "y"}, "has no option 'client_column'"),
        ({"destination": tmp_path / "b", "shapes": ("x:2",)}, "write it as pixels=28,28"),
        ({"destination": tmp_path / "b", "format": "xml"}, "format is 'xml'; choose one of"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(dataclasses.replace(options, **wrong))


def test_the_convert_command_is_told_to_stop(tmp_path, monkeypatch):
    from fedjax_lite.cli import convert as command
    from fedjax_lite.cli.errors import InterruptedRunError

    path = write_fedjax(tmp_path / "a.sqlite", fedjax_rows(clients()))
    options = command.Convert(source=path, destination=tmp_path / "new")
    unpack, calls = fedjax_format.unpack, []

    def interrupted(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return unpack(*args)

    with monkeypatch.context() as patch:
        patch.setattr(fedjax_format, "unpack", interrupted)
        with pytest.raises(InterruptedRunError, match="interrupted after 2 clients; run the same"):
            command.convert(options)
    command.convert(options)
    assert_holds(
        fl.FederatedDataset.open(tmp_path / "new", verify=True),
        {name.encode(): features for name, features in clients().items()},
    )
