"""Losses and metrics of the tasks: one class per example, one symbol per position, numbers."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from fedjax_lite import _validate
from fedjax_lite.base import Batch
from fedjax_lite.data.preprocess import EOS, NUM_SPECIAL, PAD
from fedjax_lite.models.linen import linen_model
from fedjax_lite.models.model import Model


def classifier(module: nn.Module, input_shape: Sequence[int], num_classes: int) -> Model:
    """The model of a module that maps `[batch, *input_shape]` to logits `[batch, classes]`."""
    _validate.integer("num_classes", num_classes, minimum=2)
    model = linen_model(
        module,
        np.zeros((1, *input_shape), np.float32),
        _cross_entropy,
        lambda logits, batch: {
            "loss": _cross_entropy(logits, batch),
            "accuracy": (logits.argmax(-1) == batch["y"]).astype(float),
        },
    )
    return model._replace(num_classes=num_classes)


def regressor(module: nn.Module, input_shape: Sequence[int]) -> Model:
    """The model of a module that maps `[batch, *input_shape]` to as many numbers as `y` has."""

    def squared_error(predictions: jax.Array, batch: Batch) -> jax.Array:
        error = jnp.reshape(predictions, batch["y"].shape) - batch["y"]
        return jnp.square(error).reshape(len(error), -1).mean(-1)

    return linen_model(module, np.zeros((1, *input_shape), np.float32), squared_error)


def language_model(module: nn.Module, vocabulary_size: int) -> Model:
    """The model of a module that maps ids `[batch, length]` to logits `[batch, length, ids]`."""
    _validate.integer("vocabulary_size", vocabulary_size, minimum=NUM_SPECIAL + 2)
    model = linen_model(module, np.zeros((1, 1), np.int32), sequence_loss, sequence_metrics)
    return model._replace(num_classes=vocabulary_size)


def near_zero(key: jax.Array, shape: Sequence[int], dtype: DTypeLike = float) -> jax.Array:
    """Keras's initial embedding, uniform within 0.05."""
    return jax.random.uniform(key, shape, dtype, minval=-0.05, maxval=0.05)


def _cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def _mean_where(mask: jax.Array, values: jax.Array) -> jax.Array:
    """`[batch]`, the mean of `values` `[batch, length]` over the mask; 0 where it is empty."""
    return jnp.where(mask, values, 0).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def sequence_loss(logits: jax.Array, batch: Batch) -> jax.Array:
    """`[batch]`, the mean cross-entropy of the real tokens of each sequence."""
    return _mean_where(batch["y"] != PAD, _cross_entropy(logits, batch))


def sequence_metrics(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Loss and accuracies `[batch]`; see `fedjax_lite.models`."""
    y = batch["y"]
    known = logits[..., NUM_SPECIAL:-1].argmax(-1) + NUM_SPECIAL
    return {
        "loss": sequence_loss(logits, batch),
        "accuracy": _mean_where(y != PAD, logits.argmax(-1) == y),
        "accuracy_in_vocabulary": _mean_where((y != PAD) & (y != EOS), known == y),
    }
