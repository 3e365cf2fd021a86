"""Partitioners against their definitions. `dirichlet` itself is in `test_data.py` too."""

import collections
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedjax_lite as fl

partition = fl.partition

# Each splits rows with these labels over so many clients, whatever they are.
PARTITIONERS = {
    "continuous": lambda y, n, seed: partition.continuous(
        y + np.arange(y.size) / 100, n, strictness=0.5, seed=seed
    ),
    "dirichlet": lambda y, n, seed: partition.dirichlet(
        y, n, alpha=0.5, min_examples=0, self_balancing=True, seed=seed
    ),
    "dirichlet_by_client": lambda y, n, seed: partition.dirichlet_by_client(
        y, n, alpha=0.5, seed=seed
    ),
    "dirichlet_sizes": lambda y, n, seed: partition.dirichlet_sizes(
        y.size, n, alpha=0.5, seed=seed
    ),
    "exponential": lambda y, n, seed: partition.exponential(y.size, n, seed=seed),
    "iid": lambda y, n, seed: partition.iid(y.size, n, seed=seed),
    "linear": lambda y, n, seed: partition.linear(y.size, n, seed=seed),
    "log_normal": lambda y, n, seed: partition.log_normal(y.size, n, sigma=2.0, seed=seed),
    "pachinko": lambda y, n, seed: partition.pachinko(y, y // 2, n, seed=seed),
    "power_law": lambda y, n, seed: partition.power_law(y.size, n, exponent=1.5, seed=seed),
    "shards": lambda y, n, seed: partition.shards(y, n, shards_per_client=1, seed=seed),
    "similarity": lambda y, n, seed: partition.similarity(y, n, iid_fraction=0.3, seed=seed),
    "sizes": lambda y, n, seed: partition.sizes(
        y.size, np.bincount(np.arange(y.size) % n), seed=seed
    ),
    "square": lambda y, n, seed: partition.square(y.size, n, seed=seed),
}
NEVER_EMPTY = PARTITIONERS.keys() - {"dirichlet"}


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def sizes_of(rows):
    return np.array([part.size for part in rows])


@pytest.mark.parametrize("name", PARTITIONERS)
@settings(max_examples=25, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=2, max_size=50),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 2**40),
)
def test_every_row_has_one_client_and_seeds_are_complete(name, labels, fraction, seed):
    labels, num_clients = np.array(labels), 1 + round(fraction * (len(labels) - 1))
    rows = PARTITIONERS[name](labels, num_clients, seed)
    assert len(rows) == num_clients
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(labels.size))
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in rows)
    if name in NEVER_EMPTY:
        assert sizes_of(rows).min() >= 1
    assert same(rows, PARTITIONERS[name](labels, num_clients, seed))
    assert same(rows, PARTITIONERS[name](labels, num_clients, np.random.default_rng(seed)))


@pytest.mark.parametrize("name", PARTITIONERS)
def test_other_seeds_give_other_splits_and_the_global_generator_none(name):
    labels = np.arange(200) % 6
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    splits = [PARTITIONERS[name](labels, 10, seed) for seed in range(3)]
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert not any(same(splits[i], splits[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


# Sizes


def test_iid_is_uniform():
    owners = collections.Counter()
    for seed in range(4000):
        rows = partition.iid(7, 3, seed=seed)
        assert sizes_of(rows).tolist() == [3, 2, 2]
        owners.update(i for i, part in enumerate(rows) if 0 in part)
    expected = 4000 * np.array([3, 2, 2]) / 7
    observed = np.array([owners[i] for i in range(3)])
    # The 0.9999 quantile of chi-square with 2 degrees of freedom.
    assert ((observed - expected) ** 2 / expected).sum() < 18.4


def exact_shares(num_examples, weights, min_examples):
    """Raise the smallest client to the minimum, until all have it; in exact arithmetic."""
    raised = set()
    while True:
        left = num_examples - min_examples * len(raised)
        total = sum(w for i, w in enumerate(weights) if i not in raised)
        shares = [
            Fraction(min_examples) if i in raised else left * w / total
            for i, w in enumerate(weights)
        ]
        below = [i for i, share in enumerate(shares) if share < min_examples]
        if not below:
            return shares
        raised.add(min(below, key=lambda i: weights[i]))


@pytest.mark.parametrize(
    ("split", "weight"),
    [
        (partition.linear, lambda i: Fraction(i)),
        (partition.square, lambda i: Fraction(i**2)),
        (lambda *a, **k: partition.power_law(*a, exponent=2.0, **k), lambda i: Fraction(1, i**2)),
        (lambda *a, **k: partition.power_law(*a, exponent=0.0, **k), lambda i: Fraction(1)),
    ],
)
@settings(max_examples=50, deadline=None)
@given(num_clients=st.integers(1, 30), min_examples=st.integers(0, 4), extra=st.integers(0, 500))
def test_sizes_are_within_one_of_their_shares(split, weight, num_clients, min_examples, extra):
    num_examples = max(1, min_examples * num_clients + extra)
    sizes = sizes_of(split(num_examples, num_clients, min_examples=min_examples, seed=0))
    shares = exact_shares(
        num_examples, [weight(i) for i in range(1, num_clients + 1)], min_examples
    )
    assert sizes.sum() == num_examples
    assert sizes.min() >= min_examples
    assert all(abs(size - share) < 1 for size, share in zip(sizes.tolist(), shares, strict=True))


@pytest.mark.parametrize("num_clients", [2, 12, 1000, 49_000])
def test_exponential_holds_for_many_clients(num_clients):
    sizes = sizes_of(partition.exponential(50_000, num_clients, seed=0))
    assert sizes.sum() == 50_000
    assert (np.diff(sizes) >= 0).all()
    assert sizes[0] >= 1
    # Each size is within one of its share.
    assert abs(sizes[-2] * np.e - sizes[-1]) < np.e + 1


def test_log_normal_sizes_have_the_spread_asked_for():
    num_clients, sigma = 1000, 1.5
    splits = [partition.log_normal(2_000_000, num_clients, sigma=sigma, seed=s) for s in (0, 1)]
    sizes, other = map(sizes_of, splits)
    spread = np.log(sizes).std()
    error = sigma / np.sqrt(2 * num_clients)
    assert abs(spread - sigma) < 5 * error
    assert abs(spread - 1.25 * sigma) > 5 * error
    assert not np.array_equal(sizes, other)


def test_dirichlet_sizes_have_the_moments_of_their_shares():
    alpha, num_clients, num_examples = 0.5, 5, 10_000
    draws = np.array(
        [
            sizes_of(partition.dirichlet_sizes(num_examples, num_clients, alpha=alpha, seed=seed))
            for seed in range(300)
        ]
    )
    shares = draws / num_examples
    # Of Dir(a, ..., a) over N: the mean is 1/N, the variance (N - 1) / (N² (N a + 1)).
    variance = (num_clients - 1) / num_clients**2 / (num_clients * alpha + 1)
    error = np.sqrt(variance / 300)
    assert (np.abs(shares.mean(0) - 1 / num_clients) < 5 * error).all()
    assert abs(shares.var() / variance - 1) < 0.15
    least = partition.dirichlet_sizes(51, 5, alpha=0.01, min_examples=10, seed=0)
    assert sorted(sizes_of(least)) == [10, 10, 10, 10, 11]


# Similarity


@pytest.mark.parametrize("num_hostile", [0, 3])
def test_similar_clients_share_a_part_and_the_rest_is_sorted(num_hostile):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
    for fraction in (0.0, 0.4, 1.0):
        rows = partition.similarity(
            labels, 5 + num_hostile, iid_fraction=fraction, num_hostile=num_hostile, seed=1
        )
        hostile, honest = rows[:num_hostile], rows[num_hostile:]
        assert np.sort(np.concatenate(honest)).tolist() == list(range(1000))
        assert sizes_of(rows).tolist() == [200] * (5 + num_hostile)
        for i, part in enumerate(honest):
            # What is sorted has two classes; of what is not, there are as many of each.
            own = np.isin(labels[part], (2 * i, 2 * i + 1)).mean()
            assert abs(own - (1 - fraction + fraction / 5)) < 0.1
        for part in hostile:
            counts = np.bincount(labels[part], minlength=10)
            assert len(set(part.tolist())) == 200
            assert abs(counts - 20).max() < 20
    first, second = (
        partition.similarity(labels, 8, iid_fraction=0.0, num_hostile=3, seed=1) for _ in range(2)
    )
    assert same(first, second)


# Noise


def test_noise_grows_with_the_client_and_is_all_that_changes():
    rng = np.random.default_rng(0)
    examples = {"x": rng.normal(size=(4000, 3, 2)).astype(np.float32), "y": np.arange(4000)}
    dataset = partition.noisy(examples, 4, variance=0.2, seed=1)
    assert dataset.num_examples.tolist() == [1000] * 4
    assert np.sort(dataset.examples["y"]).tolist() == list(range(4000))
    for i in range(4):
        noise = dataset[i]["x"] - examples["x"][dataset[i]["y"]]
        assert noise.dtype == np.float32
        variance = 0.2 * (i + 1) / 4
        # The variance of n normal variates has a relative error of sqrt(2 / n).
        assert abs(noise.var() / variance - 1) < 5 * np.sqrt(2 / noise.size)
        assert abs(noise.mean()) < 5 * np.sqrt(variance / noise.size)
    again = partition.noisy(examples, 4, variance=0.2, seed=np.random.default_rng(1))
    np.testing.assert_array_equal(dataset.examples["x"], again.examples["x"])
    plain = partition.noisy(examples, 4, variance=0, seed=1)
    np.testing.assert_array_equal(plain[2]["x"], examples["x"][plain[2]["y"]])
    rows = partition.iid(4000, 4, seed=1)
    assert all(np.array_equal(plain[i]["y"], rows[i]) for i in range(4))


# Dirichlet


def test_dirichlet_takes_one_concentration_per_client():
    alpha = np.array([1.0, 2.0, 5.0])
    shares = np.array(
        [
            sizes_of(partition.dirichlet(np.zeros(500), 3, alpha=alpha, min_examples=0, seed=s))
            for s in range(2000)
        ]
    )
    # Dir(1, 2, 5) has the means 1/8, 2/8, 5/8.
    error = shares.std(0) / np.sqrt(2000)
    assert (np.abs(shares.mean(0) - 500 * alpha / 8) < 5 * error).all()


def test_dirichlet_rounds_without_bias():
    # Equal shares of 1.3 examples per class and client. To round them all in one way would
    # give some clients one example of each class, and others two.
    labels = np.repeat(np.arange(60), 1300)
    sizes = sizes_of(partition.dirichlet(labels, 1000, alpha=1e15, min_examples=0, seed=0))
    error = np.sqrt(60 * 0.3 * 0.7)
    assert (np.abs(sizes - 78) < 6 * error).all()


def balanced_sizes(class_sizes, num_clients, alpha, rng):
    """The rule as the authors' code has it: a share of 0 above the average, then rescale."""
    sizes = np.zeros(num_clients)
    for class_size in class_sizes:
        shares = rng.dirichlet(np.full(num_clients, alpha)) * (
            sizes <= sum(class_sizes) / num_clients
        )
        sizes += class_size * shares / shares.sum()
    return sizes


def test_self_balancing_follows_its_rule():
    num_draws, class_sizes = 2000, [400] * 5
    labels = np.repeat(np.arange(5), class_sizes)
    rng = np.random.default_rng(0)
    expected = [balanced_sizes(class_sizes, 6, 0.5, rng).std() for _ in range(num_draws)]
    spreads = {
        balancing: [
            sizes_of(
                partition.dirichlet(
                    labels, 6, alpha=0.5, min_examples=0, self_balancing=balancing, seed=seed
                )
            ).std()
            for seed in range(num_draws)
        ]
        for balancing in (False, True)
    }
    error = np.hypot(np.std(expected), np.std(spreads[True])) / np.sqrt(num_draws)
    assert abs(np.mean(spreads[True]) - np.mean(expected)) < 5 * error
    assert abs(np.mean(spreads[False]) - np.mean(expected)) > 5 * error


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_a_client_draws_a_dirichlet_mixture(alpha):
    labels, size, num_classes = np.repeat(np.arange(4), 500), 20, 4
    counts = np.array(
        [
            (
                labels[
                    partition.dirichlet_by_client(
                        labels, 2, alpha=alpha, sizes=[size, 1980], seed=seed
                    )[0]
                ]
                == 3
            ).sum()
            for seed in range(3000)
        ]
    )

    def variance(alpha):  # of a Dirichlet-multinomial count
        total = num_classes * alpha
        return size * 1 / 4 * 3 / 4 * (size + total) / (1 + total)

    error = np.sqrt(((counts - counts.mean()) ** 2).var() / counts.size)
    assert abs(counts.mean() - size / 4) < 5 * np.sqrt(variance(alpha) / counts.size)
    assert abs(counts.var() - variance(alpha)) < 5 * error
    assert abs(counts.var() - variance(4 * alpha)) > 5 * error


def test_a_prior_of_the_classes_enters_as_in_the_paper():
    labels, prior = np.repeat(np.arange(3), 1000), np.array([0.5, 0.3, 0.2])
    counts = np.array(
        [
            np.bincount(
                labels[
                    partition.dirichlet_by_client(
                        labels, 2, alpha=2.0 * prior, sizes=[50, 2950], seed=seed
                    )[0]
                ],
                minlength=3,
            )
            for seed in range(2000)
        ]
    )
    error = counts.std(0) / np.sqrt(2000)
    assert (np.abs(counts.mean(0) - 50 * prior) < 5 * error).all()


def one_by_one(class_sizes, parent, sizes, alpha, beta, rng):
    """Example by example: a coarse class that has some left, then one of its fine classes."""
    choose = random.Random(int(rng.integers(2**63))).choices
    left, parent = class_sizes.tolist(), parent.tolist()
    fine, coarse = range(len(left)), range(max(parent) + 1)
    table = []
    for size in sizes:
        theta = rng.gamma(alpha, size=len(coarse)).tolist()
        thetas = rng.gamma(beta, size=len(fine)).tolist()
        drawn = [0] * len(left)
        for _ in range(size):
            open_ = {parent[y] for y in fine if left[y]}
            (c,) = choose(coarse, [theta[c] * (c in open_) for c in coarse])
            (y,) = choose(fine, [thetas[y] * (parent[y] == c and left[y] > 0) for y in fine])
            left[y] -= 1
            drawn[y] += 1
        table.append(drawn)
    return table


@pytest.mark.parametrize("coarse", [True, False])
def test_classes_that_are_used_up_leave_the_mixture(coarse):
    labels = np.repeat(np.arange(4), [3, 1, 5, 5])
    sizes, alpha, beta, num_draws = [7, 5, 2], 0.3, 0.5, 3000
    parent = np.array([0, 0, 1, 1] if coarse else [0, 1, 2, 3])
    rng = np.random.default_rng(0)

    def split():
        if coarse:
            rows = partition.pachinko(
                labels, parent[labels], 3, alpha=alpha, beta=beta, sizes=sizes, seed=rng
            )
        else:
            rows = partition.dirichlet_by_client(labels, 3, alpha=alpha, sizes=sizes, seed=rng)
        return [np.bincount(labels[part], minlength=4) for part in rows]

    ours = np.array([split() for _ in range(num_draws)]).reshape(num_draws, -1)
    class_sizes = np.bincount(labels)
    slow = np.array(
        [one_by_one(class_sizes, parent, sizes, alpha, beta, rng) for _ in range(num_draws)]
    ).reshape(num_draws, -1)
    # All means and all second moments of the 3 x 4 table.
    for moment in (lambda t: t, lambda t: np.einsum("ni,nj->nij", t, t).reshape(num_draws, -1)):
        a, b = moment(ours), moment(slow)
        error = np.sqrt((a.var(0) + b.var(0)) / num_draws)
        assert (np.abs(a.mean(0) - b.mean(0)) <= 5 * error).all()


def test_mixtures_at_their_limits():
    labels = np.repeat(np.arange(10), 100)
    for alpha in (1e-300, 1e-8):
        rows = partition.dirichlet_by_client(labels, 50, alpha=alpha, seed=0)
        # A client of 20 changes its class only where one of the ten is used up.
        assert sum(np.unique(labels[part]).size - 1 for part in rows) <= 9
        rows = partition.pachinko(labels, labels // 5, 50, alpha=alpha, beta=1e15, seed=0)
        assert np.unique(labels[rows[0]] // 5).size == 1
    rows = partition.dirichlet_by_client(labels, 2, alpha=1e15, sizes=[400, 600], seed=0)
    # Four standard deviations of a binomial count with p = 1/10.
    assert (np.abs(np.bincount(labels[rows[0]]) - 40) < 4 * np.sqrt(400 * 0.09)).all()


def test_clients_may_be_empty_where_sizes_say_so():
    labels, sizes = np.array([0, 0, 1]), [0, 3, 0]
    for rows in (
        partition.sizes(3, sizes, seed=0),
        partition.dirichlet_by_client(labels, 3, alpha=0.1, sizes=sizes, seed=0),
        partition.pachinko(labels, labels, 3, sizes=sizes, seed=0),
    ):
        assert [part.tolist() for part in rows] == [[], [0, 1, 2], []]


# Classes


@pytest.mark.parametrize("assignment", ["first-deterministic", "random", "deterministic"])
def test_pathological_clients_have_so_many_classes(assignment):
    labels = np.random.default_rng(0).permutation(
        np.repeat([3, 5, 7, 9, 11], [200, 90, 80, 70, 60])
    )
    rows = partition.pathological(labels, 30, classes_per_client=2, assignment=assignment, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(labels.size))
    for c in (3, 5, 7, 9, 11):
        counts = [(labels[part] == c).sum() for part in rows if (labels[part] == c).any()]
        assert max(counts) - min(counts) <= 1
    classes = [np.unique(labels[part]).tolist() for part in rows]
    assert {len(names) for names in classes} == {2}
    names = [3, 5, 7, 9, 11]
    if assignment == "deterministic":
        assert classes == [sorted([names[i % 5], names[(i + 1) % 5]]) for i in range(30)]
    else:
        other = partition.pathological(
            labels, 30, classes_per_client=2, assignment=assignment, seed=1
        )
        assert classes != [np.unique(labels[part]).tolist() for part in other]
    if assignment == "first-deterministic":
        assert all(names[i % 5] in classes[i] for i in range(30))


@pytest.mark.parametrize(
    ("assignment", "expected"), [("first-deterministic", 1 / 3), ("random", 1 / 2)]
)
def test_pathological_classes_are_uniform(assignment, expected):
    labels = np.arange(40_000) % 4
    rows = partition.pathological(labels, 4000, classes_per_client=2, assignment=assignment, seed=0)
    # Of clients whose number is not 0 mod 4: how many have class 0 (P = 1/3, or 2/4).
    have = [(labels[part] == 0).any() for i, part in enumerate(rows) if i % 4]
    assert abs(np.mean(have) - expected) < 5 * np.sqrt(expected * (1 - expected) / len(have))


def test_shards_are_those_of_the_paper():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 6000))
    num_single = []
    for seed in range(40):
        rows = partition.shards(labels, 100, seed=seed)
        assert set(sizes_of(rows).tolist()) == {600}
        num_classes = [np.unique(labels[part]).size for part in rows]
        assert set(num_classes) == {1, 2}
        num_single.append(num_classes.count(1))
    # The second of two shards is one of the 19 of the same class among the other 199.
    error = np.std(num_single) / np.sqrt(40)
    assert abs(np.mean(num_single) - 100 * 19 / 199) < 5 * error


# Values


def test_natural_clients_are_those_of_from_arrays():
    names = np.array(["b", "a", "b", "c", "a"])
    examples = {"x": np.arange(5)}
    expected = fl.FederatedDataset.from_arrays(examples, names)
    dataset = fl.FederatedDataset.from_rows(
        examples, partition.natural(names), client_ids=np.unique(names).tolist()
    )
    assert dataset.client_ids == expected.client_ids
    np.testing.assert_array_equal(dataset.offsets, expected.offsets)
    np.testing.assert_array_equal(dataset.examples["x"], expected.examples["x"])


def test_groups_keep_natural_clients_whole():
    names = np.random.default_rng(0).integers(0, 23, 500)
    splits = [partition.grouped(names, 5, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(np.sort(np.concatenate(splits[0])), np.arange(500))
    groups = [np.unique(names[part]).tolist() for part in splits[0]]
    assert [len(group) for group in groups] == [5, 5, 5, 5, 3]
    np.testing.assert_array_equal(np.sort(np.concatenate(groups)), np.arange(23))
    assert same(splits[0], splits[1])
    assert not same(splits[0], splits[2])


@pytest.mark.parametrize("strictness", [0.0, 0.3, 0.7, 1.0])
def test_continuous_skew_is_as_strict_as_asked(strictness):
    values = np.random.default_rng(0).normal(size=20_000)
    low, high = partition.continuous(10 + 3 * values, 2, strictness=strictness, seed=1)
    assert low.size == high.size == 10_000
    # E[z | score above its median] = correlation of z and score x sqrt(2 / pi).
    correlation = strictness / np.hypot(strictness, 1 - strictness)
    gap = (values[high].mean() - values[low].mean()) / 2
    error = 1 / np.sqrt(20_000)
    assert abs(gap - correlation * np.sqrt(2 / np.pi)) < 5 * error
    assert abs(gap - (correlation + 0.1) * np.sqrt(2 / np.pi)) > 5 * error
    if strictness == 1:
        assert values[low].max() < values[high].min()


# Refusals

LABELS = [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (lambda: partition.iid(3, 4, seed=0), "num_clients is 4, but there are only 3 rows"),
        (lambda: partition.iid(0, 1, seed=0), "num_examples is 0"),
        (lambda: partition.iid(3, 2, seed=-1), "seed is -1"),
        (lambda: partition.sizes(3, [1, 1], seed=0), "sizes add up to 2, but there are 3 rows"),
        (lambda: partition.sizes(3, [4, -1], seed=0), r"sizes is \[4, -1\]"),
        (lambda: partition.sizes(3, [1.5, 1.5], seed=0), r"sizes is \[1.5, 1.5\]"),
        (lambda: partition.linear(3, 4, seed=0), "min_examples is 1 for 4 clients"),
        (lambda: partition.power_law(9, 2, exponent=-1.0, seed=0), "exponent is -1.0"),
        (lambda: partition.log_normal(9, 2, sigma=np.nan, seed=0), "sigma is nan"),
        (lambda: partition.similarity([0, 1], 2, iid_fraction=2, seed=0), "iid_fraction is 2"),
        (
            lambda: partition.similarity([0, 1], 2, iid_fraction=0, num_hostile=2, seed=0),
            "num_hostile is 2",
        ),
        (lambda: partition.dirichlet_sizes(9, 2, alpha=0, seed=0), "alpha is 0; choose a positi"),
        (lambda: partition.dirichlet_sizes(9, 2, alpha=[1, 2, 3], seed=0), "or 2 of them"),
        (lambda: partition.noisy({"x": np.eye(3)}, 2, variance=-1, seed=0), "variance is -1"),
        (lambda: partition.noisy({"x": np.eye(3)}, 9, variance=1, seed=0), "num_clients is 9, bu"),
        (lambda: partition.noisy({"x": [1, 2]}, 2, variance=1, seed=0), "'x', of dtype int64"),
        (
            lambda: partition.noisy({"x": [1.0]}, 1, variance=1, feature="z", seed=0),
            "feature is 'z', of dtype object, among x; choose one with floats",
        ),
        (
            lambda: partition.dirichlet_by_client(LABELS, 2, alpha=[1, 2], seed=0),
            r"alpha is \[1, 2\]; choose a positive concentration, at most 1e\+15, or 3 of them",
        ),
        (
            lambda: partition.dirichlet_by_client(LABELS, 3, alpha=1.0, sizes=[3, 3], seed=0),
            "sizes has 2 entries for num_clients=3",
        ),
        (lambda: partition.dirichlet_by_client(LABELS, 7, alpha=1.0, seed=0), "num_clients is 7"),
        (lambda: partition.pachinko(LABELS, [0, 1], 2, seed=0), r"coarse_labels has shape \(2,\)"),
        (
            lambda: partition.pachinko(LABELS, [0, 0, 1, 1, 1, 1], 2, seed=0),
            "the fine class 0 lies in two coarse classes",
        ),
        (lambda: partition.pachinko(LABELS, LABELS, 2, beta=0.0, seed=0), "beta is 0.0"),
        (
            lambda: partition.pathological(LABELS, 2, classes_per_client=4, seed=0),
            "classes_per_client is 4; choose an integer between 1 and 3",
        ),
        (
            lambda: partition.pathological(LABELS, 2, classes_per_client=1, seed=0),
            "class 2 fell to none of 2 clients",
        ),
        (
            lambda: partition.pathological(LABELS, 4, classes_per_client=3, seed=0),
            "class 0 has 3 examples for 4 clients",
        ),
        (
            lambda: partition.pathological(LABELS, 2, classes_per_client=1, assignment="x", seed=0),
            "assignment is 'x'",
        ),
        (lambda: partition.shards(LABELS, 4, seed=0), "8 shards for 6 rows"),
        (lambda: partition.natural([]), r"client_ids has shape \(0,\)"),
        (lambda: partition.natural([1, "1"]), r"client_ids mixes the types \['int', 'str'\]"),
        (lambda: partition.grouped(["a"], 0, seed=0), "group_size is 0"),
        (lambda: partition.continuous([1, 1], 2, strictness=1, seed=0), "standard deviation 0.0"),
        (lambda: partition.continuous([1, np.nan], 2, strictness=1, seed=0), "values holds NaN"),
        (lambda: partition.continuous([1, 2], 2, strictness=1.1, seed=0), "strictness is 1.1"),
    ],
)
def test_refuses_bad_arguments(split, message):
    with pytest.raises(ValueError, match=message):
        split()


def test_a_seed_is_needed():
    with pytest.raises(TypeError, match="seed is None"):
        partition.iid(3, 2, seed=None)


def test_real_values_are_no_classes():
    values = np.random.default_rng(0).normal(size=20)
    whole = values.round()
    for split in (
        lambda labels: fl.partition.dirichlet(labels, 2, alpha=1.0, seed=0),
        lambda labels: fl.partition.dirichlet_by_client(labels, 2, alpha=1.0, seed=0),
        lambda labels: fl.partition.shards(labels, 2, shards_per_client=1, seed=0),
        lambda labels: fl.partition.pathological(labels, 2, classes_per_client=1, seed=0),
    ):
        with pytest.raises(ValueError, match=r"labels holds real values such as .*partition.cont"):
            split(values)
    rows = fl.partition.shards(whole, 2, shards_per_client=1, seed=0)
    assert sorted(np.concatenate(rows)) == list(range(20))
