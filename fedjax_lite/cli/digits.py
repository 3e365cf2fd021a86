"""`fedjax-lite baseline digits`: three algorithms at four splits, over seeds."""

import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fedjax_lite as fl
from fedjax_lite._files import locked, write_text
from fedjax_lite.cli.errors import UsageError, finishing
from fedjax_lite.cli.records import cannot_write, new_folder
from fedjax_lite.data.population import ResidentPopulation
from fedjax_lite.experiments.build import Experiment, build
from fedjax_lite.experiments.settings import Settings
from fedjax_lite.runs.plot.style import COLORS, new_axes, save
from fedjax_lite.runs.records import git_revision, jsonable, machine

# Chosen at Dirichlet 0.3 with seeds 100 to 102: FedAdam's rates are the best of client .03 and .1
# with server .003, .01 and .03; mu is the largest of .001, .01, .1 and 1 that costs no accuracy.
_ALGORITHMS: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "FedAdam": {"server_optimizer": "adam(0.03, b1=0.9, b2=0.99, eps=1e-3)"},
    "FedProx": {"algorithm": "fed_prox(mu=0.1)"},
}
_SPLITS: dict[str, dict[str, Any]] = {
    "IID": {"partition": "iid"},
    "Dirichlet 1.0": {"partition": "dirichlet(alpha=1.0, min_examples=1)"},
    "Dirichlet 0.3": {"partition": "dirichlet(alpha=0.3, min_examples=1)"},
    "Dirichlet 0.1": {"partition": "dirichlet(alpha=0.1, min_examples=1)"},
}
_NUM_SEEDS = 5
ABOUT = {
    "task": "bundled digits, 50 clients",
    "setting": f"{', '.join(_ALGORITHMS)}; IID to Dirichlet 0.1; {_NUM_SEEDS} seeds, 100 rounds",
    "source": "comes with scikit-learn",
}


def compare(out: Path | None, rounds: int | None, seed: int, *, as_json: bool) -> None:
    """Runs the comparison: writes digits.json, digits.md and digits.png, and prints the table.

    Args:
      out: The folder; its files of the same names are replaced. A new one by default.
      rounds: Number of rounds of each run; 100 by default.
      seed: The first of the seeds, each with a split and a training of its own.
      as_json: Print what digits.json holds instead of the table.

    Raises:
      UsageError: An option is out of range, a split cannot be made, or the folder cannot be
        written.
      InterruptedRunError: A signal came.
    """
    began = time.perf_counter()
    try:
        algorithms = {
            name: build(Settings(**settings, rounds=100 if rounds is None else rounds, seed=seed))
            for name, settings in _ALGORITHMS.items()
        }
        # With an alpha of 0.1, a client may be left without images: some seeds are refused.
        clients = {
            split: [_clients(dealt, seed + i) for i in range(_NUM_SEEDS)]
            for split, dealt in _SPLITS.items()
        }
    except ValueError as error:
        raise UsageError(str(error)) from None
    out = out or new_folder("digits-baseline")
    runs: list[dict[str, Any]] = []
    report = {
        "config": {name: dataclasses.asdict(one.settings) for name, one in algorithms.items()},
        "splits": _SPLITS,
        "seeds": list(range(seed, seed + _NUM_SEEDS)),
        **machine(),
        "git": git_revision(),
    }
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out / ".lock"))
        except OSError as error:
            raise cannot_write(out, error) from None
        end_if_signalled = stack.enter_context(finishing(f"{out} holds what has ended"))
        for split in _SPLITS:
            for name, built in algorithms.items():
                curves = [_train(built, one) for one in clients[split]]
                runs.append({"split": split, "algorithm": name, **_summarize(curves)})
                report |= {"seconds": time.perf_counter() - began, "runs": runs}
                write_text(out / "digits.json", json.dumps(jsonable(report), indent=2) + "\n")
                told = f"{split}, {name}: {_brief(runs[-1])}"
                print(told, file=sys.stderr if as_json else sys.stdout, flush=True)
                end_if_signalled()
        table = _table(runs)
        write_text(out / "digits.md", table)
        _draw(out / "digits.png", runs)
    if as_json:
        print(json.dumps(jsonable({"out": str(out), **report})))
    else:
        print(f"\n{table}\n{report['seconds']:.0f} s on {report['device']}; files in {out}")


def _clients(dealt: dict[str, Any], seed: int) -> Experiment:
    """Clients of one split. A fifth of all images is held out before the others are dealt.

    So all populations have one shape, and share the programs of the algorithms.
    """
    one, rest = fl.data.digits(1, seed=seed)
    datasets = (one, fl.FederatedDataset.from_clients({0: rest}))
    return build(Settings(**dealt, data_seed=seed, seed=seed), datasets)


def _train(algorithm: Experiment, clients: Experiment) -> list[tuple[int, float]]:
    """Rounds and accuracies of one run."""
    assert clients.held_out is not None
    assert isinstance(clients.population, ResidentPopulation)
    # Without the bound of batches, to which none of them comes: splits share a program.
    population = dataclasses.replace(clients.population, most_examples=None)
    examples = fl.replicate(jax.tree.map(np.asarray, dict(clients.held_out.examples)))
    result = fl.train(
        algorithm.algorithm,
        population,
        algorithm.sampler,
        algorithm.settings.rounds,
        key=jax.random.key(clients.settings.seed),
        evaluate=lambda state: fl.evaluate(algorithm.model, state, examples),
        eval_every=algorithm.settings.eval_every,
    )
    return [(row["round"], row["accuracy"]) for row in result.history.evaluations]


def _summarize(curves: list[list[tuple[int, float]]]) -> dict[str, Any]:
    final = np.array([curve[-1][1] for curve in curves])
    return {
        "mean": final.mean(),
        "std": final.std(ddof=1),
        "final": final.tolist(),
        "rounds": [round for round, _ in curves[0]],
        "accuracy": [[value for _, value in curve] for curve in curves],
    }


def _brief(run: dict[str, Any]) -> str:
    return f"{100 * run['mean']:.1f} \N{PLUS-MINUS SIGN} {100 * run['std']:.1f}"


def _table(runs: list[dict[str, Any]]) -> str:
    """Mean and standard deviation in per cent, as Markdown."""
    found = {(run["split"], run["algorithm"]): _brief(run) for run in runs}
    lines = [["split", *_ALGORITHMS], ["---"] * (1 + len(_ALGORITHMS))]
    lines += [[split, *(found[split, name] for name in _ALGORITHMS)] for split in _SPLITS]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _draw(path: Path, runs: list[dict[str, Any]]) -> None:
    """Draws each run as a point, and means with their standard deviations."""
    axes = new_axes()
    axes.grid(axis="x", visible=False)
    for i, name in enumerate(_ALGORITHMS):
        group = [run for run in runs if run["algorithm"] == name]
        x = np.arange(len(_SPLITS)) + 0.22 * (i - (len(_ALGORITHMS) - 1) / 2)
        for place, run in zip(x, group, strict=True):
            final = 100 * np.array(run["final"])
            axes.plot(np.full(final.size, place), final, ".", color=COLORS[i], alpha=0.35)
        mean, std = (100 * np.array([run[key] for run in group]) for key in ("mean", "std"))
        axes.errorbar(
            x + 0.05, mean, std, fmt="o", color=COLORS[i], capsize=3, linewidth=1.6, label=name
        )
    axes.set_xticks(range(len(_SPLITS)), list(_SPLITS))
    rounds = runs[0]["rounds"][-1]
    axes.set(
        ylabel="accuracy on held-out digits, per cent",
        title=f"digits after {rounds} rounds: mean \N{PLUS-MINUS SIGN} standard deviation of"
        f" {len(runs[0]['final'])} seeds",
    )
    axes.legend(frameon=False, loc="lower left")
    save(axes, path)
