"""What the algorithms need to know of a model, and adapters that build it."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_lite.base import Batch, PyTree


class Model(NamedTuple):
    """A model as pure functions; every function sees a padded batch with its mask.

    Attributes:
      init: `init(key) -> (params, model_state)`.
      loss: `loss(params, model_state, batch, key) -> (losses [batch], model_state)`,
        the training loss of each example. The algorithms mask and average it; a
        model whose examples see each other must leave out `~batch["mask"]` itself.
      metrics: `metrics(params, model_state, batch) -> {name: values [batch]}`, for
        evaluation.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    loss: Callable[[PyTree, PyTree, Batch, jax.Array], tuple[jax.Array, PyTree]]
    metrics: Callable[[PyTree, PyTree, Batch], dict[str, jax.Array]]


def function_model(
    loss: Callable[[Any, Batch], jax.Array],
    init: Callable[[jax.Array], PyTree] | None = None,
    metrics: Callable[[Any, Batch], dict[str, jax.Array]] | None = None,
) -> Model:
    """A model from plain functions of the parameters.

    Args:
      loss: `loss(params, batch) -> losses [batch]`, one loss per example.
      init: `init(key) -> params`. Without it, `algorithm.init` takes params only.
      metrics: `metrics(params, batch) -> {name: values [batch]}`; the loss alone if
        left out.

    Returns:
      A `Model` with an empty model state.

    >>> import jax, jax.numpy as jnp
    >>> model = function_model(lambda params, batch: (batch["x"] @ params - batch["y"]) ** 2)
    >>> batch = {"x": jnp.eye(2), "y": jnp.ones(2), "mask": jnp.ones(2, bool)}
    >>> losses, _ = model.loss(jnp.array([1.0, 3.0]), {}, batch, jax.random.key(0))
    >>> losses.tolist()
    [0.0, 4.0]
    """

    def init_fn(key: jax.Array) -> tuple[PyTree, PyTree]:
        if init is None:
            raise ValueError(
                "init: this function_model was built without an init function, so it cannot"
                " draw parameters from a key; pass params to algorithm.init, or init= to"
                " function_model."
            )
        return init(key), {}

    def metrics_fn(params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, jax.Array]:
        del model_state
        return {"loss": loss(params, batch)} if metrics is None else metrics(params, batch)

    return Model(
        init=init_fn,
        loss=lambda params, model_state, batch, key: (loss(params, batch), model_state),
        metrics=metrics_fn,
    )


def linen_model(
    module: nn.Module,
    example: jax.Array,
    loss: Callable[[jax.Array, Batch], jax.Array],
    metrics: Callable[[jax.Array, Batch], dict[str, jax.Array]] | None = None,
    *,
    inputs: str = "x",
) -> Model:
    """A model from a flax linen module that maps `batch[inputs]` to predictions.

    Args:
      module: The module. If its `__call__` takes `train`, it is called with
        `train=True` by the loss and `train=False` by the metrics (`deterministic`, the other
        way round). If it takes `mask`, it is given the mask `[batch]` of the real examples;
        one with BatchNorm must take it, and hand it to its `BatchNorm` layers. Dropout draws
        from the `"dropout"` stream. Collections other than `"params"` are the model state.
      example: An input of one batch, for its shape and dtype only: `[batch, ...]`.
      loss: `loss(predictions, batch) -> losses [batch]`.
      metrics: `metrics(predictions, batch) -> {name: values [batch]}`; the loss alone
        if left out.
      inputs: Name of the input feature.

    Returns:
      A `Model` whose params are the module's `"params"` collection.

    Raises:
      ValueError: The module has batch statistics and its `__call__` does not take `mask`.

    >>> import jax, jax.numpy as jnp, flax.linen as nn
    >>> model = linen_model(nn.Dense(1), jnp.zeros((1, 4)), lambda p, batch: p[:, 0] ** 2)
    >>> params, model_state = model.init(jax.random.key(0))
    >>> jax.tree.map(jnp.shape, params)
    {'bias': (1,), 'kernel': (4, 1)}
    """
    parameters = inspect.signature(type(module).__call__).parameters

    def options(train: bool, mask: jax.Array) -> dict[str, Any]:
        given = {"train": train, "deterministic": not train, "mask": mask}
        return {name: value for name, value in given.items() if name in parameters}

    def init_fn(key: jax.Array) -> tuple[PyTree, PyTree]:
        mask = jnp.ones(jnp.shape(example)[0], bool)
        variables = module.init(key, jnp.zeros_like(example), **options(False, mask))
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}

    collections = sorted(jax.eval_shape(init_fn, jax.random.key(0))[1])
    if "batch_stats" in collections and "mask" not in parameters:
        raise ValueError(
            f"module {type(module).__name__} has batch statistics, and its __call__ does not take"
            " mask, so that padding would enter them; add mask=None to its arguments and pass it"
            " on, as in nn.BatchNorm(...)(x, mask=mask[:, None])."
        )

    def variables(params: PyTree, model_state: PyTree) -> dict[str, Any]:
        if sorted(model_state) != collections:
            raise ValueError(
                f"model_state has the collections {sorted(model_state)}, and the module"
                f" {collections}; pass algorithm.init a key, or model_state= beside the params."
            )
        return {"params": params, **model_state}

    def loss_fn(
        params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        predictions, updated = module.apply(
            variables(params, model_state),
            batch[inputs],
            rngs={"dropout": key},
            mutable=collections,
            **options(True, batch["mask"]),
        )
        return loss(predictions, batch), {**model_state, **updated}

    def metrics_fn(params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, jax.Array]:
        predictions: Any = module.apply(
            variables(params, model_state), batch[inputs], **options(False, batch["mask"])
        )
        if metrics is None:
            return {"loss": loss(predictions, batch)}
        return metrics(predictions, batch)

    return Model(init_fn, loss_fn, metrics_fn)
