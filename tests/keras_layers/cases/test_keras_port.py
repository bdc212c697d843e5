"""Norm layers from PyTorch to Keras and back, and recalibration, on the backend that is active."""

import keras
import numpy as np
import pytest
import torch
from keras import ops
from trained_layers import LAYERS, named, trained

import normkit
import normkit.keras
from normkit.errors import NormError


def moved(x, layer):
    """To Keras' channels last; layer and RMS norm stay."""
    return x if type(layer).__name__ in ("LayerNorm", "RMSNorm") else np.moveaxis(x, 1, -1)


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=named)
def test_there_and_back(layer, shape):
    layer = trained(layer, shape)
    x = 2 + 3 * torch.randn(shape)
    expected = layer(x).detach().numpy()
    there = normkit.port(layer, to="keras")
    given = ops.convert_to_numpy(there(moved(x.numpy(), layer), training=False))
    np.testing.assert_allclose(given, moved(expected, layer), rtol=1e-5, atol=1e-5)
    back = normkit.port(there, to="torch").eval()
    np.testing.assert_allclose(back(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_axis_one_stays_where_it_is_asked_for():
    layer = trained(*LAYERS[2])
    x = torch.randn(LAYERS[2][1])
    there = normkit.port(layer, to="keras", axis=1)
    np.testing.assert_allclose(ops.convert_to_numpy(there(x.numpy())), layer(x).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_plain_layers_of_keras_receive_the_values():
    layer, shape = trained(torch.nn.BatchNorm2d(6, eps=1e-3), (8, 6, 3, 3)), (8, 3, 3, 6)
    model = keras.Sequential([keras.Input(shape[1:]), keras.layers.BatchNormalization(epsilon=1e-3)])
    normkit.port(torch.nn.Sequential(layer), to=model)
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    expected = layer(torch.from_numpy(np.moveaxis(x, -1, 1))).detach().numpy()
    np.testing.assert_allclose(model.predict(x, verbose=0), np.moveaxis(expected, 1, -1), rtol=1e-5, atol=1e-5)
    with pytest.raises(NormError, match="same eps"):
        normkit.port(torch.nn.Sequential(trained(torch.nn.BatchNorm2d(6), (8, 6, 3, 3))), to=model)


def test_a_layer_that_is_not_built_is_refused():
    with pytest.raises(NormError, match="must be built"):
        normkit.port(keras.layers.BatchNormalization(), to="torch")


def network():
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(3),
            normkit.keras.BatchNormalization(bessel=True),
        ]
    )


def data(samples=600):
    return (5 + 3 * np.random.default_rng(0).normal(size=(samples, 4))).astype("float32")


def test_recalibration_gives_population_statistics():
    model, x = network(), data()
    weights = [ops.convert_to_numpy(w.value) for w in model.trainable_weights]
    assert normkit.recalibrate(model, x) is model
    hidden = np.maximum(x.astype(np.float64) @ weights[0] + weights[1], 0)
    np.testing.assert_allclose(ops.convert_to_numpy(model.layers[1].moving_mean.value), hidden.mean(0), rtol=1e-4)
    np.testing.assert_allclose(ops.convert_to_numpy(model.layers[1].moving_variance.value), hidden.var(0), rtol=1e-4)
    # Below the first norm cuts matter (by 12 % where a ReLU is rarely open), since each batch is normalized by itself.
    # In one batch they do not: what is left of the variance is Bessel's factor and epsilon.
    normkit.recalibrate(model, [x])
    y, last = model.predict(x, verbose=0).astype(np.float64), model.layers[-1]
    kept = ops.convert_to_numpy(last.moving_variance.value).astype(np.float64)
    rounding = 100 * np.finfo(np.float32).eps  # TensorFlow, compiled, was off by 40
    np.testing.assert_allclose(y.mean(0), 0, atol=rounding)
    np.testing.assert_allclose(y.var(0), kept * (1 - 1 / len(x)) / (kept + last.epsilon), rtol=rounding)
    for before, weight in zip(weights, model.trainable_weights, strict=True):
        np.testing.assert_array_equal(before, ops.convert_to_numpy(weight.value))
    assert all("call" not in layer.__dict__ for layer in model.layers)


def test_an_interrupted_recalibration_changes_nothing():
    def broken():
        yield data(50)
        raise KeyboardInterrupt

    model = network()
    kept = [ops.convert_to_numpy(w.value) for w in model.weights]
    with pytest.raises(KeyboardInterrupt):
        normkit.recalibrate(model, broken())
    for before, weight in zip(kept, model.weights, strict=True):
        np.testing.assert_array_equal(before, ops.convert_to_numpy(weight.value))
    assert all("call" not in layer.__dict__ for layer in model.layers)


def test_frozen_layers_are_left_out():
    model = network()
    model.layers[1].trainable = False
    kept = ops.convert_to_numpy(model.layers[1].moving_mean.value)
    normkit.recalibrate(model, data())
    np.testing.assert_array_equal(kept, ops.convert_to_numpy(model.layers[1].moving_mean.value))
    model.layers[-1].trainable = False
    with pytest.raises(NormError, match="that are not frozen"):
        normkit.recalibrate(model, data())
