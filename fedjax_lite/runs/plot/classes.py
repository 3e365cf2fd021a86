"""Pictures of data sets: which clients have which classes."""

from collections.abc import Hashable, Sequence

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, PowerNorm

from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.runs.plot.style import new_axes

_BLUE = "#2f6db3"
_MAX_BARS, _MAX_COLUMNS = 40, 800
_MAX_CELLS = 2 * 10**8  # Of the table of clients and classes: 1.6 GB.


def count_classes(dataset: FederatedDataset, label: str) -> tuple[list[int], np.ndarray]:
    """The classes in sorted order, and how many examples of each the clients have.

    Args:
      dataset: The data set.
      label: The feature with the class of each example.

    Returns:
      The classes, and counts `[clients, classes]`.

    Raises:
      ValueError: There is no such feature, or it is no class.
    """
    classes, index = class_indices(dataset, label)
    return classes, counts_of(dataset, index, len(classes))


def class_indices(dataset: FederatedDataset, label: str) -> tuple[list[int], np.ndarray]:
    """The classes in sorted order, and the position among them of each example's class."""
    if label not in dataset.examples:
        raise ValueError(f"label is {label!r}; choose one of {', '.join(dataset.examples)}")
    values = dataset.examples[label]
    if values.ndim != 1 or not (np.isfinite(values) & (values == np.round(values))).all():
        raise ValueError(
            f"label is {label!r}, of shape {values.shape} and dtype {values.dtype}; choose a"
            " feature with one whole number per example"
        )
    classes, index = np.unique(values, return_inverse=True)
    if dataset.num_clients * classes.size > _MAX_CELLS:
        raise ValueError(
            f"label is {label!r}, which has {classes.size} values; choose one with fewer"
        )
    return [int(value) for value in classes], index


def counts_of(dataset: FederatedDataset, index: np.ndarray, num_classes: int) -> np.ndarray:
    """`[clients, classes]`, the number of examples whose class has an index."""
    owner = np.repeat(np.arange(dataset.num_clients), dataset.num_examples)
    cells = dataset.num_clients * num_classes
    counts = np.bincount(owner * num_classes + index, minlength=cells)
    return counts.reshape(dataset.num_clients, num_classes)


def class_distribution(
    counts: np.ndarray,
    classes: Sequence[Hashable],
    client_ids: Sequence[Hashable],
    *,
    label: str,
    title: str,
    axes: Axes | None = None,
) -> Axes:
    """Draws how many examples of each class the clients have.

    Up to 40 clients are stacked bars in the order given. More are columns of a heat map of
    shares, sorted by their most frequent class, below the number of their examples.

    Args:
      counts: `[clients, classes]`.
      classes: Name of each class.
      client_ids: Name of each client.
      label: What the classes are called.
      title: The title.
      axes: Where to draw; by default a new figure, in which a heat map has the numbers of examples
        above it.

    Returns:
      The axes of the bars, or of the heat map.
    """
    if len(client_ids) <= _MAX_BARS:
        return _stacked_bars(counts, classes, client_ids, label, title, axes)
    return _heat_map(counts, classes, label, title, axes)


def _stacked_bars(
    counts: np.ndarray,
    classes: Sequence[Hashable],
    client_ids: Sequence[Hashable],
    label: str,
    title: str,
    axes: Axes | None,
) -> Axes:
    num_clients, num_classes = counts.shape
    axes = new_axes((8.0, 4.5)) if axes is None else axes
    axes.grid(axis="x", visible=False)
    axes.set_axisbelow(True)
    # Twenty colours can be told apart by a legend; more are a scale.
    few = num_classes <= 20
    colormap = matplotlib.colormaps["tab10" if num_classes <= 10 else "tab20" if few else "turbo"]
    colors = colormap(np.arange(num_classes) if few else np.linspace(0, 1, num_classes))
    bottoms = np.cumsum(counts, axis=1) - counts
    for c in range(num_classes):
        axes.bar(
            np.arange(num_clients),
            counts[:, c],
            bottom=bottoms[:, c],
            color=colors[c],
            width=0.85,
            linewidth=0,
            label=str(classes[c]),
        )
    axes.set(xlabel="client", ylabel="examples", title=title, xlim=(-0.6, num_clients - 0.4))
    names = [str(client_id) for client_id in client_ids]
    crowded = sum(map(len, names)) > 60
    axes.set_xticks(np.arange(num_clients), names, rotation=90 if crowded else 0)
    axes.tick_params(axis="x", length=0)
    if few:
        handles, texts = axes.get_legend_handles_labels()
        axes.legend(
            handles[::-1],  # From top to bottom, as in the bars.
            texts[::-1],
            title=label,
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            frameon=False,
        )
    else:
        scale = ScalarMappable(Normalize(-0.5, num_classes - 0.5), ListedColormap(colors))
        _name_classes(axes.figure.colorbar(scale, ax=axes, label=label).ax, classes)
    return axes


def _heat_map(
    counts: np.ndarray, classes: Sequence[Hashable], label: str, title: str, axes: Axes | None
) -> Axes:
    num_clients, num_classes = counts.shape
    sizes = counts.sum(1)
    shares = counts / np.maximum(sizes, 1)[:, None]
    main = np.where(sizes > 0, counts.argmax(1), num_classes)
    order = np.lexsort((-shares.max(1), main))
    # A column less than a pixel wide would be lost; columns of neighbours' means are not.
    edges = np.linspace(0, num_clients, min(num_clients, _MAX_COLUMNS) + 1).astype(int)
    sizes, shares = (
        np.add.reduceat(values[order], edges[:-1]).T / np.diff(edges) for values in (sizes, shares)
    )

    if axes is None:
        _, (top, axes) = plt.subplots(
            2, 1, figsize=(8.0, 5.5), sharex=True, height_ratios=(1, 3), layout="constrained"
        )
        top.stairs(sizes, edges, fill=True, color=_BLUE)
        if sizes.max() > 20 * max(np.median(sizes), 1):
            top.set_yscale("symlog", linthresh=1)
        top.set(ylabel="examples", title=title)
        top.set_ylim(bottom=0)
        top.spines[["top", "right"]].set_visible(False)
    else:
        axes.set_title(title)
    # The root of the share keeps 1 of 62 classes apart from none.
    cells = axes.pcolormesh(
        edges,
        np.arange(num_classes + 1) - 0.5,
        shares,
        cmap="magma_r",
        norm=PowerNorm(0.5, 0, 1),
        rasterized=True,
    )
    axes.set(xlabel="clients, sorted by their most frequent class", ylabel=label)
    axes.set_xlim(0, num_clients)
    _name_classes(axes, classes)
    shares_at = (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)
    axes.figure.colorbar(
        cells, ax=axes, label="share of the client's examples", pad=0.01, ticks=shares_at
    )
    return axes


def _name_classes(axes: Axes, classes: Sequence[Hashable]) -> None:
    """Names on the vertical axis, at most thirty of them."""
    at = range(0, len(classes), -(-len(classes) // 30))
    axes.set_yticks(at, [str(classes[i]) for i in at])
