"""What clients send in place of a single update: the momentum of theirs."""

import jax
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Client, Guarantees, Message, PyTree, Received, UpdateTransform
from fedjax_lite.updates.pipeline import sent_whole, unmasked


def client_momentum(decay: ArrayLike = 0.9) -> UpdateTransform:
    r"""Sends the running mean of a client's updates in place of the last one.

    With $m_i$ what client $i$ keeps, zero at first,

    $$m_i \leftarrow \beta m_i + (1 - \beta) \Delta_i, \qquad \hat\Delta_i = m_i.$$

    Honest clients' means differ less than single updates do, and what differs less hides less from
    robust reducers. A client that is left out, or takes no part, keeps its $m_i$.

    Source: Karimireddy et al. (2021), "Learning from History for Byzantine Robust Optimization".

    Args:
      decay: $\beta$, from 0, where updates stay as they are, to 1; may be traced.

    Returns:
      The `UpdateTransform`, which keeps an array for each of the params with each client. A bound
      of norms does not pass it, since it may have been another one in earlier rounds.

    Raises:
      ValueError: `decay` is out of range.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> momentum = client_momentum(0.5)
    >>> message = fl.Message(jnp.array([4.0]), 1.0, entry=jnp.array([2.0]))
    >>> momentum.client(jax.random.key(0), (), message, None).update.tolist()
    [3.0]
    """
    decay = _validate.number("decay", decay, maximum=1)

    def client(key: jax.Array, state: PyTree, message: Message, client: Client) -> Message:
        del key, state, client
        kept = optax.tree.add(
            optax.tree.scale(decay, message.entry), optax.tree.scale(1 - decay, message.update)
        )
        kept = optax.tree.cast_like(kept, message.entry)
        sent = sent_whole(message, optax.tree.cast_like(kept, message.update))
        return sent._replace(entry=kept)

    def server(
        key: jax.Array, state: PyTree, received: Received
    ) -> tuple[Received, PyTree, dict[str, jax.Array]]:
        del key
        return received, state, {}

    def guarantees(before: Guarantees, state: PyTree) -> Guarantees:
        del state
        return unmasked("client_momentum", before)._replace(sensitivity=None)

    return UpdateTransform(
        lambda params: (), client, server, entry=optax.tree.zeros_like, guarantees=guarantees
    )
