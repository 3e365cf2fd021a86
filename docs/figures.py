"""Draws the figure of `rounds.md`: `python docs/figures.py` writes images/round.svg."""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "fedjax_lite"  # The same file each time.

COLORS = ("#0072B2", "#56B4E9", "#009E73")
STEPS = [11, 10, 10, 9, 8, 8, 7, 6, 6, 5, 4, 3]  # Of twelve clients, the longest first.
LANES, DEVICES = 3, 2
SUM = 2.2  # Where the sum over devices begins, after the longest device.


def draw() -> None:
    """Writes the picture."""
    figure, rows = plt.subplots(DEVICES, 1, figsize=(8.0, 4.2), sharex=True, layout="constrained")
    # Dealt there and back, as rounds do, so that devices have as much to do.
    dealt = np.array(STEPS).reshape(-1, DEVICES)
    dealt[1::2] = dealt[1::2, ::-1]
    ends = [sum(own[i : i + LANES].max() for i in range(0, len(own), LANES)) for own in dealt.T]
    for device, (axes, own) in enumerate(zip(rows, dealt.T, strict=True)):
        start = 0
        for wave, i in enumerate(range(0, len(own), LANES)):
            clients = own[i : i + LANES]
            for lane, steps in enumerate(clients):
                axes.barh(lane, steps, left=start, height=0.72, color=COLORS[wave], linewidth=0)
                for step in range(1, steps):
                    axes.vlines(start + step, lane - 0.36, lane + 0.36, color="white", linewidth=1)
                padding = clients.max() - steps
                axes.barh(
                    *(lane, padding, 0.72, start + steps),
                    color="none",
                    edgecolor="#8a919c",
                    hatch="////",
                    linewidth=0.6,
                )
            axes.text(start + 0.1, LANES - 0.35, f"wave {wave + 1}", color=COLORS[wave])
            start += clients.max()
        axes.axvline(max(ends) + 0.4, color="#20242c", linewidth=1.2)
        axes.set_yticks(range(LANES), [f"lane {lane + 1}" for lane in range(LANES)])
        axes.set_ylabel(f"device {device + 1}")
        axes.set(ylim=(-0.6, LANES - 0.1), xlim=(0, max(ends) + SUM))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.text(max(ends) + 0.7, 1, "sum", va="center")
    rows[-1].set_xticks(range(0, max(ends) + 1, 2))
    rows[-1].set_xlabel("local steps; hatched, those that are masked")
    figure.savefig(Path(__file__).parent / "images" / "round.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw()
