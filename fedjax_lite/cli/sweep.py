"""`fedjax-lite sweep`: runs that differ in some settings, as one program if these are numbers."""

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import rich.console
import rich.table
import tyro

import fedjax_lite as fl
from fedjax_lite._files import write_text
from fedjax_lite.cli.brief import told_briefly
from fedjax_lite.cli.errors import UsageError, finishing, usage_errors
from fedjax_lite.cli.hosts import Hosts, join, lost, new_console, of_first
from fedjax_lite.cli.records import kept_folder, new_folder
from fedjax_lite.cli.running import written_out
from fedjax_lite.cli.runs import read_run
from fedjax_lite.cli.train import as_option
from fedjax_lite.cli.vary import is_traced, varied_by
from fedjax_lite.experiments.build import build
from fedjax_lite.experiments.settings import Settings, settings_from
from fedjax_lite.experiments.varying import (
    algorithms_of,
    group_by_numbers,
    group_by_program,
    varied_settings,
)
from fedjax_lite.runs.main_metric import by_metric, in_order, main_metric, numbers_in
from fedjax_lite.runs.plot.lines import MAX_CURVES, draw
from fedjax_lite.runs.plot.of_runs import panels, title
from fedjax_lite.runs.reading import group_seeds, name_groups, number
from fedjax_lite.runs.records import Recorder, jsonable, machine
from fedjax_lite.xla import hosts
from fedjax_lite.xla.memory import make_room_for_programs

_VARY = tyro.conf.arg(metavar="NAME=VALUES", help_behavior_hint="")


@told_briefly
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Hosts, Settings):
    """Run all combinations of some settings, and record, compare and draw them.

    Settings are those of train. Seeds, and numbers of the algorithm, of optimizers and of updates,
    vary within one compiled program; what changes the data, the model or the shape of the program
    takes one for each value. Evaluations are of the server's model, not of personal ones. Ctrl-C
    ends a sweep when the program in progress has ended; it goes on from there by the same command
    with its folder as --out.

    Attributes:
      config: File of settings, .yaml or .json, as for train; also the config.json of a run. Those
        on the command line go before.
      vary: A setting, or an argument in one, and its values, such as algorithm=fed_avg,scaffold or
        client_optimizer.learning_rate=0.03,0.1 or algorithm.mu=0.01,0.1 or, for whole numbers,
        seed=0:8, which leaves 8 out. Can be given several times, for all combinations.
      out: Folder for the runs, one folder for each, for sweep.json and for pictures; it must not
        exist, or hold the same sweep. A new one under runs/ by default.
      json: Print one JSON object, and nothing else, on stdout.
    """

    config: Path | None = None
    vary: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, _VARY] = ()
    out: Path | None = None
    json: bool = False


class _Run(NamedTuple):
    """One of the runs: what it has of what varies, and all its settings."""

    values: dict[str, Any]
    settings: Settings


def sweep(options: Sweep) -> None:
    """Runs the command.

    Raises:
      UsageError: A setting is wrong, or the folder cannot be written.
      InterruptedRunError: A signal came, and the program in progress has been recorded.
    """
    fl.configure_cpu()
    join(options)
    varied = dict(map(varied_by, options.vary))
    if not varied or len(varied) < len(options.vary):
        raise UsageError("--vary is given twice for a setting, or not at all; name each once")
    for name in ("fine_tune_epochs", "fine_tune_steps"):
        if getattr(options, name) is not None or name in varied:
            raise UsageError(as_option(f"{name} does nothing in a sweep; leave it out"))
    base = settings_from(vars(options))
    with usage_errors(as_option):
        runs = [
            _Run(values, varied_settings(base, values))
            for values in (
                dict(zip(varied, chosen, strict=True))
                for chosen in itertools.product(*varied.values())
            )
        ]
    programs = group_by_program([run.settings for run in runs])
    about = jsonable({"config": dataclasses.asdict(base), "vary": varied})
    with contextlib.ExitStack() as stack:

        def opened() -> Path:
            out = options.out or new_folder("sweep")
            stack.enter_context(kept_folder(out, about, "a sweep"))
            return out

        _run_all(options, of_first(opened), about, runs, programs)


def _run_all(
    options: Sweep,
    out: Path,
    about: dict[str, Any],
    runs: Sequence[_Run],
    programs: Sequence[Sequence[int]],
) -> None:
    """Runs, records, draws and reports what is not recorded yet."""
    varied = about["vary"]
    structural = sorted(
        name for name, value in runs[0].values.items() if not is_traced(name, value)
    )
    told = f", since {', '.join(structural)} cannot vary within one" if len(programs) > 1 else ""
    console = new_console(stderr=options.json)
    console.print(f"{len(runs)} runs in {_count(len(programs), 'program')}{told}")
    began = time.perf_counter()
    folders = [_folder(out, i, run) for i, run in enumerate(runs)]
    # As the first process sees the files, which writes them.
    is_complete = [_is_complete(*of) for of in zip(folders, runs, strict=True)]
    is_complete = hosts.shared(is_complete)
    goes_on = f"the same command with --out {out} goes on"
    with finishing(goes_on) as end_if_signalled:
        for places in programs:
            if all(is_complete[place] for place in places):
                continue
            make_room_for_programs()
            with usage_errors(as_option):
                try:
                    histories = _run([runs[place].settings for place in places])
                except (jax.errors.JaxRuntimeError, ValueError) as error:
                    raise lost(error, goes_on) from None
            if hosts.is_first():
                write_text(out / "config.json", json.dumps(about, indent=2) + "\n")
                for place, history in zip(places, histories, strict=True):
                    _record(folders[place], runs[place].settings, history)
            end_if_signalled()
        run_s = time.perf_counter() - began

        if hosts.is_first():
            _report(options, out, varied, runs, folders, len(programs), run_s)
        hosts.anywhere(False)  # Until then, all stay.


def _report(
    options: Sweep,
    out: Path,
    varied: dict[str, Any],
    runs: Sequence[_Run],
    folders: Sequence[Path],
    num_programs: int,
    run_s: float,
) -> None:
    """Draws and reports what is recorded."""
    recorded = [read_run(folder) for folder in folders]
    groups = group_seeds(recorded)
    if len(groups) <= MAX_CURVES:
        draw(out, panels(groups, name_groups(groups)), title(groups))
    metrics = numbers_in([row for run in recorded for row in run.evaluations.values()])
    metric = main_metric(metrics, options.metric)
    report = {
        "out": str(out),
        **machine(),
        "vary": varied,
        "metrics": in_order(metrics, metric),
        "metric": metric,
        "programs": num_programs,
        "run_s": run_s,
        "runs": [
            {
                **by_metric(found.evaluations.values()),
                **run.values,
                "folder": folder.name,
                "rounds": list(found.evaluations),
            }
            for run, folder, found in zip(runs, folders, recorded, strict=True)
        ],
    }
    text = json.dumps(jsonable(report))
    write_text(out / "sweep.json", text + "\n")
    if options.json:
        print(text)
    else:
        _print_report(report, new_console(stderr=False))


def _run(runs: Sequence[Settings]) -> list[fl.History]:
    """The histories of runs that one program can run."""
    built = hosts.all_or_none(lambda: build(runs[0]))
    algorithm, numbers = algorithms_of(built, runs)
    try:
        result = fl.sweep(
            algorithm,
            built.population,
            built.sampler,
            runs[0].rounds,
            keys=jax.vmap(jax.random.key)(np.array([run.seed for run in runs])),
            numbers=numbers,
            evaluate=built.evaluate,
            eval_every=runs[0].eval_every,
            privacy=built.privacy,
        )
    except jax.errors.ConcretizationTypeError:  # A function asks for the value of a number.
        if not numbers:
            raise
        return _one_by_one(runs)
    return result.histories


def _one_by_one(runs: Sequence[Settings]) -> list[fl.History]:
    """The histories of runs whose numbers take programs of their own."""
    found: dict[int, fl.History] = {}
    for places in group_by_numbers(runs):
        found |= zip(places, _run([runs[place] for place in places]), strict=True)
    return [found[place] for place in range(len(runs))]


def _folder(out: Path, place: int, run: _Run) -> Path:
    named = (f"{name}={value}".replace("/", "_") for name, value in run.values.items())
    return out / "-".join([f"{place:03}", *named])


def _is_complete(folder: Path, run: _Run) -> bool:
    """Whether a run is recorded up to its last evaluation, which is written last."""
    try:
        return run.settings.rounds in read_run(folder).evaluations
    except UsageError:
        return False


def _record(folder: Path, run: Settings, history: fl.History) -> None:
    """Writes a run as `fedjax-lite train` does, for `fedjax-lite plot`."""
    with Recorder(folder, dataclasses.asdict(run)) as recorder:
        for row in history.rounds:
            recorder.on_round(row)
        for row in history.evaluations:
            recorder.on_eval(row)


def _count(number: int, thing: str) -> str:
    return f"one {thing}" if number == 1 else f"{number} {thing}s"


def _print_report(report: dict[str, Any], console: rich.console.Console) -> None:
    names = [name for name in report["vary"] if name != "seed"]
    table = rich.table.Table(title="after the last round, on held-out examples")
    for column in (*names, "runs", *report["metrics"]):
        table.add_column(column, justify="right")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in report["runs"]:
        groups.setdefault(tuple(run[name] for name in names), []).append(run)
    for values, runs in groups.items():
        last = ([number(run.get(name, [None])[-1]) for run in runs] for name in report["metrics"])
        spread = map(_spread, last)
        table.add_row(*map(str, values), str(len(runs)), *spread)
    console.print(table)
    console.print(f"{report['run_s']:.2f} s with compilation, on {report['device']}")
    console.print(f"runs and pictures in {report['out']}", soft_wrap=True)


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {written_out(float(np.std(values)))}" if len(values) > 1 else ""
    return f"{written_out(float(np.mean(values)))}{deviation}"
