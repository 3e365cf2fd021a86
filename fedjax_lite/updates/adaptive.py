"""Bounds that follow a quantile of the norms of the updates."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Client, Guarantees, Message, PyTree, Received, UpdateTransform
from fedjax_lite.updates.clipping import NORMS, norm_of, scale_down, zero_where
from fedjax_lite.updates.pipeline import unmasked

LN_10 = math.log(10)
Apply = Callable[[PyTree, jax.Array], tuple[PyTree, dict[str, jax.Array], jax.Array]]


def adaptive_clip(
    initial_norm: ArrayLike = 1.0,
    *,
    quantile: ArrayLike = 0.5,
    learning_rate: ArrayLike = 0.2,
    count_noise: ArrayLike = 0.0,
    denominator: ArrayLike | None = None,
) -> UpdateTransform:
    r"""Scales updates down to an L2 norm of $C$, which goes to a quantile of their norms.

    With $b_i = 1$ if the norm of client $i$'s update is at most $C$, and 0 otherwise, the server
    moves $C$ after each round by

    $$\bar b = \frac12 + \frac1m \Big( \sum_i \big(b_i - \tfrac12\big)
    + \mathcal{N}(0, \sigma_b^2) \Big), \qquad C \leftarrow C \exp(-\eta (\bar b - \gamma)).$$

    A client changes the sum by 1/2, whose noise has thus the multiplier $2 \sigma_b$. A
    `fl.gaussian_noise(z)` after it takes that into account: the noise of the aggregate has the
    multiplier $(z^{-2} - (2 \sigma_b)^{-2})^{-1/2}$, and both together are accounted as $z$. It
    refuses a count without noise, and $z \ge 2 \sigma_b$.

    Clients report `clipped`, 1 if theirs was scaled down; a round reports `clip_norm`, the bound
    that it had. Extremes are those of `fl.clip_by_norm`. The bound is a state of the server: it is
    known to clients, and is in checkpoints.

    Source: Andrew et al. (2021), "Differentially Private Learning with Adaptive Clipping",
    Algorithm 1. TensorFlow Federated clips at the quantile 0.8 where there is no noise.

    Args:
      initial_norm: $C$ of the first round, positive.
      quantile: $\gamma$, between 0 and 1.
      learning_rate: $\eta$, not negative.
      count_noise: $\sigma_b$, such as $m / 20$, as the paper has it; 0 for none.
      denominator: $m$, the expected number of clients in a round, positive. By default those that
        took part; with noise, it has to be a number that does not depend on them.

    All of them may be traced, and are then not checked.

    Raises:
      ValueError: A number is out of its range, or there is noise and no `denominator`.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), pipeline=adaptive_clip(1.0))
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [x]} for x in (2.0, 3.0, 4.0)])
    >>> cohort = fl.cohort_of(dataset.resident(), [0, 1, 2])
    >>> state = algorithm.init(jnp.float32(0.0))
    >>> for r in range(60):
    ...     state, info = algorithm.round(jax.random.key(r), state, cohort)
    >>> bool(2.5 < info.metrics["clip_norm"] < 3.5)
    True
    """

    def clip(update: PyTree, estimate: jax.Array) -> tuple[PyTree, dict[str, jax.Array], jax.Array]:
        norm = norm_of(update)
        above = norm.exceeds(estimate)
        return scale_down(update, norm, estimate), {"clipped": above.astype(float)}, above

    def guarantees(before: Guarantees, estimate: Any) -> Guarantees:
        return unmasked("adaptive_clip", before)._replace(sensitivity=estimate)

    return _at_quantile(
        *(clip, guarantees, "clip_norm"),
        initial_norm=initial_norm,
        quantile=quantile,
        learning_rate=learning_rate,
        count_noise=count_noise,
        denominator=denominator,
    )


def adaptive_zero(
    initial_norm: ArrayLike = 10.0,
    *,
    quantile: ArrayLike = 0.98,
    learning_rate: ArrayLike = LN_10,
    multiplier: ArrayLike = 2.0,
    increment: ArrayLike = 1.0,
    norm: Literal["l2", "max"] = "max",
    count_noise: ArrayLike = 0.0,
    denominator: ArrayLike | None = None,
) -> UpdateTransform:
    r"""Puts zero in place of an update whose norm is above $a C + c$, with $C$ near a quantile.

    $C$ moves as in `fl.adaptive_clip`, by those whose norm is at most $C$; see `fl.zero_by_norm`
    for what becomes of the others. The defaults are those that TensorFlow Federated recommends.

    Clients report `zeroed`, 1 if theirs was; a round reports `zero_norm`, the bound $a C + c$ that
    it had.

    Source: as for `fl.adaptive_clip`.

    Args:
      initial_norm: $C$ of the first round, positive.
      quantile: As in `fl.adaptive_clip`.
      learning_rate: As in `fl.adaptive_clip`.
      multiplier: $a$, positive.
      increment: $c$, not negative.
      norm: As in `fl.zero_by_norm`.
      count_noise: As in `fl.adaptive_clip`.
      denominator: As in `fl.adaptive_clip`.

    All numbers may be traced, and are then not checked.

    Raises:
      ValueError: A number is out of its range, `norm` is neither of the two, or there is noise and
        no `denominator`.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> zero = adaptive_zero(initial_norm=1.0)
    >>> message = fl.Message(jnp.array([3.5, 0.0]), 1.0)
    >>> zero.client(jax.random.key(0), zero.init(message.update), message, None).update.tolist()
    [0.0, 0.0]
    """
    multiplier = _validate.number("multiplier", multiplier, positive=True)
    increment = _validate.number("increment", increment)
    _validate.choice("norm", norm, NORMS)

    def bound(estimate: Any) -> Any:
        return multiplier * estimate + increment

    def zero(update: PyTree, estimate: jax.Array) -> tuple[PyTree, dict[str, jax.Array], jax.Array]:
        exceeds = NORMS[norm](update)
        zeroed = exceeds(bound(estimate))
        return zero_where(zeroed, update), {"zeroed": zeroed.astype(float)}, exceeds(estimate)

    def guarantees(before: Guarantees, estimate: Any) -> Guarantees:
        after = unmasked("adaptive_zero", before)
        return after._replace(sensitivity=bound(estimate)) if norm == "l2" else after

    return _at_quantile(
        *(zero, guarantees, "zero_norm"),
        bound=bound,
        initial_norm=initial_norm,
        quantile=quantile,
        learning_rate=learning_rate,
        count_noise=count_noise,
        denominator=denominator,
    )


def _at_quantile(
    apply: Apply,
    guarantees: Callable[[Guarantees, Any], Guarantees],
    reported: str,
    *,
    bound: Callable[[Any], Any] = lambda estimate: estimate,
    initial_norm: ArrayLike,
    quantile: ArrayLike,
    learning_rate: ArrayLike,
    count_noise: ArrayLike,
    denominator: ArrayLike | None,
) -> UpdateTransform:
    """A transform whose state is an estimate of a quantile of the norms of updates.

    Args:
      apply: `apply(update, estimate) -> (update, metrics, above)`, of a client, and whether the
        norm of its update is above the estimate.
      guarantees: `guarantees(before, estimate) -> after`.
      reported: The name under which a round reports its bound.
      bound: The bound that follows from the estimate.
      initial_norm: As in `adaptive_clip`, like the others.
      quantile: The quantile.
      learning_rate: How fast the estimate moves.
      count_noise: Noise of the count.
      denominator: How many clients are expected.
    """
    initial_norm = _validate.number("initial_norm", initial_norm, positive=True)
    quantile = _validate.number("quantile", quantile, maximum=1)
    rate = _validate.number("learning_rate", learning_rate)
    std = _validate.number("count_noise", count_noise)
    in_the_clear = not isinstance(std, jax.core.Tracer) and float(std) == 0
    if denominator is not None:
        denominator = _validate.number("denominator", denominator, positive=True)
    elif not in_the_clear:
        raise ValueError(
            "denominator is None, and the number of clients that took part is as private as the"
            " noised count; pass the number that is expected."
        )

    def init(params: PyTree) -> jax.Array:
        del params
        return jnp.asarray(initial_norm, float)

    def client(key: jax.Array, estimate: jax.Array, message: Message, client: Client) -> Message:
        del key, client
        update, metrics, above = apply(message.update, estimate)
        below = jnp.where(above, -0.5, 0.5)
        return message._replace(
            update=update, metrics=metrics, statistics={"below": below, "number": jnp.ones(())}
        )

    def server(
        key: jax.Array, estimate: jax.Array, received: Received
    ) -> tuple[Received, jax.Array, dict[str, jax.Array]]:
        below, number = received.statistics["below"], received.statistics["number"]
        number = jnp.maximum(number, 1) if denominator is None else denominator
        share = 0.5 + (below + std * jax.random.normal(key)) / number
        moved = estimate * jnp.exp(-rate * (share - quantile))
        # From zero or infinity, no factor would lead back.
        limits = jnp.finfo(estimate.dtype)
        moved = jnp.clip(moved, limits.tiny, limits.max).astype(estimate.dtype)
        return received, moved, {reported: bound(estimate)}

    def released(before: Guarantees, estimate: Any) -> Guarantees:
        after = guarantees(before, initial_norm if estimate is None else estimate)
        # One client changes the count by a half.
        count = math.inf if in_the_clear else (2 * std) ** -2
        return after._replace(released=before.released + count)

    return UpdateTransform(init, client, server, guarantees=released)
