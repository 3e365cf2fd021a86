"""Clustered, representation-learning and other algorithms, against references in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import SIZES, everyone, regression_dataset, regression_model
from reference import clusters, drift, models, personal
from reference.vectors import Vector, norm
from test_docs import PAGES, blocks

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


def run(algorithm, dataset, params, model_state=None, mesh=None):
    """The states after each round, and what was reported of it."""
    population = dataset.resident(mesh or fl.clients_mesh(1))
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


@functools.cache
def points():
    """Examples around two places of the plane, one of them spread along a line."""
    rng = np.random.default_rng(4)
    clients = {}
    for i, size in enumerate(SIZES):
        x = rng.normal(size=(size, 2)) @ np.array([[1.0, 0.8], [0.0, 0.3]])
        clients[i] = {"x": x + 3.0 * rng.integers(2, size=(size, 1))}
    return fl.FederatedDataset.from_clients(clients)


@functools.cache
def labelled():
    """Three classes in four dimensions."""
    rng = np.random.default_rng(1)
    directions = rng.normal(size=(4, 3))
    clients = {}
    for i, size in enumerate(SIZES):
        x = rng.normal(size=(size, 4))
        clients[i] = {"x": x, "y": (x @ directions + 0.5 * rng.normal(size=(size, 3))).argmax(1)}
    return fl.FederatedDataset.from_clients(clients)


def network():
    """A hidden layer `base` and a `head`, as `reference.models.network`, and drawn params."""
    rng = np.random.default_rng(2)
    shapes = {"base_w": (4, 5), "base_b": (5,), "head_w": (5, 3), "head_b": (3,)}

    def loss(params, batch):
        logits = features(params, {}, batch) @ params["head_w"] + params["head_b"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return fl.function_model(loss, lambda key: params), params


def features(params, model_state, batch):
    return jnp.tanh(batch["x"] @ params["base_w"] + params["base_b"])


def examples(dataset):
    return [(dataset[i]["x"], dataset[i]["y"]) for i in range(len(SIZES))]


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_ifca(weighting):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 3)), "b": rng.normal(size=3)}
    with jax.enable_x64(True):
        dataset = two_directions()
        history = clusters.ifca(
            [{name: x[j] for name, x in params.items()} for j in range(3)],
            examples(dataset),
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


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_fed_rep(weighting):
    with jax.enable_x64(True):
        model, params = network()
        expected = personal.fed_rep(
            params,
            examples(labelled()),
            models.network.grad,
            cohorts=COHORTS,
            head_batches=batches(epochs=2),
            batches=batches(epochs=1),
            rate=RATE,
            head=["head_w", "head_b"],
            weighting=weighting,
        )[-1]
        algorithm = fl.fed_rep(
            model,
            optax.sgd(RATE),
            personal="head*",
            num_head_epochs=2,
            weighting=weighting,
            **options(num_epochs=3),
        )
        *_, (state, _) = run(algorithm, labelled(), params)
        for name in ("base_w", "base_b"):
            np.testing.assert_allclose(state.params[name], expected.params[name], rtol=1e-9)
        own, _ = state.store.personal
        for i in range(len(SIZES)):
            for name in ("head_w", "head_b"):
                kept = expected.personal.get(i, params)[name]
                np.testing.assert_allclose(own[name][i], kept, rtol=1e-9)


def test_what_fed_rep_does_not_train_stays_whatever_the_optimizer():
    model, params = network()
    params = jax.tree.map(np.float32, params)
    decaying = optax.adamw(0.1, weight_decay=0.1)
    rep = functools.partial(fl.fed_rep, model, decaying, personal="head*")
    *_, (state, _) = run(rep(num_head_epochs=1, **options(num_steps=1)), labelled(), params)
    for name in ("base_w", "base_b"):
        np.testing.assert_array_equal(state.params[name], params[name])
    *_, (state, _) = run(rep(num_head_epochs=0, **options()), labelled(), params)
    own, _ = state.store.personal
    for name in ("head_w", "head_b"):
        np.testing.assert_array_equal(own[name], np.broadcast_to(params[name], own[name].shape))
    with pytest.raises(
        ValueError, match="num_head_epochs is 1 and num_epochs 1, which leaves none"
    ):
        rep(num_head_epochs=1)


def test_fed_babu_is_fed_avg_of_a_frozen_head():
    with jax.enable_x64(True):
        model, params = network()
        head, more = ["head_w", "head_b"], {"batches": batches(), "rate": RATE}
        clients = examples(labelled())
        expected = personal.fed_babu(
            params, clients, models.network.grad, cohorts=COHORTS, head=head, **more
        )[-1]
        body = fl.frozen(model, head)
        *_, (state, _) = run(fl.fed_avg(body, optax.sgd(RATE), **options()), labelled(), params)
        whole = body.merge(state.params, state.frozen)
        for name, x in expected.params.items():
            np.testing.assert_allclose(whole[name], x, rtol=1e-9)
        cohort = everyone(labelled().resident(fl.clients_mesh(1)))
        _, after = fl.evaluate_fine_tuned(
            model,
            fl.fed_avg(model, optax.sgd(RATE), **options()).init(whole),
            cohort,
            cohort,
            optax.sgd(RATE),
            key=jax.random.key(0),
            **options(),
        )
        for i, steps in zip(COHORTS[-1], batches()[-1], strict=True):
            tuned = personal.fine_tuned(
                expected.params, clients[i], models.network.grad, batches=steps, rate=RATE
            )
            loss = models.network.loss(tuned, *clients[i])
            np.testing.assert_allclose(after.clients["loss"][i], loss, rtol=1e-9)


def test_fed_lc_as_it_is_documented():
    (program,) = [block for block in blocks(PAGES["algorithms"], "python") if "fed_lc =" in block]
    params = {"w": np.random.default_rng(3).normal(size=(4, 10)), "b": np.zeros(10)}
    with jax.enable_x64(True):
        expected = drift.fed_lc(
            params,
            examples(labelled()),
            models.softmax.grad,
            cohorts=COHORTS,
            batches=batches(),
            rate=RATE,
            tau=0.5,
            num_classes=10,
        )[-1]
        names = {"dataset": labelled(), "fl": fl, "jax": jax, "optax": optax}
        exec(program, names)
        algorithm = fl.fed_avg(names["calibrated_model"], optax.sgd(RATE), **options())
        linen = {"kernel": params["w"], "bias": params["b"]}
        *_, (state, _) = run(algorithm, names["counted"], linen)
        np.testing.assert_allclose(state.params["kernel"], expected.params["w"], rtol=1e-9)
        np.testing.assert_allclose(state.params["bias"], expected.params["b"], rtol=1e-9)


@pytest.mark.parametrize("mu", [0.0, 2.0])
def test_moon(mu):
    with jax.enable_x64(True):
        model, params = network()
        expected = drift.moon(
            params,
            examples(labelled()),
            cohorts=COHORTS,
            batches=batches(epochs=2),
            rate=RATE,
            mu=mu,
            temperature=0.4,
        )[-1]
        algorithm = fl.moon(
            model,
            optax.sgd(RATE),
            mu=mu,
            temperature=0.4,
            features=features,
            **options(num_epochs=2),
        )
        *_, (state, _) = run(algorithm, labelled(), params)
        for name, x in expected.params.items():
            np.testing.assert_allclose(state.params[name], x, rtol=1e-9)
            for i, own in expected.previous.items():
                np.testing.assert_allclose(state.store.params[name][i], own[name], rtol=1e-9)


def test_features_are_by_default_what_the_last_dense_layer_is_given():
    model = fl.models.mlp((4,), (5,), 3)
    more = options(num_epochs=2)
    hidden = lambda params, model_state, batch: jax.nn.relu(
        batch["x"] @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    )
    params, _ = model.init(jax.random.key(0))
    narrow = labelled().map(lambda own: {**own, "x": own["x"].astype(np.float32)})
    found = [
        list(run(fl.moon(model, optax.sgd(RATE), mu=5.0, features=f, **more), narrow, params))[-1][
            0
        ]
        for f in (None, hidden)
    ]
    chex.assert_trees_all_close(found[0].params, found[1].params, rtol=1e-5)
    for f, told in (
        (None, "features is None, and the model has no nn.Dense layer"),
        (
            lambda params, model_state, batch: batch["x"][0],
            r"features returned \S+\[4\] for a batch",
        ),
    ):
        algorithm = fl.moon(regression_model(), optax.sgd(RATE), mu=1.0, features=f, **options())
        with pytest.raises(ValueError, match=told):
            next(run(algorithm, narrow, {"w": np.zeros(4, np.float32), "b": np.float32(0)}))


def armijo(loss, w, gradient, guess):
    """Half of the rate until the loss falls by 1/10 of what the gradient promises."""
    rate = min(2 * guess, 1.0)
    promised = norm(gradient) ** 2
    while loss(w - rate * gradient) > loss(w) - 0.1 * rate * promised:
        rate /= 2
    return rate


@pytest.mark.parametrize("lanes", [1, 3])
def test_client_optimizers_that_search_along_a_line(lanes):
    w = Vector({"w": np.array([0.5, -1.0, 2.0]), "b": 0.25})
    with jax.enable_x64(True):
        clients = examples(two_directions())
        search = optax.scale_by_backtracking_linesearch(
            30, slope_rtol=0.1, decrease_factor=0.5, increase_factor=2.0
        )
        client_optimizer = optax.chain(optax.sgd(1.0), search)
        algorithm = fl.fed_avg(
            regression_model(), client_optimizer, **options(num_epochs=2, lanes=lanes)
        )
        history = run(algorithm, two_directions(), dict(w))
        rates = set()
        for cohort, drawn, (state, _) in zip(COHORTS, batches(epochs=2), history, strict=True):
            total = 0.0 * w
            for k, steps in zip(cohort, drawn, strict=True):
                x, y = clients[k]
                own, rate = w, 1.0
                for i in steps:
                    loss = functools.partial(models.regression.loss, x=x[i], y=y[i])
                    gradient = models.regression.grad(own, x[i], y[i])
                    rate = armijo(loss, own, gradient, rate)
                    rates.add(rate)
                    own = own - rate * gradient
                total = total + len(y) / sum(SIZES[k] for k in cohort) * (own - w)
            w = w + total
            for name, x in w.items():
                np.testing.assert_allclose(state.params[name], x, rtol=1e-9)
        assert len(rates) > 2


several_devices = pytest.mark.parametrize(
    "speed", [{"batch_size": 5, "lanes": 3, "mesh": 2}, {"mesh": 1}], ids=["two", "one"]
)


def cluster(factory, params, speed, **more):
    mesh = fl.clients_mesh(speed["mesh"])
    algorithm = factory(**{**speed, "mesh": mesh}, **more)
    return run(algorithm, points(), params, mesh=mesh)


@several_devices
@pytest.mark.parametrize("keep_counts", [True, False])
def test_k_means(keep_counts, speed):
    centroids = np.array([[0.0, 0.5], [0.5, 0.0], [4.0, 4.0], [50.0, 50.0]])
    with jax.enable_x64(True):
        clients = [points()[i]["x"] for i in range(len(SIZES))]
        history = clusters.k_means(centroids, clients, cohorts=COHORTS, keep_counts=keep_counts)
        found = cluster(fl.k_means, centroids, speed, num_clusters=4, keep_counts=keep_counts)
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
    covariances = np.stack([np.eye(2), 2.0 * np.eye(2), np.eye(2)])
    params = {
        "weights": np.array([0.5, 0.5, 0.0]),
        "centers": np.array([[0.0, 0.5], [2.0, 3.0], [1.0, 1.0]]),
        "covariances": covariances if kind == "full" else covariances.diagonal(0, 1, 2),
    }
    with jax.enable_x64(True):
        clients = [points()[i]["x"] for i in range(len(SIZES))]
        history = clusters.gaussian_mixture(*params.values(), clients, cohorts=COHORTS, floor=floor)
        found = cluster(fl.gaussian_mixture, params, speed, num_components=3, min_variance=floor)
        for expected, (state, info) in zip(history, found, strict=True):
            for name, x in state.params.items():
                np.testing.assert_allclose(x, getattr(expected, name), rtol=1e-8, atol=1e-12)
            np.testing.assert_allclose(info.loss, -expected.log_likelihood, rtol=1e-6)
    # The third component weighs nothing, and stays.
    np.testing.assert_array_equal(state.params["centers"][2], params["centers"][2])


def test_what_cannot_be_clustered_is_refused():
    with pytest.raises(ValueError, match=r"params are .*\[3, 2\]; .*\[clusters, features\] of 2 c"):
        next(run(fl.k_means(2, mesh=fl.clients_mesh(1)), points(), np.zeros((3, 2), np.float32)))
    with pytest.raises(ValueError, match=r"feature 'x' is .*\[.*, 2\] in a batch; .*\[batch, 3\]"):
        next(run(fl.k_means(2, mesh=fl.clients_mesh(1)), points(), np.zeros((2, 3), np.float32)))
    mixture = {"weights": np.ones(2, np.float32) / 2, "centers": np.zeros((2, 2), np.float32)}
    with pytest.raises(ValueError, match=r"params are .*weights.*; pass algorithm.init a dict of"):
        next(run(fl.gaussian_mixture(2, mesh=fl.clients_mesh(1)), points(), mixture))
    for factory in (fl.k_means, fl.gaussian_mixture):
        with pytest.raises(ValueError, match=r"reducer is .*sums, which add up; leave it out"):
            factory(2, reducer=fl.coordinate_median())


def test_what_clients_chose_may_lie_in_a_file(tmp_path):
    algorithm = fl.ifca(regression_model(), optax.sgd(RATE), num_clusters=2, **options())
    params = {"w": np.array([[1, 0, 0], [-1, 0, 0]], np.float32), "b": np.zeros(2, np.float32)}
    state = algorithm.init(params, num_clients=len(SIZES))
    on_disk = algorithm.init(params, num_clients=1)
    on_disk = fl.store_in_file(on_disk, tmp_path, num_clients=len(SIZES))
    population = two_directions().resident(fl.clients_mesh(1))
    for i, ids in enumerate(COHORTS):
        cohort = everyone(population, ids)
        state, _ = algorithm.round(jax.random.key(i), state, cohort)
        on_disk, _ = algorithm.round(jax.random.key(i), on_disk, cohort)
    chex.assert_trees_all_equal(state.params, on_disk.params)
    assert state.store.tolist() == on_disk.store.read(range(len(SIZES))).tolist()
    assert set(state.store.tolist()) == {0, 1}
