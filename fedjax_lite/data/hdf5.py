"""HDF5 files of TensorFlow Federated: `examples/<client>/<feature>`."""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from fedjax_lite._extras import require
from fedjax_lite.data import checks
from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.data.sources import MAX_CLIENT_BYTES, Features, Source, check_file, collect

_STRINGS_AT_ONCE = 256


def read_tff_hdf5(
    path: str | os.PathLike[str],
    *,
    transform: checks.Transform | None = None,
    max_client_bytes: int = MAX_CLIENT_BYTES,
) -> FederatedDataset:
    """Reads a file of TensorFlow Federated: groups `examples/<client>` of arrays.

    The HDF5 library is written in C and was not built for hostile files; what can be checked
    before it reads is checked: links, sizes, types.

    Args:
      path: The file, such as `shakespeare_train.h5`.
      transform: Applied to the features of each client, `[rows, ...]` by name; it may change
        the number of rows. Text arrives as bytes in arrays of objects, which it must encode.
      max_client_bytes: Largest size of a client's features.

    Returns:
      The clients sorted by id, a string.

    Raises:
      ValueError: The file is damaged, of another format, or refers to other files; the message
        names the client.
      ImportError: h5py is missing.
    """
    with tff_hdf5(path, max_client_bytes=max_client_bytes) as source:
        return collect(path, source, transform)


@contextlib.contextmanager
def tff_hdf5(
    path: str | os.PathLike[str], *, max_client_bytes: int = MAX_CLIENT_BYTES
) -> Iterator[Source]:
    """The source of `read_tff_hdf5`."""
    check_file(path)
    h5py = require("h5py", "data")
    with _reading(path):
        file = h5py.File(path, "r")
    with file:
        with _reading(path):
            groups = _child(h5py, file, "examples", h5py.Group)
            names = list(groups)

        def load(client_id: str) -> Features:
            left, features = max_client_bytes, {}
            with _reading(path):
                group = _child(h5py, groups, client_id, h5py.Group)
                if not len(group):
                    raise ValueError("it has no features")
                for name in group:
                    array = _child(h5py, group, name, h5py.Dataset)
                    features[name] = _read(h5py, name, array, left)
                    left -= features[name].nbytes
            return features

        yield Source(((name, functools.partial(load, name)) for name in names), len(names))


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Says of errors of the library that the file is damaged."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{os.fspath(path)} cannot be read as HDF5: {reason}; fetch the file anew."
        ) from None


def _child(h5py: Any, group: Any, name: str, kind: type) -> Any:
    """A member that lies in the file itself: no link may lead to another."""
    link = group.get(name, getlink=True)
    if link is None:
        raise ValueError(f"{group.file.filename}: {group.name} has no {name!r}; check its format.")
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{name!r} is a {type(link).__name__} and not data of this file")
    member = group[name]
    if not isinstance(member, kind):
        raise ValueError(f"{name!r} is no {kind.__name__} of HDF5")
    return member


def _read(h5py: Any, name: str, array: Any, max_bytes: int) -> np.ndarray:
    if array.is_virtual or array.external:
        raise ValueError(f"feature {name!r} lies in another file")
    if array.nbytes > max_bytes:
        raise ValueError(f"feature {name!r} has {array.nbytes} bytes, beyond max_client_bytes")
    if array.ndim == 0:
        raise ValueError(f"feature {name!r} is a scalar, not one value per example")
    if array.dtype.kind != "O":
        return np.asarray(array[()])
    if h5py.check_string_dtype(array.dtype) is None:
        raise ValueError(f"feature {name!r} has a type of HDF5 that is neither numbers nor text")
    # Many entries can point to one long text: read some at a time, and count.
    blocks, size = [np.zeros((0, *array.shape[1:]), object)], 0
    for start in range(0, len(array), _STRINGS_AT_ONCE):
        blocks.append(array[start : start + _STRINGS_AT_ONCE])
        size += sum(map(len, blocks[-1].ravel()))
        if size > max_bytes:
            raise ValueError(f"feature {name!r} has more text than max_client_bytes")
    return np.concatenate(blocks)
