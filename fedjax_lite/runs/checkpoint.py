"""Checkpoints of runs: written while rounds go on, all or nothing, and checked when read."""

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite._extras import require
from fedjax_lite._files import locked
from fedjax_lite.base import PyTree, ServerState
from fedjax_lite.runs.identity import Identity, compare, digest, forms
from fedjax_lite.runs.ledger import trained, without_extras
from fedjax_lite.runs.restore import (
    Restored,
    errors_of_orbax,
    quiet_about_what_is_left,
    read,
    read_newest,
)
from fedjax_lite.xla import hosts


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
            stack.enter_context(quiet_about_what_is_left())
            stack.enter_context(errors_of_orbax(self._folder))
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
        if hosts.may_be_lost(exception[1]):
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
        with errors_of_orbax(self._folder):
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
            lambda: read_newest(self._manager, self._folder, arrays_like, put_aside)
        )
        self._manager.reload()
        return restored

    def others(self, like: PyTree) -> Iterator[PyTree]:
        """The arrays of all checkpoints but the newest, as far as they can be read."""
        for round in sorted(self._manager.all_steps())[:-1]:
            with contextlib.suppress(Exception):  # Of many kinds, as when the newest is read.
                yield read(self._manager, self._folder, round, lambda identity: like).arrays


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
    with errors_of_orbax(folder), ocp.CheckpointManager(folder, options=options) as manager:
        restored = read_newest(manager, folder, arrays_like, tell)
    if restored is None:
        raise ValueError(f"folder is {folder}, which holds no checkpoint; choose that of a run.")
    return restored
