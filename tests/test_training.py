"""Local training with hooks, against loops over clients in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import SIZES, everyone, regression_dataset, regression_model

import fedjax_lite as fl

KEY = jax.random.key(7)
COHORTS = [[3, 0, 9, 1], [8, 3, 2, 7], [3, 9, 0, 5]]
RATE, MOMENTUM = 0.05, 0.9


def start():
    return np.array([0.5, -1.0, 2.0, 0.25])


def as_params(flat):
    return {"w": jnp.asarray(flat[:3]), "b": jnp.asarray(flat[3])}


def flat(params):
    return np.append(np.asarray(params["w"]), float(params["b"]))


@functools.cache
def rows(client):
    own = regression_dataset()[client]
    x = np.asarray(own["x"], np.float64)
    return np.append(x, np.ones((len(x), 1)), axis=1), np.asarray(own["y"], np.float64)


def gradients(client, epochs=2, batch_size=4):
    """The gradients of a client's batches, as functions of the params."""
    x, y = rows(client)
    for _ in range(epochs):
        for first in range(0, len(y), batch_size):
            batch = slice(first, first + batch_size)
            yield lambda w, x=x[batch], y=y[batch]: x.T @ (x @ w - y) / len(y)


def run(client_update, **options):
    """The params after all rounds, and the last state, in float64."""
    with jax.enable_x64(True):
        dataset = regression_dataset()
        dataset = dataset.map(lambda own: {k: np.asarray(v, np.float64) for k, v in own.items()})
        algorithm = client_update(
            model=regression_model(), batch_size=4, num_epochs=2, shuffle=False, **options
        )
        state = algorithm.init(as_params(start()), num_clients=len(SIZES))
        for i, ids in enumerate(COHORTS):
            cohort = everyone(dataset.resident(options.get("mesh")), ids, capacity=6)
            state, info = algorithm.round(jax.random.fold_in(KEY, i), state, cohort)
        return flat(state.params), jax.device_get(state), jax.device_get(info)


def of_hooks(**hooks):
    def make(model, **options):
        client_update = fl.local_training(
            model, optax.sgd(RATE), weighting=hooks.pop("weighting", "uniform"), **hooks
        )
        return fl.federated_algorithm(model, client_update, optax.sgd(1.0), **options)

    return make


def loop(train, weigh=lambda client: SIZES[client]):
    """FedAvg by hand: `train(params, client) -> params`."""
    w = start()
    for ids in COHORTS:
        after = [(weigh(i), train(w, i)) for i in ids if SIZES[i]]
        w = sum(p * own for p, own in after) / sum(p for p, _ in after)
    return w


def momentum_sgd(mu, **options):
    """`run` of an optimizer with a state."""
    optimizer = optax.sgd(RATE, momentum=MOMENTUM)
    factory = functools.partial(fl.fed_prox, mu=mu) if mu else fl.fed_avg
    return run(functools.partial(factory, client_optimizer=optimizer), **options)


@functools.cache
def begun_afresh(mu):
    """The params if clients keep no state of the optimizer."""
    return momentum_sgd(mu, mesh=fl.clients_mesh(1))[0]


@pytest.mark.parametrize("mu", [0.0, 0.3])
@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("lanes", [1, 3])
def test_optimizers_keep_their_state_between_rounds(mu, num_devices, lanes):
    if jax.device_count() < num_devices:
        pytest.skip("needs more devices")
    traces = {}

    def train(w, client):
        own, trace = w, traces.get(client, np.zeros(4))
        for gradient in gradients(client):
            trace = MOMENTUM * trace + gradient(own) + mu * (own - w)
            own = own - RATE * trace
        traces[client] = trace
        return own

    expected = loop(train)
    layout = {"mesh": fl.clients_mesh(num_devices), "lanes": lanes}
    actual, state, _ = momentum_sgd(mu, keep_optimizer_state=True, **layout)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)
    kept = state.store.opt_state[0].trace
    for client in range(len(SIZES)):
        own = flat(jax.tree.map(lambda x, i=client: x[i], kept))
        np.testing.assert_allclose(own, traces.get(client, np.zeros(4)), rtol=1e-9, atol=1e-12)
    assert not np.allclose(begun_afresh(mu), expected, rtol=1e-3)


def test_an_objective_and_what_is_kept_make_fed_dyn():
    alpha, kept = 0.4, {}

    def train(w, client):
        own, h = w, kept.get(client, np.zeros(4))
        for gradient in gradients(client):
            own = own - RATE * (gradient(own) - h + alpha * (own - w))
        kept[client] = h - alpha * (own - w)
        return own

    def objective(loss, params, server, client, batch, key):
        moved = optax.tree.sub(params, server.params)
        pull = alpha / 2 * optax.tree.norm(moved, squared=True)
        return loss - optax.tree.vdot(client.entry, params) + pull

    def finish(result, server, client, trained):
        return result._replace(entry=optax.tree.add_scale(client.entry, alpha, result.update))

    expected = loop(train, lambda client: 1)
    hooks = {
        "objective": objective,
        "finish": finish,
        "entry": lambda server: optax.tree.zeros_like(server.params),
    }
    actual, state, _ = run(of_hooks(**hooks))
    np.testing.assert_allclose(actual, expected, rtol=1e-9)
    for client, h in kept.items():
        own = flat(jax.tree.map(lambda x, i=client: x[i], state.store))
        np.testing.assert_allclose(own, h, rtol=1e-9)


@pytest.mark.parametrize("keep_optimizer_state", [False, True])
def test_a_part_of_ones_own_makes_fed_per(keep_optimizer_state):
    own_bias = {}

    def train(w, client):
        own = np.append(w[:3], own_bias.get(client, start()[3]))
        for gradient in gradients(client):
            own = own - RATE * gradient(own)
        own_bias[client] = own[3]
        return np.append(own[:3], start()[3])

    def begin(server, client):
        return {**server.params, "b": client.entry}

    def finish(result, server, client, trained):
        update = {**result.update, "b": jnp.zeros_like(result.update["b"])}
        return result._replace(update=update, entry=trained.params["b"])

    actual, state, _ = run(
        of_hooks(
            begin=begin,
            finish=finish,
            entry=lambda server: server.params["b"],
            weighting="examples",
            keep_optimizer_state=keep_optimizer_state,
        )
    )
    np.testing.assert_allclose(actual, loop(train), rtol=1e-9)
    biases = state.store.entry if keep_optimizer_state else state.store
    expected = [own_bias.get(i, start()[3]) for i in range(len(SIZES))]
    np.testing.assert_allclose(biases, expected, rtol=1e-9)


def test_an_attack_is_what_some_clients_send():
    attackers, norms = (0, 7), {-1: 0.0}

    def train(w, client):
        own = w
        for gradient in gradients(client):
            own = own - RATE * gradient(own)
        sent = (w - own) * (-3 if client in attackers else 1)
        norms[client] = np.linalg.norm(sent)
        return w - sent

    def finish(result, server, client, trained):
        attacks = jnp.isin(client.id, jnp.array(attackers))
        factor = jnp.where(attacks, -3.0, 1.0)
        return result._replace(
            update=optax.tree.scale(factor, result.update),
            metrics={**result.metrics, "attacks": attacks},
        )

    actual, _, info = run(of_hooks(finish=finish))
    np.testing.assert_allclose(actual, loop(train, lambda client: 1), rtol=1e-9)
    ids = COHORTS[-1] + [-1, -1]
    np.testing.assert_array_equal(info.clients["attacks"], np.isin(ids, attackers))
    np.testing.assert_allclose(info.clients["update_norm"], [norms[i] for i in ids], rtol=1e-9)


def test_without_hooks_it_is_fed_avg():
    plain, _, _ = run(functools.partial(fl.fed_avg, client_optimizer=optax.sgd(RATE)))
    hooked, _, _ = run(of_hooks(weighting="examples"))
    np.testing.assert_array_equal(plain, hooked)


def test_what_hooks_return_is_checked():
    algorithm = of_hooks(objective=lambda loss, *_: loss * jnp.ones(2))
    with pytest.raises(ValueError, match=r"objective returned an array \(2,\); return a scalar"):
        run(algorithm)
    with pytest.raises(TypeError, match="what finish returned"):
        run(of_hooks(finish=lambda result, *_: result.update))
    with pytest.raises(ValueError, match="num_clients is None"):
        fl.fed_avg(regression_model(), optax.adam(0.1), keep_optimizer_state=True).init(KEY)
    with pytest.raises(ValueError, match="keep_optimizer_state is 2; choose"):
        fl.fed_avg(regression_model(), optax.adam(0.1), keep_optimizer_state=2)


def test_kept_state_follows_schedules_and_resumes(tmp_path):
    """Adam counts a client's own steps, over all of its rounds."""
    dataset = regression_dataset()
    arguments = {
        "algorithm": fl.fed_avg(
            regression_model(),
            optax.adam(optax.cosine_decay_schedule(0.1, 50)),
            batch_size=2,
            keep_optimizer_state=True,
        ),
        "population": dataset.resident(),
        "sampler": fl.samplers.everyone(len(SIZES)),
        "key": KEY,
    }
    whole = fl.train(num_rounds=6, **arguments)
    fl.train(num_rounds=3, checkpoints=fl.Checkpoints(tmp_path, every=3), **arguments)
    resumed = fl.train(num_rounds=6, checkpoints=fl.Checkpoints(tmp_path, every=3), **arguments)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    steps = 6 * -(-np.array(SIZES) // 2)
    np.testing.assert_array_equal(whole.state.store.opt_state[0].count, steps)
