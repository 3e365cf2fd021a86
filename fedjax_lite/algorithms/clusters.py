"""Several models in one state, as arrays `[clusters, ...]`, of which each client has one."""

import jax
import jax.numpy as jnp
import optax

from fedjax_lite.base import Client, Message, PyTree, UpdateTransform
from fedjax_lite.models.model import Model


def take(models: PyTree, cluster: jax.Array | int) -> PyTree:
    """One of several."""
    return jax.tree.map(lambda x: x[cluster], models)


def put(models: PyTree, cluster: jax.Array, own: PyTree) -> PyTree:
    """The models with another one in place of one of them."""
    return jax.tree.map(lambda x, own: x.at[cluster].set(own), models, own)


def several(model: Model, num_clusters: int) -> Model:
    """A model that draws several, which have one frozen part."""

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        return jax.vmap(model.init)(jax.random.split(key, num_clusters))

    def split(params: PyTree) -> tuple[PyTree, PyTree]:
        assert model.split is not None
        trained, frozen = model.split(params)
        return trained, take(frozen, 0)

    return model._replace(init=init, split=None if model.split is None else split)


def scales(weights: jax.Array) -> jax.Array:
    """By how much means over all clients are those of each cluster, of weights `[clusters]`.

    0 for a cluster that has none.
    """
    return jnp.where(weights == 0, 0, weights.sum() / jnp.where(weights == 0, 1, weights))


def on_own(pipeline: UpdateTransform) -> UpdateTransform:
    """A pipeline whose client half and entries are of the delta of a client's own model.

    `client.entry` is its cluster.
    """

    def client(key: jax.Array, state: PyTree, message: Message, client: Client) -> Message:
        own = client.entry
        sent = pipeline.client(
            key, state, message._replace(update=take(message.update, own)), client
        )
        nothing = optax.tree.zeros_like(message.update)
        return sent._replace(update=put(nothing, own, sent.update))

    first = pipeline.entry
    return pipeline._replace(
        client=client, entry=None if first is None else lambda params: first(take(params, 0))
    )
