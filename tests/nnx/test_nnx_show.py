"""`normkit.show` of layers of Flax NNX, stock and ours."""

import numpy as np
import pytest
from nnx_required import jnp, nnx

import normkit
from normkit import nnx as ours

X = np.random.default_rng(0).normal(1, 2, (3, 2, 2, 4)).astype(np.float32)
FIRST = np.moveaxis(X, -1, 1)


def test_a_layer_computes_what_is_shown():
    layer = ours.BatchNorm(4, momentum=0.9, debiased=True, rngs=nnx.Rngs(0))
    seen = normkit.show(layer, jnp.asarray(X))
    y = layer(jnp.asarray(X))
    np.testing.assert_allclose(seen.y, np.moveaxis(y, -1, 1), rtol=1e-5, atol=1e-5)  # the layer computes in float32
    for one in seen.walk.kept:
        np.testing.assert_allclose(one.after, getattr(layer, one.name).get_value(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "name", "x"),
    [
        (lambda: nnx.BatchNorm(4, epsilon=1e-5, momentum=0.9, rngs=nnx.Rngs(0)), "batch", FIRST),
        (lambda: nnx.LayerNorm(4, epsilon=1e-5, rngs=nnx.Rngs(0)), "layer", X),
        (lambda: nnx.GroupNorm(4, num_groups=2, epsilon=1e-5, rngs=nnx.Rngs(0)), "group", FIRST),
    ],
)
def test_a_layer_is_what_its_name_says(layer, name, x):
    np.testing.assert_allclose(normkit.show(layer(), X).y, normkit.show(name, x).y, rtol=1e-12)
