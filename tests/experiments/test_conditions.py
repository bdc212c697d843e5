import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

import normkit
from normkit.errors import NormError
from normkit.experiments.conditions import AS_USUAL, OUTLIER, Conditions, by_pairs, lit, spoiled_inputs, spoiled_labels
from normkit.experiments.config import Config, TrialConfig
from normkit.experiments.data import Dataset, Part, load, prepare
from normkit.experiments.feeds import ArrayFeed
from normkit.experiments.results import TrialResult
from normkit.experiments.store import plain as stored
from normkit.torch.models import build, weighted_layers
from normkit.torch.training import TorchTrainer

SETTINGS = {"shape": (1, 8, 8), "classes": 10, "position": "before", "steps": 100, "seed": 0}


@pytest.mark.parametrize("name", Conditions.CONSTRAINTS)
def test_every_value_that_makes_no_sense_is_refused(name):
    constraint = Conditions.CONSTRAINTS[name]
    for bad in constraint.bad():
        with pytest.raises(NormError, match=f"`{name}` must be"):
            Conditions(**{name: bad})
    assert constraint.allows(getattr(AS_USUAL, name))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"conditions": ({"label_noises": 0.1},)}, "did you mean label_noise?"),
        ({"conditions": ("label_noise",)}, "a mapping of names to values"),
        ({"conditions": ({}, {})}, "twice"),
        ({"conditions": ({"dropout": 0.5},), "framework": "keras"}, "must be trained with PyTorch: dropout"),
        ({"conditions": ({"depth": 4},), "model": "mine.py:build"}, "must be asked of cnn or mlp: depth"),
        ({"conditions": ({"outliers": 0.1},), "run": "mine.py:train"}, "must be left to a training loop"),
    ],
)
def test_conditions_that_cannot_be_had_are_refused(changes, said):
    with pytest.raises(NormError) as error:
        Config(**changes)
    assert said in str(error.value)


def test_data_may_be_spoiled_for_any_framework_and_model():
    assert Config(conditions=({"outliers": 0.1},), framework="keras", model="mine.py:build")


def test_a_trial_under_no_conditions_keeps_its_key():
    """The canonical form of a trial as it was before there were conditions."""
    values = {
        "framework": "torch", "model": "cnn", "code": "", "data": "f", "norm": "batch", "lr": 0.1, "batch_size": 32,
        "inputs": "standard", "seed": 0, "epochs": 6, "loss": "", "optimizer": "sgd", "metric": "",
    }  # fmt: skip
    trial = TrialConfig(**values)
    assert json.loads(trial.canonical()) == {**values, "momentum": 0.9, "protocol": 2}
    other = dataclasses.replace(trial, conditions=Conditions(dropout=0.5))
    assert other.key() != trial.key()
    assert json.loads(other.canonical())["conditions"] == {"dropout": 0.5}
    assert str(other).endswith("dropout 0.5, seed 0")


def test_results_with_and_without_conditions_are_read(trial):
    kept = stored(trial())
    plain = json.loads(json.dumps(kept.to_dict()))
    assert TrialResult.from_dict(plain) == kept
    del plain["config"]["conditions"]
    assert TrialResult.from_dict(plain) == kept
    changed = dataclasses.replace(kept, config=dataclasses.replace(kept.config, conditions=Conditions(depth=4)))
    assert TrialResult.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed


def test_a_share_of_the_labels_is_drawn_anew():
    y = np.arange(1000) % 10
    spoiled = spoiled_labels(y, 0.3, 10)
    assert 0.3 * 0.9 - 0.04 < np.mean(spoiled != y) < 0.3 * 0.9 + 0.04  # a tenth stays right; 3 sd of 300 draws
    assert set(spoiled) == set(range(10))
    assert (y == np.arange(1000) % 10).all()


def test_a_share_of_the_inputs_becomes_outliers():
    x = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    factors = (spoiled_inputs(x, 0.05) / x)[:, 0]
    assert sorted(set(np.round(factors))) == [1, OUTLIER]
    assert (factors > 5).sum() == 5


def test_only_what_is_trained_on_is_spoiled():
    data = load("digits")
    clean = prepare(data, "none")
    spoiled = prepare(data, "none", Conditions(label_noise=0.5, outliers=0.5))
    for part in ("validation", "test"):
        for kind in ("x", "y"):
            assert (getattr(getattr(clean, part), kind) == getattr(getattr(spoiled, part), kind)).all()
    assert (clean.train.y != spoiled.train.y).any()
    assert (clean.train.x != spoiled.train.x).any()


def images(classes=4, samples=40):
    rng = np.random.default_rng(1)
    return rng.uniform(0, 1, (samples, 1, 4, 4)).astype(np.float32), np.arange(samples) % classes


def moved(before, after):
    """Contrast and brightness of each image, by least squares."""
    return np.array([np.polyfit(a.ravel(), b.ravel(), 1) for a, b in zip(before, after, strict=True)])


@pytest.mark.parametrize("appearance", ["random", "tied", "swapped", "shifted"])
def test_light(appearance):
    (x, y), top = images(), images()[0].max()
    train, test = (moved(x, shown) for shown in lit(appearance, (x, y), (x, y), 4))
    train[:, 1] /= top
    test[:, 1] /= top
    if appearance == "random":
        assert len(np.unique(train.round(3), axis=0)) == len(x)
        assert 0.4 <= train[:, 0].min() < train[:, 0].max() <= 1.6
    elif appearance == "shifted":
        np.testing.assert_allclose(train, [[1, 0]] * len(x), atol=1e-5)
        np.testing.assert_allclose(test, [[0.5, 1]] * len(x), atol=1e-5)
    else:
        by_class = np.array([train[y == label][0] for label in range(4)])
        np.testing.assert_allclose(train, by_class[y], atol=1e-4)
        assert len(np.unique(by_class[:, 0].round(3))) == 4
        np.testing.assert_allclose(test, by_class[(y + 2) % 4 if appearance == "swapped" else y], atol=1e-4)


def test_what_data_cannot_be_under_is_said():
    x = np.ones((20, 3), np.float32)
    table = ArrayFeed(Dataset("made", Part(x, np.arange(20) % 2), Part(x, np.arange(20) % 2), 2))
    numbers = ArrayFeed(Dataset("made", Part(x, x[:, 0]), Part(x, x[:, 0]), None))
    with pytest.raises(NormError, match="appearance must be asked of images; got rows of 3 columns"):
        table.under(Conditions(appearance="tied"))
    with pytest.raises(NormError, match="label_noise must be asked of data with classes"):
        numbers.under(Conditions(label_noise=0.1))


def test_batches_by_class_hold_the_same_samples_two_classes_at_a_time():
    x = np.arange(60, dtype=np.float32)[:, None]
    feed = ArrayFeed(Dataset("made", Part(x, np.arange(60) % 3), Part(x[:6], np.arange(6) % 3), 3))
    usual = list(feed.batches("none", 12, 0, 0))
    blocked = list(feed.under(Conditions(by_class=True)).batches("none", 12, 0, 0))
    for (x1, y1), (x2, y2) in zip(usual, blocked, strict=True):
        changes = [tuple(sorted({int(a), int(b)})) for a, b in itertools.pairwise(y2) if a != b]
        assert len(set(changes)) <= 2  # those of the pair, and one where the class without a partner begins
        assert sorted(x1[:, 0]) == sorted(x2[:, 0])
        assert sorted(y1) == sorted(y2)


def test_groups_of_a_balanced_batch_hold_two_classes_alike():
    y = np.random.default_rng(0).permutation(np.arange(160) % 10)
    orders = [by_pairs(y, 0, 0, batch) for batch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(160))
        for group in y[order].reshape(5, 32):
            assert sorted(np.unique(group, return_counts=True)[1]) == [16, 16]
            assert (group[::2] == group[0]).all()
    assert len({tuple(y[order]) for order in orders}) == 3  # other pairs in every batch


# ---- networks


def network(model="mlp", norm="batch", groups=1, **conditions):
    return build(model, norm=norm, groups=groups, conditions=Conditions(**conditions), **SETTINGS)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_network_under_no_conditions_is_the_usual_one(model):
    usual = build(model, norm="batch", **SETTINGS)
    under = network(model)
    assert str(usual) == str(under)
    assert all(torch.equal(a, b) for a, b in zip(usual.parameters(), under.parameters(), strict=True))


@pytest.mark.parametrize(("model", "depth"), [("mlp", 3), ("cnn", 2), ("cnn", 5), ("cnn", 8)])
def test_depth_is_the_number_of_hidden_layers(model, depth):
    made = network(model, "none", depth=depth)
    assert len(weighted_layers(made)) == depth + 1
    assert made(torch.ones(2, 1, 8, 8)).shape == (2, 10)


def test_initial_weights_are_scaled():
    usual, larger = network(norm="none"), network(norm="none", weights=3.0)
    for one, other in zip(weighted_layers(usual), weighted_layers(larger), strict=True):
        torch.testing.assert_close(3 * one.weight, other.weight)


def test_dropout_stands_behind_every_hidden_activation():
    made = network("cnn", dropout=0.5)
    assert sum(isinstance(layer, nn.Dropout) for layer in made) == 6
    kinds = [type(layer).__name__ for layer in made]
    assert all(kinds[place - 1] == "ReLU" for place, kind in enumerate(kinds) if kind == "Dropout")
    assert {layer.p for layer in made if isinstance(layer, nn.Dropout)} == {0.5}


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_batch_norm_first_takes_any_scale_of_the_inputs_away(model):
    made = network(model, "none", input_norm=True).train()
    x = torch.rand(32, 1, 8, 8)
    torch.testing.assert_close(made(x), made(1000 * x - 5), rtol=1e-3, atol=1e-3)


def test_momentum_is_that_of_the_running_statistics():
    layer = next(m for m in network(momentum=0.01).modules() if isinstance(m, nn.BatchNorm1d))
    layer.train()(torch.full((4, 128), 3.0))
    torch.testing.assert_close(layer.running_mean, torch.full((128,), 0.03))


@pytest.mark.parametrize("norm", ["batch", "renorm"])
def test_groups_of_samples_are_normalized_apart(norm):
    """The output of a group does not depend on the other groups of the batch."""
    made = network(norm=norm, groups=4, norm_batch=8).train()
    x = torch.rand(32, 1, 8, 8)
    other = torch.cat([x[:8], 5 * torch.rand(24, 1, 8, 8)])
    torch.testing.assert_close(made(x)[:8], made(other)[:8])
    plain = network(norm=norm).train()
    assert (plain(x)[:8] - plain(other)[:8]).abs().max() > 0.01
    made.eval()
    torch.testing.assert_close(made(x)[:8], made(other)[:8])


def test_renorm_in_groups_follows_the_data_as_fast_as_without():
    """After a step of 4 equal groups the average has moved as far as after one of the whole batch."""
    x = torch.full((32, 128), 3.0) + torch.rand(8, 128).repeat(4, 1)
    whole, apart = network(norm="renorm"), network(norm="renorm", groups=4, norm_batch=8)
    for made in (whole, apart):
        next(m for m in made if type(m).__name__ in ("BatchRenorm1d", "_InGroups")).train()(x)
    means = [dict(made.named_buffers()) for made in (whole, apart)]
    one, other = (next(b for n, b in found.items() if n.endswith("running_mean")) for found in means)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_population_statistics_are_those_of_all_batches(count):
    made = nn.Sequential(nn.BatchNorm1d(3))
    trainer = TorchTrainer(made, torch.optim.SGD(made.parameters(), 0.1), "mse", "loss")
    batches = [np.random.default_rng(n).normal(n, 1 + n, (20, 3)).astype(np.float32) for n in range(count)]
    trainer.recalibrate((x, None) for x in batches)
    every = np.concatenate(batches)
    np.testing.assert_allclose(made[0].running_mean, every.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(made[0].running_var, every.var(0, ddof=1), rtol=1e-5)


def test_a_network_without_running_statistics_stays_as_it_is():
    made = nn.Sequential(nn.LayerNorm(3))
    before = [parameter.clone() for parameter in made.parameters()]
    TorchTrainer(made, torch.optim.SGD(made.parameters(), 0.1), "mse", "loss").recalibrate([(np.ones((4, 3)), None)])
    assert all(torch.equal(a, b) for a, b in zip(before, made.parameters(), strict=True))


def test_a_comparison_under_several_conditions(arrays):
    """Every condition is a group of its own, and population statistics change evaluation alone."""
    asked = [{}, {"momentum": 0.01}, {"momentum": 0.01, "population": "training"}, {"depth": 2, "population": "test"}]
    result = normkit.compare(
        data=arrays, norms=("none", "batch"), lrs=(0.03,), batch_sizes=(8,), seeds=1, epochs=2, conditions=asked,
        workers=1, show_progress=False,
    )  # fmt: skip
    assert [group.setting.conditions for group in result.groups] == [
        "", "momentum 0.01", "momentum 0.01, population training", "depth 2, population test"
    ]  # fmt: skip
    trials = {(str(t.config.conditions), t.config.norm): t for t in result.trials}
    slow, settled = (trials[words, "batch"] for words in ("momentum 0.01", "momentum 0.01, population training"))
    assert slow.train_losses == settled.train_losses
    assert slow.gap.train_loss == settled.gap.train_loss
    assert abs(settled.gap.eval_loss - settled.gap.train_loss) < abs(slow.gap.eval_loss - slow.gap.train_loss)
    assert trials["", "none"].final == trials["momentum 0.01", "none"].final
    assert "momentum 0.01" in str(result)


def test_groups_must_fill_a_batch(arrays):
    with pytest.raises(NormError, match="must be a multiple of `norm_batch`; got 8 and 3"):
        normkit.compare(data=arrays, batch_sizes=(8,), conditions=[{"norm_batch": 3}], workers=1, show_progress=False)


def test_wine_is_a_table_of_columns_of_very_different_size():
    wine = load("wine")
    assert (len(wine.train.y), len(wine.test.y), wine.shape, wine.classes) == (133, 45, (13,), 3)
    assert wine.train.x[:, 12].max() == 1680
    assert set(np.unique(wine.test.y)) == {0, 1, 2}
