"""Folders of runs: what was recorded in them, and which runs are one setting with many seeds."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedjax_lite.cli.errors import UsageError
from fedjax_lite.experiments.expressions import flattened
from fedjax_lite.experiments.settings import Settings

# What `train` records beside the settings of an experiment.
RULES = ("target", "patience", "max_seconds", "ema_decay")
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
      UsageError: The folder is none of a run, or a file of it is damaged.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise UsageError(f"{folder} holds no metrics.jsonl; choose the folder of a run")
    settings = read_settings(folder)
    rows = _read_rows(folder / "metrics.jsonl")
    clients: dict[str, Any] = {}
    with contextlib.suppress(UsageError):
        clients = read_object(folder / "clients.json")
    return Run(
        folder=folder,
        settings={name: settings[name] for name in settings if name not in _NOT_SETTINGS},
        seed=settings.get("seed"),
        rounds={row["round"]: row for row in rows if row.get("kind") == "round"},
        # The rows of the quickstart have no kind: they are evaluations.
        evaluations={row["round"]: row for row in rows if row.get("kind") in (None, "evaluation")},
        clients=clients,
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """What a run was recorded with.

    Raises:
      UsageError: The folder is none of a run, or its `config.json` is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} holds no config.json; choose the folder of a run")
    config = read_object(path)
    settings = config.get("config", config)
    if not isinstance(settings, dict):
        raise UsageError(f"{path} is damaged: its config holds no settings; restore the file")
    return settings


def settings_of_training(folder: Path) -> dict[str, Any]:
    """What a run that `fedjax-lite train` or `baseline` made was recorded with.

    Raises:
      UsageError: It was recorded from Python, or its `config.json` is damaged.
    """
    settings = read_settings(folder)
    known = {field.name for field in dataclasses.fields(Settings)}
    unknown = [name for name in settings if name not in {*known, *RULES, "baseline", "note"}]
    if unknown:
        raise UsageError(
            f"{folder} was recorded with {', '.join(unknown)}, no setting of a command; in Python,"
            " the same call of fl.train goes on with it, and fl.load_state reads its state"
        )
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


def _brief(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
      UsageError: It is damaged.
    """
    try:
        value = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {error}; restore the file") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} is no JSON object; choose the folder of a run")
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
            raise UsageError(f"{path}, line {i} is no row of metrics; restore the file") from None
    return rows
