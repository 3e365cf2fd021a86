"""What a machine with an accelerator answers in a few minutes, the most valuable question first.

    python -m benchmarks.accelerator [--minutes M] [--question NAME ...] [--small] [--out FILE]
    python -m benchmarks.accelerator --compile-only [--minutes M] [--lanes N ...] [--json]

Each question runs in a process of its own, for as long as it may and until the minutes are up. Its
answers are lines of JSON, on stdout and in the file, written as they come, first the machine and
last how it ended: nothing that has been measured is lost, whatever comes after it. `--small` asks
the same of a few small clients, which shows on a CPU that the questions can be asked.

`--compile-only` needs no accelerator: see `ahead_of_time.py`.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_lite as fl
from benchmarks import ahead_of_time
from benchmarks.cases import CASES, LEARNING_RATE, Case, dataset, initial_params
from benchmarks.timing import interleaved, machine

Row = dict[str, Any]
_ROOT = Path(__file__).parents[1]
# Of the tests, those of numbers: what runs inside of a round, against independent references.
_TESTS = ("reference", "algorithms", "runner", "updates", "store", "drift", "precision", "random")


class Question(NamedTuple):
    """What is asked.

    Attributes:
      ask: Yields answers, given whether to ask it of something small.
      most_s: Seconds after which it is cut off.
      settings: Environments to ask it in, by name, each in a process of its own.
    """

    ask: Callable[[bool], Iterator[Row]]
    most_s: float
    settings: Mapping[str, Mapping[str, str]] = {"default": {}}


def case_of(name: str, small: bool) -> Case:
    """A case of `benchmarks.cohort`; small, a few clients of it."""
    case = CASES[name]
    return case._replace(sizes=np.minimum(case.sizes, 2 * case.batch_size)[:4]) if small else case


def lanes_of(case: Case, *lanes: int) -> list[int]:
    """Numbers of lanes, up to that of the clients."""
    return sorted({min(n, case.sizes.size) for n in lanes})


def round_of(
    case: Case, lanes: int, data: Any, params: Any, **options: Any
) -> tuple[Callable[[], Any], Row]:
    """A compiled round over all clients, and what it took to compile."""
    algorithm = fl.fed_avg(
        case.model(),
        optax.sgd(LEARNING_RATE),
        batch_size=case.batch_size,
        lanes=lanes,
        mesh=fl.clients_mesh(1),
        **options,
    )
    drawn = fl.cohort(jax.random.key(1), data, case.sizes.size)
    args = jax.device_put((jax.random.key(2), algorithm.init(params), drawn), jax.devices()[0])
    began = time.perf_counter()
    compiled = algorithm.round.lower(*args).compile()  # type: ignore[attr-defined]
    compile_s = time.perf_counter() - began
    temp_bytes = compiled.memory_analysis().temp_size_in_bytes
    return functools.partial(compiled, *args), {"compile_s": compile_s, "temp_bytes": temp_bytes}


def rounds(small: bool, names: tuple[str, ...], *lanes: int, **options: Any) -> Iterator[Row]:
    """Seconds of a round of each case, at each number of lanes."""
    for name in names:
        case = case_of(name, small)
        data, params = dataset(case).resident(fl.clients_mesh(1)), initial_params(case)
        for chosen in lanes_of(case, *lanes):
            run, row = round_of(case, chosen, data, params, **options)
            timing = interleaved({"round": run}, 5)["round"]
            per_s = case.sizes.size / timing.median
            row |= {"case": name, "lanes": chosen, "round_s": timing.median, "per_s": per_s}
            yield {**row, **options, "fastest_s": timing.fastest}


def ask_tests(small: bool) -> Iterator[Row]:
    """The tests of numbers, on the accelerator."""
    tests = ["tests/test_precision.py"] if small else [f"tests/test_{name}.py" for name in _TESTS]
    processes = "1" if small else "6"
    command = [sys.executable, "-m", "pytest", *tests, "-n", processes, "-vv", "--maxfail=20"]
    # Plugins that write, or that warn where they are not needed, which fails.
    command += ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True)
    passed, lines = 0, collections.deque[str](maxlen=20)
    for line in process.stdout or ():
        lines.append(line.rstrip()[:500])
        passed += " PASSED " in line
        if "FAILED" in line or "ERROR" in line or line.startswith("E  "):
            yield {"line": lines[-1]}
        elif " PASSED " in line and passed % 50 == 0:
            yield {"passed": passed, "seconds": time.perf_counter() - began}
    seconds = time.perf_counter() - began
    yield {"passed": passed, "ended": list(lines), "rc": process.wait(), "seconds": seconds}


def ask_peers(small: bool, name: str) -> Iterator[Row]:
    """A case against FedJAX and PyTorch, on the same card."""
    from benchmarks import cohort  # And PyTorch.

    CASES[name] = case = case_of(name, small)
    yield cohort.measure(name, 5, lanes_of(case, 50, 100))


def ask_loops(small: bool) -> Iterator[Row]:
    """Loops whose length is known when the round runs, and when it is compiled."""
    for differentiable in (False, True):
        yield from rounds(small, ("dense", "pfl"), 50, differentiable=differentiable)


def ask_precision(small: bool) -> Iterator[Row]:
    """Products in float32, in TF32, in bfloat16."""
    for precision in ("float32", "tensorfloat32", "bfloat16"):
        with jax.default_matmul_precision(precision):
            for row in rounds(small, ("dense", "cnn", "pfl"), 50):
                yield {**row, "precision": precision}


def ask_kernels(small: bool, name: str) -> Iterator[Row]:
    """How long a device works in a round, on which kernels, and how long it waits."""
    case = case_of(name, small)
    data, params = dataset(case).resident(fl.clients_mesh(1)), initial_params(case)
    run, _ = round_of(case, min(50, case.sizes.size), data, params)
    for _ in range(3):
        jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if not plane.name.startswith("/device:"):
                continue
            for line in plane.lines:
                events = [(e.start_ns, e.duration_ns, e.name) for e in line.events]
                if not events:
                    continue
                total: dict[str, list[float]] = {}
                for _, duration, kernel in events:
                    total.setdefault(kernel, []).append(duration / 1e3)
                began = min(start for start, _, _ in events)
                ended = max(start + duration for start, duration, _ in events)
                busiest = sorted(total.items(), key=lambda entry: -sum(entry[1]))[:25]
                yield {
                    "case": name,
                    "line": f"{plane.name} {line.name}",
                    "events": len(events),
                    "busy_us": sum(duration for _, duration, _ in events) / 1e3,
                    "span_us": (ended - began) / 1e3,
                    "busiest": [(k, len(us), round(sum(us), 1)) for k, us in busiest],
                }


def grouped(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolutions of each lane's images with its own kernel: what `vmap` makes of them."""
    return jax.vmap(_convolution)(x, kernel)


def channels_first(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same with channels before rows and columns."""

    def one(x: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = ("NCHW", "OIHW", "NCHW")
        return jax.lax.conv_general_dilated(
            *(x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1), (1, 1), "VALID"),
            dimension_numbers=numbers,
        ).transpose(0, 2, 3, 1)

    return jax.vmap(one)(x, kernel)


def one_by_one(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution per lane, one after the other."""
    return jnp.stack([_convolution(*lane) for lane in zip(x, kernel, strict=True)])


def patches(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Patches of the images, and one batched product."""
    return jnp.einsum("lnhwp,lpo->lnhwo", _patches(x, kernel), _flat(kernel))


def shifts(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A batched product for each place in the kernel, without patches in memory."""
    rows, columns = kernel.shape[1:3]
    height, width = x.shape[2] - rows + 1, x.shape[3] - columns + 1
    products = (
        jnp.einsum("lnhwi,lio->lnhwo", x[:, :, i : i + height, j : j + width], kernel[:, i, j])
        for i, j in itertools.product(range(rows), range(columns))
    )
    return functools.reduce(jnp.add, products)


def _convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _patches(x: jax.Array, kernel: jax.Array) -> jax.Array:
    rows, columns = kernel.shape[1:3]
    height, width = x.shape[2] - rows + 1, x.shape[3] - columns + 1
    places = itertools.product(range(rows), range(columns))
    return jnp.concatenate([x[:, :, i : i + height, j : j + width] for i, j in places], -1)


def _flat(kernel: jax.Array) -> jax.Array:
    return kernel.reshape(kernel.shape[0], -1, kernel.shape[-1])


def ask_convolutions(small: bool) -> Iterator[Row]:
    """A round with convolutions in groups and as patches; one convolution in several forms."""
    for rewrite in (False, True):
        yield from rounds(small, ("pfl",), 50, rewrite_convolutions=rewrite)
    forms = (grouped, channels_first, one_by_one, patches, shifts)
    for lanes, batch in ((2, 2),) if small else ((10, 20), (50, 10)):
        keys = jax.random.split(jax.random.key(0), 2)
        x = jax.random.normal(keys[0], (lanes, batch, 26, 26, 32))
        kernel = jax.random.normal(keys[1], (lanes, 3, 3, 32, 64))
        for form, dtype in itertools.product(forms, (jnp.float32, jnp.bfloat16)):

            def loss(x: Any, kernel: Any, form: Any = form) -> Any:
                return jnp.square(form(x, kernel)).astype(jnp.float32).sum()

            args = jax.tree.map(lambda z, dtype=dtype: z.astype(dtype), (x, kernel))
            gradients = jax.jit(jax.grad(loss, (0, 1)))
            compiled = gradients.lower(*args).compile()
            memory: Any = compiled.memory_analysis()
            times = interleaved({"gradients": functools.partial(compiled, *args)}, 10)
            yield {
                "form": form.__name__,
                "dtype": jnp.dtype(dtype).name,
                "lanes": lanes,
                "batch": batch,
                "seconds": times["gradients"].fastest,
                "temp_bytes": memory.temp_size_in_bytes,
            }


def ask_training(small: bool) -> Iterator[Row]:
    """All rounds of pfl-research's CIFAR10 benchmark: 1500 of 50 clients, five steps each."""
    case = CASES["pfl"]
    num_rounds, num_clients, cohort_size = (3, 8, 4) if small else (1500, 1000, 50)
    case = case._replace(sizes=np.full(num_clients, 50))
    population = dataset(case).resident()
    for lanes in lanes_of(case, *((4,) if small else (50,))):
        algorithm = fl.fed_avg(case.model(), optax.sgd(0.1), batch_size=10, lanes=lanes)
        sampler = fl.samplers.uniform(num_clients, cohort_size)
        began = time.perf_counter()
        result = fl.train(algorithm, population, sampler, num_rounds, key=jax.random.key(0))
        jax.block_until_ready(result.state)
        yield {"rounds": num_rounds, "lanes": lanes, "seconds": time.perf_counter() - began}


def ask_quickstart(small: bool) -> Iterator[Row]:
    """The tutorial simulation, against its PyTorch loop."""
    rounds = "2" if small else "100"
    command = [sys.executable, "-m", "benchmarks.seed", "--json", "--rounds", rounds]
    yield json.loads(subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, check=True).stdout)


def ask_store(small: bool) -> Iterator[Row]:
    """What a store costs on the device, and in the memory of the host."""
    case = case_of("dense", small)
    num_clients = 8 if small else 4000
    case = case._replace(sizes=np.full(num_clients, 20))
    mesh = fl.clients_mesh(1)
    data, params = dataset(case).resident(mesh), initial_params(case)
    kinds: tuple[Literal["device", "pinned_host"], ...] = ("device", "pinned_host")
    for memory_kind in kinds:
        algorithm = fl.scaffold(
            case.model(),
            optax.sgd(LEARNING_RATE),
            batch_size=case.batch_size,
            memory_kind=memory_kind,
            mesh=mesh,
        )
        state = algorithm.init(params, num_clients=num_clients)
        drawn = fl.cohort(jax.random.key(1), data, min(100, num_clients))
        compiled = (
            jax.jit(algorithm.round, donate_argnums=1)
            .lower(jax.random.key(0), state, drawn)
            .compile()
        )
        memory = compiled.memory_analysis()
        given = {x.sharding.memory_kind for x in jax.tree.leaves(state)}
        state = compiled(jax.random.key(0), state, drawn)[0]
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            state = jax.block_until_ready(compiled(jax.random.key(0), state, drawn)[0])
            seconds.append(time.perf_counter() - began)
        yield {
            "memory_kind": memory_kind,
            "kinds_given": sorted(given),
            "kinds_returned": sorted({x.sharding.memory_kind for x in jax.tree.leaves(state)}),
            "round_s": sorted(seconds)[2],
            "memory": str(memory),
            "device": jax.devices()[0].memory_stats(),
        }


_NO_GRAPHS = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer="}
_GRAPHS_OF_LOOPS = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"}
# Tests compare with float64 on the host; products are theirs only if they are of full precision.
_EXACT = {"exact": {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}}
QUESTIONS = {
    "peers_pfl": Question(functools.partial(ask_peers, name="pfl"), 90),
    "peers_dense": Question(functools.partial(ask_peers, name="dense"), 100),
    "convolutions": Question(ask_convolutions, 60),
    "training": Question(ask_training, 90),
    "kernels_pfl": Question(functools.partial(ask_kernels, name="pfl"), 40),
    "tests": Question(ask_tests, 120, _EXACT),
    "peers_cnn": Question(functools.partial(ask_peers, name="cnn"), 90),
    "peers_tiny": Question(functools.partial(ask_peers, name="tiny"), 90),
    "quickstart": Question(ask_quickstart, 120),
    "store": Question(ask_store, 60),
    "precision": Question(ask_precision, 60),
    "kernels_dense": Question(functools.partial(ask_kernels, name="dense"), 40),
    "loops": Question(
        ask_loops, 60, {"no graphs": _NO_GRAPHS, "graphs of loops": _GRAPHS_OF_LOOPS, "default": {}}
    ),
}


def answers(name: str, setting: str, small: bool, most_s: float) -> Iterator[Row]:
    """The answers of a process of its own, and last how it ended."""
    command = [sys.executable, "-m", "benchmarks.accelerator", "--ask", name]
    command += ["--small"] if small else []
    # Several processes share a card: none may take all of its memory beforehand.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment |= QUESTIONS[name].settings[setting]
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=_ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(most_s, kill)
        timer.start()
        with process:
            try:
                for line in process.stdout or ():
                    yield json.loads(line)
            finally:
                kill()
                timer.cancel()
        ended: Row = {"rc": process.returncode, "seconds": time.perf_counter() - began}
        if process.returncode:
            errors.seek(0)
            ended |= {"stderr": re.sub(r"\n+", "\n", errors.read())[-3000:]}
        yield ended


def main() -> None:
    """Asks the questions and prints the answers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8, help="after which nothing is begun")
    parser.add_argument("--question", choices=QUESTIONS, nargs="+", default=list(QUESTIONS))
    parser.add_argument("--small", action="store_true", help="a few small clients")
    parser.add_argument("--out", type=Path, default=Path(os.devnull), help="file to append to")
    parser.add_argument("--ask", choices=QUESTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--compile-only", action="store_true", help="for devices that are not here")
    parser.add_argument("--lanes", type=int, nargs="+", help="with --compile-only, clients at once")
    parser.add_argument("--json", action="store_true", help="with --compile-only, lines of JSON")
    options = parser.parse_args()
    if options.compile_only:
        ahead_of_time.report(options.lanes or [None], options.json, options.minutes)
        return
    if options.ask:
        fl.configure_cpu()
        print(json.dumps(machine("fedjax_lite", "jax", "optax")), flush=True)
        for row in QUESTIONS[options.ask].ask(options.small):
            print(json.dumps(row), flush=True)
        return
    until = time.perf_counter() + 60 * options.minutes
    with options.out.open("a") as file:

        def write(row: Row) -> None:
            line = json.dumps(row)
            print(line, flush=True)
            print(line, file=file, flush=True)

        for name in options.question:
            for setting in QUESTIONS[name].settings:
                left_s = until - time.perf_counter()
                if left_s <= 0:
                    write({"question": name, "setting": setting, "ended": "the time was up"})
                    continue
                most_s = min(left_s, QUESTIONS[name].most_s)
                for row in answers(name, setting, options.small, most_s):
                    write({"question": name, "setting": setting, **row})


if __name__ == "__main__":
    main()
