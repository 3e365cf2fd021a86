"""What the algorithms need to know of a model, and adapters that build it."""

import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedjax_lite import _validate, random
from fedjax_lite.base import Batch, PyTree
from fedjax_lite.cpu import jit_once

if TYPE_CHECKING:
    from flax import nnx


class Model(NamedTuple):
    """A model as pure functions; every function sees a padded batch with its mask.

    Attributes:
      init: `init(key) -> (params, model_state)`.
      loss: `loss(params, model_state, batch, key) -> (losses [batch], model_state)`,
        the training loss of each example. The algorithms mask and average it; a
        model whose examples see each other must leave out `~batch["mask"]` itself.
      metrics: `metrics(params, model_state, batch) -> {name: values [batch]}`, for
        evaluation.
      predict: `predict(params, model_state, batch) -> predictions`, which `fl.metrics` compare
        with the batch; `None` where the model says no more than its losses.
      num_classes: Number of classes, by which labels `batch["y"]` out of range are refused where
        they can be seen beforehand; `None` if it is not known.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    loss: Callable[[PyTree, PyTree, Batch, jax.Array], tuple[jax.Array, PyTree]]
    metrics: Callable[[PyTree, PyTree, Batch], dict[str, jax.Array]]
    predict: Callable[[PyTree, PyTree, Batch], Any] | None = None
    num_classes: int | None = None


def function_model(
    loss: Callable[[Any, Batch], jax.Array],
    init: Callable[[jax.Array], PyTree] | None = None,
    metrics: Callable[[Any, Batch], dict[str, jax.Array]] | None = None,
    predict: Callable[[Any, Batch], Any] | None = None,
) -> Model:
    """A model from plain functions of the parameters.

    Args:
      loss: `loss(params, batch) -> losses [batch]`, one loss per example.
      init: `init(key) -> params`. Without it, `algorithm.init` takes params only.
      metrics: `metrics(params, batch) -> {name: values [batch]}`; the loss alone if
        left out.
      predict: `predict(params, batch) -> predictions`, for `fl.metrics`.

    Returns:
      A `Model` with an empty model state.

    Raises:
      TypeError: `loss` is no function.

    >>> import jax, jax.numpy as jnp
    >>> model = function_model(lambda params, batch: (batch["x"] @ params - batch["y"]) ** 2)
    >>> batch = {"x": jnp.eye(2), "y": jnp.ones(2), "mask": jnp.ones(2, bool)}
    >>> losses, _ = model.loss(jnp.array([1.0, 3.0]), {}, batch, jax.random.key(0))
    >>> losses.tolist()
    [0.0, 4.0]
    """
    if not callable(loss):
        raise TypeError(
            f"loss is {loss!r}; pass a function loss(params, batch) that returns [batch] losses."
        )

    def init_fn(key: jax.Array) -> tuple[PyTree, PyTree]:
        if init is None:
            raise ValueError(
                "init: this function_model was built without an init function, so it cannot"
                " draw parameters from a key; pass params to algorithm.init, or init= to"
                " function_model."
            )
        return init(key), {}

    def metrics_fn(params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, jax.Array]:
        del model_state
        return {"loss": loss(params, batch)} if metrics is None else metrics(params, batch)

    return Model(
        init=init_fn,
        loss=lambda params, model_state, batch, key: (loss(params, batch), model_state),
        metrics=metrics_fn,
        predict=None
        if predict is None
        else lambda params, model_state, batch: predict(params, batch),
    )


Inputs = str | Sequence[str] | Mapping[str, str]
"""A feature, several in the order of a module's arguments, or features by name of the argument."""


def linen_model(
    module: nn.Module,
    example: ArrayLike | Sequence[ArrayLike] | Mapping[str, ArrayLike],
    loss: Callable[[jax.Array, Batch], jax.Array],
    metrics: Callable[[jax.Array, Batch], dict[str, jax.Array]] | None = None,
    *,
    inputs: Inputs = "x",
) -> Model:
    """A model from a flax linen module that maps features of a batch to predictions.

    Args:
      module: The module. If its `__call__` takes `train`, it is called with
        `train=True` by the loss and `train=False` by the metrics (`deterministic`, the other
        way round). If it takes `mask`, it is given the mask `[batch]` of the real examples;
        one with BatchNorm must take it, and hand it to its `BatchNorm` layers. Dropout draws
        from the `"dropout"` stream. Collections other than `"params"` are the model state.
      example: An input of one batch, for its shape and dtype only: `[batch, ...]`. Of a module with
        several inputs a tuple of them, or a dict by argument, as for `inputs`.
      loss: `loss(predictions, batch) -> losses [batch]`.
      metrics: `metrics(predictions, batch) -> {name: values [batch]}`; the loss alone
        if left out.
      inputs: Name of the input feature; of several a tuple, such as `("words", "tags")`, or a dict
        of features by argument, such as `{"tokens": "words", "segments": "tags"}`.

    Returns:
      A `Model` whose params are the module's `"params"` collection.

    Raises:
      ValueError: The module has batch statistics, and its `__call__` does not take `mask`, or they
        depend on what it leaves out; `example` and `inputs` are not alike.

    >>> import jax, jax.numpy as jnp, flax.linen as nn
    >>> model = linen_model(nn.Dense(1), jnp.zeros((1, 4)), lambda p, batch: p[:, 0] ** 2)
    >>> params, model_state = model.init(jax.random.key(0))
    >>> jax.tree.map(jnp.shape, params)
    {'bias': (1,), 'kernel': (4, 1)}
    """
    examples = _examples(example, inputs)

    def init_fn(key: jax.Array) -> tuple[PyTree, PyTree]:
        zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in examples.items()}
        mask = jnp.ones(next(iter(zeros.values())).shape[0], bool)
        args, kwargs = _arguments(inputs, zeros)
        options = _call_options(module, train=False, mask=mask)
        variables = module.init(key, *args, **kwargs, **options)
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}

    collections = sorted(jax.eval_shape(lambda: init_fn(jax.random.key(0)))[1])

    def variables(params: PyTree, model_state: PyTree) -> dict[str, Any]:
        if sorted(model_state) != collections:
            raise ValueError(
                f"model_state has the collections {sorted(model_state)}, and the module"
                f" {collections}; pass algorithm.init a key, or model_state= beside the params."
            )
        return {"params": params, **model_state}

    def loss_fn(
        params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        args, kwargs = _arguments(inputs, batch)
        predictions, updated = module.apply(
            variables(params, model_state),
            *args,
            rngs={"dropout": key},
            mutable=collections,
            **kwargs,
            **_call_options(module, train=True, mask=batch["mask"]),
        )
        return loss(predictions, batch), {**model_state, **updated}

    def predict(params: PyTree, model_state: PyTree, batch: Batch) -> Any:
        args, kwargs = _arguments(inputs, batch)
        options = _call_options(module, train=False, mask=batch["mask"])
        return module.apply(variables(params, model_state), *args, **kwargs, **options)

    def metrics_fn(params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, jax.Array]:
        predictions = predict(params, model_state, batch)
        if metrics is None:
            return {"loss": loss(predictions, batch)}
        return metrics(predictions, batch)

    def batch_statistics(batch: Batch) -> PyTree:
        params, model_state = init_fn(jax.random.key(0))
        args, kwargs = _arguments(inputs, batch)
        options = _call_options(module, train=True, mask=batch["mask"])
        _, updated = module.apply(
            variables(params, model_state),
            *args,
            rngs={"dropout": jax.random.key(1)},
            mutable=collections,
            **kwargs,
            **options,
        )
        return updated["batch_stats"]

    if "batch_stats" in collections:
        _require_mask(module)
        _require_masked_statistics(module, batch_statistics, examples)
    return Model(init_fn, loss_fn, metrics_fn, predict)


def nnx_model(
    create: Callable[["nnx.Rngs"], "nnx.Module"],
    loss: Callable[[jax.Array, Batch], jax.Array],
    metrics: Callable[[jax.Array, Batch], dict[str, jax.Array]] | None = None,
    *,
    inputs: Inputs = "x",
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
      metrics: `metrics(predictions, batch) -> {name: values [batch]}`; the loss alone
        if left out.
      inputs: Name of the input feature; of several a tuple, or a dict of features by argument.

    Returns:
      A `Model` whose params are the values of the module's `nnx.Param`, in nested dicts by
      attribute. Other variables are the model state, but for random streams and what `sow`
      leaves. Arrays that are no variables are constants, those of `create(nnx.Rngs(0))`.

    Raises:
      TypeError: `create` is a module, or does not return one.
      ValueError: The module has batch statistics and its `__call__` does not take `mask`.

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
    if nnx.state(module, nnx.BatchStat):
        _require_mask(module)

    def init_fn(key: jax.Array) -> tuple[PyTree, PyTree]:
        _, params, _, model_state, _ = split(create(nnx.Rngs(key)))
        return params, model_state

    def apply(
        params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array, *, train: bool
    ) -> tuple[Any, PyTree]:
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
        options = _call_options(module, train=train, mask=batch["mask"], rngs=rngs)
        args, kwargs = _arguments(inputs, batch)
        predictions = module(*args, **kwargs, **options)
        return predictions, split(module)[3]

    def loss_fn(
        params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        predictions, after = apply(params, model_state, batch, key, train=True)
        return loss(predictions, batch), after

    def predict(params: PyTree, model_state: PyTree, batch: Batch) -> Any:
        return apply(params, model_state, batch, jax.random.key(0), train=False)[0]

    def metrics_fn(params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, jax.Array]:
        predictions = predict(params, model_state, batch)
        if metrics is None:
            return {"loss": loss(predictions, batch)}
        return metrics(predictions, batch)

    return Model(init_fn, loss_fn, metrics_fn, predict)


@contextlib.contextmanager
def applying(model: Model, params: PyTree, batch: Batch) -> Iterator[None]:
    """Says where a model fails whether its params are another one's, or what the batch holds.

    Nothing is looked at unless it fails.
    """
    try:
        with _validate.reading(batch):
            yield
    except Exception as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if isinstance(error, ValueError) and frame.f_globals.get("__name__") == __name__:
            raise  # An adapter of this file has said what is wrong.
        if (expected := _drawn(model)) is not None:
            try:
                remedy = "pass a state of an algorithm that was built with this model."
                _validate.same_form("params", params, expected, remedy, dtypes=False)
            except ValueError as other:
                raise other from error
        if type(error) in (TypeError, flax.errors.ScopeParamShapeError):  # And no subclass of JAX.
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"model failed on a batch of {_shown(batch)}: {_validate.first_line(error)}; pass"
                " clients or examples with the features that it is made for, or mend the model."
            ) from error
        raise


def _drawn(model: Model) -> PyTree:
    """The form of params that the model draws itself; `None` if it cannot."""
    try:
        return jax.eval_shape(lambda: model.init(jax.random.key(0))[0])
    except Exception:
        return None


def _shown(batch: Batch) -> str:
    return ", ".join(f"{name} {_validate.form(x)}" for name, x in batch.items())


def _examples(example: Any, inputs: Inputs) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each input feature, by its name."""
    if isinstance(inputs, str):
        pairs = [(inputs, example)]
    elif isinstance(inputs, Mapping):
        if not isinstance(example, Mapping) or set(example) != set(inputs):
            raise ValueError(
                f"inputs has the arguments {sorted(inputs)}; pass as example a dict with an array"
                " for each of them."
            )
        pairs = [(name, example[argument]) for argument, name in inputs.items()]
    else:
        if not isinstance(example, (tuple, list)) or len(example) != len(inputs):
            raise ValueError(
                f"inputs names the features {list(inputs)}; pass as example a tuple with an array"
                " for each of them."
            )
        pairs = list(zip(inputs, example, strict=True))
    if isinstance(inputs, str) and isinstance(example, (tuple, list, Mapping)):
        raise ValueError(
            f"example is a {type(example).__name__}, and inputs one feature, {inputs!r}; pass an"
            ' array, or inputs of several, such as ("a", "b").'
        )
    return {name: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for name, x in pairs}


def _arguments(inputs: Inputs, batch: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The features that a module is called with: in their order, and by argument."""
    if isinstance(inputs, str):
        return [batch[inputs]], {}
    if isinstance(inputs, Mapping):
        return [], {argument: batch[name] for argument, name in inputs.items()}
    return [batch[name] for name in inputs], {}


def _call_options(module: object, *, train: bool, **given: Any) -> dict[str, Any]:
    """Of the arguments that tell a module about the call, those that its `__call__` takes."""
    parameters = inspect.signature(type(module).__call__).parameters
    given = {"train": train, "deterministic": not train, **given}
    return {name: value for name, value in given.items() if name in parameters}


def _require_mask(module: object) -> None:
    """Refuses a module with batch statistics whose `__call__` does not take `mask`."""
    if "mask" not in inspect.signature(type(module).__call__).parameters:
        raise ValueError(
            f"module {type(module).__name__} has batch statistics, and its __call__ does not take"
            " mask, so that padding would enter them; add mask=None to its arguments and call its"
            " BatchNorm layers with it in as many dimensions as their input: mask=mask[:, None] for"
            " [batch, features], mask=mask[:, None, None, None] for images."
        )


def _require_masked_statistics(
    module: object,
    batch_statistics: Callable[[Batch], PyTree],
    examples: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    """Refuses a module whose batch statistics depend on an example that the mask leaves out."""
    mask = np.array([True, True, False])

    def of_padding(filler: int) -> PyTree:
        batch = {"mask": jnp.asarray(mask)}
        for name, x in examples.items():
            rows = jnp.zeros((mask.size, *x.shape[1:]), x.dtype)
            if jnp.issubdtype(x.dtype, jnp.floating):
                rows += jax.random.normal(jax.random.key(2), rows.shape, x.dtype)
            batch[name] = rows.at[~mask].set(filler)
        return batch_statistics(batch)

    name = type(module).__name__
    remedy = (
        "hand the mask to each BatchNorm in as many dimensions as its input has:"
        " mask=mask[:, None] for [batch, features], mask=mask[:, None, None, None] for images."
    )
    try:
        both = jit_once(lambda: [of_padding(filler) for filler in (0, 1)])()
    except (TypeError, ValueError) as error:
        told = f"module {name} failed on a batch with a mask: {str(error).splitlines()[0]}"
        raise ValueError(f"{told}; {remedy}") from error
    for (path, first), second in zip(
        jax.tree.leaves_with_path(both[0]), jax.tree.leaves(both[1]), strict=True
    ):
        if not np.allclose(first, second, rtol=1e-3, atol=1e-5):
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"module {name} has batch statistics, {where}, that depend on an example which the"
                f" mask leaves out; {remedy}"
            )
