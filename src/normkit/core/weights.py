"""Norms of the weights of a linear map, and of their gradients: one statistic per unit, over all that it is fed by.

Weight norm is RMS norm of a unit's weights with eps 0, weight standardization their layer norm; only the gain has a
scale of its own. So both run on plans, as norms of values do, with rows of weights as samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from normkit.core.spec import NormSpec

__all__ = ["WEIGHT_NORM", "WEIGHT_STANDARDIZATION", "clipping_factor", "gain_after", "gain_of_norm", "gain_of_scaled"]

WEIGHT_NORM = NormSpec("weight_norm", x="o *i", over="*i", affine="o", center=False, eps=0.0, paper="arXiv:1602.07868")
WEIGHT_STANDARDIZATION = NormSpec(
    "weight_standardization", x="o *i", over="*i", affine="o", eps=1e-6, minimum=2, paper="arXiv:1903.10520"
)

# A standard normal value is beyond 12 with a probability of 4e-33. Known activations have their kinks at whole numbers;
# between two, 20 nodes integrate a smooth one to rounding.
_FURTHEST, _NODES = 12, 20


def gain_of_norm(length: Any, fan_in: int) -> Any:
    """Return what a unit's weights over their root mean square are multiplied by, to have this Euclidean length."""
    return length / math.sqrt(fan_in)


def gain_of_scaled(gain: Any, gamma: float, fan_in: int) -> Any:
    """Return what standardized weights are multiplied by, so that a unit keeps the variance of its inputs.

    That is gain * gamma / sqrt(fan_in); gamma makes good for the variance that an activation takes away.
    """
    return gain * (gamma / math.sqrt(fan_in))


def gain_after(activation: Callable[[Any], Any]) -> float:
    """Return 1 / sqrt(var(activation(z))) for standard normal z, by quadrature: sqrt(2 / (1 - 1/pi)) for ReLU.

    Args:
        activation: takes and gives an array of float64.
    """
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    z = (np.arange(-_FURTHEST, _FURTHEST)[:, None] + (nodes + 1) / 2).ravel()
    probability = np.exp(-z * z / 2) / math.sqrt(2 * math.pi) * np.tile(weights / 2, 2 * _FURTHEST)
    y = np.asarray(activation(z), np.float64)
    mean = (y * probability).sum()
    return float(1 / math.sqrt((np.square(y - mean) * probability).sum()))


def clipping_factor(xp: Any, gradient: Any, weight: Any, axes: tuple[int, ...], *, clipping: float, eps: float) -> Any:
    """Return min(1, clipping * max(||W||, eps) / ||G||) per unit, norms over `axes` (arXiv:2102.06171).

    A gradient that is not finite stays so: a norm of NaN gives 1, an infinite one 0, and 0 times infinity is NaN.
    """
    size, length = (xp.sqrt(xp.sum(t * t, axis=axes, keepdims=True)) for t in (weight, gradient))
    limit = clipping * xp.where(size > eps, size, xp.zeros_like(size) + eps)
    return limit / xp.where(length > limit, length, limit)
