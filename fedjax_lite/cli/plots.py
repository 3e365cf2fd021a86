"""The picture of the quickstart's data."""

from pathlib import Path

import jax
import numpy as np

from fedjax_lite.data.synthetic import HALFSPACE_BIAS, HALFSPACE_WEIGHTS, halfspace_batch
from fedjax_lite.runs.plot.style import new_axes, save

_BLUE, _ORANGE, _DARK = "#2f6db3", "#e07b39", "#20242c"


def halfspace(path: Path, params: dict[str, np.ndarray]) -> None:
    """Draws points by class, the line that labelled them, and the line that was learned."""
    batch = jax.device_get(halfspace_batch(jax.random.key(0), 1000))
    axes = new_axes((5.6, 5.6))
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
    save(axes, path)
