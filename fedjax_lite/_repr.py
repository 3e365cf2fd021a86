"""What values hold, in one line: shapes and dtypes in place of arrays."""

from collections.abc import Mapping
from typing import Any


def shapes(tree: Any) -> str:
    """A tree with `float32[64, 10]` in place of an array, and `int32` in place of a scalar."""
    if hasattr(tree, "shape") and hasattr(tree, "dtype"):
        return f"{tree.dtype}{list(tree.shape) or ''}"
    if isinstance(tree, Mapping):
        return f"{{{', '.join(f'{name}: {shapes(value)}' for name, value in tree.items())}}}"
    if type(tree) in (list, tuple):
        inside = ", ".join(map(shapes, tree))
        return f"[{inside}]" if isinstance(tree, list) else f"({inside})"
    return repr(tree)


def record(value: Any, fields: Mapping[str, Any]) -> str:
    """A value of several fields, those that are None left out."""
    told = (f"{name}={shapes(field)}" for name, field in fields.items() if field is not None)
    return f"{type(value).__name__}({', '.join(told)})"
