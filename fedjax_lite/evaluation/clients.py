"""Evaluation of a model on the examples of each client."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite._repr import record
from fedjax_lite.base import Batch, Client, ClientResult, ClientUpdate, Cohort, PyTree, ServerState
from fedjax_lite.engine.batches import (
    DEFAULT_BATCH_SIZE,
    Batching,
    Slot,
    adapt_batch_size,
    read_batch,
)
from fedjax_lite.engine.execution import Execution
from fedjax_lite.engine.file_store import with_entries
from fedjax_lite.engine.runner import run_clients
from fedjax_lite.engine.store import check_store
from fedjax_lite.evaluation.measure import Measure, measure_of
from fedjax_lite.evaluation.metrics import Metric
from fedjax_lite.models.model import Model
from fedjax_lite.xla.cpu import Paced
from fedjax_lite.xla.mesh import of_one_device, resolve


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


def model_of(state: ServerState, store: PyTree = ()) -> ServerState:
    """What evaluations of clients read of a state, and nothing that would be copied in vain."""
    return ServerState(
        params=state.params,
        model_state=state.model_state,
        opt_state=(),
        round=state.round,
        store=store,
        frozen=state.frozen,
    )


def evaluate_clients(
    model: Model,
    state: ServerState,
    cohort: Cohort,
    *,
    metrics: Mapping[str, Metric] | None = None,
    client_model: Callable[[ServerState, PyTree], tuple[PyTree, PyTree]] | None = None,
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
      client_model: That of an algorithm whose clients have params or model state of their own,
        which are then evaluated; by default those of the server are.
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
        not of the population of the cohort where `client_model` reads it, or as for `evaluate`.
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
    if client_model is not None:
        if not jax.tree.leaves(state.store):
            raise ValueError(
                "state.store is empty, and client_model is given, which reads it; pass a state"
                " with its store (the best one that fl.train keeps has none)."
            )
        state, cohort = with_entries(state, cohort)
        check_store(state.store, cohort.capacity if cohort.has_entries else cohort.num_clients)
    return _evaluate_clients(
        model_of(state, () if client_model is None else state.store),
        of_one_device(dataclasses.replace(cohort, max_steps=None, staleness=None)),
        jax.random.key(0) if key is None else key,
        measure=measure_of(model, metrics),
        client_model=client_model,
        batching=reading_once(cohort, batch_size),
        execution=Execution(lanes, resolve(mesh), rewrite_convolutions),
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
    return _summary(values, num_examples)


@jax.jit
def _summary(values: jax.Array, num_examples: jax.Array) -> dict[str, jax.Array]:
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
    jax.jit,
    static_argnames=("measure", "client_model", "batching", "execution"),
)
def _evaluate_clients(
    state: ServerState,
    cohort: Cohort,
    key: jax.Array,
    *,
    measure: Measure,
    client_model: Callable[[ServerState, PyTree], tuple[PyTree, PyTree]] | None,
    batching: Batching,
    execution: Execution,
) -> ClientEvaluation:
    def used(shared: ServerState, own: tuple[PyTree, PyTree] | None) -> tuple[PyTree, PyTree]:
        return (shared.params, shared.model_state) if own is None else own

    def init(shared: ServerState, client: Client) -> _Measured:
        own = None if client_model is None else client_model(shared, client.entry)
        # Its form alone: the rows outside of the runner are those of all devices.
        batch = jax.eval_shape(lambda: read_batch(cohort, key, Slot.of(cohort, 0), 0, batching))
        return _Measured(own, measure.zeros(*used(shared, own), batch))

    def step(
        shared: ServerState, client: Client, measured: _Measured, batch: Batch, key: jax.Array
    ) -> _Measured:
        del client, key
        sums = measure.sums(*used(shared, measured.own), batch)
        return measured._replace(sums=jax.tree.map(jnp.add, measured.sums, sums))

    def final(shared: ServerState, client: Client, measured: _Measured) -> ClientResult:
        return report_sums(measured.sums)

    result = run_clients(
        ClientUpdate(init, step, final),
        dataclasses.replace(state, store=(), frozen=()),
        cohort,
        key,
        batching=batching,
        store=state.store,
        frozen=state.frozen,
        keep_output=False,
        execution=execution,
    )
    return client_evaluation(measure, result.clients["sums"], cohort.num_examples)


class _Measured(NamedTuple):
    """A client while it is evaluated: its own params and model state, and the sums so far."""

    own: tuple[PyTree, PyTree] | None
    sums: dict[str, PyTree]


def report_sums(sums: PyTree) -> ClientResult:
    """What a client sends that only measures."""
    return ClientResult((), jnp.ones(()), {"sums": sums}, norm=jnp.zeros(()))
