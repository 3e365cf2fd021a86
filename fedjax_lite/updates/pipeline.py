"""Update transforms one after another, and around a client update."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.base import (
    Batch,
    Client,
    ClientResult,
    ClientUpdate,
    Cohort,
    Guarantees,
    Message,
    PyTree,
    Received,
    Reducer,
    UpdateTransform,
)
from fedjax_lite.xla import random
from fedjax_lite.xla.precision import squared_norm

F = TypeVar("F", bound=Callable[..., Any])
_KEY_PIPELINE = 1  # Of the keys that derive from a client's, the one of its transforms.


def chain(*transforms: UpdateTransform) -> UpdateTransform:
    """Transforms one after another: on clients in this order, on the server in the reverse one.

    Args:
      *transforms: The transforms.

    Returns:
      The `UpdateTransform`. What transforms report under the same name is the report of the last
      one on a client, and of the first one on the server.

    Bits are those of what has to be sent for the server to have what comes out. It knows the keys
    of compressors, and can do to what it decodes what those after them do: of several in a row, the
    message of the one that needs the fewest bits is sent. What it cannot do again comes after all
    of them: noise of clients, and what they keep; integers to be masked are sent as they are.
    `bits_down` are the fewest of all `fl.downlink`s, and what transforms send down beside.

    Raises:
      TypeError: A transform is none.
      ValueError: A transform makes no sense after those before it; with the reason.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> twice = chain(fl.clip_by_norm(2.0), fl.clip_by_norm(1.0))
    >>> float(twice.guarantees(fl.Guarantees(), None).sensitivity)
    1.0
    """
    for i, transform in enumerate(transforms):
        _validate.instance(f"transforms[{i}]", transform, UpdateTransform)

    keeps = any(transform.entry is not None for transform in transforms)

    def init(params: PyTree) -> PyTree:
        return tuple(transform.init(params) for transform in transforms)

    def keys_of(key: jax.Array) -> jax.Array:
        return jax.random.split(key, max(len(transforms), 1))

    def entry_of(params: PyTree) -> PyTree:
        return tuple(first_entry(transform, params) for transform in transforms)

    def client(key: jax.Array, state: PyTree, message: Message, client: Client) -> Message:
        entries, statistics = [], []
        parts = zip(
            transforms, keys_of(key), state, _parts(message.entry, transforms), strict=False
        )
        for transform, own_key, own_state, own_entry in parts:
            own = message._replace(entry=own_entry, statistics=())
            sent = transform.client(own_key, own_state, own, client)
            entries.append(sent.entry)
            statistics.append(sent.statistics)
            message = sent._replace(metrics={**message.metrics, **sent.metrics})
        entry = tuple(entries) if keeps else message.entry
        return message._replace(entry=entry, statistics=tuple(statistics))

    def server(
        key: jax.Array, state: PyTree, received: Received
    ) -> tuple[Received, PyTree, dict[str, jax.Array]]:
        info: dict[str, jax.Array] = {}
        states, keys = list(state), keys_of(key)
        sums = _parts(received.statistics, transforms)
        for i in reversed(range(len(transforms))):
            received = received._replace(statistics=sums[i])
            received, states[i], own_info = transforms[i].server(keys[i], states[i], received)
            info |= own_info
        return received, tuple(states), info

    def broadcast(key: jax.Array, state: PyTree, params: PyTree) -> tuple[PyTree, Any]:
        whole: Any = num_bits(params)
        size, beside = whole, 0.0
        for transform, own_key, own_state in zip(transforms, keys_of(key), state, strict=False):
            if transform.broadcast is not None:
                params, bits = transform.broadcast(own_key, own_state, params)
                if bits is not None:
                    size, beside = _smaller(size, bits), beside + bits - _smaller(bits, whole)
        return params, size + beside

    def announce(key: jax.Array, state: PyTree, cohort: Cohort) -> PyTree:
        return tuple(
            announced(transform, own_key, own_state, cohort)
            for transform, own_key, own_state in zip(transforms, keys_of(key), state, strict=False)
        )

    def guarantees(before: Guarantees, state: PyTree) -> Guarantees:
        for i, transform in enumerate(transforms):
            before = transform.guarantees(before, None if state is None else state[i])
        return before

    def given(function: F, name: str) -> F | None:
        return function if any(getattr(x, name) is not None for x in transforms) else None

    guarantees(Guarantees(), None)
    return UpdateTransform(
        init,
        client,
        server,
        given(entry_of, "entry"),
        given(broadcast, "broadcast"),
        guarantees,
        given(announce, "announce"),
    )


def announced(transform: UpdateTransform, key: jax.Array, state: PyTree, cohort: Cohort) -> PyTree:
    """The state of a transform as clients see it in a round."""
    return state if transform.announce is None else transform.announce(key, state, cohort)


def first_entry(transform: UpdateTransform, params: PyTree) -> PyTree:
    """What a transform keeps with a client before its first round; `()` if it keeps nothing."""
    return () if transform.entry is None else transform.entry(params)


def num_bits(tree: PyTree) -> float:
    """The size of arrays."""
    return sum(8.0 * x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def encoded(message: Message, update: PyTree, bits: Any) -> Message:
    """The message of a compressor, or of one before it, which the server compresses again."""
    fewest = _smaller(bits, message.metrics.get("bits_up", math.inf))
    return message._replace(update=update, metrics={"bits_up": fewest})


def _smaller(bits: Any, others: Any) -> Any:
    """The smaller of two sizes; a number of Python, if shapes alone tell both."""
    if isinstance(bits, int | float) and isinstance(others, int | float):
        return float(min(bits, others))
    return jnp.minimum(bits, others).astype(float)


def sent_whole(message: Message, update: PyTree, **metrics: jax.Array) -> Message:
    """The message of what the server cannot make of those before it."""
    bits: Any = num_bits(update)
    return message._replace(update=update, metrics={**metrics, "bits_up": bits})


def check_decodes(name: str, transform: UpdateTransform) -> None:
    """Refuses a transform around one of which a single message is no update.

    Raises:
      ValueError: It makes integers of a modulus of updates, or masks them.
    """
    bounds = Guarantees(sensitivity=1.0, max_weight=1.0)  # That what asks for them finds them.
    known = transform.guarantees(bounds, None)
    if known.is_masked or known.modulus_bits is not None:
        raise ValueError(
            f"transform makes integers of updates, which {name} cannot take for updates: only their"
            " sum over clients becomes one again; make integers last, as in"
            f" fl.chain({name}(fl.quantize_uniform(16)), fl.fixed_point(0.1, 1.0))."
        )


def _parts(tree: PyTree, transforms: tuple[UpdateTransform, ...]) -> PyTree:
    """What belongs to each of the transforms; nothing, where none of them has any."""
    return tree or ((),) * len(transforms)


def unmasked(name: str, before: Guarantees) -> Guarantees:
    """What is known before a transform that reads or changes single updates.

    Raises:
      ValueError: They are hidden in masks, or integers of a modulus.
    """
    if before.is_masked:
        raise ValueError(
            f"{name} comes after a mask, and would change what only the sum over clients unmasks;"
            " put it before the mask."
        )
    if before.modulus_bits is not None:
        raise ValueError(
            f"{name} comes after fixed_point, and would change integers modulo"
            f" {2**before.modulus_bits} as if they were floats; put it before fixed_point."
        )
    return before


def check_reducer(known: Guarantees, reducer: Reducer, *, drop: bool) -> None:
    """Refuses a reducer that makes no sense after a pipeline.

    Args:
      known: What the pipeline guarantees.
      reducer: What adds up the updates.
      drop: Whether updates that are not finite are left out.

    Raises:
      ValueError: It looks at single updates, which are hidden in masks or integers of a modulus; or
        noise is to be added, and nothing bounds what one client can change.
    """
    if reducer.stacked is not None and (known.is_masked or known.modulus_bits is not None):
        made = "hides them in masks" if known.is_masked else "makes integers of them"
        raise ValueError(
            f"reducer looks at single updates, and pipeline {made}; choose one that adds up, such"
            " as fl.modular_sum()."
        )
    if not known.is_private or (drop and reducer.sensitivity(known) is not None):
        return
    reasons = {
        "a client's update may be of any norm; end the clients' half with fl.clip_by_norm(1.0).": (
            known.sensitivity is None
        ),
        "a client may have any weight; add fl.cap_weight(1.0).": known.max_weight is None,
        'what is not finite has no bound; leave on_nonfinite at "drop".': not drop,
    }
    no_bound = (
        "reducer has no bound of its own, or divides by the weights of those who take part; pass"
        " fl.weighted_mean(denominator=100), a number that does not depend on them."
    )
    reason = next((text for text, holds in reasons.items() if holds), no_bound)
    raise ValueError(f"pipeline adds noise for privacy, and {reason}")


def stateless(
    client: Callable[[jax.Array, Message], Message],
    guarantees: Callable[[Guarantees], Guarantees],
) -> UpdateTransform:
    """A transform without a state, on clients alone, by `client(key, message) -> message`."""
    return UpdateTransform(
        init=lambda params: (),
        client=lambda key, state, message, _: client(key, message),
        server=lambda key, state, received: (received, state, {}),
        guarantees=lambda before, state: guarantees(before),
    )


def downlink(transform: UpdateTransform) -> UpdateTransform:
    """Does to the server's params on their way down what a transform does to updates.

    Clients start from what they receive, and their deltas are from there; the server goes on from
    its own params.

    Args:
      transform: One that keeps nothing, neither with clients nor on the server, whose half of it is
        not run.

    Returns:
      The `UpdateTransform`. Updates pass it as they are. `bits_down` is the size that it reports.

    Raises:
      ValueError: `transform` keeps something with clients, or makes integers of updates, at once;
        or keeps something on the server, in `algorithm.init`.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: jnp.sum((w - batch["x"]) ** 2, -1))
    >>> coarse = downlink(fl.quantize_uniform(2))
    >>> algorithm = fl.fed_avg(model, optax.sgd(0.0), pipeline=coarse)
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [[0.0, 0.0]]}])
    >>> one = fl.cohort_of(dataset.resident(), [0])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.array([1.0, 3.0])), one)
    >>> info.clients["bits_down"].tolist()  # Two numbers of a bit, and two extremes of 32.
    [66.0]
    """
    _validate.instance("transform", transform, UpdateTransform, "fl.quantize_uniform(256)")
    if transform.entry is not None:
        raise ValueError(
            "transform keeps something with each client, and the server broadcasts to all alike;"
            " pass one without an entry."
        )
    check_decodes("downlink", transform)

    def init(params: PyTree) -> PyTree:
        state = transform.init(params)
        if jax.tree.leaves(state):
            raise ValueError(
                "transform keeps a state on the server that only updates renew, and what is"
                " broadcast would never change it; pass one without a state."
            )
        return state

    def broadcast(key: jax.Array, state: PyTree, params: PyTree) -> tuple[PyTree, Any]:
        message = Message(params, jnp.ones(()))
        nobody = Client(jnp.int32(-1), jnp.int32(0), jnp.int32(0), (), key)
        sent = transform.client(key, state, message, nobody)
        return sent.update, sent.metrics.get("bits_up")

    untouched = stateless(lambda key, message: message, lambda before: before)
    return untouched._replace(init=init, broadcast=broadcast, announce=transform.announce)


def send_through(pipeline: UpdateTransform, client_update: ClientUpdate) -> ClientUpdate:
    """A client update whose updates go through the client half of a pipeline.

    What a client keeps is a pair: that of the client update, and that of the pipeline. So are the
    statistics that it sends.
    """

    def own(client: Client) -> Client:
        return client._replace(entry=client.entry[0])

    def init(shared: Any, client: Client) -> PyTree:
        return client_update.init(shared, own(client))

    def step(shared: Any, client: Client, state: PyTree, batch: Batch, key: jax.Array) -> PyTree:
        return client_update.step(shared, own(client), state, batch, key)

    def steps(
        shared: Any,
        client: Client,
        state: PyTree,
        batches: Batch,
        keys: jax.Array,
        taken: jax.Array,
    ) -> PyTree:
        assert client_update.steps is not None
        return client_update.steps(shared, own(client), state, batches, keys, taken)

    def final(shared: Any, client: Client, state: PyTree) -> ClientResult:
        result = client_update.final(shared, own(client), state)
        # What the client trained, and not what is left of it, is reported and checked.
        norm = result.norm
        if norm is None:
            norm = jnp.sqrt(squared_norm(jax.lax.stop_gradient(result.update)))
        kept, kept_by_pipeline = client.entry
        message = Message(result.update, result.weight, kept_by_pipeline)
        key = random.fold_in_pair(client.key, _KEY_PIPELINE, 0)
        sent = pipeline.client(key, shared.pipeline_state, message, own(client))
        _validate.instance("what the client half of the pipeline returned", sent, Message)
        return result._replace(
            update=sent.update,
            weight=sent.weight,
            norm=norm,
            metrics={**result.metrics, **sent.metrics},
            entry=(kept if result.entry is None else result.entry, sent.entry),
            statistics=(result.statistics, sent.statistics),
        )

    def measure(shared: Any, client: Client, state: PyTree, batch: Batch) -> dict[str, jax.Array]:
        assert client_update.measure is not None
        return client_update.measure(shared, own(client), state, batch)

    return ClientUpdate(
        init,
        step,
        final,
        measure=None if client_update.measure is None else measure,
        steps=None if client_update.steps is None else steps,
    )
