"""Sequences that are drawn from a formula, for language models without a text."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lite import _validate
from fedjax_lite.data.population import GeneratedPopulation
from fedjax_lite.data.preprocess import BOS, EOS, NUM_SPECIAL, PAD


def noisy_successors(
    num_clients: int = 1000,
    *,
    vocabulary_size: int = 90,
    sequence_length: int = 80,
    noise: float = 0.3,
    end: float = 0.0,
    num_examples: int = 50,
    batch_size: int = 10,
    seed: int = 0,
) -> tuple[GeneratedPopulation, Callable[[jax.Array, int], dict[str, jax.Array]]]:
    r"""Texts in which each symbol mostly calls for the same next one, drawn when they are used.

    A secret order puts the $V - 4$ known symbols of a vocabulary of $V$ ids on a circle. A text
    begins with a symbol drawn uniformly. After each symbol it ends with probability $e$ (`end`);
    else the next one is, with probability $\varepsilon$ (`noise`), drawn uniformly too, and
    otherwise the successor of the last. No model is right more often than

    $(1 - e) \big(1 - \varepsilon + \frac{\varepsilon}{V - 4}\big)$

    after a symbol (or $e$, if that is more), and $\frac{1}{V - 4}$ at the beginning. The ids are
    those of `preprocess`: 0 pads, 1 begins a text, 2 ends it, and the last one, for unknown
    symbols, never comes up. The defaults have the shapes of Shakespeare; pass
    `vocabulary_size=10_004, sequence_length=20, end=0.1` for those of Stack Overflow.

    Args:
      num_clients: Size of the population, in which all clients are alike.
      vocabulary_size: Number of ids $V$, the four special ones included.
      sequence_length: Length to which texts are cut or padded.
      noise: Probability $\varepsilon$ of a symbol that does not depend on the last one.
      end: Probability $e$ that a text ends after a symbol; with 0, none is padded.
      num_examples: Number of texts of each client in a round.
      batch_size: Number of texts in a batch.
      seed: Determines the order.

    Returns:
      The clients, which draw fresh texts in every round; and `draw(key, size)`, which draws texts
      to evaluate on. Features are `x` and `y` `[batch, sequence_length]`, int32, y one symbol
      ahead of x.

    Raises:
      ValueError: An argument is out of range.

    >>> population, draw = noisy_successors(10**6, vocabulary_size=14, sequence_length=5, noise=0)
    >>> batch = draw(jax.random.key(0), 2)
    >>> batch["x"][:, 0].tolist(), bool((batch["x"][:, 1:] == batch["y"][:, :-1]).all())
    ([1, 1], True)
    """
    vocabulary_size = _validate.integer("vocabulary_size", vocabulary_size, minimum=5)
    sequence_length = _validate.integer("sequence_length", sequence_length, minimum=1)
    num_examples = _validate.integer("num_examples", num_examples, minimum=0, maximum=2**31 - 1)
    batch_size = _validate.integer("batch_size", batch_size, minimum=1)
    seed = _validate.integer("seed", seed, minimum=0, maximum=2**31 - 1)
    for name, value in (("noise", noise), ("end", end)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; choose a probability between 0 and 1.")
    num_symbols = vocabulary_size - NUM_SPECIAL - 1
    circle = NUM_SPECIAL + np.random.default_rng(seed).permutation(num_symbols).astype(np.int32)

    @functools.partial(jax.jit, static_argnames="size", inline=True)
    def draw(key: jax.Array, size: int) -> dict[str, jax.Array]:
        key_jumps, key_places, key_ends = jax.random.split(key, 3)
        shape, time = (size, sequence_length), jnp.arange(sequence_length)
        # A place on the circle is the one of the last jump, and as many steps further.
        jumps = jax.random.bernoulli(key_jumps, float(noise), shape) | (time == 0)
        last = jax.lax.cummax(jnp.where(jumps, time, 0), axis=1)
        landed = jax.random.randint(key_places, shape, 0, num_symbols)
        place = jnp.take_along_axis(landed, last, axis=1) + time - last
        ends = jax.random.bernoulli(key_ends, float(end), shape) & (time > 0)
        num_ends = jnp.cumsum(ends, axis=1)
        y = jnp.where(num_ends == 0, jnp.asarray(circle)[place % num_symbols], PAD)
        y = jnp.where(ends & (num_ends == 1), EOS, y)
        x = jnp.concatenate([jnp.full((size, 1), BOS, y.dtype), y[:, :-1]], axis=1)
        return {"x": jnp.where(num_ends - ends == 0, x, PAD), "y": y}

    population = GeneratedPopulation(
        num_clients=num_clients,
        num_examples=lambda key, client_id: jnp.int32(num_examples),
        sample=lambda key, client_id: draw(key, batch_size),
        most_examples=num_examples,
    )
    return population, draw
