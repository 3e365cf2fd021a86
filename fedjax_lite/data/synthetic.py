"""Populations that are generated, so that everything runs without a file."""

import jax

from fedjax_lite import _validate
from fedjax_lite.data.population import GeneratedPopulation

HALFSPACE_BIAS, HALFSPACE_WEIGHTS = 0.3, (0.2, 0.8)


def halfspace_batch(key: jax.Array, batch_size: int) -> dict[str, jax.Array]:
    r"""Points of the square, labelled by a line.

    $x \sim U([-1, 1]^2)$, $y = 1$ where $0.3 + 0.2 x_1 + 0.8 x_2 > 0$, else 0.

    Args:
      key: Typed key.
      batch_size: Number of points.

    Returns:
      `{"x": [batch, 2], "y": [batch]}`, both floating.
    """
    # Drawn coordinate by coordinate: long rows of random bits vectorise, pairs do not.
    x = jax.random.uniform(key, (2, batch_size), minval=-1.0, maxval=1.0)
    score = HALFSPACE_BIAS + HALFSPACE_WEIGHTS[0] * x[0] + HALFSPACE_WEIGHTS[1] * x[1]
    return {"x": x.T, "y": (score > 0).astype(x.dtype)}


def halfspace(
    num_clients: int = 100,
    *,
    batch_size: int = 1000,
    min_batches: int = 5,
    max_batches: int = 9,
) -> GeneratedPopulation:
    """Clients that draw fresh batches of `halfspace_batch` in every round.

    Args:
      num_clients: Size of the population.
      batch_size: Points in a batch.
      min_batches: Fewest batches of a client in a round.
      max_batches: Most batches; their number is uniform in between, ends included.

    Raises:
      ValueError: A number is not positive, or `max_batches < min_batches`.
    """
    num_clients = _validate.integer("num_clients", num_clients, minimum=1)
    batch_size = _validate.integer("batch_size", batch_size, minimum=1)
    min_batches = _validate.integer("min_batches", min_batches, minimum=1)
    max_batches = _validate.integer("max_batches", max_batches, minimum=min_batches)

    def num_examples(key: jax.Array, client_id: jax.Array) -> jax.Array:
        del client_id
        return batch_size * jax.random.randint(key, (), min_batches, max_batches + 1)

    def sample(key: jax.Array, client_id: jax.Array) -> dict[str, jax.Array]:
        del client_id
        return halfspace_batch(key, batch_size)

    return GeneratedPopulation(num_clients=num_clients, num_examples=num_examples, sample=sample)
