"""FedSAM: clients descend the worst loss near their params."""

from typing import Unpack

import optax
from jax.typing import ArrayLike

from fedjax_lite.algorithms import local, server
from fedjax_lite.algorithms.options import LocalOptions, complete, documented
from fedjax_lite.algorithms.training import local_training
from fedjax_lite.base import FederatedAlgorithm
from fedjax_lite.models.model import Model
from fedjax_lite.models.sharpness import sharpness_aware


@documented
def fed_sam(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    rho: ArrayLike,
    weighting: server.Weighting = "uniform",
    **options: Unpack[LocalOptions],
) -> FederatedAlgorithm:
    r"""FedSAM: FedAvg whose clients minimize how sharp the minimum is that they find.

    A local step goes along the gradient at the params of about the largest loss within a distance
    of $\rho$: `fed_avg` of `fl.sharpness_aware(model, rho)`, which other algorithms can train, too.

    Source: Qu et al. (2022), "Generalized Federated Learning via Sharpness Aware Minimization",
    Algorithm 1.

    Args:
      model: The model.
      client_optimizer: As in `fed_avg`.
      server_optimizer: Any optax transformation; `optax.sgd(1.0)` by default.
      rho: $\rho$, not negative; may be traced. With 0, this is `fed_avg` with the
        same weights.
      weighting: The weight of a client, as in `fed_avg`.
      **options: Those of `LocalOptions`.

    Returns:
      A `FederatedAlgorithm`, as `fed_avg` does. The `loss` of clients is that of the model. A
      local step takes two gradients.

    Raises:
      ValueError: `rho` is negative or no scalar; another option is out of range.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> algorithm = fed_sam(model, optax.sgd(0.5), rho=1.0)
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [4.0]}})
    >>> cohort = fl.cohort_of(dataset.resident(), [0])
    >>> state, info = algorithm.round(jax.random.key(1), algorithm.init(jnp.float32(0.0)), cohort)
    >>> float(state.params)  # Half of the gradient at -1.
    2.5
    """
    options = complete(fed_sam, options)
    return server.federated_algorithm(
        model,
        local_training(sharpness_aware(model, rho), client_optimizer, weighting=weighting),
        server.resolve_server_optimizer(server_optimizer),
        **options,
    )
