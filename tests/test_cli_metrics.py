"""The command line with models whose metrics are others than a loss and an accuracy."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from commands import build_once, refusal, report

import fedjax_lite as fl
from fedjax_lite.cli import main

OWN = Path(__file__).with_name("own_models.py")
SMALL = (
    *("--dataset=synthetic", "--num-clients=6", "--cohort-size=3", "--num-steps=2"),
    *("--client-lr=0.001", "--eval-every=1"),
)
REGRESSION = (*SMALL, f"--model={OWN}:regression", "--metrics=r_squared, mean_squared_error")


pytestmark = pytest.mark.usefixtures("computed_before", "built_once")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of a regression, resumed once, and what was printed of both."""
    out = tmp_path_factory.mktemp("regression") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedjax_lite.configure_cpu", lambda: None)
        patch.setattr("fedjax_lite.cli.train.build", build_once)
        main(["train", *REGRESSION, "--rounds=2", f"--out={out}"])
        main(["train", f"--resume={out}", "--rounds=4"])
    return out


def test_a_regression_is_recorded_and_resumed(trained):
    with (trained / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "evaluation"]
    assert [row["round"] for row in rows] == ["0", "1", "2", "3", "4"]
    loss, squared, absolute, explained = (
        np.array([float(row[name]) for row in rows])
        for name in ("loss", "mean_squared_error", "absolute_error", "r_squared")
    )
    np.testing.assert_allclose(2 * loss, squared, rtol=1e-6)
    assert (absolute**2 <= squared).all()
    assert (np.diff(squared) * np.diff(explained) < 0).all()
    pictures = {path.stem for path in trained.glob("*.png")}
    assert pictures == {"loss", "mean_squared_error", "absolute_error", "r_squared", "clients"}
    clients = json.loads((trained / "clients.json").read_text())
    weights = np.array(clients["num_examples"]) / sum(clients["num_examples"])
    assert weights @ clients["mean_squared_error"] == pytest.approx(squared[-1], rel=1e-5)
    assert json.loads((trained / "config.json").read_text())["config"]["metric"] is None


def test_a_regression_is_evaluated_by_client(trained, capsys):
    found = report(capsys, "eval", trained)
    clients = json.loads((trained / "clients.json").read_text())
    # The first metric by name is an error, of which the largest are the worst.
    told, values = found["clients"], clients["absolute_error"]
    assert told["absolute_error_highest"] == pytest.approx(max(values))
    assert told["absolute_error_mean"] == pytest.approx(np.mean(values))
    main(["eval", str(trained), "--best", "--metric=loss"])
    assert "mean of the highest tenth" in capsys.readouterr().out
    told = refusal(capsys, "eval", trained, "--metric=accuracy")
    assert "metric is 'accuracy'; choose one of 'absolute_error', 'loss', 'mean_s" in told


def test_the_metrics_of_a_regression_are_drawn(trained, tmp_path, capsys):
    main(["plot", str(trained), f"--out={tmp_path}", "--metric=r_squared"])
    names = [Path(line).name for line in capsys.readouterr().out.split()]
    assert names == ["loss.png", "r_squared.png", "clients.png"]
    assert "choose one of 'absolute_error', 'loss'" in refusal(
        *(capsys, "plot", trained, f"--out={tmp_path}", "--metric=accuracy")
    )
    axes = fl.plot.runs(trained)
    assert axes.get_ylabel() == "absolute_error on held-out examples"
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 1.02
    worst_first = fl.plot.runs(trained, "clients").lines[0].get_ydata()
    assert (np.diff(worst_first) <= 0).all()


@pytest.mark.usefixtures("undrawn")
def test_a_target_is_one_of_the_metric_that_is_asked_for(tmp_path, capsys):
    asked = ("--target=1e9", "--metric=mean_squared_error")
    found = report(capsys, "train", *REGRESSION, *asked, "--out", tmp_path / "run")
    assert found["stopped"].startswith("mean_squared_error is ")
    assert found["rounds"] == [0]
    assert found["metrics"][:2] == ["loss", "mean_squared_error"]
    told = refusal(capsys, "train", *REGRESSION, "--metric=accuracy", "--out", tmp_path / "out")
    assert "--metric is 'accuracy'; choose one of 'absolute_error', 'loss', 'mean_s" in told
    assert "--target is nan; choose a finite absolute_error." in refusal(
        *(capsys, "train", *REGRESSION, "--target=nan", "--out", tmp_path / "out")
    )


def test_a_sweep_of_a_regression(tmp_path, capsys):
    out = tmp_path / "sweep"
    vary = ("--rounds=1", "--vary=seed=0:2", "--out", out)
    found = report(capsys, "sweep", *REGRESSION, *vary)
    assert found["metrics"] == ["loss", "absolute_error", "mean_squared_error", "r_squared"]
    for run in found["runs"]:
        np.testing.assert_allclose(run["mean_squared_error"], 2 * np.array(run["loss"]), rtol=1e-6)
    assert (out / "absolute_error.png").exists()
    # A folder from before there was the setting goes on.
    about = json.loads((out / "config.json").read_text())
    del about["config"]["metric"]
    (out / "config.json").write_text(json.dumps(about))
    main(["sweep", *REGRESSION, *map(str, vary)])
    told = " ".join(capsys.readouterr().out.split())
    assert "runs loss absolute_error" in told.replace("┃", "").replace("  ", " ")


def test_a_model_without_metrics_goes_by_its_loss(tmp_path, capsys):
    out = tmp_path / "run"
    small = (*SMALL, f"--model={OWN}:without_metrics")
    first = report(capsys, "train", *small, "--rounds=2", "--target=1e-9", "--out", out)
    assert (first["metrics"], first["metric"], first["stopped"]) == (["loss"], "loss", None)
    assert {path.stem for path in out.glob("*.png")} == {"loss", "clients"}
    # As it was recorded before there was the setting.
    config = json.loads((out / "config.json").read_text())
    del config["config"]["metric"]
    (out / "config.json").write_text(json.dumps(config))
    resumed = report(capsys, "train", "--resume", out, "--rounds=3")
    assert resumed["rounds"] == [0, 1, 2, 3]
    best = report(capsys, "eval", out, "--best")
    assert best["loss"] == pytest.approx(min(resumed["loss"]))
    assert best["clients"]["loss_highest"] >= best["clients"]["loss_mean"]
    main(["plot", str(out), f"--out={tmp_path / 'all.png'}"])
    assert capsys.readouterr().out.split() == [str(tmp_path / "all.png")]
    swept = report(
        *(capsys, "sweep", *small, "--rounds=1", "--vary=seed=0:2", "--out", tmp_path / "sweep")
    )
    assert swept["metrics"] == ["loss"]
    told = refusal(capsys, "train", *small, "--metrics=accuracy", "--out", tmp_path / "other")
    assert "for a model without predictions" in told


@pytest.mark.usefixtures("undrawn")
def test_models_of_clients_are_measured_by_all_metrics(tmp_path, capsys):
    algorithm = "--algorithm=ditto(mu=0.1)"
    options = (*REGRESSION, algorithm, "--rounds=1", "--out", tmp_path / "run")
    found = report(capsys, "train", *options)
    assert found["personal_mean_squared_error"] == pytest.approx(2 * found["personal_loss"])
    assert found["personal_absolute_error"] > 0
