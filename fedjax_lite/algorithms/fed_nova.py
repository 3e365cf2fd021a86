"""FedNova: clients weigh as their data do, however many steps they take."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.algorithms import local, server
from fedjax_lite.algorithms.options import LocalOptions, complete, documented
from fedjax_lite.algorithms.training import local_training, proximal
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
    probe: jax.Array
    probe_state: PyTree


@documented
def fed_nova(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    mu: ArrayLike = 0.0,
    weighting: server.Weighting = "examples",
    **options: Unpack[LocalOptions],
) -> FederatedAlgorithm:
    r"""FedNova: normalised averaging, for clients that take different numbers of steps.

    The local steps of client $i$ add up to $w - w_i = \sum_k a_{i,k} g_{i,k}$, with $g_{i,k}$ its
    gradients. In FedAvg, who takes more steps weighs more. Here the server optimizer is given

    $$\Big( \sum_i p_i \|a_i\|_1 \Big) \sum_i p_i \frac{w - w_i}{\|a_i\|_1}$$

    with weights $p_i$ that add up to one. $\|a_i\|_1$ is how far the client optimizer takes a
    scalar whose gradient is always 1: the number of steps times the rate for SGD, and whatever
    momentum, weight decay, schedules and the proximal term make of it.

    Source: Wang et al. (2020), "Tackling the Objective Inconsistency Problem in Heterogeneous
    Federated Optimization".

    Args:
      model: The model.
      client_optimizer: As in `fed_avg`, but for those that treat some arrays of the params in
        another way. The normalisation is exact for steps that are linear in the gradients, such as
        SGD's with or without momentum.
      server_optimizer: Any optax transformation; `optax.sgd(1.0)` by default.
      mu: Strength of a proximal term, as in `fed_prox`; may be traced.
      weighting: The weight of a client, as in `fed_avg`.
      **options: Those of `LocalOptions`.

    Returns:
      A `FederatedAlgorithm`, as `fed_avg` does. Normalised deltas are what a pipeline acts on and
      what `update_norm` is the norm of, of clients and of their mean; they are of the size of
      gradients.

    Raises:
      ValueError: `mu` is negative or no scalar; another option is out of range.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])  # Gradients are -x.
    >>> algorithm = fed_nova(model, optax.sgd(1.0), batch_size=1)
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [1.0] * 3}, "b": {"x": [2.0]}})
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(1), algorithm.init(jnp.float32(0.0)), everyone)
    >>> float(state.params)  # (3/4 * 3 + 1/4 * 1) * (3/4 * 1 + 1/4 * 2)
    3.125
    """
    options = complete(fed_nova, options)
    mu = _validate.number("mu", mu)
    training = local_training(model, client_optimizer, weighting=weighting, objective=proximal(mu))
    client_weight = server.resolve_weighting(weighting)
    optimizer = local.resolve_optimizer(client_optimizer)

    def client_init(shared: ServerState, client: Client) -> _ClientState:
        probe = jnp.zeros(())
        return _ClientState(training.init(shared, client), probe, optimizer(shared).init(probe))

    def client_step(
        shared: ServerState,
        client: Client,
        client_state: _ClientState,
        batch: Batch,
        key: jax.Array,
    ) -> _ClientState:
        trained, probe, probe_state = client_state
        update, probe_state = optimizer(shared).update(1 + mu * probe, probe_state, probe)
        return _ClientState(
            training.step(shared, client, trained, batch, key),
            optax.apply_updates(probe, update),
            probe_state,
        )

    def client_final(
        shared: ServerState, client: Client, client_state: _ClientState
    ) -> ClientResult:
        result = training.final(shared, client, client_state.trained)
        weight = client_weight(client, client_state.trained.num_examples)
        effective = -client_state.probe
        # With a rate of zero the delta is zero, too.
        scale = 1 / jnp.where(effective == 0, 1, effective)
        return result._replace(
            update=optax.tree.cast_like(optax.tree.scale(scale, result.update), result.update),
            norm=jnp.abs(scale) * jnp.asarray(result.norm),
            statistics={"weight": weight, "effective": weight * effective},
        )

    return server.federated_algorithm(
        model,
        ClientUpdate(client_init, client_step, client_final),
        _scaled_back(server.resolve_server_optimizer(server_optimizer)),
        **options,
    )


def _scaled_back(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """A server optimizer that is given the mean of normalised deltas times the mean length."""

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        statistics: dict[str, jax.Array],
        **extra_args: Any,
    ) -> tuple[PyTree, PyTree]:
        weight = statistics["weight"]
        effective = statistics["effective"] / jnp.where(weight == 0, 1, weight)
        scaled = optax.tree.cast_like(optax.tree.scale(effective, updates), updates)
        return inner.update(scaled, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)
