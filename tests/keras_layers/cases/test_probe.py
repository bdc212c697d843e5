"""The probe sees what Keras' layers call as activations, says where and beside which norm, and changes nothing."""

from __future__ import annotations

import math
import random

import keras
import numpy as np
import pytest
from keras import ops

from normkit import keras as nk
from normkit.errors import NormTypeError, NormValueError
from normkit.keras.factory import norm_factory
from normkit.keras.probe import probe

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 8)).astype(np.float32) * 3
IMAGES = RNG.normal(size=(6, 5, 5, 3)).astype(np.float32)
SEQUENCES = RNG.normal(size=(4, 8, 8)).astype(np.float32)


def model(*layers, like=X):
    return keras.Sequential([keras.Input(like.shape[1:]), *layers])


def array(x):
    return np.array(ops.convert_to_numpy(x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


erf = np.vectorize(math.erf)
L = keras.layers
FORMS = {
    "relu": (lambda: L.ReLU(), "relu", lambda x: np.maximum(x, 0)),
    "relu by name": (lambda: L.Activation("relu"), "relu", lambda x: np.maximum(x, 0)),
    "leaky_relu": (lambda: L.LeakyReLU(0.2), "leaky_relu", lambda x: np.where(x > 0, x, 0.2 * x)),
    "elu": (lambda: L.ELU(), "elu", lambda x: np.where(x > 0, x, np.expm1(x))),
    "prelu": (lambda: L.PReLU(), "prelu", lambda x: np.maximum(x, 0)),
    "tanh": (lambda: L.Activation(ops.tanh), "tanh", np.tanh),
    "gelu": (lambda: L.Activation("gelu"), "gelu", lambda x: x * (1 + erf(x / 2**0.5)) / 2),
    "silu": (lambda: L.Activation("silu"), "silu", lambda x: x * sigmoid(x)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_layer_that_activates_is_seen_with_its_values(form):
    make, name, expected = FORMS[form]
    (site,) = probe(model(make()), X)
    assert site.activation == name
    np.testing.assert_array_equal(site.input, X)
    np.testing.assert_allclose(site.output, expected(X.astype(np.float64)), atol=3e-6)
    assert (site.gamma, site.beta, site.axis) == (None, None, 1)


def test_the_activation_inside_a_layer_is_seen_between_its_parts():
    made = model(L.Conv2D(4, 3, activation="relu"), L.Flatten(), L.Dense(5, activation=L.ReLU()), like=IMAGES)
    first, second = probe(made, IMAGES)
    kernel, bias = (array(weight) for weight in made.layers[0].weights)
    expected = (
        sum(IMAGES[:, i : i + 3, j : j + 3].astype(np.float64) @ kernel[i, j] for i in range(3) for j in range(3))
        + bias
    )
    np.testing.assert_allclose(first.input, expected, atol=1e-5)
    np.testing.assert_allclose(first.output, np.maximum(expected, 0), atol=1e-5)
    assert (first.name, first.activation, first.axis) == ("conv2d", "relu", -1)
    assert (second.name, second.activation, second.axis) == ("dense/re_lu", "relu", 1)


def test_softmax_linear_and_recurrent_layers_are_left_out():
    made = model(
        L.LSTM(4), L.Dense(4, activation="linear"), L.Dense(3, activation="softmax"), L.Softmax(), like=SEQUENCES
    )
    assert probe(made, SEQUENCES) == []


class Twice(keras.Model):
    """Calls a layer twice, has layers in a list and no argument `training`."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.rest = L.Dense(8), L.ReLU(), [L.Dense(8, "gelu"), L.Dense(8, "tanh", name="mine")]

    def call(self, x):
        x = self.act(self.act(self.first(x)))
        return self.rest[1](self.rest[0](x))


def test_names_are_paths_inside_the_model_that_other_models_do_not_change():
    for _ in range(2):
        made = Twice()
        made(X)
        assert [(site.name, site.activation) for site in probe(made, X)] == [
            ("re_lu 1", "relu"),
            ("re_lu 2", "relu"),
            ("dense_1", "gelu"),
            ("mine", "tanh"),
        ]
        nested = model(L.Dense(8), keras.Sequential([L.Dense(8), L.ReLU()]), L.ReLU())
        assert [site.name for site in probe(nested, X)] == ["sequential/re_lu", "re_lu_1"]


def marked(norm):
    """The norm with parameters that can be told from the first ones."""
    norm.build((None, 8))
    gamma = norm.gamma if hasattr(norm, "gamma") else norm.scale
    gamma.assign(np.arange(8, dtype=np.float32))
    if getattr(norm, "beta", None) is not None:
        norm.beta.assign(np.full(8, 0.5, np.float32))
    return norm


NORMS = {
    "keras": lambda: L.BatchNormalization(),
    "layer": lambda: L.LayerNormalization(),
    "rms": lambda: L.RMSNormalization(),
    "group": lambda: nk.GroupNormalization(2),
    "renorm": lambda: nk.BatchRenormalization(),
    "factory": lambda: norm_factory("batch", "before", None)(),
}


@pytest.mark.parametrize("norm", NORMS)
def test_gamma_and_beta_of_the_norm_beside_it(norm):
    for turn in (1, -1):
        layers = [marked(NORMS[norm]()), L.ReLU()][::turn]
        (site,) = probe(model(*layers), X)
        np.testing.assert_array_equal(site.gamma, np.arange(8))
        assert (site.beta is None) == (norm == "rms")
        assert site.beta is None or (site.beta == 0.5).all()


def test_gamma_of_the_norm_before_wins():
    (site,) = probe(model(marked(L.RMSNormalization()), L.ReLU(), L.LayerNormalization()), X)
    np.testing.assert_array_equal(site.gamma, np.arange(8))


def test_a_norm_behind_a_sum_does_not_feed_the_activation():
    x = keras.Input((8,))
    (site,) = probe(keras.Model(x, L.ReLU()(L.BatchNormalization()(x) + x)), X)
    assert site.gamma is None


AXES = {
    "conv": ([L.Conv1D(6, 3), L.ReLU()], SEQUENCES, -1),
    "second": ([L.Conv1D(6, 3), nk.BatchNormalization(1), L.ReLU()], SEQUENCES, 1),
    "our norm": ([norm_factory("batch", "before", None)(8, "relu", axis=1)], SEQUENCES, 1),
    "nothing before": ([L.ReLU()], SEQUENCES, -1),
    "images": ([L.Conv2D(4, 1), L.MaxPooling2D(2), L.ReLU()], IMAGES, -1),
}


@pytest.mark.parametrize("case", AXES)
def test_axis_of_the_channels(case):
    layers, x, axis = AXES[case]
    assert [site.axis for site in probe(model(*layers, like=x), x)] == [axis]


@keras.saving.register_keras_serializable()
class Draws(keras.layers.Layer):
    """Draws from the generators of Python and NumPy, and raises on request."""

    fails = False

    def call(self, x):
        if self.fails:
            raise RuntimeError("no more")
        return x + random.random() + np.random.rand()  # noqa: NPY002


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_nothing_changes(train, fails):
    draws = Draws()
    made = model(nk.BatchNormalization(momentum=None), L.Dropout(0.5), L.Dense(8, "relu"), draws)
    draws.fails = fails
    before = [array(variable) for variable in made.variables]
    held = [(vars(layer).get("call"), vars(layer).get("activation")) for layer in made.layers]
    states = random.getstate(), str(np.random.get_state())  # noqa: NPY002
    if fails:
        with pytest.raises(RuntimeError, match=r"^no more$"):
            probe(made, X, train=train)
    else:
        assert len(probe(made, X, train=train)) == 1
    for variable, value in zip(made.variables, before, strict=True):
        np.testing.assert_array_equal(array(variable), value)
    assert [(vars(layer).get("call"), vars(layer).get("activation")) for layer in made.layers] == held
    assert (random.getstate(), str(np.random.get_state())) == states  # noqa: NPY002
    assert keras.config.is_traceback_filtering_enabled()


def test_training_and_inference_are_told_apart():
    made = model(nk.BatchNormalization(), L.ReLU())
    (trained,), (inferred,) = (probe(made, X + 5, train=train) for train in (True, False))
    assert abs(trained.input.mean()) < 1e-6
    np.testing.assert_allclose(inferred.input, (X + 5) / np.sqrt(1.001), rtol=1e-4)


def test_inputs_and_models_that_cannot_be_used():
    with pytest.raises(NormValueError, match=r"a model must be built, .*begin it with keras\.Input, or call"):
        probe(keras.Sequential([L.Dense(3), L.ReLU()]), X)
    with pytest.raises(NormTypeError, match="arrays must hold numbers; got dtype <U1"):
        probe(model(L.ReLU()), np.array(["a"]))
    a, b = keras.Input((8,)), keras.Input((8,))
    pair = keras.Model([a, b], L.ReLU()(a + b))
    (site,) = probe(pair, (X, ops.convert_to_tensor(X)))
    np.testing.assert_array_equal(site.input, 2 * X)
