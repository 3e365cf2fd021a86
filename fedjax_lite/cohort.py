"""Who takes part in a round, and how a client's batches are read."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedjax_lite import _validate, random
from fedjax_lite.base import Batch
from fedjax_lite.data.population import GeneratedPopulation, Population, ResidentPopulation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cohort:
    """The clients of one round: a list of slots, of which the last may be empty.

    A cohort says who takes part and where their rows are. It says nothing of lanes or
    devices: the runner deals the clients out inside the compiled round.

    Attributes:
      client_ids: `[clients]`, int32; -1 marks an empty slot.
      num_examples: `[clients]`, int32; 0 in empty slots.
      offsets: `[clients]`, int32, the first row of each client in `examples`.
      examples: Features `[rows, ...]` by name; empty for generated clients.
      sample: For generated clients, the function that draws a batch (static).
    """

    client_ids: jax.Array
    num_examples: jax.Array
    offsets: jax.Array
    examples: dict[str, jax.Array]
    sample: Callable[[jax.Array, jax.Array], dict[str, jax.Array]] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    @property
    def capacity(self) -> int:
        """Number of slots, empty ones included."""
        return self.client_ids.shape[0]


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
    if not isinstance(population, (ResidentPopulation, GeneratedPopulation)):
        raise TypeError(
            f"population is a {type(population).__name__}; pass a GeneratedPopulation, or"
            " dataset.resident() for a FederatedDataset."
        )
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

    return _draw(key, population, jnp.asarray(cohort_size), capacity=capacity)


@functools.partial(jax.jit, static_argnames="capacity")
def _draw(
    key: jax.Array, population: Population, cohort_size: jax.Array, *, capacity: int
) -> Cohort:
    key_clients, key_sizes = jax.random.split(key)
    slots = jnp.arange(capacity)
    client_ids = random.permuted(key_clients, slots, population.num_clients)
    filled = slots < cohort_size
    if isinstance(population, ResidentPopulation):
        offsets = population.offsets[client_ids]
        num_examples = population.offsets[client_ids + 1] - offsets
        examples, sample = population.examples, None
    else:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key_sizes, client_ids)
        num_examples = jax.vmap(population.num_examples)(keys, client_ids).astype(jnp.int32)
        offsets = jnp.zeros_like(num_examples)
        examples, sample = {}, population.sample
    return Cohort(
        client_ids=jnp.where(filled, client_ids, -1),
        num_examples=jnp.where(filled, num_examples, 0),
        offsets=offsets,
        examples=examples,
        sample=sample,
    )


def client_key(key: jax.Array, client_id: ArrayLike, purpose: int) -> jax.Array:
    """The key of one client in one round, for one of the purposes below."""
    return jax.random.fold_in(jax.random.fold_in(key, purpose), client_id)


KEY_INIT, KEY_DATA, KEY_STEP = range(3)


def resolve_batch_size(cohort: Cohort, batch_size: int | None, default: int) -> int:
    """The size of a local batch: as asked for, or as the generator of the cohort draws it."""
    if cohort.sample is None:
        return default if batch_size is None else batch_size
    batch = jax.eval_shape(cohort.sample, jax.random.key(0), jnp.int32(0))
    _validate.features("the sample function of the population", batch)
    (drawn,) = {feature.shape[0] for feature in batch.values()}
    if batch_size not in (None, drawn):
        raise ValueError(
            f"batch_size is {batch_size}, but the population draws batches of {drawn}; leave"
            " batch_size out, or change the population's sample function."
        )
    return drawn


def read_batch(
    cohort: Cohort, key: jax.Array, slot: jax.Array, step: jax.Array, batch_size: int
) -> Batch:
    """Batch number `step` of the client in `slot`: its rows in their order.

    Args:
      cohort: The cohort.
      key: The client's key for data (used by generated clients alone).
      slot: Which client, int32 scalar.
      step: Which batch, int32 scalar.
      batch_size: Number of examples in the batch.

    Returns:
      Features `[batch, ...]` and `"mask"`. Rows beyond the client's last are filled
      with one of its own (so that a stranger's NaN never enters) and masked.
    """
    first = step * batch_size
    if cohort.sample is not None:
        batch = cohort.sample(jax.random.fold_in(key, step), cohort.client_ids[slot])
        return {**batch, "mask": first + jnp.arange(batch_size) < cohort.num_examples[slot]}

    begin = cohort.offsets[slot] + first
    end = cohort.offsets[slot] + cohort.num_examples[slot]
    num_rows = next(iter(cohort.examples.values())).shape[0]
    length = min(batch_size, num_rows)
    # Near the end of the table the slice starts early: the mask is in terms of rows.
    start = jnp.clip(begin, 0, num_rows - length)
    rows = start + jnp.arange(length)
    mask = (rows >= begin) & (rows < end)

    def read_full() -> dict[str, jax.Array]:
        return {
            name: jax.lax.dynamic_slice_in_dim(feature, start, length)
            for name, feature in cohort.examples.items()
        }

    def read_partial() -> dict[str, jax.Array]:
        own = jnp.minimum(begin, end - 1)
        return {
            name: jnp.where(
                mask.reshape((-1,) + (1,) * (values.ndim - 1)),
                values,
                jax.lax.dynamic_index_in_dim(cohort.examples[name], own),
            )
            for name, values in read_full().items()
        }

    def read_cpu() -> dict[str, jax.Array]:
        # Most batches are full, and XLA:CPU would repeat the masking in each consumer.
        is_full = (begin == start) & (begin + length <= end)
        return jax.lax.cond(is_full, read_full, read_partial)

    return {**jax.lax.platform_dependent(cpu=read_cpu, default=read_partial), "mask": mask}
