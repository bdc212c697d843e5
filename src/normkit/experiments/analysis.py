"""From trials to a summary per variant. Numbers only; `normkit.report` words and draws them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from normkit.experiments.config import Task, Variant
from normkit.experiments.inference import Estimate, adjusted, estimate
from normkit.experiments.results import Evaluation, Snapshot, TrialResult, unpacked

__all__ = ["ALPHA", "Difference", "Group", "RatePoint", "Setting", "VariantSummary", "reached", "score", "summarize"]

ALPHA = 0.05
# Of a difference between two variants neither of which is the baseline, in the correction: the question that was asked
# is which variant beats the baseline, and 15 further pairs of 7 variants should not cost it much.
_PAIR_WEIGHT = 0.1


class Setting(NamedTuple):
    """What all variants of one group share."""

    batch_size: int
    inputs: str
    conditions: str = ""  # in words, empty where nothing is changed


class RatePoint(NamedTuple):
    """All seeds of a variant at one rate.

    `metric` is the validation metric of each seed (see :func:`score`), None where the seed diverged or was pruned;
    `usable` tells whether the rate counts as working (see :func:`summarize`); `pruned` counts the latter seeds.
    """

    lr: float
    metric: tuple[float | None, ...]
    usable: bool
    pruned: int = 0

    @property
    def diverged(self) -> int:
        """Number of seeds that diverged."""
        return self.metric.count(None) - self.pruned

    @property
    def mean(self) -> float | None:
        """Mean over the seeds, None where one diverged or was pruned."""
        values = [value for value in self.metric if value is not None]
        return statistics.fmean(values) if len(values) == len(self.metric) else None


class Difference(NamedTuple):
    """Two variants of one setting compared seed by seed, each at its own best rate: first against second.

    Attributes:
        first, second: norms.
        quantity: `final` (the metric on the test part) or `steps` (to the target, at most the budget).
        value: of `final` the mean difference first - second; of `steps` the geometric mean of the ratio first / second.
        low, high: its 95 % interval, not corrected for the number of comparisons; None below 3 seeds.
        p: two-sided, None below 3 seeds.
        adjusted: p after Holm's correction over all differences of the whole comparison, None below 3 seeds.
        seeds: number of pairs.
    """

    first: str
    second: str
    quantity: str
    value: float
    low: float | None
    high: float | None
    p: float | None
    adjusted: float | None
    seeds: int

    @property
    def claimed(self) -> bool:
        """Whether the difference survives the correction."""
        return self.adjusted is not None and self.adjusted <= ALPHA


@dataclass(frozen=True)
class VariantSummary:
    """One variant in one setting, judged at its own best rate. Times are in seconds, memory in bytes.

    Attributes:
        norm: short name, with the position where it is not the default.
        best_lr: the rate with the best mean validation metric, None where every rate diverged in some seed.
        largest_lr: the largest usable rate, None where there is none.
        steps_to_target: per seed at the best rate, None where the budget did not suffice; empty without a target.
        seconds_to_target: likewise, training alone.
        budget: steps of a trial.
        seconds_per_step: median over all its trials that did not diverge of their median step.
        peak_memory: median over all its trials that did not diverge, None where it is not known.
        validation: metric per seed at the best rate.
        final: metric per seed at the best rate after training, on the test part where there is one; other rates are
            never looked at.
        interval: 95 % interval of the mean of `final`, None below 3 seeds.
        gap_loss: mean over the seeds at the best rate of evaluation loss - training loss on the same batches, None
            where it is not known.
        gap_metric: likewise of the metric.
        rates: every rate, in rising order.
        curves: validation per seed at the best rate.
        snapshots: of the first seed at the best rate.
    """

    norm: str
    best_lr: float | None
    largest_lr: float | None
    steps_to_target: tuple[int | None, ...]
    seconds_to_target: tuple[float | None, ...]
    budget: int
    seconds_per_step: float | None
    peak_memory: int | None
    validation: tuple[float, ...]
    final: tuple[float, ...]
    interval: tuple[float, float] | None
    gap_loss: float | None
    gap_metric: float | None
    rates: tuple[RatePoint, ...]
    curves: tuple[tuple[Evaluation, ...], ...]
    snapshots: tuple[Snapshot, ...]

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
    def mean_final(self) -> float | None:
        """Mean of `final`."""
        return statistics.fmean(self.final) if self.final else None

    @property
    def final_deviation(self) -> float | None:
        """Standard deviation of `final` between seeds (n - 1), None for a single seed."""
        return statistics.stdev(self.final) if len(self.final) > 1 else None

    @property
    def mean_validation(self) -> float | None:
        """Mean validation metric at the best rate."""
        return statistics.fmean(self.validation) if self.validation else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the means."""
        plain = asdict(self)
        del plain["curves"], plain["snapshots"]  # they are in the trials
        plain["rates"] = [rate._asdict() for rate in self.rates]
        for name in ("mean_steps", "mean_seconds", "mean_validation", "mean_final", "final_deviation"):
            plain[name] = getattr(self, name)
        return plain


@dataclass(frozen=True)
class Group:
    """All variants of one setting, in the order they were given.

    `against_baseline` compares every other variant with the baseline, in `final` and, where there is a target, in
    `steps`; `pairs` compares in `final` the variants that are not the baseline with each other.
    """

    setting: Setting
    variants: tuple[VariantSummary, ...]
    against_baseline: tuple[Difference, ...] = ()
    pairs: tuple[Difference, ...] = ()

    @property
    def baseline(self) -> VariantSummary:
        """`none` where it took part, else the first variant."""
        return next((variant for variant in self.variants if variant.norm == "none"), self.variants[0])

    def difference(self, norm: str, quantity: str) -> Difference | None:
        """This variant against the baseline, None where they were not compared."""
        found = (d for d in self.against_baseline if (d.first, d.quantity) == (norm, quantity))
        return next(found, None)


def summarize(results: Iterable[TrialResult], task: Task) -> tuple[Group, ...]:
    """Judge every variant at its own best rate, setting by setting, in the order in which they appear.

    A rate is usable where no seed diverged and every seed learned: the mean training loss of the last epoch is below
    half that of the best constant guess or, where that is not known, the metric came at least half way from where they
    start (the worst first evaluation of any variant at its smallest rate) to the best that any variant reached. A rate
    of which a seed was pruned lost against another rate of its norm: it is neither the best nor usable, since how it
    would have ended nobody knows.

    Differences are paired by seed. Where a variant diverged for every rate it has no place in them. All of the
    comparison are corrected together (Holm, weight 1 against the baseline, else 0.1), so that the chance of any false
    claim in it is at most 5 %.
    """
    settings: dict[Setting, dict[str, dict[float, list[TrialResult]]]] = {}
    for result in results:
        config = result.config
        norms = settings.setdefault(Setting(config.batch_size, config.inputs, str(config.conditions)), {})
        norms.setdefault(config.norm, defaultdict(list))[config.lr].append(result)
    groups, differences = [], []
    for setting, norms in settings.items():
        bar = _half_way(norms.values(), task)
        judged = [_variant(norm, by_rate, task, bar) for norm, by_rate in norms.items()]
        group = Group(setting, tuple(variant for variant, _ in judged))
        groups.append(group)
        differences.append(_differences(group, dict(zip(norms, (trials for _, trials in judged), strict=True)), task))
    return tuple(map(_with_differences, groups, _corrected(groups, differences)))


def score(result: TrialResult) -> float | None:
    """The validation metric that a trial is judged by: its mean over the last epoch, None where it was not finished.

    A single evaluation jumps with every step at a large rate; the mean over an epoch's evaluations does so less.
    """
    if result.diverged or result.pruned:
        return None
    begun = result.steps - max(1, result.steps // result.config.epochs)
    last = [evaluation.metric for evaluation in result.curve if evaluation.step > begun]
    return statistics.fmean(last or [result.curve[-1].metric])


def reached(result: TrialResult, task: Task) -> Evaluation | None:
    """The first evaluation at the target or better."""
    return next((evaluation for evaluation in result.curve if task.reached(evaluation.metric)), None)


def _half_way(norms: Iterable[dict[float, list[TrialResult]]], task: Task) -> float | None:
    """The metric that counts as learned where the loss of a guess is not known, None where nothing was measured."""
    starts = [trial.curve[0].metric for by_rate in norms for trial in by_rate[min(by_rate)] if trial.curve]
    ends = _known(score(trial) for by_rate in norms for trials in by_rate.values() for trial in trials)
    if not starts or not ends:
        return None
    return (min(starts, key=lambda m: task.sign * m) + max(ends, key=lambda m: task.sign * m)) / 2


def _variant(
    norm: str, by_rate: dict[float, list[TrialResult]], task: Task, bar: float | None
) -> tuple[VariantSummary, Sequence[TrialResult]]:
    """The summary, and the trials at the best rate."""
    rates = tuple(_rate(lr, by_rate[lr], task, bar) for lr in sorted(by_rate))
    candidates = [(task.sign * rate.mean, -_loss(by_rate[rate.lr]), rate.lr) for rate in rates if rate.mean is not None]
    best_lr = max(candidates)[-1] if candidates else None
    trials = by_rate[best_lr] if best_lr is not None else []
    hits = [reached(trial, task) for trial in trials] if task.target is not None else []
    every = [trial for trials_at_rate in by_rate.values() for trial in trials_at_rate]
    whole = [trial for trial in every if not trial.diverged]
    mean = _estimate(trials) if trials else None
    gaps = [trial.gap for trial in trials if trial.gap is not None]
    memory = _known(trial.peak_memory for trial in whole)
    seconds = _known(trial.step_seconds for trial in whole)
    summary = VariantSummary(
        norm=norm,
        best_lr=best_lr,
        largest_lr=max((rate.lr for rate in rates if rate.usable), default=None),
        steps_to_target=tuple(hit.step if hit else None for hit in hits),
        seconds_to_target=tuple(hit.seconds if hit else None for hit in hits),
        budget=max(trial.steps for trial in every),
        seconds_per_step=statistics.median(seconds) if seconds else None,
        peak_memory=round(statistics.median(memory)) if memory else None,
        validation=tuple(_known(score(trial) for trial in trials)),
        final=tuple(_known(trial.final for trial in trials)),
        interval=(mean.low, mean.high) if mean is not None and mean.low is not None and mean.high is not None else None,
        gap_loss=statistics.fmean(gap.eval_loss - gap.train_loss for gap in gaps) if gaps else None,
        gap_metric=statistics.fmean(gap.eval_metric - gap.train_metric for gap in gaps) if gaps else None,
        rates=rates,
        curves=tuple(trial.curve for trial in trials),
        snapshots=trials[0].snapshots if trials else (),
    )
    return summary, trials


def _rate(lr: float, trials: Sequence[TrialResult], task: Task, bar: float | None) -> RatePoint:
    metric = tuple(score(trial) for trial in trials)
    usable = all(_learned(trial, task, bar) for trial in trials)
    return RatePoint(lr, metric, usable, sum(trial.pruned for trial in trials))


def _learned(trial: TrialResult, task: Task, bar: float | None) -> bool:
    value = score(trial)
    if value is None:
        return False
    if task.guess is not None and trial.train_losses:
        return trial.train_losses[-1] < task.guess / 2
    return bar is not None and task.sign * value >= task.sign * bar


def _loss(trials: Sequence[TrialResult]) -> float:
    """Mean final validation loss: it decides between rates of the same metric, where it is known."""
    losses = _known(trial.curve[-1].loss for trial in trials)
    return statistics.fmean(losses) if losses else 0.0


def _estimate(trials: Sequence[TrialResult], others: Sequence[TrialResult] | None = None) -> Estimate:
    """The mean of `final` over the seeds; with `others` that of the differences, seed by seed."""
    values = np.array([trial.final for trial in trials], dtype=np.float64)
    examples = [unpacked(trial.examples) if trial.examples else None for trial in trials]
    if others is not None:
        values = values - np.array([trial.final for trial in others])
        examples = [
            None if mine is None or trial.examples is None else mine - unpacked(trial.examples)
            for mine, trial in zip(examples, others, strict=True)
        ]
    known = [example for example in examples if example is not None]
    if len(known) < len(examples) or len({len(example) for example in known}) > 1:
        return estimate(values.tolist())
    whole = all(float(value).is_integer() for value in known[0])  # right or wrong: an accuracy lies on a grid
    resolution = (1 if others is None else math.sqrt(2)) / len(known[0]) if whole else 0.0
    return estimate(values.tolist(), resolution, np.stack(known))


def _differences(group: Group, trials: dict[str, Sequence[TrialResult]], task: Task) -> list[Difference]:
    """Uncorrected: all pairs of variants that have a rate, the baseline second; in steps against the baseline only."""
    base = group.baseline.norm
    able = {norm: _by_seed(found) for norm, found in trials.items() if found}
    found = []
    for one, other in itertools.combinations(able, 2):
        first, second = (other, one) if one == base else (one, other)
        seeds = sorted(able[first].keys() & able[second].keys())
        if not seeds:
            continue
        mine, theirs = ([able[norm][seed] for seed in seeds] for norm in (first, second))
        found.append(_difference(first, second, "final", _estimate(mine, theirs), len(seeds)))
        if base == second and task.target is not None:
            found.append(_difference(first, second, "steps", _ratio(mine, theirs, task), len(seeds)))
    return found


def _by_seed(trials: Sequence[TrialResult]) -> dict[int, TrialResult]:
    return {trial.config.seed: trial for trial in trials}


def _ratio(trials: Sequence[TrialResult], others: Sequence[TrialResult], task: Task) -> Estimate:
    """Of the steps to the target. A seed that did not get there counts with its budget, which flatters the slower."""
    logs, variances = [], []
    for pair in zip(trials, others, strict=True):
        steps = [_steps(trial, task) for trial in pair]
        logs.append(math.log(steps[0][0] / steps[1][0]))
        # The target is crossed somewhere between two evaluations.
        variances.append(sum((apart / at) ** 2 for at, apart in steps))
    spread = estimate(logs, math.sqrt(statistics.fmean(variances)))
    low, high = (None if end is None else math.exp(end) for end in (spread.low, spread.high))
    return Estimate(math.exp(spread.value), low, high, spread.p)


def _steps(trial: TrialResult, task: Task) -> tuple[int, int]:
    """Steps to the target, at most the budget, and how far the evaluation before lies back."""
    hit = reached(trial, task)
    at = max(1, hit.step if hit else trial.steps)
    before = max((evaluation.step for evaluation in trial.curve if evaluation.step < at), default=0)
    return at, at - before


def _difference(first: str, second: str, quantity: str, found: Estimate, seeds: int) -> Difference:
    return Difference(first, second, quantity, *found, adjusted=None, seeds=seeds)


def _corrected(groups: Sequence[Group], differences: Sequence[Sequence[Difference]]) -> list[list[Difference]]:
    tested = [
        (number, index, difference)
        for number, found in enumerate(differences)
        for index, difference in enumerate(found)
        if difference.p is not None
    ]
    weights = [1.0 if d.second == groups[number].baseline.norm else _PAIR_WEIGHT for number, _, d in tested]
    result = [list(found) for found in differences]
    for (number, index, difference), p in zip(
        tested, adjusted([d.p for _, _, d in tested if d.p is not None], weights), strict=True
    ):
        result[number][index] = difference._replace(adjusted=p)
    return result


def _with_differences(group: Group, found: Sequence[Difference]) -> Group:
    base = group.baseline.norm
    return Group(
        group.setting,
        group.variants,
        tuple(difference for difference in found if difference.second == base),
        tuple(difference for difference in found if difference.second != base),
    )


def _known(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if value is not None]
