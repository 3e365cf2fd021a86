"""Each entry of an update in fewer bits."""

import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.base import UpdateTransform
from fedjax_lite.updates.vector import encoder, index_bits, unit_of
from fedjax_lite.xla import random
from fedjax_lite.xla.precision import reduced, widen


def half_precision(dtype: str = "bfloat16") -> UpdateTransform:
    r"""Rounds each entry of an update to the nearest number of 16 bits.

    Not unbiased; the error is at most $2^{-9}$ (bfloat16) or $2^{-11}$ (float16) of each entry,
    and in float16 at least $2^{-25}$. Beyond 65504, float16 has that number, so that no finite
    entry becomes infinite. NaN and infinities stay.

    Clients report `bits_up`: 16 bits for each entry.

    Args:
      dtype: `"bfloat16"` or `"float16"`.

    Raises:
      ValueError: `dtype` is neither.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> message = fl.Message(jnp.array([1.0, 1.001, 1e6]), 1.0)
    >>> sent = half_precision("float16").client(jax.random.key(0), (), message, None)
    >>> sent.update.tolist(), int(sent.metrics["bits_up"])
    ([1.0, 1.0009765625, 65504.0], 48)
    """
    _validate.choice("dtype", dtype, ("bfloat16", "float16"))
    most = float(jnp.finfo(dtype).max)

    def halve(key: jax.Array, x: jax.Array) -> tuple[jax.Array, int]:
        del key
        # Behind a barrier, or XLA leaves out what it takes for an excess of conversions.
        half = jax.lax.optimization_barrier(jnp.clip(x, -most, most).astype(dtype))
        return jnp.where(jnp.isfinite(x), half.astype(x.dtype), x), 16 * x.size

    return encoder("half_precision", halve, per_array=True)


def quantize_uniform(num_levels: int = 256) -> UpdateTransform:
    r"""Rounds each array of an update at random to $L$ levels between its extremes.

    The levels lie evenly from the smallest element $a$ to the largest one $b$, at distances
    $s = (b - a) / (L - 1)$. An element $x$ between two of them becomes the upper one with the
    probability $(x - a) / s - \lfloor (x - a) / s \rfloor$, and the lower one else, so that its
    mean is $x$: unbiased, with a variance of at most $s^2 / 4$ for each element.

    Clients report `bits_up`: $\lceil \log_2 L \rceil$ bits for each element, and 64 for the
    extremes of each array. An empty array stays as it is and takes none, a constant one stays as it
    is; one that holds NaN or an infinity becomes NaN, but its client is left out all the same.

    Source: Suresh et al. (2017), "Distributed Mean Estimation with Limited Communication",
    stochastic k-level quantization.

    Args:
      num_levels: The number of levels $L$, from 2 to $2^{24}$; 256 take 8 bits.

    Raises:
      ValueError: `num_levels` is out of range.
      TypeError: `num_levels` is no integer.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> quantize = quantize_uniform(3)
    >>> update = jnp.array([0.0, 1.0, 2.0])  # Levels themselves stay as they are.
    >>> sent = jax.jit(quantize.client)(jax.random.key(0), (), fl.Message(update, 1.0), None)
    >>> sent.update.tolist(), int(sent.metrics["bits_up"])
    ([0.0, 1.0, 2.0], 70)
    """
    num_levels = _validate.integer("num_levels", num_levels, minimum=2, maximum=2**24)
    bits = index_bits(num_levels)

    def quantize(key: jax.Array, x: jax.Array) -> tuple[jax.Array, int]:
        if x.size == 0:
            return x, 0
        wide = widen(x)
        lowest, highest = reduced(wide, jnp.minimum), reduced(wide, jnp.maximum)
        # Large numbers in units of 2^64, so that neither their spread nor its inverse leaves the
        # dtype.
        is_large = jnp.maximum(-lowest, highest) > 2.0**60
        unit = jnp.where(is_large, 2.0**-64, 1).astype(wide.dtype)
        spread = unit * highest - unit * lowest
        # A constant array has one level.
        position = (unit * wide - unit * lowest) / jnp.where(spread > 0, spread, 1)
        share = random.rounded(key, position * (num_levels - 1)) / (num_levels - 1)
        quantized = ((1 - share) * lowest + share * highest).astype(x.dtype)
        return quantized, bits * x.size + 64

    return encoder("quantize_uniform", quantize, per_array=True)


def quantize_scalar(
    num_bits: int = 8, *, symmetric: bool = False, per_channel: bool = False
) -> UpdateTransform:
    r"""Rounds each array of an update to the nearest of $2^b$ levels, one of which is zero.

    Affine, the levels lie evenly over the range of the array, zero included: with
    $s = (\max(x, 0) - \min(x, 0)) / (2^b - 1)$ and $z = \mathrm{round}(-\min(x, 0) / s)$,

    $$x \mapsto s \, (\mathrm{clip}(\mathrm{round}(x / s) + z, 0, 2^b - 1) - z).$$

    Symmetric, with $s = \max |x| / (2^{b-1} - 1)$, an entry becomes $s \, \mathrm{round}(x / s)$,
    one of $2^b - 1$ levels. Not unbiased; no entry is moved by more than $s$, or $s / 2$ if
    symmetric. Zeros and constant arrays stay as they are, up to rounding.

    Clients report `bits_up`: $b$ bits for each entry, and for each array (or channel) 32 for $s$
    and, if affine, $b$ for $z$. What holds NaN or an infinity becomes NaN, for itself or all of
    its array (or channel).

    Source: Jacob et al. (2018), "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", section 2.1.

    Args:
      num_bits: $b$, from 1 to 8; at least 2 if symmetric.
      symmetric: Whether zero is in the middle.
      per_channel: Whether each output channel, a place on the last axis of an array with two axes
        or more, has a range of its own.

    Raises:
      ValueError: `num_bits` is out of range.
      TypeError: `num_bits` is no integer.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> message = fl.Message(jnp.array([-1.0, 0.2, 2.0]), 1.0)
    >>> sent = quantize_scalar(2).client(jax.random.key(0), (), message, None)
    >>> sent.update.tolist(), int(sent.metrics["bits_up"])
    ([-1.0, 0.0, 2.0], 40)
    """
    minimum = 2 if symmetric else 1
    num_bits = _validate.integer("num_bits", num_bits, minimum=minimum, maximum=8)

    def quantize(key: jax.Array, x: jax.Array) -> tuple[jax.Array, int]:
        del key
        if x.size == 0:
            return x, 0
        axes = tuple(range(x.ndim - 1)) if per_channel and x.ndim > 1 else None
        wide = widen(x)
        if axes is None:
            lowest, highest = reduced(wide, jnp.minimum), reduced(wide, jnp.maximum)
        else:
            lowest, highest = wide.min(axes, keepdims=True), wide.max(axes, keepdims=True)
        most = jnp.maximum(-lowest, highest)
        unit = unit_of(most)
        wide = wide / unit
        most = most / unit
        lowest = jnp.minimum(lowest / unit, 0)
        highest = jnp.maximum(highest / unit, 0)
        steps = 2 ** (num_bits - 1) - 1 if symmetric else 2**num_bits - 1
        step = (most if symmetric else highest - lowest) / steps
        step = jnp.where(step == 0, 1, step)  # Of zeros.
        levels = jnp.round(wide / step)
        if not symmetric:
            zero = jnp.round(-lowest / step)
            levels = jnp.clip(levels + zero, 0, steps) - zero
        own_bits = 32 + (0 if symmetric else num_bits)
        quantized = (unit * (step * levels)).astype(x.dtype)
        return quantized, num_bits * x.size + own_bits * step.size

    return encoder("quantize_scalar", quantize, per_array=True)
