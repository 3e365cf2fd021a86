"""The tutorial's loop in PyTorch, client by client and batch by batch, against ours."""

import copy
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from problems import regression_dataset, regression_model
from pytorch import close, torch_batches

import fedjax_lite as fl
from fedjax_lite.engine.batches import Batching

ROUNDS = 10  # Cohorts have as many sizes in turn.
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def torch_halfspace(params, dtype):
    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(2, 1, dtype=dtype)

        def forward(self, x):
            return torch.sigmoid(torch.nn.functional.leaky_relu(self.linear(x), 0.2))[:, 0]

    module = Classifier()
    with torch.no_grad():
        module.linear.weight.copy_(torch.tensor(np.array(params["weight"]))[None])
        module.linear.bias.copy_(torch.tensor(np.array(params["bias"])))
    return module


def torch_mlp(params, dtype):
    layers = []
    for name in sorted(params):
        kernel = torch.tensor(np.array(params[name]["kernel"]))
        layer = torch.nn.Linear(*kernel.shape, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(kernel.T)
            layer.bias.copy_(torch.tensor(np.array(params[name]["bias"])))
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def halfspace_params(module):
    return {
        "weight": module.linear.weight.detach().numpy()[0],
        "bias": module.linear.bias.detach().numpy()[0],
    }


def mlp_params(module):
    layers = [layer for layer in module if isinstance(layer, torch.nn.Linear)]
    return {
        f"Dense_{i}": {
            "bias": layer.bias.detach().numpy(),
            "kernel": layer.weight.detach().numpy().T,
        }
        for i, layer in enumerate(layers)
    }


@pytest.mark.parametrize(
    ("dtype", "rounds", "tolerance"), [("float64", ROUNDS, 1e-9), ("float32", 1, 1e-5)]
)
def test_halfspace_agrees_with_pytorch(dtype, rounds, tolerance):
    with jax.enable_x64(dtype == "float64"):
        model = fl.models.halfspace_classifier()
        algorithm = fl.fed_sgd(model, optax.adam(1.0), reduction="sum")
        population = fl.data.halfspace(batch_size=100)
        state = start = algorithm.init(jax.random.key(3))
        evaluate = jax.jit(functools.partial(fl.evaluate, model))

        module = torch_halfspace(state.params, DTYPES[dtype])
        optimizer = torch.optim.Adam(module.parameters(), lr=1.0)
        criterion = torch.nn.BCELoss()
        for r in range(rounds):
            key_cohort, key_round, key_points = jax.random.split(
                jax.random.fold_in(jax.random.key(0), r), 3
            )
            points = fl.data.halfspace_batch(key_points, 1000)
            ours = jax.device_get(evaluate(state, points))
            x, y = torch.tensor(np.array(points["x"])), torch.tensor(np.array(points["y"]))
            with torch.no_grad():
                probability = module(x)
                loss = criterion(probability, y).item()
                accuracy = ((probability > 0.5) == (y > 0.5)).double().mean().item()
            np.testing.assert_allclose(ours["loss"], loss, rtol=tolerance)
            np.testing.assert_allclose(ours["accuracy"], accuracy, rtol=1e-6)

            cohort = fl.cohort(key_cohort, population, 20 + r % 10, capacity=29)
            state, _ = algorithm.round(key_round, state, cohort)
            gradients = []
            for client in torch_batches(
                cohort, key_round, max_steps=9, batching=Batching(batch_size=100)
            ):
                if client:
                    total = sum(criterion(module(batch["x"]), batch["y"]) for batch in client)
                    gradients.append(torch.autograd.grad(total, list(module.parameters())))
            assert len(gradients) == 20 + r % 10
            for parameter, *parts in zip(module.parameters(), *gradients, strict=True):
                parameter.grad = torch.stack(parts).sum(0)
            optimizer.step()
        close(state.params, halfspace_params(module), start.params, tolerance)


@pytest.mark.parametrize(
    ("dtype", "rounds", "tolerance"), [("float64", ROUNDS, 1e-9), ("float32", 1, 1e-5)]
)
def test_digits_agree_with_pytorch(dtype, rounds, tolerance):
    with jax.enable_x64(dtype == "float64"):
        dataset, held_out = fl.data.digits()
        cast = lambda tree: {**tree, "x": tree["x"].astype(dtype)}
        population = fl.FederatedDataset(
            examples=cast(dataset.examples),
            offsets=dataset.offsets,
            client_ids=dataset.client_ids,
        ).resident()
        held_out = cast(held_out)
        model = fl.models.mlp(input_shape=(64,), hidden=(32,), num_classes=10)
        algorithm = fl.fed_sgd(model, optax.adam(0.01), batch_size=16)
        evaluate = jax.jit(functools.partial(fl.evaluate, model))
        params, _ = model.init(jax.random.key(3))
        state = start = algorithm.init(jax.tree.map(lambda p: p.astype(dtype), params))

        module = torch_mlp(state.params, DTYPES[dtype])
        # optax adds epsilon to the root of the corrected second moment, as PyTorch does.
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        x, y = torch.tensor(held_out["x"]), torch.tensor(held_out["y"], dtype=torch.long)
        for r in range(rounds):
            ours = jax.device_get(evaluate(state, held_out))
            with torch.no_grad():
                loss = torch.nn.functional.cross_entropy(module(x), y).item()
                accuracy = (module(x).argmax(1) == y).double().mean().item()
            np.testing.assert_allclose(ours["loss"], loss, rtol=tolerance)
            np.testing.assert_allclose(ours["accuracy"], accuracy, rtol=1e-6)

            key_cohort, key_round = jax.random.split(jax.random.fold_in(jax.random.key(0), r))
            cohort = fl.cohort(key_cohort, population, 20 + r % 10, capacity=29)
            state, _ = algorithm.round(key_round, state, cohort)
            gradients, sizes = [], []
            for client in torch_batches(
                cohort, key_round, max_steps=9, batching=Batching(batch_size=16)
            ):
                if client:
                    sizes.append(sum(len(batch["y"]) for batch in client))
                    total = sum(
                        torch.nn.functional.cross_entropy(
                            module(batch["x"]), batch["y"].long(), reduction="sum"
                        )
                        for batch in client
                    )
                    gradients.append(
                        torch.autograd.grad(total / sizes[-1], list(module.parameters()))
                    )
            assert sum(sizes) == cohort.num_examples.sum()
            for parameter, *parts in zip(module.parameters(), *gradients, strict=True):
                weighted = [size * part for size, part in zip(sizes, parts, strict=True)]
                parameter.grad = torch.stack(weighted).sum(0) / sum(sizes)
            optimizer.step()
        close(state.params, mlp_params(module), start.params, tolerance)


MU = 0.7
FED_AVG = {
    "sgd": (
        lambda: fl.fed_avg(regression_model(), optax.sgd(0.1), batch_size=4),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=1.0),
        Batching(batch_size=4, shuffle=True),
    ),
    "momentum_epochs_adam": (
        lambda: fl.fed_avg(
            regression_model(),
            optax.sgd(0.05, momentum=0.9),
            optax.adam(0.1),
            batch_size=5,
            num_epochs=3,
        ),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.1),
        Batching(batch_size=5, num_epochs=3, shuffle=True),
    ),
    "adam_steps_momentum": (
        lambda: fl.fed_avg(
            regression_model(),
            optax.adam(0.02),
            optax.sgd(0.7, momentum=0.5),
            batch_size=3,
            num_steps=4,
        ),
        lambda p: torch.optim.Adam(p, lr=0.02),
        lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.5),
        Batching(batch_size=3, num_steps=4, shuffle=True),
    ),
    "clipped": (
        lambda: fl.fed_avg(
            regression_model(),
            optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
            batch_size=4,
            shuffle=False,
        ),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=1.0),
        Batching(batch_size=4),
    ),
    "proximal": (
        lambda: fl.fed_prox(
            regression_model(),
            optax.sgd(0.05, momentum=0.9),
            mu=MU,
            batch_size=4,
            num_epochs=2,
        ),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=1.0),
        Batching(batch_size=4, num_epochs=2, shuffle=True),
    ),
}


@pytest.mark.parametrize("name", FED_AVG)
def test_fed_avg_agrees_with_pytorch(name):
    build, client_optimizer, server_optimizer, batching = FED_AVG[name]
    with jax.enable_x64(True):
        dataset = regression_dataset()
        examples = {key: value.astype(np.float64) for key, value in dataset.examples.items()}
        population = fl.FederatedDataset(
            examples=examples, offsets=dataset.offsets, client_ids=dataset.client_ids
        ).resident()
        algorithm = build()
        state = start = algorithm.init({"w": np.zeros(3), "b": np.float64(0.5)})
        module = torch.nn.Linear(3, 1, dtype=torch.float64)
        with torch.no_grad():
            module.weight.zero_()
            module.bias.fill_(0.5)
        optimizer = server_optimizer(module.parameters())
        for r in range(3):
            key_cohort, key_round = jax.random.split(jax.random.fold_in(jax.random.key(0), r))
            cohort = fl.cohort(key_cohort, population, 7)
            state, _ = algorithm.round(key_round, state, cohort)
            deltas, sizes = [], []
            clients = torch_batches(cohort, key_round, max_steps=12, batching=batching)
            for slot, client in enumerate(clients):
                local = copy.deepcopy(module)
                local_optimizer = client_optimizer(local.parameters())
                for batch in client:
                    local_optimizer.zero_grad()
                    residual = local(batch["x"])[:, 0] - batch["y"]
                    loss = (residual**2 / 2).mean()
                    if name == "proximal":
                        pairs = zip(local.parameters(), module.parameters(), strict=True)
                        loss += MU / 2 * sum(((w - start) ** 2).sum() for w, start in pairs)
                    loss.backward()
                    if name == "clipped":
                        torch.nn.utils.clip_grad_norm_(local.parameters(), 0.5)
                    local_optimizer.step()
                pairs = zip(module.parameters(), local.parameters(), strict=True)
                deltas.append([(before - after).detach() for before, after in pairs])
                sizes.append(int(cohort.num_examples[slot]))
            for parameter, *parts in zip(module.parameters(), *deltas, strict=True):
                weighted = [size * part for size, part in zip(sizes, parts, strict=True)]
                parameter.grad = torch.stack(weighted).sum(0) / sum(sizes)
            optimizer.step()
        expected = {"b": module.bias.detach().numpy()[0], "w": module.weight.detach().numpy()[0]}
        # clip_grad_norm_ divides by the norm plus 1e-6, by definition of PyTorch's.
        close(state.params, expected, start.params, 1e-6 if name == "clipped" else 1e-9)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, *, train, mask=None):
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.8, epsilon=1e-3)
        hidden = nn.relu(nn.Dense(4)(x))
        return nn.Dense(1)(norm(hidden, mask=mask[:, None]))


class TorchNormalised(torch.nn.Module):
    """PyTorch's BatchNorm would follow the unbiased variance, and refuse a single example."""

    def __init__(self, params):
        super().__init__()
        self.layers = torch_mlp(
            {name: params[name] for name in ("Dense_0", "Dense_1")}, torch.float64
        )
        # The weight of the new value; flax's momentum is that of the old one.
        self.norm = torch.nn.BatchNorm1d(4, momentum=0.2, eps=1e-3, dtype=torch.float64)

    def forward(self, x):
        hidden, norm = self.layers[:2](x), self.norm
        mean, variance = hidden.mean(0), hidden.var(0, correction=0)
        norm.running_mean.lerp_(mean.detach(), norm.momentum)
        norm.running_var.lerp_(variance.detach(), norm.momentum)
        hidden = (hidden - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
        return self.layers[2](hidden)[:, 0]

    def params(self):
        scale, bias = self.norm.weight.detach().numpy(), self.norm.bias.detach().numpy()
        return {"BatchNorm_0": {"bias": bias, "scale": scale}, **mlp_params(self.layers)}


def weighted_mean(states, weights):
    total = lambda name: sum(w * state[name] for w, state in zip(weights, states, strict=True))
    return {name: total(name) / sum(weights) for name in states[0]}


def test_fed_avg_with_batch_norm_agrees_with_pytorch():
    with jax.enable_x64(True):
        dataset = regression_dataset()
        examples = {key: value.astype(np.float64) for key, value in dataset.examples.items()}
        population = fl.FederatedDataset(
            examples=examples, offsets=dataset.offsets, client_ids=dataset.client_ids
        ).resident()
        model = fl.linen_model(
            Normalised(),
            jnp.zeros((1, 3)),
            lambda predictions, batch: (predictions[:, 0] - batch["y"]) ** 2 / 2,
        )
        # Ten clients, one of them empty; those with 1, 5 and 9 examples have a batch of one.
        algorithm = fl.fed_avg(model, optax.sgd(0.1), batch_size=4, num_epochs=2)
        batching = Batching(batch_size=4, num_epochs=2, shuffle=True)
        drawn = model.init(jax.random.key(3))
        start = state = algorithm.init(*jax.tree.map(lambda x: x.astype(np.float64), drawn))
        module = TorchNormalised(start.params)
        for r in range(3):
            key_cohort, key_round = jax.random.split(jax.random.fold_in(jax.random.key(0), r))
            cohort = fl.cohort(key_cohort, population, 10)
            state, _ = algorithm.round(key_round, state, cohort)
            trained = []
            for client in torch_batches(cohort, key_round, max_steps=6, batching=batching):
                local = copy.deepcopy(module)
                optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
                for batch in client:
                    optimizer.zero_grad()
                    ((local(batch["x"]) - batch["y"]) ** 2 / 2).mean().backward()
                    optimizer.step()
                trained.append(local.state_dict())
            # Params and running statistics alike: what is empty has a weight of zero.
            module.load_state_dict(weighted_mean(trained, cohort.num_examples.tolist()))
        close(state.params, module.params(), start.params, 1e-9)
        norm = module.norm
        statistics = {"mean": norm.running_mean.numpy(), "var": norm.running_var.numpy()}
        statistics = {"batch_stats": {"BatchNorm_0": statistics}}
        close(state.model_state, statistics, start.model_state, 1e-9)
