"""Writes the folder of `fedjax_lite.data.storage`, client by client, and all at once or not."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from fedjax_lite.data import checks
from fedjax_lite.data.files import Column, lock, sync, write_json
from fedjax_lite.data.storage import FORMAT, VERSION, decode_ids, file_of

CHECKPOINT_SECONDS = 5.0


class Writer:
    """A data set being written, in a hidden folder beside its final place.

    Used in a `with` block. Leaving it puts the folder in its place, complete, with all files on
    disk. If the block raises, or the process is killed, nothing is there.

    Args:
      path: The folder, which must not exist.
      fingerprint: Names what is written. If given, progress is recorded every few seconds, and
        a later writer with the same fingerprint goes on from there: it begins with
        `num_clients` clients. Without one, it starts anew.

    Attributes:
      num_clients: Clients written so far.

    Raises:
      ValueError: `path` exists, or another process is writing it.

    >>> import fedjax_lite as fl, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Writer(f"{folder}/clients") as writer:
    ...         writer.append("alice", {"x": [1.0, 2.0]})
    ...         writer.append("bob", {"x": [3.0]})
    ...     dataset = fl.FederatedDataset.open(f"{folder}/clients")
    >>> dataset.num_examples.tolist()
    [2, 1]
    """

    def __init__(self, path: str | os.PathLike[str], *, fingerprint: str = "") -> None:
        self._path = Path(path)
        if self._path.exists():
            raise ValueError(f"{path} exists; remove it, or choose another folder.")
        self._partial = self._path.parent / f".{self._path.name}.partial"
        self._partial.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self._partial)
        self._fingerprint = fingerprint
        self._reset()
        try:
            if not self._resume():
                self._close_columns()
                self._reset()
                for child in self._partial.iterdir():
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
                (self._partial / "examples").mkdir()
        except BaseException:
            self._close()
            raise

    def _reset(self) -> None:
        self.num_clients = self._num_rows = self._id_bytes = 0
        self._kind = ""
        self._first: dict[str, np.ndarray] | None = None
        self._columns: dict[str, Column] = {}
        self._seen: set[Hashable] = set()
        self._waiting: list[Hashable] = []  # Clients without rows, before the first with any.
        self._saved = time.monotonic()

    def append(self, client_id: Hashable, features: Mapping[str, ArrayLike]) -> None:
        """Adds a client.

        Args:
          client_id: An int, str or bytes, of one type for all clients.
          features: `[rows of the client, ...]` by name; there may be no rows, of whatever shape
            and dtype.

        Raises:
          ValueError: The client was written before, its id is of another type, or its features
            differ from those of the first client that has rows.
        """
        arrays = checks.of_client(client_id, features, self._first)
        if checks.has_rows(arrays):
            self.extend((client_id,), np.array([len(next(iter(arrays.values())))]), arrays)
        elif self._first is None:  # What the files are to hold is not known yet.
            self._waiting.append(client_id)
            self.num_clients += 1
        else:
            self.extend((client_id,), np.zeros(1, np.int64), self._first)

    def extend(
        self, client_ids: Sequence[Hashable], sizes: np.ndarray, features: Mapping[str, np.ndarray]
    ) -> None:
        """Adds several clients, whose rows follow each other.

        Args:
          client_ids: Their ids.
          sizes: Their numbers of rows.
          features: `[rows, ...]` by name.

        Raises:
          ValueError: A client was written before, or an id is of another type.
        """
        if not all(isinstance(name, str) for name in features):
            raise ValueError(f"features are named {list(features)}; name them by strings.")
        client_ids = (*self._waiting, *client_ids)
        sizes = np.append(np.zeros(len(self._waiting), np.int64), sizes)
        self.num_clients -= len(self._waiting)
        self._waiting = []
        kind, values, id_sizes = _encode_ids(client_ids)
        if kind != (self._kind or kind):
            raise ValueError(
                f"client {client_ids[0]!r} has an id of type {kind} where the first client's is of"
                f" type {self._kind}; name all clients by values of one type."
            )
        for client_id in client_ids:
            if client_id in self._seen:
                raise ValueError(f"client {client_id!r} comes twice; make the ids distinct.")
            self._seen.add(client_id)
        if self._first is None:
            self._kind = kind
            self._first = {name: np.asarray(feature[:0]) for name, feature in features.items()}
            self._open_columns()
        for name, feature in features.items():
            self._columns[file_of(name)].write(feature)
        self._columns["offsets.npy"].write(self._num_rows + np.cumsum(sizes))
        self._columns["client_ids.npy"].write(values)
        if kind != "int":
            self._columns["client_id_offsets.npy"].write(self._id_bytes + np.cumsum(id_sizes))
        self.num_clients += len(client_ids)
        self._num_rows += int(sizes.sum())
        self._id_bytes += int(id_sizes.sum())
        if self._fingerprint and time.monotonic() - self._saved > CHECKPOINT_SECONDS:
            self._checkpoint()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
            elif self._fingerprint and self._columns and not isinstance(error, ValueError):
                self._checkpoint()
            else:
                shutil.rmtree(self._partial)
        finally:
            self._close()

    def _finish(self) -> None:
        if self._num_rows == 0:
            shutil.rmtree(self._partial)
            raise ValueError(
                f"the dataset is empty: {self.num_clients} clients with 0 examples; write at least"
                " one client with one example."
            )
        files = {}
        for name, column in self._columns.items():
            column.finish()
            with (self._partial / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                files[name] = {"bytes": file.tell(), "sha256": digest}
        meta = {"format": FORMAT, "version": VERSION, **self._counts(), "files": files}
        write_json(self._partial / "meta.json", meta)
        (self._partial / "journal.json").unlink(missing_ok=True)
        sync(self._partial / "examples")
        sync(self._partial)
        self._partial.rename(self._path)
        sync(self._path.parent)

    def _checkpoint(self) -> None:
        for column in self._columns.values():
            column.flush()
        journal = self._partial / "journal.json"
        write_json(
            journal.with_suffix(".new"), {"fingerprint": self._fingerprint, **self._counts()}
        )
        journal.with_suffix(".new").replace(journal)
        self._saved = time.monotonic()

    def _counts(self) -> dict[str, Any]:
        """What `meta.json` and the journal both say."""
        return {
            "num_clients": self.num_clients,
            "num_examples": self._num_rows,
            "client_ids": self._kind,
            "client_id_bytes": self._id_bytes,
            "features": {
                name: {"shape": feature.shape[1:], "dtype": feature.dtype.name}
                for name, feature in (self._first or {}).items()
            },
        }

    def _resume(self) -> bool:
        """Takes up what an earlier writer left, if it was writing the same."""
        try:
            journal = json.loads((self._partial / "journal.json").read_text())
            if not self._fingerprint or journal["fingerprint"] != self._fingerprint:
                return False
            self._first = {
                name: np.empty((0, *spec["shape"]), checks.NUMERIC[spec["dtype"]])
                for name, spec in journal["features"].items()
            }
            self.num_clients, self._kind = journal["num_clients"], journal["client_ids"]
            self._num_rows, self._id_bytes = journal["num_examples"], journal["client_id_bytes"]
            self._open_columns()
            offsets = self._columns.get("client_id_offsets.npy")
            ids = decode_ids(
                self._kind,
                self._columns["client_ids.npy"].read(),
                None if offsets is None else offsets.read(),
            )
            self._seen = set(ids)
            (self._partial / "meta.json").unlink(missing_ok=True)
        except (OSError, KeyError, TypeError, ValueError):
            return False
        return True

    def _open_columns(self) -> None:
        ends, num_ids = self.num_clients + 1, self.num_clients
        columns = {
            file_of(name): (feature.dtype, feature.shape[1:], self._num_rows)
            for name, feature in (self._first or {}).items()
        }
        columns["offsets.npy"] = (np.dtype(np.int64), (), ends)
        if self._kind == "int":
            columns["client_ids.npy"] = (np.dtype(np.int64), (), num_ids)
        else:
            columns["client_ids.npy"] = (np.dtype(np.uint8), (), self._id_bytes)
            columns["client_id_offsets.npy"] = (np.dtype(np.int64), (), ends)
        for name, (dtype, shape, rows) in columns.items():
            self._columns[name] = Column(self._partial / name, dtype, shape)
            if self.num_clients:
                self._columns[name].cut(rows)
            elif name.endswith("offsets.npy"):
                self._columns[name].write(np.zeros(1, np.int64))

    def _close_columns(self) -> None:
        for column in self._columns.values():
            column.file.close()

    def _close(self) -> None:
        self._close_columns()
        if self._lock is not None:
            os.close(self._lock)


def _encode_ids(client_ids: Sequence[Hashable]) -> tuple[str, np.ndarray, np.ndarray]:
    """The kind of the ids, the values to store, and the length of each in bytes."""
    kinds = {int if issubclass(kind, np.integer) else kind for kind in set(map(type, client_ids))}
    kind = kinds.pop().__name__
    if kinds or kind not in ("int", "str", "bytes"):
        names = sorted(kind.__name__ for kind in set(map(type, client_ids)))
        raise ValueError(
            f"client_ids has values of type {' and '.join(names)}; name the clients by integers,"
            " by strings or by bytes."
        )
    if kind == "int":
        try:
            return kind, np.array(client_ids, np.int64), np.zeros(0, np.int64)
        except OverflowError:
            raise ValueError(
                "client_ids holds integers beyond 64 bits; name the clients by strings."
            ) from None
    encoded = [name if isinstance(name, bytes) else str(name).encode() for name in client_ids]
    sizes = np.fromiter(map(len, encoded), np.int64, len(encoded))
    return kind, np.frombuffer(b"".join(encoded), np.uint8), sizes
