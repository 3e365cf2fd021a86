"""Who takes part in a round."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedjax_lite import _validate, random
from fedjax_lite.data.population import GeneratedPopulation, Population, ResidentPopulation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cohort:
    """The clients of one round: a list of slots, of which the last may be empty.

    A cohort says who takes part and where their rows are. It says nothing of lanes or
    devices: the runner deals the clients out inside the compiled round.

    Attributes:
      client_ids: `[clients]`, int32, positions in the population (and in the `client_ids` of
        the dataset that it came from); -1 marks an empty slot.
      num_examples: `[clients]`, int32; 0 in empty slots.
      offsets: `[clients]`, int32, the first row of each client in `examples`.
      examples: Features `[rows, ...]` by name; empty for generated clients.
      num_clients: Size of the population (static).
      sample: For generated clients, the function that draws a batch (static).
    """

    client_ids: jax.Array
    num_examples: jax.Array
    offsets: jax.Array
    examples: dict[str, jax.Array]
    num_clients: int = dataclasses.field(metadata={"static": True})
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

    size = jnp.asarray(cohort_size)
    if size.shape != () or not jnp.issubdtype(size.dtype, jnp.integer):
        raise ValueError(
            f"cohort_size is traced with shape {size.shape} and dtype {size.dtype}; pass an"
            " integer scalar."
        )
    if isinstance(population, GeneratedPopulation):
        return _draw(random.fast(key), population, size, capacity=capacity)
    # The examples stay out of the jitted function, which would return a copy of them.
    without_examples = dataclasses.replace(population, examples={})
    drawn = _draw(random.fast(key), without_examples, size, capacity=capacity)
    return dataclasses.replace(drawn, examples=population.examples)


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
        sample = None
    else:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key_sizes, client_ids)
        num_examples = jax.vmap(population.num_examples)(keys, client_ids).astype(jnp.int32)
        offsets = jnp.zeros_like(num_examples)
        sample = population.sample
    return Cohort(
        client_ids=jnp.where(filled, client_ids, -1),
        num_examples=jnp.where(filled, num_examples, 0),
        offsets=offsets,
        examples={},
        num_clients=population.num_clients,
        sample=sample,
    )
