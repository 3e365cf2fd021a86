"""Algorithms for models that differ from client to client."""

import numpy as np

from reference.drift import fed_avg
from reference.vectors import Round, Vector, client_weight, mean, taking_part


def ditto(
    params,
    clients,
    grad,
    *,
    cohorts,
    batches,
    rate,
    lam,
    personal_rate=None,
    personal_batches=None,
    weighting="examples",
    start="received",
):
    """Ditto (Li et al. 2021, algorithm 1, by gradients): FedAvg, and a personal model beside.

    v <- v - rate (grad f(v) + lam (v - w)), with w as it was received, on the same batches as
    FedAvg's local steps unless others are given. A client without a personal model starts with the
    params that it receives; in PFLlib and FL-bench with those before the first round
    (`start="initial"`); the paper leaves it open.
    """
    initial = w = Vector(params)
    personal, history = {}, []
    personal_rate = rate if personal_rate is None else personal_rate
    personal_batches = batches if personal_batches is None else personal_batches
    for cohort, drawn, own_drawn in zip(cohorts, batches, personal_batches, strict=True):
        for k, steps in taking_part(clients, cohort, own_drawn):
            x, y = clients[k]
            v = personal.get(k, {"received": w, "initial": initial}[start])
            for batch in steps:
                v = v - personal_rate * (grad(v, x[batch], y[batch]) + lam * (v - w))
            personal[k] = v
        deltas, weights = [], []
        for k, steps in taking_part(clients, cohort, drawn):
            x, y = clients[k]
            w_k = w
            for batch in steps:
                w_k = w_k - rate * grad(w_k, x[batch], y[batch])
            deltas.append(w - w_k)
            weights.append(client_weight(weighting, len(y)))
        w = w - mean(deltas, weights)
        history.append(Round(params=w, personal=dict(personal)))
    return history


def p_fed_me(
    params,
    clients,
    grad,
    *,
    cohorts,
    batches,
    rate,
    personal_rate,
    lam,
    inner_steps,
    beta=1.0,
    weighting="uniform",
    warm=True,
):
    """pFedMe (Dinh et al. 2020, algorithm 1).

    For each batch: `inner_steps` of theta <- theta - personal_rate (grad f(theta) +
    lam (theta - w_k)), then w_k <- w_k - rate lam (w_k - theta). Theta starts a round at the params
    received, and a batch where it stopped, as in the authors' code, PFLlib and FL-bench; with
    `warm=False`, at w_k, as the paper's approximate minimiser may. The server mixes its params with
    beta times the mean of w_k: uniform in the paper, by examples in the authors' code. The extra
    weight decay of these codes is left out. The personal params of a client are its last theta.
    """
    w, personal, history = Vector(params), {}, []
    for cohort, drawn in zip(cohorts, batches, strict=True):
        trained, weights = [], []
        for k, steps in taking_part(clients, cohort, drawn):
            x, y = clients[k]
            w_k = theta = w
            for batch in steps:
                theta = theta if warm else w_k
                for _ in range(inner_steps):
                    gradient = grad(theta, x[batch], y[batch])
                    theta = theta - personal_rate * (gradient + lam * (theta - w_k))
                w_k = w_k - rate * lam * (w_k - theta)
            personal[k] = theta
            trained.append(w_k)
            weights.append(client_weight(weighting, len(y)))
        w = (1 - beta) * w + beta * mean(trained, weights)
        history.append(Round(params=w, personal=dict(personal)))
    return history


def per_fed_avg(
    params,
    clients,
    grad,
    *,
    cohorts,
    batches,
    alpha,
    beta,
    hessian_free=False,
    delta=1e-3,
    weighting="uniform",
):
    """Per-FedAvg (Fallah et al. 2020, algorithm 1), first-order or Hessian-free.

    A local step has a tuple of batches in place of one: D for u = w - alpha grad f(w), D' for
    g = grad f(u), and, Hessian-free, D'' for the product of the Hessian at w with g, the central
    difference (grad f(w + delta g) - grad f(w - delta g)) / (2 delta). Then
    w <- w - beta (g - alpha H g); first-order leaves out H g. FL-bench takes three batches in
    turn, PFLlib two, and has no Hessian-free form. The mean is uniform in the paper and FL-bench,
    by examples in PFLlib.
    """
    w, history = Vector(params), []
    for cohort, drawn in zip(cohorts, batches, strict=True):
        deltas, weights = [], []
        for k, steps in taking_part(clients, cohort, drawn):
            x, y = clients[k]
            w_k = w
            for adapt, meta, *curve in steps:
                u = w_k - alpha * grad(w_k, x[adapt], y[adapt])
                g = grad(u, x[meta], y[meta])
                if hessian_free:
                    (at,) = curve
                    ahead = grad(w_k + delta * g, x[at], y[at])
                    behind = grad(w_k - delta * g, x[at], y[at])
                    g = g - alpha * (ahead - behind) / (2 * delta)
                w_k = w_k - beta * g
            deltas.append(w - w_k)
            weights.append(client_weight(weighting, len(y)))
        w = w - mean(deltas, weights)
        history.append(Round(params=w))
    return history


def fine_tuned(params, client, grad, *, batches, rate):
    """What a client makes of the server's params for itself: some steps of SGD.

    One step with rate alpha for Per-FedAvg, some steps for Reptile and FedBABU.
    """
    x, y = client
    w = Vector(params)
    for batch in batches:
        w = w - rate * grad(w, x[batch], y[batch])
    return w


def reptile(
    params, clients, grad, *, cohorts, batches, rate, server_rates=1.0, weighting="uniform"
):
    """Reptile (Nichol et al. 2018, algorithm 2), clients as tasks.

    w <- w + epsilon mean(w_k - w): FedAvg with the server's step size epsilon, a number or one for
    each round (the paper lets it fall linearly to zero). The mean over tasks is uniform.
    """
    w, history = Vector(params), []
    for epsilon, cohort, drawn in zip(
        np.broadcast_to(server_rates, len(cohorts)), cohorts, batches, strict=True
    ):
        trained, weights = [], []
        for k, steps in taking_part(clients, cohort, drawn):
            trained.append(fine_tuned(w, clients[k], grad, batches=steps, rate=rate))
            weights.append(client_weight(weighting, len(clients[k][1])))
        w = w + epsilon * (mean(trained, weights) - w)
        history.append(Round(params=w))
    return history


def fed_per(params, clients, grad, *, cohorts, batches, rate, personal, weighting="examples"):
    """FedPer (Arivazhagan et al. 2019): the params named in `personal` stay with their clients.

    A client trains all of its params; the rest are averaged by examples. A client that has not
    taken part yet has the initial ones.
    """
    w, own, history = Vector(params), {}, []
    for cohort, drawn in zip(cohorts, batches, strict=True):
        trained, weights = [], []
        for k, steps in taking_part(clients, cohort, drawn):
            x, y = clients[k]
            w_k = w.replace(own.get(k, w.only(personal)))
            for batch in steps:
                w_k = w_k - rate * grad(w_k, x[batch], y[batch])
            own[k] = w_k.only(personal)
            trained.append(w_k.without(personal))
            weights.append(client_weight(weighting, len(y)))
        w = w.replace(mean(trained, weights))
        history.append(Round(params=w, personal=dict(own)))
    return history


def fed_rep(
    params,
    clients,
    grad,
    *,
    cohorts,
    head_batches,
    batches,
    rate,
    head,
    head_rate=None,
    weighting="examples",
):
    """FedRep (Collins et al. 2021, algorithm 1): first the head alone, then the base alone.

    Steps on `head_batches` move the params named in `head`, which stay with their client; steps on
    `batches` then move the rest, which are averaged: uniformly in the paper, by examples in PFLlib
    and FL-bench. PFLlib takes an epoch each; FL-bench the last epoch for the base, those before
    for the head; the paper's experiments ten for the head and one or more for the base.
    """
    w, own, history = Vector(params), {}, []
    head_rate = rate if head_rate is None else head_rate
    for cohort, head_drawn, drawn in zip(cohorts, head_batches, batches, strict=True):
        trained, weights = [], []
        head_steps = dict(taking_part(clients, cohort, head_drawn))
        for k, steps in taking_part(clients, cohort, drawn):
            x, y = clients[k]
            w_k = w.replace(own.get(k, w.only(head)))
            for batch in head_steps[k]:
                gradient = grad(w_k, x[batch], y[batch])
                w_k = w_k.replace(w_k.only(head) - head_rate * gradient.only(head))
            for batch in steps:
                gradient = grad(w_k, x[batch], y[batch])
                w_k = w_k.replace(w_k.without(head) - rate * gradient.without(head))
            own[k] = w_k.only(head)
            trained.append(w_k.without(head))
            weights.append(client_weight(weighting, len(y)))
        w = w.replace(mean(trained, weights))
        history.append(Round(params=w, personal=dict(own)))
    return history


def fed_babu(params, clients, grad, *, cohorts, batches, rate, head, weighting="examples"):
    """FedBABU (Oh et al. 2022, algorithm 1): FedAvg of the base, with the head as it was drawn.

    To be evaluated as it is, or `fine_tuned`: all params, or the head alone, of which the paper
    compares both.
    """

    def base_grad(w, x, y):
        gradient = grad(w, x, y)
        return gradient.replace(0.0 * gradient.only(head))

    return fed_avg(
        params, clients, base_grad, cohorts=cohorts, batches=batches, rate=rate, weighting=weighting
    )


def fed_bn(params, state, clients, grad, *, cohorts, batches, rate, personal, weighting="examples"):
    """FedBN (Li et al. 2021, algorithm 1): BatchNorm's params and statistics stay with clients.

    `grad(params, state, x, y)` gives the gradient and the next state; `personal` names the params
    of BatchNorm. The rest is averaged: uniformly in the paper, by examples in FL-bench. A client
    that has not taken part yet has the initial ones. PFLlib keeps params alone.
    """
    w, own, history = Vector(params), {}, []
    for cohort, drawn in zip(cohorts, batches, strict=True):
        trained, weights = [], []
        for k, steps in taking_part(clients, cohort, drawn):
            x, y = clients[k]
            norm_k, state_k = own.get(k, (w.only(personal), Vector(state)))
            w_k = w.replace(norm_k)
            for batch in steps:
                gradient, state_k = grad(w_k, state_k, x[batch], y[batch])
                w_k = w_k - rate * gradient
            own[k] = w_k.only(personal), state_k
            trained.append(w_k.without(personal))
            weights.append(client_weight(weighting, len(y)))
        w = w.replace(mean(trained, weights))
        history.append(Round(params=w, personal=dict(own)))
    return history
