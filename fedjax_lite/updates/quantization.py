"""Updates in fewer bits."""

import math

import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.base import Guarantees, Message, UpdateTransform
from fedjax_lite.updates.pipeline import stateless, unmasked
from fedjax_lite.xla.precision import widen


def quantize_uniform(num_levels: int = 256) -> UpdateTransform:
    r"""Rounds each array of an update at random to $L$ levels between its extremes.

    The levels lie evenly from the smallest element $a$ to the largest one $b$, at distances
    $s = (b - a) / (L - 1)$. An element $x$ between two of them becomes the upper one with the
    probability $(x - a) / s - \lfloor (x - a) / s \rfloor$, and the lower one else, so that its
    mean is $x$.

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
    >>> sent = quantize.client(jax.random.key(0), (), fl.Message(update, 1.0), None)
    >>> sent.update.tolist(), int(sent.metrics["bits_up"])
    ([0.0, 1.0, 2.0], 70)
    """
    num_levels = _validate.integer("num_levels", num_levels, minimum=2, maximum=2**24)
    bits = math.ceil(math.log2(num_levels))

    def quantize(key: jax.Array, x: jax.Array) -> jax.Array:
        if x.size == 0:
            return x
        wide = widen(x)
        lowest, highest = wide.min(), wide.max()
        # Large numbers in units of 2^64, so that neither their spread nor its inverse leaves the
        # dtype.
        is_large = jnp.maximum(-lowest, highest) > 2.0**60
        unit = jnp.where(is_large, 2.0**-64, 1).astype(wide.dtype)
        spread = unit * highest - unit * lowest
        # A constant array has one level.
        position = (unit * wide - unit * lowest) / jnp.where(spread > 0, spread, 1)
        position *= num_levels - 1
        below = jnp.floor(position)
        share = (below + jax.random.bernoulli(key, position - below)) / (num_levels - 1)
        return ((1 - share) * lowest + share * highest).astype(x.dtype)

    def client(key: jax.Array, message: Message) -> Message:
        leaves, structure = jax.tree.flatten(message.update)
        keys = jax.random.split(key, len(leaves))
        quantized = [quantize(*pair) for pair in zip(keys, leaves, strict=True)]
        bits_up = sum(bits * x.size + 64 for x in leaves if x.size)
        return message._replace(
            update=jax.tree.unflatten(structure, quantized),
            metrics={"bits_up": jnp.asarray(bits_up, float)},
        )

    def guarantees(before: Guarantees) -> Guarantees:
        # Rounding moves elements up as well: the norm may grow.
        return unmasked("quantize_uniform", before)._replace(sensitivity=None)

    return stateless(client, guarantees)
