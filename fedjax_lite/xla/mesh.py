"""The devices that a round runs on."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from fedjax_lite import _validate
from fedjax_lite.xla import random
from fedjax_lite.xla.packing import pack, unpack

AXIS = "clients"
T = TypeVar("T")
# Up to how many entries arrays are exchanged as one: waiting once more takes as long as laying so
# many side by side, for sums, of which each device makes the same again, and for what is only sent.
_SMALL, _SMALL_SENT = 2**14, 2**16


def clients_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh with the one axis `"clients"`.

    Args:
      num_devices: How many devices; all of them if left out.

    Raises:
      ValueError: `num_devices` is not within the number of devices.
    """
    devices = jax.devices()
    if num_devices is not None:
        num_devices = _validate.integer("num_devices", num_devices, minimum=1, maximum=len(devices))
    devices = devices[:num_devices]
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def default_device() -> jax.Device | None:
    """The device that `jax.default_device` names, if it names one."""
    config: Any = jax.config  # Without a type for this one.
    device = config.jax_default_device
    return device if isinstance(device, jax.Device) else None


def resolve(mesh: Mesh | None) -> Mesh | None:
    """The mesh to run on: the one given, else all devices; `None` for a single device.

    The default is a single device, too, where `jax.default_device` names one, and inside a
    `shard_map`, where each device goes its own way.

    Raises:
      ValueError: The mesh has not the one axis `"clients"`, of type Auto, or no device of this
        process.
    """
    if mesh is None:
        inside = jax.sharding.get_abstract_mesh().manual_axes
        alone = inside or default_device() is not None or jax.device_count() == 1
        return None if alone else clients_mesh()
    _validate.instance("mesh", mesh, Mesh)
    if mesh.axis_names != (AXIS,) or mesh.axis_types != (AxisType.Auto,):
        raise ValueError(
            f"mesh has the axes {mesh.axis_names} of types {mesh.axis_types}; pass one with the"
            f' single axis "{AXIS}" of type Auto, such as fl.clients_mesh().'
        )
    if jax.process_count() > 1 and not mesh.local_devices:
        raise ValueError(
            f"mesh has no device of process {jax.process_index()}; choose some of each process, or"
            " leave mesh out."
        )
    return mesh


def sum_over_devices(tree: T) -> T:
    """The sum over the devices of a mesh, inside of `shard_map`."""
    add = functools.partial(jax.lax.psum, axis_name=AXIS)

    def together(tree: T) -> T:
        return _exchanged(tree, add, _SMALL, 0)

    if jax.process_count() > 1:
        return together(tree)
    # Virtual devices of one process meet once for all arrays, and to lay these side by side takes
    # as long to compile as the rest of what is done with a small one.
    return jax.lax.platform_dependent(tree, cpu=add, default=together)


def gather_over_devices(tree: T) -> T:
    """Arrays `[rows, ...]` of all devices one after the other, inside of `shard_map`."""
    gather = functools.partial(jax.lax.all_gather, axis_name=AXIS, tiled=True)
    return _exchanged(tree, gather, _SMALL_SENT, 1)


def _exchanged(tree: T, exchange: Callable[[Any], Any], small: int, num_axes: int) -> T:
    """Arrays that devices exchange, those of no more than `small` entries as one.

    Devices wait for each other once per array: for small ones, longer than the exchange takes.
    """
    leaves, structure = jax.tree.flatten(tree)
    few = [x for x in leaves if x.size <= small]
    together = iter(unpack(exchange(pack(few, num_axes)), few, num_axes))
    return jax.tree.unflatten(
        structure, [next(together) if x.size <= small else exchange(x) for x in leaves]
    )


def replicate(tree: T, mesh: Mesh | None = None) -> T:
    """Copies arrays to every device that rounds run on: all of them, or those of a mesh.

    Of several processes, each passes the same values.
    """
    mesh = resolve(mesh)
    if mesh is None:
        return tree
    return put(tree, NamedSharding(mesh, PartitionSpec()))


def put(tree: T, sharding: Sharding) -> T:
    """`device_put` that takes what each of several processes has whole, and sends nothing around.

    What lies on the devices of all processes already is copied by these.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def one(x: Any) -> jax.Array:
        if random.is_key(x):
            return jax.random.wrap_key_data(
                one(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return from_host(x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False), sharding)

    return jax.tree.map(one, tree)


def from_host(x: np.ndarray, sharding: Sharding) -> jax.Array:
    """An array of which each process has all, and each device is given its part."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def from_parts(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array spread over a mesh, of which each process has the part of its devices alone."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec(AXIS)), x)


def copied(tree: T, *, may_alias: bool = False) -> T:
    """Copies of arrays, or the same memory if it may be, committed to where they are.

    What a jitted function returns is committed; given arrays that are not, it would compile again
    when it is given its own result.
    """

    def copy(x: Any) -> jax.Array:
        if random.is_key(x):
            return jax.random.wrap_key_data(
                copy(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        x = jnp.asarray(x)
        return jax.device_put(x, x.sharding, may_alias=may_alias)

    return jax.tree.map(copy, tree)


def of_one_device(tree: T) -> T:
    """Inside a `shard_map`, arrays from outside of it as constants of each device's own program.

    Elsewhere, and of arrays that the program is given, the same.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    return jax.tree.map(
        lambda x: x if isinstance(x, jax.core.Tracer) or random.is_key(x) else np.asarray(x), tree
    )


def deal(sizes: jax.Array | np.ndarray, num_devices: int) -> Any:
    """Slots of each device `[devices, slots of a device]`; the number of slots marks none.

    Dealt by falling size, there and back, so that no device has more rows than another by more
    than the largest client has.

    Args:
      sizes: `[slots]`, numbers of examples, of NumPy on the host or of JAX in a round.
      num_devices: How many devices share them.
    """
    xp: Any = np if isinstance(sizes, np.ndarray) else jnp
    own = -(-len(sizes) // num_devices)
    order = xp.argsort(-sizes, stable=True).astype(np.int32)
    rows = xp.pad(order, (0, own * num_devices - len(sizes)), constant_values=len(sizes))
    rows = rows.reshape(own, num_devices)
    # Every other row backwards, or the first device would get all the large ones.
    backwards = (np.arange(own) % 2 == 1)[:, None]
    return xp.where(backwards, rows[:, ::-1], rows).T


def dealt(x: jax.Array, table: jax.Array, fill_value: int = 0) -> jax.Array:
    """What slots have, `[slots, ...]`, where a table of `deal` sends them; a value for none."""
    rows = x.at[table]
    return rows.get(mode="fill", fill_value=fill_value, wrap_negative_indices=False)


def local_positions(mesh: Mesh | None) -> list[int]:
    """Which of the devices that rounds run on are those of this process."""
    if mesh is None:
        return [0]
    return [i for i, d in enumerate(mesh.devices.flat) if d.process_index == jax.process_index()]
