"""Help for settings whose default the help tells in words."""

import typing
from typing import Annotated, Any, TypeVar

import tyro

T = TypeVar("T")


def told_briefly(options: type[T]) -> type[T]:
    """Options whose help has no "None" of the parser's where a setting can be left out."""
    options.__annotations__ |= {
        name: _brief(hint)
        for name, hint in typing.get_type_hints(options).items()
        if type(None) in typing.get_args(hint)
    }
    return options


def _brief(hint: Any) -> Any:
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if typing.get_origin(kinds[0]) is typing.Literal:
        metavar = f"{{{','.join(typing.get_args(kinds[0]))}}}"
    elif typing.get_origin(kinds[0]) is tuple:
        metavar = f"{typing.get_args(kinds[0])[0].__name__.upper()} ..."
    else:
        metavar = kinds[0].__name__.upper()
    return Annotated[hint, tyro.conf.arg(metavar=metavar, help_behavior_hint=_told)]


def _told(default: str) -> str:
    return "" if default == "None" else f"(default: {default})"
