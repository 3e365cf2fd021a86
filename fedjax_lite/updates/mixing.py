"""What goes before a reducer: mixtures of the updates, and bounds on their norms."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Reducer, Stack
from fedjax_lite.updates.distances import mean_of, mix, shrinkage, squared_distances
from fedjax_lite.updates.hostile import check_tolerance, count_rows, num_tolerated, numbers_of
from fedjax_lite.updates.robust import told
from fedjax_lite.xla import random
from fedjax_lite.xla.precision import widen

_Info = dict[str, jax.Array]


def side_by_side(reducer: Reducer) -> Callable[[Stack], tuple[list[jax.Array], _Info]]:
    """A reducer as a function of a stack, also one that adds up.

    Raises:
      TypeError: It is no reducer.
    """
    _validate.instance("reducer", reducer, Reducer, "fl.trimmed_mean(0.2)")
    if reducer.stacked is not None:
        return reducer.stacked
    summand, finish = reducer.summand, reducer.finish
    assert summand is not None

    def add_up(stack: Stack) -> tuple[list[jax.Array], _Info]:
        counts = stack.weights != 0
        summands = jax.vmap(summand)(stack.updates, stack.weights)
        total = [jnp.where(counts[:, None], x, 0).sum(0) for x in summands]
        weight = stack.weights.sum()
        return (total if finish is None else finish(total, jnp.where(weight == 0, 1, weight))), {}

    return add_up


def before(
    reducer: Reducer, change: Callable[[Stack], tuple[Stack, _Info]], *, mixes: str = ""
) -> Reducer:
    """A reducer of what `change(stack) -> (stack, info)` makes of the updates.

    What both report under one name is the report of the reducer.

    Args:
      reducer: What comes afterwards.
      change: What goes before it.
      mixes: The name of what mixes updates, if it does.

    Raises:
      TypeError: `reducer` is none.
      ValueError: It needs clients' own updates, and these are mixed.
    """
    inner = side_by_side(reducer)
    if mixes and reducer.needs_clients:
        raise ValueError(
            f"reducer looks at clients one by one, and {mixes} mixes them before; put {mixes}"
            " inside of it."
        )

    def stacked(stack: Stack) -> tuple[list[jax.Array], _Info]:
        changed, info = change(stack)
        aggregate, reported = inner(changed)
        return aggregate, {**info, **reported}

    return reducer._replace(
        summand=None, finish=None, stacked=stacked, sensitivity=Reducer().sensitivity
    )


def nearest_neighbor_mixing(hostile: ArrayLike, reducer: Reducer) -> Reducer:
    r"""Replaces each update by the mean of the $n - f$ nearest to it, itself included (NNM).

    By L2 distances over all arrays together; of updates that are as far, that of the client with
    the smaller id counts. Needs the memory of all updates of a cohort twice, spread over the
    devices, and $2 n^2$ products for each coordinate. Reports `num_counted`, $n$, and
    `num_tolerated`, $f$, unless `reducer` does.

    Source: Allouah et al. (2023), "Fixing by Mixing: A Recipe for Optimal Byzantine ML under
    Heterogeneity".

    Args:
      hostile: As in `trimmed_mean`.
      reducer: What is given the mixtures, such as `fl.trimmed_mean(0.2)`.

    Raises:
      ValueError: As in `trimmed_mean`; or `reducer` needs clients' own updates, as attacks do, and
        this itself.
      TypeError: `reducer` is none.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])
    >>> mixed = nearest_neighbor_mixing(1, fl.coordinate_median())
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), reducer=mixed)
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [2.0]}, {"x": [3.0]}, {"x": [99.0]}])
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1, 2])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.0)), everyone)
    >>> float(state.params)  # The median of 2.5, 2.5 and 51.
    2.5
    """
    hostile = check_tolerance(hostile)

    def change(stack: Stack) -> tuple[Stack, _Info]:
        counted = count_rows(stack)
        f = num_tolerated(hostile, counted)
        distances = squared_distances(stack, counted)
        order = jnp.lexsort((jnp.broadcast_to(stack.client_ids, distances.shape), distances))
        is_near = jnp.argsort(order, axis=1) < counted.number - f
        is_near &= counted.rows[:, None]

        def mixed(x: jax.Array) -> jax.Array:
            known = jnp.where(counted.rows[:, None], widen(x), 0)
            return (mix(is_near, known) / jnp.maximum(counted.number - f, 1)).astype(x.dtype)

        # What does not count is not there any more.
        weights = jnp.where(counted.rows, stack.weights, 0)
        updates = list(map(mixed, stack.updates))
        return stack._replace(updates=updates, weights=weights), told(counted, f)

    return before(reducer, change, mixes="nearest_neighbor_mixing")._replace(needs_clients=True)


def bucketing(size: int, reducer: Reducer) -> Reducer:
    r"""Replaces the updates by means over random buckets of $s$ clients.

    Those that count are shuffled anew in each round, by their ids, whatever the order of the
    cohort; the last bucket may be a smaller one. $\lceil n / s \rceil$ rows are left. A bucket
    weighs as much as it has clients, and is hostile if one of them is: **a share of hostile clients
    becomes one of up to $s$ times as many buckets**, and a number stays.

    Needs the memory of all updates of a cohort twice, spread over the devices. Reports
    `num_buckets`.

    Source: Karimireddy et al. (2022), "Byzantine-Robust Learning on Heterogeneous Datasets via
    Bucketing".

    Args:
      size: $s$, at least 1.
      reducer: What is given the buckets, such as `fl.trimmed_mean(0.4)`.

    Raises:
      ValueError: `size` is less than 1; or `reducer` needs clients' own updates, as attacks and
        `nearest_neighbor_mixing` do.
      TypeError: `reducer` is none.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])
    >>> pairs = bucketing(2, fl.coordinate_median())
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), reducer=pairs)
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [2.0]}, {"x": [3.0]}, {"x": [4.0]}])
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1, 2])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.0)), everyone)
    >>> int(info.metrics["num_buckets"])
    2
    """
    size = _validate.integer("size", size, minimum=1)

    def change(stack: Stack) -> tuple[Stack, _Info]:
        counted = count_rows(stack)
        # A number of its own for each client, whatever its place.
        numbers = numbers_of(stack.key, stack.client_ids)
        order = jnp.lexsort((stack.client_ids, numbers, ~counted.rows))

        def dealt(x: jax.Array) -> jax.Array:
            x = jnp.pad(x[order], [(0, -len(x) % size), *[(0, 0)] * (x.ndim - 1)])
            return x.reshape(-1, size, *x.shape[1:])

        rows = dealt(counted.rows)
        numbers_of_clients = rows.sum(1)
        buckets = stack._replace(
            updates=[jax.vmap(mean_of)(rows, dealt(x)) for x in stack.updates],
            weights=numbers_of_clients.astype(stack.weights.dtype),
            client_ids=jnp.full(len(rows), -1, stack.client_ids.dtype),
            is_hostile=(rows & dealt(stack.is_hostile)).any(1),
            # Another one for what follows.
            key=random.fold_in_pair(stack.key, 1, 0),
        )
        return buckets, {"num_buckets": (numbers_of_clients > 0).sum(dtype=jnp.int32)}

    return before(reducer, change, mixes="bucketing")


def norm_clipping(max_norm: ArrayLike, reducer: Reducer) -> Reducer:
    r"""Scales each update down to an L2 norm of $C$, over all arrays together.

    As `clip_by_norm` does, but on the server, behind attacks that collude. An update whose norm is
    not finite does not count. Reports `num_clipped`.

    Args:
      max_norm: The bound $C$, positive; may be traced.
      reducer: What is given the clipped updates, such as `fl.trimmed_mean(0.2)`.

    Raises:
      ValueError: `max_norm` is not positive.
      TypeError: `reducer` is none.

    >>> import fedjax_lite as fl
    >>> norm_clipping(0.0, fl.trimmed_mean(0.2))
    Traceback (most recent call last):
    ValueError: max_norm is 0.0; choose a number above 0.
    """
    max_norm = _validate.number("max_norm", max_norm, positive=True)
    return before(reducer, lambda stack: _clipped(stack, max_norm))


def adaptive_robust_clipping(hostile: ArrayLike, reducer: Reducer) -> Reducer:
    r"""Scales the updates with the $k$ largest norms down to the largest of the others (ARC).

    $k = \lfloor 2 f (n - f) / n \rfloor$ of $n$ clients: none, where $f = 0$. An update whose norm
    is not finite does not count. Reports `num_clipped`.

    Source: Allouah et al. (2025), "Adaptive Gradient Clipping for Robust Federated Learning".

    Args:
      hostile: As in `trimmed_mean`.
      reducer: What is given the clipped updates, such as `fl.trimmed_mean(0.2)`.

    Raises:
      ValueError: As in `trimmed_mean`.
      TypeError: `reducer` is none.

    >>> import fedjax_lite as fl
    >>> adaptive_robust_clipping(-1, fl.trimmed_mean(0.2))
    Traceback (most recent call last):
    ValueError: hostile is -1; choose an integer at least 0.
    """
    hostile = check_tolerance(hostile)

    def change(stack: Stack) -> tuple[Stack, _Info]:
        counted = count_rows(stack)
        number, f = counted.number, num_tolerated(hostile, counted)
        num_clipped = 2 * f * (number - f) // jnp.maximum(number, 1)
        ordered = jnp.sort(jnp.where(counted.rows, counted.norms, jnp.inf))
        stack, info = _clipped(stack, ordered[jnp.maximum(number - num_clipped, 1) - 1])
        return stack, told(counted, f) | info

    return before(reducer, change)


def _clipped(stack: Stack, max_norm: ArrayLike) -> tuple[Stack, _Info]:
    """The rows with norms of at most that."""
    counted = count_rows(stack)
    factors = shrinkage(counted.norms, max_norm)[:, None]
    updates = [
        jnp.where(counted.rows[:, None], (factors * x).astype(x.dtype), 0) for x in stack.updates
    ]
    weights = jnp.where(counted.rows, stack.weights, 0)
    info = {"num_clipped": (counted.norms > max_norm).sum(dtype=jnp.int32)}
    return stack._replace(updates=updates, weights=weights), info
