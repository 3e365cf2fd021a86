"""Pipelines and reducers that the shared battery runs through: one row for each that there is."""

import fedjax_lite as fl

# By name, the options of an algorithm, with a number that may be traced in place of 1; called `_`
# where a row has none.
PIPELINES = {
    # What all need.
    "weighted_mean": lambda x: {"reducer": fl.weighted_mean(20.0 * x)},
    "chain": lambda x: {
        "pipeline": fl.chain(fl.cap_weight(4.0 * x), fl.clip_by_norm(0.2), fl.quantize_uniform(4))
    },
    "error_feedback": lambda _: {"pipeline": fl.error_feedback(fl.quantize_uniform(4))},
    "downlink": lambda x: {
        "pipeline": fl.chain(fl.downlink(fl.quantize_uniform(4)), fl.clip_by_norm(0.2 * x))
    },
    # Late updates; here, none is.
    "polynomial_staleness": lambda _: {"pipeline": fl.polynomial_staleness(0.5)},
    "mix_models": lambda _: {
        "pipeline": fl.chain(fl.mix_models(), fl.hinge_staleness(), fl.threshold_staleness(3))
    },
    # Robustness: reducers, what goes before them, attacks.
    "coordinate_median": lambda _: {"reducer": fl.coordinate_median()},
    "trimmed_mean": lambda x: {"reducer": fl.trimmed_mean(0.4 * x)},
    "mean_around_median": lambda x: {"reducer": fl.mean_around_median(0.4 * x)},
    "krum": lambda _: {"reducer": fl.krum(2)},
    "multi_krum": lambda x: {"reducer": fl.multi_krum(0.4 * x)},
    "bulyan": lambda _: {"reducer": fl.bulyan(1)},
    "geometric_median": lambda x: {"reducer": fl.geometric_median(smoothing=0.5 * x)},
    "centered_clipping": lambda x: {"reducer": fl.centered_clipping(0.5 * x, 2)},
    "nearest_neighbor_mixing": lambda x: {
        "reducer": fl.nearest_neighbor_mixing(0.4 * x, fl.coordinate_median())
    },
    "bucketing": lambda x: {
        "reducer": fl.norm_clipping(0.4 * x, fl.bucketing(2, fl.centered_clipping(1.0)))
    },
    "adaptive_robust_clipping": lambda x: {
        "reducer": fl.adaptive_robust_clipping(0.4 * x, fl.weighted_mean())
    },
    "sign_flip": lambda x: {"reducer": fl.sign_flip(0.4 * x, fl.weighted_mean(), seed=1)},
    "inner_product_manipulation": lambda x: {
        "reducer": fl.inner_product_manipulation([0, 3], fl.weighted_mean(), factor=x)
    },
    "little_is_enough": lambda x: {
        "reducer": fl.little_is_enough([0, 3], fl.trimmed_mean(0.2), z=-x)
    },
    "mimic": lambda _: {"reducer": fl.mimic(3, fl.multi_krum(0.2))},
    "min_max": lambda _: {"reducer": fl.min_max([0, 3], fl.weighted_mean())},
    "scaled_update": lambda x: {"pipeline": fl.scaled_update([0, 3], -2.0 * x)},
    "gaussian_update": lambda x: {"pipeline": fl.gaussian_update([0, 3], x)},
    "client_momentum": lambda x: {"pipeline": fl.client_momentum(0.5 * x)},
    # Compression.
    "quantize_uniform": lambda _: {"pipeline": fl.quantize_uniform(4)},
    # Privacy.
    # Secure aggregation.
    "fixed_point": lambda x: {
        "pipeline": fl.fixed_point(2.0**10 * x),
        "reducer": fl.modular_sum(),
    },
}
