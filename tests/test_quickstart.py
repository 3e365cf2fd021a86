"""The tutorial simulation: one trace for all rounds, and the same however it is run."""

import collections
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lite as fl
from fedjax_lite.experiments.quickstart import digits_simulation, halfspace_simulation, simulation


def looped(task, seed, num_rounds):
    key_init, key = jax.random.split(jax.random.key(seed))
    state, history = task.init(key_init), []
    for _ in range(num_rounds):
        state, metrics = task.round(key, state, task.population)
        history.append(jax.device_get(metrics))
    return state, jax.tree.map(lambda *rows: np.stack(rows), *history)


def scanned(task, seed, num_rounds):
    key_init, key = jax.random.split(jax.random.key(seed))

    def step(state, _):
        return task.round(key, state, task.population)

    return jax.lax.scan(step, task.init(key_init), length=num_rounds)


def test_a_hundred_ragged_rounds_are_traced_once():
    traces = collections.Counter()
    model = fl.models.halfspace_classifier()

    def loss(*args):
        traces["loss"] += 1
        return model.loss(*args)

    algorithm = fl.fed_sgd(model._replace(loss=loss), optax.adam(1.0), reduction="sum")
    population = fl.data.halfspace(batch_size=200)
    task = simulation(model, algorithm, population, lambda key: fl.data.halfspace_batch(key, 1000))
    looped(task, seed=0, num_rounds=1)
    first = traces["loss"]
    _, history = looped(task, seed=0, num_rounds=100)
    assert traces["loss"] == first
    assert task.round._cache_size() == 1
    assert set(history["cohort_size"]) == set(range(20, 30))
    assert history["loss"][-1] < 0.13
    assert history["accuracy"][-1] >= 0.99


@pytest.mark.parametrize("build", [halfspace_simulation, digits_simulation])
def test_loop_scan_and_vmap_over_seeds_agree(build):
    task, seeds, num_rounds = build(mesh=fl.clients_mesh(1)), (0, 1), 5
    scan = lambda seed: scanned(task, seed, num_rounds)
    together, alone = jax.jit(jax.vmap(scan))(jnp.array(seeds)), jax.jit(scan)
    for i, seed in enumerate(seeds):
        loop = looped(task, seed, num_rounds)
        for other in (alone(seed), jax.tree.map(operator.itemgetter(i), together)):
            for actual, expected in zip(jax.tree.leaves(other), jax.tree.leaves(loop), strict=True):
                np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4)


def test_one_seed_gives_the_same_bits():
    task = halfspace_simulation(mesh=fl.clients_mesh(1))
    first, second = looped(task, 3, 5), looped(task, 3, 5)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(first), jax.device_get(second))
