"""FedNTD: clients keep what the server's model says of the classes that are not the true one."""

from collections.abc import Callable
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
def fed_ntd(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    beta: ArrayLike = 1.0,
    temperature: ArrayLike = 1.0,
    logits: Callable[[PyTree, PyTree, Batch], jax.Array] | None = None,
    weighting: server.Weighting = "examples",
    **options: Unpack[LocalOptions],
) -> FederatedAlgorithm:
    r"""FedNTD: FedAvg with distillation from the server's model, the true classes left out.

    With $q_c = \exp(z_c / \tau) / \sum_{c' \ne y} \exp(z_{c'} / \tau)$ for the classes $c \ne y$ of
    an example, $z$ its logits at the params $w_i$ of the client, and $q^s$ the same at the params
    $w$ that the server sent, a local step goes along the gradient of the mean over a batch of

    $$\ell + \beta \tau^2 \sum_{c \ne y} q^s_c \log \frac{q^s_c}{q_c} .$$

    So a client with few classes does not forget the others. $\tau^2$ is that of the authors' code.
    Logits are those of evaluation, with the model state of the server; the authors' code has $z$ in
    training mode.

    Source: Lee et al. (2022), "Preservation of the Global Knowledge by Not-True Distillation in
    Federated Learning".

    Args:
      model: A classifier, with the labels in the feature `y`, integers `[batch]`.
      client_optimizer: As in `fed_avg`.
      server_optimizer: Any optax transformation; `optax.sgd(1.0)` by default.
      beta: $\beta$, not negative; may be traced. With 0, this is `fed_avg`.
      temperature: $\tau$, positive; may be traced.
      logits: `logits(params, model_state, batch) -> [batch, classes]`; the predictions of the model
        by default.
      weighting: The weight of a client, as in `fed_avg`.
      **options: Those of `LocalOptions`.

    Returns:
      A `FederatedAlgorithm`, as `fed_avg` does. The `loss` of clients is that of the model. A local
      step takes a gradient and logits twice.

    Raises:
      ValueError: `beta` is negative, `temperature` not positive, or one no scalar; the model has
        no predictions and `logits` is left out; another option is out of range. In a round, logits
        are no array `[batch, classes]`.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(
    ...     lambda w, batch: -batch["x"] @ w, predict=lambda w, batch: jnp.tile(w, (1, 1))
    ... )
    >>> algorithm = fed_ntd(model, optax.sgd(jnp.log(3.0)), num_steps=2, beta=2.0)
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [[0.0, 0.0, 1.0]], "y": [0]}])
    >>> cohort = fl.cohort_of(dataset.resident(), [0])
    >>> state, info = algorithm.round(jax.random.key(1), algorithm.init(jnp.zeros(3)), cohort)
    >>> # The first step makes q (1/4, 3/4) of (1/2, 1/2): in the second, 2 / 4 is taken back.
    >>> (state.params / jnp.log(3.0)).round(4).tolist()
    [0.0, 0.5, 1.5]
    """
    options = complete(fed_ntd, options)
    beta = _validate.number("beta", beta)
    temperature = _validate.number("temperature", temperature, positive=True)
    _validate.instance("model", model, Model, "fl.models.logistic((64,), 10)")
    predict = model.predict if logits is None else logits
    if predict is None:
        raise ValueError(
            "logits is None, and the model has no predictions; pass a function logits(params,"
            " model_state, batch) that returns an array [batch, classes]."
        )

    def log_not_true(params: PyTree, shared: ServerState, batch: Batch) -> jax.Array:
        """`[batch, classes]`, the logarithm of $q$, and of zero for the true classes."""
        with _validate.reading(batch):
            z, labels = predict(params, shared.model_state, batch), batch["y"]
        remedy = "pass a function that returns an array [batch, classes]."
        _validate.row_per_example("logits are", z, batch["mask"].shape[0], remedy)
        is_true = labels[:, None] == jnp.arange(z.shape[1])
        return jax.nn.log_softmax(jnp.where(is_true, jnp.finfo(z.dtype).min, z / temperature))

    def objective(
        loss: jax.Array,
        params: PyTree,
        shared: ServerState,
        client: Client,
        batch: Batch,
        key: jax.Array,
    ) -> jax.Array:
        del client, key
        student, teacher = (log_not_true(p, shared, batch) for p in (params, shared.params))
        divergence = optax.losses.kl_divergence_with_log_targets(student, teacher)
        return loss + beta * temperature**2 * local.mean_over(batch, divergence)

    return server.federated_algorithm(
        model,
        local_training(model, client_optimizer, weighting=weighting, objective=objective),
        server.resolve_server_optimizer(server_optimizer),
        **options,
    )
