"""What hostile clients send in place of their updates, together or each by itself."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.special import ndtri
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import (
    Client,
    Guarantees,
    Message,
    PyTree,
    Received,
    Reducer,
    Stack,
    UpdateTransform,
)
from fedjax_lite.updates.distances import mean_of, squared_distances
from fedjax_lite.updates.hostile import Counted, count_rows, membership
from fedjax_lite.updates.mixing import side_by_side
from fedjax_lite.updates.pipeline import unmasked
from fedjax_lite.xla.precision import root, squared_norm, widen

_Info = dict[str, jax.Array]
_Point = list[jax.Array]


class _Honest(NamedTuple):
    """What those that collude know: the updates of all honest clients that count.

    Attributes:
      stack: All updates.
      counted: Which of them are honest and count.
      mean: Their mean; zero of none.
      num_hostile: The number of hostile clients with a weight, int32.
    """

    stack: Stack
    counted: Counted
    mean: _Point
    num_hostile: jax.Array


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
    return _colluding(hostile, seed, reducer, lambda honest: ([-x for x in honest.mean], {}))


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
    return _colluding(
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
    z = None if z is None else _finite("z", z)

    def send(honest: _Honest) -> tuple[_Point, _Info]:
        number, num_hostile = honest.counted.number, honest.num_hostile
        farther = jnp.maximum((number + num_hostile) // 2 + 1 - num_hostile, 1)
        share = (number - farther) / jnp.maximum(number, 1).astype(float)
        strength = jnp.asarray(ndtri(jnp.clip(share, 0.5, 1)) if z is None else z)
        sent = [m + strength * s for m, s in zip(honest.mean, _std(honest), strict=True)]
        return sent, {"z": strength}

    return _colluding(hostile, seed, reducer, send)


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

    def send(honest: _Honest) -> tuple[_Point, _Info]:
        stack, rows = honest.stack, honest.counted.rows
        ids = jnp.where(rows, stack.client_ids, jnp.iinfo(stack.client_ids.dtype).max)
        victim = rows & (jnp.arange(len(rows)) == jnp.argmin(ids))
        return [mean_of(victim, x) for x in stack.updates], {}

    return _colluding(hostile, seed, reducer, send)


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

    def send(honest: _Honest) -> tuple[_Point, _Info]:
        stack, rows = honest.stack, honest.counted.rows
        std = _std(honest)
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

    return _colluding(hostile, seed, reducer, send)


def scaled_update(
    hostile: ArrayLike | Sequence[int], factor: ArrayLike, *, seed: int = 0
) -> UpdateTransform:
    r"""Each hostile client sends its own update times a factor.

    With $-1$, the opposite of what it has learnt; with the number of clients over the server's
    learning rate, its own model takes the place of the mean (model replacement). Reports
    `num_hostile`, the hostile clients with a weight. Nothing bounds an update any more.

    Source: Bagdasaryan et al. (2020), "How To Backdoor Federated Learning".

    Args:
      hostile: Who is hostile; as in `hostile_clients`.
      factor: The factor, which may be negative; may be traced.
      seed: Determines who is drawn.

    Returns:
      The `UpdateTransform`. What comes after it in a chain is done by hostile clients as well:
      leave it to the end, or bound their updates by `clip_by_norm`.

    Raises:
      ValueError: An argument is out of range.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), pipeline=scaled_update([1], -10.0))
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [2.0]}, {"x": [3.0]}])
    >>> both = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.0)), both)
    >>> float(state.params), int(info.metrics["num_hostile"])
    (-14.0, 1)
    """
    factor = _finite("factor", factor)
    return _alone(
        "scaled_update", hostile, seed, lambda key, update: optax.tree.scale(factor, update)
    )


def gaussian_update(
    hostile: ArrayLike | Sequence[int], std: ArrayLike = 1.0, *, seed: int = 0
) -> UpdateTransform:
    r"""Each hostile client sends noise, $\mathcal{N}(0, \sigma^2)$ in each coordinate.

    Reports `num_hostile`, as `scaled_update` does. Nothing bounds an update any more.

    Source: Blanchard et al. (2017), "Machine Learning with Adversaries: Byzantine Tolerant Gradient
    Descent".

    Args:
      hostile: Who is hostile; as in `hostile_clients`.
      std: $\sigma$, not negative; may be traced.
      seed: Determines who is drawn.

    Raises:
      ValueError: An argument is out of range.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> noise = gaussian_update([3])
    >>> message = fl.Message(jnp.array([3.0, 4.0]), 1.0)
    >>> client = fl.Client(id=jnp.int32(2), num_examples=5, num_steps=1, entry=(), key=None)
    >>> noise.client(jax.random.key(0), (), message, client).update.tolist()  # An honest one.
    [3.0, 4.0]
    """
    std = _validate.number("std", std)

    def send(key: jax.Array, update: PyTree) -> PyTree:
        noise = optax.tree.random_like(key, update, jax.random.normal)
        return optax.tree.scale(std, noise)

    return _alone("gaussian_update", hostile, seed, send)


def _colluding(
    hostile: Any,
    seed: int,
    reducer: Reducer,
    send: Callable[[_Honest], tuple[_Point, _Info]],
) -> Reducer:
    """A reducer of updates of which hostile ones are what `send` makes of the others."""
    is_hostile, inner = membership(hostile, seed), side_by_side(reducer)

    def stacked(stack: Stack) -> tuple[_Point, _Info]:
        changed = is_hostile(stack.client_ids) & (stack.weights > 0)
        marked = stack._replace(is_hostile=stack.is_hostile | changed)
        counted = count_rows(stack)
        rows = counted.rows & ~marked.is_hostile
        honest = _Honest(
            stack,
            Counted(rows, rows.sum(dtype=jnp.int32), jnp.where(rows, counted.norms, 0)),
            [mean_of(rows, widen(x)) for x in stack.updates],
            marked.is_hostile.sum(dtype=jnp.int32),
        )
        sent, info = send(honest)
        updates = [
            jnp.where(changed[:, None], own.astype(x.dtype), x)
            for own, x in zip(sent, stack.updates, strict=True)
        ]
        aggregate, reported = inner(marked._replace(updates=updates))
        apart = [widen(x) - m for x, m in zip(aggregate, honest.mean, strict=True)]
        distance = root(stack.total(squared_norm(apart)))
        told = {"num_hostile": honest.num_hostile, "honest_distance": distance}
        return aggregate, {**info, **told, **reported}

    return Reducer(stacked=stacked, keeps_last=reducer.keeps_last, needs_clients=True)


def _std(honest: _Honest) -> _Point:
    """The standard deviation of honest updates, with n - 1 below; zero of fewer than two."""
    rows, number, _ = honest.counted
    squares = [
        jnp.where(rows[:, None], jnp.square(widen(x) - mean), 0).sum(0)
        for x, mean in zip(honest.stack.updates, honest.mean, strict=True)
    ]
    return [root(x / jnp.maximum(number - 1, 1)) for x in squares]


def _alone(
    name: str, hostile: Any, seed: int, send: Callable[[jax.Array, PyTree], PyTree]
) -> UpdateTransform:
    """A transform by which each hostile client sends `send(key, update)`."""
    is_hostile = membership(hostile, seed)

    def client(key: jax.Array, state: PyTree, message: Message, client: Client) -> Message:
        del state
        update = jax.tree.map(
            lambda sent, x: jnp.where(is_hostile(client.id), sent, x).astype(x.dtype),
            send(key, message.update),
            message.update,
        )
        return message._replace(update=update)

    def server(key: jax.Array, state: PyTree, received: Received) -> tuple[Received, PyTree, _Info]:
        del key
        those = is_hostile(received.cohort.client_ids) & (received.weights != 0)
        return received, state, {"num_hostile": those.sum(dtype=jnp.int32)}

    def guarantees(before: Guarantees, state: PyTree) -> Guarantees:
        del state
        return unmasked(name, before)._replace(sensitivity=None)

    return UpdateTransform(lambda params: (), client, server, guarantees=guarantees)


def _finite(name: str, value: Any) -> Any:
    """A finite number of any sign; a traced one is not looked at."""
    if isinstance(value, jax.core.Tracer) or (np.ndim(value) == 0 and np.isfinite(value)):
        return value
    raise ValueError(f"{name} is {value!r}; choose a finite number.")
