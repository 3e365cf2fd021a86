"""Blocks of an update as members of a few clusters."""

import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.base import UpdateTransform
from fedjax_lite.updates.vector import compressor, index_bits
from fedjax_lite.xla import random


def product_quantization(
    num_centroids: int = 256, block_size: int = 9, *, num_iterations: int = 5
) -> UpdateTransform:
    r"""Replaces blocks of an update by the means of clusters of such blocks.

    All arrays, as one vector with zeros up to a multiple of $B$, are cut into blocks of $B$
    entries. From $K$ of them, chosen at random, Lloyd's algorithm makes $K$ clusters; what is sent
    is their means, and of each block the index of its own. Not unbiased; the error is what k-means
    leaves, at most $\|x\|^2$, and no update becomes longer: a bound of its norm holds on.

    Clients report `bits_up`: $\lceil \log_2 K \rceil$ for each block, and $32 K B$ for the means.
    With no more than $K$ blocks, each is sent as it is, and its index. A zero update stays as it
    is; one that holds NaN or an infinity becomes NaN, and its client is left out.

    Each lane needs the memory of $K / B$ updates for the distances.

    Sources: Jégou et al. (2011), "Product Quantization for Nearest Neighbor Search"; Stock et al.
    (2020), "And the Bit Goes Down: Revisiting the Quantization of Neural Networks".

    Args:
      num_centroids: $K$.
      block_size: $B$.
      num_iterations: Iterations of k-means.

    Raises:
      ValueError: An argument is not positive.
      TypeError: An argument is no integer.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> message = fl.Message(jnp.array([1.0, 2.0, 5.0, 6.0, 3.0, 4.0, 5.0, 6.0]), 1.0)
    >>> halves = product_quantization(2, block_size=4)
    >>> sent = halves.client(jax.random.key(0), (), message, None)
    >>> sent.update.tolist(), int(sent.metrics["bits_up"])
    ([1.0, 2.0, 5.0, 6.0, 3.0, 4.0, 5.0, 6.0], 258)
    """
    num_centroids = _validate.integer("num_centroids", num_centroids, minimum=1)
    block_size = _validate.integer("block_size", block_size, minimum=1)
    num_iterations = _validate.integer("num_iterations", num_iterations, minimum=1)

    def compress(key: jax.Array, x: jax.Array) -> tuple[jax.Array, int]:
        blocks = jnp.pad(x, (0, -x.size % block_size)).reshape(-1, block_size)
        number = min(num_centroids, len(blocks))
        first = blocks[random.permuted(key, jnp.arange(number), len(blocks))]

        def improve(
            i: jax.Array, clusters: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            del i
            means, _ = clusters
            # Without the squares of the blocks, which are alike for all means.
            distances = jnp.square(means).sum(1) - 2 * blocks @ means.T
            member = jax.lax.argmin(distances, 1, jnp.int32)
            of_cluster = (member == jnp.arange(number)[:, None]).astype(x.dtype)
            # A mean is no longer than the blocks are only if it is exact.
            total = jnp.matmul(of_cluster, blocks, precision="highest")
            count = of_cluster.sum(1, keepdims=True)
            return jnp.where(count > 0, total / jnp.maximum(count, 1), means), member

        nobody = jnp.zeros(len(blocks), jnp.int32)
        means, member = jax.lax.fori_loop(0, num_iterations, improve, (first, nobody))
        bits = index_bits(number) * len(blocks) + 32 * means.size
        return means[member].reshape(-1)[: x.size], bits

    return compressor("product_quantization", compress, shrinks=True)
