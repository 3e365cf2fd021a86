"""Algorithms against client drift, and APFL: in PyTorch, client by client and step by step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from problems import SIZES, everyone, regression_dataset, regression_model
from pytorch import close, torch_batches

import fedjax_lite as fl
from fedjax_lite.engine.batches import Batching

LR, MU, MOMENTUM = 0.05, 0.7, 0.6
BATCHING = Batching(batch_size=4, num_epochs=2, shuffle=True)
OPTIONS = {"batch_size": 4, "num_epochs": 2}


def flat(params):
    """Params, or those of all clients `[clients, ...]`, as `[..., 4]`."""
    return np.concatenate([np.asarray(params["w"]), np.asarray(params["b"])[..., None]], -1)


def gradient(params, batch):
    params = params.detach().requires_grad_()
    residual = batch["x"] @ params[:3] + params[3] - batch["y"]
    return torch.autograd.grad((residual**2 / 2).mean(), params)[0]


def rounds(algorithm, num_rounds=4):
    """The states of some rounds in float64, and for each the clients' ids, sizes and batches."""
    dataset = regression_dataset()
    examples = {key: value.astype(np.float64) for key, value in dataset.examples.items()}
    population = fl.FederatedDataset(
        examples=examples, offsets=dataset.offsets, client_ids=dataset.client_ids
    ).resident()
    state = algorithm.init({"w": np.zeros(3), "b": np.float64(0.5)}, num_clients=len(SIZES))
    for r in range(num_rounds):
        key_cohort, key_round = jax.random.split(jax.random.fold_in(jax.random.key(0), r))
        cohort = fl.cohort(key_cohort, population, 7)
        state, _ = algorithm.round(key_round, state, cohort)
        batches = torch_batches(cohort, key_round, max_steps=24, batching=BATCHING)
        ids, sizes = cohort.client_ids.tolist(), cohort.num_examples.tolist()
        clients = zip(ids, sizes, batches, strict=True)
        yield state, [client for client in clients if client[1] > 0]


def start():
    return torch.tensor([0, 0, 0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("option", [1, 2])
@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_scaffold_agrees_with_pytorch(option, weighting):
    x, c = start(), torch.zeros(4, dtype=torch.float64)
    own = {i: torch.zeros_like(c) for i in range(len(SIZES))}
    with jax.enable_x64(True):
        algorithm = fl.scaffold(
            regression_model(), optax.sgd(LR), option=option, weighting=weighting, **OPTIONS
        )
        for state, clients in rounds(algorithm):
            deltas, weights, change = [], [], torch.zeros_like(c)
            for client_id, size, batches in clients:
                y, c_i = x.clone(), own[client_id]
                for batch in batches:
                    y = y - LR * (gradient(y, batch) - c_i + c)
                if option == 1:
                    everything = {
                        name: torch.cat([batch[name] for batch in batches]) for name in ("x", "y")
                    }
                    own[client_id] = gradient(x, everything)
                else:
                    own[client_id] = c_i - c + (x - y) / (len(batches) * LR)
                change += own[client_id] - c_i
                deltas.append(x - y)
                weights.append(1 if weighting == "uniform" else size)
            x = x - sum(w * d for w, d in zip(weights, deltas, strict=True)) / sum(weights)
            c = c + change / len(SIZES)
            close(flat(state.params), x.numpy(), start().numpy(), 1e-9)
            np.testing.assert_allclose(flat(state.opt_state.control), c, rtol=1e-9)
            np.testing.assert_allclose(flat(state.store).mean(0), c, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(flat(state.store), torch.stack(list(own.values())), rtol=1e-9)


def test_scaffold_sums_up_gradients_where_params_do_not_tell():
    population = regression_dataset().resident()
    unbounded = optax.chain(optax.clip(np.inf), optax.sgd(LR))  # Plain SGD, though no one can see.
    with jax.enable_x64(True):
        states = []
        for optimizer in (optax.sgd(LR), unbounded):
            algorithm = fl.scaffold(regression_model(), optimizer, **OPTIONS)
            state = algorithm.init(jax.random.key(0), num_clients=len(SIZES))
            for r in range(2):
                state, _ = algorithm.round(jax.random.key(r), state, everyone(population))
            states.append(state)
    kept = [flat(state.store) for state in states]
    assert np.abs(kept[0]).max() > 0.1
    np.testing.assert_allclose(*kept, rtol=1e-9)


NOVA = {
    "plain": (optax.sgd(LR), {}, lambda steps: LR * steps),
    "momentum": (
        optax.sgd(LR, momentum=MOMENTUM),
        {},
        lambda steps: (
            LR * (steps - MOMENTUM * (1 - MOMENTUM**steps) / (1 - MOMENTUM)) / (1 - MOMENTUM)
        ),
    ),
    "proximal": (optax.sgd(LR), {"mu": MU}, lambda steps: (1 - (1 - LR * MU) ** steps) / MU),
}


@pytest.mark.parametrize("name", NOVA)
def test_fed_nova_agrees_with_pytorch(name):
    optimizer, options, length = NOVA[name]
    x = start()
    with jax.enable_x64(True):
        algorithm = fl.fed_nova(regression_model(), optimizer, optax.sgd(0.9), **OPTIONS, **options)
        for state, clients in rounds(algorithm):
            total = sum(size for _, size, _ in clients)
            direction, effective = torch.zeros_like(x), 0.0
            for _, size, batches in clients:
                y, velocity = x.clone(), torch.zeros_like(x)
                for batch in batches:
                    pull = options.get("mu", 0.0) * (y - x)
                    decay = MOMENTUM if name == "momentum" else 0.0
                    velocity = decay * velocity + gradient(y, batch) + pull
                    y = y - LR * velocity
                direction += size / total * (x - y) / length(len(batches))
                effective += size / total * length(len(batches))
            x = x - 0.9 * effective * direction
            close(flat(state.params), x.numpy(), start().numpy(), 1e-9)


def test_fed_nova_of_equal_clients_is_fed_avg():
    population = regression_dataset([6] * 5).resident()
    cohort = fl.cohort(jax.random.key(0), population, 5)
    states = []
    for algorithm in (fl.fed_nova, fl.fed_avg):
        built = algorithm(regression_model(), optax.sgd(LR, momentum=0.9), batch_size=4)
        states.append(built.round(jax.random.key(1), built.init(jax.random.key(2)), cohort)[0])
    np.testing.assert_allclose(flat(states[0].params), flat(states[1].params), rtol=1e-5)


@pytest.mark.parametrize("layerwise", [False, True])
def test_apfl_agrees_with_pytorch(layerwise):
    parts = [slice(0, 3), slice(3, 4)] if layerwise else [slice(0, 4)]
    w = start()
    own, shares = {}, {}
    with jax.enable_x64(True):
        algorithm = fl.apfl(
            regression_model(), optax.sgd(LR), alpha=0.4, layerwise=layerwise, **OPTIONS
        )
        for state, clients in rounds(algorithm):
            deltas, sizes = [], []
            for client_id, size, batches in clients:
                local = w.clone()
                v = own.get(client_id, w)
                alpha = shares.get(client_id, [0.4] * len(parts))
                for batch in batches:
                    spread = torch.zeros_like(w)
                    for part, share in zip(parts, alpha, strict=True):
                        spread[part] = share
                    at_mix = gradient(spread * v + (1 - spread) * local, batch)
                    slopes = [float((v - local)[part] @ at_mix[part]) for part in parts]
                    v, local = v - LR * spread * at_mix, local - LR * gradient(local, batch)
                    alpha = [
                        min(max(share - LR * slope, 0.0), 1.0)
                        for share, slope in zip(alpha, slopes, strict=True)
                    ]
                own[client_id], shares[client_id] = v, alpha
                deltas.append(size * (w - local))
                sizes.append(size)
            w = w - sum(deltas) / sum(sizes)
            close(flat(state.params), w.numpy(), start().numpy(), 1e-9)
    assert len(own) < len(SIZES)  # Client 1 has no examples.
    for client_id, v in own.items():
        np.testing.assert_allclose(flat(state.store.params)[client_id], v, rtol=1e-9)
        alpha = state.store.alpha
        alpha = [alpha["w"], alpha["b"]] if layerwise else [alpha]
        found = [float(share[client_id]) for share in alpha]
        np.testing.assert_allclose(found, shares[client_id], rtol=1e-9)


@pytest.mark.parametrize("memory_kind", ["device", "pinned_host"])
def test_clients_are_evaluated_with_params_of_their_own(memory_kind):
    model, dataset = regression_model(), regression_dataset()
    population = dataset.resident()
    algorithm = fl.apfl(model, optax.sgd(LR), memory_kind=memory_kind, **OPTIONS)
    state = algorithm.init(jax.random.key(0), num_clients=len(SIZES))
    for r in range(5):
        cohort = fl.cohort_of(population, [0, 3, 5, 7])
        state, _ = algorithm.round(jax.random.key(r), state, cohort)
    all_ = everyone(population)
    found = fl.evaluate_clients(model, state, all_, client_model=algorithm.client_model, lanes=3)
    found_losses, store = jax.device_get((found.clients["loss"], state.store))
    for i in range(len(SIZES)):
        entry = jax.tree.map(lambda x, i=i: x[i], store)
        mixed = (
            entry.alpha * flat(entry.params) + (1 - entry.alpha) * flat(state.params)
            if i in (0, 3, 5, 7)
            else flat(state.params)
        )
        x, y = dataset[i]["x"], dataset[i]["y"]
        losses = (x @ mixed[:3] + mixed[3] - y) ** 2 / 2
        expected = losses.mean() if len(y) else np.nan
        np.testing.assert_allclose(found_losses[i], expected, rtol=1e-5)
    other = algorithm.init(jax.random.key(0), num_clients=3)
    with pytest.raises(ValueError, match=r"state.store.* population of 10 clients"):
        fl.evaluate_clients(model, other, all_, client_model=algorithm.client_model)
    nothing = dataclasses.replace(state, store=())
    with pytest.raises(ValueError, match=r"state.store is empty, and client_model is given"):
        fl.evaluate_clients(model, nothing, all_, client_model=algorithm.client_model)


def test_many_steps_add_up_in_half_precision():
    model = fl.function_model(lambda w, batch: -w * batch["x"])  # Gradients are -1.
    population = fl.FederatedDataset.from_clients({0: {"x": np.ones(4, np.float32)}}).resident()
    for option in (1, 2):
        algorithm = fl.scaffold(model, optax.sgd(1e-3), option=option, num_steps=600)
        state = algorithm.init(jnp.bfloat16(0), num_clients=1)
        state, _ = algorithm.round(jax.random.key(0), state, everyone(population))
        assert state.store.dtype == jnp.bfloat16
        assert state.store.tolist() == [-1.0]
        assert state.opt_state.control == -1


def test_a_round_without_weight_changes_no_control_variate():
    population = regression_dataset().resident()
    algorithm = fl.scaffold(regression_model(), optax.sgd(LR), weighting=lambda n: 0 * n)
    state = algorithm.init(jax.random.key(0), num_clients=len(SIZES))
    after, info = algorithm.round(jax.random.key(1), state, everyone(population))
    assert info.skipped
    jax.tree.map(
        np.testing.assert_array_equal,
        (after.store, after.opt_state),
        (state.store, state.opt_state),
    )


def test_what_is_not_finite_is_not_kept():
    def loss(w, batch):  # Infinite where the client's own params have gone.
        return (w - batch["x"]) ** 2 / 2 + jnp.where(w > 2.9, jnp.inf, 0.0) * w

    algorithm = fl.apfl(fl.function_model(loss), optax.sgd(1.0), alpha=1.0, num_steps=3)
    population = fl.FederatedDataset.from_clients({0: {"x": [3.0]}}).resident()
    state = algorithm.init(jnp.float32(0), num_clients=1)
    after, info = algorithm.round(jax.random.key(1), state, everyone(population))
    assert info.num_nonfinite == 1
    jax.tree.map(np.testing.assert_array_equal, after.store, state.store)


@pytest.mark.parametrize("name", ["fed_prox", "fed_nova"])
def test_mu_is_swept_in_half_precision(name):
    population = regression_dataset().resident()
    params = {"w": np.zeros(3, jnp.bfloat16), "b": np.zeros((), jnp.bfloat16)}

    def norm(mu):
        optimizer = optax.sgd(LR, momentum=0.9)
        algorithm = getattr(fl, name)(regression_model(), optimizer, mu=mu, num_epochs=2)
        state, _ = algorithm.round(jax.random.key(1), algorithm.init(params), everyone(population))
        return optax.tree.norm(state.params)

    norms = jax.jit(jax.vmap(norm))(np.float32([0.0, 5.0]))
    assert norms[1] < norms[0]


@pytest.mark.parametrize("build", [fl.scaffold, fl.apfl])
def test_stores_are_swept_on_several_devices(build):
    population = regression_dataset().resident()
    result = fl.sweep(
        lambda rate: build(regression_model(), optax.sgd(rate), batch_size=4),
        population,
        fl.samplers.uniform(10, 4),
        3,
        keys=jax.random.split(jax.random.key(0), 4),
        numbers={"rate": np.array([0.1, 0.1, 0.05, 0.05], np.float32)},
    )
    alone = fl.train(
        build(regression_model(), optax.sgd(0.05), batch_size=4, mesh=fl.clients_mesh(1)),
        regression_dataset().resident(fl.clients_mesh(1)),
        fl.samplers.uniform(10, 4),
        3,
        key=jax.random.split(jax.random.key(0), 4)[3],
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x[3], y, rtol=1e-5, atol=1e-6),
        jax.device_get(result.states.store),
        jax.device_get(alone.state.store),
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: fl.scaffold(m, optax.sgd(1.0), option=3), "option is 3; choose 1 or 2"),
        (lambda m: fl.fed_nova(m, optax.sgd(1.0), mu=-1.0), r"mu is -1.0; choose a number"),
        (lambda m: fl.apfl(m, optax.sgd(1.0), alpha=1.5), r"alpha is 1.5; .* between 0 and 1"),
        (
            lambda m: fl.scaffold(m, optax.sgd(1.0)).init(jax.random.key(0)),
            "num_clients is None, .* pass the size of the population",
        ),
    ],
)
def test_what_is_wrong_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build(regression_model())
