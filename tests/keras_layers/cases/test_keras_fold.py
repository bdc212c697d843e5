"""Folding a Keras model gives the same outputs, or says why not; the original stays as it was."""

import re

import keras
import numpy as np
import pytest
from keras import layers, ops

import normkit
from normkit import keras as ours
from normkit.errors import NormError

# Of the largest output, the limit for float32: a fold rounds each weight once, 6e-8.
CLOSE = 1e-5
# TensorFlow on the CPU computes convolutions with the channels last alone.
FIRST = "channels_first"
FORMATS = ["channels_last", *([FIRST] if keras.backend.backend() != "tensorflow" else [])]
RNG = np.random.default_rng(0)


def drawn(shape):
    return RNG.normal(size=shape).astype("float32")


def randomized(model):
    """Random weights and statistics; gammas of both signs, and one that is 0."""
    for variable in model.variables:
        value = drawn(variable.shape)
        if variable.name in ("moving_variance", "moving_stddev", "renorm_stddev"):
            value = np.abs(value) + 0.5
        if variable.name == "gamma":
            value.flat[0] = 0
        if variable.dtype.startswith(("float", "bfloat")):
            variable.assign(value)
    return model


def values(variables):
    return [np.array(ops.convert_to_numpy(v.value)) for v in variables]


def outputs(model, x):
    return [np.asarray(ops.convert_to_numpy(y)) for y in keras.tree.flatten(model(x, training=False))]


def check(model, x, changed=None):
    """Fold, compare on the example and elsewhere, and see that the original is bit for bit what it was."""
    randomized(model)
    state = values(model.variables)
    folded, report = normkit.fold(model, x, return_report=True)
    for inputs in (x, keras.tree.map_structure(lambda part: 3 * drawn(part.shape) + 1, x)):
        for before, after in zip(outputs(model, inputs), outputs(folded, inputs), strict=True):
            assert before.shape == after.shape
            assert np.abs(before - after).max() <= CLOSE * np.abs(before).max(), report
    assert all(np.array_equal(a, b) for a, b in zip(values(model.variables), state, strict=True))
    assert [layer.name for layer in folded.layers] == [layer.name for layer in model.layers]
    assert type(folded) is type(model)
    assert not {id(v) for v in model.variables} & {id(v) for v in folded.variables}
    if changed is not None:
        assert len(report.done) == changed, report
    assert report.how == "functional"
    return folded, report


def sequential(*stack, shape):
    return keras.Sequential([keras.Input(shape), *stack])


def norms(model):
    return [layer for layer in model._flatten_layers() if "Normalization" in type(layer).__name__]


BN = layers.BatchNormalization
BEFORE = {
    "conv1d, causal": (lambda: [layers.Conv1D(6, 3, padding="causal", dilation_rate=2), BN()], (9, 3)),
    "conv2d, no bias": (lambda: [layers.Conv2D(6, 3, padding="same", use_bias=False), BN(), layers.ReLU()], (7, 7, 3)),
    "conv3d": (lambda: [layers.Conv3D(6, 2, strides=2), BN()], (5, 5, 5, 3)),
    "depthwise": (lambda: [layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False), BN()], (7, 7, 3)),
    "separable": (lambda: [layers.SeparableConv2D(6, 3, depth_multiplier=2, use_bias=False), BN()], (7, 7, 3)),
    "transposed": (
        lambda: [layers.Conv2DTranspose(6, 3, strides=2, padding="same", use_bias=False), BN(epsilon=0.1)],
        (4, 4, 3),
    ),
    "dense": (lambda: [layers.Dense(6, use_bias=False), layers.Dropout(0.5), BN()], (5,)),
    "without gamma and beta": (lambda: [layers.Dense(6), BN(center=False, scale=False)], (5,)),
    "through a permutation": (
        lambda: [layers.Dense(6), layers.Permute((2, 1)), BN(axis=1), layers.Flatten(), layers.ReLU()], (4, 5),
    ),
    "ours": (lambda: [layers.Conv2D(6, 3), ours.BatchNormalization()], (7, 7, 3)),
    "ghost": (lambda: [layers.Dense(6), ours.GhostBatchNormalization(virtual_batch_size=2)], (5,)),
    "renorm": (lambda: [layers.Dense(6), ours.BatchRenormalization()], (5,)),
    "two in a row": (lambda: [layers.Dense(6), BN(), BN()], (5,)),
}  # fmt: skip


@pytest.mark.parametrize("case", BEFORE)
def test_batch_norm_goes_into_the_map_before_it(case):
    stack, shape = BEFORE[case]
    folded, report = check(sequential(*stack(), shape=shape), drawn((2, *shape)))
    assert not report.kept, report
    assert not norms(folded)


@pytest.mark.skipif(len(FORMATS) == 1, reason="needs convolutions with the channels first")
def test_channels_may_come_first():
    stack = [
        layers.Conv2D(6, 3, groups=3, data_format=FIRST),
        BN(axis=1),
        layers.ReLU(),
        BN(axis=1),
        layers.DepthwiseConv2D(2, data_format=FIRST, use_bias=False),
    ]
    check(sequential(*stack, shape=(3, 6, 6)), drawn((2, 3, 6, 6)), changed=2)


BEHIND = {
    "conv2d": (lambda: [BN(), layers.Conv2D(6, 3, use_bias=False, activation="relu")], (6, 6, 4)),
    "depthwise": (lambda: [BN(), layers.DepthwiseConv2D(3, depth_multiplier=2)], (6, 6, 4)),
    "depthwise of a separable one, no shift": (
        lambda: [ours.RMSNormalization(), layers.SeparableConv2D(6, 3, padding="same")], (6, 6, 4),
    ),
    "dense with its activation": (lambda: [BN(), layers.Dense(4, activation="softmax")], (6,)),
    "flattened maps": (lambda: [BN(), layers.Flatten(), layers.Dense(4)], (3, 4, 5)),
    "layer norm": (lambda: [layers.LayerNormalization(), layers.Dense(4, use_bias=False)], (5, 6)),
    "layer norm over maps": (
        lambda: [layers.LayerNormalization(axis=(1, 2)), layers.Flatten(), layers.Dense(4)], (3, 4),
    ),
    "RMS norm": (lambda: [layers.RMSNormalization(), layers.Dense(4, use_bias=False)], (5, 6)),
    "group norm": (lambda: [layers.GroupNormalization(2), layers.Conv2D(6, 3, padding="valid")], (6, 6, 4)),
    "ours, layer norm": (lambda: [ours.LayerNormalization(), layers.Dense(4)], (5, 6)),
}  # fmt: skip


@pytest.mark.parametrize("case", BEHIND)
def test_norms_go_into_the_maps_behind_them(case):
    stack, shape = BEHIND[case]
    folded, report = check(sequential(*stack(), shape=shape), drawn((2, *shape)), changed=1)
    assert not report.kept
    for layer in norms(folded):  # layer, RMS and group norm stay, without gamma and beta
        assert all((value == 1).all() for value in values(layer.variables))


def test_a_bias_that_is_subtracted_again_goes():
    stack = [layers.Conv2D(4, 3, name="conv"), ours.InstanceNormalization(), layers.ReLU()]
    folded, _ = check(sequential(*stack, shape=(6, 6, 3)), drawn((2, 6, 6, 3)), changed=1)
    assert folded.get_layer("conv").bias is None


def nested():
    """A residual network with a backbone inside, functions between layers, two inputs and two outputs."""
    inner_inputs = keras.Input((8, 8, 3))
    y = layers.Conv2D(6, 3, padding="same", use_bias=False, name="first")(inner_inputs)
    y = layers.ReLU()(BN(name="norm")(y))
    z = BN(name="norm_2")(layers.Conv2D(6, 1, name="second")(y))
    backbone = keras.Model(inner_inputs, ops.relu(z + y), name="backbone")
    images, rows = keras.Input((8, 8, 3), name="images"), keras.Input((5,), name="rows")
    flat = ops.reshape(BN(name="last")(backbone(images, training=False)), (-1, 384))
    tail = keras.Sequential([layers.Dense(4), BN()], name="tail")
    return keras.Model([images, rows], {"sum": layers.Dense(4)(flat) + tail(rows), "flat": flat})


def test_nested_models_and_functions_are_looked_into():
    folded, report = check(nested(), [drawn((2, 8, 8, 3)), drawn((2, 5))], changed=3)
    assert [edit.path for edit in report.done] == ["backbone/norm", "backbone/norm_2", report.done[2].path]
    assert report.done[2].path.startswith("tail/")
    assert [edit.path for edit in report.kept] == ["last"]
    assert isinstance(folded.get_layer("backbone").get_layer("norm"), layers.Identity)
    folded.get_config()  # which an identity of an unwritten type would not have


def test_a_frozen_model_inside_stays_frozen():
    model = nested()
    model.get_layer("backbone").trainable = False
    folded, _ = check(model, [drawn((2, 8, 8, 3)), drawn((2, 5))])
    assert not folded.get_layer("backbone").trainable_variables
    assert folded.get_layer("tail").trainable_variables


def branch(where):
    x = keras.Input((6,))
    dense, norm = layers.Dense(6, name="dense"), BN(name="norm")
    y = dense(x)
    z = norm(y)
    if where == "input read again":
        return keras.Model(x, ops.relu(z) + y)
    if where == "called twice":
        return keras.Model(x, ops.relu(norm(ops.relu(z))))
    if where == "map called twice":
        return keras.Model(x, ops.relu(dense(ops.relu(z))))
    if where == "output read again":
        norm = BN(name="norm_2")
        z = norm(ops.relu(y))
        return keras.Model(x, layers.Dense(6)(z) + z)
    return keras.Model(x, norm(dense(x), training=True))


REFUSED = {
    **{
        where: (lambda where=where: branch(where), reason)
        for where, reason in {
            "input read again": "the output of linear at dense before it is read 2 times",
            "called twice": "it is called 2 times",
            "map called twice": "linear at dense has a weight that is used 2 times",
            "output read again": "relu is before it; add is behind it|relu at .* is before it; add at .* is behind it",
            "training": "norm is called with training=True",
        }.items()
    },
    "activation within": (
        lambda: sequential(layers.Dense(6, activation="relu", name="dense"), BN(), shape=(6,)),
        "relu at dense is before it",
    ),
    "padding": (
        lambda: sequential(layers.Reshape((6, 1)), BN(), layers.Conv1D(2, 3, padding="same"), shape=(6,)),
        "reach beyond the input",
    ),
    "zeros beside": (
        lambda: sequential(layers.Reshape((6, 1)), BN(), layers.ZeroPadding1D(1), layers.Conv1D(2, 3), shape=(6,)),
        "adds zeros",
    ),
    "shift before a separable one": (
        lambda: sequential(layers.Reshape((6, 1)), BN(), layers.SeparableConv1D(2, 3), shape=(6,)),
        "there is no place for a bias beside .*depthwise_kernel",
    ),
    "mask": (
        lambda: sequential(
            layers.Reshape((6, 1)), layers.Masking(), layers.Dense(3), ours.BatchNormalization(), shape=(6,)
        ),
        "it takes more than one input",
    ),
    "within a wrapper": (
        lambda: sequential(layers.Reshape((3, 2)), layers.Dense(2), layers.TimeDistributed(BN()), shape=(6,)),
        "it is not called as a layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_folded_stays_and_the_report_says_why(case):
    make, reason = REFUSED[case]
    _, report = check(make(), drawn((3, 6)))
    assert any(re.search(reason, edit.reason) for edit in report.kept), report


def test_a_fold_that_changes_the_outputs_is_taken_back(monkeypatch):
    """The second of two folds is wrong: it alone is left out."""
    from normkit.keras.folding import _Opened

    values_of = _Opened._values

    def wrong(self, folds):
        found = values_of(self, folds)
        return {path: 1.01 * value if path == "two.kernel" else value for path, value in found.items()}

    monkeypatch.setattr(_Opened, "_values", wrong)
    stack = [layers.Dense(5, name="one"), BN(), layers.ReLU(), layers.Dense(4, name="two"), BN()]
    folded, report = check(sequential(*stack, shape=(6,)), drawn((3, 6)), changed=1)
    assert re.search("folded, the outputs change by", report.kept[0].reason), report
    assert norms(folded) == [folded.layers[-1]]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_types_and_what_is_trained_are_kept(policy):
    stack = [layers.Dense(5, dtype=policy, trainable=False), BN(dtype=policy), layers.Dense(3, dtype=policy)]
    model = randomized(sequential(*stack, shape=(6,)))
    folded, report = normkit.fold(model, drawn((3, 6)), return_report=True)
    assert len(report.done) == 1
    assert [layer.dtype_policy.name for layer in folded.layers] == [policy] * 3
    assert [layer.trainable for layer in folded.layers] == [False, True, True]
    wide = normkit.fold(sequential_of(model, "float32"), drawn((3, 6)))
    kept, exact = (one.layers[0].kernel for one in (folded, wide))
    spacing = 2.0**-8 if policy == "bfloat16" else 2.0**-23  # the product is rounded once, to the type of the weight
    a, b = (ops.convert_to_numpy(ops.cast(one.value, "float32")) for one in (kept, exact))
    assert np.abs(a - b).max() <= spacing * np.abs(b).max()


def sequential_of(model, dtype):
    """The same values in another type."""
    twin = keras.models.clone_model(
        model, clone_function=lambda one: type(one).from_config({**one.get_config(), "dtype": dtype})
    )
    for mine, its in zip(model.variables, twin.variables, strict=True):
        its.assign(ops.cast(mine.value, dtype))
    return twin


def test_a_compiled_model_is_compiled_again_by_hand():
    model = randomized(sequential(layers.Dense(4), BN(), layers.Dense(1), shape=(6,)))
    model.compile("sgd", loss=lambda y, z: ops.mean(ops.square(y - z)))  # a loss that no config can name
    folded, report = normkit.fold(model, drawn((3, 6)), return_report=True)
    assert model.compiled
    assert not folded.compiled
    assert "compile it" in str(report)
    folded.compile("sgd", loss="mse")
    folded.fit(drawn((8, 6)), drawn((8, 1)), verbose=0)


def test_a_sequence_without_an_input_layer():
    model = keras.Sequential([layers.Dense(4), BN()])
    with pytest.raises(NormError, match="must be built"):
        normkit.fold(model, drawn((3, 6)))
    model.build((None, 6))
    check(model, drawn((3, 6)), changed=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"inplace": True}, "`inplace` must be False for Keras"), ({"optimizer": "sgd"}, "`optimizer` must be None")],
)
def test_what_keras_cannot_do(options, said):
    with pytest.raises(NormError, match=said):
        normkit.fold(sequential(layers.Dense(4), BN(), shape=(6,)), drawn((3, 6)), **options)


def test_a_model_of_a_class_of_its_own_is_refused():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return self.dense(x)

    model = Own()
    model(drawn((2, 3)))
    with pytest.raises(NormError, match="must be a Sequential or Functional model"):
        normkit.fold(model, drawn((2, 3)))
