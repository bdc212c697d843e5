"""The figures as numbers. Tests compare these; `normkit.report.draw` only puts ink to them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from normkit.experiments.analysis import Group, VariantSummary
from normkit.experiments.config import Task
from normkit.experiments.results import SiteStats, TrialResult
from normkit.report.words import interval

__all__ = [
    "Band",
    "Cost",
    "Costs",
    "Curve",
    "Depth",
    "Final",
    "Finals",
    "LearningCurves",
    "Line",
    "Pen",
    "Percentiles",
    "Rate",
    "RateRange",
    "costs",
    "depth",
    "finals",
    "learning_curves",
    "pens",
    "percentiles",
    "rate_range",
    "variant_depth",
]

_POINTS = 60  # of a curve; more cannot be told apart, and a page must stay small


class Pen(NamedTuple):
    """How a variant is drawn: the colour stands for the norm, a dashed line for its place after the activation."""

    slot: int
    dashed: bool = False


class Curve(NamedTuple):
    """The validation metric of one variant at its own best rate: mean over the seeds, lowest and highest seed."""

    norm: str
    pen: Pen
    lr: float
    steps: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


class LearningCurves(NamedTuple):
    """The validation metric against training steps."""

    task: Task
    of: str  # what is shown, in words: `validation accuracy`
    lines: tuple[Curve, ...]


class Rate(NamedTuple):
    """The validation metric (mean over the last epoch) of one variant at every rate; None where a seed diverged."""

    norm: str
    pen: Pen
    lrs: tuple[float, ...]
    mean: tuple[float | None, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    diverged: tuple[int, ...]  # seeds that diverged at each rate
    usable: tuple[bool, ...]


class RateRange(NamedTuple):
    """The validation metric against the learning rate."""

    task: Task
    of: str
    lines: tuple[Rate, ...]


class Final(NamedTuple):
    """The metric after training: every seed, their mean, its 95 % interval; empty and None where unknown."""

    norm: str
    pen: Pen
    seeds: tuple[float, ...]
    mean: float | None
    low: float | None
    high: float | None


class Finals(NamedTuple):
    """The metric after training, variant by variant."""

    task: Task
    of: str
    baseline: str
    lines: tuple[Final, ...]


class Cost(NamedTuple):
    """Milliseconds of a step and megabytes of memory, each also as a multiple of the baseline's; None where unknown."""

    norm: str
    pen: Pen
    milliseconds: float | None
    megabytes: float | None
    time_ratio: float | None
    memory_ratio: float | None


class Costs(NamedTuple):
    """What a step costs, variant by variant."""

    baseline: str
    lines: tuple[Cost, ...]


class Line(NamedTuple):
    """The inputs of the activations of one network, in the order of their calls."""

    label: str
    pen: Pen
    sites: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dead: tuple[float, ...]  # shares


class Depth(NamedTuple):
    """Activation statistics over depth, network by network."""

    lines: tuple[Line, ...]


class Band(NamedTuple):
    """What enters the first unit of one activation, over training: its 15th, 50th and 85th percentiles."""

    norm: str
    pen: Pen
    steps: tuple[int, ...]
    low: tuple[float, ...]
    middle: tuple[float, ...]
    high: tuple[float, ...]


class Percentiles(NamedTuple):
    """The percentiles of the first activation of every variant, and of the last one."""

    lines: tuple[Band, ...]
    last: tuple[Band, ...]


def pens(group: Group) -> dict[str, Pen]:
    """A pen for every variant of the group, by its label: the same in all figures."""
    slots = {name: slot for slot, name in enumerate(dict.fromkeys(v.variant.name for v in group.variants))}
    return {v.norm: Pen(slots[v.variant.name], v.variant.position == "after") for v in group.variants}


def learning_curves(group: Group, task: Task, of: str) -> LearningCurves:
    """The curves of all variants that have a rate at which no seed diverged."""
    drawn = pens(group)
    return LearningCurves(task, of, tuple(_curve(v, drawn[v.norm]) for v in group.variants if v.best_lr is not None))


def rate_range(group: Group, task: Task, of: str) -> RateRange:
    """All variants at all rates."""
    drawn = pens(group)
    return RateRange(task, of, tuple(_rate(variant, drawn[variant.norm]) for variant in group.variants))


def finals(group: Group, task: Task, of: str) -> Finals:
    """All variants, also those that diverged at every rate; nothing where all did."""
    drawn = pens(group)
    lines = [
        Final(v.norm, drawn[v.norm], v.final, v.mean_final, *(interval(task, v) or (None, None)))
        for v in group.variants
    ]
    return Finals(task, of, group.baseline.norm, tuple(lines) if any(line.seeds for line in lines) else ())


def costs(group: Group) -> Costs:
    """All variants; nothing where neither time nor memory is known of any."""
    base, drawn = group.baseline, pens(group)
    lines = [
        Cost(
            v.norm,
            drawn[v.norm],
            None if v.seconds_per_step is None else 1000 * v.seconds_per_step,
            None if v.peak_memory is None else v.peak_memory / 1e6,
            _ratio(v.seconds_per_step, base.seconds_per_step),
            _ratio(v.peak_memory, base.peak_memory),
        )
        for v in group.variants
    ]
    known = any((line.milliseconds, line.megabytes) != (None, None) for line in lines)
    return Costs(base.norm, tuple(lines) if known else ())


def depth(series: Mapping[str, Sequence[SiteStats]]) -> Depth:
    """The statistics of one or several networks, under the labels they are shown by; colours in their order."""
    lines = [
        Line(
            label,
            Pen(slot),
            tuple(site.name for site in sites),
            tuple(site.mean for site in sites),
            tuple(site.std for site in sites),
            tuple(site.dead for site in sites),
        )
        for slot, (label, sites) in enumerate(series.items())
        if sites
    ]
    return Depth(tuple(lines))


def variant_depth(group: Group, beside: str | None, *, last: bool) -> Depth:
    """The baseline, and another variant beside it, at initialization or after the last epoch.

    Nothing at initialization where there is no snapshot, nothing after it where there is only one.
    """
    drawn = pens(group)
    chosen = [v for v in group.variants if v.norm in (group.baseline.norm, beside) and len(v.snapshots) > last]
    plain = depth({variant.norm: variant.snapshots[-1 if last else 0].sites for variant in chosen})
    return Depth(tuple(line._replace(pen=drawn[line.label]) for line in plain.lines))


def percentiles(group: Group, trials: Sequence[TrialResult]) -> Percentiles:
    """All variants whose trials among these looked at activations: the first seed at the best rate."""
    drawn = pens(group)
    lines: list[Band] = []
    last: list[Band] = []
    for v in group.variants:
        of = [t for t in trials if (t.config.norm, t.config.lr) == (v.norm, v.best_lr) and t.probes]
        if not of or not of[0].probes[0].percentiles:
            continue
        for bands, place in ((lines, 0), (last, -1)):
            low, middle, high = zip(*(probe.percentiles[place] for probe in of[0].probes), strict=True)
            steps = tuple(probe.step for probe in of[0].probes)
            bands.append(Band(v.norm, drawn[v.norm], steps, low, middle, high))
    return Percentiles(tuple(lines), tuple(last))


def _curve(variant: VariantSummary, pen: Pen) -> Curve:
    assert variant.best_lr is not None
    # A loop may report at other steps for every seed: between two of its reports a straight line stands in.
    columns = [(tuple(e.step for e in curve), tuple(e.metric for e in curve)) for curve in variant.curves]
    begin = max(steps[0] for steps, _ in columns)
    end = max(begin, min(steps[-1] for steps, _ in columns))
    every = sorted({step for steps, _ in columns for step in steps if begin <= step <= end} | {begin, end})
    if len(every) > _POINTS:
        every = [every[round(n)] for n in np.linspace(0, len(every) - 1, _POINTS)]
    values = np.array([np.interp(every, *column) for column in columns])
    mean, low, high = (tuple(f(values, axis=0).tolist()) for f in (np.mean, np.min, np.max))
    return Curve(variant.norm, pen, variant.best_lr, tuple(every), mean, low, high)


def _rate(variant: VariantSummary, pen: Pen) -> Rate:
    complete = [None if rate.diverged else [m for m in rate.metric if m is not None] for rate in variant.rates]
    return Rate(
        variant.norm,
        pen,
        tuple(rate.lr for rate in variant.rates),
        tuple(None if values is None else statistics.fmean(values) for values in complete),
        tuple(None if values is None else min(values) for values in complete),
        tuple(None if values is None else max(values) for values in complete),
        tuple(rate.diverged for rate in variant.rates),
        tuple(rate.usable for rate in variant.rates),
    )


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
