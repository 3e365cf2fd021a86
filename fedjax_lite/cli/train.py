"""`fedjax-lite train`: a run of any settings, recorded, drawn, and resumed where it ended."""

import dataclasses
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import jax
import rich.console
import rich.table

import fedjax_lite as fl
from fedjax_lite.algorithms.versions import count_versions
from fedjax_lite.cli.brief import told_briefly
from fedjax_lite.cli.errors import UsageError, usage_errors
from fedjax_lite.cli.hosts import Hosts, join, of_first
from fedjax_lite.cli.running import print_report, run_recorded, unused_folder
from fedjax_lite.cli.runs import RULES, read_settings
from fedjax_lite.engine.execution import Execution, choose_lanes
from fedjax_lite.experiments.build import Experiment, build
from fedjax_lite.experiments.settings import Settings, settings_from
from fedjax_lite.runs.main_metric import better
from fedjax_lite.runs.records import jsonable, machine
from fedjax_lite.runs.step import draw
from fedjax_lite.runs.stopping import StopRule
from fedjax_lite.xla.hosts import all_or_none
from fedjax_lite.xla.mesh import resolve as resolve_mesh

# What a run that goes on may change.
_FREE = {"rounds", "eval_every", "lanes", "target", "patience", "max_seconds"}


@told_briefly
@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Hosts, Settings):
    """Train a federated model with any settings, and record and draw what happens.

    A setting that chooses something is a name, such as scaffold, or a call as in Python, such as
    fed_prox(mu=0.1); my_file.py:net(width=64) calls a function of your own. What the program knows
    is filled in, and fedjax-lite list shows what there is. Numbers with options of their own go
    into these calls, in place of what is written there. The defaults reach an accuracy of 0.95 and
    more on the digits within 100 rounds.

    Attributes:
      config: File of settings, .yaml or .json, with the names that follow; also the config.json
        of a run, which repeats it. Those on the command line go before.
      out: Folder for metrics.jsonl, config.json, checkpoints and pictures; it must not hold a
        run. A new one under runs/ by default.
      resume: Folder of a run to go on with, by the settings that it has; more rounds, other
        rules that end it and other lanes may be set beside it.
      checkpoint_every: Rounds between checkpoints; there is always one at the end.
      target: Value of the metric that runs are judged by (--metric) at which to stop.
      patience: Evaluations without a lower loss after which to stop.
      max_seconds: Seconds after which to stop.
      ema_decay: Decay by round, below 1, of a moving average of the params, which is then what
        is evaluated.
      store_in_file: Keep the entries of clients in a file in the folder, where memory has no room
        for those of all clients.
      tensorboard: Write events for TensorBoard to the folder, too.
      dry_run: Print what would be run, its memory and the time of one round, and end there.
      json: Print one JSON object, and nothing else, on stdout.
    """

    config: Path | None = None
    out: Path | None = None
    resume: Path | None = None
    checkpoint_every: int = 50
    target: float | None = None
    patience: int | None = None
    max_seconds: float | None = None
    ema_decay: float | None = None
    store_in_file: bool = False
    tensorboard: bool = False
    dry_run: bool = False
    json: bool = False


def train(options: Train) -> None:
    """Runs the command.

    Raises:
      UsageError: A setting is wrong, or the folder cannot be written.
      InterruptedRunError: Ctrl-C was pressed; the run can be resumed.
    """
    fl.configure_cpu()
    join(options)
    with usage_errors(as_option):
        built = all_or_none(lambda: build(settings_from(vars(options))))
        _check(options, built.metric)
    settings = {
        **dataclasses.asdict(built.settings),
        **{name: getattr(options, name) for name in RULES},
    }
    if options.dry_run:
        _dry_run(built, settings, as_json=options.json)
        return
    with usage_errors(as_option):
        report = run_recorded(
            built,
            of_first(lambda: _folder(options, settings)),
            settings,
            resumed_by="train --resume",
            stop=_stop_rules(options, built.metric),
            ema_decay=options.ema_decay,
            store_in_file=options.store_in_file,
            checkpoint_every=options.checkpoint_every,
            tensorboard=options.tensorboard,
            stderr=options.json,
        )
    if options.json:
        print(json.dumps(jsonable(report)))
    else:
        print_report(report)


def as_option(message: str) -> str:
    """A message about a setting, with the name that it has on the command line."""
    name, _, rest = message.partition(" ")
    if name in {"vary", *(field.name for field in dataclasses.fields(Train))}:
        return f"--{name.replace('_', '-')} {rest}"
    return message


def _check(options: Train, metric: str) -> None:
    """Refuses what is out of range before anything is written."""
    accuracy = ("target", lambda x: 0 < x <= 1, "an accuracy above 0, and up to 1")
    for name, inside, range_ in (
        accuracy if metric == "accuracy" else ("target", math.isfinite, f"a finite {metric}"),
        ("patience", lambda x: x >= 1, "at least 1 evaluation"),
        ("max_seconds", lambda x: x > 0, "a positive number"),
        ("ema_decay", lambda x: 0 <= x < 1, "a number that is at least 0, and below 1"),
        ("checkpoint_every", lambda x: x >= 1, "at least 1 round"),
    ):
        value = getattr(options, name)
        if value is not None and not inside(value):
            raise ValueError(f"{name} is {value}; choose {range_}.")


def _stop_rules(options: Train, metric: str) -> list[StopRule]:
    rules = []
    if options.target is not None:
        rules.append(fl.stopping.target(metric, options.target, mode=better(metric)))
    if options.patience is not None:
        rules.append(fl.stopping.patience("loss", options.patience))
    if options.max_seconds is not None:
        rules.append(fl.stopping.wall_clock(options.max_seconds))
    return rules


def _folder(options: Train, settings: dict[str, Any]) -> Path:
    """Where to write."""
    if options.resume is None:
        return unused_folder(options.out, Path(re.split(r"\.py:|[(]", options.dataset)[0]).stem)
    if options.out is not None:
        raise UsageError("--out is given beside --resume; leave it out, the folder is the same")
    recorded = read_settings(options.resume)
    for name, value in jsonable(settings).items():
        if name not in _FREE and value != recorded.get(name):
            raise UsageError(
                f"--{name.replace('_', '-')} is {value}, and {recorded.get(name)} in"
                f" {options.resume}; leave it out, or begin a new run"
            )
    return options.resume


def _dry_run(built: Experiment, settings: dict[str, Any], *, as_json: bool) -> None:
    """Runs one round, and prints what it takes."""
    report = {"config": settings, **machine(), **_cost_of_a_round(built)}
    if as_json:
        print(json.dumps(jsonable(report)))
    else:
        _print_dry_run(report)


def _cost_of_a_round(built: Experiment) -> dict[str, Any]:
    """What there is in a round, its memory and its time."""
    key_init, key_sampler, key = jax.random.split(jax.random.key(built.settings.seed), 3)
    state = built.algorithm.init(key_init, num_clients=built.population.num_clients)
    cohort, _ = draw(built.sampler, built.population, (key_sampler, key), 0)
    began = time.perf_counter()
    round: Any = built.algorithm.round
    step = round.lower(key, state, cohort).compile()
    compiled = time.perf_counter()
    jax.block_until_ready(step(key, state, cohort))
    warm = time.perf_counter()
    jax.block_until_ready(step(key, state, cohort))
    ended = time.perf_counter()
    memory = step.memory_analysis()
    return {
        "clients": built.population.num_clients,
        "slots_of_a_cohort": built.sampler.capacity,
        "lanes": choose_lanes(
            Execution(built.settings.lanes, resolve_mesh(None)),
            dataclasses.replace(state, store=()),
            built.sampler.capacity,
        ),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "versions_of_parameters": count_versions(state),
        "shapes": {
            jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape)
            for path, leaf in jax.tree.leaves_with_path(state.params)
        },
        "bytes_of_data": sum(leaf.nbytes for leaf in jax.tree.leaves(cohort.examples)),
        "bytes_of_a_round": memory.temp_size_in_bytes + memory.output_size_in_bytes,
        "compile_s": compiled - began,
        "round_s": ended - warm,
        "run_s": (ended - warm) * built.settings.rounds,
    }


def _print_dry_run(report: dict[str, Any]) -> None:
    table = rich.table.Table(title="a run of these settings", show_header=False)
    for name, value in report["config"].items():
        if value is not None:
            table.add_row(name, str(value))
    table.add_section()
    for name, shape in report["shapes"].items():
        table.add_row(name, " x ".join(map(str, shape)))
    table.add_section()
    table.add_row("parameters", f"{report['parameters']:,}")
    table.add_row("versions of them", f"{report['versions_of_parameters']:,}")
    table.add_row("clients", f"{report['clients']:,}")
    table.add_row("slots of a cohort", f"{report['slots_of_a_cohort']:,}")
    table.add_row("lanes on each device", str(report["lanes"]))
    table.add_row("memory on each device", f"{_megabytes(report)} MB for data and a round")
    table.add_row("compilation", f"{report['compile_s']:.2f} s")
    table.add_row("a round", f"{1e3 * report['round_s']:.3g} ms")
    table.add_row("all rounds, but for evaluations", f"{report['run_s']:.3g} s")
    table.add_row("on", report["device"])
    rich.console.Console(markup=False).print(table)


def _megabytes(report: dict[str, Any]) -> int:
    return math.ceil((report["bytes_of_data"] + report["bytes_of_a_round"]) / 1e6)
