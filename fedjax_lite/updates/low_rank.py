"""Matrices of an update as products of thin ones."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.base import Client, Guarantees, Message, PyTree, Received, UpdateTransform
from fedjax_lite.updates.pipeline import encoded, num_bits
from fedjax_lite.updates.vector import bounded, encoder, unit_of
from fedjax_lite.xla.precision import reduced, widen


def low_rank(rank: int = 2) -> UpdateTransform:
    r"""Projects each matrix of an update to few directions, by one power iteration of each client.

    An array of two axes or more is a matrix $M$ of $m$ rows and $n$ columns, its last axis. With a
    random $Q$ of $r$ columns, and $P$ an orthonormal basis of $M Q$,

    $$M \mapsto P P^\top M,$$

    whose error is at most $\|M\|^2$, and 0 where $M$ is of rank $r$. Not unbiased, and no update
    becomes longer: a bound of its norm holds on. Vectors are sent whole, and so are matrices for
    which the factors are no smaller.

    This is PowerSGD's approximation of each client's own matrix. See `power_sgd` for the form whose
    mean over clients is that of the mean.

    Clients report `bits_up`: 32 for each of the $r (m + n)$ entries of $P$ and $P^\top M$, and of
    those of what is sent whole. $Q$ derives from a key that both sides know. A matrix that holds
    NaN or an infinity becomes NaN, and its client is left out.

    Source: Vogels et al. (2019), "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
    Optimization".

    Args:
      rank: $r$.

    Raises:
      ValueError: `rank` is not positive.
      TypeError: `rank` is no integer.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> message = fl.Message(jnp.outer(jnp.arange(6.0), jnp.ones(4)), 1.0)
    >>> sent = jax.jit(low_rank(1).client)(jax.random.key(0), (), message, None)
    >>> bool(jnp.allclose(sent.update, message.update)), int(sent.metrics["bits_up"])
    (True, 320)
    """
    rank = _validate.integer("rank", rank, minimum=1)

    def encode(key: jax.Array, x: jax.Array) -> tuple[jax.Array, float]:
        if not _is_large(x, rank):
            return x, num_bits(x)
        matrix, unit = _matrix(x)
        left = _basis(_product(matrix, jax.random.normal(key, (matrix.shape[1], rank))))
        projected = _product(left, _product(left.T, matrix))
        return _like(unit * projected, x), 32 * rank * sum(matrix.shape)

    return encoder("low_rank", encode, per_array=True, shrinks=True)


def power_sgd(rank: int = 2) -> UpdateTransform:
    r"""Projects each matrix of an update to directions that follow the mean of all clients.

    An array of two axes or more is a matrix $M_i$ of client $i$, of $m$ rows and $n$ columns, its
    last axis. Server and clients share an orthonormal basis of $r$ directions, of the columns and
    of the rows in turn, and a round is half of a power iteration:

    $$\hat M_i = M_i Q Q^\top, \; P = \mathrm{basis}(\hat M Q); \qquad
      \hat M_i = P P^\top M_i, \; Q = \mathrm{basis}(\hat M^\top P),$$

    with $\hat M$ the aggregate. Clients send $M_i Q$, or $P^\top M_i$, which is linear: the mean of
    what is decoded is what is decoded of the mean. Not unbiased, and no update becomes longer: a
    bound of its norm holds on. `fl.error_feedback(fl.power_sgd(2))` makes up for what is lost.
    Vectors are sent whole, and so are matrices for which the factors are no smaller.

    The algorithm of the paper has both halves in each step: $P$ is made of the mean of $M_i Q$,
    and then $Q$ of the mean of $M_i^\top P$. This takes two exchanges with the same clients, and a
    round has one; hence the turns, as in the authors' own package `powersgd`.

    Clients report `bits_up`: 32 for each of $r m$ entries, or $r n$, in turn, and of those of what
    is sent whole. `bits_down` has 32 more for each entry of the shared bases. A matrix that holds
    NaN or an infinity becomes NaN, and its client is left out.

    Source: Vogels et al. (2019), "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
    Optimization".

    Args:
      rank: $r$.

    Raises:
      ValueError: `rank` is not positive.
      TypeError: `rank` is no integer.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> halve = power_sgd(1)
    >>> message = fl.Message(jnp.ones((6, 4)), 1.0)
    >>> key, state = jax.random.key(0), halve.init(message.update)
    >>> for round in range(2):
    ...     sent = halve.client(key, state, message, None)
    ...     _, state, _ = halve.server(key, state, fl.Received(sent.update))
    >>> bool(jnp.allclose(sent.update, message.update)), int(sent.metrics["bits_up"])
    (True, 128)
    """
    rank = _validate.integer("rank", rank, minimum=1)

    def init(params: PyTree) -> PyTree:
        """The bases `[n, rank]` and `[m, rank]` of each large array, and which one's turn it is."""

        def bases(x: jax.Array) -> tuple[jax.Array, ...]:
            if not _is_large(x, rank):
                return ()
            m, n = x.size // x.shape[-1], x.shape[-1]
            # The same in all runs: a start like any other, which is forgotten.
            return _basis(jax.random.normal(jax.random.key(n), (n, rank))), jnp.zeros((m, rank))

        return [bases(x) for x in jax.tree.leaves(params)], jnp.bool_(False)

    def project(x: jax.Array, bases: tuple[jax.Array, ...], left: jax.Array) -> jax.Array:
        if not bases:
            return x
        matrix, unit = _matrix(x)
        projected = jax.lax.cond(
            left,
            lambda: _product(bases[1], _product(bases[1].T, matrix)),
            lambda: _product(_product(matrix, bases[0]), bases[0].T),
        )
        return _like(unit * projected, x)

    def turn(x: jax.Array, bases: tuple[jax.Array, ...], left: jax.Array) -> tuple[jax.Array, ...]:
        if not bases:
            return ()
        matrix, _ = _matrix(x)
        right_basis, left_basis = bases
        return jax.lax.cond(
            left,
            lambda: (_basis(_product(matrix.T, left_basis)), left_basis),
            lambda: (right_basis, _basis(_product(matrix, right_basis))),
        )

    def sizes(state: PyTree) -> tuple[Any, Any]:
        """How many entries of the bases are shared, and of matrices are sent, in this turn."""
        all_bases, left = state
        rows = sum(bases[1].size for bases in all_bases if bases)
        columns = sum(bases[0].size for bases in all_bases if bases)
        return jnp.where(left, rows, columns), jnp.where(left, columns, rows)

    def client(key: jax.Array, state: PyTree, message: Message, client: Client) -> Message:
        del key, client
        leaves, structure = jax.tree.flatten(message.update)
        all_bases, left = state
        projected = [project(x, own, left) for x, own in zip(leaves, all_bases, strict=True)]
        whole = [x for x, own in zip(leaves, all_bases, strict=True) if not own]
        bits = 32.0 * sizes(state)[1] + num_bits(whole)
        return encoded(message, jax.tree.unflatten(structure, projected), bits)

    def server(
        key: jax.Array, state: PyTree, received: Received
    ) -> tuple[Received, PyTree, dict[str, jax.Array]]:
        del key
        all_bases, left = state
        leaves = jax.tree.leaves(received.aggregate)
        turned = [turn(x, own, left) for x, own in zip(leaves, all_bases, strict=True)]
        return received, (turned, ~left), {}

    def broadcast(key: jax.Array, state: PyTree, params: PyTree) -> tuple[PyTree, Any]:
        del key
        return params, num_bits(params) + 32.0 * sizes(state)[0]

    def guarantees(before: Guarantees, state: PyTree) -> Guarantees:
        del state
        return bounded("power_sgd", before, shrinks=True)

    return UpdateTransform(init, client, server, broadcast=broadcast, guarantees=guarantees)


def _is_large(x: jax.Array, rank: int) -> bool:
    """Whether an array is a matrix that has more entries than its factors."""
    if x.ndim < 2 or not x.size:
        return False
    return rank * (x.size // x.shape[-1] + x.shape[-1]) < x.size


def _matrix(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The matrix in units of the second, a power of two."""
    matrix = widen(x).reshape(-1, x.shape[-1])
    unit = unit_of(reduced(jnp.abs(matrix), jnp.maximum))
    return matrix / unit, unit


def _like(matrix: jax.Array, x: jax.Array) -> jax.Array:
    return matrix.reshape(x.shape).astype(x.dtype)


def _basis(matrix: jax.Array) -> jax.Array:
    """Orthonormal columns that span those of the matrix, whatever its rank."""
    return jnp.linalg.qr(matrix)[0]


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # At less than full precision, what is decoded could be longer than what was sent.
    return jnp.matmul(a, b, precision="highest")
