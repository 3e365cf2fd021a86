import collections
import csv
import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
from unittest import mock

import jax
import jax.numpy as jnp
import killed
import numpy as np
import optax
import pytest
from problems import regression_dataset, regression_model
from processes import contents, ended, held_by_another_process, start

import fedjax_lite as fl

KEY = jax.random.key(0)


def algorithm(*optimizers):
    return fl.fed_avg(regression_model(), *optimizers, batch_size=3)


@functools.cache
def problem():
    """What most tests train, compiled once."""
    dataset, model = regression_dataset(), regression_model()
    return {
        "algorithm": algorithm(optax.sgd(0.1), optax.adam(0.1)),
        "population": dataset.resident(),
        "sampler": fl.samplers.uniform(10, 4),
        "evaluate": lambda state: fl.evaluate(model, state, dataset.examples),
    }


def setting(**options):
    return {**problem(), "num_rounds": 12, "key": KEY, "eval_every": 5, **options}


def assert_same(actual, desired):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(actual), jax.device_get(desired))


def without_seconds(history):
    return [[{k: v for k, v in row.items() if k != "seconds"} for row in rows] for rows in history]


def test_is_the_loop_that_one_would_write():
    options = setting()
    algorithm, population, sampler = (options[k] for k in ("algorithm", "population", "sampler"))
    result = fl.train(**options)
    key_init, key_sampler, key_rounds = jax.random.split(KEY, 3)
    state = algorithm.init(key_init)
    evaluations, losses = {}, []
    for r in range(12):
        if r % 5 == 0:
            evaluations[r] = options["evaluate"](state)["loss"]
        key_cohort, key_round = jax.random.split(jax.random.fold_in(key_rounds, r))
        ids = sampler.select(key_sampler, r).client_ids
        cohort = fl.cohort_of(population, ids, key=key_cohort)
        state, info = algorithm.round(key_round, state, cohort)
        losses.append(info.loss)
    evaluations[12] = options["evaluate"](state)["loss"]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), result.state, state
    )
    rows = result.history.rounds
    assert [row["round"] for row in rows] == list(range(1, 13))
    np.testing.assert_allclose([row["loss"] for row in rows], losses, rtol=1e-5)
    found = {row["round"]: row["loss"] for row in result.history.evaluations}
    assert found.keys() == evaluations.keys()
    np.testing.assert_allclose(list(found.values()), list(evaluations.values()), rtol=1e-5)
    # Four weights of four bytes each; client 1 has no examples and sends nothing.
    assert all(row["bytes_down"] == 4 * 16 for row in rows)
    assert all(row["bytes_up"] == (4 - row["num_empty"]) * 16 for row in rows)
    assert result.stopped is None
    assert result.client_updates_per_s > 0


def test_compiles_once_and_leaves_the_state_of_the_caller_alone():
    traces = collections.Counter()
    model = regression_model()

    def loss(*args):
        traces["loss"] += 1
        return model.loss(*args)

    algorithm = fl.fed_avg(model._replace(loss=loss), optax.sgd(0.1))
    state = algorithm.init(jax.random.key(3))
    before = jax.device_get(state)
    options = setting(algorithm=algorithm, state=state, sampler=fl.samplers.poisson(10, 0.4))
    fl.train(**options)
    assert_same(state, before)
    once = traces["loss"]
    algorithm.round(KEY, state, fl.cohort(KEY, options["population"], 10))
    assert once <= traces["loss"] - once + 1


@pytest.mark.parametrize(
    "placed",
    [np.asarray, lambda x: jax.device_put(x, jax.devices()[0]), lambda x: jnp.asarray(np.array(x))],
    ids=["numpy", "committed", "uncommitted"],
)
def test_a_state_of_local_arrays_is_put_where_rounds_run(placed):
    population = regression_dataset().resident(fl.clients_mesh())
    options = setting(algorithm=scaffold(), population=population, num_rounds=2, evaluate=None)
    state = scaffold().init(jax.random.key(3), num_clients=10)
    desired = fl.train(**options, state=state).state
    local = jax.tree.map(placed, state)
    assert_same(fl.train(**options, state=local).state, desired)
    # In a part alone, as of params that were read from a file.
    mixed = dataclasses.replace(state, params=local.params)
    assert_same(fl.train(**options, state=mixed).state, desired)


@functools.cache
def scaffold():
    return fl.scaffold(regression_model(), optax.sgd(0.1), batch_size=3, mesh=fl.clients_mesh())


def test_streamed_equals_resident_and_generated_populations_train():
    dataset = regression_dataset()
    resident = fl.train(**setting(population=dataset.resident()))
    streamed = fl.train(**setting(population=dataset.streamed(4)))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        resident.state,
        streamed.state,
    )
    model = fl.models.halfspace_classifier()
    result = fl.train(
        fl.fed_sgd(model, optax.adam(0.1)),
        fl.data.halfspace(num_clients=10**9),
        fl.samplers.uniform(10**9, 3),
        5,
        key=KEY,
    )
    assert result.history.evaluations == []
    assert [row["num_clients"] for row in result.history.rounds] == [3] * 5


def test_callbacks_see_every_row_in_order():
    rounds, evaluations, clients = [], [], []

    def on_round(row, info):
        rounds.append(row)
        clients.append(info.clients["loss"].shape)

    result = fl.train(**setting(on_round=on_round, on_eval=evaluations.append))
    assert rounds == result.history.rounds
    assert evaluations == result.history.evaluations
    assert clients == [(4,)] * 12
    json.dumps(rounds + evaluations)


def test_moving_average_and_best_state():
    seen = []
    values = iter([3.0, 1.0, 2.0, 1.0])

    def evaluate(state):
        seen.append(jax.device_get(state.params))
        return {"a": {"b": jnp.float32(next(values))}, "c": np.arange(3)}

    options = setting(evaluate=evaluate, ema_decay=0.9, best="a/b", best_mode="min")
    result = fl.train(**options)
    assert result.history.evaluations[1]["c"] == [0, 1, 2]
    assert_same(result.best.params, seen[1])  # the first of the two that are best
    assert_same(result.averaged.params, seen[3])

    states = [options["algorithm"].init(jax.random.split(KEY, 3)[0])]
    for rounds in range(1, 13):
        states.append(fl.train(**setting(num_rounds=rounds, evaluate=None)).state)
    average = states[0].params["w"]
    for state in states[1:]:
        average = 0.9 * average + 0.1 * state.params["w"]
    np.testing.assert_allclose(result.averaged.params["w"], average, rtol=1e-5)


@pytest.mark.parametrize(
    ("rule", "round", "reason"),
    [
        (fl.stopping.target("loss", 1e9, mode="min"), 0, r"loss is .*, at the target of 1e"),
        (fl.stopping.target("flat", 2.0), 12, None),
        (fl.stopping.patience("flat", 1), 5, "flat has not improved on 1 for 1 evaluations"),
        (fl.stopping.patience("flat", 2), 10, "flat has not improved on 1 for 2"),
        (fl.stopping.wall_clock(1e-9), 0, "the run has taken 0 of 1e-09 seconds"),
        (lambda round, history: "spent" if round == 7 else None, 7, "spent"),
    ],
)
def test_stops(rule, round, reason):
    evaluate = setting()["evaluate"]
    options = setting(evaluate=lambda state: {**evaluate(state), "flat": 1.0}, stop=[rule])
    result = fl.train(**options)
    assert result.state.round == round
    assert result.history.evaluations[-1]["round"] == round
    if reason is None:
        assert result.stopped is None
    else:
        assert re.match(reason, result.stopped)


def checkpointed(folder, **options):
    return setting(
        ema_decay=0.5,
        best="loss",
        best_mode="min",
        checkpoints=fl.Checkpoints(folder, every=3, keep=2, **options),
    )


def assert_same_result(actual, desired):
    for name in ("state", "averaged", "best"):
        assert_same(getattr(actual, name), getattr(desired, name))
    assert without_seconds(actual.history) == without_seconds(desired.history)


def rounds_on_disk(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_what_clients_and_a_pipeline_keep_is_resumed(tmp_path):
    counting = fl.UpdateTransform(
        lambda params: jnp.int32(0),
        lambda key, count, message, client: message._replace(
            update=optax.tree.scale(0.9**count, message.update)
        ),
        lambda key, count, received: (received, count + 1, {}),
    )
    algorithm = fl.scaffold(
        regression_model(),
        optax.sgd(0.1),
        batch_size=3,
        pipeline=fl.chain(counting, fl.error_feedback(fl.quantize_uniform(16))),
    )
    options = setting(algorithm=algorithm, population=regression_dataset())
    straight = fl.train(**options)
    options |= {"checkpoints": fl.Checkpoints(tmp_path, every=3)}
    with pytest.raises(RuntimeError, match="power cut"):
        fl.train(**options, on_round=power_cut_in_round(8))
    resumed = fl.train(**options)
    assert_same(resumed.state, straight.state)
    assert resumed.state.pipeline_state[0] == 12


def test_resumes_to_the_same_bits(tmp_path):
    straight = fl.train(**setting(ema_decay=0.5, best="loss", best_mode="min"))
    options = checkpointed(tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        fl.train(**options, on_round=power_cut_in_round(8))
    assert rounds_on_disk(tmp_path) == [3, 6]
    seen = []
    resumed = fl.train(**options, on_round=lambda row, info: seen.append(row["round"]))
    assert seen == list(range(7, 13))
    assert_same_result(resumed, straight)
    assert rounds_on_disk(tmp_path) == [9, 12]
    again = fl.train(**options, on_round=power_cut_in_round(1))
    assert_same_result(again, straight)


def power_cut_in_round(round):
    def on_round(row, info):
        if row["round"] >= round:
            raise RuntimeError("power cut")

    return on_round


@pytest.mark.usefixtures("in_the_foreground")
def test_an_interrupt_finishes_the_round_and_saves_it(tmp_path):
    straight = fl.train(**setting(ema_decay=0.5, best="loss", best_mode="min"))
    options = checkpointed(tmp_path)

    def press(row, info):
        if row["round"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"interrupted after round \d+; the same call goes"):
        fl.train(**options, on_round=press)
    assert 5 <= rounds_on_disk(tmp_path)[-1] <= 8
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same_result(fl.train(**options), straight)


def damage(folder):
    """Alters single bits all over the files that hold the arrays: parts of them are not in use."""
    for path in folder.rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[::32] = bytes(byte ^ 1 for byte in content[::32])
        path.write_bytes(content)


def test_a_damaged_checkpoint_is_put_aside(tmp_path):
    straight = fl.train(**setting(ema_decay=0.5, best="loss", best_mode="min"))
    options = checkpointed(tmp_path)
    fl.train(**{**options, "num_rounds": 9})
    damage(tmp_path / "9" / "arrays")
    with pytest.warns(UserWarning, match="checkpoint of round 9 in .* is damaged"):
        resumed = fl.train(**options)
    assert_same_result(resumed, straight)
    assert (tmp_path / "damaged-9-0").exists()
    for round in rounds_on_disk(tmp_path):
        for path in (tmp_path / str(round)).rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match="no checkpoint that can be read, only damaged"),
    ):
        fl.train(**options)
    with pytest.raises(ValueError, match="no checkpoint that can be read, only damaged"):
        fl.train(**options)  # Not from the start.


def test_a_state_is_read_and_nothing_is_written(tmp_path, finished):
    ended = fl.train(**checkpointed(finished))
    like = problem()["algorithm"].init(KEY)
    assert_same(fl.load_state(finished, like), ended.state)
    assert_same(fl.load_state(finished, like, averaged=True), ended.averaged)
    assert_same(fl.load_state(finished, like, best=True), ended.best)
    folder = tmp_path / "damaged"
    shutil.copytree(finished, folder)
    damage(folder / "12" / "arrays")
    before = contents(folder)
    with pytest.warns(UserWarning, match="checkpoint of round 12 in .* is damaged .*; reading the"):
        assert fl.load_state(folder, like).round == 9
    with pytest.raises(
        ValueError, match=r"another run: state\.opt_state.*float32\[3\]' there and N"
    ):
        fl.load_state(folder, algorithm(optax.sgd(0.1)).init(KEY))
    with pytest.raises(ValueError, match=r"folder is .*nowhere, which is none"):
        fl.load_state(tmp_path / "nowhere", like)
    assert contents(folder) == before


def test_what_others_left_or_write_is_left_alone(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    with orbax.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=orbax.args.StandardSave({"w": np.zeros(3)}))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"3 was not written by fl\.train; choose another"):
        fl.train(**setting(checkpoints=fl.Checkpoints(tmp_path)))
    with (
        held_by_another_process(tmp_path / ".lock"),
        pytest.raises(BlockingIOError, match="is being written by another process"),
    ):
        fl.train(**setting(checkpoints=fl.Checkpoints(tmp_path)))
    assert contents(tmp_path) == {**before, ".lock": b""}


def test_a_full_disk_ends_a_run_which_goes_on_once_there_is_room(tmp_path, monkeypatch, capfd):
    straight = fl.train(**setting())
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    options = setting(checkpoints=fl.Checkpoints(tmp_path / "run", every=1, keep=20))
    try:
        with monkeypatch.context() as patch:
            if not mounted:  # Only root can: what orbax raises there.
                told = "RESOURCE_EXHAUSTED: Failed to write 113 bytes: No space left on device"
                save = mock.Mock(side_effect=[True, ValueError(told)])
                patch.setattr("orbax.checkpoint.CheckpointManager.save", save)
            with pytest.raises(OSError, match="No space left on device") as full:
                fl.train(**options)
        assert full.value.errno == errno.ENOSPC
        assert capfd.readouterr() == ("", "")
        if mounted:
            assert 0 < len(rounds_on_disk(tmp_path / "run")) < 13
            subprocess.run(["mount", "-o", "remount,size=20m", str(tmp_path)], check=True)
        assert_same(fl.train(**options).state, straight.state)
    finally:
        if mounted:
            subprocess.run(["umount", str(tmp_path)], check=True)


OTHERS = {
    "program": lambda: {
        "algorithm": fl.fed_avg(regression_model(), optax.sgd(0.2), optax.adam(0.1), batch_size=3)
    },
    "state.opt_state": lambda: {
        "algorithm": fl.fed_avg(regression_model(), optax.sgd(0.1), batch_size=3)
    },
    "population.examples['x']": lambda: {"population": regression_dataset(seed=1).resident()},
    "population.offsets": lambda: {
        "population": regression_dataset(sizes=(8, 0, 1, 11, 3, 5, 2, 9, 4, 6)).resident()
    },
    "sampler.capacity": lambda: {"sampler": fl.samplers.uniform(10, 5)},
    "key": lambda: {"key": jax.random.key(1)},
    "settings['ema_decay']": lambda: {"ema_decay": 0.6},
}


@pytest.mark.parametrize("field", OTHERS)
def test_refuses_checkpoints_of_another_run(tmp_path, field, finished):
    options = {**checkpointed(finished), **OTHERS[field]()}
    with pytest.raises(
        ValueError, match=rf"are of another run: .*{re.escape(field)}.* is '?.* there"
    ):
        fl.train(**options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    fl.train(**checkpointed(folder))
    return folder


def test_names_differing_settings(finished):
    with pytest.raises(ValueError, match=r"settings\['rate'\] is None there and 0.1 here"):
        fl.train(**checkpointed(finished, settings={"rate": 0.1}))


def test_settings_may_be_of_types_that_json_writes_otherwise(tmp_path):
    options = checkpointed(tmp_path, settings={"hidden": (64, 32)})
    assert_same_result(fl.train(**options), fl.train(**options))


def test_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    assert ended(start(tmp_path, killed.main, tmp_path)) == 0, (tmp_path / "err").read_text()
    report = json.loads((tmp_path / "out").read_text())
    assert report["kills"] == 8
    assert report["resumed"] > 4
    found, straight = (np.load(tmp_path / name) for name in ("killed.npz", "straight.npz"))
    assert found.files == straight.files
    for name in straight.files:
        np.testing.assert_array_equal(found[name], straight[name])
    recorded = [last_rows(tmp_path / name) for name in ("killed", "straight")]
    assert recorded[0] == recorded[1]
    assert len(recorded[1]) == 150 + 16
    with (tmp_path / "killed" / "metrics.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 166


def last_rows(folder):
    """The rows of each round and evaluation that count, but for their seconds."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = {(row["kind"], row["round"]): row for row in map(json.loads, lines)}
    return {key: {**row, "seconds": None} for key, row in rows.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rounds": -1}, "num_rounds is -1"),
        ({"eval_every": 0}, "eval_every is 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; choose a number within"),
        ({"best": "loss", "evaluate": None}, "best is 'loss' without evaluations"),
        ({"best": "speed", "best_mode": "max"}, "metric is 'speed'; evaluations have 'loss'"),
        ({"best": "loss", "best_mode": "least"}, "best_mode is 'least'"),
        ({"best": "loss"}, "best_mode is None; choose one of 'max', 'min'"),
        ({"sampler": fl.samplers.uniform(9, 2)}, "sampler chooses among 9 clients"),
        ({"stop": [fl.stopping.target("speed", 1)]}, "metric is 'speed'"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        fl.train(**setting(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": 0}, "key is 0, of type int; pass a typed key"),
        ({"sampler": 4}, "sampler is of type int; pass a Sampler"),
        ({"state": {"w": 0.0}}, "state is of type dict; pass a ServerState"),
        ({"stop": fl.stopping.target("loss", 1)}, "stop is a single rule; pass a list"),
    ],
)
def test_refuses_other_kinds_of_arguments(options, message):
    with pytest.raises(TypeError, match=message):
        fl.train(**setting(**options))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: fl.stopping.wall_clock(0), "seconds is 0"),
        (lambda: fl.stopping.patience("loss", 0), "evaluations is 0"),
        (lambda: fl.stopping.target("loss", 1, mode="low"), "mode is 'low'"),
        (lambda: fl.Checkpoints("x", every=0), "every is 0"),
        (lambda: fl.Checkpoints("x", keep=0), "keep is 0"),
    ],
)
def test_rules_and_checkpoints_refuse(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupt_carries_what_the_run_had_come_to(name):
    number = signal.Signals[name]
    usual = signal.getsignal(number)

    def press(row, info):
        if row["round"] == 5:
            os.kill(os.getpid(), number)

    with pytest.raises(fl.InterruptedTraining, match=r"^interrupted.* after round \d$") as caught:
        fl.train(**setting(), on_round=press)
    result, straight = caught.value.result, fl.train(**setting())
    assert caught.value.signal is number
    assert signal.getsignal(number) == usual
    done = int(result.state.round)
    assert 5 <= done <= 8
    assert result.stopped == str(caught.value)
    rows, evaluations = without_seconds(result.history)
    assert rows == without_seconds(straight.history)[0][:done]
    assert [row["round"] for row in evaluations] == [0, 5]


def test_a_signal_that_is_ignored_or_handled_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        press = lambda row, info: os.kill(os.getpid(), signal.SIGHUP)
        assert len(fl.train(**setting(), on_round=press).history.rounds) == 12
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_not_finite_is_told_once():
    dataset = regression_dataset()
    spoilt = {i: {**dataset[i]} for i in dataset.client_ids}
    spoilt[3]["y"] = np.full_like(spoilt[3]["y"], np.nan)
    population = fl.FederatedDataset.from_clients(spoilt)
    options = setting(population=population, sampler=fl.samplers.uniform(10, 4), num_rounds=6)
    with pytest.warns(fl.NonFiniteWarning) as warned:
        result = fl.train(**options)
    first = next(row for row in result.history.rounds if row["num_nonfinite"])
    assert len(warned) == 1
    told = str(warned[0].message)
    assert told.startswith(f"round {first['round']} is not finite")
    assert "1 of 4 clients" in told
    assert "kept of client 3," in told


def test_rules_that_would_wait_for_evaluations_are_refused():
    options = setting(evaluate=None, stop=[fl.stopping.wall_clock(1e9)], num_rounds=2)
    assert fl.train(**options).stopped is None
    for rule in (fl.stopping.patience("loss", 2), fl.stopping.target("loss", 1.0)):
        with pytest.raises(ValueError, match="evaluate is None, so that it would never stop"):
            fl.train(**{**options, "stop": [rule]})
    with pytest.raises(TypeError, match="evaluate returned float; return a dict"):
        fl.train(**setting(evaluate=lambda state: 1.5))


def test_too_little_memory_is_told_with_what_needs_it():
    def evaluate(state):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    with pytest.raises(MemoryError, match=r"allocating 9 bytes.*16 bytes for params.*batch_size"):
        fl.train(**setting(evaluate=evaluate))
    # A model of 2^50 entries, drawn when the run begins.
    model = regression_model()._replace(init=lambda key: (jnp.zeros(2**50), {}))
    with pytest.raises(MemoryError, match=r"too little memory .* for the data, and each lane"):
        fl.train(**setting(algorithm=fl.fed_avg(model, optax.sgd(0.1))))


def test_results_are_printed_in_few_words():
    result = fl.train(**setting(num_rounds=1))
    assert repr(result.history) == "History(1 rounds, 2 evaluations)"
    assert repr(result.state).startswith("ServerState(params={b: float32, w: float32[3]}, model_st")
    assert repr(result).startswith("TrainResult(parameters=4, rounds=1, loss=")
    assert len(repr(result)) < 300


def test_a_step_compiles_once_on_one_device_and_on_two(tmp_path):
    """Also where the state is given, in processes of their own, one with a single device."""
    program = """
import os, sys
import jax, jax.numpy as jnp, numpy as np, optax
import fedjax_lite as fl

def count(num_devices):
    jax.config.update("jax_num_cpu_devices", num_devices)
    steps = []
    def compiled(event, seconds, fun_name="", **_):
        if event.endswith("backend_compile_duration") and fun_name == "jit(step)":
            steps.append(seconds)
    jax.monitoring.register_event_duration_secs_listener(compiled)
    model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2, lambda key: jnp.float32(0))
    clients = {i: {"x": np.ones(3, np.float32)} for i in range(4)}
    dataset = fl.FederatedDataset.from_clients(clients)
    drawn = fl.data.GeneratedPopulation(
        num_clients=4,
        num_examples=lambda key, i: 2,
        sample=lambda key, i: {"x": jax.random.normal(key, (2,))},
    )
    for population in (dataset, dataset.streamed(2), drawn):
        algorithm, sampler = fl.fed_avg(model, optax.sgd(0.1)), fl.samplers.uniform(4, 2)
        for state in (None, algorithm.init(jnp.float32(1))):
            fl.train(algorithm, population, sampler, 3, key=jax.random.key(0), state=state)
        print(len(steps))
        steps.clear()

for num_devices in (1, 2):
    pid = os.fork()  # Before JAX has computed anything, which a fork does not survive.
    if pid == 0:
        count(num_devices)
        sys.exit()
    assert os.waitpid(pid, 0)[1] == 0
"""
    assert ended(start(tmp_path, exec, program, {})) == 0, (tmp_path / "err").read_text()
    assert (tmp_path / "out").read_text().split() == ["1"] * 6
