"""The folder of a run: a new one, and what is written to it."""

import contextlib
import datetime
import errno
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from fedjax_lite._files import locked, write_text
from fedjax_lite.cli.errors import UsageError, usage_errors
from fedjax_lite.runs.reading import read_object


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


@contextlib.contextmanager
def kept_folder(out: Path, about: dict[str, Any], what: str) -> Iterator[None]:
    """Makes the folder, or goes on with one that holds a part of the same; keeps others out.

    Args:
      out: The folder.
      about: What its `config.json` has to hold, if it is there already.
      what: What that is, for the error.

    Raises:
      UsageError: The folder cannot be written, or holds something else.
    """
    with contextlib.ExitStack() as stack:
        try:
            _check_same(out, about, what)
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out / ".lock"))
        except OSError as error:
            raise cannot_write(out, error) from None
        yield


def _check_same(out: Path, about: dict[str, Any], what: str) -> None:
    """Refuses a folder that holds anything but a part of the same; see `kept_folder`.

    Raises:
      FileExistsError: It holds something else.
      UsageError: It holds another one.
    """
    if not out.exists() or (out.is_dir() and {path.name for path in out.iterdir()} <= {".lock"}):
        return
    if not (out / "config.json").exists() or (out / "metrics.jsonl").exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    with usage_errors():
        kept = read_object(out / "config.json")
    if _set(kept) != _set(json.loads(json.dumps(about))):
        raise UsageError(f"--out {out} holds {what} of other settings; choose another folder")


def _set(about: dict[str, Any]) -> dict[str, Any]:
    """What is set: a setting that is null may be younger than the folder."""
    return {
        name: _set(value) if isinstance(value, dict) else value
        for name, value in about.items()
        if value is not None
    }


def cannot_write(out: Path, error: OSError) -> UsageError:
    """What to tell a user whose folder cannot be written."""
    if error.strerror is None:  # That it is locked.
        return UsageError(str(error).rstrip("."))
    return UsageError(f"--out {out} cannot be written: {error.strerror}; choose another folder")
