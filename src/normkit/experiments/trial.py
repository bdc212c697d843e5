"""One trial: a network trained on one configuration, and what was seen on the way."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import numpy as np

from normkit.experiments.config import MOMENTUM, TrialConfig, Variant
from normkit.experiments.feeds import Feed, epoch_seed
from normkit.experiments.landscape import Probing
from normkit.experiments.memory import PeakMemory
from normkit.experiments.noise import noise
from normkit.experiments.protocol import (
    Batch,
    RecalibratingTrainer,
    Scores,
    SequenceTrainer,
    Setup,
    Trainer,
    Training,
)
from normkit.experiments.results import Evaluation, Gap, Snapshot, StepNoise, Stops, TrialResult, never, packed
from normkit.experiments.sites import Sites

__all__ = ["Recipe", "run_trial", "seed_everything", "trainer_for"]

EVALUATIONS_PER_EPOCH = 5
GAP_BATCHES = 8  # training batches that are scored in both modes
PROBE = 256, 500_000  # samples and values, at most, that the inputs of the activations are measured on


class Recipe(NamedTuple):
    """What a trial is made of besides its numbers: names, or the user's functions."""

    model: str | Callable[..., Any]
    loss: str | Callable[..., Any]
    optimizer: str | Callable[..., Any]
    metric: str | Callable[..., Any]
    metric_name: str


def seed_everything(seed: int, training: Training | None = None) -> None:
    """Seed Python's, NumPy's and the framework's global random numbers, for code of the user's that draws from them."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # the global generator is what others' code uses
    if training is not None:
        training.seed(seed)


def trainer_for(config: TrialConfig, recipe: Recipe, feed: Feed, training: Training) -> Trainer:
    """The network of a trial, as it starts."""
    variant = Variant.parse(config.norm)
    return training.trainer(
        Setup(
            model=recipe.model,
            shape=feed.shape or (),
            classes=feed.outputs or 1,
            norm=variant.name,
            position=variant.position,
            lr=config.lr,
            momentum=MOMENTUM,
            loss=recipe.loss,
            optimizer=recipe.optimizer,
            metric=recipe.metric,
            seed=config.seed,
            steps=config.epochs * feed.steps(config.batch_size),
            example=lambda: _first([next(iter(feed.validation(config.inputs)))]),
            conditions=config.conditions,
            groups=-(-config.batch_size // (config.conditions.norm_batch or config.batch_size)),
        )
    )


def run_trial(config: TrialConfig, recipe: Recipe, feed: Feed, training: Training, stops: Stops = never) -> TrialResult:
    """Train once. A loss that is not finite ends the trial, which is then recorded as diverged.

    `stops` may end it after every evaluation but the last; it is then recorded as pruned.
    """
    seed_everything(config.seed, training)
    memory = PeakMemory()
    trainer = trainer_for(config, recipe, feed, training)
    validation = list(feed.validation(config.inputs))
    looked_at = _first(validation)
    sites = Sites()
    snapshots = [Snapshot(0, sites.measure(trainer.probe(looked_at)))]
    per_epoch = feed.steps(config.batch_size)
    every = max(1, per_epoch // EVALUATIONS_PER_EPOCH)
    curve = [_evaluation(0, 0.0, trainer.evaluate(validation))]
    train_losses: list[float] = []
    times: list[float] = []
    probing = Probing(config.conditions.landscape, config.epochs * per_epoch, config.lr, looked_at)
    prepared: set[Any] = set()
    diverged, pruned = not _finite(curve[0]), False
    for epoch in range(config.epochs):
        if diverged or pruned:
            break
        seed_everything(epoch_seed(config.seed, epoch), training)
        losses: list[float] = []
        for x, y in feed.batches(config.inputs, config.batch_size, config.seed, epoch):
            if (shapes := _shapes((x, y))) not in prepared:
                trainer.prepare(x, y)
                prepared.add(shapes)
            probing.before(len(times), trainer, x, y)
            begun = time.perf_counter()
            loss = trainer.step(x, y)
            times.append(time.perf_counter() - begun)
            losses.append(loss)
            diverged = not math.isfinite(loss)
            if not diverged:
                probing.after(trainer)
            if not diverged and (len(losses) % every == 0 or len(losses) == per_epoch):
                evaluation = _evaluation(len(times), sum(times), trainer.evaluate(validation))
                diverged = not _finite(evaluation)
                if not diverged:
                    curve.append(evaluation)
                    last = len(times) == per_epoch * config.epochs
                    pruned = not last and stops(evaluation.step, evaluation.metric)
            if diverged or pruned:
                break
        if not diverged and len(losses) == per_epoch:
            train_losses.append(statistics.fmean(losses))
            snapshots.append(Snapshot(len(times), sites.measure(trainer.probe(looked_at))))
    peak_memory = memory.bytes()
    whole = not (diverged or pruned)
    if whole:
        _take_population(trainer, feed, config)
    test = trainer.evaluate(feed.test(config.inputs)) if whole else None
    return TrialResult(
        config=config,
        metric=recipe.metric_name,
        curve=tuple(curve),
        train_losses=tuple(train_losses),
        steps=len(times),
        seconds=sum(times),
        diverged=diverged or (test is not None and not math.isfinite(test.metric)),
        final=test.metric if test is not None and math.isfinite(test.metric) else None,
        examples=packed(test.examples) if test is not None and test.examples is not None else None,
        gap=_gap(trainer, feed, config) if whole else None,
        step_seconds=statistics.median(times) if times else None,
        peak_memory=peak_memory,
        snapshots=tuple(snapshots),
        tested=feed.tested,
        versions=tuple(training.versions().items()),
        probes=tuple(probing.probes),
        pruned=pruned,
        noise=_noise(trainer, feed, config) if whole else (),
    )


def _take_population(trainer: Trainer, feed: Feed, config: TrialConfig) -> None:
    """Statistics of a whole part for evaluation, where the conditions ask for it; of the test part inputs alone."""
    if not config.conditions.population:
        return
    able = cast(RecalibratingTrainer, trainer)  # conditions on other frameworks are refused before
    if config.conditions.population == "training":
        able.recalibrate(feed.batches(config.inputs, config.batch_size, config.seed, config.epochs))
    else:
        able.recalibrate(feed.test(config.inputs))


def _evaluation(step: int, seconds: float, scores: Scores) -> Evaluation:
    return Evaluation(step, seconds, scores.loss, scores.metric)


def _finite(evaluation: Evaluation) -> bool:
    return math.isfinite(evaluation.metric) and (evaluation.loss is None or math.isfinite(evaluation.loss))


def _first(batches: list[Batch]) -> Any:
    """Samples to look at: the same for every variant, seed and epoch. Of large ones fewer, but 8, for memory."""
    x = batches[0][0]
    if not hasattr(x, "shape"):
        return x
    samples, values = PROBE
    return x[: min(samples, max(8, values // max(1, math.prod(x.shape[1:]))))]


def _shapes(batch: Any) -> Any:
    """What a framework compiles a step for."""
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    return tuple(map(_shapes, batch)) if isinstance(batch, tuple | list) else getattr(batch, "shape", None)


def _gap(trainer: Trainer, feed: Feed, config: TrialConfig) -> Gap | None:
    """The first training batches of another epoch, in both modes."""
    shown: Iterator[Batch] = feed.batches(config.inputs, config.batch_size, config.seed, config.epochs)
    batches = list(itertools.islice(shown, GAP_BATCHES))
    trained, evaluated = trainer.evaluate(batches, as_trained=True), trainer.evaluate(batches)
    gap = Gap(trained.loss, evaluated.loss, trained.metric, evaluated.metric)
    return gap if all(map(math.isfinite, gap)) else None


def _noise(trainer: Trainer, feed: Feed, config: TrialConfig) -> tuple[StepNoise, ...]:
    """Over the training batches of another epoch, where the conditions ask for it."""
    if not config.conditions.batch_spread:
        return ()
    able = cast(SequenceTrainer, trainer)  # conditions on other frameworks are refused before
    return noise(able.statistics(feed.batches(config.inputs, config.batch_size, config.seed, config.epochs)))
