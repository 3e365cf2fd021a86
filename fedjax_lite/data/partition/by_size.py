"""Splits that shuffle the rows and differ in how many each client gets."""

from typing import Any

import numpy as np
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.data.partition._deal import client_sizes, concentration, deal, generator


def iid(
    num_examples: int, num_clients: int, *, seed: int | np.random.Generator
) -> list[np.ndarray]:
    """Shuffles the rows and cuts them into blocks whose sizes differ by one at most.

    Args:
      num_examples: Number of rows.
      num_clients: Number of clients.
      seed: Seed, or the generator to draw from.

    Returns:
      For each client, the sorted indices of its rows. Each row has exactly one client.

    Raises:
      ValueError: An argument is out of range, or there are more clients than rows.

    >>> [rows.size for rows in iid(11, 3, seed=0)]
    [4, 4, 3]
    """
    num_examples = _validate.integer("num_examples", num_examples, minimum=1)
    return _shuffled(client_sizes(None, num_clients, num_examples), seed)


def sizes(
    num_examples: int, sizes: ArrayLike, *, seed: int | np.random.Generator
) -> list[np.ndarray]:
    """Shuffles the rows and cuts them into blocks of the sizes given.

    Args:
      num_examples: Number of rows.
      sizes: `[clients]`, the number of examples of each client, 0 included; their sum is
        `num_examples`.
      seed: Seed, or the generator to draw from.

    Returns:
      For each client, the sorted indices of its rows. Each row has exactly one client.

    Raises:
      ValueError: An argument is out of range, or the sizes do not add up.

    >>> [rows.size for rows in sizes(6, [1, 5, 0], seed=0)]
    [1, 5, 0]
    """
    num_examples = _validate.integer("num_examples", num_examples, minimum=1)
    return _shuffled(client_sizes(sizes, np.size(sizes), num_examples), seed)


def linear(
    num_examples: int, num_clients: int, *, min_examples: int = 1, seed: int | np.random.Generator
) -> list[np.ndarray]:
    """Sizes in proportion to 1, 2, ..., N.

    Args:
      num_examples: Number of rows.
      num_clients: Number of clients $N$.
      min_examples: Fewest examples of a client. Shares below are raised to it, and the other
        clients divide what is left in proportion.
      seed: Seed, or the generator to draw from.

    Returns:
      For each client, the sorted indices of its rows. Each row has exactly one client, and each
      size is within one of its share.

    Raises:
      ValueError: An argument is out of range, or there are fewer than `min_examples` rows
        per client.

    >>> [rows.size for rows in linear(100, 4, seed=0)]
    [10, 20, 30, 40]
    """
    weights = np.arange(1.0, _clients(num_clients) + 1)
    return _proportional(num_examples, weights, min_examples, seed)


def square(
    num_examples: int, num_clients: int, *, min_examples: int = 1, seed: int | np.random.Generator
) -> list[np.ndarray]:
    """Sizes in proportion to 1, 4, ..., N².

    Args:
      num_examples: Number of rows.
      num_clients: Number of clients $N$.
      min_examples: Fewest examples of a client, as in `linear`.
      seed: Seed, or the generator to draw from.

    Returns:
      For each client, the sorted indices of its rows. Each row has exactly one client.

    Raises:
      ValueError: An argument is out of range, or there are fewer than `min_examples` rows
        per client.

    >>> [rows.size for rows in square(300, 4, seed=0)]
    [10, 40, 90, 160]
    """
    weights = np.arange(1.0, _clients(num_clients) + 1) ** 2
    return _proportional(num_examples, weights, min_examples, seed)


def exponential(
    num_examples: int, num_clients: int, *, min_examples: int = 1, seed: int | np.random.Generator
) -> list[np.ndarray]:
    """Sizes in proportion to e, e², ..., eᴺ.

    The last client has 63 % of all examples, the twelve last have all but a few per million of
    them: from there on, `min_examples` decides.

    Args:
      num_examples: Number of rows.
      num_clients: Number of clients $N$, any number.
      min_examples: Fewest examples of a client, as in `linear`.
      seed: Seed, or the generator to draw from.

    Returns:
      For each client, the sorted indices of its rows. Each row has exactly one client.

    Raises:
      ValueError: An argument is out of range, or there are fewer than `min_examples` rows
        per client.

    >>> [rows.size for rows in exponential(1000, 7, seed=0)]
    [1, 4, 12, 31, 86, 233, 633]
    """
    weights = np.exp(np.arange(1.0 - _clients(num_clients), 1.0))  # Never overflows.
    return _proportional(num_examples, weights, min_examples, seed)


def power_law(
    num_examples: int,
    num_clients: int,
    *,
    exponent: float,
    min_examples: int = 1,
    seed: int | np.random.Generator,
) -> list[np.ndarray]:
    """Sizes in proportion to i⁻ᵃ, for the clients i = 1, ..., N.

    Args:
      num_examples: Number of rows.
      num_clients: Number of clients $N$.
      exponent: $a$, not negative: 0 makes all sizes equal, 1 is Zipf's law.
      min_examples: Fewest examples of a client, as in `linear`.
      seed: Seed, or the generator to draw from.

    Returns:
      For each client, the sorted indices of its rows. Each row has exactly one client.

    Raises:
      ValueError: An argument is out of range, or there are fewer than `min_examples` rows
        per client.

    >>> [rows.size for rows in power_law(110, 3, exponent=1.0, seed=0)]
    [60, 30, 20]
    """
    if not 0 <= exponent < np.inf:
        raise ValueError(f"exponent is {exponent}; choose a number from 0.")
    weights = np.arange(1.0, _clients(num_clients) + 1) ** -float(exponent)
    return _proportional(num_examples, weights, min_examples, seed)


def log_normal(
    num_examples: int,
    num_clients: int,
    *,
    sigma: float,
    min_examples: int = 1,
    seed: int | np.random.Generator,
) -> list[np.ndarray]:
    r"""Sizes in proportion to $e^{\sigma z_i}$, with $z_i \sim N(0, 1)$ for each client.

    Source: Li et al. (2020), "Federated Optimization in Heterogeneous Networks", whose MNIST
    clients have $\sigma = 2$.

    Args:
      num_examples: Number of rows.
      num_clients: Number of clients.
      sigma: Standard deviation of the logarithm of a size, not negative.
      min_examples: Fewest examples of a client, as in `linear`.
      seed: Seed, or the generator to draw from.

    Returns:
      For each client, the sorted indices of its rows. Each row has exactly one client.

    Raises:
      ValueError: An argument is out of range, or there are fewer than `min_examples` rows
        per client.

    >>> [rows.size for rows in log_normal(12, 3, sigma=0.0, seed=0)]
    [4, 4, 4]
    """
    if not 0 <= sigma < np.inf:
        raise ValueError(f"sigma is {sigma}; choose a number from 0.")
    rng = generator(seed)
    logarithms = sigma * rng.standard_normal(_clients(num_clients))
    weights = np.exp(logarithms - logarithms.max())
    return _proportional(num_examples, weights, min_examples, rng)


def dirichlet_sizes(
    num_examples: int,
    num_clients: int,
    *,
    alpha: ArrayLike,
    min_examples: int = 1,
    seed: int | np.random.Generator,
) -> list[np.ndarray]:
    r"""Sizes in proportion to shares $q \sim \mathrm{Dir}_N(\alpha)$.

    Source: Li et al. (2022), "Federated Learning on Non-IID Data Silos: An Experimental Study",
    "quantity skew", with $\alpha = 0.5$. Their code draws anew until each client has ten examples.

    Args:
      num_examples: Number of rows.
      num_clients: Number of clients $N$.
      alpha: Concentration, positive, or one per client: towards 0, one client has everything;
        towards infinity, all have as much.
      min_examples: Fewest examples of a client, as in `linear`.
      seed: Seed, or the generator to draw from.

    Returns:
      For each client, the sorted indices of its rows. Each row has exactly one client.

    Raises:
      ValueError: An argument is out of range, or there are fewer than `min_examples` rows
        per client.

    >>> [rows.size for rows in dirichlet_sizes(12, 3, alpha=1e12, seed=0)]
    [4, 4, 4]
    """
    rng = generator(seed)
    weights = rng.dirichlet(concentration("alpha", alpha, _clients(num_clients)))
    return _proportional(num_examples, weights, min_examples, rng)


def _clients(num_clients: Any) -> int:
    return _validate.integer("num_clients", num_clients, minimum=1)


def _shuffled(sizes: np.ndarray, seed: int | np.random.Generator) -> list[np.ndarray]:
    return deal(np.zeros(sizes.sum(), np.int64), sizes[:, None], generator(seed))


def _proportional(
    num_examples: Any, weights: np.ndarray, min_examples: Any, seed: int | np.random.Generator
) -> list[np.ndarray]:
    num_examples = _validate.integer("num_examples", num_examples, minimum=1)
    min_examples = _validate.integer("min_examples", min_examples, minimum=0)
    num_clients = weights.size
    if min_examples * num_clients > num_examples:
        raise ValueError(
            f"min_examples is {min_examples} for {num_clients} clients, but there are only"
            f" {num_examples} rows; lower min_examples or num_clients."
        )
    # In ascending order, the clients below the minimum come first: the first client whose share
    # of what they leave reaches it ends them. The last client's always does.
    order = np.argsort(weights, kind="stable")
    ascending = weights[order]
    left = num_examples - min_examples * np.arange(num_clients)
    tails = np.cumsum(ascending[::-1])[::-1]
    first = int(np.argmax(left * ascending >= min_examples * tails))
    shares = left[first] * ascending[first:] / tails[first]

    sizes = np.full(num_clients, min_examples)
    sizes[first:] = np.floor(shares)
    # The rest goes, one each, to the largest remainders.
    missing = num_examples - sizes.sum()
    remainders = shares - sizes[first:]
    sizes[first + np.argsort(-remainders, kind="stable")[:missing]] += 1
    return _shuffled(sizes[np.argsort(order)], seed)
