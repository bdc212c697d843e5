"""From the probes of trials to numbers that a criterion can judge: one value per seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from normkit.experiments.config import MOMENTUM
from normkit.experiments.results import LayerProbe, Probe, TrialResult

__all__ = ["Probed", "probed", "resting_weight", "turning"]

_LATE = 0.75  # of the steps lie before the last quarter, in which weights are expected to rest


class Probed(NamedTuple):
    """What the probes say of one norm in one circumstance at one rate, per seed; empty where a seed diverged.

    Shift and smoothness are medians over the probed steps, those of the layers over the layers as well, the first left
    out, which has none before it. What is said of weights is of the hidden layers.

    Attributes:
        lr: the rate.
        difference: ||G - G'|| of a layer's gradient before and after the earlier layers took the step.
        cosine: of G and G'.
        variation: highest - lowest loss over steps along the gradient, in losses where they begin.
        change: the largest change of the gradient over those steps.
        smoothness: effective beta-smoothness.
        growth: norm of the weights at the last probe / at the first.
        drift: |1 - norm at the last probe / norm at the first of the last quarter|.
        resting: norm in the last quarter / the one that decay and gradients balance at; empty without decay.
        turned: angle of a step in the last quarter / the one that goes with it; empty without decay.
    """

    lr: float
    difference: tuple[float, ...] = ()
    cosine: tuple[float, ...] = ()
    variation: tuple[float, ...] = ()
    change: tuple[float, ...] = ()
    smoothness: tuple[float, ...] = ()
    growth: tuple[float, ...] = ()
    drift: tuple[float, ...] = ()
    resting: tuple[float, ...] = ()
    turned: tuple[float, ...] = ()


def probed(lr: float, trials: Sequence[TrialResult]) -> Probed:
    """Of the trials at one rate, seed by seed."""
    if any(trial.diverged or not trial.probes for trial in trials):
        return Probed(lr)

    def each(value: Callable[[TrialResult], float]) -> tuple[float, ...]:
        found = tuple(value(trial) for trial in trials)
        return found if all(map(math.isfinite, found)) else ()

    return Probed(
        lr,
        difference=each(lambda trial: _middle(trial, lambda layer: layer.difference)),
        cosine=each(lambda trial: _middle(trial, lambda layer: layer.cosine)),
        variation=each(lambda trial: _median(_over(p.losses[1] - p.losses[0], p.loss) for p in trial.probes)),
        change=each(lambda trial: _median(probe.changes[1] for probe in trial.probes)),
        smoothness=each(lambda trial: _median(probe.smoothness for probe in trial.probes)),
        growth=each(lambda trial: _weight(trial.probes[-1]) / _weight(trial.probes[0])),
        drift=each(lambda trial: abs(1 - _weight(trial.probes[-1]) / _weight(_late(trial)[0]))),
        resting=each(_resting),
        turned=each(_turned),
    )


def resting_weight(lr: float, decay: float, momentum: float, gradient: float) -> float:
    """The norm at which decay and gradients balance, where a weight's scale does not matter.

    |w|⁴ = lr |g̃|² / (2 decay (1 - momentum)); `gradient` is the root mean square of |g̃| = |w| |g|, the gradient of the
    weight scaled to norm 1. Gradients of different steps are taken as uncorrelated. Without momentum it is that of van
    Laarhoven 2017 (arXiv:1706.05350), with momentum that of Wan et al. 2020 (arXiv:2006.08419).
    """
    return (lr * gradient**2 / (2 * decay * (1 - momentum))) ** 0.25


def turning(lr: float, decay: float, momentum: float) -> float:
    """The angle by which a resting weight turns in a step, in radians: sqrt(2 lr decay / (1 + momentum)).

    Whatever its gradients are, as long as they are at right angles to it: of w_(t+1) - w_t = u_t, u_t = m u_(t-1) -
    lr (g + decay w_t), the means <w, u> = -|u|²/2, for |w| rests, and <w, u> = m (<w, u> + |u|²) - lr decay |w|².
    """
    return math.sqrt(2 * lr * decay / (1 + momentum))


def _middle(trial: TrialResult, value: Callable[[LayerProbe], float]) -> float:
    return _median(value(layer) for probe in trial.probes for layer in probe.layers[1:])


def _median(values: Iterable[float]) -> float:
    """Of those that are known: where a gradient is 0 it has no direction."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def _weight(probe: Probe) -> float:
    return math.sqrt(sum(layer.weight**2 for layer in probe.layers[:-1]))


def _late(trial: TrialResult) -> list[Probe]:
    """The probes of the last quarter; at least the last one."""
    begins = _LATE * trial.steps
    return [probe for probe in trial.probes if probe.step >= begins] or [trial.probes[-1]]


def _resting(trial: TrialResult) -> float:
    """Norm / resting norm, the geometric mean over the hidden layers."""
    config, probes = trial.config, _late(trial)
    if not config.conditions.weight_decay:
        return math.nan
    ratios = []
    for layers in zip(*(probe.layers[:-1] for probe in probes), strict=True):
        weight = statistics.fmean(layer.weight**4 for layer in layers) ** 0.25
        gradient = math.sqrt(statistics.fmean((layer.weight * layer.gradient) ** 2 for layer in layers))
        ratios.append(_over(weight, resting_weight(config.lr, config.conditions.weight_decay, MOMENTUM, gradient)))
    return _geometric(ratios)


def _turned(trial: TrialResult) -> float:
    """Angle / angle of a resting weight, the geometric mean over the hidden layers."""
    config, probes = trial.config, _late(trial)
    if not config.conditions.weight_decay:
        return math.nan
    angles = [
        math.sqrt(statistics.fmean(layer.turned**2 for layer in layers))
        for layers in zip(*(probe.layers[:-1] for probe in probes), strict=True)
    ]
    return _geometric(angles) / turning(config.lr, config.conditions.weight_decay, MOMENTUM)


def _geometric(values: Sequence[float]) -> float:
    """NaN where a layer is dead: without a gradient nothing balances or turns."""
    return statistics.geometric_mean(values) if all(value > 0 for value in values) else math.nan


def _over(value: float, base: float) -> float:
    return value / base if base else math.nan
