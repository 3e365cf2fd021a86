"""Models whose gradients look for flat minima."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Batch, PyTree
from fedjax_lite.models.model import Model
from fedjax_lite.xla.precision import squared_norm

_SMALLEST = 1e-24  # Of squared norms: a gradient of zero has no direction.


def sharpness_aware(model: Model, rho: ArrayLike) -> Model:
    r"""The model whose gradients are taken where its loss is about largest nearby, at each step.

    Its losses are those of the model. What takes the gradient $g$ of their mean over a batch at
    params $w$, as algorithms do at each local step, is given

    $$\nabla f \Big( w + \rho \frac{g}{\|g\|} \Big)$$

    of the same batch, with the same randomness; of a weighted sum of losses, the same with their
    weights. The norm is that of the whole tree. Terms of an algorithm's own, such as that of
    `fl.fed_prox`, come on top. A gradient takes two of the model.

    `fl.fed_sam` is `fl.fed_avg` of it, FedGamma (Dai et al., 2023) `fl.scaffold`, and FedSpeed (Sun
    et al., 2023), as FL-Simulator has it, `fl.fed_dyn`.

    Sources: Foret et al. (2021), "Sharpness-Aware Minimization for Efficiently Improving
    Generalization"; Qu et al. (2022), "Generalized Federated Learning via Sharpness Aware
    Minimization".

    Args:
      model: The model.
      rho: $\rho$, not negative; may be traced.

    Returns:
      The `Model`.

    Raises:
      ValueError: `rho` is negative or no scalar.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> model = sharpness_aware(fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2), 1.0)
    >>> batch = {"x": jnp.array([4.0]), "mask": jnp.array([True])}
    >>> loss = lambda w: model.loss(w, {}, batch, jax.random.key(0))[0].mean()
    >>> [float(x) for x in jax.value_and_grad(loss)(0.0)]  # The gradient at -1.
    [8.0, -5.0]
    """
    _validate.instance("model", model, Model, "fl.linen_model(...)")
    rho = _validate.number("rho", rho)

    @jax.custom_vjp
    def aware(params: PyTree, *others: Any) -> tuple[jax.Array, PyTree]:
        return model.loss(params, *others)

    def forward(params: PyTree, *others: Any) -> tuple[tuple[jax.Array, PyTree], Any]:
        losses, pull, after = jax.vjp(lambda w: model.loss(w, *others), params, has_aux=True)
        return (losses, after), (params, others, pull)

    def backward(residuals: Any, weights: tuple[jax.Array, PyTree]) -> tuple[PyTree, ...]:
        params, others, pull = residuals
        (ascent,) = pull(weights[0])
        scale = rho / jnp.sqrt(jnp.maximum(squared_norm(ascent), _SMALLEST))
        worst = optax.tree.cast_like(optax.tree.add_scale(params, scale, ascent), params)
        _, pull = jax.vjp(lambda w: model.loss(w, *others)[0], worst)
        return (*pull(weights[0]), None, None, None)

    aware.defvjp(forward, backward)

    def loss(
        params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        return aware(params, model_state, dict(batch), key)

    return model._replace(loss=loss)
