"""What a run ends with, and what it is interrupted with."""

import signal
from typing import NamedTuple

import jax

from fedjax_lite._repr import record
from fedjax_lite.base import ServerState
from fedjax_lite.privacy.accounting import Ledger
from fedjax_lite.runs.stopping import History


class TrainResult(NamedTuple):
    """What a run ends with.

    Attributes:
      state: State after the last round.
      averaged: The same with the moving average of params and model state; `None` without
        `ema_decay`.
      best: State at the best evaluation, with empty store and optimizer state; `None` without
        `best`.
      history: Everything recorded.
      stopped: Why the run ended before `num_rounds`; `None` if it did not.
      compile_s: Seconds until the first round was compiled.
      run_s: Seconds of the rest.
      client_updates_per_s: Clients trained in this process per second of `run_s`.
      examples_per_s: Examples processed in this process per second of `run_s`.
      privacy: What has been spent, and between which populations; `None` without `privacy`.
    """

    state: ServerState
    averaged: ServerState | None
    best: ServerState | None
    history: History
    stopped: str | None
    compile_s: float
    run_s: float
    client_updates_per_s: float
    examples_per_s: float
    privacy: Ledger | None = None

    def __repr__(self) -> str:
        last = {name: rows[-1] for name, rows in self.history._asdict().items() if rows}
        told = {
            "parameters": sum(x.size for x in jax.tree.leaves(self.state.params)),
            "rounds": len(self.history.rounds),
            "loss": last["rounds"]["loss"] if "rounds" in last else None,
            "last_evaluation": last.get("evaluations"),
            "stopped": self.stopped,
            "compile_s": round(self.compile_s, 2),
            "run_s": round(self.run_s, 2),
        }
        return record(self, told)


class InterruptedTraining(KeyboardInterrupt):
    """A signal ended what was running: Ctrl-C, SIGTERM or SIGHUP.

    Attributes:
      result: What `fl.train` had come to, with the round that was in progress; `None` where
        something else was running.
      signal: Which signal it was.
    """

    def __init__(
        self,
        message: str,
        signal: signal.Signals = signal.SIGINT,
        result: TrainResult | None = None,
    ) -> None:
        super().__init__(message)
        self.signal, self.result = signal, result
