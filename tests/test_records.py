import concurrent.futures
import csv
import errno
import json
import os
import runpy
import subprocess
import sys
import types

import jax
import pytest
from processes import contents, held_by_another_process

import fedjax_lite as fl
from fedjax_lite import _files


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_writes_rows_as_they_come_and_a_table_at_the_end(tmp_path):
    with fl.Recorder(tmp_path, {"rate": 0.1, "bound": float("inf")}) as recorder:
        recorder.on_eval({"round": 0, "loss": 2.5})
        recorder.on_round({"round": 1, "loss": float("nan"), "num_clients": 3}, None)
        assert [row["kind"] for row in lines(tmp_path)] == ["evaluation", "round"]
    assert lines(tmp_path)[1] == {"kind": "round", "round": 1, "loss": None, "num_clients": 3}
    with (tmp_path / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert table == [
        {"kind": "evaluation", "round": "0", "loss": "2.5", "num_clients": ""},
        {"kind": "round", "round": "1", "loss": "", "num_clients": "3"},
    ]
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["config"] == {"rate": 0.1, "bound": None}
    assert about["versions"]["jax"] == jax.__version__


def test_goes_on_after_a_line_that_was_cut_off(tmp_path):
    with fl.Recorder(tmp_path, {}) as recorder:
        recorder.on_round({"round": 1, "loss": 3.0}, None)
        recorder.on_round({"round": 2, "loss": 2.0}, None)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "rou')
    with fl.Recorder(tmp_path, {}) as recorder:
        recorder.on_round({"round": 2, "loss": 1.0}, None)
    assert [row["loss"] for row in lines(tmp_path)] == [3.0, 2.0, 1.0]
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [row["loss"] for row in csv.DictReader(file)] == ["3.0", "1.0"]


def test_what_is_recorded_stays(tmp_path, monkeypatch):
    rows = [{"kind": "round", "round": r, "loss": 1.0 / r} for r in (1, 2, 3)]
    damaged = "".join(json.dumps(row) + "\n" for row in rows).replace('"round": 2', '"rou\0')
    (tmp_path / "metrics.jsonl").write_text(damaged)
    with pytest.warns(UserWarning, match="line 2 is no row of metrics; .* kept as damaged-metrics"):
        recorder = fl.Recorder(tmp_path, {"rate": 0.1})
    assert (tmp_path / "damaged-metrics-0.jsonl").read_text() == damaged
    # The file is never without the rows that it has, whatever happens from here on.
    assert lines(tmp_path) == [rows[0], rows[2]]
    history = [{"round": r, "loss": 1.0 / r} for r in (1, 2)]
    recorder.on_resume(fl.History(history, [{"round": 0, "loss": 9.0}]))
    restored = [{"kind": "evaluation", "round": 0, "loss": 9.0}]
    assert lines(tmp_path) == [rows[0], rows[2], rows[1], *restored]
    recorder.__exit__(None, None, None)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [row["round"] for row in csv.DictReader(file)] == ["0", "1", "2", "3"]

    def power_cut(*args):
        raise OSError("power cut")

    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", power_cut)
        with pytest.raises(OSError, match="power cut"), fl.Recorder(tmp_path, {}) as recorder:
            recorder.on_eval({"round": 4})
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match="another run"), fl.Recorder(tmp_path, {"rate": 0.2}):
        raise ValueError("another run")
    assert contents(tmp_path) == before
    fl.Recorder(tmp_path, {"rate": 0.2}).__exit__(None, None, None)
    assert json.loads((tmp_path / "config.json").read_text())["config"] == {"rate": 0.2}


def test_one_process_records_in_a_folder(tmp_path):
    fl.Recorder(tmp_path, {}).__exit__(None, None, None)
    before = contents(tmp_path)
    with held_by_another_process(tmp_path / ".lock"):
        with pytest.raises(BlockingIOError, match="is being written by another process; wait"):
            fl.Recorder(tmp_path, {"rate": 0.1})
        assert contents(tmp_path) == before
    fl.Recorder(tmp_path, {}).__exit__(None, None, None)  # A killed process holds nothing.


def test_one_run_of_a_process_records_in_a_folder(tmp_path):
    """POSIX would let a thread lock what another one has, and give up both locks at its end."""
    with fl.Recorder(tmp_path / "a", {}):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            again = pool.submit(fl.Recorder, tmp_path / "b" / ".." / "a", {})
            with pytest.raises(BlockingIOError, match="by another run in this process; wait"):
                again.result()
        program = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | 4)"
        command = [sys.executable, "-S", "-c", program, tmp_path / "a" / ".lock"]
        assert subprocess.run(command, capture_output=True).returncode == 1
    fl.Recorder(tmp_path / "a", {}).__exit__(None, None, None)


def test_windows_locks_a_byte(tmp_path, monkeypatch):
    """As `msvcrt` does: it refuses a byte that is locked, also to the process that has it."""
    held = set()

    def locking(descriptor, mode, number):
        assert (mode, number, os.lseek(descriptor, 0, os.SEEK_CUR)) == (2, 1, 0)
        at = os.fstat(descriptor).st_ino
        if at in held:
            raise PermissionError(errno.EACCES, "Permission denied")
        held.add(at)

    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))
    monkeypatch.setattr(sys, "platform", "win32")
    files, of_another_process = (runpy.run_path(_files.__file__) for _ in range(2))
    with files["locked"](tmp_path / ".lock"):
        with pytest.raises(BlockingIOError, match="is being written by another process; wait"):
            of_another_process["locked"](tmp_path / ".lock").__enter__()
        with pytest.raises(BlockingIOError, match="by another run in this process"):
            files["locked"](tmp_path / ".lock").__enter__()


def test_writes_events_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    with fl.Recorder(tmp_path, {}, tensorboard=True) as recorder:
        recorder.on_eval({"round": 3, "loss": 0.25, "per_class": [1, 2]})
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"evaluation/loss" in events.read_bytes()
    assert b"per_class" not in events.read_bytes()


def test_names_the_revision_of_the_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fl.Recorder(tmp_path / "outside", {}).__exit__(None, None, None)
    assert json.loads((tmp_path / "outside" / "config.json").read_text())["git"] is None
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    revision = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    fl.Recorder(tmp_path / "inside", {}).__exit__(None, None, None)
    assert json.loads((tmp_path / "inside" / "config.json").read_text())["git"] == revision
