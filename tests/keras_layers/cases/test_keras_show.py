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


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (ours.FilterResponseNormalization(learn_epsilon=True), X),
        (ours.EvoNormB0(momentum=0.7), X),
        (ours.EvoNormS0(groups=2), X),
        (ours.DynamicTanh(), X[:, 0, 0]),
        (ours.GlobalResponseNormalization(), X),
    ],
    ids=["frn", "evonorm_b0", "evonorm_s0", "dyt", "grn"],
)
def test_a_further_layer_computes_what_is_shown(layer, x):
    layer.build(x.shape)
    rng = np.random.default_rng(1)
    for weight in layer.trainable_variables:
        weight.assign(rng.normal(1, 0.5, weight.shape))
    seen = normkit.show(layer, x)
    y = ops.convert_to_numpy(layer(x, training=True))
    np.testing.assert_allclose(seen.y, np.moveaxis(y, -1, 1), rtol=1e-4, atol=1e-5)  # float32, of values near 1
    for one in seen.walk.kept:
        np.testing.assert_allclose(one.after, ops.convert_to_numpy(layer.moving_variance.value), rtol=1e-5)


@pytest.mark.parametrize("layer", [ours.BatchNormalization(), ours.EvoNormS0(groups=2)], ids=["batch", "evonorm_s0"])
def test_a_layer_must_be_built(layer):
    with pytest.raises(normkit.NormError, match="must be built"):
        normkit.show(layer, X)
