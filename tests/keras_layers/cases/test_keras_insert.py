"""Norms go into Keras models where their calls say, nothing else changes, and the report says why."""

import re

import keras
import numpy as np
import pytest
from keras import layers, ops

import normkit
from normkit import keras as ours
from normkit.errors import NormError

# Of the largest output, the limit for float32.
CLOSE = 1e-5
FIRST = "channels_first"
BACKEND = keras.config.backend()
once = pytest.mark.skipif(BACKEND != "torch", reason="plans and words are the same on every backend")
RNG = np.random.default_rng(0)
BN = layers.BatchNormalization


def drawn(*shape):
    return RNG.normal(size=shape).astype("float32")


def randomized(model):
    for variable in model.trainable_variables:
        variable.assign(drawn(*variable.shape))
    return model


def array(x):
    return np.array(ops.convert_to_numpy(x))


def outputs(model, x, training=False):
    return [array(y) for y in keras.tree.flatten(model(x, training=training))]


def values(model):
    return {variable.path: array(variable.value) for variable in model.variables}


def close(before, after):
    for one, other in zip(before, after, strict=True):
        assert np.abs(one - other).max() <= CLOSE * np.abs(one).max()


def names(model):
    return [layer.name for layer in model.layers]


def places(report):
    return [edit.path for edit in report.done]


def sequential(*stack, shape=(6,)):
    return randomized(keras.Sequential([keras.Input(shape), *stack]))


def small(**options):
    return sequential(
        layers.Conv2D(4, 3, activation="relu", name="conv", **options),
        layers.SeparableConv2D(5, 2, name="separable"),
        layers.LeakyReLU(name="leaky"),
        layers.Flatten(name="flat"),
        layers.Dense(3, activation="softmax", name="head"),
        shape=(6, 6, 3),
    )


def nested():
    """A frozen backbone inside, a skip connection, functions between layers, two inputs, two outputs."""
    pixels = keras.Input((8, 8, 3))
    y = layers.Conv2D(6, 3, padding="same", activation="gelu", name="first")(pixels)
    z = layers.DepthwiseConv2D(3, padding="same", name="second")(y)
    backbone = keras.Model(pixels, ops.relu(z + y), name="backbone")
    images, rows = keras.Input((8, 8, 3), name="images"), keras.Input((5,), name="rows")
    flat = layers.Flatten(name="flat")(backbone(images, training=False))
    stack = [layers.Dense(4, name="wide", dtype="mixed_bfloat16"), layers.ReLU(name="act", dtype="mixed_bfloat16")]
    tail = keras.Sequential(stack, name="tail")
    joined = ops.concatenate([ops.silu(layers.Dense(4, name="narrow")(flat)), ops.cast(tail(rows), "float32")])
    model = keras.Model([images, rows], {"label": layers.Dense(3, name="label")(joined), "flat": flat})
    randomized(model)
    backbone.trainable = False
    return model, [drawn(4, 8, 8, 3), drawn(4, 5)]


TAIL = {"before": ["wide", "wide_norm", "act"], "after": ["wide", "act", "act_norm"]}
GAINED = {"before": {"first_norm", "first_activation", "second_norm"}, "after": {"first_norm"}}


@pytest.mark.parametrize("placement", ["before", pytest.param("after", marks=once)])
def test_nested_models_give_the_same_with_identity(placement, tmp_path):
    model, x = nested()
    before, held = outputs(model, x), values(model)
    result, report = normkit.insert(model, "batch", x, init="identity", placement=placement, return_report=True)
    assert places(report)[0] == "backbone/first", report
    assert len(report.done) == 4, report
    assert [edit.path for edit in report.kept] == ["label"]
    assert report.how == "functional"
    # Of the part in bfloat16 every value is rounded twice more, by 2^-9, and that of 3 layers behind it adds up.
    assert report.difference <= 2.0**-6
    close(before[:1], outputs(result, x)[:1])  # which does not depend on that part
    new, old = result.get_layer("backbone"), model.get_layer("backbone")
    assert {name for name in set(names(new)) - set(names(old)) if name in GAINED["before"]} == GAINED[placement]
    assert names(result.get_layer("tail")) == TAIL[placement]
    assert {layer.dtype_policy.name for layer in result.get_layer("tail").layers} == {"mixed_bfloat16"}
    assert not new.trainable_variables
    assert len(result.trainable_variables) > len(model.trainable_variables)
    assert type(result) is type(model)
    assert all(np.array_equal(value, held[path]) for path, value in values(model).items())
    kernels = [(v.path, array(v.value)) for v in result.variables if v.name == "kernel"]
    assert len(kernels) == 5
    assert all(np.array_equal(value, held[path]) for path, value in kernels)
    result.save(tmp_path / "model.keras")
    close(outputs(result, x), outputs(keras.models.load_model(tmp_path / "model.keras"), x))


@once
@pytest.mark.parametrize("norm", ["batch", "ghost", "renorm", "instance", "group", "layer", "rms"])
def test_what_comes_out_is_the_norm_of_what_the_map_gave(norm):
    """In training, against the parts called one by one."""
    model, x = small(), drawn(4, 6, 6, 3)
    result = normkit.insert(model, norm, x, after="conv")
    assert names(result) == ["conv", "conv_norm", "conv_activation", *names(model)[1:]]
    conv, twin = model.layers[0], result.layers[1]
    twin = type(twin).from_config(twin.get_config())
    raw = ops.conv(x, conv.kernel, data_format="channels_last") + conv.bias
    y = ops.relu(twin(raw, training=True))
    for layer in model.layers[1:]:
        y = layer(y)
    close([array(y)], outputs(result, x, training=True))
    assert result.layers[0].use_bias == (norm not in ("batch", "ghost", "renorm", "instance"))


def test_a_bias_that_goes_is_in_what_is_kept():
    model, x = small(), drawn(4, 6, 6, 3)
    result, report = normkit.insert(model, "batch", x, return_report=True)
    np.testing.assert_array_equal(array(result.get_layer("conv_norm").moving_mean.value), -array(model.layers[0].bias))
    assert [layer.use_bias for layer in (result.layers[0], result.get_layer("separable"))] == [False, False]
    assert all("its bias goes" in edit.reason for edit in report.done)
    # Fresh statistics, 0 and 1 before the bias went: a norm divides by sqrt(1 + eps), and relu passes that on.
    part = keras.Model(result.layers[0].input, result.get_layer("conv_activation").output)
    close([array(model.layers[0](x)) / np.sqrt(1 + result.get_layer("conv_norm").epsilon)], outputs(part, x))


def test_the_calibrated_statistics_count_as_a_batch():
    """A further batch is averaged with them and does not take their place."""
    model, x = small(), drawn(8, 6, 6, 3)
    result = normkit.insert(model, "batch", x, after="conv", init="identity")
    norm = result.get_layer("conv_norm")
    kept = array(norm.moving_mean.value)
    np.testing.assert_allclose(array(norm.beta.value), kept + array(model.layers[0].bias), rtol=1e-5, atol=1e-5)
    result(x + 10, training=True)
    moved = array(norm.moving_mean.value)
    raw = ops.conv(x + 10, model.layers[0].kernel, data_format="channels_last")
    other = array(ops.mean(raw, (0, 1, 2)))
    share = 1 / (1 + norm.momentum)  # (1 - m) / (1 - m^2), debiased, at the second batch
    np.testing.assert_allclose(moved, kept + share * (other - kept), rtol=1e-4, atol=1e-4 * np.abs(other).max())


@pytest.mark.skipif(BACKEND == "tensorflow", reason="needs convolutions with the channels first")
@pytest.mark.parametrize("norm", ["batch", pytest.param(lambda _, axis=-1: BN(axis=axis), marks=once)])
def test_channels_may_come_first(norm):
    stack = [layers.Conv2D(4, 3, activation="relu", data_format=FIRST), layers.Flatten(), layers.Dense(2)]
    model, x = sequential(*stack, shape=(3, 6, 6)), drawn(4, 3, 6, 6)
    result, report = normkit.insert(model, norm, x, init="identity", return_report=True)
    assert result.layers[1].axis == 1
    assert array(result.layers[1].gamma.value).shape == (4,)
    close(outputs(model, x), outputs(result, x))
    assert report.difference <= CLOSE


@once
def test_stock_layers_give_a_stock_model(tmp_path):
    model, x = small(), drawn(4, 6, 6, 3)
    frozen = model.layers[0]
    frozen.trainable = False
    model.compile("sgd", loss="mse")
    result, report = normkit.insert(model, lambda channels: BN(momentum=0.9), x, return_report=True)
    assert model.compiled
    assert not result.compiled
    assert "compile it" in str(report)
    assert all(type(layer).__module__.startswith("keras.") for layer in result.layers)
    assert [layer.trainable for layer in result.layers[:4]] == [False, False, True, True]
    assert result.layers[1].momentum == 0.9
    result.save(tmp_path / "model.keras")
    close(outputs(result, x), outputs(keras.models.load_model(tmp_path / "model.keras"), x))


@once
def test_a_function_may_give_one_layer_with_values_again_and_again():
    norm = ours.RMSNormalization()
    norm.build((None, 4))
    norm.scale.assign([1.0, 2.0, 3.0, 4.0])
    model = sequential(layers.Dense(4, "relu"), layers.Dense(4, "tanh"), layers.Dense(2))
    result = normkit.insert(model, lambda channels: norm, drawn(3, 6))
    made = [layer for layer in result.layers if isinstance(layer, ours.RMSNormalization)]
    assert len({id(layer) for layer in [norm, *made]}) == 3
    assert all(array(layer.scale.value).tolist() == [1, 2, 3, 4] for layer in made)


AFTER = {
    "a class": (layers.Conv2D, ["conv"]),
    "a path, whatever follows": ("head", ["head"]),
    "a function": (lambda path, layer: path.startswith("s"), ["separable"]),
    "several": (["separable", layers.Conv2D], ["conv", "separable"]),
}


@once
@pytest.mark.parametrize("case", AFTER)
def test_after_names_layers(case):
    after, found = AFTER[case]
    report = normkit.insert(small(), "layer", drawn(2, 6, 6, 3), after=after, dry_run=True)
    assert places(report) == found


@once
def test_the_last_ones_too():
    stack = [layers.Dense(4, activation=layers.ELU()), layers.Dense(3, activation="tanh", name="head")]
    result = normkit.insert(sequential(*stack), "rms", drawn(2, 6), except_last=False)
    kinds = ["Dense", "RMSNormalization", "ELU", "Dense", "RMSNormalization", "Activation"]
    assert [type(layer).__name__ for layer in result.layers] == kinds
    assert names(result)[3:] == ["head", "head_norm", "head_activation"]


@once
def test_names_that_are_taken():
    stack = [layers.Dense(4, "relu", name="a"), layers.Dense(4, "relu", name="a_norm"), layers.Dense(2, name="b")]
    result = normkit.insert(sequential(*stack), "batch", drawn(2, 6))
    assert names(result) == ["a", "a_norm_1", "a_activation", "a_norm", "a_norm_norm", "a_norm_activation", "b"]


@once
def test_behind_a_function_and_in_front_of_what_reads_it():
    x = keras.Input((6,))
    y = ops.relu(layers.Dense(4, name="a")(x))
    model = randomized(keras.Model(x, layers.Dense(2, name="b")(ops.tanh(y))))
    result, report = normkit.insert(model, "batch", drawn(8, 6), placement="after", init="identity", return_report=True)
    assert len(report.done) == 1
    norm = next(layer for layer in result.layers if "norm" in layer.name)
    assert type(norm._inbound_nodes[0].input_tensors[0]._keras_history.operation).__name__ == "Relu"
    assert report.difference <= CLOSE


def _branch(where):
    x = keras.Input((6,))
    dense, act = layers.Dense(6, name="dense"), layers.ReLU()
    if where == "called twice":
        return keras.Model(x, layers.Dense(2)(act(dense(act(dense(x))))))
    if where == "shared model":
        inner = keras.Sequential([keras.Input((6,)), dense, act], name="inner")
        return keras.Model(x, layers.Dense(2)(inner(inner(x))))
    if where == "gate":
        return keras.Model(x, layers.Dense(2)(x * ops.sigmoid(dense(x))))
    if where == "attention":
        y = layers.Reshape((2, 3))(dense(x))
        return keras.Model(x, layers.Dense(2)(layers.Attention()([y, y])))
    return keras.Model(x, layers.Dense(2)(layers.Bidirectional(layers.GRU(2))(layers.Reshape((2, 3))(dense(x)))))


def _custom(x):
    return ops.relu(x)


REFUSED = {
    **{
        where: (lambda where=where: _branch(where), reason)
        for where, reason in {
            "called twice": "it is called 2 times: one norm would see several distributions",
            "shared model": "it is called 2 times",
            "gate": "sigmoid.* makes it a gate of other values",
            "attention": "its output goes into attention",
            "unknown": "what reads its output could not be seen",
        }.items()
    },
    "norm": (
        lambda: sequential(layers.Dense(4), BN(name="bn"), layers.ReLU(), layers.Dense(2)),
        "BatchNormalization at bn normalizes its output already",
    ),
    "a norm of ours alone": (
        lambda: sequential(layers.Dense(4), ours.DynamicTanh(), layers.Dense(2)), "normalizes its output already",
    ),
    "nothing between": (
        lambda: sequential(layers.Dense(4, name="a"), layers.Dense(2, "relu")), "no activation stands between it and",
    ),
    "weights": (
        lambda: sequential(layers.Dense(4, activation=layers.PReLU()), layers.Dense(2)),
        "its activation has weights",
    ),
    "regularizer": (
        lambda: sequential(layers.Dense(4, activation="relu", activity_regularizer="l2"), layers.Dense(2)),
        "its `activity_regularizer` looks at",
    ),
    "head": (lambda: sequential(layers.Dense(4, "softmax")), "no linear map follows it"),
}  # fmt: skip


@once
@pytest.mark.parametrize("case", REFUSED)
def test_what_gets_no_norm_and_why(case):
    make, reason = REFUSED[case]
    report = normkit.insert(make(), "batch", drawn(3, 6), dry_run=True)
    assert any(re.search(reason, edit.reason) for edit in report.kept), report


@once
def test_an_activation_of_the_users_is_one():
    model = sequential(layers.Dense(4, activation=_custom, name="a"), layers.Dense(2))
    result, report = normkit.insert(model, "batch", drawn(3, 6), return_report=True)
    assert places(report) == ["a"]
    assert result.layers[2].activation is _custom


@once
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"inplace": True}, "`inplace` must be False for Keras"),
        ({"optimizer": "sgd"}, "`optimizer` must be None for Keras"),
        ({"norm": "bach"}, 'hint: .*batch'),
        ({"norm": BN}, "`norm` must be a short name, or a function from the number of channels to a layer"),
        ({"norm": BN()}, "`norm` must be a short name, or a function from the number of channels to a layer"),
        ({"norm": lambda channels: "batch"}, "`norm` must give a keras.layers.Layer; got str"),
        ({"norm": "instance"}, "must have positions to take statistics over"),
        ({"init": "identity", "norm": "layer"}, '`init="identity"` needs norms with kept statistics'),
        ({"after": "denze"}, "every entry of `after` must mean a layer of the model"),
        ({"after": "inner"}, "it is a model: name the layers in it"),
        ({"example": drawn(3, 7)}, "7"),
        ({"placement": "behind"}, "`placement` must be"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, said):
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(4, "relu")], name="inner")
    model = sequential(inner, layers.Dense(2))
    with pytest.raises((NormError, ValueError), match=said):
        normkit.insert(model, **{"norm": "batch", "example": drawn(3, 6), **arguments})


@once
def test_models_that_cannot_be_looked_into():
    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(NormError, match="must be a Sequential or Functional model"):
        normkit.insert(Own(), "batch", drawn(2, 3))
    with pytest.raises(NormError, match="must be built"):
        normkit.insert(keras.Sequential([layers.Dense(4)]), "batch", drawn(2, 3))
