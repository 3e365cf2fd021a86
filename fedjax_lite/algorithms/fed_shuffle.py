"""FedShuffle: all clients travel alike, however many steps they take."""

from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from fedjax_lite.algorithms import local, server
from fedjax_lite.algorithms.options import LocalOptions, complete, documented
from fedjax_lite.algorithms.training import local_training
from fedjax_lite.base import Batch, Client, ClientUpdate, FederatedAlgorithm, ServerState
from fedjax_lite.models.model import Model


@documented
def fed_shuffle(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    weighting: server.Weighting = "examples",
    **options: Unpack[LocalOptions],
) -> FederatedAlgorithm:
    r"""FedShuffle: FedAvg whose clients take steps the shorter, the more of them they take.

    With $K_i$ the local steps of client $i$ in an epoch, its rate is $\eta / K_i$: each update of
    the client optimizer is divided by $K_i$. The server steps along the mean of the deltas with
    the number of examples for weights, as in `fed_avg`. So the objective that it descends is that
    of all examples, which FedAvg's is not if clients take different numbers of steps.

    The order of a client's examples is a new one in each epoch, which is the default of
    `shuffle`.

    Source: Horváth et al. (2022), "FedShuffle: Recipes for Better Use of Local Work in Federated
    Learning". There, batches are of one example, so that $K_i$ is the number of examples; and the
    sum over clients is not divided by their weights but by the probabilities that they take part
    with, so that it is right on average: with $n$ examples in a population of $N$ clients, of which
    $M$ take part, pass `reducer=fl.weighted_mean(denominator=n * M / N)`. FLSim divides the rate by
    the number of examples whatever the batch size.

    Args:
      model: The model.
      client_optimizer: As in `fed_avg`, at the rate $\eta$ of a whole epoch.
      server_optimizer: Any optax transformation; `optax.sgd(1.0)` by default.
      weighting: The weight of a client, as in `fed_avg`; `"uniform"` where clients are drawn with
        probabilities that follow their numbers of examples.
      **options: Those of `LocalOptions`. With `num_steps`, or a function for `num_epochs`, all of a
        client's steps count as one epoch.

    Returns:
      A `FederatedAlgorithm`, as `fed_avg` does.

    Raises:
      ValueError: An option is out of range.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])  # Gradients are -x.
    >>> algorithm = fed_shuffle(model, optax.sgd(1.0), batch_size=1)
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [1.0] * 3}, "b": {"x": [2.0]}})
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(1), algorithm.init(jnp.float32(0.0)), everyone)
    >>> round(float(state.params), 5)  # 3/4 * (1/3 + 1/3 + 1/3) + 1/4 * 2
    1.25
    """
    options = complete(fed_shuffle, options)
    training = local_training(model, client_optimizer, weighting=weighting)
    optimizer = local.resolve_optimizer(client_optimizer)
    num_epochs = options["num_epochs"]
    if options["num_steps"] is not None or callable(num_epochs):
        num_epochs = 1

    def scaled(shared: ServerState, client: Client) -> optax.GradientTransformation:
        steps = jnp.maximum(client.num_steps, 1).astype(float)
        return optax.chain(optimizer(shared), optax.scale(num_epochs / steps))

    def client_init(shared: ServerState, client: Client) -> local.LocalState:
        return local.start(shared, scaled(shared, client))

    def client_step(
        shared: ServerState,
        client: Client,
        trained: local.LocalState,
        batch: Batch,
        key: jax.Array,
    ) -> local.LocalState:
        gradient, aux = local.gradient(model, trained.params, trained, batch, key)
        return local.descend(scaled(shared, client), trained, gradient, aux, batch)

    return server.federated_algorithm(
        model,
        ClientUpdate(client_init, client_step, training.final),
        server.resolve_server_optimizer(server_optimizer),
        **options,
    )
