import math
import time

import numpy as np
import pytest

from normkit.experiments import trial as trials
from normkit.experiments.config import TrialConfig
from normkit.experiments.data import Part, Prepared
from normkit.experiments.protocol import training

SHAPES = {"cnn": (2, 8, 8), "mlp": (5,)}
NORMS = ("none", "batch", "batch:after", "layer", "group", "renorm", "rms", "ghost")


def prepared(shape=(5,), samples=40):
    rng = np.random.default_rng(0)
    return Prepared(
        *(Part(rng.normal(size=(n, *shape)).astype(np.float32), rng.integers(0, 3, n)) for n in (samples, 12, 14))
    )


def config(model="mlp", norm="none", seed=0, batch_size=8, epochs=2, lr=0.01):
    return TrialConfig("torch", model, "f", norm, lr, batch_size, "none", seed, epochs)


class Scripted:
    """A trainer that returns given losses and notes what it is shown."""

    def __init__(self, losses=(), validation_loss=1.0):
        self.losses, self.validation_loss = list(losses), validation_loss
        self.seen, self.evaluated = [], []

    def trainer(self, **setup):
        self.setup = setup
        return self

    def step(self, x, y):
        time.sleep(0.001)
        self.seen.append(x[:, 0].copy())
        return self.losses[len(self.seen) - 1] if self.losses else 1.0

    def evaluate(self, x, y):
        time.sleep(0.02)
        self.evaluated.append(len(y))
        return self.validation_loss * len(y), len(y) // 2


def test_a_trial_counts_steps_scores_the_test_part_once_and_times_only_steps():
    script = Scripted()
    result = trials.run_trial(config(), prepared(), 3, script)
    assert result.steps == script.setup["steps"] == 10
    assert [evaluation.step for evaluation in result.curve] == list(range(11))
    assert result.train_losses == (1.0, 1.0)
    assert not result.diverged
    assert script.evaluated.count(14) == 1
    assert script.evaluated[-1] == 14
    assert result.test_accuracy == 0.5
    assert 0.01 <= result.seconds < 0.1  # ten steps of a millisecond, not twelve evaluations of twenty
    assert result.curve[-1].seconds == result.seconds


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_trial_as_diverged(bad):
    script = Scripted([1.0] * 6 + [bad] + [1.0] * 9)
    result = trials.run_trial(config(), prepared(), 3, script)
    assert result.diverged
    assert result.steps == len(script.seen) == 7
    assert result.test_accuracy is None
    assert result.train_losses == (1.0,)
    assert all(math.isfinite(evaluation.loss) for evaluation in result.curve)


def test_a_validation_loss_that_is_not_finite_counts_as_diverged():
    script = Scripted()
    original = script.evaluate
    script.evaluate = lambda x, y: original(x, y) if len(script.seen) < 5 else (math.nan, 0)
    result = trials.run_trial(config(), prepared(), 3, script)
    assert result.diverged
    assert result.steps == 5


def test_every_sample_is_seen_once_an_epoch_in_full_batches():
    rows = list(trials.batches(43, 8, 2, seed=0))
    assert [len(batch) for batch in rows] == [8] * 10
    first, second = np.concatenate(rows[:5]), np.concatenate(rows[5:])
    assert len(set(first)) == len(set(second)) == 40
    assert not np.array_equal(first, second)


def test_order_depends_on_the_seed_alone():
    seen = {}
    for norm, lr, seed in [("none", 0.1, 0), ("batch", 0.1, 0), ("none", 0.3, 0), ("none", 0.1, 1)]:
        script = Scripted()
        trials.run_trial(config(norm=norm, lr=lr, seed=seed), prepared(), 3, script)
        seen[norm, lr, seed] = np.concatenate(script.seen)
    reference = seen.pop(("none", 0.1, 0))
    other_seed = seen.pop(("none", 0.1, 1))
    for order in seen.values():
        np.testing.assert_array_equal(order, reference)
    assert not np.array_equal(other_seed, reference)


@pytest.mark.parametrize("model", ["cnn", "mlp"])
def test_every_variant_of_a_seed_starts_from_the_same_weights(model):
    torch_training = training("torch")
    data = prepared(SHAPES[model])

    def weights(norm, seed):
        return trials.trainer_for(config(model, norm, seed), data, 3, torch_training).weights()

    reference = weights("none", 0)
    for norm in NORMS[1:]:
        start = weights(norm, 0)
        assert start.keys() == reference.keys()
        for name in reference:
            np.testing.assert_array_equal(start[name], reference[name])
    other = weights("none", 1)
    assert all(not np.array_equal(other[name], reference[name]) for name in reference)


def test_weights_follow_he():
    start = trials.trainer_for(config("mlp"), prepared(SHAPES["mlp"]), 3, training("torch")).weights()
    assert len(start) == 11
    for weight in list(start.values())[1:-1]:
        assert weight.std() == pytest.approx(math.sqrt(2 / weight.shape[1]), rel=0.03)


@pytest.mark.parametrize("model", ["cnn", "mlp"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_learns_something_easy(model, norm):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 200)
    x = (rng.normal(size=(200, *SHAPES[model])) + 2.0 * y.reshape(-1, *[1] * len(SHAPES[model]))).astype(np.float32)
    part = Part(x, y)
    result = trials.run_trial(
        config(model, norm, batch_size=20, epochs=3, lr=0.02), Prepared(part, part, part), 2, training("torch")
    )
    assert result.train_losses[-1] < 0.8 * result.train_losses[0]
    assert result.test_accuracy == result.curve[-1].accuracy


def test_a_trial_gives_the_same_numbers_twice():
    data = prepared(SHAPES["cnn"])
    first, second = (trials.run_trial(config("cnn", "batch"), data, 3, training("torch")) for _ in range(2))
    assert [evaluation.loss for evaluation in first.curve] == [evaluation.loss for evaluation in second.curve]
    assert first.train_losses == second.train_losses


def test_evaluation_leaves_the_network_as_it_was():
    data = prepared(SHAPES["cnn"])
    trainer = trials.trainer_for(config("cnn", "batch"), data, 3, training("torch"))
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    trainer.evaluate(*data.validation)
    for name, value in trainer.network.state_dict().items():
        assert value.equal(before[name])
