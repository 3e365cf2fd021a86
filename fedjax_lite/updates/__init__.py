"""What happens to updates between clients and server.

Each transform is a function that returns an `UpdateTransform`, with a half for each client and one
for the server; `chain` composes them.
"""

from fedjax_lite.updates.clipping import cap_weight, clip_by_norm
from fedjax_lite.updates.feedback import error_feedback
from fedjax_lite.updates.fixed_point import fixed_point, modular_sum
from fedjax_lite.updates.pipeline import chain, downlink
from fedjax_lite.updates.quantization import quantize_uniform
from fedjax_lite.updates.reducers import coordinate_median, weighted_mean
from fedjax_lite.updates.secure_aggregation import secure_aggregation
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
    "coordinate_median",
    "downlink",
    "error_feedback",
    "fixed_point",
    "hinge_staleness",
    "mix_models",
    "modular_sum",
    "polynomial_staleness",
    "quantize_uniform",
    "secure_aggregation",
    "threshold_staleness",
    "weighted_mean",
]
