"""Checkpoints that are read: the newest one that is not damaged, the same in all processes."""

import contextlib
import dataclasses
import errno
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from fedjax_lite._extras import require
from fedjax_lite.algorithms.versions import count_versions, with_versions
from fedjax_lite.base import PyTree
from fedjax_lite.runs.identity import DifferentRunError, Identity, digest
from fedjax_lite.xla import hosts

T = TypeVar("T")


class Restored(NamedTuple):
    """A checkpoint: the number of rounds done, the arrays, and what is recorded beside them."""

    round: int
    arrays: PyTree
    record: dict[str, Any]


def read_newest(
    manager: Any,
    folder: Path,
    arrays_like: Callable[[Identity], PyTree],
    on_damage: Callable[[int, str], None],
) -> Restored | None:
    """The newest checkpoint that can be read; `None` if there has never been one.

    Args:
      manager: Orbax's.
      folder: Where they are.
      arrays_like: From the identity of the run that is saved there, what to restore to; it raises
        `DifferentRunError`.
      on_damage: What to do about the checkpoint of a round, and what is wrong with it.

    Raises:
      ValueError: The checkpoint is of another run, or all checkpoints are damaged.
    """
    rounds = sorted(manager.all_steps(), reverse=True)
    for round in rounds:
        try:
            with quiet_about_what_is_left():
                return read(manager, folder, round, arrays_like)
        except DifferentRunError as error:
            raise ValueError(str(error)) from None
        except Exception as error:  # Of many kinds, depending on what is damaged.
            if not _is_damage(error):
                raise
            on_damage(round, str(error).partition("\n")[0][:200] or type(error).__name__)
    if rounds or any(folder.glob("damaged-*")):
        raise ValueError(
            f"{folder} holds no checkpoint that can be read, only damaged ones; restore them from"
            " a backup, or choose another folder to begin anew."
        )
    return None


def read(
    manager: Any, folder: Path, round: int, arrays_like: Callable[[Identity], PyTree]
) -> Restored:
    """The checkpoint of a round; see `read_newest`."""
    args = require("orbax.checkpoint", "run").args

    def restored_here() -> tuple[Restored, int]:
        record: Any = {}
        if (folder / str(round) / "record").is_dir():
            found = manager.restore(round, args=args.Composite(record=args.JsonRestore()))
            record = found["record"]
        if not {"identity", "digest"} <= record.keys():
            raise DifferentRunError(
                f"{folder / str(round)} was not written by fl.train; choose another folder."
            )
        arrays = arrays_like(record["identity"])
        like = {"arrays": _as_saved(arrays, record["identity"])}
        restored = manager.restore(round, args=args.Composite(arrays=args.StandardRestore(like)))
        number = count_versions(arrays["state"])
        return Restored(round, restored["arrays"]["arrays"], record), number

    restored, num_versions = _agreed(restored_here)
    arrays = restored.arrays
    if hosts.anywhere(digest(arrays) != restored.record["digest"]):
        raise ValueError("its arrays do not have the SHA-256 that they were saved with")
    return restored._replace(
        arrays={**arrays, "state": with_versions(arrays["state"], num_versions)}
    )


def _as_saved(like: dict[str, PyTree], identity: Identity) -> dict[str, PyTree]:
    """Arrays like these with as many past versions of the params as a checkpoint has."""
    state = like["state"]
    number = identity.get("program versions", 1)
    if number == count_versions(state):
        return like
    versions = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=state.round.sharding),
        jax.eval_shape(lambda: with_versions(state, number).versions),
    )
    return {**like, "state": dataclasses.replace(state, versions=versions)}


def _agreed(read: Callable[[], T]) -> T:
    """What all processes have read; a damage that one of them finds is one for all."""
    restored, error, is_damage = None, None, False
    try:
        restored = read()
    except Exception as raised:  # Of many kinds, depending on what is damaged.
        error, is_damage = raised, _is_damage(raised)
    if others := hosts.anywhere(error is not None and not is_damage):
        if error is not None and not is_damage:
            raise error
        raise hosts.OtherProcessError(f"process {others[0]} could not read a checkpoint")
    damaged = hosts.anywhere(is_damage)
    if error is not None:
        raise error
    if restored is None or damaged:
        raise ValueError(f"processes {damaged} cannot read it")
    return restored


# Of the messages of orbax and TensorStore, which know errors of the system by these words.
_NO_ROOM = ("No space left on device", "Disk quota exceeded")
_NO_DAMAGE = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "Too many open files")


def _is_damage(error: Exception) -> bool:
    """Whether a checkpoint that could not be read would not be read another time either."""
    known = isinstance(error, (MemoryError, PermissionError, hosts.OtherProcessError))
    return not known and not any(words in str(error) for words in _NO_DAMAGE)


@contextlib.contextmanager
def quiet_about_what_is_left() -> Iterator[None]:
    """Keeps Python from printing what becomes of it.

    When one array cannot be read or written, orbax leaves others behind, which come back to an
    event loop that is closed: now, or any time later.
    """
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    sys.unraisablehook = hook
    yield
    sys.unraisablehook = usual  # Not after an error.


@contextlib.contextmanager
def errors_of_orbax(folder: Path) -> Iterator[None]:
    """Keeps orbax from logging what it raises, or was asked for; names a full disk as one."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        told = next((words for words in _NO_ROOM if words in str(error)), None)
        if told and not isinstance(error, OSError):
            raise OSError(errno.ENOSPC, told, str(folder)) from None
        raise
    finally:
        logger.setLevel(level)
