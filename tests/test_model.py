import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from problems import everyone, regression_dataset, regression_model

import fedjax_lite as fl


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, *, train, mask=None):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x, mask=mask[:, None])
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(1)(x))


def squared(predictions, batch):
    return (predictions[:, 0] - batch["y"]) ** 2


@pytest.fixture(scope="module")
def population():
    return regression_dataset().resident(fl.clients_mesh(1))


def test_linen_model_carries_state_and_dropout():
    model = fl.linen_model(Normalised(), jnp.zeros((1, 3)), squared)
    params, model_state = model.init(jax.random.key(0))
    assert set(model_state) == {"batch_stats"}
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    batch = {"x": x, "y": np.ones(4), "mask": np.ones(4, bool)}
    loss, metrics = jax.jit(model.loss), jax.jit(model.metrics)
    first, after = loss(params, model_state, batch, jax.random.key(1))
    second, _ = loss(params, model_state, batch, jax.random.key(2))
    assert first.shape == (4,)
    mean = after["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, x.mean(0) / 2)  # momentum 0.5, from 0
    assert (first != second).any()  # another dropout mask
    evaluated = metrics(params, model_state, batch)
    np.testing.assert_array_equal(evaluated["loss"], metrics(params, model_state, batch)["loss"])


@pytest.mark.parametrize("batch_size", [20, 32, 128])
def test_padding_does_not_enter_batch_statistics(batch_size):
    model = fl.linen_model(Normalised(), jnp.zeros((1, 3)), squared)
    dataset = regression_dataset([20])
    algorithm = fl.fed_sgd(model, optax.sgd(0.1), batch_size=batch_size, mesh=fl.clients_mesh(1))
    cohort = everyone(dataset.resident(fl.clients_mesh(1)))
    state, _ = algorithm.round(jax.random.key(0), algorithm.init(jax.random.key(0)), cohort)
    mean = state.model_state["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, dataset.examples["x"].mean(0) / 2, rtol=1e-5)


def test_batch_norm_without_a_mask_is_refused():
    class Careless(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(x)

    with pytest.raises(ValueError, match=r"Careless has batch statistics, .* add mask=None"):
        fl.linen_model(Careless(), jnp.zeros((1, 3)), squared)


class BatchNormClassifier(nn.Module):
    @nn.compact
    def __call__(self, x, *, train, mask=None):
        mask = None if mask is None else mask[:, None]
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9)
        return nn.Dense(10)(nn.relu(norm(nn.Dense(32)(x), mask=mask)))


def cross_entropy(logits, batch):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def train_centrally(variables, examples, *, batch_size, num_epochs):
    """SGD on all examples in one place, in plain flax and optax."""
    module, optimizer, rng = BatchNormClassifier(), optax.sgd(0.3), np.random.default_rng(0)
    examples = jax.tree.map(jnp.asarray, examples)

    def step(carry, rows):
        variables, opt_state = carry
        batch = jax.tree.map(lambda x: x[rows], examples)

        def loss(params):
            logits, updated = module.apply(
                {**variables, "params": params}, batch["x"], train=True, mutable=["batch_stats"]
            )
            return cross_entropy(logits, batch).mean(), updated

        gradient, updated = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(gradient, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return ({"params": params, **updated}, opt_state), None

    rows = [rng.permutation(len(examples["y"])) for _ in range(num_epochs)]
    rows = np.concatenate(rows).reshape(-1, batch_size)
    carry = variables, optimizer.init(variables["params"])
    (variables, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, rows))(carry)
    return variables


def test_batch_norm_evaluates_as_well_as_when_trained_centrally():
    dataset, _ = fl.data.digits(num_clients=1)
    # Away from zero, where the statistics at the start would serve quite well; and in full
    # batches, since one of two examples can throw BatchNorm off wherever it is trained.
    examples = {"x": 1 + dataset.examples["x"][:1400], "y": dataset.examples["y"][:1400]}
    population = fl.FederatedDataset.from_arrays(examples, np.arange(1400) % 5)
    model = fl.linen_model(
        BatchNormClassifier(),
        jnp.zeros((1, 64)),
        cross_entropy,
        lambda logits, batch: {"accuracy": (logits.argmax(-1) == batch["y"]).astype(float)},
    )
    algorithm = fl.fed_avg(
        model, optax.sgd(0.3), batch_size=20, num_epochs=2, mesh=fl.clients_mesh(1)
    )
    cohort = everyone(population.resident(fl.clients_mesh(1)))
    state = start = algorithm.init(jax.random.key(0))
    for r in range(10):
        state, _ = algorithm.round(jax.random.key(r), state, cohort)

    def accuracy(params, model_state):
        evaluated = dataclasses.replace(state, params=params, model_state=model_state)
        return fl.evaluate(model, evaluated, examples)["accuracy"]

    variables = {"params": start.params, **start.model_state}
    central = train_centrally(variables, examples, batch_size=20, num_epochs=20)
    ours = accuracy(state.params, state.model_state)
    assert ours > accuracy(central["params"], {"batch_stats": central["batch_stats"]}) - 0.02
    assert ours > accuracy(state.params, start.model_state) + 0.3


def test_params_without_their_model_state_are_refused(population):
    model = fl.linen_model(Normalised(), jnp.zeros((1, 3)), squared)
    params, model_state = model.init(jax.random.key(0))
    algorithm = fl.fed_sgd(model, optax.sgd(0.1), mesh=fl.clients_mesh(1))
    cohort = fl.cohort(jax.random.key(0), population, 2)
    with pytest.raises(ValueError, match=r"model_state has the collections \[\], and the module"):
        algorithm.round(jax.random.key(0), algorithm.init(params), cohort)
    algorithm.round(jax.random.key(0), algorithm.init(params, model_state), cohort)


def test_a_counter_in_the_model_state_survives_the_mean(population):
    def loss(params, model_state, batch, key):
        return (batch["y"] - params) ** 2, {"steps": model_state["steps"] + 1}

    init = lambda key: (jnp.float32(0.0), {"steps": jnp.int32(0)})
    model = fl.Model(init, loss, lambda params, model_state, batch: {})
    algorithm = fl.fed_sgd(model, optax.sgd(0.1), mesh=fl.clients_mesh(1))
    state = algorithm.init(jax.random.key(0))
    for r in range(5):
        state, _ = algorithm.round(jax.random.key(r), state, everyone(population))
    assert state.model_state["steps"] == 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "build", [fl.fed_sgd, lambda m, o, **kw: fl.fed_avg(m, optax.sgd(0.1), o, **kw)]
)
def test_small_floats_keep_their_dtype_and_their_sums(build, dtype):
    model = fl.function_model(lambda w, batch: w * batch["x"].astype(w.dtype))
    clients = {i: {"x": np.ones(1000, np.float32)} for i in range(2)}
    population = fl.FederatedDataset.from_clients(clients).resident(fl.clients_mesh(1))
    algorithm = build(model, optax.adam(0.5), batch_size=1, mesh=fl.clients_mesh(1))
    state = algorithm.init(jnp.zeros((), dtype))
    _, info = algorithm.round(jax.random.key(0), state, everyone(population))
    if build is fl.fed_sgd:
        np.testing.assert_allclose(info.update_norm, 1.0, rtol=1e-3)

    def step(state, key):
        return algorithm.round(key, state, everyone(population))

    after, _ = jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(jax.random.key(0), 2)))(
        state
    )
    assert after.params.dtype == after.opt_state[0].mu.dtype == dtype


def test_padding_of_generated_batches_weighs_nothing_even_if_it_is_nan():
    def run(padding):
        sample = lambda key, client_id: {"x": jnp.where(jnp.arange(8) < 5, 1.0, padding)}
        population = fl.data.GeneratedPopulation(
            num_clients=3, num_examples=lambda key, client_id: jnp.int32(5), sample=sample
        )
        model = fl.function_model(lambda w, batch: (batch["x"] * w - 1) ** 2)
        algorithm = fl.fed_sgd(model, optax.sgd(0.1))
        cohort = fl.cohort(jax.random.key(0), population, 3)
        return algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.5)), cohort)[
            0
        ].params

    np.testing.assert_allclose(run(np.nan), 0.6, rtol=1e-6)  # 0.5 + 0.1 * 2 * 0.5


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_lanes_change_nothing_for_keys_of_any_kind(population, impl):
    def loss(params, batch):
        return (batch["y"] - params) ** 2

    def noisy(params, model_state, batch, key):
        return loss(params, batch) * jax.random.uniform(key), model_state

    model = fl.Model(lambda key: (jnp.float32(0.0), {}), noisy, lambda *args: {})
    results = []
    for lanes in (1, 3, 8):
        algorithm = fl.fed_sgd(model, optax.sgd(0.1), lanes=lanes, mesh=fl.clients_mesh(1))
        state = algorithm.init(jnp.float32(0.0))
        key = jax.random.key(0, impl=impl)
        results.append(algorithm.round(key, state, everyone(population))[0].params)
    np.testing.assert_allclose(results, results[0], rtol=1e-5)


def test_a_weight_function_computes_in_floats():
    clients = {i: {"y": np.ones(60_000, np.float32)} for i in range(2)}
    population = fl.FederatedDataset.from_clients(clients).resident(fl.clients_mesh(1))
    model = fl.function_model(lambda w, batch: (batch["y"] - w) ** 2)
    algorithm = fl.fed_sgd(
        model, optax.sgd(0.1), weighting=lambda n: n**2, batch_size=60_000, mesh=fl.clients_mesh(1)
    )
    _, info = algorithm.round(
        jax.random.key(0), algorithm.init(jnp.float32(0.0)), everyone(population)
    )
    np.testing.assert_allclose(info.clients["weight"], 3.6e9, rtol=1e-6)


def test_model_state_reaches_the_server_as_the_weighted_mean(population):
    def loss(params, model_state, batch, key):
        del key
        seen = jnp.where(batch["mask"], batch["y"], 0).sum()
        return (batch["y"] - params) ** 2, {"seen": model_state["seen"] + seen}

    init = lambda key: (jnp.float32(0.0), {"seen": jnp.float32(0.0)})
    model = fl.Model(init, loss, lambda params, model_state, batch: {})
    algorithm = fl.fed_sgd(model, optax.sgd(0.1), mesh=fl.clients_mesh(1), batch_size=4)
    state, _ = algorithm.round(
        jax.random.key(1), algorithm.init(jax.random.key(0)), everyone(population)
    )
    y, offsets = np.asarray(population.examples["y"]), np.asarray(population.offsets)
    totals = np.array([y[a:b].sum() for a, b in itertools.pairwise(offsets)])
    np.testing.assert_allclose(
        state.model_state["seen"], np.average(totals, weights=np.diff(offsets)), rtol=1e-5
    )


def test_halfspace_classifier_starts_as_pytorch_does():
    keys = jax.random.split(jax.random.key(0), 2000)
    params, _ = jax.vmap(fl.models.halfspace_classifier().init)(keys)
    for leaf in (params["weight"][:, 0], params["weight"][:, 1], params["bias"]):
        # Uniform within +-1/sqrt(2): variance 1/6, whose standard error is sqrt(4/45/4/2000).
        assert jnp.abs(leaf).max() < 2**-0.5
        assert abs(leaf.var() - 1 / 6) < 6 * np.sqrt((1 / 20 - 1 / 36) / 2000)
        assert abs(leaf.mean()) < 6 * np.sqrt(1 / 6 / 2000)


def test_halfspace_loss_is_stable_far_from_the_line():
    model = fl.models.halfspace_classifier()
    params = {"weight": jnp.array([1e4, 0.0]), "bias": jnp.float32(0.0)}
    batch = {"x": jnp.array([[1.0, 0.0], [-1.0, 0.0]]), "y": jnp.array([0.0, 1.0])}
    batch["mask"] = jnp.ones(2, bool)
    losses, _ = model.loss(params, {}, batch, jax.random.key(0))
    # A wrong answer costs |s|: 1e4 above zero, 0.2 * 1e4 below (PyTorch would clamp both to 100).
    np.testing.assert_allclose(losses, [1e4, 2e3])


def test_mlp_has_the_parameters_it_should():
    model = fl.models.mlp(input_shape=(8, 8), hidden=(32, 16), num_classes=10)
    params, _ = model.init(jax.random.key(0))
    assert sum(p.size for p in jax.tree.leaves(params)) == 65 * 32 + 33 * 16 + 17 * 10


def test_evaluate_averages_over_examples():
    model = regression_model()
    dataset = regression_dataset()
    algorithm = fl.fed_sgd(model, optax.sgd(0.1))
    state = algorithm.init({"w": jnp.zeros(3), "b": jnp.float32(0.0)})
    expected = (dataset.examples["y"] ** 2 / 2).mean()
    np.testing.assert_allclose(
        fl.evaluate(model, state, dataset.examples)["loss"], expected, rtol=1e-6
    )


BAD = {
    "reduction": (ValueError, "reduction is 'median'; choose one of 'mean', 'sum'"),
    "weighting": (ValueError, "weighting is 'size'; choose one of 'examples', 'uniform'"),
    "on_nonfinite": (ValueError, "on_nonfinite is 'raise'; choose one of 'drop', 'keep'"),
    "batch_size": (ValueError, "batch_size is 0; choose an integer at least 1"),
    "lanes": (TypeError, "lanes is 'many', of type str; pass an integer"),
}
VALUES = {
    "reduction": "median",
    "weighting": "size",
    "on_nonfinite": "raise",
    "batch_size": 0,
    "lanes": "many",
}


@pytest.mark.parametrize("option", BAD)
def test_fed_sgd_refuses_bad_options(option):
    error, message = BAD[option]
    with pytest.raises(error, match=message):
        fl.fed_sgd(regression_model(), optax.sgd(0.1), **{option: VALUES[option]})


def test_a_scalar_loss_is_refused(population):
    model = fl.function_model(lambda params, batch: ((batch["y"] - params) ** 2).mean())
    algorithm = fl.fed_sgd(model, optax.sgd(0.1))
    state = algorithm.init(jnp.float32(0.0))
    with pytest.raises(ValueError, match=r"model.loss returned values of shape \(\) for a batch"):
        algorithm.round(jax.random.key(0), state, fl.cohort(jax.random.key(0), population, 2))


MISSING = {
    "loss": lambda: fl.function_model(
        lambda params, batch: batch["z"] - params, lambda key: jnp.float32(0.0)
    ),
    "linen": lambda: fl.linen_model(nn.Dense(1), jnp.zeros((1, 3)), squared, inputs="z"),
    "nnx": lambda: fl.nnx_model(lambda rngs: nnx.Linear(3, 1, rngs=rngs), squared, inputs="z"),
}


@pytest.mark.parametrize("build", MISSING.values(), ids=MISSING)
def test_a_missing_feature_is_named_beside_those_there_are(population, build):
    model = build()
    message = (
        r"'z'\nThe model was given a batch with 'x', 'y', 'mask'. If 'z' should be a feature, add"
    )
    for algorithm in (fl.fed_sgd(model, optax.sgd(0.1)), fl.fed_avg(model, optax.sgd(0.1))):
        state = algorithm.init(jax.random.key(0))
        with pytest.raises(KeyError, match=message):
            algorithm.round(jax.random.key(0), state, fl.cohort(jax.random.key(0), population, 2))
    with pytest.raises(KeyError, match=message):
        fl.evaluate(model, state, regression_dataset().examples)


def test_labels_of_the_wrong_shape_are_refused(population):
    # [batch] minus [batch, 1] broadcasts to [batch, batch]: the field's favourite silent bug.
    model = fl.function_model(
        lambda params, batch: (batch["y"] - batch["x"] @ params[:, None]) ** 2
    )
    algorithm = fl.fed_sgd(model, optax.sgd(0.1), batch_size=8)
    state = algorithm.init(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"returned values of shape \(8, 8\) for a batch of 8"):
        algorithm.round(jax.random.key(0), state, fl.cohort(jax.random.key(0), population, 2))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (0, TypeError, r"params is 0, of type int; .* a typed key"),
        (np.zeros(2, np.uint32), TypeError, r"params has dtype uint32, .* jax.random.key\(0\)"),
        ({"w": "zero"}, TypeError, r"params\['w'\] is 'zero', of type str"),
        ({"w": None}, TypeError, r"params\['w'\] is None"),
        ({}, ValueError, "params is {}, without a single array"),
    ],
)
def test_params_that_are_not_arrays_are_refused(params, error, message):
    with pytest.raises(error, match=message):
        fl.fed_sgd(regression_model(), optax.sgd(0.1)).init(params)


def test_a_model_without_init_says_what_to_pass():
    model = fl.function_model(lambda params, batch: params * batch["y"])
    with pytest.raises(ValueError, match="built without an init function"):
        fl.fed_sgd(model, optax.sgd(0.1)).init(jax.random.key(0))


def test_a_batch_size_that_the_population_does_not_draw_is_refused():
    model = fl.models.halfspace_classifier()
    algorithm = fl.fed_sgd(model, optax.sgd(0.1), batch_size=10)
    cohort = fl.cohort(jax.random.key(0), fl.data.halfspace(), 2)
    with pytest.raises(
        ValueError, match="batch_size is 10, but the population draws batches of 1000"
    ):
        algorithm.round(jax.random.key(0), algorithm.init(jax.random.key(0)), cohort)


def test_a_mesh_without_a_clients_axis_is_refused():
    mesh = jax.make_mesh(
        (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1]
    )
    algorithm = fl.fed_sgd(regression_model(), optax.sgd(0.1), mesh=mesh)
    with pytest.raises(
        ValueError, match=r"mesh has the axes \('data',\) of types .*; pass one with"
    ):
        algorithm.init(jax.random.key(0))
    with pytest.raises(ValueError, match="num_devices is 0"):
        fl.clients_mesh(0)


@pytest.mark.parametrize(
    ("examples", "error", "message"),
    [
        ({"x": jnp.zeros((0, 3)), "y": jnp.zeros(0)}, ValueError, "examples has no rows"),
        ([1.0], TypeError, "examples is of type list; pass a non-empty dict"),
        ({}, TypeError, "examples is empty; pass a non-empty dict"),
    ],
)
def test_evaluate_refuses(examples, error, message):
    model = regression_model()
    state = fl.fed_sgd(model, optax.sgd(0.1)).init(jax.random.key(0))
    with pytest.raises(error, match=message):
        fl.evaluate(model, state, examples)


def test_wrong_kinds_of_arguments_are_refused(population):
    model = regression_model()
    with pytest.raises(TypeError, match="server_optimizer is of type float; pass a Gradient"):
        fl.fed_sgd(model, 0.1)
    with pytest.raises(TypeError, match=r"client_optimizer is of type float.*optax.sgd\(0.1\)"):
        fl.fed_avg(model, 0.1)
    with pytest.raises(TypeError, match=r"client_optimizer is <function sgd .*; call it"):
        fl.fed_avg(model, optax.sgd)
    with pytest.raises(TypeError, match=r"model is of type function; .*fl.function_model\(loss\)"):
        fl.fed_avg(model.loss, optax.sgd(0.1))
    algorithm = fl.fed_sgd(model, optax.sgd(0.1))
    state = algorithm.init(jax.random.key(0))
    with pytest.raises(TypeError, match="cohort is of type ResidentPopulation; pass a Cohort"):
        algorithm.round(jax.random.key(0), state, population)
    with pytest.raises(TypeError, match="state is of type dict; pass a ServerState"):
        fl.evaluate(model, state.params, {"x": jnp.ones((2, 3)), "y": jnp.ones(2)})
    with pytest.raises(ValueError, match=r'weighting is .* with reduction="sum"'):
        fl.fed_sgd(model, optax.sgd(0.1), reduction="sum", weighting="uniform")
    explicit = jax.make_mesh((1,), ("clients",), devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=r"of types .*Explicit.*; pass one with"):
        fl.fed_sgd(model, optax.sgd(0.1), mesh=explicit).init(jax.random.key(0))


def test_a_weight_function_must_return_a_scalar(population):
    algorithm = fl.fed_sgd(regression_model(), optax.sgd(0.1), weighting=lambda n: n[None])
    cohort = fl.cohort(jax.random.key(0), population, 2)
    with pytest.raises(ValueError, match=r"weighting returned is .*; return a scalar"):
        algorithm.round(jax.random.key(0), algorithm.init(jax.random.key(0)), cohort)


@pytest.mark.parametrize(
    ("loss", "optimizer", "error", "message"),
    [
        (
            lambda w, batch: batch["x"] @ w > batch["y"],
            optax.sgd(0.1),
            ValueError,
            "model.loss returned values of dtype bool",
        ),
        (
            lambda w, batch: batch["x"] @ w,
            lambda round: 0.1,
            TypeError,
            r"what client_optimizer\(round\) returned is of type float",
        ),
    ],
)
def test_what_functions_return_is_checked(loss, optimizer, error, message, population):
    algorithm = fl.fed_avg(fl.function_model(loss), optimizer)
    cohort = fl.cohort(jax.random.key(0), population, 2)
    with pytest.raises(error, match=message):
        algorithm.round(jax.random.key(0), algorithm.init(jnp.zeros(3)), cohort)


@pytest.mark.parametrize("mu", [-0.1, float("nan"), [1.0]])
def test_fed_prox_refuses_a_wrong_mu(mu):
    with pytest.raises(ValueError, match=r"mu is .*choose a number"):
        fl.fed_prox(fl.models.halfspace_classifier(), optax.sgd(0.1), mu=mu)


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, words, tags):
        return nn.Dense(1)(words) + nn.Embed(3, 1)(tags)


def test_modules_of_several_inputs():
    words, tags = jnp.ones((2, 4)), jnp.array([0, 2])
    batch = {"w": words, "t": tags, "mask": jnp.ones(2, bool)}
    loss = lambda predictions, batch: predictions[:, 0]
    in_order = fl.linen_model(TwoInputs(), (words, tags), loss, inputs=("w", "t"))
    by_name = fl.linen_model(
        TwoInputs(), {"tags": tags, "words": words}, loss, inputs={"words": "w", "tags": "t"}
    )
    params, _ = in_order.init(jax.random.key(0))
    expected = TwoInputs().apply({"params": params}, words, tags)
    for model in (in_order, by_name):
        jax.tree.map(np.testing.assert_array_equal, model.init(jax.random.key(0))[0], params)
        np.testing.assert_array_equal(model.predict(params, {}, batch), expected)
        np.testing.assert_array_equal(
            model.loss(params, {}, batch, jax.random.key(0))[0], expected[:, 0]
        )
    for example, inputs, message in (
        ((words,), ("w", "t"), r"names the features \['w', 't'\]; pass as example a tuple"),
        ((words, tags), {"words": "w", "tags": "t"}, r"arguments \['tags', 'words'\]; pass"),
        ((words, tags), "w", r"example is a tuple, and inputs one feature, 'w'"),
    ):
        with pytest.raises(ValueError, match=message):
            fl.linen_model(TwoInputs(), example, loss, inputs=inputs)


class Normalising(nn.Module):
    shape: tuple[int, ...] | None

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        mask = None if self.shape is None else mask.reshape(self.shape)
        x = nn.BatchNorm(use_running_average=not train)(x, mask=mask)
        return nn.Dense(1)(x.reshape(x.shape[0], -1))


def test_batch_statistics_must_heed_the_mask():
    build = lambda shape: fl.linen_model(
        Normalising(shape), np.zeros((1, 3, 3, 2), np.float32), lambda p, batch: p[:, 0]
    )
    build((-1, 1, 1, 1))
    for shape, message in (
        (None, "module Normalising has batch statistics, BatchNorm_0.mean, that depend"),
        ((-1, 1), "BatchNorm_0.mean, that depend on an example which the mask leaves out; hand"),
        ((-1,), "module Normalising failed on a batch with a mask"),
    ):
        with pytest.raises(ValueError, match=message):
            build(shape)


def test_a_loss_is_a_function():
    with pytest.raises(TypeError, match="loss is 3; pass a function"):
        fl.function_model(3)
