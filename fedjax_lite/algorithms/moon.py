"""MOON: clients keep their features close to the server's, and away from their own last ones."""

from collections.abc import Callable
from typing import Unpack

import jax
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.algorithms import local, personal, server
from fedjax_lite.algorithms.options import StoreOptions, complete, documented
from fedjax_lite.algorithms.training import local_training
from fedjax_lite.base import (
    Batch,
    Client,
    ClientResult,
    FederatedAlgorithm,
    PyTree,
    ServerState,
)
from fedjax_lite.models.linen import last_inputs
from fedjax_lite.models.model import Model

_SMALLEST = 1e-16  # Of squared norms: features of zero have no direction. PyTorch's.


@documented
def moon(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    mu: ArrayLike,
    temperature: ArrayLike = 0.5,
    features: Callable[[PyTree, PyTree, Batch], jax.Array] | None = None,
    weighting: server.Weighting = "examples",
    **options: Unpack[StoreOptions],
) -> FederatedAlgorithm:
    r"""MOON: FedAvg with a contrastive loss between models.

    With $z$ the features of an example at the params $w_i$ of the client, $z_s$ those at the params
    $w$ that the server sent, and $z_p$ those at the params with which the client ended the last
    round that it took part in, a local step goes along the gradient of the mean over a batch of

    $$\ell - \mu \log \frac{\exp(\cos(z, z_s) / \tau)}
      {\exp(\cos(z, z_s) / \tau) + \exp(\cos(z, z_p) / \tau)} .$$

    In a client's first round $z_p = z_s$, and the second term moves nothing; in the authors' code,
    $z_p$ is then of a model that the client draws for itself. Features are those of evaluation,
    with the model state of the server; the authors' code has $z$ in training mode.

    Source: Li et al. (2021), "Model-Contrastive Federated Learning", Algorithm 1.

    Args:
      model: The model. The paper's has a small network between features and the last layer.
      client_optimizer: As in `fed_avg`.
      server_optimizer: Any optax transformation; `optax.sgd(1.0)` by default.
      mu: $\mu$, not negative; may be traced. The paper has 5, 1 and others by data set.
      temperature: $\tau$, positive; may be traced.
      features: `features(params, model_state, batch) -> [batch, dim]`; by default, of a model of a
        flax linen module, what its last dense layer is given.
      weighting: The weight of a client, as in `fed_avg`.
      **options: Those of `StoreOptions`.

    Returns:
      A `FederatedAlgorithm`, as `fed_avg` does, whose `init` needs `num_clients`. `state.store`
      holds the last params of each client. The `loss` of clients is that of the model. A local
      step takes a gradient and features three times.

    Raises:
      ValueError: `mu` is negative, `temperature` not positive, or one no scalar; another option is
        out of range. In a round, `features` returns no array `[batch, dim]`, or is left out and the
        model has no dense layer.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])  # Gradients are -x.
    >>> def features(w, model_state, batch):  # An angle.
    ...     return jnp.ones((batch["x"].size, 1)) * jnp.stack([jnp.cos(w), jnp.sin(w)])
    >>> algorithm = moon(model, optax.sgd(1.0), mu=1.0, temperature=1.0, features=features)
    >>> population = fl.FederatedDataset.from_clients([{"x": [0.0]}, {"x": [jnp.pi]}]).resident()
    >>> state = algorithm.init(jnp.float32(0.0), num_clients=2)
    >>> for clients in [0, 1], [0]:
    ...     cohort = fl.cohort_of(population, clients)
    ...     state, info = algorithm.round(jax.random.key(1), state, cohort)
    >>> # After pi / 2, one step away from 0, where the client was: by 1 / (1 + e), for the cosines
    >>> # are 1 and 0, and that of 0 falls at the rate of 1.
    >>> round(float(state.params - jnp.pi / 2), 4), round(1 / (1 + jnp.e), 4)
    (0.2689, 0.2689)
    """
    options = complete(moon, options)
    mu = _validate.number("mu", mu)
    temperature = _validate.number("temperature", temperature, positive=True)
    features_of = last_inputs(model) if features is None else features

    def objective(
        loss: jax.Array,
        params: PyTree,
        shared: ServerState,
        client: Client,
        batch: Batch,
        key: jax.Array,
    ) -> jax.Array:
        del key

        def at(params: PyTree) -> jax.Array:
            with _validate.reading(batch):
                z = features_of(params, shared.model_state, batch)
            remedy = "return an array [batch, dim]."
            _validate.row_per_example("features returned", z, batch["mask"].shape[0], remedy)
            return z

        z = at(params)
        to_server, to_previous = (
            optax.losses.cosine_similarity(z, at(other), epsilon=_SMALLEST)
            for other in (shared.params, personal.client_model(shared, client.entry)[0])
        )
        contrast = jax.nn.softplus((to_previous - to_server) / temperature)
        return loss + mu * local.mean_over(batch, contrast)

    def finish(
        result: ClientResult, shared: ServerState, client: Client, trained: local.LocalState
    ) -> ClientResult:
        del shared
        kept = personal.Personal(trained.params, client.entry.num_rounds + 1)
        return result._replace(entry=kept)

    return server.federated_algorithm(
        model,
        local_training(
            model,
            client_optimizer,
            weighting=weighting,
            objective=objective,
            finish=finish,
            entry=personal.entry,
        ),
        server.resolve_server_optimizer(server_optimizer),
        **options,
    )
