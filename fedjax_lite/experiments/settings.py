"""The settings of a run: what it is made of, in expressions, and a few numbers."""

import contextlib
import dataclasses
import inspect
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedjax_lite import _validate
from fedjax_lite.data.mnist import is_mnist
from fedjax_lite.experiments import expressions
from fedjax_lite.experiments.expressions import Call, Role
from fedjax_lite.experiments.tables import ROLES, SCHEDULES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run.

    A setting that chooses something is a name, such as scaffold, or a call as in Python, such as
    fed_prox(mu=0.1, num_epochs=5); my_file.py:net(width=64) calls a function of one's own. What the
    program knows is filled in, as are defaults; fedjax-lite list shows what there is. Numbers with
    options of their own go into these calls, in place of what is written there.

    Attributes:
      dataset: The data set, such as digits, "synthetic(alpha=0.5)", "cifar10_like(crop=24)" or the
        call "read('b.csv', client_column='user', columns={'x': ['a', 'b'], 'y': 'label'})";
        or the path of a file or folder that fl.data.read reads, with the features x and y. A folder
        with the four files of MNIST, or with others in their format, has a test split.
      test: A data set to evaluate on, such as the test split of a file; by default a part of the
        data set is held out.
      held_out: Fraction of each client's examples to evaluate on, between 0 and 1; 0.2 by default.
      partition: How examples are dealt to clients anew, such as "dirichlet(alpha=0.3)", the default
        for digits, or "shards(shards_per_client=2)". Other data sets keep their clients by default.
      num_clients: Number of clients of the partition, or of generated data; 50 by default for
        partitions.
      data_seed: Determines the split, and generated data.
      model: A model, such as logistic, "mlp(hidden=(64,))" or "resnet18(width=32)". By default one
        for the shape of the data: emnist_cnn, cifar_cnn or resnet18 for images in the shapes of
        EMNIST, CIFAR-10 and CIFAR-100, shakespeare_lstm or stackoverflow_transformer for sequences,
        for real-valued targets regression, and else an mlp.
      algorithm: The algorithm, such as fed_avg, "fed_prox(mu=0.1)", scaffold, fed_sgd or
        "apfl(alpha=0.5)".
      num_epochs: How often a client runs through its examples in a round; 5 by default.
      num_steps: Local steps of a client in a round, instead of epochs.
      batch_size: Examples in a local batch; 10 by default.
      client_optimizer: Optimizer of local steps, started anew in each round: sgd by default, or
        such as "sgd(0.1, momentum=0.9)" or "chain(clip_by_global_norm(1.0), adam(0.001))". A
        schedule, such as "sgd(cosine_decay_schedule(0.1, 100))", goes by the number of the round.
      client_lr: Learning rate of clients; 0.1 by default with sgd.
      server_optimizer: Optimizer of the server, such as sgd (the default, FedAvg), "sgd(1.0,
        momentum=0.9)" (FedAvgM), "fed_adam(0.01)" or "adam(0.01, eps=1e-3)".
      server_lr: Learning rate of the server; 1 by default with sgd.
      updates: Transforms of the updates between clients and server, such as "clip_by_norm(1.0),
        quantize_uniform(256)".
      reducer: What makes one aggregate of the updates, such as coordinate_median; by default their
        weighted mean.
      sampler: Which clients take part in a round, such as uniform, poisson, importance, round_robin
        or everyone.
      cohort_size: Clients in a round, with poisson the expected number; 20 by default.
      privacy: Record epsilon, by the noise of the updates and the sampler: "budget(delta=1e-5)".
        With epsilon=3 in it, all rounds together spend no more: gaussian_noise() in the updates,
        without a noise_multiplier, then has the least noise.
      metrics: Metrics beside the model's own, such as "top_k(5), perplexity".
      metric: Metric that runs are judged by: the best model, a target, the picture of clients. By
        default accuracy, or else the first other one by name, or else the loss. Larger is better,
        except for names that end in loss, perplexity, cross_entropy or error.
      fine_tune_epochs: Let each client train the model for so many epochs on its own examples after
        the last round, and evaluate it on its held-out ones; not done by default.
      fine_tune_steps: The same, for so many steps.
      rounds: Number of rounds.
      seed: Determines everything random but the data.
      eval_every: Rounds between two evaluations.
      lanes: Clients trained side by side on a device, which changes the speed only; 1 by default
        on a CPU, up to 64 elsewhere.
    """

    dataset: str = "digits"
    test: str | None = None
    held_out: float | None = None
    partition: str | None = None
    num_clients: int | None = None
    data_seed: int = 0
    model: str | None = None
    algorithm: str = "fed_avg"
    num_epochs: int | None = None
    num_steps: int | None = None
    batch_size: int | None = None
    client_optimizer: str | None = None
    client_lr: float | None = None
    server_optimizer: str = "sgd"
    server_lr: float | None = None
    updates: str | None = None
    reducer: str | None = None
    sampler: str = "uniform"
    cohort_size: int | None = None
    privacy: str | None = None
    metrics: str | None = None
    metric: str | None = None
    fine_tune_epochs: int | None = None
    fine_tune_steps: int | None = None
    rounds: int = 100
    seed: int = 0
    eval_every: int = 10
    lanes: int | None = None

    @property
    def fine_tunes(self) -> dict[str, int]:
        """What says for how long clients train the model further, if they do."""
        given = {name: getattr(self, name) for name in ("fine_tune_epochs", "fine_tune_steps")}
        return {name: number for name, number in given.items() if number is not None}


def settings_from(values: Mapping[str, Any]) -> Settings:
    """Those of some values, by name, that are settings."""
    names = {field.name for field in dataclasses.fields(Settings)}
    return Settings(**{name: values[name] for name in names & values.keys()})


class Calls(NamedTuple):
    """The settings that choose something, as calls, or as the objects that Python was given.

    Where `None`, it depends on the data.
    """

    dataset: Any
    test: Any
    partition: Any
    model: Any
    algorithm: Any
    client_optimizer: Any
    server_optimizer: Any
    updates: Any
    reducer: Any
    sampler: Any
    privacy: Any
    metrics: Any


_SEVERAL = ("updates", "metrics")
_AT_LEAST = {
    "num_clients": 1,
    "num_epochs": 1,
    "num_steps": 1,
    "batch_size": 1,
    "cohort_size": 1,
    "fine_tune_epochs": 1,
    "fine_tune_steps": 1,
    "rounds": 1,
    "eval_every": 1,
    "lanes": 1,
    "seed": 0,
    "data_seed": 0,
}
# Numbers with options of their own: the setting that they go into, and the argument there.
_SHORT = {
    "num_epochs": ("algorithm", "num_epochs"),
    "num_steps": ("algorithm", "num_steps"),
    "batch_size": ("algorithm", "batch_size"),
    "client_lr": ("client_optimizer", "learning_rate"),
    "server_lr": ("server_optimizer", "learning_rate"),
    "cohort_size": ("sampler", "cohort_size"),
}
# Where nothing is said: of these settings, of sgd, and of an mlp.
_DEFAULTS: tuple[tuple[str, str, Any], ...] = (
    ("partition", "min_examples", 1),
    ("model", "hidden", (64,)),
    ("algorithm", "num_epochs", 5),
    ("algorithm", "batch_size", 10),
    ("sampler", "cohort_size", 20),
    ("client_optimizer", "learning_rate", 0.1),
    ("server_optimizer", "learning_rate", 1.0),
)


def check(settings: Settings) -> None:
    """Refuses numbers that are out of range.

    Raises:
      ValueError: One is; it is named.
    """
    for name, minimum in _AT_LEAST.items():
        value = getattr(settings, name)
        if value is not None:
            _validate.integer(name, value, minimum=minimum, maximum=2**31 - 1)
    for name in ("client_lr", "server_lr"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; choose a positive number.")
    if settings.held_out is not None and not 0 < settings.held_out < 1:
        raise ValueError(f"held_out is {settings.held_out}; choose a fraction between 0 and 1.")
    for epochs, steps in (("num_epochs", "num_steps"), ("fine_tune_epochs", "fine_tune_steps")):
        given = getattr(settings, epochs), getattr(settings, steps)
        if None not in given:
            raise ValueError(
                f"{epochs} is {given[0]} beside {steps} {given[1]}; choose one of the two."
            )
    if settings.test is not None and settings.held_out is not None:
        raise ValueError(f"held_out is {settings.held_out} beside test; choose one.")


def calls_of(settings: Settings) -> Calls:
    """The calls of the settings, with the numbers that have options of their own put into them.

    Raises:
      ValueError: A setting is out of range, or no expression, or takes no such number.

    >>> calls = calls_of(Settings(algorithm="fed_prox(mu=0.1)", num_epochs=2, server_lr=0.5))
    >>> str(calls.server_optimizer), calls.algorithm.arguments["num_epochs"]
    ('sgd(learning_rate=0.5, momentum=None, nesterov=False, accumulator_dtype=None)', 2)
    """
    check(settings)
    calls = {name: parsed(name, getattr(settings, name)) for name in Calls._fields}
    if calls["client_optimizer"] is None and _trains(settings, calls["algorithm"]):
        calls["client_optimizer"] = parsed("client_optimizer", "sgd")
    elif not _trains(settings, calls["algorithm"]):
        _refuse_client_options(settings, calls["algorithm"])
    for name, (setting, argument) in _SHORT.items():
        number = getattr(settings, name)
        if number is not None:
            calls[setting] = _put(name, calls[setting], argument, number)
    for setting, argument, number in _DEFAULTS:
        if isinstance(calls[setting], Call):
            calls[setting] = _defaulted(calls[setting], argument, number)
    for setting, value in calls.items():
        role = ROLES[setting]
        if isinstance(value, list):
            calls[setting] = [_completed(role, one) for one in value]
        elif isinstance(value, Call) and setting in ("dataset", "partition"):
            continue  # Numbers of clients and of their examples are put into these first.
        elif isinstance(value, Call):
            calls[setting] = _completed(role, value)
    for setting in ("client_optimizer", "server_optimizer"):
        if isinstance(calls[setting], Call):
            _check_rates(setting, calls[setting])
    return Calls(**calls)


def _trains(settings: Settings, algorithm: Any) -> bool:
    """Whether there is a use for a client optimizer."""
    if settings.fine_tunes or not isinstance(algorithm, Call):
        return True
    return algorithm.takes("client_optimizer")


def _refuse_client_options(settings: Settings, algorithm: Call) -> None:
    for name in ("client_optimizer", "client_lr"):
        value = getattr(settings, name)
        if value is not None:
            raise ValueError(
                f"{name} is {value}, and clients of {algorithm.name} take no steps; leave it out."
            )


def to_settings(settings: Settings, calls: Calls) -> Settings:
    """The settings that say what these calls say, with nothing left open."""
    told: dict[str, Any] = {name: _told(value) for name, value in calls._asdict().items()}
    put = dict.fromkeys(_SHORT)
    sampler = calls.sampler
    if isinstance(sampler, Call) and sampler.takes("rate") and "rate" not in sampler.arguments:
        del put["cohort_size"]  # The rate is its share of the clients, once they are known.
    return dataclasses.replace(settings, **{**told, **put})


def _told(value: Any) -> str | None:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or None
    if value is None or isinstance(value, Call):
        return None if value is None else str(value)
    return f"<{type(value).__name__} of Python>"


def parsed(setting: str, value: Any) -> Any:
    """A setting as a call, or several as a list; objects of Python stay what they are."""
    role = ROLES[setting]
    if inspect.isfunction(value):
        return Call(value.__name__, value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if role.setting in _SEVERAL and (value is None or isinstance(value, str)):
        return list(expressions.parse_all(role, value or ""))
    if not isinstance(value, str):
        return value
    if role.setting in ("dataset", "test") and _is_path(role, value):
        if is_mnist(value):
            split = "both" if role.setting == "dataset" else "test"
            return Call("mnist", role.table["mnist"], {"folder": value, "split": split})
        return Call("read", role.table["read"], {"path": value})
    return expressions.parse(role, value)


def _is_path(role: Role, text: str) -> bool:
    """Whether a text is a path and no expression: names go before files of the same name."""
    if text.replace("-", "_") in role.table:
        return False
    with contextlib.suppress(OSError, ValueError):  # What is too long for a path, or has a NUL.
        if Path(text).exists():
            return True
    is_call = re.search(r"\.py:|[()]", text)
    return not is_call and any(mark in text for mark in (".", "/", os.sep))


def _put(name: str, value: Any, argument: str, number: Any) -> Any:
    """The call with a number that has an option of its own."""
    setting = _SHORT[name][0]
    if not isinstance(value, Call):
        raise ValueError(f"{name} is {number} beside an object as {setting}; leave it out.")
    if argument == "cohort_size" and value.takes("rate") and not value.takes(argument):
        return value  # The rate is its share of the clients, once they are known.
    places = [at for at in _places(value) if at[1] == argument]
    if len(places) != 1:
        takes = "no" if not places else "more than one"
        raise ValueError(
            f"{name} is {number}, and {value.name} takes {takes} {argument}; leave it out, or write"
            f" it where it belongs in {setting}."
        )
    ((path, _),) = places
    return expressions.replaced(value, (*path, argument), number)


def _places(call: Call, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """The parameters of a call and of the calls inside it, each by the names that lead there."""
    yield from ((at, name) for name in call.parameters)
    for name, value in call.inside():
        if isinstance(value, Call) and value.name not in SCHEDULES:
            yield from _places(value, (*at, name))


def _defaulted(call: Call, argument: str, number: Any) -> Call:
    """The call with a default of runs, where it takes one and says nothing."""
    for name, value in call.inside():
        if isinstance(value, Call):
            call = expressions.replaced(call, (name,), _defaulted(value, argument, number))
    if not call.takes(argument) or argument in call.arguments:
        return call
    if call.name != {"learning_rate": "sgd", "hidden": "mlp"}.get(argument, call.name):
        return call
    if argument == "cohort_size" and "rate" in call.arguments:
        return call
    return call.with_arguments(**{argument: number})


def _completed(role: Role, call: Call) -> Call:
    # A sampler's rate may be that of the cohort in the population, noise what a budget allows.
    open_ones = {"rate", "noise_multiplier"}
    expressions.check_required(role, call, {*call.arguments, *role.known, *open_ones})
    return expressions.complete(call, role.known)


def _check_rates(setting: str, call: Call) -> None:
    for at, value in expressions.leaves(call):
        if at[-1] == "learning_rate" and isinstance(value, (int, float)) and value <= 0:
            raise ValueError(f"{setting} has a learning_rate of {value}; choose a positive number.")
