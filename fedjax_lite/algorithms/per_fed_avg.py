"""Per-FedAvg: params from which one gradient step makes a good model for each client."""

from typing import Unpack

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.algorithms import local, server
from fedjax_lite.algorithms.options import LocalOptions, complete, documented
from fedjax_lite.algorithms.training import local_training
from fedjax_lite.base import Batch, Client, FederatedAlgorithm, PyTree, ServerState
from fedjax_lite.models.model import Model


@documented
def per_fed_avg(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    alpha: ArrayLike,
    first_order: bool = True,
    weighting: server.Weighting = "uniform",
    **options: Unpack[LocalOptions],
) -> FederatedAlgorithm:
    r"""Per-FedAvg: FedAvg on the losses that clients have after a gradient step of their own.

    It minimizes the mean of $F_i(w) = f_i(w - \alpha \nabla f_i(w))$. In a local step, the examples
    of a batch are dealt to two halves, on which the loss is $f$ and $f'$, and the client optimizer
    is given the gradient of $f'(w_i - \alpha \nabla f(w_i))$ with respect to $w_i$:

    - `first_order=True`: $\nabla f'(u)$ with $u = w_i - \alpha \nabla f(w_i)$, the paper's
      Per-FedAvg (FO),
    - `first_order=False`: $(I - \alpha \nabla^2 f(w_i)) \nabla f'(u)$, by automatic
      differentiation.

    Reference implementations differ in what the two batches are, and in the Hessian: the paper
    draws a third batch for it, and its Per-FedAvg (HF) takes a difference of gradients. A batch of
    one example here is both halves.

    A client's model is what one step of gradient descent at the rate $\alpha$ makes of the
    server's params: `fl.evaluate_fine_tuned`.

    Source: Fallah et al. (2020), "Personalized Federated Learning with Theoretical Guarantees: A
    Model-Agnostic Meta-Learning Approach", Algorithm 1.

    Args:
      model: The model.
      client_optimizer: As in `fed_avg`; SGD at the rate $\beta$ in the paper.
      server_optimizer: Any optax transformation; `optax.sgd(1.0)` by default.
      alpha: $\alpha$, the rate of the clients' own step, not negative; may be traced.
      first_order: Whether second derivatives are left out.
      weighting: The weight of a client, as in `fed_avg`.
      **options: Those of `LocalOptions`. A batch holds both halves.

    Returns:
      A `FederatedAlgorithm`, as `fed_avg` does. The `loss` of clients is that of $f$ at $w_i$ and
      of $f'$ at $u$.

    Raises:
      ValueError: `alpha` is negative or no scalar; another option is out of range.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [4.0, 4.0]}})
    >>> cohort = fl.cohort_of(dataset.resident(), [0])
    >>> for first_order in (True, False):  # From u = 2, the gradient is -2; or half of it.
    ...     algorithm = per_fed_avg(model, optax.sgd(1.0), alpha=0.5, first_order=first_order)
    ...     state = algorithm.init(jnp.float32(0.0))
    ...     state, info = algorithm.round(jax.random.key(1), state, cohort)
    ...     print(float(state.params))
    2.0
    1.0
    """
    options = complete(per_fed_avg, options)
    alpha = _validate.number("alpha", alpha)
    _validate.choice("first_order", first_order, (True, False))
    training = local_training(model, client_optimizer, weighting=weighting)
    optimizer = local.resolve_optimizer(client_optimizer)

    def client_step(
        shared: ServerState,
        client: Client,
        trained: local.LocalState,
        batch: Batch,
        key: jax.Array,
    ) -> local.LocalState:
        del client
        first, second = _halves(batch)

        def after_own_step(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
            own, (before, _) = local.gradient(model, params, trained, first, key)
            if first_order:
                own = jax.lax.stop_gradient(own)
            moved = jax.tree.map(lambda w, g: (w - alpha * g).astype(w.dtype), params, own)
            loss = local.batch_loss(model, trained.model_state, second, key, mean=True)
            value, (after, model_state) = loss(moved)
            return value, (before + after, model_state)

        gradient, aux = jax.grad(after_own_step, has_aux=True)(trained.params)
        return local.descend(optimizer(shared), trained, gradient, aux, batch)

    return server.federated_algorithm(
        model,
        training._replace(step=client_step),
        server.resolve_server_optimizer(server_optimizer),
        **options,
    )


def _halves(batch: Batch) -> tuple[Batch, Batch]:
    """A batch whose mask has every other real example, and one with the rest.

    They are told apart by their rank among the real ones: where in the batch these are depends on
    how it was read. A single example is in both.
    """
    mask = batch["mask"]
    is_odd = jnp.cumsum(mask) % 2 == 1
    second = jnp.where(mask.sum() == 1, mask, mask & ~is_odd)
    return {**batch, "mask": mask & is_odd}, {**batch, "mask": second}
