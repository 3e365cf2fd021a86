"""`fedjax-lite quickstart`: train a federated model, and watch."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, Literal, TextIO

import jax
import rich.console
import rich.table

from fedjax_lite import _validate
from fedjax_lite.base import ServerState
from fedjax_lite.cli import plots
from fedjax_lite.cli.brief import told_briefly
from fedjax_lite.cli.errors import InterruptedRunError, usage_errors
from fedjax_lite.cli.records import new_folder, open_folder
from fedjax_lite.cli.runs import read_run
from fedjax_lite.experiments.quickstart import Simulation, digits_simulation, halfspace_simulation
from fedjax_lite.runs.plot.lines import draw
from fedjax_lite.runs.plot.of_runs import panels, title
from fedjax_lite.runs.progress import progress
from fedjax_lite.runs.records import jsonable, machine
from fedjax_lite.xla.cpu import configure_cpu
from fedjax_lite.xla.mesh import replicate


@told_briefly
@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Train a small federated model and draw how its loss and accuracy develop.

    Attributes:
      config: File of settings, .yaml or .json, with the names that follow; those on the command
        line go before.
      dataset: halfspace (points in a square, generated) or digits (images of 8 x 8 pixels,
        skewed over 50 clients).
      rounds: Number of rounds.
      seed: Determines everything random.
      out: Folder for metrics, configuration and pictures; its files of the same names are
        replaced. A new one under runs/ by default.
      json: Print one JSON object, and nothing else, on stdout.
    """

    config: Path | None = None
    dataset: Literal["halfspace", "digits"] = "halfspace"
    rounds: int = 100
    seed: int = 0
    out: Path | None = None
    json: bool = False


def quickstart(options: Quickstart) -> None:
    """Runs the command.

    Raises:
      UsageError: An option is out of range, or the folder cannot be written.
      InterruptedRunError: Ctrl-C was pressed; what was recorded so far is on disk.
    """
    with usage_errors():
        _validate.integer("--rounds", options.rounds, minimum=1)
        _validate.integer("--seed", options.seed, minimum=0, maximum=2**31 - 1)
    configure_cpu()
    out = options.out or new_folder(options.dataset)
    report: dict[str, Any] = {
        "dataset": options.dataset,
        "rounds": options.rounds,
        "seed": options.seed,
        "json": options.json,
        **machine(),
        "out": str(out),
    }
    with open_folder(out, report) as metrics_file:
        history, state, timing = _run(_simulation(options), options, metrics_file)
        groups = [[read_run(out)]]
        draw(out, panels(groups, [options.dataset]), title(groups))
        if options.dataset == "halfspace":
            plots.halfspace(out / "data.png", jax.device_get(state.params))

    series = {name: [row[name] for row in history] for name in ("loss", "accuracy")}
    report = {**report, **series, **timing}
    if options.json:
        print(json.dumps(report))
    else:
        _print_table(report)


def _simulation(options: Quickstart) -> Simulation:
    if options.dataset == "digits":
        return digits_simulation(seed=options.seed)
    return halfspace_simulation()


def _run(
    simulation: Simulation, options: Quickstart, metrics_file: TextIO
) -> tuple[list[dict[str, Any]], ServerState, dict[str, float]]:
    """Runs all rounds and records each as it ends: history, final state and timing."""
    key_init, key = jax.random.split(jax.random.key(options.seed))
    state, key = simulation.init(key_init), replicate(key)
    began = time.perf_counter()
    step = simulation.round.lower(key, state, simulation.population).compile()
    compiled = time.perf_counter()
    history: list[dict[str, Any]] = []
    try:
        with progress(options.rounds, stderr=options.json) as show:
            for index in range(options.rounds):
                state, metrics = step(key, state, simulation.population)
                row = {name: value.item() for name, value in jax.device_get(metrics).items()}
                history.append({"round": index, **row})
                print(json.dumps(jsonable(history[-1])), file=metrics_file, flush=True)
                text = f"loss {row['loss']:.4f}  accuracy {row['accuracy']:.3f}"
                done = index + 1
                show(done, text, done in (1, options.rounds) or done % 10 == 0)
    except KeyboardInterrupt as interrupt:
        raise InterruptedRunError(
            f"interrupted after {len(history)} of {options.rounds} rounds; {metrics_file.name}"
            " holds them",
            interrupt,
        ) from None
    ended = time.perf_counter()
    return history, state, {"compile_s": compiled - began, "run_s": ended - compiled}


def _print_table(report: dict[str, Any]) -> None:
    table = rich.table.Table(title=f"{report['dataset']}, {report['rounds']} rounds of FedSGD")
    table.add_column("")
    table.add_column("before round 1", justify="right")
    table.add_column(f"before round {report['rounds']}", justify="right")
    for name, digits in (("loss", 4), ("accuracy", 3)):
        first, last = report[name][0], report[name][-1]
        table.add_row(name, f"{first:.{digits}f}", f"{last:.{digits}f}")
    console = rich.console.Console()
    console.print(table)
    console.print(
        f"{report['run_s']:.2f} s of rounds, {report['compile_s']:.2f} s of compilation,"
        f" on {report['device']}"
    )
    console.print(f"metrics and pictures in {report['out']}", soft_wrap=True)
