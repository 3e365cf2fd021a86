"""How pictures look, and how they are written."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedjax_lite._files import replacing

# Okabe and Ito (2008), which colour-blind readers can tell apart, with grey for yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A919C")
_GREY = "#8a919c"


def new_axes(size: tuple[float, float] = (6.4, 4.0)) -> Axes:
    """The axes of a new figure, of a size in inches."""
    _, axes = plt.subplots(figsize=size, layout="constrained")
    tidy(axes)
    return axes


def tidy(axes: Axes) -> None:
    """A light grid, and no box around it."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_GREY, alpha=0.25, linewidth=0.8)


def save(picture: Axes | Figure, path: Path) -> None:
    """Writes a picture, in the format of the suffix."""
    figure = picture if isinstance(picture, Figure) else picture.get_figure(root=True)
    assert figure is not None
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150)
    plt.close(figure)
