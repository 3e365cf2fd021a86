"""The time from `import` to the first round, against that of a bare loop of the same steps.

    python -m benchmarks.startup [--case NAME ...] [--package DIR] [--json]

Of each case, in fresh processes and in turn: seconds to import (`import_s`), to draw params and
make the server's state (`init_s`), to draw a cohort (`cohort_s`), to trace, lower and compile a
round of FedAvg, and to run it once (`first_round_s`); `total_s` is their sum, and `bare` has the
same of a compiled loop of SGD steps on the same model, without clients. `price` is `trace_s +
lower_s + compile_s` over that of the bare loop. No compilation is read from a cache.
"""

import argparse
import json
import operator
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

CASES = ("tiny", "dense", "cnn", "transformer")
CONTESTANTS = ("ours", "bare")
STAGES = ("import_s", "init_s", "cohort_s", "trace_s", "lower_s", "compile_s", "first_round_s")
COMPILATION = ("trace_s", "lower_s", "compile_s")
_BATCH_SIZE, _RATE, _NUM_CLIENTS, _ROWS = 20, 0.1, 10, 40


class Stopwatch:
    """Seconds by the name of a stage, each from the end of the stage before it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Ends a stage."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._began
        self._began = now


def once(contestant: str, case: str) -> dict[str, float]:
    """The stages of one start, in this process, which has not imported JAX yet."""
    watch = Stopwatch()
    import jax

    import fedjax_lite as fl

    watch.lap("import_s")
    fl.configure_cpu()
    jax.devices()
    model, examples = _problem(case)
    run = {"ours": _ours, "bare": _bare}[contestant]
    run(watch, model, examples)
    return watch.seconds


def _problem(case: str) -> tuple[Any, dict[str, Any]]:
    """The model, and the examples of all clients as NumPy arrays."""
    import numpy as np

    import fedjax_lite as fl

    rng = np.random.default_rng(0)
    rows = _NUM_CLIENTS * _ROWS
    if case == "transformer":
        words = rng.integers(4, 10_000, (rows, 21)).astype(np.int32)
        return fl.models.stackoverflow_transformer(), {"x": words[:, :-1], "y": words[:, 1:]}
    if case == "tiny":
        x = rng.normal(size=(rows, 2)).astype(np.float32)
        return fl.models.halfspace_classifier(), {"x": x, "y": (x[:, 0] > 0).astype(np.float32)}
    x = rng.normal(size=(rows, 28, 28, 1)).astype(np.float32)
    model = fl.models.emnist_dense if case == "dense" else fl.models.emnist_cnn
    return model(), {"x": x, "y": rng.integers(0, 62, rows).astype(np.int32)}


def _ours(watch: Stopwatch, model: Any, examples: dict[str, Any]) -> None:
    """A round of FedAvg over all clients."""
    import jax
    import numpy as np
    import optax

    import fedjax_lite as fl

    clients = np.split(np.arange(_NUM_CLIENTS * _ROWS), _NUM_CLIENTS)
    algorithm = fl.fed_avg(model, optax.sgd(_RATE), batch_size=_BATCH_SIZE)
    watch.lap("other_s")
    state = jax.block_until_ready(algorithm.init(jax.random.key(0)))
    watch.lap("init_s")
    population = fl.FederatedDataset.from_rows(examples, clients).resident()
    cohort = jax.block_until_ready(fl.cohort(jax.random.key(1), population, _NUM_CLIENTS))
    watch.lap("cohort_s")
    _stages(watch, algorithm.round, jax.random.key(2), state, cohort)


def _bare(watch: Stopwatch, model: Any, examples: dict[str, Any]) -> None:
    """As many steps of SGD on batches of all rows, in their order."""
    import jax
    import jax.numpy as jnp

    from fedjax_lite.xla.rewrite import rewritten

    watch.lap("other_s")
    params, model_state = jax.block_until_ready(jax.jit(model.init)(jax.random.key(0)))
    watch.lap("init_s")
    examples = jax.block_until_ready(jax.device_put(examples))
    watch.lap("cohort_s")

    def step(i: jax.Array, params: Any, examples: dict[str, jax.Array], key: jax.Array) -> Any:
        def rows(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, i * _BATCH_SIZE, _BATCH_SIZE)

        batch = {**jax.tree.map(rows, examples), "mask": jnp.ones(_BATCH_SIZE, bool)}

        def loss(params: Any) -> jax.Array:
            losses, _ = model.loss(params, model_state, batch, jax.random.fold_in(key, i))
            return losses.mean()

        return jax.tree.map(lambda p, g: p - _RATE * g, params, jax.grad(loss)(params))

    rewrite = rewritten if jax.default_backend() == "cpu" else lambda step: step

    @jax.jit
    def loop(key: jax.Array, params: Any, examples: dict[str, jax.Array], steps: jax.Array) -> Any:
        body = rewrite(lambda i, params: step(i, params, examples, key))
        return jax.lax.fori_loop(0, steps, body, params)

    steps = jnp.int32(_NUM_CLIENTS * _ROWS // _BATCH_SIZE)
    _stages(watch, loop, jax.random.key(2), params, examples, steps)


def _stages(watch: Stopwatch, function: Any, *args: Any) -> None:
    import jax

    watch.lap("other_s")  # Not a stage: keys, and what was built by the way.
    traced = function.trace(*args)
    watch.lap("trace_s")
    lowered = traced.lower()
    watch.lap("lower_s")
    compiled = lowered.compile()
    watch.lap("compile_s")
    jax.block_until_ready(compiled(*args))
    watch.lap("first_round_s")


def start(contestant: str, case: str, package: str) -> dict[str, float]:
    """`once` in a fresh process, of the package in a folder."""
    environment = {**os.environ, "PYTHONPATH": package, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    # Beside this file lies one of the name of a module that JAX looks for.
    command = [sys.executable, "-P", __file__, "--once", contestant, case]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{contestant} of {case} ended with {ended.returncode}:\n{ended.stderr}")
    return json.loads(ended.stdout)


def measure(case: str, package: str, repeats: int) -> dict[str, Any]:
    """Medians of one case, all contestants in turn."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(repeats):
        for name in CONTESTANTS:
            runs[name].append(start(name, case, package))

    def median(name: str, of: Callable[[Mapping[str, float]], float]) -> float:
        return statistics.median(map(of, runs[name]))

    def stages(name: str) -> dict[str, float]:
        return {
            **{stage: median(name, operator.itemgetter(stage)) for stage in STAGES},
            "total_s": median(name, lambda run: sum(run[stage] for stage in STAGES)),
            "compilation_s": median(name, lambda run: sum(run[stage] for stage in COMPILATION)),
        }

    ours, bare = stages("ours"), stages("bare")
    price = ours["compilation_s"] / bare["compilation_s"]
    return {"case": case, "price": price, **ours, "bare": bare}


def main() -> None:
    """Runs the benchmark and prints its report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--case", choices=CASES, nargs="+", default=CASES)
    parser.add_argument("--repeats", type=int, default=5)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    parser.add_argument("--package", default=root, help="folder that has fedjax_lite in it")
    parser.add_argument("--json", action="store_true", help="print one JSON object per case")
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(once(*options.once)))
        return
    for case in options.case:
        report = measure(case, options.package, options.repeats)
        if options.json:
            from benchmarks.timing import machine

            print(json.dumps(report | machine("fedjax_lite", "jax", "optax")), flush=True)
        else:
            print(f"{case}: price {report['price']:.2f}, {report['total_s']:.2f} s in all")
            for name, seconds in (("ours", report), ("bare", report["bare"])):
                print(f"  {name}: " + ", ".join(f"{s} {seconds[s]:.3f}" for s in STAGES))


if __name__ == "__main__":
    main()
