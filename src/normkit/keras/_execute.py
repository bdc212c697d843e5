"""Runs a normalizer on tensors of Keras: axes to specs, masks to weights, and where statistics are kept."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from keras import ops

from normkit.core import formula
from normkit.core.axes import Sizes
from normkit.core.formula import Correct, Correction, Moments
from normkit.core.plan import NormPlan, plan, view_shape
from normkit.core.spec import NormSpec
from normkit.errors import NormValueError, message
from normkit.keras._arrays import ARRAYS, Arrays

__all__ = [
    "by_channel",
    "by_rows",
    "countable",
    "evaluate",
    "hidden",
    "keep",
    "normalize",
    "observed",
    "rate_at",
    "renorm",
    "weighted",
]


@functools.lru_cache(maxsize=1024)
def by_channel(spec: NormSpec, ndim: int, axis: int, bessel: bool = False) -> NormSpec:
    """Return a spec `n c *s` of the catalog for inputs with the channels on another axis.

    Keras keeps the biased variance, and normalizes a single value to beta where PyTorch refuses it.
    """
    batch, channel = (f"({t[0]} {t[1]})" if len(t) == 2 else t[0] for t in spec.axes[:2])
    space = [f"s{i}" for i in range(ndim) if i not in (0, axis)]
    axes = [channel if i == axis else batch if i == 0 else f"s{i}" for i in range(ndim)]
    over = [n for name in spec.over_names for n in (space if name == "*s" else [name])]
    if axis == 0:
        over = [name for name in over if name != spec.axes[0][-1]]
    tracked = tuple(replace(t, bessel=bessel and t.bessel) for t in spec.tracked)
    return replace(spec, x=" ".join(axes), over=" ".join(over), minimum=1, tracked=tracked)


@functools.lru_cache(maxsize=1024)
def by_rows(spec: NormSpec, ndim: int, axes: tuple[int, ...]) -> NormSpec:
    """Return a spec `*n *c` of the catalog for inputs that are normalized over any axes."""
    names = [f"c{i}" if i in axes else f"n{i}" for i in range(ndim)]
    over = " ".join(f"c{i}" for i in axes)
    return replace(spec, x=" ".join(names), over=over, affine=over)


def normalize(
    spec: NormSpec,
    x: Any,
    gamma: Any,
    beta: Any,
    *,
    eps: float,
    sizes: Sizes = (),
    weight: Any = None,
    correct: Correct | None = None,
    xp: Arrays = ARRAYS,
) -> tuple[Any, NormSpec, NormPlan, list[Moments]]:
    """Normalize by the statistics of the input, which must be float32 or wider.

    Returns the output, the moments, and the spec and plan they belong to.
    """
    if len(spec.axes[0]) == 2 and x.shape[0] is None:
        return _in_groups(spec, x, gamma, beta, eps, dict(sizes)["n"], weight, correct)
    p = plan(spec, len(x.shape), sizes)
    weight = countable(p, x, weight)
    if weight is None and xp.reduce is not None:
        weight = positions(x, p.whole[0])  # replicas may have unequal batches
    y, moments = formula.normalize(xp, spec, p, x, gamma, beta, eps=eps, weight=weight, correct=correct)
    return y, spec, p, moments


def countable(p: NormPlan, x: Any, weight: Any) -> Any:
    """Return the weights, those of all positions where a graph does not know how many there are.

    The formula then counts by weights, which works for any length.
    """
    lengths = view_shape(p, tuple(x.shape)) if p.ragged < 0 else ()
    unknown = any(lengths and lengths[axis] is None for axis in p.reduce)
    return positions(x, p.whole[0]) if weight is None and unknown else weight


def _in_groups(
    spec: NormSpec, x: Any, gamma: Any, beta: Any, eps: float, size: Any, weight: Any, correct: Correct | None
) -> tuple[Any, NormSpec, NormPlan, list[Moments]]:
    """Normalize ghost batches of a batch of unknown length.

    The samples are dealt into rows of one group each, and what is left of the last row weighs 0. Where a sample may be
    a single value, rows have a place more: left over alone it has no variance and joins the group before it.
    """
    channel = plan(spec, len(x.shape), (("n", size),)).whole[0]
    space = [axis for axis in range(1, len(x.shape)) if axis != channel]
    single = all(x.shape[axis] in (None, 1) for axis in space)
    columns = size + 1 if single else size
    n, *lengths = ops.shape(x)
    groups = (n + size - 1) // size
    if single:
        alone = ops.logical_and(n % size == 1, n > size)
        for axis in space:
            alone = ops.logical_and(alone, ops.shape(x)[axis] == 1)
        groups = groups - ops.cast(alone, groups.dtype)
    row, column = ops.arange(groups)[:, None], ops.arange(columns)[None]
    index = row * size + column
    mine = ops.logical_and(index < n, ops.logical_or(column < size, row == groups - 1))
    index = ops.minimum(index, n - 1)
    weight = ops.take(positions(x, channel) if weight is None else weight, index, axis=0)
    weight = weight * ops.reshape(ops.cast(mine, weight.dtype), (-1, columns, *(1 for _ in lengths)))
    grouped = replace(spec, x=spec.x.replace("(m n)", "m n"))
    rows = ops.take(x, index, axis=0)
    y, _, p, moments = normalize(grouped, rows, gamma, beta, eps=eps, weight=weight, correct=correct)
    at = ops.arange(n)
    row = ops.minimum(at // size, groups - 1)
    y = ops.take(ops.reshape(y, (-1, *lengths)), row * columns + at - row * size, axis=0)
    return y, grouped, p, moments


def evaluate(spec: NormSpec, x: Any, kept: Mapping[str, Any], gamma: Any, beta: Any, *, eps: float) -> Any:
    """Normalize by kept statistics. `x` and the statistics must be float32 or wider."""
    sizes = (("n", 2),) if len(spec.axes[0]) == 2 else ()  # of ghost batches; every sample is treated alone here
    return formula.evaluate(ARRAYS, spec, plan(spec, len(x.shape), sizes), x, kept, gamma, beta, eps=eps)


def renorm(kept: Mapping[str, Any], r_min: Any, r_max: Any, d_max: Any) -> Correct:
    """Return batch renormalization's correction with Keras' clips: r has a lower one of its own, None does not clip."""
    free = formula.renorm(ARRAYS, kept, math.inf, math.inf, ops.stop_gradient)

    def correct(mean: Any, std: Any) -> Correction:
        r, d = free(mean, std)
        r = ARRAYS.clip(r, 0.0 if r_min is None else r_min, r_max)
        return Correction(r, d if d_max is None else ARRAYS.clip(d, -d_max, d_max))

    return correct


def keep(
    spec: NormSpec,
    p: NormPlan,
    moments: Sequence[Moments],
    groups: Sequence[tuple[Mapping[str, Any], Any]],
    count: Any,
    *,
    eps: float,
    nonfinite: str,
) -> None:
    """Let the statistics of this batch enter each of the `groups` of variables (by name, with the batch's weight).

    One is added to `count`, if there is one. An empty batch changes nothing, nor does one that is not finite unless
    `nonfinite` is "update".
    """
    batch, known = observed(spec, p, moments, eps=eps, nonfinite=nonfinite)
    if known is False:
        return
    for kept, rate in groups:
        before = {name: ops.cast(variable, batch[name].dtype) for name, variable in kept.items()}
        after = formula.updated(ARRAYS, spec, before, batch, known, rate)
        for name, variable in kept.items():
            variable.assign(ops.cast(after[name], variable.dtype))
    if count is not None:
        counted = 1 if known is True else ops.cast(ops.any(known), count.dtype)
        count.assign(count + counted)


def observed(
    spec: NormSpec, p: NormPlan, moments: Sequence[Moments], *, eps: float, nonfinite: str
) -> tuple[dict[str, Any], Any]:
    """Return (what each kept statistic sees of this batch, whether it may enter)."""
    batch, known = formula.merged(ARRAYS, spec, p, moments, eps=eps)
    if known is False:
        return batch, False
    finite = functools.reduce(ops.logical_and, [ops.all(ops.isfinite(value)) for value in batch.values()])
    if nonfinite == "skip":
        known = finite if known is True else ops.logical_and(known, finite)
    elif known is not True:  # NaN in a weighted sum makes its weight NaN, which looks like none
        known = ops.logical_or(known, ops.logical_not(finite))
    return batch, known


def rate_at(momentum: float | None, debiased: bool, count: Any, dtype: str) -> Any:
    """Return the weight of the next batch in what is kept, after `count` batches.

    1 - momentum as it is; 1/(count + 1) averages all batches equally; a debiased average has
    (1 - momentum) / (1 - momentum^(count + 1)). That is the moving average with its first value's share,
    momentum^(count + 1), taken out after every step; taken out at the end it would be a small difference of large
    numbers.
    """
    if momentum is not None and not debiased:
        return 1.0 - momentum
    number = ops.cast(count, dtype) + 1.0
    if momentum is None:
        return 1.0 / number
    if momentum == 0.0:
        return 1.0
    rate = (1.0 - momentum) / -ops.expm1(number * math.log(momentum))
    return ops.where(number > 1.0, rate, ops.ones_like(rate))  # the first is 1, whatever the rounding


def positions(x: Any, axis: int) -> Any:
    """Return a one for every position of the input: its shape with a channel axis of length 1."""
    return ops.ones_like(x[(slice(None),) * axis + (slice(0, 1),)])


def weighted(x: Any, mask: Any, sample_weight: Any, axis: int, reduce: Any = None) -> tuple[Any, Any, Any]:
    """Return (x with masked positions 0, mask, weights), the latter two with a channel axis of length 1, or None."""
    if mask is None and sample_weight is None:
        return x, None, None
    real = weight = None
    if sample_weight is not None:
        weight = ops.cast(_placed("sample_weight", sample_weight, x, axis), x.dtype)
        weight = ops.stop_gradient(weight * positions(x, axis))
        # Only proportions count; near 1 their squares neither vanish nor overflow.
        top = ops.max(weight, initial=0.0)
        top = top if reduce is None else reduce(top)
        weight = weight / ops.where(top > 0, top, 1.0)
    if mask is not None:
        real = ops.cast(_placed("mask", mask, x, axis), "bool")
        share = positions(x, axis) if weight is None else weight
        weight = ops.where(real, share, ops.zeros_like(share))
        x = hidden(x, real)
    return x, real, weight


def hidden(x: Any, real: Any) -> Any:
    """Return 0 where the mask is False. Replaced, not multiplied: what stands in the padding may be NaN."""
    return x if real is None else ops.where(real, x, ops.zeros_like(x))


def _placed(name: str, t: Any, x: Any, axis: int) -> Any:
    """Return `t` with a channel axis of length 1. Fewer axes than positions have are the first ones, as in Keras."""
    t = ops.convert_to_tensor(t)
    target = [n for i, n in enumerate(x.shape) if i != axis]
    given = [*t.shape, *(1 for _ in range(len(target) - len(t.shape)))]
    fits = len(given) == len(target) and len(t.shape) > 0
    if not fits or any(g not in (1, None, n) and n is not None for g, n in zip(given, target, strict=True)):
        must = f"`{name}` must have the shape {tuple(target)}, the input's {tuple(x.shape)} without its channel axis"
        hint = "axes of length 1 are repeated and missing ones stand at the end: (batch, time) is enough"
        raise NormValueError(message(must, f"shape {tuple(t.shape)}", hint))
    lengths = list(ops.shape(t)) + [1] * (len(target) - len(t.shape))
    return ops.reshape(t, (*lengths[:axis], 1, *lengths[axis:]))
