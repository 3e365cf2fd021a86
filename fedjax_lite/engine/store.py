"""What clients keep between rounds: one entry per client of the population, read by its id.

Of several devices each holds the entries of its share of the clients, if the shares are equal and
the store is large; else each has a copy of all.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from fedjax_lite import _validate
from fedjax_lite.base import PyTree
from fedjax_lite.xla.mesh import AXIS, from_host, gather_over_devices, resolve
from fedjax_lite.xla.rows import Rows, map_rows, pack_row, read_rows, wants_flat

STORES = ("store", "pipeline_store")
"""The fields of a `ServerState` that have an entry for each client."""
MEMORY_KINDS = ("device", "pinned_host")
# A copy of less than this on each device takes little memory. What is spread has to travel: 84 ms a
# round in place of 68, for SCAFFOLD's 50 entries of 0.8 MB on two virtual CPU devices.
_LEAST_SPREAD_BYTES = 2**28
_LEAST_SPREAD_BYTES_OF_COHORT = 2**25  # What comes from a file has to travel in any case.
# What devices exchange at once, if it is more than a wave: of more, CPUs wait for their memory.
_MOST_BYTES = 2**20


def is_spread(
    store: PyTree, num_entries: int, num_devices: int, *, of_cohort: bool = False
) -> bool:
    """Whether each device holds its share of the entries, and not a copy of all.

    Args:
      store: Arrays, or shapes, `[num_entries, ...]`.
      num_entries: How many there are.
      num_devices: How many devices there are.
      of_cohort: Whether they are those of a cohort, and not of a population.
    """
    least = _LEAST_SPREAD_BYTES_OF_COHORT if of_cohort else _LEAST_SPREAD_BYTES
    is_large = num_entries * _entry_bytes(store) >= least
    return is_large and num_devices > 1 and num_entries % num_devices == 0


def sharding_of(
    store: PyTree, num_entries: int, memory_kind: str, mesh: Mesh, *, of_cohort: bool = False
) -> NamedSharding:
    """Where a store lies on the devices of a mesh; for the arguments see `is_spread`."""
    spread = is_spread(store, num_entries, mesh.size, of_cohort=of_cohort)
    spec = PartitionSpec(AXIS) if spread else PartitionSpec()
    return NamedSharding(mesh, spec, memory_kind=memory_kind)


def _entry_bytes(store: PyTree) -> int:
    return sum(x.dtype.itemsize * math.prod(x.shape[1:]) for x in jax.tree.leaves(store))


def create_store(
    entry: PyTree, num_clients: int, memory_kind: str, mesh: Mesh | None, *, traced: bool
) -> PyTree:
    """The store in which every client has the same entry, on the devices that rounds run on.

    Args:
      entry: What a client keeps before its first round.
      num_clients: Size of the population.
      memory_kind: `"device"` or `"pinned_host"`.
      mesh: As for `run_clients`.
      traced: Whether a program is being traced, which then has the store where it runs.
    """
    mesh, entry = resolve(mesh), _validate.strong(entry)
    device = jax.local_devices()[0] if mesh is None else mesh.local_devices[0]
    if wants_flat(entry, device):
        entry = jax.tree.map(lambda x: Rows(pack_row(x, 0), x.shape) if x.shape else x, entry)
    sharding: Sharding = SingleDeviceSharding(jax.local_devices()[0], memory_kind=memory_kind)
    if mesh is not None:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((num_clients, *x.shape), x.dtype), entry
        )
        sharding = sharding_of(shapes, num_clients, memory_kind, mesh)

    def entries(x: jax.Array) -> jax.Array:
        shape = (num_clients, *x.shape)
        if traced:
            stacked = jnp.broadcast_to(x, shape)
            on_host = memory_kind == "pinned_host"
            return jax.device_put(stacked, jax.memory.Space.Host) if on_host else stacked
        # By way of the host: it may have room where the device has not.
        return from_host(np.broadcast_to(np.asarray(x), shape), sharding)

    return jax.tree.map(entries, entry)


def check_store(store: PyTree, num_clients: int) -> None:
    """Refuses a store of another population than the cohort's."""
    for path, entries in jax.tree.leaves_with_path(store):
        if entries.shape[:1] != (num_clients,):
            raise ValueError(
                f"state.store{jax.tree_util.keystr(path)} has shape {entries.shape}, while the"
                f" cohort was drawn from a population of {num_clients} clients; give"
                f" algorithm.init num_clients={num_clients}, or draw from the population that"
                " the state belongs to."
            )


def check_entry(entry: PyTree, store: PyTree) -> None:
    """Refuses an entry that is not of the store's structure, shapes and dtypes."""
    expected = map_rows(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), store)
    remedy = "return what the client keeps in the form that it is stored in."
    _validate.same_form("the entry of client_update.final", entry, expected, remedy)


def read(store: PyTree, client_ids: jax.Array) -> PyTree:
    """The entries of a client, or of clients `[lanes]`, in device memory."""

    def entries(x: Any) -> jax.Array:
        on_host = _on_host(x.flat if isinstance(x, Rows) else x)
        return read_rows(x, one_by_one) if on_host else x[client_ids]

    def one_by_one(x: jax.Array) -> jax.Array:
        if client_ids.ndim == 0:
            return _read_host(x, client_ids)
        return jax.lax.map(functools.partial(_read_host, x), client_ids)

    return map_rows(entries, store)


def write(store: PyTree, client_ids: jax.Array, kept: jax.Array, entries: PyTree) -> PyTree:
    """The store with new entries of a client, or of clients `[lanes]`, where they are kept."""

    def put(x: Any, new: jax.Array) -> Any:
        if isinstance(x, Rows):
            return Rows(put(x.flat, x.packed(new)), x.dims)
        if not _on_host(x):
            return x.at[jnp.where(kept, client_ids, x.shape[0])].set(new, mode="drop")
        # Accelerators copy slices from and to the host's memory; they do not scatter there.
        ids, keeps = jnp.atleast_1d(client_ids), jnp.atleast_1d(kept)
        news = new.reshape(ids.size, *x.shape[1:])

        def one(lane: jax.Array, x: jax.Array) -> jax.Array:
            entry = jnp.where(keeps[lane], news[lane], _read_host(x, ids[lane]))
            entry = jax.device_put(entry, jax.memory.Space.Host)
            return jax.lax.dynamic_update_index_in_dim(x, entry, ids[lane], 0)

        return jax.lax.fori_loop(0, ids.size, one, x)

    return map_rows(put, store, entries)


def collect(part: PyTree, client_ids: jax.Array) -> PyTree:
    """The entries of a device's own clients, from the parts of all devices.

    Their memory grows with the cohort, up to that of another part: still no more than a copy.

    Args:
      part: Entries of this device's share of the clients, arrays `[share, ...]`.
      client_ids: The clients of all devices, int32 `[devices, waves, lanes]`.

    Returns:
      Arrays `[waves * lanes, ...]`.
    """
    num_devices, num_waves, lanes = client_ids.shape
    size = _waves_at_once(part, num_devices, num_waves, lanes)

    def one_group(i: jax.Array, own: PyTree) -> PyTree:
        start = jnp.minimum(i * size, num_waves - size)
        ids = jax.lax.dynamic_slice_in_dim(client_ids, start, size, 1)
        places, _ = _local(part, ids.reshape(-1))
        holder = ids[jax.lax.axis_index(AXIS)].reshape(-1) // _share(part)

        def fetch(own: jax.Array, entries: jax.Array) -> jax.Array:
            # Each device sends each other one as many entries as that one has clients, of which
            # those that it holds count: no bit is touched.
            sent = entries.reshape(num_devices, size * lanes, *entries.shape[1:])
            received = jax.lax.all_to_all(sent, AXIS, 0, 0)
            fetched = received[holder, jnp.arange(size * lanes)]
            return jax.lax.dynamic_update_slice_in_dim(own, fetched, start * lanes, 0)

        return jax.tree.map(fetch, own, read(part, places))

    nothing = map_rows(lambda x: jnp.zeros((num_waves * lanes, *x.shape[1:]), x.dtype), part)
    return jax.lax.fori_loop(0, -(-num_waves // size), one_group, nothing)


def exchange(
    store: PyTree,
    own: PyTree | None,
    places: jax.Array,
    client_ids: jax.Array,
    kept: jax.Array,
) -> PyTree:
    """A device's copy of the store, or its part, with what the clients of all devices keep.

    Args:
      store: The copy or part.
      own: What holds the new entries of the device's own clients; `None` if its copy does.
      places: Where, int32 `[waves, lanes]`.
      client_ids: The clients of all devices, int32 `[devices, waves, lanes]`.
      kept: Whether these keep something new.
    """
    num_devices, num_waves, lanes = client_ids.shape
    size = _waves_at_once(store, num_devices, num_waves, lanes)

    # Some waves at a time, so that memory does not grow with the cohort.
    def one_group(i: jax.Array, store: PyTree) -> PyTree:
        start = jnp.minimum(i * size, num_waves - size)
        at, ids, keeps = (
            jax.lax.dynamic_slice_in_dim(x, start, size, x.ndim - 2).reshape(-1)
            for x in (places, client_ids, kept)
        )
        entries = gather_over_devices(read(store if own is None else own, at))
        if own is not None:
            ids, is_here = _local(store, ids)
            keeps &= is_here
        return write(store, ids, keeps, entries)

    return jax.lax.fori_loop(0, -(-num_waves // size), one_group, store)


def _waves_at_once(store: PyTree, num_devices: int, num_waves: int, lanes: int) -> int:
    """How many waves of all devices exchange their entries at once."""
    at_once = _MOST_BYTES // max(_entry_bytes(store) * num_devices * lanes, 1)
    return min(max(at_once, 1), num_waves)


def _local(part: PyTree, client_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where clients are in a device's part of the store, and whether they are there."""
    share = _share(part)
    places = client_ids - jax.lax.axis_index(AXIS) * share
    return jnp.clip(places, 0, share - 1), (places >= 0) & (places < share)


def _share(part: PyTree) -> int:
    return jax.tree.leaves(part)[0].shape[0]


def _on_host(x: jax.Array) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def _read_host(x: jax.Array, client_id: jax.Array) -> jax.Array:
    return jax.device_put(
        jax.lax.dynamic_index_in_dim(x, client_id, keepdims=False), jax.memory.Space.Device
    )
