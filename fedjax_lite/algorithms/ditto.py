"""Ditto: each client trains a model of its own, not far from the server's."""

from typing import NamedTuple, Unpack

import jax
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.algorithms import local, personal, server
from fedjax_lite.algorithms.options import StoreOptions, complete, documented
from fedjax_lite.algorithms.training import local_training
from fedjax_lite.base import (
    Batch,
    Client,
    ClientResult,
    ClientUpdate,
    FederatedAlgorithm,
    PyTree,
    ServerState,
)
from fedjax_lite.models.model import Model


class _ClientState(NamedTuple):
    trained: local.LocalState
    own: PyTree
    own_state: PyTree


@documented
def ditto(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    mu: ArrayLike,
    weighting: server.Weighting = "examples",
    **options: Unpack[StoreOptions],
) -> FederatedAlgorithm:
    r"""Ditto: FedAvg, beside which each client trains params of its own.

    In a local step on the loss $f$ of a batch, both with the client optimizer,

    - the client's copy of the server's params goes along its gradient, as in `fed_avg`,
    - its own params $v_i$ go along $\nabla f(v_i) + \mu (v_i - w)$, with $w$ the params that the
      server sent.

    The $v_i$ never leave the client. Before its first round a client has $v_i = w$.

    Reference implementations differ in how many steps $v_i$ takes, which here are those of the
    copy, on the same batches. PFLlib has a default of 0 for $\mu$, which leaves $v_i$ to itself.

    Source: Li et al. (2021), "Ditto: Fair and Robust Federated Learning Through Personalization",
    Algorithm 1, where $\mu$ is $\lambda$.

    Args:
      model: The model.
      client_optimizer: As in `fed_avg`. For $v_i$ it has a state of its own, fresh in each round.
      server_optimizer: Any optax transformation; `optax.sgd(1.0)` by default.
      mu: Strength of the pull on $v_i$, not negative; may be traced.
      weighting: The weight of a client, as in `fed_avg`.
      **options: Those of `StoreOptions`.

    Returns:
      A `FederatedAlgorithm`, whose `init` needs `num_clients`. `state.params` are those of
      `fed_avg`; `state.store` holds the $v_i$, as large as the params for each client, and
      `client_model(state, entry)` has $v_i$.

    Raises:
      ValueError: `mu` is negative or no scalar; another option is out of range.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> algorithm = ditto(model, optax.sgd(0.5), mu=1.0, num_steps=2)
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [4.0]}, "b": {"x": [8.0]}})
    >>> state = algorithm.init(jnp.float32(0.0), num_clients=2)
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(1), state, everyone)
    >>> float(state.params)  # The mean of 3 and 6.
    4.5
    >>> state.store.params.tolist()  # From 0 to 2, where the pulls of 4 and 0 cancel; and to 4.
    [2.0, 4.0]
    """
    options = complete(ditto, options)
    mu = _validate.number("mu", mu)
    training = local_training(model, client_optimizer, weighting=weighting)
    optimizer = local.resolve_optimizer(client_optimizer)

    def client_init(shared: ServerState, client: Client) -> _ClientState:
        own, _ = personal.client_model(shared, client.entry)
        return _ClientState(training.init(shared, client), own, optimizer(shared).init(own))

    def client_step(
        shared: ServerState,
        client: Client,
        client_state: _ClientState,
        batch: Batch,
        key: jax.Array,
    ) -> _ClientState:
        trained, own, own_state = client_state
        gradient, _ = local.gradient(model, own, trained, batch, key)
        pulled = jax.tree.map(lambda g, v, w: g + mu * (v - w), gradient, own, shared.params)
        pulled = optax.tree.cast_like(pulled, own)
        updates, own_state = optimizer(shared).update(pulled, own_state, own)
        return _ClientState(
            training.step(shared, client, trained, batch, key),
            optax.apply_updates(own, updates),
            own_state,
        )

    def client_final(
        shared: ServerState, client: Client, client_state: _ClientState
    ) -> ClientResult:
        result = training.final(shared, client, client_state.trained)
        kept = personal.Personal(client_state.own, client.entry.num_rounds + 1)
        return result._replace(entry=kept)

    return server.federated_algorithm(
        model,
        ClientUpdate(
            client_init,
            client_step,
            client_final,
            entry=personal.entry,
            client_model=personal.client_model,
        ),
        server.resolve_server_optimizer(server_optimizer),
        **options,
    )
