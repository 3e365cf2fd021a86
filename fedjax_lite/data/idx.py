"""IDX files, of MNIST and of what has its form: one array in each."""

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import BinaryIO, Literal, cast

import numpy as np

from fedjax_lite import _validate
from fedjax_lite.data.sources import check_file

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_PIECE = 2**24  # Bytes.
_PREFIXES = {"train": "train", "test": "t10k"}


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
    with open(path, "rb") as file:
        is_compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            return _array(cast(BinaryIO, gzip.open(file)) if is_compressed else file)
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{os.fspath(path)} cannot be read as IDX: {error}; fetch the file anew."
            ) from None


def _array(file: BinaryIO) -> np.ndarray:
    start = file.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in _DTYPES:
        raise ValueError(f"it begins with {start!r}")
    lengths = file.read(4 * start[3])
    if len(lengths) < 4 * start[3]:
        raise ValueError("it ends in its header")
    dtype, shape = np.dtype(_DTYPES[start[2]]), np.frombuffer(lengths, ">u4").tolist()
    size, content = math.prod(shape) * dtype.itemsize, bytearray()
    # Piece by piece: a damaged or hostile file may claim any size.
    while len(content) <= size and (piece := file.read(_PIECE)):
        content += piece
    if len(content) != size:
        raise ValueError(f"what follows is not of the size of {dtype.name} {shape}")
    return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def mnist(
    folder: str | os.PathLike[str], split: Literal["train", "test"] = "train"
) -> dict[str, np.ndarray]:
    """MNIST, or Fashion-MNIST, or another in its form, to be dealt to clients.

    Args:
      folder: With `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, and the same of `t10k`, as
        they are or with `.gz`; nothing is downloaded.
      split: train or test.

    Returns:
      The features `x` `[rows, 28, 28, 1]`, float32 within [0, 1], and `y` `[rows]`, int32.

    Raises:
      FileNotFoundError: A file is missing; the message says what is looked for.
      ValueError: A file is damaged, or there are not as many labels as images.
    """
    _validate.choice("split", split, tuple(_PREFIXES))
    images, labels = (
        read_idx(_find(Path(folder), f"{_PREFIXES[split]}-{kind}-ubyte"))
        for kind in ("images-idx3", "labels-idx1")
    )
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{os.fspath(folder)} has images {images.shape} and labels {labels.shape}; fetch the"
            " files anew."
        )
    return {"x": images[..., None].astype(np.float32) / 255, "y": labels.astype(np.int32)}


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise FileNotFoundError(
        f"{folder} has neither {name} nor {name}.gz; fetch MNIST's four files, or those of"
        " Fashion-MNIST."
    )
