"""Several processes that make one run: what they agree on, and how they end."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import one_of_two
import pytest
from problems import SIZES, regression_dataset

import fedjax_lite as fl
from fedjax_lite.cli import main
from fedjax_lite.engine import store

ROOT = pathlib.Path(__file__).parents[1]

eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

# A device each, and one that is silent is soon missed.
_PROGRAM = """
import os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from fedjax_lite.cli import hosts, main
hosts.HEARTBEAT_S = 4
main(sys.argv[1:])
"""


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(*args, env=None, **options):
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        text=True,
        **options,
    )


def start_two(*args, by_slurm=False):
    """Two processes of the command line."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if by_slurm:
        slurm = {"SLURM_JOB_ID": os.getpid(), "SLURM_STEP_NODELIST": "localhost"}
        slurm |= {"SLURM_NTASKS": 2, "SLURM_LOCALID": 0}
        env = {name: str(value) for name, value in slurm.items()}
        return [
            start(
                *("-c", _PROGRAM, *args, "--distributed"),
                env={**env, "SLURM_PROCID": str(i)},
                **pipes,
            )
            for i in range(2)
        ]
    hosts = ("--coordinator", free_address(), "--num-hosts=2")
    return [start("-c", _PROGRAM, *args, *hosts, f"--host={i}", **pipes) for i in range(2)]


def ended(processes, timeout=600):
    """Exit codes, and what they wrote to stdout and stderr."""
    try:
        told = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], *zip(*told, strict=True)


@eight_devices
def test_two_processes_make_the_run_of_one(tmp_path, monkeypatch):
    dataset, mesh = regression_dataset(), fl.clients_mesh(4)
    dataset.save(tmp_path / "data")
    address = free_address()
    results = [tmp_path / f"{i}.npz" for i in range(2)]
    processes = [
        start(one_of_two.__file__, i, address, tmp_path, result) for i, result in enumerate(results)
    ]
    codes, _, _ = ended(processes)
    assert codes == [0, 0]
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


def test_a_process_that_is_killed_ends_the_other_one_and_the_run_goes_on(tmp_path, monkeypatch):
    # The second two need not compile again.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    out = tmp_path / "out"
    settings = (
        *("train", "--dataset=synthetic", "--num-clients=6", "--model=logistic"),
        *("--cohort-size=3", "--num-steps=2", "--eval-every=100000", "--checkpoint-every=5"),
    )
    processes = start_two(*settings, "--rounds=100000", "--out", out)
    deadline = time.monotonic() + 400
    while not (out / "checkpoints" / "5").exists():
        assert time.monotonic() < deadline
        assert [process.poll() for process in processes] == [None, None]
        time.sleep(0.05)
    processes[1].kill()
    began = time.monotonic()
    codes, _, told = ended(processes)
    assert time.monotonic() - began < 60
    assert codes[0] not in (0, -signal.SIGKILL)
    assert codes[1] == -signal.SIGKILL
    assert "unhealthy" in told[0] or "process 0 of 2 has lost another one" in told[0]

    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    more = str(max(row["round"] for row in rows) + 10)
    again = ("train", "--resume", out, "--rounds", more, "--json")
    codes, printed, told = ended(start_two(*again, by_slurm=True))
    assert codes == [0, 0], told
    report = json.loads(printed[0])
    assert report["rounds"] == [0, int(more)]
    assert report["device"].startswith("2 x ")
    assert printed[1] == ""
    assert "round " not in told[1]
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
