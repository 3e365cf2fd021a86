"""The one compiled step that training repeats: a cohort is drawn, and its round is played."""

import functools
from typing import Any, NamedTuple

import jax
import optax
from jax.typing import ArrayLike

from fedjax_lite.algorithms.versions import count_versions
from fedjax_lite.base import Cohort, FederatedAlgorithm, PyTree, RoundInfo, ServerState
from fedjax_lite.engine.cohorts import cohort_of
from fedjax_lite.runs.ledger import trained
from fedjax_lite.samplers import Sampler

Keys = tuple[jax.Array, jax.Array]
"""Typed keys of the sampler and of the rounds."""


class Carry(NamedTuple):
    """What a step takes and returns: the state, and the average of what is trained in it."""

    state: ServerState
    averaged: PyTree


def draw(
    sampler: Sampler, population: Any, keys: Keys, round: ArrayLike
) -> tuple[Cohort, dict[str, jax.Array]]:
    """The cohort of a round, and what the sampler reports of it."""
    key_sampler, key_rounds = keys
    selection = sampler.select(key_sampler, round)
    key_cohort, _ = jax.random.split(jax.random.fold_in(key_rounds, round))
    cohort = cohort_of(
        population,
        selection.client_ids,
        key=key_cohort,
        max_steps=selection.max_steps,
        staleness=selection.staleness,
    )
    return cohort, {"num_dropped": selection.num_dropped, **selection.metrics}


def check_length(sampler: Sampler, num_rounds: int) -> None:
    """Refuses more rounds than a sampler has."""
    if sampler.num_rounds is not None and num_rounds > sampler.num_rounds:
        raise ValueError(
            f"num_rounds is {num_rounds}, and sampler has {sampler.num_rounds} rounds; build it for"
            " as many."
        )


def play_round(
    algorithm: FederatedAlgorithm, sampler: Sampler, keys: Keys, state: ServerState, source: Any
) -> tuple[ServerState, RoundInfo, dict[str, jax.Array]]:
    """The round that is next; a pure function.

    Args:
      algorithm: The algorithm.
      sampler: Who takes part.
      keys: Typed keys of the sampler and of the rounds.
      state: The state, with the number of rounds done.
      source: A population, or what `draw` returns for one whose clients stay on the host.

    Returns:
      The state, the info of the round, and what the sampler reports of it.
    """
    drawn = source if isinstance(source, tuple) else draw(sampler, source, keys, state.round)
    cohort, selected = drawn
    num_kept = count_versions(state) - 1
    if num_kept < sampler.max_staleness:
        raise ValueError(
            f"max_staleness of the algorithm is {num_kept}, and that of the sampler"
            f" {sampler.max_staleness}; build it with max_staleness=sampler.max_staleness."
        )
    _, key_round = jax.random.split(jax.random.fold_in(keys[1], state.round))
    state, info = algorithm.round(key_round, state, cohort)
    return state, info, selected


# A second run of the same algorithm need not compile again.
@functools.lru_cache(maxsize=8)
def build_step(
    algorithm: FederatedAlgorithm, sampler: Sampler, ema_decay: float | None
) -> jax.stages.Wrapped:
    """`step(carry, keys, source) -> (carry, info, selected)`, with all of a round in it."""

    @functools.partial(jax.jit, donate_argnames="carry")
    def step(
        carry: Carry, keys: Keys, source: Any
    ) -> tuple[Carry, RoundInfo, dict[str, jax.Array]]:
        state, info, selected = play_round(algorithm, sampler, keys, carry.state, source)
        averaged = carry.averaged
        if ema_decay is not None:
            averaged = optax.incremental_update(trained(state), averaged, 1 - ema_decay)
        return Carry(state, averaged), info, selected

    return step
