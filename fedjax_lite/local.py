"""Pieces of local training that the algorithms share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedjax_lite import _validate
from fedjax_lite.base import Batch, PyTree
from fedjax_lite.model import Model

LossAndAux = Callable[[PyTree], tuple[jax.Array, tuple[jax.Array, PyTree]]]


def batch_loss(
    model: Model, model_state: PyTree, batch: Batch, key: jax.Array, *, mean: bool
) -> LossAndAux:
    """The loss of a batch as a function of the params, for `jax.grad` with `has_aux=True`.

    Args:
      model: The model.
      model_state: Its state before the batch.
      batch: Features and mask.
      key: Typed key of the step.
      mean: Over the real examples; else their sum.

    Returns:
      A function `params -> (loss, (sum of the losses, model state after the batch))`.
    """

    def loss(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
        with _validate.reading(batch):
            losses, after = model.loss(params, model_state, batch, key)
        _validate.per_example("model.loss", losses.shape, batch["mask"].shape[0])
        wide = jnp.promote_types(losses.dtype, jnp.float32)
        total = jnp.where(batch["mask"], losses, 0).sum(dtype=wide)
        return total / jnp.maximum(batch["mask"].sum(), 1) if mean else total, (total, after)

    return loss


def delta(server_params: PyTree, client_params: PyTree) -> tuple[PyTree, jax.Array]:
    """What training changed, server minus client, and its L2 norm."""
    # The norm is taken of a difference of its own: shared, XLA would write it to memory, which
    # on a CPU takes longer than all else that ends a client's training.
    own = jax.lax.optimization_barrier(jax.lax.stop_gradient((server_params, client_params)))
    return optax.tree.sub(server_params, client_params), optax.tree.norm(optax.tree.sub(*own))
