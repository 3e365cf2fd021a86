"""Samplers that let clients take turns."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.samplers._binomial import binomial, check_rate, draw, quantile
from fedjax_lite.samplers._select import (
    Choice,
    CohortSize,
    Sampler,
    build,
    check_capacity,
    check_clients,
    check_size,
    resolve_sizes,
)
from fedjax_lite.xla import random


def sequential(num_clients: int, cohort_size: int) -> Sampler:
    """One client after the other in the order of their ids, pass after pass.

    A pass takes `ceil(num_clients / cohort_size)` rounds, and its last cohort is what is left.

    Args:
      num_clients: Size of the population, below 2**31.
      cohort_size: Number of clients.

    Returns:
      A sampler. Nothing is random: probabilities are 1.

    Raises:
      ValueError: An argument is out of range.

    >>> import jax
    >>> sampler = sequential(5, 2)
    >>> [sampler.select(jax.random.key(0), r).client_ids.tolist() for r in range(4)]
    [[0, 1], [2, 3], [4, -1], [0, 1]]
    """
    num_clients = check_clients(num_clients)
    capacity = check_size(cohort_size, num_clients)

    def choose(key: jax.Array, round: jax.Array) -> Choice:
        _, positions, size = _in_passes(round, num_clients, capacity)
        return Choice(positions, 1.0, size)

    num_groups = -(-num_clients // capacity)
    return _in_turn(choose, num_clients, capacity, num_groups, min_separation=num_groups)


def round_robin(num_clients: int, cohort_size: int) -> Sampler:
    """Everyone once, in a random order, then everyone again in another one.

    A pass takes `ceil(num_clients / cohort_size)` rounds, and its last cohort is what is left.
    A client can be the last of one pass and the first of the next; with `minimise_reuse` it
    cannot.

    Args:
      num_clients: Size of the population, below 2**31; it costs neither time nor memory.
      cohort_size: Number of clients.

    Returns:
      A sampler. Probabilities are the size of the round's cohort over `num_clients`.

    Raises:
      ValueError: An argument is out of range.

    >>> import jax
    >>> sampler = round_robin(5, 2)
    >>> cohorts = [sampler.select(jax.random.key(0), r).client_ids.tolist() for r in range(3)]
    >>> sorted(sum(cohorts, []))
    [-1, 0, 1, 2, 3, 4]
    """
    num_clients = check_clients(num_clients)
    capacity = check_size(cohort_size, num_clients)

    def choose(key: jax.Array, round: jax.Array) -> Choice:
        number, positions, size = _in_passes(round, num_clients, capacity)
        client_ids = random.permuted(jax.random.fold_in(key, number), positions, num_clients)
        return Choice(client_ids, size / num_clients, size)

    num_groups = -(-num_clients // capacity)
    return _in_turn(choose, num_clients, capacity, num_groups, min_separation=1)


def minimise_reuse(num_clients: int, cohort_size: int) -> Sampler:
    """One random order for the whole run, walked round and round.

    No client is drawn again before all others have been: from one cohort of a client to its next
    it takes `num_clients // cohort_size` rounds or one more, and cohorts are always full.

    Args:
      num_clients: Size of the population, below 2**31; it costs neither time nor memory.
      cohort_size: Number of clients.

    Returns:
      A sampler. Probabilities are `cohort_size / num_clients`, over the random order.

    Raises:
      ValueError: An argument is out of range.

    >>> import jax
    >>> sampler = minimise_reuse(5, 2)
    >>> cohorts = [sampler.select(jax.random.key(0), r).client_ids.tolist() for r in range(5)]
    >>> walk = sum(cohorts, [])
    >>> sorted(walk[:5]), walk[:5] == walk[5:]
    ([0, 1, 2, 3, 4], True)
    """
    num_clients = check_clients(num_clients)
    capacity = check_size(cohort_size, num_clients)

    def choose(key: jax.Array, round: jax.Array) -> Choice:
        # round * capacity modulo num_clients: bit by bit, it stays below 2**32.
        start, round = jnp.uint32(0), round % num_clients
        for bit in f"{capacity:b}":
            start = start * 2 % num_clients
            if bit == "1":
                start = (start + round) % num_clients
        positions = (start + jnp.arange(capacity, dtype=jnp.uint32)) % num_clients
        client_ids = random.permuted(key, positions, num_clients)
        return Choice(client_ids, capacity / num_clients, jnp.int32(capacity))

    num_groups = num_clients // capacity
    return _in_turn(choose, num_clients, capacity, num_groups, min_separation=num_groups)


def cyclic(
    num_clients: int,
    num_groups: int,
    cohort_size: CohortSize | None = None,
    *,
    rate: float | None = None,
    capacity: int | None = None,
) -> Sampler:
    """Groups that take turns: round r samples from group `r % num_groups`.

    No client takes part twice within `num_groups` rounds, as mechanisms with a banded matrix
    require. The key of the run splits the population into groups at random, once; their sizes
    differ by one at most. Source: Choquette-Choo et al. (2023), "(Amplified) Banded Matrix
    Factorization", https://arxiv.org/abs/2306.08153.

    Args:
      num_clients: Size of the population, below 2**31; it costs neither time nor memory.
      num_groups: Number of groups.
      cohort_size: Number of clients, drawn uniformly without replacement from the group, or a
        function of the round.
      rate: In place of `cohort_size`: the probability of each client of the group, on a coin of
        its own.
      capacity: Number of slots, as for `uniform` or `poisson`.

    Returns:
      A sampler. Probabilities are those within the group whose turn it is.

    Raises:
      ValueError: An argument is out of range, not exactly one of `cohort_size` and `rate` is
        given, or `capacity` is missing beside a function.

    >>> import jax
    >>> sampler = cyclic(6, 3, 2)
    >>> cohorts = [sampler.select(jax.random.key(0), r).client_ids.tolist() for r in range(4)]
    >>> sorted(sum(cohorts[:3], [])), sorted(cohorts[0]) == sorted(cohorts[3])
    ([0, 1, 2, 3, 4, 5], True)
    """
    num_clients = check_clients(num_clients)
    num_groups = _validate.integer("num_groups", num_groups, minimum=1, maximum=num_clients)
    if (cohort_size is None) == (rate is None):
        raise ValueError(
            f"cohort_size is {cohort_size} and rate is {rate}; pass one of them, cohort_size for"
            " cohorts of fixed size and rate for Poisson sampling."
        )
    # The first groups have one client more, unless the groups divide the population.
    smaller, larger = num_clients // num_groups, -(-num_clients // num_groups)
    if cohort_size is not None:
        size_of, capacity = resolve_sizes(cohort_size, capacity, smaller)
        largest_rate = None if callable(cohort_size) else cohort_size / smaller
    else:
        largest_rate = check_rate(rate)
        sizes = [binomial(n, largest_rate) for n in (smaller, larger)]
        capacity = check_capacity(quantile(sizes[1]) if capacity is None else capacity, larger)

    def choose(key: jax.Array, round: jax.Array) -> Choice:
        key_groups, key_rounds = jax.random.split(key)
        key_size, key_members = jax.random.split(jax.random.fold_in(key_rounds, round))
        group = round % num_groups
        group_size = larger if smaller == larger else (num_clients - 1 - group) // num_groups + 1
        if cohort_size is None:
            small, large = (draw(key_size, size) for size in sizes)
            size = jnp.where(group_size == larger, large, small)
        else:
            size = size_of(round)
        members = random.permuted(key_members, jnp.arange(capacity), group_size)
        positions = group + num_groups * members.astype(jnp.uint32)
        client_ids = random.permuted(key_groups, positions, num_clients)
        return Choice(client_ids, size / group_size if rate is None else rate, size)

    scheme = "without_replacement" if rate is None else "poisson"
    return build(
        choose,
        num_clients,
        capacity,
        scheme=scheme,
        rate=largest_rate,
        num_groups=num_groups,
        min_separation=num_groups,
    )


def everyone(num_clients: int) -> Sampler:
    """All clients in every round, as across silos.

    Args:
      num_clients: Size of the population.

    Returns:
      A sampler with as many slots as clients. Probabilities are 1.

    Raises:
      ValueError: `num_clients` is out of range.

    >>> import jax
    >>> everyone(3).select(jax.random.key(0), 7).client_ids.tolist()
    [0, 1, 2]
    """
    return sequential(num_clients, num_clients)


def _in_turn(
    choose: Callable[[jax.Array, jax.Array], Choice],
    num_clients: int,
    capacity: int,
    num_groups: int,
    min_separation: int,
) -> Sampler:
    """A sampler whose clients take part whenever it is their turn."""
    return build(
        choose,
        num_clients,
        capacity,
        scheme="in_turn",
        rate=1.0,
        num_groups=num_groups,
        min_separation=min_separation,
    )


def _in_passes(
    round: jax.Array, num_clients: int, cohort_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pass that a round belongs to, its positions in the order, and how many are left."""
    number, step = jnp.divmod(round, -(-num_clients // cohort_size))
    first = step * cohort_size
    positions = first + jnp.arange(cohort_size, dtype=jnp.uint32)
    return number, positions, jnp.minimum(num_clients - first, cohort_size).astype(jnp.int32)
