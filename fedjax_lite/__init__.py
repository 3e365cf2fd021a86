"""Federated-learning simulation as pure JAX functions: a round is one compiled step."""

from fedjax_lite import data, metrics, models, partition, samplers, stopping
from fedjax_lite.algorithms.apfl import apfl
from fedjax_lite.algorithms.fed_avg import fed_avg, fed_prox
from fedjax_lite.algorithms.fed_nova import fed_nova
from fedjax_lite.algorithms.fed_sgd import fed_sgd
from fedjax_lite.algorithms.scaffold import scaffold
from fedjax_lite.algorithms.server import federated_algorithm
from fedjax_lite.base import (
    ClientResult,
    ClientUpdate,
    FederatedAlgorithm,
    RoundInfo,
    ServerState,
    UpdateTransform,
)
from fedjax_lite.checkpoint import Checkpoints, load_state
from fedjax_lite.cohort import Cohort, cohort, cohort_of
from fedjax_lite.cpu import UnconfiguredCPUWarning, configure_cpu
from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.evaluate import ClientEvaluation, evaluate, evaluate_clients, summarize_clients
from fedjax_lite.fine_tune import evaluate_fine_tuned
from fedjax_lite.interrupts import InterruptedTraining
from fedjax_lite.ledger import NonFiniteWarning
from fedjax_lite.mesh import clients_mesh, replicate
from fedjax_lite.model import Model, function_model, linen_model, nnx_model
from fedjax_lite.records import Recorder
from fedjax_lite.stopping import History
from fedjax_lite.sweep import SweepResult, sweep
from fedjax_lite.train import TrainResult, train
from fedjax_lite.tune import TunedLanes, tune_lanes
from fedjax_lite.updates.clipping import clip_by_norm
from fedjax_lite.updates.pipeline import chain
from fedjax_lite.updates.quantization import quantize_uniform

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
