"""What a lossy transform loses, kept with the client and made up for."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
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
from fedjax_lite.updates.pipeline import announced, check_decodes, first_entry, sent_whole, unmasked
from fedjax_lite.xla import random
from fedjax_lite.xla.fusion import apart


def error_feedback(
    transform: UpdateTransform, *, decay: ArrayLike = 1.0, max_age: int | None = None
) -> UpdateTransform:
    r"""Adds to each update what a transform lost of the client's earlier ones.

    With $C$ the transform, and $e_i$ what client $i$ keeps, zero at first,

    $$\hat\Delta_i = C(\Delta_i + \beta e_i), \qquad
      e_i \leftarrow \Delta_i + \beta e_i - \hat\Delta_i.$$

    With $\beta = 1$, all that a client has sent is all that it should have, but for its $e_i$. A
    client that is left out, or takes no part, keeps its $e_i$, which is of params of long ago when
    it comes back. A smaller $\beta$ forgets a part of it, and `max_age` all of it once it is too
    old.

    It converges where $C$ is contractive: not with what is unbiased by being scaled up, such as
    `fl.random_k(0.1)`, but with `fl.random_k(0.1, unbiased=False)`. Bits are those of $C$.

    Sources: Seide et al. (2014), "1-Bit Stochastic Gradient Descent and its Application to
    Data-Parallel Distributed Training of Speech DNNs"; Karimireddy et al. (2019), "Error Feedback
    Fixes SignSGD and other Gradient Compression Schemes"; with partial participation, Li and Li
    (2023), "Analysis of Error Feedback in Federated Non-Convex Optimization with Biased
    Compression".

    Args:
      transform: What loses something, such as `fl.quantize_uniform(4)`; or a `fl.chain` of such.
      decay: $\beta$, from 0 to 1; may be traced.
      max_age: For how many rounds $e_i$ is of use: 1 is until the next round. Rounds that are
        skipped do not count. `None` is for ever.

    Returns:
      The `UpdateTransform`, which keeps an array for each of the params with each client.

    Raises:
      TypeError: `transform` is no transform.
      ValueError: `decay` or `max_age` is out of range; `transform` makes integers of updates.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> coarse = error_feedback(fl.quantize_uniform(2))
    >>> update = jnp.array([0.0, 0.5, 1.0])
    >>> message = fl.Message(update, 1.0, coarse.entry(update))
    >>> sent = jax.jit(coarse.client)(jax.random.key(0), coarse.init(update), message, None)
    >>> error, _ = sent.entry
    >>> (sent.update + error).tolist()  # What was rounded away is kept.
    [0.0, 0.5, 1.0]
    """
    _validate.instance("transform", transform, UpdateTransform, "fl.quantize_uniform(4)")
    check_decodes("error_feedback", transform)
    decay = _validate.number("decay", decay, maximum=1)

    def entry(params: PyTree) -> PyTree:
        return optax.tree.zeros_like(params), first_entry(transform, params)

    def client(key: jax.Array, state: PyTree, message: Message, client: Client) -> Message:
        error, own = message.entry
        word = _word(key)
        corrected = apart(
            lambda: jax.tree.map(
                lambda x, e: (x + decay * e).astype(x.dtype), message.update, error
            ),
            word,
        )
        whole = sent_whole(message, corrected)._replace(entry=own)
        sent = apart(lambda: transform.client(key, state, whole, client), word)
        lost = optax.tree.cast_like(optax.tree.sub(corrected, sent.update), error)
        return sent._replace(entry=(lost, sent.entry), metrics={**whole.metrics, **sent.metrics})

    def guarantees(before: Guarantees, state: PyTree) -> Guarantees:
        # What comes in is the update and all that was lost before: no bound holds any more.
        return transform.guarantees(before._replace(sensitivity=None), state)

    fed_back = transform._replace(client=client, entry=entry, guarantees=guarantees)
    if max_age is None:
        return fed_back
    return _forgetting(fed_back, _validate.integer("max_age", max_age, minimum=1))


def _forgetting(transform: UpdateTransform, max_age: int) -> UpdateTransform:
    """Feedback whose error, the first of its entry, is zero again once it is too old."""
    assert transform.entry is not None
    entry_of = transform.entry

    def init(params: PyTree) -> PyTree:
        return transform.init(params), jnp.int32(0)

    def entry(params: PyTree) -> PyTree:
        return entry_of(params), jnp.int32(0)

    def client(key: jax.Array, state: PyTree, message: Message, client: Client) -> Message:
        inner, round = state
        (error, own), since = message.entry
        error = jax.tree.map(lambda e: jnp.where(round - since > max_age, 0, e), error)
        sent = transform.client(key, inner, message._replace(entry=(error, own)), client)
        return sent._replace(entry=(sent.entry, round))

    def server(
        key: jax.Array, state: PyTree, received: Received
    ) -> tuple[Received, PyTree, dict[str, jax.Array]]:
        inner, round = state
        received, inner, info = transform.server(key, inner, received)
        return received, (inner, round + 1), info

    return _around(transform, init, entry, client, server)


def ef21(transform: UpdateTransform) -> UpdateTransform:
    r"""Clients send how their update differs from a running estimate that the server has, too.

    With $C$ the transform, $g_i$ the estimate of client $i$, zero at first, $N$ clients in the
    population, and those of a round in $S$,

    $$c_i = C(\Delta_i - g_i), \qquad g_i \leftarrow g_i + c_i, \qquad
      g \leftarrow g + \frac 1 N \sum_{i \in S} c_i,$$

    so that $g$ is the mean of all $g_i$, also of clients that take no part. The server steps along
    $g$. With contractive $C$ and updates that settle, estimates come to be right and what is sent
    vanishes; the first ones are compressed as all others, from zero.

    All weights become 1, as the mean asks for; the reducer must be the default one. A client that
    is left out keeps its $g_i$. Bits are those of $C$.

    Sources: Richtárik et al. (2021), "EF21: A New, Simpler, Theoretically Better, and Practically
    Faster Error Feedback"; Fatkhullin et al. (2021), "EF21 with Bells & Whistles: Practical
    Algorithmic Extensions of Modern Error Feedback", partial participation.

    Args:
      transform: What loses something, such as `fl.top_k(0.01)`.

    Returns:
      The `UpdateTransform`, which keeps an array for each of the params with each client.

    Raises:
      TypeError: `transform` is no transform.
      ValueError: `transform` makes integers of updates.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> largest = ef21(fl.top_k(1))
    >>> update = jnp.array([1.0, 2.0, 3.0])
    >>> entry, state = largest.entry(update), largest.init(update)
    >>> client = jax.jit(largest.client)
    >>> for round in range(3):
    ...     message = fl.Message(update, 1.0, entry)
    ...     entry = client(jax.random.key(round), state, message, None).entry
    >>> entry[0].tolist()  # One entry after the other.
    [1.0, 2.0, 3.0]
    """
    _validate.instance("transform", transform, UpdateTransform, "fl.top_k(0.01)")
    check_decodes("ef21", transform)

    def init(params: PyTree) -> PyTree:
        return transform.init(params), optax.tree.zeros_like(params)

    def entry(params: PyTree) -> PyTree:
        return optax.tree.zeros_like(params), first_entry(transform, params)

    def client(key: jax.Array, state: PyTree, message: Message, client: Client) -> Message:
        estimate, own = message.entry
        differing = optax.tree.cast_like(optax.tree.sub(message.update, estimate), message.update)
        weight = jnp.where(message.weight > 0, 1.0, message.weight)
        whole = sent_whole(message, differing)._replace(weight=weight, entry=own)
        sent = transform.client(key, state[0], whole, client)
        moved = optax.tree.cast_like(optax.tree.add(estimate, sent.update), estimate)
        return sent._replace(entry=(moved, sent.entry), metrics={**whole.metrics, **sent.metrics})

    def server(
        key: jax.Array, state: PyTree, received: Received
    ) -> tuple[Received, PyTree, dict[str, jax.Array]]:
        inner, mean = state
        received, inner, info = transform.server(key, inner, received)
        # Of the weights' sum that the reducer has divided by, to the size of the population.
        share = received.weights.sum() / received.cohort.num_clients
        mean = optax.tree.cast_like(optax.tree.add_scale(mean, share, received.aggregate), mean)
        return received._replace(aggregate=mean, sensitivity=None), (inner, mean), info

    def guarantees(before: Guarantees, state: PyTree) -> Guarantees:
        before = unmasked("ef21", before)._replace(sensitivity=None, max_weight=1.0)
        return transform.guarantees(before, None if state is None else state[0])

    return _around(transform, init, entry, client, server)._replace(guarantees=guarantees)


def _word(key: jax.Array) -> jax.Array:
    """What `apart` asks for."""
    return jax.random.key_data(random.fast(key))[0]


def _around(
    transform: UpdateTransform, init: Any, entry: Any, client: Any, server: Any
) -> UpdateTransform:
    """A transform whose state is a pair, the first of which is that of another one."""

    def announce(key: jax.Array, state: PyTree, cohort: Cohort) -> PyTree:
        return announced(transform, key, state[0], cohort), state[1]

    def broadcast(key: jax.Array, state: PyTree, params: PyTree) -> tuple[PyTree, Any]:
        assert transform.broadcast is not None
        return transform.broadcast(key, state[0], params)

    def guarantees(before: Guarantees, state: PyTree) -> Guarantees:
        return transform.guarantees(before, None if state is None else state[0])

    return UpdateTransform(
        init,
        client,
        server,
        entry,
        None if transform.broadcast is None else broadcast,
        guarantees,
        None if transform.announce is None else announce,
    )
