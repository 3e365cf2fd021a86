"""Many small arrays as few: what is done once per array, and costs the same for a small one."""

import collections
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fedjax_lite.base import PyTree

_SHORT = 512  # Entries, over which a loop runs for less than a microsecond.


@jax.jit  # Traced once, not once for each use.
def concatenate(arrays: Sequence[jax.Array]) -> jax.Array:
    """Arrays side by side, along their last axis.

    XLA:CPU runs through the parts of a concatenation in loops that are all as long as the longest
    part, and masks what is beyond the end of a shorter one. That is six times the work for two
    matrices and four biases; and a hundred times, in some runs, where it is memory that the process
    does not have. Hence one part after the other, into one array, but for parts so short that to
    compile a loop for each takes longer than all of its runs.
    """

    def one_by_one() -> jax.Array:
        parts: list[jax.Array] = []
        for is_short, group in itertools.groupby(arrays, lambda x: x.size <= _SHORT):
            some = list(group)
            parts += [jnp.concatenate(some, axis=-1)] if is_short else some
        if len(parts) == 1:
            return parts[0]
        ends = list(itertools.accumulate(x.shape[-1] for x in parts))
        zeros = jnp.zeros((*parts[0].shape[:-1], ends[-1]), parts[0].dtype)
        # Without the barrier, the first part would be padded, in four times the time.
        whole = jax.lax.optimization_barrier(zeros)
        for x, end in zip(parts, ends, strict=True):
            start = end - x.shape[-1]
            whole = jax.lax.dynamic_update_slice_in_dim(whole, x, start, axis=-1)
        return whole

    if len(arrays) == 1:
        return arrays[0]
    return jax.lax.platform_dependent(
        cpu=one_by_one, default=lambda: jnp.concatenate(arrays, axis=-1)
    )


def ravel(tree: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """`ravel_pytree`, with the arrays one after the other."""
    leaves = jax.tree.leaves(tree)
    flat, unravel = ravel_pytree(tree)
    if not leaves:
        return flat, unravel
    return concatenate([x.reshape(-1).astype(flat.dtype) for x in leaves]), unravel


def pack(tree: PyTree, num_axes: int = 0) -> list[jax.Array]:
    """The arrays of each dtype side by side, `[..., entries]`.

    Args:
      tree: Arrays that share their leading axes.
      num_axes: How many leading axes stay.
    """
    groups = collections.defaultdict(list)
    for x in jax.tree.leaves(tree):
        groups[x.dtype].append(x.reshape(*x.shape[:num_axes], -1))
    return [concatenate(arrays) for arrays in groups.values()]


def unpack(packed: list[jax.Array], like: PyTree, num_axes: int = 0) -> PyTree:
    """The arrays that `pack(like, num_axes)` laid side by side; other leading axes may lead."""
    arrays = dict(zip(dict.fromkeys(x.dtype for x in jax.tree.leaves(like)), packed, strict=True))
    ends = dict.fromkeys(arrays, 0)

    def take(x: jax.Array) -> jax.Array:
        shape, array, start = x.shape[num_axes:], arrays[x.dtype], ends[x.dtype]
        ends[x.dtype] += math.prod(shape)
        taken = jax.lax.slice_in_dim(array, start, ends[x.dtype], axis=-1)
        return taken.reshape(*array.shape[:-1], *shape)

    return jax.tree.map(take, like)
