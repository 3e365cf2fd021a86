"""Epsilon against dp-accounting itself, on the way into records, and from below."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lite as fl
from fedjax_lite.cli import main
from fedjax_lite.privacy.accounting import ledger_of

dp_accounting = pytest.importorskip(
    "dp_accounting", reason="dp-accounting comes with the extra `privacy`"
)
RELATION = dp_accounting.NeighboringRelation
MILLION = fl.samplers.poisson(10**6, 1e-3, capacity=10**6)


def gaussian(noise_multiplier):
    return dp_accounting.GaussianDpEvent(noise_multiplier)


def poisson(rate, noise_multiplier):
    return dp_accounting.PoissonSampledDpEvent(rate, gaussian(noise_multiplier))


def theirs(accountant, relation, event, count, delta, step=5e-4):
    if accountant == "rdp":
        made = dp_accounting.rdp.RdpAccountant(neighboring_relation=relation)
    else:
        made = dp_accounting.pld.PLDAccountant(relation, value_discretization_interval=step)
    return made.compose(event, count).get_epsilon(delta)


@pytest.mark.parametrize(
    ("accountant", "num_rounds", "expected"),
    [("pld", 1500, 0.616), ("pld", 3000, 0.633), ("rdp", 1500, 0.714)],
)
def test_calibration_finds_the_published_noise(accountant, num_rounds, expected):
    found = fl.privacy.calibrate(2.0, 1e-6, num_rounds, MILLION, accountant=accountant)
    assert found == pytest.approx(expected, abs=1.5e-3)
    # dp-accounting, with its own default of steps, agrees that this is the multiplier.
    event = poisson(1e-3, found)
    spent = theirs(accountant, RELATION.ADD_OR_REMOVE_ONE, event, num_rounds, 1e-6, step=1e-4)
    assert spent == pytest.approx(2, rel=2e-3)
    assert spent <= 2


# Sampler, accountant, relation, and the event of as many rounds as a client takes part in: of 12.
EVENTS = {
    "poisson": (
        fl.samplers.poisson(200, 0.1, capacity=200),
        *("pld", RELATION.ADD_OR_REMOVE_ONE, lambda z: poisson(0.1, z), 12),
    ),
    "poisson by RDP": (
        fl.samplers.poisson(200, 0.1, capacity=200),
        *("rdp", RELATION.ADD_OR_REMOVE_ONE, lambda z: poisson(0.1, z), 12),
    ),
    "poisson with few slots": (
        fl.samplers.poisson(200, 0.1, capacity=25),
        *("pld", RELATION.ADD_OR_REMOVE_ONE),
        lambda z: dp_accounting.TruncatedSubsampledGaussianDpEvent(200, 0.1, 25, z),
        12,
    ),
    "uniform": (
        fl.samplers.uniform(200, 20),
        *("rdp", RELATION.REPLACE_ONE),
        # Of fixed size: another client takes the place, and the sum changes by twice the bound.
        lambda z: dp_accounting.SampledWithoutReplacementDpEvent(200, 20, gaussian(z / 2)),
        12,
    ),
    "everyone": (
        fl.samplers.everyone(200),
        *("pld", RELATION.ADD_OR_REMOVE_ONE, gaussian, 12),
    ),
    "everyone by RDP": (
        fl.samplers.everyone(200),
        *("rdp", RELATION.ADD_OR_REMOVE_ONE, gaussian, 12),
    ),
    "round_robin": (
        fl.samplers.round_robin(11, 2),  # A pass takes 6 rounds.
        *("pld", RELATION.REPLACE_SPECIAL, gaussian, 2),
    ),
    "minimise_reuse": (
        fl.samplers.minimise_reuse(11, 2),  # A client takes part in every fifth round at most.
        *("pld", RELATION.REPLACE_SPECIAL, gaussian, 3),
    ),
    "cyclic": (
        fl.samplers.cyclic(200, 3, rate=0.1, capacity=67),
        *("rdp", RELATION.REPLACE_SPECIAL, lambda z: poisson(0.1, z), 4),
    ),
    "cyclic of fixed size": (
        fl.samplers.cyclic(200, 3, 20),
        *("rdp", RELATION.REPLACE_ONE),
        lambda z: dp_accounting.SampledWithoutReplacementDpEvent(66, 20, gaussian(z / 2)),
        4,
    ),
}


@pytest.mark.parametrize("noise_multiplier", [0.7, 5.0])
@pytest.mark.parametrize("name", EVENTS)
def test_epsilon_is_that_of_the_event(name, noise_multiplier):
    sampler, accountant, relation, event, count = EVENTS[name]
    spent = fl.privacy.ledger(noise_multiplier, 1e-5, sampler, accountant=accountant)
    assert spent.adjacency == relation.name.lower()
    expected = theirs(accountant, relation, event(noise_multiplier), count, 1e-5)
    assert expected * (1 - 1e-6) <= spent.epsilon(12) <= expected * 1.002
    assert [spent.epsilon(0), spent.epsilon(1) > 0] == [0, True]


@pytest.mark.parametrize("noise_multiplier", [0.5, 30.0])
def test_epsilon_of_everyone_has_a_closed_form(noise_multiplier):
    spent = fl.privacy.ledger(noise_multiplier, 1e-6, fl.samplers.everyone(3))
    # Four rounds with noise z are one with half of it.
    expected = dp_accounting.get_epsilon_gaussian(noise_multiplier / 2, 1e-6)
    assert spent.epsilon(4) == pytest.approx(expected, rel=1e-3)


def test_a_slot_too_few_costs_and_the_default_of_slots_costs_nothing():
    def spent(**options):
        return fl.privacy.epsilon(1.0, 1e-5, 10, fl.samplers.poisson(200, 0.1, **options))

    assert spent() == pytest.approx(spent(capacity=200), rel=1e-5)
    assert spent(capacity=20) > 1.2 * spent()


def test_without_noise_epsilon_is_infinite():
    for sampler in (fl.samplers.everyone(3), MILLION, fl.samplers.uniform(30, 3)):
        spent = fl.privacy.ledger(0.0, 1e-5, sampler)
        assert [spent.epsilon(r) for r in (0, 1, 2)] == [0, math.inf, math.inf]


def test_many_rounds_are_accounted_in_passing():
    spent = fl.privacy.ledger(1.0, 1e-6, fl.samplers.uniform(10_000, 100))
    assert np.all(np.diff([spent.epsilon(r) for r in range(1001)]) > 0)


@pytest.mark.parametrize(
    ("sampler", "options", "told"),
    [
        (fl.samplers.uniform(9, 3, replace=True), {}, "'with_replacement'.*drawn twice"),
        (fl.samplers.importance([1, 2], 1), {}, "'importance'.*what all others have"),
        (fl.samplers.weighted([1, 2], 1), {}, "'weighted'.*what all others have"),
        (fl.samplers.uniform(9, lambda r: r, capacity=9), {}, "'without_rep.*varies"),
        (fl.samplers.uniform(9, 3), {"accountant": "pld"}, "accountant is 'pld'.*choose 'rdp'"),
        (fl.samplers.poisson(900, 0.1), {"accountant": "rdp"}, "more clients than the 1[0-9]+"),
        (fl.samplers.uniform(9, 3)._replace(scheme=None), {}, "without a scheme"),
        (fl.samplers.everyone(9), {"accountant": "gdp"}, "accountant is 'gdp'; choose"),
        (fl.samplers.everyone(9), {"delta": 0.0}, "delta is 0.0; choose"),
        (fl.samplers.everyone(9), {"noise_multiplier": -1.0}, "noise_multiplier is -1.0; choose"),
    ],
)
def test_what_there_is_no_epsilon_for_is_refused(sampler, options, told):
    with pytest.raises(ValueError, match=told):
        fl.privacy.ledger(**{"noise_multiplier": 1.0, "delta": 1e-5, "sampler": sampler, **options})


def pipeline(*noise):
    return {
        "pipeline": fl.chain(fl.cap_weight(1.0), fl.clip_by_norm(1.0), *noise),
        "reducer": fl.weighted_mean(10.0),
    }


def test_the_noise_is_known_of_an_algorithm():
    model = fl.models.halfspace_classifier()

    def multiplier(*noise):
        algorithm = fl.fed_sgd(model, optax.sgd(1.0), **pipeline(*noise))
        return algorithm.guarantees().noise_multiplier

    assert multiplier() is None
    assert fl.fed_sgd(model, optax.sgd(1.0)).guarantees is None
    assert multiplier(fl.gaussian_noise(0.7)) == pytest.approx(0.7)
    # That of a simulated cohort does not protect the clients of this one.
    assert multiplier(fl.gaussian_noise(0.7, noise_scale=0.1)) is None
    # Counts with noise of multiplier 2 are released beside: together they are as good as 0.7.
    clip = fl.adaptive_clip(1.0, count_noise=1.0, denominator=10.0)
    assert multiplier(clip, fl.gaussian_noise(0.7)) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("sampler", "options", "count"),
    [
        (fl.samplers.minimise_reuse(100, 25), {}, 3),
        (fl.samplers.cyclic(100, 5, rate=0.2, capacity=20), {"accountant": "rdp"}, None),
        (fl.samplers.round_robin(100, 25), {}, "whose rounds lie 1 apart.* covers those .* 4"),
        (fl.samplers.everyone(100), {}, "whose rounds lie 1 apart"),
    ],
)
def test_noise_of_four_bands_asks_for_rounds_so_far_apart(sampler, options, count):
    noise = fl.toeplitz_noise(0.7, 12, num_bands=4, coefficients=[1.0, 0.5, 0.4, 0.3])
    banded = fl.fed_sgd(fl.models.halfspace_classifier(), optax.sgd(1.0), **pipeline(noise))
    budget = fl.privacy.budget(1e-5, **options)
    if isinstance(count, str):
        with pytest.raises(ValueError, match=count):
            ledger_of(budget, banded, sampler, 12)
        return
    spent = ledger_of(budget, banded, sampler, 12).epsilon(12)
    if count is not None:  # A client takes part so often, each time as without bands.
        expected = dp_accounting.get_epsilon_gaussian(0.7 / math.sqrt(count), 1e-5)
    else:  # By chance, in three rounds.
        expected = theirs("rdp", RELATION.REPLACE_SPECIAL, poisson(0.2, 0.7), 3, 1e-5)
    assert spent == pytest.approx(expected, rel=1e-3)


@functools.cache
def algorithm(noise_multiplier):
    model = fl.models.halfspace_classifier()
    return fl.fed_sgd(model, optax.adam(0.3), **pipeline(fl.gaussian_noise(noise_multiplier)))


@functools.cache
def held_out():
    return fl.data.halfspace_batch(jax.random.key(1), 100)


def evaluate(state):
    return fl.evaluate(fl.models.halfspace_classifier(), state, held_out())


def trained(num_rounds, sampler, noise_multiplier=1.0, **options):
    return fl.train(
        algorithm(noise_multiplier),
        fl.data.halfspace(num_clients=100),
        sampler,
        num_rounds,
        key=jax.random.key(0),
        evaluate=evaluate,
        eval_every=4,
        **options,
    )


def spent_of(rows):
    return {row["round"]: row["epsilon"] for row in rows}


def test_a_run_records_what_is_spent_and_goes_on_with_it(tmp_path):
    sampler, budget = fl.samplers.poisson(100, 0.1), fl.privacy.budget(1e-5)
    options = {"privacy": budget, "checkpoints": fl.Checkpoints(tmp_path)}
    trained(6, sampler, **options)
    resumed = trained(9, sampler, **options)
    spent = fl.privacy.ledger(1.0, 1e-5, sampler)
    expected = {r: spent.epsilon(r) for r in (0, 4, 6, 8, 9)}
    assert spent_of(resumed.history.evaluations) == pytest.approx(expected)
    # Between evaluations, that of the next one; the first run ended at round 6.
    next_ones = dict(zip(range(1, 10), (4, 4, 4, 4, 6, 6, 8, 8, 9), strict=True))
    bounds = {r: expected[then] for r, then in next_ones.items()}
    assert spent_of(resumed.history.rounds) == pytest.approx(bounds)
    assert resumed.privacy.adjacency == "add_or_remove_one"
    assert resumed.privacy.epsilon(9) == pytest.approx(expected[9])
    with pytest.raises(ValueError, match=r"another run.*noise_multiplier.*1\.0 there and 0\.5"):
        trained(12, sampler, 0.5, **options)


def test_runs_of_a_sweep_record_their_own():
    sampler = fl.samplers.uniform(100, 10)
    result = fl.sweep(
        lambda noise_multiplier: algorithm.__wrapped__(noise_multiplier),
        fl.data.halfspace(num_clients=100),
        sampler,
        4,
        keys=jax.random.split(jax.random.key(0), 2),
        numbers={"noise_multiplier": [1.0, 2.0]},
        privacy=fl.privacy.budget(1e-5),
    )
    for noise_multiplier, history in zip((1.0, 2.0), result.histories, strict=True):
        spent = fl.privacy.ledger(noise_multiplier, 1e-5, sampler)
        # By RDP, that of each round.
        assert spent_of(history.rounds) == {r: spent.epsilon(r) for r in range(1, 5)}


@pytest.mark.parametrize(
    ("sampler", "budget", "told"),
    [
        (fl.samplers.importance(np.ones(100), 9), (1e-5,), "'importance'"),
        (fl.samplers.everyone(100), (1e-5, 2.0), r"epsilon of 2, and 9 rounds .* choose 5\.98"),
    ],
)
def test_a_run_that_cannot_be_accounted_for_is_refused(sampler, budget, told):
    with pytest.raises(ValueError, match=told):
        trained(9, sampler, privacy=fl.privacy.budget(*budget))


def test_a_run_without_known_noise_is_refused():
    model, sampler = fl.models.halfspace_classifier(), fl.samplers.everyone(100)
    for options in ({}, pipeline()):
        plain = fl.fed_sgd(model, optax.sgd(1.0), **options)
        with pytest.raises(ValueError, match=r"adds no noise.*fl\.gaussian_noise"):
            fl.train(
                plain,
                fl.data.halfspace(num_clients=100),
                sampler,
                1,
                key=jax.random.key(0),
                privacy=fl.privacy.budget(1e-5),
            )


SETTINGS = {
    "dataset": "synthetic(num_clients=30)",
    "model": "logistic",
    "reducer": "weighted_mean(denominator=6)",
    "sampler": "poisson(rate=0.2)",
    "rounds": 3,
}
BOUNDED = "cap_weight(1.0), clip_by_norm(1.0), "


@pytest.mark.parametrize(
    ("updates", "options", "told"),
    [
        ("gaussian_noise()", {}, "gaussian_noise needs noise_multiplier"),
        ("gaussian_noise()", {"privacy": "budget(1e-3)"}, "gaussian_noise needs noise_multiplier"),
        ("gaussian_noise(0.1)", {"privacy": "budget(1e-3, epsilon=2)"}, "allows an epsilon of 2"),
        ("quantize_uniform(4)", {"privacy": "budget(1e-3, epsilon=2)"}, "adds no noise"),
        (
            "gaussian_noise(1.0)",
            {"privacy": "budget(1e-3)", "sampler": "importance"},
            "there is no epsilon",
        ),
    ],
)
def test_settings_without_an_epsilon_are_refused(updates, options, told):
    with pytest.raises(ValueError, match=told):
        fl.experiment(**{**SETTINGS, "updates": BOUNDED + updates, **options})


def test_the_command_line_chooses_the_noise_and_tells_what_is_spent(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fl, "configure_cpu", lambda: None)
    sampler = fl.samplers.poisson(30, 0.2)
    settings = {
        **SETTINGS,
        **{"updates": BOUNDED + "gaussian_noise()", "privacy": "budget(1e-3, epsilon=2)"},
    }
    options = [f"--{name}={value}" for name, value in settings.items()]
    main(["train", *options, "--out", str(tmp_path / "run"), "--json"])
    report = json.loads(capsys.readouterr().out)
    noise_multiplier = report["privacy"]["noise_multiplier"]
    least = fl.privacy.calibrate(2.0, 1e-3, 3, sampler)
    assert least <= noise_multiplier <= least + 1e-4
    # Recorded, it is there when the run goes on.
    assert f"noise_multiplier={noise_multiplier:.4f}" in report["config"]["updates"]
    spent = fl.privacy.epsilon(noise_multiplier, 1e-3, 3, sampler)
    assert report["privacy"] == {
        "epsilon": pytest.approx(spent),
        **{"noise_multiplier": noise_multiplier, "delta": 1e-3, "accountant": "pld"},
        "adjacency": "add_or_remove_one",
    }
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads(text.splitlines()[-1])["epsilon"] == pytest.approx(spent)


DIMENSIONS = 32


@functools.cache
def audited():
    """Scores of a canary of two clients, in a round with some noise: those of many runs at once."""
    model = fl.function_model(
        lambda w, batch: jnp.sum(w) * batch["x"], lambda key: jnp.zeros(DIMENSIONS)
    )
    mesh = fl.clients_mesh(1)
    population = fl.FederatedDataset.from_clients([{"x": [0.0]}, {"x": [0.0]}]).resident(mesh)

    def build(noise_multiplier, canaries):
        return fl.fed_sgd(
            model,
            optax.sgd(1.0),
            weighting="uniform",
            pipeline=fl.chain(
                canaries,
                fl.cap_weight(1.0),
                fl.clip_by_norm(1.0),
                fl.gaussian_noise(noise_multiplier),
            ),
            reducer=fl.weighted_mean(2.0),
            mesh=mesh,
        )

    @jax.jit
    def scores(noise_multiplier, keys):
        return fl.privacy.canary_scores(
            functools.partial(build, noise_multiplier),
            population,
            fl.samplers.everyone(2),
            2,
            keys=keys,
            client_ids=[1],
            norm=1.0,
            batch_size=1000,
        )

    keys = jax.random.split(jax.random.key(0), 20_000)
    return functools.cache(lambda noise: jax.device_get(scores(noise, keys)))


@pytest.mark.parametrize("of", ["final", "iterates"])
def test_an_audit_stays_below_the_claim_and_finds_half_of_the_noise(of):
    pytest.importorskip("jax_privacy", reason="jax-privacy comes with the extra `privacy`")
    claimed, delta = 3.0, 1e-2
    epsilon = fl.privacy.epsilon(claimed, delta, 2, fl.samplers.everyone(2))

    def bound(noise_multiplier):
        scores = audited()(noise_multiplier)
        return fl.privacy.audit(getattr(scores, of), scores.planted, delta).epsilon

    assert 0 < bound(claimed) < epsilon
    assert bound(claimed / 2) > epsilon


def test_scores_of_canaries_follow_their_laws():
    """The planted one is all there is without noise; random directions are at right angles."""
    scores = audited()(0.0)
    assert 0.45 < scores.planted.mean() < 0.55
    np.testing.assert_allclose(scores.final[scores.planted], 1, rtol=1e-5)
    assert (scores.final[~scores.planted] == 0).all()
    scores = audited()(1e4)
    for own in (scores.final[scores.planted], scores.final[~scores.planted]):
        # Of mean 0 and variance 1 / d, each known to a standard error.
        assert abs(own.mean()) < 5 / np.sqrt(DIMENSIONS * len(own))
        assert DIMENSIONS * np.mean(own**2) == pytest.approx(1, abs=5 * np.sqrt(2 / len(own)))


def test_canaries_change_no_one_else_and_leave_when_they_are_not_planted():
    model = fl.function_model(lambda w, batch: -(w @ batch["x"].T), lambda key: jnp.zeros(2))
    dataset = fl.FederatedDataset.from_clients([{"x": [[1.0, 0.0]]}] * 3)
    mesh = fl.clients_mesh(1)
    cohort = fl.cohort_of(dataset.resident(mesh), [0, 1, 2])

    @jax.jit
    def movement(planted):
        canaries = fl.privacy.canaries(jax.random.key(0), [1, 2], 5.0, planted=planted)
        algorithm = fl.fed_avg(
            model, optax.sgd(1.0), pipeline=canaries, reducer=fl.weighted_mean(1.0), mesh=mesh
        )
        state = algorithm.init(jax.random.key(0))
        return algorithm.round(jax.random.key(1), state, cohort)[0].params

    alone = movement(np.array([False, False]))
    np.testing.assert_allclose(alone, [1.0, 0.0], rtol=1e-6)
    planted = np.array([[True, False], [False, True], [True, True]])
    one, other, both = (movement(x) - alone for x in planted)
    np.testing.assert_allclose(np.linalg.norm([one, other], axis=1), 5, rtol=1e-6)
    np.testing.assert_allclose(both, one + other, rtol=1e-5)


def test_many_canaries_of_one_run_are_audited_by_right_guesses():
    auditing = pytest.importorskip("jax_privacy.auditing")
    rng = np.random.default_rng(0)
    planted = rng.random((1, 1000)) < 0.5
    scores = planted + 0.2 * rng.normal(size=planted.shape)
    found = fl.privacy.audit(scores, planted, 1e-6, confidence=0.9)
    auditor = auditing.CanaryScoreAuditor(scores[planted], scores[~planted])
    expected = auditor.epsilon_one_run(0.1, 1e-6, threshold_strategy=auditing.Split(seed=0))
    assert found.epsilon == expected > 1


@pytest.mark.parametrize(
    ("scores", "planted", "options", "told"),
    [
        (np.zeros((3, 1)), np.ones((3, 1)), {}, "3 canaries that were there"),
        (np.zeros(3), np.zeros(3), {}, r"scores has shape \(3,\)"),
        (np.zeros((2, 1)), [[0], [1]], {"confidence": 0.05}, "confidence is 0.05; choose"),
    ],
)
def test_scores_that_show_nothing_are_refused(scores, planted, options, told):
    with pytest.raises(ValueError, match=told):
        fl.privacy.audit(scores, planted, 1e-5, **options)
