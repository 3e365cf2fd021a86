"""The work of one client, as the runner sees it: what it starts from, its steps, what it sends."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lite import _validate
from fedjax_lite.base import Batch, Client, ClientResult, ClientUpdate, Cohort, PyTree, Reducer
from fedjax_lite.engine.batches import (
    KEY_DATA,
    KEY_INIT,
    KEY_STEP,
    Batching,
    Slot,
    read_batch,
    steps_per_epoch,
)
from fedjax_lite.engine.counting import counting_calls
from fedjax_lite.engine.execution import Rewrite
from fedjax_lite.engine.frozen import frozen_given
from fedjax_lite.engine.store import check_entry
from fedjax_lite.xla import random
from fedjax_lite.xla.fusion import unshared
from fedjax_lite.xla.precision import squared_norm

_REPORTED = {
    "client_id",
    "num_examples",
    "num_steps",
    "update_norm",
    "weight",
    "nonfinite",
    "bits_down",
    "staleness",
}


class Sent(NamedTuple):
    """What comes back from one client, weighted, or from a wave of them."""

    update: PyTree
    weight: jax.Array
    model_state: PyTree
    statistics: PyTree
    metrics: dict[str, jax.Array]
    output: PyTree

    @property
    def summed(self) -> tuple[PyTree, jax.Array, PyTree, PyTree]:
        """What is added up over clients."""
        return self.update, self.weight, self.model_state, self.statistics


class Trainee(NamedTuple):
    """A client whose turn it is, or those of a wave.

    Attributes:
      slot: Who it is, and where its rows are.
      num_steps: How many local steps it takes, int32.
      keys: Its keys of this round `[3]`, by purpose.
      entry: What it kept.
      received: Fields of what the server broadcasts that it starts from in place of the newest.
      staleness: How many rounds old these are, int32.
    """

    slot: Slot
    num_steps: jax.Array
    keys: jax.Array
    entry: PyTree
    received: dict[str, PyTree]
    staleness: jax.Array

    @property
    def client(self) -> Client:
        """What a client update sees of it."""
        slot = self.slot
        return Client(
            *(slot.id, slot.num_examples, self.num_steps, self.entry),
            *(self.keys[..., KEY_INIT], self.staleness),
        )


class Work(NamedTuple):
    """The work of one client, or of a wave of clients `[lanes]`.

    Attributes:
      init: What a client begins with.
      step: What is done of its steps in one turn of the loop.
      measure: What is measured before and after them.
      final: What is sent.
      at_once: How many steps that is.
    """

    init: Callable[[Trainee], PyTree]
    step: Callable[..., PyTree]
    measure: Callable[[Trainee, PyTree], dict[str, jax.Array]]
    final: Callable[[Trainee, PyTree, PyTree], Sent]
    at_once: int = 1

    def turns(self, num_steps: jax.Array) -> jax.Array:
        """In how many turns as many steps are taken."""
        if self.at_once == 1:
            return num_steps
        return jax.lax.div(num_steps + self.at_once - 1, jnp.int32(self.at_once))


def client_work(
    client_update: ClientUpdate,
    shared: PyTree,
    cohort: Cohort,
    store: PyTree,
    batching: Batching,
    rewrite: Rewrite,
    on_nonfinite: str,
    reducer: Reducer,
    frozen: PyTree,
    *,
    at_once: int = 1,
) -> Work:
    """The work of one client of a cohort.

    Args:
      client_update: What a client computes.
      shared: What the server broadcasts.
      cohort: Who takes part, with the rows that this device has.
      store: What clients keep, for the form of what they return; `()` if that is not kept.
      batching: What a client runs through.
      rewrite: What is applied to functions that run inside loops.
      on_nonfinite: As in `run_clients`.
      reducer: As in `run_clients`.
      frozen: As in `run_clients`.
      at_once: How many steps are taken side by side.
    """

    def broadcast(trainee: Trainee) -> PyTree:
        return dataclasses.replace(shared, **trainee.received) if trainee.received else shared

    def init(trainee: Trainee) -> PyTree:
        with frozen_given(frozen):
            received = unshared(broadcast(trainee))
            return _validate.strong(client_update.init(received, trainee.client))

    def step(step: jax.Array, trainee: Trainee, client_state: PyTree) -> PyTree:
        batch, key = read(step, trainee)
        with frozen_given(frozen), counting_calls():
            after = client_update.step(broadcast(trainee), trainee.client, client_state, batch, key)
        return checked("step", after, client_state)

    def steps(turn: jax.Array, trainee: Trainee, client_state: PyTree) -> PyTree:
        assert client_update.steps is not None
        number = turn * at_once + jnp.arange(at_once, dtype=jnp.int32)
        # Another turn of a step that is taken: in its place, rows that are not the client's could
        # make a gradient that is not a number, whatever it is multiplied with.
        batches, keys = jax.vmap(read, (0, None))(
            jnp.minimum(number, trainee.num_steps - 1), trainee
        )
        taken = number < trainee.num_steps
        with frozen_given(frozen), counting_calls():
            after = client_update.steps(
                broadcast(trainee), trainee.client, client_state, batches, keys, taken
            )
        return checked("steps", after, client_state)

    def read(step: jax.Array, trainee: Trainee) -> tuple[Batch, jax.Array]:
        batch = read_batch(cohort, trainee.keys[KEY_DATA], trainee.slot, step, batching)
        return batch, random.fold_in_pair(trainee.keys[KEY_STEP], 0, step)

    def checked(name: str, after: PyTree, client_state: PyTree) -> PyTree:
        of = f"what client_update.{name} returned"
        remedy = "return a client state like that of init."
        _validate.same_form(of, after, client_state, remedy)
        return after

    def measure(trainee: Trainee, client_state: PyTree) -> dict[str, jax.Array]:
        values = client_update.measure
        if values is None:
            return {}
        # The order of the examples does not matter here, and no gradient passes.
        in_order = dataclasses.replace(batching, shuffle=False)
        shared_, state = jax.lax.stop_gradient((broadcast(trainee), client_state))

        def sums(i: jax.Array) -> dict[str, jax.Array]:
            batch = read_batch(cohort, trainee.keys[KEY_DATA], trainee.slot, i, in_order)
            with _validate.reading(batch), frozen_given(frozen):
                measured = values(shared_, trainee.client, state, batch)
            for name, value in measured.items():
                _validate.per_example(f"metric {name!r}", value.shape, batch["mask"].shape[0])
            return {name: jnp.where(batch["mask"], x, 0).sum() for name, x in measured.items()}

        num_examples = trainee.slot.num_examples
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sums, jnp.int32(0))
        )
        add = rewrite(lambda i, total: jax.tree.map(jnp.add, total, sums(i)))
        total = jax.lax.fori_loop(0, steps_per_epoch(num_examples, batching), add, zeros)
        return jax.tree.map(lambda x: x / jnp.maximum(num_examples, 1), total)

    def final(trainee: Trainee, client_state: PyTree, measured: PyTree) -> Sent:
        with frozen_given(frozen):
            result = client_update.final(broadcast(trainee), trainee.client, client_state)
        result = _validate.strong(_check_result(result))
        entry = trainee.entry
        if result.entry is not None:
            entry = result.entry
            check_entry(entry, store)
        # No gradient: that of a norm is not a number at zero, whatever it is multiplied with.
        norm = jax.lax.stop_gradient(result.norm)
        if norm is None:
            norm = jnp.sqrt(squared_norm(jax.lax.stop_gradient(result.update)))
        weight = _validate.scalar("the weight of client_update.final", result.weight)
        others = (result.model_state, result.statistics, entry)
        floats = [x for x in jax.tree.leaves(others) if jnp.issubdtype(x.dtype, jnp.inexact)]
        finite = jnp.isfinite(norm + squared_norm(jax.lax.stop_gradient(floats)) + weight)
        finite &= weight >= 0  # Below zero, a client would pull the mean to the other side.
        absent = trainee.num_steps == 0
        left_out = absent | ~finite if on_nonfinite == "drop" else absent
        weight = jnp.where(left_out, 0, weight)
        zero = unshared(jnp.int32(0))

        def zero_where(condition: jax.Array, tree: PyTree) -> PyTree:
            return jax.tree.map(lambda x: jnp.where(condition, zero.astype(x.dtype), x), tree)

        metrics = {
            **result.metrics,
            **measured,
            "update_norm": norm,
            "weight": weight,
            "nonfinite": jnp.where(finite, 0.0, 1.0),
        }
        update, model_state = result.update, result.model_state
        if reducer.summand is not None:
            update = reducer.summand(update, weight)
        if model_state is None:  # Which the client leaves as it is: there is nothing to add up.
            model_state = ()
        return Sent(
            update=zero_where(left_out, update),
            weight=weight,
            model_state=zero_where(left_out, jax.tree.map(lambda x: weight * x, model_state)),
            statistics=zero_where(weight == 0, result.statistics),
            metrics=zero_where(absent, jax.tree.map(jnp.asarray, metrics)),
            output=entry,
        )

    taking = step if at_once == 1 else steps
    return Work(rewrite(init), rewrite(taking), measure, rewrite(final), at_once)


def _check_result(result: ClientResult) -> ClientResult:
    _validate.instance("what client_update.final returned", result, ClientResult)
    if taken := _REPORTED.intersection(result.metrics):
        raise ValueError(
            f"the metrics of client_update.final have {', '.join(map(repr, sorted(taken)))}, which"
            " every algorithm reports by itself; choose another name."
        )
    for path, value in jax.tree.leaves_with_path(result.metrics):
        if not isinstance(value, jax.Array | np.ndarray | np.generic | int | float):
            where = f"the metrics of client_update.final{jax.tree_util.keystr(path)}"
            raise TypeError(f"{where} is {value!r}; report numbers and arrays.")
    return result
