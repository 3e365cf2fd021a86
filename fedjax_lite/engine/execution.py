"""How a round is carried out: what changes its speed, and not its result."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from fedjax_lite import _validate
from fedjax_lite.base import PyTree
from fedjax_lite.engine.store import MEMORY_KINDS
from fedjax_lite.xla.hosts import least
from fedjax_lite.xla.mesh import default_device, resolve
from fedjax_lite.xla.rewrite import rewritten

_MOST_LANES = 64
_MOST_STEPS = 16
Rewrite = Callable[[Callable[..., PyTree]], Callable[..., PyTree]]


class Execution(NamedTuple):
    """How a round is carried out; two that differ give the same result, up to rounding.

    Attributes:
      lanes: How many clients a device trains side by side; by default 1 on CPUs and up to 64
        elsewhere.
      mesh: Mesh with the axis `"clients"`; all devices by default, or the one that
        `jax.default_device` names.
      rewrite_convolutions: Whether to rewrite the convolutions of what a client computes and, on
        CPUs, its products (see `xla/rewrite.py`); by default on CPUs, and on GPUs with several
        lanes.
      differentiable: Whether loops have a length known when compiling, and skip what exceeds a
        client's own, as reverse-mode differentiation needs.
      memory_kind: Where the store lies, `"device"` or `"pinned_host"`.
    """

    lanes: int | None = None
    mesh: Mesh | None = None
    rewrite_convolutions: bool | None = None
    differentiable: bool = False
    memory_kind: str = "device"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Execution":
        """That of an algorithm's options, checked.

        Raises:
          ValueError: One of them is out of range.
        """
        execution = cls(**{name: options[name] for name in cls._fields if name in options})
        _validate.choice("memory_kind", execution.memory_kind, MEMORY_KINDS)
        _validate.choice("differentiable", execution.differentiable, (True, False))
        rewrite = execution.rewrite_convolutions
        _validate.choice("rewrite_convolutions", rewrite, (True, False, None))
        if execution.lanes is None:
            return execution
        return execution._replace(lanes=_validate.integer("lanes", execution.lanes, minimum=1))

    @property
    def num_devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.devices.size


def resolved(execution: Execution, shared: PyTree, capacity: int) -> Execution:
    """The same with a mesh and a number of lanes, for a cohort of so many slots.

    Args:
      execution: What was asked for.
      shared: What the server broadcasts, by whose size the default number of lanes goes.
      capacity: Slots of the cohort.
    """
    execution = execution._replace(mesh=resolve(execution.mesh))
    return execution._replace(lanes=choose_lanes(execution, shared, capacity))


def choose_lanes(execution: Execution, shared: PyTree, capacity: int) -> int:
    """The number of lanes on a mesh: what was asked for, or the default."""
    lanes = execution.lanes
    if lanes is None:
        lanes = _fitting_lanes(shared, execution) if runs_side_by_side(execution) else 1
    return min(lanes, -(-capacity // execution.num_devices))


def choose_steps(
    execution: Execution, most_steps: int | None, step_bytes: Callable[[], int]
) -> int:
    """How many steps of a client run at once that do not depend on each other.

    Those beyond a client's last one are computed in vain: no more than fit an eighth of the memory,
    since what fills a chip runs no faster side by side.

    Args:
      execution: With its mesh and lanes.
      most_steps: What no client takes more of, if that is known.
      step_bytes: Bytes of what a step computes on its way.
    """
    if execution.differentiable or not runs_side_by_side(execution):
        return 1
    most_steps = _MOST_STEPS if most_steps is None else min(_MOST_STEPS, max(1, most_steps))
    bytes_limit = _bytes_limit(execution)
    if bytes_limit is None:
        return most_steps
    assert execution.lanes is not None  # Resolved.
    return min(most_steps, max(1, bytes_limit // 8 // (execution.lanes * step_bytes())))


def runs_side_by_side(execution: Execution) -> bool:
    """Whether a device is filled by doing as much as it can at once.

    On a CPU a second lane only turns matrix products and convolutions into batched ones, which run
    slower per client.
    """
    return _platform(execution) != "cpu"


def _fitting_lanes(shared: PyTree, execution: Execution) -> int:
    """How many lanes fit half the memory of a device; the other half is for data and activations.

    A lane is taken to need four times what the server broadcasts: params, gradients, the state of
    the client optimizer, the update.
    """
    bytes_limit = _bytes_limit(execution)
    if bytes_limit is None:
        return _MOST_LANES
    lane_bytes = max(1, 4 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shared)))
    return min(_MOST_LANES, max(1, bytes_limit // 2 // lane_bytes))


def _bytes_limit(execution: Execution) -> int | None:
    """The memory of a device, if it tells."""
    devices = jax.local_devices() if execution.mesh is None else execution.mesh.local_devices
    try:
        stats = devices[0].memory_stats()
    except jax.errors.JaxRuntimeError:  # Of a device that is compiled for, and is not there.
        stats = None
    if not stats or "bytes_limit" not in stats:
        return None
    # The same on all hosts, or each would wait in another program than the others.
    return least(stats["bytes_limit"] // 2**20) * 2**20


def choose_rewrite(execution: Execution) -> Rewrite:
    """What is applied to functions of one client, or of none, that run inside loops.

    Args:
      execution: With its mesh; of one whose `lanes` are `None`, that of a single lane.
    """
    platform, alone = _platform(execution), execution.lanes in (None, 1)
    wanted = execution.rewrite_convolutions
    if wanted is None:
        wanted = platform == "cpu" or (platform == "gpu" and not alone)
    if not wanted:
        return functools.partial(rewritten, convolutions=None, products=False)
    form: Literal["channels_last", "patches"] = "channels_last" if platform == "cpu" else "patches"
    # Products of several lanes are batched, which XLA:CPU runs in another way.
    return functools.partial(rewritten, convolutions=form, products=platform == "cpu" and alone)


def _platform(execution: Execution) -> str:
    if execution.mesh is not None:
        return execution.mesh.devices.flat[0].platform
    device = default_device()
    return jax.default_backend() if device is None else device.platform
