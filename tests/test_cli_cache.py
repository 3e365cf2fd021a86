"""Compiled programs that commands keep, in cache folders of the tests' own."""

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest

from fedjax_lite.cli import cache

_PROGRAM = """
import collections, json, pathlib, sys
import jax
from fedjax_lite.cli import main, quickstart

quickstart.draw = quickstart.plots.halfspace = lambda *_: None  # Pictures are not compiled.
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.split("/")[-1]]))

def run(name):
    jax.clear_caches()
    counts.clear()
    main(["quickstart", "--rounds=3", "--json", f"--out={sys.argv[1]}/{name}"])
    print(counts["cache_hits"], counts["cache_misses"])

(cache,) = [pathlib.Path(sys.argv[1])]
run("cold")
run("warm")
(folder,) = (cache / "fedjax_lite").iterdir()
for i, path in enumerate(sorted(folder.iterdir())):
    path.write_bytes((path.read_bytes()[: path.stat().st_size // 2], b"", b"noise")[i % 3])
run("damaged")
for path in folder.iterdir():
    path.unlink()
folder.rmdir()
folder.write_text("no folder: nothing can be read or written")
run("lost")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("zstandard") is not None, reason="nothing is kept beside zstandard"
)
def test_a_second_run_compiles_nothing_and_a_damaged_cache_is_none(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    for name in {name for name in environment if name.startswith("JAX_")} - {"JAX_PLATFORMS"}:
        del environment[name]
    del environment["FEDJAX_LITE_COMPILATION_CACHE"]
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = result.stdout.splitlines()
    reports, counts = [json.loads(line) for line in lines[::2]], lines[1::2]
    (_, cold), (warm, none), (hits, damaged), (lost, _) = (map(int, x.split()) for x in counts)
    assert cold > 1
    assert (warm, none) == (cold, 0)
    assert hits == 0
    assert damaged in (0, cold)  # JAX counts a miss where there is no entry, not where it is bad.
    assert lost == 0
    assert all(report["loss"] == reports[0]["loss"] for report in reports)
    told = [line for line in result.stderr.splitlines() if not line.startswith("round ")]
    assert told == []


@pytest.mark.parametrize("without", ["nothing", "a home", "a checksum"])
def test_nothing_is_kept_where_it_has_no_place_or_is_not_safe(tmp_path, monkeypatch, without):
    for name in ("FEDJAX_LITE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    kept = {}
    monkeypatch.setattr(jax.config, "update", kept.__setitem__)
    found = ("zstandard",) if without == "a checksum" else ()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in found or None)

    def home():
        if without == "a home":
            raise RuntimeError("Could not determine home directory.")
        return tmp_path

    monkeypatch.setattr(Path, "home", home)
    with warnings.catch_warnings():
        cache.keep_programs()
    assert ("jax_compilation_cache_dir" in kept) == (without == "nothing")
