"""How the updates of a cohort become one aggregate."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import (
    Guarantees,
    Message,
    PyTree,
    Received,
    Reducer,
    UpdateTransform,
)
from fedjax_lite.updates.pipeline import unmasked
from fedjax_lite.xla.precision import widen


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


def fixed_point(scale: ArrayLike) -> UpdateTransform:
    r"""Updates as integers of 32 bits, in units of $1 / s$, rounded to the nearest.

    Beside `modular_sum`, whose sum it takes back to floats on the server. What lies beyond 32 bits
    wraps around: choose $s$ such that the sum of the updates stays below $2^{31} / s$.

    Args:
      scale: $s$, positive; may be traced.

    Raises:
      ValueError: `scale` is not positive.
    """
    scale = _validate.number("scale", scale, positive=True)

    def client(key: jax.Array, state: PyTree, message: Message, client: object) -> Message:
        del key, state, client
        integers = jax.tree.map(
            lambda x: jnp.round(scale * widen(x)).astype(jnp.int32), message.update
        )
        bits = sum(32.0 * x.size for x in jax.tree.leaves(integers))
        return message._replace(update=integers, metrics={"bits_up": jnp.asarray(bits, float)})

    def server(
        key: jax.Array, state: PyTree, received: Received
    ) -> tuple[Received, PyTree, dict[str, jax.Array]]:
        del key
        floats = jax.tree.map(lambda x: x.astype(float) / scale, received.aggregate)
        return received._replace(aggregate=floats), state, {}

    def guarantees(before: Guarantees, state: PyTree) -> Guarantees:
        del state
        return unmasked("fixed_point", before)._replace(sensitivity=None)

    return UpdateTransform(lambda params: (), client, server, guarantees=guarantees)


def modular_sum() -> Reducer:
    r"""The sum of integer updates modulo $2^{32}$, as secure aggregation adds them up.

    Weights are not multiplied with; a client that weighs nothing is left out. Updates are integers
    of 32 bits, such as `fixed_point` makes; the sum is read as a signed one.

    Source: Bonawitz et al. (2017), "Practical Secure Aggregation for Privacy-Preserving Machine
    Learning", section 4.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])
    >>> options = {"pipeline": fixed_point(2.0**16), "reducer": modular_sum()}
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), **options)
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [0.25]}, {"x": [0.5]}])
    >>> both = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.0)), both)
    >>> float(state.params)
    0.75
    """

    def summand(update: PyTree, weight: jax.Array) -> PyTree:
        for path, x in jax.tree.leaves_with_path(update):
            if not jnp.issubdtype(x.dtype, jnp.integer):
                raise ValueError(
                    f"the update{jax.tree_util.keystr(path)} is of dtype {x.dtype}, and modular_sum"
                    " adds integers; put fl.fixed_point(scale) into the pipeline."
                )
        return jax.tree.map(lambda x: jnp.where(weight != 0, x.astype(jnp.int32), 0), update)

    return Reducer(summand, lambda total, weight: total)
