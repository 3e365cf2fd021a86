"""Samplers to which all clients are alike."""

import jax
import jax.numpy as jnp

from fedjax_lite.samplers._binomial import binomial, check_rate, draw, quantile
from fedjax_lite.samplers._select import (
    MAX_CLIENTS,
    Choice,
    CohortSize,
    Sampler,
    build,
    check_capacity,
    check_clients,
    random_clients,
    resolve_sizes,
)


def uniform(
    num_clients: int,
    cohort_size: CohortSize,
    *,
    replace: bool = False,
    capacity: int | None = None,
) -> Sampler:
    """All clients alike, a given number of them.

    Without replacement, round r has the clients of `fl.cohort(jax.random.fold_in(key, r), ...)`.

    Args:
      num_clients: Size of the population, below 2**31; it costs neither time nor memory.
      cohort_size: Number of clients, or a function of the round; what that returns is clipped
        to `[0, num_clients]` (with replacement, at 0 alone).
      replace: Whether a client can be drawn more than once in a round.
      capacity: Number of slots, the largest cohort size that can occur. `cohort_size` itself if
        left out.

    Returns:
      A sampler. Probabilities are `cohort_size / num_clients`.

    Raises:
      ValueError: An argument is out of range, or `capacity` is missing beside a function.

    >>> import jax, jax.numpy as jnp
    >>> sampler = uniform(10**9, lambda round: jnp.where(round < 100, 2, 4), capacity=4)
    >>> ids = sampler.select(jax.random.key(0), 99).client_ids
    >>> (ids >= 0).tolist()
    [True, True, False, False]
    """
    num_clients = check_clients(num_clients)
    maximum = MAX_CLIENTS if replace else num_clients
    size_of, capacity = resolve_sizes(cohort_size, capacity, maximum)

    def choose(key: jax.Array, round: jax.Array) -> Choice:
        key, size = jax.random.fold_in(key, round), size_of(round)
        if replace:
            client_ids = jax.random.randint(key, (capacity,), 0, num_clients, jnp.int32)
        else:
            client_ids = random_clients(key, num_clients, capacity)
        return Choice(client_ids, size / num_clients, size)

    scheme = "with_replacement" if replace else "without_replacement"
    rate = None if callable(cohort_size) else cohort_size / num_clients
    return build(choose, num_clients, capacity, scheme=scheme, rate=rate)


def poisson(num_clients: int, rate: float, *, capacity: int | None = None) -> Sampler:
    """Each client on a coin of its own, so that the cohort size is binomial.

    The size is drawn first, then so many clients uniformly: the same distribution, at a cost
    that does not depend on the size of the population. Probabilities of sizes are rounded to
    multiples of 2**-32.

    Args:
      num_clients: Size of the population, below 2**31.
      rate: Probability that a client takes part in a round, above 0, at most 1.
      capacity: Number of slots. By default so many that a round exceeds them with a probability
        of at most 1e-9. If one does, those that stay are a uniform choice.

    Returns:
      A sampler. Probabilities are `rate`.

    Raises:
      ValueError: An argument is out of range.

    >>> import jax
    >>> sampler = poisson(1000, 0.01)
    >>> sampler.capacity
    34
    >>> int((sampler.select(jax.random.key(0), 0).client_ids >= 0).sum()) < 34
    True
    """
    num_clients = check_clients(num_clients)
    rate = check_rate(rate)
    sizes = binomial(num_clients, rate)
    capacity = check_capacity(quantile(sizes) if capacity is None else capacity, num_clients)

    def choose(key: jax.Array, round: jax.Array) -> Choice:
        key_size, key_clients = jax.random.split(jax.random.fold_in(key, round))
        client_ids = random_clients(key_clients, num_clients, capacity)
        return Choice(client_ids, rate, draw(key_size, sizes))

    return build(choose, num_clients, capacity, scheme="poisson", rate=rate)
