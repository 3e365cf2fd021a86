"""Label skew of every degree: class proportions drawn from a Dirichlet distribution."""

import numpy as np
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.data.partition._deal import classes, client_sizes, concentration, deal, generator

_MAX_TRIES = 10


def dirichlet(
    labels: ArrayLike,
    num_clients: int,
    *,
    alpha: ArrayLike,
    min_examples: int = 10,
    self_balancing: bool = False,
    seed: int | np.random.Generator,
) -> list[np.ndarray]:
    r"""Label skew: each class is dealt to the clients in Dirichlet proportions.

    For each class $c$, draws $p_c \sim \mathrm{Dir}_N(\alpha)$ and gives client $i$ a
    fraction $p_{c,i}$ of the class's examples, shuffled. Redraws the whole split, up to ten
    times, until every client has `min_examples`.

    Source: Yurochkin et al. (2019), "Bayesian Nonparametric Federated Learning of Neural
    Networks", section 4; balancing and redraws are in the code that goes with it.

    Args:
      labels: `[rows]`, the class of each row.
      num_clients: Number of clients $N$.
      alpha: Concentration, positive, or one per client: towards 0, each class goes to one
        client; towards infinity, all clients have the same mixture.
      min_examples: Fewest examples of a client.
      self_balancing: Whether a client that has more than the average number of examples gets
        nothing of the classes that follow.
      seed: Seed, or the generator to draw from.

    Returns:
      For each client, the sorted indices of its rows. Each row has exactly one client.

    Raises:
      ValueError: Labels are real values, an argument is out of range, or no draw gave each client
        its minimum.

    >>> rows = dirichlet([0, 0, 1, 1], 2, alpha=1.0, min_examples=1, seed=0)
    >>> sorted(np.concatenate(rows).tolist())
    [0, 1, 2, 3]
    """
    labels = classes("labels", labels)
    num_clients = _validate.integer("num_clients", num_clients, minimum=1)
    min_examples = _validate.integer("min_examples", min_examples, minimum=0)
    concentrations = concentration("alpha", alpha, num_clients)
    if min_examples * num_clients > labels.size:
        raise ValueError(
            f"min_examples is {min_examples} for {num_clients} clients, but there are only"
            f" {labels.size} rows; lower min_examples or num_clients."
        )
    rng = generator(seed)
    _, class_index, class_sizes = np.unique(labels, return_inverse=True, return_counts=True)
    for _ in range(_MAX_TRIES):
        counts = np.zeros((num_clients, class_sizes.size), np.int64)
        sizes = np.zeros(num_clients, np.int64)
        takers = np.arange(num_clients)
        for c, class_size in enumerate(class_sizes):
            if self_balancing:
                takers = np.flatnonzero(sizes * num_clients <= labels.size)
            # Some coordinates of a Dirichlet vector, renormalised, are a Dirichlet vector.
            shares = rng.dirichlet(concentrations[takers])
            # A random offset rounds without bias. A fixed one would favour the same clients in
            # each class, where a class has few examples per client.
            ends = np.floor(np.cumsum(shares[:-1]) * class_size + rng.random())
            ends = np.minimum(ends, class_size)
            counts[takers, c] = np.diff(ends, prepend=0, append=class_size)
            sizes += counts[:, c]
        if sizes.min() >= min_examples:
            return deal(class_index, counts, rng)
    raise ValueError(
        f"alpha is {alpha}: {_MAX_TRIES} draws each left a client with fewer than"
        f" {min_examples} of {labels.size} examples; raise alpha, or lower min_examples or"
        " num_clients."
    )


def dirichlet_by_client(
    labels: ArrayLike,
    num_clients: int,
    *,
    alpha: ArrayLike,
    sizes: ArrayLike | None = None,
    seed: int | np.random.Generator,
) -> list[np.ndarray]:
    r"""Label skew: each client draws its examples from a Dirichlet mixture of the classes.

    Client $i$ draws $q_i \sim \mathrm{Dir}_C(\alpha)$ over the $C$ classes, then the class of
    each of its examples from $q_i$, without replacement: a class that is used up leaves $q_i$,
    which is renormalised. Clients fill up one after another, so that the last ones take what is
    left; sizes are free of the skew, unlike those of `dirichlet`.

    Source: Hsu et al. (2019), "Measuring the Effects of Non-Identical Data Distribution for
    Federated Visual Classification". The paper writes $\mathrm{Dir}(a p)$ with a
    prior $p$ that sums to 1: pass `alpha=a * p`, or `a / C` where it is uniform.

    Args:
      labels: `[rows]`, the class of each row.
      num_clients: Number of clients.
      alpha: Concentration, positive, or one per class in sorted order: towards 0, each client
        has one class; towards infinity, all clients have the same mixture.
      sizes: `[clients]`, the number of examples of each client, which add up to all rows;
        nearly equal if left out.
      seed: Seed, or the generator to draw from.

    Returns:
      For each client, the sorted indices of its rows. Each row has exactly one client.

    Raises:
      ValueError: Labels are real values, an argument is out of range, or the sizes do not add up.

    >>> rows = dirichlet_by_client([0, 0, 1, 1, 1], 2, alpha=0.1, sizes=[1, 4], seed=0)
    >>> [part.size for part in rows]
    [1, 4]
    """
    labels = classes("labels", labels)
    sizes = client_sizes(sizes, num_clients, labels.size)
    rng = generator(seed)
    _, class_index, available = np.unique(labels, return_inverse=True, return_counts=True)
    concentrations = concentration("alpha", alpha, available.size)
    counts = np.zeros((sizes.size, available.size), np.int64)
    for i, size in enumerate(sizes):
        counts[i] = _fill(size, concentrations, available, rng)
        available -= counts[i]
    return deal(class_index, counts, rng)


def pachinko(
    labels: ArrayLike,
    coarse_labels: ArrayLike,
    num_clients: int,
    *,
    alpha: ArrayLike = 0.1,
    beta: float = 10.0,
    sizes: ArrayLike | None = None,
    seed: int | np.random.Generator,
) -> list[np.ndarray]:
    r"""Label skew in two levels: clients prefer a few coarse classes, and fine ones in them.

    Client $i$ draws $\theta_i \sim \mathrm{Dir}(\alpha)$ over the coarse classes and, for each
    coarse class $c$, $\theta_{i,c} \sim \mathrm{Dir}(\beta)$ over its fine classes. For each
    example it draws a coarse class, then one of its fine classes, without replacement: what is
    used up leaves its distribution, which is renormalised. Clients fill up one after another.

    Source: the Pachinko Allocation Method of Reddi et al. (2021), "Adaptive Federated
    Optimization"; with 500 clients and the defaults, the CIFAR-100 of that paper.

    Args:
      labels: `[rows]`, the fine class of each row.
      coarse_labels: `[rows]`, the coarse class of each row. A fine class lies in one coarse
        class.
      num_clients: Number of clients.
      alpha: Concentration over coarse classes, positive, or one per class in sorted order.
      beta: Concentration over the fine classes of a coarse class, positive.
      sizes: `[clients]`, the number of examples of each client, which add up to all rows;
        nearly equal if left out.
      seed: Seed, or the generator to draw from.

    Returns:
      For each client, the sorted indices of its rows. Each row has exactly one client.

    Raises:
      ValueError: Labels are real values, an argument is out of range, the sizes do not add up, or a
        fine class lies in two coarse ones.

    >>> rows = pachinko([0, 1, 2, 3], [0, 0, 1, 1], 2, seed=0)
    >>> [part.size for part in rows]
    [2, 2]
    """
    labels, coarse_labels = classes("labels", labels), classes("coarse_labels", coarse_labels)
    if coarse_labels.shape != labels.shape:
        raise ValueError(
            f"coarse_labels has shape {coarse_labels.shape} beside labels of shape {labels.shape};"
            " pass one of each per row."
        )
    sizes = client_sizes(sizes, num_clients, labels.size)
    rng = generator(seed)
    names, first, class_index, available = np.unique(
        labels, return_index=True, return_inverse=True, return_counts=True
    )
    parent = np.unique(coarse_labels, return_inverse=True)[1]
    astray = parent != parent[first][class_index]
    if astray.any():
        raise ValueError(
            f"labels: the fine class {names[class_index[astray][0]]} lies in two coarse classes;"
            " give each fine class one coarse class."
        )
    children = [np.flatnonzero(parent[first] == c) for c in range(parent.max() + 1)]
    alphas = concentration("alpha", alpha, len(children))
    betas = [concentration("beta", beta, fine.size) for fine in children]

    counts = np.zeros((sizes.size, available.size), np.int64)
    for i, size in enumerate(sizes):
        coarse_available = np.array([available[fine].sum() for fine in children])
        coarse_counts = _fill(size, alphas, coarse_available, rng)
        for c in np.flatnonzero(coarse_counts):
            fine = children[c]
            counts[i, fine] = _fill(coarse_counts[c], betas[c], available[fine], rng)
        available -= counts[i]
    return deal(class_index, counts, rng)


def _fill(
    size: int, concentrations: np.ndarray, available: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """How many examples of each class a client draws from a Dirichlet mixture.

    As many draws as examples are missing never take too many, so that they can be made at once;
    those of a class that is used up are repeated without it.
    """
    counts = np.zeros_like(available)
    left = np.flatnonzero(available)
    mixture = np.zeros(left.size)
    while missing := size - counts.sum():
        # All mass may be lost with a class, to rounding. The relation of the others was
        # independent of that mass, and is drawn now.
        mass = mixture.sum()
        mixture = mixture / mass if mass > 0 else rng.dirichlet(concentrations[left])
        drawn = rng.multinomial(missing, mixture)
        counts[left] += np.minimum(drawn, available[left] - counts[left])
        remain = counts[left] < available[left]
        left, mixture = left[remain], mixture[remain]
    return counts
