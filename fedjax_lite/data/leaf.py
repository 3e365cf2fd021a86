"""JSON files of LEAF: `users`, `num_samples` and `user_data[user] = {"x": ..., "y": ...}`."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_lite.data import checks
from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.data.sources import Features, Source, check_file, collect


def read_leaf(
    path: str | os.PathLike[str],
    *,
    transform: checks.Transform | None = None,
    max_file_bytes: int = 2**31,
) -> FederatedDataset:
    """Reads a JSON file of LEAF, or all those of a folder.

    JSON has no dtypes: integers become int64, all other numbers float32, and text becomes
    strings in arrays of objects.

    Args:
      path: A file, or a folder whose `.json` files are read in the order of their names.
      transform: Applied to the features of each client, `[rows, ...]` by name; it may change
        the number of rows, and must encode text.
      max_file_bytes: Largest file, since a file is held in memory: about ten times its size.

    Returns:
      The clients in the order of `users`; ids are strings.

    Raises:
      ValueError: A file is damaged, or of another format; the message names file and client.
    """
    with leaf(path, max_file_bytes=max_file_bytes) as source:
        return collect(path, source, transform)


@contextlib.contextmanager
def leaf(path: str | os.PathLike[str], *, max_file_bytes: int = 2**31) -> Iterator[Source]:
    """The source of `read_leaf`."""
    if not Path(path).is_dir():
        check_file(path)
    files = sorted(Path(path).glob("*.json")) if Path(path).is_dir() else [Path(path)]
    if not files:
        raise ValueError(f"{os.fspath(path)} holds no .json file; pass a folder of LEAF's.")

    def clients() -> Iterator[tuple[Hashable, Callable[[], Features]]]:
        for file in files:
            users, sizes, data = _parse(file, max_file_bytes)
            for user, size in zip(users, sizes, strict=True):
                # Taken out, so that its memory is free once it is written.
                yield user, functools.partial(_load, data.pop(user), size)

    yield Source(clients())


def _parse(file: Path, max_file_bytes: int) -> tuple[list[str], list[int], dict[str, Any]]:
    try:
        if (size := file.stat().st_size) > max_file_bytes:
            raise ValueError(f"it has {size} bytes; raise max_file_bytes ({max_file_bytes})")
        content = json.loads(file.read_bytes(), object_pairs_hook=_distinct)
        users, sizes, data = (content[key] for key in ("users", "num_samples", "user_data"))
        if not isinstance(users, list) or not isinstance(sizes, list) or not isinstance(data, dict):
            raise ValueError("users, num_samples and user_data are not two lists and an object")
        if len(users) != len(sizes):
            raise ValueError(f"it has {len(users)} users and {len(sizes)} num_samples")
        if set(users) != set(data) or len(users) != len(data):
            odd = next(iter(set(users) ^ set(data)), "") or max(users, key=users.count)
            raise ValueError(f"users and user_data differ in client {odd!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{file} is no JSON file of LEAF: {reason}.") from None
    return users, sizes, data


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of two equal names, Python would drop the first."""
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} comes twice in an object")
    return members


def _load(data: Any, num_samples: int) -> Features:
    if not isinstance(data, dict):
        raise ValueError(f"its user_data is of type {type(data).__name__}, not an object")
    features = {name: _array(name, values) for name, values in data.items()}
    sizes = {name: len(feature) for name, feature in features.items()}
    if set(sizes.values()) != {num_samples} and (sizes or num_samples != 0):
        raise ValueError(f"it has {sizes} examples where num_samples says {num_samples}")
    return features


def _array(name: str, values: Any) -> np.ndarray:
    if not isinstance(values, list):
        raise ValueError(f"feature {name!r} is of type {type(values).__name__}, not a list")
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"feature {name!r} has rows of different lengths; pad them") from None
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    return array.astype(object) if array.dtype.kind == "U" else array
