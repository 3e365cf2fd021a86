"""One file per algorithm or close family, as pages of equations.

What they share: the options (`options`), local training (`local`) and the server's half of a
round (`server`).
"""

from fedjax_lite.algorithms.apfl import apfl
from fedjax_lite.algorithms.fed_avg import fed_avg, fed_prox
from fedjax_lite.algorithms.fed_nova import fed_nova
from fedjax_lite.algorithms.fed_sgd import fed_sgd
from fedjax_lite.algorithms.scaffold import scaffold
from fedjax_lite.algorithms.server import federated_algorithm

__all__ = [
    "apfl",
    "fed_avg",
    "fed_nova",
    "fed_prox",
    "fed_sgd",
    "federated_algorithm",
    "scaffold",
]
