"""What clients keep that have a model of their own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lite.base import PyTree, ServerState


class Personal(NamedTuple):
    """What a client keeps between rounds.

    Attributes:
      params: Its own params.
      num_rounds: Rounds that it took part in.
    """

    params: PyTree
    num_rounds: jax.Array


def entry(drawn: ServerState) -> Personal:
    """What a client keeps before its first round."""
    return Personal(drawn.params, jnp.int32(0))


def client_model(state: ServerState, own: Personal) -> tuple[PyTree, PyTree]:
    """The client's own params, and the server's model state."""
    return params(state, own.params, own.num_rounds), state.model_state


def params(state: ServerState, own: PyTree, num_rounds: jax.Array) -> PyTree:
    """A client's own params, which before its first round are the server's."""
    return jax.tree.map(lambda v, w: jnp.where(num_rounds == 0, w, v), own, state.params)
