"""Checks of arguments, with messages that name the argument, its value and the way out."""

import contextlib
import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np

_MOST_CHARACTERS = 400  # Of two trees in a message; of larger ones, the first difference is named.


def integer(name: str, value: Any, *, minimum: int, maximum: int | None = None) -> int:
    """`value` as an int within `[minimum, maximum]`."""
    try:
        result = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} is {value!r}, of type {type(value).__name__}; pass an integer."
        ) from None
    if result < minimum or (maximum is not None and result > maximum):
        bounds = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
        raise ValueError(f"{name} is {result}; choose an integer {bounds}.")
    return result


def choice(name: str, value: Any, options: Collection[object]) -> None:
    """Refuses a `value` that is none of the options."""
    if value not in options:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, options))}.")


def instance(name: str, value: Any, kind: type, example: str = "") -> None:
    """Refuses a value of another type."""
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} is of type {type(value).__name__}; pass a {kind.__name__}"
            f" ({kind.__module__.partition('.')[0]}){example and ', such as ' + example}."
        )


def key(name: str, value: Any, *, single: bool = True) -> None:
    """Refuses what is no typed key: integer seeds, legacy keys, and several keys for a single."""
    is_array = isinstance(value, (jax.Array, np.ndarray, np.generic))
    if not is_array or not jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
        shown = f"{value!r}, " if value is None or isinstance(value, (int, float, str)) else ""
        shown += f"an array {form(value)}" if is_array else f"of type {type(value).__name__}"
        legacy = ", or jax.random.wrap_key_data(key) of a legacy key" if is_array else ""
        raise TypeError(f"{name} is {shown}; pass a typed key such as jax.random.key(0){legacy}.")
    if single and value.shape != ():
        raise ValueError(
            f"{name} has shape {value.shape}, that of several keys; pass one, or map over them with"
            " jax.vmap."
        )


def strong(tree: Any) -> Any:
    """The leaves as arrays with a dtype of their own, which no other dtype turns into another."""
    return jax.tree.map(lambda x: jax.numpy.asarray(x, jax.numpy.result_type(x)), tree)


def form(x: Any, *, dtype: bool = True) -> str:
    """What an array is like, such as `float32[3, 2]`."""
    return f"{jax.numpy.result_type(x) if dtype else ''}{list(np.shape(x))}"


def same_form(name: str, tree: Any, expected: Any, remedy: str, *, dtypes: bool = True) -> None:
    """Refuses a tree of another structure, or with arrays of other shapes (and dtypes)."""
    actual, wanted = (jax.tree.map(lambda x: form(x, dtype=dtypes), t) for t in (tree, expected))
    # Not the trees themselves: nodes of a user's own may compare as they like.
    if jax.tree.flatten(actual) != jax.tree.flatten(wanted):
        if len(f"{actual}{wanted}") > _MOST_CHARACTERS:
            leaves, others = (
                {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(t)}
                for t in (actual, wanted)
            )
            differing = [path for path in leaves | others if leaves.get(path) != others.get(path)]
            for path in differing[:1]:
                name += path
                actual, wanted = (x.get(path, "nothing") for x in (leaves, others))
        raise ValueError(f"{name} is {actual}, in place of {wanted}; {remedy}")


def params(tree: Any) -> None:
    """Refuses a tree without leaves, or with a leaf that is no floating-point array."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: x is None)
    if not leaves:
        raise ValueError(f"params is {tree!r}, without a single array; pass a pytree of arrays.")
    for path, leaf in leaves:
        where = "params" + jax.tree_util.keystr(path)
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, float, complex)):
            raise TypeError(
                f"{where} is {leaf!r}, of type {type(leaf).__name__}; pass floating-point arrays,"
                " or a typed key such as jax.random.key(0)."
            )
        if not jax.numpy.issubdtype(jax.numpy.result_type(leaf), jax.numpy.inexact):
            raise TypeError(
                f"{where} has dtype {jax.numpy.result_type(leaf)}, which has no gradient; pass"
                " floating-point arrays, or a typed key such as jax.random.key(0)."
            )


def number(name: str, value: Any, *, positive: bool = False, maximum: float = np.inf) -> Any:
    """`value`, a finite scalar that is not negative, or positive; a traced one is not looked at."""
    if isinstance(value, jax.core.Tracer) and value.ndim == 0:
        return value
    if np.asarray(value).dtype.kind not in "iuf":
        raise TypeError(f"{name} is {value!r}, of type {type(value).__name__}; pass a number.")
    if (
        np.ndim(value) != 0
        or not 0 <= np.asarray(value) <= maximum
        or np.isinf(value)
        or (positive and value == 0)
    ):
        bound = "above 0" if positive else "that is at least 0"
        bound = bound if maximum == np.inf else f"between 0 and {maximum:g}"
        raise ValueError(f"{name} is {value!r}; choose a number {bound}.")
    return value


def finite(name: str, value: Any) -> Any:
    """`value`, a finite scalar of any sign; a traced one is not looked at."""
    if isinstance(value, jax.core.Tracer) or (np.ndim(value) == 0 and np.isfinite(value)):
        return value
    raise ValueError(f"{name} is {value!r}; choose a finite number.")


def array(name: str, value: Any, remedy: str) -> None:
    """Refuses what is no array."""
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} is of type {type(value).__name__}; {remedy}")


def scalar(name: str, value: Any) -> jax.Array:
    """`value` as a floating-point scalar."""
    if np.shape(value) != () or value is None:
        raise ValueError(f"{name} is {value!r}; return a scalar, one weight for one client.")
    return jax.numpy.asarray(value, float)


def features(name: str, tree: Any) -> None:
    """Refuses what is not a non-empty mapping of names to arrays of one leading length."""
    if not isinstance(tree, Mapping) or not tree:
        is_dict = isinstance(tree, Mapping)
        raise TypeError(
            f"{name} is {'empty' if is_dict else 'of type ' + type(tree).__name__};"
            ' pass a non-empty dict of arrays by feature name, such as {"x": ..., "y": ...}.'
        )
    if "mask" in tree:
        raise ValueError(
            f'{name} has a feature named "mask", the name of the padding mask of a batch; rename'
            " the feature."
        )
    shapes = {key: _feature_shape(name, key, value) for key, value in tree.items()}
    if (
        any(len(shape) == 0 for shape in shapes.values())
        or len({shape[0] for shape in shapes.values()}) > 1
    ):
        raise ValueError(
            f"{name} has features of shapes {shapes}; give all features the same leading length,"
            " one entry per example."
        )


def _feature_shape(name: str, key: Any, value: Any) -> tuple[int, ...]:
    if isinstance(value, Mapping):
        inner = next(iter(value), "a")
        raise TypeError(
            f"{name}: feature {key!r} is a dict of {list(value)}; give each array a name of its"
            f" own, such as '{key}_{inner}'."
        )
    try:
        return np.shape(value)
    except ValueError:
        raise ValueError(
            f"{name}: feature {key!r} has rows of different lengths; pad them to one length."
        ) from None


@contextlib.contextmanager
def reading(batch: Mapping[str, Any]) -> Iterator[None]:
    """Says what a batch holds where a model looks a name up in vain."""
    try:
        yield
    except KeyError as error:
        error.add_note(
            f"The model was given a batch with {', '.join(map(repr, batch))}. If {error} should be"
            " a feature, add it to the examples of the dataset, or have the model read one of"
            " these."
        )
        raise


@contextlib.contextmanager
def calling(name: str, remedy: str) -> Iterator[None]:
    """Names what a user has passed where it fails on what it is given."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} failed: {first_line(error)}; {remedy}") from error


def first_line(error: Exception) -> str:
    """The first line of a message, without its full stop."""
    return str(error).partition("\n")[0].rstrip(".")


def per_example(name: str, shape: tuple[int, ...], batch_size: int) -> None:
    """Refuses values that are not one number per example."""
    if shape != (batch_size,):
        raise ValueError(
            f"{name} returned values of shape {shape} for a batch of {batch_size} examples;"
            f" return one value per example, of shape ({batch_size},), and leave the mean to the"
            " algorithm."
        )


def row_per_example(told: str, values: Any, batch_size: int, remedy: str) -> None:
    """Refuses values that are no array `[batch, columns]`."""
    if np.ndim(values) != 2 or values.shape[0] != batch_size:
        raise ValueError(f"{told} {form(values)} for a batch of {batch_size}; {remedy}")


def labels(values: Any, num_classes: int | None) -> None:
    """Refuses labels outside of the classes, whose loss would not be a number.

    Those of JAX arrays are not looked at, which would wait for the device.
    """
    if num_classes is None or not isinstance(values, np.ndarray) or values.dtype.kind not in "iu":
        return
    outside = np.unique(values[(values < 0) | (values >= num_classes)])
    if outside.size:
        shown = ", ".join(map(str, outside[:5].tolist())) + (", ..." if outside.size > 5 else "")
        raise ValueError(
            f"y holds the labels {shown}, and the model knows {num_classes} classes, from 0 to"
            f" {num_classes - 1}; number the classes from 0, or build the model with more of them."
        )
