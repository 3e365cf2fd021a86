"""Hostile clients that collude: what they know, and how what they send takes its place."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lite.base import Reducer, Stack
from fedjax_lite.updates.distances import mean_of
from fedjax_lite.updates.hostile import Counted, count_rows, membership
from fedjax_lite.updates.mixing import side_by_side
from fedjax_lite.xla.precision import root, squared_norm, widen

Info = dict[str, jax.Array]
Point = list[jax.Array]


class Honest(NamedTuple):
    """What those that collude know: the updates of all honest clients that count.

    Attributes:
      stack: All updates.
      counted: Which of them are honest and count.
      mean: Their mean; zero of none.
      num_hostile: The number of hostile clients with a weight, int32.
    """

    stack: Stack
    counted: Counted
    mean: Point
    num_hostile: jax.Array


def colluding(
    hostile: Any,
    seed: int,
    reducer: Reducer,
    send: Callable[[Honest], tuple[Point, Info]],
) -> Reducer:
    """A reducer of updates of which hostile ones are what `send` makes of the others."""
    is_hostile, inner = membership(hostile, seed), side_by_side(reducer)

    def stacked(stack: Stack) -> tuple[Point, Info]:
        changed = is_hostile(stack.client_ids) & (stack.weights > 0)
        marked = stack._replace(is_hostile=stack.is_hostile | changed)
        counted = count_rows(stack)
        rows = counted.rows & ~marked.is_hostile
        honest = Honest(
            stack,
            Counted(rows, rows.sum(dtype=jnp.int32), jnp.where(rows, counted.norms, 0)),
            [mean_of(rows, widen(x)) for x in stack.updates],
            marked.is_hostile.sum(dtype=jnp.int32),
        )
        sent, info = send(honest)
        updates = [
            jnp.where(changed[:, None], own.astype(x.dtype), x)
            for own, x in zip(sent, stack.updates, strict=True)
        ]
        aggregate, reported = inner(marked._replace(updates=updates))
        apart = [widen(x) - m for x, m in zip(aggregate, honest.mean, strict=True)]
        distance = root(stack.total(squared_norm(apart)))
        told = {"num_hostile": honest.num_hostile, "honest_distance": distance}
        return aggregate, {**info, **told, **reported}

    return Reducer(stacked=stacked, keeps_last=reducer.keeps_last, needs_clients=True)


def deviation(honest: Honest) -> Point:
    """The standard deviation of honest updates, with n - 1 below; zero of fewer than two."""
    rows, number, _ = honest.counted
    squares = [
        jnp.where(rows[:, None], jnp.square(widen(x) - mean), 0).sum(0)
        for x, mean in zip(honest.stack.updates, honest.mean, strict=True)
    ]
    return [root(x / jnp.maximum(number - 1, 1)) for x in squares]
