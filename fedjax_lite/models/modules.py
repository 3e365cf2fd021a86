"""How modules of flax are called: their inputs, and the mask that they have to heed."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lite.base import Batch, PyTree
from fedjax_lite.xla.cpu import jit_once

Inputs = str | Sequence[str] | Mapping[str, str]
"""A feature, several in the order of a module's arguments, or features by name of the argument."""


def examples(example: Any, inputs: Inputs) -> dict[str, jax.ShapeDtypeStruct]:
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


def arguments(inputs: Inputs, batch: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The features that a module is called with: in their order, and by argument."""
    if isinstance(inputs, str):
        return [batch[inputs]], {}
    if isinstance(inputs, Mapping):
        return [], {argument: batch[name] for argument, name in inputs.items()}
    return [batch[name] for name in inputs], {}


def features_of(inputs: Inputs) -> list[str]:
    """The names of the features that a module is called with."""
    if isinstance(inputs, str):
        return [inputs]
    return list(inputs.values() if isinstance(inputs, Mapping) else inputs)


def call_options(module: object, *, train: bool, **given: Any) -> dict[str, Any]:
    """Of the arguments that tell a module about the call, those that its `__call__` takes."""
    parameters = inspect.signature(type(module).__call__).parameters
    given = {"train": train, "deterministic": not train, **given}
    return {name: value for name, value in given.items() if name in parameters}


def require_mask(module: object) -> None:
    """Refuses a module with batch statistics whose `__call__` does not take `mask`."""
    if "mask" not in inspect.signature(type(module).__call__).parameters:
        raise ValueError(
            f"module {type(module).__name__} has batch statistics, and its __call__ does not take"
            " mask, so that padding would enter them; add mask=None to its arguments and call its"
            " BatchNorm layers with it in as many dimensions as their input: mask=mask[:, None] for"
            " [batch, features], mask=mask[:, None, None, None] for images."
        )


def drawn(shapes: PyTree) -> PyTree:
    """Arrays for variables of a module, which nothing has to be compiled for.

    Vectors are positive, as variances have to be; matrices keep the size of what they multiply.
    """
    rng = np.random.default_rng(0)

    def draw(x: jax.ShapeDtypeStruct) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        if len(x.shape) < 2:
            return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)
        scale = 1 / math.sqrt(max(math.prod(x.shape[:-1]), 1))
        return jnp.asarray(scale * rng.standard_normal(x.shape), x.dtype)

    return jax.tree.map(draw, shapes)


def require_masked_statistics(
    module: object,
    batch_statistics: Callable[[PyTree, Batch], PyTree],
    variables: PyTree,
    examples: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    """Refuses a module whose batch statistics depend on an example that the mask leaves out.

    Args:
      module: The module.
      batch_statistics: `batch_statistics(variables, batch)`, those after a call.
      variables: Any values of its variables.
      examples: Shape and dtype `[batch, ...]` of its inputs.
    """
    mask = np.array([True, True, False])

    def of_padding(filler: int) -> Batch:
        batch = {"mask": jnp.asarray(mask)}
        for name, x in examples.items():
            rows = np.zeros((mask.size, *x.shape[1:]))
            if jnp.issubdtype(x.dtype, jnp.floating):
                rows += np.random.default_rng(2).standard_normal(rows.shape)
            rows[~mask] = filler
            batch[name] = jnp.asarray(rows, x.dtype)
        return batch

    name = type(module).__name__
    remedy = (
        "hand the mask to each BatchNorm in as many dimensions as its input has:"
        " mask=mask[:, None] for [batch, features], mask=mask[:, None, None, None] for images."
    )
    try:
        # Values are arguments of one program: drawn in it, they took resnet18 16 seconds, not 2.
        run = jit_once(batch_statistics)
        both = [run(variables, of_padding(filler)) for filler in (0, 1)]
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
