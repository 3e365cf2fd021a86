import os

# Tests compile much and compute little: LLVM need not try hard.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
# PyTorch need not spread over cores that other test processes are busy on.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax

# Eight virtual devices where the backend is the CPU; elsewhere, what the machine has.
jax.config.update("jax_num_cpu_devices", 8)
