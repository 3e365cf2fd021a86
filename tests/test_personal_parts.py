"""Params and model state that never leave a client, against references in NumPy and PyTorch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from alike import COHORTS, PARAMS, RATE, batches, clients, dataset, rounds
from problems import SIZES, everyone, regression_dataset, regression_model
from reference import models, personal

import fedjax_lite as fl

eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


@eight_devices
@pytest.mark.parametrize("keep_optimizer_state", [False, True])
@pytest.mark.parametrize(("num_devices", "lanes"), [(1, 1), (2, 3)])
def test_fed_per(keep_optimizer_state, num_devices, lanes):
    expected = personal.fed_per(
        PARAMS,
        clients("x", "y"),
        models.regression.grad,
        cohorts=COHORTS,
        batches=batches(),
        rate=RATE,
        personal=["b"],
    )[-1]
    with jax.enable_x64(True):
        *_, (_, state, info) = rounds(
            fl.fed_avg,
            regression_model(),
            PARAMS,
            personal="b",
            keep_optimizer_state=keep_optimizer_state,
            mesh=fl.clients_mesh(num_devices),
            lanes=lanes,
        )
        assert state.params["b"] is None
        np.testing.assert_allclose(state.params["w"], expected.params["w"], rtol=1e-9)
        own, _ = jax.device_get(state.store.personal)
        for client in range(len(SIZES)):
            kept = expected.personal.get(client, PARAMS)["b"]
            np.testing.assert_allclose(own["b"][client], kept, rtol=1e-9)
        assert info.clients["bits_up"].tolist() == [3 * 64] * 4 + [0] * 2  # Of four numbers, three.


class Normalised(nn.Module):
    """The network of `reference.models.normalised_grad`."""

    @nn.compact
    def __call__(self, x, *, train, mask):
        x = nn.Dense(4, name="base", param_dtype=jnp.float64)(x)
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.8,
            epsilon=1e-3,
            use_fast_variance=False,
            name="norm",
            param_dtype=jnp.float64,
        )(x, mask=mask[:, None])
        return nn.Dense(1, name="head", param_dtype=jnp.float64)(nn.relu(x))[:, 0]


def test_fed_bn_with_statistics_of_ones_own():
    rng = np.random.default_rng(0)
    flat = {
        "base_w": rng.normal(size=(3, 4)),
        "base_b": rng.normal(size=4),
        "norm_scale": rng.normal(size=4),
        "norm_bias": rng.normal(size=4),
        "head_w": rng.normal(size=(4, 1)),
        "head_b": rng.normal(size=1),
    }
    statistics = {"norm_mean": np.zeros(4), "norm_var": np.ones(4)}
    expected = personal.fed_bn(
        flat,
        statistics,
        clients("x", "y"),
        models.normalised_grad,
        cohorts=COHORTS,
        batches=batches(),
        rate=RATE,
        personal=["norm_scale", "norm_bias"],
    )[-1]
    with jax.enable_x64(True):
        model = fl.linen_model(
            Normalised(), np.zeros((1, 3)), lambda y, batch: (y - batch["y"]) ** 2 / 2, inputs="x"
        )
        params = {
            "base": {"kernel": flat["base_w"], "bias": flat["base_b"]},
            "norm": {"scale": flat["norm_scale"], "bias": flat["norm_bias"]},
            "head": {"kernel": flat["head_w"], "bias": flat["head_b"]},
        }
        drawn = model.init(jax.random.key(0))
        assert jax.tree.structure(drawn[0]) == jax.tree.structure(params)
        model_state = jax.tree.map(lambda x: x.astype(float), drawn[1])
        *_, (algorithm, state, _) = rounds(
            fl.fed_avg, model, params, model_state, personal="*norm*", mesh=fl.clients_mesh(1)
        )
        assert jax.tree.leaves(state.model_state) == []
        for layer in ("base", "head"):
            for name, key in (("kernel", "w"), ("bias", "b")):
                actual = state.params[layer][name]
                np.testing.assert_allclose(actual, expected.params[f"{layer}_{key}"], rtol=1e-8)
        store = jax.device_get(state.store)
        for client, (norm, seen) in expected.personal.items():
            entry = jax.tree.map(lambda x, i=client: x[i], store)
            own, own_state = algorithm.client_model(state, entry)
            for name in ("scale", "bias"):
                np.testing.assert_allclose(own["norm"][name], norm[f"norm_{name}"], rtol=1e-8)
            for name in ("mean", "var"):
                actual = own_state["batch_stats"]["norm"][name]
                np.testing.assert_allclose(actual, seen[f"norm_{name}"], rtol=1e-8)


def test_clients_are_evaluated_with_their_own_parts():
    model = regression_model()
    algorithm = fl.fed_prox(
        model, optax.sgd(0.1), mu=0.1, batch_size=4, personal="b", mesh=fl.clients_mesh(1)
    )
    population = regression_dataset().resident(fl.clients_mesh(1))
    cohort = everyone(population)
    state = algorithm.init(jax.random.key(0), num_clients=10)
    for r in range(3):
        state, _ = algorithm.round(jax.random.key(r), state, cohort)
    found = fl.evaluate_clients(
        model, state, cohort, client_model=algorithm.client_model, mesh=fl.clients_mesh(1)
    )
    params, (own, _) = jax.device_get((state.params, state.store.personal))
    for i in np.flatnonzero(SIZES):
        examples = regression_dataset()[i]
        residual = examples["x"] @ params["w"] + own["b"][i] - examples["y"]
        np.testing.assert_allclose(found.clients["loss"][i], (residual**2 / 2).mean(), rtol=1e-5)
    told = r"params is .*clients keep the rest: pass client_model=algorithm.client_model"
    with pytest.raises(ValueError, match=told):
        fl.evaluate(model, state, regression_dataset().examples)
    with pytest.raises(ValueError, match=told):
        fl.evaluate_clients(model, state, cohort, mesh=fl.clients_mesh(1))


def test_all_of_it_personal_is_training_alone():
    def train(w, client):
        x, y = clients("x", "y")[client]
        return w - 0.1 * x.T @ (x @ w - y) / len(y)

    with jax.enable_x64(True):
        model = fl.function_model(lambda w, batch: (batch["x"] @ w - batch["y"]) ** 2 / 2)
        algorithm = fl.fed_avg(
            model, optax.sgd(0.1), batch_size=12, personal="*", mesh=fl.clients_mesh(1)
        )
        state = algorithm.init(jnp.zeros(3), num_clients=10)
        cohort = everyone(dataset().resident(fl.clients_mesh(1)))
        for r in range(2):
            state, info = algorithm.round(jax.random.key(r), state, cohort)
        own, _ = state.store.personal
        for client in np.flatnonzero(SIZES):
            expected = train(train(np.zeros(3), client), client)
            np.testing.assert_allclose(own[client], expected, rtol=1e-9)
        assert float(info.clients["bits_up"].sum()) == 0


def test_a_part_that_is_not_there_is_refused():
    algorithm = fl.fed_avg(regression_model(), optax.sgd(0.1), personal=["bias", "c*"])
    with pytest.raises(ValueError, match=r"personal is \['bias', 'c\*'\], which .* names b, w;"):
        algorithm.init(jax.random.key(0), num_clients=3)
    with pytest.raises(TypeError, match="personal"):
        fl.fed_avg(regression_model(), optax.sgd(0.1), personal=[1])
    algorithm = fl.fed_avg(regression_model(), optax.sgd(0.1), personal="b")
    with pytest.raises(ValueError, match="num_clients is None"):
        algorithm.init(jax.random.key(0))


def test_runs_evaluate_clients_where_the_server_has_only_a_part():
    experiment = fl.experiment(
        dataset="synthetic(num_clients=6)",
        model="mlp(hidden=(4,))",
        algorithm="fed_avg(personal='Dense_1/*')",
        cohort_size=3,
        rounds=4,
        eval_every=2,
    )
    assert not experiment.server_has_all
    result = experiment.train()
    found = experiment.personal(result.state, jax.random.key(0)).pooled
    row = result.history.evaluations[-1]
    assert row["accuracy"] == float(found["accuracy"])
