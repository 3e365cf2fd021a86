"""Clients whose examples stay on disk: each cohort's rows are copied when it takes part."""

import collections
import concurrent.futures
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.cohort import Cohort
from fedjax_lite.data import checks
from fedjax_lite.mesh import replicate

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StreamedPopulation:
    """Clients whose examples stay on the host; see `FederatedDataset.streamed`.

    Attributes:
      examples: Features `[rows, ...]` by name, NumPy arrays, client after client.
      offsets: `[num_clients + 1]`, int64; client i owns rows
        `offsets[i]:offsets[i + 1]`.
      cohort_capacity: Slots of a cohort.
      row_capacity: Rows that a cohort holds, unused ones included.
      mesh: Where cohorts are put; all devices if `None`.
    """

    examples: dict[str, np.ndarray]
    offsets: np.ndarray
    cohort_capacity: int
    row_capacity: int
    mesh: Mesh | None = None

    @property
    def num_clients(self) -> int:
        return len(self.offsets) - 1

    def cohort(self, client_ids: ArrayLike) -> Cohort:
        """Copies the rows of some clients to the device.

        A pure function of the ids, for the host: not for use inside `jit`. A round gives the same
        bits as with the cohort of these clients from `FederatedDataset.resident`.

        Args:
          client_ids: `[clients]`, at most `cohort_capacity` positions in the population; -1 marks
            an empty slot.

        Returns:
          A `Cohort` with `cohort_capacity` slots and `row_capacity` rows, those in excess zero.
          If its clients have more, it is given twice as many, or four times, and so on, and a
          warning says so, once for each number: a round compiles anew for it.

        Raises:
          ValueError: `client_ids` is no list of positions, or too long, or a client has integers
            that JAX would cut off.
        """
        ids = np.asarray(client_ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(
                f"client_ids has shape {ids.shape} and dtype {ids.dtype}; pass a list of positions"
                " of clients in the population."
            )
        if ids.size > self.cohort_capacity:
            raise ValueError(
                f"client_ids has {ids.size} clients, above cohort_capacity {self.cohort_capacity};"
                " pass fewer, or raise cohort_capacity."
            )
        if ids.size and (ids.min() < -1 or ids.max() >= self.num_clients):
            raise ValueError(
                f"client_ids holds positions from {ids.min()} to {ids.max()} in a population of"
                f" {self.num_clients} clients; keep them within [-1, {self.num_clients})."
            )
        slots = np.full(self.cohort_capacity, -1, np.int32)
        slots[: ids.size] = ids
        # In the order of the file, and each client once, whatever the order of the slots.
        clients, client_of_slot = np.unique(slots, return_inverse=True)
        starts, stops = self.offsets[clients], self.offsets[clients + 1]
        sizes = np.where(clients >= 0, stops - starts, 0)
        ends = np.cumsum(sizes)
        row_capacity = self._row_capacity(int(ends[-1]))
        places = list(zip(starts.tolist(), sizes.tolist(), ends.tolist(), strict=True))
        examples = {}
        for name, feature in self.examples.items():
            # A new buffer for each cohort: a round may still be reading the last one's.
            buffer = np.zeros((row_capacity, *feature.shape[1:]), feature.dtype)
            for start, size, end in places:
                buffer[end - size : end] = feature[start : start + size]
            examples[name] = checks.as_in_jax(name, buffer)
        arrays = {
            "client_ids": slots,
            "num_examples": sizes[client_of_slot].astype(np.int32),
            "offsets": (ends - sizes)[client_of_slot].astype(np.int32),
            "examples": examples,
        }
        on_device: dict[str, Any] = jax.device_put(replicate(arrays, self.mesh))
        return Cohort(**on_device, num_clients=self.num_clients)

    def _row_capacity(self, num_rows: int) -> int:
        if num_rows <= self.row_capacity:
            return self.row_capacity
        doublings = (-(-num_rows // self.row_capacity) - 1).bit_length()
        enlarged = _validate.integer(
            "row_capacity", self.row_capacity << doublings, minimum=1, maximum=2**31 - 1
        )
        warnings.warn(
            f"a cohort has more rows than row_capacity {self.row_capacity}: it is given {enlarged},"
            " for which a round compiles anew; pass a larger row_capacity.",
            stacklevel=3,
        )
        return enlarged


def typical_rows(sizes: np.ndarray, cohort_capacity: int) -> int:
    """Rows enough for nearly all cohorts drawn uniformly, and for all if that costs no more.

    The mean plus six standard deviations, or the sum of the largest clients if that is less.

    Args:
      sizes: `[clients]`, numbers of examples.
      cohort_capacity: Clients in a cohort.
    """
    largest = np.partition(sizes, sizes.size - cohort_capacity)[-cohort_capacity:]
    typical = cohort_capacity * sizes.mean() + 6 * math.sqrt(cohort_capacity) * sizes.std()
    return min(int(largest.sum()), math.ceil(typical))


def prefetch(make: Callable[[int], T], rounds: Iterable[int], *, depth: int = 2) -> Iterator[T]:
    """Makes what rounds need ahead of them, one after the other, in a background thread.

    Yields `make(r)` for each round, in order. What `make` raises is raised in its turn. The
    thread ends with the iterator: when it is exhausted, closed or dropped, after the call of
    `make` in progress.

    Args:
      make: Called in the thread, where settings made by a `with` block of JAX do not hold.
      rounds: The rounds, possibly without end.
      depth: How many rounds to be ahead, at least 1; so many results are held in memory besides
        the one in use.

    Raises:
      ValueError: `depth` is below 1.

    >>> list(prefetch(lambda r: r**2, range(4)))
    [0, 1, 4, 9]
    """
    return _prefetch(make, rounds, _validate.integer("depth", depth, minimum=1))


def _prefetch(make: Callable[[int], T], rounds: Iterable[int], depth: int) -> Iterator[T]:
    pending: collections.deque[concurrent.futures.Future[T]] = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(1, "prefetch")
    try:
        for r in rounds:
            pending.append(pool.submit(make, r))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
