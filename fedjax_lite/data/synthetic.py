"""Data that are drawn from a formula, so that everything runs without a file."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lite import _validate
from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.data.population import GeneratedPopulation
from fedjax_lite.xla import random

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

    return GeneratedPopulation(
        num_clients=num_clients,
        num_examples=num_examples,
        sample=sample,
        most_examples=batch_size * max_batches,
    )


def synthetic(
    alpha: float = 1.0,
    beta: float = 1.0,
    num_clients: int = 30,
    *,
    iid: bool = False,
    held_out: float = 0.1,
    seed: int = 0,
) -> tuple[FederatedDataset, FederatedDataset]:
    r"""Synthetic$(\alpha, \beta)$ and Synthetic-IID of FedProx: 60 features, 10 classes.

    Client $k$ has $n_k = 50 + \lfloor e^{4 + 2 z} \rfloor$ examples, $z \sim N(0, 1)$, with
    labels $y = \arg\max(x W_k + b_k)$. In terms of standard deviations,

    $W_k, b_k \sim N(u_k, 1), \quad u_k \sim N(0, \alpha)$,
    $x \sim N(v_k, \Sigma), \quad v_k \sim N(B_k, 1), \quad B_k \sim N(0, \beta), \quad
    \Sigma_{jj} = j^{-1.2}$.

    All clients of the IID variant share one $W, b \sim N(0, 1)$, and $v_k = 0$.

    As published, $\alpha$ does nothing: $u_k$ shifts all ten scores alike, and the labels stay
    the same. Clients differ in $W_k$ and $v_k$ even at $\alpha = \beta = 0$.

    Source: Li et al. (2020), "Federated Optimization in Heterogeneous Networks", section 5.1,
    and the code that goes with it, where it is more precise.

    Args:
      alpha: Standard deviation of the clients' models' means, not negative.
      beta: Standard deviation of the clients' features' means, not negative.
      num_clients: Number of clients, about 400 examples each.
      iid: Whether to draw the IID variant, for which `alpha` and `beta` are 0.
      held_out: Fraction of each client's examples in the second data set, rounded up.
      seed: Determines everything.

    Returns:
      The training and the test examples of the same clients, with the features `x`
      `[rows, 60]`, float32, and `y` `[rows]`, int32.

    Raises:
      ValueError: An argument is out of range.

    >>> train, test = synthetic(1.0, 1.0, num_clients=3)
    >>> train.num_clients, train.examples["x"].shape[1], test.num_clients
    (3, 60, 3)
    """
    num_clients = _validate.integer("num_clients", num_clients, minimum=1)
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value < np.inf:
            raise ValueError(f"{name} is {value}; choose a standard deviation from 0.")
    if iid and (alpha or beta):
        raise ValueError(f"alpha is {alpha} and beta is {beta}; pass 0 for both with iid=True.")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}; choose a fraction between 0 and 1.")
    rng = np.random.default_rng(_validate.integer("seed", seed, minimum=0))
    num_features, num_classes = 60, 10
    sizes = 50 + rng.lognormal(4, 2, num_clients).astype(int)
    scale = np.arange(1.0, num_features + 1) ** -0.6  # The root of the diagonal of Sigma.
    model = rng.standard_normal((num_features + 1, num_classes))
    parts: tuple[dict[int, dict[str, np.ndarray]], ...] = ({}, {})
    for client, size in enumerate(sizes):
        mean = np.zeros(num_features)
        if not iid:
            shift, mean = rng.normal(0, alpha), rng.normal(rng.normal(0, beta), 1, num_features)
            model = rng.normal(shift, 1, model.shape)
        x = rng.normal(mean, scale, (size, num_features))
        y = (x @ model[:-1] + model[-1]).argmax(1)
        cut = int((1 - held_out) * size)
        for part, rows in zip(parts, (slice(cut), slice(cut, None)), strict=True):
            part[client] = {"x": x[rows].astype(np.float32), "y": y[rows].astype(np.int32)}
    train, test = map(FederatedDataset.from_clients, parts)
    return train, test


def gaussian_images(
    num_clients: int = 1000,
    *,
    image_shape: Sequence[int] = (28, 28, 1),
    num_classes: int = 62,
    separation: float = 6.0,
    alpha: float | None = None,
    num_examples: int = 100,
    batch_size: int = 20,
    seed: int = 0,
) -> tuple[GeneratedPopulation, Callable[[jax.Array, int], dict[str, jax.Array]]]:
    r"""Images of any shape and difficulty, for any number of clients, drawn when they are used.

    $x = \tfrac{s}{\sqrt 2}\, m_y + \varepsilon$ with white noise $\varepsilon \sim N(0, I)$ and
    orthonormal patterns $m_1, \ldots, m_C$ of random blocks of 2 x 2 pixels: the means of any two
    classes lie $s$ standard deviations apart. No classifier is right more often than

    $\int \varphi(z)\, \Phi(z + s / \sqrt 2)^{C - 1} dz$,

    on balanced classes, and a linear one is as good. The defaults have the shapes of EMNIST; pass
    `image_shape=(32, 32, 3), num_classes=10` for those of CIFAR-10.

    | `separation` | best accuracy, 62 classes | 10 classes |
    |---|---|---|
    | 2 | .20 | .48 |
    | 4 | .68 | .88 |
    | 6 | .96 | .99 |

    Args:
      num_clients: Size of the population.
      image_shape: Height, width and channels.
      num_classes: Number of classes $C$.
      separation: Distance $s$ of the means of two classes, not negative; smaller is harder.
      alpha: Label skew: client i draws its labels from its own $q_i \sim \mathrm{Dir}(\alpha)$,
        the same in every round. All clients are balanced if left out.
      num_examples: Number of examples of each client in a round.
      batch_size: Number of examples in a batch.
      seed: Determines the patterns and the clients' mixtures.

    Returns:
      The clients, which draw fresh examples in every round; and `draw(key, size)`, which draws
      examples of balanced classes: to evaluate on, or to split with `fl.partition`
      where clients are to have a fixed data set. Features are `x` `[batch, *image_shape]`,
      floating, and `y` `[batch]`, int32.

    Raises:
      ValueError: An argument is out of range, or there are more classes than patterns.

    >>> population, draw = gaussian_images(10**6, alpha=0.1)
    >>> {name: value.shape for name, value in draw(jax.random.key(0), 50).items()}
    {'x': (50, 28, 28, 1), 'y': (50,)}
    """
    batch_size = _validate.integer("batch_size", batch_size, minimum=1)
    num_examples = _validate.integer("num_examples", num_examples, minimum=0, maximum=2**31 - 1)
    if not 0 <= separation < np.inf:
        raise ValueError(f"separation is {separation}; choose a distance from 0.")
    if alpha is not None and not 1e-30 <= alpha < np.inf:
        raise ValueError(f"alpha is {alpha}; choose a positive concentration, at least 1e-30.")
    seed = _validate.integer("seed", seed, minimum=0, maximum=2**31 - 1)
    means = separation / 2**0.5 * _patterns(image_shape, num_classes, seed)
    key_mixtures = random.fast(jax.random.key(seed))

    def images(key: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        noise = jax.random.normal(key, (*labels.shape, *image_shape))
        return {"x": jnp.asarray(means, noise.dtype)[labels] + noise, "y": labels}

    def draw(key: jax.Array, size: int) -> dict[str, jax.Array]:
        key_labels, key_noise = jax.random.split(key)
        return images(key_noise, jax.random.randint(key_labels, (size,), 0, num_classes, jnp.int32))

    def sample(key: jax.Array, client_id: jax.Array) -> dict[str, jax.Array]:
        if alpha is None:
            return draw(key, batch_size)
        # Logarithms of gamma variates are those of a Dirichlet vector but for a constant.
        key_mixture = jax.random.fold_in(key_mixtures, client_id)
        logits = jax.random.loggamma(key_mixture, alpha, (num_classes,))
        key_labels, key_noise = jax.random.split(key)
        labels = jax.random.categorical(key_labels, logits, shape=(batch_size,))
        return images(key_noise, labels.astype(jnp.int32))

    population = GeneratedPopulation(
        num_clients=num_clients,
        num_examples=lambda key, client_id: jnp.int32(num_examples),
        sample=sample,
        most_examples=num_examples,
    )
    return population, draw


def _patterns(image_shape: Sequence[int], num_classes: int, seed: int) -> np.ndarray:
    """`[classes, *image_shape]` orthonormal patterns of blocks of 2 x 2 pixels."""
    if len(image_shape) != 3:
        raise ValueError(f"image_shape is {image_shape}; pass height, width and channels.")
    height, width, channels = (
        _validate.integer("image_shape", length, minimum=1) for length in image_shape
    )
    blocks = (-(-height // 2), -(-width // 2), channels)
    num_classes = _validate.integer(
        "num_classes", num_classes, minimum=1, maximum=int(np.prod(blocks))
    )
    drawn = np.random.default_rng(seed).standard_normal((num_classes, *blocks))
    pixels = drawn.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]
    basis, _ = np.linalg.qr(pixels.reshape(num_classes, -1).T)
    return basis.T.reshape(pixels.shape)
