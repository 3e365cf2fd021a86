"""What there is to draw of recorded runs."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fedjax_lite.runs.main_metric import in_order, main_metric, numbers_in
from fedjax_lite.runs.plot.lines import CLIENTS, Curve, Panel, over_clients
from fedjax_lite.runs.reading import Run, along, flattened, number

# Of the numbers of rounds, those that tell how good a model is.
_OF_TRAINING = {"loss", "accuracy"}


def panels(
    groups: Sequence[Sequence[Run]],
    labels: Sequence[str],
    against: str = "round",
    metric: str | None = None,
) -> list[Panel]:
    """What there is to draw, over the rounds or another number of theirs.

    Args:
      groups: The runs of each line.
      labels: What the legend says of each line.
      against: What is on the other axis of metrics.
      metric: The only one, beside the loss; all by default.

    Raises:
      ValueError: There is nothing, or no such metric, or rounds have no such number.
    """
    names, evaluated = _numbers(groups)
    main = judged_by(groups, metric)
    shown = in_order(names if metric is None else names & {"loss", metric}, main)
    where = "on held-out examples" if evaluated else "of training"

    def develop(name: str) -> Callable[[str, Sequence[Run]], Curve | None]:
        def line(label: str, group: Sequence[Run]) -> Curve | None:
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
                return Curve(label, np.array(common), np.array(values))
            x = np.mean([along(run.rounds, common, against) for run in group], 0)
            return Curve(label, x, np.array(values))

        return line

    def spread(label: str, group: Sequence[Run]) -> Curve | None:
        known = [np.array([number(x) for x in run.clients.get(main, ())]) for run in group]
        known = [values[np.isfinite(values)] for values in known]
        known = [values for values in known if values.size]
        return over_clients(label, main, known) if known else None

    found = []
    for name, ylabel, xlabel, take in (
        *((name, f"{name} {where}", against, develop(name)) for name in shown),
        (main, f"{main} on a client's examples", CLIENTS, spread),
    ):
        lines = [take(*line) for line in zip(labels, groups, strict=True)]
        curves = [(place, line) for place, line in enumerate(lines) if line]
        if curves:
            found.append(Panel(name, ylabel, curves, xlabel))
    return found


def judged_by(groups: Sequence[Sequence[Run]], asked: str | None = None) -> str:
    """The metric that is asked for, or else that which the settings of all runs name, or else ours.

    Raises:
      ValueError: There is none, or not the one that is asked for.
    """
    names, _ = _numbers(groups)
    if not names:
        raise ValueError(f"{groups[0][0].folder} holds no metrics so far")
    recorded = {run.settings.get("metric") for group in groups for run in group}
    if asked is None and len(recorded) == 1 and recorded <= names:
        (asked,) = recorded
    return main_metric(names, asked)


def _numbers(groups: Sequence[Sequence[Run]]) -> tuple[set[str], bool]:
    """The metrics that are one number each, and whether they are those of evaluations."""
    runs = [run for group in groups for run in group]
    if evaluations := [row for run in runs for row in run.evaluations.values()]:
        return numbers_in(evaluations), True
    rounds = [row for run in runs for row in run.rounds.values()]
    return numbers_in(rounds) & _OF_TRAINING, False


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
