"""What clients keep between rounds."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import SIZES, everyone, regression_dataset, regression_model

import fedjax_lite as fl

eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


def diary(forget=False, **options):
    """Clients count their rounds and keep the sum of the targets that they have seen."""

    def init(server, client):
        return jnp.zeros(3)

    def step(server, client, seen, batch, key):
        return seen + jnp.where(batch["mask"][:, None], batch["y"][:, None] + batch["x"], 0).sum(0)

    def final(server, client, seen):
        kept = {
            "rounds": client.entry["rounds"] + 1,
            "seen": client.entry["seen"] + seen,
        }
        update = {"w": seen, "b": kept["rounds"].astype(jnp.float32)}
        return fl.ClientResult(update, 1.0, entry={} if forget else kept)

    return fl.federated_algorithm(
        regression_model(),
        fl.ClientUpdate(
            init,
            step,
            final,
            entry=lambda server: {"rounds": jnp.int32(0), "seen": jnp.zeros(3)},
        ),
        optax.sgd(0.1),
        **{"batch_size": 4, "mesh": fl.clients_mesh(1), **options},
    )


def run(algorithm, dataset, orders, mesh=None):
    population = dataset.resident(mesh or fl.clients_mesh(1))
    state = algorithm.init(jax.random.key(0), num_clients=dataset.num_clients)
    for r, order in enumerate(orders):
        cohort = everyone(population, order, capacity=9)
        state, info = algorithm.round(jax.random.key(r), state, cohort)
    return state, jax.device_get(info)


def expected_store(dataset, orders):
    """The same in NumPy, a client at a time."""
    rounds, seen = np.zeros(10, np.int32), np.zeros((10, 3))
    for i in (i for order in orders for i in order if SIZES[i]):
        rounds[i] += 1
        seen[i] += (dataset[i]["y"][:, None] + dataset[i]["x"]).sum(0)
    return {"rounds": rounds, "seen": seen}


ORDERS = [[3, 0, 9, 1], [8, 3, 2, 7, 6, 5, 0, 4, 1], [3], [4, 9, 1, 0, 2]]


@pytest.fixture(params=[0, 2**28], ids=["spread", "copied"])
def spread(request, monkeypatch):
    """Whether stores are spread over devices, were they large or not."""
    monkeypatch.setattr("fedjax_lite.engine.store._LEAST_SPREAD_BYTES", request.param)
    return request.param == 0


# A number of devices that does not divide 10 has copies in any case.
@eight_devices
@pytest.mark.parametrize("memory_kind", ["device", "pinned_host"])
@pytest.mark.parametrize(
    ("spread", "lanes", "num_devices", "share"),
    [
        (0, 64, 1, 10),
        (0, 3, 2, 5),
        (2**28, 3, 2, 10),
        (0, 1, 4, 10),
        (0, 2, 5, 2),
        (0, 2, 8, 10),
    ],
    indirect=["spread"],
)
def test_entries_are_read_and_written_by_client_id(spread, lanes, num_devices, share, memory_kind):
    mesh, dataset = fl.clients_mesh(num_devices), regression_dataset()
    algorithm = diary(lanes=lanes, mesh=mesh, memory_kind=memory_kind)
    start = algorithm.init(jax.random.key(0), num_clients=10)
    after, _ = run(algorithm, dataset, ORDERS, mesh)
    assert algorithm.round._cache_size() == 1
    for state in (start, after):
        shards = state.store["seen"].addressable_shards
        assert [shard.data.shape for shard in shards] == [(share, 3)] * num_devices
        assert {x.sharding.memory_kind for x in state.store.values()} == {memory_kind}
    store = jax.device_get(after.store)
    chex.assert_trees_all_close(store, expected_store(dataset, ORDERS), rtol=1e-5)


@eight_devices
@pytest.mark.parametrize(
    ("num_devices", "lanes", "most_bytes"), [(2, 1, 1), (5, 2, 1), (2, 2, 2**25), (3, 2, 2**25)]
)
def test_entries_come_and_go_to_the_bit(monkeypatch, spread, num_devices, lanes, most_bytes):
    """Of every dtype, not-a-number and minus zero included, in many transfers or in one."""
    monkeypatch.setattr("fedjax_lite.engine.store._MOST_BYTES", most_bytes)
    entries = {
        "float": jnp.array([-0.0, 0.0, jnp.nan, -jnp.inf, 1e-42]),
        "half": jnp.array([-0.0, 3.0], jnp.bfloat16),
        "flag": jnp.array([True, False]),
        "whole": jnp.int32(-(2**31)),
        "unsigned": jnp.uint8(255),
    }
    algorithm = fl.federated_algorithm(
        regression_model(),
        fl.ClientUpdate(
            init=lambda server, client: client.entry,
            step=lambda server, client, state, batch, key: state,
            final=lambda server, client, state: fl.ClientResult(
                server.params,
                1.0,
                entry=jax.tree.map(lambda x: jnp.flip(x) if x.ndim else x, state),
            ),
            entry=lambda server: entries,
        ),
        optax.sgd(0.0),
        batch_size=4,
        lanes=lanes,
        mesh=fl.clients_mesh(num_devices),
        on_nonfinite="keep",
    )
    population = regression_dataset().resident(fl.clients_mesh(num_devices))
    state = algorithm.init(jax.random.key(0), num_clients=10)
    ids = [3, 0, 9, 1, 6, 5]
    state, _ = algorithm.round(jax.random.key(0), state, everyone(population, ids, capacity=7))
    flipped = [i for i in ids if SIZES[i]]
    for name, x in entries.items():
        expected = np.array(jnp.broadcast_to(x, (10, *x.shape)))
        if x.ndim:
            expected[flipped] = expected[flipped][:, ::-1]
        assert np.asarray(state.store[name]).tobytes() == expected.tobytes()


@eight_devices
def test_entries_follow_clients_to_the_devices_that_have_their_rows(spread):
    mesh, dataset = fl.clients_mesh(3), regression_dataset()
    algorithm = diary(lanes=2, mesh=mesh)
    population = dataset.streamed(9, mesh=mesh)
    state = algorithm.init(jax.random.key(0), num_clients=10)
    for r, order in enumerate(ORDERS):
        state, _ = algorithm.round(jax.random.key(r), state, fl.cohort_of(population, order))
    chex.assert_trees_all_close(
        jax.device_get(state.store), expected_store(dataset, ORDERS), rtol=1e-5
    )


def test_scan_and_vmap_carry_the_store():
    dataset = regression_dataset()
    population = dataset.resident(fl.clients_mesh(1))
    algorithm = diary()

    def train(key):
        def step(state, key):
            cohort = fl.cohort(key, population, 4)
            return algorithm.round(key, state, cohort)[0], cohort.client_ids

        return jax.lax.scan(step, algorithm.init(key, num_clients=10), jax.random.split(key, 3))

    states, ids = jax.device_get(jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(5), 2)))
    expected = [expected_store(dataset, orders) for orders in ids]
    expected = jax.tree.map(lambda *stores: np.stack(stores), *expected)
    chex.assert_trees_all_close(states.store, expected, rtol=1e-5)


def test_a_client_that_is_left_out_keeps_what_it_had():
    dataset = regression_dataset()
    dataset.examples["y"][dataset.offsets[3]] = np.inf
    state, info = run(diary(), dataset, [[0, 3, 5]])
    assert info.num_nonfinite == 1
    assert state.store["rounds"].tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    state, _ = run(diary(on_nonfinite="keep"), dataset, [[0, 3, 5]])
    assert state.store["rounds"][3] == 1


def test_memory_does_not_grow_with_the_cohort():
    temporaries = []
    for capacity in (50, 5000):
        dataset = fl.FederatedDataset.from_rows(
            {"x": np.ones((10_000, 3), np.float32), "y": np.ones(10_000, np.float32)},
            np.arange(10_000)[:, None],
        )
        algorithm = diary()
        state = algorithm.init(jax.random.key(0), num_clients=10_000)
        population = dataset.resident(fl.clients_mesh(1))
        cohort = fl.cohort(jax.random.key(0), population, capacity)
        compiled = algorithm.round.lower(jax.random.key(0), state, cohort).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    # What grows is the list of slots, a few numbers per client.
    assert temporaries[1] - temporaries[0] < 5000 * 16 * 4


def test_a_round_can_reuse_the_memory_of_the_store():
    algorithm = diary()
    state = algorithm.init(jax.random.key(0), num_clients=10)
    cohort = everyone(regression_dataset().resident(fl.clients_mesh(1)), [1, 2])
    round = jax.jit(algorithm.round, donate_argnames="state")
    after, _ = round(jax.random.key(0), state, cohort)
    assert state.store["seen"].is_deleted()
    assert after.store["rounds"].tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]


def test_a_store_of_another_population_is_refused():
    algorithm = diary()
    cohort = everyone(regression_dataset().resident(fl.clients_mesh(1)))
    state = algorithm.init(jax.random.key(0), num_clients=12)
    with pytest.raises(
        ValueError,
        match=r"state.store\['rounds'\] has shape \(12,\), while .* population of 10 clients; give",
    ):
        algorithm.round(jax.random.key(0), state, cohort)


def test_what_clients_keep_has_one_form():
    algorithm = diary(forget=True)
    cohort = everyone(regression_dataset().resident(fl.clients_mesh(1)))
    state = algorithm.init(jax.random.key(0), num_clients=10)
    with pytest.raises(ValueError, match=r"the entry of client_update.final is \{\}, in place"):
        algorithm.round(jax.random.key(0), state, cohort)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (diary, {}, "num_clients is None, and clients of this algorithm keep something"),
        (diary, {"num_clients": 0}, "num_clients is 0; choose an integer at least 1"),
    ],
)
def test_init_asks_for_the_size_of_the_population(build, options, message):
    with pytest.raises(ValueError, match=message):
        build().init(jax.random.key(0), **options)


def test_an_unknown_memory_kind_is_refused():
    with pytest.raises(ValueError, match="memory_kind is 'hbm'; choose one of 'device', 'pinned"):
        diary(memory_kind="hbm")


@eight_devices
def test_runs_with_spread_stores_resume_and_are_evaluated(spread, tmp_path):
    mesh, dataset = fl.clients_mesh(2), regression_dataset()
    algorithm = fl.apfl(regression_model(), optax.sgd(0.05), batch_size=4, mesh=mesh)
    arguments = {
        "algorithm": algorithm,
        "population": dataset.resident(mesh),
        "sampler": fl.samplers.uniform(10, 4),
        "key": jax.random.key(1),
    }
    whole = fl.train(num_rounds=6, **arguments)
    fl.train(num_rounds=4, checkpoints=fl.Checkpoints(tmp_path, every=2), **arguments)
    resumed = fl.train(num_rounds=6, checkpoints=fl.Checkpoints(tmp_path, every=2), **arguments)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    store = jax.tree.leaves(resumed.state.store)[0]
    assert store.addressable_shards[0].data.shape[0] == (5 if spread else 10)
    loaded = fl.load_state(tmp_path, algorithm.init(jax.random.key(0), num_clients=10))
    jax.tree.map(np.testing.assert_array_equal, loaded.store, whole.state.store)
    cohort = everyone(arguments["population"])
    of_clients = fl.evaluate_clients(
        regression_model(), loaded, cohort, client_model=algorithm.client_model, mesh=mesh
    )
    # The same on one device, which has copies.
    alone = fl.clients_mesh(1)
    params, store = jax.device_get((loaded.params, loaded.store))
    one = fl.apfl(regression_model(), optax.sgd(0.05), batch_size=4, mesh=alone)
    state = one.init(params, num_clients=10)
    state = dataclasses.replace(state, store=jax.tree.map(jnp.asarray, store))
    expected = fl.evaluate_clients(
        regression_model(),
        state,
        everyone(dataset.resident(alone)),
        client_model=one.client_model,
        mesh=alone,
    )
    np.testing.assert_allclose(of_clients.clients["loss"], expected.clients["loss"], rtol=1e-5)
