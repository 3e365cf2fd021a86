"""What a store takes: the most memory of a process that trains with one, beside the same without.

Reported by `python -m benchmarks.cohort --case store`; each run is a process of its own.
"""

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import fedjax_lite as fl

COHORT, WIDTH, NUM_ROUNDS = 100, 500, 3
# FedAvg keeps nothing; SCAFFOLD keeps as much as the params, 1 MB, for each of so many clients.
RUNS: dict[str, tuple[Callable[..., fl.FederatedAlgorithm], str, int]] = {
    "without": (fl.fed_avg, "device", 1000),
    "without_10x": (fl.fed_avg, "device", 10_000),
    "devices": (fl.scaffold, "device", 1000),
    "host": (fl.scaffold, "pinned_host", 1000),
    "file": (fl.scaffold, "file", 10_000),
}


def measure_store() -> dict[str, Any]:
    """The report of the case `store`."""
    found = {name: _ask(name) for name in RUNS}
    return {
        "case": "store",
        "store_bytes": found["devices"]["store_bytes"],
        "store_bytes_file": found["file"]["store_bytes"],
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
    factory, kind, num_clients = RUNS[name]
    rng = np.random.default_rng(0)
    dataset = fl.FederatedDataset.from_rows(
        {
            "x": rng.normal(size=(4 * num_clients, WIDTH)).astype(np.float32),
            "y": rng.integers(0, WIDTH, 4 * num_clients).astype(np.int32),
        },
        np.arange(4 * num_clients).reshape(num_clients, 4),
    )
    model = fl.models.logistic((WIDTH,), WIDTH)
    memory_kind = "device" if kind == "file" else kind
    algorithm = factory(model, optax.sgd(0.1), batch_size=4, memory_kind=memory_kind)
    one = algorithm.init(jax.random.key(0), num_clients=1)
    store_bytes = num_clients * sum(x.nbytes for x in jax.tree.leaves(one.store))
    with tempfile.TemporaryDirectory() as folder:
        # Otherwise drawn in there, as its caller's would be copied.
        state = fl.store_in_file(one, folder, num_clients) if kind == "file" else None
        fl.train(
            algorithm,
            dataset,
            fl.samplers.uniform(num_clients, COHORT),
            NUM_ROUNDS,
            key=jax.random.key(1),
            state=state,
        )
    # In kilobytes on Linux.
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"store_bytes": store_bytes, "peak_bytes": peak_bytes, "devices": jax.device_count()}


if __name__ == "__main__":
    print(json.dumps(once(sys.argv[1])))
