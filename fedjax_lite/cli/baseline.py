"""`fedjax-lite baseline`: a published setting, and our result beside the published one."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import rich.console
import rich.table
from tyro.conf import Positional, arg

import fedjax_lite as fl
from fedjax_lite.cli import digits
from fedjax_lite.cli.errors import UsageError
from fedjax_lite.cli.running import print_report, run_recorded, unused_folder
from fedjax_lite.experiments import baselines
from fedjax_lite.experiments.baselines import BASELINES, settings_of
from fedjax_lite.experiments.build import Experiment, build
from fedjax_lite.experiments.settings import Settings
from fedjax_lite.runs.records import jsonable

_WIDTH = 200  # Of lines that go to a file.
_SYNTHETIC = "synthetic data: speed only"
_QUIET = arg(metavar="PATH", help_behavior_hint="")
_NUMBER = arg(metavar="INT", help_behavior_hint="")


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Run a published setting on your copy of the data, or on drawn data of the same shapes.

    digits compares FedAvg, FedAdam and FedProx at four splits of the bundled digits, over five
    seeds each, and needs no files.

    Attributes:
      config: File of settings, .yaml or .json, with the names that follow; those on the command
        line go before.
      name: One of those that --list shows.
      list: Print the baselines, their settings and the published results.
      data: The data: a file of FedJAX or TensorFlow Federated, the folder cifar-10-batches-bin,
        or a folder that `fedjax-lite data convert --preprocess` wrote.
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
    name: Annotated[Positional[str | None], arg(metavar="NAME", help_behavior_hint="")] = None
    list: bool = False
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
    if options.list:
        _list(as_json=options.json)
        return
    if options.name not in (*BASELINES, "digits"):
        told = "no baseline is named" if options.name is None else f"{options.name} is no baseline"
        raise UsageError(f"{told}; choose one of {', '.join((*BASELINES, 'digits'))}")
    fl.configure_cpu()
    if options.name == "digits":
        _refuse(options, ("data", "test", "synthetic", "num_clients", "resume"))
        digits.compare(options.out, options.rounds, options.seed, as_json=options.json)
        return
    chosen = BASELINES[options.name]
    if (options.data is None) == (not options.synthetic):
        both = "both --data and --synthetic are" if options.synthetic else "no data are"
        raise UsageError(f"{both} given; choose --data PATH or --synthetic")
    _refuse(options, ("num_clients",) if options.data else ("test",))
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


def _refuse(options: Baseline, names: tuple[str, ...]) -> None:
    """Refuses options that would do nothing."""
    for name in names:
        if getattr(options, name):
            kind = "digits" if options.name == "digits" else "--synthetic"
            kind = "--data" if options.data and kind != "digits" else kind
            raise UsageError(f"--{name.replace('_', '-')} does nothing with {kind}; leave it out")


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
    rows.append({"name": "digits", **digits.ABOUT, "accuracy": None, "differs": ""})
    if as_json:
        print(json.dumps(rows))
        return
    table = rich.table.Table(title="baselines, and the published accuracy on test data")
    for column in ("name", "task", "setting", "published", "source"):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for row in rows:
        published = "" if row["accuracy"] is None else f"{row['accuracy']:.4f}"
        table.add_row(row["name"], row["task"], row["setting"], published, row["source"])
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
