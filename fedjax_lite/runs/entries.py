"""Entries of stores in files, on their way to rounds and back while other rounds are running."""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lite.base import Cohort, PyTree, ServerState
from fedjax_lite.engine.file_store import FileStore, check_population, file_stores, place
from fedjax_lite.engine.store import STORES


class Entries(NamedTuple):
    """What the clients of a cohort keep, in one of two places.

    Attributes:
      read: By field of the state, arrays `[clients, ...]` as they were in the files.
      last: The same of the last cohort, after its round.
      places: Where in `last` each client is, int32 `[clients]`; -1 of those who are not.
    """

    read: dict[str, PyTree]
    last: dict[str, PyTree]
    places: jax.Array

    def newest(self) -> dict[str, PyTree]:
        """The entries as they are after the last round."""

        def newest(read: jax.Array, last: jax.Array) -> jax.Array:
            is_last = (self.places >= 0).reshape(-1, *[1] * (read.ndim - 1))
            return jnp.where(is_last, last[self.places], read)

        return jax.tree.map(newest, self.read, self.last)


class Courier:
    """Fetches what a cohort's clients keep, and brings back what they keep then.

    A round's entries are read while the one before it is running, of whose clients the entries are
    taken over on the devices; they are written while the one after it is running.
    """

    def __init__(self, state: ServerState) -> None:
        self._stores = {
            name: FileStore(np.asarray(store.index), store.file)
            for name, store in file_stores(state).items()
        }
        self._sharding = state.round.sharding
        self._last_ids = np.empty(0, np.int32)
        self._last: dict[str, PyTree] = {}

    def __bool__(self) -> bool:
        return bool(self._stores)

    def fetch(self, cohort: Cohort) -> Entries:
        """The entries of a round that comes next."""
        check_population(self._stores, cohort.num_clients)
        ids = np.asarray(cohort.client_ids)
        read = {
            name: place(store.read(ids), self._sharding) for name, store in self._stores.items()
        }
        slots = {id: slot for slot, id in enumerate(self._last_ids.tolist()) if id >= 0}
        places = np.array([slots.get(id, -1) for id in ids.tolist()], np.int32)
        return Entries(read, self._last or read, jax.device_put(places, self._sharding))

    def bring(self, cohort: Cohort, kept: dict[str, PyTree]) -> None:
        """Takes what the clients of a round that has begun will keep; writes that of the last."""
        self.arrive()
        self._last_ids, self._last = np.asarray(cohort.client_ids), kept

    def arrive(self) -> dict[str, FileStore]:
        """Waits for the last round, and returns the stores with all that is kept."""
        for name, kept in self._last.items():
            self._stores[name] = self._stores[name].written(self._last_ids, kept)
        self._last_ids, self._last = np.empty(0, np.int32), {}
        return self._stores

    def seal(self, keep: int) -> None:
        """Is called before a checkpoint; see `EntryFile.seal`."""
        for store in self._stores.values():
            store.file.seal(keep)

    def reclaim(self, states: Iterable[ServerState]) -> None:
        """Is called with the states of all checkpoints, when one of them has been restored."""
        kept = [file_stores(state) for state in states]
        for name, store in self._stores.items():
            store.file.reclaim(np.asarray(stores[name].index) for stores in kept)


def without_files(state: ServerState) -> ServerState:
    """The state without the stores that lie in files."""
    return dataclasses.replace(state, **dict.fromkeys(file_stores(state), ()))


def taken_off(state: ServerState, entries: Entries) -> tuple[ServerState, dict[str, PyTree]]:
    """The state without the entries of a cohort, and these."""
    kept = {name: getattr(state, name) for name in STORES if name in entries.read}
    return dataclasses.replace(state, **dict.fromkeys(kept, ())), kept
