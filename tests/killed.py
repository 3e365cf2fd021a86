"""Trains a model in processes that are killed at random moments, and once undisturbed.

`main` takes a folder for what it leaves: `killed.npz` and `straight.npz`, and what was
recorded beside, in `killed` and `straight`.
"""

import dataclasses
import json
import os
import random
import signal
import time

import jax
import numpy as np
import optax
from problems import regression_dataset, regression_model

import fedjax_lite as fl

NUM_ROUNDS, NUM_KILLS = 150, 8


def train(folder, on_row=lambda row: None, every=NUM_ROUNDS):
    dataset, model = regression_dataset(), regression_model()
    with fl.Recorder(folder, {}) as recorder:

        def on_round(row, info):
            recorder.on_round(row, info)
            on_row(row)

        algorithm = fl.scaffold(model, optax.sgd(0.01), optax.adam(0.01), batch_size=3)
        state = algorithm.init(jax.random.key(1), num_clients=1)
        return fl.train(
            algorithm,
            dataset.resident(),
            fl.samplers.poisson(10, 0.4),
            NUM_ROUNDS,
            key=jax.random.key(0),
            state=fl.store_in_file(state, folder / "entries", num_clients=10),
            evaluate=lambda state: fl.evaluate(model, state, dataset.examples),
            ema_decay=0.9,
            on_round=on_round,
            on_eval=recorder.on_eval,
            on_resume=recorder.on_resume,
            checkpoints=fl.Checkpoints(folder / "checkpoints", every=every),
        )


def save(path, result):
    rows = [row for rows in result.history for row in rows]
    numbers = [x for row in rows for name, x in sorted(row.items()) if name != "seconds"]
    # Where entries lie depends on the kills, what they are does not.
    states = [
        dataclasses.replace(state, store=state.store.read(np.arange(10)))
        for state in (result.state, result.averaged)
    ]
    leaves = jax.tree.leaves(states)
    np.savez(path, *map(np.asarray, leaves), history=np.array(numbers))


def child(work):
    """Runs `work(on_row)` in a new process: its id, and where it writes which rounds it reports."""
    read, write = os.pipe()
    pid = os.fork()  # Before JAX has computed anything, which a fork does not survive.
    if pid == 0:
        os.close(read)
        code = 1
        try:
            work(lambda row: os.write(write, row["round"].to_bytes(2)))
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    return pid, read


def recorded(folder):
    """Numbers of the rounds that have a row, of which the last may be cut off."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["round"] for row in rows if row["kind"] == "round"}


def main(folder):
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    straight, killed = folder / "straight", folder / "killed"
    pid, _ = child(lambda on_row: save(folder / "straight.npz", train(straight)))
    assert os.waitpid(pid, 0)[1] == 0
    moments, resumed, reported, seconds = random.Random(0), 0, 0, 0.0
    for place in range(NUM_KILLS):
        resumed += any((killed / "checkpoints").glob("[0-9]*"))
        began = time.monotonic()
        pid, read = child(lambda on_row: train(killed, on_row, every=3))
        if place % 2:  # While it resumes, or soon after.
            time.sleep(moments.uniform(0, seconds))
        else:
            reported = int.from_bytes(os.read(read, 2))
            seconds = time.monotonic() - began
            for _ in range(moments.randint(0, 14)):
                reported = int.from_bytes(os.read(read, 2))
            time.sleep(moments.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "it ended before it could be killed"
        assert set(range(1, reported + 1)) <= recorded(killed), "rows that were reported are gone"
        os.close(read)
    pid, _ = child(lambda on_row: save(folder / "killed.npz", train(killed)))
    assert os.waitpid(pid, 0)[1] == 0
    print(json.dumps({"kills": NUM_KILLS, "resumed": resumed}))
