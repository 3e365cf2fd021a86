"""Arrays of rows, in a form in which a device reads some of them without a copy of all."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from fedjax_lite.base import PyTree

_TILE = 128  # Entries that a TPU moves at once; it lays rows of a multiple of these out one by one.
_MOST_PADDING = 1.5
_WIDEST = 2**15  # Entries. Of wider rows TPUs gather pieces, and copy a piece of all rows for each.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """An array `[rows, ...]`, kept flat and padded.

    Attributes:
      flat: `[rows, entries]`, of which the first ones count.
      dims: The shape of a row (static).
    """

    flat: Any
    dims: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.flat.shape[:1], *self.dims)

    @property
    def dtype(self) -> Any:
        return self.flat.dtype

    def __getitem__(self, index: Any) -> Any:
        several = isinstance(index, jax.Array) and index.ndim > 0
        if several and isinstance(self.flat, jax.Array) and self.flat.shape[1] > _WIDEST:
            return self._unpacked(_one_by_one(self.flat, index))
        return self._unpacked(self.flat[index])

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.asarray(self._unpacked(np.asarray(self.flat)), *args, **kwargs)

    def packed(self, rows: jax.Array) -> jax.Array:
        """Rows `[..., *dims]` as they lie in it."""
        return pack_row(rows, rows.ndim - len(self.dims))

    def read(self, some: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The rows that `some` takes of an array of rows."""
        return self._unpacked(some(self.flat))

    def _unpacked(self, flat: Any) -> Any:
        if isinstance(flat, jax.Array) and jnp.issubdtype(flat.dtype, jnp.floating):
            # Which they have. Or XLA would round all of them to the bfloat16 that products take, in
            # a copy, and read rows from that.
            info = jnp.finfo(flat.dtype)
            flat = jax.lax.reduce_precision(flat, info.nexp, info.nmant)
        return flat[..., : math.prod(self.dims)].reshape(*flat.shape[:-1], *self.dims)


@jax.custom_vjp
def _one_by_one(flat: jax.Array, index: jax.Array) -> jax.Array:
    """`flat[index]`, row after row, under `vmap` too."""
    return _read_in_turn(flat, index)


@jax.custom_batching.custom_vmap
def _read_in_turn(flat: jax.Array, index: jax.Array) -> jax.Array:
    rows = jax.lax.map(lambda i: flat[i], index.reshape(-1))
    return rows.reshape(*index.shape, -1)


@_read_in_turn.def_vmap
def _(axis_size: int, batched: Any, flat: jax.Array, index: jax.Array) -> tuple[jax.Array, bool]:
    if batched == [False, True]:
        return _read_in_turn(flat, index), True
    return jax.vmap(lambda x, i: x[i], [0 if x else None for x in batched])(flat, index), True


# JAX differentiates no function that has a rule for `vmap`.
_one_by_one.defvjp(
    lambda flat, index: (_one_by_one(flat, index), (flat, index)),
    lambda read, rows: (jnp.zeros_like(read[0]).at[read[1]].add(rows), None),
)


def nth(x: jax.Array, index: jax.Array | int) -> jax.Array:
    """The row of an index that is known not to be negative, and not checked for it."""
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False, allow_negative_indices=False)


def read_rows(x: Any, some: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The rows that `some` takes of an array of rows, of such an array or of `Rows`."""
    return x.read(some) if isinstance(x, Rows) else some(x)


def map_rows(function: Callable[..., Any], tree: PyTree, *others: PyTree) -> PyTree:
    """`jax.tree.map` with `Rows` as leaves of the first tree."""
    return jax.tree.map(function, tree, *others, is_leaf=lambda x: isinstance(x, Rows))


def in_rows(features: Mapping[str, np.ndarray], device: jax.Device) -> dict[str, Any]:
    """Arrays `[rows, ...]` by name, as `Rows` where a device is to have these."""
    one = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in features.items()}
    if not wants_flat(one, device):
        return dict(features)
    return {
        name: Rows(pack_row(x, 1), x.shape[1:]) if x.ndim > 1 else x for name, x in features.items()
    }


def wants_flat(row: PyTree, device: jax.Device) -> bool:
    """Whether of arrays `[rows, ...]`, those with more than a number in a row are to be `Rows`.

    TPUs make the longest axis the innermost one where that pads less, which is the one over rows: a
    program that reads rows copies all of them first. Where padding would take more than half of the
    memory besides, it still does.

    Args:
      row: The arrays or shapes of one row.
      device: Where the arrays are to lie.
    """
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(row) if x.shape]
    fits = 0 < sum(map(_padded, sizes)) <= _MOST_PADDING * sum(sizes)
    return fits and not _keeps_rows_apart(device)


def pack_row(x: Any, num_axes: int) -> Any:
    """Rows `[..., *dims]` with so many leading axes, flat and padded."""
    flat = x.reshape(*x.shape[:num_axes], math.prod(x.shape[num_axes:]))
    padding = [(0, 0)] * num_axes + [(0, _padded(flat.shape[-1]) - flat.shape[-1])]
    return (np if isinstance(x, np.ndarray) else jnp).pad(flat, padding)


def _padded(size: int) -> int:
    return size + -size % _TILE


@functools.cache
def _keeps_rows_apart(device: jax.Device) -> bool:
    """Whether rows are apart in the layout that a device gives to an array of many short ones."""
    if device.platform == "cpu":  # There is no need to compile for the answer.
        return True
    sharding = SingleDeviceSharding(device)
    many = jax.ShapeDtypeStruct((1024, 3), jnp.float32, sharding=sharding)
    (form,) = jax.tree.leaves(jax.jit(lambda x: x).lower(many).compile().input_formats)
    return form.layout.major_to_minor == (0, 1)
