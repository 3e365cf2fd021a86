"""Compiled programs that commands keep, in a process of its own with a cache folder of its own."""

import json
import os
import subprocess
import sys

_PROGRAM = """
import collections, json, pathlib, sys
import jax
from fedjax_lite.cli import main

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


def test_a_second_run_compiles_nothing_and_a_damaged_cache_is_none(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    for name in [name for name in environment if name.startswith("JAX_")]:
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
