"""Sums of many terms: dtypes that can hold them, and loops that a CPU runs fast."""

import jax
import jax.numpy as jnp

from fedjax_lite.base import PyTree


def widen(tree: PyTree) -> PyTree:
    """The arrays in float32, or as they are where they are wider."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def squared_norm(tree: PyTree) -> jax.Array:
    """The sum of the squares of all entries, at least in float32."""
    return jnp.asarray(sum(_sum_of_squares(x) for x in jax.tree.leaves(widen(tree))))


def _sum_of_squares(x: jax.Array, num_slabs: int = 8) -> jax.Array:
    def plain(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.real(x * jnp.conj(x)))

    width = x.size // num_slabs
    if width < 512:
        return plain(x)
    # A CPU adds one entry after the other to a sum, but slabs side by side as vectors: the time
    # falls to that of reading the array once.
    flat = x.reshape(-1)
    slabs = flat[: width * num_slabs].reshape(num_slabs, width)
    column = sum(jnp.real(slab * jnp.conj(slab)) for slab in slabs)
    # The select changes nothing. Without it, XLA:CPU would leave the squares to YNNPACK together
    # with their sum, and copy the slabs for it.
    column = jnp.where(jnp.isnan(column), jnp.nan, column)
    return jnp.sum(column) + plain(flat[width * num_slabs :])
