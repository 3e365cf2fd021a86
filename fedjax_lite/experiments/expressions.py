"""Settings as Python calls: parsed, completed, built and written again, and never evaluated.

A setting that chooses something is a name or a call of literals and of other such calls, such as
`fed_prox(mu=0.1)` or `sgd(cosine_decay_schedule(0.1, 100), momentum=0.9)`. Names are looked up in
a table; `my_file.py:net(width=64)` names a function of the user's own. What the program knows by
itself, such as the number of classes, is left out and filled in.
"""

import ast
import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from fedjax_lite.experiments.own_files import from_file, told_with_line

Table = Mapping[str, Callable[..., Any]]
"""Functions by the names that expressions have for them."""

_LONGEST = 10_000  # Characters of an expression; Python's parser fails on deep nesting.
_QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_IN_FILE = r"[^\s,()=\[\]{}'\"]+\.py:[A-Za-z_]\w*"
_DASH = r"(?<=[A-Za-z0-9_])-(?=[A-Za-z])"
_TOKENS = re.compile(f"({_QUOTED})|({_IN_FILE})|({_DASH})")
_REFUSED = "write names and calls of numbers, strings, lists and other such calls"


class Role(NamedTuple):
    """What the program does with the value of a setting.

    Attributes:
      setting: Its name, for errors.
      table: The functions to choose from.
      plural: What they are called, as `fedjax-lite list` does.
      known: Names of arguments that the program fills in where a function takes them.
    """

    setting: str
    table: Table
    plural: str
    known: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a function, with literals and other calls as arguments.

    Attributes:
      name: What the function is called.
      function: The function.
      arguments: Those given, by name of the parameter.
      more: Positional arguments of a function that takes any number.
    """

    name: str
    function: Callable[..., Any]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    more: tuple[Any, ...] = ()

    def __str__(self) -> str:
        given = [written(value) for value in self.more]
        given += [f"{name}={written(value)}" for name, value in self.arguments.items()]
        return f"{self.name}({', '.join(given)})"

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    def takes(self, name: str) -> bool:
        """Whether the function has a parameter of that name."""
        return name in self.parameters

    def inside(self) -> list[tuple[str, Any]]:
        """The arguments by name; positional ones that are calls by the names of these."""
        more = [(value.name, value) for value in self.more if isinstance(value, Call)]
        return [*self.arguments.items(), *more]

    def with_arguments(self, **arguments: Any) -> "Call":
        """The same call with other arguments, or more of them."""
        return dataclasses.replace(self, arguments={**self.arguments, **arguments})


def parse(role: Role, text: str) -> Call:
    """The call that a text says.

    Raises:
      ValueError: It is no name or call, or one of a function that is not in the table, or with
        arguments that it does not take; or the file that it names cannot be imported.

    >>> role = Role("shape", {"box": lambda size, height=1: None}, "shapes")
    >>> str(parse(role, "box(3)")), str(parse(role, "box"))
    ('box(size=3)', 'box()')
    """
    calls = parse_all(role, text)
    if len(calls) != 1:
        raise ValueError(f"{role.setting} is {text!r}; choose one of them.")
    return calls[0]


def parse_all(role: Role, text: str) -> tuple[Call, ...]:
    """The calls that a text says, separated by commas; none of an empty one."""
    if not text.strip():
        return ()
    reader = _Reader(role, text)
    body = reader.tree()
    nodes = body.elts if isinstance(body, ast.Tuple) else [body]
    calls = [reader.value(node) for node in nodes]
    for call in calls:
        if not isinstance(call, Call):
            raise reader.error(f"{call!r} is no function; {_REFUSED}.")
    return tuple(calls)


def literal(role: Role, text: str) -> Any:
    """A value as an argument has it: a literal, a call, or a bare word as a string.

    >>> role = Role("shape", {"box": lambda size: None}, "shapes")
    >>> literal(role, "0.5"), literal(role, "wide"), str(literal(role, "box(1)"))
    (0.5, 'wide', 'box(size=1)')
    """
    known = {*role.table, "True", "False", "None"}
    if re.fullmatch(r"[A-Za-z_][\w-]*", text) and text.replace("-", "_") not in known:
        return text
    reader = _Reader(role, text)
    return reader.value(reader.tree())


def split(text: str) -> list[str]:
    """The parts between the commas that are outside of brackets and quotes.

    >>> split("fed_prox(mu=0.1, num_steps=2),scaffold")
    ['fed_prox(mu=0.1, num_steps=2)', 'scaffold']
    """
    parts, depth = [""], 0
    for token in re.findall(f"{_QUOTED}|.", text, re.DOTALL):
        depth += (token in "([{") - (token in ")]}") if len(token) == 1 else 0
        if token == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


class _Reader:
    """Reads one expression."""

    def __init__(self, role: Role, text: str) -> None:
        self._role, self._text = role, text
        self._files: dict[str, str] = {}

    def error(self, told: str) -> ValueError:
        return ValueError(f"{self._role.setting} is {self._text!r}: {told}")

    def tree(self) -> ast.expr:
        if len(self._text) > _LONGEST:
            raise ValueError(f"{self._role.setting} has {len(self._text)} characters; {_REFUSED}.")
        try:
            return ast.parse(_TOKENS.sub(self._replace, self._text.strip()), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            told = error.msg if isinstance(error, SyntaxError) else str(error)
            raise self.error(f"{told}; {_REFUSED}.") from None

    def _replace(self, match: re.Match[str]) -> str:
        quoted, in_file, _ = match.groups()
        if in_file:
            name = f"user_{len(self._files)}"
            self._files[name] = in_file
            return name
        return quoted or "_"

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=float() as number) if math.isinf(number):
                raise self.error(f"{number} is too large; write a finite number.")
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                return value
            case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as number)) if not isinstance(
                number, bool
            ):
                return -number
            case ast.Tuple(elts=elements):
                return tuple(map(self.value, elements))
            case ast.List(elts=elements):
                return list(map(self.value, elements))
            case ast.Dict(keys=keys, values=values) if None not in keys:
                names = [self.value(key) for key in keys if key is not None]
                return dict(zip(names, map(self.value, values), strict=True))
            case ast.Name():
                return self._call(node, [], [])
            case ast.Call(func=ast.Name() as function, args=args, keywords=keywords):
                return self._call(function, args, keywords)
        raise self.error(f"{ast.unparse(node)[:60]} is refused; {_REFUSED}.")

    def _call(self, node: ast.Name, args: list[ast.expr], keywords: list[ast.keyword]) -> Call:
        if any(keyword.arg is None for keyword in keywords):
            raise self.error(f"** is refused; {_REFUSED}.")
        if node.id in self._files:
            name = self._files[node.id]
            function = from_file(self._role.setting, name)
        else:
            name, function = node.id, self._find(node.id)
        positional = [self.value(arg) for arg in args]
        given = {str(keyword.arg): self.value(keyword.value) for keyword in keywords}
        arguments, more = self._bind(name, function, positional, given)
        return Call(name, function, arguments, more)

    def _find(self, name: str) -> Callable[..., Any]:
        table = self._role.table
        if name not in table:
            close = difflib.get_close_matches(name, table, 1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise self.error(
                f"{name} is none of the {self._role.plural}; {meant}fedjax-lite list"
                f" {self._role.plural} shows them."
            )
        return table[name]

    def _bind(
        self, name: str, function: Callable[..., Any], positional: list[Any], given: dict[str, Any]
    ) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """Arguments by name. Positional ones are for what the program does not fill in."""
        parameters = _parameters(function)
        kinds = [p.kind for p in parameters.values()]
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            return given, tuple(positional)
        places = [
            p.name
            for p in parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in self._role.known
        ]
        if len(positional) > len(places):
            rest = [p for p in parameters if p not in {*places, *self._role.known}]
            by_name = f"; write {rest[0]}={written(positional[len(places)])}" if rest else ""
            count = len(places) or "no"
            raise self.error(f"{name} takes {count} arguments without a name{by_name}.")
        arguments = dict(zip(places, positional, strict=False))
        if twice := sorted(set(arguments) & set(given)):
            raise self.error(f"{twice[0]} is given twice; write it once.")
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            for one in given:
                if one not in parameters:
                    close = difflib.get_close_matches(one, parameters, 1)
                    meant = (
                        f"did you mean {close[0]}?" if close else f"it takes {_listed(parameters)}."
                    )
                    raise self.error(f"{name} has no argument {one}; {meant}")
        return {**arguments, **given}, ()


def _listed(parameters: Mapping[str, Any]) -> str:
    return ", ".join(parameters) or "none"


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def complete(call: Call, known: Mapping[str, Any] | frozenset[str] = frozenset()) -> Call:
    """The call with every default of the function written out, but for what is known.

    >>> role = Role("shape", {"box": lambda size, height=1, color=None: None}, "shapes")
    >>> str(complete(parse(role, "box(3)"), {"color"}))
    'box(size=3, height=1)'
    """
    if not inspect.isfunction(call.function):
        return call
    parameters = call.parameters
    defaults = {
        p.name: p.default
        for p in parameters.values()
        if p.default is not p.empty and p.name not in known and _is_literal(p.default)
    }
    arguments = {**defaults, **call.arguments}
    ordered = [name for name in parameters if name in arguments]
    ordered += [name for name in arguments if name not in ordered]
    return dataclasses.replace(
        call,
        arguments={name: _completed(arguments[name], known) for name in ordered},
        more=tuple(_completed(value, known) for value in call.more),
    )


def _completed(value: Any, known: Mapping[str, Any] | frozenset[str]) -> Any:
    return complete(value, known) if isinstance(value, Call) else value


def _is_literal(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_literal, value))
    return value is None or isinstance(value, (bool, int, float, str))


def check_required(role: Role, call: Call, given: Collection[str]) -> None:
    """Refuses a call that lacks an argument.

    Args:
      role: What it is for.
      call: The call.
      given: The arguments that there are, or will be.

    Raises:
      ValueError: One is missing that has no default.
    """
    for parameter in call.parameters.values():
        if (
            parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and parameter.name not in given
        ):
            raise ValueError(
                f"{role.setting} is {str(call)!r}: {call.name} needs {parameter.name}; write"
                f" {call.name}({parameter.name}=...)."
            )


def build(role: Role, call: Call, known: Mapping[str, Any] | None = None) -> Any:
    """What the function returns.

    Args:
      role: What it is for.
      call: The call.
      known: What is filled in where the function takes it and the call does not give it.

    Raises:
      ValueError: An argument is missing, or refused by the function, whose words these are; what
        a function of the user's own raises is told with its line.
    """
    parameters = call.parameters
    filled = {name: value for name, value in (known or {}).items() if name in parameters}
    arguments = {name: _built(role, value, known) for name, value in call.arguments.items()}
    arguments = {**filled, **arguments}
    check_required(role, call, arguments)
    more = [_built(role, value, known) for value in call.more]
    try:
        return call.function(*more, **arguments)
    except Exception as error:
        path = call.name.rpartition(".py:")[0]
        if path:
            raise ValueError(told_with_line(f"{path}.py", error)) from error
        if isinstance(error, jax.errors.JAXTypeError):
            raise  # It is not known yet what an argument is.
        if isinstance(error, (ValueError, TypeError)):
            raise ValueError(f"{role.setting} is {str(call)!r}: {error}") from error
        raise


def _built(role: Role, value: Any, known: Mapping[str, Any] | None) -> Any:
    if isinstance(value, Call):
        return build(role, value, known)
    if isinstance(value, (tuple, list)):
        return type(value)(_built(role, one, known) for one in value)
    if isinstance(value, dict):
        return {name: _built(role, one, known) for name, one in value.items()}
    return value


def written(value: Any) -> str:
    """A value as an expression writes it."""
    if isinstance(value, Call):
        return str(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(written, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name!r}: {written(one)}' for name, one in value.items())}}}"
    return repr(value)


def leaves(call: Call, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The arguments of a call, and those of calls inside it, by the names that lead to them.

    >>> role = Role("shape", {"box": lambda size, lid=None: None}, "shapes")
    >>> list(leaves(complete(parse(role, "box(3, lid=box(1))"))))
    [(('size',), 3), (('lid', 'size'), 1), (('lid', 'lid'), None)]
    """
    for name, value in call.inside():
        if isinstance(value, Call):
            yield from leaves(value, (*at, name))
        else:
            yield (*at, name), value


def replaced(call: Call, at: tuple[str, ...], value: Any) -> Call:
    """The call with another value where names lead to; see `leaves`."""
    name, *rest = at
    if name in call.arguments:
        new = replaced(call.arguments[name], tuple(rest), value) if rest else value
        return call.with_arguments(**{name: new})
    places = [i for i, one in enumerate(call.more) if isinstance(one, Call) and one.name == name]
    if not places:
        return call.with_arguments(**{name: value})
    more = list(call.more)
    more[places[0]] = replaced(more[places[0]], tuple(rest), value) if rest else value
    return dataclasses.replace(call, more=tuple(more))
