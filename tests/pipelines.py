"""Pipelines and reducers that the shared battery runs through: one row for each that there is."""

import fedjax_lite as fl


def private(*transforms):
    return {
        "pipeline": fl.chain(fl.cap_weight(1.0), *transforms),
        "reducer": fl.weighted_mean(5.0),
    }


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
    # Compression.
    "quantize_uniform": lambda _: {"pipeline": fl.quantize_uniform(4)},
    # Privacy.
    "clip_per_array": lambda x: {"pipeline": fl.clip_per_array(0.2 * x)},
    "zero_by_norm": lambda _: {"pipeline": fl.zero_by_norm(0.3)},
    "adaptive_clip": lambda _: {
        "pipeline": fl.adaptive_clip(0.2, count_noise=0.1, denominator=5.0)
    },
    "adaptive_zero": lambda _: {"pipeline": fl.adaptive_zero(0.2, norm="l2", multiplier=1.0)},
    "gaussian_noise": lambda x: private(fl.clip_by_norm(0.2), fl.gaussian_noise(x)),
    "gaussian_noise after adaptive_clip": lambda x: private(
        fl.adaptive_clip(0.2, count_noise=1.0, denominator=5.0), fl.gaussian_noise(x)
    ),
    "toeplitz_noise": lambda x: private(
        fl.clip_by_norm(0.2), fl.toeplitz_noise(x, 4, 2, coefficients=[0.8, 0.6])
    ),
    "tree_noise": lambda x: private(fl.clip_by_norm(0.2), fl.tree_noise(x, 4)),
    "local_gaussian_noise": lambda x: {"pipeline": fl.local_gaussian_noise(0.2, 0.5 * x)},
    "local_laplace_noise": lambda x: {"pipeline": fl.local_laplace_noise(0.2 * x, 2.0)},
    # Secure aggregation.
    "fixed_point": lambda x: {
        "pipeline": fl.fixed_point(2.0**10 * x),
        "reducer": fl.modular_sum(),
    },
}
