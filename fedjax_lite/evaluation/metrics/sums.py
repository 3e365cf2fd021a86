"""Metrics as sums over examples, and what every metric is built from."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.base import Batch, PyTree
from fedjax_lite.xla import precision

P = ParamSpec("P")


class Metric(NamedTuple):
    """A metric: what to add up over examples, and what to make of the total.

    Attributes:
      from_batch: `from_batch(predictions, batch) -> sums`, a pytree of arrays that add up leaf by
        leaf. Examples that `batch["mask"]` leaves out must contribute exactly zero, even if they
        are NaN. The sums of no examples are zeros.
      result: `result(sums) -> value`, a scalar or an array; means of no examples are NaN.

    >>> import jax.numpy as jnp
    >>> import fedjax_lite as fl
    >>> metric = fl.metrics.accuracy()
    >>> logits, batch = jnp.eye(2), {"y": jnp.array([0, 0]), "mask": jnp.array([True, True])}
    >>> sums = metric.zero(logits, batch)
    >>> for _ in range(3):
    ...     sums = metric.merge(sums, metric.from_batch(logits, batch))
    >>> float(metric.result(sums))
    0.5
    """

    from_batch: Callable[[Any, Batch], PyTree]
    result: Callable[[PyTree], jax.Array]

    def zero(self, predictions: Any, batch: Batch) -> PyTree:
        """The sums of no examples, in the shapes that those of such a batch have."""
        shapes = jax.eval_shape(self.from_batch, predictions, batch)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def merge(self, sums: PyTree, others: PyTree) -> PyTree:
        """The sums of two sets of examples together."""
        return jax.tree.map(jnp.add, sums, others)


def memoized(factory: Callable[P, Metric]) -> Callable[P, Metric]:
    """Equal arguments give the same metric, so that functions compiled for it are found again."""
    cached = functools.lru_cache(maxsize=None)(factory)

    @functools.wraps(factory)
    def build(*args: P.args, **kwargs: P.kwargs) -> Metric:
        def freeze(x: Any) -> Any:
            return tuple(x) if isinstance(x, list) else x

        return cached(*map(freeze, args), **{name: freeze(x) for name, x in kwargs.items()})

    return build


def pooled(
    values: Callable[[Any, Batch], tuple[jax.Array, jax.Array]],
    finish: Callable[[jax.Array], jax.Array] = lambda mean: mean,
    dtype: Any = float,
) -> Metric:
    """The mean of `(values, which count)`, arrays of one shape, over all batches."""

    def from_batch(predictions: Any, batch: Batch) -> PyTree:
        x, counted = values(predictions, batch)
        total = jnp.where(counted, x, 0).sum(dtype=dtype)
        return {"total": total, "count": counted.sum(dtype=jnp.uint32)}

    return Metric(from_batch, lambda sums: finish(sums["total"] / sums["count"]))


def over(mask: jax.Array, like: jax.Array) -> jax.Array:
    """The mask `[batch]` for each entry of `like [batch, ...]`."""
    return jnp.broadcast_to(mask.reshape((-1,) + (1,) * (like.ndim - 1)), like.shape)


def unless_invalid(sums: PyTree, result: jax.Array) -> jax.Array:
    """The result, or NaN if an example was of no class or domain."""
    return jnp.where(sums["invalid"] > 0, jnp.nan, result)


@memoized
def mean(function: Callable[[Any, Batch], jax.Array]) -> Metric:
    """A metric of one's own: the mean of a function over the examples.

    Args:
      function: `function(predictions, batch) -> values [batch]`, one per example. A function that
        is kept, not written anew for each call, is compiled once.

    >>> import jax.numpy as jnp
    >>> confidence = mean(lambda predictions, batch: predictions.max(-1))
    >>> batch = {"mask": jnp.array([True, True, False])}
    >>> sums = confidence.from_batch(jnp.array([[1.0, 3.0], [5.0, 2.0], [9.0, 9.0]]), batch)
    >>> float(confidence.result(sums))
    4.0
    """

    def values(predictions: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        x = function(predictions, batch)
        _validate.per_example("function of fl.metrics.mean", x.shape, batch["mask"].shape[0])
        return x, batch["mask"]

    return pooled(values)


@memoized
def by_domain(metric: Metric, num_domains: int, feature: str = "domain") -> Metric:
    """A metric for each domain: results `[num_domains, ...]`, NaN for those without examples.

    Args:
      metric: The metric.
      num_domains: Number of domains.
      feature: Name of the feature with the domain of each example, integers `[batch]`; one that
        is no domain makes all results NaN.

    Raises:
      ValueError: `num_domains` is not positive.
      TypeError: `metric` is no `Metric`.

    >>> import jax.numpy as jnp
    >>> import fedjax_lite as fl
    >>> accuracies = by_domain(fl.metrics.accuracy(), 3)
    >>> batch = {"y": jnp.array([0, 0]), "domain": jnp.array([0, 2]), "mask": jnp.ones(2, bool)}
    >>> accuracies.result(accuracies.from_batch(jnp.eye(2), batch)).tolist()
    [1.0, nan, 0.0]
    """
    _validate.instance("metric", metric, Metric)
    num_domains = _validate.integer("num_domains", num_domains, minimum=1)

    def from_batch(predictions: Any, batch: Batch) -> PyTree:
        domains, mask = batch[feature], batch["mask"]
        _validate.per_example(f"feature {feature!r}", domains.shape, mask.shape[0])

        def of_domain(domain: jax.Array) -> PyTree:
            return metric.from_batch(predictions, {**batch, "mask": mask & (domains == domain)})

        invalid = mask & ((domains < 0) | (domains >= num_domains))
        return {
            "domains": jax.vmap(of_domain)(jnp.arange(num_domains)),
            "invalid": invalid.sum(dtype=jnp.uint32),
        }

    def result(sums: PyTree) -> jax.Array:
        return unless_invalid(sums, jax.vmap(metric.result)(sums["domains"]))

    return Metric(from_batch, result)


def aligned(
    predictions: jax.Array, batch: Batch, label: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Predictions and targets of one shape, in float32 at least, and which entries count."""
    target = batch[label]
    if predictions.shape == (*target.shape, 1):
        predictions = predictions[..., 0]
    if predictions.shape != target.shape:  # They would broadcast.
        raise ValueError(
            f"feature {label!r} has shape {target.shape} beside predictions of shape"
            f" {predictions.shape}; give both one shape."
        )
    return precision.widen(predictions), precision.widen(target), over(batch["mask"], target)
