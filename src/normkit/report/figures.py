"""The figures as numbers. Tests compare these; `normkit.report.draw` only puts ink to them."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from normkit.experiments.analysis import Group, VariantSummary

__all__ = ["Curve", "LearningCurves", "Rate", "RateRange", "learning_curves", "rate_range", "slots"]


class Curve(NamedTuple):
    """Validation accuracy of one variant at its own best rate: mean over the seeds, lowest and highest seed."""

    norm: str
    slot: int  # number of the norm in this comparison: the colour
    dashed: bool  # stands after the activation
    lr: float
    steps: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


class LearningCurves(NamedTuple):
    """Validation accuracy against training steps."""

    target: float
    curves: tuple[Curve, ...]


class Rate(NamedTuple):
    """Validation accuracy (mean over the last epoch) of one variant at every rate; None where a seed diverged."""

    norm: str
    slot: int
    dashed: bool
    lrs: tuple[float, ...]
    mean: tuple[float | None, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    diverged: tuple[int, ...]  # seeds that diverged at each rate
    largest: float | None  # the largest usable rate
    best: float | None


class RateRange(NamedTuple):
    """Validation accuracy (mean over the last epoch) against the learning rate."""

    chance: float
    rates: tuple[Rate, ...]


def learning_curves(group: Group, target: float) -> LearningCurves:
    """The curves of all variants that have a rate at which no seed diverged."""
    curves = [_curve(variant, slots(group)) for variant in group.variants if variant.best_lr is not None]
    return LearningCurves(target, tuple(curves))


def rate_range(group: Group, classes: int) -> RateRange:
    """All variants at all rates."""
    return RateRange(1 / classes, tuple(_rate(variant, slots(group)) for variant in group.variants))


def slots(group: Group) -> dict[str, int]:
    """A number for every norm of the group, whatever its position: the same colour in all figures."""
    names = dict.fromkeys(variant.variant.name for variant in group.variants)
    return {name: number for number, name in enumerate(names)}


def _curve(variant: VariantSummary, numbers: dict[str, int]) -> Curve:
    # At the best rate no seed diverged, so all seeds were evaluated after the same steps.
    assert variant.best_lr is not None
    columns = [[evaluation.accuracy for evaluation in column] for column in zip(*variant.curves, strict=True)]
    return Curve(
        variant.norm,
        numbers[variant.variant.name],
        variant.variant.position == "after",
        variant.best_lr,
        tuple(evaluation.step for evaluation in variant.curves[0]),
        tuple(map(statistics.fmean, columns)),
        tuple(map(min, columns)),
        tuple(map(max, columns)),
    )


def _rate(variant: VariantSummary, numbers: dict[str, int]) -> Rate:
    complete = [None if rate.diverged else [a for a in rate.accuracy if a is not None] for rate in variant.rates]
    return Rate(
        variant.norm,
        numbers[variant.variant.name],
        variant.variant.position == "after",
        tuple(rate.lr for rate in variant.rates),
        tuple(None if values is None else statistics.fmean(values) for values in complete),
        tuple(None if values is None else min(values) for values in complete),
        tuple(None if values is None else max(values) for values in complete),
        tuple(rate.diverged for rate in variant.rates),
        variant.largest_lr,
        variant.best_lr,
    )
