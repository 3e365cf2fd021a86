"""Evaluation of a model, on examples of the server and by client."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite._repr import record
from fedjax_lite.base import Batch, ClientResult, ClientUpdate, PyTree, ServerState
from fedjax_lite.batches import (
    DEFAULT_BATCH_SIZE,
    Batching,
    Client,
    adapt_batch_size,
    read_batch,
)
from fedjax_lite.cohort import Cohort
from fedjax_lite.cpu import Paced
from fedjax_lite.mesh import AXIS, resolve, sum_over_devices
from fedjax_lite.metrics import Metric, mean
from fedjax_lite.model import Model, applying
from fedjax_lite.runner import choose_rewrite, run_clients
from fedjax_lite.store import check_store

_VALUES = mean(lambda values, batch: values)


class ClientEvaluation(NamedTuple):
    """Metrics of the clients of a cohort.

    Attributes:
      clients: Values `[clients, ...]` in cohort order by name of the metric, those of no
        examples (mostly NaN) for clients without; see `summarize_clients`.
      num_examples: `[clients]`, 0 in empty slots.
      pooled: Values by name over the examples of all clients together.
    """

    clients: dict[str, jax.Array]
    num_examples: jax.Array
    pooled: dict[str, jax.Array]

    def __repr__(self) -> str:
        return record(self, self._asdict())


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
        state.params,
        state.model_state,
        {name: x if isinstance(x, jax.Array) else np.asarray(x) for name, x in examples.items()},
        measure=measure_of(model, metrics),
        batch_size=_validate.integer("batch_size", batch_size, minimum=1),
        mesh=_devices_of(state) if mesh is None else resolve(mesh),
        rewrite_convolutions=rewrite_convolutions,
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


def evaluate_clients(
    model: Model,
    state: ServerState,
    cohort: Cohort,
    *,
    metrics: Mapping[str, Metric] | None = None,
    client_params: Callable[[ServerState, PyTree], PyTree] | None = None,
    key: jax.Array | None = None,
    batch_size: int | None = None,
    lanes: int | None = None,
    mesh: Mesh | None = None,
    rewrite_convolutions: bool | None = None,
) -> ClientEvaluation:
    """Metrics of the model on the examples of each client of a cohort.

    A pure function, fit for use inside `jit`, `scan` and `vmap`. Memory grows with the cohort
    only by what the metrics add up for each client.

    Args:
      model: The model.
      state: State of an algorithm, for its params and model state.
      cohort: The clients.
      metrics: Metrics by name, as for `evaluate`.
      client_params: That of an algorithm whose clients have params of their own, which are then
        evaluated; by default those of the server are.
      key: Typed key, from which generated clients draw their examples. Others need none.
      batch_size: Examples in a batch, 32 by default, and for generated clients what they draw;
        changes the speed only.
      lanes: As for the algorithm; changes the speed only.
      mesh: As for the algorithm; changes the speed only.
      rewrite_convolutions: As for the algorithm; changes the speed only.

    Returns:
      A `ClientEvaluation`.

    Raises:
      ValueError: `key` is missing for generated clients, `batch_size` is not theirs, the store is
        not of the population of the cohort where `client_params` reads it, or as for `evaluate`.
      TypeError: `cohort` is no `Cohort`.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2)
    >>> state = fl.fed_sgd(model, optax.sgd(1.0)).init(jnp.float32(2.0))
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [1.0, 5.0]}, "b": {"x": [3.0]}})
    >>> result = evaluate_clients(model, state, fl.cohort_of(dataset.resident(), [0, 1]))
    >>> result.clients["loss"].tolist(), round(float(result.pooled["loss"]), 4)
    ([5.0, 1.0], 3.6667)
    """
    _validate.instance("state", state, ServerState)
    _validate.instance("cohort", cohort, Cohort)
    if key is not None:
        _validate.key("key", key)
    if cohort.sample is not None and key is None:
        raise ValueError(
            "key is None beside a cohort of generated clients, who draw their examples; pass key=,"
            " a typed key."
        )
    if client_params is not None:
        if not jax.tree.leaves(state.store):
            raise ValueError(
                "state.store is empty, and client_params is given, which reads it; pass a state"
                " with its store (the best one that fl.train keeps has none)."
            )
        check_store(state.store, cohort.num_clients)
    return _evaluate_clients(
        ServerState(
            params=state.params,
            model_state=state.model_state,
            opt_state=(),
            round=state.round,
            store=() if client_params is None else state.store,
        ),
        cohort,
        jax.random.key(0) if key is None else key,
        measure=measure_of(model, metrics),
        client_params=client_params,
        batching=reading_once(cohort, batch_size),
        lanes=lanes,
        mesh=resolve(mesh),
        rewrite_convolutions=rewrite_convolutions,
    )


def summarize_clients(values: ArrayLike, num_examples: ArrayLike) -> dict[str, jax.Array]:
    """How a metric is spread over clients, of whom those without examples are left out.

    `lowest_tenth` and `highest_tenth`, the means over the tenths of the clients with the lowest
    and the highest values (rounded up to whole clients), are the measures of fairness of Li et
    al. (2020), "Fair Resource Allocation in Federated Learning".

    Args:
      values: `[clients]`, such as `result.clients["accuracy"]` of `evaluate_clients`.
      num_examples: `[clients]`, such as `result.num_examples`.

    Returns:
      Scalars `num_clients` (those with examples), `mean`, `weighted_mean` (by examples), `std`
      (of the population), `median`, `quantile_05`, `quantile_25`, `quantile_75`, `quantile_95`
      (interpolated linearly), `lowest_tenth`, `highest_tenth`. If a client with examples has the
      value NaN, or no client has examples, all but the first are NaN.

    Raises:
      ValueError: `values` is not one number per client.

    >>> summary = summarize_clients([0.5, 1.0, float("nan")], [3, 1, 0])
    >>> float(summary["mean"]), float(summary["weighted_mean"]), float(summary["lowest_tenth"])
    (0.75, 0.625, 0.5)
    """
    values, num_examples = jnp.asarray(values, float), jnp.asarray(num_examples)
    if values.ndim != 1 or values.shape != num_examples.shape:
        raise ValueError(
            f"values has shape {values.shape} and num_examples {num_examples.shape}; pass one"
            " number of each per client."
        )
    present = num_examples > 0
    num_clients = present.sum()
    ordered = jnp.sort(jnp.where(present, values, jnp.nan))  # NaN comes last.
    place = jnp.arange(values.size)
    tenth = -(-num_clients // 10)
    shares = num_examples / num_examples.sum()
    low, quarter, half, three_quarters, high = jnp.nanquantile(
        ordered, jnp.array([0.05, 0.25, 0.5, 0.75, 0.95])
    )
    summary = {
        "mean": jnp.nanmean(ordered),
        "weighted_mean": jnp.where(present, values * shares, 0).sum(),
        "std": jnp.nanstd(ordered),
        "median": half,
        "quantile_05": low,
        "quantile_25": quarter,
        "quantile_75": three_quarters,
        "quantile_95": high,
        "lowest_tenth": ordered.mean(where=place < tenth),
        "highest_tenth": ordered.mean(where=(place >= num_clients - tenth) & (place < num_clients)),
    }
    # What is not a number must not pass for a client that is not there.
    valid = (num_clients > 0) & ~(present & jnp.isnan(values)).any()
    summary = {name: jnp.where(valid, value, jnp.nan) for name, value in summary.items()}
    return {"num_clients": num_clients, **summary}


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
        return {name: _VALUES.from_batch(values, batch) for name, values in metrics.items()}

    def results(self, sums: dict[str, PyTree]) -> dict[str, jax.Array]:
        metrics = dict.fromkeys(sums, _VALUES) if self.metrics is None else dict(self.metrics)
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


def reading_once(cohort: Cohort, batch_size: int | None) -> Batching:
    """One pass over the examples of each client, in their order."""
    batching = Batching(batch_size=DEFAULT_BATCH_SIZE if batch_size is None else batch_size)
    return adapt_batch_size(cohort, batching, batch_size)


def client_evaluation(measure: Measure, sums: PyTree, num_examples: jax.Array) -> ClientEvaluation:
    """The results of sums `[clients, ...]`."""
    total = jax.tree.map(lambda x: x.sum(0, dtype=x.dtype), sums)
    return ClientEvaluation(jax.vmap(measure.results)(sums), num_examples, measure.results(total))


@Paced
@functools.partial(
    jax.jit, static_argnames=("measure", "batch_size", "mesh", "rewrite_convolutions")
)
def _evaluate(
    params: PyTree,
    model_state: PyTree,
    examples: dict[str, jax.Array],
    *,
    measure: Measure,
    batch_size: int,
    mesh: Mesh | None,
    rewrite_convolutions: bool | None,
) -> dict[str, jax.Array]:
    num_rows = next(iter(examples.values())).shape[0]
    batch_size = min(batch_size, num_rows)
    num_batches = -(-num_rows // batch_size)
    num_devices = 1 if mesh is None else mesh.devices.size
    rewrite = choose_rewrite(rewrite_convolutions, mesh)

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
        first: ArrayLike, params: PyTree, model_state: PyTree, examples: dict[str, jax.Array]
    ) -> dict[str, PyTree]:
        """One device's sums, over every so many batches."""

        def add(i: jax.Array, total: dict[str, PyTree]) -> dict[str, PyTree]:
            batch = read(examples, first + i * num_devices)
            return jax.tree.map(jnp.add, total, measure.sums(params, model_state, batch))

        zeros = measure.zeros(params, model_state, read(examples, 0))
        # Bounds that are known when compiling can be differentiated through.
        return jax.lax.fori_loop(0, -(-num_batches // num_devices), rewrite(add), zeros)

    arguments = (params, model_state, examples)
    if num_batches == 1:  # No loop, and not worth spreading.
        sums = measure.sums(params, model_state, read(examples, 0))
    elif mesh is None:
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


@Paced
@functools.partial(
    jax.jit,
    static_argnames=(
        *("measure", "client_params", "batching"),
        *("lanes", "mesh", "rewrite_convolutions"),
    ),
)
def _evaluate_clients(
    state: ServerState,
    cohort: Cohort,
    key: jax.Array,
    *,
    measure: Measure,
    client_params: Callable[[ServerState, PyTree], PyTree] | None,
    batching: Batching,
    **layout: Any,
) -> ClientEvaluation:
    def init(shared: ServerState, entry: PyTree, key: jax.Array) -> _Measured:
        own = () if client_params is None else client_params(shared, entry)
        # Its form alone: the rows outside of the runner are those of all devices.
        batch = jax.eval_shape(lambda: read_batch(cohort, key, Client.of(cohort, 0), 0, batching))
        params = shared.params if client_params is None else own
        return _Measured(own, measure.zeros(params, shared.model_state, batch))

    def step(shared: ServerState, measured: _Measured, batch: Batch, key: jax.Array) -> _Measured:
        del key
        params = shared.params if client_params is None else measured.params
        sums = measure.sums(params, shared.model_state, batch)
        return measured._replace(sums=jax.tree.map(jnp.add, measured.sums, sums))

    def final(shared: ServerState, measured: _Measured, num_examples: jax.Array) -> ClientResult:
        return report_sums(shared, measured.sums, num_examples)

    result = run_clients(
        ClientUpdate(init, step, final),
        dataclasses.replace(state, store=()),
        cohort,
        key,
        batching=batching,
        store=state.store,
        keep_output=False,
        **layout,
    )
    return client_evaluation(measure, result.clients["sums"], cohort.num_examples)


class _Measured(NamedTuple):
    """A client while it is evaluated."""

    params: PyTree
    sums: dict[str, PyTree]


def report_sums(shared: PyTree, sums: PyTree, num_examples: jax.Array) -> ClientResult:
    """What a client sends that only measures."""
    del shared, num_examples
    return ClientResult(
        update=(), weight=jnp.ones(()), metrics={"sums": sums}, model_state=(), norm=jnp.zeros(())
    )
