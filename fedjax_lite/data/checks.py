"""What a feature may hold, and what the parts of a data set must agree on."""

import collections
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lite import _validate

Transform = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]
"""Features of one client `[rows, ...]` by name, to what takes their place."""

NUMERIC = {
    np.dtype(kind).name: np.dtype(kind)
    for kind in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", jnp.bfloat16, "float32", "float64", "complex64", "complex128"),
    )
}
"""The dtypes that a feature may have, by name."""


def numeric(name: str, array: np.ndarray) -> None:
    """Refuses a feature that does not hold numbers."""
    if array.dtype.name not in NUMERIC:
        raise ValueError(f"{name} has dtype {array.dtype}; encode it as numbers first.")


def as_in_jax(name: str, feature: np.ndarray) -> np.ndarray:
    """A feature in the dtype that JAX holds it in; refuses integers that it would cut off."""
    dtype = jax.dtypes.canonicalize_dtype(feature.dtype).newbyteorder("=")
    if feature.dtype == dtype:
        return feature
    cast = feature.astype(dtype)
    if feature.dtype.kind in "iu" and (cast != feature).any():
        raise ValueError(
            f"feature {name!r} holds integers that do not fit {dtype}; encode it anew, or set"
            " jax_enable_x64."
        )
    return cast


def every_row_named(name: str, client_ids: Sequence[Hashable] | np.ndarray) -> None:
    """Refuses rows whose client is missing: None, NaN, or what else stands for it."""
    ids: Any = client_ids
    if isinstance(ids, np.ndarray) and ids.dtype != object:
        missing = ids != ids if ids.dtype.kind in "fcmM" else np.zeros(0, bool)
    elif set(map(type, ids)) <= {int, str, bytes}:
        return
    else:
        missing = np.fromiter(map(_is_missing, ids), bool, len(ids))
    if missing.any():
        raise ValueError(
            f"{name} names no client in {missing.sum()} rows, the first of them row"
            f" {missing.argmax()}, counted from 0; name a client in each, or leave these rows out."
        )


def _is_missing(value: Any) -> bool:
    try:
        return value is None or bool(value != value)
    except (TypeError, ValueError):  # NA of pandas is neither true nor false.
        return type(value).__name__ == "NAType"


def has_rows(features: Mapping[str, Any]) -> bool:
    """Whether a client has examples."""
    return any(np.shape(feature)[:1] != (0,) for feature in features.values())


def of_client(
    client_id: Hashable, features: Any, first: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """The features of a client as arrays, checked against those of the first client with rows.

    What has no rows agrees with all: files often tell neither its features nor their types.
    """
    if isinstance(features, Mapping) and not features:
        return {}
    _validate.features(f"client {client_id!r}", features)
    arrays = {name: np.asarray(value) for name, value in features.items()}
    if not has_rows(arrays):
        return arrays
    for name, array in arrays.items():
        numeric(f"client {client_id!r}: feature {name!r}", array)
    spec, expected = (
        {name: (array.shape[1:], array.dtype.name) for name, array in tree.items()}
        for tree in (arrays, arrays if first is None else first)
    )
    if spec != expected:
        raise ValueError(
            f"client {client_id!r} has features {spec} where the first client has {expected}; give"
            " all clients the same names, shapes and dtypes."
        )
    return arrays


def positions(client_ids: np.ndarray | jax.Array, num_clients: int) -> None:
    """Refuses what does not name clients; the values of a JAX array stay on the device."""
    if client_ids.ndim != 1 or client_ids.size == 0 or client_ids.dtype.kind not in "iu":
        raise ValueError(
            f"client_ids has shape {client_ids.shape} and dtype {client_ids.dtype}; pass integers"
            " [capacity], positions in the population."
        )
    if isinstance(client_ids, np.ndarray) and (
        client_ids.min() < -1 or client_ids.max() >= num_clients
    ):
        raise ValueError(
            f"client_ids lies between {client_ids.min()} and {client_ids.max()}; choose"
            f" positions from 0 to {num_clients - 1}, or -1 for an empty slot."
        )


def fraction(value: float) -> None:
    """Refuses what is no proper fraction."""
    if not 0 < value < 1:
        raise ValueError(f"fraction is {value}; choose one between 0 and 1.")


def structure(
    examples: Mapping[str, np.ndarray], offsets: np.ndarray, client_ids: tuple[Hashable, ...]
) -> None:
    """Refuses features, offsets and ids that do not fit together."""
    num_clients = len(client_ids)
    if offsets.shape != (num_clients + 1,) or offsets.dtype != np.int64 or offsets[0] != 0:
        raise ValueError(
            f"offsets has shape {offsets.shape} and dtype {offsets.dtype} for {num_clients}"
            " clients; pass [num_clients + 1] of int64, starting at 0."
        )
    if offsets[-1] == 0:
        raise ValueError(
            f"the dataset is empty: {num_clients} clients with 0 examples; pass at least one"
            " client with one example."
        )
    sizes = np.diff(offsets)
    if sizes.min() < 0:
        raise ValueError(
            f"offsets falls at client {client_ids[sizes.argmin()]!r}, which would have"
            f" {sizes.min()} examples; let it rise from client to client."
        )
    every_row_named("client_ids", client_ids)
    if len(set(client_ids)) != num_clients:
        ((twice, count),) = collections.Counter(client_ids).most_common(1)
        raise ValueError(f"client_ids names client {twice!r} {count} times; make the ids distinct.")
    _validate.features("examples", examples)
    for name, feature in examples.items():
        numeric(f"feature {name!r}", feature)
        if len(feature) != offsets[-1]:
            raise ValueError(
                f"feature {name!r} has {len(feature)} rows where the clients have {offsets[-1]}"
                " examples; give it one row per example."
            )


def no_nan(
    examples: Mapping[str, np.ndarray], offsets: np.ndarray, client_ids: tuple[Hashable, ...]
) -> None:
    """Refuses NaN in any feature."""
    for name, feature in examples.items():
        bad = np.zeros(len(feature), bool)
        # Block by block, so that a memory-mapped feature stays on disk.
        step = max(1, 2**24 // max(1, feature[:1].nbytes))
        for start in range(0, len(feature), step):
            block = feature[start : start + step]
            bad[start : start + step] = (block != block).reshape(len(block), -1).any(axis=1)
        if bad.any():
            owners, counts = np.unique(
                np.searchsorted(offsets, np.flatnonzero(bad), side="right") - 1, return_counts=True
            )
            raise ValueError(
                f"feature {name!r} holds NaN in {bad.sum()} examples of {owners.size} clients,"
                f" {counts[0]} of them of client {client_ids[owners[0]]!r}; mend them with map(),"
                " or allow them."
            )


def pairs(clients: Any) -> Iterator[tuple[Any, Any]]:
    """Clients and their features, from what `from_clients` takes."""
    refuse_table("clients", clients)
    if not isinstance(clients, Iterable) or isinstance(clients, (str, bytes)):
        raise TypeError(
            f"clients is of type {type(clients).__name__}; pass a dict of features by client id."
        )
    for i, item in enumerate(clients.items() if isinstance(clients, Mapping) else clients):
        if isinstance(item, Mapping):
            yield i, item
        elif isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], Hashable):
            yield item[0], item[1]
        else:
            raise TypeError(
                f"clients[{i}] is of type {type(item).__name__}; pass a dict of features by name,"
                ' such as {"x": ..., "y": ...}, for each client.'
            )


def refuse_table(name: str, table: Any) -> None:
    """Says what to call with other libraries' tables, told by what they have: none is imported."""
    if hasattr(table, "get_group"):
        column = repr(table.keys) if isinstance(getattr(table, "keys", None), str) else "..."
        remedy = f"pass the frame itself: fl.data.read(frame, client_column={column})."
    elif hasattr(table, "column_names") or hasattr(table, "iloc"):
        remedy = "read it: fl.data.read(table, client_column=...)."
    elif any(kind.__module__.startswith("torch.utils.data") for kind in type(table).__mro__):
        remedy = (
            "stack its examples and deal them out: FederatedDataset.from_rows("
            '{"x": np.stack([x for x, _ in dataset]), "y": np.array([y for _, y in dataset])},'
            " fl.partition.iid(len(dataset), num_clients, seed=0))."
        )
    else:
        return
    raise TypeError(f"{name} is of type {type(table).__name__}; {remedy}")
