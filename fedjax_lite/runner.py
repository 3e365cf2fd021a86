"""Runs a client update over a cohort: the one place where clients are mapped.

Clients are sorted by their number of local steps and dealt into waves of `lanes` clients per
device. A wave runs its clients side by side for as many steps as its longest one has, which
is known only when the round runs; neighbours in the sorted order have nearly equal lengths,
so that almost no step is padding. Waves follow one another, and only the running sum of the
updates is carried from one to the next, so that memory does not grow with the cohort. Each
device has waves of its own, and one sum over the devices ends the round.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from fedjax_lite import random
from fedjax_lite.base import ClientResult, ClientUpdate, PyTree
from fedjax_lite.batches import (
    KEY_DATA,
    KEY_INIT,
    KEY_STEP,
    Batching,
    client_key,
    count_processed,
    count_steps,
    read_batch,
)
from fedjax_lite.cohort import Cohort
from fedjax_lite.convolution import canonical_convolutions
from fedjax_lite.mesh import AXIS, resolve

ON_NONFINITE = ("drop", "keep")
_Rewrite = Callable[[Callable[..., PyTree]], Callable[..., PyTree]]


class CohortResult(NamedTuple):
    """What a cohort's clients add up to.

    Attributes:
      update: Sum over clients of weight times update.
      weight: Sum of the weights, scalar.
      model_state: Sum over clients of weight times model state.
      clients: Per-client metrics `[clients]` in cohort order: those of the client update,
        and `num_examples`, `num_steps`, `update_norm`, `weight`, `nonfinite`.
    """

    update: PyTree
    weight: jax.Array
    model_state: PyTree
    clients: dict[str, jax.Array]


def run_clients(
    client_update: ClientUpdate,
    shared: PyTree,
    cohort: Cohort,
    key: jax.Array,
    *,
    batching: Batching,
    lanes: int | None = None,
    mesh: Mesh | None = None,
    on_nonfinite: str = "drop",
    rewrite_convolutions: bool | None = None,
) -> CohortResult:
    """Runs the local steps of every client of a cohort and sums what the clients send.

    Args:
      client_update: What one client computes.
      shared: What the server broadcasts to the clients.
      cohort: Who takes part.
      key: Typed key of the round; clients derive theirs from it by their id.
      batching: What a client runs through.
      lanes: How many clients a device trains side by side. Changes the speed, and results
        only by the order of additions. By default 1 on CPUs and up to 64 elsewhere.
      mesh: Mesh with the axis `"clients"`; all devices by default. Changes the speed only.
      on_nonfinite: `"drop"` leaves out a client whose update has a norm that is not finite (or
        whose model state or weight is not), `"keep"` lets it through.
      rewrite_convolutions: Whether to apply `canonical_convolutions` to the local step. Changes
        the speed only; by default on CPUs.

    Returns:
      The weighted sum, the total weight and the metrics. A client without examples takes no
      step, has weight zero and zeros for metrics.
    """
    mesh = resolve(mesh)
    num_devices = 1 if mesh is None else mesh.devices.size
    per_device = -(-cohort.capacity // num_devices)
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    lanes = min(_default_lanes(platform) if lanes is None else lanes, per_device)
    if rewrite_convolutions is None:
        rewrite_convolutions = platform == "cpu"
    rewrite = canonical_convolutions if rewrite_convolutions else lambda function: function
    num_steps = count_steps(cohort.num_examples, batching)
    table = _deal(num_steps, num_devices, lanes)

    def run_waves(
        table: jax.Array,
        num_steps: jax.Array,
        shared: PyTree,
        cohort: Cohort,
        key: jax.Array,
    ) -> CohortResult:
        lane = _lane(client_update, shared, cohort, key, batching, on_nonfinite)
        return _sum_waves(lane, table, num_steps, rewrite)

    replicated = (num_steps, shared, cohort, random.fast(key))
    if mesh is None:
        result = run_waves(table[0], *replicated)
    else:
        # With check_vma on, a gradient with respect to replicated params is summed over the
        # devices by autodiff: inside local training, at every step, by devices that take
        # different numbers of steps. Off, gradients inside the body stay the device's own.
        result = jax.shard_map(
            lambda table, *replicated: jax.lax.psum(run_waves(table[0], *replicated), AXIS),
            mesh=mesh,
            in_specs=(PartitionSpec(AXIS),) + (PartitionSpec(),) * len(replicated),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(table, *replicated)
    clients = {
        **result.clients,
        "nonfinite": result.clients["nonfinite"] > 0,
        "num_examples": count_processed(cohort.num_examples, batching),
        "num_steps": num_steps,
    }
    return result._replace(clients=clients)


def _default_lanes(platform: str) -> int:
    # On a CPU a second lane only turns matrix products and convolutions into batched ones,
    # which run slower per client; elsewhere many lanes fill the chip.
    return 1 if platform == "cpu" else 64


def _deal(num_steps: jax.Array, num_devices: int, lanes: int) -> jax.Array:
    """Which client runs where: slots `[devices, waves, lanes]`; the capacity means none."""
    capacity = num_steps.shape[0]
    waves = -(-capacity // (num_devices * lanes))
    order = jnp.argsort(-num_steps).astype(jnp.int32)
    order = jnp.pad(order, (0, waves * num_devices * lanes - capacity), constant_values=capacity)
    table = order.reshape(waves, num_devices, lanes)
    # Every other wave is dealt backwards, or the first device would get all the long ones.
    backwards = (jnp.arange(waves) % 2 == 1)[:, None, None]
    return jnp.where(backwards, table[:, ::-1], table).swapaxes(0, 1)


class _Lane(NamedTuple):
    """One client's work, from its slot in the cohort."""

    init: Callable[[jax.Array], PyTree]
    step: Callable[[jax.Array, jax.Array, PyTree], PyTree]
    final: Callable[[jax.Array, PyTree], ClientResult]


def _lane(
    client_update: ClientUpdate,
    shared: PyTree,
    cohort: Cohort,
    key: jax.Array,
    batching: Batching,
    on_nonfinite: str,
) -> _Lane:
    def init(slot: jax.Array) -> PyTree:
        return client_update.init(shared, client_key(key, cohort.client_ids[slot], KEY_INIT))

    def step(step: jax.Array, slot: jax.Array, client_state: PyTree) -> PyTree:
        client_id = cohort.client_ids[slot]
        key_data = client_key(key, client_id, KEY_DATA)
        key_step = jax.random.fold_in(client_key(key, client_id, KEY_STEP), step)
        batch = read_batch(cohort, key_data, slot, step, batching)
        return client_update.step(shared, client_state, batch, key_step)

    def final(slot: jax.Array, client_state: PyTree) -> ClientResult:
        num_examples = cohort.num_examples[slot]
        result = client_update.final(shared, client_state, num_examples)
        norm = optax.tree.norm(result.update)
        finite = jnp.isfinite(norm + optax.tree.norm(result.model_state) + result.weight)
        left_out = ~finite if on_nonfinite == "drop" else False
        weight = jnp.where(left_out, 0, result.weight)

        def weighted(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda x: jnp.where(left_out, 0, weight * x), tree)

        metrics = {
            **result.metrics,
            "update_norm": norm,
            "weight": weight,
            "nonfinite": jnp.where(finite, 0.0, 1.0),
        }
        return ClientResult(weighted(result.update), weight, metrics, weighted(result.model_state))

    return _Lane(init, step, final)


def _run_one(lane: _Lane, rewrite: _Rewrite, slot: jax.Array, num_steps: jax.Array) -> ClientResult:
    """One client, without an axis of lanes that would make products and copies batched."""

    def step(i: jax.Array, state: PyTree) -> PyTree:
        return lane.step(i, slot, state)

    state = jax.lax.fori_loop(0, num_steps, rewrite(step), lane.init(slot))
    return lane.final(slot, state)


def _run_lanes(
    lane: _Lane, rewrite: _Rewrite, slots: jax.Array, num_steps: jax.Array
) -> ClientResult:
    """A wave of clients `[lanes]` side by side: summed, but for the metrics `[lanes]`."""

    def where(active: jax.Array, x: jax.Array, otherwise: jax.Array | int) -> jax.Array:
        return jnp.where(active.reshape((-1,) + (1,) * (x.ndim - 1)), x, otherwise)

    def step(i: jax.Array, states: PyTree) -> PyTree:
        after = jax.vmap(functools.partial(lane.step, i))(slots, states)
        return jax.tree.map(lambda new, old: where(i < num_steps, new, old), after, states)

    states = jax.vmap(lane.init)(slots)
    states = jax.lax.fori_loop(0, num_steps.max(), rewrite(step), states)
    results = jax.vmap(lane.final)(slots, states)
    results = jax.tree.map(lambda x: where(num_steps > 0, x, 0), results)
    summed = jax.tree.map(lambda x: x.sum(0), results._replace(metrics={}))
    return summed._replace(metrics=results.metrics)


def _sum_waves(
    lane: _Lane, table: jax.Array, num_steps: jax.Array, rewrite: _Rewrite
) -> CohortResult:
    """Runs one device's waves `[waves, lanes]` and sums what their clients send."""
    capacity, single = num_steps.shape[0], table.shape[1] == 1
    table, run_wave = (table[:, 0], _run_one) if single else (table, _run_lanes)
    slots = jnp.minimum(table, capacity - 1)
    steps = jnp.where(table < capacity, num_steps[slots], 0)

    def add_wave(wave: jax.Array, total: ClientResult) -> ClientResult:
        result = run_wave(lane, rewrite, slots[wave], steps[wave])
        summed = jax.tree.map(jnp.add, total._replace(metrics={}), result._replace(metrics={}))
        metrics = jax.tree.map(lambda all_, x: all_.at[wave].set(x), total.metrics, result.metrics)
        return summed._replace(metrics=metrics)

    one = jax.eval_shape(functools.partial(run_wave, lane, rewrite), slots[0], steps[0])
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
    total = total._replace(
        metrics=jax.tree.map(lambda x: jnp.zeros(table.shape, x.dtype), one.metrics)
    )
    # Sorted by length, the waves without a step are the last ones: they need not run.
    num_waves = (steps.reshape(table.shape[0], -1).max(1) > 0).sum()
    total = jax.lax.fori_loop(0, num_waves, add_wave, total)

    def in_cohort_order(x: jax.Array) -> jax.Array:
        return jnp.zeros(capacity, x.dtype).at[table].set(x, mode="drop")

    clients = jax.tree.map(in_cohort_order, total.metrics)
    return CohortResult(total.update, total.weight, total.model_state, clients)
