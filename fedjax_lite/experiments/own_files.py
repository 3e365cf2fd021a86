"""Functions from a user's own files, which are imported because the user named them."""

import difflib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

_MODULES: dict[Path, ModuleType] = {}


def from_file(setting: str, text: str) -> Callable[..., Any]:
    """The function `path.py:name`."""
    where, _, name = text.rpartition(":")
    path = Path(where).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"{setting} is {text!r}: there is no file {where}; write its path.")
    if path not in _MODULES:
        _MODULES[path] = _imported(path, where)
    module = _MODULES[path]
    function = getattr(module, name, None)
    if not callable(function):
        functions = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        close = difflib.get_close_matches(name, functions, 1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{setting} is {text!r}: {where} has no function {name}{meant}")
    return function


def _imported(path: Path, where: str) -> ModuleType:
    # A name that no other module has, under which dataclasses find the file's names.
    spec = importlib.util.spec_from_file_location(f"own_{len(_MODULES)}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # As of a script: it may import from beside it.
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise ValueError(told_with_line(where, error)) from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def told_with_line(where: str, error: Exception) -> str:
    """An error inside a file of the user's, with the line that it comes from."""
    file = str(Path(where).expanduser().resolve())
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == file
    ]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines = [error.lineno]
    line = f", line {lines[-1]}" if lines else ""
    return f"{where}{line}: {type(error).__name__}: {error}"
