"""Splits along a column of the data: a natural client id, or a real number."""

import numpy as np
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.data.partition._deal import by_owner, clients, column, generator


def natural(client_ids: ArrayLike) -> list[np.ndarray]:
    """One client per distinct value, in sorted order (that of `np.unique`).

    Args:
      client_ids: `[rows]`, numbers or strings: the author, the writer, the device.

    Returns:
      For each client, the sorted indices of its rows. Each row has exactly one client.

    Raises:
      ValueError: `client_ids` is not one value per row.

    >>> [rows.tolist() for rows in natural(["b", "a", "b"])]
    [[1], [0, 2]]
    """
    names, owner = np.unique(column("client_ids", client_ids), return_inverse=True)
    return by_owner(owner, names.size)


def grouped(
    client_ids: ArrayLike, group_size: int, *, seed: int | np.random.Generator
) -> list[np.ndarray]:
    """Groups of natural clients: from users to organisations of users.

    Args:
      client_ids: `[rows]`, numbers or strings, the natural client of each row.
      group_size: Number of natural clients in a group. The last group has the remainder.
      seed: Seed, or the generator to draw from: decides who is grouped with whom.

    Returns:
      For each group, the sorted indices of its rows. Each row has exactly one group.

    Raises:
      ValueError: An argument is out of range.

    >>> [rows.size for rows in grouped(["a", "b", "c", "d", "e"], 2, seed=0)]
    [2, 2, 1]
    """
    names, owner = np.unique(column("client_ids", client_ids), return_inverse=True)
    group_size = _validate.integer("group_size", group_size, minimum=1)
    group = generator(seed).permutation(names.size) // group_size
    return by_owner(group[owner], int(group.max()) + 1)


def continuous(
    values: ArrayLike, num_clients: int, *, strictness: float, seed: int | np.random.Generator
) -> list[np.ndarray]:
    r"""Skew along a real-valued column, such as age, income or brightness.

    Sorts the rows by $s z + (1 - s) \varepsilon$, where $z$ is the column with mean 0 and
    standard deviation 1 and $\varepsilon \sim N(0, 1)$, and cuts them into blocks whose sizes
    differ by one at most.

    Source: Flower Datasets, `ContinuousPartitioner`.

    Args:
      values: `[rows]`, real numbers.
      num_clients: Number of clients.
      strictness: $s$, from 0 (IID) to 1 (sorted).
      seed: Seed, or the generator to draw from.

    Returns:
      For each client, the sorted indices of its rows, from the lowest values to the highest.
      Each row has exactly one client.

    Raises:
      ValueError: An argument is out of range, or all values are the same.

    >>> [rows.tolist() for rows in continuous([3.0, 9.0, 1.0, 5.0], 2, strictness=1.0, seed=0)]
    [[0, 2], [1, 3]]
    """
    values = column("values", values).astype(float)
    num_clients = clients(num_clients, values.size)
    if not 0 <= strictness <= 1:
        raise ValueError(f"strictness is {strictness}; choose a number from 0 to 1.")
    deviation = values.std()
    if not 0 < deviation < np.inf:
        raise ValueError(
            f"values have the standard deviation {deviation}; pass finite numbers that differ, or"
            " use partition.iid."
        )
    noise = generator(seed).standard_normal(values.size)
    score = strictness * (values - values.mean()) / deviation + (1 - strictness) * noise
    blocks = np.array_split(np.argsort(score, kind="stable"), num_clients)
    return [np.sort(block) for block in blocks]
