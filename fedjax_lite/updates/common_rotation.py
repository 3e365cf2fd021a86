"""One random rotation for all clients of a round, which the server takes back from their sum."""

import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.base import (
    Client,
    Cohort,
    Guarantees,
    Message,
    PyTree,
    Received,
    UpdateTransform,
)
from fedjax_lite.updates.pipeline import announced, unmasked
from fedjax_lite.updates.rotation import padded_size, rotate, rotate_back
from fedjax_lite.xla import random
from fedjax_lite.xla.packing import concatenate, ravel
from fedjax_lite.xla.precision import widen

_KEY_TRANSFORM = 1  # The signs of the rotation derive from 0.


def common_rotation(transform: UpdateTransform) -> UpdateTransform:
    r"""Has a transform act in random coordinates that all clients of a round share.

    All arrays, as one vector $x$ with zeros up to a power of two $d$, become $R x$ with
    $R = H D / \sqrt d$, where $H$ is the Walsh-Hadamard matrix and $D$ has random signs on its
    diagonal; what the server makes of the sum is rotated back. An update of norm $C$ has entries
    near $C / \sqrt d$ there, hardly one beyond $C \sqrt{2 \ln(2 d) / d}$: integers of a smaller
    range do for them.

    `fl.rotated` is for what is decoded client by client: there, each has a rotation of its own.

    Source: Kairouz, Liu and Steinke (2021), "The Distributed Discrete Gaussian Mechanism for
    Federated Learning with Secure Aggregation"; Suresh et al. (2017), "Distributed Mean
    Estimation with Limited Communication".

    Args:
      transform: What acts on updates in these coordinates, and keeps nothing with clients, such as
        `fl.fixed_point(0.1, 1.0)`.

    Raises:
      TypeError: `transform` is no transform.
      ValueError: It keeps something with clients, whose coordinates are others in each round.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> turned = common_rotation(fl.fixed_point(4.0, 1.0, num_bits=24))
    >>> model = fl.function_model(lambda w, batch: -w @ batch["x"].T)
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), pipeline=turned, reducer=fl.modular_sum())
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [[0.0, 6.0, 0.0]]}])
    >>> one = fl.cohort_of(dataset.resident(), [0])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.zeros(3)), one)
    >>> state.params.round(4).tolist()  # Of four entries of 3 and -3, none is beyond 4.
    [0.0, 6.0, 0.0]
    """
    _validate.instance("transform", transform, UpdateTransform, "fl.fixed_point(0.1, 1.0)")
    if transform.entry is not None:
        raise ValueError(
            "transform keeps something with each client, and has other coordinates in each round;"
            " pass one without an entry."
        )

    def init(params: PyTree) -> PyTree:
        size = sum(x.size for x in jax.tree.leaves(params))
        return transform.init((params, jnp.zeros(padded_size(size) - size)))

    def announce(key: jax.Array, state: PyTree, cohort: Cohort) -> PyTree:
        key_transform = random.fold_in_pair(key, _KEY_TRANSFORM, 0)
        return key, announced(transform, key_transform, state, cohort)

    def client(key: jax.Array, state: PyTree, message: Message, client: Client) -> Message:
        key_round, state = state
        vector, unravel = ravel(widen(message.update))
        turned = rotate(key_round, vector)
        # In the shapes of the params, and what is beyond: the server knows these.
        message = message._replace(update=(unravel(turned[: vector.size]), turned[vector.size :]))
        return transform.client(key, state, message, client)

    def server(
        key: jax.Array, state: PyTree, received: Received
    ) -> tuple[Received, PyTree, dict[str, jax.Array]]:
        key_transform = random.fold_in_pair(key, _KEY_TRANSFORM, 0)
        received, state, info = transform.server(key_transform, state, received)
        turned, rest = received.aggregate
        vector, unravel = ravel(turned)
        back = rotate_back(key, concatenate([vector, rest]), vector.size)
        return received._replace(aggregate=unravel(back)), state, info

    def guarantees(before: Guarantees, state: PyTree) -> Guarantees:
        return transform.guarantees(unmasked("common_rotation", before), state)

    return transform._replace(
        init=init, client=client, server=server, guarantees=guarantees, announce=announce
    )
