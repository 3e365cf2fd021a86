"""What algorithms become in special cases, and what their numbers may be."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import SIZES, everyone, regression_dataset, regression_model

import fedjax_lite as fl

MODEL, SGD = regression_model(), optax.sgd(0.1, momentum=0.5)
OPTIONS = {"batch_size": 4, "num_epochs": 2}


@functools.cache
def population(sizes=SIZES):
    return regression_dataset(sizes).resident(fl.clients_mesh(1))


def trained(algorithm, cohort=None, num_rounds=2):
    cohort = everyone(population()) if cohort is None else cohort
    state = algorithm.init(jax.random.key(0), num_clients=cohort.num_clients)
    for r in range(num_rounds):
        state, _ = algorithm.round(jax.random.key(r), state, cohort)
    return state


def build(factory, *args, **options):
    return factory(MODEL, *args, mesh=fl.clients_mesh(1), **{**OPTIONS, **options})


@functools.cache
def fed_avg(weighting="uniform"):
    return trained(build(fl.fed_avg, SGD, weighting=weighting)).params


def close(actual, desired, tolerance=1e-5):
    chex.assert_trees_all_close(actual, desired, rtol=tolerance, atol=tolerance)


def scores(params, model_state, batch):
    return batch["x"] * params["w"]


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (fl.fed_ntd, {"beta": 0.0, "logits": scores, "weighting": "uniform"}),
        (fl.q_fed_avg, {"q": 0.0, "lipschitz": 3.0}),
        (fl.fed_sam, {"rho": 0.0}),
        (fl.fed_exp, {"epsilon": 1e6}),
        (fl.ditto, {"mu": 0.7, "weighting": "uniform"}),
        (fl.ada_fed_prox, {"step_size": 0.0, "weighting": "uniform"}),
    ],
)
def test_is_fed_avg(factory, options):
    close(trained(build(factory, SGD, **options)).params, fed_avg())


def test_mime_lite_with_a_base_optimizer_without_state_is_fed_avg():
    actual = trained(build(fl.mime_lite, optax.sgd(0.1)))
    close(actual.params, trained(build(fl.fed_avg, optax.sgd(0.1), weighting="uniform")).params)


@pytest.mark.parametrize("factory", [fl.mime, fl.mime_lite])
def test_mime_of_one_client_and_one_step_is_its_base_optimizer(factory):
    base = optax.adam(0.1)
    algorithm = build(factory, base, num_epochs=1, batch_size=32)
    dataset, client = regression_dataset(), 3
    state = trained(algorithm, fl.cohort_of(population(), [client]), num_rounds=3)
    params = algorithm.init(jax.random.key(0)).params
    base_state = base.init(params)
    batch = {**dataset[client], "mask": np.ones(SIZES[client], bool)}

    @jax.jit
    def step(params, base_state):
        gradient = jax.grad(lambda w: MODEL.loss(w, {}, batch, None)[0].mean())(params)
        updates, base_state = base.update(gradient, base_state, params)
        return optax.apply_updates(params, updates), base_state

    for _ in range(3):
        params, base_state = step(params, base_state)
    close(state.params, params)
    close(state.opt_state.base, base_state)


def test_fed_exp_does_not_extrapolate_where_clients_agree():
    cohort = fl.cohort_of(population(), [3])
    state = trained(build(fl.fed_exp, SGD, epsilon=0.0), cohort)
    assert state.opt_state.step_size == 1  # One half, by the formula.
    close(state.params, trained(build(fl.fed_avg, SGD), cohort).params)


def test_ada_fed_prox_that_does_not_adapt_is_fed_prox():
    close(
        trained(build(fl.ada_fed_prox, SGD, mu=0.3, step_size=0.0)).params,
        trained(build(fl.fed_prox, SGD, mu=0.3)).params,
    )


def test_fed_shuffle_of_equal_clients_is_fed_avg_at_the_rate_of_an_epoch():
    cohort = everyone(population((8,) * 3))  # Two batches of four in each epoch.
    shuffled = trained(build(fl.fed_shuffle, optax.sgd(0.2)), cohort)
    close(shuffled.params, trained(build(fl.fed_avg, optax.sgd(0.1)), cohort).params)


def test_agnostic_fed_avg_of_clients_that_are_domains_with_fixed_weights_is_fed_avg():
    cohort = everyone(population((8,) * 3))
    options = {"num_epochs": 1, "batch_size": 8}
    agnostic = build(
        fl.agnostic_fed_avg, SGD, num_domains=3, domain_learning_rate=0.0, window_size=2, **options
    )
    close(
        trained(agnostic, cohort).params, trained(build(fl.fed_avg, SGD, **options), cohort).params
    )


def test_ditto_without_a_pull_trains_each_client_alone():
    kept = jax.device_get(trained(build(fl.ditto, SGD, mu=0.0)).store.params)
    averaging = build(fl.fed_avg, SGD)
    for client in (2, 3):
        alone = trained(averaging, fl.cohort_of(population(), [client]))
        close(jax.tree.map(lambda x, i=client: x[i], kept), alone.params)


def test_per_fed_avg_without_a_step_of_its_own_is_fed_avg_on_every_other_example():
    halves = fl.FederatedDataset.from_clients(
        [{key: value[1::2] for key, value in regression_dataset()[3].items()}]
    )
    options = {"num_epochs": 1, "batch_size": 32, "shuffle": False}
    actual = trained(
        build(fl.per_fed_avg, SGD, alpha=0.0, **options), fl.cohort_of(population(), [3])
    )
    half = everyone(halves.resident(fl.clients_mesh(1)))
    close(actual.params, trained(build(fl.fed_avg, SGD, **options), half).params)


def least_squares(datasets, pull=0.0, to=0.0):
    """The minimum of the mean over data sets of their mean losses, plus pull / 2 |w - to|^2."""
    matrix, vector = pull * np.eye(4), pull * to * np.ones(4)
    for examples in datasets:
        x = np.c_[examples["x"], np.ones(len(examples["x"]))].astype(float)
        matrix += x.T @ x / len(x) / len(datasets)
        vector += x.T @ examples["y"] / len(x) / len(datasets)
    *w, b = np.linalg.solve(matrix, vector)
    return {"w": np.array(w), "b": b}


def test_fed_dyn_ends_at_the_optimum_where_fed_avg_does_not():
    sizes = (12, 5, 8)
    dataset = regression_dataset(sizes)
    for i, (begin, end) in enumerate(zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True)):
        dataset.examples["y"][begin:end] += 3 * i  # Clients that want different params.
    cohort = everyone(dataset.resident(fl.clients_mesh(1)))
    options = {"num_epochs": 1, "batch_size": 12, "num_steps": 100}
    optimum = least_squares([dataset[i] for i in range(3)])
    state = trained(build(fl.fed_dyn, optax.sgd(0.2), alpha=0.5, **options), cohort, 60)
    close(state.params, optimum, 1e-3)
    # Gradients at the optimum: what clients keep adds up to zero, and h is minus their mean.
    close(state.opt_state.h, jax.tree.map(lambda g: -np.mean(g, 0), state.store), 1e-3)
    averaging = build(fl.fed_avg, optax.sgd(0.2), weighting="uniform", **options)
    other = trained(averaging, cohort, 60)
    assert abs(other.params["b"] - optimum["b"]) > 0.02


def test_p_fed_me_ends_at_the_proximal_point():
    cohort = fl.cohort_of(population(), [3])
    algorithm = build(
        *(fl.p_fed_me, optax.sgd(0.2)),
        **{"mu": 0.5, "learning_rate": 0.1, "num_inner_steps": 200, "num_epochs": 1},
        batch_size=12,
    )
    state = algorithm.init({"w": np.full(3, 2.0, np.float32), "b": np.float32(2)}, num_clients=10)
    state, _ = algorithm.round(jax.random.key(0), state, cohort)
    theta = least_squares([regression_dataset()[3]], pull=0.5, to=2.0)
    close(jax.tree.map(lambda x: x[3], state.store.params), theta, 1e-4)
    # One step of 0.1 along the gradient of the envelope, 0.5 * (2 - theta).
    close(state.params, jax.tree.map(lambda t: 2 - 0.1 * 0.5 * (2 - t), theta), 1e-4)


NUMBERS = {
    "fed_dyn": {"alpha": 0.5},
    "fed_exp": {"epsilon": 0.1},
    "fed_ntd": {"beta": 0.5},
    "agnostic_fed_avg": {"domain_learning_rate": 0.1},
    "q_fed_avg": {"q": 0.5, "lipschitz": 10.0},
    "ada_fed_prox": {"mu": 0.5, "step_size": 0.1},
    "ditto": {"mu": 0.5},
    "p_fed_me": {"mu": 0.5, "learning_rate": 0.1},
    "per_fed_avg": {"alpha": 0.1},
    "fed_sam": {"rho": 0.1},
}
OTHERS = {"agnostic_fed_avg": {"num_domains": 10}, "fed_ntd": {"logits": scores}}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_may_be_traced_and_params_of_half_precision(name):
    cohort = everyone(population())
    params = {"w": jnp.zeros(3, jnp.bfloat16), "b": jnp.bfloat16(0)}

    def states(numbers):
        algorithm = build(getattr(fl, name), SGD, **OTHERS.get(name, {}), **numbers)
        before = algorithm.init(params, num_clients=10)
        return before, algorithm.round(jax.random.key(1), before, cohort)[0]

    swept = {key: jnp.array([value, value / 2]) for key, value in NUMBERS[name].items()}
    before, after = jax.eval_shape(jax.vmap(states), swept)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range_are_named(name):
    for number in NUMBERS[name]:
        with pytest.raises(ValueError, match=f"^{number} is -1.0; choose a number"):
            build(getattr(fl, name), SGD, **OTHERS.get(name, {}), **NUMBERS[name] | {number: -1.0})
