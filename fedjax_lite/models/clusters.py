"""Models without labels: centroids of clusters, and mixtures of Gaussians."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.base import Batch, PyTree
from fedjax_lite.models.model import Model, drawn_by, function_model

Mixture = dict[str, jax.Array]
"""Params of `gaussians`."""


def centroids(input_shape: Sequence[int], num_clusters: int) -> Model:
    r"""Centroids of clusters: the squared distance to the nearest. For `fl.k_means`.

    $\ell(x) = \min_j \|x - \mu_j\|^2$. They are drawn from the standard normal distribution, as in
    TensorFlow Federated; some examples that the server has are a better start.

    Args:
      input_shape: Shape of one example, flattened by the model.
      num_clusters: Number of centroids.

    Returns:
      A `Model` on the feature `x` `[batch, *input_shape]`, whose params are an array `[clusters,
      features]`, with the metric `loss`.

    Raises:
      ValueError: `num_clusters` is below 1.

    >>> import jax, jax.numpy as jnp
    >>> model = centroids((2,), 3)
    >>> params, _ = model.init(jax.random.key(0))
    >>> params.shape
    (3, 2)
    >>> batch = {"x": params[:1], "mask": jnp.array([True])}
    >>> model.metrics(params, {}, batch)["loss"].tolist()
    [0.0]
    """
    shape = (_validate.integer("num_clusters", num_clusters, minimum=1), math.prod(input_shape))

    def loss(centroids: jax.Array, batch: Batch) -> jax.Array:
        x = points(batch, centroids.shape[1])
        return jnp.square(x[:, None] - centroids).sum(-1).min(-1)

    return function_model(loss, lambda key: jax.random.normal(key, shape))


def gaussians(input_shape: Sequence[int], num_components: int, *, full: bool = False) -> Model:
    r"""A mixture of Gaussians: the negative log-likelihood. For `fl.gaussian_mixture`.

    $\ell(x) = -\log \sum_j \pi_j N(x; \mu_j, \Sigma_j)$. Centers are drawn from the standard normal
    distribution; weights are equal and covariances the identity.

    Args:
      input_shape: Shape of one example, flattened by the model.
      num_components: Number of Gaussians.
      full: Whether covariances are matrices, or diagonals.

    Returns:
      A `Model` on the feature `x` `[batch, *input_shape]`, whose params are a dict of `weights`
      `[components]`, `centers` `[components, features]` and `covariances`, `[components, features]`
      or `[components, features, features]`, with the metric `loss`.

    Raises:
      ValueError: `num_components` is below 1, or `full` no switch.

    >>> import jax
    >>> params, _ = gaussians((2,), 3).init(jax.random.key(0))
    >>> jax.tree.map(jax.numpy.shape, params)
    {'centers': (3, 2), 'covariances': (3, 2), 'weights': (3,)}
    """
    components = _validate.integer("num_components", num_components, minimum=1)
    _validate.choice("full", full, (True, False))
    features = math.prod(input_shape)

    def init(key: jax.Array) -> Mixture:
        one = jnp.eye(features) if full else jnp.ones(features)
        return {
            "weights": jnp.full(components, 1 / components),
            "centers": jax.random.normal(key, (components, features)),
            "covariances": jnp.broadcast_to(one, (components, *one.shape)),
        }

    def loss(mixture: Mixture, batch: Batch) -> jax.Array:
        x = points(batch, mixture["centers"].shape[1])
        return -jax.nn.logsumexp(log_joint(mixture, x), axis=-1)

    return function_model(loss, init)


def form_of(model: Model, like: PyTree, call: str) -> PyTree:
    """The form of the params that a model draws.

    Raises:
      TypeError: It is no model.
      ValueError: They are not of the structure of those of the function that `call` calls.
    """
    _validate.instance("model", model, Model, call)
    form = drawn_by(model)
    given: Any = jax.tree.structure(form)
    if given != jax.tree.structure(like):
        shown = jax.tree.map(_validate.form, form)
        raise ValueError(f"model draws params {shown}; pass {call}.")
    return form


def points(batch: Batch, num_features: int) -> jax.Array:
    """The examples of a batch, flattened, `[batch, features]`.

    Raises:
      ValueError: They have another number of features.
    """
    with _validate.reading(batch):
        x = batch["x"]
    if math.prod(x.shape[1:]) != num_features:
        raise ValueError(
            f"feature 'x' is {_validate.form(x)} in a batch, and params are for {num_features}"
            " features; pass clients and params with as many."
        )
    return x.reshape(-1, num_features)


def log_joint(mixture: Mixture, x: jax.Array) -> jax.Array:
    """Logarithms of the weighted densities of each component, `[batch, components]`."""
    centers, covariances = mixture["centers"], mixture["covariances"]
    if covariances.ndim == 2:
        deviations = jnp.sqrt(covariances)
        densities = jax.scipy.stats.norm.logpdf(x[:, None], centers, deviations).sum(-1)
    else:
        density: Any = jax.scipy.stats.multivariate_normal.logpdf
        densities = jax.vmap(density, (None, 0, 0), 1)(x, centers, covariances)
    return jnp.log(mixture["weights"]) + densities
