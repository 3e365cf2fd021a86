"""What happens to updates between clients and server.

Each transform is a function that returns an `UpdateTransform`, with a half for each client and one
for the server; `chain` composes them.
"""

from fedjax_lite.updates.attacks import (
    gaussian_update,
    inner_product_manipulation,
    little_is_enough,
    mimic,
    min_max,
    scaled_update,
    sign_flip,
)
from fedjax_lite.updates.clipping import cap_weight, clip_by_norm
from fedjax_lite.updates.feedback import error_feedback
from fedjax_lite.updates.geometric_median import centered_clipping, geometric_median
from fedjax_lite.updates.hostile import hostile_clients
from fedjax_lite.updates.krum import bulyan, krum, multi_krum
from fedjax_lite.updates.mixing import (
    adaptive_robust_clipping,
    bucketing,
    nearest_neighbor_mixing,
    norm_clipping,
)
from fedjax_lite.updates.momentum import client_momentum
from fedjax_lite.updates.pipeline import chain, downlink
from fedjax_lite.updates.quantization import quantize_uniform
from fedjax_lite.updates.reducers import fixed_point, modular_sum, weighted_mean
from fedjax_lite.updates.robust import coordinate_median, mean_around_median, trimmed_mean
from fedjax_lite.updates.staleness import (
    hinge_staleness,
    mix_models,
    polynomial_staleness,
    threshold_staleness,
)

__all__ = [
    "adaptive_robust_clipping",
    "bucketing",
    "bulyan",
    "cap_weight",
    "centered_clipping",
    "chain",
    "client_momentum",
    "clip_by_norm",
    "coordinate_median",
    "downlink",
    "error_feedback",
    "fixed_point",
    "gaussian_update",
    "geometric_median",
    "hinge_staleness",
    "hostile_clients",
    "inner_product_manipulation",
    "krum",
    "little_is_enough",
    "mean_around_median",
    "mimic",
    "min_max",
    "mix_models",
    "modular_sum",
    "multi_krum",
    "nearest_neighbor_mixing",
    "norm_clipping",
    "polynomial_staleness",
    "quantize_uniform",
    "scaled_update",
    "sign_flip",
    "threshold_staleness",
    "trimmed_mean",
    "weighted_mean",
]
