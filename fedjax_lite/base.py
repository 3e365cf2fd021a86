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
      max_steps: `[clients]`, int32, the most local steps that each client takes, such as before it
        is timed out; `None` if nothing bounds them.
      staleness: `[clients]`, int32, how many rounds old the params are that each client starts
        from, for algorithms with `max_staleness`; `None` if all start from the newest.
      has_entries: Whether the stores of the state hold the entries of this cohort's clients alone,
        one for each slot, as they do while a store lies in a file (static).
      most_examples: What no client of the population has more examples than, which bounds batches
        and steps; `None` if that is not known (static: a round compiles anew for another one).
      sample: For generated clients, the function that draws a batch (static).
    """

    client_ids: jax.Array
    num_examples: jax.Array
    offsets: jax.Array
    examples: dict[str, jax.Array]
    num_clients: int = dataclasses.field(metadata={"static": True})
    device_slots: jax.Array | None = None
    max_steps: jax.Array | None = None
    staleness: jax.Array | None = None
    has_entries: bool = dataclasses.field(default=False, metadata={"static": True})
    most_examples: int | None = dataclasses.field(default=None, metadata={"static": True})
    sample: Callable[[jax.Array, jax.Array], dict[str, jax.Array]] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    def __repr__(self) -> str:
        shown = {**vars(self), "has_entries": self.has_entries or None}
        shown |= {"sample": None, "most_examples": None}
        return record(self, shown)

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
        by client id, or a `fl.FileStore`; empty if they keep nothing.
      pipeline_state: State of the update pipeline; empty if there is none.
      pipeline_store: What the update pipeline keeps with clients between rounds, as `store` is;
        empty if it keeps nothing.
      last_aggregate: What the reducer made of the last round that was not skipped, zero before the
        first, if it begins from there; empty otherwise.
      versions: Params and model state of the last rounds, arrays `[max_staleness + 1, ...]`, that
        before round r at place r modulo their number; empty without `max_staleness`.
      frozen: Params that are not trained; empty if all are.
    """

    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    round: jax.Array
    store: PyTree = ()
    pipeline_state: PyTree = ()
    pipeline_store: PyTree = ()
    last_aggregate: PyTree = ()
    versions: PyTree = ()
    frozen: PyTree = ()

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
        the metrics that clients report, such as `loss`, and `client_id` (-1 in empty slots),
        `num_examples`, `num_steps`, `update_norm`, `weight`, `nonfinite`, and `bits_down` and
        `bits_up`, what they are sent and send: params, model state, statistics; `staleness`, if the
        cohort has it.
      metrics: Of the scalars that clients and transforms report, but for `loss`: the means over the
        clients that were not left out, weighted by their numbers of examples; and what the update
        pipeline reports of its server half.
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
      client_model: `client_model(state, entry) -> (params, model_state)`, what a client uses for
        itself, from its entry in `state.store`; `None` if clients use what the server has.
      guarantees: `guarantees() -> Guarantees`, what the update pipeline guarantees of each client's
        message, and of the noise; `None` without one.
      message_bits: `message_bits(key_or_params) -> (bits_down, bits_up)`, what a client is sent and
        sends in a round, as far as it follows from shapes: what is encoded in a size that depends
        on values counts as it is without. `None` if nothing is known.
    """

    init: Callable[..., Any]
    round: Callable[..., tuple[Any, RoundInfo]]
    client_model: Callable[[ServerState, PyTree], tuple[PyTree, PyTree]] | None = None
    guarantees: "Callable[[], Guarantees] | None" = None
    message_bits: Callable[[PyTree], tuple[float, float]] | None = None


class Client(NamedTuple):
    """Who a client is, and what it has: one client of a cohort, in one round.

    Attributes:
      id: Its position in the population, int32 scalar.
      num_examples: How many examples it has, int32 scalar.
      num_steps: How many local steps it takes in this round, int32 scalar.
      entry: What it kept from the last round that it took part in, or
        `ClientUpdate.entry(server)` before its first; `()` if clients keep nothing.
      key: A typed key of its own for this round.
      staleness: How many rounds old the params are that it starts from, int32 scalar.
    """

    id: jax.Array
    num_examples: jax.Array
    num_steps: jax.Array
    entry: PyTree
    key: jax.Array
    staleness: Any = 0


class ClientResult(NamedTuple):
    """What one client sends to the server, and what it keeps.

    Attributes:
      update: Pytree of arrays; the server receives the weighted sum over clients.
      weight: Scalar weight of the update in that sum, not negative.
      metrics: Scalars or arrays by name, reported per client; scalars also as their mean over the
        clients that were not left out, weighted by their numbers of examples.
      model_state: What the model keeps but does not train, summed with the same weight; `None` if
        that of the server stays.
      entry: What the client keeps for the next round that it takes part in, like its
        `Client.entry`; `None` if that stays. A client that is left out, has no examples or weighs
        nothing keeps what it had.
      norm: L2 norm of the update, if it is known; the runner computes it otherwise.
      statistics: Pytree of arrays that the server receives beside the update, as the plain sum
        over clients with a weight: counts, losses, control variates.
    """

    update: PyTree
    weight: Any
    metrics: dict[str, Any] = {}  # noqa: RUF012, which no one changes
    model_state: PyTree = None
    entry: PyTree = None
    norm: jax.Array | None = None
    statistics: PyTree = ()


class ClientUpdate(NamedTuple):
    """What one client computes, written for a single client; the runner maps it.

    Attributes:
      init: `init(server, client) -> state`, with `server` what the server broadcasts (the same for
        all clients, never copied per client) and `client` a `Client`.
      step: `step(server, client, state, batch, key) -> state`, one local step on a batch of the
        client's examples.
      final: `final(server, client, state) -> ClientResult`, once all of its steps are done.
      measure: `measure(server, client, state, batch) -> {name: values [batch]}`, or `None`. Its
        means over the client's examples, before the first step and after the last one, are
        reported as the metrics `{name}_before` and `{name}_after`.
      entry: `entry(server) -> pytree of arrays`, what a client keeps before its first round, if
        clients keep something: a client is then given its `Client.entry`, and the `entry` of its
        result replaces it. `None` if they keep nothing.
      shared: `shared(server) -> (params, model_state)`, what the server keeps of what is drawn, if
        the rest is clients' own and in their entries; `None` if it keeps all.
      client_model: See `FederatedAlgorithm`.
      steps: `steps(server, client, state, batches, keys, taken) -> state`, several local steps at
        once, `[steps, ...]`, if none of them needs the state that another one leaves, as where
        gradients are added up; accelerators run them side by side. Those that are not `taken`
        `[steps]` repeat one that is, and add nothing. `None` if each step needs the last one.
    """

    init: Callable[[Any, Client], PyTree]
    step: Callable[[Any, Client, PyTree, Batch, jax.Array], PyTree]
    final: Callable[[Any, Client, PyTree], ClientResult]
    measure: Callable[[Any, Client, PyTree, Batch], dict[str, jax.Array]] | None = None
    entry: Callable[[ServerState], PyTree] | None = None
    shared: Callable[[ServerState], tuple[PyTree, PyTree]] | None = None
    client_model: Callable[[ServerState, PyTree], tuple[PyTree, PyTree]] | None = None
    steps: Callable[[Any, Client, PyTree, Batch, jax.Array, jax.Array], PyTree] | None = None


class Message(NamedTuple):
    """An update on its way from a client to the server, as transforms see and change it.

    Attributes:
      update: The update.
      weight: Its weight, scalar.
      entry: What the transform keeps with the client, from the last round that it took part in,
        and for the next; `()` if it keeps nothing.
      statistics: Pytree of arrays that the transform sends beside, summed over clients with a
        weight; `()` if it sends nothing.
      metrics: Scalars by name that are reported per client; `bits_up` is the size of the update as
        it is sent, a number of Python if it follows from shapes.
    """

    update: PyTree
    weight: jax.Array
    entry: PyTree = ()
    statistics: PyTree = ()
    metrics: dict[str, jax.Array] = {}  # noqa: RUF012, which no one changes


class Guarantees(NamedTuple):
    """What is known of each client's message at a point of a pipeline, when it is built.

    Attributes:
      sensitivity: Upper bound of the L2 norm of its update, a number that may be traced; `None` if
        there is none.
      max_weight: Upper bound of its weight, a number that may be traced; `None` if there is none.
      is_masked: Whether the update is hidden in a mask that only the sum over clients takes off.
      is_private: Whether noise is added to the aggregate, in proportion to what one client can
        change. There must then be a bound of that, clients send nothing else, and no round is
        skipped.
      noise_multiplier: Standard deviation of that noise by what one client can change, a number
        that may be traced, if it is normal and covers all that is released of clients in a round;
        `None` otherwise.
      min_separation: The rounds that a client takes part in have to lie so many apart, for each of
        them to be covered by the noise as if it were drawn anew.
      released: What transforms release of clients beside the aggregate: the sum of $1 / z^2$ over
        it, if each has normal noise of $z$ times what one client can change, a number that may be
        traced. Of the noise multiplier of a whole round, the aggregate gets what this leaves.
      modulus_bits: The number of bits b, if its update is integers modulo 2^b, which are added up
        as they are; `None` if it is floats.
    """

    sensitivity: Any = None
    max_weight: Any = None
    is_masked: bool = False
    is_private: bool = False
    noise_multiplier: Any = None
    min_separation: int = 1
    released: Any = 0.0
    modulus_bits: int | None = None


class Received(NamedTuple):
    """What the server has of a cohort, as the server halves of transforms see and change it.

    Attributes:
      aggregate: What the reducer made of the updates.
      statistics: The sum over clients of what the transform sent beside.
      sensitivity: Upper bound of the L2 norm by which one client can change the aggregate, who is
        there or not; a number that may be traced, or `None` if there is none.
      weights: `[clients]`, the weights of the cohort's clients, 0 of those who are left out. A
        server half that cannot read the aggregate sets all of them to 0: the round is skipped.
      cohort: The cohort, without examples.
      drift: `drift() -> aggregate`, what an additive reducer makes, in place of the updates, of how
        far the server's params have moved from those that each client started from; `None` where
        noise is added to the aggregate.
      released: As in `Guarantees`, of the whole pipeline.
    """

    aggregate: PyTree
    statistics: PyTree = ()
    sensitivity: Any = None
    weights: Any = None
    cohort: Any = None
    drift: Any = None
    released: Any = 0.0


def _nothing_known(before: Guarantees, state: PyTree) -> Guarantees:
    return before._replace(sensitivity=None, max_weight=None)


class UpdateTransform(NamedTuple):
    """What happens to updates between clients and server, in the spirit of optax.

    Attributes:
      init: `init(params) -> state`, of the server.
      client: `client(key, state, message, client) -> message`, for the update of one client before
        it is weighted and summed, with a typed key of the client's own in this round.
      server: `server(key, state, received) -> (received, state, info)`, for the aggregate before
        the server optimizer is given it. `info` has scalars by name.
      entry: `entry(params) -> pytree of arrays`, what the transform keeps with a client before its
        first round; `None` if it keeps nothing.
      broadcast: `broadcast(key, state, params) -> (params, bits)`, what clients receive in place of
        the server's params, and its size; `None` if they receive these.
      guarantees: `guarantees(before, state) -> after`, of `Guarantees`. It is called when a
        pipeline is built, with `None` for a state, and raises a `ValueError` where the transform
        makes no sense after what comes before it; and in a round, for bounds that are in the state.
      announce: `announce(key, state, cohort) -> state`, what clients see in place of the state in
        this round, such as a key that all of them share, or who takes part. The key is that of
        `server`, and the cohort has no examples. `None` if they see the state.

    A transform that halves each update, and counts whom it was given:

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> def client(key, state, message, client):
    ...     return message._replace(update=message.update / 2, statistics=jnp.float32(1))
    >>> def server(key, state, received):
    ...     return received, state, {"halved": received.statistics}
    >>> halve = fl.UpdateTransform(lambda params: (), client, server)
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), pipeline=halve)
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [2.0]}, {"x": [6.0]}])
    >>> both = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.0)), both)
    >>> float(state.params), float(info.metrics["halved"])
    (2.0, 2.0)
    """

    init: Callable[[PyTree], PyTree]
    client: Callable[[jax.Array, PyTree, Message, Client], Message]
    server: Callable[[jax.Array, PyTree, Received], tuple[Received, PyTree, dict[str, jax.Array]]]
    entry: Callable[[PyTree], PyTree] | None = None
    broadcast: Callable[[jax.Array, PyTree, PyTree], tuple[PyTree, Any]] | None = None
    guarantees: Callable[[Guarantees, PyTree], Guarantees] = _nothing_known
    announce: Callable[[jax.Array, PyTree, Cohort], PyTree] | None = None


class Stack(NamedTuple):
    """The updates of a cohort side by side, as stacked reducers see them.

    Attributes:
      updates: Arrays `[rows, coordinates]`, one for each array of the params, that hold some of its
        coordinates. Each row is a client's, in the order of the cohort, zero where it does not
        count.
      weights: `[rows]`, 0 of clients that are left out and of empty slots: these do not count.
      client_ids: `[rows]`, int32; -1 of what is no single client's.
      is_hostile: `[rows]`, bool, those that an attack has changed.
      last: Arrays `[coordinates]`, the aggregate of the last round, zero before the first, for a
        reducer that `keeps_last`; empty otherwise.
      key: A typed key of the round, the same for all coordinates' holders.
      total: `total(x)` is the sum of `x` over all coordinates' holders, such as of a matrix of
        inner products.
    """

    updates: list[jax.Array]
    weights: jax.Array
    client_ids: jax.Array
    is_hostile: jax.Array
    last: list[jax.Array]
    key: jax.Array
    total: Callable[[jax.Array], jax.Array]


def _no_bound(guarantees: Guarantees) -> None:
    return None


class Reducer(NamedTuple):
    """How the updates of a cohort become one aggregate: by addition, or looked at side by side.

    Of the two forms, a reducer has one. What is added up costs no memory; what is stacked takes
    that of all updates, spread over the devices by coordinate.

    Attributes:
      summand: `summand(update, weight) -> pytree`, what is added up for one client.
      finish: `finish(total, weight) -> aggregate`, of the sums over clients; `weight` is 1 in place
        of 0, and the round is then skipped.
      stacked: `stacked(stack) -> (aggregate, info)`, of a `Stack`: a list of arrays
        `[coordinates]`, and scalars by name. It may take another reducer to act before it.
      sensitivity: `sensitivity(guarantees)`, upper bound of the L2 norm by which one client can
        change the aggregate, from what is known of each message; `None` if there is none.
      keeps_last: Whether a stacked one is given the aggregate of the last round.
      needs_clients: Whether a stacked one makes sense of single clients' rows alone, as attacks do:
        what mixes rows refuses to go before it.

    The largest update, coordinate by coordinate:

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> def largest(stack):
    ...     counts = stack.weights[:, None] > 0
    ...     return [x.max(0, where=counts, initial=-jnp.inf) for x in stack.updates], {}
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), reducer=fl.Reducer(stacked=largest))
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [2.0]}, {"x": [6.0]}])
    >>> both = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.0)), both)
    >>> float(state.params)  # Of the deltas -2 and -6.
    2.0
    """

    summand: Callable[[PyTree, jax.Array], PyTree] | None = None
    finish: Callable[[PyTree, jax.Array], PyTree] | None = None
    stacked: Callable[[Stack], tuple[list[jax.Array], dict[str, jax.Array]]] | None = None
    sensitivity: Callable[[Guarantees], Any] = _no_bound
    keeps_last: bool = False
    needs_clients: bool = False
