"""Linear and dense models."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.base import Batch
from fedjax_lite.models._tasks import classifier, regressor
from fedjax_lite.models.model import Model, function_model


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
    num_outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_outputs)(x)


def mlp(input_shape: Sequence[int], hidden: Sequence[int], num_classes: int) -> Model:
    """Dense layers with ReLU in between, softmax cross-entropy.

    Kernels start from LeCun's truncated normal distribution, biases at zero: flax's defaults.

    Args:
      input_shape: Shape of one example, flattened by the model.
      hidden: Widths of the hidden layers.
      num_classes: Number of classes.

    Returns:
      A `Model` on the features `x` `[batch, *input_shape]` and `y` `[batch]`, integer
      classes, with the metrics `loss` and `accuracy`.

    Raises:
      ValueError: `num_classes` is below 2.
    """
    module = _MLP(_widths(hidden), num_classes)
    return classifier(module, input_shape, num_classes)


def logistic(input_shape: Sequence[int], num_classes: int) -> Model:
    r"""Multinomial logistic regression: one linear layer, softmax cross-entropy.

    $p(y \mid x) = \mathrm{softmax}(W x + b)_y$; `mlp` without hidden layers.

    Args:
      input_shape: Shape of one example, flattened by the model.
      num_classes: Number of classes.

    Returns:
      A `Model` on the features `x` `[batch, *input_shape]` and `y` `[batch]`, integer
      classes, with the metrics `loss` and `accuracy`.

    Raises:
      ValueError: `num_classes` is below 2.

    >>> import jax
    >>> params, _ = logistic((2, 2), 3).init(jax.random.key(0))
    >>> jax.tree.map(jax.numpy.shape, params)
    {'Dense_0': {'bias': (3,), 'kernel': (4, 3)}}
    """
    return mlp(input_shape, (), num_classes)


def regression(
    input_shape: Sequence[int], hidden: Sequence[int] = (), target_shape: Sequence[int] = ()
) -> Model:
    r"""Least squares: one linear layer, or dense layers with ReLU in between.

    $\ell = \frac{1}{d} \sum_j (f(x)_j - y_j)^2$ for targets of $d$ numbers. Starts as `mlp` does.

    Args:
      input_shape: Shape of one example, flattened by the model.
      hidden: Widths of the hidden layers.
      target_shape: Shape of one target.

    Returns:
      A `Model` on the features `x` `[batch, *input_shape]` and `y` `[batch, *target_shape]`, real
      numbers, with the metric `loss`. Beside it, `fl.metrics.r_squared` and others are for it.

    >>> import jax
    >>> params, _ = regression((4,)).init(jax.random.key(0))
    >>> jax.tree.map(jax.numpy.shape, params)
    {'Dense_0': {'bias': (1,), 'kernel': (4, 1)}}
    """
    return regressor(_MLP(_widths(hidden), math.prod(target_shape)), input_shape)


def _widths(hidden: Sequence[int]) -> tuple[int, ...]:
    return tuple(_validate.integer("hidden", width, minimum=1) for width in hidden)


def emnist_dense(num_classes: int = 62) -> Model:
    """Two hidden layers of 200, for EMNIST.

    | layer         | output       | parameters |
    |---------------|--------------|-----------:|
    | flatten       | `[784]`      |            |
    | dense, ReLU   | `[200]`      |    157,000 |
    | dense, ReLU   | `[200]`      |     40,200 |
    | dense         | `[62]`       |     12,462 |
    | total         |              |    209,662 |

    Source: the 2NN of McMahan et al. (2017), "Communication-Efficient Learning of Deep Networks
    from Decentralized Data", with the 62 classes of EMNIST, as in FedJAX. Starts as `mlp` does.

    Args:
      num_classes: Number of classes; 10 for digits only.

    Returns:
      A `Model` on the features `x` `[batch, 28, 28, 1]` and `y` `[batch]`, integer classes,
      with the metrics `loss` and `accuracy`.

    Raises:
      ValueError: `num_classes` is below 2.
    """
    return mlp((28, 28, 1), (200, 200), num_classes)
