"""Updates of which few entries are sent."""

import functools
import math
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
    >>> sent = jax.jit(top_k(0.5).client)(jax.random.key(0), (), message, None)
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
    >>> sent = jax.jit(random_k(2).client)(jax.random.key(0), (), message, None)
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

    The bits of floats that are not negative are ordered as they are, with NaN last.
    """
    num_bytes = magnitude.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(magnitude, f"uint{8 * num_bytes}")
    least, missing = _least_of_largest(bits, jnp.int32(number), num_bytes)
    equal = bits == least
    # From the last place to the first one. Where all of the equal ones are kept, there is nothing
    # to look for.
    place = jnp.where(equal, jnp.arange(bits.size, 0, -1, dtype=jnp.uint32), 0)
    num_places = jnp.where(_count(equal) > missing, -(-bits.size.bit_length() // 8), 0)
    first, _ = _least_of_largest(place, missing, num_places)
    return (bits > least) | (equal & (place >= first))


def _least_of_largest(
    x: jax.Array, number: jax.Array, num_bytes: Any
) -> tuple[jax.Array, jax.Array]:
    """The smallest of so many largest integers, and how many of them are equal to it.

    Its bits are found one after the other, by counting: 31 passes over a vector, where sorting it
    would take a CPU as long as training. A pass reads a byte of each entry, which takes a third of
    the time that all four would.
    """

    def find_byte(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        least, missing = found
        upper = x >> jnp.asarray(8 * (num_bytes - 1 - i)).astype(x.dtype)
        # Of what may still be the smallest one; of others zero, which is never asked for.
        byte = jnp.where(upper >> 8 == least, upper & 255, 0).astype(jnp.uint8)

        def try_bit(j: jax.Array, found: tuple[jax.Array, jax.Array]) -> Any:
            least, larger = found
            tried = least | (jnp.uint8(128) >> j.astype(jnp.uint8))
            count = _count(byte >= tried)
            enough = count >= missing
            return jnp.where(enough, tried, least), jnp.where(enough, larger, count)

        own, larger = jax.lax.fori_loop(0, 8, try_bit, (jnp.uint8(0), jnp.int32(0)))
        return (least << 8) | own, missing - larger

    return jax.lax.fori_loop(0, num_bytes, find_byte, (jnp.zeros((), x.dtype), number))


def _count(x: jax.Array) -> jax.Array:
    """How many are true."""
    # In slabs side by side, for a CPU that would add one to the other: an eighth of the time.
    width = x.size // _NUM_SLABS
    slabs = [x[i * width : (i + 1) * width].astype(jnp.uint8) for i in range(_NUM_SLABS)]
    rest = x[_NUM_SLABS * width :]
    return functools.reduce(jnp.add, slabs).sum(dtype=jnp.int32) + rest.sum(dtype=jnp.int32)


def choice_bits(size: int, number: int) -> int:
    r"""$\lceil \log_2 \binom d k \rceil$."""
    few = min(number, size - number)
    if few <= 1000:
        return (math.comb(size, few) - 1).bit_length()
    # Of larger numbers, the logarithm alone, right to less than a millionth of a bit.
    log = math.lgamma(size + 1) - math.lgamma(few + 1) - math.lgamma(size - few + 1)
    return math.ceil(log / math.log(2))
