"""What hostile clients send in place of their updates, each by itself."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Client, Guarantees, Message, PyTree, Received, UpdateTransform
from fedjax_lite.updates.hostile import membership
from fedjax_lite.updates.pipeline import unmasked


def scaled_update(
    hostile: ArrayLike | Sequence[int], factor: ArrayLike, *, seed: int = 0
) -> UpdateTransform:
    r"""Each hostile client sends its own update times a factor.

    With $-1$, the opposite of what it has learnt; with the number of clients over the server's
    learning rate, its own model takes the place of the mean (model replacement). Reports
    `num_hostile`, the hostile clients with a weight. Nothing bounds an update any more.

    Source: Bagdasaryan et al. (2020), "How To Backdoor Federated Learning".

    Args:
      hostile: Who is hostile; as in `hostile_clients`.
      factor: The factor, which may be negative; may be traced.
      seed: Determines who is drawn.

    Returns:
      The `UpdateTransform`. What comes after it in a chain is done by hostile clients as well:
      leave it to the end, or bound their updates by `clip_by_norm`.

    Raises:
      ValueError: An argument is out of range.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), pipeline=scaled_update([1], -10.0))
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [2.0]}, {"x": [3.0]}])
    >>> both = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.0)), both)
    >>> float(state.params), int(info.metrics["num_hostile"])
    (-14.0, 1)
    """
    factor = _validate.finite("factor", factor)
    return _alone(
        "scaled_update", hostile, seed, lambda key, update: optax.tree.scale(factor, update)
    )


def gaussian_update(
    hostile: ArrayLike | Sequence[int], std: ArrayLike = 1.0, *, seed: int = 0
) -> UpdateTransform:
    r"""Each hostile client sends noise, $\mathcal{N}(0, \sigma^2)$ in each coordinate.

    Reports `num_hostile`, as `scaled_update` does. Nothing bounds an update any more.

    Source: Blanchard et al. (2017), "Machine Learning with Adversaries: Byzantine Tolerant Gradient
    Descent".

    Args:
      hostile: Who is hostile; as in `hostile_clients`.
      std: $\sigma$, not negative; may be traced.
      seed: Determines who is drawn.

    Raises:
      ValueError: An argument is out of range.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> noise = gaussian_update([3])
    >>> message = fl.Message(jnp.array([3.0, 4.0]), 1.0)
    >>> client = fl.Client(id=jnp.int32(2), num_examples=5, num_steps=1, entry=(), key=None)
    >>> noise.client(jax.random.key(0), (), message, client).update.tolist()  # An honest one.
    [3.0, 4.0]
    """
    std = _validate.number("std", std)

    def send(key: jax.Array, update: PyTree) -> PyTree:
        noise = optax.tree.random_like(key, update, jax.random.normal)
        return optax.tree.scale(std, noise)

    return _alone("gaussian_update", hostile, seed, send)


def _alone(
    name: str, hostile: Any, seed: int, send: Callable[[jax.Array, PyTree], PyTree]
) -> UpdateTransform:
    """A transform by which each hostile client sends `send(key, update)`."""
    is_hostile = membership(hostile, seed)

    def client(key: jax.Array, state: PyTree, message: Message, client: Client) -> Message:
        del state
        update = jax.tree.map(
            lambda sent, x: jnp.where(is_hostile(client.id), sent, x).astype(x.dtype),
            send(key, message.update),
            message.update,
        )
        return message._replace(update=update)

    def server(
        key: jax.Array, state: PyTree, received: Received
    ) -> tuple[Received, PyTree, dict[str, jax.Array]]:
        del key
        those = is_hostile(received.cohort.client_ids) & (received.weights != 0)
        return received, state, {"num_hostile": those.sum(dtype=jnp.int32)}

    def guarantees(before: Guarantees, state: PyTree) -> Guarantees:
        del state
        return unmasked(name, before)._replace(sensitivity=None)

    return UpdateTransform(lambda params: (), client, server, guarantees=guarantees)
