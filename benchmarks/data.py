"""Training on a million clients that stay on disk.

    python -m benchmarks.data [--clients N] [--cohort K] [--rounds R] [--json]

Writes a population (log-normal sizes, images of 28 x 28 bytes and labels; real bytes, about 3 GB
for a million clients) to a temporary folder, and drops it from the page cache. A fresh process
opens it, makes cohorts, and trains a dense model 784-200-200-62 by FedAvg on cohorts that are
prefetched. Then a file in FedJAX's format is written and converted. `--clients` scales all of it.
"""

import argparse
import contextlib
import json
import os
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import msgpack  # type: ignore[import-untyped]
import numpy as np
import optax

import fedjax_lite as fl
from benchmarks.timing import machine
from fedjax_lite.base import Batch, PyTree

MEAN_EXAMPLES, SIGMA = 3.0, 1.0
COLD_COHORTS = 5  # Few, as each pulls its neighbourhood into the page cache too.
FEDJAX_BYTES_PER_CLIENT = 200  # 200 MB for a million clients


def write_population(folder: Path, num_clients: int) -> float:
    """Writes the population, block by block; seconds that it takes, synced to disk."""
    rng = np.random.default_rng(0)
    began = time.perf_counter()
    with fl.data.Writer(folder) as writer:
        for start in range(0, num_clients, 10_000):
            ids = range(start, min(start + 10_000, num_clients))
            mu = np.log(MEAN_EXAMPLES) - SIGMA**2 / 2
            sizes = np.maximum(rng.lognormal(mu, SIGMA, len(ids)).round().astype(int), 1)
            images = np.frombuffer(rng.bytes(int(sizes.sum()) * 784), np.uint8)
            labels = rng.integers(0, 62, sizes.sum(), np.int32)
            writer.extend(ids, sizes, {"x": images.reshape(-1, 28, 28), "y": labels})
    return time.perf_counter() - began


def forget(folder: Path) -> None:
    """Drops files from the page cache, where the system lets us."""
    if hasattr(os, "posix_fadvise"):
        for path in folder.rglob("*.*"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def dense() -> fl.Model:
    """`fl.models.emnist_dense`, of images in bytes."""
    model = fl.models.emnist_dense()

    def loss(
        params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        return model.loss(params, model_state, {**batch, "x": batch["x"] / 255}, key)

    return model._replace(loss=loss)


def measure(folder: Path, cohort_size: int, num_rounds: int) -> dict[str, Any]:
    """Opening, cohorts and training: what the fresh process does."""
    jax.block_until_ready(jax.numpy.zeros(1))
    began = time.perf_counter()
    dataset = fl.FederatedDataset.open(folder)
    open_s = time.perf_counter() - began
    population = dataset.streamed(cohort_size)

    def make(r: int) -> fl.Cohort:
        rng = np.random.default_rng((0, r))
        return fl.cohort_of(
            population, rng.choice(population.num_clients, cohort_size, replace=False)
        )

    def cohorts_ms(count: int) -> float:
        times = []
        for r in range(count):
            began = time.perf_counter()
            jax.block_until_ready(make(r))
            times.append(time.perf_counter() - began)
        return 1000 * statistics.median(times)

    cold_ms = cohorts_ms(COLD_COHORTS)
    cohorts_ms(num_rounds)
    warm_ms = cohorts_ms(num_rounds)

    algorithm = fl.fed_avg(dense(), optax.sgd(0.01), batch_size=20)
    state = algorithm.init(jax.random.key(0))
    state, _ = algorithm.round(jax.random.key(0), state, make(0))
    jax.block_until_ready(state)
    waited = 0.0
    first = asked = time.perf_counter()
    # Rounds that were not seen above: most of their rows are read from disk.
    for cohort in fl.prefetch(make, range(num_rounds, 2 * num_rounds)):
        jax.block_until_ready(cohort)
        waited += time.perf_counter() - asked
        state, _ = algorithm.round(
            jax.random.fold_in(jax.random.key(1), state.round), state, cohort
        )
        jax.block_until_ready(state)
        asked = time.perf_counter()
    return {
        "population": population.num_clients,
        "cohort": cohort_size,
        "rows_per_device": population.row_capacity,
        "open_s": open_s,
        "cohort_ms": warm_ms,
        "cohort_cold_ms": cold_ms,
        "round_ms": 1000 * (asked - first) / num_rounds,
        "wait_fraction": waited / (asked - first),
        **machine("fedjax_lite", "jax", "numpy"),
    }


def in_fresh_process(arguments: list[str]) -> dict[str, Any]:
    """The report of `measure`, and the peak of the private memory of its process.

    Private is what no file backs: `RssAnon`, which leaves out the page cache.
    """
    command = [sys.executable, "-m", "benchmarks.data", *arguments]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = max([peak, *map(int, re.findall(r"RssAnon:\s*(\d+) kB", status))])
            time.sleep(0.02)
        output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    return {**json.loads(output), "peak_private_mb": peak * 1024 / 1e6 if peak else None}


def write_fedjax(path: Path, num_bytes: int) -> None:
    """A file as FedJAX writes it: EMNIST's shapes, and as many white pixels."""
    rng = np.random.default_rng(0)

    def array(values: np.ndarray) -> msgpack.ExtType:
        return msgpack.ExtType(
            1, msgpack.packb((values.shape, values.dtype.name, values.tobytes()))
        )

    def client() -> bytes:
        inked = rng.random((100, 28, 28)) < 0.2
        pixels = (rng.integers(0, 256, inked.shape) / 255 * inked).astype(np.float32)
        features = {"pixels": array(pixels), "label": array(rng.integers(0, 62, 100, np.int32))}
        return zlib.compress(msgpack.packb(features))

    clients = [client() for _ in range(10)]
    count = -(-num_bytes // len(clients[0]))
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "CREATE TABLE federated_data (client_id BLOB NOT NULL PRIMARY KEY,"
            " data BLOB NOT NULL, num_examples INTEGER NOT NULL)"
        )
        connection.executemany(
            "INSERT INTO federated_data VALUES (?, ?, 100)",
            ((b"client %d" % i, clients[i % len(clients)]) for i in range(count)),
        )


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*.*"))


def conversion(folder: Path, num_bytes: int) -> dict[str, Any]:
    """Megabytes per second, of the compressed source and of what is written."""
    source = folder / "fedjax.sqlite"
    write_fedjax(source, num_bytes)
    began = time.perf_counter()
    fl.data.convert(source, folder / "converted")
    seconds = time.perf_counter() - began
    return {
        "convert_mb_s": source.stat().st_size / 1e6 / seconds,
        "convert_written_mb_s": size(folder / "converted") / 1e6 / seconds,
    }


def main() -> None:
    """Runs the benchmark and prints its report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--clients", type=int, default=1_000_000, help="size of the population")
    parser.add_argument("--cohort", type=int, default=1000, help="clients in a round")
    parser.add_argument("--rounds", type=int, default=20, help="rounds to train")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        fl.configure_cpu()
        print(json.dumps(measure(options.measure, options.cohort, options.rounds)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_s = write_population(folder / "population", options.clients)
        num_bytes = size(folder / "population")
        forget(folder / "population")
        report = in_fresh_process(
            [
                *("--measure", str(folder / "population")),
                *("--cohort", str(options.cohort), "--rounds", str(options.rounds)),
            ]
        )
        report |= {"bytes": num_bytes, "write_mb_s": num_bytes / 1e6 / write_s}
        report |= conversion(folder, FEDJAX_BYTES_PER_CLIENT * options.clients)
    if options.json:
        print(json.dumps(report))
        return
    for field, value in report.items():
        print(f"{field}: {value:.4g}" if isinstance(value, float) else f"{field}: {value}")


if __name__ == "__main__":
    main()
