"""The plan, run by any array namespace: forward, evaluation, closed-form backward and the update of what is kept.

`xp` is a module with `reshape, sum, sqrt, where, clip, concatenate` in NumPy's spelling: numpy, torch,
jax.numpy and keras.ops all are. Inputs arrive in the type in which statistics accumulate (float32 or wider); callers
widen before and narrow after.

Numerics. The variance is the mean of squared deviations, never E[x^2] - E[x]^2. A mean rounded to the accumulator is
off by up to eps |mean|, which shows once |mean|/std nears 1/eps; so deviations are centred a second time, by their own
mean: one more pass, and the output stays right to a few eps. Inverse standard deviation and gamma multiply the
*deviation*: x * scale + shift would bring the rounding of a large mean back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from normkit.core.plan import NormPlan, affine_shape, count, kept_shape, parts, product, view_shape
from normkit.core.spec import NormSpec

__all__ = [
    "Correction",
    "Gradients",
    "Moments",
    "backward",
    "evaluate",
    "gained",
    "inverse_std",
    "merged",
    "normalize",
    "renorm",
    "scaled",
    "spread",
    "summed",
    "updated",
]


class Correction(NamedTuple):
    """Batch renormalization: normalized = deviation / std * r + d, with r and d constants of the backward pass."""

    r: Any
    d: Any


class Moments(NamedTuple):
    """Statistics of one part of the input, in the shape of its view with the reduced axes of length 1."""

    mean: Any  # None without centring
    var: Any  # biased; without centring the mean square
    total: Any  # sum of the weights behind each statistic; the number of values without weights
    effective: Any  # number of equally weighted values that would be as certain: sum(w)^2 / sum(w^2) (Kish)
    correction: Correction | None = None
    weighted: bool = False  # whether `total` and `effective` are arrays


class Gradients(NamedTuple):
    """Gradients of the input, gamma and beta; the last two in the shape of the parameters."""

    x: Any
    gamma: Any
    beta: Any


Correct = Callable[[Any, Any], Correction]  # (mean, std) of a batch -> its correction


def normalize(
    xp: Any,
    spec: NormSpec,
    p: NormPlan,
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    eps: float,
    weight: Any = None,
    correct: Correct | None = None,
) -> tuple[Any, list[Moments]]:
    """Normalize by the statistics of the input: y = (x - mean) / sqrt(var + eps) * gamma + beta.

    Args:
        x: the input, in the type in which statistics accumulate.
        gamma, beta: in the shape of the plan's affine axes; None leaves the step out.
        eps: added to the variance.
        weight: of each position in the statistics, >= 0, in the shape of x with a channel axis of length 1.
        correct: batch renormalization's correction, see :func:`renorm`.

    Returns:
        The output and the moments of each part (one, and a second where the last group of a ghost batch is short).
    """
    outputs, found = [], []
    for v, w in _split(xp, p, x, weight):
        shape = tuple(v.shape)
        average, total, effective = _averager(xp, p, shape, w)
        deviation, mean = _deviations(spec, v, average)
        var = average(deviation * deviation)
        std = xp.sqrt(var + eps)
        correction = None if correct is None else correct(mean, std)
        outputs.append(scaled(xp, spec, affine_shape(p, shape), deviation, 1.0 / std, gamma, beta, correction))
        found.append(Moments(mean, var, total, effective, correction, w is not None))
    return _join(xp, p, outputs, x.shape), found


def evaluate(
    xp: Any, spec: NormSpec, p: NormPlan, x: Any, kept: Mapping[str, Any], gamma: Any, beta: Any, *, eps: float
) -> Any:
    """Normalize by kept statistics. Every sample is treated alone, so ghost batches have no meaning here."""
    shape = kept_shape(p, tuple(x.shape))
    rstd = 1.0 / kept["std"] if "std" in kept else 1.0 / xp.sqrt(kept["var"] + eps)  # a kept std has eps inside
    return scaled(xp, spec, shape, x - xp.reshape(kept["mean"], shape), xp.reshape(rstd, shape), gamma, beta, None)


def spread(xp: Any, spec: NormSpec, p: NormPlan, x: Any, *, eps: float, weight: Any = None) -> tuple[Any, Moments]:
    """Return sqrt(var + eps), in the shape of the view with reduced axes of length 1, and the moments.

    For normalizers that divide something else than the deviation by it. Not for ghost batches.
    """
    ((v, w),) = _split(xp, p, x, weight)
    average, total, effective = _averager(xp, p, tuple(v.shape), w)
    deviation, mean = _deviations(spec, v, average)
    var = average(deviation * deviation)
    return xp.sqrt(var + eps), Moments(mean, var, total, effective, None, w is not None)


def inverse_std(xp: Any, spec: NormSpec, p: NormPlan, x: Any, *, eps: float) -> Any:
    """Return 1 / sqrt(var + eps) of an input without split axes, in the shape of the input with axes of length 1."""
    return 1.0 / spread(xp, spec, p, x, eps=eps)[0]


def gained(xp: Any, spec: NormSpec, p: NormPlan, normalized: Any, gamma: Any) -> Any:
    """Multiply by gamma, or by 1 + gamma; None leaves the input as it is."""
    if gamma is None:
        return normalized
    return normalized * _gain(xp, spec, gamma, kept_shape(p, tuple(normalized.shape)))


def renorm(xp: Any, kept: Mapping[str, Any], r_max: Any, d_max: Any, stop: Callable[[Any], Any]) -> Correct:
    """Return the correction of batch renormalization (arXiv:1702.03275, algorithm 1).

    r = clip(std_batch / std_kept, 1 / r_max, r_max) and d = clip((mean_batch - mean_kept) / std_kept, -d_max, d_max),
    both from the kept values *before* this batch updates them, and both constants of the backward pass (`stop`).
    """

    def correct(mean: Any, std: Any) -> Correction:
        shape = tuple(std.shape)
        kept_mean, kept_std = xp.reshape(kept["mean"], shape), xp.reshape(kept["std"], shape)
        r = xp.clip(std / kept_std, 1.0 / r_max, r_max)
        d = xp.clip((mean - kept_mean) / kept_std, -d_max, d_max)
        return Correction(stop(r), stop(d))

    return correct


def backward(
    xp: Any,
    spec: NormSpec,
    p: NormPlan,
    dy: Any,
    x: Any,
    gamma: Any,
    beta: Any,
    moments: Sequence[Moments],
    *,
    eps: float,
    weight: Any = None,
) -> Gradients:
    """Return the gradients of :func:`normalize`, from its input and moments alone.

    With gh = dy * gamma, normalized h, and w the share of a position in its statistic (1/n without weights):
    dx = (gh - w * sum(gh) - w * h * sum(gh * h)) / std, without the first sum where nothing is centred. A correction
    multiplies gh by r; dgamma = sum(dy * (h * r + d)), dbeta = sum(dy). beta is needed for its shape only.
    """
    dxs, dgamma, dbeta = [], None, None
    for (v, w), (g, _), m in zip(_split(xp, p, x, weight), _split(xp, p, dy, None), moments, strict=True):
        shape = tuple(v.shape)
        average, total, _ = _averager(xp, p, shape, w)
        rstd = 1.0 / xp.sqrt(m.var + eps)
        # The saved mean is rounded; centring again by the same rule makes this h the one of the forward pass.
        normalized = _recentred(spec, v, m.mean, average) * rstd
        gain = 1.0 if gamma is None else _gain(xp, spec, gamma, affine_shape(p, shape))
        gh = g * gain if m.correction is None else g * gain * m.correction.r
        share = 1.0 / max(total, 1) if w is None else w / xp.where(total > 0, total, total + 1.0)
        along = summed(xp, p, gh * normalized)
        dx = gh - share * normalized * along
        if spec.center:
            dx = dx - share * summed(xp, p, gh)
        dxs.append(dx * rstd)
        if gamma is not None:
            seen = normalized if m.correction is None else normalized * m.correction.r + m.correction.d
            dgamma = _added(dgamma, _to_affine(xp, p, g * seen, gamma.shape))
        if beta is not None:
            dbeta = _added(dbeta, _to_affine(xp, p, g, beta.shape))
    return Gradients(_join(xp, p, dxs, x.shape), dgamma, dbeta)


def merged(xp: Any, spec: NormSpec, p: NormPlan, moments: Sequence[Moments], *, eps: float) -> tuple[dict, Any]:
    """Return (the value each kept statistic sees of this batch, whether there is any).

    Groups and parts (ghost batches, instances) enter as one value: means and standard deviations weighted by the values
    behind them, variances pooled, sum(n var) / sum(n - 1) with Bessel's factor, so a group of one value, which knows
    nothing of the variance, weighs nothing. Spread between groups is left out: training normalizes without it too.
    """
    return (_merged_weighted if moments[0].weighted else _merged_counted)(xp, spec, p, moments, eps)


def _seen(xp: Any, name: str, m: Moments, eps: float) -> Any:
    return m.mean if name == "mean" else m.var if name == "var" else xp.sqrt(m.var + eps)


def _merged_counted(
    xp: Any, spec: NormSpec, p: NormPlan, moments: Sequence[Moments], eps: float
) -> tuple[dict[str, Any], Any]:
    """Merge without weights, where all counts are plain numbers."""
    values: dict[str, Any] = {}
    for t in spec.tracked:
        groups = [product([n for axis, n in enumerate(m.var.shape) if axis not in p.affine]) for m in moments]
        weight = sum(g * (m.total - 1 if t.bessel else m.total) for g, m in zip(groups, moments, strict=True))
        if weight <= 0:
            return {}, False
        for g, m in zip(groups, moments, strict=True):
            value = _seen(xp, t.name, m, eps)
            flat = tuple(value.shape[axis] for axis in p.affine)
            value = xp.reshape(value, flat) if g == 1 else _over_groups(xp, p, value)
            part = value if m.total == weight else value * (m.total / weight)
            values[t.name] = _added(values.get(t.name), part)
    return values, True


def _merged_weighted(
    xp: Any, spec: NormSpec, p: NormPlan, moments: Sequence[Moments], eps: float
) -> tuple[dict[str, Any], Any]:
    """Merge with weights, where totals are arrays and some may be 0."""
    values: dict[str, Any] = {}
    known: Any = None
    for t in spec.tracked:
        total: Any = None
        weight: Any = None
        for m in moments:
            value = _seen(xp, t.name, m, eps)
            # As without weights, too few values are none. A single one may come out of the division as 1.0000001.
            enough = xp.where(m.effective > spec.minimum - 1 + 1e-6, m.total, m.total * 0.0)
            fewer = 1.0
            if t.bessel:
                fewer = xp.clip(m.effective, 1.0, None)
                fewer = xp.where(fewer > 1 + 1e-6, 1.0 - 1.0 / fewer, fewer * 0.0)
            total = _added(total, _over_groups(xp, p, value * enough))
            # times 0: the weight in the shape of the statistic, to be summed with it
            weight = _added(weight, _over_groups(xp, p, value * 0.0 + enough * fewer))
        known = weight > 0
        values[t.name] = total / xp.where(known, weight, weight + 1.0)
    return values, known


def updated(
    xp: Any, spec: NormSpec, kept: Mapping[str, Any], batch: Mapping[str, Any], known: Any, rate: Any
) -> dict[str, Any]:
    """Return the kept statistics after this batch, unchanged where `known` is False. `rate` weighs the new batch."""
    if known is False:
        return dict(kept)
    new: dict[str, Any] = {t.name: t.updated(kept[t.name], batch[t.name], rate) for t in spec.tracked}
    return new if known is True else {name: xp.where(known, value, kept[name]) for name, value in new.items()}


def _split(xp: Any, p: NormPlan, x: Any, weight: Any) -> list[tuple[Any, Any]]:
    """Return the parts of the input in the shape of their views, each with its weights."""

    def views(array: Any) -> list[Any]:
        if p.ragged < 0:
            return [xp.reshape(array, view_shape(p, tuple(array.shape)))]
        before, found = (slice(None),) * p.ragged, []
        for start, stop, (*_, groups, members) in spans:
            part = array[(*before, slice(start, stop))] if len(spans) > 1 else array
            rest = tuple(array.shape)
            shape = (*rest[: p.ragged], groups, members, *rest[p.ragged + 1 :])
            found.append(xp.reshape(part, shape))
        return found

    spans = [(a, b, view[: p.ragged + 2]) for a, b, view in parts(p, tuple(x.shape))] if p.ragged >= 0 else []
    return list(zip(views(x), [None, None] if weight is None else views(weight), strict=False))


def _join(xp: Any, p: NormPlan, views: list[Any], shape: Sequence[int]) -> Any:
    if len(views) == 1:
        return xp.reshape(views[0], tuple(shape))
    before, after = tuple(shape[: p.ragged]), tuple(shape[p.ragged + 1 :])
    lengths = [view.shape[p.ragged] * view.shape[p.ragged + 1] for view in views]
    flat = [xp.reshape(view, (*before, n, *after)) for view, n in zip(views, lengths, strict=True)]
    return xp.concatenate(flat, axis=p.ragged)


def _averager(xp: Any, p: NormPlan, shape: tuple[int, ...], weight: Any) -> tuple[Callable[[Any], Any], Any, Any]:
    """Return (average over the reduced axes, total weight, effective number of values)."""
    if weight is None:
        n = count(p, shape)
        divisor = 1 if n == 0 else n  # the average of nothing is 0: NaN would reach the gradient of gamma
        # Not `mean`, which Keras computes in float32 even for float64.
        return (lambda a: summed(xp, p, a) / divisor), n, n
    # Values of one position share its weight: the channels of a group, for example.
    repeats = product([shape[axis] for axis in p.reduce if weight.shape[axis] == 1])
    total = summed(xp, p, weight) * repeats
    squares = summed(xp, p, weight * weight) * repeats
    share = weight / xp.where(total > 0, total, total + 1.0)
    effective = total * total / xp.where(total > 0, squares, squares + 1.0)
    return (lambda a: summed(xp, p, a * share)), total, effective


def summed(xp: Any, p: NormPlan, a: Any) -> Any:
    """Sum over the reduced axes, which stay with length 1. Of none nothing is summed, where PyTorch would sum all."""
    return xp.sum(a, axis=p.reduce, keepdims=True) if p.reduce else a


def _deviations(spec: NormSpec, v: Any, average: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Return (deviation from the mean, mean), centred twice: see the top of this file."""
    if not spec.center:
        return v, None
    mean = average(v)
    deviation = v - mean
    rest = average(deviation)
    return deviation - rest, mean + rest


def _recentred(spec: NormSpec, v: Any, mean: Any, average: Callable[[Any], Any]) -> Any:
    if not spec.center:
        return v
    deviation = v - mean
    return deviation - average(deviation)


def _gain(xp: Any, spec: NormSpec, gamma: Any, shape: tuple[int, ...]) -> Any:
    gain = xp.reshape(gamma, shape)
    return gain + 1.0 if spec.gain == "1+w" else gain


def scaled(
    xp: Any,
    spec: NormSpec,
    shape: tuple[int, ...],
    deviation: Any,
    rstd: Any,
    gamma: Any,
    beta: Any,
    correction: Correction | None,
) -> Any:
    """Return deviation * rstd * gamma + beta, with gamma and beta placed in `shape`; a correction acts before gamma."""
    if correction is not None:
        y = deviation * (rstd * correction.r) + correction.d
        y = y if gamma is None else y * _gain(xp, spec, gamma, shape)
    elif gamma is None:
        y = deviation * rstd
    else:
        y = deviation * (rstd * _gain(xp, spec, gamma, shape))
    return y if beta is None else y + xp.reshape(beta, shape)


def _to_affine(xp: Any, p: NormPlan, full: Any, shape: Sequence[int]) -> Any:
    """Sum a view-shaped array over all axes but those of gamma, in the shape of gamma."""
    others = tuple(axis for axis in range(len(full.shape)) if axis not in p.affine)
    return xp.reshape(xp.sum(full, axis=others) if others else full, tuple(shape))


def _over_groups(xp: Any, p: NormPlan, statistic: Any) -> Any:
    """Sum a statistic over its groups (axes neither reduced nor gamma's) and drop all axes but gamma's."""
    others = tuple(axis for axis, n in enumerate(statistic.shape) if axis not in p.affine)
    return xp.sum(statistic, axis=others)


def _added(total: Any, more: Any) -> Any:
    return more if total is None else total + more
