"""AdaFedProx: FedProx whose proximal term follows the training loss."""

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
    FederatedAlgorithm,
    PyTree,
    ServerState,
)
from fedjax_lite.models.model import Model


class AdaFedProxState(NamedTuple):
    r"""What the server keeps, in `state.opt_state`.

    Attributes:
      inner: State of the server optimizer.
      mu: Strength $\mu$ of the proximal term in the next round.
      loss: Mean training loss of the last round; infinite before the first.
      num_improvements: For how many rounds on end the loss has fallen, int32.
    """

    inner: PyTree
    mu: jax.Array
    loss: jax.Array
    num_improvements: jax.Array


@documented
def ada_fed_prox(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    mu: ArrayLike = 0.0,
    step_size: ArrayLike = 0.1,
    patience: int = 5,
    weighting: server.Weighting = "examples",
    **options: Unpack[LocalOptions],
) -> FederatedAlgorithm:
    r"""AdaFedProx: FedProx whose proximal term grows when the loss does.

    Clients train as in `fed_prox`. After a round, with $L$ the mean training loss over the examples
    that its clients processed,

    - if $L$ is not below that of the round before, $\mu \leftarrow \min(1, \mu + s)$,
    - if it has fallen for `patience` rounds on end or more, $\mu \leftarrow \max(0, \mu - s)$.

    The first round counts as a fall. pfl-research has a patience of 1, and watches a metric of
    one's choice.

    Source: Li et al. (2020), "Federated Optimization in Heterogeneous Networks", appendix C.3.3.

    Args:
      model: The model.
      client_optimizer: As in `fed_avg`.
      server_optimizer: Any optax transformation; `optax.sgd(1.0)` by default.
      mu: $\mu$ in the first round, in [0, 1]; may be traced. The paper begins with 0 where clients
        are alike, and with 1 where they are not.
      step_size: $s$, by how much $\mu$ changes, not negative; may be traced.
      patience: For how many rounds the loss falls before $\mu$ does.
      weighting: The weight of a client, as in `fed_avg`; that of its loss is the number of
        examples that it processed.
      **options: Those of `LocalOptions`.

    Returns:
      A `FederatedAlgorithm`, as `fed_prox` does; `state.opt_state.mu` is $\mu$ in the next round.

    Raises:
      ValueError: `mu` is outside of [0, 1], `step_size` negative or `patience` below 1; another
        option is out of range.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> algorithm = ada_fed_prox(model, optax.sgd(3.0))  # Each step doubles the distance.
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [4.0]}})
    >>> cohort = fl.cohort_of(dataset.resident(), [0])
    >>> state = algorithm.init(jnp.float32(0.0))
    >>> for r in range(3):
    ...     state, info = algorithm.round(jax.random.key(r), state, cohort)
    >>> round(float(state.opt_state.mu), 3)
    0.2
    """
    options = complete(ada_fed_prox, options)
    mu = _validate.number("mu", mu, maximum=1.0)
    step_size = _validate.number("step_size", step_size)
    patience = _validate.integer("patience", patience, minimum=1)

    def objective(
        loss: jax.Array,
        params: PyTree,
        shared: ServerState,
        client: Client,
        batch: Batch,
        key: jax.Array,
    ) -> jax.Array:
        return proximal(shared.opt_state.mu)(loss, params, shared, client, batch, key)

    def finish(
        result: ClientResult, shared: ServerState, client: Client, trained: local.LocalState
    ) -> ClientResult:
        del shared, client
        num_examples = trained.num_examples.astype(float)
        return result._replace(statistics={"loss": trained.loss, "num_examples": num_examples})

    inner = server.resolve_server_optimizer(server_optimizer)

    def init(params: PyTree) -> AdaFedProxState:
        return AdaFedProxState(
            inner.init(params), jnp.asarray(mu, float), jnp.asarray(jnp.inf, float), jnp.int32(0)
        )

    def update(
        updates: PyTree,
        state: AdaFedProxState,
        params: PyTree = None,
        *,
        statistics: dict[str, jax.Array],
        **extra_args: Any,
    ) -> tuple[PyTree, AdaFedProxState]:
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        loss = statistics["loss"] / jnp.maximum(statistics["num_examples"], 1)
        num_improvements = jnp.where(loss < state.loss, state.num_improvements + 1, 0)
        less = jnp.where(num_improvements >= patience, state.mu - step_size, state.mu)
        after = jnp.where(num_improvements > 0, less, state.mu + step_size)
        return updates, AdaFedProxState(inner_state, jnp.clip(after, 0, 1), loss, num_improvements)

    return server.federated_algorithm(
        model,
        local_training(
            model, client_optimizer, weighting=weighting, objective=objective, finish=finish
        ),
        optax.GradientTransformationExtraArgs(init, update),
        broadcast=lambda state: (state.params, state.model_state, state.opt_state.mu),
        **options,
    )
