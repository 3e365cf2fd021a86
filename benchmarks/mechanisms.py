"""What privacy costs: the time of a round beside that of one without.

    python -m benchmarks.mechanisms [--mechanism NAME ...] [--clients N] [--repeats N] [--json]

A round of FedAvg with `fl.models.emnist_dense` (209,662 params), of clients with 100 examples, in
batches of 20. Rounds are timed in turn; `cost` is the fastest one in units of the fastest without
privacy, `compile_s` the time until the first has ended.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import fedjax_lite as fl
from benchmarks.timing import interleaved, machine

NUM_EXAMPLES, BATCH_SIZE = 100, 20
NUM_BANDS = 8
_COEFFICIENTS = [0.5**i for i in range(NUM_BANDS)]  # Any: they do not change the time.


def _central(*transforms: fl.UpdateTransform) -> dict[str, Any]:
    pipeline = fl.chain(fl.cap_weight(1.0), *transforms)
    return {"pipeline": pipeline, "reducer": fl.weighted_mean(denominator=100.0)}


_toeplitz = functools.partial(fl.toeplitz_noise, 1.0, 100, NUM_BANDS, coefficients=_COEFFICIENTS)
MECHANISMS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "clip_by_norm": lambda: _central(fl.clip_by_norm(1.0)),
    "clip_per_array": lambda: _central(fl.clip_per_array(1.0)),
    "gaussian_noise": lambda: _central(fl.clip_by_norm(1.0), fl.gaussian_noise(1.0)),
    "adaptive_clip": lambda: _central(
        fl.adaptive_clip(count_noise=5.0, denominator=100.0), fl.gaussian_noise(1.0)
    ),
    "toeplitz_noise": lambda: _central(fl.clip_by_norm(1.0), _toeplitz()),
    "tree_noise": lambda: _central(fl.clip_by_norm(1.0), fl.tree_noise(1.0, 100)),
    "local_gaussian_noise": lambda: {"pipeline": fl.local_gaussian_noise(1.0, 1.0)},
    "dp_sgd": dict,
}


def round_of(name: str, dataset: fl.FederatedDataset) -> tuple[Callable[[], Any], float]:
    """A round of all clients, and the seconds that its first run took."""
    model = fl.models.emnist_dense()
    if name == "dp_sgd":
        model = fl.dp_sgd(model, 1.0, 1.0)
    algorithm = fl.fed_avg(model, optax.sgd(0.1), batch_size=BATCH_SIZE, **MECHANISMS[name]())
    state = algorithm.init(jax.random.key(0))
    cohort = fl.cohort(jax.random.key(1), dataset.resident(), dataset.num_clients)

    def run() -> Any:
        return algorithm.round(jax.random.key(2), state, cohort)

    began = time.perf_counter()
    jax.block_until_ready(run())
    return run, time.perf_counter() - began


def measure(names: list[str], num_clients: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each mechanism."""
    rng = np.random.default_rng(0)
    shape = (num_clients, NUM_EXAMPLES)
    images = rng.normal(size=(*shape, 28, 28, 1)).astype(np.float32)
    labels = rng.integers(0, 62, shape).astype(np.int32)
    clients = [{"x": x, "y": y} for x, y in zip(images, labels, strict=True)]
    dataset = fl.FederatedDataset.from_clients(clients)
    rounds = {name: round_of(name, dataset) for name in dict.fromkeys(["none", *names])}
    timings = interleaved({name: run for name, (run, _) in rounds.items()}, repeats)
    return [
        {
            "mechanism": name,
            "round_s": timings[name].fastest,
            "cost": round(timings[name].fastest / timings["none"].fastest, 3),
            "compile_s": round(rounds[name][1], 2),
        }
        for name in rounds
    ]


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mechanism", nargs="+", choices=MECHANISMS, default=list(MECHANISMS))
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print one JSON object per mechanism")
    options = parser.parse_args()
    fl.configure_cpu()
    if options.json:
        print(json.dumps(machine("fedjax_lite", "jax", "optax")), flush=True)
    for row in measure(options.mechanism, options.clients, options.repeats):
        text = f"{row['mechanism']:20} {row['round_s'] * 1e3:8.2f} ms  {row['cost']:6.3f}"
        print(json.dumps(row) if options.json else text, flush=True)


if __name__ == "__main__":
    main()
