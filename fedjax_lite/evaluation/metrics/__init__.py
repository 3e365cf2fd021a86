"""Metrics as sums that merge: the same result however examples are split into batches.

A metric adds up what it needs to know of the examples of a batch. Sums of batches, clients and
devices are added leaf by leaf, and the result is taken of the total once. Counts are `uint32`,
exact up to 2^32 examples or tokens, where float32 would stand still at 2^24; hits are counts.
"""

from fedjax_lite.evaluation.metrics.labels import (
    accuracy,
    auc,
    confusion_matrix,
    cross_entropy,
    label_rate,
    perplexity,
    recall_at,
    top_k,
)
from fedjax_lite.evaluation.metrics.sums import Metric, by_domain, mean
from fedjax_lite.evaluation.metrics.targets import (
    mean_absolute_error,
    mean_squared_error,
    r_squared,
    root_mean_squared_error,
)

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
    "recall_at",
    "root_mean_squared_error",
    "top_k",
]


def __dir__() -> list[str]:
    return __all__
