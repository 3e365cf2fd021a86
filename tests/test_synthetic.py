import functools

import jax
import numpy as np
import optax
import pytest
from scipy.special import ndtr

import fedjax_lite as fl

SMALL = {"image_shape": (6, 5, 2), "num_classes": 10}


def clients_of(alpha, beta, **options):
    """`x` and `y` of each client, training and test examples together again."""
    train, test = fl.data.synthetic(alpha, beta, **options)
    return [
        {name: np.concatenate([train[i][name], test[i][name]]) for name in ("x", "y")}
        for i in train.client_ids
    ]


# FedProx's data


def test_synthetic_has_the_shapes_and_the_split_of_the_paper():
    train, test = fl.data.synthetic(1.0, 1.0)
    assert train.num_clients == test.num_clients == 30
    assert train.examples["x"].shape[1:] == (60,)
    assert (train.examples["x"].dtype, train.examples["y"].dtype) == (np.float32, np.int32)
    assert set(train.examples["y"]) <= set(range(10))
    sizes = train.num_examples + test.num_examples
    assert sizes.min() >= 50
    np.testing.assert_array_equal(train.num_examples, sizes * 9 // 10)
    again, _ = fl.data.synthetic(1.0, 1.0)
    np.testing.assert_array_equal(train.examples["x"], again.examples["x"])
    other, _ = fl.data.synthetic(1.0, 1.0, seed=1)
    assert not np.array_equal(train.offsets, other.offsets)


def test_synthetic_sizes_are_log_normal():
    sizes = np.array([len(client["y"]) for client in clients_of(0, 0, num_clients=400)])
    # P(floor(exp(4 + 2 z)) < n) = Phi((log n - 4) / 2), here at one deviation below and above.
    for n in (8, 404):
        expected = ndtr((np.log(n) - 4) / 2)
        error = np.sqrt(expected * (1 - expected) / 400)
        assert abs((sizes - 50 < n).mean() - expected) < 5 * error
        assert abs((sizes - 50 < n).mean() - ndtr(np.log(n) - 4)) > 2 * error


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
def test_synthetic_features_have_the_moments_of_the_definition(beta):
    clients = clients_of(0.0, beta, num_clients=300, seed=3)
    variances = np.arange(1, 61) ** -1.2
    sizes = np.array([len(client["y"]) for client in clients])
    centred = np.concatenate([client["x"] - client["x"].mean(0) for client in clients])
    covariance = centred.T @ centred / (sizes - 1).sum()
    error = np.sqrt((np.outer(variances, variances) + np.diag(variances**2)) / (sizes - 1).sum())
    assert (np.abs(covariance - np.diag(variances)) < 5.5 * error).all()

    # Client means are v_k, up to Sigma / n_k, and v_k spreads by 1 about B_k.
    means = np.array([client["x"].mean(0) for client in clients])
    noise = (variances / sizes[:, None]).mean()
    within = means.var(axis=1, ddof=1)
    assert abs(within.mean() - 1 - noise) < 5 * within.std() / np.sqrt(300)
    # A client's mean over the 60 features estimates B_k with variance 1/60.
    between = means.mean(1).var(ddof=1)
    expected = beta**2 + (1 + noise) / 60
    assert abs(between - expected) < 5 * expected * np.sqrt(2 / 299)
    if beta == 0.5:  # The standard deviation, as in the authors' code, and not the variance.
        assert abs(between - beta) > 5 * expected * np.sqrt(2 / 299)


def agreement(labels):
    """How often two examples of a client have the same label, whatever its size."""
    counts, n = np.bincount(labels), len(labels)
    return (counts * (counts - 1)).sum() / (n * (n - 1))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_synthetic_labels_are_as_skewed_as_the_definition_makes_them(beta):
    rng = np.random.default_rng(0)
    reference = {True: [], False: []}
    for _ in range(300):
        weights, bias = rng.normal(size=(60, 10)), rng.normal(size=10)
        for centred in (True, False):
            mean = np.zeros(60) if centred else rng.normal(rng.normal(0, beta), 1, 60)
            x = rng.normal(mean, np.arange(1, 61) ** -0.6, (200, 60))
            reference[centred].append(agreement(np.argmax(x @ weights + bias, 1)))
    ours = [agreement(client["y"]) for client in clients_of(0.0, beta, num_clients=300)]
    error = np.hypot(np.std(ours), np.std(reference[False])) / np.sqrt(300)
    assert abs(np.mean(ours) - np.mean(reference[False])) < 5 * error
    assert abs(np.mean(ours) - np.mean(reference[True])) > 5 * error


def test_alpha_leaves_the_labels_alone():
    one, other = fl.data.synthetic(0.0, 1.0)[0], fl.data.synthetic(1.0, 1.0)[0]
    np.testing.assert_array_equal(one.examples["x"], other.examples["x"])
    np.testing.assert_array_equal(one.examples["y"], other.examples["y"])


def test_one_model_fits_all_clients_of_the_iid_variant_only():
    accuracy = {}
    for iid in (True, False):
        train, _ = fl.data.synthetic(0, 0, num_clients=60, iid=iid)
        x, y = train.examples["x"], train.examples["y"]
        x = np.hstack([x, np.ones((len(x), 1), x.dtype)])
        cut = train.offsets[30]  # Learn from half of the clients, by least squares.
        weights = np.linalg.lstsq(x[:cut], np.eye(10)[y[:cut]], rcond=None)[0]
        accuracy[iid] = ((x[cut:] @ weights).argmax(1) == y[cut:]).mean()
        if iid:
            error = np.arange(1, 61) ** -0.6 / np.sqrt(len(x))
            assert (np.abs(x[:, :60].mean(0)) < 5 * error).all()
    assert accuracy[True] > 0.6
    assert accuracy[False] < 0.4


# Gaussian images


def drawn(draw, key, size):
    return jax.device_get(jax.jit(draw, static_argnums=1)(key, size))


@functools.cache
def patterns(**options):
    """The means of the classes: what is left where the noise is relatively nothing."""
    _, draw = fl.data.gaussian_images(separation=1e6, **options)
    batch = drawn(draw, jax.random.key(0), 2000)
    x = batch["x"].astype(np.float64) / (1e6 / np.sqrt(2))
    return np.array([x[batch["y"] == c][0] for c in range(options["num_classes"])])


def test_patterns_are_orthonormal_blocks():
    means = patterns(image_shape=(7, 4, 3), num_classes=12)
    flat = means.reshape(12, -1)
    np.testing.assert_allclose(flat @ flat.T, np.eye(12), atol=1e-4)
    np.testing.assert_allclose(means[:, 0:6:2], means[:, 1:6:2], atol=1e-4)
    np.testing.assert_allclose(means[:, :, 0::2], means[:, :, 1::2], atol=1e-4)
    assert np.abs(means[:, 1] - means[:, 2]).max() > 0.01


@pytest.mark.parametrize("separation", [0.0, 2.0, 4.0, 6.0])
def test_the_best_classifier_is_as_good_as_the_formula_says(separation):
    options = {"image_shape": (6, 6, 2), "num_classes": 10}
    means = patterns(**options).reshape(10, -1)
    _, draw = fl.data.gaussian_images(separation=separation, **options)
    batch = drawn(draw, jax.random.key(1), 20_000)
    guess = (batch["x"].reshape(20_000, -1) @ means.T).argmax(1)
    z = np.linspace(-8, 8, 2001)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    best = {
        s: np.trapezoid(density * ndtr(z + s / np.sqrt(2)) ** 9, z)
        for s in (separation, separation + 0.5)
    }
    accuracy = (guess == batch["y"]).mean()
    error = np.sqrt(best[separation] * (1 - best[separation]) / 20_000)
    assert abs(accuracy - best[separation]) < 5 * error
    assert separation == 6 or abs(accuracy - best[separation + 0.5]) > 5 * error


def test_a_linear_model_learns_more_from_classes_further_apart():
    accuracy = []
    for separation in (2.0, 4.0, 8.0):
        _, draw = fl.data.gaussian_images(separation=separation, **SMALL)
        batch = drawn(draw, jax.random.key(0), 4000)
        x, y = batch["x"].reshape(4000, -1), batch["y"]
        # Nearest class mean, a linear classifier.
        means = np.array([x[:2000][y[:2000] == c].mean(0) for c in range(10)])
        scores = x[2000:] @ means.T - (means**2).sum(1) / 2
        accuracy.append((scores.argmax(1) == y[2000:]).mean())
    assert accuracy[0] + 0.1 < accuracy[1] < accuracy[2] - 0.05


def class_counts(population, num_clients, *seeds):
    """How often each client draws each class, `[seeds, clients, classes]`."""
    labels = jax.jit(jax.vmap(lambda key, client: population.sample(key, client)["y"]))
    keys = [jax.random.split(jax.random.key(seed), num_clients) for seed in seeds]
    drawn = np.stack([labels(own, np.arange(num_clients)) for own in keys])
    return (drawn[..., None] == np.arange(10)).sum(2)


@pytest.mark.parametrize("alpha", [0.1, 1.0, None])
def test_clients_draw_labels_from_mixtures_of_their_own(alpha):
    size, num_clients = 30, 2000
    population, _ = fl.data.gaussian_images(num_clients, alpha=alpha, batch_size=size, **SMALL)
    counts, later = class_counts(population, num_clients, 1, 2)

    def variance(total):  # of a Dirichlet-multinomial count
        return size * 0.1 * 0.9 * (size + total) / (1 + total)

    total = 1e9 if alpha is None else 10 * alpha
    squares = (counts[:, 0] - counts[:, 0].mean()) ** 2
    error = squares.std() / np.sqrt(num_clients)
    assert abs(counts[:, 0].mean() - size / 10) < 5 * np.sqrt(variance(total) / num_clients)
    assert abs(squares.mean() - variance(total)) < 5 * error
    assert alpha is None or abs(squares.mean() - variance(4 * total)) > 5 * error

    # The mixture stays with the client, and the examples do not.
    assert (counts != later).any()
    correlation = np.corrcoef(counts[:, 0], later[:, 0])[0, 1]
    # Of two counts with the same p: Var(p) size^2 / Var(count) = size / (size + total).
    assert abs(correlation - size / (size + total)) < 0.1


def test_the_seed_determines_patterns_and_mixtures():
    def first(seed):
        population, draw = fl.data.gaussian_images(alpha=0.1, seed=seed, **SMALL)
        batch = jax.jit(population.sample)(jax.random.key(0), 7)
        return (
            batch["x"],
            drawn(draw, jax.random.key(0), 5)["x"],
            class_counts(population, 50, 0),
        )

    a, b, c = first(0), first(0), first(1)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(np.array_equal(x, y) for x, y in zip(a, c, strict=True))


def test_a_round_with_a_million_clients():
    population, draw = fl.data.gaussian_images(10**6, alpha=0.5, num_examples=30, **SMALL)
    model = fl.models.mlp((6, 5, 2), (), 10)
    algorithm = fl.fed_avg(model, client_optimizer=optax.sgd(0.1), num_epochs=1)
    state = algorithm.init(jax.random.key(0))
    test = drawn(draw, jax.random.key(1), 500)
    before = fl.evaluate(model, state, test)["loss"]
    for key in jax.random.split(jax.random.key(2), 5):
        key_cohort, key_round = jax.random.split(key)
        state, info = algorithm.round(key_round, state, fl.cohort(key_cohort, population, 20))
    assert info.num_examples == 600
    assert fl.evaluate(model, state, test)["loss"] < before - 0.1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: fl.data.synthetic(-1.0, 0.0), "alpha is -1.0"),
        (lambda: fl.data.synthetic(0.0, np.nan), "beta is nan"),
        (lambda: fl.data.synthetic(1.0, 0.0, iid=True), "alpha is 1.0 and beta is 0.0; pass 0"),
        (lambda: fl.data.synthetic(0, 0, num_clients=0), "num_clients is 0"),
        (lambda: fl.data.synthetic(0, 0, held_out=1.0), "held_out is 1.0"),
        (lambda: fl.data.synthetic(0, 0, seed=-1), "seed is -1"),
        (lambda: fl.data.gaussian_images(0), "num_clients is 0"),
        (lambda: fl.data.gaussian_images(image_shape=(28, 28)), r"image_shape is \(28, 28\)"),
        (lambda: fl.data.gaussian_images(image_shape=(2, 2, 1)), "num_classes is 62; choose an"),
        (lambda: fl.data.gaussian_images(separation=-1.0), "separation is -1.0"),
        (lambda: fl.data.gaussian_images(alpha=0.0), "alpha is 0.0"),
        (lambda: fl.data.gaussian_images(batch_size=0), "batch_size is 0"),
        (lambda: fl.data.gaussian_images(num_examples=-1), "num_examples is -1"),
    ],
)
def test_refuses_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
