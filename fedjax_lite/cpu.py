"""Settings of XLA that make rounds fast on a CPU."""

import os

import jax

from fedjax_lite import _validate

_FLAGS = {
    # A loop over small arrays becomes one function, not one thread-pool task per operation.
    "--xla_backend_extra_options": "xla_cpu_small_while_loop_byte_threshold=1000000",
    # AVX-512 where there is AVX-512; XLA stops at 256 bits on its own.
    "--xla_cpu_prefer_vector_width": "512",
}


def configure_cpu(num_devices: int | None = None) -> None:
    """Prepares JAX for simulations on a CPU: one virtual device per core, and XLA flags.

    XLA splits each large operation over the cores, which a client's small steps do not gain
    by; a device per core trains different clients instead. Call it before anything is
    computed. It changes nothing on machines whose default backend is not the CPU, and XLA
    flags that are already set in the environment variable `XLA_FLAGS` stay as they are.

    Args:
      num_devices: Number of virtual devices; the number of usable cores by default.

    Raises:
      ValueError: `num_devices` is not positive.
      RuntimeError: JAX has already computed something, so that it is too late.
    """
    if num_devices is None:
        usable = getattr(os, "sched_getaffinity", None)
        num_devices = len(usable(0)) if usable else os.cpu_count() or 1
    num_devices = _validate.integer("num_devices", num_devices, minimum=1)
    jax.config.update("jax_num_cpu_devices", num_devices)
    flags = os.environ.get("XLA_FLAGS", "")
    missing = [f"{name}={value}" for name, value in _FLAGS.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()
