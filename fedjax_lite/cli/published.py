"""`fedjax-lite baseline --table`: all cells of a published table, beside what was published."""

import contextlib
import difflib
import fnmatch
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.console

from fedjax_lite._files import write_text
from fedjax_lite.cli.errors import InterruptedRunError, UsageError, usage_errors
from fedjax_lite.cli.records import kept_folder, new_folder
from fedjax_lite.experiments.published import TABLES
from fedjax_lite.experiments.published.play import Curve, Program, play
from fedjax_lite.experiments.published.report import Result, entry, markdown, over, summarize
from fedjax_lite.experiments.published.table import Cell, Run, Table, command_of, runs_of
from fedjax_lite.experiments.varying import group_by_program
from fedjax_lite.runs.plot.of_tables import Point, points
from fedjax_lite.runs.plot.style import save
from fedjax_lite.runs.progress import progress
from fedjax_lite.runs.reading import read_object
from fedjax_lite.runs.records import git_revision, jsonable, machine


def table_of(name: str) -> Table:
    """A table by its name.

    Raises:
      UsageError: There is none of that name.
    """
    if name not in TABLES:
        close = difflib.get_close_matches(name, TABLES, 1)
        meant = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(TABLES)}"
        raise UsageError(f"--table {name} is none of the tables; {meant}")
    return TABLES[name]


def run_table(
    name: str, data: Path | None, out: Path | None, only: str | None, *, quick: bool, as_json: bool
) -> None:
    """Runs what the folder does not hold yet, and writes and prints the table.

    Args:
      name: Of the table.
      data: The folder of its data.
      out: The folder for a file of each cell, table.json, table.md and table.png; a new one by
        default.
      only: A pattern of the names of the cells to run, such as "C 0.1 / *"; all by default.
      quick: Whether it is the quick variant.
      as_json: Print what table.json holds instead of the table.

    Raises:
      UsageError: A name or an option is wrong, the data cannot be read, or the folder cannot be
        written, or holds something else.
      InterruptedRunError: A signal came.
    """
    table = table_of(name)
    if (data is None) != (not table.needs):
        told = f"needs {table.needs}; pass --data FOLDER" if table.needs else "needs no --data"
        raise UsageError(f"--table {name} {told}")
    cells = table.cells_of(quick=quick)
    runs = {cell.name: runs_of(table, cell, data, quick=quick) for cell in cells}
    chosen = _chosen(cells, only)
    about = {
        "table": name,
        "quick": quick,
        "data": data and str(data.resolve()),
        "cells": {
            cell.name: [run.settings for run in runs_of(table, cell, quick=quick)] for cell in cells
        },
    }
    out = out or new_folder(name)
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_folder(out, about, "a table"))
        with usage_errors():
            results = {
                cell.name: read_object(_file(out, cell.name))
                for cell in cells
                if _file(out, cell.name).exists()
            }
        missing = [cell for cell in chosen if cell.name not in results]
        show = stack.enter_context(progress(len(chosen), stderr=as_json, what="cell"))

        def tell(told: str, is_result: bool) -> None:
            show(sum(cell.name in results for cell in chosen), told, is_result)

        try:
            for cell, result in _results(table, missing, runs, tell):
                # Not before there is a result: the data may have been mistyped.
                write_text(out / "config.json", json.dumps(about, indent=2) + "\n")
                _file(out, cell.name).parent.mkdir(exist_ok=True)
                write_text(_file(out, cell.name), json.dumps(result) + "\n")
                results[cell.name] = result
                tell(f"{cell.name}: {entry(table.measure, result)}", True)
        except KeyboardInterrupt as interrupt:
            told = f"interrupted; the same command with --out {out} goes on"
            raise InterruptedRunError(told, interrupt) from None
        results = {cell.name: results[cell.name] for cell in cells if cell.name in results}
        report = _write(out, name, cells, results, quick=quick)
    if as_json:
        print(json.dumps(report))
    else:
        table_text = (out / "table.md").read_text()
        print(f"\n{table_text}\n{report['seconds']:.0f} s of runs; files in {out}")


def _write(
    out: Path, name: str, cells: Sequence[Cell], results: Mapping[str, Result], *, quick: bool
) -> dict[str, Any]:
    """Writes table.json, whose content it returns, table.md and table.png."""
    table = TABLES[name]
    report: dict[str, Any] = jsonable(
        {
            "table": name,
            "out": str(out),
            "title": table.title,
            "source": table.source,
            "measure": table.measure._asdict(),
            "quick": quick,
            "differs": table.differs,
            **machine(),
            "git": git_revision(),
            "seconds": sum(result["seconds"] for result in results.values()),
            "cells": results,
        }
    )
    write_text(out / "table.json", json.dumps(report, indent=2) + "\n")
    write_text(out / "table.md", markdown(table, results, quick=quick))
    _draw(out / "table.png", table, cells, results)
    return report


def list_table(name: str, *, quick: bool, as_json: bool) -> None:
    """Prints the cells of a table, what was published of each, and the command that runs one."""
    table = table_of(name)
    cells = table.cells_of(quick=quick)
    rows: list[dict[str, Any]] = [
        {
            "name": cell.name,
            "published": cell.published,
            "commands": list(
                dict.fromkeys(
                    command_of(run.settings, table.measure)
                    for run in runs_of(table, cell, quick=quick)
                    if run.seed == 0
                )
            ),
        }
        for cell in cells
    ]
    if as_json:
        print(json.dumps(rows))
        return
    console = rich.console.Console(markup=False, highlight=False)
    console.print(f"{table.source}\n{table.title}: {table.measure.told}", soft_wrap=True)
    if table.needs:
        console.print(f"DATA is {table.needs}", soft_wrap=True)
    if table.differs:
        console.print(f"differs from it: {table.differs}", soft_wrap=True)
    console.print(markdown(table, {}, quick=quick).partition("\n\n")[2], soft_wrap=True)
    for row in rows:
        console.print(row["name"], soft_wrap=True)
        for command in row["commands"]:
            console.print(f"  {command}", soft_wrap=True)


def _chosen(cells: Sequence[Cell], only: str | None) -> list[Cell]:
    """The cells that are asked for."""
    found = [cell for cell in cells if only is None or fnmatch.fnmatchcase(cell.name, only)]
    if not found:
        names = [cell.name for cell in cells]
        close = difflib.get_close_matches(str(only), names, 1) or names[:1]
        raise UsageError(f"--only {only} names no cell; did you mean {close[0]}?")
    return found


def _file(out: Path, name: str) -> Path:
    """Where a cell is kept."""
    return out / "cells" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-')}.json"


def _results(
    table: Table,
    cells: Sequence[Cell],
    runs: dict[str, list[Run]],
    tell: Callable[[str, bool], None],
) -> Iterator[tuple[Cell, Result]]:
    """Plays the runs of some cells, and yields each cell when all of its runs have ended."""
    places = [(cell, i) for cell in cells for i in range(len(runs[cell.name]))]
    with usage_errors():
        settings = [runs[cell.name][i].of_train for cell, i in places]
        programs = group_by_program(settings)
    curves: dict[str, list[Curve]] = {
        cell.name: [{"round": []} for _ in runs[cell.name]] for cell in cells
    }
    seconds = dict.fromkeys(curves, 0.0)
    waiting, compiled = list(cells), dict[Any, Program]()
    for program in programs:
        began = time.perf_counter()
        own = [places[place] for place in program]
        names = list(dict.fromkeys(cell.name for cell, _ in own))

        def is_over(found: Sequence[Curve], own: Any = own) -> list[bool]:
            for (cell, i), curve in zip(own, found, strict=True):
                curves[cell.name][i] = curve
            return [over(table.measure, runs[c.name], curves[c.name])[i] for c, i in own]

        def show_round(round: int, curve: Curve, name: str = names[0]) -> None:
            metric = table.measure.metric
            told = f"{metric.replace('_', ' ')} {curve[metric][-1]:.3f}"
            tell(f"{name}  round {round}  {told}", False)

        with usage_errors():
            play(
                [settings[place] for place in program],
                is_personal=table.measure.metric != "accuracy",
                is_over=is_over,
                show=show_round,
                programs=compiled,
            )
        for name in names:  # Those that share a program have shared its time.
            seconds[name] += (time.perf_counter() - began) / len(names)
        ended = [cell for cell in waiting if all(x["round"] for x in curves[cell.name])]
        waiting = [cell for cell in waiting if cell not in ended]
        for cell in ended:
            name = cell.name
            yield cell, summarize(table, cell, runs[name], curves[name], seconds[name])


def _draw(path: Path, table: Table, cells: Sequence[Cell], results: Mapping[str, Result]) -> None:
    measure = table.measure
    factor = 1 if measure.target is not None else 100

    def scaled(value: float | None) -> float | None:
        return None if value is None else factor * value

    found = [
        Point(
            cell.row,
            cell.column,
            [
                math.nan if value is None else factor * value
                for value in results.get(cell.name, {"values": []})["values"]
            ],
            scaled(cell.published),
            scaled(cell.spread),
        )
        for cell in cells
    ]
    save(points(found, measure.told, table.title, is_log=measure.target is not None), path)
