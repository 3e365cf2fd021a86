"""What two processes run together."""

import dataclasses
import functools
import os
import signal

import jax
import numpy as np
import optax
import pytest
from problems import SIZES, regression_dataset, regression_model
from processes import redirect

import fedjax_lite as fl
from fedjax_lite import cli
from fedjax_lite.cli import hosts
from fedjax_lite.engine import store
from fedjax_lite.xla.hosts import least, shared

COHORT_SIZE = 5


class Recorder:
    """An array that remembers which of its rows were read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.rows = array, array.shape, array.dtype, []

    def __getitem__(self, rows):
        self.rows.extend(range(*rows.indices(len(self.array))))
        return self.array[rows]


def numbers(result):
    """Params and store as they are in a process, and what is recorded but for the seconds."""
    state = result.state
    rows = [row for rows in result.history for row in rows]
    told = [x for row in rows for name, x in sorted(row.items()) if name != "seconds"]
    leaves = jax.tree.leaves(state.store)
    parts = [np.concatenate([shard.data for shard in x.addressable_shards]) for x in leaves]
    kept = np.concatenate([x.reshape(len(x), -1) for x in parts], 1) if parts else np.empty(0)
    return {**jax.device_get(state.params), "kept": kept, "rows_of": np.array(told)}


def train(population):
    """Two rounds in which each client takes part once, on four devices of one process or two."""
    mesh = population.mesh
    result = fl.train(
        fl.fed_avg(regression_model(), optax.sgd(0.1), batch_size=3, mesh=mesh),
        population,
        fl.samplers.sequential(population.num_clients, COHORT_SIZE),
        2,
        key=fl.replicate(jax.random.key(1), mesh),
    )
    return numbers(result)


@functools.cache
def resident(mesh):
    """What is trained by all the runs of a process, compiled once."""
    sizes, model = SIZES[:8], regression_model()
    examples = regression_dataset(sizes).examples
    return {
        "algorithm": fl.scaffold(model, optax.sgd(0.05), optax.adam(0.1), batch_size=3, mesh=mesh),
        "population": regression_dataset(sizes).resident(mesh),
        "sampler": fl.samplers.poisson(len(sizes), 0.6),
        "evaluate": lambda state: fl.evaluate(model, state, examples, mesh=mesh),
    }


def train_resident(mesh, folder=None, *, num_rounds=8, seed=2, on_round=None):
    """A run with all that processes have to agree on, on four devices."""
    with fl.Recorder(folder, {}) if folder else pytest.MonkeyPatch.context() as recorder:

        def told(row, info):
            if folder:
                recorder.on_round(row, info)
            if on_round:
                on_round(row)

        return fl.train(
            **resident(mesh),
            num_rounds=num_rounds,
            key=jax.random.key(seed),
            eval_every=3,
            ema_decay=0.5,
            best="loss",
            best_mode="min",
            stop=[fl.stopping.wall_clock(1e6)],
            on_round=told,
            checkpoints=folder and fl.Checkpoints(folder / "checkpoints", every=2),
        )


def sweep():
    """Three runs, on as many devices as there are."""
    model = regression_model()
    return fl.sweep(
        lambda rate: fl.fed_avg(model, optax.sgd(rate), num_steps=1),
        regression_dataset().resident(),
        fl.samplers.uniform(len(SIZES), COHORT_SIZE),
        2,
        keys=jax.random.split(jax.random.key(0), 3),
        numbers={"rate": [0.1, 0.2, 0.3]},
    ).histories


def main(process, address, folder, results):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    assert shared([process]) == [0]
    assert jax.jit(lambda x: x + least(3 + process))(0) == 3  # While it is traced.

    population = fl.FederatedDataset.open(folder / "data").streamed(COHORT_SIZE)
    examples = {name: Recorder(feature) for name, feature in population.examples.items()}
    for ids in np.split(np.arange(population.num_clients), 2):
        fl.cohort_of(dataclasses.replace(population, examples=examples), ids)
    streamed = {**train(population), "read": examples["x"].rows}

    store._LEAST_SPREAD_BYTES = 1
    # A signal comes to one of them, and both end after the same round.
    with pytest.raises(fl.InterruptedTraining) as interrupt:
        train_resident(
            None,
            folder / "run",
            on_round=lambda row: row["round"] == process and os.kill(os.getpid(), signal.SIGTERM),
        )
    interrupted = len(interrupt.value.result.history.rounds)
    resident = train_resident(None, folder / "run", num_rounds=6)
    seconds = [row["seconds"] for rows in resident.history for row in rows]
    with pytest.raises(ValueError, match=r"processes \[1\] run something else .* by key; "):
        train_resident(None, seed=process)
    with pytest.raises(ValueError, match=r"stores in files are for one process; keep "):
        fl.store_in_file(dataclasses.replace(resident.state, store=np.zeros((1, 1))), folder, 1)
    swept = [row["loss"] for history in sweep() for row in history.rounds]
    all_ = {
        **{f"streamed {name}": value for name, value in streamed.items()},
        **{f"resident {name}": value for name, value in numbers(resident).items()},
        **{"interrupted": interrupted, "seconds": seconds, "swept": swept},
    }
    np.savez(results[process], **all_)


def command(process, folder, environment, *args):
    """A command on a device of its own, of two that soon miss one that is silent."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    redirect(folder / f"{process}.out", folder / f"{process}.err")
    environment = {**environment, "SLURM_PROCID": process}
    os.environ.update({name: str(value) for name, value in environment.items()})
    # The second two of a test need not compile again.
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    hosts.HEARTBEAT_S = 4
    cli.main([str(arg).replace("PROCESS", str(process)) for arg in args])
