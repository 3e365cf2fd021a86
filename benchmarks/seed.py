"""The tutorial simulation against the PyTorch loop that it reimplements.

    python -m benchmarks.seed [--rounds N] [--json]

Both sides run the same simulation: cohorts of 20 to 29 of 100 clients, 5 to 9 batches of 1000
points per client, summed gradients, one step of Adam, an evaluation on 1000 points per round.
`on_the_fly` draws all points as they are needed; `resident` has every client's points ready.
"""

import argparse
import copy
import functools
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
import torch

import fedjax_lite as fl
from benchmarks.timing import Timing, interleaved, machine, usable_cores
from fedjax_lite.experiments.quickstart import Simulation, halfspace_simulation, simulation

BATCH_SIZE, NUM_CLIENTS = 1000, 100
Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Classifier(torch.nn.Module):
    """One linear layer, LeakyReLU, sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(torch.nn.functional.leaky_relu(self.linear(x), 0.2))


def torch_points() -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of labelled points."""
    x = 2 * torch.rand(BATCH_SIZE, 2) - 1
    return x, (0.3 + 0.2 * x[:, :1] + 0.8 * x[:, 1:] > 0).float()


def torch_fresh_batches() -> Batches:
    """A client's batches, drawn now."""
    return [torch_points() for _ in range(random.randint(5, 9))]


def torch_loop(
    num_rounds: int,
    draw_client: Callable[[int], Batches],
    draw_points: Callable[[], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """The tutorial: a loop over clients and batches, with a copy of the model for each client."""
    server = Classifier()
    optimizer = torch.optim.Adam(server.parameters(), lr=1.0)
    criterion = torch.nn.BCELoss()
    for _ in range(num_rounds):
        x, y = draw_points()
        with torch.no_grad():
            probability = server(x)
            criterion(probability, y).item()
            ((probability > 0.5) == (y > 0.5)).float().mean().item()
        gradients = []
        for client_id in random.sample(range(NUM_CLIENTS), random.randint(20, 29)):
            client = copy.deepcopy(server)
            client.zero_grad()
            for x, y in draw_client(client_id):
                criterion(client(x), y).backward()
            gradients.append([parameter.grad for parameter in client.parameters()])
        optimizer.zero_grad()
        for parameter, *parts in zip(server.parameters(), *gradients, strict=True):
            parameter.grad = torch.stack(parts).sum(0)
        optimizer.step()


def resident_simulation(data: dict[int, dict[str, np.ndarray]]) -> Simulation:
    """Ours, with the clients' points on the device beforehand."""
    model = fl.models.halfspace_classifier()
    algorithm = fl.fed_sgd(model, optax.adam(1.0), reduction="sum", batch_size=BATCH_SIZE)
    population = fl.FederatedDataset.from_clients(data).resident()
    points = jax.device_get(fl.data.halfspace_batch(jax.random.key(7), BATCH_SIZE))
    return simulation(model, algorithm, population, lambda key: points)


def compiled(task: Simulation, num_rounds: int) -> tuple[Callable[[], Any], float]:
    """All rounds as one program, and the seconds that it took to compile."""

    @jax.jit
    def run(key: jax.Array, state: Any, population: Any) -> Any:
        def one(state: Any, _: None) -> Any:
            return task.round(key, state, population)

        return jax.lax.scan(one, state, length=num_rounds)

    args = fl.replicate((jax.random.key(0), task.init(jax.random.key(1)), task.population))
    began = time.perf_counter()
    executable = run.lower(*args).compile()
    return functools.partial(executable, *args), time.perf_counter() - began


def compare(
    ours: Callable[[], Any], loop: Callable[[], None], num_rounds: int, repeats: int
) -> tuple[dict[str, Any], dict[str, Timing]]:
    """Ours against the loop on one thread and on all; the loop's best counts."""

    def threads(count: int) -> None:
        torch.set_num_threads(count)
        loop()

    cores = usable_cores()
    times = interleaved(
        {
            "ours": ours,
            "PyTorch, 1 thread": lambda: threads(1),
            f"PyTorch, {cores} threads": lambda: threads(cores),
        },
        repeats,
    )
    per_round = {name: Timing(*(s / num_rounds for s in timing)) for name, timing in times.items()}
    ours_time = per_round.pop("ours")
    torch_time = min(per_round.values(), key=lambda timing: timing.median)
    result = {
        "torch_s_per_round": torch_time.median,
        "ours_s_per_round": ours_time.median,
        "speedup": torch_time.median / ours_time.median,
        "torch_spread": torch_time[1:],
        "ours_spread": ours_time[1:],
    }
    per_round["ours"] = ours_time
    return result, per_round


def main() -> None:
    """Runs the benchmark and prints its report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="rounds of each repeat")
    parser.add_argument("--repeats", type=int, default=5, help="repeats, at least 5")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.rounds < 1 or options.repeats < 5:
        parser.error("--rounds must be at least 1 and --repeats at least 5")
    fl.configure_cpu()

    rng = np.random.default_rng(0)
    batches = {i: [torch_points() for _ in range(rng.integers(5, 10))] for i in range(NUM_CLIENTS)}
    data = {
        i: {
            "x": np.concatenate([x.numpy() for x, _ in parts]),
            "y": np.concatenate([y.numpy()[:, 0] for _, y in parts]),
        }
        for i, parts in batches.items()
    }
    points = torch_points()
    modes = {
        "on_the_fly": (
            halfspace_simulation(),
            functools.partial(
                torch_loop, options.rounds, lambda i: torch_fresh_batches(), torch_points
            ),
        ),
        "resident": (
            resident_simulation(data),
            functools.partial(torch_loop, options.rounds, batches.__getitem__, lambda: points),
        ),
    }
    report: dict[str, Any] = {"rounds": options.rounds, "repeats": options.repeats}
    for mode, (task, loop) in modes.items():
        ours, compile_s = compiled(task, options.rounds)
        report[mode], times = compare(ours, loop, options.rounds, options.repeats)
        report[mode]["compile_s"] = compile_s
        for name, timing in times.items():
            print(f"{mode}: {name}: {timing} s per round", file=sys.stderr)
    report["compile_s"] = sum(report[mode]["compile_s"] for mode in modes)
    report |= machine("fedjax_lite", "jax", "optax", "torch")
    if options.json:
        print(json.dumps(report))
        return
    print(f"{report['device']}, {report['processor']}, {report['versions']}")
    for mode in modes:
        print(
            f"{mode}: {report[mode]['speedup']:.1f} times faster than PyTorch;"
            f" compiled in {report[mode]['compile_s']:.2f} s"
        )


if __name__ == "__main__":
    main()
