"""A data set as a folder: plain `.npy` files and `meta.json`, never a pickle.

| file                     | content                                                            |
|--------------------------|--------------------------------------------------------------------|
| `meta.json`              | counts, shapes, dtypes; size and SHA-256 of every other file       |
| `examples/<feature>.npy` | `[rows, ...]`, client after client; bfloat16 as uint16             |
| `offsets.npy`            | `[num_clients + 1]`, int64                                         |
| `client_ids.npy`         | `[num_clients]`, int64; or the bytes of all ids, one after another |
| `client_id_offsets.npy`  | `[num_clients + 1]`, int64: where in those bytes each id begins    |
"""

import hashlib
import itertools
import json
import math
import os
import urllib.parse
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_lite.data import checks

FORMAT, VERSION = "fedjax_lite.FederatedDataset", 1
_ALWAYS_HASHED = 2**25  # Files up to 32 MiB are hashed at every opening.


def load(
    path: str | os.PathLike[str], *, verify: bool
) -> tuple[dict[str, np.ndarray], np.ndarray, tuple[Hashable, ...]]:
    """Maps a folder into memory: examples, offsets and client ids.

    Raises:
      ValueError: A file is missing, truncated or altered.
    """
    folder = Path(path)
    try:
        with (folder / "meta.json").open("rb") as file:
            meta = json.loads(file.read(2**24))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder} has no meta.json: it is no data set, or was never finished; write it with"
            " save() or fedjax_lite.data.convert()."
        ) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(folder / "meta.json", error) from None
    try:
        if (meta["format"], meta["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {meta['format']!r} of version {meta['version']!r} is unknown")
        clients, rows = int(meta["num_clients"]), int(meta["num_examples"])
        dtypes = {name: checks.NUMERIC[spec["dtype"]] for name, spec in meta["features"].items()}
        layout: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            file_of(name): ((rows, *map(int, spec["shape"])), stored(dtypes[name]))
            for name, spec in meta["features"].items()
        }
        layout["offsets.npy"] = ((clients + 1,), np.dtype(np.int64))
        kind = meta["client_ids"]
        if kind == "int":
            layout["client_ids.npy"] = ((clients,), np.dtype(np.int64))
        elif kind in ("str", "bytes"):
            layout["client_ids.npy"] = ((int(meta["client_id_bytes"]),), np.dtype(np.uint8))
            layout["client_id_offsets.npy"] = ((clients + 1,), np.dtype(np.int64))
        else:
            raise ValueError(f"client_ids is {kind!r}")
        if set(meta["files"]) != set(layout):
            raise ValueError(f"it lists the files {sorted(meta['files'])} for {sorted(layout)}")
        arrays = {
            file: _map(folder / file, *layout[file], **meta["files"][file], verify=verify)
            for file in layout
        }
    except _DamagedError:
        raise
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise _damaged(folder / "meta.json", error) from None
    examples = {name: arrays[file_of(name)].view(dtype) for name, dtype in dtypes.items()}
    try:
        ids = decode_ids(kind, arrays["client_ids.npy"], arrays.get("client_id_offsets.npy"))
    except ValueError as error:
        raise _damaged(folder / "client_ids.npy", error) from None
    return examples, arrays["offsets.npy"], ids


def decode_ids(kind: str, values: np.ndarray, offsets: np.ndarray | None) -> tuple[Hashable, ...]:
    """Client ids from `client_ids.npy` and `client_id_offsets.npy`."""
    if offsets is None:
        return tuple(values.tolist())
    if offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
        raise ValueError("the offsets of the ids do not rise from 0 to the end")
    blob, ends = values.tobytes(), offsets.tolist()
    if kind == "str" and blob.isascii():  # Slices of one text beat a million decodings.
        text = blob.decode()
        return tuple(text[start:end] for start, end in itertools.pairwise(ends))
    pieces = (blob[start:end] for start, end in itertools.pairwise(ends))
    return tuple(pieces) if kind == "bytes" else tuple(piece.decode() for piece in pieces)


def _map(
    path: Path,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    bytes: int,  # noqa: A002
    sha256: str,
    verify: bool,
) -> np.ndarray:
    """One file as a read-only memory-mapped array, after checking it."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != bytes:
                raise ValueError(f"it has {size} bytes where meta.json says {bytes}")
            if verify or size <= _ALWAYS_HASHED:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise ValueError("its SHA-256 is not the one in meta.json")
                file.seek(0)
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("it is no .npy file of version 1.0")
            header = np.lib.format.read_array_header_1_0(file)
            if header != (shape, False, dtype):
                raise ValueError(f"its header is {header}, not {(shape, False, dtype)}")
            if size - file.tell() != math.prod(shape) * dtype.itemsize:
                raise ValueError("its length does not fit its header")
            if math.prod(shape) == 0:
                return np.zeros(shape, dtype)
            return np.asarray(np.memmap(file, dtype, "r", file.tell(), shape))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


class _DamagedError(ValueError):
    """A file of the folder is not as it was written."""


def _damaged(path: Path, why: object) -> _DamagedError:
    return _DamagedError(f"{path} is damaged or altered: {why}; write the data set anew.")


def file_of(feature: str) -> str:
    """The file of a feature, relative to the folder."""
    # Quoted, so that no name leads out of the folder.
    return f"examples/{urllib.parse.quote(feature, safe='')}.npy"


def stored(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What a dtype is written as: little-endian, and known to every reader of `.npy`."""
    return np.dtype("<u2") if dtype.name == "bfloat16" else dtype.newbyteorder("<")
