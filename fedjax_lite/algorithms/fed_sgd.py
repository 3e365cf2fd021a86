"""Federated SGD: clients send gradients, the server takes one step."""

from typing import Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from fedjax_lite import _validate
from fedjax_lite.algorithms import local, server
from fedjax_lite.algorithms.options import RoundOptions, complete, documented
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
from fedjax_lite.updates.reducers import weighted_mean
from fedjax_lite.xla.precision import widen

REDUCTIONS = ("mean", "sum")


class _ClientState(NamedTuple):
    gradient: PyTree
    model_state: PyTree
    loss: jax.Array


@documented
def fed_sgd(
    model: Model,
    server_optimizer: optax.GradientTransformation,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    weighting: server.Weighting | None = None,
    **options: Unpack[RoundOptions],
) -> FederatedAlgorithm:
    r"""FedSGD: the server steps along the gradients that clients compute at its params.

    With $\ell_e$ the loss of example $e$, $B_{i,b}$ the batches of client $i$, $n_i$ its number
    of examples and $w$ the server's params,

    - `reduction="mean"`: client $i$ computes $g_i = \frac{1}{n_i} \sum_e \nabla \ell_e(w)$, and
      the server's gradient is $\sum_i p_i g_i / \sum_i p_i$,
    - `reduction="sum"`: client $i$ computes
      $g_i = \sum_b \nabla \frac{1}{\lvert B_{i,b} \rvert} \sum_{e \in B_{i,b}} \ell_e(w)$, and
      the server's gradient is $\sum_i g_i$,

    with $p_i = n_i$ (`weighting="examples"`: the gradient of the cohort's mean loss),
    1 (`"uniform"`) or a function of $n_i$.

    Source: McMahan et al. (2017), "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", section 2 (`"mean"`).

    Args:
      model: The model.
      server_optimizer: Any optax transformation; it is given the server's gradient.
      reduction: `"mean"` or `"sum"`, as above. With `"mean"` the batch size bounds memory and
        leaves results as they are; with `"sum"` it is part of the definition.
      weighting: With `reduction="mean"`, the weight of a client: `"examples"` (the default),
        `"uniform"` or a function `num_examples -> weight`, float scalar to non-negative scalar.
      **options: Those of `RoundOptions`.

    Returns:
      A `FederatedAlgorithm`. Its `init(key_or_params, model_state=None)` returns a
      `ServerState`, its `round(key, state, cohort)` a `ServerState` and a `RoundInfo`.
      A round in which no client contributes leaves the params alone and says so in
      `info.skipped`. Model state (BatchNorm statistics) becomes the weighted mean of the
      clients'.

    Raises:
      ValueError: An option is out of range, at once; the loss does not return one value per
        example, when the round is first run.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> algorithm = fed_sgd(model, optax.sgd(1.0))
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [1.0, 2.0]}, "b": {"x": [6.0]}})
    >>> state = algorithm.init(jnp.float32(0.0))
    >>> everyone = fl.cohort(jax.random.key(0), dataset.resident(), 2)
    >>> state, info = algorithm.round(jax.random.key(1), state, everyone)
    >>> float(state.params)  # One step of size 1 reaches the mean of all three examples.
    3.0
    """
    options = complete(fed_sgd, options)
    _validate.choice("reduction", reduction, REDUCTIONS)
    if reduction == "sum" and weighting is not None:
        raise ValueError(
            f'weighting is {weighting!r} with reduction="sum", which adds all gradients up; leave'
            ' weighting out, or choose reduction="mean".'
        )
    client_update = client_gradient(
        model,
        reduction=reduction,
        weighting=weighting or ("examples" if reduction == "mean" else "uniform"),
    )
    if reduction == "sum" and options.get("reducer") is None:
        options["reducer"] = weighted_mean(denominator=1.0)
    return server.federated_algorithm(
        model,
        client_update,
        server_optimizer,
        shuffle=False,
        **options,
    )


def client_gradient(
    model: Model,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    weighting: server.Weighting = "examples",
) -> ClientUpdate:
    """The client update of `fed_sgd`: a gradient at the server's params, of all examples."""
    client_weight = server.resolve_weighting(weighting)

    def client_init(shared: ServerState, client: Client) -> _ClientState:
        del client
        return _ClientState(
            # Sums of many small terms: in float32 at least.
            gradient=widen(optax.tree.zeros_like(shared.params)),
            model_state=shared.model_state,
            loss=jnp.zeros(()),
        )

    def client_step(
        shared: ServerState,
        client: Client,
        client_state: _ClientState,
        batch: Batch,
        key: jax.Array,
    ) -> _ClientState:
        loss = local.batch_loss(
            model, client_state.model_state, batch, key, mean=reduction == "sum"
        )
        gradient, (total, model_state) = jax.grad(loss, has_aux=True)(shared.params)
        return _ClientState(
            gradient=optax.tree.add(client_state.gradient, gradient),
            model_state=model_state,
            loss=client_state.loss + total,
        )

    def client_steps(
        shared: ServerState,
        client: Client,
        client_state: _ClientState,
        batches: Batch,
        keys: jax.Array,
        taken: jax.Array,
    ) -> _ClientState:
        model_state = client_state.model_state
        if jax.tree.leaves(model_state):  # Which each step takes from the one before.

            def in_turn(i: jax.Array, client_state: _ClientState) -> _ClientState:
                batch = {name: x[i] for name, x in batches.items()}
                return client_step(shared, client, client_state, batch, keys[i])

            return jax.lax.fori_loop(0, taken.sum(), in_turn, client_state)

        def loss(params: PyTree) -> tuple[jax.Array, jax.Array]:
            def of_batch(batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
                mean = reduction == "sum"
                of_params = local.batch_loss(model, model_state, batch, key, mean=mean)
                value, (total, _) = of_params(params)
                return value, total

            both = jax.vmap(of_batch)(batches, keys)
            value, total = (jnp.where(taken, x, 0).sum() for x in both)
            return value, total

        # One gradient of their sum, which is never there for each step.
        gradient, total = jax.grad(loss, has_aux=True)(shared.params)
        return client_state._replace(
            gradient=optax.tree.add(client_state.gradient, gradient),
            loss=client_state.loss + total,
        )

    def client_final(
        shared: ServerState, client: Client, client_state: _ClientState
    ) -> ClientResult:
        del shared
        gradient = client_state.gradient
        if reduction == "mean":
            gradient = optax.tree.scale(
                1 / jnp.maximum(client.num_examples, 1).astype(float), gradient
            )
        return ClientResult(
            update=gradient,
            weight=client_weight(client, client.num_examples),
            metrics={"loss": client_state.loss / jnp.maximum(client.num_examples, 1)},
            model_state=client_state.model_state,
        )

    return ClientUpdate(client_init, client_step, client_final, steps=client_steps)
