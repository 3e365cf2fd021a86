"""The simulation that settings describe, ready to run."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from fedjax_lite import _validate, samplers
from fedjax_lite.base import Cohort, FederatedAlgorithm, ServerState
from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.data.population import Population
from fedjax_lite.engine import cohort_of
from fedjax_lite.evaluation import (
    ClientEvaluation,
    evaluate,
    evaluate_clients,
    evaluate_fine_tuned,
)
from fedjax_lite.evaluation.metrics import Metric
from fedjax_lite.experiments import expressions
from fedjax_lite.experiments.expressions import Call, written
from fedjax_lite.experiments.loading import Loaded, load
from fedjax_lite.experiments.measuring import Measured, measured, shapes
from fedjax_lite.experiments.settings import Calls, Settings, calls_of, to_settings
from fedjax_lite.experiments.tables import ROLES, SCHEDULES
from fedjax_lite.models.model import Model
from fedjax_lite.privacy.accounting import Budget, calibrate, ledger_of
from fedjax_lite.runs import TrainResult, train
from fedjax_lite.runs.main_metric import main_metric
from fedjax_lite.samplers import Sampler
from fedjax_lite.updates import chain
from fedjax_lite.xla import replicate

_GENERATED_CLIENTS_EVALUATED = 100
_FEW_IDS = 100  # A vocabulary of characters, and not of words.


class Experiment(NamedTuple):
    """A simulation, ready to run.

    Attributes:
      settings: The settings, none of them left open.
      calls: The same, parsed.
      model: The model.
      algorithm: The algorithm.
      population: The clients.
      sampler: Who takes part.
      privacy: What is accounted for; `None` if nothing is.
      metric: The metric that runs are judged by.
      evaluate: `evaluate(state) -> {metric: value}`, on all held-out examples; of models of which
        the server has only a part, or several, each client's on its own. A `Partial` with the data.
      evaluate_clients: `evaluate_clients(state, dataset) -> evaluation`, by the same metrics, of
        the server's model on the examples of each client.
      held_out: The held-out examples of each client; `None` where clients are generated.
      personal: `personal(state, key) -> evaluation`, of the params that each client has for itself
        on its held-out examples: those that the algorithm gives it, or the server's, fine-tuned.
        A `Partial` with the data; `None` if they have none.
      server_has_all: Whether the server has a whole model, and one only.
    """

    settings: Settings
    calls: Calls
    model: Model
    algorithm: FederatedAlgorithm
    population: Population
    sampler: Sampler
    privacy: Budget | None
    metric: str
    evaluate: Partial
    evaluate_clients: Callable[[ServerState, FederatedDataset], ClientEvaluation]
    held_out: FederatedDataset | None
    personal: Partial | None
    server_has_all: bool

    def __repr__(self) -> str:
        return f"Experiment({', '.join(f'{k}={v!r}' for k, v in self._settings().items())})"

    def _settings(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self.settings)
        return {name: value for name, value in settings.items() if value is not None}

    def train(self, **options: Any) -> TrainResult:
        """Runs it by `fl.train`.

        Args:
          **options: Further ones of `fl.train`, such as `checkpoints` or `on_eval`.
        """
        settings = self.settings
        options = {
            "evaluate": self.evaluate,
            "eval_every": settings.eval_every,
            "privacy": self.privacy,
            **options,
        }
        key = jax.random.key(settings.seed)
        return train(
            self.algorithm, self.population, self.sampler, settings.rounds, key=key, **options
        )


def experiment(**settings: Any) -> Experiment:
    """A simulation from its settings: what `fedjax-lite train` runs, from Python.

    Args:
      **settings: Those of `fedjax-lite train`, as its help tells them: expressions such as
        `algorithm="fed_prox(mu=0.1)"`, and numbers such as `rounds=100`. In place of an expression,
        an object serves: a `FederatedDataset` or a pair of one to train and one to evaluate on, a
        `Model`, an optax transformation, an `UpdateTransform`, a `Sampler`, a dict of metrics; or
        a function that is given what it takes of what the program knows, such as
        `lambda model, client_optimizer, server_optimizer: ...` for an algorithm.

    Returns:
      An `Experiment`: the model, the algorithm and all else, and `train()`.

    Raises:
      ValueError: A setting is out of range, or no expression, or cannot be met.
      TypeError: There is no such setting.
      ImportError: A package is missing that the data set needs.

    >>> found = experiment(dataset="synthetic(num_clients=3)", model="logistic", cohort_size=2)
    >>> state = found.algorithm.init(jax.random.key(0))
    >>> sorted(found.evaluate(state)), found.settings.model
    (['accuracy', 'loss'], 'logistic()')
    """
    return build(Settings(**settings))


def build(settings: Settings, datasets: tuple[FederatedDataset, ...] | None = None) -> Experiment:
    """The simulation of some settings.

    Args:
      settings: The settings.
      datasets: What to train and to evaluate on, in place of the files that the settings name.

    Raises:
      ValueError: A setting is out of range, or no expression, or cannot be met.
    """
    calls = calls_of(settings)
    loaded = load(settings, calls, datasets)
    calls = loaded.calls
    if calls.model is None:
        calls = calls._replace(model=_default_model(loaded))
    calls = calls._replace(model=_with_vocabulary(calls.model, calls.dataset))
    model, own_metrics = _model(calls.model, loaded)
    sampler, calls = _sampler(settings, calls, loaded, model)
    privacy = _made("privacy", calls.privacy)
    calls = _with_noise(calls, privacy, settings.rounds, sampler)
    algorithm = algorithm_of(calls, settings, model, sampler.max_staleness)
    if privacy is not None:
        ledger_of(privacy, algorithm, sampler, settings.rounds)  # Refuses it at once.
    asked = measured(model, own_metrics, _metrics(calls, loaded), loaded.examples)
    metric = main_metric(asked.numbers, settings.metric)
    on_device = replicate({name: jnp.asarray(x) for name, x in loaded.examples.items()})

    @jax.jit
    def evaluate_on(state: ServerState, examples: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return evaluate(asked.model, state, examples, metrics=asked.metrics)

    def on_clients(state: ServerState, dataset: FederatedDataset) -> ClientEvaluation:
        everyone = cohort_of(dataset.resident(), np.arange(dataset.num_clients))
        return evaluate_clients(asked.model, state, everyone, metrics=asked.metrics)

    personal = _personal(settings, calls, asked, algorithm, loaded)
    evaluate_personal = None if personal is None else personal.func
    server_has_all = _server_has_all(model, algorithm)

    def evaluated(examples: Any, *rest: Any) -> dict[str, jax.Array]:
        *cohorts, state = rest
        if server_has_all or evaluate_personal is None:
            return evaluate_on(state, examples)
        return evaluate_personal(*cohorts, state, jax.random.key(settings.data_seed)).pooled

    closed = to_settings(loaded.settings, calls)
    if datasets is not None:  # Read by somebody else, from where the settings say.
        closed = dataclasses.replace(closed, dataset=settings.dataset, test=settings.test)
    return Experiment(
        settings=closed,
        calls=calls,
        model=model,
        algorithm=algorithm,
        population=loaded.population,
        sampler=sampler,
        privacy=privacy,
        metric=metric,
        evaluate=Partial(evaluated, on_device, *(personal.args if personal else ())),
        evaluate_clients=on_clients,
        held_out=loaded.held_out,
        personal=personal,
        server_has_all=server_has_all,
    )


def _server_has_all(model: Model, algorithm: FederatedAlgorithm) -> bool:
    """Whether the server's params and model state are those of the model, and of no several."""

    def drawn(key: jax.Array) -> Any:
        params, model_state = model.init(key)
        return params if model.split is None else model.split(params)[0], model_state

    def of_server(key: jax.Array) -> Any:
        state = algorithm.init(key, num_clients=1)
        return state.params, state.model_state

    arrays = [jax.tree.leaves(jax.eval_shape(f, jax.random.key(0))) for f in (drawn, of_server)]
    shapes = [[x.shape for x in part] for part in arrays]
    return shapes[0] == shapes[1]


def algorithm_of(
    calls: Calls, settings: Settings, model: Model, max_staleness: int = 0
) -> FederatedAlgorithm:
    """The algorithm, in whose calls numbers may be traced."""
    if isinstance(calls.algorithm, FederatedAlgorithm):
        return calls.algorithm
    known: dict[str, Any] = {
        "model": model,
        "client_optimizer": _client_optimizer(calls.client_optimizer),
        "server_optimizer": _made("server_optimizer", calls.server_optimizer),
        "lanes": settings.lanes,
        "max_staleness": max_staleness,
    }
    updates = calls.updates
    if isinstance(updates, list):
        updates = [_made("updates", one) for one in updates]
        updates = chain(*updates) if updates else None
    if updates is not None:
        known["pipeline"] = updates
    if calls.reducer is not None:
        known["reducer"] = _made("reducer", calls.reducer)
    algorithm = _made("algorithm", calls.algorithm, known)
    _validate.instance("what algorithm returned", algorithm, FederatedAlgorithm)
    return algorithm


def _made(setting: str, value: Any, known: Mapping[str, Any] | None = None) -> Any:
    """What a call returns; an object of Python is what it is."""
    return expressions.build(ROLES[setting], value, known) if isinstance(value, Call) else value


def _client_optimizer(value: Any) -> Any:
    """A transformation, or one for each round if a schedule is in it.

    Clients begin anew in each round: by its own count, a schedule would do the same in all of them.
    """
    if not isinstance(value, Call) or not _has_schedule(value):
        return _made("client_optimizer", value)
    return lambda round: _made("client_optimizer", _at_round(value, round))


def _has_schedule(call: Call) -> bool:
    return any(
        isinstance(value, Call) and (value.name in SCHEDULES or _has_schedule(value))
        for _, value in call.inside()
    )


def _at_round(call: Call, round: jax.Array) -> Call:
    """The call with the values of its schedules."""

    def now(value: Any) -> Any:
        if not isinstance(value, Call):
            return value
        if value.name in SCHEDULES:
            return _made("client_optimizer", value)(round)
        return _at_round(value, round)

    arguments = {name: now(value) for name, value in call.arguments.items()}
    return dataclasses.replace(call, arguments=arguments, more=tuple(map(now, call.more)))


def _default_model(loaded: Loaded) -> Call:
    """A model for the shape of the data."""
    shape, y = loaded.examples["x"].shape[1:], loaded.examples["y"]
    if y.dtype.kind == "b":
        name = "stackoverflow_tags"
    elif y.dtype.kind == "f":
        name = "regression"
    elif y.ndim == 2:
        name = "shakespeare_lstm" if loaded.num_classes <= _FEW_IDS else "stackoverflow_transformer"
    elif shape == (28, 28, 1):
        name = "emnist_cnn"
    elif shape == (32, 32, 3):
        name = "cifar_cnn" if loaded.num_classes <= 10 else "resnet18"
    else:
        name = "mlp"
    model: Call = calls_of(Settings(model=name)).model
    return model


def _with_vocabulary(model: Any, dataset: Any) -> Any:
    """The model with the vocabulary of data that are drawn."""
    if not isinstance(model, Call):
        return model
    inside = {name: _with_vocabulary(value, dataset) for name, value in model.arguments.items()}
    model = model.with_arguments(**inside)
    if not model.takes("vocabulary_size"):
        return model
    drawn = isinstance(dataset, Call) and dataset.arguments.get("vocabulary_size")
    default = model.parameters["vocabulary_size"].default
    if drawn and model.arguments["vocabulary_size"] == default:
        model = model.with_arguments(vocabulary_size=drawn)
    return model


def _model(value: Any, loaded: Loaded) -> tuple[Model, list[str]]:
    """The model, tried on the shapes of the data, and the names of its metrics."""
    examples = loaded.examples
    known = {
        "input_shape": examples["x"].shape[1:],
        "num_classes": loaded.num_classes,
        "target_shape": examples["y"].shape[1:],
    }
    if not loaded.num_classes and isinstance(value, Call) and _asks_for("num_classes", value):
        raise ValueError(
            f"model is {value.name}, of classes, and the data have y of dtype"
            f" {examples['y'].dtype}; choose regression, or a model of your own for such targets."
        )
    model = _made("model", value, known)
    _validate.instance("what model returned", model, Model, "fl.linen_model(...)")
    told = written(value) if isinstance(value, Call) else "an object"
    if model.num_classes is not None and model.num_classes < loaded.num_classes:
        raise ValueError(
            f"model is {told}, of {model.num_classes} classes or ids, and the data have"
            f" {loaded.num_classes}; choose at least as many."
        )
    try:
        own_metrics = list(shapes(model.metrics, model, examples))
    except Exception as error:
        x = examples["x"]
        raise ValueError(
            f"model is {told}, and fails on examples x of dtype {x.dtype} and shape {x.shape[1:]}:"
            f" {_validate.first_line(error)}; choose a model for them, or the data that it is for."
        ) from error
    return model, own_metrics


def _sampler(
    settings: Settings, calls: Calls, loaded: Loaded, model: Model
) -> tuple[Sampler, Calls]:
    num_clients = loaded.population.num_clients
    sizes = np.ones(num_clients) if loaded.train is None else loaded.train.num_examples
    call = calls.sampler
    if isinstance(call, Call):
        size = call.arguments.get("cohort_size", settings.cohort_size or 20)
        rate_is_due = call.takes("rate") and not {"cohort_size", "rate"} & {*call.arguments}
        if size is not None and (rate_is_due or call.takes("cohort_size")):
            _validate.integer("cohort_size", size, minimum=1, maximum=num_clients)
        if rate_is_due:
            call = call.with_arguments(rate=size / num_clients)
            call = expressions.complete(call, ROLES["sampler"].known)
            calls = calls._replace(sampler=call)
    known: dict[str, Any] = {
        "num_clients": num_clients,
        "num_examples": sizes,
        "num_rounds": settings.rounds,
    }
    if isinstance(call, Call) and _asks_for("algorithm", call):
        # For the size of its messages, which does not depend on what is still open.
        known["algorithm"] = algorithm_of(_with_multiplier(calls, 1.0), settings, model)
    sampler = _made("sampler", call, known)
    _validate.instance("what sampler returned", sampler, samplers.Sampler)
    return sampler, calls


def _with_noise(calls: Calls, privacy: Budget | None, num_rounds: int, sampler: Sampler) -> Calls:
    """The calls with the noise that a budget allows, where the updates leave it open."""
    if privacy is None or privacy.epsilon is None or not isinstance(calls.updates, list):
        return calls
    if not any(map(_is_open, calls.updates)):
        return calls
    least = calibrate(
        privacy.epsilon, privacy.delta, num_rounds, sampler, accountant=privacy.accountant
    )
    return _with_multiplier(calls, math.ceil(1e4 * least) / 1e4)  # As it is recorded.


def _with_multiplier(calls: Calls, noise_multiplier: float) -> Calls:
    """The calls with a noise multiplier, where the updates leave it open."""
    if not isinstance(calls.updates, list):
        return calls
    updates = [
        expressions.complete(call.with_arguments(noise_multiplier=noise_multiplier))
        if _is_open(call)
        else call
        for call in calls.updates
    ]
    return calls._replace(updates=updates)


def _is_open(call: Any) -> bool:
    takes = isinstance(call, Call) and call.takes("noise_multiplier")
    return takes and "noise_multiplier" not in call.arguments


def _asks_for(name: str, call: Call) -> bool:
    """Whether a function takes an argument, or one inside its call."""
    inside = (value for _, value in call.inside() if isinstance(value, Call))
    return call.takes(name) or any(_asks_for(name, value) for value in inside)


def _metrics(calls: Calls, loaded: Loaded) -> dict[str, Metric]:
    """Metrics by the name that they are recorded under."""
    if not isinstance(calls.metrics, list):
        return dict(calls.metrics or {})
    names = [call.name for call in calls.metrics]
    return {
        call.name if names.count(call.name) == 1 else str(call): _made(
            "metrics", call, {"num_classes": loaded.num_classes}
        )
        for call in calls.metrics
    }


def _personal(
    settings: Settings,
    calls: Calls,
    asked: Measured,
    algorithm: FederatedAlgorithm,
    loaded: Loaded,
) -> Partial | None:
    """What evaluates the params that clients have for themselves."""
    client_model = algorithm.client_model
    if client_model is None and not settings.fine_tunes:
        return None
    if client_model is not None and settings.fine_tunes:
        ((name, number),) = settings.fine_tunes.items()
        raise ValueError(
            f"{name} is {number}, and clients of the algorithm have models for themselves, which"
            " are evaluated; leave it out."
        )
    train, held_out, population = loaded.train, loaded.held_out, loaded.population
    files = None if train is None or held_out is None else (train, held_out)
    if files is not None and set(files[0].client_ids) != set(files[1].client_ids):
        raise ValueError(
            f"test has {files[1].num_clients} clients that are not those of dataset, of which each"
            " is to be evaluated on examples of its own; choose the test split of the same clients,"
            " or leave test out."
        )
    optimizer = _client_optimizer(calls.client_optimizer)
    batch_size = calls.algorithm.arguments.get("batch_size")

    # Clients that are generated draw other examples from another key.
    ids = np.arange(min(population.num_clients, _GENERATED_CLIENTS_EVALUATED))
    test_population: Any = population
    if files is not None:
        ids = np.arange(population.num_clients)
        test_population = files[1].select(files[0].client_ids).resident()
    key_sizes = jax.random.key(settings.data_seed)

    def personal(
        cohort: Cohort, held_out_cohort: Cohort, state: ServerState, key: jax.Array
    ) -> ClientEvaluation:
        if client_model is not None:
            return evaluate_clients(
                *(asked.model, state, held_out_cohort),
                metrics=asked.metrics,
                client_model=client_model,
                key=key,
            )
        _, after = evaluate_fine_tuned(
            asked.model,
            state,
            cohort,
            held_out_cohort,
            optimizer,
            key=key,
            num_epochs=settings.fine_tune_epochs or 1,
            num_steps=settings.fine_tune_steps,
            batch_size=batch_size,
            metrics=asked.metrics,
        )
        return after

    return Partial(
        personal,
        cohort_of(population, ids, key=key_sizes),
        cohort_of(test_population, ids, key=key_sizes),
    )


experiment.__signature__ = inspect.signature(Settings)  # type: ignore[attr-defined]
