"""JAX and Flax for the tests of normkit.nnx: skipped by name where missing, unless NORMKIT_REQUIRE names `nnx`."""

import os

import pytest

try:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
except ImportError as missing:
    if "nnx" in os.environ.get("NORMKIT_REQUIRE", "").replace(",", " ").split():
        raise
    pytest.skip(f"normkit.nnx is not tested: {missing}", allow_module_level=True)

__all__ = ["jax", "jnp", "nnx", "optax"]
