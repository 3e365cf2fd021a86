"""What devices exchange."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import fedjax_lite as fl
from fedjax_lite.xla.mesh import AXIS, sum_over_devices


def test_sums_over_devices_keep_shapes_dtypes_and_whole_numbers():
    tree = {
        "large": jnp.arange(20_000.0).reshape(100, 200),
        "small": [jnp.arange(6.0).reshape(2, 3), jnp.float32(2.5)],
        "half": jnp.arange(4, dtype=jnp.bfloat16),
        "count": jnp.array([2**24 + 1, 3], jnp.int32),  # float32 ends at 2**24.
        "other": jnp.uint32(7),
    }

    def weighted(tree):
        factor = jax.lax.axis_index(AXIS) + 1
        return sum_over_devices(jax.tree.map(lambda x: x * factor.astype(x.dtype), tree))

    summed = jax.shard_map(
        weighted,
        mesh=fl.clients_mesh(4),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    for result, x in zip(*map(jax.tree.leaves, (jax.jit(summed)(tree), tree)), strict=True):
        assert (result.shape, result.dtype) == (x.shape, x.dtype)
        np.testing.assert_array_equal(result, x * 10)
