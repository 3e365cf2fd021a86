"""Settings that vary: other values for numbers inside expressions, and which share a program."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_lite.base import FederatedAlgorithm
from fedjax_lite.experiments import expressions
from fedjax_lite.experiments.build import Experiment, algorithm_of
from fedjax_lite.experiments.expressions import Call
from fedjax_lite.experiments.settings import Calls, Settings, calls_of, to_settings

# In these, numbers can be arguments of a compiled program; the rest decides what is compiled.
TRACED = ("algorithm", "client_optimizer", "server_optimizer", "updates", "reducer")


def varied_settings(base: Settings, given: Mapping[str, Any]) -> Settings:
    """The settings with other values, by names such as `seed` or `algorithm.mu`.

    Raises:
      ValueError: A value is refused, or a name leads to no argument, or to several.

    >>> varied_settings(Settings(), {"client_optimizer.learning_rate": 0.5}).client_optimizer
    'sgd(learning_rate=0.5, momentum=None, nesterov=False, accumulator_dtype=None)'
    """
    plain = {name: value for name, value in given.items() if "." not in name}
    settings = dataclasses.replace(base, **plain)
    calls = calls_of(settings)
    for name, value in given.items():
        root, *path = name.split(".")
        if path:
            call = getattr(calls, root)
            calls = calls._replace(**{root: _vary(root, call, tuple(path), value)})
    return _closed(to_settings(settings, calls))


def _closed(settings: Settings) -> Settings:
    """The settings, checked with the values that were put into them."""
    return to_settings(settings, calls_of(settings))


def _vary(setting: str, value: Any, path: tuple[str, ...], new: Any) -> Any:
    """A setting with another value for one of the arguments in it."""
    if isinstance(value, list):
        named_so = [i for i, one in enumerate(value) if one.name == path[0]]
        if len(named_so) != 1 or len(path) < 2:
            named = ", ".join(one.name for one in value) or "nothing"
            raise ValueError(
                f"vary is {setting}.{'.'.join(path)}, and {setting} has {named}; write"
                f" {setting}, the name of one of them, and its argument."
            )
        (place,) = named_so
        changed = _vary(setting, value[place], path[1:], new)
        return [*value[:place], changed, *value[place + 1 :]]
    if not isinstance(value, Call):
        raise ValueError(
            f"vary is {setting}.{'.'.join(path)}, and {setting} is left open; name what it is."
        )
    places = [at for at, _ in expressions.leaves(value) if at[-len(path) :] == path]
    if len(path) == 1 and value.takes(path[0]):
        places = [path]
    if len(places) != 1:
        paths = places or [at for at, _ in expressions.leaves(value)]
        choices = ", ".join(f"{setting}.{'.'.join(at)}" for at in paths)
        raise ValueError(f"vary is {setting}.{'.'.join(path)}; choose one of {choices}.")
    old = dict(expressions.leaves(value)).get(places[0])
    if isinstance(old, float) and type(new) is int:
        new = float(new)  # A whole number would decide what is compiled.
    return expressions.replaced(value, places[0], new)


def numbers_of(calls: Calls) -> dict[tuple[str, ...], float]:
    """The numbers that can vary within a program, by where they are."""
    found: dict[tuple[str, ...], float] = {}
    for setting in TRACED:
        chosen = getattr(calls, setting)
        several = chosen if isinstance(chosen, list) else [chosen]
        for i, call in enumerate(several):
            for at, value in expressions.leaves(call) if isinstance(call, Call) else ():
                if isinstance(value, float):
                    found[setting, str(i), *at] = value
    return found


def with_numbers(calls: Calls, numbers: Mapping[tuple[str, ...], Any]) -> Calls:
    """The calls with other numbers."""
    for (setting, i, *at), number in numbers.items():
        value = getattr(calls, setting)
        if isinstance(value, list):
            value = list(value)
            value[int(i)] = expressions.replaced(value[int(i)], tuple(at), number)
        else:
            value = expressions.replaced(value, tuple(at), number)
        calls = calls._replace(**{setting: value})
    return calls


def group_by_program(runs: Sequence[Settings]) -> list[list[int]]:
    """The places of runs that one program can run: those that differ in traced numbers alone."""
    groups: dict[Settings, list[int]] = {}
    for place, settings in enumerate(runs):
        calls = calls_of(settings)
        shape = with_numbers(calls, dict.fromkeys(numbers_of(calls), 1.0))
        alike = dataclasses.replace(to_settings(settings, shape), seed=0)
        groups.setdefault(alike, []).append(place)
    return list(groups.values())


def group_by_numbers(runs: Sequence[Settings]) -> list[list[int]]:
    """The places of runs that differ in seeds alone, where a program can run no others together."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for place, settings in enumerate(runs):
        groups.setdefault(tuple(numbers_of(calls_of(settings)).values()), []).append(place)
    return list(groups.values())


def algorithms_of(
    built: Experiment, runs: Sequence[Settings]
) -> tuple[Callable[..., FederatedAlgorithm], dict[str, np.ndarray]]:
    """The algorithms of runs that one program can run, as a function of what varies among them.

    Args:
      built: The experiment of the first one.
      runs: The settings of all.

    Returns:
      `build(**numbers) -> algorithm`, in which the numbers may be traced, and these, `[runs]` each.
    """
    of_runs = [numbers_of(calls_of(run)) for run in runs]
    varying = [at for at in of_runs[0] if len({numbers[at] for numbers in of_runs}) > 1]

    def algorithm(**numbers: Any) -> FederatedAlgorithm:
        by_place = {tuple(name.split(".")): number for name, number in numbers.items()}
        calls = with_numbers(built.calls, by_place)
        return algorithm_of(calls, built.settings, built.model, built.sampler)

    return algorithm, {
        ".".join(at): np.array([numbers[at] for numbers in of_runs], np.float32) for at in varying
    }
