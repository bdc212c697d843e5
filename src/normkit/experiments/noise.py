"""How much the statistics of batch norm vary from batch to batch, time step by time step.

Of a batch in which n sequences have not ended, the mean of independent values has the standard deviation s / sqrt(n),
where s is that of the population. An epoch deals all its sequences to batches at random, so the variance between its
batch means is s^2 times the mean of 1 / n in expectation, exactly, with s^2 = sum of squares / (N - 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from normkit.experiments.protocol import BatchStatistics
from normkit.experiments.results import StepNoise

__all__ = ["noise"]

Values = NDArray[np.float64]


def noise(found: Iterable[BatchStatistics]) -> tuple[StepNoise, ...]:
    """What the batches of an epoch say together, step by step; nothing without any.

    A single sequence has no statistics of its own: batches in which fewer than two are alive count for `alive` alone.
    """
    batches = list(found)
    if not batches:
        return ()
    counts = np.stack([batch.counts for batch in batches])
    means = [np.stack(parts) for parts in zip(*(batch.means for batch in batches), strict=True)]
    variances = [np.stack(parts) for parts in zip(*(batch.variances for batch in batches), strict=True)]
    steps = []
    for t, n in enumerate(counts.T):
        own = n > 1
        kinds = [(mean[own, t], variance[own, t]) for mean, variance in zip(means, variances, strict=True)]
        found_at = [_of_step(n[own], *kind) for kind in kinds]
        expected = math.sqrt((1 / n[own]).mean()) if own.any() else math.nan
        steps.append(StepNoise(float(n.mean()), expected, tuple(a for a, _ in found_at), tuple(b for _, b in found_at)))
    return tuple(steps)


def _of_step(n: NDArray[np.int64], means: Values, variances: Values) -> tuple[float, float]:
    """Noise of the means and of the variances (batches, channels) of so many values each."""
    if len(n) < 2:
        return math.nan, math.nan
    total = n.sum()
    center = n @ means / total
    population = n @ (variances + (means - center) ** 2) / (total - 1)
    return (
        _middle(means.std(0, ddof=1), np.sqrt(population)),
        _middle(variances.std(0, ddof=1), variances.mean(0)),
    )


def _middle(values: Values, scales: Values) -> float:
    """The median of the ratio over the channels that vary: U h of the first step is 0 in all of them."""
    varies = scales > 0
    return float(np.median(values[varies] / scales[varies])) if varies.any() else math.nan
