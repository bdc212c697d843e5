"""`normkit.show` of the further layers of NNX: what is shown is what they compute."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normkit
import normkit.nnx as nk

IMAGE = (3, 2, 3, 4)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nk.FilterResponseNorm(4, learn_epsilon=True, rngs=nnx.Rngs(0)), IMAGE),
        (lambda: nk.EvoNormB0(4, momentum=0.7, rngs=nnx.Rngs(0)), IMAGE),
        (lambda: nk.EvoNormS0(4, groups=2, rngs=nnx.Rngs(0)), IMAGE),
        (lambda: nk.DynamicTanh(4, rngs=nnx.Rngs(0)), (3, 4)),
        (lambda: nk.GlobalResponseNorm(4, rngs=nnx.Rngs(0)), IMAGE),
    ],
    ids=["frn", "evonorm_b0", "evonorm_s0", "dyt", "grn"],
)
def test_a_further_layer_computes_what_is_shown(make, shape):
    rng, layer = np.random.default_rng(0), make()
    for name in ("scale", "bias", "v", "tau"):
        if hasattr(layer, name):
            getattr(layer, name)[...] = jnp.asarray(rng.normal(1, 0.5, 4), jnp.float32)
    x = rng.normal(1, 1, shape).astype(np.float32)
    seen = normkit.show(layer, x)
    y = np.asarray(layer(jnp.asarray(x)))
    np.testing.assert_allclose(np.moveaxis(seen.y, 1, -1), y, rtol=1e-4, atol=1e-5)  # float32, of values near 1
    for one in seen.walk.kept:
        np.testing.assert_allclose(one.after, np.asarray(layer.var[...]), rtol=1e-5)
