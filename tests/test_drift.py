"""Algorithms against client drift, and APFL: in PyTorch, client by client and step by step."""

import jax
import numpy as np
import optax
import pytest
import torch
from problems import SIZES, regression_dataset, regression_model
from pytorch import close, torch_batches

import fedjax_lite as fl
from fedjax_lite.batches import Batching

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


def test_clients_are_evaluated_with_params_of_their_own():
    model, dataset = regression_model(), regression_dataset()
    population = dataset.resident()
    algorithm = fl.apfl(model, optax.sgd(LR), **OPTIONS)
    state = algorithm.init(jax.random.key(0), num_clients=len(SIZES))
    for r in range(5):
        cohort = fl.cohort_of(population, [0, 3, 5, 7])
        state, _ = algorithm.round(jax.random.key(r), state, cohort)
    everyone = fl.cohort_of(population, range(len(SIZES)))
    found = fl.evaluate_clients(model, state, everyone, client_params=algorithm.client_params)
    for i in range(len(SIZES)):
        entry = jax.tree.map(lambda x, i=i: np.asarray(x[i]), state.store)
        mixed = (
            entry.alpha * flat(entry.params) + (1 - entry.alpha) * flat(state.params)
            if i in (0, 3, 5, 7)
            else flat(state.params)
        )
        x, y = dataset[i]["x"], dataset[i]["y"]
        losses = (x @ mixed[:3] + mixed[3] - y) ** 2 / 2
        expected = losses.mean() if len(y) else np.nan
        np.testing.assert_allclose(found.clients["loss"][i], expected, rtol=1e-5)
    other = algorithm.init(jax.random.key(0), num_clients=3)
    with pytest.raises(ValueError, match=r"state.store.* population of 10 clients"):
        fl.evaluate_clients(model, other, everyone, client_params=algorithm.client_params)


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
