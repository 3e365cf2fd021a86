"""Updates of which few entries are sent."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lite.base import PyTree, UpdateTransform
from fedjax_lite.updates.vector import check_count, count_of, encoder
from fedjax_lite.xla import random
from fedjax_lite.xla.packing import ravel
from fedjax_lite.xla.precision import widen

_NUM_SLABS = 16


def top_k(k: float, *, per_array: bool = False) -> UpdateTransform:
    r"""Keeps the $k$ entries of the largest magnitude, and puts zeros for the others.

    Of all arrays as one vector of $d$ entries; of equal ones, those that come first. Not unbiased;
    the error is at most $(1 - k / d) \|x\|^2$, the least of all choices of $k$ entries, and no
    update becomes longer: a bound of its norm holds on. `fl.error_feedback` makes up for what is
    lost.

    Clients report `bits_up`: the kept entries as they are, 32 bits each in float32, and
    $\lceil \log_2 \binom d k \rceil$ for which ones they are, the number of the choice among all
    (combinatorial number system): never more than $k$ indices, nor than a mask of $d$ bits. NaN and
    infinities count as the largest, and their client is left out.

    Source: Stich et al. (2018), "Sparsified SGD with Memory".

    Args:
      k: The number of entries, an int; or a float up to 1, their share of all, at least one.
      per_array: Whether each array has its own $k$ entries, and $d$.

    Raises:
      ValueError: `k` is out of range.
      TypeError: `k` is no number.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> message = fl.Message(jnp.array([1.0, -3.0, 2.0, 0.0]), 1.0)
    >>> sent = top_k(0.5).client(jax.random.key(0), (), message, None)
    >>> sent.update.tolist(), int(sent.metrics["bits_up"])  # One of 6 choices takes 3 bits.
    ([0.0, -3.0, 2.0, 0.0], 67)
    """
    check_count("k", k)

    def keep(key: jax.Array, x: jax.Array) -> tuple[jax.Array, int]:
        del key
        number = count_of(k, x.size)
        largest = _largest(jnp.abs(widen(x)), number)
        return jnp.where(largest, x, 0), choice_bits(x.size, number)

    return _sparse("top_k", k, keep, per_array=per_array, shrinks=True)


def random_k(k: float, *, per_array: bool = False, unbiased: bool = True) -> UpdateTransform:
    r"""Keeps $k$ entries at random, times $d / k$, and puts zeros for the others.

    Of all arrays as one vector of $d$ entries, without replacement: unbiased, with a mean squared
    error of $(d / k - 1) \|x\|^2$. Without the factor it is not, but the mean squared error is
    $(1 - k / d) \|x\|^2$, as `fl.error_feedback` asks for, and no update becomes longer: a bound of
    its norm holds on.

    Clients report `bits_up`: the kept entries as they are, 32 bits each in float32. Which ones they
    are derives from a key that client and server both know, and takes none.

    Source: Konečný et al. (2016), "Federated Learning: Strategies for Improving Communication
    Efficiency", random masks.

    Args:
      k: The number of entries, an int; or a float up to 1, their share of all, at least one.
      per_array: Whether each array has its own $k$ entries, and $d$.
      unbiased: Whether to multiply by $d / k$.

    Raises:
      ValueError: `k` is out of range.
      TypeError: `k` is no number.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> message = fl.Message(jnp.ones(4), 1.0)
    >>> sent = random_k(2).client(jax.random.key(0), (), message, None)
    >>> sorted(sent.update.tolist()), int(sent.metrics["bits_up"])
    ([0.0, 0.0, 2.0, 2.0], 64)
    """
    check_count("k", k)

    def keep(key: jax.Array, x: jax.Array) -> tuple[jax.Array, int]:
        number = count_of(k, x.size)
        chosen = random.permuted(key, jnp.arange(number), x.size)
        factor = x.size / number if unbiased else 1
        return jnp.zeros_like(x).at[chosen].set(factor * x[chosen]), 0

    return _sparse("random_k", k, keep, per_array=per_array, shrinks=not unbiased)


def _sparse(name: str, k: float, keep: Any, *, per_array: bool, shrinks: bool) -> UpdateTransform:
    """What keeps some entries of vectors by `keep(key, vector) -> (vector, bits of which)`."""

    def encode(key: jax.Array, tree: PyTree) -> tuple[PyTree, int]:
        flat, restore = ravel(tree)
        if not flat.size:
            return tree, 0
        sent, bits = keep(key, flat)
        return restore(sent), bits + 8 * flat.dtype.itemsize * count_of(k, flat.size)

    return encoder(name, encode, per_array=per_array, shrinks=shrinks)


def _largest(magnitude: jax.Array, number: int) -> jax.Array:
    """Whether each entry is one of so many largest ones, of equal ones the first.

    The bits of floats that are not negative are ordered as they are, with NaN last. The bits of the
    smallest one that is kept are found one after the other, by counting: whatever the number is,
    31 passes over a vector, where sorting it would take a CPU as long as training.
    """
    width = 8 * magnitude.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(magnitude, f"uint{width}")
    least = _largest_where(lambda x: _count(bits >= x) >= number, width - 1, bits.dtype)
    missing = number - _count(bits > least)
    equal = bits == least
    place = jnp.arange(magnitude.size, dtype=jnp.uint32)
    # Of equal ones, the last that is kept: the last place before which too few are. Where all of
    # them are kept, there is nothing to look for, and no turn of the loop.
    num_bits = jnp.where(_count(equal) > missing, magnitude.size.bit_length(), 0)
    last = _largest_where(lambda x: _count(equal & (place < x)) < missing, num_bits, jnp.uint32)
    return (bits > least) | (equal & ((place <= last) | (num_bits == 0)))


def _largest_where(
    enough: Callable[[jax.Array], jax.Array], num_bits: Any, dtype: Any
) -> jax.Array:
    """The largest integer of so many bits for which there is enough, bit after bit."""

    def try_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        tried = found | (jnp.ones((), dtype) << jnp.asarray(num_bits - 1 - i).astype(dtype))
        return jnp.where(enough(tried), tried, found)

    return jax.lax.fori_loop(0, num_bits, try_bit, jnp.zeros((), dtype))


def _count(x: jax.Array) -> jax.Array:
    """How many are true."""
    # In slabs side by side, for a CPU that would add one to the other: an eighth of the time.
    width = -(-x.size // _NUM_SLABS)
    slabs = [x[start : start + width] for start in range(0, x.size, width)]
    *full, rest = (slab.astype(jnp.int32) for slab in slabs)
    return sum(full, jnp.zeros(width, jnp.int32)).sum() + rest.sum()


def choice_bits(size: int, number: int) -> int:
    r"""$\lceil \log_2 \binom d k \rceil$."""
    few = min(number, size - number)
    if few <= 1000:
        return (math.comb(size, few) - 1).bit_length()
    # Of larger numbers, the logarithm alone, right to less than a millionth of a bit.
    log = math.lgamma(size + 1) - math.lgamma(few + 1) - math.lgamma(size - few + 1)
    return math.ceil(log / math.log(2))
