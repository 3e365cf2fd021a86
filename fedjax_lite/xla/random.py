"""The random bits of `jax.random`, at the speed of the machine.

JAX compiles threefry for CPUs as a loop over arrays in memory. Unrolled, its
twenty rounds fuse into one vectorised kernel: the same bits, about three times
faster. The difference is a PRNG implementation, so that everything in
`jax.random` (and dropout, and a user's own sampling code) gains by it without a
change, once it is handed a key from `fast`.
"""

import functools
import math

import jax
import jax.extend.random as jex_random
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from fedjax_lite.base import PyTree
from fedjax_lite.xla.fusion import apart

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_TAG = "ufry"
_PARITY = 0x1BD11BDA  # Salmon et al. (2011), the constant of the key schedule.
_GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio: multiples of it differ in all bits (Knuth).


def fast(key: jax.Array) -> jax.Array:
    """The same key, for the unrolled generator.

    Whatever is drawn from the result has the bits that `jax.random` draws from
    `key` itself (under JAX's default `jax_threefry_partitionable=True`). A key of
    another implementation than threefry seeds a threefry key: some of them draw
    other numbers under `vmap`, and results would depend on the number of lanes.

    Args:
      key: Typed key (`jax.random.key`), of any shape if it is a threefry key.

    Returns:
      A typed key of the same shape.

    >>> import jax
    >>> key = jax.random.key(0)
    >>> bool(jax.random.normal(key) == jax.random.normal(fast(key)))
    True
    """
    implementation = str(jax.random.key_impl(key))
    if implementation == _TAG:
        return key
    if implementation != "threefry2x32":
        key = jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_UNROLLED)


def fold_in_pair(key: jax.Array, first: ArrayLike, second: ArrayLike) -> jax.Array:
    """The key that two integers make of a key, as `jax.random.fold_in` makes one of one.

    By hashes in place of threefry, which takes long to compile: what is drawn from a key needs
    no more of it than to be another one. Other integers `second` always make other keys.

    Args:
      key: Typed key, scalar.
      first: Small integers that are not negative.
      second: Integers of 32 bits, of a shape that broadcasts against that of `first`.

    Returns:
      A fast key for each pair.
    """
    words = _hashed_pair(jax.random.key_data(fast(key)), first, second)
    return jax.random.wrap_key_data(words, impl=_UNROLLED)


def is_key(x: object) -> bool:
    """Whether `x` is a typed key array."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def normal_like(key: jax.Array, like: PyTree) -> PyTree:
    """Standard normal noise in the form of a tree of arrays, each from a key of its own.

    Both parts of complex numbers have variance 1.
    """

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        std = 2**0.5 if jnp.issubdtype(dtype, jnp.complexfloating) else 1
        return std * jax.random.normal(key, shape, dtype)

    return optax.tree.random_like(key, like, draw)


def permuted(
    key: jax.Array,
    index: jax.Array,
    size: int | jax.Array,
    *,
    which: int | jax.Array = 0,
    num_rounds: int = 24,
) -> jax.Array:
    """Where a random permutation of `0 ... size - 1` sends `index`.

    The permutation is never stored: each entry is computed by itself, whatever the size. This
    is the swap-or-not shuffle of Hoang, Morris and Rogaway (2012), "An Enciphering Scheme Based
    on a Card Shuffle": in each round an element and its mirror image about a random point
    change places, or do not, on a random bit that both of them know. The points and the bits are
    hashes of 32 bits, good for statistics and not for cryptography.

    Args:
      key: Typed key; it determines the permutations.
      index: Integers in `[0, size)`, of any shape.
      size: Number of elements, from 1 to 2**31.
      which: Which of the key's permutations, an integer that is not negative.
      num_rounds: Rounds of the shuffle. 24 pass a chi-square test over all permutations.

    Returns:
      int32 array in the shape of `index`, distinct for distinct indices.

    >>> import jax, jax.numpy as jnp
    >>> sorted(permuted(jax.random.key(0), jnp.arange(5), 5).tolist())
    [0, 1, 2, 3, 4]
    """
    words = jax.random.key_data(fast(key))
    size = jnp.asarray(size, jnp.uint32)
    return _permuted(words, index, size, which, num_rounds=num_rounds)


def hashed_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random bits by hashes of counters, a third of the time that threefry takes.

    Good for statistics and not for cryptography. They do not depend on lanes, nor on the shape:
    arrays of as many entries have the same ones in the same order.

    Args:
      key: Typed key, scalar.
      shape: The shape.

    Returns:
      uint32 array.

    >>> import jax
    >>> bool((hashed_bits(jax.random.key(0), (6,)) == hashed_bits(jax.random.key(0), (6,))).all())
    True
    """
    words = jax.random.key_data(fast(key))
    # Twice, with a word of the key each: the bits of all keys would be pieces of one sequence else.
    return _mix(_mix(_counter(shape) * jnp.uint32(_GOLDEN) + words[0]) ^ words[1])


def hashed_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Multiples of 2^-24 in [0, 1), uniform, from `hashed_bits`."""
    # Through int32, which CPUs turn into floats by one instruction.
    return (hashed_bits(key, shape) >> 8).astype(jnp.int32).astype(jnp.float32) * 2.0**-24


def rounded(key: jax.Array, x: jax.Array) -> jax.Array:
    """The integer above or below each entry, at random, whose mean is the entry."""
    below = jnp.floor(x)
    return below + (hashed_uniform(key, x.shape) < x - below)


def random_signs(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """1 and -1, as likely, from `hashed_bits`."""
    return jnp.where(hashed_bits(key, shape) >> 31, 1.0, -1.0)


def _counter(shape: tuple[int, ...]) -> jax.Array:
    """0, 1, 2 and so on in an array, uint32."""
    # A counter per axis, and not a reshaped flat one, keeps the loop vectorised.
    counter = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]))
        counter += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return counter


# What follows is traced once, not once for each use.


@jax.jit
def _hashed_pair(words: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    first, second = first.astype(jnp.uint32), second.astype(jnp.uint32)
    salt = (first + 1) * jnp.uint32(_GOLDEN)
    pair = jnp.broadcast_arrays(
        _mix(_mix(words[0] ^ second) + salt), _mix(_mix(words[1] + second) ^ salt)
    )
    return jnp.stack(pair, -1)


@functools.partial(jax.jit, static_argnames="num_rounds")
def _permuted(
    words: jax.Array, index: jax.Array, size: jax.Array, which: jax.Array, *, num_rounds: int
) -> jax.Array:
    # XLA:CPU fails to compile the swaps of what it knows to be one element.
    size = jax.lax.optimization_barrier(size)
    first = which.astype(jnp.uint32) * jnp.uint32(num_rounds)

    def swap_or_not(i: jax.Array, x: jax.Array) -> jax.Array:
        number = (first + i.astype(jnp.uint32)) * jnp.uint32(_GOLDEN)
        pivot = jax.lax.rem(_mix(words[0] + number), size)
        mirror = jnp.where(pivot >= x, pivot - x, pivot + size - x)
        swap = _mix(jnp.maximum(x, mirror) ^ _mix(words[1] + number)) & 1
        return jnp.where(swap != 0, mirror, x)

    def rounds(x: jax.Array, *, unroll: bool) -> jax.Array:
        return jax.lax.fori_loop(0, num_rounds, swap_or_not, x, unroll=unroll)

    # A CPU runs a loop over few numbers as fast as its rounds one by one, which take long to
    # compile; elsewhere each turn would be a kernel or more.
    index = index.astype(jnp.uint32)
    # Nothing is added; inside a `shard_map` it varies over the devices if the key or the size does.
    index += (words[0] ^ words[0]) | (size ^ size)
    x = jax.lax.platform_dependent(
        index,
        cpu=functools.partial(rounds, unroll=False),
        default=functools.partial(rounds, unroll=True),
    )
    return x.astype(jnp.int32)


@jax.jit
def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3, a bijection of 32 bits (Appleby)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@jax.jit
def _threefry2x32(key_data: jax.Array, x1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32-20 of the counters `(0, x1)`."""
    keys = (key_data[0], key_data[1], key_data[0] ^ key_data[1] ^ jnp.uint32(_PARITY))
    x0, x1 = keys[0], x1 + keys[1]
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = (x1 << rotation) | (x1 >> (32 - rotation))
            x1 = x0 ^ x1
        x0 = x0 + keys[(i + 1) % 3]
        x1 = x1 + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1


def _standard(key_data: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(key_data, impl="threefry2x32")


def _random_bits(key_data: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    if bit_width != 32 or math.prod(shape) >= 2**32:
        return jax.random.bits(_standard(key_data), shape, dtype=f"uint{bit_width}")

    def draw() -> jax.Array:
        x0, x1 = _threefry2x32(key_data, _counter(shape))
        return x0 ^ x1

    return apart(draw, key_data[0])


_UNROLLED = jex_random.define_prng_impl(
    key_shape=(2,),
    seed=lambda seed: jax.random.key_data(jax.random.key(seed, impl="threefry2x32")),
    split=lambda key_data, shape: jax.random.key_data(jax.random.split(_standard(key_data), shape)),
    random_bits=_random_bits,
    fold_in=lambda key_data, data: jnp.stack(_threefry2x32(key_data, jnp.uint32(data))),
    name="unrolled_threefry2x32",
    tag=_TAG,
)
