"""Blocks of an update as members of a few clusters."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.base import UpdateTransform
from fedjax_lite.updates.vector import compressor, index_bits
from fedjax_lite.xla import random
from fedjax_lite.xla.fusion import apart

_GROUP = 8  # Means that blocks are compared with in one loop, whose code is that long.


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

    Each lane needs the memory of $K / B$ updates, and k-means takes as long as local training, or
    longer.

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
    >>> sent = jax.jit(halves.client)(jax.random.key(0), (), message, None)
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
            # Or it would be found anew for each cluster that it may be a member of.
            member = apart(lambda: _nearest(columns, means), word)
            of_cluster = (member == jnp.arange(number)[:, None]).astype(x.dtype)
            # A mean is no longer than the blocks are only if it is exact.
            total = jnp.matmul(of_cluster, blocks, precision="highest")
            count = of_cluster.sum(1, keepdims=True)
            return jnp.where(count > 0, total / jnp.maximum(count, 1), means), member

        columns = blocks.T  # Long ones, along which a CPU computes with vectors.
        word = jax.random.key_data(random.fast(key))[0]
        nobody = jnp.zeros(len(blocks), jnp.int32)
        means, member = jax.lax.fori_loop(0, num_iterations, improve, (first, nobody))
        bits = index_bits(number) * len(blocks) + 32 * means.size
        return means[member].reshape(-1)[: x.size], bits

    return compressor("product_quantization", compress, shrinks=True)


def _nearest(columns: jax.Array, means: jax.Array) -> jax.Array:
    """The place of the mean that is nearest to each block; of equally near ones, the first."""
    # Of all distances at once, the least is found in three times the time.
    size = min(_GROUP, len(means))

    def compare(first: Any, group: jax.Array, nearest: Any) -> tuple[jax.Array, jax.Array]:
        least, place = nearest
        for i, mean in enumerate(group):
            distance = sum(jnp.square(x - m) for x, m in zip(columns, mean, strict=True))
            place = jnp.where(distance < least, first + i, place)
            least = jnp.minimum(distance, least)
        return least, place

    def compare_group(i: jax.Array, nearest: Any) -> tuple[jax.Array, jax.Array]:
        group = jax.lax.dynamic_slice_in_dim(means, i * size, size)
        return compare(i * size, group, nearest)

    shape, number = columns.shape[1:], (len(means) - 1) // size
    nobody = jnp.full(shape, jnp.inf, columns.dtype), jnp.zeros(shape, jnp.int32)
    nearest = jax.lax.fori_loop(jnp.int32(0), jnp.int32(number), compare_group, nobody)
    # Of the last group, nobody asks for the distance.
    return compare(number * size, means[number * size :], nearest)[1]
