"""The data of an experiment: who the clients are, and what is held out from them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_lite import _validate
from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.data.population import GeneratedPopulation, Population
from fedjax_lite.experiments import expressions
from fedjax_lite.experiments.expressions import Call, written
from fedjax_lite.experiments.settings import Calls, Settings, parsed
from fedjax_lite.experiments.tables import ROLES

_HELD_OUT = 0.2
_NUM_CLIENTS = 50
_DEALT = "dirichlet(alpha=0.3, min_examples=1)"
_NUM_EVALUATED = 1000  # Of data that are drawn.

Examples = Mapping[str, Any]


class Loaded(NamedTuple):
    """Data, and the settings with what they left open.

    Attributes:
      settings: With the numbers that belong to the data.
      calls: With `dataset`, `test` and `partition`.
      population: The clients to train.
      train: Their examples; `None` where they are drawn.
      held_out: Those held out from each; `None` where they are drawn.
      examples: All to evaluate on.
      num_classes: Number of classes, or of ids of sequences; 0 of real-valued targets.
    """

    settings: Settings
    calls: Calls
    population: Population
    train: FederatedDataset | None
    held_out: FederatedDataset | None
    examples: Examples
    num_classes: int


def load(
    settings: Settings, calls: Calls, datasets: tuple[FederatedDataset, ...] | None = None
) -> Loaded:
    """Reads, draws or takes the data, and deals and splits them as the settings say.

    Args:
      settings: The settings.
      calls: Their calls.
      datasets: What to train and to evaluate on, in place of the files that the settings name.

    Raises:
      ValueError: The data cannot be read, are none with classes or sequences, or have no use for
        a setting.
    """
    rng_deal, rng_split = np.random.default_rng(settings.data_seed).spawn(2)
    if datasets is None:
        calls = _with_numbers(settings, calls)
        data = _read("dataset", calls.dataset, settings)
    else:
        data = datasets
    if isinstance(data, tuple) and isinstance(data[0], GeneratedPopulation):
        _refuse(settings, calls, "partition", "test", "held_out")
        return _drawn(settings, calls, *data)
    train, test = _train_and_test(data)
    own = isinstance(calls.dataset, Call) and calls.dataset.takes("held_out")
    if test is not None and settings.held_out is not None and not own:
        raise ValueError(
            f"held_out is {settings.held_out}, and dataset has examples to test on; leave it out."
        )
    train, calls = _dealt(settings, calls, train, rng_deal)
    if calls.test is not None and datasets is None:
        test = _clients("test", _read("test", calls.test, settings))
    if test is not None and isinstance(calls.partition, Call) and calls.partition.takes("examples"):
        # What it does to the examples of clients, it does to those to test on.
        test, _ = _deal(settings, calls, test, calls.partition, rng_split)
    check_features("dataset", train)
    if test is None:
        fraction = _HELD_OUT if settings.held_out is None else settings.held_out
        settings = dataclasses.replace(settings, held_out=fraction)
        train, test = train.split_examples(fraction, seed=rng_split)
    check_features("test", test)
    if train.features["x"].shape != test.features["x"].shape:
        raise ValueError(
            f"test has examples x of shape {test.features['x'].shape} where dataset has"
            f" {train.features['x'].shape}; choose the other split of the same data set."
        )
    # A rare class may be in one of the two alone.
    num_classes = max(_num_classes(part.examples["y"]) for part in (train, test))
    for part in (train, test):
        _validate.labels(part.examples["y"], num_classes)
    settings = dataclasses.replace(settings, num_clients=None)
    return Loaded(settings, calls, train.resident(), train, test, test.examples, num_classes)


def _num_classes(y: Any) -> int:
    """Number of classes, from 0 to the highest; where an example has several, one for each bool."""
    if y.dtype.kind == "f":
        return 0
    return int(y.shape[-1]) if y.dtype.kind == "b" else 1 + int(y.max())


def read_examples(text: str) -> FederatedDataset:
    """The data set that an expression or a path says, with the features x and y.

    Raises:
      ValueError: It cannot be read, or is no data set with classes.
    """
    settings = Settings()
    found = _clients("dataset", _read("dataset", parsed("dataset", text), settings))
    check_features("dataset", found)
    return found


def _with_numbers(settings: Settings, calls: Calls) -> Calls:
    """The calls with the numbers of the settings that are for data."""
    dataset = calls.dataset
    if not isinstance(dataset, Call):
        return calls
    own: dict[str, float | None] = {
        "num_clients": None if calls.partition else settings.num_clients
    }
    if settings.test is None:
        own["held_out"] = settings.held_out
    for name, number in own.items():
        if number is not None and dataset.takes(name):
            dataset = dataset.with_arguments(**{name: number})
    algorithm = calls.algorithm
    batch_size = isinstance(algorithm, Call) and algorithm.arguments.get("batch_size")
    if batch_size and dataset.takes("batch_size") and "batch_size" not in dataset.arguments:
        dataset = dataset.with_arguments(batch_size=batch_size)
    return calls._replace(dataset=expressions.complete(dataset, ROLES["dataset"].known))


def _read(setting: str, value: Any, settings: Settings) -> Any:
    """What a setting says: a data set, a pair of them, a population, or examples of nobody."""
    if not isinstance(value, Call):
        return value
    data = expressions.build(ROLES[setting], value, {"seed": settings.data_seed})
    if value.arguments.get("columns") and isinstance(data, FederatedDataset):
        return _with_floats(data)
    return data


def _clients(setting: str, data: Any) -> FederatedDataset:
    """A data set; examples that belong to nobody are those of one client."""
    if isinstance(data, FederatedDataset):
        return data
    if isinstance(data, Mapping):
        return FederatedDataset.from_clients({0: data})
    raise ValueError(
        f"{setting} is a {type(data).__name__}; choose what is or returns a FederatedDataset, a"
        " pair of one to train and one to evaluate on, features by name, or a GeneratedPopulation"
        " and the function that draws examples."
    )


def _train_and_test(data: Any) -> tuple[Any, FederatedDataset | None]:
    if isinstance(data, tuple) and len(data) == 2:
        return data[0], _clients("dataset", data[1])
    return data, None


def _dealt(
    settings: Settings, calls: Calls, data: Any, rng: np.random.Generator
) -> tuple[FederatedDataset, Calls]:
    """The clients, dealt anew if the settings say so, or if there are none."""
    partition = calls.partition
    if partition is None and isinstance(data, Mapping):
        has_classes = np.asarray(data.get("y", 0)).dtype.kind != "f"
        partition = expressions.parse(ROLES["partition"], _DEALT if has_classes else "iid")
    dataset = _clients("dataset", data)
    if partition is None:
        taken = isinstance(calls.dataset, Call) and calls.dataset.takes("num_clients")
        if settings.num_clients is not None and not taken:
            raise ValueError(
                f"num_clients is {settings.num_clients}, and dataset has clients of its own; leave"
                " it out, or choose a partition that deals the examples anew."
            )
        return dataset, calls
    if isinstance(data, Mapping) and isinstance(partition, Call) and partition.name == "natural":
        raise ValueError(
            f"partition is {str(partition)!r}, and the examples of dataset belong to nobody; choose"
            " dirichlet(alpha=0.3), iid, shards or another way to deal them."
        )
    return _deal(settings, calls, dataset, partition, rng)


def _deal(
    settings: Settings,
    calls: Calls,
    dataset: FederatedDataset,
    partition: Any,
    rng: np.random.Generator,
) -> tuple[FederatedDataset, Calls]:
    """Deals all examples out to other clients."""
    check_features("dataset", dataset)
    labels = dataset.examples["y"]
    owners = np.repeat(np.arange(dataset.num_clients), dataset.num_examples)
    known: dict[str, Any] = {
        "examples": dataset.examples,
        "values": labels,
        "client_ids": owners,
        "num_examples": len(labels),
        "seed": rng,
    }
    if labels.ndim == 1:
        known["labels"] = labels
    if "coarse" in dataset.examples:
        known["coarse_labels"] = dataset.examples["coarse"]
    if isinstance(partition, Call):
        if partition.takes("num_clients") and "num_clients" not in partition.arguments:
            number = _NUM_CLIENTS if settings.num_clients is None else settings.num_clients
            partition = partition.with_arguments(num_clients=number)
        elif settings.num_clients is not None and not partition.takes("num_clients"):
            raise ValueError(
                f"num_clients is {settings.num_clients}, and {partition.name} takes none; leave it"
                " out."
            )
        partition = expressions.complete(partition, ROLES["partition"].known - {"num_clients"})
        calls = calls._replace(partition=partition)
        rows = expressions.build(ROLES["partition"], partition, known)
    else:
        rows = partition
    if isinstance(rows, FederatedDataset):  # A partition that changes the examples, too.
        return rows, calls
    return FederatedDataset.from_rows(dataset.examples, rows), calls


def _refuse(settings: Settings, calls: Calls, *names: str) -> None:
    for name in names:
        value = getattr(calls, name, None) or getattr(settings, name)
        if value is not None:
            raise ValueError(
                f"{name} is {written(value)}, and the examples of dataset are drawn when they are"
                " used; leave it out."
            )


def _drawn(
    settings: Settings,
    calls: Calls,
    population: GeneratedPopulation,
    draw: Callable[[jax.Array, int], Examples],
) -> Loaded:
    """Clients that draw their examples."""
    examples = draw(jax.random.key(settings.data_seed), _NUM_EVALUATED)
    num_classes = _num_classes(examples["y"])
    if isinstance(calls.dataset, Call):
        num_classes = calls.dataset.arguments.get("num_classes", num_classes)
    settings = dataclasses.replace(settings, num_clients=None)
    return Loaded(settings, calls, population, None, None, examples, num_classes)


def _with_floats(dataset: FederatedDataset) -> FederatedDataset:
    """Whole numbers that columns make up beside one class per example, as floats: no ids."""
    x, y = (dataset.features.get(name) for name in ("x", "y"))
    if x is None or y is None or x.dtype.kind not in "iu" or y.shape:
        return dataset
    return dataset.map(lambda features: {**features, "x": features["x"].astype(np.float32)})


def check_features(name: str, dataset: FederatedDataset) -> None:
    """Refuses data that are not images, or rows of numbers, with classes, or sequences of ids.

    In place of a class, an example may have a bool for each, or real numbers.
    """
    features = dataset.features
    if not {"x", "y"} <= set(features):
        raise ValueError(
            f"{name} has the features {', '.join(features)}; choose one with x and y, name them by"
            " read(..., columns={'x': ['a', 'b'], 'y': 'label'}) ('*' is all others), or convert it"
            " with `fedjax-lite data convert --preprocess`."
        )
    x, y = features["x"], features["y"]
    if y.dtype.kind == "b" and len(y.shape) == 1 and x.dtype.kind in "fiu":
        return
    if x.dtype.kind == y.dtype.kind == "f":
        return
    if y.dtype.kind not in "iu" or x.dtype.kind not in "fiu":
        raise ValueError(
            f"{name} has x of dtype {x.dtype} and y of dtype {y.dtype}; choose one with floating x,"
            " and integer or floating y, or with ids."
        )
    is_text = x.dtype.kind != "f" and len(x.shape) == 1 and x.shape == y.shape
    if x.dtype.kind != "f" and not is_text:
        raise ValueError(
            f"{name} has x of dtype {x.dtype} and shape {x.shape}, and y of shape {y.shape}; choose"
            " one with floating x, or with sequences of ids as x and y; named by columns, whole"
            " numbers beside a class become floats."
        )
    if (not is_text and y.shape) or dataset.examples["y"].min() < 0:
        raise ValueError(
            f"{name} has y of shape {dataset.examples['y'].shape}, from"
            f" {dataset.examples['y'].min()}; choose one with a class from 0 for each example."
        )
