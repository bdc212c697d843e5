"""Which values of an input share a statistic, and how an input stands on paper: samples down, channels across."""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from normkit.core.axes import Sizes, tokens
from normkit.core.plan import NormPlan, parts, product
from normkit.core.spec import NormSpec

__all__ = ["Frame", "Labels", "letter", "places", "sharing"]

Array = np.ndarray[Any, Any]
Labels = tuple[Sequence[str], ...]  # of axes of the input, the first ones; an empty one is numbered


def letter(number: int) -> str:
    """Name of a statistic: A to Z, then AA, AB and so on.

    >>> letter(0), letter(25), letter(26)
    ('A', 'Z', 'AA')
    """
    letters = string.ascii_uppercase
    name = letters[number % len(letters)]
    return name if number < len(letters) else letter(number // len(letters) - 1) + name


def sharing(p: NormPlan, shape: tuple[int, ...]) -> Array:
    """Number the statistics of an input in the order of the formula: for each value that of the one it is part of."""
    found, first = [], 0
    for start, stop, view in parts(p, shape):
        lengths = tuple(1 if axis in p.reduce else length for axis, length in enumerate(view))
        numbers = np.arange(first, first + product(lengths)).reshape(lengths)
        first += product(lengths)
        part = shape if p.ragged < 0 else (*shape[: p.ragged], stop - start, *shape[p.ragged + 1 :])
        found.append(np.broadcast_to(numbers, view).reshape(part))
    return np.concatenate(found, axis=max(p.ragged, 0))


def places(p: NormPlan, shape: tuple[int, ...]) -> Array:
    """Number the values of gamma and beta: for each value of an input the one that it is multiplied by."""
    lengths = tuple(length if axis in p.whole else 1 for axis, length in enumerate(shape))
    return np.broadcast_to(np.arange(product(lengths)).reshape(lengths), shape)


@dataclass(frozen=True)
class Frame:
    """How an input stands on paper: its first axis down, its channels across, its positions within a channel.

    Layer and RMS norm have positions across and features within.

    Attributes:
        order: the axes of the input, those that go down first, then those across, then those within.
        lengths: how many go down, across and within.
        rows, blocks, cells: their names, as many as `lengths` says.
        tokens: what the spec calls each axis of the input.
        numbered: the places on each axis of the input, in words.
    """

    order: tuple[int, ...]
    lengths: tuple[int, int, int]
    rows: tuple[str, ...]
    blocks: tuple[str, ...]
    cells: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    numbered: tuple[tuple[str, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input."""
        return tuple(map(len, self.numbered))

    @classmethod
    def of(cls, spec: NormSpec, shape: tuple[int, ...], sizes: Sizes, labels: Labels = ()) -> Frame:
        """The frame of an input, with names for the places on its axes where there are any."""
        names = tokens(spec, len(shape), sizes)
        free = spec.axes[0] == ("*n",)
        features = [axis for axis, token in enumerate(names) if token == ("*c",)]
        # Of features on several axes the first one goes across, as channels do.
        last = set(features[len(features) > 1 :]) if free else set(range(2, len(shape)))
        down = {0} - set(features)
        across = set(range(len(shape))) - down - last
        groups = [sorted(group) for group in (down, across, last)]
        nouns = [_noun(token, axis, len(shape), free) for axis, token in enumerate(names)]
        given = (*labels, *((),) * len(shape))
        numbered = tuple(
            tuple(own) if own else tuple(f"{noun}{i + 1}" for i in range(length))
            for own, noun, length in zip(given, nouns, shape, strict=False)
        )
        lengths = [product([shape[axis] for axis in group]) for group in groups]
        rows, blocks, cells = (
            tuple(_joined(place) for place in itertools.product(*(numbered[axis] for axis in group)))
            for group in groups
        )
        order = tuple(axis for group in groups for axis in group)
        return cls(order, (lengths[0], lengths[1], lengths[2]), rows, blocks, cells, names, numbered)

    def cube(self, values: Array) -> Array:
        """Values of the shape of the input, as (down, across, within)."""
        return np.transpose(values, self.order).reshape(self.lengths)

    def where(self, spec: NormSpec, p: NormPlan, index: tuple[int, ...]) -> str:
        """The statistic that the value at an index of the input is part of, in words: `sample 1, group 2`."""
        found = []
        for axis, (token, place) in enumerate(zip(self.tokens, index, strict=True)):
            outer, inner = token[0], token[-1]
            if len(token) == 2 and inner in spec.over_names:
                groups, size = p.view[axis]  # one of them is read from the input
                size = len(self.numbered[axis]) // groups if size == -1 else size
                found.append(f"{'group of samples' if outer == 'm' else 'group'} {place // size + 1}")
            elif outer not in spec.over_names:
                name = self.numbered[axis][place]
                found.append(f"position {name}" if name.isdigit() else name)
        return ", ".join(found) or "all"


def _noun(token: tuple[str, ...], axis: int, ndim: int, free: bool) -> str:
    if token[-1] == "*s":
        return ""
    if token[-1] in ("c", "k"):
        return "channel " if ndim > 2 else "feature "
    if token[-1] == "*c":
        return "feature "
    return "sample " if axis == 0 or not free else "position "


def _joined(place: tuple[str, ...]) -> str:
    return ",".join(place)
