import json
import os
import signal
import subprocess
import sys

import pytest
from processes import interrupted

from fedjax_lite.cli import main


def command(*args, **options):
    return subprocess.run(
        [sys.executable, "-m", "fedjax_lite", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.parametrize(("dataset", "accuracy"), [("halfspace", 0.99), ("digits", 0.9)])
def test_quickstart_trains_and_records(tmp_path, dataset, accuracy):
    out = tmp_path / "new" / "folder"
    result = command("quickstart", "--dataset", dataset, "--out", out, "--seed", 3, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert set(report) >= {
        *("dataset", "rounds", "seed", "loss", "accuracy", "compile_s", "run_s", "device"),
        *("versions", "out"),
    }
    assert len(report["loss"]) == len(report["accuracy"]) == report["rounds"] == 100
    assert report["accuracy"][-1] >= accuracy
    if dataset == "halfspace":
        assert report["loss"][-1] < 0.13
        assert is_png(out / "data.png")
    assert is_png(out / "loss.png")
    assert is_png(out / "accuracy.png")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(100))
    assert [row["loss"] for row in rows] == report["loss"]
    config = json.loads((out / "config.json").read_text())
    assert (config["dataset"], config["seed"], config["rounds"]) == (dataset, 3, 100)
    assert {"jax", "optax"} < set(config["versions"])


def test_quickstart_without_a_terminal_prints_plain_lines(tmp_path):
    result = command("quickstart", "--rounds", 12, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["1/12", "10/12", "12/12"]
    assert "\x1b" not in result.stdout
    (out,) = (tmp_path / "runs").iterdir()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 12


def refusal(capsys, *args):
    """What is told in a line. In this process: another one imports JAX for two seconds."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, args)))
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    return captured.err


def test_a_process_ends_as_the_command_does(tmp_path):
    result = command("quickstart", "--rounds", "0", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("fedjax-lite: --rounds is 0; choose an integer at least 1")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bogus", "3"], "Unrecognized options: --bogus, 3; see fedjax-lite quickstart --help"),
        (["--dataset", "mnist"], "invalid choice 'mnist' for argument '--dataset'"),
        (["--rounds", "0"], "--rounds is 0; choose an integer at least 1"),
        (["--rounds", "ten"], "Error parsing --rounds"),
        (["--seed", "-1"], "--seed is -1; choose an integer between 0 and"),
    ],
)
def test_wrong_options_are_told_in_one_line(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, "quickstart", *args)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_command_is_told_in_one_line(capsys):
    assert "quickstart" in refusal(capsys)


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    # It is too late for that.
    monkeypatch.setattr("fedjax_lite.cli.quickstart.configure_cpu", lambda: None)
    (tmp_path / "file").write_text("")
    told = refusal(capsys, "quickstart", "--out", tmp_path / "file" / "below")
    assert "cannot be written" in told


@pytest.mark.parametrize(
    ("module", "dataset"),
    [("tyro", "halfspace"), ("matplotlib", "halfspace"), ("sklearn", "digits")],
)
def test_a_missing_extra_is_told_in_one_line(tmp_path, module, dataset):
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / f"{module}.py").write_text("raise ImportError")
    env = {**os.environ, "PYTHONPATH": str(blocked)}
    result = command("quickstart", "--dataset", dataset, "--out", tmp_path / "out", env=env)
    assert result.returncode == 2
    message = f"{module} is not installed; run: pip install 'fedjax-lite[run]'"
    assert result.stderr == f"fedjax-lite: {message}\n"


def test_the_core_needs_no_extra(tmp_path):
    for module in ("tyro", "matplotlib", "sklearn", "torch", "hypothesis", "pytest"):
        (tmp_path / f"{module}.py").write_text("raise ImportError")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", "import fedjax_lite"], env=env, check=True)


def test_help_reads_well(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["quickstart", "--help"])
    assert not stop.value.code
    told = capsys.readouterr().out
    for option in ("--dataset", "--rounds", "--seed", "--out", "--json"):
        assert option in told


@pytest.mark.parametrize(("name", "exit_code"), [("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_keeps_what_was_recorded(tmp_path, name, exit_code):
    metrics = tmp_path / "metrics.jsonl"
    code, stderr = interrupted(
        *("quickstart", "--rounds=1000000", f"--out={tmp_path}"),
        once=lambda: metrics.exists() and metrics.stat().st_size > 1000,
        by=signal.Signals[name],
    )
    assert code == exit_code
    assert stderr.startswith("fedjax-lite: interrupted after")
    assert stderr.count("\n") == 1
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert f"after {len(rows)} of 1000000 rounds" in stderr
