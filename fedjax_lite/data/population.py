"""Populations: what a cohort is drawn from."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fedjax_lite import _validate
from fedjax_lite._repr import record, shapes


def told(data: Any, *more: str) -> str:
    """The numbers of clients and of examples, and the features of one, in place of arrays."""
    leaves = [data.offsets, *jax.tree.leaves(data.examples)]
    # JAX puts what it likes into the place of arrays.
    is_whole = isinstance(data.examples, dict) and all(getattr(x, "ndim", 0) for x in leaves)
    if not is_whole or len(leaves) == 1:
        return record(data, {"examples": data.examples, "offsets": data.offsets})
    parts = [f"{leaves[0].shape[0] - 1} clients", f"{leaves[1].shape[0]} examples"]
    for name, feature in data.examples.items():
        one = jax.ShapeDtypeStruct(feature.shape[1:], feature.dtype)
        parts.append(f"{name}: {shapes(one)}")
    return f"{type(data).__name__}({', '.join([*parts, *more])})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ResidentPopulation:
    """Clients whose examples all lie on the device; see `FederatedDataset.resident`.

    Attributes:
      examples: Features `[rows, ...]` by name, client after client; on a TPU some of them flat and
        padded, as `Rows` (see `xla/rows.py`).
      offsets: `[num_clients + 1]`, int32; client i owns rows
        `offsets[i]:offsets[i + 1]`.
      most_examples: What no client has more examples than, `None` if that is not known (static).
    """

    examples: dict[str, jax.Array]
    offsets: jax.Array
    most_examples: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __repr__(self) -> str:
        return told(self)

    @property
    def num_clients(self) -> int:
        return self.offsets.shape[0] - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedPopulation:
    """Clients whose examples are computed when they are used: any number, at no cost.

    Both functions are traced: they draw with `jax.random`, and `client_id` is an int32 scalar
    to compute with. They are part of what is compiled, so build a population once and keep it.

    Attributes:
      num_clients: Size of the population, below 2**31; clients are numbered from 0.
      num_examples: `num_examples(key, client_id) -> int32 scalar`, the client's number
        of examples in a round, not negative. The key differs from round to round and from
        client to client.
      sample: `sample(key, client_id) -> {feature: [batch, ...]}`, a batch of the
        client's examples, called for each local step. The key differs between rounds, clients
        and steps; the batch has the same size for all of them, and what it holds beyond
        `num_examples` is masked.
      most_examples: What no client has more examples than, `None` if nothing bounds them: a client
        for which `num_examples` returns more has as many. Known, a GPU or TPU needs no loop over
        the steps of FedSGD, and rounds can be `differentiable`.

    Raises:
      ValueError: `num_clients` or `most_examples` is out of range.
    """

    num_clients: int
    num_examples: Callable[[jax.Array, jax.Array], Any]
    sample: Callable[[jax.Array, jax.Array], dict[str, jax.Array]]
    most_examples: int | None = None

    def __repr__(self) -> str:
        return f"GeneratedPopulation({self.num_clients} clients)"

    def __post_init__(self) -> None:
        _validate.integer("num_clients", self.num_clients, minimum=1, maximum=2**31 - 1)
        if self.most_examples is not None:
            _validate.integer("most_examples", self.most_examples, minimum=0)


# The functions are structure and not numbers: all of a generated population is static.
jax.tree_util.register_static(GeneratedPopulation)

Population = ResidentPopulation | GeneratedPopulation


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StreamedPopulation:
    """Clients whose examples stay on the host; see `FederatedDataset.streamed`.

    Attributes:
      examples: Features `[rows, ...]` by name, NumPy arrays, client after client.
      offsets: `[num_clients + 1]`, int64; client i owns rows
        `offsets[i]:offsets[i + 1]`.
      cohort_capacity: Slots of a cohort.
      row_capacity: Rows of a cohort that a device holds, unused ones included.
      most_examples: What no client has more examples than.
      mesh: Where cohorts are put; on the one device that there is if `None`.
    """

    examples: dict[str, np.ndarray]
    offsets: np.ndarray
    cohort_capacity: int
    row_capacity: int
    most_examples: int
    mesh: Mesh | None = None

    def __repr__(self) -> str:
        capacities = (
            f"{name}={getattr(self, name)}" for name in ("cohort_capacity", "row_capacity")
        )
        return told(self, *capacities)

    @property
    def num_clients(self) -> int:
        return len(self.offsets) - 1


def bound_of(sizes: np.ndarray) -> int:
    """A power of two that is no less than the largest of some sizes, nor than 64.

    What is compiled for one population is compiled for others of about these sizes.
    """
    return 1 << (max(int(sizes.max()), 64) - 1).bit_length()


def device_rows(row_capacity: int, largest: int, num_devices: int) -> int:
    """Rows that each device needs room for, if a cohort has at most `row_capacity` in all.

    Args:
      row_capacity: Rows of a cohort.
      largest: Rows of the largest client, by which devices may differ.
      num_devices: How many devices share them.
    """
    return min(row_capacity, (row_capacity + (num_devices - 1) * largest) // num_devices)


def typical_rows(sizes: np.ndarray, cohort_capacity: int) -> int:
    """Rows enough for nearly all cohorts drawn uniformly, and for all if that costs no more.

    The mean plus six standard deviations, or the sum of the largest clients if that is less.

    Args:
      sizes: `[clients]`, numbers of examples.
      cohort_capacity: Clients in a cohort.
    """
    largest = np.partition(sizes, sizes.size - cohort_capacity)[-cohort_capacity:]
    typical = cohort_capacity * sizes.mean() + 6 * math.sqrt(cohort_capacity) * sizes.std()
    return min(int(largest.sum()), math.ceil(typical))
