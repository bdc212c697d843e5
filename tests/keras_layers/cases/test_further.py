"""Filter response norm, EvoNorm, dynamic tanh and global response norm against loops in float64, and their papers."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from directional import assert_gradients

import normkit.keras as nk
from normkit.errors import NormValueError
from normkit.testing.keras import call_layer
from normkit.testing.precision import rounded, tolerance

BACKEND = keras.backend.backend()
SHAPE = (3, 4, 2, 6)
RNG = np.random.default_rng(11)
X = rounded(RNG.standard_normal(SHAPE) + 0.5, "float32")
SINGLE = X.astype("float32")
DY = rounded(RNG.standard_normal(SHAPE), "float32")
MASK = RNG.random(SHAPE[:-1]) < 0.6
MASK[:, 0] = True  # every sample has a real position


def values(variable) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(variable), dtype=np.float64)


def variance(some: np.ndarray) -> float:
    return sum((value - sum(some) / len(some)) ** 2 for value in some) / len(some)


def frn(at, mask, eps=1e-6):
    y = np.zeros(at["x"].shape)
    for n, c in np.ndindex(y.shape[0], y.shape[-1]):
        root = np.sqrt(np.mean([value**2 for value in at["x"][n, ..., c][mask[n]]]) + eps)
        straight = at["gamma"][c] * at["x"][n, ..., c] / root + at["beta"][c]
        y[n, ..., c] = np.maximum(straight, at["tau"][c]) * mask[n]
    return y


def learned_frn(at, mask):
    return frn(at, mask, 1e-6 + abs(at["learned_epsilon"]))


def evonorm_b0(at, mask, eps=1e-5):
    y, x = np.zeros(at["x"].shape), at["x"]
    for n, c in np.ndindex(x.shape[0], x.shape[-1]):
        batch, alone = variance(x[..., c][mask]), variance(x[n, ..., c][mask[n]])
        divisor = np.maximum(np.sqrt(batch + eps), at["v"][c] * x[n, ..., c] + np.sqrt(alone + eps))
        y[n, ..., c] = (x[n, ..., c] / divisor * at["gamma"][c] + at["beta"][c]) * mask[n]
    return y


def evonorm_s0(at, mask, groups=2, eps=1e-5):
    y, x = np.zeros(at["x"].shape), at["x"]
    size = x.shape[-1] // groups
    for n, c in np.ndindex(x.shape[0], x.shape[-1]):
        first = c // size * size
        root = np.sqrt(variance(x[n, ..., first : first + size][mask[n]].ravel()) + eps)
        swish = x[n, ..., c] * np.exp(-np.logaddexp(0, -at["v"][c] * x[n, ..., c]))
        y[n, ..., c] = (at["gamma"][c] * swish / root + at["beta"][c]) * mask[n]
    return y


def dynamic_tanh(at, mask):
    assert mask.all()
    return at["gamma"] * np.tanh(at["alpha"] * at["x"]) + at["beta"]


def grn(at, mask, eps=1e-6):
    y, x = np.zeros(at["x"].shape), at["x"]
    for n in range(len(x)):
        norms = [np.sqrt(np.sum(x[n, ..., c][mask[n]] ** 2)) for c in range(x.shape[-1])]
        for c, norm in enumerate(norms):
            response = norm / (sum(norms) / len(norms) + eps)
            y[n, ..., c] = (at["gamma"][c] * x[n, ..., c] * response + at["beta"][c] + x[n, ..., c]) * mask[n]
    return y


LAYERS = {
    "frn": (nk.FilterResponseNormalization, {}, frn),
    "learned_frn": (nk.FilterResponseNormalization, {"learn_epsilon": True}, learned_frn),
    "evonorm_b0": (nk.EvoNormB0, {"momentum": 0.5}, evonorm_b0),
    "evonorm_s0": (nk.EvoNormS0, {"groups": 2}, evonorm_s0),
    "dynamic_tanh": (nk.DynamicTanh, {}, dynamic_tanh),
    "grn": (nk.GlobalResponseNormalization, {}, grn),
}
SOME = ("evonorm_b0", "frn") if BACKEND == "jax" else tuple(LAYERS)  # JAX compiles each anew
STATISTICS = ("frn", "evonorm_b0", "evonorm_s0", "grn")


def made(name: str, **options):
    """Return a layer with weights unlike their first values, and these."""
    make, known, _ = LAYERS[name]
    layer = make(**known, **options)
    axis = layer.axis % len(SHAPE)
    layer.build(np.moveaxis(X, -1, axis).shape)
    rng = np.random.default_rng(1)
    for weight in layer.trainable_variables:
        weight.assign(rng.uniform(0.3, 1.2, weight.shape) * (-1 if weight.name == "learned_epsilon" else 1))
    return layer, {weight.name: values(weight) for weight in layer.trainable_variables}


def training(name: str) -> dict[str, bool]:
    return {"training": True} if name == "evonorm_b0" else {}


def allowed(y: np.ndarray) -> float:
    return tolerance(np.abs(y).max(), output="float32", accumulator="float32", condition=1.0)


@pytest.mark.parametrize(("name", "masked"), [*((name, False) for name in LAYERS), *((n, True) for n in STATISTICS)])
def test_against_loops(name, masked):
    layer, weights = made(name)
    mask = MASK if masked else np.ones_like(MASK)
    at = {"x": X, **weights}
    y, found = call_layer(layer, X, DY, **training(name), **({"mask": MASK} if masked else {}))
    want = LAYERS[name][2](at, mask)
    np.testing.assert_allclose(y, want, rtol=0, atol=allowed(want))
    assert_gradients(lambda at: LAYERS[name][2](at, mask), at, DY, found)
    assert np.all(found["x"][~mask] == 0)


@pytest.mark.parametrize("name", SOME)
def test_channels_on_axis_1(name):
    """Only proportions of weights count, so one weight for all changes nothing."""
    layer, weights = made(name, axis=1)
    weight = {} if name == "dynamic_tanh" else {"sample_weight": np.full(3, 2.0)}
    y, _ = call_layer(layer, np.moveaxis(X, -1, 1), **training(name), **weight)
    want = np.moveaxis(LAYERS[name][2]({"x": X, **weights}, np.ones_like(MASK)), -1, 1)
    np.testing.assert_allclose(y, want, rtol=0, atol=allowed(want))


@pytest.mark.parametrize("name", ["evonorm_b0", "evonorm_s0"])
def test_a_mean_of_1e4_deviations(name):
    """To a few roundings of an output of 1e4: E[x^2] - E[x]^2 in float32 is off by 8 times the variance itself."""
    layer, weights = made(name)
    x = rounded(X + 1e4, "float32")
    want = LAYERS[name][2]({"x": x, **weights}, np.ones_like(MASK))
    y, _ = call_layer(layer, x, **training(name))
    np.testing.assert_allclose(y, want, rtol=1e-6)


@pytest.mark.parametrize("name", SOME)
def test_zeros_and_half_precision(name):
    """Zeros, and in another channel squares that float16 cannot hold, come out finite, in the type of the inputs."""
    layer, weights = made(name, dtype="mixed_float16")
    x = rounded(X * [0, 600, 1, 1, 1, 1], "float16")
    y, found = call_layer(layer, x, DY, dtype="float16", **training(name))
    want = LAYERS[name][2]({"x": x, **weights}, np.ones_like(MASK))
    np.testing.assert_allclose(y, want, atol=tolerance(np.abs(want).max(), output="float16", accumulator="float32"))
    assert all(np.all(np.isfinite(gradient)) for gradient in found.values())
    assert {keras.backend.standardize_dtype(weight.dtype) for weight in layer.weights} == {"float32"}


def test_filter_response_norm_does_not_see_the_scale():
    layer, _ = made("frn")
    one, other = (call_layer(layer, scale * (X + 0.1))[0] for scale in (1.0, 64.0))
    np.testing.assert_allclose(one, other, atol=1e-4)  # epsilon weighs 1e-6 of the mean square


def test_a_threshold_lets_nan_through():
    bad = X.copy()
    bad[0, 0, 0, 0] = np.nan
    assert np.isnan(call_layer(made("frn")[0], bad)[0]).any()


@pytest.mark.parametrize("bessel", [False, True])
def test_the_moving_variance_of_evonorm_b0(bessel):
    """Of real positions only; a batch with NaN does not enter; evaluation with the batch's own is training."""
    layer = nk.EvoNormB0(momentum=0.5, bessel=bessel)
    bad = X.copy()
    bad[0, 0, 0, 0] = np.nan
    for x in (X, bad):
        trained, _ = call_layer(layer, x, training=True, mask=MASK)
    want = X[MASK].var(0, ddof=int(bessel))
    np.testing.assert_allclose(values(layer.moving_variance), 0.5 + 0.5 * want, rtol=1e-6)
    trained, _ = call_layer(layer, X, training=True, mask=MASK)
    layer.moving_variance.assign(X[MASK].var(0))
    np.testing.assert_allclose(call_layer(layer, X, mask=MASK)[0], trained, atol=1e-6)


@pytest.mark.parametrize("options", [{"debiased": True}, {"momentum": None}])
def test_a_first_average_is_the_batch(options):
    layer = nk.EvoNormB0(**options)
    call_layer(layer, X, training=True)
    np.testing.assert_allclose(values(layer.moving_variance), X.var((0, 1, 2)), rtol=1e-6)
    assert values(layer.count) == 1


def test_inputs_without_positions():
    x = keras.ops.ones((4, 6))
    for make in (nk.FilterResponseNormalization, nk.EvoNormB0, lambda: nk.EvoNormS0(6)):
        with pytest.raises(NormValueError, match="must have positions to take statistics over; got shape"):
            make()(x)
    with pytest.raises(NormValueError, match=r"divisible by `groups`; got 6 and 4. hint: use 3"):
        nk.EvoNormS0(4)(x)
    y = nk.FilterResponseNormalization(learn_epsilon=True)(x)
    np.testing.assert_allclose(values(y), 1 / np.sqrt(1 + 1e-4 + 1e-6), rtol=1e-6)


def model() -> keras.Model:
    """Return a model that does not know the sizes of its images, with every layer."""
    return keras.Sequential(
        [
            keras.Input((None, None, 6)),
            nk.FilterResponseNormalization(gamma_regularizer="l2"),
            nk.FilterResponseNormalization(learn_epsilon=True, tau_initializer=keras.initializers.Constant(-0.5)),
            nk.EvoNormB0(momentum=None),
            nk.EvoNormS0(3),
            nk.GlobalResponseNormalization(gamma_initializer="ones"),
            keras.layers.GlobalAveragePooling2D(),
            nk.DynamicTanh(alpha=0.7, beta_constraint="non_neg"),
            keras.layers.Dense(1),
        ]
    )


def test_fit_and_files(tmp_path):
    fitted = model()
    fitted.compile("sgd", "mse")
    fitted.fit(SINGLE, SINGLE.mean((1, 2, 3)), verbose=0)
    assert values(fitted.layers[2].count) == 1
    np.testing.assert_array_less(values(fitted.layers[2].moving_variance), 1)  # that of the batch
    fitted.save(tmp_path / "model.keras")
    fitted.save_weights(tmp_path / "model.weights.h5")
    same = model()
    same.load_weights(tmp_path / "model.weights.h5")
    want = values(fitted(SINGLE))
    for loaded in (same, keras.models.load_model(tmp_path / "model.keras")):
        for one, other in zip(loaded.layers, fitted.layers, strict=True):
            assert {**one.get_config(), "name": ""} == {**other.get_config(), "name": ""}
        np.testing.assert_array_equal(values(loaded(SINGLE)), want)
    with pytest.raises(NormValueError, match=r"must have a counterpart in Keras; got .*\(DynamicTanh\)"):
        nk.as_plain(fitted)
    with pytest.raises(NormValueError, match="must have a counterpart in Keras"):
        nk.as_plain(fitted.layers[0])
