"""A data set on disk, as an argument of commands."""

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from fedjax_lite.cli.errors import UsageError, usage_errors
from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.data.formats import read
from fedjax_lite.data.sources import parse_columns


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set, and how to read it.

    Attributes:
      source: A folder of .npy files that this program wrote; a file of SQLite (FedJAX, TensorFlow
        Federated), HDF5, LEAF's JSON, .npz, parquet or CSV; a folder of LEAF, or of Hugging Face's
        save_to_disk; IDX files, such as those of MNIST, or a folder of them.
      format: csv, fedjax_sqlite, huggingface, idx, leaf, npz, parquet, tff_hdf5 or tff_sqlite;
        found out from the content by default.
      split: The split to read, if there are several (idx, tff_sqlite).
      client_column: The column that names the client (csv, huggingface, npz, parquet).
      columns: Features, and the columns that make them up: x=a,b y=label, where x=a, is a vector
        of one and x=* one of all columns that are not named. By default each is a feature.
      shapes: Shapes of features, such as pixels=28,28 (tff_sqlite).
    """

    source: Positional[Path]
    format: str | None = dataclasses.field(default=None, kw_only=True)
    split: str | None = dataclasses.field(default=None, kw_only=True)
    client_column: str | None = dataclasses.field(default=None, kw_only=True)
    columns: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)
    shapes: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    def options(self) -> dict[str, Any]:
        """The options that are set, as `fl.data.read` takes them."""
        given = {"split": self.split, "client_column": self.client_column}
        options: dict[str, Any] = {name: value for name, value in given.items() if value}
        if self.columns:
            try:
                options["columns"] = parse_columns(self.columns)
            except ValueError as error:
                raise UsageError(f"--{error}") from None
        if self.shapes:
            options["shapes"] = dict(map(_shape, self.shapes))
        return options


def load(source: Source) -> FederatedDataset:
    """The data set.

    Raises:
      UsageError: It cannot be read.
    """
    with usage_errors():
        return read(source.source, source.format, **source.options())


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    try:
        name, sizes = text.split("=")
        return name, tuple(int(size) for size in sizes.split(",") if size)
    except ValueError:
        raise UsageError(f"--shapes is {text!r}; write it as pixels=28,28") from None
