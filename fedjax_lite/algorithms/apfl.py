"""APFL: each client mixes a model of its own with the server's."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.algorithms import local, personal, server
from fedjax_lite.algorithms.options import StoreOptions, complete, documented
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


class Personal(NamedTuple):
    """What a client keeps between rounds.

    Attributes:
      params: Its own params $v$.
      alpha: Their share of its model: a scalar, or one for each array of the params.
      num_rounds: Rounds that it took part in.
    """

    params: PyTree
    alpha: PyTree
    num_rounds: jax.Array


class _ClientState(NamedTuple):
    trained: local.LocalState
    own: Personal
    own_state: PyTree
    alpha_state: PyTree


@documented
def apfl(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    alpha: ArrayLike = 0.5,
    layerwise: bool = False,
    weighting: server.Weighting = "examples",
    **options: Unpack[StoreOptions],
) -> FederatedAlgorithm:
    r"""APFL: clients learn models of their own, and how far to trust them.

    Client $i$ uses the params $\bar v_i = \alpha_i v_i + (1 - \alpha_i) w$. In a local step on the
    loss $f$ of a batch, all with the client optimizer and from the same values,

    - its copy $w_i$ of the server's params goes along $\nabla f(w_i)$, as in FedAvg,
    - its own params $v_i$ go along $\nabla_v f(\bar v_i) = \alpha_i \nabla f(\bar v_i)$,
    - its share $\alpha_i$ goes along
      $\nabla_\alpha f(\bar v_i) = \langle v_i - w_i, \nabla f(\bar v_i) \rangle$, and is kept in
      $[0, 1]$,

    with $w_i$ in place of $w$ in $\bar v_i$. The server averages the $w_i$ as in FedAvg; $v_i$ and
    $\alpha_i$ never leave the client. Before its first round a client has $v_i = w$.

    Source: Deng et al. (2020), "Adaptive Personalized Federated Learning".

    Args:
      model: The model.
      client_optimizer: As in `fed_avg`, but for those that treat some arrays of the params in
        another way; each of the three has a state of its own. Weight decay and clipping act on
        the shares as well.
      server_optimizer: Any optax transformation; `optax.sgd(1.0)` by default.
      alpha: The share $\alpha_i$ that clients begin with, in [0, 1].
      layerwise: One $\alpha_i$ for each array of the params, as in FedJAX.
      weighting: The weight of a client, as in `fed_avg`.
      **options: Those of `StoreOptions`.

    Returns:
      A `FederatedAlgorithm`, whose `init` needs `num_clients`. `state.store` holds a `Personal` for
      each client, as large as the params; `client_model(state, entry)` has $\bar v_i$ with the
      server's params as $w$, and just these before a client's first round. The metric `alpha` of
      clients is their share, or the mean of their shares.

    Raises:
      ValueError: `alpha` is outside of [0, 1]; another option is out of range.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> algorithm = apfl(model, optax.sgd(0.1), num_epochs=3)
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [-1.0]}, "b": {"x": [1.0]}})
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state = algorithm.init(jnp.float32(0.0), num_clients=2)
    >>> state, info = algorithm.round(jax.random.key(1), state, everyone)
    >>> float(state.params)  # They agree on nothing, and each has a model of its own.
    0.0
    >>> found = fl.evaluate_clients(model, state, everyone, client_model=algorithm.client_model)
    >>> bool((found.clients["loss"] < 0.5).all())
    True
    """
    options = complete(apfl, options)
    alpha = _validate.number("alpha", alpha, maximum=1.0)
    _validate.choice("layerwise", layerwise, (True, False))
    client_weight = server.resolve_weighting(weighting)
    optimizer = local.resolve_optimizer(client_optimizer)

    def entry(shared: ServerState) -> Personal:
        share = jnp.asarray(alpha, float)
        shares = jax.tree.map(lambda _: share, shared.params) if layerwise else share
        return Personal(shared.params, shares, jnp.int32(0))

    def begin(state: ServerState, own: Personal) -> Personal:
        return own._replace(params=personal.params(state, own.params, own.num_rounds))

    def client_model(state: ServerState, own: Personal) -> tuple[PyTree, PyTree]:
        own = begin(state, own)
        return _mix(own.params, state.params, own.alpha), state.model_state

    def client_init(shared: ServerState, client: Client) -> _ClientState:
        own = begin(shared, client.entry)
        chosen = optimizer(shared)
        return _ClientState(
            local.start(shared, chosen), own, chosen.init(own.params), chosen.init(own.alpha)
        )

    def client_step(
        shared: ServerState,
        client: Client,
        client_state: _ClientState,
        batch: Batch,
        key: jax.Array,
    ) -> _ClientState:
        trained, own, own_state, alpha_state = client_state
        chosen = optimizer(shared)
        loss = local.batch_loss(model, trained.model_state, batch, key, mean=True)

        def personal_loss(params: PyTree, alpha: PyTree) -> jax.Array:
            return loss(_mix(params, trained.params, alpha))[0]

        own_gradient, alpha_gradient = jax.grad(personal_loss, (0, 1))(own.params, own.alpha)
        own_updates, own_state = chosen.update(own_gradient, own_state, own.params)
        alpha_updates, alpha_state = chosen.update(alpha_gradient, alpha_state, own.alpha)
        gradient, aux = local.gradient(model, trained.params, trained, batch, key)
        return _ClientState(
            local.descend(chosen, trained, gradient, aux, batch),
            own._replace(
                params=optax.apply_updates(own.params, own_updates),
                alpha=optax.tree.clip(optax.apply_updates(own.alpha, alpha_updates), 0.0, 1.0),
            ),
            own_state,
            alpha_state,
        )

    def client_final(
        shared: ServerState, client: Client, client_state: _ClientState
    ) -> ClientResult:
        trained, own = client_state.trained, client_state.own
        own = own._replace(num_rounds=own.num_rounds + 1)
        result = local.result(shared, trained, client_weight(client, trained.num_examples))
        mean_alpha = jnp.mean(jnp.stack(jax.tree.leaves(own.alpha)))
        return result._replace(entry=own, metrics={**result.metrics, "alpha": mean_alpha})

    return server.federated_algorithm(
        model,
        ClientUpdate(
            client_init, client_step, client_final, entry=entry, client_model=client_model
        ),
        server.resolve_server_optimizer(server_optimizer),
        **options,
    )


def _mix(own: PyTree, others: PyTree, alpha: PyTree) -> PyTree:
    """`alpha` times the one plus the rest times the other; `alpha` a scalar or one per array."""
    shares = jax.tree.broadcast(alpha, own)
    return jax.tree.map(lambda v, w, a: (a * v + (1 - a) * w).astype(v.dtype), own, others, shares)
