"""A spec compiled to integers: all that formulas, kernels and frameworks ever see of it.

A plan depends on the spec, the number of axes and the static sizes, never on the lengths of batch or space: those are
read from `x.shape` where the plan runs. So a layer builds its plans once, and a traced program stays valid for every
batch size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

from normkit.core.axes import Sizes, static, tokens
from normkit.core.spec import NormSpec
from normkit.errors import NormValueError, message

__all__ = [
    "NormPlan",
    "affine_shape",
    "check_lengths",
    "compile_plan",
    "count",
    "kept_shape",
    "parts",
    "plan",
    "product",
    "view_shape",
]

_WHOLE = (-1,)


class NormPlan(NamedTuple):
    """Integers that say how to take statistics of an input and where gamma and beta belong."""

    view: tuple[tuple[int, ...], ...]  # per axis of the input: the lengths it is split in; -1 is read from the input
    reduce: tuple[int, ...]  # axes of the view each statistic is taken over
    affine: tuple[int, ...]  # axes of the view that gamma, beta and the kept statistics have
    whole: tuple[int, ...]  # the same, as axes of the input
    fixed: tuple[tuple[int, int], ...]  # axes of the input whose length is static, with that length
    ragged: int  # axis of the input that may leave a short last group; -1: none


def compile_plan(spec: NormSpec, ndim: int, sizes: Sizes = ()) -> NormPlan:
    """Compile a spec for inputs with `ndim` axes. Raises NormValueError where they do not fit together."""
    view: list[tuple[int, ...]] = []
    reduce: list[int] = []
    affine: list[int] = []
    whole: list[int] = []
    fixed: list[tuple[int, int]] = []
    ragged, at = -1, 0
    seen: list[str] = []
    for axis, token in enumerate(tokens(spec, ndim, sizes)):
        size = static(sizes, token[0])
        if len(token) == 2:
            inner = static(sizes, token[1])
            if (size is None) == (inner is None):
                must = f"{spec.name}: one size of `({token[0]} {token[1]})` must be given"
                raise NormValueError(message(must, f"sizes {dict(sizes)}"))
            view.append((-1, inner) if size is None else (size, -1))  # type: ignore[arg-type]
            if inner is not None and token[1] in spec.over_names:
                ragged = axis
        else:
            length = size[seen.count(token[0])] if isinstance(size, tuple) else size
            view.append(_WHOLE if length is None else (length,))
            if length is not None:
                fixed.append((axis, length))
            seen.append(token[0])
        if token[0] in spec.affine_names:
            whole.append(axis)
        for name in token:
            if name in spec.over_names:
                reduce.append(at)
            if name in spec.affine_names:
                affine.append(at)
            at += 1
    return NormPlan(tuple(view), tuple(reduce), tuple(affine), tuple(whole), tuple(fixed), ragged)


plan = functools.lru_cache(maxsize=1024)(compile_plan)


def product(lengths: Iterable[int]) -> int:
    """Return the product; like `math.prod`, which the PyTorch compiler cannot trace over symbolic lengths."""
    total = 1
    for length in lengths:
        total = total * length
    return total


def _known(split: tuple[int, ...]) -> int:
    """Return the product of the static lengths an axis is split in."""
    return product([size for size in split if size != -1])


def view_shape(p: NormPlan, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the input once its split axes are split; an axis of length 1 (it broadcasts) stays so."""
    lengths: list[int] = []
    for split, length in zip(p.view, shape, strict=True):
        if len(split) == 1:
            lengths.append(length)
        elif length == 1:
            lengths.extend([1] * len(split))
        else:
            known = _known(split)
            lengths.extend([length // known if size == -1 else size for size in split])
    return tuple(lengths)


def affine_shape(p: NormPlan, view: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in which gamma and beta broadcast against the view."""
    return tuple(length if axis in p.affine else 1 for axis, length in enumerate(view))


def kept_shape(p: NormPlan, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in which gamma, beta and kept statistics broadcast against the input itself."""
    return tuple([length if axis in p.whole else 1 for axis, length in enumerate(shape)])


def count(p: NormPlan, view: tuple[int, ...]) -> int:
    """Return the number of values behind each statistic."""
    return product([view[axis] for axis in p.reduce])


Part = tuple[int, int, tuple[int, ...]]


def parts(p: NormPlan, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """Return (start, stop, view) for each part of the input along the ragged axis: full groups, then a short one.

    A remainder of a single value per statistic has no variance: it joins the group before it, which then stands alone.
    Without a ragged axis there is one part, with start 0 and stop the length of the first axis.
    """
    if p.ragged < 0:
        return ((0, shape[0], view_shape(p, shape)),)
    length, size = shape[p.ragged], p.view[p.ragged][1]
    where = [axis for axis, split in enumerate(p.view) for _ in split]  # axis of the input behind each axis of the view
    others = product([shape[where[axis]] for axis in p.reduce if where[axis] != p.ragged])
    full = length // size
    short = length - full * size
    if full and short * others == 1:
        full, short = full - 1, short + size
    found: list[Part] = []
    for start, groups, members in ((0, full, size), (full * size, 1, short)):
        if groups * members or (not length and members == size):
            lengths: list[tuple[int, ...]] = [(n,) for n in shape]
            lengths[p.ragged] = (groups, members)
            found.append((start, start + groups * members, tuple(n for axis in lengths for n in axis)))
    return tuple(found)


def check_lengths(spec: NormSpec, p: NormPlan, shape: tuple[int, ...]) -> None:
    """Raise NormValueError where a length of the input contradicts the plan."""
    for axis, length in p.fixed:
        if shape[axis] != length:
            must = f"{spec.name}: axis {axis} of the input must have length {length}"
            raise NormValueError(message(must, f"shape {tuple(shape)}"))
    for axis, split in enumerate(p.view):
        if len(split) == 2 and axis != p.ragged and shape[axis] % _known(split):
            must = f"{spec.name}: the length of axis {axis} must be divisible by {_known(split)}"
            raise NormValueError(message(must, f"shape {tuple(shape)}"))
