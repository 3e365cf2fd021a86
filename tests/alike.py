"""Rounds of an algorithm, and what its reference in NumPy is given for the same ones."""

import functools

import jax
import numpy as np
import optax
from problems import SIZES, everyone, regression_dataset

COHORTS = [[3, 0, 9, 1], [8, 3, 2, 7], [3, 9, 0, 5], [0, 6, 9, 3]]
RATE = 0.05
SGD = optax.sgd(RATE)
PARAMS = {"w": np.array([0.5, -1.0, 2.0]), "b": np.array(0.25)}


@functools.cache
def dataset():
    """In float64, and with one of three labels for each example."""

    def wide(own):
        labels = np.digitize(own["x"][:, 0], [-0.5, 0.5])
        return {name: np.asarray(x, np.float64) for name, x in own.items()} | {"label": labels}

    return regression_dataset().map(wide)


def clients(*features):
    with jax.enable_x64(True):
        return [tuple(dataset()[i][name] for name in features) for i in range(len(SIZES))]


def batches(epochs=2, size=4):
    """The indices of each client's batches, in the order of its rows."""
    return [
        [
            [np.arange(i, min(i + size, SIZES[k])) for i in range(0, SIZES[k], size)] * epochs
            for k in cohort
        ]
        for cohort in COHORTS
    ]


def rounds(factory, model, params, model_state=None, *, client_optimizer=SGD, **options):
    """The algorithm, and its state and what it reports after each round."""
    options = {"batch_size": 4, "num_epochs": 2, "shuffle": False, **options}
    algorithm = factory(model, client_optimizer, **options)
    state = algorithm.init(params, model_state, num_clients=len(SIZES))
    population = dataset().resident(options.get("mesh"))
    for i, ids in enumerate(COHORTS):
        cohort = everyone(population, ids, capacity=6)
        state, info = algorithm.round(jax.random.key(i), state, cohort)
        yield algorithm, state, info
