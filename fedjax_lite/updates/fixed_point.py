"""Updates as integers of so many bits, which add up without loss and can be masked."""

from typing import Any

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
    Reducer,
    UpdateTransform,
)
from fedjax_lite.updates.pipeline import unmasked
from fedjax_lite.xla import random
from fedjax_lite.xla.precision import squared_norm, widen


def fixed_point(
    max_value: ArrayLike,
    max_weight: ArrayLike,
    *,
    num_bits: int = 20,
    modulus_bits: int = 32,
    rounding: str = "stochastic",
    denominator: ArrayLike | None = None,
) -> UpdateTransform:
    r"""Updates, times weights, as integers modulo $2^b$, for `modular_sum` to add up.

    With $C$ the largest value, $W$ the largest weight and $L = 2^{v-1} - 1$ for numbers of $v$
    bits, client $i$ with the update $x_i$ and the weight $p_i$ sends

    $$u_i = \mathrm{round}(L \min(p_i / W, 1)), \qquad
      q_i = \mathrm{round}\left(\frac{u_i}{C} \min(\max(x_i, -C), C)\right) \bmod 2^b.$$

    The server reads the sums as signed numbers and takes $C \sum_i q_i / \sum_i u_i$: the mean,
    with weights in steps of $W / L$. With a denominator $D$ it takes $\frac{C W}{L D} \sum_i q_i$,
    as `fl.weighted_mean(denominator)` does, and clients send no $u_i$.

    No sum wraps around: a cohort of $n$ slots needs $n L < 2^{b-1}$, which is checked before its
    round is compiled. Rounding to the nearest moves an element of $\sum_i q_i$ by at most $n / 2$;
    stochastic rounding, up with the probability of the digits that are cut off, by less than $n$,
    and by nothing on average.

    Clients report `bits_up`, $b$ for each integer, and as `elements_above` and `elements_below` how
    many of theirs lie above $C$ and below $-C$. A client whose $u_i$ is 0 is left out, and so is
    one whose update is not finite; if it is kept, NaN counts as 0.

    Source: Bonawitz et al. (2019), "Federated Learning with Autotuned Communication-Efficient
    Secure Aggregation".

    Args:
      max_value: $C$, positive; may be traced. What lies beyond it is clipped.
      max_weight: $W$, positive; may be traced. Larger weights are lowered to it.
      num_bits: $v$, from 2 to 24.
      modulus_bits: $b$, from 2 to 32.
      rounding: `"stochastic"` or `"nearest"`, of updates; weights are rounded to the nearest.
      denominator: $D$, positive; may be traced. By default the sum of the weights.

    Raises:
      ValueError: An argument is out of range; noise for privacy comes before, and `denominator` is
        missing; in a round, the cohort has too many slots, or the reducer makes floats of integers.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> transform = fixed_point(1.0, 10.0, num_bits=4, rounding="nearest")
    >>> message = fl.Message(jnp.array([0.5, -0.25, 3.0]), 10.0)
    >>> sent = jax.jit(transform.client)(jax.random.key(0), (), message, None)
    >>> integers, weight = sent.update
    >>> integers.astype(jnp.int32).tolist(), int(weight), int(sent.metrics["elements_above"])
    ([4, -2, 7], 7, 1)
    """
    max_value = _validate.number("max_value", max_value, positive=True)
    max_weight = _validate.number("max_weight", max_weight, positive=True)
    # Floats of 32 bits hold every integer of 24.
    num_bits = _validate.integer("num_bits", num_bits, minimum=2, maximum=24)
    modulus_bits = _validate.integer("modulus_bits", modulus_bits, minimum=2, maximum=32)
    _validate.choice("rounding", rounding, ("stochastic", "nearest"))
    if denominator is not None:
        denominator = _validate.number("denominator", denominator, positive=True)
    largest = 2 ** (num_bits - 1) - 1

    def announce(key: jax.Array, state: PyTree, cohort: Cohort) -> PyTree:
        del key
        most_clients = (2 ** (modulus_bits - 1) - 1) // largest
        if cohort.capacity > most_clients:
            raise ValueError(
                f"num_bits is {num_bits} and modulus_bits is {modulus_bits}, in which numbers of"
                f" {most_clients} clients add up, and the cohort has {cohort.capacity} slots;"
                " choose fewer bits for numbers, or more for the modulus, of which 32 are the most."
            )
        return state

    def integers(key: jax.Array, x: jax.Array, weight: jax.Array) -> jax.Array:
        scaled = weight * jnp.clip(x / max_value, -1, 1)
        scaled = jnp.where(jnp.isnan(scaled), 0, scaled)
        whole = jnp.round(scaled) if rounding == "nearest" else random.rounded(key, scaled)
        return to_ring(whole, modulus_bits)

    def client(key: jax.Array, state: PyTree, message: Message, client: Client) -> Message:
        del state, client
        weight = jnp.round(largest * jnp.minimum(message.weight / max_weight, 1))
        leaves, structure = jax.tree.flatten(widen(message.update))
        keys = jax.random.split(key, len(leaves))
        sent = [integers(*pair, weight) for pair in zip(keys, leaves, strict=True)]
        update = jax.tree.unflatten(structure, sent)
        if denominator is None:
            update = update, to_ring(weight, modulus_bits)
        bits_up: Any = float(sum(modulus_bits * x.size for x in jax.tree.leaves(update)))
        return message._replace(
            update=update,
            weight=weight * (max_weight / largest),
            metrics={
                "bits_up": bits_up,
                "elements_above": _count([x > max_value for x in leaves]),
                "elements_below": _count([-x > max_value for x in leaves]),
            },
        )

    def server(
        key: jax.Array, state: PyTree, received: Received
    ) -> tuple[Received, PyTree, dict[str, jax.Array]]:
        del key
        for path, x in jax.tree.leaves_with_path(received.aggregate):
            if not jnp.issubdtype(x.dtype, jnp.integer):
                raise ValueError(
                    f"the aggregate{jax.tree_util.keystr(path)} of fixed_point is of dtype"
                    f" {x.dtype}, and no integers modulo {2**modulus_bits}; choose a reducer that"
                    " adds these up, such as fl.modular_sum()."
                )
        total = jax.tree.map(lambda x: signed(x, modulus_bits).astype(float), received.aggregate)
        if denominator is None:
            total, weight = total
            unit = max_value / jnp.where(weight == 0, 1, weight)
        else:
            unit = max_value / largest * (max_weight / denominator)
        bound = received.sensitivity
        received = received._replace(
            aggregate=jax.tree.map(lambda x: unit * x, total),
            sensitivity=None if bound is None else unit * bound,
        )
        return received, state, {}

    def guarantees(before: Guarantees, state: PyTree) -> Guarantees:
        before = unmasked("fixed_point", before)
        if before.is_private and denominator is None:
            raise ValueError(
                "denominator is None, and noise for privacy comes before fixed_point: the sum of"
                " the weights depends on who takes part; pass a denominator, such as the expected"
                " sum of the weights."
            )
        return before._replace(
            sensitivity=None if denominator is None else _norm(before.sensitivity, state),
            max_weight=max_weight,
            modulus_bits=modulus_bits,
        )

    def _norm(before: Any, state: PyTree) -> Any:
        """Upper bound of the L2 norm of the integers."""
        # When a pipeline is built, all that matters is that there is one.
        root = 1.0 if state is None else jnp.sqrt(state)
        if before is None:
            return root * largest
        moved = root / 2 if rounding == "nearest" else root
        return jnp.minimum(before * (largest / max_value) + moved, root * largest)

    def init(params: PyTree) -> jax.Array:
        """The number of elements of an update, by which rounding may lengthen it."""
        return jnp.asarray(sum(x.size for x in jax.tree.leaves(params)), float)

    return UpdateTransform(init, client, server, guarantees=guarantees, announce=announce)


def _count(conditions: list[jax.Array]) -> jax.Array:
    # Ones and zeros are their own squares, and these are added up fast.
    return squared_norm([x.astype(float) for x in conditions])


def to_ring(x: jax.Array, modulus_bits: int) -> jax.Array:
    """Whole numbers of at most 32 bits, as `uint32` modulo a power of two."""
    return x.astype(jnp.int32).astype(jnp.uint32) & jnp.uint32(2**modulus_bits - 1)


def signed(x: jax.Array, modulus_bits: int) -> jax.Array:
    """The representatives closest to 0 of integers modulo a power of two, `int32`."""
    unused = 32 - modulus_bits
    # The shift to the right repeats the sign.
    return (x.astype(jnp.uint32) << unused).astype(jnp.int32) >> unused


def modular_sum() -> Reducer:
    r"""The sum of integer updates modulo $2^{32}$, as secure aggregation adds them up.

    Weights are not multiplied with; a client that weighs nothing is left out. Updates are integers
    of 32 bits, such as `fixed_point` makes, also those modulo a smaller power of two: $2^{32}$ is a
    multiple of it.

    Source: Bonawitz et al. (2017), "Practical Secure Aggregation for Privacy-Preserving Machine
    Learning", section 4.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])
    >>> options = {"pipeline": fixed_point(1.0, 1.0), "reducer": modular_sum()}
    >>> algorithm = fl.fed_avg(model, optax.sgd(1.0), **options)
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [0.25]}, {"x": [0.5]}])
    >>> both = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(jnp.float32(0.0)), both)
    >>> round(float(state.params), 5)
    0.375
    """

    def summand(update: PyTree, weight: jax.Array) -> PyTree:
        for path, x in jax.tree.leaves_with_path(update):
            if not jnp.issubdtype(x.dtype, jnp.integer):
                raise ValueError(
                    f"the update{jax.tree_util.keystr(path)} is of dtype {x.dtype}, and modular_sum"
                    " adds integers; put fl.fixed_point(max_value, max_weight) into the pipeline."
                )
        return jax.tree.map(lambda x: jnp.where(weight != 0, x, 0), update)

    return Reducer(
        summand, lambda total, weight: total, sensitivity=lambda known: known.sensitivity
    )
