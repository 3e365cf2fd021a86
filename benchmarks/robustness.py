"""What defences are worth against attacks, and what they cost where there is none.

    python -m benchmarks.robustness [--split iid|dirichlet ...] [--defence NAME ...] [--rounds N]
                                    [--decay 0 0.9 ...] [--json]

The digits, dealt to 25 clients of whom 5 are hostile; all take part in each round. The attacks of
one defence, from three seeds, with and without client momentum, are one program. Reported is the
accuracy on held-out images at the end, the mean over seeds, by attack; `none` has no hostile
clients, and `worst` is the least of the others.

The strengths are fixed, and known to no one beforehand: defences are told that a fifth of the
clients may be hostile, and bounds on norms are round numbers near the norm of a typical update.
"""

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_lite as fl
from benchmarks.timing import machine
from fedjax_lite.updates.mixing import side_by_side

SEEDS, NUM_CLIENTS, HOSTILE, SHARE, NUM_CLASSES = range(3), 25, range(5), 0.2, 10
SPLITS = {
    "iid": lambda y: fl.partition.iid(len(y), NUM_CLIENTS, seed=0),
    "dirichlet": lambda y: fl.partition.dirichlet(
        y, NUM_CLIENTS, alpha=0.3, min_examples=5, seed=0
    ),
}
DEFENCES: dict[str, Callable[[], fl.Reducer]] = {
    "mean": fl.weighted_mean,
    "median": fl.coordinate_median,
    "trimmed_mean": lambda: fl.trimmed_mean(SHARE),
    "mean_around_median": lambda: fl.mean_around_median(SHARE),
    "krum": lambda: fl.krum(SHARE),
    "multi_krum": lambda: fl.multi_krum(SHARE),
    "bulyan": lambda: fl.bulyan(SHARE),
    "geometric_median": fl.geometric_median,
    "centered_clipping": lambda: fl.centered_clipping(0.5),
    "bucketing_median": lambda: fl.bucketing(2, fl.coordinate_median()),
    "bucketing_krum": lambda: fl.bucketing(2, fl.krum(2 * SHARE)),
    "bucketing_geometric_median": lambda: fl.bucketing(2, fl.geometric_median()),
    "mixing_median": lambda: fl.nearest_neighbor_mixing(SHARE, fl.coordinate_median()),
    "mixing_trimmed_mean": lambda: fl.nearest_neighbor_mixing(SHARE, fl.trimmed_mean(SHARE)),
    "clipping_mixing_trimmed_mean": lambda: fl.adaptive_robust_clipping(
        SHARE, fl.nearest_neighbor_mixing(SHARE, fl.trimmed_mean(SHARE))
    ),
}
COLLUDING: dict[str, Callable[[fl.Reducer], fl.Reducer]] = {
    "sign_flip": functools.partial(fl.sign_flip, HOSTILE),
    "inner_product_0.5": functools.partial(fl.inner_product_manipulation, HOSTILE, factor=0.5),
    "inner_product_10": functools.partial(fl.inner_product_manipulation, HOSTILE, factor=10.0),
    "little_is_enough": functools.partial(fl.little_is_enough, HOSTILE, z=1.5),
    "mimic": functools.partial(fl.mimic, HOSTILE),
    "min_max": functools.partial(fl.min_max, HOSTILE),
}
ALONE: dict[str, fl.UpdateTransform] = {
    "scaled": fl.scaled_update(HOSTILE, -10.0),
    "gaussian": fl.gaussian_update(HOSTILE, 1.0),
}
ATTACKS = ["none", *COLLUDING, *ALONE, "label_flip"]


def attacked(defence: fl.Reducer, attack: jax.Array) -> fl.Reducer:
    """The defence behind one of the attacks that collude, or none of them."""
    # As if what a reducer is given were the aggregate.
    as_given = fl.Reducer(stacked=lambda stack: (stack.updates, {}))
    made = [attack(as_given).stacked for attack in COLLUDING.values()]
    reduce = side_by_side(defence)

    def stacked(stack: fl.Stack) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        place = jnp.where(attack <= len(made), attack, 0)
        branches = [lambda stacked=stacked: stacked(stack)[0] for stacked in made if stacked]
        updates = jax.lax.switch(place, [lambda: stack.updates, *branches])
        return reduce(stack._replace(updates=updates))[0], {}

    return fl.Reducer(stacked=stacked, keeps_last=defence.keeps_last)


def only_if(condition: jax.Array, transform: fl.UpdateTransform) -> fl.UpdateTransform:
    """A transform, or updates as they are."""

    def client(key: Any, state: Any, message: fl.Message, client: fl.Client) -> fl.Message:
        sent = transform.client(key, state, message, client)
        update = jax.tree.map(
            lambda new, old: jnp.where(condition, new, old), sent.update, message.update
        )
        return message._replace(update=update)

    return transform._replace(
        client=client, server=lambda key, state, received: (received, state, {})
    )


def build(defence: str, attack: jax.Array, decay: jax.Array) -> fl.FederatedAlgorithm:
    """FedAvg with a defence, under the attack of that number."""
    model = fl.models.mlp((64,), (32,), NUM_CLASSES)
    flips = attack == ATTACKS.index("label_flip")

    def loss(params: Any, model_state: Any, batch: fl.base.Batch, key: jax.Array) -> Any:
        y = jnp.where(flips, batch["flipped"], batch["y"])
        return model.loss(params, model_state, {**batch, "y": y}, key)

    alone = [only_if(attack == ATTACKS.index(name), one) for name, one in ALONE.items()]
    return fl.fed_avg(
        model._replace(loss=loss),
        optax.sgd(0.3),
        batch_size=16,
        pipeline=fl.chain(fl.client_momentum(decay), *alone),
        reducer=attacked(DEFENCES[defence](), attack),
    )


def load(split: str) -> tuple[fl.FederatedDataset, Mapping[str, np.ndarray]]:
    """The clients' images, with labels and those that hostile clients train on; held-out ones."""
    images = fl.data.digits_images()
    order = np.random.default_rng(0).permutation(len(images["y"]))
    test, train = np.split(order, [len(order) // 5])
    rows = [train[part] for part in SPLITS[split](images["y"][train])]
    dataset = fl.FederatedDataset.from_rows(images, rows)
    flipped = fl.data.flip_labels(dataset, HOSTILE, NUM_CLASSES).examples["y"]
    dataset = dataset.map(lambda features: {**features, "flipped": flipped})
    return dataset, {name: feature[test] for name, feature in images.items()}


def measure(split: str, defence: str, decays: list[float], num_rounds: int) -> list[dict[str, Any]]:
    """A row for each decay: the accuracy by attack."""
    dataset, held_out = load(split)
    model = fl.models.mlp((64,), (32,), NUM_CLASSES)
    runs = list(itertools.product(decays, range(len(ATTACKS)), SEEDS))
    decay, attack, seed = map(np.array, zip(*runs, strict=True))
    result = fl.sweep(
        functools.partial(build, defence),
        dataset.resident(),
        fl.samplers.everyone(NUM_CLIENTS),
        num_rounds,
        keys=jax.vmap(jax.random.key)(seed),
        numbers={"attack": attack, "decay": decay.astype(np.float32)},
    )
    evaluate = jax.jit(jax.vmap(lambda state: fl.evaluate(model, state, held_out)["accuracy"]))
    last = np.asarray(evaluate(result.states), float)
    accuracy = np.reshape(last, (len(decays), len(ATTACKS), len(SEEDS))).mean(-1).round(3)
    return [
        {
            **{"split": split, "decay": decay, "defence": defence},
            **dict(zip(ATTACKS, row.tolist(), strict=True)),
            "worst": row[1:].min().item(),
        }
        for decay, row in zip(decays, accuracy, strict=True)
    ]


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--split", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--defence", nargs="+", choices=DEFENCES, default=list(DEFENCES))
    parser.add_argument("--decay", nargs="+", type=float, default=[0.0, 0.9])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    options = parser.parse_args()
    fl.configure_cpu()
    if options.json:
        print(json.dumps(machine("fedjax_lite", "jax", "optax")), flush=True)
    else:
        print(f"{'':39}" + " ".join(f"{name[:13]:>13}" for name in (*ATTACKS, "worst")))
    for split, defence in itertools.product(options.split, options.defence):
        for row in measure(split, defence, options.decay, options.rounds):
            print(json.dumps(row) if options.json else _formatted(row), flush=True)


def _formatted(row: dict[str, Any]) -> str:
    numbers = " ".join(f"{row[name]:13.3f}" for name in (*ATTACKS, "worst"))
    return f"{row['split']:9} {row['decay']:3.1f} {row['defence'][:24]:24} {numbers}"


if __name__ == "__main__":
    main()
