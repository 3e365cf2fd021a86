"""Pieces of local training that the algorithms share."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import optax
from jax.extend.core import primitives

from fedjax_lite import _validate
from fedjax_lite.base import Batch, Client, ClientResult, PyTree, ServerState
from fedjax_lite.models.model import Model, applying
from fedjax_lite.xla.precision import squared_norm

LossAndAux = Callable[[PyTree], tuple[jax.Array, tuple[jax.Array, PyTree]]]
Measure = Callable[[ServerState, Client, "LocalState", Batch], dict[str, jax.Array]]

ClientOptimizer: TypeAlias = (
    optax.GradientTransformation | Callable[[jax.Array], optax.GradientTransformation]
)
"""An optax transformation, or a function `round -> transformation`."""


class LocalState(NamedTuple):
    """A client's own copy of the model, and how its training has gone.

    Attributes:
      params: The params that the client has come to.
      model_state: What its model keeps but does not train.
      opt_state: State of the client optimizer.
      loss: Sum of the losses of the examples processed, each at the params of its step.
      num_examples: How many they are.
      num_steps: Steps taken.
    """

    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    loss: jax.Array
    num_examples: jax.Array
    num_steps: jax.Array


def resolve_optimizer(
    client_optimizer: ClientOptimizer,
) -> Callable[[ServerState], optax.GradientTransformation]:
    """The client optimizer in the round that a server state is at.

    Raises:
      TypeError: It is neither a transformation nor a function of the round.
    """
    kind = optax.GradientTransformation
    refuse_uncalled("client_optimizer", client_optimizer)
    if not callable(client_optimizer):
        _validate.instance("client_optimizer", client_optimizer, kind, "optax.sgd(0.1)")

    def optimizer(shared: ServerState) -> optax.GradientTransformation:
        if isinstance(client_optimizer, optax.GradientTransformation):
            return named("client_optimizer", client_optimizer)
        now = client_optimizer(shared.round)
        _validate.instance("what client_optimizer(round) returned", now, kind)
        return named("client_optimizer", now)

    return optimizer


def refuse_uncalled(name: str, optimizer: object) -> None:
    """Refuses a function of optax in place of what it returns.

    Raises:
      TypeError: `optimizer` is such a function.
    """
    if not callable(optimizer):
        return
    of_optax = getattr(optax, getattr(optimizer, "__name__", ""), None) is optimizer
    if of_optax or "learning_rate" in inspect.signature(optimizer).parameters:
        raise TypeError(
            f"{name} is {optimizer}, which makes an optimizer of a learning rate or other"
            " arguments; call it, as in optax.sgd(0.1)."
        )


def named(
    name: str, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer, whose errors say which one it is, and which takes extra arguments."""
    optimizer = optax.with_extra_args_support(optimizer)
    remedy = "pass an optax transformation for these params, made of numbers: optax.sgd(0.1)."

    def init(params: PyTree) -> PyTree:
        with _validate.calling(f"{name}.init", remedy):
            return optimizer.init(params)

    def update(*args: Any, **extra_args: Any) -> tuple[PyTree, PyTree]:
        with _validate.calling(f"{name}.update", remedy):
            return optimizer.update(*args, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def rate_of_sgd(optimizer: optax.GradientTransformation, params: PyTree) -> float | None:
    """The rate of an optimizer that is plain SGD, if that is a number of Python; else `None`.

    >>> rate_of_sgd(optax.sgd(0.5), jnp.ones(3)), rate_of_sgd(optax.adam(0.5), jnp.ones(3))
    (0.5, None)
    """
    state = optimizer.init(params)
    if jax.tree.leaves(state):
        return None
    closed = jax.make_jaxpr(lambda gradient: optimizer.update(gradient, state, params)[0])(params)
    jaxpr = closed.jaxpr
    products = [
        (*eqn.invars, *eqn.outvars)
        for eqn in jaxpr.eqns
        if eqn.primitive is primitives.mul_p and isinstance(eqn.invars[0], jex_core.Literal)
    ]
    ends = [(gradient, update) for _, gradient, update in products]
    rates = {-float(factor.val) for factor, _, _ in products}
    if ends != list(zip(jaxpr.invars, jaxpr.outvars, strict=False)) or len(rates) != 1:
        return None
    return rates.pop() or None  # At the rate 0, params tell nothing.


def start(shared: ServerState, optimizer: optax.GradientTransformation) -> LocalState:
    """A client before its first step."""
    return LocalState(
        params=shared.params,
        model_state=shared.model_state,
        opt_state=optimizer.init(shared.params),
        loss=jnp.zeros(()),
        num_examples=jnp.int32(0),
        num_steps=jnp.int32(0),
    )


def zeros(shared: ServerState) -> PyTree:
    """What a client keeps at first that keeps something like the params."""
    return optax.tree.zeros_like(shared.params)


def batch_loss(
    model: Model, model_state: PyTree, batch: Batch, key: jax.Array, *, mean: bool
) -> LossAndAux:
    """The loss of a batch as a function of the params, for `jax.grad` with `has_aux=True`.

    Args:
      model: The model.
      model_state: Its state before the batch.
      batch: Features and mask.
      key: Typed key of the step.
      mean: Over the real examples; else their sum.

    Returns:
      A function `params -> (loss, (sum of the losses, model state after the batch))`.
    """

    def loss(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
        losses, after = losses_of(model, params, model_state, batch, key)
        total = losses.sum(dtype=jnp.promote_types(losses.dtype, jnp.float32))
        return total / jnp.maximum(batch["mask"].sum(), 1) if mean else total, (total, after)

    return loss


def losses_of(
    model: Model, params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array
) -> tuple[jax.Array, PyTree]:
    """The losses of a batch `[batch]`, zero in its padding, and the model state after it.

    Raises:
      ValueError: The model returns something else.
    """
    with applying(model, params, batch):
        losses, after = model.loss(params, model_state, batch, key)
    remedy = "return an array [batch], one loss per example."
    _validate.array("what the loss of the model returned", losses, remedy)
    _validate.per_example("model.loss", losses.shape, batch["mask"].shape[0])
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ValueError(
            f"model.loss returned values of dtype {losses.dtype}, which have no gradient; return"
            " floating-point losses."
        )
    return jnp.where(batch["mask"], losses, 0), after


def mean_over(batch: Batch, values: jax.Array) -> jax.Array:
    """The mean over the real examples of a batch, of values `[batch]`."""
    return jnp.where(batch["mask"], values, 0).sum() / jnp.maximum(batch["mask"].sum(), 1)


def gradient(
    model: Model, params: PyTree, local: LocalState, batch: Batch, key: jax.Array
) -> tuple[PyTree, tuple[jax.Array, PyTree]]:
    """The gradient of the mean loss of a batch, and what `descend` wants to know besides."""
    loss = batch_loss(model, local.model_state, batch, key, mean=True)
    return jax.grad(loss, has_aux=True)(params)


def descend(
    optimizer: optax.GradientTransformation,
    local: LocalState,
    gradient: PyTree,
    aux: tuple[jax.Array, PyTree],
    batch: Batch,
    **extra_args: Any,
) -> LocalState:
    """A step of the client optimizer along a gradient; some optimizers take further arguments."""
    updates, opt_state = optimizer.update(gradient, local.opt_state, local.params, **extra_args)
    total, model_state = aux
    return LocalState(
        params=optax.apply_updates(local.params, updates),
        model_state=model_state,
        opt_state=opt_state,
        loss=local.loss + total,
        num_examples=local.num_examples + batch["mask"].sum(dtype=jnp.int32),
        num_steps=local.num_steps + 1,
    )


def result(shared: ServerState, local: LocalState, weight: jax.Array) -> ClientResult:
    """What a client sends after its last step: the delta, and its mean loss as a metric."""
    update, norm = delta(shared.params, local.params)
    return ClientResult(
        update=update,
        weight=weight,
        metrics={"loss": local.loss / jnp.maximum(local.num_examples, 1)},
        model_state=local.model_state,
        norm=norm,
    )


def measure(model: Model, measure_clients: bool) -> Measure | None:
    """The `measure` of a client update whose state is a `LocalState`."""
    _validate.choice("measure_clients", measure_clients, (True, False))
    if not measure_clients:
        return None

    def metrics(
        shared: ServerState, client: Client, local: LocalState, batch: Batch
    ) -> dict[str, jax.Array]:
        del shared, client
        with applying(model, local.params, batch):
            return model.metrics(local.params, local.model_state, batch)

    return metrics


def delta(server_params: PyTree, client_params: PyTree) -> tuple[PyTree, jax.Array]:
    """What training changed, server minus client, and its L2 norm."""
    # The norm is taken of a difference of its own: shared, XLA would write it to memory, which
    # on a CPU takes longer than all else that ends a client's training.
    own = jax.lax.optimization_barrier(jax.lax.stop_gradient((server_params, client_params)))
    norm = jnp.sqrt(squared_norm(optax.tree.sub(*own)))
    return optax.tree.sub(server_params, client_params), norm
