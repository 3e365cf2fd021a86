"""The state that a run begins with, on the devices that its rounds run on."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from fedjax_lite.base import PyTree, ServerState
from fedjax_lite.engine.file_store import file_stores, with_stores
from fedjax_lite.engine.store import STORES, sharding_of
from fedjax_lite.xla.mesh import put


def on_devices_of(state: ServerState, made: Callable[[], ServerState]) -> ServerState:
    """The state, whose arrays of NumPy or of one device are put where rounds want them.

    Args:
      state: The state.
      made: Makes one of the same algorithm, for one client, which tells where that is. It is called
        if an array of the state lies elsewhere.
    """
    in_files = file_stores(state)
    near = with_stores(state, dict.fromkeys(in_files, ()))
    if not any(map(_is_local, jax.tree.leaves(near))):
        return state
    like = made()
    home = like.round.sharding

    def stored(name: str) -> PyTree:
        store, kind = getattr(near, name), jax.tree.leaves(getattr(like, name))
        if not (kind and jax.tree.leaves(store)):
            return store
        kind = kind[0].sharding.memory_kind
        if not isinstance(home, NamedSharding) or not isinstance(home.mesh, Mesh):
            return put(store, home.with_memory_kind(kind))
        return put(store, sharding_of(store, len(jax.tree.leaves(store)[0]), kind, home.mesh))

    stores = {name: stored(name) for name in STORES}
    near = put(with_stores(near, dict.fromkeys(STORES, ())), home)
    return with_stores(near, {**stores, **in_files})


def _is_local(x: Any) -> bool:
    """Whether an array lies with the host, or on one of several devices or processes."""
    if not isinstance(x, jax.Array):
        return True
    if jax.process_count() > 1 and x.is_fully_addressable:
        return True
    return jax.device_count() > 1 and isinstance(x.sharding, SingleDeviceSharding)
