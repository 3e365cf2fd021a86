"""What the layout of a round costs: compilations, memory, and the host's time.

Reported by `python -m benchmarks.cohort --case layout`.
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_lite as fl
from benchmarks.cases import CASES, LEARNING_RATE, lognormal
from benchmarks.timing import interleaved
from fedjax_lite.engine.execution import Execution, choose_lanes

_COMPILATION = "/jax/core/compile/backend_compile_duration"


def measure_layout(repeats: int) -> dict[str, Any]:
    """The report of the case `layout`."""
    return {"case": "layout", **_compilations(), **_memory(), **_host(repeats), **_driver(repeats)}


def _population(sizes: np.ndarray, image: tuple[int, ...]) -> fl.data.ResidentPopulation:
    rng = np.random.default_rng(0)
    rows = int(sizes.sum())
    examples = {
        "x": rng.normal(size=(rows, *image)).astype(np.float32),
        "y": rng.integers(0, 62, rows).astype(np.int32),
    }
    return fl.FederatedDataset.from_arrays(
        examples, np.repeat(np.arange(sizes.size), sizes)
    ).resident()


def _dense_algorithm(lanes: int | None = None) -> fl.FederatedAlgorithm:
    return fl.fed_avg(
        fl.models.emnist_dense(), optax.sgd(LEARNING_RATE), batch_size=20, lanes=lanes
    )


def _compilations(num_rounds: int = 50) -> dict[str, Any]:
    """Programs compiled by rounds of 5 to 50 clients of random sizes, after the first of them."""
    population = _population(lognormal(500, 20, 1.0), (28, 28, 1))
    algorithm = _dense_algorithm()
    state = algorithm.init(jax.random.key(0))
    cohort_sizes = np.random.default_rng(1).integers(5, 51, num_rounds).tolist()
    keys = list(jax.random.split(jax.random.key(1), 2 * num_rounds))
    compilations: list[str] = []
    so_far = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILATION:
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for i, cohort_size in enumerate(cohort_sizes):
        cohort = fl.cohort(keys[2 * i], population, cohort_size, capacity=50)
        state, _ = algorithm.round(keys[2 * i + 1], state, cohort)
        so_far.append(len(compilations))
    jax.monitoring.unregister_event_duration_listener(listen)
    return {
        "rounds": num_rounds,
        "compilations_first_round": so_far[0],
        "compilations_later_rounds": so_far[-1] - so_far[0],
    }


def _memory() -> dict[str, Any]:
    """Temporary bytes on a device of a round of 50 clients and of one of 10,000."""
    few, many = 50, 10_000
    # The same number of lanes for both: each lane has params of its own.
    algorithm = _dense_algorithm(choose_lanes(Execution(mesh=fl.clients_mesh()), {}, few))

    def arguments(capacity: int) -> tuple[jax.Array, fl.ServerState, fl.Cohort]:
        slots = jnp.zeros(capacity, jnp.int32)
        examples = {"x": jnp.zeros((100_000, 28, 28, 1)), "y": jnp.zeros(100_000, jnp.int32)}
        cohort = fl.Cohort(
            client_ids=slots,
            num_examples=slots,
            offsets=slots,
            examples=examples,
            num_clients=many,
        )
        return jax.random.key(0), algorithm.init(jax.random.key(0)), cohort

    def temporary_bytes(capacity: int) -> int:
        shapes = jax.eval_shape(lambda: arguments(capacity))
        lowered = algorithm.round.lower(*shapes)  # type: ignore[attr-defined]
        return lowered.compile().memory_analysis().temp_size_in_bytes

    few_bytes, many_bytes = temporary_bytes(few), temporary_bytes(many)
    return {
        "temp_bytes_50_clients": few_bytes,
        "temp_bytes_10000_clients": many_bytes,
        # What a slot holds of its own: indices, keys, metrics.
        "temp_bytes_per_client": (many_bytes - few_bytes) / (many - few),
    }


def _host(repeats: int) -> dict[str, Any]:
    """Times of drawing 1,000 of 100,000 clients, and of handing a round to the device."""
    population = _population(lognormal(100_000, 10, 1.0), (16,))
    model = fl.models.logistic((16,), 62)
    algorithm = fl.fed_avg(model, optax.sgd(LEARNING_RATE), batch_size=10, num_epochs=20)
    state = algorithm.init(jax.random.key(0))
    seconds: dict[str, list[float]] = {}
    for key in jax.random.split(jax.random.key(0), repeats + 1):
        key_cohort, key_round = jax.block_until_ready(jax.random.split(key))
        began = time.perf_counter()
        cohort = fl.cohort(key_cohort, population, 1000)
        seconds.setdefault("cohort_dispatch_ms", []).append(time.perf_counter() - began)
        result = algorithm.round(key_round, state, cohort)
        seconds.setdefault("cohort_and_round_dispatch_ms", []).append(time.perf_counter() - began)
        jax.block_until_ready(result)
        seconds.setdefault("cohort_and_round_ms", []).append(time.perf_counter() - began)
    # The first one compiles.
    return {name: 1000 * statistics.median(values[1:]) for name, values in seconds.items()}


def _driver(repeats: int, num_rounds: int = 10) -> dict[str, Any]:
    """`fl.train` over a loop of as many rounds of the case `dense`, cohorts drawn on the way."""
    population = _population(CASES["dense"].sizes, CASES["dense"].image)
    algorithm = _dense_algorithm()
    sampler = fl.samplers.uniform(population.num_clients, population.num_clients)
    start = algorithm.init(jax.random.key(0))
    key, rounds = jax.random.key(1), range(num_rounds)

    def loop() -> fl.ServerState:
        state = start
        for r in rounds:
            key_cohort, key_round = jax.random.split(jax.random.fold_in(key, r))
            cohort = fl.cohort(key_cohort, population, population.num_clients)
            state, _ = algorithm.round(key_round, state, cohort)
        return state

    def driver() -> fl.ServerState:
        return fl.train(algorithm, population, sampler, num_rounds, key=key, state=start).state

    times = interleaved({"loop": loop, "driver": driver}, repeats)
    return {
        "loop_round_ms": 1000 * times["loop"].median / num_rounds,
        "driver_overhead": times["driver"].median / times["loop"].median - 1,
    }
