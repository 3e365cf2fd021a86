"""The field's benchmark data sets, from files that the user has fetched."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedjax_lite.data import formats, preprocess
from fedjax_lite.data.dataset import FederatedDataset

_FEDJAX = "https://storage.googleapis.com/gresearch/fedjax"
_TFF = "https://storage.googleapis.com/tff-datasets-public"
_CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"

Split = Literal["train", "test"]


def emnist(
    path: str | os.PathLike[str],
    split: Split = "train",
    *,
    only_digits: bool = False,
    domain: bool = False,
    destination: str | os.PathLike[str] | None = None,
    check_sizes: bool = True,
) -> FederatedDataset:
    """Handwritten characters by their writers: `preprocess.emnist` of FedJAX's or TFF's file.

    For NIST's own files, see `emnist_idx` and `emnist_matlab`.

    | split           | clients | examples | classes |
    |-----------------|---------|----------|---------|
    | train           | 3,400   | 671,585  | 62      |
    | test            | 3,400   | 77,483   | 62      |
    | train, digits   | 3,383   | 341,873  | 10      |
    | test, digits    | 3,383   | 40,832   | 10      |

    Args:
      path: The file; nothing is downloaded.
      split: train or test, which have the same clients.
      only_digits: The data set of digits alone.
      domain: Add the domain of each writer, `preprocess.emnist_domain`, as a feature.
      destination: Folder to convert to, which must not exist; in memory if left out. The domain
        follows from the ids of the clients, and is not written.
      check_sizes: Refuse other numbers of clients and examples than the table's.

    Returns:
      Features `x` `[rows, 28, 28, 1]`, float32, `y` `[rows]`, int32, and `domain` `[rows]`, int32,
      if asked for.

    Raises:
      FileNotFoundError: There is no file; the message says where to fetch it.
      ValueError: The file is damaged, or has another size.
    """
    digits = "digitsonly_" if only_digits else ""
    sizes = {
        ("train", False): (3400, 671_585),
        ("test", False): (3400, 77_483),
        ("train", True): (3383, 341_873),
        ("test", True): (3383, 40_832),
    }
    dataset = _load(
        path,
        destination,
        urls=(
            f"{_FEDJAX}/emnist/federated_emnist_{digits}{split}.sqlite",
            f"{_TFF}/emnist_all.sqlite.lzma",
        ),
        tff_split=f"digits_only_{split}" if only_digits else f"all_{split}",
        transform=preprocess.emnist,
        transform_name="emnist",
        sizes=sizes[split, only_digits] if check_sizes else None,
    )
    if not domain:
        return dataset
    domains = np.array([preprocess.emnist_domain(name) for name in dataset.client_ids], np.int32)
    rows = np.repeat(domains, dataset.num_examples)
    return dataset.map(lambda features: {**features, "domain": rows})


def cifar100(
    path: str | os.PathLike[str],
    split: Split = "train",
    *,
    crop: int = 24,
    destination: str | os.PathLike[str] | None = None,
    check_sizes: bool = True,
) -> FederatedDataset:
    """Photographs in 100 classes, split by Pachinko allocation: `preprocess.cifar` of TFF's file.

    500 clients with 100 examples each for training, 100 other clients for the test.

    Args:
      path: The file, decompressed; nothing is downloaded.
      split: train or test.
      crop: Height and width of the crop; 32 keeps the image, for use with `random_crop`.
      destination: Folder to convert to, which must not exist; in memory if left out.
      check_sizes: Refuse other numbers of clients and examples.

    Returns:
      Features `x` `[rows, crop, crop, 3]`, float32, and `y` and `coarse` `[rows]`, int32: one of
      100 classes, and the one of 20 groups that it is in (see `fl.partition.pachinko`).

    Raises:
      FileNotFoundError: There is no file; the message says where to fetch it.
      ValueError: The file is damaged, or has another size.
    """
    sizes = {"train": (500, 50_000), "test": (100, 10_000)}
    return _load(
        path,
        destination,
        urls=(f"{_TFF}/cifar100.sqlite.lzma",),
        tff_split=split,
        transform=preprocess.cifar(crop),
        transform_name=f"cifar {crop}",
        sizes=sizes[split] if check_sizes else None,
    )


def shakespeare(
    path: str | os.PathLike[str],
    split: Split = "train",
    *,
    sequence_length: int = 80,
    destination: str | os.PathLike[str] | None = None,
    check_sizes: bool = True,
) -> FederatedDataset:
    """Lines of Shakespeare by their speakers: `preprocess.shakespeare` of FedJAX's or TFF's file.

    715 clients; 16,068 snippets for training and 2,356 for the test, cut into sequences.

    Args:
      path: The file; nothing is downloaded.
      split: train or test, which have the same clients.
      sequence_length: Length of a sequence.
      destination: Folder to convert to, which must not exist; in memory if left out.
      check_sizes: Refuse other numbers of clients and snippets.

    Returns:
      Features `x` and `y` `[sequences, sequence_length]`, int32.

    Raises:
      FileNotFoundError: There is no file; the message says where to fetch it.
      ValueError: The file is damaged, or has another size.
    """
    sizes = {"train": (715, 16_068), "test": (715, 2_356)}
    return _load(
        path,
        destination,
        urls=(
            f"{_FEDJAX}/shakespeare/shakespeare_{split}.sqlite",
            f"{_TFF}/shakespeare.sqlite.lzma",
        ),
        tff_split=split,
        transform=preprocess.shakespeare(sequence_length),
        transform_name=f"shakespeare {sequence_length}",
        sizes=sizes[split] if check_sizes else None,
        # Every snippet begins with BOS, which is never the last symbol of a client.
        count=lambda dataset: int((dataset.examples["x"] == preprocess.BOS).sum()),
    )


def stackoverflow(
    path: str | os.PathLike[str],
    vocabulary: Sequence[str],
    split: Literal["train", "held_out", "test"] = "train",
    *,
    max_length: int = 20,
    num_oov_buckets: int = 1,
    domain: bool = False,
    destination: str | os.PathLike[str] | None = None,
    check_sizes: bool = True,
) -> FederatedDataset:
    """Sentences of Stack Overflow by user: `preprocess.stackoverflow` of FedJAX's or TFF's file.

    | split    | clients | sentences   |
    |----------|---------|-------------|
    | train    | 342,477 | 135,818,730 |
    | held_out | 38,758  | 16,491,230  |
    | test     | 204,088 | 16,586,035  |

    Args:
      path: The file; nothing is downloaded.
      vocabulary: The known words; see `preprocess.read_vocabulary`.
      split: train, held_out or test.
      max_length: Length to which sentences are cut or padded.
      num_oov_buckets: Number of ids that unknown words share.
      domain: Add whether a sentence is of a question or an answer, as a feature.
      destination: Folder to convert to, which must not exist; in memory if left out, which
        takes 22 GB for the training sentences.
      check_sizes: Refuse other numbers of clients and sentences than the table's.

    Returns:
      Features `x` and `y` `[rows, max_length]`, int32, and `domain` `[rows]`, int32, if asked for.

    Raises:
      FileNotFoundError: There is no file; the message says where to fetch it.
      ValueError: The file is damaged, or has another size.
    """
    return _stackoverflow(
        path,
        split,
        destination,
        check_sizes,
        preprocess.stackoverflow(
            vocabulary, max_length, num_oov_buckets=num_oov_buckets, domain=domain
        ),
        f"stackoverflow {max_length} {num_oov_buckets} {domain} {' '.join(vocabulary)}",
    )


def stackoverflow_tags(
    path: str | os.PathLike[str],
    vocabulary: Sequence[str],
    tags: Sequence[str],
    split: Literal["train", "held_out", "test"] = "train",
    *,
    max_length: int = 100,
    destination: str | os.PathLike[str] | None = None,
    check_sizes: bool = True,
) -> FederatedDataset:
    """Tags of Stack Overflow by user: `preprocess.stackoverflow_tags` of FedJAX's or TFF's file.

    Clients and sentences are those of `stackoverflow`.

    Args:
      path: The file; nothing is downloaded.
      vocabulary: The known words; see `preprocess.read_vocabulary`.
      tags: The known tags.
      split: train, held_out or test.
      max_length: Most words of a sentence and its title.
      destination: Folder to convert to, which must not exist; in memory if left out, which takes
        900 bytes for each sentence with 500 tags.
      check_sizes: Refuse other numbers of clients and sentences than the published ones.

    Returns:
      Features `x` `[rows, max_length]`, int32, and `y` `[rows, tags]`, bool.

    Raises:
      FileNotFoundError: There is no file; the message says where to fetch it.
      ValueError: The file is damaged, or has another size.
    """
    return _stackoverflow(
        path,
        split,
        destination,
        check_sizes,
        preprocess.stackoverflow_tags(vocabulary, tags, max_length),
        f"stackoverflow_tags {max_length} {' '.join(vocabulary)} | {' '.join(tags)}",
    )


def cifar10(folder: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """CIFAR-10 from its binary files, to be split by `fl.partition`.

    Args:
      folder: `cifar-10-batches-bin`, with `data_batch_1.bin` to `data_batch_5.bin` and
        `test_batch.bin`; nothing is downloaded.

    Returns:
      50,000 training and 10,000 test examples: `image` `[rows, 32, 32, 3]`, uint8, and `label`
      `[rows]`, int32, as `preprocess.cifar` takes them.

    Raises:
      FileNotFoundError: A file is missing; the message says where to fetch it.
      ValueError: A file is damaged.
    """

    def batch(name: str) -> np.ndarray:
        path = Path(folder) / name
        _require(path, (_CIFAR10,))
        rows = np.fromfile(path, np.uint8)
        if rows.size != 10_000 * 3073 or rows[::3073].max() > 9:
            raise ValueError(f"{path} is no batch of 10,000 images of CIFAR-10; fetch {_CIFAR10}.")
        return rows.reshape(10_000, 3073)

    def examples(rows: np.ndarray) -> dict[str, np.ndarray]:
        # Stored channel by channel; the channel comes last here.
        image = np.ascontiguousarray(rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        return {"image": image, "label": rows[:, 0].astype(np.int32)}

    train = np.concatenate([batch(f"data_batch_{i}.bin") for i in range(1, 6)])
    return examples(train), examples(batch("test_batch.bin"))


def _stackoverflow(
    path: str | os.PathLike[str],
    split: str,
    destination: str | os.PathLike[str] | None,
    check_sizes: bool,
    transform: Callable[[preprocess.Features], preprocess.Features],
    transform_name: str,
) -> FederatedDataset:
    sizes = {
        "train": (342_477, 135_818_730),
        "held_out": (38_758, 16_491_230),
        "test": (204_088, 16_586_035),
    }
    return _load(
        path,
        destination,
        urls=(
            f"{_FEDJAX}/stackoverflow/stackoverflow_{split}.sqlite",
            f"{_TFF}/stackoverflow.sqlite.lzma",
        ),
        tff_split=split.replace("_", ""),
        transform=transform,
        transform_name=transform_name,
        sizes=sizes[split] if check_sizes else None,
    )


def _load(
    path: str | os.PathLike[str],
    destination: str | os.PathLike[str] | None,
    *,
    urls: tuple[str, ...],
    tff_split: str,
    transform: Callable[[preprocess.Features], preprocess.Features],
    transform_name: str,
    sizes: tuple[int, int] | None,
    count: Callable[[FederatedDataset], int] = lambda dataset: int(dataset.offsets[-1]),
) -> FederatedDataset:
    _require(Path(path), urls)
    options: dict[str, Any] = {"split": tff_split} if formats.detect(path) == "tff_sqlite" else {}
    if destination is None:
        dataset = formats.read(path, transform=transform, **options)
    else:
        dataset = formats.convert(
            path, destination, transform=transform, transform_name=transform_name, **options
        )
    found = (dataset.num_clients, count(dataset))
    if sizes is not None and found != sizes:
        raise ValueError(
            f"{path} has {found[0]} clients with {found[1]} examples where the published data set"
            f" has {sizes[0]} with {sizes[1]}; fetch {' or '.join(urls)}, or pass"
            " check_sizes=False."
        )
    return dataset


def _require(path: Path, urls: tuple[str, ...]) -> None:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; fetch {' or '.join(urls)} (and decompress it, if its name"
            " ends in .lzma or .tar.gz)."
        )
