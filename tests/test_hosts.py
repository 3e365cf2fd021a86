"""Several processes that make one run: what they agree on, and how they end."""

import json
import os
import signal
import socket
import time

import chex
import jax
import numpy as np
import one_of_two
import pytest
from problems import SIZES, regression_dataset
from processes import ended, in_two, start

import fedjax_lite as fl
from fedjax_lite.cli import main
from fedjax_lite.engine import store
from fedjax_lite.xla.hosts import may_be_lost

eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start_two(folder, work, *args):
    """Two processes that run `work(process, *args)`, below one: it, and their ids."""
    folder.mkdir()
    program = start(folder, in_two, work, *args)
    while not (folder / "out").exists() or not (folder / "out").read_text().endswith("\n"):
        time.sleep(0.05)
    return program, list(map(int, (folder / "out").read_text().split()))


def start_commands(folder, *args, by_slurm=False):
    """Two processes of the command line, which write to files in a folder."""
    environment = {}
    hosts = ("--coordinator", free_address(), "--num-hosts=2", "--host=PROCESS")
    if by_slurm:
        environment = {"SLURM_JOB_ID": os.getpid(), "SLURM_STEP_NODELIST": "localhost"}
        environment |= {"SLURM_NTASKS": 2, "SLURM_LOCALID": 0}
        hosts = ("--distributed",)
    return start_two(folder, one_of_two.command, folder, environment, *args, *hosts)


def codes(program, folder):
    """Exit codes of the two."""
    assert ended(program) == 0, (folder / "err").read_text()
    return list(map(int, (folder / "out").read_text().splitlines()[-1].split()))


def told(folder, name):
    return [(folder / f"{process}.{name}").read_text() for process in range(2)]


@eight_devices
def test_two_processes_make_the_run_of_one(tmp_path, monkeypatch):
    dataset, mesh = regression_dataset(), fl.clients_mesh(4)
    dataset.save(tmp_path / "data")
    results = [tmp_path / f"{i}.npz" for i in range(2)]
    both = tmp_path / "both"
    program, _ = start_two(both, one_of_two.main, free_address(), tmp_path, results)
    assert codes(program, both) == [0, 0], (both / "err").read_text()
    both = first, second = [dict(np.load(result)) for result in results]

    # Between them they read each row once, and about half of them each.
    rows = [found.pop("streamed read") for found in both]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(sum(SIZES)))
    assert min(map(len, rows)) > sum(SIZES) / 4
    # Each has the entries of half of the clients.
    kept = [found.pop("resident kept") for found in both]
    chex.assert_trees_all_equal(first, second)

    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    monkeypatch.setattr(store, "_LEAST_SPREAD_BYTES", 1)
    found = {name: x for name, x in first.items() if name.startswith("streamed")}
    streamed = one_of_two.train(dataset.streamed(one_of_two.COHORT_SIZE, mesh=mesh))
    expected = {f"streamed {name}": x for name, x in streamed.items()}
    chex.assert_trees_all_close(found, expected, **tolerance)

    straight = one_of_two.train_resident(mesh, num_rounds=6)
    expected = {f"resident {name}": x for name, x in one_of_two.numbers(straight).items()}
    entries = expected.pop("resident kept")
    found = {name: first[name] for name in expected}
    chex.assert_trees_all_close(found, expected, **tolerance)
    np.testing.assert_allclose(np.concatenate(kept), entries, **tolerance)
    assert 1 <= first["interrupted"] < 6
    losses = [row["loss"] for history in one_of_two.sweep() for row in history.rounds]
    np.testing.assert_allclose(first["swept"], losses, rtol=1e-5)

    # It goes on in one process, and the records are of one run.
    resumed = one_of_two.train_resident(mesh, tmp_path / "run")
    whole = one_of_two.train_resident(mesh)
    chex.assert_trees_all_close(one_of_two.numbers(resumed), one_of_two.numbers(whole), **tolerance)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rounds = [row["round"] for row in map(json.loads, lines) if row["kind"] == "round"]
    assert rounds == list(range(1, 9))


def test_a_process_that_is_killed_ends_the_other_one_and_the_run_goes_on(tmp_path):
    first, second, out = (tmp_path / name for name in ("first", "second", "run"))
    settings = (
        *("train", "--dataset=synthetic", "--num-clients=6", "--model=logistic"),
        *("--cohort-size=3", "--num-steps=2", "--eval-every=100000", "--checkpoint-every=5"),
    )
    program, ids = start_commands(first, *settings, "--rounds=100000", "--out", out)
    deadline = time.monotonic() + 400
    while not (out / "checkpoints" / "5").exists():
        assert time.monotonic() < deadline
        assert program.is_alive()
        time.sleep(0.05)
    os.kill(ids[1], signal.SIGKILL)
    began = time.monotonic()
    of_first, of_second = codes(program, first)
    assert time.monotonic() - began < 60
    assert of_first not in (0, -signal.SIGKILL)
    assert of_second == -signal.SIGKILL
    last = told(first, "err")[0]
    assert "unhealthy" in last or "process 0 of 2 has lost another one" in last

    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    more = str(max(row["round"] for row in rows) + 10)
    again = ("train", "--resume", out, "--rounds", more, "--json")
    program, _ = start_commands(second, *again, by_slurm=True)
    assert codes(program, second) == [0, 0], told(second, "err")
    printed = told(second, "out")
    report = json.loads(printed[0])
    assert report["rounds"] == [0, int(more)]
    assert report["device"].startswith("2 x ")
    assert printed[1] == ""
    assert "round " not in told(second, "err")[1]
    assert (out / "accuracy.png").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--host=1"], "--coordinator, --num-hosts and --host go together; give all three"),
        (["--distributed"], "the other hosts cannot be joined (coordinator_address should be"),
    ],
)
def test_hosts_that_cannot_be_joined(given, message, capsys, monkeypatch, tmp_path):
    def refuse(*args, **options):  # As it does in a process that nothing has started.
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", refuse)
    monkeypatch.setattr("fedjax_lite.configure_cpu", lambda: None)
    with pytest.raises(SystemExit) as stop:
        main(["train", *given, "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert message in captured.err
    assert not (tmp_path / "out").exists()


def test_errors_of_the_runtime_may_be_those_of_a_lost_process(monkeypatch):
    of_runtime = jax.errors.JaxRuntimeError("INTERNAL: it failed")
    coded, own = ValueError("UNKNOWN: Gloo AllGather failed"), ValueError("rounds is 0; choose 1")
    assert not may_be_lost(of_runtime)  # There is no other one.
    monkeypatch.setattr("jax.process_count", lambda: 2)
    assert may_be_lost(of_runtime)
    assert may_be_lost(coded)
    assert not may_be_lost(own)
    assert not may_be_lost(None)
