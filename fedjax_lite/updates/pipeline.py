"""Update transforms one after another, and around a client update."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.base import Batch, ClientResult, ClientUpdate, PyTree, UpdateTransform
from fedjax_lite.xla.precision import squared_norm


def chain(*transforms: UpdateTransform) -> UpdateTransform:
    """Transforms one after another: on clients in this order, on the server in the reverse one.

    Args:
      *transforms: The transforms.

    Returns:
      The `UpdateTransform`. What transforms report under the same name, such as `bits_up`, is the
      report of the last one on a client, and of the first one on the server.

    Raises:
      TypeError: A transform is none.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> twice = chain(fl.clip_by_norm(2.0), fl.clip_by_norm(1.0))
    >>> update, info = twice.client(jax.random.key(0), twice.init({}), jnp.float32(5.0), 1.0)
    >>> float(update)
    1.0
    """
    for i, transform in enumerate(transforms):
        _validate.instance(f"transforms[{i}]", transform, UpdateTransform)

    def init(params: PyTree) -> PyTree:
        return tuple(transform.init(params) for transform in transforms)

    def client(
        key: jax.Array, state: PyTree, update: PyTree, weight: jax.Array
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        info: dict[str, jax.Array] = {}
        keys = jax.random.split(key, max(len(transforms), 1))
        for transform, own_key, own_state in zip(transforms, keys, state, strict=False):
            update, own_info = transform.client(own_key, own_state, update, weight)
            info |= own_info
        return update, info

    def server(
        key: jax.Array, state: PyTree, aggregate: PyTree
    ) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
        info: dict[str, jax.Array] = {}
        states = list(state)
        keys = jax.random.split(key, max(len(transforms), 1))
        for i in reversed(range(len(transforms))):
            aggregate, states[i], own_info = transforms[i].server(keys[i], states[i], aggregate)
            info |= own_info
        return aggregate, tuple(states), info

    return UpdateTransform(init, client, server)


def stateless(client: Any) -> UpdateTransform:
    """A transform that acts on clients alone, `client(key, update, weight) -> (update, info)`."""
    return UpdateTransform(
        lambda params: (),
        lambda key, state, update, weight: client(key, update, weight),
        lambda key, state, aggregate: (aggregate, state, {}),
    )


def send_through(pipeline: UpdateTransform, client_update: ClientUpdate) -> ClientUpdate:
    """A client update whose updates go through the client half of a pipeline."""

    def init(shared: Any, client_input: PyTree, key: jax.Array) -> tuple[jax.Array, PyTree]:
        key_own, key_pipeline = jax.random.split(key)
        return key_pipeline, client_update.init(shared, client_input, key_own)

    def step(
        shared: Any, client_state: tuple[jax.Array, PyTree], batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        key_pipeline, own = client_state
        return key_pipeline, client_update.step(shared, own, batch, key)

    def final(
        shared: Any, client_state: tuple[jax.Array, PyTree], num_examples: jax.Array
    ) -> ClientResult:
        key_pipeline, own = client_state
        result = client_update.final(shared, own, num_examples)
        # What the client trained, and not what is left of it, is reported and checked.
        norm = result.norm
        if norm is None:
            norm = jnp.sqrt(squared_norm(jax.lax.stop_gradient(result.update)))
        update, info = pipeline.client(
            key_pipeline, shared.pipeline_state, result.update, result.weight
        )
        return result._replace(update=update, norm=norm, metrics={**result.metrics, **info})

    def measure(
        shared: Any, client_state: tuple[jax.Array, PyTree], batch: Batch
    ) -> dict[str, jax.Array]:
        assert client_update.measure is not None
        return client_update.measure(shared, client_state[1], batch)

    return ClientUpdate(init, step, final, None if client_update.measure is None else measure)
