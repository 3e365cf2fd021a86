import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lite as fl
from fedjax_lite.experiments.build import build
from fedjax_lite.experiments.experiment import Experiment, resolve


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Four clients with 10 examples each, of a class that tells them apart."""
    tmp_path = tmp_path_factory.mktemp("clients")
    rng = np.random.default_rng(0)
    y = np.arange(40) // 10
    x = rng.normal(size=(40, 3)).astype(np.float32)
    np.savez(tmp_path / "data.npz", client_ids=y, x=x, y=y)
    return str(tmp_path / "data.npz")


def test_settings_take_the_defaults_of_what_they_belong_to():
    resolved = resolve(Experiment(server_optimizer="yogi", sampler="everyone"))
    assert (resolved.partition, resolved.num_clients, resolved.alpha) == ("dirichlet", 50, 0.3)
    assert (resolved.server_lr, resolved.server_b2, resolved.server_momentum) == (0.01, 0.99, None)
    assert (resolved.model, resolved.hidden, resolved.cohort_size) == ("mlp", (64,), None)
    steps = resolve(Experiment(num_steps=3, client_schedule="step", model="logistic"))
    assert (steps.num_epochs, steps.num_steps, steps.decay_every) == (None, 3, 100)
    assert (steps.hidden, steps.mu) == (None, None)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"algorithm": "fed-prox", "server_optimizer": "lars", "partition": "shards"},
        {"algorithm": "fed-sgd", "dataset": "gaussian-images", "server_schedule": "step"},
        {"dataset": "file.npz", "test": "test.npz", "num_steps": 2, "clip": 1.0},
    ],
)
def test_a_resolved_experiment_stays_as_it_is(settings):
    resolved = resolve(Experiment(**settings))
    assert resolve(resolved) == resolved


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mu": 0.1}, "mu is 0.1, which belongs to fed-prox; leave it out with fed-avg"),
        ({"server_momentum": 0.5}, "belongs to momentum and lars; leave it out with sgd"),
        ({"algorithm": "fed-sgd", "client_lr": 0.1}, "client_lr is 0.1, .* with fed-sgd"),
        ({"dataset": "synthetic", "partition": "iid"}, "partition is 'iid'"),
        ({"partition": "iid", "alpha": 0.1}, "alpha is 0.1"),
        ({"partition": "natural"}, "digits have no clients of their own"),
        ({"num_epochs": 1, "num_steps": 1}, "choose one of the two"),
        ({"dataset": "a", "test": "b", "held_out": 0.1}, "held_out is 0.1 beside test"),
        ({"algorithm": "fedavg"}, "algorithm is 'fedavg'; choose one of 'fed-avg'"),
        ({"rounds": 0}, "rounds is 0"),
        ({"own_share": 0.5}, "own_share is 0.5, which belongs to apfl"),
        ({"algorithm": "apfl", "own_share": 2.0}, "own_share is 2.0; .* between 0 and 1"),
        ({"algorithm": "apfl", "fine_tune_epochs": 1}, "fine_tune_epochs is 1"),
        ({"quantize_bits": 25}, "quantize_bits is 25; choose an integer between 1 and 24"),
        ({"clip_update": 0.0}, "clip_update is 0.0; choose a positive number"),
        ({"crop": 24}, "crop is 24, which belongs to cifar10-like and cifar100-like"),
        ({"vocabulary_size": 90}, "vocabulary_size is 90, which belongs to shakespeare-lstm"),
        ({"examples_per_client": 9}, "examples_per_client is 9, which belongs to gaussian-images"),
        ({"client_lr": float("nan")}, "client_lr is nan; choose a positive number"),
        ({"server_b1": 1.0, "server_optimizer": "adam"}, "server_b1 is 1.0"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"hidden": (8, 0)}, "hidden is 0"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        resolve(Experiment(**settings))


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "dirichlet-by-client", "shards"])
def test_all_digits_are_dealt_once(partition):
    built = build(Experiment(partition=partition, num_clients=20, cohort_size=5))
    train, held_out = built.population.examples, built.held_out.examples
    rows = np.concatenate([np.c_[part["x"], part["y"]] for part in (train, held_out)])
    images, rest = fl.data.digits(1)
    parts = (images.examples, rest)
    expected = np.concatenate([np.c_[part["x"], part["y"]] for part in parts])
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])
    assert built.population.num_clients == built.held_out.num_clients == 20
    assert abs(held_out["y"].size / rows.shape[0] - 0.2) < 0.02


def test_a_file_keeps_its_clients_unless_told_otherwise(path):
    built = build(Experiment(dataset=path, cohort_size=2))
    for i in range(4):
        assert set(built.held_out[i]["y"]) == {i}
    dealt = build(Experiment(dataset=path, partition="iid", num_clients=2, cohort_size=2))
    assert dealt.population.num_clients == 2
    tested = build(Experiment(dataset=path, test=path, cohort_size=2))
    assert tested.held_out.offsets[-1] == tested.population.examples["y"].size == 40


def test_a_class_that_is_not_held_out_is_a_class(tmp_path):
    features = {"x": np.zeros((4, 2), np.float32), "y": [0, 1, 1, 7]}
    np.savez(tmp_path / "a.npz", client_ids=[0, 0, 0, 1], **features)
    built = build(Experiment(dataset=str(tmp_path / "a.npz"), cohort_size=1, model="logistic"))
    params, _ = built.model.init(jax.random.key(0))
    assert built.held_out.examples["y"].max() < 7
    assert params["Dense_0"]["bias"].shape == (8,)


def test_a_split_depends_on_the_seed_of_the_data_alone(path):
    first, second, other = (
        build(Experiment(dataset=path, cohort_size=2, seed=seed, data_seed=data_seed)).held_out
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
    settings = {"client_column": "who", "cohort_size": 1, "model": "logistic"}
    for dataset, columns in (
        (file, ("x=a,b", "y=label")),
        (whole, ("x=*", "y=label")),
    ):
        built = build(
            Experiment(dataset=str(dataset), columns=columns, test=str(dataset), **settings)
        )
        x = built.population.examples["x"]
        assert (x.dtype, x.shape, built.population.num_clients) == (jnp.float32, (6, 2), 2)
        assert x[:, 0].tolist() == [0, 2, 4, 1, 3, 5]
        assert built.held_out.examples["y"].tolist() == [0, 2, 1, 1, 0, 2]
    for columns, message in (
        (("x=c,", "y=label"), "it has no column 'c'"),
        (("y=label",), r"has the features y; .* name them by columns \(x=a,b y=label"),
        (("a",), "columns is 'a'; write each feature once, as x=a,b"),
    ):
        with pytest.raises(ValueError, match=message):
            build(Experiment(dataset=str(file), columns=columns, **settings))
    with pytest.raises(ValueError, match=r"columns is .* which belongs to file; leave it out"):
        resolve(Experiment(columns=("x=a",)))


def test_what_cannot_be_met_is_refused(path, tmp_path):
    with pytest.raises(ValueError, match=r"cohort_size is 20; choose an integer between 1 and 4"):
        build(Experiment(dataset=path))
    with pytest.raises(ValueError, match="dataset is 'digts': digts cannot be read"):
        build(Experiment(dataset="digts"))
    np.savez(tmp_path / "x.npz", client_ids=[1, 2], x=np.zeros((2, 3), np.uint8), y=[0, 1])
    with pytest.raises(ValueError, match="dataset has x of dtype uint8"):
        build(Experiment(dataset=str(tmp_path / "x.npz"), cohort_size=1))
    np.savez(tmp_path / "v.npz", client_ids=[1, 2], x=np.zeros((2, 3)), y=[-1, 1])
    with pytest.raises(ValueError, match=r"y of shape .* from -1; choose one with a class from 0"):
        build(Experiment(dataset=str(tmp_path / "v.npz"), cohort_size=1))
    np.savez(tmp_path / "z.npz", client_ids=[1, 2], z=[0, 1])
    with pytest.raises(ValueError, match="dataset has the features z; choose one with x and y"):
        build(Experiment(dataset=str(tmp_path / "z.npz"), cohort_size=1))
    np.savez(tmp_path / "w.npz", client_ids=[1, 2], x=np.zeros((2, 5)), y=[0, 1])
    with pytest.raises(ValueError, match=r"test has examples x of shape \(5,\)"):
        build(Experiment(dataset=path, test=str(tmp_path / "w.npz"), cohort_size=1))


def built_with(path, **settings):
    settings = {"cohort_size": 4, "batch_size": 40, "model": "logistic", **settings}
    return build(Experiment(dataset=path, **settings))


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
        algorithm="fed-prox",
        mu=0.5,
        num_steps=2,
        client_lr=0.2,
        client_momentum=0.9,
        client_weight_decay=0.01,
        clip=0.1,
        server_optimizer="adam",
        weighting="uniform",
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
    ("schedule", "factor"),
    [("cosine", (1 + np.cos(np.pi * 30 / 100)) / 2), ("step", 0.5)],
)
def test_client_learning_rates_follow_the_round(path, schedule, factor):
    decay = {} if schedule == "cosine" else {"decay_every": 20}
    built, state, _ = one_round(path, num_epochs=1, client_schedule=schedule, **decay)
    cohort = fl.cohort_of(built.population, np.arange(4))
    moves = []
    for round in (0, 30):
        begin = dataclasses.replace(state, round=jnp.int32(round))
        after, _ = built.algorithm.round(jax.random.key(2), begin, cohort)
        moves.append(optax.tree.norm(optax.tree.sub(after.params, state.params)))
    np.testing.assert_allclose(moves[1] / moves[0], factor, rtol=1e-4)


def test_adagrad_starts_from_tau_squared(path):
    _, state, after = one_round(path, server_optimizer="adagrad", server_eps=0.5, num_epochs=1)
    # In round 0, a schedule begins with the rate that is constant here.
    _, _, plain = one_round(path, num_epochs=1, client_schedule="cosine")
    delta = optax.tree.sub(plain.params, state.params)
    expected = jax.tree.map(lambda w, d: w + 0.1 * d / np.sqrt(0.25 + d**2), state.params, delta)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), after.params, expected)


@pytest.mark.parametrize(
    "sampler", ["uniform", "poisson", "importance", "round-robin", "minimise-reuse", "everyone"]
)
def test_samplers_choose_among_all_clients(path, sampler):
    size = {} if sampler == "everyone" else {"cohort_size": 2}
    built = build(Experiment(dataset=path, sampler=sampler, **size))
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
        ("shakespeare-lstm", 20 * 8 + 271_360 + 525_312 + 257 * 20),
        ("stackoverflow-lstm", 20 * 96 + 2_055_560 + 64_416 + 97 * 20),
        ("stackoverflow-transformer", 20 * 96 + 3 * 334_176),
    ],
)
def test_language_models_take_sequences(texts, model, num_params):
    built = build(Experiment(dataset=texts, model=model, vocabulary_size=20, cohort_size=2))
    state = jax.eval_shape(built.algorithm.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == num_params
    assert set(jax.eval_shape(built.evaluate, state)) == {
        *("loss", "accuracy", "accuracy_in_vocabulary")
    }
    dealt = build(
        Experiment(
            dataset=texts,
            model=model,
            vocabulary_size=20,
            partition="iid",
            num_clients=3,
            cohort_size=2,
            num_steps=1,
        )
    )
    assert dealt.population.examples["x"].shape[0] + dealt.held_out.examples["x"].shape[0] == 12


@pytest.mark.parametrize(
    ("dataset", "model", "shape", "num_clients"),
    [
        ("gaussian-images", "logistic", (28, 28, 1), 1000),
        ("emnist-like", "emnist-cnn", (28, 28, 1), 3400),
        ("cifar10-like", "cifar-cnn", (32, 32, 3), 500),
        ("cifar100-like", "resnet18", (32, 32, 3), 500),
        ("shakespeare-like", "shakespeare-lstm", (80,), 715),
        ("stackoverflow-like", "stackoverflow-transformer", (20,), 342_477),
    ],
)
def test_drawn_data_have_the_shapes_of_benchmarks(dataset, model, shape, num_clients):
    built = build(Experiment(dataset=dataset, batch_size=3, examples_per_client=7))
    key = jax.random.key(0)
    batch = jax.eval_shape(built.population.sample, key, jnp.int32(0))
    assert batch["x"].shape == (3, *shape)
    assert batch["y"].shape == ((3,) if len(shape) == 3 else (3, *shape))
    assert (built.experiment.model, built.population.num_clients) == (model, num_clients)
    assert int(built.population.num_examples(key, jnp.int32(0))) == 7
    if dataset == "cifar100-like":
        small = build(Experiment(dataset=dataset, model="logistic", crop=24))
        assert jax.eval_shape(small.population.sample, key, 0)["x"].shape[1:] == (24, 24, 3)


def test_image_models_take_the_classes_of_the_data(tmp_path):
    y = np.array([0, 1, 2, 3] * 3, np.int32)
    x = np.zeros((12, 32, 32, 3), np.float32)
    np.savez(tmp_path / "i.npz", client_ids=np.arange(12) % 2, x=x, y=y)
    for model, width in (("cifar-cnn", 128), ("lenet", 84), ("resnet18", 512)):
        built = build(Experiment(dataset=str(tmp_path / "i.npz"), model=model, cohort_size=2))
        params = jax.eval_shape(built.algorithm.init, jax.random.key(0)).params
        assert (width, 4) in {leaf.shape for leaf in jax.tree.leaves(params)}
    for model in ("emnist-cnn", "emnist-dense", "shakespeare-lstm"):
        with pytest.raises(ValueError, match=f"model is '{model}', and the examples x are float32"):
            build(Experiment(dataset=str(tmp_path / "i.npz"), model=model, cohort_size=2))


def test_sequences_that_do_not_fit_are_refused(texts, tmp_path):
    with pytest.raises(ValueError, match="model is 'mlp', and the examples x are int32 of shape"):
        build(Experiment(dataset=texts, cohort_size=2))
    with pytest.raises(ValueError, match=r"vocabulary_size is 19, .* id of the data 19; choose"):
        build(
            Experiment(dataset=texts, model="shakespeare-lstm", vocabulary_size=19, cohort_size=2)
        )
    with pytest.raises(ValueError, match="model is 'logistic', and shakespeare-like has sequences"):
        build(Experiment(dataset="shakespeare-like", model="logistic"))
    np.savez(tmp_path / "u.npz", client_ids=[0, 1], x=[[1, 2], [3, 4]], y=[[1], [2]])
    with pytest.raises(ValueError, match=r"dataset has x of dtype int64 and shape \(2,\), and y"):
        build(Experiment(dataset=str(tmp_path / "u.npz"), cohort_size=1))
    np.savez(tmp_path / "s.npz", client_ids=[0, 1], x=np.zeros((2, 3)), y=[0.5, 1.5])
    with pytest.raises(ValueError, match="y of dtype"):
        build(Experiment(dataset=str(tmp_path / "s.npz"), cohort_size=1))


def trained(built, num_rounds):
    return fl.train(
        built.algorithm, built.population, built.sampler, num_rounds, key=jax.random.key(0)
    ).state


@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        (
            {"algorithm": "scaffold"},
            lambda model, *common, **options: fl.scaffold(
                model, *common, weighting="examples", **options
            ),
        ),
        ({"algorithm": "fed-nova"}, fl.fed_nova),
        (
            {"algorithm": "apfl", "own_share": 0.2, "layerwise": True},
            lambda *common, **options: fl.apfl(*common, alpha=0.2, layerwise=True, **options),
        ),
        (
            {"clip_update": 0.1, "quantize_bits": 4},
            lambda *common, **options: fl.fed_avg(
                *common,
                pipeline=fl.chain(fl.clip_by_norm(0.1), fl.quantize_uniform(16)),
                **options,
            ),
        ),
    ],
)
def test_settings_become_the_algorithm(path, settings, by_hand):
    built = build(Experiment(dataset=path, cohort_size=3, num_epochs=2, **settings))
    algorithm = by_hand(built.model, optax.sgd(0.1), optax.sgd(1.0), batch_size=10, num_epochs=2)
    assert_is_one_program(built, algorithm)


def test_clients_have_models_for_themselves(path):
    settings = {"model": "logistic", "client_lr": 1.0}
    plain = build(Experiment(dataset=path, cohort_size=3))
    assert plain.personal is None
    tuned = build(Experiment(dataset=path, cohort_size=3, fine_tune_epochs=20, **settings))
    state = tuned.algorithm.init(jax.random.key(0))
    # Each client has one class, which is soon learned.
    assert tuned.personal(state, jax.random.key(1)).pooled["accuracy"] == 1
    assert tuned.evaluate(state)["accuracy"] < 1
    own = build(
        Experiment(dataset=path, cohort_size=3, algorithm="apfl", num_epochs=20, **settings)
    )
    state = trained(own, 10)
    assert own.personal(state, jax.random.key(1)).pooled["accuracy"] == 1


def test_models_of_clients_are_evaluated_on_their_own_examples(path):
    train = fl.data.read(path)
    reversed_ = train.select(train.client_ids[::-1])
    settings = Experiment(dataset=path, test=path, cohort_size=3, algorithm="apfl")
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
