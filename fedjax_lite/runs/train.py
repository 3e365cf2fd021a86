"""The driver: a loop of rounds, with evaluations, records, checkpoints and rules that end it."""

import contextlib
import functools
import itertools
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
from fedjax_lite.engine.streaming import prefetch
from fedjax_lite.privacy.accounting import Budget, ledger_of
from fedjax_lite.runs.checkpoint import CheckpointFolder, Checkpoints
from fedjax_lite.runs.entries import Courier
from fedjax_lite.runs.identity import check_same, identify
from fedjax_lite.runs.initial import on_devices_of
from fedjax_lite.runs.interrupts import first_signal
from fedjax_lite.runs.ledger import Ledger, epsilon_of_rows, trained
from fedjax_lite.runs.result import TrainResult
from fedjax_lite.runs.run import Run
from fedjax_lite.runs.step import Carry, build_step, check_length, draw
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

    names = population.client_ids if isinstance(population, FederatedDataset) else None
    if isinstance(population, FederatedDataset):
        population = population.resident()
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
    if state is None:
        with memory_errors(lambda: {"the data": getattr(population, "examples", {})}):
            state = algorithm.init(key_init, num_clients=population.num_clients)
        first = copied(state, may_alias=True)
    else:
        state = on_devices_of(state, lambda: algorithm.init(key_init, num_clients=1))
        first = copied(state)  # A round reuses the memory of the one before it.
    courier = Courier(state)
    run = Run(
        carry=Carry(first, None if ema_decay is None else copied(trained(state))),
        courier=courier,
        step=build_step(algorithm, sampler, ema_decay),
        keys=put(tuple(keys), state.round.sharding),
        evaluation=evaluate,
        ledger=Ledger(on_round, on_eval, on_resume, best, best_mode or "", name_clients, epsilon),
        done=int(state.round),
        spent=spent,
    )
    # In a thread, and so with keys of this process alone: no other one has to be there.
    draw_ahead = functools.partial(draw, sampler, population, tuple(keys))
    is_ahead = isinstance(population, StreamedPopulation) or bool(courier)
    settings = {} if checkpoints is None else checkpoints.settings
    settings = {**settings, "ema_decay": ema_decay, "best": best}
    if spent is not None:  # What they were spent with, and told for.
        settings |= {"noise_multiplier": spent.noise_multiplier, "delta": spent.delta}
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory_errors(lambda: _needs(state, population)))
        if checkpoints is not None or jax.process_count() > 1:
            source = run.equipped(draw_ahead(run.done)) if is_ahead else population
            traced = run.step.trace(run.carry, run.keys, source)
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
        return run.play(
            sources,
            num_rounds,
            eval_every=eval_every,
            save_every=None if checkpoints is None else checkpoints.every,
            stop=stop,
        )


def _needs(state: ServerState, population: Any) -> dict[str, PyTree]:
    """What lies in the memory of a device while a run goes on."""
    examples = getattr(population, "examples", {})  # Those of others are drawn, or on the host.
    return {
        "params": state.params,
        "past versions of the params": state.versions,
        "the state of the server optimizer": state.opt_state,
        "the store": state.store,
        "the data": examples,
    }
