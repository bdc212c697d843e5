import dataclasses
import math
import time

import numpy as np
import pytest

from normkit.errors import NormValueError
from normkit.experiments import trial as trials
from normkit.experiments.config import TrialConfig
from normkit.experiments.data import Dataset, Part
from normkit.experiments.feeds import ArrayFeed
from normkit.experiments.protocol import Scores, SiteValues, training
from normkit.experiments.results import TrialResult, unpacked
from normkit.experiments.store import plain
from normkit.experiments.trial import Recipe

SHAPES = {"cnn": (2, 8, 8), "mlp": (5,)}
NORMS = ("none", "batch", "batch:after", "layer", "group", "renorm", "rms", "ghost")


def feed(shape=(5,), samples=50):
    """40 samples for training, 10 for validation, 14 for the test."""
    rng = np.random.default_rng(0)
    parts = [Part(rng.normal(size=(n, *shape)).astype(np.float32), np.arange(n) % 3) for n in (samples, 14)]
    return ArrayFeed(Dataset("made", *parts, classes=3))


def config(model="mlp", norm="none", seed=0, batch_size=8, epochs=2, lr=0.01, loss="cross_entropy"):
    return TrialConfig(
        framework="torch", model=model, code="", data="f", norm=norm, lr=lr, batch_size=batch_size, inputs="none",
        seed=seed, epochs=epochs, loss=loss, optimizer="sgd", metric="accuracy",
    )  # fmt: skip


def recipe(model="mlp", loss="cross_entropy", optimizer="sgd", metric="accuracy"):
    return Recipe(model, loss, optimizer, metric, metric_name="accuracy")


def run(trial=None, shape=(5,), **changes):
    trial = trial or config()
    return trials.run_trial(trial, recipe(trial.model, **changes), feed(shape), training("torch"))


class Scripted:
    """A framework whose trainer returns given losses and notes what it is shown."""

    def __init__(self, losses=(), validation_loss=1.0):
        self.losses, self.validation_loss = list(losses), validation_loss
        self.seen, self.evaluated, self.seeds, self.prepared = [], [], [], []

    def trainer(self, setup):
        self.setup = setup
        return self

    def seed(self, seed):
        self.seeds.append(seed)

    def versions(self):
        return {"scripted": "1"}

    def prepare(self, x, y):
        time.sleep(0.1)
        self.prepared.append(len(self.seen))

    def step(self, x, y):
        time.sleep(0.001)
        self.seen.append(x[:, 0].copy())
        return self.losses[len(self.seen) - 1] if self.losses else 1.0

    def evaluate(self, batches, *, as_trained=False):
        time.sleep(0.02)
        samples = sum(len(y) for _, y in batches)
        self.evaluated.append((samples, as_trained))
        return Scores(0.25 if as_trained else self.validation_loss, 0.5, np.arange(samples) % 2.0)

    def probe(self, x):
        return [SiteValues("1", "relu", x, np.maximum(x, 0), 1, None, None)]


def test_a_trial_counts_steps_scores_the_test_part_once_and_times_only_steps():
    script = Scripted()
    result = trials.run_trial(config(), recipe(), feed(), script)
    assert result.steps == script.setup.steps == 10
    assert [evaluation.step for evaluation in result.curve] == list(range(11))
    assert result.train_losses == (1.0, 1.0)
    assert not result.diverged
    assert [n for n, _ in script.evaluated].count(14) == 1
    assert result.final == 0.5
    np.testing.assert_array_equal(unpacked(result.examples), np.arange(14) % 2)
    assert script.prepared == [0], "once, since all batches have one shape"
    # Ten steps of a millisecond, not twelve evaluations of twenty, nor what is prepared, a hundred.
    assert 0.01 <= result.seconds < 0.1
    assert result.curve[-1].seconds == result.seconds
    assert 0.001 <= result.step_seconds < 0.01
    assert result.versions == (("scripted", "1"),)


def test_every_shape_of_a_batch_is_prepared_before_its_first_step():
    class Ragged(ArrayFeed):
        def batches(self, *arguments):
            for number, (x, y) in enumerate(super().batches(*arguments)):
                yield ({"x": x[:4]}, y[:4]) if number == 2 else ({"x": x}, y)

    class Named(Scripted):
        def step(self, x, y):
            return super().step(x["x"], y)

    script = Named()
    trials.run_trial(config(), recipe(), Ragged(feed().data), script)
    assert script.prepared == [0, 2]


def test_the_gap_is_taken_on_the_same_training_batches():
    script = Scripted()
    result = trials.run_trial(config(), recipe(), feed(), script)
    assert script.evaluated[-2:] == [(40, True), (40, False)]
    assert (result.gap.train_loss, result.gap.eval_loss) == (0.25, 1.0)


def test_sites_are_measured_at_initialization_and_after_each_epoch():
    result = trials.run_trial(config(), recipe(), feed(), Scripted())
    assert [snapshot.step for snapshot in result.snapshots] == [0, 5, 10]
    first, second, _ = (snapshot.sites[0] for snapshot in result.snapshots)
    assert (first.drift, second.drift) == (None, 0.0)


def test_random_numbers_are_seeded_before_the_network_and_each_epoch():
    first, second = Scripted(), Scripted()
    for script in (first, second):
        trials.run_trial(config(), recipe(), feed(), script)
    assert first.seeds == second.seeds
    assert len(set(first.seeds)) == 3
    trials.run_trial(config(seed=1), recipe(), feed(), first)
    assert not set(first.seeds[3:]) & set(first.seeds[:3])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_trial_as_diverged(bad):
    script = Scripted([1.0] * 6 + [bad] + [1.0] * 9)
    result = trials.run_trial(config(), recipe(), feed(), script)
    assert result.diverged
    assert result.steps == len(script.seen) == 7
    assert result.final is None
    assert result.gap is None
    assert result.train_losses == (1.0,)
    assert all(math.isfinite(evaluation.loss) for evaluation in result.curve)


def test_a_validation_loss_that_is_not_finite_counts_as_diverged():
    script = Scripted()
    original = script.evaluate
    script.evaluate = lambda b, **k: original(b, **k) if len(script.seen) < 5 else Scores(math.nan, 0.0, None)
    result = trials.run_trial(config(), recipe(), feed(), script)
    assert result.diverged
    assert result.steps == 5


def test_order_depends_on_the_seed_alone():
    seen = {}
    for norm, lr, seed in [("none", 0.1, 0), ("batch", 0.1, 0), ("none", 0.3, 0), ("none", 0.1, 1)]:
        script = Scripted()
        trials.run_trial(config(norm=norm, lr=lr, seed=seed), recipe(), feed(), script)
        seen[norm, lr, seed] = np.concatenate(script.seen)
    reference = seen.pop(("none", 0.1, 0))
    other_seed = seen.pop(("none", 0.1, 1))
    for order in seen.values():
        np.testing.assert_array_equal(order, reference)
    assert not np.array_equal(other_seed, reference)


@pytest.mark.parametrize("model", ["cnn", "mlp"])
def test_every_variant_of_a_seed_starts_from_the_same_weights(model):
    def weights(norm, seed):
        found = trials.trainer_for(config(model, norm, seed), recipe(model), feed(SHAPES[model]), training("torch"))
        return found.weights()

    reference = weights("none", 0)
    for norm in NORMS[1:]:
        start = weights(norm, 0)
        assert start.keys() == reference.keys()
        for name in reference:
            np.testing.assert_array_equal(start[name], reference[name])
    other = weights("none", 1)
    assert all(not np.array_equal(other[name], reference[name]) for name in reference)


def test_weights_follow_he():
    start = trials.trainer_for(config(), recipe(), feed(), training("torch")).weights()
    assert len(start) == 11
    for weight in list(start.values())[1:-1]:
        assert weight.std() == pytest.approx(math.sqrt(2 / weight.shape[1]), rel=0.03)


@pytest.mark.parametrize("model", ["cnn", "mlp"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_learns_something_easy(model, norm):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 250)
    x = (rng.normal(size=(250, *SHAPES[model])) + 2.0 * y.reshape(-1, *[1] * len(SHAPES[model]))).astype(np.float32)
    easy = ArrayFeed(Dataset("easy", Part(x, y), Part(x, y), classes=2))
    asked = config(model, norm, batch_size=20, epochs=3, lr=0.02)
    result = trials.run_trial(asked, recipe(model), easy, training("torch"))
    assert result.train_losses[-1] < 0.8 * result.train_losses[0]
    assert result.final == pytest.approx(unpacked(result.examples).mean())
    assert len(result.snapshots) == 4
    names = {len(snapshot.sites) for snapshot in result.snapshots}
    assert names == {6 if model == "cnn" else 10}  # the same sites in every variant


def test_a_trial_gives_the_same_numbers_twice_and_survives_json():
    first, second = (run(config("cnn", "batch"), SHAPES["cnn"]) for _ in range(2))
    kept = dataclasses.replace(plain(first), seconds=0.0, step_seconds=0.0, peak_memory=0, curve=())
    assert plain(plain(first)) == plain(first)
    assert kept == dataclasses.replace(plain(second), seconds=0.0, step_seconds=0.0, peak_memory=0, curve=())
    assert [e.loss for e in first.curve] == [e.loss for e in second.curve]
    assert isinstance(kept, TrialResult)


def test_measuring_changes_nothing_in_training(monkeypatch):
    """With the probe and the gap taken out, the same weights come out."""
    watched = run(config("cnn", "batch"), SHAPES["cnn"])
    monkeypatch.setattr("normkit.torch.training.TorchTrainer.probe", lambda self, x: [])
    monkeypatch.setattr(trials, "_gap", lambda *arguments: None)
    unwatched = run(config("cnn", "batch"), SHAPES["cnn"])
    assert watched.train_losses == unwatched.train_losses
    assert watched.final == unwatched.final


def test_numbers_can_be_predicted():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(250, 4)).astype(np.float32)
    y = (500 + 40 * x[:, 0]).astype(np.float32)
    numbers = ArrayFeed(Dataset("line", Part(x, y), Part(x, y), classes=None))
    asked = dataclasses.replace(config("mlp", "batch", batch_size=20, epochs=5, loss="mse"), metric="loss")
    result = trials.run_trial(asked, Recipe("mlp", "mse", "sgd", "loss", "loss"), numbers, training("torch"))
    assert result.curve[0].metric > 0.8  # about 1, the variance, since the targets are scaled
    assert result.final < 0.4
    assert result.final == pytest.approx(unpacked(result.examples).mean(), rel=1e-2)  # kept in half precision


@pytest.mark.parametrize(("label", "said"), [(3, "label 3 and 3 outputs"), (-1, "labels count from 0")])
def test_labels_out_of_range_are_named(label, said):
    given = feed()
    given.data.train.y[7] = label
    given._prepared.clear()
    with pytest.raises(NormValueError, match=said):
        trials.run_trial(config(epochs=1), recipe(), given, training("torch"))
