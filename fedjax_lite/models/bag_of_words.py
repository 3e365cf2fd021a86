"""Labels of texts, by the words in them and not by their order."""

import functools

import jax
import jax.numpy as jnp
import optax

from fedjax_lite import _validate
from fedjax_lite.base import Batch
from fedjax_lite.models.model import Model, function_model


def stackoverflow_tags(vocabulary_size: int = 10_000, num_classes: int = 500) -> Model:
    r"""Logistic regression on a bag of words, a yes or no for each tag: 5,000,500 parameters.

    With $b_w$ the share of a text's words that are word $w$ of the vocabulary, unknown words
    counted among all, $p_t = \sigma\big((b W + c)_t\big)$, and the loss of a text with the tags $y$
    is $-\sum_t y_t \log p_t + (1 - y_t) \log(1 - p_t)$.

    Source: Reddi et al. (2021), "Adaptive Federated Optimization", appendix C, and the code that
    goes with it, which divides by the number of tags and adds up over a batch. $W$ starts as there
    from Glorot's uniform distribution, $c$ at zero.

    Args:
      vocabulary_size: Number of known words, without padding and the unknown.
      num_classes: Number of tags.

    Returns:
      A `Model` on the features `x` `[batch, length]`, integer ids, and `y` `[batch, num_classes]`,
      bool, of `data.stackoverflow_tags`; with the params `kernel` `[vocabulary_size, num_classes]`
      and `bias` `[num_classes]`, and the metrics `loss` and `accuracy`, how often the likeliest tag
      is one of the text's. For the share of tags that are found, see `fl.metrics.recall_at`.

    Raises:
      ValueError: A number is not positive.

    >>> params, _ = stackoverflow_tags(3, 2).init(jax.random.key(0))
    >>> jax.tree.map(jnp.shape, params)
    {'bias': (2,), 'kernel': (3, 2)}
    """
    vocabulary_size = _validate.integer("vocabulary_size", vocabulary_size, minimum=1)
    num_classes = _validate.integer("num_classes", num_classes, minimum=1)

    def init(key: jax.Array) -> dict[str, jax.Array]:
        kernel = jax.nn.initializers.glorot_uniform()(key, (vocabulary_size, num_classes))
        return {"kernel": kernel, "bias": jnp.zeros(num_classes)}

    def logits(params: dict[str, jax.Array], batch: Batch) -> jax.Array:
        counts = jax.vmap(functools.partial(jnp.bincount, length=vocabulary_size + 2))(batch["x"])
        num_words = jnp.maximum(counts[:, 1:].sum(1, keepdims=True), 1)
        return counts[:, 1:-1] / num_words @ params["kernel"] + params["bias"]

    def loss(params: dict[str, jax.Array], batch: Batch) -> jax.Array:
        y = batch["y"].astype(float)
        return optax.losses.sigmoid_binary_cross_entropy(logits(params, batch), y).sum(-1)

    def metrics(params: dict[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        likeliest = logits(params, batch).argmax(-1, keepdims=True)
        found = jnp.take_along_axis(batch["y"], likeliest, axis=-1)[:, 0]
        return {"loss": loss(params, batch), "accuracy": found.astype(float)}

    return function_model(loss, init, metrics, logits)
