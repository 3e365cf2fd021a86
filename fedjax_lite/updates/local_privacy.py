"""Noise that clients add themselves, before anyone sees their updates."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Guarantees, Message, PyTree, UpdateTransform
from fedjax_lite.updates.clipping import norm_of, scale_down
from fedjax_lite.updates.pipeline import sent_whole, stateless, unmasked
from fedjax_lite.xla import random
from fedjax_lite.xla.precision import widen


def local_gaussian_noise(max_norm: ArrayLike, noise_multiplier: ArrayLike) -> UpdateTransform:
    r"""Scales an update down to an L2 norm of $C$, and adds normal noise of $z C$ on the client.

    $$\Delta \mapsto \Delta \min(1, C / \|\Delta\|_2) + \mathcal{N}(0, z^2 C^2 I)$$

    The server sees a Gaussian mechanism of multiplier $z$ of each client that takes part, by
    whether its update is in place of zero, and of $z / 2$ by which one of two updates it sends. The
    weight is sent in the clear: make it the same for all, by `weighting="uniform"`.

    Clients report `clipped`, as for `fl.clip_by_norm`. Nothing bounds the noisy update: it is what
    is sent, and no `fl.gaussian_noise` comes after it.

    Source: Bhowmick et al. (2018), "Protection Against Reconstruction and Its Applications in
    Private Federated Learning", of the setting.

    Args:
      max_norm: The bound $C$, positive; may be traced, and is then not checked.
      noise_multiplier: $z$, not negative; may be traced, and is then not checked.

    Raises:
      ValueError: A number is out of range.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> noise = local_gaussian_noise(1.0, noise_multiplier=0.5)
    >>> message = fl.Message(jnp.full(10_000, 5.0), 1.0)
    >>> sent = jax.jit(noise.client)(jax.random.key(0), (), message, None).update
    >>> round(float(sent.std()), 1)
    0.5
    """
    max_norm = _validate.number("max_norm", max_norm, positive=True)
    multiplier = _validate.number("noise_multiplier", noise_multiplier)

    def client(key: jax.Array, message: Message) -> Message:
        norm = norm_of(message.update)
        scaled = scale_down(message.update, norm, max_norm)
        noise = random.normal_like(key, widen(scaled))
        clipped = norm.exceeds(max_norm).astype(float)
        return _with_noise(message, scaled, multiplier * max_norm, noise, clipped)

    return stateless(client, _unbounded("local_gaussian_noise"))


def local_laplace_noise(max_norm: ArrayLike, epsilon: ArrayLike) -> UpdateTransform:
    r"""Scales an update down to an L1 norm of $C$, and adds Laplace noise on the client.

    $$\Delta \mapsto \Delta \min(1, C / \|\Delta\|_1) + \mathrm{Lap}(2 C / \epsilon)^d$$

    What a client sends in a round is $\epsilon$-differentially private by which one of any two
    updates it has, which are $2 C$ apart at most. The weight is sent in the clear: make it the same
    for all, by `weighting="uniform"`.

    Clients report `clipped`, 1 if theirs was scaled down. One that holds NaN or an infinity is not
    made a number, and its client is left out.

    Source: Dwork et al. (2006), "Calibrating Noise to Sensitivity in Private Data Analysis".

    Args:
      max_norm: The bound $C$, positive; may be traced, and is then not checked.
      epsilon: $\epsilon$ of a round, positive; may be traced, and is then not checked.

    Raises:
      ValueError: A number is not positive.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> noise = local_laplace_noise(0.5, epsilon=2.0)
    >>> message = fl.Message(jnp.zeros(10_000), 1.0)
    >>> sent = jax.jit(noise.client)(jax.random.key(0), (), message, None).update
    >>> round(float(jnp.abs(sent).mean()), 1)  # Of scale 2 * 0.5 / 2.
    0.5
    """
    max_norm = _validate.number("max_norm", max_norm, positive=True)
    scale = 2 * max_norm / _validate.number("epsilon", epsilon, positive=True)

    def client(key: jax.Array, message: Message) -> Message:
        update = widen(message.update)
        # Each share, and not the sum of what may be too large for it.
        largest = jnp.stack([jnp.abs(x).max(initial=0.0) for x in jax.tree.leaves(update)]).max()
        unit = jnp.where(largest > 0, largest, 1)
        norm = jnp.asarray(sum(jnp.abs(x / unit).sum() for x in jax.tree.leaves(update)))
        clipped = norm > max_norm / unit
        factor = jnp.where(clipped, max_norm / norm, unit)
        scaled = jax.tree.map(lambda x: jnp.where(clipped, factor * (x / unit), x), update)
        noise = optax.tree.random_like(key, scaled, jax.random.laplace)
        return _with_noise(message, scaled, scale, noise, clipped.astype(float))

    return stateless(client, _unbounded("local_laplace_noise"))


def _with_noise(
    message: Message, update: PyTree, scale: ArrayLike, noise: PyTree, clipped: jax.Array
) -> Message:
    noisy = optax.tree.add_scale(update, scale, noise)
    noisy = optax.tree.cast_like(noisy, message.update)
    return sent_whole(message, noisy, clipped=clipped)


def _unbounded(name: str) -> Callable[[Guarantees], Guarantees]:
    return lambda before: unmasked(name, before)._replace(sensitivity=None)
