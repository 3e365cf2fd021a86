"""Small standard models."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from fedjax_lite.base import Batch
from fedjax_lite.model import Model, function_model, linen_model


def halfspace_classifier(negative_slope: float = 0.2) -> Model:
    r"""One linear layer from 2 to 1, LeakyReLU, sigmoid, binary cross-entropy.

    $s = \mathrm{LeakyReLU}(w \cdot x + b)$, $\ell = \max(s, 0) - y s + \log(1 + e^{-|s|})$,
    the cross-entropy of $\sigma(s)$ in its stable form. PyTorch's `BCELoss` takes $\sigma(s)$
    and clamps the logarithms at -100; the two differ where a wrong answer has $|s| > 100$, and
    in rounding where $\sigma(s)$ is within a rounding error of 0 or 1.

    Parameters are drawn as PyTorch's `Linear` does: weight and bias uniform within
    $\pm 1/\sqrt{2}$.

    Args:
      negative_slope: Slope of the LeakyReLU below zero.

    Returns:
      A `Model` on the features `x` `[batch, 2]` and `y` `[batch]`, with the params
      `{"weight": [2], "bias": []}` and the metrics `loss` and `accuracy`.
    """

    def init(key: jax.Array) -> dict[str, jax.Array]:
        key_weight, key_bias = jax.random.split(key)
        bound = 2**-0.5
        return {
            "weight": jax.random.uniform(key_weight, (2,), minval=-bound, maxval=bound),
            "bias": jax.random.uniform(key_bias, (), minval=-bound, maxval=bound),
        }

    def score(params: dict[str, jax.Array], batch: Batch) -> jax.Array:
        # A product with a single column is cheaper as a sum, which XLA fuses.
        linear = (batch["x"] * params["weight"]).sum(-1) + params["bias"]
        return jax.nn.leaky_relu(linear, negative_slope)

    def loss(params: dict[str, jax.Array], batch: Batch) -> jax.Array:
        # One exponential and one logarithm, where optax's form takes two of each.
        s = score(params, batch)
        return jnp.maximum(s, 0) - batch["y"] * s + jnp.log1p(jnp.exp(-jnp.abs(s)))

    def metrics(params: dict[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        correct = (score(params, batch) > 0) == (batch["y"] > 0)
        return {"loss": loss(params, batch), "accuracy": correct.astype(float)}

    return function_model(loss, init, metrics)


class _MLP(nn.Module):
    hidden: tuple[int, ...]
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_classes)(x)


def mlp(input_shape: Sequence[int], hidden: Sequence[int], num_classes: int) -> Model:
    """Dense layers with ReLU in between, softmax cross-entropy.

    Args:
      input_shape: Shape of one example, flattened by the model.
      hidden: Widths of the hidden layers; none gives logistic regression.
      num_classes: Number of classes.

    Returns:
      A `Model` on the features `x` `[batch, *input_shape]` and `y` `[batch]`, integer
      classes, with the metrics `loss` and `accuracy`.
    """
    return linen_model(
        _MLP(hidden=tuple(hidden), num_classes=num_classes),
        jnp.zeros((1, *input_shape)),
        _cross_entropy,
        lambda logits, batch: {
            "loss": _cross_entropy(logits, batch),
            "accuracy": (logits.argmax(-1) == batch["y"]).astype(float),
        },
    )


def _cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
