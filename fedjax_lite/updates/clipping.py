"""Bounds on what a single client can change."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from fedjax_lite import _validate
from fedjax_lite.base import Guarantees, Message, PyTree, UpdateTransform
from fedjax_lite.updates.pipeline import stateless, unmasked
from fedjax_lite.xla.precision import squared_norm, widen

Exceeds = Callable[[ArrayLike], jax.Array]


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
        norm = norm_of(message.update)
        clipped = norm.exceeds(max_norm)
        scaled = scale_down(message.update, norm, max_norm)
        return message._replace(update=scaled, metrics={"clipped": clipped.astype(float)})

    def guarantees(before: Guarantees) -> Guarantees:
        return unmasked("clip_by_norm", before)._replace(sensitivity=max_norm)

    return stateless(client, guarantees)


def clip_per_array(max_norm: ArrayLike | PyTree) -> UpdateTransform:
    r"""Scales each array of an update down to an L2 norm of its own bound.

    With $m$ arrays and a number $C$, each has the bound $C / \sqrt m$; or bounds $C_j$ are given,
    and $C = \sqrt{\sum_j C_j^2}$. Either way the whole update has a norm of at most $C$, and what
    one large array takes away from the others in `clip_by_norm` stays with it.

    Clients report `clipped`, the share of the arrays that were scaled down. Extremes are those of
    `clip_by_norm`, array by array.

    Source: McMahan et al. (2018), "Learning Differentially Private Recurrent Language Models",
    section 2.2, per-layer clipping.

    Args:
      max_norm: $C$, positive, or positive bounds in the form of the params; may be traced, and are
        then not checked.

    Raises:
      ValueError: A bound is not positive; in `algorithm.init`, bounds are not of the form of the
        params.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> message = fl.Message({"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}, 1.0)
    >>> clip = clip_per_array({"a": 1.0, "b": 2.0})
    >>> sent = clip.client(jax.random.key(0), (), message, None)
    >>> [round(float(x), 4) for x in sent.update["a"]], float(sent.metrics["clipped"])
    ([0.6, 0.8], 0.5)
    >>> round(float(clip.guarantees(fl.Guarantees(), None).sensitivity) ** 2, 4)
    5.0
    """
    single = jax.tree_util.all_leaves([max_norm])
    check = functools.partial(_validate.number, "max_norm", positive=True)
    max_norm = jax.tree.map(check, max_norm)
    total = max_norm if single else optax.tree.norm(max_norm)

    def bounds(update: PyTree) -> PyTree:
        if single:
            num_arrays = len(jax.tree.leaves(update))
            return jax.tree.map(lambda x: max_norm / num_arrays**0.5, update)
        remedy = "give a bound for each array of the params, or a single number."
        numbers = jax.tree.map(lambda x: np.zeros(()), update)
        _validate.same_form("max_norm", max_norm, numbers, remedy, dtypes=False)
        return max_norm

    def init(params: PyTree) -> PyTree:
        bounds(params)
        return ()

    def client(key: jax.Array, message: Message) -> Message:
        del key
        own = bounds(message.update)
        norms = jax.tree.map(norm_of, message.update)
        scaled = jax.tree.map(scale_down, message.update, norms, own)
        exceeds = jax.tree.map(
            lambda x, norm, bound: norm.exceeds(bound), message.update, norms, own
        )
        clipped = jnp.stack(jax.tree.leaves(exceeds)).astype(float).mean()
        return message._replace(update=scaled, metrics={"clipped": clipped})

    def guarantees(before: Guarantees) -> Guarantees:
        return unmasked("clip_per_array", before)._replace(sensitivity=total)

    return stateless(client, guarantees)._replace(init=init)


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


def zero_by_norm(max_norm: ArrayLike, *, norm: Literal["l2", "max"] = "max") -> UpdateTransform:
    r"""Puts zero in place of an update whose norm is above $C$.

    The client counts all the same: with the weight that it has, it draws a mean towards zero.
    Against updates that are broken, rather than large: a bound far above what is usual.

    Clients report `zeroed`, 1 if theirs was. One that holds NaN or an infinity stays as it is, and
    its client is left out.

    Source: the aggregators of TensorFlow Federated, `tff.aggregators.zeroing_factory`.

    Args:
      max_norm: The bound $C$, positive; may be traced, and is then not checked.
      norm: `"l2"`, the L2 norm of all arrays together, or `"max"`, their largest absolute entry.

    Raises:
      ValueError: `max_norm` is not positive, or `norm` is neither of the two.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> message = fl.Message(jnp.array([3.0, 4.0]), 1.0)
    >>> for bound in (3.5, 4.5):
    ...     sent = zero_by_norm(bound).client(jax.random.key(0), (), message, None)
    ...     print(sent.update, sent.metrics["zeroed"])
    [0. 0.] 1.0
    [3. 4.] 0.0
    """
    max_norm = _validate.number("max_norm", max_norm, positive=True)
    _validate.choice("norm", norm, NORMS)

    def client(key: jax.Array, message: Message) -> Message:
        del key
        zeroed = NORMS[norm](message.update)(max_norm)
        update = zero_where(zeroed, message.update)
        return message._replace(update=update, metrics={"zeroed": zeroed.astype(float)})

    def guarantees(before: Guarantees) -> Guarantees:
        after = unmasked("zero_by_norm", before)
        return after._replace(sensitivity=max_norm) if norm == "l2" else after

    return stateless(client, guarantees)


class Norm(NamedTuple):
    """An L2 norm, in units such that its square does not leave the dtype.

    Attributes:
      squared: The square of the norm times `unit`.
      unit: A power of two.
    """

    squared: jax.Array
    unit: jax.Array | float = 1.0

    def exceeds(self, bound: ArrayLike) -> jax.Array:
        """Whether it is above a bound, and a number."""
        return (self.squared > (self.unit * bound) ** 2) & jnp.isfinite(self.squared)


def norm_of(update: PyTree) -> Norm:
    """The L2 norm of all arrays together."""
    squared = squared_norm(update)
    # Where the squares overflow, all is in units of a power of two, which changes no digit.
    unit = jnp.where(jnp.isinf(squared), _unit(squared.dtype), 1)
    squared = jax.lax.cond(
        jnp.isinf(squared),
        lambda: squared_norm(jax.tree.map(lambda x: unit * x, widen(update))),
        lambda: squared,
    )
    return Norm(squared, unit)


def _exceeds_max(update: PyTree) -> Exceeds:
    leaves = [jnp.abs(x).max(initial=0.0) for x in jax.tree.leaves(widen(update))]
    largest = jnp.stack(leaves).max()
    return lambda bound: (largest > bound) & jnp.isfinite(largest)


# By name, what says whether the norm of an update exceeds a bound, and is a number.
NORMS: dict[str, Callable[[PyTree], Exceeds]] = {
    "l2": lambda update: norm_of(update).exceeds,
    "max": _exceeds_max,
}


def scale_down(update: PyTree, norm: Norm, max_norm: ArrayLike) -> PyTree:
    """The update, of this L2 norm, with one of at most `max_norm`."""
    # Of updates that stay as they are no root is taken: its gradient at 0 is not a number.
    clipped = norm.exceeds(max_norm)
    factor = max_norm / jnp.sqrt(jnp.where(clipped, norm.squared, 1))

    def scale(x: jax.Array) -> jax.Array:
        return jnp.where(clipped, factor * (norm.unit * x), x).astype(x.dtype)

    return jax.tree.map(scale, update)


def zero_where(condition: jax.Array, update: PyTree) -> PyTree:
    """Zeros in place of the update where the condition holds."""
    return jax.tree.map(lambda x: jnp.where(condition, 0, x).astype(x.dtype), update)


def _unit(dtype: DTypeLike) -> jax.Array:
    """So small that the squares of the largest numbers in it stay far below them: 2^-96."""
    return jnp.asarray(2.0 ** (-3 * jnp.finfo(dtype).maxexp // 4), dtype)
