"""What a lossy transform loses, kept with the client and made up for."""

import jax
import optax

from fedjax_lite import _validate
from fedjax_lite.base import Client, Guarantees, Message, PyTree, UpdateTransform
from fedjax_lite.updates.pipeline import first_entry


def error_feedback(transform: UpdateTransform) -> UpdateTransform:
    r"""Adds to each update what a transform lost of the client's earlier ones.

    With $C$ the transform, and $e_i$ what client $i$ keeps, zero at first,

    $$\hat\Delta_i = C(\Delta_i + e_i), \qquad e_i \leftarrow \Delta_i + e_i - \hat\Delta_i.$$

    A client that is left out, or takes no part, keeps its $e_i$.

    Sources: Seide et al. (2014), "1-Bit Stochastic Gradient Descent and its Application to
    Data-Parallel Distributed Training of Speech DNNs"; Karimireddy et al. (2019), "Error Feedback
    Fixes SignSGD and other Gradient Compression Schemes".

    Args:
      transform: What loses something, such as `fl.quantize_uniform(4)`; or a `fl.chain` of such.

    Returns:
      The `UpdateTransform`, which keeps an array for each of the params with each client.

    Raises:
      TypeError: `transform` is no transform.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> coarse = error_feedback(fl.quantize_uniform(2))
    >>> update = jnp.array([0.0, 0.5, 1.0])
    >>> message = fl.Message(update, 1.0, coarse.entry(update))
    >>> sent = coarse.client(jax.random.key(0), coarse.init(update), message, None)
    >>> error, _ = sent.entry
    >>> (sent.update + error).tolist()  # What was rounded away is kept.
    [0.0, 0.5, 1.0]
    """
    _validate.instance("transform", transform, UpdateTransform, "fl.quantize_uniform(4)")

    def entry(params: PyTree) -> PyTree:
        return optax.tree.zeros_like(params), first_entry(transform, params)

    def client(key: jax.Array, state: PyTree, message: Message, client: Client) -> Message:
        error, own = message.entry
        corrected = optax.tree.cast_like(optax.tree.add(message.update, error), message.update)
        sent = transform.client(key, state, message._replace(update=corrected, entry=own), client)
        lost = optax.tree.cast_like(optax.tree.sub(corrected, sent.update), error)
        return sent._replace(entry=(lost, sent.entry))

    def guarantees(before: Guarantees, state: PyTree) -> Guarantees:
        # What comes in is the update and all that was lost before: no bound holds any more.
        return transform.guarantees(before._replace(sensitivity=None), state)

    return transform._replace(client=client, entry=entry, guarantees=guarantees)
