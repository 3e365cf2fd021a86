"""Finds the number of lanes that is fastest on the machine at hand."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from fedjax_lite import _validate
from fedjax_lite.base import Cohort, FederatedAlgorithm, PyTree
from fedjax_lite.xla.hosts import shared

CANDIDATES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class TunedLanes(NamedTuple):
    """What `tune_lanes` found.

    Attributes:
      lanes: The fastest number of lanes.
      seconds: Median seconds of a round by number of lanes; infinite where it does not fit the
        memory.
    """

    lanes: int
    seconds: dict[int, float]

    def __str__(self) -> str:
        rounds = ", ".join(f"{n}: {1e3 * s:.3g} ms" for n, s in self.seconds.items())
        return f"{self.lanes} lanes are the fastest ({rounds} a round)"


def tune_lanes(
    build: Callable[[int], FederatedAlgorithm],
    key: jax.Array,
    state: PyTree,
    cohort: Cohort,
    *,
    candidates: Sequence[int] | None = None,
    repeats: int = 3,
) -> TunedLanes:
    """Measures a round with several numbers of lanes, in turn, compilation apart.

    Args:
      build: `build(lanes) -> algorithm`, such as
        `lambda lanes: fl.fed_avg(model, optax.sgd(0.1), lanes=lanes)`.
      key: Key of the round.
      state: State that the round starts from.
      cohort: A typical cohort.
      candidates: Numbers of lanes; the powers of two up to the cohort's capacity, and up to 256,
        by default.
      repeats: How often each is measured.

    Raises:
      ValueError: There are no candidates, or one is below 1.

    >>> import jax, optax, fedjax_lite as fl
    >>> model = fl.models.halfspace_classifier()
    >>> build = lambda lanes: fl.fed_sgd(model, optax.sgd(0.1), lanes=lanes)
    >>> state = build(1).init(jax.random.key(0))
    >>> cohort = fl.cohort(jax.random.key(1), fl.data.halfspace(), 4)
    >>> tuned = tune_lanes(build, jax.random.key(2), state, cohort, candidates=(1, 4))
    >>> tuned.lanes in (1, 4), sorted(tuned.seconds)
    (True, [1, 4])
    """
    if candidates is None:
        candidates = [lanes for lanes in CANDIDATES if lanes <= cohort.capacity]
    if not candidates:
        raise ValueError("candidates is empty; pass at least one number of lanes.")
    repeats = _validate.integer("repeats", repeats, minimum=1)
    algorithms = {n: build(_validate.integer("candidates", n, minimum=1)) for n in candidates}
    for algorithm in algorithms.values():
        _validate.instance("what build returned", algorithm, FederatedAlgorithm)
    rounds = {lanes: algorithm.round for lanes, algorithm in algorithms.items()}

    def seconds(lanes: int) -> float:
        began = time.perf_counter()
        try:
            jax.block_until_ready(rounds[lanes](key, state, cohort))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return math.inf
        return time.perf_counter() - began

    # The first time around compiles.
    fitting = {lanes for lanes in rounds if seconds(lanes) < math.inf}
    times = [{lanes: seconds(lanes) for lanes in fitting} for _ in range(repeats)]
    medians = {
        lanes: statistics.median(run[lanes] for run in times) if lanes in fitting else math.inf
        for lanes in rounds
    }
    # Of several processes, all take what the first one has measured.
    medians = dict(zip(medians, shared([*medians.values()]), strict=True))
    return TunedLanes(min(medians, key=medians.__getitem__), medians)
