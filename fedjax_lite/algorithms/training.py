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
from fedjax_lite.models.names import Names, matching, merge, names_of, split

Objective: TypeAlias = Callable[
    [jax.Array, PyTree, ServerState, Client, Batch, jax.Array], jax.Array
]
"""`objective(loss, params, server, client, batch, key)`, what a client descends."""
_Model: TypeAlias = tuple[PyTree, PyTree]  # Params and model state.


class Kept(NamedTuple):
    """What a client keeps that has params of its own, or whose optimizer keeps its state.

    Attributes:
      entry: What it keeps besides.
      opt_state: State of its optimizer after its last step; `()` if it begins afresh.
      personal: Its own params and model state, with `None` in place of those that are shared.
    """

    entry: PyTree
    opt_state: PyTree
    personal: PyTree


def local_training(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    *,
    weighting: server.Weighting = "examples",
    begin: Callable[[ServerState, Client], PyTree] | None = None,
    objective: Objective | None = None,
    finish: Callable[[ClientResult, ServerState, Client, local.LocalState], ClientResult]
    | None = None,
    entry: Callable[[ServerState], PyTree] | None = None,
    personal: Names | None = None,
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
        place of `loss`, the mean loss of the batch at `params`, to which it may add a term. Its
        `params` are those that are shared.
      finish: `finish(result, server, client, trained) -> ClientResult` to send, made of the
        `result` of `fed_avg` by `result._replace(...)`; `trained` is the client's `LocalState`.
      entry: What clients keep, as in `ClientUpdate`; `finish` replaces it.
      personal: As in `fed_avg`. The store then holds `(entry, opt_state, personal)` for each
        client; the hooks see its `client.entry` alone.
      keep_optimizer_state: As in `fed_avg`, with the same store.
      measure_clients: As in `fed_avg`.

    Returns:
      A `ClientUpdate`, for `federated_algorithm`.

    Raises:
      ValueError: `weighting` or a switch is none of its values; in a round, `objective` returns no
        scalar.
        In `algorithm.init`, `personal` matches nothing.
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
    ...     objective=objective, finish=finish,
    ...     entry=lambda server: optax.tree.zeros_like(server.params),
    ... )
    >>> algorithm = fl.federated_algorithm(model, client_update, optax.sgd(1.0))
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [4.0]}, "b": {"x": [8.0]}})
    >>> state = algorithm.init(jnp.float32(0.0), num_clients=2)
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(1), state, everyone)
    >>> print(state.params, state.store)  # Steps of 1/2 from 0 towards 4 and 8.
    3.0 [-1. -2.]
    """
    _validate.choice("keep_optimizer_state", keep_optimizer_state, (True, False))
    client_weight = server.resolve_weighting(weighting)
    optimizer = local.resolve_optimizer(client_optimizer)
    matches = matching("personal", () if personal is None else personal)
    keeps_more = keep_optimizer_state or personal is not None

    def parts(params: PyTree, model_state: PyTree) -> tuple[_Model, _Model]:
        """What is shared of a client's model, and what is its own."""
        both = split(params, matches), split(model_state, matches)
        (params, own_params), (model_state, own_state) = both
        return (params, model_state), (own_params, own_state)

    def client_model(shared: ServerState, kept: Kept) -> _Model:
        params, model_state = kept.personal
        return merge(shared.params, params), merge(shared.model_state, model_state)

    def own(client: Client) -> Client:
        return client._replace(entry=client.entry.entry) if keeps_more else client

    def init(shared: ServerState, client: Client) -> local.LocalState:
        start = shared
        if begin is not None:
            start = dataclasses.replace(start, params=begin(shared, own(client)))
        if personal is not None:
            start = _with_model(start, client_model(start, client.entry))
        trained = local.start(start, optimizer(shared))
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
                shared_params, _ = split(params, matches)
                value = objective(value, shared_params, shared, own(client), batch, key)
                if jax.numpy.shape(value) != ():
                    raise ValueError(
                        f"objective returned an array {jax.numpy.shape(value)}; return a scalar, as"
                        " loss is."
                    )
            return value, aux

        (value, aux), gradient = jax.value_and_grad(descended, has_aux=True)(trained.params)
        # What line searches take.
        searched = {"value": value, "grad": gradient, "value_fn": lambda at: descended(at)[0]}
        return local.descend(optimizer(shared), trained, gradient, aux, batch, **searched)

    def final(shared: ServerState, client: Client, trained: local.LocalState) -> ClientResult:
        weight = client_weight(client, trained.num_examples)
        (params, model_state), _ = parts(trained.params, trained.model_state)
        sent = trained._replace(params=params, model_state=model_state)
        result = local.result(shared, sent, weight)
        if finish is not None:
            finished = finish(result, shared, own(client), trained)
            _validate.instance("what finish returned", finished, ClientResult)
            if finished.update is not result.update and finished.norm is result.norm:
                finished = finished._replace(norm=None)  # That of another update.
            result = finished
        if keeps_more:
            kept = own(client).entry if result.entry is None else result.entry
            result = result._replace(entry=keep(kept, trained))
        return result

    def keep(entry: PyTree, trained: local.LocalState) -> Kept:
        _, personal = parts(trained.params, trained.model_state)
        return Kept(entry, trained.opt_state if keep_optimizer_state else (), personal)

    def shared_of(drawn: ServerState) -> _Model:
        shared, own = parts(drawn.params, drawn.model_state)
        if not jax.tree.leaves(own):
            names = ", ".join(names_of(drawn.params) + names_of(drawn.model_state))
            raise ValueError(
                f"personal is {personal!r}, which matches none of the names {names}; choose some."
            )
        return shared

    def entry_of(drawn: ServerState) -> PyTree:
        shared = drawn if personal is None else _with_model(drawn, shared_of(drawn))
        kept = () if entry is None else entry(shared)
        return keep(kept, local.start(drawn, optimizer(drawn))) if keeps_more else kept

    return ClientUpdate(
        init,
        step,
        final,
        measure=local.measure(model, measure_clients),
        entry=None if entry is None and not keeps_more else entry_of,
        shared=None if personal is None else shared_of,
        client_model=None if personal is None else client_model,
    )


def _with_model(state: ServerState, model: _Model) -> ServerState:
    params, model_state = model
    return dataclasses.replace(state, params=params, model_state=model_state)


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
