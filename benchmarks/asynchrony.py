"""Asynchronous training: what a step of the server costs, and what staleness does to accuracy.

    python -m benchmarks.asynchrony [--rounds N] [--json]

`cost` is the time of a step whose clients start from `ring_versions` different versions of the
params, interleaved, beside that of a synchronous round of as many clients, on the dense model of
EMNIST. `schedule_s` is how long the schedule of 1,000,000 trainings takes.

Then digits: how many client trips, and how many simulated seconds, FedAvg and FedBuff take to the
target, by how many clients train at a time. Buffers of 4, half-normal durations, weights
(1 + staleness) ** -0.5, a server with momentum, as FLSim's examples have them; the median of three
seeds.
"""

import argparse
import functools
import json
import time
from typing import Any

import jax
import numpy as np
import optax

import fedjax_lite as fl
from benchmarks.timing import interleaved, machine

SEEDS, TARGET, NUM_CLIENTS, BUFFER = range(3), 0.9, 400, 4
CONCURRENCY = (4, 40, 120, 400)  # Staleness is about the concurrency divided by the buffer.
DURATIONS = fl.durations.half_normal(1.0)


def measure_step(num_clients: int, num_versions: int) -> dict[str, Any]:
    """The cost of a step beside a synchronous round."""
    rng = np.random.default_rng(0)
    clients = {
        i: {
            "x": rng.normal(size=(100, 28, 28, 1)).astype(np.float32),
            "y": rng.integers(0, 62, 100).astype(np.int32),
        }
        for i in range(num_clients)
    }
    population = fl.FederatedDataset.from_clients(clients).resident()
    model, ids = fl.models.emnist_dense(), np.arange(num_clients)
    staleness = (ids % num_versions).astype(np.int32)
    build = functools.partial(fl.fed_avg, model, optax.sgd(0.1), batch_size=20)
    algorithms = {
        "synchronous": (build(), fl.cohort_of(population, ids)),
        "asynchronous": (
            build(max_staleness=num_versions - 1, pipeline=fl.polynomial_staleness(0.5)),
            fl.cohort_of(population, ids, staleness=staleness),
        ),
    }
    rounds, states = {}, {}
    for name, (algorithm, cohort) in algorithms.items():
        # As in training, a round reuses the memory of the state before.
        step = jax.jit(algorithm.round, donate_argnames="state")
        states[name] = algorithm.init(jax.random.key(0))

        def run(name: str = name, step: Any = step, cohort: fl.Cohort = cohort) -> Any:
            states[name], info = step(jax.random.key(1), state=states[name], cohort=cohort)
            return info

        rounds[name] = run
    timings = interleaved(rounds, repeats=15)
    seconds = {name: timing.median for name, timing in timings.items()}
    return {
        "cost": round(seconds["asynchronous"] / seconds["synchronous"], 3),
        "ring_versions": num_versions,
        "client_updates_per_s": round(num_clients / seconds["asynchronous"], 1),
    }


def measure_schedule(num_trainings: int) -> dict[str, Any]:
    """How long the schedule of so many trainings takes."""
    began = time.perf_counter()
    fl.samplers.fed_buff(
        10 * num_trainings,
        num_trainings // BUFFER,
        concurrency=1000,
        buffer_size=BUFFER,
        durations=DURATIONS,
    )
    return {"schedule_s": round(time.perf_counter() - began, 2), "trainings": num_trainings}


def measure_training(concurrency: int | None, num_rounds: int) -> dict[str, Any]:
    """FedBuff on digits, or FedAvg, whose rounds take as long as the slowest client."""
    dataset, held_out = fl.data.digits(num_clients=NUM_CLIENTS, alpha=1.0, min_examples=0, seed=0)
    model = fl.models.mlp((64,), (64,), 10)
    rows = []
    for seed in SEEDS:
        sampler = _sampler(concurrency, num_rounds, seed)
        algorithm = fl.fed_avg(
            *(model, optax.sgd(0.1), optax.sgd(0.3, momentum=0.9)),
            batch_size=4,
            num_epochs=2,
            weighting="uniform",
            pipeline=fl.polynomial_staleness(0.5),
            reducer=fl.weighted_mean(denominator=BUFFER),
            max_staleness=sampler.max_staleness,
        )
        result = fl.train(
            algorithm,
            dataset,
            sampler,
            num_rounds,
            key=jax.random.key(seed),
            evaluate=lambda state: fl.evaluate(model, state, held_out),
            eval_every=5,
            stop=[fl.stopping.target("accuracy", TARGET)],
        )
        last, reached = result.history.rounds[-1], result.stopped is not None
        rows.append(
            {
                "client_trips": BUFFER * last["round"] if reached else np.inf,
                "wall_clock": last["wall_clock"] if reached else np.inf,
                "staleness": np.mean([row.get("staleness", 0) for row in result.history.rounds]),
                "ring_versions": sampler.max_staleness + 1,
            }
        )
    found = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
    numbers = {name: round(x, 2) if np.isfinite(x) else None for name, x in found.items()}
    algorithm_name = "fed_avg" if concurrency is None else "fed_buff"
    return {"algorithm": algorithm_name, "concurrency": concurrency or BUFFER, **numbers}


def _sampler(concurrency: int | None, num_rounds: int, seed: int) -> fl.samplers.Sampler:
    if concurrency is None:
        return fl.samplers.timed(fl.samplers.uniform(NUM_CLIENTS, BUFFER), DURATIONS)
    return fl.samplers.fed_buff(
        *(NUM_CLIENTS, num_rounds),
        concurrency=concurrency,
        buffer_size=BUFFER,
        durations=DURATIONS,
        seed=seed,
    )


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1000, help="the most rounds on digits")
    parser.add_argument("--trainings", type=int, default=1_000_000, help="those of the schedule")
    parser.add_argument("--json", action="store_true", help="print JSON objects")
    options = parser.parse_args()
    fl.configure_cpu()
    if options.json:
        print(json.dumps(machine("fedjax_lite", "jax", "optax")), flush=True)
    for row in (measure_step(20, 10), measure_schedule(options.trainings)):
        print(json.dumps(row) if options.json else row, flush=True)
    if not options.json:
        print(f"\ndigits, to {TARGET}\n{'':10}clients  staleness  versions   trips  seconds")
    for concurrency in (None, *CONCURRENCY):
        row = measure_training(concurrency, options.rounds)
        if options.json:
            print(json.dumps(row), flush=True)
            continue
        told = [row[name] for name in ("staleness", "ring_versions", "client_trips", "wall_clock")]
        shown = "".join(f"{'-' if x is None else x:>10}" for x in told)
        print(f"{row['algorithm']:10}{row['concurrency']:7}{shown}", flush=True)


if __name__ == "__main__":
    main()
