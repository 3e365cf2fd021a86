"""The driver: a loop of rounds, with evaluations, records, checkpoints and rules that end it."""

import contextlib
import dataclasses
import functools
import itertools
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lite import _validate
from fedjax_lite._extras import require
from fedjax_lite.base import FederatedAlgorithm, PyTree, RoundInfo, ServerState
from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.data.population import GeneratedPopulation, ResidentPopulation, StreamedPopulation
from fedjax_lite.engine.file_store import with_stores
from fedjax_lite.engine.streaming import prefetch
from fedjax_lite.privacy.accounting import Budget, ledger_of
from fedjax_lite.privacy.accounting import Ledger as PrivacyLedger
from fedjax_lite.runs.checkpoint import CheckpointFolder, Checkpoints
from fedjax_lite.runs.entries import Courier
from fedjax_lite.runs.identity import check_same, identify
from fedjax_lite.runs.initial import on_devices_of
from fedjax_lite.runs.interrupts import first_signal
from fedjax_lite.runs.ledger import Ledger, epsilon_of_rows, trained, without_extras
from fedjax_lite.runs.result import InterruptedTraining, TrainResult
from fedjax_lite.runs.step import Carry, Keys, build_step, check_length, draw
from fedjax_lite.runs.stopping import History, Row, StopRule
from fedjax_lite.samplers import Sampler
from fedjax_lite.xla.memory import memory_errors
from fedjax_lite.xla.mesh import copied, put


def train(
    algorithm: FederatedAlgorithm,
    population: FederatedDataset | ResidentPopulation | GeneratedPopulation | StreamedPopulation,
    sampler: Sampler,
    num_rounds: int,
    *,
    key: jax.Array,
    state: ServerState | None = None,
    evaluate: Callable[[ServerState], Mapping[str, Any]] | None = None,
    eval_every: int = 10,
    on_round: Callable[[Row, RoundInfo], None] | None = None,
    on_eval: Callable[[Row], None] | None = None,
    on_resume: Callable[[History], None] | None = None,
    stop: Sequence[StopRule] = (),
    ema_decay: float | None = None,
    best: str | None = None,
    best_mode: Literal["max", "min"] | None = None,
    checkpoints: Checkpoints | None = None,
    privacy: Budget | None = None,
    progress: bool = False,
) -> TrainResult:
    r"""Runs rounds of an algorithm, and records what happens.

    Up to rounding, this is the loop

        key_init, key_sampler, key_rounds = jax.random.split(key, 3)
        state = algorithm.init(key_init)
        for r in range(num_rounds):
            key_cohort, key_round = jax.random.split(jax.random.fold_in(key_rounds, r))
            ids = sampler.select(key_sampler, r).client_ids
            cohort = fl.cohort_of(population, ids, key=key_cohort)
            state, info = algorithm.round(key_round, state, cohort)

    with one compiled step for all that is inside. The host reads the numbers of a round while the
    device works on the next ones.

    Several processes (`jax.distributed`) that make the same call make one run: each has the same
    result and the same history, with the seconds of the first one's clock, and calls the callbacks;
    a signal that comes to one of them ends all of them after the same round.

    Args:
      algorithm: The algorithm.
      population: A `FederatedDataset`, which is made resident, or `dataset.resident(...)`,
        `dataset.streamed(...)` or a `GeneratedPopulation`.
      sampler: Who takes part, from `fl.samplers`.
      num_rounds: Rounds of the whole run, those before it was resumed included.
      key: Typed key, from which everything random in the run derives.
      state: State to begin with, which is left as it is but for what lies in files (see
        `fl.store_in_file`); drawn by `algorithm.init` by default.
      evaluate: `evaluate(state) -> {name: array}`, such as
        `lambda state: fl.evaluate(model, state, held_out)`; of dicts in dicts, the names are joined
        by `/`. It must not keep the state, whose memory the next round reuses.
      eval_every: Rounds between evaluations. There is one before the first round, and one at the
        end.
      on_round: `on_round(row, info)`, called in order and some rounds later with each row of
        `history.rounds`, and with the `RoundInfo`, whose arrays are still on the device.
      on_eval: `on_eval(row)`, called with each row of `history.evaluations`.
      on_resume: `on_resume(history)`, called with the history of the checkpoint that the run goes
        on from, if there is one.
      stop: Rules that end the run, such as `fl.stopping.patience("loss", 5)`.
      ema_decay: Decay $d$ of a moving average $a \leftarrow d a + (1 - d) w$ of the params (and
        the model state), which starts at the initial ones. Evaluations are then of the average.
      best: Name of a metric of the evaluations; the state with the best value is returned too.
      best_mode: Whether larger values of it are better (`"max"`), or smaller ones (`"min"`); needed
        with `best`.
      checkpoints: Where to save the run. If there is a checkpoint already, the run goes on from
        it, to the same bits as if it had never been interrupted; one that had ended returns its
        result.
      privacy: What is to be accounted for, such as `fl.privacy.budget(delta=1e-6)`: rows of the
        history then have `epsilon`, what all rounds up to there have spent, if the noise is that of
        the algorithm's pipeline and clients are drawn by `sampler`. With the accountant `"pld"`,
        that of rounds between evaluations is that of the next one, an upper bound. Needs
        dp-accounting.
      progress: Show how far the run is: a bar in a terminal or a notebook, lines of the evaluations
        elsewhere. Needs rich.

    Returns:
      A `TrainResult`.

    Warns:
      fl.NonFiniteWarning: Once, in the first round whose loss is not finite, or in which a client
        sent what is not; with the round and the clients.

    Raises:
      ValueError: An argument is out of range, or the sampler is for another population; a metric
        is unknown; the checkpoints are of another run, or none of them can be read; of several
        processes, one is given something else than the others.
      MemoryError: There is too little for a round; with what needs how much.
      fl.InterruptedTraining: Ctrl-C was pressed, or SIGTERM or SIGHUP came, in the main thread; a
        `KeyboardInterrupt` with what the run had come to as its `result`. The round in progress
        was finished, and saved if there are `checkpoints`. A second signal ends it at once.

    >>> import jax, optax, fedjax_lite as fl
    >>> model = fl.models.halfspace_classifier()
    >>> held_out = fl.data.halfspace_batch(jax.random.key(1), 1000)
    >>> result = train(
    ...     fl.fed_sgd(model, optax.adam(0.3)),
    ...     fl.data.halfspace(),
    ...     fl.samplers.uniform(100, 5),
    ...     num_rounds=30,
    ...     key=jax.random.key(0),
    ...     evaluate=lambda state: fl.evaluate(model, state, held_out),
    ... )
    >>> [row["round"] for row in result.history.evaluations]
    [0, 10, 20, 30]
    >>> result.history.evaluations[-1]["accuracy"] > 0.9
    True
    """
    num_rounds = _validate.integer("num_rounds", num_rounds, minimum=0)
    eval_every = _validate.integer("eval_every", eval_every, minimum=1)
    _validate.key("key", key)
    example = "fl.fed_avg(model, optax.sgd(0.1))"
    _validate.instance("algorithm", algorithm, FederatedAlgorithm, example)
    _validate.instance("sampler", sampler, Sampler, "fl.samplers.uniform(num_clients, 10)")
    check_length(sampler, num_rounds)
    if state is not None:
        _validate.instance("state", state, ServerState, "algorithm.init(key)")
    if callable(stop):
        raise TypeError("stop is a single rule; pass a list of rules, such as [rule].")
    names = population.client_ids if isinstance(population, FederatedDataset) else None
    if isinstance(population, FederatedDataset):
        population = population.resident()
    if sampler.num_clients != population.num_clients:
        raise ValueError(
            f"sampler chooses among {sampler.num_clients} clients, and population has"
            f" {population.num_clients}; build it for population.num_clients."
        )
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay is {ema_decay}; choose a number within [0, 1).")
    if best is not None and evaluate is None:
        raise ValueError(f"best is {best!r} without evaluations; pass evaluate=.")
    if best is not None:
        _validate.choice("best_mode", best_mode, ("max", "min"))

    spent = epsilon = None
    if privacy is not None:
        spent = ledger_of(privacy, algorithm, sampler, num_rounds)
        epsilon = epsilon_of_rows(spent, num_rounds, eval_every)

    def name_clients(round: int) -> list[Any]:
        ids = np.asarray(sampler.select(keys[0], round - 1).client_ids).tolist()
        return ids if names is None else [names[i] if i >= 0 else i for i in ids]

    if not key.is_fully_addressable:
        data = jnp.array(np.asarray(jax.random.key_data(key)))
        key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
    key_init, *keys = jax.random.split(key, 3)
    is_given = state is not None
    if state is None:
        with memory_errors(lambda: {"the data": getattr(population, "examples", {})}):
            state = algorithm.init(key_init, num_clients=population.num_clients)
    else:
        state = on_devices_of(state, lambda: algorithm.init(key_init, num_clients=1))
    courier = Courier(state)
    run = _Run(
        # A round reuses the memory of the state before it, and the caller may hold this one.
        carry=Carry(
            copied(state, may_alias=not is_given),
            None if ema_decay is None else copied(trained(state)),
        ),
        courier=courier,
        step=build_step(algorithm, sampler, ema_decay),
        keys=put(tuple(keys), state.round.sharding),
        evaluation=evaluate,
        ledger=Ledger(
            on_round,
            on_eval,
            on_resume,
            best,
            best_mode or "",
            name_clients,
            epsilon,
        ),
        done=int(state.round),
        spent=spent,
    )
    # In a thread, and so with keys of this process alone: no other one has to be there.
    draw_ahead = functools.partial(draw, sampler, population, tuple(keys))
    is_ahead = isinstance(population, StreamedPopulation) or bool(courier)
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory_errors(lambda: _needs(state, population)))
        if checkpoints is not None or jax.process_count() > 1:
            source = run.equipped(draw_ahead(run.done)) if is_ahead else population
            traced = run.step.trace(run.carry, run.keys, source)
            settings = {} if checkpoints is None else checkpoints.settings
            settings = {**settings, "ema_decay": ema_decay, "best": best}
            if spent is not None:  # What they were spent with, and told for.
                settings |= {"noise_multiplier": spent.noise_multiplier, "delta": spent.delta}
            identity = identify(state, population, sampler, key, traced.jaxpr, settings)
            check_same({**identity, "num_rounds": num_rounds, "eval_every": eval_every})
        if checkpoints is not None:
            run.folder = stack.enter_context(CheckpointFolder(checkpoints, identity))
            run.restore()
        sources: Iterator[Any] = itertools.repeat(population)
        if is_ahead:
            sources = prefetch(draw_ahead, range(run.done, num_rounds))
        run.ledger.signal_came = stack.enter_context(first_signal())
        if progress:
            require("rich", "run")
            from fedjax_lite.runs.progress import shown

            run.ledger.show = stack.enter_context(shown(num_rounds))
        run.start()
        while True:
            if run.done % eval_every == 0:
                run.evaluate()
                if stop:
                    run.ledger.settle()
            history = run.ledger.history
            seen = history if evaluate is not None else _WithoutEvaluations(*history)
            stopped = next(filter(None, (rule(run.done, seen) for rule in stop)), None)
            if stopped or run.done >= num_rounds:
                run.evaluate()
                run.save()
                break
            if came := run.ledger.interrupted_by():
                run.save()
                message = run.interrupted_message(came)
                raise InterruptedTraining(message, came, run.result(message.partition(";")[0]))
            if checkpoints is not None and run.done % checkpoints.every == 0:
                run.save()
            run.advance(next(sources))
        return run.result(stopped)


def _needs(state: ServerState, population: Any) -> dict[str, PyTree]:
    """What lies in the memory of a device while a run goes on."""
    examples = getattr(population, "examples", {})  # Those of others are drawn, or on the host.
    return {
        "params": state.params,
        "the state of the server optimizer": state.opt_state,
        "the store": state.store,
        "the data": examples,
    }


class _WithoutEvaluations(History):
    """The history of a run that is never evaluated, for rules that would wait for ever."""

    @property
    def evaluations(self) -> list[Row]:
        raise ValueError(
            "stop has a rule that reads the evaluations of the run, and evaluate is None, so that"
            " it would never stop; pass evaluate=."
        )


@dataclasses.dataclass
class _Run:
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

    def start(self) -> None:
        """Rounds from here on are those of this process."""
        self.num_before = len(self.ledger.history.rounds)
        self.began = time.perf_counter()

    def equipped(self, source: Any) -> Any:
        """The source of the next round, whose clients' entries are fetched if they lie in files."""
        if not self.courier:
            return source
        cohort, selected = source
        state, cohort = self.courier.fetch(self.carry.state, cohort)
        self.carry = self.carry._replace(state=state)
        return cohort, selected

    def advance(self, source: Any) -> None:
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

    def evaluate(self) -> None:
        """An evaluation, unless there is one of this round."""
        if self.evaluation is not None and self.evaluated_at < self.done:
            self.evaluated_at = self.done
            state = self.evaluated_state()
            self.ledger.add_evaluation(self.done, self.evaluation(state), state)

    def save(self) -> None:
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

    def result(self, stopped: str | None) -> TrainResult:
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

    def interrupted_message(self, came: signal.Signals) -> str:
        """What to tell a user whose signal ended the run."""
        by = "" if came is signal.SIGINT else f" by {came.name}"
        told = f"interrupted{by} after round {self.done}"
        return f"{told}; the same call goes on from its checkpoint" if self.folder else told
