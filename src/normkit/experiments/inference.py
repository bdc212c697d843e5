"""What a few seeds allow to claim: paired t intervals, test-set sampling error, Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "adjusted", "estimate"]

LEVEL = 0.95
ENOUGH = 3  # seeds for an interval
ENOUGH_FOR_DF = 10  # seeds for telling their share from the examples'


class Estimate(NamedTuple):
    """A mean with its 95 % interval and the two-sided p that it is 0; None where there are too few seeds."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def estimate(values: Sequence[float], resolution: float = 0.0, examples: NDArray[Any] | None = None) -> Estimate:
    """The mean of one value per seed: mean ± t se, with df degrees of freedom.

    Without examples se^2 = s^2 / n and df = n - 1, where s is the standard deviation between the seeds. With the values
    of each test example (`examples`, n x m) it counts that others might have been drawn as well::

        se^2 = V_seeds + V_examples - V_both,  V_seeds = var(row means) / n,  V_examples = var(column means) / m,
        V_both = var(residuals of rows and columns) / (n m)

    which is the variance that resampling seeds and examples independently would show, without counting the part that
    both share twice. From 10 seeds on df is Satterthwaite's; with fewer their share is too uncertain for that, and df
    stays n - 1.

    `resolution` is the grid that values lie on (an accuracy on m examples: 1/m): rounding to it adds resolution^2 / 12
    to the variance, so that a few seeds that happen to agree do not pass for certainty. Intervals need 3 seeds.
    """
    from scipy.special import stdtr, stdtrit

    data = np.asarray(values, dtype=np.float64)
    n, mean = len(data), float(data.mean())
    if n < ENOUGH:
        return Estimate(mean)
    variance = (float(data.var(ddof=1)) + resolution**2 / 12) / n
    df = n - 1.0
    if examples is not None and examples.shape[1] > 1:
        sampling = _of_examples(np.asarray(examples, dtype=np.float64))
        both = variance + sampling
        if sampling > 0 and n >= ENOUGH_FOR_DF:
            df = both**2 / (variance**2 / (n - 1) + sampling**2 / (examples.shape[1] - 1))
        variance = both
    if variance == 0:
        return Estimate(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    error = math.sqrt(variance)
    reach = float(stdtrit(df, (1 + LEVEL) / 2)) * error
    return Estimate(mean, mean - reach, mean + reach, 2 * float(stdtr(df, -abs(mean) / error)))


def _of_examples(values: NDArray[np.float64]) -> float:
    """What the choice of test examples adds to the variance of the mean, never below 0."""
    n, m = values.shape
    columns = values.mean(axis=0)
    residuals = values - columns - values.mean(axis=1, keepdims=True) + values.mean()
    both = float((residuals**2).sum()) / ((n - 1) * (m - 1))
    return max(0.0, float(columns.var(ddof=1)) / m - both / (n * m))


def adjusted(p_values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Holm's correction (1979) with weights: the chance of any false claim stays below the level, however they depend.

    In the order of p / w, each p is multiplied by the sum of the weights not yet passed over its own.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i] / weights[i])
    left, largest, result = sum(weights), 0.0, [1.0] * len(p_values)
    for i in order:
        largest = max(largest, p_values[i] * left / weights[i])
        result[i] = min(1.0, largest)
        left -= weights[i]
    return result
