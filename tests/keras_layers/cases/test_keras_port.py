"""Norm layers from PyTorch to Keras and back, and recalibration, on the backend that is active."""

import keras
import numpy as np
import pytest
import torch
from keras import ops
from trained_layers import LAYERS, moved, named, trained

import normkit
import normkit.keras as ours
import normkit.torch
from normkit.core.schedule import RenormSchedule
from normkit.errors import NormError
from normkit.keras.porting import read


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
    model = keras.Sequential([keras.Input(shape[1:]), keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-3)])
    normkit.port(torch.nn.Sequential(layer), to=model)
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    expected = layer(torch.from_numpy(np.moveaxis(x, -1, 1))).detach().numpy()
    np.testing.assert_allclose(model.predict(x, verbose=0), np.moveaxis(expected, 1, -1), rtol=1e-5, atol=1e-5)
    with pytest.raises(NormError, match="same eps"):
        normkit.port(torch.nn.Sequential(trained(torch.nn.BatchNorm2d(6), (8, 6, 3, 3))), to=model)


def test_layers_that_are_not_built_are_refused():
    for model in (keras.layers.BatchNormalization(), keras.Sequential([keras.layers.BatchNormalization()])):
        with pytest.raises(NormError, match="must be built"):
            normkit.port(model, to="torch")


@pytest.mark.parametrize(
    "kind",
    [
        ours.EvoNormB0,
        ours.EvoNormS0,
        ours.FilterResponseNormalization,
        ours.DynamicTanh,
        ours.GlobalResponseNormalization,
    ],
)
def test_a_norm_without_counterpart_is_named(kind):
    model = keras.Sequential([keras.Input((4, 32)), keras.layers.BatchNormalization(), kind(name="alone")])
    with pytest.raises(NormError, match=f"alone must have a counterpart.*got {kind.__name__}"):
        normkit.port(model, to="torch")


class Twins(keras.Model):
    """Keras gives both layers one path."""

    def __init__(self):
        super().__init__(name="twins")
        self.first, self.second = (keras.layers.BatchNormalization(name="bn") for _ in range(2))

    def call(self, x):
        return self.second(self.first(x))


def test_layers_of_one_path_are_refused_in_a_dictionary_and_received_in_their_order():
    model, receiver = Twins(), torch.nn.Sequential(*(torch.nn.BatchNorm1d(3, 1e-3, 0.01) for _ in range(2)))
    model(np.ones((2, 3), "float32"))
    with pytest.raises(NormError, match=r"several at twins/bn.*different names"):
        normkit.port(model, to="torch")
    model.second.beta.assign([1.0, 2.0, 3.0])
    normkit.port(model, to=receiver)
    np.testing.assert_array_equal(receiver[1].bias.detach(), [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (torch.nn.BatchNorm1d(3, track_running_stats=False), "must keep statistics to be ported"),
        (torch.nn.InstanceNorm1d(3, track_running_stats=True), "must not keep statistics to be ported"),
    ],
    ids=named,
)
def test_what_keras_has_no_place_for(layer, said):
    with pytest.raises(NormError, match=said):
        normkit.port(layer, to="keras")


def built(layer, shape):
    """The layer with gamma and beta that are not their first values, as far as it has them."""
    layer.build(shape)
    for weight in layer.trainable_weights:
        weight.assign(np.linspace(0.5, 1.5, weight.shape[0]))
    return layer


@pytest.mark.parametrize("options", [{"scale": False}, {"center": False}, {"scale": False, "center": False}])
@pytest.mark.parametrize(("kind", "first"), [("GroupNormalization", (2,)), ("LayerNormalization", ())])
def test_layers_without_gamma_or_beta(kind, first, options):
    layer = built(getattr(keras.layers, kind)(*first, **options), (2, 4))
    x = np.random.default_rng(0).normal(2, 3, (2, 4)).astype("float32")
    there = normkit.port(layer, to="torch")(torch.from_numpy(x)).detach()
    np.testing.assert_allclose(there, ops.convert_to_numpy(layer(x)), rtol=1e-5, atol=1e-5)


def test_the_gain_of_gemma_is_translated():
    layer = normkit.torch.RMSNorm(6, eps=1e-6, gain="1+w")
    torch.nn.init.uniform_(layer.weight, -0.5, 0.5)
    x = 3 * torch.randn(4, 6)
    there = normkit.port(layer, to="keras")
    np.testing.assert_allclose(ops.convert_to_numpy(there(x.numpy())), layer(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*rms_scaling")
def test_rms_scaling_is_refused():
    try:
        layer = built(keras.layers.LayerNormalization(rms_scaling=True), (2, 4))
    except (TypeError, ValueError):
        pytest.skip("this Keras has no rms_scaling")
    with pytest.raises(NormError, match="must not have `rms_scaling`"):
        normkit.port(layer, to="torch")


def test_a_kept_deviation_stays_one():
    layer = normkit.torch.BatchRenorm1d(2, eps=1e-3)
    layer.running_std.fill_(0.01)
    there = normkit.port(layer, to="keras")
    np.testing.assert_array_equal(ops.convert_to_numpy(there.moving_variance.value), 0.0)
    for kept in (there.moving_stddev, there.renorm_stddev):
        np.testing.assert_array_equal(ops.convert_to_numpy(kept.value), np.float32(0.01))


CLIPPED = {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}


@pytest.mark.parametrize(
    ("layer", "to"),
    [
        (ours.BatchNormalization(debiased=True, nonfinite="update", bessel=True), ("keras", "nnx")),
        (ours.GhostBatchNormalization(virtual_batch_size=4, momentum=0.9), ("keras", "nnx", "torch")),
        (ours.BatchNormalization(momentum=None), ("keras", "nnx", "torch")),
        (ours.BatchRenormalization(renorm_schedule=RenormSchedule.for_steps(100)), ("keras", "nnx", "torch")),
        (keras.layers.BatchNormalization(renorm=True, renorm_clipping=CLIPPED), ("keras",)),
        (keras.layers.BatchNormalization(renorm=True), ("keras",)),
        (ours.GroupNormalization(2), ("nnx",)),  # Keras' own is off by 1e-5: E[x^2] - E[x]^2
        (keras.layers.LayerNormalization(), ("nnx",)),
        (keras.layers.RMSNormalization(), ("nnx",)),
    ],
    ids=named,
)
def test_through_another_framework_and_back(layer, to):
    if "nnx" in to:
        pytest.importorskip("flax")
    x = np.random.default_rng(0).normal(2, 3, (8, 4)).astype("float32")
    built(layer, x.shape)
    learns = isinstance(layer, keras.layers.BatchNormalization)
    if learns:
        layer(x, training=True)
    expected, mine = ops.convert_to_numpy(layer(x)), read(layer)
    for framework in to:
        there = normkit.port(layer, to=framework)
        if framework != "keras" and learns:
            there.eval()
        if framework == "nnx":
            np.testing.assert_allclose(there(x), expected, rtol=1e-5, atol=1e-5)
        back = normkit.port(there, to="keras")
        np.testing.assert_allclose(ops.convert_to_numpy(back(x)), expected, rtol=1e-5, atol=1e-5)
        again = read(back)
        assert again.rate == pytest.approx(mine.rate) if mine.rate else again.rate is None
        for name in ("kind", "shape", "groups", "virtual_batch_size", "debiased", "nonfinite", "clips", "count"):
            assert getattr(again, name) == getattr(mine, name), (framework, name)


def test_clips_of_keras_elsewhere():
    clipped, free = (keras.layers.BatchNormalization(renorm=True, renorm_clipping=clips) for clips in (CLIPPED, None))
    for layer in (clipped, free):
        layer.build((None, 3))
    assert normkit.port(clipped, to="torch").clips() == (3.0, 5.0)
    with pytest.raises(NormError, match="must be a schedule, or have"):
        normkit.port(free, to="torch")


def network():
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(3),
            ours.BatchNormalization(bessel=True),
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
