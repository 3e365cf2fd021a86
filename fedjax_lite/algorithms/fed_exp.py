"""FedExP: the server steps further where clients disagree."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.algorithms import local, server
from fedjax_lite.algorithms.options import LocalOptions, complete, documented
from fedjax_lite.algorithms.training import local_training
from fedjax_lite.base import Client, ClientResult, FederatedAlgorithm, PyTree, ServerState
from fedjax_lite.models.model import Model
from fedjax_lite.xla.precision import squared_norm


class FedExPState(NamedTuple):
    r"""What the server keeps, in `state.opt_state`.

    Attributes:
      inner: State of the server optimizer.
      step_size: The step size $\eta_g$ of the last round.
    """

    inner: PyTree
    step_size: jax.Array


@documented
def fed_exp(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    epsilon: ArrayLike = 1e-3,
    weighting: server.Weighting = "uniform",
    **options: Unpack[LocalOptions],
) -> FederatedAlgorithm:
    r"""FedExP: FedAvg whose server step is as long as extrapolation allows.

    With $\Delta_i = w - w_i$ the deltas of the $M$ clients of a round, and $\bar \Delta$ their
    mean, the server optimizer is given $\eta_g \bar \Delta$, where

    $$\eta_g = \max \Big( 1, \frac{\sum_i \|\Delta_i\|^2}
      {2 M (\|\bar \Delta\|^2 + \epsilon)} \Big) .$$

    With other weights $p_i$ than uniform ones, $\sum_i p_i \|\Delta_i\|^2 / \sum_i p_i$ takes the
    place of the mean of the squares.

    The authors' code multiplies $\epsilon$ by the number of clients, and makes it smaller from
    round to round as it does the client's rate.

    Source: Jhunjhunwala et al. (2023), "FedExP: Speeding Up Federated Averaging via
    Extrapolation". There, the mean of the last two rounds' params is evaluated, since the last
    ones oscillate.

    Args:
      model: The model.
      client_optimizer: As in `fed_avg`.
      server_optimizer: Any optax transformation; `optax.sgd(1.0)` by default.
      epsilon: $\epsilon$, not negative, in the units of squared deltas; may be traced.
      weighting: The weight of a client, as in `fed_avg`.
      **options: Those of `LocalOptions`. The norms of $\Delta_i$ are those before a `pipeline`,
        that of $\bar \Delta$ is of what comes out of it.

    Returns:
      A `FederatedAlgorithm`, as `fed_avg` does; `state.opt_state.step_size` is $\eta_g$.

    Raises:
      ValueError: `epsilon` is negative or no scalar; another option is out of range.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])  # Gradients are -x.
    >>> algorithm = fed_exp(model, optax.sgd(1.0), epsilon=0.0)
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [7.0]}, "b": {"x": [-5.0]}})
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(1), algorithm.init(jnp.float32(0.0)), everyone)
    >>> float(state.opt_state.step_size), float(state.params)  # (49 + 25) / (2 * 2 * 1)
    (18.5, 18.5)
    """
    options = complete(fed_exp, options)
    epsilon = _validate.number("epsilon", epsilon)

    def finish(
        result: ClientResult, shared: ServerState, client: Client, trained: local.LocalState
    ) -> ClientResult:
        del shared, client, trained
        # Not by `result.norm`, through which no gradient passes.
        squared = result.weight * squared_norm(result.update)
        return result._replace(statistics={"weight": result.weight, "squared_norm": squared})

    return server.federated_algorithm(
        model,
        local_training(model, client_optimizer, weighting=weighting, finish=finish),
        _extrapolated(server.resolve_server_optimizer(server_optimizer), epsilon),
        **options,
    )


def _extrapolated(
    inner: optax.GradientTransformationExtraArgs, epsilon: ArrayLike
) -> optax.GradientTransformationExtraArgs:
    r"""A server optimizer that is given the mean delta times $\eta_g$."""

    def init(params: PyTree) -> FedExPState:
        return FedExPState(inner.init(params), jnp.ones(()))

    def update(
        updates: PyTree,
        state: FedExPState,
        params: PyTree = None,
        *,
        statistics: dict[str, jax.Array],
        **extra_args: Any,
    ) -> tuple[PyTree, FedExPState]:
        weight = statistics["weight"]
        mean_square = statistics["squared_norm"] / jnp.where(weight == 0, 1, weight)
        denominator = 2 * (squared_norm(updates) + epsilon)
        # Where nothing changes, there is nothing to extrapolate.
        ratio = mean_square / jnp.where(denominator == 0, 1, denominator)
        step_size = jnp.maximum(1, ratio)
        scaled = optax.tree.cast_like(optax.tree.scale(step_size, updates), updates)
        updates, inner_state = inner.update(scaled, state.inner, params, **extra_args)
        return updates, FedExPState(inner_state, step_size.astype(state.step_size.dtype))

    return optax.GradientTransformationExtraArgs(init, update)
