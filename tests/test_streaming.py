"""Cohorts copied from disk give the bits of those on the device, and are made ahead of rounds."""

import dataclasses
import functools
import itertools
import threading
import time

import chex
import jax
import numpy as np
import optax
import pytest
from problems import SIZES, everyone, regression_dataset, regression_model

import fedjax_lite as fl
from fedjax_lite.data.population import device_rows, typical_rows
from fedjax_lite.xla.mesh import deal

COHORTS = ([3, 7, 0, 1], [9, 2, -1, 5], [1], [3, 3, 8], [], [4, 6, 2, 9])
CAPACITY = 4

eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


@functools.cache
def on_mesh(num_devices=1):
    return fl.clients_mesh(num_devices)


@functools.cache
def algorithm(num_devices=1, lanes=1, shuffle=True):
    return fl.fed_avg(
        regression_model(),
        optax.sgd(0.1, momentum=0.9),
        batch_size=3,
        num_epochs=2,
        shuffle=shuffle,
        lanes=lanes,
        mesh=on_mesh(num_devices),
    )


def train(algorithm, cohorts):
    """The state and metrics after each round, on the host."""
    state = algorithm.init(jax.random.key(0))
    history = []
    for r, cohort in enumerate(cohorts):
        state, info = algorithm.round(jax.random.key(r), state, cohort)
        history.append((state, info))
    return jax.device_get(history)


def rows_of(cohort, slot):
    """What a slot of a cohort refers to, in the part of its device."""
    start, size, slots = jax.device_get((cohort.offsets, cohort.num_examples, cohort.device_slots))
    start, size = start[slot], size[slot]
    ((device, _),) = np.argwhere(slots == slot)

    def of_feature(x):
        return np.split(np.asarray(x), len(slots))[device][start : start + size]

    return jax.tree.map(of_feature, cohort.examples)


@eight_devices
@pytest.mark.parametrize(
    ("num_devices", "lanes", "shuffle"),
    [(1, 1, True), (1, 3, True), (2, 1, True), (3, 2, False), (4, 2, True)],
)
def test_rounds_are_those_with_resident_examples(tmp_path, num_devices, lanes, shuffle):
    mesh = on_mesh(num_devices)
    regression_dataset().save(tmp_path / "data")
    dataset = fl.FederatedDataset.open(tmp_path / "data")
    resident = dataset.resident(mesh)
    streamed = dataset.streamed(CAPACITY, mesh=mesh)
    assert streamed.num_clients == resident.num_clients
    federated = algorithm(num_devices, lanes, shuffle)
    compiled = federated.round._cache_size()
    actual = train(federated, [fl.cohort_of(streamed, ids) for ids in COHORTS])
    assert federated.round._cache_size() == compiled + 1  # whoever takes part
    expected = train(federated, [everyone(resident, ids, CAPACITY) for ids in COHORTS])
    chex.assert_trees_all_equal(actual, expected)


@eight_devices
@pytest.mark.parametrize("num_devices", [1, 3, 8])
def test_a_device_has_the_rows_of_its_clients_and_zeros(num_devices):
    dataset = regression_dataset()
    streamed = dataset.streamed(CAPACITY, row_capacity=40, mesh=on_mesh(num_devices))
    for ids in COHORTS:
        cohort = fl.cohort_of(streamed, ids)
        assert cohort.client_ids.tolist() == ids + [-1] * (CAPACITY - len(ids))
        for slot, i in enumerate(ids):
            if i >= 0:
                chex.assert_trees_all_equal(rows_of(cohort, slot), dataset[i])
            else:
                assert np.asarray(cohort.num_examples)[slot] == 0
        named = np.append(cohort.client_ids, -1)[cohort.device_slots]
        for feature in cohort.examples.values():
            assert len(feature.addressable_shards) == num_devices
            for clients, shard in zip(named, feature.addressable_shards, strict=True):
                # Client 3 comes twice, and on one device its rows once.
                copied = sum(SIZES[i] for i in {*clients.tolist()} - {-1})
                assert len(shard.data) == streamed.row_capacity
                assert not np.asarray(shard.data)[copied:].any()


def test_devices_share_the_rows():
    rng = np.random.default_rng(0)
    for num_devices in (1, 2, 7, 64):
        sizes = rng.lognormal(3, 1.5, (200, 100)).astype(np.int64)
        loads = np.array([np.append(size, 0)[deal(size, num_devices)].sum(1) for size in sizes])
        np.testing.assert_array_equal(loads.sum(1), sizes.sum(1))
        # Whoever fits together fits when spread, and no room is wasted on large cohorts.
        room = [device_rows(int(s.sum()), int(s.max()), num_devices) for s in sizes]
        assert (loads.max(1) <= room).all()
        assert (room <= sizes.sum(1) / num_devices + sizes.max(1)).all()
    assert device_rows(5, 1000, 4) == 5  # what the user asked for is not exceeded


@eight_devices
def test_a_cohort_for_another_mesh_is_refused():
    cohort = fl.cohort_of(regression_dataset().streamed(CAPACITY, mesh=on_mesh(2)), [3, 7])
    federated = algorithm()
    with pytest.raises(ValueError, match="lie on 2 devices, and the algorithm runs on 1; give"):
        federated.round(jax.random.key(0), federated.init(jax.random.key(0)), cohort)


@eight_devices
def test_gradients_pass_through_rounds_with_rows_of_each_device():
    mesh, dataset = on_mesh(2), regression_dataset()
    federated = fl.fed_avg(
        regression_model(), optax.sgd(0.1), batch_size=3, differentiable=True, mesh=mesh
    )
    start = federated.init(jax.random.key(0))

    def after(params, cohort):
        state = dataclasses.replace(start, params=params)
        return optax.tree.norm(federated.round(jax.random.key(0), state, cohort)[0].params)

    streamed = fl.cohort_of(dataset.streamed(CAPACITY, mesh=mesh), [3, 0, 5])
    resident = everyone(dataset.resident(mesh), [3, 0, 5], CAPACITY)
    gradient = jax.jit(jax.grad(after))
    actual, expected = (gradient(start.params, cohort) for cohort in (streamed, resident))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


@eight_devices
def test_evaluation_reads_the_rows_of_each_device():
    mesh, dataset = on_mesh(3), regression_dataset()
    train, held_out = dataset.split_examples(0.4, seed=0)
    model, federated = regression_model(), algorithm(3)
    state = federated.init(jax.random.key(0))
    clients = [9, 3, -1, 0, 5]
    results = []
    for resident in (True, False):
        populations = [
            part.resident(mesh) if resident else part.streamed(5, mesh=mesh)
            for part in (train, held_out)
        ]
        cohorts = [fl.cohort_of(population, clients) for population in populations]
        evaluation = fl.evaluate_clients(model, state, cohorts[1], batch_size=2, mesh=mesh)
        fine_tuned = fl.evaluate_fine_tuned(
            model, state, *cohorts, optax.sgd(0.1), key=jax.random.key(1), mesh=mesh
        )
        results.append((evaluation, fine_tuned))
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)


def test_cohorts_made_ahead_keep_their_rows():
    # Rounds run behind the host, and on a CPU an array may be the very buffer it was made from.
    rows = np.arange(40000).reshape(8, 5000)
    dataset = fl.FederatedDataset.from_rows({"x": np.arange(40000, dtype=np.float32)}, rows)
    streamed = dataset.streamed(2, mesh=on_mesh())
    pairs = list(itertools.permutations(range(8), 2))
    cohorts = list(map(functools.partial(fl.cohort_of, streamed), pairs))
    total = jax.jit(lambda cohort: cohort.examples["x"].sum())
    totals = list(map(total, cohorts))
    for pair, cohort, x in zip(pairs, cohorts, totals, strict=True):
        np.testing.assert_allclose(x, rows[list(pair)].sum(), rtol=1e-5)
        for slot, i in enumerate(pair):
            chex.assert_trees_all_equal(rows_of(cohort, slot), dataset[i])


@pytest.mark.parametrize("lanes", [1, 3])
def test_not_a_number_stays_with_its_client(lanes):
    dataset = regression_dataset()
    for feature in dataset.examples.values():
        feature[dataset.offsets[3] : dataset.offsets[4]] = np.nan
    streamed = dataset.streamed(CAPACITY, row_capacity=64, mesh=on_mesh())
    federated = algorithm(lanes=lanes)
    # In the same buffer, and in the one before.
    after = train(federated, [fl.cohort_of(streamed, ids) for ids in ([2, 3, 4, 0], [2, 4, 0])])
    alone = train(federated, [fl.cohort_of(streamed, ids) for ids in ([2, 4, 0], [2, 4, 0])])
    assert after[0][1].num_nonfinite == 1
    assert after[1][1].num_nonfinite == 0
    chex.assert_tree_all_finite(after[1][0].params)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}  # the order of additions differs
    chex.assert_trees_all_close(after[1][0], alone[1][0], **tolerance)


def test_a_cohort_that_does_not_fit_takes_a_longer_buffer_and_says_so():
    dataset = regression_dataset()
    streamed = dataset.streamed(CAPACITY, row_capacity=7, mesh=on_mesh())
    with pytest.warns(UserWarning, match=r"more rows .* its row_capacity 7: it is given 28, "):
        exact = fl.cohort_of(streamed, [3, 7, 0])  # 12 + 9 + 7
    with pytest.warns(UserWarning, match=r"more rows .* its row_capacity 7: it is given 56, "):
        long = fl.cohort_of(streamed, [3, 7, 0, 5])
    assert len(long.examples["x"]) == 56
    assert len(exact.examples["x"]) == 28
    assert len(fl.cohort_of(streamed, [0]).examples["x"]) == 7
    expected = train(algorithm(), [everyone(dataset.resident(on_mesh()), [3, 7, 0, 5])])
    chex.assert_trees_all_equal(train(algorithm(), [long]), expected)


def test_by_default_cohorts_fit():
    rng = np.random.default_rng(0)
    sizes = np.maximum(rng.lognormal(3, 1.5, 5000).astype(np.int64), 1)
    rows = typical_rows(sizes, 100)
    drawn = [sizes[rng.choice(5000, 100, replace=False)].sum() for _ in range(2000)]
    assert max(drawn) <= rows < 3 * np.mean(drawn)
    # Never more than there can be: everyone, or the largest.
    assert typical_rows(sizes, 5000) == sizes.sum()
    assert typical_rows(np.array([5, 5, 0, 1, 5]), 2) == 10


@pytest.mark.parametrize("dtype", ["int64", ">i4", "float64", ">f4", "uint8", "bool"])
def test_dtypes_are_those_of_resident_examples(dtype):
    dataset = fl.FederatedDataset.from_clients(
        {i: {"x": np.arange(i, 6).astype(dtype)} for i in (0, 3)}
    )
    resident, streamed = (
        dataset.resident(on_mesh()),
        fl.cohort_of(dataset.streamed(2, row_capacity=9, mesh=on_mesh()), [0, 1]),
    )
    chex.assert_trees_all_equal(streamed.examples, resident.examples)
    chex.assert_trees_all_equal_dtypes(streamed.examples, resident.examples)


def test_refuses_integers_that_jax_would_cut_off():
    dataset = fl.FederatedDataset.from_clients({0: {"x": [2**40]}, 1: {"x": [1]}})
    streamed = dataset.streamed(1, mesh=on_mesh())
    assert fl.cohort_of(streamed, [1]).examples["x"].tolist() == [1]
    with pytest.raises(ValueError, match="feature 'x' holds integers that do not fit int32"):
        fl.cohort_of(streamed, [0])


@pytest.mark.parametrize(
    ("client_ids", "message"),
    [
        ([0.0], r"client_ids has shape \(1,\) and dtype float64; pass integers \[capacity\]"),
        ([0, 1, 2], r"client_ids has 3 clients, above cohort_capacity 2; pass fewer"),
        ([0, 10], r"lies between 0 and 10; choose positions from 0 to 9, or -1 for an empty"),
    ],
)
def test_refuses_clients_that_are_none(client_ids, message):
    with pytest.raises(ValueError, match=message):
        fl.cohort_of(regression_dataset().streamed(2), client_ids)


def test_refuses_impossible_capacities_and_meshes():
    dataset = regression_dataset()
    with pytest.raises(ValueError, match="cohort_capacity is 11; choose an integer between 1 and"):
        dataset.streamed(11)
    with pytest.raises(ValueError, match="row_capacity is 0; choose"):
        dataset.streamed(2, row_capacity=0)
    with pytest.raises(ValueError, match=r"row_capacity is \d+; choose .* 2147483647"):
        dataset.streamed(2, row_capacity=2**31)
    with pytest.raises(TypeError, match="mesh is of type int; pass a Mesh"):
        dataset.streamed(2, mesh=4)


def test_prefetching_changes_nothing():
    streamed = regression_dataset().streamed(CAPACITY, mesh=on_mesh())
    expected = train(algorithm(), map(functools.partial(fl.cohort_of, streamed), COHORTS))
    ahead = fl.prefetch(lambda r: fl.cohort_of(streamed, COHORTS[r]), range(len(COHORTS)))
    chex.assert_trees_all_equal(train(algorithm(), ahead), expected)


@pytest.mark.parametrize("depth", [1, 3, 20])
def test_prefetch_keeps_the_order_whatever_the_timing(depth):
    def make(r):
        time.sleep(0.01 * (r % 3 == 0))
        return r * r

    made = []
    for square in fl.prefetch(make, range(10), depth=depth):
        time.sleep(0.01 * (square % 4 == 0))
        made.append(square)
    assert made == [r * r for r in range(10)]
    assert list(fl.prefetch(make, [], depth=depth)) == []


def test_prefetch_works_ahead_by_its_depth():
    made, third = [], threading.Event()

    def make(r):
        made.append(r)
        if r == 2:
            third.set()
        return r

    ahead = fl.prefetch(make, itertools.count(), depth=2)
    assert next(ahead) == 0
    assert third.wait(10)  # while the consumer of the first has not come back
    ahead.close()
    assert made == [0, 1, 2]


def prefetching_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_what_make_raises_is_raised_in_its_turn():
    def make(r):
        return 6 // (r - 2)

    ahead = fl.prefetch(make, range(10), depth=5)
    assert [next(ahead), next(ahead)] == [-3, -6]
    with pytest.raises(ZeroDivisionError):
        next(ahead)
    assert not prefetching_threads()


@pytest.mark.parametrize("end", ["break", "interrupt", "error"])
def test_leaving_the_loop_ends_the_thread(end):
    calls = []

    def make(r):
        calls.append(r)
        time.sleep(0.05)
        return r

    def loop():
        for _ in fl.prefetch(make, itertools.count(), depth=50):
            if end == "break":
                break
            raise KeyboardInterrupt if end == "interrupt" else RuntimeError

    began = time.monotonic()
    if end == "break":
        loop()
    else:
        with pytest.raises(KeyboardInterrupt if end == "interrupt" else RuntimeError):
            loop()
    assert not prefetching_threads()
    assert len(calls) < 10  # not all of the fifty that were asked for
    assert time.monotonic() - began < 30


def test_prefetch_refuses_to_be_behind():
    with pytest.raises(ValueError, match="depth is 0; choose an integer at least 1"):
        fl.prefetch(str, range(3), depth=0)
