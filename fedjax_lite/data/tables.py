"""Tables with one example per row: NumPy's `.npz`, and CSV."""

import contextlib
import csv
import itertools
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import numpy as np

from fedjax_lite import _validate
from fedjax_lite.data import checks
from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.data.sources import (
    Columns,
    Features,
    Source,
    by_client,
    check_file,
    chosen,
    collect,
    needed,
)

_ROWS_AT_ONCE = 2**16
_MISSING = ("", "nan", "NaN")


def read_npz(
    path: str | os.PathLike[str],
    *,
    client_ids: str = "client_ids",
    transform: checks.Transform | None = None,
    max_bytes: int = 2**35,
) -> FederatedDataset:
    """Reads arrays `[rows, ...]` from a file of `np.savez`, never a pickle.

    Args:
      path: The file.
      client_ids: Name of the array `[rows]` that says to which client a row belongs; the other
        arrays are the features.
      transform: Applied to the features of each client; it may change the number of rows, and
        must encode text.
      max_bytes: Largest size of all arrays, decompressed.

    Returns:
      The clients sorted by id; the rows of a client in their order.

    Raises:
      ValueError: The file is damaged, holds a pickle, or lacks the array `client_ids`.
    """
    with npz(path, client_ids=client_ids, max_bytes=max_bytes) as source:
        return collect(path, source, transform)


def read_csv(
    path: str | os.PathLike[str],
    *,
    client_column: str = "client_id",
    columns: Columns | None = None,
    transform: checks.Transform | None = None,
) -> FederatedDataset:
    """Reads a table of numbers with a header line and a column that names the client.

    A column of integers becomes int64, any other float32; `nan` is read as such, and an empty
    field is an error, as is `nan` in the column of clients. The numbers of the whole table are
    held in memory.

    Args:
      path: The file, in UTF-8, with commas; rows in any order.
      client_column: The column that names the client of each row.
      columns: Features by name, each a column or, for a vector, several: `{"x": ["x1", "x2"],
        "y": "label"}`; "*" stands for all columns that are not named. Every column is a feature of
        its own if left out.
      transform: Applied to the features of each client; it may change the number of rows.

    Returns:
      The clients sorted by id, a string; the rows of a client in their order.

    Raises:
      ValueError: A column is missing, or a field is no number; the message names the line.
    """
    transform = chosen(columns, transform)
    with table(path, client_column=client_column, columns=columns) as source:
        return collect(path, source, transform)


@contextlib.contextmanager
def npz(
    path: str | os.PathLike[str], *, client_ids: str = "client_ids", max_bytes: int = 2**35
) -> Iterator[Source]:
    """The source of `read_npz`."""
    check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > max_bytes:
            raise ValueError(f"its arrays have {size} bytes; raise max_bytes ({max_bytes})")
        with np.load(path, allow_pickle=False) as file:
            arrays = {}
            for name in file.files:
                arrays[name] = file[name]
                if not isinstance(arrays[name], np.ndarray):
                    raise ValueError(f"{name!r} is no array")
        if client_ids not in arrays:
            raise ValueError(f"it has the arrays {sorted(arrays)} and no {client_ids!r}")
        source = _by_client(client_ids, arrays.pop(client_ids), arrays)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{os.fspath(path)} cannot be read as .npz: {error}; fetch or write the file anew."
        ) from None
    except (ValueError, MemoryError, RuntimeError) as error:
        raise ValueError(f"{os.fspath(path)} cannot be read as .npz: {error}") from None
    yield source


@contextlib.contextmanager
def table(
    path: str | os.PathLike[str],
    *,
    client_column: str = "client_id",
    columns: Columns | None = None,
) -> Iterator[Source]:
    """The source of `read_csv`: the columns that are needed, each a feature."""
    check_file(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            ids, examples = _parse(file, client_column, columns)
        source = _by_client(client_column, ids, examples)
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is no UTF-8: {error}; save it as UTF-8.") from None
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{os.fspath(path)} cannot be read as CSV: {error}") from None
    yield source


def _by_client(column: str, ids: np.ndarray, examples: Features) -> Source:
    _validate.features("the table", {**examples, "client ids": ids})
    take = lambda rows: {name: array[rows] for name, array in examples.items()}  # noqa: E731
    return by_client(column, ids, take)


def _parse(
    file: TextIO, client_column: str, columns: Columns | None
) -> tuple[np.ndarray, Features]:
    """The client of each row, and the numbers of all other columns that are needed."""
    reader = filter(None, csv.reader(file, strict=True))  # Of blank lines, there are no fields.
    header = next(reader, [])
    if len(header) == 1 and set(header[0]) & set(";\t|"):
        raise ValueError(f"it begins with {header[0]!r}; separate the columns by commas")
    if "" in header:
        raise ValueError(
            f"column {header.index('') + 1} has no name; name all of {header} (pandas writes such"
            " a column unless it is told index=False)"
        )
    if client_column not in header or len(set(header)) != len(header):
        raise ValueError(
            f"its columns are {header}; name each once, and choose client_column"
            f" ({client_column!r}) among them"
        )
    others = [name for name in header if name != client_column]
    blocks: dict[str, list[Any]] = {name: [] for name in needed(columns, others)}
    ids: list[str] = []
    num_rows = 0
    while rows := list(itertools.islice(reader, _ROWS_AT_ONCE)):
        for i, row in enumerate(rows, num_rows + 1):
            if len(row) != len(header):
                raise ValueError(f"row {i} has {len(row)} fields for {len(header)} columns")
        for name, fields in zip(header, zip(*rows, strict=True), strict=True):
            if name == client_column:
                for i, field in enumerate(fields, num_rows + 1):
                    if field.strip() in _MISSING:
                        raise ValueError(
                            f"column {name!r} has {field!r} in row {i}, which names no client;"
                            " name one there, or leave the row out"
                        )
                ids.extend(fields)
            elif name in blocks:
                blocks[name].append(_numbers(name, fields, num_rows + 1))
        num_rows += len(rows)
    numbers = {name: np.concatenate(parts) for name, parts in blocks.items() if parts}
    return np.array(ids, object), {
        name: column if column.dtype == np.int64 else column.astype(np.float32)
        for name, column in numbers.items()
    }


def _numbers(name: str, fields: Sequence[str], first_row: int) -> np.ndarray:
    try:
        return np.fromiter(map(int, fields), np.int64, len(fields))
    except OverflowError:
        raise ValueError(f"column {name!r} has integers that do not fit int64") from None
    except ValueError:
        pass  # Not integers, at least not all.
    numbers = np.empty(len(fields), np.float32)
    for i, field in enumerate(fields):
        try:
            numbers[i] = float(field)
        except ValueError:
            raise ValueError(
                f"column {name!r} has {field[:40]!r} in row {first_row + i}; encode it as a number,"
                " or choose columns without it"
            ) from None
    return numbers
