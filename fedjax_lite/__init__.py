"""Federated-learning simulation as pure JAX functions: a round is one compiled step."""

from fedjax_lite import data, models, samplers
from fedjax_lite.algorithms import (
    apfl,
    fed_avg,
    fed_nova,
    fed_prox,
    fed_sgd,
    federated_algorithm,
    scaffold,
)
from fedjax_lite.base import (
    ClientResult,
    ClientUpdate,
    Cohort,
    FederatedAlgorithm,
    RoundInfo,
    ServerState,
    UpdateTransform,
)
from fedjax_lite.data import FederatedDataset, partition
from fedjax_lite.engine import TunedLanes, cohort, cohort_of, prefetch, tune_lanes
from fedjax_lite.evaluation import (
    ClientEvaluation,
    evaluate,
    evaluate_clients,
    evaluate_fine_tuned,
    metrics,
    summarize_clients,
)
from fedjax_lite.models.linen import linen_model
from fedjax_lite.models.model import Model, function_model
from fedjax_lite.models.nnx import nnx_model
from fedjax_lite.runs import (
    Checkpoints,
    History,
    InterruptedTraining,
    NonFiniteWarning,
    Recorder,
    SweepResult,
    TrainResult,
    load_state,
    stopping,
    sweep,
    train,
)
from fedjax_lite.updates import chain, clip_by_norm, quantize_uniform
from fedjax_lite.xla import UnconfiguredCPUWarning, clients_mesh, configure_cpu, replicate

__all__ = [
    "Checkpoints",
    "ClientEvaluation",
    "ClientResult",
    "ClientUpdate",
    "Cohort",
    "FederatedAlgorithm",
    "FederatedDataset",
    "History",
    "InterruptedTraining",
    "Model",
    "NonFiniteWarning",
    "Recorder",
    "RoundInfo",
    "ServerState",
    "SweepResult",
    "TrainResult",
    "TunedLanes",
    "UnconfiguredCPUWarning",
    "UpdateTransform",
    "apfl",
    "chain",
    "clients_mesh",
    "clip_by_norm",
    "cohort",
    "cohort_of",
    "configure_cpu",
    "data",
    "evaluate",
    "evaluate_clients",
    "evaluate_fine_tuned",
    "fed_avg",
    "fed_nova",
    "fed_prox",
    "fed_sgd",
    "federated_algorithm",
    "function_model",
    "linen_model",
    "load_state",
    "metrics",
    "models",
    "nnx_model",
    "partition",
    "prefetch",
    "quantize_uniform",
    "replicate",
    "samplers",
    "scaffold",
    "stopping",
    "summarize_clients",
    "sweep",
    "train",
    "tune_lanes",
]

__version__ = "0.1.0"


def __dir__() -> list[str]:
    return __all__
