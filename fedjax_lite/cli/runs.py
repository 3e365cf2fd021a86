"""Folders of runs that commands are given."""

import dataclasses
from pathlib import Path
from typing import Any

from fedjax_lite.cli.errors import UsageError, usage_errors
from fedjax_lite.experiments.settings import Settings
from fedjax_lite.runs import reading

# What `train` records beside the settings of an experiment.
RULES = ("target", "patience", "max_seconds", "ema_decay", "store_in_file")


def settings_of_training(folder: Path) -> dict[str, Any]:
    """What a run that `fedjax-lite train` or `baseline` made was recorded with.

    Raises:
      UsageError: It was recorded from Python, or its `config.json` is damaged.
    """
    settings = read_settings(folder)
    known = {field.name for field in dataclasses.fields(Settings)}
    unknown = [name for name in settings if name not in {*known, *RULES, "baseline", "note"}]
    if unknown:
        raise UsageError(
            f"{folder} was recorded with {', '.join(unknown)}, no setting of a command; in Python,"
            " the same call of fl.train goes on with it, and fl.load_state reads its state"
        )
    return settings


def read_run(folder: Path) -> reading.Run:
    """What a run recorded.

    Raises:
      UsageError: The folder is none of a run, or a file of it is damaged.
    """
    with usage_errors():
        return reading.read_run(folder)


def read_settings(folder: Path) -> dict[str, Any]:
    """What a run was recorded with.

    Raises:
      UsageError: The folder is none of a run, or its `config.json` is damaged.
    """
    with usage_errors():
        return reading.read_settings(folder)
