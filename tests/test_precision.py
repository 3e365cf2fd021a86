"""Sums of many terms against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lite.xla.precision import squared_norm

# One entry, what is summed as it is, eight slabs, eight slabs and a rest of one to seven.
SHAPES = [(), (0,), (5,), (4095,), (64, 64), (17, 257), (5000,), (9, 11, 53)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64", "int32"])
def test_squared_norm_is_that_of_numpy(shape, dtype):
    x = np.random.default_rng(0).normal(scale=4, size=(2, *shape))
    x = np.asarray(x[0] + 1j * x[1] if dtype == "complex64" else x[0]).astype(jnp.dtype(dtype))
    wide = np.asarray(x, np.complex128)
    result = jax.jit(squared_norm)({"x": x, "y": [np.float32(2)]})
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, (wide * wide.conj()).real.sum() + 4, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 2500, 4999])
def test_what_is_not_finite_shows(value, position):
    x = np.zeros(5000, np.float32)
    x[position] = value
    result = jax.jit(squared_norm)(x)
    assert not np.isfinite(result)
    assert np.isnan(result) == np.isnan(value)


def test_nothing_has_no_norm():
    assert squared_norm({}) == 0
