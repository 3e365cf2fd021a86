"""The references that algorithms are compared with: rounds by hand, identities, known optima."""

import math

import numpy as np
import pytest
import torch
from reference import clusters, drift, fair, models, personal
from reference.vectors import Vector, mean, norm
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

SIZES = (7, 0, 1, 12, 5)
COHORTS = [[0, 3, 1], [4, 2, 0], [3, 2, 1, 4], [0, 4]]
REGRESSION = {"w": [0.3, -0.2, 0.1], "b": 0.5}


def regression_clients(sizes=SIZES, seed=0):
    rng = np.random.default_rng(seed)
    clients = []
    for size in sizes:
        x = rng.normal(size=(size, 3))
        clients.append((x, x @ rng.normal(size=3) + 0.1 * rng.normal(size=size)))
    return clients


def labelled_clients(sizes=SIZES, seed=0, classes=3):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(n, 3)), rng.integers(classes, size=n)) for n in sizes]


def network_params(outputs=3, seed=1):
    rng = np.random.default_rng(seed)
    shapes = {"base_w": (3, 4), "base_b": (4,), "head_w": (4, outputs), "head_b": (outputs,)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def draw(clients, cohorts, *, batch_size=4, epochs=2, seed=0):
    """Batches of shuffled epochs, the last of an epoch smaller."""
    rng = np.random.default_rng(seed)

    def client(k):
        orders = [rng.permutation(len(clients[k][0])) for _ in range(epochs)]
        return [
            order[start : start + batch_size]
            for order in orders
            for start in range(0, len(order), batch_size)
        ]

    return [[client(k) for k in cohort] for cohort in cohorts]


def whole(clients, cohorts, steps):
    """Some steps on all examples of a client."""
    return [[[np.arange(len(clients[k][0]))] * steps for k in cohort] for cohort in cohorts]


def close(actual, desired, tolerance=1e-10):
    assert actual.keys() == desired.keys()
    for name in actual:
        np.testing.assert_allclose(actual[name], desired[name], rtol=tolerance, atol=tolerance)


def apart(actual, desired):
    assert norm(actual - desired) > 1e-3


def last(history):
    return history[-1].params


def fed_avg(clients, cohorts=COHORTS, *, rate=0.1, **options):
    options = {"batches": draw(clients, cohorts), "weighting": "examples", **options}
    return drift.fed_avg(
        REGRESSION, clients, models.regression.grad, cohorts=cohorts, rate=rate, **options
    )


# A client with target a has the loss (w - a)^2 / 2 whatever the batch, and the gradient w - a.
PULL = models.Model(
    lambda p, x, y: ((p["w"] - y.mean(0)) ** 2).sum() / 2,
    lambda p, x, y: Vector({"w": p["w"] - y.mean(0)}),
)


def pulled(*targets):
    return [(np.zeros((1, 1)), np.array([a], np.float64)) for a in targets]


def steps(*numbers):
    """A round in which clients 0, 1, ... take these numbers of steps."""
    cohorts = [list(range(len(numbers)))]
    return {"cohorts": cohorts, "batches": [[[np.arange(1)] * n for n in numbers]]}


def least_squares(clients, weights):
    """The minimum of the weighted sum of the clients' mean losses, by normal equations."""
    with_ones = [np.column_stack([x, np.ones(len(y))]) for x, y in clients]
    pairs = list(zip(weights, with_ones, clients, strict=True))
    matrix = sum(p * x.T @ x / len(y) for p, x, (_, y) in pairs)
    target = sum(p * x.T @ y / len(y) for p, x, (_, y) in pairs)
    solution = np.linalg.solve(matrix, target)
    return Vector({"w": solution[:3], "b": solution[3]})


def test_gradients_are_those_of_pytorch():
    x, y = regression_clients()[3]
    loss = lambda p, x, y: ((x @ p["w"] + p["b"] - y) ** 2).mean() / 2
    close(models.regression.grad(REGRESSION, x, y), models.autograd(loss)(REGRESSION, x, y))
    np.testing.assert_allclose(
        models.regression.loss(Vector(REGRESSION), x, y),
        loss(models.tensors(REGRESSION), torch.tensor(x), torch.tensor(y)).item(),
    )
    x, y = labelled_clients()[3]
    params = {"w": np.arange(9.0).reshape(3, 3) / 9, "b": np.zeros(3)}
    shift = np.array([0.3, -1.0, 0.2])

    def shifted(p, x, y):
        logits = x @ p["w"] + p["b"] + torch.tensor(shift)
        return torch.nn.functional.cross_entropy(logits, y)

    close(models.softmax.grad(params, x, y, shift), models.autograd(shifted)(params, x, y))
    np.testing.assert_allclose(
        models.softmax.loss(params, x, y, shift),
        shifted(models.tensors(params), torch.tensor(x), torch.tensor(y)).item(),
    )


def test_batch_norm_is_that_of_pytorch():
    x, y = regression_clients()[3]
    scale, bias = np.array([0.5, 1.0, 1.5, 2.0]), np.array([0.1, -0.1, 0.2, 0.0])
    params = {**network_params(outputs=1), "norm_scale": scale, "norm_bias": bias}
    state = {"norm_mean": np.full(4, 0.2), "norm_var": np.full(4, 3.0)}
    gradient, after = models.normalised_grad(params, state, x, y)
    layer = torch.nn.BatchNorm1d(4, eps=1e-3, momentum=0.2, dtype=torch.float64)
    p = models.tensors(params, requires_grad=True)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(scale))
        layer.bias.copy_(torch.tensor(bias))
        layer.running_mean.copy_(torch.tensor(state["norm_mean"]))
        layer.running_var.copy_(torch.tensor(state["norm_var"]))
    hidden = torch.relu(layer(torch.tensor(x) @ p["base_w"] + p["base_b"]))
    output = (hidden @ p["head_w"] + p["head_b"])[:, 0]
    ((output - torch.tensor(y)) ** 2 / 2).mean().backward()
    for name in ("base_w", "base_b", "head_w", "head_b"):
        np.testing.assert_allclose(gradient[name], p[name].grad, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(gradient["norm_scale"], layer.weight.grad, rtol=1e-9)
    np.testing.assert_allclose(gradient["norm_bias"], layer.bias.grad, rtol=1e-9)
    np.testing.assert_allclose(after["norm_mean"], layer.running_mean, rtol=1e-9)
    # PyTorch follows the unbiased variance.
    seen = (layer.running_var - 0.8 * 3.0) / 0.2 * (len(y) - 1) / len(y)
    np.testing.assert_allclose(after["norm_var"], 0.8 * 3.0 + 0.2 * seen, rtol=1e-9)


def test_fed_avg_by_hand():
    # From 0 with rate 1/2: one step of two ends at 1/2 of 4, two steps at 3/4 of 8.
    clients = [(np.zeros((3, 1)), np.full(3, 4.0)), *pulled(8.0)]
    run = lambda **options: last(
        drift.fed_avg({"w": 0.0}, clients, PULL.grad, rate=0.5, **steps(1, 2), **options)
    )
    close(run(), {"w": (3 * 2 + 6) / 4})
    close(run(weighting="uniform", server_rate=0.5), {"w": (2 + 6) / 4})


def test_fed_avg_of_whole_batches_is_gradient_descent():
    clients = regression_clients()
    everyone = [[0, 1, 2, 3, 4]] * 3
    x, y = (np.concatenate(parts) for parts in zip(*clients, strict=True))
    w = Vector(REGRESSION)
    for _ in everyone:
        w = w - 0.1 * models.regression.grad(w, x, y)
    close(last(fed_avg(clients, everyone, batches=whole(clients, everyone, 1))), w)


def test_fed_dyn_by_hand():
    # Rate 1/2, alpha 1/2, from 0, one step each: to 1 and 3. The duals are -1/2 and -3/2, the mean
    # of the params is 2, h is -1/2 * (1 + 3) / 3 = -2/3, and the server goes to 2 + 4/3 = 10/3.
    clients = pulled(2.0, 6.0, 9.0)
    history = drift.fed_dyn(
        {"w": 0.0},
        clients,
        PULL.grad,
        cohorts=[[0, 1], [2, 0]],
        batches=[[[np.arange(1)]] * 2, [[np.arange(1)], [np.arange(1)] * 2]],
        rate=0.5,
        alpha=0.5,
    )
    close(history[0].params, {"w": 10 / 3})
    assert [float(history[0].duals[k]["w"]) for k in range(3)] == [-0.5, -1.5, 0]
    # Client 2 goes to 10/3 - (10/3 - 9) / 2 = 37/6, by 17/6. Client 0 first follows
    # 10/3 - 2 + 1/2 = 11/6, by -11/12; then 29/12 - 2 + 1/2 - 11/24 = 11/24, by -11/48: to 35/16.
    moved = (17 / 6 - 55 / 48) / 3
    h = -2 / 3 - moved / 2
    close(history[1].params, {"w": (37 / 6 + 35 / 16) / 2 - 2 * h})
    close(history[1].duals[0], {"w": -0.5 + 55 / 96})


@pytest.mark.parametrize(
    ("weighting", "scale_alpha", "shares"),
    [
        ("uniform", False, [1, 1, 1]),
        ("examples", False, [7, 5, 12]),
        # sum_k d_k = 0 ends the server's moves, and d_k is g_k n_k over a constant.
        ("uniform", True, [7, 5, 12]),
    ],
)
def test_fed_dyn_reaches_the_optimum_and_fed_avg_does_not(weighting, scale_alpha, shares):
    clients = regression_clients((7, 5, 12))
    cohorts = [[0, 1, 2]] * 100
    batches = whole(clients, cohorts, 10)
    history = drift.fed_dyn(
        REGRESSION,
        clients,
        models.regression.grad,
        cohorts=cohorts,
        batches=batches,
        rate=0.2,
        alpha=0.5,
        weighting=weighting,
        scale_alpha=scale_alpha,
    )
    best = least_squares(clients, shares)
    close(last(history), best, 1e-7)
    # The dual of a client is the gradient at its optimum: alpha times what its authors' code keeps
    # is minus that.
    for k, (x, y) in enumerate(clients):
        close(history[-1].duals[k], models.regression.grad(best, x, y), 1e-7)
    apart(last(fed_avg(clients, cohorts, batches=batches, rate=0.2, weighting=weighting)), best)


def test_fed_dyn_with_little_regularisation_starts_as_fed_avg():
    # h / alpha does not vanish with alpha: only of the whole cohort is it minus the mean change.
    clients = regression_clients()
    cohorts = COHORTS[:1]
    batches = draw(clients, cohorts)
    (after,) = drift.fed_dyn(
        REGRESSION,
        clients,
        models.regression.grad,
        cohorts=cohorts,
        batches=batches,
        rate=0.1,
        alpha=1e-9,
    )
    (average,) = fed_avg(clients, cohorts, batches=batches, weighting="uniform")
    # Two of five clients have moved.
    close(after.params + 1e9 * after.h, average.params, 1e-6)
    close(after.params - average.params, 2 / 5 * (average.params - Vector(REGRESSION)), 1e-6)


BASES = {
    "sgd": (drift.SGD(), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (
        drift.Momentum(0.9, damped=False),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ),
    "damped": (drift.Momentum(0.9), None),
    "adam": (
        drift.Adam(0.8, 0.95, 1e-6, fresh=True),
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.95), eps=1e-6),
    ),
    "paper_adam": (drift.Adam(0.8, 0.95, 0.1), None),
}


def centralised(name, x, y, num_steps):
    """The base optimizer with the gradient of all examples."""
    _, build = BASES[name]
    w = Vector(REGRESSION)
    if build is None:
        m, v = 0.0 * w, 0.0 * w
        for _ in range(num_steps):
            g = models.regression.grad(w, x, y)
            if name == "damped":
                m = 0.1 * g + 0.9 * m
                w = w - 0.1 * m
            else:
                m = 0.2 * g + 0.8 * m
                w = w - 0.1 * m / (v**0.5 + 0.1)
                v = 0.05 * g * g + 0.95 * v
        return w
    leaves = models.tensors(w, requires_grad=True)
    optimizer = build(list(leaves.values()))
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = ((torch.tensor(x) @ leaves["w"] + leaves["b"] - torch.tensor(y)) ** 2 / 2).mean()
        loss.backward()
        optimizer.step()
    return Vector({name: a.detach() for name, a in leaves.items()})


@pytest.mark.parametrize("name", BASES)
def test_mime_of_one_whole_step_is_its_base_optimizer(name):
    clients = regression_clients()
    cohorts = [[0, 1, 2, 3, 4]] * 4
    history = drift.mime(
        REGRESSION,
        clients,
        models.regression.grad,
        cohorts=cohorts,
        batches=whole(clients, cohorts, 1),
        base=BASES[name][0],
        rate=0.1,
    )
    x, y = (np.concatenate(parts) for parts in zip(*clients, strict=True))
    close(last(history), centralised(name, x, y, 4), 1e-8)


@pytest.mark.parametrize("name", ["sgd", "momentum", "damped"])
def test_mime_lite_with_a_linear_base_is_too(name):
    clients = regression_clients()
    cohorts = [[0, 1, 2, 3, 4]] * 4
    options = {
        "cohorts": cohorts,
        "batches": whole(clients, cohorts, 1),
        "base": BASES[name][0],
        "rate": 0.1,
    }
    run = lambda algorithm: last(algorithm(REGRESSION, clients, models.regression.grad, **options))
    close(run(drift.mime_lite), run(drift.mime))
    options["batches"] = whole(clients, cohorts, 6)
    apart(run(drift.mime_lite), run(drift.mime))


def test_the_first_step_of_mime_is_the_same_whatever_its_batch():
    # g_k(w_0) - g_k(w_0) + c is c.
    clients = regression_clients()
    cohorts = [[0, 3, 4]]
    run = lambda batches: last(
        drift.mime(
            REGRESSION,
            clients,
            models.regression.grad,
            cohorts=cohorts,
            batches=batches,
            base=drift.SGD(),
            rate=0.1,
        )
    )
    close(run([[[np.array([1, 4])]] * 3]), run(whole(clients, cohorts, 1)))


def test_mime_has_no_drift_where_curvatures_are_equal():
    # With the same x, g_k(w) - g_k(w_0) + c is the gradient of all clients at w.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 3))
    clients = [(x, rng.normal(size=6)) for _ in range(3)]
    cohorts = [[0, 1, 2]]
    options = {"cohorts": cohorts, "batches": whole(clients, cohorts, 5)}
    run = lambda algorithm, **more: last(
        algorithm(
            REGRESSION,
            clients,
            models.regression.grad,
            base=drift.SGD(),
            rate=0.1,
            **options,
            **more,
        )
    )
    w = Vector(REGRESSION)
    for _ in range(5):
        w = w - 0.1 * mean([models.regression.grad(w, *client) for client in clients])
    close(run(drift.mime), w)
    start = Vector(REGRESSION)
    close(run(drift.mime, server_rate=0.5), start + 0.5 * (w - start))


def test_mime_holds_the_state_fixed_during_local_steps():
    # m is 1: both steps have the direction 0.5 * (w - 4) + 0.5, where the second would have another
    # m. With rate 1: to 1.5, to 2.25. The state then becomes 0.5 * -4 + 0.5.
    (after,) = drift.mime_lite(
        {"w": 0.0},
        pulled(4.0),
        PULL.grad,
        base=drift.Momentum(0.5),
        rate=1.0,
        state=Vector({"w": 1.0}),
        **steps(2),
    )
    close(after.params, {"w": 2.25})
    close(after.state, {"w": -1.5})


def test_mime_lite_clips_deltas():
    run = lambda clip: last(
        drift.mime_lite(
            {"w": 0.0},
            pulled(4.0, -0.4),
            PULL.grad,
            base=drift.SGD(),
            rate=0.5,
            clip=clip,
            **steps(1, 1),
        )
    )
    close(run(None), {"w": (2 - 0.2) / 2})
    close(run(1.0), {"w": (1 - 0.2) / 2})


def constant(*gradients):
    """Clients whose gradients are the same everywhere, in place of labels, and of which size."""
    clients = [(np.zeros((n, 1)), np.tile(np.array(g, float), (n, 1))) for n, g in gradients]
    return clients, lambda p, x, y: Vector({"w": y.mean(0)})


def test_fed_exp_by_hand():
    # Deltas (3, 1) and (-3, 1), with squares 10 and 10 and the mean (0, 1): 20 / (4 * 1) = 5.
    clients, grad = constant((1, (3, 1)), (1, (-3, 1)))
    run = lambda epsilon, **more: drift.fed_exp(
        {"w": np.zeros(2)}, clients, grad, rate=1.0, epsilon=epsilon, **steps(1, 1), **more
    )[0]
    assert run(0.0).server_rate == pytest.approx(5)
    close(run(0.0).params, {"w": [0.0, -5.0]})
    close(run(0.0).averaged, {"w": [0.0, -2.5]})
    assert run(1.0).server_rate == pytest.approx(20 / (4 * 2))
    assert run(1.0, epsilon_by_cohort=True).server_rate == pytest.approx(20 / (4 * 3))
    # Weighted 3 to 1, the mean is (1.5, 1).
    clients, grad = constant((3, (3, 1)), (1, (-3, 1)))
    assert run(0.0, weighting="examples").server_rate == pytest.approx(10 / (2 * 3.25))


def test_fed_exp_of_equal_clients_is_fed_avg():
    clients = regression_clients((5,)) * 3
    cohorts = [[0, 1, 2]] * 3
    batches = whole(clients, cohorts, 2)
    history = drift.fed_exp(
        REGRESSION,
        clients,
        models.regression.grad,
        cohorts=cohorts,
        batches=batches,
        rate=0.1,
    )
    assert [entry.server_rate for entry in history] == [1, 1, 1]
    close(last(history), last(fed_avg(clients, cohorts, batches=batches)))


def test_fed_sam_by_hand():
    # At 0 the gradient is (-3, -4), of norm 5 over both: with rho 10, it is taken at (-6, -8).
    grad = lambda p, x, y: Vector({"u": p["u"] - 3, "v": p["v"] - 4})
    (after,) = drift.fed_sam(
        {"u": 0.0, "v": 0.0}, pulled(0.0), grad, rate=0.1, rho=10.0, epsilon=0.0, **steps(1)
    )
    close(after.params, {"u": 0.9, "v": 1.2})


def test_fed_sam_without_radius_is_fed_avg():
    clients = regression_clients()
    run = lambda rho: last(
        drift.fed_sam(
            REGRESSION,
            clients,
            models.regression.grad,
            cohorts=COHORTS,
            batches=draw(clients, COHORTS),
            rate=0.1,
            rho=rho,
        )
    )
    close(run(0.0), last(fed_avg(clients)))
    apart(run(0.5), last(fed_avg(clients)))


def test_mu_is_adapted():
    # Falls, falls, rises, stays, falls, falls; in [0, 1].
    values = [5.0, 4.0, 6.0, 6.0, 3.0, 2.0]
    found = drift.adapted_mu(values, mu=0.1, step=0.4)
    np.testing.assert_allclose(found, [0, 0, 0.4, 0.8, 0.4, 0.0], atol=1e-12)
    assert drift.adapted_mu([1, 2, 3], mu=0.5, step=0.3)[-1] == 0.8
    assert drift.adapted_mu([1, 2, 3, 4], mu=0.5, step=0.3)[-1] == 1.0
    found = drift.adapted_mu([5, 4, 3, 2, 4, 3, 2, 1], mu=1.0, step=0.25, patience=3)
    assert found == [1, 1, 0.75, 0.5, 0.75, 0.75, 0.75, 0.5]


def test_ada_fed_prox_by_hand():
    # From 0 with rate 1/2 and mu 1/2: to 2; then the gradient -2 and the pull 1: to 2.5.
    run = lambda watched, **options: drift.ada_fed_prox(
        {"w": 0.0},
        pulled(4.0),
        PULL,
        cohorts=[[0]] * 2,
        batches=steps(2)["batches"] * 2,
        rate=0.5,
        watch=watched,
        **options,
    )
    first, second = run(lambda this: -float(this.after["w"]), mu=0.5, step=0.5)
    close(first.params, {"w": 2.5})
    # The watched value has fallen, so mu is 0: 2.5 to 3.25 to 3.625. The loss was 8, 2.
    assert (first.mu, first.next_mu, first.training_loss) == (0.5, 0.0, 5.0)
    close(second.params, {"w": 3.625})
    first, second = run(lambda this: float(this.after["w"]), mu=0.5, step=0.5)
    assert (second.mu, second.next_mu) == (0.0, 0.5)
    # Batches of 2 and of 1, with losses 8 and 2 at 0 and 2: (2 * 8 + 2) / 3.
    (after,) = drift.ada_fed_prox(
        {"w": 0.0},
        [(np.zeros((3, 1)), np.full(3, 4.0))],
        PULL,
        cohorts=[[0]],
        batches=[[[np.array([0, 1]), np.array([2])]]],
        rate=0.5,
    )
    assert after.training_loss == 6


def test_ada_fed_prox_without_mu_is_fed_avg():
    clients = regression_clients()
    history = drift.ada_fed_prox(
        REGRESSION,
        clients,
        models.regression,
        cohorts=COHORTS,
        batches=draw(clients, COHORTS),
        rate=0.1,
        step=0.0,
    )
    close(last(history), last(fed_avg(clients)))


@pytest.mark.parametrize("divisor", ["steps", "examples"])
def test_fed_shuffle_weighs_clients_by_their_data_alone(divisor):
    # Gradients are constant: whatever the numbers of steps, w moves by the mean gradient of the
    # population; FedAvg, twice as far for the client with twice the steps.
    clients, grad = constant((2, (1.0,)), (6, (-3.0,)))
    cohorts = [[0, 1]]
    one_by_one = lambda k: list(np.arange(len(clients[k][0]))[:, None])
    batches = [[one_by_one(0), one_by_one(1)]]
    run = lambda **options: last(
        drift.fed_shuffle({"w": np.zeros(1)}, clients, grad, rate=0.5, divisor=divisor, **options)
    )
    mean_gradient = (2 * 1.0 - 6 * 3.0) / 8
    close(run(cohorts=cohorts, batches=batches), {"w": [-0.5 * mean_gradient]})
    # With each client alone, half of the time: on average the same.
    alone = [run(cohorts=[[k]], batches=[[one_by_one(k)]]) for k in (0, 1)]
    close(mean(alone), {"w": [-0.5 * mean_gradient]})
    # Drawn in proportion to their sizes, every client moves the server by its own gradient.
    alone = [
        run(cohorts=[[k]], batches=[[one_by_one(k)]], probabilities=[0.25, 0.75]) for k in (0, 1)
    ]
    close(alone[0], {"w": [-0.5]})
    close(alone[1], {"w": [1.5]})


def test_fed_shuffle_of_equal_clients_is_fed_avg():
    clients = regression_clients((8, 8, 8))
    cohorts = [[0, 1, 2], [2, 0]]
    batches = draw(clients, cohorts)  # Two epochs of two batches.
    options = {"cohorts": cohorts, "batches": batches}
    found = drift.fed_shuffle(REGRESSION, clients, models.regression.grad, rate=0.4, **options)
    close(last(found), last(fed_avg(clients, rate=0.1, **options)))
    clients = regression_clients((8, 4))
    one = {"cohorts": [[1]], "batches": draw(clients, [[1]]), "rate": 0.4}
    run = lambda **more: last(
        drift.fed_shuffle(REGRESSION, clients, models.regression.grad, **one, **more)
    )
    start = Vector(REGRESSION)
    # A third of all examples, over a probability of a half.
    close(run() - start, 2 / 3 * (run(sum_to_one=True) - start))
    close(run(server_rate=0.3) - start, 0.3 * (run() - start))


def test_contrastive_loss_by_hand():
    # Cosines are 1 and 0 whatever the lengths; at temperature 1/2, log(1 + e^-2).
    z, server, previous = torch.tensor([[[3.0, 0]], [[2.0, 0]], [[0, 5.0]]])
    found = drift.contrastive_loss(z, server, previous, 0.5).item()
    assert found == pytest.approx(math.log(1 + math.exp(-2)))
    assert drift.contrastive_loss(z, previous, server, 0.5).item() == pytest.approx(found + 2)


def test_not_true_divergence_by_hand():
    # Without the true class, (1/4, 3/4) of the student and (1/2, 1/2) of the teacher.
    student, teacher = torch.tensor([[9.0, 0.0, math.log(3)]]), torch.tensor([[-9.0, 1.0, 1.0]])
    found = drift.not_true_divergence(student, teacher, torch.tensor([0]), 1.0).item()
    assert found == pytest.approx(math.log(4 / 3) / 2)
    # Twice the temperature halves the logits.
    warmer = drift.not_true_divergence(2 * student, 2 * teacher, torch.tensor([0]), 2.0).item()
    assert warmer == pytest.approx(4 * found, rel=1e-5)


def test_moon():
    clients, params = labelled_clients(), network_params()
    run = lambda mu, cohorts: drift.moon(
        params, clients, cohorts=cohorts, batches=draw(clients, cohorts), rate=0.3, mu=mu
    )
    average = drift.fed_avg(
        params,
        clients,
        models.network.grad,
        cohorts=COHORTS,
        batches=draw(clients, COHORTS),
        rate=0.3,
    )
    close(last(run(0.0, COHORTS)), last(average))
    # Clients 0 and 3, then 4 and 2, are there for the first time; client 0 again in the second.
    history = run(5.0, COHORTS)
    close(history[0].params, average[0].params)
    apart(history[1].params, average[1].params)
    assert set(history[1].previous) == {0, 2, 3, 4}
    close(history[1].previous[3], history[0].previous[3])


def test_moon_remembers_the_model_that_a_client_ended_with():
    clients, params = labelled_clients(), network_params()
    run = lambda algorithm, cohorts, *rest, **options: algorithm(
        params, clients, *rest, cohorts=cohorts, batches=draw(clients, cohorts), rate=0.3, **options
    )
    first = [[0], [3]]  # Each for the first time: FedAvg.
    history = run(drift.moon, first, mu=5.0)
    close(last(history), last(run(drift.fed_avg, first, models.network.grad)))
    for entry, k in zip(history, (0, 3), strict=True):
        close(entry.previous[k], entry.params)
    again = [[0], [3], [0]]
    average = run(drift.fed_avg, again, models.network.grad)
    apart(last(run(drift.moon, again, mu=5.0)), last(average))


def test_moon_stays_nearer_to_the_features_of_the_server():
    clients, params = labelled_clients(), network_params()
    cohorts = [[0, 3, 4]] * 3
    batches = whole(clients, cohorts, 5)

    def similarity(mu):
        history = drift.moon(params, clients, cohorts=cohorts, batches=batches, rate=0.1, mu=mu)
        received, found = history[1].params, []
        for k in cohorts[0]:
            x = torch.tensor(clients[k][0])
            z, server, previous = (
                models.forward(models.tensors(p), x)[0]
                for p in (history[2].previous[k], received, history[1].previous[k])
            )
            found.append(drift.contrastive_loss(z, server, previous, 0.5).item())
        return np.mean(found)

    assert similarity(5.0) < similarity(0.0) - 0.01


def test_fed_lc():
    clients = labelled_clients()
    params = {"w": np.zeros((3, 3)), "b": np.zeros(3)}
    options = {"cohorts": COHORTS, "batches": draw(clients, COHORTS), "rate": 0.3}
    run = lambda tau: last(
        drift.fed_lc(params, clients, models.softmax.grad, tau=tau, num_classes=3, **options)
    )
    average = last(drift.fed_avg(params, clients, models.softmax.grad, **options))
    close(run(0.0), average)
    apart(run(1.0), average)


def test_fed_lc_by_hand():
    # 16 examples of class 0, 1 of class 1, none of class 2: with tau 2 the logits lose 1, 2, 200.
    # From 0, the probability of class 0 is e^-1 / (e^-1 + e^-2), and class 2 is left alone.
    x, y = np.zeros((17, 1)), np.array([0] * 16 + [1])
    (after,) = drift.fed_lc(
        {"w": np.zeros((1, 3)), "b": np.zeros(3)},
        [(x, y)],
        models.softmax.grad,
        cohorts=[[0]],
        batches=[[[np.arange(17)]]],
        rate=1.0,
        tau=2.0,
        num_classes=3,
    )
    first = 1 / (1 + math.exp(-1))
    expected = [16 / 17 - first, 1 / 17 - (1 - first), 0.0]
    np.testing.assert_allclose(after.params["b"], expected, atol=1e-12)


def test_q_fed_avg_by_hand():
    # From 0 with rate 1/2, so L = 2: gradients -1 and -2, losses 1/2 and 2. With q = 1, the sums
    # are -(1/2 + 4) and (1 + 2 * 1/2) + (4 + 2 * 2).
    (after,) = fair.q_fed_avg({"w": 0.0}, pulled(1.0, 2.0), PULL, rate=0.5, q=1, **steps(1, 1))
    close(after.params, {"w": 4.5 / 10})
    # With q = 2: -(1/4 + 8), and (2 * 1/2 * 1 + 2 * 1/4) + (2 * 2 * 4 + 2 * 4).
    (after,) = fair.q_fed_avg({"w": 0.0}, pulled(1.0, 2.0), PULL, rate=0.5, q=2, **steps(1, 1))
    close(after.params, {"w": 8.25 / 25.5})


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_q_fed_avg_without_q_is_fed_avg(weighting):
    clients = regression_clients()
    history = fair.q_fed_avg(
        REGRESSION,
        clients,
        models.regression,
        cohorts=COHORTS,
        batches=draw(clients, COHORTS),
        rate=0.1,
        q=0,
        weighting=weighting,
    )
    close(last(history), last(fed_avg(clients, weighting=weighting)))


def with_domains(clients, seed=3):
    rng = np.random.default_rng(seed)
    return [(x, y, rng.integers(2, size=len(y))) for x, y in clients]


def agnostic(clients, cohorts=COHORTS, model=models.regression, params=REGRESSION, **options):
    options = {"rate": 0.1, "domain_rate": 0.0, "batches": draw(clients, cohorts), **options}
    return fair.agnostic_fed_avg(params, clients, model, cohorts=cohorts, **options)


def test_agnostic_fed_avg_of_one_domain_is_fed_avg():
    clients = regression_clients()
    one = [(x, y, np.zeros(len(y), int)) for x, y in clients]
    history = agnostic(one, domain_weights=[1.0], window=[[3.0]], batch_scale=True)
    close(last(history), last(fed_avg(clients)))


def test_agnostic_fed_avg_by_its_definition():
    # Of whole batches and one step: beta_k cancels, and the server follows the gradient of
    # sum alpha_d (sum of losses of domain d), over the sum of the betas.
    clients = with_domains(regression_clients())
    cohort = [0, 1, 2, 3, 4]
    (after,) = agnostic(
        clients,
        [cohort],
        batches=whole(clients, [cohort], 1),
        domain_weights=[0.3, 0.7],
        window=[[10.0, 2.0], [20.0, 6.0]],
        domain_rate=0.5,
    )
    x, y, domain = (np.concatenate(parts) for parts in zip(*clients, strict=True))
    alpha = np.array([0.3 / 15, 0.7 / 4])
    w = Vector(REGRESSION)
    residual = x @ w["w"] + w["b"] - y
    share = alpha[domain] / alpha[domain].sum()
    total = Vector({"w": (share * residual) @ x, "b": share @ residual})
    close(after.params, w - 0.1 * total)
    losses = [np.mean(residual[domain == d] ** 2 / 2) for d in (0, 1)]
    grown = np.array([0.3, 0.7]) * np.exp(0.5 * np.array(losses))
    np.testing.assert_allclose(after.domain_weights, grown / grown.sum())
    counts = np.bincount(domain, minlength=2)
    np.testing.assert_array_equal(after.window, [[20, 6], counts])


def test_agnostic_fed_avg_evens_out_the_losses_of_domains():
    # Two domains that pull w to 0 and to 3, four clients to one: agnostic, the losses become equal.
    clients = [(np.zeros((1, 1)), np.array([a]), np.array([d])) for a, d in [(0.0, 0)] * 4]
    clients.append((np.zeros((1, 1)), np.array([3.0]), np.array([1])))
    history = agnostic(
        clients,
        [list(range(5))] * 300,
        PULL,
        {"w": 0.0},
        domain_weights=[0.8, 0.2],
        window=[[4.0, 1.0]],
        domain_rate=0.1,
    )
    np.testing.assert_allclose(last(history)["w"], 1.5, atol=0.02)


def test_a_domain_that_no_one_has_leaves_the_weights_finite():
    clients = [(x, y, np.zeros(len(y), int)) for x, y in regression_clients()]
    history = agnostic(clients, domain_weights=[0.5, 0.5], window=[[1.0, 1.0]], domain_rate=0.1)
    assert history[-1].domain_weights[0] > 0.5
    assert np.isfinite(norm(last(history)))


def test_ditto():
    clients = regression_clients()
    batches = draw(clients, COHORTS)
    run = lambda lam, **options: personal.ditto(
        REGRESSION,
        clients,
        models.regression.grad,
        cohorts=COHORTS,
        batches=batches,
        rate=0.1,
        lam=lam,
        **options,
    )
    close(last(run(0.7)), last(fed_avg(clients)))
    # Without a pull, a personal model is trained on its client alone, from the initial params.
    alone = Vector(REGRESSION)
    for cohort, drawn in zip(COHORTS, batches, strict=True):
        if 4 in cohort:
            chosen = drawn[cohort.index(4)]
            alone = personal.fine_tuned(
                alone, clients[4], models.regression.grad, batches=chosen, rate=0.1
            )
    close(run(0.0, start="initial")[-1].personal[4], alone)
    assert 1 not in run(0.0)[-1].personal
    # With the rate 1 / lam and no other steps, v is the model received less the gradient's share.
    first = run(0.0)[0].params
    (batch, *_) = batches[1][COHORTS[1].index(2)]
    one = [[drawn[:1] for drawn in of_round] for of_round in batches]
    found = run(5.0, personal_rate=0.2, personal_batches=one)[1].personal[2]
    x, y = clients[2]
    close(found, first - 0.2 * models.regression.grad(first, x[batch], y[batch]))


def proximal(client, center, lam):
    """The minimum of the mean loss of a client and lam / 2 |w - center|^2."""
    x, y = client
    x = np.column_stack([x, np.ones(len(y))])
    at = np.append(center["w"], center["b"])
    solution = np.linalg.solve(x.T @ x / len(y) + lam * np.eye(4), x.T @ y / len(y) + lam * at)
    return Vector({"w": solution[:3], "b": solution[3]})


def test_ditto_ends_at_the_proximal_point():
    clients = regression_clients()
    one = {"cohorts": [[3]], "batches": whole(clients, [[3]], 1)}
    (after,) = personal.ditto(
        REGRESSION,
        clients,
        models.regression.grad,
        rate=0.1,
        lam=0.5,
        personal_batches=whole(clients, [[3]], 400),
        **one,
    )
    close(after.personal[3], proximal(clients[3], Vector(REGRESSION), 0.5), 1e-8)


@pytest.mark.parametrize("warm", [False, True])
def test_p_fed_me_ends_at_the_proximal_point(warm):
    clients = regression_clients()
    cohorts = [[3, 1, 0]]
    run = lambda **options: personal.p_fed_me(
        REGRESSION,
        clients,
        models.regression.grad,
        cohorts=cohorts,
        batches=whole(clients, cohorts, 1),
        rate=0.02,
        personal_rate=0.05,
        lam=15.0,
        inner_steps=60,
        warm=warm,
        **options,
    )[0]
    start = Vector(REGRESSION)
    thetas = {k: proximal(clients[k], start, 15.0) for k in (0, 3)}
    close(run().personal[3], thetas[3], 1e-8)
    # w moves by rate * lam = 0.3 of the way to the mean of the thetas; and beta of that.
    close(run().params, start + 0.3 * (mean(list(thetas.values())) - start), 1e-8)
    close(run(beta=0.5).params, start + 0.15 * (mean(list(thetas.values())) - start), 1e-8)
    close(run(beta=0.0).params, start)
    weighted = mean(list(thetas.values()), [7, 12])
    close(run(weighting="examples").params, start + 0.3 * (weighted - start), 1e-8)


def test_p_fed_me_by_hand():
    # From 0 with lam 1 and one inner step: theta is 0 + 4 / 4 = 1, and w 1/2 of the way there. The
    # next, from 1, is 1 - (-3 + 1/2) / 4 = 13/8; from w, 1/2 + 7/2 / 4 = 11/8.
    run = lambda warm: personal.p_fed_me(
        {"w": 0.0},
        pulled(4.0),
        PULL.grad,
        rate=0.5,
        personal_rate=0.25,
        lam=1.0,
        inner_steps=1,
        warm=warm,
        **steps(2),
    )[0]
    for warm, theta in (True, 13 / 8), (False, 11 / 8):
        close(run(warm).personal[0], {"w": theta})
        close(run(warm).params, {"w": 1 / 2 + (theta - 1 / 2) / 2})


def triples(clients, cohorts, seed=0):
    rng = np.random.default_rng(seed)
    three = lambda n: tuple(rng.permutation(n)[:4] for _ in range(3))
    return [[[three(len(clients[k][0])) for _ in range(2)] for k in cohort] for cohort in cohorts]


def test_per_fed_avg_that_does_not_adapt_is_fed_avg():
    clients = regression_clients()
    cohorts = [[0, 3, 4], [2, 4]]
    batches = triples(clients, cohorts)
    meta = [[[step[1] for step in drawn] for drawn in of_round] for of_round in batches]
    for hessian_free in (False, True):
        history = personal.per_fed_avg(
            REGRESSION,
            clients,
            models.regression.grad,
            cohorts=cohorts,
            batches=batches,
            alpha=0.0,
            beta=0.1,
            hessian_free=hessian_free,
        )
        expected = fed_avg(clients, cohorts, batches=meta, weighting="uniform")
        close(last(history), last(expected))


def test_per_fed_avg_follows_the_gradient_through_a_step():
    # The Hessian of least squares is constant: the central difference is exact.
    clients = regression_clients()
    x, y = (torch.tensor(a) for a in clients[3])
    adapt, meta = np.arange(5), np.arange(5, 12)
    loss = lambda w, rows: ((x[rows] @ w[:3] + w[3] - y[rows]) ** 2 / 2).mean()

    def expected(create_graph):
        w = torch.tensor([*REGRESSION["w"], REGRESSION["b"]], requires_grad=True)
        w = w.double().detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(w, adapt), w, create_graph=create_graph)
        loss(w - 0.3 * g, meta).backward()
        return (w - 0.2 * w.grad).detach().numpy()

    for hessian_free in (False, True):
        (after,) = personal.per_fed_avg(
            REGRESSION,
            clients,
            models.regression.grad,
            cohorts=[[3]],
            batches=[[[(adapt, meta, adapt)]]],
            alpha=0.3,
            beta=0.2,
            hessian_free=hessian_free,
        )
        found = np.append(after.params["w"], after.params["b"])
        np.testing.assert_allclose(found, expected(hessian_free), rtol=1e-6)


def test_reptile():
    clients = regression_clients()
    run = lambda server_rates: personal.reptile(
        REGRESSION,
        clients,
        models.regression.grad,
        cohorts=COHORTS,
        batches=draw(clients, COHORTS),
        rate=0.1,
        server_rates=server_rates,
    )
    for rate in (1.0, 0.3):
        close(last(run(rate)), last(fed_avg(clients, server_rate=rate, weighting="uniform")))
    close(last(run([1.0, 0.5, 0.0, 0.0])), run([1.0, 0.5, 0.2, 0.1])[1].params)


HEAD = ("head_w", "head_b")


def networks(algorithm, clients=None, **options):
    clients = clients or labelled_clients()
    options = {"batches": draw(clients, COHORTS), "rate": 0.3, **options}
    return algorithm(network_params(), clients, models.network.grad, cohorts=COHORTS, **options)


def test_fed_per():
    close(last(networks(personal.fed_per, personal=())), last(networks(drift.fed_avg)))
    history = networks(personal.fed_per, personal=HEAD)
    start = Vector(network_params())
    close(last(history).only(HEAD), start.only(HEAD))
    apart(last(history).without(HEAD), last(networks(drift.fed_avg)).without(HEAD))
    # Client 3 is not in the second round, and starts the third with the head that it kept.
    close(history[1].personal[3], history[0].personal[3])
    x, y = labelled_clients()[3]
    w = history[1].params.replace(history[1].personal[3])
    for batch in draw(labelled_clients(), COHORTS)[2][0]:
        w = w - 0.3 * models.network.grad(w, x[batch], y[batch])
    close(history[2].personal[3], w.only(HEAD))


def test_fed_per_with_everything_personal_is_training_alone():
    clients = labelled_clients()
    history = networks(personal.fed_per, clients, personal=tuple(network_params()))
    w = Vector(network_params())
    for cohort, drawn in zip(COHORTS, draw(clients, COHORTS), strict=True):
        if 0 in cohort:
            w = personal.fine_tuned(
                w, clients[0], models.network.grad, batches=drawn[cohort.index(0)], rate=0.3
            )
    close(history[-1].personal[0], w)


def test_fed_rep():
    nothing = [[[] for _ in cohort] for cohort in COHORTS]
    found = networks(personal.fed_rep, head=(), head_batches=nothing)
    close(last(found), last(networks(drift.fed_avg)))
    # A head that is never trained is FedBABU's.
    found = networks(personal.fed_rep, head=HEAD, head_batches=nothing)
    close(last(found), last(networks(personal.fed_babu, head=HEAD)))


def test_fed_rep_trains_the_head_before_the_base():
    clients = labelled_clients()
    batch = np.arange(7)
    (after,) = personal.fed_rep(
        network_params(),
        clients,
        models.network.grad,
        cohorts=[[0]],
        head_batches=[[[batch]]],
        batches=[[[batch]]],
        rate=0.3,
        head_rate=0.2,
        head=HEAD,
    )
    start = Vector(network_params())
    head = start.only(HEAD) - 0.2 * models.network.grad(start, *clients[0]).only(HEAD)
    between = start.replace(head)
    base = start.without(HEAD) - 0.3 * models.network.grad(between, *clients[0]).without(HEAD)
    close(after.personal[0], head)
    close(after.params.without(HEAD), base)
    close(after.params.only(HEAD), start.only(HEAD))


def test_fed_babu():
    close(last(networks(personal.fed_babu, head=())), last(networks(drift.fed_avg)))
    history = networks(personal.fed_babu, head=HEAD)
    start = Vector(network_params())
    close(last(history).only(HEAD), start.only(HEAD))
    # One step of one client: the base alone follows its gradient.
    clients = labelled_clients()
    (after,) = personal.fed_babu(
        network_params(),
        clients,
        models.network.grad,
        cohorts=[[3]],
        batches=whole(clients, [[3]], 1),
        rate=0.3,
        head=HEAD,
    )
    gradient = models.network.grad(start, *clients[3])
    close(after.params.without(HEAD), start.without(HEAD) - 0.3 * gradient.without(HEAD))


def test_fed_bn():
    clients = regression_clients()
    norms = {"norm_scale": np.ones(4), "norm_bias": np.zeros(4)}
    params = {**network_params(outputs=1), **norms}
    state = {"norm_mean": np.zeros(4), "norm_var": np.ones(4)}
    batches = draw(clients, COHORTS)
    options = {"cohorts": COHORTS, "batches": batches, "rate": 0.1}
    grad = lambda p, x, y: models.normalised_grad(p, state, x, y)[0]
    run = lambda names: personal.fed_bn(
        params, state, clients, models.normalised_grad, personal=names, **options
    )
    # In training, the statistics are those of the batch: the params do not see the state.
    close(last(run(())), last(drift.fed_avg(params, clients, grad, **options)))
    found = last(personal.fed_per(params, clients, grad, personal=tuple(norms), **options))
    close(last(run(tuple(norms))), found)
    close(found.only(norms), Vector(norms))
    # The statistics of client 0 go on from where they were, over the rounds that it is in.
    history = run(tuple(norms))
    received, kept = history[2].params, history[1].personal[0]
    w, statistics = received.replace(kept[0]), kept[1]
    x, y = clients[0]
    for batch in batches[3][0]:
        gradient, statistics = models.normalised_grad(w, statistics, x[batch], y[batch])
        w = w - 0.1 * gradient
    close(history[3].personal[0][1], statistics)
    close(history[3].personal[0][0], w.only(norms))


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_one_cluster_is_fed_avg(weighting):
    clients = regression_clients()
    history = clusters.ifca(
        [REGRESSION],
        clients,
        models.regression,
        cohorts=COHORTS,
        batches=draw(clients, COHORTS),
        rate=0.1,
        weighting=weighting,
    )
    close(history[-1].params[0], last(fed_avg(clients, weighting=weighting)))


def test_ifca_finds_the_clusters():
    rng = np.random.default_rng(0)
    truths = [np.array([1.0, -2.0, 0.5]), np.array([-1.0, 1.0, 2.0])]
    clients = []
    for i in range(6):
        x = rng.normal(size=(6 + i, 3))
        clients.append((x, x @ truths[i % 2]))
    cohorts = [[0, 1, 2, 3, 4, 5]] * 60
    starts = [{"w": t + rng.normal(size=3), "b": 0.0} for t in truths]
    never = {"w": np.full(3, 100.0), "b": 0.0}
    history = clusters.ifca(
        [*starts, never],
        clients,
        models.regression,
        cohorts=cohorts,
        batches=whole(clients, cohorts, 5),
        rate=0.2,
    )
    assert history[-1].picked == {k: k % 2 for k in range(6)}
    for w, truth in zip(history[-1].params, truths, strict=False):
        close(w, {"w": truth, "b": 0.0}, 1e-6)
    close(history[-1].params[2], never)


def test_ifca_picks_the_first_of_equals():
    (after,) = clusters.ifca([{"w": 0.0}] * 2, pulled(1.0, 3.0), PULL, rate=0.5, **steps(1, 1))
    assert after.picked == {0: 0, 1: 0}
    assert [float(w["w"]) for w in after.params] == [1.0, 0.0]


def points(seed=0):
    rng = np.random.default_rng(seed)
    centers = rng.normal(scale=3, size=(3, 2))
    sizes = (7, 0, 1, 12, 5)
    return [centers[rng.integers(3, size=n)] + rng.normal(size=(n, 2)) for n in sizes]


def test_k_means_by_hand():
    # Sums of 4 and 6 examples: (1 * 0 + 8) / (1 + 2), with a pseudo-count of 1; then, with 3 seen,
    # (3 * 8/3 + 4) / 4. The other centroid has none, and stays.
    clients = [np.array([[2.0], [6.0]]), np.array([[4.0]])]
    history = clusters.k_means([[0.0], [100.0]], clients, cohorts=[[0], [1]])
    np.testing.assert_allclose(history[0].centroids, [[8 / 3], [100]])
    np.testing.assert_allclose(history[1].centroids, [[3.0], [100]])
    np.testing.assert_array_equal(history[1].counts, [4, 1])


@pytest.mark.parametrize("rounds", [1, 3])
def test_k_means_without_memory_is_lloyds(rounds):
    clients = points()
    x = np.concatenate(clients)
    history = clusters.k_means(
        x[:3], clients, cohorts=[[0, 1, 2, 3, 4]] * rounds, keep_counts=False
    )
    lloyd = KMeans(3, init=x[:3], n_init=1, max_iter=rounds, tol=0).fit(x)
    np.testing.assert_allclose(history[-1].centroids, lloyd.cluster_centers_, rtol=1e-9)


@pytest.mark.parametrize("kind", ["diag", "full"])
def test_expectation_maximisation_is_that_of_scikit_learn(kind):
    clients = points()
    x = np.concatenate(clients)
    weights, starts = np.array([0.2, 0.3, 0.5]), x[:3]
    spreads = np.array([[1.0, 2.0], [0.5, 1.0], [2.0, 3.0]])
    if kind == "full":
        spreads = np.stack([np.diag(spread) + 0.3 for spread in spreads])
    history = clusters.gaussian_mixture(
        weights, starts, spreads, clients, cohorts=[[0, 1, 2, 3, 4]] * 6
    )
    model = GaussianMixture(
        3,
        covariance_type=kind,
        weights_init=weights,
        means_init=starts,
        precisions_init=1 / spreads if kind == "diag" else np.linalg.inv(spreads),
        max_iter=5,
        tol=0,
        reg_covar=0,
    )
    with pytest.warns(ConvergenceWarning):
        model.fit(x)
    np.testing.assert_allclose(history[4].weights, model.weights_, rtol=1e-8)
    np.testing.assert_allclose(history[4].centers, model.means_, rtol=1e-8)
    np.testing.assert_allclose(history[4].covariances, model.covariances_, rtol=1e-7)
    assert history[5].log_likelihood == pytest.approx(model.score(x))
    likelihoods = [entry.log_likelihood for entry in history]
    assert likelihoods == sorted(likelihoods)


def test_expectation_maximisation_of_one_component_by_hand():
    # 0, 2 and 4 have the mean 2 and the variance 8/3, and the standard normal density at 0.
    clients = [np.array([[0.0], [2.0]]), np.empty((0, 1)), np.array([[4.0]])]
    run = lambda **options: clusters.gaussian_mixture(
        [1.0], [[0.0]], [[1.0]], clients, cohorts=[[2, 1, 0]], **options
    )[0]
    assert (run().weights, run().centers, run().covariances) == (1, 2, pytest.approx(8 / 3))
    assert run().log_likelihood == pytest.approx(-np.log(2 * np.pi) / 2 - 20 / 6)
    assert run(floor=5.0).covariances == 5
    assert run(floor_fraction=4.0).covariances == 4  # Of the variance 1 before the round.


def test_clients_without_examples_change_nothing():
    clients = regression_clients()
    without = [[k for k in cohort if k != 1] for cohort in COHORTS]
    batches = draw(clients, COHORTS)
    kept = [
        [drawn for k, drawn in zip(cohort, of_round, strict=True) if k != 1]
        for cohort, of_round in zip(COHORTS, batches, strict=True)
    ]
    for algorithm, options in [
        (drift.fed_avg, {"weighting": "uniform"}),
        (drift.fed_dyn, {"alpha": 0.3}),
        (drift.mime, {"base": drift.Adam(fresh=True), "weighting": "uniform"}),
        (drift.fed_exp, {}),
        (personal.ditto, {"lam": 0.3}),
    ]:
        run = lambda cohorts, drawn, algorithm=algorithm, options=options: last(
            algorithm(
                REGRESSION,
                clients,
                models.regression.grad,
                cohorts=cohorts,
                batches=drawn,
                rate=0.1,
                **options,
            )
        )
        close(run(COHORTS, batches), run(without, kept))
