import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import regression_dataset
from scipy import stats

import fedjax_lite as fl
from fedjax_lite.samplers._binomial import binomial, quantile
from fedjax_lite.xla import random as fl_random

samplers = fl.samplers
LARGEST = 2**31 - 1
SIZES = (7, 0, 1, 12, 3, 5, 2, 9, 4, 6)
WEIGHTS = (1.0, 0.0, 2.0, 3.5, 0.5, 2.0, 1.0, 4.0, 1.0, 1.0)
SAMPLERS = {
    "uniform": lambda: samplers.uniform(10, 3),
    "uniform with replacement": lambda: samplers.uniform(10, 3, replace=True),
    "uniform on a schedule": lambda: samplers.uniform(10, lambda r: 1 + r % 4, capacity=5),
    "poisson": lambda: samplers.poisson(10, 0.3),
    "sequential": lambda: samplers.sequential(10, 3),
    "round robin": lambda: samplers.round_robin(10, 3),
    "minimise reuse": lambda: samplers.minimise_reuse(10, 3),
    "importance on a schedule": lambda: samplers.importance(SIZES, lambda r: 1 + r, capacity=10),
    "weighted on a schedule": lambda: samplers.weighted(WEIGHTS, lambda r: 2 * r + 1, capacity=10),
    "cyclic": lambda: samplers.cyclic(10, 3, 2),
    "cyclic poisson": lambda: samplers.cyclic(10, 3, rate=0.5),
    "everyone": lambda: samplers.everyone(10),
}


def select_many(sampler, num_keys=20_000, round=1):
    """The selections of one round under many keys, in NumPy."""
    keys = jax.random.split(jax.random.key(0), num_keys)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(sampler.select, (0, None)))(keys, round))


@functools.cache
def known_selections(name):
    return select_many(SAMPLERS[name]())


def count(client_ids, num_clients=10):
    """`[keys, clients]`: how often each client is in each selection."""
    return (client_ids[:, :, None] == np.arange(num_clients)).sum(1)


def deviation(values, expected):
    """How many standard errors the means over the leading axis lie off, at most."""
    errors = np.maximum(values.std(0), 1e-9) / np.sqrt(len(values))
    return (np.abs(values.mean(0) - expected) / errors).max()


def chi_square(observed, probabilities):
    """The statistic of counts by outcome, in standard deviations above its mean."""
    outcomes, expected = zip(*probabilities.items(), strict=True)
    total = sum(observed.values())
    assert sum(observed[outcome] for outcome in outcomes) == total  # and nothing else occurs
    expected = total * np.array(expected)
    counts = np.array([observed[outcome] for outcome in outcomes])
    freedom = len(outcomes) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_selection_is_a_function_of_key_and_round(name):
    sampler, key, rounds = SAMPLERS[name](), jax.random.key(3), np.arange(6)
    in_any_order = {r: sampler.select(key, r) for r in (5, 0, 3, 1, 4, 2)}
    expected = jax.tree.map(lambda *parts: np.stack(parts), *(in_any_order[r] for r in range(6)))

    @jax.jit
    def scanned_and_mapped(key, rounds):
        select = lambda r: sampler.select(key, r)
        return jax.lax.map(select, rounds), jax.vmap(select)(rounds)

    for other in scanned_and_mapped(key, rounds):
        jax.tree.map(np.testing.assert_array_equal, other, expected)
    assert sampler.select._cache_size() == 1


@pytest.mark.parametrize("name", ["uniform with replacement", "weighted on a schedule"])
def test_a_selection_is_the_same_in_double_precision(name):
    expected = SAMPLERS[name]().select(jax.random.key(0), 1)
    with jax.enable_x64(True):
        selection = SAMPLERS[name]().select(jax.random.key(0), 1)
    assert jax.tree.map(lambda x: x.dtype, selection) == jax.tree.map(lambda x: x.dtype, expected)
    jax.tree.map(np.testing.assert_array_equal, selection, expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_selection_is_well_formed(name):
    sampler, selected = SAMPLERS[name](), known_selections(name)
    ids, filled = selected.client_ids, selected.client_ids >= 0
    assert ids.shape == (20_000, sampler.capacity)
    assert (ids.dtype, selected.probabilities.dtype) == (np.int32, np.float32)
    assert ((ids >= -1) & (ids < sampler.num_clients)).all()
    assert (filled[:, :-1] >= filled[:, 1:]).all()  # empty slots come last
    assert (selected.probabilities[~filled] == 1).all()
    assert (selected.probabilities > 0).all()
    assert (selected.num_dropped == 0).all()
    if name != "uniform with replacement":
        assert count(ids).max() == 1


# Cyclic samplers and the sequential one look at a part of the population in each round.
WHOLE = [name for name in SAMPLERS if "cyclic" not in name and name != "sequential"]


@pytest.mark.parametrize("name", WHOLE)
def test_dividing_by_the_probabilities_is_unbiased(name):
    selected = known_selections(name)
    in_slot = selected.client_ids[:, :, None] == np.arange(10)
    estimates = (in_slot / selected.probabilities[:, :, None]).sum(1)
    possible = estimates.any(0)
    assert possible.sum() >= 9  # all but those of weight zero
    assert deviation(estimates[:, possible], 1) < 6
    if "everyone" not in name:
        assert deviation(1.1 * estimates[:, possible], 1) > 6


def test_uniform_draws_each_subset_equally_often():
    observed = select_many(samplers.uniform(6, 3), round=7).client_ids
    subsets = collections.Counter(map(tuple, np.sort(observed).tolist()))
    assert chi_square(subsets, dict.fromkeys(itertools.combinations(range(6), 3), 1 / 20)) < 6


def test_uniform_with_replacement_draws_independently():
    observed = select_many(samplers.uniform(4, 2, replace=True)).client_ids
    pairs = collections.Counter(map(tuple, observed.tolist()))
    assert chi_square(pairs, dict.fromkeys(itertools.product(range(4), repeat=2), 1 / 16)) < 6


def test_uniform_draws_the_clients_of_cohort():
    population, key = regression_dataset().resident(fl.clients_mesh(1)), jax.random.key(2)
    selection = samplers.uniform(10, 3, capacity=4).select(key, 5)
    cohort = fl.cohort(jax.random.fold_in(key, 5), population, 3, capacity=4)
    np.testing.assert_array_equal(selection.client_ids, cohort.client_ids)
    own = fl.cohort_of(population, selection.client_ids)
    np.testing.assert_array_equal(own.num_examples, cohort.num_examples)


def test_poisson_tosses_an_independent_coin_for_each_client():
    observed = count(select_many(samplers.poisson(4, 0.3)).client_ids, 4)
    assert observed.max() == 1
    outcomes = collections.Counter(map(tuple, observed.tolist()))
    coins = list(itertools.product((0, 1), repeat=4))
    law = lambda rate: {c: rate ** sum(c) * (1 - rate) ** (4 - sum(c)) for c in coins}
    assert chi_square(outcomes, law(0.3)) < 6
    assert chi_square(outcomes, law(0.32)) > 6


@pytest.mark.parametrize(
    ("num_clients", "rate"),
    [(1, 0.5), (10, 0.999), (1000, 0.01), (10**6, 1e-3), (10**6, 0.4), (LARGEST, 1e-6), (50, 1e-9)],
)
def test_sizes_are_binomial(num_clients, rate):
    table = binomial(num_clients, rate)
    law = stats.binom(num_clients, rate)
    sizes = table.first + np.arange(table.cdf.size)
    np.testing.assert_allclose(table.cdf, law.cdf(sizes), atol=1e-11)
    capacity = quantile(table)
    assert law.sf(capacity) <= 1e-9
    assert capacity == 1 or law.sf(capacity - 1) > 1e-9


def test_overflow_is_counted_and_the_rest_is_a_uniform_choice():
    sampler = samplers.poisson(10, 0.8, capacity=4)
    selected = select_many(sampler)
    sizes = selected.num_dropped + (selected.client_ids >= 0).sum(1)
    assert sizes.max() > 4
    law = {k: stats.binom.pmf(k, 10, 0.8) for k in range(11)}
    assert chi_square(collections.Counter(sizes.tolist()), law) < 6
    kept = count(selected.client_ids)
    assert deviation(kept, sum(p * min(k, 4) for k, p in law.items()) / 10) < 6


def test_importance_drops_a_uniform_choice():
    selected = select_many(samplers.importance(np.ones(6), 6, capacity=2))
    assert (selected.num_dropped == 4).all()
    assert deviation(count(selected.client_ids, 6), 1 / 3) < 6


def test_importance_probabilities_grow_with_size():
    sampler = samplers.importance(SIZES, 4)
    selected = select_many(sampler)
    expected = np.minimum(4 * np.array(SIZES) / sum(SIZES), 1)
    filled = selected.client_ids >= 0
    by_id = expected[selected.client_ids[filled]]
    np.testing.assert_allclose(selected.probabilities[filled], by_id, rtol=1e-6)
    drawn = count(selected.client_ids)
    assert deviation(drawn, expected) < 6
    # Coins are independent: the variance of the size is the sum of theirs.
    spread = (drawn.sum(1) - expected.sum()) ** 2
    assert deviation(spread, (expected * (1 - expected)).sum()) < 6
    assert sampler.rate == pytest.approx(expected.max())


def test_the_default_capacity_of_importance_is_enough():
    skewed = np.arange(1, 101) ** 2
    sampler = samplers.importance(skewed, 20)
    rates = np.minimum(20 * skewed / skewed.sum(), 1)
    law = np.ones(1)  # of the size, client by client
    for rate in rates:
        law = np.convolve(law, [1 - rate, rate])
    assert law[sampler.capacity + 1 :].sum() <= 1e-9
    assert sampler.capacity < 60


def test_weighted_draws_one_after_the_other():
    weights = np.array([1.0, 2.0, 3.0, 0.5])
    observed = select_many(samplers.weighted(weights, 2)).client_ids
    pairs = collections.Counter(map(tuple, observed.tolist()))

    def law(w):
        w = w / w.sum()
        return {(i, j): w[i] * w[j] / (1 - w[i]) for i, j in itertools.permutations(range(4), 2)}

    assert chi_square(pairs, law(weights)) < 6
    assert chi_square(pairs, law(weights * [1, 1, 1.1, 1])) > 6


def test_weights_over_many_orders_of_magnitude_are_resolved():
    # Many clients, of whom a few share half of the weight: as often as all others together.
    weights = np.append(np.full(1_000, 1e-3), [0.5, 0.5])
    drawn = select_many(samplers.weighted(weights, 1), 2_000).client_ids[:, 0] >= 1_000
    assert deviation(drawn, 0.5) < 6


def test_clients_of_weight_zero_leave_slots_empty():
    sampler = samplers.weighted([1.0, 0.0, 2.0], lambda r: 3, capacity=3)
    selection = sampler.select(jax.random.key(0), 0)
    assert sorted(selection.client_ids.tolist()) == [-1, 0, 2]
    assert selection.probabilities.tolist() == [1, 1, 1]
    assert selection.num_dropped == 0


def test_weights_and_sizes_may_be_traced():
    key = jax.random.key(0)
    weighted = lambda w: samplers.weighted(w, 3).select(key, 0)
    importance = lambda w: samplers.importance(w, 3, capacity=8).select(key, 0)
    for select in (weighted, importance):
        traced, known = jax.jit(select)(jnp.array(WEIGHTS)), select(WEIGHTS)
        np.testing.assert_array_equal(traced.client_ids, known.client_ids)
        np.testing.assert_allclose(traced.probabilities, known.probabilities, rtol=1e-6)


def test_sequential_and_round_robin_see_everyone_once_per_pass():
    key, walks = jax.random.key(0), []
    for factory in (samplers.sequential, samplers.round_robin):
        sampler = factory(10, 4)
        cohorts = [sampler.select(key, r) for r in range(6)]
        assert [(c.client_ids >= 0).sum() for c in cohorts] == [4, 4, 2, 4, 4, 2]
        walks.append([i for c in cohorts for i in c.client_ids.tolist() if i >= 0])
    in_order, shuffled = walks
    assert in_order == 2 * list(range(10))
    assert sorted(shuffled[:10]) == sorted(shuffled[10:]) == list(range(10))
    assert len({tuple(shuffled[:10]), tuple(shuffled[10:]), tuple(range(10))}) == 3


@pytest.mark.parametrize(("num_clients", "cohort_size"), [(7, 3), (6, 2), (5, 5), (1, 1)])
def test_minimise_reuse_draws_everyone_before_anyone_again(num_clients, cohort_size):
    sampler = samplers.minimise_reuse(num_clients, cohort_size)
    cohorts = [sampler.select(jax.random.key(4), r).client_ids for r in range(3 * num_clients)]
    walk = np.concatenate(cohorts).tolist()
    for start in range(len(walk) - num_clients):
        assert len(set(walk[start : start + num_clients])) == num_clients


def test_minimise_reuse_finds_its_place_in_late_rounds_of_large_populations():
    key, round, num_clients, cohort_size = jax.random.key(0), 2**31 - 5, LARGEST, 999
    selection = samplers.minimise_reuse(num_clients, cohort_size).select(key, round)
    positions = [(round * cohort_size + slot) % num_clients for slot in range(cohort_size)]
    expected = fl_random.permuted(key, jnp.array(positions, jnp.uint32), num_clients)
    np.testing.assert_array_equal(selection.client_ids, expected)


TAKING_TURNS = {
    "cyclic": samplers.cyclic(11, 3, 2),
    "everyone": samplers.everyone(4),
    "minimise_reuse": samplers.minimise_reuse(11, 4),
    "round_robin": samplers.round_robin(11, 4),
    "sequential": samplers.sequential(11, 4),
}


@pytest.mark.parametrize("name", TAKING_TURNS)
def test_a_client_takes_part_in_one_of_as_many_rounds_as_there_are_groups(name):
    sampler = TAKING_TURNS[name]
    for key in jax.random.split(jax.random.key(0), 3):
        for first in range(0, 6 * sampler.num_groups, sampler.num_groups):
            ids = [sampler.select(key, first + r).client_ids for r in range(sampler.num_groups)]
            counts = np.bincount(np.concatenate(ids) + 1, minlength=sampler.num_clients + 1)[1:]
            assert counts.max() == 1


@pytest.mark.parametrize("name", TAKING_TURNS)
def test_rounds_of_a_client_lie_so_far_apart(name):
    sampler = TAKING_TURNS[name]
    closest = np.inf
    for key in jax.random.split(jax.random.key(0), 5):
        ids = np.array([sampler.select(key, r).client_ids for r in range(40)])
        for client in range(sampler.num_clients):
            closest = min(closest, np.diff(np.flatnonzero((ids == client).any(1))).min(initial=40))
    assert closest == sampler.min_separation


@pytest.mark.parametrize(("num_clients", "num_groups"), [(11, 3), (6, 3), (4, 4), (5, 1), (1, 1)])
def test_cyclic_groups_split_the_population(num_clients, num_groups):
    whole_groups = samplers.cyclic(num_clients, num_groups, rate=1)
    for key in jax.random.split(jax.random.key(0), 2):
        cohorts = [whole_groups.select(key, r).client_ids.tolist() for r in range(2 * num_groups)]
        groups = [sorted(i for i in ids if i >= 0) for ids in cohorts]
        assert groups[:num_groups] == groups[num_groups:]
        sizes = [len(group) for group in groups[:num_groups]]
        assert max(sizes) - min(sizes) <= 1
        assert sorted(itertools.chain(*groups[:num_groups])) == list(range(num_clients))


@pytest.mark.parametrize("how", [{"cohort_size": 2}, {"rate": 0.4}])
def test_cyclic_samples_within_the_group(how):
    key = jax.random.key(1)
    sampler = samplers.cyclic(10, 3, **how)
    rounds = jnp.arange(0, 30_000, 3)  # those of the first group, which has four clients
    selected = jax.tree.map(np.asarray, jax.vmap(sampler.select, (None, 0))(key, rounds))
    group = samplers.cyclic(10, 3, rate=1).select(key, 0).client_ids.tolist()
    drawn = count(selected.client_ids)
    assert (drawn.sum(0) > 0).tolist() == [i in group for i in range(10)]
    expected = how.get("rate", 2 / 4)
    filled = selected.client_ids >= 0
    np.testing.assert_allclose(selected.probabilities[filled], expected)
    assert deviation(drawn[:, group], expected) < 6
    assert deviation(drawn[:, group], 1.1 * expected) > 6
    size = drawn.sum(1)
    assert (size == 2).all() if "cohort_size" in how else deviation(size == 0, 0.6**4) < 6


def test_groups_differ_between_runs():
    sampler = samplers.cyclic(10, 3, rate=1)
    first = count(select_many(sampler, 5_000, round=0).client_ids)
    assert deviation(first, 4 / 10) < 6


def test_cohort_sizes_follow_a_schedule_without_recompilation():
    sampler = samplers.uniform(10, lambda r: jnp.where(r < 2, 1, 6), capacity=4)
    chosen = [sampler.select(jax.random.key(0), r) for r in range(4)]
    assert [int((c.client_ids >= 0).sum()) for c in chosen] == [1, 1, 4, 4]
    assert [int(c.num_dropped) for c in chosen] == [0, 0, 2, 2]
    assert [float(c.probabilities[0]) for c in chosen] == pytest.approx([0.1, 0.1, 0.6, 0.6])
    assert sampler.select._cache_size() == 1


@pytest.mark.parametrize(
    "sampler",
    [
        samplers.uniform(LARGEST, 100),
        samplers.uniform(LARGEST, 100, replace=True),
        samplers.poisson(LARGEST, 1e-7),
        samplers.round_robin(LARGEST, 100),
        samplers.cyclic(LARGEST, 10, rate=1e-6),
    ],
)
def test_the_largest_population_costs_nothing(sampler):
    ids = np.asarray(sampler.select(jax.random.key(0), 10**9).client_ids)
    ids = ids[ids >= 0]
    assert len(set(ids.tolist())) == len(ids) > 50
    assert ids.max() > LARGEST // 2


def test_states_what_an_accountant_needs():
    known = {name: SAMPLERS[name]()[3:6] for name in SAMPLERS}
    assert known["uniform"] == ("without_replacement", 0.3, 1)
    assert known["uniform with replacement"] == ("with_replacement", 0.3, 1)
    assert known["uniform on a schedule"] == ("without_replacement", None, 1)
    assert known["poisson"] == ("poisson", 0.3, 1)
    assert known["cyclic"] == ("without_replacement", 2 / 3, 3)
    assert known["cyclic poisson"] == ("poisson", 0.5, 3)
    assert known["importance on a schedule"] == ("importance", None, 1)
    assert known["everyone"] == ("in_turn", 1.0, 1)
    for name in ("sequential", "round robin", "minimise reuse"):
        assert known[name][:2] == ("in_turn", 1.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: samplers.uniform(0, 1), "num_clients is 0; choose"),
        (lambda: samplers.uniform(2**31, 1), "num_clients is 2147483648; choose"),
        (lambda: samplers.uniform(5, 6), "cohort_size is 6; choose an integer between 1 and 5"),
        (lambda: samplers.uniform(5, 3, capacity=2), "cohort_size is 3, above capacity 2; raise"),
        (lambda: samplers.uniform(5, lambda r: 1), "capacity is None while .* pass capacity="),
        (lambda: samplers.poisson(5, 0.0), "rate is 0.0; choose a number above 0, at most 1"),
        (lambda: samplers.poisson(5, 1.5), "rate is 1.5; choose"),
        (lambda: samplers.poisson(5, 0.5, capacity=6), "capacity is 6; choose .* 1 and 5"),
        (lambda: samplers.sequential(5, 0), "cohort_size is 0; choose"),
        (lambda: samplers.round_robin(5, 6), "cohort_size is 6; choose"),
        (lambda: samplers.minimise_reuse(5, 6), "cohort_size is 6; choose"),
        (lambda: samplers.everyone(0), "num_clients is 0; choose"),
        (lambda: samplers.cyclic(5, 6, 1), "num_groups is 6; choose"),
        (lambda: samplers.cyclic(5, 2, 3), "cohort_size is 3; choose an integer between 1 and 2"),
        (lambda: samplers.cyclic(5, 2), "cohort_size is None and rate is None; pass one"),
        (lambda: samplers.cyclic(5, 2, 1, rate=0.5), "cohort_size is 1 and rate is 0.5; pass one"),
        (lambda: samplers.importance([1, -1], 1), "num_examples lies between -1.0 and 1.0; pass"),
        (lambda: samplers.importance([0, 0], 1), "num_examples lies between 0.0 and 0.0; pass"),
        (lambda: samplers.importance([1, 1], 3), "cohort_size is 3; choose"),
        (lambda: samplers.importance([1, 1], lambda r: 1), "capacity is None while"),
        (lambda: samplers.weighted([[1.0]], 1), r"weights has shape \(1, 1\); pass one number"),
        (lambda: samplers.weighted([1.0, np.nan], 1), "weights lies between nan and nan; pass"),
        (lambda: samplers.weighted([1.0, 0.0], 2), "weights has 1 positive entries, below"),
    ],
)
def test_refuses_impossible_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_refuses_rounds_and_sizes_that_are_no_integers():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"round has shape \(\) and dtype float32; pass an int"):
        samplers.uniform(5, 2).select(key, 1.5)
    halves = samplers.uniform(5, lambda r: r / 2, capacity=5)
    with pytest.raises(ValueError, match=r"cohort_size\(round\) has shape .* float32; pass"):
        halves.select(key, 3)
    with pytest.raises(TypeError, match=r"cohort_size is <function .* pass an integer"):
        samplers.sequential(5, lambda r: 1)
