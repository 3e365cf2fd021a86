"""Robust reducers, what goes before them, and attacks, on stacks of updates made by hand."""

import functools
import importlib
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import robust as reference

import fedjax_lite as fl
from fedjax_lite.updates.hostile import Counted, num_tolerated
from fedjax_lite.updates.robust import in_order

KEY = jax.random.key(3)
ROWS = np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
N, D = 11, 50


def random_rows(n=N, d=D, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def stack_of(x, weights=None, ids=None, last=0.0, dtype=None):
    """Rows of two arrays: the first coordinate, and the others."""
    x = np.asarray(x, dtype)
    n = len(x)
    last = np.broadcast_to(np.asarray(last, x.dtype), x.shape[1:])
    return fl.Stack(
        updates=[x[:, :1], x[:, 1:]],
        weights=np.ones(n) if weights is None else np.asarray(weights, float),
        client_ids=np.asarray(np.arange(n) if ids is None else ids, np.int32),
        is_hostile=np.zeros(n, bool),
        last=[last[:1], last[1:]],
        key=KEY,
        total=None,
    )


@functools.cache  # Compiled once for each shape and dtype of updates.
def compiled(reducer):
    return jax.jit(lambda stack: reducer.stacked(stack._replace(total=lambda x: x)))


def reduce(reducer, x, **options):
    """The aggregate, and what is reported."""
    aggregate, info = compiled(reducer)(stack_of(x, **options))
    return np.concatenate(aggregate), info


# The updates as a reducer is given them, as if they were the aggregate.
UPDATES = fl.Reducer(stacked=lambda stack: (stack.updates, {}))


def rows_before(make, x, **options):
    """What comes to a reducer."""
    changed, info = compiled(make(UPDATES))(stack_of(x, **options))
    return np.concatenate(changed, axis=1), info


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


VECTORS = {
    "median": (fl.coordinate_median(), [4, 5, 6]),
    "trimmed mean": (fl.trimmed_mean(1), [4, 5, 6]),
    "centered clipping": (fl.centered_clipping(100.0), [4, 5, 6]),
    "geometric median": (
        fl.geometric_median(3, smoothing=0.1),
        [3.78788764, 4.78788764, 5.78788764],
    ),
    "Krum": (fl.krum(1), [1, 2, 3]),  # All are as close: the first client's.
    "multi-Krum": (fl.multi_krum(1), [2.5, 3.5, 4.5]),
    "mean around median": (fl.mean_around_median(1), [2.5, 3.5, 4.5]),
}


@pytest.mark.parametrize("name", VECTORS)
def test_rules_give_the_vectors_of_byzfl(name):
    reducer, expected = VECTORS[name]
    np.testing.assert_allclose(reduce(reducer, ROWS)[0], expected, rtol=1e-8)


def test_what_goes_before_gives_the_vectors_of_byzfl():
    mixed, info = rows_before(lambda inner: fl.nearest_neighbor_mixing(1, inner), ROWS)
    np.testing.assert_allclose(mixed, [[2.5, 3.5, 4.5], [2.5, 3.5, 4.5], [5.5, 6.5, 7.5]])
    assert (info["num_counted"], info["num_tolerated"]) == (3, 1)
    clipped, info = rows_before(lambda inner: fl.norm_clipping(2.0, inner), ROWS)
    expected = [
        [0.53452248, 1.06904497, 1.60356745],
        [0.91168461, 1.13960576, 1.36752692],
        [1.00514142, 1.14873305, 1.29232469],
    ]
    np.testing.assert_allclose(clipped, expected, rtol=1e-8)
    assert info["num_clipped"] == 3
    clipped, info = rows_before(lambda inner: fl.adaptive_robust_clipping(1, inner), ROWS)
    expected = [*ROWS[:2], [4.41004009, 5.04004582, 5.67005155]]
    np.testing.assert_allclose(clipped, expected, rtol=1e-8)
    assert info["num_clipped"] == 1


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda inner: fl.sign_flip([3], inner), [-4, -5, -6]),
        (lambda inner: fl.inner_product_manipulation([3], inner), [-8, -10, -12]),
        (lambda inner: fl.little_is_enough([3], inner, z=1.5), [8.5, 9.5, 10.5]),
        (lambda inner: fl.mimic([3], inner), [1, 2, 3]),
    ],
)
def test_attacks_give_the_vectors_of_byzfl(make, expected):
    sent, info = rows_before(make, np.vstack([ROWS, np.full(3, 99.0)]))
    np.testing.assert_allclose(sent, [*ROWS, expected])
    assert info["num_hostile"] == 1


def of(hostile, x, per=2, beyond=1):
    """The number of hostile rows that a rule reckons with."""
    wanted = hostile if isinstance(hostile, int) else int(hostile * len(x) + 1e-9)
    return max(min(wanted, (len(x) - beyond) // per), 0)


RULES = {
    "median": (fl.coordinate_median(), reference.median),
    "trimmed mean": (fl.trimmed_mean(0.2), lambda x: reference.trimmed_mean(x, of(0.2, x))),
    "mean around median": (
        fl.mean_around_median(0.28),
        lambda x: reference.mean_around_median(x, of(0.28, x)),
    ),
    "Krum": (fl.krum(4), lambda x: reference.krum(x, of(4, x))),
    "Krum of ByzFL": (fl.krum(3, margin=1), lambda x: reference.krum(x, 3, 1)),
    "multi-Krum": (fl.multi_krum(0.2), lambda x: reference.multi_krum(x, of(0.2, x))),
    "multi-Krum of 5": (
        fl.multi_krum(2, 5, margin=1),
        lambda x: reference.multi_krum(x, 2, 5, 1),
    ),
    "Bulyan": (fl.bulyan(2), lambda x: reference.bulyan(x, of(2, x, 4, 3))),
    "Bulyan of a share": (
        fl.bulyan(0.1, margin=1),
        lambda x: reference.bulyan(x, of(0.1, x, 4, 3), 1),
    ),
    "geometric median": (
        fl.geometric_median(),
        lambda x: reference.geometric_median(x, 8, 1e-6),
    ),
    "geometric median from the mean": (
        fl.geometric_median(2, smoothing=7.0, start="mean"),
        lambda x: reference.geometric_median(x, 2, 7.0, "mean"),
    ),
    "centered clipping": (
        fl.centered_clipping(5.0, 3),
        lambda x: reference.centered_clipping(x, 5.0, 3),
    ),
    "after mixing": (
        fl.nearest_neighbor_mixing(0.2, fl.trimmed_mean(0.2)),
        lambda x: reference.trimmed_mean(
            reference.nearest_neighbor_mixing(x, of(0.2, x)), of(0.2, x)
        ),
    ),
    "after clipping": (
        fl.norm_clipping(6.0, fl.krum(2)),
        lambda x: reference.krum(reference.norm_clipping(x, 6.0), 2),
    ),
    "after adaptive clipping": (
        fl.adaptive_robust_clipping(0.3, fl.coordinate_median()),
        lambda x: reference.median(reference.adaptive_robust_clipping(x, of(0.3, x))),
    ),
}
rules = pytest.mark.parametrize("name", RULES)


@rules
def test_rules_agree_with_numpy_whatever_else_is_in_the_stack(name):
    reducer, expected = RULES[name]
    x = random_rows()
    x[3] *= 30  # One that is far out.
    aggregate, info = reduce(reducer, x)
    np.testing.assert_allclose(aggregate, expected(x), rtol=1e-9, atol=1e-12)
    assert info["num_counted"] == N
    # Seven rows among others that do not count, in any order.
    order = np.random.default_rng(1).permutation(N)
    rows = np.vstack([x[:7], np.zeros((2, D)), np.full((2, D), np.nan)])[order]
    weights = np.array([*np.arange(1.0, 8), 0, 0, 0, 1])[order]  # One of NaN has a weight.
    ids = np.array([*range(7), 50, -1, -1, 51])[order]
    aggregate, info = reduce(reducer, rows, weights=weights, ids=ids)
    np.testing.assert_allclose(aggregate, expected(x[:7]), rtol=1e-9, atol=1e-12)
    assert info["num_counted"] == 7


@rules
def test_equal_updates_stay_as_they_are_and_extremes_have_one_outcome(name):
    reducer, _ = RULES[name]
    x = random_rows(1)[[0] * N]
    x /= np.linalg.norm(x[0])  # Not clipped.
    np.testing.assert_allclose(reduce(reducer, x)[0], x[0], rtol=1e-9)
    assert (reduce(reducer, 0 * x)[0] == 0).all()
    # Nobody counts: zero, and the round is skipped.
    nobody, info = reduce(reducer, x, weights=np.zeros(N))
    assert (nobody == 0).all()
    assert info["num_counted"] == 0
    # One alone is the aggregate.
    alone, info = reduce(reducer, x, weights=np.eye(N)[4])
    np.testing.assert_allclose(alone, x[0], rtol=1e-9)
    assert info.get("num_tolerated", 0) == 0
    # What is beyond the dtype's norms does not count, in single precision as well.
    x = random_rows().astype(np.float32)
    without, _ = reduce(reducer, x, weights=[0, 0, *[1] * (N - 2)])
    x[0], x[1] = np.inf, 3e38
    huge, info = reduce(reducer, x)
    np.testing.assert_allclose(huge, without, rtol=1e-6)
    assert info["num_counted"] == N - 2
    assert huge.dtype == np.float32
    # So large that its squares barely fit.
    x[0], x[1] = 1e18, -1e18
    assert np.isfinite(reduce(reducer, x)[0]).all()


@pytest.mark.parametrize("name", ["trimmed mean", "Krum", "centered clipping", "after mixing"])
def test_updates_of_half_precision_are_reduced_in_single_precision(name):
    reducer, expected = RULES[name]
    x = np.asarray(jnp.asarray(random_rows(), jnp.bfloat16), np.float64)
    half, _ = reduce(reducer, x, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    # Once, at the end; or twice, of mixtures.
    np.testing.assert_allclose(np.asarray(half, float), expected(x), rtol=2**-7, atol=2**-8)


# Others begin at zero, or clip from there.
FROM_ZERO = {"geometric median", "centered clipping", "after clipping", "after adaptive clipping"}


@pytest.mark.parametrize("name", sorted(set(RULES) - FROM_ZERO))
def test_rules_move_with_the_updates(name):
    """Even far away in single precision, where distances are those of what differs."""
    reducer, expected = RULES[name]
    x, away = random_rows(), 100 * random_rows(1, seed=1)
    moved, _ = reduce(reducer, x + away)
    np.testing.assert_allclose(moved, expected(x) + away[0], rtol=1e-9)
    # A common part of 10^4: the squares of the distances are 10^-8 of those of the norms.
    x = np.round(x * 2**6) / 2**6
    single, _ = reduce(reducer, x + 1e4, dtype=np.float32)
    np.testing.assert_allclose(single, expected(x + 1e4), rtol=2e-7)


BYZFL = {
    "median": (fl.coordinate_median(), lambda a: a.Median()),
    "trimmed mean": (fl.trimmed_mean(3), lambda a: a.TrMean(3)),
    "mean around median": (fl.mean_around_median(3), lambda a: a.Meamed(3)),
    "Krum": (fl.krum(3, margin=1), lambda a: a.Krum(3)),
    "multi-Krum": (fl.multi_krum(3, margin=1), lambda a: a.MultiKrum(3)),
    "geometric median": (fl.geometric_median(3, smoothing=0.1), lambda a: a.GeometricMedian()),
    "centered clipping": (
        fl.centered_clipping(2.0, 3),
        lambda a: a.CenteredClipping(L=3, tau=2.0),
    ),
}


@pytest.fixture(scope="module")
def byzfl():
    """Its rules, without the package's own `__init__`, which needs torchvision."""
    found = importlib.util.find_spec("byzfl")
    if found is None:
        pytest.skip("byzfl is not installed: pip install --no-deps byzfl==0.0.11")
    package = types.ModuleType("byzfl")
    package.__path__ = found.submodule_search_locations
    sys.modules["byzfl"] = package
    return {
        name: importlib.import_module(f"byzfl.{name}")
        for name in ("aggregators.aggregators", "aggregators.preaggregators", "attacks.attacks")
    }


@pytest.mark.parametrize("name", BYZFL)
def test_rules_agree_with_byzfl(name, byzfl):
    reducer, oracle = BYZFL[name]
    x = random_rows(seed=2)
    expected = oracle(byzfl["aggregators.aggregators"])(x.copy())
    np.testing.assert_allclose(reduce(reducer, x)[0], expected, rtol=1e-9)


def test_what_goes_before_agrees_with_byzfl(byzfl):
    x, module = random_rows(seed=2), byzfl["aggregators.preaggregators"]

    @jax.jit
    def both(share, stack):
        stack = stack._replace(total=lambda x: x)
        makers = (fl.nearest_neighbor_mixing, fl.adaptive_robust_clipping)
        changed = [make(share, UPDATES).stacked(stack)[0] for make in makers]
        return [jnp.concatenate(rows, axis=1) for rows in changed]

    for f in range(6):
        mixed, clipped = both(f / N, stack_of(x))
        np.testing.assert_allclose(mixed, module.NNM(f)(x), rtol=1e-9)
        np.testing.assert_allclose(clipped, module.ARC(f)(x.copy()), rtol=1e-9)
    clipped, _ = rows_before(lambda inner: fl.norm_clipping(6.0, inner), x)
    np.testing.assert_allclose(clipped, module.Clipping(6.0)(x.copy()), rtol=1e-9)


def test_attacks_agree_with_byzfl(byzfl):
    x, module = random_rows(seed=2), byzfl["attacks.attacks"]
    hostile = [1, 4, 7]
    honest = np.delete(x, hostile, axis=0)
    for attack, expected in [
        (fl.sign_flip, module.SignFlipping()),
        (fl.inner_product_manipulation, module.InnerProductManipulation(2.0)),
        (lambda *args: fl.little_is_enough(*args, z=1.5), module.ALittleIsEnough(1.5)),
        (fl.mimic, module.Mimic(0)),
    ]:
        sent, _ = rows_before(lambda inner, attack=attack: attack(hostile, inner), x)
        np.testing.assert_allclose(sent[hostile], [expected(honest)] * 3, rtol=1e-9)
        np.testing.assert_array_equal(np.delete(sent, hostile, axis=0), honest)


def test_other_clients_than_all_have_a_documented_number_of_hostile_ones():
    x = random_rows()
    weights = (np.arange(N) < 4).astype(float)
    # Of four, no more than one; Bulyan needs seven for one.
    for reducer, expected in [
        (fl.trimmed_mean(4), 1),
        (fl.trimmed_mean(0.49), 1),
        (fl.krum(3), 1),
        (fl.bulyan(2), 0),
        (fl.nearest_neighbor_mixing(2, fl.weighted_mean()), 1),
    ]:
        assert reduce(reducer, x, weights=weights)[1]["num_tolerated"] == expected
    trimmed, _ = reduce(fl.trimmed_mean(4), x, weights=weights)
    np.testing.assert_allclose(trimmed, reference.trimmed_mean(x[:4], 1), rtol=1e-9)
    # A tenth of 30 is 3, and 0.29 of 100 is 29, also in single precision.
    with jax.enable_x64(False):
        for share, number, f in [(0.1, 30, 3), (0.29, 100, 29), (0.45, 20, 9), (1 / 3, 3, 1)]:
            count = jax.jit(functools.partial(num_tolerated, share))
            ones = np.ones(number, np.float32)
            assert count(Counted(ones > 0, np.int32(number), ones)) == f


@pytest.mark.parametrize(
    ("reducer", "expected"),
    [
        (fl.trimmed_mean(0), "mean"),
        (fl.mean_around_median(0.0), "mean"),
        (fl.multi_krum(3, N), "mean"),
        (fl.bulyan(0), "mean"),
        (fl.nearest_neighbor_mixing(0, fl.krum(0)), "mean"),
        (fl.bucketing(N, fl.coordinate_median()), "mean"),
        (fl.bucketing(3, fl.weighted_mean()), "mean"),
        (fl.bucketing(1, fl.coordinate_median()), "median"),
        (fl.geometric_median(smoothing=1e9), "mean"),
        (fl.centered_clipping(1e9), "mean"),
        (fl.adaptive_robust_clipping(0, fl.weighted_mean()), "mean"),
        (fl.sign_flip([], fl.weighted_mean()), "mean"),
    ],
)
def test_limits(reducer, expected):
    x = random_rows()
    np.testing.assert_allclose(reduce(reducer, x)[0], getattr(np, expected)(x, 0), rtol=1e-9)


@pytest.mark.parametrize("n", [1, 6, 8, 11])
def test_rows_are_put_in_order(n):
    """What orders all columns of zeros and ones orders all columns (Knuth)."""
    bits = (np.arange(2**n) >> np.arange(n)[:, None]) % 2
    ordered = jax.jit(in_order)(np.float32(bits), np.arange(n) != 2)
    expected = np.sort(np.where(np.arange(n)[:, None] != 2, bits, np.inf), axis=0)
    np.testing.assert_array_equal(ordered, expected)


def test_centered_clipping_goes_on_from_the_last_aggregate():
    x, last = random_rows(), random_rows(1, seed=4)[0]
    expected = reference.centered_clipping(x, 3.0, 2, last)
    np.testing.assert_allclose(reduce(fl.centered_clipping(3.0, 2), x, last=last)[0], expected)


def test_ties_are_broken_by_client_id_and_not_by_place():
    # Two pairs, each as close.
    x = np.array([[0.0, 0], [1, 0], [8, 0], [9, 0]])
    for order in ([0, 1, 2, 3], [2, 3, 0, 1], [3, 1, 2, 0]):
        ids = np.array([5, 3, 2, 9])[order]
        chosen, info = reduce(fl.krum(0, margin=2), x[order], ids=ids)
        assert info["selected_id"] == 2  # Neighbours are two for each, at 1 and 64, or 1 and 49.
        np.testing.assert_array_equal(chosen, x[2])
    # The value in the middle has two neighbours that are as close.
    line = np.array([[0.0, 0], [2, 0], [4, 0]])
    for order in ([0, 1, 2], [2, 1, 0]):
        ids = np.array([7, 1, 3])[order]
        mixed, _ = rows_before(
            lambda inner: fl.nearest_neighbor_mixing(1, inner), line[order], ids=ids
        )
        assert mixed[1, 0] == 3.0  # That of client 3, and not that of client 7.


def test_buckets_are_means_of_the_same_clients_in_any_order():
    x, make = random_rows(10, 4), lambda inner: fl.bucketing(3, inner)
    weights = np.array([1, 2, 0, 1, 1, 1, 1, 0, 1, 5.0])
    buckets, info = rows_before(make, x, weights=weights)
    assert info["num_buckets"] == 3  # Of eight clients: three, three and two.
    assert buckets.shape == (4, 4)
    total = 3 * buckets[0] + 3 * buckets[1] + 2 * buckets[2]
    np.testing.assert_allclose(total, x[weights > 0].sum(0), rtol=1e-9)
    np.testing.assert_array_equal(buckets[3], 0)
    order = np.random.default_rng(0).permutation(10)
    mixed, _ = rows_before(make, x[order], weights=weights[order], ids=np.arange(10)[order])
    np.testing.assert_allclose(mixed, buckets, rtol=1e-12)

    # Each client is in each bucket as often.
    def first(key, stack):
        return make(UPDATES).stacked(stack._replace(key=key, total=lambda x: x))[0][1][0]

    places = jax.jit(jax.vmap(first, (0, None)))(jax.random.split(KEY, 600), stack_of(np.eye(6)))
    in_first = (np.asarray(places) > 0).mean(0)  # Of clients 1 to 5; of client 0, the other array.
    np.testing.assert_allclose(in_first, 0.5, atol=4 * np.sqrt(0.25 / 600))


def test_little_is_enough_by_default_is_as_much_as_a_majority_allows():
    """Values of z for (n, f), from tables of the normal distribution."""
    x = random_rows(100, 5)

    @jax.jit
    def send(stack, hostile):
        attack = fl.little_is_enough(hostile, UPDATES)
        (_, updates), info = attack.stacked(stack._replace(total=lambda x: x))
        return updates, info["z"]

    for n, f, expected in [
        *[(20, 4, 0.1573), (25, 5, 0.2533), (50, 10, 0.2533), (50, 12, 0.3360)],
        *[(100, 20, 0.2858), (10, 2, 0), (11, 1, 0), (4, 1, 0)],
    ]:
        ids = np.arange(100)
        sent, z = send(stack_of(x, ids < n), np.where(ids < f, ids, -1))
        assert z == pytest.approx(expected, abs=5e-5)
        honest = reference.little_is_enough(x[f:n], f)
        np.testing.assert_allclose(sent[f - 1], honest[1:], rtol=1e-6)


def test_min_max_goes_as_far_as_honest_updates_are_apart():
    x = random_rows()
    sent, info = rows_before(lambda inner: fl.min_max([0, 1], inner), x)
    np.testing.assert_allclose(sent[:2], [reference.min_max(x[2:])] * 2, rtol=1e-7)
    assert info["gamma"] > 0.5
    # Of clients that do not differ there is nothing to hide in.
    same = np.ones((5, D))
    sent, info = rows_before(lambda inner: fl.min_max([0, 1], inner), same)
    assert info["gamma"] == 0
    np.testing.assert_array_equal(sent, same)


ATTACKS = {
    "sign flip": (fl.sign_flip, lambda h, f: -h.mean(0)),
    "inner products": (fl.inner_product_manipulation, lambda h, f: -2 * h.mean(0)),
    "little is enough": (fl.little_is_enough, reference.little_is_enough),
    "mimic": (fl.mimic, lambda h, f: h[0]),
    "min-max": (fl.min_max, lambda h, f: reference.min_max(h)),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attackers_know_the_honest_updates_that_count_and_no_others(name):
    attack, expected = ATTACKS[name]
    make = functools.cache(lambda inner: attack([2, 5, 8], inner))
    x, weights = random_rows(), np.ones(N)
    weights[[5, 7]] = 0
    x[5], x[7], x[9] = 0, 0, np.nan
    sent, info = rows_before(make, x, weights=weights)
    assert info["num_hostile"] == 2
    honest = x[[0, 1, 3, 4, 6, 10]]
    np.testing.assert_allclose(sent[[2, 8]], [expected(honest, 2)] * 2, rtol=1e-7)
    others = [i for i in range(N) if i not in (2, 8)]
    np.testing.assert_array_equal(sent[others], x[others])
    # The smallest ids are those of the last rows.
    sent, _ = rows_before(make, x[::-1], weights=weights[::-1], ids=np.arange(N)[::-1])
    np.testing.assert_allclose(sent[[2, 8]], [expected(honest, 2)] * 2, rtol=1e-7)
    # Without anyone to know of, zero.
    nobody, _ = rows_before(make, x, weights=np.eye(N)[2])
    np.testing.assert_array_equal(nobody[2], 0)


def test_of_several_attacks_each_leaves_the_others_out():
    x = random_rows()
    twice, info = rows_before(lambda inner: fl.mimic([0], fl.sign_flip([3], inner)), x)
    assert info["num_hostile"] == 2
    np.testing.assert_array_equal(twice[0], x[1])  # It does not know of the second attack.
    np.testing.assert_allclose(twice[3], -np.delete(x, [0, 3], axis=0).mean(0), rtol=1e-9)


def test_the_distance_to_the_honest_mean_is_reported():
    x = random_rows()
    aggregate, info = reduce(fl.sign_flip(3, fl.trimmed_mean(3)), x)
    expected = np.linalg.norm(aggregate - x[3:].mean(0))
    np.testing.assert_allclose(info["honest_distance"], expected, rtol=1e-9)
    mean, info = reduce(fl.sign_flip(3, fl.weighted_mean()), x)
    np.testing.assert_allclose(mean, 5 / 11 * x[3:].mean(0), rtol=1e-9)
    # A bucket with one is hostile.
    _, info = reduce(fl.sign_flip(3, fl.bucketing(N, fl.multi_krum(0))), x)
    assert (info["num_selected"], info["num_hostile_selected"]) == (1, 1)


def test_who_is_hostile_depends_on_ids_and_a_seed_alone():
    drawn = fl.hostile_clients(0.2, 4000, seed=1)
    assert abs(len(drawn) - 800) < 5 * np.sqrt(4000 * 0.2 * 0.8)
    np.testing.assert_array_equal(fl.hostile_clients(0.2, 100, seed=1), drawn[drawn < 100])
    assert set(fl.hostile_clients(0.1, 4000, seed=1)) < set(drawn)
    assert set(fl.hostile_clients(0.2, 4000, seed=2)) != set(drawn)
    # The same ones on the stack, in lanes, and in any order.
    ids = np.random.default_rng(0).permutation(40)
    x = random_rows(40, 3)
    sent, _ = rows_before(lambda inner: fl.mimic(0.2, inner, seed=1), x, ids=ids)
    np.testing.assert_array_equal(np.sort(ids[(sent != x).any(1)]), drawn[drawn < 40])
    alone = fl.scaled_update(0.2, 3.0, seed=1)
    of = lambda i: fl.Client(i, jnp.int32(1), jnp.int32(1), (), KEY)
    send = lambda i: alone.client(KEY, (), fl.Message(jnp.float32(2), 1.0), of(i)).update
    scaled = np.asarray(jax.jit(jax.vmap(send))(np.arange(40)))
    np.testing.assert_array_equal(np.flatnonzero(scaled == 6.0), drawn[drawn < 40])
    assert (scaled[np.setdiff1d(np.arange(40), drawn)] == 2.0).all()
    np.testing.assert_array_equal(fl.hostile_clients(1.0, 5), range(5))
    assert fl.hostile_clients([], 5).size == 0


def test_noise_in_place_of_an_update_is_normal():
    update = {"a": np.ones((100, 70)), "b": np.full(3000, 2.0, jnp.bfloat16)}
    client = fl.Client(np.int32(4), np.int32(1), np.int32(1), (), KEY)
    attack = jax.jit(fl.gaussian_update([4], 3.0).client)
    sent = attack(KEY, (), fl.Message(update, 1.0), client).update
    assert [x.dtype for x in sent.values()] == [jnp.float64, jnp.bfloat16]
    noise = np.concatenate([np.asarray(x, float).reshape(-1) for x in sent.values()])
    assert abs(noise.mean()) < 5 * 3 / np.sqrt(noise.size)
    assert abs(noise.std() - 3) < 5 * 3 / np.sqrt(2 * noise.size)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: fl.trimmed_mean(0.5), "hostile is 0.5; choose a share below 0.5, or a number of"),
        (lambda: fl.trimmed_mean(-0.1), "hostile is -0.1; choose a number that is at least 0"),
        (lambda: fl.mean_around_median(-1), "hostile is -1; choose an integer at least 0"),
        (lambda: fl.bulyan(0.3), "hostile is 0.3; choose a share below 0.25"),
        (lambda: fl.krum(1, margin=3), "margin is 3; choose an integer between 1 and 2"),
        (lambda: fl.geometric_median(0), "num_iterations is 0; choose an integer at least 1"),
        (lambda: fl.geometric_median(start="median"), "start is 'median'; choose one of 'zero'"),
        (lambda: fl.geometric_median(smoothing=0), "smoothing is 0; choose a number above 0"),
        (lambda: fl.centered_clipping(-1.0), "max_norm is -1.0; choose a number above 0"),
        (lambda: fl.bucketing(0, fl.krum(1)), "size is 0; choose an integer at least 1"),
        (
            lambda: fl.bucketing(2, fl.nearest_neighbor_mixing(1, fl.krum(1))),
            "reducer looks at clients one by one, and bucketing mixes them before; put",
        ),
        (
            lambda: fl.bucketing(2, fl.norm_clipping(1.0, fl.sign_flip(1, fl.krum(1)))),
            "reducer looks at clients one by one",
        ),
        (lambda: fl.sign_flip([0.5], fl.krum(1)), r"hostile is \[0.5\]; pass a share such as 0.2"),
        (lambda: fl.sign_flip([[1]], fl.krum(1)), r"hostile is \[\[1\]\]; pass a share"),
        (lambda: fl.sign_flip([-1], fl.krum(1)), r"hostile is \[-1\]; pass a share"),
        (lambda: fl.sign_flip(1.5, fl.krum(1)), "hostile is 1.5; choose a number between 0 and 1"),
        (lambda: fl.scaled_update(1, np.inf), "factor is inf; choose a finite number"),
        (lambda: fl.client_momentum(1.5), "decay is 1.5; choose a number between 0 and 1"),
        (
            lambda: reduce(fl.trimmed_mean(6), random_rows()),
            "hostile is 6, and of 11 rows at most 5 may be; choose fewer, or a larger cohort",
        ),
        (
            lambda: reduce(fl.bucketing(3, fl.krum(2)), random_rows()),
            "hostile is 2, and of 4 rows at most 1 may be",
        ),
        (lambda: reduce(fl.bulyan(3), random_rows()), "of 11 rows at most 2 may be"),
    ],
)
def test_what_is_wrong_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_reducer_goes_after_what_goes_before():
    for build in (
        lambda: fl.sign_flip(1, fl.clip_by_norm(1.0)),
        lambda: fl.bucketing(2, None),
        lambda: fl.norm_clipping(1.0, "mean"),
    ):
        with pytest.raises(TypeError, match=r"reducer is of type .*; pass a Reducer"):
            build()


def test_momentum_is_a_running_mean():
    momentum, x = fl.client_momentum(0.75), random_rows(4, 3)
    send = jax.jit(functools.partial(momentum.client, client=None))
    entry, expected = momentum.entry(np.zeros(3)), np.zeros(3)
    for update in x:
        sent = send(KEY, (), fl.Message(update, 1.0, entry))
        entry, expected = sent.entry, 0.75 * expected + 0.25 * update
        np.testing.assert_allclose(sent.update, expected, rtol=1e-12)
    # It may be of updates that were not yet bounded, or otherwise.
    known = fl.chain(fl.clip_by_norm(1.0), momentum).guarantees(fl.Guarantees(), None)
    assert known.sensitivity is None


def test_labels_of_some_clients_are_flipped():
    clients = [{"x": np.ones((2, 3)), "y": np.array([0, 3])}, {"x": np.ones((1, 3)), "y": [1]}]
    dataset = fl.FederatedDataset.from_clients([*clients, clients[0]])
    flipped = fl.data.flip_labels(dataset, [0, 1], 4)
    assert flipped.examples["y"].tolist() == [3, 0, 2, 0, 3]
    assert flipped.examples["y"].dtype == dataset.examples["y"].dtype
    np.testing.assert_array_equal(flipped.examples["x"], dataset.examples["x"])
    assert fl.data.flip_labels(dataset, [], 4).examples["y"].tolist() == [0, 3, 1, 0, 3]
    for options, message in [
        (([3], 4), r"clients is \[3\]; pass a list of positions from 0 to 2"),
        (([0.5], 4), r"clients is \[0.5\]; pass a list"),
        (([0], 3), "num_classes is 3, and 'y' holds labels that are no integers from 0 to 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            fl.data.flip_labels(dataset, *options)
    with pytest.raises(ValueError, match="label is 'z', and the examples have 'x', 'y'"):
        fl.data.flip_labels(dataset, [0], 4, label="z")
