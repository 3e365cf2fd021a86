"""Pictures of histories, evaluations, data sets and recorded runs.

Each function draws on matplotlib axes and returns them, in a notebook or for a file:
`fl.plot.curves(result.history).get_figure().savefig("curves.pdf")`. Needs matplotlib (the `run`
extra), which is imported when something is drawn.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from fedjax_lite import _validate
from fedjax_lite._extras import require
from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.evaluation.clients import ClientEvaluation
from fedjax_lite.runs import reading
from fedjax_lite.runs.result import TrainResult
from fedjax_lite.runs.stopping import History, Row
from fedjax_lite.samplers import Sampler

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fedjax_lite.runs.plot.lines import Curve

__all__ = ["clients", "curves", "partition", "runs", "timeline"]


def __dir__() -> list[str]:
    return __all__


_OneRun = History | TrainResult
_Runs = _OneRun | Sequence[_OneRun] | Mapping[str, _OneRun | Sequence[_OneRun]]
_Evaluations = ClientEvaluation | Mapping[str, ClientEvaluation]


def curves(
    histories: _Runs,
    metric: str = "accuracy",
    *,
    against: str = "round",
    axes: "Axes | None" = None,
) -> "Axes":
    """How a metric develops over the rounds, or over time.

    Args:
      histories: The history of a run, or what `fl.train` returned; a list of several that differ
        in their seeds alone (`fl.sweep(...).histories`), drawn as their mean in a band of one
        standard deviation to either side; or a dict of these by the name of the line.
      metric: Name of a metric of the evaluations or, if these have none of the name, of the rounds.
      against: What is on the other axis: another number of the rounds, such as `"wall_clock"`, the
        simulated seconds, or `"seconds"`; of several runs, its mean.
      axes: Where to draw; new ones by default.

    Returns:
      The axes.

    Raises:
      ValueError: No run has such a metric, or `against`, or there are none.
      ImportError: matplotlib is missing.

    >>> history = History([], [{"round": r, "loss": 1 / (1 + r)} for r in range(5)])
    >>> curves({"fed_avg": [history, history]}, "loss").get_ylabel()
    'loss'
    """
    lines: list[tuple[int, Curve]] = []
    drawing = _drawing()
    named = histories if isinstance(histories, Mapping) else {"": histories}
    for place, (name, of_line) in enumerate(named.items()):
        runs = [of_line] if isinstance(of_line, History | TrainResult) else list(of_line)
        _require_some("histories", runs)
        rows = [_rows(run, metric) for run in runs]
        # Rounds that one of the seeds lacks would make the mean jump.
        common = [r for r in sorted(rows[0]) if all(r in of_run for of_run in rows)]
        values = [[reading.number(of_run[r][metric]) for r in common] for of_run in rows]
        x = np.mean([_at(run, common, against) for run in runs], 0)
        lines.append((place, drawing.Curve(name, x, np.array(values))))
    _require_some("histories", lines)
    return drawing.on_axes(drawing.Panel(metric, metric, lines, against), axes)


def _at(run: _OneRun, rounds: Sequence[int], against: str) -> np.ndarray:
    """Another number of the rounds of a run; before the first, it is 0."""
    if against == "round":
        return np.array(rounds)
    history = run.history if isinstance(run, TrainResult) else run
    return reading.along({row["round"]: row for row in history.rounds}, rounds, against)


def _rows(run: Any, metric: str) -> dict[int, Row]:
    """The rows that have a metric, by the number of rounds done."""
    history = run.history if isinstance(run, TrainResult) else run
    _validate.instance("histories", history, History, "result.history")
    for rows in (history.evaluations, history.rounds):
        if found := {row["round"]: row for row in rows if metric in row}:
            return found
    known = sorted({name for rows in history for row in rows for name in row})
    raise ValueError(f"metric is {metric!r}; choose one of {', '.join(known)}.")


def clients(
    evaluations: _Evaluations, metric: str = "accuracy", *, axes: "Axes | None" = None
) -> "Axes":
    """How a metric is spread over clients, from the worst to the best.

    Args:
      evaluations: What `fl.evaluate_clients` returned, or a dict of such by the name of the line.
      metric: Name of one of its metrics, one number per client. Clients without examples, whose
        value is NaN, are left out.
      axes: Where to draw; new ones by default.

    Returns:
      The axes.

    Raises:
      ValueError: There is no such metric, or no client has examples.
      ImportError: matplotlib is missing.
    """
    drawing = _drawing()
    named = evaluations if isinstance(evaluations, Mapping) else {"": evaluations}
    lines = []
    for place, (name, evaluation) in enumerate(named.items()):
        _validate.instance("evaluations", evaluation, ClientEvaluation, "fl.evaluate_clients(...)")
        _validate.choice("metric", metric, list(evaluation.clients))
        values = np.asarray(evaluation.clients[metric])
        values = values[np.isfinite(values)]
        _require_some("evaluations", values.tolist())
        lines.append((place, drawing.over_clients(name, metric, [values])))
    _require_some("evaluations", lines)
    ylabel = f"{metric} on a client's examples"
    panel = drawing.Panel(metric, ylabel, lines, drawing.CLIENTS)
    return drawing.on_axes(panel, axes)


def partition(dataset: FederatedDataset, label: str = "y", *, axes: "Axes | None" = None) -> "Axes":
    """Which clients have how many examples of which classes.

    Args:
      dataset: The data set. Up to 40 clients are stacked bars; more are columns of a heat map of
        shares, sorted by their most frequent class.
      label: The feature with the class of each example.
      axes: Where to draw; by default a new figure, in which a heat map has the numbers of examples
        above it.

    Returns:
      The axes.

    Raises:
      ValueError: There is no such feature, or it is no class.
      ImportError: matplotlib is missing.
    """
    _validate.instance("dataset", dataset, FederatedDataset)
    require("matplotlib", "run")
    from fedjax_lite.runs.plot import classes

    names, counts = classes.count_classes(dataset, label)
    title = f"{dataset.num_clients:,} clients, {counts.sum():,} examples"
    return classes.class_distribution(
        counts, names, dataset.client_ids, label=label, title=title, axes=axes
    )


def timeline(
    sampler: Sampler, num_rounds: int | None = None, *, axes: "Axes | None" = None
) -> "Axes":
    """Who trains when, and which version of the params they hold.

    A bar for each training that the server took, and a line for each of its steps.

    Args:
      sampler: One with a schedule, such as `fl.samplers.fed_buff(...)`.
      num_rounds: How many steps of the server to draw; the first 20 by default.
      axes: Where to draw; new ones by default.

    Returns:
      The axes.

    Raises:
      ValueError: `sampler` has no schedule, or fewer rounds.
      ImportError: matplotlib is missing.
    """
    require("matplotlib", "run")
    from fedjax_lite.runs.plot.schedule import timeline

    if sampler.schedule is None or sampler.num_rounds is None:
        raise ValueError("sampler has no schedule; pass one such as fl.samplers.fed_buff(...).")
    num_rounds = min(20, sampler.num_rounds) if num_rounds is None else num_rounds
    _validate.integer("num_rounds", num_rounds, minimum=1, maximum=sampler.num_rounds)
    return timeline(sampler.schedule, num_rounds, axes)


def runs(
    folders: str | PathLike[str] | Sequence[str | PathLike[str]],
    metric: str | None = None,
    *,
    labels: Sequence[str] | None = None,
    axes: "Axes | None" = None,
) -> "Axes":
    """Recorded runs, as `fedjax-lite plot` draws them.

    Runs that differ in their seeds alone are one line, their mean, in a band of one standard
    deviation to either side.

    Args:
      folders: Folders of runs (of `fl.Recorder` or `fedjax-lite train`), or one that holds such
        folders, as that of a sweep does.
      metric: Name of a metric of the evaluations; or "clients", for how it is spread over clients.
        By default the one that the runs are judged by: accuracy, if they have it.
      labels: Names of the lines; by default, the settings in which they differ.
      axes: Where to draw; new ones by default.

    Returns:
      The axes.

    Raises:
      ValueError: A folder is none of a run, or there is nothing to draw.
      ImportError: matplotlib is missing.
    """
    drawing = _drawing()
    from fedjax_lite.runs.plot.of_runs import judged_by, panels, title

    groups = reading.group_seeds(reading.read_folders(folders))
    names = reading.name_groups(groups) if labels is None else list(labels)
    if len(names) != len(groups):
        raise ValueError(f"labels has {len(names)} names for {len(groups)} lines; give each one.")
    by_name = {panel.name: panel for panel in panels(groups, names)}
    metric = judged_by(groups) if metric is None else metric
    _validate.choice("metric", metric, list(by_name))
    drawn = drawing.on_axes(by_name[metric], axes)
    drawn.set_title(title(groups))
    return drawn


def _drawing() -> Any:
    """What draws lines; it imports matplotlib."""
    require("matplotlib", "run")
    from fedjax_lite.runs.plot import lines

    return lines


def _require_some(name: str, values: Sequence[Any]) -> None:
    if not values:
        raise ValueError(f"{name} has nothing to draw; pass at least one with values.")
