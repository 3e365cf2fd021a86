"""The runner as clients see it: which examples, how often, in which order of clients."""

import dataclasses
import functools
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from problems import everyone, regression_dataset, regression_model

import fedjax_lite as fl
from fedjax_lite.engine.execution import Execution, choose_lanes

ROWS, CLIENTS = 40, 9


@functools.cache
def counting(lanes, batch_size, num_devices):
    """The server's params are the number of times that each row was seen."""

    def init(server, client):
        return jnp.zeros(ROWS)

    def step(server, client, counts, batch, key):
        return counts.at[batch["row"]].add(batch["mask"])

    def final(server, client, counts):
        return fl.ClientResult(counts, 1.0)

    return fl.federated_algorithm(
        fl.function_model(lambda params, batch: params),
        fl.ClientUpdate(init, step, final),
        optax.sgd(-1.0),
        reducer=fl.weighted_mean(denominator=1.0),
        batch_size=batch_size,
        num_epochs=2,
        lanes=lanes,
        mesh=fl.clients_mesh(num_devices),
    )


# Lanes, batch size and devices: each pair of two of them is there.
LAYOUTS = [(1, 7, 1), (1, 100, 8), (3, 7, 8), (3, 100, 1), (64, 7, 8), (64, 100, 1)]


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@settings(max_examples=40, deadline=None)
@given(
    ends=st.lists(st.integers(0, ROWS), min_size=CLIENTS - 1, max_size=CLIENTS - 1),
    layout=st.sampled_from(LAYOUTS),
    present=st.sets(st.integers(0, CLIENTS - 1), min_size=1),
    streamed=st.booleans(),
)
@example([0] * (CLIENTS - 1), (3, 7, 8), {CLIENTS - 1}, False)  # one client has everything
@example([0] * (CLIENTS - 1), (3, 7, 8), {0, 1}, False)  # nobody in the cohort has anything
def test_each_example_is_used_once_per_epoch(ends, layout, present, streamed):
    lanes, batch_size, num_devices = layout
    parts = np.split(np.arange(ROWS), np.sort(ends))
    dataset = fl.FederatedDataset.from_rows({"row": np.arange(ROWS)}, parts)
    algorithm = counting(lanes, batch_size, num_devices)
    mesh = fl.clients_mesh(num_devices)
    if streamed:  # with room for all rows on each device, whoever owns them
        population = dataset.streamed(CLIENTS, mesh=mesh)
        population = dataclasses.replace(population, row_capacity=ROWS)
        cohort = fl.cohort_of(population, sorted(present))
    else:
        cohort = everyone(dataset.resident(mesh), sorted(present), capacity=CLIENTS)
    start = algorithm.init(np.zeros(ROWS, np.float32))
    state, info = jax.device_get(algorithm.round(jax.random.key(0), start, cohort))
    expected = np.zeros(ROWS)
    for i in present:
        expected[parts[i]] = 2
    np.testing.assert_array_equal(state.params, expected)
    assert info.num_examples == expected.sum()
    assert info.skipped == (expected.sum() == 0)
    assert np.isnan(info.loss)  # these clients report none


@pytest.mark.parametrize(
    ("platform", "stats", "capacity", "expected"),
    [
        ("cpu", None, 1000, 1),
        ("gpu", None, 1000, 64),  # It does not tell.
        ("gpu", {"bytes_limit": 80 * 2**30}, 1000, 64),
        ("gpu", {"bytes_limit": 11 * 2**20}, 1000, 5),  # 4 x 256 kB a lane, in half of it.
        ("tpu", {"bytes_limit": 1}, 1000, 1),
        ("gpu", {}, 7, 4),  # 7 clients on two devices.
    ],
)
def test_lanes_are_many_where_they_fill_the_chip_and_fit_it(platform, stats, capacity, expected):
    device = types.SimpleNamespace(platform=platform, memory_stats=lambda: stats)
    mesh = types.SimpleNamespace(devices=np.array([device] * 2), local_devices=[device] * 2)
    params = {"w": jnp.zeros((256, 256)), "key": jax.random.key(0)}
    assert choose_lanes(Execution(mesh=mesh), params, capacity) == expected
    assert choose_lanes(Execution(3, mesh), params, capacity) == 3


def custom(init=None, step=None, final=None, entry=None, **options):
    """An algorithm that does nothing, but for what is given."""
    return fl.federated_algorithm(
        regression_model(),
        fl.ClientUpdate(
            init or (lambda server, client: server.params),
            step or (lambda server, client, state, batch, key: state),
            final or (lambda server, client, state: sent(state)),
            entry=entry,
        ),
        optax.sgd(1.0),
        mesh=fl.clients_mesh(1),
        **options,
    )


def sent(update, weight=1.0, metrics=None, model_state=None, **kept):
    return fl.ClientResult(update, weight, metrics or {}, model_state, **kept)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(eq=False)
class Own:
    """A node of a user's own, no two of which are equal."""

    params: Any


def one_round(algorithm):
    state = algorithm.init(jax.random.key(0), num_clients=10)
    cohort = everyone(regression_dataset().resident(fl.clients_mesh(1)))
    return algorithm.round(jax.random.key(1), state, cohort)


@pytest.mark.parametrize("lanes", [1, 3])
def test_client_states_may_hold_numbers_keys_and_nodes(lanes):
    algorithm = custom(
        init=lambda server, client: (Own(server.params), 0, client.key, client.entry),
        step=lambda server, client, state, batch, key: (
            Own(state[0].params),
            state[1] + 1,
            key,
            state[3] / 2,
        ),
        final=lambda server, client, state: sent(
            state[0].params, 1, {"steps": state[1]}, entry=state[3]
        ),
        entry=lambda server: 1.0,
        batch_size=2,
        lanes=lanes,
    )
    state, info = one_round(algorithm)
    np.testing.assert_array_equal(info.clients["steps"], info.clients["num_steps"])
    np.testing.assert_array_equal(state.store, 0.5 ** info.clients["num_steps"])


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        (
            {"step": lambda server, client, state, batch, key: state["w"]},
            ValueError,
            r"what client_update.step returned is float32\[3\], in place of .*'w'.*; return a cl",
        ),
        (
            {
                "step": lambda server, client, state, batch, key: jax.tree.map(
                    lambda x: x[None], state
                )
            },
            ValueError,
            r"client_update.step returned is .*float32\[1, 3\]",
        ),
        (
            {"final": lambda server, client, state: (state, 1.0, {}, {})},
            TypeError,
            "what client_update.final returned is of type tuple; pass a ClientResult",
        ),
        (
            {"final": lambda server, client, state: sent(state, jnp.ones(2))},
            ValueError,
            "the weight of client_update.final is .*; return a scalar",
        ),
        (
            {"final": lambda server, client, state: sent(state["w"])},
            ValueError,
            r"the update of client_update.final is \[3\], in place of .*; return a difference",
        ),
        (
            {"final": lambda server, client, state: sent(state, model_state={"n": 1.0})},
            ValueError,
            r"the model_state of client_update.final is .*, in place of \{\}; return",
        ),
        (
            {"final": lambda server, client, state: sent(state, metrics={"weight": 1.0})},
            ValueError,
            "the metrics of client_update.final have 'weight', which every algorithm reports",
        ),
    ],
)
def test_what_a_client_update_returns_is_checked(parts, error, message):
    with pytest.raises(error, match=message):
        one_round(custom(**parts))


def test_a_round_traces_what_a_client_does_once():
    calls = []

    def loss(w, batch):
        calls.append("loss")
        return (w - batch["x"]) ** 2

    dataset = fl.FederatedDataset.from_clients({"a": {"x": [1.0, 5.0]}, "b": {"x": [3.0]}})
    algorithm = fl.fed_avg(fl.function_model(loss), optax.sgd(0.1), num_epochs=2)
    cohort = fl.cohort_of(dataset.resident(), [0, 1])
    algorithm.round.trace(jax.random.key(0), algorithm.init(jnp.float32(0)), cohort)
    assert calls == ["loss"]


def test_metrics_of_clients_are_numbers():
    update = fl.ClientUpdate(
        init=lambda server, client: server.params,
        step=lambda server, client, w, batch, key: w,
        final=lambda server, client, w: fl.ClientResult(w, 1.0, {"kind": "slow"}),
    )
    model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2)
    algorithm = fl.federated_algorithm(model, update, optax.sgd(1.0))
    dataset = fl.FederatedDataset.from_clients({"a": {"x": [1.0]}})
    cohort = fl.cohort_of(dataset.resident(), [0])
    with pytest.raises(TypeError, match=r"final\['kind'\] is 'slow'; report numbers"):
        algorithm.round.trace(jax.random.key(0), algorithm.init(jnp.float32(0)), cohort)


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_client_knows_who_it_is(lanes):
    """Its id, its numbers of examples and steps, a key of its own, and what it kept."""
    told = lambda client: {
        "id": client.id,
        "own_examples": client.num_examples,
        "own_steps": client.num_steps,
        "drawn": jax.random.bits(client.key, dtype=jnp.uint32) % 65536,
        "kept": client.entry,
    }
    algorithm = custom(
        init=lambda server, client: (server.params, told(client)),
        step=lambda server, client, state, batch, key: (
            state[0],
            jax.tree.map(jnp.maximum, state[1], told(client)),
        ),
        final=lambda server, client, state: sent(
            state[0],
            1.0,
            {
                **told(client),
                "same": jnp.all(
                    jnp.stack(
                        jax.tree.leaves(jax.tree.map(lambda x, y: x == y, state[1], told(client)))
                    )
                ),
            },
            entry=client.entry + client.id,
        ),
        entry=lambda server: jnp.int32(1),
        batch_size=2,
        lanes=lanes,
    )
    state, info = one_round(algorithm)
    ids = np.arange(10)
    trained = np.array(info.clients["num_steps"]) > 0
    assert info.clients["client_id"].tolist() == ids.tolist()
    for name, expected in (
        ("id", ids),
        ("own_examples", info.clients["num_examples"]),
        ("own_steps", info.clients["num_steps"]),
        ("kept", np.ones(10)),
        ("same", np.ones(10)),
    ):
        np.testing.assert_array_equal(info.clients[name], np.where(trained, expected, 0))
    assert len(set(info.clients["drawn"][trained].tolist())) == trained.sum()
    np.testing.assert_array_equal(state.store, np.where(trained, 1 + ids, 1))


def test_what_clients_report_is_a_number_of_the_round():
    """Scalars as means over the examples of clients that count; arrays stay with the clients."""
    algorithm = custom(
        final=lambda server, client, state: sent(
            jax.tree.map(lambda x: jnp.where(client.id == 3, jnp.nan, x), state),
            1.0,
            {"id": client.id, "both": jnp.ones(2), "loss": 1.0 * client.id},
        ),
        batch_size=2,
    )
    _, info = one_round(algorithm)
    ids, sizes = np.arange(10), np.array(info.clients["num_examples"])
    counts = np.where(ids == 3, 0, sizes)
    expected = (ids * counts).sum() / counts.sum()
    assert set(info.metrics) == {"id"}
    np.testing.assert_allclose(info.metrics["id"], expected, rtol=1e-6)
    np.testing.assert_allclose(info.loss, expected, rtol=1e-6)
    assert info.clients["both"].shape == (10, 2)


def test_a_model_state_that_is_left_alone_stays():
    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, x, *, train, mask=None):
            return nn.BatchNorm(use_running_average=not train)(x, mask=mask[:, None])

    model = fl.linen_model(Normalised(), jnp.zeros((1, 3)), lambda p, batch: p.sum(1))
    update = fl.ClientUpdate(
        init=lambda server, client: server.params,
        step=lambda server, client, state, batch, key: state,
        final=lambda server, client, state: fl.ClientResult(state, 1.0),
    )
    algorithm = fl.federated_algorithm(model, update, optax.sgd(0.0), mesh=fl.clients_mesh(1))
    dataset = fl.FederatedDataset.from_clients([{"x": np.ones((3, 3), np.float32)}])
    state = algorithm.init(jax.random.key(0))
    cohort = fl.cohort_of(dataset.resident(fl.clients_mesh(1)), [0])
    after, _ = algorithm.round(jax.random.key(1), state, cohort)
    jax.tree.map(np.testing.assert_array_equal, after.model_state, state.model_state)


@pytest.mark.parametrize("factory", [fl.fed_sgd, fl.fed_avg])
@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_no_batch_is_larger_than_a_client(factory, kind):
    dataset, model, sizes = regression_dataset((70, 100, 0, 60)), regression_model(), set()

    def loss(params, model_state, batch, key):
        sizes.add(batch["x"].shape[0])
        return model.loss(params, model_state, batch, key)

    mesh, all_ = fl.clients_mesh(1), 2**31 - 1
    algorithm = factory(model._replace(loss=loss), optax.sgd(0.1), batch_size=all_, mesh=mesh)
    population = dataset.resident(mesh) if kind == "resident" else dataset.streamed(4, mesh=mesh)
    cohort = fl.cohort_of(population, np.arange(4))
    assert cohort.examples["x"].shape[0] > 128
    key = jax.random.key(0)
    jax.eval_shape(algorithm.round, key, algorithm.init(key), cohort)
    # The power of two above the 100 examples of the largest: others of about its size are alike.
    assert sizes == {128}
