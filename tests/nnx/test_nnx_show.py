"""`normkit.show` of layers of Flax NNX, stock and ours, beside what they compute."""

import numpy as np
import pytest
from nnx_required import jnp, nnx

import normkit
from normkit import nnx as ours

X = np.random.default_rng(0).normal(1, 2, (3, 2, 2, 4)).astype(np.float32)
MAKERS = [
    lambda: nnx.BatchNorm(4, rngs=nnx.Rngs(0)),
    lambda: ours.BatchNorm(4, momentum=0.9, debiased=True, rngs=nnx.Rngs(0)),
    lambda: nnx.LayerNorm(4, rngs=nnx.Rngs(0)),
    lambda: ours.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0)),
]


@pytest.mark.parametrize("make", MAKERS)
def test_a_layer_computes_what_is_shown(make):
    layer = make()
    seen = normkit.show(layer, jnp.asarray(X))
    channels_first = seen.walk.subject.name != "layer"

    def placed(y):
        return np.moveaxis(np.asarray(y), -1, 1) if channels_first else np.asarray(y)

    # The layer computes in float32.
    np.testing.assert_allclose(seen.y, placed(layer(jnp.asarray(X))), rtol=1e-5, atol=1e-5)
    for one in seen.walk.kept:
        np.testing.assert_allclose(one.after, getattr(layer, one.name).get_value(), rtol=1e-5, atol=1e-5)
    layer.eval()
    np.testing.assert_allclose(seen.walk.evaluation, placed(layer(jnp.asarray(X[:1]))), rtol=1e-4, atol=1e-4)
