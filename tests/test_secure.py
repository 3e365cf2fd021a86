"""Fixed point and secure aggregation, against integers that never wrap around."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import SIZES, everyone, regression_dataset, regression_model
from reference import secure

import fedjax_lite as fl
from fedjax_lite.updates.discrete_noise import discrete_gaussian

KEY = jax.random.key(3)
# One client fills two slots, and one slot is empty.
IDS = np.array([5, 2, -1, 9, 2, 0, 7, 4])
MEMBERS = np.flatnonzero(IDS >= 0)
UPDATE = {"a": np.zeros((30, 2)), "b": np.zeros(()), "c": np.zeros((0, 4))}


def some_survivors():
    """Sets of slots, from none to all, in which both slots of a client are or none."""
    rng = np.random.default_rng(0)
    sets = rng.random((40, IDS.size)) < np.linspace(-0.1, 1.1, 40)[:, None]
    sets[:, 4] = sets[:, 1]
    return sets & (IDS >= 0)


SURVIVORS = some_survivors()


def cohort_of(ids):
    ids = jnp.asarray(ids, jnp.int32)
    return fl.Cohort(
        client_ids=ids,
        num_examples=jnp.ones_like(ids),
        offsets=jnp.zeros_like(ids),
        examples={},
        num_clients=10,
    )


def masked(transform, updates, ids=IDS, key=KEY):
    """What the clients of a cohort send, arrays `[clients, ...]`."""
    shown = transform.announce(key, (), cohort_of(ids))

    def send(update, client_id, own_key):
        client = fl.Client(client_id, jnp.int32(1), jnp.int32(1), (), own_key)
        return transform.client(own_key, shown, fl.Message(update, jnp.float32(1)), client)

    return jax.vmap(send)(updates, jnp.asarray(ids), jax.random.split(KEY, len(ids)))


def unmasked(transform, sent, arrived, claimed):
    """The server's half, of the sum over slots that arrived, and those of which it believes so."""
    total = jax.tree.map(
        lambda x: jnp.einsum("c,c...->...", arrived.astype(jnp.uint32), x), sent.update
    )
    received = fl.Received(total, weights=claimed.astype(float), cohort=cohort_of(IDS))
    received, _, info = transform.server(KEY, (), received)
    return received.aggregate, info


@pytest.mark.parametrize(("num_neighbours", "bits"), [(None, 32), (2, 32), (4, 20), (6, 8)])
def test_of_masked_updates_the_sum_over_those_who_arrive_is_left(num_neighbours, bits):
    transform = fl.secure_aggregation(num_neighbours, modulus_bits=bits, masks=True)

    @jax.jit
    def exchange(integers, arrived, claimed):
        sent = masked(transform, integers)
        read = functools.partial(unmasked, transform, sent)
        return sent.update, jax.vmap(read)(arrived, claimed)

    rng = np.random.default_rng(1)
    draw = lambda x: rng.integers(0, 2**bits, (IDS.size, *x.shape), np.uint32)
    integers = jax.tree.map(draw, UPDATE)

    def sums(sets):
        columns = jax.tree.map(
            lambda x: np.einsum("rc,c...->r...", sets.astype(np.uint64), x.astype(np.uint64)),
            integers,
        )
        return jax.tree.map(lambda x: x % 2**bits, columns)

    everyone = np.tile(IDS >= 0, (6, 1))
    without_one = np.stack([everyone[0] & (i != IDS) for i in np.unique(IDS[MEMBERS])])
    arrived = np.concatenate([SURVIVORS, without_one, everyone])
    claimed = np.concatenate([SURVIVORS, everyone, without_one])
    sent, (aggregate, info) = jax.device_get(exchange(integers, arrived, claimed))
    assert (sent["a"] < 2**bits).all()
    rest = jax.tree.map(lambda x, y: (x.astype(np.uint64) - y) % 2**bits, aggregate, sums(arrived))
    num_sets = len(SURVIVORS)
    assert not any(x[:num_sets].any() for x in jax.tree.leaves(rest))
    missing = info["clients_missing"][:num_sets]
    np.testing.assert_array_equal(missing, 7 - SURVIVORS.sum(1))
    # A single mask that is left, or was not there, spoils all.
    assert ((rest["a"][num_sets:] != 0).mean((1, 2)) > 0.9).all()


def test_a_masked_update_alone_looks_like_random_bits():
    """By the chi-square of its bytes, of 255 degrees of freedom and a deviation of 22.6."""
    transform = fl.secure_aggregation(2, masks=True)
    zeros = jnp.zeros((IDS.size, 2**15), jnp.uint32)
    send = jax.jit(functools.partial(masked, transform, zeros))
    sent = np.asarray(send(key=KEY).update)
    later = np.asarray(send(key=jax.random.key(4)).update)
    alone = np.asarray(send(ids=np.where(IDS == 5, 5, -1)).update)  # With its own mask alone.

    def chi_square(words):
        counts = np.bincount(np.ascontiguousarray(words).view(np.uint8), minlength=256)
        return ((counts - counts.mean()) ** 2).sum() / counts.mean()

    looked_at = [
        *sent[[0, 1, 3]],
        alone[0],
        later[0] - sent[0],
        sent[0] - sent[1],
        sent[0] - alone[0],
    ]
    for words in looked_at:
        assert abs(chi_square(words) - 255) < 5 * 22.6
    assert chi_square(zeros[0]) > 1e6


@pytest.mark.parametrize("num_neighbours", [None, 2, 4])
def test_rounds_are_lost_where_too_few_shares_of_a_needed_key_arrive(num_neighbours):
    announce = jax.jit(fl.secure_aggregation(num_neighbours).announce)
    order = np.asarray(announce(KEY, (), cohort_of(IDS)).ids)[:6].tolist()
    assert sorted(order) == sorted(set(IDS[MEMBERS]))
    graph = secure.neighbours(order, num_neighbours or 6)

    def is_lost(threshold, there):
        transform = fl.secure_aggregation(num_neighbours, threshold=threshold)
        received = fl.Received((), weights=there.astype(float), cohort=cohort_of(IDS))
        received, _, info = transform.server(KEY, (), received)
        return info["sum_lost"], received.weights.sum()

    over_sets = jax.vmap(is_lost, (None, 0))
    thresholds = np.float32([0.4, 0.5, 0.75, 1.0])
    lost, weights = jax.jit(jax.vmap(over_sets, (0, None)))(thresholds, SURVIVORS)
    for i, threshold in enumerate(thresholds):
        expected = [secure.is_lost(graph, set(IDS[there]), threshold) for there in SURVIVORS]
        np.testing.assert_array_equal(lost[i], expected)
        np.testing.assert_array_equal(weights[i], np.where(expected, 0, SURVIVORS.sum(1)))
        assert 0 < sum(expected) < len(expected)


def test_rings_change_from_round_to_round():
    announce = functools.partial(fl.secure_aggregation(2).announce, state=(), cohort=cohort_of(IDS))
    announced = jax.jit(jax.vmap(announce))(jax.random.split(KEY, 20))
    assert len(np.unique(announced.ids[:, :6], axis=0)) > 10


FORM = {"max_value": 0.5, "max_weight": 8.0, "num_bits": 10}
DRAWN = np.random.default_rng(2).normal(0, 0.4, (6, 50))
WEIGHTS = np.array([1.0, 2.5, 8.0, 20.0, 4.0, 0.001])


def converted(transform, updates=DRAWN, weights=WEIGHTS, key=KEY):
    """What clients send, and what the server makes of their sum."""
    state = transform.init(jnp.zeros(updates.shape[1]))
    transform.announce(key, state, cohort_of(np.arange(len(updates))))
    send = lambda own, x, w: transform.client(own, state, fl.Message(x, w), None)
    sent = jax.vmap(send)(
        jax.random.split(key, len(updates)), jnp.asarray(updates), jnp.asarray(weights)
    )
    summands = jax.vmap(fl.modular_sum().summand)(sent.update, sent.weight)
    total = jax.tree.map(lambda x: x.sum(0, dtype=jnp.uint32), summands)
    received, _, _ = transform.server(key, state, fl.Received(total, sensitivity=jnp.ones(())))
    return sent, received


compiled = jax.jit(converted, static_argnums=0)


@pytest.mark.parametrize("denominator", [None, 15.0])
@pytest.mark.parametrize("modulus_bits", [14, 32])
def test_weighted_means_are_those_of_whole_numbers(denominator, modulus_bits):
    options = {"modulus_bits": modulus_bits, "denominator": denominator}
    transform = fl.fixed_point(**FORM, rounding="nearest", **options)
    sent, received = jax.device_get(compiled(transform))
    expected = secure.weighted_mean(DRAWN, WEIGHTS, **FORM, **options)
    np.testing.assert_allclose(received.aggregate, expected, rtol=1e-5, atol=1e-7)
    by_client = [secure.to_integers(x, w, **FORM) for x, w in zip(DRAWN, WEIGHTS, strict=True)]
    units, above, below = (np.array(x) for x in list(zip(*by_client, strict=True))[1:])
    np.testing.assert_allclose(sent.weight, units * 8 / 511, rtol=1e-6)
    assert sent.weight[-1] == 0  # Of so little there is not a unit.
    np.testing.assert_array_equal(sent.metrics["elements_above"], above)
    np.testing.assert_array_equal(sent.metrics["elements_below"], below)
    assert above.min() > 0
    assert below.min() > 0
    assert (sent.metrics["bits_up"] == modulus_bits * (50 + (denominator is None))).all()
    # Half a unit for each client, beside those of the weights.
    clipped = np.clip(DRAWN, -0.5, 0.5)
    rounded = units * 8 / 511
    exact = rounded @ clipped / (denominator or rounded.sum())
    bound = 6 / 2 * 0.5 / (units.sum() if denominator is None else 511 / 8 * denominator)
    error = np.abs(received.aggregate - exact).max()
    assert 0.1 * bound < error <= bound * (1 + 1e-4)


def test_stochastic_rounding_is_right_on_average():
    transform = fl.fixed_point(**FORM)
    many = jax.jit(jax.vmap(lambda key: converted(transform, key=key)[1].aggregate))
    means = np.asarray(many(jax.random.split(KEY, 2000)), np.float64)
    units = np.array(
        [secure.to_integers(x, w, **FORM)[1] for x, w in zip(DRAWN, WEIGHTS, strict=True)]
    )
    scaled = units[:, None] * np.clip(DRAWN, -0.5, 0.5) / 0.5
    share = scaled - np.floor(scaled)
    unit = 0.5 / units.sum()
    # The variance of a coin for each client.
    deviation = unit * np.sqrt((share * (1 - share)).sum(0))
    error = (means.mean(0) - unit * scaled.sum(0)) / (deviation / np.sqrt(2000))
    assert np.abs(error).max() < 4.5
    np.testing.assert_allclose(means.std(0), deviation, rtol=0.1)
    assert (np.abs(means - unit * scaled.sum(0)) < 6 * unit).all()


EXTREMES = {
    "zeros": ([0.0, -0.0], [0, 0]),
    "most": (None, [511, -511]),
    "least": ([1e-38, -1e-38], [0, 0]),
    "bounds": ([0.5, -0.5], [511, -511]),
    "NaN": ([np.nan, 1.0], [0, 511]),
    "empty": ([], []),
    "scalar": (0.25, 256),
}


@jax.jit
def sent_as_integers(update):
    transform = fl.fixed_point(0.5, 1.0, num_bits=10, rounding="nearest")
    message = fl.Message(update, jnp.float32(1))
    return transform.client(KEY, transform.init(update), message, None).update[0]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_have_a_documented_outcome(name, dtype):
    update, expected = EXTREMES[name]
    if name == "most":
        update = [jnp.finfo(dtype).max, jnp.finfo(dtype).min]
    sent = np.asarray(sent_as_integers(np.asarray(update, dtype)))
    np.testing.assert_array_equal(sent.astype(np.int32), np.array(expected, np.int32))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("size", [1, 40])
def test_the_sensitivity_takes_account_of_rounding(rounding, size):
    """Of integers no longer than it says, and hardly shorter where all digits are cut off."""
    transform = fl.fixed_point(**FORM, rounding=rounding, denominator=4.0)
    state = transform.init(jnp.zeros(size))
    known = transform.guarantees(fl.Guarantees(sensitivity=0.1), state)
    # To the nearest, by half a unit up; at random, by almost a whole one.
    cut_off = {"nearest": 0.501, "stochastic": 0.02}[rounding]
    whole = np.floor(0.1 * 511 / 0.5 / np.sqrt(size)) - 1
    update = np.full((1, size), (whole + cut_off) * 0.5 / 511)
    keys = jax.random.split(KEY, 300 if rounding == "stochastic" and size == 1 else 3)
    convert = lambda key: converted(transform, update, np.array([8.0]), key)
    sent, received = jax.jit(jax.vmap(convert))(keys)
    lengths = np.linalg.norm(np.asarray(sent.update[:, 0], np.float64), axis=-1)
    assert max(lengths) <= known.sensitivity
    before = np.linalg.norm(update) * 511 / 0.5
    most = before + np.sqrt(size) * (0.5 if rounding == "nearest" else 1)
    if rounding == "nearest" or size == 1:
        np.testing.assert_allclose(max(lengths), most, rtol=0.01)
    np.testing.assert_allclose(known.sensitivity, 0.1 * 511 / 0.5 + most - before, rtol=1e-5)
    # On the server, in units of the mean.
    np.testing.assert_allclose(received.sensitivity, 0.5 / 511 * 8 / 4, rtol=1e-6)
    unbounded = transform.guarantees(fl.Guarantees(), state)
    np.testing.assert_allclose(unbounded.sensitivity, np.sqrt(size) * 511, rtol=1e-6)


devices = pytest.mark.parametrize(
    "num_devices",
    [1, pytest.param(8, marks=pytest.mark.skipif(jax.device_count() < 8, reason="devices"))],
)
START = {"w": np.array([0.5, -1.0, 2.0]), "b": np.array(0.25)}


def algorithm_with(num_devices=1, lanes=1, num_bits=20, modulus_bits=32, **options):
    return fl.fed_avg(
        regression_model(),
        optax.sgd(0.1),
        optax.sgd(1.0, momentum=0.9),
        batch_size=4,
        mesh=fl.clients_mesh(num_devices),
        lanes=lanes,
        pipeline=fl.chain(
            fl.fixed_point(2.0, 12.0, num_bits=num_bits, modulus_bits=modulus_bits),
            fl.secure_aggregation(modulus_bits=modulus_bits, **options),
        ),
        reducer=fl.modular_sum(),
    )


def cohort_with_one_broken(ids=None, num_devices=1):
    """A client is not finite, and one is empty."""
    owners = np.repeat(np.arange(10), SIZES)
    broken = regression_dataset().map(
        lambda features: {**features, "y": np.where(owners == 6, np.nan, features["y"])}
    )
    return everyone(broken.resident(fl.clients_mesh(num_devices)), ids, capacity=12)


@functools.cache
def rounds_of(num_devices, lanes, masks):
    """Compiled once for all numbers."""

    @jax.jit
    def round(state, cohort, dropout_rate, threshold):
        numbers = {"dropout_rate": dropout_rate, "threshold": threshold}
        algorithm = algorithm_with(num_devices, lanes, masks=masks, num_neighbours=4, **numbers)
        return algorithm.round(KEY, state, cohort)

    state = algorithm_with(num_devices).init(START)
    return lambda *args: jax.device_get(round(state, *args))


DROPPING = 0.3, 0.1


@functools.cache
def without_masks():
    return rounds_of(1, 1, masks=False)(cohort_with_one_broken(), *DROPPING)


@devices
def test_rounds_with_masks_are_those_without_to_the_bit(num_devices):
    """Also where clients drop out, one is empty, one is not finite, and slots are; whatever the
    lanes and devices."""
    cohort = cohort_with_one_broken(num_devices=num_devices)
    state, info = rounds_of(num_devices, 3, masks=True)(cohort, *DROPPING)
    expected, told = without_masks()
    jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)
    np.testing.assert_array_equal(info.clients["weight"], told.clients["weight"])


def test_who_drops_out_might_as_well_not_be_there():
    state, info = without_masks()
    dropped, there = info.clients["dropped_out"] > 0, info.clients["weight"] > 0
    assert 0 < dropped.sum() < 8
    assert not there[dropped].any()
    assert not there[[1, 6, 10, 11]].any()
    assert info.metrics["clients_missing"] == 10 - there.sum()
    assert (info.metrics["sum_lost"], info.skipped) == (0, False)
    # The mean over the others, had they been alone.
    options = {"batch_size": 4, "mesh": fl.clients_mesh(1)}
    plain = fl.fed_avg(regression_model(), optax.sgd(0.1), **options)
    cohort = cohort_with_one_broken(np.flatnonzero(there))
    alone, _ = plain.round(KEY, plain.init(START), cohort)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), state.params, alone.params
    )


def test_a_lost_round_is_told_and_changes_nothing():
    state = jax.device_get(algorithm_with().init(START))
    cohort = everyone(regression_dataset().resident(fl.clients_mesh(1)), capacity=12)
    after, info = rounds_of(1, 3, masks=True)(cohort, 0.5, 0.9)
    assert 0 < (info.clients["weight"] > 0).sum() < 9
    assert (info.metrics["sum_lost"], info.skipped, info.update_norm) == (1, True, 0)
    jax.tree.map(
        np.testing.assert_array_equal,
        (after.params, after.opt_state),
        (state.params, state.opt_state),
    )
    assert after.round == 1


def test_clients_drop_out_at_the_rate_that_is_given():
    transform = fl.secure_aggregation(dropout_rate=0.2)
    ids = np.arange(4000)
    sent = jax.jit(functools.partial(masked, transform, ids=ids))(jnp.zeros((4000, 1), jnp.uint32))
    dropped = np.asarray(sent.metrics["dropped_out"])
    np.testing.assert_array_equal(sent.weight, 1 - dropped)
    assert abs(dropped.mean() - 0.2) < 4 * np.sqrt(0.16 / 4000)


def test_a_modulus_that_is_too_small_is_refused_before_anything_is_compiled():
    cohort = everyone(regression_dataset().resident(fl.clients_mesh(1)), capacity=16)
    # The sum of 16 numbers of 9 bits, of at most 255, needs 8161 = 16 x 510 + 1 values.
    for modulus_bits, fits in ((12, False), (13, True)):
        algorithm = algorithm_with(num_bits=9, modulus_bits=modulus_bits)
        state = algorithm.init(START)
        if fits:
            jax.eval_shape(algorithm.round, KEY, state, cohort)
            continue
        with pytest.raises(ValueError, match=r"of 8 clients add up, and the cohort has 16 slots"):
            jax.eval_shape(algorithm.round, KEY, state, cohort)


FIXED = fl.fixed_point(1.0, 1.0)
NOISE = fl.UpdateTransform(
    lambda params: (),
    lambda key, state, message, client: message,
    lambda key, state, received: (received, state, {}),
    guarantees=lambda before, state: before._replace(is_private=True),
)


def averaging(pipeline, reducer=None):
    options = {"pipeline": pipeline, "reducer": reducer, "mesh": fl.clients_mesh(1)}
    return fl.fed_avg(regression_model(), optax.sgd(0.1), **options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: fl.fixed_point(0.0, 1.0), "max_value is 0.0; choose a number above 0"),
        (lambda: fl.fixed_point(1.0, -1.0), "max_weight is -1.0; choose a number above 0"),
        (
            lambda: fl.fixed_point(1.0, 1.0, num_bits=25),
            "num_bits is 25; choose an integer between",
        ),
        (
            lambda: fl.fixed_point(1.0, 1.0, modulus_bits=33),
            "modulus_bits is 33; choose an integer",
        ),
        (lambda: fl.fixed_point(1.0, 1.0, rounding="up"), "rounding is 'up'; choose one of"),
        (
            lambda: fl.fixed_point(1.0, 1.0, denominator=0),
            "denominator is 0; choose a number above",
        ),
        (lambda: fl.secure_aggregation(3), "num_neighbours is 3; choose an even number"),
        (lambda: fl.secure_aggregation(threshold=2.0), "threshold is 2.0; choose a number between"),
        (lambda: fl.secure_aggregation(dropout_rate=-0.1), "dropout_rate is -0.1; choose a number"),
        (lambda: fl.secure_aggregation(masks=None), "masks is None; choose one of"),
        (lambda: fl.chain(fl.secure_aggregation()), "secure_aggregation hides integers"),
        (
            lambda: fl.chain(FIXED, fl.secure_aggregation(modulus_bits=20)),
            "modulus_bits is 20 in secure_aggregation, and 32 in fixed_point",
        ),
        (lambda: fl.chain(FIXED, fl.clip_by_norm(1.0)), "clip_by_norm comes after fixed_point"),
        (
            lambda: fl.chain(FIXED, fl.secure_aggregation(), fl.quantize_uniform()),
            "quantize_uniform comes after a mask",
        ),
        (lambda: fl.chain(NOISE, FIXED), "denominator is None, and noise for privacy comes before"),
        (
            lambda: fl.discrete_gaussian_noise(1.0, 1.0, 5, fl.quantize_uniform()),
            "transform makes no integers",
        ),
        (lambda: fl.discrete_gaussian_noise(1.0, 1.0, 5, FIXED), "transform has no denominator"),
        (lambda: fl.discrete_gaussian_noise(0.0, 1.0, 5, FIXED), "max_norm is 0.0; choose"),
        (lambda: fl.discrete_gaussian_noise(1.0, -1.0, 5, FIXED), "noise_multiplier is -1.0;"),
        (lambda: fl.discrete_gaussian_noise(1.0, 1.0, 0, FIXED), "num_clients is 0; choose"),
        (
            lambda: fl.common_rotation(fl.error_feedback(fl.quantize_uniform())),
            "transform keeps something with each client",
        ),
        (
            lambda: averaging(FIXED, fl.coordinate_median()),
            "reducer looks at single updates, and pipeline makes integers of them",
        ),
        (
            lambda: averaging(fl.chain(FIXED, fl.secure_aggregation()), fl.coordinate_median()),
            "reducer looks at single updates, and pipeline hides them in masks",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_integers_are_added_up_by_a_sum_of_integers():
    algorithm = averaging(FIXED)
    cohort = everyone(regression_dataset().resident(fl.clients_mesh(1)))
    with pytest.raises(ValueError, match=r"is of dtype float32, .* such as fl.modular_sum\(\)"):
        jax.eval_shape(algorithm.round, KEY, algorithm.init(START), cohort)


def test_noise_on_the_server_is_scaled_by_a_bound_that_includes_rounding():
    def server(key, state, received):
        return received, state, {"bound": jnp.asarray(received.sensitivity)}

    fixed = fl.fixed_point(0.5, 2.0, num_bits=6, rounding="nearest", denominator=5.0)
    algorithm = averaging(
        fl.chain(fl.clip_by_norm(0.4), NOISE._replace(server=server), fixed), fl.modular_sum()
    )
    cohort = everyone(regression_dataset().resident(fl.clients_mesh(1)))
    _, info = algorithm.round(KEY, algorithm.init(START), cohort)
    # Of 4 elements, half a unit of 0.5 / 31 each, times the largest weight.
    expected = (0.4 + 4**0.5 / 2 * 0.5 / 31) * 2 / 5
    np.testing.assert_allclose(info.metrics["bound"], expected, rtol=1e-6)
    assert not info.skipped


drawn_normal = jax.jit(discrete_gaussian, static_argnums=1)


@pytest.mark.parametrize("std", [0.4, 1.0, 3.7, 40.0])
def test_discrete_normal_numbers_have_their_probabilities(std):
    number = 200_000
    drawn = np.asarray(drawn_normal(KEY, (number,), std))
    values = np.arange(-int(9 * std) - 3, int(9 * std) + 4)
    expected = np.exp(-(values**2) / (2 * std**2))
    expected *= number / expected.sum()
    counts = np.array([(drawn == value).sum() for value in values])
    assert counts.sum() == number
    often = expected > 20
    chi_square = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert abs(chi_square - often.sum()) < 5 * np.sqrt(2 * often.sum())
    assert counts[~often].sum() < expected[~often].sum() + 5 * np.sqrt(expected[~often].sum() + 1)
    # Of another deviation it would be seen.
    wider = np.exp(-(values**2) / (2 * (1.03 * std) ** 2))
    wider *= number / wider.sum()
    assert ((counts - wider)[often] ** 2 / wider[often]).sum() > 2 * often.sum()


@pytest.mark.parametrize("std", [0.0, np.nan, np.inf])
def test_without_a_deviation_there_is_no_noise(std):
    assert not np.any(drawn_normal(KEY, (5,), std))


def test_the_noise_of_a_sum_has_the_deviation_that_is_told():
    """Of four clients, of whom three arrive, with updates of zero."""
    fixed = fl.fixed_point(1.0, 2.0, num_bits=12, rounding="nearest", denominator=5.0)
    noise = fl.discrete_gaussian_noise(0.5, 0.7, 4, fixed)
    hidden = fl.chain(noise, fl.secure_aggregation(2, masks=True, threshold=0.1))
    params = {"a": jnp.zeros((20, 10)), "b": jnp.float32(0)}
    state, cohort = hidden.init(params), cohort_of(np.arange(4))
    arrived = jnp.array([1.0, 1.0, 0.0, 1.0])

    @jax.jit
    @jax.vmap
    def exchange(key):
        shown = hidden.announce(key, state, cohort)

        def send(own_key, client_id):
            client = fl.Client(client_id, jnp.int32(1), jnp.int32(1), (), own_key)
            return hidden.client(own_key, shown, fl.Message(params, jnp.float32(2)), client)

        sent = jax.vmap(send)(jax.random.split(key, 4), jnp.arange(4))
        total = jax.tree.map(
            lambda x: jnp.einsum("c,c...->...", arrived.astype(jnp.uint32), x), sent.update
        )
        bound = fl.modular_sum().sensitivity(hidden.guarantees(fl.Guarantees(), state))
        received = fl.Received(total, ((((), ()), ()), ()), bound, arrived, cohort)
        received, _, info = hidden.server(key, state, received)
        return received.aggregate, info

    aggregate, info = exchange(jax.random.split(KEY, 300))
    # 0.5 and the rounding of 201 numbers, half a unit of 1 / 2047 each; times 2 / 5.
    sensitivity = (0.5 + np.sqrt(201) / 2 / 2047) * 2 / 5
    expected = 0.7 * np.sqrt(3 / 4) * sensitivity
    np.testing.assert_allclose(info["noise_std"], expected, rtol=1e-5)
    np.testing.assert_allclose(info["noise_multiplier"], 0.7 * np.sqrt(3 / 4), rtol=1e-6)
    room = (2**31 - 3 * sensitivity * 2047 * 5 / 2) / (expected * 2047 * 5 / 2)
    np.testing.assert_allclose(info["modulus_margin"], room, rtol=1e-5)
    samples = np.asarray(aggregate["a"], np.float64).reshape(300, -1)
    np.testing.assert_allclose(samples.std(), expected, rtol=4 / np.sqrt(2 * samples.size))
    assert abs(samples.mean()) < 4 * expected / np.sqrt(samples.size)
    # Anew in each round, and for each entry.
    correlation = np.corrcoef(samples)
    assert np.abs(correlation - np.eye(300)).max() < 6 / np.sqrt(200)


def test_a_lost_round_is_skipped_though_who_takes_part_is_private():
    fixed = fl.fixed_point(1.0, 1.0, denominator=5.0)
    noise = fl.discrete_gaussian_noise(1.0, 1.0, 5, fixed)
    cohort = everyone(regression_dataset().resident(fl.clients_mesh(1)))

    @jax.jit
    def round(dropout_rate):
        hidden = fl.chain(noise, fl.secure_aggregation(dropout_rate=dropout_rate, threshold=0.9))
        algorithm = averaging(hidden, fl.modular_sum())
        return algorithm.round(KEY, algorithm.init(START), cohort)[1]

    for dropout_rate, is_lost in ((0.0, False), (0.5, True), (1.0, False)):
        info = jax.device_get(round(dropout_rate))
        assert (info.skipped, info.metrics["sum_lost"]) == (is_lost, is_lost)
        arrived = (info.clients["weight"] > 0).sum()
        assert (arrived == 9 * (1 - dropout_rate)) if dropout_rate != 0.5 else 0 < arrived < 8


def test_a_rotation_is_common_to_all_and_taken_back_from_their_sum():
    """The 5 entries become 8, and one that is large is spread over all of them."""
    params = {"a": np.zeros((2, 2), np.float32), "b": np.zeros((), np.float32)}
    seen = fl.UpdateTransform(
        lambda params: jnp.asarray(sum(jnp.size(x) for x in jax.tree.leaves(params)), float),
        lambda key, state, message, client: message,
        lambda key, state, received: (received, state, {}),
        guarantees=lambda before, state: before._replace(sensitivity=state),
    )
    rotation = fl.common_rotation(seen)
    state, cohort = rotation.init(params), cohort_of(np.arange(3))
    assert rotation.guarantees(fl.Guarantees(), state).sensitivity == 8
    rng = np.random.default_rng(4)
    updates = jax.tree.map(lambda x: rng.normal(size=(3, *x.shape)).astype(np.float32), params)
    updates["a"][0], updates["b"][0] = [[0.0, 8.0], [0.0, 0.0]], 0.0

    @jax.jit
    @jax.vmap
    def send(own_key, update):
        shown = rotation.announce(KEY, state, cohort)
        return rotation.client(own_key, shown, fl.Message(update, 1.0), None).update

    sent = jax.device_get(send(jax.random.split(KEY, 3), updates))
    alone, rest = jax.tree.map(lambda x: x[0], sent)
    flat = np.concatenate([alone["a"].ravel(), [alone["b"]], rest])
    np.testing.assert_allclose(np.abs(flat), np.full(8, 8 / np.sqrt(8)), rtol=1e-6)
    total = jax.tree.map(lambda x: x.sum(0), sent)
    back = jax.jit(lambda total: rotation.server(KEY, state, fl.Received(total))[0].aggregate)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y.sum(0), rtol=1e-5, atol=1e-5),
        back(total),
        updates,
    )
