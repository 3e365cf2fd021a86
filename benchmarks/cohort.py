"""A round of FedAvg against the same work without federation, and against PyTorch.

    python -m benchmarks.cohort [--case NAME] [--json]

For each case: `round_s`, one round on all devices; `bare_s`, one compiled loop of as many SGD
steps of the same size on one device, without clients, deltas or weights; `price`, one round on
one device over `bare_s`; `torch_s`, a plain PyTorch loop over clients and batches, on one
thread and on all, the better of the two. All in one run, in turn, compilation apart.
"""

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import fedjax_lite as fl
from benchmarks.timing import Timing, interleaved, machine
from fedjax_lite.convolution import canonical_convolutions

LEARNING_RATE = 0.1


class Dense(nn.Module):
    """784-200-200-62."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (200, 200):
            x = nn.relu(nn.Dense(width)(x.reshape(x.shape[0], -1)))
        return nn.Dense(62)(x)


class EmnistCNN(nn.Module):
    """Two convolutions, max-pooling and two dense layers; 1,206,590 parameters, dropout off."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (32, 64):
            x = nn.relu(nn.Conv(width, (3, 3), padding="VALID")(x))
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4)).reshape(n, -1)
        return nn.Dense(62)(nn.relu(nn.Dense(128)(x)))


def torch_dense() -> torch.nn.Module:
    """The same dense model."""
    return torch.nn.Sequential(
        *(torch.nn.Flatten(), torch.nn.Linear(784, 200), torch.nn.ReLU()),
        *(torch.nn.Linear(200, 200), torch.nn.ReLU(), torch.nn.Linear(200, 62)),
    )


def torch_cnn() -> torch.nn.Module:
    """The same CNN."""
    return torch.nn.Sequential(
        *(torch.nn.Conv2d(1, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 64, 3), torch.nn.ReLU()),
        *(torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(9216, 128), torch.nn.ReLU()),
        torch.nn.Linear(128, 62),
    )


class Case(NamedTuple):
    """A cohort of clients, all of which take part."""

    module: nn.Module
    torch_module: Callable[[], torch.nn.Module]
    sizes: np.ndarray
    batch_size: int = 20


def lognormal(num_clients: int, mean: float, sigma: float) -> np.ndarray:
    """Client sizes with a heavy tail, at least 1."""
    draws = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, num_clients)
    return np.maximum(draws.round().astype(int), 1)


CASES = {
    "dense": Case(Dense(), torch_dense, np.full(100, 100)),
    "tiny": Case(Dense(), torch_dense, np.full(500, 20)),
    "ragged": Case(Dense(), torch_dense, lognormal(100, 100, 1.0)),
    "cnn": Case(EmnistCNN(), torch_cnn, np.full(10, 100)),
    "cnn_ragged": Case(EmnistCNN(), torch_cnn, lognormal(10, 100, 1.0)),
}


def dataset(case: Case) -> fl.FederatedDataset:
    """Random images and labels in EMNIST's shapes."""
    rng = np.random.default_rng(1)
    rows = int(case.sizes.sum())
    examples = {
        "x": rng.normal(size=(rows, 28, 28, 1)).astype(np.float32),
        "y": rng.integers(0, 62, rows).astype(np.int32),
    }
    return fl.FederatedDataset.from_rows(
        examples, np.split(np.arange(rows), np.cumsum(case.sizes)[:-1])
    )


def cross_entropy(logits: jax.Array, batch: Any) -> jax.Array:
    """One loss per example."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def our_round(case: Case, data: fl.FederatedDataset, num_devices: int | None) -> tuple[Any, float]:
    """A round over all clients on so many devices, and its seconds of compilation."""
    mesh = fl.clients_mesh(num_devices)
    model = fl.linen_model(case.module, jnp.zeros((1, 28, 28, 1)), cross_entropy)
    algorithm = fl.fed_avg(model, optax.sgd(LEARNING_RATE), batch_size=case.batch_size, mesh=mesh)
    state = algorithm.init(jax.random.key(0))
    cohort = fl.cohort(jax.random.key(1), data.resident(mesh), case.sizes.size)
    args = fl.replicate((jax.random.key(2), state, cohort), mesh)
    began = time.perf_counter()
    compiled = algorithm.round.lower(*args).compile()  # type: ignore[attr-defined]
    return lambda: compiled(*args), time.perf_counter() - began


def bare(case: Case, num_steps: int) -> Callable[[], Any]:
    """SGD steps of the same size in one compiled loop on one device, and nothing else."""
    rows = 50 * case.batch_size
    x = jax.random.normal(jax.random.key(0), (rows, 28, 28, 1))
    y = jax.random.randint(jax.random.key(1), (rows,), 0, 62)
    params = case.module.init(jax.random.key(2), x[:1])

    def step(i: jax.Array, params: Any, x: jax.Array, y: jax.Array) -> Any:
        start = (i % 50) * case.batch_size
        batch = {
            "x": jax.lax.dynamic_slice_in_dim(x, start, case.batch_size),
            "y": jax.lax.dynamic_slice_in_dim(y, start, case.batch_size),
        }

        def loss(params: Any) -> jax.Array:
            logits: Any = case.module.apply(params, batch["x"])
            return cross_entropy(logits, batch).mean()

        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, jax.grad(loss)(params))

    @jax.jit
    def loop(params: Any, x: jax.Array, y: jax.Array, num_steps: jax.Array) -> Any:
        body = canonical_convolutions(lambda i, params: step(i, params, x, y))
        return jax.lax.fori_loop(0, num_steps, body, params)

    args = jax.device_put((params, x, y, jnp.int32(num_steps)), jax.devices()[0])
    return lambda: loop(*args)


def torch_round(case: Case, data: fl.FederatedDataset) -> Callable[[int], None]:
    """The plain loop: a copy of the model for each client, SGD, the weighted mean delta."""
    server = case.torch_module()
    clients = [
        (
            torch.tensor(client["x"]).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(client["y"]).long(),
        )
        for client in map(data.__getitem__, data.client_ids)
    ]

    def run(threads: int) -> None:
        torch.set_num_threads(threads)
        totals = [torch.zeros_like(p) for p in server.parameters()]
        for x, y in clients:
            local = copy.deepcopy(server)
            optimizer = torch.optim.SGD(local.parameters(), lr=LEARNING_RATE)
            order = torch.randperm(len(y))
            for rows in order.split(case.batch_size):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(local(x[rows]), y[rows]).backward()
                optimizer.step()
            with torch.no_grad():
                pairs = zip(totals, server.parameters(), local.parameters(), strict=True)
                for total, before, after in pairs:
                    total += len(y) * (before - after)

    return run


def measure(name: str, repeats: int) -> dict[str, Any]:
    """One case, all contestants in turn."""
    case = CASES[name]
    data = dataset(case)
    num_steps = int((-(-case.sizes // case.batch_size)).sum())
    ours, compile_s = our_round(case, data, None)
    ours_single, _ = our_round(case, data, 1)
    loop = torch_round(case, data)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    times = interleaved(
        {
            "ours": ours,
            "ours, one device": ours_single,
            "bare, one device": bare(case, num_steps),
            "PyTorch, 1 thread": lambda: loop(1),
            f"PyTorch, {cores} threads": lambda: loop(cores or 1),
        },
        repeats,
    )
    for contestant, timing in times.items():
        print(f"{name}: {contestant}: {timing} s per round", file=sys.stderr)
    torch_time: Timing = min(
        (timing for contestant, timing in times.items() if contestant.startswith("PyTorch")),
        key=lambda timing: timing.median,
    )
    round_s, bare_s = times["ours"].median, times["bare, one device"].median
    return {
        "case": name,
        "clients": int(case.sizes.size),
        "real_steps": num_steps,
        "round_s": round_s,
        "bare_s": bare_s,
        "price": times["ours, one device"].median / bare_s,
        "torch_s": torch_time.median,
        "speedup_torch": torch_time.median / round_s,
        "client_updates_per_s": case.sizes.size / round_s,
        "compile_s": compile_s,
        "devices": jax.device_count(),
    }


def main() -> None:
    """Runs the benchmark and prints its report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cohort", description=__doc__)
    parser.add_argument("--case", choices=CASES, help="one case; all of them by default")
    parser.add_argument("--repeats", type=int, default=5, help="repeats, at least 5")
    parser.add_argument("--json", action="store_true", help="print one JSON object per case")
    options = parser.parse_args()
    if options.repeats < 5:
        parser.error("--repeats must be at least 5")
    fl.configure_cpu()
    for name in [options.case] if options.case else CASES:
        report = measure(name, options.repeats)
        if options.json:
            print(json.dumps(report | machine("fedjax_lite", "jax", "optax", "torch")), flush=True)
        else:
            print(
                f"{name}: {report['client_updates_per_s']:.0f} client updates/s,"
                f" {report['speedup_torch']:.1f} times PyTorch, price {report['price']:.2f}"
            )


if __name__ == "__main__":
    main()
