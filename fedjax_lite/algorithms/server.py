"""The server's half of a round, and what makes it an algorithm."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fedjax_lite import _validate, random
from fedjax_lite.base import ClientUpdate, FederatedAlgorithm, PyTree, RoundInfo, ServerState
from fedjax_lite.batches import Batching, adapt_batch_size
from fedjax_lite.cohort import Cohort
from fedjax_lite.mesh import replicate
from fedjax_lite.model import Model
from fedjax_lite.runner import ON_NONFINITE, CohortResult, run_clients

Weighting = Literal["examples", "uniform"] | Callable[[jax.Array], jax.Array]


def resolve_weighting(weighting: Weighting) -> Callable[[jax.Array], jax.Array]:
    """The function `num_examples -> weight` of one client.

    Raises:
      ValueError: `weighting` is a name other than `"examples"` and `"uniform"`, or does not
        return a scalar.
    """
    if callable(weighting):
        return lambda num_examples: _validate.scalar(
            "weighting", weighting(num_examples.astype(float))
        )
    _validate.choice("weighting", weighting, ("examples", "uniform"))
    if weighting == "uniform":
        return lambda num_examples: jnp.ones_like(num_examples, dtype=float)
    return lambda num_examples: num_examples.astype(float)


def federated_algorithm(
    model: Model,
    client_update: ClientUpdate,
    server_optimizer: optax.GradientTransformation,
    *,
    batching: Batching,
    batch_size: int | None,
    average: bool,
    on_nonfinite: str,
    lanes: int | None,
    mesh: Mesh | None,
    rewrite_convolutions: bool | None,
) -> FederatedAlgorithm:
    """The algorithm that gives the server optimizer the mean, or the sum, of client updates.

    Args:
      model: The model, which draws params where a key is given.
      client_update: What a client computes from the `ServerState`.
      server_optimizer: Is given the aggregate as its gradient.
      batching: What a client runs through.
      batch_size: What the user asked for; a generated population may not contradict it.
      average: Divide the sum of the updates by the sum of the weights.
      on_nonfinite: As for `run_clients`.
      lanes: As for `run_clients`.
      mesh: As for `run_clients`.
      rewrite_convolutions: As for `run_clients`.
    """
    _validate.choice("on_nonfinite", on_nonfinite, ON_NONFINITE)
    _validate.instance("server_optimizer", server_optimizer, optax.GradientTransformation)
    if lanes is not None:
        lanes = _validate.integer("lanes", lanes, minimum=1)

    def init(key_or_params: PyTree, model_state: PyTree | None = None) -> ServerState:
        if random.is_key(key_or_params):
            params, drawn_state = model.init(key_or_params)
            model_state = drawn_state if model_state is None else model_state
        else:
            params, model_state = key_or_params, {} if model_state is None else model_state
        _validate.params(params)
        # With a dtype of their own: a weakly typed leaf would have the second round compile
        # again.
        params, model_state = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.result_type(x)), (params, model_state)
        )
        state = ServerState(
            params=params,
            model_state=model_state,
            opt_state=server_optimizer.init(params),
            round=jnp.int32(0),
        )
        return replicate(state, mesh)

    @jax.jit
    def round(key: jax.Array, state: ServerState, cohort: Cohort) -> tuple[ServerState, RoundInfo]:
        _validate.instance("cohort", cohort, Cohort)
        _validate.instance("state", state, ServerState)
        result = run_clients(
            client_update,
            state,
            cohort,
            key,
            batching=adapt_batch_size(cohort, batching, batch_size),
            lanes=lanes,
            mesh=mesh,
            on_nonfinite=on_nonfinite,
            rewrite_convolutions=rewrite_convolutions,
        )
        skip = result.weight == 0
        mean = 1 / jnp.where(skip, 1, result.weight)
        aggregate = optax.tree.scale(mean, result.update) if average else result.update
        model_state = optax.tree.scale(mean, result.model_state)
        info = _round_info(cohort, result, aggregate, skip, on_nonfinite == "drop")
        return _server_step(server_optimizer, state, aggregate, model_state, skip), info

    return FederatedAlgorithm(init, round)


def _round_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x` in the dtype of `like`; a mean of counters becomes the nearest one."""
    return (x if jnp.issubdtype(like.dtype, jnp.inexact) else jnp.round(x)).astype(like.dtype)


def _server_step(
    server_optimizer: optax.GradientTransformation,
    state: ServerState,
    aggregate: PyTree,
    model_state: PyTree,
    skip: jax.Array,
) -> ServerState:
    """One step of the server optimizer; with `skip`, only the round number advances."""
    # A mean of float32 sums would leave optimizer state of another dtype than params have.
    aggregate = optax.tree.cast_like(aggregate, state.params)
    updates, opt_state = server_optimizer.update(aggregate, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    model_state = jax.tree.map(_round_like, model_state, state.model_state)
    after = ServerState(
        params=params, model_state=model_state, opt_state=opt_state, round=state.round
    )
    after = jax.tree.map(lambda new, old: jnp.where(skip, old, new), after, state)
    return dataclasses.replace(after, round=state.round + 1)


def _round_info(
    cohort: Cohort, result: CohortResult, aggregate: PyTree, skip: jax.Array, drop: bool
) -> RoundInfo:
    """What to report of a round whose clients report a mean `loss` each."""
    nonfinite = result.clients["nonfinite"]
    left_out = nonfinite if drop else jnp.zeros_like(nonfinite)
    num_examples = result.clients["num_examples"]
    counted = jnp.where(left_out, 0, num_examples.astype(float))
    total_loss = jnp.where(left_out, 0, counted * result.clients["loss"]).sum()
    return RoundInfo(
        loss=total_loss / jnp.maximum(counted.sum(), 1),
        update_norm=jnp.where(skip, 0, optax.tree.norm(aggregate)),
        num_clients=(cohort.client_ids >= 0).sum(),
        num_examples=num_examples.sum(),
        num_empty=((cohort.client_ids >= 0) & (cohort.num_examples == 0)).sum(),
        num_nonfinite=nonfinite.sum(),
        skipped=skip,
        clients=result.clients,
    )
