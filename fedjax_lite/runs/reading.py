"""Folders of runs: what was recorded in them, and which runs are one setting with many seeds."""

import ast
import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedjax_lite._extras import require
from fedjax_lite.runs.stopping import History

if TYPE_CHECKING:
    import pandas

# What may differ between two runs of one setting.
_NOT_SETTINGS = {"seed", "lanes", "out", "json", "device", "versions"}


class Run(NamedTuple):
    """What a run recorded.

    Attributes:
      folder: Where.
      settings: What it was run with, but for the seed.
      seed: The seed, if it is known.
      rounds: Rows of rounds by number of rounds done.
      evaluations: Rows of evaluations by number of rounds done.
      clients: Values per client at the last evaluation by name, if they were recorded, and can be
        read.
    """

    folder: Path
    settings: dict[str, Any]
    seed: int | None
    rounds: dict[int, dict[str, Any]]
    evaluations: dict[int, dict[str, Any]]
    clients: dict[str, list[float]]


def read_run(folder: Path) -> Run:
    """Reads a folder that `train` or `quickstart` wrote, also of a run that goes on or was killed.

    A last line that was cut off is left out. Where a run was resumed, a round may have several
    rows; the last one counts.

    Raises:
      ValueError: The folder is none of a run, or a file of it is damaged.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder} holds no metrics.jsonl; choose the folder of a run")
    settings = read_settings(folder)
    rows = _read_rows(folder / "metrics.jsonl")
    clients: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        clients = read_object(folder / "clients.json")
    return Run(
        folder=folder,
        settings={
            name: value
            for name, value in settings.items()
            if name not in _NOT_SETTINGS and value is not None  # Null is as good as left out.
        },
        seed=settings.get("seed"),
        rounds={row["round"]: row for row in rows if row.get("kind") == "round"},
        # The rows of the quickstart have no kind: they are evaluations.
        evaluations={row["round"]: row for row in rows if row.get("kind") in (None, "evaluation")},
        clients=clients,
    )


def read_folders(folders: str | PathLike[str] | Sequence[str | PathLike[str]]) -> list[Run]:
    """The runs in a folder, or in several, each of a run or of several runs.

    Raises:
      ValueError: A folder holds no run, or a file of one is damaged.
    """
    found: list[Run] = []
    for folder in map(Path, [folders] if isinstance(folders, str | PathLike) else folders):
        inside = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
        if not inside and not (folder / "metrics.jsonl").is_file():
            raise ValueError(
                f"{folder} holds no metrics.jsonl; choose the folder of a run, or of several"
            )
        found += map(read_run, inside or [folder])
    return found


def read_runs(folders: str | PathLike[str] | Sequence[str | PathLike[str]]) -> "pandas.DataFrame":
    """Recorded runs as one pandas DataFrame.

    Args:
      folders: Folders of runs (of `fl.Recorder` or `fedjax-lite train`), or one that holds such
        folders, as that of a sweep does.

    Returns:
      A row for each run and round, and for each evaluation. `run` is the folder's name, `seed` the
      seed, `round` how many rounds were done; what is known of a round has the names of
      `History.rounds`, and what was evaluated after it those of `History.evaluations` after
      `eval_`. What a run was recorded with is under `config.` and the name of the setting, such
      as `config.algorithm`, and of an argument in it, such as `config.algorithm.mu`.

    Raises:
      ValueError: A folder holds no run, or a file of one is damaged.
      ImportError: pandas is missing.
    """
    pandas: Any = require("pandas", "run")
    frames = []
    for run in read_folders(folders):
        history = History(list(run.rounds.values()), list(run.evaluations.values()))
        frame = history.to_pandas().drop(columns=["kind", "eval_kind"], errors="ignore")
        frame.insert(0, "run", run.folder.name)
        frame.insert(1, "seed", run.seed)
        settings = {f"config.{n}": v for n, v in _flat(run.settings).items() if v is not None}
        told = pandas.DataFrame([settings] * len(frame), index=frame.index)
        frames.append(pandas.concat([frame, told], axis=1))
    return pandas.concat(frames, ignore_index=True)


def read_settings(folder: Path) -> dict[str, Any]:
    """What a run was recorded with.

    Raises:
      ValueError: The folder is none of a run, or its `config.json` is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json; choose the folder of a run")
    config = read_object(path)
    settings = config.get("config", config)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: its config holds no settings; restore the file")
    return settings


def group_seeds(runs: Sequence[Run]) -> list[list[Run]]:
    """Puts runs together that differ in their seeds alone, in the order of the first of each."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = json.dumps(run.settings, sort_keys=True)
        alone = run.seed is None or run.seed in (other.seed for other in groups.get(settings, ()))
        groups.setdefault(str(run.folder) if alone else settings, []).append(run)
    return list(groups.values())


def name_groups(groups: Sequence[Sequence[Run]]) -> list[str]:
    """A name for each group: the settings that others have not, or else the folder's name."""
    settings = [_flat(group[0].settings) for group in groups]
    differing = [
        name
        for name in dict.fromkeys(name for one in settings for name in one)
        if any(one.get(name) != settings[0].get(name) for one in settings)
    ]
    names = [
        ", ".join(f"{name} {_brief(one[name])}" for name in differing if one.get(name) is not None)
        for one in settings
    ]
    if len(set(names)) == len(names) and all(0 < len(name) <= 60 for name in names):
        return names
    return [group[0].folder.resolve().name for group in groups]


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by name, with the arguments of expressions by names of their own."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flattened(name, value) if isinstance(value, str) else {name: value}
    return flat


def number(value: Any) -> float:
    """A value of a row; what is no number, or missing, is NaN."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def along(rows: Mapping[int, Mapping[str, Any]], rounds: Sequence[int], name: str) -> np.ndarray:
    """A number of some rounds, of rows by round; before the first one, it is 0.

    Raises:
      ValueError: A row lacks it.
    """
    values = [0.0 if r == 0 else number(rows.get(r, {}).get(name)) for r in rounds]
    if np.isnan(values).any():
        known = sorted({key for row in rows.values() for key in row})
        told = "; a sampler has a clock by fl.samplers.timed" if name == "wall_clock" else ""
        raise ValueError(f"against is {name!r}; choose one of {', '.join(known)}{told}.")
    return np.array(values)


def _brief(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
      ValueError: It is damaged.
    """
    try:
        value = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; restore the file") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no JSON object; choose the folder of a run")
    return value


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    for i, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, "round": int(row["round"])})
        except (ValueError, KeyError, TypeError):
            if i == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{path}, line {i} is no row of metrics; restore the file") from None
    return rows


def flattened(name: str, text: str) -> dict[str, Any]:
    """A setting and the arguments in it by dotted names, by its words alone: nothing is looked up.

    >>> flattened("algorithm", "fed_prox(mu=0.1)")
    {'algorithm': 'fed_prox', 'algorithm.mu': 0.1}
    """
    file, in_file, rest = text.rpartition(".py:")
    try:
        body = ast.parse(rest, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {name: text}
    flat = dict(_flat_nodes(name, body))
    return {**flat, name: f"{file}{in_file}{flat.get(name)}"} if in_file else flat


def _flat_nodes(name: str, node: ast.expr) -> Iterator[tuple[str, Any]]:
    match node:
        case ast.Tuple(elts=elements) if any(isinstance(one, ast.Call) for one in elements):
            for i, element in enumerate(elements):
                yield from _flat_nodes(f"{name}.{i}", element)
        case ast.Call(func=ast.Name(id=function), args=args, keywords=keywords):
            yield name, function
            for i, arg in enumerate(args):
                yield from _flat_nodes(f"{name}.{i}", arg)
            for keyword in keywords:
                yield from _flat_nodes(f"{name}.{keyword.arg}", keyword.value)
        case ast.Constant(value=value):
            yield name, value
        case _:
            yield name, ast.unparse(node)
