"""Robust rules that select updates by their distances to others: Krum and what follows from it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Reducer, Stack
from fedjax_lite.updates.distances import by_score, mean_of, squared_distances
from fedjax_lite.updates.hostile import Counted, check_tolerance, count_rows, num_tolerated
from fedjax_lite.updates.robust import in_order, mean_around, told


def krum(hostile: ArrayLike, *, margin: int = 2) -> Reducer:
    r"""The update that lies closest to others.

    The score of an update is the sum of its squared distances to the $n - f - 2$ others that are
    nearest (at least to one), over all arrays together; the lowest one wins, and of equal ones that
    of the client with the smallest id.

    Takes the place of a mean, whatever the weights of the clients: it is one client's update. Needs
    the memory of all updates of a cohort, spread over the devices, and $n^2$ inner products.
    Reports `num_counted`, $n$; `num_tolerated`, $f$; `num_selected`, 1, and `num_hostile_selected`,
    1 if an attack before it changed the one selected; and its `selected_id`.

    Source: Blanchard et al. (2017), "Machine Learning with Adversaries: Byzantine Tolerant Gradient
    Descent". It is proven to withstand $2 f + 2 < n$.

    Args:
      hostile: As in `trimmed_mean`.
      margin: 2, or 1 for the $n - f - 1$ nearest others, as ByzFL has it.

    Raises:
      ValueError: `margin` is neither; or as in `trimmed_mean`.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), reducer=krum(1))
    >>> clients = [{"x": [2.0]}, {"x": [3.0]}, {"x": [3.5]}, {"x": [99.0]}]
    >>> everyone = fl.cohort_of(fl.FederatedDataset.from_clients(clients).resident(), range(4))
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.0)), everyone)
    >>> float(state.params), int(info.metrics["selected_id"])
    (3.0, 1)
    """
    return _best(hostile, 1, margin)


def multi_krum(hostile: ArrayLike, num_selected: int | None = None, *, margin: int = 2) -> Reducer:
    r"""The mean of the $m$ updates that have the lowest scores of `krum`.

    Takes the place of a mean, whatever the weights of the clients. With as many selected as there
    are, it is their mean. Needs the memory of all updates of a cohort, spread over the devices, and
    $n^2$ inner products. Reports what `krum` does, but for the id.

    Source: Blanchard et al. (2017), "Machine Learning with Adversaries: Byzantine Tolerant Gradient
    Descent", for $m \le n - f - 2$.

    Args:
      hostile: As in `trimmed_mean`.
      num_selected: $m$; at most all that count. By default $n - f$, as ByzFL has it.
      margin: As in `krum`.

    Raises:
      ValueError: As in `krum`; or `num_selected` is less than 1.

    >>> import jax.numpy as jnp, fedjax_lite as fl
    >>> multi_krum(0.2, 0)
    Traceback (most recent call last):
    ValueError: num_selected is 0; choose an integer at least 1.
    """
    if num_selected is not None:
        num_selected = _validate.integer("num_selected", num_selected, minimum=1)
    return _best(hostile, num_selected, margin)


def bulyan(hostile: ArrayLike, *, margin: int = 2) -> Reducer:
    r"""Krum's choices one after the other, and of these the mean around the median.

    $\theta = n - 2 f$ times, the winner of `krum` among the updates that are left is selected. The
    aggregate is, coordinate by coordinate, the mean of the $\theta - 2 f$ selected values closest
    to their median, the smaller of two that are as close. With $f = 0$ it is the mean.

    Takes the place of a mean, whatever the weights of the clients. Needs the memory of all updates
    of a cohort, spread over the devices, $n^2$ inner products and $n^3$ further steps. Reports what
    `krum` does, but for the id.

    Source: El Mhamdi et al. (2018), "The Hidden Vulnerability of Distributed Learning in
    Byzantium", for $n \ge 4 f + 3$. Flower ranks once and selects the first $\theta$.

    Args:
      hostile: How many of the clients that count may be hostile: a share of them below 0.25, which
        may be traced, rounded down; or an integer, $f$ itself. In a round where fewer than
        $4 f + 3$ count, $f$ is the largest number that they can stand.
      margin: As in `krum`.

    Raises:
      ValueError: As in `krum`; or there are less than $4 f + 3$ slots.

    >>> import jax.numpy as jnp, fedjax_lite as fl
    >>> bulyan(0.25)
    Traceback (most recent call last):
    ValueError: hostile is 0.25; choose a share below 0.25, or a number of clients, an integer.
    """
    hostile, margin = check_tolerance(hostile, below=0.25), _check_margin(margin)

    def stacked(stack: Stack) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        counted = count_rows(stack)
        f = num_tolerated(hostile, counted, per=4, beyond=3)
        others = _others(stack, counted)
        number = counted.number - 2 * f

        def select(i: jax.Array, left: jax.Array) -> jax.Array:
            scores = _scores(others, left, counted.number - i - f - margin)
            best = by_score(scores, stack, left)[0]
            return left.at[best].set(left[best] & (i >= number))

        left = jax.lax.fori_loop(0, len(counted.rows), select, counted.rows)
        selected = counted.rows & ~left
        reduced = [
            mean_around(in_order(x, selected), number, number - 2 * f).astype(x.dtype)
            for x in stack.updates
        ]
        return reduced, told(counted, f) | _told_selected(stack, selected)

    return Reducer(stacked=stacked)


def _best(hostile: Any, num_selected: int | None, margin: int) -> Reducer:
    """The mean of the updates with the lowest scores."""
    hostile, margin = check_tolerance(hostile), _check_margin(margin)

    def stacked(stack: Stack) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        counted = count_rows(stack)
        f = num_tolerated(hostile, counted)
        others = _others(stack, counted)
        scores = _scores(others, counted.rows, counted.number - f - margin)
        order = by_score(scores, stack, counted.rows)
        number = counted.number - f if num_selected is None else num_selected
        is_first = jnp.arange(len(order)) < number
        selected = counted.rows & jnp.zeros_like(is_first).at[order].set(is_first)
        info = told(counted, f) | _told_selected(stack, selected)
        if num_selected == 1:
            info["selected_id"] = jnp.where(selected, stack.client_ids, -1).max()
        return [mean_of(selected, x) for x in stack.updates], info

    return Reducer(stacked=stacked)


class _Others(NamedTuple):
    """Of each row the others, `[rows, rows]`, from the nearest to the farthest.

    Attributes:
      rows: Which they are; the last one is the row itself.
      distances: Their squared distances.
    """

    rows: jax.Array
    distances: jax.Array


def _others(stack: Stack, counted: Counted) -> _Others:
    distances = jnp.fill_diagonal(squared_distances(stack, counted), jnp.inf, inplace=False)
    rows = jnp.argsort(distances, axis=1)
    return _Others(rows, jnp.take_along_axis(distances, rows, axis=1))


def _scores(others: _Others, left: jax.Array, number: jax.Array) -> jax.Array:
    """The sum of the squared distances to the nearest rows that are left, at least to one."""
    candidates = left[others.rows]
    is_near = candidates & (jnp.cumsum(candidates, axis=1) <= jnp.maximum(number, 1))
    return jnp.where(is_near, others.distances, 0).sum(1)


def _check_margin(margin: int) -> int:
    return _validate.integer("margin", margin, minimum=1, maximum=2)


def _told_selected(stack: Stack, selected: jax.Array) -> dict[str, jax.Array]:
    """What rules report that select."""
    return {
        "num_selected": selected.sum(dtype=jnp.int32),
        "num_hostile_selected": (selected & stack.is_hostile).sum(dtype=jnp.int32),
    }
