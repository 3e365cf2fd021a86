"""Commands in this process: another one imports JAX for two seconds."""

import dataclasses
import functools
import json

import pytest

from fedjax_lite.cli import main
from fedjax_lite.experiments.build import build

_build = functools.cache(build)


def build_once(settings, datasets=None):
    """The experiment of some settings, whose programs all numbers of rounds share."""
    rounds = {"rounds": settings.rounds, "eval_every": settings.eval_every}
    built = _build(dataclasses.replace(settings, rounds=1, eval_every=1), datasets)
    return built._replace(settings=dataclasses.replace(built.settings, **rounds))


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
