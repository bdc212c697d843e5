"""LSTM cells with batch and layer norm in `keras.layers.RNN` against the papers' formulas in float64, step by step."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from directional import assert_gradients

import normkit.keras as nk
from normkit.errors import NormRuntimeError, NormValueError
from normkit.testing.keras import call_layer
from normkit.testing.precision import rounded

BACKEND = keras.backend.backend()
BATCH, STEPS, FEATURES, UNITS = 5, 3, 2, 3
KEPT = 2  # steps with statistics of their own: the third uses those of the second
RNG = np.random.default_rng(21)
X = rounded(2.0 * RNG.standard_normal((BATCH, STEPS, FEATURES)), "float32")
SINGLE = X.astype("float32")
DY = rounded(RNG.standard_normal((BATCH, STEPS, UNITS)), "float32")
# JAX keeps nothing out of a scan.
UNROLL = (True,) if BACKEND == "jax" else (True, False)
EPS = 1e-3
KINDS = ("input", "recurrent", "cell")


def values(variable) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(variable), dtype=np.float64)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def lstm(at, norm):
    """Return the outputs; `norm(step, kind, values)` is (x - mean) / sqrt(var + eps) of one of the three."""
    h = c = np.zeros((at["x"].shape[0], UNITS))
    outputs = []
    for t in range(at["x"].shape[1]):
        z = norm(t, "input", at["x"][:, t] @ at["kernel"]) * at["input_gamma"]
        z = z + norm(t, "recurrent", h @ at["recurrent_kernel"]) * at["recurrent_gamma"] + at["bias"]
        i, f, g, o = (z[:, gate * UNITS : (gate + 1) * UNITS] for gate in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(norm(t, "cell", c) * at["cell_gamma"] + at["cell_beta"])
        outputs.append(h)
    return np.stack(outputs, axis=1)


def by_rows(t, kind, a):
    return np.stack([(row - row.mean()) / np.sqrt(row.var() + EPS) for row in a])


def by_columns(seen=None):
    def norm(t, kind, a):
        if seen is not None:
            seen[t, kind] = a.mean(0), a.var(0)
        return np.stack([(column - column.mean()) / np.sqrt(column.var() + EPS) for column in a.T], axis=1)

    return norm


def by_kept(cell):
    def norm(t, kind, a):
        mean, var = (values(getattr(cell, f"{kind}_{name}"))[min(t, KEPT - 1)] for name in ("mean", "variance"))
        return (a - mean) / np.sqrt(var + EPS)

    return norm


def built(make, unroll=False, **options):
    """Return (layer, cell, weights), the weights unlike their first values."""
    cell = make(UNITS, epsilon=EPS, **options)
    layer = keras.layers.RNN(cell, return_sequences=True, unroll=unroll)
    layer.build(X.shape)
    rng = np.random.default_rng(2)
    for weight in layer.trainable_variables:
        weight.assign(rng.standard_normal(weight.shape))
    return layer, cell, {weight.name: values(weight) for weight in layer.trainable_variables}


def batch_norm(unroll=True, **options):
    return built(nk.BatchNormLSTMCell, unroll, **{"max_steps": KEPT, "momentum": 0.5, **options})


def close(actual, wanted):
    """To some hundred roundings: of each step about twenty, amplified from step to step by a factor of order 1."""
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=100 * 2.0**-23 * max(1.0, np.abs(wanted).max()))


def test_layer_norm():
    layer, _, weights = built(nk.LayerNormLSTMCell)
    at = {"x": X, **weights}
    y, found = call_layer(layer, X, DY)
    close(y, lstm(at, by_rows))
    assert_gradients(lambda at: lstm(at, by_rows), at, DY, found)


@pytest.mark.parametrize("unroll", UNROLL)
def test_batch_norm_trains_by_the_batch_of_each_step(unroll):
    """And keeps the first of them, once each: where it does not unroll Keras makes the first step twice."""
    layer, cell, weights = batch_norm(unroll)
    at, seen = {"x": X, **weights}, {}
    y, found = call_layer(layer, X, DY, training=True)
    close(y, lstm(at, by_columns(seen)))
    assert_gradients(lambda at: lstm(at, by_columns()), at, DY, found)
    for kind in KINDS:
        close(values(getattr(cell, f"{kind}_mean")), [0.5 * seen[t, kind][0] for t in range(KEPT)])
        close(values(getattr(cell, f"{kind}_variance")), [0.5 + 0.5 * seen[t, kind][1] for t in range(KEPT)])


def test_batch_norm_evaluates_by_what_each_step_kept():
    """Also in a scan of JAX, and beyond the last step by the last; no sample depends on the others."""
    layer, cell, weights = batch_norm(unroll=False)
    rng = np.random.default_rng(3)
    for weight in cell.non_trainable_variables:
        if weight.name != "seed_generator_state":
            weight.assign(rng.uniform(0.5, 2.0, weight.shape))
    y = values(layer(SINGLE))
    close(y, lstm({"x": X, **weights}, by_kept(cell)))
    np.testing.assert_allclose(values(layer(SINGLE[:1])), y[:1], atol=1e-6)


@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 0.9, "debiased": True}])
def test_averages_and_batches_with_nan(options):
    """Such a batch enters no statistic and no count from where the NaN is on."""
    layer, cell, _ = batch_norm(**options)
    bad = SINGLE.copy()
    bad[0, 1] = np.nan
    layer(SINGLE, training=True)
    before = [values(getattr(cell, f"{kind}_variance"))[1:] for kind in KINDS]
    layer(bad, training=True)
    np.testing.assert_array_equal(values(cell.count), [2, 1])
    for kind, kept in zip(KINDS, before, strict=True):
        np.testing.assert_array_equal(values(getattr(cell, f"{kind}_variance"))[1:], kept)
    close(values(cell.input_variance)[0], (X[:, 0] @ values(cell.kernel)).var(0))


def test_masked_samples_keep_their_step():
    """In evaluation a sequence with padding before it or behind it gives what it gives alone."""
    _, cell, weights = batch_norm(unroll=False)
    for kind in KINDS:
        variance = getattr(cell, f"{kind}_variance")
        variance.assign(np.random.default_rng(4).uniform(0.5, 2.0, variance.shape))
    layer = keras.layers.RNN(cell)
    padding = np.full((1, 1, FEATURES), 9.0)
    x = np.concatenate([np.concatenate([padding, X[:1]], axis=1), np.concatenate([X[:1], padding], axis=1)])
    mask = np.array([[False, True, True, True], [True, True, True, False]])
    want = lstm({"x": X[:1], **weights}, by_kept(cell))[:, -1]
    close(values(layer(x.astype("float32"), mask=keras.ops.convert_to_tensor(mask))), np.concatenate([want, want]))


def test_counts_past_256_in_bfloat16():
    cell = nk.BatchNormLSTMCell(UNITS, max_steps=KEPT, dtype="mixed_bfloat16")
    states = cell.get_initial_state(batch_size=1)
    for steps in (255, 256, 600):
        states[2] = keras.ops.cast([[(steps - 1) % 256, (steps - 1) // 256]], "bfloat16")
        digits = values(cell(keras.ops.ones((1, FEATURES)), states)[1][2])
        assert digits[0] @ [1, 256] == steps
    assert keras.backend.standardize_dtype(cell.cell_mean.dtype) == "float32"


def test_a_stack_of_cells_keeps_each_step_once():
    """To prepare dropout Keras calls the cells of a stack once more, outside the loop."""
    cells = [nk.BatchNormLSTMCell(UNITS, max_steps=KEPT, momentum=None) for _ in range(2)]
    layer = keras.layers.RNN(cells, unroll=True)
    layer(SINGLE, training=True)
    for cell in cells:
        np.testing.assert_array_equal(values(cell.count), np.ones(KEPT))
    close(values(cells[0].input_mean)[0], (X[:, 0] @ values(cells[0].kernel)).mean(0))


def test_a_cell_that_is_not_trainable_evaluates():
    layer, cell, weights = batch_norm(unroll=False)
    cell.trainable = False
    close(values(layer(SINGLE, training=True)), lstm({"x": X, **weights}, by_kept(cell)))
    assert np.all(values(cell.cell_variance) == 1)


def model(unroll: bool) -> keras.Model:
    batch = nk.BatchNormLSTMCell(UNITS, max_steps=KEPT, momentum=0.0)
    layer = nk.LayerNormLSTMCell(UNITS, use_bias=False, dropout=0.2, recurrent_dropout=0.2)
    return keras.Sequential(
        [
            keras.Input((STEPS, FEATURES)),
            keras.layers.RNN(batch, return_sequences=True, unroll=unroll),
            keras.layers.RNN(layer),
            keras.layers.Dense(1),
        ]
    )


def test_fit_and_files(tmp_path):
    fitted = model(UNROLL[-1])
    if BACKEND == "jax":
        fitted(SINGLE, training=True)  # compiled it is tested above, which takes seconds
    else:
        fitted.compile("sgd", "mse")
        fitted.fit(SINGLE, SINGLE.mean((1, 2)), verbose=0)
    cell = fitted.layers[0].cell
    assert np.all(values(cell.cell_variance) < 1)  # every step has one that is not the first value
    fitted.save(tmp_path / "model.keras")
    fitted.save_weights(tmp_path / "model.weights.h5")
    same = model(UNROLL[-1])
    same.load_weights(tmp_path / "model.weights.h5")
    want = values(fitted(SINGLE))
    for loaded in (same, keras.models.load_model(tmp_path / "model.keras")):
        for one, other in zip(loaded.layers[:2], fitted.layers[:2], strict=True):
            assert {**one.cell.get_config(), "name": ""} == {**other.cell.get_config(), "name": ""}
        np.testing.assert_allclose(values(loaded(SINGLE)), want, rtol=1e-6)
    with pytest.raises(NormValueError, match=r"must have a counterpart in Keras; got .*\(BatchNormLSTMCell\)"):
        nk.as_plain(fitted)


def test_first_gains():
    for make, first in ((nk.LayerNormLSTMCell, 1.0), (nk.BatchNormLSTMCell, 0.1)):
        cell = make(UNITS, **({"max_steps": 2} if first < 1 else {}))
        cell.build((None, FEATURES))
        for kind in KINDS:
            np.testing.assert_allclose(values(getattr(cell, f"{kind}_gamma")), first)


def test_an_initial_state_without_the_step():
    cell = nk.BatchNormLSTMCell(UNITS, max_steps=2)
    with pytest.raises(NormValueError, match=r"the states must be h, c and the number of steps, \(batch, 2\); got 2"):
        cell(keras.ops.ones((1, FEATURES)), [keras.ops.zeros((1, UNITS))] * 2)


@pytest.mark.skipif(BACKEND != "jax", reason="the others can")
def test_jax_cannot_train_in_a_scan():
    layer, cell, _ = batch_norm(unroll=False)
    with pytest.raises(NormRuntimeError, match=r"training on JAX must unroll.*RNN\(cell, unroll=True\)"):
        layer(SINGLE, training=True)
    assert np.all(values(cell.cell_variance) == 1)
