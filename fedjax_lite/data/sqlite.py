"""SQLite files of FedJAX (one row per client) and of TensorFlow Federated (one per example)."""

import contextlib
import functools
import itertools
import math
import operator
import os
import sqlite3
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_lite._extras import require
from fedjax_lite.data import checks, fedjax_format, tf_example
from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.data.sources import MAX_CLIENT_BYTES, Features, Source, check_file, collect


def read_fedjax_sqlite(
    path: str | os.PathLike[str],
    *,
    transform: checks.Transform | None = None,
    max_client_bytes: int = MAX_CLIENT_BYTES,
) -> FederatedDataset:
    """Reads a file of FedJAX: a table `federated_data` of compressed msgpack.

    Args:
      path: The file, such as `federated_emnist_train.sqlite`.
      transform: Applied to the features of each client, `[rows, ...]` by name; it may change
        the number of rows. Text arrives as bytes in arrays of objects, which it must encode.
      max_client_bytes: Largest size of a client's features.

    Returns:
      The clients in the order of the file; ids are bytes.

    Raises:
      ValueError: The file is damaged, or of another format; the message names the client.
      ImportError: msgpack is missing.
    """
    with fedjax_sqlite(path, max_client_bytes=max_client_bytes) as source:
        return collect(path, source, transform)


def read_tff_sqlite(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    transform: checks.Transform | None = None,
    max_client_bytes: int = MAX_CLIENT_BYTES,
) -> FederatedDataset:
    """Reads a file of TensorFlow Federated: a table `examples` of `tf.train.Example` messages.

    Args:
      path: The file, such as `emnist_all.sqlite`, decompressed.
      split: Which examples, by `split_name`; may be left out if the file has one split.
      shapes: Shapes of features by name, since a message holds flat lists: `(28, 28)` for the
        `pixels` of EMNIST. Without one, a single value is a scalar, and several are a vector.
      transform: Applied to the features of each client, `[rows, ...]` by name; it may change
        the number of rows. Text arrives as bytes in arrays of objects, which it must encode.
      max_client_bytes: Largest size of a client's messages.

    Returns:
      The clients sorted by id, a string. Integers are int64, floats float32.

    Raises:
      ValueError: The file is damaged, or of another format, or the split is unknown; the message
        names the client.
    """
    with tff_sqlite(path, split=split, shapes=shapes, max_client_bytes=max_client_bytes) as source:
        return collect(path, source, transform)


@contextlib.contextmanager
def fedjax_sqlite(
    path: str | os.PathLike[str], *, max_client_bytes: int = MAX_CLIENT_BYTES
) -> Iterator[Source]:
    """The source of `read_fedjax_sqlite`."""
    msgpack = require("msgpack", "data")
    with _connect(path, max_client_bytes, ("federated_data",)) as connection:

        def clients() -> Iterator[tuple[Hashable, Callable[[], Features]]]:
            rows = connection.execute(
                "SELECT client_id, data, num_examples FROM federated_data ORDER BY rowid"
            )
            for client_id, data, num_examples in rows:
                load = functools.partial(fedjax_format.unpack, msgpack, data, max_client_bytes)
                yield client_id, functools.partial(_counted, load, num_examples)

        (num_clients,) = connection.execute("SELECT COUNT(*) FROM federated_data").fetchone()
        yield Source(clients(), num_clients)


@contextlib.contextmanager
def tff_sqlite(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    max_client_bytes: int = MAX_CLIENT_BYTES,
) -> Iterator[Source]:
    """The source of `read_tff_sqlite`."""
    with _connect(path, max_client_bytes, ("examples", "client_metadata")) as connection:
        names = connection.execute("SELECT DISTINCT split_name FROM client_metadata")
        splits = sorted(str(name) for (name,) in names)
        if len(splits) != 1 and split is None:
            raise ValueError(f"{path} has the splits {splits}; choose one with split=.")
        if split not in (None, *splits):
            raise ValueError(f"split is {split!r}, and {path} has {splits}; choose one of them.")
        split = splits[0] if split is None else split
        sizes = dict(
            connection.execute(
                "SELECT client_id, num_examples FROM client_metadata WHERE split_name = ?"
                " ORDER BY client_id",
                (split,),
            )
        )

        def clients() -> Iterator[tuple[Hashable, Callable[[], Features]]]:
            rows = connection.execute(
                "SELECT client_id, serialized_example_proto FROM examples WHERE split_name = ?"
                " ORDER BY client_id, rowid",
                (split,),
            )
            expected = iter(sizes)
            for client_id, group in itertools.groupby(rows, operator.itemgetter(0)):
                while (name := next(expected, None)) != client_id and sizes.get(name) == 0:
                    yield name, dict
                if client_id != name:
                    raise ValueError(
                        f"it has examples of client {client_id!r} where client_metadata says"
                        f" {name!r}; fetch the file anew."
                    )
                messages = _limited(client_id, group, max_client_bytes)
                load = functools.partial(_stack, messages, shapes or {})
                yield client_id, functools.partial(_counted, load, sizes[client_id])
            for name in expected:
                if sizes[name] != 0:
                    raise ValueError(f"it has no examples of client {name!r}; fetch the file anew.")
                yield name, dict

        yield Source(clients(), len(sizes))


@contextlib.contextmanager
def _connect(
    path: str | os.PathLike[str], max_client_bytes: int, tables: tuple[str, ...]
) -> Iterator[sqlite3.Connection]:
    """A read-only connection to a file that has the tables."""
    check_file(path)
    uri = f"{Path(path).resolve().as_uri()}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            # A view, a trigger or a huge value of a hostile file must not run or be read.
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, min(max_client_bytes, 2**31 - 1))
            connection.execute("PRAGMA trusted_schema = OFF")
            found = dict(connection.execute("SELECT name, type FROM sqlite_master"))
            if any(found.get(table) != "table" for table in tables):
                raise ValueError(
                    f"{path} has no table {' and '.join(tables)}, but {sorted(found)}; check what"
                    " wrote the file."
                )
            yield connection
    except sqlite3.Error as error:
        raise ValueError(
            f"{path} cannot be read as SQLite: {error}; fetch the file anew, or raise"
            f" max_client_bytes ({max_client_bytes}) if a value is too big."
        ) from None


def _counted(load: Callable[[], Features], num_examples: Any) -> Features:
    """Loads features, and refuses another number of rows than the file says."""
    features = load()
    shapes = {name: feature.shape for name, feature in features.items()}
    if any(shape[:1] != (num_examples,) for shape in shapes.values() or ((0,),)):
        raise ValueError(f"its features have shapes {shapes} for {num_examples!r} examples")
    return features


def _stack(messages: list[bytes], shapes: Mapping[str, tuple[int, ...]]) -> Features:
    """The examples of a client, one array per feature."""
    examples = [tf_example.parse(message) for message in messages]
    specs = {tuple((name, len(v), v.dtype) for name, v in sorted(e.items())) for e in examples}
    if len(specs) != 1:
        raise ValueError(f"its examples differ in their features: {sorted(map(str, specs))}")
    features = {}
    if unknown := set(shapes) - set(examples[0]):
        raise ValueError(f"it has no feature {min(unknown)!r} of shapes, but {sorted(examples[0])}")
    for name, length, _ in next(iter(specs)):
        shape = shapes.get(name, () if length == 1 else (length,))
        if math.prod(shape) != length:
            raise ValueError(
                f"feature {name!r} has {length} values, which is not shapes[{name!r}] = {shape}"
            )
        stacked = np.stack([example[name] for example in examples])
        features[name] = stacked.reshape(len(examples), *shape)
    return features


def _limited(client_id: Hashable, rows: Iterator[tuple[Any, Any]], max_bytes: int) -> list[bytes]:
    """The messages of a client."""
    messages, size = [], 0
    for _, message in rows:
        if not isinstance(message, bytes):
            raise ValueError(f"client {client_id!r}: an example is no BLOB but {message!r:.40}")
        size += len(message)
        if size > max_bytes:
            raise ValueError(
                f"client {client_id!r}: its examples exceed max_client_bytes ({max_bytes})"
            )
        messages.append(message)
    return messages
