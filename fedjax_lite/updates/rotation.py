"""Updates in random coordinates, in which they look alike, and in few bits there."""

import functools
import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lite import _validate
from fedjax_lite.base import Client, Guarantees, Message, PyTree, UpdateTransform
from fedjax_lite.updates.pipeline import check_decodes, unmasked
from fedjax_lite.updates.vector import compressor, count_of, vector_of
from fedjax_lite.xla import random
from fedjax_lite.xla.fusion import apart
from fedjax_lite.xla.hadamard import walsh_hadamard
from fedjax_lite.xla.packing import concatenate
from fedjax_lite.xla.precision import reduced

_KEY_SIGNS, _KEY_ENTRIES, _KEY_TRANSFORM = range(3)


def rotated(transform: UpdateTransform) -> UpdateTransform:
    r"""Has a transform act on an update in random coordinates.

    All arrays, as one vector $x$ with zeros up to a power of two $d$, become $R x$ with
    $R = H D / \sqrt d$, where $H$ is the Walsh-Hadamard matrix and $D$ has random signs on its
    diagonal; what the transform makes of that is rotated back. The entries of $R x$ are nearly
    normal, whatever $x$ is, so that their range is small: `rotated(quantize_uniform(L))` has a mean
    squared error of $O(\log d / (L - 1)^2) \|x\|^2$ in place of $O(d / (L - 1)^2) \|x\|^2$.
    Unbiased, contractive or bounded in norm as the transform is.

    The signs derive from a key that client and server both know, and take no bits; `bits_up` is
    what the transform reports of a vector of $d$ entries.

    Source: Suresh et al. (2017), "Distributed Mean Estimation with Limited Communication", section
    3.

    Args:
      transform: What acts on a single vector, and keeps nothing with clients.

    Raises:
      TypeError: `transform` is no transform.
      ValueError: It keeps something with clients, whose coordinates are others in each round; or
        makes integers of updates, for which there is `fl.common_rotation`.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> message = fl.Message(jnp.array([0.0, 4.0, 0.0]), 1.0)
    >>> sign = rotated(fl.scaled_sign())  # All entries of the rotated vector are 2 or -2.
    >>> sent = jax.jit(sign.client)(jax.random.key(0), sign.init(message.update), message, None)
    >>> float(sent.update[1]), int(sent.metrics["bits_up"])
    (4.0, 36)
    """
    _validate.instance("transform", transform, UpdateTransform, "fl.quantize_uniform(16)")
    if transform.entry is not None:
        raise ValueError(
            "transform keeps something with each client, and has other coordinates in each round;"
            " rotate inside of it, as in error_feedback(rotated(...))."
        )
    check_decodes("rotated", transform)

    def init(params: PyTree) -> PyTree:
        return transform.init(jnp.zeros(padded_size(vector_of(params)[0].size)))

    def client(key: jax.Array, state: PyTree, message: Message, client: Client) -> Message:
        vector, restore = vector_of(message.update)
        key_transform = random.fold_in_pair(key, _KEY_TRANSFORM, 0)
        turned = message._replace(update=rotate(key, vector))
        sent = transform.client(key_transform, state, turned, client)
        return sent._replace(update=restore(rotate_back(key, sent.update, vector.size)))

    def guarantees(before: Guarantees, state: PyTree) -> Guarantees:
        return transform.guarantees(unmasked("rotated", before), state)

    return transform._replace(init=init, client=client, guarantees=guarantees)


def eden(num_bits: float = 1, *, unbiased: bool = True) -> UpdateTransform:
    r"""The best few levels for what a random rotation makes of an update, and the best scale.

    All arrays, as one vector $x$ with zeros up to a power of two $d$, are rotated as in `rotated`.
    The entries of $y = \sqrt d R x / \|x\|$ are nearly standard normal; each becomes the nearest of
    the $2^b$ levels that are best for those (Lloyd and Max), $q(y)$. With the scale

    $$S = \frac{\|x\|^2}{\langle R x, q(y) \rangle}, \qquad
      x \mapsto R^{-1} S \, q(y),$$

    the mean is $x$, exactly for uniformly random rotations, and closely for these ones of what is
    not sparse. The mean squared error is $D / (1 - D)$ of $\|x\|^2$, with $D$ that of the levels:
    0.571, 0.133, 0.036 and 0.0096 for 1 to 4 bits. Not unbiased, with
    $S = \langle R x, q(y) \rangle / \|q(y)\|^2$, it is least, $D$, and no update becomes longer:
    a bound of its norm holds on.

    Fewer than one bit are 1 bit for each of $k = b d$ entries of $x$, chosen at random, times
    $d / k$ if unbiased, and zeros for the others.

    Clients report `bits_up`: $b d$, or 1 bit for each chosen entry, with zeros up to a power of
    two; and 32 for $S$. Rotations and choices derive from a key that client and server both know,
    and take none. A zero update stays as it is; one that holds NaN or an infinity becomes NaN, and
    its client is left out.

    Source: Vargaftik et al. (2022), "EDEN: Communication-Efficient and Robust Distributed Mean
    Estimation for Federated Learning".

    Args:
      num_bits: $b$, an integer from 1 to 8, or a number below 1.
      unbiased: Whether the scale makes the mean right, and not the error least.

    Raises:
      ValueError: `num_bits` is out of range, or a fraction above 1.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> message = fl.Message(jax.random.normal(jax.random.key(1), (4096,)), 1.0)
    >>> sent = jax.jit(eden(2).client)(jax.random.key(0), (), message, None)
    >>> error = jnp.sum((sent.update - message.update) ** 2) / jnp.sum(message.update**2)
    >>> round(float(error), 1), int(sent.metrics["bits_up"])
    (0.1, 8224)
    """
    _validate.number("num_bits", num_bits, positive=True, maximum=8)
    if num_bits > 1 and num_bits != int(num_bits):
        raise ValueError(f"num_bits is {num_bits}; choose an integer, or a number below 1.")
    return _eden("eden", num_bits, unbiased=unbiased)


def drive(*, unbiased: bool = False) -> UpdateTransform:
    r"""The signs of what a random rotation makes of an update, and a scale: 1 bit for each entry.

    `eden` of 1 bit. With all arrays as one vector $x$ with zeros up to a power of two $d$, and $R$
    the rotation of `rotated`,

    $$x \mapsto R^{-1} S \, \mathrm{sign}(R x), \qquad S = \|R x\|_1 / d,$$

    whose mean squared error is least, $1 - 2 / \pi = 0.363$ of $\|x\|^2$ for large $d$, and which
    makes no update longer: a bound of its norm holds on. It is what error feedback asks for.
    Unbiased, with $S = \|x\|^2 / \|R x\|_1$, the error is $\pi / 2 - 1 = 0.571$, and the errors of
    many clients cancel.

    Clients report `bits_up`: $d$, and 32 for $S$. A zero update stays as it is; one that holds NaN
    or an infinity becomes NaN, and its client is left out.

    Source: Vargaftik et al. (2021), "DRIVE: One-bit Distributed Mean Estimation".

    Args:
      unbiased: Whether the scale makes the mean right, and not the error least.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> message = fl.Message(jnp.array([0.0, 4.0, 0.0]), 1.0)
    >>> sent = jax.jit(drive().client)(jax.random.key(0), (), message, None)
    >>> float(sent.update[1]), int(sent.metrics["bits_up"])
    (4.0, 36)
    """
    return _eden("drive", 1, unbiased=unbiased)


def _eden(name: str, num_bits: float, *, unbiased: bool) -> UpdateTransform:
    levels = lloyd_max(max(int(num_bits), 1))

    def compress(key: jax.Array, x: jax.Array) -> tuple[jax.Array, Any]:
        if num_bits >= 1:
            return quantize(key, x)
        number = count_of(float(num_bits), x.size)
        key_entries = random.fold_in_pair(key, _KEY_ENTRIES, 0)
        chosen = random.permuted(key_entries, jnp.arange(number), x.size)
        sent, bits = quantize(key, x[chosen])
        factor = x.size / number if unbiased else 1
        return jnp.zeros_like(x).at[chosen].set(factor * sent), bits

    def quantize(key: jax.Array, x: jax.Array) -> tuple[jax.Array, Any]:
        turned = rotate(key, x)
        squared = reduced(jnp.square(turned), jnp.add)
        nearest = _nearest(
            levels, turned * jax.lax.rsqrt(jnp.where(squared > 0, squared, 1) / turned.size)
        )
        along = reduced(turned * nearest, jnp.add)
        # Of zeros, the scale is zero, too.
        scale = squared / jnp.where(along > 0, along, 1)
        if not unbiased:
            scale = along / reduced(jnp.square(nearest), jnp.add)
        sent = rotate_back(key, scale * nearest, x.size)
        return sent, max(int(num_bits), 1) * turned.size + 32

    return compressor(name, compress, shrinks=not unbiased)


@functools.cache
def lloyd_max(num_bits: int) -> np.ndarray:
    """The positive ones of the 2^b levels with the least mean squared error for a standard normal.

    Each is the mean of the numbers that are nearest to it. Solved by Newton's method, from levels
    as dense as is best for many of them: as those of a normal distribution of three times the
    variance (Panter and Dite, 1951).
    """
    normal, number = statistics.NormalDist(), 2**num_bits
    density = np.vectorize(normal.pdf)
    levels = math.sqrt(3) * np.vectorize(normal.inv_cdf)((np.arange(number) + 0.5) / number)
    for _ in range(12):
        middles = (levels[1:] + levels[:-1]) / 2
        at_middles = density(middles)
        share = np.diff(np.vectorize(normal.cdf)(middles), prepend=0, append=1)
        means = -np.diff(at_middles, prepend=0, append=0) / share
        # How the mean of a cell moves with the middles at its ends, each half of a level.
        above = at_middles * (middles - means[:-1]) / share[:-1] / 2
        below = at_middles * (means[1:] - middles) / share[1:] / 2
        slope = np.diag(np.append(above, 0) + np.append(0, below))
        slope += np.diag(above, 1) + np.diag(below, -1)
        levels = levels - np.linalg.solve(np.eye(number) - slope, levels - means)
    return levels[number // 2 :]


def _nearest(levels: np.ndarray, y: jax.Array) -> jax.Array:
    """The nearest one of the levels and their negatives to each entry."""
    magnitude, size = jnp.abs(y), jnp.full_like(y, levels[0])
    # One select after the other in a single loop over the entries; a look-up would be a gather.
    for below, level in itertools.pairwise(levels):
        size = jnp.where(magnitude > (below + level) / 2, level, size)
    return jnp.where(y < 0, -size, size)


def rotate(key: jax.Array, x: jax.Array) -> jax.Array:
    """A vector in random coordinates, with zeros up to a power of two."""
    rest = jnp.zeros(padded_size(x.size) - x.size, x.dtype)

    def turned(signs: jax.Array) -> jax.Array:
        return walsh_hadamard(concatenate([signs[: x.size] * x, rest]))

    return _apart(key, turned, x.size + rest.size)


def rotate_back(key: jax.Array, turned: jax.Array, size: int) -> jax.Array:
    """So many entries of the vector that `rotate` made this of."""
    turned = _apart(key, lambda signs: walsh_hadamard(turned), turned.size)
    return _apart(key, lambda signs: (signs * turned)[:size], turned.size)


def _apart(key: jax.Array, compute: Callable[[jax.Array], jax.Array], size: int) -> jax.Array:
    """What a function makes of the random signs, once for all that read it."""
    key = random.fold_in_pair(key, _KEY_SIGNS, 0)
    return apart(lambda: compute(random.random_signs(key, (size,))), jax.random.key_data(key)[0])


def padded_size(size: int) -> int:
    """The next power of two."""
    return 1 << max(size - 1, 0).bit_length()
