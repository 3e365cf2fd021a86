"""What several processes that run one program have to agree on."""

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedjax_lite.xla.mesh import AXIS, clients_mesh

_MICROSECONDS = 10**6
T = TypeVar("T")


def is_first() -> bool:
    """Whether this is the process that records and prints: the only one, or number 0."""
    return jax.process_index() == 0


def tell(seconds: float, signal: int) -> jax.Array:
    """The clock of the first process and the signals that came to any, to be read by `told`.

    It is on its way when this returns, as a round is: nothing waits for it.

    Args:
      seconds: What the clock of this process shows.
      signal: The number of the signal that came to it, or 0.
    """
    whole, part = divmod(round(seconds * _MICROSECONDS), _MICROSECONDS)
    return _largest([whole, part, signal] if is_first() else [0, 0, signal])


def _largest(numbers: Sequence[int]) -> jax.Array:
    """The largest over all processes of each of some numbers, int32, on its way."""
    mesh, mine = clients_mesh(), np.array([numbers], np.int32)
    of_all = NamedSharding(mesh, PartitionSpec(AXIS))
    shape = (mesh.size, len(numbers))
    return _max_over(mesh)(jax.make_array_from_callback(shape, of_all, lambda index: mine))


@functools.cache
def _max_over(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x.max(0), out_shardings=NamedSharding(mesh, PartitionSpec()))


def told(message: jax.Array) -> tuple[float, int]:
    """The seconds and the signal of `tell`, the same in all processes."""
    whole, part, signal = np.asarray(message).tolist()
    return whole + part / _MICROSECONDS, signal


def shared(value: Any, *, source: int = 0) -> Any:
    """A value in types that JSON has, as one of the processes has it; all of them wait for it."""
    if jax.process_count() == 1:
        return value
    is_source = jax.process_index() == source
    broadcast = functools.partial(multihost_utils.broadcast_one_to_all, is_source=is_source)
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(broadcast(np.int32(text.size)))
    return json.loads(bytes(broadcast(text if is_source else np.zeros(size, np.uint8))))


def anywhere(value: bool) -> list[int]:
    """The processes in which something is so; all of them wait for each other."""
    if jax.process_count() == 1:
        return [0] if value else []
    return np.flatnonzero(multihost_utils.process_allgather(np.array(value))).tolist()


@functools.cache
def least(value: int) -> int:
    """The least of a number below 2**31 over all processes, also while a program is traced."""
    if jax.process_count() == 1:
        return value
    with jax.ensure_compile_time_eval():
        return -np.asarray(_largest([-value])).item()


def may_be_lost(error: BaseException | None) -> bool:
    """Whether an error may be that another process has ended: whether it is of JAX's runtime.

    JAX raises some of these as `ValueError`, with a code in front, such as `UNKNOWN: `.
    """
    if jax.process_count() == 1:
        return False
    is_coded = isinstance(error, ValueError) and re.match("[A-Z_]+: ", str(error)) is not None
    return is_coded or isinstance(error, jax.errors.JaxRuntimeError)


class OtherProcessError(RuntimeError):
    """What another process raised ends this one as well."""


def all_or_none(function: Callable[[], T]) -> T:
    """Calls a function in all processes, of which each raises if it does in one of them.

    Raises:
      OtherProcessError: In the processes in which it has not raised itself.
    """
    error, result = None, None
    try:
        result = function()
    except Exception as raised:
        error = raised
    failed = anywhere(error is not None)
    if error is not None:
        raise error
    if failed:
        raise OtherProcessError(f"process {failed[0]} could not go on, and tells why")
    return cast(T, result)
