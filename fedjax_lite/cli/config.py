"""Settings from a file: as if they were given on the command line, before what is."""

import argparse
import difflib
import json
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from fedjax_lite._extras import require
from fedjax_lite.cli.errors import UsageError
from fedjax_lite.cli.runs import settings_of_training

# Of YAML's scalars, these two alone: 1.1 reads off as false, 010 as 8 and 1:30 as 90. All others
# stay as they are written, for the parser of the command line.
_NULL = ("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"))
_BOOL = ("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"))
_SCALARS = {**{first: [_NULL] for first in ("", *"~nN")}, **{first: [_BOOL] for first in "tTfF"}}


def _option(args: Sequence[str], name: str) -> Path | None:
    """The value of an option, before the others are known to be right."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(name, type=Path, dest="path")
    try:
        return parser.parse_known_args(args)[0].path
    except argparse.ArgumentError:  # Without a value: left for the real parser to tell.
        return None


def settings_from_file(
    args: Sequence[str], commands: Mapping[str, type]
) -> tuple[Path, list[str]] | None:
    """The settings that `--config` or `--resume` names: the file, and them as arguments.

    Args:
      args: The command, and its options.
      commands: The options of each command that takes settings.

    Raises:
      UsageError: There are both, or the file is none of settings.
    """
    command = args[0] if args else ""
    if command not in commands:
        return None
    config = _option(args, "--config")
    run = _option(args, "--resume") if command == "train" else None
    if config and run:
        raise UsageError("--config is given beside --resume; leave it out, the run has its own")
    if config:
        path, settings = config, _read(config)
        recorded = isinstance(settings, dict) and isinstance(settings.get("config"), dict)
        if recorded:  # The file that a run wrote: what it ran on is beside its settings.
            settings = settings["config"]
    elif run:
        if not (run / "checkpoints").is_dir():
            raise UsageError(f"--resume {run} holds no checkpoints; choose the folder of a run")
        path, recorded = run / "config.json", True
        settings = settings_of_training(run)
        if name := settings.get("baseline"):
            data, test = (str(settings.get(name)) for name in ("dataset", "test"))
            given = "--synthetic" if "note" in settings else f"--data {data}"
            given += f" --test {test}" if "note" not in settings and test != data else ""
            raise UsageError(
                f"--resume {run} is a run of a baseline; fedjax-lite baseline {name} {given}"
                f" --resume {run} goes on with it"
            )
    else:
        return None
    if not isinstance(settings, dict):
        raise UsageError(f"{path} holds no settings by name; write them as name: value")
    if recorded:
        settings = {name: value for name, value in settings.items() if value is not None}
    return path, _arguments(path, settings, command, commands[command])


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            settings = json.loads(text, object_pairs_hook=_distinct)
        elif path.suffix in (".yaml", ".yml"):
            settings = _yaml(text)
        else:
            raise ValueError("choose a file that ends in .yaml or .json")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    return settings


def _yaml(text: str) -> Any:
    yaml: Any = require("yaml", "run")
    try:
        loader = yaml.SafeLoader(text)
        loader.yaml_implicit_resolvers = _SCALARS
        node = loader.get_single_node()
        if isinstance(node, yaml.MappingNode):
            _distinct([(str(key.value), value) for key, value in node.value])
        return {} if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _distinct(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """An object of settings; of two equal names, the first would be lost."""
    names = [str(name).replace("-", "_") for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} comes twice; write each name once")
    return dict(pairs)


def _arguments(path: Path, settings: dict[Any, Any], command: str, options: type) -> list[str]:
    hints = typing.get_type_hints(options)
    annotated = typing.get_type_hints(options, include_extras=True)
    arguments = []
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if isinstance(value, dict):
            raise UsageError(f"{path}: {key} holds settings of its own; write them at the top")
        if name == "baseline":
            raise UsageError(
                f"{path} is of the baseline {value}; run it by fedjax-lite baseline {value}"
            )
        if name not in hints or name in ("config", "resume"):
            close = difflib.get_close_matches(name, hints, 1)
            way_out = f"did you mean {close[0]}?" if close else f"see fedjax-lite {command} --help"
            raise UsageError(f"{path}: {key} is no setting of {command}; {way_out}")
        if value is not None and Positional in getattr(annotated[name], "__metadata__", ()):
            arguments.append(str(value))
        elif value is not None:
            try:
                arguments += _argument(name, value, hints[name])
            except ValueError as error:
                raise UsageError(f"{path}: {key} {error}") from None
    return arguments


def _argument(name: str, value: Any, hint: Any) -> list[str]:
    """A setting as it would be given on the command line."""
    option = f"--{name.replace('_', '-')}"
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError(f"is {value!r}; write true or false")
        return [option] if value else []
    is_tuple = any(typing.get_origin(kind) is tuple for kind in (hint, *typing.get_args(hint)))
    if not is_tuple:
        if isinstance(value, list):
            raise ValueError(f"is {value!r}; give it one value")
        return [f"{option}={value}"]
    values = list(map(str, value if isinstance(value, list) else [value]))
    return [f"{option}={one}" for one in values] if name == "vary" else [option, *values]
