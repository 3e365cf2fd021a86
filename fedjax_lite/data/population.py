"""Populations: what a cohort is drawn from, as values that live on the device."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidentPopulation:
    """Clients whose examples all lie on the device; see `FederatedDataset.resident`.

    Attributes:
      examples: Features `[rows, ...]` by name, client after client.
      offsets: `[num_clients + 1]`, int32; client i owns rows
        `offsets[i]:offsets[i + 1]`.
    """

    examples: dict[str, jax.Array]
    offsets: jax.Array

    @property
    def num_clients(self) -> int:
        return self.offsets.shape[0] - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedPopulation:
    """Clients whose examples are computed when they are used: any number, at no cost.

    Attributes:
      num_clients: Size of the population; clients are numbered from 0.
      num_examples: `num_examples(key, client_id) -> int32 scalar`, the client's number
        of examples in a round. The key differs from round to round and from client to
        client.
      sample: `sample(key, client_id) -> {feature: [batch, ...]}`, a batch of the
        client's examples. The key differs between rounds, clients and steps; the batch
        has the same size for all of them, and its surplus over `num_examples` is masked.
    """

    num_clients: int
    num_examples: Callable[[jax.Array, jax.Array], Any]
    sample: Callable[[jax.Array, jax.Array], dict[str, jax.Array]]


# The functions are structure and not numbers: all of a generated population is static.
jax.tree_util.register_static(GeneratedPopulation)

Population = ResidentPopulation | GeneratedPopulation
