"""Arrays of rows, in a form in which a device reads some of them without a copy of all."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

_TILE = 128  # Entries that a TPU moves at once; it lays rows of a multiple of these out one by one.
_MOST_PADDING = 1.5


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
        return self._unpacked(self.flat[index])

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.asarray(self._unpacked(np.asarray(self.flat)), *args, **kwargs)

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


def read_rows(x: Any, some: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The rows that `some` takes of an array of rows, of such an array or of `Rows`."""
    return x.read(some) if isinstance(x, Rows) else some(x)


def in_rows(x: np.ndarray, device: jax.Device) -> Any:
    """The array `[rows, ...]`, or `Rows` where the device would not keep its rows apart.

    TPUs make the longest axis the innermost one where that pads less, which is the one over rows: a
    program that reads rows copies all of them first. Where padding would take more than half of the
    memory besides, they still do.
    """
    dims = x.shape[1:]
    width = flat_width(dims, device)
    if width is None:
        return x
    flat = x.reshape(len(x), math.prod(dims))
    return Rows(np.pad(flat, ((0, 0), (0, width - flat.shape[1]))), dims)


def flat_width(dims: tuple[int, ...], device: jax.Device) -> int | None:
    """Entries of a row, padding included, of what is to be `Rows` on a device; else `None`."""
    size = math.prod(dims)
    width = size + -size % _TILE
    fits = bool(dims) and 0 < width <= _MOST_PADDING * size
    return width if fits and not _keeps_rows_apart(device) else None


@functools.cache
def _keeps_rows_apart(device: jax.Device) -> bool:
    """Whether rows are apart in the layout that a device gives to an array of many short ones."""
    if device.platform == "cpu":  # There is no need to compile for the answer.
        return True
    sharding = SingleDeviceSharding(device)
    many = jax.ShapeDtypeStruct((1024, 3), jnp.float32, sharding=sharding)
    (form,) = jax.tree.leaves(jax.jit(lambda x: x).lower(many).compile().input_formats)
    return form.layout.major_to_minor == (0, 1)
