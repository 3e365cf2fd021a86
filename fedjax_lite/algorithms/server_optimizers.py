r"""Server optimizers that mean something special in this field.

All of optax's serve, too; these are those of Reddi et al. (2021), "Adaptive Federated
Optimization", Algorithm 2, which differ from optax's in two ways: their moments are not corrected
for where they start, and the second one starts from $\tau^2$, so that a step is never longer than
$\eta \, |\Delta| / \tau$. With $\Delta$ the mean of the clients' deltas,

$$m \leftarrow \beta_1 m + (1 - \beta_1) \Delta, \qquad
  w \leftarrow w - \eta \frac{m}{\sqrt{v} + \tau}.$$
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import PyTree

__all__ = ["AdaptiveState", "fed_adagrad", "fed_adam", "fed_yogi"]


def __dir__() -> list[str]:
    return __all__


class AdaptiveState(NamedTuple):
    """The moments $m$ and $v$, in the form of the params."""

    first: PyTree
    second: PyTree


def fed_adagrad(
    learning_rate: optax.ScalarOrSchedule, *, b1: ArrayLike = 0.0, tau: ArrayLike = 1e-3
) -> optax.GradientTransformation:
    r"""FedAdagrad's server optimizer: $v \leftarrow v + \Delta^2$.

    Args:
      learning_rate: $\eta$, or a schedule of it by round.
      b1: $\beta_1$, within [0, 1).
      tau: $\tau$, the adaptivity, positive.

    Raises:
      ValueError: `b1` or `tau` is out of range.

    >>> optimizer = fed_adagrad(1.0, tau=3.0)
    >>> updates, _ = optimizer.update(4.0, optimizer.init(0.0))
    >>> float(updates)  # -4 / (sqrt(3^2 + 4^2) + 3)
    -0.5
    """
    return _adaptive(learning_rate, b1, tau, lambda v, squared: v + squared)


def fed_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    tau: ArrayLike = 1e-3,
) -> optax.GradientTransformation:
    r"""FedAdam's server optimizer: $v \leftarrow \beta_2 v + (1 - \beta_2) \Delta^2$.

    Args:
      learning_rate: $\eta$, or a schedule of it by round.
      b1: $\beta_1$, within [0, 1).
      b2: $\beta_2$, within [0, 1).
      tau: $\tau$, the adaptivity, positive.

    Raises:
      ValueError: `b1`, `b2` or `tau` is out of range.
    """
    b2 = _fraction("b2", b2)
    return _adaptive(learning_rate, b1, tau, lambda v, squared: b2 * v + (1 - b2) * squared)


def fed_yogi(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    tau: ArrayLike = 1e-3,
) -> optax.GradientTransformation:
    r"""FedYogi's server optimizer: $v \leftarrow v - (1 - \beta_2) \Delta^2 \, sign(v - \Delta^2)$.

    Args:
      learning_rate: $\eta$, or a schedule of it by round.
      b1: $\beta_1$, within [0, 1).
      b2: $\beta_2$, within [0, 1).
      tau: $\tau$, the adaptivity, positive.

    Raises:
      ValueError: `b1`, `b2` or `tau` is out of range.
    """
    b2 = _fraction("b2", b2)
    return _adaptive(
        learning_rate, b1, tau, lambda v, squared: v - (1 - b2) * squared * jnp.sign(v - squared)
    )


def _fraction(name: str, value: ArrayLike) -> jax.Array:
    value = _validate.number(name, value, maximum=1.0)
    if not isinstance(value, jax.core.Tracer) and value == 1:
        raise ValueError(f"{name} is 1, by which nothing new would count; choose a number below 1.")
    return jnp.asarray(value)


def _adaptive(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike,
    tau: ArrayLike,
    next_second: Callable[[jax.Array, jax.Array], jax.Array],
) -> optax.GradientTransformation:
    b1, tau = _fraction("b1", b1), _validate.number("tau", tau, positive=True)

    def init(params: PyTree) -> AdaptiveState:
        params = jax.tree.map(jnp.asarray, params)
        square = jnp.square(tau)
        return AdaptiveState(
            optax.tree.zeros_like(params), jax.tree.map(lambda w: jnp.full_like(w, square), params)
        )

    def update(
        updates: PyTree, state: AdaptiveState, params: PyTree | None = None
    ) -> tuple[PyTree, AdaptiveState]:
        del params
        first = jax.tree.map(
            lambda m, d: (b1 * m + (1 - b1) * d).astype(m.dtype), state.first, updates
        )
        second = jax.tree.map(
            lambda v, d: next_second(v, jnp.square(d)).astype(v.dtype), state.second, updates
        )
        steps = jax.tree.map(lambda m, v: (m / (jnp.sqrt(v) + tau)).astype(m.dtype), first, second)
        return steps, AdaptiveState(first, second)

    return optax.chain(
        optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate)
    )
