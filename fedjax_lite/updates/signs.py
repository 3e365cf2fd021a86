"""Updates of which little more than the signs is sent."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Client, Guarantees, Message, PyTree, Received, UpdateTransform
from fedjax_lite.updates.pipeline import encoded
from fedjax_lite.updates.vector import bounded, compressor, map_arrays
from fedjax_lite.xla import random
from fedjax_lite.xla.precision import reduced


def sign_sgd() -> UpdateTransform:
    r"""Clients send signs, and the server takes the sign that most of them have.

    $$\Delta_i \mapsto \mathrm{sign}(\Delta_i), \qquad
      \mathrm{aggregate} \mapsto \mathrm{sign}(\mathrm{aggregate}),$$

    the majority vote, where the aggregate is a mean; weighted, unless weights are uniform. Ties are
    0 on the server. Clients send 1 or -1 for a 0, at random and as likely, since one bit has no
    third value. The norm of what the server steps along is the root of the number of params, so
    that its learning rate should be small. Not unbiased.

    Clients report `bits_up`: 1 bit for each entry. NaN stays. `bits_down` is the size of the
    params: of the sign itself, with its zeros, $\log_2 3$ bits for each would do for clients that
    have the params of the last round.

    Source: Bernstein et al. (2019), "signSGD with Majority Vote is Communication Efficient and
    Fault Tolerant".

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])
    >>> algorithm = fl.fed_sgd(model, optax.sgd(0.1), weighting="uniform", pipeline=sign_sgd())
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [2.0]}, {"x": [9.0]}, {"x": [-99.0]}])
    >>> cohort = fl.cohort_of(dataset.resident(), [0, 1, 2])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.0)), cohort)
    >>> round(float(state.params), 4), info.clients["bits_up"].tolist()
    (0.1, [1.0, 1.0, 1.0])
    """

    def sign(key: jax.Array, x: jax.Array) -> tuple[jax.Array, int]:
        signs = jnp.where(x == 0, random.random_signs(key, x.shape), jnp.sign(x))
        return signs.astype(x.dtype), x.size

    def client(key: jax.Array, state: PyTree, message: Message, client: Client) -> Message:
        del state, client
        update, bits = map_arrays(sign, key, message.update)
        return encoded(message, update, bits)

    def server(
        key: jax.Array, state: PyTree, received: Received
    ) -> tuple[Received, PyTree, dict[str, jax.Array]]:
        del key
        majority = jax.tree.map(jnp.sign, received.aggregate)
        return received._replace(aggregate=majority, sensitivity=None), state, {}

    def guarantees(before: Guarantees, state: PyTree) -> Guarantees:
        del state
        return bounded("sign_sgd", before, shrinks=False)

    return UpdateTransform(lambda params: (), client, server, guarantees=guarantees)


def scaled_sign(*, per_array: bool = False) -> UpdateTransform:
    r"""The signs of an update, times the mean magnitude of its entries.

    $$x \mapsto \frac{\|x\|_1}{d} \, \mathrm{sign}(x),$$

    of all arrays as one vector of $d$ entries, zeros among them taken for positive. Not unbiased,
    but the error is $\|x\|^2 - \|x\|_1^2 / d \le (1 - 1 / d) \|x\|^2$, and no update becomes
    longer: a bound of its norm holds on. With `fl.error_feedback` it is EF-signSGD.

    Clients report `bits_up`: 1 bit for each entry, and 32 for the scale. A zero update stays as it
    is; one that holds NaN or an infinity becomes NaN, and its client is left out.

    Source: Karimireddy et al. (2019), "Error Feedback Fixes SignSGD and other Gradient Compression
    Schemes".

    Args:
      per_array: Whether each array has a scale of its own.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> message = fl.Message(jnp.array([3.0, -1.0, 2.0]), 1.0)
    >>> sent = scaled_sign().client(jax.random.key(0), (), message, None)
    >>> sent.update.tolist(), int(sent.metrics["bits_up"])
    ([2.0, -2.0, 2.0], 35)
    """

    def compress(key: jax.Array, x: jax.Array) -> tuple[jax.Array, int]:
        del key
        scale = reduced(jnp.abs(x), jnp.add) / x.size
        return jnp.where(x < 0, -scale, scale), x.size + 32

    return compressor("scaled_sign", compress, per_array=per_array, shrinks=True)


def terngrad(clip_factor: ArrayLike | None = None) -> UpdateTransform:
    r"""Each entry becomes 0 or plus or minus the largest magnitude of its array, at random.

    With $m = \max |x|$, an entry becomes $m \, \mathrm{sign}(x)$ with the probability $|x| / m$,
    and 0 else: unbiased, with a variance of $|x| (m - |x|)$. A factor $c$ first clips entries to
    $c$ standard deviations (about zero) of the array, which makes $m$ smaller, and the mean wrong.

    Clients report `bits_up`: $\lceil d \log_2 3 \rceil$ for the $d$ entries of an array, a number
    of $d$ digits to the base of 3, and 32 for $m$. A zero array stays as it is; one that holds NaN
    or an infinity becomes NaN, and its client is left out.

    Source: Wen et al. (2017), "TernGrad: Ternary Gradients to Reduce Communication in Distributed
    Deep Learning".

    Args:
      clip_factor: $c$, positive, may be traced; 2.5 in the paper. `None` clips nothing.

    Raises:
      ValueError: `clip_factor` is not positive.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> message = fl.Message(jnp.array([2.0, 0.0, -2.0]), 1.0)
    >>> sent = jax.jit(terngrad().client)(jax.random.key(0), (), message, None)
    >>> sent.update.tolist(), int(sent.metrics["bits_up"])
    ([2.0, 0.0, -2.0], 37)
    """
    if clip_factor is not None:
        clip_factor = _validate.number("clip_factor", clip_factor, positive=True)

    def compress(key: jax.Array, x: jax.Array) -> tuple[jax.Array, int]:
        if clip_factor is not None:
            # About zero, which a constant array is not clipped to.
            bound = clip_factor * jnp.sqrt(reduced(jnp.square(x), jnp.add) / x.size)
            x = jnp.clip(x, -bound, bound)
        magnitude = jnp.abs(x)
        largest = reduced(magnitude, jnp.maximum)
        kept = random.rounded(key, magnitude / jnp.where(largest > 0, largest, 1))
        return jnp.sign(x) * kept * largest, math.ceil(x.size * math.log2(3)) + 32

    return compressor("terngrad", compress, per_array=True)
