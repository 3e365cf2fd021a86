"""Drawn data in the shapes of the field's benchmarks, with as many clients: to measure speed with.

Examples are computed when they are used. What is learned is easy; accuracies tell nothing of the
benchmarks themselves.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.data.population import GeneratedPopulation
from fedjax_lite.data.sequences import noisy_successors
from fedjax_lite.data.synthetic import gaussian_images

Drawn = tuple[GeneratedPopulation, Callable[[jax.Array, int], dict[str, jax.Array]]]


def emnist_like(
    num_clients: int = 3400,
    *,
    separation: float = 6.0,
    alpha: float | None = None,
    num_examples: int = 198,
    batch_size: int = 20,
    seed: int = 0,
) -> Drawn:
    """`gaussian_images` in the shapes of EMNIST: 28 x 28 pixels of 62 classes.

    Args:
      num_clients: Number of clients; EMNIST has 3,400.
      separation: As for `gaussian_images`.
      alpha: As for `gaussian_images`.
      num_examples: Examples of a client in a round; EMNIST has 671,585 in all.
      batch_size: Examples in a local batch.
      seed: Determines the classes.
    """
    return gaussian_images(
        num_clients,
        image_shape=(28, 28, 1),
        num_classes=62,
        separation=separation,
        alpha=alpha,
        num_examples=num_examples,
        batch_size=batch_size,
        seed=seed,
    )


def cifar10_like(
    num_clients: int = 500,
    *,
    crop: int = 32,
    separation: float = 6.0,
    alpha: float | None = None,
    num_examples: int = 100,
    batch_size: int = 20,
    seed: int = 0,
) -> Drawn:
    """`gaussian_images` in the shapes of CIFAR-10: photographs of 10 classes.

    Args:
      num_clients: Number of clients; 500 in Reddi et al. (2021).
      crop: Height and width of the images.
      separation: As for `gaussian_images`.
      alpha: As for `gaussian_images`.
      num_examples: Examples of a client in a round.
      batch_size: Examples in a local batch.
      seed: Determines the classes.
    """
    return gaussian_images(
        num_clients,
        image_shape=(crop, crop, 3),
        num_classes=10,
        separation=separation,
        alpha=alpha,
        num_examples=num_examples,
        batch_size=batch_size,
        seed=seed,
    )


def cifar100_like(
    num_clients: int = 500,
    *,
    crop: int = 32,
    separation: float = 6.0,
    alpha: float | None = None,
    num_examples: int = 100,
    batch_size: int = 20,
    seed: int = 0,
) -> Drawn:
    """`gaussian_images` in the shapes of CIFAR-100: photographs of 100 classes.

    Args:
      num_clients: Number of clients; 500 in Reddi et al. (2021).
      crop: Height and width of the images; 24 in Reddi et al. (2021).
      separation: As for `gaussian_images`.
      alpha: As for `gaussian_images`.
      num_examples: Examples of a client in a round.
      batch_size: Examples in a local batch.
      seed: Determines the classes.
    """
    return gaussian_images(
        num_clients,
        image_shape=(crop, crop, 3),
        num_classes=100,
        separation=separation,
        alpha=alpha,
        num_examples=num_examples,
        batch_size=batch_size,
        seed=seed,
    )


def shakespeare_like(
    num_clients: int = 715,
    *,
    vocabulary_size: int = 90,
    num_examples: int = 50,
    batch_size: int = 10,
    seed: int = 0,
) -> Drawn:
    """`noisy_successors` in the shapes of Shakespeare: sequences of 80 characters.

    Args:
      num_clients: Number of clients; Shakespeare has 715.
      vocabulary_size: Ids, the four special ones included.
      num_examples: Sequences of a client in a round.
      batch_size: Sequences in a local batch.
      seed: Determines the language.
    """
    return noisy_successors(
        num_clients,
        vocabulary_size=vocabulary_size,
        sequence_length=80,
        num_examples=num_examples,
        batch_size=batch_size,
        seed=seed,
    )


def stackoverflow_like(
    num_clients: int = 342_477,
    *,
    vocabulary_size: int = 10_004,
    num_examples: int = 64,
    batch_size: int = 16,
    seed: int = 0,
) -> Drawn:
    """`noisy_successors` in the shapes of Stack Overflow: sentences of up to 20 words.

    Args:
      num_clients: Number of clients; Stack Overflow has 342,477.
      vocabulary_size: Ids, the four special ones included.
      num_examples: Sentences of a client in a round; pfl-research takes 64 of each.
      batch_size: Sentences in a local batch.
      seed: Determines the language.
    """
    return noisy_successors(
        num_clients,
        vocabulary_size=vocabulary_size,
        sequence_length=20,
        end=0.1,
        num_examples=num_examples,
        batch_size=batch_size,
        seed=seed,
    )


def stackoverflow_tags_like(
    num_clients: int = 342_477,
    *,
    vocabulary_size: int = 10_000,
    num_tags: int = 500,
    num_examples: int = 400,
    batch_size: int = 100,
) -> Drawn:
    """Bags of 30 words in the shapes of Stack Overflow's tags.

    A text has up to three tags, low ones more often, and each of its words is by half one of ten
    that go with a tag of it.

    Args:
      num_clients: Number of clients; Stack Overflow has 342,477.
      vocabulary_size: Number of words.
      num_tags: Number of tags.
      num_examples: Texts of a client in a round; Stack Overflow has 397 of each.
      batch_size: Texts in a local batch.
    """
    vocabulary_size = _validate.integer("vocabulary_size", vocabulary_size, minimum=1)
    num_tags = _validate.integer("num_tags", num_tags, minimum=1)
    num_examples = _validate.integer("num_examples", num_examples, minimum=0, maximum=2**31 - 1)
    batch_size = _validate.integer("batch_size", batch_size, minimum=1)

    def draw(key: jax.Array, size: int) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 4)
        tags = (num_tags * jax.random.uniform(keys[0], (size, 3)) ** 3).astype(jnp.int32)
        of_tag = jnp.take_along_axis(tags, jax.random.randint(keys[1], (size, 30), 0, 3), axis=1)
        own = 10 * of_tag + jax.random.randint(keys[2], (size, 30), 0, 10)
        words = jax.random.randint(keys[3], (2, size, 30), 0, 2 * vocabulary_size)
        x = jnp.where(words[0] < vocabulary_size, own, words[1]) % vocabulary_size + 1
        return {"x": x, "y": (tags[..., None] == jnp.arange(num_tags)).any(1)}

    population = GeneratedPopulation(
        num_clients=num_clients,
        num_examples=lambda key, client_id: jnp.int32(num_examples),
        sample=lambda key, client_id: draw(key, batch_size),
        most_examples=num_examples,
    )
    return population, draw
