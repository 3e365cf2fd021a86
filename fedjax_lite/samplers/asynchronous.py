"""Clients that come back when they are done, to a server that does not wait for all of them.

Who is done when does not depend on what is trained. So the schedule is computed before, on the
host, and a step of the server is a round like any other, whose clients start from older params.
"""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.samplers._select import Sampler, Selection, check_clients, check_integer
from fedjax_lite.samplers.durations import Durations

_BLOCK = 4096  # Candidates that are drawn at a time.


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Who trained when, and what the server made of it.

    Attributes:
      client_ids: `[rounds, buffer]`, whose updates each step of the server takes, in the order in
        which they arrived.
      staleness: `[rounds, buffer]`, how many steps the server took while they trained.
      started: `[rounds, buffer]`, when they started, in simulated seconds.
      ended: `[rounds, buffer]`, when they arrived.
      concurrency: `[rounds]`, how many clients were training when the step was taken, those
        included that had just arrived and not started again.
      num_stale: `[rounds]`, how many updates came too late since the last step, and were dropped.
      wasted_seconds: `[rounds]`, how long their clients had trained, added up.
      num_refused: `[rounds]`, how many clients came since then while as many trained as may.
      max_staleness: How many rounds old the params are at most that somebody has started from,
        those included who still train after the last step: a run can go on from there.
      settings: What `fed_buff` was told, but for how many steps there are.
      draws: `[candidates, 2]`, the first clients that may start, and how long they would train: two
        schedules of the same draws and settings begin alike, whatever their lengths.
    """

    client_ids: np.ndarray
    staleness: np.ndarray
    started: np.ndarray
    ended: np.ndarray
    concurrency: np.ndarray
    num_stale: np.ndarray
    wasted_seconds: np.ndarray
    num_refused: np.ndarray
    max_staleness: int
    settings: dict[str, Any]
    draws: np.ndarray


def fed_buff(
    num_clients: int,
    num_rounds: int,
    *,
    concurrency: int,
    buffer_size: int,
    durations: Durations,
    arrivals: Literal["as_one_ends", "constant", "poisson"] = "as_one_ends",
    rate: float | None = None,
    max_staleness: int | None = None,
    num_examples: ArrayLike = 1,
    seed: int = 0,
) -> Sampler:
    r"""FedBuff: the server takes a step whenever a buffer of updates is full.

    Up to $C$ clients train at a time, each from the params that were the newest when it started. An
    update that arrives goes into the buffer; with the $B$-th one the server takes a step, a round,
    and the buffer is empty again. An update's staleness is the number of steps that the server took
    since its client started. At one moment, all that end do so before others start. More rounds
    are the same ones, and others after them, so that a run of a few can be made longer.

    Its clients are drawn uniformly from those that do not train. One that comes back twice before
    the buffer is full is in it twice.

    Build the algorithm with `max_staleness=sampler.max_staleness`, weigh updates by
    `fl.polynomial_staleness(0.5)` or another such transform, and divide by what you mean, since
    implementations differ: `reducer=fl.weighted_mean(denominator=B)` is the paper's mean over the
    buffer, `fl.weighted_mean()` divides by the weights (FedScale), and
    `fl.weighted_mean(denominator=1)` adds up (FLSim). The latter with `buffer_size=1`,
    `fl.mix_models()` and `optax.sgd(alpha)` is FedAsync.

    Sources: Nguyen et al. (2022), "Federated Learning with Buffered Asynchronous Aggregation"; Xie
    et al. (2019), "Asynchronous Federated Optimization".

    Args:
      num_clients: Size of the population.
      num_rounds: How many steps of the server there will be.
      concurrency: The most clients $C$ that train at a time.
      buffer_size: How many updates $B$ the server waits for.
      durations: How long clients take.
      arrivals: When clients start: `"as_one_ends"`, $C$ of them at once, and another one whenever
        one ends; `"constant"`, one every `1 / rate` seconds; `"poisson"`, after exponential times
        of that mean. Of the latter, those are refused who come while $C$ train.
      rate: Clients that come in a second; not with `"as_one_ends"`.
      max_staleness: Updates that are staler are dropped and counted. By default none is.
      num_examples: `[clients]`, for durations that are `per_example`.
      seed: Of the clients, their durations, and arrivals.

    Returns:
      A sampler of `num_rounds` rounds, whose `schedule` is a `Schedule`. Its key is not used.
      Records have `round_seconds`, `wall_clock`, `staleness` (the mean), `concurrency`,
      `num_stale`, `wasted_seconds` and `num_refused`.

    Raises:
      ValueError: An argument is out of range; a duration is not finite, or negative.

    >>> import jax, fedjax_lite as fl
    >>> sampler = fed_buff(9, 3, concurrency=2, buffer_size=1, durations=fl.durations.constant(2.0))
    >>> [int(sampler.select(jax.random.key(0), r).staleness[0]) for r in range(3)]
    [0, 1, 0]
    """
    num_clients = check_clients(num_clients)
    num_rounds = _validate.integer("num_rounds", num_rounds, minimum=1)
    concurrency = _validate.integer("concurrency", concurrency, minimum=1, maximum=num_clients)
    buffer_size = _validate.integer("buffer_size", buffer_size, minimum=1)
    _validate.instance("durations", durations, Durations, "fl.durations.log_normal(1.0)")
    _validate.choice("arrivals", arrivals, ("as_one_ends", "constant", "poisson"))
    if (arrivals == "as_one_ends") != (rate is None):
        raise ValueError(
            f"rate is {rate} with arrivals={arrivals!r}; pass it with 'constant' and 'poisson'"
            " arrivals, and not with 'as_one_ends'."
        )
    if rate is not None:
        rate = _validate.number("rate", rate, positive=True)
    if max_staleness is not None:
        max_staleness = _validate.integer("max_staleness", max_staleness, minimum=0)
    sizes = np.broadcast_to(np.asarray(num_examples), num_clients)
    candidates = _Candidates(num_clients, durations, sizes, seed)
    times = None if rate is None else _arrivals(arrivals, rate, seed)
    settings = {
        **{"concurrency": concurrency, "buffer_size": buffer_size, "max_staleness": max_staleness},
        **{"arrivals": arrivals, "arrival_rate": rate},
    }
    rows, counts, oldest = _simulate(
        candidates, num_rounds, concurrency, buffer_size, times, max_staleness
    )
    client_ids, staleness = np.moveaxis(rows[..., :2].astype(np.int32), -1, 0)
    started, ended = np.moveaxis(rows[..., 2:], -1, 0)
    training, num_stale, wasted, num_refused = counts.T
    schedule = Schedule(
        *(client_ids, staleness, started, ended, training.astype(np.int32)),
        *(num_stale.astype(np.int32), wasted, num_refused.astype(np.int32)),
        max_staleness=max(oldest, int(staleness.max())),
        settings=settings,
        draws=np.stack(candidates.block(0), 1),
    )
    return _following(schedule, num_clients)


class _Candidates:
    """Clients in a random order without end, and how long each would train."""

    def __init__(
        self, num_clients: int, durations: Durations, num_examples: np.ndarray, seed: int
    ) -> None:
        self._key, self._blocks = jax.random.key(seed), 0
        self._ids: list[int] = []
        self._seconds: list[float] = []

        @jax.jit
        def draw(block: jax.Array) -> tuple[jax.Array, jax.Array]:
            key_ids, key_times = jax.random.split(jax.random.fold_in(self._key, block))
            ids = jax.random.randint(key_ids, (_BLOCK,), 0, num_clients, jnp.int32)
            keys = jax.random.split(key_times, _BLOCK)
            return ids, jax.vmap(durations.seconds)(keys, ids, jnp.asarray(num_examples)[ids])

        self._draw = draw

    def block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Some of them, and their seconds."""
        ids, seconds = jax.device_get(self._draw(number))
        if not (np.isfinite(seconds) & (seconds >= 0)).all():
            raise ValueError(
                f"durations are between {seconds.min()} and {seconds.max()}; return finite seconds"
                " that are not negative."
            )
        return ids, seconds

    def next(self, busy: set[int]) -> tuple[int, float]:
        """The next one that does not train."""
        while True:
            if not self._ids:
                block = self.block(self._blocks)
                self._ids, self._seconds = (values.tolist()[::-1] for values in block)
                self._blocks += 1
            client, seconds = self._ids.pop(), self._seconds.pop()
            if client not in busy:
                return client, seconds


def _arrivals(kind: str, rate: float, seed: int) -> Iterator[float]:
    """When clients come."""
    rng = np.random.default_rng(seed)
    between: Iterator[float] = itertools.repeat(1 / rate)
    if kind == "poisson":
        blocks = (rng.exponential(1 / rate, _BLOCK).tolist() for _ in itertools.count())
        between = itertools.chain.from_iterable(blocks)
    return itertools.accumulate(between)


def _simulate(
    candidates: _Candidates,
    num_rounds: int,
    concurrency: int,
    buffer_size: int,
    arrivals: Iterator[float] | None,
    max_staleness: int | None,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Lets clients start and end, event by event, until the server has taken its steps.

    Returns:
      Of each step `[rounds, buffer, 4]`, whose updates it takes, how stale they are, and when they
      started and ended; `[rounds, 4]`, how many train, how many came too late and how long they had
      trained, how many were refused; and how old the params are at most of those who train on.
    """
    # A heap: the end, in which order it started, who, the start, the version.
    training: list[tuple[float, int, int, float, int]] = []
    busy: set[int] = set()
    order = itertools.count()
    buffer: list[tuple[int, int, float, float]] = []
    rows: list[list[tuple[int, int, float, float]]] = []
    counts: list[tuple[int, int, float, int]] = []
    num_stale = num_refused = 0
    wasted = 0.0

    def start(now: float) -> None:
        client, seconds = candidates.next(busy)
        heapq.heappush(training, (now + seconds, next(order), client, now, len(rows)))
        busy.add(client)

    coming = 0.0 if arrivals is None else next(arrivals)
    if arrivals is None:
        for _ in range(concurrency):
            start(0.0)
        coming = math.inf
    while len(rows) < num_rounds:
        now = min(training[0][0] if training else math.inf, coming)
        num_ended = 0
        while training and training[0][0] <= now and len(rows) < num_rounds:
            end, _, client, began, version = heapq.heappop(training)
            busy.discard(client)
            num_ended += 1
            staleness = len(rows) - version
            if max_staleness is not None and staleness > max_staleness:
                num_stale, wasted = num_stale + 1, wasted + end - began
                continue
            buffer.append((client, staleness, began, end))
            if len(buffer) == buffer_size:
                counts.append((len(training) + num_ended, num_stale, wasted, num_refused))
                rows.append(buffer)
                buffer, num_stale, wasted, num_refused = [], 0, 0.0, 0
        if arrivals is None:
            for _ in range(num_ended):
                start(now)
        elif coming <= now:
            if len(training) < concurrency:
                start(now)
            else:
                num_refused += 1
            coming = next(arrivals)
    oldest = max((num_rounds - version for *_, version in training), default=0)
    if max_staleness is not None:
        oldest = min(oldest, max_staleness)  # Those that are older come in vain.
    return np.array(rows), np.array(counts), oldest


def _following(schedule: Schedule, num_clients: int) -> Sampler:
    """The sampler of a schedule."""
    num_rounds, buffer_size = schedule.client_ids.shape
    clock = schedule.ended.max(1)
    metrics = {
        "round_seconds": np.diff(clock, prepend=0.0).astype(np.float32),
        "staleness": schedule.staleness.mean(1, dtype=np.float32),
        "wasted_seconds": schedule.wasted_seconds.astype(np.float32),
        **{name: getattr(schedule, name) for name in ("concurrency", "num_stale", "num_refused")},
    }

    @jax.jit
    def select(key: jax.Array, round: ArrayLike) -> Selection:
        _validate.key("key", key)
        row = check_integer("round", round).astype(jnp.int32)

        def read(values: np.ndarray, beyond: int) -> jax.Array:
            return jnp.asarray(values).at[row].get(mode="fill", fill_value=beyond)

        return Selection(
            client_ids=read(schedule.client_ids, -1),
            probabilities=jnp.full(
                buffer_size, jnp.nan
            ),  # Not known: it depends on how fast all are.
            num_dropped=jnp.int32(0),
            staleness=read(schedule.staleness, 0),
            metrics={name: read(values, 0) for name, values in metrics.items()},
        )

    return Sampler(
        select,
        num_clients,
        buffer_size,
        max_staleness=schedule.max_staleness,
        num_rounds=num_rounds,
        schedule=schedule,
    )
