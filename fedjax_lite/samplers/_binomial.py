"""Sizes of Poisson samples: the binomial distribution, from a table of its own making."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_OVERFLOW = 1e-9


class Binomial(NamedTuple):
    """Cumulative probabilities `cdf` of the sizes from `first` on, as far as they matter."""

    first: int
    cdf: np.ndarray


def binomial(num_clients: int, rate: float) -> Binomial:
    if rate == 1:
        return Binomial(num_clients, np.ones(1))
    mode = int((num_clients + 1) * rate)
    # By Bernstein's inequality, less than 1e-13 lies further out.
    width = 60 + int(8 * np.sqrt(num_clients * rate * (1 - rate)))
    first, last = max(mode - width, 0), min(mode + width, num_clients)
    sizes = np.arange(first + 1, last + 1)
    ratios = (num_clients - sizes + 1) / sizes * (rate / (1 - rate))
    logarithms = np.cumsum(np.log(np.append(1, ratios)))
    cdf = np.cumsum(np.exp(logarithms - logarithms.max()))
    return Binomial(first, cdf / cdf[-1])


def quantile(table: Binomial) -> int:
    """The smallest capacity, at least 1, that is exceeded with a probability of 1e-9 at most."""
    return max(table.first + int(np.searchsorted(table.cdf, 1 - _OVERFLOW)), 1)


def draw(key: jax.Array, table: Binomial) -> jax.Array:
    thresholds = np.floor(table.cdf[table.cdf < 1 - 2**-32] * 2**32).astype(np.uint32)
    bits = jax.random.bits(key, (), jnp.uint32)
    return table.first + jnp.searchsorted(jnp.asarray(thresholds), bits, side="right")


def check_rate(rate: Any) -> float:
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}; choose a number above 0, at most 1.")
    return float(rate)
