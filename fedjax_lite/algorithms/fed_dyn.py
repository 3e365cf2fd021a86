"""FedDyn: clients descend objectives whose common minimum is that of the mean loss."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.algorithms import local, server
from fedjax_lite.algorithms.options import StoreOptions, complete, documented
from fedjax_lite.algorithms.training import local_training, proximal
from fedjax_lite.base import (
    Batch,
    Client,
    ClientResult,
    FederatedAlgorithm,
    PyTree,
    ServerState,
)
from fedjax_lite.models.model import Model


class FedDynState(NamedTuple):
    """What the server keeps, in `state.opt_state`.

    Attributes:
      inner: State of the server optimizer.
      h: The mean over all clients of $-g_i$, what they keep.
    """

    inner: PyTree
    h: PyTree


@documented
def fed_dyn(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    alpha: ArrayLike,
    **options: Unpack[StoreOptions],
) -> FederatedAlgorithm:
    r"""FedDyn: FedAvg with a dynamic regularizer, by which all clients agree where they end.

    Client $i$ keeps an estimate $g_i$ of its gradient, zero at first. It starts from the server's
    params $w$, and its local steps descend

    $$f_i(w_i) - \langle g_i, w_i \rangle + \frac{\alpha}{2} \|w_i - w\|^2 .$$

    After them, $g_i \leftarrow g_i - \alpha (w_i - w)$, which is $\nabla f_i(w_i)$ if $w_i$ is a
    minimum of that. With $N$ clients in the population, and $P$ in the round, the server computes

    $$h \leftarrow h - \frac{\alpha}{N} \sum_{i \in P} (w_i - w), \qquad
      w \leftarrow \frac{1}{|P|} \sum_{i \in P} w_i - \frac{1}{\alpha} h .$$

    The server optimizer is given $w$ before minus $w$ after as its gradient.

    Clients weigh alike: with weights in the means over $P$, $h$ would not be a mean of $-g_i$, and
    where training ends would depend on who takes part.

    Reference implementations differ. The authors' code divides $\alpha$ by the client's share of
    the examples, and clips local gradients with the regularizer's linear terms in them. PFLlib's
    takes the norm where its square belongs.

    Source: Acar et al. (2021), "Federated Learning Based on Dynamic Regularization".

    Args:
      model: The model.
      client_optimizer: As in `fed_avg`. It is given the gradient of the whole objective.
      server_optimizer: Any optax transformation; `optax.sgd(1.0)` by default.
      alpha: Strength $\alpha$ of the regularizer, positive; may be traced.
      **options: Those of `StoreOptions`. What a `pipeline` makes of the updates moves $h$, too.

    Returns:
      A `FederatedAlgorithm`, whose `init` needs `num_clients`. `state.store` holds the $g_i$,
      `state.opt_state.h` is $h$. The `loss` of clients is that of the model alone.

    Raises:
      ValueError: `alpha` is not positive or no scalar; another option is out of range.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> algorithm = fed_dyn(model, optax.sgd(0.5), alpha=0.5)
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [4.0]}, "b": {"x": [8.0]}})
    >>> state = algorithm.init(jnp.float32(0.0), num_clients=2)
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(1), state, everyone)
    >>> state.store.tolist(), float(state.opt_state.h)  # One step takes clients to 2 and to 4.
    ([-1.0, -2.0], -1.5)
    >>> float(state.params)  # 3 + 1.5 / 0.5
    6.0
    """
    options = complete(fed_dyn, options)
    alpha = _validate.number("alpha", alpha, positive=True)
    regularized = proximal(alpha)

    def objective(
        loss: jax.Array,
        params: PyTree,
        shared: ServerState,
        client: Client,
        batch: Batch,
        key: jax.Array,
    ) -> jax.Array:
        linear = optax.tree.vdot(client.entry, params)
        return regularized(loss - linear, params, shared, client, batch, key)

    def finish(
        result: ClientResult, shared: ServerState, client: Client, trained: local.LocalState
    ) -> ClientResult:
        del shared, trained
        entry = optax.tree.add_scale(client.entry, alpha, result.update)
        return result._replace(
            entry=optax.tree.cast_like(entry, client.entry), statistics=jnp.ones(())
        )

    return server.federated_algorithm(
        model,
        local_training(
            model,
            client_optimizer,
            weighting="uniform",
            objective=objective,
            finish=finish,
            entry=local.zeros,
        ),
        _with_h(server.resolve_server_optimizer(server_optimizer), alpha),
        **options,
    )


def _with_h(
    inner: optax.GradientTransformationExtraArgs, alpha: ArrayLike
) -> optax.GradientTransformationExtraArgs:
    """A server optimizer that keeps $h$ beside its own state."""

    def init(params: PyTree) -> FedDynState:
        return FedDynState(inner.init(params), optax.tree.zeros_like(params))

    def update(
        updates: PyTree,
        state: FedDynState,
        params: PyTree = None,
        *,
        statistics: jax.Array,
        num_clients: int,
        **extra_args: Any,
    ) -> tuple[PyTree, FedDynState]:
        # The mean delta, times how many sent one, is their sum over P.
        h = optax.tree.add_scale(state.h, alpha * statistics / num_clients, updates)
        h = optax.tree.cast_like(h, state.h)
        moved = optax.tree.cast_like(optax.tree.add_scale(updates, 1 / alpha, h), updates)
        updates, inner_state = inner.update(moved, state.inner, params, **extra_args)
        return updates, FedDynState(inner_state, h)

    return optax.GradientTransformationExtraArgs(init, update)
