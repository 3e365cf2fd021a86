"""Models of which a part is trained: frozen params, and adapters beside them."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from problems import SIZES, everyone, regression_dataset, regression_model

import fedjax_lite as fl

KEY = jax.random.key(5)


class TwoLayers(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.second = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def loss(predictions, batch):
    return (predictions[:, 0] - batch["y"]) ** 2 / 2


@functools.cache
def linen():
    module = nn.Sequential([nn.Dense(4), jnp.tanh, nn.Dense(1)])
    model = fl.linen_model(module, jnp.zeros((1, 3)), loss)
    return model, "layers_0", "layers_2"


def of_nnx():
    return fl.nnx_model(lambda rngs: TwoLayers(rngs), loss), "first", "second"


def function():
    _, first, second = linen()

    def of_params(params, batch):
        hidden = jnp.tanh(batch["x"] @ params[first]["kernel"] + params[first]["bias"])
        return loss(hidden @ params[second]["kernel"] + params[second]["bias"], batch)

    return fl.function_model(of_params), first, second


def drawn(model, key=KEY):
    """Params, as NumPy arrays."""
    return jax.device_get(jax.jit(model.init)(key)[0])


@functools.cache
def two_layers():
    """Params."""
    return drawn(linen()[0])


def by_hand(params, first):
    """The model of the second layer alone, on what the first one makes of the features."""
    kernel, bias = params[first]["kernel"], params[first]["bias"]

    def of_second(second, batch):
        hidden = jnp.tanh(batch["x"] @ kernel + bias)
        return loss(hidden @ second["kernel"] + second["bias"], batch)

    return fl.function_model(of_second)


def rounds(algorithm, state, number=3):
    cohort = everyone(regression_dataset().resident())
    for i in range(number):
        state, info = algorithm.round(jax.random.fold_in(KEY, i), state, cohort)
    return state, info


def close(actual, expected, rtol=2e-6):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), actual, expected
    )


LAST_LAYER = {
    "batch_size": 2,
    "num_epochs": 2,
    "client_optimizer": optax.sgd(0.05, momentum=0.5),
    "pipeline": fl.chain(fl.clip_by_norm(0.1), fl.error_feedback(fl.quantize_uniform(16))),
}


@functools.cache
def trained_last_layer(name):
    first, second = two_layers()
    algorithm = getattr(fl, name)(by_hand(two_layers(), first), **LAST_LAYER)
    return rounds(algorithm, algorithm.init(two_layers()[second], num_clients=len(SIZES)))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *((linen, name) for name in ("fed_avg", "scaffold", "apfl")),
        (of_nnx, "fed_avg"),
        (function, "scaffold"),
    ],
)
def test_training_the_last_layer_is_training_a_model_of_it(make, name):
    model, first, second = make()
    params = dict(zip((first, second), two_layers().values(), strict=True))
    frozen = fl.frozen(model, f"{first}/*")
    algorithm = getattr(fl, name)(frozen, **LAST_LAYER)
    state, info = rounds(algorithm, algorithm.init(params, num_clients=len(SIZES)))
    expected, of_second = trained_last_layer(name)
    close(state.params[second], expected.params)
    close(jax.tree.leaves(state.store), jax.tree.leaves(expected.store))
    close(jax.tree.leaves(state.pipeline_store), jax.tree.leaves(expected.pipeline_store))
    for key in ("bits_up", "bits_down", "num_steps"):
        np.testing.assert_array_equal(info.clients[key], of_second.clients[key])
    np.testing.assert_allclose(info.loss, of_second.loss, rtol=1e-5)
    # What is frozen is there once, as given, and in no place of what is trained.
    assert jax.tree.leaves(state.params[first]) == []
    jax.tree.map(np.testing.assert_array_equal, state.frozen[first], params[first])
    whole = frozen.merge(state.params, state.frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(params)


def started(algorithm, params, num_clients):
    return algorithm, algorithm.init(params, num_clients=num_clients)


@pytest.mark.parametrize("names", ["b", ["b"], lambda name: name != "w"])
def test_names_are_patterns_or_a_function(names):
    algorithm = fl.fed_avg(fl.frozen(regression_model(), names), optax.sgd(0.1))
    state = algorithm.init(KEY)
    assert state.params["b"] is None
    assert state.frozen["w"] is None
    after, _ = rounds(algorithm, state, 1)
    assert float(after.frozen["b"]) == float(state.frozen["b"])
    assert not np.array_equal(after.params["w"], state.params["w"])


def test_names_that_leave_nothing_are_refused():
    model = regression_model()
    with pytest.raises(ValueError, match="names is 'c', which matches none of the params b, w"):
        fl.fed_avg(fl.frozen(model, "c"), optax.sgd(0.1)).init(KEY)
    with pytest.raises(ValueError, match="names is '\\*', which matches all of the params b, w"):
        fl.fed_avg(fl.frozen(model, "*"), optax.sgd(0.1)).init(KEY)
    with pytest.raises(ValueError, match="model has frozen params already; name all of them"):
        fl.frozen(fl.frozen(model, "b"), "w")
    with pytest.raises(TypeError, match="names is of type int"):
        fl.frozen(model, [3])


def test_a_frozen_model_alone_says_where_its_params_are():
    model = fl.frozen(regression_model(), "b")
    trained, _ = model.split(drawn(model))
    batch = {"x": np.ones((1, 3)), "y": np.ones(1), "mask": np.ones(1, bool)}
    with pytest.raises(ValueError, match="call it through an algorithm's round"):
        model.metrics(trained, (), batch)


def with_adapters(rank, alpha=None):
    (model, *names), base = linen(), two_layers()
    return fl.lora(model, rank, alpha=alpha, base=base), base, names


def test_lora_is_the_layer_with_the_formed_product_added():
    rank, alpha = 2, 3.0
    model, base, names = with_adapters(rank, alpha)
    start, rng = drawn(model, jax.random.key(1)), np.random.default_rng(0)
    # Away from zero, where the factors have a gradient of their own.
    for name in names:
        own = start["adapters"][name]
        own["b"] = rng.normal(0, 0.1, own["b"].shape).astype(np.float32)

    def formed(adapters, batch):
        x = batch["x"]
        for name in names:
            own = adapters[name]
            kernel = base[name]["kernel"] + alpha / rank * own["a"] @ own["b"]
            x = x @ kernel + base[name]["bias"]
            x = jnp.tanh(x) if name == names[0] else x
        return loss(x, batch)

    options = {"batch_size": 2, "client_optimizer": optax.sgd(0.05)}
    state, info = rounds(*started(fl.fed_avg(model, **options), start, None))
    expected, of_formed = rounds(
        *started(fl.fed_avg(fl.function_model(formed), **options), start["adapters"], None)
    )
    close(state.params["adapters"], expected.params, 1e-5)
    np.testing.assert_array_equal(info.clients["bits_up"], of_formed.clients["bits_up"])
    jax.tree.map(np.testing.assert_array_equal, state.frozen["base"], base)
    assert not np.array_equal(
        state.params["adapters"][names[0]]["a"], start["adapters"][names[0]]["a"]
    )


@pytest.mark.parametrize("train_a", [False, True])
def test_products_of_adapters_are_averaged_exactly_if_the_first_factor_is_frozen(train_a):
    model = fl.lora(linen()[0], 2, train_a=train_a)
    algorithm = fl.fed_avg(model, optax.sgd(0.1), weighting="uniform", batch_size=2, num_epochs=2)
    start = drawn(model)
    start = {**start, "adapters": jax.tree.map(lambda x: x + np.float32(0.3), start["adapters"])}
    population = regression_dataset().resident()

    def products(ids):
        state = algorithm.init(start)
        after, info = algorithm.round(KEY, state, everyone(population, ids, capacity=2))
        adapters = jax.device_get(model.merge(after.params, after.frozen)["adapters"])
        return {name: own["a"] @ own["b"] for name, own in adapters.items()}, info

    one, other, (both, info) = products([0])[0], products([3])[0], products([0, 3])
    mean = jax.tree.map(lambda x, y: (x + y) / 2, one, other)
    differences = jax.tree.map(lambda x, y: float(abs(x - y).max()), mean, both)
    assert (max(differences.values()) < 1e-6) == (not train_a)
    sizes = jax.tree.map(lambda x: 32 * x.size, start["adapters"])
    of_b = sum(own["b"] for own in sizes.values())
    of_a = sum(own["a"] for own in sizes.values())
    assert info.clients["bits_up"].tolist() == [of_b + of_a * train_a] * 2


def layers(model, state):
    """The adapted layers' kernels, formed."""
    params = jax.device_get(model.merge(state.params, state.frozen))
    return {
        name: params["base"][name]["kernel"] + 1.5 * own["a"] @ own["b"]
        for name, own in params["adapters"].items()
    }


@functools.cache
def adapters_away_from_zero():
    """A model whose factor is 1.5, and params of it."""
    model = fl.lora(linen()[0], 2, alpha=3.0)
    start = drawn(model)
    adapters = jax.tree.map(lambda x: x + np.float32(0.3), start["adapters"])
    return model, {**start, "adapters": adapters}


layouts = pytest.mark.parametrize(
    "layout",
    [
        {"lanes": 3},
        pytest.param(
            {"num_devices": 2}, marks=pytest.mark.skipif(jax.device_count() < 2, reason="devices")
        ),
    ],
)
EX_OPTIONS = {"client_optimizer": optax.sgd(0.1), "batch_size": 2, "num_epochs": 2}


@pytest.mark.parametrize("pipeline", [None, fl.clip_by_norm(0.1)])
def test_layers_of_fed_ex_lora_are_the_mean_of_those_of_the_clients(pipeline):
    model, start = adapters_away_from_zero()
    options = {**EX_OPTIONS, "weighting": "examples", "pipeline": pipeline}
    population = regression_dataset().resident()
    exact, alone = fl.fed_ex_lora(model, **options), fl.fed_avg(model, **options)
    state, ids = exact.init(start), [0, 3, 1, 7]
    sizes = np.array(SIZES)[ids]
    for i in range(2):
        key, before = jax.random.fold_in(KEY, i), dataclasses.replace(state, pipeline_state=())
        of_clients = [
            layers(model, alone.round(key, before, everyone(population, [i], capacity=4))[0])
            for i in ids
        ]
        averaged, of_adapters = alone.round(key, before, everyone(population, ids))
        state, info = exact.round(key, state, everyone(population, ids))
        for name, formed in layers(model, state).items():
            mean = sum(
                p * own[name] for p, own in zip(sizes / sizes.sum(), of_clients, strict=True)
            )
            np.testing.assert_allclose(formed, mean, rtol=1e-5, atol=1e-6)
            assert float(abs(layers(model, averaged)[name] - mean).max()) > 2e-5
        close(state.params, averaged.params)
        for name, base in state.frozen["base"].items():
            np.testing.assert_array_equal(base["bias"], start["base"][name]["bias"])
    assert set(info.clients) == set(of_adapters.clients)
    kernels = 32 * (3 * 4 + 4 * 1)
    assert (info.clients["bits_down"] - of_adapters.clients["bits_down"]).tolist() == [kernels] * 4
    np.testing.assert_array_equal(info.clients["bits_up"], of_adapters.clients["bits_up"])


def test_nothing_is_left_out_of_one_client_nor_if_factors_are_alike_nor_if_all_are_left_out():
    population = regression_dataset().resident()
    model, start = adapters_away_from_zero()
    unchanged = lambda state: jax.tree.map(
        np.testing.assert_array_equal, state.frozen["base"], start["base"]
    )
    algorithm = fl.fed_ex_lora(model, **EX_OPTIONS)
    state, _ = algorithm.round(KEY, algorithm.init(start), everyone(population, [3], capacity=4))
    unchanged(state)
    state, info = algorithm.round(KEY, algorithm.init(start), everyone(population, [1], capacity=4))
    assert info.skipped
    unchanged(state)
    # At B = 0, A has no gradient: after one step, all clients have the same.
    model = fl.lora(linen()[0], 2, alpha=3.0, base=start["base"])
    algorithm = fl.fed_ex_lora(model, optax.sgd(0.1), num_steps=1)
    state, info = algorithm.round(KEY, algorithm.init(KEY), everyone(population, [0, 3, 5, 7]))
    assert info.update_norm > 0
    unchanged(state)


@functools.cache
def base_with_a_client_that_is_no_number(ids, num_devices=1, lanes=None):
    model, start = adapters_away_from_zero()
    dataset, mesh = regression_dataset(), fl.clients_mesh(num_devices)
    dataset.examples["x"][dataset.offsets[3]] = np.nan
    algorithm = fl.fed_ex_lora(model, **EX_OPTIONS, mesh=mesh, lanes=lanes)
    cohort = everyone(dataset.resident(mesh), ids, 4)
    state, _ = algorithm.round(KEY, algorithm.init(start), cohort)
    return jax.device_get(state.frozen["base"])


@layouts
def test_a_client_that_is_no_number_lanes_and_devices_change_nothing_of_the_base(layout):
    base = base_with_a_client_that_is_no_number((7, 0, 3, 4), **layout)
    close(base, base_with_a_client_that_is_no_number((0, 4, 7)), 1e-5)


def test_fed_ex_lora_refuses_what_it_cannot_average():
    model, _ = adapters_away_from_zero()
    for wrong in (fl.lora(linen()[0], 2, train_a=False), linen()[0]):
        with pytest.raises(ValueError, match="model has no adapters of two factors"):
            fl.fed_ex_lora(wrong, optax.sgd(0.1))
    with pytest.raises(ValueError, match="max_staleness is 1, and the base"):
        fl.fed_ex_lora(model, optax.sgd(0.1), max_staleness=1)
    with pytest.raises(ValueError, match="reducer is Reducer"):
        fl.fed_ex_lora(model, optax.sgd(0.1), reducer=fl.coordinate_median())
    hide = lambda before, state: before._replace(is_masked=True)
    masked = fl.clip_by_norm(1.0)._replace(guarantees=hide)
    with pytest.raises(ValueError, match="fed_ex_lora comes after a mask"):
        fl.fed_ex_lora(model, optax.sgd(0.1), pipeline=masked)


def test_lora_starts_from_the_model_as_it_is_and_takes_names():
    (model, _, second), base = linen(), two_layers()
    examples = regression_dataset().examples
    plain = fl.fed_avg(model, optax.sgd(0.1)).init(base)
    adapted = fl.lora(model, 1, names=second, base=base)
    state = fl.fed_avg(adapted, optax.sgd(0.1)).init(jax.random.key(1))
    assert set(state.params["adapters"]) == {second}
    assert fl.evaluate(adapted, state, examples) == fl.evaluate(model, plain, examples)


def test_lora_of_layers_that_take_and_give_several_axes():
    class Folded(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.DenseGeneral((2, 3), name="split")(x)
            return nn.DenseGeneral(1, axis=(-2, -1), name="fold")(jnp.tanh(x))

    model = fl.linen_model(Folded(), jnp.zeros((1, 3)), loss)
    start = drawn(fl.lora(model, 2))
    shapes = jax.tree.map(jnp.shape, start["adapters"])
    assert shapes == {
        "split": {"a": (3, 2), "b": (2, 6)},
        "fold": {"a": (6, 2), "b": (2, 1)},
    }
    filled = jax.tree.map(lambda x: x + np.float32(0.3), start["adapters"])
    base = jax.tree.map(lambda x: x, start["base"])
    for name, own in filled.items():
        kernel = base[name]["kernel"]
        base[name]["kernel"] = kernel + (own["a"] @ own["b"]).reshape(kernel.shape)
    examples = regression_dataset().examples
    algorithm = fl.fed_avg(fl.lora(model, 2), optax.sgd(0.1))
    state = algorithm.init({"adapters": filled, "base": start["base"]})
    expected = fl.evaluate(model, fl.fed_avg(model, optax.sgd(0.1)).init(base), examples)
    actual = fl.evaluate(fl.lora(model, 2), state, examples)
    np.testing.assert_allclose(actual["loss"], expected["loss"], rtol=1e-5)


def test_lora_refuses_what_it_cannot_adapt():
    model, first, _ = linen()
    with pytest.raises(ValueError, match="rank is 0"):
        fl.lora(model, 0)
    with pytest.raises(ValueError, match="train_a is 2; choose"):
        fl.lora(model, train_a=2)
    with pytest.raises(ValueError, match="the dense layers of the model are layers_0, layers_2"):
        drawn(fl.lora(model, names="Dense_7"))
    with pytest.raises(ValueError, match="the dense layers of the model are none"):
        drawn(fl.lora(regression_model()))
    with pytest.raises(ValueError, match="base"):
        drawn(fl.lora(model, base={first: np.zeros(3)}))


def transformer():
    return fl.models.stackoverflow_transformer(
        1000, embedding=16, layers=1, num_heads=2, feed_forward=32, dropout_rate=0.0
    )


def sentences(num_clients=4, length=6):
    rng = np.random.default_rng(0)
    words = lambda: rng.integers(4, 1000, (3, length)).astype(np.int32)
    return fl.FederatedDataset.from_clients(
        {i: {"x": words(), "y": words()} for i in range(num_clients)}
    )


@functools.cache
def trained_transformer(num_devices=1, lanes=None):
    mesh = fl.clients_mesh(num_devices)
    cohort = everyone(sentences().resident(mesh))
    model = fl.lora(transformer(), 2)
    algorithm = fl.fed_avg(model, optax.sgd(0.5), batch_size=2, mesh=mesh, lanes=lanes)
    state = algorithm.init(KEY)
    for _ in range(2):
        state, _ = algorithm.round(KEY, state, cohort)
    assert algorithm.round._cache_size() == 1
    return state


@layouts
def test_lanes_and_devices_change_nothing(layout):
    close(trained_transformer(**layout).params, trained_transformer().params, 1e-4)


@pytest.mark.parametrize("factory", [fl.fed_avg, fl.fed_ex_lora])
def test_the_base_takes_the_same_memory_however_many_clients_train_side_by_side(factory):
    base_bytes = {}
    temporaries = []
    for lanes in (1, 16):
        # Five million params, nearly all in dense layers.
        model = fl.lora(fl.models.mlp((64,), (2048, 2048, 256), 4), 2)
        examples = {"x": jnp.zeros((32, 64)), "y": jnp.zeros(32, jnp.int32)}
        dataset = fl.FederatedDataset.from_clients(
            {i: jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], examples) for i in range(16)}
        )
        algorithm = factory(model, optax.sgd(0.1), batch_size=2, lanes=lanes)
        state = jax.eval_shape(algorithm.init, KEY)
        compiled = algorithm.round.lower(KEY, state, everyone(dataset.resident())).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
        base_bytes = sum(4 * x.size for x in jax.tree.leaves(state.frozen))
    assert base_bytes > 4 * 4.8e6
    assert temporaries[1] - temporaries[0] < base_bytes / 4
    # The base that is changed is there once more.
    assert temporaries[1] < base_bytes / 2 + (factory == fl.fed_ex_lora) * base_bytes


@pytest.mark.parametrize(
    ("model", "factory"),
    [
        (fl.frozen(linen()[0], "layers_0/*"), fl.fed_avg),
        (fl.lora(linen()[0], 2), fl.fed_ex_lora),
    ],
)
def test_runs_with_frozen_params_resume_to_the_same_bits_and_keep_the_best(
    model, factory, tmp_path
):
    dataset = regression_dataset()
    arguments = {
        "algorithm": factory(model, optax.sgd(0.05), batch_size=2),
        "population": dataset.resident(),
        "sampler": fl.samplers.uniform(len(SIZES), 4),
        "key": KEY,
        "evaluate": lambda state: fl.evaluate(model, state, dataset.examples),
        "eval_every": 2,
    }
    whole = fl.train(num_rounds=6, **arguments)
    fl.train(num_rounds=4, checkpoints=fl.Checkpoints(tmp_path, every=2), **arguments)
    resumed = fl.train(num_rounds=6, checkpoints=fl.Checkpoints(tmp_path, every=2), **arguments)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    loaded = fl.load_state(tmp_path, whole.state)
    jax.tree.map(np.testing.assert_array_equal, loaded.frozen, whole.state.frozen)
    assert fl.evaluate(model, loaded, dataset.examples) == fl.evaluate(
        model, whole.state, dataset.examples
    )


def test_every_evaluation_reads_frozen_params():
    model, first, _ = linen()
    frozen = fl.frozen(model, f"{first}/*")
    dataset = regression_dataset()
    cohort = everyone(dataset.resident())
    params = two_layers()
    state = fl.fed_avg(frozen, optax.sgd(0.1)).init(params)
    plain = fl.fed_avg(model, optax.sgd(0.1)).init(params)
    close(
        fl.evaluate(frozen, state, dataset.examples, batch_size=5),
        fl.evaluate(model, plain, dataset.examples, batch_size=5),
    )
    close(
        fl.evaluate_clients(frozen, state, cohort).pooled,
        fl.evaluate_clients(model, plain, cohort).pooled,
    )
    tuned = fl.evaluate_fine_tuned(
        frozen, state, cohort, cohort, optax.sgd(0.1), key=KEY, num_epochs=2, batch_size=2
    )
    second = by_hand(params, first)
    of_second = fl.fed_avg(second, optax.sgd(0.1)).init(params["layers_2"])
    expected = fl.evaluate_fine_tuned(
        second, of_second, cohort, cohort, optax.sgd(0.1), key=KEY, num_epochs=2, batch_size=2
    )
    close(jax.tree.leaves(tuned), jax.tree.leaves(expected))


def test_seeds_of_frozen_models_sweep_and_rounds_are_differentiable():
    model = fl.frozen(regression_model(), "b")
    cohort = everyone(regression_dataset().resident())

    def after(learning_rate, params):
        algorithm = fl.fed_avg(model, optax.sgd(learning_rate), differentiable=True)
        return algorithm.round(KEY, algorithm.init(params), cohort)[0].params["w"].sum()

    params = {"w": np.array([0.5, -1.0, 2.0], np.float32), "b": np.float32(0.25)}
    gradient = jax.jit(jax.grad(after, argnums=1))(0.1, params)["b"]
    alone = jax.jit(after)
    above, below = (alone(0.1, {**params, "b": np.float32(b)}) for b in (0.35, 0.15))
    np.testing.assert_allclose(gradient, (above - below) / 0.2, rtol=1e-2)
    mapped = jax.jit(jax.vmap(after, in_axes=(0, None)))(np.float32([0.05, 0.1]), params)
    np.testing.assert_allclose(mapped[1], alone(0.1, params), rtol=1e-5)
