"""Distances between the updates of a stack, over all of their arrays together."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedjax_lite.base import Stack
from fedjax_lite.updates.hostile import Counted
from fedjax_lite.xla.precision import root, widen

# What accelerators take for a product of float32 by default, with digits for three.
_PRECISE = jax.lax.Precision.HIGHEST


def squared_distances(stack: Stack, counted: Counted) -> jax.Array:
    r"""Squared L2 distances $\|x_i - x_j\|^2$ between updates, `[rows, rows]`.

    By the inner products of what is left of the updates without a common centre: of large updates
    that differ by little, the products of the updates themselves would not have the digits. Their
    error is that of the squares of a few typical norms: a hostile row cannot blow it up.

    Returns:
      Zero on the diagonal; infinity to and from rows that do not count.
    """
    rows, number, norms = jax.lax.stop_gradient(counted)  # What is selected has none.
    # The centre is the mean. Rows beyond ten times the median norm are scaled down to that for it.
    middle = jnp.sort(jnp.where(rows, norms, jnp.inf))[(jnp.maximum(number, 1) - 1) // 2]
    factors = jnp.where(rows, shrinkage(norms, 10 * middle), 0)

    def inner_products(x: jax.Array) -> jax.Array:
        x = jnp.where(rows[:, None], widen(x), 0)
        centred = x - mix(factors, x) / jnp.maximum(number, 1)
        return jnp.matmul(centred, centred.T, precision=_PRECISE)

    updates = jax.lax.stop_gradient(stack.updates)
    products = stack.total(jnp.asarray(sum(map(inner_products, updates))))
    squared = jnp.diag(products)
    distances = jnp.maximum(squared[:, None] + squared - 2 * products, 0)
    # Squares that overflow leave infinity, or infinity minus infinity.
    known = rows[:, None] & rows & ~jnp.isnan(distances)
    return jnp.fill_diagonal(jnp.where(known, distances, jnp.inf), 0, inplace=False)


def distances_to(stack: Stack, point: list[jax.Array]) -> jax.Array:
    r"""L2 distances $\|x_i - v\|$ of updates to a point, `[rows]`."""
    squares = [jnp.square(widen(x) - v).sum(1) for x, v in zip(stack.updates, point, strict=True)]
    return root(stack.total(jnp.asarray(sum(squares))))


def shrinkage(norms: jax.Array, max_norm: ArrayLike) -> jax.Array:
    """The factors that bring norms down to a bound; 1 for those below."""
    is_above = norms > max_norm
    return jnp.where(is_above, max_norm / jnp.where(is_above, norms, 1), 1)


def mix(factors: jax.Array, x: jax.Array) -> jax.Array:
    """Sums of rows `[rows, coordinates]` times factors `[rows]`, or `[sums, rows]`."""
    return jnp.matmul(factors.astype(x.dtype), x, precision=_PRECISE)


def mean_of(selected: jax.Array, x: jax.Array) -> jax.Array:
    """The mean of some of the rows `[rows, coordinates]`, in their dtype; zero of none."""
    total = jnp.where(selected[:, None], widen(x), 0).sum(0)
    return (total / jnp.maximum(selected.sum(), 1)).astype(x.dtype)


def by_score(scores: jax.Array, stack: Stack, rows: jax.Array) -> jax.Array:
    """Rows in the order of their scores, ties by client id; those that do not count come last."""
    return jnp.lexsort((stack.client_ids, scores, ~rows))
