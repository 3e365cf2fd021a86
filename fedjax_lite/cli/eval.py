"""`fedjax-lite eval`: how the model of a run does, on all examples and client by client."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import rich.console
import rich.table
from tyro.conf import Positional, arg

import fedjax_lite as fl
from fedjax_lite.cli.brief import told_briefly
from fedjax_lite.cli.errors import UsageError, usage_errors
from fedjax_lite.cli.running import state_in_file, told_of_personal, written_out
from fedjax_lite.cli.runs import settings_of_training
from fedjax_lite.experiments.baselines import BASELINES
from fedjax_lite.experiments.build import Experiment, build
from fedjax_lite.experiments.loading import read_examples
from fedjax_lite.experiments.settings import settings_from
from fedjax_lite.runs.checkpoint import read_checkpoint
from fedjax_lite.runs.main_metric import better
from fedjax_lite.runs.records import jsonable

# Which clients are the worst, where larger values of a metric are better, or smaller ones.
_WORST = {"max": ("lowest", np.nanmin), "min": ("highest", np.nanmax)}


@told_briefly
@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluate the model of a run, on all examples together and on those of each client.

    The folder of the run is left as it is.

    Attributes:
      run: The folder of the run.
      dataset: A data set to evaluate on, a path or an expression as for train; by default the
        examples that the run held out.
      best: Take not the last model, but the best of all evaluations, by the metric that the run was
        judged by.
      metric: Of which metric to tell how it is spread over clients; by default of that one.
      json: Print one JSON object, and nothing else, on stdout.
    """

    run: Annotated[Positional[Path], arg(metavar="DIR")]
    dataset: str | None = None
    best: bool = False
    metric: str | None = None
    json: bool = False


def evaluate(options: Eval) -> None:
    """Runs the command.

    Raises:
      UsageError: The folder holds no run with a checkpoint, or the data set cannot be read.
    """
    if not (options.run / "checkpoints").is_dir():
        raise UsageError(f"{options.run} holds no checkpoints; choose the folder of a `train` run")
    recorded = settings_of_training(options.run)
    fl.configure_cpu()
    with usage_errors():
        built = _build({**recorded, "metric": options.metric or recorded.get("metric")})
        held_out = read_examples(options.dataset) if options.dataset else built.held_out
        round, state = _restore(options, built, in_file=bool(recorded.get("store_in_file")))
    if not built.server_has_all and (options.best or options.dataset):
        asked = "--best" if options.best else "--dataset"
        raise UsageError(
            f"{asked} is given, and the server of {options.run} has a part of the model, or several"
            " models, and clients keep what makes them their own; leave it out"
        )
    report: dict[str, Any] = {"run": str(options.run), "round": round, "best": options.best}
    with usage_errors():  # The file of what clients keep may be damaged.
        if held_out is None or not built.server_has_all:
            report |= _values(built.evaluate(state))
        else:
            report |= _measure(built, state, held_out)
        # The best state is kept without what clients keep.
        if built.personal is not None and options.dataset is None and not options.best:
            report |= told_of_personal(built.personal(state, jax.random.key(built.settings.seed)))
    if options.json:
        print(json.dumps(jsonable(report)))
    else:
        _print_report(report, built.metric)


def _build(recorded: dict[str, Any]) -> Experiment:
    """The simulation that a run is of."""
    datasets = None
    if "baseline" in recorded and "note" not in recorded:  # Of files, which it reads by itself.
        data, test = Path(recorded["dataset"]), Path(recorded["test"])
        datasets = BASELINES[recorded["baseline"]].load(data, None if test == data else test)
    return build(settings_from(recorded), datasets)


def _restore(options: Eval, built: Experiment, *, in_file: bool) -> tuple[int, fl.ServerState]:
    """The number of rounds done, and the state that evaluations are of."""
    key = jax.random.key(0)
    if in_file:
        like = state_in_file(built, key, options.run)
    else:
        like = built.algorithm.init(key, num_clients=built.population.num_clients)
    restored = read_checkpoint(options.run / "checkpoints", like)
    best = restored.arrays["best"]
    if not options.best:
        averaged = restored.arrays["averaged"] or {}
        return restored.round, dataclasses.replace(restored.arrays["state"], **averaged)
    if best is None:
        raise UsageError(f"--best is given, and {options.run} has no best state; leave it out")
    return int(best.round), best


def _values(metrics: dict[str, jax.Array]) -> dict[str, Any]:
    return {name: np.asarray(value).tolist() for name, value in metrics.items()}


def _measure(
    built: Experiment, state: fl.ServerState, dataset: fl.FederatedDataset
) -> dict[str, Any]:
    """Metrics on all examples, and how one is spread over the clients that have any."""
    found, metric = built.evaluate_clients(state, dataset), built.metric
    values = np.asarray(found.clients[metric])
    summary = fl.summarize_clients(values, found.num_examples)
    worst, extreme = _WORST[better(metric)]
    return {
        **_values(found.pooled),
        "examples": int(dataset.offsets[-1]),
        "clients": {
            "number": int(summary["num_clients"]),
            f"{metric}_mean": float(summary["mean"]),
            f"{metric}_std": float(summary["std"]),
            f"{metric}_{worst}_tenth": float(summary[f"{worst}_tenth"]),
            f"{metric}_{worst}": float(extreme(values)),
        },
    }


def _print_report(report: dict[str, Any], metric: str) -> None:
    best = ", the best" if report["best"] else ""
    table = rich.table.Table(title=f"after round {report['round']}{best}", show_header=False)
    for name in sorted(set(report) - {"run", "round", "best", "clients", "examples"}):
        if not isinstance(report[name], list):
            table.add_row(name, written_out(report[name]))
    if "clients" in report:
        table.add_row("examples", f"{report['examples']:,}")
        table.add_section()
        table.add_row("clients with examples", f"{report['clients']['number']:,}")
        worst, _ = _WORST[better(metric)]
        for name, label in (
            ("mean", f"their {metric}, mean"),
            ("std", "standard deviation"),
            (f"{worst}_tenth", f"mean of the {worst} tenth"),
            (worst, worst),
        ):
            table.add_row(label, written_out(report["clients"][f"{metric}_{name}"]))
    rich.console.Console(markup=False).print(table)
