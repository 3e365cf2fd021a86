"""Federated averaging: clients train, the server averages what changed."""

from typing import Unpack

import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.algorithms import local, server
from fedjax_lite.algorithms.options import StoreOptions, complete, documented
from fedjax_lite.algorithms.training import local_training, proximal
from fedjax_lite.base import FederatedAlgorithm
from fedjax_lite.models.model import Model
from fedjax_lite.models.names import Names


@documented
def fed_avg(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    weighting: server.Weighting = "examples",
    personal: Names | None = None,
    keep_optimizer_state: bool = False,
    measure_clients: bool = False,
    **options: Unpack[StoreOptions],
) -> FederatedAlgorithm:
    r"""FedAvg: clients train from the server's params, the server steps along the mean delta.

    Client $i$ starts from the server's params $w$, takes its local steps with the client
    optimizer on the mean loss of each batch, and ends at $w_i$. The server optimizer is given
    $\sum_i p_i (w - w_i) / \sum_i p_i$ as its gradient, with $p_i$ the number of examples of the
    client (`weighting="examples"`), 1 (`"uniform"`) or a function of that number.

    With `server_optimizer=optax.sgd(1.0)` this is FedAvg; momentum makes it FedAvgM, and
    `optax.adam`, `optax.yogi`, `optax.adagrad`, `optax.lamb` and `optax.lars` make it FedAdam,
    FedYogi, FedAdagrad, FedLAMB and FedLARS.

    Sources: McMahan et al. (2017), "Communication-Efficient Learning of Deep Networks from
    Decentralized Data"; Reddi et al. (2021), "Adaptive Federated Optimization".

    Args:
      model: The model.
      client_optimizer: Any optax transformation, with a fresh state for each client and round;
        or a function `round -> transformation` of the traced number of the round, such as
        `lambda round: optax.sgd(schedule(round))`, for learning rates that change between
        rounds. Chain `optax.clip_by_global_norm` before it to clip local gradients. One that
        searches for its step, such as `optax.chain(optax.sgd(1.0),
        optax.scale_by_backtracking_linesearch(15))` by Armijo's rule, or `optax.lbfgs()`, is given
        the loss of the batch as a function.
      server_optimizer: Any optax transformation; `optax.sgd(1.0)` by default.
      weighting: The weight of a client: `"examples"`, its number of examples; `"processed"`, that
        of its examples in all steps that it took, so that partial work weighs what was done;
        `"uniform"`; `"sqrt"` and `"log"`, $\sqrt{n_i}$ and $\ln(1 + n_i)$; or a
        function `num_examples -> weight`, float scalar to non-negative scalar.
      personal: Which params and model state never leave a client: a pattern of their names, such as
        `"Dense_1/*"` for the last layer (FedPer) or `"*BatchNorm*"` (FedBN), several, or a function
        `name -> bool`. They are trained with the others, and kept in `state.store`; `init`, which
        draws them for all clients alike, then needs `num_clients`, and `state.params` has `None` in
        their places. Evaluate by `fl.evaluate_clients(..., client_model=algorithm.client_model)`.
      keep_optimizer_state: A client goes on with the state of its optimizer from the last round
        that it took part in, which `state.store` keeps, and does not begin afresh; `init` then
        needs `num_clients`.
      measure_clients: Evaluate the model's metrics on the examples of each client, at the
        server's params and at those that it ends with: `info.clients` and, as means over all
        examples, `info.metrics` then have `{name}_before` and `{name}_after`. The time of two
        more epochs without gradients.
      **options: Those of `StoreOptions`.

    Returns:
      A `FederatedAlgorithm`. Its `init(key_or_params, model_state=None)` returns a
      `ServerState`, its `round(key, state, cohort)` a `ServerState` and a `RoundInfo`, in which
      a client's `loss` is the mean over the examples that it processed, each at the params of
      its step. A round in which no client contributes leaves the params alone and says so in
      `info.skipped`. Model state (BatchNorm statistics) becomes the weighted mean of the
      clients'.

    Raises:
      ValueError: An option is out of range, at once; the loss does not return one value per
        example, when the round is first run.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> algorithm = fed_avg(model, client_optimizer=optax.sgd(0.5), num_epochs=2)
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [4.0]}, "b": {"x": [8.0]}})
    >>> state = algorithm.init(jnp.float32(0.0))
    >>> everyone = fl.cohort(jax.random.key(0), dataset.resident(), 2)
    >>> state, info = algorithm.round(jax.random.key(1), state, everyone)
    >>> float(state.params)  # Two steps of 1/2 take each client 3/4 of its way: to 3 and to 6.
    4.5
    """
    options = complete(fed_avg, options)
    client_update = local_training(
        model,
        client_optimizer,
        weighting=weighting,
        personal=personal,
        keep_optimizer_state=keep_optimizer_state,
        measure_clients=measure_clients,
    )
    return server.federated_algorithm(
        model,
        client_update,
        server.resolve_server_optimizer(server_optimizer),
        **options,
    )


@documented
def fed_prox(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    mu: ArrayLike,
    weighting: server.Weighting = "examples",
    personal: Names | None = None,
    keep_optimizer_state: bool = False,
    measure_clients: bool = False,
    **options: Unpack[StoreOptions],
) -> FederatedAlgorithm:
    r"""FedProx: FedAvg whose clients are pulled towards the server's params.

    A client's step goes along the gradient of its loss plus $\mu (w_i - w)$, that of the proximal
    term $\frac{\mu}{2} \|w_i - w\|^2$, with $w$ the server's params. The sum is what the client
    optimizer is given, so that momentum sees the term once.

    Source: Li et al. (2020), "Federated Optimization in Heterogeneous Networks".

    Args:
      model: The model.
      client_optimizer: As in `fed_avg`.
      server_optimizer: Any optax transformation; `optax.sgd(1.0)` by default.
      mu: Strength of the proximal term, not negative; may be traced. With 0, this is FedAvg.
      weighting: As in `fed_avg`.
      personal: As in `fed_avg`; without the proximal term.
      keep_optimizer_state: As in `fed_avg`.
      measure_clients: As in `fed_avg`.
      **options: Those of `StoreOptions`.

    Returns:
      A `FederatedAlgorithm`, as `fed_avg` does. The `loss` of clients is that of the model,
      without the proximal term.

    Raises:
      ValueError: `mu` is negative or no scalar; another option is out of range.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> algorithm = fed_prox(model, optax.sgd(0.5), mu=1.0, num_steps=2)
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [4.0]}})
    >>> cohort = fl.cohort(jax.random.key(0), dataset.resident(), 1)
    >>> state, info = algorithm.round(jax.random.key(1), algorithm.init(jnp.float32(0.0)), cohort)
    >>> float(state.params)  # Steps from 0 to 2, then by -(2 - 4) / 2 - (2 - 0) / 2 = 0.
    2.0
    """
    options = complete(fed_prox, options)
    mu = _validate.number("mu", mu)
    client_update = local_training(
        model,
        client_optimizer,
        weighting=weighting,
        objective=proximal(mu),
        personal=personal,
        keep_optimizer_state=keep_optimizer_state,
        measure_clients=measure_clients,
    )
    return server.federated_algorithm(
        model,
        client_update,
        server.resolve_server_optimizer(server_optimizer),
        **options,
    )
