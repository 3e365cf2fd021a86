"""What sets a run apart from others: what a checkpoint is compared by, before it is read."""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from fedjax_lite.base import PyTree
from fedjax_lite.data.population import (
    GeneratedPopulation,
    ResidentPopulation,
    StreamedPopulation,
)
from fedjax_lite.samplers import Sampler
from fedjax_lite.xla import hosts
from fedjax_lite.xla.mesh import resolve

_SAMPLED_ROWS = 100
_MOST_BYTES = 2**24  # Of what lies with other processes, that is read at once.
Identity = dict[str, Any]


class DifferentRunError(Exception):
    """A checkpoint belongs to another run."""


def compare(mine: Identity, saved: Identity, folder: Path) -> None:
    """Refuses the checkpoint of another run."""
    where = ("program devices", "program jax")
    same_machine = all(mine.get(name) == saved.get(name) for name in where)
    ignored = {*where, *(() if same_machine else ("program",))}
    differing = [
        f"{name} is {saved.get(name)!r} there and {mine.get(name)!r} here"
        for name in sorted({*mine, *saved} - ignored)
        if mine.get(name) != saved.get(name)
    ]
    if differing:
        raise DifferentRunError(
            f"checkpoints in {folder} are of another run: {'; '.join(differing)}. Choose another"
            " folder, or the same algorithm, model, data and settings."
        )


def identify(
    state: PyTree,
    population: ResidentPopulation | GeneratedPopulation | StreamedPopulation,
    sampler: Sampler,
    key: jax.Array,
    program: Any,
    settings: Mapping[str, Any],
) -> Identity:
    """What sets a run apart from others, by name, in types that JSON has.

    Args:
      state: Where it begins; shapes and dtypes count.
      population: Its clients: their number and sizes, and the examples of some.
      sampler: Who takes part.
      key: Its root key.
      program: Its traced step, by which algorithms and models of the same shapes are told apart.
        Compared on the same number of devices and version of jax alone, on which it depends.
      settings: What else there is to tell.
    """
    identity: Identity = {f"settings[{name!r}]": value for name, value in settings.items()}
    identity |= forms(state)
    for name in ("scheme", "num_clients", "capacity", "rate", "num_groups"):
        identity[f"sampler.{name}"] = getattr(sampler, name)
    if sampler.schedule is not None:
        identity["sampler.schedule"] = digest(vars(sampler.schedule))
    identity["population.num_clients"] = population.num_clients
    if not isinstance(population, GeneratedPopulation):
        offsets = np.asarray(population.offsets, np.int64)
        identity["population.offsets"] = digest(offsets)
        rows = np.linspace(0, max(offsets[-1] - 1, 0), _SAMPLED_ROWS).astype(int)
        for name, feature in population.examples.items():
            identity[f"population.examples[{name!r}]"] = (
                f"{feature.dtype.name}{list(feature.shape[1:])} {digest(feature[rows])[:16]}"
            )
    identity["key"] = f"{jax.random.key_impl(key)} {jax.random.key_data(key).tolist()}"
    text = re.sub(r"0x[0-9a-f]+", "", str(program))  # Without addresses of functions.
    identity["program"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    mesh = resolve(None)
    identity["program devices"] = 1 if mesh is None else mesh.size
    identity["program jax"] = jax.__version__
    return identity


def check_same(identity: Identity) -> None:
    """Refuses to go on with processes that would run something else each.

    Raises:
      ValueError: One of them has another identity than the first; in all of them.
    """
    if jax.process_count() == 1:
        return
    identity = json.loads(json.dumps(identity))
    first = hosts.shared(identity)
    differing = sorted(
        name for name in {*identity, *first} if identity.get(name) != first.get(name)
    )
    if others := hosts.anywhere(bool(differing)):
        told = ", ".join(hosts.shared(differing, source=others[0]))
        raise ValueError(
            f"processes {others} run something else than process 0, by {told}; give all of them the"
            " same key, data, algorithm and settings."
        )


def forms(state: PyTree) -> Identity:
    """Dtype and shape of each array of a state, by name."""
    return {
        "state" + jax.tree_util.keystr(path): f"{leaf.dtype.name}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def digest(arrays: PyTree | ArrayLike) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of the arrays of a pytree."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(arrays):
        sha.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        for part in _parts(leaf):
            sha.update(np.atleast_1d(np.ascontiguousarray(part)).view(np.uint8).data)
    return sha.hexdigest()


def _parts(x: Any) -> Iterator[Any]:
    """The array as it is; if a part of it lies with other processes, some rows at a time."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        yield x
        return
    assert isinstance(x.sharding, NamedSharding)  # As all that is spread is.
    size = max(1, _MOST_BYTES * len(x) // x.nbytes)
    for start in range(0, len(x), size):
        yield _rows(x, start, min(size, len(x) - start), x.sharding.mesh)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _rows(x: jax.Array, start: ArrayLike, size: int, mesh: Any) -> jax.Array:
    """Some rows of a spread array, for all processes."""
    rows = jax.lax.dynamic_slice_in_dim(x, start, size)
    if jax.typeof(x).memory_space == jax.memory.Space.Host:
        rows = jax.device_put(rows, jax.memory.Space.Device)
    return jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, PartitionSpec()))
