"""The door to Flax NNX: the same networks as PyTorch's, the `norm` of a user's function, training, and their errors."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import numpy as np
import pytest
from nnx_required import jax, jnp, nnx, optax

from normkit.core.catalog import CATALOG
from normkit.errors import NormError, NormTypeError, NormValueError
from normkit.experiments import protocol, trial
from normkit.experiments.config import TrialConfig
from normkit.experiments.data import Dataset, Part
from normkit.experiments.feeds import ArrayFeed
from normkit.experiments.protocol import Setup
from normkit.experiments.trial import Recipe
from normkit.nnx import training
from normkit.nnx.factory import Block, Identity, norm_layer

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(12, 5))
LABELS = RNG.integers(0, 3, 12)
NUMBERS = RNG.normal(size=12)
IMAGES = RNG.normal(size=(16, 3, 10, 7)).astype(np.float32)
IMAGE_LABELS = RNG.integers(0, 4, 16)
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


class Net(nnx.Module):
    def __init__(self, norm, rngs):
        self.first = nnx.Linear(5, 8, rngs=rngs)
        self.block = norm(8, jax.nn.relu)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.block(self.first(x)))


def normed(norm, rngs):
    return Net(norm, rngs)


def flattened(x):
    return x.reshape(-1)


def linear(outputs=3, squeeze=False):
    """A function that gives one linear layer, whatever the norm."""

    def build(norm, rngs):
        return nnx.Sequential(nnx.Linear(5, outputs, rngs=rngs), *([flattened] if squeeze else []))

    return build


def numpy_outputs(trainer, x=TABLE):
    layer = trainer.network.layers[0]
    return x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)


def numpy_losses(outputs, labels):
    shifted = outputs - outputs.max(1, keepdims=True)
    return np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]


# The module, as the protocol wants it.


def test_the_module_has_everything_that_the_protocol_names():
    module = protocol.training("nnx")
    assert module is training
    for name in vars(protocol.Training):
        assert name.startswith("_") or callable(getattr(module, name)), name
    for name in vars(protocol.Trainer):
        assert name.startswith("_") or callable(getattr(training.NNXTrainer, name)), name
    assert module.versions()["jax"] == jax.__version__
    assert set(module.versions()) == {"jax", "flax"}


@pytest.mark.parametrize("by", ["nnx", "optax"])
def test_nothing_is_updated_while_a_file_is_imported(by):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    gradients = nnx.state(model, nnx.Param)
    held = []

    def update():
        held.append(optax.apply_updates)
        if by == "nnx":
            optimizer.update(model, gradients)
        else:
            optax.apply_updates({"a": jnp.ones(1)}, {"a": jnp.ones(1)})

    name = {"nnx": "nnx.Optimizer.update", "optax": "optax.apply_updates"}[by]
    expected = rf"mine.py must not train when it is imported; got a call of {name}. hint: .*__main__"
    with pytest.raises(NormValueError, match=expected), training.no_training("mine.py"):
        update()
    assert optimizer.step[...] == 0
    with contextlib.suppress(NormError), training.no_training("mine.py"):
        update()
    update()
    assert optimizer.step[...] == (by == "nnx"), "afterwards it trains"
    assert held[0]({"a": jnp.ones(1)}, {"a": jnp.ones(1)})["a"] == 2, "also through a name imported meanwhile"


def test_the_first_values_leave_the_statistics_and_the_remark_says_so():
    assert training.remarks(198) == (
        "Batch norms keep debiased moving averages with momentum 0.949: Flax' own, 0.99, would still hold 14% of "
        "their first values after 198 steps.",
        "Steps are compiled before they are timed.",
    )
    assert len(training.remarks(None)) == 1, "what a loop of the user's compiles is timed with it"
    assert "hold nothing of their first values" in training.remarks(5_000)[0]
    for steps in (None, 3):
        layer = training.norm_factory("batch", "before", steps)(4)
        x = jnp.asarray(RNG.normal(size=(64, 4)) * 3 + 5)
        layer(x)
        np.testing.assert_allclose(layer.mean[...], x.mean(0), rtol=1e-5)  # one step, and nothing is left of 0


# `norm`, as a user's function gets it.


def moved(x, axis):
    return jnp.moveaxis(x, -1, axis)


@pytest.mark.parametrize(("name", "spatial"), [*((name, 2) for name in CATALOG), ("group", 0), ("instance", 0)])
def test_one_layer_takes_any_number_of_axes_wherever_the_channels_are(name, spatial):
    """Also with the channels second, and against PyTorch's side."""
    torch = pytest.importorskip("torch")
    from normkit.torch.factory import norm_layer as of_torch

    x = np.asarray(RNG.normal(size=(5, *(4, 3)[:spatial], 32)), np.float32)
    layers = {axis: training.norm_factory(name, "before", 100)(32, axis=axis) for axis in (1, -1)}
    if name == "instance" and spatial == 0:
        with pytest.raises(NormValueError, match=r"instance_norm needs spatial axes .*got shape \(5, 32\)"):
            layers[1](x)
        return
    expected = of_torch(name, 32, spatial, steps=100)(torch.from_numpy(np.moveaxis(x, -1, 1).copy()))
    last = layers[-1](x)
    # Layer norm over images has another eps there, 1e-6 instead of 1e-5 on a variance of about 1.
    np.testing.assert_allclose(np.moveaxis(last, -1, 1), expected.detach().numpy(), atol=1e-4)
    if spatial:
        np.testing.assert_allclose(np.moveaxis(layers[1](np.moveaxis(x, -1, 1)), 1, -1), last, atol=1e-6)


@pytest.mark.parametrize(("name", "position"), VARIANTS)
def test_the_activation_comes_where_the_variant_says(name, position):
    norm = training.norm_factory(name, position, 100)
    x = jnp.asarray(RNG.normal(size=(6, 5, 4)) + 0.3, jnp.float32)
    plain = Identity() if name == "none" else norm_layer(name, 4, steps=100)
    expected = plain(jnp.maximum(x, 0)) if position == "after" else jnp.maximum(plain(x), 0)
    block = norm(4, jax.nn.relu)
    if name != "none" and CATALOG[name].activates:  # it stands for both
        expected = plain(x)
    else:
        assert isinstance(block, Block)
    np.testing.assert_allclose(block(x), expected, atol=1e-6)
    label = name if position == "before" else f"{name}:after"
    assert (norm.name, norm.position, str(norm)) == (label, position, label)


def test_none_gives_the_identity_and_an_activation_may_be_a_module():
    norm = training.norm_factory("none", "before", None)
    assert type(norm(8)) is Identity
    assert norm(8, Identity())(jnp.array([-1.0, 1.0])).tolist() == [-1, 1]


CALLS = {
    "after without a place": ("after", lambda norm: norm(64), NormValueError,
                              r"batch:after stands after the activation, so `norm` must be given the activation too; "
                              r"got norm\(64\). hint: norm\(64, jax.nn.relu\)"),
    "no number": ("before", lambda norm: norm("64"), NormError, "`num_features` must be a whole number"),
    "axis": ("before", lambda norm: norm(64, axis=2), NormValueError, "`axis` must be -1 or 1; got 2"),
    "a class": ("before", lambda norm: norm(64, nnx.PReLU), NormTypeError, "got the class PReLU. hint: jax.nn.relu"),
    "a name": ("before", lambda norm: norm(64, "relu"), NormTypeError, "must be a function or a module; got 'relu'"),
    "other channels": ("before", lambda norm: norm(64)(jnp.ones((4, 32))), NormValueError, "64 features on axis 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_calls_of_norm_that_cannot_be_meant(case):
    position, call, kind, text = CALLS[case]
    with pytest.raises(kind, match=text):
        call(training.norm_factory("batch", position, None))


# The embedded networks.


@pytest.mark.parametrize(
    ("model", "shape", "norm", "position"),
    [
        ("cnn", (3, 10, 7), "none", "before"),
        ("cnn", (3, 10, 7), "batch", "after"),
        ("mlp", (3, 10, 7), "group", "after"),
    ],
)
def test_networks_start_as_those_of_pytorch(model, shape, norm, position):
    """The same weights, in the layout of Flax, give the same losses in the first steps.

    To 1e-3: a group of channels that ReLU left all but empty is divided by the root of eps, and rounding grows by that,
    through ten layers.
    """
    pytest.importorskip("torch")
    from normkit.torch import training as of_torch

    x, y = IMAGES, IMAGE_LABELS
    asked = setup(model, shape=shape, classes=4, norm=norm, position=position, lr=0.01)
    ours, theirs = training.trainer(asked), of_torch.trainer(asked)
    for name, weight in theirs.weights().items():
        np.testing.assert_array_equal(np.moveaxis(ours.weights()[name], (-1, -2), (0, 1)), weight)
    mine, expected = (trainer.evaluate([(x, y)]) for trainer in (ours, theirs))
    np.testing.assert_allclose(mine.examples, expected.examples)
    assert mine.loss == pytest.approx(expected.loss, rel=1e-3)
    for _ in range(3):
        assert ours.step(x, y) == pytest.approx(theirs.step(x, y), rel=1e-3)


def test_images_too_small_for_the_network():
    with pytest.raises(NormValueError, match="`cnn` must be given images of at least 4 x 4"):
        training.trainer(setup("cnn", shape=(1, 3, 8)))


def test_images_with_channels_last_stay_as_they_are():
    asked = setup("cnn", shape=(3, 10, 7), classes=4)
    first, last = training.trainer(asked), training.trainer(asked)
    assert first.step(IMAGES, IMAGE_LABELS) == last.step(IMAGES.transpose(0, 2, 3, 1), IMAGE_LABELS)


# The user's function.


@pytest.mark.parametrize(
    ("name", "position"), [variant for variant in VARIANTS if variant[0] not in ("instance", "evonorm_b0")]
)
def test_every_variant_of_a_seed_starts_from_the_same_weights(name, position):
    plain = training.trainer(setup(normed)).weights()
    start = training.trainer(setup(normed, norm=name, position=position)).weights()
    assert start.keys() == plain.keys() == {"layer 0", "layer 1"}
    for key in plain:
        np.testing.assert_array_equal(start[key], plain[key])


def test_a_function_learns_and_another_seed_starts_elsewhere():
    first, other = (training.trainer(setup(normed, norm="batch", seed=seed)) for seed in (0, 1))
    assert not np.array_equal(first.weights()["layer 0"], other.weights()["layer 0"])
    assert first.step(TABLE, LABELS) > first.step(TABLE, LABELS)


def test_layers_made_under_vmap_count_as_used():
    def build(norm, rngs):
        @nnx.vmap(in_axes=0, axis_size=2)
        def blocks(rngs):
            return Net(norm, rngs)

        class Stack(nnx.Module):
            def __init__(self):
                self.blocks = blocks(rngs.split(2))

            def __call__(self, x):
                return nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(self.blocks, x).mean(0)

        return Stack()

    trainer = training.trainer(setup(build, norm="batch"))
    assert [weight.shape for weight in trainer.weights().values()] == [(2, 5, 8), (2, 8, 3)]


def raising(norm):
    raise ValueError("no such thing")


def two_arguments(norm, width):
    return None


def without_norm():
    return None


class Drops(Net):
    def __init__(self, norm, rngs):
        super().__init__(norm, rngs)
        norm(8)


class Useless(nnx.Module):
    def __init__(self, norm):
        self.norm = norm(5, jax.nn.relu)

    def __call__(self, x):
        return x


_kept: list = []


def keeps(norm, rngs):
    """Gives the model of an earlier variant."""
    _kept.append(Net(norm, rngs))
    return _kept[0]


BUILDS = {
    "raises": (raising, r"raising raised ValueError: no such thing"),
    "takes nothing": (without_norm, r"must take a parameter `norm`.*hint: def without_norm\(norm, rngs\): \.\.\. norm"),
    "takes more": (two_arguments, r"must take a parameter `norm`, .* no other without a default \(missing.*'width'\)"),
    "returns nothing": (lambda norm: None, "must return an nnx.Module; got NoneType"),
    "returns a class": (lambda norm: nnx.Linear, "must return an nnx.Module; got the class Linear"),
    "does not call norm": (linear(), "build does not use the norm it was given: .*got no call of norm"),
    "drops a layer": (Drops, "Drops does not use the norm it was given: .*got 1 of 2 that are not"),
    "lets the factory speak": (lambda norm: norm(0), "`num_features` must be a whole number of at least 1; got 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BUILDS)
def test_functions_that_give_no_usable_network(case):
    build, text = BUILDS[case]
    with pytest.raises(NormValueError, match=text):
        training.trainer(setup(build, norm="batch"))


def test_models_without_parameters_or_with_late_ones():
    with pytest.raises(NormValueError, match="must return a model that has parameters to train; got Useless"):
        training.trainer(setup(lambda norm: Useless(norm)))

    class Late(nnx.Module):
        def __init__(self, norm, rngs):
            self.layer = nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x):
            self.seen = nnx.BatchStat(x.mean())
            return self.layer(x)

    with pytest.raises(NormValueError, match="must have all its variables when it is built; got Late"):
        training.trainer(setup(Late)).step(TABLE, LABELS)


def test_a_model_that_is_kept_between_variants_does_not_use_its_norm():
    training.trainer(setup(keeps, norm="batch"))
    with pytest.raises(NormValueError, match=r"keeps does not use the norm it was given: .*got 1 of 1 that are not"):
        training.trainer(setup(keeps, norm="batch"))


def test_a_place_for_after_and_the_cause_of_an_error():
    with pytest.raises(NormValueError, match="batch:after stands after the activation"):
        training.trainer(setup(lambda norm: norm(8), norm="batch", position="after"))
    with pytest.raises(NormValueError) as raised:
        training.trainer(setup(raising))
    assert isinstance(raised.value.__cause__, ValueError)


# One step, and what is learned by.


def softmax(outputs):
    shifted = np.exp(outputs - outputs.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def test_two_steps_of_sgd_with_momentum_against_numpy():
    trainer = training.trainer(setup(linear()))
    layer = trainer.network.layers[0]
    weight, bias = (np.asarray(value[...], np.float64) for value in (layer.kernel, layer.bias))
    velocity = [np.zeros_like(weight), np.zeros_like(bias)]
    for _ in range(2):
        outputs = TABLE @ weight + bias
        expected = numpy_losses(outputs, LABELS).mean()
        slope = (softmax(outputs) - np.eye(3)[LABELS]) / len(LABELS)
        velocity = [0.9 * v + g for v, g in zip(velocity, (TABLE.T @ slope, slope.sum(0)), strict=True)]
        weight, bias = weight - 0.1 * velocity[0], bias - 0.1 * velocity[1]
        assert trainer.step(TABLE, LABELS) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(trainer.weights()["layer 0"], weight, atol=1e-6)


@pytest.mark.parametrize("squeeze", [False, True])
@pytest.mark.parametrize("name", ["mse", "mae"])
def test_outputs_take_the_shape_of_the_targets(name, squeeze):
    """Without that, (12, 1) and (12,) would spread to (12, 12)."""
    trainer = training.trainer(setup(linear(1, squeeze), loss=name, metric="loss"))
    error = numpy_outputs(trainer)[:, 0] - NUMBERS
    each = error**2 if name == "mse" else np.abs(error)
    scores = trainer.evaluate([(TABLE[:6], NUMBERS[:6]), (TABLE[6:], jnp.asarray(NUMBERS[6:]))])
    np.testing.assert_allclose(scores.examples, each, rtol=1e-4, atol=1e-6)
    assert scores.loss == scores.metric == pytest.approx(each.mean(), rel=1e-5)
    assert trainer.step(TABLE, NUMBERS) == pytest.approx(each.mean(), rel=1e-5)


def steps_with(optimizer, of=training):
    trainer = of.trainer(setup("cnn", shape=(3, 10, 7), classes=4, optimizer=optimizer, lr=0.01))
    for _ in range(2):
        trainer.step(IMAGES, IMAGE_LABELS)
    return trainer.weights()


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_optimizers_by_name_are_those_of_pytorch(optimizer):
    """Adam divides gradients by themselves: where they are next to nothing, rounding decides the sign."""
    pytest.importorskip("torch")
    from normkit.torch import training as of_torch

    for ours, theirs in zip(steps_with(optimizer).values(), steps_with(optimizer, of_torch).values(), strict=True):
        difference = np.abs(np.moveaxis(ours, (-1, -2), (0, 1)) - theirs)
        assert np.median(difference) < 3e-5
        assert difference.max() < (1e-4 if optimizer == "sgd" else 0.06)


def test_optimizers_of_the_users_see_parameters_and_rate():
    seen = []

    def mine(parameters, lr):
        seen.append(parameters)
        decay = optax.add_decayed_weights(0.0, mask=jax.tree.map(lambda p: p.ndim > 1, parameters))
        return optax.chain(decay, optax.sgd(lr, 0.9))

    for ours, theirs in zip(steps_with(mine).values(), steps_with("sgd").values(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-7)
    assert {leaf.ndim for leaf in jax.tree.leaves(seen[0])} == {1, 2, 4}


def compilations(monkeypatch):
    counted = []
    watched = jax._src.compiler.compile_or_get_cached
    monkeypatch.setattr(
        "jax._src.compiler.compile_or_get_cached", lambda *a, **k: (counted.append(1), watched(*a, **k))[1]
    )
    return counted


class Noisy(Net):
    def __init__(self, norm, rngs):
        super().__init__(norm, rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(self.block(self.first(x))))


@pytest.mark.parametrize("optimizer", ["adam", lambda parameters, lr: optax.sgd(lr)])
def test_prepared_steps_compile_nothing_and_start_where_they_would(monkeypatch, optimizer):
    made, unprepared = (training.trainer(setup(Noisy, norm="renorm", optimizer=optimizer)) for _ in range(2))
    made.prepare(TABLE[:7], LABELS[:7])
    counted = compilations(monkeypatch)
    losses = [made.step(TABLE[:7], LABELS[:7]) for _ in range(2)]
    assert not counted
    assert losses == [unprepared.step(TABLE[:7], LABELS[:7]) for _ in range(2)]
    for ours, theirs in zip(jax.tree.leaves(made.weights()), jax.tree.leaves(unprepared.weights()), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_new_trial_needs_no_new_compilation(monkeypatch):
    def whole(seed, lr):
        trainer = training.trainer(setup(normed, norm="batch", seed=seed, lr=lr))
        trainer.step(TABLE, LABELS)
        trainer.evaluate([(TABLE, LABELS)])
        trainer.probe(TABLE)

    whole(0, 0.1)
    counted = compilations(monkeypatch)
    whole(1, 0.05)
    assert not counted
    jax.jit(lambda x: x + 1.5)(jnp.ones(3))
    assert counted, "this would have been counted"


def failing(outputs, targets):
    raise KeyError("x")


FUNCTIONS = {
    "no optimizer": ({"optimizer": lambda parameters, lr: None}, "must return a transformation of Optax; got NoneType"),
    "line search": ({"optimizer": lambda parameters, lr: optax.lbfgs(lr)}, "from gradients and parameters alone"),
    "optimizer raises": ({"optimizer": lambda parameters: None}, "<lambda> raised TypeError"),
    "loss raises": ({"loss": failing}, "failing raised KeyError: 'x'"),
    "no mean": (
        {"loss": lambda o, y: abs(o.sum(1) - y)},
        r"must return an array of JAX with one number; got shape \(12,\)",
    ),
    "a float": ({"loss": lambda o, y: 1.0}, "must return an array of JAX with one number; got float"),
    "no gradient": ({"loss": lambda o, y: jax.lax.stop_gradient(o).sum()}, "in a way that has a gradient"),
    "metric raises": ({"metric": failing}, "failing raised KeyError: 'x'"),
    "no number": ({"metric": lambda o, y: o}, r"must return one number; got shape \(12, 3\)"),
    "nothing": ({"metric": lambda o, y: None}, "must return one number; got NoneType"),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_functions_that_give_what_cannot_be_used(case):
    changes, text = FUNCTIONS[case]

    def used():
        trainer = training.trainer(setup(linear(), **changes))
        trainer.step(TABLE, LABELS)
        trainer.evaluate([(TABLE, LABELS)])

    with pytest.raises(NormValueError, match=text):
        used()


TARGETS = {
    "label too large": (LABELS + 5, {}, r"needs labels below the number of outputs; got label 7 and 3 outputs. "
                                        r"hint: the last layer needs 8 outputs"),
    "label far too large": (LABELS + 2**32, {}, "got label 4294967298 and 3 outputs"),
    "negative label": (LABELS - 1, {}, "got label -1 and 3 outputs. hint: labels count from 0"),
    "floats": (NUMBERS, {}, r"needs labels that are whole numbers; got float32. hint: y.astype\(int\)"),
    "a column": (LABELS[:, None], {}, r"got \(12, 3\) and \(12, 1\). hint: y.squeeze\(1\)"),
    "too few": (LABELS[:5], {}, r"needs outputs \(N, \*S, classes\) and labels \(N, \*S\); got \(12, 3\) and \(5,\)"),
    "other targets": (RNG.normal(size=(12, 2)), {"loss": "mse"}, r"got \(12, 3\) and \(12, 2\)"),
    "other samples": (RNG.normal(size=(6, 6)), {"loss": "mse"}, r"got \(12, 3\) and \(6, 6\)"),
    "accuracy of numbers": (NUMBERS, {"loss": lambda o, y: o.mean()}, "accuracy needs labels that are whole numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", TARGETS)
def test_targets_that_do_not_fit_the_outputs(case):
    targets, changes, text = TARGETS[case]
    with pytest.raises(NormValueError, match=text):
        training.trainer(setup(linear(), **changes)).evaluate([(TABLE, targets)])


def test_a_step_with_a_wrong_label_is_not_taken():
    trainer = training.trainer(setup(linear()))
    before = trainer.weights()["layer 0"]
    with pytest.raises(NormValueError, match="got label 3 and 3 outputs"):
        trainer.step(TABLE, LABELS + 1)
    np.testing.assert_array_equal(trainer.weights()["layer 0"], before)


class Words(nnx.Module):
    """Token ids and a scale to scores (N, L, classes)."""

    def __init__(self, rngs, axis=-1):
        self.table, self.axis = nnx.Embed(7, 3, rngs=rngs), axis

    def __call__(self, ids, scale):
        assert jnp.issubdtype(ids.dtype, jnp.integer)
        assert scale.dtype == jnp.float32
        return jnp.moveaxis(self.table(ids) * scale[:, None, None], -1, self.axis)


def test_named_and_several_inputs_and_labels_per_position():
    ids, scale = RNG.integers(0, 7, (4, 5)), RNG.normal(size=4)
    labels = RNG.integers(0, 3, (4, 5))
    trainer = training.trainer(setup(lambda norm, rngs: Words(rngs)))
    table = np.asarray(trainer.network.table.embedding[...], np.float64)
    right = (table[ids] * scale[:, None, None]).argmax(-1) == labels
    for x in ({"scale": scale, "ids": jnp.asarray(ids)}, (ids, scale)):
        scores = trainer.evaluate([(x, labels)])
        np.testing.assert_allclose(scores.examples, right.mean(1), rtol=1e-6)
        assert scores.metric == pytest.approx(right.mean())
    assert trainer.step((ids, scale), labels) == pytest.approx(scores.loss, rel=1e-5)
    second = training.trainer(setup(lambda norm, rngs: Words(rngs, axis=1)))
    with pytest.raises(NormValueError, match=r"got \(4, 3, 5\) and \(4, 5\). hint: the classes come last"):
        second.step((ids, scale), labels)


def test_errors_of_the_users_model_stay_what_they_are():
    with pytest.raises(Exception, match="shape") as other:
        training.trainer(setup(normed)).step(TABLE[:, :4], LABELS)
    assert not isinstance(other.value, NormError)


# Scores.


def test_scores_of_unequal_batches_are_means_over_samples():
    trainer = training.trainer(setup(linear()))
    outputs = numpy_outputs(trainer)
    scores = trainer.evaluate([(TABLE[:7], LABELS[:7]), (TABLE[7:], LABELS[7:])])
    right = outputs.argmax(1) == LABELS
    assert scores.loss == pytest.approx(numpy_losses(outputs, LABELS).mean(), rel=1e-5)
    assert scores.metric == pytest.approx(right.mean())
    np.testing.assert_array_equal(scores.examples, right)
    with pytest.raises(NormValueError, match="there must be batches to score; got none"):
        trainer.evaluate([])


def test_functions_of_the_users_see_batches_and_all_samples():
    """A median over all samples is not the mean of the medians of batches; the loss is a mean weighted by size."""
    trainer = training.trainer(
        setup(
            linear(1, squeeze=True),
            loss=lambda outputs, targets: ((outputs - targets) ** 4).mean(),
            metric=lambda outputs, targets: jnp.median(abs(outputs - targets)),
        )
    )
    error = np.abs(numpy_outputs(trainer)[:, 0] - NUMBERS)
    scores = trainer.evaluate([(TABLE[:2], NUMBERS[:2]), (TABLE[2:], NUMBERS[2:])])
    assert scores.loss == pytest.approx((error**4).mean(), rel=1e-4)
    assert scores.metric == pytest.approx(np.median(error), rel=1e-4)
    assert scores.examples is None


def test_scoring_and_probing_leave_the_network_as_it_was():
    trainer = training.trainer(setup(Noisy, norm="batch"))
    trainer.step(TABLE, LABELS)
    before = jax.tree.leaves(nnx.state(trainer.network, nnx.Param, nnx.BatchStat))
    losses = [trainer.evaluate([(TABLE, LABELS)] * 2, as_trained=trained).loss for trained in (True, True, False)]
    trainer.probe(TABLE)
    for old, new in zip(before, jax.tree.leaves(nnx.state(trainer.network, nnx.Param, nnx.BatchStat)), strict=True):
        np.testing.assert_array_equal(old, new)
    assert losses[0] == losses[1] != losses[2]
    assert trainer.step(TABLE, LABELS) != trainer.step(TABLE, LABELS)


# A whole trial.


def feed():
    """Two easy classes of images; all parts are as large as a batch or four, which spares compilations."""
    y = np.arange(100) % 2
    x = (RNG.normal(size=(100, 2, 8, 8)) + 2.0 * y.reshape(-1, 1, 1, 1)).astype(np.float32)
    return ArrayFeed(Dataset("easy", Part(x, y), Part(x[:20], y[:20]), classes=2))


def test_a_trial_learns_something_easy_gives_the_same_numbers_twice_and_survives_json():
    config = TrialConfig(
        framework="nnx", model="cnn", code="", data="f", norm="batch", lr=0.02, batch_size=20, inputs="none",
        seed=0, epochs=4, loss="cross_entropy", optimizer="sgd", metric="accuracy",
    )  # fmt: skip
    recipe, data = Recipe("cnn", "cross_entropy", "sgd", "accuracy", "accuracy"), feed()
    first, second = (trial.run_trial(config, recipe, data, training) for _ in range(2))
    assert first.train_losses[-1] < 0.8 * first.train_losses[0]
    assert first.train_losses == second.train_losses
    assert [len(snapshot.sites) for snapshot in first.snapshots] == [6] * 5
    assert all(abs(site.std - 1) < 0.01 and site.gamma_mean == 1 for site in first.snapshots[0].sites)
    assert math.isfinite(first.gap.eval_loss)
    assert dataclasses.asdict(type(first).from_dict(first.to_dict()))["final"] == first.final
    assert dict(first.versions) == training.versions()
