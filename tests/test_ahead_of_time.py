"""Rounds for accelerators that are not there: they lower, compile, and keep to their memory."""

import functools
import importlib.metadata

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_algorithms import ALGORITHMS

import fedjax_lite as fl
from benchmarks.ahead_of_time import (
    CHIPS,
    Sizes,
    arguments,
    cases,
    copies,
    described_mesh,
    flops,
    measure,
    traced,
)
from benchmarks.hlo import Program
from fedjax_lite.engine.waves import STEPS

LABEL, NUMBER = (jax.ShapeDtypeStruct((), dtype) for dtype in (np.int32, np.float32))
IMAGE = {"x": jax.ShapeDtypeStruct((28, 28, 1), np.float32), "y": LABEL}
# So many clients that several devices each hold what their share of them keeps.
MANY, FEW = Sizes(num_clients=10_012, cohort=64), Sizes(num_clients=1000, cohort=64, rows=2000)
PLUGINS = {"h100": "jax-cuda13-plugin", "tpu-v5e": "libtpu"}


def is_installed(chip):
    return any(importlib.metadata.distributions(name=PLUGINS[chip]))


def target(chip, num_devices):
    reason = f"needs {PLUGINS[chip]}, of the aot extra"
    lacks = pytest.mark.skipif(not is_installed(chip), reason=reason)
    return pytest.param(chip, num_devices, marks=lacks, id=f"{chip} x{num_devices}")


on_both = pytest.mark.parametrize(
    ("chip", "num_devices"), [target("h100", 4), target("tpu-v5e", 4)]
)
on_tpus = pytest.mark.parametrize(("chip", "num_devices"), [target("tpu-v5e", 4)])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_lowers_for_gpus_and_tpus(name):
    mesh = fl.clients_mesh(min(4, jax.device_count()))
    function, *args = cases()[name](mesh, lanes=4)
    round = traced(function, *args)
    for platform in ("cuda", "tpu"):
        text = round.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.while") >= 2  # Over waves, and over local steps.


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_store_on_the_host_is_given_and_returned_there(platform):
    mesh = fl.clients_mesh(1)
    algorithm = scaffold(mesh=mesh, lanes=4, memory_kind="pinned_host")
    args = arguments(algorithm, IMAGE, mesh, FEW, "pinned_host")
    text = traced(algorithm.round, *args).lower(lowering_platforms=(platform,)).as_text()
    (main,) = (line for line in text.splitlines() if "func.func public @main" in line)
    assert main.count('mhlo.memory_kind = "pinned_host"') == 2 * len(jax.tree.leaves(args[1].store))


class Normalised(nn.Module):
    """Convolutions and BatchNorm."""

    @nn.compact
    def __call__(self, x, *, train, mask):
        x = nn.Conv(8, (3, 3), (2, 2))(x)
        x = nn.BatchNorm(use_running_average=not train)(x, mask=mask[:, None, None, None])
        return nn.Dense(10)(x.reshape(len(x), -1))


def normalised():
    def loss(logits, batch):
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    return fl.linen_model(Normalised(), jnp.zeros((1, 28, 28, 1)), loss)


def logistic():
    return fl.models.logistic((28, 28, 1), 10)


def dense():
    return fl.models.mlp((28, 28, 1), (5000,), 10)


def scaffold(**where):
    return fl.scaffold(logistic(), optax.sgd(0.1), **where)


def adapted(**where):
    return fl.fed_avg(fl.lora(dense(), 2), optax.sgd(0.1), batch_size=2, **where)


# Together they use every mechanism of a round. On described GPUs, no store can lie on the host:
# JAX knows no memories of theirs.
ROUNDS = {
    "spread store": scaffold,
    "adapters on frozen params": adapted,
    "compressed both ways, with feedback": lambda **where: fl.fed_avg(
        logistic(),
        optax.sgd(0.1),
        optax.adam(0.1),
        pipeline=fl.chain(
            fl.downlink(fl.quantize_uniform(2**16)),
            fl.clip_by_norm(1.0),
            fl.error_feedback(fl.quantize_uniform(16)),
        ),
        **where,
    ),
    "modular sum, frozen params": lambda **where: fl.fed_prox(
        fl.frozen(dense(), "Dense_0/*"),
        optax.sgd(0.1, momentum=0.9),
        mu=0.1,
        num_epochs=2,
        pipeline=fl.chain(
            fl.clip_by_norm(1.0),
            fl.fixed_point(1.0, 100.0, num_bits=16),
            fl.secure_aggregation(4, dropout_rate=0.1, masks=True),
        ),
        reducer=fl.modular_sum(),
        **where,
    ),
    "kept optimizer state": lambda **where: fl.fed_avg(
        logistic(), optax.adam(0.1), num_steps=3, keep_optimizer_state=True, **where
    ),
    "convolutions, BatchNorm, median": lambda **where: fl.fed_nova(
        normalised(), optax.sgd(0.1), reducer=fl.coordinate_median(), **where
    ),
    "versions": lambda **where: fl.fed_avg(logistic(), optax.sgd(0.1), max_staleness=3, **where),
    "two models for each client": lambda **where: fl.apfl(logistic(), optax.sgd(0.1), **where),
    "small store, whole on each device": lambda **where: fl.scaffold(
        fl.models.regression((28, 28, 1)), optax.sgd(0.1), **where
    ),
}
LANES = {"small store, whole on each device": 16}  # In a single wave, which is no loop.


def compiled(build, mesh, sizes, lanes=4, **placed):
    """A compiled round, and the shapes of its state and cohort."""
    algorithm = build(mesh=mesh, lanes=lanes)
    args = arguments(algorithm, IMAGE, mesh, sizes, **placed)
    return traced(algorithm.round, *args).lower().compile(), args[1], args[2]


def temporary_bytes(*args, **options):
    """What a round takes beside its arguments and results, on a device and on the host."""
    memory = compiled(*args, **options)[0].memory_analysis()
    return memory.temp_size_in_bytes + memory.host_temp_size_in_bytes


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def copied(name, chip, num_devices):
    """What a round of `ROUNDS` copies whole of what is large."""
    stale = {"staleness": jax.ShapeDtypeStruct((MANY.cohort,), np.int32)}
    more = stale if name == "versions" else {}
    mesh = described_mesh(chip, num_devices)
    round, state, cohort = compiled(ROUNDS[name], mesh, MANY, LANES.get(name, 4), **more)
    return copies(Program(round.as_text()), state, cohort)


# On one GPU those that more devices run otherwise.
ONE_OR_FOUR = [(name, target("h100", 4)) for name in ROUNDS]
ONE_OR_FOUR += [(name, target("h100", 1)) for name in list(ROUNDS)[:4]]


@pytest.mark.parametrize(
    ("name", "chip", "num_devices"),
    [pytest.param(name, *on.values, marks=on.marks) for name, on in ONE_OR_FOUR],
)
def test_rounds_compile_for_gpus_and_copy_nothing_large(name, chip, num_devices):
    assert copied(name, chip, num_devices) == []


@pytest.mark.parametrize("name", ROUNDS)
@on_tpus
def test_rounds_compile_for_tpus(name, chip, num_devices):
    # Stores of few numbers a client are moved to the memory of a core, and back.
    assert [leaf for leaf in copied(name, chip, num_devices) if "bias" not in leaf] == []


@pytest.mark.parametrize(("chip", "num_devices"), [target("tpu-v5e", 1)])
def test_tpus_do_not_copy_rows_that_are_too_wide_for_them_to_gather(chip, num_devices):
    mesh, model = described_mesh(chip, num_devices), fl.models.regression((128, 128, 3))
    algorithm = fl.scaffold(model, optax.sgd(0.1), mesh=mesh, lanes=4)
    image = {"x": jax.ShapeDtypeStruct((128, 128, 3), np.float32), "y": NUMBER}
    args = arguments(algorithm, image, mesh, FEW)
    round = traced(algorithm.round, *args).lower().compile()
    held = nbytes([args[1].store, args[2].examples])
    assert round.memory_analysis().temp_size_in_bytes < held / 10


@pytest.mark.parametrize(("chip", "num_devices"), [target("h100", 1)])
def test_gpus_write_what_lanes_begin_with_once(chip, num_devices):
    build = lambda **where: fl.fed_avg(dense(), optax.adam(0.1), **where)
    round, state, _ = compiled(build, described_mesh(chip, num_devices), FEW, lanes=8)
    params = {(8, *x.shape) for x in jax.tree.leaves(state.params)}
    program = Program(round.as_text())
    written = [
        array.dims
        for kernel in program.kernels(program.entry)
        if STEPS not in kernel.source
        for array in kernel.whole
    ]
    # Params, and the zeros of both moments, of which one is a copy of the other.
    assert all(written.count(shape) <= 3 for shape in params)


@on_both
def test_memory_does_not_grow_with_the_cohort(chip, num_devices):
    mesh = described_mesh(chip, num_devices)
    small, large = (
        temporary_bytes(scaffold, mesh, FEW._replace(cohort=cohort)) for cohort in (64, 1024)
    )
    # What grows is the list of clients: a few words for each, no copy of the 31 kB of params.
    assert large - small < 200 * (1024 - 64)


@on_both
def test_memory_does_not_grow_with_lanes_where_params_are_frozen(chip, num_devices):
    mesh = described_mesh(chip, num_devices)
    few, many = (temporary_bytes(adapted, mesh, FEW, lanes) for lanes in (2, 16))
    frozen = nbytes(jax.eval_shape(adapted(mesh=mesh).init, jax.random.key(0)).frozen)
    # What grows is adapters and activations: not even one more copy of the frozen params.
    assert many - few < frozen


@on_tpus
def test_memory_does_not_grow_with_the_population_of_a_store_on_the_host(chip, num_devices):
    mesh = described_mesh(chip, num_devices)
    build = functools.partial(scaffold, memory_kind="pinned_host")
    small, large = (
        temporary_bytes(build, mesh, FEW._replace(num_clients=number), memory_kind="pinned_host")
        for number in (1000, 4000)
    )
    entry = nbytes(jax.eval_shape(logistic().init, jax.random.key(0)))
    assert large - small < entry * (4000 - 1000) / 10


def test_a_step_is_bounded_by_what_takes_longest():
    chip = "h100"
    row = measure(cases()["fed_avg"], f"{chip} x1", lanes=None)
    if not is_installed(chip):
        assert row["compiled"].endswith("; install the aot extra")
        return
    assert row["lanes"] == 64
    # Forward and backward products with 784 weights, for batches of three.
    assert row["flops_per_step"] == 64 * 2 * 2 * 784 * 3
    assert row["kernels_per_step"] > 5
    # Each lane reads its weights twice, for the product and for the step, and writes them.
    assert row["bytes_per_step"] > 64 * 3 * 4 * 784
    launches = row["kernels_per_step"] * CHIPS[chip].launch_s
    memory = row["bytes_per_step"] / CHIPS[chip].bytes_per_s
    products = row["flops_per_step"] / CHIPS[chip].flops_per_s
    assert row["bound_s"] == max(launches, memory, products)
    assert row["measured"] is False


@pytest.mark.parametrize(("chip", "num_devices"), [target("h100", 1)])
def test_a_round_of_the_quickstart_starts_few_kernels(chip, num_devices):
    round, *args = cases()["quickstart"](described_mesh(chip, num_devices), None)

    def rounds(key, state, population):
        return jax.lax.scan(lambda state, _: round(key, state, population), state, length=100)

    program = Program(traced(rounds, *args).lower().compile().as_text())
    # Clients take 5 to 9 steps: all at once, and the only loop is that of the rounds. One by one
    # they took 170 kernels.
    (body,) = program.loops("")
    assert len(list(program.kernels(body))) <= 25


def test_operations_of_a_program_are_those_of_its_products():
    def compute(x, kernel, weights):
        x = jax.lax.conv(x, kernel, (1, 1), "VALID")  # [2, 4, 6, 6], of 3 channels and 9 places.
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ weights), None), x, length=5)[0]

    args = (jnp.ones((2, 3, 8, 8)), jnp.ones((4, 3, 3, 3)), jnp.ones((6, 6)))
    jaxpr = jax.make_jaxpr(compute)(*args).jaxpr
    assert flops(jaxpr) == 2 * (2 * 4 * 6 * 6) * (3 * 9) + 5 * 2 * (2 * 4 * 6 * 6) * 6


PROGRAM = """
%fused (p0: f32[100,8], p1: s32[4]) -> f32[4,8] {
  %p1 = s32[4]{0} parameter(1)
  %p0 = f32[100,8]{1,0} parameter(0)
  ROOT %rows = f32[4,8]{1,0} gather(%p0, %p1), slice_sizes={1,8}
}

%update (p0: f32[100,8], p1: f32[1,8], p2: s32[]) -> f32[100,8] {
  %p0.1 = f32[100,8]{1,0} parameter(0)
  %p1.1 = f32[1,8]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %new = f32[100,8]{1,0} dynamic-update-slice(%p0.1, %p1.1, %p2, %p2)
}

%body (state: (f32[100,8], s32[4])) -> (f32[100,8], s32[4]) {
  %state = (f32[100,8]{1,0}, s32[4]{0}) parameter(0)
  %table = f32[100,8]{1,0} get-tuple-element(%state), index=0
  %ids = s32[4]{0} get-tuple-element(%state), index=1
  %read = f32[4,8]{1,0} fusion(%table, %ids), kind=kLoop, calls=%fused
  %first = f32[1,8]{1,0:S(1)} slice(%read), slice={[0:1], [0:8]}
  %zero = s32[] constant(0)
  %put = f32[100,8]{1,0} fusion(%table, %first, %zero), kind=kLoop, calls=%update
  %set = f32[100,8]{1,0} dynamic-update-slice(%put, %first, %zero, %zero)
  ROOT %next = (f32[100,8]{1,0}, s32[4]{0}) tuple(%set, %ids)
}

ENTRY %main (table: f32[100,8], ids: s32[4]) -> f32[100,8] {
  %table.1 = f32[100,8]{1,0} parameter(0)
  %ids.1 = s32[4]{0} parameter(1)
  %copy = f32[100,8]{0,1} copy(%table.1)
  %start = (f32[100,8]{1,0}, s32[4]{0}) tuple(%copy, %ids.1)
  %loop = (f32[100,8], s32[4]) while(%start), body=%body, op_name="f", "known_trip_count":{"n":"3"}
  ROOT %result = f32[100,8]{1,0} get-tuple-element(%loop), index=0
}
"""


def test_kernels_count_the_bytes_that_they_touch_and_loops_their_turns():
    program = Program(PROGRAM)
    (body,) = program.loops("^f$")
    kernels = {kernel.name: kernel.nbytes for kernel in program.kernels(body)}
    row = 8 * 4
    assert kernels == {
        "read": 4 * 4 + 4 * row + 4 * row,  # Which rows, these, and what is made of them.
        "first": row,  # Into a space that is not the device's memory.
        "put": 4 + row,  # In place, from that space; and where.
        "set": 2 * 4 + row,
    }
    kernels = list(program.kernels(program.entry))
    assert [kernel.name for kernel in kernels] == ["copy", *3 * ["read", "first", "put", "set"]]
    tables = [k.name for k in kernels if any(array.dims == (100, 8) for array in k.whole)]
    assert tables == ["copy"]
