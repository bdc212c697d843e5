"""The oracle: every normalizer of mean and variance in float64, one slice at a time, by the names of its axes.

It is written another way on purpose. It never sees a plan, no array is reshaped or reduced as a whole, sums are exact
(`math.fsum`), and the backward pass follows the papers' long form, through the variance and the mean, instead of the
compact one. So an agreement with :mod:`normkit.core.formula` means something. About 1e5 elements a second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from normkit.core.axes import Sizes, static, tokens
from normkit.core.spec import NormSpec

__all__ = ["Reference", "reference"]

Array = np.ndarray


class Reference(NamedTuple):
    """All there is to know about one call, in float64."""

    y: Array
    dx: Array | None  # None without dy
    dgamma: Array | None
    dbeta: Array | None
    kept: dict[str, Array]  # after the call
    moments: dict[tuple, tuple[float, float]]  # (mean, biased variance) of every slice, by its place
    dothers: Mapping[str, Array] = MappingProxyType({})  # of tau, v and the like, see `core.activated_reference`


class _Slice(NamedTuple):
    """The elements that share a statistic: their flat places, their places in gamma, their weights."""

    flat: list[int]
    at: list[tuple[int, ...]]
    weight: list[float]


def reference(
    spec: NormSpec,
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    sizes: Sizes = (),
    eps: float | None = None,
    dy: Array | None = None,
    weight: Array | None = None,
    mask: Array | None = None,
    kept: Mapping[str, Array] | None = None,
    training: bool = True,
    rate: float = 0.1,
    r_max: float = 1.0,
    d_max: float = 0.0,
) -> Reference:
    """Normalize `x`, and its gradients for the output gradient `dy`.

    Args:
        x: any shape that fits `spec.x`.
        gamma, beta: as many values as the affine axes have, in any shape; None: 1 (or 0 for a 1+w gain) and 0.
        sizes: static sizes by name, as for a plan.
        eps: default the spec's.
        dy: gradient of the output; gives `dx`, `dgamma`, `dbeta`.
        weight: of each element in the statistics, of the shape of x.
        mask: of the shape of x; False leaves an element out of everything, its output and gradient are 0.
        kept: kept statistics before the call, by name.
        training: False normalizes with the kept statistics.
        rate: weight of this batch in the kept statistics.
        r_max, d_max: clips of batch renormalization.
    """
    eps = spec.eps if eps is None else eps
    values = np.asarray(x, dtype=np.float64).ravel()
    real = np.ones(values.size, dtype=bool) if mask is None else np.broadcast_to(mask, x.shape).ravel()
    shares = np.ones(values.size) if weight is None else np.broadcast_to(weight, x.shape).ravel().astype(np.float64)
    slices, affine = _slices(spec, x.shape, sizes, real, shares)
    gains = np.full(affine, 1.0) if gamma is None else np.reshape(gamma, affine).astype(np.float64)
    if gamma is not None and spec.gain == "1+w":
        gains = gains + 1.0
    shifts = np.zeros(affine) if beta is None else np.reshape(beta, affine).astype(np.float64)
    slopes = None if dy is None else np.asarray(dy, dtype=np.float64).ravel()
    y, dx = np.zeros(values.size), np.zeros(values.size)
    dgamma, dbeta = np.zeros(affine), np.zeros(affine)
    before: dict[str, Array] = {
        t.name: np.reshape((kept or {}).get(t.name, np.full(affine, t.init)), affine) for t in spec.tracked
    }
    moments: dict[tuple, tuple[float, float]] = {}
    found: list[tuple[tuple[int, ...], float, float, float, float]] = []
    for key, cell in slices.items():
        v = [values[i] for i in cell.flat]
        total = math.fsum(cell.weight)
        use_kept = bool(spec.tracked) and not training
        if use_kept:
            place = cell.at[0]
            mean = before["mean"][place]
            std = before["std"][place] if "std" in before else math.sqrt(before["var"][place] + eps)
            var = std * std - eps
        else:
            mean = _average(v, cell.weight, total) if spec.center else 0.0
            var = _average([(a - mean) ** 2 for a in v], cell.weight, total)
            std = math.sqrt(var + eps)
            squares = math.fsum(w * w for w in cell.weight)
            if total > 0 and spec.tracked:
                found.append((cell.at[0], mean, var, total, total * total / squares))
        r, d = 1.0, 0.0
        if spec.renorm and not use_kept:
            sigma, mu = before["std"][cell.at[0]], before["mean"][cell.at[0]]
            r = min(max(std / sigma, 1.0 / r_max), r_max)
            d = min(max((mean - mu) / sigma, -d_max), d_max)
        moments[key] = (mean, var)
        normalized = [(a - mean) / std * r + d for a in v]
        for i, at, h in zip(cell.flat, cell.at, normalized, strict=True):
            y[i] = h * gains[at] + shifts[at]
        if slopes is None:
            continue
        slope = [slopes[i] for i in cell.flat]
        for at, g, h in zip(cell.at, slope, normalized, strict=True):
            dgamma[at] += g * h
            dbeta[at] += g
        inner = [g * gains[at] * r for g, at in zip(slope, cell.at, strict=True)]  # gradient of (x - mean) / std
        dvar = dmean = 0.0
        if not use_kept:
            dvar = math.fsum(g * (a - mean) for g, a in zip(inner, v, strict=True)) * -0.5 * std**-3
            if spec.center:
                pull = math.fsum(w * -2.0 * (a - mean) for w, a in zip(cell.weight, v, strict=True))
                dmean = math.fsum(-g / std for g in inner) + dvar * (pull / total if total else 0.0)
        for i, a, g, w in zip(cell.flat, v, inner, cell.weight, strict=True):
            share = w / total if total else 0.0
            dx[i] = g / std + dvar * 2.0 * (a - mean) * share + dmean * share
    after = _kept_after(spec, before, found, eps, rate) if training else before
    if slopes is None:
        return Reference(y.reshape(x.shape), None, None, None, after, moments)
    return Reference(y.reshape(x.shape), dx.reshape(x.shape), dgamma, dbeta, after, moments)


def _average(values: list[float], weights: list[float], total: float) -> float:
    return math.fsum(a * w for a, w in zip(values, weights, strict=True)) / total if total else 0.0


def _kept_after(
    spec: NormSpec,
    before: Mapping[str, Array],
    found: list[tuple[tuple[int, ...], float, float, float, float]],
    eps: float,
    rate: float,
) -> dict[str, Array]:
    """Update what is kept, place by place: groups weigh by their values, variances are pooled."""
    after = {name: value.copy() for name, value in before.items()}
    by_place: dict[tuple[int, ...], list[tuple[float, float, float, float]]] = {}
    for place, mean, var, total, effective in found:
        by_place.setdefault(place, []).append((mean, var, total, effective))
    for place, groups in by_place.items():
        enough = [g for g in groups if g[3] > spec.minimum - 1 + 1e-9]
        weights = {t.name: [n * (1 - 1 / e) if t.bessel else n for _, _, n, e in enough] for t in spec.tracked}
        if not all(map(any, weights.values())):  # of one of them nothing is known
            continue
        for t in spec.tracked:
            value = {"mean": lambda g: g[0], "var": lambda g: g[1], "std": lambda g: math.sqrt(g[1] + eps)}[t.name]
            batch = math.fsum(value(g) * g[2] for g in enough) / math.fsum(weights[t.name])
            after[t.name][place] = before[t.name][place] + rate * (batch - before[t.name][place])
    return after


def _slices(
    spec: NormSpec, shape: tuple[int, ...], sizes: Sizes, real: Array, shares: Array
) -> tuple[dict[tuple, _Slice], tuple[int, ...]]:
    """Group the elements by the statistic they share; also return the shape of gamma."""
    named = tokens(spec, len(shape), sizes)
    lengths: list[int] = []
    for token, length in zip(named, shape, strict=True):
        if len(token) == 2 and static(sizes, token[0]) is not None:
            outer = int(static(sizes, token[0]))  # type: ignore[arg-type]
            lengths.append(length // outer)
        else:
            lengths.append(int(static(sizes, token[1])) if len(token) == 2 else length)  # type: ignore[arg-type]
    affine: list[int] = []
    for token, length, inner in zip(named, shape, lengths, strict=True):
        if token[0] in spec.affine_names:
            affine.extend((length // inner, inner) if len(token) == 2 else (length,))
    others = 1  # elements of a slice behind one index of a split axis, to see what a remainder would hold
    for token, length in zip(named, shape, strict=True):
        others *= length if len(token) == 1 and token[0] in spec.over_names else 1
    cells: dict[tuple, _Slice] = {}
    for flat, index in enumerate(np.ndindex(*shape)):
        key: list[int] = []
        at: list[int] = []
        for token, i, inner, length in zip(named, index, lengths, shape, strict=True):
            if len(token) == 2:
                places = [_group(i, inner, length, others) if token[1] in spec.over_names else i // inner, i % inner]
            else:
                places = [i]
            for name, place in zip(token, places, strict=True):
                if name not in spec.over_names:
                    key.append(place)
                if name in spec.affine_names:
                    at.append(place)
        if real[flat]:
            cell = cells.setdefault(tuple(key), _Slice([], [], []))
            cell.flat.append(flat)
            cell.at.append(tuple(at))
            cell.weight.append(float(shares[flat]))
    return cells, tuple(affine)


def _group(i: int, size: int, length: int, others: int) -> int:
    """Return the group of index i: a last group of a single value joins the one before it."""
    alone = length > size and length % size == 1 and others == 1
    return min(i // size, length // size - 1) if alone else i // size
