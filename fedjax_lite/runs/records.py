"""Records of a run in a folder: configuration, numbers, and what it was run on."""

import contextlib
import csv
import importlib
import json
import math
import shutil
import subprocess
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from fedjax_lite._extras import require
from fedjax_lite._files import locked, replacing, write_text
from fedjax_lite.base import RoundInfo
from fedjax_lite.runs.stopping import History, Row
from fedjax_lite.xla import hosts

_PACKAGES = ("fedjax_lite", "jax", "jaxlib", "flax", "optax", "numpy")


class Recorder:
    """Writes the rows that `fl.train` reports to a folder, as they come.

    | file            | what it holds                                                         |
    |-----------------|-----------------------------------------------------------------------|
    | `config.json`   | the configuration, versions of packages, devices, git revision        |
    | `metrics.jsonl` | a JSON object per line: `kind` ("round" or "evaluation"), and the row |
    | `metrics.csv`   | the same as a table, written at the end                               |

    What JSON has no number for, such as NaN, is null there. A folder of a run that goes on keeps
    its rows; a round that was run twice has two, of which the last one counts. A row is in the file
    when the method that it was given to returns, and the other files are replaced all or nothing.

    Of several processes (`jax.distributed`), the first one writes.

    A context, whose methods `on_round`, `on_eval` and `on_resume` are callbacks of `fl.train`.
    Until its end, no other process can record in the folder.

    Args:
      folder: The folder, made if it is missing.
      config: What it takes to repeat the run, in types that JSON has.
      tensorboard: Write the scalars for TensorBoard, too, at each evaluation; needs tensorboardX.

    Raises:
      OSError: The folder cannot be written, or another process records there.
      ImportError: tensorboardX is missing.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with Recorder(folder, {"rate": 0.1}) as recorder:
    ...     recorder.on_eval({"round": 0, "loss": 1.5})
    >>> print((Path(folder) / "metrics.jsonl").read_text().strip())
    {"kind": "evaluation", "round": 0, "loss": 1.5}
    """

    def __init__(
        self, folder: str | Path, config: Mapping[str, Any], *, tensorboard: bool = False
    ) -> None:
        self._folder = Path(folder)
        self._rows: list[Row] = []
        self._events: Any = None
        self._about: str | None = None
        self._is_first = hosts.is_first()
        if not self._is_first:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        about = {"config": jsonable(dict(config)), **machine(), "git": git_revision()}
        self._about = json.dumps(about, indent=2) + "\n"
        path = self._folder / "metrics.jsonl"
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self._folder / ".lock"))
            if not (self._folder / "config.json").exists():
                self._write_config()
            self._rows = _mended_rows(path) if path.exists() else []
            self._file = stack.enter_context(path.open("a"))
            if tensorboard:
                writer = require("tensorboardX", "run").SummaryWriter
                self._events = stack.enter_context(writer(str(self._folder)))
            self._opened = stack.pop_all()

    def on_round(self, row: Row, info: RoundInfo | None = None) -> None:
        """Writes a row of `History.rounds`."""
        del info
        self._write("round", row)

    def on_eval(self, row: Row) -> None:
        """Writes a row of `History.evaluations`."""
        self._write("evaluation", row)
        if self._events is not None:
            self._events.flush()

    def on_resume(self, history: History) -> None:
        """Writes the rows of a checkpoint that are missing."""
        self._write_config()
        known = {(row["kind"], row["round"]) for row in self._rows}
        for kind, rows in (("round", history.rounds), ("evaluation", history.evaluations)):
            for row in rows:
                if (kind, row["round"]) not in known:
                    self._write(kind, row)

    def _write_config(self) -> None:
        """Writes `config.json`. That of a run that goes on stays until it is known that it does."""
        if self._about is not None:
            write_text(self._folder / "config.json", self._about)
            self._about = None

    def _write(self, kind: str, row: Row) -> None:
        if not self._is_first:
            return
        self._write_config()
        row = jsonable({"kind": kind, **row})
        self._rows.append(row)
        print(json.dumps(row), file=self._file, flush=True)
        if self._events is not None:
            for name, value in row.items():
                if name != "kind" and isinstance(value, (int, float)):
                    self._events.add_scalar(f"{kind}/{name}", value, row["round"])

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._is_first:
            return
        if not any(exception):
            self._write_config()
        last = {(row["round"], row["kind"] == "evaluation"): row for row in self._rows}
        columns = dict.fromkeys(name for row in last.values() for name in row)
        path = self._folder / "metrics.csv"
        with self._opened, replacing(path) as partial, partial.open("w", newline="") as file:
            table = csv.DictWriter(file, list(columns))
            table.writeheader()
            table.writerows(last[place] for place in sorted(last))


def _mended_rows(path: Path) -> list[Row]:
    """The rows of a file, from which lines that are none are taken.

    That is the last one, cut off when a process was killed or a disk was full. If there are others,
    the file as it was is kept beside.
    """
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    rows = [(line, _row(line)) for line in lines]
    good = [(line, row) for line, row in rows if row is not None]
    if len(good) < len(rows):
        if any(row is None for _, row in rows[:-1]) or lines[-1].endswith("\n"):
            place = len(list(path.parent.glob("damaged-metrics-*")))
            aside = path.with_name(f"damaged-metrics-{place}.jsonl")
            shutil.copy(path, aside)
            number = next(i for i, (_, row) in enumerate(rows, 1) if row is None)
            warnings.warn(
                f"{path}, line {number} is no row of metrics; the file as it was is kept as"
                f" {aside.name}.",
                stacklevel=3,
            )
        write_text(path, "".join(line for line, _ in good))
    return [row for _, row in good]


def _row(line: str) -> Row | None:
    """The row of a line; `None` if it is none, or cut off."""
    try:
        row = json.loads(line)
        whole = line.endswith("\n") and "kind" in row and isinstance(row["round"], int)
    except (ValueError, KeyError, TypeError):
        return None
    return row if whole else None


def machine() -> dict[str, Any]:
    """What a run depends on beside its settings: `device`, and `versions` of packages."""
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "versions": {name: importlib.import_module(name).__version__ for name in _PACKAGES},
    }


def git_revision() -> str | None:
    """The revision of the working directory, marked if there are changes; None outside of git."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def jsonable(value: Any) -> Any:
    """A value in which numbers that are not finite, which JSON has not, are null."""
    if isinstance(value, dict):
        return {name: jsonable(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
