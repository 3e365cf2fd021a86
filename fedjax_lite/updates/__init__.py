"""What happens to updates between clients and server.

Each transform is a function that returns an `UpdateTransform`, with a half for each client and one
for the server; `chain` composes them.
"""

from fedjax_lite.updates.clipping import clip_by_norm
from fedjax_lite.updates.pipeline import chain
from fedjax_lite.updates.quantization import quantize_uniform

__all__ = [
    "chain",
    "clip_by_norm",
    "quantize_uniform",
]
