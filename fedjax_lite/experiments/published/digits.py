"""All algorithms on all splits of the digits that come with scikit-learn: nothing is published."""

from typing import Any

from fedjax_lite.experiments.published.table import Cell, Measure, Table

# Strengths, and learning rates beside 0.1, are the best of a few, powers of about three apart, on
# 30 clients at Dirichlet 0.1 (benchmarks/algorithms.py), and for FedAdam on 50 at Dirichlet 0.3.
# Those of FedAvgM and FedSGD have not been searched for.
_ALGORITHMS: dict[str, dict[str, Any]] = {
    "FedAvg": {"algorithm": "fed_avg"},
    "FedAvg, uniform": {"algorithm": "fed_avg(weighting='uniform')"},
    "FedAvgM": {"algorithm": "fed_avg", "server_optimizer": "sgd(1.0, momentum=0.5)"},
    "FedAdam": {
        "algorithm": "fed_avg",
        "server_optimizer": "adam(0.03, b1=0.9, b2=0.99, eps=1e-3)",
    },
    "FedProx": {"algorithm": "fed_prox(mu=0.1)"},
    "FedProx, adaptive": {"algorithm": "ada_fed_prox"},
    "SCAFFOLD": {"algorithm": "scaffold"},
    "FedDyn": {"algorithm": "fed_dyn(alpha=0.1)"},
    "FedNova": {"algorithm": "fed_nova"},
    # Its steps are divided by their number, of about three batches in each of five epochs.
    "FedShuffle": {"algorithm": "fed_shuffle", "client_lr": 0.3},
    # With all local steps along one mean gradient, it is slower at rates that are good for others.
    "Mime": {"algorithm": "mime", "client_lr": 0.03},
    # Without momentum it would be FedAvg.
    "MimeLite": {"algorithm": "mime_lite", "client_optimizer": "sgd(0.01, momentum=0.9)"},
    "FedExP": {"algorithm": "fed_exp"},
    "FedSAM": {"algorithm": "fed_sam(rho=0.05)"},
    "q-FedAvg": {"algorithm": "q_fed_avg(q=1.0, lipschitz=0.3)"},
    "Agnostic FedAvg": {
        "algorithm": "agnostic_fed_avg(num_domains=50, domain_learning_rate=0.03, window_size=30)",
        "client_lr": 0.3,
    },
    "MOON": {"algorithm": "moon(mu=1.0)"},
    "FedNTD": {"algorithm": "fed_ntd"},
    "IFCA": {"algorithm": "ifca(num_clusters=2)"},
    "Per-FedAvg": {"algorithm": "per_fed_avg(alpha=0.1)", "fine_tune_steps": 1},
    "APFL": {"algorithm": "apfl"},
    "Ditto": {"algorithm": "ditto(mu=0.1)"},
    "pFedMe": {"algorithm": "p_fed_me(mu=1.0, learning_rate=0.1)"},
    "FedPer": {"algorithm": "fed_avg(personal='Dense_1/*')"},
    # All epochs but one for the head.
    "FedRep": {"algorithm": "fed_rep(personal='Dense_1/*', num_head_epochs=4)"},
    "FedSGD": {"algorithm": "fed_sgd", "server_optimizer": "sgd(0.3, momentum=0.9)"},
}
_SPLITS = {
    "IID": "iid",
    "Dirichlet 1.0": "dirichlet(alpha=1.0, min_examples=1)",
    "Dirichlet 0.3": "dirichlet(alpha=0.3, min_examples=1)",
    "Dirichlet 0.1": "dirichlet(alpha=0.1, min_examples=1)",
    "mixtures 0.3": "dirichlet_by_client(alpha=0.3)",
    "2 shards": "shards(shards_per_client=2)",
    "2 classes": "pathological(classes_per_client=2)",
    "sizes": "log_normal(sigma=1.0)",
}
_QUICK = ("FedAvg", "FedAdam", "SCAFFOLD", "Ditto"), ("IID", "Dirichlet 0.1")

DIGITS = Table(
    title="digits, 50 clients, 20 in a round",
    source="comes with scikit-learn",
    settings={
        "dataset": "digits",
        "num_clients": 50,
        "model": "mlp(hidden=(64,))",
        "cohort_size": 20,
        "rounds": 100,
        "eval_every": 100,
    },
    cells=tuple(
        Cell(
            algorithm,
            split,
            {"partition": partition, **settings},
            is_quick=algorithm in _QUICK[0] and split in _QUICK[1],
        )
        for algorithm, settings in _ALGORITHMS.items()
        for split, partition in _SPLITS.items()
    ),
    measure=Measure("personal_accuracy"),
    num_seeds=5,
    has_splits=True,
    num_quick_seeds=2,
)
