"""Small problems that the tests share."""

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_lite as fl

SIZES = (7, 0, 1, 12, 3, 5, 2, 9, 4, 6)


def regression_dataset(sizes=SIZES, seed=0):
    """Linear regression with noise; client i has `sizes[i]` examples."""
    rng = np.random.default_rng(seed)
    weights = np.array([1.0, -2.0, 0.5])
    clients = {}
    for i, size in enumerate(sizes):
        x = rng.normal(size=(size, 3))
        y = x @ weights + 0.1 * rng.normal(size=size)
        clients[i] = {"x": x.astype(np.float32), "y": y.astype(np.float32)}
    return fl.FederatedDataset.from_clients(clients)


def regression_model(num_features=3):
    def loss(params, batch):
        return (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2 / 2

    def init(key):
        """A start for each key, in a program that compiles in half the time of random bits."""
        return {
            "w": jnp.cos(jax.random.key_data(key)[-1] + jnp.arange(float(num_features))),
            "b": 0.0,
        }

    return fl.function_model(loss, init)


def everyone(population, order=None, capacity=None):
    """A cohort of all clients of a resident population, in the order given."""
    order = np.arange(population.num_clients) if order is None else np.asarray(order)
    capacity = order.size if capacity is None else capacity
    ids = np.full(capacity, -1, np.int32)
    ids[: order.size] = order
    return fl.cohort_of(population, ids)


def forms_of_a_round(experiment):
    """The forms of a state, of that after a round, and of what the round tells."""

    def play(key):
        state = experiment.algorithm.init(key, num_clients=experiment.population.num_clients)
        ids = experiment.sampler.select(key, 0).client_ids
        cohort = fl.cohort_of(experiment.population, ids, key=key)
        return state, *experiment.algorithm.round(key, state, cohort)

    return jax.eval_shape(play, jax.random.key(0))
