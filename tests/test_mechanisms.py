"""Privacy mechanisms: what one client changes, the noise, and who is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import everyone, regression_dataset, regression_model

import fedjax_lite as fl

KEY = jax.random.key(0)
WIDE = {"a": jnp.zeros((50, 40)), "b": jnp.zeros(2000), "c": jnp.zeros(())}


def received(aggregate, sensitivity=1.0, **others):
    return fl.Received(aggregate, sensitivity=jnp.float32(sensitivity), **others)


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
    like = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(4), "c": jnp.zeros(())}
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
    updates = [jnp.stack(x) for x in zip(*[map(jnp.float32, d) for d in draws], strict=True)]
    updates = jax.tree.unflatten(jax.tree.structure(like), updates)
    for weight in (0.5, 20.0):
        change = jax.vmap(lambda x, w=weight: as_sent(transform, x, w))(updates) / 4.0
        norms = np.linalg.norm(change, axis=1)
        assert norms.max() <= stated * (1 + 1e-5)
    assert norms.max() >= stated * (1 - 1e-4)


def test_noise_has_the_std_that_is_stated_and_its_own_for_each_array():
    noise = fl.gaussian_noise(1.3)
    known = noise.guarantees(fl.Guarantees(sensitivity=1.0), None)
    assert known.is_private
    got, _, info = noise.server(KEY, (), received(WIDE, 0.2))
    assert_std(np.asarray(got.aggregate["a"]), 1.3 * 0.2)
    assert_std(np.asarray(got.aggregate["b"]), 1.3 * 0.2)
    np.testing.assert_allclose(info["noise_std"], 1.3 * 0.2, rtol=1e-6)
    a, b = (np.asarray(got.aggregate[name]).reshape(-1) for name in "ab")
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(2000)
    # Of a larger cohort that is simulated.
    small, _, _ = fl.gaussian_noise(1.3, noise_scale=0.1).server(KEY, (), received(WIDE, 0.2))
    np.testing.assert_allclose(small.aggregate["b"], 0.1 * got.aggregate["b"], rtol=1e-5)
    signal = jax.tree.map(lambda x: x + 3.0, WIDE)
    noisy, _, info = noise.server(KEY, (), received(signal, 0.2))
    np.testing.assert_allclose(noisy.aggregate["b"] - 3.0, got.aggregate["b"], atol=1e-6)
    np.testing.assert_allclose(info["signal_to_noise"], 3.0 / (1.3 * 0.2), rtol=1e-5)


def test_both_parts_of_complex_numbers_have_noise():
    got, _, _ = fl.gaussian_noise(2.0).server(KEY, (), received({"a": jnp.zeros(4000, complex)}))
    assert_std(np.asarray(got.aggregate["a"].real), 2.0)
    assert_std(np.asarray(got.aggregate["a"].imag), 2.0)


def rounds_of_noise(pipeline, num_rounds, keys, num_devices=1, lanes=1, denominator=5.0):
    """What each of several rounds adds to params that no client changes, and their infos."""
    mesh = fl.clients_mesh(num_devices)
    algorithm = fl.fed_avg(
        *(regression_model(), optax.sgd(0.0)),
        batch_size=4,
        pipeline=pipeline,
        reducer=fl.weighted_mean(denominator),
        mesh=mesh,
        lanes=lanes,
    )
    state = algorithm.init({"w": jnp.zeros(3), "b": jnp.float32(0)})
    cohort = everyone(regression_dataset().resident(mesh))
    added = []
    for r in range(num_rounds):
        after, info = algorithm.round(keys[r], state, cohort)
        added.append(
            np.append(state.params["w"] - after.params["w"], state.params["b"] - after.params["b"])
        )
        state = after
    return np.array(added), info


DP_FED_AVG = functools.partial(fl.chain, fl.cap_weight(1.0), fl.clip_by_norm(0.5))


def test_noise_is_another_one_in_each_round_and_the_same_on_all_layouts():
    keys = jax.random.split(KEY, 3)
    pipeline = DP_FED_AVG(fl.gaussian_noise(2.0))
    one, info = rounds_of_noise(pipeline, 3, keys)
    np.testing.assert_allclose(info.metrics["noise_std"], 2.0 * 0.5 / 5.0, rtol=1e-6)
    # No two numbers are the same, of rounds or of arrays.
    assert len(np.unique(np.abs(one).round(6))) == one.size
    layouts = [(1, 3)] + [(8, 1)] * (jax.device_count() >= 8)
    for num_devices, lanes in layouts:
        other, _ = rounds_of_noise(pipeline, 3, keys, num_devices, lanes)
        np.testing.assert_allclose(other, one, rtol=1e-6)
    # Nor does it repeat if the caller's key does.
    same, _ = rounds_of_noise(pipeline, 3, [KEY] * 3)
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
    _, info = jax.lax.scan(step, start, jax.random.split(KEY, 200))
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
    shares = 0.5 - np.log(np.asarray(jax.vmap(step)(keys)))
    # 2.5 of halves are counted, of ten clients.
    assert_std(shares - (0.5 + 0.25), 0.3)


def test_count_and_aggregate_share_the_noise_multiplier():
    """The sum of the inverse squares of both multipliers is that of the one that is given."""
    sigma, z = 2.0, 1.5
    clip = fl.adaptive_clip(0.5, count_noise=sigma, denominator=5.0)
    pipeline = fl.chain(fl.cap_weight(1.0), clip, fl.gaussian_noise(z))
    _, info = rounds_of_noise(pipeline, 1, [KEY])
    own = info.metrics["noise_std"] / (0.5 / 5.0)
    np.testing.assert_allclose(own**-2 + (2 * sigma) ** -2, z**-2, rtol=1e-5)
    # With the bound that is in the state.
    _, info = rounds_of_noise(pipeline, 3, jax.random.split(KEY, 3))
    assert info.metrics["clip_norm"] != 0.5
    np.testing.assert_allclose(
        info.metrics["noise_std"], own * info.metrics["clip_norm"] / 5.0, rtol=1e-5
    )
    # Too much for the count, where it is traced, is loud.
    loud = jax.jit(lambda z: fl.gaussian_noise(z).server(KEY, (), received(WIDE, released=0.1)))
    assert np.isnan(loud(4.0)[0].aggregate["c"])


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
    update = jnp.asarray(update, jnp.float32)
    for transform, expected in [
        (fl.clip_per_array(2.0), clipped),
        (fl.adaptive_clip(2.0), clipped),
        (fl.zero_by_norm(2.0), zeroed),
        (fl.zero_by_norm(2.0, norm="l2"), zeroed),
        (fl.adaptive_zero(0.5), zeroed),
    ]:
        np.testing.assert_allclose(as_sent(transform, {"a": update}), expected, rtol=1e-6)
