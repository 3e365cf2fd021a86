"""Models from flax linen modules."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedjax_lite.base import Batch, PyTree
from fedjax_lite.models import modules
from fedjax_lite.models.model import Model, with_loss


def linen_model(
    module: nn.Module,
    example: ArrayLike | Sequence[ArrayLike] | Mapping[str, ArrayLike],
    loss: Callable[[jax.Array, Batch], jax.Array],
    metrics: Callable[[jax.Array, Batch], dict[str, jax.Array]] | None = None,
    *,
    inputs: modules.Inputs = "x",
) -> Model:
    """A model from a flax linen module that maps features of a batch to predictions.

    Args:
      module: The module. If its `__call__` takes `train`, it is called with
        `train=True` by the loss and `train=False` by the metrics (`deterministic`, the other
        way round). If it takes `mask`, it is given the mask `[batch]` of the real examples;
        one with BatchNorm must take it, and hand it to its `BatchNorm` layers. Dropout draws
        from the `"dropout"` stream. Collections other than `"params"` are the model state.
      example: An input of one batch, for its shape and dtype only: `[batch, ...]`. Of a module with
        several inputs a tuple of them, or a dict by argument, as for `inputs`.
      loss: `loss(predictions, batch) -> losses [batch]`.
      metrics: `metrics(predictions, batch) -> {name: values [batch]}`, beside the loss, which is
        among them in any case.
      inputs: Name of the input feature; of several a tuple, such as `("words", "tags")`, or a dict
        of features by argument, such as `{"tokens": "words", "segments": "tags"}`.

    Returns:
      A `Model` whose params are the module's `"params"` collection.

    Raises:
      ValueError: The module has batch statistics, and its `__call__` does not take `mask`, or they
        depend on what it leaves out; `example` and `inputs` are not alike.

    >>> import jax, jax.numpy as jnp, flax.linen as nn
    >>> model = linen_model(nn.Dense(1), jnp.zeros((1, 4)), lambda p, batch: p[:, 0] ** 2)
    >>> params, model_state = model.init(jax.random.key(0))
    >>> jax.tree.map(jnp.shape, params)
    {'bias': (1,), 'kernel': (4, 1)}
    """
    features = modules.examples(example, inputs)

    def init_fn(key: jax.Array) -> tuple[PyTree, PyTree]:
        zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in features.items()}
        mask = jnp.ones(next(iter(zeros.values())).shape[0], bool)
        args, kwargs = modules.arguments(inputs, zeros)
        options = modules.call_options(module, train=False, mask=mask)
        variables = module.init(key, *args, **kwargs, **options)
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}

    shapes = jax.eval_shape(init_fn, jax.random.key(0))
    collections = sorted(shapes[1])

    def variables(params: PyTree, model_state: PyTree) -> dict[str, Any]:
        if sorted(model_state) != collections:
            raise ValueError(
                f"model_state has the collections {sorted(model_state)}, and the module"
                f" {collections}; pass algorithm.init a key, or model_state= beside the params."
            )
        return {"params": params, **model_state}

    def call(
        params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[Any, PyTree]:
        """The predictions of a training step, and the model state after it."""
        args, kwargs = modules.arguments(inputs, batch)
        predictions, updated = module.apply(
            variables(params, model_state),
            *args,
            rngs={"dropout": key},
            mutable=collections,
            **kwargs,
            **modules.call_options(module, train=True, mask=batch["mask"]),
        )
        return predictions, {**model_state, **updated}

    def loss_fn(
        params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        predictions, after = call(params, model_state, batch, key)
        return loss(predictions, batch), after

    def predict(params: PyTree, model_state: PyTree, batch: Batch) -> Any:
        args, kwargs = modules.arguments(inputs, batch)
        options = modules.call_options(module, train=False, mask=batch["mask"])
        return module.apply(variables(params, model_state), *args, **kwargs, **options)

    def metrics_fn(params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, jax.Array]:
        return with_loss(loss, metrics)(predict(params, model_state, batch), batch)

    def batch_statistics(drawn: PyTree, batch: Batch) -> PyTree:
        params, model_state = drawn
        return call(params, model_state, batch, jax.random.key(1))[1]["batch_stats"]

    if "batch_stats" in collections:
        modules.require_mask(module)
        drawn = modules.drawn(shapes)
        modules.require_masked_statistics(module, batch_statistics, drawn, features)
    return Model(init_fn, loss_fn, metrics_fn, predict)


def last_inputs(model: Model) -> Callable[[PyTree, PyTree, Batch], jax.Array]:
    """`features(params, model_state, batch)`: what the last dense layer of a module is given."""

    def features(params: PyTree, model_state: PyTree, batch: Batch) -> jax.Array:
        seen: list[jax.Array] = []

        def look(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
                seen.append(args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(look):
            if model.predict is not None:
                model.predict(params, model_state, batch)
        if not seen:
            raise ValueError(
                "features is None, and the model has no nn.Dense layer whose input to take; pass"
                " features=, a function (params, model_state, batch) -> [batch, dim]."
            )
        return seen[-1]

    return features
