"""Published tables, each a value: what its cells run, and the numbers that were published."""

from collections.abc import Mapping

from fedjax_lite.experiments.published.bucketing import BUCKETING_MNIST
from fedjax_lite.experiments.published.byzfl import BYZFL_MNIST
from fedjax_lite.experiments.published.digits import DIGITS
from fedjax_lite.experiments.published.ifca import IFCA_ROTATED_MNIST
from fedjax_lite.experiments.published.mcmahan import MCMAHAN_2NN, MCMAHAN_CNN
from fedjax_lite.experiments.published.niid_bench import NIID_BENCH_FMNIST
from fedjax_lite.experiments.published.pfllib import PFLLIB_FMNIST
from fedjax_lite.experiments.published.table import Cell, Measure, Table

__all__ = ["TABLES", "Cell", "Measure", "Table"]

TABLES: Mapping[str, Table] = {
    "bucketing-mnist": BUCKETING_MNIST,
    "byzfl-mnist": BYZFL_MNIST,
    "digits": DIGITS,
    "ifca-rotated-mnist": IFCA_ROTATED_MNIST,
    "mcmahan-2nn": MCMAHAN_2NN,
    "mcmahan-cnn": MCMAHAN_CNN,
    "niid-bench-fmnist": NIID_BENCH_FMNIST,
    "pfllib-fmnist": PFLLIB_FMNIST,
}
