"""Rounds that run their cohort twice: to measure something of all clients, and to train them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lite.algorithms.options import LocalOptions
from fedjax_lite.algorithms.report import num_bits
from fedjax_lite.base import Cohort, FederatedAlgorithm, PyTree, RoundInfo, ServerState
from fedjax_lite.engine.file_store import around_files
from fedjax_lite.xla.cpu import Paced

ONE_PASS: LocalOptions = {
    **{"num_epochs": 1, "num_steps": None, "max_staleness": 0, "shuffle": False},
    **{"pipeline": None, "reducer": None},
}
"""Options of a pass that sees each example once, to put in place of those of training."""


def two_passes(
    measuring: FederatedAlgorithm,
    training: FederatedAlgorithm,
    *,
    sent: Callable[[PyTree], PyTree],
    settle: Callable[[ServerState, ServerState], dict[str, Any]] = lambda before, after: {},
) -> FederatedAlgorithm:
    """One algorithm of two on states of the same form, one compiled round of their rounds.

    Args:
      measuring: Its round goes first, on all examples of the clients and at the newest params. Of
        its result, `opt_state` and `store` go on.
      training: Its round goes second, and makes the state and what is reported.
      sent: `sent(opt_state)`, of the size of what a client sends while measuring.
      settle: `settle(before, after) -> fields`, by name, that replace those of the state after the
        round unless it is skipped; both arguments are states.
    """

    def check(key: jax.Array, state: ServerState, cohort: Cohort) -> None:
        jax.eval_shape(lambda: training.round(key, state, cohort))

    @jax.jit
    def round(key: jax.Array, state: ServerState, cohort: Cohort) -> tuple[ServerState, RoundInfo]:
        check(key, state, cohort)
        alone = dataclasses.replace(state, pipeline_state=(), pipeline_store=(), versions=())
        everything = dataclasses.replace(cohort, max_steps=None, staleness=None)
        measured, _ = measuring.round(key, alone, everything)
        begun = dataclasses.replace(state, opt_state=measured.opt_state, store=measured.store)
        after, info = training.round(key, begun, cohort)
        settled = settle(state, after)
        before = {name: getattr(after, name) for name in settled}
        settled = jax.tree.map(lambda new, old: jnp.where(info.skipped, old, new), settled, before)
        after = dataclasses.replace(after, **settled)
        bits = info.clients["bits_up"]
        bits = jnp.where(bits > 0, bits + num_bits(sent(after.opt_state)), 0)
        info = dataclasses.replace(info, clients={**info.clients, "bits_up": bits})
        return after, info

    return training._replace(round=Paced(round, check, around_files))
