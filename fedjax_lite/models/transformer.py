"""Language models of transformer layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.models._tasks import language_model, near_zero
from fedjax_lite.models.model import Model

_GLOROT = nn.initializers.glorot_uniform()


def _positions(length: int, width: int) -> jax.Array:
    """The sinusoids of Vaswani et al., section 3.5, `[length, width]`."""
    index = jnp.arange(width)
    angles = jnp.arange(length)[:, None] / 10_000 ** (index // 2 * 2 / width)
    return jnp.where(index % 2 == 0, jnp.sin(angles), jnp.cos(angles))


class _Layer(nn.Module):
    """Attention and a feed-forward network, each added to its input and then normalised."""

    num_heads: int
    feed_forward: int
    dropout_rate: float

    @nn.compact
    def __call__(self, x: jax.Array, visible: jax.Array, *, train: bool) -> jax.Array:
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        attention = nn.MultiHeadDotProductAttention(
            self.num_heads,
            dropout_rate=self.dropout_rate,
            broadcast_dropout=False,
            deterministic=not train,
            kernel_init=_GLOROT,
        )
        x = nn.LayerNorm(epsilon=1e-5)(x + dropout(attention(x, mask=visible)))
        y = nn.relu(nn.Dense(self.feed_forward, kernel_init=_GLOROT)(x))
        y = nn.Dense(x.shape[-1], kernel_init=_GLOROT)(dropout(y))
        return nn.LayerNorm(epsilon=1e-5)(x + dropout(y))


class _TransformerLanguageModel(nn.Module):
    vocabulary_size: int
    embedding: int
    layers: int
    num_heads: int
    feed_forward: int
    dropout_rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        embed = nn.Embed(self.vocabulary_size, self.embedding, embedding_init=near_zero)
        # Texts are padded at their end, so that a causal mask hides the padding as well.
        visible = nn.make_causal_mask(x)
        y = embed(x) * self.embedding**0.5 + _positions(x.shape[1], self.embedding)
        for _ in range(self.layers):
            layer = _Layer(self.num_heads, self.feed_forward, self.dropout_rate)
            y = layer(y, visible, train=train)
        return embed.attend(y)


def stackoverflow_transformer(
    vocabulary_size: int = 10_004,
    *,
    embedding: int = 96,
    layers: int = 3,
    num_heads: int = 8,
    feed_forward: int = 1536,
    dropout_rate: float = 0.1,
) -> Model:
    r"""Three transformer layers over words, for Stack Overflow.

    | layer                             | output            | parameters |
    |-----------------------------------|-------------------|-----------:|
    | embedding times $\sqrt{96}$       | `[length, 96]`    |    960,384 |
    | plus sinusoids of the position    | `[length, 96]`    |            |
    | 3 layers, each                    | `[length, 96]`    |    334,176 |
    | product with the embedding again  | `[length, 10004]` |            |
    | total                             |                   |  1,962,912 |

    A layer is causal attention with 8 heads (37,248 parameters) and a network of one hidden layer
    of 1536 with ReLU (296,544). Each adds to its input, and a layer norm (192) follows the sum.
    Dropout is on what is added, on the attention's weights and on the hidden layer.

    Sources: Vaswani et al. (2017), "Attention Is All You Need"; `lm_transformer` of
    pfl-research's Stack Overflow benchmark (Granqvist et al., 2024), for sentences of 20 words.
    The embedding starts uniform within 0.05, kernels from Glorot's uniform distribution, biases
    at zero. In pfl-research all layers start as copies of one.

    Args:
      vocabulary_size: Number of ids, the four special ones included.
      embedding: Width of the embedding and of the layers.
      layers: Number of layers.
      num_heads: Heads of the attention.
      feed_forward: Width of the hidden layer of the feed-forward networks.
      dropout_rate: What dropout leaves out.

    Returns:
      A `Model` on the features `x` and `y` `[batch, length]`, ids, of any length, with the metrics
      `loss`, `accuracy` and `accuracy_in_vocabulary`; see `fedjax_lite.models`.

    Raises:
      ValueError: `vocabulary_size` is below 5, another size below 1, or `num_heads` does not
        divide `embedding`.
    """
    sizes = {"embedding": embedding, "layers": layers, "num_heads": num_heads}
    for name, size in {**sizes, "feed_forward": feed_forward}.items():
        _validate.integer(name, size, minimum=1)
    if embedding % num_heads:
        raise ValueError(
            f"num_heads is {num_heads}, which does not divide embedding {embedding}; choose a"
            " divisor."
        )
    module = _TransformerLanguageModel(
        vocabulary_size, embedding, layers, num_heads, feed_forward, dropout_rate
    )
    return language_model(module, vocabulary_size)
