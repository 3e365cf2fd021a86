"""Data sets in which some clients mean harm."""

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.data.dataset import FederatedDataset


def flip_labels(
    dataset: FederatedDataset,
    clients: ArrayLike | Sequence[int],
    num_classes: int,
    *,
    label: str = "y",
) -> FederatedDataset:
    r"""Has some clients train on wrong labels: $y$ becomes $C - 1 - y$.

    Each of them trains honestly on its own flipped data, as in Karimireddy et al. (2022),
    "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing". (In ByzFL, all send the
    mean of what honest clients would send on flipped labels, which is another attack.)

    Args:
      dataset: The data set.
      clients: Who flips: positions in the population, such as `fl.hostile_clients(0.2, 100)`.
      num_classes: The number of classes $C$.
      label: The name of the feature with the labels, integers from 0 to $C - 1$.

    Returns:
      The same data set with other labels.

    Raises:
      ValueError: `clients` are no positions, there is no feature of that name, or it holds labels
        that are out of range.

    >>> dataset = FederatedDataset.from_clients([{"y": [0, 1]}, {"y": [0, 2]}])
    >>> flip_labels(dataset, [1], 3)[1]["y"].tolist()
    [2, 0]
    """
    num_classes = _validate.integer("num_classes", num_classes, minimum=1)
    clients = np.asarray(clients, np.int64 if np.size(clients) == 0 else None)
    is_outside = clients.dtype.kind not in "iu" or clients.ndim != 1
    if is_outside or ((clients < 0) | (clients >= dataset.num_clients)).any():
        raise ValueError(
            f"clients is {clients.tolist()}; pass a list of positions from 0 to"
            f" {dataset.num_clients - 1}."
        )
    if label not in dataset.examples:
        raise ValueError(
            f"label is {label!r}, and the examples have {', '.join(map(repr, dataset.examples))};"
            " choose one of them."
        )
    labels = np.asarray(dataset.examples[label])
    if labels.dtype.kind not in "iu" or ((labels < 0) | (labels >= num_classes)).any():
        raise ValueError(
            f"num_classes is {num_classes}, and {label!r} holds labels that are no integers from 0"
            f" to {num_classes - 1}; pass the number of classes."
        )
    flips = np.isin(np.arange(dataset.num_clients), clients)
    in_rows = np.repeat(flips, dataset.num_examples).reshape(-1, *[1] * (labels.ndim - 1))
    flipped = np.where(in_rows, num_classes - 1 - labels, labels).astype(labels.dtype)

    return dataset.map(lambda features: {**features, label: flipped})
