"""Which rows of a stack count, how many of them may be hostile, and which clients are."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Stack
from fedjax_lite.xla import random
from fedjax_lite.xla.precision import root, widen


class Counted(NamedTuple):
    """The rows of a stack that count: with a weight, and a norm that is finite.

    Attributes:
      rows: `[rows]`, bool, which they are.
      number: How many they are, int32.
      norms: `[rows]`, the L2 norms of their updates; 0 of others.
    """

    rows: jax.Array
    number: jax.Array
    norms: jax.Array


def count_rows(stack: Stack) -> Counted:
    """The rows of a stack that count."""
    squared = stack.total(jnp.asarray(sum(jnp.square(widen(x)).sum(1) for x in stack.updates)))
    rows = (stack.weights > 0) & jnp.isfinite(squared)
    return Counted(rows, rows.sum(dtype=jnp.int32), root(jnp.where(rows, squared, 0)))


def check_tolerance(hostile: Any, below: float = 0.5) -> Any:
    """The argument `hostile` of a rule: a share of the clients that count, or a number of them.

    Raises:
      ValueError: It is negative, or a share that is not below what the rule can stand.
    """
    if isinstance(hostile, int | np.integer):
        return _validate.integer("hostile", hostile, minimum=0)
    _validate.number("hostile", hostile)
    if not isinstance(hostile, jax.core.Tracer) and hostile >= below:
        raise ValueError(
            f"hostile is {hostile!r}; choose a share below {below:g}, or a number of clients, an"
            " integer."
        )
    return hostile


def num_tolerated(hostile: Any, counted: Counted, per: int = 2, beyond: int = 1) -> jax.Array:
    """The number f of hostile clients that a rule reckons with, such that `n >= per f + beyond`.

    With n the number of rows that count: a share of them, rounded down, or the number given; or the
    largest one that n rows can stand, if that is less.

    Raises:
      ValueError: A number that not even a full cohort can stand.
    """
    most = (len(counted.rows) - beyond) // per
    if isinstance(hostile, int):
        if hostile > most:
            raise ValueError(
                f"hostile is {hostile}, and of {len(counted.rows)} rows at most {max(most, 0)} may"
                " be; choose fewer, or a larger cohort."
            )
        wanted = jnp.int32(hostile)
    else:
        # A product of rounded numbers may fall just short of a whole one.
        wanted = jnp.floor(hostile * counted.number * (1 + 1e-6)).astype(jnp.int32)
    return jnp.clip(wanted, 0, jnp.maximum((counted.number - beyond) // per, 0))


def membership(hostile: Any, seed: int = 0) -> Callable[[jax.Array], jax.Array]:
    """Whether clients are hostile, by their ids; see `hostile_clients`."""
    seed = _validate.integer("seed", seed, minimum=0)
    if isinstance(hostile, int | np.integer):
        first = _validate.integer("hostile", hostile, minimum=0)
        return lambda ids: (ids >= 0) & (ids < first)
    if np.ndim(hostile) == 0:
        _validate.number("hostile", hostile, maximum=1)

        def is_drawn(ids: jax.Array) -> jax.Array:
            drawn = numbers_of(jax.random.key(seed), ids).astype(float)
            return (ids >= 0) & (drawn < 2.0**32 * hostile)

        return is_drawn
    listed = hostile if isinstance(hostile, jax.Array) else np.asarray(hostile)
    is_concrete = isinstance(listed, np.ndarray)
    is_integer = listed.dtype.kind in "iu" or listed.size == 0
    if listed.ndim != 1 or not is_integer or (is_concrete and (listed < 0).any()):
        raise ValueError(
            f"hostile is {hostile!r}; pass a share such as 0.2, the number of hostile clients, or a"
            " list of their ids."
        )
    return lambda ids: (ids >= 0) & (ids[..., None] == jnp.asarray(listed)).any(-1)


def numbers_of(key: jax.Array, ids: jax.Array) -> jax.Array:
    """A random number of 32 bits for each client, by its id."""
    mixed = random.fold_in_pair(key, 0, 0)  # That of a seed is the seed itself.
    return jax.random.key_data(random.fold_in_pair(mixed, 0, ids))[..., 1]


def hostile_clients(
    hostile: ArrayLike | Sequence[int], num_clients: int, *, seed: int = 0
) -> np.ndarray:
    """The ids of the hostile clients of a population, as attacks choose them.

    Whether a client is hostile depends on its id and the seed alone, and not on the round, the
    cohort or the size of the population.

    Args:
      hostile: Who is hostile: a share, such as 0.2, of clients that are drawn one by one, so that
        the larger of two shares has those of the smaller one, too; or an integer, so many, those
        with the smallest ids; or a list of ids, positions in the population.
      num_clients: Size of the population.
      seed: Determines who is drawn.

    Returns:
      The ids `[hostile clients]`, in ascending order.

    Raises:
      ValueError: `hostile` is none of these, or out of range.

    >>> hostile_clients(3, 10).tolist(), hostile_clients([4, 2], 10).tolist()
    ([0, 1, 2], [2, 4])
    >>> set(hostile_clients(0.1, 50)) <= set(hostile_clients(0.2, 50))
    True
    """
    num_clients = _validate.integer("num_clients", num_clients, minimum=0)
    is_hostile = jax.jit(membership(hostile, seed))
    return np.flatnonzero(is_hostile(np.arange(num_clients, dtype=np.int32)))
