"""How the updates of a cohort become one aggregate."""

from typing import Any

import jax
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Guarantees, PyTree, Reducer


def weighted_mean(denominator: ArrayLike | None = None) -> Reducer:
    r"""$\frac{1}{D} \sum_i p_i \Delta_i$, with $p_i$ the weight of client $i$: the default.

    $D$ is the sum of the weights of the round, so that a constant factor in all of them changes
    nothing. A number in its place does not depend on who takes part, as differential privacy asks
    for: with weights of at most 1, `denominator=q * N` makes it the expected number of clients that
    are drawn with probability $q$ from $N$.

    Args:
      denominator: $D$, positive, may be traced; 1 makes it a sum. By default the weights' sum.

    Raises:
      ValueError: `denominator` is not positive.
    """
    if denominator is not None:
        denominator = _validate.number("denominator", denominator, positive=True)

    def finish(total: PyTree, weight: jax.Array) -> PyTree:
        return optax.tree.scale(1 / (weight if denominator is None else denominator), total)

    def sensitivity(guarantees: Guarantees) -> Any:
        bounds = guarantees.sensitivity, guarantees.max_weight, denominator
        if any(bound is None for bound in bounds):
            return None
        norm, weight, divisor = bounds
        return norm * weight / divisor

    return Reducer(_weighted, finish, sensitivity=sensitivity)


def _weighted(update: PyTree, weight: jax.Array) -> PyTree:
    return jax.tree.map(lambda x: weight * x, update)
