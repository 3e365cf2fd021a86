"""How a client's examples become the batches of its local steps."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Batch, Client, Cohort
from fedjax_lite.xla import random
from fedjax_lite.xla.rows import read_rows

KEY_INIT, KEY_DATA, KEY_STEP, KEY_SERVER, KEY_REDUCER = range(5)
DEFAULT_BATCH_SIZE = 32
PerClient = Callable[[Client], Any]
"""A whole number of each client, by its id, its number of examples and its key of the round."""


def client_key(key: jax.Array, client_id: ArrayLike, purpose: ArrayLike) -> jax.Array:
    """The key of one client in one round, for one of the purposes above; or an array of them."""
    return random.fold_in_pair(key, purpose, client_id)


class Slot(NamedTuple):
    """One client, as its slot in a cohort has it, or several of them.

    Attributes:
      id: Its position in the population, int32; negative in an empty slot.
      num_examples: How many examples it has, int32.
      offset: Its first row in the examples of the cohort, int32.
    """

    id: jax.Array
    num_examples: jax.Array
    offset: jax.Array

    @classmethod
    def of(cls, cohort: Cohort, slot: ArrayLike) -> "Slot":
        """That of a cohort with this number."""
        return cls(cohort.client_ids[slot], cohort.num_examples[slot], cohort.offsets[slot])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batching:
    """What a client runs through in a round.

    Attributes:
      batch_size: Examples in a batch; the last batch of an epoch may be short, and is masked.
      num_epochs: How often the client runs through its examples, or a function of the `Client`.
      num_steps: Number of local steps, whatever the client's size, in as many epochs as it
        takes, or a function of the `Client`; replaces `num_epochs`.
      shuffle: A new order of the client's examples in each epoch, or always their own.
    """

    batch_size: int
    num_epochs: int | PerClient = 1
    num_steps: int | PerClient | None = None
    shuffle: bool = False

    def __post_init__(self) -> None:
        _validate.integer("batch_size", self.batch_size, minimum=1)
        if not callable(self.num_epochs):
            _validate.integer("num_epochs", self.num_epochs, minimum=1)
        if self.num_steps is not None and not callable(self.num_steps):
            _validate.integer("num_steps", self.num_steps, minimum=1)


def adapt_batch_size(cohort: Cohort, batching: Batching, requested: int | None) -> Batching:
    """The batching, at the size that the generator of the cohort draws if it has one.

    Of other cohorts, no batch is larger than their largest client.

    Raises:
      ValueError: Another size was requested.
    """
    if cohort.sample is None:
        most = _most_examples(cohort) or 1
        return dataclasses.replace(batching, batch_size=min(batching.batch_size, most))
    batch = jax.eval_shape(cohort.sample, jax.random.key(0), jnp.int32(0))
    _validate.features("the sample function of the population", batch)
    (drawn,) = {feature.shape[0] for feature in batch.values()}
    if requested not in (None, drawn):
        raise ValueError(
            f"batch_size is {requested}, but the population draws batches of {drawn}; leave"
            " batch_size out, or change the population's sample function."
        )
    return dataclasses.replace(batching, batch_size=drawn)


def _most_examples(cohort: Cohort) -> int | None:
    """What no client of a cohort has more of, if that is known when compiling."""
    if cohort.sample is not None:
        return cohort.most_examples
    num_rows = next(iter(cohort.examples.values())).shape[0]
    return num_rows if cohort.most_examples is None else min(num_rows, cohort.most_examples)


def steps_per_epoch(num_examples: jax.Array, batching: Batching) -> jax.Array:
    """Batches that it takes to see each example once."""
    # In terms of `lax`, whose integer divisions are one operation: those of NumPy round down.
    size = jnp.asarray(batching.batch_size, num_examples.dtype)
    return jnp.where(num_examples > 0, jax.lax.div(num_examples - 1, size) + 1, 0)


def count_steps(cohort: Cohort, key: jax.Array, batching: Batching) -> jax.Array:
    """Local steps `[clients]` of the clients of a cohort in the round of a key.

    None without examples, and at most `cohort.max_steps`.
    """
    num_examples = cohort.num_examples
    per_epoch = steps_per_epoch(num_examples, batching)
    if batching.num_steps is None:
        steps = _per_client("num_epochs", batching.num_epochs, cohort, key) * per_epoch
    else:
        steps = _per_client("num_steps", batching.num_steps, cohort, key)
        steps = jnp.where(num_examples > 0, steps, 0)
    return steps if cohort.max_steps is None else jnp.clip(steps, 0, cohort.max_steps)


def _per_client(name: str, number: int | PerClient, cohort: Cohort, key: jax.Array) -> Any:
    """A number, or what a function makes of each client `[clients]`, not below zero."""
    if not callable(number):
        return number

    def of_one(client_id: jax.Array, num_examples: jax.Array, key: jax.Array) -> jax.Array:
        made = jnp.asarray(number(Client(client_id, num_examples, jnp.int32(0), (), key)))
        if made.shape != () or not jnp.issubdtype(made.dtype, jnp.integer):
            raise ValueError(
                f"what {name} returned is of shape {made.shape} and dtype {made.dtype}; return a"
                " whole number."
            )
        return jnp.maximum(made, 0).astype(jnp.int32)

    keys = client_key(key, cohort.client_ids, KEY_INIT)
    return jax.vmap(of_one)(cohort.client_ids, cohort.num_examples, keys)


def count_processed(cohort: Cohort, num_steps: jax.Array, batching: Batching) -> jax.Array:
    """Examples `[clients]` in so many local steps, those of each epoch counted."""
    num_examples = cohort.num_examples
    whole = batching.num_steps is None and cohort.max_steps is None
    if whole and not callable(batching.num_epochs):
        return batching.num_epochs * num_examples
    per_epoch = jnp.maximum(steps_per_epoch(num_examples, batching), 1)
    epochs, rest = jnp.divmod(num_steps, per_epoch)
    return epochs * num_examples + jnp.minimum(rest * batching.batch_size, num_examples)


def bound_steps(cohort: Cohort, batching: Batching) -> int | None:
    """The most local steps that any client of the cohort could take, if known when compiling."""
    if batching.num_steps is not None:
        return None if callable(batching.num_steps) else batching.num_steps
    most = _most_examples(cohort)
    if most is None or callable(batching.num_epochs):
        return None
    return batching.num_epochs * -(-most // batching.batch_size)


def check_bounded(bound: int | None, batching: Batching) -> None:
    """Refuses `differentiable` where nothing bounds the number of steps."""
    if bound is not None:
        return
    for name in ("num_steps", "num_epochs"):
        if callable(getattr(batching, name)):
            raise ValueError(
                f"{name} is a function of the client with differentiable=True, and may return any"
                " number; pass a number, and the fewer steps of some clients as max_steps= of the"
                " cohort."
            )
    raise ValueError(
        "num_steps is None with differentiable=True and a generated population, whose clients may"
        " have any size; pass num_steps=, the number of local steps, or most_examples= of the"
        " population."
    )


def read_batch(
    cohort: Cohort, key: jax.Array, client: Slot, step: ArrayLike, batching: Batching
) -> Batch:
    """The batch of one local step of one client.

    Args:
      cohort: The cohort.
      key: The client's key for data.
      client: The client.
      step: Which of its steps, int32 scalar.
      batching: What the client runs through.

    Returns:
      Features `[batch, ...]` and `"mask"`. What is masked of a resident client's batch is
      filled with rows of its own, so that a stranger's NaN never enters.
    """
    num_examples, step = client.num_examples, jnp.asarray(step, jnp.int32)
    epoch, batch_in_epoch = jnp.int32(0), step
    if batching.num_epochs != 1 or batching.num_steps is not None:
        per_epoch = jnp.maximum(steps_per_epoch(num_examples, batching), 1)
        epoch = jax.lax.div(step, per_epoch)
        batch_in_epoch = step - epoch * per_epoch
    first = batch_in_epoch * batching.batch_size
    position = first + jnp.arange(batching.batch_size, dtype=jnp.int32)
    if cohort.sample is not None:
        batch = cohort.sample(random.fold_in_pair(key, 0, step), client.id)
        return _fill_padding(batch, position < num_examples)
    if batching.shuffle:
        own = jnp.minimum(position, num_examples - 1)
        rows = client.offset + random.permuted(key, own, num_examples, which=epoch)
        batch = {name: feature[rows] for name, feature in cohort.examples.items()}
        return {**batch, "mask": position < num_examples}
    return _read_in_order(cohort.examples, client, first, batching.batch_size)


def _fill_padding(batch: dict[str, jax.Array], mask: jax.Array) -> Batch:
    """The batch with its first example, a real one, in place of those that are masked."""

    def fill(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: jnp.where(_over(mask, x), x, x[:1]) for name, x in batch.items()}

    return {**_unless_full(mask[-1], fill, batch), "mask": mask}


def _over(mask: jax.Array, x: jax.Array) -> jax.Array:
    """`mask [batch]` with trailing axes, to go with `x [batch, ...]`."""
    return mask.reshape((-1,) + (1,) * (x.ndim - 1))


def _unless_full(
    is_full: jax.Array,
    mend: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
    batch: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    """`mend(batch)`; where it is cheaper to ask first, `batch` itself if it is full.

    Most batches are full, and XLA:CPU would repeat the masking in each consumer of the batch.
    """

    def ask_first(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return jax.lax.cond(is_full, lambda batch: batch, mend, batch)

    return jax.lax.platform_dependent(batch, cpu=ask_first, default=mend)


def _read_in_order(
    examples: dict[str, jax.Array], client: Slot, first: jax.Array, batch_size: int
) -> Batch:
    """The client's rows from its `first` on, as one slice."""
    begin = client.offset + first
    end = client.offset + client.num_examples
    num_rows = next(iter(examples.values())).shape[0]
    length = min(batch_size, num_rows)
    # Near the end of the table the slice starts early: the mask is in terms of rows.
    start = jnp.clip(begin, 0, num_rows - length)
    rows = start + jnp.arange(length, dtype=jnp.int32)
    mask = (rows >= begin) & (rows < end)

    def own_row_in_padding(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        own = jnp.minimum(begin, end - 1)
        return {
            name: jnp.where(
                _over(mask, values),
                values,
                read_rows(examples[name], lambda x: jax.lax.dynamic_index_in_dim(x, own)),
            )
            for name, values in batch.items()
        }

    batch = {
        name: read_rows(feature, lambda x: jax.lax.dynamic_slice_in_dim(x, start, length))
        for name, feature in examples.items()
    }
    is_full = (begin == start) & (begin + length <= end)
    return {**_unless_full(is_full, own_row_in_padding, batch), "mask": mask}
