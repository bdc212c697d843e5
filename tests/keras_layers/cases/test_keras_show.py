"""`normkit.show` of layers of Keras, stock and ours."""

import keras
import numpy as np
import pytest
from keras import ops

import normkit
import normkit.keras as ours

X = np.random.default_rng(0).normal(1, 2, (3, 2, 2, 4)).astype(np.float32)
FIRST = np.moveaxis(X, -1, 1)


def test_a_layer_computes_what_is_shown():
    layer = ours.BatchNormalization(momentum=0.9, debiased=True)
    layer.build(X.shape)
    seen = normkit.show(layer, X)
    y = ops.convert_to_numpy(layer(X, training=True))
    np.testing.assert_allclose(seen.y, np.moveaxis(y, -1, 1), rtol=1e-5, atol=1e-5)  # the layer computes in float32
    for one, kept in zip(seen.walk.kept, (layer.moving_mean, layer.moving_variance), strict=True):
        np.testing.assert_allclose(one.after, ops.convert_to_numpy(kept.value), rtol=1e-5)


@pytest.mark.parametrize(
    ("layer", "name", "x"),
    [
        (keras.layers.BatchNormalization(epsilon=1e-5, momentum=0.9), "batch", FIRST),
        (ours.BatchNormalization(epsilon=1e-5, virtual_batch_size=2), "ghost", FIRST),
        (keras.layers.LayerNormalization(epsilon=1e-5), "layer", X),
        (keras.layers.GroupNormalization(2, epsilon=1e-5), "group", FIRST),
    ],
)
def test_a_layer_is_what_its_name_says(layer, name, x):
    layer.build(X.shape)
    np.testing.assert_allclose(normkit.show(layer, X).y, normkit.show(name, x).y, rtol=1e-12)


def test_a_layer_must_be_built():
    with pytest.raises(normkit.NormError, match="must be built"):
        normkit.show(ours.BatchNormalization(), X)
