"""Stores in files: the same bits as in memory, in rounds, runs and evaluations, and after kills."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import SIZES, everyone, regression_dataset, regression_model
from processes import held_by_another_process

import fedjax_lite as fl
from fedjax_lite.engine.file_store import EntryFile
from fedjax_lite.runs.step import build_step

eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
STORES = ("store", "pipeline_store")


def apfl(num_devices=1, **options):
    return fl.apfl(
        regression_model(),
        optax.sgd(0.05),
        batch_size=4,
        pipeline=fl.error_feedback(fl.quantize_uniform(16)),
        mesh=fl.clients_mesh(num_devices),
        **options,
    )


same_apfl = functools.cache(apfl)


def in_file(algorithm, folder, key=0):
    state = algorithm.init(jax.random.key(key), num_clients=1)
    return fl.store_in_file(state, folder, num_clients=10)


def assert_same(in_file, in_memory, *, to_the_bit=True):
    """What is in the file of one and in the memory of the other included.

    On several lanes or devices it is another program, which may round otherwise.
    """
    tolerance = 0 if to_the_bit else 1e-6
    compare = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    rest = [
        dataclasses.replace(state, store=(), pipeline_store=()) for state in (in_file, in_memory)
    ]
    jax.tree.map(compare, *rest)
    for name in STORES:
        entries = getattr(in_file, name).read(np.arange(10))
        jax.tree.map(compare, entries, getattr(in_memory, name))


@pytest.fixture
def spread(request, monkeypatch):
    """Whether entries are spread over devices, were they large or not: from 0 bytes, or 2 ** 28."""
    monkeypatch.setattr("fedjax_lite.engine.store._LEAST_SPREAD_BYTES_OF_COHORT", request.param)


def rounds_from(state, algorithm, num_devices):
    """The state after four rounds, and what clients then have in an evaluation."""
    mesh = fl.clients_mesh(num_devices)
    population = regression_dataset().resident(mesh)
    for r in range(4):
        order = np.random.default_rng(r).permutation(10)[:5]
        cohort = everyone(population, order, capacity=6)
        state, _ = algorithm.round(jax.random.key(r), state, cohort)
    options = {"client_model": algorithm.client_model, "mesh": mesh}
    found = fl.evaluate_clients(regression_model(), state, cohort, **options)
    assert algorithm.round._cache_size() == 1
    return state, found


@functools.cache
def rounds_in_memory(num_devices, lanes):
    algorithm = apfl(num_devices, lanes=lanes)
    return rounds_from(algorithm.init(jax.random.key(0), num_clients=10), algorithm, num_devices)


@eight_devices
@pytest.mark.parametrize(
    ("spread", "num_devices", "lanes"),
    [(0, 1, 1), (0, 2, 3), (2**28, 2, 3), (0, 3, 1), (2**28, 3, 1)],
    indirect=["spread"],
)
def test_rounds_are_those_of_a_store_in_memory(spread, tmp_path, num_devices, lanes):
    algorithm = apfl(num_devices, lanes=lanes)
    filed, found = rounds_from(in_file(algorithm, tmp_path), algorithm, num_devices)
    in_memory, expected = rounds_in_memory(num_devices, lanes)
    assert_same(filed, in_memory, to_the_bit=num_devices == lanes == 1)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, expected)


SAMPLER = fl.samplers.uniform(10, 6)


def run_from(state, algorithm, num_devices, streamed):
    mesh, dataset, model = fl.clients_mesh(num_devices), regression_dataset(), regression_model()
    cohort = everyone(dataset.resident(mesh))

    def evaluate(state):
        found = fl.evaluate_clients(
            model, state, cohort, client_model=algorithm.client_model, mesh=mesh
        )
        return found.pooled

    return fl.train(
        algorithm,
        dataset.streamed(6, mesh=mesh) if streamed else dataset.resident(mesh),
        SAMPLER,
        num_rounds=7,
        key=jax.random.key(1),
        evaluate=evaluate,
        eval_every=3,
        state=state,
    )


@functools.cache
def run_in_memory(num_devices, streamed):
    algorithm = apfl(num_devices)
    state = algorithm.init(jax.random.key(0), num_clients=10)
    return run_from(state, algorithm, num_devices, streamed)


@eight_devices
@pytest.mark.parametrize(
    ("spread", "num_devices", "streamed"),
    [(0, 1, False), (0, 2, True), (2**28, 2, True)],
    indirect=["spread"],
)
def test_runs_are_those_of_a_store_in_memory(spread, tmp_path, num_devices, streamed):
    algorithm = apfl(num_devices)
    build_step.cache_clear()
    filed = run_from(in_file(algorithm, tmp_path), algorithm, num_devices, streamed)
    assert build_step(algorithm, SAMPLER, None)._cache_size() == 1
    in_memory = run_in_memory(num_devices, streamed)
    assert_same(filed.state, in_memory.state, to_the_bit=num_devices == 1)
    for ours, theirs in zip(*(run.history.evaluations for run in (filed, in_memory)), strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)


def test_runs_go_on_from_any_checkpoint(tmp_path):
    """Wherever they ended; and there is room for as many versions as there are checkpoints."""
    algorithm, folder = apfl(), tmp_path / "checkpoints"
    arguments = {
        "algorithm": algorithm,
        "population": regression_dataset().resident(fl.clients_mesh(1)),
        "sampler": SAMPLER,
        "key": jax.random.key(1),
    }

    def train(num_rounds):
        checkpoints = fl.Checkpoints(folder, every=2, keep=2)
        state = in_file(algorithm, tmp_path / "entries")
        return fl.train(num_rounds=num_rounds, state=state, checkpoints=checkpoints, **arguments)

    whole = fl.train(
        num_rounds=14, state=algorithm.init(jax.random.key(0), num_clients=10), **arguments
    ).state
    for num_rounds in (3, 5, 8, 12):
        train(num_rounds)
    shutil.rmtree(folder / "12")  # The one before it can be read as well.
    resumed = train(14).state
    assert_same(resumed, whole)
    assert_same(fl.load_state(folder, in_file(algorithm, tmp_path / "entries")), whole)
    entry_bytes = sum(x[0].nbytes for x in jax.tree.leaves(whole.store))
    with_examples = sum(size > 0 for size in SIZES)
    assert (tmp_path / "entries" / "store").stat().st_size <= 4 * 10 * entry_bytes
    assert with_examples == 9


def test_a_client_takes_room_once_it_has_taken_part(tmp_path):
    algorithm = same_apfl()
    cohort = everyone(regression_dataset().resident(fl.clients_mesh(1)), [3, 0], capacity=6)
    state = in_file(algorithm, tmp_path)
    for r in range(9):
        state, _ = algorithm.round(jax.random.key(r), state, cohort)
    state.store.file.seal(0)
    entry_bytes = sum(x.nbytes for x in jax.tree.leaves(state.store.read([3])))
    # Two, and as many that are written before those are given up.
    assert (tmp_path / "store").stat().st_size == 4 * entry_bytes


def number_file(path):
    """A file of one number each, what writes some in place of others, and what reads them."""
    file = EntryFile(path, np.float32(0))

    def write(values, replaced):
        entries = jnp.array(values, jnp.float32)
        return file.write(entries, np.arange(len(values)), replaced)

    return file, write, lambda index: file.read(index).tolist()


NOWHERE = np.full((2, 2), 2**32 - 1, np.uint32)


def test_what_was_written_in_part_is_never_read(tmp_path):
    file, write, _ = number_file(tmp_path / "store")
    kept = write([1, 2], NOWHERE[:, 0])
    file.seal(1)
    write([3, 4], kept[:, 0])
    file.seal(1)  # As the process is killed, in the middle of the last entry.
    del file, write
    with (tmp_path / "store").open("rb+") as damaged:
        damaged.truncate(3 * 4 + 2)
    file, write, read = number_file(tmp_path / "store")
    file.reclaim([kept])
    index = kept
    for value in range(5, 25):
        index = write([value, value + 0.5], index[:, 0])
        file.seal(1)
        assert read(index) == [value, value + 0.5]
    # Two entries for each of the checkpoints that there may be, and those that are written.
    assert (tmp_path / "store").stat().st_size <= 4 * 2 * 4


def test_places_are_given_out_once_after_going_back_to_a_checkpoint(tmp_path):
    """Also where the process goes on that had written what came after it."""
    file, write, read = number_file(tmp_path / "store")
    index = write([0, 1], NOWHERE[:, 0])
    for value in range(2, 6):
        file.seal(2)
        kept, index = index, write([value, value], index[:, 0])
    file.reclaim([kept])
    index = kept
    for value in range(6, 26):
        index = write([value, value + 0.5], index[:, 0])
        file.seal(2)
        assert read(index) == [value, value + 0.5]
    assert not [place for place in index[:, 0] if place in file._free]
    assert len(set(file._free)) == len(file._free)


def test_reading_leaves_no_file(tmp_path):
    file, _, read = number_file(tmp_path / "none" / "store")
    assert read(NOWHERE) == [0, 0]
    with pytest.raises(ValueError, match="store does not hold what was written at place 7"):
        read(np.array([[7, 0]], np.uint32))
    file.seal(1)
    assert not list(tmp_path.iterdir())


def test_entries_come_back_to_the_bit(tmp_path):
    entries = {
        "float": np.float32([-0.0, 0.0, np.nan, -np.inf, 1e-42]),
        "half": np.array([-0.0, 3.0], jnp.bfloat16),
        "flag": np.array([True, False]),
        "whole": np.int32(-(2**31)),
        "nothing": np.zeros((0, 3), np.float32),
    }
    state = fl.fed_sgd(regression_model(), optax.sgd(1.0)).init(jax.random.key(0))
    own = jax.tree.map(lambda x: jnp.asarray(x[None]), entries)
    state = dataclasses.replace(state, store=own)
    store = fl.store_in_file(state, tmp_path, num_clients=5).store
    flipped = jax.tree.map(lambda x: np.stack([np.flip(x), x]), entries)
    store = store.written([4, -1], jax.tree.map(jnp.asarray, flipped))
    for client, place in ((4, 0), (0, 1), (3, 1)):
        for name, x in store.read([client]).items():
            assert x[0].tobytes() == flipped[name][place].tobytes()


def test_what_cannot_be_kept_in_a_file_is_refused(tmp_path):
    algorithm = same_apfl()
    for state, told in (
        (fl.fed_sgd(regression_model(), optax.sgd(1.0)).init(jax.random.key(0)), "no store, as"),
        (algorithm.init(jax.random.key(0), num_clients=2), "a store of 2 clients"),
    ):
        with pytest.raises(ValueError, match=f"state has {told}.*pass algorithm.init"):
            fl.store_in_file(state, tmp_path, num_clients=10)
    with pytest.raises(ValueError, match="num_clients is 0; choose an integer at least 1"):
        fl.store_in_file(algorithm.init(jax.random.key(0), num_clients=1), tmp_path, 0)


def test_what_is_not_what_was_written_is_refused(tmp_path):
    algorithm = same_apfl()
    cohort = everyone(regression_dataset().resident(fl.clients_mesh(1)), [3, 0], capacity=6)
    first = in_file(algorithm, tmp_path)
    second, _ = algorithm.round(jax.random.key(0), first, cohort)
    third, _ = algorithm.round(jax.random.key(1), second, cohort)
    algorithm.round(jax.random.key(2), third, cohort)
    with pytest.raises(ValueError, match=r"store does not hold what was written at place .*newest"):
        algorithm.round(jax.random.key(2), second, cohort)
    with pytest.raises(ValueError, match="lies in a file, which a compiled program cannot read"):
        jax.jit(algorithm.round)(jax.random.key(0), first, cohort)
    others = everyone(regression_dataset((1, 2)).resident(fl.clients_mesh(1)))
    with pytest.raises(ValueError, match=r"state.store is a file for 10 clients, while .* of 2;"):
        algorithm.round(jax.random.key(0), first, others)
    with pytest.raises(ValueError, match=r"state.store is a file for 10 clients, while .* of 2;"):
        fl.train(
            algorithm,
            regression_dataset((1, 2)).resident(fl.clients_mesh(1)),
            fl.samplers.uniform(2, 2),
            1,
            key=jax.random.key(0),
            state=first,
        )


def test_another_process_that_writes_there_is_told(tmp_path):
    algorithm = same_apfl()
    cohort = everyone(regression_dataset().resident(fl.clients_mesh(1)), [3, 0], capacity=6)
    state = in_file(algorithm, tmp_path)
    with (
        held_by_another_process(tmp_path / ".store.lock"),
        pytest.raises(BlockingIOError, match="is being written by another process"),
    ):
        algorithm.round(jax.random.key(0), state, cohort)
