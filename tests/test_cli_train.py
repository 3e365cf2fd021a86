import dataclasses
import errno
import json
import platform
import signal

import jax
import optax
import pytest
from commands import refusal, report
from processes import contents, held_by_another_process, interrupted

import fedjax_lite as fl
from fedjax_lite.cli import main
from fedjax_lite.experiments.build import build
from fedjax_lite.experiments.settings import Settings

SMALL = (
    *("--dataset=synthetic", "--num-clients=6", "--model=logistic"),
    *("--cohort-size=3", "--num-steps=2"),
)


pytestmark = pytest.mark.usefixtures("computed_before")
built_once = pytest.mark.usefixtures("built_once")
undrawn = pytest.mark.usefixtures("undrawn")


def rows(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


@undrawn
def test_an_asynchronous_run_goes_on_for_more_rounds(tmp_path, capsys, monkeypatch):
    """Also where the longer schedule has clients that are staler."""
    built = []
    monkeypatch.setattr(
        "fedjax_lite.cli.train.build", lambda settings: built.append(build(settings)) or built[-1]
    )
    durations = "with_network(log_normal(2.0), upload=100.0)"
    options = (
        *("--dataset=synthetic", "--num-clients=9", "--model=logistic", "--num-steps=1"),
        f"--sampler=fed_buff(concurrency=6, buffer_size=1, durations={durations})",
    )
    report(capsys, "train", *options, "--rounds=3", "--out", tmp_path / "out")
    report(capsys, "train", "--resume", tmp_path / "out", "--rounds=12")
    samplers = [one.sampler for one in built]
    assert samplers[0].max_staleness < samplers[1].max_staleness
    found, schedule = rows(tmp_path / "out", "round"), samplers[1].schedule
    assert [row["staleness"] for row in found] == schedule.staleness[:, 0].tolist()
    clock = schedule.ended[:, 0].tolist()
    assert [row["wall_clock"] for row in found] == pytest.approx(clock, rel=1e-5)


@built_once
def test_a_run_is_recorded_resumed_and_evaluated(tmp_path, capsys):
    out, whole = tmp_path / "out", tmp_path / "whole"
    first = report(capsys, "train", *SMALL, "--rounds=5", "--eval-every=2", "--out", out)
    assert first["rounds"] == [0, 2, 4, 5]
    assert len(first["loss"]) == len(first["accuracy"]) == 4
    assert {"client_updates_per_s", "compile_s", "run_s", "device", "versions"} <= set(first)
    assert first["out"] == str(out)
    config = json.loads((out / "config.json").read_text())
    assert config["config"]["dataset"].startswith("synthetic(alpha=1.0, beta=1.0, num_clients=6, ")
    assert config["config"]["client_optimizer"].startswith("sgd(learning_rate=0.1, momentum=None")
    clients = json.loads((out / "clients.json").read_text())
    assert len(clients["accuracy"]) == len(clients["num_examples"]) == 6
    for name in ("loss", "accuracy", "clients"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    # A row that was cut off is not glued to the next one.
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "rou')
    # What is damaged or missing beside the checkpoint is not needed, or is restored from it.
    (out / "clients.json").write_text('{"accur')
    everything = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(everything[1:]))
    resumed = report(capsys, "train", "--resume", out, "--rounds=8")
    expected = report(capsys, "train", *SMALL, "--rounds=8", "--eval-every=2", "--out", whole)
    assert resumed["rounds"] == [0, 2, 4, 5, 6, 8]
    assert resumed["loss"][-1] == expected["loss"][-1]
    assert sorted(row["round"] for row in rows(out, "evaluation")) == [0, 2, 4, 5, 6, 8]
    assert len(json.loads((out / "clients.json").read_text())["accuracy"]) == 6
    assert [row["round"] for row in rows(out, "round")] == list(range(1, 9))
    assert [row["loss"] for row in rows(out, "round")] == [
        row["loss"] for row in rows(whole, "round")
    ]

    before = contents(out)
    told = report(capsys, "eval", out)
    assert contents(out) == before
    assert told["round"] == 8
    assert told["loss"] == pytest.approx(resumed["loss"][-1])
    assert told["clients"]["number"] == 6
    best = report(capsys, "eval", out, "--best")
    assert best["accuracy"] == pytest.approx(max(resumed["accuracy"]))

    assert "holds a run; choose another folder, or --resume" in refusal(
        capsys, "train", *SMALL, "--out", out
    )
    before = contents(out)
    assert "--client-optimizer is sgd(learning_rate=0.5, " in refusal(
        capsys, "train", "--resume", out, "--client-lr", 0.5
    )
    assert contents(out) == before


@built_once
@undrawn
def test_a_run_that_is_killed_before_its_first_round_is_resumed(tmp_path, capsys, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*args, **options):
        raise Killed

    out = tmp_path / "run"
    with monkeypatch.context() as context:
        context.setattr(fl, "train", killed)
        with pytest.raises(Killed):
            main(["train", *SMALL, "--rounds=2", "--out", str(out)])
    assert f"or --resume {out}" in refusal(capsys, "train", *SMALL, "--rounds=2", "--out", out)
    assert report(capsys, "train", "--resume", out)["rounds"] == [0, 2]


@built_once
@undrawn
def test_a_damaged_file_of_entries_is_told_in_one_line(tmp_path, capsys):
    """Of a model of which the server has a part: all evaluations read the file."""
    out = tmp_path / "run"
    small = ("--dataset=synthetic", "--num-clients=4", "--cohort-size=4", "--rounds=1")
    algorithm = "--algorithm=fed_rep(personal='Dense_1/*', num_head_epochs=1)"
    report(capsys, "train", *small, algorithm, "--store-in-file", "--out", out)
    assert 0 <= report(capsys, "eval", out)["personal_accuracy"] <= 1
    file = out / "entries" / "store"
    data = file.read_bytes()
    for damaged in (data[:-4], bytes([data[0] ^ 1]) + data[1:], None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        before = contents(out)
        assert "store does not hold what was written at place" in refusal(capsys, "eval", out)
        assert contents(out) == before


@built_once
def test_a_folder_recorded_from_python_is_left_as_it_is(tmp_path, capsys):
    folder = tmp_path / "rec"

    def go_on():
        with fl.Recorder(folder, {"rate": 0.1}) as recorder:
            return fl.train(
                fl.fed_sgd(fl.models.halfspace_classifier(), optax.sgd(0.1)),
                fl.data.halfspace(),
                fl.samplers.uniform(100, 2),
                0,
                key=jax.random.key(0),
                evaluate=lambda state: {"loss": state.params["bias"]},
                on_eval=recorder.on_eval,
                checkpoints=fl.Checkpoints(folder / "checkpoints"),
            )

    ended = go_on()
    before = contents(folder)
    for command in (["eval"], ["train", "--resume"], ["train", "--dry-run", "--resume"]):
        told = refusal(capsys, *command, folder)
        assert "rec was recorded with rate, no setting of a command; in Python" in told
    assert contents(folder) == before
    assert go_on().history == ended.history  # With the seconds: it was not run again.

    # Settings that the command line knows, beside checkpoints of something else.
    experiment = Settings(
        dataset="synthetic", num_clients=6, cohort_size=3, num_steps=2, model="logistic"
    )
    settings = {"config": dataclasses.asdict(experiment)}
    (folder / "config.json").write_text(json.dumps(settings))
    before = contents(folder)
    assert "are of another run: state.params" in refusal(capsys, "eval", folder)
    assert contents(folder) == before
    (folder / "config.json").write_text(json.dumps(settings)[:-9])
    assert "config.json cannot be read: " in refusal(capsys, "eval", folder)
    assert "config.json cannot be read: " in refusal(capsys, "train", "--resume", folder)

    # A run of theirs, without a best state.
    built = build(experiment)
    folder = tmp_path / "known"
    with fl.Recorder(folder, dataclasses.asdict(built.settings)):
        checkpoints = fl.Checkpoints(folder / "checkpoints")
        options = {"key": jax.random.key(0), "checkpoints": checkpoints}
        fl.train(built.algorithm, built.population, built.sampler, 0, **options)
    before = contents(folder)
    assert report(capsys, "eval", folder)["round"] == 0
    assert "--best is given, and" in refusal(capsys, "eval", folder, "--best")
    assert contents(folder) == before


def test_a_run_that_cannot_be_written_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fedjax_lite.cli.quickstart.configure_cpu", lambda: None)
    with held_by_another_process(tmp_path / ".lock"):
        told = refusal(capsys, "train", *SMALL, "--out", tmp_path)
        assert "is being written by another process; wait for its end" in told
        assert "being written by another" in refusal(capsys, "quickstart", "--out", tmp_path)

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "file")

    monkeypatch.setattr("fedjax_lite.train", full)
    out = tmp_path / "run.0"
    told = refusal(capsys, "train", *SMALL, "--out", out)
    assert f"No space left on device; make room, and fedjax-lite train --resume {out} goes" in told


@built_once
@undrawn
def test_rules_end_a_run(tmp_path, capsys):
    told = report(
        *(capsys, "train", *SMALL, "--rounds=50", "--eval-every=1", "--target=0.05"),
        *("--ema-decay=0.5", "--out", tmp_path / "out"),
    )
    assert told["stopped"].startswith("accuracy is")
    assert len(told["rounds"]) < 51
    last = report(capsys, "eval", tmp_path / "out")
    assert last["loss"] == pytest.approx(told["loss"][-1])  # Both of the average.


@built_once
def test_a_dry_run_trains_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = report(capsys, "train", *SMALL, "--dry-run")
    assert told["parameters"] == 61 * 10
    assert told["versions_of_parameters"] == 1
    assert (told["clients"], told["slots_of_a_cohort"], told["lanes"]) == (6, 3, 1)
    assert told["shapes"]["Dense_0/kernel"] == [60, 10]
    assert told["round_s"] > 0
    assert told["bytes_of_a_round"] > 0
    assert list(tmp_path.iterdir()) == []
    main(["train", *SMALL, "--dry-run"])
    assert "610" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "a.yaml",
            "dataset: synthetic\nnum_clients: 6\nserver-lr: 1e-1\nmodel: mlp(hidden=(8, 4))",
        ),
        (
            "a.json",
            '{"dataset": "synthetic", "num_clients": 6, "server_lr": 0.1,'
            ' "model": "mlp(hidden=(8, 4))", "updates": null}',
        ),
    ],
)
def test_settings_of_a_file_are_defaults(tmp_path, monkeypatch, name, text):
    asked = []
    monkeypatch.setattr("fedjax_lite.cli.train.train", asked.append)
    (tmp_path / name).write_text(text)
    main(["train", "--config", str(tmp_path / name), "--cohort-size=2"])
    main(["train", "--config", str(tmp_path / name), "--server-lr=0.5"])
    first, second = asked
    assert (first.server_lr, first.model, first.num_clients) == (0.1, "mlp(hidden=(8, 4))", 6)
    assert (first.cohort_size, first.updates, second.server_lr) == (2, None, 0.5)


def test_a_file_of_settings_means_what_it_says(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("fedjax_lite.cli.train.train", asked.append)
    path = tmp_path / "a.yaml"
    path.write_text(
        "\ufeffseed: 010\ntensorboard: false\ntarget: null\nupdates:\ndataset: on\n"
        "client_lr: 1e-1\nmodel: 'mlp(hidden=(8,))'\njson: True\n"
        "client_optimizer: chain(clip_by_global_norm(1.0), sgd(0.1, momentum=0.9))\n"
    )
    main(["train", "--config", str(path)])
    (found,) = asked
    assert (found.seed, found.tensorboard, found.target, found.json) == (10, False, None, True)
    assert (found.updates, found.dataset, found.client_lr) == (None, "on", 0.1)
    assert found.model == "mlp(hidden=(8,))"
    assert found.client_optimizer == "chain(clip_by_global_norm(1.0), sgd(0.1, momentum=0.9))"


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "apfl(layerwise=True)", "partition": "shards", "metrics": "top_k(2)"},
        {"dataset": "synthetic(num_clients=40)", "model": "mlp(hidden=(8, 4))", "num_steps": 2},
    ],
)
def test_the_record_of_a_run_repeats_it(tmp_path, monkeypatch, capsys, settings):
    asked = {}
    for command in ("train", "sweep"):
        keep = lambda options, command=command: asked.update({command: options})
        monkeypatch.setattr(f"fedjax_lite.cli.{command}.{command}", keep)
    closed = build(Settings(**settings)).settings
    config = tmp_path / "config.json"
    for more in ({"target": None, "ema_decay": 0.5}, {"target": None, "ema_decay": None}):
        with fl.Recorder(tmp_path, {**dataclasses.asdict(closed), **more}):
            pass
        main(["train", "--config", str(config), "--rounds=7"])
        found = asked["train"]
        assert found.ema_decay == more["ema_decay"]
        for field in dataclasses.fields(closed):
            expected = 7 if field.name == "rounds" else getattr(closed, field.name)
            assert getattr(found, field.name) == expected
        sweep = ["sweep", "--config", str(config), "--vary=seed=0:2"]
        if found.ema_decay is None:
            main(sweep)
            assert asked["sweep"].vary == ("seed=0:2",)
            assert asked["sweep"].algorithm == closed.algorithm
        else:
            assert "config.json: ema_decay is no setting of sweep" in refusal(capsys, *sweep)
    (tmp_path / "a.yaml").write_text("num_steps: 2\nvary: ['seed=0:3', 'client_lr=0.1,1']")
    main(["sweep", "--config", str(tmp_path / "a.yaml")])
    assert (asked["sweep"].num_steps, asked["sweep"].vary) == (2, ("seed=0:3", "client_lr=0.1,1"))


@undrawn
def test_a_recorded_run_is_run_again_to_the_same_bits(tmp_path, capsys):
    """With a model from a file of one's own, and all that an expression can say."""
    file = tmp_path / "own.py"
    file.write_text(
        "import fedjax_lite as fl\n"
        "def net(input_shape, num_classes, width=4):\n"
        "    return fl.models.mlp(input_shape, (width,), num_classes)\n"
    )
    first, again = tmp_path / "first", tmp_path / "again"
    report(
        *(capsys, "train", "--dataset=digits", "--num-clients=10", "--rounds=3", "--eval-every=1"),
        *("--partition=dirichlet(alpha=1)", f"--model={file}:net(width=6)", "--sampler=uniform(4)"),
        "--algorithm=scaffold(num_epochs=1, batch_size=16)",
        "--client-optimizer=sgd(cosine_decay_schedule(0.1, 100), momentum=0.9)",
        "--server-optimizer=adam(0.01, eps=1e-3)",
        "--updates=clip_by_norm(1.0), quantize_uniform(256)",
        *("--metrics=top_k(3)", "--out", first),
    )
    report(capsys, "train", "--config", first / "config.json", "--out", again)
    without_time = lambda row: {name: row[name] for name in set(row) - {"seconds"}}
    for kind, number in (("round", 3), ("evaluation", 4)):
        found = [list(map(without_time, rows(folder, kind))) for folder in (first, again)]
        assert found[0] == found[1]
        assert len(found[0]) == number
    assert {"loss", "accuracy", "top_k"} <= set(rows(first, "evaluation")[-1])
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, again)]
    assert configs[0]["config"] == configs[1]["config"]
    assert "net(width=6)" in configs[0]["config"]["model"]


def test_every_command_that_runs_takes_a_file_of_settings(tmp_path, monkeypatch):
    asked = {}
    for command in ("quickstart", "baseline"):
        keep = lambda options, command=command: asked.update({command: options})
        monkeypatch.setattr(f"fedjax_lite.cli.{command}.{command}", keep)
    path = tmp_path / "a.yaml"
    path.write_text("dataset: digits\nrounds: 7\njson: true\n")
    main(["quickstart", "--config", str(path), "--rounds=8"])
    found = asked["quickstart"]
    assert (found.dataset, found.rounds, found.json) == ("digits", 8, True)
    path.write_text("name: emnist-cnn\nsynthetic: true\nnum-clients: 9\n")
    main(["baseline", "--config", str(path), "--rounds=8"])
    found = asked["baseline"]
    assert (found.name, found.synthetic, found.num_clients, found.rounds) == (
        *("emnist-cnn", True, 9, 8),
    )
    main(["baseline", "shakespeare-lstm", "--config", str(path)])
    assert (asked["baseline"].name, asked["baseline"].num_clients) == ("shakespeare-lstm", 9)


def test_the_versions_are_told_in_one_line(capsys):
    main(["--version"])
    versions = f"{fl.__version__}, jax {jax.__version__}, Python {platform.python_version()}"
    assert capsys.readouterr().out == f"fedjax-lite {versions}\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.yaml",
            "bogus: 3",
            "a.yaml: bogus is no setting of train; see fedjax-lite train --help",
        ),
        ("a.yaml", "num-cliens: 3", "num-cliens is no setting of train; did you mean num_clients?"),
        ("a.yaml", "config: b.yaml", "a.yaml: config is no setting of train"),
        ("a.yaml", "algorithm: off", "--algorithm is 'off': off is none of the algorithms"),
        ("a.json", '{"algorithm": false}', "--algorithm is 'False': False is no function"),
        ("a.yaml", "seed: 1:30", "a.yaml: Error parsing --seed"),
        ("a.yaml", "seed: 1\nseed: 2", "a.yaml cannot be read: 'seed' comes twice"),
        ("a.json", '{"data-seed": 1, "data_seed": 2}', "a.json cannot be read: 'data_seed' comes"),
        ("a.yaml", "rounds: [1, 2]", "a.yaml: rounds is ['1', '2']; give it one value"),
        ("a.yaml", "tensorboard: 1", "a.yaml: tensorboard is '1'; write true or false"),
        ("a.json", '{"config": {"rate": 1}}', "a.json: rate is no setting of train"),
        ("a.json", '{"config": {"baseline": "emnist"}}', "run it by fedjax-lite baseline emnist"),
        ("a.json", "[" * 10**5, "a.json cannot be read: maximum recursion"),
        ("a.yaml", "rounds: ten", "a.yaml: Error parsing --rounds"),
        ("a.yaml", "rounds: 2.5", "a.yaml: Error parsing --rounds"),
        ("a.yaml", "server: {lr: 1}", "a.yaml: server holds settings of its own"),
        ("a.yaml", "a: [", "a.yaml cannot be read: while parsing"),
        ("a.json", "{", "a.json cannot be read: Expecting"),
        ("a.json", "[]", "a.json holds no settings by name"),
        ("a.toml", "", "choose a file that ends in .yaml or .json"),
        (None, "", "No such file"),
    ],
)
def test_wrong_files_of_settings_are_told_in_one_line(tmp_path, capsys, name, text, message):
    path = tmp_path / (name or "missing.yaml")
    if name:
        path.write_text(text)
    assert message in refusal(capsys, "train", "--config", path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--algorithm=fed_avg(mu=0.9)"], "--algorithm is 'fed_avg(mu=0.9)': fed_avg has no argum"),
        (["--rounds=0"], "--rounds is 0; choose an integer"),
        (["--cohort-size=60"], "--cohort-size is 60; choose an integer between 1 and 50"),
        (["--algorithm=sgd"], "--algorithm is 'sgd': sgd is none of the algorithms; did you mean"),
        (["--model=x.py:f"], "--model is 'x.py:f': there is no file x.py; write its path"),
        (["--client-optimizer=sgd("], "--client-optimizer is 'sgd(': '(' was never closed"),
        (["--updates=clip_by_norm"], "--updates is 'clip_by_norm()': clip_by_norm needs max_norm"),
        (["--checkpoint-every=0"], "--checkpoint-every is 0; choose at least 1 round"),
        (["--ema-decay=1"], "--ema-decay is 1.0; choose a number"),
        (["--target=95"], "--target is 95.0; choose an accuracy"),
        (["--resume=nowhere"], "--resume nowhere holds no checkpoints"),
        (["--resume=a", "--config=b"], "--config is given beside --resume"),
    ],
)
def test_wrong_settings_are_told_in_one_line(tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, "train", *args)
    assert list(tmp_path.iterdir()) == []


def test_help_tells_the_defaults_in_words(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert "None" not in text
    assert "--algorithm STR" in text
    assert '"fed_prox(mu=0.1)"' in " ".join(text.replace("│", "").split())


@built_once
@undrawn
def test_a_run_interrupted_before_its_first_round_is_resumed(tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedjax_lite.train", interrupt)
        with pytest.raises(SystemExit) as stop:
            main(["train", *SMALL, "--rounds=2", "--out", str(tmp_path / "out")])
    assert stop.value.code == 130
    assert f"train --resume {tmp_path / 'out'} goes on" in capsys.readouterr().err
    assert report(capsys, "train", "--resume", tmp_path / "out")["rounds"] == [0, 2]


@undrawn
def test_a_signal_keeps_a_run_and_the_defaults_learn_the_digits(tmp_path, capsys):
    """First in a process of its own, on the CPU as it is set up for users."""
    out = tmp_path / "run"
    metrics = out / "metrics.jsonl"
    code, stderr = interrupted(
        *(tmp_path, "train", "--rounds=100000", f"--out={out}"),
        once=lambda: metrics.exists() and '"round": 9' in metrics.read_text(),
        by=signal.SIGTERM,
    )
    assert code == 143
    assert stderr.endswith(f"fedjax-lite train --resume {out} goes on\n")
    done = rows(out, "round")[-1]["round"]
    assert f"interrupted by SIGTERM after round {done};" in stderr
    again = report(capsys, "train", "--resume", out, f"--rounds={max(100, done + 1)}")
    assert again["accuracy"][-1] >= 0.95
