"""What an experiment evaluates: what its model tells, a loss among it, and what is asked for."""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from fedjax_lite.base import Batch, PyTree
from fedjax_lite.engine.frozen import frozen_given
from fedjax_lite.evaluation.measure import MEAN, measure_of
from fedjax_lite.evaluation.metrics import Metric
from fedjax_lite.models.model import Model, with_loss


class Measured(NamedTuple):
    """What evaluations are given.

    Attributes:
      model: The model.
      metrics: What is asked of its predictions; `None` for the means of what its metrics tell.
      numbers: The names of the metrics that are one number each.
    """

    model: Model
    metrics: Mapping[str, Metric] | None
    numbers: list[str]


def measured(
    model: Model, own: Iterable[str], metrics: Mapping[str, Metric], examples: Mapping[str, Any]
) -> Measured:
    """All metrics of a model: its own, the loss, and those that are asked for.

    Args:
      model: The model.
      own: The names of its own.
      metrics: Those that are asked for.
      examples: Features such as it is evaluated on.

    Raises:
      ValueError: Metrics are asked for of a model without predictions, or one of its own is not one
        value per example.
    """
    if "loss" not in own:
        model = model._replace(metrics=with_loss(_training_loss(model), model.metrics))
    everything = None
    if metrics:
        measure_of(model, metrics)  # Refuses a model without predictions.
        everything = {
            **{name: _of(MEAN, 1, name) for name in ("loss", *own)},
            **{name: _of(metric, 0) for name, metric in metrics.items()},
        }
        model = model._replace(predict=_with_own(model))
    measure = measure_of(model, everything)
    results = shapes(lambda *args: measure.results(measure.sums(*args)), model, examples)
    return Measured(model, everything, [name for name, x in results.items() if x.shape == ()])


def _training_loss(model: Model) -> Callable[[PyTree, PyTree, Batch], jax.Array]:
    """The loss of a `Model` that tells none for evaluations."""

    def loss(params: PyTree, model_state: PyTree, batch: Batch) -> jax.Array:
        return model.loss(params, model_state, batch, jax.random.key(0))[0]

    return loss


def _with_own(model: Model) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """The predictions of a model, beside what its own metrics tell."""

    def predict(*args: Any) -> tuple[Any, dict[str, jax.Array]]:
        assert model.predict is not None
        return model.predict(*args), model.metrics(*args)

    return predict


def _of(metric: Metric, *path: Any) -> Metric:
    """A metric of a part of the predictions, by where it is."""

    def from_batch(predictions: Any, batch: Batch) -> PyTree:
        return metric.from_batch(functools.reduce(operator.getitem, path, predictions), batch)

    return Metric(from_batch, metric.result)


def shapes(function: Callable[..., PyTree], model: Model, examples: Mapping[str, Any]) -> PyTree:
    """The form of what `function(params, model_state, batch)` returns of the model's params."""
    batch = {
        name: jax.ShapeDtypeStruct((2, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype))
        for name, x in examples.items()
    }
    batch["mask"] = jax.ShapeDtypeStruct((2,), bool)

    def of_drawn(key: jax.Array, batch: Batch) -> PyTree:
        params, model_state = model.init(key)
        params, frozen = (params, ()) if model.split is None else model.split(params)
        with frozen_given(frozen):
            return function(params, model_state, batch)

    return jax.eval_shape(of_drawn, jax.random.key(0), batch)
