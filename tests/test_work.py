"""Clients that differ: in how much they do, and in which params they start from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import SIZES, everyone, regression_dataset, regression_model

import fedjax_lite as fl

KEY = jax.random.key(3)
SIZES = np.array(SIZES)


def mesh_of(num_devices):
    if jax.device_count() < num_devices:
        pytest.skip("needs more devices")
    return fl.clients_mesh(num_devices)


@functools.cache
def algorithm(num_devices=1, **options):
    options = {"batch_size": 2, "shuffle": False, **options}
    return fl.fed_avg(regression_model(), optax.sgd(0.1), mesh=mesh_of(num_devices), **options)


def start():
    return {"w": jnp.array([0.5, -1.0, 2.0]), "b": jnp.array(0.25)}


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def flat(params):
    return np.append(np.asarray(params["w"], np.float64), float(params["b"]))


def trained(params, client, num_steps):
    """By hand, in float64: so many steps on the client's batches of two, over and over."""
    dataset = regression_dataset()
    own = dataset[dataset.client_ids[client]]
    w, processed = flat(params), 0
    for step in range(num_steps):
        per_epoch = -(-SIZES[client] // 2)
        first = 2 * (step % per_epoch)
        x = np.asarray(own["x"], np.float64)[first : first + 2]
        y = np.asarray(own["y"], np.float64)[first : first + 2]
        error = x @ w[:3] + w[3] - y
        w = w - 0.1 * np.append(error @ x, error.sum()) / len(y)
        processed += len(y)
    return w, processed


def mean_of(params, steps, weigh=lambda client, processed: SIZES[client]):
    """FedAvg by hand: params after a round in which each client takes so many steps."""
    total, weight = np.zeros(4), 0.0
    for client, number in steps.items():
        after, processed = trained(params, client, number)
        share = weigh(client, processed) if SIZES[client] else 0
        total, weight = total + share * (flat(params) - after), weight + share
    return flat(params) - total / weight


def test_the_loop_by_hand_is_that_of_the_model():
    model = regression_model()
    assert model.loss(start(), {}, {"x": jnp.ones((1, 3)), "y": jnp.ones(1)}, KEY)[0].shape == (1,)
    steps = {i: -(-int(n) // 2) for i, n in enumerate(SIZES)}
    one = algorithm()
    cohort = everyone(regression_dataset().resident(mesh_of(1)))
    after, _ = one.round(KEY, one.init(start()), cohort)
    np.testing.assert_allclose(flat(after.params), mean_of(start(), steps), rtol=1e-9)


@pytest.mark.parametrize(("num_devices", "lanes"), [(1, 1), (1, 3), (2, 2), (8, 1)])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_time_out_whose_partial_work_weighs_what_was_done(num_devices, lanes, streamed):
    mesh = mesh_of(num_devices)
    dataset = regression_dataset()
    population = dataset.streamed(10, mesh=mesh) if streamed else dataset.resident(mesh)
    most = np.array([0, 3, 100, 1, 2, 5, 1, 0, 100, 4])
    cohort = fl.cohort_of(population, np.arange(10), max_steps=most)
    one = algorithm(num_devices, weighting="processed", num_epochs=2, lanes=lanes)
    after, info = one.round(KEY, one.init(start()), cohort)
    due = 2 * -(-SIZES // 2)
    steps = np.minimum(most, due)
    np.testing.assert_array_equal(info.clients["num_steps"], steps)
    expected = mean_of(start(), dict(enumerate(steps)), lambda client, processed: processed)
    np.testing.assert_allclose(flat(after.params), expected, rtol=1e-9)
    processed = [trained(start(), i, n)[1] if SIZES[i] else 0 for i, n in enumerate(steps)]
    np.testing.assert_array_equal(info.clients["num_examples"], processed)
    np.testing.assert_array_equal(info.clients["weight"], processed)


@pytest.mark.parametrize(("weighting", "expected"), [("sqrt", np.sqrt), ("log", np.log1p)])
def test_large_clients_may_count_for_less(weighting, expected):
    one = algorithm(weighting=weighting)
    _, info = one.round(KEY, one.init(start()), everyone(regression_dataset().resident(mesh_of(1))))
    np.testing.assert_allclose(info.clients["weight"], expected(SIZES), rtol=1e-12)


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("what", ["num_steps", "num_epochs"])
def test_how_much_a_client_does_may_depend_on_the_client(what, lanes):
    """On its id, its size and its key of the round, as in FedProx's heterogeneous systems."""
    number = lambda client: jnp.where(
        client.id % 2 == 0, client.id, jax.random.randint(client.key, (), 0, 4)
    )
    one = algorithm(lanes=lanes, **{what: number})
    state = one.init(start())
    cohort = everyone(regression_dataset().resident(mesh_of(1)))
    after, info = one.round(KEY, state, cohort)
    steps = np.array(info.clients["num_steps"])
    each = -(-SIZES // 2) if what == "num_epochs" else np.where(SIZES > 0, 1, 0)
    np.testing.assert_array_equal(steps[::2], (np.arange(10) * each)[::2])
    drawn = steps[1::2] / np.maximum(each[1::2], 1)
    assert set(drawn) <= {0, 1, 2, 3}
    # Clients that take no step send nothing, and weigh nothing.
    counting = {i: int(n) for i, n in enumerate(steps) if n}
    np.testing.assert_allclose(flat(after.params), mean_of(start(), counting), rtol=1e-9)
    _, other = one.round(jax.random.key(9), state, cohort)
    assert np.array_equal(other.clients["num_steps"][::2], steps[::2])
    assert not np.array_equal(other.clients["num_steps"], steps)
    with pytest.raises(ValueError, match=f"{what} is a function of the client with different"):
        algorithm(differentiable=True, **{what: number}).round(KEY, state, cohort)


@pytest.mark.parametrize(("num_devices", "lanes"), [(1, 1), (1, 4), (8, 2)])
def test_clients_start_from_the_versions_that_they_have(num_devices, lanes):
    """A ring of three versions, beside a plain loop that keeps them all."""
    mesh = mesh_of(num_devices)
    population = regression_dataset().resident(mesh)
    one = algorithm(num_devices, max_staleness=2, lanes=lanes)
    state = one.init(start())
    versions = [flat(start())]
    rng = np.random.default_rng(0)
    as_params = lambda w: {"w": w[:3], "b": w[3]}
    for r in range(7):
        ids = rng.permutation(10)[:6]
        staleness = rng.integers(0, 3, 6)
        cohort = fl.cohort_of(population, ids, staleness=staleness)
        state, _ = one.round(KEY, state, cohort)
        total, weight = np.zeros(4), 0
        for client, age in zip(ids, staleness, strict=True):
            begin = as_params(versions[max(r - age, 0)])
            after, _ = trained(begin, client, -(-SIZES[client] // 2))
            total += SIZES[client] * (flat(begin) - after)
            weight += SIZES[client]
        versions.append(versions[-1] - total / weight)
        np.testing.assert_allclose(flat(state.params), versions[-1], rtol=1e-9)
    for age in range(3):  # Before round 7.
        kept = jax.tree.map(lambda x, age=age: x[(7 - age) % 3], state.versions["params"])
        np.testing.assert_allclose(flat(kept), versions[7 - age], rtol=1e-9)


def test_versions_cost_nothing_where_nobody_is_late():
    population = regression_dataset().resident(mesh_of(1))
    cohort = everyone(population)
    plain, ring = algorithm(), algorithm(max_staleness=3)
    after, _ = plain.round(KEY, plain.init(start()), cohort)
    same, _ = ring.round(KEY, ring.init(start()), cohort)
    jax.tree.map(np.testing.assert_array_equal, after.params, same.params)
    fresh = fl.cohort_of(population, np.arange(10), staleness=np.zeros(10, int))
    same, _ = ring.round(KEY, ring.init(start()), fresh)
    np.testing.assert_allclose(flat(same.params), flat(after.params), rtol=1e-9)


def test_other_time_outs_and_ages_are_no_other_program():
    population = regression_dataset().resident(mesh_of(1))
    one = algorithm(max_staleness=2)
    state = one.init(start())
    rounds = jax.jit(one.round)
    for r in range(3):
        cohort = fl.cohort_of(
            population, np.arange(4), max_steps=np.full(4, r), staleness=np.full(4, r)
        )
        state, _ = rounds(KEY, state, cohort)
    assert rounds._cache_size() == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda population: fl.cohort_of(population, [1, 2], max_steps=[1]),
            r"max_steps has shape \(1,\) and dtype int64 beside client_ids of shape \(2,\)",
        ),
        (
            lambda population: fl.cohort_of(population, [1, 2], staleness=[0.5, 1.0]),
            "staleness has shape .* dtype float64",
        ),
        (
            lambda population: algorithm().round(
                KEY,
                algorithm().init(start()),
                fl.cohort_of(population, [1, 2], staleness=[0, 1]),
            ),
            "cohort.staleness is given to an algorithm that keeps no versions; .*max_staleness=",
        ),
        (lambda population: algorithm(max_staleness=-1), "max_staleness is -1; choose"),
        (
            lambda population: algorithm(num_steps=lambda client: 0.5).round(
                KEY, algorithm().init(start()), everyone(population)
            ),
            r"what num_steps returned is of shape \(\) and dtype float64; return a whole number",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    population = regression_dataset().resident(mesh_of(1))
    with pytest.raises(ValueError, match=message):
        call(population)
