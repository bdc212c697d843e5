"""`normkit.show` of layers of Keras, stock and ours, beside what they compute."""

import keras
import numpy as np
import pytest
from keras import ops

import normkit
import normkit.keras as ours

X = np.random.default_rng(0).normal(1, 2, (3, 2, 2, 4)).astype(np.float32)


@pytest.mark.parametrize(
    "layer",
    [
        keras.layers.BatchNormalization(momentum=0.9),
        ours.BatchNormalization(momentum=0.9, debiased=True),
        ours.BatchNormalization(axis=1, virtual_batch_size=2),
        keras.layers.LayerNormalization(),
        ours.GroupNormalization(groups=2),
    ],
)
def test_a_layer_computes_what_is_shown(layer):
    layer.build(X.shape)
    seen = normkit.show(layer, X)
    last = seen.walk.subject.last

    def placed(y):
        return np.moveaxis(ops.convert_to_numpy(y), -1, 1) if last else ops.convert_to_numpy(y)

    # The layer computes in float32.
    np.testing.assert_allclose(seen.y, placed(layer(X, training=True) if seen.walk.kept else layer(X)), atol=1e-5)
    kept = {"mean": "moving_mean", "var": "moving_variance"}
    for one in seen.walk.kept:
        np.testing.assert_allclose(one.after, ops.convert_to_numpy(getattr(layer, kept[one.name]).value), rtol=1e-5)
    np.testing.assert_allclose(seen.walk.evaluation, placed(layer(X[:1])), rtol=1e-4, atol=1e-4)


def test_a_layer_must_be_built():
    with pytest.raises(normkit.NormError, match="must be built"):
        normkit.show(ours.BatchNormalization(), X)
