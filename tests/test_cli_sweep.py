import json
import os
import signal

import numpy as np
import pytest

import fedjax_lite as fl
from fedjax_lite.cli import main

SMALL = (
    *("--dataset=synthetic", "--num-clients=6", "--model=logistic"),
    *("--cohort-size=3", "--num-steps=2", "--rounds=4", "--eval-every=2"),
)


pytestmark = pytest.mark.usefixtures("computed_before", "built_once")


def run(capsys, *args):
    main([*map(str, args), "--json"])
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_a_sweep_is_as_many_runs_of_train(tmp_path, capsys):
    out = tmp_path / "sweep"
    vary = (
        *("--vary", "client_optimizer.learning_rate=0.05,0.2", "--vary", "seed=0:2"),
        *("--vary", "algorithm.mu=0.1,0.5"),
    )
    swept, told = run(capsys, "sweep", *SMALL, "--algorithm=fed_prox(mu=1)", *vary, "--out", out)
    assert swept["programs"] == 1
    assert "8 runs in one program" in told
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "sweep.json").read_text()) == swept
    one = swept["runs"][6]
    settings = {name: one[name] for name in swept["vary"]}
    assert settings == {"client_optimizer.learning_rate": 0.2, "seed": 1, "algorithm.mu": 0.1}
    options = ("--client-lr=0.2", "--seed=1", "--algorithm=fed_prox(mu=0.1)")
    alone, _ = run(capsys, "train", *SMALL, *options, "--out", tmp_path / "alone")
    assert one["rounds"] == alone["rounds"] == [0, 2, 4]
    np.testing.assert_allclose(one["loss"], alone["loss"], rtol=1e-5)
    np.testing.assert_allclose(one["accuracy"], alone["accuracy"], atol=1e-6)
    # Its folder is one that other commands read.
    main(["plot", str(out / one["folder"]), "--out", str(tmp_path / "one.png")])
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("undrawn")
def test_says_what_takes_programs_of_its_own(tmp_path, capsys, monkeypatch):
    looks = []
    monkeypatch.setattr("fedjax_lite.xla.memory.has_many_programs", lambda: bool(looks.append(1)))
    vary = ("--vary", "algorithm=fed-avg,fed_prox(mu=0.1, num_epochs=2)", "--vary", "seed=0:2")
    swept, told = run(capsys, "sweep", *SMALL, *vary, "--out", tmp_path / "sweep")
    assert swept["programs"] == 2
    assert "4 runs in 2 programs, since algorithm cannot vary within one" in " ".join(told.split())
    assert len({tuple(one["loss"]) for one in swept["runs"]}) == 4
    assert len(looks) == 2  # A process has room for some thousands of programs.


@pytest.mark.usefixtures("undrawn")
def test_numbers_inside_of_calls_vary(tmp_path, capsys):
    client = "chain(clip_by_global_norm(1.0), sgd(cosine_decay_schedule(0.1, 100)))"
    swept, _ = run(
        *(capsys, "sweep", *SMALL, f"--client-optimizer={client}", "--out", tmp_path / "sweep"),
        *("--updates=clip_by_norm(1.0), quantize_uniform(256)", "--server-optimizer=fed_adam(0.1)"),
        *("--vary", "client_optimizer.init_value=0.1,0.2"),
        *("--vary", "updates.clip_by_norm.max_norm=0.01,9"),
        *("--vary", "server_optimizer.tau=0.001,0.1"),
    )
    assert (swept["programs"], len(swept["runs"])) == (1, 8)
    assert len({tuple(one["loss"]) for one in swept["runs"]}) == 8
    # Some functions of optax ask for the value of a number: they take a program for each.
    client = "sgd(exponential_decay(0.1, 2, 0.5))"
    swept, _ = run(
        *(capsys, "sweep", *SMALL, f"--client-optimizer={client}", "--out", tmp_path / "other"),
        *("--vary", "client_optimizer.learning_rate.decay_rate=0.5,0.9", "--vary", "seed=0:2"),
    )
    for one in swept["runs"][::3]:  # Both rates, and both seeds.
        rate = one["client_optimizer.learning_rate.decay_rate"]
        client = f"sgd(exponential_decay(0.1, 2, {rate}))"
        out = tmp_path / f"{rate} {one['seed']}"
        options = (f"--client-optimizer={client}", f"--seed={one['seed']}", "--out", out)
        alone, _ = run(capsys, "train", *SMALL, *options)
        np.testing.assert_allclose(one["loss"], alone["loss"], rtol=1e-5)


def test_goes_on_with_the_programs_that_had_not_ended(tmp_path, capsys, monkeypatch):
    asked = []

    def run_program(runs):
        asked.append([run.model.partition("(")[0] for run in runs])
        if len(asked) == 2:
            raise ValueError("power cut")
        rows = [{"round": r, "loss": 1.0 / (1 + r), "accuracy": float("nan")} for r in (0, 4)]
        return [fl.History([], rows) for _ in runs]

    monkeypatch.setattr("fedjax_lite.cli.sweep._run", run_program)
    vary = ("--vary", "model=logistic,mlp", "--vary", "seed=0:2", "--out", tmp_path / "sweep")
    refusal = []
    for more in ([], ["--client-lr=7"]):
        with pytest.raises(SystemExit):
            main(list(map(str, ["sweep", *SMALL, *vary, *more])))
        refusal.append(capsys.readouterr().err)
    assert refusal[0] == "fedjax-lite: power cut\n"
    assert "holds a sweep of other settings; choose another folder" in refusal[1]
    swept, _ = run(capsys, "sweep", *SMALL, *vary)
    # The first program, the one that was interrupted, and that one again.
    assert asked == [["logistic", "logistic"], ["mlp", "mlp"], ["mlp", "mlp"]]
    assert [one["loss"] for one in swept["runs"]] == [[1.0, 0.2]] * 4
    assert swept["runs"][0]["accuracy"] == [None, None]


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
@pytest.mark.parametrize("at", ["a program", "the last program", "the pictures"])
def test_a_signal_keeps_what_has_ended(tmp_path, capsys, monkeypatch, name, code, at):
    asked, is_sent = [], []

    def send():
        if not is_sent:
            is_sent.append(True)
            os.kill(os.getpid(), getattr(signal, name))

    def run_program(runs):
        asked.append(runs[0].model.partition("(")[0])
        if len(asked) == {"a program": 1, "the last program": 2}.get(at):
            send()
        rows = [{"round": r, "loss": 1.0, "accuracy": 0.5} for r in (0, 4)]
        return [fl.History([], rows) for _ in runs]

    monkeypatch.setattr("fedjax_lite.cli.sweep._run", run_program)
    monkeypatch.setattr("fedjax_lite.cli.sweep.draw", lambda *_: send())
    vary = ("--vary", "model=logistic,mlp", "--out", tmp_path / "sweep")
    with pytest.raises(SystemExit) as stop:
        run(capsys, "sweep", *SMALL, *vary)
    assert stop.value.code == code
    by = "" if name == "SIGINT" else f" by {name}"
    told = f"fedjax-lite: interrupted{by}; the same command with --out {tmp_path / 'sweep'} goes on"
    assert capsys.readouterr().err.splitlines()[-1] == told
    swept, _ = run(capsys, "sweep", *SMALL, *vary)
    assert asked == ["logistic", "mlp"]  # Each of them once.
    assert [one["loss"] for one in swept["runs"]] == [[1.0, 1.0]] * 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--vary", "client_lr=x"], "client_lr takes float values"),
        (["--vary", "seed=0.5"], "seed takes int values"),
        (["--vary", "seed=3:3"], "name at least one value"),
        (["--vary", "seed=3,3"], "each once"),
        (["--vary", "speed=1"], "choose one of dataset, test"),
        (["--vary", "seed"], "write a setting and its values"),
        (["--vary", "speed.limit=1"], "choose one of dataset, test, partition, model"),
        (["--vary", "algorithm.nu=1"], "--vary is algorithm.nu; choose one of algorithm.weighting"),
        (["--vary", "updates.clip_by_norm.max_norm=1"], "and updates has nothing; write updates"),
        (["--vary", "partition.alpha=1"], "and partition is left open; name what it is"),
        (["--vary", "seed=1", "--vary", "seed=2"], "--vary is given twice for a setting"),
        ([], "or not at all"),
        (["--vary", "client_lr=-1,1"], "--client-lr is -1.0; choose a positive number"),
        (
            ["--vary", "client_optimizer.learning_rate=0,1"],
            "--client-optimizer has a learning_rate",
        ),
        (["--vary", "seed=0:2", "--fine-tune-epochs", "1"], "--fine-tune-epochs does nothing in"),
        (["--vary", "algorithm=fed_avg,scafold"], "did you mean scaffold?"),
        (["--vary", "seed=0:2", "--out", "."], "--out . cannot be written: File exists"),
    ],
)
def test_refuses_in_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sweep", *SMALL, *args])
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert message in captured.err
