"""Federated data sets: flat arrays in which every client owns a run of rows."""

import dataclasses
import functools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.data.population import ResidentPopulation
from fedjax_lite.mesh import replicate


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FederatedDataset:
    """Examples of many clients, on the host.

    Built by `from_arrays`, `from_clients` or `from_rows`, which check what they are given.

    Attributes:
      examples: Features `[rows, ...]` by name, NumPy arrays, client after client.
      offsets: `[num_clients + 1]`, int64; client i owns rows
        `offsets[i]:offsets[i + 1]`.
      client_ids: Name of each client, in order.
    """

    examples: dict[str, np.ndarray]
    offsets: np.ndarray
    client_ids: tuple[Hashable, ...]

    @classmethod
    def from_arrays(
        cls, examples: Mapping[str, ArrayLike], client_ids: Sequence[Hashable] | np.ndarray
    ) -> "FederatedDataset":
        """Groups rows by the client that each belongs to.

        Args:
          examples: Features `[rows, ...]` by name.
          client_ids: `[rows]`, the client of each row. Clients are put in sorted order,
            the rows of a client stay in theirs.

        Raises:
          ValueError: There are no rows, or the lengths differ.
          TypeError: `examples` is no dict of features.

        >>> dataset = FederatedDataset.from_arrays({"x": [1, 2, 3]}, ["b", "a", "b"])
        >>> dataset.client_ids, dataset["b"]["x"].tolist()
        (('a', 'b'), [1, 3])
        """
        _validate.features("examples", examples)
        # An array of numbers or strings has one type; asking each of its rows would take longer
        # than the grouping.
        uniform = isinstance(client_ids, np.ndarray) and client_ids.dtype != object
        kinds = set() if uniform else set(map(type, client_ids))
        if len(kinds) > 1:
            raise ValueError(
                f"client_ids mixes the types {sorted(kind.__name__ for kind in kinds)}; name all"
                " clients by values of one type."
            )
        names, owner = np.unique(np.asarray(client_ids), return_inverse=True)
        num_rows = np.shape(next(iter(examples.values())))[0]
        if owner.shape != (num_rows,):
            raise ValueError(
                f"client_ids has shape {owner.shape} beside {num_rows} rows of examples; pass one"
                " client id per row."
            )
        rows = np.split(np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner))[:-1])
        return cls.from_rows(examples, rows, client_ids=names.tolist())

    @classmethod
    def from_clients(cls, clients: Mapping[Any, Mapping[str, ArrayLike]]) -> "FederatedDataset":
        """Concatenates one dict of features per client, in the order given.

        Args:
          clients: Features `[rows of the client, ...]` by name, by client id. A client
            may have no rows.

        Raises:
          ValueError: There are no clients or no rows, or a client's features differ from the
            first client's in name, shape or dtype.
          TypeError: A client's value is no dict of features.
        """
        if not clients:
            raise ValueError("clients is empty; pass the examples of at least one client.")
        arrays: dict[Hashable, dict[str, np.ndarray]] = {}
        expected: dict[str, Any] | None = None
        for client_id, features in clients.items():
            _validate.features(f"client {client_id!r}", features)
            arrays[client_id] = {name: np.asarray(value) for name, value in features.items()}
            spec = {name: (a.shape[1:], a.dtype.name) for name, a in arrays[client_id].items()}
            expected = spec if expected is None else expected
            if spec != expected:
                raise ValueError(
                    f"client {client_id!r} has features {spec} where the first client has"
                    f" {expected}; give all clients the same names, shapes and dtypes."
                )
        stacked = {
            name: np.concatenate([features[name] for features in arrays.values()])
            for name in expected or ()
        }
        sizes = [next(iter(features.values())).shape[0] for features in arrays.values()]
        return cls._checked(stacked, np.cumsum([0, *sizes]), tuple(arrays))

    @classmethod
    def from_rows(
        cls,
        examples: Mapping[str, ArrayLike],
        rows: Iterable[ArrayLike],
        *,
        client_ids: Sequence[Hashable] | None = None,
    ) -> "FederatedDataset":
        """Deals rows out as a partitioner says (see `fedjax_lite.partition`).

        Args:
          examples: Features `[rows, ...]` by name.
          rows: For each client, the indices of its rows.
          client_ids: Name of each client; 0, 1, ... if left out.

        Raises:
          ValueError: There are no rows, the lengths differ, or an index is out of range.
          TypeError: `examples` is no dict of features.
        """
        _validate.features("examples", examples)
        arrays = {name: np.asarray(value) for name, value in examples.items()}
        parts = [np.asarray(part) for part in rows]
        for i, part in enumerate(parts):
            if part.ndim != 1 or (part.size and part.dtype.kind not in "iu"):
                raise ValueError(
                    f"rows[{i}] has shape {part.shape} and dtype {part.dtype}; pass a list of row"
                    " indices for each client (np.flatnonzero of a mask)."
                )
        parts = [part.astype(np.int64) for part in parts]
        order = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        num_rows = next(iter(arrays.values())).shape[0]
        if order.size and (order.min() < 0 or order.max() >= num_rows):
            raise ValueError(
                f"rows holds indices from {order.min()} to {order.max()} into {num_rows} rows of"
                f" examples; keep them within [0, {num_rows})."
            )
        names = tuple(range(len(parts)) if client_ids is None else client_ids)
        if len(names) != len(parts):
            raise ValueError(
                f"client_ids names {len(names)} clients while rows has {len(parts)}; name each"
                " client once."
            )
        offsets = np.cumsum([0, *(part.size for part in parts)])
        return cls._checked({name: a[order] for name, a in arrays.items()}, offsets, names)

    @classmethod
    def _checked(
        cls, examples: dict[str, np.ndarray], offsets: np.ndarray, client_ids: tuple[Any, ...]
    ) -> "FederatedDataset":
        if len(client_ids) == 0 or offsets[-1] == 0:
            raise ValueError(
                f"the dataset is empty: {len(client_ids)} clients with {offsets[-1]} examples;"
                " pass at least one client with one example."
            )
        if len(set(client_ids)) != len(client_ids):
            raise ValueError("client_ids names a client twice; make the ids distinct.")
        for name, array in examples.items():
            if array.dtype.kind not in "biufc" and array.dtype.name != "bfloat16":
                raise ValueError(
                    f"feature {name!r} has dtype {array.dtype}; encode it as numbers first."
                )
        return cls(examples=examples, offsets=offsets, client_ids=client_ids)

    @property
    def num_clients(self) -> int:
        """Number of clients, those without examples included."""
        return len(self.client_ids)

    @property
    def num_examples(self) -> np.ndarray:
        """`[num_clients]`, the number of examples of each client."""
        return np.diff(self.offsets)

    @functools.cached_property
    def _index(self) -> dict[Hashable, int]:
        return {client_id: i for i, client_id in enumerate(self.client_ids)}

    def __getitem__(self, client_id: Hashable) -> dict[str, np.ndarray]:
        """The features of one client, as views."""
        index = self._index.get(client_id)
        if index is None:
            raise KeyError(
                f"no client {client_id!r} among the {self.num_clients} of the dataset; see"
                " client_ids."
            )
        rows = slice(self.offsets[index], self.offsets[index + 1])
        return {name: feature[rows] for name, feature in self.examples.items()}

    def resident(self, mesh: jax.sharding.Mesh | None = None) -> ResidentPopulation:
        """Copies all examples to the device, or to each device of a mesh.

        Args:
          mesh: The mesh that the algorithm is given; all devices if left out.

        Returns:
          A population whose client i is `client_ids[i]`.

        Raises:
          ValueError: The dataset has 2**31 rows or more, or integers that JAX would cut off.
        """
        if self.offsets[-1] >= 2**31:
            raise ValueError(
                f"the dataset has {self.offsets[-1]} rows; a resident population indexes rows with"
                " int32, so split it below 2**31."
            )
        for name, feature in self.examples.items():
            dtype = jax.dtypes.canonicalize_dtype(feature.dtype)
            if feature.dtype.kind in "iu" and (feature.astype(dtype) != feature).any():
                raise ValueError(
                    f"feature {name!r} holds integers that do not fit {dtype}; encode it anew, or"
                    " set jax_enable_x64."
                )
        population = ResidentPopulation(
            examples=jax.tree.map(jnp.asarray, self.examples),
            offsets=jnp.asarray(self.offsets, jnp.int32),
        )
        return replicate(population, mesh)
