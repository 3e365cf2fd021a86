"""What the partitioners share: checks, and the way from counts to rows."""

from typing import Any

import numpy as np
from jax.typing import ArrayLike

from fedjax_lite import _validate

_MAX_CONCENTRATION = 1e15  # Beyond, the variates that NumPy divides lose their last digits.


def generator(seed: int | np.random.Generator) -> np.random.Generator:
    """The generator itself, or a new one from a seed."""
    if isinstance(seed, np.random.Generator):
        return seed
    return np.random.default_rng(_validate.integer("seed", seed, minimum=0))


def column(name: str, values: Any) -> np.ndarray:
    """`values` as an array with one entry per row; there is at least one row."""
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}; pass one value per row, [rows].")
    kinds = {type(value).__name__ for value in values} if array.dtype.kind in "OU" else set()
    if len(kinds) > 1:
        raise ValueError(f"{name} mixes the types {sorted(kinds)}; pass values of one type.")
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise ValueError(f"{name} holds NaN; drop the rows that have none, or give them one.")
    return array


def classes(name: str, values: Any) -> np.ndarray:
    """`values` as an array with the class of each row.

    Raises:
      ValueError: They are real values, each of which would be a class; whole numbers in floats
        are not.
    """
    array = column(name, values)
    if array.dtype.kind == "f" and (fractions := array[array != np.rint(array)]).size:
        raise ValueError(
            f"{name} holds real values such as {fractions[0]:g}, each of which would be a class;"
            " use fl.partition.continuous, or pass bins, such as np.digitize(values,"
            " np.quantile(values, [0.25, 0.5, 0.75]))."
        )
    return array


def clients(num_clients: Any, num_examples: int) -> int:
    """`num_clients`, checked: each client is to have an example."""
    num_clients = _validate.integer("num_clients", num_clients, minimum=1)
    if num_clients > num_examples:
        raise ValueError(
            f"num_clients is {num_clients}, but there are only {num_examples} rows; lower it."
        )
    return num_clients


def concentration(name: str, alpha: ArrayLike, size: int) -> np.ndarray:
    """`alpha` as `[size]` concentrations of a Dirichlet distribution."""
    array = np.asarray(alpha, float)
    if array.shape not in ((), (size,)) or not ((array > 0) & (array <= _MAX_CONCENTRATION)).all():
        raise ValueError(
            f"{name} is {alpha}; choose a positive concentration, at most {_MAX_CONCENTRATION:g},"
            f" or {size} of them."
        )
    return np.broadcast_to(array, size)


def client_sizes(sizes: ArrayLike | None, num_clients: Any, num_examples: int) -> np.ndarray:
    """`sizes` as `[clients]` integers that add up to `num_examples`; nearly equal if left out."""
    if sizes is None:
        num_clients = clients(num_clients, num_examples)
        return num_examples // num_clients + (np.arange(num_clients) < num_examples % num_clients)
    array = np.asarray(sizes)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu" or array.min() < 0:
        raise ValueError(f"sizes is {sizes}; pass the number of examples of each client.")
    if array.size != num_clients:
        raise ValueError(
            f"sizes has {array.size} entries for num_clients={num_clients}; pass one per client."
        )
    if array.sum() != num_examples:
        raise ValueError(
            f"sizes add up to {array.sum()}, but there are {num_examples} rows; make them agree."
        )
    return array.astype(np.int64)


def deal(class_index: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Deals out the shuffled rows of each class.

    Args:
      class_index: `[rows]`, the class of each row, from 0.
      counts: `[clients, classes]`, how many rows of each class a client gets. Each column
        adds up to the rows of the class.
      rng: Decides which rows.

    Returns:
      For each client, the sorted indices of its rows.
    """
    num_clients, num_classes = counts.shape
    order = rng.permutation(class_index.size)
    order = order[np.argsort(class_index[order], kind="stable")]
    owner = np.empty(class_index.size, np.int64)
    owner[order] = np.repeat(np.tile(np.arange(num_clients), num_classes), counts.T.ravel())
    return by_owner(owner, num_clients)


def by_owner(owner: np.ndarray, num_clients: int) -> list[np.ndarray]:
    """For each client, the sorted indices of the rows that it owns."""
    ends = np.cumsum(np.bincount(owner, minlength=num_clients))
    return np.split(np.argsort(owner, kind="stable"), ends[:-1])
