"""What a second process costs: rounds of `dense` by `fl.train` on two devices, of two processes.

Reported by `python -m benchmarks.cohort --case hosts`: two processes that have a core and a device
each, joined by `jax.distributed`, beside one process that has two of both. They take turns.
"""

import contextlib
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
from typing import Any

import jax
import optax

import fedjax_lite as fl
from benchmarks.cases import CASES, LEARNING_RATE, dataset
from benchmarks.timing import usable_cores

NUM_ROUNDS = 10


def measure_hosts(repeats: int) -> dict[str, Any]:
    """The report of the case `hosts`.

    Raises:
      SystemExit: There is a single core, or what was trained differs.
    """
    if usable_cores() < 2:
        raise SystemExit("the case hosts takes two cores; run it on a machine that has them.")
    with contextlib.ExitStack() as stack:
        groups = {n: _start(n, stack) for n in (1, 2)}
        turns = [{n: _turn(group) for n, group in groups.items()} for _ in range(1 + repeats)]
    losses = [turns[0][n]["loss"] for n in groups]
    if abs(losses[0] / losses[1] - 1) > 1e-4:
        raise SystemExit(f"losses are {losses}, which should be equal; correct the set-up.")
    # The first one compiles.
    seconds = {n: statistics.median(turn[n]["round_s"] for turn in turns[1:]) for n in groups}
    return {
        "case": "hosts",
        "one_process_s": seconds[1],
        "two_processes_s": seconds[2],
        "efficiency": seconds[1] / seconds[2],
    }


def _start(num_processes: int, stack: contextlib.ExitStack) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "benchmarks.hosts", address, str(num_processes)]
    pipe = functools.partial(
        subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    processes = [pipe([*command, str(i)]) for i in range(num_processes)]
    for process in processes:
        stack.callback(process.kill)
    return processes


def _turn(processes: list[subprocess.Popen[str]]) -> dict[str, float]:
    """The slowest answer of processes that are asked at once."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.stdout.readline() for process in processes if process.stdout is not None]
    if not all(answers):
        raise SystemExit("a process has ended; what it said is above.")
    return max(map(json.loads, answers), key=lambda answer: answer["round_s"])


def serve(address: str, num_processes: int, process: int) -> None:
    """Trains each time that a line comes on stdin, and answers with one."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print.
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores if num_processes == 1 else cores[process : process + 1])
    fl.configure_cpu()
    if num_processes > 1:
        jax.distributed.initialize(address, num_processes, process)
    case = CASES["dense"]
    population = dataset(case).resident()
    algorithm = fl.fed_avg(case.model(), optax.sgd(LEARNING_RATE), batch_size=case.batch_size)
    sampler = fl.samplers.uniform(case.sizes.size, case.sizes.size)
    for _ in sys.stdin:
        result = fl.train(algorithm, population, sampler, NUM_ROUNDS, key=jax.random.key(0))
        loss = result.history.rounds[-1]["loss"]
        print(json.dumps({"round_s": result.run_s / NUM_ROUNDS, "loss": loss}), file=answers)
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
