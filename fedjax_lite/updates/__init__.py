"""What happens to updates between clients and server.

Each transform is a function that returns an `UpdateTransform`, with a half for each client and one
for the server; `chain` composes them.
"""

from fedjax_lite.updates.clipping import cap_weight, clip_by_norm
from fedjax_lite.updates.common_rotation import common_rotation
from fedjax_lite.updates.discrete_noise import discrete_gaussian_noise
from fedjax_lite.updates.feedback import ef21, error_feedback
from fedjax_lite.updates.fixed_point import fixed_point, modular_sum
from fedjax_lite.updates.low_rank import low_rank, power_sgd
from fedjax_lite.updates.pipeline import chain, downlink
from fedjax_lite.updates.product_quantization import product_quantization
from fedjax_lite.updates.qsgd import qsgd
from fedjax_lite.updates.quantization import half_precision, quantize_scalar, quantize_uniform
from fedjax_lite.updates.reducers import coordinate_median, weighted_mean
from fedjax_lite.updates.rotation import drive, eden, rotated
from fedjax_lite.updates.secure_aggregation import secure_aggregation
from fedjax_lite.updates.signs import scaled_sign, sign_sgd, terngrad
from fedjax_lite.updates.sparsification import random_k, top_k
from fedjax_lite.updates.staleness import (
    hinge_staleness,
    mix_models,
    polynomial_staleness,
    threshold_staleness,
)

__all__ = [
    "cap_weight",
    "chain",
    "clip_by_norm",
    "common_rotation",
    "coordinate_median",
    "discrete_gaussian_noise",
    "downlink",
    "drive",
    "eden",
    "ef21",
    "error_feedback",
    "fixed_point",
    "half_precision",
    "hinge_staleness",
    "low_rank",
    "mix_models",
    "modular_sum",
    "polynomial_staleness",
    "power_sgd",
    "product_quantization",
    "qsgd",
    "quantize_scalar",
    "quantize_uniform",
    "random_k",
    "rotated",
    "scaled_sign",
    "secure_aggregation",
    "sign_sgd",
    "terngrad",
    "threshold_staleness",
    "top_k",
    "weighted_mean",
]
