"""QSGD: levels in proportion to the norm, and codes for what is mostly zero."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.base import UpdateTransform
from fedjax_lite.updates.vector import compressor, index_bits
from fedjax_lite.xla import random
from fedjax_lite.xla.precision import reduced


def qsgd(
    num_levels: int = 255, *, bucket_size: int | None = None, encoding: str = "fixed"
) -> UpdateTransform:
    r"""Rounds each entry at random to one of $s$ parts of the norm, or zero.

    All arrays, as one vector $x$ (or buckets of $B$ entries of it, each for itself), become

    $$x \mapsto \frac{\|x\|_2}{s} \, \mathrm{sign}(x) \, \xi, \qquad
      \xi \in \{\lfloor s |x| / \|x\|_2 \rfloor, \lfloor s |x| / \|x\|_2 \rfloor + 1\},$$

    with $\xi$ drawn such that its mean is $s |x| / \|x\|_2$: unbiased. The mean squared error is at
    most $\min(d / s^2, \sqrt d / s) \, \|x\|^2$, with $d$ the number of entries, or $B$. After
    local training, as in `fl.fed_avg(model, optax.sgd(0.1), num_steps=10, pipeline=fl.qsgd(255))`,
    it is FedPAQ.

    Clients report `bits_up`. Fixed: 32 for the norm of each bucket, and for each entry 1 for the
    sign and $\lceil \log_2 (s + 1) \rceil$ for $\xi$. Elias: 32 for each norm; for each entry that
    is not 0 the distance from the one before it, in Elias's omega code, 1 for the sign, and $\xi$
    in that code; and the distance to the end of the bucket: few bits where $s < \sqrt d$, and
    nearly all is zero. A zero bucket stays as it is. What holds NaN or an infinity becomes NaN, and
    its client is left out.

    Sources: Alistarh et al. (2017), "QSGD: Communication-Efficient SGD via Gradient Quantization
    and Encoding"; Reisizadeh et al. (2020), "FedPAQ: A Communication-Efficient Federated Learning
    Method with Periodic Averaging and Quantization".

    Args:
      num_levels: $s$, from 1 to $2^{23}$; 127 take 8 bits with the sign.
      bucket_size: $B$; by default, the whole update is one bucket.
      encoding: `"fixed"` or `"elias"`, which changes the bits and nothing else.

    Raises:
      ValueError: An argument is out of range.
      TypeError: `num_levels` or `bucket_size` is no integer.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> message = fl.Message(jnp.array([3.0, 0.0, -4.0]), 1.0)  # Of norm 5.
    >>> sent = jax.jit(qsgd(5).client)(jax.random.key(0), (), message, None)
    >>> sent.update.tolist(), int(sent.metrics["bits_up"])
    ([3.0, 0.0, -4.0], 44)
    """
    num_levels = _validate.integer("num_levels", num_levels, minimum=1, maximum=2**23)
    if bucket_size is not None:
        bucket_size = _validate.integer("bucket_size", bucket_size, minimum=1)
    _validate.choice("encoding", encoding, ("fixed", "elias"))

    def compress(key: jax.Array, x: jax.Array) -> tuple[jax.Array, Any]:
        size = min(bucket_size or x.size, x.size)
        buckets = jnp.pad(x, (0, -x.size % size)).reshape(-1, size)
        squares = jnp.square(buckets)
        total = squares.sum(1) if len(buckets) > 1 else reduced(squares, jnp.add)
        norm = jnp.sqrt(total.reshape(-1, 1))
        share = jnp.abs(buckets) / jnp.where(norm > 0, norm, 1)
        # The norm of a single entry may be rounded down.
        level = jnp.minimum(random.rounded(key, share * num_levels), num_levels)
        sent = jnp.sign(buckets) * level * (norm / num_levels)
        if encoding == "fixed":
            bits: Any = 32 * len(buckets) + x.size * (1 + index_bits(num_levels + 1))
        else:
            # Of the last bucket, what fills it up is not sent.
            lengths = jnp.full(len(buckets), size).at[-1].set(x.size - (len(buckets) - 1) * size)
            bits = _elias_bits(level.astype(jnp.int32), lengths)
        return sent.reshape(-1)[: x.size], bits

    return compressor("qsgd", compress)


def _elias_bits(levels: jax.Array, lengths: jax.Array) -> jax.Array:
    """The bits of buckets `[buckets, entries]`, of which so many entries are sent."""
    place = jnp.arange(1, levels.shape[1] + 1)
    is_sent = levels > 0
    last = jax.lax.cummax(jnp.where(is_sent, place, 0), axis=1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))
    each = jnp.where(is_sent, omega_bits(place - before) + 1 + omega_bits(levels), 0)
    return 32.0 * len(levels) + each.sum() + omega_bits(lengths + 1 - last[:, -1]).sum()


def omega_bits(number: jax.Array) -> jax.Array:
    """The length of Elias's omega code of integers: 1 of 1, 3 of 2 and 3, 6 of 4 to 7.

    In front of the binary digits of a number stand those of how many follow its first one, and so
    on; a 0 ends the code. Of numbers below 2^32, there are four of such at most.
    """
    bits = jnp.ones_like(number)
    for _ in range(4):
        digits = 32 - jax.lax.clz(jnp.maximum(number, 1))
        bits = bits + jnp.where(number > 1, digits, 0)
        number = digits - 1
    return bits
