"""MNIST and Fashion-MNIST as papers deal or cut them: pairs of what is trained and tested on."""

import os

import numpy as np

from fedjax_lite import _validate
from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.data.mnist import DEBIAN, Examples, fashion_mnist, mnist
from fedjax_lite.data.partition._deal import generator

Parts = tuple[FederatedDataset, FederatedDataset]
_NUM_ANGLES = 4
_MAX_TRIES = 100


def rotated_mnist(
    folder: str | os.PathLike[str],
    num_clients: int = 1200,
    *,
    num_examples: int = 200,
    seed: int | np.random.Generator = 0,
) -> Parts:
    r"""MNIST in four clusters of clients, who see it turned by 0, 90, 180 or 270 degrees.

    Of the $m$ clients, numbers $j m / 4$ to $(j + 1) m / 4 - 1$ see images that are turned by
    $90 j$ degrees counterclockwise. In each cluster, the 60,000 images to train on are shuffled and
    dealt out, $n$ to a client, and the 10,000 to test on are cut into equal blocks in their order.

    Source: Ghosh et al. (2020), "An Efficient Framework for Clustered Federated Learning", with
    1,200, 2,400 or 4,800 clients of 200, 100 or 50 examples. There, other machines are tested, as
    many as have $n$ examples to test on each.

    Args:
      folder: As for `mnist`.
      num_clients: $m$, a multiple of four.
      num_examples: $n$; at most 60,000 / ($m$ / 4).
      seed: Seed, or the generator to draw from.

    Returns:
      What clients train on, and what they are tested on: `x` `[rows, 28, 28, 1]` and `y` `[rows]`.

    Raises:
      FileNotFoundError: As for `mnist`.
      ValueError: An argument is out of range, or a file is damaged.
    """
    train, test = mnist(folder, "both")
    num_clients = _validate.integer("num_clients", num_clients, minimum=_NUM_ANGLES)
    if num_clients % _NUM_ANGLES:
        raise ValueError(f"num_clients is {num_clients}; choose a multiple of {_NUM_ANGLES}.")
    in_cluster, num_rows = num_clients // _NUM_ANGLES, len(train["y"])
    num_examples = _validate.integer(
        "num_examples", num_examples, minimum=1, maximum=num_rows // in_cluster
    )
    rng = generator(seed)
    dealt = [rng.permutation(num_rows)[: in_cluster * num_examples] for _ in range(_NUM_ANGLES)]
    own = np.concatenate(dealt).reshape(num_clients, num_examples)
    blocks = np.array_split(np.arange(len(test["y"])), in_cluster) * _NUM_ANGLES
    return _turned(train, list(own)), _turned(test, blocks)


def _turned(examples: Examples, rows: list[np.ndarray]) -> FederatedDataset:
    """Clients with these rows, turned by their clusters."""
    dataset = FederatedDataset.from_rows(examples, rows)
    starts = dataset.offsets[:: len(rows) // _NUM_ANGLES]
    clusters = np.split(dataset.examples["x"], starts[1:-1])
    x = np.concatenate([np.rot90(part, j, axes=(1, 2)) for j, part in enumerate(clusters)])
    return dataset.map(lambda features: {**features, "x": x})


def long_tailed_mnist(
    folder: str | os.PathLike[str], *, decay: float = 0.5
) -> tuple[Examples, Examples]:
    r"""MNIST, of whose digit $i$ only a fraction $\beta^i$ is left, to be dealt to clients.

    Pixels have the mean 0 and the standard deviation 1 of all that MNIST has to train on.

    Source: Karimireddy et al. (2022), "Byzantine-Robust Learning on Heterogeneous Datasets via
    Bucketing", whose code has $\beta = 0.5$, of the examples to test on as well.

    Args:
      folder: As for `mnist`.
      decay: $\beta$, within (0, 1].

    Returns:
      The first ones of each digit to train and to test on, as of `mnist`.

    Raises:
      FileNotFoundError: As for `mnist`.
      ValueError: `decay` is out of range, or a file is damaged.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay is {decay}; choose a number above 0, up to 1.")

    def cut(examples: Examples) -> Examples:
        rows = [np.flatnonzero(examples["y"] == digit) for digit in range(10)]
        left = [of_digit[: int(of_digit.size * decay**i)] for i, of_digit in enumerate(rows)]
        kept = np.sort(np.concatenate(left))
        return {name: feature[kept] for name, feature in examples.items()}

    train, test = mnist(folder, "both", mean=0.1307, std=0.3081)
    return cut(train), cut(test)


def pfllib_fashion_mnist(folder: str | os.PathLike[str] = DEBIAN) -> Parts:
    r"""Fashion-MNIST in the split of PFLlib's leaderboard, the same to the last image.

    All 70,000 images go to 20 clients by classes in Dirichlet proportions with $\alpha = 0.1$, a
    client that has more than its share getting none of the classes that follow; three quarters of
    each client's are to train on. The seed is theirs, of NumPy's old generator.

    Source: Zhang et al. (2025), "PFLlib: A Beginner-Friendly and Comprehensive Personalized
    Federated Learning Library and Benchmark", and its code.

    Args:
      folder: As for `fashion_mnist`.

    Returns:
      What clients train on, and what they are tested on: `x` `[rows, 28, 28, 1]` within [-1, 1],
      and `y` `[rows]`.

    Raises:
      FileNotFoundError: As for `fashion_mnist`.
      ValueError: A file is damaged, or has too few images.
    """
    train, test = fashion_mnist(folder, "both")
    x = 2 * np.concatenate([train["x"], test["x"]]) - 1
    examples = {"x": x, "y": np.concatenate([train["y"], test["y"]])}
    dealt = _deal_as_pfllib(examples["y"], 20, 0.1)
    num_test = [len(rows) - 3 * len(rows) // 4 for rows in dealt]
    ends = list(zip(dealt, num_test, strict=True))
    return (
        FederatedDataset.from_rows(examples, [rows[end:] for rows, end in ends]),
        FederatedDataset.from_rows(examples, [rows[:end] for rows, end in ends]),
    )


def _deal_as_pfllib(labels: np.ndarray, num_clients: int, alpha: float) -> list[np.ndarray]:
    """Shuffled rows of each client, of which the first quarter are to test on."""
    rng = np.random.RandomState(1)
    share, least = labels.size / num_clients, min(10 / (1 - 0.75), labels.size / num_clients / 2)
    for _ in range(_MAX_TRIES):
        dealt: list[list[int]] = [[] for _ in range(num_clients)]
        for label in range(labels.max() + 1):
            rows = np.flatnonzero(labels == label)
            rng.shuffle(rows)
            shares = rng.dirichlet(np.repeat(alpha, num_clients))
            shares = np.array(
                [p * (len(own) < share) for p, own in zip(shares, dealt, strict=True)]
            )
            ends = (np.cumsum(shares / shares.sum()) * rows.size).astype(int)[:-1]
            for own, more in zip(dealt, np.split(rows, ends), strict=True):
                own.extend(more.tolist())
        if min(map(len, dealt)) >= int(least):
            return [np.array(own)[rng.permutation(len(own))] for own in dealt]
    raise ValueError(
        f"the data set has {labels.size} examples, of which {_MAX_TRIES} draws each left a client"
        f" with fewer than {int(least)}; pass the 70,000 of Fashion-MNIST."
    )
