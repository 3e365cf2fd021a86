"""Rounds in which the server does not wait for everyone, or not everyone stays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.samplers._select import Sampler, Selection
from fedjax_lite.samplers.durations import Durations
from fedjax_lite.xla import random

_KEY_TIMES, _KEY_LEAVING = 0x71AE, 0x1EAF  # Purposes, of the keys that derive from the sampler's.


def timed(sampler: Sampler, durations: Durations, *, num_examples: ArrayLike = 1) -> Sampler:
    """The same clients, with a clock: a round takes as long as the slowest of them.

    Around any sampler that has no clock yet: those of `fed_buff`, `over_selected` and `timed_out`
    know how long their rounds take.

    Args:
      sampler: Who takes part.
      durations: How long clients take.
      num_examples: `[clients]`, for durations that are `per_example`.

    Returns:
      The sampler, whose records have `round_seconds` and `wall_clock`.

    Raises:
      ValueError: `sampler` has a clock.
      TypeError: An argument is of another type.

    >>> import jax, fedjax_lite as fl
    >>> clocked = timed(fl.samplers.uniform(9, 3), fl.durations.constant(2.0))
    >>> float(clocked.select(jax.random.key(0), 0).metrics["round_seconds"])
    2.0
    """
    seconds_of = _seconds(sampler, durations, num_examples)
    _refuse_clock(sampler)

    def change(key: jax.Array, selection: Selection) -> Selection:
        seconds = seconds_of(key, selection.client_ids)
        return _reported(selection, round_seconds=seconds.max())

    return _changed(sampler, change)


def over_selected(
    sampler: Sampler, durations: Durations, keep: int, *, num_examples: ArrayLike = 1
) -> Sampler:
    r"""Of the clients asked, the first ones that are done.

    Ask $K / (1 - r)$ clients for $K$ of them, with $r$ the share that may be late. Slow clients
    take part less often, so that means over those who are done are biased towards the fast ones.

    Source: Bonawitz et al. (2019), "Towards Federated Learning at Scale: System Design".

    Args:
      sampler: Whom the server asks. If there is a deadline, too, it goes around:
        `timed_out(over_selected(...), ...)`.
      durations: How long they take.
      keep: For how many of them it waits, $K$.
      num_examples: `[clients]`, for durations that are `per_example`.

    Returns:
      The sampler, with `keep` slots. Records have `round_seconds`, `wall_clock`, and of those who
      had begun in vain their number, `num_late`, and `wasted_seconds`, which they trained for until
      the round ended.

    Raises:
      ValueError: `keep` is out of range, or `sampler` has a clock.

    >>> import jax, fedjax_lite as fl
    >>> fast = over_selected(fl.samplers.uniform(9, 4), fl.durations.exponential(), keep=3)
    >>> selection = fast.select(jax.random.key(0), 0)
    >>> selection.client_ids.shape, int(selection.metrics["num_late"])
    ((3,), 1)
    """
    keep = _validate.integer("keep", keep, minimum=1, maximum=sampler.capacity)
    seconds_of = _seconds(sampler, durations, num_examples)
    _refuse_clock(sampler)

    def change(key: jax.Array, selection: Selection) -> Selection:
        seconds = seconds_of(key, selection.client_ids)
        is_there = selection.client_ids >= 0
        order = jnp.argsort(jnp.where(is_there, seconds, jnp.inf), stable=True)[:keep]
        kept = _with_slots(selection, lambda x: x[order])
        round_seconds = seconds[order].max()
        num_late = jnp.maximum(is_there.sum() - keep, 0)
        return _reported(
            kept,
            round_seconds=round_seconds,
            num_late=num_late,
            wasted_seconds=num_late * round_seconds,
        )

    return _changed(sampler, change)._replace(capacity=keep, scheme=None, rate=None)


def timed_out(
    sampler: Sampler,
    durations: Durations,
    deadline: float,
    *,
    num_steps: ArrayLike,
    num_examples: ArrayLike = 1,
) -> Sampler:
    r"""Clients stop at a deadline, and send what they have come to.

    A client that would take $t$ seconds for its $T$ steps takes $\lfloor T \min(1, D / t) \rfloor$
    of them. One that does not finish any is left out. Weigh clients by `weighting="processed"`, the
    examples that they processed, or use FedNova.

    Args:
      sampler: Who takes part.
      durations: How long all of a client's steps take.
      deadline: $D$, positive seconds.
      num_steps: How many local steps clients take without a deadline, a number or `[clients]`.
      num_examples: `[clients]`, for durations that are `per_example`.

    Returns:
      The sampler. Records have `round_seconds`, `wall_clock`, and `num_cut`, how many clients were
      stopped.

    Raises:
      ValueError: `deadline` is not positive, or `sampler` is that of a schedule.

    >>> import jax, fedjax_lite as fl
    >>> slow = fl.durations.constant(10.0)
    >>> cut = timed_out(fl.samplers.uniform(9, 2), slow, deadline=5.0, num_steps=8)
    >>> cut.select(jax.random.key(0), 0).max_steps.tolist()
    [4, 4]
    """
    deadline = _validate.number("deadline", deadline, positive=True)
    if sampler.schedule is not None:
        raise ValueError(
            "sampler has a schedule, which would not know of a deadline; pass durations that are"
            " shorter to fl.samplers.fed_buff."
        )
    seconds_of = _seconds(sampler, durations, num_examples)
    steps = np.broadcast_to(np.asarray(num_steps, np.int32), sampler.num_clients)

    def change(key: jax.Array, selection: Selection) -> Selection:
        seconds = seconds_of(key, selection.client_ids)
        share = jnp.minimum(deadline / jnp.maximum(seconds, jnp.finfo(jnp.float32).tiny), 1)
        planned = jnp.asarray(steps)[selection.client_ids]
        done = jnp.floor(share * planned).astype(jnp.int32)
        if selection.max_steps is not None:
            done = jnp.minimum(done, selection.max_steps)
        return _reported(
            selection._replace(max_steps=done),
            round_seconds=jnp.minimum(seconds.max(), deadline),
            num_cut=((selection.client_ids >= 0) & (seconds > deadline)).sum(),
        )

    return _changed(sampler, change)


def dropping_out(sampler: Sampler, probability: float) -> Sampler:
    r"""Each client on a coin of its own leaves in the course of a round, and sends nothing.

    Those who stay are a uniform choice of those who were chosen; `probabilities` are multiplied
    with $1 - p$.

    Args:
      sampler: Who is chosen.
      probability: $p$, that one leaves, within [0, 1).

    Returns:
      The sampler, whose records have `num_left`.

    Raises:
      ValueError: `probability` is out of range.

    >>> import jax, fedjax_lite as fl
    >>> leaving = dropping_out(fl.samplers.everyone(1000), 0.25)
    >>> 200 < int(leaving.select(jax.random.key(0), 0).metrics["num_left"]) < 300
    True
    """
    probability = _validate.number("probability", probability)
    if not probability < 1:
        raise ValueError(f"probability is {probability}; choose a number within [0, 1).")

    def change(key: jax.Array, selection: Selection) -> Selection:
        keys = random.fold_in_pair(key, _KEY_LEAVING, selection.client_ids)
        leaves = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys) < probability
        return _without(selection, leaves, 1 - probability)

    return _changed(sampler, change)


def by_day_and_night(
    sampler: Sampler, period: int, *, awake: float = 0.5, by_client: bool = True
) -> Sampler:
    r"""Clients take part at certain times of a day only.

    Client $i$ is available in round $r$ if $(r / P + \phi_i) \bmod 1 < a$, with a phase $\phi_i$ of
    its own, as of its time zone; or none, and then nobody takes part at night.

    Args:
      sampler: Who is asked; those who are not available do not take part.
      period: $P$, how many rounds a day has.
      awake: $a$, the share of the day in which a client is available, above 0, at most 1.
      by_client: Whether each client has a phase of its own.

    Returns:
      The sampler, whose records have `num_left`, those who were asked in vain.

    Raises:
      ValueError: A number is out of range.

    >>> import jax, fedjax_lite as fl
    >>> nightly = by_day_and_night(fl.samplers.everyone(8), 10, awake=0.3, by_client=False)
    >>> [int((nightly.select(jax.random.key(0), r).client_ids >= 0).sum()) for r in (0, 5, 12)]
    [8, 0, 8]
    """
    period = _validate.integer("period", period, minimum=1)
    awake = _validate.number("awake", awake, positive=True, maximum=1.0)
    _validate.choice("by_client", by_client, (True, False))

    def select(key: jax.Array, round: ArrayLike) -> Selection:
        selection = sampler.select(key, round)
        phase: Any = 0.0
        if by_client:
            own = random.fold_in_pair(jax.random.key(_KEY_LEAVING), 0, selection.client_ids)
            phase = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(own)
        # In whole rounds first: a float32 has no thirds of large numbers.
        time = (jnp.asarray(round, jnp.uint32) % period).astype(jnp.float32) / period + phase
        return _without(selection, time % 1 >= awake, awake)

    return sampler._replace(select=jax.jit(select), scheme=None, rate=None)


def available(sampler: Sampler, trace: ArrayLike) -> Sampler:
    """Clients take part when a trace says that they are there.

    Args:
      sampler: Who is asked; those who are not available do not take part.
      trace: `[times, clients]`, bool: who is there in each round. After the last one it begins
        anew.

    Returns:
      The sampler, whose records have `num_left`, those who were asked in vain. Probabilities are
      those of being asked.

    Raises:
      ValueError: `trace` is of another shape.

    >>> import jax, fedjax_lite as fl
    >>> there = available(fl.samplers.everyone(3), [[True, False, True], [False, True, False]])
    >>> [sorted(there.select(jax.random.key(0), r).client_ids.tolist()) for r in (1, 2)]
    [[-1, -1, 1], [-1, 0, 2]]
    """
    _validate.instance("sampler", sampler, Sampler, "fl.samplers.uniform(num_clients, 10)")
    table = np.asarray(trace, bool)
    if table.ndim != 2 or not len(table) or table.shape[1] != sampler.num_clients:
        raise ValueError(
            f"trace has shape {table.shape}; pass [times, clients], with {sampler.num_clients}"
            " clients."
        )

    def select(key: jax.Array, round: ArrayLike) -> Selection:
        selection = sampler.select(key, round)
        there = jnp.asarray(table)[jnp.asarray(round, jnp.uint32) % len(table)]
        return _without(selection, ~there[selection.client_ids], 1.0)

    return sampler._replace(select=jax.jit(select), scheme=None, rate=None)


def _seconds(
    sampler: Sampler, durations: Durations, num_examples: ArrayLike
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """How long the clients of a selection take; no time for empty slots."""
    _validate.instance("sampler", sampler, Sampler, "fl.samplers.uniform(num_clients, 10)")
    _validate.instance("durations", durations, Durations, "fl.durations.log_normal(1.0)")
    sizes = np.broadcast_to(np.asarray(num_examples), sampler.num_clients)

    def seconds(key: jax.Array, client_ids: jax.Array) -> jax.Array:
        keys = random.fold_in_pair(key, _KEY_TIMES, client_ids)
        drawn = jax.vmap(durations.seconds)(keys, client_ids, jnp.asarray(sizes)[client_ids])
        return jnp.where(client_ids >= 0, drawn, 0)

    return seconds


def _refuse_clock(sampler: Sampler) -> None:
    """Refuses a sampler that knows how long its rounds take."""
    metrics = jax.eval_shape(sampler.select, jax.random.key(0), 0).metrics
    if "round_seconds" in metrics:
        raise ValueError(
            "sampler has a clock of its own; leave one of the two out, or put fl.samplers.timed_out"
            " around fl.samplers.over_selected."
        )


def _changed(sampler: Sampler, change: Callable[[jax.Array, Selection], Selection]) -> Sampler:
    """The sampler whose selections are changed, by a key of the round."""

    @jax.jit
    def select(key: jax.Array, round: ArrayLike) -> Selection:
        selection = sampler.select(key, round)
        return change(random.fold_in_pair(key, 0, jnp.asarray(round)), selection)

    return sampler._replace(select=select)


def _with_slots(selection: Selection, move: Callable[[jax.Array], jax.Array]) -> Selection:
    """The selection with its slots moved."""
    per_slot = ("client_ids", "probabilities", "max_steps", "staleness")
    values = {name: getattr(selection, name) for name in per_slot}
    return selection._replace(**jax.tree.map(move, values))


def _without(selection: Selection, leaves: jax.Array, share: float) -> Selection:
    """The selection without those who leave, whose slots come last."""
    was_there = selection.client_ids >= 0
    stays = was_there & ~leaves
    kept = selection._replace(
        client_ids=jnp.where(stays, selection.client_ids, -1),
        probabilities=jnp.where(stays, share * selection.probabilities, 1),
    )
    order = jnp.argsort(~stays, stable=True)
    moved = _with_slots(kept, lambda x: x[order])
    return _reported(moved, num_left=(was_there & leaves).sum())


def _reported(selection: Selection, **metrics: jax.Array) -> Selection:
    return selection._replace(metrics={**selection.metrics, **metrics})
