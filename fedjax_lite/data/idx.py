"""IDX files: one array in each."""

import contextlib
import gzip
import math
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

import numpy as np

from fedjax_lite.data.sources import check_file

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MAX_RATIO = 1032  # By which the deflation of gzip makes anything smaller at most.
_PIECE = 2**24  # Bytes.


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads the array of an IDX file, as it is or compressed by gzip.

    The file begins with two zeros, a byte for the type of the numbers and one for the number of
    axes, and the length of each axis in four bytes; what follows are the numbers, all of them with
    the most significant byte first.

    Args:
      path: The file, such as `train-images-idx3-ubyte.gz`.

    Returns:
      The array, in the byte order of the machine.

    Raises:
      ValueError: It is no such file, or shorter or longer than it says.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "labels-idx1-ubyte")
    ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
    ...     read_idx(path)
    array([7, 2, 1], dtype=uint8)
    """
    check_file(path)
    try:
        with _content(path) as (file, most):
            return _array(file, most)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{os.fspath(path)} cannot be read as IDX: {error}; fetch the file anew."
        ) from None


def is_idx(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as one of IDX does, decompressed."""
    try:
        with _content(path) as (file, _):
            start = file.read(4)
    except (OSError, EOFError, zlib.error):
        return False
    return len(start) == 4 and start[:2] == b"\0\0" and start[2] in _DTYPES


@contextlib.contextmanager
def _content(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, int]]:
    """The file, decompressed, and how many bytes it has at most."""
    with open(path, "rb") as file:
        is_compressed = file.read(2) == b"\x1f\x8b"
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if is_compressed:
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file)), MAX_RATIO * size
        else:
            yield file, size


def _array(file: BinaryIO, most: int) -> np.ndarray:
    """The array of a file that has so many bytes at most: a hostile one may claim any size."""
    start = file.read(4)
    if len(start) < 4 or start[:2] != b"\0\0":
        raise ValueError(f"it begins with {start!r}, not with two zeros, a type and a count")
    if start[2] not in _DTYPES:
        raise ValueError(f"its type is {start[2]:#04x}, not one of {', '.join(map(hex, _DTYPES))}")
    lengths = file.read(4 * start[3])
    if len(lengths) < 4 * start[3]:
        raise ValueError("it ends in its header")
    dtype, shape = np.dtype(_DTYPES[start[2]]), np.frombuffer(lengths, ">u4").tolist()
    size, content = math.prod(shape) * dtype.itemsize, bytearray()
    while size <= most and len(content) <= size:
        if not (piece := file.read(min(_PIECE, size + 1 - len(content)))):
            break
        content += piece
    if len(content) != size:
        raise ValueError(f"what follows is not of the size of {dtype.name} {shape}")
    return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)
