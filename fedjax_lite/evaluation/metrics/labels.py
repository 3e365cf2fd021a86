"""Metrics of scores `[batch, ..., classes]` beside integer labels `[batch, ...]`."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_lite import _validate
from fedjax_lite.base import Batch, PyTree
from fedjax_lite.evaluation.metrics.sums import (
    Metric,
    aligned,
    memoized,
    over,
    pooled,
    unless_invalid,
)
from fedjax_lite.xla import precision


@memoized
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

    return pooled(hits, dtype=jnp.uint32)


@memoized
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

    return pooled(hits, dtype=jnp.uint32)


@memoized
def recall_at(k: int, label: str = "y") -> Metric:
    """The share of labels that are among the `k` highest scores, where an example has several.

    Labels of all examples count alike, as in Reddi et al. (2021), "Adaptive Federated
    Optimization", whose metric of tags is the recall at 5.

    Args:
      k: How many labels are named for each example.
      label: Name of the feature with the labels, a yes or no for each: `[batch, ..., classes]`, in
        the shape of the scores.

    Raises:
      ValueError: `k` is not positive; when it is used, `k` is above the number of classes, or
        labels are of another shape.

    >>> import jax.numpy as jnp
    >>> scores, y = jnp.array([[3.0, 2.0, 1.0]]), jnp.array([[False, True, True]])
    >>> sums = recall_at(2).from_batch(scores, {"y": y, "mask": jnp.array([True])})
    >>> float(recall_at(2).result(sums))
    0.5
    """
    k = _validate.integer("k", k, minimum=1)

    def hits(predictions: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        labels = batch[label]
        if predictions.shape != labels.shape:
            raise ValueError(
                f"feature {label!r} has shape {labels.shape} beside predictions of shape"
                f" {predictions.shape}; pass a yes or no for each class."
            )
        _validate.integer("k", k, minimum=1, maximum=predictions.shape[-1])
        named = jax.lax.top_k(predictions, k)[1]
        is_named = jnp.zeros(labels.shape, bool)
        is_named = jnp.put_along_axis(is_named, named, True, axis=-1, inplace=False)
        return is_named, over(batch["mask"], labels) & (labels != 0)

    return pooled(hits, dtype=jnp.uint32)


@memoized
def cross_entropy(label: str = "y", *, ignore: Sequence[int] = ()) -> Metric:
    """The mean negative log-likelihood of the labels, in nats.

    Args:
      label: Name of the feature with the labels. Predictions are logits, in shapes as for
        `accuracy`; a label that is no class makes the mean NaN.
      ignore: Labels that are left out.
    """
    return pooled(functools.partial(_likelihood, label=label, ignore=ignore))


@memoized
def perplexity(label: str = "y", *, ignore: Sequence[int] = ()) -> Metric:
    """The exponential of the mean negative log-likelihood over all tokens.

    Args:
      label: As for `cross_entropy`.
      ignore: Labels that are left out.
    """
    return pooled(functools.partial(_likelihood, label=label, ignore=ignore), finish=jnp.exp)


@memoized
def label_rate(ids: Sequence[int], label: str = "y", *, ignore: Sequence[int] = ()) -> Metric:
    """The share of labels that are among some: of unknown words, the out-of-vocabulary rate.

    Args:
      ids: The labels to count.
      label: Name of the feature with the labels, `[batch, ...]`.
      ignore: Labels that are left out of the whole, such as padding.
    """

    def hits(predictions: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        del predictions
        counted = over(batch["mask"], batch[label]) & ~_among(batch[label], ignore)
        return _among(batch[label], ids), counted

    return pooled(hits, dtype=jnp.uint32)


@memoized
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

    return Metric(from_batch, lambda sums: unless_invalid(sums, sums["counts"]))


@memoized
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
        scores, labels, _ = aligned(predictions, batch, label)
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
        return unless_invalid(sums, (positives / positives.sum() * share).sum())

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
    return labels, over(batch["mask"], labels) & ~_among(labels, ignore)


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
