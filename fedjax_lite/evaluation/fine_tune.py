"""Personalisation: what a model is worth to each client once it has been fine-tuned locally."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedjax_lite import _validate
from fedjax_lite.algorithms.local import ClientOptimizer
from fedjax_lite.algorithms.training import local_training
from fedjax_lite.base import Batch, Client, ClientResult, ClientUpdate, Cohort, PyTree, ServerState
from fedjax_lite.engine.batches import (
    DEFAULT_BATCH_SIZE,
    KEY_DATA,
    Batching,
    Slot,
    adapt_batch_size,
    client_key,
    read_batch,
    steps_per_epoch,
)
from fedjax_lite.engine.cohorts import on_every_device
from fedjax_lite.engine.execution import Execution
from fedjax_lite.engine.runner import run_clients
from fedjax_lite.evaluation.clients import (
    ClientEvaluation,
    client_evaluation,
    model_of,
    reading_once,
    report_sums,
)
from fedjax_lite.evaluation.measure import Measure, measure_of
from fedjax_lite.evaluation.metrics import Metric
from fedjax_lite.models.model import Model
from fedjax_lite.xla import random
from fedjax_lite.xla.cpu import Paced
from fedjax_lite.xla.mesh import of_one_device, resolve


def evaluate_fine_tuned(
    model: Model,
    state: ServerState,
    train_cohort: Cohort,
    held_out_cohort: Cohort,
    client_optimizer: ClientOptimizer,
    *,
    key: jax.Array,
    num_epochs: int = 1,
    num_steps: int | None = None,
    batch_size: int | None = None,
    shuffle: bool = True,
    metrics: Mapping[str, Metric] | None = None,
    lanes: int | None = None,
    mesh: Mesh | None = None,
    rewrite_convolutions: bool | None = None,
) -> tuple[ClientEvaluation, ClientEvaluation]:
    """Metrics of each client before and after it has fine-tuned the model on its own examples.

    Each client trains from the server's params and model state on its examples in one cohort as
    it does in `fed_avg`, and is evaluated on its examples in the other. Memory does not grow with
    the number of fine-tuned models. The state stays as it is.

    Source: Wang et al. (2019), "Federated Evaluation of On-device Personalization".

    Args:
      model: The model.
      state: State of an algorithm, for its params, model state and round.
      train_cohort: The clients, with the examples that they train on.
      held_out_cohort: The same clients in the same order, with those that they are evaluated on,
        such as the cohorts of the two parts of `dataset.split_examples`.
      client_optimizer: As for `fed_avg`. Kept, not built anew for each call, it is compiled once.
      key: Typed key, for the order of the examples and what else is drawn.
      num_epochs: As for `fed_avg`.
      num_steps: As for `fed_avg`.
      batch_size: As for `fed_avg`.
      shuffle: As for `fed_avg`.
      metrics: Metrics by name, as for `evaluate`.
      lanes: As for `fed_avg`.
      mesh: As for `fed_avg`.
      rewrite_convolutions: As for `fed_avg`.

    Returns:
      The evaluations before and after fine-tuning. A client without examples in one of the
      cohorts is in neither: its values are NaN, its `num_examples` is 0.

    Raises:
      ValueError: The cohorts are not of the same clients (traced ids are not checked), or an
        option is out of range.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> state = fl.fed_sgd(model, optax.sgd(1.0)).init(jnp.float32(0.0))
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [4.0]}, "b": {"x": [8.0]}})
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1])
    >>> before, after = evaluate_fine_tuned(
    ...     model, state, everyone, everyone, optax.sgd(0.5), key=jax.random.key(0)
    ... )
    >>> before.clients["loss"].tolist(), after.clients["loss"].tolist()
    ([8.0, 32.0], [2.0, 8.0])
    """
    _validate.instance("state", state, ServerState)
    _validate.instance("train_cohort", train_cohort, Cohort)
    _validate.instance("held_out_cohort", held_out_cohort, Cohort)
    _validate.key("key", key)
    _check_same_clients(train_cohort, held_out_cohort)
    batching = Batching(
        batch_size=DEFAULT_BATCH_SIZE if batch_size is None else batch_size,
        num_epochs=num_epochs,
        num_steps=num_steps,
        shuffle=shuffle,
    )
    return _evaluate_fine_tuned(
        model_of(state),
        of_one_device(train_cohort),
        of_one_device(held_out_cohort),
        key,
        model=model,
        client_optimizer=client_optimizer,
        measure=measure_of(model, metrics),
        batching=adapt_batch_size(train_cohort, batching, batch_size),
        execution=Execution(lanes, resolve(mesh), rewrite_convolutions),
    )


def _check_same_clients(train_cohort: Cohort, held_out_cohort: Cohort) -> None:
    """Refuses cohorts of different clients, or populations."""
    ids = train_cohort.client_ids, held_out_cohort.client_ids
    traced = any(isinstance(x, jax.core.Tracer) for x in ids)
    if (
        train_cohort.num_clients != held_out_cohort.num_clients
        or ids[0].shape != ids[1].shape
        or (not traced and not np.array_equal(*ids))
    ):
        raise ValueError(
            f"train_cohort has the clients {ids[0]} of {train_cohort.num_clients} and"
            f" held_out_cohort {ids[1]} of {held_out_cohort.num_clients}; pass cohorts of the same"
            " clients, such as fl.cohort_of(population, client_ids) of both populations."
        )


@Paced
@functools.partial(
    jax.jit,
    static_argnames=("model", "client_optimizer", "measure", "batching", "execution"),
)
def _evaluate_fine_tuned(
    state: ServerState,
    train_cohort: Cohort,
    held_out_cohort: Cohort,
    key: jax.Array,
    *,
    model: Model,
    client_optimizer: ClientOptimizer,
    measure: Measure,
    batching: Batching,
    execution: Execution,
) -> tuple[ClientEvaluation, ClientEvaluation]:
    training = local_training(model, client_optimizer)
    reading = reading_once(held_out_cohort, None)
    key_train, key_held_out = jax.random.split(key)

    # What a client keeps, its entry, is its place in the held-out cohort.
    def init(shared: PyTree, client: Client) -> PyTree:
        return training.init(shared[0], client)

    def step(
        shared: PyTree, client: Client, trained: PyTree, batch: Batch, key: jax.Array
    ) -> PyTree:
        return training.step(shared[0], client, trained, batch, key)

    def final(shared: PyTree, client: Client, trained: PyTree) -> ClientResult:
        state, held_out, key = shared
        slot = Slot.of(held_out, client.entry)
        key_data = client_key(key, slot.id, KEY_DATA)

        def add(i: jax.Array, sums: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            batch = read_batch(held_out, key_data, slot, i, reading)
            both = tuple(measure.sums(x.params, x.model_state, batch) for x in (state, trained))
            return jax.tree.map(jnp.add, sums, both)

        zeros = measure.zeros(
            state.params, state.model_state, read_batch(held_out, key_data, slot, 0, reading)
        )
        num_batches = steps_per_epoch(slot.num_examples, reading)
        sums = jax.lax.fori_loop(0, num_batches, add, (zeros, zeros))
        return report_sums(sums)

    # Its clients lie on other devices than those of the training cohort.
    held_out_cohort = on_every_device(held_out_cohort)
    capacity, num_clients = held_out_cohort.capacity, held_out_cohort.num_clients
    owners = held_out_cohort.client_ids
    places = jnp.zeros(num_clients, jnp.int32)
    places = places.at[jnp.where(owners < 0, num_clients, owners)].set(
        jnp.arange(capacity, dtype=jnp.int32), mode="drop"
    )
    result = run_clients(
        ClientUpdate(init, step, final),
        (dataclasses.replace(state, frozen=()), held_out_cohort, random.fast(key_held_out)),
        train_cohort,
        key_train,
        batching=batching,
        store=places,
        frozen=state.frozen,
        keep_output=False,
        execution=execution,
    )
    trained = train_cohort.num_examples > 0
    num_examples = jnp.where(trained, held_out_cohort.num_examples, 0)
    before, after = result.clients["sums"]
    return (
        client_evaluation(measure, before, num_examples),
        client_evaluation(measure, after, num_examples),
    )
