"""What hostile clients that collude send in place of their updates."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.scipy.special import ndtri
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Reducer
from fedjax_lite.updates.collusion import Honest, Info, Point, colluding, deviation
from fedjax_lite.updates.distances import mean_of, squared_distances
from fedjax_lite.xla.precision import root, squared_norm, widen


def sign_flip(hostile: ArrayLike | Sequence[int], reducer: Reducer, *, seed: int = 0) -> Reducer:
    r"""Hostile clients send $-\mu$, with $\mu$ the mean of the honest updates.

    Those that collude know the updates of all honest clients that count; means and standard
    deviations are of these, whatever their weights. A hostile client keeps its own weight. Where no
    honest client counts, they send zero. Reports `num_hostile`, the hostile clients with a weight,
    and `honest_distance`, the L2 distance of the aggregate to the mean of the honest updates;
    reducers that select report how many hostile clients they do.

    Takes the memory of all updates of a cohort, spread over the devices, also before a reducer that
    adds up.

    Source: Allen-Zhu et al. (2020), "Byzantine-Resilient Non-Convex Stochastic Gradient Descent".

    Args:
      hostile: Who is hostile; as in `hostile_clients`.
      reducer: What is given the updates, such as `fl.weighted_mean()` or `fl.trimmed_mean(0.2)`.
      seed: Determines who is drawn.

    Raises:
      ValueError: `hostile` is out of range.
      TypeError: `reducer` is none.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])
    >>> attacked = sign_flip([2], fl.weighted_mean())
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), reducer=attacked)
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [2.0]}, {"x": [4.0]}, {"x": [3.0]}])
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1, 2])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.0)), everyone)
    >>> float(state.params), float(info.metrics["honest_distance"])  # (2 + 4 - 3) / 3, beside 3.
    (1.0, 2.0)
    """
    return colluding(hostile, seed, reducer, lambda honest: ([-x for x in honest.mean], {}))


def inner_product_manipulation(
    hostile: ArrayLike | Sequence[int], reducer: Reducer, *, factor: ArrayLike = 2.0, seed: int = 0
) -> Reducer:
    r"""Hostile clients send $-\epsilon \mu$, with $\mu$ the mean of the honest updates (IPM).

    What they know, and what is reported, is as in `sign_flip`. A small $\epsilon$ hides among
    honest updates that differ; a large one turns a mean round.

    Source: Xie et al. (2020), "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product
    Manipulation".

    Args:
      hostile: Who is hostile; as in `hostile_clients`.
      reducer: What is given the updates, such as `fl.trimmed_mean(0.2)`.
      factor: $\epsilon$, positive; may be traced.
      seed: Determines who is drawn.

    Raises:
      ValueError: An argument is out of range.
      TypeError: `reducer` is none.

    >>> import fedjax_lite as fl
    >>> inner_product_manipulation(0.2, fl.trimmed_mean(0.2), factor=0.0)
    Traceback (most recent call last):
    ValueError: factor is 0.0; choose a number above 0.
    """
    factor = _validate.number("factor", factor, positive=True)
    return colluding(
        hostile, seed, reducer, lambda honest: ([jnp.negative(factor * x) for x in honest.mean], {})
    )


def little_is_enough(
    hostile: ArrayLike | Sequence[int],
    reducer: Reducer,
    *,
    z: ArrayLike | None = None,
    seed: int = 0,
) -> Reducer:
    r"""Hostile clients send $\mu + z \sigma$, a little beside the honest updates (ALIE).

    With $\mu$ and $\sigma$ the mean and the standard deviation of the honest updates, coordinate by
    coordinate. By default as much as a majority allows: of $n$ clients that count, $f$ of them
    hostile, $s = \lfloor n / 2 + 1 \rfloor - f$ honest ones are to lie farther out,

    $$z = \max\left(\Phi^{-1}\left(\frac{n - f - s}{n - f}\right), 0\right).$$

    **With few hostile clients that is 0**, as for 2 of 10, and the attack is none: the `z` of the
    round is reported. What they know, and what else is reported, is as in `sign_flip`.

    Source: Baruch et al. (2019), "A Little Is Enough: Circumventing Defenses For Distributed
    Learning". ByzFL has a fixed $z = 1.5$, and others subtract.

    Args:
      hostile: Who is hostile; as in `hostile_clients`.
      reducer: What is given the updates, such as `fl.trimmed_mean(0.2)`.
      z: In place of the default; may be negative, and traced.
      seed: Determines who is drawn.

    Raises:
      ValueError: An argument is out of range.
      TypeError: `reducer` is none.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])
    >>> attacked = little_is_enough(1, fl.weighted_mean(), z=3.0)
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), reducer=attacked)
    >>> clients = [{"x": [0.0]}, {"x": [1.0]}, {"x": [2.0]}, {"x": [3.0]}]
    >>> everyone = fl.cohort_of(fl.FederatedDataset.from_clients(clients).resident(), range(4))
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.0)), everyone)
    >>> float(state.params), float(info.metrics["z"])  # Of deltas -1, -2, -3, and -2 + 3.
    (1.25, 3.0)
    """
    z = None if z is None else _validate.finite("z", z)

    def send(honest: Honest) -> tuple[Point, Info]:
        number, num_hostile = honest.counted.number, honest.num_hostile
        farther = jnp.maximum((number + num_hostile) // 2 + 1 - num_hostile, 1)
        share = (number - farther) / jnp.maximum(number, 1).astype(float)
        strength = jnp.asarray(ndtri(jnp.clip(share, 0.5, 1)) if z is None else z)
        sent = [m + strength * s for m, s in zip(honest.mean, deviation(honest), strict=True)]
        return sent, {"z": strength}

    return colluding(hostile, seed, reducer, send)


def mimic(hostile: ArrayLike | Sequence[int], reducer: Reducer, *, seed: int = 0) -> Reducer:
    r"""Hostile clients send the update of an honest one, who then counts for too many.

    Of the honest clients in the cohort, the one with the smallest id. No update is an outlier, and
    rules that drop those that are rare may do harm where clients' data differ. What is reported is
    as in `sign_flip`.

    Source: Karimireddy et al. (2022), "Byzantine-Robust Learning on Heterogeneous Datasets via
    Bucketing", which first learns whom to mimic.

    Args:
      hostile: Who is hostile; as in `hostile_clients`.
      reducer: What is given the updates, such as `fl.trimmed_mean(0.2)`.
      seed: Determines who is drawn.

    Raises:
      ValueError: `hostile` is out of range.
      TypeError: `reducer` is none.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), reducer=mimic([0], fl.coordinate_median()))
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [2.0]}, {"x": [4.0]}, {"x": [3.0]}])
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1, 2])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.0)), everyone)
    >>> float(state.params)
    4.0
    """

    def send(honest: Honest) -> tuple[Point, Info]:
        stack, rows = honest.stack, honest.counted.rows
        ids = jnp.where(rows, stack.client_ids, jnp.iinfo(stack.client_ids.dtype).max)
        victim = rows & (jnp.arange(len(rows)) == jnp.argmin(ids))
        return [mean_of(victim, x) for x in stack.updates], {}

    return colluding(hostile, seed, reducer, send)


def min_max(hostile: ArrayLike | Sequence[int], reducer: Reducer, *, seed: int = 0) -> Reducer:
    r"""Hostile clients send $\mu - \gamma \sigma$, as far out as two honest updates are apart.

    With $\mu$ and $\sigma$ the mean and the standard deviation of the honest updates $h_i$,
    coordinate by coordinate, and $\gamma$ the largest for which
    $\max_i \|\mu - \gamma \sigma - h_i\| \le \max_{ij} \|h_i - h_j\|$: the least of the roots of
    quadratic equations, in place of the search in the paper. It is reported as `gamma`. What they
    know, and what else is reported, is as in `sign_flip`.

    Takes $n^2$ inner products.

    Source: Shejwalkar and Houmansadr (2021), "Manipulating the Byzantine: Optimizing Model
    Poisoning Attacks and Defenses for Federated Learning", AGR-agnostic min-max.

    Args:
      hostile: Who is hostile; as in `hostile_clients`.
      reducer: What is given the updates, such as `fl.trimmed_mean(0.2)`.
      seed: Determines who is drawn.

    Raises:
      ValueError: `hostile` is out of range.
      TypeError: `reducer` is none.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), reducer=min_max([2], fl.weighted_mean()))
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [2.0]}, {"x": [4.0]}, {"x": [3.0]}])
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1, 2])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.0)), everyone)
    >>> round(float(state.params), 4)  # Of the deltas -2, -4, and -4.
    3.3333
    """

    def send(honest: Honest) -> tuple[Point, Info]:
        stack, rows = honest.stack, honest.counted.rows
        std = deviation(honest)
        # Of each honest update, the square of its distance to mu - gamma sigma is
        # a gamma^2 - 2 b gamma + c, with a = |sigma|^2, b = <sigma, mu - h>, c = |mu - h|^2.
        parts = []
        for x, m, s in zip(stack.updates, honest.mean, std, strict=True):
            apart = jnp.where(rows[:, None], m - widen(x), 0)
            parts.append(jnp.stack([apart @ s, jnp.square(apart).sum(1)]))
        b, c = stack.total(jnp.asarray(sum(parts)))
        a = stack.total(squared_norm(std))
        distances = squared_distances(stack, honest.counted)
        most = jnp.where(rows[:, None] & rows, distances, 0).max()
        roots = (b + root(jnp.square(b) + a * (most - c))) / jnp.where(a > 0, a, 1)
        gamma = jnp.min(roots, where=rows & (a > 0), initial=jnp.inf)
        gamma = jnp.where(jnp.isinf(gamma), 0, gamma)
        sent = [m - gamma * s for m, s in zip(honest.mean, std, strict=True)]
        return sent, {"gamma": gamma}

    return colluding(hostile, seed, reducer, send)
