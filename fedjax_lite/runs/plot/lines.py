"""Pictures of runs: how loss and accuracy develop, and how accuracy differs between clients."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedjax_lite.runs.main_metric import better
from fedjax_lite.runs.plot.style import COLORS, new_axes, save, tidy

_STYLES = ("-", "--", ":", "-.")
_PER_STYLE = 4
CLIENTS = "clients"
_PERCENT = np.arange(101)  # Where the spread over clients is read off.
MAX_CURVES = _PER_STYLE * len(_STYLES)
SPREAD = "mean \N{PLUS-MINUS SIGN} standard deviation"


class Curve(NamedTuple):
    """One line of a picture.

    Attributes:
      label: What the legend says.
      x: `[points]`.
      values: `[seeds, points]`; several seeds are drawn as their mean with a band.
    """

    label: str
    x: np.ndarray
    values: np.ndarray


class Panel(NamedTuple):
    """One picture.

    Attributes:
      metric: Of what it is.
      ylabel: What the values are.
      curves: The lines, each with the number of its colour.
      xlabel: What `x` is: rounds, or another number of theirs, or clients.
    """

    metric: str
    ylabel: str
    curves: Sequence[tuple[int, Curve]]
    xlabel: str = "round"

    @property
    def name(self) -> str:
        return self.metric if self.xlabel != CLIENTS else CLIENTS


def over_clients(label: str, metric: str, values: Sequence[np.ndarray]) -> Curve:
    """The line of clients from the worst to the best.

    Args:
      label: What the legend says.
      metric: What the values are of.
      values: Of each seed, those of its clients.
    """
    percent = _PERCENT if better(metric) == "max" else _PERCENT[::-1]
    return Curve(label, _PERCENT, np.array([np.percentile(of_seed, percent) for of_seed in values]))


def draw(out: Path, panels: Sequence[Panel], title: str) -> list[Path]:
    """Draws each panel as a picture of its own in a folder, or all side by side in a file.

    Args:
      out: The file, if it has a suffix and is no folder; else the folder.
      panels: What to draw.
      title: The title.

    Returns:
      The files.
    """
    is_file = out.suffix and not out.is_dir()
    names = (panel.name.replace("/", "_") for panel in panels)
    apart = {out / f"{name}.png": [panel] for name, panel in zip(names, panels, strict=True)}
    pictures = {out: panels} if is_file else apart
    for path, shown in pictures.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        figure, grid = plt.subplots(1, len(shown), layout="constrained", squeeze=False)
        legend: dict[str, Line2D] = {}
        for axes, panel in zip(grid[0], shown, strict=True):
            legend |= draw_panel(axes, panel)
        figure.suptitle(title)
        height = 4.0
        if len(legend) > 1 or SPREAD in next(iter(legend)):
            columns = max(1, 80 * len(shown) // (max(map(len, legend)) + 8))
            height += 0.23 * -(-len(legend) // columns)
            figure.legend(
                legend.values(), legend, loc="outside lower center", ncols=columns, frameon=False
            )
        figure.set_size_inches(6.4 * len(shown), height)
        save(figure, path)
    return list(pictures)


def on_axes(panel: Panel, axes: Axes | None) -> Axes:
    """Draws a panel on axes, new ones if there are none, with a legend where there is a choice."""
    if len(panel.curves) > MAX_CURVES:
        raise ValueError(f"these are {len(panel.curves)} lines; choose at most {MAX_CURVES}.")
    axes = new_axes() if axes is None else axes
    legend = draw_panel(axes, panel)
    if len(legend) > 1 or any(legend):
        axes.legend(legend.values(), legend, frameon=False)
    return axes


def draw_panel(axes: Axes, panel: Panel) -> dict[str, Line2D]:
    """Draws the lines of a panel; returns them by label."""
    tidy(axes)
    lines = {}
    for place, curve in panel.curves:
        color = COLORS[place % len(COLORS)]
        style = _STYLES[place // _PER_STYLE]
        values = np.where(np.isfinite(curve.values), curve.values, np.nan)
        mean, num_seeds = values.mean(0), len(values)
        label = curve.label
        if num_seeds > 1:
            label = f"{label} ({SPREAD} of {num_seeds} seeds)".strip()
            spread = values.std(0, ddof=1)
            axes.fill_between(
                curve.x, mean - spread, mean + spread, color=color, alpha=0.18, linewidth=0
            )
        (lines[label],) = axes.plot(
            curve.x, mean, style, color=color, linewidth=2, marker="o" if mean.size == 1 else ""
        )
        broken = np.flatnonzero(np.isnan(mean))
        if broken.size:
            last = max(broken[0] - 1, 0)
            end, text = (curve.x[last], np.nan_to_num(mean[last])), f"NaN from {curve.x[broken[0]]}"
            axes.plot(*end, "X", color=color, markersize=9, clip_on=False)
            _write(axes, text, end, (0, 9), color)
        elif len(panel.curves) == 1 and panel.name != CLIENTS:
            _write(axes, f"{mean[-1]:#.3g}", (curve.x[-1], mean[-1]), (6, 0), color)
    _set_axes(axes, panel)
    return lines


def _write(
    axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], color: str
) -> None:
    axes.annotate(
        text,
        at,
        xytext=offset,
        textcoords="offset points",
        va="bottom" if offset[1] else "center",
        color=color,
        fontweight="bold",
    )


def _set_axes(axes: Axes, panel: Panel) -> None:
    axes.set(ylabel=panel.ylabel)
    if panel.name == CLIENTS:
        axes.set(xlabel="clients, from the worst to the best", xlim=(0, 100))
        axes.xaxis.set_major_formatter(PercentFormatter())
    else:
        last = max(curve.x[-1] for _, curve in panel.curves)
        label = {"wall_clock": "simulated seconds"}.get(panel.xlabel, panel.xlabel)
        axes.set(xlabel=label, xlim=(-0.02 * last, 1.02 * last) if last else (-1, 1))
        whole = panel.xlabel == "round"
        axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=whole))
    values = np.concatenate([curve.values.ravel() for _, curve in panel.curves])
    values = values[np.isfinite(values)]
    if better(panel.metric) == "max" and ((values >= 0) & (values <= 1)).all():  # A share.
        axes.set_ylim(0, 1.02)
        return
    if not values.size or values.min() < 0:
        return
    first = max(curve.values[:, 0].max() for _, curve in panel.curves)
    # A run that diverges would press all the others flat.
    if better(panel.metric) == "min" and values.min() > 0 and values.max() > 100 * first:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
