"""Ways to split a data set over clients: which rows each client gets.

`noisy` changes them as well, and returns a data set.
"""

from fedjax_lite.data.partition.by_class import pathological, shards, similarity
from fedjax_lite.data.partition.by_dirichlet import dirichlet, dirichlet_by_client, pachinko
from fedjax_lite.data.partition.by_noise import noisy
from fedjax_lite.data.partition.by_size import (
    dirichlet_sizes,
    exponential,
    iid,
    linear,
    log_normal,
    power_law,
    sizes,
    square,
)
from fedjax_lite.data.partition.by_value import continuous, grouped, natural

__all__ = [
    "continuous",
    "dirichlet",
    "dirichlet_by_client",
    "dirichlet_sizes",
    "exponential",
    "grouped",
    "iid",
    "linear",
    "log_normal",
    "natural",
    "noisy",
    "pachinko",
    "pathological",
    "power_law",
    "shards",
    "similarity",
    "sizes",
    "square",
]


def __dir__() -> list[str]:
    return __all__
