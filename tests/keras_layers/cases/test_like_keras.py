"""On the same weights and data our layers give what Keras' own give, on the active backend, in every option."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import normkit.keras as nk
from normkit.testing.keras import call_layer

STOCK = keras.layers
RNG = np.random.default_rng(1)
# Two float32 results of the same formula, each rounded some ten times, on values of order 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CLIPS = {"rmin": 0.4, "rmax": 1.5, "dmax": 0.3}

CASES = {
    "batch": ("BatchNormalization", {}, (8, 4, 3, 5)),
    "batch_rows": ("BatchNormalization", {"momentum": 0.9, "epsilon": 1e-5}, (16, 5)),
    "batch_axis_1": ("BatchNormalization", {"axis": 1}, (8, 5, 3)),
    "batch_axis_2": ("BatchNormalization", {"axis": 2, "momentum": 0.5}, (8, 3, 5, 2)),
    "batch_axis_0": ("BatchNormalization", {"axis": 0}, (5, 6)),
    "batch_no_center": ("BatchNormalization", {"center": False}, (8, 5)),
    "batch_no_scale": ("BatchNormalization", {"scale": False}, (8, 5)),
    "batch_one_value": ("BatchNormalization", {"momentum": 0.5}, (1, 5)),
    "batch_initializers": (
        "BatchNormalization",
        {"beta_initializer": "ones", "moving_mean_initializer": "ones", "moving_variance_initializer": "zeros"},
        (8, 5),
    ),
    "renorm": ("BatchNormalization", {"renorm": True, "momentum": 0.8, "renorm_momentum": 0.7}, (8, 3, 5)),
    "renorm_clipped": (
        "BatchNormalization",
        {"renorm": True, "renorm_momentum": 0.5, "renorm_clipping": CLIPS},
        (9, 5),
    ),
    "renorm_some_clips": ("BatchNormalization", {"renorm": True, "renorm_clipping": {"rmin": 0.9}}, (9, 5)),
    "renorm_plain": ("BatchNormalization", {"renorm": True, "scale": False, "center": False, "axis": 1}, (9, 5, 2)),
    "renorm_from_zero": ("BatchNormalization", {"renorm": True, "moving_variance_initializer": "zeros"}, (9, 5)),
    "layer": ("LayerNormalization", {}, (4, 3, 5)),
    "layer_axes": ("LayerNormalization", {"axis": [1, 2]}, (4, 3, 5)),
    "layer_axes_behind": ("LayerNormalization", {"axis": [-1, -2], "scale": False}, (4, 3, 5)),
    "layer_plain": ("LayerNormalization", {"center": False, "scale": False}, (4, 5)),
    "group": ("GroupNormalization", {"groups": 2}, (4, 3, 2, 6)),
    "group_axis_1": ("GroupNormalization", {"groups": 3, "axis": 1, "center": False}, (4, 6, 5)),
    "group_rows": ("GroupNormalization", {"groups": 1, "scale": False}, (4, 6)),
    "group_each": ("GroupNormalization", {"groups": -1}, (4, 5, 6)),
    "rms": ("RMSNormalization", {}, (4, 3, 5)),
    "rms_axes": ("RMSNormalization", {"axis": [1, 2], "epsilon": 1e-3}, (4, 3, 5)),
}
if keras.backend.backend() != "torch":  # where Keras' own fails
    CASES["layer_axis_1"] = ("LayerNormalization", {"axis": 1, "epsilon": 1e-5}, (4, 3, 5))


def pair(name: str, options: dict, shape: tuple):
    """Return our layer and Keras' own with the same random weights."""
    layers = [getattr(module, name)(**options) for module in (nk, STOCK)]
    for layer in layers:
        layer.build((None, *shape[1:]) if options.get("axis") != 0 else shape)
    for weight in layers[0].trainable_variables:
        weight.assign(RNG.uniform(0.5, 1.5, weight.shape))
    layers[1].set_weights(layers[0].get_weights())
    return layers


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_are_those_of_keras(case):
    name, options, shape = CASES[case]
    ours, theirs = pair(name, options, shape)
    assert [(w.name, w.shape, w.dtype) for w in ours.weights] == [(w.name, w.shape, w.dtype) for w in theirs.weights]
    training = {"training": True} if name == "BatchNormalization" else {}
    for _ in range(20):
        x = 2.0 * RNG.standard_normal(shape) + 1.0
        y, _ = call_layer(ours, x, **training)
        np.testing.assert_allclose(y, call_layer(theirs, x, **training)[0], **CLOSE)
    for one, other in zip(ours.weights, theirs.weights, strict=True):
        np.testing.assert_allclose(*(keras.ops.convert_to_numpy(w) for w in (one, other)), **CLOSE, err_msg=one.path)
    dy = RNG.standard_normal(shape)
    for mode in ({"training": True}, {"training": False}) if training else ({},):
        (y, found), (want, expected) = (call_layer(layer, x, dy, **mode) for layer in (ours, theirs))
        np.testing.assert_allclose(y, want, **CLOSE)
        assert found.keys() == expected.keys()
        for key, value in found.items():
            # Sums of some hundred products; without spread dx is a difference of numbers as large as 1/sqrt(epsilon).
            np.testing.assert_allclose(value, expected[key], rtol=1e-4, atol=5e-5, err_msg=f"d{key}")


def test_a_mask_gives_the_statistics_of_keras():
    ours, theirs = pair("BatchNormalization", {"momentum": 0.5}, (6, 7, 3))
    for _ in range(5):
        x, mask = RNG.standard_normal((6, 7, 3)), RNG.random((6, 7)) < 0.6
        y, _ = call_layer(ours, x, training=True, mask=mask)
        want, _ = call_layer(theirs, x, training=True, mask=mask)
        np.testing.assert_allclose(y[mask], want[mask], **CLOSE)
        assert np.all(y[~mask] == 0)
        assert np.any(want[~mask] != 0)  # Keras normalizes the padding as well
    for one, other in zip(ours.weights, theirs.weights, strict=True):
        np.testing.assert_allclose(*(keras.ops.convert_to_numpy(w) for w in (one, other)), **CLOSE)


@pytest.mark.parametrize("name", ["BatchNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization"])
def test_signatures_begin_as_those_of_keras(name):
    import inspect

    ours, theirs = (inspect.signature(getattr(module, name)) for module in (nk, STOCK))
    first = {k: p for k, p in ours.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    known = {k: p for k, p in theirs.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(first) == list(known)[: len(first)]
    assert [p.default for p in first.values()] == [p.default for p in known.values()][: len(first)]
    assert (
        getattr(nk, name)().get_config().items()
        >= {key: value for key, value in getattr(STOCK, name)().get_config().items() if key != "name"}.items()
    )
    assert issubclass(getattr(nk, name), getattr(STOCK, name))


def test_regularizers_and_constraints_act():
    layer = nk.BatchNormalization(gamma_regularizer="l2", beta_constraint="non_neg")
    layer.build((None, 4))
    assert float(keras.ops.convert_to_numpy(layer.losses[0])) == pytest.approx(0.04)
    assert type(layer.beta.constraint).__name__ == "NonNeg"


def test_without_training_nothing_moves():
    layer = nk.BatchNormalization()
    x = RNG.standard_normal((8, 4))
    call_layer(layer, x, training=False)
    call_layer(layer, x)
    layer.trainable = False
    y, _ = call_layer(layer, x, training=True)
    assert np.all(keras.ops.convert_to_numpy(layer.moving_mean) == 0)
    np.testing.assert_allclose(y, x / np.sqrt(1.001), **CLOSE)
