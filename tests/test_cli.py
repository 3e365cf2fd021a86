import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
from commands import refusal

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


@pytest.fixture
def computed_before(monkeypatch):
    """A process of tests has computed something: it is too late to set up the CPU."""
    monkeypatch.setattr("fedjax_lite.cli.quickstart.configure_cpu", lambda: None)


@pytest.mark.usefixtures("computed_before")
@pytest.mark.parametrize(("dataset", "accuracy"), [("halfspace", 0.99), ("digits", 0.9)])
def test_quickstart_trains_and_records(tmp_path, capsys, dataset, accuracy):
    out = tmp_path / "new" / "folder"
    main(["quickstart", "--dataset", dataset, "--out", str(out), "--seed", "3", "--json"])
    report = json.loads(capsys.readouterr().out)
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


@pytest.mark.usefixtures("computed_before")
def test_quickstart_without_a_terminal_prints_plain_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["quickstart", "--rounds", "12"])
    printed = capsys.readouterr().out
    assert [line.split()[1] for line in printed.splitlines()[:3]] == ["1/12", "10/12", "12/12"]
    assert "\x1b" not in printed
    (out,) = (tmp_path / "runs").iterdir()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 12


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


@pytest.mark.usefixtures("computed_before")
def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    told = refusal(capsys, "quickstart", "--out", tmp_path / "file" / "below")
    assert "cannot be written" in told


_WITHOUT_EXTRAS = """
import sys
extras = ("tyro", "matplotlib", "sklearn")
of_tests = ("torch", "hypothesis", "pytest")
sys.modules |= dict.fromkeys(extras + of_tests)  # To import them raises ImportError.
from fedjax_lite.cli import main
for module in of_tests:
    del sys.modules[module]
for module in extras:
    try:
        main(["quickstart", "--dataset=digits", "--out", sys.argv[1]])
    except SystemExit as stop:
        print(module, stop.code)
    del sys.modules[module]
"""


def test_the_core_needs_no_extra_and_a_missing_one_is_told_in_one_line(tmp_path):
    program = [sys.executable, "-c", _WITHOUT_EXTRAS, tmp_path / "out"]
    result = subprocess.run(program, capture_output=True, text=True, check=True)
    modules = ("tyro", "matplotlib", "sklearn")
    assert result.stdout.splitlines() == [f"{module} 2" for module in modules]
    assert result.stderr.splitlines() == [
        f"fedjax-lite: {module} is not installed; run: pip install 'fedjax-lite[run]'"
        for module in modules
    ]


def test_help_reads_well(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["quickstart", "--help"])
    assert not stop.value.code
    told = capsys.readouterr().out
    for option in ("--dataset", "--rounds", "--seed", "--out", "--json"):
        assert option in told


@pytest.mark.usefixtures("computed_before", "in_the_foreground")
@pytest.mark.parametrize(("name", "exit_code"), [("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_keeps_what_was_recorded(tmp_path, capsys, monkeypatch, name, exit_code):
    @contextlib.contextmanager
    def progress(num_rounds, *, stderr):
        yield lambda done, *_: done == 3 and os.kill(os.getpid(), getattr(signal, name))

    monkeypatch.setattr("fedjax_lite.cli.quickstart.progress", progress)
    with pytest.raises(SystemExit) as stop:
        main(["quickstart", "--rounds=1000000", f"--out={tmp_path}"])
    assert stop.value.code == exit_code
    told = capsys.readouterr().err
    assert told.startswith("fedjax-lite: interrupted after")
    assert told.count("\n") == 1
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["round"] for row in rows] == list(range(len(rows)))
    assert f"after {len(rows)} of 1000000 rounds" in told
