"""Pictures in Python, and runs as tables."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import pytest

mpl.use("Agg")
import matplotlib.pyplot as plt

import fedjax_lite as fl


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def history(values, every=2):
    rounds = [{"round": r, "seconds": r / 2, "loss": 9.0 - r} for r in range(1, 5)]
    rows = [{"round": every * i, "seconds": 1.0, "accuracy": v} for i, v in enumerate(values)]
    return fl.History(rounds, rows)


def texts(legend):
    return [text.get_text() for text in legend.get_texts()] if legend else []


def test_curves_of_one_run_and_of_several_seeds():
    axes = fl.plot.curves(history([0.1, 0.5, 0.9]))
    (line,) = axes.lines
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([0, 2, 4], [0.1, 0.5, 0.9])
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_legend()) == ("round", "accuracy", None)
    # Of two runs, the rounds that both have; their mean, and a band.
    two = [history([0.1, 0.5, 0.9]), history([0.3, 0.7])]
    axes = fl.plot.curves({"a": two, "b": history([1.0])})
    first, second = axes.lines
    np.testing.assert_allclose(first.get_ydata(), [0.2, 0.6])
    assert second.get_ydata().tolist() == [1.0]
    assert len(axes.collections) == 1
    assert texts(axes.get_legend()) == ["a (mean ± standard deviation of 2 seeds)", "b"]
    # What no evaluation has is that of the rounds; and axes of one's own serve.
    _, own = plt.subplots()
    assert fl.plot.curves(two[0], "loss", axes=own) is own
    assert own.lines[0].get_ydata().tolist() == [8, 7, 6, 5]


def test_curves_of_what_training_returned():
    result = fl.train(
        fl.fed_sgd(fl.models.halfspace_classifier(), optax.sgd(0.1)),
        fl.data.halfspace(num_clients=4, batch_size=8),
        fl.samplers.everyone(4),
        3,
        key=jax.random.key(0),
    )
    axes = fl.plot.curves({"fed_sgd": result}, "loss")
    rows = [row["loss"] for row in result.history.rounds]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), rows)


def test_clients_are_drawn_from_the_worst_to_the_best():
    values = jnp.array([0.5, jnp.nan, 1.0, 0.0])
    evaluation = fl.ClientEvaluation({"accuracy": values}, jnp.array([1, 0, 2, 3]), {})
    axes = fl.plot.clients({"all": evaluation})
    found = axes.lines[0].get_ydata()
    assert (found[0], found[50], found[100]) == (0.0, 0.5, 1.0)
    assert texts(axes.get_legend()) == ["all"]


@pytest.mark.parametrize("num_clients", [5, 50])
def test_a_partition_is_drawn(num_clients):
    labels = np.arange(400) % 4
    rows = fl.partition.dirichlet(labels, num_clients, alpha=1.0, min_examples=1, seed=0)
    dataset = fl.FederatedDataset.from_rows({"y": labels}, rows)
    axes = fl.plot.partition(dataset)
    assert axes.get_xlabel() == ("client" if num_clients == 5 else axes.get_xlabel())
    title = f"{num_clients} clients, 400 examples"
    assert title in [one.get_title() for one in axes.figure.axes]
    _, own = plt.subplots()
    assert fl.plot.partition(dataset, axes=own) is own
    assert own.get_title() == title


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two settings of two seeds each, as a command records them, one of which was not evaluated."""
    folder = tmp_path_factory.mktemp("sweep")
    for i, (mu, seed) in enumerate([(0.1, 0), (0.1, 1), (1.0, 0), (1.0, 1)]):
        config = {"algorithm": f"fed_prox(mu={mu})", "seed": seed, "dataset": "digits()"}
        with fl.Recorder(folder / f"{i}", {**config, "updates": None}) as recorder:
            for r in (1, 2):
                recorder.on_round({"round": r, "seconds": 0.5, "loss": mu + r}, None)
            recorder.on_eval(
                {"round": 2, "seconds": 0.7, "loss": 9.0, "accuracy": mu / 2 + seed / 9}
            )
    return folder


def test_recorded_runs_are_drawn(sweep):
    for folders in (sweep, sorted(sweep.glob("?")), str(sweep)):
        axes = fl.plot.runs(folders)
        legend = texts(axes.get_legend())
        assert [label.partition(" (")[0] for label in legend] == [
            *("algorithm.mu 0.1", "algorithm.mu 1")
        ]
    assert axes.get_title() == "digits, fed_prox"
    assert texts(fl.plot.runs(sweep, "loss", labels=["a", "b"]).get_legend())[0].startswith("a (")


def test_recorded_runs_are_one_table(sweep):
    frame = fl.read_runs(sweep)
    assert frame["run"].tolist() == [name for name in "0123" for _ in range(2)]
    assert frame["round"].tolist() == [1, 2] * 4
    assert frame["loss"].tolist() == [1.1, 2.1] * 2 + [2.0, 3.0] * 2
    # Rounds and evaluations share no column.
    assert frame["eval_loss"].isna().tolist() == [True, False] * 4
    assert frame["eval_accuracy"].dropna().tolist() == pytest.approx(
        [0.05, 0.05 + 1 / 9, 0.5, 0.5 + 1 / 9]
    )
    assert frame["config.algorithm.mu"].unique().tolist() == [0.1, 1.0]
    assert frame["config.algorithm"].unique().tolist() == ["fed_prox"]
    assert "config.updates" not in frame
    by = frame.groupby(["config.algorithm.mu", "round"])["loss"].mean()
    assert by[1.0, 2] == 3.0
    assert len(fl.read_runs([sweep / "0", sweep / "3"])) == 4


def test_a_history_is_a_table():
    frame = history([0.1, 0.5]).to_pandas()
    assert frame["round"].tolist() == [0, 1, 2, 3, 4]
    assert frame["eval_accuracy"].dropna().tolist() == [0.1, 0.5]
    assert frame["loss"].dropna().tolist() == [8, 7, 6, 5]
    assert frame["eval_seconds"].count() == 2
    assert list(fl.History([], []).to_pandas()) == ["round"]
    only = fl.History([], [{"round": 0, "loss": 1.0}]).to_pandas()
    assert only["eval_loss"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fl.plot.curves(history([1.0]), "f1"), "metric is 'f1'; choose one of accuracy, l"),
        (lambda: fl.plot.curves({}), "histories has nothing to draw"),
        (lambda: fl.plot.curves([]), "histories has nothing to draw"),
        (lambda: fl.plot.runs("nowhere"), "nowhere holds no metrics.jsonl"),
        (lambda: fl.read_runs("nowhere"), "nowhere holds no metrics.jsonl"),
        (
            lambda: fl.plot.partition(fl.FederatedDataset.from_clients([{"x": [0.5]}]), "x"),
            "label is 'x', of shape",
        ),
        (
            lambda: fl.plot.clients(fl.ClientEvaluation({"loss": jnp.ones(1)}, jnp.ones(1), {})),
            "metric is 'accuracy'; choose one of 'loss'",
        ),
    ],
)
def test_what_cannot_be_drawn_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_importing_the_package_imports_no_extra_and_no_nnx():
    unwanted = ["flax.nnx", "matplotlib", "pandas", "sklearn", "tyro"]
    program = f"import sys, fedjax_lite; print([x for x in {unwanted} if x in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("evaluated", [True, False])
def test_progress_is_shown_in_lines_where_there_is_no_terminal(capsys, evaluated):
    model = fl.models.halfspace_classifier()
    held_out = fl.data.halfspace_batch(jax.random.key(1), 50)
    result = fl.train(
        fl.fed_sgd(model, optax.sgd(0.1)),
        fl.data.halfspace(num_clients=4, batch_size=8),
        fl.samplers.everyone(4),
        4,
        key=jax.random.key(0),
        evaluate=(lambda state: fl.evaluate(model, state, held_out)) if evaluated else None,
        eval_every=2,
        progress=True,
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (3 if evaluated else 0)
    for line, row in zip(lines, result.history.evaluations, strict=True):
        assert line.startswith(f"round {row['round']}/4  ")
        assert f"accuracy {row['accuracy']:.4g}" in line


def test_the_record_of_a_run_from_a_file_of_ones_own_is_flat():
    flattened = fl.runs.reading.flattened
    assert flattened("model", "a b/my.py:net(width=3, act='x')") == {
        "model": "a b/my.py:net",
        "model.width": 3,
        "model.act": "x",
    }
    told = "chain(clip(max_delta=1.0), sgd(learning_rate=cosine(init_value=0.1)))"
    assert flattened("o", told) == {
        "o": "chain",
        "o.0": "clip",
        "o.0.max_delta": 1.0,
        "o.1": "sgd",
        "o.1.learning_rate": "cosine",
        "o.1.learning_rate.init_value": 0.1,
    }
    assert flattened("u", "a(x=1), b(y=(1, 2))") == {
        "u.0": "a",
        "u.0.x": 1,
        "u.1": "b",
        "u.1.y": "(1, 2)",
    }
    for text in ("data/x y.csv", "a b", "f("):
        assert flattened("dataset", text) == {"dataset": text}


def test_curves_over_another_number_of_the_rounds():
    run = history([0.1, 0.5, 0.9])
    (line,) = fl.plot.curves(run, against="seconds").lines
    assert line.get_xdata().tolist() == [0, 1, 2]
    axes = fl.plot.curves([run, fl.History(run.rounds, run.evaluations[:2])], against="loss")
    assert axes.lines[0].get_xdata().tolist() == [0, 7]
    assert axes.get_xlabel() == "loss"
    told = "against is 'wall_clock'; choose one of loss, round, seconds; a sampler has a clock by"
    with pytest.raises(ValueError, match=told):
        fl.plot.curves(run, against="wall_clock")


def test_a_timeline_has_a_bar_for_each_training():
    sampler = fl.samplers.fed_buff(
        9, 5, concurrency=4, buffer_size=2, durations=fl.durations.exponential()
    )
    axes = fl.plot.timeline(sampler, 3)
    (bars,) = axes.collections
    assert len(bars.get_segments()) == 6
    schedule = sampler.schedule
    ends = sorted(segment[1][0] for segment in bars.get_segments())
    np.testing.assert_allclose(ends, np.sort(schedule.ended[:3].ravel()))
    versions = np.arange(3)[:, None] - schedule.staleness[:3]
    assert sorted(bars.get_array()) == sorted(versions.ravel())
    np.testing.assert_allclose([line.get_xdata()[0] for line in axes.lines], ends[1::2])
    with pytest.raises(ValueError, match="sampler has no schedule"):
        fl.plot.timeline(fl.samplers.uniform(9, 2))
    with pytest.raises(ValueError, match="num_rounds is 6"):
        fl.plot.timeline(sampler, 6)
