"""Canaries among the clients, and what can be told of them from a run: epsilon from below."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite._extras import require
from fedjax_lite.base import (
    Client,
    FederatedAlgorithm,
    Guarantees,
    Message,
    PyTree,
    Received,
    UpdateTransform,
)
from fedjax_lite.data.population import Population
from fedjax_lite.engine.cohorts import cohort_of
from fedjax_lite.samplers import Sampler
from fedjax_lite.updates.pipeline import unmasked


class Scores(NamedTuple):
    """How much the params moved along each canary, and whether it was there.

    Attributes:
      final: `[runs, canaries]`, the cosine of its direction and of the movement from the first
        params to the last ones.
      iterates: `[runs, canaries]`, the largest cosine with the movement in a single round.
      planted: `[runs, canaries]`, bool, whether it could take part.
    """

    final: jax.Array
    iterates: jax.Array
    planted: jax.Array


class Audit(NamedTuple):
    """What scores show.

    Attributes:
      epsilon: What is spent at least, with the confidence asked for; 0 if nothing is shown.
      auc: Probability that a canary which was there has a higher score than one which was not.
    """

    epsilon: float
    auc: float


def canaries(
    key: jax.Array,
    client_ids: ArrayLike | Sequence[int],
    norm: ArrayLike,
    *,
    planted: ArrayLike = True,
) -> UpdateTransform:
    r"""Has some clients send a random direction in place of their update: those that audits find.

    Client $i$ sends $C u_i$ in each round that it takes part in, with $u_i$ of norm 1 and uniform
    on the sphere, drawn anew from the key and its id each time, so that none is kept. Its weight
    stays what it is. Put it first in the pipeline.

    Source: Andrew et al. (2023), "One-shot Empirical Privacy Estimation for Federated Learning".

    Args:
      key: Typed key of the directions.
      client_ids: `[canaries]`, clients of the population that have examples.
      norm: $C$, positive, such as the bound that the pipeline clips to; may be traced.
      planted: `[canaries]` or one for all, whether they are there; the others send nothing.

    Raises:
      ValueError: `norm` is not positive.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> client = fl.Client(jnp.int32(3), jnp.int32(1), jnp.int32(1), (), jax.random.key(1))
    >>> transform = canaries(jax.random.key(0), [3, 5], 2.0)
    >>> message = fl.Message(jnp.ones(4), 1.0)
    >>> sent = jax.jit(transform.client)(jax.random.key(2), (), message, client)
    >>> round(float(jnp.linalg.norm(sent.update)), 4), float(sent.weight)
    (2.0, 1.0)
    """
    _validate.key("key", key)
    norm = _validate.number("norm", norm, positive=True)
    ids = jnp.asarray(client_ids, jnp.int32)
    there = jnp.broadcast_to(jnp.asarray(planted, bool), ids.shape)

    def client(key_client: jax.Array, state: PyTree, message: Message, client: Client) -> Message:
        del key_client, state
        own = ids == client.id
        sent = optax.tree.scale(norm, _direction(key, client.id, message.update))
        update = jax.tree.map(
            lambda new, old: jnp.where(own.any(), new.astype(old.dtype), old), sent, message.update
        )
        is_absent = (own & ~there).any()
        return message._replace(update=update, weight=jnp.where(is_absent, 0, message.weight))

    def server(
        key_round: jax.Array, state: PyTree, received: Received
    ) -> tuple[Received, PyTree, dict[str, jax.Array]]:
        del key_round
        return received, state, {}

    def guarantees(before: Guarantees, state: PyTree) -> Guarantees:
        del state
        return unmasked("canaries", before)._replace(sensitivity=None)

    return UpdateTransform(lambda params: (), client, server, guarantees=guarantees)


def canary_scores(
    build: Callable[[UpdateTransform], FederatedAlgorithm],
    population: Population,
    sampler: Sampler,
    num_rounds: int,
    *,
    keys: jax.Array,
    client_ids: ArrayLike | Sequence[int],
    norm: ArrayLike,
    batch_size: int = 64,
) -> Scores:
    """Runs with canaries, each planted on a coin of its own, and scores them.

    A pure function, which can be called inside of `jax.jit`, with traced noise multipliers in
    `build`. What one canary shows in each of many runs is independent; many canaries in one run
    show less, at the price of that run.

    Source: as for `canaries`, with the coins of Steinke et al. (2023), "Privacy Auditing with One
    (1) Training Run".

    Args:
      build: `build(canaries) -> algorithm`, with `canaries` as the first of its pipeline.
      population: `dataset.resident()` or a `GeneratedPopulation`.
      sampler: Who takes part.
      num_rounds: Rounds of each run.
      keys: Typed keys `[runs]`.
      client_ids: `[canaries]`, the clients in whose place they are.
      norm: As for `canaries`.
      batch_size: Runs side by side; changes the speed only.

    Returns:
      The `Scores`.

    Raises:
      ValueError: An argument is out of range.
    """
    num_rounds = _validate.integer("num_rounds", num_rounds, minimum=1)
    _validate.key("keys", keys, single=False)
    ids = jnp.asarray(client_ids, jnp.int32)

    def run(population: Population, key: jax.Array) -> Scores:
        key_init, key_sampler, key_rounds, key_canaries, key_coins = jax.random.split(key, 5)
        planted = jax.random.bernoulli(key_coins, shape=ids.shape)
        algorithm = build(canaries(key_canaries, ids, norm, planted=planted))

        def cosines(before: PyTree, after: PyTree) -> jax.Array:
            movement = optax.tree.sub(before, after)
            # Of no movement at all, 0.
            length = jnp.maximum(optax.tree.norm(movement), jnp.finfo(jnp.float32).tiny)

            def cosine(client_id: jax.Array) -> jax.Array:
                direction = _direction(key_canaries, client_id, movement)
                return optax.tree.vdot(direction, movement) / length

            return jax.lax.map(cosine, ids, batch_size=batch_size)

        def round(carry: tuple[Any, jax.Array], r: jax.Array) -> tuple[Any, None]:
            state, highest = carry
            key_cohort, key_round = jax.random.split(jax.random.fold_in(key_rounds, r))
            selection = sampler.select(key_sampler, r)
            cohort = cohort_of(population, selection.client_ids, key=key_cohort)
            after, _ = algorithm.round(key_round, state, cohort)
            return (after, jnp.maximum(highest, cosines(state.params, after.params))), None

        first = algorithm.init(key_init, num_clients=population.num_clients)
        carry = first, jnp.full(ids.shape, -jnp.inf)
        (last, highest), _ = jax.lax.scan(round, carry, jnp.arange(num_rounds))
        return Scores(cosines(first.params, last.params), highest, planted)

    @jax.jit
    def all_runs(population: Population, keys: jax.Array) -> Scores:
        return jax.lax.map(functools.partial(run, population), keys, batch_size=batch_size)

    return all_runs(population, keys)


def audit(
    scores: ArrayLike, planted: ArrayLike, delta: float, *, confidence: float = 0.95
) -> Audit:
    """A lower bound of epsilon, from how well scores tell who was there.

    Of one canary in each run, by the rates of errors and their bounds of Clopper and Pearson, at a
    threshold that half of the scores choose for the other half (Jagielski et al., 2020, "Auditing
    Differentially Private Machine Learning"). Of several in a run, whose scores depend on each
    other, by the number of right guesses (Steinke et al., 2023).

    A bound that is above what a `Ledger` claims shows that something is wrong. One that is below
    shows little: canaries are not the worst that can be, and few of them cannot show much.

    Args:
      scores: `[runs, canaries]`, a field of `Scores`; higher where the canary was there.
      planted: `[runs, canaries]`, whether it was.
      delta: The delta that epsilon is asked for.
      confidence: Probability that the bound holds, between 0.5 and 1.

    Returns:
      The `Audit`.

    Raises:
      ValueError: An argument is out of range; all canaries were there, or none.
      ImportError: jax-privacy is missing.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> planted = rng.random((2000, 1)) < 0.5
    >>> found = audit(planted + rng.normal(size=planted.shape), planted, 1e-2)  # As of z = 1.
    >>> 0.5 < found.epsilon < 2.4, round(found.auc, 1)
    (True, 0.8)
    """
    scores, planted = np.asarray(scores), np.asarray(planted, bool)
    if scores.ndim != 2 or scores.shape != planted.shape or planted.all() or not planted.any():
        raise ValueError(
            f"scores has shape {scores.shape} and planted {planted.shape}, with {planted.sum()}"
            " canaries that were there; pass [runs, canaries], with some that were and some that"
            " were not."
        )
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; choose a number between 0.5 and 1.")
    auditing = require("jax_privacy.auditing", "privacy")
    auditor = auditing.CanaryScoreAuditor(scores[planted], scores[~planted])
    method = auditor.epsilon_one_run
    if scores.shape[1] == 1:
        method = auditor.epsilon_clopper_pearson
    split = auditing.Split(seed=0)
    bound = method(1 - confidence, delta, threshold_strategy=split)
    return Audit(float(bound), float(auditor.attack_auroc()))


def _direction(key: jax.Array, client_id: ArrayLike, like: PyTree) -> PyTree:
    """The direction of a canary, of norm 1."""
    drawn = optax.tree.random_like(jax.random.fold_in(key, client_id), like, jax.random.normal)
    return optax.tree.scale(1 / optax.tree.norm(drawn), drawn)
