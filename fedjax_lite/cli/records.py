"""The folder of a run: a new one, and what is written to it."""

import contextlib
import datetime
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from fedjax_lite._files import locked, write_text
from fedjax_lite.cli.errors import UsageError


def new_folder(name: str) -> Path:
    """A new folder under runs/, which no other process takes as well.

    Raises:
      UsageError: It cannot be made.
    """
    stem = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{name}"
    for place in itertools.count(1):
        path = Path("runs", stem if place == 1 else f"{stem}-{place}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise cannot_write(path, error) from None
        return path
    raise AssertionError


@contextlib.contextmanager
def open_folder(out: Path, config: dict[str, Any]) -> Iterator[TextIO]:
    """Makes the folder, keeps other processes out, writes `config.json`; yields `metrics.jsonl`.

    Raises:
      UsageError: The folder cannot be written, or holds a run that can be resumed.
    """
    if (out / "checkpoints").exists():
        raise UsageError(f"--out {out} holds a run; choose another folder")
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out / ".lock"))
            write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
            file = stack.enter_context((out / "metrics.jsonl").open("w"))
        except OSError as error:
            raise cannot_write(out, error) from None
        yield file


def cannot_write(out: Path, error: OSError) -> UsageError:
    """What to tell a user whose folder cannot be written."""
    if error.strerror is None:  # That it is locked.
        return UsageError(str(error).rstrip("."))
    return UsageError(f"--out {out} cannot be written: {error.strerror}; choose another folder")
