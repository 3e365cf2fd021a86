"""One battery for all update transforms and reducers: what the package promises of every one."""

import dataclasses
import functools
import inspect

import chex
import jax
import numpy as np
import optax
import pytest
from pipelines import PIPELINES
from problems import SIZES, everyone, regression_dataset, regression_model

import fedjax_lite as fl
from benchmarks.ahead_of_time import traced

VARY = {"qsgd", "power_sgd"}  # In what they send, by its values and from round to round.
BROKEN = 6  # The labels of this client are not numbers.
CAPACITY = 12
COHORTS = [[0, 2, 3, 4, 1, 6, 7, 8], [9, 4, 1, 0, 3]]
KEYS = jax.random.split(jax.random.key(5), len(COHORTS))
START = {"w": np.array([0.5, -1.0, 2.0]), "b": np.array(0.25)}


@pytest.fixture(autouse=True, scope="module")
def keeping_no_programs():
    """Each one is compiled once: to write it to a file would take a tenth of the time."""
    least = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, least)
    jax.config.update(least, 1e9)
    yield
    jax.config.update(least, before)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def build(name, number=1.0, num_devices=1, lanes=1):
    return fl.fed_avg(
        regression_model(),
        optax.sgd(0.1),
        batch_size=4,
        shuffle=False,
        mesh=fl.clients_mesh(num_devices),
        lanes=lanes,
        **PIPELINES[name](number),
    )


@functools.cache
def population(num_devices):
    def broken(features):
        owners = np.repeat(np.arange(len(SIZES)), SIZES)
        return {**features, "y": np.where(owners == BROKEN, np.nan, features["y"])}

    return regression_dataset().map(broken).resident(fl.clients_mesh(num_devices))


def cohort(ids, num_devices=1):
    return everyone(population(num_devices), ids, capacity=CAPACITY)


@functools.cache
def slots_mixed(num_devices):
    """The cohorts' clients, with empty slots between them."""
    order = np.random.default_rng(0).permutation(CAPACITY)
    rows = ("client_ids", "num_examples", "offsets")
    in_order = [cohort(ids, num_devices) for ids in COHORTS]
    return [
        dataclasses.replace(one, **{name: getattr(one, name)[order] for name in rows})
        for one in in_order
    ]


def run(round, state, cohorts):
    """States after each round, and what was reported."""
    for key, one in zip(KEYS, cohorts, strict=True):
        state, info = round(key, state, one)
        yield state, info


def swept(name, numbers):
    """A round for each of several numbers at once."""

    def one(number, key, state, cohort):
        return build(name, number).round(key, state, cohort)

    side_by_side = jax.jit(jax.vmap(one, (0, None, 0, None)))
    # States as they were given first, or the second round would compile for where they lie.
    return lambda *args: jax.device_get(side_by_side(numbers, *args))


@pytest.mark.parametrize("name", PIPELINES)
def test_battery(name):
    num_devices = min(8, jax.device_count())
    algorithm = build(name, num_devices=num_devices, lanes=3)
    first = algorithm.init(START, num_clients=len(SIZES))
    mixed = slots_mixed(num_devices)
    (one, info), (two, _) = run(algorithm.round, first, mixed)
    moved = jax.tree.map(np.subtract, jax.device_get(two.params), START)
    distance = np.linalg.norm([*moved["w"], moved["b"]])
    assert np.isfinite(distance)
    assert distance > 1e-6
    assert info.num_nonfinite == 1
    # What is kept has one form, and is made of what checkpoints hold.
    chex.assert_trees_all_equal_shapes_and_dtypes(first, two)
    assert all(isinstance(x.dtype, np.dtype) for x in jax.tree.leaves(first))
    # Clients without examples, and those that are left out, might as well not be there.
    without = [i for i in COHORTS[0] if i != BROKEN and SIZES[i] > 0]
    alone, _ = algorithm.round(KEYS[0], first, cohort(without, num_devices))
    assert_close(alone.params, one.params)
    # One program, however many clients there are.
    assert algorithm.round._cache_size() == 1
    # It does not matter which device and lane has a client, and numbers may be swept.
    in_turn = build(name)
    start = in_turn.init(START, num_clients=len(SIZES))
    round, in_order = in_turn.round, [cohort(ids) for ids in COHORTS]
    sweeps = "_" not in inspect.signature(PIPELINES[name]).parameters
    if sweeps:
        round = swept(name, np.array([0.7, 1.0]))
        start = jax.tree.map(lambda x: np.stack([x, x]), jax.device_get(start))
    for (state, _), expected in zip(run(round, start, in_order), (one, two), strict=True):
        assert_close(jax.tree.map(lambda x: x[1], state) if sweeps else state, expected)
        if sweeps:
            assert not np.allclose(*state.params["w"], atol=1e-9)
    # What is sent is known before.
    sizes = [np.max(info.clients[f"bits_{way}"]) for way in ("down", "up")]
    if name not in VARY:
        assert list(algorithm.message_bits(START)) == sizes
    # It can be lowered for accelerators.
    traced(algorithm.round, KEYS[0], first, mixed[0]).lower(lowering_platforms=("cuda", "tpu"))


def assert_close(actual, desired):
    chex.assert_trees_all_close(
        jax.device_get(actual), jax.device_get(desired), rtol=1e-9, atol=1e-9
    )
