"""One file per algorithm or close family, as pages of equations.

What they share: the options (`options`), local training (`training`, of the pieces in `local`)
and the server's half of a round (`server`).
"""

from fedjax_lite.algorithms.ada_fed_prox import ada_fed_prox
from fedjax_lite.algorithms.agnostic_fed_avg import agnostic_fed_avg
from fedjax_lite.algorithms.apfl import apfl
from fedjax_lite.algorithms.ditto import ditto
from fedjax_lite.algorithms.fed_avg import fed_avg, fed_prox
from fedjax_lite.algorithms.fed_dyn import fed_dyn
from fedjax_lite.algorithms.fed_ex_lora import fed_ex_lora
from fedjax_lite.algorithms.fed_exp import fed_exp
from fedjax_lite.algorithms.fed_nova import fed_nova
from fedjax_lite.algorithms.fed_ntd import fed_ntd
from fedjax_lite.algorithms.fed_rep import fed_rep
from fedjax_lite.algorithms.fed_sam import fed_sam
from fedjax_lite.algorithms.fed_sgd import fed_sgd
from fedjax_lite.algorithms.fed_shuffle import fed_shuffle
from fedjax_lite.algorithms.gaussian_mixture import gaussian_mixture
from fedjax_lite.algorithms.ifca import ifca
from fedjax_lite.algorithms.k_means import k_means
from fedjax_lite.algorithms.local import LocalState
from fedjax_lite.algorithms.mime import mime, mime_lite
from fedjax_lite.algorithms.moon import moon
from fedjax_lite.algorithms.p_fed_me import p_fed_me
from fedjax_lite.algorithms.per_fed_avg import per_fed_avg
from fedjax_lite.algorithms.q_fed_avg import q_fed_avg
from fedjax_lite.algorithms.scaffold import scaffold
from fedjax_lite.algorithms.server import federated_algorithm
from fedjax_lite.algorithms.training import local_training

__all__ = [
    "LocalState",
    "ada_fed_prox",
    "agnostic_fed_avg",
    "apfl",
    "ditto",
    "fed_avg",
    "fed_dyn",
    "fed_ex_lora",
    "fed_exp",
    "fed_nova",
    "fed_ntd",
    "fed_prox",
    "fed_rep",
    "fed_sam",
    "fed_sgd",
    "fed_shuffle",
    "federated_algorithm",
    "gaussian_mixture",
    "ifca",
    "k_means",
    "local_training",
    "mime",
    "mime_lite",
    "moon",
    "p_fed_me",
    "per_fed_avg",
    "q_fed_avg",
    "scaffold",
]
