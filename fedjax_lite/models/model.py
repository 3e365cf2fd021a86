"""What the algorithms need to know of a model, and one from plain functions."""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.errors
import jax

from fedjax_lite import _validate
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
      predict: `predict(params, model_state, batch) -> predictions`, which `fl.metrics` compare
        with the batch; `None` where the model says no more than its losses.
      num_classes: Number of classes, by which labels `batch["y"]` out of range are refused where
        they can be seen beforehand; `None` if it is not known.
      split: `split(params) -> (trained, frozen)`, of a model some of whose params are frozen, as
        `init` draws them; its other functions take what is trained. `None` if all are trained.
      merge: `merge(trained, frozen) -> params`, the other way round.
      add_residual: `add_residual(frozen, updates, weights) -> frozen`, of a model whose trained
        params multiply each other: frozen params with what the product of clients' means leaves
        out of the mean of their products, of updates `[clients, ...]` and weights `[clients]` that
        add up to one. `None` where means are exact.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    loss: Callable[[PyTree, PyTree, Batch, jax.Array], tuple[jax.Array, PyTree]]
    metrics: Callable[[PyTree, PyTree, Batch], dict[str, jax.Array]]
    predict: Callable[[PyTree, PyTree, Batch], Any] | None = None
    num_classes: int | None = None
    split: Callable[[PyTree], tuple[PyTree, PyTree]] | None = None
    merge: Callable[[PyTree, PyTree], PyTree] | None = None
    add_residual: Callable[[PyTree, PyTree, jax.Array], PyTree] | None = None


def function_model(
    loss: Callable[[Any, Batch], jax.Array],
    init: Callable[[jax.Array], PyTree] | None = None,
    metrics: Callable[[Any, Batch], dict[str, jax.Array]] | None = None,
    predict: Callable[[Any, Batch], Any] | None = None,
) -> Model:
    """A model from plain functions of the parameters.

    Args:
      loss: `loss(params, batch) -> losses [batch]`, one loss per example.
      init: `init(key) -> params`. Without it, `algorithm.init` takes params only.
      metrics: `metrics(params, batch) -> {name: values [batch]}`, beside the loss, which is among
        them in any case.
      predict: `predict(params, batch) -> predictions`, for `fl.metrics`.

    Returns:
      A `Model` with an empty model state.

    Raises:
      TypeError: `loss` is no function.

    >>> import jax, jax.numpy as jnp
    >>> model = function_model(lambda params, batch: (batch["x"] @ params - batch["y"]) ** 2)
    >>> batch = {"x": jnp.eye(2), "y": jnp.ones(2), "mask": jnp.ones(2, bool)}
    >>> losses, _ = model.loss(jnp.array([1.0, 3.0]), {}, batch, jax.random.key(0))
    >>> losses.tolist()
    [0.0, 4.0]
    """
    if not callable(loss):
        raise TypeError(
            f"loss is {loss!r}; pass a function loss(params, batch) that returns [batch] losses."
        )

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
        return with_loss(loss, metrics)(params, batch)

    return Model(
        init=init_fn,
        loss=lambda params, model_state, batch, key: (loss(params, batch), model_state),
        metrics=metrics_fn,
        predict=None
        if predict is None
        else lambda params, model_state, batch: predict(params, batch),
    )


def with_loss(
    loss: Callable[..., jax.Array], metrics: Callable[..., dict[str, jax.Array]] | None
) -> Callable[..., dict[str, jax.Array]]:
    """Metrics with the loss among them, if it is not."""

    def told(*args: Any) -> dict[str, jax.Array]:
        found = {} if metrics is None else metrics(*args)
        return found if "loss" in found else {"loss": loss(*args), **found}

    return told


@contextlib.contextmanager
def applying(model: Model, params: PyTree, batch: Batch) -> Iterator[None]:
    """Says where a model fails whether its params are another one's, or what the batch holds.

    Nothing is looked at unless it fails.
    """
    try:
        with _validate.reading(batch):
            yield
    except Exception as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if isinstance(error, ValueError) and frame.f_globals.get("__package__") == __package__:
            raise  # An adapter has said what is wrong.
        if (expected := drawn_by(model)) is not None:
            remedy = "pass a state of an algorithm that was built with this model."
            own = "pass client_model=algorithm.client_model to fl.evaluate_clients."
            one_of_each = jax.tree.map(lambda x: jax.numpy.shape(x)[1:], params)
            if len(jax.tree.leaves(params)) < len(jax.tree.leaves(expected)):
                remedy = f"clients keep the rest: {own}"
            elif one_of_each == jax.tree.map(jax.numpy.shape, expected):
                remedy = f"the server has several models: {own}"
            try:
                _validate.same_form("params", params, expected, remedy, dtypes=False)
            except ValueError as other:
                raise other from error
        if type(error) in (TypeError, flax.errors.ScopeParamShapeError):  # And no subclass of JAX.
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"model failed on a batch of {_shown(batch)}: {_validate.first_line(error)}; pass"
                " clients or examples with the features that it is made for, or mend the model."
            ) from error
        raise


def drawn_by(model: Model) -> PyTree:
    """The form of params that the model draws itself; `None` if it cannot."""
    try:
        drawn = jax.eval_shape(lambda: model.init(jax.random.key(0))[0])
        return drawn if model.split is None else model.split(drawn)[0]
    except Exception:
        return None


def _shown(batch: Batch) -> str:
    return ", ".join(f"{name} {_validate.form(x)}" for name, x in batch.items())
