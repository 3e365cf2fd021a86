"""Privacy mechanisms: what one client changes, the noise, and who is refused."""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import everyone, regression_dataset, regression_model

import fedjax_lite as fl
from fedjax_lite.engine.counting import counting_calls

KEY = jax.random.key(0)
WIDE = {name: np.zeros(n, np.float32) for name, n in {"a": (50, 40), "b": 2000, "c": ()}.items()}


def received(aggregate, sensitivity=1.0, **others):
    return fl.Received(aggregate, sensitivity=jnp.float32(sensitivity), **others)


@functools.partial(jax.jit, static_argnums=0)
def on_server(transform, aggregate, sensitivity=1.0):
    """The aggregate with noise, and what is reported."""
    got, _, info = transform.server(KEY, (), received(aggregate, sensitivity))
    return got.aggregate, info


def assert_std(samples, expected):
    """The standard deviation, within five standard errors, which are less than a tenth of it."""
    n = samples.size
    relative_error = 1 / np.sqrt(2 * n)
    assert 5 * relative_error < 0.1
    assert abs(samples.std() / expected - 1) < 5 * relative_error
    assert abs(samples.mean()) < 5 * expected / np.sqrt(n)


def as_sent(transform, update, weight=1.0):
    """The weighted update of a client, flat."""
    state = transform.init(update)
    sent = transform.client(KEY, state, fl.Message(update, jnp.float32(weight)), None)
    flat = jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(sent.update)])
    return sent.weight * flat


CLIPS = {
    "clip_by_norm": lambda: fl.clip_by_norm(0.7),
    "clip_per_array": lambda: fl.clip_per_array(0.7),
    "clip_per_array, own bounds": lambda: fl.clip_per_array({"a": 0.3, "b": 0.5, "c": 0.1}),
    "zero_by_norm": lambda: fl.zero_by_norm(0.7, norm="l2"),
    "adaptive_clip": lambda: fl.adaptive_clip(0.7),
    "adaptive_zero": lambda: fl.adaptive_zero(0.7, multiplier=1.5, increment=0.1, norm="l2"),
}


@pytest.mark.parametrize("name", CLIPS)
def test_the_worst_client_reaches_the_stated_sensitivity_and_none_exceeds_it(name):
    """Neighbours that differ in one client differ by what it sends, weighted."""
    transform = fl.chain(fl.cap_weight(2.0), CLIPS[name]())
    known = transform.guarantees(fl.Guarantees(), None)
    stated = fl.weighted_mean(4.0).sensitivity(known)
    like = {"a": np.zeros((3, 2)), "b": np.zeros(4), "c": np.zeros(())}
    draws = [
        [scale * np.random.default_rng(seed).normal(size=x.shape) for x in jax.tree.leaves(like)]
        for seed in range(40)
        for scale in (0.01, 0.1, 0.25, 1.0, 100.0)
    ]
    # Of each array alone, too, and at the bound itself.
    draws += [[x * (i == j) for i, x in enumerate(d)] for d in draws[:30] for j in range(3)]
    draws += [
        [b * x / np.linalg.norm(x) for x, b in zip(d, (0.3, 0.5, 0.1), strict=True)]
        for d in draws[:5]
    ]
    flat = [np.concatenate([x.reshape(-1) for x in d]) for d in draws]
    bound = float(known.sensitivity)
    draws += [
        [x * bound * (1 - 1e-6) / np.linalg.norm(f) for x in d]
        for d, f in zip(draws[:9], flat, strict=False)
    ]
    updates = [np.stack(x).astype(np.float32) for x in zip(*draws, strict=True)]
    updates = jax.tree.unflatten(jax.tree.structure(like), updates)
    send = jax.jit(jax.vmap(functools.partial(as_sent, transform), (0, None)))
    for weight in (0.5, 20.0):
        norms = np.linalg.norm(np.asarray(send(updates, weight)) / 4.0, axis=1)
        assert norms.max() <= stated * (1 + 1e-5)
    assert norms.max() >= stated * (1 - 1e-4)


def test_noise_has_the_std_that_is_stated_and_its_own_for_each_array():
    noise = fl.gaussian_noise(1.3)
    known = noise.guarantees(fl.Guarantees(sensitivity=1.0), None)
    assert known.is_private
    got, info = jax.device_get(on_server(noise, WIDE, 0.2))
    assert_std(got["a"], 1.3 * 0.2)
    assert_std(got["b"], 1.3 * 0.2)
    np.testing.assert_allclose(info["noise_std"], 1.3 * 0.2, rtol=1e-6)
    a, b = (got[name].reshape(-1) for name in "ab")
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(2000)
    # Of a larger cohort that is simulated.
    small, _ = on_server(fl.gaussian_noise(1.3, noise_scale=0.1), WIDE, 0.2)
    np.testing.assert_allclose(small["b"], 0.1 * got["b"], rtol=1e-5)
    signal = jax.tree.map(lambda x: np.float32(x + 3.0), WIDE)
    noisy, info = jax.device_get(on_server(noise, signal, 0.2))
    np.testing.assert_allclose(noisy["b"] - 3.0, got["b"], atol=1e-6)
    np.testing.assert_allclose(info["signal_to_noise"], 3.0 / (1.3 * 0.2), rtol=1e-5)


def test_both_parts_of_complex_numbers_have_noise():
    got, _ = on_server(fl.gaussian_noise(2.0), {"a": np.zeros(4000, np.complex64)})
    assert_std(np.asarray(got["a"]).real, 2.0)
    assert_std(np.asarray(got["a"]).imag, 2.0)


@functools.cache
def standing_still(pipeline, num_devices, lanes):
    """With params that no client changes."""
    return fl.fed_avg(
        *(regression_model(), optax.sgd(0.0)),
        batch_size=4,
        pipeline=pipeline,
        reducer=fl.weighted_mean(5.0),
        mesh=fl.clients_mesh(num_devices),
        lanes=lanes,
    )


def rounds_of_noise(pipeline, keys, num_devices=1, lanes=1):
    """What each of several rounds adds to params, and what is reported of the last."""
    algorithm = standing_still(pipeline, num_devices, lanes)
    state = algorithm.init({"w": np.zeros(3, np.float32), "b": np.float32(0)})
    cohort = everyone(regression_dataset().resident(fl.clients_mesh(num_devices)))
    params = [np.zeros(4)]
    for key in keys:
        state, info = algorithm.round(key, state, cohort)
        params.append(np.append(state.params["w"], state.params["b"]))
    return -np.diff(params, axis=0), info


DP_FED_AVG = functools.partial(fl.chain, fl.cap_weight(1.0), fl.clip_by_norm(0.5))


def test_noise_is_another_one_in_each_round_and_the_same_on_all_layouts():
    keys = jax.random.split(KEY, 3)
    pipeline = DP_FED_AVG(fl.gaussian_noise(2.0))
    one, info = rounds_of_noise(pipeline, keys)
    np.testing.assert_allclose(info.metrics["noise_std"], 2.0 * 0.5 / 5.0, rtol=1e-6)
    # No two numbers are the same, of rounds or of arrays.
    assert len(np.unique(np.abs(one).round(6))) == one.size
    layouts = [(1, 3)] + [(8, 1)] * (jax.device_count() >= 8)
    for num_devices, lanes in layouts:
        other, _ = rounds_of_noise(pipeline, keys, num_devices, lanes)
        np.testing.assert_allclose(other, one, rtol=1e-6)
    # Nor does it repeat if the caller's key does.
    same, _ = rounds_of_noise(pipeline, [KEY] * 3)
    assert len(np.unique(np.abs(same).round(6))) == same.size


def quantile_by_numpy(norms, bound, num_rounds, quantile, rate, denominator=None):
    """Andrew et al. (2021), Algorithm 1, without noise, in float64."""
    bounds = []
    for _ in range(num_rounds):
        bounds.append(bound)
        below = (norms <= bound).sum()
        share = (below - 0.5 * norms.size) / (denominator or norms.size) + 0.5
        bound = bound * np.exp(-rate * (share - quantile))
    return np.array(bounds)


@pytest.mark.parametrize(
    ("build", "quantile", "rate", "affine"),
    [
        (fl.adaptive_clip, 0.5, 0.2, (1.0, 0.0)),
        (
            functools.partial(fl.adaptive_clip, quantile=0.8, learning_rate=0.1),
            *(0.8, 0.1, (1.0, 0.0)),
        ),
        (functools.partial(fl.adaptive_zero, norm="l2"), 0.98, np.log(10), (2.0, 1.0)),
    ],
)
@pytest.mark.parametrize("denominator", [None, 150.0])
def test_bounds_go_to_the_quantile(build, quantile, rate, affine, denominator):
    """As by NumPy in all rounds; to the quantile, if the denominator is the number of clients."""
    norms = np.random.default_rng(0).lognormal(1.0, 0.7, 101).astype(np.float32)
    updates = norms[:, None] * np.float32([0.6, 0.8])
    norms = np.linalg.norm(updates, axis=1)
    transform = build(1.0, denominator=denominator)

    def step(estimate, key):
        message = lambda x: fl.Message(x, jnp.float32(1))
        send = lambda x: transform.client(key, estimate, message(x), None).statistics
        sums = jax.tree.map(lambda x: x.sum(0), jax.vmap(send)(updates))
        got = fl.Received((), sums)
        _, estimate, info = transform.server(key, estimate, got)
        return estimate, info

    start = transform.init(())
    _, info = jax.jit(lambda keys: jax.lax.scan(step, start, keys))(jax.random.split(KEY, 200))
    (bounds,) = info.values()
    a, c = affine
    expected = a * quantile_by_numpy(norms, 1.0, 200, quantile, rate, denominator) + c
    np.testing.assert_allclose(bounds, expected, rtol=2e-3)
    if denominator is None:
        # Within what a step moves it.
        low, high = np.quantile(norms, [quantile - 0.03, min(quantile + 0.03, 1.0)])
        assert a * low * 0.9 + c < np.median(bounds[-20:]) < a * high * 1.1 + c


def test_counts_have_their_noise():
    transform = fl.adaptive_clip(1.0, learning_rate=1.0, count_noise=3.0, denominator=10.0)
    sums = {"below": jnp.float32(2.5), "number": jnp.float32(7)}
    keys = jax.random.split(KEY, 4000)
    step = lambda key: transform.server(key, transform.init(()), fl.Received((), sums))[1]
    shares = 0.5 - np.log(np.asarray(jax.jit(jax.vmap(step))(keys)))
    # 2.5 of halves are counted, of ten clients.
    assert_std(shares - (0.5 + 0.25), 0.3)


def test_count_and_aggregate_share_the_noise_multiplier():
    """The sum of the inverse squares of both multipliers is that of the one that is given."""
    sigma, z = 2.0, 1.5
    clip = fl.adaptive_clip(0.5, count_noise=sigma, denominator=5.0)
    pipeline = fl.chain(fl.cap_weight(1.0), clip, fl.gaussian_noise(z))
    _, info = rounds_of_noise(pipeline, [KEY])
    own = info.metrics["noise_std"] / (0.5 / 5.0)
    np.testing.assert_allclose(own**-2 + (2 * sigma) ** -2, z**-2, rtol=1e-5)
    # With the bound that is in the state.
    _, info = rounds_of_noise(pipeline, jax.random.split(KEY, 3))
    assert info.metrics["clip_norm"] != 0.5
    np.testing.assert_allclose(
        info.metrics["noise_std"], own * info.metrics["clip_norm"] / 5.0, rtol=1e-5
    )
    # Too much for the count, where it is traced, is loud.
    loud = jax.jit(lambda z: fl.gaussian_noise(z).server(KEY, (), received(WIDE, released=0.1)))
    assert np.isnan(loud(4.0)[0].aggregate["c"])


def many_rounds(noise, num_rounds, like=WIDE, z=1.0):
    """What is added in each round to aggregates of sensitivity 1, `[rounds, entries of b]`."""

    def step(state, key):
        got, state, _ = noise.server(key, state, received(like))
        return state, got.aggregate["b"]

    keys = jax.random.split(KEY, num_rounds)
    return np.asarray(jax.jit(lambda: jax.lax.scan(step, noise.init(like), keys))()[1], float)


def banded(column, num_rounds):
    return sum(c * np.eye(num_rounds, k=-j) for j, c in enumerate(column))


@pytest.mark.parametrize("num_bands", [1, 2, 3, 5])
def test_toeplitz_noise_is_the_factorised_one(num_bands):
    """C^-1 g, with g the independent noise of the same keys; and again after each restart."""
    num_rounds = 5
    column = np.array([0.7, 0.5, 0.4, 0.2, 0.1])[:num_bands]
    noise = fl.toeplitz_noise(1.5, num_rounds, num_bands, coefficients=7 * column)
    column /= np.linalg.norm(column)
    independent = many_rounds(fl.gaussian_noise(1.5), 12)
    if num_bands == 1:
        np.testing.assert_array_equal(many_rounds(noise, 12), independent)
        return
    added = many_rounds(noise, 12)
    for start in (0, 5, 10):
        g = independent[start : start + num_rounds]
        expected = np.linalg.solve(banded(column, len(g)), g)
        np.testing.assert_allclose(added[start : start + num_rounds], expected, atol=2e-4)
        # What is left in the sum of rounds is A C^-1 g.
        np.testing.assert_allclose(
            np.cumsum(added[start : start + num_rounds], 0),
            np.tri(len(g)) @ np.linalg.inv(banded(column, len(g))) @ g,
            atol=1e-3,
        )


@pytest.mark.parametrize("num_bands", [1, 2, 3])
def test_clients_whose_rounds_are_bands_apart_change_what_is_noised_by_the_root_of_their_number(
    num_bands,
):
    """The worst of all sets of rounds, with updates of norm 1 in any directions."""
    num_rounds = 7
    column = np.array([0.7, 0.5, 0.4])[:num_bands]
    matrix = banded(column / np.linalg.norm(column), num_rounds)
    worst = {}
    for chosen in itertools.product([False, True], repeat=num_rounds):
        rounds = np.flatnonzero(chosen)
        if rounds.size and (rounds.size == 1 or np.diff(rounds).min() >= num_bands):
            inner = np.abs(matrix[:, rounds].T @ matrix[:, rounds])
            worst[rounds.size] = max(worst.get(rounds.size, 0), inner.sum())
    for count, squared in worst.items():
        assert squared <= count + 1e-9
    assert worst[2] > 2 - 1e-9
    # Closer together, they change more.
    if num_bands > 1:
        assert (matrix[:, :2].sum(1) ** 2).sum() > 2 + 1e-3


def test_the_best_coefficients_and_their_sensitivity_are_those_of_jax_privacy():
    toeplitz = pytest.importorskip("jax_privacy.matrix_factorization.toeplitz")
    n, b = 12, 3
    best = np.asarray(toeplitz.optimize_banded_toeplitz(n, b))
    noise = fl.toeplitz_noise(1.0, n, b)
    independent = many_rounds(fl.gaussian_noise(1.0), n)
    recovered = np.linalg.solve(banded(best, n), independent)
    np.testing.assert_allclose(many_rounds(noise, n), recovered, atol=1e-3)
    # In the sums is less noise than of independent noise, for which a client takes part as often.
    error = lambda column: ((np.tri(n) @ np.linalg.inv(banded(column, n))) ** 2).sum()
    assert error(best) < 0.7 * error(np.ones(1))
    assert (best >= 0).all()
    assert (np.diff(best) <= 0).all()
    squared = functools.partial(toeplitz.minsep_sensitivity_squared, min_sep=b, n=n)
    counts = (1, 2, 4)
    stated = jax.jit(lambda x: [squared(x, max_participations=k, skip_checks=True) for k in counts])
    np.testing.assert_allclose(stated(best), counts, rtol=1e-4)


def nodes(num_rounds):
    """The matrix of the tree: which rounds each node covers that sums are made of."""
    levels = int(np.log2(num_rounds)) + 1
    rows = []
    for level in range(levels):
        for start in range(0, num_rounds - 2**level + 1, 2 ** (level + 1)):
            covered = (np.arange(num_rounds) >= start) & (np.arange(num_rounds) < start + 2**level)
            rows.append(covered)
    return np.array(rows, float)


@pytest.mark.parametrize("num_rounds", [1, 6, 8])
def test_tree_noise_is_that_of_the_nodes_of_a_tree(num_rounds):
    levels = int(np.log2(num_rounds)) + 1
    # A client changes C x by at most sqrt(h), and one does.
    np.testing.assert_allclose(np.linalg.norm(nodes(num_rounds), axis=0).max() ** 2, levels)
    added = many_rounds(fl.tree_noise(1.5, num_rounds), 2 * num_rounds)
    for start in (0, num_rounds):
        sums = np.cumsum(added[start : start + num_rounds], 0) / (1.5 * np.sqrt(levels))
        # As many nodes as there are ones in the number of rounds.
        for i, x in enumerate(sums):
            assert_std(x, np.sqrt((i + 1).bit_count()))
        # Sums of which one has all nodes of the other: of 2 and 3 rounds, of 4 and 5, 6, 7.
        for few, many in [(2, 3), (4, 5), (4, 6), (4, 7)]:
            if many <= num_rounds:
                assert_std(sums[many - 1] - sums[few - 1], np.sqrt((many - few).bit_count()))
    # Another tree has other noise.
    sums = added.reshape(2, num_rounds, -1).sum(1)
    assert abs(np.corrcoef(sums)[0, 1]) < 5 / np.sqrt(2000)


LINEAR = fl.function_model(lambda w, batch: batch["x"] @ w)  # The gradient of an example is its x.


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, w, batch, key, weights):
    def total(w):
        losses, _ = model.loss(w, {}, batch, key)
        return jnp.where(batch["mask"], losses, 0) @ weights

    return jax.grad(total)(w)


def gradient_of(model, x, w, mask=None, key=KEY, weights=None):
    """Of the mean loss of a batch, or of the weighted sum."""
    mask = np.ones(len(x), bool) if mask is None else np.array(mask)
    weights = mask / mask.sum() if weights is None else weights
    batch = {"x": np.float32(x), "mask": mask}
    return np.asarray(gradient(model, np.float32(w), batch, key, np.float32(weights)))


def test_gradients_are_clipped_example_by_example():
    x = np.random.default_rng(0).normal(size=(6, 3)) * [[0.1], [1], [10], [1e30], [1], [1]]
    x[4, 1], x[5] = np.nan, np.nan
    mask = [True] * 5 + [False]
    norms = np.linalg.norm(x[:3], axis=1, keepdims=True)
    clipped = x[:3] * np.minimum(1, 0.7 / norms)
    clipped = np.concatenate([clipped, np.zeros((2, 3))])  # Squares overflow; not a number.
    model = fl.dp_sgd(LINEAR, 0.7, 0.0)
    np.testing.assert_allclose(
        gradient_of(model, x, np.ones(3), mask), clipped.sum(0) / 5, rtol=1e-5
    )
    weights = np.float32([1, 2, 3, 4, 5, 0])
    weighted = gradient_of(model, np.nan_to_num(x), np.ones(3), mask, weights=weights)
    own = np.nan_to_num(x[4]) * min(1, 0.7 / np.linalg.norm(np.nan_to_num(x[4])))
    np.testing.assert_allclose(weighted, weights[:4] @ clipped[:4] + 5 * own, rtol=1e-5, atol=1e-6)
    batch = {"x": np.float32(x), "mask": np.array(mask)}
    told = fl.dp_sgd(LINEAR, 0.7, 0.0, report_clipped=True).metrics(np.ones(3), {}, batch)
    np.testing.assert_array_equal(told["clipped"][:3], norms[:, 0] > 0.7)


def test_the_worst_example_reaches_the_sensitivity_of_a_gradient():
    model, rng = fl.dp_sgd(LINEAR, 0.7, 0.0), np.random.default_rng(0)
    x = rng.normal(size=(4, 3))
    zeroed = gradient_of(model, np.concatenate([x, np.zeros((1, 3))]), np.ones(3))
    changes = [
        np.linalg.norm(
            gradient_of(model, np.concatenate([x, s * rng.normal(size=(1, 3))]), np.ones(3))
            - zeroed
        )
        for s in (0.01, 0.1, 1.0, 100.0)
    ]
    assert max(changes) <= 0.7 / 5 * (1 + 1e-5)
    assert max(changes) >= 0.7 / 5 * (1 - 1e-5)


def test_gradients_have_noise_of_their_own_for_each_step():
    w, x = np.ones(3000), np.zeros((4, 3000))
    model = fl.dp_sgd(LINEAR, 0.7, 2.0)
    first = gradient_of(model, x, w)
    assert_std(first, 2.0 * 0.7 / 4)
    # That of the largest weight, and none without examples.
    assert_std(gradient_of(model, x, w, weights=[1.0, 3.0, 0, 0]), 2.0 * 0.7 * 3)
    assert not gradient_of(model, x, w, weights=np.zeros(4)).any()
    np.testing.assert_array_equal(gradient_of(model, x, w), first)
    other = gradient_of(model, x, w, key=jax.random.key(1))
    assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(3000)


def test_two_gradients_of_one_step_do_not_share_noise():
    """Or their difference, which a client may send, would be in the clear."""
    model = fl.dp_sgd(LINEAR, 1.0, 2.0)

    def step(server, client, difference, batch, key):
        loss = lambda w: model.loss(w, {}, batch, key)[0].mean(where=batch["mask"])
        first, second = (jax.grad(loss)(server.params) for _ in range(2))
        return first - second

    client_update = fl.ClientUpdate(
        lambda server, client: jnp.zeros(3000),
        step,
        lambda server, client, difference: fl.ClientResult(difference, 1.0),
    )
    algorithm = fl.federated_algorithm(model, client_update, optax.sgd(1.0))
    dataset = fl.FederatedDataset.from_clients([{"x": np.ones((4, 3000))}])
    cohort = fl.cohort_of(dataset.resident(), [0])
    state, _ = algorithm.round(KEY, algorithm.init(jnp.zeros(3000)), cohort)
    assert_std(np.asarray(state.params), np.sqrt(2) * 2.0 / 4)


def test_the_gradients_of_a_sharpness_aware_step_do_not_share_noise():
    model = fl.dp_sgd(LINEAR, 1.0, 2.0)
    batch = {"x": np.ones((4, 3), np.float32), "mask": np.ones(4, bool)}

    def of(model):
        return jax.grad(lambda w: model.loss(w, {}, batch, KEY)[0].mean())(jnp.ones(3))

    with counting_calls():
        first, second = of(model), of(model)
    with counting_calls():  # That of the ascent comes first.
        aware = of(fl.sharpness_aware(model, 0.1))
    assert not np.allclose(first, second)
    np.testing.assert_allclose(aware, second, rtol=1e-5)


@pytest.mark.parametrize("name", ["scaffold", "frozen"])
def test_any_algorithm_trains_on_private_gradients(name):
    """Without noise and with a bound that nothing reaches, as it does without; on any lanes."""
    population = regression_dataset().resident(fl.clients_mesh(1))

    @functools.partial(jax.jit, static_argnums=0)
    def trained(lanes, *numbers):
        """On private gradients, if there are a bound and a noise multiplier."""
        model = regression_model()
        model = fl.frozen(model, "b") if name == "frozen" else model
        model = fl.dp_sgd(model, *numbers) if numbers else model
        factory = fl.fed_avg if name == "frozen" else fl.scaffold
        options = {"batch_size": 4, "lanes": lanes, "mesh": fl.clients_mesh(1)}
        algorithm = factory(model, optax.sgd(0.1), **options)
        state = algorithm.init({"w": np.ones(3, np.float32), "b": np.float32(1)}, num_clients=10)
        state, _ = algorithm.round(KEY, state, everyone(population))
        return state.params["w"]

    plain = np.asarray(trained(1))
    np.testing.assert_allclose(trained(1, 1e6, 0.0), plain, rtol=1e-5)
    if name == "scaffold":
        noisy = [np.asarray(trained(lanes, 1.0, 1.0)) for lanes in (1, 3)]
        np.testing.assert_allclose(*noisy, rtol=1e-4)
        assert np.abs(noisy[0] - plain).max() > 1e-2


def test_models_with_a_state_have_no_private_gradients():
    model = regression_model()
    stateful = model._replace(
        init=lambda key: (model.init(key)[0], {"mean": jnp.zeros(())}),
        loss=lambda params, state, batch, key: (model.loss(params, {}, batch, key)[0], state),
    )
    algorithm = fl.fed_avg(fl.dp_sgd(stateful, 1.0, 1.0), optax.sgd(0.1))
    state = algorithm.init(KEY)
    with pytest.raises(ValueError, match="model has a state, such as the statistics of BatchNorm"):
        algorithm.round(KEY, state, everyone(regression_dataset().resident()))


def test_who_takes_part_shows_in_no_drift():
    pipeline = fl.chain(fl.mix_models(), fl.cap_weight(1.0), fl.clip_by_norm(1.0))
    with pytest.raises(ValueError, match="mix_models adds by how much the params"):
        rounds_of_noise(fl.chain(pipeline, fl.gaussian_noise(1.0)), [KEY])


def test_clients_add_noise_of_their_own():
    """Ten clients with nothing to say: the mean of independent noises."""
    model = fl.function_model(lambda w, batch: batch["x"] * w.sum())
    dataset = fl.FederatedDataset.from_clients([{"x": [0.0]}] * 10)
    for noise, std in [
        (fl.local_gaussian_noise(0.5, 1.2), 0.5 * 1.2),
        (fl.local_laplace_noise(0.5, 2.0), np.sqrt(2) * 2 * 0.5 / 2.0),
    ]:
        algorithm = fl.fed_avg(model, optax.sgd(0.1), pipeline=noise)
        state = algorithm.init(jnp.zeros(3000))
        state, _ = algorithm.round(KEY, state, fl.cohort_of(dataset.resident(), range(10)))
        assert_std(np.asarray(state.params), std / np.sqrt(10))
        assert noise.guarantees(fl.Guarantees(sensitivity=1.0), None).sensitivity is None


@pytest.mark.parametrize("order", [1, 2])
def test_local_noise_comes_after_a_bound_on_the_update(order):
    """With so little noise that it does not show."""
    little = {1: fl.local_laplace_noise(0.7, 1e9), 2: fl.local_gaussian_noise(0.7, 1e-9)}[order]
    send = jax.jit(lambda update: little.client(KEY, (), fl.Message(update, 1.0), None))
    rng = np.random.default_rng(0)
    for scale in (0.01, 1.0, 1e36):
        update = {"a": np.float32(scale * rng.normal(size=(3, 2))), "b": np.float32(scale)}
        flat = np.append(update["b"], update["a"]).astype(float)
        norm = np.linalg.norm(flat, order)
        sent = jax.device_get(send(update))
        expected = update["a"] * min(1, 0.7 / norm)
        np.testing.assert_allclose(sent.update["a"], expected, rtol=1e-4, atol=1e-7)
        assert sent.metrics["clipped"] == (norm > 0.7)


def test_the_extra_is_named_where_jax_privacy_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_privacy", None)
    for name in [name for name in sys.modules if name.startswith("jax_privacy.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install 'fedjax-lite\[privacy\]'"):
        fl.toeplitz_noise(1.0, 7, 2)


REFUSED = {
    "noise before clipping": (
        lambda: fl.chain(fl.gaussian_noise(1.0), fl.clip_by_norm(1.0)),
        "gaussian_noise comes before a bound .* put it after fl.clip_by_norm",
    ),
    "noise twice": (
        lambda: fl.chain(fl.clip_by_norm(1.0), fl.gaussian_noise(1.0), fl.gaussian_noise(1.0)),
        "gaussian_noise comes after other noise",
    ),
    "a count in the clear": (
        lambda: fl.chain(fl.adaptive_clip(), fl.gaussian_noise(1.0)),
        "after a count of clients in the clear",
    ),
    "too little noise on the count": (
        lambda: fl.chain(
            fl.adaptive_clip(count_noise=0.5, denominator=10.0), fl.gaussian_noise(1.0)
        ),
        "noise_multiplier is 1.0, and the counts .* choose one below 1, or a larger count_noise",
    ),
    "a number of clients that is private": (
        lambda: fl.adaptive_clip(count_noise=1.0),
        "denominator is None, and the number of clients",
    ),
    "no bound for the weight": (
        lambda: fl.fed_avg(
            *(regression_model(), optax.sgd(0.1)),
            pipeline=fl.chain(fl.clip_by_norm(1.0), fl.gaussian_noise(1.0)),
            reducer=fl.weighted_mean(10.0),
        ),
        "a client may have any weight",
    ),
    "more bands than rounds": (
        lambda: fl.toeplitz_noise(1.0, 4, 5),
        "num_bands is 5; choose an integer between 1 and 4",
    ),
    "coefficients of other bands": (
        lambda: fl.toeplitz_noise(1.0, 4, 2, coefficients=[1.0]),
        r"coefficients is \[1.0\]; give 2",
    ),
    "correlated noise before clipping": (
        lambda: fl.chain(fl.tree_noise(1.0, 4), fl.clip_by_norm(1.0)),
        "tree_noise comes before a bound",
    ),
    "a bound of nothing": (
        lambda: fl.dp_sgd(LINEAR, 0.0, 1.0),
        "max_norm is 0.0; choose a number above 0",
    ),
    "no epsilon": (
        lambda: fl.local_laplace_noise(1.0, 0.0),
        "epsilon is 0.0; choose a number above",
    ),
    "local noise after a mask": (
        lambda: fl.local_gaussian_noise(1.0, 1.0).guarantees(fl.Guarantees(is_masked=True), None),
        "local_gaussian_noise comes after a mask",
    ),
    "noise after local noise": (
        lambda: fl.chain(fl.local_gaussian_noise(1.0, 1.0), fl.gaussian_noise(1.0)),
        "gaussian_noise comes before a bound",
    ),
    "negative noise": (lambda: fl.gaussian_noise(-1.0), "noise_multiplier is -1.0; choose"),
    "a quantile above 1": (lambda: fl.adaptive_clip(quantile=2.0), "quantile is 2.0; choose"),
    "a norm that is none": (lambda: fl.zero_by_norm(1.0, norm="l7"), "norm is 'l7'; choose one"),
    "bounds of other arrays": (
        lambda: fl.clip_per_array({"a": 1.0}).init({"b": jnp.zeros(3)}),
        "max_norm is .* give a bound for each array",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused(name):
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        build()


@jax.jit
def bounded_in_several_ways(update):
    return [
        as_sent(transform, {"a": update})
        for transform in (
            fl.clip_per_array(2.0),
            fl.adaptive_clip(2.0),
            fl.zero_by_norm(2.0),
            fl.zero_by_norm(2.0, norm="l2"),
            fl.adaptive_zero(0.5),
        )
    ]


@pytest.mark.parametrize(
    ("update", "clipped", "zeroed"),
    [
        ([3.0, 4.0], [1.2, 1.6], [0.0, 0.0]),
        ([1e38, -1e38], [2**0.5, -(2**0.5)], [0.0, 0.0]),
        ([3e-30, 4e-30], [3e-30, 4e-30], [3e-30, 4e-30]),
        ([], [], []),
        ([np.nan, 1.0], [np.nan, 1.0], [np.nan, 1.0]),
        ([np.inf, 1.0], [np.inf, 1.0], [np.inf, 1.0]),
    ],
)
def test_extremes_have_a_documented_outcome(update, clipped, zeroed):
    expected = [clipped] * 2 + [zeroed] * 3
    for sent, x in zip(bounded_in_several_ways(np.float32(update)), expected, strict=True):
        np.testing.assert_allclose(sent, x, rtol=1e-6)
