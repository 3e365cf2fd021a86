"""Algorithms that weigh clients or domains by their losses."""

import numpy as np

from reference.vectors import Round, Vector, client_weight, mean, norm, taking_part


def q_fed_avg(
    params,
    clients,
    model,
    *,
    cohorts,
    batches,
    rate,
    q,
    lipschitz=None,
    floor=0.0,
    weighting="uniform",
):
    """q-FedAvg (Li et al. 2020, Fair resource allocation in federated learning, algorithm 2).

    The loss F_k of a client is that of all its examples at the params that it receives. L is
    1 / `rate` unless given. Sums over the cohort are plain in the paper, where clients are drawn in
    proportion to their sizes; "examples" weighs the summands of both. The authors' code adds
    `floor` = 1e-10 to F_k.
    """
    w, history = Vector(params), []
    big_l = 1 / rate if lipschitz is None else lipschitz
    for cohort, drawn in zip(cohorts, batches, strict=True):
        total, scale = 0.0 * w, 0.0
        for k, steps in taking_part(clients, cohort, drawn):
            x, y = clients[k]
            f_k = model.loss(w, x, y) + floor
            w_k = w
            for batch in steps:
                w_k = w_k - rate * model.grad(w_k, x[batch], y[batch])
            step = big_l * (w - w_k)
            weight = client_weight(weighting, len(y))
            total = total + weight * f_k**q * step
            scale += weight * (q * f_k ** (q - 1) * norm(step) ** 2 + big_l * f_k**q)
        w = w - total / scale
        history.append(Round(params=w, scale=scale))
    return history


def agnostic_fed_avg(
    params,
    clients,
    model,
    *,
    cohorts,
    batches,
    rate,
    server_rate=1.0,
    domain_weights,
    domain_rate,
    window,
    absent=np.inf,
    batch_scale=False,
):
    """Agnostic federated averaging (Ro et al. 2021), as in its authors' FedJAX.

    Clients are `(x, y, domain)`, the latter an index for each example. `domain_weights` lambda
    start as given, and grow by exponentiated gradient with the mean loss of a domain's examples in
    the cohort, at the server's params; that of a domain without examples is 0. `window` lists the
    numbers of examples of each domain in the last rounds, the oldest first. An example of domain d
    weighs alpha_d = lambda_d over the mean of the window, or over `absent` if that is 0, where
    FedJAX divides by zero; a client the sum beta of its examples' alpha, in the mean of deltas too.

    A local step follows the gradient of the sum over the batch of alpha times loss, over beta: it
    shrinks with the part of the client's examples that are in the batch. With `batch_scale`, it is
    multiplied by the inverse of that part, by which one domain makes this FedAvg.
    """
    w, history = Vector(params), []
    lam = np.array(domain_weights, np.float64)
    window = [np.array(counts, np.float64) for counts in window]
    domains = range(len(lam))
    for cohort, drawn in zip(cohorts, batches, strict=True):
        seen = np.mean(window, axis=0)
        alpha = lam / np.where(seen > 0, seen, absent)
        deltas, betas = [], []
        losses, counts = np.zeros(len(lam)), np.zeros(len(lam))
        for k, steps in taking_part(clients, cohort, drawn):
            x, y, domain = clients[k]
            for d in domains:
                own = domain == d
                if own.any():
                    losses[d] += own.sum() * model.loss(w, x[own], y[own])
                    counts[d] += own.sum()
            beta = alpha[domain].sum()
            if beta == 0:
                continue
            w_k = w
            for batch in steps:
                gradient = 0.0 * w
                for d in domains:
                    own = batch[domain[batch] == d]
                    if len(own):
                        of_sum = len(own) * model.grad(w_k, x[own], y[own])
                        gradient = gradient + alpha[d] / beta * of_sum
                scale = len(y) / len(batch) if batch_scale else 1.0
                w_k = w_k - rate * scale * gradient
            deltas.append(w - w_k)
            betas.append(beta)
        w = w - server_rate * mean(deltas, betas)
        lam = lam * np.exp(domain_rate * losses / np.maximum(counts, 1))
        lam = lam / lam.sum()
        window = [*window[1:], counts]
        history.append(Round(params=w, domain_weights=lam, window=window))
    return history
