"""Loops that XLA:CPU is to keep apart."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def apart(compute: Callable[[], jax.Array], word: jax.Array) -> jax.Array:
    """`compute()`, which XLA:CPU is not to fuse into its consumers.

    It would compute the result again in each consumer, or in the loop of one that reads it in
    another shape, entry by entry, but it does not fuse across a branch. Under `vmap` of `word` the
    branch becomes a select, and nothing is kept apart.

    Args:
      compute: What to compute.
      word: A `uint32` that is not known when compiling; which one does not matter.
    """

    def behind_a_branch() -> jax.Array:
        shape = jax.eval_shape(compute)
        # Always true, but XLA does not see it.
        return jax.lax.cond((word | 1) != 0, compute, lambda: jnp.zeros_like(shape))

    return jax.lax.platform_dependent(cpu=behind_a_branch, default=compute)
