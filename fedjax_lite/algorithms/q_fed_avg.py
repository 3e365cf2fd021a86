"""q-FedAvg: the larger a client's loss, the more it counts."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.algorithms import local, server
from fedjax_lite.algorithms.options import LocalOptions, complete, documented
from fedjax_lite.algorithms.training import local_training
from fedjax_lite.base import (
    Batch,
    Client,
    ClientResult,
    ClientUpdate,
    FederatedAlgorithm,
    ServerState,
)
from fedjax_lite.models.model import Model
from fedjax_lite.xla.precision import squared_norm

_SMALLEST = 1e-10  # Added to losses by the authors: of 0, a power below 0 is infinite.


class _ClientState(NamedTuple):
    trained: local.LocalState
    loss: jax.Array


@documented
def q_fed_avg(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    q: ArrayLike,
    lipschitz: ArrayLike,
    **options: Unpack[LocalOptions],
) -> FederatedAlgorithm:
    r"""q-FedAvg: FedAvg that is fair to clients with large losses.

    It minimizes $\sum_i F_i(w)^{q+1} / (q+1)$, with $F_i$ the mean loss of client $i$. With $w$ the
    server's params, $w_i$ where client $i$ ends, and $L$ an estimate of the Lipschitz constant of
    the gradients, client $i$ computes

    $$\Delta w_i = L (w - w_i), \qquad
      \Delta_i = F_i(w)^q \Delta w_i, \qquad
      h_i = q F_i(w)^{q-1} \|\Delta w_i\|^2 + L F_i(w)^q ,$$

    and the server $w \leftarrow w - \sum_i \Delta_i / \sum_i h_i$, over the clients of the round.

    Source: Li et al. (2020), "Fair Resource Allocation in Federated Learning", Algorithm 2. As
    in the authors' code, $10^{-10}$ is added to $F_i$.

    Args:
      model: The model; its losses are not negative.
      client_optimizer: As in `fed_avg`; SGD in the paper.
      server_optimizer: Any optax transformation, which is given $\sum_i \Delta_i / \sum_i h_i$;
        `optax.sgd(1.0)` by default.
      q: $q$, not negative; may be traced. With 0, this is `fed_avg` with uniform weights.
      lipschitz: $L$, positive; may be traced. The paper takes 1 over the client's learning rate.
      **options: Those of `LocalOptions`. A `pipeline` acts on $\Delta_i / h_i$, whose weights are
        the $h_i$.

    Returns:
      A `FederatedAlgorithm`, as `fed_avg` does. $F_i(w)$ is the mean over the examples that the
      client processes, at one more evaluation of the loss in each step; `info` has it as the
      metric `server_loss`.

    Raises:
      ValueError: `q` is negative or `lipschitz` not positive; another option is out of range.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> algorithm = q_fed_avg(model, optax.sgd(0.5), q=1.0, lipschitz=2.0)
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [2.0]}, "b": {"x": [4.0]}})
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(1), algorithm.init(jnp.float32(0.0)), everyone)
    >>> round(float(state.params), 5)  # Losses 2 and 8: (2 * 2 + 8 * 4) / (4 + 4 + 16 + 16).
    0.9
    """
    options = complete(q_fed_avg, options)
    q = _validate.number("q", q)
    lipschitz = _validate.number("lipschitz", lipschitz, positive=True)
    training = local_training(model, client_optimizer, weighting="uniform")

    def client_init(shared: ServerState, client: Client) -> _ClientState:
        return _ClientState(training.init(shared, client), jnp.zeros(()))

    def client_step(
        shared: ServerState,
        client: Client,
        client_state: _ClientState,
        batch: Batch,
        key: jax.Array,
    ) -> _ClientState:
        at_server = local.batch_loss(model, shared.model_state, batch, key, mean=False)
        total, _ = at_server(shared.params)
        trained = training.step(shared, client, client_state.trained, batch, key)
        return _ClientState(trained, client_state.loss + total)

    def client_final(
        shared: ServerState, client: Client, client_state: _ClientState
    ) -> ClientResult:
        trained = client_state.trained
        result = training.final(shared, client, trained)
        server_loss = client_state.loss / jnp.maximum(trained.num_examples, 1)
        loss = server_loss + _SMALLEST
        change = optax.tree.scale(lipschitz, result.update)
        h = q * loss ** (q - 1) * squared_norm(change) + lipschitz * loss**q
        # Their mean with weights h is the sum of the paper's updates over the sum of the h.
        update = optax.tree.scale(loss**q / h, change)
        return result._replace(
            update=optax.tree.cast_like(update, result.update),
            weight=h,
            norm=None,
            metrics={**result.metrics, "server_loss": server_loss},
        )

    return server.federated_algorithm(
        model,
        ClientUpdate(client_init, client_step, client_final),
        server.resolve_server_optimizer(server_optimizer),
        **options,
    )
