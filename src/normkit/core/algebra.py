"""Exact rules about statistics: merging, conventions of momentum and variance, folding, group counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from normkit.core.constraints import Integer, Real, check
from normkit.errors import NormValueError, message

__all__ = [
    "Pooled",
    "biased",
    "entropy",
    "fold_after",
    "fold_before",
    "groups_for",
    "largest_change",
    "merge",
    "pooled",
    "rate_of",
    "remaining",
    "scale_shift",
    "unbiased",
    "usual_groups",
]

Convention = Literal["torch", "keras", "flax", "onnx"]


class Pooled(NamedTuple):
    """Moments of all values together: their number, mean and biased variance."""

    count: Any
    mean: Any
    var: Any


def pooled(x: Any, axis: int, mask: Any = None) -> Pooled:
    """Moments of every channel of an array, over all its other axes, in float64.

    Args:
        x: an array with its channels on `axis`.
        axis: of the channels.
        mask: True where there is data; broadcastable to x without its channels. None: everywhere.

    Raises:
        NormValueError: without any value.

    >>> pooled([[1.0, 5.0], [3.0, 5.0]], axis=-1)
    Pooled(count=2, mean=array([2., 5.]), var=array([1., 0.]))
    """
    rows = np.moveaxis(np.asarray(x, dtype=np.float64), axis, -1)
    rows = rows.reshape(-1, rows.shape[-1]) if mask is None else rows[np.broadcast_to(mask, rows.shape[:-1])]
    if not len(rows):
        raise NormValueError(message("moments need at least one value", f"none in shape {np.shape(x)}"))
    mean = rows.mean(axis=0)
    return Pooled(len(rows), mean, np.square(rows - mean).mean(axis=0))


def merge(counts: Sequence[float], means: Sequence[Any], variances: Sequence[Any], *, between: bool = True) -> Pooled:
    """Merge the moments of batches of unequal sizes to those of all their values at once.

    n = sum n_k, mean = sum n_k mean_k / n, var = sum n_k (var_k + (mean_k - mean)^2) / n, with biased variances. The
    deviations are squared after centring, so a mean far from zero costs no digits. Batches of size 0 are left out.

    Args:
        counts: values behind each mean and variance.
        means, variances: one array each per batch, all of one shape; variances biased (divided by n).
        between: whether the variance between the means counts. Without, variances are averaged, as instance norm does.

    Returns:
        Moments in float64, as if all values had been one batch.

    Raises:
        NormValueError: without any value, with a negative count, or with lists of unequal length.
    """
    if not len(counts) == len(means) == len(variances):
        got = f"{len(counts)}, {len(means)} and {len(variances)}"
        raise NormValueError(message("`counts`, `means` and `variances` must have one entry per batch", got))
    if any(n < 0 for n in counts) or not sum(counts) > 0:
        raise NormValueError(message("`counts` must be >= 0 with at least one above 0", f"{list(counts)}"))
    kept = [k for k, n in enumerate(counts) if n > 0]
    n = np.asarray([counts[k] for k in kept], dtype=np.float64)
    mu = np.stack([np.asarray(means[k], dtype=np.float64) for k in kept])
    var = np.stack([np.asarray(variances[k], dtype=np.float64) for k in kept])
    share = (n / n.sum()).reshape((-1,) + (1,) * (mu.ndim - 1))
    # Relative to the first mean: sums of small numbers, whatever the offset.
    mean = mu[0] + ((mu - mu[0]) * share).sum(axis=0)
    spread = (mu - mean) ** 2 if between else 0.0
    return Pooled(n.sum(), mean, ((var + spread) * share).sum(axis=0))


def unbiased(var: Any, count: float) -> Any:
    """Return n/(n-1) times the biased variance (Bessel). Raises NormValueError below two values."""
    if count < 2:
        raise NormValueError(message("an unbiased variance needs at least 2 values", count))
    return var * (count / (count - 1))


def biased(var: Any, count: float) -> Any:
    """Undo :func:`unbiased`."""
    if count < 2:
        raise NormValueError(message("an unbiased variance needs at least 2 values", count))
    return var * ((count - 1) / count)


def rate_of(momentum: float, convention: Convention) -> float:
    """Return the weight of a new batch for a `momentum` of that framework, and the other way round.

    PyTorch's momentum *is* that weight (default 0.1); Keras, Flax and ONNX mean one minus it (0.99, 0.99, 0.9). The
    rule
    is its own inverse: `rate_of(rate_of(m, c), c) == m`.
    """
    check("rate_of", {"momentum": Real(0.0, 1.0)}, {"momentum": momentum})
    if convention not in ("torch", "keras", "flax", "onnx"):
        raise NormValueError(message("`convention` must be torch, keras, flax or onnx", repr(convention)))
    return momentum if convention == "torch" else 1.0 - momentum


def remaining(rate: float, steps: int) -> float:
    """Return what the first value of a kept statistic still weighs after so many updates: (1 - rate)^steps."""
    return (1.0 - rate) ** steps


def scale_shift(gamma: Any, beta: Any, mean: Any, var: Any, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (s, t) with (x - mean) / sqrt(var + eps) * gamma + beta = s x + t, in float64.

    `gamma` and `beta` may be None. Meant for folding: for normalizing, x * s + t loses digits where |mean| >> std.
    """
    scale = 1.0 / np.sqrt(np.asarray(var, dtype=np.float64) + eps)
    if gamma is not None:
        scale = scale * np.asarray(gamma, dtype=np.float64)
    shift = -np.asarray(mean, dtype=np.float64) * scale
    return scale, shift if beta is None else shift + np.asarray(beta, dtype=np.float64)


def fold_after(
    weight: Any, bias: Any, scale: np.ndarray, shift: np.ndarray, *, axis: int = 0, groups: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Fold y = scale * linear(x) + shift into the linear map: weight' = scale weight, bias' = scale bias + shift.

    Args:
        weight: of a linear map or convolution; `axis` is the one of its output channels (0 in PyTorch's Linear and
            Conv, 1 in its transposed convolutions, -1 in Keras).
        bias: of shape (channels,), or None for 0.
        scale, shift: of shape (channels,).
        groups: of a transposed convolution, whose axis 1 holds the output channels of one group.

    Returns:
        Weight and bias in float64.

    Raises:
        NormValueError: where `scale` has not one entry per output channel.
    """
    w = np.asarray(weight, dtype=np.float64)
    factor = _along(scale, "scale", "output", w, axis, groups)
    old = 0.0 if bias is None else np.asarray(bias, dtype=np.float64)
    return w * factor, old * scale + shift


def fold_before(
    weight: Any, bias: Any, scale: np.ndarray, shift: np.ndarray, *, axis: int = 1, groups: int = 1
) -> tuple[np.ndarray, np.ndarray | None]:
    """Fold y = linear(scale * x + shift) into the linear map: weight' = weight scale, bias' = bias + weight shift.

    Exact for a convolution wherever the whole kernel lies on the input: without padding, or where shift is 0. For a
    transposed convolution, whose kernels hang over, shift must be 0.

    Args:
        weight: of a linear map or convolution.
        bias: of shape (output channels,), or None for 0.
        scale, shift: of shape (input channels,).
        axis: of the input channels: 1 in PyTorch's Linear and Conv, 0 in its transposed convolutions, -2 in Keras.
        groups: of a convolution, whose axis 1 holds the input channels of one group.

    Returns:
        Weight and bias in float64; the bias is None where there was none and shift is 0.

    Raises:
        NormValueError: where `scale` has not one entry per input channel.
    """
    w = np.asarray(weight, dtype=np.float64)
    folded = w * _along(scale, "scale", "input", w, axis, groups)
    old = None if bias is None else np.asarray(bias, dtype=np.float64)
    if not np.any(shift):
        return folded, old
    outputs = {1: 0, 0: 1, -2: w.ndim - 1}[axis]
    shifted = w * _along(shift, "shift", "input", w, axis, groups)
    more = shifted.sum(axis=tuple(at for at in range(w.ndim) if at != outputs))
    return folded, more if old is None else old + more


def _along(values: np.ndarray, name: str, side: str, w: np.ndarray, axis: int, groups: int) -> np.ndarray:
    """One value per channel, in a shape that broadcasts against the weight.

    Axis 0 counts the channels of all groups; axis 1 those of one group, which the rows of each group share.
    """
    channels = w.shape[axis] * groups
    if values.shape != (channels,):
        must = f"`{name}` must have one entry for each of the {channels} {side} channels (axis {axis})"
        raise NormValueError(message(must, f"shape {values.shape}"))
    if groups > 1:
        rows = np.repeat(values.reshape(groups, -1), w.shape[0] // groups, axis=0)
        return rows.reshape(*w.shape[:2], *[1] * (w.ndim - 2))
    shape = [1] * w.ndim
    shape[axis] = -1
    return values.reshape(shape)


def entropy(scores: Any) -> float:
    """Return the mean entropy of predictions, -sum p log p: of probabilities, or of scores through the softmax.

    Rows that are all >= 0 and sum to 1 are taken for probabilities.

    >>> round(entropy([[0.5, 0.5], [1.0, 0.0]]), 4), round(entropy([[3.0, 3.0]]), 4)
    (0.3466, 0.6931)
    """
    p = np.asarray(scores, dtype=np.float64)
    if not ((p >= 0).all() and (np.abs(p.sum(axis=1) - 1) < 1e-3).all()):
        p = np.exp(p - p.max(axis=1, keepdims=True))
        p = p / p.sum(axis=1, keepdims=True)
    return float(-(p * np.log(np.maximum(p, np.finfo(np.float64).tiny))).sum(axis=1).mean())


def groups_for(channels: int, at_most: int = 32) -> int:
    """Return the largest number of groups, up to `at_most`, that divides `channels`.

    Group norm's usual 32 groups do not divide every width: 72 channels take 24. A prime width above `at_most` takes 1
    group, which is layer norm over all channels.

    >>> groups_for(72), groups_for(64), groups_for(37)
    (24, 32, 1)
    """
    check("groups_for", {"channels": Integer(1), "at_most": Integer(1)}, {"channels": channels, "at_most": at_most})
    return max(g for g in range(1, min(channels, at_most) + 1) if channels % g == 0)


def usual_groups(channels: int, *, spatial: bool) -> int:
    """Return the number of groups that group norm takes where nobody says: at most 32, none of them too small.

    A group of few values keeps next to nothing of them: mean and variance are gone, and on a table nothing else is
    there. So groups are of 4 maps at least, or of 16 features.

    >>> usual_groups(64, spatial=True), usual_groups(64, spatial=False)
    (16, 4)
    """
    return groups_for(channels, max(1, min(32, channels // (4 if spatial else 16))))


def largest_change(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> float:
    """Return the largest difference of an array, over its largest value. What is not finite must stay the same.

    >>> largest_change([np.array([1.0, -4.0])], [np.array([1.0, -4.1])])
    0.02499999999999991
    """
    return max((_change(a, b) for a, b in zip(before, after, strict=True)), default=0.0)


def _change(before: np.ndarray, after: np.ndarray) -> float:
    if before.shape != after.shape:
        return math.inf
    same = (before == after) | (np.isnan(before) & np.isnan(after))
    if same.all():
        return 0.0
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(before - after)).max()
    largest = np.where(np.isfinite(before), np.abs(before), 0.0).max()
    change = float(difference / largest) if largest else math.inf
    return math.inf if math.isnan(change) else change
