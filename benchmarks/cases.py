"""The cohorts that the benchmark runs: models in flax and in PyTorch, client sizes, data."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import fedjax_lite as fl

LEARNING_RATE = 1e-4  # So small that the order of the examples, which is random, hardly matters.


def torch_dense() -> Any:
    """`fl.models.emnist_dense` in PyTorch, which only those who compare with it import."""
    import torch

    return torch.nn.Sequential(
        *(torch.nn.Flatten(), torch.nn.Linear(784, 200), torch.nn.ReLU()),
        *(torch.nn.Linear(200, 200), torch.nn.ReLU(), torch.nn.Linear(200, 62)),
    )


def torch_cnn(side: int, channels: int, num_classes: int) -> Any:
    """`fl.models.emnist_cnn` and `fl.models.cifar_cnn` in PyTorch, without dropout."""
    import torch

    flat = 64 * ((side - 4) // 2) ** 2
    return torch.nn.Sequential(
        *(torch.nn.Conv2d(channels, 32, 3), torch.nn.ReLU()),
        *(torch.nn.Conv2d(32, 64, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        *(torch.nn.Flatten(), torch.nn.Linear(flat, 128), torch.nn.ReLU()),
        torch.nn.Linear(128, num_classes),
    )


class Case(NamedTuple):
    """A cohort of clients, all of which take part.

    Attributes:
      model: Builds the model.
      torch_module: Builds the same model in PyTorch.
      num_params: Number of parameters, which `initial_params` checks.
      sizes: `[clients]`, the number of examples of each.
      image: Shape of an example.
      num_classes: Number of labels.
      batch_size: Examples in a local step; each client runs through its examples once.
    """

    model: Callable[[], fl.Model]
    torch_module: Callable[[], Any]
    num_params: int
    sizes: np.ndarray
    image: tuple[int, int, int] = (28, 28, 1)
    num_classes: int = 62
    batch_size: int = 20

    @property
    def steps(self) -> np.ndarray:
        """`[clients]`, the number of local steps of each."""
        return -(-self.sizes // self.batch_size)

    @property
    def uniform(self) -> bool:
        """Whether all clients are of one size."""
        return bool(np.ptp(self.sizes) == 0)


class Work(NamedTuple):
    """What a round amounted to, by which contestants are compared."""

    update_norm: float
    num_steps: int


class Contestant(NamedTuple):
    """A round to be timed, and how to read what it returns."""

    run: Callable[[], Any]
    work: Callable[[Any], Work]


def lognormal(num_clients: int, mean: float, sigma: float) -> np.ndarray:
    """Client sizes with a heavy tail, at least 1."""
    draws = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, num_clients)
    return np.maximum(draws.round().astype(int), 1)


_DENSE = functools.partial(Case, fl.models.emnist_dense, torch_dense, 209_662)
_EMNIST = functools.partial(
    Case,
    functools.partial(fl.models.emnist_cnn, dropout_rates=(0.0, 0.0)),
    functools.partial(torch_cnn, 28, 1, 62),
    1_206_590,
)
_CIFAR = functools.partial(
    Case,
    functools.partial(fl.models.cifar_cnn, dropout_rates=(0.0, 0.0)),
    functools.partial(torch_cnn, 32, 3, 10),
    1_626_442,
)
CASES = {
    "dense": _DENSE(np.full(100, 100)),
    "tiny": _DENSE(np.full(500, 20)),
    "ragged": _DENSE(lognormal(100, 100, 1.0)),
    "cnn": _EMNIST(np.full(10, 100)),
    "cnn_ragged": _EMNIST(lognormal(10, 100, 1.0)),
    "pfl": _CIFAR(np.full(50, 50), image=(32, 32, 3), num_classes=10, batch_size=10),
}


def dataset(case: Case) -> fl.FederatedDataset:
    """Random images and labels."""
    rng = np.random.default_rng(1)
    rows = int(case.sizes.sum())
    examples = {
        "x": rng.normal(size=(rows, *case.image)).astype(np.float32),
        "y": rng.integers(0, case.num_classes, rows).astype(np.int32),
    }
    return fl.FederatedDataset.from_rows(
        examples, np.split(np.arange(rows), np.cumsum(case.sizes)[:-1])
    )


def initial_params(case: Case) -> Any:
    """The parameters that every contestant starts from, as NumPy arrays.

    Raises:
      ValueError: They are not as many as the case says.
    """
    params, _ = case.model().init(jax.random.key(0))
    num_params = sum(p.size for p in jax.tree.leaves(params))
    if num_params != case.num_params:
        raise ValueError(
            f"num_params is {case.num_params} while the model has {num_params} parameters; correct"
            " the model or the case."
        )
    return jax.device_get(params)


def torch_model(case: Case, params: Any) -> Any:
    """The PyTorch model with the parameters of the flax model, in PyTorch's axes."""
    import torch

    module = case.torch_module()
    targets = iter(module.parameters())
    channels = None  # Those of the images that a dense layer sees flattened.
    for _, layer in sorted(params.items()):
        kernel = layer["kernel"]
        if kernel.ndim == 4:
            channels = kernel.shape[-1]
            kernel = kernel.transpose(3, 2, 0, 1)
        else:
            if channels is not None:
                # Flax flattens with the channels last, PyTorch with the channels first.
                flat, features = kernel.shape
                kernel = kernel.reshape(flat // channels, channels, features).swapaxes(0, 1)
                kernel, channels = kernel.reshape(flat, features), None
            kernel = kernel.T
        for value in (kernel, layer["bias"]):
            next(targets).data.copy_(torch.tensor(value))
    return module
