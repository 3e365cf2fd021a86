"""Reducers, and transforms with everything that the contract allows, against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import SIZES, everyone, regression_dataset, regression_model

import fedjax_lite as fl

KEY = jax.random.key(1)


def needs(num_devices):
    return pytest.mark.skipif(jax.device_count() < num_devices, reason="devices")


devices = pytest.mark.parametrize("num_devices", [1, pytest.param(8, marks=needs(8))])


@functools.cache
def averaging(num_devices=1, lanes=None, reducer=None):
    """Built once, and compiled once for as many slots."""
    return fl.fed_avg(
        regression_model(),
        optax.sgd(0.1),
        batch_size=4,
        reducer=reducer,
        mesh=fl.clients_mesh(num_devices),
        lanes=lanes,
    )


def deltas(dataset, params):
    """What each client of a data set sends, trained alone from some params; flat, in float64."""
    mesh = fl.clients_mesh(1)
    algorithm = averaging()
    state = algorithm.init(jax.device_get(params))
    population = dataset.resident(mesh)
    found = []
    for i in range(dataset.num_clients):
        alone, _ = algorithm.round(KEY, state, everyone(population, [i]))
        found.append(flat(state.params) - flat(alone.params))
    return np.array(found)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def flat(params):
    return np.append(np.asarray(params["w"], np.float64), float(params["b"]))


def start():
    return {"w": np.array([0.5, -1.0, 2.0]), "b": np.array(0.25)}


MEDIAN = fl.coordinate_median()


@pytest.mark.parametrize(
    ("num_devices", "lanes"),
    [
        *((1, lanes) for lanes in (1, 3, 64)),
        pytest.param(2, 1, marks=needs(2)),
        pytest.param(8, 3, marks=needs(8)),
    ],
    scope="module",
)
@pytest.mark.parametrize("present", [range(10), [0, 3, 4, 6], [7], [2, 1]])
def test_medians_are_those_of_numpy(num_devices, lanes, present):
    """Of ragged clients, one without examples, beside empty slots and one that is left out."""
    dataset = regression_dataset()
    broken = dataset.map(
        lambda features: {
            **features,
            # Client 4 is not finite.
            "y": np.where(np.repeat(np.arange(10), SIZES) == 4, np.nan, features["y"]),
        }
    )
    mesh = fl.clients_mesh(num_devices)
    algorithm = averaging(num_devices, lanes, reducer=MEDIAN)
    state = algorithm.init(start())
    ids = [*present, *[-1] * (12 - len(present))]
    after, info = algorithm.round(KEY, state, fl.cohort_of(broken.resident(mesh), ids))
    sent = deltas(dataset, state.params)
    count = [i for i in present if i != 4 and SIZES[i] > 0]
    expected = flat(state.params) - np.median(sent[count], axis=0)
    np.testing.assert_allclose(flat(after.params), expected, rtol=1e-9)
    assert info.num_nonfinite == (4 in present)


def test_a_median_does_not_heed_one_attacker():
    def client(key, state, message, client):
        scale = jnp.where(client.id == 3, -1e6, 1.0)
        return message._replace(update=optax.tree.scale(scale, message.update))

    attack = fl.UpdateTransform(
        lambda params: (), client, lambda key, state, received: (received, state, {})
    )
    moved = {}
    for name, reducer in (("mean", None), ("median", fl.coordinate_median())):
        algorithm = fl.fed_avg(
            regression_model(), optax.sgd(0.1), batch_size=4, pipeline=attack, reducer=reducer
        )
        state = algorithm.init(start())
        after, _ = algorithm.round(KEY, state, everyone(regression_dataset().resident()))
        moved[name] = np.linalg.norm(flat(after.params) - flat(state.params))
    assert moved["mean"] > 1e3
    assert moved["median"] < 3


def test_stacked_reducers_see_whole_updates_by_what_they_add_up():
    """The update nearest to the others, by distances that each device has a part of."""

    def medoid(stack):
        counts = stack.weights > 0
        gram = sum(x @ x.T for x in stack.updates)
        squared = jnp.diag(gram)[:, None] + jnp.diag(gram) - 2 * gram
        distances = jnp.where(counts, stack.total(squared), 0).sum(1)
        best = jnp.argmin(jnp.where(counts, distances, jnp.inf))
        return [x[best] for x in stack.updates], {"best": stack.client_ids[best]}

    sent = deltas(regression_dataset(), start())
    present = [i for i in range(10) if SIZES[i] > 0]
    between = ((sent[:, None] - sent[None]) ** 2).sum(-1)[np.ix_(present, present)]
    expected = flat(start()) - sent[present][between.sum(1).argmin()]
    for num_devices in {1, min(8, jax.device_count())}:
        mesh = fl.clients_mesh(num_devices)
        algorithm = fl.fed_avg(
            *(regression_model(), optax.sgd(0.1)),
            batch_size=4,
            reducer=fl.Reducer(stacked=medoid),
            mesh=mesh,
        )
        state = algorithm.init(start())
        after, _ = algorithm.round(KEY, state, everyone(regression_dataset().resident(mesh)))
        np.testing.assert_allclose(flat(after.params), expected, rtol=1e-9)


@devices
def test_a_modular_sum_wraps_around(num_devices):
    """Masks that cancel leave nothing, however large they are."""

    def client(key, state, message, client):
        # Of clients 2 i and 2 i + 1, the one adds what the other takes away.
        pair = jax.random.fold_in(jax.random.key(5), client.id // 2)
        sign = 1 - 2 * (client.id % 2)
        mask = lambda x: sign * jax.random.bits(pair, x.shape, jnp.uint32).astype(jnp.int32)
        return message._replace(update=jax.tree.map(lambda x: x + mask(x), message.update))

    masks = fl.UpdateTransform(
        lambda params: (),
        client,
        lambda key, state, received: (received, state, {}),
        guarantees=lambda before, state: before._replace(is_masked=True),
    )
    mesh = fl.clients_mesh(num_devices)
    dataset = regression_dataset()
    clients = [i for i in range(10) if SIZES[i] > 0][:8]
    dataset = dataset.select([dataset.client_ids[i] for i in clients])
    algorithm = fl.fed_avg(
        regression_model(),
        optax.sgd(0.1),
        batch_size=4,
        pipeline=fl.chain(fl.fixed_point(8.0, 1.0, rounding="nearest", denominator=1.0), masks),
        reducer=fl.modular_sum(),
        mesh=mesh,
    )
    state = algorithm.init(start())
    after, info = algorithm.round(KEY, state, fl.cohort_of(dataset.resident(mesh), range(8)))
    expected = flat(state.params) - deltas(dataset, state.params).sum(0)
    np.testing.assert_allclose(flat(after.params), expected, atol=8 / 2 * 8 / (2**19 - 1) + 1e-9)
    assert info.clients["bits_up"].tolist() == [32.0 * 4] * 8


def test_floats_are_no_summands_of_a_modular_sum():
    algorithm = fl.fed_avg(regression_model(), optax.sgd(0.1), reducer=fl.modular_sum())
    cohort = everyone(regression_dataset().resident())
    with pytest.raises(ValueError, match=r"dtype float64, and modular_sum .* put fl.fixed_point"):
        algorithm.round(KEY, algorithm.init(start()), cohort)


def test_what_is_lost_comes_later():
    """Error feedback around two levels, over rounds, with a plain loop beside it."""
    dataset = regression_dataset()
    quantize = fl.quantize_uniform(2)
    mesh = fl.clients_mesh(1)
    algorithm = fl.fed_avg(
        regression_model(),
        optax.sgd(0.1),
        batch_size=4,
        weighting="uniform",
        pipeline=fl.error_feedback(quantize),
        mesh=mesh,
    )
    state = algorithm.init(start(), num_clients=10)
    population = dataset.resident(mesh)
    errors = np.zeros((10, 4))
    for r, present in enumerate([[0, 2, 4], [2, 4, 5, 1], [0, 2]]):
        sent = deltas(dataset, state.params)
        before = flat(state.params)
        cohort = everyone(population, present, capacity=4)
        state, _ = algorithm.round(KEY, state, cohort)
        stored = state.pipeline_store[0]
        stored = np.column_stack([stored["w"], stored["b"]]).astype(np.float64)
        total, number = np.zeros(4), 0
        for i in present:
            if SIZES[i] == 0:
                continue
            corrected = sent[i] + errors[i]
            rounded = corrected - stored[i]
            # Each array is rounded to its extremes.
            w = rounded[:3]
            assert all(
                min(abs(x - corrected[:3].min()), abs(x - corrected[:3].max())) < 1e-5 for x in w
            )
            total, number = total + rounded, number + 1
            errors[i] = stored[i]
        np.testing.assert_allclose(flat(state.params), before - total / number, rtol=1e-9)
        np.testing.assert_allclose(stored, errors, rtol=1e-9, atol=1e-12)
        assert r == 0 or np.abs(errors).max() > 0


def test_clients_start_from_what_they_receive():
    """A downlink that halves the params: deltas are from there, the server goes on from its own."""

    def client(key, state, message, client):
        halved = optax.tree.scale(0.5, message.update)
        return message._replace(update=halved, metrics={"bits_up": jnp.float32(7)})

    halve = fl.UpdateTransform(
        lambda params: (), client, lambda key, state, received: (received, state, {})
    )
    dataset = regression_dataset()
    algorithm = fl.fed_avg(
        *(regression_model(), optax.sgd(0.1)), batch_size=4, pipeline=fl.downlink(halve)
    )
    state = algorithm.init(start())
    after, info = algorithm.round(KEY, state, fl.cohort_of(dataset.resident(), [0, 2]))
    halved = algorithm.init(optax.tree.scale(0.5, start()))
    sent = deltas(dataset, halved.params)[[0, 2]]
    expected = flat(state.params) - np.average(sent, axis=0, weights=np.array(SIZES)[[0, 2]])
    np.testing.assert_allclose(flat(after.params), expected, rtol=1e-9)
    assert info.clients["bits_down"].tolist() == [7.0, 7.0]
    with pytest.raises(ValueError, match="transform keeps something with each client"):
        fl.downlink(fl.error_feedback(halve))


def test_a_transform_changes_weights_and_counts_whom_it_changed():
    """Weights of at most 5, as for privacy, beside a denominator of its own."""

    def client(key, state, message, client):
        capped = jnp.minimum(message.weight, 5.0)
        return message._replace(weight=capped, statistics=(message.weight > 5).astype(float))

    cap = fl.UpdateTransform(
        lambda params: (),
        client,
        lambda key, state, received: (received, state, {"capped": received.statistics}),
    )
    dataset = regression_dataset()
    sizes = np.array(SIZES)
    for denominator in (None, 40.0):
        algorithm = fl.fed_avg(
            regression_model(),
            optax.sgd(0.1),
            batch_size=4,
            pipeline=fl.chain(cap, fl.clip_by_norm(100.0)),
            reducer=fl.weighted_mean(denominator),
        )
        state = algorithm.init(start())
        after, info = algorithm.round(KEY, state, everyone(dataset.resident()))
        weights = np.minimum(sizes, 5)
        total = (weights[:, None] * np.nan_to_num(deltas(dataset, state.params))).sum(0)
        expected = flat(state.params) - total / (denominator or weights.sum())
        np.testing.assert_allclose(flat(after.params), expected, rtol=1e-9)
        assert info.metrics["capped"] == (sizes > 5).sum()
        np.testing.assert_array_equal(info.clients["weight"], weights)


@pytest.mark.parametrize("is_private", [False, True])
def test_a_round_without_clients_is_a_step_if_who_takes_part_is_private(is_private):
    noise = fl.UpdateTransform(
        lambda params: jnp.int32(0),
        lambda key, state, message, client: message,
        lambda key, state, received: (
            received._replace(
                aggregate=jax.tree.map(
                    lambda x: x + jax.random.normal(key, x.shape), received.aggregate
                )
            ),
            state + 1,
            {"bound": jnp.asarray(received.sensitivity)},
        ),
        guarantees=lambda before, state: before._replace(is_private=is_private),
    )
    algorithm = fl.fed_avg(
        regression_model(),
        optax.sgd(0.1),
        pipeline=fl.chain(fl.cap_weight(2.0), fl.clip_by_norm(3.0), noise),
        reducer=fl.weighted_mean(4.0),
    )
    state = algorithm.init(start())
    nobody = fl.cohort_of(regression_dataset().resident(), [1, -1])
    after, info = algorithm.round(KEY, state, nobody)
    moved = np.abs(flat(after.params) - flat(state.params))
    assert (moved > 1e-3).all() if is_private else (moved == 0).all()
    assert bool(info.skipped) == (not is_private)
    assert after.pipeline_state[2] == int(is_private)
    assert info.metrics["bound"] == 3.0 * 2.0 / 4.0


def test_constant_factors_of_weights_cancel_but_for_a_denominator_of_ones_own():
    cohort = everyone(regression_dataset().resident())

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.vmap, in_axes=(0, None))
    def moved(factor, reducer):
        algorithm = fl.fed_avg(
            regression_model(),
            optax.sgd(0.1),
            batch_size=4,
            weighting=lambda n: factor * n,
            reducer=reducer,
        )
        after, _ = algorithm.round(KEY, algorithm.init(start()), cohort)
        return after.params["w"] - start()["w"]

    factors = np.array([0.1, 1.0])
    small, large = moved(factors, None)
    np.testing.assert_allclose(small, large, rtol=1e-9)
    small, large = moved(factors, fl.weighted_mean(10.0))
    np.testing.assert_allclose(small, 0.1 * large, rtol=1e-9)


def masked(before, state):
    return before._replace(is_masked=True)


MASK = fl.UpdateTransform(
    lambda params: (),
    lambda key, state, message, client: message,
    lambda key, state, received: (received, state, {}),
    guarantees=masked,
)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: fl.chain(MASK, fl.quantize_uniform(4)), "quantize_uniform comes after a mask"),
        (lambda: fl.chain(MASK, fl.clip_by_norm(1.0)), "clip_by_norm comes after a mask"),
        (
            lambda: fl.chain(fl.chain(MASK), fl.fixed_point(2.0, 1.0)),
            "fixed_point comes after a mask",
        ),
        (
            lambda: fl.fed_avg(
                *(regression_model(), optax.sgd(0.1)),
                pipeline=MASK,
                reducer=fl.coordinate_median(),
            ),
            "reducer looks at single updates, and pipeline hides them in masks",
        ),
        (lambda: fl.weighted_mean(0.0), "denominator is 0.0; choose a number above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_what_is_known_of_updates_goes_along_a_chain():
    known = fl.chain(fl.quantize_uniform(4), fl.clip_by_norm(2.0)).guarantees(fl.Guarantees(), None)
    assert known.sensitivity == 2.0
    for lossy in (fl.quantize_uniform(4), fl.error_feedback(fl.clip_by_norm(1.0)), MASK):
        after = fl.chain(fl.clip_by_norm(2.0), lossy).guarantees(fl.Guarantees(), None)
        assert after.sensitivity is None or lossy is MASK or after.sensitivity == 1.0


NOISE = fl.UpdateTransform(
    lambda params: (),
    lambda key, state, message, client: message,
    lambda key, state, received: (received, state, {}),
    guarantees=lambda before, state: before._replace(is_private=True),
)
BOUNDED = (fl.cap_weight(1.0), fl.clip_by_norm(1.0))
FIXED = fl.weighted_mean(10.0)


@pytest.mark.parametrize(
    ("transforms", "options", "message"),
    [
        ([NOISE], {}, "a client's update may be of any norm; end .* with fl.clip_by_norm"),
        ([*BOUNDED, fl.quantize_uniform(4), NOISE], {}, "a client's update may be of any norm"),
        ([fl.clip_by_norm(1.0), NOISE], {}, "may have any weight; add fl.cap_weight"),
        ([*BOUNDED, NOISE], {"reducer": None}, "divides by the weights of those who take part"),
        ([*BOUNDED, NOISE], {"reducer": fl.coordinate_median()}, "reducer has no bound of its own"),
        ([*BOUNDED, NOISE], {"on_nonfinite": "keep"}, 'leave on_nonfinite at "drop"'),
    ],
)
def test_noise_for_privacy_asks_for_bounds(transforms, options, message):
    options = {"reducer": FIXED, "pipeline": fl.chain(*transforms), **options}
    with pytest.raises(ValueError, match=f"pipeline adds noise for privacy, and .*{message}"):
        fl.fed_avg(regression_model(), optax.sgd(0.1), **options)


def test_nothing_is_sent_in_the_clear_beside_what_is_private():
    pipeline = fl.chain(*BOUNDED, NOISE)
    algorithm = fl.scaffold(regression_model(), optax.sgd(0.1), pipeline=pipeline, reducer=FIXED)
    state = algorithm.init(start(), num_clients=10)
    with pytest.raises(ValueError, match="clients send model state or statistics beside them"):
        algorithm.round(KEY, state, everyone(regression_dataset().resident()))


@devices
def test_clients_share_what_is_announced_and_the_server_knows_who_arrived(num_devices):
    """A random sign that all clients of a round have in common, taken back by the server."""

    def announce(key, state, cohort):
        return {"sign": jax.random.rademacher(key, ()), "ids": cohort.client_ids}

    def client(key, state, message, client):
        slot = jnp.argmax(state["ids"] == client.id)
        flipped = optax.tree.scale(state["sign"], message.update)
        return message._replace(update=flipped, metrics={"slot": slot.astype(float)})

    def server(key, state, received):
        sign = announce(key, state, received.cohort)["sign"]
        restored = optax.tree.scale(sign, received.aggregate)
        report = {"sign": sign, "arrived": (received.weights > 0).sum()}
        return received._replace(aggregate=restored), state, report

    signs = fl.UpdateTransform(
        lambda params: {"sign": jnp.int32(0), "ids": ()}, client, server, announce=announce
    )
    mesh = fl.clients_mesh(num_devices)
    dataset = regression_dataset()
    algorithm = fl.fed_avg(
        *(regression_model(), optax.sgd(0.1)),
        batch_size=4,
        pipeline=fl.chain(signs, fl.clip_by_norm(100.0)),
        mesh=mesh,
    )
    state = algorithm.init(start())
    cohort = fl.cohort_of(dataset.resident(mesh), [3, 1, 7, 2])
    alone = fl.cohort_of(dataset.resident(fl.clients_mesh(1)), [3, 1, 7, 2])
    found = set()
    for key in jax.random.split(KEY, 6):
        after, info = algorithm.round(key, state, cohort)
        plain, _ = averaging().round(key, averaging().init(start()), alone)
        np.testing.assert_allclose(flat(after.params), flat(plain.params), rtol=1e-9)
        np.testing.assert_array_equal(info.clients["slot"], [0, 0, 2, 3])  # One has no examples.
        assert info.metrics["arrived"] == 3
        found.add(int(info.metrics["sign"]))
    assert found == {-1, 1}


@devices
def test_a_stacked_reducer_may_begin_from_the_last_aggregate(num_devices):
    """Momentum of the mean, and a report."""

    def momentum(stack):
        counts = stack.weights > 0
        means = [x.mean(0, where=counts[:, None]) for x in stack.updates]
        own = sum((x**2).sum() for x in stack.last)
        return [x + last / 2 for x, last in zip(means, stack.last, strict=True)], {
            "from": jnp.sqrt(stack.total(own))
        }

    mesh = fl.clients_mesh(num_devices)
    dataset = regression_dataset()
    reducer = fl.Reducer(stacked=momentum, keeps_last=True)
    algorithm = averaging(num_devices, reducer=reducer)
    state = algorithm.init(start())
    last = np.zeros(4)
    for ids in ([0, 3, 4], [1], [8, 2]):
        present = [i for i in ids if SIZES[i] > 0]
        before = flat(state.params)
        norm = np.linalg.norm(last)
        if present:
            last = deltas(dataset, state.params)[present].mean(0) + last / 2
        cohort = fl.cohort_of(dataset.resident(mesh), [*ids, *[-1] * (3 - len(ids))])
        state, info = algorithm.round(KEY, state, cohort)
        np.testing.assert_allclose(info.metrics["from"], norm, rtol=1e-9)
        np.testing.assert_allclose(flat(state.last_aggregate), last, rtol=1e-9)
        if present:  # A round that is skipped leaves it as it is.
            np.testing.assert_allclose(flat(state.params), before - last, rtol=1e-9)
