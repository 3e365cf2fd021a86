"""What a store takes: the most memory of a process that trains with one, beside the same without.

Reported by `python -m benchmarks.cohort --case store`; each run is a process of its own.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import fedjax_lite as fl

NUM_CLIENTS, COHORT, WIDTH = 1000, 100, 500
# FedAvg keeps nothing; SCAFFOLD keeps as much as the params for each client.
RUNS: dict[str, tuple[Callable[..., fl.FederatedAlgorithm], str]] = {
    "without": (fl.fed_avg, "device"),
    "devices": (fl.scaffold, "device"),
    "host": (fl.scaffold, "pinned_host"),
}


def measure_store() -> dict[str, Any]:
    """The report of the case `store`."""
    found = {name: _ask(name) for name in RUNS}
    return {
        "case": "store",
        "store_bytes": found["devices"]["store_bytes"],
        "devices": found["devices"]["devices"],
        **{f"peak_bytes_{name}": run["peak_bytes"] for name, run in found.items()},
    }


def _ask(name: str) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.store", name]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{name} ended with {ended.returncode}:\n{ended.stderr}")
    return json.loads(ended.stdout)


def once(name: str) -> dict[str, int]:
    """Three rounds, each of which reuses the memory of the store before it."""
    fl.configure_cpu()
    factory, memory_kind = RUNS[name]
    rng = np.random.default_rng(0)
    dataset = fl.FederatedDataset.from_rows(
        {
            "x": rng.normal(size=(4 * NUM_CLIENTS, WIDTH)).astype(np.float32),
            "y": rng.integers(0, WIDTH, 4 * NUM_CLIENTS).astype(np.int32),
        },
        np.arange(4 * NUM_CLIENTS).reshape(NUM_CLIENTS, 4),
    )
    model = fl.models.logistic((WIDTH,), WIDTH)
    algorithm = factory(model, optax.sgd(0.1), batch_size=4, memory_kind=memory_kind)
    state = algorithm.init(jax.random.key(0), num_clients=NUM_CLIENTS)
    population = dataset.resident()
    store_bytes = sum(x.nbytes for x in jax.tree.leaves(state.store))
    round = jax.jit(algorithm.round, donate_argnames="state")
    for r in range(3):
        key_cohort, key_round = jax.random.split(jax.random.key(r))
        state, _ = round(key_round, state, fl.cohort(key_cohort, population, COHORT))
    jax.block_until_ready(state)
    # In kilobytes on Linux.
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"store_bytes": store_bytes, "peak_bytes": peak_bytes, "devices": jax.device_count()}


if __name__ == "__main__":
    print(json.dumps(once(sys.argv[1])))
