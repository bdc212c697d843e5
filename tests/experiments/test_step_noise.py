"""Noise of batch statistics by time step, against its definition on raw values, and in a trial."""

import dataclasses
import json
import math

import numpy as np
import pytest

from normkit.experiments.conditions import Conditions
from normkit.experiments.config import TrialConfig
from normkit.experiments.data import Dataset, Part
from normkit.experiments.feeds import ArrayFeed
from normkit.experiments.noise import noise
from normkit.experiments.protocol import BatchStatistics, training
from normkit.experiments.results import TrialResult
from normkit.experiments.store import plain as stored
from normkit.experiments.trial import Recipe, run_trial

CHANNELS = 3


def statistics_of(values):
    """`values[t]` (n, channels) for one thing that is normalized; nothing of fewer than two."""
    nothing = np.full(CHANNELS, 77.0)  # must not be looked at
    means = np.stack([v.mean(0) if len(v) > 1 else nothing for v in values])
    variances = np.stack([v.var(0) if len(v) > 1 else nothing for v in values])
    return BatchStatistics(np.array([len(v) for v in values]), (means, 2 * means), (variances, 4 * variances))


def test_noise_is_what_its_definition_says():
    """Lengths as drawn by hand; a channel that never varies; in one batch one sequence is left, in another none."""
    rng = np.random.default_rng(0)
    alive = [(6, 4, 3), (6, 5, 1), (6, 2, 0), (6, 3, 2)]
    batches = [[rng.normal(size=(n, CHANNELS)) * (1, 3, 0) + (5, 0, 2) for n in counts] for counts in alive]
    found = noise(map(statistics_of, batches))
    assert [step.alive for step in found] == [6.0, 3.5, 1.5]
    for t, step in enumerate(found):
        own = [batch[t] for batch in batches if len(batch[t]) > 1]
        assert step.expected == pytest.approx(math.sqrt(sum(1 / len(v) for v in own) / len(own)), rel=1e-12)
        everything = np.concatenate(own)
        ratios, spreads = [], []
        for channel in (0, 1):
            centers = np.array([v[:, channel].mean() for v in own])
            squares = np.array([v[:, channel].var() for v in own])
            ratios.append(math.sqrt(((centers - centers.mean()) ** 2).sum() / (len(own) - 1))
                          / everything[:, channel].std(ddof=1))  # fmt: skip
            spreads.append(math.sqrt(((squares - squares.mean()) ** 2).sum() / (len(own) - 1)) / squares.mean())
        assert step.means == pytest.approx([sum(ratios) / 2] * 2, rel=1e-9)  # twice the values, the same noise
        assert step.variances == pytest.approx([sum(spreads) / 2] * 2, rel=1e-9)


def test_of_independent_values_it_is_what_is_expected():
    """400 batches and 200 channels: the median is known to 0.5 %, of 8 and of 2 to 6 values."""
    rng = np.random.default_rng(1)
    found = noise(
        BatchStatistics(np.array([8, n]), (np.stack([v.mean(0) for v in (a, b)]),), (np.stack([a.var(0), b.var(0)]),))
        for n in rng.integers(2, 7, 400)
        for a, b in [(rng.normal(size=(8, 200)), rng.normal(size=(n, 200)))]
    )
    for step in found:
        assert step.means[0] == pytest.approx(step.expected, rel=0.02)
    assert found[0].expected == pytest.approx(1 / math.sqrt(8), rel=1e-12)
    # of normal values the unbiased variance has the relative spread sqrt(2 / (n - 1))
    assert found[0].variances[0] == pytest.approx(math.sqrt(2 / 7), rel=0.02)


def test_what_never_varies_has_no_noise():
    still = [[np.zeros((4, CHANNELS))] for _ in range(3)]
    (step,) = noise(map(statistics_of, still))
    assert all(map(math.isnan, (*step.means, *step.variances)))


def test_a_single_batch_has_no_noise_and_none_gives_nothing():
    (step,) = noise([statistics_of([np.eye(CHANNELS)])])
    assert all(map(math.isnan, step.means))
    assert noise([]) == ()


# ---- in a trial


def trial(**asked):
    rng = np.random.default_rng(0)
    y = np.arange(36) % 3
    x = (rng.normal(size=(36, 1, 8, 8)) + y[:, None, None, None]).astype(np.float32)
    conditions = Conditions(sequences=asked.pop("sequences", "steps"), **asked)
    feed = ArrayFeed(Dataset("made", Part(x, y), Part(x, y), 3), conditions)
    config = TrialConfig(
        "torch", "mlp", "", "", "batch", 0.05, 9, "none", 0, 1, "cross_entropy", "sgd", "accuracy", conditions
    )
    recipe = Recipe("mlp", "cross_entropy", "sgd", "accuracy", "accuracy")
    return run_trial(config, recipe, feed, training("torch")), feed


@pytest.fixture(scope="module")
def seen():
    return trial(batch_spread=True)


def test_looking_changes_nothing_of_a_trial_but_its_key(seen):
    blind, _ = trial()
    assert [(e.loss, e.metric) for e in seen[0].curve] == [(e.loss, e.metric) for e in blind.curve]
    assert (seen[0].final, seen[0].gap) == (blind.final, blind.gap)
    assert blind.noise == ()
    assert seen[0].config.key() != blind.config.key()


def test_as_many_are_alive_as_the_lengths_say(seen):
    result, feed = seen
    lengths = np.stack([x[:, -1, :, 0].sum(1) for x, _ in feed.batches("none", 9, 0, 1)])
    assert len(result.noise) == 8
    assert [step.alive for step in result.noise] == [(lengths > t).sum(1).mean() for t in range(8)]
    assert all(len(step.means) == len(step.variances) == 3 for step in result.noise)
    assert math.isnan(result.noise[0].means[1])  # U h is 0 there


def test_one_statistic_is_one_step():
    result, feed = trial(sequences="masked", batch_spread=True)
    (step,) = result.noise
    assert step.alive == np.mean([x[:, -1, :, 0].sum() for x, _ in feed.batches("none", 9, 0, 1)])
    assert len(step.means) == 1


def test_noise_survives_the_storage(seen):
    kept = stored(seen[0])
    plain = json.loads(json.dumps(kept.to_dict(), allow_nan=False))
    # NaN is not equal to itself, so the words are compared
    assert repr(TrialResult.from_dict(plain)) == repr(kept)
    del plain["noise"]  # of a trial from before there was any
    assert repr(TrialResult.from_dict(plain)) == repr(dataclasses.replace(kept, noise=()))
