"""`fedjax-lite baseline`: a published setting, and our result beside the published one."""

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Annotated, Any

import rich.console
import rich.table
from tyro.conf import Positional, arg

import fedjax_lite as fl
from fedjax_lite.cli import published
from fedjax_lite.cli.errors import UsageError
from fedjax_lite.cli.running import print_report, run_recorded, unused_folder
from fedjax_lite.experiments import baselines
from fedjax_lite.experiments.baselines import BASELINES, settings_of
from fedjax_lite.experiments.build import Experiment, build
from fedjax_lite.experiments.published import TABLES
from fedjax_lite.experiments.settings import Settings
from fedjax_lite.runs.records import jsonable

_WIDTH = 200  # Of lines that go to a file.
_SYNTHETIC = "synthetic data: speed only"
_QUIET = arg(metavar="PATH", help_behavior_hint="")
_NAME = arg(metavar="NAME", help_behavior_hint="")
_PATTERN = arg(metavar="PATTERN", help_behavior_hint="")
_NUMBER = arg(metavar="INT", help_behavior_hint="")


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Run a published setting or table on your copy of the data, or on drawn data of its shapes.

    A table that was interrupted goes on with the cells that are missing, by the same command with
    its folder as --out. The one named digits needs no files.

    Attributes:
      config: File of settings, .yaml or .json, with the names that follow; those on the command
        line go before.
      name: One of those that --list shows.
      list: Print the baselines, their settings and the published results, and the tables; with
        --table its cells, and the command that runs each of them alone.
      table: A published table of which to run all cells, instead of a baseline.
      quick: The table's quick variant: fewer cells, rounds or seeds.
      only: Of the table, the cells with such names, "row / column", in which * stands for anything.
      data: The data: a file of FedJAX or TensorFlow Federated, the folder cifar-10-batches-bin,
        a folder that `fedjax-lite data convert --preprocess` wrote, or for a table what --list
        tells.
      test: The test split, if it is a file or folder of its own.
      synthetic: Draw data of the same shapes instead, which tells the speed and nothing else.
      rounds: Number of rounds; the published one by default.
      num_clients: Number of clients of drawn data; the published one by default.
      seed: Determines everything random.
      out: Folder for metrics, configuration, checkpoints and pictures. A new one under runs/ by
        default.
      resume: Folder of a run of the same baseline to go on with.
      json: Print one JSON object, and nothing else, on stdout.
    """

    config: Annotated[Path | None, _QUIET] = None
    name: Annotated[Positional[str | None], _NAME] = None
    list: bool = False
    table: Annotated[str | None, _NAME] = None
    quick: bool = False
    only: Annotated[str | None, _PATTERN] = None
    data: Annotated[Path | None, _QUIET] = None
    test: Annotated[Path | None, _QUIET] = None
    synthetic: bool = False
    rounds: Annotated[int | None, _NUMBER] = None
    num_clients: Annotated[int | None, _NUMBER] = None
    seed: int = 0
    out: Annotated[Path | None, _QUIET] = None
    resume: Annotated[Path | None, _QUIET] = None
    json: bool = False


def baseline(options: Baseline) -> None:
    """Runs the command.

    Raises:
      UsageError: A setting is wrong, or the data cannot be read.
      InterruptedRunError: Ctrl-C was pressed; the run can be resumed.
    """
    if options.table is not None:
        _table(options)
        return
    _refuse(options, ("quick", "only"), "without --table")
    if options.list:
        _list(as_json=options.json)
        return
    if options.name not in BASELINES:
        raise UsageError(_no_baseline(options.name))
    fl.configure_cpu()
    chosen = BASELINES[options.name]
    if (options.data is None) == (not options.synthetic):
        both = "both --data and --synthetic are" if options.synthetic else "no data are"
        raise UsageError(f"{both} given; choose --data PATH or --synthetic")
    _refuse(
        options,
        *((("num_clients",), "with --data") if options.data else (("test",), "with --synthetic")),
    )
    if options.out is not None and options.resume is not None:
        raise UsageError("--out is given beside --resume; leave it out, the folder is the same")
    if options.resume is not None and not (options.resume / "checkpoints").is_dir():
        raise UsageError(f"--resume {options.resume} holds no checkpoints; choose that of a run")
    try:
        built = _build(chosen, options)
        settings = {**dataclasses.asdict(built.settings), "baseline": options.name}
        if options.synthetic:
            settings["note"] = _SYNTHETIC
        report = run_recorded(
            built,
            options.resume or unused_folder(options.out, options.name),
            settings,
            resumed_by=_command(options),
            stderr=options.json,
        )
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from None
    report = {
        "baseline": options.name,
        "synthetic": options.synthetic,
        "published": {"accuracy": chosen.accuracy, "source": chosen.source},
        "differs": chosen.differs,
        "personal": chosen.personal,
        **report,
    }
    if options.json:
        print(json.dumps(jsonable(report)))
    else:
        _print(report)


def _table(options: Baseline) -> None:
    others = ("name", "test", "synthetic", "rounds", "num_clients", "seed", "resume")
    _refuse(options, others, "with --table")
    name = options.table or ""
    if options.list:
        published.list_table(name, quick=options.quick, as_json=options.json)
        return
    fl.configure_cpu()
    published.run_table(
        name,
        options.data,
        options.out,
        options.only,
        quick=options.quick,
        as_json=options.json,
    )


def _no_baseline(name: str | None) -> str:
    if name is None:
        return f"no baseline is named; choose one of {', '.join(BASELINES)}, or --table NAME"
    if name in TABLES:
        return f"{name} is a table; choose --table {name}"
    close = difflib.get_close_matches(name, (*BASELINES, *TABLES), 1)
    meant = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(BASELINES)}"
    return f"{name} is no baseline; {meant}"


def _refuse(options: Baseline, names: tuple[str, ...], beside: str) -> None:
    """Refuses options that would do nothing."""
    for name in names:
        if getattr(options, name):
            told = "a baseline's name" if name == "name" else f"--{name.replace('_', '-')}"
            raise UsageError(f"{told} does nothing {beside}; leave it out")


def _build(chosen: baselines.Baseline, options: Baseline) -> Experiment:
    settings: dict[str, Any] = {**settings_of(chosen, options.data), "seed": options.seed}
    if options.rounds is not None:
        settings["rounds"] = options.rounds
    if options.num_clients is not None:
        settings["num_clients"] = options.num_clients
    datasets = chosen.load(options.data, options.test) if options.data else None
    if options.test is not None:
        settings["test"] = str(options.test)
    return build(Settings(**settings), datasets)


def _command(options: Baseline) -> str:
    """What goes on with an interrupted run, before the folder."""
    given = ["baseline", options.name]
    for name, value in dataclasses.asdict(options).items():
        if name in ("data", "test", "synthetic", "rounds", "num_clients", "seed") and value:
            given += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return " ".join(map(str, [*given, "--resume"]))


def _list(*, as_json: bool) -> None:
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "task": one.task,
            "setting": _setting(one.settings),
            "accuracy": one.accuracy,
            "source": one.source,
            "differs": one.differs,
        }
        for name, one in BASELINES.items()
    ]
    tables = [
        {
            "table": name,
            "title": table.title,
            "cells": len(table.cells),
            "measure": table.measure.told,
            "source": table.source,
            "needs": table.needs,
            "differs": table.differs,
        }
        for name, table in TABLES.items()
    ]
    if as_json:
        print(json.dumps([*rows, *tables]))
        return
    for row in rows:
        row["published"] = "" if row["accuracy"] is None else f"{row['accuracy']:.4f}"
    columns = ("name", "task", "setting", "published", "source")
    _print_rows("baselines, and the published accuracy on test data", columns, rows)
    columns = ("table", "title", "cells", "measure", "source")
    _print_rows("tables, all of whose cells --table runs", columns, tables)


def _print_rows(title: str, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    table = rich.table.Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    console = rich.console.Console(markup=False)
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(table)


def _setting(settings: Any) -> str:
    """A setting in one line."""
    client = settings.get("client_optimizer") or f"sgd({settings['client_lr']:.3g})"
    parts = [
        settings["model"],
        settings.get("algorithm", "fed_avg"),
        f"{settings['rounds']} rounds x {settings.get('cohort_size', 'all')} clients",
        f"batch {settings['batch_size']}",
        f"{settings['num_epochs']} epochs" if settings["num_epochs"] > 1 else "",
        f"clients {client}",
        f"server {settings['server_optimizer']}" if "server_optimizer" in settings else "",
        settings.get("updates", ""),
        "fine-tuned at the end" if "fine_tune_epochs" in settings else "",
    ]
    return ", ".join(filter(None, parts))


def _print(report: dict[str, Any]) -> None:
    what = _SYNTHETIC if report["synthetic"] else "on the test data"
    print_report(report, f"{report['baseline']}, {what}")
    console = rich.console.Console(markup=False)
    published, accuracy = report["published"], report["accuracy"]
    if published["accuracy"] is None:
        told = "no published accuracy to compare with"
    else:
        told = f"published accuracy {published['accuracy']:.4f}"
    if report["personal"]:
        ours = f"accuracy {report['personal_accuracy']:.4f} with the models of the clients"
    else:
        ours = f"accuracy {accuracy[-1]:.4f}, {max(accuracy):.4f} at best"
    console.print(f"{ours}; {told} ({published['source']})", soft_wrap=True)
    if report["differs"]:
        console.print(f"differs from it: {report['differs']}", soft_wrap=True)
    if report["synthetic"]:
        console.print(f"{_SYNTHETIC}; the accuracies are not to be compared", soft_wrap=True)
