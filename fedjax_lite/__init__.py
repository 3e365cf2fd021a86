"""Federated-learning simulation as pure JAX functions: a round is one compiled step."""

from typing import TYPE_CHECKING, Any

from fedjax_lite import algorithms, data, models, privacy, samplers, updates
from fedjax_lite.algorithms import *  # noqa: F403
from fedjax_lite.algorithms import server_optimizers
from fedjax_lite.base import (
    Client,
    ClientResult,
    ClientUpdate,
    Cohort,
    FederatedAlgorithm,
    Guarantees,
    Message,
    Received,
    Reducer,
    RoundInfo,
    ServerState,
    Stack,
    UpdateTransform,
)
from fedjax_lite.data import FederatedDataset, partition
from fedjax_lite.engine import (
    FileStore,
    TunedLanes,
    cohort,
    cohort_of,
    prefetch,
    store_in_file,
    tune_lanes,
)
from fedjax_lite.evaluation import (
    ClientEvaluation,
    evaluate,
    evaluate_clients,
    evaluate_fine_tuned,
    metrics,
    summarize_clients,
)
from fedjax_lite.models.dp_sgd import dp_sgd
from fedjax_lite.models.frozen import frozen, lora
from fedjax_lite.models.linen import linen_model
from fedjax_lite.models.model import Model, function_model
from fedjax_lite.models.nnx import nnx_model
from fedjax_lite.models.sharpness import sharpness_aware
from fedjax_lite.runs import (
    Checkpoints,
    History,
    InterruptedTraining,
    NonFiniteWarning,
    Recorder,
    SweepResult,
    TrainResult,
    load_state,
    plot,
    read_runs,
    stopping,
    sweep,
    train,
)
from fedjax_lite.samplers import durations
from fedjax_lite.updates import *  # noqa: F403
from fedjax_lite.xla import UnconfiguredCPUWarning, clients_mesh, configure_cpu, replicate

if TYPE_CHECKING:
    from fedjax_lite.experiments import Experiment, experiment

__all__ = [
    "Checkpoints",
    "Client",
    "ClientEvaluation",
    "ClientResult",
    "ClientUpdate",
    "Cohort",
    "Experiment",
    "FederatedAlgorithm",
    "FederatedDataset",
    "FileStore",
    "Guarantees",
    "History",
    "InterruptedTraining",
    "Message",
    "Model",
    "NonFiniteWarning",
    "Received",
    "Recorder",
    "Reducer",
    "RoundInfo",
    "ServerState",
    "Stack",
    "SweepResult",
    "TrainResult",
    "TunedLanes",
    "UnconfiguredCPUWarning",
    "UpdateTransform",
    "clients_mesh",
    "cohort",
    "cohort_of",
    "configure_cpu",
    "data",
    "dp_sgd",
    "durations",
    "evaluate",
    "evaluate_clients",
    "evaluate_fine_tuned",
    "experiment",
    "frozen",
    "function_model",
    "linen_model",
    "load_state",
    "lora",
    "metrics",
    "models",
    "nnx_model",
    "partition",
    "plot",
    "prefetch",
    "privacy",
    "read_runs",
    "replicate",
    "samplers",
    "server_optimizers",
    "sharpness_aware",
    "stopping",
    "store_in_file",
    "summarize_clients",
    "sweep",
    "train",
    "tune_lanes",
]
# What is exported there is public.
__all__ += algorithms.__all__
__all__ += updates.__all__

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Their tables of all there is to choose from would make each import a tenth slower.
    if name in ("Experiment", "experiment"):
        from fedjax_lite import experiments

        return getattr(experiments, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
