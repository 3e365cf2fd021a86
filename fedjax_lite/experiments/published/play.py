"""Runs that one program can run, evaluation by evaluation, until each has what it is run for."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from fedjax_lite.base import Cohort, FederatedAlgorithm, PyTree, ServerState
from fedjax_lite.data.population import Population, ResidentPopulation
from fedjax_lite.engine import cohort_of
from fedjax_lite.evaluation import ClientEvaluation, evaluate_clients, summarize_clients
from fedjax_lite.experiments.build import Experiment, build
from fedjax_lite.experiments.settings import Settings, to_settings
from fedjax_lite.experiments.varying import algorithms_of, group_by_numbers, with_numbers
from fedjax_lite.runs.step import play_round
from fedjax_lite.samplers import Sampler
from fedjax_lite.xla.memory import make_room_for_programs

_ROWS = 256  # Rows of examples come in multiples of it.
Curve = dict[str, list[Any]]
"""Evaluations of a run: `round`, and the values of the metrics."""


class Program(NamedTuple):
    """Compiled functions of some runs that differ in seeds, traced numbers and data alone.

    Attributes:
      start: `start(data, of_runs) -> states`, with a leading axis of runs.
      advance: `advance(states, goes_on, data, of_runs, num_rounds=...) -> states`, where runs that
        do not go on stay as they are.
      evaluate: `evaluate(states, data) -> {metric: [runs]}`.
    """

    start: Callable[..., ServerState]
    advance: Callable[..., ServerState]
    evaluate: Callable[..., dict[str, jax.Array]]


class _Data(NamedTuple):
    """The clients, and what is evaluated on."""

    population: Population
    evaluated: tuple[Any, ...]


def play(
    runs: Sequence[Settings],
    *,
    is_personal: bool,
    is_over: Callable[[Sequence[Curve]], Sequence[bool]],
    show: Callable[[int, Curve], None] = lambda round, curve: None,
    programs: MutableMapping[Any, Program] | None = None,
) -> list[Curve]:
    """The curves of runs that differ in seeds and traced numbers alone.

    Each run is that of `fl.train` up to rounding. On one accelerator all advance side by side by
    `vmap`; on CPUs, and where the clients of a run are on several devices, one after the other.

    Args:
      runs: Their settings.
      is_personal: Whether the models that clients use are evaluated in place of the server's:
        those that they have for themselves, or else the server's on the examples of each.
      is_over: `is_over(curves)`: of each run, whether it ends before its last round.
      show: `show(round, curve)`, called with each evaluation of the first run that still goes on.
      programs: Those of calls before, for runs on other data; those of this call are added, and
        all are forgotten where no more would fit.

    Raises:
      ValueError: A setting is out of range, or no examples are held out for each client.
    """
    built = build(runs[0])
    algorithm, numbers = algorithms_of(built, runs)
    evaluation = _personal(built) if is_personal else built.evaluate
    data = _padded(_Data(built.population, evaluation.args))
    programs = {} if programs is None else programs
    if make_room_for_programs():
        programs.clear()
    key = (_but_for_data(built, numbers), is_personal)
    metrics = (_metrics_of_clients if is_personal else _metrics)(evaluation.func)
    program = programs.get(key) or _program(algorithm, built.sampler, metrics)
    try:
        curves = _play(program, data, numbers, runs, is_over, show)
    except jax.errors.ConcretizationTypeError:  # A function asks for the value of a number.
        if not numbers:
            raise
    else:
        programs[key] = program
        return curves
    curves = [{"round": []} for _ in runs]
    for places in group_by_numbers(runs):

        def are_over(some: Sequence[Curve], places: list[int] = places) -> list[bool]:
            for place, curve in zip(places, some, strict=True):
                curves[place] = curve
            over = is_over(curves)
            return [over[place] for place in places]

        settings = [runs[place] for place in places]
        play(settings, is_personal=is_personal, is_over=are_over, show=show, programs=programs)
    return curves


def _play(
    program: Program,
    data: _Data,
    numbers: Mapping[str, np.ndarray],
    runs: Sequence[Settings],
    is_over: Callable[[Sequence[Curve]], Sequence[bool]],
    show: Callable[[int, Curve], None],
) -> list[Curve]:
    keys = jax.vmap(jax.random.key)(np.array([run.seed for run in runs]))
    of_runs = (keys, {name: jnp.asarray(values) for name, values in numbers.items()})
    states, done = program.start(data, of_runs), 0
    goes_on = np.ones(len(runs), bool)
    curves: list[Curve] = [{"round": []} for _ in runs]
    while True:
        found = jax.device_get(program.evaluate(states, data))
        for place in np.flatnonzero(goes_on):
            curves[place]["round"].append(done)
            for name, values in found.items():
                curves[place].setdefault(name, []).append(float(values[place]))
        show(done, curves[int(goes_on.argmax())])
        goes_on &= ~np.asarray(is_over(curves))
        size = min(runs[0].eval_every, runs[0].rounds - done)
        if size == 0 or not goes_on.any():
            return curves
        states = program.advance(states, goes_on, data, of_runs, num_rounds=size)
        done += size


def _program(
    algorithm: Callable[..., FederatedAlgorithm],
    sampler: Sampler,
    metrics: Callable[..., dict[str, jax.Array]],
) -> Program:
    """The program, which is kept, and so must not hold the data of the runs that it is made for."""

    @jax.jit
    def start(data: _Data, of_runs: PyTree) -> ServerState:
        def one(key: jax.Array, numbers: dict[str, jax.Array]) -> ServerState:
            key_init = jax.random.split(key, 3)[0]
            num_clients = data.population.num_clients
            return algorithm(**numbers).init(key_init, num_clients=num_clients)

        return _each(one, of_runs)

    @functools.partial(jax.jit, static_argnames="num_rounds", donate_argnames="states")
    def advance(
        states: ServerState, goes_on: jax.Array, data: _Data, of_runs: PyTree, num_rounds: int
    ) -> ServerState:
        def one(
            state: ServerState, goes_on: jax.Array, key: jax.Array, numbers: dict[str, jax.Array]
        ) -> ServerState:
            chosen = algorithm(**numbers)
            _, key_sampler, key_rounds = jax.random.split(key, 3)

            def round(state: ServerState, _: None) -> tuple[ServerState, None]:
                keys = (key_sampler, key_rounds)
                return play_round(chosen, sampler, keys, state, data.population)[0], None

            def rounds(state: ServerState) -> ServerState:
                return jax.lax.scan(round, state, length=num_rounds)[0]

            return jax.lax.cond(goes_on, rounds, lambda state: state, state)

        return _each(one, (states, goes_on, *of_runs))

    @jax.jit
    def evaluate(states: ServerState, data: _Data) -> dict[str, jax.Array]:
        return _each(functools.partial(metrics, *data.evaluated), (states,))

    return Program(start, advance, evaluate)


def _each(one: Callable[..., PyTree], of_runs: tuple[PyTree, ...]) -> PyTree:
    """A function of one run, of all of them."""
    # On a CPU, vmap turns products into batched ones, which run slower.
    if jax.default_backend() != "cpu" and jax.device_count() == 1:
        return jax.vmap(one)(*of_runs)
    return jax.lax.map(lambda x: one(*x), of_runs)


def _metrics(evaluate: Callable[..., dict[str, jax.Array]]) -> Callable[..., dict[str, jax.Array]]:
    """Those of the server's model."""

    def metrics(*args: Any) -> dict[str, jax.Array]:
        found = evaluate(*args)
        return {name: found[name] for name in ("loss", "accuracy")}

    return metrics


def _metrics_of_clients(
    evaluate: Callable[..., ClientEvaluation],
) -> Callable[..., dict[str, jax.Array]]:
    """Those of the models that clients use."""

    def metrics(*args: Any) -> dict[str, jax.Array]:
        found = evaluate(*args, jax.random.key(0))
        summary = summarize_clients(found.clients["accuracy"], found.num_examples)
        return {
            "loss": found.pooled["loss"],
            "personal_accuracy": found.pooled["accuracy"],
            "client_accuracy": summary["mean"],
        }

    return metrics


def _personal(built: Experiment) -> Partial:
    """What evaluates the models that clients have for themselves, or else the server's."""
    if built.personal is not None:
        return built.personal
    if built.held_out is None:
        raise ValueError(
            f"dataset is {built.settings.dataset}, of which no examples are held out for each"
            " client; choose one with examples of clients."
        )

    model = built.model

    def of_server(cohort: Cohort, state: ServerState, key: jax.Array) -> ClientEvaluation:
        return evaluate_clients(model, state, cohort, key=key)

    ids = np.arange(built.held_out.num_clients)
    return Partial(of_server, cohort_of(built.held_out.resident(), ids))


def _padded(data: _Data) -> _Data:
    """The data with unused rows behind those of clients, so that splits share their shapes."""

    def padded(part: Any) -> Any:
        if not isinstance(part, (ResidentPopulation, Cohort)):
            return part
        examples = {
            name: jnp.pad(x, [(0, -len(x) % _ROWS), *[(0, 0)] * (x.ndim - 1)])
            for name, x in part.examples.items()
        }
        return dataclasses.replace(part, examples=examples)

    return _Data(padded(data.population), tuple(map(padded, data.evaluated)))


def _but_for_data(built: Experiment, numbers: Iterable[str]) -> Any:
    """What decides, beside shapes, which program runs: the settings without seeds and clients."""
    calls = with_numbers(built.calls, {tuple(name.split(".")): 1.0 for name in numbers})
    settings = dataclasses.replace(to_settings(built.settings, calls), seed=0)
    params, _ = jax.eval_shape(built.model.init, jax.random.key(0))  # By the number of classes.
    shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(params))
    if not calls.sampler.takes("num_examples"):
        settings = dataclasses.replace(settings, partition=None, data_seed=0)
    return settings, tuple(numbers), shapes, built.population.num_clients
