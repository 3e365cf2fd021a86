"""Models from flax nnx modules."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.base import Batch, PyTree
from fedjax_lite.models import modules
from fedjax_lite.models.model import Model, with_loss
from fedjax_lite.xla import random

if TYPE_CHECKING:
    from flax import nnx


def nnx_model(
    create: Callable[["nnx.Rngs"], "nnx.Module"],
    loss: Callable[[jax.Array, Batch], jax.Array],
    metrics: Callable[[jax.Array, Batch], dict[str, jax.Array]] | None = None,
    *,
    inputs: modules.Inputs = "x",
) -> Model:
    """A model from a flax nnx module that maps features of a batch to predictions.

    The module lives only inside a step: it is put together from the params, the model state and
    streams of random numbers from the key of the step, called, and taken apart again.

    Args:
      create: `create(rngs) -> module`, such as `lambda rngs: MLP(64, 10, rngs=rngs)`. The module
        is called after `module.train()` by the loss, and after `module.eval()` by the metrics,
        where all that is random comes from one fixed key. Of `train`, `deterministic`, `rngs`
        and `mask`, the `[batch]` of the real examples, its `__call__` is given what it takes; one
        with BatchNorm must take `mask`, and hand it to its `BatchNorm` layers.
      loss: `loss(predictions, batch) -> losses [batch]`.
      metrics: `metrics(predictions, batch) -> {name: values [batch]}`, beside the loss, which is
        among them in any case.
      inputs: Name of the input feature; of several a tuple, or a dict of features by argument.

    Returns:
      A `Model` whose params are the values of the module's `nnx.Param`, in nested dicts by
      attribute. Other variables are the model state, but for random streams and what `sow`
      leaves. Arrays that are no variables are constants, those of `create(nnx.Rngs(0))`.

    Raises:
      TypeError: `create` is a module, or does not return one.
      ValueError: The module has batch statistics and its `__call__` does not take `mask`; or, when
        the loss is first called, they depend on what it leaves out.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> model = nnx_model(lambda rngs: nnx.Linear(4, 1, rngs=rngs), lambda p, batch: p[:, 0] ** 2)
    >>> params, model_state = model.init(jax.random.key(0))
    >>> jax.tree.map(jnp.shape, params)
    {'bias': (1,), 'kernel': (4, 1)}
    """
    from flax import nnx  # At the top, it would slow `import fedjax_lite` down by a sixth.

    kept = nnx.All(nnx.Variable, nnx.Not(nnx.Intermediate))

    def split(module: nnx.Module) -> tuple[Any, ...]:
        graph, *states = nnx.split(module, nnx.Param, nnx.RngState, kept, ...)
        return graph, *map(nnx.to_pure_dict, states)

    if isinstance(create, nnx.Module):
        name = type(create).__name__
        raise TypeError(
            f"create is a module, a {name}; pass a function that makes one, such as"
            f" lambda rngs: {name}(..., rngs=rngs)."
        )
    # Not in the abstract: nnx takes traced arrays that are no variables for static attributes.
    module = create(nnx.Rngs(0))
    _validate.instance("what create(rngs) returned", module, nnx.Module)
    graph, params, streams, model_state, constants = split(module)
    structure: Any = jax.tree.structure((params, model_state))
    has_statistics = bool(nnx.state(module, nnx.BatchStat))
    if has_statistics:
        modules.require_mask(module)
    checked: set[Any] = set()  # Shapes of inputs.

    def init_fn(key: jax.Array) -> tuple[PyTree, PyTree]:
        _, params, _, model_state, _ = split(create(nnx.Rngs(key)))
        return params, model_state

    def apply(
        params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array, *, train: bool
    ) -> tuple[Any, nnx.Module]:
        """The predictions, and the module after the call."""
        given = jax.tree.structure((params, model_state))
        if given != structure:  # nnx would go by the order of the leaves alone.
            raise ValueError(
                f"params and model_state have the structure {given}, and the module {structure};"
                " pass algorithm.init a key, or model_state= beside the params."
            )
        rngs = nnx.Rngs(key)

        def seed(x: jax.Array) -> jax.Array:
            return jax.random.split(rngs(), x.shape) if random.is_key(x) else jnp.zeros_like(x)

        module = nnx.merge(graph, params, jax.tree.map(seed, streams), model_state, constants)
        module.train() if train else module.eval()
        options = modules.call_options(module, train=train, mask=batch["mask"], rngs=rngs)
        args, kwargs = modules.arguments(inputs, batch)
        return module(*args, **kwargs, **options), module

    def batch_statistics(variables: PyTree, batch: Batch) -> PyTree:
        params, model_state = variables
        _, after = apply(params, model_state, batch, jax.random.key(1), train=True)
        return nnx.to_pure_dict(nnx.state(after, nnx.BatchStat))

    def check(batch: Batch) -> None:
        """Refuses a module that does not heed the mask, once the shape of its inputs is known."""
        shapes = {
            name: jax.ShapeDtypeStruct((1, *batch[name].shape[1:]), batch[name].dtype)
            for name in modules.features_of(inputs)
        }
        known = tuple((name, x.shape, x.dtype.name) for name, x in shapes.items())
        if known not in checked:
            with jax.ensure_compile_time_eval():  # While a round is traced.
                modules.require_masked_statistics(
                    module, batch_statistics, (params, model_state), shapes
                )
            checked.add(known)

    def loss_fn(
        params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        if has_statistics:
            check(batch)
        predictions, after = apply(params, model_state, batch, key, train=True)
        return loss(predictions, batch), split(after)[3]

    def predict(params: PyTree, model_state: PyTree, batch: Batch) -> Any:
        return apply(params, model_state, batch, jax.random.key(0), train=False)[0]

    def metrics_fn(params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, jax.Array]:
        return with_loss(loss, metrics)(predict(params, model_state, batch), batch)

    return Model(init_fn, loss_fn, metrics_fn, predict)
