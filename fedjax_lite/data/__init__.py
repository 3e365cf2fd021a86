"""Data sets, populations and their sources."""

from fedjax_lite.data import preprocess
from fedjax_lite.data.benchmarks import (
    cifar10,
    cifar100,
    emnist,
    shakespeare,
    stackoverflow,
    stackoverflow_tags,
)
from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.data.digits import digits, digits_images
from fedjax_lite.data.formats import convert, read
from fedjax_lite.data.frames import read_pandas
from fedjax_lite.data.hdf5 import read_tff_hdf5
from fedjax_lite.data.huggingface import read_huggingface
from fedjax_lite.data.idx import read_idx
from fedjax_lite.data.leaf import read_leaf
from fedjax_lite.data.like import (
    cifar10_like,
    cifar100_like,
    emnist_like,
    shakespeare_like,
    stackoverflow_like,
    stackoverflow_tags_like,
)
from fedjax_lite.data.matlab import emnist_matlab
from fedjax_lite.data.mnist import emnist_idx, fashion_mnist, mnist
from fedjax_lite.data.poisoning import flip_labels
from fedjax_lite.data.population import (
    GeneratedPopulation,
    Population,
    ResidentPopulation,
    StreamedPopulation,
)
from fedjax_lite.data.published_splits import (
    long_tailed_mnist,
    pfllib_fashion_mnist,
    rotated_mnist,
)
from fedjax_lite.data.sequences import noisy_successors
from fedjax_lite.data.sqlite import read_fedjax_sqlite, read_tff_sqlite
from fedjax_lite.data.synthetic import gaussian_images, halfspace, halfspace_batch, synthetic
from fedjax_lite.data.tables import read_csv, read_npz
from fedjax_lite.data.writer import Writer

__all__ = [
    "FederatedDataset",
    "GeneratedPopulation",
    "Population",
    "ResidentPopulation",
    "StreamedPopulation",
    "Writer",
    "cifar10",
    "cifar10_like",
    "cifar100",
    "cifar100_like",
    "convert",
    "digits",
    "digits_images",
    "emnist",
    "emnist_idx",
    "emnist_like",
    "emnist_matlab",
    "fashion_mnist",
    "flip_labels",
    "gaussian_images",
    "halfspace",
    "halfspace_batch",
    "long_tailed_mnist",
    "mnist",
    "noisy_successors",
    "pfllib_fashion_mnist",
    "preprocess",
    "read",
    "read_csv",
    "read_fedjax_sqlite",
    "read_huggingface",
    "read_idx",
    "read_leaf",
    "read_npz",
    "read_pandas",
    "read_tff_hdf5",
    "read_tff_sqlite",
    "rotated_mnist",
    "shakespeare",
    "shakespeare_like",
    "stackoverflow",
    "stackoverflow_like",
    "stackoverflow_tags",
    "stackoverflow_tags_like",
    "synthetic",
]


def __dir__() -> list[str]:
    return __all__
