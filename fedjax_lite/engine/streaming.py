"""Clients whose examples stay on the host: each cohort's rows are copied when it takes part."""

import collections
import concurrent.futures
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Cohort
from fedjax_lite.data import checks
from fedjax_lite.data.population import StreamedPopulation
from fedjax_lite.xla.mesh import deal, from_parts, local_positions, put
from fedjax_lite.xla.rows import in_rows

T = TypeVar("T")


def copy_cohort(population: StreamedPopulation, client_ids: ArrayLike) -> Cohort:
    """Copies the rows of some clients to the devices.

    A pure function of the ids, for the host: not for use inside `jit`. Each device of the mesh
    is given its share of the clients, and their rows alone; of several processes, each reads
    the rows for its own devices. A round gives the same bits as with the cohort of these
    clients from `FederatedDataset.resident`.

    Args:
      population: The clients.
      client_ids: `[clients]`, at most `cohort_capacity` positions in the population; -1 marks
        an empty slot.

    Returns:
      A `Cohort` with `cohort_capacity` slots and `row_capacity` rows on each device, those in
      excess zero. If a device's clients have more, all are given twice as many, or four times,
      and so on, and a warning says so, once for each number: a round compiles anew for it.

    Raises:
      ValueError: `client_ids` is no list of positions, or too long, or a client has integers
        that JAX would cut off.
    """
    ids = np.asarray(client_ids)
    if ids.size > 0:
        checks.positions(ids, population.num_clients)
    if ids.size > population.cohort_capacity:
        raise ValueError(
            f"client_ids has {ids.size} clients, above cohort_capacity"
            f" {population.cohort_capacity}; pass fewer, or raise cohort_capacity."
        )
    # The last one stands for the slots that a device has fewer than others.
    clients = np.full(population.cohort_capacity + 1, -1, np.int32)
    clients[: ids.size] = ids
    sizes = _rows(population, clients[:-1])[1]
    device_slots = deal(sizes, 1 if population.mesh is None else population.mesh.devices.size)
    offsets, shares = np.zeros_like(clients), []
    for own in device_slots:
        # In the order of the file, and each client once, whatever the order of the slots.
        distinct, slot = np.unique(clients[own], return_inverse=True)
        starts, counts = _rows(population, distinct)
        ends = np.cumsum(counts)
        offsets[own] = (ends - counts)[slot]
        shares.append(np.stack([starts, counts, ends], axis=1))
    row_capacity = _enlarged(population.row_capacity, max(int(share[-1, 2]) for share in shares))
    local, mesh = [shares[i] for i in local_positions(population.mesh)], population.mesh
    device = jax.local_devices()[0] if mesh is None else mesh.local_devices[0]
    arrays: dict[str, Any] = {
        "client_ids": clients[:-1],
        "num_examples": sizes.astype(np.int32),
        "offsets": offsets[:-1],
        "device_slots": device_slots,
        "examples": _copy(population.examples, local, row_capacity, device),
    }
    return Cohort(
        **_put(arrays, population.mesh),
        num_clients=population.num_clients,
        most_examples=population.most_examples,
    )


def _rows(population: StreamedPopulation, clients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows of clients start, and how many there are; none of client -1."""
    starts, stops = population.offsets[clients], population.offsets[clients + 1]
    return starts, np.where(clients >= 0, stops - starts, 0)


def _copy(
    features: dict[str, np.ndarray],
    shares: list[np.ndarray],
    row_capacity: int,
    device: jax.Device,
) -> dict[str, Any]:
    """The rows of some devices, from where each client's start, their number and their end."""
    examples = {}
    for name, feature in features.items():
        # A new buffer for each cohort: a round may still be reading the last one's.
        buffer = np.zeros((len(shares), row_capacity, *feature.shape[1:]), feature.dtype)
        for part, share in zip(buffer, shares, strict=True):
            for start, count, end in share.tolist():
                part[end - count : end] = feature[start : start + count]
        rows = buffer.reshape(-1, *feature.shape[1:])
        examples[name] = checks.as_in_jax(name, rows)
    return in_rows(examples, device)


def _enlarged(row_capacity: int, num_rows: int) -> int:
    """Room for so many rows, by doubling what there is."""
    if num_rows <= row_capacity:
        return row_capacity
    doublings = (-(-num_rows // row_capacity) - 1).bit_length()
    enlarged = _validate.integer(
        "row_capacity", row_capacity << doublings, minimum=1, maximum=2**31 - 1
    )
    warnings.warn(
        f"a device has more rows of a cohort than its row_capacity {row_capacity}: it is"
        f" given {enlarged}, for which a round compiles anew; pass a larger row_capacity.",
        stacklevel=4,  # The caller of `cohort_of`.
    )
    return enlarged


def _put(arrays: dict[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """Arrays that all processes have, and `examples`, of which each has those of its devices."""
    if mesh is None:
        return jax.device_put(arrays)
    # Nothing that processes would have to wait for each other for: they make cohorts ahead.
    examples = jax.tree.map(lambda x: from_parts(x, mesh), arrays.pop("examples"))
    return {**put(arrays, NamedSharding(mesh, PartitionSpec())), "examples": examples}


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
