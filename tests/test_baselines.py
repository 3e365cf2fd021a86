import json
import os
import re
import shlex
import signal

import commands
import jax
import numpy as np
import pytest
from problems import forms_of_a_round

import fedjax_lite as fl
from fedjax_lite import data
from fedjax_lite.cli import main
from fedjax_lite.experiments.baselines import BASELINES, settings_of
from fedjax_lite.experiments.build import build
from fedjax_lite.experiments.published import TABLES
from fedjax_lite.experiments.settings import Settings, parsed
from fedjax_lite.runs import Recorder

pytestmark = pytest.mark.usefixtures("computed_before")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Twelve clients with three images of CIFAR-100 each, to train and to test on."""
    tmp_path, rng = tmp_path_factory.mktemp("cifar100"), np.random.default_rng(0)
    for name in ("train", "test"):
        clients = {
            i: {
                "x": rng.normal(size=(3, 24, 24, 3)).astype(np.float32),
                "y": np.array([0, 50, 99], np.int32),
            }
            for i in range(12)
        }
        fl.FederatedDataset.from_clients(clients).save(tmp_path / name)
    return f"--data={tmp_path / 'train'}", f"--test={tmp_path / 'test'}"


def report(capsys, *args):
    return commands.report(capsys, "baseline", *args)


def refusal(capsys, *args):
    return commands.refusal(capsys, "baseline", *args)


def but_for_optimizers(name):
    chosen = settings_of(BASELINES[name])
    return {key: chosen[key] for key in chosen if key not in ("client_lr", "server_optimizer")}


@pytest.mark.usefixtures("few_drawn")
@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_can_be_run(name):
    settings = settings_of(BASELINES[name])
    first = next(
        other for other in BASELINES if but_for_optimizers(other) == but_for_optimizers(name)
    )
    if (
        first != name and settings["model"] != "stackoverflow_tags"
    ):  # To an optimizer, the params of one model are as good as those of another.
        settings["model"] = "logistic"
    dataset = parsed("dataset", settings["dataset"]).with_arguments(num_examples=3)
    small = {"dataset": str(dataset)}
    if "cohort_size" in settings:
        small |= {"num_clients": 4, "cohort_size": 2}
    built = build(Settings(**{**settings, **small}))
    state, after, info = forms_of_a_round(built)
    assert jax.tree.map(np.shape, after.params) == jax.tree.map(np.shape, state.params)
    assert info.loss.shape == ()
    assert {"loss", "accuracy"} <= set(jax.eval_shape(built.evaluate, state))
    assert (built.personal is not None) == BASELINES[name].personal


def test_the_list_has_all_baselines(capsys):
    main(["baseline", "--list"])
    told = capsys.readouterr().out
    rows = report(capsys, "--list")
    names = [row.get("name") or row["table"] for row in rows]
    assert names == [*BASELINES, *TABLES]
    assert all(name in told for name in names)
    assert "1000 rounds x 10 clients, batch 10, clients sgd(0.1)" in told
    assert "0.8462" in told


@pytest.mark.usefixtures("few_drawn", "built_once")
def test_drawn_data_are_marked_as_such(tmp_path, capsys):
    asked = ("cifar100-logistic", "--synthetic", "--rounds=2", "--num-clients=12")
    told = report(capsys, *asked, "--out", tmp_path / "a")
    assert (told["synthetic"], told["published"]["accuracy"]) == (True, 0.1149)
    assert told["config"]["note"] == "synthetic data: speed only"
    assert told["config"]["dataset"].startswith("cifar100_like(num_clients=12, crop=24, ")
    assert told["rounds"] == [0, 2]
    assert told["client_updates_per_s"] > 0
    assert (tmp_path / "a" / "accuracy.png").exists()
    main(["baseline", *asked, "--resume", str(tmp_path / "a")])  # Nothing is left to do.
    told = capsys.readouterr().out
    assert "synthetic data: speed only" in told
    assert "published accuracy 0.1149" in told


@pytest.mark.usefixtures("built_once", "undrawn")
def test_the_users_data_are_run_and_resumed(folders, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    expected = report(capsys, "cifar100-logistic", *folders, "--rounds=2", "--out", whole)
    assert not expected["synthetic"]
    assert "note" not in expected["config"]
    report(capsys, "cifar100-logistic", *folders, "--rounds=1", "--out", out)
    told = report(capsys, "cifar100-logistic", *folders, "--rounds=2", "--resume", out)
    assert told["loss"][-1] == expected["loss"][-1]
    before = (out / "config.json").read_bytes()
    assert "are of another run" in refusal(
        capsys, "cifar100-logistic", *folders, "--seed=1", "--resume", out
    )
    assert (out / "config.json").read_bytes() == before
    nowhere = tmp_path / "nowhere"
    assert "nowhere holds no checkpoints" in refusal(
        capsys, "cifar100-logistic", *folders, "--resume", nowhere
    )
    main(["eval", str(out), "--json"])
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(told["loss"][-1])
    with pytest.raises(SystemExit):
        main(["train", "--resume", str(out)])
    goes_on = f"fedjax-lite baseline cifar100-logistic {folders[0].replace('=', ' ')} {folders[1]}"
    assert f"{goes_on.replace('=', ' ')} --resume {out} goes on" in capsys.readouterr().err

    # The same by hand: the published settings, with both splits as they are.
    paths = [option.partition("=")[2] for option in folders]
    train, test = map(data.read, paths)
    built = build(
        Settings(**dict(zip(("dataset", "test"), paths, strict=True)), cohort_size=12),
        (train, test),
    )
    np.testing.assert_array_equal(built.population.examples["x"], train.examples["x"])
    np.testing.assert_array_equal(built.held_out.examples["x"], test.examples["x"])
    assert (tmp_path / "out" / "clients.json").exists()


@pytest.mark.usefixtures("built_once", "undrawn", "in_the_foreground")
def test_a_signal_finishes_the_round_and_names_what_goes_on(folders, tmp_path, capsys, monkeypatch):
    out, record = tmp_path / "out", Recorder.on_round

    def on_round(self, row, info):
        record(self, row, info)
        if row["round"] == 1:
            os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(Recorder, "on_round", on_round)
    with pytest.raises(SystemExit) as stop:
        report(capsys, "cifar100-logistic", *folders, "--rounds=9", "--seed=1", "--out", out)
    assert stop.value.code == 129
    told = re.fullmatch(
        r"fedjax-lite: interrupted by SIGHUP after round (\d); fedjax-lite (.*) goes on",
        capsys.readouterr().err.splitlines()[-1],
    )
    assert (out / "checkpoints" / told[1]).is_dir()
    monkeypatch.setattr(Recorder, "on_round", record)
    assert report(capsys, *shlex.split(told[2])[1:])["rounds"] == [0, 9]


def test_cifar10_is_dealt_as_published(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    parts = [
        {
            "image": rng.integers(0, 256, (size, 32, 32, 3), np.uint8),
            "label": rng.integers(0, 10, size, np.int32),
        }
        for size in (400, 50)
    ]
    monkeypatch.setattr(data, "cifar10", lambda folder: parts)
    for name in ("niid-iid-fed-avg", "niid-dirichlet-fed-prox"):
        chosen = BASELINES[name]
        built = build(Settings(**settings_of(chosen, tmp_path)), chosen.load(tmp_path, None))
        dealt = np.sort(np.asarray(built.population.examples["x"])[:, 0, 0, 0])
        expected = data.preprocess.cifar(32)(parts[0])["x"][:, 0, 0, 0]
        np.testing.assert_allclose(dealt, np.sort(expected))
        assert built.population.num_clients == built.sampler.capacity == 10
        np.testing.assert_array_equal(built.held_out.examples["y"], parts[1]["label"])


def test_clients_of_stack_overflow_have_at_most_64_sentences(tmp_path):
    rng = np.random.default_rng(0)
    clients = {
        name: {feature: rng.integers(3, 10_004, (size, 20), np.int32) for feature in ("x", "y")}
        for name, size in (("a", 100), ("b", 3))
    }
    dataset = fl.FederatedDataset.from_clients(clients)
    dataset.save(tmp_path / "train")
    train, test = BASELINES["stackoverflow-transformer"].load(
        tmp_path / "train", tmp_path / "train"
    )
    assert train.num_examples.tolist() == [64, 3]
    np.testing.assert_array_equal(train["a"]["x"], clients["a"]["x"][:64])
    assert (test.num_clients, test.offsets[-1]) == (1, 103)
    load = BASELINES["stackoverflow-tags-fed-adagrad"].load
    assert load(tmp_path / "train", tmp_path / "train")[0].num_examples.tolist() == [100, 3]


def test_what_cannot_be_run_is_refused(folders, tmp_path, capsys):
    name = "cifar100-logistic"
    assert "no baseline is named; choose one of emnist-cnn" in refusal(capsys)
    assert "mnist is no baseline" in refusal(capsys, "mnist")
    assert "no data are given; choose --data PATH or --synthetic" in refusal(capsys, name)
    assert "both --data and --synthetic" in refusal(capsys, name, folders[0], "--synthetic")
    missing = refusal(capsys, "emnist-cnn", "--data", tmp_path / "no.sqlite")
    assert "no.sqlite does not exist; fetch https://storage.googleapis.com" in missing
    assert "fetch https://www.cs.toronto.edu" in refusal(
        capsys, "niid-iid-fed-avg", "--data", tmp_path
    )
    assert "fedjax_lite.data.stackoverflow" in refusal(
        capsys, "stackoverflow-transformer", "--data", tmp_path
    )
    assert "test is missing" in refusal(capsys, name, folders[0])
    assert "--test does nothing with --synthetic" in refusal(
        capsys, name, "--synthetic", folders[1]
    )
    assert "--num-clients does nothing with --data" in refusal(
        capsys, name, *folders, "--num-clients=3"
    )
    assert "rounds is 0" in refusal(capsys, name, *folders, "--rounds=0")
    assert "model is emnist_cnn(dropout_rates=" in refusal(capsys, "emnist-cnn", *folders)
