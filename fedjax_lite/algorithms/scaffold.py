"""SCAFFOLD: clients correct their steps by where the others are going."""

from typing import Any, Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from fedjax_lite.algorithms import local, server
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
from fedjax_lite.xla.precision import widen


class ScaffoldState(NamedTuple):
    """What the server keeps, in `state.opt_state`.

    Attributes:
      inner: State of the server optimizer.
      control: The server's control variate, the mean of those of all clients.
    """

    inner: PyTree
    control: PyTree


class _ClientState(NamedTuple):
    trained: local.LocalState
    total: PyTree


@documented
def scaffold(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    option: Literal[1, 2] = 2,
    weighting: server.Weighting = "uniform",
    **options: Unpack[StoreOptions],
) -> FederatedAlgorithm:
    r"""SCAFFOLD: FedAvg whose clients correct their gradients by control variates.

    Client $i$ keeps an estimate $c_i$ of its own gradient, the server the mean $c$ of all of them,
    both zero at first. A local step goes along $g_i(y) - c_i + c$, with $g_i$ the gradient of the
    batch and $y$ the client's params. After its steps, the client's estimate becomes

    - `option=1`: $c_i^+ = g_i(w)$, the mean gradient of the examples that it processed at the
      server's params $w$, which takes a second gradient in each step,
    - `option=2`: $c_i^+$, the mean over its steps of $g_i(y)$. With plain SGD at the rate $\eta$,
      this is the paper's $c_i - c + \frac{w - y}{K \eta}$ after $K$ steps.

    The server steps along the mean delta, as in FedAvg, and adds
    $\frac{1}{N} \sum_i (c_i^+ - c_i)$ to $c$, over the clients of the round, with $N$ the size of
    the population.

    Source: Karimireddy et al. (2020), "SCAFFOLD: Stochastic Controlled Averaging for Federated
    Learning".

    Args:
      model: The model.
      client_optimizer: As in `fed_avg`; plain SGD in the paper. Momentum sees the corrected
        gradients.
      server_optimizer: Any optax transformation; `optax.sgd(1.0)` by default.
      option: How clients estimate their gradients, as above.
      weighting: The weight of a client's delta, as in `fed_avg`; the control variates are never
        weighted.
      **options: Those of `StoreOptions`.

    Returns:
      A `FederatedAlgorithm`, whose `init` needs `num_clients`. `state.store` holds the $c_i$,
      `state.opt_state.control` is $c$. A client must not be twice in a cohort.

    Raises:
      ValueError: `option` is neither 1 nor 2; another option is out of range.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> algorithm = scaffold(model, optax.sgd(0.5), num_steps=2)
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [4.0]}, "b": {"x": [8.0]}})
    >>> state = algorithm.init(jnp.float32(0.0), num_clients=2)
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(1), state, everyone)
    >>> print(state.store, state.opt_state.control)  # Gradients -4, -2 and -8, -4.
    [-3. -6.] -4.5
    """
    options = complete(scaffold, options)
    if option not in (1, 2):
        raise ValueError(f"option is {option!r}; choose 1 or 2.")
    client_weight = server.resolve_weighting(weighting)
    optimizer = local.resolve_optimizer(client_optimizer)

    def client_init(shared: ServerState, client: Client) -> _ClientState:
        trained = local.start(shared, optimizer(shared))
        # Sums of many terms: in float32 at least.
        return _ClientState(trained, widen(optax.tree.zeros_like(client.entry)))

    def client_step(
        shared: ServerState,
        client: Client,
        client_state: _ClientState,
        batch: Batch,
        key: jax.Array,
    ) -> _ClientState:
        (trained, total), control = client_state, client.entry
        gradient, aux = local.gradient(model, trained.params, trained, batch, key)
        if option == 1:
            at_server, _ = local.gradient(model, shared.params, trained, batch, key)
            total = optax.tree.add_scale(total, batch["mask"].sum(), at_server)
        else:
            total = optax.tree.add(total, gradient)
        corrected = jax.tree.map(
            lambda g, own, mean: g - own + mean, gradient, control, shared.opt_state.control
        )
        return _ClientState(local.descend(optimizer(shared), trained, corrected, aux, batch), total)

    def client_final(
        shared: ServerState, client: Client, client_state: _ClientState
    ) -> ClientResult:
        (trained, total), control = client_state, client.entry
        count = trained.num_examples if option == 1 else trained.num_steps
        after = optax.tree.scale(1 / jnp.maximum(count, 1).astype(float), total)
        after = optax.tree.cast_like(after, control)
        return local.result(shared, trained, client_weight(client, trained.num_examples))._replace(
            entry=after, statistics=optax.tree.sub(widen(after), widen(control))
        )

    return server.federated_algorithm(
        model,
        ClientUpdate(client_init, client_step, client_final, entry=local.zeros),
        _with_control(server.resolve_server_optimizer(server_optimizer)),
        broadcast=lambda state: (state.params, state.model_state, state.opt_state.control),
        **options,
    )


def _with_control(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """A server optimizer that keeps the control variate beside its own state."""

    def init(params: PyTree) -> ScaffoldState:
        return ScaffoldState(inner.init(params), optax.tree.zeros_like(params))

    def update(
        updates: PyTree,
        state: ScaffoldState,
        params: PyTree = None,
        *,
        statistics: PyTree,
        num_clients: int,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaffoldState]:
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        control = optax.tree.add_scale(state.control, 1 / num_clients, statistics)
        return updates, ScaffoldState(inner_state, optax.tree.cast_like(control, state.control))

    return optax.GradientTransformationExtraArgs(init, update)
