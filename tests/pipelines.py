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
    "half_precision": lambda _: {"pipeline": fl.half_precision()},
    "quantize_scalar": lambda _: {"pipeline": fl.quantize_scalar(4, per_channel=True)},
    "rotated": lambda _: {"pipeline": fl.rotated(fl.quantize_uniform(16))},
    "drive": lambda _: {"pipeline": fl.drive()},
    "eden": lambda _: {"pipeline": fl.eden(2)},
    "sign_sgd": lambda _: {"pipeline": fl.sign_sgd(), "weighting": "uniform"},
    "scaled_sign": lambda _: {"pipeline": fl.scaled_sign(per_array=True)},
    "terngrad": lambda x: {"pipeline": fl.terngrad(1.2 * x)},
    "qsgd": lambda _: {"pipeline": fl.qsgd(3, bucket_size=3, encoding="elias")},
    "top_k": lambda _: {"pipeline": fl.error_feedback(fl.top_k(0.5), decay=0.9, max_age=1)},
    "random_k": lambda _: {"pipeline": fl.random_k(2)},
    "product_quantization": lambda _: {"pipeline": fl.product_quantization(2, 2)},
    "low_rank": lambda _: {"pipeline": fl.low_rank(1)},
    "power_sgd": lambda _: {"pipeline": fl.error_feedback(fl.power_sgd(1))},
    "ef21": lambda _: {"pipeline": fl.ef21(fl.top_k(2))},
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
        "pipeline": fl.fixed_point(0.2 * x, 4.0, num_bits=12, modulus_bits=16),
        "reducer": fl.modular_sum(),
    },
    "secure_aggregation": lambda x: {
        "pipeline": fl.chain(
            fl.fixed_point(1.0, 4.0, rounding="nearest", denominator=20.0 * x),
            fl.secure_aggregation(4, threshold=0.1, dropout_rate=0.2, masks=True),
        ),
        "reducer": fl.modular_sum(),
    },
    "common_rotation": lambda x: {
        "pipeline": fl.common_rotation(fl.fixed_point(0.5 * x, 4.0, rounding="nearest")),
        "reducer": fl.modular_sum(),
    },
    "discrete_gaussian_noise": lambda x: {
        "pipeline": fl.discrete_gaussian_noise(
            *(0.5, 0.3 * x, 8),
            fl.common_rotation(fl.fixed_point(0.5, 1.0, num_bits=10, denominator=8.0)),
        ),
        "reducer": fl.modular_sum(),
    },
}
