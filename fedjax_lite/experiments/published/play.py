"""Runs that one program can run, evaluation by evaluation, until each has what it is run for."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lite.base import FederatedAlgorithm, PyTree, ServerState
from fedjax_lite.data.population import Population
from fedjax_lite.engine import cohort_of
from fedjax_lite.evaluation import ClientEvaluation, evaluate_clients, summarize_clients
from fedjax_lite.experiments.build import Experiment, build
from fedjax_lite.experiments.settings import Settings
from fedjax_lite.experiments.varying import algorithms_of, group_by_numbers
from fedjax_lite.runs.step import play_round

Curve = dict[str, list[Any]]
"""Evaluations of a run: `round`, and the values of the metrics."""


def play(
    runs: Sequence[Settings],
    *,
    is_personal: bool,
    is_over: Callable[[Sequence[Curve]], Sequence[bool]],
    show: Callable[[int, Curve], None] = lambda round, curve: None,
) -> list[Curve]:
    """The curves of runs that differ in seeds and traced numbers alone.

    Each run is that of `fl.train` up to rounding. On one accelerator all advance side by side by
    `vmap`; on CPUs, and where the clients of a run are on several devices, one after the other.

    Args:
      runs: Their settings.
      is_personal: Whether the models that clients use are evaluated too: those that they have for
        themselves, or the server's.
      is_over: `is_over(curves)`: of each run, whether it ends before its last round.
      show: `show(round, curve)`, called with each evaluation of the first run that still goes on.

    Raises:
      ValueError: A setting is out of range, or no examples are held out for each client.
    """
    built = build(runs[0])
    algorithm, numbers = algorithms_of(built, runs)
    try:
        return _play(built, algorithm, numbers, runs, is_personal, is_over, show)
    except jax.errors.ConcretizationTypeError:  # A function asks for the value of a number.
        if not numbers:
            raise
    curves: list[Curve] = [{"round": []} for _ in runs]
    for places in group_by_numbers(runs):

        def are_over(some: Sequence[Curve], places: list[int] = places) -> list[bool]:
            for place, curve in zip(places, some, strict=True):
                curves[place] = curve
            over = is_over(curves)
            return [over[place] for place in places]

        settings = [runs[place] for place in places]
        play(settings, is_personal=is_personal, is_over=are_over, show=show)
    return curves


def _play(
    built: Experiment,
    algorithm: Callable[..., FederatedAlgorithm],
    numbers: Mapping[str, np.ndarray],
    runs: Sequence[Settings],
    is_personal: bool,
    is_over: Callable[[Sequence[Curve]], Sequence[bool]],
    show: Callable[[int, Curve], None],
) -> list[Curve]:
    keys = jax.vmap(jax.random.key)(np.array([run.seed for run in runs]))
    of_runs = (keys, {name: jnp.asarray(values) for name, values in numbers.items()})

    @jax.jit
    def start(population: Population, of_runs: PyTree) -> ServerState:
        def one(key: jax.Array, numbers: dict[str, jax.Array]) -> ServerState:
            key_init = jax.random.split(key, 3)[0]
            return algorithm(**numbers).init(key_init, num_clients=population.num_clients)

        return _each(one, of_runs)

    @functools.partial(jax.jit, static_argnames="num_rounds", donate_argnames="states")
    def advance(
        states: ServerState,
        goes_on: jax.Array,
        population: Population,
        of_runs: PyTree,
        num_rounds: int,
    ) -> ServerState:
        def one(
            state: ServerState, goes_on: jax.Array, key: jax.Array, numbers: dict[str, jax.Array]
        ) -> ServerState:
            played, keys = algorithm(**numbers), tuple(jax.random.split(key, 3)[1:])

            def round(state: ServerState, _: None) -> tuple[ServerState, None]:
                return play_round(played, built.sampler, keys, state, population)[0], None

            def rounds(state: ServerState) -> ServerState:
                return jax.lax.scan(round, state, length=num_rounds)[0]

            return jax.lax.cond(goes_on, rounds, lambda state: state, state)

        return _each(one, (states, goes_on, *of_runs))

    @jax.jit
    def evaluate(states: ServerState) -> dict[str, jax.Array]:
        return _each(functools.partial(_evaluate, built, is_personal), (states,))

    states, done = start(built.population, of_runs), 0
    goes_on = np.ones(len(runs), bool)
    curves: list[Curve] = [{"round": []} for _ in runs]
    while True:
        found = jax.device_get(evaluate(states))
        for place in np.flatnonzero(goes_on):
            curves[place]["round"].append(done)
            for name, values in found.items():
                curves[place].setdefault(name, []).append(float(values[place]))
        show(done, curves[int(goes_on.argmax())])
        goes_on &= ~np.asarray(is_over(curves))
        size = min(built.settings.eval_every, built.settings.rounds - done)
        if size == 0 or not goes_on.any():
            return curves
        states = advance(states, goes_on, built.population, of_runs, num_rounds=size)
        done += size


def _each(one: Callable[..., PyTree], of_runs: tuple[PyTree, ...]) -> PyTree:
    """A function of one run, of all of them."""
    # On a CPU, vmap turns products into batched ones, which run slower.
    if jax.default_backend() != "cpu" and jax.device_count() == 1:
        return jax.vmap(one)(*of_runs)
    return jax.lax.map(lambda x: one(*x), of_runs)


def _evaluate(built: Experiment, is_personal: bool, state: ServerState) -> dict[str, jax.Array]:
    found = {name: built.evaluate(state)[name] for name in ("loss", "accuracy")}
    if not is_personal:
        return found
    own = _of_clients(built, state)
    summary = summarize_clients(own.clients["accuracy"], own.num_examples)
    return {
        **found,
        "personal_accuracy": own.pooled["accuracy"],
        "client_accuracy": summary["mean"],
    }


def _of_clients(built: Experiment, state: ServerState) -> ClientEvaluation:
    """That of the models that clients have for themselves, or else of the server's."""
    if built.personal is not None:
        return built.personal(state, jax.random.key(built.settings.data_seed))
    if built.held_out is None:
        raise ValueError(
            f"dataset is {built.settings.dataset}, of which no examples are held out for each"
            " client; choose one with examples of clients."
        )
    ids = np.arange(built.held_out.num_clients)
    return evaluate_clients(built.model, state, cohort_of(built.held_out.resident(), ids))
