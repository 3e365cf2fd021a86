"""Models whose gradients are private: clipped example by example, with noise."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Batch, PyTree
from fedjax_lite.engine.counting import next_call
from fedjax_lite.models.model import Model
from fedjax_lite.xla import random
from fedjax_lite.xla.precision import squared_norm, widen


def dp_sgd(
    model: Model,
    max_norm: ArrayLike,
    noise_multiplier: ArrayLike,
    *,
    report_clipped: bool = False,
) -> Model:
    r"""The model whose gradients protect single examples: DP-SGD, whatever the algorithm.

    Its losses are those of the model. What takes the gradient of their mean over the $n$ real
    examples of a batch, as algorithms do at each local step, is given

    $$\frac{1}{n} \Big( \sum_i \nabla \ell_i \min(1, C / \|\nabla \ell_i\|_2)
    + \mathcal{N}(0, z^2 C^2 I) \Big);$$

    of a weighted sum of losses, the same with their weights, and the noise of the largest of them.
    Terms of an algorithm's own, such as that of `fl.fed_prox`, come on top.

    An example is in one batch of an epoch: an epoch is a Gaussian mechanism of multiplier $z$ of
    whether it is zeroed out ($z / 2$ of which one of two it is), all epochs of all rounds that its
    client takes part in are composed. Batches are shuffled and not drawn by chance, so nothing is
    gained by sampling examples. This holds for what is made of the gradients: not for an algorithm
    that sends, or goes by, losses themselves (`fl.q_fed_avg`, `fl.agnostic_fed_avg`, `fl.ifca`),
    differentiates the gradients again (`fl.per_fed_avg` of the second order) or takes them in a
    loop within a step (`fl.p_fed_me`), nor for what is reported.

    Each gradient has noise of its own. Where a step takes several (`fl.ditto`, `fl.fed_sam`,
    `fl.mime`), all of them are composed. A gradient whose norm is no number, or too large for one,
    counts as zero. Each example has a key of its own, for dropout.

    Takes the gradient of each example for its norm, and then that of their sum; on accelerators,
    where the first are taken side by side, up to the memory of as many gradients.

    Source: Abadi et al. (2016), "Deep Learning with Differential Privacy", Algorithm 1, with the
    true size of each batch.

    Args:
      model: One whose examples do not see each other: without BatchNorm, and without model state.
      max_norm: $C$, positive; may be traced, and is then not checked.
      noise_multiplier: $z$, not negative; may be traced, and is then not checked.
      report_clipped: Whether `clipped`, 1 for each example whose gradient is scaled down, is among
        the metrics; `measure_clients=True` of `fl.fed_avg` then reports its means. Evaluating it
        takes a gradient for each example.

    Returns:
      The `Model`.

    Raises:
      ValueError: `max_norm` is not positive, `noise_multiplier` is negative; in a round, the model
        has a state.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> algorithm = fl.fed_avg(dp_sgd(model, 1.0, noise_multiplier=0.0), optax.sgd(1.0))
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [0.5, 100.0]}])
    >>> cohort = fl.cohort_of(dataset.resident(), [0])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.0)), cohort)
    >>> float(state.params)  # The mean of 0.5 and of 1, to which 100 was clipped.
    0.75
    """
    _validate.instance("model", model, Model, "fl.linen_model(...)")
    max_norm = _validate.number("max_norm", max_norm, positive=True)
    multiplier = _validate.number("noise_multiplier", noise_multiplier)
    _validate.choice("report_clipped", report_clipped, (True, False))

    def loss_of_one(params: PyTree, example: Batch, key: jax.Array) -> jax.Array:
        batch = jax.tree.map(lambda x: x[None], example)
        losses, after = model.loss(params, {}, batch, key)
        if jax.tree.leaves(after):
            raise ValueError(_STATE)
        return losses[0]

    def losses_of(params: PyTree, batch: Batch, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, batch["mask"].shape[0])
        return jax.vmap(loss_of_one, (None, 0, 0))(params, batch, keys)

    def squared_norms(params: PyTree, batch: Batch, key: jax.Array) -> jax.Array:
        """Of the gradient of each example; NaN of those that are padding."""
        keys = jax.random.split(key, batch["mask"].shape[0])

        def one(example: Batch, key: jax.Array) -> jax.Array:
            return squared_norm(jax.grad(loss_of_one)(params, example, key))

        # A CPU is faster with a gradient that stays in its cache; others, with all at once.
        squared = jax.lax.platform_dependent(
            *(batch, keys),
            cpu=lambda batch, keys: jax.lax.map(lambda pair: one(*pair), (batch, keys)),
            default=jax.vmap(one),
        )
        return jnp.where(batch["mask"], squared, jnp.nan)

    @jax.custom_vjp
    def private_losses(params: PyTree, batch: Batch, keys: jax.Array) -> jax.Array:
        return losses_of(params, batch, keys[0])

    def forward(params: PyTree, batch: Batch, keys: jax.Array) -> tuple[jax.Array, Any]:
        return private_losses(params, batch, keys), (params, batch, keys)

    def backward(residuals: Any, weights: jax.Array) -> tuple[PyTree, None, None]:
        params, batch, (key_losses, key_noise) = residuals
        squared = squared_norms(params, batch, key_losses)
        counts = jnp.isfinite(squared)
        factors = jnp.minimum(1, max_norm / jnp.sqrt(jnp.where(squared > 0, squared, 1)))
        # In place of an example that does not count, one that does, times zero: a gradient that is
        # no number would make none of the sum.
        places = jnp.where(counts, jnp.arange(counts.size), jnp.argmax(counts))
        batch = jax.tree.map(lambda x: x[places], batch)
        _, pull = jax.vjp(lambda params: losses_of(params, batch, key_losses), params)
        (total,) = pull(jnp.where(counts, weights * factors, 0))
        std = multiplier * max_norm * jnp.abs(weights).max()
        noise = random.normal_like(key_noise, widen(params))

        def private(x: jax.Array, noise: jax.Array) -> jax.Array:
            wide = jnp.where(counts.any(), x, 0) + std.astype(noise.real.dtype) * noise
            return wide.astype(x.dtype)

        return jax.tree.map(private, total, noise), None, None

    private_losses.defvjp(forward, backward)

    def loss(
        params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        if jax.tree.leaves(model_state):
            raise ValueError(_STATE)
        # Another gradient of the same step has the same dropout, and noise of its own.
        keys = random.fold_in_pair(key, jnp.arange(2), jnp.array([0, next_call()]))
        return private_losses(params, dict(batch), keys), model_state

    def metrics(params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, jax.Array]:
        told = model.metrics(params, model_state, batch)
        if not report_clipped:
            return told
        squared = squared_norms(params, dict(batch), jax.random.key(0))
        return {**told, "clipped": (squared > jnp.square(max_norm)).astype(float)}

    return model._replace(loss=loss, metrics=metrics)


_STATE = (
    "model has a state, such as the statistics of BatchNorm, in which examples see each other;"
    " choose one without, such as with GroupNorm."
)
