"""What an update is worth that comes late."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Client, Guarantees, Message, PyTree, Received, UpdateTransform


def polynomial_staleness(exponent: ArrayLike = 0.5) -> UpdateTransform:
    r"""Multiplies the weight of an update with $(1 + \tau)^{-a}$.

    $\tau$ is its staleness, the number of rounds since its client started: 0 where all start from
    the newest params, and the weight stays.

    Sources: Xie et al. (2019), "Asynchronous Federated Optimization"; Nguyen et al. (2022),
    "Federated Learning with Buffered Asynchronous Aggregation", with $a = 1/2$.

    Args:
      exponent: $a$, not negative; may be traced.

    Raises:
      ValueError: `exponent` is negative.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> late = fl.Client(jnp.int32(0), jnp.int32(5), jnp.int32(1), (), None, staleness=jnp.int32(3))
    >>> message = fl.Message(jnp.zeros(2), jnp.float32(1.0))
    >>> float(polynomial_staleness(0.5).client(jax.random.key(0), (), message, late).weight)
    0.5
    """
    exponent = _validate.number("exponent", exponent)
    return _discounted(lambda staleness: 1 / jnp.power(1 + staleness, exponent))


def hinge_staleness(slope: ArrayLike = 10.0, threshold: ArrayLike = 6.0) -> UpdateTransform:
    r"""Multiplies the weight of an update with 1 up to a staleness of $b$, and with less beyond.

    $$s(\tau) = 1 / (a \max(\tau - b, 0) + 1)$$

    Source: Xie et al. (2019), "Asynchronous Federated Optimization".

    Args:
      slope: $a$, not negative; may be traced.
      threshold: $b$, not negative; may be traced.

    Raises:
      ValueError: A number is negative.
    """
    slope = _validate.number("slope", slope)
    threshold = _validate.number("threshold", threshold)

    def discount(staleness: jax.Array) -> jax.Array:
        return jnp.reciprocal(slope * jnp.maximum(staleness - threshold, 0) + 1)

    return _discounted(discount)


def threshold_staleness(threshold: ArrayLike, value: ArrayLike = 0.0) -> UpdateTransform:
    r"""Multiplies the weight of an update with 1 up to a staleness of $b$, and with $v$ beyond.

    Args:
      threshold: $b$, not negative; may be traced.
      value: $v$, not negative; with 0, the update is left out.

    Raises:
      ValueError: A number is negative.
    """
    threshold = _validate.number("threshold", threshold)
    value = _validate.number("value", value)
    return _discounted(lambda staleness: jnp.where(staleness > threshold, value, 1.0))


def _discounted(discount: Callable[[jax.Array], jax.Array]) -> UpdateTransform:
    """A transform that multiplies weights with a function of the staleness, at most 1."""

    def client(key: jax.Array, state: PyTree, message: Message, client: Client) -> Message:
        del key, state
        factor = discount(jnp.asarray(client.staleness, float))
        return message._replace(weight=message.weight * factor)

    return UpdateTransform(
        init=lambda params: (),
        client=client,
        server=lambda key, state, received: (received, state, {}),
        guarantees=lambda before, state: before,
    )


def mix_models() -> UpdateTransform:
    r"""Takes the server towards clients' models, and not along their deltas.

    A client that started from $w^{r - \tau}$ and came to $w_i$ sends $w^{r - \tau} - w_i$. The
    aggregate becomes that of $w^r - w_i$, as if it had started from the newest params $w^r$. With
    `optax.sgd(alpha)`, the server's step is
    $w^{r + 1} = (1 - \alpha p_i) w^r + \alpha p_i w_i$ for a buffer of one and
    `reducer=fl.weighted_mean(denominator=1)`: FedAsync. Where all start from the newest, it changes
    nothing.

    Beside a `fl.weighted_mean`, and before what clips or compresses deltas, which the drift of the
    server's params is added to.

    Source: Xie et al. (2019), "Asynchronous Federated Optimization".

    >>> import fedjax_lite as fl
    >>> late = fl.chain(mix_models(), fl.polynomial_staleness(0.5))
    """

    def server(
        key: jax.Array, state: PyTree, received: Received
    ) -> tuple[Received, PyTree, dict[str, jax.Array]]:
        del key
        mixed = optax.tree.add(received.aggregate, received.drift())
        return received._replace(aggregate=mixed, sensitivity=None), state, {}

    return UpdateTransform(
        init=lambda params: (),
        client=lambda key, state, message, client: message,
        server=server,
        guarantees=_without_bound,
    )


def _without_bound(before: Guarantees, state: PyTree) -> Guarantees:
    return before._replace(sensitivity=None)
