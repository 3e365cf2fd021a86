"""Metrics of real-valued predictions beside targets `[batch, ...]`."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_lite.base import Batch, PyTree
from fedjax_lite.evaluation.metrics.sums import Metric, aligned, memoized, pooled


@memoized
def mean_squared_error(label: str = "y") -> Metric:
    """The mean of the squared errors.

    Args:
      label: Name of the feature with the targets `[batch, ...]`. Predictions have their shape, or
        one more axis of length 1; all entries of a target count alike.
    """
    return pooled(functools.partial(_errors, label=label, function=jnp.square))


@memoized
def root_mean_squared_error(label: str = "y") -> Metric:
    """The square root of the mean of the squared errors, over all batches.

    Args:
      label: As for `mean_squared_error`.
    """
    squared = functools.partial(_errors, label=label, function=jnp.square)
    return pooled(squared, finish=jnp.sqrt)


@memoized
def mean_absolute_error(label: str = "y") -> Metric:
    """The mean of the absolute errors.

    Args:
      label: As for `mean_squared_error`.
    """
    return pooled(functools.partial(_errors, label=label, function=jnp.abs))


@memoized
def r_squared(label: str = "y", *, center: float = 0.0) -> Metric:
    r"""The coefficient of determination, $1 - \sum (y - p)^2 / \sum (y - \bar y)^2$.

    Args:
      label: As for `mean_squared_error`.
      center: A number near the mean of the targets, for accuracy only: where the mean is a
        hundred standard deviations from it, float32 loses four digits.
    """

    def from_batch(predictions: jax.Array, batch: Batch) -> PyTree:
        predictions, target, counted = aligned(predictions, batch, label)
        y = jnp.where(counted, target - center, 0)
        error = jnp.where(counted, target - predictions, 0)
        return {
            "count": counted.sum(dtype=jnp.uint32),
            "target": y.sum(dtype=float),
            "target_squared": (y**2).sum(dtype=float),
            "error_squared": (error**2).sum(dtype=float),
        }

    def result(sums: PyTree) -> jax.Array:
        variation = sums["target_squared"] - sums["target"] ** 2 / sums["count"]
        return 1 - sums["error_squared"] / variation

    return Metric(from_batch, result)


def _errors(
    predictions: jax.Array,
    batch: Batch,
    *,
    label: str,
    function: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    predictions, target, counted = aligned(predictions, batch, label)
    return function(target - predictions), counted
