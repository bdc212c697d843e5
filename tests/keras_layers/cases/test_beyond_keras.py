"""What Keras' own layers get wrong and ours get right: each row of this table is a test below, which shows both.

The largest error of Keras 3.15's own layer against float64, on each backend. Ours is below 1e-5 in all of them.

| case | TensorFlow | JAX | PyTorch |
|---|---|---|---|
| BatchNormalization in training, mean/std 1e4 | 1e-2 | 1e-3 | NaN |
| BatchNormalization in evaluation, mean/std 1e4 | 5e-4 | 9e-4 | right |
| GroupNormalization, mean/std 1e4 | 2e-3 | 4e-3 | NaN |
| LayerNormalization, mean/std 1e4 | 1e-2 | 1e-2 | 9e-3 |
| LayerNormalization over axis=[-1, 1] | gamma in another order than the axes | the same | the same |
| LayerNormalization over axis=1 | right | right | error |
| RMSNormalization over axis=1 | error | error | error |
| a mask with axis=1 | error | error | error |
| a mask with one channel | right | error | error |
| NaN in masked positions | NaN comes out | the same | the same |
| a batch without real positions | moving variance decays to 0, outputs x/sqrt(epsilon) | the same | the same |
| dtype="float16", values of 600 | moving variance inf | the same | the same |
| dtype="bfloat16", momentum 0.999 | moving mean stops at 0.50 of 0.519 | the same | the same |
| a batch with NaN | moving statistics NaN for good | the same | the same |
"""

from __future__ import annotations

import keras
import numpy as np
import pytest

import normkit.keras as nk
from normkit.testing.keras import call_layer
from normkit.testing.precision import rounded

STOCK = keras.layers
BACKEND = keras.backend.backend()
RNG = np.random.default_rng(2)


def values(variable) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(variable), dtype=np.float64)


def normalized(x: np.ndarray, axes: tuple[int, ...], eps: float = 1e-3) -> np.ndarray:
    mean = x.mean(axes, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + eps)


def error(layer, x: np.ndarray, want: np.ndarray, **options) -> float:
    """Return the largest error of an output, infinity where it is not finite."""
    y, _ = call_layer(layer, x, **options)
    return float(np.max(np.abs(y - want))) if np.all(np.isfinite(y)) else np.inf


FAR = rounded(RNG.standard_normal((16, 8, 8, 6)) + 1e4, "float32")
LARGE_MEAN = {
    "BatchNormalization": ({}, {"training": True}, normalized(FAR, (0, 1, 2))),
    "GroupNormalization": ({"groups": 3}, {}, normalized(FAR.reshape(16, 8, 8, 3, 2), (1, 2, 4)).reshape(FAR.shape)),
    "LayerNormalization": ({}, {}, normalized(FAR, (3,))),
}


@pytest.mark.parametrize("name", LARGE_MEAN)
def test_large_mean(name):
    options, call, want = LARGE_MEAN[name]
    assert error(getattr(nk, name)(**options), FAR, want, **call) < 1e-5
    wrong = error(getattr(STOCK, name)(**options), FAR, want, **call)
    assert wrong == np.inf if BACKEND == "torch" and name != "LayerNormalization" else wrong > 3e-4


def test_large_mean_in_evaluation():
    want = (FAR - 1e4) / np.sqrt(1.001)
    found = {}
    for module in (nk, STOCK):
        layer = module.BatchNormalization()
        layer.build(FAR.shape)
        layer.moving_mean.assign(np.full(6, 1e4))
        found[module] = error(layer, FAR, want)
    assert found[nk] < 1e-5
    assert BACKEND == "torch" or found[STOCK] > 3e-4


def test_axes_counted_from_both_ends():
    x = RNG.standard_normal((4, 3, 5))
    gain = RNG.uniform(0.5, 1.5, (3, 5))
    for module, shape in ((nk, (3, 5)), (STOCK, (5, 3))):
        layer = module.LayerNormalization(axis=[-1, 1])
        layer.build(x.shape)
        assert layer.gamma.shape == shape
        layer.gamma.assign(gain if shape == (3, 5) else gain.T)
        wrong = error(layer, x, normalized(x, (1, 2)) * gain)
        assert wrong < 1e-5 if module is nk else wrong > 0.1


def test_an_axis_that_is_not_the_last():
    x = RNG.standard_normal((4, 3, 5))
    root = np.sqrt((x**2).mean(1, keepdims=True) + 1e-6)
    for name, want in (("LayerNormalization", normalized(x, (1,))), ("RMSNormalization", x / root)):
        assert error(getattr(nk, name)(axis=1), x, want) < 1e-5
        if BACKEND == "torch" or name == "RMSNormalization":
            with pytest.raises(Exception, match=rf"{name}.call|[Ss]hape"):
                call_layer(getattr(STOCK, name)(axis=1), x)


MASK = RNG.random((6, 7)) < 0.6


def masked(x: np.ndarray) -> np.ndarray:
    """Return what masked batch norm of (batch, time, channels) is, in float64."""
    want = np.zeros(x.shape)
    for channel in range(x.shape[-1]):
        real = x[..., channel][MASK]
        want[..., channel][MASK] = (real - real.mean()) / np.sqrt(real.var() + 1e-3)
    return want


def test_a_mask_with_channels_first():
    x = RNG.standard_normal((6, 7, 3))
    first, want = np.moveaxis(x, -1, 1), np.moveaxis(masked(x), -1, 1)
    assert error(nk.BatchNormalization(axis=1), first, want, training=True, mask=MASK) < 1e-5
    with pytest.raises(Exception, match=r"BatchNormalization.call"):
        call_layer(STOCK.BatchNormalization(axis=1), first, training=True, mask=MASK)


def test_a_mask_with_one_channel():
    x = RNG.standard_normal((6, 7, 1))
    assert error(nk.BatchNormalization(), x, masked(x), training=True, mask=MASK) < 1e-5
    if BACKEND != "tensorflow":
        with pytest.raises(IndexError):
            call_layer(STOCK.BatchNormalization(), x, training=True, mask=MASK)


def test_nan_in_the_padding():
    x = RNG.standard_normal((6, 7, 3))
    want, garbage = masked(x), np.where(MASK[..., None], x, np.nan)
    dy = np.where(MASK[..., None], RNG.standard_normal(x.shape), np.nan)
    y, found = call_layer(nk.BatchNormalization(), garbage, dy, training=True, mask=MASK)
    assert np.max(np.abs(y - want)) < 1e-5
    assert np.all(found["x"][~MASK] == 0)
    assert all(np.all(np.isfinite(value)) for value in found.values())
    assert error(STOCK.BatchNormalization(), garbage, want, training=True, mask=MASK) == np.inf


def test_a_batch_without_real_positions():
    x = RNG.standard_normal((6, 7, 3))
    ours, theirs = nk.BatchNormalization(momentum=0.5), STOCK.BatchNormalization(momentum=0.5)
    assert error(ours, x, np.zeros(x.shape), training=True, mask=np.zeros_like(MASK)) == 0
    assert error(theirs, x, np.zeros(x.shape), training=True, mask=np.zeros_like(MASK)) > 10
    assert np.all(values(ours.moving_variance) == 1)
    assert np.all(values(theirs.moving_variance) == 0.5)


def test_moving_variance_in_half_precision():
    x = rounded(600 * RNG.standard_normal((64, 4)), "float16")
    want = 0.5 + 0.5 * x.var(0)
    for module in (nk, STOCK):
        layer = module.BatchNormalization(momentum=0.5, dtype="float16")
        call_layer(layer, x, dtype="float16", training=True)
        kept = values(layer.moving_variance)
        if module is nk:
            np.testing.assert_allclose(kept, want, rtol=1e-6)
        else:
            assert np.all(np.isinf(kept))


def test_a_moving_mean_in_half_precision_stops():
    x, steps, momentum = np.full((4, 2), 2.0), 600, 0.999
    for module in (nk, STOCK):
        layer = module.BatchNormalization(momentum=momentum, dtype="bfloat16")
        layer.build(x.shape)
        layer.moving_mean.assign(np.full(2, 2.0 * (1 - momentum ** (steps / 2))))
        for _ in range(20):  # the last of them
            call_layer(layer, x, dtype="bfloat16", training=True)
        start = 2.0 * (1 - momentum ** (steps / 2))
        want = 2.0 + momentum**20 * (start - 2.0)
        kept = values(layer.moving_mean)
        if module is nk:
            np.testing.assert_allclose(kept, want, rtol=1e-6)
        else:
            assert np.all(kept < want - 0.01)  # where it was: a step is below half a unit in the last place


def test_a_batch_with_nan():
    x = RNG.standard_normal((8, 3))
    bad = x.copy()
    bad[2, 1] = np.nan
    ours, theirs = nk.BatchNormalization(momentum=0.5), STOCK.BatchNormalization(momentum=0.5)
    for layer in (ours, theirs):
        y, _ = call_layer(layer, bad, training=True)
        assert not np.all(np.isfinite(y))  # a loss scaler must see it
        call_layer(layer, x, training=True)
    np.testing.assert_allclose(values(ours.moving_mean), 0.5 * x.mean(0), atol=1e-6)
    assert np.isnan(values(theirs.moving_mean)[1])
    update = nk.BatchNormalization(momentum=0.5, nonfinite="update")
    call_layer(update, bad, training=True)
    assert np.isnan(values(update.moving_mean)[1])
