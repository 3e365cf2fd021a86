import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lite as fl
from fedjax_lite.experiments.build import build
from fedjax_lite.experiments.settings import Settings, calls_of, to_settings


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Four clients with 10 examples each, of a class that tells them apart."""
    tmp_path = tmp_path_factory.mktemp("clients")
    rng = np.random.default_rng(0)
    y = np.arange(40) // 10
    x = rng.normal(size=(40, 3)).astype(np.float32)
    np.savez(tmp_path / "data.npz", client_ids=y, x=x, y=y)
    return str(tmp_path / "data.npz")


def test_what_is_left_open_takes_the_defaults():
    calls = calls_of(Settings())
    assert str(calls.sampler) == "uniform(cohort_size=20, replace=False, capacity=None)"
    assert calls.client_optimizer.arguments["learning_rate"] == 0.1
    assert calls.server_optimizer.arguments["learning_rate"] == 1.0
    assert {"num_epochs": 5, "batch_size": 10}.items() <= calls.algorithm.arguments.items()
    # Numbers with options of their own go before what is written.
    given = calls_of(
        Settings(
            algorithm="fed_prox(mu=0.1, num_epochs=2)",
            num_epochs=3,
            client_optimizer="chain(clip_by_global_norm(1.0), sgd(0.5))",
            client_lr=0.2,
            sampler="uniform(7)",
            server_optimizer="adam(learning_rate=1.0, b1=0.5)",
            server_lr=2.0,
        )
    )
    assert given.algorithm.arguments["num_epochs"] == 3
    assert given.client_optimizer.more[1].arguments["learning_rate"] == 0.2
    assert given.sampler.arguments["cohort_size"] == 7
    assert given.server_optimizer.arguments["learning_rate"] == 2.0


@pytest.mark.usefixtures("few_drawn")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "algorithm": "fed-sgd",
            "dataset": "gaussian-images",
            "model": "logistic",
            "num_clients": 30,
        },
        {"algorithm": "fed_prox(mu=1)", "partition": "shards", "server_optimizer": "lars(0.1)"},
        {"dataset": "synthetic", "num_clients": 5, "sampler": "poisson", "cohort_size": 2},
        {"client_optimizer": "sgd(cosine_decay_schedule(0.1, 100))", "updates": "clip_by_norm(1)"},
        {"dataset": "shakespeare_like(vocabulary_size=20)", "num_steps": 2, "metrics": "top_k(5)"},
        {"algorithm": "apfl", "fine_tune_epochs": None, "sampler": "everyone", "lanes": 2},
    ],
)
def test_settings_that_are_closed_stay_as_they_are(settings):
    closed = build(Settings(**settings)).settings
    assert build(closed).settings == closed
    assert to_settings(closed, calls_of(closed)) == closed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "fed_avg(mu=0.1)"}, "fed_avg has no argument mu"),
        ({"algorithm": "fed-sgd", "client_lr": 0.1}, r"client_lr is 0\.1, and clients of fed_sgd"),
        ({"algorithm": "fed_sgd", "client_optimizer": "sgd"}, "client_optimizer is sgd, and clie"),
        ({"algorithm": "fed-sgd", "num_epochs": 2}, "num_epochs is 2, and fed_sgd takes no num_ep"),
        ({"algorithm": "fedavg"}, r"did you mean fed_avg\?"),
        (
            {"dataset": "shakespeare_like", "partition": "iid"},
            "partition is .* are drawn when",
        ),
        (
            {"dataset": "emnist_like", "held_out": 0.1},
            "held_out is 0.1, and the examples",
        ),
        ({"partition": "iid(alpha=0.1)"}, "iid has no argument alpha"),
        ({"partition": "natural"}, "the examples of dataset belong to nobody; choose"),
        ({"num_epochs": 1, "num_steps": 1}, "choose one of the two"),
        ({"dataset": "a", "test": "b", "held_out": 0.1}, "held_out is 0.1 beside test"),
        ({"rounds": 0}, "rounds is 0"),
        ({"algorithm": "apfl(alpha=2.0)"}, "alpha is 2.0; .* between 0 and 1"),
        ({"algorithm": "apfl", "fine_tune_epochs": 1}, "fine_tune_epochs is 1"),
        ({"algorithm": "apfl", "fine_tune_steps": 2}, "fine_tune_steps is 2"),
        (
            {"fine_tune_epochs": 1, "fine_tune_steps": 2},
            "fine_tune_epochs is 1 beside fine_tune_steps 2",
        ),
        ({"updates": "quantize_uniform(1)"}, "num_levels is 1; choose an integer"),
        ({"updates": "clip_by_norm(0.0)"}, "max_norm is 0.0; choose a number above 0"),
        ({"model": "emnist_cnn(hidden=3)"}, "emnist_cnn has no argument hidden"),
        ({"client_lr": float("nan")}, "client_lr is nan; choose a positive number"),
        ({"client_optimizer": "adam(-1.0)"}, "client_optimizer has a learning_rate of -1.0"),
        ({"client_optimizer": "identity", "client_lr": 1.0}, "identity takes no learning_rate"),
        ({"client_optimizer": "chain(sgd(1), sgd(2))", "client_lr": 1.0}, "more than one learning"),
        ({"sampler": "everyone", "cohort_size": 3}, "cohort_size is 3, and everyone takes no"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"model": "mlp(hidden=(8, 0))"}, "hidden is 0"),
        ({"metrics": "top_k(0)"}, "k is 0"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        build(Settings(**settings))


def test_objects_of_python_serve_as_settings(path):
    dataset = fl.data.read(path)
    model = fl.models.logistic((3,), 4)
    found = fl.experiment(
        dataset=dataset.split_examples(0.5, seed=0),
        model=model,
        algorithm=lambda model, client_optimizer, server_optimizer: fl.fed_avg(
            model, client_optimizer, server_optimizer, num_steps=2
        ),
        client_optimizer=optax.sgd(0.5),
        server_optimizer=optax.sgd(1.0, momentum=0.5),
        updates=fl.clip_by_norm(1.0),
        sampler=fl.samplers.everyone(4),
        metrics={"top": fl.metrics.top_k(2)},
        rounds=2,
    )
    result = found.train()
    assert set(result.history.evaluations[-1]) == {"round", "seconds", "loss", "accuracy", "top"}
    assert found.model is model
    assert "dataset='<tuple of Python>'" in repr(found)
    with pytest.raises(TypeError, match="rate"):
        fl.experiment(rate=1)
    with pytest.raises(ValueError, match="client_lr is 1 beside an object as client_optimizer"):
        fl.experiment(client_optimizer=optax.sgd(1.0), client_lr=1)
    with pytest.raises(TypeError, match="what model returned is of type int"):
        fl.experiment(dataset=dataset, model=3, cohort_size=2)


def test_metrics_are_evaluated_beside_those_of_the_model():
    found = fl.experiment(metrics="top_k(3), top_k(5), perplexity")
    state = found.algorithm.init(jax.random.key(0))
    measured = found.evaluate(state)
    names = {"loss", "accuracy", "perplexity"}
    assert set(measured) - names == {
        f"top_k(k={k}, label='y', ignore=(), barred=())" for k in (3, 5)
    }
    np.testing.assert_allclose(np.log(measured["perplexity"]), measured["loss"], rtol=1e-5)


def test_a_partition_may_change_the_examples():
    plain, noisy = (
        build(Settings(partition=f"noisy(variance={v})", num_clients=20, cohort_size=5))
        for v in (0, 0.1)
    )
    assert noisy.settings.partition == "noisy(num_clients=20, variance=0.1, feature='x')"
    images, disturbed = (built.population.examples for built in (plain, noisy))
    np.testing.assert_array_equal(images["y"], disturbed["y"])
    owners = np.repeat(np.arange(20), np.diff(noisy.population.offsets))
    squared = np.square(disturbed["x"] - images["x"]).mean(1)
    of_clients = np.bincount(owners, squared) / np.bincount(owners)
    np.testing.assert_allclose(of_clients, 0.1 * np.arange(1, 21) / 20, rtol=0.2)


def test_examples_with_several_labels():
    rng = np.random.default_rng(0)
    examples = {"x": rng.integers(0, 8, (60, 5)).astype(np.int32), "y": rng.random((60, 3)) < 0.4}
    built = fl.experiment(
        dataset=fl.FederatedDataset.from_clients(dict.fromkeys(range(3), examples)),
        model="stackoverflow_tags(vocabulary_size=6)",
        metrics="recall_at(2)",
        cohort_size=2,
    )
    state = built.algorithm.init(jax.random.key(0))
    assert state.params["kernel"].shape == (6, 3)
    found = built.evaluate(state)
    assert set(found) == {"loss", "accuracy", "recall_at"}
    assert 0 < found["recall_at"] < 1


def test_targets_may_be_real_numbers():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 2, 2)), rng.normal(size=(60, 3))
    examples = {"x": x.astype(np.float32), "y": y.astype(np.float32)}
    built = fl.experiment(dataset=examples, num_clients=4, cohort_size=2, metrics="r_squared")
    assert (built.calls.partition.name, built.calls.model.name) == ("iid", "regression")
    state = built.algorithm.init(jax.random.key(0))
    x, y = (built.held_out.examples[name] for name in ("x", "y"))
    error = x.reshape(len(x), 4) @ state.params["Dense_0"]["kernel"] - y
    loss = built.evaluate(state)["loss"]
    np.testing.assert_allclose(loss, np.square(error).mean(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"model is logistic, of classes, .* of dtype float32"):
        fl.experiment(dataset=examples, num_clients=4, cohort_size=2, model="logistic")


@pytest.mark.parametrize(
    "partition",
    [
        "iid",
        "dirichlet_sizes(alpha=0.5)",
        "dirichlet(alpha=0.3)",
        "dirichlet-by-client(alpha=1.0)",
        "shards(shards_per_client=2)",
    ],
)
def test_all_digits_are_dealt_once(partition):
    built = build(Settings(partition=partition, num_clients=20, cohort_size=5))
    train, held_out = built.population.examples, built.held_out.examples
    rows = np.concatenate([np.c_[part["x"], part["y"]] for part in (train, held_out)])
    images, rest = fl.data.digits(1)
    parts = (images.examples, rest)
    expected = np.concatenate([np.c_[part["x"], part["y"]] for part in parts])
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])
    assert built.population.num_clients == built.held_out.num_clients == 20
    assert abs(held_out["y"].size / rows.shape[0] - 0.2) < 0.02


def test_a_file_keeps_its_clients_unless_told_otherwise(path):
    built = build(Settings(dataset=path, cohort_size=2))
    for i in range(4):
        assert set(built.held_out[i]["y"]) == {i}
    dealt = build(Settings(dataset=path, partition="iid", num_clients=2, cohort_size=2))
    assert dealt.population.num_clients == 2
    tested = build(Settings(dataset=path, test=path, cohort_size=2))
    assert tested.held_out.offsets[-1] == tested.population.examples["y"].size == 40


def test_a_class_that_is_not_held_out_is_a_class(tmp_path):
    features = {"x": np.zeros((4, 2), np.float32), "y": [0, 1, 1, 7]}
    np.savez(tmp_path / "a.npz", client_ids=[0, 0, 0, 1], **features)
    built = build(Settings(dataset=str(tmp_path / "a.npz"), cohort_size=1, model="logistic"))
    params, _ = built.model.init(jax.random.key(0))
    assert built.held_out.examples["y"].max() < 7
    assert params["Dense_0"]["bias"].shape == (8,)


def test_a_split_depends_on_the_seed_of_the_data_alone(path):
    first, second, other = (
        build(Settings(dataset=path, cohort_size=2, seed=seed, data_seed=data_seed)).held_out
        for seed, data_seed in ((0, 0), (1, 0), (0, 1))
    )
    np.testing.assert_array_equal(first.examples["x"], second.examples["x"])
    assert not np.array_equal(first.examples["x"], other.examples["x"])


def test_columns_of_a_table_become_examples(tmp_path):
    file, whole = tmp_path / "a.csv", tmp_path / "b.csv"
    file.write_text(
        "who,a,note,label,b\n" + "".join(f"{i % 2},{i},-,{i % 3},.5\n" for i in range(6))
    )
    whole.write_text("who,a,label,b\n" + "".join(f"{i % 2},{i},{i % 3},5\n" for i in range(6)))
    for dataset, columns in (
        (file, {"x": ["a", "b"], "y": "label"}),
        (whole, {"x": "*", "y": "label"}),
    ):
        read = f"read({str(dataset)!r}, client_column='who', columns={columns})"
        built = build(Settings(dataset=read, test=read, model="logistic", cohort_size=1))
        x = built.population.examples["x"]
        assert (x.dtype, x.shape, built.population.num_clients) == (jnp.float32, (6, 2), 2)
        assert x[:, 0].tolist() == [0, 2, 4, 1, 3, 5]
        assert built.held_out.examples["y"].tolist() == [0, 2, 1, 1, 0, 2]
    for columns, message in (
        ({"x": ["c"], "y": "label"}, "it has no column 'c'"),
        ({"y": "label"}, r"has the features y; .* name them by read\(\.\.\., columns="),
        ("a", "columns is 'a'; write it as"),
    ):
        read = f"read({str(file)!r}, client_column='who', columns={columns!r})"
        with pytest.raises(ValueError, match=message):
            build(Settings(dataset=read, cohort_size=1))


def test_what_cannot_be_met_is_refused(path, tmp_path):
    with pytest.raises(ValueError, match=r"cohort_size is 20; choose an integer between 1 and 4"):
        build(Settings(dataset=path))
    with pytest.raises(ValueError, match=r"digts is none of the datasets; did you mean digits\?"):
        build(Settings(dataset="digts"))
    np.savez(tmp_path / "x.npz", client_ids=[1, 2], x=np.zeros((2, 3), np.uint8), y=[0, 1])
    with pytest.raises(ValueError, match="dataset has x of dtype uint8"):
        build(Settings(dataset=str(tmp_path / "x.npz"), cohort_size=1))
    np.savez(tmp_path / "v.npz", client_ids=[1, 2], x=np.zeros((2, 3)), y=[-1, 1])
    with pytest.raises(ValueError, match=r"y of shape .* from -1; choose one with a class from 0"):
        build(Settings(dataset=str(tmp_path / "v.npz"), cohort_size=1))
    np.savez(tmp_path / "z.npz", client_ids=[1, 2], z=[0, 1])
    with pytest.raises(ValueError, match="dataset has the features z; choose one with x and y"):
        build(Settings(dataset=str(tmp_path / "z.npz"), cohort_size=1))
    np.savez(tmp_path / "w.npz", client_ids=[1, 2], x=np.zeros((2, 5)), y=[0, 1])
    with pytest.raises(ValueError, match=r"test has examples x of shape \(5,\)"):
        build(Settings(dataset=path, test=str(tmp_path / "w.npz"), cohort_size=1))


def built_with(path, **settings):
    settings = {"cohort_size": 4, "batch_size": 40, "model": "logistic", **settings}
    return build(Settings(dataset=path, **settings))


@functools.cache
def one_round(path, **settings):
    built = built_with(path, **settings)
    state = built.algorithm.init(jax.random.key(0))
    cohort = fl.cohort_of(built.population, built.sampler.select(jax.random.key(1), 0).client_ids)
    after, _ = built.algorithm.round(jax.random.key(2), state, cohort)
    return built, state, after


def assert_is_one_program(built, algorithm):
    """Equal states and programs have equal results: nothing is compiled to see that."""
    cohort = fl.cohort_of(built.population, np.arange(built.sampler.capacity))
    both = (built.algorithm, algorithm)
    states = [one.init(jax.random.key(0), num_clients=4) for one in both]
    jax.tree.map(np.testing.assert_array_equal, *states)
    programs = [
        one.round.lower(jax.random.key(1), state, cohort).as_text()
        for one, state in zip(both, states, strict=True)
    ]
    assert programs[0] == programs[1]


def test_a_round_is_that_of_the_algorithm_by_hand(path):
    built = built_with(
        path,
        algorithm="fed-prox(mu=0.5, weighting='uniform')",
        num_steps=2,
        client_optimizer="chain(clip_by_global_norm(0.1), add_decayed_weights(0.01),"
        " sgd(0.2, momentum=0.9))",
        server_optimizer="adam(0.01, b1=0.9, b2=0.99, eps=1e-3)",
    )
    client = optax.chain(
        optax.clip_by_global_norm(0.1), optax.add_decayed_weights(0.01), optax.sgd(0.2, 0.9)
    )
    server = optax.adam(0.01, b1=0.9, b2=0.99, eps=1e-3)
    algorithm = fl.fed_prox(
        built.model, client, server, mu=0.5, num_steps=2, batch_size=40, weighting="uniform"
    )
    assert_is_one_program(built, algorithm)
    other = fl.fed_prox(
        built.model, client, server, mu=0.4, num_steps=2, batch_size=40, weighting="uniform"
    )
    with pytest.raises(AssertionError):
        assert_is_one_program(built, other)


@pytest.mark.parametrize(
    ("optimizer", "factor"),
    [
        ("sgd(cosine_decay_schedule(0.1, 100))", (1 + np.cos(np.pi * 30 / 100)) / 2),
        ("chain(identity, sgd(exponential_decay(0.1, 20, 0.5, staircase=True)))", 0.5),
        ("sgd(join_schedules([constant_schedule(1), constant_schedule(3)], [20]))", 3),
        ("sgd(0.1)", 1),
    ],
)
def test_client_learning_rates_follow_the_round(path, optimizer, factor):
    built, state, _ = one_round(path, num_epochs=1, client_optimizer=optimizer)
    cohort = fl.cohort_of(built.population, np.arange(4))
    moves = []
    for round in (0, 30):
        begin = dataclasses.replace(state, round=jnp.int32(round))
        after, _ = built.algorithm.round(jax.random.key(2), begin, cohort)
        moves.append(optax.tree.norm(optax.tree.sub(after.params, state.params)))
    np.testing.assert_allclose(moves[1] / moves[0], factor, rtol=1e-4)


@pytest.mark.parametrize(
    "sampler", ["uniform", "poisson", "importance", "round-robin", "minimise-reuse", "everyone"]
)
def test_samplers_choose_among_all_clients(path, sampler):
    size = {} if sampler == "everyone" else {"cohort_size": 2}
    built = build(Settings(dataset=path, sampler=sampler, **size))
    assert built.sampler.num_clients == 4
    sizes = [
        int((built.sampler.select(jax.random.key(0), r).client_ids >= 0).sum()) for r in range(100)
    ]
    expected = 4 if sampler == "everyone" else 2
    # Poisson: a standard deviation of sqrt(4 x 1/2 x 1/2 / 100) = .1.
    assert abs(np.mean(sizes) - expected) < 0.4


@pytest.fixture
def texts(tmp_path):
    """Two clients with six sequences each, ids up to 19."""
    ids = np.random.default_rng(0).integers(0, 20, (12, 9)).astype(np.int32)
    np.savez(tmp_path / "t.npz", client_ids=np.arange(12) % 2, x=ids[:, :-1], y=ids[:, 1:])
    return str(tmp_path / "t.npz")


@pytest.mark.parametrize(
    ("model", "num_params"),
    # Beside the embedding and the last layer, LSTMs of 256 and 670, or three layers.
    [
        ("shakespeare_lstm", 20 * 8 + 271_360 + 525_312 + 257 * 20),
        ("stackoverflow_lstm", 20 * 96 + 2_055_560 + 64_416 + 97 * 20),
        ("stackoverflow_transformer", 20 * 96 + 3 * 334_176),
    ],
)
def test_language_models_take_sequences(texts, model, num_params):
    built = build(Settings(dataset=texts, model=f"{model}(vocabulary_size=20)", cohort_size=2))
    state = jax.eval_shape(built.algorithm.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == num_params
    assert set(jax.eval_shape(built.evaluate, state)) == {
        *("loss", "accuracy", "accuracy_in_vocabulary")
    }
    dealt = build(
        Settings(
            dataset=texts,
            model=f"{model}(vocabulary_size=20)",
            partition="iid",
            num_clients=3,
            cohort_size=2,
            num_steps=1,
        )
    )
    assert dealt.population.examples["x"].shape[0] + dealt.held_out.examples["x"].shape[0] == 12


@pytest.mark.usefixtures("few_drawn")
@pytest.mark.parametrize(
    ("dataset", "model", "shape", "num_clients"),
    [
        ("gaussian_images", "emnist_cnn", (28, 28, 1), 1000),
        ("emnist_like", "emnist_cnn", (28, 28, 1), 3400),
        ("cifar10_like", "cifar_cnn", (32, 32, 3), 500),
        ("cifar100_like", "resnet18", (32, 32, 3), 500),
        ("shakespeare_like", "shakespeare_lstm", (80,), 715),
        ("stackoverflow_like", "stackoverflow_transformer", (20,), 342_477),
        ("stackoverflow_tags_like", "stackoverflow_tags", (30,), 342_477),
    ],
)
def test_drawn_data_have_the_shapes_of_benchmarks(dataset, model, shape, num_clients):
    built = build(Settings(dataset=f"{dataset}(num_examples=7)", batch_size=3))
    key = jax.random.key(0)
    batch = jax.eval_shape(built.population.sample, key, jnp.int32(0))
    assert batch["x"].shape == (3, *shape)
    of_tags = model == "stackoverflow_tags"
    assert batch["y"].shape == (3, *(() if len(shape) == 3 else (500,) if of_tags else shape))
    assert (built.calls.model.name, built.population.num_clients) == (model, num_clients)
    assert int(built.population.num_examples(key, jnp.int32(0))) == 7
    if dataset == "cifar100_like":
        small = build(Settings(dataset="cifar100_like(crop=24)", model="logistic"))
        assert jax.eval_shape(small.population.sample, key, 0)["x"].shape[1:] == (24, 24, 3)


def test_image_models_take_the_classes_of_the_data(tmp_path):
    y = np.array([0, 1, 2, 3] * 3, np.int32)
    x = np.zeros((12, 32, 32, 3), np.float32)
    np.savez(tmp_path / "i.npz", client_ids=np.arange(12) % 2, x=x, y=y)
    for model, width in (("cifar_cnn", 128), ("lenet", 84), ("resnet18", 512)):
        built = build(Settings(dataset=str(tmp_path / "i.npz"), model=model, cohort_size=2))
        params = jax.eval_shape(built.algorithm.init, jax.random.key(0)).params
        assert (width, 4) in {leaf.shape for leaf in jax.tree.leaves(params)}
    for model in ("emnist_dense", "shakespeare_lstm"):
        with pytest.raises(ValueError, match=rf"model is {model}\(.*fails on examples x of dt"):
            build(Settings(dataset=str(tmp_path / "i.npz"), model=model, cohort_size=2))


def test_sequences_that_do_not_fit_are_refused(texts, tmp_path):
    with pytest.raises(ValueError, match=r"model is mlp\(.* fails on examples x of dtype int32"):
        build(Settings(dataset=texts, model="mlp", cohort_size=2))
    with pytest.raises(ValueError, match="of 19 classes or ids, and the data have 20"):
        build(Settings(dataset=texts, model="shakespeare_lstm(19)", cohort_size=2))
    with pytest.raises(ValueError, match=r"model is logistic\(\), and fails on examples x"):
        build(Settings(dataset="shakespeare_like", model="logistic"))
    np.savez(tmp_path / "u.npz", client_ids=[0, 1], x=[[1, 2], [3, 4]], y=[[1], [2]])
    with pytest.raises(ValueError, match=r"dataset has x of dtype int64 and shape \(2,\), and y"):
        build(Settings(dataset=str(tmp_path / "u.npz"), cohort_size=1))
    np.savez(tmp_path / "s.npz", client_ids=[0, 1], x=np.zeros((2, 3)), y=[0.5j, 1.5])
    with pytest.raises(ValueError, match="y of dtype"):
        build(Settings(dataset=str(tmp_path / "s.npz"), cohort_size=1))


def test_a_model_with_frozen_params_is_evaluated():
    def net(input_shape, num_classes):
        return fl.frozen(fl.models.mlp(input_shape, (4,), num_classes), "Dense_0/*")

    found = fl.experiment(
        dataset="synthetic(num_clients=3)", model=net, cohort_size=2, metrics="top_k(2)"
    )
    state = found.algorithm.init(jax.random.key(0))
    assert found.server_has_all
    assert sorted(found.evaluate(state)) == ["accuracy", "loss", "top_k"]


def trained(built, num_rounds):
    return fl.train(
        built.algorithm, built.population, built.sampler, num_rounds, key=jax.random.key(0)
    ).state


@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        ({"algorithm": "scaffold"}, fl.scaffold),
        ({"algorithm": "fed-nova"}, fl.fed_nova),
        (
            {"algorithm": "apfl(alpha=0.2, layerwise=True)"},
            lambda *common, **options: fl.apfl(*common, alpha=0.2, layerwise=True, **options),
        ),
        (
            {"algorithm": "fed_ex_lora", "model": "lora(mlp((4,)), rank=2)"},
            lambda model, client_optimizer, server_optimizer, **options: fl.fed_ex_lora(
                model, client_optimizer, **options
            ),
        ),
        (
            {"reducer": "coordinate_median", "updates": "error_feedback(quantize_uniform(4))"},
            lambda *common, **options: fl.fed_avg(
                *common,
                pipeline=fl.chain(fl.error_feedback(fl.quantize_uniform(4))),
                reducer=fl.coordinate_median(),
                **options,
            ),
        ),
        (
            {"updates": "clip_by_norm(0.1), quantize_uniform(16)"},
            lambda *common, **options: fl.fed_avg(
                *common,
                pipeline=fl.chain(fl.clip_by_norm(0.1), fl.quantize_uniform(16)),
                **options,
            ),
        ),
    ],
)
def test_settings_become_the_algorithm(path, settings, by_hand):
    built = build(Settings(dataset=path, cohort_size=3, num_epochs=2, **settings))
    algorithm = by_hand(built.model, optax.sgd(0.1), optax.sgd(1.0), batch_size=10, num_epochs=2)
    assert_is_one_program(built, algorithm)


@pytest.mark.parametrize(
    ("model", "algorithm"),
    [("centroids(2)", "k_means"), ("gaussians(2, full=True)", "gaussian_mixture")],
)
def test_examples_are_clustered(model, algorithm, path):
    built = build(Settings(dataset=path, model=model, algorithm=algorithm, cohort_size=3))
    assert built.metric == "loss"
    begin = built.algorithm.init(jax.random.key(0))
    before, after = (float(built.evaluate(state)["loss"]) for state in (begin, trained(built, 5)))
    assert after < before


def test_clients_have_models_for_themselves(path):
    settings = {"model": "logistic", "client_lr": 1.0}
    plain = build(Settings(dataset=path, cohort_size=3))
    assert plain.personal is None
    for tuning in ({"fine_tune_epochs": 20}, {"fine_tune_steps": 20}):
        tuned = build(Settings(dataset=path, cohort_size=3, **tuning, **settings))
        state = tuned.algorithm.init(jax.random.key(0))
        # Each client has one class, which is soon learned.
        assert tuned.personal(state, jax.random.key(1)).pooled["accuracy"] == 1
    assert tuned.evaluate(state)["accuracy"] < 1
    own = build(Settings(dataset=path, cohort_size=3, algorithm="apfl", num_epochs=20, **settings))
    state = trained(own, 10)
    assert own.personal(state, jax.random.key(1)).pooled["accuracy"] == 1


def test_models_of_clients_are_evaluated_on_their_own_examples(path):
    train = fl.data.read(path)
    reversed_ = train.select(train.client_ids[::-1])
    settings = Settings(dataset=path, test=path, cohort_size=3, algorithm="apfl")
    state = build(settings).algorithm.init(jax.random.key(0), num_clients=4)
    rng = np.random.default_rng(0)
    # Any models that differ will do.
    store = jax.tree.map(
        lambda leaf: leaf + rng.normal(size=leaf.shape).astype(leaf.dtype), state.store
    )
    state = dataclasses.replace(state, store=store)
    found = [
        build(settings, (train, test)).personal(state, jax.random.key(1)).clients["loss"]
        for test in (train, reversed_)
    ]
    np.testing.assert_array_equal(*found)
    assert len(set(found[0].tolist())) == 4
    with pytest.raises(ValueError, match="test has 2 clients that are not those of dataset"):
        build(settings, (train, train.select(train.client_ids[:2])))
