"""Federated k-means: clients send sums of their examples by the nearest centroid."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from fedjax_lite import _validate
from fedjax_lite.algorithms import server
from fedjax_lite.algorithms.options import RoundOptions, complete, documented
from fedjax_lite.base import (
    Batch,
    Client,
    ClientResult,
    ClientUpdate,
    FederatedAlgorithm,
    PyTree,
    Reducer,
    ServerState,
)
from fedjax_lite.models.clusters import form_of, points
from fedjax_lite.models.model import Model
from fedjax_lite.updates.reducers import weighted_mean


class _Sums(NamedTuple):
    moves: jax.Array  # Of centroids less their examples, `[clusters, features]`.
    counts: jax.Array
    loss: jax.Array


@documented
def k_means(
    model: Model,
    *,
    keep_counts: bool = True,
    **options: Unpack[RoundOptions],
) -> FederatedAlgorithm:
    r"""k-means: each centroid becomes the mean of the examples that are nearest to it.

    Of the examples of a round, $n_j$ are nearest to the centroid $\mu_j$, in squared distance and
    the first of equals. With $c_j$ the number of those that it has had before, and 1 at first,

    $$\mu_j \leftarrow \frac{c_j \mu_j + \sum_{x \in j} x}{c_j + n_j}, \qquad
      c_j \leftarrow c_j + n_j ,$$

    so that cohorts are the mini-batches of Sculley (2010). With `keep_counts=False`, $c_j = 0$ in
    each round: Lloyd's algorithm on the examples of the cohort. A centroid without examples stays.

    TensorFlow Federated has the same rule and first counts, and draws centroids from a normal
    distribution.

    Source: Sculley (2010), "Web-Scale K-Means Clustering"; in federated learning, TensorFlow
    Federated's `build_fed_kmeans`.

    Args:
      model: `fl.models.centroids(input_shape, num_clusters)`.
      keep_counts: Whether $c_j$ goes on from round to round.
      **options: Those of `RoundOptions`. A `pipeline` acts on sums of $\mu_j - x$; a `reducer` is
        refused.

    Returns:
      A `FederatedAlgorithm`, whose `init` takes a key, or centroids `[clusters, features]`, such as
      examples that the server has. `state.params` are the centroids, `state.opt_state` is $c$, and
      `loss` is the mean squared distance to the nearest of those that the round began with.

    Raises:
      ValueError: `model` is another one; a `reducer` is given; another option is out of range; in
        `init`, the centroids are others than those of the model; in a round, examples have another
        number of features.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> algorithm = k_means(fl.models.centroids((1,), 2))
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [[1.0], [9.0]]}, {"x": [[2.0]]}])
    >>> state = algorithm.init(jnp.array([[0.0], [10.0]]))
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(0), state, everyone)
    >>> state.params.tolist(), state.opt_state.tolist()  # (0 + 1 + 2) / 3, and (10 + 9) / 2.
    ([[1.0], [9.5]], [3.0, 2.0])
    >>> float(info.loss)  # The mean of 1, 1 and 4.
    2.0
    """
    options = complete(k_means, options)
    form = form_of(model, 0, "fl.models.centroids(input_shape, num_clusters)")
    _validate.choice("keep_counts", keep_counts, (True, False))

    def client_init(shared: ServerState, client: Client) -> _Sums:
        del client
        centroids = shared.params
        return _Sums(jnp.zeros_like(centroids), jnp.zeros(len(centroids)), jnp.zeros(()))

    def client_step(
        shared: ServerState, client: Client, sums: _Sums, batch: Batch, key: jax.Array
    ) -> _Sums:
        del client, key
        centroids = shared.params
        moves = centroids - points(batch, centroids.shape[1])[:, None]
        distances = jnp.square(moves).sum(-1)
        own = jax.nn.one_hot(distances.argmin(-1), len(centroids), dtype=moves.dtype)
        own = jnp.where(batch["mask"][:, None], own, 0)
        return _Sums(
            sums.moves + jnp.einsum("bk,bkf->kf", own, moves),
            sums.counts + own.sum(0),
            sums.loss + jnp.vdot(own, distances),
        )

    def client_final(shared: ServerState, client: Client, sums: _Sums) -> ClientResult:
        del shared
        mean = sums.loss / jnp.maximum(client.num_examples, 1)
        return ClientResult(sums.moves, 1.0, {"loss": mean}, statistics=sums.counts)

    def init(centroids: PyTree) -> jax.Array:
        remedy = "pass algorithm.init a key, or as many centroids."
        _validate.same_form("params", centroids, form, remedy, dtypes=False)
        return jnp.ones(len(centroids))

    def update(
        moves: jax.Array,
        counts: jax.Array,
        centroids: PyTree,
        *,
        statistics: jax.Array,
        **extra_args: Any,
    ) -> tuple[jax.Array, jax.Array]:
        del centroids, extra_args
        after = statistics + (counts if keep_counts else 0)
        return -moves / jnp.where(after == 0, 1, after)[:, None], after

    options["reducer"] = adding_up(options["reducer"])
    return server.federated_algorithm(
        model,
        ClientUpdate(client_init, client_step, client_final),
        optax.GradientTransformationExtraArgs(init, update),
        shuffle=False,
        **options,
    )


def adding_up(reducer: Reducer | None) -> Reducer:
    """The reducer of sums of examples.

    Raises:
      ValueError: There is another one.
    """
    if reducer is not None:
        raise ValueError(
            f"reducer is {reducer!r}, and what clients send are sums, which add up; leave it out."
        )
    return weighted_mean(denominator=1.0)
