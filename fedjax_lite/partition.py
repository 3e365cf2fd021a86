"""Ways to split a data set over clients: which rows each client gets."""

import numpy as np
from jax.typing import ArrayLike

from fedjax_lite import _validate

_MAX_TRIES = 10


def dirichlet(
    labels: ArrayLike,
    num_clients: int,
    *,
    alpha: float,
    min_examples: int = 10,
    seed: int | np.random.Generator,
) -> list[np.ndarray]:
    r"""Label skew: each class is dealt to the clients in Dirichlet proportions.

    For each class $c$, draws $p_c \sim \mathrm{Dir}_N(\alpha)$ and gives client $i$ a
    fraction $p_{c,i}$ of the class's examples, shuffled. Redraws the whole split, up to ten
    times, until every client has `min_examples`.

    Source: Yurochkin et al. (2019), "Bayesian Nonparametric Federated Learning of Neural
    Networks", section 4.

    Args:
      labels: `[rows]`, the class of each row.
      num_clients: Number of clients $N$.
      alpha: Concentration, positive: towards 0, each class goes to one client; towards
        infinity, all clients have the same mixture.
      min_examples: Fewest examples of a client.
      seed: Seed, or the generator to draw from.

    Returns:
      For each client, the sorted indices of its rows. Each row has exactly one client.

    Raises:
      ValueError: An argument is out of range, or no draw gave each client its minimum.

    >>> rows = dirichlet([0, 0, 1, 1], 2, alpha=1.0, min_examples=1, seed=0)
    >>> sorted(np.concatenate(rows).tolist())
    [0, 1, 2, 3]
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.size == 0:
        raise ValueError(
            f"labels has shape {labels.shape}; pass one label per row, of shape [rows]."
        )
    num_clients = _validate.integer("num_clients", num_clients, minimum=1)
    min_examples = _validate.integer("min_examples", min_examples, minimum=0)
    if not 0 < alpha <= 1e15:
        raise ValueError(f"alpha is {alpha}; choose a positive concentration, at most 1e15.")
    if min_examples * num_clients > labels.size:
        raise ValueError(
            f"min_examples is {min_examples} for {num_clients} clients, but there are only"
            f" {labels.size} rows; lower min_examples or num_clients."
        )
    rng = np.random.default_rng(seed)
    classes, label_index = np.unique(labels, return_inverse=True)
    for _ in range(_MAX_TRIES):
        owner = np.empty(labels.size, np.int64)
        for c in range(classes.size):
            rows = rng.permutation(np.flatnonzero(label_index == c))
            shares = np.cumsum(rng.dirichlet(np.full(num_clients, alpha)))[:-1]
            ends = np.round(shares * rows.size).astype(np.int64)
            owner[rows] = np.searchsorted(ends, np.arange(rows.size), side="right")
        sizes = np.bincount(owner, minlength=num_clients)
        if sizes.min() >= min_examples:
            return np.split(np.argsort(owner, kind="stable"), np.cumsum(sizes)[:-1])
    raise ValueError(
        f"alpha is {alpha}: {_MAX_TRIES} draws each left a client with fewer than"
        f" {min_examples} of {labels.size} examples; raise alpha, or lower min_examples or"
        " num_clients."
    )
