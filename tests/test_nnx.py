import functools
import gc
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from problems import everyone, regression_dataset

import fedjax_lite as fl
from fedjax_lite.models import modules


class Normalised(nnx.Module):
    """BatchNorm, a hidden layer, dropout; a list of layers, a constant, and what `sow` leaves."""

    def __init__(self, rngs, rate=0.0):
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)])
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.scale = jnp.float32(2.0)

    def __call__(self, x, *, mask=None):
        hidden = nnx.relu(self.layers[0](self.norm(x, mask=mask[:, None])))
        return self.scale * self.layers[1](self.dropout(hidden))


class LinenNormalised(nn.Module):
    @nn.compact
    def __call__(self, x, *, train, mask=None):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x, mask=mask[:, None])
        hidden = nn.relu(nn.Dense(4)(x))
        return 2 * nn.Dense(1)(hidden)


def as_linen(params, model_state):
    dense = {f"Dense_{i}": layer for i, layer in params["layers"].items()}
    return {"BatchNorm_0": params["norm"], **dense}, {
        "batch_stats": {"BatchNorm_0": model_state["norm"]}
    }


def squared(predictions, batch):
    return (predictions[:, 0] - batch["y"]) ** 2


def normalised(rate=0.0):
    return fl.nnx_model(functools.partial(Normalised, rate=rate), squared)


def train(model, params, model_state, *, rounds=3, lanes=None, num_devices=1):
    mesh = fl.clients_mesh(num_devices)
    algorithm = fl.fed_avg(
        model, optax.sgd(0.05), batch_size=4, num_epochs=2, lanes=lanes, mesh=mesh
    )
    cohort = everyone(regression_dataset().resident(mesh))
    state = algorithm.init(params, model_state)
    for r in range(rounds):
        state, _ = algorithm.round(jax.random.key(r), state, cohort)
    return state


def close(actual, desired):
    check = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(check, actual, desired)


def test_the_same_network_in_linen_trains_to_the_same_params():
    model = normalised()
    linen = fl.linen_model(LinenNormalised(), jnp.zeros((1, 3)), squared)
    params, model_state = jax.jit(model.init)(jax.random.key(0))
    ours = train(model, params, model_state)
    theirs = train(linen, *as_linen(params, model_state))
    assert abs(ours.model_state["norm"]["mean"]).max() > 0.05
    close(as_linen(ours.params, ours.model_state), (theirs.params, theirs.model_state))
    examples = regression_dataset().examples
    close(fl.evaluate(model, ours, examples), fl.evaluate(linen, theirs, examples))


def test_lanes_and_devices_change_nothing():
    model = normalised(rate=0.5)
    start = jax.jit(model.init)(jax.random.key(5))
    one = train(model, *start, lanes=1)
    for layout in ({"lanes": 3}, {"lanes": 2, "num_devices": 4}):
        other = train(model, *start, **layout)
        close((other.params, other.model_state), (one.params, one.model_state))


def test_seeds_under_vmap_and_rounds_under_scan():
    model = normalised(rate=0.5)
    algorithm = fl.fed_avg(model, optax.sgd(0.05), batch_size=4, mesh=fl.clients_mesh(1))
    cohort = everyone(regression_dataset().resident(fl.clients_mesh(1)))

    def run(seed):
        state = algorithm.init(jax.random.key(seed))
        keys = jax.random.split(jax.random.key(seed), 2)
        return jax.lax.scan(lambda state, key: algorithm.round(key, state, cohort), state, keys)[0]

    batch = {"x": jnp.ones((4, 3)), "y": jnp.ones(4), "mask": jnp.ones(4, bool)}

    def gradients(key):
        def step(carry, key):
            def loss(params):
                losses, after = model.loss(params, carry[1], batch, key)
                return losses.sum(), after

            return jax.grad(loss, has_aux=True)(carry[0]), None

        return jax.lax.scan(step, model.init(key), jax.random.split(key, 2))

    gc.freeze()  # Leaks are looked for among all objects but those that are there by now.
    with jax.checking_leaks():  # Of whole rounds, it would take most of a minute.
        jax.make_jaxpr(jax.vmap(gradients))(jax.random.split(jax.random.key(0), 2))
    gc.unfreeze()
    states = jax.jit(jax.vmap(run))(jnp.arange(2))
    state = algorithm.init(jax.random.key(1))
    for key in jax.random.split(jax.random.key(1), 2):
        state, _ = algorithm.round(key, state, cohort)
    close(jax.tree.map(lambda x: x[1], states.params), state.params)


def test_dropout_differs_between_keys_clients_and_steps():
    class Dropped(nnx.Module):
        def __init__(self, rngs):
            self.weight = nnx.Param(jnp.ones(64))
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(x * self.weight)

    model = fl.nnx_model(Dropped, lambda predictions, batch: predictions.sum(1))
    clients = {i: {"x": np.ones((1, 64), np.float32)} for i in range(6)}
    cohort = everyone(fl.FederatedDataset.from_clients(clients).resident(fl.clients_mesh(1)))

    algorithm = fl.fed_avg(
        model, optax.sgd(0.0), num_steps=2, batch_size=1, mesh=fl.clients_mesh(1)
    )
    state = algorithm.init(jax.random.key(0))
    run = jax.vmap(lambda key: algorithm.round(key, state, cohort)[1].clients["loss"])
    losses = np.asarray(run(jax.random.split(jax.random.key(1), 50)))  # [keys, clients]
    # Twice the survivors of 64 has mean and variance 64; the mean of two independent steps has
    # half that variance, and the correlation of two clients over 50 keys a deviation of 1/7.
    assert abs(losses.mean() - 64) < 5 * np.sqrt(32 / losses.size)
    assert abs(losses.var() - 32) < 5 * 32 * np.sqrt(2 / losses.size)
    assert abs(np.corrcoef(losses.T) - np.eye(6)).max() < 5 / 7
    batch = {"x": np.ones((2, 64), np.float32), "mask": np.ones(2, bool)}
    assert jax.jit(model.metrics)(state.params, {}, batch)["loss"].tolist() == [64, 64]


@pytest.mark.parametrize("batch_size", [20, 32])
def test_padding_does_not_enter_batch_statistics(batch_size):
    dataset = regression_dataset([20])
    algorithm = fl.fed_sgd(
        normalised(), optax.sgd(0.1), batch_size=batch_size, mesh=fl.clients_mesh(1)
    )
    cohort = everyone(dataset.resident(fl.clients_mesh(1)))
    state, _ = algorithm.round(jax.random.key(0), algorithm.init(jax.random.key(0)), cohort)
    x = dataset.examples["x"]
    statistics = state.model_state["norm"]
    np.testing.assert_allclose(statistics["mean"], x.mean(0) / 2, rtol=1e-5)  # momentum 0.5
    np.testing.assert_allclose(statistics["var"], (1 + x.var(0)) / 2, rtol=1e-5)


class Normalising(nnx.Module):
    """Of images, with the mask in some shape."""

    def __init__(self, rngs, shape):
        self.norm, self.shape = nnx.BatchNorm(2, rngs=rngs), shape
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(18, 1, rngs=rngs)

    def __call__(self, x, mask=None):
        mask = None if self.shape is None else mask.reshape(self.shape)
        x = self.norm(self.dropout(x), mask=mask)
        return self.dense(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((-1, 1, 1, 1), None),
        (None, "module Normalising has batch statistics, norm.mean, that depend on an example"),
        ((-1, 1), "norm.mean, that depend on an example which the mask leaves out; hand the mask"),
        ((-1,), "module Normalising failed on a batch with a mask"),
    ],
)
def test_batch_statistics_must_heed_the_mask(shape, message):
    model = fl.nnx_model(lambda rngs: Normalising(rngs, shape), lambda p, batch: p[:, 0])
    algorithm = fl.fed_avg(model, optax.sgd(0.1))
    dataset = fl.FederatedDataset.from_clients([{"x": np.zeros((3, 3, 3, 2), np.float32)}])
    cohort = fl.cohort_of(dataset.resident(), [0])
    state = algorithm.init(jax.random.key(0))
    # Where rounds are traced: within `jit`, `shard_map`, `vmap` and `grad`.
    run = lambda: jax.eval_shape(algorithm.round, jax.random.key(0), state, cohort)
    if message is None:
        run()
        batch = {"x": np.zeros((5, 3, 3, 2), np.float32), "mask": np.ones(5, bool)}
        with mock.patch.object(modules, "require_masked_statistics", side_effect=AssertionError):
            jax.jit(model.loss)(state.params, state.model_state, batch, jax.random.key(1))
    else:
        with pytest.raises(ValueError, match=message):
            run()


def test_what_is_state_and_what_is_not():
    class Sown(Normalised):
        def __call__(self, x, *, train, deterministic, rngs, mask):
            assert train is not deterministic
            self.sow(nnx.Intermediate, "hidden", x)
            self.table = x
            return super().__call__(x + jax.random.normal(rngs.noise(), x.shape), mask=mask)

    model = fl.nnx_model(Sown, squared)
    params, model_state = jax.jit(model.init)(jax.random.key(0))
    assert jax.tree.map(jnp.shape, model_state) == {"norm": {"mean": (3,), "var": (3,)}}
    assert jax.tree.map(jnp.shape, params["layers"][1]) == {"bias": (1,), "kernel": (4, 1)}
    batch = {"x": np.ones((4, 3), np.float32), "y": np.ones(4), "mask": np.ones(4, bool)}
    loss = jax.jit(jax.vmap(functools.partial(model.loss, params, model_state, batch)))
    with pytest.warns(DeprecationWarning, match="sow"):
        (first, second), after = loss(jax.random.split(jax.random.key(0), 2))
    assert jax.tree.structure(after) == jax.tree.structure(model_state)
    assert (first != second).all()


def test_a_trained_module_is_where_training_starts():
    trained = Normalised(nnx.Rngs(7))
    model = fl.nnx_model(lambda rngs: trained, squared)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(trained, nnx.Param)))
    params, model_state = jax.jit(model.init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, before)
    train(model, params, model_state, rounds=1)
    after = nnx.to_pure_dict(nnx.state(trained, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_layers_under_vmap_have_streams_of_their_own():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=5)
            @nnx.vmap
            def stacked(rngs):
                return nnx.Dropout(0.5, rngs=rngs)

            self.weight = nnx.Param(jnp.ones(64))
            self.dropout = stacked(rngs)

        def __call__(self, x):
            return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.dropout, x)

    model = fl.nnx_model(Stack, lambda predictions, batch: predictions[:, 0].sum(1))
    params, model_state = jax.jit(model.init)(jax.random.key(0))
    batch = {"x": np.ones((5, 64), np.float32), "mask": np.ones(5, bool)}
    losses, _ = jax.jit(model.loss)(params, model_state, batch, jax.random.key(0))
    assert len(set(losses.tolist())) > 1


def test_params_of_another_structure_are_refused():
    model = normalised()
    params, model_state = jax.jit(model.init)(jax.random.key(0))
    for tree, state in [(params, {}), (as_linen(params, model_state)[0], model_state)]:
        with pytest.raises(ValueError, match="params and model_state have the structure"):
            train(model, tree, state)


def test_what_is_no_module_to_train_is_refused():
    class Careless(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            return self.norm(x)

    with pytest.raises(ValueError, match=r"Careless has batch statistics, .* add mask=None"):
        fl.nnx_model(Careless, squared)
    with pytest.raises(TypeError, match=r"create is a module, a Linear; .* lambda rngs: Linear\("):
        fl.nnx_model(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), squared)
    with pytest.raises(TypeError, match=r"what create.* returned is of type Rngs; pass a Module"):
        fl.nnx_model(lambda rngs: rngs, squared)


def test_modules_of_several_inputs():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(2, 1, rngs=rngs)

        def __call__(self, first, second):
            return self.layer(first) - second

    batch = {"a": np.ones((3, 2)), "b": np.ones((3, 1)), "mask": np.ones(3, bool)}
    create = lambda rngs: Two(rngs)
    predicted = []
    for inputs in (("a", "b"), {"second": "b", "first": "a"}):
        model = fl.nnx_model(create, squared, inputs=inputs)
        predicted.append(jax.jit(model.predict)(*jax.jit(model.init)(jax.random.key(0)), batch))
    np.testing.assert_array_equal(*predicted)
    assert predicted[0].shape == (3, 1)
