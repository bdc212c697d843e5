"""What is measured around a network, against closed forms of quadratic losses and of a linear network, in NumPy."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from normkit.experiments.conditions import Conditions
from normkit.experiments.config import TrialConfig
from normkit.experiments.data import Dataset, Part
from normkit.experiments.feeds import ArrayFeed
from normkit.experiments.landscape import LENGTHS, PERCENTILES, Probing, along_gradient, shifts
from normkit.experiments.protocol import training
from normkit.experiments.results import TrialResult
from normkit.experiments.store import plain as stored
from normkit.experiments.trial import Recipe, run_trial
from normkit.torch.models import build
from normkit.torch.training import TorchTrainer

SIZES = (3, 2, 4)  # parameters of three layers
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, a few sums of a few terms
SAMPLES = 48


class Quadratic:
    """L(w) = w A w / 2, whose gradient is A w everywhere."""

    def __init__(self, seed):
        drawn = np.random.default_rng(seed).normal(size=(sum(SIZES), sum(SIZES)))
        self.matrix = drawn + drawn.T

    def __call__(self, layers):
        w = np.concatenate(layers)
        slope = self.matrix @ w
        return float(w @ slope / 2), np.split(slope, np.cumsum(SIZES)[:-1])


def drawn(seed):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=size) for size in SIZES]


@pytest.mark.parametrize("seed", range(3))
def test_the_shift_of_a_quadratic_is_its_matrix_times_how_far_the_earlier_layers_moved(seed):
    surface, before, after = Quadratic(seed), drawn(seed + 10), drawn(seed + 20)
    found = shifts(surface, before, after, surface(before)[1])
    ends = np.cumsum(SIZES)
    moved = np.concatenate(after) - np.concatenate(before)
    slope = surface.matrix @ np.concatenate(before)
    assert found[0] == (0.0, 1.0)
    for place in (1, 2):
        rows, earlier = slice(ends[place - 1], ends[place]), slice(0, ends[place - 1])
        change = surface.matrix[rows, earlier] @ moved[earlier]
        np.testing.assert_allclose(found[place].difference, np.linalg.norm(change), **EXACT)
        g, h = slope[rows], slope[rows] + change
        np.testing.assert_allclose(found[place].cosine, g @ h / np.linalg.norm(g) / np.linalg.norm(h), **EXACT)


def test_layers_that_do_not_meet_in_the_loss_have_no_shift():
    surface = Quadratic(0)
    for a, b in ((0, 3), (3, 5), (5, 9)):
        surface.matrix[a:b, :a] = surface.matrix[:a, a:b] = 0
    found = shifts(surface, drawn(1), drawn(2), surface(drawn(1))[1])
    np.testing.assert_allclose([shift.difference for shift in found], 0, atol=1e-12)
    np.testing.assert_allclose([shift.cosine for shift in found], 1, **EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_along_the_gradient_of_a_quadratic(seed):
    """L falls by a |g|² - a² gAg / 2, the gradient changes by a |A g|, beta is |A g| / |g| whatever the step."""
    surface, at, lengths = Quadratic(seed), drawn(seed), (0.01, 0.03, 0.1)
    found = along_gradient(surface, at, surface(at)[1], lengths)
    loss, slopes = surface(at)
    g = np.concatenate(slopes)
    bent = surface.matrix @ g
    losses = [loss - a * g @ g + a * a * g @ bent / 2 for a in lengths]
    np.testing.assert_allclose(found.losses, (min(losses), max(losses)), **EXACT)
    changes = np.multiply(lengths, np.linalg.norm(bent))
    np.testing.assert_allclose(found.changes, (changes.min(), changes.max()), **EXACT)
    np.testing.assert_allclose(found.smoothness, np.linalg.norm(bent) / np.linalg.norm(g), **EXACT)


def test_along_the_main_axis_beta_is_the_largest_curvature():
    surface = Quadratic(4)
    values, axes = np.linalg.eigh(surface.matrix)
    top = np.argmax(np.abs(values))
    at = np.split(axes[:, top], np.cumsum(SIZES)[:-1])
    found = along_gradient(surface, at, surface(at)[1], (0.1, 0.5))
    np.testing.assert_allclose(found.smoothness, abs(values[top]), rtol=1e-10)


def test_where_there_is_no_gradient_there_is_no_smoothness():
    found = along_gradient(lambda layers: (1.0, [np.zeros(2)]), [np.ones(2)], [np.zeros(2)], (0.1,))
    assert math.isnan(found.smoothness)
    assert found[:2] == ((1.0, 1.0), (0.0, 0.0))


# ---- the surface of a network of torch


def linear(width=3):
    """Two linear layers without anything between: a loss whose gradients NumPy writes down."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))


def batch(columns=4, targets=2):
    rng = np.random.default_rng(1)
    return rng.normal(size=(8, columns)).astype(np.float32), rng.normal(size=(8, targets)).astype(np.float32)


def trainer_of(network, loss="mse", lr=0.1):
    return TorchTrainer(network, torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9), loss, "loss")


def by_hand(layers, x, y):
    """Loss and gradients of two linear layers under the mean squared error, in float64."""
    (w, b), (v, c) = layers
    hidden = x @ w.T + b
    off = hidden @ v.T + c - y
    slope = 2 * off / off.size
    back = slope @ v
    return (off**2).mean(), [(back.T @ x, back.sum(0)), (slope.T @ hidden, slope.sum(0))]


def parted(vectors, shapes):
    found = []
    for vector, shape in zip(vectors, shapes, strict=True):
        size = math.prod(shape)
        found.append((vector[:size].reshape(shape), vector[size:]))
    return found


def test_a_network_of_torch_against_gradients_written_by_hand():
    network, (x, y) = linear(), batch()
    trainer, shapes = trainer_of(network), ((3, 4), (2, 3))
    surface, at = trainer.surface(x, y), trainer.layers()
    assert surface.weights == (12, 6)
    assert [vector.dtype for vector in at] == [np.float64] * 2
    x, y = x.astype(np.float64), y.astype(np.float64)
    for place in (at, [vector + 0.3 for vector in at]):
        loss, slopes = surface(place)
        expected, parts = by_hand(parted(place, shapes), x, y)
        np.testing.assert_allclose(loss, expected, **EXACT)
        for slope, (weight, bias) in zip(slopes, parts, strict=True):
            np.testing.assert_allclose(slope, np.concatenate([weight.ravel(), bias]), **EXACT)


def test_a_probe_of_a_step_is_what_numpy_says_of_it():
    network, (x, y) = linear(), batch()
    trainer, shapes, lr = trainer_of(network), ((3, 4), (2, 3)), 0.1
    probing = Probing(1, 1, lr, x)
    before = trainer.layers()
    probing.before(0, trainer, x, y)
    trainer.step(x, y)
    probing.after(trainer)
    after = trainer.layers()
    (probe,) = probing.probes
    x, y = x.astype(np.float64), y.astype(np.float64)

    def flat(place):
        loss, parts = by_hand(parted(place, shapes), x, y)
        return loss, [np.concatenate([weight.ravel(), bias]) for weight, bias in parts]

    loss, slopes = flat(before)
    _, moved = flat([after[0], before[1]])
    size = np.linalg.norm(np.concatenate(slopes))
    np.testing.assert_allclose((probe.loss, probe.gradient), (loss, size), **EXACT)
    np.testing.assert_allclose(probe.layers[1].difference, np.linalg.norm(slopes[1] - moved[1]), **EXACT)
    ends = [flat([p - lr * s * g for p, g in zip(before, slopes, strict=True)]) for s in LENGTHS]
    np.testing.assert_allclose(probe.losses, (min(e[0] for e in ends), max(e[0] for e in ends)), **EXACT)
    changes = [np.linalg.norm(np.concatenate(e[1]) - np.concatenate(slopes)) for e in ends]
    np.testing.assert_allclose(probe.changes, (min(changes), max(changes)), **EXACT)
    betas = [change / (lr * s * size) for change, s in zip(changes, LENGTHS, strict=True)]
    np.testing.assert_allclose(probe.smoothness, max(betas), **EXACT)
    for layer, old, new, slope, many in zip(probe.layers, before, after, slopes, (12, 6), strict=True):
        np.testing.assert_allclose(layer.gradient, np.linalg.norm(slope[:many]), **EXACT)
        np.testing.assert_allclose(layer.weight, np.linalg.norm(old[:many]), **EXACT)
        a, b = old[:many] / np.linalg.norm(old[:many]), new[:many] / np.linalg.norm(new[:many])
        # Half the angle by its sine: well conditioned, where the arc cosine has lost half the digits.
        np.testing.assert_allclose(layer.turned, 2 * np.arcsin(np.linalg.norm(a - b) / 2), rtol=1e-6)
    assert probe.percentiles == ()  # no activation


@pytest.mark.parametrize("norm", ["none", "batch", "renorm"])
def test_a_surface_leaves_everything_as_it_was_and_says_the_same_twice(norm):
    x, _ = batch(64)
    y = np.arange(8) % 3
    network = build("mlp", shape=(64,), classes=3, norm=norm, position="before", steps=10, seed=0)
    trainer = trainer_of(network, "cross_entropy")
    state = {name: value.clone() for name, value in network.state_dict().items()}
    numbers = torch.get_rng_state()
    surface, at = trainer.surface(x, y), trainer.layers()
    first, second = surface(at), surface(at)
    assert first[0] == second[0]
    for a, b in zip(first[1], second[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert len(at) == 11
    assert sum(map(len, at)) == sum(p.numel() for p in network.parameters())
    assert surface(at)[0] == pytest.approx(trainer.step(x, y), rel=1e-4)  # float64 against float32


def test_what_stands_before_the_first_layer_belongs_to_it():
    network = nn.Sequential(nn.BatchNorm1d(4), linear())
    surface = trainer_of(network).surface(*batch())
    assert surface.weights == (12, 6)
    assert [len(vector) for vector in trainer_of(network).layers()] == [12 + 3 + 8, 6 + 2]


# ---- in a trial


@pytest.fixture(scope="module")
def trials():
    """The same trial with and without probes."""
    rng = np.random.default_rng(0)
    y = np.arange(SAMPLES) % 3
    x = (rng.normal(size=(SAMPLES, 5)) + y[:, None]).astype(np.float32)
    feed = ArrayFeed(Dataset("made", Part(x, y), Part(x, y), 3))
    config = TrialConfig("torch", "mlp", "", "", "batch", 0.05, 8, "none", 0, 2, "cross_entropy", "sgd", "accuracy")
    recipe = Recipe("mlp", "cross_entropy", "sgd", "accuracy", "accuracy")
    seen = [Conditions(depth=3, dropout=0.2, landscape=count) for count in (0, 4)]
    return [run_trial(dataclasses.replace(config, conditions=one), recipe, feed, training("torch")) for one in seen]


def test_probes_change_nothing_of_a_trial(trials):
    blind, seen = trials
    assert [e.loss for e in seen.curve] == [e.loss for e in blind.curve]  # dropout draws the same numbers, too
    assert blind.probes == ()
    assert [probe.step for probe in seen.probes] == [round((seen.steps - 1) * share / 3) for share in range(4)]


def test_probes_of_a_trial_are_complete(trials):
    for probe in trials[1].probes:
        assert len(probe.layers) == 4
        assert len(probe.percentiles) == 3
        assert all(len(site) == len(PERCENTILES) and sorted(site) == list(site) for site in probe.percentiles)
        assert probe.layers[0][:2] == (0.0, 1.0)
        assert all(layer.difference > 0 and -1 <= layer.cosine <= 1 for layer in probe.layers[1:])
        assert 0 < probe.losses[0] <= probe.losses[1]
        assert probe.changes[0] <= probe.changes[1]


def test_probes_survive_the_storage(trials):
    kept = stored(trials[1])
    plain = json.loads(json.dumps(kept.to_dict(), allow_nan=False))
    assert TrialResult.from_dict(plain) == kept
    del plain["probes"]  # of a trial from before there were any
    assert TrialResult.from_dict(plain) == dataclasses.replace(kept, probes=())
