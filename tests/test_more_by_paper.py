"""Clustered, representation-learning and other algorithms, against references in float64."""

import jax
import numpy as np
import optax
import pytest
from problems import SIZES, everyone, regression_dataset, regression_model
from reference import clusters, models

import fedjax_lite as fl

COHORTS = [[3, 0, 9, 1], [8, 3, 2, 7], [3, 9, 0, 5]]
RATE = 0.1


def batches(epochs=1, size=4):
    """The indices of each client's batches, in the order of its rows."""
    return [
        [
            [np.arange(i, min(i + size, SIZES[k])) for i in range(0, SIZES[k], size)] * epochs
            for k in cohort
        ]
        for cohort in COHORTS
    ]


def run(algorithm, dataset, params, model_state=None):
    """The states after each round, and what was reported of it."""
    population = dataset.resident(fl.clients_mesh(1))
    state = algorithm.init(params, model_state, num_clients=len(SIZES))
    for i, ids in enumerate(COHORTS):
        cohort = everyone(population, ids, capacity=4)
        state, info = algorithm.round(jax.random.key(i), state, cohort)
        yield state, info


def options(**others):
    return {"batch_size": 4, "shuffle": False, "mesh": fl.clients_mesh(1), **others}


def two_directions():
    """Regression of which every other client has the targets of opposite weights."""

    def turn(own):
        return {"x": own["x"].astype(np.float64), "y": own["y"].astype(np.float64)}

    clients = {}
    for i in range(len(SIZES)):
        own = turn(regression_dataset()[i])
        clients[i] = {**own, "y": own["y"] * (-1) ** i}
    return fl.FederatedDataset.from_clients(clients)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_ifca(weighting):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 3)), "b": rng.normal(size=3)}
    with jax.enable_x64(True):
        dataset = two_directions()
        history = clusters.ifca(
            [{name: x[j] for name, x in params.items()} for j in range(3)],
            [(dataset[i]["x"], dataset[i]["y"]) for i in range(len(SIZES))],
            models.regression,
            cohorts=COHORTS,
            batches=batches(epochs=2),
            rate=RATE,
            server_rate=0.5,
            weighting=weighting,
        )
        model = regression_model()
        algorithm = fl.ifca(
            model,
            optax.sgd(RATE),
            optax.sgd(0.5),
            num_clusters=3,
            weighting=weighting,
            **options(num_epochs=2),
        )
        chosen = {}
        for expected, (state, info), cohort in zip(
            history, run(algorithm, dataset, params), COHORTS, strict=True
        ):
            for j, w in enumerate(expected.params):
                for name in w:
                    np.testing.assert_allclose(state.params[name][j], w[name], rtol=1e-9)
            chosen |= expected.picked
            picked = [expected.picked.get(k, -1) for k in cohort]
            for j in range(3):
                is_own = np.equal(picked, j)
                assert info.clients[f"cluster_{j}"].tolist() == is_own.tolist()
                share = sum(SIZES[k] for k, own in zip(cohort, is_own, strict=True) if own)
                share /= sum(SIZES[k] for k in cohort)
                np.testing.assert_allclose(info.metrics[f"cluster_{j}"], share)
        assert len(set(chosen.values())) > 1
        assert info.clients["bits_up"].tolist() == [4 * 64 + 3 * 64] * 4
        found = fl.evaluate_clients(
            model,
            state,
            everyone(dataset.resident(fl.clients_mesh(1))),
            client_model=algorithm.client_model,
            mesh=fl.clients_mesh(1),
        )
        for i in np.flatnonzero(SIZES):
            w = history[-1].params[chosen.get(i, 0)]
            expected = models.regression.loss(w, dataset[i]["x"], dataset[i]["y"])
            np.testing.assert_allclose(found.clients["loss"][i], expected, rtol=1e-9)


def test_clusters_of_ifca_train_as_if_they_were_alone():
    """With what server optimizers keep, model state, a frozen part, and a pipeline."""

    def loss(params, model_state, batch, key):
        shift = model_state["shift"] + 0.1 * batch["x"].mean(where=batch["mask"][:, None])
        residual = batch["x"] @ params["w"] + params["b"] + shift - batch["y"]
        return residual**2 / 2, {"shift": shift}

    model = fl.frozen(fl.Model(init=None, loss=loss, metrics=None), "b")
    pipeline = fl.chain(fl.quantize_uniform(2**8), fl.error_feedback(fl.clip_by_norm(0.5)))
    more = options(pipeline=pipeline, num_epochs=2)
    optimizers = optax.sgd(RATE), optax.adam(0.1)
    weights = np.array([1.0, -2.0, 0.5], np.float32)
    params = {"w": np.stack([weights, -weights]) / 2, "b": np.full(2, 0.1, np.float32)}
    state = {"shift": np.array([0.0, 0.2], np.float32)}
    both = list(
        run(fl.ifca(model, *optimizers, num_clusters=2, **more), two_directions(), params, state)
    )
    (ifca, info), population = both[-1], two_directions().resident(fl.clients_mesh(1))
    alone = fl.fed_avg(model, *optimizers, weighting="uniform", **more)
    for j in range(2):
        own = jax.tree.map(lambda x, j=j: x[j], (params, state))
        expected = alone.init(*own, num_clients=len(SIZES))
        for i, ids in enumerate(COHORTS):
            cohort = everyone(population, [k for k in ids if k % 2 == j], capacity=4)
            expected, told = alone.round(jax.random.key(i), expected, cohort)
        np.testing.assert_allclose(ifca.params["w"][j], expected.params["w"], rtol=1e-5)
        for name, x in expected.model_state.items():
            np.testing.assert_allclose(ifca.model_state[name][j], x, rtol=1e-5)
        np.testing.assert_allclose(
            ifca.opt_state.inner[0].nu["w"][j], expected.opt_state[0].nu["w"], rtol=1e-4
        )
    assert ifca.frozen["b"] == np.float32(0.1)
    assert info.clients["bits_up"].max() == told.clients["bits_up"].max() + 2 * 32 + 32
    with pytest.raises(ValueError, match=r"reducer is .*each cluster takes the weighted mean"):
        fl.ifca(model, *optimizers, num_clusters=2, reducer=fl.coordinate_median())
    with pytest.raises(ValueError, match=r"shape \(2, 3\); pass arrays \[clusters, \.\.\.\] of 3"):
        fl.ifca(model, *optimizers, num_clusters=3).init(params, num_clients=2)


def test_runs_evaluate_clients_where_the_server_has_several_models():
    experiment = fl.experiment(
        dataset="synthetic(num_clients=6)",
        model="logistic",
        algorithm="ifca(num_clusters=2)",
        cohort_size=3,
        rounds=2,
    )
    assert not experiment.server_has_all
    result = experiment.train()
    with pytest.raises(
        ValueError, match=r"has several models: pass client_model=algorithm.client_"
    ):
        fl.evaluate(experiment.model, result.state, experiment.held_out.examples)
    found = experiment.personal(result.state, jax.random.key(0)).pooled
    assert result.history.evaluations[-1]["accuracy"] == float(found["accuracy"])
