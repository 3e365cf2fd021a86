"""Commands in this process: another one imports JAX for two seconds."""

import json

import pytest

from fedjax_lite.cli import main


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
