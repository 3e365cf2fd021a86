"""Handwritten digits that ship with scikit-learn."""

import numpy as np

from fedjax_lite._extras import folder_of
from fedjax_lite.data import partition
from fedjax_lite.data.dataset import FederatedDataset


def digits_images() -> dict[str, np.ndarray]:
    """The 1,797 images of 8 x 8 pixels of the UCI digits test set, to be dealt to clients.

    Needs scikit-learn (the `run` extra), which bundles the data; nothing is downloaded.

    Returns:
      The features `x` `[1797, 64]`, float32 within [0, 1], and `y` `[1797]`, int32 from 0 to 9.

    Raises:
      ImportError: scikit-learn is missing.

    >>> {name: feature.shape for name, feature in digits_images().items()}
    {'x': (1797, 64), 'y': (1797,)}
    """
    # To import scikit-learn, and with it SciPy, would take as long as a short run.
    file = folder_of("sklearn", "run") / "datasets" / "data" / "digits.csv.gz"
    rows = np.loadtxt(file, delimiter=",")
    return {"x": (rows[:, :-1] / 16).astype(np.float32), "y": rows[:, -1].astype(np.int32)}


def digits(
    num_clients: int = 50,
    *,
    alpha: float = 0.3,
    held_out: float = 0.2,
    min_examples: int = 1,
    seed: int = 0,
) -> tuple[FederatedDataset, dict[str, np.ndarray]]:
    """The 1,797 images of 8 x 8 pixels of the UCI digits test set, split with label skew.

    Needs scikit-learn (the `run` extra), which bundles the data; nothing is downloaded.

    Args:
      num_clients: Number of clients.
      alpha: Concentration of `partition.dirichlet`; smaller is more skewed.
      held_out: Fraction of all images that no client gets.
      min_examples: Fewest images of a client.
      seed: Determines the split.

    Returns:
      The clients' data set and the held-out examples, both with the features `x`
      `[rows, 64]`, float32 within [0, 1], and `y` `[rows]`, int32 from 0 to 9.

    Raises:
      ValueError: `held_out` is not within (0, 1), or the split cannot be made.
      ImportError: scikit-learn is missing.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}; choose a fraction between 0 and 1.")
    examples = digits_images()
    labels = examples["y"]
    rng_held_out, rng_partition = np.random.default_rng(seed).spawn(2)
    order = rng_held_out.permutation(labels.size)
    test, train = np.split(order, [round(held_out * labels.size)])
    rows = partition.dirichlet(
        labels[train], num_clients, alpha=alpha, min_examples=min_examples, seed=rng_partition
    )
    dataset = FederatedDataset.from_rows(examples, [train[part] for part in rows])
    return dataset, {name: feature[test] for name, feature in examples.items()}
