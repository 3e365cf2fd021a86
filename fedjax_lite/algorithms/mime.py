"""Mime and MimeLite: clients mimic an optimizer that sees all of their data."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from fedjax_lite.algorithms import local, server
from fedjax_lite.algorithms.fed_sgd import client_gradient
from fedjax_lite.algorithms.options import LocalOptions, complete, documented
from fedjax_lite.algorithms.training import local_training
from fedjax_lite.algorithms.two_passes import two_passes
from fedjax_lite.base import Batch, Client, FederatedAlgorithm, PyTree, ServerState
from fedjax_lite.models.model import Model


class MimeState(NamedTuple):
    """What the server keeps, in `state.opt_state`.

    Attributes:
      inner: State of the server optimizer.
      base: State $s$ of the base optimizer.
      gradient: The mean gradient $c$ of the last round, at the params that it began with.
    """

    inner: PyTree
    base: PyTree
    gradient: PyTree


@documented
def mime(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    weighting: server.Weighting = "uniform",
    **options: Unpack[LocalOptions],
) -> FederatedAlgorithm:
    r"""Mime: clients apply the server's optimizer state, and correct their gradients.

    A base optimizer turns a gradient $g$, its state $s$ and params $x$ into a step $U(g, s, x)$
    and its next state $V(g, s)$. In a round on params $w$, clients first send their full-batch
    gradients, and the server their mean,

    $$c = \frac{1}{|P|} \sum_{i \in P} \nabla f_i(w) .$$

    Then each trains from $w_i = w$ on, with $s$ left as it is: with $g_i$ the gradient of a batch,

    $$w_i \leftarrow w_i + U(g_i(w_i) - g_i(w) + c, \; s, \; w_i) .$$

    The server steps along the mean delta as in `fed_avg`, and its state advances once,
    $s \leftarrow V(c, s)$. FedJAX weighs clients by their examples in both means.

    Source: Karimireddy et al. (2021), "Breaking the Centralized Barrier for Cross-Device
    Federated Learning"; with `optax.sgd(rate, momentum)`, MimeSGDm, with `optax.adam`, MimeAdam.

    Args:
      model: The model.
      client_optimizer: The base optimizer, as in `fed_avg`.
      server_optimizer: Any optax transformation; `optax.sgd(1.0)` by default.
      weighting: The weight of a client in both means, as in `fed_avg`.
      **options: Those of `LocalOptions`. A `pipeline` and a `reducer` act on deltas, and not on
        the gradients that make $c$.

    Returns:
      A `FederatedAlgorithm`; `state.opt_state.base` is $s$, `state.opt_state.gradient` is $c$. A
      round takes the time of one more epoch for $c$, which does not heed a cohort's `max_steps`,
      and of a second gradient in each local step.

    Raises:
      ValueError: An option is out of range.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> algorithm = mime(model, optax.sgd(0.5, momentum=0.5), num_steps=2)
    >>> dataset = fl.FederatedDataset.from_clients({"a": {"x": [4.0]}, "b": {"x": [8.0]}})
    >>> state = algorithm.init(jnp.float32(0.0))
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(1), state, everyone)
    >>> float(state.opt_state.gradient)  # The mean of -4 and -8.
    -6.0
    >>> float(state.params)  # Both go from 0 to 3, where the corrected gradient is 3 - 6, to 4.5.
    4.5
    """
    options = complete(mime, options)
    return _mimicking(model, client_optimizer, server_optimizer, weighting, options, corrects=True)


@documented
def mime_lite(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    weighting: server.Weighting = "uniform",
    **options: Unpack[LocalOptions],
) -> FederatedAlgorithm:
    r"""MimeLite: Mime without the correction of local gradients.

    Local steps are $w_i \leftarrow w_i + U(g_i(w_i), s, w_i)$; all else is as in `mime`, and of the
    same paper. With a base optimizer without state, such as `optax.sgd`, this is `fed_avg`.

    TensorFlow Federated advances $s$ as if the params were zero, so that weight decay does not
    enter it; here, they are those that the round begins with.

    Args:
      model: The model.
      client_optimizer: The base optimizer, as in `mime`.
      server_optimizer: As in `mime`.
      weighting: As in `mime`.
      **options: Those of `LocalOptions`, as in `mime`.

    Returns:
      A `FederatedAlgorithm`, as `mime` does. A round takes the time of one more epoch for $c$.

    Raises:
      ValueError: An option is out of range.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: -w * batch["x"])  # Gradients are -x.
    >>> algorithm = mime_lite(model, optax.sgd(1.0, momentum=0.5))
    >>> population = fl.FederatedDataset.from_clients([{"x": [4.0]}, {"x": [8.0]}]).resident()
    >>> state = algorithm.init(jnp.float32(0.0))
    >>> for client in (0, 1):
    ...     cohort = fl.cohort_of(population, [client])
    ...     state, info = algorithm.round(jax.random.key(1), state, cohort)
    >>> float(state.params)  # Steps of 4, and of 8 + 4 / 2.
    14.0
    """
    options = complete(mime_lite, options)
    return _mimicking(model, client_optimizer, server_optimizer, weighting, options, corrects=False)


def _mimicking(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None,
    weighting: server.Weighting,
    options: LocalOptions,
    *,
    corrects: bool,
) -> FederatedAlgorithm:
    optimizer = local.resolve_optimizer(client_optimizer)

    def frozen(shared: ServerState) -> optax.GradientTransformation:
        # The base optimizer, whose state stays that of the server.
        def update(gradient: PyTree, state: tuple[()], params: PyTree = None) -> tuple[PyTree, Any]:
            return optimizer(shared).update(gradient, shared.opt_state.base, params)[0], state

        return optax.GradientTransformation(lambda params: (), update)

    def client_step(
        shared: ServerState, client: Client, trained: local.LocalState, batch: Batch, key: jax.Array
    ) -> local.LocalState:
        del client
        gradient, aux = local.gradient(model, trained.params, trained, batch, key)
        if corrects:
            at_server, _ = local.gradient(model, shared.params, trained, batch, key)
            mean = shared.opt_state.gradient
            gradient = jax.tree.map(lambda g, own, c: g - own + c, gradient, at_server, mean)
        return local.descend(frozen(shared), trained, gradient, aux, batch)

    inner = server.resolve_server_optimizer(server_optimizer)

    def init(params: PyTree) -> MimeState:
        begun = ServerState(params=params, model_state={}, opt_state=(), round=jnp.int32(0))
        base = optimizer(begun).init(params)
        return MimeState(inner.init(params), base, optax.tree.zeros_like(params))

    def update(
        updates: PyTree, state: MimeState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, MimeState]:
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        return updates, state._replace(inner=inner_state)

    def settle(before: ServerState, after: ServerState) -> dict[str, MimeState]:
        state = after.opt_state
        _, base = optimizer(before).update(state.gradient, state.base, before.params)
        return {"opt_state": state._replace(base=base)}

    return two_passes(
        model,
        client_gradient(model, weighting=weighting),
        local_training(model, client_optimizer, weighting=weighting)._replace(
            init=lambda shared, client: local.start(shared, frozen(shared)), step=client_step
        ),
        optax.GradientTransformationExtraArgs(init, update),
        options,
        keep=lambda state, gradient, statistics: state._replace(gradient=gradient),
        sent=lambda state: state.gradient,
        settle=settle,
        broadcast=lambda state: (
            *(state.params, state.model_state, state.opt_state.base),
            state.opt_state.gradient if corrects else (),
        ),
    )
