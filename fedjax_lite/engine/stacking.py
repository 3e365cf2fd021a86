"""Updates of all clients side by side, spread over the devices by coordinate."""

import jax
import jax.numpy as jnp

from fedjax_lite.base import Cohort, PyTree, Reducer, Stack
from fedjax_lite.xla.mesh import AXIS


def reduce_stacked(
    reducer: Reducer,
    updates: PyTree,
    slots: jax.Array,
    weights: jax.Array,
    cohort: Cohort,
    key: jax.Array,
    last: PyTree,
    num_devices: int,
) -> tuple[PyTree, dict[str, jax.Array]]:
    """What a reducer makes of the updates of all clients; inside of `shard_map` on several devices.

    Each device has the updates of its own clients. They are exchanged, array by array, so that
    each has some coordinates of all of them, in the order of the cohort: no result depends on how
    clients were dealt.

    Args:
      reducer: A stacked one.
      updates: Arrays `[slots of the device, ...]`.
      slots: The slots of all devices, one device after the other; the capacity means none.
      weights: Weights of the clients `[clients]`, in the order of the cohort.
      cohort: The cohort.
      key: Key of the round.
      last: The aggregate of the last round, or `()`.
      num_devices: How many devices there are.

    Returns:
      Arrays in the shapes of one client's update, and what the reducer reports; the same on each
      device.
    """
    assert reducer.stacked is not None
    leaves, structure = jax.tree.flatten(updates)
    # Where each client is: each has been dealt to a slot.
    rows = jnp.zeros(len(weights), jnp.int32)
    rows = rows.at[slots].set(jnp.arange(len(slots), dtype=jnp.int32), mode="drop")

    def padded(flat: jax.Array) -> jax.Array:
        return jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % num_devices)))

    def in_cohort_order(x: jax.Array) -> jax.Array:
        flat = x.reshape(len(x), -1)
        if num_devices > 1:
            flat = jax.lax.all_to_all(padded(flat), AXIS, split_axis=1, concat_axis=0, tiled=True)
        return flat.at[rows].get(mode="promise_in_bounds")

    def own_part(x: jax.Array) -> jax.Array:
        flat = x.reshape(1, -1)
        if num_devices > 1:
            parts = padded(flat).reshape(num_devices, -1)
            return parts[jax.lax.axis_index(AXIS)]
        return flat[0]

    def total(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, AXIS) if num_devices > 1 else x

    stack = Stack(
        updates=[in_cohort_order(x) for x in leaves],
        weights=weights,
        client_ids=cohort.client_ids,
        is_hostile=jnp.zeros(weights.shape, bool),
        last=[own_part(x) for x in jax.tree.leaves(last)],
        key=key,
        total=total,
    )
    reduced, info = reducer.stacked(stack)

    def as_update(x: jax.Array, like: jax.Array) -> jax.Array:
        if num_devices > 1:
            x = jax.lax.all_gather(x, AXIS, tiled=True)
        shape = like.shape[1:]
        return x[: like[0].size].reshape(shape)

    return jax.tree.unflatten(structure, map(as_update, reduced, leaves)), info
