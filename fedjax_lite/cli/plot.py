"""`fedjax-lite plot`: the curves of one run, or of several to compare."""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fedjax_lite.cli.errors import UsageError, usage_errors
from fedjax_lite.cli.runs import read_run
from fedjax_lite.runs.main_metric import numbers_in
from fedjax_lite.runs.plot.lines import MAX_CURVES, draw
from fedjax_lite.runs.plot.of_runs import panels, title
from fedjax_lite.runs.reading import Run, group_seeds, name_groups


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draw the metrics of runs, and how the one that they are judged by is spread over clients.

    Runs that differ in their seeds alone are drawn as one line, their mean, in a band of one
    standard deviation to either side.

    Attributes:
      runs: Folders of runs.
      out: Folder for loss.png, accuracy.png and so on, and clients.png, which are replaced; or one
        file, such as comparison.png or .pdf, for all of them side by side. By default, of one run,
        a file of its name in the current folder.
      metric: The only metric to draw, beside the loss, and of clients. By default all are, and of
        clients the one that the runs are judged by, which is accuracy if they have it.
      against: What is on the other axis of metrics: round, or another number of the rounds, such as
        wall_clock, the simulated seconds, seconds or bytes_up.
      labels: Names of the lines, in the order of the runs; by default, the settings in which they
        differ.
    """

    runs: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="DIR [DIR ...]", help_behavior_hint="")
    ]
    out: Path | None = None
    metric: str | None = None
    against: str = "round"
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
    out = options.out or _default_file(options.runs[0])
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
    with usage_errors():
        shown = panels(groups, labels, options.against, options.metric)
    try:
        files = draw(out, shown, title(groups))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--out {out} cannot be written: {reason}") from None
    for line in left_out(runs, dict.fromkeys(panel.metric for panel in shown)):
        print(f"fedjax-lite: {line}", file=sys.stderr)
    print("\n".join(map(str, files)))


def _default_file(run: Path) -> Path:
    """Where the picture of a run goes: never into its folder."""
    file = Path(f"{run.resolve().name}.png")
    if file.resolve().parent == run.resolve():
        raise UsageError("--out is missing, and the current folder is that of the run; choose one")
    return file


def left_out(runs: Sequence[Run], metrics: Iterable[str]) -> list[str]:
    """Which pictures, of which metrics, lack a run that another one is in, and why."""
    told = []
    for run in runs:
        held = numbers_in(run.evaluations.values())
        missing = " and ".join(metric for metric in metrics if metric not in held)
        if missing and any(other.evaluations for other in runs):
            told.append(f"{run.folder} is left out of {missing}: it holds no evaluation of them")
        if not run.clients and any(other.clients for other in runs):
            damaged = (run.folder / "clients.json").exists()
            why = "cannot be read" if damaged else "is missing, which train writes at its end"
            told.append(f"{run.folder} is left out of clients: clients.json {why}")
    return told
