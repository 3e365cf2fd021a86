"""Feature skew: what clients see is disturbed, more with each."""

from collections.abc import Mapping

import numpy as np
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.data.partition._deal import generator
from fedjax_lite.data.partition.by_size import iid


def noisy(
    examples: Mapping[str, ArrayLike],
    num_clients: int,
    *,
    variance: float,
    feature: str = "x",
    seed: int | np.random.Generator,
) -> FederatedDataset:
    r"""Shuffles the rows into nearly equal blocks, to which clients add noise of their own level.

    A value of client $i = 1, \dots, N$ becomes $x + \epsilon$ with
    $\epsilon \sim N(0, \sigma i / N)$, drawn once for all rounds.

    Source: Li et al. (2022), "Federated Learning on Non-IID Data Silos: An Experimental Study",
    "noise-based feature imbalance". In their code, client $i$ adds noise of the standard deviation
    $\sigma (i - 1) / (N - 1)$, drawn anew whenever an example is read.

    Args:
      examples: Features `[rows, ...]` by name.
      num_clients: Number of clients $N$.
      variance: $\sigma$, the variance of the last client's noise.
      feature: Name of the feature that is disturbed, of floats.
      seed: Seed, or the generator to draw from.

    Returns:
      The data set: other partitions choose rows, this one changes them as well.

    Raises:
      ValueError: An argument is out of range, there is no such feature or it holds no floats, or
        there are more clients than rows.

    >>> dataset = noisy({"x": np.zeros((30_000, 4), np.float32)}, 3, variance=0.9, seed=0)
    >>> [round(float(dataset[i]["x"].var()), 1) for i in range(3)]
    [0.3, 0.6, 0.9]
    """
    if not 0 <= variance < np.inf:
        raise ValueError(f"variance is {variance}; choose a number from 0.")
    _validate.features("examples", examples)
    x = np.asarray(examples.get(feature))
    if x.dtype.kind != "f":
        raise ValueError(
            f"feature is {feature!r}, of dtype {x.dtype}, among {', '.join(examples)}; choose one"
            " with floats."
        )
    rng = generator(seed)
    rows = iid(x.shape[0], num_clients, seed=rng)
    dataset = FederatedDataset.from_rows(examples, rows)
    level = np.sqrt(variance * np.arange(1, num_clients + 1) / num_clients)
    in_rows = np.repeat(level, dataset.num_examples).reshape(-1, *[1] * (x.ndim - 1))
    noise = (in_rows * rng.standard_normal(x.shape)).astype(x.dtype)
    return dataset.map(lambda features: {**features, feature: features[feature] + noise})
