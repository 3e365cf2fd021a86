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
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fedjax_lite import _validate, random
from fedjax_lite.base import ClientResult, ClientUpdate, PyTree
from fedjax_lite.batches import (
    KEY_DATA,
    KEY_INIT,
    KEY_STEP,
    Batching,
    Client,
    bound_steps,
    client_key,
    count_processed,
    count_steps,
    read_batch,
    steps_per_epoch,
)
from fedjax_lite.cohort import Cohort
from fedjax_lite.mesh import AXIS, deal, resolve, sum_over_devices
from fedjax_lite.packing import pack, unpack
from fedjax_lite.precision import squared_norm
from fedjax_lite.rewrite import rewritten
from fedjax_lite.store import check_output, check_store, read, write

ON_NONFINITE = ("drop", "keep")
MEASURED = ("_before", "_after")
_REPORTED = {"num_examples", "num_steps", "update_norm", "weight", "nonfinite", "bits_down"}
_MOST_LANES = 64
Rewrite = Callable[[Callable[..., PyTree]], Callable[..., PyTree]]


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
    """

    update: PyTree
    weight: jax.Array
    model_state: PyTree
    statistics: PyTree
    store: PyTree
    clients: dict[str, jax.Array]


def run_clients(
    client_update: ClientUpdate,
    shared: PyTree,
    cohort: Cohort,
    key: jax.Array,
    *,
    batching: Batching,
    store: PyTree = (),
    keep_output: bool = True,
    on_nonfinite: str = "drop",
    differentiable: bool = False,
    lanes: int | None = None,
    mesh: Mesh | None = None,
    rewrite_convolutions: bool | None = None,
) -> CohortResult:
    """Runs the local steps of every client of a cohort and sums what the clients send.

    Args:
      client_update: What one client computes.
      shared: What the server broadcasts to the clients.
      cohort: Who takes part.
      key: Typed key of the round; clients derive theirs from it by their id.
      batching: What a client runs through.
      store: What clients keep between rounds, arrays `[num_clients, ...]`.
      keep_output: Whether what clients return for the store replaces what they had.
      on_nonfinite: `"drop"` leaves out a client whose update has a norm that is not finite (or
        whose model state, statistics, weight or output is not), `"keep"` lets it through.
      differentiable: Run loops of a length known when compiling, and skip what exceeds the
        client's own, as reverse-mode differentiation needs.
      lanes: How many clients a device trains side by side. Changes the speed, and results
        only by the order of additions. By default 1 on CPUs and up to 64 elsewhere.
      mesh: Mesh with the axis `"clients"`; all devices by default. Changes the speed only.
      rewrite_convolutions: Whether to rewrite the convolutions of what a client computes and, on
        CPUs, its products (see `rewrite.py`). Changes the speed only; by default on CPUs, and on
        GPUs with several lanes.

    Returns:
      The weighted sum, the total weight, the store and the metrics. A client without examples
      takes no step, has weight zero and zeros for metrics, and keeps what it had.

    Raises:
      ValueError: The store is of another population than the cohort, or not of the form of what
        clients send; the rows of the cohort lie on another mesh; `differentiable` without a bound
        on the number of steps.
    """
    check_store(store, cohort.num_clients)
    mesh = resolve(mesh)
    num_devices = 1 if mesh is None else mesh.devices.size
    lanes = choose_lanes(lanes, shared, cohort.capacity, mesh)
    rewrite = choose_rewrite(rewrite_convolutions, mesh, lanes)
    num_steps = count_steps(cohort.num_examples, batching)
    table = _deal(cohort, num_devices, lanes)

    def run_waves(
        table: jax.Array,
        examples: dict[str, jax.Array],
        num_steps: jax.Array,
        shared: PyTree,
        cohort: Cohort,
        key: jax.Array,
        store: PyTree,
    ) -> CohortResult:
        cohort = dataclasses.replace(cohort, examples=examples)
        bound = bound_steps(cohort, batching) if differentiable else None
        kept_store = store if keep_output else ()
        lane = _lane(client_update, shared, cohort, kept_store, batching, rewrite, on_nonfinite)
        waves = _schedule(cohort, num_steps, table)
        result = _sum_waves(
            lane,
            rewrite,
            waves,
            table,
            key,
            store,
            cohort.capacity,
            keep_output=keep_output,
            bound=bound,
        )
        if mesh is None:
            return result
        store = result.store
        if num_devices > 1:
            store = _exchange(store, table, result.clients["weight"], cohort)
        return sum_over_devices(result._replace(store=()))._replace(store=store)

    without_examples = dataclasses.replace(cohort, examples={})
    replicated = (num_steps, shared, without_examples, random.fast(key), store)
    if mesh is None:
        result = run_waves(table[0], cohort.examples, *replicated)
    else:
        # With check_vma on, a gradient with respect to replicated params is summed over the
        # devices by autodiff: inside local training, at every step, by devices that take
        # different numbers of steps. Off, gradients inside the body stay the device's own.
        # The table, replicated too, is dealt on each device: split, it would be sent around.
        rows = PartitionSpec() if cohort.device_slots is None else PartitionSpec(AXIS)
        result = jax.shard_map(
            lambda table, examples, rest: run_waves(
                table[jax.lax.axis_index(AXIS)], examples, *rest
            ),
            mesh=mesh,
            in_specs=(PartitionSpec(), rows, PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(table, cohort.examples, replicated)
    clients = {
        **result.clients,
        "nonfinite": result.clients["nonfinite"] > 0,
        "num_examples": count_processed(cohort.num_examples, batching),
        "num_steps": num_steps,
    }
    return result._replace(clients=clients)


def choose_lanes(lanes: int | None, shared: PyTree, capacity: int, mesh: Mesh | None) -> int:
    """The number of lanes that a round runs with: what was asked for, or the default."""
    if lanes is None:
        # On a CPU a second lane only turns matrix products and convolutions into batched ones,
        # which run slower per client; elsewhere many lanes fill the chip.
        lanes = 1 if _platform(mesh) == "cpu" else _fitting_lanes(shared, mesh)
    return min(lanes, -(-capacity // (1 if mesh is None else mesh.devices.size)))


def _fitting_lanes(shared: PyTree, mesh: Mesh | None) -> int:
    """How many lanes fit half the memory of a device; the other half is for data and activations.

    A lane is taken to need four times what the server broadcasts: params, gradients, the state of
    the client optimizer, the update.
    """
    device = (jax.local_devices() if mesh is None else mesh.local_devices)[0]
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return _MOST_LANES
    lane_bytes = max(1, 4 * _num_bytes(shared))
    return min(_MOST_LANES, max(1, stats["bytes_limit"] // 2 // lane_bytes))


def _num_bytes(tree: PyTree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def choose_rewrite(rewrite_convolutions: bool | None, mesh: Mesh | None, lanes: int = 1) -> Rewrite:
    """What is applied to functions of one client, or of none, that run inside loops."""
    platform = _platform(mesh)
    default = platform == "cpu" or (platform == "gpu" and lanes > 1)
    if not (default if rewrite_convolutions is None else rewrite_convolutions):
        return functools.partial(rewritten, convolutions=None, products=False)
    form: Literal["channels_last", "patches"] = "channels_last" if platform == "cpu" else "patches"
    # Products of several lanes are batched, which XLA:CPU runs in another way.
    products = platform == "cpu" and lanes == 1
    return functools.partial(rewritten, convolutions=form, products=products)


def _platform(mesh: Mesh | None) -> str:
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _deal(cohort: Cohort, num_devices: int, lanes: int) -> jax.Array:
    """Which client runs where: slots `[devices, waves, lanes]`; the capacity means none."""
    table = cohort.device_slots
    if table is None:
        table = deal(cohort.num_examples, num_devices)
    elif table.shape[0] != num_devices:
        raise ValueError(
            f"the rows of the cohort lie on {table.shape[0]} devices, and the algorithm runs on"
            f" {num_devices}; give dataset.streamed() and the algorithm the same mesh."
        )
    waves = -(-table.shape[1] // lanes)
    unused = waves * lanes - table.shape[1]
    table = jnp.pad(table, ((0, 0), (0, unused)), constant_values=cohort.capacity)
    return table.reshape(num_devices, waves, lanes)


class _Sent(NamedTuple):
    """What comes back from one client, weighted, or from a wave of them."""

    update: PyTree
    weight: jax.Array
    model_state: PyTree
    statistics: PyTree
    metrics: dict[str, jax.Array]
    output: PyTree

    @property
    def summed(self) -> tuple[PyTree, jax.Array, PyTree, PyTree]:
        """What is added up over clients."""
        return self.update, self.weight, self.model_state, self.statistics


class _Trainee(NamedTuple):
    """A client whose turn it is, or those of a wave.

    Attributes:
      client: Who it is.
      num_steps: How many local steps it takes, int32.
      keys: Its keys of this round `[3]`, by purpose.
    """

    client: Client
    num_steps: jax.Array
    keys: jax.Array


def _schedule(cohort: Cohort, num_steps: jax.Array, table: jax.Array) -> jax.Array:
    """What is to be known of the clients in a table of slots, int32 `[waves, lanes, 4]`.

    Id, number of examples, offset and number of steps: one array, of which a wave reads one row,
    and not four.
    """
    fields = jnp.stack([cohort.client_ids, cohort.num_examples, cohort.offsets, num_steps], 1)
    # A slot that is none takes no step.
    return fields.at[table].get(mode="fill", fill_value=0)


def _trainee(row: jax.Array, key: jax.Array) -> _Trainee:
    """The client of a row `[4]`, or of rows `[lanes, 4]`, in a round with this key."""
    client_id, num_examples, offset, num_steps = jnp.moveaxis(row, -1, 0)
    purposes = jnp.array([KEY_INIT, KEY_DATA, KEY_STEP])
    keys = client_key(key, client_id[..., None], purposes)
    return _Trainee(Client(client_id, num_examples, offset), num_steps, keys)


class _Work(NamedTuple):
    """The work of one client, or of a wave of clients `[lanes]`."""

    init: Callable[[_Trainee, PyTree], PyTree]
    step: Callable[[jax.Array, _Trainee, PyTree], PyTree]
    measure: Callable[[_Trainee, PyTree], dict[str, jax.Array]]
    final: Callable[[_Trainee, PyTree, PyTree], _Sent]


def _lane(
    client_update: ClientUpdate,
    shared: PyTree,
    cohort: Cohort,
    store: PyTree,
    batching: Batching,
    rewrite: Rewrite,
    on_nonfinite: str,
) -> _Work:
    def init(trainee: _Trainee, entry: PyTree) -> PyTree:
        return _validate.strong(client_update.init(shared, entry, trainee.keys[KEY_INIT]))

    def step(step: jax.Array, trainee: _Trainee, client_state: PyTree) -> PyTree:
        batch = read_batch(cohort, trainee.keys[KEY_DATA], trainee.client, step, batching)
        key_step = random.fold_in_pair(trainee.keys[KEY_STEP], 0, step)
        after = client_update.step(shared, client_state, batch, key_step)
        _validate.same_form(
            "what client_update.step returned",
            after,
            client_state,
            "return a client state like that of init.",
        )
        return after

    def measure(trainee: _Trainee, client_state: PyTree) -> dict[str, jax.Array]:
        values = client_update.measure
        if values is None:
            return {}
        # The order of the examples does not matter here, and no gradient passes.
        in_order = dataclasses.replace(batching, shuffle=False)
        shared_, state = jax.lax.stop_gradient((shared, client_state))

        def sums(i: jax.Array) -> dict[str, jax.Array]:
            batch = read_batch(cohort, trainee.keys[KEY_DATA], trainee.client, i, in_order)
            with _validate.reading(batch):
                measured = values(shared_, state, batch)
            for name, value in measured.items():
                _validate.per_example(f"metric {name!r}", value.shape, batch["mask"].shape[0])
            return {name: jnp.where(batch["mask"], x, 0).sum() for name, x in measured.items()}

        num_examples = trainee.client.num_examples
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sums, jnp.int32(0))
        )
        add = rewrite(lambda i, total: jax.tree.map(jnp.add, total, sums(i)))
        total = jax.lax.fori_loop(0, steps_per_epoch(num_examples, batching), add, zeros)
        return jax.tree.map(lambda x: x / jnp.maximum(num_examples, 1), total)

    def final(trainee: _Trainee, client_state: PyTree, measured: PyTree) -> _Sent:
        result = client_update.final(shared, client_state, trainee.client.num_examples)
        result = _validate.strong(_check_result(result))
        check_output(result.client_output, store)
        # No gradient: that of a norm is not a number at zero, whatever it is multiplied with.
        norm = jax.lax.stop_gradient(result.norm)
        if norm is None:
            norm = jnp.sqrt(squared_norm(jax.lax.stop_gradient(result.update)))
        weight = _validate.scalar("the weight of client_update.final", result.weight)
        others = (result.model_state, result.statistics, result.client_output)
        floats = [x for x in jax.tree.leaves(others) if jnp.issubdtype(x.dtype, jnp.inexact)]
        finite = jnp.isfinite(norm + squared_norm(jax.lax.stop_gradient(floats)) + weight)
        finite &= weight >= 0  # Below zero, a client would pull the mean to the other side.
        left_out = ~finite if on_nonfinite == "drop" else jnp.bool_(False)
        weight = jnp.where(left_out, 0, weight)
        counts = weight != 0

        def weighted(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda x: jnp.where(left_out, 0, weight * x), tree)

        metrics = {
            **result.metrics,
            **measured,
            "update_norm": norm,
            "weight": weight,
            "nonfinite": jnp.where(finite, 0.0, 1.0),
        }
        return _Sent(
            update=weighted(result.update),
            weight=weight,
            model_state=weighted(result.model_state),
            statistics=jax.tree.map(lambda x: jnp.where(counts, x, 0), result.statistics),
            metrics=metrics,
            output=result.client_output,
        )

    return _Work(init, step, measure, final)


def _check_result(result: ClientResult) -> ClientResult:
    _validate.instance("what client_update.final returned", result, ClientResult)
    if taken := _REPORTED.intersection(result.metrics):
        raise ValueError(
            f"the metrics of client_update.final have {', '.join(map(repr, sorted(taken)))}, which"
            " every algorithm reports by itself; choose another name."
        )
    for path, value in jax.tree.leaves_with_path(result.metrics):
        if not isinstance(value, jax.Array | np.ndarray | np.generic | int | float):
            where = f"the metrics of client_update.final{jax.tree_util.keystr(path)}"
            raise TypeError(f"{where} is {value!r}; report numbers and arrays.")
    return result


def _repeat(
    end: jax.Array,
    body: Callable[[jax.Array, PyTree], PyTree],
    state: PyTree,
    bound: int | None,
) -> PyTree:
    """`fori_loop(0, end, body, state)`, or the same as a scan up to a static bound."""
    if bound is None:
        return jax.lax.fori_loop(0, end, body, state)

    def masked(state: PyTree, i: jax.Array) -> tuple[PyTree, None]:
        return jax.lax.cond(i < end, body, lambda i, state: state, i, state), None

    return jax.lax.scan(masked, state, jnp.arange(bound, dtype=end.dtype))[0]


def _wave(lane: _Work, rewrite: Rewrite, *, alone: bool) -> _Work:
    """The work of a wave: its `final` sums over clients, but for what is each client's own.

    One client alone goes without an axis of lanes, which would make its matrix products batched
    ones and cost copies of its params.
    """
    lane = _Work(rewrite(lane.init), rewrite(lane.step), lane.measure, rewrite(lane.final))
    if alone:
        return lane

    def step(i: jax.Array, trainees: _Trainee, states: PyTree) -> PyTree:
        after = jax.vmap(lane.step, (None, 0, 0))(i, trainees, states)
        return _where(i < trainees.num_steps, after, states)

    def final(trainees: _Trainee, states: PyTree, measured: PyTree) -> _Sent:
        sent = jax.vmap(lane.final)(trainees, states, measured)
        sent = _where(trainees.num_steps > 0, sent, jax.tree.map(jnp.zeros_like, sent))
        update, weight, model_state, statistics = jax.tree.map(lambda x: x.sum(0), sent.summed)
        return sent._replace(
            update=update, weight=weight, model_state=model_state, statistics=statistics
        )

    return _Work(jax.vmap(lane.init), step, jax.vmap(lane.measure), final)


def _run_wave(wave: _Work, bound: int | None, trainees: _Trainee, entries: PyTree) -> _Sent:
    """A wave from beginning to end."""
    states = wave.init(trainees, entries)
    before = wave.measure(trainees, states)
    states = _repeat(
        trainees.num_steps.max(),
        lambda i, states: wave.step(i, trainees, states),
        states,
        bound,
    )
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


def _sum_waves(
    lane: _Work,
    rewrite: Rewrite,
    waves: jax.Array,
    table: jax.Array,
    key: jax.Array,
    store: PyTree,
    capacity: int,
    *,
    keep_output: bool,
    bound: int | None,
) -> CohortResult:
    """Runs one device's waves and sums what their clients send.

    Args:
      lane: One client's work.
      rewrite: What is applied to functions that run inside loops.
      waves: The clients `[waves, lanes, 4]`; see `_schedule`.
      table: Their slots `[waves, lanes]`; the capacity means none.
      key: Key of the round.
      store: What clients keep.
      capacity: Number of slots of the cohort.
      keep_output: Whether the store is kept up to date.
      bound: Length of the loops if they are to be differentiated.
    """
    if alone := table.shape[1] == 1:
        table, waves = table[:, 0], waves[:, 0]
    work, num_axes = _wave(lane, rewrite, alone=alone), table.ndim - 1

    def trainees_of(wave: jax.Array) -> _Trainee:
        return _trainee(jax.lax.dynamic_index_in_dim(waves, wave, keepdims=False), key)

    def form() -> tuple[PyTree, dict[str, jax.Array]]:
        """What a wave sends, its steps left out, which change no shape."""
        trainees = trainees_of(jnp.int32(0))
        states = work.init(trainees, read(store, trainees.client.id))
        measured = work.measure(trainees, states)
        sent = work.final(trainees, states, _measured(measured, measured))
        return sent.summed, sent.metrics

    def add_wave(wave: jax.Array, carry: tuple[PyTree, PyTree, PyTree]) -> PyTree:
        total, per_client, kept_store = carry
        trainees = trainees_of(wave)
        current = kept_store if keep_output else store
        sent = _run_wave(work, bound, trainees, read(current, trainees.client.id))
        total = jax.tree.map(jnp.add, total, sent.summed)
        per_client = [
            jax.lax.dynamic_update_index_in_dim(all_, x, wave, 0)
            for all_, x in zip(per_client, pack(sent.metrics, num_axes), strict=True)
        ]
        if keep_output:
            kept = sent.metrics["weight"] != 0
            kept_store = write(kept_store, trainees.client.id, kept, sent.output)
        return total, per_client, kept_store

    summed, metrics = jax.eval_shape(form)
    packed = jax.eval_shape(functools.partial(pack, num_axes=num_axes), metrics)
    # Sorted by length, the waves without a step are the last ones: they need not run.
    longest = waves[..., 3].reshape(table.shape[0], -1).max(1)
    (update, weight, model_state, statistics), per_client, kept_store = _repeat(
        (longest > 0).sum(dtype=jnp.int32),
        add_wave,
        (
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), summed),
            [jnp.zeros((table.shape[0], *x.shape), x.dtype) for x in packed],
            store if keep_output else (),
        ),
        None if bound is None else table.shape[0],
    )

    def in_cohort_order(x: jax.Array) -> jax.Array:
        return jnp.zeros((capacity, x.shape[-1]), x.dtype).at[table].set(x, mode="drop")

    clients = unpack([in_cohort_order(x) for x in per_client], metrics, num_axes)
    return CohortResult(update, weight, model_state, statistics, kept_store, clients)


def _exchange(store: PyTree, table: jax.Array, weights: jax.Array, cohort: Cohort) -> PyTree:
    """The store with what the clients of all devices keep, from the copies of each device."""
    if not jax.tree.leaves(store):
        return store
    slots = jnp.minimum(table, cohort.capacity - 1)
    client_ids = cohort.client_ids[slots]
    kept = (table < cohort.capacity) & (weights[slots] != 0)

    # A wave at a time, so that memory does not grow with the cohort.
    def one_wave(wave: jax.Array, store: PyTree) -> PyTree:
        new = (client_ids[wave], kept[wave], read(store, client_ids[wave]))
        return write(store, *jax.lax.all_gather(new, AXIS, tiled=True))

    return jax.lax.fori_loop(0, table.shape[0], one_wave, store)
