"""Rounds that run their cohort twice: to measure something of all clients, and to train them."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from fedjax_lite.algorithms import server
from fedjax_lite.algorithms.options import LocalOptions, StoreOptions
from fedjax_lite.algorithms.report import num_bits
from fedjax_lite.base import (
    Batch,
    Client,
    ClientResult,
    ClientUpdate,
    Cohort,
    FederatedAlgorithm,
    PyTree,
    RoundInfo,
    ServerState,
)
from fedjax_lite.engine.file_store import around_files
from fedjax_lite.models.model import Model
from fedjax_lite.xla.cpu import Paced

# Of a pass that sees each example once, in place of those of training.
_ONE_PASS = {
    **{"num_epochs": 1, "num_steps": None, "max_staleness": 0, "shuffle": False},
    **{"pipeline": None, "reducer": None},
}


def two_passes(
    model: Model,
    measuring: ClientUpdate,
    training: ClientUpdate,
    server_optimizer: optax.GradientTransformationExtraArgs,
    options: LocalOptions | StoreOptions,
    *,
    keep: Callable[[Any, PyTree, PyTree], Any] = lambda opt_state, mean, statistics: opt_state,
    sent: Callable[[Any], PyTree] = lambda opt_state: (),
    settle: Callable[[ServerState, ServerState], dict[str, Any]] = lambda before, after: {},
    broadcast: Callable[[ServerState], PyTree] | None = None,
) -> FederatedAlgorithm:
    """The algorithm of two client updates, one compiled round of their rounds.

    Args:
      model: The model.
      measuring: Goes first, on all examples of the clients and at the newest params. What clients
        keep of it goes on, and what the server does.
      training: Goes second, and makes the state and what is reported.
      server_optimizer: What steps along the mean of the updates of training.
      options: Those of training.
      keep: `keep(opt_state, mean, statistics) -> opt_state`, what the server keeps of what clients
        send while measuring, before training.
      sent: `sent(opt_state)`, of the size of what a client sends while measuring.
      settle: `settle(before, after) -> fields`, by name, that replace those of the state after the
        round unless it is skipped; both arguments are states.
      broadcast: As in `federated_algorithm`.
    """

    def kept(
        mean: PyTree, opt_state: Any, params: PyTree = None, *, statistics: PyTree, **_: Any
    ) -> tuple[PyTree, Any]:
        del params
        return mean, keep(opt_state, mean, statistics)

    keeping = optax.GradientTransformationExtraArgs(server_optimizer.init, kept)
    if options["max_staleness"]:
        raise ValueError(
            f"max_staleness is {options['max_staleness']}, and clients of the algorithm measure"
            " something at the newest params before they train; choose another one, such as"
            " fl.fed_avg."
        )
    one_pass = cast(StoreOptions, {**options, **_ONE_PASS})
    first = server.federated_algorithm(model, measuring, keeping, **one_pass)
    second = server.federated_algorithm(
        model, training, server_optimizer, broadcast=broadcast, **cast(StoreOptions, options)
    )

    def check(key: jax.Array, state: ServerState, cohort: Cohort) -> None:
        jax.eval_shape(lambda: second.round(key, state, cohort))

    @jax.jit
    def round(key: jax.Array, state: ServerState, cohort: Cohort) -> tuple[ServerState, RoundInfo]:
        check(key, state, cohort)
        alone = dataclasses.replace(state, pipeline_state=(), pipeline_store=(), versions=())
        everything = dataclasses.replace(cohort, max_steps=None, staleness=None)
        measured, _ = first.round(key, alone, everything)
        begun = dataclasses.replace(state, opt_state=measured.opt_state, store=measured.store)
        after, info = second.round(key, begun, cohort)
        settled = settle(state, after)
        before = {name: getattr(after, name) for name in settled}
        settled = jax.tree.map(lambda new, old: jnp.where(info.skipped, old, new), settled, before)
        after = dataclasses.replace(after, **settled)
        bits = info.clients["bits_up"]
        bits = jnp.where(bits > 0, bits + num_bits(sent(after.opt_state)), 0)
        info = dataclasses.replace(info, clients={**info.clients, "bits_up": bits})
        return after, info

    def message_bits(key_or_params: PyTree) -> tuple[float, float]:
        assert second.message_bits is not None
        down, up = second.message_bits(key_or_params)
        state = jax.eval_shape(lambda x: second.init(x, num_clients=1), key_or_params)
        return down, up + num_bits(sent(state.opt_state))

    return second._replace(round=Paced(round, check, around_files), message_bits=message_bits)


def summing(
    zeros: Callable[[], PyTree],
    sums_of: Callable[[ServerState, Client, Batch, jax.Array], PyTree],
    finish: Callable[[PyTree], dict[str, Any]],
) -> ClientUpdate:
    """A client update that adds something up over the batches of a client, which sends no update.

    Args:
      zeros: `zeros() -> sums`, before the first batch.
      sums_of: `sums_of(server, client, batch, key) -> sums` of a batch.
      finish: `finish(sums) -> fields`, by name, of the `ClientResult`.
    """

    def init(shared: ServerState, client: Client) -> PyTree:
        del shared, client
        return zeros()

    def step(
        shared: ServerState, client: Client, sums: PyTree, batch: Batch, key: jax.Array
    ) -> PyTree:
        return optax.tree.add(sums, sums_of(shared, client, batch, key))

    def final(shared: ServerState, client: Client, sums: PyTree) -> ClientResult:
        del client
        nothing = optax.tree.zeros_like(shared.params)
        return ClientResult(**{"update": nothing, "weight": 1.0, **finish(sums)})

    return ClientUpdate(init, step, final)
