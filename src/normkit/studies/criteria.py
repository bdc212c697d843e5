"""What must be true of the measurements for a claim to hold: one pure function per study.

Thresholds that come from nowhere else are rounded: three points are what a mean of five seeds on 450 test examples can
tell (one accuracy of 97 % has a standard error of 0.8 points); the factors are the smallest that a reader would call a
benefit. The others come with their papers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from normkit.experiments.inference import ENOUGH
from normkit.studies.measurements import USUAL, Measured, Measurements
from normkit.studies.probed import Probed
from normkit.studies.stepwise import KINDS, growth
from normkit.studies.verdict import (
    Check,
    agrees,
    alike,
    at_least,
    at_least_times,
    at_most_times,
    below,
    differs,
    exceeds,
    fewer_steps,
    learns,
    less_time,
    near,
    not_worse,
    positive,
    similar_steps,
    wider,
)

__all__ = [
    "ALONE",
    "BLOCKED",
    "COUNTED",
    "DECAY",
    "DROPOUT",
    "EACH",
    "FIRST",
    "KERAS",
    "LABELS",
    "LARGE",
    "LONG",
    "MASKED",
    "OUTLIERS",
    "POPULATION",
    "RANDOM",
    "RATE",
    "SHIFTED",
    "STEPS",
    "SWAPPED",
    "TESTED",
    "TIED",
    "TORCH",
    "appearance",
    "batch_size",
    "convergence",
    "covariate_shift",
    "depth",
    "dropout",
    "groups_of",
    "initialization",
    "inputs",
    "layers",
    "learning_rate",
    "non_iid",
    "overhead",
    "placement",
    "recurrent",
    "regularization",
    "smoothness",
    "train_eval_gap",
    "weight_decay",
    "weights",
]

# Names of circumstances, as the tables show them.
FIRST = "batch norm first"
LABELS, OUTLIERS, DROPOUT = "30 % random labels", "5 % outliers", "dropout 0.5"
RANDOM, TIED, SWAPPED, SHIFTED = "random light", "light by class", "light swapped in test", "another light in test"
TESTED = "another light in test, its statistics"
TORCH, KERAS, LONG = "momentum 0.1", "momentum 0.01", "momentum 0.01, long"
POPULATION = "momentum 0.01, recalibrated"
BLOCKED = "groups of 16, two classes each"
COUNTED, MASKED = "one statistic, padding counted", "one statistic, padding masked"
EACH = "statistics per step, of W x alone"
ALONE, STEPS, LARGE = "each sequence alone", "statistics per step", "statistics per step, gamma 1"
DECAY, RATE = "weight decay", "growing rate instead"

POINTS = 0.03
SOONER = 1.5  # times fewer steps
RATES = 8.0  # times larger rates: arXiv:1502.03167 used 5 and 30, arXiv:1806.02375 puts the benefit there
LEVEL = 1.1  # behind batch norm the spread is 1, but for epsilon and channels that are constant
FADES = 2.0
SMOOTHER = 2.0  # times: the curves of arXiv:1805.11604 lie further apart, by up to a hundred
BALANCE = 1.2  # times: what batches and few probes leave of a prediction that is exact in the mean
NOISIER = 1.5  # times: more than half as many sequences explain, which is sqrt(2)
RESTS = 0.05  # of the norm of weights, over a quarter of the training
FORMULA = 0.05  # networks 512 wide, averaged, are within a percent or two of the limit that formulas are for
_WITHOUT_BOUND = 1e6  # of a signal that has died or is not finite


def groups_of(size: int) -> str:
    """The circumstance in which so many samples share statistics."""
    return f"{size} normalized together"


def layers(count: int) -> str:
    """The circumstance with so many hidden layers."""
    return f"{count} layers"


def weights(factor: float) -> str:
    """The circumstance with initial weights so many times as large."""
    return f"weights x {factor:g}"


def inputs(found: Measurements) -> Iterator[Check]:
    """Scaling lets more rates work; with batch norm raw inputs lose less, or nothing; as the first layer it scales."""
    raw, scaled = (found.one("none", inputs=mode) for mode in ("none", "standard"))
    shown = f"rates that work without norm: {len(scaled.usable)} of {len(scaled.rates)} with standardized inputs, "
    yield Check(f"{shown}{len(raw.usable)} with raw ones", _compared(scaled, raw))
    with_norm = found.all(norm="batch", arm=USUAL)
    yield at_least(found.one("batch", inputs="none"), raw, POINTS)
    yield not_worse(_worst(with_norm), _best(with_norm), POINTS)
    yield not_worse(found.one("none", FIRST), scaled, POINTS)


def convergence(found: Measurements) -> Iterator[Check]:
    """Fewer steps, and an end that is no worse."""
    yield fewer_steps(found.one("batch"), found.one("none"), SOONER)
    yield not_worse(found.one("batch"), found.one("none"), POINTS)


def overhead(found: Measurements) -> Iterator[Check]:
    """Less time to the target, although a step takes longer."""
    batch, none = found.one("batch"), found.one("none")
    sooner = less_time(batch, none)
    if batch.step_seconds and none.step_seconds:
        times = f"a step takes {1000 * batch.step_seconds:.3g} ms and {1000 * none.step_seconds:.3g} ms"
        sooner = sooner._replace(said=f"{times}, {sooner.said}")
    yield sooner


def learning_rate(found: Measurements) -> Iterator[Check]:
    """A larger rate works, and a much larger one."""
    yield wider(found.one("batch"), found.one("none"), 2.0)
    yield wider(found.one("batch"), found.one("none"), RATES)


def initialization(found: Measurements) -> Iterator[Check]:
    """With batch norm it learns at every scale and ends alike; without, at some scale, it does not learn."""
    plain, normed = found.all(norm="none"), found.all(norm="batch")
    worked = [m.arm or weights(1) for m in plain if m.usable]
    holds = len(worked) < len(plain) if min(m.seeds for m in plain) >= ENOUGH else None
    yield Check(f"without norm it fails at some scale; it learns with {', '.join(worked) or 'none'}", holds)
    for one in normed:
        yield learns(one)
    yield not_worse(_worst(normed), _best(normed), POINTS)


def depth(found: Measurements) -> Iterator[Check]:
    """Without norm the spread changes with depth, with it it stays; the deepest network trains; residual sums grow."""
    deepest = max(found.arms(), key=lambda arm: int(arm.split()[0]))
    plain, normed = found.one("none", deepest), found.one("batch", deepest)
    change = "the spread from the first activation to the last changes"
    yield at_least_times(f"{plain.label}: {change}", [_change(depths) for depths in plain.depths], FADES)
    yield at_most_times(f"{normed.label}: {change}", [_change(depths) for depths in normed.depths], LEVEL)
    yield learns(normed)
    yield wider(normed, plain, 2.0)
    yield from _formulas(found)


def train_eval_gap(found: Measurements) -> Iterator[Check]:
    """Running averages that have not converged make evaluation worse; population statistics close that; time too."""
    short, settled, quick, long = (found.one("batch", arm) for arm in (KERAS, POPULATION, TORCH, LONG))
    between = "training mode better than evaluation mode"
    yield exceeds(f"{short.label}, {short.budget} steps: {between}", short.gaps, 0.1)
    left = [gap / 3 - rest for gap, rest in zip(short.gaps, settled.gaps, strict=False)]
    yield exceeds(f"{settled.label}: less than a third of that is left, by", left, 0.0)
    yield below(f"{quick.label}, {quick.budget} steps: {between}", quick.gaps, POINTS)
    yield below(f"{long.label}, {long.budget} steps: {between}", long.gaps, 0.01)


def batch_size(found: Measurements) -> Iterator[Check]:
    """The fewer samples share statistics the worse batch norm gets; group norm does not know of them; renorm helps."""
    large, small, few = (found.one("batch", groups_of(size)) for size in (32, 2, 4))
    group, renorm = found.one("group"), found.one("renorm", groups_of(4))
    yield at_least(large, small, POINTS)
    yield at_least(group, small, POINTS)
    yield alike(group, large, POINTS)
    lost = [a - b for a, b in zip(large.final, few.final, strict=False)]
    if large.final and few.final and sum(lost) / len(lost) >= 0.02:  # else there is nothing to win back
        back = [r - b - gone / 2 for r, b, gone in zip(renorm.final, few.final, lost, strict=False)]
        yield exceeds(f"{renorm.label}: wins back half of what {few.label} loses, by", back, 0.0)


def placement(found: Measurements) -> Iterator[Check]:
    """Before or after: the same end, about the same number of steps."""
    before, after = found.one("batch"), found.one("batch:after")
    yield alike(before, after, POINTS)
    yield similar_steps(before, after, SOONER)


def regularization(found: Measurements) -> Iterator[Check]:
    """No more overfitting than without: clean labels, wrong labels, outliers."""
    for arm in (USUAL, LABELS, OUTLIERS):
        yield not_worse(found.one("batch", arm), found.one("none", arm), POINTS)


def dropout(found: Measurements) -> Iterator[Check]:
    """Batch norm alone ends no worse than the better of dropout alone and both; and the variance shift is there."""
    for arm in (USUAL, LABELS, OUTLIERS):
        dropped = f"{arm}, {DROPOUT}" if arm else DROPOUT
        yield not_worse(found.one("batch", arm), _best(found.all(arm=dropped)), POINTS)
    yield from _formulas(found)


def appearance(found: Measurements) -> Iterator[Check]:
    """It helps where light varies; does it also free the network of it? And do statistics of the new light help?"""
    yield at_least(found.one("batch", RANDOM), found.one("none", RANDOM), 0.01)
    for arm in (SWAPPED, SHIFTED):
        one = found.one("batch", arm)
        yield exceeds(f"accuracy of {one.label}", one.final, 0.5)
    yield at_least(found.one("batch", TESTED), found.one("batch", SHIFTED), 0.1)


def non_iid(found: Measurements) -> Iterator[Check]:
    """Batch norm is good in training mode and bad in evaluation; group norm and renorm are not."""
    batch = found.one("batch", BLOCKED)
    yield exceeds(f"{batch.label}: training mode better than evaluation mode", batch.gaps, 0.15)
    for norm in ("group", "renorm"):
        yield at_least(found.one(norm, BLOCKED), batch, 0.1)


def recurrent(found: Measurements) -> Iterator[Check]:
    """Padding in the statistics costs; each step its own loses nothing; gamma begins small; layer norm as good.

    Statistics of late steps are noisier. U h is 0 at the first step and has no noise there.
    """
    steps, masked = found.one("batch", STEPS), found.one("batch", MASKED)
    yield at_least(masked, found.one("batch", COUNTED), POINTS)
    yield not_worse(steps, masked, POINTS)
    yield not_worse(found.one("batch", EACH), masked, POINTS)
    yield at_least(steps, found.one("batch", LARGE), POINTS)
    yield not_worse(found.one("layer", ALONE), steps, POINTS)
    yield not_worse(steps, found.one("none", ALONE), POINTS)
    for kind, first in ((0, 0), (1, 1)):
        noisier = f"noise of the batch means of {KINDS[kind]}, last step over step {first + 1}:"
        yield at_least_times(f"{steps.label}: {noisier}", growth(steps.noise, kind, first), NOISIER)


def covariate_shift(found: Measurements) -> Iterator[Check]:
    """A layer's gradient changes less when the layers before it move: its length and its direction."""
    for where, batch, none in _at_rates(found):
        yield at_least_times(
            f"{where}: a layer's gradient changes by {_medians(none, batch, 'difference')}:",
            _ratios(none, batch, "difference"),
            1,
        )
        turned = [b - n for b, n in zip(batch.cosine, none.cosine, strict=False)]
        yield positive(f"{where}: cosine of the two {_medians(none, batch, 'cosine')}; more with it by", turned)


def smoothness(found: Measurements) -> Iterator[Check]:
    """Along the gradient the loss and its slope change less."""
    said = {"smoothness": "beta", "change": "the gradient changes by", "variation": "the loss varies by"}
    for where, batch, none in _at_rates(found):
        for name, what in said.items():
            shown = f"{where}: {what} {_medians(none, batch, name)}:"
            yield at_least_times(shown, _ratios(none, batch, name), SMOOTHER)


def weight_decay(found: Measurements) -> Iterator[Check]:
    """It holds the size of the weights, and with it the turn of a step; a growing rate does the same."""
    free, held, grown = (found.one("batch", arm) for arm in (USUAL, DECAY, RATE))
    without, with_decay = free.at(free.best_lr), held.at(held.best_lr)
    yield at_least_times("without decay the weights grow", without.growth, 1)
    rests = bool(with_decay.drift) and max(with_decay.drift) < RESTS
    for check in (
        near("with decay their norm is, over the one that is predicted,", with_decay.resting, BALANCE),
        near("with decay a step turns them, over the angle that is predicted,", with_decay.turned, BALANCE),
    ):
        yield check if rests else Check(f"{check.said}; they do not rest yet", None)
    yield alike(held, grown, POINTS)
    yield differs(found.one("none", DECAY), found.one("none", RATE), POINTS)


def _at_rates(found: Measurements) -> Iterator[tuple[str, Probed, Probed]]:
    """With batch norm and without: at the largest rate that works without, and each at its own best one."""
    batch, none = found.one("batch"), found.one("none")
    pairs = dict.fromkeys([(none.largest, none.largest), (batch.best_lr, none.best_lr)])
    for a, b in pairs:
        rates = "no rate" if None in (a, b) else f"rate {a:g}" if a == b else f"best rates, {b:g} and {a:g}"
        yield rates, batch.at(a), none.at(b)


def _ratios(first: Probed, second: Probed, name: str) -> list[float]:
    pairs = list(zip(getattr(first, name), getattr(second, name), strict=False))
    return [a / b for a, b in pairs] if all(min(pair) > 0 for pair in pairs) else []  # 0 is no number of times


def _medians(none: Probed, batch: Probed, name: str) -> str:
    shown = [f"{statistics.median(v):.3g}" if v else "unknown" for v in (getattr(p, name) for p in (none, batch))]
    return f"{shown[0]} without norm, {shown[1]} with it"


def _formulas(found: Measurements) -> Iterator[Check]:
    """Every formula of the study. Raises LookupError where none was measured: that is no evidence for it."""
    if not found.against:
        raise LookupError("no formula was measured")
    for against in found.against:
        yield agrees(against, FORMULA)


def _compared(more: Measured, fewer: Measured) -> bool | None:
    """Whether more rates work, which counts every seed."""
    return len(more.usable) > len(fewer.usable) if min(more.seeds, fewer.seeds) >= ENOUGH else None


def _best(found: tuple[Measured, ...]) -> Measured:
    return max(found, key=lambda m: -math.inf if m.mean is None else m.mean)


def _worst(found: tuple[Measured, ...]) -> Measured:
    return min(found, key=lambda m: -math.inf if m.mean is None else m.mean)


def _change(depths: tuple[float, ...]) -> float:
    """By what factor the largest spread differs from the smallest, first activation against last."""
    first, last = depths[0], depths[-1]
    if min(first, last) <= 0 or not math.isfinite(first) or not math.isfinite(last):
        return _WITHOUT_BOUND
    return min(_WITHOUT_BOUND, max(first / last, last / first))
