"""The batches that clients train on, for PyTorch, and how close its params must come to ours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from fedjax_lite.engine.batches import KEY_DATA, Slot, client_key, count_steps, read_batch
from fedjax_lite.xla import random as fl_random


@functools.partial(jax.jit, static_argnames=("max_steps", "batching"))
def cohort_batches(cohort, key, *, max_steps, batching):
    """Every batch of every client, as the runner reads them: `[clients, steps, batch, ...]`."""

    def client(slot):
        key_data = client_key(fl_random.fast(key), cohort.client_ids[slot], KEY_DATA)
        read = lambda step: read_batch(cohort, key_data, Slot.of(cohort, slot), step, batching)
        return jax.vmap(read)(jnp.arange(max_steps))

    return jax.vmap(client)(jnp.arange(cohort.capacity))


def torch_batches(cohort, key, *, max_steps, batching):
    """For each client of the cohort, its batches without padding, as tensors."""
    batches = jax.device_get(cohort_batches(cohort, key, max_steps=max_steps, batching=batching))
    mask = batches.pop("mask")
    num_steps = np.asarray(count_steps(cohort, key, batching))
    assert num_steps.max() <= max_steps
    for slot in range(cohort.capacity):
        yield [
            {name: torch.tensor(a[slot, step][mask[slot, step]]) for name, a in batches.items()}
            for step in range(num_steps[slot])
        ]


def close(actual, desired, start, tolerance):
    """Relative to the largest entry of each array, or to the way it has come since `start`.

    The way, since a step of 1 from -0.7 leaves 0.3 with the error of 1: in float32, optax
    corrects Adam's second moment by 1 - 0.999, off by 1.3e-5, and the step by half of that.
    """

    def check(a, d, s):
        scale = max(np.abs(d).max(), np.abs(d - s).max())
        np.testing.assert_allclose(a, d, rtol=0, atol=tolerance * scale)

    jax.tree.map(check, jax.device_get(actual), desired, jax.device_get(start))
