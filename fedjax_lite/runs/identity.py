"""What sets a run apart from others: what a checkpoint is compared by, before it is read."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from fedjax_lite.base import PyTree
from fedjax_lite.data.population import (
    GeneratedPopulation,
    ResidentPopulation,
    StreamedPopulation,
)
from fedjax_lite.samplers import Sampler

_SAMPLED_ROWS = 100
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
    identity["program devices"] = jax.device_count()
    identity["program jax"] = jax.__version__
    return identity


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
        sha.update(np.atleast_1d(np.ascontiguousarray(leaf)).view(np.uint8).data)
    return sha.hexdigest()
