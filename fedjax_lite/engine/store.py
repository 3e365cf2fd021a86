"""What clients keep between rounds: one entry per client of the population, read by its id."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from fedjax_lite import _validate
from fedjax_lite.base import PyTree
from fedjax_lite.xla.mesh import resolve

MEMORY_KINDS = ("device", "pinned_host")


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
    mesh = resolve(mesh)
    sharding = (
        SingleDeviceSharding(jax.local_devices()[0], memory_kind=memory_kind)
        if mesh is None
        else NamedSharding(mesh, PartitionSpec(), memory_kind=memory_kind)
    )

    def entries(x: jax.Array) -> jax.Array:
        shape = (num_clients, *x.shape)
        if traced:
            stacked = jnp.broadcast_to(x, shape)
            on_host = memory_kind == "pinned_host"
            return jax.device_put(stacked, jax.memory.Space.Host) if on_host else stacked
        # By way of the host: it may have room where the device has not. Unlike device_put, it
        # sends nothing around to compare what several processes have.
        return jax.make_array_from_process_local_data(
            sharding, np.broadcast_to(np.asarray(x), shape)
        )

    return jax.tree.map(entries, _validate.strong(entry))


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
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), store)
    remedy = "return what the client keeps in the form that it is stored in."
    _validate.same_form("the entry of client_update.final", entry, expected, remedy)


def read(store: PyTree, client_ids: jax.Array) -> PyTree:
    """The entries of a client, or of clients `[lanes]`, in device memory."""

    def entries(x: jax.Array) -> jax.Array:
        if not _on_host(x):
            return x[client_ids]
        if client_ids.ndim == 0:
            return _read_host(x, client_ids)
        return jax.lax.map(functools.partial(_read_host, x), client_ids)

    return jax.tree.map(entries, store)


def write(store: PyTree, client_ids: jax.Array, kept: jax.Array, entries: PyTree) -> PyTree:
    """The store with new entries of a client, or of clients `[lanes]`, where they are kept."""

    def put(x: jax.Array, new: jax.Array) -> jax.Array:
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

    return jax.tree.map(put, store, entries)


def _on_host(x: jax.Array) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def _read_host(x: jax.Array, client_id: jax.Array) -> jax.Array:
    return jax.device_put(
        jax.lax.dynamic_index_in_dim(x, client_id, keepdims=False), jax.memory.Space.Device
    )
