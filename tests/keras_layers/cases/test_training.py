"""The door to Keras: networks, the `norm` of a user's function, losses, optimizers and metrics, and their errors."""

from __future__ import annotations

import gc
import random

import keras
import numpy as np
import pytest
from keras import ops

from normkit.core.catalog import CATALOG, STANDARD
from normkit.errors import NormError, NormTypeError, NormValueError
from normkit.experiments import protocol
from normkit.experiments import trial as trials
from normkit.experiments.config import TrialConfig
from normkit.experiments.data import Dataset, Part
from normkit.experiments.feeds import ArrayFeed
from normkit.experiments.protocol import Setup
from normkit.keras import factory, layers, porting, training

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(12, 5)).astype(np.float32)
IMAGES = RNG.normal(size=(12, 2, 9, 8)).astype(np.float32)
LABELS = RNG.integers(0, 3, 12)
NUMBERS = RNG.normal(size=12).astype(np.float32)
VARIANTS = [
    ("none", "before"),
    *((name, position) for name in CATALOG for position in ("before", "after")[: 1 if CATALOG[name].activates else 2]),
]


def setup(model="mlp", **changes):
    values = {
        "shape": (5,), "classes": 3, "norm": "none", "position": "before", "lr": 0.1, "momentum": 0.9,
        "loss": "cross_entropy", "optimizer": "sgd", "metric": "accuracy", "seed": 0, "steps": 100,
    }  # fmt: skip
    return Setup(model=model, **{**values, **changes})


def trainer(model="mlp", **changes):
    return training.trainer(setup(model, **changes))


def linear(outputs=3, **options):
    """A function that gives one dense layer, whatever the norm."""
    return lambda norm: keras.Sequential([keras.Input((5,)), keras.layers.Dense(outputs, **options)])


def normed(norm):
    return keras.Sequential([keras.layers.Dense(8), norm(8, "relu"), keras.layers.Dense(3)])


def array(x):
    return np.array(ops.convert_to_numpy(x))


def numpy_outputs(made, x=TABLE):
    kernel, bias = (array(weight).astype(np.float64) for weight in made.network.layers[0].weights)
    return x @ kernel + bias


def softmax(outputs):
    shifted = np.exp(outputs - outputs.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def numpy_losses(outputs, labels):
    return -np.log(softmax(outputs)[np.arange(len(labels)), labels])


# The module, as the protocol wants it.


def test_the_module_has_everything_that_the_protocol_names():
    module = protocol.training("keras")
    assert module is training
    for name in vars(protocol.Training):
        assert name.startswith("_") or callable(getattr(module, name)), name
    for name in vars(protocol.Trainer):
        assert name.startswith("_") or callable(getattr(training.KerasTrainer, name)), name
    assert list(module.versions()) == ["keras", keras.config.backend()]
    assert all(module.versions().values())


def test_seed_decides_what_is_drawn():
    drawn = []
    for _ in range(2):
        training.seed(3)
        drawn.append(
            [array(keras.random.normal((2,))).tolist(), random.random(), keras.layers.Dense(1).kernel_initializer.seed]
        )
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_no_optimizer_steps_while_a_file_is_imported(kind):
    weight = keras.Variable(np.ones(1, np.float32))
    optimizer = getattr(keras.optimizers, kind)(0.1)
    step = lambda: optimizer.apply_gradients([(ops.ones(1), weight)])  # noqa: E731
    expected = rf"mine.py must not train when it is imported; got a step of {kind}. hint: .*__main__"
    with pytest.raises(NormValueError, match=expected), training.no_training("mine.py"):
        step()
    model = linear()(None)
    model.compile("sgd", "mse")
    with pytest.raises(NormValueError, match="must not train"), training.no_training("mine.py"):
        model.fit(TABLE, np.zeros((12, 3)), verbose=0)
    assert array(weight) == 1
    step()
    assert array(weight) < 1, "afterwards it trains"


def test_short_trainings_leave_nothing_of_the_first_statistics_and_say_so():
    for steps, momentum in ((5, 0.9), (100, 0.9), (200, 0.95), (1000, 0.99), (None, 0.99)):
        said, *more = training.remarks(steps)
        compiles = steps is not None and keras.config.backend() != "torch"
        assert more == ["Steps are compiled before they are timed."] * compiles
        assert f"debiased moving averages with momentum {momentum:g}" in said
        assert ("would still hold" in said) == (momentum < 0.99)
    assert "0.99, would still hold 14% of their first values after 198 steps" in training.remarks(198)[0]
    layer = factory.norm_layer("batch", steps=1000)
    x = (3 + 0.1 * RNG.normal(size=(64, 4))).astype(np.float32)
    layer(x, training=True)
    np.testing.assert_allclose(array(layer.moving_mean), x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(array(layer.moving_variance), x.var(0), rtol=1e-4)


# The embedded models.


COMPARED = [("cnn", "batch"), ("mlp", "renorm")]
if keras.config.backend() == "jax":  # which compiles for many seconds what others run
    COMPARED = COMPARED[:1]
else:
    COMPARED += [("cnn", "none"), ("cnn", "group"), ("cnn", "layer"), ("cnn", "ghost"), ("mlp", "batch:after")]


@pytest.mark.parametrize(("model", "norm"), COMPARED)
def test_outputs_and_first_losses_are_those_of_torch(model, norm):
    """The same weights, data and batches: of images with odd sides and two channels, whose order matters."""
    torch = pytest.importorskip("normkit.torch.training")
    name, _, position = norm.partition(":")
    x, shape = IMAGES, IMAGES.shape[1:]
    asked = setup(model, shape=shape, norm=name, position=position or "before", seed=4, lr=0.01)
    ours, theirs = training.trainer(asked), torch.trainer(asked)
    for kernel, weight in zip(ours.weights().values(), theirs.weights().values(), strict=True):
        np.testing.assert_allclose(np.moveaxis(kernel, (-1, -2), (0, 1)), weight, rtol=1e-6)
    for mode in (False, True):
        one, other = (made.evaluate([(x, LABELS)], as_trained=mode).loss for made in (ours, theirs))
        assert one == pytest.approx(other, abs=1e-4)
    for _ in range(2):
        assert ours.step(x, LABELS) == pytest.approx(theirs.step(x, LABELS), abs=1e-4)
    sites = list(zip(ours.probe(x), theirs.probe(x), strict=True))
    for one, other in sites:
        np.testing.assert_allclose(np.moveaxis(one.input, one.axis, 1), other.input, atol=1e-3)
        assert (one.gamma is None) == (other.gamma is None) == (norm == "none")
        if one.beta is not None:
            np.testing.assert_allclose(one.beta, other.beta, atol=1e-4)
    assert [one.name for one, _ in sites] == [f"relu_{n + 1}" for n in range(len(sites))]


def test_a_network_is_used_again_as_good_as_new():
    """What compiled training costs is paid once: rate and seed are set, everything else begins anew."""

    def run(lr, seed):
        made = trainer("mlp", norm="batch", lr=lr, seed=seed, optimizer="adam")
        first = made.weights()
        losses = [made.step(TABLE, LABELS) for _ in range(3)]
        return made.compiled, first, losses, made.evaluate([(TABLE, LABELS)]).loss

    compiled, *fresh = run(0.01, 0)
    gc.collect()
    other, *_ = run(0.5, 1)
    gc.collect()
    again, *second = run(0.01, 0)
    assert compiled is other is again
    np.testing.assert_equal(second, fresh)
    held = trainer("mlp", norm="batch", optimizer="adam")
    beside = trainer("mlp", norm="batch", optimizer="adam")
    assert held.compiled is not beside.compiled, "two at a time are two"


def test_a_trial_from_end_to_end():
    parts = [Part(RNG.normal(size=(n, 5)).astype(np.float32), np.arange(n) % 3) for n in (60, 12)]
    feed = ArrayFeed(Dataset("made", *parts, classes=3))
    config = TrialConfig(
        framework="keras", model="mlp", code="", data="f", norm="batch", lr=0.01, batch_size=12, inputs="none",
        seed=0, epochs=2, loss="cross_entropy", optimizer="sgd", metric="accuracy",
    )  # fmt: skip
    recipe = trials.Recipe("mlp", "cross_entropy", "sgd", "accuracy", metric_name="accuracy")
    first, second = (trials.run_trial(config, recipe, feed, training) for _ in range(2))
    assert first.steps == 8
    assert not first.diverged
    assert first.train_losses == second.train_losses
    assert first.examples == second.examples
    assert [len(snapshot.sites) for snapshot in first.snapshots] == [10, 10, 10]
    assert dict(first.versions).keys() == {"keras", keras.config.backend()}


@pytest.mark.parametrize(("changes", "said"), [
    ({"model": "cnn", "shape": (1, 3, 9)}, "at least 4 x 4"),
    ({"norm": "instance"}, "instance_norm needs spatial axes"),
    ({"norm": "bach"}, "did you mean batch"),
])  # fmt: skip
def test_embedded_models_that_make_no_sense(changes, said):
    with pytest.raises(NormValueError, match=said):
        trainer(**changes)


# `norm`, as a user's function gets it.


@pytest.mark.parametrize(("name", "position"), VARIANTS)
def test_the_activation_comes_where_the_variant_says(name, position):
    norm = training.norm_factory(name, position, 100)
    x = (RNG.normal(size=(6, 5, 4)) + 0.3).astype(np.float32)
    plain = keras.layers.Identity() if name == "none" else factory.norm_layer(name, steps=100)
    expected = array(plain(np.maximum(x, 0))) if position == "after" else np.maximum(array(plain(x)), 0)
    if name != "none" and CATALOG[name].activates:  # it stands for both
        expected = array(plain(x))
    for activation in ("relu", ops.relu, keras.layers.ReLU()):
        np.testing.assert_allclose(array(norm(activation=activation)(x)), expected, atol=1e-5)
    np.testing.assert_allclose(array(norm(4, "relu")(x)), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["batch", "group", "layer"])
def test_layers_take_channels_second_as_well(name):
    x = RNG.normal(size=(6, 5, 32)).astype(np.float32)
    last, second = (training.norm_factory(name, "before", 100)(axis=axis) for axis in (-1, 1))
    for mode in (True, False):
        turned = array(second(np.swapaxes(x, 1, 2), training=mode))
        np.testing.assert_allclose(np.swapaxes(turned, 1, 2), array(last(x, training=mode)), atol=1e-5)


def test_groups_follow_the_input():
    for shape, groups in (((4, 32), 2), ((4, 5, 32), 8), ((4, 72), 4), ((4, 7), 1)):
        layer = factory.norm_layer("group")
        layer.build(shape)
        assert layer.groups == groups


@pytest.mark.parametrize(("name", "position"), VARIANTS)
def test_the_factory_knows_its_label_and_draws_nothing(name, position):
    state = random.getstate(), str(np.random.get_state())  # noqa: NPY002
    norm = training.norm_factory(name, position, 100)
    norm(8, "relu"), norm(activation=keras.layers.ReLU(), axis=1)
    assert (random.getstate(), str(np.random.get_state())) == state  # noqa: NPY002
    label = name if position == "before" else f"{name}:after"
    assert (norm.name, norm.position, str(norm)) == (label, position, label)


@pytest.mark.parametrize("name", ["none", *CATALOG])
def test_models_with_it_can_be_saved_and_loaded(name, tmp_path):
    norm = training.norm_factory(name, "before", 100)
    model = keras.Sequential([keras.Input((5, 32)), norm(activation="relu"), keras.layers.Dense(2)])
    x = RNG.normal(size=(3, 5, 32)).astype(np.float32)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(array(loaded(x)), array(model(x)), atol=1e-6)


def test_layers_are_real_ones():
    norm = training.norm_factory("batch", "before", None)
    assert type(norm(8)) is layers.BatchNormalization
    assert isinstance(norm(), keras.layers.BatchNormalization)
    assert type(training.norm_factory("none", "before", None)(8)) is keras.layers.Identity


CALLS = {
    "after without a place": ("after", lambda norm: norm(64), NormValueError,
                              r"batch:after stands after the activation, so `norm` must be given the activation too; "
                              r'got no activation. hint: norm\(activation="relu"\)'),
    "no number": ("before", lambda norm: norm("relu"), NormError, "`num_features` must be a whole number"),
    "axis": ("before", lambda norm: norm(axis=2), NormValueError, "`axis` must be -1 or 1; got 2"),
    "a class": ("before", lambda norm: norm(activation=keras.layers.ReLU), NormTypeError, "got the class ReLU"),
    "a number": ("before", lambda norm: norm(8, 3), NormTypeError, "must be a name, a function or a layer; got 3"),
    "a name": ("before", lambda norm: norm(activation="rely"), NormValueError, "a name that Keras knows.*got 'rely'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_calls_of_norm_that_cannot_be_meant(case):
    position, call, kind, text = CALLS[case]
    with pytest.raises(kind, match=text):
        call(training.norm_factory("batch", position, None))


# The user's function.


class Residual(keras.Model):
    """Made of attributes and a list, and without an argument `training`."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.norms = keras.layers.Dense(8), [norm(), norm(activation="relu")]
        self.last = keras.layers.Dense(3)

    def call(self, x):
        x = self.norms[0](self.first(x))
        return self.last(x + self.norms[1](x))


@pytest.mark.parametrize("build", [normed, lambda norm: Residual(norm)])
@pytest.mark.parametrize("norm", ["batch", "group", "rms"])
def test_every_variant_of_a_seed_starts_from_the_same_weights(norm, build):
    plain = trainer(build).weights()
    made = trainer(build, norm=norm)
    assert made.weights().keys() == plain.keys() == {"layer 0", "layer 1"}
    for key in plain:
        np.testing.assert_array_equal(made.weights()[key], plain[key])
    assert not np.array_equal(trainer(build, seed=1).weights()["layer 0"], plain["layer 0"])
    if norm == "batch":
        assert made.step(TABLE, LABELS) > made.step(TABLE, LABELS)


def test_images_come_to_the_model_with_their_channels_last():
    def build(norm):
        return keras.Sequential([keras.layers.Conv2D(3, 3), norm(), keras.layers.GlobalAveragePooling2D()])

    made = trainer(build, norm="batch", shape=(2, 9, 8))
    assert made.network.layers[0].kernel.shape == (3, 3, 2, 3)
    losses = [made.evaluate([(x, LABELS)]).loss for x in (IMAGES, IMAGES.transpose(0, 2, 3, 1))]
    assert losses[0] == losses[1], "those that have them last already are left alone"
    made.step(IMAGES, LABELS)


def raising(norm):
    raise ValueError("no such thing")


def two_arguments(norm, width):
    return linear()(norm)


def without_norm():
    return linear()(None)


def hides(norm):
    norm()
    return normed(norm)


_models: list[keras.Model] = []


def keeps(norm):
    """Gives the model of an earlier variant."""
    _models.append(normed(norm))
    return _models[0]


def fits_not(norm):
    return keras.Sequential([norm(), keras.layers.Dense(3), keras.layers.Reshape((7,))])


BUILDS = {
    "raises": (raising, r"raising raised ValueError: no such thing \(line \d+ of test_training.py\)"),
    "takes nothing": (without_norm, "must have a linear map that a norm can follow; got dense"),
    "takes more": (two_arguments, r"must take a parameter `norm` or nothing, and no other .*\(missing.*'width'\)"),
    "has a call of its own": (lambda: Residual(lambda **_: keras.layers.ReLU()), "or take `norm`; got Residual"),
    "returns nothing": (lambda norm: None, "must return a Keras model; got NoneType"),
    "returns a class": (lambda norm: keras.Model, "must return a Keras model; got the class"),
    "returns a tensor": (lambda norm: norm()(keras.Input((5,))), "must return a Keras model; got KerasTensor"),
    "does not call norm": (linear(), "does not use the norm it was given: .*got no call of norm"),
    "hides a layer": (hides, "hides does not use the norm it was given: .*got 1 of 2 that are not"),
    "has no parameters": (lambda norm: keras.Sequential([norm(), keras.layers.ReLU()], trainable=False), "to train"),
    "does not fit the data": (fits_not, "raised .*"),
    "lets the factory speak": (lambda norm: norm(0), "`num_features` must be a whole number of at least 1; got 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BUILDS)
def test_functions_that_give_no_usable_network(case):
    build, text = BUILDS[case]
    with pytest.raises(NormValueError, match=text):
        trainer(build, norm="batch", example=lambda: TABLE)


def bare():
    return keras.Sequential([keras.layers.Dense(8, activation="relu"), keras.layers.Dense(3)])


def with_norms():
    first = keras.initializers.Constant(0.25)
    norm = keras.layers.LayerNormalization(gamma_initializer=first)
    return keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(8), norm, keras.layers.ReLU(), keras.layers.Dense(3)]
    )


EVERYWHERE = [("none", "before"), ("batch", "before"), ("batch", "after")]
RECORDED = [(name, position) for name, position in VARIANTS if name in ("none", *STANDARD)]
ONCE = RECORDED if keras.config.backend() == "torch" else EVERYWHERE


@pytest.mark.parametrize(("norm", "position"), ONCE)
@pytest.mark.parametrize("build", [bare, with_norms])
def test_a_function_without_norm_gets_that_of_the_variant(build, norm, position):
    """Inserted, or in the place of those that are there; all variants start from the same weights."""
    asked = {"norm": norm, "position": position, "example": lambda: TABLE}
    if norm == "instance" or (build is with_norms and position == "after"):
        with pytest.raises(NormValueError, match=r"positions to take statistics|model without norms"):
            trainer(build, **asked)
        return
    made = trainer(build, **asked)
    found = [porting.read(layer) for _, layer in porting.walk(made.network)]
    assert [record.kind for record in found] == ([] if norm == "none" else [norm])
    assert all(record.gamma[0] == (1.0 if build is bare else 0.25) for record in found)
    plain = trainer(bare, example=lambda: TABLE).weights()
    assert all(np.array_equal(value, plain[name]) for name, value in made.weights().items())
    if (norm, position) == ("batch", "before") and build is bare:
        assert made.step(TABLE, LABELS) > 0
        assert not np.array_equal(made.weights()["layer 0"], plain["layer 0"])


def test_norms_with_a_formula_of_their_own_are_inserted_only_where_an_activation_may_stay():
    made = trainer(bare, norm="dyt", example=lambda: TABLE)
    assert "DynamicTanh" in [type(layer).__name__ for layer in made.network.layers]
    for build, norm in ((bare, "frn"), (with_norms, "dyt")):
        with pytest.raises(NormValueError, match=rf"{norm} must be given its place by {build.__name__}"):
            trainer(build, norm=norm, example=lambda: TABLE)


def test_images_with_their_channels_first_are_turned_for_a_function_without_norm():
    def build():
        shape = (9, 8, 2) if keras.config.image_data_format() == "channels_last" else (2, 9, 8)
        stack = [keras.layers.Conv2D(3, 3, activation="relu"), keras.layers.Flatten(), keras.layers.Dense(3)]
        return keras.Sequential([keras.Input(shape), *stack])

    made = trainer(build, norm="batch", shape=(2, 9, 8), example=lambda: IMAGES)
    assert [type(layer).__name__ for layer in made.network.layers][:3] == ["Conv2D", "BatchNormalization", "Activation"]


def test_a_model_that_is_kept_between_variants_does_not_use_its_norm():
    trainer(keeps, norm="batch")
    with pytest.raises(NormValueError, match=r"keeps does not use the norm it was given: .*got 1 of 1 that are not"):
        trainer(keeps, norm="batch")


def test_a_model_without_known_inputs_must_be_built():
    with pytest.raises(NormValueError, match=r"must be built, .*begin it with keras.Input"):
        trainer(lambda norm: keras.Sequential([keras.layers.Dense(3)]), shape=())


# One step, and what is learned by.


@pytest.mark.parametrize("activation", [None, "softmax"])
def test_two_steps_of_sgd_with_momentum_against_numpy(activation):
    """From logits, and from the shares of a softmax at the end of the model, which is the same."""
    made = trainer(linear(activation=activation))
    kernel, bias = (array(weight).astype(np.float64) for weight in made.network.layers[0].weights)
    velocity = [np.zeros_like(kernel), np.zeros_like(bias)]
    for _ in range(2):
        outputs = TABLE @ kernel + bias
        expected = numpy_losses(outputs, LABELS).mean()
        assert made.evaluate([(TABLE, LABELS)]).loss == pytest.approx(expected, rel=1e-5)
        slope = (softmax(outputs) - np.eye(3)[LABELS]) / len(LABELS)
        velocity = [0.9 * v + g for v, g in zip(velocity, (TABLE.T @ slope, slope.sum(0)), strict=True)]
        kernel, bias = kernel - 0.1 * velocity[0], bias - 0.1 * velocity[1]
        assert made.step(TABLE, LABELS) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(made.weights()["layer 0"], kernel, atol=1e-6)


@pytest.mark.parametrize("name", ["mse", "mae"])
def test_outputs_take_the_shape_of_the_targets(name):
    """Without that, (12, 1) and (12,) would spread to (12, 12)."""
    made = trainer(linear(1), loss=name, metric="loss")
    error = numpy_outputs(made)[:, 0] - NUMBERS
    each = error**2 if name == "mse" else np.abs(error)
    scores = made.evaluate([(TABLE[:5], NUMBERS[:5]), (TABLE[5:], ops.convert_to_tensor(NUMBERS[5:]))])
    np.testing.assert_allclose(scores.examples, each, rtol=1e-4, atol=1e-6)
    assert scores.loss == scores.metric == pytest.approx(each.mean(), rel=1e-5)
    assert made.step(TABLE, NUMBERS) == pytest.approx(each.mean(), rel=1e-5)


def test_optimizers_by_name_and_of_the_users():
    def steps_with(optimizer):
        made = trainer(linear(), optimizer=optimizer)
        for _ in range(3):
            made.step(TABLE, LABELS)
        return made.weights()["layer 0"]

    first = trainer(linear()).weights()["layer 0"]
    adam, adamw = steps_with("adam"), steps_with("adamw")
    assert 0.2 < np.abs(adam - first).max() < 0.31, "Adam moves by about the rate"
    assert not np.array_equal(adam, adamw), "AdamW lets weights decay"
    np.testing.assert_array_equal(
        steps_with("sgd"), steps_with(lambda parameters, lr: keras.optimizers.SGD(lr, 0.9 if parameters else 0))
    )


def test_penalties_of_layers_and_losses_of_keras_count():
    """A loss of Keras takes the targets first; a function takes the outputs first."""
    made = trainer(linear(kernel_regularizer=keras.regularizers.L2(0.5)), loss=keras.losses.MeanSquaredError())
    targets = RNG.normal(size=(12, 3)).astype(np.float32)
    penalty = 0.5 * np.square(made.weights()["layer 0"]).sum()
    expected = np.square(numpy_outputs(made) - targets).mean()
    assert made.step(TABLE, targets) == pytest.approx(expected + penalty, rel=1e-5)
    quantile = lambda outputs, targets: ops.mean(ops.maximum(targets - outputs, 0.1 * (outputs - targets)))  # noqa: E731
    made = trainer(linear(), loss=quantile, metric="loss")
    error = numpy_outputs(made) - targets
    assert made.step(TABLE, targets) == pytest.approx(np.maximum(-error, 0.1 * error).mean(), rel=1e-5)


def failing(outputs, targets):
    raise KeyError("x")


FUNCTIONS = {
    "no optimizer": ({"optimizer": lambda parameters, lr: None}, "must return a keras.optimizers.Optimizer; got None"),
    "optimizer raises": ({"optimizer": lambda parameters: None}, "<lambda> raised TypeError"),
    "loss raises": ({"loss": failing}, "failing raised KeyError: 'x'"),
    "no mean": ({"loss": lambda o, y: ops.sum(o, 1)}, r"must return a tensor with one number; got shape \(.*\)"),
    "a float": ({"loss": lambda o, y: 1.0}, "must return a tensor with one number; got float"),
    "metric raises": ({"metric": failing}, "failing raised KeyError: 'x'"),
    "no number": ({"metric": lambda o, y: o}, r"must return one number; got shape \(12, 3\)"),
    "nothing": ({"metric": lambda o, y: None}, "must return one number; got NoneType"),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_functions_that_give_what_cannot_be_used(case):
    changes, text = FUNCTIONS[case]

    def used():
        made = trainer(linear(), **changes)
        made.step(TABLE, LABELS)
        made.evaluate([(TABLE, LABELS)])

    with pytest.raises(NormValueError, match=text):
        used()


@pytest.mark.skipif(keras.config.backend() == "jax", reason="JAX takes a constant for a loss without slope")
def test_a_loss_without_gradient_is_told():
    made = trainer(linear(), loss=lambda outputs, targets: ops.mean(ops.stop_gradient(outputs)))
    with pytest.raises(NormValueError, match="in a way that has a gradient"):
        made.step(TABLE, LABELS)


TARGETS = {
    "label too large": (LABELS + 5, {}, r"needs labels below the number of outputs; got label 7 and 3 outputs. "
                                        r"hint: the last layer needs 8 outputs"),
    "negative label": (LABELS - 1, {}, "got label -1 and 3 outputs. hint: labels count from 0"),
    "floats": (NUMBERS, {}, r"needs labels that are whole numbers; got float32. hint: y.astype\(int\)"),
    "one-hot": (np.eye(3)[LABELS], {}, r"whole numbers; got float32. hint: y.argmax\(-1\)"),
    "a column": (LABELS[:, None], {}, r"got \(12, 3\) and \(12, 1\). hint: y.squeeze\(1\)"),
    "too few": (LABELS[:5], {}, r"needs outputs \(N, \*S, classes\) and labels \(N, \*S\); got \(12, 3\) and \(5,\)"),
    "no array": ("abc", {}, "needs targets that are one array"),
    "other targets": (RNG.normal(size=(12, 2)), {"loss": "mse"}, r"got \(12, 3\) and \(12, 2\)"),
    "other samples": (RNG.normal(size=(6, 6)), {"loss": "mse"}, r"got \(12, 3\) and \(6, 6\)"),
    "accuracy of numbers": (NUMBERS, {"loss": lambda o, y: ops.mean(o)}, "accuracy needs labels that are whole number"),
}  # fmt: skip


@pytest.mark.parametrize("case", TARGETS)
def test_targets_that_do_not_fit_the_outputs(case):
    targets, changes, text = TARGETS[case]
    made = trainer(linear(), **changes)
    with pytest.raises(NormValueError, match=text):
        made.evaluate([(TABLE, targets)])
    if not changes:
        with pytest.raises(NormValueError, match=text):
            made.step(TABLE, targets)


def test_labels_are_looked_at_in_every_step():
    made = trainer(linear())
    made.step(TABLE, LABELS)
    with pytest.raises(NormValueError, match="got label 3 and 3 outputs"):
        made.step(TABLE, LABELS + 1)


def test_errors_of_the_users_model_stay_what_they_are():
    made = trainer(linear())
    with pytest.raises(Exception) as raised:  # of another class on every backend
        made.step(TABLE[:, :4], LABELS)
    assert not isinstance(raised.value, NormError)


def test_named_and_several_inputs_and_labels_per_position():
    """Token ids and a scale to scores (N, L, classes)."""

    def build(norm):
        ids, scale = keras.Input((5,), dtype="int32", name="ids"), keras.Input((1,), name="scale")
        scores = keras.layers.Embedding(7, 3)(ids) * scale[:, None]
        return keras.Model({"ids": ids, "scale": scale}, scores)

    ids, scale = RNG.integers(0, 7, (4, 5)), RNG.normal(size=(4, 1))
    labels = RNG.integers(0, 3, (4, 5))
    made = trainer(build, shape=())
    table = array(made.network.trainable_variables[0]).astype(np.float64)
    right = (table[ids] * scale[:, None]).argmax(-1) == labels
    scores = made.evaluate([({"scale": scale, "ids": ids}, labels)])
    np.testing.assert_allclose(scores.examples, right.mean(1))
    assert made.step({"scale": scale, "ids": ids}, labels) == pytest.approx(scores.loss, rel=1e-5)


# Scores.


def test_scores_of_unequal_batches_are_means_over_samples():
    made = trainer(linear())
    outputs = numpy_outputs(made)
    scores = made.evaluate([(TABLE[:7], LABELS[:7]), (TABLE[7:], LABELS[7:])])
    right = outputs.argmax(1) == LABELS
    assert scores.loss == pytest.approx(numpy_losses(outputs, LABELS).mean(), rel=1e-5)
    assert scores.metric == pytest.approx(right.mean())
    np.testing.assert_array_equal(scores.examples, right)
    with pytest.raises(NormValueError, match="there must be batches to score; got none"):
        made.evaluate([])


def test_functions_of_the_users_see_batches_and_all_samples():
    """A median over all samples is not the mean of the medians of batches; the loss is a mean weighted by size."""
    made = trainer(
        linear(1),
        loss=lambda outputs, targets: ops.mean((outputs[:, 0] - targets) ** 4),
        metric=lambda outputs, targets: np.median(np.abs(outputs[:, 0] - targets)),
    )
    error = np.abs(numpy_outputs(made)[:, 0] - NUMBERS)
    scores = made.evaluate([(TABLE[:2], NUMBERS[:2]), (TABLE[2:], NUMBERS[2:])])
    assert scores.loss == pytest.approx((error**4).mean(), rel=1e-4)
    assert scores.metric == pytest.approx(np.median(error), rel=1e-4)
    assert scores.examples is None


def test_as_trained_scores_with_the_statistics_of_the_batch():
    def build(norm):
        return keras.Sequential([norm(), keras.layers.Dense(3)])

    made = trainer(build, norm="batch")
    kernel = made.weights()["layer 0"]
    x = 3 * TABLE + 10
    normalized = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    for as_trained, seen in ((True, normalized), (False, x / np.sqrt(1 + 1e-5))):
        expected = numpy_losses(seen @ kernel, LABELS).mean()
        assert made.evaluate([(x, LABELS)], as_trained=as_trained).loss == pytest.approx(expected, rel=1e-4)


def dropping(norm):
    return keras.Sequential([keras.layers.Dense(8), norm(), keras.layers.Dropout(0.5), keras.layers.Dense(3)])


def test_preparing_changes_nothing():
    prepared, other = (trainer(dropping, norm="renorm", optimizer="adam") for _ in range(2))
    losses = []
    for made in (prepared, other):
        training.seed(1)  # on PyTorch dropout draws from its global numbers
        if made is prepared:
            made.prepare(TABLE, LABELS)
        losses.append([made.step(TABLE, LABELS) for _ in range(2)])
    assert losses[0] == losses[1]
    for ours, theirs in zip(prepared.network.variables, other.network.variables, strict=True):
        np.testing.assert_array_equal(array(ours), array(theirs))


@pytest.mark.parametrize("as_trained", [False, True])
def test_scoring_leaves_the_network_as_it_was(as_trained):
    made = trainer(dropping, norm="batch")
    before = [array(variable) for variable in made.network.variables]
    state = random.getstate()
    one, other = (made.evaluate([(TABLE, LABELS)] * 2, as_trained=as_trained).loss for _ in range(2))
    assert one == other, "dropout draws the same again"
    for variable, value in zip(made.network.variables, before, strict=True):
        np.testing.assert_array_equal(array(variable), value)
    assert random.getstate() == state
