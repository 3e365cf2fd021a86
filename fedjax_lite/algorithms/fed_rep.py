"""FedRep: clients share a representation, and fit heads of their own to it."""

from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from fedjax_lite import _validate
from fedjax_lite.algorithms import local, server
from fedjax_lite.algorithms.options import StoreOptions, complete, documented
from fedjax_lite.algorithms.training import local_training
from fedjax_lite.base import Batch, Client, FederatedAlgorithm, PyTree, ServerState
from fedjax_lite.models.model import Model
from fedjax_lite.models.names import Names, matching, merge, split


@documented
def fed_rep(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    personal: Names,
    num_head_epochs: int,
    weighting: server.Weighting = "uniform",
    **options: Unpack[StoreOptions],
) -> FederatedAlgorithm:
    r"""FedRep: clients train a head of their own, and then the body that all share.

    Params are a body $w$, which the server has, and a head $h_i$ of each client, which never leaves
    it. In a round, from $w_i = w$ on,

    - in its first epochs, `num_head_epochs` of them, a client takes steps on
      $\nabla_{h_i} f(w, h_i)$,
    - in all local steps that follow, on $\nabla_{w_i} f(w_i, h_i)$.

    The server steps along the weighted mean of $w - w_i$. With `num_head_epochs=0`, heads stay as
    they are drawn, as in FedBABU.

    The paper's experiments have ten epochs for the head and one or more for the body. Of several
    epochs, FL-bench takes the last one for the body; PFLlib takes one for each. Both weigh clients
    by their examples.

    Source: Collins et al. (2021), "Exploiting Shared Representations for Personalized Federated
    Learning", Algorithm 1.

    Args:
      model: The model.
      client_optimizer: As in `fed_avg`. For head and body it has a state of its own, fresh in each
        round; what is not trained does not move, whatever the optimizer.
      server_optimizer: Any optax transformation; `optax.sgd(1.0)` by default.
      personal: Which params are the head: a pattern of their names such as `"Dense_1/*"`, several,
        or a function `name -> bool`. Model state that matches stays with clients, too.
      num_head_epochs: How many epochs of the head come first. There are `num_epochs` in all, or
        `num_steps` local steps.
      weighting: The weight of a client, as in `fed_avg`.
      **options: Those of `StoreOptions`.

    Returns:
      A `FederatedAlgorithm`, whose `init` needs `num_clients`. State and evaluation are those of
      `fed_avg` with the same `personal`. A local step computes the gradient of all params.

    Raises:
      ValueError: `num_head_epochs` is negative, or leaves no epoch for the body; another option is
        out of range. In `algorithm.init`, `personal` matches nothing.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> def loss(params, batch):
    ...     return (params["head"] * params["body"] - batch["x"]) ** 2 / 2
    >>> model = fl.function_model(loss)
    >>> algorithm = fed_rep(
    ...     model, optax.sgd(0.5), personal="head", num_head_epochs=1, num_epochs=2
    ... )
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [3.0]}, {"x": [5.0]}])
    >>> params = {"body": jnp.float32(1.0), "head": jnp.float32(1.0)}
    >>> state = algorithm.init(params, num_clients=2)
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(1), state, everyone)
    >>> own_params, own_model_state = state.store.personal
    >>> own_params["head"].tolist()  # 1 + (3 - 1) / 2, and 1 + (5 - 1) / 2.
    [2.0, 3.0]
    >>> float(state.params["body"])  # The mean of 1 + 2 (3 - 2) / 2 and 1 + 3 (5 - 3) / 2.
    3.0
    """
    options = complete(fed_rep, options)
    num_head_epochs = _validate.integer("num_head_epochs", num_head_epochs, minimum=0)
    num_epochs = options["num_epochs"]
    if options["num_steps"] is None and not callable(num_epochs) and num_head_epochs >= num_epochs:
        raise ValueError(
            f"num_head_epochs is {num_head_epochs} and num_epochs {num_epochs}, which leaves none"
            " for the body; choose more num_epochs, which are those of the head as well."
        )
    training = local_training(model, client_optimizer, weighting=weighting, personal=personal)
    optimizer = local.resolve_optimizer(client_optimizer)
    is_head = matching("personal", personal)

    def one_part(
        shared: ServerState, trains_head: jax.Array | bool
    ) -> optax.GradientTransformation:
        """The client optimizer for body and head, of which one moves."""

        def init(params: PyTree) -> PyTree:
            return tuple(optimizer(shared).init(part) for part in split(params, is_head))

        def update(gradient: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
            parts = zip(split(gradient, is_head), state, split(params, is_head), strict=True)
            moved = []
            for moves, (own, before, at) in zip((~trains_head, trains_head), parts, strict=True):
                stays = optax.tree.zeros_like(own), before
                new = optimizer(shared).update(own, before, at)
                moved.append(jax.tree.map(lambda x, y, m=moves: jnp.where(m, x, y), new, stays))
            (body, body_state), (head, head_state) = moved
            return merge(body, head), (body_state, head_state)

        return optax.GradientTransformation(init, update)

    def client_init(shared: ServerState, client: Client) -> local.LocalState:
        trained = training.init(shared, client)
        return trained._replace(opt_state=one_part(shared, True).init(trained.params))

    def client_step(
        shared: ServerState,
        client: Client,
        trained: local.LocalState,
        batch: Batch,
        key: jax.Array,
    ) -> local.LocalState:
        gradient, aux = local.gradient(model, trained.params, trained, batch, key)
        trains_head = trained.num_examples < num_head_epochs * client.num_examples
        return local.descend(one_part(shared, trains_head), trained, gradient, aux, batch)

    return server.federated_algorithm(
        model,
        training._replace(init=client_init, step=client_step),
        server.resolve_server_optimizer(server_optimizer),
        **options,
    )
