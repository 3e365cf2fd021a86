"""A run as a value: every setting of a simulation."""

import dataclasses
import math
import typing
from typing import Any, Literal

from fedjax_lite import _validate

Schedule = Literal["constant", "cosine", "exponential", "step"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """All settings of a run. Those that are None take the default of what they belong to.

    Attributes:
      dataset: digits (1,797 images of 8 x 8 pixels), synthetic or synthetic-iid (FedProx's, 60
        features), or the path of a data set with the features x and y: a folder that `fedjax-lite
        data convert` wrote, or any file that `fedjax-lite data describe` reads. Drawn when they
        are used, with as many clients as the field's benchmarks have: images in the shapes of
        emnist-like (gaussian-images with label skew), cifar10-like and cifar100-like, and
        sequences in those of shakespeare-like and stackoverflow-like.
      test: Path of a data set to evaluate on, such as the test split of a file; by default a part
        of the data set is held out.
      client_column: The column of a table (CSV, parquet, .npz, Hugging Face) that names the client
        of each row, in dataset and test; client_id by default, client_ids in .npz.
      columns: The columns of dataset and test that make up x and y: x=a,b y=label, where x=a, is a
        vector of one, and x=* one of all columns that are not named. Whole numbers become floats,
        as x of a class. Features are as the file names them by default.
      held_out: Fraction of each client's examples that is evaluated on and never trained on,
        between 0 and 1; 0.2 by default.
      partition: How examples are dealt to clients: natural (as the file has them; its default),
        iid, dirichlet or dirichlet-by-client (label skew; dirichlet is the default of digits),
        shards or pathological (a few classes per client).
      num_clients: Number of clients; 50 by default, 30 of synthetic, 1000 of gaussian-images, and
        3400, 500, 500, 715 and 342,477 of the five in the shapes of benchmarks.
      examples_per_client: Examples of a client in a round, where they are drawn when used; 100 by
        default, 198 of emnist-like, 50 of shakespeare-like, 64 of stackoverflow-like.
      alpha: Concentration of the Dirichlet distribution, smaller is more skewed, 0.3 by default;
        for synthetic the standard deviation alpha, 1 by default. Images in the shapes of
        benchmarks have no skew by default.
      beta: Standard deviation beta of synthetic; 1 by default.
      per_client: Shards, or classes, of a client; 2 by default.
      separation: Distance of the classes of drawn images in standard deviations of the noise,
        smaller is harder; 6 by default.
      crop: Height and width of the images of cifar10-like and cifar100-like; 32 by default.
      data_seed: Determines the split, and data that are drawn.
      model: logistic, mlp, or a model of the field: emnist-dense, emnist-cnn, cifar-cnn, lenet and
        resnet18 (with norms over groups) for images; shakespeare-lstm, stackoverflow-lstm and
        stackoverflow-transformer for sequences. auto is an mlp for digits and files, emnist-cnn,
        cifar-cnn or resnet18 for images in the shapes of EMNIST, CIFAR-10 and CIFAR-100,
        shakespeare-lstm or stackoverflow-transformer for sequences, and else logistic.
      hidden: Widths of the hidden layers of an mlp; 64 by default.
      vocabulary_size: Ids that a model of sequences knows, the four special ones included; 90 by
        default for Shakespeare, 10,004 for Stack Overflow.
      algorithm: fed-avg, fed-prox, scaffold, fed-nova, apfl (clients with models of their own) or
        fed-sgd.
      mu: Strength of fed-prox's proximal term; 0.01 by default.
      own_share: Share of a client's own params in its model that apfl begins with; 0.5 by default.
      layerwise: Let apfl learn a share for each array of the params, instead of one for each
        client.
      fine_tune_epochs: Let each client train the model for so many epochs on its own examples after
        the last round, and evaluate it on its held-out ones; not done by default.
      weighting: The weight of a client in the mean: its number of examples, or uniform.
      batch_size: Examples in a local batch.
      num_epochs: How often a client runs through its examples in a round; 5 by default.
      num_steps: Local steps of a client in a round, instead of epochs.
      client_optimizer: sgd (the default) or adam, started anew in each round.
      client_lr: Learning rate of clients; 0.1 by default with sgd, 0.001 with adam.
      client_momentum: Momentum of sgd; 0 by default.
      client_weight_decay: L2 penalty added to the gradients of clients; 0 by default.
      clip: Largest L2 norm of a client's gradient in a step; not clipped by default.
      clip_update: Largest L2 norm of a client's update; not clipped by default.
      quantize_bits: Bits of a number in a client's update, rounded at random between the extremes
        of its array; not rounded by default.
      client_schedule: Learning rate of clients by round: constant, cosine (to 0 in the last
        round), exponential or step (both times decay every decay-every rounds, the one steadily,
        the other at once); constant by default.
      server_optimizer: What steps along the clients' mean: sgd (FedAvg), momentum (FedAvgM), adam,
        yogi, adagrad, lamb or lars (FedAdam and so on).
      server_lr: Learning rate of the server; 1 by default with sgd and momentum, 3 with lars, 0.1
        with adagrad, 0.01 with adam, yogi and lamb.
      server_momentum: Momentum of momentum and lars; 0.9 by default.
      server_b1: Decay of the first moment of adam, yogi and lamb; 0.9 by default.
      server_b2: Decay of the second moment of adam, yogi and lamb; 0.99 by default.
      server_eps: Adaptivity (tau) of adam, yogi, adagrad and lamb; 0.001 by default.
      server_schedule: Learning rate of the server by round, as for clients.
      decay: Factor of the exponential and step schedules; 0.5 by default.
      decay_every: Rounds between two such factors; 100 by default.
      sampler: uniform, poisson (each client on its own), importance (in proportion to its
        examples), round-robin, minimise-reuse, or everyone.
      cohort_size: Clients in a round; the expected number with poisson and importance; 20 by
        default.
      rounds: Number of rounds.
      seed: Determines everything random but the data.
      eval_every: Rounds between two evaluations.
      lanes: Clients trained side by side on a device, which changes the speed only; 1 by default
        on a CPU, up to 64 elsewhere.
    """

    dataset: str = "digits"
    test: str | None = None
    client_column: str | None = None
    columns: tuple[str, ...] | None = None
    held_out: float | None = None
    partition: (
        Literal["natural", "iid", "dirichlet", "dirichlet-by-client", "shards", "pathological"]
        | None
    ) = None
    num_clients: int | None = None
    examples_per_client: int | None = None
    alpha: float | None = None
    beta: float | None = None
    per_client: int | None = None
    separation: float | None = None
    crop: int | None = None
    data_seed: int = 0
    model: Literal[
        "auto",
        "logistic",
        "mlp",
        "emnist-dense",
        "emnist-cnn",
        "cifar-cnn",
        "lenet",
        "resnet18",
        "shakespeare-lstm",
        "stackoverflow-lstm",
        "stackoverflow-transformer",
    ] = "auto"
    hidden: tuple[int, ...] | None = None
    vocabulary_size: int | None = None
    algorithm: Literal["fed-avg", "fed-prox", "scaffold", "fed-nova", "apfl", "fed-sgd"] = "fed-avg"
    mu: float | None = None
    own_share: float | None = None
    layerwise: bool | None = None
    fine_tune_epochs: int | None = None
    weighting: Literal["examples", "uniform"] = "examples"
    batch_size: int = 10
    num_epochs: int | None = None
    num_steps: int | None = None
    client_optimizer: Literal["sgd", "adam"] | None = None
    client_lr: float | None = None
    client_momentum: float | None = None
    client_weight_decay: float | None = None
    clip: float | None = None
    clip_update: float | None = None
    quantize_bits: int | None = None
    client_schedule: Schedule | None = None
    server_optimizer: Literal["sgd", "momentum", "adam", "yogi", "adagrad", "lamb", "lars"] = "sgd"
    server_lr: float | None = None
    server_momentum: float | None = None
    server_b1: float | None = None
    server_b2: float | None = None
    server_eps: float | None = None
    server_schedule: Schedule = "constant"
    decay: float | None = None
    decay_every: int | None = None
    sampler: Literal[
        "uniform", "poisson", "importance", "round-robin", "minimise-reuse", "everyone"
    ] = "uniform"
    cohort_size: int | None = None
    rounds: int = 100
    seed: int = 0
    eval_every: int = 10
    lanes: int | None = None


_SYNTHETIC = ("synthetic", "synthetic-iid")
_CIFAR_LIKE = ("cifar10-like", "cifar100-like")
_IMAGES = ("gaussian-images", "emnist-like", *_CIFAR_LIKE)
# The model that auto chooses for data that are drawn.
_GENERATED = {
    **dict.fromkeys((*_SYNTHETIC, "gaussian-images"), "logistic"),
    "emnist-like": "emnist-cnn",
    "cifar10-like": "cifar-cnn",
    "cifar100-like": "resnet18",
    "shakespeare-like": "shakespeare-lstm",
    "stackoverflow-like": "stackoverflow-transformer",
}
_DEALT = ("iid", "dirichlet", "dirichlet-by-client", "shards", "pathological")
_LOCAL = ("fed-avg", "fed-prox", "scaffold", "fed-nova", "apfl")
_ADAPTIVE = ("adam", "yogi", "lamb")

# What a setting belongs to, and its default for each choice that has it. Those of server
# optimizers are the ones of Reddi et al. (2021), "Adaptive Federated Optimization".
_BELONGS: dict[str, tuple[str, dict[str, Any]]] = {
    "partition": ("dataset", {"digits": "dirichlet", "file": "natural"}),
    "test": ("dataset", {"file": None}),
    "client_column": ("dataset", {"file": None}),
    "columns": ("dataset", {"file": None}),
    "held_out": ("dataset", dict.fromkeys(("digits", *_SYNTHETIC, "file"), 0.2)),
    "num_clients": (
        "split",
        {
            **dict.fromkeys(_DEALT, 50),
            "synthetic": 30,
            "synthetic-iid": 30,
            "gaussian-images": 1000,
            # As in the files of the benchmarks; those of CIFAR-10 as in Reddi et al. (2021).
            "emnist-like": 3400,
            "cifar10-like": 500,
            "cifar100-like": 500,
            "shakespeare-like": 715,
            "stackoverflow-like": 342_477,
        },
    ),
    "examples_per_client": (
        "dataset",
        {
            "gaussian-images": 100,
            "emnist-like": 198,  # 671,585 examples of 3,400 clients.
            "cifar10-like": 100,
            "cifar100-like": 100,
            "shakespeare-like": 50,
            "stackoverflow-like": 64,  # As many as pfl-research takes of a client.
        },
    ),
    "alpha": (
        "split",
        {
            "dirichlet": 0.3,
            "dirichlet-by-client": 0.3,
            "synthetic": 1.0,
            **dict.fromkeys(_IMAGES),
            "gaussian-images": 0.3,
        },
    ),
    "beta": ("split", {"synthetic": 1.0}),
    "per_client": ("split", {"shards": 2, "pathological": 2}),
    "separation": ("dataset", dict.fromkeys(_IMAGES, 6.0)),
    "crop": ("dataset", dict.fromkeys(_CIFAR_LIKE, 32)),
    "hidden": ("model", {"mlp": (64,)}),
    "vocabulary_size": (
        "model",
        {
            "shakespeare-lstm": 90,
            "stackoverflow-lstm": 10_004,
            "stackoverflow-transformer": 10_004,
        },
    ),
    "mu": ("algorithm", {"fed-prox": 0.01}),
    "own_share": ("algorithm", {"apfl": 0.5}),
    "layerwise": ("algorithm", {"apfl": False}),
    "fine_tune_epochs": (
        "algorithm",
        dict.fromkeys(("fed-avg", "fed-prox", "scaffold", "fed-nova")),
    ),
    "num_steps": ("algorithm", dict.fromkeys(_LOCAL)),
    "num_epochs": ("algorithm", dict.fromkeys(_LOCAL, 5)),
    "client_optimizer": ("algorithm", dict.fromkeys(_LOCAL, "sgd")),
    "client_schedule": ("algorithm", dict.fromkeys(_LOCAL, "constant")),
    "client_lr": ("client_optimizer", {"sgd": 0.1, "adam": 0.001}),
    "client_momentum": ("client_optimizer", {"sgd": 0.0}),
    "client_weight_decay": ("client_optimizer", {"sgd": 0.0, "adam": 0.0}),
    "clip": ("client_optimizer", {"sgd": None, "adam": None}),
    "server_lr": (
        "server_optimizer",
        {
            "sgd": 1.0,
            "momentum": 1.0,
            "lars": 1.0,
            "adagrad": 0.1,
            **dict.fromkeys(_ADAPTIVE, 0.01),
        },
    ),
    "server_momentum": ("server_optimizer", {"momentum": 0.9, "lars": 0.9}),
    "server_b1": ("server_optimizer", dict.fromkeys(_ADAPTIVE, 0.9)),
    "server_b2": ("server_optimizer", dict.fromkeys(_ADAPTIVE, 0.99)),
    "server_eps": ("server_optimizer", dict.fromkeys((*_ADAPTIVE, "adagrad"), 1e-3)),
    "decay": ("schedule", {"exponential": 0.5, "step": 0.5}),
    "decay_every": ("schedule", {"exponential": 100, "step": 100}),
    "cohort_size": (
        "sampler",
        dict.fromkeys(("uniform", "poisson", "importance", "round-robin", "minimise-reuse"), 20),
    ),
}
_AT_LEAST = {
    "num_clients": 1,
    "examples_per_client": 1,
    "crop": 1,
    "vocabulary_size": 5,
    "per_client": 1,
    "batch_size": 1,
    "num_epochs": 1,
    "num_steps": 1,
    "fine_tune_epochs": 1,
    "quantize_bits": 1,
    "decay_every": 1,
    "cohort_size": 1,
    "rounds": 1,
    "eval_every": 1,
    "lanes": 1,
    "seed": 0,
    "data_seed": 0,
}
_POSITIVE = ("clip", "clip_update", "client_lr", "server_lr", "server_eps", "decay")
_NOT_NEGATIVE = ("mu", "client_weight_decay", "alpha", "beta", "separation")
_FRACTIONS = ("client_momentum", "server_momentum", "server_b1", "server_b2")


def resolve(experiment: Experiment) -> Experiment:
    """The experiment with a value for every setting that applies to it, and None for the others.

    Raises:
      ValueError: A setting is out of range, or set while what it belongs to is not chosen.

    >>> resolved = resolve(Experiment(server_optimizer="adam"))
    >>> resolved.server_lr, resolved.server_eps, resolved.server_momentum
    (0.01, 0.001, None)
    """
    values = dataclasses.asdict(experiment)
    _check_values(values)
    is_file = experiment.dataset != "digits" and experiment.dataset not in _GENERATED
    if experiment.dataset == "digits" and experiment.partition == "natural":
        raise ValueError(
            "partition is 'natural', and digits have no clients of their own; choose dirichlet,"
            " iid, shards or another way to deal them."
        )
    values["model"] = _model_of(experiment.model, "file" if is_file else experiment.dataset)

    def governs(name: str) -> str | None:
        if name == "dataset":
            return "file" if is_file else experiment.dataset
        if name == "split":
            return values["partition"] or experiment.dataset
        if name == "schedule":
            both = (values["client_schedule"], values["server_schedule"])
            return next((one for one in both if one in ("exponential", "step")), both[1])
        return values[name]

    for name, (governor, defaults) in _BELONGS.items():
        choice = governs(governor)
        if choice not in defaults:
            if values[name] is not None:
                raise ValueError(
                    f"{name} is {values[name]!r}, which belongs to {' and '.join(defaults)};"
                    f" leave it out with {choice or experiment.algorithm}."
                )
        elif values[name] is None:
            values[name] = defaults[choice]
    if experiment.num_steps is not None:
        if experiment.num_epochs is not None:
            raise ValueError(
                f"num_epochs is {experiment.num_epochs} beside num_steps {experiment.num_steps};"
                " choose one of the two."
            )
        values["num_epochs"] = None
    if values["test"] is not None:
        if experiment.held_out is not None:
            raise ValueError(f"held_out is {experiment.held_out} beside test; choose one.")
        values["held_out"] = None
    return Experiment(**values)


def _check_values(values: dict[str, Any]) -> None:
    for name, hint in typing.get_type_hints(Experiment).items():
        literals = [part for part in (hint, *typing.get_args(hint)) if _is_literal(part)]
        if literals and values[name] is not None:
            _validate.choice(name, values[name], typing.get_args(literals[0]))
    known = {name: value for name, value in values.items() if value is not None}
    for name, minimum in _AT_LEAST.items():
        if name in known:
            maximum = 24 if name == "quantize_bits" else 2**31 - 1
            _validate.integer(name, known[name], minimum=minimum, maximum=maximum)
    for width in known.get("hidden", ()):
        _validate.integer("hidden", width, minimum=1)
    for names, inside, range_ in (
        (_POSITIVE, lambda x: 0 < x < math.inf, "a positive number"),
        (_NOT_NEGATIVE, lambda x: 0 <= x < math.inf, "a number that is at least 0"),
        (_FRACTIONS, lambda x: 0 <= x < 1, "a number that is at least 0, and below 1"),
        (("own_share",), lambda x: 0 <= x <= 1, "a number between 0 and 1"),
        (("held_out",), lambda x: 0 < x < 1, "a fraction between 0 and 1"),
    ):
        for name in names:
            if name in known and not inside(known[name]):
                raise ValueError(f"{name} is {known[name]}; choose {range_}.")


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is Literal


def _model_of(model: str, dataset: str) -> str:
    if model != "auto":
        return model
    return _GENERATED.get(dataset, "mlp")
