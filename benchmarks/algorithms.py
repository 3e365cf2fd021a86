"""What each algorithm is worth: rounds to a target, accuracy, its worst clients, and what it costs.

    python -m benchmarks.algorithms [--case NAME ...] [--algorithm NAME ...] [--rounds N]
        [--mnist FOLDER] [--json]

Each runs from three seeds, as one program. `rounds_to_target` is the median over seeds of the first
evaluation, made every fifth round, that reaches the target; none if half of them do not. `accuracy`
is that of the last evaluation over all held-out examples, `worst_decile` the mean accuracy of the
tenth of the clients for whom it is lowest, both means over seeds, of the models that clients use:
their own, where an algorithm gives them some, and for Per-FedAvg the server's after a step of one
batch. `cost` is the time of a round, interleaved, beside that of FedAvg; `bytes_per_round` is what
is sent both ways.

The learning rates and the strengths below are the best ones of a few for each case, powers of about
three apart.
"""

import argparse
import functools
import inspect
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import fedjax_lite as fl
from benchmarks.timing import interleaved, machine, rounds

SEEDS, EVAL_EVERY = range(3), 5
Build = Callable[..., fl.FederatedAlgorithm]


class Case(NamedTuple):
    """A problem.

    Attributes:
      load: The clients, to train and to evaluate on; it is given the folder of MNIST.
      model: The model.
      cohort_size: Clients in a round.
      num_rounds: Rounds.
      target: The accuracy that is waited for.
      rate: Learning rate of clients.
      options: Of local training.
      batches: How many an epoch of a client has, about: some algorithms divide by it what others
        call a rate.
      head: The last layer, of a model with more than one.
    """

    load: Callable[[str | None], tuple[fl.FederatedDataset, fl.FederatedDataset]]
    model: Callable[[], fl.Model]
    cohort_size: int
    num_rounds: int
    target: float
    rate: float
    options: dict[str, Any]
    batches: int = 10
    head: str | None = None


def _digits(folder: str | None) -> tuple[fl.FederatedDataset, fl.FederatedDataset]:
    """Each client's share of the digits, by a Dirichlet mixture of classes, a fifth held out."""
    del folder
    images = fl.data.digits_images()
    rows = fl.partition.dirichlet(images["y"], num_clients=30, alpha=0.1, min_examples=3, seed=0)
    dataset = fl.FederatedDataset.from_rows(images, rows)
    return dataset.split_examples(0.2, seed=0)


def _mnist(folder: str | None) -> tuple[fl.FederatedDataset, fl.FederatedDataset]:
    """Two shards of the training images sorted by class for each client, a tenth held out."""
    assert folder is not None
    images = fl.data.mnist(folder)
    rows = fl.partition.shards(images["y"], num_clients=100, shards_per_client=2, seed=0)
    return fl.FederatedDataset.from_rows(images, rows).split_examples(0.1, seed=0)


CASES = {
    "synthetic": Case(
        lambda folder: fl.data.synthetic(1.0, 1.0, num_clients=30, seed=0),
        lambda: fl.models.logistic((60,), 10),
        cohort_size=10,
        num_rounds=200,
        target=0.75,
        rate=0.03,
        options={"batch_size": 10, "num_epochs": 5},
    ),
    "digits": Case(
        _digits,
        lambda: fl.models.mlp((64,), (64,), 10),
        cohort_size=10,
        num_rounds=150,
        target=0.9,
        rate=0.1,
        options={"batch_size": 10, "num_epochs": 5},
        head="Dense_1/*",
    ),
    # The 2NN of McMahan et al. (2017), with their clients and local work.
    "mnist": Case(
        _mnist,
        lambda: fl.models.mlp((28, 28, 1), (200, 200), 10),
        cohort_size=10,
        num_rounds=200,
        target=0.95,
        rate=0.1,
        options={"batch_size": 10, "num_epochs": 1},
        batches=50,
        head="Dense_2/*",
    ),
}


def _with(factory: Callable[..., fl.FederatedAlgorithm], **options: Any) -> Build:
    """The algorithm as a function of a learning rate, and of the model and options of a case."""
    return lambda model, rate, **more: factory(model, optax.sgd(rate), **{**options, **more})


# The strengths of those that have one, and learning rates relative to that of the case.
ALGORITHMS: dict[str, Build] = {
    "fed_avg": _with(fl.fed_avg),
    "fed_avg_uniform": _with(fl.fed_avg, weighting="uniform"),
    "fed_adam": _with(fl.fed_avg, server_optimizer=optax.adam(0.01, eps=1e-3)),
    "fed_prox": _with(fl.fed_prox, mu=0.1),
    "ada_fed_prox": _with(fl.ada_fed_prox),
    "scaffold": _with(fl.scaffold),
    "fed_dyn": _with(fl.fed_dyn, alpha=0.1),
    "fed_nova": _with(fl.fed_nova),
    "fed_shuffle": lambda model, rate, batches, **more: fl.fed_shuffle(
        model, optax.sgd(batches * rate), **more
    ),
    # With all local steps along one mean gradient, it is slower at rates that are good for others.
    "mime": lambda model, rate, **more: fl.mime(model, optax.sgd(rate / 3), **more),
    # Without momentum it would be FedAvg; that of the server points one way for an epoch's batches.
    "mime_lite": lambda model, rate, batches, **more: fl.mime_lite(
        model, optax.sgd(rate / batches, momentum=0.9), **more
    ),
    "fed_exp": _with(fl.fed_exp),
    "fed_sam": _with(fl.fed_sam, rho=0.05),
    "q_fed_avg": lambda model, rate, **more: fl.q_fed_avg(
        model, optax.sgd(rate), q=1.0, lipschitz=0.03 / rate, **more
    ),
    "agnostic_fed_avg": lambda model, rate, batches, num_clients, **more: fl.agnostic_fed_avg(
        model,
        optax.sgd(batches * rate),
        num_domains=num_clients,
        domain_learning_rate=0.03,
        window_size=30,
        **more,
    ),
    "per_fed_avg": lambda model, rate, **more: fl.per_fed_avg(
        model, optax.sgd(rate), alpha=rate, **more
    ),
    "apfl": _with(fl.apfl),
    "ditto": _with(fl.ditto, mu=0.1),
    "p_fed_me": lambda model, rate, **more: fl.p_fed_me(
        model, optax.sgd(rate), mu=1.0, learning_rate=rate, **more
    ),
    "fed_per": lambda model, rate, head, **more: fl.fed_avg(
        model, optax.sgd(rate), personal=head, **more
    ),
    # All epochs but one for the head.
    "fed_rep": lambda model, rate, head, num_epochs, **more: fl.fed_rep(
        model,
        optax.sgd(rate),
        personal=head,
        num_epochs=max(num_epochs, 2),
        num_head_epochs=max(num_epochs, 2) - 1,
        **more,
    ),
    "moon": _with(fl.moon, mu=1.0),
    "fed_ntd": _with(fl.fed_ntd),
    "ifca": _with(fl.ifca, num_clusters=2),
}
_BY_LAYER = {"fed_per", "fed_rep", "moon"}  # Which need another than that of logistic regression.


def measure(case: Case, name: str, num_rounds: int, dataset: Any, held_out: Any) -> dict[str, Any]:
    """The row of an algorithm, but for its cost."""
    model = case.model()
    build = functools.partial(_build, case, name, model, dataset.num_clients)
    everyone = np.arange(dataset.num_clients)
    train, test = (fl.cohort_of(part.resident(), everyone) for part in (dataset, held_out))

    def evaluate(state: fl.ServerState) -> dict[str, jax.Array]:
        if name == "per_fed_avg":
            own_step = {"num_steps": 1, "batch_size": case.options["batch_size"]}
            _, found = fl.evaluate_fine_tuned(
                model, state, train, test, optax.sgd(case.rate), key=jax.random.key(0), **own_step
            )
        else:
            client_model = build().client_model
            found = fl.evaluate_clients(model, state, test, client_model=client_model)
        spread = fl.summarize_clients(found.clients["accuracy"], found.num_examples)
        return {
            "accuracy": found.pooled["accuracy"],
            "client_accuracy": spread["mean"],
            "worst_decile": spread["lowest_tenth"],
        }

    result = fl.sweep(
        build,
        dataset.resident(),
        fl.samplers.uniform(dataset.num_clients, case.cohort_size),
        num_rounds,
        keys=jax.vmap(jax.random.key)(np.array(SEEDS)),
        evaluate=evaluate,
        eval_every=EVAL_EVERY,
    )
    runs = [history.evaluations for history in result.histories]
    reached = [
        next((row["round"] for row in run if row["accuracy"] >= case.target), np.inf)
        for run in runs
    ]
    rounds_to_target = float(np.median(reached))
    sent = result.histories[0].rounds[-1]
    return {
        "rounds_to_target": None if np.isinf(rounds_to_target) else int(rounds_to_target),
        **{
            key: round(float(np.mean([run[-1][key] for run in runs])), 4)
            for key in ("accuracy", "client_accuracy", "worst_decile")
        },
        "bytes_per_round": sent["bytes_down"] + sent["bytes_up"],
    }


def _build(
    case: Case, name: str, model: fl.Model, num_clients: int, **options: Any
) -> fl.FederatedAlgorithm:
    known = {"num_clients": num_clients, "batches": case.batches, "head": case.head}
    taken = inspect.signature(ALGORITHMS[name]).parameters
    options |= {key: value for key, value in known.items() if key in taken}
    return ALGORITHMS[name](model, case.rate, **case.options, **options)


def costs(case: Case, names: list[str], dataset: Any) -> dict[str, float]:
    """Seconds of a round in those of FedAvg, in turn."""
    model, population = case.model(), dataset.resident()

    def round_of(name: str) -> Callable[[], Any]:
        algorithm = _build(case, name, model, dataset.num_clients)
        state = algorithm.init(jax.random.key(0), num_clients=dataset.num_clients)
        cohort = fl.cohort(jax.random.key(1), population, case.cohort_size)
        return rounds(algorithm, state, cohort)

    # A round of the digits takes two milliseconds, of which the fastest of a few tell little.
    timings = interleaved({name: round_of(name) for name in ("fed_avg", *names)}, repeats=41)
    return {name: round(timings[name].fastest / timings["fed_avg"].fastest, 2) for name in names}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, help="all that there are data of")
    parser.add_argument("--algorithm", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--rounds", type=int, help="in place of those of the case")
    parser.add_argument("--mnist", metavar="FOLDER", help="of MNIST's four IDX files")
    parser.add_argument("--json", action="store_true", help="print one JSON object per algorithm")
    options = parser.parse_args()
    cases = options.case or [name for name in CASES if name != "mnist" or options.mnist]
    if "mnist" in cases and not options.mnist:
        parser.error("--case mnist needs its files; pass --mnist FOLDER")
    fl.configure_cpu()
    if options.json:
        print(json.dumps(machine("fedjax_lite", "jax", "optax")), flush=True)
    for case_name in cases:
        case = CASES[case_name]
        dataset, held_out = case.load(options.mnist)
        names = [n for n in options.algorithm if case.head or n not in _BY_LAYER]
        cost = costs(case, names, dataset)
        if not options.json:
            print(
                f"\n{case_name}, to {case.target}\n{'':18} rounds  acc.  clients  worst  cost   kB"
            )
        for name in names:
            row = measure(case, name, options.rounds or case.num_rounds, dataset, held_out)
            row = {"case": case_name, "algorithm": name, **row, "cost": cost[name]}
            print(json.dumps(row) if options.json else _formatted(row), flush=True)


def _formatted(row: dict[str, Any]) -> str:
    return (
        f"{row['algorithm']:18} {row['rounds_to_target'] or '-':>6} {row['accuracy']:5.3f}"
        f"  {row['client_accuracy']:7.3f}  {row['worst_decile']:5.3f}  {row['cost']:4.2f}"
        f" {row['bytes_per_round'] / 1000:5.0f}"
    )


if __name__ == "__main__":
    main()
