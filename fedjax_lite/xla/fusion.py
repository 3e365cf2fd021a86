"""What XLA is to keep apart."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def apart(compute: Callable[[], T], word: jax.Array) -> T:
    """`compute()`, which XLA:CPU is not to fuse into its consumers.

    It would compute the result again in each consumer, or in the loop of one that reads it in
    another shape, entry by entry; it takes no notice of an `optimization_barrier`, but it does not
    fuse across a branch. Under `vmap` of `word` the branch becomes a select, and nothing is kept
    apart.

    Args:
      compute: What to compute, a pytree of arrays. Numbers of Python in it stay such.
      word: A `uint32` that is not known when compiling; which one does not matter.
    """
    numbers: dict[int, float] = {}
    structure: Any = None

    def arrays() -> list[jax.Array]:
        nonlocal structure
        leaves, structure = jax.tree.flatten(compute())
        numbers.update({i: x for i, x in enumerate(leaves) if isinstance(x, int | float)})
        return [x for i, x in enumerate(leaves) if i not in numbers]

    def behind_a_branch() -> list[jax.Array]:
        shapes = jax.eval_shape(arrays)

        def never() -> list[jax.Array]:
            return jax.tree.map(jnp.zeros_like, shapes)

        return jax.lax.cond((word | 1) != 0, arrays, never)  # Always true, which XLA cannot see.

    computed = iter(jax.lax.platform_dependent(cpu=behind_a_branch, default=arrays))
    leaves = [numbers[i] if i in numbers else next(computed) for i in range(structure.num_leaves)]
    return jax.tree.unflatten(structure, leaves)


def unshared(tree: T) -> T:
    """The same arrays, but XLA:GPU computes anew what it has computed of the originals.

    It would compute something once for two readers, such as the params of all lanes or zeros in
    their shape, write it, and copy it for the one that is a loop and overwrites it: where the other
    could have computed it by the way, three passes over memory for one. TPUs do better without, as
    they keep what is shared in the memory of a core.
    """
    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(tree, cuda=barrier, rocm=barrier, default=lambda tree: tree)
