"""The server's half of a round, and what makes it an algorithm."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_lite import _validate
from fedjax_lite.algorithms import local
from fedjax_lite.algorithms.options import StoreOptions, complete, documented
from fedjax_lite.algorithms.report import num_bits, round_info
from fedjax_lite.algorithms.versions import read_versions, with_versions, write_version
from fedjax_lite.base import (
    Client,
    ClientUpdate,
    Cohort,
    FederatedAlgorithm,
    Guarantees,
    PyTree,
    Received,
    Reducer,
    RoundInfo,
    ServerState,
    UpdateTransform,
)
from fedjax_lite.engine.batches import DEFAULT_BATCH_SIZE, KEY_SERVER, Batching, adapt_batch_size
from fedjax_lite.engine.execution import Execution
from fedjax_lite.engine.file_store import around_files
from fedjax_lite.engine.frozen import frozen_given
from fedjax_lite.engine.runner import ON_NONFINITE, run_clients
from fedjax_lite.engine.store import STORES, create_store
from fedjax_lite.engine.waves import CohortResult, Versions
from fedjax_lite.models.model import Model
from fedjax_lite.updates.pipeline import announced, check_reducer, first_entry, send_through
from fedjax_lite.updates.reducers import weighted_mean
from fedjax_lite.xla import random
from fedjax_lite.xla.cpu import Paced, jit_once, warn_if_unconfigured
from fedjax_lite.xla.mesh import replicate
from fedjax_lite.xla.rows import map_rows

_WEIGHTS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "examples": lambda owned, processed: owned,
    "uniform": lambda owned, processed: jnp.ones(()),
    "processed": lambda owned, processed: processed,
    "sqrt": lambda owned, processed: jnp.sqrt(owned),
    "log": lambda owned, processed: jnp.log1p(owned),
}
Weighting = (
    Literal["examples", "uniform", "processed", "sqrt", "log"] | Callable[[jax.Array], jax.Array]
)


def resolve_weighting(weighting: Weighting) -> Callable[[Client, jax.Array], jax.Array]:
    """The function `(client, number of examples processed) -> weight`.

    Raises:
      ValueError: `weighting` is none of the names, or does not return a scalar.
    """
    if callable(weighting):
        return lambda client, processed: _validate.scalar(
            "what weighting returned", weighting(client.num_examples.astype(float))
        )
    _validate.choice("weighting", weighting, tuple(_WEIGHTS))
    return lambda client, processed: _WEIGHTS[weighting](
        client.num_examples.astype(float), processed.astype(float)
    )


def resolve_server_optimizer(
    server_optimizer: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    """The server optimizer, `optax.sgd(1.0)` by default, in the form that takes extra arguments.

    Raises:
      TypeError: It is no transformation.
    """
    return _checked(optax.sgd(1.0) if server_optimizer is None else server_optimizer)


def _checked(
    server_optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    local.refuse_uncalled("server_optimizer", server_optimizer)
    example = "optax.sgd(1.0), or optax.sgd(schedule) for a rate that changes between rounds"
    _validate.instance("server_optimizer", server_optimizer, optax.GradientTransformation, example)
    return optax.with_extra_args_support(server_optimizer)


@documented
def federated_algorithm(
    model: Model,
    client_update: ClientUpdate,
    server_optimizer: optax.GradientTransformation,
    *,
    broadcast: Callable[[ServerState], PyTree] | None = None,
    **options: Unpack[StoreOptions],
) -> FederatedAlgorithm:
    """An algorithm of one's own, from what a single client computes.

    The server optimizer is given what the `reducer` makes of the clients' updates, their weighted
    mean by default, as its gradient, and
    the arguments `statistics`, what clients send beside, and `num_clients`, the size of the
    population, if it takes extra arguments.

    Args:
      model: The model, which draws params where `init` is given a key.
      client_update: What a client computes. What the server broadcasts is its `ServerState`,
        with an empty `store`. If clients keep something (`client_update.entry`), `init` needs
        `num_clients`, and `state.store` holds arrays `[num_clients, ...]`. A round returns a new
        store; let it reuse the memory of the old one by
        `jax.jit(algorithm.round, donate_argnames="state")`, or by a `scan` over rounds.
      server_optimizer: Any optax transformation, also one of
        `optax.GradientTransformationExtraArgs`.
      broadcast: `broadcast(state)`, what of the state is sent to clients, whose size is reported;
        params and model state by default.
      **options: Those of `StoreOptions`.

    Returns:
      A `FederatedAlgorithm`, whose `round` takes and returns a `ServerState`.

    Raises:
      ValueError: An option is out of range, at once; `num_clients` is missing in `init`; in a
        round, the store is of another population than the cohort, or not of the form of what
        clients keep.
      TypeError: An option is unknown.

    A client that takes one gradient step towards its own data, and counts its rounds:

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> def init(server, client):
    ...     return server.params
    >>> def step(server, client, w, batch, key):
    ...     loss = lambda w: model.loss(w, {}, batch, key)[0].mean(where=batch["mask"])
    ...     return w - 0.5 * jax.grad(loss)(w)
    >>> def final(server, client, w):
    ...     return fl.ClientResult(server.params - w, 1.0, entry=client.entry + 1)
    >>> algorithm = federated_algorithm(
    ...     model,
    ...     fl.ClientUpdate(init, step, final, entry=lambda server: jnp.int32(0)),
    ...     optax.sgd(1.0),
    ... )
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [4.0]}, "b": {"x": [8.0]}})
    >>> state = algorithm.init(jnp.float32(0.0), num_clients=2)
    >>> cohort = fl.cohort(jax.random.key(1), dataset.resident(), 1)
    >>> state, info = algorithm.round(jax.random.key(0), state, cohort)
    >>> sorted(state.store.tolist()), float(state.params) in (2.0, 4.0)
    ([0, 1], True)
    """
    options = complete(federated_algorithm, options)
    _validate.instance("model", model, Model, "fl.function_model(loss)")
    _validate.instance("client_update", client_update, ClientUpdate)
    _validate.choice("shuffle", options["shuffle"], (True, False))
    _validate.choice("on_nonfinite", options["on_nonfinite"], ON_NONFINITE)
    execution, batch_size = Execution.of(options), options["batch_size"]
    drop = options["on_nonfinite"] == "drop"
    num_versions = 1 + _validate.integer("max_staleness", options["max_staleness"], minimum=0)
    batching = Batching(
        batch_size=DEFAULT_BATCH_SIZE if batch_size is None else batch_size,
        num_epochs=options["num_epochs"],
        num_steps=options["num_steps"],
        shuffle=options["shuffle"],
    )
    own = client_update
    pipeline, reducer = options["pipeline"], options["reducer"]
    reducer = weighted_mean() if reducer is None else reducer
    _validate.instance("reducer", reducer, Reducer, "fl.coordinate_median()")
    known = Guarantees()
    if pipeline is not None:
        _validate.instance("pipeline", pipeline, UpdateTransform)
        known = pipeline.guarantees(known, None)
        check_reducer(known, reducer, drop=drop)
        client_update = send_through(pipeline, client_update)
    optimizer = local.named("server_optimizer", _checked(server_optimizer))

    def pipeline_entry_of(params: PyTree) -> PyTree:
        return () if pipeline is None else first_entry(pipeline, params)

    keeps = own.entry is not None or (pipeline is not None and pipeline.entry is not None)
    if num_versions > 1:
        _check_late(own, pipeline, sends_more=broadcast is not None)

    @jit_once
    def build(key_or_params: PyTree, model_state: PyTree | None) -> tuple[ServerState, PyTree]:
        """The state without stores, and what a client keeps before its first round."""
        if random.is_key(key_or_params):
            params, drawn_state = model.init(key_or_params)
            model_state = drawn_state if model_state is None else model_state
        else:
            params, model_state = key_or_params, {} if model_state is None else model_state
        _validate.params(params)
        # With a dtype of their own: a weakly typed leaf would have the second round compile
        # again.
        params, frozen = (params, ()) if model.split is None else model.split(params)
        params, model_state, frozen = _validate.strong((params, model_state, frozen))
        drawn = ServerState(
            params=params, model_state=model_state, opt_state=(), round=jnp.int32(0)
        )
        entry = () if own.entry is None else own.entry(drawn)
        if own.shared is not None:
            params, model_state = own.shared(drawn)
        state = dataclasses.replace(
            drawn,
            params=params,
            model_state=model_state,
            opt_state=optimizer.init(params),
            pipeline_state=() if pipeline is None else pipeline.init(params),
            last_aggregate=optax.tree.zeros_like(params) if reducer.keeps_last else (),
            frozen=frozen,
        )
        return with_versions(state, num_versions), (entry, pipeline_entry_of(params))

    def init(
        key_or_params: PyTree,
        model_state: PyTree | None = None,
        *,
        num_clients: int | None = None,
    ) -> ServerState:
        if random.is_key(key_or_params):
            _validate.key("key_or_params", key_or_params)
        else:
            _validate.params(key_or_params)
        if num_clients is None and keeps:
            raise ValueError(
                "num_clients is None, and clients of this algorithm keep something between rounds;"
                " pass the size of the population."
            )
        state, entries = build(key_or_params, model_state)
        state = replicate(state, execution.mesh)
        if not keeps or num_clients is None:
            return state
        num_clients = _validate.integer("num_clients", num_clients, minimum=1)
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(entries))
        store, pipeline_store = create_store(
            entries, num_clients, execution.memory_kind, execution.mesh, traced=traced
        )
        return dataclasses.replace(state, store=store, pipeline_store=pipeline_store)

    def check(key: jax.Array, state: ServerState, cohort: Cohort) -> None:
        _validate.key("key", key)
        _validate.instance("cohort", cohort, Cohort, "fl.cohort(key, population, 10)")
        _validate.instance("state", state, ServerState, "algorithm.init(key)")
        made = {"opt_state": optimizer.init}
        if pipeline is not None:  # Without one, the state of another one is only passed on.
            made["pipeline_state"] = pipeline.init
        if own.shared is None:  # What clients have of their own is not in the params.
            made["store"] = lambda params: (
                () if own.entry is None else own.entry(dataclasses.replace(state, params=params))
            )
        made["pipeline_store"] = pipeline_entry_of
        if reducer.keeps_last:
            made["last_aggregate"] = lambda params: params
        _check_state(state, made)

    def plain_bits(server: ServerState) -> float:
        down = (server.params, server.model_state) if broadcast is None else broadcast(server)
        return num_bits(down)

    def send_down(key: jax.Array, server: ServerState, cohort: Cohort) -> tuple[ServerState, Any]:
        """What clients receive of the server, and its bits."""
        received, bits = dataclasses.replace(server, last_aggregate=()), plain_bits(server)
        if pipeline is None:
            return received, bits
        shown = announced(pipeline, key, server.pipeline_state, cohort)
        received = dataclasses.replace(received, pipeline_state=shown)
        if pipeline.broadcast is not None:
            params, encoded = pipeline.broadcast(key, shown, server.params)
            received = dataclasses.replace(received, params=params)
            bits += 0 if encoded is None else encoded - num_bits(server.params)
        return received, bits

    def message_bits(key_or_params: PyTree) -> tuple[float, float]:
        sizes: list[float] = []

        def send(key: jax.Array, key_or_params: PyTree) -> None:
            """What a client is sent, and sends, its steps left out, which change no shape."""
            state, entries = build(key_or_params, None)
            server = dataclasses.replace(state, versions=(), frozen=())
            number = jnp.zeros(1, jnp.int32)
            one = Cohort(
                client_ids=number, num_examples=number, offsets=number, examples={}, num_clients=1
            )
            received, down = send_down(key, server, one)
            entry = entries[0] if pipeline is None else entries
            client = Client(number[0], number[0], number[0], entry, key, number[0])
            with frozen_given(state.frozen):
                begun = _validate.strong(client_update.init(received, client))
                result = client_update.final(received, client, begun)
            up = result.metrics.get("bits_up")
            beside = num_bits(_validate.strong((result.model_state, result.statistics)))
            # What is no number of Python depends on values.
            sizes.append(down if isinstance(down, int | float) else plain_bits(server))
            sizes.append(beside + (up if isinstance(up, int | float) else num_bits(server.params)))

        jax.eval_shape(send, random.fast(jax.random.key(0)), key_or_params)
        return sizes[0], sizes[1]

    def train(
        key: jax.Array,
        state: ServerState,
        received: ServerState,
        cohort: Cohort,
        versions: Versions | None,
    ) -> CohortResult:
        """What clients make of what they received, and keep."""
        return run_clients(
            client_update,
            received,
            cohort,
            key,
            batching=adapt_batch_size(cohort, batching, batch_size),
            store=state.store if pipeline is None else (state.store, state.pipeline_store),
            versions=versions,
            frozen=state.frozen,
            last_aggregate=state.last_aggregate,
            on_nonfinite=options["on_nonfinite"],
            reducer=reducer,
            execution=execution,
        )

    def aggregate(
        key: jax.Array,
        server: ServerState,
        cohort: Cohort,
        versions: Versions | None,
        result: CohortResult,
    ) -> _Aggregated:
        """What the reducer and the pipeline make of what clients sent."""
        is_empty = result.weight == 0
        # Whether anyone took part is private, too.
        skip = jnp.bool_(False) if known.is_private else is_empty
        weight = jnp.where(is_empty, 1, result.weight)
        update, statistics = result.update, result.statistics
        if reducer.finish is not None:
            update = reducer.finish(update, weight)
        metrics = result.reported
        if reducer.keeps_last:
            last = _like_params(update, server.params)
            server = dataclasses.replace(server, last_aggregate=last)
        if pipeline is not None:
            statistics, of_pipeline = statistics
            _check_clear(known, result.model_state, statistics)
            bounds = pipeline.guarantees(Guarantees(), server.pipeline_state)
            drift = functools.partial(_drift, server, versions, reducer, result, weight)
            sent = Received(
                aggregate=update,
                statistics=of_pipeline,
                sensitivity=reducer.sensitivity(bounds),
                weights=result.clients["weight"],
                cohort=cohort,
                # Who takes part decides on it, and no noise is on that.
                drift=None if known.is_private else drift,
                released=bounds.released,
            )
            sent, pipeline_state, told = pipeline.server(key, server.pipeline_state, sent)
            _validate.instance("what the server half of the pipeline returned", sent, Received)
            update, metrics = sent.aggregate, metrics | told
            skip |= ~is_empty & ~jnp.any(sent.weights != 0)
            server = dataclasses.replace(server, pipeline_state=pipeline_state)
        model_state = _mean_state(result.model_state, weight, is_empty, server.model_state)
        update = _like_params(update, server.params)
        return _Aggregated(update, model_state, statistics, metrics, skip, server)

    def keep(state: ServerState, server: ServerState, result: CohortResult) -> ServerState:
        """The state after the round, with what is kept beside what the server changes."""
        store, pipeline_store = (result.store, ()) if pipeline is None else result.store
        return dataclasses.replace(
            server,
            store=store,
            pipeline_store=pipeline_store,
            round=state.round + 1,
            versions=write_version(state, server, num_versions),
            frozen=state.frozen,
        )

    @jax.jit
    def round(key: jax.Array, state: ServerState, cohort: Cohort) -> tuple[ServerState, RoundInfo]:
        warn_if_unconfigured()
        check(key, state, cohort)
        server = dataclasses.replace(state, store=(), pipeline_store=(), versions=(), frozen=())
        # By the number of the round, too: a caller's key may be that of an earlier one, whose noise
        # a difference of the two would take off.
        key_server = random.fold_in_pair(key, KEY_SERVER, state.round)
        without_examples = dataclasses.replace(cohort, examples={})
        received, down_bits = send_down(key_server, server, without_examples)
        versions = read_versions(state, cohort, num_versions)
        result = train(key, state, received, cohort, versions)
        found = aggregate(key_server, server, without_examples, versions, result)
        after = _step(optimizer, server, found, cohort)
        after = keep(state, after, result)
        nonfinite = result.clients["nonfinite"]
        left_out = nonfinite if drop else jnp.zeros_like(nonfinite)
        info = round_info(
            *(cohort, result, found.update, server, down_bits, found.skip, left_out, found.metrics)
        )
        return after, info

    guarantees = None if pipeline is None else lambda: known
    playing = Paced(round, check, around_files)
    return FederatedAlgorithm(init, playing, own.client_model, guarantees, message_bits)


class _Aggregated(NamedTuple):
    """What the server has of a round's clients, before it takes its step.

    Attributes:
      update: What the server optimizer is given, in the dtypes of the params.
      model_state: The model state after the round.
      statistics: What clients send beside.
      metrics: What the reducer and the server half of the pipeline report.
      skip: Whether no client contributed.
      server: The state before the round, with what the reducer and the pipeline keep of this one.
    """

    update: PyTree
    model_state: PyTree
    statistics: PyTree
    metrics: dict[str, jax.Array]
    skip: jax.Array
    server: ServerState


def _check_late(own: ClientUpdate, pipeline: UpdateTransform | None, *, sends_more: bool) -> None:
    """Refuses what has no meaning for clients that start from past versions of the params.

    Raises:
      ValueError: They keep something, or start from more than params and model state.
    """
    twice = "something between rounds, which one that comes twice in a buffer would read too early"
    for holds, reason in (
        (
            own.entry is not None,
            f"clients of the algorithm keep {twice}; choose one such as fl.fed_avg.",
        ),
        (
            sends_more,
            "clients of the algorithm start from more of the server's state than params and model"
            " state, of which alone there are past versions; choose one such as fl.fed_avg.",
        ),
        (
            pipeline is not None and pipeline.entry is not None,
            f"pipeline has clients keep {twice}; leave error feedback out.",
        ),
        (
            pipeline is not None and pipeline.broadcast is not None,
            "pipeline changes what the server sends, of which past versions are kept as they were;"
            " leave fl.downlink or fl.power_sgd out.",
        ),
    ):
        if holds:
            raise ValueError(f"max_staleness is above 0, and {reason}")


def _check_clear(known: Guarantees, model_state: PyTree, statistics: PyTree) -> None:
    """Refuses what clients send in the clear beside updates that noise is added to."""
    if known.is_private and jax.tree.leaves((model_state, statistics)):
        raise ValueError(
            "pipeline adds noise to updates, and clients send model state or statistics beside"
            " them, in the clear; choose a model without, such as one with GroupNorm in place of"
            " BatchNorm, or an algorithm that sends updates alone."
        )


def _mean_state(
    total: PyTree, weight: jax.Array, is_empty: jax.Array, model_state: PyTree
) -> PyTree:
    """The mean of the clients' model states; that of the server if they leave it, or are none."""
    if not jax.tree.leaves(total):
        return model_state
    remedy = "return the model state that the client has come to, or None."
    of = "the model_state of client_update.final"
    _validate.same_form(of, total, model_state, remedy, dtypes=False)
    mean = optax.tree.scale(1 / weight, total)
    return jax.tree.map(
        lambda new, old: jnp.where(is_empty, old, _round_like(new, old)), mean, model_state
    )


def _drift(
    server: ServerState,
    versions: Versions | None,
    reducer: Reducer,
    result: CohortResult,
    weight: jax.Array,
) -> PyTree:
    """What `Received.drift` returns."""
    if versions is None:
        return optax.tree.zeros_like(server.params)
    if reducer.finish is None:
        raise ValueError(
            "reducer looks at single updates, and the pipeline asks for a mean of where clients"
            " started; choose one that adds up, such as fl.weighted_mean()."
        )
    past, weights = versions.fields["params"], result.clients["weight"]
    number = jax.tree.leaves(past)[0].shape[0]
    of_versions = jnp.zeros(number, weights.dtype).at[versions.places].add(weights)
    moved = jax.tree.map(
        lambda new, old: of_versions.sum() * new - jnp.tensordot(of_versions, old, 1),
        server.params,
        past,
    )
    return reducer.finish(moved, weight)


def _like_params(aggregate: PyTree, params: PyTree) -> PyTree:
    """The aggregate in the dtypes of the params, checked to be of their form."""
    remedy = "return a difference of params."
    of = "the update of client_update.final"
    _validate.same_form(of, aggregate, params, remedy, dtypes=False)
    # A mean of float32 sums would leave optimizer state of another dtype than params have.
    return optax.tree.cast_like(aggregate, params)


def _step(
    optimizer: optax.GradientTransformationExtraArgs,
    server: ServerState,
    found: _Aggregated,
    cohort: Cohort,
) -> ServerState:
    """The server's step along the aggregate; none where the round is skipped."""
    updates, opt_state = optimizer.update(
        found.update,
        server.opt_state,
        server.params,
        statistics=found.statistics,
        num_clients=cohort.num_clients,
    )
    after = dataclasses.replace(
        found.server,
        params=optax.apply_updates(server.params, updates),
        model_state=found.model_state,
        opt_state=opt_state,
    )
    return jax.tree.map(lambda new, old: jnp.where(found.skip, old, new), after, server)


def _check_state(state: ServerState, made: Mapping[str, Callable[[PyTree], PyTree]]) -> None:
    """Refuses the state of another algorithm; that of another model fails where it is used.

    Args:
      state: The state.
      made: By field, what makes it of params; of a store, the entry of one client.
    """
    remedy = (
        "pass a state of this algorithm's init and rounds, or algorithm.init(state.params) to go on"
        " with another one's params."
    )
    for name, make in made.items():
        given = getattr(state, name)
        if name in STORES:
            given = map_rows(lambda x: jax.ShapeDtypeStruct(np.shape(x)[1:], float), given)
            name += ", for one client,"
        expected = jax.eval_shape(make, state.params)
        _validate.same_form(f"state.{name}", given, expected, remedy, dtypes=False)


def _round_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x` in the dtype of `like`; a mean of counters becomes the nearest one."""
    return (x if jnp.issubdtype(like.dtype, jnp.inexact) else jnp.round(x)).astype(like.dtype)
