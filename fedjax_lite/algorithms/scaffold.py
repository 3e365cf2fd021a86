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
    """What a client carries from step to step.

    Attributes:
      trained: Its model.
      correction: $c - c_i$.
      total: The sum of its gradients; `None` if its params tell.
    """

    trained: local.LocalState
    correction: PyTree
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
      this is the paper's $c_i - c + \frac{w - y}{K \eta}$ after $K$ steps, from which it is
      computed if $\eta$ is a number of Python; gradients are summed up otherwise.

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

    def rate(shared: ServerState) -> float | None:
        """The rate of a client whose estimate follows from how far it came."""
        wide = all(x.dtype.itemsize >= 4 for x in jax.tree.leaves(shared.params))
        return local.rate_of_sgd(optimizer(shared), shared.params) if option == 2 and wide else None

    def client_init(shared: ServerState, client: Client) -> _ClientState:
        correction = optax.tree.sub(shared.opt_state.control, client.entry)
        total = None
        if rate(shared) is None:  # A sum of many terms: in float32 at least.
            total = widen(optax.tree.zeros_like(client.entry))
        return _ClientState(local.start(shared, optimizer(shared)), correction, total)

    def client_step(
        shared: ServerState,
        client: Client,
        client_state: _ClientState,
        batch: Batch,
        key: jax.Array,
    ) -> _ClientState:
        trained, correction, total = client_state
        gradient, aux = local.gradient(model, trained.params, trained, batch, key)
        if option == 1:
            at_server, _ = local.gradient(model, shared.params, trained, batch, key)
            total = optax.tree.add_scale(total, batch["mask"].sum(), at_server)
        elif total is not None:
            total = optax.tree.add(total, gradient)
        corrected = optax.tree.add(gradient, correction)
        trained = local.descend(optimizer(shared), trained, corrected, aux, batch)
        return _ClientState(trained, correction, total)

    def client_final(
        shared: ServerState, client: Client, client_state: _ClientState
    ) -> ClientResult:
        trained, correction, total = client_state
        result = local.result(shared, trained, client_weight(client, trained.num_examples))
        count = trained.num_examples if option == 1 else trained.num_steps
        share = 1 / jnp.maximum(count, 1).astype(float)
        if (eta := rate(shared)) is None:
            after = optax.tree.scale(share, total)
        else:
            after = optax.tree.sub(optax.tree.scale(share / eta, result.update), correction)
        after = optax.tree.cast_like(after, client.entry)
        change = optax.tree.sub(widen(after), widen(client.entry))
        return result._replace(entry=after, statistics=change)

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
