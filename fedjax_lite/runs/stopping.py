"""What a run has recorded, and rules that stop it on what they see there."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fedjax_lite import _validate
from fedjax_lite._extras import require

if TYPE_CHECKING:
    import pandas

__all__ = [
    "History",
    "Row",
    "StopRule",
    "best_row",
    "patience",
    "target",
    "wall_clock",
]


def __dir__() -> list[str]:
    return __all__


Row = dict[str, Any]


class History(NamedTuple):
    """What a run has recorded so far, in numbers and lists of Python.

    Attributes:
      rounds: A row for each round: `round`, counted from 1, `seconds` since the run began, and
        what `RoundInfo` has for the whole cohort, beside `num_dropped`, clients that the sampler
        chose in excess of its capacity, `bytes_down` and `bytes_up`, sent to and by clients, and
        what else the sampler reports; with `round_seconds`, the simulated clock `wall_clock`.
      evaluations: A row for each evaluation: `round`, how many rounds were done, `seconds`, and
        what the evaluation returned.
    """

    rounds: list[Row]
    evaluations: list[Row]

    def __repr__(self) -> str:
        return f"History({len(self.rounds)} rounds, {len(self.evaluations)} evaluations)"

    def to_pandas(self) -> "pandas.DataFrame":
        """All rows as one pandas DataFrame, by round.

        What is known of a round has the names of `rounds`; what was evaluated after it those of
        `evaluations` after `eval_`, and NaN where nothing was.

        >>> history = History([{"round": 1, "loss": 2.0}], [{"round": 0, "loss": 3.0}])
        >>> frame = history.to_pandas()
        >>> frame["round"].tolist(), frame["loss"].tolist(), frame["eval_loss"].tolist()
        ([0, 1], [nan, 2.0], [3.0, nan])
        """
        pandas: Any = require("pandas", "run")
        rounds = pandas.DataFrame(self.rounds or [], columns=None if self.rounds else ["round"])
        evaluations = pandas.DataFrame(
            self.evaluations or [], columns=None if self.evaluations else ["round"]
        )
        renamed = {name: f"eval_{name}" for name in evaluations.columns if name != "round"}
        both = rounds.merge(evaluations.rename(columns=renamed), on="round", how="outer")
        return both.sort_values("round", ignore_index=True)

    @property
    def seconds(self) -> float:
        """Seconds from the start of the run to the last row."""
        return max((row["seconds"] for rows in self for row in rows[-1:]), default=0.0)


StopRule = Callable[[int, History], str | None]
"""`rule(round, history)`: why to stop before the next round, or `None` to go on.

It is called before each round with the number of rounds done. The history has all evaluations up
to then; the rows of the last few rounds may still be on the device. A rule of one's own, such as a
privacy budget that is spent after so many rounds, is a plain function.
"""


def target(metric: str, value: float, *, mode: Literal["max", "min"] = "max") -> StopRule:
    """Stops once an evaluation reaches a value.

    Args:
      metric: Name of a metric of the evaluations.
      value: The value to reach.
      mode: Whether larger values are better (`"max"`), or smaller ones (`"min"`).

    >>> rule = target("accuracy", 0.9)
    >>> rule(10, History([], [{"round": 10, "seconds": 1.0, "accuracy": 0.95}]))
    'accuracy is 0.95, at the target of 0.9'
    """
    _validate.choice("mode", mode, ("max", "min"))

    def rule(round: int, history: History) -> str | None:
        for row in history.evaluations:
            reached = _value(row, metric)
            if reached >= value if mode == "max" else reached <= value:
                return f"{metric} is {reached:g}, at the target of {value:g}"
        return None

    return rule


def patience(metric: str, evaluations: int, *, mode: Literal["max", "min"] = "min") -> StopRule:
    """Stops when a metric has not improved for a number of evaluations in a row.

    Args:
      metric: Name of a metric of the evaluations.
      evaluations: How many without a new best value to wait for.
      mode: Whether larger values are better (`"max"`), or smaller ones (`"min"`).

    Raises:
      ValueError: `evaluations` is below 1.

    >>> rule = patience("loss", 2)
    >>> rows = [{"round": r, "seconds": 0.0, "loss": x} for r, x in enumerate([3.0, 1.0, 2.0, 1.0])]
    >>> rule(4, History([], rows))
    'loss has not improved on 1 for 2 evaluations'
    """
    evaluations = _validate.integer("evaluations", evaluations, minimum=1)

    def rule(round: int, history: History) -> str | None:
        best = best_row(history, metric, mode)
        if best is None:
            return None
        since = sum(row["round"] > best["round"] for row in history.evaluations)
        if since < evaluations:
            return None
        return f"{metric} has not improved on {best[metric]:g} for {evaluations} evaluations"

    _validate.choice("mode", mode, ("max", "min"))
    return rule


def wall_clock(seconds: float) -> StopRule:
    """Stops when the run has taken so long, the time before it was resumed included.

    Args:
      seconds: Seconds since the run began.

    Raises:
      ValueError: `seconds` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds is {seconds}; choose a positive number.")

    def rule(round: int, history: History) -> str | None:
        if history.seconds < seconds:
            return None
        return f"the run has taken {history.seconds:.0f} of {seconds:g} seconds"

    return rule


def best_row(history: History, metric: str, mode: str) -> Row | None:
    """The first evaluation with the best value of a metric; those that are NaN do not count.

    Args:
      history: What is recorded.
      metric: Name of a metric of the evaluations.
      mode: Whether larger values are better (`"max"`), or smaller ones (`"min"`).

    Returns:
      Its row, or `None` if there is none.
    """
    sign = -1 if mode == "max" else 1
    rows = [row for row in history.evaluations if not math.isnan(_value(row, metric))]
    return min(rows, key=lambda row: sign * row[metric], default=None)


def _value(row: Row, metric: str) -> float:
    if metric not in row:
        names = sorted(row.keys() - {"round", "seconds"})
        raise ValueError(f"metric is {metric!r}; evaluations have {', '.join(map(repr, names))}.")
    return float(row[metric])
