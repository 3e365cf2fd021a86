"""The pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedjax_lite.data.synthetic import HALFSPACE_BIAS, HALFSPACE_WEIGHTS, halfspace_batch

_BLUE, _ORANGE, _DARK, _GREY = "#2f6db3", "#e07b39", "#20242c", "#8a919c"


def curves(folder: Path, history: Sequence[dict[str, Any]], title: str) -> None:
    """Draws `loss.png` and `accuracy.png`: the server's evaluation before each round."""
    rounds = [row["round"] for row in history]
    for name, color in (("loss", _BLUE), ("accuracy", _ORANGE)):
        values = [row[name] for row in history]
        figure, axes = _figure((6.4, 4.0))
        axes.plot(rounds, values, color=color, linewidth=2, marker="o" if len(rounds) == 1 else "")
        axes.annotate(
            f"{values[-1]:.3f}",
            (rounds[-1], values[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontweight="bold",
        )
        axes.set(xlabel="round", ylabel=f"{name} on the server's examples", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0, top=1.02 if name == "accuracy" else None)
        _save(figure, folder / f"{name}.png")


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
    _save(figure, path)


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_GREY, alpha=0.25, linewidth=0.8)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
