"""Compressors: their bits, their errors, and what holds of all of them."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from reference import encoding
from test_updates import EXTREMES, MOST

import fedjax_lite as fl
from fedjax_lite.updates.qsgd import omega_bits
from fedjax_lite.updates.rotation import lloyd_max
from fedjax_lite.updates.sparsification import choice_bits
from fedjax_lite.xla import random
from fedjax_lite.xla.hadamard import walsh_hadamard

KEY = jax.random.key(0)
# 39 entries, in the order in which trees have them.
UPDATE = {
    name: jnp.asarray(x, jnp.float32)
    for name, x in {
        "a": np.random.default_rng(1).normal(size=(7, 5)),
        "b": [3.0, -0.25, 0.125],
        "c": -1.5,
        "d": np.zeros((2, 0)),
    }.items()
}
VECTOR = jax.random.normal(jax.random.key(2), (64,)) * jnp.linspace(0, 2, 64)


def send(transform, update, key=KEY, state=None):
    """The update as it is decoded, and its bits."""
    state = transform.init(update) if state is None else state
    entry = () if transform.entry is None else transform.entry(update)
    message = fl.Message(update, jnp.float32(1), entry)
    sent = transform.client(key, state, message, None)
    return sent.update, sent.metrics["bits_up"]


compiled = jax.jit(send, static_argnums=0)
permuted = jax.jit(random.permuted, static_argnums=2)


def squared(x):
    return np.square(np.asarray(x, np.float64)).sum(-1)


@functools.cache
def signs_of(size):
    """What rotations of so many entries derive from the key."""
    draw = jax.jit(lambda key: random.random_signs(random.fold_in_pair(key, 0, 0), (size,)))
    return np.asarray(draw(KEY), np.float64)


@jax.jit
def of_inner(key):
    """The keys of what a rotation rotates back, and of what it chooses before."""
    return random.fold_in_pair(key, 2, 0), random.fold_in_pair(key, 1, 0)


def rotated(update, sent):
    """The quantiser's message in the other coordinates."""
    signs, y = signs_of(64), np.concatenate([x.ravel() for x in sent])
    x = np.append(np.concatenate([x.ravel() for x in update]), np.zeros(64 - y.size))
    turned = encoding.hadamard(signs * x).astype(np.float32)
    # Of what has been cut off after the rotation back, the client knows the levels.
    inner = fl.quantize_uniform(256)
    levels, _ = compiled(inner, turned, of_inner(KEY)[0])
    out, (read,) = encoding.uniform([turned], [np.asarray(levels)], 256)
    decoded = (signs * encoding.hadamard(read))[: y.size]
    return out, encoding.arrays_of(decoded, [x.shape for x in update])


def masked(transform):
    """With the mask that the key gives, which any update shows."""
    ones = jax.tree.map(np.ones_like, UPDATE)

    def read(update, sent):
        mask = [np.asarray(x) for x in jax.tree.leaves(compiled(transform, ones)[0])]
        return encoding.masked(update, sent, mask)

    return read


def fraction(update, sent):
    """A bit for each chosen entry, in other coordinates."""
    _, key = of_inner(KEY)
    mask = jax.tree.leaves(compiled(fl.random_k(8), UPDATE, key)[0])
    chosen = np.concatenate([np.ravel(x) for x in mask]) != 0
    # They are rotated in the order in which they were chosen.
    order = np.asarray(permuted(key, np.arange(8), 39))
    assert set(order) == set(np.flatnonzero(chosen))
    pick = lambda arrays: np.concatenate([x.ravel() for x in arrays])[order]
    few, (read,) = encoding.levels([pick(update)], [pick(sent)], signs_of(8), lloyd_max(1))
    decoded = np.zeros(39)
    decoded[order] = read
    return few, encoding.arrays_of(decoded, [x.shape for x in update])


def projected(update, sent):
    ((right, _), *_), _ = jax.jit(fl.power_sgd(1).init)(UPDATE)
    return encoding.projected(update, sent, [np.asarray(right), None, None, None])


def levels(bits):
    return lambda *x: encoding.levels(*x, signs_of(64), lloyd_max(bits))


def with_(function, *args):
    return lambda *x: function(*x, *args)


# By name, the transform and what packs its messages.
PACKED = {
    "float16": (fl.half_precision("float16"), with_(encoding.half, np.float16)),
    "bfloat16": (fl.half_precision(), with_(encoding.half, ml_dtypes.bfloat16)),
    "uniform": (fl.quantize_uniform(5), with_(encoding.uniform, 5)),
    "affine": (fl.quantize_scalar(3), with_(encoding.scalar, 3, False, False)),
    "one bit": (fl.quantize_scalar(1), with_(encoding.scalar, 1, False, False)),
    "channels": (
        fl.quantize_scalar(8, per_channel=True),
        with_(encoding.scalar, 8, False, True),
    ),
    "symmetric": (
        fl.quantize_scalar(4, symmetric=True, per_channel=True),
        with_(encoding.scalar, 4, True, True),
    ),
    "rotated": (fl.rotated(fl.quantize_uniform(256)), rotated),
    "drive": (fl.drive(), levels(1)),
    "drive, unbiased": (fl.drive(unbiased=True), levels(1)),
    "eden": (fl.eden(3), levels(3)),
    "eden, a fraction": (fl.eden(8 / 39), fraction),
    "sign_sgd": (fl.sign_sgd(), encoding.signs),
    "scaled_sign": (fl.scaled_sign(), encoding.signed),
    "terngrad": (fl.terngrad(), encoding.ternary),
    "terngrad, clipped": (fl.terngrad(1.5), encoding.ternary),
    "qsgd": (fl.qsgd(5), with_(encoding.qsgd, 5)),
    "qsgd, buckets": (fl.qsgd(3, bucket_size=10), with_(encoding.qsgd, 3, 10)),
    "elias": (fl.qsgd(2, encoding="elias"), with_(encoding.elias, 2)),
    "elias, buckets": (
        fl.qsgd(40, bucket_size=10, encoding="elias"),
        with_(encoding.elias, 40, 10),
    ),
    "top_k": (fl.top_k(6), with_(encoding.largest, 6)),
    "random_k": (fl.random_k(0.2), masked(fl.random_k(0.2))),
    "random_k, arrays": (
        fl.random_k(2, per_array=True, unbiased=False),
        masked(fl.random_k(2, per_array=True)),
    ),
    "product": (fl.product_quantization(4, 3), with_(encoding.means, 4, 3)),
    "low_rank": (fl.low_rank(2), with_(encoding.low_rank, 2)),
    "power_sgd": (fl.power_sgd(1), projected),
}


@functools.cache
def sent_both_ways(name):
    """Up, and down where there is a way."""
    transform = PACKED[name][0]

    @jax.jit
    def both(key, update):
        up = send(transform, update, key)
        if name == "power_sgd":
            return up, ()
        down = fl.downlink(transform)
        return up, down.broadcast(key, down.init(update), update)

    return jax.device_get(both(KEY, UPDATE))


@pytest.mark.parametrize("name", PACKED)
def test_bits_are_those_of_a_message_from_which_the_update_is_decoded(name):
    (sent, bits), _ = sent_both_ways(name)
    update = [np.asarray(x) for x in jax.tree.leaves(UPDATE)]
    sent = [np.asarray(x) for x in jax.tree.leaves(sent)]
    packed, decoded = PACKED[name][1](update, sent)
    assert len(packed.bits) == bits
    assert packed.place == bits  # All has been read.
    for x, y in zip(decoded, sent, strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("name", [name for name in PACKED if name != "power_sgd"])
def test_the_way_down_takes_the_same_bits(name):
    (expected, expected_bits), (sent, bits) = sent_both_ways(name)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), sent, expected)
    assert bits == expected_bits


def test_omega_codes_are_as_long_as_they_are():
    numbers = [*range(1, 70), *(2**i + j for i in range(7, 31) for j in (-1, 0))]
    expected = []
    for number in numbers:
        code = encoding.Writer()
        code.omega(number)
        expected.append(len(code.bits))
        assert code.read_omega() == number
    np.testing.assert_array_equal(jax.jit(omega_bits)(np.int32(numbers)), expected)


def test_choices_are_counted():
    for size, number in [(5, 2), (64, 1), (9, 9), (10, 0), (3000, 1200), (5000, 2500)]:
        exact = math.comb(size, number)
        assert choice_bits(size, number) == (exact - 1).bit_length()
        # No more than indices, nor than a mask.
        assert choice_bits(size, number) <= min(size, number * math.ceil(math.log2(size)))


NUM_KEYS = 8000
UNBIASED = {
    # The transform, and the bound of its mean squared error relative to the squared norm.
    "uniform": (fl.quantize_uniform(5), 64 * np.ptp(VECTOR) ** 2 / 64 / squared(VECTOR)),
    "rotated": (fl.rotated(fl.quantize_uniform(5)), 0.5),
    "terngrad": (fl.terngrad(), np.abs(VECTOR).sum() * np.abs(VECTOR).max() / squared(VECTOR)),
    "qsgd, 1": (fl.qsgd(1), min(64, 8)),
    "qsgd, 4": (fl.qsgd(4), min(64 / 16, 8 / 4)),
    "qsgd, 32": (fl.qsgd(32), min(64 / 32**2, 8 / 32)),
    "qsgd, buckets": (fl.qsgd(4, bucket_size=16), min(16 / 16, 4 / 4)),
    "random_k": (fl.random_k(16), 3.1),
    "drive": (fl.drive(unbiased=True), 0.7),
    "eden": (fl.eden(2), 0.2),
    "eden, a fraction": (fl.eden(0.5), 3),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_what_is_unbiased_is_right_on_average(name):
    transform, bound = UNBIASED[name]
    keys = jax.random.split(jax.random.key(3), NUM_KEYS)
    many = np.asarray(
        jax.jit(jax.vmap(lambda key: send(transform, VECTOR, key)[0]))(keys), np.float64
    )
    x = np.asarray(VECTOR, np.float64)
    standard_error = many.std(0) / np.sqrt(NUM_KEYS)
    # Of 64 coordinates, one is 5 standard errors off once in 27,000 runs.
    np.testing.assert_array_less(np.abs(many.mean(0) - x), 5 * standard_error + 1e-5)
    # A scale that is wrong by a twentieth is found out: along the update, that is 10 of them.
    along = many @ x / squared(x)
    error = along.std() / np.sqrt(NUM_KEYS)
    assert error < 0.05 / 10
    assert abs(along.mean() - 1) < 5 * error + 1e-5
    # The error is within its bound, and for a random choice exactly what it should be.
    mean_error = (squared(many - x) / squared(x)).mean()
    assert mean_error <= bound
    if name == "random_k":
        np.testing.assert_allclose(mean_error, 3, rtol=0.1)


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (fl.eden(1), 0.5708),
        (fl.eden(2), 0.1331),
        (fl.eden(3), 0.0358),
        (fl.eden(4), 0.0096),
        (fl.drive(unbiased=True), math.pi / 2 - 1),
        (fl.drive(), 1 - 2 / math.pi),
        # Of half of the entries, twice as large: 2 (1 + error) - 1.
        (fl.eden(0.5), 2 * math.pi / 2 - 1),
    ],
)
def test_rotations_make_the_error_that_of_a_normal_distribution(transform, expected):
    """By the table in the paper on EDEN; within 2 %, where a scale off by 2 % adds 4e-4."""
    x = np.random.default_rng(4).laplace(size=2**14) * np.linspace(0, 1, 2**14)
    x = jnp.asarray(x, jnp.float32)
    keys = jax.random.split(KEY, 8)
    errors = jax.jit(
        jax.vmap(lambda key: jnp.square(send(transform, x, key)[0] - x).sum() / (x @ x))
    )(keys)
    np.testing.assert_allclose(np.mean(errors), expected, rtol=0.02)


def test_levels_are_the_means_of_what_is_nearest_to_them():
    # As in the table of the paper, to six digits.
    np.testing.assert_allclose(lloyd_max(1), [math.sqrt(2 / math.pi)], rtol=1e-9)
    np.testing.assert_allclose(lloyd_max(2), [0.45278, 1.51042], atol=5e-6)
    np.testing.assert_allclose(lloyd_max(3), [0.24509, 0.75601, 1.34391, 2.15195], atol=6e-6)
    x = np.linspace(-12, 12, 2_000_001)
    weight = np.exp(-np.square(x) / 2)
    for bits in (4, 8):
        found = lloyd_max(bits)
        both = np.append(-found[::-1], found)
        nearest = np.searchsorted((both[1:] + both[:-1]) / 2, x)
        means = np.bincount(nearest, weight * x) / np.bincount(nearest, weight)
        np.testing.assert_allclose(both, means, atol=1e-4)


def test_the_transform_of_walsh_and_hadamard():
    x = np.float32(np.random.default_rng(0).normal(size=(3, 2, 2**11)))
    matrix = np.ones((1, 1))
    for _ in range(11):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    expected = np.asarray(x, np.float64) @ matrix / np.sqrt(2**11)
    transform = jax.jit(walsh_hadamard)
    transformed = transform(x)
    np.testing.assert_allclose(transformed, expected, atol=1e-5)
    np.testing.assert_allclose(transform(transformed), x, atol=1e-5)
    assert transform(np.ones((2, 1), np.float32)).tolist() == [[1.0], [1.0]]
    large = transform(np.float32([MOST, 0.0, 0.0, 0.0]))
    np.testing.assert_allclose(large, np.full(4, MOST / 2), rtol=1e-6)


SHORTER = {
    # What makes no update longer, and what part of its squared norm is lost at most.
    "drive": (fl.drive(), 1),
    "eden": (fl.eden(2, unbiased=False), 1),
    "eden, a fraction": (fl.eden(0.3, unbiased=False), 1),
    "rotated": (fl.rotated(fl.top_k(8)), 1 - 8 / 64),
    "scaled_sign": (fl.scaled_sign(), 1 - 1 / 64),
    "top_k": (fl.top_k(8), 1 - 8 / 64),
    "random_k": (fl.random_k(8, unbiased=False), 1),
    "product": (fl.product_quantization(4, 4, num_iterations=2), 1),
    "low_rank": (fl.low_rank(2), 1),
    "power_sgd": (fl.power_sgd(2), 1),
}
OTHERS = {
    **{name: transform for name, (transform, _) in UNBIASED.items()},
    "half": fl.half_precision(),
    "scalar": fl.quantize_scalar(4),
    "sign": fl.sign_sgd(),
    "rotated, scaled": fl.rotated(fl.quantize_uniform(4)),
    "error_feedback": fl.error_feedback(fl.drive()),
    "ef21": fl.ef21(fl.drive()),
}


@pytest.mark.parametrize("name", SHORTER)
def test_what_bounds_the_norm_keeps_to_it(name):
    transform, lost = SHORTER[name]
    rng = np.random.default_rng(0)
    updates = rng.standard_t(2, (200, 8, 8)) * (rng.random((200, 8, 8)) < rng.random((200, 1, 1)))
    updates = updates.astype(np.float32)
    keys = jax.random.split(KEY, 200)
    sent = jax.jit(jax.vmap(lambda key, x: send(transform, x, key)[0]))(keys, updates)
    x, y = updates.reshape(200, 64), np.asarray(sent).reshape(200, 64)
    assert (squared(y) <= squared(x) * (1 + 1e-5)).all()
    assert (squared(x - y) <= lost * squared(x) * (1 + 1e-5)).all()
    assert transform.guarantees(fl.Guarantees(sensitivity=0.5), None).sensitivity == 0.5


def test_what_bounds_no_norm_says_so():
    for transform in OTHERS.values():
        assert transform.guarantees(fl.Guarantees(sensitivity=0.5), None).sensitivity is None
        with pytest.raises(ValueError, match="comes after a mask"):
            transform.guarantees(fl.Guarantees(is_masked=True), None)


HALF = jnp.finfo(jnp.bfloat16).max
ROWS = [name for name in EXTREMES if name not in ("scalar", "empty", "least")]
CASES = {name: x for name, (x, _) in {**SHORTER, **UNBIASED}.items()} | OTHERS


@pytest.mark.parametrize("name", CASES)
def test_extremes_have_a_documented_outcome(name):
    """Numbers may be of any size, whatever their squares are; zeros stay, and NaN shows."""
    rows = [(EXTREMES[row][0] + [0.0])[:3] for row in ROWS]
    rows = np.array([row + [0.0] * (3 - len(row)) for row in rows], np.float32)
    # The same numbers in units in which squares are harmless.
    largest = np.abs(np.where(np.isfinite(rows), rows, 0)).max(1, keepdims=True)
    unit = 2.0 ** np.floor(np.log2(np.where(largest > 0, largest, 1))).astype(np.float64)
    transform = CASES[name]
    as_tree = lambda x: {"x": x, "s": x[0], "e": jnp.zeros((2, 0))}
    lanes = jax.jit(jax.vmap(lambda x: send(transform, as_tree(x))[0]))
    sent, small = jax.device_get((lanes(rows), lanes((rows / unit).astype(np.float32))))
    for i, row in enumerate(ROWS):
        got, expected = ([x[k][i] for k in "xse"] for x in (sent, small))
        assert got[2].shape == (2, 0)
        got, expected = (np.append(x[0], x[1]) for x in (got, expected))
        if row in ("NaN", "infinity"):
            assert not np.isfinite(got).all() or (name == "sign" and row == "infinity")
        elif name == "sign":
            assert (np.abs(got) == 1).all()
        elif row == "zeros":
            np.testing.assert_array_equal(got, np.zeros(4))
        else:
            with np.errstate(over="ignore"):
                expected = (unit[i] * expected).astype(np.float32)
            if name == "half":  # Which makes no finite number infinite.
                expected = np.clip(expected, -float(HALF), float(HALF))
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6 * largest[i, 0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes_stay(dtype):
    update = {"a": jnp.array([[3.0, -1.0], [0.5, 0.25]], dtype), "b": jnp.ones(2, dtype)}
    for transform in CASES.values():
        sent, _ = jax.eval_shape(functools.partial(send, transform), update)
        assert {x.dtype for x in jax.tree.leaves(sent)} == {jnp.dtype(dtype)}
    sent, bits = compiled(fl.top_k(2), update)
    assert sent["a"].tolist() == [[3.0, -1.0], [0.0, 0.0]]
    assert bits == 2 * 16 + 4  # 15 choices.


def test_of_equal_entries_the_first_are_kept():
    x = np.float32([1.0, -2.0, 2.0, 2.0, -1.0, 2.0, 0.0, 0.0])
    keep = jax.jit(lambda x: [send(fl.top_k(k), x)[0] for k in (1, 2, 3, 5, 7, 8)])
    order = np.argsort(-np.abs(x), stable=True)
    for k, sent in zip((1, 2, 3, 5, 7, 8), keep(x), strict=True):
        expected = np.zeros(8)
        expected[order[:k]] = x[order[:k]]
        np.testing.assert_array_equal(sent, expected)
    sent, _ = compiled(fl.top_k(0.5, per_array=True), [x[:2], x[2:4]])
    assert sent[1].tolist() == [2.0, 0.0]


def test_scalar_quantisers_move_no_entry_further_than_they_say():
    x = np.random.default_rng(0).normal(size=(40, 6)) * [1, 2, 4, 8, 0.1, 0]
    x = x.astype(np.float32)

    @jax.jit
    def both(x):
        build = functools.partial(fl.quantize_scalar, 4)
        return [
            [send(build(symmetric=symmetric, per_channel=c), x)[0] for symmetric in (True, False)]
            for c in (False, True)
        ]

    sent = jax.device_get(both(x))
    for axes, (symmetric, affine) in zip([(0, 1), 0], sent, strict=True):
        step = np.abs(x).max(axes) / 7
        assert (np.abs(symmetric - x) <= step / 2 * (1 + 1e-5)).all()
        step = (np.maximum(x.max(axes), 0) - np.minimum(x.min(axes), 0)) / 15
        assert (np.abs(affine - x) <= step * (1 + 1e-5)).all()
        assert (affine[:, 5] == 0).all()


def test_clusters_are_those_of_a_reference():
    x = np.random.default_rng(0).normal(size=(40, 3))
    compress = fl.product_quantization(6, 3, num_iterations=4)
    sent, _ = compiled(compress, np.float32(x))
    means = x[np.asarray(permuted(KEY, np.arange(6), 40))]
    for _ in range(4):
        member = np.square(x[:, None] - means).sum(-1).argmin(1)
        means = np.array(
            [x[member == i].mean(0) if (member == i).any() else means[i] for i in range(6)]
        )
    np.testing.assert_allclose(sent, means[member], atol=1e-5)


def test_low_rank_projects_to_the_directions_of_a_power_iteration():
    x = np.random.default_rng(0).normal(size=(4, 5, 3))
    matrix = x.reshape(20, 3)
    draw = jax.jit(lambda key: jax.random.normal(random.fold_in_pair(key, 0, 0), (3, 2)))
    drawn = draw(KEY)
    left, _ = np.linalg.qr(matrix @ np.asarray(drawn, np.float64))
    sent, bits = compiled(fl.low_rank(2), np.float32(x))
    np.testing.assert_allclose(sent.reshape(20, 3), left @ left.T @ matrix, atol=1e-5)
    assert bits == 32 * 2 * 23


def test_power_sgd_finds_the_best_directions_of_the_mean():
    rng = np.random.default_rng(0)
    clients = rng.normal(size=(5, 9, 6)).astype(np.float32)
    transform = fl.power_sgd(2)
    tree = lambda x: {"m": x, "v": x[..., 0]}

    @jax.jit
    def round(state):
        _, down = transform.broadcast(KEY, state, tree(clients[0]))
        sent, bits = jax.vmap(lambda x: send(transform, tree(x), state=state))(clients)
        mean = jax.tree.map(lambda x: x.mean(0), sent)
        received, state, _ = transform.server(KEY, state, fl.Received(mean))
        return received.aggregate, state, bits, down

    start = jax.jit(transform.init)(tree(clients[0]))
    state, sizes, down = start, [], []
    for _ in range(200):
        aggregate, state, bits_up, bits_down = round(state)
        sizes.append(float(bits_up[0]))
        down.append(float(bits_down))
    u, s, v = np.linalg.svd(clients.mean(0))
    np.testing.assert_allclose(aggregate["m"], (u[:, :2] * s[:2]) @ v[:2], atol=1e-4)
    np.testing.assert_allclose(aggregate["v"], clients.mean(0)[:, 0], atol=1e-6)
    # A factor of the rows and one of the columns in turn; the vector whole.
    assert sizes[:2] == [32 * (2 * 9 + 9), 32 * (2 * 6 + 9)]
    assert down[:2] == [32 * (54 + 9 + 2 * 6), 32 * (54 + 9 + 2 * 9)]
    # It is linear: the mean of what clients send is what would be sent of their mean.
    sent = [compiled(transform, tree(x), state=start)[0]["m"] for x in clients]
    of_mean, _ = compiled(transform, tree(clients.mean(0)), state=start)
    np.testing.assert_allclose(np.mean(sent, 0), of_mean["m"], atol=1e-6)


def test_each_place_is_as_likely_to_be_chosen():
    keys = jax.random.split(KEY, 3000)
    chosen = jax.jit(jax.vmap(lambda key: send(fl.random_k(2), jnp.ones(8), key)[0] != 0))(keys)
    chosen = np.asarray(chosen)
    assert (chosen.sum(1) == 2).all()
    # The standard deviation is 0.0079.
    np.testing.assert_allclose(chosen.mean(0), np.full(8, 0.25), atol=0.04)


# Of 39 entries, three at most are one in 9139.
SPARSE, HALVED = 3 * 32 + 14, 16 * 39


@pytest.mark.parametrize(
    ("transforms", "bits"),
    [
        # The server rounds what it has decoded, and need not be sent zeros.
        ((fl.top_k(3), fl.half_precision()), SPARSE),
        ((fl.half_precision(), fl.top_k(3)), SPARSE),
        ((fl.half_precision(), fl.clip_by_norm(1.0), fl.cap_weight(1.0)), HALVED),
        ((fl.chain(fl.half_precision(), fl.top_k(3)), fl.half_precision()), SPARSE),
        # The server knows neither the noise nor what a client keeps, and masks hide its message.
        ((fl.top_k(3), fl.local_gaussian_noise(1.0, 0.5)), 39 * 32),
        ((fl.top_k(3), fl.local_laplace_noise(1.0, 0.5), fl.half_precision()), HALVED),
        ((fl.top_k(3), fl.error_feedback(fl.half_precision())), HALVED),
        ((fl.top_k(3), fl.ef21(fl.clip_by_norm(1.0))), 39 * 32),
        ((fl.top_k(3), fl.client_momentum(0.5)), 39 * 32),
        ((fl.top_k(3), fl.fixed_point(1.0, 1.0, modulus_bits=24, denominator=1.0)), 39 * 24),
    ],
)
def test_bits_of_a_chain_are_those_of_what_has_to_be_sent(transforms, bits):
    both = fl.chain(*transforms)
    assert jax.jit(lambda update: send(both, update)[1])(UPDATE) == bits


def test_bits_down_of_a_chain_are_those_of_what_has_to_be_sent():
    coarse, fine = fl.downlink(fl.quantize_uniform(16)), fl.downlink(fl.half_precision())
    # Of 4 bits and two extremes for each of three arrays that are not empty.
    fewest = 39 * 4 + 3 * 64
    bases = fl.power_sgd(1)  # Of the first array, 7 x 5, a basis of five numbers goes down.
    for transforms, bits in [
        ((fine, coarse), fewest),
        ((coarse, fine), fewest),
        ((bases, fl.top_k(3)), 39 * 32 + 5 * 32),
        ((bases, coarse), fewest + 5 * 32),
        ((coarse, bases), fewest + 5 * 32),
    ]:
        both = fl.chain(*transforms)
        down = jax.jit(lambda state, both=both: both.broadcast(KEY, state, UPDATE)[1])
        assert down(both.init(UPDATE)) == bits


INTEGERS = (
    fl.fixed_point(1.0, 1.0),
    fl.chain(fl.clip_by_norm(1.0), fl.fixed_point(1.0, 1.0)),
)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: fl.half_precision("float32"), "dtype is 'float32'; choose one of"),
        (lambda: fl.quantize_scalar(9), "num_bits is 9; choose an integer between 1 and 8"),
        (lambda: fl.quantize_scalar(1, symmetric=True), "num_bits is 1; choose .* between 2"),
        (lambda: fl.eden(1.5), "num_bits is 1.5; choose an integer, or a number below 1"),
        (lambda: fl.eden(0), "num_bits is 0; choose a number between 0 and 8"),
        (lambda: fl.terngrad(-1.0), "clip_factor is -1.0; choose a number above 0"),
        (lambda: fl.qsgd(0), "num_levels is 0; choose an integer"),
        (lambda: fl.qsgd(4, bucket_size=0), "bucket_size is 0; choose an integer"),
        (lambda: fl.qsgd(4, encoding="huffman"), "encoding is 'huffman'; choose one of"),
        (lambda: fl.top_k(0), "k is 0; choose an integer at least 1"),
        (lambda: fl.random_k(1.5), "k is 1.5; choose a number between 0 and 1"),
        (lambda: fl.product_quantization(0), "num_centroids is 0"),
        (lambda: fl.low_rank(0), "rank is 0; choose an integer at least 1"),
        (lambda: fl.power_sgd(0), "rank is 0; choose an integer at least 1"),
        (lambda: fl.rotated(fl.error_feedback(fl.drive())), "rotate inside of it"),
        *(
            (
                functools.partial(wrap, integers),
                f"{wrap.__name__} cannot take for updates.*last, as",
            )
            for wrap in (fl.error_feedback, fl.ef21, fl.rotated, fl.downlink)
            for integers in INTEGERS
        ),
        (lambda: fl.error_feedback(fl.drive(), decay=1.5), "decay is 1.5; choose a number between"),
        (lambda: fl.error_feedback(fl.drive(), max_age=0), "max_age is 0; choose an integer"),
        (lambda: fl.downlink(fl.power_sgd(1)).init(UPDATE), "transform keeps a state"),
    ],
)
def test_what_is_wrong_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
