"""Data frames of pandas, and the parquet files that it reads."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from fedjax_lite._extras import require
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
)


def read_pandas(
    frame: Any,
    *,
    client_column: str = "client_id",
    columns: Columns | None = None,
    transform: checks.Transform | None = None,
) -> FederatedDataset:
    """Reads a pandas `DataFrame`, or a parquet file.

    Dtypes stay as they are. A column of lists or arrays of one shape becomes an array; text
    becomes strings in arrays of objects.

    Args:
      frame: The frame, or the path of a `.parquet` file, which is held in memory.
      client_column: The column that names the client of each row; its index is not used.
      columns: Features by name, as in `read_csv`; if left out, all other columns are features.
      transform: Applied to the features of each client, `[rows, ...]` by name; it may change
        the number of rows, and must encode text.

    Returns:
      The clients sorted by id; the rows of a client in their order.

    Raises:
      ValueError: The file is damaged, the column is missing or has missing values.
      ImportError: The path of a file is given, and pandas or pyarrow is missing.
    """
    with pandas(frame, client_column=client_column) as source:
        return collect(frame, source, chosen(columns, transform))


@contextlib.contextmanager
def pandas(frame: Any, *, client_column: str = "client_id") -> Iterator[Source]:
    """The source of `read_pandas`."""
    if isinstance(frame, (str, os.PathLike)):
        frame = _parquet(frame)
    names = list(map(str, frame.columns))
    if client_column not in names or len(set(names)) != len(names) or "" in names:
        raise ValueError(
            f"the columns are {names}; name each once, and choose client_column"
            f" ({client_column!r}) among them."
        )
    arrays = {name: frame.iloc[:, i].to_numpy() for i, name in enumerate(names)}
    ids = arrays.pop(client_column)

    def take(rows: np.ndarray) -> Features:
        return {name: _dense(name, array[rows]) for name, array in arrays.items()}

    yield by_client(client_column, ids, take)


def _parquet(path: str | os.PathLike[str]) -> Any:
    check_file(path)
    require("pyarrow", "data")
    library: Any = require("pandas", "data")
    try:
        return library.read_parquet(path, engine="pyarrow")
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{os.fspath(path)} cannot be read as parquet: {reason}; fetch the file anew."
        ) from None


def _dense(name: str, values: np.ndarray) -> np.ndarray:
    """An array in place of an array of arrays or lists."""
    if values.dtype != object or not values.size:
        return values
    if not isinstance(values[0], (list, np.ndarray)):
        return values
    try:
        return np.stack([_dense(name, np.asarray(value)) for value in values])
    except ValueError:
        raise ValueError(f"feature {name!r} has rows of different lengths; pad them") from None
