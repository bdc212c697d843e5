"""One batch through a normalizer: every step as numbers, by the formulas of :mod:`normkit.core.formula` in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from normkit.core import formula
from normkit.core.activated_reference import activated_reference
from normkit.core.formula import Moments
from normkit.core.plan import NormPlan, check_lengths, count, parts, plan
from normkit.core.spec import NormSpec
from normkit.errors import NormValueError, message
from normkit.teaching.cells import Frame, Labels, letter, places, sharing
from normkit.teaching.forms import FORMS
from normkit.teaching.subjects import Subject

__all__ = ["Kept", "Statistic", "Step", "Undo", "Walk", "walk"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Statistic:
    """A mean and a variance, and whose they are.

    Attributes:
        letter: its name in the picture of the input.
        where: whose it is, in words.
        values: those behind it, in the order of the input.
        mean: None where none is subtracted.
        var: biased; without a mean the mean square.
        std: sqrt(var + eps).
        r, d: of batch renormalization, else None.
    """

    letter: str
    where: str
    values: tuple[float, ...]
    mean: float | None
    var: float
    std: float
    r: float | None = None
    d: float | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """The values after one step, in the shape of the input."""

    name: str
    formula: str
    values: Array


@dataclass(frozen=True, eq=False)
class Kept:
    """A statistic that is kept for evaluation, one value per channel: before this batch, of it, and after it."""

    name: str
    first: float
    bessel: bool
    before: Array
    batch: Array
    after: Array


@dataclass(frozen=True, eq=False)
class Undo:
    """The gamma and beta by which y is x again.

    Attributes:
        gamma, beta: in the shape of the layer's.
        y: the output with them.
        reached: True where that is x. gamma and beta are the same for all samples: where samples have statistics of
            their own, only the first one is given back.
    """

    gamma: Array
    beta: Array
    y: Array
    reached: Array


@dataclass(frozen=True, eq=False)
class Walk:
    """All steps of one batch.

    Attributes:
        subject: what was walked through.
        frame: how the input stands on paper.
        x: the input, channels on the second axis.
        shares: for each value the number of the statistic that it is part of.
        statistics: in the order of these numbers; empty for a normalizer without any.
        steps: x first, y last.
        kept: empty where nothing is kept.
        evaluation: the first sample in evaluation after this batch.
        undo: None for a normalizer that loses more than mean and variance.
    """

    subject: Subject
    frame: Frame
    x: Array
    shares: Array
    statistics: tuple[Statistic, ...]
    steps: tuple[Step, ...]
    kept: tuple[Kept, ...]
    evaluation: Array
    undo: Undo | None


def walk(subject: Subject, x: Array, labels: Labels = ()) -> Walk:
    """Walk a batch through a normalizer. Raises NormValueError for an input that does not fit it."""
    spec, eps = subject.spec, subject.eps
    p = _plan(subject, x)
    frame = Frame.of(spec, x.shape, subject.sizes, labels)
    affine = tuple(x.shape[axis] for axis in p.whole)
    gamma, beta = (_shaped(name, getattr(subject, name), affine) for name in ("gamma", "beta"))
    before: dict[str, Array] = {
        t.name: np.asarray(subject.kept.get(t.name, np.full(affine, t.init))) for t in spec.tracked
    }
    correct = None if not spec.renorm else formula.renorm(np, before, *subject.clips, lambda value: value)
    normalized, _ = formula.normalize(np, spec, p, x, eps=eps)
    corrected, moments = formula.normalize(np, spec, p, x, eps=eps, correct=correct)
    shares = sharing(p, x.shape)
    statistics = _statistics(spec, p, frame, x, shares, moments, eps) if p.reduce else ()
    form = FORMS.get(spec.formula)
    steps = [Step("x", "", x)]
    if form is None or form.normalized:
        words = "(x - mean) / sqrt(variance + eps)" if spec.center else "x / sqrt(mean square + eps)"
        steps.append(Step("normalized", words, normalized))
    if correct is not None:
        steps.append(Step("corrected", "normalized * r + d", corrected))
    kept = _kept(subject, p, moments, before)
    after = {one.name: one.after for one in kept}
    row = x[:1] if frame.tokens[0][-1] in ("n", "*n") else x
    if form is not None:

        def run(values: Array, **options: Any) -> Array:
            own: dict[str, Any] = {"sizes": subject.sizes, "eps": eps, "others": subject.others, **options}
            return activated_reference(spec, values, gamma, beta, **own).y

        steps.append(Step("y", form.words.removeprefix("y = "), run(x)))
        evaluation = run(row, kept=after, training=False) if kept else steps[-1].values[: len(row)]
    else:
        gain = "(1 + gamma)" if spec.gain == "1+w" else "gamma"
        shifted = "" if beta is None and not spec.center else " + beta"
        y, _ = formula.normalize(np, spec, p, x, gamma, beta, eps=eps, correct=correct)
        steps.append(Step("y", f"{steps[-1].name} * {gain}{shifted}", y))
        evaluation = y[: len(row)]
        if kept:
            evaluation = formula.evaluate(np, spec, p, row, after, gamma, beta, eps=eps)
    undo = None if form is not None else _undo(subject, p, x, shares, statistics, correct)
    return Walk(subject, frame, x, shares, statistics, tuple(steps), kept, evaluation, undo)


def _plan(subject: Subject, x: Array) -> NormPlan:
    spec = subject.spec
    p = plan(spec, x.ndim, subject.sizes)
    check_lengths(spec, p, x.shape)
    least = min(count(p, view) for _, _, view in parts(p, x.shape))
    if least < spec.minimum or (spec.over_names and not p.reduce):
        must = f"{spec.name}: a statistic must have at least {spec.minimum} value{'s' if spec.minimum > 1 else ''}"
        given = f"{least}" if p.reduce else f"no axes `{spec.over}`"
        raise NormValueError(message(must, f"{given} in shape {x.shape}"))
    return p


def _shaped(name: str, values: Array | None, affine: tuple[int, ...]) -> Array | None:
    if values is None:
        return None
    if values.size not in (1, int(np.prod(affine))):
        must = f"`{name}` must be one number, or one for each of {' x '.join(map(str, affine))}"
        raise NormValueError(message(must, f"{values.size}"))
    return np.broadcast_to(values, affine) if values.size == 1 else values.reshape(affine)


def _statistics(
    spec: NormSpec, p: NormPlan, frame: Frame, x: Array, shares: Array, moments: list[Moments], eps: float
) -> tuple[Statistic, ...]:
    def flat(name: str) -> Array:
        return np.concatenate([np.ravel(getattr(m, name)) for m in moments])

    var = flat("var")
    found = []
    correction = [m.correction for m in moments if m.correction is not None]
    r, d = (np.concatenate([np.ravel(getattr(c, name)) for c in correction]) if correction else None for name in "rd")
    mean = flat("mean") if spec.center else None
    order = np.argsort(shares, axis=None, kind="stable")
    starts = np.searchsorted(shares.ravel()[order], np.arange(len(var) + 1))
    for number in range(len(var)):
        own = order[starts[number] : starts[number + 1]]
        index = tuple(int(i) for i in np.unravel_index(own[0], x.shape))
        found.append(
            Statistic(
                letter(number),
                frame.where(spec, p, index),
                tuple(map(float, x.ravel()[own])),
                None if mean is None else float(mean[number]),
                float(var[number]),
                float(np.sqrt(var[number] + eps)),
                None if r is None else float(r[number]),
                None if d is None else float(d[number]),
            )
        )
    return tuple(found)


def _kept(subject: Subject, p: NormPlan, moments: list[Moments], before: Mapping[str, Array]) -> tuple[Kept, ...]:
    spec = subject.spec
    if not spec.tracked:
        return ()
    batch, known = formula.merged(np, spec, p, moments, eps=subject.eps)
    after = formula.updated(np, spec, before, batch, known, subject.weight())
    return tuple(Kept(t.name, t.init, t.bessel, before[t.name], batch[t.name], after[t.name]) for t in spec.tracked)


def _undo(
    subject: Subject, p: NormPlan, x: Array, shares: Array, statistics: tuple[Statistic, ...], correct: Any
) -> Undo:
    """y = slope * x + offset within a statistic; gamma = 1 / slope and beta = -offset / slope give x back."""
    spec, at = subject.spec, places(p, x.shape)
    _, first = np.unique(at, return_index=True)  # of the values behind each gamma, the first
    owner = shares.ravel()[first]
    r = np.array([1.0 if s.r is None else s.r for s in statistics])
    d = np.array([0.0 if s.d is None else s.d for s in statistics])
    slope = r / np.array([s.std for s in statistics])
    offset = d - slope * np.array([s.mean or 0.0 for s in statistics])
    affine = tuple(x.shape[axis] for axis in p.whole)
    gamma = (1.0 / slope[owner]).reshape(affine) - (1.0 - spec.first_gain)
    beta = (-offset[owner] / slope[owner]).reshape(affine)
    y, _ = formula.normalize(np, spec, p, x, gamma, beta, eps=subject.eps, correct=correct)
    return Undo(gamma, beta, y, shares == owner[at])
