"""Commands in this process: another one imports JAX for two seconds."""

import dataclasses
import json

import pytest

from fedjax_lite.cli import main
from fedjax_lite.experiments.build import build

_built = {}


def build_once(settings, datasets=None):
    """The experiment of some settings, whose programs all seeds and numbers of rounds share."""
    own = {name: getattr(settings, name) for name in ("seed", "rounds", "eval_every")}
    key = dataclasses.replace(settings, **dict.fromkeys(own, 1))
    if key not in _built:
        _built[key] = build(key, datasets)
    built = _built[key]
    return built._replace(settings=dataclasses.replace(built.settings, **own))


def report(capsys, *args):
    """What a command reports."""
    main([*map(str, args), "--json"])
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *args):
    """What a command refuses, in a line."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, args)))
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    return captured.err
