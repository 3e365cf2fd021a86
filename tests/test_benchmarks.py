import json
import subprocess
import sys
from pathlib import Path

from test_algorithms import ALGORITHMS

from benchmarks import secure

ROOT = Path(__file__).parents[1]


def ask(*options):
    command = [sys.executable, "-m", "benchmarks.accelerator", "--small", *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_an_accelerator_is_asked_in_order_and_answers_are_kept(tmp_path):
    file = tmp_path / "answers.jsonl"
    rows = ask("--question", "store", "--minutes", "5", "--out", str(file))
    assert [row.get("memory_kind") for row in rows] == [None, "device", "pinned_host", None]
    assert all(row["question"] == "store" for row in rows)
    assert all(row["round_s"] > 0 for row in rows[1:3])
    assert rows[-1]["rc"] == 0
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows


def test_what_there_is_no_time_for_is_named_and_what_is_cut_off_ends():
    rows = ask("--question", "store", "training", "--minutes", "0.01")
    assert rows[-2]["question"] == "store"
    assert rows[-2]["rc"] == -9
    assert rows[-1:] == [{"question": "training", "setting": "default", "ended": "the time was up"}]


def test_what_is_compiled_ahead_of_time_has_a_row_for_each_target():
    rows = ask("--compile-only", "--json", "--lanes", "1", "8", "--minutes", "0")
    assert {row["compiled"] for row in rows} == {"the time was up"}
    asked = {(row["case"], row["target"], row["lanes"]) for row in rows}
    assert len(asked) == len(rows)
    for target in ("h100 x1", "h100 x4", "tpu-v5e x1", "tpu-v5e x4"):
        for name in ("quickstart", "dense", "resnet18", *ALGORITHMS):
            assert {(name, target, 1), (name, target, 8)} <= asked


def test_secure_aggregation_is_measured():
    rows = list(secure.measure(["ideal"], num_clients=2, repeats=1))
    assert [row["setting"] for row in rows] == ["fed_avg", "ideal"]
    assert [row["bits"] for row in rows] == [32.0, 32.0]
    assert all(row["round_s"] > 0 for row in rows)
