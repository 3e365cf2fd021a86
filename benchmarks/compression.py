"""What compression is worth: accuracy against megabytes, and what it costs.

    python -m benchmarks.compression [--compressor NAME ...] [--rounds N] [--small] [--json]
        [--plot FILE]

Each runs from three seeds, as one program, on the digits of `benchmarks.algorithms`. `accuracy` is
the mean over seeds of that of the last evaluation, over all held-out examples, after as many rounds
as all have; `kB_up` and `kB_down` are what one client sends and is sent in a round, and
`kB_per_client` what that comes to over all rounds for a client that takes part in as many as the
cohort's share of the population. `round_s` is a round of the case `dense` of `benchmarks.cohort`,
interleaved with a plain one, and `cost` what it takes beyond that one, relative to it.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import fedjax_lite as fl
from benchmarks import cases
from benchmarks.algorithms import CASES, SEEDS
from benchmarks.timing import interleaved, machine, rounds

EVAL_EVERY = 10
SIGN_RATE = 0.01  # Of the server, for steps of 1 or -1.
# What rounds are built with: a pipeline, and a server optimizer if not the plain one.
COMPRESSORS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "half": lambda: {"pipeline": fl.half_precision()},
    "uniform_8": lambda: {"pipeline": fl.quantize_uniform(256)},
    "uniform_4": lambda: {"pipeline": fl.quantize_uniform(16)},
    "uniform_2": lambda: {"pipeline": fl.quantize_uniform(4)},
    "scalar_8": lambda: {"pipeline": fl.quantize_scalar(8)},
    "scalar_4_channels": lambda: {"pipeline": fl.quantize_scalar(4, per_channel=True)},
    "rotated_4": lambda: {"pipeline": fl.rotated(fl.quantize_uniform(16))},
    "rotated_2": lambda: {"pipeline": fl.rotated(fl.quantize_uniform(4))},
    "eden_4": lambda: {"pipeline": fl.eden(4)},
    "eden_2": lambda: {"pipeline": fl.eden(2)},
    "eden_1": lambda: {"pipeline": fl.eden(1)},
    "eden_quarter": lambda: {"pipeline": fl.eden(0.25)},
    "drive_ef": lambda: {"pipeline": fl.error_feedback(fl.drive())},
    "terngrad": lambda: {"pipeline": fl.terngrad(2.5)},
    "sign_sgd": lambda: {
        "pipeline": fl.sign_sgd(),
        "server_optimizer": optax.sgd(SIGN_RATE),
        "weighting": "uniform",
    },
    "scaled_sign_ef": lambda: {"pipeline": fl.error_feedback(fl.scaled_sign())},
    "qsgd_8": lambda: {"pipeline": fl.qsgd(127)},
    "qsgd_elias": lambda: {"pipeline": fl.qsgd(16, encoding="elias")},
    "top_10": lambda: {"pipeline": fl.top_k(0.1)},
    "top_10_ef": lambda: {"pipeline": fl.error_feedback(fl.top_k(0.1))},
    "top_1_ef": lambda: {"pipeline": fl.error_feedback(fl.top_k(0.01))},
    "top_10_ef21": lambda: {"pipeline": fl.ef21(fl.top_k(0.1))},
    "random_10": lambda: {"pipeline": fl.random_k(0.1)},
    "product": lambda: {"pipeline": fl.product_quantization(16, 8)},
    "low_rank_4": lambda: {"pipeline": fl.low_rank(4)},
    "power_sgd_4_ef": lambda: {"pipeline": fl.error_feedback(fl.power_sgd(4))},
    "both_ways": lambda: {
        "pipeline": fl.chain(
            fl.downlink(fl.rotated(fl.quantize_uniform(256))), fl.error_feedback(fl.drive())
        )
    },
}


def measure(name: str, num_rounds: int, dataset: Any, held_out: Any) -> dict[str, Any]:
    """The row of a compressor, but for its cost."""
    case = CASES["digits"]
    model, cohort_size = case.model(), case.cohort_size
    test = held_out.resident().examples

    def build(**options: Any) -> fl.FederatedAlgorithm:
        options = {**case.options, **COMPRESSORS[name](), **options}
        return fl.fed_avg(model, optax.sgd(case.rate), **options)

    result = fl.sweep(
        build,
        dataset.resident(),
        fl.samplers.uniform(dataset.num_clients, cohort_size),
        num_rounds,
        keys=jax.vmap(jax.random.key)(np.array(SEEDS)),
        evaluate=lambda state: fl.evaluate(model, state, test),
        eval_every=min(EVAL_EVERY, num_rounds),
    )
    accuracy = [history.evaluations[-1]["accuracy"] for history in result.histories]
    sent = {
        way: np.mean([row[f"bytes_{way}"] for run in result.histories for row in run.rounds])
        / (1000 * cohort_size)
        for way in ("up", "down")
    }
    share = num_rounds * cohort_size / dataset.num_clients
    return {
        "accuracy": round(float(np.mean(accuracy)), 4),
        "kB_up": round(float(sent["up"]), 3),
        "kB_down": round(float(sent["down"]), 3),
        "kB_per_client": round(float(sum(sent.values()) * share), 1),
    }


def costs(names: list[str], case: cases.Case, repeats: int) -> Iterator[dict[str, float]]:
    """Seconds of a round of each, in turn with a plain one, and what it takes beyond that."""
    model, dataset = case.model(), cases.dataset(case)
    population = dataset.resident()
    cohort = fl.cohort_of(population, np.arange(dataset.num_clients))

    def round_of(name: str) -> Callable[[], Any]:
        options = {"batch_size": case.batch_size, **COMPRESSORS[name]()}
        algorithm = fl.fed_avg(model, optax.sgd(cases.LEARNING_RATE), **options)
        state = algorithm.init(jax.random.key(0), num_clients=dataset.num_clients)
        return rounds(algorithm, state, cohort)

    plain = round_of("none")
    for name in names:  # Beside the plain one each, not all at once: stores take memory.
        run = plain if name == "none" else round_of(name)
        pair = interleaved({"none": plain, name: run}, repeats)
        yield {
            "round_s": round(pair[name].fastest, 4),
            "cost": round(pair[name].fastest / pair["none"].fastest - 1, 3),
        }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws accuracy against kilobytes, both ways, and which ones none beats in both."""
    from fedjax_lite.runs.plot.style import COLORS, new_axes, save

    axes = new_axes((7.6, 4.6))
    rows = sorted(rows, key=lambda row: (row["kB_up"], -row["accuracy"]))
    sent, accuracy = (np.array([row[name] for row in rows]) for name in ("kB_up", "accuracy"))
    is_best = accuracy >= np.maximum.accumulate(accuracy)
    axes.step(sent[is_best], accuracy[is_best], where="post", color=COLORS[7], linewidth=1)
    for number, row in enumerate(rows, 1):
        # Numbers in turn above and below, where many are alike.
        above = number % 2 == 1
        axes.plot(
            *(sent[number - 1], accuracy[number - 1], "o"),
            color=COLORS[0 if is_best[number - 1] else 5],
            markersize=5,
            label=f"{number}  {row['compressor']}",
        )
        axes.annotate(
            str(number),
            (sent[number - 1], accuracy[number - 1]),
            xytext=(0, 5 if above else -5),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=7,
        )
    axes.set(xscale="log", xlabel="kB that a client sends in a round", ylabel="accuracy")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, frameon=False)
    save(axes, path)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--compressor", nargs="+", choices=COMPRESSORS, default=list(COMPRESSORS))
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--small", action="store_true", help="time a round of two clients")
    parser.add_argument("--json", action="store_true", help="print one JSON object per compressor")
    parser.add_argument("--plot", type=Path, help="where to write a picture")
    options = parser.parse_args()
    fl.configure_cpu()
    if options.json:
        print(json.dumps(machine("fedjax_lite", "jax", "optax")), flush=True)
    else:
        print(f"{'':18} acc.    up kB  down kB  round s   cost")
    dense = cases.CASES["dense"]
    if options.small:
        dense = dense._replace(sizes=np.full(2, 20))
    dataset, held_out = CASES["digits"].load(None)
    rows = []
    timed = costs(options.compressor, dense, repeats=2 if options.small else 9)
    for name, cost in zip(options.compressor, timed, strict=True):
        row = {"compressor": name, **measure(name, options.rounds, dataset, held_out), **cost}
        rows.append(row)
        print(json.dumps(row) if options.json else _formatted(row), flush=True)
    if options.plot is not None:
        plot(rows, options.plot)


def _formatted(row: dict[str, Any]) -> str:
    return (
        f"{row['compressor']:18} {row['accuracy']:5.3f} {row['kB_up']:7.2f}  {row['kB_down']:7.2f}"
        f"  {row['round_s']:7.3f}  {row['cost']:5.2f}"
    )


if __name__ == "__main__":
    main()
