"""What the settings of a run choose from: the functions of the Python API, by their own names."""

import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import optax

from fedjax_lite import algorithms, data, models, privacy, samplers, updates
from fedjax_lite.algorithms import server_optimizers
from fedjax_lite.base import FederatedAlgorithm, Reducer, UpdateTransform
from fedjax_lite.data import partition
from fedjax_lite.evaluation import metrics
from fedjax_lite.experiments.expressions import Role, Table
from fedjax_lite.models.frozen import frozen, lora
from fedjax_lite.models.sharpness import sharpness_aware
from fedjax_lite.samplers import durations


def _functions(module: ModuleType, *left_out: str) -> dict[str, Callable[..., Any]]:
    names = [name for name in module.__all__ if name not in left_out]
    found = {name: getattr(module, name) for name in names}
    return {name: value for name, value in found.items() if inspect.isfunction(value)}


def _returning(kind: type, module: ModuleType, *left_out: str) -> dict[str, Callable[..., Any]]:
    return {
        name: function
        for name, function in _functions(module, *left_out).items()
        if inspect.signature(function).return_annotation is kind
    }


def _of_optax(kinds: tuple[str, ...], left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """The functions of optax that return one of these types, by their annotations."""
    found = {}
    for name, function in inspect.getmembers(optax, inspect.isfunction):
        result = inspect.signature(function).return_annotation
        of_kind = getattr(result, "__name__", str(result)) in kinds
        if of_kind and name not in left_out and not name.startswith("_"):
            found[name] = function
    return found


# What takes functions, which an expression cannot write.
_TAKES_FUNCTIONS = ("inject_hyperparams", "inject_stateful_hyperparams")
SCHEDULES = {
    name: function
    for name, function in _of_optax(("Callable", "Schedule"), _TAKES_FUNCTIONS).items()
    if function.__module__.startswith("optax.schedules")
}
OPTIMIZERS = {
    **_of_optax(("GradientTransformation", "GradientTransformationExtraArgs")),
    **_functions(server_optimizers),
}
_DATASETS = {
    "digits": data.digits_images,
    **{
        name: getattr(data, name)
        for name in (
            *("synthetic", "gaussian_images", "noisy_successors"),
            *("emnist_like", "cifar10_like", "cifar100_like"),
            *("shakespeare_like", "stackoverflow_like", "stackoverflow_tags_like"),
            *("read", "mnist", "fashion_mnist", "emnist_idx", "emnist_matlab"),
            *("rotated_mnist", "long_tailed_mnist", "pfllib_fashion_mnist"),
            *("emnist", "cifar100", "shakespeare", "stackoverflow"),
        )
    },
}


def _role(setting: str, table: Table, plural: str, *known: str) -> Role:
    return Role(setting, table, plural, frozenset(known))


_MODELS: Table = {
    **_functions(models),
    "frozen": frozen,
    "lora": lora,
    "sharpness_aware": sharpness_aware,
}
_SAMPLERS = _functions(samplers)
_KNOWN_TO_SAMPLERS = ("num_clients", "num_examples", "num_rounds", "algorithm")
_OPTIMIZERS_AND_SCHEDULES = {**OPTIMIZERS, **SCHEDULES}
ROLES: Mapping[str, Role] = {
    role.setting: role
    for role in (
        _role("dataset", _DATASETS, "datasets", "seed"),
        _role("test", _DATASETS, "datasets", "seed"),
        _role(
            "partition",
            _functions(partition),
            "partitions",
            *("examples", "labels", "coarse_labels", "values", "client_ids", "num_examples"),
            "seed",
            "num_clients",
        ),
        _role("model", _MODELS, "models", "input_shape", "num_classes", "target_shape"),
        _role(
            "algorithm",
            _returning(FederatedAlgorithm, algorithms, "federated_algorithm"),
            "algorithms",
            *("model", "client_optimizer", "server_optimizer", "pipeline", "reducer"),
            *("lanes", "mesh", "max_staleness"),
        ),
        _role("client_optimizer", _OPTIMIZERS_AND_SCHEDULES, "optimizers"),
        _role("server_optimizer", _OPTIMIZERS_AND_SCHEDULES, "optimizers"),
        _role("updates", _returning(UpdateTransform, updates, "chain"), "updates"),
        _role("reducer", _returning(Reducer, updates), "reducers"),
        _role(
            "sampler",
            {**_SAMPLERS, **_functions(durations)},
            "samplers",
            *_KNOWN_TO_SAMPLERS,
        ),
        _role("privacy", {"budget": privacy.budget}, "budgets"),
        _role("metrics", _functions(metrics, "mean"), "metrics", "num_classes"),
    )
}
LISTED: Mapping[str, Role] = {
    **{role.plural: role for role in ROLES.values()},
    "samplers": _role("sampler", _SAMPLERS, "samplers", *_KNOWN_TO_SAMPLERS),
    "durations": _role("sampler", _functions(durations), "durations", *_KNOWN_TO_SAMPLERS),
    "optimizers": _role("client_optimizer", OPTIMIZERS, "optimizers"),
    "schedules": _role("client_optimizer", SCHEDULES, "schedules"),
}
