"""The option `--vary` of sweeps: a setting, or an argument in one, and its values."""

import re
import typing
from typing import Any

from fedjax_lite.cli.errors import UsageError
from fedjax_lite.experiments import expressions
from fedjax_lite.experiments.settings import Calls, Settings
from fedjax_lite.experiments.tables import ROLES
from fedjax_lite.experiments.varying import TRACED


def varied_by(text: str) -> tuple[str, tuple[Any, ...]]:
    """A setting, or an argument of one, and its values, from `name=a,b` or `name=begin:end`.

    Raises:
      UsageError: It is none, or has values of another type.
    """
    name, equals, listed = text.partition("=")
    name = name.replace("-", "_")
    hints = typing.get_type_hints(Settings)
    root, dot, _ = name.partition(".")
    if not equals or not listed:
        raise UsageError(f"--vary is {text!r}; write a setting and its values, as client_lr=0.1,1")
    if root not in hints or (dot and root not in Calls._fields):
        choices = ", ".join(Calls._fields if dot else hints)
        raise UsageError(f"--vary is {text!r}; choose one of {choices}")
    parts = expressions.split(listed)
    if len(parts) == 1 and re.fullmatch(r"-?\d+:-?\d+", listed):
        parts = list(map(str, range(*map(int, listed.split(":")))))
    kinds = {hints[root], *typing.get_args(hints[root])}
    convert = next((kind for kind in (int, float) if kind in kinds and not dot), str)
    try:
        values: list[Any] = list(map(convert, parts))
        if dot:
            values = [expressions.literal(ROLES[root], part) for part in parts]
    except ValueError as error:
        told = error if dot else f"{name} takes {convert.__name__} values; separate them by commas"
        raise UsageError(f"--vary is {text!r}, but {told}, or write begin:end") from None
    if any(isinstance(value, float) for value in values):
        values = [float(value) if type(value) is int else value for value in values]
    if not values or len(set(map(str, values))) < len(values):
        raise UsageError(f"--vary is {text!r}; name at least one value, and each once")
    return name, tuple(values)


def is_traced(name: str, value: Any) -> bool:
    """Whether a setting varies within a program, by one of its values."""
    if name in ("seed", "client_lr", "server_lr"):
        return True
    return name.partition(".")[0] in TRACED and isinstance(value, float)
