"""What secure aggregation costs: a round in fixed point and under masks, beside one in floats.

    python -m benchmarks.secure [--clients N] [--repeats N] [--setting NAME ...] [--json]

The case `dense` of `benchmarks.cases`, one round over the first clients, interleaved; `cost` is the
time of a round in those of FedAvg without a pipeline, `bits` what a client sends for each
parameter, `arrived` how many clients are in the sum.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

import fedjax_lite as fl
from benchmarks import cases
from benchmarks.timing import interleaved, machine

CLIP, VALUE, WEIGHT = 1.0, 0.05, 100.0


def _private() -> fl.UpdateTransform:
    """One weight for all, and coordinates in which no entry of an update of norm 1 is large."""
    fixed = fl.fixed_point(VALUE, 1.0, num_bits=12, modulus_bits=20, denominator=100.0)
    return fl.discrete_gaussian_noise(CLIP, 0.5, 100, fl.common_rotation(fixed))


def _masked(num_neighbours: int | None, dropout_rate: float = 0.0) -> fl.UpdateTransform:
    return fl.chain(
        fl.fixed_point(VALUE, WEIGHT),
        fl.secure_aggregation(num_neighbours, dropout_rate=dropout_rate, masks=True),
    )


SETTINGS: dict[str, Callable[[], fl.UpdateTransform]] = {
    "fixed_point": lambda: fl.fixed_point(VALUE, WEIGHT),
    "ideal": lambda: fl.chain(
        fl.fixed_point(VALUE, WEIGHT), fl.secure_aggregation(dropout_rate=0.1)
    ),
    "4_neighbours": functools.partial(_masked, 4),
    "16_neighbours": functools.partial(_masked, 16),
    "16_neighbours_dropout": functools.partial(_masked, 16, 0.1),
    "all_pairs": functools.partial(_masked, None),
    "all_pairs_dropout": functools.partial(_masked, None, 0.1),
    "discrete_noise": lambda: fl.chain(_private(), fl.secure_aggregation(modulus_bits=20)),
}


def measure(names: list[str], num_clients: int, repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each setting."""
    case = cases.CASES["dense"]
    params = cases.initial_params(case)
    cohort = fl.cohort_of(cases.dataset(case).resident(), np.arange(num_clients))

    def round_of(**options: Any) -> Callable[[], tuple[fl.ServerState, fl.RoundInfo]]:
        optimizer = optax.sgd(cases.LEARNING_RATE)
        algorithm = fl.fed_avg(case.model(), optimizer, batch_size=case.batch_size, **options)
        state = algorithm.init(params)
        return lambda: algorithm.round(jax.random.key(1), state, cohort)

    rounds = {"fed_avg": round_of()} | {
        name: round_of(pipeline=SETTINGS[name](), reducer=fl.modular_sum()) for name in names
    }
    timings = interleaved(rounds, repeats)
    for name, run in rounds.items():
        _, info = run()
        yield {
            "setting": name,
            "clients": num_clients,
            "round_s": timings[name].fastest,
            "cost": round(timings[name].fastest / timings["fed_avg"].fastest, 2),
            "bits": round(float(info.clients["bits_up"].max()) / case.num_params, 2),
            "arrived": int((info.clients["weight"] > 0).sum()),
        }


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--json", action="store_true", help="print one JSON object per setting")
    options = parser.parse_args()
    fl.configure_cpu()
    if options.json:
        print(json.dumps(machine("fedjax_lite", "jax", "optax")), flush=True)
    else:
        print(f"{'setting':22} round_s   cost   bits  arrived")
    for row in measure(options.setting, options.clients, options.repeats):
        print(json.dumps(row) if options.json else _formatted(row), flush=True)


def _formatted(row: dict[str, Any]) -> str:
    return (
        f"{row['setting']:22} {row['round_s']:7.3f} {row['cost']:6.2f} {row['bits']:6.2f}"
        f" {row['arrived']:8}"
    )


if __name__ == "__main__":
    main()
