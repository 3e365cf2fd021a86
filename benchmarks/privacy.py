"""What privacy takes: noise by accountant, accuracy by epsilon, what an audit shows, and time.

    python -m benchmarks.privacy [--part NAME ...] [--small] [--plot FILE] [--json]

`sigma` is the noise multiplier that accountants ask for at an epsilon of 2 and a delta of 1e-6,
with clients on coins of 1/1000: that of the distribution of the privacy loss, and of Rényi
divergences.

`accuracy` is that of logistic regression on digits by epsilon, at a delta of 1e-4, the mean over
seeds. Noise that hides a client drowns a few dozens of them, whatever the mechanism. So each digit
is a client here, 1,438 of them to train and 359 to evaluate on, drawn on coins of 1/10: what is
hidden is who took part, for real, and of no larger population than there is; no cohort is simulated
that is not there. Without noise, at an epsilon of infinity, updates are clipped all the same.

`audit` plants one canary in each of many runs of two rounds, and gives the epsilon that it shows at
least, beside the one that is claimed; and the same with half of the noise, which is above it.

`overhead` is the time of a round with each mechanism of `benchmarks.mechanisms`, in those of one
without; that of `gaussian_noise` has clipping and noise.
"""

import argparse
import functools
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_lite as fl
from benchmarks import mechanisms
from benchmarks.timing import machine

EPSILONS = (float("inf"), 10.0, 3.0, 1.0)
Row = dict[str, Any]


def _private(max_norm: float, noise_multiplier: Any, denominator: float) -> dict[str, Any]:
    """Options of an algorithm whose aggregate is clipped and noisy."""
    return {
        "pipeline": fl.chain(
            fl.cap_weight(1.0),
            fl.clip_by_norm(max_norm),
            fl.gaussian_noise(noise_multiplier),
        ),
        "reducer": fl.weighted_mean(denominator),
    }


def sigma(small: bool) -> Iterator[Row]:
    """Noise multipliers by accountant."""
    population = 1_000_000
    sampler = fl.samplers.poisson(population, 1e-3, capacity=population)
    for num_rounds in (1500,) if small else (1500, 3000):
        found = {
            f"sigma_{name}": fl.privacy.calibrate(2.0, 1e-6, num_rounds, sampler, accountant=name)
            for name in ("pld", "rdp")
        }
        yield {"epsilon": 2.0, "delta": 1e-6, "rate": 1e-3, "num_rounds": num_rounds, **found}


def accuracy(small: bool) -> Iterator[Row]:
    """Accuracy by epsilon, each digit a client."""
    num_rounds, delta, rate = 5 if small else 100, 1e-4, 0.1
    images = fl.data.digits_images()
    digits = fl.FederatedDataset.from_rows(images, np.arange(len(images["y"]))[:, None])
    order = np.random.default_rng(0).permutation(digits.num_clients)
    num_held_out = digits.num_clients // 5
    held_out, clients = digits.select(order[:num_held_out]), digits.select(order[num_held_out:])
    sampler = fl.samplers.poisson(clients.num_clients, rate)
    expected = rate * clients.num_clients
    noise = [
        0.0 if np.isinf(epsilon) else fl.privacy.calibrate(epsilon, delta, num_rounds, sampler)
        for epsilon in EPSILONS
    ]
    found = _accuracies(
        lambda model, noise_multiplier: fl.fed_sgd(
            model, optax.sgd(2.0, momentum=0.9), **_private(0.5, noise_multiplier, expected)
        ),
        *(clients, held_out, sampler, num_rounds, noise, small),
    )
    for epsilon, noise_multiplier, (mean, spread) in zip(EPSILONS, noise, found, strict=True):
        spent = fl.privacy.epsilon(noise_multiplier, delta, num_rounds, sampler)
        yield {
            "epsilon": epsilon,
            "epsilon_of_the_run": spent,
            "delta": delta,
            "clients": clients.num_clients,
            "expected_cohort": round(expected, 1),
            "num_rounds": num_rounds,
            "noise_multiplier": noise_multiplier,
            "accuracy": mean,
            "accuracy_std": spread,
        }


def _accuracies(
    build: Callable[[fl.Model, Any], fl.FederatedAlgorithm],
    clients: fl.FederatedDataset,
    held_out: fl.FederatedDataset,
    sampler: fl.samplers.Sampler,
    num_rounds: int,
    noise: list[float],
    small: bool,
) -> list[tuple[float, float]]:
    """Of each noise multiplier, mean and spread over seeds; all in one program."""
    model, num_seeds = fl.models.logistic((64,), 10), 1 if small else 5
    examples = {name: jnp.asarray(x) for name, x in held_out.examples.items()}
    result = fl.sweep(
        functools.partial(build, model),
        clients.resident(),
        sampler,
        num_rounds,
        keys=jax.vmap(jax.random.key)(np.tile(np.arange(num_seeds), len(noise))),
        numbers={"noise_multiplier": np.repeat(np.array(noise, np.float32), num_seeds)},
        evaluate=lambda state: fl.evaluate(model, state, examples),
        eval_every=num_rounds,
    )
    last = [history.evaluations[-1]["accuracy"] for history in result.histories]
    by_noise = np.reshape(last, (len(noise), num_seeds))
    return list(zip(by_noise.mean(1).tolist(), by_noise.std(1).tolist(), strict=True))


def audit(small: bool) -> Iterator[Row]:
    """What canaries show, with the noise that is claimed and with half of it."""
    claimed, delta, num_rounds, num_runs = 3.0, 1e-2, 2, 2_000 if small else 50_000
    model = fl.function_model(lambda w, batch: jnp.sum(w) * batch["x"], lambda key: jnp.zeros(64))
    mesh = fl.clients_mesh(1)
    population = fl.FederatedDataset.from_clients([{"x": np.zeros(1)}] * 2).resident(mesh)
    sampler = fl.samplers.everyone(2)

    def build(noise_multiplier: jax.Array, canaries: fl.UpdateTransform) -> fl.FederatedAlgorithm:
        options = _private(1.0, noise_multiplier, 2.0)
        options["pipeline"] = fl.chain(canaries, options["pipeline"])
        return fl.fed_sgd(model, optax.sgd(1.0), weighting="uniform", mesh=mesh, **options)

    @jax.jit
    def scores(noise_multiplier: jax.Array, keys: jax.Array) -> fl.privacy.Scores:
        return fl.privacy.canary_scores(
            functools.partial(build, noise_multiplier),
            *(population, sampler, num_rounds),
            keys=keys,
            client_ids=[1],
            norm=1.0,
            batch_size=1000,
        )

    keys = jax.random.split(jax.random.key(0), num_runs)
    for factor in (1.0, 0.5):
        found = jax.device_get(scores(factor * claimed, keys))
        yield {
            "epsilon_claimed": fl.privacy.epsilon(claimed, delta, num_rounds, sampler),
            "delta": delta,
            "noise_of_the_claimed": factor,
            "runs": num_runs,
            "audit_lower_bound": fl.privacy.audit(found.final, found.planted, delta).epsilon,
            "by_iterates": fl.privacy.audit(found.iterates, found.planted, delta).epsilon,
        }


def overhead(small: bool) -> Iterator[Row]:
    """The time of a round by mechanism, in those of a plain one."""
    names = ["gaussian_noise"] if small else list(mechanisms.MECHANISMS)
    num_clients, repeats = (2, 1) if small else (100, 9)
    yield from mechanisms.measure(names, num_clients, repeats)


PARTS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "sigma": sigma,
    "accuracy": accuracy,
    "audit": audit,
    "overhead": overhead,
}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="a trial of it all, in little time")
    parser.add_argument("--plot", metavar="FILE", help="draw accuracy by epsilon")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    options = parser.parse_args()
    if options.plot and "accuracy" not in options.part:
        parser.error("--plot draws the part accuracy; add it")
    fl.configure_cpu()
    about = machine("fedjax_lite", "jax", "optax")
    for package in ("dp-accounting", "jax-privacy"):
        about["versions"][package] = importlib.metadata.version(package)
    if not options.json:
        print(f"{about['device']}, {about['versions']}")
    found: dict[str, list[Row]] = {}
    for part in options.part:
        found[part] = list(PARTS[part](options.small))
        if not options.json:
            print(f"\n{part}\n{_table(found[part])}", flush=True)
    if options.json:
        print(json.dumps({**about, **_summary(found), "rows": _jsonable(found)}))
    if options.plot:
        _draw(options.plot, found["accuracy"])


def _summary(found: dict[str, list[Row]]) -> Row:
    """What is quoted of it."""
    summary: Row = {}
    for row in found.get("sigma", [])[:1]:
        summary |= {name: row[name] for name in ("sigma_pld", "sigma_rdp")}
    if "accuracy" in found:
        by_epsilon = {f"{row['epsilon']:g}": row["accuracy"] for row in found["accuracy"]}
        summary["accuracy_by_epsilon"] = by_epsilon
    for row in found.get("audit", [])[:1]:
        summary |= {name: row[name] for name in ("epsilon_claimed", "audit_lower_bound")}
    for row in found.get("overhead", []):
        if row["mechanism"] == "gaussian_noise":
            summary["overhead"] = row["cost"]
    return summary


def _jsonable(rows: Any) -> Any:
    """Rows with the word for infinity, for which JSON has no number."""
    if isinstance(rows, dict):
        return {name: _jsonable(x) for name, x in rows.items()}
    if isinstance(rows, list):
        return [_jsonable(x) for x in rows]
    return "inf" if rows == np.inf else rows


def _table(rows: list[Row]) -> str:
    told = [[x if isinstance(x, str) else f"{x:.4g}" for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(rows[0], *told, strict=True)]
    lines = [map(str.rjust, line, widths) for line in (rows[0], *told)]
    return "\n".join(map("  ".join, lines))


def _draw(file: str, rows: list[Row]) -> None:
    """Accuracy by epsilon, with that of no noise as a line across."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    noisy = [row for row in rows if np.isfinite(row["epsilon"])]
    epsilons, means, spreads = (
        [row[name] for row in noisy] for name in ("epsilon", "accuracy", "accuracy_std")
    )
    told = f"delta = {rows[0]['delta']:g}"
    axes.errorbar(epsilons, means, spreads, fmt="o-", capsize=3, label=told)
    axes.axhline(rows[0]["accuracy"], color="gray", linestyle=":", label="without noise")
    title = f"{rows[0]['clients']:,} clients of one digit each"
    axes.set(xscale="log", xlabel="epsilon", ylabel="accuracy", title=title)
    axes.legend(frameon=False)
    figure.savefig(file)
    plt.close(figure)


if __name__ == "__main__":
    main()
