"""Parts of params and of model state, by the names of their arrays."""

import fnmatch
from collections.abc import Callable, Sequence

import jax

from fedjax_lite import _validate
from fedjax_lite.base import PyTree

Names = str | Sequence[str] | Callable[[str], bool]
"""Patterns of names of params such as "Dense_0/*", or a function of a name."""


def matching(argument: str, names: Names) -> Callable[[str], bool]:
    """The function that says whether a name matches.

    Raises:
      TypeError: `names`, which is named `argument`, has something else than patterns.
    """
    if callable(names):
        return names
    patterns = [names] if isinstance(names, str) else list(names)
    for pattern in patterns:
        _validate.instance(argument, pattern, str, "'Dense_0/*'")
    return lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def names_of(tree: PyTree) -> list[str]:
    """The names of the arrays of a tree: the keys that lead to each, joined by `/`."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(tree)
    ]


def split(tree: PyTree, matches: Callable[[str], bool]) -> tuple[PyTree, PyTree]:
    """What does not match and what does, each with `None` in place of the other."""
    leaves, structure = jax.tree.flatten(tree)
    chosen = [bool(matches(name)) for name in names_of(tree)]
    rest = [None if is_chosen else x for x, is_chosen in zip(leaves, chosen, strict=True)]
    match = [x if is_chosen else None for x, is_chosen in zip(leaves, chosen, strict=True)]
    return jax.tree.unflatten(structure, rest), jax.tree.unflatten(structure, match)


def merge(rest: PyTree, match: PyTree) -> PyTree:
    """The tree that was split."""
    return jax.tree.map(
        lambda x, y: y if x is None else x, rest, match, is_leaf=lambda x: x is None
    )
