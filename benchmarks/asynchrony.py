"""Asynchronous training: what a step of the server costs, and what staleness does to accuracy.

    python -m benchmarks.asynchrony [--mnist FOLDER] [--trips N] [--small] [--json]

`cost` is the time of a step whose clients start from `ring_versions` different versions of the
params, interleaved, beside that of a synchronous round of as many clients, on the dense model of
EMNIST. `schedule_s` is how long the schedule of 1,000,000 trainings takes.

Then how many client trips, and how many simulated seconds, FedBuff and FedAvg take to a target, by
how many clients train at a time: FedAvg has them all in one round, and FedBuff a buffer of a few.
On digits, of 400 clients, and on MNIST, of 1,000 clients with equal numbers of images, at random
(`iid`) or in two shards of one class each (`shards`). Half-normal durations, weights
(1 + staleness) ** -0.5, a server with momentum, as FLSim's examples have them; the median of three
seeds.
"""

import argparse
import functools
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import fedjax_lite as fl
from benchmarks.timing import interleaved, machine, rounds

SEEDS = range(3)
DURATIONS = fl.durations.half_normal(1.0)


class Task(NamedTuple):
    """What is learned, and by how many clients at a time."""

    name: str
    dataset: fl.FederatedDataset
    held_out: dict[str, np.ndarray]
    model: fl.Model
    options: dict[str, Any]
    buffer_size: int
    concurrency: Sequence[int]  # Staleness is about this divided by the size of the buffer.
    target: float = 0.9


def digits() -> Task:
    """400 clients with few digits each."""
    dataset, held_out = fl.data.digits(num_clients=400, alpha=1.0, min_examples=0, seed=0)
    model, options = fl.models.mlp((64,), (64,), 10), {"batch_size": 4, "num_epochs": 2}
    return Task("digits", dataset, held_out, model, options, 4, (4, 40, 120, 400))


def mnist(folder: str, how: str, num_clients: int = 1000) -> Task:
    """Clients with equal numbers of images, at random or of two shards."""
    images, held_out = fl.data.mnist(folder), fl.data.mnist(folder, "test")
    rows = (
        fl.partition.iid(len(images["y"]), num_clients, seed=0)
        if how == "iid"
        else fl.partition.shards(images["y"], num_clients, shards_per_client=2, seed=0)
    )
    dataset = fl.FederatedDataset.from_rows(images, rows)
    model, options = fl.models.mlp((28, 28, 1), (200,), 10), {"batch_size": 20, "num_epochs": 2}
    concurrency = tuple(n for n in (10, 100, 300, 1000) if n <= num_clients)
    return Task(f"mnist, {how}", dataset, held_out, model, options, 10, concurrency)


def measure_step(num_clients: int, num_versions: int, repeats: int = 15) -> dict[str, Any]:
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
    contestants = {
        name: rounds(algorithm, algorithm.init(jax.random.key(0)), cohort)
        for name, (algorithm, cohort) in algorithms.items()
    }
    timings = interleaved(contestants, repeats)
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
        num_trainings // 4,
        concurrency=1000,
        buffer_size=4,
        durations=DURATIONS,
    )
    return {"schedule_s": round(time.perf_counter() - began, 2), "trainings": num_trainings}


def measure_training(
    task: Task, algorithm_name: str, concurrency: int, num_trips: int, seeds: Sequence[int] = SEEDS
) -> dict[str, Any]:
    """Client trips to the target, by FedBuff or by FedAvg."""
    per_round = task.buffer_size if algorithm_name == "fed_buff" else concurrency
    num_rounds = max(num_trips // per_round, 1)
    rows = []
    for seed in seeds:
        sampler = _sampler(task, algorithm_name, concurrency, num_rounds, seed)
        algorithm = fl.fed_avg(
            *(task.model, optax.sgd(0.1), optax.sgd(0.3, momentum=0.9)),
            weighting="uniform",
            pipeline=fl.polynomial_staleness(0.5),
            reducer=fl.weighted_mean(denominator=per_round),
            max_staleness=sampler.max_staleness,
            **task.options,
        )
        result = fl.train(
            algorithm,
            task.dataset,
            sampler,
            num_rounds,
            key=jax.random.key(seed),
            evaluate=lambda state: fl.evaluate(task.model, state, task.held_out),
            eval_every=5,
            stop=[fl.stopping.target("accuracy", task.target)],
        )
        last, reached = result.history.rounds[-1], result.stopped is not None
        rows.append(
            {
                "client_trips": per_round * last["round"] if reached else np.inf,
                "wall_clock": last["wall_clock"] if reached else np.inf,
                "accuracy": result.history.evaluations[-1]["accuracy"],
                "staleness": np.mean([row.get("staleness", 0) for row in result.history.rounds]),
                "ring_versions": sampler.max_staleness + 1,
            }
        )
    found = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
    numbers = {name: round(x, 3) if np.isfinite(x) else None for name, x in found.items()}
    named = {"task": task.name, "algorithm": algorithm_name, "concurrency": concurrency}
    return {**named, **numbers}


def _sampler(
    task: Task, algorithm_name: str, concurrency: int, num_rounds: int, seed: int
) -> fl.samplers.Sampler:
    num_clients = task.dataset.num_clients
    if algorithm_name == "fed_avg":
        return fl.samplers.timed(fl.samplers.uniform(num_clients, concurrency), DURATIONS)
    return fl.samplers.fed_buff(
        *(num_clients, num_rounds),
        concurrency=concurrency,
        buffer_size=task.buffer_size,
        durations=DURATIONS,
        seed=seed,
    )


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mnist", metavar="FOLDER", help="of MNIST's four IDX files")
    parser.add_argument("--trips", type=int, default=20_000, help="the most client trips of a run")
    parser.add_argument("--trainings", type=int, default=1_000_000, help="those of the schedule")
    parser.add_argument("--small", action="store_true", help="the least that runs everything")
    parser.add_argument("--json", action="store_true", help="print JSON objects")
    options = parser.parse_args()
    fl.configure_cpu()
    if options.json:
        print(json.dumps(machine("fedjax_lite", "jax", "optax")), flush=True)
    num_trainings = 400 if options.small else options.trainings
    for row in (measure_step(20, 10), measure_schedule(num_trainings)):
        print(json.dumps(row) if options.json else row, flush=True)
    tasks = [digits()]
    if options.mnist:
        sizes = {"num_clients": 100} if options.small else {}
        tasks += [mnist(options.mnist, how, **sizes) for how in ("iid", "shards")]
    for task in tasks:
        if not options.json:
            columns = "concurrency  staleness  versions  accuracy   trips  seconds"
            print(f"\n{task.name}, to {task.target}\n{'':10}{columns}")
        for algorithm_name in ("fed_avg", "fed_buff"):
            for concurrency in task.concurrency[: 2 if options.small else None]:
                few: Any = (200, [0]) if options.small else (options.trips,)
                row = measure_training(task, algorithm_name, concurrency, *few)
                if options.json:
                    print(json.dumps(row), flush=True)
                    continue
                told = ("concurrency", "staleness", "ring_versions", "accuracy", "client_trips")
                shown = [row[name] for name in (*told, "wall_clock")]
                line = "".join(f"{'-' if x is None else x:>10}" for x in shown)
                print(f"{row['algorithm']:10}{line}", flush=True)


if __name__ == "__main__":
    main()
