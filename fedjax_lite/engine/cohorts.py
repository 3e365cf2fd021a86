"""Who takes part in a round."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Cohort
from fedjax_lite.data import checks
from fedjax_lite.data.population import GeneratedPopulation, Population, StreamedPopulation
from fedjax_lite.engine import streaming
from fedjax_lite.samplers._select import random_clients
from fedjax_lite.xla import random


def cohort(
    key: jax.Array,
    population: Population,
    cohort_size: ArrayLike,
    *,
    capacity: int | None = None,
) -> Cohort:
    """Draws a cohort uniformly without replacement.

    A pure function, fit for use inside `jit`, `scan` and `vmap`.

    Args:
      key: Typed key; another one for each round.
      population: A `ResidentPopulation` or a `GeneratedPopulation`.
      cohort_size: Number of clients. May be traced, so that it varies without
        recompilation; it is then clipped to `[0, capacity]`.
      capacity: Number of slots, an upper bound of `cohort_size`. `cohort_size` itself
        if left out.

    Returns:
      A `Cohort` with `capacity` slots, the first `cohort_size` of them filled.

    Raises:
      TypeError: `population` is neither kind of population.
      ValueError: `cohort_size` or `capacity` lies outside `[1, num_clients]`, or
        `cohort_size` is traced and `capacity` is missing.

    >>> import jax, fedjax_lite as fl
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [1.0, 2.0]}, "b": {"x": [3.0]}})
    >>> drawn = cohort(jax.random.key(0), dataset.resident(), 2)
    >>> sorted(drawn.num_examples.tolist())
    [1, 2]
    """
    _check_kind(population)
    _validate.key("key", key)
    num_clients = population.num_clients
    if not isinstance(cohort_size, jax.core.Tracer):
        cohort_size = _validate.integer("cohort_size", cohort_size, minimum=1, maximum=num_clients)
        capacity = cohort_size if capacity is None else capacity
    elif capacity is None:
        raise ValueError(
            "capacity is None while cohort_size is traced; pass capacity=, the largest cohort"
            " size that can occur."
        )
    capacity = _validate.integer("capacity", capacity, minimum=1, maximum=num_clients)
    if not isinstance(cohort_size, jax.core.Tracer) and cohort_size > capacity:
        raise ValueError(
            f"cohort_size is {cohort_size}, above capacity {capacity}; raise capacity, the"
            " largest cohort size that can occur."
        )

    if isinstance(cohort_size, jax.core.Tracer) and not (
        cohort_size.shape == () and jnp.issubdtype(cohort_size.dtype, jnp.integer)
    ):
        raise ValueError(
            f"cohort_size is traced with shape {cohort_size.shape} and dtype"
            f" {cohort_size.dtype}; pass an integer scalar."
        )
    return _with_examples(population, _draw, key, cohort_size, capacity=capacity)


def cohort_of(
    population: Population | StreamedPopulation,
    client_ids: ArrayLike,
    *,
    key: jax.Array | None = None,
    max_steps: ArrayLike | None = None,
    staleness: ArrayLike | None = None,
) -> Cohort:
    """The cohort of given clients.

    A pure function, fit for use inside `jit`, `scan` and `vmap` unless the population is streamed.
    A client that is named twice takes part twice, with the same keys, and sends the same update
    twice.

    Args:
      population: A `ResidentPopulation` or a `GeneratedPopulation`; or a `StreamedPopulation`,
        whose `cohort(client_ids)` it returns.
      client_ids: `[capacity]`, integers: positions in the population, -1 for empty slots, such
        as a sampler selects. Those of a JAX array are not checked, since that would wait for the
        device: a negative one is an empty slot, one beyond the population a client without
        examples.
      key: Typed key, another one for each round, from which generated clients draw their
        numbers of examples. Others need none.
      max_steps: `[capacity]`, integers: the most local steps that each takes, such as before it is
        timed out; not bounded by default.
      staleness: `[capacity]`, integers: how many rounds old the params are that each starts from,
        for an algorithm with `max_staleness`; all start from the newest by default.

    Returns:
      A `Cohort` with these clients, in this order.

    Raises:
      TypeError: `population` is no population.
      ValueError: `client_ids` is no array `[capacity]` of integers, or has an id outside the
        population; `key` is missing for a `GeneratedPopulation`.

    >>> import fedjax_lite as fl
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [1.0, 2.0]}, "b": {"x": [3.0]}})
    >>> cohort_of(dataset.resident(), [1, -1, 0]).num_examples.tolist()
    [1, 0, 2]
    """
    cohort = _cohort_of(population, client_ids, key)
    given = {"max_steps": max_steps, "staleness": staleness}
    of_clients: dict[str, Any] = {
        name: _of_clients(name, values, np.shape(client_ids), cohort.capacity)
        for name, values in given.items()
        if values is not None
    }
    return dataclasses.replace(cohort, **of_clients)


def _of_clients(name: str, values: ArrayLike, shape: tuple[int, ...], capacity: int) -> jax.Array:
    """A whole number for each slot, 0 for those that were not asked for."""
    if not isinstance(values, jax.Array):
        values = np.asarray(values)
    if values.shape != shape or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"{name} has shape {values.shape} and dtype {values.dtype} beside client_ids of shape"
            f" {shape}; pass a whole number for each of them."
        )
    return jnp.pad(jnp.asarray(values, jnp.int32), (0, capacity - shape[0]))


def _cohort_of(
    population: Population | StreamedPopulation, client_ids: ArrayLike, key: jax.Array | None
) -> Cohort:
    if isinstance(population, StreamedPopulation):
        return streaming.copy_cohort(population, client_ids)
    _check_kind(population)
    if not isinstance(client_ids, jax.Array):
        client_ids = np.asarray(client_ids)
    checks.positions(client_ids, population.num_clients)
    if isinstance(population, GeneratedPopulation) and key is None:
        raise ValueError(
            "key is None beside a GeneratedPopulation, whose clients draw their numbers of examples"
            " in each round; pass key=, a typed key of the round."
        )
    if key is not None:
        _validate.key("key", key)
    return _with_examples(population, _collect, client_ids, key)


def _check_kind(population: Population) -> None:
    if not isinstance(population, Population):
        raise TypeError(
            f"population is a {type(population).__name__}; pass a GeneratedPopulation, or"
            " dataset.resident() for a FederatedDataset. Of a StreamedPopulation, choose the"
            " clients: fl.cohort_of(population, client_ids)."
        )


def on_every_device(cohort: Cohort) -> Cohort:
    """The same cohort where each device may read all rows, to which JAX copies them."""
    if cohort.device_slots is None:
        return cohort
    num_devices = cohort.device_slots.shape[0]
    num_rows = next(iter(cohort.examples.values())).shape[0]
    first = jnp.arange(num_devices, dtype=jnp.int32)[:, None] * (num_rows // num_devices)
    firsts = jnp.zeros_like(cohort.offsets).at[cohort.device_slots].set(first, mode="drop")
    return dataclasses.replace(cohort, offsets=cohort.offsets + firsts, device_slots=None)


def _with_examples(
    population: Population, build: Callable[..., Cohort], *args: Any, **options: Any
) -> Cohort:
    """`build(population, ...)` of a population whose examples stay out of what is jitted.

    It would return a copy of them.
    """
    if isinstance(population, GeneratedPopulation):
        return build(population, *args, **options)
    built = build(dataclasses.replace(population, examples={}), *args, **options)
    return dataclasses.replace(built, examples=population.examples)


@functools.partial(jax.jit, static_argnames="capacity")
def _draw(
    population: Population, key: jax.Array, cohort_size: jax.Array, *, capacity: int
) -> Cohort:
    client_ids = random_clients(key, population.num_clients, capacity)
    client_ids = jnp.where(jnp.arange(capacity) < cohort_size, client_ids, -1)
    return _collect(population, client_ids, key)


@jax.jit
def _collect(population: Population, client_ids: jax.Array, key: jax.Array | None) -> Cohort:
    """The cohort of these clients: the one place where the kinds of population differ."""
    client_ids = client_ids.astype(jnp.int32)
    known = (client_ids >= 0) & (client_ids < population.num_clients)
    own = jnp.where(known, client_ids, 0)  # In other places, an arbitrary client.
    if isinstance(population, GeneratedPopulation):
        assert key is not None  # Of resident clients, `cohort_of` needs none.
        keys = random.fold_in_pair(key, 0, own)
        num_examples = jax.vmap(population.num_examples)(keys, own).astype(jnp.int32)
        if population.most_examples is not None:
            num_examples = jnp.minimum(num_examples, population.most_examples)
        offsets, sample = jnp.zeros_like(num_examples), population.sample
    else:
        offsets, sample = population.offsets[own], None
        num_examples = population.offsets[own + 1] - offsets
    return Cohort(
        client_ids=client_ids,
        num_examples=jnp.where(known, num_examples, 0),
        offsets=offsets,
        examples={},
        num_clients=population.num_clients,
        most_examples=population.most_examples,
        sample=sample,
    )
