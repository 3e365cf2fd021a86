"""The update pipeline: transforms alone, in a chain, and in rounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import SIZES, everyone, regression_dataset, regression_model

import fedjax_lite as fl

UPDATE = {"a": np.float32([3.0, -4.0]), "b": np.float32(12.0)}  # Of norm 13.
KEY = jax.random.key(0)


def of_one_client(transform, update, key=KEY):
    """The update as it is sent, and what is reported."""
    message = fl.Message(update, jnp.float32(1.0))
    sent = transform.client(key, transform.init(update), message, None)
    return sent.update, sent.metrics


compiled = jax.jit(of_one_client, static_argnums=0)


@pytest.mark.parametrize(("bound", "factor"), [(6.5, 0.5), (13.5, 1.0)])
def test_clip_by_norm(bound, factor):
    clipped, info = compiled(fl.clip_by_norm(bound), UPDATE)
    expected = jax.tree.map(lambda x: factor * np.asarray(x), UPDATE)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), clipped, expected)
    assert info["clipped"] == (factor < 1)


def test_bounds_can_be_swept_and_differentiated():
    norm = lambda bound: optax.tree.norm(of_one_client(fl.clip_by_norm(bound), UPDATE)[0])
    total = lambda x: of_one_client(fl.clip_by_norm(1.0), x)[0].sum()
    swept = jax.jit(lambda bounds: jax.vmap(jax.value_and_grad(norm))(bounds))
    norms, slopes = swept(np.float32([1.0, 5.0, 20.0]))
    np.testing.assert_allclose(norms, [1.0, 5.0, 13.0], rtol=1e-6)
    np.testing.assert_allclose(slopes, [1.0, 1.0, 0.0], atol=1e-6)
    np.testing.assert_array_equal(jax.jit(jax.grad(total))(np.zeros(3, np.float32)), np.ones(3))


@pytest.mark.parametrize(("num_levels", "bits"), [(2, 1), (3, 2), (16, 4), (256, 8)])
def test_quantized_updates_are_levels_and_right_on_average(num_levels, bits):
    rng = np.random.default_rng(0)
    update = {"a": rng.normal(size=(5, 7)).astype(np.float32), "b": np.full(3, 0.3, np.float32)}
    quantize = fl.quantize_uniform(num_levels)
    keys = jax.random.split(jax.random.key(1), 4000)
    draw = jax.jit(jax.vmap(lambda key: of_one_client(quantize, update, key)))
    many, info = jax.device_get(draw(keys))
    x = np.asarray(update["a"], np.float64)
    step = (x.max() - x.min()) / (num_levels - 1)
    levels = (many["a"] - x.min()) / step
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-3)
    assert (np.abs(many["a"] - x) < step * 1.0001).all()
    # The standard deviation of one is at most half a step.
    np.testing.assert_allclose(many["a"].mean(0), x, atol=5 * step / 2 / np.sqrt(4000))
    np.testing.assert_array_equal(many["b"], np.full((4000, 3), 0.3, np.float32))
    np.testing.assert_array_equal(info["bits_up"], bits * 38 + 2 * 64)


def test_a_chain_runs_forth_on_clients_and_back_on_the_server():
    def adding(x):
        return fl.UpdateTransform(
            lambda params: jnp.float32(0),
            lambda key, state, message, client: message._replace(
                update=message.update * 10 + x, metrics={"last": x}
            ),
            lambda key, state, received: (
                received._replace(aggregate=received.aggregate * 10 + x),
                state + x,
                {"first": x},
            ),
        )

    both = fl.chain(adding(1.0), adding(2.0))
    update, info = of_one_client(both, jnp.float32(0))
    assert update == 12.0
    assert info == {"last": 2.0}
    received, state, info = both.server(KEY, both.init(update), fl.Received(jnp.float32(0)))
    assert received.aggregate == 21.0
    assert state == (1.0, 2.0)
    assert info == {"first": 1.0}
    nothing = fl.chain()
    assert of_one_client(nothing, 5.0) == (5.0, {})
    with pytest.raises(TypeError, match=r"transforms\[1\] is of type"):
        fl.chain(both, optax.sgd(1.0))


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_deltas_are_clipped_in_rounds_before_they_are_weighted(weighting):
    population = regression_dataset().resident()
    options = {"batch_size": 4, "weighting": weighting, "shuffle": False}
    optimizer = optax.sgd(0.1)
    algorithm = fl.fed_avg(regression_model(), optimizer, pipeline=fl.clip_by_norm(0.2), **options)
    state = algorithm.init({"w": np.zeros(3, np.float32), "b": np.float32(0)})
    after, info = algorithm.round(KEY, state, everyone(population))
    plain = fl.fed_avg(regression_model(), optimizer, **options)
    total, weights = np.zeros(4), []
    for client in range(10):
        alone, alone_info = plain.round(KEY, state, everyone(population, [client]))
        delta = -np.append(alone.params["w"], alone.params["b"])
        norm = np.linalg.norm(delta)
        weights.append(float(alone_info.clients["weight"][0]))
        total += weights[-1] * delta * min(1.0, 0.2 / max(norm, 1e-9))
        # What is reported is what the client trained.
        np.testing.assert_allclose(info.clients["update_norm"][client], norm, rtol=1e-5)
        assert info.clients["clipped"][client] == (norm > 0.2)
    expected = -total / sum(weights)
    np.testing.assert_allclose(after.params["w"], expected[:3], rtol=1e-5)
    np.testing.assert_allclose(after.params["b"], expected[3], rtol=1e-5)


def counting():
    """Counts rounds, and shrinks updates by the count on clients and by ten on the server."""
    return fl.UpdateTransform(
        lambda params: jnp.float32(1),
        lambda key, state, message, client: message._replace(
            update=optax.tree.scale(1 / state, message.update)
        ),
        lambda key, state, received: (
            received._replace(aggregate=optax.tree.scale(0.1, received.aggregate)),
            state + 1,
            {"count": state},
        ),
    )


def test_the_server_half_keeps_its_state_but_not_in_a_skipped_round():
    population = regression_dataset().resident()
    build = lambda **kw: fl.fed_sgd(regression_model(), optax.sgd(1.0), **kw)
    algorithm, plain = build(pipeline=counting()), build()
    state = algorithm.init(jax.random.key(1))
    for count in (1.0, 2.0):
        before = state
        state, info = algorithm.round(KEY, state, everyone(population))
        expected, _ = plain.round(KEY, before, everyone(population))
        start, moved, whole = (np.asarray(x.params["w"]) for x in (before, state, expected))
        np.testing.assert_allclose(moved - start, 0.1 / count * (whole - start), rtol=1e-4)
        assert info.metrics["count"] == count
    skipped, _ = algorithm.round(KEY, state, everyone(population, [1]))
    assert skipped.pipeline_state == state.pipeline_state == 3.0


def test_bytes_are_those_that_are_sent():
    population = regression_dataset().resident()
    algorithm = fl.fed_avg(
        regression_model(), optax.sgd(0.1), batch_size=4, pipeline=fl.quantize_uniform(16)
    )
    result = fl.train(algorithm, population, fl.samplers.uniform(10, 5), 2, key=jax.random.key(0))
    for row in result.history.rounds:
        trained = row["num_clients"] - row["num_empty"]
        assert row["bytes_up"] == trained * (4 * 4 + 2 * 64) / 8
        assert row["bytes_down"] == row["num_clients"] * 16
    # Control variates are sent both ways, beside the update and not through the pipeline.
    algorithm = fl.scaffold(
        regression_model(), optax.sgd(0.1), batch_size=4, pipeline=fl.quantize_uniform(16)
    )
    state = algorithm.init(jax.random.key(0), num_clients=10)
    _, info = algorithm.round(KEY, state, everyone(population, capacity=12))
    trained = np.append(np.array(SIZES) > 0, [False, False])
    np.testing.assert_array_equal(info.clients["bits_up"], trained * (4 * 4 + 2 * 64 + 4 * 32))
    np.testing.assert_array_equal(info.clients["bits_down"], [2 * 4 * 32] * 10 + [0, 0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: fl.clip_by_norm(0.0), "max_norm is 0.0; choose a number above 0"),
        (lambda: fl.clip_by_norm([1.0]), "max_norm is .*; choose a number above 0"),
        (lambda: fl.quantize_uniform(1), "num_levels is 1; choose an integer between 2 and"),
    ],
)
def test_what_is_wrong_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_bounds_hold_in_half_precision():
    update = {"a": np.full(5000, 0.3, jnp.bfloat16)}
    clipped, _ = compiled(fl.clip_by_norm(1.0), update)
    assert clipped["a"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.linalg.norm(np.asarray(clipped["a"], float)), 1.0, rtol=4e-3)


@pytest.mark.parametrize("value", [None, "1"])
def test_a_bound_is_a_number(value):
    with pytest.raises(TypeError, match=r"max_norm is .*; pass a number"):
        fl.clip_by_norm(value)


def test_a_pipeline_must_be_one():
    with pytest.raises(TypeError, match="pipeline is of type GradientTransformation"):
        fl.fed_avg(regression_model(), optax.sgd(0.1), pipeline=optax.clip(1.0))


MOST, LEAST = float(jnp.finfo(jnp.float32).max), float(jnp.finfo(jnp.float32).tiny)
EXTREMES = {
    # The update, clipped to norm 2, quantised to 3 levels; None where it is as before.
    "opposite": ([1e38, -1e38], [2**0.5, -(2**0.5)], None),
    "most": ([MOST, -MOST, MOST], [(4 / 3) ** 0.5, -((4 / 3) ** 0.5), (4 / 3) ** 0.5], None),
    "squares overflow": ([3e19, 4e19], [1.2, 1.6], None),
    "squares vanish": ([3e-30, 4e-30], None, None),
    "least": ([LEAST, 0.0], None, None),
    "constant": ([7.0, 7.0, 7.0], [2 / 3**0.5] * 3, None),
    "zeros": ([0.0, 0.0], None, None),
    "scalar": (1e38, 2.0, None),
    "empty": ([], None, None),
    "NaN": ([1.0, np.nan], None, [np.nan, np.nan]),
    "infinity": ([np.inf, 1.0, 0.0], None, [np.nan] * 3),
}


@functools.partial(jax.jit, static_argnums=1)
def sent_in_several_ways(update, num_levels):
    clip, quantize = fl.clip_by_norm(2.0), fl.quantize_uniform(num_levels)
    # One after the other, and of a tree with a further array; vmapped, as in lanes.
    tree = {"a": update[None], "b": jnp.zeros((1, 0))}
    lanes = jax.vmap(lambda x: of_one_client(fl.chain(clip, quantize), x)[0])(tree)
    return of_one_client(clip, update), of_one_client(quantize, update), lanes


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_have_a_documented_outcome(name):
    update, clipped, quantized = EXTREMES[name]
    update = np.float32(update)
    close = lambda x, y: np.testing.assert_allclose(x, update if y is None else y, rtol=1e-6)
    num_levels = 2 if name == "least" else 3  # Half of the least is no normal number.
    (result, info), (levels, told), lanes = sent_in_several_ways(update, num_levels)
    close(result, clipped)
    assert info["clipped"] == (clipped is not None)
    close(levels, quantized)
    assert told["bits_up"] == ((num_levels - 1) * update.size + 64 if update.size else 0)
    close(lanes["a"][0], quantized or clipped)
    assert lanes["b"].shape == (1, 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_extremes_of_half_precision(dtype):
    most = jnp.finfo(dtype).max
    update = np.array([most, -most], dtype)
    (result, _), (levels, _), _ = jax.device_get(sent_in_several_ways(update, 4))
    np.testing.assert_allclose(result.astype(float), [2**0.5, -(2**0.5)], rtol=1e-2)
    np.testing.assert_array_equal(levels, update)


@pytest.mark.parametrize("factory", [fl.fed_avg, fl.fed_sgd])
@pytest.mark.parametrize("weight", [-1.0, np.nan])
def test_clients_of_a_weight_that_is_none_are_left_out_and_counted(factory, weight):
    weighting = lambda num_examples: jnp.where(num_examples == 7, weight, num_examples)
    options = {"batch_size": 8, "weighting": weighting}
    algorithm = factory(regression_model(), optax.sgd(0.1), **options)
    population, states = regression_dataset().resident(), []
    start = algorithm.init({"w": np.ones(3, np.float32), "b": np.float32(0)})
    for order in (np.arange(10), np.arange(1, 10)):  # The client of 7 examples is the first one.
        state, info = algorithm.round(KEY, start, everyone(population, order, capacity=10))
        assert info.num_nonfinite == (order.size == 10)
        states.append(state.params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), *states)
