"""Evaluation of a model on examples that the server holds."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import ServerState
from fedjax_lite.model import Model


def evaluate(
    model: Model, state: ServerState, examples: Mapping[str, ArrayLike]
) -> dict[str, jax.Array]:
    """The mean of each metric of the model over the examples.

    A pure function, fit for use inside `jit`, `scan` and `vmap`; the examples are taken as one
    batch.

    Args:
      model: The model.
      state: State of an algorithm, for its params and model state.
      examples: Features `[rows, ...]` by name.

    Returns:
      Scalars by name of the metric.

    Raises:
      ValueError: There are no examples, or a metric is not one value per example.
      TypeError: `examples` is no dict of features.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2)
    >>> state = fl.fed_sgd(model, optax.sgd(1.0)).init(jnp.float32(2.0))
    >>> {name: float(value) for name, value in evaluate(model, state, {"x": [1.0, 5.0]}).items()}
    {'loss': 5.0}
    """
    _validate.instance("state", state, ServerState)
    _validate.features("examples", examples)
    batch = {name: jnp.asarray(feature) for name, feature in examples.items()}
    num_rows = next(iter(batch.values())).shape[0]
    if num_rows == 0:
        raise ValueError("examples has no rows; pass at least one example to evaluate on.")
    batch["mask"] = jnp.ones(num_rows, bool)
    with _validate.reading(batch):
        metrics = model.metrics(state.params, state.model_state, batch)
    for name, values in metrics.items():
        _validate.per_example(f"metric {name!r} of model.metrics", values.shape, num_rows)
    return {name: values.mean() for name, values in metrics.items()}
