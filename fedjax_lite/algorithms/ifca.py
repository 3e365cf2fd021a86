"""IFCA: several models, of which each client trains the one that suits it best."""

import dataclasses
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from fedjax_lite import _validate
from fedjax_lite.algorithms import clusters, local, server
from fedjax_lite.algorithms.options import StoreOptions, complete, documented
from fedjax_lite.algorithms.report import num_bits
from fedjax_lite.algorithms.training import local_training
from fedjax_lite.algorithms.two_passes import summing, two_passes
from fedjax_lite.base import (
    Batch,
    Client,
    ClientResult,
    ClientUpdate,
    FederatedAlgorithm,
    PyTree,
    ServerState,
)
from fedjax_lite.models.model import Model


class IfcaState(NamedTuple):
    """What the server keeps, in `state.opt_state`.

    Attributes:
      inner: State of the server optimizer of each cluster, arrays `[clusters, ...]`.
      weights: Sums of the weights of the clients of each cluster in the last round, `[clusters]`.
    """

    inner: PyTree
    weights: jax.Array


@documented
def ifca(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    num_clusters: int,
    weighting: server.Weighting = "uniform",
    **options: Unpack[StoreOptions],
) -> FederatedAlgorithm:
    r"""IFCA: clients train that of several models which has the least loss on their examples.

    The server broadcasts $w_1, \ldots, w_k$. Client $i$ chooses

    $$j_i = \arg\min_j f_i(w_j),$$

    with $f_i$ the mean loss over all of its examples, the first of equals, and trains from
    $w_{j_i}$ on as in `fed_avg`. Each cluster has a server optimizer of its own, which steps along
    the weighted mean of the deltas of the clients that chose it; one that no client chose stays as
    it is.

    With `weighting="examples"` this is HypCluster. Models that start alike stay alike: those that
    `init` draws from a key are independent. In the authors' code, test clients choose by their loss
    on test examples; here, a client is evaluated by what it chose in its last round.

    Sources: Ghosh et al. (2020), "An Efficient Framework for Clustered Federated Learning",
    Algorithm 1 with model averaging; Mansour et al. (2020), "Three Approaches for Personalization
    with Applications to Federated Learning".

    Args:
      model: The model. What is frozen of it is the same for all clusters.
      client_optimizer: As in `fed_avg`.
      server_optimizer: Any optax transformation; `optax.sgd(1.0)` by default.
      num_clusters: $k$.
      weighting: The weight of a client in the mean of its cluster, as in `fed_avg`.
      **options: Those of `StoreOptions`. The client half of a `pipeline` acts on the delta of the
        client's own model, its server half on the means `[clusters, ...]` over all clients before
        they become those of each cluster. A `reducer` is refused.

    Returns:
      A `FederatedAlgorithm`, whose `init` needs `num_clients`, and takes params with a leading axis
      `[clusters, ...]`, which those of the state and the model state have. `state.store` holds
      the number of the cluster that each client chose last, at first 0, whose model
      `client_model(state, entry)` has. `info.clients` has `cluster_0` and so on, 1 for its clients;
      `info.metrics` has their shares of the examples. A round takes the time of $k$ more epochs
      without gradients.

    Raises:
      ValueError: `num_clusters` is below 1, or params lack their axis; a `reducer` is given;
        another option is out of range.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> algorithm = ifca(model, optax.sgd(0.5), num_clusters=2)
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [2.0]}, {"x": [4.0]}, {"x": [9.0]}])
    >>> state = algorithm.init(jnp.array([0.0, 7.0]), num_clients=3)
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1, 2])
    >>> state, info = algorithm.round(jax.random.key(1), state, everyone)
    >>> state.store.tolist()  # From 4, it is less far to 7.
    [0, 1, 1]
    >>> state.params.tolist()  # Half of the way to 2; and to the mean of 4 and 9.
    [1.0, 6.75]
    """
    options = complete(ifca, options)
    num_clusters = _validate.integer("num_clusters", num_clusters, minimum=1)
    _validate.instance("model", model, Model, "fl.function_model(loss)")
    if options["reducer"] is not None:
        raise ValueError(
            f"reducer is {options['reducer']!r}, and each cluster takes the weighted mean of its"
            " clients; leave it out."
        )
    training = local_training(model, client_optimizer, weighting=weighting)
    optimizer = server.resolve_server_optimizer(server_optimizer)

    def of_cluster(shared: ServerState, cluster: jax.Array) -> ServerState:
        params, model_state = clusters.take((shared.params, shared.model_state), cluster)
        return dataclasses.replace(shared, params=params, model_state=model_state)

    def entry(drawn: ServerState) -> jax.Array:
        for leaf in jax.tree.leaves((drawn.params, drawn.model_state)):
            if jnp.shape(leaf)[:1] != (num_clusters,):
                raise ValueError(
                    f"params have an array of shape {jnp.shape(leaf)}; pass arrays [clusters, ...]"
                    f" of {num_clusters} models, or a key."
                )
        return jnp.int32(0)

    def losses_of(shared: ServerState, client: Client, batch: Batch, key: jax.Array) -> jax.Array:
        def total(params: PyTree, model_state: PyTree) -> jax.Array:
            return local.batch_loss(model, model_state, batch, key, mean=False)(params)[0]

        return jax.vmap(total)(shared.params, shared.model_state)

    def choice(losses: jax.Array) -> dict[str, jax.Array]:
        # A model that training has spoilt is no one's choice.
        usable = jnp.isfinite(losses)
        cluster = jnp.argmin(jnp.where(usable, losses, jnp.inf)).astype(jnp.int32)
        return {"weight": usable.any(), "entry": cluster}

    def client_final(
        shared: ServerState, client: Client, trained: local.LocalState
    ) -> ClientResult:
        own = client.entry
        result = training.final(of_cluster(shared, own), client, trained)
        is_own = jax.nn.one_hot(own, num_clusters)
        return result._replace(
            update=clusters.put(optax.tree.zeros_like(shared.params), own, result.update),
            model_state=clusters.put(shared.model_state, own, result.model_state),
            statistics=result.weight * is_own,
            metrics={
                **result.metrics,
                **{f"cluster_{j}": is_own[j] for j in range(num_clusters)},
                "bits_up": num_bits(result.update),
            },
        )

    def init(params: PyTree) -> IfcaState:
        return IfcaState(jax.vmap(optimizer.init)(params), jnp.zeros(num_clusters))

    def update(
        updates: PyTree, state: IfcaState, params: PyTree, *, statistics: jax.Array, **extra: Any
    ) -> tuple[PyTree, IfcaState]:
        def step(
            update: PyTree, inner: PyTree, params: PyTree, scale: jax.Array
        ) -> tuple[PyTree, PyTree]:
            mean = optax.tree.cast_like(optax.tree.scale(scale, update), update)
            step, after = optimizer.update(mean, inner, params, **extra)
            stays = optax.tree.zeros_like(step), inner
            return jax.tree.map(
                lambda new, old: jnp.where(scale == 0, old, new), (step, after), stays
            )

        updates, inner = jax.vmap(step)(updates, state.inner, params, clusters.scales(statistics))
        return updates, IfcaState(inner, statistics)

    def settle(before: ServerState, after: ServerState) -> dict[str, PyTree]:
        """The same for model states, of which clients send those of other clusters as they were."""
        scales = clusters.scales(after.opt_state.weights)

        def mean(old: jax.Array, new: jax.Array) -> jax.Array:
            return (old + jax.vmap(jnp.multiply)(scales, new - old)).astype(old.dtype)

        return {"model_state": jax.tree.map(mean, before.model_state, after.model_state)}

    if options["pipeline"] is not None:
        options["pipeline"] = clusters.on_own(options["pipeline"])
    return two_passes(
        clusters.several(model, num_clusters),
        summing(lambda: jnp.zeros(num_clusters), losses_of, choice)._replace(entry=entry),
        ClientUpdate(
            lambda shared, client: training.init(of_cluster(shared, client.entry), client),
            training.step,
            client_final,
            entry=entry,
            client_model=lambda state, own: clusters.take((state.params, state.model_state), own),
        ),
        optax.GradientTransformationExtraArgs(init, update),
        options,
        settle=settle,
    )
