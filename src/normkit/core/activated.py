"""Normalizers whose formula is not "normalize, then affine": with an activation, without statistics, of responses.

As in :mod:`normkit.core.formula`, `xp` is an array namespace (which needs `tanh`, too) and inputs arrive in the type in
which statistics accumulate. gamma, beta and the other parameters have one value per channel unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normkit.core.formula import Moments, scaled, spread
from normkit.core.plan import NormPlan, affine_shape, kept_shape, view_shape
from normkit.core.spec import NormSpec

__all__ = ["dynamic_tanh", "evonorm_b0", "evonorm_s0", "global_response", "sigmoid", "thresholded"]


def sigmoid(xp: Any, z: Any) -> Any:
    """Return 1 / (1 + exp(-z)), by tanh: exp overflows, and then its gradient is NaN."""
    return 0.5 + 0.5 * xp.tanh(0.5 * z)


def thresholded(xp: Any, p: NormPlan, y: Any, tau: Any) -> Any:
    """Return max(y, tau), the thresholded linear unit of filter response normalization (arXiv:1911.09737)."""
    tau = xp.reshape(tau, kept_shape(p, tuple(y.shape)))
    return xp.where(y < tau, tau, y)  # this way round NaN comes out as NaN, where a loss scaler sees it


def dynamic_tanh(xp: Any, x: Any, alpha: Any, gamma: Any, beta: Any) -> Any:
    """Return gamma * tanh(alpha * x) + beta (arXiv:2503.10622); alpha is one number, gamma and beta broadcast."""
    return gamma * xp.tanh(alpha * x) + beta


def evonorm_b0(
    xp: Any,
    spec: NormSpec,
    p: NormPlan,
    instance: NormPlan,
    x: Any,
    v: Any,
    gamma: Any,
    beta: Any,
    *,
    eps: float,
    weight: Any = None,
    kept: Mapping[str, Any] | None = None,
    together: Any = None,
) -> tuple[Any, Moments | None]:
    """Return x / max(sqrt(var_batch + eps), v x + sqrt(var_instance + eps)) * gamma + beta (arXiv:2004.02967).

    Args:
        instance: plan of the statistics of each sample's channels; `p` is that of the batch.
        kept: its `var` takes the place of the batch's. The variance of the instance is always that of the input.
        together: the namespace whose sums go over all devices, for the batch; the instance is on one.

    Returns:
        The output, and the moments of the batch, None with `kept`.
    """
    shape, moments = kept_shape(p, tuple(x.shape)), None
    if kept is None:
        std, moments = spread(xp if together is None else together, spec, p, x, eps=eps, weight=weight)
    else:
        std = xp.sqrt(xp.reshape(kept["var"], shape) + eps)
    alone, _ = spread(xp, spec, instance, x, eps=eps, weight=weight)
    gate = xp.reshape(v, shape) * x + alone
    return scaled(xp, spec, shape, x, 1.0 / xp.where(gate > std, gate, std), gamma, beta, None), moments


def evonorm_s0(
    xp: Any, spec: NormSpec, p: NormPlan, x: Any, v: Any, gamma: Any, beta: Any, *, eps: float, weight: Any = None
) -> Any:
    """Return x * sigmoid(v x) / sqrt(var_group + eps) * gamma + beta (arXiv:2004.02967)."""
    std, _ = spread(xp, spec, p, x, eps=eps, weight=weight)
    view = view_shape(p, tuple(x.shape))
    swish = x * sigmoid(xp, xp.reshape(v, kept_shape(p, tuple(x.shape))) * x)
    y = scaled(xp, spec, affine_shape(p, view), xp.reshape(swish, view), 1.0 / std, gamma, beta, None)
    return xp.reshape(y, tuple(x.shape))


def global_response(
    xp: Any, p: NormPlan, x: Any, gamma: Any, beta: Any, *, eps: float, channel: int, weight: Any = None
) -> Any:
    """Return gamma * (x * g / (mean(g) + eps)) + beta + x, g = sqrt(sum(x^2)) over positions (arXiv:2301.00808).

    The mean is taken over the channels of a sample, on axis `channel`. A channel of zeros has the response 0, with the
    slope 0.

    Args:
        weight: of each position, >= 0, in the shape of x with a channel axis of length 1; it weighs the squares.
    """
    shape = kept_shape(p, tuple(x.shape))
    squares = xp.sum(x * x if weight is None else x * x * weight, axis=p.reduce, keepdims=True) if p.reduce else x * x
    some = squares > 0
    # The slope of a root at 0 is infinite, and infinity times the 0 of the branch not taken would be NaN.
    response = xp.where(some, xp.sqrt(xp.where(some, squares, squares + 1.0)), squares * 0.0)
    mean = xp.sum(response, axis=channel, keepdims=True) / x.shape[channel]
    return xp.reshape(gamma, shape) * (x * (response / (mean + eps))) + xp.reshape(beta, shape) + x
