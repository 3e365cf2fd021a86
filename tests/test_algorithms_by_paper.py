"""Algorithms against references in NumPy that are written from their papers, round by round."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from alike import COHORTS, PARAMS, RATE, batches, clients, rounds
from problems import SIZES, regression_model
from reference import drift, fair, models, personal

import fedjax_lite as fl


def network_loss(params, batch):
    """That of `reference.models.network`."""
    features = jnp.tanh(batch["x"] @ params["base_w"] + params["base_b"])
    logits = features @ params["head_w"] + params["head_b"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


def network_params():
    rng = np.random.default_rng(0)
    shapes = {"base_w": (3, 4), "base_b": (4,), "head_w": (4, 3), "head_b": (3,)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


NETWORK = fl.function_model(network_loss), network_params()
LABELLED = clients("x", "label")
OF_ONE_DOMAIN = [(x, y, np.full(len(y), k)) for k, (x, y) in enumerate(clients("x", "y"))]


class Case(NamedTuple):
    """An algorithm and its reference, each with its options.

    `kept(algorithm, state, expected)` gives pairs to compare besides the params, with `expected`
    the reference's round.
    """

    algorithm: partial
    reference: partial
    kept: Callable = lambda algorithm, state, expected: []
    problem: tuple = (regression_model(), PARAMS)


def of_all(vectors):
    """One array `[clients, ...]` for each name."""
    return {name: np.stack([v[name] for v in vectors]) for name in vectors[0]}


def own_models(algorithm, state, expected):
    used, _ = jax.vmap(algorithm.client_model, in_axes=(None, 0))(state, state.store)
    return [(used, of_all([expected.personal.get(i, expected.params) for i in range(len(SIZES))]))]


def step_size(algorithm, state, expected):
    return [(state.opt_state.step_size, expected.server_rate)]


def domain_weights(algorithm, state, expected):
    kept = state.opt_state
    return [(kept.domain_weights, expected.domain_weights), (kept.window, expected.window)]


def halves():
    """The batches of Per-FedAvg; the first half of one is for the Hessian, too."""

    def parts(rows):
        return rows[::2], rows[1::2] if len(rows) > 1 else rows, rows[::2]

    return [[[parts(rows) for rows in steps] for steps in cohort] for cohort in batches()]


def per_fed_avg(params, *, rate, **options):
    return personal.per_fed_avg(params, grad=models.network.grad, beta=rate, **options)


def fed_speed(model, *args, rho, **options):
    return fl.fed_dyn(fl.sharpness_aware(model, rho), *args, **options)


GRAD = models.regression.grad
CASES = {
    "fed_dyn": Case(
        partial(fl.fed_dyn, alpha=0.3),
        partial(drift.fed_dyn, grad=GRAD, alpha=0.3),
        lambda algorithm, state, expected: [
            (state.opt_state.h, expected.h),
            (state.store, of_all(list(expected.duals.values()))),
        ],
    ),
    "mime": Case(
        partial(fl.mime, client_optimizer=optax.sgd(RATE, momentum=0.9)),
        partial(drift.mime, grad=GRAD, base=drift.Momentum(0.9, damped=False), weighting="uniform"),
        lambda algorithm, state, expected: [(state.opt_state.base[0].trace, expected.state)],
    ),
    "mime_lite": Case(
        partial(fl.mime_lite, client_optimizer=optax.adam(RATE), weighting="examples"),
        partial(drift.mime_lite, grad=GRAD, base=drift.Adam(fresh=True)),
        lambda algorithm, state, expected: zip(
            (state.opt_state.base[0].mu, state.opt_state.base[0].nu, state.opt_state.base[0].count),
            expected.state,
            strict=True,
        ),
    ),
    "fed_exp": Case(
        partial(fl.fed_exp, epsilon=1e-3),
        partial(drift.fed_exp, grad=GRAD, epsilon=1e-3),
        step_size,
    ),
    "fed_exp by examples": Case(
        partial(fl.fed_exp, epsilon=0.0, weighting="examples"),
        partial(drift.fed_exp, grad=GRAD, epsilon=0.0, weighting="examples"),
        step_size,
    ),
    "q_fed_avg": Case(
        partial(fl.q_fed_avg, q=0.7, lipschitz=1 / RATE),
        partial(fair.q_fed_avg, model=models.regression, q=0.7, floor=1e-10),
    ),
    "agnostic_fed_avg": Case(
        partial(
            fl.agnostic_fed_avg,
            **{"num_domains": 3, "domain_learning_rate": 0.3, "feature": "label", "window_size": 2},
        ),
        partial(
            fair.agnostic_fed_avg,
            clients=clients("x", "y", "label"),
            model=models.regression,
            domain_weights=np.full(3, 1 / 3),
            domain_rate=0.3,
            window=np.ones((2, 3)),
        ),
        domain_weights,
    ),
    "agnostic_fed_avg of clients": Case(
        partial(fl.agnostic_fed_avg, num_domains=len(SIZES), domain_learning_rate=0.3),
        partial(
            fair.agnostic_fed_avg,
            clients=OF_ONE_DOMAIN,
            model=models.regression,
            domain_weights=np.full(len(SIZES), 1 / len(SIZES)),
            domain_rate=0.3,
            window=np.ones((1, len(SIZES))),
            absent=1.0,
        ),
        domain_weights,
    ),
    "ada_fed_prox": Case(
        partial(fl.ada_fed_prox, mu=0.5, patience=2),
        partial(drift.ada_fed_prox, model=models.regression, mu=0.5, patience=2),
        lambda algorithm, state, expected: [
            (state.opt_state.mu, expected.next_mu),
            (state.opt_state.loss, expected.training_loss),
        ],
    ),
    # The rate of the reference is that of both epochs.
    "fed_shuffle": Case(
        partial(fl.fed_shuffle, reducer=fl.weighted_mean(denominator=sum(SIZES) * 4 / len(SIZES))),
        partial(drift.fed_shuffle, grad=GRAD, rate=2 * RATE),
    ),
    "fed_shuffle by a mean": Case(
        partial(fl.fed_shuffle),
        partial(drift.fed_shuffle, grad=GRAD, rate=2 * RATE, sum_to_one=True),
    ),
    "ditto": Case(
        partial(fl.ditto, mu=0.7),
        partial(personal.ditto, grad=GRAD, lam=0.7),
        own_models,
    ),
    "p_fed_me": Case(
        partial(fl.p_fed_me, mu=3.0, learning_rate=0.1, server_optimizer=optax.sgd(0.8)),
        partial(
            personal.p_fed_me,
            **{"grad": GRAD, "lam": 3.0, "rate": 0.1, "beta": 0.8},
            **{"personal_rate": RATE, "inner_steps": 5, "warm": False},
        ),
        own_models,
    ),
    "per_fed_avg": Case(
        partial(fl.per_fed_avg, alpha=0.4),
        partial(per_fed_avg, alpha=0.4, clients=LABELLED, batches=halves()),
        problem=NETWORK,
    ),
    "per_fed_avg of second order": Case(
        partial(fl.per_fed_avg, alpha=0.4, first_order=False),
        partial(
            per_fed_avg,
            **{"alpha": 0.4, "hessian_free": True, "delta": 1e-5},
            **{"clients": LABELLED, "batches": halves()},
        ),
        problem=NETWORK,
    ),
    "fed_speed": Case(
        partial(fed_speed, rho=0.3, alpha=0.3),
        partial(
            drift.fed_dyn,
            alpha=0.3,
            clients=LABELLED,
            grad=drift.sharpness_aware(models.network.grad, 0.3),
        ),
        problem=NETWORK,
    ),
    "fed_sam": Case(
        partial(fl.fed_sam, rho=0.3),
        partial(
            drift.fed_sam,
            **{"rho": 0.3, "weighting": "uniform"},
            **{"clients": LABELLED, "grad": models.network.grad},
        ),
        problem=NETWORK,
    ),
}


def close(actual, expected):
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for name in expected:
            close(actual[name], expected[name])
    else:
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_its_paper(name):
    ours, theirs, kept, (model, params) = CASES[name]
    given = {"clients": clients("x", "y"), "cohorts": COHORTS, "batches": batches(), "rate": RATE}
    history = theirs(params, **given | theirs.keywords)
    with jax.enable_x64(True):
        done = rounds(ours.func, model, params, mesh=fl.clients_mesh(1), **ours.keywords)
        for (algorithm, state, _), expected in zip(done, history, strict=True):
            close(state.params, expected.params)
            for actual, desired in kept(algorithm, state, expected):
                close(actual, desired)
