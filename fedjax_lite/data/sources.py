"""What a file of any format is to the rest: clients, one at a time."""

import functools
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from fedjax_lite.data.checks import Transform
from fedjax_lite.data.dataset import FederatedDataset

MAX_CLIENT_BYTES = 2**30
"""More than any client of a known data set has; a damaged or hostile file may claim anything."""

Features = dict[str, np.ndarray]


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
    """Features of one client; errors name it."""
    try:
        features = load()
        if not features:
            raise ValueError("it has no features")
        return features if transform is None else dict(transform(features))
    except ValueError as error:
        raise ValueError(f"client {client_id!r}: {error}") from None


def collect(
    path: str | os.PathLike[str], source: Source, transform: Transform | None
) -> FederatedDataset:
    """All clients of a source, in memory; errors name the file."""

    def clients() -> Iterator[tuple[Hashable, Features]]:
        for client_id, load in source.clients:
            yield client_id, loaded(client_id, load, transform)

    try:
        return FederatedDataset.from_clients(clients())
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None


def by_client(ids: np.ndarray, take: Callable[[np.ndarray], Features]) -> Source:
    """Groups the rows of a table.

    Args:
      ids: `[rows]`, the client of each row.
      take: From the indices of some rows to their features.

    Returns:
      The clients sorted by id, the rows of each in their order.
    """
    if len(ids) == 0:
        raise ValueError("the table has no rows; pass one with at least one example.")
    names, owner = np.unique(ids, return_inverse=True)
    rows = np.split(np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner))[:-1])
    clients = zip(names.tolist(), rows, strict=True)
    return Source(((name, functools.partial(take, part)) for name, part in clients), len(names))
