"""Noise on the aggregate, in proportion to what one client can change."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Guarantees, Message, PyTree, Received, UpdateTransform
from fedjax_lite.xla import random
from fedjax_lite.xla.precision import squared_norm, widen

Draw = Callable[[jax.Array, PyTree, PyTree], tuple[PyTree, PyTree]]


def gaussian_noise(noise_multiplier: ArrayLike, *, noise_scale: ArrayLike = 1.0) -> UpdateTransform:
    r"""Adds normal noise of $z$ times what one client can change to the aggregate.

    With $\Delta$ the L2 sensitivity of the aggregate (of a sum of updates clipped to $C$ with
    weights of at most $p$, this is $p C$; of a mean with the denominator $D$, $p C / D$),

    $$\bar\Delta \mapsto \bar\Delta + \mathcal{N}(0, z^2 \Delta^2 I).$$

    With these three, and clients drawn with probability $q$ from $N$, FedAvg is DP-FedAvg, which
    protects whether a client took part:

        pipeline = fl.chain(fl.cap_weight(1.0), fl.clip_by_norm(1.0), fl.gaussian_noise(1.0))
        reducer = fl.weighted_mean(denominator=q * N)

    $z$ is that of the whole round. Where clients are counted with noise beside, as by
    `fl.adaptive_clip`, the aggregate has as much more as makes up for it:
    $(z^{-2} - \sum_j z_j^{-2})^{-1/2}$ in place of $z$, with $z_j$ the multipliers of the others.

    The noise of each array and each round is drawn anyhow anew, in float32 at least. It is that of
    a simulation, with JAX's generator and numbers of finite precision: not for releasing data of
    real people (Mironov, 2012, "On Significance of the Least Significant Bits for Differential
    Privacy"). A round reports `noise_std`, the standard deviation of each entry, and
    `signal_to_noise`, $\|\bar\Delta\| / (z \Delta \sqrt d)$ before the noise; like all that is
    reported, that is for the researcher and not private.

    Sources: McMahan et al. (2018), "Learning Differentially Private Recurrent Language Models";
    for `noise_scale`, Granqvist et al. (2024), "pfl-research: simulation framework for accelerating
    research in Private Federated Learning".

    Args:
      noise_multiplier: $z$, not negative; may be traced.
      noise_scale: A factor on the noise alone: with cohorts of $m$ clients, $m / M$ is the
        signal-to-noise ratio of cohorts of $M$. This simulates a larger cohort, for which $z$ is
        then to be accounted; the run itself has no such privacy. May be traced.

    Raises:
      ValueError: `noise_multiplier` or `noise_scale` is negative; in a chain, nothing before it
        bounds the updates, or clients are counted with too little noise, or none. Where the numbers
        are traced, the noise of the latter is NaN.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w @ batch["x"].T)
    >>> algorithm = fl.fed_avg(
    ...     model,
    ...     optax.sgd(1.0),
    ...     pipeline=fl.chain(fl.cap_weight(1.0), fl.clip_by_norm(2.0), gaussian_noise(0.5)),
    ...     reducer=fl.weighted_mean(denominator=4.0),
    ... )
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [[3.0, 4.0]]}])
    >>> cohort = fl.cohort_of(dataset.resident(), [0])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.zeros(2)), cohort)
    >>> float(info.metrics["noise_std"]), round(float(info.metrics["signal_to_noise"]), 4)
    (0.25, 1.4142)
    """

    def draw(key: jax.Array, state: PyTree, like: PyTree) -> tuple[PyTree, PyTree]:
        return random.normal_like(key, like), state

    return additive_noise(
        *("gaussian_noise", noise_multiplier, noise_scale, lambda params: (), draw),
        min_separation=1,
    )


def additive_noise(
    name: str,
    noise_multiplier: ArrayLike,
    noise_scale: ArrayLike,
    init: Callable[[PyTree], PyTree],
    draw: Draw,
    *,
    min_separation: int,
) -> UpdateTransform:
    """A transform that adds noise to the aggregate.

    Args:
      name: What it is called.
      noise_multiplier: As in `gaussian_noise`.
      noise_scale: As in `gaussian_noise`.
      init: `init(params) -> state`.
      draw: `draw(key, state, like) -> (noise, state)`, noise in the form of the aggregate such that
        times $z$ it protects an aggregate of sensitivity 1.
      min_separation: Of rounds so far apart, each is covered as if its noise were independent.
    """
    multiplier = _validate.number("noise_multiplier", noise_multiplier)
    scale = _validate.number("noise_scale", noise_scale)

    def client(key: jax.Array, state: PyTree, message: Message, client: object) -> Message:
        del key, state, client
        return message

    def server(
        key: jax.Array, state: PyTree, received: Received
    ) -> tuple[Received, PyTree, dict[str, jax.Array]]:
        left = jnp.sqrt(1 - received.released * jnp.square(multiplier))
        std = scale * multiplier / left * received.sensitivity
        signal = widen(received.aggregate)
        noise, state = draw(key, state, signal)
        noise_norm = std * np.sqrt(sum(x.size for x in jax.tree.leaves(signal)))
        info = {
            "noise_std": std,
            "signal_to_noise": jnp.sqrt(squared_norm(signal)) / noise_norm,
        }
        noisy = jax.tree.map(lambda x, n: x + std.astype(n.real.dtype) * n, signal, noise)
        return received._replace(aggregate=noisy), state, info

    def guarantees(before: Guarantees, state: PyTree) -> Guarantees:
        del state
        if before.is_private:
            raise ValueError(f"{name} comes after other noise; leave one of the two.")
        if before.sensitivity is None:
            raise ValueError(
                f"{name} comes before a bound of what one client can change; put it after"
                " fl.clip_by_norm(1.0), the last that changes an update."
            )
        if _is_known(before.released) and np.isinf(before.released):
            raise ValueError(
                f"{name} comes after a count of clients in the clear, such as that of"
                " fl.adaptive_clip; give that count_noise=, such as a twentieth of the number of"
                " clients, or take fl.clip_by_norm(1.0)."
            )
        if _is_known(before.released, multiplier) and float(before.released) > 0:
            most = float(before.released) ** -0.5
            if float(multiplier) >= most:
                raise ValueError(
                    f"noise_multiplier is {multiplier}, and the counts of clients before {name}"
                    f" have no more noise: choose one below {most:g}, or a larger count_noise."
                )
        is_stated = _is_known(scale) and float(scale) == 1
        return before._replace(
            is_private=True,
            noise_multiplier=multiplier if is_stated else None,
            min_separation=min_separation,
        )

    return UpdateTransform(init, client, server, guarantees=guarantees)


def _is_known(*numbers: Any) -> bool:
    return not any(isinstance(number, jax.core.Tracer) for number in numbers)
