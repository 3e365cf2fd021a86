"""Numbers on their way from the device, and the history that they become."""

import collections
import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lite.base import PyTree, RoundInfo, ServerState
from fedjax_lite.runs.stopping import History, Row, best_row
from fedjax_lite.xla.mesh import copied

# Rounds that the device may have before it while the host reads the numbers of earlier ones; more
# would bring virtual CPU devices to a standstill (see cpu.py).
_ROUNDS_AHEAD = 2
_MOST_NAMED = 5  # Clients in a warning, so that it stays a line or two.


class NonFiniteWarning(UserWarning):
    """The first round of a run whose loss, or one of whose clients, was not finite."""


class Ledger:
    """The history of a run, whose rows are made when their numbers have come from the device."""

    def __init__(
        self,
        on_round: Callable[[Row, RoundInfo], None] | None,
        on_eval: Callable[[Row], None] | None,
        on_resume: Callable[[History], None] | None,
        best: str | None,
        best_mode: str,
        name_clients: Callable[[int], list[Any]],
    ) -> None:
        self._name_clients, self._has_warned = name_clients, False
        self.history = History([], [])
        self.best, self._best_mode = best, best_mode
        self.best_state: ServerState | None = None
        self._on_round, self._on_eval, self._on_resume = on_round, on_eval, on_resume
        self.show: Callable[[Row, bool], None] | None = None
        """Is given each row, and whether it is of an evaluation, to show how far the run is."""
        self._pending: collections.deque[Callable[[], None]] = collections.deque()
        self._began = time.perf_counter()

    def resume(self, history: History, best_state: ServerState | None) -> None:
        """Goes on with the history of a checkpoint."""
        self.history, self.best_state = history, best_state
        self._began -= history.seconds
        if self._on_resume is not None:
            self._on_resume(history)

    def add_round(self, round: int, info: RoundInfo, selected: Mapping[str, jax.Array]) -> None:
        metrics = numbers_of(info, selected)
        self._add(metrics, functools.partial(self._record_round, round, info))
        self.settle(_ROUNDS_AHEAD)

    def add_evaluation(self, round: int, metrics: Mapping[str, Any], state: ServerState) -> None:
        if not isinstance(metrics, Mapping):
            raise TypeError(
                f"evaluate returned {type(metrics).__name__}; return a dict of numbers by name,"
                " such as what fl.evaluate returns."
            )
        kept = None
        if self.best is not None:
            kept = copied(without_extras(state))
        self._add(flatten(metrics), functools.partial(self._record_evaluation, round, kept))

    def settle(self, ahead: int = 0) -> None:
        """Waits for all that was added but the last few."""
        while len(self._pending) > ahead:
            self._pending.popleft()()

    def _add(self, metrics: dict[str, Any], record: Callable[[Row], None]) -> None:
        jax.tree.map(lambda x: x.copy_to_host_async(), metrics)

        def arrive() -> None:
            numbers = {name: x.tolist() for name, x in jax.device_get(metrics).items()}
            record({"seconds": time.perf_counter() - self._began, **numbers})

        self._pending.append(arrive)

    def _record_round(self, round: int, info: RoundInfo, numbers: Row) -> None:
        row = with_clock({"round": round, **numbers}, self.history.rounds)
        self.history.rounds.append(row)
        if not self._has_warned and "loss" in info.clients and not row["skipped"]:
            self._has_warned = self._warn(row, info)
        if self._on_round is not None:
            self._on_round(row, info)
        if self.show is not None:
            self.show(row, False)

    def _warn(self, row: Row, info: RoundInfo) -> bool:
        """Warns of a round that is not finite, if it is not."""
        if math.isfinite(row["loss"]) and not row["num_nonfinite"]:
            return False
        of_clients = jax.device_get((info.clients["nonfinite"], info.clients["loss"]))
        slots = np.flatnonzero(of_clients[0] | ~np.isfinite(of_clients[1]))
        names = self._name_clients(row["round"])
        told = ", ".join(str(names[slot]) for slot in slots[:_MOST_NAMED])
        more = f" and {slots.size - _MOST_NAMED} more" if slots.size > _MOST_NAMED else ""
        warnings.warn(
            f"round {row['round']} is not finite: the loss is {row['loss']:g}, and"
            f" {row['num_nonfinite']} of {row['num_clients']} clients sent what is not finite;"
            f" look at the data, the labels and what is kept of client {told}{more}, or lower the"
            " learning rates (later rounds are not warned of; info.num_nonfinite counts them).",
            NonFiniteWarning,
            stacklevel=2,
        )
        return True

    def _record_evaluation(self, round: int, state: ServerState | None, numbers: Row) -> None:
        row = {"round": round, **numbers}
        self.history.evaluations.append(row)
        if self.best is not None and best_row(self.history, self.best, self._best_mode) is row:
            self.best_state = state
        if self._on_eval is not None:
            self._on_eval(row)
        if self.show is not None:
            self.show(row, True)


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, jax.Array]:
    """Metrics of dicts in dicts by one name, such as `clients/accuracy/mean`."""
    flat: dict[str, jax.Array] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = jnp.asarray(value)
    return flat


def trained(state: ServerState) -> dict[str, PyTree]:
    """What is sent to clients, and averaged over rounds."""
    return {"params": state.params, "model_state": state.model_state}


def without_extras(state: ServerState) -> ServerState:
    """What is worth keeping of the best state."""
    return dataclasses.replace(
        state, opt_state=(), store=(), pipeline_state=(), pipeline_store=(), versions=()
    )


def with_clock(row: Row, before: Sequence[Row]) -> Row:
    """The row of a round with the simulated clock, if the sampler tells how long rounds take."""
    if "round_seconds" not in row:
        return row
    begun = before[-1]["wall_clock"] if before else 0.0
    return {**row, "wall_clock": begun + row["round_seconds"]}


def numbers_of(info: RoundInfo, selected: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What a row of `History.rounds` is made of."""
    numbers = {**vars(info), **info.metrics, **selected}
    del numbers["clients"], numbers["metrics"]
    for way in ("down", "up"):
        numbers[f"bytes_{way}"] = jnp.ceil(info.clients[f"bits_{way}"].sum() / 8)
    return numbers
