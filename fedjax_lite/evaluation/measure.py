"""What is asked of a model, as sums over batches."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.base import Batch, PyTree
from fedjax_lite.evaluation.metrics import Metric, mean
from fedjax_lite.models.model import Model, applying

MEAN = mean(lambda values, batch: values)


class Measure(NamedTuple):
    """A model and what is asked of it; equal to another one of the same."""

    model: Model
    metrics: tuple[tuple[str, Metric], ...] | None

    def sums(self, params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, PyTree]:
        """What each metric adds up over a batch."""
        with applying(self.model, params, batch):
            if self.metrics is not None and self.model.predict is not None:
                predictions = self.model.predict(params, model_state, batch)
                return {name: m.from_batch(predictions, batch) for name, m in self.metrics}
            metrics = self.model.metrics(params, model_state, batch)
        for name, values in metrics.items():
            where = f"metric {name!r} of model.metrics"
            _validate.per_example(where, values.shape, batch["mask"].shape[0])
        return {name: MEAN.from_batch(values, batch) for name, values in metrics.items()}

    def results(self, sums: dict[str, PyTree]) -> dict[str, jax.Array]:
        metrics = dict.fromkeys(sums, MEAN) if self.metrics is None else dict(self.metrics)
        return {name: metrics[name].result(total) for name, total in sums.items()}

    def zeros(self, params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, PyTree]:
        return jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(self.sums, params, model_state, batch),
        )


def measure_of(model: Model, metrics: Mapping[str, Metric] | None) -> Measure:
    """The metrics of a model, checked.

    Raises:
      ValueError: The model has no `predict`, which metrics need.
      TypeError: `metrics` is no non-empty dict of metrics.
    """
    _validate.instance("model", model, Model)
    if metrics is None:
        return Measure(model, None)
    if not isinstance(metrics, Mapping) or not metrics:
        raise TypeError(
            f"metrics is {metrics!r}; pass a non-empty dict of metrics by name, such as"
            ' {"accuracy": fl.metrics.accuracy()}.'
        )
    for name, metric in metrics.items():
        if not isinstance(metric, Metric):
            raise TypeError(
                f"metrics[{name!r}] is {metric!r}; pass what a function of fl.metrics returns, such"
                " as fl.metrics.accuracy(), or fl.metrics.mean(function) for a function of your"
                " own."
            )
    if model.predict is None:
        raise ValueError(
            f"metrics is {list(metrics)} for a model without predictions; pass predict= to"
            " function_model, or leave metrics out for those of the model itself."
        )
    return Measure(model, tuple(metrics.items()))
