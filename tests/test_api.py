"""The public names and their parameters: what users' code relies on."""

import inspect
import re
import subprocess
import sys

import optax
import pytest

import fedjax_lite as fl

UPDATE = ("batch_size", "pipeline", "reducer", "on_nonfinite")
STEPS = ("num_epochs", "num_steps", "max_staleness", "shuffle", "differentiable")
SPEED = ("lanes", "mesh", "rewrite_convolutions")
NAMES = {
    "agnostic_fed_avg": [
        *("model", "client_optimizer", "server_optimizer", "num_domains", "domain_learning_rate"),
        *("feature", "window_size", *UPDATE, *STEPS, *SPEED, "memory_kind"),
    ],
    "apfl": [
        *("model", "client_optimizer", "server_optimizer", "alpha", "layerwise", "weighting"),
        *(*UPDATE, *STEPS, *SPEED, "memory_kind"),
    ],
    "ada_fed_prox": [
        *("model", "client_optimizer", "server_optimizer"),
        *("mu", "step_size", "patience", "weighting"),
        *(*UPDATE, *STEPS, *SPEED),
    ],
    "ditto": [
        *("model", "client_optimizer", "server_optimizer", "mu", "weighting"),
        *(*UPDATE, *STEPS, *SPEED, "memory_kind"),
    ],
    "fed_dyn": [
        *("model", "client_optimizer", "server_optimizer", "alpha"),
        *(*UPDATE, *STEPS, *SPEED, "memory_kind"),
    ],
    "fed_exp": [
        *("model", "client_optimizer", "server_optimizer", "epsilon", "weighting"),
        *(*UPDATE, *STEPS, *SPEED),
    ],
    "fed_ex_lora": [*("model", "client_optimizer", "weighting"), *UPDATE, *STEPS, *SPEED],
    "fed_ntd": [
        *("model", "client_optimizer", "server_optimizer"),
        *("beta", "temperature", "logits", "weighting"),
        *(*UPDATE, *STEPS, *SPEED),
    ],
    "fed_rep": [
        *("model", "client_optimizer", "server_optimizer"),
        *("personal", "num_head_epochs", "weighting"),
        *(*UPDATE, *STEPS, *SPEED, "memory_kind"),
    ],
    "fed_sam": [
        *("model", "client_optimizer", "server_optimizer", "rho", "weighting"),
        *(*UPDATE, *STEPS, *SPEED),
    ],
    "fed_shuffle": [
        *("model", "client_optimizer", "server_optimizer", "weighting"),
        *(*UPDATE, *STEPS, *SPEED),
    ],
    "gaussian_mixture": ["model", "min_variance", *UPDATE, *SPEED],
    "ifca": [
        *("model", "client_optimizer", "server_optimizer", "num_clusters", "weighting"),
        *(*UPDATE, *STEPS, *SPEED, "memory_kind"),
    ],
    "k_means": ["model", "keep_counts", *UPDATE, *SPEED],
    "mime": [
        *("model", "client_optimizer", "server_optimizer", "weighting"),
        *(*UPDATE, *STEPS, *SPEED),
    ],
    "mime_lite": [
        *("model", "client_optimizer", "server_optimizer", "weighting"),
        *(*UPDATE, *STEPS, *SPEED),
    ],
    "moon": [
        *("model", "client_optimizer", "server_optimizer"),
        *("mu", "temperature", "features", "weighting"),
        *(*UPDATE, *STEPS, *SPEED, "memory_kind"),
    ],
    "p_fed_me": [
        *("model", "client_optimizer", "server_optimizer"),
        *("mu", "learning_rate", "num_inner_steps", "weighting"),
        *(*UPDATE, *STEPS, *SPEED, "memory_kind"),
    ],
    "per_fed_avg": [
        *("model", "client_optimizer", "server_optimizer", "alpha", "first_order", "weighting"),
        *(*UPDATE, *STEPS, *SPEED),
    ],
    "q_fed_avg": [
        *("model", "client_optimizer", "server_optimizer", "q", "lipschitz"),
        *(*UPDATE, *STEPS, *SPEED),
    ],
    "drive": ["unbiased"],
    "eden": ["num_bits", "unbiased"],
    "ef21": ["transform"],
    "half_precision": ["dtype"],
    "low_rank": ["rank"],
    "power_sgd": ["rank"],
    "product_quantization": ["num_centroids", "block_size", "num_iterations"],
    "qsgd": ["num_levels", "bucket_size", "encoding"],
    "quantize_scalar": ["num_bits", "symmetric", "per_channel"],
    "random_k": ["k", "per_array", "unbiased"],
    "rotated": ["transform"],
    "scaled_sign": ["per_array"],
    "sign_sgd": [],
    "terngrad": ["clip_factor"],
    "top_k": ["k", "per_array"],
    "chain": ["transforms"],
    "adaptive_clip": [
        *("initial_norm", "quantile", "learning_rate", "count_noise", "denominator"),
    ],
    "adaptive_zero": [
        *("initial_norm", "quantile", "learning_rate", "multiplier", "increment", "norm"),
        *("count_noise", "denominator"),
    ],
    "clip_by_norm": ["max_norm"],
    "clip_per_array": ["max_norm"],
    "gaussian_noise": ["noise_multiplier", "noise_scale"],
    "toeplitz_noise": [
        *("noise_multiplier", "num_rounds", "num_bands", "coefficients", "noise_scale"),
    ],
    "tree_noise": ["noise_multiplier", "num_rounds", "noise_scale"],
    "zero_by_norm": ["max_norm", "norm"],
    "clients_mesh": ["num_devices"],
    "cohort": ["key", "population", "cohort_size", "capacity"],
    "cohort_of": ["population", "client_ids", "key", "max_steps", "staleness"],
    "configure_cpu": ["num_devices"],
    "evaluate": [
        *("model", "state", "examples", "metrics", "batch_size", "mesh", "rewrite_convolutions"),
    ],
    "evaluate_clients": [
        *("model", "state", "cohort", "metrics", "client_model", "key", "batch_size"),
        *("lanes", "mesh", "rewrite_convolutions"),
    ],
    "evaluate_fine_tuned": [
        *("model", "state", "train_cohort", "held_out_cohort", "client_optimizer", "key"),
        *("num_epochs", "num_steps", "batch_size", "shuffle", "metrics", "lanes", "mesh"),
        "rewrite_convolutions",
    ],
    "experiment": [
        *("dataset", "test", "held_out", "partition", "num_clients", "data_seed", "model"),
        *("algorithm", "num_epochs", "num_steps", "batch_size", "client_optimizer", "client_lr"),
        *("server_optimizer", "server_lr", "updates", "reducer", "sampler", "cohort_size"),
        *("privacy", "metrics", "metric"),
        *("fine_tune_epochs", "fine_tune_steps", "rounds", "seed", "eval_every", "lanes"),
    ],
    "fed_avg": [
        *("model", "client_optimizer", "server_optimizer", "weighting"),
        *("personal", "keep_optimizer_state", "measure_clients"),
        *(*UPDATE, *STEPS, *SPEED, "memory_kind"),
    ],
    "fed_nova": [
        *("model", "client_optimizer", "server_optimizer", "mu", "weighting"),
        *(*UPDATE, *STEPS, *SPEED),
    ],
    "fed_prox": [
        *("model", "client_optimizer", "server_optimizer", "mu", "weighting"),
        *("personal", "keep_optimizer_state", "measure_clients"),
        *(*UPDATE, *STEPS, *SPEED, "memory_kind"),
    ],
    "fed_sgd": [
        *("model", "server_optimizer", "reduction", "weighting", *UPDATE, *SPEED),
    ],
    "federated_algorithm": [
        *("model", "client_update", "server_optimizer"),
        *("broadcast", *UPDATE, *STEPS, *SPEED, "memory_kind"),
    ],
    "frozen": ["model", "names"],
    "function_model": ["loss", "init", "metrics", "predict"],
    "linen_model": ["module", "example", "loss", "metrics", "inputs"],
    "local_training": [
        *("model", "client_optimizer", "weighting", "begin", "objective", "finish", "entry"),
        *("personal", "keep_optimizer_state", "measure_clients"),
    ],
    "lora": ["model", "rank", "alpha", "names", "base", "train_a"],
    "load_state": ["folder", "like", "averaged", "best"],
    "nnx_model": ["create", "loss", "metrics", "inputs"],
    "prefetch": ["make", "rounds", "depth"],
    "quantize_uniform": ["num_levels"],
    "read_runs": ["folders"],
    "scaffold": [
        *("model", "client_optimizer", "server_optimizer", "option", "weighting"),
        *(*UPDATE, *STEPS, *SPEED, "memory_kind"),
    ],
    "FileStore": ["index", "file"],
    "store_in_file": ["state", "folder", "num_clients"],
    "summarize_clients": ["values", "num_examples"],
    "replicate": ["tree", "mesh"],
    "sweep": [
        *("build", "population", "sampler", "num_rounds", "keys", "numbers", "evaluate"),
        *("eval_every", "privacy", "lanes"),
    ],
    "train": [
        *("algorithm", "population", "sampler", "num_rounds", "key", "state", "evaluate"),
        *("eval_every", "on_round", "on_eval", "on_resume", "stop", "ema_decay", "best"),
        *("best_mode", "checkpoints", "privacy", "progress"),
    ],
    "tune_lanes": ["build", "key", "state", "cohort", "candidates", "repeats"],
    "Checkpoints": ["folder", "every", "keep", "settings"],
    "Client": ["id", "num_examples", "num_steps", "entry", "key", "staleness"],
    "Guarantees": [
        *("sensitivity", "max_weight", "is_masked", "is_private", "noise_multiplier"),
        *("min_separation", "released", "modulus_bits"),
    ],
    "LocalState": [
        *("params", "model_state", "opt_state", "loss", "num_examples", "num_steps"),
    ],
    "Message": ["update", "weight", "entry", "statistics", "metrics"],
    "Received": [
        *("aggregate", "statistics", "sensitivity", "weights", "cohort", "drift", "released"),
    ],
    "Reducer": [
        *("summand", "finish", "stacked", "sensitivity", "keeps_last", "needs_clients"),
    ],
    "Stack": ["updates", "weights", "client_ids", "is_hostile", "last", "key", "total"],
    "cap_weight": ["max_weight"],
    "adaptive_robust_clipping": ["hostile", "reducer"],
    "bucketing": ["size", "reducer"],
    "bulyan": ["hostile", "margin"],
    "centered_clipping": ["max_norm", "num_iterations"],
    "client_momentum": ["decay"],
    "gaussian_update": ["hostile", "std", "seed"],
    "geometric_median": ["num_iterations", "smoothing", "start"],
    "hostile_clients": ["hostile", "num_clients", "seed"],
    "inner_product_manipulation": ["hostile", "reducer", "factor", "seed"],
    "krum": ["hostile", "margin"],
    "little_is_enough": ["hostile", "reducer", "z", "seed"],
    "mean_around_median": ["hostile"],
    "mimic": ["hostile", "reducer", "seed"],
    "min_max": ["hostile", "reducer", "seed"],
    "multi_krum": ["hostile", "num_selected", "margin"],
    "nearest_neighbor_mixing": ["hostile", "reducer"],
    "norm_clipping": ["max_norm", "reducer"],
    "scaled_update": ["hostile", "factor", "seed"],
    "sign_flip": ["hostile", "reducer", "seed"],
    "trimmed_mean": ["hostile"],
    "hinge_staleness": ["slope", "threshold"],
    "mix_models": [],
    "polynomial_staleness": ["exponent"],
    "threshold_staleness": ["threshold", "value"],
    "common_rotation": ["transform"],
    "coordinate_median": [],
    "discrete_gaussian_noise": ["max_norm", "noise_multiplier", "num_clients", "transform"],
    "downlink": ["transform"],
    "error_feedback": ["transform", "decay", "max_age"],
    "sharpness_aware": ["model", "rho"],
    "dp_sgd": ["model", "max_norm", "noise_multiplier", "report_clipped"],
    "local_gaussian_noise": ["max_norm", "noise_multiplier"],
    "local_laplace_noise": ["max_norm", "epsilon"],
    "fixed_point": [
        *("max_value", "max_weight", "num_bits", "modulus_bits", "rounding", "denominator"),
    ],
    "modular_sum": [],
    "secure_aggregation": [
        *("num_neighbours", "threshold", "dropout_rate", "modulus_bits", "masks"),
    ],
    "weighted_mean": ["denominator"],
    "ClientEvaluation": ["clients", "num_examples", "pooled"],
    "ClientResult": [
        *("update", "weight", "metrics", "model_state", "entry", "norm", "statistics"),
    ],
    "ClientUpdate": [
        *("init", "step", "final", "measure", "entry", "shared", "client_model", "steps"),
    ],
    "Cohort": [
        *("client_ids", "num_examples", "offsets", "examples", "num_clients", "device_slots"),
        *("max_steps", "staleness", "has_entries", "most_examples", "sample"),
    ],
    "Experiment": [
        *("settings", "calls", "model", "algorithm", "population", "sampler", "privacy"),
        *("metric", "evaluate", "evaluate_clients", "held_out", "personal", "server_has_all"),
    ],
    "FederatedAlgorithm": ["init", "round", "client_model", "guarantees", "message_bits"],
    "FederatedDataset": ["examples", "offsets", "client_ids"],
    "History": ["rounds", "evaluations"],
    "InterruptedTraining": ["message", "signal", "result"],
    "Model": [
        *("init", "loss", "metrics", "predict", "num_classes"),
        *("split", "merge", "add_residual"),
    ],
    "NonFiniteWarning": None,
    "Recorder": ["folder", "config", "tensorboard"],
    "RoundInfo": [
        *("loss", "update_norm", "num_clients", "num_examples", "num_empty", "num_nonfinite"),
        *("skipped", "clients", "metrics"),
    ],
    "ServerState": [
        *("params", "model_state", "opt_state", "round", "store", "pipeline_state"),
        *("pipeline_store", "last_aggregate", "versions", "frozen"),
    ],
    "SweepResult": ["states", "histories"],
    "TrainResult": [
        *("state", "averaged", "best", "history", "stopped", "compile_s", "run_s"),
        *("client_updates_per_s", "examples_per_s", "privacy"),
    ],
    "UpdateTransform": [
        *("init", "client", "server", "entry", "broadcast", "guarantees", "announce"),
    ],
    "TunedLanes": ["lanes", "seconds"],
    "UnconfiguredCPUWarning": None,
}
PARTITION = {
    "continuous": ["values", "num_clients", "strictness", "seed"],
    "dirichlet": ["labels", "num_clients", "alpha", "min_examples", "self_balancing", "seed"],
    "dirichlet_by_client": ["labels", "num_clients", "alpha", "sizes", "seed"],
    "dirichlet_sizes": ["num_examples", "num_clients", "alpha", "min_examples", "seed"],
    "exponential": ["num_examples", "num_clients", "min_examples", "seed"],
    "grouped": ["client_ids", "group_size", "seed"],
    "iid": ["num_examples", "num_clients", "seed"],
    "linear": ["num_examples", "num_clients", "min_examples", "seed"],
    "log_normal": ["num_examples", "num_clients", "sigma", "min_examples", "seed"],
    "natural": ["client_ids"],
    "noisy": ["examples", "num_clients", "variance", "feature", "seed"],
    "pachinko": ["labels", "coarse_labels", "num_clients", "alpha", "beta", "sizes", "seed"],
    "pathological": ["labels", "num_clients", "classes_per_client", "assignment", "seed"],
    "power_law": ["num_examples", "num_clients", "exponent", "min_examples", "seed"],
    "shards": ["labels", "num_clients", "shards_per_client", "seed"],
    "similarity": ["labels", "num_clients", "iid_fraction", "num_hostile", "seed"],
    "sizes": ["num_examples", "sizes", "seed"],
    "square": ["num_examples", "num_clients", "min_examples", "seed"],
}
PLOT = {
    "clients": ["evaluations", "metric", "axes"],
    "curves": ["histories", "metric", "against", "axes"],
    "partition": ["dataset", "label", "axes"],
    "runs": ["folders", "metric", "labels", "axes"],
    "timeline": ["sampler", "num_rounds", "axes"],
}
PRIVACY = {
    "Audit": ["epsilon", "auc"],
    "Budget": ["delta", "epsilon", "accountant"],
    "Ledger": ["epsilon", "noise_multiplier", "delta", "accountant", "adjacency"],
    "Scores": ["final", "iterates", "planted"],
    "audit": ["scores", "planted", "delta", "confidence"],
    "budget": ["delta", "epsilon", "accountant"],
    "calibrate": ["epsilon", "delta", "num_rounds", "sampler", "accountant"],
    "canaries": ["key", "client_ids", "norm", "planted"],
    "canary_scores": [
        *("build", "population", "sampler", "num_rounds", "keys", "client_ids", "norm"),
        "batch_size",
    ],
    "epsilon": ["noise_multiplier", "delta", "num_rounds", "sampler", "accountant"],
    "ledger": ["noise_multiplier", "delta", "sampler", "accountant"],
}
SAMPLERS = {
    "cyclic": ["num_clients", "num_groups", "cohort_size", "rate", "capacity"],
    "everyone": ["num_clients"],
    "importance": ["num_examples", "cohort_size", "capacity"],
    "minimise_reuse": ["num_clients", "cohort_size"],
    "poisson": ["num_clients", "rate", "capacity"],
    "round_robin": ["num_clients", "cohort_size"],
    "sequential": ["num_clients", "cohort_size"],
    "uniform": ["num_clients", "cohort_size", "replace", "capacity"],
    "weighted": ["weights", "cohort_size", "capacity"],
    "available": ["sampler", "trace"],
    "by_day_and_night": ["sampler", "period", "awake", "by_client"],
    "dropping_out": ["sampler", "probability"],
    "fed_buff": [
        *("num_clients", "num_rounds", "concurrency", "buffer_size", "durations", "arrivals"),
        *("rate", "max_staleness", "num_examples", "seed"),
    ],
    "over_selected": ["sampler", "durations", "keep", "num_examples"],
    "timed": ["sampler", "durations", "num_examples"],
    "timed_out": ["sampler", "durations", "deadline", "num_steps", "num_examples"],
    "Sampler": [
        *("select", "num_clients", "capacity", "scheme", "rate", "num_groups", "min_separation"),
        *("max_staleness", "num_rounds", "schedule"),
    ],
    "Schedule": [
        *("client_ids", "staleness", "started", "ended", "concurrency", "num_stale"),
        *("wasted_seconds", "num_refused", "max_staleness", "settings", "draws"),
    ],
    "Selection": [
        *("client_ids", "probabilities", "num_dropped", "max_steps", "staleness", "metrics"),
    ],
}
STOPPING = {
    "History": ["rounds", "evaluations"],
    "best_row": ["history", "metric", "mode"],
    "patience": ["metric", "evaluations", "mode"],
    "target": ["metric", "value", "mode"],
    "wall_clock": ["seconds"],
}
SERVER_OPTIMIZERS = {
    "AdaptiveState": ["first", "second"],
    "fed_adagrad": ["learning_rate", "b1", "tau"],
    "fed_adam": ["learning_rate", "b1", "b2", "tau"],
    "fed_yogi": ["learning_rate", "b1", "b2", "tau"],
}
MODELS = {
    "centroids": ["input_shape", "num_clusters"],
    "cifar_cnn": ["num_classes", "dropout_rates"],
    "emnist_cnn": ["num_classes", "dropout_rates"],
    "emnist_dense": ["num_classes"],
    "gaussians": ["input_shape", "num_components", "full"],
    "halfspace_classifier": ["negative_slope"],
    "lenet": ["input_shape", "num_classes"],
    "logistic": ["input_shape", "num_classes"],
    "mlp": ["input_shape", "hidden", "num_classes"],
    "mnist_cnn": ["num_classes", "widths", "hidden", "padding"],
    "regression": ["input_shape", "hidden", "target_shape"],
    "resnet18": ["num_classes", "norm", "input_shape", "num_groups", "width"],
    "shakespeare_lstm": ["vocabulary_size", "embedding", "hidden", "layers"],
    "stackoverflow_lstm": ["vocabulary_size", "embedding", "hidden", "layers"],
    "stackoverflow_tags": ["vocabulary_size", "num_classes"],
    "stackoverflow_transformer": [
        *("vocabulary_size", "embedding", "layers", "num_heads", "feed_forward"),
        "dropout_rate",
    ],
}
METRICS = {
    "Metric": ["from_batch", "result"],
    "accuracy": ["label", "ignore", "barred"],
    "auc": ["label", "low", "high", "num_bins"],
    "by_domain": ["metric", "num_domains", "feature"],
    "confusion_matrix": ["num_classes", "label", "ignore"],
    "cross_entropy": ["label", "ignore"],
    "label_rate": ["ids", "label", "ignore"],
    "mean": ["function"],
    "mean_absolute_error": ["label"],
    "mean_squared_error": ["label"],
    "perplexity": ["label", "ignore"],
    "recall_at": ["k", "label"],
    "r_squared": ["label", "center"],
    "root_mean_squared_error": ["label"],
    "top_k": ["k", "label", "ignore", "barred"],
}
MODULES = {
    *("data", "durations", "metrics", "models", "partition", "plot", "privacy", "samplers"),
    *("server_optimizers", "stopping"),
}
# `Row` is a `dict`, `StopRule` a `Callable`, `Population` a union.
OWN = {"fedjax_lite", "builtins", "collections", "typing"}
DATA = {
    "cifar10": ["folder"],
    "cifar100": ["path", "split", "crop", "destination", "check_sizes"],
    "convert": [
        *("source", "destination", "format", "columns", "transform", "transform_name"),
        *("progress", "options"),
    ],
    "cifar10_like": [
        *("num_clients", "crop", "separation", "alpha", "num_examples", "batch_size", "seed"),
    ],
    "cifar100_like": [
        *("num_clients", "crop", "separation", "alpha", "num_examples", "batch_size", "seed"),
    ],
    "digits": ["num_clients", "alpha", "held_out", "min_examples", "seed"],
    "digits_images": [],
    "emnist_like": ["num_clients", "separation", "alpha", "num_examples", "batch_size", "seed"],
    "flip_labels": ["dataset", "clients", "num_classes", "label"],
    "shakespeare_like": ["num_clients", "vocabulary_size", "num_examples", "batch_size", "seed"],
    "stackoverflow_like": ["num_clients", "vocabulary_size", "num_examples", "batch_size", "seed"],
    "emnist": ["path", "split", "only_digits", "domain", "destination", "check_sizes"],
    "gaussian_images": [
        *("num_clients", "image_shape", "num_classes", "separation", "alpha", "num_examples"),
        *("batch_size", "seed"),
    ],
    "halfspace": ["num_clients", "batch_size", "min_batches", "max_batches"],
    "halfspace_batch": ["key", "batch_size"],
    "noisy_successors": [
        *("num_clients", "vocabulary_size", "sequence_length", "noise", "end", "num_examples"),
        *("batch_size", "seed"),
    ],
    "read": ["path", "format", "columns", "transform", "options"],
    "read_csv": ["path", "client_column", "columns", "transform"],
    "read_fedjax_sqlite": ["path", "transform", "max_client_bytes"],
    "mnist": ["folder", "split", "mean", "std"],
    "long_tailed_mnist": ["folder", "decay"],
    "rotated_mnist": ["folder", "num_clients", "num_examples", "seed"],
    "pfllib_fashion_mnist": ["folder"],
    "fashion_mnist": ["folder", "split"],
    "emnist_idx": ["folder", "name", "split"],
    "emnist_matlab": ["path", "split"],
    "read_idx": ["path"],
    "read_huggingface": ["dataset", "client_column", "columns", "transform"],
    "read_leaf": ["path", "transform", "max_file_bytes"],
    "read_npz": ["path", "client_ids", "transform", "max_bytes"],
    "read_pandas": ["frame", "client_column", "columns", "transform"],
    "read_tff_hdf5": ["path", "transform", "max_client_bytes"],
    "read_tff_sqlite": ["path", "split", "shapes", "transform", "max_client_bytes"],
    "shakespeare": ["path", "split", "sequence_length", "destination", "check_sizes"],
    "synthetic": ["alpha", "beta", "num_clients", "iid", "held_out", "seed"],
    "stackoverflow_tags": [
        *("path", "vocabulary", "tags", "split", "max_length", "destination", "check_sizes"),
    ],
    "stackoverflow_tags_like": [
        *("num_clients", "vocabulary_size", "num_tags", "num_examples", "batch_size"),
    ],
    "stackoverflow": [
        *("path", "vocabulary", "split", "max_length", "num_oov_buckets", "domain"),
        *("destination", "check_sizes"),
    ],
}
DATASET = {
    "concatenate": ["datasets"],
    "from_arrays": ["examples", "client_ids"],
    "from_clients": ["clients"],
    "from_rows": ["examples", "rows", "client_ids"],
    "map": ["function"],
    "open": ["path", "verify"],
    "resident": ["mesh"],
    "save": ["path"],
    "select": ["client_ids"],
    "split_clients": ["fraction", "seed"],
    "split_examples": ["fraction", "seed"],
    "streamed": ["cohort_capacity", "row_capacity", "mesh"],
    "validate": ["allow_nan"],
}


def test_public_names_and_parameters():
    assert set(dir(fl)) == set(NAMES) | MODULES
    for name, parameters in NAMES.items():
        if parameters is not None:  # Python knows no signature of a warning.
            assert list(inspect.signature(getattr(fl, name)).parameters) == parameters, name


@pytest.mark.parametrize(
    "module", [fl, *(getattr(fl, name) for name in sorted(MODULES)), fl.data.preprocess]
)
def test_public_modules_offer_public_names_and_no_others(module):
    offered = dir(module)
    assert offered == sorted(set(module.__all__))
    assert not [name for name in offered if name.startswith("_")]
    modules = {name for name in offered if inspect.ismodule(getattr(module, name))}
    assert modules == {"fedjax_lite": MODULES, "fedjax_lite.data": {"preprocess"}}.get(
        module.__name__, set()
    )
    own = [value for value in (getattr(module, name) for name in offered) if callable(value)]
    assert not [value for value in own if value.__module__.partition(".")[0] not in OWN]
    defined = {
        name
        for name, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and not name.startswith("_")
    }
    assert defined <= set(offered)


def functions(module):
    """The public functions and tuples that a module of this package defines or gathers."""
    return {
        name: value
        for name in dir(module)
        if callable(value := getattr(module, name)) and value.__module__.startswith("fedjax_lite.")
    }


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (fl.metrics, METRICS),
        (fl.models, MODELS),
        (fl.partition, PARTITION),
        (fl.privacy, PRIVACY),
        (fl.plot, PLOT),
        (fl.samplers, SAMPLERS),
        (fl.server_optimizers, SERVER_OPTIMIZERS),
        (fl.stopping, STOPPING),
    ],
)
def test_functions_of_a_module_and_their_parameters(module, expected):
    public = {
        name: list(inspect.signature(value).parameters) for name, value in functions(module).items()
    }
    assert public == expected


def test_names_and_parameters_of_data():
    functions = {name for name in dir(fl.data) if inspect.isfunction(getattr(fl.data, name))}
    assert functions == set(DATA)
    methods = {
        name
        for name in vars(fl.FederatedDataset)
        if not name.startswith("_") and callable(getattr(fl.FederatedDataset, name))
    }
    assert methods == set(DATASET)
    for owner, names in ((fl.data, DATA), (fl.FederatedDataset, DATASET)):
        for name, parameters in names.items():
            found = list(inspect.signature(getattr(owner, name)).parameters)
            assert [parameter for parameter in found if parameter != "self"] == parameters, name


def test_every_public_function_is_documented():
    for name in NAMES:
        assert inspect.getdoc(getattr(fl, name))
    for module in MODULES:
        for name, value in functions(getattr(fl, module)).items():
            if inspect.isfunction(value) and inspect.signature(value).parameters:
                assert "Args:" in (inspect.getdoc(value) or ""), name


FACTORIES = {
    "fed_sgd": lambda **options: fl.fed_sgd(MODEL, SGD, **options),
    "fed_avg": lambda **options: fl.fed_avg(MODEL, SGD, **options),
    "fed_prox": lambda **options: fl.fed_prox(MODEL, SGD, mu=0.1, **options),
    "scaffold": lambda **options: fl.scaffold(MODEL, SGD, **options),
    "fed_nova": lambda **options: fl.fed_nova(MODEL, SGD, **options),
    "apfl": lambda **options: fl.apfl(MODEL, SGD, **options),
    "ada_fed_prox": lambda **options: fl.ada_fed_prox(MODEL, SGD, **options),
    "agnostic_fed_avg": lambda **options: fl.agnostic_fed_avg(
        MODEL, SGD, num_domains=2, domain_learning_rate=0.1, **options
    ),
    "ditto": lambda **options: fl.ditto(MODEL, SGD, mu=0.1, **options),
    "fed_dyn": lambda **options: fl.fed_dyn(MODEL, SGD, alpha=0.1, **options),
    "fed_ex_lora": lambda **options: fl.fed_ex_lora(fl.lora(MODEL), SGD, **options),
    "fed_exp": lambda **options: fl.fed_exp(MODEL, SGD, **options),
    "fed_ntd": lambda **options: fl.fed_ntd(CLASSIFIER, SGD, **options),
    "fed_rep": lambda **options: fl.fed_rep(MODEL, SGD, personal="*", num_head_epochs=0, **options),
    "fed_sam": lambda **options: fl.fed_sam(MODEL, SGD, rho=0.1, **options),
    "fed_shuffle": lambda **options: fl.fed_shuffle(MODEL, SGD, **options),
    "gaussian_mixture": lambda **options: fl.gaussian_mixture(GAUSSIANS, **options),
    "ifca": lambda **options: fl.ifca(MODEL, SGD, num_clusters=2, **options),
    "k_means": lambda **options: fl.k_means(CENTROIDS, **options),
    "mime": lambda **options: fl.mime(MODEL, SGD, **options),
    "mime_lite": lambda **options: fl.mime_lite(MODEL, SGD, **options),
    "moon": lambda **options: fl.moon(MODEL, SGD, mu=1, **options),
    "p_fed_me": lambda **options: fl.p_fed_me(MODEL, SGD, mu=15, learning_rate=0.1, **options),
    "per_fed_avg": lambda **options: fl.per_fed_avg(MODEL, SGD, alpha=0.1, **options),
    "q_fed_avg": lambda **options: fl.q_fed_avg(MODEL, SGD, q=1, lipschitz=10, **options),
    "federated_algorithm": lambda **options: fl.federated_algorithm(
        MODEL, fl.ClientUpdate(*[lambda *args: None] * 3), SGD, **options
    ),
}
MODEL, SGD = fl.function_model(lambda params, batch: params), optax.sgd(0.1)
CLASSIFIER = fl.models.logistic((2,), 3)
CENTROIDS, GAUSSIANS = fl.models.centroids((2,), 2), fl.models.gaussians((2,), 2)


@pytest.mark.parametrize("name", FACTORIES)
def test_options_are_shown_with_defaults_and_wrong_ones_are_named(name):
    factory = getattr(fl, name)
    parameters = inspect.signature(factory).parameters
    described = inspect.getdoc(factory).partition("Args:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^  (\w+):", described, re.MULTILINE) == list(parameters)
    assert max(map(len, factory.__doc__.splitlines())) <= 100
    shared = {p: parameters[p].default for p in (*UPDATE, *STEPS, *SPEED) if p in parameters}
    expected = {
        **{"on_nonfinite": "drop", "num_epochs": 1, "max_staleness": 0},
        **{"shuffle": True, "differentiable": False},
    }
    assert shared == {p: expected.get(p) for p in shared}
    FACTORIES[name](**shared)
    for wrong, remedy in (
        ("batchsize", "did you mean batch_size?"),
        ("banana", "choose one of .*, on_nonfinite, .*rewrite_convolutions"),
    ):
        with pytest.raises(TypeError, match=f"^{wrong} is no option of {name}; {remedy}"):
            FACTORIES[name](**{wrong: 3})


PROGRAM = """
import optax
import fedjax_lite as fl

model = fl.models.logistic((2,), 3)
sgd = optax.sgd(0.1)
fl.fed_sgd(model, sgd, batch_size=8, lanes=2)
fl.fed_avg(model, sgd, num_epochs=2, weighting="uniform", shuffle=False)
fl.fed_prox(model, sgd, mu=0.1, num_steps=3, on_nonfinite="keep")
fl.fed_nova(model, sgd, pipeline=fl.clip_by_norm(1.0))
fl.scaffold(model, sgd, memory_kind="pinned_host")
fl.apfl(model, sgd, alpha=0.5, differentiable=True, rewrite_convolutions=False)

fl.fed_sgd(model, sgd, num_epochs=2)  # type: ignore[call-arg]
fl.fed_avg(model, sgd, num_epoch=2)  # type: ignore[call-arg]
fl.fed_prox(model, sgd, mu=0.1, on_nonfinite="ignore")  # type: ignore[arg-type]
fl.fed_nova(model, sgd, num_steps=1.5)  # type: ignore[arg-type]
fl.scaffold(model, sgd, memory_kind="hbm")  # type: ignore[arg-type]
fl.apfl(model, sgd, lane=3)  # type: ignore[call-arg]
fl.metrics.optax  # type: ignore[attr-defined]
"""


def test_the_options_of_a_users_program_are_type_checked(tmp_path):
    pytest.importorskip("mypy", reason="mypy comes with the extra `dev`")
    (tmp_path / "program.py").write_text(PROGRAM)
    # Strict, so that a comment that expects an error is one where there is none. Of other packages
    # than this one, mypy needs to know nothing: it takes three seconds and not fifteen.
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = true\nfollow_imports = silent\n"
        "[mypy-jax.*,jaxlib.*,flax.*,numpy.*,chex.*]\nfollow_imports = skip\n"
        "[mypy-optax.*]\nignore_missing_imports = true\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "program.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
