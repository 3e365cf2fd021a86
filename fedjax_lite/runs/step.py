"""The one compiled step that training repeats: a cohort is drawn, and its round is played."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import optax
from jax.typing import ArrayLike

from fedjax_lite.base import Cohort, FederatedAlgorithm, PyTree, RoundInfo, ServerState
from fedjax_lite.engine.cohorts import cohort_of
from fedjax_lite.runs.entries import Entries, taken_off
from fedjax_lite.runs.ledger import trained
from fedjax_lite.samplers import Sampler

Keys = tuple[jax.Array, jax.Array]
"""Typed keys of the sampler and of the rounds."""


class Carry(NamedTuple):
    """What a step takes and returns: the state, and the average of what is trained in it."""

    state: ServerState
    averaged: PyTree


class Drawn(NamedTuple):
    """A cohort, how many clients there was no slot for, and what comes from files with it."""

    cohort: Cohort
    num_dropped: jax.Array
    entries: Entries | None = None


def draw(sampler: Sampler, population: Any, keys: Keys, round: ArrayLike) -> Drawn:
    """The cohort of a round."""
    key_sampler, key_rounds = keys
    selection = sampler.select(key_sampler, round)
    key_cohort, _ = jax.random.split(jax.random.fold_in(key_rounds, round))
    return Drawn(
        cohort_of(population, selection.client_ids, key=key_cohort), selection.num_dropped
    )


def play_round(
    algorithm: FederatedAlgorithm, sampler: Sampler, keys: Keys, state: ServerState, source: Any
) -> tuple[ServerState, RoundInfo, jax.Array, dict[str, PyTree]]:
    """The round that is next; a pure function.

    Args:
      algorithm: The algorithm.
      sampler: Who takes part.
      keys: Typed keys of the sampler and of the rounds.
      state: The state, with the number of rounds done.
      source: A population, or what is drawn from it already.

    Returns:
      The state, the info of the round, how many clients there was no slot for, and what goes back
      to files.
    """
    drawn = source if isinstance(source, Drawn) else draw(sampler, source, keys, state.round)
    cohort, num_dropped, entries = drawn
    _, key_round = jax.random.split(jax.random.fold_in(keys[1], state.round))
    if entries is None:
        return *algorithm.round(key_round, state, cohort), num_dropped, {}
    state = dataclasses.replace(state, **entries.newest())
    cohort = dataclasses.replace(cohort, has_entries=True)
    state, info = algorithm.round(key_round, state, cohort)
    state, kept = taken_off(state, entries)
    return state, info, num_dropped, kept


# A second run of the same algorithm need not compile again.
@functools.lru_cache(maxsize=8)
def build_step(
    algorithm: FederatedAlgorithm, sampler: Sampler, ema_decay: float | None
) -> jax.stages.Wrapped:
    """`step(carry, keys, source)`, a round with all that is in it, as `play_round` returns it."""

    @functools.partial(jax.jit, donate_argnames="carry")
    def step(
        carry: Carry, keys: Keys, source: Any
    ) -> tuple[Carry, RoundInfo, jax.Array, dict[str, PyTree]]:
        state, *others = play_round(algorithm, sampler, keys, carry.state, source)
        averaged = carry.averaged
        if ema_decay is not None:
            averaged = optax.incremental_update(trained(state), averaged, 1 - ema_decay)
        return Carry(state, averaged), *others

    return step
