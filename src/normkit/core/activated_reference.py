"""The oracle of the formulas in :mod:`normkit.core.activated`: their papers' texts on plain numbers, in float64.

As in :mod:`normkit.core.reference` no plan and no array operation is used, and sums are exact. Gradients are not
derived at all: every number remembers what it was made of, and slopes are handed back along that record, one by one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from normkit.core.axes import Sizes
from normkit.core.catalog import INSTANCE
from normkit.core.reference import Reference, _kept_after, _Slice, _slices
from normkit.core.spec import NormSpec
from normkit.errors import NormValueError, message

__all__ = ["activated_reference"]

Array = np.ndarray
Place = tuple[int, ...]


class _Number:
    """A number that knows from which others it came, and how fast it changes with each of them."""

    _births = itertools.count()
    __slots__ = ("birth", "parents", "slope", "value")

    def __init__(self, value: float, parents: Sequence[tuple[_Number, float]] = ()) -> None:
        self.value, self.parents, self.slope, self.birth = float(value), parents, 0.0, next(self._births)

    def __add__(self, other: _Number | float) -> _Number:
        b = _number(other)
        return _Number(self.value + b.value, ((self, 1.0), (b, 1.0)))

    def __sub__(self, other: _Number | float) -> _Number:
        b = _number(other)
        return _Number(self.value - b.value, ((self, 1.0), (b, -1.0)))

    def __mul__(self, other: _Number | float) -> _Number:
        b = _number(other)
        return _Number(self.value * b.value, ((self, b.value), (b, self.value)))

    def __truediv__(self, other: _Number | float) -> _Number:
        b = _number(other)
        quotient = self.value / b.value
        return _Number(quotient, ((self, 1.0 / b.value), (b, -quotient / b.value)))


def _number(value: _Number | float) -> _Number:
    return value if isinstance(value, _Number) else _Number(value)


def _root(a: _Number) -> _Number:
    """The square root; at 0 with the slope 0, as a norm has it."""
    root = math.sqrt(a.value)
    return _Number(root, ((a, 0.5 / root if root else 0.0),))


def _tanh(a: _Number) -> _Number:
    return _Number(math.tanh(a.value), ((a, 1.0 - math.tanh(a.value) ** 2),))


def _logistic(a: _Number) -> _Number:
    small = math.exp(-abs(a.value))
    value = (1.0 if a.value >= 0 else small) / (1.0 + small)
    return _Number(value, ((a, small / (1.0 + small) ** 2),))


def _larger(a: _Number, b: _Number) -> _Number:
    """The larger; the first of two that are equal."""
    return _Number(max(a.value, b.value), ((a, 1.0) if a.value >= b.value else (b, 1.0),))


def _sum(numbers: Iterable[_Number]) -> _Number:
    terms = list(numbers)
    return _Number(math.fsum(n.value for n in terms), [(n, 1.0) for n in terms])


def _hand_back(ends: Sequence[_Number]) -> None:
    """Give every number the slope of sum(slope * value) over `ends`, whose own slopes are set."""
    reached: dict[int, _Number] = {}
    open_ = list(ends)
    while open_:
        n = open_.pop()
        if n.birth not in reached:
            reached[n.birth] = n
            open_.extend(parent for parent, _ in n.parents)
    for birth in sorted(reached, reverse=True):  # whatever came of a number was born later
        n = reached[birth]
        for parent, rate in n.parents:
            parent.slope += n.slope * rate


class _Given:
    """One call: the input, the parameters by their places, and the cells of equal statistics."""

    def __init__(
        self, spec: NormSpec, x: Array, sizes: Sizes, eps: float, mask: Array | None, weight: Array | None
    ) -> None:
        self.spec, self.eps, self.shape, self.sizes = spec, eps, x.shape, sizes
        real = np.ones(x.size, dtype=bool) if mask is None else np.broadcast_to(mask, x.shape).ravel()
        shares = np.ones(x.size) if weight is None else np.broadcast_to(weight, x.shape).ravel().astype(np.float64)
        self.x = [_Number(value) for value in np.asarray(x, dtype=np.float64).ravel()]
        self._mark = real, shares
        self.cells, self.affine = _slices(spec, x.shape, sizes, real, shares)
        self.named: dict[str, dict[Place, _Number]] = {}
        self.moments: dict[tuple, tuple[float, float]] = {}

    def cells_of(self, spec: NormSpec) -> dict[tuple, _Slice]:
        return _slices(spec, self.shape, (), *self._mark)[0]

    def average(self, cell: _Slice, values: Sequence[_Number]) -> _Number:
        total = math.fsum(cell.weight)
        return _sum(v * (w / total) for v, w in zip(values, cell.weight, strict=True)) if total else _Number(0.0)

    def variance(self, key: tuple, cell: _Slice) -> _Number:
        """The mean of squared deviations, or of squares where nothing is centred."""
        values = [self.x[i] for i in cell.flat]
        mean = self.average(cell, values) if self.spec.center else _Number(0.0)
        var = self.average(cell, [(v - mean) * (v - mean) for v in values])
        self.moments[key] = mean.value, var.value
        return var

    def at(self, name: str, place: Place) -> _Number:
        return self.named[name][place]


Output = dict[int, _Number]


def _filter_response(given: _Given, _: Mapping[Place, float] | None) -> Output:
    """y = max(gamma x / sqrt(nu^2 + eps) + beta, tau), nu^2 the mean of x^2 over the positions (arXiv:1911.09737)."""
    y: Output = {}
    for key, cell in given.cells.items():
        root = _root(given.variance(key, cell) + given.eps)
        for i, c in zip(cell.flat, cell.at, strict=True):
            y[i] = _larger(given.x[i] / root * given.at("gamma", c) + given.at("beta", c), given.at("tau", c))
    return y


def _evonorm_b0(given: _Given, kept: Mapping[Place, float] | None) -> Output:
    """y = x / max(sqrt(s_batch^2 + eps), v x + sqrt(s_instance^2 + eps)) gamma + beta (arXiv:2004.02967, table 1)."""
    batch = {cell.at[0]: given.variance(("batch", *key), cell) for key, cell in given.cells.items()}
    if kept is not None:
        batch = {place: _Number(kept[place]) for place in batch}
    y: Output = {}
    for key, cell in given.cells_of(INSTANCE).items():
        alone = _root(given.variance(("instance", *key), cell) + given.eps)
        for i, c in zip(cell.flat, cell.at, strict=True):
            divisor = _larger(_root(batch[c] + given.eps), given.at("v", c) * given.x[i] + alone)
            y[i] = given.x[i] / divisor * given.at("gamma", c) + given.at("beta", c)
    return y


def _evonorm_s0(given: _Given, _: Mapping[Place, float] | None) -> Output:
    """y = x sigmoid(v x) / sqrt(s_group^2 + eps) gamma + beta (arXiv:2004.02967, table 1)."""
    y: Output = {}
    for key, cell in given.cells.items():
        root = _root(given.variance(key, cell) + given.eps)
        for i, c in zip(cell.flat, cell.at, strict=True):
            swish = given.x[i] * _logistic(given.at("v", c) * given.x[i])
            y[i] = swish / root * given.at("gamma", c) + given.at("beta", c)
    return y


def _dynamic_tanh(given: _Given, _: Mapping[Place, float] | None) -> Output:
    """y = gamma tanh(alpha x) + beta (arXiv:2503.10622)."""
    y: Output = {}
    for cell in given.cells.values():
        for i, c in zip(cell.flat, cell.at, strict=True):
            y[i] = given.at("gamma", c) * _tanh(given.at("alpha", ()) * given.x[i]) + given.at("beta", c)
    return y


def _global_response(given: _Given, _: Mapping[Place, float] | None) -> Output:
    """y = gamma (x g / (mean of g over channels + eps)) + beta + x, g = ||x|| over positions (arXiv:2301.00808)."""
    channels = given.affine[0]
    norms: dict[tuple, _Number] = {}
    for key, cell in given.cells.items():
        squares = (given.x[i] * given.x[i] * w for i, w in zip(cell.flat, cell.weight, strict=True))
        norms[key] = _root(_sum(squares))
    y: Output = {}
    for key, cell in given.cells.items():
        sample = key[0]
        mean = _sum(norms[other] for other in norms if other[0] == sample) / channels
        response = norms[key] / (mean + given.eps)
        for i, c in zip(cell.flat, cell.at, strict=True):
            x = given.x[i]
            y[i] = given.at("gamma", c) * (x * response) + given.at("beta", c) + x
    return y


_FORMULAS: Mapping[str, Callable[[_Given, Mapping[Place, float] | None], Output]] = {
    "filter_response": _filter_response,
    "evonorm_b0": _evonorm_b0,
    "evonorm_s0": _evonorm_s0,
    "dynamic_tanh": _dynamic_tanh,
    "global_response": _global_response,
}


def activated_reference(
    spec: NormSpec,
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    others: Mapping[str, Any] | None = None,
    sizes: Sizes = (),
    eps: float | None = None,
    dy: Array | None = None,
    weight: Array | None = None,
    mask: Array | None = None,
    kept: Mapping[str, Array] | None = None,
    training: bool = True,
    rate: float = 0.1,
) -> Reference:
    """Compute `x`'s output, and its gradients for the output gradient `dy`.

    Args:
        others: values of the spec's further parameters by name, of as many values as gamma, alpha a single one; those
            not given have their first values. Their gradients are `dothers`.
        x, gamma, beta, sizes, eps, dy, weight, mask, kept, training, rate: as of
            :func:`normkit.core.reference.reference`; without gamma it has the spec's first value.
    """
    if spec.formula not in _FORMULAS:
        known = ", ".join(_FORMULAS)
        raise NormValueError(message(f"the formula must be one of {known}", spec.formula, "core.reference.reference"))
    given = _Given(spec, x, sizes, spec.eps if eps is None else eps, mask, weight)
    values: dict[str, Any] = {"gamma": gamma, "beta": beta, **(others or {})}
    for name, first in (("gamma", spec.first_gain), ("beta", 0.0), *spec.others):
        value = first if values.get(name) is None else values[name]
        shape = () if name == "alpha" else given.affine
        spread = np.broadcast_to(np.asarray(value, np.float64).reshape(shape if np.size(value) > 1 else ()), shape)
        given.named[name] = {place: _Number(float(spread[place])) for place in np.ndindex(*shape)}
    before: dict[str, Array] = {}
    for t in spec.tracked:
        before[t.name] = np.reshape((kept or {}).get(t.name, np.full(given.affine, t.init)), given.affine)
    stored = None if training or not spec.tracked else {p: float(before["var"][p]) for p in np.ndindex(*given.affine)}
    outputs = _FORMULAS[spec.formula](given, stored)
    flat = np.zeros(x.size)
    for i, n in outputs.items():
        flat[i] = n.value
    after = _kept_after(spec, before, _found(given), given.eps, rate) if training else before
    y = flat.reshape(x.shape)
    if dy is None:
        return Reference(y, None, None, None, after, given.moments)
    for i, n in outputs.items():
        n.slope = float(dy.flat[i])
    _hand_back(list(outputs.values()))
    slopes: dict[str, Array] = {name: np.zeros(() if name == "alpha" else given.affine) for name in given.named}
    for name, numbers in given.named.items():
        for place, n in numbers.items():
            slopes[name][place] = n.slope
    dx = np.array([n.slope for n in given.x]).reshape(x.shape)
    return Reference(y, dx, slopes.pop("gamma"), slopes.pop("beta"), after, given.moments, slopes)


def _found(given: _Given) -> list[tuple[Place, float, float, float, float]]:
    """What the kept statistics see of the batch."""
    found = []
    for key, cell in given.cells.items() if given.spec.tracked else ():
        total, squares = math.fsum(cell.weight), math.fsum(w * w for w in cell.weight)
        if total > 0:
            found.append((cell.at[0], *given.moments["batch", *key], total, total * total / squares))
    return found
