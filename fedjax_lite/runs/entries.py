"""Entries of stores in files, on their way to rounds and back while other rounds are running."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from fedjax_lite.base import Cohort, PyTree, ServerState
from fedjax_lite.engine.file_store import (
    FileStore,
    check_population,
    copy_rows,
    file_stores,
    place,
    with_stores,
)


class Courier:
    """Fetches what a cohort's clients keep, and brings back what they keep then.

    A round's entries are read while the one before it is running, but for those of clients who take
    part in both, and written while the one after it is running.
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

    def fetch(self, state: ServerState, cohort: Cohort) -> tuple[ServerState, Cohort]:
        """The state with the entries of the next cohort, and this."""
        check_population(self._stores, cohort.num_clients)
        ids = np.asarray(cohort.client_ids)
        were = {client: slot for slot, client in enumerate(self._last_ids.tolist()) if client >= 0}
        last_slots = np.array([were.get(client, -1) for client in ids.tolist()])
        again = np.flatnonzero(last_slots >= 0)
        read = {name: store.read(ids, but=again) for name, store in self._stores.items()}
        if again.size:
            for name, last in self._last.items():
                copy_rows(last, last_slots[again], read[name], again)
        placed = {name: place(entries, self._sharding) for name, entries in read.items()}
        return with_stores(state, placed), dataclasses.replace(cohort, has_entries=True)

    def bring(self, state: ServerState, cohort: Cohort) -> None:
        """Takes what the clients of a round that is running keep, and writes that of the last."""
        self.arrive()
        self._last_ids = np.asarray(cohort.client_ids)
        self._last = {name: getattr(state, name) for name in self._stores}

    def arrive(self) -> dict[str, FileStore]:
        """Waits for the round that is running, and returns the stores with all that is kept."""
        for name, entries in self._last.items():
            self._stores[name] = self._stores[name].written(self._last_ids, entries)
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
