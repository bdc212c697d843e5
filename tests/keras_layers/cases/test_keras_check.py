"""`normkit.check` of Keras models, on the backend that is active: the story of the docs, and what is measured."""

import re

import keras
import numpy as np
import pytest
from keras import layers, ops

import normkit
from normkit.checks.examination import Batch, Request, examine
from normkit.errors import NormError
from normkit.keras import BatchNormalization, EvoNormB0, examination

BACKEND = keras.config.backend()
SAMPLES, FEATURES = 16, 4  # of every batch, so that nothing is compiled twice


def network(norm=layers.BatchNormalization, drop=0.5, base_training=None):
    """A nested model; `base_training` is what the base is called with."""
    base = keras.Sequential(
        [keras.Input((FEATURES,)), layers.Dropout(drop), layers.Dense(3, use_bias=False), norm(name="norm")],
        name="base",
    )
    inputs = keras.Input((FEATURES,))
    hidden = base(inputs) if base_training is None else base(inputs, training=base_training)
    return keras.Model(inputs, layers.Dense(2)(layers.BatchNormalization(name="last")(layers.ReLU()(hidden))))


def data(batches=2):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batches, SAMPLES, FEATURES)).astype("float32") + 1
    return [(part, (part[:, 0] > 1).astype("int32")) for part in x]


def compiled(model, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, **options)
    model.optimizer.build(model.trainable_variables)
    return model


def seen(model, given=None, *, optimizer=None, loss=None, forward=None):
    return examine(Request(model, given or data(), optimizer, loss, forward, 8, lambda words: None))


def values(variables):
    return [np.array(ops.convert_to_numpy(variable.value)) for variable in variables]


def of(model, path):
    for name in path.split("/"):
        model = model.get_layer(name)
    return model


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one training is enough: it takes longest here on the others")
def test_the_classic_network_on_digits_is_told_what_is_wrong_and_the_remedy_works():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(digits.images, digits.target, test_size=450, stratify=digits.target, random_state=0)
    x, x_test = (part[..., None].astype("float32") / 16 for part in parts[:2])
    y, y_test = parts[2:]
    stack = [keras.Input((8, 8, 1))]
    for layer in (layers.Conv2D(8, 3, padding="same"), layers.Conv2D(16, 3, padding="same"), layers.Dense(32)):
        if isinstance(layer, layers.Dense):
            stack += [layers.MaxPooling2D(), layers.Flatten()]
        stack += [layer, layers.BatchNormalization(), layers.ReLU()]
    model = keras.Sequential([*stack, layers.Dense(10, activation="softmax")])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, 64, 8, verbose=0)
    assert model.evaluate(x_test, y_test, verbose=0)[1] < 0.7
    found = normkit.check(model, (x, y))
    assert "Cause: statistics not converged: 17 % of the initial value left, first at " in found.sentence
    (finding, *_) = [finding for finding in found.findings if finding.code == "NK103"]
    assert finding.words.endswith("left after 176 steps of the model's optimizer")
    assert found.sentence.endswith(f"Do: {finding.fix.line}")
    exec(finding.fix.line, {"normkit": normkit, "model": model, "data": (x, y)})
    assert model.evaluate(x_test, y_test, verbose=0)[1] >= 0.95
    assert normkit.check(model, (x, y)).healthy


def test_nothing_changes_and_everything_is_examined():
    model = compiled(network())
    model.optimizer.iterations.assign(5)
    np.random.seed(1)  # noqa: NPY002  # the one that users draw from
    keras.random.normal((1,))  # the generator of functions without a seed is there
    drawn = keras.src.random.seed_generator.global_seed_generator().state
    variables = [*model.variables, *model.optimizer.variables, drawn]
    before, state = values(variables), np.random.get_state()[1].copy()  # noqa: NPY002
    metrics = [metric.name for metric in model.metrics]
    found = normkit.check(model, data())
    assert all(np.array_equal(*pair) for pair in zip(before, values(variables), strict=True))
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    assert all("call" not in vars(layer) for layer in model._flatten_layers())
    assert metrics == [metric.name for metric in model.metrics]
    assert found.skipped == {}
    assert found.layers == 2
    assert found.seen == "functional"


def test_every_mode_is_what_it_says():
    """Dropout only in training, statistics of the batch in `batch` and `train`, kept ones in evaluation."""
    model, parts = network(), data()
    kernel = ops.convert_to_numpy(of(model, "base").layers[1].kernel.value)
    evidence = seen(model)
    assert [layer.path for layer in evidence.layers] == ["base/norm", "last"]
    calls, noisy = evidence.calls["base/norm"], evidence.trained_calls["base/norm"]
    for number, (x, _) in enumerate(parts):
        hidden = x.astype(np.float64) @ kernel
        assert (calls[number].count, calls[number].shape) == (SAMPLES, hidden.shape)
        np.testing.assert_allclose(calls[number].mean, hidden.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(calls[number].var, hidden.var(0), rtol=1e-4)
        normal = np.maximum((hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-3), 0)
        np.testing.assert_allclose(evidence.calls["last"][number].mean, normal.mean(0), atol=1e-5)
    assert noisy[0].var.sum() > 1.3 * calls[0].var.sum()  # twice the squares, with a rate of one half
    outputs = []
    for mode, training in (("train", True), ("eval", False)):
        with examination.running(model, mode, None, lambda model, raw: model(raw[0])) as run:
            outputs.append(ops.convert_to_numpy(run(Batch(*parts[0], parts[0]))))
        with examination.untouched(model):
            expected = ops.convert_to_numpy(model(parts[0][0], training=training))
        np.testing.assert_allclose(outputs[-1], expected, atol=1e-6)
    assert np.abs(outputs[0] - outputs[1]).max() > 0.01


def test_a_step_moves_what_is_trained_alone():
    model = network(drop=0.0)
    of(model, "base").trainable = False
    evidence = seen(model)
    frozen, last = (evidence.by_path[path] for path in ("base/norm", "last"))
    assert (frozen.frozen, frozen.trained, last.frozen, last.trained) == (True, False, False, True)
    assert evidence.step.moved == {"last"}
    assert evidence.step.updates == {"base/norm": 0, "last": 1}
    assert {path.startswith("base/") for path, free in evidence.parameters.items() if not free} == {True}
    assert evidence.parameters[last.parameters["gamma"]]


@pytest.mark.parametrize(("trainable", "codes"), [(True, ["NK305"]), (False, [])])
def test_a_base_that_is_called_in_inference_moves_in_training_all_the_same(trainable, codes):
    model = compiled(network(drop=0.0, base_training=False))
    of(model, "base").trainable = trainable
    found = normkit.check(model, data(), select=["NK305"])
    assert [finding.code for finding in found.findings] == codes
    if codes:
        assert found.findings[0].fix.line == 'normkit.freeze(model.get_layer("base"))'
        exec(found.findings[0].fix.line, {"normkit": normkit, "model": model})
        assert not normkit.check(model, data(), select=["NK305"]).findings


def test_a_frozen_base_called_with_training_keeps_its_statistics():
    model = network(drop=0.0, base_training=True)
    of(model, "base").trainable = False
    evidence = seen(model)
    assert evidence.step.moved == {"last"}
    assert not evidence.by_path["base/norm"].stuck


class Own(keras.Model):
    """A model with a `call` of its own, and named inputs."""

    def __init__(self, training):
        super().__init__()
        self.dense, self.norm, self.how = layers.Dense(2), layers.BatchNormalization(name="norm"), training

    def call(self, inputs):
        return self.norm(self.dense(inputs["x"]), **self.how)


@pytest.mark.parametrize("named", ["arrays", "batches"])
def test_a_model_with_a_call_of_its_own_and_named_inputs(named):
    model, parts = Own({}), [({"x": x}, y) for x, y in data()]
    model(parts[0][0])
    whole = ({"x": np.concatenate([x["x"] for x, _ in parts])}, np.concatenate([y for _, y in parts]))
    found = normkit.check(model, parts if named == "batches" else whole, select=["NK3", "NK4"])
    assert not found.findings
    assert set(found.skipped) == {"graph", "optimizer"}
    assert re.search(r"Sequential or Functional.*got Own", found.skipped["graph"])


def test_layers_of_one_name_are_told_apart():
    class Twins(keras.Model):
        def __init__(self):
            super().__init__()
            self.norms = [layers.BatchNormalization(name="norm") for _ in range(2)]

        def call(self, x):
            return self.norms[1](3 * self.norms[0](x) + 7)

    model, parts = Twins(), [x for x, _ in data()]
    model(parts[0])
    calls = seen(model, parts).calls
    np.testing.assert_allclose(calls["norm"][0].mean, parts[0].mean(0), rtol=1e-5)
    np.testing.assert_allclose(calls["norm (2)"][0].mean, 7, rtol=1e-5)


def test_a_norm_that_is_always_in_training_is_found():
    model, parts = Own({"training": True}), [({"x": x}, y) for x, y in data()]
    model(parts[0][0])
    found = normkit.check(model, parts, select=["NK3"])
    assert {(finding.severity, finding.code, finding.path) for finding in found.findings} == {
        ("error", "NK303", "norm"),
        ("error", "NK304", "norm"),
    }
    assert found.findings[0].fix.line == "norm(x)  # without training=True, in Own.call"


def test_a_model_that_is_not_built_is_refused_and_a_norm_that_cannot_be_read_is_named():
    with pytest.raises(NormError, match="must be built"):
        normkit.check(keras.Sequential([layers.BatchNormalization()]))
    model = keras.Sequential([keras.Input((6, 32)), EvoNormB0(name="evo"), layers.BatchNormalization()])
    found = normkit.check(model)
    assert found.layers == 1
    assert "EvoNormB0" in found.skipped["evo"]
    assert found.skipped["data"].startswith("none was given")


def own_loss(outputs, targets):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)(targets, outputs)


def test_a_loss_in_every_form_is_one():
    model, (x, y) = network(), data(1)[0]
    outputs = model(x, training=False)
    forms = [own_loss, keras.losses.SparseCategoricalCrossentropy(from_logits=True)]
    forms += [lambda outputs, targets: ops.sparse_categorical_crossentropy(targets, outputs, from_logits=True)]
    found = [np.mean(ops.convert_to_numpy(examination.loss(model, form)(outputs, y))) for form in forms]
    assert examination.loss(model, None) is None
    assert examination.loss(model, keras.losses.mean_squared_error)(ops.ones((2, 3)), ops.zeros((2, 3))).shape == (2,)
    compiled(model, metrics=["accuracy"])
    found.append(np.mean(ops.convert_to_numpy(examination.loss(model, None)(outputs, y))))
    assert not model._compile_loss.built
    np.testing.assert_allclose(found, found[0], rtol=1e-6)
    logits = ops.convert_to_numpy(outputs).astype(np.float64)
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]
    np.testing.assert_allclose(found[0], expected.mean(), rtol=1e-5)


def test_weights_that_training_writes_are_restored():
    wrapped = layers.SpectralNormalization(layers.Dense(3))
    model = keras.Sequential([keras.Input((FEATURES,)), wrapped, layers.BatchNormalization()])
    before = values(model.variables)
    with examination.running(model, "train", None, None) as run:
        run(Batch(data(1)[0][0], None, None))
        assert not all(np.array_equal(*pair) for pair in zip(before, values(model.variables), strict=True))
    assert all(np.array_equal(*pair) for pair in zip(before, values(model.variables), strict=True))


def test_outputs_are_compared_where_a_compiled_model_gets_no_targets():
    assert seen(compiled(network(drop=0.0)), [x for x, _ in data()]).gap.measure == "outputs"
    assert seen(compiled(network(drop=0.0))).gap.measure == "loss"


def test_what_an_optimizer_holds():
    model = network()
    of(model, "base").trainable = False
    adamw = keras.optimizers.AdamW(0.01, weight_decay=0.1)
    adamw.exclude_from_weight_decay(var_names=["gamma"])
    for optimizer in (adamw, keras.optimizers.LossScaleOptimizer(adamw)):
        decayed, rest = sorted(examination.groups(model, optimizer), key=lambda group: -group.weight_decay)
        assert (decayed.weight_decay, rest.weight_decay, rest.paths) == (pytest.approx(0.1), 0, {"last.gamma"})
        assert (decayed.lr, "last.beta" in decayed.paths, decayed.foreign) == (pytest.approx(0.01), True, 0)
        assert decayed.paths | rest.paths == {path for path, free in examination.parameters(model).items() if free}
    other = compiled(network())
    (group,) = examination.groups(model, other.optimizer)
    assert (group.paths, group.foreign) == (frozenset(), len(other.trainable_variables))
    with pytest.raises(NormError, match=r"`optimizer` must be a keras\.optimizers\.Optimizer; got str"):
        examination.groups(model, "adam")
    assert normkit.check(model, optimizer=adamw, select=["NK701"]).findings


def test_types_of_mixed_precision_and_the_layers_of_normkit():
    policy = keras.DTypePolicy("mixed_bfloat16")
    norm = BatchNormalization(debiased=True, dtype=policy, name="norm")
    model = keras.Sequential([keras.Input((FEATURES,)), layers.Dense(3, dtype=policy), norm])
    norm.count.assign(7)
    evidence = seen(model, [x for x, _ in data()])
    (layer,) = evidence.layers
    assert layer.dtypes == dict.fromkeys(("gamma", "beta", "mean", "var"), "float32")
    assert evidence.calls["norm"][0].dtype == "bfloat16"
    assert (layer.record.count, layer.momentum, evidence.step.updates) == (7, 0.99, {"norm": 1})
    assert evidence.backend == BACKEND


@pytest.mark.parametrize("trained", [True, False])
def test_steps_stand_for_updates_only_where_the_statistics_look_like_it(trained):
    """Of 100 steps 37 % of the first values are left. Loaded statistics may be off as well, but not in this way."""
    model = compiled(network(drop=0.0))
    model.optimizer.iterations.assign(100)
    given = data(16)  # two batches cannot tell that much from chance
    x, (kernel,) = np.concatenate([x for x, _ in given]), values([of(model, "base").layers[1].kernel])
    left, hidden = 0.99**100, x @ kernel
    norm = of(model, "base/norm")
    norm.moving_mean.assign((1 - left) * hidden.mean(0) if trained else hidden.mean(0) + 3)
    norm.moving_variance.assign(left + (1 - left) * hidden.var(0) if trained else 0.05 * hidden.var(0))
    found = normkit.check(model, given, steps=16, select=["NK103"])
    paths = [finding.path for finding in found.findings]
    assert ("base/norm" in paths) == trained
    assert normkit.check(model, select=["NK103"]).findings == ()


class Parts(keras.utils.PyDataset):
    """Three batches, the last of them short."""

    num_batches = 3

    def __getitem__(self, index):
        x, y = data(1)[0]
        return (x[:5], y[:5]) if index == 2 else (x, y)


def test_what_is_known_of_the_data():
    assert examination.loader(Parts()) == {"source": "PyDataset", "batch_size": 16, "samples": 37}
    assert examination.loader(data()) == {}
    if BACKEND == "tensorflow":
        import tensorflow as tf

        arrays = tf.data.Dataset.from_tensor_slices(np.zeros((37, 4), "float32"))
        known = {"source": "tf.data", "batch_size": 16, "samples": 37}
        batched = arrays.shuffle(8).batch(16).prefetch(1)
        assert examination.loader(batched) == {**known, "drop_last": False}
        assert examination.loader(arrays.batch(16, drop_remainder=True)) == {**known, "drop_last": True}
        assert examination.loader(batched.take(1)) == {"source": "tf.data"}
        found = normkit.check(network(drop=0.0), batched, select=["NK403"])
        assert found.skipped.keys() == {"optimizer"}
        assert normkit.check(network(), arrays.batch(16), select=["NK403"]).skipped.keys() == {"optimizer"}
    if BACKEND == "torch":
        from torch.utils.data import DataLoader

        known = examination.loader(DataLoader(list(data(1)[0][0]), 16))
        assert (known["source"], known["batch_size"], known["samples"]) == ("DataLoader", 16, 16)


def test_a_short_last_batch_is_said_in_the_words_of_the_loader():
    class Short(Parts):
        def __getitem__(self, index):
            x, y = data(1)[0]
            return (x[:2], y[:2]) if index == 2 else (x, y)

    (finding,) = normkit.check(network(drop=0.0), Short(), select=["NK403"]).findings
    assert finding.words == "the last batch of an epoch has 2 of 16 samples"
    assert "num_batches" in finding.fix.line
    assert not normkit.check(network(drop=0.0), Parts(), select=["NK403"]).findings
