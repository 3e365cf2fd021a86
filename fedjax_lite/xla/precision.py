"""Sums of many terms: dtypes that can hold them, and loops that a CPU runs fast."""

import functools

import jax
import jax.numpy as jnp

from fedjax_lite.base import PyTree
from fedjax_lite.xla.packing import pack

_NUM_SLABS = 8  # So many sums side by side take 14 us for 784 x 200 entries, a single one takes 38.
_SMALL = 2**14  # Biases and last layers, whose sums would each be compiled apart.


def widen(tree: PyTree) -> PyTree:
    """The arrays in float32, or as they are where they are wider."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def squared_norm(tree: PyTree) -> jax.Array:
    """The sum of the squares of all entries, at least in float32."""
    leaves = jax.tree.leaves(widen(tree))
    # The small ones as one: each sum takes a while to compile, however short, but for that of an
    # array that is there, which XLA:CPU leaves to YNNPACK.
    large = [reduced(_squares(x), jnp.add) for x in leaves if x.size > _SMALL]
    small = [_squares(x).sum() for x in pack([x for x in leaves if x.size <= _SMALL])]
    return jnp.asarray(sum([*large, *small]))


def root(x: jax.Array) -> jax.Array:
    """The square root, with a gradient of zero where it is zero."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), x)


@functools.partial(jax.jit, static_argnames="by")  # Traced once for each size, not for each use.
def reduced(x: jax.Array, by: jnp.ufunc) -> jax.Array:
    """The sum of all entries, by `jnp.add`, or the largest one, by `jnp.maximum`, and so on."""
    x = x.reshape(-1)
    width = x.size // _NUM_SLABS
    if width < 512:
        return by.reduce(x)

    # A CPU adds one entry after the other to a sum, but slabs side by side as vectors: the time
    # falls to that of reading the array once.
    def in_slabs(x: jax.Array) -> jax.Array:
        ends = range(width, x.size + 1, width)
        slabs = [jax.lax.slice(x, (end - width,), (end,)) for end in ends[:_NUM_SLABS]]
        column = functools.reduce(by, slabs)
        # The select changes nothing. Without it, XLA:CPU would leave the terms to YNNPACK together
        # with their sum, and copy the slabs for it.
        result = by.reduce(jnp.where(jnp.isnan(column), jnp.nan, column))
        if rest := x.size % _NUM_SLABS:
            result = by(result, by.reduce(jax.lax.slice(x, (x.size - rest,), (x.size,))))
        return result

    return jax.lax.platform_dependent(x, cpu=in_slabs, default=by.reduce)


def _squares(x: jax.Array) -> jax.Array:
    return jnp.square(x) if jnp.isrealobj(x) else jnp.square(x.real) + jnp.square(x.imag)
