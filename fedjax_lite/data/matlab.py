"""EMNIST's MATLAB files, which say who wrote what."""

import math
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedjax_lite import _validate
from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.data.idx import MAX_RATIO
from fedjax_lite.data.mnist import from_images
from fedjax_lite.data.partition._deal import by_owner
from fedjax_lite.data.sources import check_file

_WHERE = "fetch https://biometrics.nist.gov/cs_links/EMNIST/matlab.zip, and unpack it"

# Types of elements of a file, version 5, and the class of an array that is a struct.
_NUMBERS = {
    **{1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4"},
    **{7: "f4", 9: "f8", 12: "i8", 13: "u8"},
}
_MATRIX, _COMPRESSED, _STRUCT = 14, 15, 2
_MAX_DEPTH = 4


def emnist_matlab(
    path: str | os.PathLike[str], split: Literal["train", "test"] = "train"
) -> FederatedDataset:
    """Handwritten characters by their writers, from a file such as `emnist-byclass.mat`.

    Source: Cohen et al. (2017), "EMNIST: an extension of MNIST to handwritten letters". Its splits
    are not those of FedJAX and TensorFlow Federated, for which see `emnist`. Nothing is downloaded.

    Args:
      path: The file, of balanced, byclass, bymerge, digits, letters or mnist.
      split: train or test, which have the same clients: all writers of the file, of whom some have
        no examples in one of the two.

    Returns:
      Clients by the number of the writer, with the features `x` `[rows, 28, 28, 1]`, float32 within
      [0, 1], ink being 1, and `y` `[rows]`, int32, from 0 in the order of the file's mapping.

    Raises:
      ValueError: There is no file, or it is damaged or holds something else; the message says where
        to fetch it.
    """
    _validate.choice("split", split, ("train", "test"))
    check_file(path)
    where = os.fspath(path)
    try:
        dataset = _variable(memoryview(Path(path).read_bytes()), b"dataset")
        writers = {part: np.ravel(dataset[part]["writers"]) for part in ("train", "test")}
        images, labels = np.asarray(dataset[split]["images"]), np.ravel(dataset[split]["labels"])
        classes = np.unique(np.atleast_2d(dataset["mapping"])[:, 0])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{where} is no file of EMNIST, by {error!r}; {_WHERE}.") from None
    except (ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"{where} cannot be read as MATLAB's: {error}; {_WHERE}.") from None
    if images.ndim != 2 or images.shape[1] != 28 * 28 or len(writers[split]) != len(images):
        raise ValueError(
            f"{where} has images {images.shape} of {len(writers[split])} writers; {_WHERE}."
        )
    if outside := set(labels.tolist()) - set(classes.tolist()):
        raise ValueError(f"{where} has the label {min(outside)}, not in its mapping; {_WHERE}.")
    # Pixels are stored column by column.
    upright = images.reshape(-1, 28, 28).swapaxes(1, 2)
    examples = from_images(where, upright, np.searchsorted(classes, labels).astype(np.uint8))
    names = np.unique(np.concatenate(list(writers.values())))
    rows = by_owner(np.searchsorted(names, writers[split]), names.size)
    return FederatedDataset.from_rows(examples, rows, client_ids=names.tolist())


def _variable(content: memoryview, name: bytes) -> Any:
    """A variable of a file: structs as dicts, and arrays of numbers.

    Arrays are looked at where they are in the file, whatever it claims them to be.
    """
    order = {b"IM": "<", b"MI": ">"}.get(bytes(content[126:128]))
    start = bytes(content[:10])
    if order is None or start != b"MATLAB 5.0":
        raise ValueError(f"it begins with {start!r}, not with 'MATLAB 5.0'")
    for kind, element in _elements(content[128:], order):
        if kind == _COMPRESSED:
            ((kind, element),) = _elements(_decompressed(element, order), order)
        if kind == _MATRIX:
            found, value = _matrix(element, order, _MAX_DEPTH)
            if found == name:
                return value
    raise KeyError(name.decode())


def _elements(content: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Type and content of what follows one another."""
    at = 0
    while at < len(content):
        kind, size = struct.unpack_from(f"{order}II", content, at)
        start = at + 8
        if kind >> 16:  # A short one, whose content is in place of its size.
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        at = start + size
        if at > len(content):
            raise ValueError("it ends within an element")
        yield kind, content[start:at]
        if kind != _COMPRESSED:
            at += -at % 8


def _decompressed(content: memoryview, order: str) -> memoryview:
    """The one element that is compressed; nothing is kept of more than it says to have."""
    stream = zlib.decompressobj()
    tag = stream.decompress(content, 8)
    size = struct.unpack(f"{order}II", tag)[1]
    if size > MAX_RATIO * len(content):
        raise ValueError("it ends within an element that is compressed")
    return memoryview(tag + stream.decompress(stream.unconsumed_tail, size + 1))


def _matrix(content: memoryview, order: str, depth: int) -> tuple[bytes, Any]:
    """The name and value of a matrix; `None` where it is neither a struct nor numbers."""
    if depth == 0:
        raise ValueError("its structs are nested too deeply")
    (_, flags), (_, lengths), (_, name), *parts = _elements(content, order)
    shape = np.frombuffer(lengths, f"{order}i4").tolist()
    flag = struct.unpack_from(f"{order}I", flags)[0]
    if flag & 0xFF == _STRUCT:
        (_, width), (_, names), *fields = parts
        (length,) = struct.unpack(f"{order}I", width)
        keys = [field.decode() for (field,) in struct.iter_unpack(f"{length}s", names)]
        keys = [key.partition("\0")[0] for key in keys]
        if math.prod(shape) != 1 or len(keys) != len(fields):
            raise ValueError(f"it has a struct of shape {shape} with {len(fields)} fields")
        values = [_matrix(field, order, depth - 1)[1] for _, field in fields]
        return bytes(name), dict(zip(keys, values, strict=True))
    if not parts or parts[0][0] not in _NUMBERS:
        return bytes(name), None
    kind, numbers = parts[0]
    array = np.frombuffer(numbers, order + _NUMBERS[kind])
    if array.size != math.prod(shape) or min(shape) < 0:
        raise ValueError(f"it has {array.size} numbers in an array of shape {shape}")
    return bytes(name), array.reshape(shape, order="F")
