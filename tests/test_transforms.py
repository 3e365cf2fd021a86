"""Training as a function: differentiated, and mapped over the numbers that it is run with."""

import dataclasses
import functools

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import everyone, regression_dataset, regression_model

import fedjax_lite as fl

eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
NUM_ROUNDS = 2


def build(client_rate=0.1, server_rate=1.0, num_devices=1, **options):
    return fl.fed_avg(
        regression_model(),
        optax.sgd(client_rate, momentum=0.5),
        optax.sgd(server_rate),
        **{"batch_size": 4, "mesh": fl.clients_mesh(num_devices), **options},
    )


def train(algorithm, start, cohort):
    """Two rounds, with the losses."""

    def step(state, key):
        return algorithm.round(key, state, cohort)

    keys = jax.random.split(jax.random.key(3), NUM_ROUNDS)
    return jax.lax.scan(step, algorithm.init(start), keys)


@eight_devices
@pytest.mark.parametrize(
    ("lanes", "num_devices", "options"),
    [(1, 1, {"num_epochs": 2}), (3, 1, {"num_steps": 3}), (2, 2, {})],
)
def test_gradients_agree_with_finite_differences(lanes, num_devices, options):
    with jax.enable_x64(True):
        dataset = regression_dataset()
        cohort = everyone(dataset.resident(fl.clients_mesh(num_devices)), [3, 1, 7, 5, 0, 2])
        options = {"lanes": lanes, "num_devices": num_devices, **options}

        def final_loss(numbers, differentiable):
            algorithm = build(numbers["rate"], differentiable=differentiable, **options)
            state, infos = train(algorithm, numbers["start"], cohort)
            evaluated = fl.evaluate(regression_model(), state, dataset.examples)["loss"]
            return evaluated + infos.loss.sum()

        start = {"w": jnp.array([0.3, -0.2, 0.1]), "b": jnp.array(0.5)}
        numbers = {"rate": jnp.array(0.07), "start": start}
        loss, gradient = jax.jit(jax.value_and_grad(lambda x: final_loss(x, True)))(numbers)
        plain = jax.jit(lambda x: final_loss(x, False))
        # The loops of static length change nothing.
        np.testing.assert_allclose(loss, plain(numbers), rtol=1e-12)
        flat, unravel = jax.flatten_util.ravel_pytree(numbers)
        slopes = [
            (plain(unravel(flat + step)) - plain(unravel(flat - step))) / 2e-5
            for step in 1e-5 * np.eye(flat.size)
        ]
        np.testing.assert_allclose(jax.flatten_util.ravel_pytree(gradient)[0], slopes, rtol=1e-6)


def test_gradients_are_finite_where_nothing_changes():
    cohort = everyone(regression_dataset().resident(fl.clients_mesh(1)))

    def final_bias(client_rate):
        algorithm = build(client_rate, num_steps=2, differentiable=True, measure_clients=True)
        state, _ = train(algorithm, {"w": jnp.zeros(3), "b": jnp.float32(0.0)}, cohort)
        return state.params["b"]

    # All deltas are zero at rate zero, where a norm has no gradient.
    assert jnp.isfinite(jax.jit(jax.grad(final_bias))(0.0))


def test_a_generated_population_needs_a_bound_on_its_steps():
    build = functools.partial(fl.fed_avg, fl.models.halfspace_classifier(), optax.sgd(0.1))
    algorithm = build(differentiable=True)
    population = fl.data.halfspace(batch_size=10)
    state = algorithm.init(jax.random.key(0))
    unbounded = dataclasses.replace(population, most_examples=None)
    cohort = fl.cohort(jax.random.key(0), unbounded, 2)
    with pytest.raises(ValueError, match="num_steps is None with differentiable=True and a gen"):
        algorithm.round(jax.random.key(0), state, cohort)
    cohort = fl.cohort(jax.random.key(0), population, 2)
    assert cohort.num_examples.max() > 10 * 5
    same, _ = build().round(jax.random.key(0), state, cohort)
    bounded, _ = algorithm.round(jax.random.key(0), state, cohort)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), bounded, same)


@eight_devices
@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_sweep_of_learning_rates_equals_one_run_at_a_time(num_devices):
    cohort = everyone(regression_dataset().resident(fl.clients_mesh(num_devices)))

    def run(client_rate, server_rate):
        algorithm = build(client_rate, server_rate, num_devices)
        return train(algorithm, jax.random.key(0), cohort)

    rates = jnp.meshgrid(jnp.geomspace(0.01, 0.2, 4), jnp.linspace(0.5, 2.0, 4))
    client_rates, server_rates = (x.ravel() for x in rates)
    together = jax.jit(jax.vmap(run))(client_rates, server_rates)
    one = jax.jit(run)
    alone = [one(*pair) for pair in zip(client_rates, server_rates, strict=True)]
    assert one._cache_size() == 1  # the rates are numbers, not structure
    alone = jax.tree.map(lambda *xs: np.stack(xs), *jax.device_get(alone))
    chex.assert_trees_all_close(jax.device_get(together), alone, rtol=1e-5, atol=1e-5)
    assert len(np.unique(alone[0].params["b"])) == 16


@pytest.mark.parametrize("lanes", [1, 3])
def test_clients_are_measured_before_and_after_training(lanes):
    dataset = regression_dataset()
    population = dataset.resident(fl.clients_mesh(1))
    cohort = everyone(population)
    algorithm = build(measure_clients=True, lanes=lanes)
    start = algorithm.init(jax.random.key(0))
    _, info = algorithm.round(jax.random.key(0), start, cohort)

    def loss_of(state, client):
        params, features = jax.device_get(state.params), dataset[client]
        errors = features["x"] @ params["w"] + params["b"] - features["y"]
        return np.square(errors, dtype=np.float64).mean() / 2

    sizes = np.asarray(cohort.num_examples)
    before = np.zeros(10)
    for i in np.flatnonzero(sizes):
        before[i] = loss_of(start, i)
        # The round of a client alone, without a server: its params are the new state.
        alone, _ = algorithm.round(jax.random.key(0), start, everyone(population, [i], capacity=10))
        np.testing.assert_allclose(info.clients["loss_after"][i], loss_of(alone, i), rtol=1e-5)
    np.testing.assert_allclose(info.clients["loss_before"], before, rtol=1e-5)
    assert info.clients["loss_after"][1] == 0  # the client without examples
    np.testing.assert_allclose(
        info.metrics["loss_before"], (before * sizes).sum() / sizes.sum(), rtol=1e-5
    )
    assert info.metrics["loss_after"] < info.metrics["loss_before"]
    assert jax.eval_shape(build().round, jax.random.key(0), start, cohort)[1].metrics == {}
