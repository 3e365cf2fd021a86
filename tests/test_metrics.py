"""Metrics against scikit-learn and NumPy, however the examples are split into batches."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

import fedjax_lite as fl

ROWS, LENGTH, CLASSES, DOMAINS = 37, 5, 6, 3
RNG = np.random.default_rng(0)
EXAMPLES = {
    "logits": RNG.normal(size=(ROWS, CLASSES)).astype(np.float32),
    "y": RNG.integers(0, CLASSES, ROWS).astype(np.int32),
    "tokens": RNG.normal(size=(ROWS, LENGTH, CLASSES)).astype(np.float32),
    "token": RNG.integers(0, CLASSES, (ROWS, LENGTH)).astype(np.int32),
    # Ties, and scores beyond the bins.
    "score": RNG.choice([-99.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 99.0], ROWS).astype(np.float32),
    "binary": RNG.integers(0, 2, ROWS).astype(np.int32),
    "predicted": RNG.normal(size=ROWS).astype(np.float32),
    "target": RNG.normal(7.0, 2.0, size=ROWS).astype(np.float32),
    "domain": RNG.integers(0, DOMAINS - 1, ROWS).astype(np.int32),  # nobody in the last one
    "tags": RNG.random((ROWS, CLASSES)) < 0.3,
}
LOG_LIKELIHOODS = scipy.special.log_softmax(EXAMPLES["tokens"].astype(np.float64), -1)


def accuracy_by_domain():
    hits = EXAMPLES["logits"].argmax(-1) == EXAMPLES["y"]
    return [hits[EXAMPLES["domain"] == d].mean() for d in range(DOMAINS - 1)] + [np.nan]


def token_mean(values, ignore):
    return values[~np.isin(EXAMPLES["token"], ignore)].mean()


def token_losses():
    rows, columns = np.indices((ROWS, LENGTH))
    return -LOG_LIKELIHOODS[rows, columns, EXAMPLES["token"]]


def never(classes):
    scores = EXAMPLES["tokens"].copy()
    scores[..., classes] = -np.inf
    return scores.argmax(-1) == EXAMPLES["token"]


sk = sklearn.metrics
every = range(CLASSES)
# Of each: the metric, the name of its predictions, the independent result.
CASES = {
    "mean": (
        fl.metrics.mean(lambda p, batch: p.max(-1) * batch["target"]),
        "logits",
        lambda e: (e["logits"].max(-1) * e["target"]).mean(),
    ),
    "accuracy": (
        fl.metrics.accuracy(),
        "logits",
        lambda e: sk.accuracy_score(e["y"], e["logits"].argmax(-1)),
    ),
    "recall_at": (
        fl.metrics.recall_at(2, "tags"),
        "logits",
        lambda e: (
            sum(e["tags"][i, best].sum() for i, best in enumerate(np.argsort(-e["logits"])[:, :2]))
            / e["tags"].sum()
        ),
    ),
    "top_k": (
        fl.metrics.top_k(3),
        "logits",
        lambda e: sk.top_k_accuracy_score(e["y"], e["logits"], k=3, labels=every),
    ),
    "cross_entropy": (
        fl.metrics.cross_entropy(),
        "logits",
        lambda e: sk.log_loss(e["y"], scipy.special.softmax(e["logits"], -1), labels=every),
    ),
    "confusion_matrix": (
        fl.metrics.confusion_matrix(CLASSES),
        "logits",
        lambda e: sk.confusion_matrix(e["y"], e["logits"].argmax(-1), labels=every),
    ),
    "token accuracy": (
        fl.metrics.accuracy("token", ignore=[0]),
        "tokens",
        lambda e: token_mean(e["tokens"].argmax(-1) == e["token"], [0]),
    ),
    "token accuracy without the end and the unknown": (
        fl.metrics.accuracy("token", ignore=(0, 2, 5), barred=(0, 2, 5)),
        "tokens",
        lambda e: token_mean(never([0, 2, 5]), [0, 2, 5]),
    ),
    "token accuracy that misses the unknown": (
        fl.metrics.accuracy("token", ignore=(0,), barred=(5,)),
        "tokens",
        lambda e: token_mean(never([5]), [0]),
    ),
    "token top_k": (
        fl.metrics.top_k(1, "token", ignore=(0,), barred=(5,)),
        "tokens",
        lambda e: token_mean(never([5]), [0]),
    ),
    "token cross_entropy": (
        fl.metrics.cross_entropy("token", ignore=(0, 1)),
        "tokens",
        lambda e: token_mean(token_losses(), [0, 1]),
    ),
    "perplexity": (
        fl.metrics.perplexity("token", ignore=(0,)),
        "tokens",
        lambda e: np.exp(token_mean(token_losses(), [0])),
    ),
    "label_rate": (
        fl.metrics.label_rate((4, 5), "token", ignore=(0,)),
        "tokens",
        lambda e: token_mean(e["token"] >= 4, [0]),
    ),
    "by_domain": (fl.metrics.by_domain(fl.metrics.accuracy(), DOMAINS), "logits", None),
    "auc": (
        fl.metrics.auc("binary", low=-3.0, high=3.0, num_bins=60),
        "score",
        lambda e: sk.roc_auc_score(e["binary"], e["score"]),
    ),
    "mean_squared_error": (
        fl.metrics.mean_squared_error("target"),
        "predicted",
        lambda e: sk.mean_squared_error(e["target"], e["predicted"]),
    ),
    "root_mean_squared_error": (
        fl.metrics.root_mean_squared_error("target"),
        "predicted",
        lambda e: sk.root_mean_squared_error(e["target"], e["predicted"]),
    ),
    "mean_absolute_error": (
        fl.metrics.mean_absolute_error("target"),
        "predicted",
        lambda e: sk.mean_absolute_error(e["target"], e["predicted"]),
    ),
    "r_squared": (
        fl.metrics.r_squared("target", center=6.0),
        "predicted",
        lambda e: sk.r2_score(e["target"], e["predicted"]),
    ),
}
CASES["by_domain"] = (*CASES["by_domain"][:2], lambda e: accuracy_by_domain())


@functools.cache
def compiled(name):
    """The sums of each of several batches `[batches, capacity, ...]`, and the result of all."""
    metric, predictions, _ = CASES[name]

    @jax.jit
    def measure(batches):
        sums = jax.vmap(lambda batch: metric.from_batch(batch[predictions], batch))(batches)
        num_batches = batches["mask"].shape[0]
        each = [jax.tree.map(operator.itemgetter(i), sums) for i in range(num_batches)]
        return sums, metric.result(functools.reduce(metric.merge, each))

    return lambda batches: jax.device_get(measure(batches))


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_split_with_any_padding_gives_the_independent_result(name, data):
    reference = CASES[name][2]
    capacity = data.draw(st.sampled_from([ROWS, 50]))
    owner = np.array(data.draw(st.lists(st.integers(0, 3), min_size=ROWS, max_size=ROWS)))
    batches = {"mask": np.zeros((4, capacity), bool)}
    for feature, values in EXAMPLES.items():
        padding = np.nan if values.dtype == np.float32 else -(2**31)
        batches[feature] = np.full((4, capacity, *values.shape[1:]), padding, values.dtype)
    for i in range(4):
        rows = np.flatnonzero(owner == i)
        places = np.sort(np.random.default_rng(i).permutation(capacity)[: rows.size])
        batches["mask"][i, places] = True
        for feature, values in EXAMPLES.items():
            batches[feature][i, places] = values[rows]
    sums, result = compiled(name)(batches)
    for i in set(range(4)) - set(owner):
        assert not any(np.any(leaf[i]) for leaf in jax.tree.leaves(sums))
    np.testing.assert_allclose(result, reference(EXAMPLES), rtol=2e-6, atol=1e-7)


def batch_of(**features):
    arrays = {name: jnp.asarray(value) for name, value in features.items()}
    return {**arrays, "mask": np.ones(len(next(iter(arrays.values()))), bool)}


@functools.partial(jax.jit, static_argnums=0)
def measured(metric, predictions, batch):
    sums = metric.from_batch(predictions, batch)
    return sums, metric.result(sums)


@pytest.mark.parametrize("name", CASES)
def test_no_examples_are_not_a_number(name):
    batch = {**EXAMPLES, "mask": np.zeros(ROWS, bool)}
    _, result = compiled(name)({feature: np.stack([x] * 4) for feature, x in batch.items()})
    if name == "confusion_matrix":
        assert (result == 0).all()
    else:
        assert np.isnan(result).all()


def test_counts_stay_exact_where_float32_stands_still():
    batch = batch_of(y=[0, 1, 1])
    scores = np.eye(3, dtype=np.float32)
    for metric, expected in (
        (fl.metrics.accuracy(), 2**24 + 2),
        (fl.metrics.confusion_matrix(3), 2**24 + 1),
        (fl.metrics.auc(), 2**24 + 1),
    ):
        predictions = scores[:, 2] if metric is fl.metrics.auc() else scores
        sums, _ = jax.device_get(measured(metric, predictions, batch))
        before = jax.tree.map(lambda x: np.full_like(x, 2**24), sums)
        after = jax.tree.map(np.add, before, sums)
        assert expected in [int(x.max()) for x in jax.tree.leaves(after)]
        assert all(x.dtype == np.uint32 for x in jax.tree.leaves(after))


def test_the_error_of_binned_scores_is_within_its_bound():
    rng = np.random.default_rng(1)
    scores, labels = rng.normal(size=400).astype(np.float32), rng.integers(0, 2, 400)
    errors, bounds = [], []
    for num_bins in (10, 100, 100_000):
        metric = fl.metrics.auc(low=-4.0, high=4.0, num_bins=num_bins)
        sums, area = jax.device_get(measured(metric, scores, batch_of(y=labels)))
        n, p = np.asarray(sums["counts"], float)
        bounds.append((p * n).sum() / (2 * p.sum() * n.sum()))
        errors.append(abs(area - sk.roc_auc_score(labels, scores)))
    assert np.all(np.array(errors) <= np.array(bounds) + 1e-6)
    assert bounds[0] > 10 * bounds[2]
    _, two = measured(metric, np.stack([-scores, scores], 1) / 2, batch_of(y=labels))
    np.testing.assert_allclose(two, sk.roc_auc_score(labels, scores), atol=1e-5)


@pytest.mark.parametrize(
    ("metric", "predictions", "batch"),
    [
        (fl.metrics.cross_entropy(), np.zeros((2, 3), np.float32), batch_of(y=[0, 3])),
        (fl.metrics.cross_entropy(), np.zeros((2, 3), np.float32), batch_of(y=[0, -1])),
        (fl.metrics.confusion_matrix(3), np.zeros((2, 3), np.float32), batch_of(y=[0, 3])),
        (fl.metrics.confusion_matrix(3), np.zeros((2, 3), np.float32), batch_of(y=[0, -1])),
        (fl.metrics.auc(), np.zeros(3, np.float32), batch_of(y=[0, 1, 2])),
        (fl.metrics.auc(), np.array([0.0, 1.0, np.nan], np.float32), batch_of(y=[0, 1, 1])),
        (
            fl.metrics.by_domain(fl.metrics.accuracy(), 2),
            np.zeros((2, 3), np.float32),
            batch_of(y=[0, 1], domain=[0, 2]),
        ),
    ],
)
def test_what_is_out_of_range_is_not_passed_over(metric, predictions, batch):
    assert np.isnan(measured(metric, predictions, batch)[1]).all()


def test_equal_arguments_give_the_same_metric():
    assert fl.metrics.accuracy(ignore=[0]) is fl.metrics.accuracy(ignore=(0,))
    assert fl.metrics.by_domain(fl.metrics.auc(), 2) is fl.metrics.by_domain(fl.metrics.auc(), 2)
    assert fl.metrics.accuracy() is not fl.metrics.accuracy("z")


@pytest.mark.parametrize(
    ("metric", "predictions", "batch", "message"),
    [
        (lambda: fl.metrics.top_k(0), None, None, "k is 0; choose an integer at least 1"),
        (lambda: fl.metrics.top_k(4), np.zeros((2, 3), np.float32), batch_of(y=[0, 1]), "k is 4"),
        (lambda: fl.metrics.auc(low=1, high=1), None, None, "low is 1 and high 1; choose"),
        (
            fl.metrics.auc,
            np.zeros((2, 3), np.float32),
            batch_of(y=[0, 1]),
            r"'y' has shape \(2,\) beside",
        ),
        (
            fl.metrics.accuracy,
            np.zeros((2, 3), np.float32),
            batch_of(y=[[0], [1]]),
            "pass integer labels",
        ),
        (
            fl.metrics.accuracy,
            np.zeros((2, 3), np.float32),
            batch_of(y=[0.0, 1.0]),
            "and dtype float32",
        ),
        (
            fl.metrics.mean_squared_error,
            np.zeros((2, 2), np.float32),
            batch_of(y=[0.0, 1.0]),
            r"has shape \(2,\) beside predictions of shape \(2, 2\); give both",
        ),
        (
            lambda: fl.metrics.mean(lambda p, batch: p.mean()),
            np.zeros((2, 2), np.float32),
            batch_of(y=[0, 1]),
            r"function of fl.metrics.mean returned values of shape \(\)",
        ),
        (
            lambda: fl.metrics.confusion_matrix(4),
            np.zeros((2, 3), np.float32),
            batch_of(y=[0, 1]),
            "num_classes is 4, but predictions have",
        ),
        (lambda: fl.metrics.by_domain(fl.metrics.auc(), 0), None, None, "num_domains is 0"),
    ],
)
def test_wrong_arguments_are_refused(metric, predictions, batch, message):
    with pytest.raises(ValueError, match=message):
        metric().from_batch(predictions, batch)


def test_trailing_axis_of_a_regression_does_not_broadcast():
    metric = fl.metrics.mean_squared_error()
    batch = batch_of(y=[1.0, 3.0])
    # Broadcast to [2, 2], it would be (0 + 16 + 4 + 4) / 4.
    _, error = measured(metric, np.array([[1.0], [5.0]], np.float32), batch)
    assert error == (0 + 4) / 2
