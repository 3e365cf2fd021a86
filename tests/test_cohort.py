import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import everyone, regression_dataset, regression_model

import fedjax_lite as fl
from fedjax_lite.engine.batches import Batching, Slot, count_steps, read_batch


@pytest.fixture(scope="module")
def population():
    return regression_dataset().resident(fl.clients_mesh(1))


def test_draws_distinct_clients_with_their_own_rows(population):
    cohort = fl.cohort(jax.random.key(0), population, 6, capacity=8)
    ids = np.asarray(cohort.client_ids)
    assert (ids[6:] == -1).all()
    assert len(set(ids[:6].tolist())) == 6
    offsets = np.asarray(population.offsets)
    np.testing.assert_array_equal(cohort.offsets[:6], offsets[ids[:6]])
    np.testing.assert_array_equal(cohort.num_examples[:6], np.diff(offsets)[ids[:6]])
    assert (cohort.num_examples[6:] == 0).all()


def test_draws_every_client_equally_often(population):
    draw = lambda key: fl.cohort(key, population, 3).client_ids
    ids = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), 4000))
    counts = np.bincount(np.asarray(ids).ravel(), minlength=10)
    # Each client is in a cohort with probability 0.3; six standard errors.
    assert (np.abs(counts - 1200) < 6 * np.sqrt(4000 * 0.3 * 0.7)).all()


def test_a_traced_size_equals_a_static_one(population):
    key = jax.random.key(2)
    draw = jax.jit(lambda size: fl.cohort(key, population, size, capacity=10))
    for size in (1, 4, 10):
        traced, static = draw(size), fl.cohort(key, population, size, capacity=10)
        np.testing.assert_array_equal(traced.client_ids, static.client_ids)


def test_a_billion_generated_clients_cost_nothing():
    population = fl.data.halfspace(num_clients=10**9, batch_size=4)
    cohort = fl.cohort(jax.random.key(0), population, 50)
    assert len(set(cohort.client_ids.tolist())) == 50
    assert set((cohort.num_examples / 4).tolist()) == {5, 6, 7, 8, 9}


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum),
    batch_size=st.integers(1, 12),
    shuffle=st.booleans(),
)
def test_every_example_is_read_exactly_once_per_epoch(sizes, batch_size, shuffle):
    rows = np.arange(sum(sizes))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    parts = [rows[owner == i] for i in range(len(sizes))]
    dataset = fl.FederatedDataset.from_rows({"row": rows}, parts)
    cohort = everyone(dataset.resident(fl.clients_mesh(1)))
    batching = Batching(batch_size=batch_size, num_epochs=2, shuffle=shuffle)
    num_steps = np.asarray(count_steps(cohort, jax.random.key(0), batching))
    read = jax.jit(
        lambda slot, step: read_batch(
            cohort, jax.random.key(0), Slot.of(cohort, slot), step, batching
        )
    )
    for slot, part in enumerate(parts):
        assert num_steps[slot] == 2 * -(-len(part) // batch_size)
        seen = []
        for step in range(num_steps[slot]):
            batch = read(slot, step)
            seen += np.asarray(batch["row"])[np.asarray(batch["mask"])].tolist()
            assert np.isin(batch["row"], part).all()  # padding is filled with the client's own
        for epoch in (seen[: len(part)], seen[len(part) :]):
            assert sorted(epoch) == part.tolist()
            assert shuffle or epoch == part.tolist()


def test_epochs_and_keys_are_shuffled_differently():
    rows = np.arange(40)
    dataset = fl.FederatedDataset.from_rows({"row": rows}, [rows[:20], rows[20:]])
    cohort = everyone(dataset.resident(fl.clients_mesh(1)))
    batching = Batching(batch_size=20, num_epochs=2, shuffle=True)
    read = jax.jit(lambda key, epoch: read_batch(cohort, key, Slot.of(cohort, 0), epoch, batching))
    orders = {
        tuple(np.asarray(read(key, epoch)["row"]) % 20)
        for key in jax.random.split(jax.random.key(0), 2)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


@pytest.mark.parametrize(
    ("size", "capacity", "message"),
    [
        (0, None, r"cohort_size is 0; choose an integer between 1 and 10"),
        (11, None, r"cohort_size is 11; choose an integer between 1 and 10"),
        (5, 4, r"cohort_size is 5, above capacity 4; raise capacity"),
        (5, 0, r"capacity is 0; choose"),
    ],
)
def test_refuses_impossible_sizes(population, size, capacity, message):
    with pytest.raises(ValueError, match=message):
        fl.cohort(jax.random.key(0), population, size, capacity=capacity)


def test_refuses_a_traced_size_without_capacity(population):
    with pytest.raises(ValueError, match="capacity is None while cohort_size is traced; pass"):
        jax.jit(lambda size: fl.cohort(jax.random.key(0), population, size))(3)


def test_refuses_a_traced_size_that_is_no_integer_scalar(population):
    for size in (2.5, jnp.ones(3, jnp.int32)):
        with pytest.raises(ValueError, match="cohort_size is traced with shape"):
            jax.jit(lambda size: fl.cohort(jax.random.key(0), population, size, capacity=3))(size)


def test_shares_the_examples_of_the_population(population):
    cohort = fl.cohort(jax.random.key(0), population, 3)
    assert cohort.examples["x"] is population.examples["x"]


def test_draws_from_a_population_of_one():
    cohort = fl.cohort(jax.random.key(0), regression_dataset([4]).resident(), 1)
    assert cohort.client_ids.tolist() == [0]
    assert cohort.num_examples.tolist() == [4]


def test_refuses_what_is_not_a_number_or_a_population(population):
    with pytest.raises(TypeError, match=r"cohort_size is 2.5, of type float; pass an integer"):
        fl.cohort(jax.random.key(0), population, 2.5)
    with pytest.raises(TypeError, match=r"population is a FederatedDataset; pass .*resident"):
        fl.cohort(jax.random.key(0), regression_dataset(), 2)


def test_generated_batches_differ_between_rounds_clients_and_steps():
    cohort = fl.cohort(jax.random.key(0), fl.data.halfspace(batch_size=4), 3)
    batching = Batching(batch_size=4)
    read = jax.jit(lambda key, step: read_batch(cohort, key, Slot.of(cohort, 0), step, batching))
    keys = [jax.random.key(0), jax.random.key(1)]
    batches = [read(key, step)["x"] for key in keys for step in (0, 1)]
    assert len({np.asarray(b).tobytes() for b in batches}) == 4


def test_generated_batches_are_masked_beyond_the_number_of_examples():
    population = fl.data.GeneratedPopulation(
        num_clients=2,
        num_examples=lambda key, client_id: 5 + client_id,
        sample=lambda key, client_id: {"x": jnp.ones(4)},
    )
    cohort = fl.cohort(jax.random.key(0), population, 2)
    key, batching = jax.random.key(0), Batching(batch_size=4)
    read = jax.jit(lambda slot, step: read_batch(cohort, key, slot, step, batching))
    for slot in range(2):
        masks = [read(Slot.of(cohort, slot), step)["mask"] for step in (0, 1)]
        assert np.sum(masks) == 5 + cohort.client_ids[slot]


def test_generated_clients_have_no_more_examples_than_any_may_have():
    population = fl.data.GeneratedPopulation(
        num_clients=3,
        num_examples=lambda key, client_id: 4 + client_id,
        sample=lambda key, client_id: {"x": jnp.ones(4)},
        most_examples=5,
    )
    cohort = fl.cohort_of(population, [0, 1, 2, -1], key=jax.random.key(0))
    assert cohort.num_examples.tolist() == [4, 5, 5, 0]
    with pytest.raises(ValueError, match="most_examples"):
        dataclasses.replace(population, most_examples=-1)


@pytest.mark.parametrize("generated", [False, True])
def test_the_cohort_of_drawn_clients_is_the_drawn_cohort(population, generated):
    chosen = fl.data.halfspace(num_clients=50, batch_size=4) if generated else population
    key = jax.random.key(6)
    drawn = fl.cohort(key, chosen, 4, capacity=6)
    given = fl.cohort_of(chosen, drawn.client_ids, key=key)
    traced = jax.jit(lambda ids: fl.cohort_of(chosen, ids, key=key))(drawn.client_ids)
    for other in (given, traced):
        jax.tree.map(np.testing.assert_array_equal, other, drawn)
    assert given.client_ids.dtype == jnp.int32


def fed_avg(**options):
    sgd, mesh = (optax.sgd(0.1), optax.sgd(1.0)), fl.clients_mesh(1)
    return fl.fed_avg(regression_model(), *sgd, batch_size=4, mesh=mesh, **options)


def test_empty_slots_may_lie_anywhere_and_count_for_nothing(population):
    cohort = fl.cohort_of(population, [-1, 4, -1, 0])
    assert cohort.client_ids.tolist() == [-1, 4, -1, 0]
    assert cohort.num_examples.tolist() == [0, 3, 0, 7]
    algorithm = fed_avg(lanes=2)
    state, key = algorithm.init(jax.random.key(0)), jax.random.key(1)
    after, info = algorithm.round(key, state, cohort)
    compact, _ = algorithm.round(key, state, fl.cohort_of(population, [4, 0]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), after, compact)
    assert (info.num_clients, info.num_empty) == (2, 0)


def test_a_client_named_twice_sends_the_same_update_twice(population):
    algorithm = fed_avg(weighting="uniform")
    state, key = algorithm.init(jax.random.key(0)), jax.random.key(1)

    def update(client_ids):
        after, info = algorithm.round(key, state, fl.cohort_of(population, client_ids))
        return jax.tree.map(np.subtract, *jax.device_get((after.params, state.params))), info

    (both, info), (first, _), (second, _) = map(update, ([3, 5, 3], [3, -1, -1], [5, -1, -1]))
    expected = jax.tree.map(lambda x, y: (2 * x + y) / 3, first, second)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), both, expected)
    norms = info.clients["update_norm"]
    assert norms[0] == norms[2]
    assert norms[0] != norms[1]


@pytest.mark.parametrize("generated", [False, True])
def test_traced_ids_beyond_the_population_are_clients_without_examples(population, generated):
    chosen = fl.data.halfspace(num_clients=10, batch_size=4) if generated else population
    collect = jax.jit(lambda ids: fl.cohort_of(chosen, ids, key=jax.random.key(0)))
    cohort = collect(jnp.array([3, 10, 2**31 - 1, -7]))
    assert (cohort.num_examples > 0).tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("client_ids", "message"),
    [
        ([0, 10], "client_ids lies between 0 and 10; choose positions from 0 to 9, or -1"),
        (np.array([-2, 3]), "client_ids lies between -2 and 3; choose"),
        (np.array([2**32]), "client_ids lies between 4294967296 and 4294967296; choose"),
        ([[0, 1]], r"client_ids has shape \(1, 2\) and dtype int64; pass integers \[capacity\]"),
        ([], r"client_ids has shape \(0,\) and dtype float64; pass"),
        ([0.5], r"client_ids has shape \(1,\) and dtype float64; pass"),
        ([True], r"client_ids has shape \(1,\) and dtype bool; pass"),
    ],
)
def test_refuses_ids_that_name_no_client(population, client_ids, message):
    with pytest.raises(ValueError, match=message):
        fl.cohort_of(population, client_ids)


def test_generated_clients_need_a_key_for_their_sizes():
    with pytest.raises(ValueError, match=r"key is None beside a GeneratedPopulation.* pass key="):
        fl.cohort_of(fl.data.halfspace(), [0])
    with pytest.raises(TypeError, match=r"population is a FederatedDataset; pass .*resident"):
        fl.cohort_of(regression_dataset(), [0])
