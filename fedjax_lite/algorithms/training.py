"""Local training, of which the algorithms differ in a term of the objective and in what is kept."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import optax

from fedjax_lite import _validate
from fedjax_lite.algorithms import local, server
from fedjax_lite.base import Batch, Client, ClientResult, ClientUpdate, PyTree, ServerState
from fedjax_lite.models.model import Model

Objective: TypeAlias = Callable[
    [jax.Array, PyTree, ServerState, Client, Batch, jax.Array], jax.Array
]
"""`objective(loss, params, server, client, batch, key)`, what a client descends."""


class Kept(NamedTuple):
    """What a client keeps whose optimizer keeps its state.

    Attributes:
      entry: What it keeps besides.
      opt_state: State of its optimizer after its last step.
    """

    entry: PyTree
    opt_state: PyTree


def local_training(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    *,
    weighting: server.Weighting = "examples",
    begin: Callable[[ServerState, Client], PyTree] | None = None,
    objective: Objective | None = None,
    finish: Callable[[ClientResult, ServerState, Client, local.LocalState], ClientResult]
    | None = None,
    entry: Callable[[PyTree], PyTree] | None = None,
    keep_optimizer_state: bool = False,
    measure_clients: bool = False,
) -> ClientUpdate:
    r"""The client update of `fed_avg`, with hooks for what other algorithms do otherwise.

    A client starts from the server's params $w$, takes its steps with the client optimizer on the
    mean loss of each batch, ends at $w_i$, and sends $w - w_i$.

    Args:
      model: The model.
      client_optimizer: As in `fed_avg`.
      weighting: As in `fed_avg`.
      begin: `begin(server, client) -> params` to start from, in place of `server.params`.
      objective: `objective(loss, params, server, client, batch, key) -> scalar` to descend, in
        place of `loss`, the mean loss of the batch at `params`, to which it may add a term.
      finish: `finish(result, server, client, trained) -> ClientResult` to send, made of the
        `result` of `fed_avg` by `result._replace(...)`; `trained` is the client's `LocalState`.
      entry: What clients keep, as in `ClientUpdate`; `finish` replaces it.
      keep_optimizer_state: As in `fed_avg`. The store then holds a pair `(entry, opt_state)` for
        each client; the hooks see its `client.entry` alone.
      measure_clients: As in `fed_avg`.

    Returns:
      A `ClientUpdate`, for `federated_algorithm`.

    Raises:
      ValueError: `weighting` or a switch is none of its values; in a round, `objective` returns no
        scalar.
      TypeError: `client_optimizer` makes no optimizer.

    FedDyn (Acar et al., 2021, "Federated Learning Based on Dynamic Regularization"), whose clients
    keep a gradient $h_i$ and descend $f(w_i) - \langle h_i, w_i \rangle
    + \frac{\alpha}{2} \|w_i - w\|^2$:

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> alpha = 0.5
    >>> def objective(loss, params, server, client, batch, key):
    ...     moved = optax.tree.sub(params, server.params)
    ...     pull = alpha / 2 * optax.tree.norm(moved, squared=True)
    ...     return loss - optax.tree.vdot(client.entry, params) + pull
    >>> def finish(result, server, client, trained):
    ...     return result._replace(entry=optax.tree.add_scale(client.entry, alpha, result.update))
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> client_update = local_training(
    ...     model, optax.sgd(0.5), weighting="uniform",
    ...     objective=objective, finish=finish, entry=optax.tree.zeros_like,
    ... )
    >>> algorithm = fl.federated_algorithm(model, client_update, optax.sgd(1.0))
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [4.0]}, "b": {"x": [8.0]}})
    >>> state = algorithm.init(jnp.float32(0.0), num_clients=2)
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(1), state, everyone)
    >>> float(state.params), state.store.tolist()  # Steps of 1/2 from 0 towards 4 and 8.
    (3.0, [-1.0, -2.0])
    """
    _validate.choice("keep_optimizer_state", keep_optimizer_state, (True, False))
    client_weight = server.resolve_weighting(weighting)
    optimizer = local.resolve_optimizer(client_optimizer)

    def own(client: Client) -> Client:
        return client._replace(entry=client.entry.entry) if keep_optimizer_state else client

    def init(shared: ServerState, client: Client) -> local.LocalState:
        params = shared.params if begin is None else begin(shared, own(client))
        trained = local.start(dataclasses.replace(shared, params=params), optimizer(shared))
        if keep_optimizer_state:
            trained = trained._replace(opt_state=client.entry.opt_state)
        return trained

    def step(
        shared: ServerState,
        client: Client,
        trained: local.LocalState,
        batch: Batch,
        key: jax.Array,
    ) -> local.LocalState:
        loss = local.batch_loss(model, trained.model_state, batch, key, mean=True)

        def descended(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
            value, aux = loss(params)
            if objective is not None:
                value = objective(value, params, shared, own(client), batch, key)
                if jax.numpy.shape(value) != ():
                    raise ValueError(
                        f"objective returned an array {jax.numpy.shape(value)}; return a scalar, as"
                        " loss is."
                    )
            return value, aux

        gradient, aux = jax.grad(descended, has_aux=True)(trained.params)
        return local.descend(optimizer(shared), trained, gradient, aux, batch)

    def final(shared: ServerState, client: Client, trained: local.LocalState) -> ClientResult:
        weight = client_weight(client, trained.num_examples)
        result = local.result(shared, trained, weight)
        if finish is not None:
            finished = finish(result, shared, own(client), trained)
            _validate.instance("what finish returned", finished, ClientResult)
            if finished.update is not result.update and finished.norm is result.norm:
                finished = finished._replace(norm=None)  # That of another update.
            result = finished
        if keep_optimizer_state:
            kept = own(client).entry if result.entry is None else result.entry
            result = result._replace(entry=Kept(kept, trained.opt_state))
        return result

    def entry_of(params: PyTree) -> PyTree:
        kept = () if entry is None else entry(params)
        if not keep_optimizer_state:
            return kept
        begun = ServerState(params=params, model_state={}, opt_state=(), round=jax.numpy.int32(0))
        return Kept(kept, optimizer(begun).init(params))

    keeps = entry is not None or keep_optimizer_state
    measure = local.measure(model, measure_clients)
    return ClientUpdate(init, step, final, measure, entry_of if keeps else None)


def proximal(mu: jax.typing.ArrayLike) -> Objective:
    r"""The loss and $\frac{\mu}{2} \|w_i - w\|^2$."""

    def objective(
        loss: jax.Array,
        params: PyTree,
        shared: ServerState,
        client: Client,
        batch: Batch,
        key: jax.Array,
    ) -> jax.Array:
        del client, batch, key
        moved = optax.tree.sub(params, shared.params)
        return loss + mu / 2 * optax.tree.norm(moved, squared=True)

    return objective
