"""Bounds on what a single client can change."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import PyTree, UpdateTransform
from fedjax_lite.precision import squared_norm
from fedjax_lite.updates.pipeline import stateless


def clip_by_norm(max_norm: ArrayLike) -> UpdateTransform:
    r"""Scales an update down to an L2 norm of $C$, over all of its arrays together.

    $$\Delta \mapsto \Delta \min(1, C / \|\Delta\|_2)$$

    Clients report `clipped`, 1 if theirs was scaled down.

    Source: McMahan et al. (2018), "Learning Differentially Private Recurrent Language Models".

    Args:
      max_norm: The bound $C$, positive, which holds up to rounding in the dtype of the update;
        may be traced, and is then not checked.

    Raises:
      ValueError: `max_norm` is not positive.

    >>> import jax, jax.numpy as jnp
    >>> clip = clip_by_norm(1.0)
    >>> update, info = clip.client(jax.random.key(0), (), jnp.array([3.0, 4.0]), 1.0)
    >>> [round(float(x), 4) for x in update], float(info["clipped"])
    ([0.6, 0.8], 1.0)
    """
    max_norm = _validate.number("max_norm", max_norm, positive=True)

    def client(
        key: jax.Array, update: PyTree, weight: jax.Array
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        del key, weight
        squared = squared_norm(update)
        clipped = squared > max_norm**2
        # Of updates that stay as they are no root is taken: its gradient at 0 is not a number.
        factor = jnp.where(clipped, max_norm / jnp.sqrt(jnp.where(clipped, squared, 1)), 1)
        scaled = jax.tree.map(lambda x: (factor * x).astype(x.dtype), update)
        return scaled, {"clipped": clipped.astype(float)}

    return stateless(client)
