"""Evaluation of a model on examples of the server."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Batch, PyTree, ServerState
from fedjax_lite.engine.execution import Execution, choose_rewrite
from fedjax_lite.engine.frozen import frozen_given
from fedjax_lite.evaluation.measure import Measure, measure_of
from fedjax_lite.evaluation.metrics import Metric
from fedjax_lite.models.model import Model
from fedjax_lite.xla.cpu import Paced
from fedjax_lite.xla.mesh import AXIS, resolve, sum_over_devices


def evaluate(
    model: Model,
    state: ServerState,
    examples: Mapping[str, ArrayLike],
    *,
    metrics: Mapping[str, Metric] | None = None,
    batch_size: int = 1024,
    mesh: Mesh | None = None,
    rewrite_convolutions: bool | None = None,
) -> dict[str, jax.Array]:
    """Metrics of the model over examples of the server.

    A pure function, fit for use inside `jit`, `scan`, `vmap` and `grad`. It compiles once for a
    model, metrics and the shapes of the examples, runs through them in batches, and is exact: no
    result depends on how they are batched, but for the order of additions.

    Args:
      model: The model.
      state: State of an algorithm, for its params and model state.
      examples: Features `[rows, ...]` by name.
      metrics: Metrics by name, such as `{"accuracy": fl.metrics.accuracy()}`, of what
        `model.predict` returns. By default, the means of what `model.metrics` returns.
      batch_size: Most examples in a batch; changes the speed and the memory only.
      mesh: Mesh that the batches are spread over, as for the algorithm, if there is more than
        one; the devices that the state lies on by default. Changes the speed only.
      rewrite_convolutions: As for the algorithm; changes the speed only.

    Returns:
      Values by name of the metric.

    Raises:
      ValueError: There are no examples, `metrics` are asked of a model without `predict`, or a
        metric of the model is not one value per example.
      TypeError: `examples` is no dict of features, `metrics` no dict of metrics.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2)
    >>> state = fl.fed_sgd(model, optax.sgd(1.0)).init(jnp.float32(2.0))
    >>> {name: float(value) for name, value in evaluate(model, state, {"x": [1.0, 5.0]}).items()}
    {'loss': 5.0}
    """
    _validate.instance("state", state, ServerState)
    _validate.features("examples", examples)
    if np.shape(next(iter(examples.values())))[0] == 0:
        raise ValueError("examples has no rows; pass at least one example to evaluate on.")
    _validate.labels(examples.get("y"), model.num_classes)
    return _evaluate(
        (state.params, state.model_state, state.frozen),
        {name: x if isinstance(x, jax.Array) else np.asarray(x) for name, x in examples.items()},
        measure=measure_of(model, metrics),
        batch_size=_validate.integer("batch_size", batch_size, minimum=1),
        execution=Execution(
            mesh=_devices_of(state) if mesh is None else resolve(mesh),
            rewrite_convolutions=rewrite_convolutions,
        ),
    )


def _devices_of(state: ServerState) -> Mesh | None:
    """Where to evaluate by default: on the devices that the state lies on."""
    leaf = jax.tree.leaves(state.params)[0]
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
        sharding = leaf.sharding
        if len(sharding.device_set) == 1:
            return None
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        if isinstance(mesh, Mesh) and mesh.axis_names == (AXIS,):
            return resolve(mesh)
    return resolve(None)


@Paced
@functools.partial(jax.jit, static_argnames=("measure", "batch_size", "execution"))
def _evaluate(
    variables: tuple[PyTree, PyTree, PyTree],
    examples: dict[str, jax.Array],
    *,
    measure: Measure,
    batch_size: int,
    execution: Execution,
) -> dict[str, jax.Array]:
    num_rows = next(iter(examples.values())).shape[0]
    batch_size = min(batch_size, num_rows)
    num_batches = -(-num_rows // batch_size)
    mesh, num_devices = execution.mesh, execution.num_devices
    rewrite = choose_rewrite(execution)

    def read(examples: dict[str, jax.Array], index: ArrayLike) -> Batch:
        # The last batch is filled with rows of the one before, and those after it are all masked.
        begin = index * batch_size
        start = jnp.minimum(begin, num_rows - batch_size)
        batch = {
            name: jax.lax.dynamic_slice_in_dim(feature, start, batch_size)
            for name, feature in examples.items()
        }
        return {**batch, "mask": start + jnp.arange(batch_size) >= begin}

    def sum_batches(
        first: ArrayLike, variables: tuple[PyTree, PyTree, PyTree], examples: dict[str, jax.Array]
    ) -> dict[str, PyTree]:
        """One device's sums, over every so many batches."""
        params, model_state, frozen = variables

        def add(i: jax.Array, total: dict[str, PyTree]) -> dict[str, PyTree]:
            batch = read(examples, first + i * num_devices)
            return jax.tree.map(jnp.add, total, measure.sums(params, model_state, batch))

        with frozen_given(frozen):
            if num_batches == 1:  # No loop, and not worth spreading.
                return measure.sums(params, model_state, read(examples, 0))
            zeros = measure.zeros(params, model_state, read(examples, 0))
            # Bounds that are known when compiling can be differentiated through.
            return jax.lax.fori_loop(0, -(-num_batches // num_devices), rewrite(add), zeros)

    arguments = (variables, examples)
    if mesh is None or num_batches == 1:
        sums = sum_batches(0, *arguments)
    else:
        sums = jax.shard_map(
            lambda *arguments: sum_over_devices(sum_batches(jax.lax.axis_index(AXIS), *arguments)),
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(*arguments)
    return measure.results(sums)
