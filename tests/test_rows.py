"""Rows that are kept flat, as on TPUs: rounds and readers see no difference."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lite as fl
from fedjax_lite.engine import store
from fedjax_lite.runs.identity import digest
from fedjax_lite.xla import rows
from fedjax_lite.xla.rows import Rows, in_rows, wants_flat

TPU = types.SimpleNamespace(platform="tpu")


@pytest.fixture
def flattening(monkeypatch):
    """Devices do not keep rows apart."""
    monkeypatch.setattr(rows, "_keeps_rows_apart", lambda device: False)


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        ([(28, 28, 1), ()], True),
        ([(784, 10), (10,)], True),  # Of 7850 entries in all, 8064.
        ([(20,), (20,)], False),  # Six times as much.
        ([()], False),
        ([(3, 0)], False),
        ([], False),
    ],
)
def test_what_pads_little_is_flat_where_rows_are_not_apart(dims, expected, flattening):
    row = [jax.ShapeDtypeStruct(shape, np.float32) for shape in dims]
    assert wants_flat(row, TPU) == expected


def test_where_rows_are_apart_arrays_stay_as_they_are():
    x = np.ones((5, 28, 28))
    assert in_rows({"x": x}, jax.devices()[0])["x"] is x


def test_rows_are_those_of_the_array(flattening):
    x = np.arange(5 * 100, dtype=np.float32).reshape(5, 10, 10)
    kept = jax.device_put(in_rows({"x": x}, TPU)["x"])
    assert isinstance(kept, Rows)
    assert (kept.shape, kept.dtype, kept.flat.shape) == (x.shape, x.dtype, (5, 128))
    for index in (2, np.array([[4, 0]]), slice(1, 3)):
        np.testing.assert_array_equal(kept[index], x[index])
        assert digest(kept[index]) == digest(x[index])
    np.testing.assert_array_equal(kept, x)
    total = lambda kept: kept[np.array([1, 1])].sum()
    assert jax.grad(total)(kept).flat.sum() == 200


def test_wide_rows_are_read_one_by_one(monkeypatch):
    monkeypatch.setattr(rows, "_WIDEST", 100)
    x = np.random.default_rng(0).normal(size=(5, 10, 20)).astype(np.float32)
    kept = jax.device_put(Rows(rows.pack_row(x, 1), (10, 20)))
    index = jnp.array([[4, 0], [1, 1]])
    read = jax.jit(lambda kept, index: kept[index])
    mapped = jax.jit(jax.vmap(read, (None, 0)))
    for some in (read, mapped):
        np.testing.assert_array_equal(some(kept, index), x[index])
        assert "gather" not in some.lower(kept, index).as_text()
    np.testing.assert_array_equal(read(kept, 3), x[3])
    both = jax.tree.map(lambda flat: jnp.stack([flat, -flat]), kept)
    signed = np.stack([x[index[0]], -x[index[1]]])
    np.testing.assert_array_equal(jax.vmap(read)(both, index), signed)
    gradient = jax.grad(lambda kept: (mapped(kept, index) ** 2).sum())(kept)
    expected = 2 * x * np.array([1, 2, 0, 0, 1])[:, None, None]
    np.testing.assert_allclose(gradient[:], expected, rtol=1e-6)


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("shuffle", [False, True, "wide"])
def test_a_round_reads_them_as_any_others(shuffle, lanes, monkeypatch):
    if shuffle == "wide":
        monkeypatch.setattr(rows, "_WIDEST", 64)
    rng = np.random.default_rng(0)
    clients = [
        {"x": rng.normal(size=(n, 10, 10)).astype(np.float32), "y": np.arange(n, dtype=np.int32)}
        for n in (3, 7, 0, 5)
    ]
    clients.append({"x": np.full((2, 10, 10), np.nan, np.float32), "y": np.zeros(2, np.int32)})
    dataset = fl.FederatedDataset.from_clients(clients)
    model = fl.function_model(lambda w, batch: (batch["x"].sum(1) @ w - batch["y"]) ** 2)
    mesh = fl.clients_mesh(1)
    algorithm = fl.fed_avg(
        model, optax.sgd(0.01), batch_size=4, shuffle=bool(shuffle), lanes=lanes, mesh=mesh
    )
    states = []
    for apart in (True, False):
        monkeypatch.setattr(rows, "_keeps_rows_apart", lambda device, apart=apart: apart)
        resident, streamed = dataset.resident(mesh), dataset.streamed(4, mesh=mesh)
        assert isinstance(resident.examples["x"], Rows) != apart
        assert (
            repr(resident)
            == "ResidentPopulation(5 clients, 17 examples, x: float32[10, 10], y: int32)"
        )
        for population in (resident, streamed):
            cohort = fl.cohort_of(population, [0, 1, 2, 3])
            state = algorithm.init(jnp.zeros(10))
            states.append(algorithm.round(jax.random.key(0), state, cohort)[0].params)
    assert jnp.isfinite(states[0]).all()
    assert (states[0] != 0).all()
    for other in states[1:]:
        np.testing.assert_allclose(other, states[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("num_devices", "lanes", "memory_kind", "widest"),
    [
        (1, 1, "device", 2**15),
        (1, 3, "pinned_host", 2**15),
        (2, 2, "device", 2**15),
        (1, 3, "device", 64),
    ],
)
def test_what_clients_keep_is_the_same_in_rows(
    num_devices, lanes, memory_kind, widest, monkeypatch
):
    monkeypatch.setattr(rows, "_WIDEST", widest)
    if num_devices > jax.device_count():
        pytest.skip("needs several devices")
    rng = np.random.default_rng(0)
    dataset = fl.FederatedDataset.from_clients(
        [{"x": rng.normal(size=(n, 100)), "y": rng.normal(size=n)} for n in (3, 7, 1, 5, 0, 2)]
    )
    loss = lambda params, batch: (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2
    mesh = fl.clients_mesh(num_devices)
    monkeypatch.setattr(store, "_LEAST_SPREAD_BYTES", 1)  # Each of two has its share.
    how = {"batch_size": 2, "lanes": lanes, "mesh": mesh, "memory_kind": memory_kind}
    algorithm = fl.scaffold(fl.function_model(loss), optax.sgd(0.001), **how)
    population = dataset.resident(mesh)
    results = []
    for apart in (True, False):
        monkeypatch.setattr(rows, "_keeps_rows_apart", lambda device, apart=apart: apart)
        state = algorithm.init({"w": jnp.zeros(100), "b": jnp.zeros(())}, num_clients=6)
        assert isinstance(state.store["w"], Rows) != apart
        for r, ids in enumerate(([0, 1, 3, 4], [5, 1, 2, -1])):
            key = jax.random.key(r)
            state, _ = algorithm.round(key, state, fl.cohort_of(population, ids))
        results.append((state.params, jax.tree.map(np.asarray, dict(state.store), is_leaf=is_rows)))
    assert results[0][1]["w"][:4].all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), *results)


def is_rows(x):
    return isinstance(x, Rows)
