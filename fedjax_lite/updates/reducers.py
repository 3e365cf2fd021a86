"""How the updates of a cohort become one aggregate."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Guarantees, PyTree, Reducer, Stack


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


def coordinate_median() -> Reducer:
    r"""The median of the clients' updates, coordinate by coordinate, whatever their weights.

    Of an even number of clients, the mean of the two in the middle. Clients that are left out, that
    have no examples or that weigh nothing do not count; of no clients at all it is zero, and the
    round is skipped.

    Needs the memory of all updates of a cohort, spread over the devices.

    Source: Yin et al. (2018), "Byzantine-Robust Distributed Learning: Towards Optimal Statistical
    Rates".

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), reducer=coordinate_median())
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [2.0]}, {"x": [3.0]}, {"x": [99.0]}])
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1, 2])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.0)), everyone)
    >>> float(state.params)
    3.0
    """

    def stacked(stack: Stack) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        counts = stack.weights > 0
        number = counts.sum()
        lower, upper = jnp.maximum(number - 1, 0) // 2, number // 2

        def median(x: jax.Array) -> jax.Array:
            ordered = jnp.sort(jnp.where(counts[:, None], x, jnp.inf), axis=0)
            both = ordered.at[jnp.stack([lower, upper])].get(mode="clip")
            return jnp.where(number > 0, both.mean(0), 0).astype(x.dtype)

        return [median(x) for x in stack.updates], {}

    return Reducer(stacked=stacked)
