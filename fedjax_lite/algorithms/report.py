"""What is reported of a round."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lite.base import Cohort, PyTree, RoundInfo, ServerState
from fedjax_lite.engine.waves import MEASURED, CohortResult
from fedjax_lite.updates.pipeline import num_bits as num_bits
from fedjax_lite.xla.precision import squared_norm

NOT_AVERAGED = {
    *("loss", "client_id", "num_examples", "num_steps", "update_norm", "weight", "nonfinite"),
    *("bits_up", "bits_down", "staleness"),
}
"""What `RoundInfo` has for a round in another form, or not at all."""


def round_info(
    cohort: Cohort,
    result: CohortResult,
    aggregate: PyTree,
    server: ServerState,
    down_bits: Any,
    skip: jax.Array,
    left_out: jax.Array,
    metrics: dict[str, jax.Array],
) -> RoundInfo:
    """What to report of a round.

    Args:
      cohort: Who took part.
      result: What they sent.
      aggregate: What the server optimizer was given.
      server: The state before the round.
      down_bits: Bits that a client is sent.
      skip: Whether the round left all as it was.
      left_out: `[clients]`, those whose update was not finite and did not count.
      metrics: What the server half of the pipeline reports.
    """
    clients = result.clients
    # Without a pipeline that says more, clients send params, model state and statistics.
    bits = clients.get("bits_up", num_bits(server.params))
    bits += num_bits((result.model_state, result.statistics))
    clients = {
        **clients,
        "client_id": cohort.client_ids,
        "bits_up": jnp.where(clients["num_steps"] > 0, bits, 0.0),
        "bits_down": jnp.where(cohort.client_ids >= 0, down_bits, 0.0),
    }
    if cohort.staleness is not None:
        clients["staleness"] = jnp.where(cohort.client_ids >= 0, cohort.staleness, 0)
    trained = jnp.where(left_out, 0, clients["num_examples"].astype(float))
    owned = jnp.where(left_out, 0, cohort.num_examples.astype(float))

    def mean(values: jax.Array, counts: jax.Array) -> jax.Array:
        total = jnp.where(left_out, 0, counts * values).sum()
        return jnp.where(counts.sum() > 0, total / jnp.maximum(counts.sum(), 1), jnp.nan)

    def share(name: str) -> jax.Array:
        # What was measured is of all examples, and what was reported of those processed.
        return owned if name.endswith(MEASURED) else trained

    told = {
        name: mean(values, share(name))
        for name, values in clients.items()
        if values.ndim == 1 and name not in NOT_AVERAGED
    }
    return RoundInfo(
        loss=mean(clients["loss"], trained) if "loss" in clients else jnp.float32(jnp.nan),
        update_norm=jnp.where(skip, 0, jnp.sqrt(squared_norm(jax.lax.stop_gradient(aggregate)))),
        num_clients=(cohort.client_ids >= 0).sum(),
        num_examples=clients["num_examples"].sum(),
        num_empty=((cohort.client_ids >= 0) & (cohort.num_examples == 0)).sum(),
        num_nonfinite=clients["nonfinite"].sum(),
        skipped=skip,
        clients=clients,
        metrics={**told, **metrics},
    )
