"""Clustered, representation-learning and other algorithms, against references in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from alike import COHORTS, RATE, batches, clients, dataset
from problems import SIZES, everyone, regression_model
from reference import clusters, drift, models, personal
from reference.vectors import Vector, mean, norm
from test_algorithms_by_paper import LABELLED, NETWORK, close, of_all
from test_docs import PAGES, blocks

import fedjax_lite as fl


def run(algorithm, dataset, params, model_state=None, mesh=None):
    """The state after each round, and what was reported of it."""
    population = dataset.resident(mesh or fl.clients_mesh(1))
    state = algorithm.init(params, model_state, num_clients=len(SIZES))
    for i, ids in enumerate(COHORTS):
        cohort = everyone(population, ids, capacity=4)
        state, info = algorithm.round(jax.random.key(i), state, cohort)
        yield state, info


def options(**others):
    own = {"batch_size": 4, "num_epochs": 2, "shuffle": False, "mesh": fl.clients_mesh(1)}
    return {**own, **others}


@functools.cache
def two_directions():
    """The targets of every other client are those of opposite weights."""
    signs = np.repeat((-1.0) ** np.arange(len(SIZES)), SIZES)
    return dataset().map(lambda features: {"x": features["x"], "y": signs * features["y"]})


def of_two_directions():
    return [(two_directions()[i]["x"], two_directions()[i]["y"]) for i in range(len(SIZES))]


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_ifca(weighting):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 3)), "b": rng.normal(size=3)}
    with jax.enable_x64(True):
        history = clusters.ifca(
            [{name: x[j] for name, x in params.items()} for j in range(3)],
            of_two_directions(),
            models.regression,
            cohorts=COHORTS,
            batches=batches(),
            rate=RATE,
            server_rate=0.5,
            weighting=weighting,
        )
        model = regression_model()
        optimizers = optax.sgd(RATE), optax.sgd(0.5)
        algorithm = fl.ifca(model, *optimizers, num_clusters=3, weighting=weighting, **options())
        chosen, found = {}, run(algorithm, two_directions(), params)
        for expected, (state, info), ids in zip(history, found, COHORTS, strict=True):
            close(state.params, of_all(expected.params))
            chosen |= expected.picked
            picked = np.array([expected.picked.get(k, -1) for k in ids])
            sizes = np.array([SIZES[k] for k in ids])
            for j in range(3):
                assert info.clients[f"cluster_{j}"].tolist() == (picked == j).tolist()
                share = sizes[picked == j].sum() / sizes.sum()
                np.testing.assert_allclose(info.metrics[f"cluster_{j}"], share)
        assert len(set(chosen.values())) > 1
        # One model, and a sum of weights for each cluster.
        assert info.clients["bits_up"].tolist() == [(4 + 3) * 64] * 4
        found = fl.evaluate_clients(
            model,
            state,
            everyone(two_directions().resident(fl.clients_mesh(1))),
            client_model=algorithm.client_model,
            mesh=fl.clients_mesh(1),
        )
        for i in np.flatnonzero(SIZES):
            w = history[-1].params[chosen.get(i, 0)]
            close(found.clients["loss"][i], models.regression.loss(w, *of_two_directions()[i]))


def test_clusters_of_ifca_train_as_if_they_were_alone():
    """With what server optimizers keep, model state, a frozen part, and a pipeline."""

    def loss(params, model_state, batch, key):
        shift = model_state["shift"] + 0.1 * batch["x"].mean(where=batch["mask"][:, None])
        residual = batch["x"] @ params["w"] + params["b"] + shift - batch["y"]
        return residual**2 / 2, {"shift": shift}

    model = fl.frozen(fl.Model(init=None, loss=loss, metrics=None), "b")
    pipeline = fl.chain(fl.quantize_uniform(2**8), fl.error_feedback(fl.clip_by_norm(0.5)))
    optimizers = optax.sgd(RATE), optax.adam(0.1)
    weights = np.array([1.0, -2.0, 0.5], np.float32)
    params = {"w": np.stack([weights, -weights]) / 2, "b": np.full(2, 0.1, np.float32)}
    state = {"shift": np.array([0.0, 0.2], np.float32)}
    clustered = fl.ifca(model, *optimizers, num_clusters=2, **options(pipeline=pipeline))
    *_, (found, info) = jax.device_get(list(run(clustered, two_directions(), params, state)))
    alone = fl.fed_avg(model, *optimizers, weighting="uniform", **options(pipeline=pipeline))
    population = two_directions().resident(fl.clients_mesh(1))
    for j in range(2):
        own = jax.tree.map(lambda x, j=j: x[j], (params, state))
        expected = alone.init(*own, num_clients=len(SIZES))
        for i, ids in enumerate(COHORTS):
            cohort = everyone(population, [k for k in ids if k % 2 == j], capacity=4)
            expected, told = alone.round(jax.random.key(i), expected, cohort)
        actual = jax.tree.map(
            lambda x, j=j: x[j], (found.params, found.model_state, found.opt_state.inner)
        )
        desired = expected.params, expected.model_state, expected.opt_state
        chex.assert_trees_all_close(actual, desired, rtol=1e-4)
    assert found.frozen["b"] == np.float32(0.1)
    model_states_and_weights = 32 + 2 * 32  # Of which one more than alone, and two.
    assert info.clients["bits_up"].max() == told.clients["bits_up"].max() + model_states_and_weights
    with pytest.raises(ValueError, match=r"reducer is .*each cluster takes the weighted mean"):
        fl.ifca(model, *optimizers, num_clusters=2, reducer=fl.coordinate_median())
    with pytest.raises(ValueError, match=r"shape \(2, 3\); pass arrays \[clusters, \.\.\.\] of 3"):
        fl.ifca(model, *optimizers, num_clusters=3).init(params, num_clients=2)


def test_what_clients_chose_may_lie_in_a_file(tmp_path):
    algorithm = fl.ifca(regression_model(), optax.sgd(RATE), num_clusters=2, **options())
    params = {"w": np.array([[1, 0, 0], [-1, 0, 0]], np.float32), "b": np.zeros(2, np.float32)}
    *_, (state, _) = run(algorithm, two_directions(), params)
    on_disk = algorithm.init(params, num_clients=1)
    on_disk = fl.store_in_file(on_disk, tmp_path, num_clients=len(SIZES))
    population = two_directions().resident(fl.clients_mesh(1))
    for i, ids in enumerate(COHORTS):
        on_disk, _ = algorithm.round(jax.random.key(i), on_disk, everyone(population, ids))
    chex.assert_trees_all_equal(state.params, on_disk.params)
    assert state.store.tolist() == on_disk.store.read(range(len(SIZES))).tolist()
    assert set(state.store.tolist()) == {0, 1}


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


HEAD, BODY = ("head_w", "head_b"), ("base_w", "base_b")


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_fed_rep(weighting):
    model, params = NETWORK
    expected = personal.fed_rep(
        params,
        LABELLED,
        models.network.grad,
        cohorts=COHORTS,
        head_batches=batches(),
        batches=batches(epochs=1),
        rate=RATE,
        head=HEAD,
        weighting=weighting,
    )[-1]
    with jax.enable_x64(True):
        algorithm = fl.fed_rep(
            model,
            optax.sgd(RATE),
            personal="head*",
            num_head_epochs=2,
            weighting=weighting,
            **options(num_epochs=3),
        )
        *_, (state, _) = run(algorithm, dataset(), params)
        close({name: state.params[name] for name in BODY}, expected.params.only(BODY))
        own, _ = state.store.personal
        kept = [expected.personal.get(i, Vector(params).only(HEAD)) for i in range(len(SIZES))]
        close({name: own[name] for name in HEAD}, of_all(kept))


def test_what_fed_rep_does_not_train_stays_whatever_the_optimizer():
    model, params = NETWORK
    params = jax.tree.map(np.float32, params)
    rep = functools.partial(fl.fed_rep, model, optax.adamw(0.1, weight_decay=0.1), personal="head*")
    *_, (state, _) = run(rep(num_head_epochs=1, **options(num_steps=1)), dataset(), params)
    for name in BODY:
        np.testing.assert_array_equal(state.params[name], params[name])
    *_, (state, _) = run(rep(num_head_epochs=0, **options()), dataset(), params)
    own, _ = state.store.personal
    for name in HEAD:
        np.testing.assert_array_equal(own[name], np.broadcast_to(params[name], own[name].shape))
    with pytest.raises(
        ValueError, match="num_head_epochs is 1 and num_epochs 1, which leaves none"
    ):
        rep(num_head_epochs=1)


def test_fed_babu_is_fed_avg_of_a_frozen_head():
    model, params = NETWORK
    grad = models.network.grad
    expected = personal.fed_babu(
        params, LABELLED, grad, cohorts=COHORTS, batches=batches(), rate=RATE, head=HEAD
    )[-1]
    with jax.enable_x64(True):
        body, sgd = fl.frozen(model, HEAD), optax.sgd(RATE)
        *_, (state, _) = run(fl.fed_avg(body, sgd, **options()), dataset(), params)
        whole = body.merge(state.params, state.frozen)
        close(whole, expected.params)
        cohort = everyone(dataset().resident(fl.clients_mesh(1)))
        state = fl.fed_avg(model, sgd, **options()).init(whole)
        given = {"key": jax.random.key(0), **options()}
        _, after = fl.evaluate_fine_tuned(model, state, cohort, cohort, sgd, **given)
        for i, steps in zip(COHORTS[-1], batches()[-1], strict=True):
            tuned = personal.fine_tuned(
                expected.params, LABELLED[i], grad, batches=steps, rate=RATE
            )
            close(after.clients["loss"][i], models.network.loss(tuned, *LABELLED[i]))


def test_fed_lc_as_it_is_documented():
    (program,) = [block for block in blocks(PAGES["algorithms"], "python") if "fed_lc =" in block]
    params = {"w": np.random.default_rng(3).normal(size=(3, 10)), "b": np.zeros(10)}
    expected = drift.fed_lc(
        params,
        LABELLED,
        models.softmax.grad,
        **{"cohorts": COHORTS, "batches": batches(), "rate": RATE, "tau": 0.5, "num_classes": 10},
    )[-1]
    labelled = dataset().map(lambda features: {"x": features["x"], "y": features["label"]})
    with jax.enable_x64(True):
        names = {"dataset": labelled, "fl": fl, "jax": jax, "optax": optax}
        exec(program, names)
        algorithm = fl.fed_avg(names["calibrated_model"], optax.sgd(RATE), **options())
        linen = {"kernel": params["w"], "bias": params["b"]}
        *_, (state, _) = run(algorithm, names["counted"], linen)
        close({"w": state.params["kernel"], "b": state.params["bias"]}, expected.params)


def features(params, model_state, batch):
    return jnp.tanh(batch["x"] @ params["base_w"] + params["base_b"])


def test_moon():
    model, params = NETWORK
    more = {"mu": 2.0, "temperature": 0.4}
    history = drift.moon(params, LABELLED, cohorts=COHORTS, batches=batches(), rate=RATE, **more)
    with jax.enable_x64(True):
        algorithm = fl.moon(model, optax.sgd(RATE), features=features, **more, **options())
        found = run(algorithm, dataset(), params)
        for expected, (state, _) in zip(history, found, strict=True):
            close(state.params, expected.params)
            kept = [expected.previous.get(i, Vector(params)) for i in range(len(SIZES))]
            close(state.store.params, of_all(kept))


def test_fed_ntd():
    model, params = NETWORK
    more = {"beta": 2.0, "temperature": 1.5}
    history = drift.fed_ntd(params, LABELLED, cohorts=COHORTS, batches=batches(), rate=RATE, **more)

    def logits(params, model_state, batch):
        return features(params, model_state, batch) @ params["head_w"] + params["head_b"]

    labelled = dataset().map(lambda features: {**features, "y": features["label"]})
    with jax.enable_x64(True):
        algorithm = fl.fed_ntd(model, optax.sgd(RATE), logits=logits, **more, **options())
        found = run(algorithm, labelled, params)
        for expected, (state, _) in zip(history, found, strict=True):
            close(state.params, expected.params)


def test_logits_are_by_default_the_predictions_of_the_model():
    model = fl.models.logistic((3,), 3)
    labelled = dataset().map(
        lambda features: {"x": features["x"].astype(np.float32), "y": features["label"]}
    )
    params, _ = model.init(jax.random.key(0))
    algorithm = fl.fed_ntd(model, optax.sgd(RATE), **options())
    *_, (state, _) = run(algorithm, labelled, params)
    *_, (plain, _) = run(fl.fed_avg(model, optax.sgd(RATE), **options()), labelled, params)
    apart = jax.tree.map(lambda a, b: float(abs(a - b).max()), state.params, plain.params)
    assert min(jax.tree.leaves(apart)) > 1e-4
    with pytest.raises(ValueError, match="logits is None, and the model has no predictions"):
        fl.fed_ntd(regression_model(), optax.sgd(RATE))
    wrong = fl.fed_ntd(model, optax.sgd(RATE), logits=lambda *args: jnp.ones(3), **options())
    with pytest.raises(ValueError, match=r"logits are \S+\[3\] for a batch of"):
        next(run(wrong, labelled, params))


def test_features_are_by_default_what_the_last_dense_layer_is_given():
    model = fl.models.mlp((3,), (5,), 3)
    labelled = dataset().map(
        lambda features: {"x": features["x"].astype(np.float32), "y": features["label"]}
    )
    params, _ = model.init(jax.random.key(0))

    def hidden(params, model_state, batch):
        layer = params["Dense_0"]
        return jax.nn.relu(batch["x"] @ layer["kernel"] + layer["bias"])

    def after(features):
        algorithm = fl.moon(model, optax.sgd(RATE), mu=5.0, features=features, **options())
        *_, (state, _) = run(algorithm, labelled, params)
        return state.params

    chex.assert_trees_all_close(after(None), after(hidden), rtol=1e-5)
    for wrong, told in (
        (None, "features is None, and the model has no nn.Dense layer"),
        (lambda params, _, batch: batch["x"][0], r"features returned \S+\[3\] for a batch"),
    ):
        algorithm = fl.moon(
            regression_model(), optax.sgd(RATE), mu=1.0, features=wrong, **options()
        )
        with pytest.raises(ValueError, match=told):
            next(run(algorithm, labelled, {"w": np.zeros(3, np.float32), "b": np.float32(0)}))


def armijo(loss, w, gradient, guess):
    """Half of the rate until the loss falls by 1/10 of what the gradient promises."""
    rate = min(2 * guess, 1.0)
    while loss(w - rate * gradient) > loss(w) - 0.1 * rate * norm(gradient) ** 2:
        rate /= 2
    return rate


@pytest.mark.parametrize("lanes", [1, 3])
def test_client_optimizers_that_search_along_a_line(lanes):
    w, examples, rates = Vector({"w": np.zeros(3), "b": 0.25}), clients("x", "y"), set()
    search = optax.scale_by_backtracking_linesearch(
        30, slope_rtol=0.1, decrease_factor=0.5, increase_factor=2.0
    )
    client_optimizer = optax.chain(optax.sgd(1.0), search)
    with jax.enable_x64(True):
        algorithm = fl.fed_avg(regression_model(), client_optimizer, **options(lanes=lanes))
        found = run(algorithm, dataset(), dict(w))
        for ids, drawn, (state, _) in zip(COHORTS, batches(), found, strict=True):
            trained = []
            for k, steps in zip(ids, drawn, strict=True):
                (x, y), own, rate = examples[k], w, 1.0
                for i in steps:
                    loss = functools.partial(models.regression.loss, x=x[i], y=y[i])
                    gradient = models.regression.grad(own, x[i], y[i])
                    rate = armijo(loss, own, gradient, rate)
                    rates.add(rate)
                    own = own - rate * gradient
                trained.append(own)
            w = mean(trained, [SIZES[k] for k in ids])
            close(state.params, w)
    assert len(rates) > 2


@functools.cache
def points():
    """Examples around two places of the plane, spread along lines."""
    rng = np.random.default_rng(4)
    clients = {}
    for i, size in enumerate(SIZES):
        x = rng.normal(size=(size, 2)) @ np.array([[1.0, 0.8], [0.0, 0.3]])
        clients[i] = {"x": x + 3.0 * rng.integers(2, size=(size, 1))}
    return fl.FederatedDataset.from_clients(clients)


several_devices = pytest.mark.parametrize(
    "speed", [{"batch_size": 5, "lanes": 3, "mesh": 2}, {"mesh": 1}], ids=["two", "one"]
)


def cluster(factory, model, params, speed, **more):
    mesh = fl.clients_mesh(speed["mesh"])
    algorithm = factory(model, **{**speed, "mesh": mesh}, **more)
    return run(algorithm, points(), params, mesh=mesh)


@several_devices
@pytest.mark.parametrize("keep_counts", [True, False])
def test_k_means(keep_counts, speed):
    centroids = np.array([[0.0, 0.5], [0.5, 0.0], [4.0, 4.0], [50.0, 50.0]])
    model = fl.models.centroids((2,), 4)
    with jax.enable_x64(True):
        clients = [points()[i]["x"] for i in range(len(SIZES))]
        history = clusters.k_means(centroids, clients, cohorts=COHORTS, keep_counts=keep_counts)
        found = cluster(fl.k_means, model, centroids, speed, keep_counts=keep_counts)
        for ids, expected, (state, info) in zip(COHORTS, history, found, strict=True):
            np.testing.assert_allclose(state.params, expected.centroids, rtol=1e-9)
            np.testing.assert_array_equal(state.opt_state, expected.counts)
            x = np.concatenate([clients[k] for k in ids])
            distances = ((x[:, None] - centroids) ** 2).sum(-1).min(1)
            np.testing.assert_allclose(info.loss, distances.mean(), rtol=1e-6)
            centroids = expected.centroids


@several_devices
@pytest.mark.parametrize("kind", ["diagonal", "bounded", "full"])
def test_gaussian_mixture(kind, speed):
    floor = 0.8 if kind == "bounded" else 0.0
    model = fl.models.gaussians((2,), 3, full=kind == "full")
    covariances = np.stack([np.eye(2), 2.0 * np.eye(2), np.eye(2)])
    params = {
        "weights": np.array([0.5, 0.5, 0.0]),
        "centers": np.array([[0.0, 0.5], [2.0, 3.0], [1.0, 1.0]]),
        "covariances": covariances if kind == "full" else covariances.diagonal(0, 1, 2),
    }
    with jax.enable_x64(True):
        clients = [points()[i]["x"] for i in range(len(SIZES))]
        history = clusters.gaussian_mixture(*params.values(), clients, cohorts=COHORTS, floor=floor)
        found = cluster(fl.gaussian_mixture, model, params, speed, min_variance=floor)
        for expected, (state, info) in zip(history, found, strict=True):
            for name, x in state.params.items():
                np.testing.assert_allclose(x, getattr(expected, name), rtol=1e-8, atol=1e-12)
            np.testing.assert_allclose(info.loss, -expected.log_likelihood, rtol=1e-6)
    # The third component weighs nothing, and stays.
    np.testing.assert_array_equal(state.params["centers"][2], params["centers"][2])


def test_what_cannot_be_clustered_is_refused():
    centroids, gaussians = fl.models.centroids((2,), 2), fl.models.gaussians((2,), 2)
    algorithm = fl.k_means(centroids, mesh=fl.clients_mesh(1))
    with pytest.raises(ValueError, match=r"params is .*\[3, 2\], .*\[2, 2\]; .* as many centroids"):
        algorithm.init(np.zeros((3, 2), np.float32))
    narrow = points().map(lambda client: {"x": client["x"][:, :1]})
    with pytest.raises(ValueError, match=r"'x' is .*\[.*, 1\] in a batch, .* for 2 features; pass"):
        next(run(algorithm, narrow, np.zeros((2, 2), np.float32)))
    mixture = {"weights": np.ones(2, np.float32) / 2, "centers": np.zeros((2, 2), np.float32)}
    with pytest.raises(ValueError, match=r"params is .*weights.*, in place of .*covariances"):
        fl.gaussian_mixture(gaussians).init(mixture)
    for factory, model, other in (
        (fl.k_means, centroids, gaussians),
        (fl.gaussian_mixture, gaussians, centroids),
    ):
        with pytest.raises(ValueError, match=r"model draws params .*; pass fl.models"):
            factory(other)
        with pytest.raises(ValueError, match=r"reducer is .*sums, which add up; leave it out"):
            factory(model, reducer=fl.coordinate_median())
