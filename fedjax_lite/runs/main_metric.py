"""The metric that runs are judged by, among those that were evaluated."""

from collections.abc import Collection, Iterable
from typing import Any, Literal

from fedjax_lite import _validate
from fedjax_lite.runs.stopping import Row

_BETTER_SMALL = ("loss", "perplexity", "cross_entropy", "error")
# What else there is in the row of an evaluation; the last one, in those of the quickstart.
_NO_METRICS = {"kind", "round", "seconds", "epsilon", "cohort_size"}


def main_metric(names: Collection[str], asked: str | None = None) -> str:
    """The metric that is asked for; else `accuracy`, the first other one by name, or `loss`.

    Args:
      names: Names of the metrics that there are.
      asked: Name of one of them.

    Raises:
      ValueError: There is none of the name that is asked for.

    >>> main_metric({"loss", "mean_squared_error"}), main_metric({"loss"})
    ('mean_squared_error', 'loss')
    """
    if asked is not None:
        _validate.choice("metric", asked, sorted(names))
        return asked
    return min(names, key=lambda name: (name != "accuracy", name == "loss", name))


def in_order(names: Iterable[str], main: str) -> list[str]:
    """The names as they are shown: the loss, the metric that runs are judged by, and the others.

    >>> in_order({"top_k", "accuracy", "loss"}, "top_k")
    ['loss', 'top_k', 'accuracy']
    """
    return sorted(names, key=lambda name: (name != "loss", name != main, name))


def better(metric: str) -> Literal["max", "min"]:
    """Whether larger values of a metric are better or smaller ones, which is told by its name.

    >>> better("accuracy"), better("mean_squared_error")
    ('max', 'min')
    """
    function = metric.partition("(")[0]  # Of two that differ in arguments, they are in the name.
    return "min" if function.endswith(_BETTER_SMALL) else "max"


def by_metric(rows: Collection[Row]) -> dict[str, list[Any]]:
    """The values in all rows of evaluations, by the name of the metric; `None` where it lacks."""
    names = dict.fromkeys(name for row in rows for name in row if name not in _NO_METRICS)
    return {name: [row.get(name) for row in rows] for name in names}


def numbers_in(rows: Collection[Row]) -> set[str]:
    """Names of the metrics of evaluations that are one number each."""
    return {
        name
        for name, values in by_metric(rows).items()
        if not any(isinstance(value, list) for value in values)
    }
