"""What there is to draw of recorded runs."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fedjax_lite.runs.plot.lines import PERCENT, Curve, Panel
from fedjax_lite.runs.reading import Run, along, flattened, number


def panels(
    groups: Sequence[Sequence[Run]], labels: Sequence[str], against: str = "round"
) -> list[Panel]:
    """What there is to draw, over the rounds or another number of theirs.

    Raises:
      ValueError: There is nothing, or rounds have no such number.
    """
    evaluated = any(run.evaluations for group in groups for run in group)
    where = "on held-out examples" if evaluated else "of training"

    def develop(name: str) -> Callable[[Sequence[Run]], tuple[np.ndarray, np.ndarray] | None]:
        def line(group: Sequence[Run]) -> tuple[np.ndarray, np.ndarray] | None:
            rows = [run.evaluations if evaluated else run.rounds for run in group]
            rows = [of_run for of_run in rows if of_run]
            if not rows:
                return None
            # Rounds that one of the seeds lacks (it was killed) would make the mean jump.
            common = [r for r in sorted(rows[0]) if all(r in of_run for of_run in rows)]
            if not any(name in row for of_run in rows for row in of_run.values()) or not common:
                return None
            values = [[number(of_run[r].get(name)) for r in common] for of_run in rows]
            if against == "round":
                return np.array(common), np.array(values)
            x = np.mean([along(run.rounds, common, against) for run in group], 0)
            return x, np.array(values)

        return line

    def spread(group: Sequence[Run]) -> tuple[np.ndarray, np.ndarray] | None:
        known = [np.array([number(x) for x in run.clients.get("accuracy", ())]) for run in group]
        known = [values[np.isfinite(values)] for values in known]
        known = [values for values in known if values.size]
        if not known:
            return None
        return PERCENT, np.array([np.percentile(values, PERCENT) for values in known])

    found = []
    for name, ylabel, take in (
        ("loss", f"loss {where}", develop("loss")),
        ("accuracy", f"accuracy {where}", develop("accuracy")),
        ("clients", "accuracy on a client's examples", spread),
    ):
        lines = [(place, take(group)) for place, group in enumerate(groups)]
        curves = [(place, Curve(labels[place], *line)) for place, line in lines if line]
        if curves:
            found.append(Panel(name, ylabel, curves, against))
    if not found:
        raise ValueError(f"{groups[0][0].folder} holds no loss and no accuracy so far")
    return found


def title(groups: Sequence[Sequence[Run]]) -> str:
    """What all runs have in common, of the settings by which a run is known."""
    shared: list[str] = []
    for name in ("dataset", "algorithm", "note"):
        settings = (run.settings.get(name, "") for group in groups for run in group)
        values = {_brief(name, str(value)) for value in settings}
        shared += values if len(values) == 1 else []
    return ", ".join(filter(None, shared))


def _brief(name: str, value: str) -> str:
    """The function that an expression calls, or the file that it reads."""
    flat = flattened(name, value)
    return Path(str(flat.get(f"{name}.path", flat.get(name, "")))).name
