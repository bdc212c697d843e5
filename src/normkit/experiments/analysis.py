"""From trials to a summary per variant. Numbers only; `normkit.report` words and draws them."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from normkit.experiments.config import Variant
from normkit.experiments.trial import Evaluation, TrialResult

__all__ = ["Group", "RatePoint", "Setting", "VariantSummary", "reached", "score", "summarize"]


class Setting(NamedTuple):
    """What all variants of one group share."""

    batch_size: int
    inputs: str


class RatePoint(NamedTuple):
    """All seeds of a variant at one rate.

    `accuracy` is the validation accuracy of each seed (see :func:`score`), None where the seed diverged; `usable` tells
    whether no seed diverged and the mean training loss of the last epoch is below ln(classes) / 2 for every seed.
    """

    lr: float
    accuracy: tuple[float | None, ...]
    usable: bool

    @property
    def diverged(self) -> int:
        """Number of seeds that diverged."""
        return self.accuracy.count(None)

    @property
    def mean(self) -> float | None:
        """Mean over the seeds, None where one diverged."""
        values = [value for value in self.accuracy if value is not None]
        return statistics.fmean(values) if len(values) == len(self.accuracy) else None


@dataclass(frozen=True)
class VariantSummary:
    """One variant in one setting, judged at its own best rate. Times are in seconds, accuracies are shares.

    Attributes:
        norm: short name, with the position where it is not the default.
        best_lr: the rate with the highest mean validation accuracy, None where every rate diverged in some seed.
        largest_lr: the largest usable rate, None where there is none.
        steps_to_target: per seed at the best rate, None where the budget did not suffice.
        seconds_to_target: likewise, training alone.
        budget: steps of a trial.
        seconds_per_step: median over all its trials that did not diverge, training alone: trials run beside others.
        validation: accuracy per seed at the best rate.
        test: accuracy per seed at the best rate; other rates are never looked at.
        rates: every rate, in rising order.
        curves: validation per seed at the best rate.
    """

    norm: str
    best_lr: float | None
    largest_lr: float | None
    steps_to_target: tuple[int | None, ...]
    seconds_to_target: tuple[float | None, ...]
    budget: int
    seconds_per_step: float | None
    validation: tuple[float, ...]
    test: tuple[float, ...]
    rates: tuple[RatePoint, ...]
    curves: tuple[tuple[Evaluation, ...], ...]

    @property
    def variant(self) -> Variant:
        """The norm, parsed."""
        return Variant.parse(self.norm)

    @property
    def all_reached(self) -> bool:
        """Whether every seed reached the target at the best rate."""
        return bool(self.steps_to_target) and None not in self.steps_to_target

    @property
    def mean_steps(self) -> float | None:
        """Mean steps to the target, None where a seed did not reach it: such a mean would flatter."""
        return statistics.fmean(_known(self.steps_to_target)) if self.all_reached else None

    @property
    def mean_seconds(self) -> float | None:
        """Mean seconds to the target, None where a seed did not reach it."""
        return statistics.fmean(_known(self.seconds_to_target)) if self.all_reached else None

    @property
    def mean_test(self) -> float | None:
        """Mean test accuracy at the best rate."""
        return statistics.fmean(self.test) if self.test else None

    @property
    def test_deviation(self) -> float | None:
        """Standard deviation of the test accuracy between seeds (n - 1), None for a single seed."""
        return statistics.stdev(self.test) if len(self.test) > 1 else None

    @property
    def mean_validation(self) -> float | None:
        """Mean validation accuracy at the best rate."""
        return statistics.fmean(self.validation) if self.validation else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the means."""
        plain = asdict(self)
        del plain["curves"]  # they are in the trials
        plain["rates"] = [rate._asdict() for rate in self.rates]
        for name in ("mean_steps", "mean_seconds", "mean_validation", "mean_test", "test_deviation"):
            plain[name] = getattr(self, name)
        return plain


@dataclass(frozen=True)
class Group:
    """All variants of one setting, in the order they were given."""

    setting: Setting
    variants: tuple[VariantSummary, ...]

    @property
    def baseline(self) -> VariantSummary:
        """`none` where it took part, else the first variant."""
        return next((variant for variant in self.variants if variant.norm == "none"), self.variants[0])


def summarize(results: Iterable[TrialResult], target: float, classes: int) -> tuple[Group, ...]:
    """Judge every variant at its own best rate, setting by setting, in the order in which they appear."""
    settings: dict[Setting, dict[str, dict[float, list[TrialResult]]]] = {}
    for result in results:
        config = result.config
        norms = settings.setdefault(Setting(config.batch_size, config.inputs), {})
        norms.setdefault(config.norm, defaultdict(list))[config.lr].append(result)
    return tuple(
        Group(setting, tuple(_variant(norm, by_rate, target, classes) for norm, by_rate in norms.items()))
        for setting, norms in settings.items()
    )


def score(result: TrialResult) -> float | None:
    """The validation accuracy that a trial is judged by: its mean over the last epoch, None where it diverged.

    A single evaluation jumps with every step at a large rate; the mean over an epoch's evaluations does so less.
    """
    if result.diverged:
        return None
    begun = result.steps - result.steps // result.config.epochs
    return statistics.fmean(evaluation.accuracy for evaluation in result.curve if evaluation.step > begun)


def reached(result: TrialResult, target: float) -> Evaluation | None:
    """The first evaluation at or above the target."""
    return next((evaluation for evaluation in result.curve if evaluation.accuracy >= target), None)


def _variant(norm: str, by_rate: dict[float, list[TrialResult]], target: float, classes: int) -> VariantSummary:
    rates = tuple(_rate(lr, by_rate[lr], classes) for lr in sorted(by_rate))
    candidates = [rate for rate in rates if rate.mean is not None]
    best = max(candidates, key=lambda rate: (rate.mean, -_loss(by_rate[rate.lr])), default=None)
    trials = by_rate[best.lr] if best else []
    hits = [reached(trial, target) for trial in trials]
    complete = [t.seconds / t.steps for trials in by_rate.values() for t in trials if not t.diverged]
    any_trial = next(iter(by_rate.values()))[0]
    return VariantSummary(
        norm=norm,
        best_lr=best.lr if best else None,
        largest_lr=max((rate.lr for rate in rates if rate.usable), default=None),
        steps_to_target=tuple(hit.step if hit else None for hit in hits),
        seconds_to_target=tuple(hit.seconds if hit else None for hit in hits),
        budget=max((trial.steps for trials in by_rate.values() for trial in trials), default=any_trial.steps),
        seconds_per_step=statistics.median(complete) if complete else None,
        validation=tuple(_known(score(trial) for trial in trials)),
        test=tuple(_known(trial.test_accuracy for trial in trials)),
        rates=rates,
        curves=tuple(trial.curve for trial in trials),
    )


def _rate(lr: float, trials: Sequence[TrialResult], classes: int) -> RatePoint:
    limit = math.log(classes) / 2
    usable = all(not trial.diverged and trial.train_losses[-1] < limit for trial in trials)
    return RatePoint(lr, tuple(score(trial) for trial in trials), usable)


def _loss(trials: Sequence[TrialResult]) -> float:
    """Mean final validation loss: it decides between rates of the same accuracy."""
    return statistics.fmean(trial.curve[-1].loss for trial in trials)


def _known(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if value is not None]
