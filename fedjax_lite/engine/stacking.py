"""Updates of all clients side by side, spread over the devices by coordinate."""

import jax
import jax.numpy as jnp

from fedjax_lite.base import PyTree, Reducer
from fedjax_lite.xla.mesh import AXIS


def reduce_stacked(
    reducer: Reducer, updates: PyTree, slots: jax.Array, weights: jax.Array, num_devices: int
) -> PyTree:
    """What a reducer makes of the updates of all clients; inside of `shard_map` on several devices.

    Each device has the updates of its own clients. They are exchanged, array by array, so that
    each has some coordinates of all of them, in the order of the cohort: no result depends on how
    clients were dealt.

    Args:
      reducer: A stacked one.
      updates: Arrays `[slots of the device, ...]`.
      slots: The slots of all devices, one device after the other; the capacity means none.
      weights: Weights of the clients `[clients]`, in the order of the cohort.
      num_devices: How many devices there are.

    Returns:
      Arrays in the shapes of one client's update, the same on each device.
    """
    assert reducer.stacked is not None
    leaves, structure = jax.tree.flatten(updates)

    def in_cohort_order(x: jax.Array) -> jax.Array:
        flat = x.reshape(len(x), -1)
        if num_devices > 1:
            unused = -flat.shape[1] % num_devices
            flat = jnp.pad(flat, ((0, 0), (0, unused)))
            flat = jax.lax.all_to_all(flat, AXIS, split_axis=1, concat_axis=0, tiled=True)
        placed = jnp.zeros((len(weights), flat.shape[1]), flat.dtype)
        return placed.at[slots].set(flat, mode="drop")

    def total(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, AXIS) if num_devices > 1 else x

    reduced = reducer.stacked([in_cohort_order(x) for x in leaves], weights, total)

    def as_update(x: jax.Array, like: jax.Array) -> jax.Array:
        if num_devices > 1:
            x = jax.lax.all_gather(x, AXIS, tiled=True)
        shape = like.shape[1:]
        return x[: like[0].size].reshape(shape)

    return jax.tree.unflatten(structure, map(as_update, reduced, leaves))
