import jax

# Eight virtual devices where the backend is the CPU; elsewhere, what the machine has.
jax.config.update("jax_num_cpu_devices", 8)
