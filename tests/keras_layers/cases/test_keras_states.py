"""Recalibrating, freezing and grouping, on the backend that is active."""

import keras
import numpy as np
import pytest
from keras import ops

import normkit
from normkit.errors import NormError
from normkit.keras import BatchNormalization, BatchRenormalization

KINDS = {"keras": keras.layers.BatchNormalization, "renorm": BatchRenormalization}


def network(kind=keras.layers.BatchNormalization):
    """A nested model: a backbone and a head."""
    keras.utils.set_random_seed(0)
    inner = [keras.Input((4,)), keras.layers.Dense(5), kind(), keras.layers.ReLU(), keras.layers.Dropout(0.5)]
    backbone = keras.Sequential(inner, name="backbone")
    inputs = keras.Input((4,))
    outputs = kind()(keras.layers.Dense(3)(backbone(inputs)))
    return keras.Model(inputs, outputs), backbone


def data(samples=200):
    return (5 + 3 * np.random.default_rng(0).normal(size=(samples, 4))).astype("float32")


def values(variables):
    return [np.array(ops.convert_to_numpy(v.value)) for v in variables]


def equal(one, other):
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_exact_recalibration_is_one_giant_batch_however_it_is_cut(kind):
    (model, backbone), x = network(kind), data()
    rest = values(model.trainable_variables)
    normkit.recalibrate(model, [x[:1], x[100:], x[1:100]], exact=True)
    hidden = x.astype(np.float64) @ rest[0] + rest[1]
    layer = backbone.layers[1]
    # float32 sums of 4 terms
    np.testing.assert_allclose(ops.convert_to_numpy(layer.moving_mean.value), hidden.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ops.convert_to_numpy(layer.moving_variance.value), hidden.var(0), rtol=1e-5)
    y = ops.convert_to_numpy(model(x, training=False))
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
    spread = values([model.layers[-1].moving_variance])[0]
    np.testing.assert_allclose(y.var(0), spread / (spread + 1e-3), rtol=1e-4)
    assert equal(values(model.trainable_variables), rest)


@pytest.mark.skipif(keras.config.backend() == "jax", reason="JAX has float64 only where it is enabled")
def test_a_model_in_float64_is_measured_in_float64():
    model = keras.Sequential([keras.Input((2,), dtype="float64"), BatchNormalization(dtype="float64")])
    x = 1e4 + 1e-4 * np.random.default_rng(0).normal(size=(200, 2))  # the same number 1e4 in float32
    normkit.recalibrate(model, x)
    np.testing.assert_allclose(values([model.layers[0].moving_variance])[0], x.var(0), rtol=1e-9)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="tf.function")
def test_a_model_whose_calls_cannot_be_seen_is_refused():
    import tensorflow as tf

    class Compiled(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = BatchNormalization()

        @tf.function
        def call(self, x):
            return self.norm(x)

    model = Compiled()
    model(data())
    with pytest.raises(NormError, match=r"must call its norm layers .* \(tf.function\) is not seen"):
        normkit.recalibrate(model, data())


def test_the_report_undoes_and_the_best_is_kept():
    (model, _), x = network(), data()
    normkit.recalibrate(model, x)
    before, y = values(model.variables), ops.convert_to_numpy(model(x, training=False))

    def loss(outputs, targets):
        return ops.mean(ops.square(outputs - targets))

    arguments = {"held_out": (x, y), "loss": loss, "return_report": True}
    _, report = normkit.recalibrate(model, 10 * x, **arguments)
    assert (report.before, report.kept) == (pytest.approx(0, abs=1e-9), "new")
    report.undo()
    assert equal(values(model.variables), before)
    _, report = normkit.recalibrate(model, 10 * x, keep="best", **arguments)
    assert (report.kept, equal(values(model.variables), before)) == ("old", True)


def test_masked_positions_do_not_count():
    x, layer = data(60).reshape(20, 3, 4), BatchNormalization()
    mask = np.arange(3) < np.random.default_rng(1).integers(1, 4, size=(20, 1))
    inputs = keras.Input((3, 4)), keras.Input((3,), dtype="bool")
    model = keras.Model(inputs, layer(inputs[0], mask=inputs[1]))
    normkit.recalibrate(model, [((x, mask),)])
    np.testing.assert_allclose(values([layer.moving_mean])[0], x[mask].mean(0), rtol=1e-5)


def test_ten_steps_of_training_move_nothing():
    (model, backbone), x = network(), data(32)
    expected = ops.convert_to_numpy(model(x, training=False))
    assert normkit.freeze(backbone) is backbone
    frozen = backbone.layers[1]
    before, dense = values(frozen.variables), values(backbone.layers[0].variables)
    np.testing.assert_array_equal(ops.convert_to_numpy(model(x, training=False)), expected)
    model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.1), "mse")
    model.fit(x, np.zeros((32, 3), "float32"), batch_size=16, epochs=5, verbose=0)
    assert equal(values(frozen.variables), before)
    assert not equal(values(backbone.layers[0].variables), dense)
    assert model.layers[-1].trainable
    normkit.unfreeze(model)
    model.compile("sgd", "mse")
    model.fit(x, np.zeros((32, 3), "float32"), verbose=0)
    assert not equal(values(frozen.variables), before)


def test_unfreezing_restores_what_was_and_affine_alone_is_refused():
    model, backbone = network()
    backbone.layers[1].trainable = False
    normkit.freeze(normkit.freeze(model))
    assert not model.layers[-1].trainable
    normkit.unfreeze(model)
    assert (backbone.layers[1].trainable, model.layers[-1].trainable) == (False, True)
    with pytest.raises(NormError, match="`affine` must be True in Keras"):
        normkit.freeze(model, affine=False)


@pytest.mark.parametrize("biases", [False, True])
def test_variables_without_weight_decay(biases):
    model, backbone = network()
    decayed, kept = normkit.param_groups(model, 0.5, biases=biases)
    assert {id(v) for v in decayed["params"] + kept["params"]} == {id(v) for v in model.trainable_variables}
    dense = [backbone.layers[0], model.layers[-2]]
    expected = {id(layer.kernel) for layer in dense} | ({id(layer.bias) for layer in dense} if biases else set())
    assert {id(v) for v in decayed["params"]} == expected
    optimizer = keras.optimizers.SGD(0.0, weight_decay=decayed["weight_decay"])
    optimizer.exclude_from_weight_decay(var_list=kept["params"])
    with pytest.raises(NormError, match="a model must be built"):
        normkit.param_groups(keras.Sequential([keras.layers.Dense(3)]), 0.5)


def test_another_domain():
    """BN(W (a x + b)) = BN(W x) up to eps, half way with as many samples of the old one."""
    (model, backbone), x = network(), data()
    normkit.recalibrate(model, x, exact=True)
    there, (mean,) = ops.convert_to_numpy(model(x, training=False)), values([backbone.layers[1].moving_mean])
    _, report = normkit.adapt(model, 2 * x + 3, exact=True, return_report=True)
    # eps is 1e-3 in Keras.
    np.testing.assert_allclose(ops.convert_to_numpy(model(2 * x + 3, training=False)), there, atol=1e-2)
    (new,) = values([backbone.layers[1].moving_mean])
    report.undo()
    normkit.adapt(model, 2 * x + 3, prior=len(x))
    np.testing.assert_allclose(values([backbone.layers[1].moving_mean])[0], (mean + new) / 2, rtol=1e-5)
    with pytest.raises(NormError, match='`method="entropy"` is available for PyTorch; got keras'):
        normkit.adapt(model, x, method="entropy")
