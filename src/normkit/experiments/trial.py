"""One trial: a network trained on one configuration, and what was seen on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normkit.experiments.config import MOMENTUM, TrialConfig, Variant
from normkit.experiments.data import Part, Prepared
from normkit.experiments.protocol import Trainer, Training

__all__ = ["Evaluation", "TrialResult", "batches", "run_trial", "steps_per_epoch", "trainer_for"]

EVALUATIONS_PER_EPOCH = 5
_CHUNK = 1000  # samples per evaluation call, for memory


class Evaluation(NamedTuple):
    """The validation part, scored after so many steps and seconds of training."""

    step: int
    seconds: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class TrialResult:
    """What one trial gave.

    Attributes:
        config: what was trained.
        curve: validation, from step 0 about a fifth of an epoch apart; ends early where the trial diverged.
        train_losses: mean loss over the steps of each complete epoch, in nats.
        steps: steps that were taken.
        seconds: time in those steps, evaluation left out.
        diverged: whether a loss was not finite; training stopped there.
        test_accuracy: share of right answers on the test part after training, None where it diverged.
    """

    config: TrialConfig
    curve: tuple[Evaluation, ...]
    train_losses: tuple[float, ...]
    steps: int
    seconds: float
    diverged: bool
    test_accuracy: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **asdict(self),
            "key": self.config.key(),
            "curve": [evaluation._asdict() for evaluation in self.curve],
            "train_losses": list(self.train_losses),
        }


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Only full batches are used: a short one would have statistics of its own."""
    return samples // batch_size


def batches(samples: int, batch_size: int, epochs: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Indices of every batch of a trial: a new order each epoch, the same for every variant of a seed."""
    rng = np.random.default_rng([seed, 0])
    for _ in range(epochs):
        order = rng.permutation(samples)
        for start in range(0, samples - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def trainer_for(config: TrialConfig, data: Prepared, classes: int, training: Training) -> Trainer:
    """The network of a trial, as it starts."""
    variant = Variant.parse(config.norm)
    return training.trainer(
        model=config.model,
        shape=data.train.x.shape[1:],
        classes=classes,
        norm=variant.name,
        position=variant.position,
        lr=config.lr,
        momentum=MOMENTUM,
        seed=config.seed,
        steps=config.epochs * steps_per_epoch(len(data.train.y), config.batch_size),
    )


def run_trial(config: TrialConfig, data: Prepared, classes: int, training: Training) -> TrialResult:
    """Train once. A loss that is not finite ends the trial, which is then recorded as diverged."""
    trainer = trainer_for(config, data, classes, training)
    x, y = data.train
    per_epoch = steps_per_epoch(len(y), config.batch_size)
    total = config.epochs * per_epoch
    every = max(1, per_epoch // EVALUATIONS_PER_EPOCH)
    curve = [Evaluation(0, 0.0, *_score(trainer, data.validation))]
    train_losses: list[float] = []
    epoch_losses: list[float] = []
    seconds = 0.0
    step = 0
    diverged = False
    for step, rows in enumerate(batches(len(y), config.batch_size, config.epochs, config.seed), start=1):
        xb, yb = x[rows], y[rows]
        begun = time.perf_counter()
        loss = trainer.step(xb, yb)
        seconds += time.perf_counter() - begun
        diverged = not math.isfinite(loss)
        if not diverged and (step % every == 0 or step == total):
            scored = Evaluation(step, seconds, *_score(trainer, data.validation))
            diverged = not math.isfinite(scored.loss)
            if not diverged:
                curve.append(scored)
        if diverged:
            break
        epoch_losses.append(loss)
        if len(epoch_losses) == per_epoch:
            train_losses.append(sum(epoch_losses) / per_epoch)
            epoch_losses.clear()
    test = None if diverged else _score(trainer, data.test)[1]
    return TrialResult(config, tuple(curve), tuple(train_losses), step, seconds, diverged, test)


def _score(trainer: Trainer, part: Part) -> tuple[float, float]:
    """Mean loss and share of right answers."""
    loss, right = 0.0, 0
    for start in range(0, len(part.y), _CHUNK):
        chunk_loss, chunk_right = trainer.evaluate(part.x[start : start + _CHUNK], part.y[start : start + _CHUNK])
        loss += chunk_loss
        right += chunk_right
    return loss / len(part.y), right / len(part.y)
