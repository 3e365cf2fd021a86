"""The simulation that an experiment describes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_lite import _validate, data, models, samplers
from fedjax_lite.algorithms.apfl import apfl
from fedjax_lite.algorithms.fed_avg import fed_avg, fed_prox
from fedjax_lite.algorithms.fed_nova import fed_nova
from fedjax_lite.algorithms.fed_sgd import fed_sgd
from fedjax_lite.algorithms.scaffold import scaffold
from fedjax_lite.base import FederatedAlgorithm, ServerState, UpdateTransform
from fedjax_lite.data import partition
from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.data.population import Population
from fedjax_lite.data.sources import parse_columns
from fedjax_lite.engine.cohorts import cohort_of
from fedjax_lite.evaluation.central import evaluate
from fedjax_lite.evaluation.clients import ClientEvaluation, evaluate_clients
from fedjax_lite.evaluation.fine_tune import evaluate_fine_tuned
from fedjax_lite.experiments.experiment import Experiment, resolve
from fedjax_lite.models.model import Model
from fedjax_lite.samplers import Sampler
from fedjax_lite.updates.clipping import clip_by_norm
from fedjax_lite.updates.pipeline import chain
from fedjax_lite.updates.quantization import quantize_uniform
from fedjax_lite.xla.mesh import replicate

_CLASSES = {"gaussian-images": 62, "emnist-like": 62, "cifar10-like": 10, "cifar100-like": 100}
_SEQUENCES: dict[str, dict[str, Any]] = {
    "shakespeare-like": {"sequence_length": 80},
    "stackoverflow-like": {"sequence_length": 20, "end": 0.1},
}
_LANGUAGE_MODELS: dict[str, Callable[[int], Model]] = {
    "shakespeare-lstm": models.shakespeare_lstm,
    "stackoverflow-lstm": models.stackoverflow_lstm,
    "stackoverflow-transformer": models.stackoverflow_transformer,
}
_FIXED_SHAPES: dict[str, tuple[tuple[int, ...], Callable[[int], Model]]] = {
    "emnist-dense": ((28, 28, 1), models.emnist_dense),
    "emnist-cnn": ((28, 28, 1), models.emnist_cnn),
    "cifar-cnn": ((32, 32, 3), models.cifar_cnn),
}

_GENERATED_CLIENTS_EVALUATED = 100

Datasets = tuple[FederatedDataset, FederatedDataset]


class Built(NamedTuple):
    """A simulation, ready to run.

    Attributes:
      experiment: The settings, none of them left open.
      model: The model.
      algorithm: The algorithm.
      population: The clients.
      sampler: Who takes part.
      evaluate: `evaluate(state) -> {metric: scalar}`, on all held-out examples.
      held_out: The held-out examples of each client; `None` where clients are generated.
      personal: `personal(state, key) -> evaluation`, of the params that each client has for itself
        on its held-out examples: those that the algorithm gives it, or the server's, fine-tuned.
        `None` if they have none.
    """

    experiment: Experiment
    model: Model
    algorithm: FederatedAlgorithm
    population: Population
    sampler: Sampler
    evaluate: Callable[[ServerState], dict[str, jax.Array]]
    held_out: FederatedDataset | None
    personal: Callable[[ServerState, jax.Array], ClientEvaluation] | None


def build(experiment: Experiment, datasets: Datasets | None = None) -> Built:
    """Loads the data, and puts the model and the algorithm together.

    Args:
      experiment: The settings.
      datasets: What to train and to evaluate on, in place of the files that the experiment names
        as `dataset` and `test`.

    Raises:
      ValueError: A setting is out of range, does not belong to what is chosen, or cannot be met.
      ImportError: A package is missing that the data set needs.

    >>> built = build(Experiment(dataset="synthetic", num_clients=3, cohort_size=2))
    >>> state = built.algorithm.init(jax.random.key(0))
    >>> sorted(built.evaluate(state))
    ['accuracy', 'loss']
    """
    experiment = resolve(experiment)
    population, train, held_out, examples, num_classes = _load(experiment, datasets)
    model = _model(experiment, examples, num_classes)
    algorithm = algorithm_of(experiment, model)
    on_device = replicate({name: jnp.asarray(feature) for name, feature in examples.items()})
    evaluate_on = jax.jit(lambda state, examples: evaluate(model, state, examples))
    return Built(
        experiment=experiment,
        model=model,
        algorithm=algorithm,
        population=population,
        sampler=_sampler(experiment, population, train),
        evaluate=lambda state: evaluate_on(state, on_device),
        held_out=held_out,
        personal=_personal(experiment, model, algorithm, population, train, held_out),
    )


# The settings below are resolved: what applies is not None.


def _personal(
    settings: Any,
    model: Model,
    algorithm: FederatedAlgorithm,
    population: Population,
    train: FederatedDataset | None,
    held_out: FederatedDataset | None,
) -> Callable[[ServerState, jax.Array], ClientEvaluation] | None:
    """What evaluates the params that clients have for themselves."""
    client_params, num_epochs = algorithm.client_params, settings.fine_tune_epochs
    if client_params is None and num_epochs is None:
        return None
    files = None if train is None or held_out is None else (train, held_out)
    if files is not None and set(files[0].client_ids) != set(files[1].client_ids):
        raise ValueError(
            f"test has {files[1].num_clients} clients that are not those of dataset, of which each"
            " is to be evaluated on examples of its own; choose the test split of the same clients,"
            " or leave test out."
        )

    def personal(state: ServerState, key: jax.Array) -> ClientEvaluation:
        # Clients that are generated draw other examples from another key.
        ids = np.arange(min(population.num_clients, _GENERATED_CLIENTS_EVALUATED))
        test_population: Any = population
        if files is not None:
            ids = np.arange(population.num_clients)
            test_population = files[1].select(files[0].client_ids).resident()
        key_sizes = jax.random.key(settings.data_seed)
        held_out_cohort = cohort_of(test_population, ids, key=key_sizes)
        if client_params is not None:
            return evaluate_clients(
                model, state, held_out_cohort, client_params=client_params, key=key
            )
        _, after = evaluate_fine_tuned(
            model,
            state,
            cohort_of(population, ids, key=key_sizes),
            held_out_cohort,
            _client_optimizer(settings),
            key=key,
            num_epochs=num_epochs,
            batch_size=settings.batch_size,
        )
        return after

    return personal


def _load(
    settings: Any, datasets: Datasets | None
) -> tuple[Population, FederatedDataset | None, FederatedDataset | None, Mapping[str, Any], int]:
    """The clients, their examples and held-out ones, all that is evaluated on, and classes."""
    if settings.examples_per_client is not None:
        population, draw, num_classes = _generate(settings)
        examples = draw(jax.random.key(settings.data_seed), _num_evaluated(settings))
        return population, None, None, examples, num_classes
    train, held_out = _split(settings, datasets)
    for name, dataset in (("dataset", train), ("test", held_out)):
        _check_features(name, dataset)
    if train.features["x"].shape != held_out.features["x"].shape:
        raise ValueError(
            f"test has examples x of shape {held_out.features['x'].shape} where dataset has"
            f" {train.features['x'].shape}; choose the other split of the same data set."
        )
    # A rare class may be in one of the two alone.
    num_classes = 1 + max(int(part.examples["y"].max()) for part in (train, held_out))
    for part in (train, held_out):
        _validate.labels(part.examples["y"], num_classes)
    return train.resident(), train, held_out, held_out.examples, num_classes


def _num_evaluated(settings: Any) -> int:
    return 5000 if settings.dataset == "gaussian-images" else 1000


def _generate(
    settings: Any,
) -> tuple[Population, Callable[[jax.Array, int], Mapping[str, Any]], int]:
    """Clients that draw their examples, what draws those to evaluate on, and classes."""
    sizes = {
        "num_examples": settings.examples_per_client,
        "batch_size": settings.batch_size,
        "seed": settings.data_seed,
    }
    if settings.dataset in _SEQUENCES:
        if settings.vocabulary_size is None:
            raise ValueError(
                f"model is {settings.model!r}, and {settings.dataset} has sequences of ids; choose"
                f" {', '.join(_LANGUAGE_MODELS)}."
            )
        population, draw = data.noisy_successors(
            settings.num_clients,
            vocabulary_size=settings.vocabulary_size,
            **_SEQUENCES[settings.dataset],
            **sizes,
        )
        return population, draw, settings.vocabulary_size
    crop, num_classes = settings.crop, _CLASSES[settings.dataset]
    population, draw = data.gaussian_images(
        settings.num_clients,
        image_shape=(28, 28, 1) if crop is None else (crop, crop, 3),
        separation=settings.separation,
        alpha=settings.alpha,
        num_classes=num_classes,
        **sizes,
    )
    return population, draw, num_classes


def _model(settings: Any, examples: Mapping[str, Any], num_classes: int) -> Model:
    name, shape, is_text = settings.model, examples["x"].shape[1:], examples["y"].ndim == 2
    fixed, image_model = _FIXED_SHAPES.get(name, (shape, None))
    if is_text != (name in _LANGUAGE_MODELS) or shape != fixed:
        raise ValueError(
            f"model is {name!r}, and the examples x are {examples['x'].dtype} of shape {shape};"
            " choose a model for them, or the data that it is for."
        )
    if is_text:
        if num_classes > settings.vocabulary_size:
            raise ValueError(
                f"vocabulary_size is {settings.vocabulary_size}, and the largest id of the data"
                f" {num_classes - 1}; choose at least {num_classes}."
            )
        return _LANGUAGE_MODELS[name](settings.vocabulary_size)
    if image_model is not None:
        return image_model(num_classes)
    if name == "lenet":
        return models.lenet(shape, num_classes)
    if name == "resnet18":
        return models.resnet18(num_classes, input_shape=shape)
    return models.mlp(shape, settings.hidden or (), num_classes)


def _split(settings: Any, datasets: Datasets | None) -> Datasets:
    """The examples of clients to train on, and those to evaluate on."""
    rng_deal, rng_split = np.random.default_rng(settings.data_seed).spawn(2)
    if settings.dataset in ("synthetic", "synthetic-iid"):
        return data.synthetic(
            settings.alpha or 0.0,
            settings.beta or 0.0,
            settings.num_clients,
            iid=settings.dataset == "synthetic-iid",
            held_out=settings.held_out,
            seed=settings.data_seed,
        )
    test = None
    if datasets is not None:
        dataset, test = datasets
    elif settings.dataset == "digits":
        # One client and the images held out from it: all there are, to be dealt here.
        one, rest = data.digits(1)
        dataset = FederatedDataset.from_clients({0: one[0], 1: rest})
    else:
        dataset = read_examples("dataset", settings.dataset, settings)
    if settings.partition != "natural":
        rows = _deal(settings, dataset.examples["y"], rng_deal)
        dataset = FederatedDataset.from_rows(dataset.examples, rows)
    if test is not None:
        return dataset, test
    if settings.test is not None:
        return dataset, read_examples("test", settings.test, settings)
    return dataset.split_examples(settings.held_out, seed=rng_split)


def read_examples(name: str, path: str, settings: Any) -> FederatedDataset:
    """A data set of any known format, with the features x and y.

    Args:
      name: What it is called in errors.
      path: A file or folder.
      settings: Those of the run, for `client_column` and `columns`.

    Raises:
      ValueError: It cannot be read, or is no data set with classes.
    """
    options: dict[str, Any] = {}
    if settings.client_column is not None:
        options["client_column"] = settings.client_column
    if settings.columns is not None:
        options["columns"] = parse_columns(settings.columns)
    try:
        dataset = data.read(path, **options)
    except ValueError as error:
        raise ValueError(f"{name} is {path!r}: {error}") from None
    if settings.columns is not None:
        dataset = _with_floats(dataset)
    _check_features(name, dataset)
    return dataset


def _with_floats(dataset: FederatedDataset) -> FederatedDataset:
    """Whole numbers that columns make up beside one class per example, as floats: no ids."""
    x, y = (dataset.features.get(name) for name in ("x", "y"))
    if x is None or y is None or x.dtype.kind not in "iu" or y.shape:
        return dataset
    return dataset.map(lambda features: {**features, "x": features["x"].astype(np.float32)})


def _check_features(name: str, dataset: FederatedDataset) -> None:
    """Refuses data that are not images, or rows of numbers, with classes, or sequences of ids."""
    features = dataset.features
    if not {"x", "y"} <= set(features):
        raise ValueError(
            f"{name} has the features {', '.join(features)}; choose one with x and y, name them by"
            " columns (x=a,b y=label, or x=* y=label), or convert it with `fedjax-lite data convert"
            " --preprocess`."
        )
    x, y = features["x"], features["y"]
    if y.dtype.kind not in "iu" or x.dtype.kind not in "fiu":
        raise ValueError(
            f"{name} has x of dtype {x.dtype} and y of dtype {y.dtype}; choose one with floating x,"
            " or ids, and integer y."
        )
    is_text = x.dtype.kind != "f" and len(x.shape) == 1 and x.shape == y.shape
    if x.dtype.kind != "f" and not is_text:
        raise ValueError(
            f"{name} has x of dtype {x.dtype} and shape {x.shape}, and y of shape {y.shape}; choose"
            " one with floating x, or with sequences of ids as x and y; named by columns (x=x y=y),"
            " whole numbers beside a class become floats."
        )
    if (not is_text and y.shape) or dataset.examples["y"].min() < 0:
        raise ValueError(
            f"{name} has y of shape {dataset.examples['y'].shape}, from"
            f" {dataset.examples['y'].min()}; choose one with a class from 0 for each example."
        )


def _deal(settings: Any, labels: np.ndarray, rng: np.random.Generator) -> Sequence[np.ndarray]:
    num_clients, alpha = settings.num_clients, settings.alpha
    match settings.partition:
        case "iid":
            return partition.iid(len(labels), num_clients, seed=rng)
        case "dirichlet":
            return partition.dirichlet(labels, num_clients, alpha=alpha, min_examples=1, seed=rng)
        case "dirichlet-by-client":
            return partition.dirichlet_by_client(labels, num_clients, alpha=alpha, seed=rng)
        case "shards":
            return partition.shards(
                labels, num_clients, shards_per_client=settings.per_client, seed=rng
            )
        case _:
            return partition.pathological(
                labels, num_clients, classes_per_client=settings.per_client, seed=rng
            )


def algorithm_of(settings: Any, model: Model) -> FederatedAlgorithm:
    """The algorithm of a resolved experiment, whose rates and other numbers may be traced."""
    server = _server_optimizer(settings)
    options = {
        "weighting": settings.weighting,
        "batch_size": settings.batch_size,
        "pipeline": _pipeline(settings),
        "lanes": settings.lanes,
    }
    if settings.algorithm == "fed-sgd":
        return fed_sgd(model, server, **options)
    if settings.num_steps is None:
        options["num_epochs"] = settings.num_epochs
    else:
        options["num_steps"] = settings.num_steps
    client = _client_optimizer(settings)
    match settings.algorithm:
        case "fed-prox":
            return fed_prox(model, client, server, mu=settings.mu, **options)
        case "scaffold":
            return scaffold(model, client, server, **options)
        case "fed-nova":
            return fed_nova(model, client, server, **options)
        case "apfl":
            own = {"alpha": settings.own_share, "layerwise": settings.layerwise}
            return apfl(model, client, server, **own, **options)
        case _:
            return fed_avg(model, client, server, **options)


def _pipeline(settings: Any) -> UpdateTransform | None:
    """What happens to updates between clients and server."""
    transforms = []
    if settings.clip_update is not None:
        transforms.append(clip_by_norm(settings.clip_update))
    if settings.quantize_bits is not None:
        transforms.append(quantize_uniform(2**settings.quantize_bits))
    return chain(*transforms) if transforms else None


def _client_optimizer(settings: Any) -> Any:
    rate = _rate(settings, settings.client_schedule, settings.client_lr)

    def optimizer(round: jax.Array | int) -> optax.GradientTransformation:
        rate_now = rate(round) if callable(rate) else rate
        chain = []
        if settings.clip is not None:
            chain.append(optax.clip_by_global_norm(settings.clip))
        if not _is_zero(settings.client_weight_decay):
            chain.append(optax.add_decayed_weights(settings.client_weight_decay))
        if settings.client_optimizer == "adam":
            chain.append(optax.adam(rate_now))
        else:
            momentum = settings.client_momentum
            chain.append(optax.sgd(rate_now, None if _is_zero(momentum) else momentum))
        return optax.chain(*chain)

    return optimizer if callable(rate) else optimizer(0)


def _is_zero(number: Any) -> bool:
    return not isinstance(number, jax.core.Tracer) and number == 0


def _server_optimizer(settings: Any) -> optax.GradientTransformation:
    rate = _rate(settings, settings.server_schedule, settings.server_lr)
    moments = {"b1": settings.server_b1, "b2": settings.server_b2, "eps": settings.server_eps}
    match settings.server_optimizer:
        case "sgd":
            return optax.sgd(rate)
        case "momentum":
            return optax.sgd(rate, settings.server_momentum)
        case "adam":
            return optax.adam(rate, **moments)
        case "yogi":
            return optax.yogi(rate, **moments)
        case "lamb":
            return optax.lamb(rate, **moments)
        case "lars":
            return optax.lars(rate, momentum=settings.server_momentum)
        case _:
            # The second moment starts from tau squared, as in Reddi et al. (2021).
            tau = settings.server_eps
            return optax.adagrad(rate, initial_accumulator_value=tau**2, eps=0.0)


def _rate(settings: Any, schedule: str, rate: float) -> float | optax.Schedule:
    """The learning rate, as a function of the number of rounds run unless it is constant."""
    match schedule:
        case "constant":
            return rate
        case "cosine":
            return optax.cosine_decay_schedule(rate, settings.rounds)
        case _:
            return optax.exponential_decay(
                rate, settings.decay_every, settings.decay, staircase=schedule == "step"
            )


def _sampler(settings: Any, population: Population, train: FederatedDataset | None) -> Sampler:
    num_clients, cohort_size = population.num_clients, settings.cohort_size
    if cohort_size is not None:
        _validate.integer("cohort_size", cohort_size, minimum=1, maximum=num_clients)
    match settings.sampler:
        case "uniform":
            return samplers.uniform(num_clients, cohort_size)
        case "poisson":
            return samplers.poisson(num_clients, cohort_size / num_clients)
        case "importance":
            sizes = np.ones(num_clients) if train is None else train.num_examples
            return samplers.importance(sizes, cohort_size)
        case "round-robin":
            return samplers.round_robin(num_clients, cohort_size)
        case "minimise-reuse":
            return samplers.minimise_reuse(num_clients, cohort_size)
        case _:
            return samplers.everyone(num_clients)
