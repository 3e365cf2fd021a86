"""Several processes that make one run: what they agree on, and how they end."""

import contextlib
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
import orbax.checkpoint
import fedjax_lite.cli.train
from fedjax_lite.cli import hosts, main
from processes import in_two
hosts.HEARTBEAT_S = 4

def command(process):
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{sys.argv[1]}/{process}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    os.environ["SLURM_PROCID"] = str(process)
    main([arg.replace("PROCESS", str(process)) for arg in sys.argv[2:]])

in_two(command)
"""


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(*args, env=None):
    """A program that forks into two: it, and their ids."""
    program = subprocess.Popen(
        [sys.executable, *map(str, args)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **(env or {})},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return program, list(map(int, program.stdout.readline().split()))


def start_two(folder, *args, by_slurm=False):
    """Two processes of the command line, which write to files in a folder."""
    if by_slurm:
        slurm = {"SLURM_JOB_ID": os.getpid(), "SLURM_STEP_NODELIST": "localhost"}
        slurm |= {"SLURM_NTASKS": 2, "SLURM_LOCALID": 0}
        env = {name: str(value) for name, value in slurm.items()}
        return start("-c", _PROGRAM, folder, *args, "--distributed", env=env)
    hosts = ("--coordinator", free_address(), "--num-hosts=2", "--host=PROCESS")
    return start("-c", _PROGRAM, folder, *args, *hosts)


def ended(program, timeout=600):
    """Exit codes of the two."""
    try:
        told, _ = program.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    return list(map(int, told.splitlines()[-1].split()))  # After what Gloo tells.


def told(folder, name):
    return [(folder / f"{process}.{name}").read_text() for process in range(2)]


@eight_devices
def test_two_processes_make_the_run_of_one(tmp_path, monkeypatch):
    dataset, mesh = regression_dataset(), fl.clients_mesh(4)
    dataset.save(tmp_path / "data")
    results = [tmp_path / f"{i}.npz" for i in range(2)]
    program, _ = start(one_of_two.__file__, free_address(), tmp_path, *results)
    assert ended(program) == [0, 0]
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
    program, ids = start_two(tmp_path, *settings, "--rounds=100000", "--out", out)
    deadline = time.monotonic() + 400
    while not (out / "checkpoints" / "5").exists():
        assert time.monotonic() < deadline
        assert program.poll() is None
        time.sleep(0.05)
    os.kill(ids[1], signal.SIGKILL)
    began = time.monotonic()
    codes = ended(program)
    assert time.monotonic() - began < 60
    assert codes[0] not in (0, -signal.SIGKILL)
    assert codes[1] == -signal.SIGKILL
    first, _ = told(tmp_path, "err")
    assert "unhealthy" in first or "process 0 of 2 has lost another one" in first

    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    more = str(max(row["round"] for row in rows) + 10)
    again = ("train", "--resume", out, "--rounds", more, "--json")
    program, _ = start_two(tmp_path, *again, by_slurm=True)
    assert ended(program) == [0, 0], told(tmp_path, "err")
    printed = told(tmp_path, "out")
    report = json.loads(printed[0])
    assert report["rounds"] == [0, int(more)]
    assert report["device"].startswith("2 x ")
    assert printed[1] == ""
    assert "round " not in told(tmp_path, "err")[1]
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
