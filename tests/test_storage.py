"""Data sets on disk: what is written comes back, and what was not written does not open."""

import hashlib
import json
import os
import pickle
import shutil
import time

import ml_dtypes
import numpy as np
import pytest

import fedjax_lite as fl
from fedjax_lite.data.writer import Writer


def example_dataset(ids=("a", "ö/..", "")):
    rng = np.random.default_rng(0)
    features = {
        "x": rng.normal(size=(6, 2, 3)),
        "../up": rng.integers(0, 255, 6).astype(np.uint8),
        "half": rng.normal(size=(6, 1)).astype(ml_dtypes.bfloat16),
        "flag": rng.normal(size=6) > 0,
        "wave": (1j * rng.normal(size=6)).astype(np.complex64),
        "big endian": np.arange(6, dtype=">i4"),
        "nothing": np.zeros((6, 0), np.float16),
    }
    return fl.FederatedDataset.from_rows(features, [[0, 2], [], [1, 3, 4]], client_ids=ids)


def assert_same(one, other):
    assert one.client_ids == other.client_ids
    np.testing.assert_array_equal(one.offsets, other.offsets)
    assert one.examples.keys() == other.examples.keys()
    for name, feature in one.examples.items():
        assert feature.dtype == other.examples[name].dtype.newbyteorder("<")
        np.testing.assert_array_equal(feature, other.examples[name])


@pytest.mark.parametrize("ids", [("a", "ö/..", ""), (7, -1, 2**62), (b"\xff", b"", b"ab")])
def test_a_dataset_comes_back_as_it_was(tmp_path, ids):
    dataset = example_dataset(ids)
    dataset.save(tmp_path / "new" / "folder")
    opened = fl.FederatedDataset.open(tmp_path / "new" / "folder", verify=True)
    assert_same(opened, dataset)
    assert not opened.examples["x"].flags.writeable
    assert os.listdir(tmp_path / "new") == ["folder"]


def test_the_folder_is_what_numpy_and_sha256sum_say(tmp_path):
    dataset = example_dataset()
    dataset.save(tmp_path / "data")
    np.testing.assert_array_equal(
        np.load(tmp_path / "data/examples/x.npy", allow_pickle=False), dataset.examples["x"]
    )
    half = np.load(tmp_path / "data/examples/half.npy", allow_pickle=False)
    np.testing.assert_array_equal(half.view(ml_dtypes.bfloat16), dataset.examples["half"])
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    written = {str(p.relative_to(tmp_path / "data")) for p in tmp_path.rglob("*.npy")}
    assert written == set(meta["files"])
    for name, about in meta["files"].items():
        content = (tmp_path / "data" / name).read_bytes()
        assert about == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_appending_equals_saving(tmp_path):
    dataset = example_dataset()
    dataset.save(tmp_path / "saved")
    with Writer(tmp_path / "appended") as writer:
        for name in dataset.client_ids:
            writer.append(name, dataset[name])
    for path in (tmp_path / "saved").rglob("*.*"):
        other = tmp_path / "appended" / path.relative_to(tmp_path / "saved")
        assert path.read_bytes() == other.read_bytes()


def test_a_million_clients_open_within_a_second(tmp_path):
    num_clients = 1_000_000
    fl.FederatedDataset(
        examples={"x": np.zeros(num_clients, np.float32)},
        offsets=np.arange(num_clients + 1),
        client_ids=tuple(range(num_clients)),
    ).save(tmp_path / "data")
    began = time.process_time()
    dataset = fl.FederatedDataset.open(tmp_path / "data")
    assert time.process_time() - began < 1
    assert dataset[999_999]["x"].shape == (1,)


def meta_with(**changes):
    def change(folder):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, **changes}))

    return change


def rewrite(name, function):
    """Changes a file, and its size and hash in meta.json too, as a forger would."""

    def change(folder):
        content = function((folder / name).read_bytes())
        (folder / name).write_bytes(content)
        meta = json.loads((folder / "meta.json").read_text())
        meta["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "meta.json").write_text(json.dumps(meta))

    return change


def flip_last(content):
    return content[:-1] + bytes([content[-1] ^ 1])


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "meta.json").unlink(), "data has no meta.json: it is no data set"),
        (lambda f: (f / "meta.json").write_text("{"), "meta.json is damaged"),
        (lambda f: (f / "meta.json").write_text("[" * 10**5), "meta.json is damaged"),
        (lambda f: (f / "meta.json").write_text("[]"), "meta.json is damaged"),
        (meta_with(version=2), "meta.json .*format .* of version 2 is unknown"),
        (meta_with(client_ids="float"), "meta.json .*: client_ids is 'float'"),
        (meta_with(num_examples=4), "x.npy is damaged or altered: its header is"),
        (meta_with(num_clients=10**400), r"offsets.npy is damaged"),
        (meta_with(features={"../../x": {"shape": [], "dtype": "int8"}}), "it lists the files"),
        (meta_with(files={"../../x": {}}), r"meta.json .* it lists the files \['../../x'\]"),
        (lambda f: (f / "examples/x.npy").unlink(), "x.npy is damaged or altered: .*No such file"),
        (lambda f: os.truncate(f / "examples/x.npy", 150), "x.npy .*: it has 150 bytes where"),
        (
            lambda f: (f / "offsets.npy").write_bytes(flip_last((f / "offsets.npy").read_bytes())),
            "offsets.npy is damaged or altered: its SHA-256",
        ),
        (rewrite("offsets.npy", lambda c: c[:-8] + bytes(8)), "data: the dataset is empty"),
        (
            rewrite("offsets.npy", lambda c: c[:-24] + b"\x09" + bytes(7) + c[-16:]),
            "data: offsets falls at client 'ö/..', which would have -7 examples",
        ),
        (rewrite("examples/x.npy", lambda c: c[:-1]), "x.npy .*: its length does not fit"),
        (rewrite("examples/x.npy", lambda c: c[1:]), "x.npy .* magic"),
        (rewrite("examples/x.npy", lambda c: b"\x93NUMPY\x03\x00"), "x.npy .*version 1.0"),
        (
            rewrite("examples/x.npy", lambda c: c.replace(b"'<f8'", b"'|O' ")[:128]
                    + pickle.dumps(Bomb())),
            "x.npy is damaged or altered: its header is",
        ),
        (rewrite("client_ids.npy", lambda c: c[:-1] + b"\xff"), "client_ids.npy is damaged"),
        (rewrite("client_id_offsets.npy", flip_last), "client_ids.npy is damaged"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_by_name(tmp_path, change, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example_dataset().save(tmp_path / "data")
    change(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        fl.FederatedDataset.open(tmp_path / "data")
    assert os.listdir(tmp_path) == ["data"]


def test_duplicate_ids_on_disk_are_refused(tmp_path):
    example_dataset(("a", "b", "c")).save(tmp_path / "data")
    rewrite("client_ids.npy", lambda content: content[:-3] + b"aba")(tmp_path / "data")
    with pytest.raises(ValueError, match="data: client_ids names client 'a' 2 times"):
        fl.FederatedDataset.open(tmp_path / "data")


def test_large_files_are_hashed_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(fl.data.storage, "_ALWAYS_HASHED", 100)
    example_dataset().save(tmp_path / "data")
    path = tmp_path / "data/examples/x.npy"
    path.write_bytes(flip_last(path.read_bytes()))
    fl.FederatedDataset.open(tmp_path / "data")
    with pytest.raises(ValueError, match=r"x.npy is damaged or altered: its SHA-256"):
        fl.FederatedDataset.open(tmp_path / "data", verify=True)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((1, "a", b""), "client_ids has values of type bytes and int and str"),
        ((True, False, 2), "client_ids has values of type bool and int"),
        ((0.5, 1.5, 2.5), "client_ids has values of type float; name the clients by integers"),
        ((0, 1, 2**63), "client_ids holds integers beyond 64 bits"),
    ],
)
def test_save_refuses_ids_it_cannot_store(tmp_path, ids, message):
    with pytest.raises(ValueError, match=message):
        example_dataset(ids).save(tmp_path / "data")
    assert os.listdir(tmp_path) == []


def test_save_does_not_overwrite(tmp_path):
    with pytest.raises(ValueError, match="exists; remove it, or choose another folder"):
        example_dataset().save(tmp_path)


def write(path, clients, fingerprint="f"):
    """Writes clients; a client that is an exception is raised. Returns where it began."""
    with Writer(path, fingerprint=fingerprint) as writer:
        began = writer.num_clients
        for client in clients:
            if client is KeyboardInterrupt:
                raise KeyboardInterrupt
            writer.append(*client)
    return began


def test_a_writer_refuses_what_does_not_fit(tmp_path):
    for client_id, features, message in (
        ("a", {"x": [1.0]}, "client 'a' comes twice"),
        (1, {"x": [1.0]}, "client 1 has an id of type int where the first client's is of type str"),
        ("b", {0: [1]}, "client 'b' has features"),
        ("b", {"x": [1]}, "client 'b' has features .*int64.* where the first client has .*float64"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "data", [("a", {"x": [1.0]}), (client_id, features)])
        assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match=r"features are named \[0\]; name them by strings"):
        write(tmp_path / "data", [("a", {0: [1]})])
    with pytest.raises(ValueError, match="the dataset is empty"):
        write(tmp_path / "data", [])
    assert os.listdir(tmp_path) == []


def test_two_writers_do_not_mix(tmp_path):
    with Writer(tmp_path / "data") as writer:
        with pytest.raises(ValueError, match="another process is writing"):
            Writer(tmp_path / "data")
        writer.append("a", {"x": [1.0]})
    assert fl.FederatedDataset.open(tmp_path / "data").client_ids == ("a",)


@pytest.mark.parametrize("ids", [("a", "ö/..", ""), (7, -1, 2**62)])
def test_an_interrupted_writer_goes_on_where_it_was(tmp_path, ids):
    dataset = example_dataset(ids)
    dataset.save(tmp_path / "whole")
    clients = [(name, dataset[name]) for name in ids]
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "data", [*clients[:2], KeyboardInterrupt])
    with pytest.raises(ValueError, match=r"has no meta.json"):
        fl.FederatedDataset.open(tmp_path / ".data.partial")
    # What was written after the last record is lost, as it is when the power fails.
    with (tmp_path / ".data.partial/examples/x.npy").open("ab") as file:
        file.write(b"torn")
    shutil.copytree(tmp_path / ".data.partial", tmp_path / ".other.partial")

    assert write(tmp_path / "data", clients[2:]) == 2
    for path in (tmp_path / "whole").rglob("*.*"):
        other = tmp_path / "data" / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == other.read_bytes()
    with pytest.raises(ValueError, match="comes twice"):
        write(tmp_path / "other", clients[:1])


@pytest.mark.parametrize(
    ("damage", "fingerprint"),
    [
        (lambda partial: (partial / "journal.json").write_text("{"), "f"),
        (lambda partial: os.truncate(partial / "examples/x.npy", 100), "f"),
        (lambda partial: os.truncate(partial / "client_ids.npy", 0), "f"),
        (lambda partial: None, "another source"),
        (lambda partial: None, ""),
    ],
)
def test_a_writer_starts_anew_where_it_cannot_go_on(tmp_path, damage, fingerprint):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "data", [(1, {"x": [1.0]}), KeyboardInterrupt])
    damage(tmp_path / ".data.partial")
    assert write(tmp_path / "data", [("b", {"y": [2.0]})], fingerprint) == 0
    assert fl.FederatedDataset.open(tmp_path / "data").client_ids == ("b",)
