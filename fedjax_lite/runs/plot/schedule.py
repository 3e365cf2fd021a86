"""Pictures of who trains when."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from fedjax_lite.runs.plot.style import new_axes
from fedjax_lite.samplers import Schedule

MOST_ROWS = 40  # More clients than that would be thinner than a line.


def timeline(schedule: Schedule, num_rounds: int, axes: Axes | None) -> Axes:
    """A bar for each training, in a row for each client, by colour the version that it holds."""
    clock = schedule.ended[:num_rounds].max(1)
    version = np.arange(num_rounds)[:, None] - schedule.staleness[:num_rounds]
    ids, started, ended, version = (
        x[:num_rounds].ravel()
        for x in (schedule.client_ids, schedule.started, schedule.ended, version)
    )
    clients, rows = np.unique(ids, return_inverse=True)
    shown = rows < MOST_ROWS
    axes = new_axes((8.0, 4.5)) if axes is None else axes
    ends = np.stack([np.stack([started, rows], 1), np.stack([ended, rows], 1)], 1)[shown]
    bars = LineCollection(ends.tolist(), linewidths=4, capstyle="butt")
    bars.set_array(version[shown])
    axes.add_collection(bars)
    for second in clock:
        axes.axvline(second, color="black", alpha=0.35, linewidth=0.8)
    count = min(clients.size, MOST_ROWS)
    of = "" if count == clients.size else f", {count} of {clients.size}"
    axes.set(xlabel="simulated seconds", ylabel=f"client{of}")
    axes.set(xlim=(0, clock[-1] * 1.02 or 1), ylim=(-0.7, count - 0.3))
    axes.set_yticks(range(count), [str(client) for client in clients[:count]], fontsize=7)
    axes.grid(visible=False, axis="y")
    figure = axes.get_figure(root=True)
    assert figure is not None
    label = "round of the params that it starts from"
    figure.colorbar(bars, ax=axes, label=label, ticks=np.unique(version[shown])[:10])
    return axes
