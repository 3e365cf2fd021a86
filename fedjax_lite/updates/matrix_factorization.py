"""Noise that is correlated over rounds, so that less of it is left in their sum."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedjax_lite import _extras, _validate
from fedjax_lite.base import PyTree, UpdateTransform
from fedjax_lite.updates.noise import additive_noise
from fedjax_lite.xla import random
from fedjax_lite.xla.precision import widen


def toeplitz_noise(
    noise_multiplier: ArrayLike,
    num_rounds: int,
    num_bands: int,
    *,
    coefficients: Sequence[float] | None = None,
    noise_scale: ArrayLike = 1.0,
) -> UpdateTransform:
    r"""DP-FTRL by banded matrix factorization: noise that takes back some of that of rounds before.

    With $C$ the lower-triangular Toeplitz matrix $[n, n]$ whose columns begin with the coefficients
    $c_0, \dots, c_{b-1}$, of norm 1, and then are zero, $g_t$ standard normal noise, and $\Delta$
    the sensitivity of the aggregate in a round, round $t$ adds

    $$z \Delta (C^{-1} g)_t, \qquad
    (C^{-1} g)_t = \frac{1}{c_0} \Big( g_t - \sum_{j=1}^{b-1} c_j (C^{-1} g)_{t-j} \Big).$$

    $z$ is the noise multiplier of taking part once. The rounds of a client must be at least $b$
    apart, as with `fl.samplers.cyclic` of $b$ groups, `minimise_reuse` or `sequential` (and not
    with `round_robin`): they are then columns of $C$ without a common row, $k$ of them change $C x$
    by at most $\sqrt k \Delta$, and are accounted as $k$ times a Gaussian mechanism of multiplier
    $z$. With $b = 1$ this is `fl.gaussian_noise`, for any sampler.

    The noise of a sum of rounds matters where the server optimizer adds them up: `optax.sgd` along
    the noisy aggregates, with momentum or without, is DP-FTRL, since
    $w_t = w_0 - \eta \sum_{s \le t} (x_s + \xi_s)$ is the sum with the noise of the sum.

    After $n$ rounds the noise starts afresh, and so on: rounds before and after are columns without
    a common row, too. The state holds $b - 1$ arrays for each of the params.

    Sources: Choquette-Choo et al. (2023), "(Amplified) Banded Matrix Factorization: A unified
    approach to private training"; Denisov et al. (2022), "Improved Differential Privacy for SGD via
    Optimal Private Linear Operators on Adaptive Streams".

    Args:
      noise_multiplier: $z$, not negative; may be traced.
      num_rounds: $n$, for which the coefficients are the best, and after which noise starts afresh.
      num_bands: $b$, at most $n$.
      coefficients: $c_0, \dots, c_{b-1}$, up to a factor; by default those with the least mean
        squared error of the sums of 1 to $n$ rounds, by jax-privacy, which takes some seconds.
      noise_scale: As in `fl.gaussian_noise`.

    Raises:
      ValueError: A number is out of range; there are not $b$ coefficients, or the first is 0; in a
        chain, what `fl.gaussian_noise` refuses.
      ImportError: There are more bands than one, no coefficients, and no jax-privacy.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> noise = toeplitz_noise(1.0, num_rounds=4, num_bands=2, coefficients=[0.8, 0.6])
    >>> correlated = jax.jit(noise.server)
    >>> independent = jax.jit(fl.gaussian_noise(1.0).server)  # Of the same keys.
    >>> received = fl.Received(jnp.zeros(1), sensitivity=1.0)
    >>> state, before = noise.init(jnp.zeros(1)), 0.0
    >>> for key in jax.random.split(jax.random.key(0), 3):
    ...     got, state, _ = correlated(key, state, received)
    ...     g, _, _ = independent(key, (), received)
    ...     print(bool(jnp.isclose(got.aggregate[0], (g.aggregate[0] - 0.6 * before) / 0.8)))
    ...     before = got.aggregate[0]
    True
    True
    True
    """
    num_rounds = _validate.integer("num_rounds", num_rounds, minimum=1)
    num_bands = _validate.integer("num_bands", num_bands, minimum=1, maximum=num_rounds)
    if coefficients is None:
        coefficients = _best_coefficients(num_rounds, num_bands)
    if len(coefficients) != num_bands or coefficients[0] == 0:
        raise ValueError(
            f"coefficients is {coefficients!r}; give {num_bands}, one for each band, the first of"
            " which is not 0."
        )
    column = np.asarray(coefficients, float) / np.linalg.norm(coefficients)
    num_past = num_bands - 1

    def init(params: PyTree) -> PyTree:
        if not num_past:
            return ()
        past = jax.tree.map(lambda x: jnp.zeros((num_past, *jnp.shape(x)), x.dtype), widen(params))
        return {"past": past, "round": jnp.int32(0)}

    def draw(key: jax.Array, state: PyTree, like: PyTree) -> tuple[PyTree, PyTree]:
        fresh = random.normal_like(key, like)
        if not num_past:
            return fresh, state
        since_start = state["round"] % num_rounds
        # Round r is at place r modulo b - 1, until another one takes it.
        ages = (state["round"] - 1 - jnp.arange(num_past)) % num_past + 1
        weights = jnp.where(ages <= since_start, jnp.asarray(column, float)[ages], 0)

        def correlated(g: jax.Array, past: jax.Array) -> jax.Array:
            taken_back = jnp.tensordot(weights.astype(past.real.dtype), past, 1)
            return (g.astype(past.dtype) - taken_back) / column[0]

        noise = jax.tree.map(correlated, fresh, state["past"])
        place = state["round"] % num_past
        past = jax.tree.map(lambda all_, x: all_.at[place].set(x), state["past"], noise)
        return noise, {"past": past, "round": state["round"] + 1}

    return additive_noise(
        *("toeplitz_noise", noise_multiplier, noise_scale, init, draw), min_separation=num_bands
    )


def tree_noise(
    noise_multiplier: ArrayLike, num_rounds: int, *, noise_scale: ArrayLike = 1.0
) -> UpdateTransform:
    r"""DP-FTRL by tree aggregation: the noise of a sum of $t$ rounds is that of $\log t$ nodes.

    The rounds are leaves of a binary tree with noise at each node. The sum of the first $t$ has
    that of the nodes that cover them, one for each 1 in the binary digits of $t$; a round adds the
    difference to the sum before. With $h = \lfloor \log_2 n \rfloor + 1$ levels, the noise of a
    node has the standard deviation $z \Delta \sqrt h$: a round is a leaf of at most $h$ nodes, and
    $z$ is the noise multiplier of taking part once in $n$ rounds. (That of each node,
    $z \sqrt h$, is what dp-accounting's `SingleEpochTreeAggregationDpEvent` is given.)

    After $n$ rounds a new tree begins. A client must take part at most once in a tree, as with
    `fl.samplers.round_robin` whose passes take $n$ rounds, and each time is accounted as a Gaussian
    mechanism of multiplier $z$. As for `fl.toeplitz_noise`, the server optimizer is `optax.sgd`.

    Nodes are drawn again when they are needed, from their own keys, two in a round on average: the
    state holds a key and the number of the round. Honaker's estimator is not applied.

    Source: Kairouz et al. (2021), "Practical and Private (Deep) Learning without Sampling or
    Shuffling", Algorithm 1.

    Args:
      noise_multiplier: $z$, not negative; may be traced.
      num_rounds: $n$.
      noise_scale: As in `fl.gaussian_noise`.

    Raises:
      ValueError: A number is out of range; in a chain, what `fl.gaussian_noise` refuses.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> noise = tree_noise(1.0, num_rounds=4)
    >>> received = fl.Received(jnp.zeros(10_000), sensitivity=1.0)
    >>> state, total, spread = noise.init(received.aggregate), 0.0, []
    >>> server = jax.jit(noise.server)
    >>> for key in jax.random.split(jax.random.key(0), 4):
    ...     got, state, _ = server(key, state, received)
    ...     total += got.aggregate
    ...     spread.append(round(float(total.std() ** 2) / 3))
    >>> spread  # In units of a node: of the sums of 1, 10, 11 and 100 rounds.
    [1, 1, 2, 1]
    """
    num_rounds = _validate.integer("num_rounds", num_rounds, minimum=1)
    num_levels = math.floor(math.log2(num_rounds)) + 1

    def init(params: PyTree) -> PyTree:
        del params
        return {"key": jnp.zeros(2, jnp.uint32), "round": jnp.int32(0)}

    def draw(key: jax.Array, state: PyTree, like: PyTree) -> tuple[PyTree, PyTree]:
        words = jax.random.key_data(random.fast(key))
        words = jnp.where(state["round"] == 0, words, state["key"])
        base = random.fast(jax.random.wrap_key_data(words, impl="threefry2x32"))
        before = state["round"] % num_rounds
        first = state["round"] - before

        def node(level: ArrayLike, end: jax.Array) -> PyTree:
            """The noise of the node that ends before this round of the tree."""
            key_level = jax.random.fold_in(base, level)
            return random.normal_like(jax.random.fold_in(key_level, first + end), like)

        # The digits that the next number turns from 1 to 0, before the one that it turns to 1.
        level = jax.lax.population_count(before ^ (before + 1)) - 1

        def take_off(i: jax.Array, noise: PyTree) -> PyTree:
            return jax.tree.map(jnp.subtract, noise, node(i, (before >> i) << i))

        noise = jax.lax.fori_loop(0, level, take_off, node(level, before + 1))
        noise = jax.tree.map(lambda x: math.sqrt(num_levels) * x, noise)
        return noise, {"key": words, "round": state["round"] + 1}

    return additive_noise(
        *("tree_noise", noise_multiplier, noise_scale, init, draw), min_separation=num_rounds
    )


@functools.cache
def _best_coefficients(num_rounds: int, num_bands: int) -> tuple[float, ...]:
    """Those with the least mean squared error of the sums of rounds."""
    if num_bands == 1:
        return (1.0,)
    toeplitz = _extras.require("jax_privacy.matrix_factorization.toeplitz", "privacy")
    with jax.ensure_compile_time_eval():  # Where a round is traced, too.
        return tuple(np.asarray(toeplitz.optimize_banded_toeplitz(num_rounds, num_bands)).tolist())
