"""A run in progress: its state, its history, and where both are saved."""

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from fedjax_lite.base import PyTree, ServerState
from fedjax_lite.engine.file_store import with_stores
from fedjax_lite.privacy.accounting import Ledger as PrivacyLedger
from fedjax_lite.runs.checkpoint import CheckpointFolder
from fedjax_lite.runs.entries import Courier
from fedjax_lite.runs.interrupts import interrupted_by
from fedjax_lite.runs.ledger import Ledger, without_extras
from fedjax_lite.runs.result import InterruptedTraining, TrainResult
from fedjax_lite.runs.step import Carry, Keys
from fedjax_lite.runs.stopping import History, Row, StopRule


class _WithoutEvaluations(History):
    """The history of a run that is never evaluated, for rules that would wait for ever."""

    @property
    def evaluations(self) -> list[Row]:
        raise ValueError(
            "stop has a rule that reads the evaluations of the run, and evaluate is None, so that"
            " it would never stop; pass evaluate=."
        )


@dataclasses.dataclass
class Run:
    """A run in progress."""

    carry: Carry
    courier: Courier
    step: jax.stages.Wrapped
    keys: Keys
    evaluation: Callable[[ServerState], Mapping[str, Any]] | None
    ledger: Ledger
    done: int
    spent: PrivacyLedger | None = None
    folder: CheckpointFolder | None = None
    evaluated_at: int = -1
    saved_at: int = -1
    num_before: int = 0
    began: float = 0.0
    compiled: float | None = None

    def play(
        self,
        sources: Iterator[Any],
        num_rounds: int,
        *,
        eval_every: int,
        save_every: int | None,
        stop: Sequence[StopRule],
    ) -> TrainResult:
        """All rounds that are left, up to where a rule stops them.

        Args:
          sources: Of each round, the population or its cohort.
          num_rounds: Rounds of the whole run.
          eval_every: Rounds between evaluations.
          save_every: Rounds between checkpoints, if there are any.
          stop: Rules that end the run.

        Raises:
          InterruptedTraining: A signal came; the round in progress has been finished and saved.
        """
        self.num_before = len(self.ledger.history.rounds)
        self.began = time.perf_counter()
        while True:
            if self.done % eval_every == 0:
                self._evaluate()
                if stop:
                    self.ledger.settle()
            history = self.ledger.history
            seen = history if self.evaluation is not None else _WithoutEvaluations(*history)
            stopped = next(filter(None, (rule(self.done, seen) for rule in stop)), None)
            if stopped or self.done >= num_rounds:
                self._evaluate()
                self._save()
                return self._result(stopped)
            if came := self.ledger.interrupted_by():
                self._save()
                message = self._interrupted_message(came)
                raise InterruptedTraining(message, came, self._result(message.partition(";")[0]))
            if save_every is not None and self.done % save_every == 0:
                self._save()
            self._advance(next(sources))

    def equipped(self, source: Any) -> Any:
        """The source of the next round, whose clients' entries are fetched if they lie in files."""
        if not self.courier:
            return source
        cohort, selected = source
        state, cohort = self.courier.fetch(self.carry.state, cohort)
        self.carry = self.carry._replace(state=state)
        return cohort, selected

    def _advance(self, source: Any) -> None:
        """One more round."""
        source = self.equipped(source)
        if self.compiled is None:
            # Ahead of the call, which on a CPU may run the round before it returns.
            self.step.lower(self.carry, self.keys, source).compile()
            self.compiled = time.perf_counter()
        self.carry, info, selected = self.step(self.carry, self.keys, source)
        if self.courier:
            self.courier.bring(self.carry.state, source[0])
        self.done += 1
        self.ledger.add_round(self.done, info, selected)

    def state(self) -> ServerState:
        """The state after the last round."""
        return with_stores(self.carry.state, self.courier.arrive())

    def evaluated_state(self) -> ServerState:
        """The state that evaluations are of."""
        state, averaged = self.state(), self.carry.averaged
        return state if averaged is None else dataclasses.replace(state, **averaged)

    def _evaluate(self) -> None:
        """An evaluation, unless there is one of this round."""
        if self.evaluation is not None and self.evaluated_at < self.done:
            self.evaluated_at = self.done
            state = self.evaluated_state()
            self.ledger.add_evaluation(self.done, self.evaluation(state), state)

    def _save(self) -> None:
        """A checkpoint, unless there is one of this round."""
        if self.folder is None or self.saved_at == self.done:
            return
        self.saved_at = self.done
        self.ledger.settle()
        record = {
            # Copies: they are written while rows are added.
            "rounds": list(self.ledger.history.rounds),
            "evaluations": list(self.ledger.history.evaluations),
        }
        arrays = self._arrays()
        self.courier.seal(self.folder.keep)
        self.folder.save(self.done, arrays, record)

    def restore(self) -> None:
        """Goes back to the newest checkpoint, if there is one."""
        if self.folder is None:
            return
        restored = self.folder.restore(self._arrays())
        if restored is None:
            return
        state = restored.arrays["state"]
        self.carry = Carry(state, restored.arrays["averaged"])
        self.courier = Courier(state)
        if self.courier:
            others = [arrays["state"] for arrays in self.folder.others(restored.arrays)]
            self.courier.reclaim([state, *others])
        history = History(restored.record["rounds"], restored.record["evaluations"])
        self.ledger.resume(history, restored.arrays["best"])
        self.done = self.saved_at = restored.round
        self.evaluated_at = max((row["round"] for row in history.evaluations), default=-1)

    def _arrays(self) -> dict[str, PyTree]:
        best = self.ledger.best_state
        if self.ledger.best is not None and best is None:
            best = without_extras(self.carry.state)
        return {"state": self.state(), "averaged": self.carry.averaged, "best": best}

    def _result(self, stopped: str | None) -> TrainResult:
        """What the run has come to."""
        self.ledger.settle()
        jax.block_until_ready(self.carry)
        compiled = self.compiled or self.began
        run_s = time.perf_counter() - compiled
        rows = self.ledger.history.rounds[self.num_before :]
        return TrainResult(
            state=self.state(),
            averaged=None if self.carry.averaged is None else self.evaluated_state(),
            best=self.ledger.best_state,
            history=self.ledger.history,
            stopped=stopped,
            compile_s=compiled - self.began,
            run_s=run_s,
            client_updates_per_s=sum(row["num_clients"] - row["num_empty"] for row in rows) / run_s,
            examples_per_s=sum(row["num_examples"] for row in rows) / run_s,
            privacy=self.spent,
        )

    def _interrupted_message(self, came: signal.Signals) -> str:
        """What to tell a user whose signal ended the run."""
        told = f"{interrupted_by(came)} after round {self.done}"
        return f"{told}; the same call goes on from its checkpoint" if self.folder else told
