"""Noise of whole numbers, of which each client adds its part before anyone sees its update."""

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
from fedjax_lite.updates.clipping import clip_by_norm
from fedjax_lite.updates.fixed_point import to_ring
from fedjax_lite.updates.pipeline import announced, chain
from fedjax_lite.xla import random

_KEY_NOISE, _KEY_TRANSFORMS = range(2)
Draws = tuple[jax.Array, jax.Array, jax.Array]


def discrete_gaussian_noise(
    max_norm: ArrayLike,
    noise_multiplier: ArrayLike,
    num_clients: ArrayLike,
    transform: UpdateTransform,
) -> UpdateTransform:
    r"""Has each client add discrete normal noise to its integers, which sums up to that of a round.

    Clients scale their updates down to an L2 norm of $C$, as `fl.clip_by_norm(max_norm)` does, and
    the transform makes integers of them, of norm $\Delta$ at most. With $n$ the number of clients
    that are expected, each then adds to each integer

    $$\mathcal{N}_\mathbb{Z}(0, \sigma^2), \quad \sigma = z \Delta / \sqrt n, \qquad
      P(k) \propto e^{-k^2 / 2 \sigma^2}.$$

    Under masks the server sees the sum alone, whose noise has the deviation $z \Delta$. With
    $\tau = 10 \sum_{k=1}^{n-1} e^{-2 \pi^2 \sigma^2 k / (k + 1)}$ and $d$ integers, a round
    is $\frac{1}{2} \epsilon^2$-concentrated differentially private, by whether a client takes part,
    with $\epsilon = \min(\sqrt{1 / z^2 + 2 \tau d}, 1 / z + \tau \sqrt d)$: for $\sigma$ of 2 or
    more, that of a Gaussian mechanism of multiplier $z$. Of clients that drop out, the noise is
    missing.

    The server reports `noise_multiplier`, $z$ times the root of how many have arrived over $n$;
    `noise_std`, the deviation of each entry of the aggregate; and `modulus_margin`, by how many
    deviations of the noise the largest sum stays away from where it would wrap around, of which 6
    suffice. Samples are exact but for the precision of floats, and drawn with JAX's generators: a
    simulation, not for releasing data of real people.

    Sources: Kairouz, Liu and Steinke (2021), "The Distributed Discrete Gaussian Mechanism for
    Federated Learning with Secure Aggregation"; Canonne, Kamath and Steinke (2020), "The
    Discrete Gaussian for Differential Privacy".

    Args:
      max_norm: $C$, positive; may be traced.
      noise_multiplier: $z$, not negative; may be traced.
      num_clients: $n$, positive; may be traced. Where more arrive, the noise is larger.
      transform: What makes integers: `fl.fixed_point` with a denominator, or that inside of
        `fl.common_rotation`.

    Raises:
      ValueError: A number is out of range; the transform makes no integers, or has no denominator.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> noise = discrete_gaussian_noise(2.0, 0.5, 2, fl.fixed_point(2.0, 1.0, denominator=2.0))
    >>> model = fl.function_model(lambda w, batch: -w @ batch["x"].T)
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), pipeline=noise, reducer=fl.modular_sum())
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [[3.0, 4.0]]}, {"x": [[3.0, 4.0]]}])
    >>> both = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.zeros(2)), both)
    >>> float(info.metrics["noise_multiplier"]), round(float(info.metrics["noise_std"]), 4)
    (0.5, 0.5)
    """
    multiplier = _validate.number("noise_multiplier", noise_multiplier)
    num_clients = _validate.number("num_clients", num_clients, positive=True)
    _validate.instance("transform", transform, UpdateTransform, "fl.fixed_point(0.1, 1.0)")
    inner = chain(clip_by_norm(max_norm), transform)
    known = inner.guarantees(Guarantees(), None)
    if known.modulus_bits is None or known.sensitivity is None:
        failing = "has no denominator" if known.modulus_bits else "makes no integers"
        raise ValueError(
            f"transform {failing}; pass fl.fixed_point(max_value, max_weight, denominator=100),"
            " with the expected sum of weights."
        )
    modulus_bits: int = known.modulus_bits

    def sensitivity_of(state: PyTree) -> jax.Array:
        return jnp.asarray(inner.guarantees(Guarantees(), state).sensitivity, float)

    def announce(key: jax.Array, state: PyTree, cohort: Cohort) -> PyTree:
        key_inner = random.fold_in_pair(key, _KEY_TRANSFORMS, 0)
        std = multiplier * sensitivity_of(state) / jnp.sqrt(num_clients)
        return announced(inner, key_inner, state, cohort), jax.lax.stop_gradient(std)

    def client(key: jax.Array, state: PyTree, message: Message, client: Client) -> Message:
        state, std = state
        sent = inner.client(random.fold_in_pair(key, _KEY_TRANSFORMS, 0), state, message, client)
        leaves, structure = jax.tree.flatten(sent.update)
        keys = random.fold_in_pair(key, _KEY_NOISE, jnp.arange(len(leaves)))
        noisy = [
            to_ring(x.astype(jnp.int32) + discrete_gaussian(own, x.shape, std), modulus_bits)
            for own, x in zip(keys, leaves, strict=True)
        ]
        return sent._replace(update=jax.tree.unflatten(structure, noisy))

    def server(
        key: jax.Array, state: PyTree, received: Received
    ) -> tuple[Received, PyTree, dict[str, jax.Array]]:
        arrived = (received.weights != 0).sum()
        reached = multiplier * jnp.sqrt(arrived / num_clients)
        in_integers = sensitivity_of(state)
        key_inner = random.fold_in_pair(key, _KEY_TRANSFORMS, 0)
        received, state, info = inner.server(key_inner, state, received)
        room = 2.0 ** (modulus_bits - 1) - arrived * in_integers
        return (
            received,
            state,
            {
                **info,
                "noise_multiplier": reached,
                "noise_std": reached * received.sensitivity,
                "modulus_margin": room / (reached * in_integers),
            },
        )

    def guarantees(before: Guarantees, state: PyTree) -> Guarantees:
        return inner.guarantees(before, state)._replace(is_private=True)

    return inner._replace(client=client, server=server, guarantees=guarantees, announce=announce)


def discrete_gaussian(key: jax.Array, shape: tuple[int, ...], std: ArrayLike) -> jax.Array:
    r"""Whole numbers $k$ of probability $\propto e^{-k^2 / 2 \sigma^2}$.

    A normal number $x$ of deviation $s = \max(\sigma, 1)$ is rounded to $k$, and taken with the
    probability
    $e^{k^2 (s^{-2} - \sigma^{-2}) / 2} \, e^{((x - k)^2 - 1/4) / 2 s^2} \, a / \sinh a$ with
    $a = k / 2 s^2$; else another one is drawn. But for a constant, this times the density of $x$ is
    $e^{-k^2 / 2 \sigma^2} e^{-k (x - k) / s^2} a / \sinh a$, whose integral over all $x$ that are
    rounded to $k$ is the first factor. From $\sigma = 2$ on, more than 95 of 100 are taken.

    Args:
      key: Typed key.
      shape: The shape.
      std: $\sigma$, scalar; where it is 0 or not finite, all are 0.

    Returns:
      int32 array.

    >>> import jax
    >>> draws = discrete_gaussian(jax.random.key(0), (10_000,), 4.0)
    >>> round(float(draws.std()), 1)
    4.0
    """
    variance = jnp.square(jnp.asarray(std, jnp.float32))
    wide = jnp.maximum(variance, 1)

    def draw(carry: Draws) -> Draws:
        number, drawn, is_drawn = carry
        key_normal, key_taken = random.fold_in_pair(key, jnp.arange(2), number)
        x = jnp.sqrt(wide) * jax.random.normal(key_normal, shape, jnp.float32)
        new = jnp.round(x)
        a = new / (2 * wide)
        ratio = jnp.where(new == 0, 1, a / jnp.sinh(jnp.where(new == 0, 1, a)))
        exponent = jnp.square(new) * (1 / wide - 1 / variance)
        exponent += (jnp.square(x - new) - 0.25) / wide
        is_taken = random.hashed_uniform(key_taken, shape) < ratio * jnp.exp(exponent / 2)
        return number + 1, jnp.where(is_drawn, drawn, new), is_drawn | is_taken

    # Of what is no deviation, no draw would ever be taken.
    is_drawn = jnp.broadcast_to(~((variance > 0) & jnp.isfinite(variance)), shape)
    start = jnp.int32(0), jnp.zeros(shape, jnp.float32), is_drawn
    _, drawn, _ = jax.lax.while_loop(lambda carry: ~carry[2].all(), draw, start)
    return drawn.astype(jnp.int32)
