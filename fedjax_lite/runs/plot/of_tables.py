"""The picture of a table: our numbers, and the published ones beside them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from fedjax_lite.runs.plot.style import COLORS, new_axes

_WIDEST = 0.7  # Of the space between two rows, what the points of a row take.


class Point(NamedTuple):
    """A number of a table.

    Attributes:
      row: The name of its row.
      column: The name of its column.
      values: Ours, of each seed; those that are not finite are left out.
      published: The published one, and its standard deviation, if there are.
    """

    row: str
    column: str
    values: Sequence[float]
    published: float | None = None
    spread: float | None = None


def points(found: Sequence[Point], label: str, title: str, *, is_log: bool = False) -> Axes:
    """Rows from top to bottom, a colour for each column: dots are ours, rings the published ones.

    Args:
      found: The numbers.
      label: What they are.
      title: Of the picture.
      is_log: Whether their axis is logarithmic.
    """
    rows = list(dict.fromkeys(point.row for point in found))
    columns = list(dict.fromkeys(point.column for point in found))
    axes = new_axes((7.2, 1.4 + 0.22 * max(len(rows) * (1 + len(columns) / 3), 8)))
    axes.grid(axis="y", visible=False)
    shifts = np.linspace(-_WIDEST / 2, _WIDEST / 2, len(columns) + 2)[1:-1]
    for column, shift, i in zip(columns, shifts, range(len(columns)), strict=True):
        color = COLORS[i % len(COLORS)]
        axes.plot([], [], "o", color=color, label=column)
        for point in found:
            if point.column == column:
                _draw(axes, point, rows.index(point.row) + shift, color)
    if any(point.published is not None for point in found):
        axes.plot([], [], "o", color="black", fillstyle="none", label="published")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel=label, title=title, xscale="log" if is_log else "linear")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return axes


def _draw(axes: Axes, point: Point, y: float, color: str) -> None:
    """The mean with its standard deviation, and each run, if there are several."""
    values = np.array(point.values, float)
    values = values[np.isfinite(values)]
    style: dict[str, Any] = {"fmt": "o", "color": color, "capsize": 3, "linewidth": 1.4}
    if values.size > 1:
        axes.plot(values, np.full(values.size, y), ".", color=color, alpha=0.35)
    if values.size:
        std = values.std(ddof=1) if values.size > 1 else None
        axes.errorbar(values.mean(), y, xerr=std, **style)
    if point.published is not None:
        axes.errorbar(point.published, y, xerr=point.spread, fillstyle="none", **style)
