"""Clusters of clients, and of examples."""

import numpy as np

from reference.vectors import Round, Vector, client_weight, mean, taking_part


def ifca(
    params,
    clients,
    model,
    *,
    cohorts,
    batches,
    rate,
    server_rate=1.0,
    weighting="uniform",
):
    """IFCA (Ghosh et al. 2020, algorithm 1, model averaging) and HypCluster (Mansour et al. 2020).

    `params` is a list of models. Each client trains that with the lowest loss over all of its
    examples, the first of equals, and a model becomes the mean of those trained from it: uniform in
    IFCA, by examples in HypCluster. A model that no one picks stays.
    """
    ws, history = [Vector(p) for p in params], []
    for cohort, drawn in zip(cohorts, batches, strict=True):
        picked, deltas, weights = {}, [[] for _ in ws], [[] for _ in ws]
        for k, steps in taking_part(clients, cohort, drawn):
            x, y = clients[k]
            j = picked[k] = int(np.argmin([model.loss(w, x, y) for w in ws]))
            w_k = ws[j]
            for batch in steps:
                w_k = w_k - rate * model.grad(w_k, x[batch], y[batch])
            deltas[j].append(ws[j] - w_k)
            weights[j].append(client_weight(weighting, len(y)))
        ws = [
            w - server_rate * mean(own, shares) if own else w
            for w, own, shares in zip(ws, deltas, weights, strict=True)
        ]
        history.append(Round(params=ws, picked=picked))
    return history


def k_means(centroids, clients, *, cohorts, counts=None, keep_counts=True):
    """Federated k-means, as in TensorFlow Federated; mini-batches (Sculley 2010) are cohorts.

    `clients` is a list of arrays `[examples, features]`. Clients send the sum and the number of
    their examples nearest to each centroid (the first of equals). A centroid becomes
    (c mu + sum) / (c + number), with c the examples that it has had before, from 1 each on unless
    `counts` says otherwise. With `keep_counts=False`, c = 0 in each round, which is Lloyd's
    algorithm on the examples of the cohort. Without an example, a centroid stays.
    """
    mu = np.array(centroids, np.float64)
    c = np.ones(len(mu)) if counts is None else np.array(counts, np.float64)
    history = []
    for cohort in cohorts:
        sums, numbers = np.zeros_like(mu), np.zeros(len(mu))
        for k in cohort:
            for x in clients[k]:
                j = ((x - mu) ** 2).sum(1).argmin()
                sums[j] += x
                numbers[j] += 1
        before = c if keep_counts else np.zeros(len(mu))
        for j in range(len(mu)):
            if numbers[j] > 0:
                mu[j] = (before[j] * mu[j] + sums[j]) / (before[j] + numbers[j])
        c = before + numbers
        history.append(Round(centroids=mu.copy(), counts=c))
    return history


def gaussian_log_density(x, center, covariance):
    """Of examples `[n, features]`; a covariance `[features]` is the diagonal of one."""
    covariance = np.diag(covariance) if covariance.ndim == 1 else covariance
    away = x - center
    distance = (away * np.linalg.solve(covariance, away.T).T).sum(1)
    log_determinant = np.linalg.slogdet(covariance)[1]
    return -(distance + log_determinant + len(center) * np.log(2 * np.pi)) / 2


def gaussian_mixture(
    weights, centers, covariances, clients, *, cohorts, floor=0.0, floor_fraction=0.0
):
    """Federated expectation maximisation for a mixture of Gaussians (Dempster et al. 1977).

    `clients` is a list of arrays `[examples, features]`; covariances are `[components, features]`,
    diagonal, or `[components, features, features]`. Clients send the responsibilities r of their
    examples as sum r, sum r x and sum r x x^T, or sum r x^2, and their log-likelihoods at the
    parameters that they receive; the server maximises. All examples weigh the same. Diagonal
    variances are at least `floor`, and at least `floor_fraction` of the variance of the mixture
    before the round: 0.01 in pfl, whose covariances are diagonal, and which drops components that
    weigh less than 0.01. A component without responsibility stays, and weighs zero.
    """
    pi, mu = np.array(weights, np.float64), np.array(centers, np.float64)
    sigma = np.array(covariances, np.float64)
    diagonal, history = sigma.ndim == 2, []
    for cohort in cohorts:
        r_sum = np.zeros(len(pi))
        rx_sum, rxx_sum = np.zeros_like(mu), np.zeros_like(sigma)
        log_likelihood, number = 0.0, 0
        for k in cohort:
            x = clients[k]
            with np.errstate(divide="ignore"):  # The logarithm of a weight of zero.
                joint = np.stack(
                    [
                        np.log(pi[j]) + gaussian_log_density(x, mu[j], sigma[j])
                        for j in range(len(pi))
                    ],
                    axis=1,
                )
            marginal = np.logaddexp.reduce(joint, axis=1)
            r = np.exp(joint - marginal[:, None])
            r_sum += r.sum(0)
            rx_sum += r.T @ x
            for j in range(len(pi)):
                weighted = r[:, j, None] * x
                rxx_sum[j] += (weighted * x).sum(0) if diagonal else weighted.T @ x
            log_likelihood += marginal.sum()
            number += len(x)
        if diagonal:
            center = pi @ mu
            spread = pi @ (sigma + (mu - center) ** 2)
            least = np.maximum(floor, floor_fraction * spread)
        pi = r_sum / number
        mu, sigma = mu.copy(), sigma.copy()
        for j in range(len(pi)):
            if r_sum[j] > 0:
                mu[j] = rx_sum[j] / r_sum[j]
                second = rxx_sum[j] / r_sum[j]
                if diagonal:
                    sigma[j] = np.maximum(second - mu[j] ** 2, least)
                else:
                    sigma[j] = second - np.outer(mu[j], mu[j])
        history.append(
            Round(
                weights=pi,
                centers=mu,
                covariances=sigma,
                log_likelihood=log_likelihood / number,
            )
        )
    return history
