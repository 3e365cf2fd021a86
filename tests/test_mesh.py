"""What devices exchange."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import fedjax_lite as fl
from fedjax_lite.xla.mesh import AXIS, gather_over_devices, sum_over_devices


def test_sums_and_rows_keep_shapes_dtypes_and_whole_numbers():
    tree = {
        "large": jnp.arange(70_000.0).reshape(2, 35_000),
        "small": [jnp.arange(6.0).reshape(2, 3), jnp.array([2.5, 1.5])],
        "half": jnp.arange(4, dtype=jnp.bfloat16).reshape(2, 1, 2),
        "count": jnp.array([2**24 + 1, 3], jnp.int32),  # float32 ends at 2**24.
        "other": jnp.array([7, 8], jnp.uint32),
    }

    def exchanged(tree):
        factor = jax.lax.axis_index(AXIS) + 1
        own = jax.tree.map(lambda x: x * factor.astype(x.dtype), tree)
        return sum_over_devices(own), gather_over_devices(own)

    run = jax.shard_map(
        exchanged,
        mesh=fl.clients_mesh(4),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    summed, gathered = jax.jit(run)(tree)
    for total, rows, x in zip(*map(jax.tree.leaves, (summed, gathered, tree)), strict=True):
        assert total.dtype == rows.dtype == x.dtype
        np.testing.assert_array_equal(total, x * 10)
        np.testing.assert_array_equal(rows, np.concatenate([x, x * 2, x * 3, x * 4]))
