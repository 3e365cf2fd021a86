"""Files that are written piece by piece and must survive a crash."""

import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_lite.data.storage import stored


class Column:
    """A `.npy` file that grows at its end; its header is right once it is finished."""

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self._dtype, self._shape, self._rows = stored(dtype), shape, 0
        path.touch()
        self.file = path.open("r+b")
        self._write_header()

    def _write_header(self) -> None:
        header = io.BytesIO()
        shape = (self._rows, *self._shape)
        # NumPy pads the header so that its length does not depend on the number of rows.
        np.lib.format.write_array_header_1_0(
            header,
            {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": shape,
            },
        )
        self.file.seek(0)
        self.file.write(header.getvalue())

    def write(self, array: np.ndarray) -> None:
        if array.dtype.name == "bfloat16":
            array = array.view(np.uint16)
        array = np.ascontiguousarray(array, self._dtype)
        self.file.write(array.reshape(-1).view(np.uint8).data)
        self._rows += len(array)

    def cut(self, rows: int) -> None:
        """Keeps the first rows of a file that was left unfinished."""
        size = self.file.tell() + rows * math.prod(self._shape) * self._dtype.itemsize
        if self.file.seek(0, os.SEEK_END) < size:
            raise ValueError(f"{self.file.name} has fewer than {rows} rows")
        self.file.truncate(size)
        self.file.seek(size)
        self._rows = rows

    def read(self) -> np.ndarray:
        """All rows of a column of scalars."""
        position = self.file.tell()
        self.file.seek(position - self._rows * self._dtype.itemsize)
        return np.frombuffer(self.file.read(), self._dtype)

    def flush(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self) -> None:
        self._write_header()
        self.flush()


def lock(folder: Path) -> int | None:
    """Keeps other processes out of a folder until the file descriptor is closed."""
    if os.name != "posix":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"another process is writing {folder}; wait for it, or choose another folder."
        ) from None
    return descriptor


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file and waits until it is on disk."""
    with path.open("w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Makes the entries of a folder durable."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
