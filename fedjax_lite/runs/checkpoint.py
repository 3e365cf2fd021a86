"""Checkpoints of runs: written while rounds go on, all or nothing, and checked when read."""

import contextlib
import dataclasses
import errno
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite._extras import require
from fedjax_lite._files import locked
from fedjax_lite.algorithms.versions import count_versions, with_versions
from fedjax_lite.base import PyTree, ServerState
from fedjax_lite.runs.identity import DifferentRunError, Identity, compare, digest, forms
from fedjax_lite.runs.ledger import trained, without_extras
from fedjax_lite.xla import hosts

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where `fl.train` saves a run, and how often.

    Needs orbax-checkpoint. A checkpoint holds the state, what is averaged, the best state and the
    history. It is written in the background, and appears at once and complete. Of several
    processes, each writes what its devices alone have, to a folder that all share.

    Attributes:
      folder: The folder, made if it is missing; one for each run.
      every: Rounds between checkpoints. There is one at the end, too.
      keep: How many of the newest ones to keep.
      settings: What else tells this run from others, in types that JSON has, such as its learning
        rates. A checkpoint with other settings is refused, and those that differ are named.

    Raises:
      ValueError: `every` or `keep` is below 1.
    """

    folder: str | Path
    every: int = 50
    keep: int = 3
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _validate.integer("every", self.every, minimum=1)
        _validate.integer("keep", self.keep, minimum=1)


class Restored(NamedTuple):
    """A checkpoint: the number of rounds done, the arrays, and what is recorded beside them."""

    round: int
    arrays: PyTree
    record: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one run; a context, at whose end the last one is on disk.

    Until then, no other process can write there.

    Args:
      checkpoints: Where, and how many.
      identity: What the run is, which is saved with each.

    Raises:
      BlockingIOError: Another process writes there.
    """

    def __init__(self, checkpoints: Checkpoints, identity: Identity) -> None:
        self._ocp: Any = require("orbax.checkpoint", "run")
        managers: Any = require("orbax.checkpoint.checkpoint_managers", "run")
        self._folder = Path(checkpoints.folder).absolute()
        self.keep = checkpoints.keep
        # As it comes back from a file: a tuple is a list there.
        self._identity: Identity = json.loads(json.dumps(identity))
        options = self._ocp.CheckpointManagerOptions(
            preservation_policy=managers.LatestN(checkpoints.keep), cleanup_tmp_directories=True
        )
        with contextlib.ExitStack() as stack:
            hosts.all_or_none(lambda: self._lock(stack))
            hosts.all_or_none(self._check_shared)
            stack.enter_context(_quiet_about_what_is_left())
            stack.enter_context(_errors_of_orbax(self._folder))
            self._manager = self._ocp.CheckpointManager(self._folder, options=options)
            stack.callback(self._manager.close)
            self._opened = stack.pop_all()

    def _lock(self, stack: contextlib.ExitStack) -> None:
        if hosts.is_first():
            self._folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(self._folder / ".lock"))

    def _check_shared(self) -> None:
        if not self._folder.is_dir():
            raise ValueError(
                f"{self._folder} is made by process 0, and missing in process"
                f" {jax.process_index()}; choose a folder that all hosts share."
            )

    def __enter__(self) -> "CheckpointFolder":
        return self

    def __exit__(self, *exception: Any) -> None:
        if jax.process_count() > 1 and isinstance(exception[1], jax.errors.JaxRuntimeError):
            self._opened.pop_all()  # It would wait for a process that is lost.
            return
        self._opened.__exit__(*exception)

    def save(self, round: int, arrays: PyTree, record: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint, once the one before it is written.

        Args:
          round: The number of rounds done.
          arrays: Pytree of arrays, of which a copy is saved.
          record: What to save beside them, in types that JSON has.

        Raises:
          OSError: The one before it could not be written.
        """
        # Rounds that follow reuse the memory of these arrays.
        arrays = jax.tree.map(jnp.copy, arrays)
        args = self._ocp.args
        with _errors_of_orbax(self._folder):
            self._manager.save(
                round,
                args=args.Composite(
                    arrays=args.StandardSave({"arrays": arrays}),
                    record=args.JsonSave(
                        {**record, "identity": self._identity, "digest": digest(arrays)}
                    ),
                ),
            )

    def restore(self, like: PyTree) -> Restored | None:
        """The newest checkpoint that can be read; `None` if there has never been one.

        One that is damaged is renamed, with a warning.

        Args:
          like: Pytree of arrays of the shapes, dtypes and shardings to restore to.

        Raises:
          ValueError: The checkpoint is of another run, or all checkpoints are damaged.
        """

        def arrays_like(identity: Identity) -> PyTree:
            compare(self._identity, identity, self._folder)
            return like

        def put_aside(round: int, reason: str) -> None:
            if not hosts.is_first():
                return
            aside = self._folder / f"damaged-{round}-{len(list(self._folder.glob('damaged-*')))}"
            warnings.warn(
                f"the checkpoint of round {round} in {self._folder} is damaged and now called"
                f" {aside.name} ({reason}); trying the one before it.",
                stacklevel=8,
            )
            (self._folder / str(round)).rename(aside)

        restored = hosts.all_or_none(
            lambda: _read_newest(self._manager, self._folder, arrays_like, put_aside)
        )
        self._manager.reload()
        return restored

    def others(self, like: PyTree) -> Iterator[PyTree]:
        """The arrays of all checkpoints but the newest, as far as they can be read."""
        for round in sorted(self._manager.all_steps())[:-1]:
            with contextlib.suppress(Exception):  # Of many kinds, as when the newest is read.
                yield _read(self._manager, self._folder, round, lambda identity: like).arrays


def load_state(
    folder: str | Path, like: ServerState, *, averaged: bool = False, best: bool = False
) -> ServerState:
    """Reads a state of a run from its checkpoints, and writes nothing.

    Args:
      folder: The folder of `fl.Checkpoints`; of a run of the command line, its `checkpoints`.
      like: A state of the same algorithm and model, such as `algorithm.init(key)`, of the shapes,
        dtypes and shardings to restore to; its values do not matter.
      averaged: Take the moving average of params and model state, of a run with `ema_decay`.
      best: Take the state at the best evaluation, of a run with `best`, in place of the last one.
        It has no optimizer state and no store.

    Returns:
      The state, after the round that it holds.

    Raises:
      ValueError: The folder holds no checkpoint that can be read, or of a run without what is asked
        for, or of another algorithm or model, whose arrays that differ are named.

    >>> import tempfile, jax, optax, fedjax_lite as fl
    >>> algorithm = fl.fed_sgd(fl.models.halfspace_classifier(), optax.adam(0.3))
    >>> folder = tempfile.mkdtemp()
    >>> result = fl.train(
    ...     algorithm,
    ...     fl.data.halfspace(),
    ...     fl.samplers.uniform(100, 5),
    ...     num_rounds=3,
    ...     key=jax.random.key(0),
    ...     checkpoints=fl.Checkpoints(folder),
    ... )
    >>> state = load_state(folder, algorithm.init(jax.random.key(1)))
    >>> int(state.round), bool((state.params["weight"] == result.state.params["weight"]).all())
    (3, True)
    """
    _validate.instance("like", like, ServerState, "algorithm.init(key)")
    arrays = read_checkpoint(folder, like).arrays
    for name, asked in (("averaged", averaged), ("best", best)):
        if asked and arrays[name] is None:
            setting = "ema_decay" if name == "averaged" else name
            raise ValueError(
                f"{name} is True, and the run in {folder} was made without {setting}; leave it out."
            )
    if best:
        return arrays["best"]
    return dataclasses.replace(arrays["state"], **(arrays["averaged"] if averaged else {}))


def read_checkpoint(folder: str | Path, like: ServerState) -> Restored:
    """The newest checkpoint that can be read, of which nothing is written or renamed.

    Args:
      folder: The folder of the checkpoints.
      like: See `load_state`.

    Returns:
      The checkpoint, whose arrays are `state`, `averaged` and `best`; what the run has not is
      `None`.

    Raises:
      ValueError: See `load_state`.
    """
    ocp: Any = require("orbax.checkpoint", "run")
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise ValueError(f"folder is {folder}, which is none; choose a folder of checkpoints.")
    form = forms(like)

    def arrays_like(identity: Identity) -> PyTree:
        saved = {name: value for name, value in identity.items() if name.startswith("state")}
        compare(form, saved, folder)
        return {
            "state": like,
            "averaged": trained(like) if identity["settings['ema_decay']"] is not None else None,
            "best": without_extras(like) if identity["settings['best']"] is not None else None,
        }

    def tell(round: int, reason: str) -> None:
        warnings.warn(
            f"the checkpoint of round {round} in {folder} is damaged ({reason}); reading the one"
            " before it.",
            stacklevel=5,
        )

    # The others follow from the first one; left out, a warning tells so.
    options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    with _errors_of_orbax(folder), ocp.CheckpointManager(folder, options=options) as manager:
        restored = _read_newest(manager, folder, arrays_like, tell)
    if restored is None:
        raise ValueError(f"folder is {folder}, which holds no checkpoint; choose that of a run.")
    return restored


def _read_newest(
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
            with _quiet_about_what_is_left():
                return _read(manager, folder, round, arrays_like)
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


def _read(
    manager: Any, folder: Path, round: int, arrays_like: Callable[[Identity], PyTree]
) -> Restored:
    args = require("orbax.checkpoint", "run").args

    def read() -> tuple[Restored, int]:
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

    restored, num_versions = _agreed(read)
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
def _quiet_about_what_is_left() -> Iterator[None]:
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
def _errors_of_orbax(folder: Path) -> Iterator[None]:
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
