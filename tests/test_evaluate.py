"""Evaluation: exact whatever the batches and the layout, and after fine-tuning as in PyTorch."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import SIZES, everyone, regression_dataset

import fedjax_lite as fl

eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
CLASSES = 3
METRICS = {
    "accuracy": fl.metrics.accuracy(),
    "cross_entropy": fl.metrics.cross_entropy(),
    "confusion": fl.metrics.confusion_matrix(CLASSES),
}


@functools.cache
def classifier():
    def predict(params, batch):
        return batch["x"] @ params["w"] + params["b"]

    def loss(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(predict(params, batch), batch["y"])

    return fl.function_model(loss, predict=predict)


def labelled(sizes=SIZES, seed=0):
    dataset = regression_dataset(sizes, seed)
    return dataset.map(
        lambda e: {"x": e["x"], "y": np.digitize(e["y"], [-0.5, 0.5]).astype(np.int32)}
    )


@functools.cache
def start():
    rng = np.random.default_rng(5)
    params = {"w": rng.normal(size=(3, CLASSES)), "b": rng.normal(size=CLASSES)}
    return fl.fed_sgd(classifier(), optax.sgd(0.1), mesh=fl.clients_mesh(1)).init(
        jax.tree.map(jnp.float32, params)
    )


def on(state, num_devices):
    return fl.replicate(jax.device_get(state), fl.clients_mesh(num_devices))


def expected_of(params, examples):
    """Accuracy, cross-entropy and confusion matrix in NumPy."""
    w, b = (np.asarray(params[name], np.float64) for name in ("w", "b"))
    logits, y = examples["x"].astype(np.float64) @ w + b, examples["y"]
    confusion = np.zeros((CLASSES, CLASSES))
    np.add.at(confusion, (y, logits.argmax(-1)), 1)
    loss = np.log(np.exp(logits).sum(-1)) - logits[np.arange(y.size), y]
    with np.errstate(invalid="ignore"):
        return {
            "accuracy": np.float64(np.trace(confusion)) / y.size,
            "cross_entropy": loss.sum() / np.float64(y.size),
            "confusion": confusion,
        }


def close(actual, desired, rtol=2e-6):
    assert set(actual) == set(desired)
    for name, value in desired.items():
        np.testing.assert_allclose(actual[name], value, rtol=rtol, atol=1e-7, err_msg=name)


@eight_devices
@pytest.mark.parametrize("num_devices", [1, 4, 8])
@pytest.mark.parametrize("batch_size", [1, 7, 12, 48, 49, 1024])
def test_evaluation_is_exact_whatever_the_batches_and_the_devices(batch_size, num_devices):
    examples = labelled().examples
    assert examples["y"].size == 49
    result = fl.evaluate(
        classifier(),
        on(start(), num_devices),
        examples,
        metrics=METRICS,
        batch_size=batch_size,
        mesh=fl.clients_mesh(num_devices),
    )
    close(result, expected_of(start().params, examples))


def test_without_metrics_it_is_the_means_of_those_of_the_model():
    examples = labelled().examples
    for batch_size in (5, 1024):
        result = fl.evaluate(classifier(), on(start(), 8), examples, batch_size=batch_size)
        expected = expected_of(start().params, examples)["cross_entropy"]
        close(result, {"loss": expected})


@eight_devices
def test_evaluation_maps_scans_and_differentiates():
    examples, mesh = labelled().examples, fl.clients_mesh(4)
    state = on(start(), 4)

    def loss(scale, batch_size):
        scaled = dataclasses.replace(state, params=jax.tree.map(lambda x: scale * x, state.params))
        return fl.evaluate(classifier(), scaled, examples, batch_size=batch_size, mesh=mesh)["loss"]

    scales = jnp.array([0.5, 1.0, 2.0])
    whole = jax.jit(jax.vmap(jax.value_and_grad(functools.partial(loss, batch_size=49))))(scales)
    parts = jax.jit(jax.vmap(jax.value_and_grad(functools.partial(loss, batch_size=5))))(scales)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    _, scanned = jax.lax.scan(lambda _, x: (None, loss(x, 5)), None, scales)
    np.testing.assert_allclose(scanned, whole[0], rtol=1e-5)


@pytest.mark.parametrize("batch_size", [5, 1024])
def test_it_compiles_once(batch_size):
    traces = []

    def predict(params, batch):
        traces.append(1)
        return batch["x"] @ params["w"] + params["b"]

    model = fl.function_model(lambda params, batch: batch["y"], predict=predict)
    examples, state = labelled().examples, on(start(), 8)
    seen = []
    for scale in (1.0, 2.0, 3.0):
        metrics = {"accuracy": fl.metrics.accuracy(), "top": fl.metrics.top_k(2)}
        params = jax.tree.map(functools.partial(jnp.multiply, scale), state.params)
        scaled = dataclasses.replace(state, params=params)
        fl.evaluate(model, scaled, examples, metrics=metrics, batch_size=batch_size)
        population = labelled().resident()
        fl.evaluate_clients(model, scaled, everyone(population), metrics=metrics)
        seen.append(len(traces))
    assert seen[0] == seen[1] == seen[2] > 0


@pytest.mark.parametrize("rewrite", [False, True])
def test_convolutions_are_rewritten_in_all_that_a_client_runs(rewrite):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 2, 4, 4)).astype(np.float32)  # channels first: rewriting shows
    conv = lambda w, x: jax.lax.conv(x, w, (1, 1), "VALID").mean((2, 3))
    loss = lambda w, batch: (conv(w, batch["x"]) ** 2).sum(-1)
    model = fl.function_model(loss, predict=lambda w, batch: conv(w, batch["x"]))
    dataset = fl.FederatedDataset.from_clients({"a": {"x": x[:12]}, "b": {"x": x[12:]}})
    metrics = {"square": fl.metrics.mean(lambda p, batch: (p**2).sum(-1))}
    mesh = fl.clients_mesh(1)
    state = fl.fed_sgd(model, optax.sgd(0.1), mesh=mesh).init(np.ones((2, 2, 3, 3), np.float32))
    cohort = everyone(dataset.resident(mesh))
    options = {"metrics": metrics, "mesh": mesh, "rewrite_convolutions": rewrite}

    def run(state):
        central = fl.evaluate(model, state, dataset.examples, batch_size=8, **options)
        tuned = fl.evaluate_fine_tuned(
            model, state, cohort, cohort, SGD, key=jax.random.key(0), **options
        )
        return central["square"], fl.evaluate_clients(model, state, cohort, **options), tuned

    text = str(jax.make_jaxpr(run)(state))
    assert text.count("conv_general_dilated") > 4
    first = "rhs_spec=(1, 0, 2, 3)", "lhs_spec=(0, 1, 2, 3)"
    channels_first = sum(text.count(spec) for spec in first)
    assert (channels_first == 0) == rewrite
    central, by_client, (before, after) = jax.jit(run)(state)
    expected = np.mean(jax.jit(loss)(state.params, {"x": x}))
    for value in (central, by_client.pooled["square"], before.pooled["square"]):
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert after.pooled["square"] < before.pooled["square"]


SGD = optax.sgd(0.3, momentum=0.5)


@eight_devices
@settings(max_examples=8, deadline=None)
@given(
    ends=st.lists(st.integers(0, 49), min_size=6, max_size=6),
    present=st.lists(
        st.integers(-1, 6), min_size=7, max_size=7, unique_by=lambda i: i + 100 * (i < 0)
    ),
    layout=st.sampled_from([(1, 1), (1, 3), (4, 1), (8, 3)]),
    batch_size=st.sampled_from([4, 32]),
)
def test_clients_are_evaluated_as_one_by_one(ends, present, layout, batch_size):
    num_devices, lanes = layout
    mesh = fl.clients_mesh(num_devices)
    examples = labelled().examples
    parts = np.split(np.arange(49), np.sort(ends))
    dataset = fl.FederatedDataset.from_rows(examples, parts)
    cohort = fl.cohort_of(dataset.resident(mesh), present)
    result = fl.evaluate_clients(
        classifier(),
        on(start(), num_devices),
        cohort,
        metrics=METRICS,
        batch_size=batch_size,
        lanes=lanes,
        mesh=mesh,
    )
    result, params = jax.device_get((result, start().params))
    sizes = [parts[i].size if i >= 0 else 0 for i in present]
    np.testing.assert_array_equal(result.num_examples, sizes)
    for slot, i in enumerate(present):
        rows = parts[i] if i >= 0 else []
        own = expected_of(params, {name: x[rows] for name, x in examples.items()})
        close({name: x[slot] for name, x in result.clients.items()}, own)
    rows = np.concatenate([parts[i] for i in present if i >= 0] or [[]]).astype(int)
    close(result.pooled, expected_of(params, {name: x[rows] for name, x in examples.items()}))


def test_what_strangers_hold_never_enters():
    examples = {name: x.copy() for name, x in labelled().examples.items()}
    offsets = np.cumsum((0, *SIZES))
    for i in range(0, len(SIZES), 2):
        examples["x"][offsets[i] : offsets[i + 1]] = np.nan
    parts = [np.arange(*offsets[i : i + 2]) for i in range(len(SIZES))]
    dataset = fl.FederatedDataset.from_rows(examples, parts)
    others = list(range(1, len(SIZES), 2))
    cohort = fl.cohort_of(dataset.resident(), others)
    result = fl.evaluate_clients(classifier(), on(start(), 8), cohort, metrics=METRICS)
    _, after = tune(start(), cohort, cohort, 8, 1)
    for evaluation in (result, after):
        assert np.isfinite(evaluation.pooled["cross_entropy"])
        missing = np.array(SIZES)[others] == 0
        np.testing.assert_array_equal(np.isnan(evaluation.clients["accuracy"]), missing)


def test_generated_clients_are_evaluated_on_what_they_draw():
    population = fl.data.halfspace(num_clients=5)
    model = fl.models.halfspace_classifier()
    state = fl.fed_sgd(model, optax.sgd(0.1)).init(jax.random.key(1))
    cohort = fl.cohort(jax.random.key(2), population, 3)
    first = fl.evaluate_clients(model, state, cohort, key=jax.random.key(3))
    again = fl.evaluate_clients(model, state, cohort, key=jax.random.key(3))
    other = fl.evaluate_clients(model, state, cohort, key=jax.random.key(4))
    np.testing.assert_array_equal(first.clients["loss"], again.clients["loss"])
    first, other = jax.device_get((first, other))
    assert (first.clients["loss"] != other.clients["loss"]).all()
    np.testing.assert_allclose(first.clients["loss"], other.clients["loss"], rtol=0.2)
    with pytest.raises(ValueError, match="key is None beside a cohort of generated clients"):
        fl.evaluate_clients(model, state, cohort)
    # Before fine-tuning with a learning rate of 0 and after it, the examples are the same.
    before, after = fl.evaluate_fine_tuned(
        model, state, cohort, cohort, optax.sgd(0.0), key=jax.random.key(5), num_steps=1
    )
    np.testing.assert_array_equal(before.clients["loss"], after.clients["loss"])


summarize = jax.jit(fl.summarize_clients)


@pytest.mark.parametrize("num_clients", [0, 1, 2, 9, 10, 11, 34])
def test_the_summary_of_clients_is_numpys(num_clients):
    rng = np.random.default_rng(num_clients)
    values, sizes = np.full(35, np.nan), np.zeros(35, int)
    present = rng.permutation(35)[:num_clients]
    values[present], sizes[present] = rng.normal(size=num_clients), rng.integers(1, 9, num_clients)
    summary = jax.device_get(summarize(values, sizes))
    own, weights = np.sort(values[sizes > 0]), sizes[sizes > 0]
    assert summary.pop("num_clients") == own.size
    if own.size == 0:
        assert all(map(np.isnan, summary.values()))
        return
    tenth = int(np.ceil(own.size / 10))
    expected = {
        "mean": own.mean(),
        "weighted_mean": np.average(values[sizes > 0], weights=weights),
        "std": own.std(),
        "median": np.median(own),
        **{f"quantile_{q:02d}": np.quantile(own, q / 100) for q in (5, 25, 75, 95)},
        "lowest_tenth": own[:tenth].mean(),
        "highest_tenth": own[-tenth:].mean(),
    }
    close(summary, expected, rtol=2e-5)


def test_a_summary_does_not_leave_out_a_client_that_diverged():
    values, sizes = np.full(35, np.nan), np.zeros(35, int)
    values[4], sizes[[4, 8]] = 1, 1
    summary = jax.device_get(summarize(values, sizes))
    assert summary.pop("num_clients") == 2
    assert all(map(np.isnan, summary.values()))
    with pytest.raises(ValueError, match=r"values has shape \(2, 1\) and num_examples \(2,\)"):
        fl.summarize_clients([[1.0], [1.0]], [1, 1])


def tune(state, train, held_out, num_devices, lanes, **options):
    return fl.evaluate_fine_tuned(
        classifier(),
        on(state, num_devices),
        train,
        held_out,
        SGD,
        key=jax.random.key(0),
        batch_size=4,
        shuffle=False,
        metrics=METRICS,
        lanes=lanes,
        mesh=fl.clients_mesh(num_devices),
        **options,
    )


def torch_fine_tuned(params, examples, num_epochs):
    """The params after SGD with momentum on batches of 4, in the order of the examples."""
    w, b = (torch.tensor(np.asarray(params[name], np.float64)) for name in ("w", "b"))
    optimizer = torch.optim.SGD([w.requires_grad_(), b.requires_grad_()], lr=0.3, momentum=0.5)
    x, y = torch.tensor(examples["x"].astype(np.float64)), torch.tensor(examples["y"]).long()
    for _ in range(num_epochs):
        for first in range(0, y.numel(), 4):
            optimizer.zero_grad()
            rows = slice(first, first + 4)
            torch.nn.functional.cross_entropy(x[rows] @ w + b, y[rows]).backward()
            optimizer.step()
    return {"w": w.detach().numpy(), "b": b.detach().numpy()}


@eight_devices
@pytest.mark.parametrize("num_devices", [1, 4, 8])
@pytest.mark.parametrize("lanes", [1, 3])
def test_fine_tuning_is_that_of_torch(num_devices, lanes):
    mesh = fl.clients_mesh(num_devices)
    train, held_out = labelled(), labelled(sizes=(3, 4, 40, 0, 5, 1, 2, 33, 4, 6), seed=1)
    order = [4, -1, 2, 1, 3, 0, 9, 7]
    cohorts = [fl.cohort_of(dataset.resident(mesh), order) for dataset in (train, held_out)]
    found = tune(start(), *cohorts, num_devices, lanes, num_epochs=2)
    (before, after), params = jax.device_get((found, start().params))
    total = 0
    for slot, i in enumerate(order):
        # Client 1 has nothing to train on, client 3 nothing to be evaluated on.
        used = i in (0, 2, 4, 7, 9)
        own = held_out[i] if used else {"x": np.zeros((0, 3)), "y": np.zeros(0, int)}
        tuned = torch_fine_tuned(params, train[i], 2) if used else params
        for evaluation, expected in ((before, params), (after, tuned)):
            assert evaluation.num_examples[slot] == own["y"].size
            actual = {name: x[slot] for name, x in evaluation.clients.items()}
            close(actual, expected_of(expected, own), rtol=1e-5)
        total += expected_of(tuned, own)["confusion"]
    np.testing.assert_array_equal(after.pooled["confusion"], total)
    np.testing.assert_allclose(after.pooled["accuracy"], np.trace(total) / total.sum(), rtol=1e-6)
    assert (before.clients["cross_entropy"] != after.clients["cross_entropy"]).any()


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train, mask=None):
        mask = None if mask is None else mask[:, None]
        return nn.Dense(CLASSES)(
            nn.BatchNorm(use_running_average=not train, momentum=0.5)(x, mask=mask)
        )


def test_fine_tuning_adapts_batch_statistics_as_a_round_does():
    model = fl.linen_model(
        Normalised(),
        jnp.zeros((1, 3)),
        lambda p, batch: optax.softmax_cross_entropy_with_integer_labels(p, batch["y"]),
    )
    population = labelled().resident()
    algorithm = fl.fed_avg(model, SGD, num_steps=3, shuffle=False)
    state = algorithm.init(jax.random.key(0))
    alone = fl.cohort_of(population, [3])
    _, after = fl.evaluate_fine_tuned(
        model, state, alone, alone, SGD, key=jax.random.key(1), num_steps=3, shuffle=False
    )
    tuned, _ = algorithm.round(jax.random.key(1), state, alone)
    expected = fl.evaluate_clients(model, tuned, alone)
    np.testing.assert_allclose(after.clients["loss"], expected.clients["loss"], rtol=1e-5)


def test_cohorts_of_different_clients_are_refused():
    population = labelled().resident()
    first, second = (fl.cohort_of(population, ids) for ids in ([0, 2], [0, 3]))
    with pytest.raises(ValueError, match=r"train_cohort has the clients \[0 2\] of 10 and"):
        tune(start(), first, second, 8, 1)
    smaller = labelled(sizes=(3, 4, 5)).resident()
    with pytest.raises(ValueError, match=r"held_out_cohort \[0 2\] of 3; pass cohorts of the same"):
        tune(start(), first, fl.cohort_of(smaller, [0, 2]), 8, 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metrics": METRICS}, ValueError, r"'confusion'\] for a model without predictions; pass"),
        ({"metrics": {"a": max}}, TypeError, r"metrics\['a'\] is <.*fl.metrics.mean\(function\)"),
        ({"metrics": {}}, TypeError, "metrics is {}; pass a non-empty dict"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
    ],
)
def test_wrong_arguments_are_refused(options, error, message):
    model = fl.function_model(lambda params, batch: batch["x"] @ params["w"])
    with pytest.raises(error, match=message):
        fl.evaluate(model, start(), labelled().examples, **options)
    with pytest.raises(error, match=message):
        fl.evaluate_clients(model, start(), everyone(labelled().resident()), **options)


def test_a_missing_label_is_named():
    with pytest.raises(KeyError, match="The model was given a batch with 'x', 'mask'"):
        fl.evaluate(classifier(), start(), {"x": jnp.ones((2, 3))}, metrics=METRICS)


def test_labels_outside_of_the_classes_are_refused():
    model = fl.models.mlp((2,), (), 3)
    state = fl.fed_sgd(model, optax.sgd(1.0)).init(jax.random.key(0))
    examples = {"x": np.zeros((4, 2), np.float32), "y": np.array([1, 2, 3, -1])}
    with pytest.raises(
        ValueError, match=r"y holds the labels -1, 3, and the model knows 3 classes"
    ):
        fl.evaluate(model, state, examples)


def test_clients_may_keep_what_the_server_has_not():
    """As in FedPer: the server keeps the body, each client its head, in a store."""
    sizes = (3, 0, 5, 2)
    dataset = regression_dataset(sizes)
    heads = np.arange(4, dtype=np.float32)
    body = np.array([1.0, -1.0, 2.0], np.float32)
    model = fl.function_model(
        lambda params, batch: (batch["x"] @ params["body"] * params["head"] - batch["y"]) ** 2
    )
    state = fl.ServerState(
        params={"body": jnp.asarray(body)},
        model_state={},
        opt_state=(),
        round=jnp.int32(0),
        store={"head": jnp.asarray(heads)},
    )
    result = fl.evaluate_clients(
        model,
        state,
        fl.cohort_of(dataset.resident(), np.arange(4)),
        client_model=lambda state, entry: ({**state.params, **entry}, {}),
    )
    losses = np.asarray(result.clients["loss"])
    for i in (0, 2, 3):
        one = dataset[i]
        expected = ((one["x"] @ body * heads[i] - one["y"]) ** 2).mean()
        np.testing.assert_allclose(losses[i], expected, rtol=1e-5)
