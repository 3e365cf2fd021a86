"""Two complete simulations: generated points in a square, and handwritten digits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from fedjax_lite.algorithms.fed_sgd import fed_sgd
from fedjax_lite.base import FederatedAlgorithm, PyTree, ServerState
from fedjax_lite.data.digits import digits
from fedjax_lite.data.population import Population
from fedjax_lite.data.synthetic import halfspace, halfspace_batch
from fedjax_lite.engine.cohorts import cohort
from fedjax_lite.evaluation.central import evaluate
from fedjax_lite.models import halfspace_classifier, mlp
from fedjax_lite.models.model import Model
from fedjax_lite.xla import random

MIN_COHORT, MAX_COHORT = 20, 29


class Simulation(NamedTuple):
    """A federated simulation, ready to run.

    Attributes:
      init: `init(key) -> state`.
      round: `round(key, state, population) -> (state, metrics)`: evaluates the server's
        params, then draws a cohort and trains on it. Pure, and jitted. The root `key` is the
        same for all rounds; `state.round` sets them apart.
      population: The clients.
    """

    init: Callable[[jax.Array], ServerState]
    round: jax.stages.Wrapped
    population: Population


def halfspace_simulation(**options: Any) -> Simulation:
    """The tutorial: one linear layer learns a line from points that the server never sees.

    Cohorts of 20 to 29 of 100 clients; each client sends the sum of the gradients of 5 to 9
    fresh batches of 1000 points, the server adds them up and takes one step of Adam with
    learning rate 1. It evaluates on 1000 fresh points.

    Args:
      **options: Passed on to `fed_sgd` (`lanes`, `mesh`).
    """
    model = halfspace_classifier()
    algorithm = fed_sgd(model, server_optimizer=optax.adam(1.0), reduction="sum", **options)
    return simulation(model, algorithm, halfspace(), lambda key: halfspace_batch(key, 1000))


def digits_simulation(seed: int = 0, **options: Any) -> Simulation:
    """Digits of 8 x 8 pixels, skewed over 50 clients; a small MLP, FedSGD with Adam.

    Cohorts of 20 to 29 clients; the mean of the clients' gradients, weighted by their
    examples, goes to Adam with learning rate 0.01. A fifth of the images is held out for
    evaluation.

    Args:
      seed: Determines the split (Dirichlet, concentration 0.3).
      **options: Passed on to `fed_sgd` (`lanes`, `mesh`).

    Raises:
      ImportError: scikit-learn, which brings the images, is missing.
    """
    dataset, held_out = digits(seed=seed)
    model = mlp(input_shape=(64,), hidden=(64,), num_classes=10)
    algorithm = fed_sgd(model, server_optimizer=optax.adam(0.01), **options)
    population = dataset.resident(options.get("mesh"))
    return simulation(model, algorithm, population, lambda key: held_out)


def simulation(
    model: Model,
    algorithm: FederatedAlgorithm,
    population: Population,
    evaluation: Callable[[jax.Array], dict[str, PyTree]],
) -> Simulation:
    """The tutorial's loop around any algorithm: evaluate, draw 20 to 29 clients, train.

    Args:
      model: The model, for its metrics.
      algorithm: The algorithm.
      population: The clients.
      evaluation: `evaluation(key) -> {feature: [rows, ...]}`, what to evaluate on.
    """

    @jax.jit
    def round(
        key: jax.Array, state: ServerState, population: Population
    ) -> tuple[ServerState, dict[str, jax.Array]]:
        key_evaluation, key_size, key_cohort, key_round = (
            random.fold_in_pair(key, purpose, state.round) for purpose in range(4)
        )
        metrics = evaluate(model, state, evaluation(key_evaluation))
        cohort_size = jax.random.randint(key_size, (), MIN_COHORT, MAX_COHORT + 1)
        clients = cohort(key_cohort, population, cohort_size, capacity=MAX_COHORT)
        state, info = algorithm.round(key_round, state, clients)
        return state, {**metrics, "cohort_size": info.num_clients}

    return Simulation(algorithm.init, round, population)
