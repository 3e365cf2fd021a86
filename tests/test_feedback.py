"""What clients keep of what compression has lost, and estimates that the server has, too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import SIZES, everyone, regression_dataset, regression_model

import fedjax_lite as fl

UPDATES = np.asarray(jax.random.normal(jax.random.key(0), (30, 6, 4)))
KEYS = jax.random.split(jax.random.key(1), len(UPDATES))


def sent_by_one_client(transform):
    """What is decoded in each round, and what the client keeps after it."""
    entry = transform.entry(UPDATES[0])

    @jax.jit
    def run(state, entry):
        def round(carry, x):
            state, entry = carry
            key, update = x
            message = transform.client(key, state, fl.Message(update, 1.0, entry), None)
            _, state, _ = transform.server(key, state, fl.Received(message.update))
            return (state, message.entry), (message.update, message.entry)

        return jax.lax.scan(round, (state, entry), (KEYS, jnp.asarray(UPDATES)))[1]

    return jax.device_get(run(transform.init(UPDATES[0]), entry))


@pytest.mark.parametrize(
    "transform",
    [
        fl.top_k(3),
        fl.drive(),
        fl.random_k(6, unbiased=False),
        fl.low_rank(1),
        fl.power_sgd(1),
        fl.rotated(fl.quantize_uniform(4)),
        fl.chain(fl.top_k(0.5), fl.half_precision()),
    ],
)
def test_all_that_is_sent_is_all_that_there_was_but_for_what_is_kept(transform):
    sent, (errors, _) = sent_by_one_client(fl.error_feedback(transform))
    np.testing.assert_allclose(sent.sum(0), UPDATES.sum(0) - errors[-1], atol=2e-5)
    # Not all has been sent, and what is sent at last holds more than the last update.
    assert np.linalg.norm(errors[-1]) > 0.1
    assert np.linalg.norm(sent[-1] - UPDATES[-1] - errors[-2] + errors[-1]) < 1e-5


def test_what_is_kept_decays():
    sent, (errors, _) = sent_by_one_client(fl.error_feedback(fl.top_k(3), decay=0.5))
    error = np.zeros((6, 4))
    for update, expected_sent, expected in zip(UPDATES, sent, errors, strict=True):
        corrected = update + 0.5 * error
        kept = np.zeros(24)
        largest = np.argsort(-np.abs(corrected).ravel(), stable=True)[:3]
        kept[largest] = corrected.ravel()[largest]
        error = corrected - kept.reshape(6, 4)
        np.testing.assert_allclose(kept.reshape(6, 4), expected_sent, atol=1e-6)
        np.testing.assert_allclose(error, expected, atol=1e-6)


def test_what_is_kept_is_forgotten_when_it_is_too_old():
    transform = fl.error_feedback(fl.top_k(1), max_age=2)
    update = jnp.array([1.0, 2.0])
    state = transform.init(update)
    send = jax.jit(
        lambda state, entry: (
            transform.client(KEYS[0], state, fl.Message(update, 1.0, entry), None).entry
        )
    )
    entry = send(state, transform.entry(update))
    # With what was kept, it is 2 and 2, of which the first is sent; without, 1 and 2.
    for age, kept in [(1, [0.0, 2.0]), (2, [0.0, 2.0]), (3, [1.0, 0.0])]:
        _, state, _ = transform.server(KEYS[0], state, fl.Received(update))
        (error, _), since = send(state, entry)
        assert error.tolist() == kept
        assert since == age


def test_ef21_keeps_the_mean_of_all_estimates():
    """Three clients of ten in a round, one of which has no examples, against the paper's steps."""
    population = regression_dataset().resident()
    options = {"batch_size": 4, "shuffle": False}
    algorithm = fl.fed_avg(
        regression_model(), optax.sgd(0.1), pipeline=fl.ef21(fl.top_k(2)), **options
    )
    plain = fl.fed_avg(regression_model(), optax.sgd(0.1), **options)
    start = {"b": jnp.float32(0.5), "w": jnp.array([1.0, 2.0, -1.0])}
    state = algorithm.init(start, num_clients=10)
    estimates, vector = np.zeros((10, 4)), np.array([0.5, 1.0, 2.0, -1.0])
    for ids in ([0, 1, 3], [3, 4, 5], [0, 8, 9], [3, 1, 0]):
        for i in ids:
            if SIZES[i]:
                alone, _ = plain.round(KEYS[0], plain.init(state.params), everyone(population, [i]))
                after = np.append(alone.params["b"], alone.params["w"])
                differing = vector - after - estimates[i]
                largest = np.argsort(-np.abs(differing), stable=True)[:2]
                estimates[i, largest] += differing[largest]
        state, info = algorithm.round(KEYS[0], state, everyone(population, ids))
        np.testing.assert_array_equal(info.clients["bits_up"], 67.0 * (np.array(SIZES)[ids] > 0))
        vector = vector - estimates.mean(0)
        found = np.append(state.params["b"], state.params["w"])
        np.testing.assert_allclose(found, vector, rtol=1e-4, atol=1e-5)
        vector = found.astype(float)
    kept, _ = state.pipeline_store
    np.testing.assert_allclose(np.column_stack([kept["b"], kept["w"]]), estimates, atol=1e-4)


def test_ef21_comes_to_send_nothing():
    transform = fl.ef21(fl.drive())
    update = UPDATES[0]

    @jax.jit
    def run(entry, state):
        def round(entry, key):
            sent = transform.client(key, state, fl.Message(update, 3.0, entry), None)
            return sent.entry, (optax.tree.norm(sent.update), sent.weight)

        return jax.lax.scan(round, entry, jax.random.split(KEYS[0], 60))

    (estimate, _), (norms, weights) = run(transform.entry(update), transform.init(update))
    np.testing.assert_allclose(estimate, update, atol=1e-4)
    assert norms[-1] < 1e-4 * norms[0]
    assert (weights == 1).all()


def test_the_majority_of_signs():
    population = fl.FederatedDataset.from_clients(
        [{"x": x} for x in ([[1.0, -3.0, 2.0]], [[5.0, -1.0, -9.0]], [[7.0, -1.0, 0.5]])]
    ).resident()
    model = fl.function_model(lambda w, batch: -batch["x"] @ w)
    algorithm = fl.fed_avg(model, optax.sgd(1.0), pipeline=fl.sign_sgd(), weighting="uniform")
    state, expected = algorithm.init(jnp.zeros(3)), np.zeros(3)
    # All three; two who are not of one mind about the last, which stays; one.
    for ids, majority in (([0, 1, 2], [1, -1, 1]), ([1, 2], [1, -1, 0]), ([1], [1, -1, -1])):
        state, info = algorithm.round(KEYS[0], state, everyone(population, ids, capacity=3))
        expected += majority
        np.testing.assert_array_equal(state.params, expected)
        assert info.clients["bits_up"].tolist() == [3.0] * len(ids) + [0.0] * (3 - len(ids))
