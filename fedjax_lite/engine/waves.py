"""Waves of clients: those that start and end together, side by side, one wave after the other."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lite.base import Cohort, PyTree
from fedjax_lite.engine.batches import KEY_DATA, KEY_INIT, KEY_STEP, Slot, client_key
from fedjax_lite.engine.client import Sent, Trainee, Work
from fedjax_lite.engine.store import read, write
from fedjax_lite.xla.memory import computed_bytes
from fedjax_lite.xla.mesh import dealt
from fedjax_lite.xla.packing import pack, unpack
from fedjax_lite.xla.rows import nth

MEASURED = ("_before", "_after")
STEPS = "local_steps"
"""The name of the loop over local steps, in programs and profiles."""


class CohortResult(NamedTuple):
    """What a cohort's clients add up to.

    Attributes:
      update: Sum over clients of weight times update.
      weight: Sum of the weights, scalar.
      model_state: Sum over clients of weight times model state.
      statistics: Sum over clients of what they send beside.
      store: What clients keep, with that of the cohort's clients brought up to date.
      clients: Per-client metrics `[clients, ...]` in cohort order: those of the client update,
        and `num_examples`, `num_steps`, `update_norm`, `weight`, `nonfinite`.
      reported: What a stacked reducer reports, scalars by name.
    """

    update: PyTree
    weight: jax.Array
    model_state: PyTree
    statistics: PyTree
    store: PyTree
    clients: dict[str, jax.Array]
    reported: dict[str, jax.Array] = {}  # noqa: RUF012, which no one changes


class Versions(NamedTuple):
    """What clients start from, if not all from the same.

    Attributes:
      fields: By name of a field of what the server broadcasts, arrays `[versions, ...]`.
      places: Which version each client reads, int32 `[clients]`.
      staleness: How many rounds old that is, int32 `[clients]`.
    """

    fields: dict[str, PyTree]
    places: jax.Array
    staleness: jax.Array


def schedule(
    cohort: Cohort, num_steps: jax.Array, table: jax.Array, versions: Versions | None = None
) -> jax.Array:
    """What is to be known of the clients in a table of slots, int32 `[waves, lanes, 4 or 6]`.

    Id, number of examples, offset, number of steps, and version and staleness if there are several
    versions: one array, of which a wave reads one row, and not four.
    """
    fields = [cohort.client_ids, cohort.num_examples, cohort.offsets, num_steps]
    if versions is not None:
        fields += [versions.places, versions.staleness]
    # A slot that is none takes no step.
    return dealt(jnp.stack(fields, 1), table)


def _trainee(
    row: jax.Array, place: jax.Array, key: jax.Array, store: PyTree, versions: Versions | None
) -> Trainee:
    """The client of a row of the schedule, or of rows `[lanes, ...]`, in a round with this key."""
    client_id, num_examples, offset, num_steps, *version = jnp.moveaxis(row, -1, 0)
    purposes = jnp.array([KEY_INIT, KEY_DATA, KEY_STEP])
    keys = client_key(key, client_id[..., None], purposes)
    received = {} if versions is None else read(versions.fields, version[0])
    slot = Slot(client_id, num_examples, offset)
    staleness = version[1] if version else jnp.zeros_like(num_steps)
    return Trainee(slot, num_steps, keys, read(store, place), received, staleness)


def step_bytes(
    lane: Work,
    waves: jax.Array,
    key: jax.Array,
    store: PyTree,
    places: jax.Array,
    versions: Versions | None,
) -> int:
    """Bytes of what one client computes on its way through a step; see `sum_waves`."""
    trainee, state = jax.eval_shape(
        lambda: (
            trainee := _trainee(waves[0, 0], places[0, 0], key, store, versions),
            lane.init(trainee),
        )
    )
    return computed_bytes(lane.step, jnp.int32(0), trainee, state)


def _repeat(
    end: jax.Array,
    body: Callable[[jax.Array, PyTree], PyTree],
    state: PyTree,
    bound: int | None,
) -> PyTree:
    """`fori_loop(0, end, body, state)`, or the same as a scan up to a static bound."""
    if bound is None:
        # From a zero of the type of `end`, for which `sum_waves` has traced a wave.
        return jax.lax.fori_loop(jnp.zeros_like(end), end, body, state)

    def masked(state: PyTree, i: jax.Array) -> tuple[PyTree, None]:
        return jax.lax.cond(i < end, body, lambda i, state: state, i, state), None

    return jax.lax.scan(masked, state, jnp.arange(bound, dtype=end.dtype))[0]


def _wave(lane: Work, *, alone: bool, stacks: bool) -> Work:
    """The work of a wave: its `final` sums over clients, but for what is each client's own.

    One client alone goes without an axis of lanes, which would make its matrix products batched
    ones and cost copies of its params.
    """
    if alone:
        return lane

    def step(
        i: jax.Array, trainees: Trainee, states: PyTree, goes_on: jax.Array | None = None
    ) -> PyTree:
        after = jax.vmap(lane.step, (None, 0, 0))(i, trainees, states)
        if goes_on is None:
            goes_on = i < lane.turns(trainees.num_steps)
        return _where(goes_on, after, states)

    def final(trainees: Trainee, states: PyTree, measured: PyTree) -> Sent:
        sent = jax.vmap(lane.final)(trainees, states, measured)
        update, *others = sent.summed
        weight, model_state, statistics = jax.tree.map(lambda x: x.sum(0), others)
        if not stacks:
            update = jax.tree.map(lambda x: x.sum(0), update)
        return sent._replace(
            update=update, weight=weight, model_state=model_state, statistics=statistics
        )

    return Work(jax.vmap(lane.init), step, jax.vmap(lane.measure), final, lane.at_once)


def _run_wave(
    wave: Work, most_turns: int | None, differentiable: bool, side_by_side: bool, trainees: Trainee
) -> Sent:
    """A wave from beginning to end; without a loop, side by side, if it has a single turn at most.

    GPUs end the product that makes a gradient by the step along it, without writing the gradient,
    if nothing is computed for it but is there: which clients go on, so that the turn before tells.
    """
    states = wave.init(trainees)
    before = wave.measure(trainees, states)
    bound = most_turns if differentiable else None
    with jax.named_scope(STEPS):
        turns = wave.turns(trainees.num_steps.max())
        if side_by_side and most_turns in (0, 1):
            states = wave.step(jnp.int32(0), trainees, states)
        elif side_by_side:
            own_turns = wave.turns(trainees.num_steps)

            def turn(i: jax.Array, carry: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
                states, goes_on = carry
                return wave.step(i, trainees, states, goes_on), i + 1 < own_turns

            states, _ = _repeat(turns, turn, (states, own_turns > 0), bound)
        else:
            states = _repeat(turns, lambda i, x: wave.step(i, trainees, x), states, bound)
    return wave.final(trainees, states, _measured(before, wave.measure(trainees, states)))


def _measured(before: dict[str, jax.Array], after: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What was measured before and after, by the names that it is reported under."""
    return {
        name + when: x
        for when, measured in zip(MEASURED, (before, after), strict=True)
        for name, x in measured.items()
    }


def _where(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the condition `[lanes]` holds, else `old`, for arrays `[lanes, ...]`."""

    def where(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(condition.reshape((-1,) + (1,) * (x.ndim - 1)), x, y)

    return jax.tree.map(where, new, old)


def sum_waves(
    lane: Work,
    waves: jax.Array,
    table: jax.Array,
    key: jax.Array,
    store: PyTree,
    places: jax.Array,
    versions: Versions | None,
    capacity: int,
    *,
    keep_output: bool,
    stacks: bool,
    in_turn: bool,
    most_steps: int | None,
    differentiable: bool,
) -> CohortResult:
    """Runs one device's waves and sums what their clients send.

    Args:
      lane: One client's work.
      waves: The clients `[waves, lanes, ...]`; see `schedule`.
      table: Their slots `[waves, lanes]`; the capacity means none.
      key: Key of the round.
      store: What clients keep.
      places: Where the entries of the clients are in it, int32 `[waves, lanes]`.
      versions: What they start from.
      capacity: Number of slots of the cohort.
      keep_output: Whether the store is kept up to date.
      stacks: Whether updates are returned one by one, `[slots, ...]`, and not their sum.
      in_turn: Whether a device does one thing after the other: then a single wave is in a loop as
        well, which need not run.
      most_steps: What no client takes more steps than, if that is known.
      differentiable: Whether loops have a length known when compiling.
    """
    if alone := table.shape[1] == 1:
        table, waves, places = table[:, 0], waves[:, 0], places[:, 0]
    work, num_axes = _wave(lane, alone=alone, stacks=stacks), table.ndim - 1
    side_by_side = not in_turn and not alone
    most_turns = None if most_steps is None else -(-most_steps // lane.at_once)

    def trainees_of(wave: jax.Array, store: PyTree) -> Trainee:
        return _trainee(nth(waves, wave), nth(places, wave), key, store, versions)

    @functools.partial(jax.jit, inline=True)  # Traced once, for its form and for the loop.
    def run_wave(wave: jax.Array, store: PyTree) -> Sent:
        return _run_wave(work, most_turns, differentiable, side_by_side, trainees_of(wave, store))

    def add_wave(wave: jax.Array, carry: tuple[PyTree, PyTree, PyTree]) -> PyTree:
        (updates, *total), per_client, kept_store = carry
        sent = run_wave(wave, kept_store if keep_output else store)

        def put(all_: jax.Array, x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(
                all_, x, wave, 0, allow_negative_indices=False
            )

        update, *others = sent.summed
        updates = jax.tree.map(put if stacks else jnp.add, updates, update)
        total = jax.tree.map(jnp.add, total, others)
        per_client = list(map(put, per_client, pack(sent.metrics, num_axes)))
        if keep_output:
            kept = sent.metrics["weight"] != 0
            kept_store = write(kept_store, nth(places, wave), kept, sent.output)
        return (updates, *total), per_client, kept_store

    num_waves = table.shape[0]

    def none_yet(x: jax.ShapeDtypeStruct, *shape: int) -> jax.Array:
        return jnp.zeros((*shape, *x.shape), x.dtype)

    # Sorted by length, the waves without a step are the last ones: they need not run.
    longest = waves[..., 3].reshape(len(table), -1).max(1)
    num_turns = (longest > 0).sum(dtype=jnp.int32)
    sent = jax.eval_shape(run_wave, num_turns, store)
    packed = jax.eval_shape(functools.partial(pack, num_axes=num_axes), sent.metrics)
    one_update, *others = sent.summed
    carry: PyTree = (
        (
            jax.tree.map(lambda x: none_yet(x, *([num_waves] if stacks else [])), one_update),
            *jax.tree.map(none_yet, others),
        ),
        [none_yet(x, num_waves) for x in packed],
        store if keep_output else (),
    )
    if num_waves == 1 and not in_turn:
        carry = add_wave(jnp.int32(0), carry)
    else:
        carry = _repeat(num_turns, add_wave, carry, num_waves if differentiable else None)
    (update, weight, model_state, statistics), per_client, kept_store = carry
    if stacks:  # One axis of slots.
        update = jax.tree.map(lambda x: x.reshape(-1, *x.shape[1 + num_axes :]), update)

    def in_cohort_order(x: jax.Array) -> jax.Array:
        empty = jnp.zeros((capacity, x.shape[-1]), x.dtype)
        return empty.at[table].set(x, mode="drop", wrap_negative_indices=False)

    clients = unpack([in_cohort_order(x) for x in per_client], sent.metrics, num_axes)
    return CohortResult(update, weight, model_state, statistics, kept_store, clients)
