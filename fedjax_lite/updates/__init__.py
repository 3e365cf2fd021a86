"""What happens to updates between clients and server.

Each transform is a function that returns an `UpdateTransform`, with a half for each client and one
for the server; `chain` composes them.
"""

from fedjax_lite.updates.adaptive import adaptive_clip, adaptive_zero
from fedjax_lite.updates.clipping import cap_weight, clip_by_norm, clip_per_array, zero_by_norm
from fedjax_lite.updates.colluding_attacks import (
    inner_product_manipulation,
    little_is_enough,
    mimic,
    min_max,
    sign_flip,
)
from fedjax_lite.updates.common_rotation import common_rotation
from fedjax_lite.updates.discrete_noise import discrete_gaussian_noise
from fedjax_lite.updates.feedback import ef21, error_feedback
from fedjax_lite.updates.fixed_point import fixed_point, modular_sum
from fedjax_lite.updates.geometric_median import centered_clipping, geometric_median
from fedjax_lite.updates.hostile import hostile_clients
from fedjax_lite.updates.krum import bulyan, krum, multi_krum
from fedjax_lite.updates.local_privacy import local_gaussian_noise, local_laplace_noise
from fedjax_lite.updates.lone_attacks import gaussian_update, scaled_update
from fedjax_lite.updates.low_rank import low_rank, power_sgd
from fedjax_lite.updates.matrix_factorization import toeplitz_noise, tree_noise
from fedjax_lite.updates.mixing import (
    adaptive_robust_clipping,
    bucketing,
    nearest_neighbor_mixing,
    norm_clipping,
)
from fedjax_lite.updates.momentum import client_momentum
from fedjax_lite.updates.noise import gaussian_noise
from fedjax_lite.updates.pipeline import chain, downlink
from fedjax_lite.updates.product_quantization import product_quantization
from fedjax_lite.updates.qsgd import qsgd
from fedjax_lite.updates.quantization import half_precision, quantize_scalar, quantize_uniform
from fedjax_lite.updates.reducers import weighted_mean
from fedjax_lite.updates.robust import coordinate_median, mean_around_median, trimmed_mean
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
    "adaptive_clip",
    "adaptive_robust_clipping",
    "adaptive_zero",
    "bucketing",
    "bulyan",
    "cap_weight",
    "centered_clipping",
    "chain",
    "client_momentum",
    "clip_by_norm",
    "clip_per_array",
    "common_rotation",
    "coordinate_median",
    "discrete_gaussian_noise",
    "downlink",
    "drive",
    "eden",
    "ef21",
    "error_feedback",
    "fixed_point",
    "gaussian_noise",
    "gaussian_update",
    "geometric_median",
    "half_precision",
    "hinge_staleness",
    "hostile_clients",
    "inner_product_manipulation",
    "krum",
    "little_is_enough",
    "local_gaussian_noise",
    "local_laplace_noise",
    "low_rank",
    "mean_around_median",
    "mimic",
    "min_max",
    "mix_models",
    "modular_sum",
    "multi_krum",
    "nearest_neighbor_mixing",
    "norm_clipping",
    "polynomial_staleness",
    "power_sgd",
    "product_quantization",
    "qsgd",
    "quantize_scalar",
    "quantize_uniform",
    "random_k",
    "rotated",
    "scaled_sign",
    "scaled_update",
    "secure_aggregation",
    "sign_flip",
    "sign_sgd",
    "terngrad",
    "threshold_staleness",
    "toeplitz_noise",
    "top_k",
    "tree_noise",
    "trimmed_mean",
    "weighted_mean",
    "zero_by_norm",
]
