"""Ways to split a data set over clients: which rows each client gets."""

from fedjax_lite.partition.by_class import pathological as pathological
from fedjax_lite.partition.by_class import shards as shards
from fedjax_lite.partition.by_dirichlet import dirichlet as dirichlet
from fedjax_lite.partition.by_dirichlet import dirichlet_by_client as dirichlet_by_client
from fedjax_lite.partition.by_dirichlet import pachinko as pachinko
from fedjax_lite.partition.by_size import exponential as exponential
from fedjax_lite.partition.by_size import iid as iid
from fedjax_lite.partition.by_size import linear as linear
from fedjax_lite.partition.by_size import log_normal as log_normal
from fedjax_lite.partition.by_size import power_law as power_law
from fedjax_lite.partition.by_size import sizes as sizes
from fedjax_lite.partition.by_size import square as square
from fedjax_lite.partition.by_value import continuous as continuous
from fedjax_lite.partition.by_value import grouped as grouped
from fedjax_lite.partition.by_value import natural as natural
