"""What is kept apart on a CPU, where users map it over devices by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import fedjax_lite as fl
from fedjax_lite.models.convolutional import max_pool
from fedjax_lite.xla import random as fl_random


def pooled(key, x):
    return max_pool(x.reshape(1, 2, 2, 1)).sum()


@pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices")
@pytest.mark.parametrize(
    "function",
    [
        lambda key, x: jax.random.normal(fl_random.fast(key), (4,)) + x,
        lambda key, x: fl_random.permuted(key, jnp.arange(4), 4) + x,
        jax.grad(pooled, argnums=1),
    ],
)
def test_runs_inside_a_shard_map(function):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jnp.arange(8.0).reshape(2, 4)
    split = PartitionSpec("clients")
    spread = jax.shard_map(
        lambda key, x: function(key[0], x[0])[None],
        mesh=fl.clients_mesh(2),
        in_specs=split,
        out_specs=split,
    )
    expected = [function(*one) for one in zip(keys, x, strict=True)]
    np.testing.assert_array_equal(jax.jit(spread)(keys, x), expected)


def test_a_branch_keeps_it_apart():
    compiled = jax.jit(max_pool).lower(jnp.ones((1, 4, 4, 1))).compile()
    assert ("conditional" in compiled.as_text()) == (jax.default_backend() == "cpu")
