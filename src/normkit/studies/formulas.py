"""Formulas of papers, and what networks of this package show of them: no training is needed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from normkit.frameworks import part
from normkit.studies.measurements import Against

__all__ = ["BLOCKS", "KEEPS", "dropout_variance", "residual_growth"]

BLOCKS = 10  # arXiv:2002.10444 argues for any number; without norm 2^10 is already a thousand
KEEPS = (0.5, 0.7, 0.9)
# Of max(0, z) with z ~ N(0, 1): 1 / sqrt(2 pi), and 1 / 2 less its square.
_RECTIFIED = 1 / math.sqrt(2 * math.pi), 0.5 - 1 / (2 * math.pi)

Formulas = Callable[[Sequence[int]], tuple[Against, ...]]  # from the seeds


def residual_growth(seeds: Sequence[int]) -> tuple[Against, ...]:
    """Mean square of x over 10 blocks: without norm times 2 per block, with batch norm plus 1 (arXiv:2002.10444).

    Slopes are least squares over all blocks, of the logarithm and of the mean square itself.
    """
    measured = _torch().residual_powers
    plain, normed = ([measured(norm, BLOCKS, seed) for seed in seeds] for norm in ("none", "batch"))
    ends = []
    for each in (plain, normed):
        first, last = (statistics.mean(powers[at] for powers in each) for at in (0, -1))
        ends.append(f"from {first:.3g} to {last:.4g}")
    return (
        Against(
            f"{BLOCKS} residual blocks without norm, mean square {ends[0]}: grows per block, times",
            2.0,
            tuple(2 ** _slope([math.log2(power) for power in powers]) for powers in plain),
        ),
        Against(
            f"{BLOCKS} residual blocks with batch norm, mean square {ends[1]}: grows per block, plus",
            1.0,
            tuple(_slope(powers) for powers in normed),
        ),
    )


def dropout_variance(seeds: Sequence[int]) -> tuple[Against, ...]:
    """Variance in evaluation / in training behind dropout and a linear layer: v / ((c^2 + v) / p - c^2).

    p is the probability to keep, c and v mean and variance of the inputs, which are independent of each other
    (arXiv:1801.05134).
    """
    return tuple(
        Against(
            f"{name} inputs, dropout {1 - keep:.1g}: variance in evaluation / the one batch norm keeps",
            v / ((c**2 + v) / keep - c**2),
            tuple(_torch().dropout_ratio(keep, rectified, seed) for seed in seeds),
        )
        for name, rectified, (c, v) in (("normal", False, (0.0, 1.0)), ("rectified", True, _RECTIFIED))
        for keep in KEEPS
    )


def _slope(values: Sequence[float]) -> float:
    return statistics.linear_regression(range(len(values)), values).slope


def _torch() -> Any:
    return part("torch", "quantities")
