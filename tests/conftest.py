import os

# Tests compile much and compute little: LLVM need not try hard.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax

# Eight virtual devices where the backend is the CPU; elsewhere, what the machine has.
jax.config.update("jax_num_cpu_devices", 8)
