"""Updates as one vector, in units in which no square leaves its dtype."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.base import Guarantees, Message, PyTree, UpdateTransform
from fedjax_lite.updates.pipeline import encoded, stateless, unmasked
from fedjax_lite.xla import random
from fedjax_lite.xla.packing import ravel
from fedjax_lite.xla.precision import reduced, widen


def unit_of(largest: jax.Array) -> jax.Array:
    """A power of two near a magnitude, to divide by without any rounding.

    NaN of NaN or an infinity: whatever is multiplied with it is NaN.
    """
    info = jnp.finfo(largest.dtype)
    # Up to what has an inverse that is not subnormal.
    bounded = jnp.clip(largest, info.tiny, 2.0 ** (info.maxexp - 2))
    power = jax.lax.reduce_precision(bounded, exponent_bits=info.nexp, mantissa_bits=0)
    return jnp.where(jnp.isfinite(largest), power, jnp.nan)


def vector_of(tree: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """All entries, at least in float32, and what makes a tree of such a vector again."""
    flat, unravel = ravel(tree)
    return widen(flat), lambda vector: unravel(vector.astype(flat.dtype))


def compressor(
    name: str,
    compress: Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]],
    *,
    per_array: bool = False,
    shrinks: bool = False,
) -> UpdateTransform:
    """A transform that does to updates what a function does to vectors.

    Args:
      name: Of the transform.
      compress: `compress(key, vector) -> (vector, bits)`, for a vector that is not empty, at least
        in float32; twice the vector must become twice as large.
      per_array: Whether each array is a vector of its own, and not the whole update one.
      shrinks: Whether no vector becomes longer.

    Returns:
      The `UpdateTransform`, which reports `bits_up`. What holds NaN or an infinity becomes NaN;
      what is empty takes no bits.
    """

    def one(key: jax.Array, tree: PyTree) -> tuple[PyTree, Any]:
        vector, restore = vector_of(tree)
        if not vector.size:
            return tree, 0
        unit = unit_of(reduced(jnp.abs(vector), jnp.maximum))
        sent, bits = compress(key, vector * (1 / unit))
        return restore(unit * sent), bits

    return encoder(name, one, per_array=per_array, shrinks=shrinks)


def encoder(
    name: str,
    encode: Callable[[jax.Array, PyTree], tuple[PyTree, Any]],
    *,
    per_array: bool,
    shrinks: bool = False,
) -> UpdateTransform:
    """A transform that reports `bits_up`, by `encode(key, update) -> (update, bits)`.

    Args:
      name: Of the transform.
      encode: What is decoded again, and the bits between; of the update, or of each of its arrays.
      per_array: Whether of each.
      shrinks: Whether no update becomes longer.
    """

    def client(key: jax.Array, message: Message) -> Message:
        update, bits = (map_arrays if per_array else _whole)(encode, key, message.update)
        return encoded(message, update, bits)

    return stateless(client, lambda before: bounded(name, before, shrinks=shrinks))


def map_arrays(
    encode: Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]], key: jax.Array, tree: PyTree
) -> tuple[PyTree, Any]:
    """What `encode(key, array) -> (array, bits)` makes of each array, and the bits in all."""
    leaves, structure = jax.tree.flatten(tree)
    pairs = [encode(random.fold_in_pair(key, i, 0), x) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, [x for x, _ in pairs]), sum(bits for _, bits in pairs)


def _whole(encode: Callable[..., Any], key: jax.Array, tree: PyTree) -> Any:
    return encode(key, tree)


def bounded(name: str, before: Guarantees, *, shrinks: bool) -> Guarantees:
    """What is known after a transform of single updates, which may make them longer or not."""
    before = unmasked(name, before)
    return before if shrinks else before._replace(sensitivity=None)


def count_of(share: float, size: int) -> int:
    """A number of entries, from 1 to all: the integer itself, or that share of them."""
    number = share if isinstance(share, int) else round(share * size)
    return min(max(number, 1), size)


def check_count(name: str, share: float) -> None:
    """Refuses what is neither an integer above 0 nor a share up to 1."""
    if isinstance(share, int):
        _validate.integer(name, share, minimum=1)
    else:
        _validate.number(name, share, positive=True, maximum=1)


def index_bits(number: int) -> int:
    """How many bits tell one of so many things."""
    return math.ceil(math.log2(number))
