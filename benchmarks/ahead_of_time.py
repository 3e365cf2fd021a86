"""Rounds compiled for accelerators that are not there, and what a local step takes of them.

    python -m benchmarks.accelerator --compile-only [--json] [--lanes N ...]

Devices are described and not present, and arguments are shapes: nothing is computed. It needs the
`aot` extra, and no CUDA.

The bound of a step is the longest of three times: of starting its kernels one after the other, of
moving what they read and write, and of its products. It is computed and not measured.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import fedjax_lite as fl
from benchmarks.hlo import DEVICE, HOST, Kernel, Program
from fedjax_lite.engine.execution import Execution, choose_lanes
from fedjax_lite.engine.store import is_spread
from fedjax_lite.engine.waves import STEPS
from fedjax_lite.experiments.quickstart import MAX_COHORT, halfspace_simulation
from fedjax_lite.xla.mesh import AXIS
from fedjax_lite.xla.rows import Rows, pack_row, wants_flat

Row = dict[str, Any]
Features = Mapping[str, jax.ShapeDtypeStruct]
_ROOT = Path(__file__).parents[1]
# Or libtpu looks for the TPU that it runs on, and says at length that there is none.
_TPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
_TPU |= {"TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


class Chip(NamedTuple):
    """What a chip can do.

    Attributes:
      bytes_per_s: Bandwidth of its memory.
      flops_per_s: Of products of float32 arrays, in the precision that JAX takes by default.
      launch_s: From the start of one small kernel to that of the next.
    """

    bytes_per_s: float
    flops_per_s: float
    launch_s: float


CHIPS = {
    # NVIDIA's data sheet of the H100 SXM: 3.35 TB/s, and 989 TFLOP/s in TF32 with sparsity, of
    # which dense products reach half. Launches: results/accelerator-h200.jsonl has 390 kernels in a
    # round of `dense`, busy for 1.8 ms of the 2.45 ms that the round takes, or of 3.8 ms without
    # command buffers: 2 to 5 us between two of them.
    "h100": Chip(3.35e12, 494.5e12, 3e-6),
    # Google Cloud's page on the TPU v5e: 819 GB/s, 197 TFLOP/s in bfloat16, in which a TPU
    # multiplies by default. One stream of instructions: kernels are not launched one by one.
    "tpu-v5e": Chip(819e9, 197e12, 0.0),
}
TARGETS = {f"{chip} x{n}": (chip, n) for chip in CHIPS for n in (1, 4)}


def described_mesh(chip: str, num_devices: int) -> Mesh:
    """A mesh of devices that can be compiled for, and not run on.

    Args:
      chip: One of `CHIPS`.
      num_devices: How many of them, up to 4 TPUs.

    Raises:
      RuntimeError: The compiler for the chip is not installed.
    """
    if chip == "h100":
        config = (Path(__file__).parent / "h100.txtpb").read_text()
        shape = f"1x1x{num_devices}"
        topology = topologies.get_topology_desc(shape, "cuda", target_config=config, topology=shape)
    else:
        for name, value in _TPU.items():
            os.environ.setdefault(name, value)
        topology = topologies.get_topology_desc("v5e:2x2", "tpu")
    devices: Any = np.array(topology.devices[:num_devices])
    return Mesh(devices, (AXIS,), axis_types=(AxisType.Auto,))


class Sizes(NamedTuple):
    """How many clients there are and take part, and how many examples all have together.

    By default so many that what clients keep is spread over devices, and prime numbers, or nearly,
    of which no other array has as many rows.
    """

    num_clients: int = 10_012
    cohort: int = 256
    rows: int = 100_003


_SIZES = Sizes()


def arguments(
    algorithm: fl.FederatedAlgorithm,
    features: Features,
    mesh: Mesh,
    sizes: Sizes = _SIZES,
    memory_kind: str = "device",
    **more: jax.ShapeDtypeStruct,
) -> tuple[Any, fl.ServerState, fl.Cohort]:
    """Key, state and cohort of a round as shapes, placed as arrays would be.

    Args:
      algorithm: The algorithm, built for the mesh.
      features: What an example has.
      mesh: The devices.
      sizes: The numbers of clients and examples.
      memory_kind: Where the algorithm keeps its store. Of GPUs that are not there JAX knows no
        memories, and takes that of the host for the device's.
      **more: Further fields of the cohort.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(tree: Any, sharding: NamedSharding = everywhere) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(functools.partial(algorithm.init, num_clients=sizes.num_clients), key)
    stores = {"store": state.store, "pipeline_store": state.pipeline_store}
    spread = is_spread(stores, sizes.num_clients, mesh.size)
    of_stores = PartitionSpec(AXIS) if spread else PartitionSpec()
    stores = place(stores, NamedSharding(mesh, of_stores, memory_kind=memory_kind))
    slots = jax.ShapeDtypeStruct((sizes.cohort,), np.int32)
    fields: dict[str, Any] = dict.fromkeys(("client_ids", "num_examples", "offsets"), slots) | more
    device = mesh.devices.flat[0]

    is_flat = wants_flat(features, device)

    def rows(x: jax.ShapeDtypeStruct) -> Any:
        many = jax.ShapeDtypeStruct((sizes.rows, *x.shape), x.dtype)
        if not is_flat or not x.shape:
            return many
        return Rows(jax.eval_shape(lambda x: pack_row(x, 1), many), x.shape)

    fields["examples"] = {name: rows(x) for name, x in features.items()}
    cohort = fl.Cohort(num_clients=sizes.num_clients, **fields)
    return place(key), dataclasses.replace(place(state), **stores), place(cohort)


def traced(round: Callable[..., Any], *args: Any) -> jax.stages.Traced:
    """A round that reuses the memory of the state that it is given, as in training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fl.UnconfiguredCPUWarning)
        return jax.jit(round, donate_argnums=1).trace(*args)


def flops(jaxpr: Any) -> int:
    """Operations of the products and convolutions; loops of unknown length count once."""
    total = 0
    for eqn in jaxpr.eqns:
        size = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            _, *summed = eqn.params["dimension_numbers"].rhs_spec
            total += 2 * size * math.prod(eqn.invars[1].aval.shape[axis] for axis in summed)
        else:
            inner = [flops(x) for x in _inner_jaxprs(eqn)]
            one_of_them = eqn.primitive.name == "cond"
            total += eqn.params.get("length", 1) * (max(inner) if one_of_them else sum(inner))
    return total


def _inner_jaxprs(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, (jex_core.Jaxpr, jex_core.ClosedJaxpr)):
                yield getattr(item, "jaxpr", item)


def step_flops(jaxpr: Any) -> int:
    """Operations of a turn of the local steps; of several loops, the one with the most."""
    return max(
        (
            flops(inner) if _is_step(str(eqn.source_info.name_stack)) else step_flops(inner)
            for eqn in jaxpr.eqns
            for inner in _inner_jaxprs(eqn)
        ),
        default=0,
    )


def step_kernels(program: Program) -> list[Kernel]:
    """The kernels of a turn of the local steps; of several loops, the one with the most.

    Without a loop, if there is a single turn.
    """
    bodies = program.loops(rf"^((jit\(\w+\)|shard_map|while/body)/)*{STEPS}/while$")
    if not bodies:
        return [kernel for kernel in program.kernels(program.entry) if _is_step(kernel.source)]
    return max((list(program.kernels(body)) for body in bodies), key=len)


def _is_step(source: str) -> bool:
    return STEPS in source.split("/")


def copies(program: Program, state: fl.ServerState, cohort: fl.Cohort | None = None) -> list[str]:
    """What is copied whole of the data, of what clients keep, and of the frozen params.

    What counts is a kernel that writes all of an array of the same shape, axes in any order, in
    the memory of a device or of the host. Arrays of less than 64 kB are left out.

    Args:
      program: A round.
      state: Its state, as shapes.
      cohort: Its cohort, as shapes, if it is given one.
    """
    held = {name: getattr(state, name) for name in ("store", "pipeline_store", "frozen")}
    held["examples"] = {} if cohort is None else cohort.examples
    written = {
        _long_axes(array.dims)
        for kernel in program.kernels(program.entry)
        for array in kernel.whole
        if array.space in (DEVICE, HOST)
    }
    return [
        name + jax.tree_util.keystr(path)
        for name, tree in held.items()
        for path, x in jax.tree.leaves_with_path(tree)
        if x.size * x.dtype.itemsize >= 2**16
        and _long_axes(x.sharding.shard_shape(x.shape)) in written
    ]


def _long_axes(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n != 1))


_LABEL = jax.ShapeDtypeStruct((), np.int32)
_NUMBER = jax.ShapeDtypeStruct((), np.float32)
_IMAGE = {"x": jax.ShapeDtypeStruct((28, 28, 1), np.float32), "y": _LABEL}
_PHOTOGRAPH = {"x": jax.ShapeDtypeStruct((32, 32, 3), np.float32), "y": _LABEL}
_SENTENCE = dict.fromkeys(("x", "y"), jax.ShapeDtypeStruct((20,), np.int32))
# What a case is: `case(mesh, lanes)` is a function and its arguments as shapes.
Case = Callable[[Mesh, int | None], tuple[Any, ...]]


def _trained(build: Callable[..., fl.FederatedAlgorithm], features: Features) -> Case:
    """A round of an algorithm."""

    def case(mesh: Mesh, lanes: int | None) -> tuple[Any, ...]:
        algorithm = build(mesh=mesh, lanes=lanes)
        return algorithm.round, *arguments(algorithm, features, mesh)

    return case


def _averaged(model: Callable[[], fl.Model], batch_size: int, features: Features) -> Case:
    """A round of FedAvg: each client runs through its examples once."""
    return _trained(
        lambda **where: fl.fed_avg(model(), optax.sgd(0.1), batch_size=batch_size, **where),
        features,
    )


def _quickstart(mesh: Mesh, lanes: int | None) -> tuple[Any, ...]:
    """A round of `fedjax-lite quickstart`."""
    simulation = halfspace_simulation(mesh=mesh, lanes=lanes)
    key = jax.eval_shape(lambda: jax.random.key(0))
    sharding = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (key, jax.eval_shape(simulation.init, key)),
    )
    return simulation.round, *args, simulation.population


def _test_table() -> dict[str, Case]:
    """The algorithms of the tests, with the linear model of these, for images."""
    sys.path.append(str(_ROOT / "tests"))
    table = importlib.import_module("test_algorithms").ALGORITHMS
    model = importlib.import_module("problems").regression_model(784)
    features = {"x": jax.ShapeDtypeStruct((784,), np.float32), "y": _NUMBER}
    return {
        name: _trained(functools.partial(make, model), features) for name, make in table.items()
    }


def cases() -> dict[str, Case]:
    """All of them by name, those that take minutes to compile for a TPU last."""
    models = fl.models
    return {
        "quickstart": _quickstart,
        "dense": _averaged(models.emnist_dense, 20, _IMAGE),
        **_test_table(),
        "cnn": _averaged(models.emnist_cnn, 20, _IMAGE),
        "cifar": _averaged(models.cifar_cnn, 10, _PHOTOGRAPH),
        "lstm": _averaged(models.stackoverflow_lstm, 16, _SENTENCE),
        "transformer": _averaged(models.stackoverflow_transformer, 16, _SENTENCE),
        "resnet18": _averaged(models.resnet18, 20, _PHOTOGRAPH),
    }


# Of which four devices differ from one in how many clients they share alone.
_LARGE = ("cnn", "cifar", "lstm", "transformer")


def targets_of(name: str) -> list[str]:
    """What a case is compiled for: all that takes ten minutes on two cores."""
    if name == "resnet18":  # Of which a TPU's compiler takes five minutes.
        return ["h100 x1"]
    return [target for target, (_, n) in TARGETS.items() if n == 1 or name not in _LARGE]


def measure(case: Case, target: str, lanes: int | None) -> Row:
    """What compiling a case for a target tells."""
    chip, num_devices = TARGETS[target]
    try:
        mesh = described_mesh(chip, num_devices)
    except RuntimeError as error:
        return {"compiled": f"{_first_line(error)}; install the aot extra"}
    function, *args = case(mesh, lanes)
    state, cohort = args[1], args[2] if isinstance(args[2], fl.Cohort) else None
    capacity = MAX_COHORT if cohort is None else cohort.capacity
    lanes = choose_lanes(Execution(lanes, mesh), state.params, capacity)
    round = traced(function, *args)
    began = time.perf_counter()
    try:
        compiled = round.lower().compile()
    except RuntimeError as error:
        return {"lanes": lanes, "compiled": _first_line(error)}
    compile_s = time.perf_counter() - began
    temp_bytes = compiled.memory_analysis().temp_size_in_bytes
    program = Program(compiled.as_text())
    kernels = step_kernels(program)
    step = {
        "kernels_per_step": len(kernels),
        "bytes_per_step": sum(kernel.nbytes for kernel in kernels),
        "flops_per_step": step_flops(round.jaxpr.jaxpr),
    }
    bounds = {
        "launches": step["kernels_per_step"] * CHIPS[chip].launch_s,
        "memory": step["bytes_per_step"] / CHIPS[chip].bytes_per_s,
        "products": step["flops_per_step"] / CHIPS[chip].flops_per_s,
    }
    bound_by = max(bounds, key=bounds.__getitem__)
    return {
        "lanes": lanes,
        "compiled": True,
        "compile_s": compile_s,
        "temp_bytes": temp_bytes,
        "bytes_per_lane": temp_bytes // lanes,
        "copies": copies(program, state, cohort),
        **step,
        "bound_s": bounds[bound_by],
        "bound_by": bound_by,
        "measured": False,
    }


# What is printed of a row: the heading, its width, and the entry, if there is one.
_COLUMNS: dict[str, tuple[int, Callable[[Row], str]]] = {
    "case": (18, lambda row: row["case"]),
    "target": (11, lambda row: row["target"]),
    "lanes": (6, lambda row: str(row["lanes"])),
    "compile s": (10, lambda row: f"{row['compile_s']:.1f}"),
    "temp MB": (9, lambda row: f"{row['temp_bytes'] / 1e6:.2f}"),
    "kB/lane": (9, lambda row: f"{row['bytes_per_lane'] / 1e3:.1f}"),
    "kernels": (8, lambda row: str(row["kernels_per_step"])),
    "MB/step": (9, lambda row: f"{row['bytes_per_step'] / 1e6:.2f}"),
    "Mflop/step": (11, lambda row: f"{row['flops_per_step'] / 1e6:.2f}"),
    "bound us": (9, lambda row: f"{row['bound_s'] * 1e6:.1f}"),
    "by": (9, lambda row: row["bound_by"]),
    "copied whole": (0, lambda row: ", ".join(row["copies"])),
}


def _formatted(row: Row) -> str:
    if row["compiled"] is not True:
        return f"{row['case']:18}{row['target']:11}{row['lanes'] or '':<6}{row['compiled']}"
    return "".join(f"{entry(row):{width}}" for width, entry in _COLUMNS.values()).rstrip()


def _first_line(error: RuntimeError) -> str:
    return str(error).splitlines()[0]


def report(lanes: Sequence[int | None], as_json: bool, minutes: float) -> None:
    """Compiles every case for its targets, two at a time, and prints the rows in order.

    Args:
      lanes: Clients side by side on a device, for each of which all is compiled; `None` is the
        default.
      as_json: Whether to print lines of JSON and not a table.
      minutes: After which nothing is begun.
    """
    if not as_json:
        print("of one local step on one device; bounds are computed and not measured")
        print("".join(f"{name:{width}}" for name, (width, _) in _COLUMNS.items()))
    until = time.time() + 60 * minutes
    asked = [
        (name, target, chosen, until)
        for name in cases()
        for target, chosen in itertools.product(targets_of(name), lanes)
    ]
    # A compiler keeps one core busy.
    with multiprocessing.get_context("spawn").Pool(2, _use_no_device) as pool:
        for row in pool.imap(_row, asked):
            print(json.dumps(row) if as_json else _formatted(row), flush=True)


def _use_no_device() -> None:
    """Whatever compilers are installed, JAX need not look for their devices."""
    jax.config.update("jax_platforms", "cpu")


def _row(asked: tuple[str, str, int | None, float]) -> Row:
    name, target, lanes, until = asked
    row = {"case": name, "target": target, "lanes": lanes, "compiled": "the time was up"}
    return row | measure(cases()[name], target, lanes) if time.time() < until else row
