"""Past versions of what clients start from: a ring in the state, for those that come late."""

import dataclasses

import jax
import jax.numpy as jnp

from fedjax_lite.base import Cohort, PyTree, ServerState
from fedjax_lite.engine.waves import Versions


def count_versions(state: ServerState) -> int:
    """How many versions a state has, the newest one included."""
    return len(jax.tree.leaves(state.versions)[0]) if state.versions else 1


def with_versions(state: ServerState, number: int) -> ServerState:
    """The state with so many versions: the newest that it has, and the oldest of them for more."""
    kept = count_versions(state)
    if number == kept:
        return state
    if number == 1:
        return dataclasses.replace(state, versions=())
    past = state.versions or jax.tree.map(lambda x: x[None], _newest(state))
    ages = jnp.minimum((state.round - jnp.arange(number)) % number, kept - 1)
    versions = jax.tree.map(lambda x: x[(state.round - ages) % kept], past)
    return dataclasses.replace(state, versions=versions)


def read_versions(state: ServerState, cohort: Cohort, number: int) -> Versions | None:
    """What the clients of a cohort start from, if not all of them from the newest."""
    if cohort.staleness is None:
        return None
    if number == 1:
        raise ValueError(
            "cohort.staleness is given to an algorithm that keeps no versions; build it with"
            " max_staleness=, the largest number of rounds that can occur."
        )
    # None is older than the first one, nor than those that are kept.
    age = jnp.clip(cohort.staleness, 0, jnp.minimum(number - 1, state.round))
    return Versions(state.versions, (state.round - age) % number, age)


def write_version(state: ServerState, after: ServerState, number: int) -> PyTree:
    """The versions with that of the next round in place of the oldest."""
    if number == 1:
        return state.versions
    place = (state.round + 1) % number
    return jax.tree.map(lambda all_, x: all_.at[place].set(x), state.versions, _newest(after))


def _newest(state: ServerState) -> dict[str, PyTree]:
    return {"params": state.params, "model_state": state.model_state}
