"""Many runs that differ in numbers and seeds alone, as one program."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import FederatedAlgorithm, PyTree, ServerState
from fedjax_lite.data.population import Population
from fedjax_lite.privacy.accounting import Budget, ledger_of
from fedjax_lite.runs.ledger import epsilon_of_rows, flatten, numbers_of, with_clock
from fedjax_lite.runs.step import check_length, play_round
from fedjax_lite.runs.stopping import History, Row
from fedjax_lite.samplers import Sampler
from fedjax_lite.xla.mesh import AXIS, resolve


class SweepResult(NamedTuple):
    """What the runs of a sweep end with.

    Attributes:
      states: The final states; each array has a leading axis of runs. Of several processes, each
        has those of its devices.
      histories: Of each run, rows as `fl.train` records them, without seconds.
    """

    states: ServerState
    histories: list[History]

    def __repr__(self) -> str:
        return f"SweepResult({len(self.histories)} runs of {self.histories[:1]}, {self.states})"


def sweep(
    build: Callable[..., FederatedAlgorithm],
    population: Population,
    sampler: Sampler,
    num_rounds: int,
    *,
    keys: jax.Array,
    numbers: Mapping[str, ArrayLike] | None = None,
    evaluate: Callable[[ServerState], Mapping[str, Any]] | None = None,
    eval_every: int = 10,
    privacy: Budget | None = None,
    lanes: int | None = None,
) -> SweepResult:
    """Many runs of `fl.train` at once, with other seeds and other numbers, as one program.

    Run i gives what `fl.train(build(**numbers_i), ..., key=keys[i])` does, up to rounding. Each
    device has runs of its own, `lanes` of them side by side by `vmap`, in which rounds follow
    each other in a `scan`.

    Args:
      build: `build(**numbers) -> algorithm`, such as
        `lambda rate: fl.fed_avg(model, optax.sgd(rate))`. Its arguments are traced scalars; before,
        it is called with the numbers of each run, so that it can refuse them.
      population: `dataset.resident()` or a `GeneratedPopulation`.
      sampler: Who takes part.
      num_rounds: Rounds of each run.
      keys: Typed keys `[runs]`.
      numbers: What varies beside the keys: arrays `[runs]` by name of the argument.
      evaluate: `evaluate(state) -> {name: array}`, traced.
      eval_every: Rounds between evaluations. There is one before the first round, and one at the
        end.
      privacy: See `fl.train`; each run's noise is that of its numbers.
      lanes: How many runs a device has side by side; changes the speed, and results only by
        rounding. By default 1 on CPUs, and all of its runs elsewhere.

    Returns:
      A `SweepResult`.

    Raises:
      ValueError: `keys` or one of the numbers has another shape than `[runs]`, or an argument or a
        number is out of range; see `fl.train` of `privacy`.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.models.halfspace_classifier()
    >>> result = sweep(
    ...     lambda rate: fl.fed_sgd(model, optax.sgd(rate)),
    ...     fl.data.halfspace(),
    ...     fl.samplers.uniform(100, 5),
    ...     num_rounds=3,
    ...     keys=jax.random.split(jax.random.key(0), 4),
    ...     numbers={"rate": [0.1, 0.1, 1.0, 1.0]},
    ... )
    >>> result.states.params["weight"].shape, [len(run.rounds) for run in result.histories]
    ((4, 2), [3, 3, 3, 3])
    """
    if lanes is not None:
        lanes = _validate.integer("lanes", lanes, minimum=1)
    num_rounds = _validate.integer("num_rounds", num_rounds, minimum=0)
    check_length(sampler, num_rounds)
    eval_every = _validate.integer("eval_every", eval_every, minimum=1)
    _validate.key("keys", keys, single=False)
    hosted = [np.asarray(values) for values in (numbers or {}).values()]
    arrays = dict(zip(numbers or {}, map(jnp.asarray, hosted), strict=True))
    for name, array in {"keys": keys, **arrays}.items():
        if array.ndim != 1 or array.shape != keys.shape:
            raise ValueError(
                f"{name} has shape {array.shape} beside keys of shape {keys.shape}; pass one value"
                " for each run, [runs]."
            )

    # Once with the numbers themselves: traced ones cannot be checked.
    of_runs = [tuple(x[i].item() for x in hosted) for i in range(len(keys))]
    algorithms = {of_run: build(**dict(zip(arrays, of_run, strict=True))) for of_run in {*of_runs}}
    epsilons = {}
    if privacy is not None:
        for of_run, algorithm in algorithms.items():
            spent = ledger_of(privacy, algorithm, sampler, num_rounds)
            epsilons[of_run] = epsilon_of_rows(spent, num_rounds, eval_every)
    runs = _program(build, sampler, num_rounds, evaluate, eval_every, lanes)
    states, recorded = runs(population, (keys, arrays))
    (rounds_0, first), (rounds_1, among), (rounds_2, last) = jax.device_get(recorded)
    rounds = {
        name: np.concatenate([x.reshape(len(keys), -1) for x in parts], axis=1)
        for name, parts in _zip(rounds_0, rounds_1, rounds_2)
    }
    evaluations = {
        name: np.concatenate([a[:, None], b, c[:, None]], axis=1)
        for name, (a, b, c) in _zip(first, among, last)
    }
    evaluated = [*range(0, num_rounds + 1, eval_every), num_rounds]
    num_evaluations = len(dict.fromkeys(evaluated))  # If the last ones are of one round, once.
    histories = [
        History(
            _rows(
                {name: x[i] for name, x in rounds.items()},
                range(1, num_rounds + 1),
                epsilons.get(of_run),
            ),
            _rows(
                {name: x[i] for name, x in evaluations.items()},
                evaluated[:num_evaluations],
                epsilons.get(of_run),
            ),
        )
        for i, of_run in enumerate(of_runs)
    ]
    return SweepResult(states, histories)


# A second sweep with other numbers need not compile again.
@functools.lru_cache(maxsize=8)
def _program(
    build: Callable[..., FederatedAlgorithm],
    sampler: Sampler,
    num_rounds: int,
    evaluate: Callable[[ServerState], Mapping[str, Any]] | None,
    eval_every: int,
    lanes: int | None,
) -> Callable[..., tuple[ServerState, list[PyTree]]]:
    """All runs, `(population, (keys, numbers)) -> (states, records)`, with leading axes [runs]."""

    def run(
        population: Population, key: jax.Array, numbers: dict[str, jax.Array]
    ) -> tuple[ServerState, list[PyTree]]:
        algorithm = build(**numbers)
        _validate.instance("what build returned", algorithm, FederatedAlgorithm)
        key_init, key_sampler, key_rounds = jax.random.split(key, 3)
        keys = (key_sampler, key_rounds)

        def round(state: ServerState, _: None) -> tuple[ServerState, PyTree]:
            state, info, selected = play_round(algorithm, sampler, keys, state, population)
            return state, numbers_of(info, selected)

        def leg(state: ServerState, num_rounds: int) -> tuple[ServerState, PyTree]:
            """Rounds up to the next evaluation, and that one."""
            state, rows = jax.lax.scan(round, state, length=num_rounds)
            return state, (rows, {} if evaluate is None else flatten(evaluate(state)))

        state = algorithm.init(key_init, num_clients=population.num_clients)
        legs, rest = divmod(num_rounds, eval_every)
        state, begin = leg(state, 0)
        state, rows = jax.lax.scan(lambda state, _: leg(state, eval_every), state, length=legs)
        state, end = leg(state, rest)
        return state, [begin, rows, end]

    @jax.jit
    def all_runs(population: Population, runs: PyTree) -> PyTree:
        mesh, num_runs = resolve(None), len(jax.tree.leaves(runs)[0])
        num_devices = 1 if mesh is None else mesh.size
        own = -(-num_runs // num_devices)
        # On a CPU a second one turns products into batched ones, which run slower.
        size = min(lanes or (1 if jax.default_backend() == "cpu" else own), own)

        def own_runs(population: Population, runs: PyTree) -> PyTree:
            """Those of one device: groups side by side, one group after the other."""
            one = functools.partial(run, population)
            if size == 1:
                return jax.lax.map(lambda x: one(*x), runs)
            groups = jax.tree.map(lambda x: x.reshape(-1, size), runs)
            result = jax.lax.map(lambda x: jax.vmap(one)(*x), groups)
            return jax.tree.map(lambda x: x.reshape(len(x) * size, *x.shape[2:]), result)

        # The last one once more where it takes, so that all groups are full.
        num_padded = -(-own // size) * size * num_devices
        place = jnp.minimum(jnp.arange(num_padded), num_runs - 1)
        runs = jax.tree.map(lambda x: x[place], runs)
        if mesh is not None:
            own_runs = jax.shard_map(
                own_runs,
                mesh=mesh,
                in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
                out_specs=PartitionSpec(AXIS),
                check_vma=False,
            )
        states, recorded = jax.tree.map(lambda x: x[:num_runs], own_runs(population, runs))
        if mesh is not None:  # For each of several processes.
            everywhere = NamedSharding(mesh, PartitionSpec())
            recorded = jax.lax.with_sharding_constraint(recorded, everywhere)
        return states, recorded

    return all_runs


def _zip(*trees: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    return ((name, tuple(tree[name] for tree in trees)) for name in trees[0])


def _rows(
    columns: Mapping[str, np.ndarray],
    rounds: Iterable[int],
    epsilon: Callable[[int], float] | None,
) -> list[Row]:
    rows: list[Row] = []
    for i, round in enumerate(rounds if columns else ()):
        row = {"round": round, **{name: x[i].tolist() for name, x in columns.items()}}
        if epsilon is not None:
            row["epsilon"] = epsilon(round)
        rows.append(with_clock(row, rows))
    return rows
