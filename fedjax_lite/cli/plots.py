"""Pictures of data."""

from collections.abc import Hashable, Sequence
from pathlib import Path

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure

from fedjax_lite.data.synthetic import HALFSPACE_BIAS, HALFSPACE_WEIGHTS, halfspace_batch
from fedjax_lite.runs.files import replacing

_BLUE, _ORANGE, _DARK, _GREY = "#2f6db3", "#e07b39", "#20242c", "#8a919c"
_MAX_BARS, _MAX_COLUMNS = 40, 800


def halfspace(path: Path, params: dict[str, np.ndarray]) -> None:
    """Draws points by class, the line that labelled them, and the line that was learned."""
    batch = jax.device_get(halfspace_batch(jax.random.key(0), 1000))
    figure, axes = _figure((5.6, 5.6))
    for label, color in ((0, _BLUE), (1, _ORANGE)):
        points = batch["x"][batch["y"] == label]
        axes.scatter(
            points[:, 0],
            points[:, 1],
            s=9,
            color=color,
            alpha=0.55,
            linewidths=0,
            label=f"label {label}",
        )
    x = np.linspace(-1, 1, 2)
    true = (HALFSPACE_BIAS, HALFSPACE_WEIGHTS)
    learned = (params["bias"], params["weight"])
    for (bias, weight), style, name in ((true, "-", "true line"), (learned, "--", "learned line")):
        if weight[1] != 0:
            color = _DARK if style == "-" else "#c2185b"
            y = -(bias + weight[0] * x) / weight[1]
            axes.plot(x, y, style, color=color, linewidth=2.2, label=name)
    axes.set(xlim=(-1, 1), ylim=(-1, 1), xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    axes.set_title("halfspace: what the clients' data look like")
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, frameon=False, markerscale=2
    )
    save(figure, path)


def class_distribution(
    path: Path,
    counts: np.ndarray,
    classes: Sequence[Hashable],
    client_ids: Sequence[Hashable],
    *,
    label: str,
    title: str,
) -> None:
    """Draws how many examples of each class the clients have.

    Up to 40 clients are stacked bars in the order given. More are columns of a heat map of
    shares, sorted by their most frequent class, below the number of their examples.

    Args:
      path: The file; its suffix says which format.
      counts: `[clients, classes]`.
      classes: Name of each class.
      client_ids: Name of each client.
      label: What the classes are called.
      title: The title.
    """
    if len(client_ids) <= _MAX_BARS:
        figure = _stacked_bars(counts, classes, client_ids, label, title)
    else:
        figure = _heat_map(counts, classes, label, title)
    save(figure, path)


def _stacked_bars(
    counts: np.ndarray,
    classes: Sequence[Hashable],
    client_ids: Sequence[Hashable],
    label: str,
    title: str,
) -> Figure:
    num_clients, num_classes = counts.shape
    figure, axes = _figure((8.0, 4.5))
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
        _name_classes(figure.colorbar(scale, ax=axes, label=label).ax, classes)
    return figure


def _heat_map(counts: np.ndarray, classes: Sequence[Hashable], label: str, title: str) -> Figure:
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

    figure, (top, axes) = plt.subplots(
        2, 1, figsize=(8.0, 5.5), sharex=True, height_ratios=(1, 3), layout="constrained"
    )
    top.stairs(sizes, edges, fill=True, color=_BLUE)
    if sizes.max() > 20 * max(np.median(sizes), 1):
        top.set_yscale("symlog", linthresh=1)
    top.set(ylabel="examples", title=title)
    top.set_ylim(bottom=0)
    top.spines[["top", "right"]].set_visible(False)
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
    figure.colorbar(
        cells, ax=axes, label="share of the client's examples", pad=0.01, ticks=shares_at
    )
    return figure


def _name_classes(axes: Axes, classes: Sequence[Hashable]) -> None:
    """Names on the vertical axis, at most thirty of them."""
    at = range(0, len(classes), -(-len(classes) // 30))
    axes.set_yticks(at, [str(classes[i]) for i in at])


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    tidy(axes)
    return figure, axes


def tidy(axes: Axes) -> None:
    """A light grid, and no box around it."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_GREY, alpha=0.25, linewidth=0.8)


def save(figure: Figure, path: Path) -> None:
    """Writes a picture, in the format of the suffix."""
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150)
    plt.close(figure)
