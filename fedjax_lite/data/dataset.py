"""Federated data sets: flat arrays in which every client owns a run of rows."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.data import checks, storage
from fedjax_lite.data.population import (
    ResidentPopulation,
    StreamedPopulation,
    bound_of,
    device_rows,
    told,
    typical_rows,
)
from fedjax_lite.data.writer import Writer
from fedjax_lite.xla.mesh import replicate, resolve
from fedjax_lite.xla.rows import in_rows


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FederatedDataset:
    """Examples of many clients, on the host.

    Built by `from_arrays`, `from_clients` or `from_rows`, which check what they are given, read by
    `fl.data.read`, or mapped from disk by `open`.

    Attributes:
      examples: Features `[rows, ...]` by name, NumPy arrays, client after client.
      offsets: `[num_clients + 1]`, int64; client i owns rows
        `offsets[i]:offsets[i + 1]`.
      client_ids: Name of each client, in order.

    >>> FederatedDataset.from_clients({"a": {"x": [[1.0, 2.0]], "y": [0]}, "b": {}})
    FederatedDataset(2 clients, 1 examples, x: float64[2], y: int64)
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
        checks.refuse_table("examples", examples)
        _validate.features("examples", examples)
        if not isinstance(client_ids, Iterable):
            raise TypeError(
                f"client_ids is of type {type(client_ids).__name__}; pass one client id per row."
            )
        checks.every_row_named("client_ids", client_ids)
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
    def from_clients(
        cls,
        clients: Mapping[Any, Mapping[str, ArrayLike]]
        | Iterable[tuple[Any, Mapping[str, ArrayLike]]]
        | Iterable[Mapping[str, ArrayLike]],
    ) -> "FederatedDataset":
        """Concatenates one dict of features per client, in the order given.

        Args:
          clients: Features `[rows of the client, ...]` by name, by client id: a dict, or an
            iterable of pairs; of features alone, clients are named 0, 1, ... A client may have
            no rows, of whatever shape and dtype, or an empty dict.

        Raises:
          ValueError: There are no clients or no rows, a client comes twice, or its features
            differ from those of the first client that has rows in name, shape or dtype.
          TypeError: A client's value is no dict of features, or `clients` is a table; the message
            says what reads it.

        >>> dataset = FederatedDataset.from_clients([{"x": [1, 2]}, {"x": []}, {"x": [3]}])
        >>> dataset.num_examples.tolist()
        [2, 0, 1]
        """
        names: list[Hashable] = []
        sizes: list[int] = []
        parts: list[dict[str, np.ndarray]] = []
        for client_id, features in checks.pairs(clients):
            arrays = checks.of_client(client_id, features, parts[0] if parts else None)
            names.append(client_id)
            sizes.append(len(next(iter(arrays.values()))) if arrays else 0)
            if sizes[-1]:
                parts.append(arrays)
        if not names:
            raise ValueError("clients is empty; pass the examples of at least one client.")
        stacked = {name: np.concatenate([p[name] for p in parts]) for name in (parts or [{}])[0]}
        return cls._checked(stacked, np.cumsum(np.append(0, sizes)), tuple(names))

    @classmethod
    def from_rows(
        cls,
        examples: Mapping[str, ArrayLike],
        rows: Iterable[ArrayLike],
        *,
        client_ids: Sequence[Hashable] | None = None,
    ) -> "FederatedDataset":
        """Deals rows out as a partitioner says (see `fl.partition`).

        Args:
          examples: Features `[rows, ...]` by name.
          rows: For each client, the indices of its rows.
          client_ids: Name of each client; 0, 1, ... if left out.

        Raises:
          ValueError: There are no rows, the lengths differ, or an index is out of range.
          TypeError: `examples` is no dict of features.
        """
        checks.refuse_table("examples", examples)
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
    def concatenate(cls, datasets: Sequence["FederatedDataset"]) -> "FederatedDataset":
        """The clients of several data sets, one after the other.

        Args:
          datasets: At least one; no client id in two of them.

        Raises:
          ValueError: `datasets` is empty, features differ in name, shape or dtype, or two
            data sets have a client of the same id.
        """
        if not datasets:
            raise ValueError("datasets is empty; pass at least one data set.")
        for i, dataset in enumerate(datasets):
            if dataset.features != datasets[0].features:
                raise ValueError(
                    f"datasets[{i}] has features {dataset.features} where datasets[0] has"
                    f" {datasets[0].features}; make them equal with map()."
                )
        examples = {
            name: np.concatenate([dataset.examples[name] for dataset in datasets])
            for name in datasets[0].examples
        }
        sizes = np.concatenate([dataset.num_examples for dataset in datasets])
        names = tuple(name for dataset in datasets for name in dataset.client_ids)
        return cls._checked(examples, np.cumsum(np.append(0, sizes)), names)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = False) -> "FederatedDataset":
        """Opens a folder that `save` or `fl.data.convert` wrote, memory-mapped.

        Size and header of every file are checked, and the SHA-256 of those up to 32 MiB. Larger
        ones are hashed if asked, as that reads them whole; else their rows are read when used.

        Args:
          path: The folder.
          verify: Check the SHA-256 of all files.

        Raises:
          ValueError: The folder is no such data set, or a file of it is missing, truncated or
            altered; the message names it.
        """
        examples, offsets, client_ids = storage.load(path, verify=verify)
        try:
            return cls._checked(examples, offsets, client_ids)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a folder of `.npy` files and `meta.json`, which `open` maps into memory.

        The folder appears at once and complete: a save that is killed leaves nothing that
        opens, only a hidden folder beside it that the next save removes.

        Args:
          path: The folder, which must not exist.

        Raises:
          ValueError: `path` exists, or the client ids are not all integers, all strings or all
            bytes.
        """
        with Writer(path) as writer:
            writer.extend(self.client_ids, self.num_examples, self.examples)

    @classmethod
    def _checked(
        cls, examples: dict[str, np.ndarray], offsets: np.ndarray, client_ids: tuple[Any, ...]
    ) -> "FederatedDataset":
        dataset = cls(examples=examples, offsets=offsets, client_ids=client_ids)
        dataset.validate(allow_nan=True)
        return dataset

    def validate(self, *, allow_nan: bool = False) -> None:
        """Checks that the parts fit together, and that no feature holds NaN.

        Args:
          allow_nan: Leave out the search for NaN, which reads all floating-point features.

        Raises:
          ValueError: Something is wrong; the message names the feature and the client.
        """
        checks.structure(self.examples, self.offsets, self.client_ids)
        if not allow_nan:
            checks.no_nan(self.examples, self.offsets, self.client_ids)

    @property
    def num_clients(self) -> int:
        """Number of clients, those without examples included."""
        return len(self.client_ids)

    @property
    def num_examples(self) -> np.ndarray:
        """`[num_clients]`, the number of examples of each client."""
        return np.diff(self.offsets)

    @property
    def features(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of one example's features, by name."""
        return {
            name: jax.ShapeDtypeStruct(feature.shape[1:], feature.dtype)
            for name, feature in self.examples.items()
        }

    def __repr__(self) -> str:
        return told(self)

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

    def select(self, client_ids: Iterable[Hashable]) -> "FederatedDataset":
        """Some of the clients, in the order given, with copies of their examples.

        Args:
          client_ids: Ids of clients of this data set, each once.

        Raises:
          ValueError: An id is unknown or comes twice, or the clients have no examples.

        >>> dataset = FederatedDataset.from_clients({"a": {"x": [1]}, "b": {"x": [2, 3]}})
        >>> dataset.select(["b"]).examples["x"].tolist()
        [2, 3]
        """
        names = tuple(client_ids)
        for name in names:
            if name not in self._index:
                raise ValueError(
                    f"client_ids holds {name!r}, which is none of the {self.num_clients} clients"
                    " of the dataset; see its client_ids."
                )
        clients = np.array([self._index[name] for name in names], np.int64)
        sizes = self.num_examples[clients]
        offsets = np.cumsum(np.append(0, sizes))
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[clients] - offsets[:-1], sizes)
        examples = {name: feature[rows] for name, feature in self.examples.items()}
        return self._checked(examples, offsets, names)

    def split_clients(
        self, fraction: float, *, seed: int | np.random.Generator
    ) -> tuple["FederatedDataset", "FederatedDataset"]:
        """Splits into clients to train on and clients held out.

        Args:
          fraction: Part of the clients held out, within (0, 1); their number is rounded to the
            nearest integer, halves to even.
          seed: Seed, or the generator to draw from.

        Returns:
          The training clients and the held-out clients, both in the order of this data set.

        Raises:
          ValueError: `fraction` is out of range, or leaves one side without clients or without
            examples.
        """
        checks.fraction(fraction)
        num_held = round(fraction * self.num_clients)
        if not 0 < num_held < self.num_clients:
            raise ValueError(
                f"fraction is {fraction} of {self.num_clients} clients, which holds out {num_held};"
                " choose one that leaves clients on both sides."
            )
        held = np.zeros(self.num_clients, bool)
        held[np.random.default_rng(seed).permutation(self.num_clients)[:num_held]] = True
        return (
            self.select(itertools.compress(self.client_ids, ~held)),
            self.select(itertools.compress(self.client_ids, held)),
        )

    def split_examples(
        self, fraction: float, *, seed: int | np.random.Generator
    ) -> tuple["FederatedDataset", "FederatedDataset"]:
        """Splits each client's examples into training and held-out ones.

        Args:
          fraction: Part of a client's examples held out, within (0, 1). Their number is rounded
            to the nearest integer, halves to even, and never all of them: a client with a
            single example trains on it.
          seed: Seed, or the generator to draw from.

        Returns:
          Training and held-out examples. Both have all clients, in the same order; a client
          may have none in the second.

        Raises:
          ValueError: `fraction` is out of range, or no client is large enough to hold out one
            example.
        """
        checks.fraction(fraction)
        sizes = self.num_examples
        num_held = np.minimum(np.rint(fraction * sizes), np.maximum(sizes - 1, 0)).astype(np.int64)
        if not num_held.any():
            raise ValueError(
                f"fraction is {fraction}, less than one example of each client (the largest has"
                f" {sizes.max()}); raise it, or use split_clients()."
            )
        owner = np.repeat(np.arange(self.num_clients), sizes)
        # Rows sorted by client, and within a client by lot.
        order = np.lexsort((np.random.default_rng(seed).random(owner.size), owner))
        held = np.empty(owner.size, bool)
        held[order] = np.arange(owner.size) - self.offsets[owner] < num_held[owner]
        return self._rows(~held, sizes - num_held), self._rows(held, num_held)

    def _rows(self, mask: np.ndarray, sizes: np.ndarray) -> "FederatedDataset":
        examples = {name: feature[mask] for name, feature in self.examples.items()}
        return self._checked(examples, np.cumsum(np.append(0, sizes)), self.client_ids)

    def map(self, function: checks.Transform) -> "FederatedDataset":
        """Replaces the features by a function of them, applied to all rows at once.

        Args:
          function: Takes and returns a dict of features `[rows, ...]`, row for row.

        Raises:
          ValueError: `function` changes the number of rows, or returns what are no numbers.
          TypeError: `function` returns no dict of features.

        >>> dataset = FederatedDataset.from_clients({"a": {"x": [1, 2]}})
        >>> dataset.map(lambda features: {"x": features["x"] / 2})["a"]["x"].tolist()
        [0.5, 1.0]
        """
        mapped = function(dict(self.examples))
        _validate.features("the result of function", mapped)
        examples = {name: np.asarray(feature) for name, feature in mapped.items()}
        return self._checked(examples, self.offsets, self.client_ids)

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
        on = resolve(mesh)
        device = jax.local_devices()[0] if on is None else on.local_devices[0]
        examples = {
            name: checks.as_in_jax(name, feature) for name, feature in self.examples.items()
        }
        population = ResidentPopulation(
            examples=jax.tree.map(jnp.asarray, in_rows(examples, device)),
            offsets=jnp.asarray(self.offsets.astype(np.int32)),
            most_examples=bound_of(self.num_examples),
        )
        return replicate(population, mesh)

    def streamed(
        self,
        cohort_capacity: int,
        *,
        row_capacity: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> StreamedPopulation:
        """Leaves the examples where they are, and copies those of each cohort to the devices.

        For data sets larger than the device, or mapped from disk by `open` and larger than
        memory. Each device holds the rows of the clients that it trains, and each of several
        processes (`jax.distributed`) reads those of its own devices, for which all of them open
        the same data set and ask for the same cohorts. Cohorts of a training loop are best made
        by `fl.prefetch`.

        Args:
          cohort_capacity: Slots of a cohort, the largest number of clients in it.
          row_capacity: Rows of a cohort, the largest number of examples that its clients have
            together; a cohort with more takes a new compilation, and warns. By default, six
            standard deviations above the mean of cohorts drawn uniformly, and not above the
            largest that there is.
          mesh: The mesh that the algorithm is given; all devices if left out.

        Returns:
          A population whose client i is `client_ids[i]`.

        Raises:
          ValueError: A capacity is out of range.

        >>> import fedjax_lite as fl
        >>> dataset = FederatedDataset.from_clients({"a": {"x": [1.0, 2.0]}, "b": {"x": [3.0]}})
        >>> fl.cohort_of(dataset.streamed(2), [1, -1]).num_examples.tolist()
        [1, 0]
        """
        cohort_capacity = _validate.integer(
            "cohort_capacity", cohort_capacity, minimum=1, maximum=self.num_clients
        )
        if row_capacity is None:
            row_capacity = typical_rows(self.num_examples, cohort_capacity)
        row_capacity = _validate.integer("row_capacity", row_capacity, minimum=1, maximum=2**31 - 1)
        mesh = resolve(mesh)
        num_devices = 1 if mesh is None else mesh.devices.size
        return StreamedPopulation(
            examples=self.examples,
            offsets=self.offsets,
            cohort_capacity=cohort_capacity,
            row_capacity=device_rows(row_capacity, int(self.num_examples.max()), num_devices),
            most_examples=bound_of(self.num_examples),
            mesh=mesh,
        )
