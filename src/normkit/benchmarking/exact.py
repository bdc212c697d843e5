"""What the outputs must be: the whole by a float64 formula, part by part, and a few statistics by the oracle.

A peer is not timed unless its y, dx, dgamma and dbeta pass. Tensors of a case may be too large for float64 copies of
all that is needed at once, so they are walked in parts that share no statistic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from normkit.benchmarking.cases import Case
from normkit.benchmarking.values import Given
from normkit.core import formula
from normkit.core.axes import Sizes
from normkit.core.plan import plan
from normkit.core.reference import reference
from normkit.testing.precision import C_ACC, EPS, assert_close, rounded, tolerance

__all__ = ["Exact", "Part", "activated", "by_formula", "by_oracle", "given", "parts", "samples", "wrong"]

Array = np.ndarray

_SEED = 7
_AT_ONCE = 1 << 22  # values of a part: 32 MB in float64, and the formula holds about ten such arrays
_ORACLE = (
    1 << 16
)  # values that the oracle is asked about, about a second of its time, and never less than one statistic
# ReLU has no slope at 0: there a rounding error, or another order of summation, decides whether dy passes. So dy is 0
# where the activation's input is closer to 0 than this, which is hundreds of times the rounding errors of float32.
_MARGIN = 1e-3
# Rounding errors of the terms of a sum are independent: their sum stays within so many standard deviations.
_SIGMAS = 6.0
_ACCUMULATOR = "float32"


class Part(NamedTuple):
    """A part of a case that shares no statistic with the rest."""

    place: tuple[slice, ...]  # in the input
    channels: slice  # in gamma
    groups: int  # of group norm


class Exact(NamedTuple):
    """Results in float64, and how far others may be from them."""

    values: dict[str, Array]
    allowed: dict[str, float | Array]
    adding: dict[str, Array]  # of sums, what adding in the type of the case may cost: PyTorch's layer norm does so

    def room(self, name: str, room: float) -> float | Array:
        """How far outputs may be: `allowed`, or with more room than 1 that many times, added in whatever type."""
        return self.allowed[name] if room == 1.0 else room * self.allowed[name] + self.adding.get(name, 0.0)


def given(case: Case) -> Given:
    """The numbers of a case, always the same."""
    rng = np.random.default_rng([_SEED, *case.shape])
    x = rng.standard_normal(case.shape, dtype=np.float32)
    x *= np.float32(1.5)
    x += rng.uniform(-1, 1, case.channels).astype(np.float32).reshape(-1, *(1 for _ in case.shape[2:]))
    dy = rng.standard_normal(case.shape, dtype=np.float32)
    signs = np.where(rng.random(case.channels) < 0.5, -1.0, 1.0)
    gamma = rounded(rng.uniform(0.5, 1.5, case.channels) * signs, case.dtype)
    beta = rounded(rng.uniform(-1, 1, case.channels), case.dtype) if case.spec.center else None
    mean, var = (rng.uniform(low, 2, case.channels).astype(np.float32) for low in (-2, 0.5))
    made = Given(x, dy, gamma, beta, mean, var)
    for part in parts(case):
        x[part.place], dy[part.place] = (rounded(values[part.place], case.dtype) for values in (x, dy))
        if case.training and case.activation == "relu":
            dy[part.place][np.abs(_normalized(case, made, part)[0]) < _MARGIN] = 0
    return made


def parts(case: Case) -> Iterator[Part]:
    """The parts, in order: channels of batch norm, samples of the others."""
    axis = 1 if case.norm == "batch" else 0
    length = case.shape[axis]
    step = max(1, _AT_ONCE * length // case.values)
    for start in range(0, length, step):
        along = slice(start, min(start + step, length))
        place = (slice(None),) * axis + (along,)
        yield Part(place, along if axis else slice(None), case.groups)


def wrong(
    case: Case, numbers: Given, outputs: Mapping[str, Mapping[str, Array]], rooms: Mapping[str, float]
) -> dict[str, str]:
    """What is wrong with the outputs of peers, by the name of the peer; those that pass are not named.

    `rooms` says within how many of our own tolerances each has to be.
    """
    faults: dict[str, str] = {}

    def judge(exact: Exact, place: tuple[slice, ...], channels: slice, names: tuple[str, ...], by: str) -> None:
        for peer, returned in outputs.items():
            for name in names:
                where = place if name in ("y", "dx") else (channels,)
                actual = returned[name][where].astype(np.float64) if name in returned else None
                try:
                    label = f"{name} against {by}"
                    assert_close(label, actual, exact.values[name], exact.room(name, rooms[peer]))
                except AssertionError as error:
                    faults.setdefault(peer, " ".join(str(error).split()))

    sums: list[Exact] = []
    for part in parts(case):
        exact = by_formula(case, numbers, part)
        whole = case.norm == "batch"  # the gradients of gamma and beta are whole in one part
        names = tuple(name for name in exact.values if whole or name in ("y", "dx"))
        judge(exact, part.place, part.channels, names, "the formula")
        sums.append(exact)
    if case.norm != "batch" and case.training:
        judge(_added(sums), (), slice(None), tuple(n for n in sums[0].values if n not in ("y", "dx")), "the formula")
    for part in samples(case):
        exact = by_oracle(case, numbers, part)
        judge(exact, part.place, part.channels, tuple(exact.values), "the reference")
    return faults


def _sizes(case: Case, part: Part, channels: int) -> Sizes:
    if case.norm == "group":
        return (("g", part.groups),)
    return (("*c", (channels,)),) if case.norm in ("layer", "rms") else (("c", channels),)


class _Pieces(NamedTuple):
    """A part of what is given, in float64."""

    x: Array
    dy: Array
    gamma: Array
    beta: Array | None
    kept: dict[str, Array]


def _pieces(numbers: Given, part: Part) -> _Pieces:
    x, dy = (values[part.place].astype(np.float64) for values in (numbers.x, numbers.dy))
    own = {name: np.asarray(value[part.channels], dtype=np.float64) for name, value in numbers.arrays().items()
           if name not in ("x", "dy")}  # fmt: skip
    return _Pieces(x, dy, own["gamma"], own.get("beta"), {"mean": own["mean"], "var": own["var"]})


def _normalized(case: Case, numbers: Given, part: Part) -> tuple[Array, list[formula.Moments]]:
    """The input of the activation, and the moments."""
    x, _, gamma, beta, kept = _pieces(numbers, part)
    p = plan(case.spec, x.ndim, _sizes(case, part, gamma.size))
    if not case.training:
        return formula.evaluate(np, case.spec, p, x, kept, gamma, beta, eps=case.spec.eps), []
    return formula.normalize(np, case.spec, p, x, gamma, beta, eps=case.spec.eps)


def activated(activation: str | None, z: Array) -> tuple[Array, Array]:
    """The activation of z, and its slope there."""
    if activation is None:
        return z, np.ones_like(z)
    if activation == "relu":
        return np.maximum(z, 0.0), (z > 0).astype(np.float64)
    assert activation == "silu", activation
    s = 1.0 / (1.0 + np.exp(-z))
    return z * s, s * (1.0 + z * (1.0 - s))


def by_formula(case: Case, numbers: Given, part: Part) -> Exact:
    """A part by the formula of the core."""
    z, moments = _normalized(case, numbers, part)
    y, slope = activated(case.activation, z)
    x, dy, gamma, beta, kept = _pieces(numbers, part)
    if not case.training:
        condition = np.max(np.abs(kept["mean"]) / np.sqrt(kept["var"] + case.spec.eps))
        return _judged(case, {"y": y}, z, None, condition, 0.0)
    p = plan(case.spec, x.ndim, _sizes(case, part, gamma.size))
    dz = dy * slope
    gradients = formula.backward(np, case.spec, p, dz, x, gamma, beta, moments, eps=case.spec.eps)
    values = {"y": y, "dx": gradients.x, "dgamma": gradients.gamma}
    values |= {} if beta is None else {"dbeta": gradients.beta}
    std = np.sqrt(moments[0].var + case.spec.eps)
    condition = 0.0 if moments[0].mean is None else np.max(np.abs(moments[0].mean) / std)
    return _judged(case, values, z, dz, condition, float(np.max(np.abs(gamma)) / np.min(std)))


def by_oracle(case: Case, numbers: Given, part: Part) -> Exact:
    """One statistic, or a few, by the oracle, which knows no activation: it is asked twice."""
    x, dy, gamma, beta, kept = _pieces(numbers, part)
    sizes = _sizes(case, part, gamma.size)
    training = case.training
    ask = {"sizes": sizes, "eps": case.spec.eps, "kept": kept if case.spec.tracked else None, "training": training}
    found = reference(case.spec, x, gamma, beta, **ask)  # type: ignore[arg-type]
    y, slope = activated(case.activation, found.y)
    mean, var = (np.array(each) for each in zip(*found.moments.values(), strict=True))
    std = np.sqrt(var + case.spec.eps)
    condition = float(np.max(np.abs(mean) / std))
    if not training:
        return _judged(case, {"y": y}, found.y, None, condition, 0.0)
    dz = dy * slope
    again = reference(case.spec, x, gamma, beta, dy=dz, **ask)  # type: ignore[arg-type]
    assert again.dx is not None
    values = {"y": y, "dx": again.dx}
    if case.norm == "batch":
        assert again.dgamma is not None
        assert again.dbeta is not None
        values |= {"dgamma": again.dgamma, "dbeta": again.dbeta}
    return _judged(case, values, found.y, dz, condition, float(np.max(np.abs(gamma)) / np.min(std)))


def samples(case: Case) -> Iterator[Part]:
    """Statistics at random, as many as the oracle has time for."""
    rng = np.random.default_rng(_SEED)
    n, c = case.shape[:2]
    width = {"batch": 1, "instance": 1, "group": c // case.groups}.get(case.norm, c)
    samples = n if case.norm == "batch" else 1
    each = case.values // (n * c) * width * samples
    for _ in range(max(1, min(4, _ORACLE // each))):
        first = int(rng.integers(0, c // width)) * width
        row = int(rng.integers(0, n))
        channels = slice(first, first + width)
        yield Part((slice(None) if samples > 1 else slice(row, row + 1), channels), channels, 1)


def _judged(case: Case, values: dict[str, Array], z: Array, dz: Array | None, condition: float, gain: float) -> Exact:
    """Say how far others may be: the tolerance of the conformance suite, with the roundings of separate operations.

    A norm and an activation that are two operations round to the type between them, twice where the slope is taken at
    a rounded place.
    """
    roundings = {None: 1, "relu": 2, "silu": 3}[case.activation]
    allowed: dict[str, float | Array] = {}
    adding: dict[str, Array] = {}

    def bound(size: Array, terms: float) -> float | Array:
        return tolerance(
            float(np.max(np.abs(size))), output=case.dtype, accumulator=_ACCUMULATOR, condition=condition,
            terms=terms, roundings=roundings,
        )  # fmt: skip

    allowed["y"] = bound(values["y"], float(np.max(np.abs(z))))
    if dz is None:
        return Exact(values, allowed, {})
    largest = float(np.max(np.abs(dz)))
    allowed["dx"] = bound(values["dx"], largest * gain)
    # Of sums over everything that shares a gamma: |normalized| is about 1, and at most some 6.
    axes = tuple(axis for axis in range(dz.ndim) if axis != 1)
    absolute, squares = np.sum(np.abs(dz), axis=axes), np.sqrt(np.sum(dz * dz, axis=axes))
    for name in values.keys() & {"dgamma", "dbeta"}:
        narrow = 0.5 * EPS[case.dtype] * (np.abs(values[name]) + (roundings - 1) * _SIGMAS * squares)
        allowed[name] = narrow + C_ACC * EPS[_ACCUMULATOR] * (1.0 + condition) * absolute
        adding[name] = _SIGMAS * EPS[case.dtype] * squares
    return Exact(values, allowed, adding)


def _added(sums: list[Exact]) -> Exact:
    names = [name for name in sums[0].values if name not in ("y", "dx")]

    def total(of: str) -> dict[str, Array]:
        return {name: np.sum([getattr(each, of)[name] for each in sums], axis=0) for name in names}

    return Exact(total("values"), {**total("allowed")}, total("adding"))
