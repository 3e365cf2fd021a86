"""What clients keep between rounds, in a file: only the entries of a cohort travel to the devices.

An entry is written where nothing lies that a checkpoint refers to, and never changed there, so that
a run goes on from any of its checkpoints, whenever it was killed.
"""

import collections
import contextlib
import dataclasses
import functools
import os
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding

from fedjax_lite import _validate
from fedjax_lite._files import locked
from fedjax_lite.base import Cohort, PyTree, RoundInfo, ServerState
from fedjax_lite.engine.store import STORES, sharding_of

_NOWHERE = np.uint32(2**32 - 1)  # The place of an entry that has not been written.


class _SharedLock:
    """A lock that all files of one path in this process share: those of earlier states are idle."""

    def __init__(self, path: Path) -> None:
        stack = contextlib.ExitStack()
        stack.enter_context(locked(path))
        weakref.finalize(self, stack.close)


_LOCKS: weakref.WeakValueDictionary[Path, _SharedLock] = weakref.WeakValueDictionary()


class EntryFile:
    """A file of entries of equal size, at places that are numbered.

    What a process that was killed has written in part lies at a place that no checkpoint refers to.

    Args:
      path: The file, made if it is missing when something is written.
      first: What a client keeps before its first round.
    """

    def __init__(self, path: Path, first: PyTree) -> None:
        leaves, self._structure = jax.tree.flatten(jax.device_get(first))
        self._first = [np.asarray(x) for x in leaves]
        self._entry_bytes = sum(x.nbytes for x in self._first)
        self.path = path
        self._file: IO[bytes] | None = None  # None until something is read or written.
        self._lock: _SharedLock | None = None  # None until something is written.
        self._num_places = self._count_places()
        self._free: list[int] = []
        self._fresh: set[int] = set()  # Written since the last checkpoint, which knows none of it.
        # Given up since a checkpoint, for each checkpoint that may still be read, the oldest first.
        self._given_up: collections.deque[list[int]] = collections.deque([[]])

    def _count_places(self) -> int:
        """How many there are in the file, one that is written in part included."""
        size = self.path.stat().st_size if self.path.exists() else 0
        return -(-size // max(self._entry_bytes, 1))

    def _open(self, mode: str) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self.path.open(mode)
        weakref.finalize(self, self._file.close)

    def read(self, index: np.ndarray) -> PyTree:
        """The entries at some places.

        Args:
          index: uint32 `[entries, 2]`, the places and checksums.

        Returns:
          NumPy arrays `[entries, ...]`.

        Raises:
          ValueError: What lies there is not what was written.
        """
        entries = [np.empty((len(index), *x.shape), x.dtype) for x in self._first]
        buffer = bytearray(self._entry_bytes)
        for i, (place, checksum) in enumerate(index):
            if place == _NOWHERE:
                for all_, x in zip(entries, self._first, strict=True):
                    all_[i] = x
                continue
            if not self._read_into(buffer, int(place)) or zlib.crc32(buffer) != checksum:
                raise ValueError(
                    f"{self.path} does not hold what was written at place {place}: the state is"
                    " older than the last round, or the file is another run's or damaged; go on"
                    " from the newest state or checkpoint of its run."
                )
            start = 0
            for all_, x in zip(entries, self._first, strict=True):
                all_[i] = np.frombuffer(buffer, x.dtype, x.size, start).reshape(x.shape)
                start += x.nbytes
        return jax.tree.unflatten(self._structure, entries)

    def _read_into(self, buffer: bytearray, place: int) -> bool:
        """Reads what lies at a place; whether there is so much."""
        if self._file is None:
            if not self.path.exists():
                return False
            self._open("rb")
        assert self._file is not None
        self._file.seek(place * self._entry_bytes)
        return self._file.readinto(buffer) == len(buffer)  # type: ignore[attr-defined]

    def write(self, entries: PyTree, slots: np.ndarray, replaced: np.ndarray) -> np.ndarray:
        """Writes some of the entries of a cohort where there is room.

        Args:
          entries: Arrays `[clients, ...]`.
          slots: Which of them, `[entries]`, in rising order.
          replaced: uint32 `[entries]`, the places of those that they stand for from now on.

        Returns:
          Places and checksums, uint32 `[entries, 2]`.
        """
        if self._lock is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.path.with_name(f".{self.path.name}.lock").resolve()
            self._lock = _LOCKS.get(lock) or _LOCKS.setdefault(lock, _SharedLock(lock))
            self._num_places = max(self._num_places, self._count_places())
            self._open("rb+" if self.path.exists() else "wb+")
        index = [self._write(data) for data in _each(entries, slots)]
        for place in replaced[replaced != _NOWHERE].tolist():
            if place in self._fresh:
                self._fresh.remove(place)
                self._free.append(place)
            else:
                self._given_up[-1].append(place)
        return np.array(index, np.uint32).reshape(-1, 2)

    def _write(self, data: bytes) -> tuple[int, int]:
        assert self._file is not None
        place = self._free.pop() if self._free else self._num_places
        self._num_places = max(self._num_places, place + 1)
        self._file.seek(place * self._entry_bytes)
        self._file.write(data)
        self._fresh.add(place)
        return place, zlib.crc32(data)

    def seal(self, keep: int) -> None:
        """Is called before each checkpoint: what it refers to is on disk, and stays.

        Args:
          keep: How many older checkpoints there may be beside it.
        """
        if self._lock is not None and self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._fresh.clear()
        self._given_up.append([])
        while len(self._given_up) > keep + 1:
            self._free += self._given_up.popleft()

    def reclaim(self, used: Iterable[np.ndarray]) -> None:
        """Takes all places for free but those that one of these indices has."""
        places = {int(place) for index in used for place in index[:, 0]}
        self._free = [place for place in range(self._num_places) if place not in places]
        self._fresh.clear()
        self._given_up = collections.deque([[]])  # These are among the free ones.


def _parts(x: jax.Array) -> Iterator[tuple[int, np.ndarray]]:
    """The parts of an array `[clients, ...]` that devices have, and where they start."""
    for shard in sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0):
        if shard.replica_id == 0:
            yield shard.index[0].start or 0, np.asarray(shard.data)


def _each(entries: PyTree, slots: np.ndarray) -> Iterator[bytes]:
    """The bytes of one entry after the other, at slots in rising order."""
    for parts in zip(*map(_parts, jax.tree.leaves(entries)), strict=True):
        (start, first), *_ = parts
        for slot in slots[(slots >= start) & (slots < start + len(first))].tolist():
            yield b"".join(x[slot - start].tobytes() for _, x in parts)


def copy_rows(source: PyTree, rows: np.ndarray, target: PyTree, target_rows: np.ndarray) -> None:
    """Copies rows of arrays of JAX to rows of arrays of NumPy."""

    def copy(x: jax.Array, y: np.ndarray) -> None:
        for start, part in _parts(x):
            here = (rows >= start) & (rows < start + len(part))
            y[target_rows[here]] = part[rows[here] - start]

    jax.tree.map(copy, source, target)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FileStore:
    """What the clients of a population keep, in a file.

    Attributes:
      index: uint32 `[num_clients, 2]`, where each client's entry lies, and its checksum.
      file: The file (static).
    """

    index: Any
    file: EntryFile = dataclasses.field(metadata={"static": True})

    def read(self, client_ids: Any, *, but: Any = ()) -> PyTree:
        """The entries of clients `[clients]`, as NumPy arrays `[clients, ...]`.

        Args:
          client_ids: The clients.
          but: Slots of clients whose entries are not needed.

        Raises:
          ValueError: They are traced; the file does not hold what was written.
        """
        _refuse_traced(self.index, client_ids)
        ids = np.asarray(client_ids)
        is_client = (ids >= 0) & (ids < len(self.index))
        is_client[np.asarray(but, int)] = False
        index = np.asarray(self.index)[np.where(is_client, ids, 0)]
        return self.file.read(np.where(is_client[:, None], index, _NOWHERE))

    def written(self, client_ids: Any, entries: PyTree) -> "FileStore":
        """The store with new entries of clients `[clients]`, which takes the place of this one."""
        ids, index = np.asarray(client_ids), np.array(self.index)
        slots = np.flatnonzero((ids >= 0) & (ids < len(index)))
        index[ids[slots]] = self.file.write(entries, slots, index[ids[slots], 0])
        return FileStore(index, self.file)


def store_in_file(state: ServerState, folder: str | Path, num_clients: int) -> ServerState:
    """Keeps what clients keep between rounds in a file, for populations of any size.

    Of a round, only the entries of the cohort are in memory: they are read before it and written
    after it, in `fl.train` while the rounds before and after are running. The results are the same
    bits as with a store in memory. A client that has not taken part takes no room in the file.

    Rounds and evaluations take the state as any other, but outside of `jit`; a state is worthless
    once a round has been played from it, as if it were donated. Checkpoints hold where the entries
    lie, and not these: the folder belongs to the run as its checkpoints do.

    Args:
      state: `algorithm.init(key, num_clients=1)`, of an algorithm whose clients keep something.
      folder: Where the files lie, made with the first of them. One for each run.
      num_clients: Size of the population.

    Returns:
      The state, with `FileStore`s as its stores.

    Raises:
      ValueError: `state` has no store, or one of more than one client; there are several
        processes.
      BlockingIOError: Another process writes there, when a round has been played.

    >>> import tempfile, jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> algorithm = fl.scaffold(model, optax.sgd(0.5))
    >>> state = algorithm.init(jnp.float32(0.0), num_clients=1)
    >>> state = store_in_file(state, tempfile.mkdtemp(), num_clients=1_000_000)
    >>> cohort = fl.Cohort(
    ...     client_ids=jnp.array([123_456, 7]),
    ...     num_examples=jnp.array([1, 1]),
    ...     offsets=jnp.array([0, 1]),
    ...     examples={"x": jnp.array([4.0, 8.0])},
    ...     num_clients=1_000_000,
    ... )
    >>> state, info = algorithm.round(jax.random.key(0), state, cohort)
    >>> state.store.read([7, 8]).tolist()
    [-8.0, 0.0]
    """
    _validate.instance("state", state, ServerState, "algorithm.init(key, num_clients=1)")
    num_clients = _validate.integer("num_clients", num_clients, minimum=1)
    kept = {name: getattr(state, name) for name in STORES if jax.tree.leaves(getattr(state, name))}
    sizes = {x.shape[:1] for x in jax.tree.leaves(kept)}
    if sizes != {(1,)}:
        of = f"a store of {max(sizes)[0]} clients" if sizes else "no store, as clients keep nothing"
        raise ValueError(
            f"state has {of}; pass algorithm.init(key, num_clients=1) of an algorithm whose clients"
            " keep something."
        )
    if jax.process_count() > 1:
        raise ValueError("stores in files are for one process; keep the store on the devices.")
    folder = Path(folder).absolute()
    index = np.stack([np.full(num_clients, _NOWHERE), np.zeros(num_clients, np.uint32)], 1)
    stores = {
        name: FileStore(index, EntryFile(folder / name, jax.tree.map(lambda x: x[0], store)))
        for name, store in kept.items()
    }
    return with_stores(state, stores)


def with_stores(state: ServerState, stores: Mapping[str, Any]) -> ServerState:
    """The state with other stores, by the names of its fields."""
    return dataclasses.replace(state, **stores)


def file_stores(state: ServerState) -> dict[str, FileStore]:
    """The stores of a state that lie in files, by the names of its fields."""
    stores = {name: getattr(state, name, None) for name in STORES}
    return {name: store for name, store in stores.items() if isinstance(store, FileStore)}


def with_entries(state: ServerState, cohort: Cohort) -> tuple[ServerState, Cohort]:
    """The same with the entries of the cohort's clients in place of stores in files."""
    stores = file_stores(state)
    if not stores:
        return state, cohort
    _refuse_traced(state, cohort.client_ids)
    check_population(stores, cohort.num_clients)
    near = {
        name: place(store.read(cohort.client_ids), state.round.sharding)
        for name, store in stores.items()
    }
    return with_stores(state, near), dataclasses.replace(cohort, has_entries=True)


def _refuse_traced(*values: PyTree) -> None:
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(values)):
        raise ValueError(
            "state.store lies in a file, which a compiled program cannot read; call the round or"
            " the evaluation outside of jit, scan and vmap, as fl.train does."
        )


def check_population(stores: dict[str, FileStore], num_clients: int) -> None:
    """Refuses stores of another population.

    Raises:
      ValueError: One of them is.
    """
    for name, store in stores.items():
        if len(store.index) != num_clients:
            raise ValueError(
                f"state.{name} is a file for {len(store.index)} clients, while the cohort was drawn"
                f" from a population of {num_clients}; give fl.store_in_file num_clients="
                f"{num_clients}, or draw from the population that the state belongs to."
            )


def place(entries: PyTree, sharding: Sharding) -> PyTree:
    """Entries of a cohort on the devices of a state: each has a copy, or its part if large."""
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        num_entries = len(jax.tree.leaves(entries)[0])
        sharding = sharding_of(entries, num_entries, "device", sharding.mesh, of_cohort=True)
    return jax.device_put(entries, sharding)


def around_files(
    round: Callable[..., tuple[ServerState, RoundInfo]],
) -> Callable[..., tuple[ServerState, RoundInfo]]:
    """The same round, which takes stores in files, too: it reads first, and writes last."""

    @functools.wraps(round)
    def play(key: jax.Array, state: ServerState, cohort: Cohort) -> tuple[ServerState, RoundInfo]:
        after, info = round(key, *with_entries(state, cohort))
        written = {
            name: store.written(cohort.client_ids, getattr(after, name))
            for name, store in file_stores(state).items()
        }
        return with_stores(after, written), info

    return play
