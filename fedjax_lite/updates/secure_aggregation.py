"""Secure aggregation: the server learns the sum of the updates, and nothing of a single one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import (
    Client,
    Cohort,
    Guarantees,
    Message,
    PyTree,
    Received,
    UpdateTransform,
)
from fedjax_lite.xla import random

_KEY_ORDER, _KEY_OWN, _KEY_PAIR = range(3)


class _Ring(NamedTuple):
    """The clients of a round in a random order, each of them once.

    Attributes:
      key: What all masks derive from.
      ids: `[clients]`, their ids; behind the last one, what does not count.
      slots: `[clients]`, how many slots of the cohort each of them fills.
      size: How many clients there are.
      degree: How many neighbours each of them has.
    """

    key: jax.Array
    ids: jax.Array
    slots: jax.Array
    size: jax.Array
    degree: jax.Array

    def neighbour(self, place: jax.Array, number: jax.Array) -> jax.Array:
        """The place of one of the neighbours, those behind the client first."""
        behind = (self.degree + 1) // 2
        offset = jnp.where(number < behind, number + 1, behind - number - 1)
        return (place + offset) % jnp.maximum(self.size, 1)


def secure_aggregation(
    num_neighbours: int | None = None,
    *,
    threshold: ArrayLike = 0.5,
    dropout_rate: ArrayLike = 0.0,
    modulus_bits: int = 32,
    masks: bool = False,
) -> UpdateTransform:
    r"""Hides updates in masks that only their sum takes off, also where clients drop out.

    After `fl.fixed_point`, and beside `fl.modular_sum`. With $G(s)$ the bits that a generator makes
    of a key $s$, client $i$ with the integers $q_i$ and the neighbours $N(i)$ sends

    $$y_i = q_i + G(b_i) + \sum_{j \in N(i), j > i} G(s_{ij}) - \sum_{j \in N(i), j < i} G(s_{ij})
      \bmod 2^b.$$

    Only then some clients drop out, and $\sum_{i \in A} y_i$ is the sum over those who arrive.
    Neighbours hold shares of each other's keys: of them the server reconstructs $b_i$ of clients
    that arrived, and $s_{ij}$ of those that did not, and takes off what has not cancelled. A key
    has $1 + |N(i)|$ shares, one with the client itself. Where a smaller part of them than
    `threshold` has arrived, and the key is needed, the sum stays hidden, and the round is skipped.

    Clients report `dropped_out`. The server reports `clients_missing`, how many clients of the
    cohort have not arrived, those without examples and those that are left out included, and
    `sum_lost`, 1 where too few shares have arrived.

    Without masks, the default, who drops out and which rounds are lost is the same, and so is the
    aggregate, to the bit. With them, a client generates $1 + |N(i)|$ times the bits of its update;
    the server as much for each client that arrives, and $|N(i)|$ times for each that does not. What
    of the protocol is simulated is said in the guide.

    Sources: Bonawitz et al. (2017), "Practical Secure Aggregation for Privacy-Preserving Machine
    Learning"; with `num_neighbours`, Bell et al. (2020), "Secure Single-Server Aggregation with
    (Poly)Logarithmic Overhead".

    Args:
      num_neighbours: $|N(i)|$, even: as many before a client as behind it, on a ring of a new order
        in each round; at most all others, as by default.
      threshold: The part of a key's shares that reconstructs it, at most 1; may be traced.
      dropout_rate: The probability of a client to drop out; may be traced.
      modulus_bits: $b$, that of `fl.fixed_point`.
      masks: Whether masks are generated, added and taken off.

    Raises:
      ValueError: An argument is out of range; updates are no integers modulo $2^b$.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> masked = fl.chain(fl.fixed_point(1.0, 1.0), secure_aggregation(masks=True))
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), pipeline=masked, reducer=fl.modular_sum())
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [0.25]}, {"x": [0.5]}])
    >>> both = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.0)), both)
    >>> round(float(state.params), 5)
    0.375
    """
    if num_neighbours is not None:
        num_neighbours = _validate.integer("num_neighbours", num_neighbours, minimum=2)
        if num_neighbours % 2:
            raise ValueError(
                f"num_neighbours is {num_neighbours}; choose an even number, half of them to"
                " either side."
            )
    threshold = _validate.number("threshold", threshold, maximum=1)
    dropout_rate = _validate.number("dropout_rate", dropout_rate, maximum=1)
    modulus_bits = _validate.integer("modulus_bits", modulus_bits, minimum=2, maximum=32)
    _validate.choice("masks", masks, (True, False))

    def ring_of(key: jax.Array, cohort: Cohort) -> tuple[_Ring, jax.Array]:
        """The ring, and the place of each slot of the cohort on it."""
        ids = jnp.sort(cohort.client_ids)
        # A client that fills several slots stands where the first of them does.
        firsts = jnp.searchsorted(ids, cohort.client_ids)
        slots = jnp.zeros_like(ids).at[firsts].add(cohort.client_ids >= 0)
        chance = jax.random.uniform(random.fold_in_pair(key, _KEY_ORDER, 0), ids.shape)
        order = jnp.argsort(jnp.where(slots > 0, chance, jnp.inf))
        size = (slots > 0).sum(dtype=jnp.int32)
        most = ids.size if num_neighbours is None else num_neighbours
        ring = _Ring(key, ids[order], slots[order], size, jnp.minimum(most, size - 1))
        return ring, jnp.argsort(order)[firsts]

    def announce(key: jax.Array, state: PyTree, cohort: Cohort) -> _Ring:
        del state
        return ring_of(key, cohort)[0]

    def client(key: jax.Array, state: _Ring, message: Message, client: Client) -> Message:
        update = _masked(message.update, state, client.id) if masks else message.update
        dropped_out = jax.random.bernoulli(key, dropout_rate)
        return message._replace(
            update=jax.tree.map(lambda x: x & jnp.uint32(2**modulus_bits - 1), update),
            weight=jnp.where(dropped_out, 0, message.weight),
            metrics={"dropped_out": dropped_out.astype(float)},
        )

    def server(
        key: jax.Array, state: PyTree, received: Received
    ) -> tuple[Received, PyTree, dict[str, jax.Array]]:
        ring, places = ring_of(key, received.cohort)
        arrived = jnp.zeros_like(ring.slots).at[places].add(received.weights != 0)
        if masks:
            aggregate = _unmasked(received.aggregate, ring, arrived)
            received = received._replace(aggregate=aggregate)
        lost = _is_lost(ring, arrived > 0, threshold)
        missing = (ring.slots - arrived).sum()
        info = {"clients_missing": missing, "sum_lost": lost.astype(float)}
        return received._replace(weights=jnp.where(lost, 0, received.weights)), state, info

    def guarantees(before: Guarantees, state: PyTree) -> Guarantees:
        del state
        if before.modulus_bits is None:
            raise ValueError(
                "secure_aggregation hides integers, and there are floats before it; put"
                " fl.fixed_point(max_value, max_weight) there."
            )
        if before.modulus_bits != modulus_bits:
            raise ValueError(
                f"modulus_bits is {modulus_bits} in secure_aggregation, and {before.modulus_bits}"
                " in fixed_point; give both the same."
            )
        return before._replace(is_masked=True)

    return UpdateTransform(lambda params: (), client, server, None, None, guarantees, announce)


def _is_lost(ring: _Ring, is_there: jax.Array, threshold: ArrayLike) -> jax.Array:
    """Whether a key cannot be reconstructed that is needed: one of a mask that is in the sum."""
    places = jnp.arange(ring.ids.size)

    def add(number: jax.Array, shares: jax.Array) -> jax.Array:
        return shares + is_there[ring.neighbour(places, number)]

    shares = jax.lax.fori_loop(0, ring.degree, add, is_there.astype(jnp.int32))
    too_few = shares / (ring.degree + 1) < threshold
    return ((ring.slots > 0) & (shares > 0) & too_few).any()


def _masked(update: PyTree, ring: _Ring, client_id: jax.Array) -> PyTree:
    """The update of a client with its own mask, and those of all of its pairs."""
    place = jnp.argmax(ring.ids == client_id)

    # The client's own mask comes first: a generator takes long to compile, and is there once.
    def add(number: jax.Array, update: PyTree) -> PyTree:
        is_own, other = number == 0, ring.neighbour(place, number - 1)
        # A pair is there for each slot that the other client fills.
        factor = jnp.sign(ring.ids[other] - client_id) * ring.slots[other]
        own = random.fold_in_pair(ring.key, _KEY_OWN, client_id)
        key = jnp.where(is_own, own, _pair_key(ring.key, client_id, ring.ids[other]))
        return _plus(update, jnp.where(is_own, 1, factor), key)

    return jax.lax.fori_loop(0, 1 + ring.degree, add, update)


def _unmasked(total: PyTree, ring: _Ring, arrived: jax.Array) -> PyTree:
    """The sum over clients without the masks that are left in it.

    Args:
      total: The sum over the slots that have arrived.
      ring: The clients.
      arrived: `[clients]`, how many slots of each of them have arrived.
    """
    missing = arrived < ring.slots
    # Those of whom something is missing come first.
    places = jnp.argsort(~missing)

    def take(number: jax.Array, total: PyTree) -> PyTree:
        is_own, pair = number < ring.size, number - ring.size
        place = jnp.where(is_own, number, places[pair // ring.degree])
        other = ring.neighbour(place, pair % ring.degree)
        own_id, other_id = ring.ids[place], ring.ids[other]
        left = arrived[place] * ring.slots[other] - arrived[other] * ring.slots[place]
        # Of two that are missing, one takes the masks of the pair.
        factor = jnp.where(missing[other] & (other_id < own_id), 0, left)
        factor = jnp.where(is_own, -arrived[place], factor * jnp.sign(own_id - other_id))
        own = random.fold_in_pair(ring.key, _KEY_OWN, own_id)
        return _plus(total, factor, jnp.where(is_own, own, _pair_key(ring.key, own_id, other_id)))

    # One loop for all, own masks first: XLA:CPU may lose a copy of what nested ones carry, with
    # the flags of `configure_cpu`, and a generator takes long to compile.
    total = jax.tree.map(lambda x: x.astype(jnp.uint32), total)
    return jax.lax.fori_loop(0, ring.size + missing.sum() * ring.degree, take, total)


def _pair_key(key: jax.Array, one_id: jax.Array, other_id: jax.Array) -> jax.Array:
    """The key that two clients share."""
    ids = jnp.minimum(one_id, other_id), jnp.maximum(one_id, other_id)
    return random.fold_in_pair(random.fold_in_pair(key, _KEY_PAIR, ids[0]), 0, ids[1])


def _plus(update: PyTree, factor: ArrayLike, key: jax.Array) -> PyTree:
    """The update plus so many times the mask that a key generates, modulo 2^32."""
    factor = jnp.asarray(factor, jnp.int32).astype(jnp.uint32)
    leaves, structure = jax.tree.flatten(update)
    keys = random.fold_in_pair(key, jnp.arange(len(leaves)), 0)
    masks = [jax.random.bits(own, x.shape, jnp.uint32) for own, x in zip(keys, leaves, strict=True)]
    added = [x + factor * mask for x, mask in zip(leaves, masks, strict=True)]
    return jax.tree.unflatten(structure, added)
