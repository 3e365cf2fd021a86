"""Bounds on what a single client can change."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from fedjax_lite import _validate
from fedjax_lite.base import Guarantees, Message, UpdateTransform
from fedjax_lite.updates.pipeline import stateless, unmasked
from fedjax_lite.xla.precision import squared_norm, widen


def clip_by_norm(max_norm: ArrayLike) -> UpdateTransform:
    r"""Scales an update down to an L2 norm of $C$, over all of its arrays together.

    $$\Delta \mapsto \Delta \min(1, C / \|\Delta\|_2)$$

    Clients report `clipped`, 1 if theirs was scaled down. An update without entries has norm 0; one
    whose squares are too large for the dtype is scaled down all the same; one that holds NaN or an
    infinity stays as it is, and its client is left out.

    Source: McMahan et al. (2018), "Learning Differentially Private Recurrent Language Models".

    Args:
      max_norm: The bound $C$, positive, which holds up to rounding in the dtype of the update;
        may be traced, and is then not checked.

    Raises:
      ValueError: `max_norm` is not positive.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> clip = clip_by_norm(1.0)
    >>> message = fl.Message(jnp.array([3.0, 4.0]), 1.0)
    >>> clipped = clip.client(jax.random.key(0), (), message, None)
    >>> [round(float(x), 4) for x in clipped.update], float(clipped.metrics["clipped"])
    ([0.6, 0.8], 1.0)
    """
    max_norm = _validate.number("max_norm", max_norm, positive=True)

    def client(key: jax.Array, message: Message) -> Message:
        del key
        update = message.update
        squared = squared_norm(update)
        # Where the squares overflow, all is in units of a power of two, which changes no digit.
        unit = jnp.where(jnp.isinf(squared), _unit(squared.dtype), 1)
        squared = jax.lax.cond(
            jnp.isinf(squared),
            lambda: squared_norm(jax.tree.map(lambda x: unit * x, widen(update))),
            lambda: squared,
        )
        # Of updates that stay as they are no root is taken: its gradient at 0 is not a number.
        clipped = (squared > (unit * max_norm) ** 2) & jnp.isfinite(squared)
        factor = max_norm / jnp.sqrt(jnp.where(clipped, squared, 1))

        def scale(x: jax.Array) -> jax.Array:
            return jnp.where(clipped, factor * (unit * x), x).astype(x.dtype)

        scaled = jax.tree.map(scale, update)
        return message._replace(update=scaled, metrics={"clipped": clipped.astype(float)})

    def guarantees(before: Guarantees) -> Guarantees:
        return unmasked("clip_by_norm", before)._replace(sensitivity=max_norm)

    return stateless(client, guarantees)


def cap_weight(max_weight: ArrayLike) -> UpdateTransform:
    r"""Lowers the weight of a client to at most $p_{max}$, such that none counts for many.

    $$p_i \mapsto \min(p_i, p_{max})$$

    Where weights are numbers of examples, 1 makes them all alike.

    Source: McMahan et al. (2018), "Learning Differentially Private Recurrent Language Models",
    section 2.2.

    Args:
      max_weight: The bound $p_{max}$, positive; may be traced, and is then not checked.

    Raises:
      ValueError: `max_weight` is not positive.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> message = fl.Message(jnp.array([3.0, 4.0]), 20.0)
    >>> float(cap_weight(5.0).client(jax.random.key(0), (), message, None).weight)
    5.0
    """
    max_weight = _validate.number("max_weight", max_weight, positive=True)

    def client(key: jax.Array, message: Message) -> Message:
        del key
        return message._replace(weight=jnp.minimum(message.weight, max_weight))

    return stateless(client, lambda before: before._replace(max_weight=max_weight))


def _unit(dtype: DTypeLike) -> jax.Array:
    """So small that the squares of the largest numbers in it stay far below them: 2^-96."""
    return jnp.asarray(2.0 ** (-3 * jnp.finfo(dtype).maxexp // 4), dtype)
