"""The compiled kernels: which inputs they cover, as the few integers that a kernel is told of a shape.

Two geometries carry every normalizer: statistics over rows, made of runs of values that lie side by side, and over
columns of a matrix (`csrc/kernels.hpp`).
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any, Literal, NamedTuple

from normkit.core.plan import NormPlan, count, parts, product
from normkit.errors import NormValueError, message
from normkit.kernels import instruction_sets

__all__ = [
    "ACTIVATIONS",
    "PER_VALUE",
    "TYPES",
    "Geometry",
    "Layout",
    "available",
    "evaluation",
    "geometry",
    "instruction_set",
    "missing",
]

Layout = Literal["contiguous", "channels_last"]

# As numbered in csrc/kernels.hpp.
ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2, "leaky_relu": 3, "silu": 4, "gelu": 5, "gelu_tanh": 6, "hardswish": 7}
TYPES = {"float32": 0, "bfloat16": 1}
_PER_ROW, _PER_RUN, PER_VALUE = 0, 1, 2


class Geometry(NamedTuple):
    """How a kernel walks an input.

    Attributes:
        numbers: eight for rows (rows, inner, outer stride, inner stride, runs, run stride, span, place of gamma), four
            for columns (blocks, length, channels, group).
        statistics: how many there are.
        kept: their shape, that of the view of the plan with 1 for axes that are reduced.
        values: behind each.
    """

    numbers: tuple[int, ...]
    statistics: int
    kept: tuple[int, ...]
    values: int


def available() -> Any:
    """The compiled module, None where the package was installed without a C++ compiler."""
    try:
        from normkit.kernels import _native  # type: ignore[attr-defined, unused-ignore]
    except ImportError:
        return None
    return _native


def instruction_set() -> int:
    """The place in `instruction_sets()` of the one to use: the widest, or what `NORMKIT_INSTRUCTION_SET` names.

    Wide vectors lower the clock of some processors, and a result is to be repeated on another machine: results differ
    in the last bits from set to set. Raises NormValueError for one that is not there.
    """
    name, known = os.environ.get("NORMKIT_INSTRUCTION_SET"), instruction_sets()
    if not name or not known:
        return 0
    if name not in known:
        must = f"NORMKIT_INSTRUCTION_SET must be one of this machine's: {', '.join(known)}"
        raise NormValueError(message(must, repr(name)))
    return known.index(name)


@functools.cache
def missing() -> str:
    """Why nothing is compiled, and say so once: everything works, several times slower than it could."""
    warnings.warn(
        "normkit runs without its compiled kernels: it was installed where no C++ compiler worked. Results are the "
        "same, speed is not. hint: install a compiler, then pip install --force-reinstall --no-deps normkit",
        stacklevel=2,
    )
    return "the package was installed without a C++ compiler"


@functools.lru_cache(maxsize=1024)
def geometry(name: str, p: NormPlan, shape: tuple[int, ...], layout: Layout) -> Geometry | str:
    """The geometry of statistics of the input, or why no kernel covers it.

    Args:
        name: of the spec.
        p: its plan.
        shape: of the input, (N, C, *S) or (*, D).
        layout: `contiguous`, or `channels_last` with more than two axes.
    """
    views = parts(p, shape)
    if len(views) > 1:
        return "a short last group"
    if not product(shape):
        return "an empty input"
    view = views[0][2]
    kept = tuple(1 if axis in p.reduce else length for axis, length in enumerate(view))
    last = layout == "channels_last"
    if name in ("layer_norm", "rms_norm"):
        if last:
            return "its last axes are not next to each other"
        numbers = _of_rows(shape, product(shape[p.reduce[0] :]))
    elif name in ("layer_norm_2d", "rms_norm_2d"):
        if not last:
            return "its channels are not next to each other"
        numbers = _of_rows(shape, shape[1])
    elif name in ("batch_norm", "ghost_batch_norm", "instance_norm", "group_norm"):
        numbers = _over_channels(name, p, shape, last or len(shape) == 2)
    else:
        return "no kernel for this normalizer"
    return Geometry(numbers, product(kept), kept, count(p, view))


def evaluation(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The numbers for normalizing (N, C, *S) by given statistics of C channels."""
    n, c, s = shape[0], shape[1], product(shape[2:])
    if layout == "channels_last" or s == 1:
        return (1, n * s, c, 1)
    return (n * c, c, c * s, s, 1, 0, s, _PER_ROW)


def _of_rows(shape: tuple[int, ...], length: int) -> tuple[int, ...]:
    return (product(shape) // length, 1, length, 0, 1, 0, length, PER_VALUE)


def _over_channels(name: str, p: NormPlan, shape: tuple[int, ...], columns: bool) -> tuple[int, ...]:
    n, c, s = shape[0], shape[1], product(shape[2:])
    if name == "group_norm":
        groups = p.view[1][0]
        size = c // groups
        return (n, s, c, size) if columns else (n * groups, groups, c * s, size * s, size, s, s, _PER_RUN)
    if name == "instance_norm":
        return (n, s, c, 1) if columns else (n * c, c, c * s, s, 1, 0, s, _PER_ROW)
    members = min(p.view[0][1], n) if name == "ghost_batch_norm" else n
    groups = n // members
    if columns:
        return (groups, members * s, c, 1)
    return (groups * c, c, members * c * s, s, members, c * s, s, _PER_ROW)
