"""Robust rules that look for a centre: the geometric median, and centered clipping."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Reducer, Stack
from fedjax_lite.updates.distances import distances_to, mean_of, mix, shrinkage
from fedjax_lite.updates.hostile import count_rows
from fedjax_lite.xla.precision import widen

_Point = list[jax.Array]


def geometric_median(
    num_iterations: int = 8,
    *,
    smoothing: ArrayLike = 1e-6,
    start: Literal["zero", "mean"] = "zero",
) -> Reducer:
    r"""The point with the least sum of distances to the updates, by Weiszfeld's iteration (RFA).

    $$\beta_i = \frac{1}{\max(\|x_i - z\|, \nu)}, \qquad
    z \leftarrow \frac{\sum_i \beta_i x_i}{\sum_i \beta_i}$$

    Takes the place of a mean, whatever the weights of the clients. After few iterations it depends
    on the start: from zero, where no update moves the params, one that is huge counts for little at
    once; from the mean, each iteration takes back a part of what it has moved. With $\nu$ beyond
    all distances it is the mean.

    Needs the memory of all updates of a cohort, spread over the devices, and reads them twice in an
    iteration. Reports `num_counted`, the clients that count.

    Source: Pillutla et al. (2022), "Robust Aggregation for Federated Learning", which starts from
    the mean, with $\nu = 10^{-6}$. ByzFL has 3 iterations from zero, with $\nu = 0.1$.

    Args:
      num_iterations: Iterations, at least one.
      smoothing: $\nu$, positive, in the units of the updates' norms; may be traced.
      start: `"zero"` or `"mean"`.

    Raises:
      ValueError: An argument is out of range.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), reducer=geometric_median(20))
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [2.0]}, {"x": [3.0]}, {"x": [99.0]}])
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1, 2])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.0)), everyone)
    >>> round(float(state.params), 3)  # On a line, the median.
    3.0
    """
    num_iterations = _validate.integer("num_iterations", num_iterations, minimum=1)
    smoothing = _validate.number("smoothing", smoothing, positive=True)
    _validate.choice("start", start, ("zero", "mean"))

    def stacked(stack: Stack) -> tuple[_Point, dict[str, jax.Array]]:
        counted = count_rows(stack)
        zeroed = [jnp.where(counted.rows[:, None], widen(x), 0) for x in stack.updates]

        def improve(_: int, point: _Point) -> _Point:
            distances = jnp.maximum(distances_to(stack, point), smoothing)
            # In units of the closest one, so that none overflows; those beyond all bounds get 0.
            closest = jnp.min(distances, where=counted.rows, initial=jnp.inf)
            betas = jnp.where(counted.rows, closest / distances, 0)
            total = betas.sum()
            return [
                jnp.where(total > 0, mix(betas, x) / total, v)
                for x, v in zip(zeroed, point, strict=True)
            ]

        point = [mean_of(counted.rows, x) * (start == "mean") for x in zeroed]
        point = jax.lax.fori_loop(0, num_iterations, improve, point)
        return _like(stack, point), {"num_counted": counted.number}

    return Reducer(stacked=stacked)


def centered_clipping(max_norm: ArrayLike, num_iterations: int = 1) -> Reducer:
    r"""The last aggregate, moved towards each update by no more than $\tau$.

    $$v \leftarrow v + \frac{1}{n} \sum_i (x_i - v) \min\left(1, \frac{\tau}{\|x_i - v\|}\right)$$

    $v$ is the aggregate of the last round that was not skipped, zero before the first. With $\tau$
    beyond all distances it is the mean.

    Takes the place of a mean, whatever the weights of the clients. Needs the memory of all updates
    of a cohort, spread over the devices, and that of one more update, and reads them twice in an
    iteration. Reports `num_counted`, $n$.

    Source: Karimireddy et al. (2021), "Learning from History for Byzantine Robust Optimization",
    where clients send momentum, as `client_momentum` does.

    Args:
      max_norm: $\tau$, positive; may be traced.
      num_iterations: Iterations in a round, at least one.

    Raises:
      ValueError: An argument is out of range.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), reducer=centered_clipping(6.0))
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [2.0]}, {"x": [4.0]}, {"x": [99.0]}])
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1, 2])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.0)), everyone)
    >>> float(state.params)  # (2 + 4 + 6) / 3.
    4.0
    """
    max_norm = _validate.number("max_norm", max_norm, positive=True)
    num_iterations = _validate.integer("num_iterations", num_iterations, minimum=1)

    def stacked(stack: Stack) -> tuple[_Point, dict[str, jax.Array]]:
        counted = count_rows(stack)

        def improve(_: int, point: _Point) -> _Point:
            factors = shrinkage(distances_to(stack, point), max_norm)

            def moved(x: jax.Array, v: jax.Array) -> jax.Array:
                apart = jnp.where(counted.rows[:, None], widen(x) - v, 0)
                return v + mix(factors, apart) / jnp.maximum(counted.number, 1)

            return list(map(moved, stack.updates, point))

        point = jax.lax.fori_loop(0, num_iterations, improve, list(map(widen, stack.last)))
        return _like(stack, point), {"num_counted": counted.number}

    return Reducer(stacked=stacked, keeps_last=True)


def _like(stack: Stack, point: _Point) -> _Point:
    """In the dtypes of the updates."""
    return [v.astype(x.dtype) for x, v in zip(stack.updates, point, strict=True)]
