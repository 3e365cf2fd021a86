"""`fedjax-lite data`: what a data set on disk holds, and its conversion."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rich.console
import rich.table
from tyro.conf import subcommand

from fedjax_lite.cli.brief import told_briefly
from fedjax_lite.cli.convert import Convert, convert
from fedjax_lite.cli.errors import UsageError
from fedjax_lite.cli.source import Source, load
from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.runs.plot.classes import (
    class_distribution,
    class_indices,
    count_classes,
    counts_of,
)
from fedjax_lite.runs.plot.style import save

_QUANTILES = {"min": 0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1}


@told_briefly
@dataclasses.dataclass(frozen=True)
class Describe(Source):
    """Tell the clients, their sizes, the features and the label skew of a data set.

    Attributes:
      label: The feature that holds the classes; y by default, if there is one.
      json: Print one JSON object, and nothing else, on stdout.
    """

    label: str | None = None
    json: bool = False


@dataclasses.dataclass(frozen=True)
class Plot(Source):
    """Draw which classes the clients of a data set have.

    Attributes:
      out: The picture: a .png, .pdf or .svg file. It is replaced.
      label: The feature that holds the classes.
    """

    out: Path
    label: str = "y"


@dataclasses.dataclass(frozen=True)
class Data:
    """Look at a federated data set on disk, or convert it."""

    command: (
        Annotated[Convert, subcommand("convert", prefix_name=False)]
        | Annotated[Describe, subcommand("describe", prefix_name=False)]
        | Annotated[Plot, subcommand("plot", prefix_name=False)]
    )


def data(options: Data) -> None:
    """Runs the command.

    Raises:
      UsageError: The data set cannot be read, or what was asked for cannot be written.
      InterruptedRunError: Ctrl-C was pressed during a conversion.
    """
    match options.command:
        case Convert():
            convert(options.command)
        case Describe():
            _describe(options.command)
        case Plot():
            _plot(options.command)


@contextlib.contextmanager
def _label_errors() -> Iterator[None]:
    """Errors of the label as those of the option."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def _plot(options: Plot) -> None:
    dataset = load(options)
    with _label_errors():
        classes, counts = count_classes(dataset, options.label)
    title = f"{options.source.stem}: {dataset.num_clients:,} clients, {counts.sum():,} examples"
    try:
        axes = class_distribution(
            counts, classes, dataset.client_ids, label=options.label, title=title
        )
        save(axes, options.out)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--out {options.out} cannot be written: {reason}") from None


def _describe(options: Describe) -> None:
    report = _report(load(options), options)
    if options.json:
        print(json.dumps(report))
        return
    table = rich.table.Table(title=options.source.name, show_header=False)
    table.add_row("clients", f"{report['clients']:,}")
    table.add_row("without examples", f"{report['empty_clients']:,}")
    table.add_row("examples", f"{report['examples']:,}")
    table.add_row("examples per client", _line(report["examples_per_client"]))
    for name, feature in report["features"].items():
        shape = " x ".join(map(str, feature["shape"])) or "scalar"
        table.add_row(f"feature {name}", f"{shape}, {feature['dtype']}")
    if labels := report["labels"]:
        table.add_row("classes", f"{labels['classes']:,} of {labels['feature']}")
        table.add_row("classes per client", _line(labels["classes_per_client"]))
        table.add_row("label skew", f"{labels['skew']:.3f}, {labels['skew_if_iid']:.3f} if IID")
    rich.console.Console(markup=False).print(table)  # Names may hold brackets.


def _line(quantiles: dict[str, float]) -> str:
    texts = {name: f"{value:,.1f}".removesuffix(".0") for name, value in quantiles.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def _report(dataset: FederatedDataset, options: Describe) -> dict[str, Any]:
    """What there is to tell, in types that JSON has."""
    sizes = dataset.num_examples
    return {
        "path": str(options.source),
        "clients": dataset.num_clients,
        "empty_clients": int((sizes == 0).sum()),
        "examples": int(sizes.sum()),
        "examples_per_client": {"mean": float(sizes.mean()), **_quantiles(sizes)},
        "features": {
            name: {"shape": list(feature.shape[1:]), "dtype": feature.dtype.name}
            for name, feature in dataset.examples.items()
        },
        "labels": _labels(dataset, options.label),
    }


def _labels(dataset: FederatedDataset, label: str | None) -> dict[str, Any] | None:
    try:
        with _label_errors():
            classes, index = class_indices(dataset, label or "y")
    except UsageError:
        if label is None:  # Nobody said that there are classes.
            return None
        raise
    counts = counts_of(dataset, index, len(classes))
    shuffled = np.random.default_rng(0).permutation(index)
    return {
        "feature": label or "y",
        "classes": len(classes),
        "classes_per_client": _quantiles((counts > 0).sum(1)),
        "skew": _skew(counts),
        "skew_if_iid": _skew(counts_of(dataset, shuffled, len(classes))),
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {name: float(np.quantile(values, q)) for name, q in _QUANTILES.items()}


def _skew(counts: np.ndarray) -> float:
    """How far a client's mixture of classes is from that of all, averaged over examples.

    The distance is the total variation: 0 for the same mixture, 1 for disjoint classes.
    """
    sizes = counts.sum(1, keepdims=True)
    expected = sizes * (counts.sum(0) / counts.sum())
    return float(np.abs(counts - expected).sum() / 2 / counts.sum())
