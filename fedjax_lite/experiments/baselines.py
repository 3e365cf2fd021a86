"""Published baselines of the field, as settings of an experiment.

| source                | where                                                                   |
|-----------------------|-------------------------------------------------------------------------|
| FedJAX                | its notebook on EMNIST; `fed_avg.CIFAR100_LOGISTIC.flags`               |
| Flower, niid_bench    | its README, after Li et al. (2022), "Federated Learning on Non-IID Data |
|                       | Silos: An Experimental Study"                                           |
| Reddi et al. (2021)   | "Adaptive Federated Optimization", table 1 and the best rates of its    |
|                       | grids; for CIFAR-10 as in Flower's `adaptive_federated_optimization`,   |
|                       | for tags as in the authors' code, google-research/federated             |
| pfl-research          | configurations of its benchmarks, Granqvist et al. (2024)               |
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedjax_lite import data
from fedjax_lite.data import preprocess
from fedjax_lite.data.dataset import FederatedDataset

Loaded = tuple[FederatedDataset, FederatedDataset]

_FED_OPT = "Reddi et al. (2021), Flower"
_NIID_BENCH = "Flower, niid_bench"
_PFL = "pfl-research"
_SILOS = "cifar10_like(10, num_examples=5000)"
_SKEWED_SILOS = "cifar10_like(10, num_examples=5000, alpha=0.5)"
_NO_CROPS = "whole images, standardised one by one, instead of random crops, mirrored at random"


class Baseline(NamedTuple):
    """A published setting, and what came out.

    Attributes:
      task: What is learned.
      settings: Those of an experiment.
      dealt: Further ones for the real data, which say how they are dealt to clients.
      drawn: Further ones for data drawn in their shapes.
      load: `load(path, test) -> (train, test)` reads the real data.
      source: Who published it.
      accuracy: The published accuracy on the test data; `None` if there is none to compare with.
      differs: What differs from the source; empty if nothing is known to.
      personal: Whether it is the accuracy of models that clients have for themselves.
    """

    task: str
    settings: Mapping[str, Any]
    dealt: Mapping[str, Any]
    drawn: Mapping[str, Any]
    load: Callable[[Path, Path | None], Loaded]
    source: str
    accuracy: float | None
    differs: str = ""
    personal: bool = False


def settings_of(baseline: Baseline, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Settings of an experiment.

    Args:
      baseline: One of `BASELINES`.
      path: Where the real data are; without, data are drawn in their shapes.

    >>> settings_of(BASELINES["emnist-cnn"])["dataset"]
    'emnist_like'
    """
    if path is None:
        return {**baseline.settings, **baseline.drawn}
    where = os.fspath(path)
    return {**baseline.settings, **baseline.dealt, "dataset": where, "test": where}


def _either(read: Callable[..., FederatedDataset]) -> Callable[[Path, Path | None], Loaded]:
    """Reads both splits by a function of `fedjax_lite.data`, or from folders that were converted.

    A file of TensorFlow Federated has both splits.
    """

    def split(path: Path, name: str) -> FederatedDataset:
        return data.read(path) if _is_converted(path) else read(path, name)

    def load(path: Path, test: Path | None) -> Loaded:
        if test is None and _is_converted(path):
            raise ValueError(f"test is missing beside the folder {path}; pass that of the test.")
        return split(path, "train"), split(test or path, "test")

    return load


def _is_converted(path: Path) -> bool:
    return (path / "meta.json").exists()


def _cifar10(path: Path, test: Path | None) -> Loaded:
    """The two parts of CIFAR-10, each as one client, to be dealt."""
    if test is not None:
        raise ValueError(f"test is {test}; leave it out, the folder of CIFAR-10 has both parts.")
    train, held_out = (
        FederatedDataset.from_clients({0: preprocess.cifar(32)(part)})
        for part in data.cifar10(path)
    )
    return train, held_out


def _stackoverflow(writer: str, most: int) -> Callable[[Path, Path | None], Loaded]:
    """At most so many sentences of each client, and 10,000 to evaluate on."""

    def load(path: Path, test: Path | None) -> Loaded:
        if test is None or not _is_converted(path) or not _is_converted(test):
            raise ValueError(
                f"data is {path} and test {test}, which are not both folders of converted"
                f" sentences; write them by fedjax_lite.data.{writer}(..., destination=...), which"
                " says what to fetch."
            )
        train, held_out = data.read(path), data.read(test)
        begins, ends = train.offsets[:-1], train.offsets[1:]
        rows = [np.arange(i, min(i + most, j)) for i, j in zip(begins, ends, strict=True)]
        num_rows = int(held_out.offsets[-1])
        some = np.linspace(0, num_rows - 1, min(10_000, num_rows)).astype(int)
        return (
            FederatedDataset.from_rows(train.examples, rows, client_ids=train.client_ids),
            FederatedDataset.from_rows(held_out.examples, [some]),
        )

    return load


NIID_BENCH: Mapping[str, Any] = {
    "model": "lenet",
    "sampler": "everyone",
    "batch_size": 64,
    "num_epochs": 10,
    "client_optimizer": "chain(add_decayed_weights(1e-5), sgd(0.01, momentum=0.9))",
    "rounds": 50,
}
"""What all runs of NIID-Bench share."""


def _niid_bench() -> dict[str, Baseline]:
    """Ten silos, all in each round."""
    settings = {**NIID_BENCH, "eval_every": 1}
    algorithms = {
        "fed-avg": "fed_avg",
        "fed-prox": "fed_prox(mu=0.01)",
        "scaffold": "scaffold(weighting='examples')",
        "fed-nova": "fed_nova",
    }
    differs = {
        "scaffold": "; momentum sees the control variates, and clients estimate their gradients"
        " by the mean along their way, not by how far they came",
    }
    return {
        f"niid-{split.partition('(')[0]}-{name}": Baseline(
            task=f"CIFAR-10, 10 silos, {split}",
            settings={**settings, "algorithm": algorithms[name]},
            dealt={"partition": split, "num_clients": 10},
            drawn={"dataset": drawn},
            load=_cifar10,
            source=_NIID_BENCH,
            accuracy=accuracy,
            differs="images standardised one by one; theirs is the best round's accuracy"
            + differs.get(name, ""),
        )
        for split, drawn, name, accuracy in (
            ("iid", _SILOS, "fed-avg", 0.7132),
            ("iid", _SILOS, "fed-prox", 0.7126),
            ("iid", _SILOS, "scaffold", 0.7166),
            ("iid", _SILOS, "fed-nova", 0.7069),
            ("dirichlet(alpha=0.5)", _SKEWED_SILOS, "fed-avg", 0.6247),
            ("dirichlet(alpha=0.5)", _SKEWED_SILOS, "fed-prox", 0.6563),
            ("dirichlet(alpha=0.5)", _SKEWED_SILOS, "scaffold", 0.6808),
            ("dirichlet(alpha=0.5)", _SKEWED_SILOS, "fed-nova", 0.6389),
        )
    }


def _fed_opt() -> dict[str, Baseline]:
    """Five server optimizers, whose rates are the best of a grid in the paper."""
    settings = {
        "model": "resnet18",
        "batch_size": 20,
        "num_epochs": 1,
        "cohort_size": 10,
        "rounds": 4000,
        "eval_every": 100,
    }
    return {
        f"cifar10-{name}": Baseline(
            task="CIFAR-10, 500 clients, Dirichlet 0.1",
            settings={**settings, "client_lr": client_lr, "server_optimizer": server},
            dealt={"partition": "dirichlet_by_client(alpha=0.1)", "num_clients": 500},
            drawn={"dataset": "cifar10_like(alpha=0.1)"},
            load=_cifar10,
            source=_FED_OPT,
            accuracy=accuracy,
            differs=_NO_CROPS,
        )
        for name, client_lr, server, accuracy in (
            ("fed-avg", 10**-0.5, "sgd(1.0)", 0.728),
            ("fed-avgm", 10**-1.5, f"sgd({10**-0.5}, momentum=0.9)", 0.774),
            ("fed-adagrad", 10**-1.5, "fed_adagrad(0.1)", 0.731),
            ("fed-adam", 10**-1.5, "fed_adam(0.01)", 0.774),
            ("fed-yogi", 10**-1.5, "fed_yogi(0.01)", 0.780),
        )
    }


def _tags() -> dict[str, Baseline]:
    """Tags of Stack Overflow, with the best rates that the code of the paper tells."""
    settings = {
        "model": "stackoverflow_tags",
        # Theirs is 100 for a loss that is divided by 500 tags and adds up over a batch of 100.
        "client_lr": 20.0,
        "batch_size": 100,
        "num_epochs": 1,
        "cohort_size": 10,
        "metrics": "recall_at(5)",
        "rounds": 1500,
        "eval_every": 50,
    }
    return {
        f"stackoverflow-tags-{name}": Baseline(
            task="Stack Overflow, 500 tags",
            settings={**settings, "server_optimizer": server},
            dealt={},
            drawn={"dataset": "stackoverflow_tags_like"},
            load=_stackoverflow("stackoverflow_tags", 1000),
            source="Reddi et al. (2021)",
            accuracy=None,  # They tell the recall at 5.
            differs="the last batch of a client counts as much as a full one",
        )
        for name, server in (
            ("fed-avg", "sgd(1.0)"),
            ("fed-avgm", "sgd(1.0, momentum=0.9)"),
            ("fed-adagrad", "fed_adagrad(10.0, tau=0.01)"),
            ("fed-adam", f"fed_adam({10**-0.5}, tau=1e-5)"),
            ("fed-yogi", f"fed_yogi({10**-0.5}, tau=1e-5)"),
        )
    }


def _emnist() -> dict[str, Baseline]:
    """EMNIST with the clients of its files."""
    cnn = {
        "model": "emnist_cnn",
        "client_lr": 0.1,
        "batch_size": 10,
        "num_epochs": 1,
        "cohort_size": 10,
        "rounds": 1000,
        "eval_every": 50,
    }
    common: dict[str, Any] = {
        "task": "EMNIST, 62 characters",
        "dealt": {},
        "drawn": {"dataset": "emnist_like"},
        "load": _either(data.emnist),
    }
    notebook = "FedJAX, notebook"
    return {
        "emnist-cnn": Baseline(settings=cnn, source=notebook, accuracy=0.8462, **common),
        "emnist-cnn-fine-tuned": Baseline(
            settings={**cnn, "fine_tune_epochs": 1},
            source=notebook,
            accuracy=0.8786,
            differs="one epoch of fine-tuning at the rate of training, which is a guess",
            personal=True,
            **common,
        ),
        "emnist-cnn-8-bit": Baseline(
            settings={
                **cnn,
                "client_lr": 0.16,
                "server_optimizer": "sgd(exponential_decay(1.0, 500, 0.5, staircase=True))",
                "updates": "quantize_uniform(256)",
                "rounds": 1500,
            },
            source=notebook,
            accuracy=0.8554,
            **common,
        ),
        "emnist-dense-apfl": Baseline(
            settings={
                "model": "emnist_dense",
                "algorithm": "apfl(alpha=0.5, layerwise=True)",
                "client_lr": 0.001,
                "server_optimizer": "adam(1.0, b1=0.9, b2=0.99, eps=0.01)",
                "batch_size": 20,
                "num_epochs": 1,
                "cohort_size": 340,
                "rounds": 500,
                "eval_every": 10,
            },
            source="FedJAX, README and flags",
            accuracy=0.9585,
            differs="the gradient of a client's own params is that of its loss; theirs lacks the"
            " factor of their share",
            personal=True,
            **common,
        ),
    }


BASELINES = {
    **_emnist(),
    "cifar100-logistic": Baseline(
        task="CIFAR-100, Pachinko split",
        settings={
            "model": "logistic",
            "client_lr": 0.01,
            "server_optimizer": "yogi(0.1, b1=0.9, b2=0.999, eps=0.01)",
            "batch_size": 20,
            "num_epochs": 1,
            "cohort_size": 10,
            "rounds": 4000,
            "eval_every": 100,
        },
        dealt={},
        drawn={"dataset": "cifar100_like(crop=24)"},
        load=_either(data.cifar100),
        source="FedJAX, flags",
        accuracy=0.1149,
        differs="the middle of each image instead of random crops, mirrored at random",
    ),
    **_niid_bench(),
    **_fed_opt(),
    **_tags(),
    "cifar10-speed": Baseline(
        task="CIFAR-10, 1000 clients with 50 images",
        settings={
            "model": "cifar_cnn",
            "client_lr": 0.1,
            "algorithm": "fed_avg(weighting='uniform')",
            "batch_size": 10,
            "num_epochs": 1,
            "cohort_size": 50,
            "rounds": 1500,
            "eval_every": 100,
        },
        dealt={"partition": "iid", "num_clients": 1000},
        drawn={"dataset": "cifar10_like(1000, num_examples=50)"},
        load=_cifar10,
        source=_PFL,
        accuracy=None,  # Theirs reads the pixels of an image in another order.
    ),
    "stackoverflow-transformer": Baseline(
        task="Stack Overflow, next word",
        settings={
            "model": "stackoverflow_transformer",
            "client_lr": 0.3,
            "server_optimizer": "adam(0.1, b1=0.9, b2=0.99, eps=0.01)",
            "algorithm": "fed_avg(weighting='uniform')",
            "batch_size": 16,
            "num_epochs": 1,
            "cohort_size": 400,
            "rounds": 2000,
            "eval_every": 100,
        },
        dealt={},
        drawn={"dataset": "stackoverflow_like"},
        load=_stackoverflow("stackoverflow", 64),
        source=_PFL,
        accuracy=None,
        differs="no warm-up of the server's learning rate over 50 rounds",
    ),
    "shakespeare-lstm": Baseline(
        task="Shakespeare, next character",
        settings={
            "model": "shakespeare_lstm",
            "client_lr": 1.0,
            "batch_size": 4,
            "num_epochs": 1,
            "cohort_size": 10,
            "rounds": 1200,
            "eval_every": 50,
        },
        dealt={},
        drawn={"dataset": "shakespeare_like"},
        load=_either(data.shakespeare),
        source="Reddi et al. (2021)",
        accuracy=0.569,
        differs="accuracy is averaged within each sequence, and then over sequences",
    ),
}
