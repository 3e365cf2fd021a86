import contextlib
import json
import multiprocessing
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from test_algorithms import ALGORITHMS

import fedjax_lite as fl
from benchmarks import (
    accelerator,
    algorithms,
    asynchrony,
    compression,
    data,
    robustness,
    secure,
    startup,
)


@pytest.fixture
def printed(monkeypatch, capsys):
    """`printed(benchmark, *options)`: its rows. In this process: another one imports JAX."""
    monkeypatch.setattr(fl, "configure_cpu", lambda: None)  # Here, JAX has computed something.
    monkeypatch.chdir(Path(__file__).parents[1])  # Some run parts in processes of their own.

    def run(benchmark, *options):
        monkeypatch.setattr(sys, "argv", [benchmark.__name__, *map(str, options)])
        benchmark.main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_an_accelerator_is_asked_in_order_and_answers_are_kept(tmp_path, printed):
    file = tmp_path / "answers.jsonl"
    rows = printed(
        *(accelerator, "--small", "--question", "store", "--minutes", "5", "--out", file)
    )
    assert [row.get("memory_kind") for row in rows] == [None, "device", "pinned_host", None]
    assert all(row["question"] == "store" for row in rows)
    assert all(row["round_s"] > 0 for row in rows[1:3])
    assert rows[-1]["rc"] == 0
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows


def test_what_there_is_no_time_for_is_named_and_what_is_cut_off_ends(printed):
    rows = printed(
        *(accelerator, "--small", "--question", "store", "training", "--minutes", "0.01")
    )
    assert rows[-2]["question"] == "store"
    assert rows[-2]["rc"] == -9
    assert rows[-1:] == [{"question": "training", "setting": "default", "ended": "the time was up"}]


def test_what_is_compiled_ahead_of_time_has_a_row_for_each_of_its_targets(printed, monkeypatch):
    class OneProcess:
        """In place of several, which would import JAX; what they are given can be sent to them."""

        def Pool(self, *_):  # noqa: N802
            return contextlib.nullcontext(self)

        def imap(self, function, asked):
            function, asked = pickle.loads(pickle.dumps((function, asked)))
            return map(function, asked)

    monkeypatch.setattr(multiprocessing, "get_context", lambda method: OneProcess())
    rows = printed(accelerator, *("--compile-only", "--json", "--lanes", 1, 8, "--minutes", 0))
    assert {row["compiled"] for row in rows} == {"the time was up"}
    asked = {(row["case"], row["target"], row["lanes"]) for row in rows}
    assert len(asked) == len(rows)
    expected = {("dense", target) for target in ("h100 x4", "tpu-v5e x4")}
    expected |= {
        (name, target)
        for target in ("h100 x1", "tpu-v5e x1")
        for name in ("quickstart", "dense", *ALGORITHMS)
    }
    expected |= {("resnet18", "h100 x1")}
    assert {(*row, lanes) for row in expected for lanes in (1, 8)} <= asked


def test_compressors_have_a_row_each_and_a_picture(tmp_path, printed):
    picture = tmp_path / "frontier.svg"
    options = ("--compressor", "none", "drive_ef", "--rounds", 1, "--small", "--json")
    _, plain, few = printed(compression, *options, "--plot", picture)
    assert [plain["compressor"], few["compressor"]] == ["none", "drive_ef"]
    num_params = 64 * 64 + 64 + 64 * 10 + 10
    assert plain["kB_up"] == plain["kB_down"] == few["kB_down"] == 4 * num_params / 1000
    assert few["kB_up"] == round((2**13 + 32) / 8 / 1000, 3)
    assert few["round_s"] > 0
    assert plain["accuracy"] > 0.1
    assert "<path" in picture.read_text()


def test_asynchrony_is_measured(tmp_path):
    step = asynchrony.measure_step(3, 2, repeats=1)
    assert step["cost"] > 0
    assert step["ring_versions"] == 2
    assert asynchrony.measure_schedule(400)["schedule_s"] > 0
    # In the form of MNIST, images of which the label is where they are light.
    labels = np.arange(200, dtype=np.uint8) % 10
    images = np.zeros((200, 28, 28), np.uint8)
    images[np.arange(200), 2 * labels] = 255
    for split in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (tmp_path / f"{split}-{kind}-ubyte").write_bytes(header + array.tobytes())
    task = asynchrony.mnist(tmp_path, "shards", num_clients=50)._replace(buffer_size=2)
    for name in ("fed_avg", "fed_buff"):
        row = asynchrony.measure_training(task._replace(target=0.3), name, 10, 400, [0])
        assert row["task"] == "mnist, shards"
        assert row["accuracy"] >= 0.3
        assert 0 < row["client_trips"] <= 400
        assert row["wall_clock"] > 0
        assert (row["staleness"] > 0) == (row["ring_versions"] > 1) == (name == "fed_buff")


def test_privacy_is_measured_and_drawn(tmp_path, monkeypatch):
    pytest.importorskip("dp_accounting", reason="dp-accounting comes with the extra `privacy`")
    from benchmarks import privacy

    monkeypatch.setattr(privacy, "EPSILONS", (np.inf, 3.0))
    costs = list(privacy.overhead(small=True))
    assert [row["mechanism"] for row in costs] == ["none", "gaussian_noise"]
    assert costs[0]["cost"] == 1
    rows = list(privacy.accuracy(small=True))
    assert [row["epsilon"] for row in rows] == list(privacy.EPSILONS)
    assert all(row["epsilon_of_the_run"] <= row["epsilon"] for row in rows)
    assert all(0.1 < row["accuracy"] <= rows[0]["accuracy"] + 0.1 for row in rows)
    summary = privacy._summary({"accuracy": rows, "overhead": costs})
    assert summary["overhead"] > 0
    assert set(summary["accuracy_by_epsilon"]) == {"inf", "3"}
    privacy._draw(str(tmp_path / "accuracy.svg"), rows)
    assert (tmp_path / "accuracy.svg").stat().st_size > 1000


def test_defences_are_measured_under_every_attack(monkeypatch):
    monkeypatch.setattr(robustness, "SEEDS", range(1))
    (row,) = robustness.measure("iid", "mean", [0.0], num_rounds=8)
    accuracy = {name: row[name] for name in robustness.ATTACKS}
    assert row["worst"] == min(x for name, x in accuracy.items() if name != "none")
    assert len(set(accuracy.values())) > len(accuracy) / 2  # They are different ones.
    assert accuracy["none"] > accuracy["inner_product_10"] + 0.2
    assert accuracy["none"] > accuracy["scaled"] + 0.2


def test_secure_aggregation_is_measured():
    rows = list(secure.measure(["ideal"], num_clients=2, repeats=1))
    assert [row["setting"] for row in rows] == ["fed_avg", "ideal"]
    assert [row["bits"] for row in rows] == [32.0, 32.0]
    assert all(row["round_s"] > 0 for row in rows)


def test_a_start_has_every_stage():
    package = str(Path(__file__).parents[1])
    seconds = startup.start("bare", "tiny", package)
    assert set(startup.STAGES) <= set(seconds)
    assert all(seconds[stage] > 0 for stage in startup.STAGES)


def test_algorithms_have_a_row_each(printed, monkeypatch):
    case = algorithms.CASES["synthetic"]._replace(options={"batch_size": 100})
    monkeypatch.setitem(algorithms.CASES, "synthetic", case)
    monkeypatch.setattr(algorithms, "SEEDS", range(1))
    options = ("--case", "synthetic", "--algorithm", "fed_prox", "--rounds", 5, "--json")
    about, row = printed(algorithms, *options)
    assert set(about) == {"device", "processor", "versions"}
    assert (row["case"], row["algorithm"]) == ("synthetic", "fed_prox")
    assert row["rounds_to_target"] is None
    assert 0 <= row["worst_decile"] < row["client_accuracy"] < 1
    assert 0.2 < row["accuracy"] < case.target
    # Params go both ways between the server and the cohort.
    assert row["bytes_per_round"] == 2 * case.cohort_size * 4 * (60 * 10 + 10)
    assert row["cost"] > 0


def test_data_on_disk_are_measured(printed):
    (report,) = printed(data, *("--clients", 300, "--cohort", 20, "--rounds", 2, "--json"))
    assert report["population"] == 300
    assert report["bytes"] > 300 * (784 + 4)  # one example each is the least
    assert 0 <= report["wait_fraction"] < 1
    for field in ("open_s", "cohort_ms", "cohort_cold_ms", "round_ms", "convert_mb_s"):
        assert report[field] > 0
    assert report["peak_private_mb"] is None or 10 < report["peak_private_mb"] < 10_000
