"""Norms of Keras models become other norms, with all that both have, or go; the original stays as it was."""

import re

import keras
import numpy as np
import pytest
from keras import layers, ops

import normkit
from normkit import keras as ours
from normkit.errors import NormError

# Of the largest output: some roundings of float32 in one norm and a dense layer behind it.
CLOSE = 1e-6
BACKEND = keras.config.backend()
once = pytest.mark.skipif(BACKEND != "torch", reason="plans and words are the same on every backend")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 5, 4, 8)).astype("float32")


def array(x):
    return np.array(ops.convert_to_numpy(x))


def outputs(model, x=X):
    return array(model(x, training=False))


def values(layer):
    return [array(variable.value) for variable in layer.variables]


def randomized(model):
    for variable in model.variables:
        if variable.dtype.startswith(("float", "bfloat")):
            variable.assign(RNG.uniform(0.5, 1.5, size=variable.shape))
    return model


def around(norm, shape=(None, 4, 8)):
    return randomized(keras.Sequential([keras.Input(shape), norm, layers.ReLU(), layers.Dense(3, name="last")]))


MAKE = {
    "batch": lambda: layers.BatchNormalization(epsilon=0.1, momentum=0.8, name="norm"),
    "ghost": lambda: ours.GhostBatchNormalization(virtual_batch_size=2, name="norm"),
    "renorm": lambda: ours.BatchRenormalization(momentum=0.8, name="norm"),
    "instance": lambda: ours.InstanceNormalization(name="norm"),
    "group": lambda: layers.GroupNormalization(4, epsilon=0.1, name="norm"),
    "layer": lambda: layers.LayerNormalization(epsilon=0.1, name="norm"),
    "rms": lambda: layers.RMSNormalization(epsilon=0.1, name="norm"),
}
KEEPING = ("batch", "ghost", "renorm")
OVER = {"instance": (1, 2), "layer": (3,), "rms": (3,)}


def normalized(kind, groups, eps, gamma, beta):
    """In NumPy, for inputs (N, H, W, C)."""
    x = X.astype(np.float64)
    if kind in KEEPING:
        y = x / np.sqrt(1 + eps)  # statistics start at 0 and 1
    elif kind == "group":
        split = x.reshape(*x.shape[:3], groups, -1)
        mean, var = split.mean((1, 2, 4), keepdims=True), split.var((1, 2, 4), keepdims=True)
        y = ((split - mean) / np.sqrt(var + eps)).reshape(x.shape)
    else:
        mean = 0 if kind == "rms" else x.mean(OVER[kind], keepdims=True)
        y = (x - mean) / np.sqrt(np.square(x - mean).mean(OVER[kind], keepdims=True) + eps)
    return y * gamma + beta


PAIRS = [*(("batch", new) for new in MAKE), ("rms", "renorm"), ("instance", "ghost"), ("renorm", "batch"),
         ("group", "group"), ("rms", "layer"), ("layer", "rms"), ("instance", "group"),
         ("group", "instance")]  # fmt: skip


@once
@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_norms_become_others(old, new):
    model = around(MAKE[old]())
    norm = model.layers[0]
    held = values(model)
    result, report = normkit.replace(model, {old: new}, groups=2, example=X, return_report=True)
    made = result.get_layer("norm")
    assert [one.record.kind for one in normkit_sites(result)] == [new]
    assert made.epsilon == norm.epsilon
    assert all(np.array_equal(a, b) for a, b in zip(held, values(model), strict=True))
    assert np.array_equal(array(result.get_layer("last").kernel.value), array(model.get_layer("last").kernel.value))
    if old in KEEPING and new in KEEPING:
        assert made.momentum == norm.momentum
        assert report.difference <= CLOSE
        return
    gamma = array(norm.scale.value if old == "rms" else norm.gamma.value)
    beta = 0.0 if "rms" in (old, new) else array(norm.beta.value)
    wanted = normalized(new, 2, norm.epsilon, gamma, beta)
    found = array(keras.Model(result.layers[0].input, made.output)(X, training=False))
    assert np.abs(found - wanted).max() <= 10 * CLOSE * np.abs(wanted).max()


def normkit_sites(model):
    from normkit.keras.replacement import opened

    return opened(model, None).sites


@pytest.mark.parametrize("new", ["renorm", "group"])
def test_batch_norm_becomes_another_on_every_backend(new, tmp_path):
    model = around(MAKE["batch"]())
    model.compile("sgd", loss="mse")
    result, report = normkit.replace(model, {"batch": new}, example=X, return_report=True)
    norm, made = model.layers[0], result.layers[0]
    if new == "renorm":
        assert report.difference <= CLOSE
    else:
        wanted = normalized("group", made.groups, norm.epsilon, array(norm.gamma.value), array(norm.beta.value))
        assert np.abs(array(made(X)) - wanted).max() <= 10 * CLOSE * np.abs(wanted).max()
    assert not result.compiled
    assert "compile it" in str(report)
    result.save(tmp_path / "model.keras")
    assert np.array_equal(outputs(keras.models.load_model(tmp_path / "model.keras")), outputs(result))


ACCELERATED = {
    "batch": lambda: layers.BatchNormalization(trainable=False, momentum=0.7),
    "channels second": lambda: layers.BatchNormalization(axis=1),
    "mixed types": lambda: layers.BatchNormalization(dtype="mixed_bfloat16", scale=False),
    "one group per channel": lambda: layers.GroupNormalization(-1),
    "over several axes": lambda: layers.LayerNormalization(axis=(2, 3), center=False),
    "RMS": layers.RMSNormalization,
}


@pytest.mark.parametrize("case", [case if case == "batch" else pytest.param(case, marks=once) for case in ACCELERATED])
def test_accelerated_is_the_same_layer_of_ours(case):
    model = around(ACCELERATED[case](), shape=(5, 4, 8))
    result, report = normkit.replace(model, accelerated=True, example=X, return_report=True)
    old, new = model.layers[0], result.layers[0]
    assert type(new) is getattr(ours, type(old).__name__)
    assert all(np.array_equal(a, b) for a, b in zip(values(old), values(new), strict=True))
    shared = old.get_config().items()
    assert {key: new.get_config()[key] for key, _ in shared if "initializer" not in key} == {
        key: value for key, value in shared if "initializer" not in key
    }
    # bfloat16 is rounded at the same places but not by the same sums: one spacing, and as much in the layer behind.
    assert report.difference <= (CLOSE if new.compute_dtype == "float32" else 2.0**-7)


@once
def test_what_is_ours_already_stays():
    with pytest.raises(NormError, match="norm: it is ours already"):
        normkit.replace(around(ours.BatchNormalization(name="norm")), accelerated=True)


def nested():
    """Norms in a frozen model inside, in a sequence without an input layer, shared, in a wrapper, with a mask."""
    inner = keras.Sequential([layers.Dense(8, name="dense"), layers.BatchNormalization(name="a")], name="inner")
    inner.build((None, 5, 4))
    x = keras.Input((5, 4))
    shared = layers.BatchNormalization(name="shared")
    y = layers.Masking()(inner(x))
    y = layers.TimeDistributed(layers.BatchNormalization(name="hidden"), name="each")(shared(ops.relu(shared(y))))
    model = randomized(keras.Model(x, layers.LayerNormalization(name="b")(y, training=False)))
    inner.trainable = False
    return model


@once
def test_norms_are_found_wherever_the_model_calls_them():
    model = nested()
    norms = {"batch": "layer", "b": lambda record: layers.RMSNormalization()}
    result, report = normkit.replace(model, norms, return_report=True)
    assert {edit.path for edit in report.done} == {"inner/a", "shared", "b"}
    assert [edit.reason for edit in report.kept] == ["another layer calls it"]
    assert report.difference is None
    assert type(result.get_layer("inner").get_layer("a")) is ours.LayerNormalization
    assert not result.get_layer("inner").trainable_variables
    assert len(result.get_layer("shared")._inbound_nodes) == 2
    x = X[..., :4].reshape(-1, 5, 4)
    assert array(result(x)).shape == array(model(x)).shape
    gone, report = normkit.remove(model, ["inner/a", layers.LayerNormalization], example=x, return_report=True)
    assert [type(gone.get_layer("inner").get_layer("a")), type(gone.get_layer("b"))] == 2 * [layers.Identity]
    np.testing.assert_array_equal(
        array(gone.get_layer("shared").moving_mean), array(model.get_layer("shared").moving_mean)
    )
    assert report.difference > 0
    # What is left in their place can be changed again, and the outputs are the same with norms that do nothing.
    _, report = normkit.insert(gone, "batch", x, init="identity", after="inner/dense", return_report=True)
    assert report.difference <= 10 * CLOSE


@once
def test_a_key_is_a_path_before_a_class_before_a_short_name():
    stack = [layers.BatchNormalization(name=name) for name in "abc"] + [ours.GhostBatchNormalization(name="d")]
    model = keras.Sequential([keras.Input((4,)), *stack])
    norms = {"batch": "rms", ours.BatchNormalization: "group", "c": "layer"}
    result = normkit.replace(model, norms)
    kinds = ["RMSNormalization", "RMSNormalization", "LayerNormalization", "GroupNormalization"]
    assert [type(layer).__name__ for layer in result.layers] == kinds


@once
def test_a_function_gives_a_layer_with_its_own_values():
    given = ours.GroupNormalization(2, name="other", dtype="float64")
    given.build((None, 8))
    given.gamma.assign(np.arange(8))
    seen = []
    model = around(MAKE["batch"]())
    result = normkit.replace(model, {"batch": lambda record: seen.append(record) or given})
    made = result.layers[0]
    assert made is not given
    assert (made.name, made.dtype, array(made.gamma.value).tolist()) == ("norm", "float32", list(range(8)))
    assert np.array_equal(seen[0].gamma, array(model.layers[0].gamma.value))
    assert seen[0].rate == pytest.approx(0.2)


@once
def test_weights_of_samples_need_a_layer_that_takes_them():
    x, weights = keras.Input((4, 8)), keras.Input((4,))
    y = ours.BatchNormalization(name="norm")(x, sample_weight=weights)
    model = keras.Model([x, weights], y)
    report = normkit.replace(model, {"norm": "rms"}, dry_run=True)
    assert re.search("called with `sample_weight`, which RMSNormalization does not take", report.kept[0].reason)
    result = normkit.replace(model, {"norm": "group"})
    assert len(result.inputs) == 2


@once
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"inplace": True}, "`inplace` must be False for Keras"),
        ({"optimizer": "sgd"}, "`optimizer` must be None for Keras"),
        ({"norms": {"batch": "grup"}}, "hint: .*group"),
        ({"norms": {"bn": "group"}}, "every entry of `norms` must mean a layer of the model"),
        ({"norms": {"last": "group"}}, "every entry of `norms` must mean a layer of the model"),
        ({"norms": "group"}, "`norms` must be a mapping"),
        ({"norms": {"batch": layers.LayerNormalization}}, "values of `norms` must be short names, or functions"),
        ({"norms": {"batch": layers.LayerNormalization()}}, "values of `norms` must be short names, or functions"),
        ({"norms": {"batch": lambda record: "group"}}, "must give a keras.layers.Layer; got str"),
        ({"norms": {"batch": "group"}, "groups": 3}, "`groups` must divide the channels"),
        ({"norms": {"batch": "group"}, "example": X[..., :3]}, "8"),
        ({"norms": None}, "either `norms` or `accelerated=True`"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, said):
    with pytest.raises((NormError, ValueError), match=said):
        normkit.replace(around(MAKE["batch"]()), **{"norms": {"batch": "layer"}, **arguments})


@once
def test_instance_norm_needs_positions():
    model = keras.Sequential([keras.Input((8,)), layers.BatchNormalization()])
    with pytest.raises(NormError, match="instance norm needs axes besides batch and channels"):
        normkit.replace(model, {"batch": "instance"})
    with pytest.raises(NormError, match="every entry of `which` must mean a layer of the model"):
        normkit.remove(model, "layer")


@once
@pytest.mark.parametrize("verb", ["sync", "unsync"])
def test_synchronized_layers_are_made_and_not_exchanged(verb):
    said = r"must be a torch\.nn\.Module; got a model of keras\. hint: make the layers with `synchronized=True`"
    with pytest.raises(NormError, match=said):
        getattr(normkit, verb)(around(MAKE["batch"]()))


@once
def test_models_whose_layers_are_not_known_are_refused():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = layers.BatchNormalization()

        def call(self, x):
            return self.norm(x)

    for model in (Own(), layers.BatchNormalization()):
        with pytest.raises(NormError, match="must be a Sequential or Functional model"):
            normkit.remove(model, "batch")
