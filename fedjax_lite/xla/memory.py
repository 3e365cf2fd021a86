"""What needs how much memory, told where there is too little."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from fedjax_lite.base import PyTree
from fedjax_lite.xla.rewrite import inner_jaxprs

# Linux allows a process 65,530 mappings, of which a compiled program takes ten or more; XLA ends a
# process that has none left. Two thirds of them stay for what is compiled before the next look.
_MOST_MAPPINGS = 20_000


@contextlib.contextmanager
def memory_errors(needs: Callable[[], Mapping[str, PyTree]]) -> Iterator[None]:
    """Has JAX's errors of memory that is exhausted say what needs how much, and what to lower.

    Args:
      needs: Arrays, or their shapes, by what they are; called where there is an error.

    Raises:
      MemoryError: JAX could not allocate what it was asked for.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
            raise
        told = "".join(f"{_size(tree)} for {name}, and " for name, tree in needs().items())
        raise MemoryError(
            f"too little memory ({str(error).splitlines()[0]}): {told}each lane needs the"
            " params, their gradient, the state of the client optimizer and a batch of its own;"
            " lower batch_size, lanes or the size of the model, keep the store in the memory of the"
            ' host by memory_kind="pinned_host" or in a file by fl.store_in_file, or the data on'
            " disk by dataset.streamed()."
        ) from error


def has_many_programs() -> bool:
    """Whether so many programs are compiled that some must be forgotten before more are."""
    maps = Path("/proc/self/maps")  # There is none but on Linux.
    return maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPPINGS


def make_room_for_programs() -> bool:
    """Forgets compiled programs where there are too many; they are compiled anew when used.

    Returns:
      Whether it did. Whoever keeps jitted functions for later may as well let go of them.
    """
    many = has_many_programs()
    if many:
        jax.clear_caches()
        gc.collect()
    return many


def computed_bytes(function: Callable[..., PyTree], *args: PyTree) -> int:
    """Bytes of all that a function computes on its way, more than it needs at once.

    Args:
      function: What is traced; of a loop, one turn counts.
      *args: Its arguments, or their shapes.
    """

    def of(jaxpr: Any) -> int:
        return sum(
            sum(x.aval.size * x.aval.dtype.itemsize for x in eqn.outvars)
            + sum(of(getattr(inner, "jaxpr", inner)) for inner in inner_jaxprs(eqn.params))
            for eqn in jaxpr.eqns
        )

    return of(jax.make_jaxpr(function)(*args).jaxpr)


def _size(tree: PyTree) -> str:
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.3g} {unit}"
