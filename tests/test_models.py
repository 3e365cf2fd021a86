import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import fedjax_lite as fl
from fedjax_lite.data.preprocess import BOS, EOS, NUM_SPECIAL, PAD
from fedjax_lite.models._tasks import sequence_loss, sequence_metrics
from fedjax_lite.models.convolutional import max_pool

eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
VOCABULARY = 12

# As published; that of the ResNet, which no source states for two groups, is that of batch norm,
# which has as many.
PARAMETERS = {
    "halfspace_classifier": (fl.models.halfspace_classifier, 3),
    "logistic": (lambda: fl.models.logistic((24, 24, 3), 100), 172_900),
    "emnist_dense": (fl.models.emnist_dense, 209_662),
    "emnist_cnn": (fl.models.emnist_cnn, 1_206_590),
    "cifar_cnn": (fl.models.cifar_cnn, 1_626_442),
    "mnist_cnn": (fl.models.mnist_cnn, 1_663_370),
    "lenet": (fl.models.lenet, 62_006),
    "lenet, MNIST": (lambda: fl.models.lenet((28, 28, 1)), 44_426),
    "resnet18": (fl.models.resnet18, 11_173_962),
    "shakespeare_lstm": (fl.models.shakespeare_lstm, 820_522),
    "stackoverflow_lstm": (fl.models.stackoverflow_lstm, 4_050_748),
    "stackoverflow_transformer": (fl.models.stackoverflow_transformer, 1_962_912),
}


def small_transformer(dropout_rate=0.0, layers=2):
    return fl.models.stackoverflow_transformer(
        VOCABULARY,
        embedding=8,
        layers=layers,
        num_heads=2,
        feed_forward=16,
        dropout_rate=dropout_rate,
    )


SMALL = {
    "mnist_cnn": fl.models.mnist_cnn,
    "lenet": lambda: fl.models.lenet((17, 16, 2), 3),
    "resnet18": lambda: fl.models.resnet18(3, input_shape=(9, 8, 2), width=4),
    "resnet18, batch norm": lambda: fl.models.resnet18(
        3, input_shape=(9, 8, 2), width=4, norm="batch"
    ),
    "shakespeare_lstm": lambda: fl.models.shakespeare_lstm(VOCABULARY, embedding=3, hidden=5),
    "stackoverflow_lstm": lambda: fl.models.stackoverflow_lstm(
        VOCABULARY, embedding=3, hidden=5, layers=2
    ),
    "stackoverflow_transformer": small_transformer,
}


@functools.cache
def small(name):
    return SMALL[name]()


def small_batch(name, seed=0):
    """Four examples, the last one all padding if they are sequences."""
    rng = np.random.default_rng(seed)
    shapes = {"mnist_cnn": (28, 28, 1), "lenet": (17, 16, 2), "resnet18": (9, 8, 2)}
    shape = shapes.get(name.partition(",")[0])
    if shape is not None:
        x, y = rng.normal(size=(4, *shape)).astype(np.float32), rng.integers(0, 3, 4)
    else:
        text = rng.integers(NUM_SPECIAL, VOCABULARY, (4, 8))
        text[:, 0], text[0, 5], text[2, 7] = BOS, EOS, EOS
        text[0, 6:], text[3, 1:] = PAD, PAD
        x, y = text[:, :-1], text[:, 1:]
    x = x.astype(np.int32) if x.dtype == int else x
    return {"x": x, "y": y.astype(np.int32), "mask": np.ones(4, bool)}


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_have_the_published_number_of_parameters(name):
    build, published = PARAMETERS[name]
    params, _ = jax.eval_shape(build().init, jax.random.key(0))
    assert sum(p.size for p in jax.tree.leaves(params)) == published


def test_a_resnet_has_as_many_parameters_with_either_norm():
    names = ("resnet18", "resnet18, batch norm")
    group, batch = (jax.eval_shape(small(name).init, jax.random.key(0))[0] for name in names)
    shapes = lambda params: {
        layer.replace("GroupNorm", "BatchNorm"): jax.tree.map(jnp.shape, leaves)
        for layer, leaves in params.items()
    }
    assert shapes(group) == shapes(batch)


def torch_convolutional(params, batch, *, padding, num_hidden):
    x = batch["x"].permute(0, 3, 1, 2)
    for i in range(2):
        layer = params[f"Conv_{i}"]
        kernel = layer["kernel"].permute(3, 2, 0, 1)
        x = F.max_pool2d(F.relu(F.conv2d(x, kernel, layer["bias"], padding=padding)), 2)
    x = x.permute(0, 2, 3, 1).flatten(1)
    for i in range(num_hidden):
        x = F.relu(x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"])
    last = params[f"Dense_{num_hidden}"]
    return x @ last["kernel"] + last["bias"]


def torch_resnet(params, batch, *, batch_norm):
    number = iter(range(20))

    def convolve(x, stride):
        i = next(number)
        kernel = params[f"Conv_{i}"]["kernel"].permute(3, 2, 0, 1)
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        if batch_norm:
            scale, bias = (params[f"BatchNorm_{i}"][leaf] for leaf in ("scale", "bias"))
            return F.batch_norm(x, None, None, scale, bias, training=True)
        scale, bias = (params[f"GroupNorm_{i}"][leaf] for leaf in ("scale", "bias"))
        return F.group_norm(x, 2, scale, bias)

    x = F.relu(convolve(batch["x"].permute(0, 3, 1, 2), 1))
    for stride in (1, 1, 2, 1, 2, 1, 2, 1):
        y = convolve(F.relu(convolve(x, stride)), 1)
        x = F.relu(y + (convolve(x, stride) if stride == 2 else x))
    return x.mean((2, 3)) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]


def torch_lstm(params, batch, *, project):
    x = params["Embed_0"]["embedding"][batch["x"]]
    for i in range(2):
        layer = params[f"_LSTM_{i}"]
        hidden = layer["recurrent_kernel"].shape[0]
        weights = {
            "weight_ih_l0": layer["input"]["kernel"].T,
            "weight_hh_l0": layer["recurrent_kernel"].T,
            "bias_ih_l0": layer["input"]["bias"],
            "bias_hh_l0": torch.zeros(4 * hidden),
        }
        lstm = torch.nn.LSTM(x.shape[-1], hidden, batch_first=True)
        x, _ = torch.func.functional_call(lstm, weights, (x,))
        if project:
            x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
    last = params["Dense_2" if project else "Dense_0"]
    return x @ last["kernel"] + last["bias"]


def torch_transformer(params, batch):
    embedding, length = params["Embed_0"]["embedding"], batch["x"].shape[1]
    angles = np.arange(length)[:, None] / 10_000 ** (np.arange(0, 8, 2) / 8)
    positions = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(length, 8)
    x = embedding[batch["x"]] * 8**0.5 + torch.tensor(positions, dtype=torch.float32)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    hidden = torch.nn.Transformer.generate_square_subsequent_mask(length)
    for i in range(2):
        own = params[f"_Layer_{i}"]
        attention = own["MultiHeadDotProductAttention_0"]
        parts = [attention[part] for part in ("query", "key", "value")]
        weights = {
            "self_attn.in_proj_weight": torch.cat([p["kernel"].reshape(8, 8).T for p in parts]),
            "self_attn.in_proj_bias": torch.cat([p["bias"].flatten() for p in parts]),
            "self_attn.out_proj.weight": attention["out"]["kernel"].reshape(8, 8).T,
            "self_attn.out_proj.bias": attention["out"]["bias"],
        }
        for j in range(2):
            weights |= {
                f"linear{j + 1}.weight": own[f"Dense_{j}"]["kernel"].T,
                f"linear{j + 1}.bias": own[f"Dense_{j}"]["bias"],
                f"norm{j + 1}.weight": own[f"LayerNorm_{j}"]["scale"],
                f"norm{j + 1}.bias": own[f"LayerNorm_{j}"]["bias"],
            }
        x = torch.func.functional_call(layer, weights, (x,), {"src_mask": hidden})
    return x @ embedding.T


TORCH = {
    "mnist_cnn": lambda *args: torch_convolutional(*args, padding=2, num_hidden=1),
    "lenet": lambda *args: torch_convolutional(*args, padding=0, num_hidden=2),
    "resnet18": lambda *args: torch_resnet(*args, batch_norm=False),
    "resnet18, batch norm": lambda *args: torch_resnet(*args, batch_norm=True),
    "shakespeare_lstm": lambda *args: torch_lstm(*args, project=False),
    "stackoverflow_lstm": lambda *args: torch_lstm(*args, project=True),
    "stackoverflow_transformer": torch_transformer,
}


def drawn(model):
    """Params unlike those at the start, where many are zero and logits all alike."""
    rng = np.random.default_rng(0)

    def draw(path, p):
        spread = 0.3 if p.ndim == 1 else np.prod(p.shape[:-1]) ** -0.5
        return ((path[-1].key == "scale") + spread * rng.normal(size=p.shape)).astype(p.dtype)

    params, model_state = jax.eval_shape(model.init, jax.random.key(0))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), model_state)
    return jax.tree.map_with_path(draw, params), zeros


@pytest.mark.parametrize("name", TORCH)
def test_losses_and_gradients_are_those_of_pytorch(name):
    model, batch = small(name), small_batch(name)
    params, model_state = drawn(model)

    def total(params):
        losses, _ = model.loss(params, model_state, batch, jax.random.key(0))
        return losses.sum(), losses

    with jax.default_matmul_precision("highest"):
        gradient, losses = jax.jit(jax.grad(total, has_aux=True))(params)

    theirs = jax.tree.map(lambda p: torch.tensor(np.array(p), requires_grad=True), params)
    features = {feature: torch.tensor(np.array(batch[feature])) for feature in ("x", "y")}
    y = features["y"].long()
    logits = TORCH[name](theirs, {**features, "y": y})
    if y.ndim == 1:
        expected = F.cross_entropy(logits, y, reduction="none")
    else:
        tokens = F.cross_entropy(logits.mT, y, ignore_index=PAD, reduction="none")
        expected = tokens.sum(1) / (y != PAD).sum(1).clamp(min=1)
    expected.sum().backward()
    np.testing.assert_allclose(losses, expected.detach(), rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda ours, p: np.testing.assert_allclose(ours, p.grad, rtol=1e-3, atol=1e-4),
        gradient,
        theirs,
    )


def test_padding_does_not_enter_the_statistics_of_a_resnet():
    model, batch = small("resnet18, batch norm"), small_batch("resnet18")
    params, model_state = drawn(model)
    loss = jax.jit(model.loss)
    losses, after = loss(params, model_state, batch, jax.random.key(0))
    padding = {"x": batch["x"] * np.nan, "y": batch["y"], "mask": np.zeros(4, bool)}
    padded = {feature: np.concatenate([batch[feature], padding[feature]]) for feature in batch}
    padded_losses, padded_after = loss(params, model_state, padded, jax.random.key(0))
    np.testing.assert_allclose(padded_losses[:4], losses, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), padded_after, after
    )
    assert jax.tree.structure(after) == jax.tree.structure(model_state)
    assert (after["batch_stats"]["BatchNorm_0"]["mean"] != 0).all()


def test_max_pool_leaves_out_what_is_over():
    x = np.arange(30.0).reshape(1, 5, 3, 2)
    pooled = max_pool(x)
    np.testing.assert_array_equal(pooled, x[:, 1:4:2, 1:2])  # Values rise along every axis.
    even = x[:, :4, :2]
    np.testing.assert_array_equal(pooled, nn.max_pool(even, (2, 2), (2, 2)))


def test_max_pool_has_the_derivatives_of_a_maximum():
    x = np.random.default_rng(0).integers(0, 3, (2, 6, 4, 3)).astype(np.float32)  # Ties.

    def by_reduction(x):
        return x.reshape(2, 3, 2, 2, 2, 3).max((2, 4))

    direction = np.arange(x.size / 4, dtype=np.float32).reshape(2, 3, 2, 3)
    tangent = np.arange(x.size, dtype=np.float32).reshape(x.shape)

    def derivatives(f):
        return jax.vjp(f, x)[1](direction), jax.jvp(f, (x,), (tangent,))

    result, expected = jax.jit(lambda: [derivatives(f) for f in (max_pool, by_reduction)])()
    jax.tree.map(np.testing.assert_allclose, result, expected)


def test_dropout_is_for_training_only():
    model = fl.models.emnist_cnn(3, dropout_rates=(0.5, 0.5))
    params, _ = drawn(model)
    batch = {
        "x": np.ones((2, 28, 28, 1), np.float32),
        "y": np.zeros(2, np.int32),
        "mask": np.ones(2, bool),
    }
    loss = jax.jit(model.loss)
    trained = [loss(params, {}, batch, jax.random.key(i))[0] for i in range(2)]
    assert (trained[0] != trained[1]).all()
    evaluated = jax.jit(model.metrics)(params, {}, batch)["loss"]
    without = jax.jit(fl.models.emnist_cnn(3, dropout_rates=(0.0, 0.0)).loss)
    np.testing.assert_allclose(evaluated, without(params, {}, batch, jax.random.key(0))[0])


def test_lstm_starts_as_in_keras():
    model = fl.models.shakespeare_lstm(VOCABULARY, embedding=64, hidden=16)
    params, _ = jax.jit(model.init)(jax.random.key(0))
    layer = params["_LSTM_0"]
    kernel = layer["recurrent_kernel"]
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(16), atol=1e-5)
    # Gates in the order input, forget, candidate, output.
    assert layer["input"]["bias"].reshape(4, 16).tolist() == [
        [0] * 16,
        [1] * 16,
        [0] * 16,
        [0] * 16,
    ]
    std = np.sqrt(2 / 64)  # He et al.: two over the number of inputs.
    deviation = layer["input"]["kernel"].std()
    # The variance of a sample of n normal variables has a standard error of sqrt(2/n).
    assert abs(deviation**2 / std**2 - 1) < 6 * np.sqrt(2 / layer["input"]["kernel"].size)
    embedding = params["Embed_0"]["embedding"]
    assert -0.05 <= embedding.min() < -0.04
    assert 0.04 < embedding.max() <= 0.05


@pytest.mark.parametrize("name", ["shakespeare_lstm", "stackoverflow_transformer"])
def test_what_follows_a_symbol_does_not_influence_its_loss(name):
    model, batch = small(name), small_batch("texts")
    params, _ = drawn(model)
    x, position = batch["x"][1], 3
    # Row t has another symbol at position t, and only the loss of one position counts.
    changed = np.where(np.eye(7, dtype=bool), (x - 2) % (VOCABULARY - 3) + 3, x)
    only = np.where(np.arange(7) == position, batch["y"][1], PAD)
    batch = {"x": np.vstack([x, changed]), "y": np.tile(only, (8, 1)), "mask": np.ones(8, bool)}
    losses = jax.device_get(jax.jit(model.loss)(params, {}, batch, jax.random.key(0))[0])
    np.testing.assert_allclose(losses[1 + position + 1 :], losses[0], rtol=1e-6)
    assert (abs(losses[1 : 1 + position + 1] - losses[0]) > 1e-5).all()


def test_a_sequence_of_padding_has_no_loss_and_no_gradient():
    logits = np.arange(30, dtype=np.float32).reshape(1, 5, 6)
    batch = {"y": np.zeros((1, 5), np.int32)}
    loss, gradient = jax.jit(jax.value_and_grad(lambda x: sequence_loss(x, batch).sum()))(logits)
    assert loss == 0
    assert not gradient.any()


def test_metrics_of_sequences():
    # Six ids: padding, begin, end, two known symbols, unknown.
    y = np.array([[3, 4, 5, EOS, PAD], [PAD] * 5])
    predicted = np.array([[3, 3, 5, EOS, PAD], [PAD] * 5])
    logits = (9 * np.eye(6)[predicted] + [0, 0, 0, 1, 2, 0]).astype(np.float32)
    # Second choices are 4, so the known symbols predicted are 3, 3, 4, 4.
    metrics = jax.jit(sequence_metrics)(logits, {"y": y})
    assert metrics["accuracy"].tolist() == [3 / 4, 0]
    np.testing.assert_allclose(metrics["accuracy_in_vocabulary"], [1 / 3, 0])
    uniform = jax.jit(sequence_loss)(np.zeros((2, 5, 6), np.float32), {"y": y})
    np.testing.assert_allclose(uniform, [np.log(6), 0])


LEARNING = {
    "shakespeare_lstm": SMALL["shakespeare_lstm"],
    "stackoverflow_lstm": lambda: fl.models.stackoverflow_lstm(VOCABULARY, embedding=8, hidden=16),
    "stackoverflow_transformer": lambda: small_transformer(0.05, layers=1),
}


def counting_texts():
    """Clients whose texts count up, round and round, from anywhere, to any length."""
    rng = np.random.default_rng(0)
    texts = np.zeros((40, 10), np.int32)
    for text, length in zip(texts, rng.integers(4, 11, 40), strict=True):
        text[:length] = (rng.integers(8) + np.arange(length)) % 8 + NUM_SPECIAL
    examples = {"x": texts[:, :-1], "y": texts[:, 1:]}
    return fl.FederatedDataset.from_rows(examples, np.split(np.arange(40), [3, 10, 11, 25]))


@eight_devices
@pytest.mark.parametrize(
    ("name", "rate"),
    [("shakespeare_lstm", 3.0), ("stackoverflow_lstm", 1.5), ("stackoverflow_transformer", 0.2)],
)
def test_language_models_learn_to_count_alike_on_any_layout(name, rate):
    # Dropout, too, must not depend on where a client runs.
    model = LEARNING[name]()
    dataset = counting_texts()

    def train(num_devices, lanes):
        mesh = fl.clients_mesh(num_devices)
        algorithm = fl.fed_avg(model, optax.sgd(rate), batch_size=4, lanes=lanes, mesh=mesh)
        population, state = dataset.resident(mesh), algorithm.init(jax.random.key(0))
        for r in range(20):
            yield state
            cohort = fl.cohort(jax.random.key(r), population, 5)
            state, _ = algorithm.round(jax.random.key(r), state, cohort)
        assert algorithm.round._cache_size() == 1
        yield state

    states = list(train(1, 2))
    other = list(itertools.islice(train(8, 1), 3))[-1]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        states[2].params,
        other.params,
    )
    evaluate = jax.jit(lambda state: fl.evaluate(model, state, dataset.examples))
    before, after = evaluate(states[0]), evaluate(states[-1])
    assert after["loss"] < before["loss"] / 2
    assert after["accuracy_in_vocabulary"] > 0.6


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: fl.models.mlp((2,), (), 1), "num_classes is 1; choose an integer at least 2"),
        (lambda: fl.models.lenet((15, 28, 1)), r"input_shape is \(15, 28, 1\); pass"),
        (lambda: fl.models.lenet((28, 28)), r"input_shape is \(28, 28\); pass"),
        (lambda: fl.models.resnet18(norm="layer"), "norm is 'layer'; choose one of 'group'"),
        (lambda: fl.models.resnet18(num_groups=3), "num_groups is 3, which does not divide wi"),
        (lambda: fl.models.shakespeare_lstm(4), "vocabulary_size is 4; choose an integer at l"),
        (lambda: fl.models.stackoverflow_lstm(layers=0), "layers is 0; choose an integer at l"),
        (
            lambda: fl.models.stackoverflow_transformer(num_heads=5),
            "num_heads is 5, which does not divide embedding 96",
        ),
    ],
)
def test_sizes_that_make_no_model_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
