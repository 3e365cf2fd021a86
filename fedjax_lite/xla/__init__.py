"""What XLA and the devices need for a round to be fast.

Meshes, random bits, forms of convolutions and products, precision, memory, the set-up of a CPU.
Nothing in here knows what a client computes.
"""

from fedjax_lite.xla.cpu import UnconfiguredCPUWarning, configure_cpu
from fedjax_lite.xla.mesh import clients_mesh, replicate

__all__ = [
    "UnconfiguredCPUWarning",
    "clients_mesh",
    "configure_cpu",
    "replicate",
]
