"""Runs a client update over a cohort: the one place where clients are mapped.

Clients are sorted by size, and so by their number of local steps, dealt to the devices, and grouped
into waves of `lanes` clients. A wave runs its clients side by side for as many steps as its
longest one has, which is known only when the round runs; neighbours in the sorted order have
nearly equal lengths, so that almost no step is padding. Waves follow one another, and only the
running sum of the updates is carried from one to the next, so that memory does not grow with the
cohort. Each device has waves of its own, and one sum over the devices ends the round.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fedjax_lite.base import ClientUpdate, Cohort, PyTree, Reducer
from fedjax_lite.engine.batches import (
    KEY_REDUCER,
    Batching,
    bound_steps,
    check_bounded,
    count_processed,
    count_steps,
)
from fedjax_lite.engine.client import client_work
from fedjax_lite.engine.execution import (
    Execution,
    choose_rewrite,
    choose_steps,
    resolved,
    runs_side_by_side,
)
from fedjax_lite.engine.stacking import reduce_stacked
from fedjax_lite.engine.store import check_store, collect, exchange, is_spread
from fedjax_lite.engine.waves import CohortResult, Versions, schedule, step_bytes, sum_waves
from fedjax_lite.xla import random
from fedjax_lite.xla.mesh import AXIS, deal, dealt, sum_over_devices
from fedjax_lite.xla.rows import nth

ON_NONFINITE = ("drop", "keep")
_DEFAULT = Execution()
_SUM = Reducer(lambda update, weight: jax.tree.map(lambda x: weight * x, update))


def run_clients(
    client_update: ClientUpdate,
    shared: PyTree,
    cohort: Cohort,
    key: jax.Array,
    *,
    batching: Batching,
    store: PyTree = (),
    versions: Versions | None = None,
    frozen: PyTree = (),
    last_aggregate: PyTree = (),
    keep_output: bool = True,
    on_nonfinite: str = "drop",
    reducer: Reducer = _SUM,
    execution: Execution = _DEFAULT,
) -> CohortResult:
    """Runs the local steps of every client of a cohort and sums what the clients send.

    Args:
      client_update: What one client computes.
      shared: What the server broadcasts to the clients.
      cohort: Who takes part.
      key: Typed key of the round; clients derive theirs from it by their id.
      batching: What a client runs through.
      store: What clients keep between rounds, arrays `[num_clients, ...]`, or `[clients, ...]` of
        a cohort that has its own.
      versions: What clients start from in place of fields of `shared`, if not all from the same.
      frozen: Params that the model does not train.
      last_aggregate: What the reducer made of the last round, if it begins from there.
      keep_output: Whether what clients return for the store replaces what they had.
      on_nonfinite: `"drop"` leaves out a client whose update has a norm that is not finite (or
        whose model state, statistics, weight or output is not), `"keep"` lets it through.
      reducer: How updates become one: what of each is added up, or whether all are stacked.
      execution: How; changes the speed, and results only by the order of additions.

    Returns:
      The sum of the updates, or what the reducer makes of them stacked; the total weight, the store
      and the metrics. A client without examples
      takes no step, has weight zero and zeros for metrics, and keeps what it had.

    Raises:
      ValueError: The store is of another population than the cohort, or not of the form of what
        clients send; the rows of the cohort lie on another mesh; `differentiable` without a bound
        on the number of steps.
    """
    num_entries = cohort.capacity if cohort.has_entries else cohort.num_clients
    check_store(store, num_entries)
    execution = resolved(execution, shared, cohort.capacity)
    mesh, rewrite = execution.mesh, choose_rewrite(execution)
    alone = execution.num_devices == 1
    num_steps = count_steps(cohort, random.fast(key), batching)
    sizes = num_steps if _differ(cohort, batching) else None
    table = _deal(cohort, execution, sizes)
    slots = table.reshape(-1)
    spread = is_spread(store, num_entries, execution.num_devices, of_cohort=cohort.has_entries)

    def run_waves(
        table: jax.Array,
        examples: dict[str, jax.Array],
        store: PyTree,
        num_steps: jax.Array,
        shared: PyTree,
        cohort: Cohort,
        key: jax.Array,
        versions: Versions | None,
        frozen: PyTree,
        last_aggregate: PyTree,
    ) -> CohortResult:
        cohort = dataclasses.replace(cohort, examples=examples)
        device = 0 if alone else jax.lax.axis_index(AXIS)
        slots_or_ids = cohort.client_ids
        if cohort.has_entries:
            slots_or_ids = jnp.arange(cohort.capacity, dtype=jnp.int32)
        entries = dealt(slots_or_ids, table)
        own_table, own_entries = nth(table, device), nth(entries, device)
        own_store, places = store, own_entries
        if spread:
            own_store = collect(store, entries)
            places = jnp.arange(own_entries.size, dtype=jnp.int32).reshape(own_entries.shape)
        most_steps = bound_steps(cohort, batching)
        if execution.differentiable:
            check_bounded(most_steps, batching)
        kept_store = store if keep_output else ()
        work_of = functools.partial(
            client_work,
            client_update,
            shared,
            cohort,
            kept_store,
            batching,
            rewrite,
            on_nonfinite,
            reducer,
            frozen,
        )
        client = work_of()
        waves = schedule(cohort, num_steps, own_table, versions)
        if client_update.steps is not None:
            most_bytes = functools.partial(
                step_bytes, client, waves, key, own_store, places, versions
            )
            client = work_of(at_once=choose_steps(execution, most_steps, most_bytes))
        result = sum_waves(
            client,
            waves,
            own_table,
            key,
            own_store,
            places,
            versions,
            cohort.capacity,
            keep_output=keep_output,
            stacks=reducer.stacked is not None,
            in_turn=not runs_side_by_side(execution),
            most_steps=most_steps,
            differentiable=execution.differentiable,
        )
        update, kept_store = result.update, result.store
        if not alone:
            without = () if reducer.stacked is not None else update
            result = sum_over_devices(result._replace(update=without, store=()))
            if jax.tree.leaves(kept_store):
                weights = dealt(result.clients["weight"], table)
                kept_store = exchange(
                    store if spread else kept_store,
                    kept_store if spread else None,
                    places,
                    entries,
                    weights != 0,
                )
        if reducer.stacked is not None:
            weights = result.clients["weight"]
            key_stack = random.fold_in_pair(key, KEY_REDUCER, 0)
            update, reported = reduce_stacked(
                reducer,
                update,
                slots,
                weights,
                cohort,
                key_stack,
                last_aggregate,
                execution.num_devices,
            )
            result = result._replace(update=update, reported=reported)
        return result._replace(store=kept_store)

    without_examples = dataclasses.replace(cohort, examples={})
    replicated = (
        *(num_steps, shared, without_examples, random.fast(key)),
        *(versions, frozen, last_aggregate),
    )
    if alone:
        result = run_waves(table, cohort.examples, store, *replicated)
    else:
        # With check_vma on, a gradient with respect to replicated params is summed over the
        # devices by autodiff: inside local training, at every step, by devices that take
        # different numbers of steps. Off, gradients inside the body stay the device's own.
        # The table, replicated too, is dealt on each device: split, it would be sent around.
        rows = PartitionSpec() if cohort.device_slots is None else PartitionSpec(AXIS)
        of_store = PartitionSpec(AXIS) if spread else PartitionSpec()

        def on_device(
            table: jax.Array, examples: dict[str, jax.Array], store: PyTree, rest: Any
        ) -> tuple[CohortResult, PyTree]:
            result = run_waves(table, examples, store, *rest)
            return result._replace(store=()), result.store

        result, store = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(PartitionSpec(), rows, of_store, PartitionSpec()),
            out_specs=(PartitionSpec(), of_store),
            check_vma=False,
        )(table, cohort.examples, store, replicated)
        result = result._replace(store=store)
    clients = {
        **result.clients,
        "nonfinite": result.clients["nonfinite"] > 0,
        "num_examples": count_processed(cohort, num_steps, batching),
        "num_steps": num_steps,
    }
    return result._replace(clients=clients)


def _differ(cohort: Cohort, batching: Batching) -> bool:
    """Whether clients with as many examples may take other numbers of steps."""
    own = callable(batching.num_epochs) or callable(batching.num_steps)
    return own or cohort.max_steps is not None


def _deal(cohort: Cohort, execution: Execution, num_steps: jax.Array | None) -> jax.Array:
    """Which client runs where: slots `[devices, waves, lanes]`; the capacity means none.

    On each device those with the most steps come first: with the most examples, unless numbers of
    steps are given, which do not follow from these.
    """
    num_devices, lanes = execution.num_devices, execution.lanes
    assert lanes is not None  # Resolved.
    table = cohort.device_slots
    if table is None and num_devices == 1 and lanes == cohort.capacity:
        return jnp.arange(lanes, dtype=jnp.int32)[None, None]  # All at once, in any order.
    if table is None:
        table = deal(cohort.num_examples if num_steps is None else num_steps, num_devices)
    elif table.shape[0] != num_devices:
        raise ValueError(
            f"the rows of the cohort lie on {table.shape[0]} devices, and the algorithm runs on"
            f" {num_devices}; give dataset.streamed() and the algorithm the same mesh."
        )
    elif num_steps is not None:
        steps = dealt(num_steps, table, -1)
        table = jnp.take_along_axis(table, jnp.argsort(-steps, axis=1, stable=True), axis=1)
    waves = -(-table.shape[1] // lanes)
    unused = waves * lanes - table.shape[1]
    table = jnp.pad(table, ((0, 0), (0, unused)), constant_values=cohort.capacity)
    return table.reshape(num_devices, waves, lanes)
