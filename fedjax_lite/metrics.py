"""Metrics as sums that merge: the same result however examples are split into batches.

A metric adds up what it needs to know of the examples of a batch. Sums of batches, clients and
devices are added leaf by leaf, and the result is taken of the total once. Counts are `uint32`,
exact up to 2^32 examples or tokens, where float32 would stand still at 2^24; hits are counts.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import optax

from fedjax_lite import _validate, precision
from fedjax_lite.base import Batch, PyTree

__all__ = [
    "Metric",
    "accuracy",
    "auc",
    "by_domain",
    "confusion_matrix",
    "cross_entropy",
    "label_rate",
    "mean",
    "mean_absolute_error",
    "mean_squared_error",
    "perplexity",
    "r_squared",
    "root_mean_squared_error",
    "top_k",
]


def __dir__() -> list[str]:
    return __all__


P = ParamSpec("P")


class Metric(NamedTuple):
    """A metric: what to add up over examples, and what to make of the total.

    Attributes:
      from_batch: `from_batch(predictions, batch) -> sums`, a pytree of arrays that add up leaf by
        leaf. Examples that `batch["mask"]` leaves out must contribute exactly zero, even if they
        are NaN. The sums of no examples are zeros.
      result: `result(sums) -> value`, a scalar or an array; means of no examples are NaN.

    >>> import jax.numpy as jnp
    >>> metric = accuracy()
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


def _memoized(factory: Callable[P, Metric]) -> Callable[P, Metric]:
    """Equal arguments give the same metric, so that functions compiled for it are found again."""
    cached = functools.lru_cache(maxsize=None)(factory)

    @functools.wraps(factory)
    def build(*args: P.args, **kwargs: P.kwargs) -> Metric:
        def freeze(x: Any) -> Any:
            return tuple(x) if isinstance(x, list) else x

        return cached(*map(freeze, args), **{name: freeze(x) for name, x in kwargs.items()})

    return build


def _pooled(
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


@_memoized
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

    return _pooled(values)


@_memoized
def accuracy(label: str = "y", *, ignore: Sequence[int] = (), barred: Sequence[int] = ()) -> Metric:
    """The share of labels that have the highest score.

    Predictions are scores `[batch, ..., classes]` of labels `[batch, ...]`: of an example, or of
    each token of a sequence. Of equal scores, the first counts as the highest.

    Args:
      label: Name of the feature with the labels.
      ignore: Labels that are left out, such as those of padding and of ends of sentences.
      barred: Classes that are never predicted, such as the unknown word: their labels count as
        missed, unless they are left out as well.

    >>> import jax.numpy as jnp
    >>> scores, y = jnp.eye(3)[jnp.array([[2, 1, 0]])], jnp.array([[2, 2, 0]])
    >>> without_padding = accuracy(ignore=(0,))
    >>> sums = without_padding.from_batch(scores, {"y": y, "mask": jnp.array([True])})
    >>> float(without_padding.result(sums))
    0.5
    """

    def hits(predictions: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        labels, counted = _labels(predictions, batch, label, ignore)
        return _bar(predictions, barred).argmax(-1) == labels, counted

    return _pooled(hits, dtype=jnp.uint32)


@_memoized
def top_k(
    k: int, label: str = "y", *, ignore: Sequence[int] = (), barred: Sequence[int] = ()
) -> Metric:
    """The share of labels that are among the `k` highest scores.

    Args:
      k: How many classes are named.
      label: As for `accuracy`.
      ignore: As for `accuracy`.
      barred: As for `accuracy`.

    Raises:
      ValueError: `k` is not positive; when it is used, `k` is above the number of classes.
    """
    k = _validate.integer("k", k, minimum=1)

    def hits(predictions: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        labels, counted = _labels(predictions, batch, label, ignore)
        _validate.integer("k", k, minimum=1, maximum=predictions.shape[-1])
        named = jax.lax.top_k(_bar(predictions, barred), k)[1]
        return (named == labels[..., None]).any(-1), counted

    return _pooled(hits, dtype=jnp.uint32)


@_memoized
def cross_entropy(label: str = "y", *, ignore: Sequence[int] = ()) -> Metric:
    """The mean negative log-likelihood of the labels, in nats.

    Args:
      label: Name of the feature with the labels. Predictions are logits, in shapes as for
        `accuracy`; a label that is no class makes the mean NaN.
      ignore: Labels that are left out.
    """
    return _pooled(functools.partial(_likelihood, label=label, ignore=ignore))


@_memoized
def perplexity(label: str = "y", *, ignore: Sequence[int] = ()) -> Metric:
    """The exponential of the mean negative log-likelihood over all tokens.

    Args:
      label: As for `cross_entropy`.
      ignore: Labels that are left out.
    """
    return _pooled(functools.partial(_likelihood, label=label, ignore=ignore), finish=jnp.exp)


@_memoized
def label_rate(ids: Sequence[int], label: str = "y", *, ignore: Sequence[int] = ()) -> Metric:
    """The share of labels that are among some: of unknown words, the out-of-vocabulary rate.

    Args:
      ids: The labels to count.
      label: Name of the feature with the labels, `[batch, ...]`.
      ignore: Labels that are left out of the whole, such as padding.
    """

    def hits(predictions: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        del predictions
        counted = _over(batch["mask"], batch[label]) & ~_among(batch[label], ignore)
        return _among(batch[label], ids), counted

    return _pooled(hits, dtype=jnp.uint32)


@_memoized
def confusion_matrix(num_classes: int, label: str = "y", *, ignore: Sequence[int] = ()) -> Metric:
    """How many labels of each class were taken for each class: `[true, predicted]`.

    Counts are exact in the sums, and floats in the result; a label that is no class makes all of
    it NaN.

    Args:
      num_classes: Number of classes, the last axis of the predictions.
      label: As for `accuracy`.
      ignore: Labels that are left out.

    Raises:
      ValueError: `num_classes` is not positive, or when it is used, not that of the predictions.
    """
    num_classes = _validate.integer("num_classes", num_classes, minimum=1)

    def from_batch(predictions: jax.Array, batch: Batch) -> PyTree:
        labels, counted = _labels(predictions, batch, label, ignore)
        if predictions.shape[-1] != num_classes:
            raise ValueError(
                f"num_classes is {num_classes}, but predictions have the shape"
                f" {predictions.shape}; pass the size of its last axis."
            )
        inside = (labels >= 0) & (labels < num_classes)
        cells = (labels, predictions.argmax(-1))
        return {
            "counts": _histogram(cells, counted & inside, (num_classes, num_classes)),
            "invalid": (counted & ~inside).sum(dtype=jnp.uint32),
        }

    return Metric(from_batch, lambda sums: _unless_invalid(sums, sums["counts"]))


@_memoized
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
    >>> accuracies = by_domain(accuracy(), 3)
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
        return _unless_invalid(sums, jax.vmap(metric.result)(sums["domains"]))

    return Metric(from_batch, result)


@_memoized
def auc(
    label: str = "y", *, low: float = -10.0, high: float = 10.0, num_bins: int = 2000
) -> Metric:
    r"""The area under the ROC curve: how often a positive scores above a negative.

    Scores are counted in bins, a pair in one bin as one half. With $p_b$ and $n_b$ positives and
    negatives in bin $b$, of $P$ and $N$, it is off by at most $\sum_b p_b n_b / (2 P N)$, and not
    at all where only equal scores share a bin, since ties count as one half as well.

    Args:
      label: Name of the feature with the labels `[batch]`, 0 and 1; another makes the area NaN,
        as does a score that is NaN. Predictions are scores `[batch]` or `[batch, 1]`, or logits
        `[batch, 2]`, whose difference is the score.
      low: Lower end of the bins; scores below share a bin of their own.
      high: Upper end, from which on scores share a bin. The bins suit logits; for probabilities,
        pass 0 and 1.
      num_bins: Number of bins between `low` and `high`.

    Raises:
      ValueError: `low` is not below `high`, `num_bins` is not positive; when it is used,
        predictions or labels are of another shape.
    """
    num_bins = _validate.integer("num_bins", num_bins, minimum=1)
    if not low < high:
        raise ValueError(f"low is {low} and high {high}; choose low below high.")

    def from_batch(predictions: jax.Array, batch: Batch) -> PyTree:
        mask = batch["mask"]
        if predictions.shape == (*mask.shape, 2):
            predictions = predictions[:, 1] - predictions[:, 0]
        scores, labels, _ = _aligned(predictions, batch, label)
        _validate.per_example("the model's predict", scores.shape, mask.shape[0])
        valid = ((labels == 0) | (labels == 1)) & ~jnp.isnan(scores)
        bins = jnp.floor((scores - low) / (high - low) * num_bins)
        # Clipped as floats: an infinity is no integer.
        bins = jnp.clip(jnp.where(valid, bins, 0), -1, num_bins).astype(jnp.int32) + 1
        cells = (labels.astype(jnp.int32), bins)
        return {
            "counts": _histogram(cells, mask & valid, (2, num_bins + 2)),
            "invalid": (mask & ~valid).sum(dtype=jnp.uint32),
        }

    def result(sums: PyTree) -> jax.Array:
        negatives, positives = sums["counts"]
        below = jnp.cumsum(negatives) - negatives
        share = (below + negatives / 2) / negatives.sum()
        return _unless_invalid(sums, (positives / positives.sum() * share).sum())

    return Metric(from_batch, result)


@_memoized
def mean_squared_error(label: str = "y") -> Metric:
    """The mean of the squared errors.

    Args:
      label: Name of the feature with the targets `[batch, ...]`. Predictions have their shape, or
        one more axis of length 1; all entries of a target count alike.
    """
    return _pooled(functools.partial(_errors, label=label, function=jnp.square))


@_memoized
def root_mean_squared_error(label: str = "y") -> Metric:
    """The square root of the mean of the squared errors, over all batches.

    Args:
      label: As for `mean_squared_error`.
    """
    squared = functools.partial(_errors, label=label, function=jnp.square)
    return _pooled(squared, finish=jnp.sqrt)


@_memoized
def mean_absolute_error(label: str = "y") -> Metric:
    """The mean of the absolute errors.

    Args:
      label: As for `mean_squared_error`.
    """
    return _pooled(functools.partial(_errors, label=label, function=jnp.abs))


@_memoized
def r_squared(label: str = "y", *, center: float = 0.0) -> Metric:
    r"""The coefficient of determination, $1 - \sum (y - p)^2 / \sum (y - \bar y)^2$.

    Args:
      label: As for `mean_squared_error`.
      center: A number near the mean of the targets, for accuracy only: where the mean is a
        hundred standard deviations from it, float32 loses four digits.
    """

    def from_batch(predictions: jax.Array, batch: Batch) -> PyTree:
        predictions, target, counted = _aligned(predictions, batch, label)
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


def _labels(
    predictions: jax.Array, batch: Batch, label: str, ignore: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """Labels `[batch, ...]`, and which of them count."""
    labels = batch[label]
    if predictions.shape[:-1] != labels.shape or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"feature {label!r} has shape {labels.shape} and dtype {labels.dtype} beside"
            f" predictions of shape {predictions.shape}; pass integer labels [batch, ...] and"
            " scores [batch, ..., classes]."
        )
    return labels, _over(batch["mask"], labels) & ~_among(labels, ignore)


def _aligned(
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
    return precision.widen(predictions), precision.widen(target), _over(batch["mask"], target)


def _errors(
    predictions: jax.Array,
    batch: Batch,
    *,
    label: str,
    function: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    predictions, target, counted = _aligned(predictions, batch, label)
    return function(target - predictions), counted


def _likelihood(
    predictions: jax.Array, batch: Batch, *, label: str, ignore: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """The negative log-likelihood of each label."""
    labels, counted = _labels(predictions, batch, label, ignore)
    inside = (labels >= 0) & (labels < predictions.shape[-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(
        precision.widen(predictions), jnp.where(inside, labels, 0)
    )
    return jnp.where(inside, losses, jnp.nan), counted


def _over(mask: jax.Array, like: jax.Array) -> jax.Array:
    """The mask `[batch]` for each entry of `like [batch, ...]`."""
    return jnp.broadcast_to(mask.reshape((-1,) + (1,) * (like.ndim - 1)), like.shape)


def _among(labels: jax.Array, ids: Sequence[int]) -> jax.Array:
    # Not a search in an array of them: if it is empty, XLA of jaxlib 0.11 crashes in shard_map.
    return functools.reduce(
        jnp.logical_or, (labels == i for i in ids), jnp.zeros(labels.shape, bool)
    )


def _bar(scores: jax.Array, barred: Sequence[int]) -> jax.Array:
    return jnp.where(_among(jnp.arange(scores.shape[-1]), barred), -jnp.inf, scores)


def _histogram(
    cells: tuple[jax.Array, ...], counted: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """How many that count fall into each cell of an array."""
    first, *rest = cells
    places = (jnp.where(counted, first, shape[0]), *rest)
    return jnp.zeros(shape, jnp.uint32).at[places].add(1, mode="drop")


def _unless_invalid(sums: PyTree, result: jax.Array) -> jax.Array:
    return jnp.where(sums["invalid"] > 0, jnp.nan, result)
