"""Steps that do not depend on each other, run side by side as on accelerators."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import everyone, regression_dataset, regression_model

import fedjax_lite as fl
from fedjax_lite.engine import execution
from fedjax_lite.engine.execution import Execution, choose_steps
from fedjax_lite.xla.memory import computed_bytes


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, *, train, mask):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(
            nn.Dense(4)(x), mask=mask[:, None]
        )
        return nn.Dense(1)(x)[:, 0]


def normalised():
    squared = lambda predictions, batch: (predictions - batch["y"]) ** 2
    return fl.linen_model(Normalised(), jnp.zeros((1, 3)), squared)


def dropping():
    """Features left out at random, and a loss without a value where all are padding."""

    def loss(params, model_state, batch, key):
        x = jnp.where(jax.random.bernoulli(key, 0.5, batch["x"].shape), batch["x"], 0)
        mask = batch["mask"]
        centred = x - jnp.where(mask[:, None], x, 0).sum(0) / mask.sum()
        return (centred @ params["w"] + params["b"] - batch["y"]) ** 2, model_state

    return regression_model()._replace(loss=loss)


def rows(dataset):
    """What each client has."""
    ends = zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True)
    return [{name: x[a:b] for name, x in dataset.examples.items()} for a, b in ends]


def poisoned(sizes, own):
    """A data set in whose other clients nothing is a number."""
    clients = rows(regression_dataset(sizes))
    for i in set(range(len(sizes))) - set(own):
        clients[i] = {name: np.full_like(x, np.nan) for name, x in clients[i].items()}
    return fl.FederatedDataset.from_clients(clients)


ALGORITHMS = {
    "mean": lambda **how: fl.fed_sgd(regression_model(), optax.adam(0.1), **how),
    "sum": lambda **how: fl.fed_sgd(dropping(), optax.sgd(0.1), reduction="sum", **how),
    "BatchNorm": lambda **how: fl.fed_sgd(normalised(), optax.sgd(0.1), **how),
    "pipeline": lambda **how: fl.fed_sgd(
        regression_model(),
        optax.sgd(0.1),
        pipeline=fl.chain(fl.clip_by_norm(1.0), fl.error_feedback(fl.quantize_uniform(16))),
        **how,
    ),
    "statistics": lambda **how: fl.mime(
        regression_model(), optax.sgd(0.1, momentum=0.9), num_steps=2, **how
    ),
}


# With 16 lanes, all clients are in one wave; with 64 steps at once, in one turn, without a loop.
@pytest.mark.parametrize(
    ("name", "lanes", "most"),
    [*((name, 3, 3) for name in ALGORITHMS), ("sum", 16, 3), *((n, 16, 64) for n in ALGORITHMS)],
)
def test_steps_side_by_side_give_what_they_give_in_turn(name, lanes, most, monkeypatch):
    sizes = (7, 5, 0, 1, 5, 12, 3, 5, 2)
    own = [0, 2, 3, 5, 6, 8]  # The others' rows are next to theirs.
    population = poisoned(sizes, own).resident(fl.clients_mesh(1))
    cohort = fl.cohort_of(population, [*own, -1], max_steps=[9, 9, 9, 4, 9, 9, 9])
    monkeypatch.setattr(execution, "_MOST_STEPS", most)
    results = []
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(execution, "_platform", lambda _, platform=platform: platform)
        how = {"batch_size": 2, "lanes": lanes, "mesh": fl.clients_mesh(1)}
        algorithm = ALGORITHMS[name](**how)
        state = algorithm.init(jax.random.key(0), num_clients=len(sizes))
        results.append(algorithm.round(jax.random.key(1), state, cohort))
    in_turn, side_by_side = results
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(in_turn[0].params))
    # Of the twelve examples of one client, eight are seen.
    assert side_by_side[1].clients["num_steps"].tolist()[:6] in (
        [4, 0, 1, 4, 2, 1],
        [2, 0, 2, 2, 2, 2],
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), *results)


def test_padding_that_a_generator_draws_adds_nothing_side_by_side(monkeypatch):
    def sample(key, client_id):
        x = jnp.where(jnp.arange(4)[:, None] < 3, jax.random.normal(key, (4, 3)), jnp.nan)
        return {"x": x, "y": x[:, 0]}

    population = fl.data.GeneratedPopulation(
        num_clients=5, num_examples=lambda key, client_id: jnp.int32(3), sample=sample
    )
    cohort = fl.cohort(jax.random.key(2), population, 3, capacity=4)
    results = []
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(execution, "_platform", lambda _, platform=platform: platform)
        algorithm = ALGORITHMS["mean"](lanes=4, mesh=fl.clients_mesh(1))
        state = algorithm.init(jax.random.key(0))
        results.append(algorithm.round(jax.random.key(1), state, cohort))
    assert results[0][1].num_nonfinite == 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), *results)


@pytest.mark.parametrize("lanes", [1, 4])
def test_each_step_is_taken_once_with_its_own_batch_and_key(lanes, monkeypatch):
    def told(batch, key):
        return jnp.array([1, jnp.where(batch["mask"], batch["x"][:, 0], 0).sum()]), key

    def step(server, client, state, batch, key):
        values, key = told(batch, key)
        return state + jnp.append(values, jax.random.uniform(key))

    def steps(server, client, state, batches, keys, taken):
        assert taken.shape == keys.shape == (3,)
        each = jax.vmap(lambda batch, key: step(server, client, 0 * state, batch, key))
        return state + jnp.where(taken[:, None], each(batches, keys), 0).sum(0)

    update = fl.ClientUpdate(
        lambda server, client: jnp.zeros(3),
        step,
        lambda server, client, state: fl.ClientResult(
            server.params, 1.0, {"count": state[0], "x": state[1], "drawn": state[2]}
        ),
        steps=steps,
    )
    monkeypatch.setattr(execution, "_MOST_STEPS", 3)
    dataset = regression_dataset()
    told_by = {}
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(execution, "_platform", lambda _, platform=platform: platform)
        mesh = fl.clients_mesh(1)
        algorithm = fl.federated_algorithm(
            *(regression_model(), update, optax.sgd(0.0)), batch_size=2, lanes=lanes, mesh=mesh
        )
        cohort = everyone(dataset.resident(mesh))
        _, info = algorithm.round(jax.random.key(1), algorithm.init(jax.random.key(0)), cohort)
        told_by[platform] = info.clients
    sizes = np.diff(dataset.offsets)
    np.testing.assert_array_equal(told_by["gpu"]["count"], -(-sizes // 2))
    sums = [client["x"][:, 0].sum() for client in rows(dataset)]
    np.testing.assert_allclose(told_by["gpu"]["x"], sums, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(told_by["gpu"]["drawn"], told_by["cpu"]["drawn"], rtol=1e-6)


@pytest.mark.parametrize(
    ("platform", "stats", "options", "most_steps", "expected"),
    [
        ("cpu", None, {}, 9, 1),
        ("gpu", None, {}, None, 16),  # It does not tell.
        ("gpu", None, {}, 9, 9),
        ("gpu", None, {"differentiable": True}, 9, 1),
        ("gpu", {"bytes_limit": 80 * 2**30}, {}, None, 16),
        ("gpu", {"bytes_limit": 80 * 2**30}, {}, 0, 1),
        ("gpu", {"bytes_limit": 41 * 2**20}, {}, 9, 5),  # Of 1 MiB in an eighth of it.
        ("tpu", {"bytes_limit": 1}, {}, 9, 1),
    ],
)
def test_steps_are_many_where_they_fit_and_no_more_than_there_are(
    platform, stats, options, most_steps, expected
):
    device = types.SimpleNamespace(platform=platform, memory_stats=lambda: stats)
    mesh = types.SimpleNamespace(devices=np.array([device]), local_devices=[device])
    assert choose_steps(Execution(4, mesh, **options), most_steps, lambda: 2**18) == expected


def test_what_a_function_computes_is_counted_in_what_it_calls():
    def compute(x):  # A sum, a product in a loop, and the counter and the test of the loop.
        return jax.lax.fori_loop(0, 5, lambda i, y: y * y, jax.jit(lambda x: x + 1)(x))

    x = jax.ShapeDtypeStruct((100,), np.float32)
    total = computed_bytes(compute, x)
    assert 4 * 400 <= total <= 4 * 400 + 32  # What calls and loops return counts as well.
