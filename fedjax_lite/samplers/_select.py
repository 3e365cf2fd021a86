"""What all samplers share: selections, cohort sizes, and the checks of arguments."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite._repr import record
from fedjax_lite.xla import random

MAX_CLIENTS = 2**31 - 1

CohortSize = int | Callable[[jax.Array], ArrayLike]
"""A number of clients, or a function of the round (a traced uint32 scalar) that returns it."""


class Selection(NamedTuple):
    """The clients of one round.

    Attributes:
      client_ids: `[capacity]`, int32; -1 marks the empty slots, which come last.
      probabilities: `[capacity]`, float32, for each client chosen the probability that it is
        chosen in this round (with replacement, the expected number of times), 1 in empty slots.
        The sum of values over the slots, each divided by its probability, is an unbiased
        estimate of the sum over the population (Horvitz and Thompson, 1952), as long as
        `num_dropped` is zero.
      num_dropped: How many more clients were chosen than there are slots, int32 scalar.
      max_steps: `[capacity]`, int32, the most local steps that each takes; `None` if nothing bounds
        them.
      staleness: `[capacity]`, int32, how many rounds old the params are that each starts from;
        `None` if all start from the newest.
      metrics: Scalars by name that records have beside those of the round, such as
        `round_seconds`, which add up to the simulated clock `wall_clock`.
    """

    client_ids: jax.Array
    probabilities: jax.Array
    num_dropped: jax.Array
    max_steps: jax.Array | None = None
    staleness: jax.Array | None = None
    metrics: dict[str, jax.Array] = {}  # noqa: RUF012, which no one changes

    def __repr__(self) -> str:
        return record(self, {**self._asdict(), "metrics": self.metrics or None})


class Sampler(NamedTuple):
    """A way to choose clients, and what is to be known of it to account for privacy.

    Attributes:
      select: `select(key, round) -> Selection`, jitted. The typed key is that of the whole run;
        `round` is an integer scalar from 0, and may be traced.
      num_clients: Size of the population.
      capacity: Number of slots of a selection.
      scheme: The law of the draws: `"poisson"` (each client on a coin of its own, all coins
        alike; of more than there are slots, a uniform choice), `"without_replacement"` (a subset
        of fixed size, all equally likely), `"with_replacement"` (independent uniform draws),
        `"in_turn"` (whoever else there is, and whatever they have), `"importance"` or `"weighted"`
        (by what clients have); `None` if it is not known.
      rate: The largest probability with which a client takes part in a round that it may take
        part in (with replacement, the expected number of times); `None` where it is not known, is
        traced, or varies from round to round.
      num_groups: Of so many rounds, counted from the first one, a client takes part in at most
        one; 1 if it may take part in all.
      min_separation: A client's rounds lie so many apart at least.
      max_staleness: The largest staleness that can occur, for which an algorithm is built with
        `max_staleness`.
      num_rounds: How many rounds there are; of later ones, all slots are empty. `None` if there is
        no end.
      schedule: Who trains when, if that is computed before.
    """

    select: Callable[[jax.Array, ArrayLike], Selection]
    num_clients: int
    capacity: int
    scheme: str | None = None
    rate: float | None = None
    num_groups: int = 1
    min_separation: int = 1
    max_staleness: int = 0
    num_rounds: int | None = None
    schedule: Any = None


class Choice(NamedTuple):
    """Clients in the order in which they fill slots, and how many of them are chosen."""

    client_ids: jax.Array
    probabilities: ArrayLike
    num_chosen: jax.Array


def build(
    choose: Callable[[jax.Array, jax.Array], Choice],
    num_clients: int,
    capacity: int,
    **properties: Any,
) -> Sampler:
    @jax.jit
    def select(key: jax.Array, round: ArrayLike) -> Selection:
        _validate.key("key", key)
        choice = choose(random.fast(key), check_integer("round", round).astype(jnp.uint32))
        filled = jnp.arange(capacity) < choice.num_chosen
        return Selection(
            client_ids=jnp.where(filled, choice.client_ids, -1).astype(jnp.int32),
            probabilities=jnp.where(filled, choice.probabilities, 1).astype(jnp.float32),
            num_dropped=jnp.maximum(choice.num_chosen - capacity, 0).astype(jnp.int32),
        )

    return Sampler(select, num_clients, capacity, **properties)


def random_clients(key: jax.Array, num_clients: int, capacity: int) -> jax.Array:
    """`[capacity]`, distinct clients in a random order, the same whatever the capacity."""
    return random.permuted(key, jnp.arange(capacity), num_clients)


def check_clients(num_clients: Any) -> int:
    return _validate.integer("num_clients", num_clients, minimum=1, maximum=MAX_CLIENTS)


def check_size(cohort_size: Any, maximum: int) -> int:
    return _validate.integer("cohort_size", cohort_size, minimum=1, maximum=maximum)


def check_capacity(capacity: Any, maximum: int) -> int:
    if capacity is None:
        raise ValueError(
            "capacity is None while the cohort size is known only when rounds run; pass"
            " capacity=, the largest cohort size that can occur."
        )
    return _validate.integer("capacity", capacity, minimum=1, maximum=maximum)


def resolve_sizes(
    cohort_size: Any, capacity: int | None, maximum: int
) -> tuple[Callable[[jax.Array], jax.Array], int]:
    """The cohort size as a function of the round, and the number of slots."""
    if callable(cohort_size):

        def size_of(round: jax.Array) -> jax.Array:
            size = check_integer("cohort_size(round)", cohort_size(round))
            return jnp.clip(size, 0, maximum).astype(jnp.int32)

        return size_of, check_capacity(capacity, maximum)
    fixed = check_size(cohort_size, maximum)
    capacity = check_capacity(fixed if capacity is None else capacity, maximum)
    if fixed > capacity:
        raise ValueError(
            f"cohort_size is {fixed}, above capacity {capacity}; raise capacity, the largest"
            " cohort size that can occur."
        )
    return (lambda round: jnp.int32(fixed)), capacity


def check_integer(name: str, value: ArrayLike) -> jax.Array:
    value = jnp.asarray(value)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(
            f"{name} has shape {value.shape} and dtype {value.dtype}; pass an integer scalar."
        )
    return value
