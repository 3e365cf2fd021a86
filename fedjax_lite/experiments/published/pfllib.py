"""PFLlib's leaderboard, the column of Fashion-MNIST: models that clients have for themselves."""

from typing import Any

from fedjax_lite.experiments.published.table import Cell, Measure, Table

# The settings of a method, and the published accuracy.
_METHODS: dict[str, tuple[dict[str, Any], float | None]] = {
    "FedAvg": ({"algorithm": "fed_avg"}, 0.8585),
    "local": ({"algorithm": "fed_avg(personal='*')"}, None),
    "Per-FedAvg": (
        {"algorithm": "per_fed_avg(alpha=0.005, weighting='examples')", "fine_tune_steps": 1},
        0.9510,
    ),
    "pFedMe": (
        {"algorithm": "p_fed_me(mu=15.0, learning_rate=0.005)", "client_lr": 0.01},
        0.9725,
    ),
    "Ditto": ({"algorithm": "ditto(mu=0.1)"}, 0.9747),
    "APFL": ({"algorithm": "apfl"}, 0.9725),
    "FedPer": ({"algorithm": "fed_avg(personal='Dense_1/*')"}, 0.9744),
    "FedRep": (
        {
            "algorithm": "fed_rep(personal='Dense_1/*', num_head_epochs=1, weighting='examples')",
            "num_epochs": 2,
        },
        0.9756,
    ),
}
_QUICK = ("FedAvg", "local", "Ditto", "FedPer")

PFLLIB_FMNIST = Table(
    title="CNN of 582,026 parameters on Fashion-MNIST, 20 clients at Dirichlet 0.1, all in each"
    " round, E 1, B 10",
    source="PFLlib's leaderboard",
    settings={
        "dataset": "pfllib_fashion_mnist(DATA)",
        "model": "mnist_cnn(padding='VALID')",
        "sampler": "everyone",
        "batch_size": 10,
        "num_epochs": 1,
        "client_lr": 0.005,
        "rounds": 2000,
        "eval_every": 10,
    },
    cells=tuple(
        Cell(name, "Fashion-MNIST", settings, published=published, is_quick=name in _QUICK)
        for name, (settings, published) in _METHODS.items()
    ),
    measure=Measure("personal_accuracy", of="best"),
    quick={"rounds": 4, "eval_every": 2},
    needs="a folder with the four IDX files of Fashion-MNIST, which are in Debian's package"
    " dataset-fashion-mnist",
    differs="strengths of methods that the leaderboard does not tell are those of their papers or"
    " 0.1; the last batch of an epoch is short, theirs is left out; kernels start from Glorot's"
    " distribution, biases at zero",
)
