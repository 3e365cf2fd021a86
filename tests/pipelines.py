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
    # Robustness: reducers, what goes before them, attacks.
    "coordinate_median": lambda _: {"reducer": fl.coordinate_median()},
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
