"""The door to PyTorch: networks, the `norm` of a user's function, losses, optimizers and metrics, and their errors."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normkit.torch as nk
from normkit.core.catalog import CATALOG, STANDARD
from normkit.errors import NormError, NormTypeError, NormValueError
from normkit.experiments import protocol
from normkit.experiments.protocol import Setup
from normkit.torch import training
from normkit.torch.sites import sites

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(12, 5))
LABELS = RNG.integers(0, 3, 12)
NUMBERS = RNG.normal(size=12)
VARIANTS = [
    ("none", "before"),
    *((name, position) for name in CATALOG for position in ("before", "after")[: 1 if CATALOG[name].activates else 2]),
]
POSITIONLESS = ("instance", "evonorm_b0")  # a table has none of what they are taken over


def setup(model="mlp", **changes):
    values = {
        "shape": (5,), "classes": 3, "norm": "none", "position": "before", "lr": 0.1, "momentum": 0.9,
        "loss": "cross_entropy", "optimizer": "sgd", "metric": "accuracy", "seed": 0, "steps": 100,
    }  # fmt: skip
    return Setup(model=model, **{**values, **changes})


def linear(outputs=3, squeeze=False):
    """A function that gives one linear layer, whatever the norm."""

    def build(norm):
        layers = [nn.Linear(5, outputs)]
        return nn.Sequential(*layers, *([nn.Flatten(0)] if squeeze else []))

    return build


def normed(norm):
    return nn.Sequential(nn.Linear(5, 8), norm(8, nn.ReLU()), nn.Linear(8, 3))


def numpy_outputs(trainer, x=TABLE):
    layer = trainer.network[0]
    return x @ layer.weight.detach().numpy().astype(np.float64).T + layer.bias.detach().numpy().astype(np.float64)


def numpy_losses(outputs, labels):
    shifted = outputs - outputs.max(1, keepdims=True)
    return np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]


# The module, as the protocol wants it.


def test_the_module_has_everything_that_the_protocol_names():
    module = protocol.training("torch")
    assert module is training
    for name in vars(protocol.Training):
        assert name.startswith("_") or callable(getattr(module, name)), name
    for name in vars(protocol.Trainer):
        assert name.startswith("_") or callable(getattr(training.TorchTrainer, name)), name
    assert module.versions() == {"torch": torch.__version__}


def test_seed_decides_what_is_drawn():
    training.seed(3)
    first = torch.rand(4)
    training.seed(3)
    assert torch.rand(4).equal(first)


class Inherits(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, Inherits])
def test_no_optimizer_steps_while_a_file_is_imported(optimizer):
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    made = optimizer([parameter], lr=0.1)
    expected = rf"mine.py must not train when it is imported; got a step of {optimizer.__name__}. hint: .*__main__"
    with pytest.raises(NormValueError, match=expected), training.no_training("mine.py"):
        made.step()
    assert parameter == 1
    with contextlib.suppress(NormError), training.no_training("mine.py"):
        optimizer([parameter], lr=0.1).step()
    made.step()
    assert parameter < 1, "afterwards it trains"


# `norm`, as a user's function gets it.


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("spatial", [0, 1, 2, 3])
@pytest.mark.parametrize("name", CATALOG)
def test_one_layer_takes_any_number_of_axes_wherever_the_channels_are(name, spatial, axis):
    x = torch.randn(5, 32, *(4, 3, 2)[:spatial])
    given = x.movedim(1, axis).contiguous()
    layer = training.norm_factory(name, "before", 100)(32, axis=axis)
    if name in POSITIONLESS and spatial == 0:
        text = r"(instance_norm needs spatial axes|must have positions).*got shape \(5, 32\)"
        with pytest.raises(NormValueError, match=text):
            layer(given)
        return
    stock = nk.norm_layer(name, 32, spatial, steps=100)
    y = layer(given)
    assert y.is_contiguous()
    # Layers over the last axis and over the second have other eps, at most 1e-5 on a variance of about 1.
    tolerance = 1e-4 if name in ("layer", "rms") else 5e-6
    torch.testing.assert_close(y.movedim(axis, 1), stock(x), rtol=0, atol=tolerance)
    for kept, expected in zip(layer.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(kept, expected)
    torch.testing.assert_close(layer.eval()(given).movedim(axis, 1), stock.eval()(x), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("name", "position"), VARIANTS)
def test_the_activation_comes_where_the_variant_says(name, position):
    norm = training.norm_factory(name, position, 100)
    x = RNG.normal(size=(6, 4, 5)) + 0.3
    for activation in (nn.ReLU(), torch.relu):
        block = norm(4, activation)
        plain = nn.Identity() if name == "none" else nk.norm_layer(name, 4, 1, steps=100)
        given = torch.from_numpy(x).float()
        expected = plain(given.clamp(min=0)) if position == "after" else plain(given).clamp(min=0)
        if name != "none" and CATALOG[name].activates:  # it stands for both
            expected = plain(given)
        torch.testing.assert_close(block(given), expected, rtol=0, atol=1e-5)


def test_batch_norm_of_the_factory_against_numpy():
    x = RNG.normal(size=(6, 7, 4)) * 3 + 2
    y = training.norm_factory("batch", "after", None)(4, nn.ReLU(), axis=-1)(torch.from_numpy(x).float())
    r = np.maximum(x, 0)
    expected = (r - r.mean((0, 1))) / np.sqrt(r.var((0, 1)) + 1e-5)
    np.testing.assert_allclose(y.detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("name", "position"), VARIANTS)
def test_the_factory_knows_its_label_and_draws_nothing(name, position):
    state = torch.get_rng_state()
    norm = training.norm_factory(name, position, 100)
    norm(8, nn.ReLU()), norm(8, torch.tanh, axis=-1)
    assert torch.get_rng_state().equal(state)
    label = name if position == "before" else f"{name}:after"
    assert (norm.name, norm.position, str(norm)) == (label, position, label)


def test_none_gives_the_identity():
    norm = training.norm_factory("none", "before", None)
    assert type(norm(8)) is nn.Identity
    assert norm(8, nn.ReLU())(torch.tensor([-1.0, 1.0])).tolist() == [0, 1]


def test_layers_are_real_ones_of_normkit():
    norm = training.norm_factory("batch", "before", None)
    assert isinstance(norm(8), nn.modules.batchnorm._BatchNorm)
    assert set(norm(8).state_dict()) == set(nk.BatchNorm2d(8).state_dict())
    assert "axis=-1" in repr(norm(8, axis=-1))


CALLS = {
    "after without a place": ("after", lambda norm: norm(64), NormValueError,
                              r"batch:after stands after the activation, so `norm` must be given the activation too; "
                              r"got norm\(64\). hint: norm\(64, nn.ReLU\(\)\)"),
    "no number": ("before", lambda norm: norm("64"), NormError, "`num_features` must be a whole number"),
    "axis": ("before", lambda norm: norm(64, axis=2), NormValueError, "`axis` must be 1 or -1; got 2"),
    "a class": ("before", lambda norm: norm(64, nn.ReLU), NormTypeError, r"got the class ReLU. hint: nn.ReLU\(\)"),
    "a name": ("before", lambda norm: norm(64, "relu"), NormTypeError, "must be a layer or a function; got 'relu'"),
    "other axis": ("before", lambda norm: norm(64)(torch.ones(4, 32, 64)), NormValueError,
                   r"the channels must be on axis 1; got shape \(4, 32, 64\). hint: norm\(64, axis=-1\)"),
    "other channels": ("before", lambda norm: norm(64)(torch.ones(4, 32)), NormValueError, "batch_norm: .* 32 values"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_calls_of_norm_that_cannot_be_meant(case):
    position, call, kind, text = CALLS[case]
    with pytest.raises(kind, match=text):
        call(training.norm_factory("batch", position, None))


def test_norm_layer_wants_an_axis_only_where_it_is_free():
    with pytest.raises(NormValueError, match="`axis` must be 1 where `spatial` is given; got -1"):
        nk.norm_layer("batch", 8, 2, axis=-1)
    with pytest.raises(NormValueError, match="`axis` must be 1 or -1; got 3"):
        nk.norm_layer("batch", 8, axis=3)


# The user's function.


@pytest.mark.parametrize(("name", "position"), [variant for variant in VARIANTS if variant[0] not in POSITIONLESS])
def test_every_variant_of_a_seed_starts_from_the_same_weights(name, position):
    plain = training.trainer(setup(normed)).weights()
    start = training.trainer(setup(normed, norm=name, position=position)).weights()
    assert start.keys() == plain.keys() == {"layer 0", "layer 1"}
    for key in plain:
        np.testing.assert_array_equal(start[key], plain[key])
    other = training.trainer(setup(normed, norm=name, position=position, seed=1)).weights()
    assert not np.array_equal(other["layer 0"], plain["layer 0"])
    trainer = training.trainer(setup(normed, norm=name, position=position))
    assert trainer.step(TABLE, LABELS) > trainer.step(TABLE, LABELS)


def test_copies_of_the_given_layers_count_as_used():
    """nn.TransformerEncoder copies the layer it is given."""

    def build(norm):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        layer.norm1, layer.norm2 = norm(8, axis=-1), norm(8, axis=-1)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    network = training.trainer(setup(build, norm="batch")).network
    assert sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()) == 4
    assert network(torch.randn(4, 6, 8)).shape == (4, 6, 8)


def raising(norm):
    raise ValueError("no such thing")


def two_arguments(norm, width):
    return nn.Linear(5, 3)


def without_norm():
    return nn.Linear(5, 3)


def hides(norm):
    model = normed(norm)
    model.__dict__["hidden"] = [norm(8)]
    return model


_kept: list[nn.Module] = []


def keeps(norm):
    """Gives the model of an earlier variant."""
    _kept.append(normed(norm))
    return _kept[0]


BUILDS = {
    "raises": (raising, r"raising raised ValueError: no such thing"),
    "has no place": (without_norm, "must have a linear map that a norm can follow; got .*gives an output of the model"),
    "takes more": (two_arguments, r"parameter `norm` or nothing, and no other without a default \(missing.*'width'\)"),
    "returns nothing": (lambda norm: None, "must return a torch.nn.Module; got NoneType"),
    "returns a class": (lambda norm: nn.Linear, "must return a torch.nn.Module; got the class Linear"),
    "does not call norm": (linear(), "build does not use the norm it was given: .*got no call of norm"),
    "hides a layer": (hides, "hides does not use the norm it was given: .*got 1 of 2 that are not"),
    "has no parameters": (lambda norm: nn.Sequential(norm(5)).requires_grad_(False), "parameters to train"),
    "is lazy": (lambda norm: nn.Sequential(norm(5), nn.LazyLinear(3)), "got LazyLinear at 1"),
    "lets the factory speak": (lambda norm: norm(0), "`num_features` must be a whole number of at least 1; got 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BUILDS)
def test_functions_that_give_no_usable_network(case):
    build, text = BUILDS[case]
    with pytest.raises(NormValueError, match=text):
        training.trainer(setup(build, norm="batch", example=lambda: TABLE))


def bare():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def with_norms():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.constant_(model[1].weight, 0.25)
    return model


@pytest.mark.parametrize(("norm", "position"), [variant for variant in VARIANTS if variant[0] in ("none", *STANDARD)])
@pytest.mark.parametrize("build", [bare, with_norms])
def test_a_function_without_norm_gets_that_of_the_variant(build, norm, position):
    """Inserted, or in the place of those that are there; all variants start from the same weights."""
    asked = setup(build, norm=norm, position=position, example=lambda: TABLE)
    if norm == "instance" or (build is with_norms and position == "after"):
        with pytest.raises(NormValueError, match=r"needs spatial axes|single value|model without norms"):
            training.trainer(asked).step(TABLE, LABELS)
        return
    trainer = training.trainer(asked)
    found = [site.record for site in sites(trainer.network)]
    assert [record.kind for record in found] == ([] if norm == "none" else [norm])
    assert all(record.gamma[0] == (1.0 if build is bare else 0.25) for record in found)
    plain = training.trainer(setup(bare, example=lambda: TABLE)).weights()
    assert all(np.array_equal(value, plain[name]) for name, value in trainer.weights().items())
    before = copy.deepcopy(trainer.network.state_dict())
    trainer.step(TABLE, LABELS)
    weights = {name: p for name, p in trainer.network.named_parameters() if name.endswith("weight")}
    assert all(not torch.equal(p, before[name]) for name, p in weights.items())


def test_norms_with_a_formula_of_their_own_are_inserted_only_where_an_activation_may_stay():
    for norm, kind in (("dyt", nk.DynamicTanh), ("grn", nk.GlobalResponseNorm)):
        trainer = training.trainer(setup(bare, norm=norm, example=lambda: TABLE))
        assert [type(module) for module in trainer.network.modules() if isinstance(module, kind)] == [kind]
        assert trainer.step(TABLE, LABELS) > 0
    for build, norm in ((bare, "frn"), (with_norms, "dyt")):
        with pytest.raises(NormValueError, match=rf"{norm} must be given its place by {build.__name__}"):
            training.trainer(setup(build, norm=norm, example=lambda: TABLE))


def test_norms_that_cannot_be_replaced_are_said():
    def build():
        return nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 16), nn.BatchNorm1d(8), nn.Linear(8, 3))

    with pytest.raises(NormValueError, match=r"every norm of a model must be one that can be replaced; got 1\.norm1"):
        training.trainer(setup(build, norm="batch", example=lambda: TABLE))


def test_a_model_that_is_kept_between_variants_does_not_use_its_norm():
    training.trainer(setup(keeps, norm="batch"))
    with pytest.raises(NormValueError, match=r"keeps does not use the norm it was given: .*got 1 of 1 that are not"):
        training.trainer(setup(keeps, norm="batch"))


def test_what_a_function_raises_is_kept_as_the_cause():
    with pytest.raises(NormValueError) as raised:
        training.trainer(setup(raising))
    assert isinstance(raised.value.__cause__, ValueError)


def test_none_need_not_be_called():
    training.trainer(setup(linear()))


# One step, and what is learned by.


def softmax(outputs):
    shifted = np.exp(outputs - outputs.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def test_two_steps_of_sgd_with_momentum_against_numpy():
    trainer = training.trainer(setup(linear()))
    weight = trainer.weights()["layer 0"].astype(np.float64)
    bias = trainer.network[0].bias.detach().numpy().astype(np.float64)
    velocity = [np.zeros_like(weight), np.zeros_like(bias)]
    for _ in range(2):
        outputs = TABLE @ weight.T + bias
        expected = numpy_losses(outputs, LABELS).mean()
        slope = (softmax(outputs) - np.eye(3)[LABELS]) / len(LABELS)
        velocity = [0.9 * v + g for v, g in zip(velocity, (slope.T @ TABLE, slope.sum(0)), strict=True)]
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
    scores = trainer.evaluate([(TABLE[:5], NUMBERS[:5]), (TABLE[5:], torch.from_numpy(NUMBERS[5:]))])
    np.testing.assert_allclose(scores.examples, each, rtol=1e-4, atol=1e-6)
    assert scores.loss == scores.metric == pytest.approx(each.mean(), rel=1e-5)
    assert trainer.step(TABLE, NUMBERS) == pytest.approx(each.mean(), rel=1e-5)


def steps_with(optimizer):
    trainer = training.trainer(setup(linear(), optimizer=optimizer))
    for _ in range(3):
        trainer.step(TABLE, LABELS)
    return trainer.weights()["layer 0"]


def test_optimizers_by_name_and_of_the_users():
    first = training.trainer(setup(linear())).weights()["layer 0"]
    adam, adamw = steps_with("adam"), steps_with("adamw")
    assert 0.2 < np.abs(adam - first).max() < 0.31, "Adam moves by about the rate"
    assert not np.array_equal(adam, adamw), "AdamW lets weights decay"
    np.testing.assert_array_equal(
        steps_with("sgd"), steps_with(lambda parameters, lr: torch.optim.SGD(parameters, lr, 0.9))
    )


def failing(outputs, targets):
    raise KeyError("x")


FUNCTIONS = {
    "no optimizer": ({"optimizer": lambda parameters, lr: None}, "must return a torch.optim.Optimizer; got NoneType"),
    "closure": ({"optimizer": lambda parameters, lr: torch.optim.LBFGS(parameters, lr)}, "closure; got LBFGS"),
    "optimizer raises": ({"optimizer": lambda parameters: None}, "<lambda> raised TypeError"),
    "loss raises": ({"loss": failing}, "failing raised KeyError: 'x'"),
    "no mean": (
        {"loss": lambda o, y: (o.sum(1) - y).abs()},
        r"must return a tensor with one number; got shape \(12,\)",
    ),
    "a float": ({"loss": lambda o, y: 1.0}, "must return a tensor with one number; got float"),
    "no gradient": ({"loss": lambda o, y: o.detach().sum()}, "in a way that has a gradient"),
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
    "negative label": (LABELS - 1, {}, "got label -1 and 3 outputs. hint: labels count from 0"),
    "floats": (NUMBERS, {}, r"needs labels that are whole numbers; got torch.float32. hint: y.long\(\)"),
    "a column": (LABELS[:, None], {}, r"got \(12, 3\) and \(12, 1\). hint: y.squeeze\(1\)"),
    "too few": (LABELS[:5], {}, r"needs outputs \(N, classes, \*S\) and labels \(N, \*S\); got \(12, 3\) and \(5,\)"),
    "no tensor": ("abc", {}, "needs targets that are a tensor; got str"),
    "other targets": (RNG.normal(size=(12, 2)), {"loss": "mse"}, r"got \(12, 3\) and \(12, 2\)"),
    "other samples": (RNG.normal(size=(6, 6)), {"loss": "mse"}, r"got \(12, 3\) and \(6, 6\)"),
    "accuracy of numbers": (NUMBERS, {"loss": lambda o, y: o.mean()}, "accuracy needs labels that are whole numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", TARGETS)
def test_targets_that_do_not_fit_the_outputs(case):
    targets, changes, text = TARGETS[case]
    with pytest.raises(NormValueError, match=text):
        training.trainer(setup(linear(), **changes)).evaluate([(TABLE, targets)])


def test_a_step_finds_the_wrong_label_before_torch_does():
    with pytest.raises(NormValueError, match="got label 3 and 3 outputs"):
        training.trainer(setup(linear())).step(TABLE, LABELS + 1)


def test_classes_on_the_last_axis_are_told():
    def build(norm):
        return nn.Linear(5, 3)

    with pytest.raises(NormValueError, match=r"got \(2, 6, 3\) and \(2, 6\). hint: the classes come second"):
        training.trainer(setup(build)).step(TABLE.reshape(2, 6, 5), LABELS.reshape(2, 6))


class Words(nn.Module):
    """Token ids and a scale to scores (N, classes, L)."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 3)

    def forward(self, ids, scale):
        assert not ids.is_floating_point()
        assert scale.dtype == torch.float32
        return (self.table(ids) * scale[:, None, None]).movedim(-1, 1)


def test_named_and_several_inputs_and_labels_per_position():
    ids, scale = RNG.integers(0, 7, (4, 5)), RNG.normal(size=4)
    labels = RNG.integers(0, 3, (4, 5))
    trainer = training.trainer(setup(lambda norm: Words()))
    table = trainer.network.table.weight.detach().numpy().astype(np.float64)
    right = (table[ids] * scale[:, None, None]).argmax(-1) == labels
    for x in ({"scale": scale, "ids": torch.from_numpy(ids)}, (ids, scale)):
        scores = trainer.evaluate([(x, labels)])
        np.testing.assert_allclose(scores.examples, right.mean(1))
        assert scores.metric == pytest.approx(right.mean())
    assert trainer.step((ids, scale), labels) == pytest.approx(scores.loss, rel=1e-5)


def test_a_batch_of_one_sample_is_worded_where_batch_norm_meets_it():
    def build(norm):
        return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    trainer = training.trainer(setup(build))
    with pytest.raises(NormValueError, match="batch norm must see at least 2 values per channel in training; got") as e:
        trainer.step(TABLE[:1], LABELS[:1])
    assert "drop_last=True" in str(e.value)
    with pytest.raises(NormValueError, match="drop_last=True"):
        training.trainer(setup(normed, norm="batch")).step(TABLE[:1], LABELS[:1])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as other:
        trainer.step(TABLE[:, :4], LABELS)
    assert not isinstance(other.value, NormError), "errors of the user's model stay what they are"


# Scores.


def test_scores_of_unequal_batches_are_means_over_samples():
    trainer = training.trainer(setup(linear()))
    outputs = numpy_outputs(trainer)
    scores = trainer.evaluate([(TABLE[:7], LABELS[:7]), (TABLE[7:], LABELS[7:])])
    right = outputs.argmax(1) == LABELS
    assert scores.loss == pytest.approx(numpy_losses(outputs, LABELS).mean(), rel=1e-5)
    assert scores.metric == pytest.approx(right.mean())
    np.testing.assert_array_equal(scores.examples, right)


def test_functions_of_the_users_see_batches_and_all_samples():
    """A median over all samples is not the mean of the medians of batches; the loss is a mean weighted by size."""
    trainer = training.trainer(
        setup(
            linear(1, squeeze=True),
            loss=lambda outputs, targets: (outputs - targets).pow(4).mean(),
            metric=lambda outputs, targets: np.median((outputs - targets).abs().numpy()),
        )
    )
    error = np.abs(numpy_outputs(trainer)[:, 0] - NUMBERS)
    scores = trainer.evaluate([(TABLE[:2], NUMBERS[:2]), (TABLE[2:], NUMBERS[2:])])
    assert scores.loss == pytest.approx((error**4).mean(), rel=1e-4)
    assert scores.metric == pytest.approx(np.median(error), rel=1e-4)
    assert scores.examples is None
    loss = training.trainer(setup(linear(), metric="loss", loss=lambda o, y: o.mean())).evaluate([(TABLE, LABELS)])
    assert loss.metric == loss.loss
    assert loss.examples is None


def test_metric_of_outputs_that_are_a_tuple_or_have_other_lengths():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            return {"scores": self.layer(x), "inputs": (x,)}

    trainer = training.trainer(
        setup(
            lambda norm: Two(),
            loss=lambda o, y: F.cross_entropy(o["scores"], y),
            metric=lambda o, y: len(o["scores"]) + len(o["inputs"][0]) + len(y),
        )
    )
    assert trainer.evaluate([(TABLE[:5], LABELS[:5]), (TABLE[5:], LABELS[5:])]).metric == 36
    lengths = training.trainer(setup(lambda norm: nn.Conv1d(5, 3, 1), loss=lambda o, y: o.mean(), metric=len))
    batches = [(np.ones((2, 5, length)), LABELS[:2]) for length in (3, 4)]
    with pytest.raises(NormValueError, match=r"samples of one shape in all batches; got \(2, 3, 3\) and \(2, 3, 4\)"):
        lengths.evaluate(batches)
    with pytest.raises(NormValueError, match="there must be batches to score; got none"):
        trainer.evaluate([])


@pytest.mark.parametrize("as_trained", [False, True])
def test_scoring_leaves_the_network_as_it_was(as_trained):
    def build(norm):
        return nn.Sequential(nn.Linear(5, 8), norm(8), nn.Dropout(0.5), nn.Linear(8, 3))

    trainer = training.trainer(setup(build, norm="batch"))
    trainer.network[2].eval()
    before = copy.deepcopy(trainer.network.state_dict())
    modes = [module.training for module in trainer.network.modules()]
    state = torch.get_rng_state()
    trainer.evaluate([(TABLE, LABELS)] * 2, as_trained=as_trained)
    torch.testing.assert_close(trainer.network.state_dict(), before, rtol=0, atol=0)
    assert torch.get_rng_state().equal(state)
    assert [module.training for module in trainer.network.modules()] == modes


def test_as_trained_scores_with_the_statistics_of_the_batch():
    def build(norm):
        return nn.Sequential(norm(5), nn.Linear(5, 3))

    trainer = training.trainer(setup(build, norm="batch"))
    weight, bias = (p.detach().numpy().astype(np.float64) for p in trainer.network[1].parameters())
    x = 3 * TABLE + 10
    normalized = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    for as_trained, seen in ((True, normalized), (False, x / np.sqrt(1 + 1e-5))):
        expected = numpy_losses(seen @ weight.T + bias, LABELS).mean()
        assert trainer.evaluate([(x, LABELS)], as_trained=as_trained).loss == pytest.approx(expected, rel=1e-4)


def test_probe_of_a_trainer_measures_in_training_mode():
    trainer = training.trainer(setup("mlp", norm="batch"))
    trainer.network.eval()
    sites = trainer.probe(TABLE)
    assert [site.activation for site in sites] == ["relu"] * 10
    for site in sites:
        np.testing.assert_allclose(site.input.mean(0), 0, atol=1e-5)
    assert not trainer.network.training


# The embedded models.


@pytest.mark.parametrize(("model", "shape", "layers"), [("cnn", (2, 8, 8), 7), ("mlp", (5,), 11)])
def test_embedded_models_start_from_he_drawn_by_numpy(model, shape, layers):
    for norm, position in (("none", "before"), ("batch", "after")):
        weights = training.trainer(setup(model, shape=shape, norm=norm, position=position, seed=4)).weights()
        assert list(weights) == [f"layer {number}" for number in range(layers)]
        for number, weight in enumerate(weights.values()):
            drawn = np.random.default_rng([4, 1, number]).standard_normal(weight.shape)
            np.testing.assert_allclose(weight, drawn * np.sqrt(2 / weight[0].size), rtol=1e-6)
