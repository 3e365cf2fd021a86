"""How a client's examples become the batches of its local steps."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import Batch, Cohort
from fedjax_lite.xla import random

KEY_INIT, KEY_DATA, KEY_STEP, KEY_SERVER = range(4)
DEFAULT_BATCH_SIZE = 32


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
      num_epochs: How often the client runs through its examples.
      num_steps: Number of local steps, whatever the client's size, in as many epochs as it
        takes; replaces `num_epochs`.
      shuffle: A new order of the client's examples in each epoch, or always their own.
    """

    batch_size: int
    num_epochs: int = 1
    num_steps: int | None = None
    shuffle: bool = False

    def __post_init__(self) -> None:
        _validate.integer("batch_size", self.batch_size, minimum=1)
        _validate.integer("num_epochs", self.num_epochs, minimum=1)
        if self.num_steps is not None:
            _validate.integer("num_steps", self.num_steps, minimum=1)


def adapt_batch_size(cohort: Cohort, batching: Batching, requested: int | None) -> Batching:
    """The batching, at the size that the generator of the cohort draws if it has one.

    Of other cohorts, no batch is larger than all of their rows.

    Raises:
      ValueError: Another size was requested.
    """
    if cohort.sample is None:
        num_rows = next(iter(cohort.examples.values())).shape[0]
        return dataclasses.replace(batching, batch_size=min(batching.batch_size, max(1, num_rows)))
    batch = jax.eval_shape(cohort.sample, jax.random.key(0), jnp.int32(0))
    _validate.features("the sample function of the population", batch)
    (drawn,) = {feature.shape[0] for feature in batch.values()}
    if requested not in (None, drawn):
        raise ValueError(
            f"batch_size is {requested}, but the population draws batches of {drawn}; leave"
            " batch_size out, or change the population's sample function."
        )
    return dataclasses.replace(batching, batch_size=drawn)


def steps_per_epoch(num_examples: jax.Array, batching: Batching) -> jax.Array:
    """Batches that it takes to see each example once."""
    # In terms of `lax`, whose integer divisions are one operation: those of NumPy round down.
    size = jnp.asarray(batching.batch_size, num_examples.dtype)
    return jnp.where(num_examples > 0, jax.lax.div(num_examples - 1, size) + 1, 0)


def count_processed(num_examples: jax.Array, batching: Batching) -> jax.Array:
    """Examples in all local steps of clients with so many, those of each epoch counted."""
    if batching.num_steps is None:
        return batching.num_epochs * num_examples
    per_epoch = jnp.maximum(steps_per_epoch(num_examples, batching), 1)
    epochs, rest = jnp.divmod(count_steps(num_examples, batching), per_epoch)
    return epochs * num_examples + jnp.minimum(rest * batching.batch_size, num_examples)


def count_steps(num_examples: jax.Array, batching: Batching) -> jax.Array:
    """Local steps of clients with so many examples; none without examples."""
    if batching.num_steps is not None:
        return jnp.where(num_examples > 0, batching.num_steps, 0)
    return batching.num_epochs * steps_per_epoch(num_examples, batching)


def bound_steps(cohort: Cohort, batching: Batching) -> int:
    """The most local steps that any client of the cohort could take, known when compiling.

    Raises:
      ValueError: Nothing bounds the size of a generated client.
    """
    if batching.num_steps is not None:
        return batching.num_steps
    if cohort.sample is not None:
        raise ValueError(
            "num_steps is None with differentiable=True and a generated population, whose clients"
            " may have any size; pass num_steps=, the number of local steps."
        )
    num_rows = next(iter(cohort.examples.values())).shape[0]
    return batching.num_epochs * -(-num_rows // batching.batch_size)


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
    if batching.num_epochs > 1 or batching.num_steps is not None:
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
                jax.lax.dynamic_index_in_dim(examples[name], own),
            )
            for name, values in batch.items()
        }

    batch = {
        name: jax.lax.dynamic_slice_in_dim(feature, start, length)
        for name, feature in examples.items()
    }
    is_full = (begin == start) & (begin + length <= end)
    return {**_unless_full(is_full, own_row_in_padding, batch), "mask": mask}
