"""Many small arrays as few: what is done once per array, and costs the same for a small one."""

import collections
import math

import jax
import jax.numpy as jnp

from fedjax_lite.base import PyTree


def pack(tree: PyTree, num_axes: int = 0) -> list[jax.Array]:
    """The arrays of each dtype side by side, `[..., entries]`.

    Args:
      tree: Arrays that share their leading axes.
      num_axes: How many leading axes stay.
    """
    groups = collections.defaultdict(list)
    for x in jax.tree.leaves(tree):
        groups[x.dtype].append(x.reshape(*x.shape[:num_axes], -1))
    return [jnp.concatenate(arrays, axis=-1) for arrays in groups.values()]


def unpack(packed: list[jax.Array], like: PyTree, num_axes: int = 0) -> PyTree:
    """The arrays that `pack(like, num_axes)` laid side by side; other leading axes may lead."""
    rest = dict(zip(dict.fromkeys(x.dtype for x in jax.tree.leaves(like)), packed, strict=True))

    def take(x: jax.Array) -> jax.Array:
        shape, array = x.shape[num_axes:], rest[x.dtype]
        taken, rest[x.dtype] = jnp.split(array, [math.prod(shape)], axis=-1)
        return taken.reshape(*array.shape[:-1], *shape)

    return jax.tree.map(take, like)
