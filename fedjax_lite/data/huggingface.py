"""Data sets of Hugging Face's `datasets`, with a column that names the client."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_lite._extras import require
from fedjax_lite.data import checks
from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.data.sources import Columns, Source, by_client, chosen, collect, needed


def read_huggingface(
    dataset: Any,
    *,
    client_column: str = "client_id",
    columns: Columns | None = None,
    transform: checks.Transform | None = None,
) -> FederatedDataset:
    """Reads a `datasets.Dataset`, or a folder that its `save_to_disk` wrote.

    Args:
      dataset: The data set or the folder. It is memory-mapped; nothing is downloaded.
      client_column: The column that names the client of each row, by integers or strings.
      columns: Features by name, as in `read_csv`; if left out, all other columns are features.
      transform: Applied to the features of each client, `[rows, ...]` by name; it may change
        the number of rows, and must encode text.

    Returns:
      The clients sorted by id; the rows of a client in their order.

    Raises:
      ValueError: The folder is damaged or holds several splits, the column is missing or has
        missing values.
      ImportError: datasets is missing.
    """
    transform = chosen(columns, transform)
    with huggingface(dataset, client_column=client_column, columns=columns) as source:
        return collect(dataset, source, transform)


@contextlib.contextmanager
def huggingface(
    dataset: Any, *, client_column: str = "client_id", columns: Columns | None = None
) -> Iterator[Source]:
    """The source of `read_huggingface`: the columns that are needed, each a feature."""
    if isinstance(dataset, (str, os.PathLike)):
        dataset = _open(Path(dataset))
    if client_column not in dataset.column_names:
        raise ValueError(
            f"client_column is {client_column!r}, and the columns are {dataset.column_names};"
            " choose one of them."
        )
    column = dataset.with_format("arrow")[:][client_column]
    others = [name for name in dataset.column_names if name != client_column]
    features = dataset.select_columns(needed(columns, others)).with_format("numpy")
    yield by_client(
        client_column,
        # Integers beside nulls would become floats, and the ids of other rows with them.
        column.to_numpy(zero_copy_only=False)
        if not column.null_count
        else np.array(column.to_pylist(), object),
        lambda rows: {name: np.asarray(feature) for name, feature in features[rows].items()},
    )


def _open(folder: Path) -> Any:
    datasets = require("datasets", "data")
    if (folder / "dataset_dict.json").exists():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise ValueError(f"{folder} holds the splits {splits}; pass the folder of one of them.")
    try:
        state = json.loads((folder / "state.json").read_bytes())
        for file in state["_data_files"]:
            if Path(file["filename"]).name != file["filename"]:
                raise ValueError(f"its state.json names {file['filename']!r}, outside of it")
        return datasets.load_from_disk(str(folder))
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder} is no folder of save_to_disk of Hugging Face's datasets: {error}."
        ) from None
