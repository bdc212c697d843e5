"""From measurements to a verdict: single checks, each true, false or open, and what they say together.

Everything here is a pure function of numbers. A check is open where the seeds do not allow to tell: its interval holds
values for it and values against it, or there are fewer than three seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

from normkit.experiments.inference import ENOUGH, Estimate, estimate
from normkit.studies.measurements import Against, Measured

__all__ = [
    "Check",
    "Level",
    "agrees",
    "alike",
    "at_least",
    "at_least_times",
    "at_most_times",
    "below",
    "combined",
    "decided",
    "differs",
    "exceeds",
    "fewer_steps",
    "learns",
    "less_time",
    "near",
    "not_worse",
    "positive",
    "similar_steps",
    "wider",
]


class Level(StrEnum):
    """What a study found of its claim."""

    HOLDS = "holds"
    PARTLY = "holds partly"
    NOT = "does not hold here"
    UNKNOWN = "not enough evidence"


class Check(NamedTuple):
    """One thing the claim says: whether it holds (None: open), and the numbers it rests on, in a sentence."""

    said: str
    holds: bool | None


def decided(checks: Iterable[Check]) -> Level:
    """What the checks of one network on one data set say together.

    Some true and some false is `holds partly`, whatever the open ones would be; else an open one leaves it open.
    """
    found = {check.holds for check in checks}
    if {True, False} <= found:
        return Level.PARTLY
    if None in found or not found:
        return Level.UNKNOWN
    return Level.HOLDS if True in found else Level.NOT


def combined(levels: Iterable[Level]) -> Level:
    """What the verdicts on several networks and data sets say together, by the same rule."""
    found = set(levels)
    if Level.PARTLY in found or {Level.HOLDS, Level.NOT} <= found:
        return Level.PARTLY
    return found.pop() if len(found) == 1 else Level.UNKNOWN


# ---- checks of a metric after training, at each one's best rate; accuracies are shares


def at_least(first: Measured, second: Measured, margin: float) -> Check:
    """Whether the first is better by `margin` or more, beyond chance.

    True where the mean difference is that large and its interval lies above 0, false where the interval lies below the
    margin.
    """
    if (lost := _lost(first, second)) is not None:
        return lost
    found = _difference(first, second)
    holds = _judged(found, lambda low: low > 0 and found.value >= margin, lambda high: high < margin)
    return Check(f"{_pair(first, second, found)}; asked for: at least {_points(margin)} more", holds)


def not_worse(first: Measured, second: Measured, margin: float) -> Check:
    """Whether the first is at most `margin` worse: true and false where the whole interval says so."""
    if (lost := _lost(first, second)) is not None:
        return lost
    found = _difference(first, second)
    holds = _judged(found, lambda low: low > -margin, lambda high: high < -margin)
    return Check(f"{_pair(first, second, found)}; asked for: at most {_points(margin)} less", holds)


def alike(first: Measured, second: Measured, margin: float) -> Check:
    """Whether both are within `margin` of each other: the whole interval within it, or all of it outside."""
    if _lost(first, second) is not None:
        return Check(_lost_words(first, second), None if not (first.final or second.final) else False)
    found = _difference(first, second)
    return Check(f"{_pair(first, second, found)}; asked for: within {_points(margin)}", _within(found, margin))


def differs(first: Measured, second: Measured, margin: float) -> Check:
    """Whether they are further apart than `margin`, in whichever direction: the opposite of :func:`alike`."""
    return _opposite(alike(first, second, margin), "within", "further apart than")


def exceeds(what: str, values: Sequence[float], margin: float) -> Check:
    """Whether the mean of one value per seed is `margin` or more: the whole interval above it, or all of it below."""
    found = estimate(values) if values else Estimate(math.nan)
    holds = _judged(found, lambda low: low >= margin, lambda high: high < margin)
    return Check(f"{what}: {_value(found)}; asked for: at least {_points(margin)}", holds)


def below(what: str, values: Sequence[float], margin: float) -> Check:
    """Whether the mean of one value per seed is under `margin`: the whole interval under it, or all of it not."""
    found = estimate(values) if values else Estimate(math.nan)
    holds: bool | None = None
    if found.low is not None and found.high is not None:
        holds = True if found.high < margin else False if found.low >= margin else None
    return Check(f"{what}: {_value(found)}; asked for: under {_points(margin)}", holds)


def at_least_times(what: str, factors: Sequence[float], factor: float) -> Check:
    """Whether the geometric mean of one factor per seed is `factor` or more: its whole interval says so, or against."""
    found = estimate([math.log(value) for value in factors]) if factors else Estimate(math.nan)
    holds = _judged(found, lambda low: low >= math.log(factor), lambda high: high < math.log(factor))
    return Check(f"{what} {_times(found)}; asked for: at least {factor:g} times", holds)


def at_most_times(what: str, factors: Sequence[float], factor: float) -> Check:
    """Whether it is `factor` or less, likewise."""
    return _opposite(at_least_times(what, factors, factor), "at least", "at most")


def near(what: str, factors: Sequence[float], factor: float) -> Check:
    """Whether the geometric mean of one factor per seed is near 1: all of its interval within `factor`, or outside."""
    found = estimate([math.log(value) for value in factors]) if factors else Estimate(math.nan)
    return Check(f"{what} {_times(found)}; asked for: within {factor:g} times", _within(found, math.log(factor)))


def positive(what: str, values: Sequence[float]) -> Check:
    """Whether the mean of one value per seed is above 0: all of its interval above it, or below."""
    found = estimate(values) if values else Estimate(math.nan)
    holds = _judged(found, lambda low: low > 0, lambda high: high < 0)
    ends = f" [{found.low:+.2f}, {found.high:+.2f}]" if found.low is not None and found.high is not None else ""
    return Check(f"{what}: {found.value:+.2f}{ends}; asked for: more than 0", holds)


def agrees(against: Against, tolerance: float) -> Check:
    """Whether what was measured is what the formula gives: the whole interval within a share of it, or outside."""
    ratios = [value / against.formula - 1 for value in against.measured]
    found = estimate(ratios) if ratios else Estimate(math.nan)
    holds: bool | None = None
    if found.low is not None and found.high is not None:
        inside = -tolerance <= found.low and found.high <= tolerance
        outside = found.low > tolerance or found.high < -tolerance
        holds = True if inside else False if outside else None
    value = against.formula * (1 + found.value)
    shown = "unknown" if math.isnan(found.value) else f"{value:.4g}, {100 * found.value:+.1f} %"
    if found.low is not None and found.high is not None:
        shown += f" [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    said = f"{against.what}: formula {against.formula:.4g}, measured {shown}; asked for: within {100 * tolerance:g} %"
    return Check(said, holds)


# ---- checks of steps, seconds and rates


def fewer_steps(first: Measured, second: Measured, factor: float) -> Check:
    """Whether the second takes `factor` times as many steps to the target as the first, or more, beyond chance.

    A seed of the second that did not get there counts with its whole budget, which flatters the second.
    """
    said = f"steps to the target: {first.label} {_steps(first)}, {second.label} {_steps(second)}"
    return _faster(said, first.steps, second.steps, factor, first.budget, second.budget)


def less_time(first: Measured, second: Measured) -> Check:
    """Whether the first gets to the target in less time of training, beyond chance; counted as the steps are."""
    said = f"seconds to the target: {first.label} {_seconds(first)}, {second.label} {_seconds(second)}"
    spent = [(m.step_seconds or math.nan) * m.budget for m in (first, second)]
    return _faster(said, first.seconds, second.seconds, 1.0, *spent)


def similar_steps(first: Measured, second: Measured, factor: float) -> Check:
    """Whether neither takes `factor` times as many steps to the target as the other."""
    said = f"steps to the target: {first.label} {_steps(first)}, {second.label} {_steps(second)}"
    if None in first.steps or None in second.steps or not first.steps:
        return Check(f"{said}; not every seed got there", None)
    found = _ratio(first.steps, second.steps, first.budget, second.budget)
    holds = _within(found, math.log(factor))
    return Check(f"{said}: {_times(found)}; asked for: neither {factor:g} times the other", holds)


def wider(first: Measured, second: Measured, factor: float) -> Check:
    """Whether the largest rate that works for the first is `factor` times that of the second, or more.

    A rate works where every seed learned, so this one number rests on all seeds. Where the first works at the largest
    rate that was tried, a smaller ratio leaves it open.
    """
    said = f"largest rate that works: {first.label} {_rate(first)}, {second.label} {_rate(second)}"
    if min(first.seeds, second.seeds) < ENOUGH:
        return Check(f"{said}; fewer than {ENOUGH} seeds", None)
    if first.largest is None or second.largest is None:
        return Check(said, None if first.largest is second.largest else first.largest is not None)
    ratio = first.largest / second.largest
    holds = True if ratio >= factor * (1 - 1e-9) else None if first.largest == first.rates[-1] else False
    return Check(f"{said}: {ratio:.3g} times; asked for: at least {factor:g} times", holds)


def learns(measured: Measured) -> Check:
    """Whether it learns at any of the rates, with every seed."""
    shown = ", ".join(f"{rate:g}" for rate in measured.usable) or "none"
    said = f"rates that work for {measured.label}: {shown} of {len(measured.rates)} tried"
    return Check(said, bool(measured.usable) if measured.seeds >= ENOUGH else None)


# ---- helpers


def _difference(first: Measured, second: Measured) -> Estimate:
    """Paired by seed, with the grid that accuracies on the test part lie on."""
    resolution = math.sqrt(2) / first.examples if first.examples else 0.0
    return estimate([a - b for a, b in zip(first.final, second.final, strict=True)], resolution)


def _judged(found: Estimate, true: Callable[[float], bool], false: Callable[[float], bool]) -> bool | None:
    """By the lower end of the interval, or by the upper one; open where there is no interval."""
    if found.low is None or found.high is None:
        return None
    return True if true(found.low) else False if false(found.high) else None


def _opposite(check: Check, asked: str, instead: str) -> Check:
    """The check that holds where this one does not; open stays open."""
    said = check.said.replace(f"asked for: {asked}", f"asked for: {instead}")
    return Check(said, None if check.holds is None else not check.holds)


def _within(found: Estimate, margin: float) -> bool | None:
    """Whether all of the interval lies within `margin` of 0, or all of it outside; open else."""
    if found.low is None or found.high is None:
        return None
    inside = -margin < found.low and found.high < margin
    outside = found.low > margin or found.high < -margin
    return True if inside else False if outside else None


def _lost(first: Measured, second: Measured) -> Check | None:
    """Where one of the two diverged at every rate the other one is better, where both did nothing is known."""
    if first.final and second.final:
        return None
    enough = min(first.seeds, second.seeds) >= ENOUGH
    return Check(_lost_words(first, second), bool(first.final) if enough and (first.final or second.final) else None)


def _lost_words(first: Measured, second: Measured) -> str:
    lost = " and ".join(m.label for m in (first, second) if not m.final)
    ended = "".join(f", {m.label} ended at {100 * m.mean:.1f} %" for m in (first, second) if m.mean is not None)
    return f"{lost} diverged at every rate in some seed{ended}"


def _faster(
    said: str,
    first: Sequence[float | None],
    second: Sequence[float | None],
    factor: float,
    spent: float,
    others: float,
) -> Check:
    if None in first or not first:
        other = bool(second) and None not in second
        holds = False if other and len(second) >= ENOUGH else None
        return Check(f"{said}; not every seed of the first got there", holds)
    if not second:  # diverged at every rate
        return Check(said, True if len(first) >= ENOUGH else None)
    found = _ratio(second, first, others, spent)
    asked = f"at least {factor:g} times" if factor > 1 else "more than 1 time"
    holds = _judged(
        found,
        lambda low: low > 0 and found.value >= math.log(factor),
        lambda high: high < math.log(factor),
    )
    return Check(f"{said}: that is {_times(found)} as much; asked for: {asked}", holds)


def _ratio(first: Sequence[float | None], second: Sequence[float | None], budget: float, other: float) -> Estimate:
    """The logarithm of first / second, seed by seed; what did not get there counts with its budget."""
    pairs = zip(first, second, strict=True)
    return estimate([math.log((budget if a is None else a) / (other if b is None else b)) for a, b in pairs])


def _points(share: float) -> str:
    return f"{100 * share:.3g} points"


def _value(found: Estimate) -> str:
    if math.isnan(found.value):
        return "unknown"
    ends = (
        f" [{100 * found.low:.1f}, {100 * found.high:.1f}]" if found.low is not None and found.high is not None else ""
    )
    return f"{100 * found.value:.1f} points{ends}"


def _pair(first: Measured, second: Measured, found: Estimate) -> str:
    shown = [f"{m.label} {100 * (m.mean or 0.0):.1f} %" for m in (first, second)]
    return f"{' against '.join(shown)}: {_signed(found)}"


def _signed(found: Estimate) -> str:
    ends = (
        f" [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
        if found.low is not None and found.high is not None
        else ""
    )
    return f"{100 * found.value:+.1f} points{ends}"


def _times(found: Estimate) -> str:
    ends = ""
    if found.low is not None and found.high is not None:
        ends = f" [{math.exp(found.low):.2f}, {math.exp(found.high):.2f}]"
    return f"{math.exp(found.value):.2f} times{ends}"


def _steps(measured: Measured) -> str:
    return _mean(measured.steps, f"> {measured.budget}", "{:.0f}")


def _seconds(measured: Measured) -> str:
    return _mean(measured.seconds, "not reached", "{:.2f}")


def _mean(values: Sequence[float | None], otherwise: str, form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(sum(known) / len(known)) if known and len(known) == len(values) else otherwise


def _rate(measured: Measured) -> str:
    if measured.largest is None:
        return "none"
    return f"{'≥ ' if measured.largest == measured.rates[-1] else ''}{measured.largest:g}"
