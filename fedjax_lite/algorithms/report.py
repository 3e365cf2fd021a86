"""What is reported of a round."""

import jax
import jax.numpy as jnp

from fedjax_lite.base import Cohort, PyTree, RoundInfo, ServerState
from fedjax_lite.engine.waves import MEASURED, CohortResult
from fedjax_lite.xla.precision import squared_norm


def round_info(
    cohort: Cohort,
    result: CohortResult,
    aggregate: PyTree,
    server: ServerState,
    down: PyTree,
    left_out: jax.Array,
    metrics: dict[str, jax.Array],
) -> RoundInfo:
    """What to report of a round.

    Args:
      cohort: Who took part.
      result: What they sent.
      aggregate: What the server optimizer was given.
      server: The state before the round.
      down: What was sent to clients.
      left_out: `[clients]`, those whose update was not finite and did not count.
      metrics: What the server half of the pipeline reports.
    """
    clients, skip = result.clients, result.weight == 0
    # Without a pipeline that says more, clients send params, model state and statistics.
    bits = clients.get("bits_up", _num_bits(server.params))
    bits += _num_bits((server.model_state, result.statistics))
    clients = {
        **clients,
        "bits_up": jnp.where(clients["num_steps"] > 0, bits, 0.0),
        "bits_down": jnp.where(cohort.client_ids >= 0, _num_bits(down), 0.0),
    }
    trained = jnp.where(left_out, 0, clients["num_examples"].astype(float))
    owned = jnp.where(left_out, 0, cohort.num_examples.astype(float))

    def mean(values: jax.Array, counts: jax.Array) -> jax.Array:
        total = jnp.where(left_out, 0, counts * values).sum()
        return jnp.where(counts.sum() > 0, total / jnp.maximum(counts.sum(), 1), jnp.nan)

    measured = {n: mean(values, owned) for n, values in clients.items() if n.endswith(MEASURED)}
    return RoundInfo(
        loss=mean(clients["loss"], trained) if "loss" in clients else jnp.float32(jnp.nan),
        update_norm=jnp.where(skip, 0, jnp.sqrt(squared_norm(jax.lax.stop_gradient(aggregate)))),
        num_clients=(cohort.client_ids >= 0).sum(),
        num_examples=clients["num_examples"].sum(),
        num_empty=((cohort.client_ids >= 0) & (cohort.num_examples == 0)).sum(),
        num_nonfinite=clients["nonfinite"].sum(),
        skipped=skip,
        clients=clients,
        metrics={**measured, **metrics},
    )


def _num_bits(tree: PyTree) -> float:
    return sum(8.0 * x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
