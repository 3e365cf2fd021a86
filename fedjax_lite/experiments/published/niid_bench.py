"""Li et al. (2022), table III: four algorithms on ten silos of Fashion-MNIST, split in seven ways.

The published numbers are not here: only such are as were read at their source.
"""

from fedjax_lite.experiments.baselines import NIID_BENCH
from fedjax_lite.experiments.published.table import Cell, Measure, Table

_ALGORITHMS = {
    "FedAvg": "fed_avg",
    "FedProx": "fed_prox(mu=0.01)",
    "SCAFFOLD": "scaffold(weighting='examples')",
    "FedNova": "fed_nova",
}
_SPLITS = {
    "Dirichlet 0.5": "dirichlet(alpha=0.5)",
    "1 class": "pathological(classes_per_client=1)",
    "2 classes": "pathological(classes_per_client=2)",
    "3 classes": "pathological(classes_per_client=3)",
    "noise 0.1": "noisy(variance=0.1)",
    "sizes 0.5": "dirichlet_sizes(alpha=0.5, min_examples=10)",
    "IID": "iid",
}
_QUICK = ("Dirichlet 0.5", "2 classes")

NIID_BENCH_FMNIST = Table(
    title="LeNet of 44,426 parameters on Fashion-MNIST, 10 silos, all in each round, E 10, B 64",
    source="Li et al. (2022), Federated Learning on Non-IID Data Silos, table III",
    settings={
        **NIID_BENCH,
        "dataset": "fashion_mnist(DATA, 'both')",
        "num_clients": 10,
        "eval_every": 10,
    },
    cells=tuple(
        Cell(
            algorithm, split, {"algorithm": call, "partition": partition}, is_quick=split in _QUICK
        )
        for algorithm, call in _ALGORITHMS.items()
        for split, partition in _SPLITS.items()
    ),
    measure=Measure(),
    num_seeds=3,
    has_splits=True,
    quick={"rounds": 10, "num_epochs": 1},
    needs="a folder with the four IDX files of Fashion-MNIST, which are in Debian's package"
    " dataset-fashion-mnist",
    differs="the mu of FedProx is 0.01 in all cells; in SCAFFOLD, momentum sees the control"
    " variates, and clients estimate their gradients by the mean along their way, not by how far"
    " they came; noise is drawn once, and an example to test on has the noise of one silo, theirs"
    " that of each in turn",
)
