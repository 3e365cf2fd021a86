"""The contracts that every part of the package is written against.

Shapes are written as `[clients, steps, batch, ...]` throughout:

| axis      | meaning                                                             |
|-----------|---------------------------------------------------------------------|
| `clients` | slots of a cohort, in the order in which the cohort names them      |
| `waves`   | groups of clients that start and end together                       |
| `lanes`   | clients of one wave on one device, trained side by side by `vmap`   |
| `steps`   | local steps of one client                                           |
| `batch`   | examples of one local step                                          |
| `rows`    | examples of a whole population, client after client                 |

Every padded axis has a mask, and padding contributes exactly zero: to updates,
weights, metrics and model state, whatever values it holds.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from fedjax_lite._repr import record

PyTree = Any
Batch = Mapping[str, jax.Array]
"""Features `[batch, ...]` by name; under `"mask"`, a boolean `[batch]`: which are real."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cohort:
    """The clients of one round: a list of slots, some of which may be empty.

    A cohort says who takes part and where their rows are. It says nothing of lanes, and of
    devices only if each has rows of its own: the runner deals the clients out inside the
    compiled round.

    Attributes:
      client_ids: `[clients]`, int32, positions in the population (and in the `client_ids` of
        the dataset that it came from); -1 marks an empty slot.
      num_examples: `[clients]`, int32; 0 in empty slots.
      offsets: `[clients]`, int32, the first row of each client in `examples`, or in the part of
        `examples` that lies on the client's device.
      examples: Features `[rows, ...]` by name; empty for generated clients.
      num_clients: Size of the population (static).
      device_slots: `[devices, slots of a device]`, int32, if the rows are spread over the devices
        of a mesh, an equal part to each: the slots whose rows a device has, the largest clients
        first, the number of slots marking none. `None` if each device has all rows.
      sample: For generated clients, the function that draws a batch (static).
    """

    client_ids: jax.Array
    num_examples: jax.Array
    offsets: jax.Array
    examples: dict[str, jax.Array]
    num_clients: int = dataclasses.field(metadata={"static": True})
    device_slots: jax.Array | None = None
    sample: Callable[[jax.Array, jax.Array], dict[str, jax.Array]] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    def __repr__(self) -> str:
        return record(self, {**vars(self), "sample": None})

    @property
    def capacity(self) -> int:
        """Number of slots, empty ones included."""
        return self.client_ids.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ServerState:
    """What the server keeps from one round to the next.

    Attributes:
      params: The trained parameters.
      model_state: What the model keeps but does not train (BatchNorm statistics).
      opt_state: State of the server optimizer.
      round: Number of rounds run, int32 scalar.
      store: What clients keep between rounds: a pytree of arrays `[num_clients, ...]`, indexed
        by client id; empty if they keep nothing.
      pipeline_state: State of the update pipeline; empty if there is none.
    """

    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    round: jax.Array
    store: PyTree = ()
    pipeline_state: PyTree = ()

    def __repr__(self) -> str:
        return record(self, vars(self))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RoundInfo:
    """What happened in a round; it never feeds the next one.

    Attributes:
      loss: Mean training loss over the examples processed by clients that were not left
        out, each at the params that its client had; NaN if there are none, or if clients do not
        report a metric `loss`.
      update_norm: L2 norm of the aggregate that the server optimizer was given.
      num_clients: Clients in the cohort, empty ones included.
      num_examples: Examples processed, those of every epoch counted; int32.
      num_empty: Clients without examples; they contribute nothing.
      num_nonfinite: Clients whose update, statistics, model state, weight or output for the
        store is not finite, or so large that its norm is not; and those whose weight is negative.
      skipped: True if no client contributed: `params`, `model_state` and
        `opt_state` are then unchanged, and only `round` advances.
      clients: Per-client arrays `[clients, ...]` in cohort order, zero in empty slots:
        the metrics that clients report, such as `loss`, and `num_examples`, `num_steps`,
        `update_norm`, `weight`, `nonfinite`, and `bits_down` and `bits_up`, what they are sent
        and send: params, model state, statistics.
      metrics: Means over the clients that were not left out of what was measured before and
        after their training, weighted by their numbers of examples, and what the update
        pipeline reports of its server half; often empty.
    """

    loss: jax.Array
    update_norm: jax.Array
    num_clients: jax.Array
    num_examples: jax.Array
    num_empty: jax.Array
    num_nonfinite: jax.Array
    skipped: jax.Array
    clients: dict[str, jax.Array]
    metrics: dict[str, jax.Array]

    def __repr__(self) -> str:
        return record(self, vars(self))


class FederatedAlgorithm(NamedTuple):
    """A federated algorithm as a pair of pure functions, as in optax.

    Attributes:
      init: `init(key_or_params, model_state=None, *, num_clients=None) -> state`. A typed key
        draws fresh parameters from the model; a pytree of arrays is taken as the parameters.
        The size of the population is needed where clients keep something between rounds.
      round: `round(key, state, cohort) -> (state, info)`: one round, jitted, and
        usable inside `jit`, `scan`, `vmap` and, if built with `differentiable=True`, `grad`. It
        compiles once per shape of the cohort: cohort size, client sizes and keys are data.
      client_params: `client_params(state, entry) -> params`, the params that a client uses for
        itself, from its entry in `state.store`; `None` if clients use those of the server.
    """

    init: Callable[..., Any]
    round: Callable[..., tuple[Any, RoundInfo]]
    client_params: Callable[[ServerState, PyTree], PyTree] | None = None


class ClientResult(NamedTuple):
    """What one client sends to the server, and what it keeps.

    Attributes:
      update: Pytree of arrays; the server receives the weighted sum over clients.
      weight: Scalar weight of the update in that sum, not negative.
      metrics: Scalars or arrays by name, reported per client and not aggregated.
      model_state: What the model keeps but does not train, summed with the same weight.
      client_output: What the client keeps for the next round that it takes part in, like its
        `client_input`. A client that is left out, has no examples or weighs nothing keeps what it
        had.
      norm: L2 norm of the update, if it is known; the runner computes it otherwise.
      statistics: Pytree of arrays that the server receives beside the update, as the plain sum
        over clients with a weight: counts, losses, control variates. No pipeline acts on them.
    """

    update: PyTree
    weight: jax.Array
    metrics: dict[str, jax.Array]
    model_state: PyTree
    client_output: PyTree = ()
    norm: jax.Array | None = None
    statistics: PyTree = ()


class UpdateTransform(NamedTuple):
    """What happens to updates between clients and server, in the spirit of optax.

    Attributes:
      init: `init(params) -> state`.
      client: `client(key, state, update, weight) -> (update, info)`, on the update of one client,
        before it is weighted and summed, with a typed key of the client's own. `info` has scalars
        by name, which are reported per client; `bits_up` is the size of the update as it is sent.
      server: `server(key, state, aggregate) -> (aggregate, state, info)`, on the aggregate, before
        the server optimizer is given it. `info` has scalars by name.
    """

    init: Callable[[PyTree], PyTree]
    client: Callable[[jax.Array, PyTree, PyTree, jax.Array], tuple[PyTree, dict[str, jax.Array]]]
    server: Callable[[jax.Array, PyTree, PyTree], tuple[PyTree, PyTree, dict[str, jax.Array]]]


class ClientUpdate(NamedTuple):
    """What one client computes, written for a single client; the runner maps it.

    Attributes:
      init: `init(shared, client_input, key) -> client_state`, with `shared` what the server
        broadcasts (the same for all clients, never copied per client) and `client_input` what
        the client kept from the last round that it took part in, `()` if clients keep nothing.
      step: `step(shared, client_state, batch, key) -> client_state`, one local
        step on a batch of the client's examples.
      final: `final(shared, client_state, num_examples) -> ClientResult`, once
        all of the client's steps are done.
      measure: `measure(shared, client_state, batch) -> {name: values [batch]}`, or `None`. Its
        means over the client's examples, before the first step and after the last one, are
        reported as the metrics `{name}_before` and `{name}_after`.
    """

    init: Callable[[PyTree, PyTree, jax.Array], PyTree]
    step: Callable[[PyTree, PyTree, Batch, jax.Array], PyTree]
    final: Callable[[PyTree, PyTree, jax.Array], ClientResult]
    measure: Callable[[PyTree, PyTree, Batch], dict[str, jax.Array]] | None = None
