"""Sums of many terms, in dtypes that can hold them."""

import jax
import jax.numpy as jnp

from fedjax_lite.base import PyTree


def widen(tree: PyTree) -> PyTree:
    """The arrays in float32, or as they are where they are wider."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
