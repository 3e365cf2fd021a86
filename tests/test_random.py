import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lite.xla import random as fl_random


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (0,)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_fast_keys_draw_the_bits_of_jax(shape, dtype):
    @jax.jit
    def draw(key):
        return [jax.random.bits(k, shape, dtype) for k in (fl_random.fast(key), key)]

    np.testing.assert_array_equal(*draw(jax.random.split(jax.random.key(3), 2)[1]))


def test_fast_keys_split_and_fold_as_jax_does():
    key = jax.random.key(5)
    draw = jax.jit(
        lambda k: jax.random.normal(jax.random.fold_in(jax.random.split(k, (2, 3))[1, 2], 9), (4,))
    )
    np.testing.assert_array_equal(draw(fl_random.fast(key)), draw(key))


def test_fast_keys_agree_under_vmap_scan_and_float64():
    keys = jax.random.split(jax.random.key(1), 4)
    draw = jax.jit(jax.vmap(lambda k: jax.random.uniform(k, (5,))))
    np.testing.assert_array_equal(draw(fl_random.fast(keys)), draw(keys))

    @jax.jit
    def scanned(key):
        body = lambda c, i: (c, jax.random.normal(jax.random.fold_in(key, i), (3,)))
        return jax.lax.scan(body, 0, jnp.arange(4))[1]

    np.testing.assert_array_equal(scanned(fl_random.fast(keys[0])), scanned(keys[0]))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(
            jax.random.uniform(fl_random.fast(keys[0]), (3,)), jax.random.uniform(keys[0], (3,))
        )


def test_keys_of_other_implementations_become_threefry_keys():
    key = fl_random.fast(jax.random.key(0, impl="rbg"))
    assert key.dtype == fl_random.fast(jax.random.key(0)).dtype
    assert fl_random.fast(key) is key
    other = fl_random.fast(jax.random.key(1, impl="rbg"))
    assert jax.random.bits(key) != jax.random.bits(other)


@pytest.mark.parametrize("size", [1, np.int64(1), jnp.int32(1), 2, 3, 4, 8, 64])
def test_permuted_compiles_for_sizes_known_beforehand(size):
    order = jax.jit(lambda key: fl_random.permuted(key, jnp.arange(size), size))
    np.testing.assert_array_equal(np.sort(order(jax.random.key(0))), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 5, 100, 1000])
def test_permuted_is_a_permutation(size):
    order = fl_random.permuted(jax.random.key(size), jnp.arange(size), size)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_each_key_has_many_permutations():
    key = jax.random.key(3)
    orders = jax.vmap(lambda i: fl_random.permuted(key, jnp.arange(50), 50, which=i))(jnp.arange(9))
    assert len(set(map(tuple, np.asarray(orders).tolist()))) == 9
    np.testing.assert_array_equal(orders[0], fl_random.permuted(key, jnp.arange(50), 50))


def test_pairs_of_numbers_make_keys_of_their_own():
    keys = fl_random.fold_in_pair(jax.random.key(3), jnp.arange(3), jnp.arange(-1, 50)[:, None])
    assert keys.shape == (51, 3)
    words = np.asarray(jax.random.key_data(keys)).reshape(-1, 2)
    assert len(np.unique(words, axis=0)) == len(words)
    # What is drawn from them is as even as it would be from keys of threefry.
    draws = np.asarray(jax.vmap(jax.random.uniform)(keys.reshape(-1)))
    assert abs(draws.mean() - 1 / 2) < 4 / np.sqrt(12 * draws.size)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / np.sqrt(draws.size)


def test_permuted_handles_the_largest_size():
    index = jnp.array([0, 1, 2**31 - 1], jnp.uint32)
    order = np.asarray(fl_random.permuted(jax.random.key(0), index, jnp.uint32(2**31)))
    assert (order >= 0).all()
    assert len(set(order.tolist())) == 3


def chi_square(size, num_keys, seed, **options):
    """The statistic of the counts of all permutations against the uniform distribution."""
    keys = jax.random.split(jax.random.key(seed), num_keys)
    permute = lambda k: fl_random.permuted(k, jnp.arange(size), size, **options)
    orders = np.asarray(jax.jit(jax.vmap(permute))(keys))
    counts = dict.fromkeys(itertools.permutations(range(size)), 0)
    for order in map(tuple, orders.tolist()):
        counts[order] += 1
    expected = num_keys / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts.values()), len(counts) - 1


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_permuted_is_uniform_over_all_permutations(size):
    statistic, freedom = chi_square(size, num_keys=24_000, seed=11)
    # Mean `freedom`, standard deviation sqrt(2 freedom); six of them, both ways.
    assert abs(statistic - freedom) < 6 * np.sqrt(2 * freedom)


def test_the_uniformity_test_rejects_too_few_rounds():
    statistic, freedom = chi_square(4, num_keys=24_000, seed=12, num_rounds=4)
    assert statistic > freedom + 6 * np.sqrt(2 * freedom)


def test_permuted_sends_every_pair_everywhere():
    size, num_keys = 50, 40_000
    keys = jax.random.split(jax.random.key(13), num_keys)
    permute = lambda k: fl_random.permuted(k, jnp.arange(2), size)
    first, second = np.asarray(jax.jit(jax.vmap(permute))(keys)).T
    counts = np.bincount(first * size + second, minlength=size**2).reshape(size, size)
    assert (np.diag(counts) == 0).all()
    pairs = counts[~np.eye(size, dtype=bool)]
    freedom = pairs.size - 1
    statistic = ((pairs - pairs.mean()) ** 2 / pairs.mean()).sum()
    assert abs(statistic - freedom) < 6 * np.sqrt(2 * freedom)


def test_hashed_bits_pass_for_random_ones():
    keys = jax.random.split(jax.random.key(7), 64)
    bits = jax.vmap(lambda key: fl_random.hashed_bits(key, (4096,)))(keys)
    drawn = np.asarray(bits)
    # Each byte of a word, by chi-square with 255 degrees of freedom, whose deviation is 22.6.
    for shift in (0, 8, 16, 24):
        counts = np.bincount(((drawn >> shift) & 255).ravel(), minlength=256)
        expected = drawn.size / 256
        assert abs(np.square(counts - expected).sum() / expected - 255) < 5 * 22.6
    # Neighbours, and what two keys draw at the same place or one apart, differ in half of the bits.
    count = lambda x: np.bitwise_count(x).mean() / 32
    for pair in (
        *((drawn[:, 1:], drawn[:, :-1]), (drawn[1:], drawn[:-1])),
        *((drawn[1:, 1:], drawn[:-1, :-1]), (drawn[:, 2048:], drawn[:, :2048])),
    ):
        # The deviation is that of one in 8 million, 1.8e-4, or twice that.
        assert abs(count(pair[0] ^ pair[1]) - 0.5) < 1.5e-3
    # No two keys draw the same words anywhere: 64 x 4096 of them meet by chance 8 times.
    assert drawn.size - np.unique(drawn).size < 30


def test_hashed_bits_depend_on_key_and_place_alone():
    key = jax.random.key(3)
    flat = fl_random.hashed_bits(key, (24,))
    np.testing.assert_array_equal(fl_random.hashed_bits(key, (2, 3, 4)).ravel(), flat)
    np.testing.assert_array_equal(fl_random.hashed_bits(fl_random.fast(key), (24,)), flat)
    many = jax.vmap(lambda key: fl_random.hashed_bits(key, (24,)))(key[None])
    np.testing.assert_array_equal(many[0], flat)


def test_hashed_numbers_are_uniform_and_round_right_on_average():
    key = jax.random.key(9)
    x = np.asarray(fl_random.hashed_uniform(key, (2**18,)), float)
    assert 0 <= x.min() < x.max() < 1
    # Kolmogorov and Smirnov: more than 1.95 once in a thousand keys.
    distance = np.abs(np.sort(x) - (np.arange(x.size) + 0.5) / x.size).max()
    assert distance * np.sqrt(x.size) < 1.95
    signs = np.asarray(fl_random.random_signs(key, (2**18,)))
    assert set(signs) == {-1.0, 1.0}
    assert abs(signs.mean()) < 5 / 2**9
    values = jnp.array([-1.25, 0.0, 3.0, 0.9])
    keys = jax.random.split(key, 20000)
    rounded = np.asarray(jax.vmap(lambda key: fl_random.rounded(key, values))(keys))
    assert set(rounded[:, 0]) == {-2.0, -1.0}
    # The deviation is at most 0.5 / sqrt(20000).
    np.testing.assert_allclose(rounded.mean(0), values, atol=0.015)
