"""A published table as a value: what its cells run, and what was published of them."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from fedjax_lite.experiments.settings import Settings

_DATA = re.compile(r"\bDATA\b")  # In settings, where the folder of the data goes.
_OF_DATA = ("dataset", "test")


class Measure(NamedTuple):
    """What a table tells of a run.

    Attributes:
      metric: A metric of its evaluations: `accuracy` of the server's model on all held-out
        examples; `personal_accuracy` of the model that each client uses on its own, all together;
        `client_accuracy`, the mean over clients of the latter. Where clients have no models for
        themselves, they use the server's.
      target: If given, the table has the number of rounds to this value.
      of: Without a target, which value it has: that after the `last` round, or the `best` one.
    """

    metric: str = "accuracy"
    target: float | None = None
    of: Literal["last", "best"] = "last"

    def value(self, rounds: Sequence[int], values: Sequence[float]) -> float:
        """The number of one run, from its evaluations; infinite for a target never reached."""
        if self.target is not None:
            return rounds_to(self.target, rounds, values)
        return float(values[-1] if self.of == "last" else np.fmax.reduce(values))

    @property
    def told(self) -> str:
        """In words."""
        metric = self.metric.replace("_", " ")
        if self.target is not None:
            return f"rounds to {100 * self.target:g} per cent of {metric}"
        when = "after the last round" if self.of == "last" else "at its best"
        return f"{metric} {when}, per cent"


def rounds_to(target: float, rounds: Sequence[int], values: Sequence[float]) -> float:
    """The round in which the monotone curve crosses a target; infinite if it never does.

    The curve is the best value so far, and straight between evaluations (McMahan et al., 2017).

    >>> rounds_to(0.9, [0, 10, 20, 30], [0.1, 0.8, 0.7, 1.0])
    25.0
    """
    best = np.fmax.accumulate(np.asarray(values, float))
    reached = np.flatnonzero(best >= target)
    if not reached.size:
        return np.inf
    after = int(reached[0])
    if after == 0:
        return float(rounds[0])
    share = (target - best[after - 1]) / (best[after] - best[after - 1])
    return float(rounds[after - 1] + share * (rounds[after] - rounds[after - 1]))


class Cell(NamedTuple):
    """One number of a table.

    Attributes:
      row: The name of its row.
      column: The name of its column.
      settings: Those of `fedjax-lite train` that it has beside those of the table.
      published: The published number, an accuracy within [0, 1] or a number of rounds; `None` if
        there is none.
      spread: The published standard deviation.
      tuned: Settings to choose from, as the source did: ours is the best of them, or the worst, as
        the table says.
      is_quick: Whether it is in the quick variant of the table.
    """

    row: str
    column: str
    settings: Mapping[str, Any]
    published: float | None = None
    spread: float | None = None
    tuned: tuple[Mapping[str, Any], ...] = ({},)
    is_quick: bool = True

    @property
    def name(self) -> str:
        """Row and column."""
        return f"{self.row} / {self.column}"


class Table(NamedTuple):
    """A table of a paper.

    Attributes:
      title: What is compared.
      source: Who published it, and where.
      settings: Those of `fedjax-lite train` that all cells share. In `dataset` and `test`, DATA
        stands for the folder of the data: `mnist(DATA)`.
      cells: Its cells, row by row.
      measure: What its numbers are.
      num_seeds: How many runs each cell has, with the seeds 0, 1, ...
      is_worst: Whether ours is the worst of what a cell is tuned over, such as of attacks, and not
        the best.
      has_splits: Whether the seed of a run is that of its split as well.
      quick: What the quick variant has in place of the settings, such as fewer rounds.
      num_quick_seeds: How many runs each cell of the quick variant has.
      needs: How to get the data; empty if no files are needed.
      differs: What differs from the source.
    """

    title: str
    source: str
    settings: Mapping[str, Any]
    cells: tuple[Cell, ...]
    measure: Measure
    num_seeds: int = 1
    is_worst: bool = False
    has_splits: bool = False
    quick: Mapping[str, Any] = {}
    num_quick_seeds: int = 1
    needs: str = ""
    differs: str = ""

    def cells_of(self, *, quick: bool) -> list[Cell]:
        """All cells, or those of the quick variant."""
        return [cell for cell in self.cells if cell.is_quick or not quick]


class Run(NamedTuple):
    """One of the runs of a cell.

    Attributes:
      chosen: The place of its settings among those that the cell is tuned over.
      seed: Its seed.
      settings: All its settings, by name.
    """

    chosen: int
    seed: int
    settings: dict[str, Any]

    @property
    def of_train(self) -> Settings:
        """Checked, as `fedjax-lite train` takes them."""
        return Settings(**self.settings)


def runs_of(
    table: Table, cell: Cell, data: Path | None = None, *, quick: bool = False
) -> list[Run]:
    """The runs of a cell.

    Args:
      table: The table.
      cell: One of its cells.
      data: The folder of the data; DATA stays where it is without.
      quick: Whether it is that of the quick variant.
    """
    return [
        Run(i, seed, _settings(table, cell, tuned, seed, data, quick))
        for i, tuned in enumerate(cell.tuned)
        for seed in range(table.num_quick_seeds if quick else table.num_seeds)
    ]


def _settings(
    table: Table, cell: Cell, tuned: Mapping[str, Any], seed: int, data: Path | None, quick: bool
) -> dict[str, Any]:
    settings = {**table.settings, **cell.settings, **tuned, **(table.quick if quick else {})}
    settings["seed"] = seed
    if table.has_splits:
        settings["data_seed"] = seed
    for name in _OF_DATA:
        if data is not None and name in settings:
            settings[name] = _DATA.sub(lambda _: repr(str(data)), settings[name])
    return settings


def command_of(settings: Mapping[str, Any], measure: Measure) -> str:
    """What runs a cell by itself.

    >>> command_of({"algorithm": "fed_prox(mu=0.1)", "seed": 0}, Measure(target=0.9))
    'fedjax-lite train --algorithm "fed_prox(mu=0.1)" --target 0.9'
    """
    given = {**settings, "target": measure.target if measure.metric == "accuracy" else None}
    options = [
        f"--{name.replace('_', '-')} {_quoted(str(value))}"
        for name, value in given.items()
        if value is not None and not (name in ("seed", "data_seed") and value == 0)
    ]
    return " ".join(["fedjax-lite train", *options])


def _quoted(text: str) -> str:
    """For a shell; in double quotes where single ones would have to be escaped."""
    quoted = shlex.quote(text)
    return quoted if quoted == text or set(text) & set('"$`\\!') else f'"{text}"'
