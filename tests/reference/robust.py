"""Robust rules, what goes before them, and attacks, in NumPy, from their papers.

Updates are the rows of a float64 array `[n, d]`; all of them count, and f may be hostile.
"""

from statistics import NormalDist

import numpy as np


def squared_distances(x):
    """Directly: no product loses digits."""
    return ((x[:, None] - x[None]) ** 2).sum(-1)


def median(x):
    return np.median(x, axis=0)


def trimmed_mean(x, f):
    """Yin et al. (2018)."""
    return np.sort(x, axis=0)[f : len(x) - f].mean(0)


def nearest_to_median(x, kept):
    """The mean of the `kept` values of each coordinate that are closest to its median."""
    ordered = np.sort(x, axis=0)
    closest = np.argsort(np.abs(ordered - np.median(x, axis=0)), axis=0, kind="stable")[:kept]
    return np.take_along_axis(ordered, closest, axis=0).mean(0)


def mean_around_median(x, f):
    """Xie et al. (2018)."""
    return nearest_to_median(x, len(x) - f)


def krum_scores(x, f, margin=2):
    """Blanchard et al. (2017): the distances to the n - f - 2 nearest others."""
    others = np.sort(squared_distances(x), axis=1)[:, 1:]
    return others[:, : max(len(x) - f - margin, 1)].sum(1)


def krum(x, f, margin=2):
    return x[np.argmin(krum_scores(x, f, margin))]


def multi_krum(x, f, num_selected=None, margin=2):
    number = len(x) - f if num_selected is None else num_selected
    return x[np.argsort(krum_scores(x, f, margin), kind="stable")[:number]].mean(0)


def bulyan(x, f, margin=2):
    """El Mhamdi et al. (2018)."""
    left, selected = list(range(len(x))), []
    while len(selected) < len(x) - 2 * f:
        best = np.argmin(krum_scores(x[left], f, margin)) if len(left) > 1 else 0
        selected.append(left.pop(best))
    return nearest_to_median(x[selected], len(x) - 4 * f)


def geometric_median(x, num_iterations, smoothing, start="zero"):
    """Pillutla et al. (2022)."""
    z = np.zeros(x.shape[1]) if start == "zero" else x.mean(0)
    for _ in range(num_iterations):
        betas = 1 / np.maximum(np.linalg.norm(x - z, axis=1), smoothing)
        z = betas @ x / betas.sum()
    return z


def centered_clipping(x, max_norm, num_iterations=1, v=0.0):
    """Karimireddy et al. (2021)."""
    for _ in range(num_iterations):
        apart = x - v
        norms = np.maximum(np.linalg.norm(apart, axis=1, keepdims=True), 1e-300)
        v = v + (apart * np.minimum(1, max_norm / norms)).mean(0)
    return v


def nearest_neighbor_mixing(x, f):
    """Allouah et al. (2023)."""
    nearest = np.argsort(squared_distances(x), axis=1, kind="stable")[:, : len(x) - f]
    return x[nearest].mean(1)


def norm_clipping(x, max_norm):
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return x * np.minimum(1, max_norm / np.maximum(norms, 1e-300))


def adaptive_robust_clipping(x, f):
    """Allouah et al. (2025)."""
    number = 2 * f * (len(x) - f) // len(x)
    return norm_clipping(x, np.sort(np.linalg.norm(x, axis=1))[len(x) - number - 1])


def little_is_enough(honest, f, z=None):
    """Baruch et al. (2019)."""
    n = len(honest) + f
    if z is None:
        s = n // 2 + 1 - f
        z = max(NormalDist().inv_cdf((n - f - s) / (n - f)), 0)
    return honest.mean(0) + z * honest.std(0, ddof=1)


def min_max(honest):
    """Shejwalkar and Houmansadr (2021), by bisection."""
    mean, std = honest.mean(0), honest.std(0, ddof=1)
    most = np.sqrt(squared_distances(honest).max())
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        farthest = np.linalg.norm(mean - middle * std - honest, axis=1).max()
        low, high = (middle, high) if farthest <= most else (low, middle)
    return mean - low * std
