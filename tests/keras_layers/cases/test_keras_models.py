"""Our layers in models: fit, files, frozen layers, mixed precision, clones, and the way back to Keras' own."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import normkit.keras as nk
from normkit.core.schedule import RenormSchedule
from normkit.errors import NormTypeError, NormValueError

L = keras.layers
RNG = np.random.default_rng(3)
X = RNG.standard_normal((90, 8, 8, 3)).astype("float32")  # 90: the last batch of 32 is short
Y = (X.mean((1, 2, 3)) > 0).astype("int64")


def values(variable) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(variable))


def cnn() -> keras.Model:
    """Return a small Sequential model with every layer."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            L.Conv2D(6, 3, use_bias=False),
            nk.BatchNormalization(debiased=True),
            L.ReLU(),
            nk.GhostBatchNormalization(virtual_batch_size=16, momentum=0.9),
            nk.BatchRenormalization(momentum=0.9, renorm_schedule=RenormSchedule.for_steps(10)),
            nk.GroupNormalization(3),
            nk.InstanceNormalization(),
            L.Flatten(),
            nk.LayerNormalization(),
            L.Dense(6),
            nk.RMSNormalization(),
            nk.BatchNormalization(momentum=None, bessel=True),
            L.Dense(2),
        ]
    )


def trained(model: keras.Model, epochs: int = 2) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    model.fit(X, Y, batch_size=32, epochs=epochs, verbose=0)
    return model


@pytest.fixture(scope="module")
def fitted() -> keras.Model:
    keras.utils.set_random_seed(4)
    return trained(cnn())


def counts(model: keras.Model) -> list[int]:
    return [int(values(layer.count)) for layer in model.layers if getattr(layer, "count", None) is not None]


def test_fit(fitted):
    assert counts(fitted) == [6, 6, 6]
    assert fitted.evaluate(X, Y, verbose=0)[1] > 0.7
    debiased, cumulative = fitted.layers[1], fitted.layers[-2]
    assert np.all(values(debiased.moving_variance) < 0.9)  # of the data, not of the first value 1
    assert np.all(np.isfinite(values(cumulative.moving_variance)))


def test_a_functional_model_with_mask_and_weights_learns():
    words, weight = keras.Input((7,), dtype="int32"), keras.Input((), name="weight")
    x = L.Embedding(20, 5, mask_zero=True)(words)
    x = nk.BatchNormalization(momentum=0.5)(x)
    x = nk.BatchNormalization(momentum=0.5)(x, sample_weight=weight)
    model = keras.Model([words, weight], L.Dense(1)(L.GlobalAveragePooling1D()(x)))
    model.compile("sgd", "mse")
    ids = RNG.integers(0, 20, (40, 7)).astype("int32")
    model.fit([ids, np.ones(40, "float32")], ids.mean(1, keepdims=True), batch_size=16, verbose=0)
    embedding, norm = model.layers[1:3]
    before = values(norm.moving_mean)
    vectors = values(embedding.embeddings)[ids]
    model.optimizer.learning_rate = 0.0
    model.fit([ids, np.ones(40, "float32")], ids.mean(1, keepdims=True), batch_size=40, verbose=0)
    np.testing.assert_allclose(values(norm.moving_mean), 0.5 * before + 0.5 * vectors[ids != 0].mean(0), atol=1e-5)
    y = values(keras.Model(model.inputs, x)([ids, np.ones(40, "float32")]))
    assert np.all(y[ids == 0] == 0)  # the implicit mask reaches the layer beside a sample weight, too


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_files(fitted, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    if suffix == ".keras":
        fitted.save(path)
        loaded = keras.models.load_model(path)
        assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in fitted.layers]
        assert loaded.layers[4].renorm_schedule == RenormSchedule.for_steps(10)
    else:
        fitted.save_weights(path)
        loaded = cnn()
        loaded.load_weights(path)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), fitted.predict(X, verbose=0))
    assert counts(loaded) == [6, 6, 6]


def plain_cnn(module) -> keras.Model:
    """Return a model of layers that both have."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            module.BatchNormalization(momentum=0.5),
            module.BatchNormalization(renorm=True, momentum=0.5),
            module.GroupNormalization(3),
            L.Flatten(),
            module.LayerNormalization(),
            module.RMSNormalization(),
            L.Dense(2),
        ]
    )


@pytest.mark.parametrize("ours_first", [True, False])
def test_weights_files_are_those_of_keras(tmp_path, ours_first):
    modules = (nk, L) if ours_first else (L, nk)
    source, target = (plain_cnn(module) for module in modules)
    trained(source, 1).save_weights(tmp_path / "w.weights.h5")
    target.load_weights(tmp_path / "w.weights.h5")
    np.testing.assert_allclose(target.predict(X, verbose=0), source.predict(X, verbose=0), atol=1e-5)


def test_weights_move_between_the_kinds_of_batch_norm(tmp_path):
    source = trained(
        keras.Sequential([keras.Input((8, 8, 3)), nk.BatchNormalization(momentum=0.5), L.Flatten(), L.Dense(2)])
    )
    source.save_weights(tmp_path / "w.weights.h5")
    for layer in (nk.GhostBatchNormalization(virtual_batch_size=8), nk.BatchNormalization(virtual_batch_size=8)):
        target = keras.Sequential([keras.Input((8, 8, 3)), layer, L.Flatten(), L.Dense(2)])
        target.load_weights(tmp_path / "w.weights.h5")
        np.testing.assert_array_equal(target.predict(X, verbose=0), source.predict(X, verbose=0))


def test_a_frozen_layer_runs_by_its_statistics():
    model = trained(keras.Sequential([keras.Input((8, 8, 3)), nk.BatchNormalization(), L.Flatten(), L.Dense(2)]), 1)
    norm = model.layers[0]
    norm.trainable = False
    frozen = [values(w) for w in norm.weights]
    trained(model, 1)
    assert all(np.array_equal(a, values(w)) for a, w in zip(frozen, norm.weights, strict=True))
    norm.trainable = True
    trained(model, 1)
    assert not np.array_equal(frozen[2], values(norm.moving_mean))


def test_mixed_precision():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        norms = [nk.BatchNormalization(debiased=True), nk.GroupNormalization(3), L.Flatten(), nk.LayerNormalization()]
        model = trained(keras.Sequential([keras.Input((8, 8, 3)), *norms, nk.RMSNormalization(), L.Dense(2)]), 1)
    finally:
        keras.config.set_dtype_policy(before)
    for layer in model.layers[:-1]:
        assert keras.backend.standardize_dtype(layer.output.dtype) == "bfloat16"
    for layer in model.layers:
        assert {w.dtype for w in layer.weights} <= {"float32", "int32"}
    assert keras.backend.standardize_dtype(model.layers[0](X[:2]).dtype) == "bfloat16"
    assert np.all(np.isfinite(model.predict(X, verbose=0)))
    half = nk.BatchNormalization(dtype="float16")
    half.build((None, 3))
    assert [w.dtype for w in half.weights] == ["float16", "float16", "float32", "float32"]


def test_clones_and_configs(fitted):
    clone = keras.models.clone_model(fitted)
    assert [type(layer) for layer in clone.layers] == [type(layer) for layer in fitted.layers]
    assert [layer.get_config() for layer in clone.layers] == [layer.get_config() for layer in fitted.layers]
    clone.set_weights(fitted.get_weights())
    np.testing.assert_array_equal(clone.predict(X, verbose=0), fitted.predict(X, verbose=0))


def test_symbolic_shapes():
    x = keras.Input((None, None, 6))
    for layer in (nk.BatchNormalization(virtual_batch_size=4), nk.GroupNormalization(3), nk.LayerNormalization()):
        assert layer(x).shape == (None, None, None, 6)
        assert layer.compute_output_shape((None, 3, 3, 6)) == (None, 3, 3, 6)


def ours_in(model) -> list[str]:
    return [layer.name for layer in model._flatten_layers() if type(layer).__module__.startswith("normkit")]


def test_as_plain(fitted, tmp_path):
    plain = nk.as_plain(fitted)
    assert ours_in(plain) == []
    assert ours_in(fitted)
    np.testing.assert_allclose(plain.predict(X, verbose=0), fitted.predict(X, verbose=0), atol=2e-5)
    plain.save(tmp_path / "plain.keras")
    again = keras.models.load_model(tmp_path / "plain.keras", custom_objects={})
    np.testing.assert_allclose(again.predict(X, verbose=0), plain.predict(X, verbose=0), atol=1e-6)


def test_as_plain_of_nested_models_wrappers_and_single_layers():
    inner = keras.Sequential([keras.Input((8, 3)), nk.BatchNormalization(momentum=None), nk.InstanceNormalization()])
    x = keras.Input((8, 8, 3))
    y = L.TimeDistributed(inner)(x)
    y = L.TimeDistributed(nk.RMSNormalization())(y)
    body = keras.Sequential([keras.Input((8, 8, 3)), L.Conv2D(4, 1), nk.BatchNormalization(debiased=True), L.Flatten()])
    model = keras.Model(x, L.Dense(2)(body(y)))
    for weight in model.weights:
        weight.assign(RNG.uniform(0.5, 1.5, weight.shape))
    plain = nk.as_plain(model)
    assert ours_in(plain) == []
    np.testing.assert_allclose(plain.predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-5)
    single = nk.as_plain(body.layers[1])
    assert type(single) is L.BatchNormalization
    assert single.momentum == 0.99
    np.testing.assert_array_equal(values(single.moving_mean), values(body.layers[1].moving_mean))


def test_what_as_plain_refuses():
    class Custom(keras.Model):
        pass

    with pytest.raises(NormTypeError, match="must be a Sequential or Functional model"):
        nk.as_plain(Custom())
    with pytest.raises(NormValueError, match="must be built"):
        nk.as_plain(nk.LayerNormalization())
    words = keras.Input((7,))
    x = L.Embedding(20, 6, mask_zero=True)(words)
    with pytest.raises(NormValueError, match="must not be called with a mask"):
        nk.as_plain(keras.Model(words, nk.GroupNormalization(3)(x)))
    assert nk.as_plain(keras.Model(words, nk.BatchNormalization()(x)))
    after = keras.layers.ReLU()(nk.BatchNormalization()(x))
    assert nk.as_plain(keras.Model(words, keras.layers.GlobalAveragePooling1D()(after)))  # which heeds the mask
    with pytest.warns(UserWarning, match="does not support masking"):
        reading = keras.layers.Conv1D(2, 3, name="reads")(after)
    with pytest.raises(NormValueError, match=r"masked positions behind .* must not be read.*got reads, which knows no"):
        nk.as_plain(keras.Model(words, reading))
    weight = keras.Input(())
    with pytest.raises(NormValueError, match="must not be called with sample weights"):
        nk.as_plain(keras.Model([words, weight], nk.BatchNormalization()(x, sample_weight=weight)))
