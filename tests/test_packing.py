"""Arrays side by side, and apart again."""

import jax
import numpy as np
import pytest

from fedjax_lite.xla.packing import pack, unpack


@pytest.mark.parametrize("num_axes", [0, 1, 2])
def test_what_was_packed_comes_apart(num_axes):
    leading = (2, 3)[:num_axes]
    shapes = {"a": (), "b": (4,), "c": (2, 2), "d": (0,)}
    tree = {
        name: np.arange(np.prod((*leading, *shape))).reshape((*leading, *shape)).astype(dtype)
        for (name, shape), dtype in zip(
            shapes.items(), ("float32", "int32", "float32", "int32"), strict=True
        )
    }
    packed = jax.jit(pack, static_argnums=1)(tree, num_axes)
    assert [x.shape for x in packed] == [(*leading, 5), (*leading, 4)]
    back = jax.jit(lambda packed: unpack(packed, tree, num_axes))(packed)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    # As many of them, one after the other.
    two = [np.stack([x, 2 * x]) for x in jax.device_get(packed)]
    several = jax.jit(lambda two: unpack(two, tree, num_axes))(two)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, [y, 2 * y]), several, tree)


def test_nothing_packs_to_nothing():
    assert unpack(pack({}), {}) == {}
