"""Asynchronous training against an event-driven simulation, and rounds with stragglers."""

import functools
import heapq
import itertools
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import SIZES, everyone, regression_dataset, regression_model

import fedjax_lite as fl
from fedjax_lite.samplers.asynchronous import _Candidates

KEY = jax.random.key(3)
RATE, SERVER_RATE = 0.05, 0.7
START = {"w": np.array([0.5, -1.0, 2.0]), "b": np.array(0.25)}
# With ties, and clients that take no time at all.
SECONDS = np.array([1.0, 2.0, 1.0, 5.0, 2.0, 3.0, 1.0, 0.0, 8.0, 2.0])


@pytest.fixture
def in_float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def dataset():
    return regression_dataset().map(lambda own: {k: np.asarray(v, float) for k, v in own.items()})


def local_delta(client, params):
    """Two epochs of full batches."""
    w = params.copy()
    x, y = dataset()[client]["x"], dataset()[client]["y"]
    inputs = np.column_stack([x, np.ones(len(x))])
    for _ in range(2 if len(x) else 0):
        w -= RATE * inputs.T @ (inputs @ w - y) / len(x)
    return params - w


class Server:
    """Takes updates one by one, as an event-driven simulator does."""

    def __init__(self, buffer_size, discount, normalise, mixes):
        self.params, self.version = np.append(START["w"], START["b"]), 0
        self.buffer, self.buffer_size = [], buffer_size
        self.discount, self.normalise, self.mixes = discount, normalise, mixes

    def receive(self, client, version, started_from):
        delta = local_delta(client, started_from)
        if self.mixes:
            delta = self.params - (started_from - delta)
        weight = SIZES[client] * self.discount(self.version - version)
        self.buffer.append((weight, delta))
        if len(self.buffer) == self.buffer_size:
            weights = np.array([weight for weight, _ in self.buffer])
            total = sum(weight * delta for weight, delta in self.buffer)
            by = {"weights": weights.sum(), "count": self.buffer_size, "none": 1}[self.normalise]
            if weights.sum():
                self.params = self.params - SERVER_RATE * total / by
            self.version, self.buffer = self.version + 1, []
            return True
        return False


def simulate(server, num_rounds, concurrency, arrivals, most, seed):
    """The params after each step, by a heap of events."""
    sizes = np.array(SIZES)
    candidates = _Candidates(10, fl.durations.of_devices(SECONDS), sizes, seed)
    events, order, busy, found = [], itertools.count(), set(), []

    def start(now):
        client, seconds = candidates.next(busy)
        busy.add(client)
        row = (now + seconds, 0, next(order), client, server.version, server.params.copy())
        heapq.heappush(events, row)

    if arrivals is None:
        for _ in range(concurrency):
            start(0.0)
    else:
        for i in range(1, 400):
            heapq.heappush(events, (i * arrivals, 1, next(order), None, None, None))
    due, last = 0, 0.0
    while len(found) < num_rounds:
        if due and (not events or events[0][0] > last):
            # At one moment, all end before others start.
            for _ in range(due):
                start(last)
            due = 0
            continue
        now, _, _, client, version, params = heapq.heappop(events)
        last = now
        if client is None:
            if len(busy) < concurrency:
                start(now)
            continue
        busy.discard(client)
        due += arrivals is None
        if most is not None and server.version - version > most:
            continue
        if server.receive(client, version, params):
            found.append(server.params.copy())
    return found


CASES = {
    # Concurrency, buffer, arrivals, the most staleness, weight by staleness, division, mixing.
    "FedAsync": (6, 1, None, None, lambda s: (1 + s) ** -0.5, "none", True),
    "FedBuff": (6, 3, None, None, lambda s: (1 + s) ** -0.5, "count", False),
    "a buffer larger than the concurrency": (2, 5, None, None, lambda s: 1.0, "weights", False),
    "everyone at once": (10, 3, None, None, lambda s: 1.0 if s <= 2 else 0.25, "none", False),
    "a buffer for all": (6, 10, None, None, lambda s: (1 + s) ** -0.5, "count", False),
    "arrivals, some too stale": (
        4,
        2,
        0.75,
        1,
        lambda s: 1 / (2 * max(s - 1, 0) + 1),
        "weights",
        False,
    ),
}
TRANSFORMS = {
    "FedAsync": fl.polynomial_staleness(0.5),
    "FedBuff": fl.polynomial_staleness(0.5),
    "a buffer larger than the concurrency": fl.threshold_staleness(100),
    "everyone at once": fl.threshold_staleness(2, 0.25),
    "a buffer for all": fl.polynomial_staleness(0.5),
    "arrivals, some too stale": fl.hinge_staleness(2.0, 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_rounds_are_those_of_a_simulation_by_events(name, in_float64):
    concurrency, buffer_size, arrivals, most, discount, normalise, mixes = CASES[name]
    num_rounds = 12
    sampler = fl.samplers.fed_buff(
        10,
        num_rounds,
        concurrency=concurrency,
        buffer_size=buffer_size,
        durations=fl.durations.of_devices(SECONDS),
        max_staleness=most,
        num_examples=SIZES,
        seed=4,
        **({} if arrivals is None else {"arrivals": "constant", "rate": 1 / arrivals}),
    )
    denominator = {"weights": None, "count": float(buffer_size), "none": 1.0}[normalise]
    transforms = [TRANSFORMS[name], *([fl.mix_models()] if mixes else [])]
    algorithm = fl.fed_avg(
        *(regression_model(), optax.sgd(RATE), optax.sgd(SERVER_RATE)),
        batch_size=16,
        num_epochs=2,
        pipeline=fl.chain(*transforms),
        reducer=fl.weighted_mean(denominator),
        max_staleness=sampler.max_staleness,
        mesh=fl.clients_mesh(min(2, jax.device_count())),
        lanes=2,
    )
    server = Server(buffer_size, discount, normalise, mixes)
    expected = simulate(server, num_rounds, concurrency, arrivals, most, seed=4)
    population = dataset().resident(fl.clients_mesh(min(2, jax.device_count())))
    state = algorithm.init(START)
    seen = 0
    for r in range(num_rounds):
        chosen = sampler.select(KEY, r)
        cohort = fl.cohort_of(population, chosen.client_ids, staleness=chosen.staleness)
        state, info = algorithm.round(KEY, state, cohort)
        np.testing.assert_array_equal(info.clients["staleness"], chosen.staleness)
        actual = np.append(state.params["w"], state.params["b"])
        np.testing.assert_allclose(actual, expected[r], rtol=1e-9, atol=1e-12)
        seen = max(seen, int(chosen.staleness.max()))
    assert algorithm.round._cache_size() == 1
    assert sampler.max_staleness >= seen == sampler.schedule.staleness.max() > 0
    assert most is None or (seen <= most and sampler.schedule.num_stale.sum() > 0)


def test_equal_durations_and_a_full_buffer_are_synchronous(in_float64):
    sampler = fl.samplers.fed_buff(
        10, 5, concurrency=10, buffer_size=10, durations=fl.durations.constant(3.0)
    )
    assert sampler.max_staleness == 0
    algorithm = fl.fed_avg(regression_model(), optax.sgd(RATE), batch_size=4)
    population = dataset().resident()
    state = plain = algorithm.init(START)
    for r in range(5):
        chosen = sampler.select(KEY, r)
        state, _ = algorithm.round(KEY, state, fl.cohort_of(population, chosen.client_ids))
        plain, _ = algorithm.round(KEY, plain, everyone(population))
        chex.assert_trees_all_close(state.params, plain.params, rtol=1e-9)
        assert chosen.metrics["round_seconds"] == 3.0
        assert chosen.metrics["concurrency"] == 10


@functools.cache
def late_sampler(num_rounds=8, concurrency=5):
    return fl.samplers.fed_buff(
        10,
        num_rounds,
        concurrency=concurrency,
        buffer_size=2,
        durations=fl.durations.log_normal(1.0),
        seed=1,
    )


def averaging(exponent=0.5, max_staleness=None, **options):
    return fl.fed_avg(
        *(regression_model(), optax.sgd(RATE)),
        batch_size=4,
        pipeline=fl.polynomial_staleness(exponent),
        max_staleness=late_sampler().max_staleness if max_staleness is None else max_staleness,
        **options,
    )


def test_runs_are_recorded_and_go_on_where_they_were_cut(tmp_path):
    algorithm, population = averaging(), regression_dataset().resident()
    options = {"num_rounds": 8, "key": KEY}
    straight = fl.train(algorithm, population, late_sampler(), **options)
    rows = straight.history.rounds
    clock = late_sampler().schedule.ended.max(1)
    np.testing.assert_allclose([row["wall_clock"] for row in rows], clock, rtol=1e-5)
    staleness = late_sampler().schedule.staleness.mean(1)
    np.testing.assert_allclose([row["staleness"] for row in rows], staleness, rtol=1e-6)
    # A run of four rounds, of which the checkpoint of the third is the last that can be read.
    options |= {"checkpoints": fl.Checkpoints(tmp_path, every=3)}
    few = late_sampler(4)
    assert 0 < few.max_staleness < late_sampler().max_staleness
    short = averaging(max_staleness=few.max_staleness)
    fl.train(short, population, few, **{**options, "num_rounds": 4})
    shutil.rmtree(tmp_path / "4")
    other = late_sampler(concurrency=6)
    for_other = averaging(max_staleness=other.max_staleness)
    with pytest.raises(ValueError, match=r"run: sampler\.concurrency is 5 there and 6 here\. Ch"):
        fl.train(for_other, population, other, **options)
    loaded = fl.load_state(tmp_path, fl.fed_avg(regression_model(), optax.sgd(0.1)).init(START))
    assert int(loaded.round) == 3
    assert loaded.versions == ()
    resumed = fl.train(algorithm, population, late_sampler(), **options)
    chex.assert_trees_all_equal(resumed.state.params, straight.state.params)
    assert [row["wall_clock"] for row in resumed.history.rounds] == [
        row["wall_clock"] for row in rows
    ]
    swept = fl.sweep(
        averaging,
        population,
        late_sampler(),
        8,
        keys=jnp.stack([KEY, KEY]),
        numbers={"exponent": [0.5, 2.0]},
        lanes=2,
    )
    first, second = swept.histories
    np.testing.assert_allclose(first.rounds[-1]["wall_clock"], clock[-1], rtol=1e-5)
    params = jax.tree.map(lambda x: x[0], jax.device_get(swept.states.params))
    chex.assert_trees_all_close(params, straight.state.params, rtol=1e-5)
    assert first.rounds[-1]["loss"] != second.rounds[-1]["loss"]


@pytest.mark.parametrize("arrivals", ["as_one_ends", "poisson"])
def test_more_rounds_begin_with_the_same_ones(arrivals):
    """Whatever the length, and with updates that arrive at one moment for several steps."""
    build = functools.partial(
        *(fl.samplers.fed_buff, 10),
        **{"concurrency": 6, "buffer_size": 2, "max_staleness": 3, "arrivals": arrivals},
        durations=fl.durations.of_devices(SECONDS),
        rate=None if arrivals == "as_one_ends" else 2.0,
    )
    whole = build(40)
    for num_rounds in (1, 2, 13, 39):
        few = build(num_rounds)
        for name, values in vars(few.schedule).items():
            if name not in ("max_staleness", "settings", "draws"):
                expected = getattr(whole.schedule, name)[:num_rounds]
                np.testing.assert_array_equal(values, expected, err_msg=name)
        assert few.schedule.settings == whole.schedule.settings
        np.testing.assert_array_equal(few.schedule.draws, whole.schedule.draws)
        # What starts before the end of the short one and counts later starts from what it keeps.
        later = np.arange(num_rounds, 40)[:, None] - whole.schedule.staleness[num_rounds:]
        oldest = later[later <= num_rounds].min(initial=num_rounds)
        assert num_rounds - oldest <= few.max_staleness <= 3
    assert whole.schedule.num_stale.sum() > 0
    assert ((whole.schedule.wasted_seconds > 0) == (whole.schedule.num_stale > 0)).all()


def test_what_does_not_fit_together_is_refused():
    population = regression_dataset().resident()
    with pytest.raises(ValueError, match=r"num_rounds is 9, and sampler has 8 rounds"):
        fl.train(averaging(), population, late_sampler(), 9, key=KEY)
    with pytest.raises(ValueError, match="max_staleness of the algorithm is 1, and that of"):
        fl.train(averaging(max_staleness=1), population, late_sampler(), 2, key=KEY)
    build = functools.partial(
        fl.samplers.fed_buff, 10, 2, concurrency=2, buffer_size=2, durations=fl.durations.constant()
    )
    with pytest.raises(ValueError, match="rate is None with arrivals='poisson'"):
        build(arrivals="poisson")
    with pytest.raises(ValueError, match=r"rate is 2\.0 with arrivals='as_one_ends'"):
        build(rate=2.0)
    with pytest.raises(ValueError, match="durations are between nan"):
        build(durations=fl.durations.Durations(lambda key, client_id, n: jnp.nan))
    median = fl.fed_avg(
        *(regression_model(), optax.sgd(RATE)),
        pipeline=fl.mix_models(),
        reducer=fl.coordinate_median(),
        max_staleness=2,
    )
    cohort = fl.cohort_of(population, [0, 2], staleness=np.array([0, 1]))
    with pytest.raises(ValueError, match="reducer looks at single updates"):
        median.round(KEY, median.init(START), cohort)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (fl.scaffold, "clients of the algorithm keep something between rounds"),
        (
            fl.ada_fed_prox,
            "clients of the algorithm start from more of the server's state than params",
        ),
        (fl.mime_lite, "clients of the algorithm measure something at the newest params"),
        (
            functools.partial(fl.fed_avg, pipeline=fl.error_feedback(fl.top_k(1))),
            "pipeline has clients keep something.* leave error feedback out",
        ),
        (
            functools.partial(fl.fed_avg, pipeline=fl.downlink(fl.half_precision())),
            "pipeline changes what the server sends",
        ),
    ],
)
def test_what_late_clients_cannot_do_is_refused_when_built(build, message):
    with pytest.raises(ValueError, match=f"max_staleness is .*, and {message}"):
        build(regression_model(), optax.sgd(0.1), max_staleness=2)
    build(regression_model(), optax.sgd(0.1), max_staleness=0)


def test_arrivals_come_at_their_rate_and_no_more_than_may_train():
    sampler = fl.samplers.fed_buff(
        1000,
        200,
        concurrency=20,
        buffer_size=10,
        durations=fl.durations.exponential(2.0),
        arrivals="poisson",
        rate=8.0,
    )
    schedule = sampler.schedule
    # By Little's law, 16 clients on average, of an Erlang loss system with 20 places.
    assert 12 < schedule.concurrency.mean() <= 20
    assert schedule.num_refused.sum() > 0
    begun = np.sort(schedule.started.ravel())
    rate = begun.size / begun[-1]
    assert 6.0 < rate < 8.2
    assert (np.diff(schedule.ended.max(1)) >= 0).all()
    assert (schedule.ended >= schedule.started).all()
    # Nobody trains twice at a time.
    for client in np.unique(schedule.client_ids)[:50]:
        own = schedule.client_ids == client
        times = np.array(sorted(zip(schedule.started[own], schedule.ended[own], strict=True)))
        assert (times[1:, 0] >= times[:-1, 1]).all()


DRAWS = {
    "constant": (fl.durations.constant(2.0), 2.0, 0.0),
    "uniform_between": (fl.durations.uniform_between(1.0, 3.0), 2.0, 3**-0.5),
    "exponential": (fl.durations.exponential(2.0), 2.0, 2.0),
    "normal": (fl.durations.normal(10.0, 1.0), 10.0, 1.0),
    "half_normal": (
        fl.durations.half_normal(1.0, 0.5),
        0.5 + (2 / np.pi) ** 0.5,
        (1 - 2 / np.pi) ** 0.5,
    ),
    "log_normal": (
        fl.durations.log_normal(0.5, 2.0),
        2 * np.exp(0.125),
        2 * np.exp(0.125) * np.expm1(0.25) ** 0.5,
    ),
}


@pytest.mark.parametrize("name", DRAWS)
def test_durations_have_their_mean_and_spread(name):
    durations, mean, std = DRAWS[name]
    keys = jax.random.split(KEY, 20_000)
    draw = lambda key: durations.seconds(key, jnp.int32(0), jnp.int32(7))
    drawn = np.asarray(jax.jit(jax.vmap(draw))(keys), np.float64)
    np.testing.assert_allclose(drawn.mean(), mean, atol=5 * std / 20_000**0.5 + 1e-6)
    np.testing.assert_allclose(drawn.std(), std, rtol=0.05, atol=1e-6)


def test_stragglers_are_left_behind_cut_or_gone():
    samplers, durations = fl.samplers, fl.durations.of_devices(SECONDS)
    select = lambda sampler, r: jax.device_get(sampler.select(KEY, r))
    everyone = samplers.everyone(10)
    clocked = select(samplers.timed(everyone, durations), 0)
    assert clocked.metrics["round_seconds"] == SECONDS.max()
    fast = select(samplers.over_selected(everyone, durations, keep=4), 3)
    assert sorted(SECONDS[fast.client_ids]) == sorted(SECONDS)[:4]
    assert fast.metrics["round_seconds"] == sorted(SECONDS)[3]
    assert fast.metrics["num_late"] == 6
    late = samplers.timed_out(everyone, durations, 2.0, num_steps=np.arange(10) + 1)
    cut = select(late, 0)
    with np.errstate(divide="ignore"):
        expected = np.floor((np.arange(10) + 1) * np.minimum(1, 2 / SECONDS))
    np.testing.assert_array_equal(cut.max_steps, expected[cut.client_ids])
    assert cut.metrics["num_cut"] == (SECONDS > 2).sum()
    assert cut.metrics["round_seconds"] == 2.0
    both = samplers.dropping_out(samplers.timed_out(everyone, durations, 2.0, num_steps=3), 0.5)
    selections = [select(both, r) for r in range(40)]
    counts = [int((s.client_ids >= 0).sum()) for s in selections]
    assert 4 < np.mean(counts) < 6
    assert len(set(counts)) > 3
    for s, count in zip(selections, counts, strict=True):
        assert s.metrics["num_left"] == 10 - count
        assert (s.client_ids[:count] >= 0).all()
        own = s.client_ids[:count]
        expected = np.floor(3 * np.minimum(1, 2 / np.maximum(SECONDS[own], 1e-9)))
        np.testing.assert_array_equal(s.max_steps[:count], expected)
        np.testing.assert_array_equal(s.probabilities, np.where(s.client_ids >= 0, 0.5, 1.0))
    night = samplers.by_day_and_night(everyone, 8, awake=0.25)
    there = np.array([np.isin(np.arange(10), select(night, r).client_ids) for r in range(16)])
    np.testing.assert_array_equal(there[:8], there[8:])
    np.testing.assert_array_equal(there[:8].sum(0), np.full(10, 2))


def test_messages_take_their_time():
    """On the clock as a sum of what was reported, whatever the pipeline does to their size."""
    model = fl.models.logistic((3,), 2)
    few, many = (
        fl.fed_avg(model, optax.sgd(0.1), pipeline=pipeline)
        for pipeline in (fl.qsgd(3), fl.qsgd(3, encoding="elias"))
    )
    down, up = few.message_bits(KEY)
    assert (down, up) == (8 * 32, 32 + 8 * 3)
    assert many.message_bits(KEY) == (down, down)  # It depends on values: as it is without.
    network = functools.partial(fl.durations.with_network, fl.durations.constant(2.0))
    slow = network(upload=np.arange(1.0, 11), download=4.0, algorithm=few, bytes_down=12)
    seconds = [float(slow.seconds(KEY, jnp.int32(i), jnp.int32(5))) for i in (0, 9)]
    np.testing.assert_allclose(seconds, [2 + 7 / 1 + 12 / 4, 2 + 7 / 10 + 12 / 4], rtol=1e-6)
    assert float(network(algorithm=None).seconds(KEY, jnp.int32(0), jnp.int32(5))) == 2.0
    with pytest.raises(ValueError, match=r"bytes_down is None, and no algorithm .* bytes_down= as"):
        network(download=1.0)
    with pytest.raises(ValueError, match=r"upload has shape \(2,\), and is at least 0; pass a pos"):
        network(upload=[1.0, 0.0], algorithm=few)
    with pytest.raises(ValueError, match=r"upload has shape \(3,\); pass .* each of the 2 clients"):
        fl.durations.of_devices([1.0, 1.0], upload=np.ones(3), algorithm=few)
    # On the command line, the algorithm is known.
    experiment = fl.experiment(
        dataset="synthetic(num_clients=6)",
        model="logistic",
        updates="half_precision",
        sampler="timed(uniform(2), with_network(constant(1.0), upload=100.0))",
    )
    _, up = experiment.algorithm.message_bits(KEY)
    assert up == 16 * (60 + 1) * 10
    found = experiment.sampler.select(KEY, 0).metrics["round_seconds"]
    np.testing.assert_allclose(found, 1 + up / 8 / 100, rtol=1e-6)
    assert "algorithm" not in experiment.settings.sampler


def test_every_sampler_has_a_clock():
    """The same clients, and what is known of them, and a round as long as the slowest."""
    samplers, durations = fl.samplers, fl.durations.of_devices(SECONDS + 1)
    every = {
        "cyclic": samplers.cyclic(10, 3, 2),
        "everyone": samplers.everyone(10),
        "importance": samplers.importance(SIZES, 3),
        "minimise_reuse": samplers.minimise_reuse(10, 3),
        "poisson": samplers.poisson(10, 0.3),
        "round_robin": samplers.round_robin(10, 3),
        "sequential": samplers.sequential(10, 3),
        "uniform": samplers.uniform(10, 3),
        "weighted": samplers.weighted(np.arange(10.0), 3),
        "available": samplers.available(samplers.everyone(10), np.eye(4, 10, dtype=bool)),
        "by_day_and_night": samplers.by_day_and_night(samplers.everyone(10), 4),
        "dropping_out": samplers.dropping_out(samplers.uniform(10, 5), 0.5),
    }
    with_clocks = {"fed_buff", "over_selected", "timed", "timed_out"}
    names = {name for name in samplers.__all__ if name[0].islower()}
    assert {*every} == names - with_clocks
    for name, sampler in every.items():
        clocked = samplers.timed(sampler, durations)
        assert clocked._replace(select=None) == sampler._replace(select=None), name
        told = jax.eval_shape(clocked.select, KEY, 2).metrics
        assert "round_seconds" in told, name
        if name not in ("poisson", "dropping_out"):  # Compiling takes its time.
            continue
        selection, plain = clocked.select(KEY, 2), sampler.select(KEY, 2)
        chex.assert_trees_all_equal(selection._replace(metrics=plain.metrics), plain)
        own = (SECONDS + 1)[plain.client_ids[plain.client_ids >= 0]]
        assert selection.metrics["round_seconds"] == own.max(initial=0), name
    some = samplers.over_selected(samplers.everyone(10), durations, 4)
    for build in (samplers.timed, functools.partial(samplers.over_selected, keep=2)):
        for sampler in (late_sampler(), some):
            with pytest.raises(
                ValueError, match="sampler has a clock of its own; leave one of the"
            ):
                build(sampler, durations)
    with pytest.raises(ValueError, match="sampler has a schedule"):
        samplers.timed_out(late_sampler(), durations, 2.0, num_steps=3)
    # Whoever comes first, and no later than at the deadline.
    both = samplers.timed_out(some, durations, 2.0, num_steps=3).select(KEY, 0)
    assert both.metrics["round_seconds"] == 2.0
    assert some.select(KEY, 0).metrics["round_seconds"] == sorted(SECONDS + 1)[3] == 2.0


def test_devices_come_from_a_file(tmp_path):
    path = tmp_path / "devices.csv"
    path.write_text("client_id,seconds_per_example,upload\nb,2,100\na,0.5,\n")
    devices = fl.durations.from_file(path, ["a", "b"], bytes_up=50)
    seconds = [float(devices.seconds(KEY, jnp.int32(i), jnp.int32(4))) for i in range(2)]
    assert seconds == [2.0, 8.5]
    with pytest.raises(ValueError, match="without 2 of 2 clients, such as '0'"):
        fl.durations.from_file(path)
    path.write_text("client_id,seconds_per_example\na,x\n")
    with pytest.raises(ValueError, match="in whose column 'seconds_per_example'"):
        fl.durations.from_file(path, ["a"])
    path.write_text("client_id,seconds_per_example\na,1\na,2\n")
    with pytest.raises(ValueError, match="several lines of a client"):
        fl.durations.from_file(path, ["a"])
    path.write_text("client\na\n")
    with pytest.raises(ValueError, match="no column 'client_id'"):
        fl.durations.from_file(path)


def test_a_late_client_counts_for_what_it_did():
    """A run with time-outs on the clock: partial work weighs what was processed."""
    population = regression_dataset().resident()
    steps = -(-np.array(SIZES) // 4)
    sampler = fl.samplers.timed_out(
        fl.samplers.everyone(10), fl.durations.of_devices(SECONDS), 2.0, num_steps=steps
    )
    algorithm = fl.fed_avg(regression_model(), optax.sgd(RATE), batch_size=4, weighting="processed")
    result = fl.train(algorithm, population, sampler, 3, key=KEY)
    assert [row["wall_clock"] for row in result.history.rounds] == [2.0, 4.0, 6.0]
    assert [row["num_cut"] for row in result.history.rounds] == [3, 3, 3]
