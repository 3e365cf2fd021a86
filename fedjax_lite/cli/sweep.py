"""`fedjax-lite sweep`: runs that differ in some settings, as one program if these are numbers."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import time
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import rich.console
import rich.table
import tyro

import fedjax_lite as fl
from fedjax_lite.cli.brief import told_briefly
from fedjax_lite.cli.curves import MAX_CURVES, draw
from fedjax_lite.cli.errors import InterruptedRunError, UsageError
from fedjax_lite.cli.plot import panels, title
from fedjax_lite.cli.records import cannot_write, new_folder
from fedjax_lite.cli.runs import group_seeds, name_groups, number, read_object, read_run
from fedjax_lite.cli.train import as_option
from fedjax_lite.experiments.build import algorithm_of, build
from fedjax_lite.experiments.experiment import Experiment, resolve
from fedjax_lite.runs.files import locked, write_text
from fedjax_lite.runs.records import Recorder, jsonable, machine

# What can be an argument of a compiled program; the rest decides what is compiled.
_TRACED = {
    *("seed", "client_lr", "client_momentum", "client_weight_decay", "clip", "mu"),
    *("clip_update", "own_share"),
    *("server_lr", "server_momentum", "server_b1", "server_b2", "server_eps"),
}
_VARY = tyro.conf.arg(metavar="NAME=VALUES", help_behavior_hint="")


@told_briefly
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Experiment):
    """Run all combinations of some settings, and record, compare and draw them.

    Seeds and other numbers of the training vary within one compiled program; what changes the data,
    the model or the shape of the program takes one for each value. Evaluations are of the server's
    model, not of models that clients have for themselves. A sweep that was interrupted goes on from
    the last program that had ended, by the same command with its folder as --out.

    Attributes:
      config: File of settings, .yaml or .json, as for train; also the config.json of a run. Those
        on the command line go before.
      vary: A setting and its values: client_lr=0.01,0.03,0.1 or, for whole numbers, seed=0:8, which
        leaves 8 out. Can be given several times, for all combinations.
      out: Folder for the runs, one folder for each, for sweep.json and for pictures; it must not
        exist, or hold the same sweep. A new one under runs/ by default.
      json: Print one JSON object, and nothing else, on stdout.
    """

    config: Path | None = None
    vary: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, _VARY] = ()
    out: Path | None = None
    json: bool = False


def sweep(options: Sweep) -> None:
    """Runs the command.

    Raises:
      UsageError: A setting is wrong, or the folder cannot be written.
    """
    fl.configure_cpu()
    varied = dict(map(_values, options.vary))
    if not varied or len(varied) < len(options.vary):
        raise UsageError("--vary is given twice for a setting, or not at all; name each once")
    if options.fine_tune_epochs is not None or "fine_tune_epochs" in varied:
        raise UsageError("--fine-tune-epochs does nothing in a sweep; leave it out")
    names = [field.name for field in dataclasses.fields(Experiment)]
    base = Experiment(**{name: getattr(options, name) for name in names})
    try:
        runs = [
            resolve(dataclasses.replace(base, **dict(zip(varied, values, strict=True))))
            for values in itertools.product(*varied.values())
        ]
    except ValueError as error:
        raise UsageError(as_option(str(error))) from None
    programs = _programs(runs)
    about = jsonable({"config": dataclasses.asdict(base), "vary": varied})
    out = options.out or new_folder("sweep")
    with contextlib.ExitStack() as stack:
        try:
            _check_folder(out, about)
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out / ".lock"))
        except OSError as error:
            raise cannot_write(out, error) from None
        _run_all(options, out, about, runs, programs)


def _check_folder(out: Path, about: dict[str, Any]) -> None:
    """Refuses a folder that holds anything but a part of the same sweep.

    Raises:
      FileExistsError: It holds something else.
      UsageError: It holds another sweep.
    """
    if not out.exists() or (out.is_dir() and {path.name for path in out.iterdir()} <= {".lock"}):
        return
    if not (out / "config.json").exists() or (out / "metrics.jsonl").exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    if read_object(out / "config.json") != json.loads(json.dumps(about)):
        raise UsageError(f"--out {out} holds a sweep of other settings; choose another folder")


def _run_all(
    options: Sweep,
    out: Path,
    about: dict[str, Any],
    runs: Sequence[Experiment],
    programs: Sequence[Sequence[int]],
) -> None:
    """Runs, records, draws and reports what is not recorded yet."""
    varied = about["vary"]
    structural = sorted(set(varied) - _TRACED)
    told = f", since {', '.join(structural)} cannot vary within one" if len(programs) > 1 else ""
    console = rich.console.Console(stderr=options.json)
    console.print(f"{len(runs)} runs in {_count(len(programs), 'program')}{told}")
    began = time.perf_counter()
    folders = [_folder(out, i, list(varied), run) for i, run in enumerate(runs)]
    for places in programs:
        if all(_is_complete(folders[place], runs[place]) for place in places):
            continue
        try:
            histories = _run([runs[place] for place in places])
        except KeyboardInterrupt as interrupt:
            raise InterruptedRunError(
                f"interrupted; the same command with --out {out} goes on", interrupt
            ) from None
        except ValueError as error:
            raise UsageError(as_option(str(error))) from None
        write_text(out / "config.json", json.dumps(about, indent=2) + "\n")
        for place, history in zip(places, histories, strict=True):
            _record(folders[place], runs[place], history)
    run_s = time.perf_counter() - began

    recorded = [read_run(folder) for folder in folders]
    groups = group_seeds(recorded)
    if len(groups) <= MAX_CURVES:
        draw(out, panels(groups, name_groups(groups)), title(groups))
    report = {
        "out": str(out),
        **machine(),
        "vary": varied,
        "programs": len(programs),
        "run_s": run_s,
        "runs": [
            {
                **{name: getattr(run, name) for name in varied},
                "folder": folder.name,
                "rounds": list(found.evaluations),
                "loss": [row["loss"] for row in found.evaluations.values()],
                "accuracy": [row["accuracy"] for row in found.evaluations.values()],
            }
            for run, folder, found in zip(runs, folders, recorded, strict=True)
        ],
    }
    text = json.dumps(jsonable(report))
    write_text(out / "sweep.json", text + "\n")
    if options.json:
        print(text)
    else:
        _print_report(report, console)


def _values(text: str) -> tuple[str, tuple[Any, ...]]:
    """A setting and its values, from `name=a,b` or `name=begin:end`.

    Raises:
      UsageError: It is none, or has values of another type.
    """
    name, equals, listed = text.partition("=")
    name = name.replace("-", "_")
    hints = typing.get_type_hints(Experiment)
    if not equals or not listed:
        raise UsageError(f"--vary is {text!r}; write a setting and its values, as client_lr=0.1,1")
    if name not in hints:
        raise UsageError(f"--vary is {text!r}; choose one of {', '.join(hints)}")
    kinds = {hints[name], *typing.get_args(hints[name])}
    if any(typing.get_origin(kind) is tuple for kind in kinds):
        raise UsageError(
            f"--vary is {text!r}, and {name} takes several values; run a sweep for each"
        )
    convert = next((kind for kind in (int, float) if kind in kinds), str)
    try:
        if convert is int and ":" in listed:
            values: tuple[Any, ...] = tuple(range(*map(int, listed.split(":"))))
        else:
            values = tuple(map(convert, listed.split(",")))
    except (ValueError, TypeError):
        raise UsageError(
            f"--vary is {text!r}, but {name} takes {convert.__name__} values; separate them by"
            " commas, or write whole numbers as begin:end"
        ) from None
    if not values or len(set(values)) < len(values):
        raise UsageError(f"--vary is {text!r}; name at least one value, and each once")
    return name, values


def _programs(runs: Sequence[Experiment]) -> list[list[int]]:
    """The places of runs that one program can run: those that differ in traced numbers alone."""
    groups: dict[Experiment, list[int]] = {}
    for place, run in enumerate(runs):
        # Whether a number is there at all, or zero, changes the program.
        shape: dict[str, Any] = {name: bool(getattr(run, name)) for name in _TRACED - {"seed"}}
        alike = dataclasses.replace(run, seed=0, **shape)
        groups.setdefault(alike, []).append(place)
    return list(groups.values())


def _run(runs: Sequence[Experiment]) -> list[fl.History]:
    """The histories of runs that one program can run."""
    built = build(runs[0])
    numbers = {
        name: np.array([getattr(run, name) for run in runs], np.float32)
        for name in _TRACED - {"seed"}
        if len({getattr(run, name) for run in runs}) > 1
    }
    keys = jax.vmap(jax.random.key)(np.array([run.seed for run in runs]))

    def algorithm(**numbers: Any) -> fl.FederatedAlgorithm:
        return algorithm_of(dataclasses.replace(built.experiment, **numbers), built.model)

    result = fl.sweep(
        algorithm,
        built.population,
        built.sampler,
        runs[0].rounds,
        keys=keys,
        numbers=numbers,
        evaluate=built.evaluate,
        eval_every=runs[0].eval_every,
    )
    return result.histories


def _folder(out: Path, place: int, varied: Sequence[str], run: Experiment) -> Path:
    return out / "-".join(
        [f"{place:03}", *(f"{name}={getattr(run, name)}".replace("/", "_") for name in varied)]
    )


def _is_complete(folder: Path, run: Experiment) -> bool:
    """Whether a run is recorded up to its last evaluation, which is written last."""
    try:
        return run.rounds in read_run(folder).evaluations
    except UsageError:
        return False


def _record(folder: Path, run: Experiment, history: fl.History) -> None:
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
    for column in (*names, "runs", "loss", "accuracy"):
        table.add_column(column, justify="right")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in report["runs"]:
        groups.setdefault(tuple(run[name] for name in names), []).append(run)
    for values, runs in groups.items():
        last = ([number(run[metric][-1]) for run in runs] for metric in ("loss", "accuracy"))
        spread = map(_spread, last)
        table.add_row(*map(str, values), str(len(runs)), *spread)
    console.print(table)
    console.print(f"{report['run_s']:.2f} s with compilation, on {report['device']}")
    console.print(f"runs and pictures in {report['out']}", soft_wrap=True)


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {np.std(values):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{deviation}"
