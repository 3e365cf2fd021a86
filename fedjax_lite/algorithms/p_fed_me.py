"""pFedMe: each client has a model near the server's, the minimum of a Moreau envelope."""

from typing import NamedTuple, Unpack

import jax
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


class _ClientState(NamedTuple):
    trained: local.LocalState
    own: PyTree


@documented
def p_fed_me(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    mu: ArrayLike,
    learning_rate: ArrayLike,
    num_inner_steps: int = 5,
    weighting: server.Weighting = "uniform",
    **options: Unpack[StoreOptions],
) -> FederatedAlgorithm:
    r"""pFedMe: clients follow the minima of their losses near the params that they have.

    In each local step on the loss $f$ of a batch, client $i$ comes from its params $w_i$ to params
    of its own, by `num_inner_steps` steps of the client optimizer from $w_i$ on,

    $$\theta_i \approx \arg\min_\theta f(\theta) + \frac{\mu}{2} \|\theta - w_i\|^2, \qquad
      \text{and then} \quad w_i \leftarrow w_i - \eta \mu (w_i - \theta_i) .$$

    The server optimizer is given the mean of $w - w_i$ over the clients $P$ of the round: with
    `optax.sgd(beta)`, $w \leftarrow (1 - \beta) w + \frac{\beta}{|P|} \sum_i w_i$. The last
    $\theta_i$ is the client's model, and never leaves it.

    Reference implementations differ in where $\theta_i$ begins: in PFLlib, where the batch before
    has left it. Its default for $\beta$ is 0, by which the server never moves.

    Source: Dinh et al. (2020), "Personalized Federated Learning with Moreau Envelopes", Algorithm
    1, where $\mu$ is $\lambda$.

    Args:
      model: The model.
      client_optimizer: Any optax transformation, with a fresh state for each batch, or a function
        of the round as in `fed_avg`. It is given the gradient of the loss and of the pull.
      server_optimizer: Any optax transformation; `optax.sgd(1.0)` by default.
      mu: Strength $\mu$ of the pull, not negative; may be traced. The paper has 15.
      learning_rate: $\eta$, the rate of $w_i$, not negative; may be traced.
      num_inner_steps: Steps that $\theta_i$ takes on a batch.
      weighting: The weight of a client, as in `fed_avg`.
      **options: Those of `StoreOptions`.

    Returns:
      A `FederatedAlgorithm`, whose `init` needs `num_clients`. `state.store` holds the $\theta_i$,
      as large as the params for each client; `client_model(state, entry)` has $\theta_i$, and
      the server's params before a client's first round. The `loss` of clients is that at $w_i$.

    Raises:
      ValueError: `mu` or `learning_rate` is negative, `num_inner_steps` below 1; another option is
        out of range.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> algorithm = p_fed_me(model, optax.sgd(0.5), mu=1.0, learning_rate=0.5)
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [4.0]}, "b": {"x": [8.0]}})
    >>> state = algorithm.init(jnp.float32(0.0), num_clients=2)
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(1), state, everyone)
    >>> state.store.params.tolist()  # The minima, half of the way to 4 and to 8.
    [2.0, 4.0]
    >>> float(state.params)  # Half of the way to them.
    1.5
    """
    options = complete(p_fed_me, options)
    mu = _validate.number("mu", mu)
    learning_rate = _validate.number("learning_rate", learning_rate)
    num_inner_steps = _validate.integer("num_inner_steps", num_inner_steps, minimum=1)
    client_weight = server.resolve_weighting(weighting)
    optimizer = local.resolve_optimizer(client_optimizer)

    def client_init(shared: ServerState, client: Client) -> _ClientState:
        del client
        # What steps is theta; w_i follows it at its own rate.
        return _ClientState(local.start(shared, optax.sgd(learning_rate)), shared.params)

    def client_step(
        shared: ServerState,
        client: Client,
        client_state: _ClientState,
        batch: Batch,
        key: jax.Array,
    ) -> _ClientState:
        del client
        trained = client_state.trained
        chosen = optimizer(shared)

        def inner_step(
            carry: tuple[PyTree, PyTree], _: None
        ) -> tuple[tuple[PyTree, PyTree], tuple[jax.Array, PyTree]]:
            theta, opt_state = carry
            gradient, aux = local.gradient(model, theta, trained, batch, key)
            pulled = jax.tree.map(lambda g, t, w: g + mu * (t - w), gradient, theta, trained.params)
            pulled = optax.tree.cast_like(pulled, theta)
            updates, opt_state = chosen.update(pulled, opt_state, theta)
            return (optax.apply_updates(theta, updates), opt_state), aux

        begun = (trained.params, chosen.init(trained.params))
        (theta, _), auxes = jax.lax.scan(inner_step, begun, length=num_inner_steps)
        aux = jax.tree.map(lambda x: x[0], auxes)  # At w_i itself.
        envelope = jax.tree.map(lambda w, t: (mu * (w - t)).astype(w.dtype), trained.params, theta)
        return _ClientState(
            local.descend(optax.sgd(learning_rate), trained, envelope, aux, batch), theta
        )

    def client_final(
        shared: ServerState, client: Client, client_state: _ClientState
    ) -> ClientResult:
        trained = client_state.trained
        kept = personal.Personal(client_state.own, client.entry.num_rounds + 1)
        weight = client_weight(client, trained.num_examples)
        return local.result(shared, trained, weight)._replace(entry=kept)

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
