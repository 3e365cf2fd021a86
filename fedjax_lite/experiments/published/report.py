"""What the runs of a table come to, beside what was published."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

import numpy as np

from fedjax_lite.experiments.published.play import Curve
from fedjax_lite.experiments.published.table import Cell, Measure, Run, Table, command_of

_NONE = "\N{EN DASH}"
Result = dict[str, Any]
"""What is kept of a cell, in JSON; an infinite number is `None`."""


def over(measure: Measure, runs: Sequence[Run], curves: Sequence[Curve]) -> list[bool]:
    """Of each run of a cell, whether it ends: its target is reached, or others are better anyway.

    Runs of one cell go on side by side: what has not reached the target by some round needs at
    least as many.
    """
    if measure.target is None:
        return [False] * len(runs)
    values = [_value(measure, curve) for curve in curves]
    least = [
        max(curve["round"], default=0) if np.isinf(value) else value
        for value, curve in zip(values, curves, strict=True)
    ]
    best = min(_by_chosen(runs, values).values())
    bounds = _by_chosen(runs, least)
    return [
        np.isfinite(value) or bounds[run.chosen] >= best
        for run, value in zip(runs, values, strict=True)
    ]


def summarize(
    table: Table, cell: Cell, runs: Sequence[Run], curves: Sequence[Curve], seconds: float
) -> Result:
    """What is kept of a cell whose runs have ended: all, and the best or worst it is tuned over."""
    values = [_value(table.measure, curve) for curve in curves]
    means = _by_chosen(runs, values)
    sign = -1 if table.measure.target is None else 1
    cost = {i: math.inf if np.isnan(mean) else sign * mean for i, mean in means.items()}
    chosen = (max if table.is_worst else min)(cost, key=lambda i: cost[i])
    own = [value for run, value in zip(runs, values, strict=True) if run.chosen == chosen]
    first = next(run for run in runs if run.chosen == chosen)
    return {
        "row": cell.row,
        "column": cell.column,
        "published": cell.published,
        "published_std": cell.spread,
        "mean": _finite(np.mean(own)),
        "std": _finite(np.std(own, ddof=1)) if len(own) > 1 else None,
        "values": [_finite(value) for value in own],
        "rounds": max(curve["round"][-1] for curve in curves),
        "tuned": dict(cell.tuned[chosen]),
        "command": command_of(first.settings, table.measure),
        "seconds": round(seconds, 3),
        "runs": [
            {"tuned": dict(cell.tuned[run.chosen]), "seed": run.seed, **_jsonable(curve)}
            for run, curve in zip(runs, curves, strict=True)
        ],
    }


def markdown(table: Table, results: Mapping[str, Result], *, quick: bool) -> str:
    """The table in Markdown: ours, and what was published in parentheses.

    Args:
      table: The table.
      results: Those of its cells that there are, by name.
      quick: Whether they are those of the quick variant.
    """
    cells = {cell.name: cell for cell in table.cells_of(quick=quick)}
    rows = list(dict.fromkeys(cell.row for cell in cells.values()))
    columns = list(dict.fromkeys(cell.column for cell in cells.values()))
    lines = [["", *columns], ["---", *["---:"] * len(columns)]]
    for row in rows:
        names = [f"{row} / {column}" for column in columns]
        lines.append([row, *(_entry(table.measure, cells.get(n), results.get(n)) for n in names)])
    body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    num_seeds = table.num_quick_seeds if quick else table.num_seeds
    told = [f"{table.title}: {table.measure.told}, {_seeds(num_seeds)}."]
    if any(cell.published is not None for cell in cells.values()):
        told.append(f"In parentheses: {table.source}.")
    if quick:
        changed = ", ".join(f"{name} {value}" for name, value in table.quick.items())
        told.append(f"Quick variant{f' with {changed}' if changed else ''}.")
    if table.differs:
        told.append(f"Differs from the source: {table.differs}.")
    tuned = [
        f"{name}: {', '.join(f'{key} {value}' for key, value in result['tuned'].items())}"
        for name, result in results.items()
        if name in cells and result["tuned"]
    ]
    if tuned:
        told.append(f"Chosen as the {'worst' if table.is_worst else 'best'}: {'; '.join(tuned)}.")
    return f"{' '.join(told)}\n\n{body}"


def entry(measure: Measure, result: Result) -> str:
    """The number of a cell in words."""
    if result["mean"] is None and measure.target is not None:
        return f"> {result['rounds']}"
    return _number(measure, result["mean"], result["std"])


def _entry(measure: Measure, cell: Cell | None, result: Result | None) -> str:
    if cell is None:
        return ""
    ours = _NONE if result is None else entry(measure, result)
    if cell.published is None:
        return ours
    return f"{ours} ({_number(measure, cell.published, cell.spread)})"


def _number(measure: Measure, number: float | None, spread: float | None) -> str:
    if number is None:
        return "not finite"
    if measure.target is not None:
        factor, digits = 1, 0
    else:
        factor, digits = 100, 1
    deviation = "" if spread is None else f" \N{PLUS-MINUS SIGN} {factor * spread:.{digits}f}"
    return f"{factor * number:.{digits}f}{deviation}"


def _seeds(number: int) -> str:
    if number == 1:
        return "one seed"
    return f"mean \N{PLUS-MINUS SIGN} standard deviation of {number} seeds"


def _value(measure: Measure, curve: Curve) -> float:
    """The number of a run so far."""
    if not curve["round"]:
        return math.inf if measure.target is not None else math.nan
    return measure.value(curve["round"], curve[measure.metric])


def _by_chosen(runs: Sequence[Run], values: Sequence[float]) -> dict[int, float]:
    """The mean over seeds of each of the settings that a cell is tuned over."""
    return {
        chosen: float(np.mean([v for r, v in zip(runs, values, strict=True) if r.chosen == chosen]))
        for chosen in dict.fromkeys(run.chosen for run in runs)
    }


def _finite(value: SupportsFloat) -> float | None:
    return float(value) if np.isfinite(float(value)) else None


def _jsonable(curve: Curve) -> Curve:
    return {name: [x if np.isfinite(x) else None for x in xs] for name, xs in curve.items()}
