"""Interleaved timing, and what to report of the machine."""

import importlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from fedjax_lite import FederatedAlgorithm


class Timing(NamedTuple):
    """Seconds over several repeats."""

    median: float
    fastest: float
    slowest: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.fastest:.3g} to {self.slowest:.3g})"


def interleaved(contestants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Times functions in turn, so that a machine that drifts drifts for all of them.

    Each is run once beforehand, untimed. What a function returns is waited for.
    """
    for run in contestants.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - began)
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def rounds(algorithm: FederatedAlgorithm, state: Any, cohort: Any) -> Callable[[], Any]:
    """Plays one more round at each call, as in training: what clients keep is not copied."""
    step = jax.jit(algorithm.round, donate_argnames="state")

    def play() -> Any:
        nonlocal state
        state, info = step(jax.random.key(2), state=state, cohort=cohort)
        return info

    return play


def usable_cores() -> int:
    """Number of cores that this process may run on."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def machine(*packages: str) -> dict[str, Any]:
    """Devices, processor and versions, for a report."""
    device = jax.devices()[0]
    versions = {name: importlib.import_module(name).__version__ for name in packages}
    return {
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "processor": _processor(),
        "versions": {"python": platform.python_version(), **versions},
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
