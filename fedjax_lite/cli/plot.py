"""`fedjax-lite plot`: the curves of one run, or of several to compare."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import Positional, arg

from fedjax_lite.cli.curves import MAX_CURVES, Curve, Panel, draw
from fedjax_lite.cli.errors import UsageError
from fedjax_lite.cli.runs import Run, group_seeds, name_groups, number, read_run

_METAVAR = arg(metavar="DIR [DIR ...]", help_behavior_hint="")
_PERCENT = np.arange(101)


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draw loss, accuracy and the spread over clients of runs.

    Runs that differ in their seeds alone are drawn as one line, their mean, in a band of one
    standard deviation to either side.

    Attributes:
      runs: Folders of runs.
      out: Folder for loss.png, accuracy.png and clients.png, which are replaced; or one file,
        such as comparison.png or .pdf, for all of them side by side. By default the folder of
        the run, if it is one.
      labels: Names of the lines, in the order of the runs; by default, the settings in which they
        differ.
    """

    runs: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="DIR [DIR ...]", help_behavior_hint="")
    ]
    out: Path | None = None
    labels: tuple[str, ...] = ()


def plot(options: Plot) -> None:
    """Runs the command.

    Raises:
      UsageError: A folder is none of a run, or the pictures cannot be written.
    """
    if not options.runs:
        raise UsageError("no folder is given; name at least one run")
    if options.out is None and len(options.runs) > 1:
        raise UsageError("--out is missing; choose a folder, or a file, for the comparison")
    out = options.runs[0] if options.out is None else options.out
    runs = [read_run(folder) for folder in options.runs]
    groups = group_seeds(runs)
    labels = list(options.labels) or name_groups(groups)
    if len(labels) != len(groups):
        raise UsageError(
            f"--labels has {len(labels)} names for {len(groups)} lines; name these:"
            f" {'; '.join(name_groups(groups))}"
        )
    if len(groups) > MAX_CURVES:
        raise UsageError(f"these are {len(groups)} lines; choose runs for at most {MAX_CURVES}")
    try:
        files = draw(out, panels(groups, labels), title(groups))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--out {out} cannot be written: {reason}") from None
    for line in left_out(runs):
        print(f"fedjax-lite: {line}", file=sys.stderr)
    print("\n".join(map(str, files)))


def left_out(runs: Sequence[Run]) -> list[str]:
    """Which pictures lack a run that another one is in, and why."""
    told = []
    for run in runs:
        if not run.evaluations and any(other.evaluations for other in runs):
            told.append(f"{run.folder} is left out of loss and accuracy: it holds no evaluation")
        if not run.clients and any(other.clients for other in runs):
            damaged = (run.folder / "clients.json").exists()
            why = "cannot be read" if damaged else "is missing, which train writes at its end"
            told.append(f"{run.folder} is left out of clients: clients.json {why}")
    return told


def panels(groups: Sequence[Sequence[Run]], labels: Sequence[str]) -> list[Panel]:
    """What there is to draw.

    Raises:
      UsageError: There is nothing.
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
            return np.array(common), np.array(values)

        return line

    def spread(group: Sequence[Run]) -> tuple[np.ndarray, np.ndarray] | None:
        known = [np.array([number(x) for x in run.clients.get("accuracy", ())]) for run in group]
        known = [values[np.isfinite(values)] for values in known]
        known = [values for values in known if values.size]
        if not known:
            return None
        return _PERCENT, np.array([np.percentile(values, _PERCENT) for values in known])

    found = []
    for name, ylabel, take in (
        ("loss", f"loss {where}", develop("loss")),
        ("accuracy", f"accuracy {where}", develop("accuracy")),
        ("clients", "accuracy on a client's examples", spread),
    ):
        lines = [(place, take(group)) for place, group in enumerate(groups)]
        curves = [(place, Curve(labels[place], *line)) for place, line in lines if line]
        if curves:
            found.append(Panel(name, ylabel, curves))
    if not found:
        raise UsageError(f"{groups[0][0].folder} holds no loss and no accuracy so far")
    return found


def title(groups: Sequence[Sequence[Run]]) -> str:
    """What all runs have in common, of the settings by which a run is known."""
    shared = []
    for name in ("dataset", "algorithm", "note"):
        values = {str(run.settings.get(name, "")) for group in groups for run in group}
        shared += [Path(value).name for value in values] if len(values) == 1 else []
    return ", ".join(filter(None, shared))
