"""Samplers that favour some clients."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedjax_lite.samplers._binomial import binomial, quantile
from fedjax_lite.samplers._select import (
    Choice,
    CohortSize,
    Sampler,
    build,
    check_capacity,
    check_size,
    resolve_sizes,
)


def importance(
    num_examples: ArrayLike, cohort_size: CohortSize, *, capacity: int | None = None
) -> Sampler:
    r"""Each client on a coin of its own that favours large clients.

    $p_i = \min(1, K n_i / \sum_j n_j)$, for a client with $n_i$ examples and an expected cohort
    size of $K$; the expectation falls below $K$ where a probability is cut at 1.

    Args:
      num_examples: `[clients]`, not negative: numbers of examples, or any other measure. May
        be traced.
      cohort_size: Expected number of clients $K$, or a function of the round.
      capacity: Number of slots. By default so many that a round exceeds them with a probability
        of at most 1e-9 (by the binomial of the same mean, whose tail is the heavier one:
        Hoeffding, 1956). If one does, those that stay are a uniform choice.

    Returns:
      A sampler. Probabilities are $p_i$.

    Raises:
      ValueError: An argument is out of range, or `capacity` is missing beside a function or
        traced numbers. Traced numbers are not checked.

    >>> import jax
    >>> selection = importance([1, 0, 98, 1], 1).select(jax.random.key(0), 0)
    >>> selection.client_ids.tolist()[0], round(float(selection.probabilities[0]), 2)
    (2, 0.98)
    """
    shares = _shares("num_examples", num_examples)
    num_clients = shares.size
    rate = None
    if isinstance(shares, np.ndarray) and not callable(cohort_size):
        each = np.minimum(check_size(cohort_size, num_clients) * shares.astype(float), 1)
        rate = float(each.max())
        capacity = quantile(binomial(num_clients, each.mean())) if capacity is None else capacity
    capacity = check_capacity(capacity, num_clients)
    size_of, _ = resolve_sizes(cohort_size, num_clients, num_clients)

    def choose(key: jax.Array, round: jax.Array) -> Choice:
        probabilities = jnp.minimum(size_of(round) * shares, 1.0)
        # Of those with u < p, u / p is uniform: the smallest ones are a uniform choice.
        scores = _uniforms(jax.random.fold_in(key, round), num_clients) / probabilities
        _, client_ids = jax.lax.top_k(-scores, capacity)
        return Choice(client_ids, probabilities[client_ids], (scores < 1).sum())

    return build(choose, num_clients, capacity, scheme="importance", rate=rate)


def weighted(
    weights: ArrayLike, cohort_size: CohortSize, *, capacity: int | None = None
) -> Sampler:
    r"""One client after the other, each in proportion to its weight among those not yet drawn.

    That is what `numpy.random.Generator.choice(p=..., replace=False)` draws, in one pass: each
    client gets an exponential time of rate $w_i$, and the first ones are taken (Efraimidis and
    Spirakis, 2006). Clients stand in the order in which they are drawn.

    The chance of a client to be among them is not proportional to its weight, and has no closed
    form. `probabilities` is the one given the times of the other clients,
    $1 - e^{-w_i \tau}$ with $\tau$ the first time that is too late: the estimate of Horvitz
    and Thompson is unbiased with it too (Cohen and Kaplan, 2008).

    Args:
      weights: `[clients]`, not negative; a client of weight 0 is never drawn. May be traced.
      cohort_size: Number of clients, or a function of the round. There are empty slots if
        fewer clients have a positive weight.
      capacity: Number of slots, the largest cohort size that can occur. `cohort_size` itself if
        left out.

    Returns:
      A sampler. It takes time in proportion to the number of clients, about 10 ms for a million
      on one core.

    Raises:
      ValueError: An argument is out of range, there are fewer positive weights than
        `cohort_size`, or `capacity` is missing beside a function. Traced weights are not
        checked.

    >>> import jax
    >>> sampler = weighted([1.0, 0.0, 5.0], 2)
    >>> sorted(sampler.select(jax.random.key(0), 0).client_ids.tolist())
    [0, 2]
    """
    shares = _shares("weights", weights)
    num_clients = shares.size
    size_of, capacity = resolve_sizes(cohort_size, capacity, num_clients)
    if isinstance(shares, np.ndarray) and not callable(cohort_size):
        num_positive = int((shares > 0).sum())
        if num_positive < cohort_size:
            raise ValueError(
                f"weights has {num_positive} positive entries, below cohort_size {cohort_size};"
                " lower cohort_size, or give more clients a weight."
            )

    def choose(key: jax.Array, round: jax.Array) -> Choice:
        uniforms = _uniforms(jax.random.fold_in(key, round), num_clients)
        times = -jnp.log1p(-uniforms) / shares
        # Without the barrier XLA:CPU slices before it selects, and sorts all clients instead.
        earliest, client_ids = jax.lax.optimization_barrier(
            jax.lax.top_k(-times, min(capacity + 1, num_clients))
        )
        late = jnp.append(-earliest, jnp.inf)[jnp.minimum(size_of(round), capacity)]
        client_ids = client_ids[:capacity]
        probabilities = -jnp.expm1(-late * jnp.asarray(shares)[client_ids])
        return Choice(client_ids, probabilities, jnp.minimum(size_of(round), (shares > 0).sum()))

    return build(choose, num_clients, capacity, scheme="weighted")


def _uniforms(key: jax.Array, count: int) -> jax.Array:
    """Float32 numbers in (0, 1), of the finest steps near 0, where the least ones are sought."""
    bits = jax.random.bits(key, (count,), jnp.uint32)
    return jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2**-32, 1 - 2**-24)


def _shares(name: str, values: ArrayLike) -> np.ndarray | jax.Array:
    """`values` over their sum, float32; in NumPy, and checked, unless they are traced."""
    if np.ndim(values) != 1 or np.size(values) == 0:
        raise ValueError(
            f"{name} has shape {np.shape(values)}; pass one number for each client, [clients]."
        )
    if isinstance(values, jax.core.Tracer):
        values = values.astype(jnp.float32)
        return values / values.sum()
    array = np.asarray(values, np.float64)
    if not (np.isfinite(array).all() and (array >= 0).all() and array.any()):
        raise ValueError(
            f"{name} lies between {array.min()} and {array.max()}; pass finite numbers from 0, of"
            " which one at least is positive."
        )
    return (array / array.sum()).astype(np.float32)
