"""What a file of any format is to the rest: clients, one at a time."""

import functools
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedjax_lite.data import checks
from fedjax_lite.data.checks import Transform
from fedjax_lite.data.dataset import FederatedDataset

MAX_CLIENT_BYTES = 2**30
"""More than any client of a known data set has; a damaged or hostile file may claim anything."""

Features = dict[str, np.ndarray]
Columns = Mapping[str, str | Sequence[str]]
"""Features by name, each one that a file has or, for a vector, several; "*" is all others."""


class Source(NamedTuple):
    """Clients of a file that is open.

    Attributes:
      clients: Client ids, each with a function that loads the client's features. Ids follow one
        another without the cost of loading, so that a conversion can take up where it was.
      num_clients: Their number, if the file tells.
    """

    clients: Iterable[tuple[Hashable, Callable[[], Features]]]
    num_clients: int | None = None


def loaded(
    client_id: Hashable, load: Callable[[], Features], transform: Transform | None
) -> Features:
    """Features of one client; errors name it. What has no rows is not transformed but left out."""
    try:
        features = load()
        if not checks.has_rows(features):
            return {}
        return features if transform is None else dict(transform(features))
    except ValueError as error:
        raise ValueError(f"client {client_id!r}: {error}") from None


def chosen(columns: Columns | None, transform: Transform | None) -> Transform | None:
    """`transform` of the features that columns make up.

    Raises:
      TypeError: `columns` is no dict of names.
    """
    if columns is None:
        return transform
    if not isinstance(columns, Mapping) or not all(
        isinstance(of, (str, list, tuple)) and all(isinstance(part, str) for part in of)
        for of in columns.values()
    ):
        raise TypeError(f'columns is {columns!r}; write it as {{"x": ["a", "b"], "y": "label"}}.')
    named = _named(columns)

    def make(features: Features, of: str | Sequence[str]) -> np.ndarray:
        if isinstance(of, str) and of != "*":
            return features[of]
        others = [name for name in features if name not in named]
        parts = [one for part in of for one in (others if part == "*" else [part])]
        if not parts:
            raise ValueError(f"no column is left for {of!r} among {list(features)}")
        return np.stack([features[part] for part in parts], axis=1)

    def choose(features: Features) -> Mapping[str, np.ndarray]:
        needed(columns, list(features))
        made = {name: make(features, of) for name, of in columns.items()}
        return made if transform is None else transform(made)

    return choose


def _named(columns: Columns) -> set[str]:
    return {part for of in columns.values() for part in ([of] if isinstance(of, str) else of)}


def needed(columns: Columns | None, names: Sequence[str]) -> list[str]:
    """Which columns of a table are to be read: not all may be numbers.

    Raises:
      ValueError: One is not there.
    """
    if columns is None:
        return list(names)
    named = _named(columns)
    if unknown := named - {"*", *names}:
        raise ValueError(f"it has no column {min(unknown)!r}; choose among {list(names)}")
    return [name for name in names if "*" in named or name in named]


def parse_columns(texts: Iterable[str]) -> Columns:
    """Columns from `x=a,b`, `y=label` and so on; `x=a,` is a vector of one.

    Raises:
      ValueError: A text is none of these.
    """
    columns: dict[str, str | Sequence[str]] = {}
    for text in texts:
        name, _, listed = text.partition("=")
        parts = [part for part in listed.split(",") if part]
        if not name or not parts or name in columns:
            raise ValueError(f"columns is {text!r}; write each feature once, as x=a,b or y=label.")
        columns[name] = parts if "," in listed else listed
    return columns


def name_of(source: Any) -> str:
    """What errors call a source: its path, or else its type."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return f"the {type(source).__name__}"


def check_file(path: str | os.PathLike[str]) -> None:
    """Refuses what is no file, before a library says so in its own words."""
    if not Path(path).is_file():
        what = (
            "is a folder; pass a file" if Path(path).is_dir() else "does not exist; check the path"
        )
        raise ValueError(f"{os.fspath(path)} {what}.")


def collect(path: Any, source: Source, transform: Transform | None) -> FederatedDataset:
    """All clients of a source, in memory; errors name the file."""

    def clients() -> Iterator[tuple[Hashable, Features]]:
        for client_id, load in source.clients:
            yield client_id, loaded(client_id, load, transform)

    try:
        return FederatedDataset.from_clients(clients())
    except ValueError as error:
        raise ValueError(f"{name_of(path)}: {error}") from None


def by_client(column: str, ids: np.ndarray, take: Callable[[np.ndarray], Features]) -> Source:
    """Groups the rows of a table.

    Args:
      column: What the table calls the ids.
      ids: `[rows]`, the client of each row.
      take: From the indices of some rows to their features.

    Returns:
      The clients sorted by id, the rows of each in their order.
    """
    if len(ids) == 0:
        raise ValueError("the table has no rows; pass one with at least one example.")
    if ids.ndim != 1:
        raise ValueError(f"column {column!r} has shape {ids.shape}; name one client for each row.")
    checks.every_row_named(f"column {column!r}", ids)
    names, owner = np.unique(ids, return_inverse=True)
    rows = np.split(np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner))[:-1])
    clients = zip(names.tolist(), rows, strict=True)

    def load(part: np.ndarray) -> Features:
        if not (features := take(part)):
            raise ValueError("it has no features")
        return features

    return Source(((name, functools.partial(load, part)) for name, part in clients), len(names))
