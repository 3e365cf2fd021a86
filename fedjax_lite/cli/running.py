"""A run that is recorded, drawn and reported: what the commands that train have in common."""

import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

import fedjax_lite as fl
from fedjax_lite._files import write_text
from fedjax_lite.cli.errors import InterruptedRunError, UsageError
from fedjax_lite.cli.hosts import lost
from fedjax_lite.cli.records import cannot_write, new_folder
from fedjax_lite.cli.runs import read_run
from fedjax_lite.experiments.build import Experiment
from fedjax_lite.runs.main_metric import better, by_metric, in_order, numbers_in
from fedjax_lite.runs.plot.lines import draw
from fedjax_lite.runs.plot.of_runs import panels, title
from fedjax_lite.runs.progress import progress
from fedjax_lite.runs.records import Recorder, jsonable
from fedjax_lite.runs.stopping import StopRule
from fedjax_lite.xla.hosts import all_or_none, is_first

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def unused_folder(out: Path | None, name: str) -> Path:
    """The folder that is asked for, or a new one.

    Raises:
      UsageError: It holds a run.
    """
    out = out or new_folder(name)
    if (out / "metrics.jsonl").exists() or (out / "checkpoints").exists():
        raise UsageError(f"--out {out} holds a run; choose another folder, or --resume {out}")
    return out


def run_recorded(
    built: Experiment,
    out: Path,
    settings: dict[str, Any],
    *,
    resumed_by: str,
    stop: Sequence[StopRule] = (),
    ema_decay: float | None = None,
    store_in_file: bool = False,
    checkpoint_every: int = 50,
    tensorboard: bool = False,
    stderr: bool,
) -> dict[str, Any]:
    """Trains, or goes on from the last checkpoint in the folder, and records and draws it there.

    Args:
      built: The simulation.
      out: The folder.
      settings: What it takes to repeat the run, for `config.json`.
      resumed_by: The command that goes on with an interrupted run, before the folder.
      stop: Rules that end the run.
      ema_decay: See `fl.train`.
      store_in_file: Whether what clients keep lies in the folder, and not in memory.
      checkpoint_every: Rounds between checkpoints.
      tensorboard: See `fl.Recorder`.
      stderr: Whether stdout is kept for something else.

    Returns:
      The configuration, the evaluations, and how fast it was.

    Raises:
      UsageError: The folder cannot be written, or is full, or another process writes it.
      InterruptedRunError: Ctrl-C was pressed.
      LostProcessError: Another one of several processes has ended.
      ValueError: The checkpoints are of another run.
    """
    key = jax.random.key(built.settings.seed)
    try:
        # As fl.train would draw it.
        state = state_in_file(built, jax.random.split(key, 3)[0], out) if store_in_file else None
        recorder = all_or_none(lambda: Recorder(out, settings, tensorboard=tensorboard))
        # From here on it is a run that --resume takes: what follows may compile for long.
        (out / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from None
    goes_on = f"fedjax-lite {resumed_by} {out} goes on"
    text = ""

    def on_round(row: dict[str, Any], info: fl.RoundInfo) -> None:
        recorder.on_round(row, info)
        show(row["round"], text, False)

    def on_eval(row: dict[str, Any]) -> None:
        nonlocal text
        recorder.on_eval(row)
        names = in_order(numbers_in([row]), built.metric)
        text = "  ".join(f"{name} {written_out(row[name])}" for name in names)
        if "epsilon" in row:
            text += f"  epsilon {row['epsilon']:.2f}"
        show(row["round"], text, True)

    try:
        with recorder:
            with progress(built.settings.rounds, stderr=stderr) as show:
                result = fl.train(
                    built.algorithm,
                    built.population,
                    built.sampler,
                    built.settings.rounds,
                    key=key,
                    state=state,
                    evaluate=built.evaluate,
                    eval_every=built.settings.eval_every,
                    on_round=on_round,
                    on_eval=on_eval,
                    on_resume=recorder.on_resume,
                    stop=stop,
                    ema_decay=ema_decay,
                    best=built.metric,
                    best_mode=better(built.metric),
                    checkpoints=fl.Checkpoints(out / "checkpoints", every=checkpoint_every),
                    privacy=built.privacy,
                )
            personal = None
            if built.personal is not None:
                personal = built.personal(result.averaged or result.state, key)
            clients = _clients(built, result, personal)
            all_or_none(lambda: _finish(out, clients) if is_first() else None)
    except KeyboardInterrupt as interrupt:
        told = str(interrupt).partition(";")[0] or "interrupted"
        raise InterruptedRunError(f"{told}; {goes_on}", interrupt) from None
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise lost(error, goes_on) from None
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise UsageError(f"{out}: {error.strerror}; make room, and {goes_on}") from None
    evaluations = result.history.evaluations
    return {
        **by_metric(evaluations),
        "metrics": in_order(numbers_in(evaluations), built.metric),
        "metric": built.metric,
        "out": str(out),
        **json.loads((out / "config.json").read_text()),
        "rounds": [row["round"] for row in evaluations],
        **_told_of_privacy(result),
        **told_of_personal(personal),
        "stopped": result.stopped,
        "compile_s": result.compile_s,
        "run_s": result.run_s,
        "client_updates_per_s": result.client_updates_per_s,
        "examples_per_s": result.examples_per_s,
    }


def written_out(value: float) -> str:
    """A number with four decimals; of what is very small or large, four digits."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:#.4g}"


def told_of_personal(found: fl.ClientEvaluation | None) -> dict[str, Any]:
    """The metrics of the models that clients have for themselves, on the examples of all."""
    if found is None:
        return {}
    return {f"personal_{name}": np.asarray(x).tolist() for name, x in found.pooled.items()}


def _told_of_privacy(result: fl.TrainResult) -> dict[str, Any]:
    """What the rounds have spent, and for what it holds."""
    spent = result.privacy
    if spent is None:
        return {}
    told = {name: value for name, value in spent._asdict().items() if name != "epsilon"}
    return {"privacy": {"epsilon": result.history.evaluations[-1]["epsilon"], **told}}


def state_in_file(built: Experiment, key: jax.Array, out: Path) -> fl.ServerState:
    """A state of a run whose clients keep what they keep in files in its folder.

    Raises:
      ValueError: They keep nothing.
    """
    try:
        state = built.algorithm.init(key, num_clients=1)
        return fl.store_in_file(state, out / "entries", built.population.num_clients)
    except ValueError as error:
        raise ValueError(f"store_in_file is True: {error}") from None


def _clients(
    built: Experiment, result: fl.TrainResult, personal: fl.ClientEvaluation | None
) -> dict[str, Any] | None:
    """How the model, and that of its own, does on the held-out examples of each client."""
    if built.held_out is None:
        return None
    found = personal if personal and not built.server_has_all else None
    found = found or built.evaluate_clients(result.averaged or result.state, built.held_out)
    report = {name: np.asarray(values).tolist() for name, values in found.clients.items()}
    for name, values in ({} if personal is None else personal.clients).items():
        report[f"personal_{name}"] = np.asarray(values).tolist()
    return {**report, "num_examples": built.held_out.num_examples.tolist()}


def _finish(out: Path, clients: dict[str, Any] | None) -> None:
    """Writes what is known of clients, and draws."""
    if clients is not None:
        write_text(out / "clients.json", json.dumps(jsonable(clients)) + "\n")
    groups = [[read_run(out)]]
    draw(out, panels(groups, [out.name]), title(groups))


def print_report(report: dict[str, Any], heading: str = "on held-out examples") -> None:
    """Prints what `run_recorded` returns."""
    table = rich.table.Table(title=heading, min_width=len(heading) + 4)
    rounds = report["rounds"]
    for column in ("", f"after round {rounds[0]}", f"after round {rounds[-1]}"):
        table.add_column(column, justify="right" if column else "left")
    for name in report["metrics"]:
        table.add_row(name, *(written_out(report[name][place]) for place in (0, -1)))
    console = rich.console.Console(markup=False)
    console.print(table)
    metric = report["metric"]
    if f"personal_{metric}" in report:
        console.print(
            f"{metric} {written_out(report[f'personal_{metric}'])} with the models that clients"
            " have for themselves",
            soft_wrap=True,
        )
    if "privacy" in report:
        told = report["privacy"]
        console.print(
            f"epsilon {told['epsilon']:.4g} of each client at a delta of {told['delta']:g}"
            f" ({told['accountant']}, {told['adjacency']})",
            soft_wrap=True,
        )
    if report["stopped"]:
        console.print(f"stopped: {report['stopped']}", soft_wrap=True)
    console.print(
        f"{report['run_s']:.2f} s of rounds ({report['client_updates_per_s']:,.1f} client updates"
        f" per second), {report['compile_s']:.2f} s of compilation, on {report['device']}",
        soft_wrap=True,
    )
    console.print(f"metrics, pictures and checkpoints in {report['out']}", soft_wrap=True)
