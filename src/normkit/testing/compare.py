"""One call against the oracle: sizes, conditions and tolerances taken from what the oracle says."""

from __future__ import annotations

from typing import Any

import numpy as np

from normkit.testing.precision import assert_close, tolerance
from normkit.testing.subject import Call, Expected, Outcome, Subject

__all__ = ["EVERYTHING", "GRADIENTS", "agree", "allowed", "bound", "moved", "same"]

GRADIENTS = ("dx", "dgamma", "dbeta")
EVERYTHING = ("y", *GRADIENTS, "kept")

Array = np.ndarray


def agree(
    subject: Subject, call: Call, fields: tuple[str, ...] = ("y", *GRADIENTS), *, outcome: Outcome | None = None
) -> Outcome:
    """Run a call (or take its `outcome`) and compare the fields with the oracle. Returns the outcome."""
    found = subject.run(call) if outcome is None else outcome
    expected = subject.expected(call)
    bounds = allowed(subject, call, expected)
    for name in fields:
        if name == "kept":
            for key, want in expected.kept.items():
                assert_close(_label(subject, f"kept {key}"), _flat(found.kept.get(key)), want.reshape(-1), bounds[key])
            if subject.counts and subject.tracks and found.count != expected.count:
                raise AssertionError(f"{_label(subject, 'count')}: expected {expected.count}, actual {found.count}")
            continue
        if name != "y" and call.dy is None:
            continue
        if (name == "dgamma" and call.gamma is None) or (name == "dbeta" and call.beta is None):
            continue
        want = getattr(expected.reference, name)
        if name in ("dgamma", "dbeta"):
            want = want.reshape(subject.parameter_shape(call.x.shape))
        assert_close(_label(subject, name), getattr(found, name), want, bounds[name])
    return found


def allowed(subject: Subject, call: Call, expected: Expected) -> dict[str, float | Array]:
    """Return the tolerance of every field of a call."""
    ref, spec = expected.reference, subject.spec
    moments = np.array(list(ref.moments.values()) or [(0.0, 1.0)])
    mean, std = np.abs(moments[:, 0]), np.sqrt(np.maximum(moments[:, 1] + call.eps, 0.0))
    condition = float(np.max(mean / std)) if spec.center else 0.0
    types: dict[str, Any] = {
        "output": subject.dtype,
        "accumulator": subject.accumulator,
        "roundings": subject.roundings,
    }

    def limit(size: float | Array, terms: float | Array | None = None) -> float | Array:
        return tolerance(size, condition=condition, terms=terms, **types)

    axes = subject.parameter_axes(call.x.shape)
    shape = [n if axis in axes else 1 for axis, n in enumerate(call.x.shape)]
    gain = np.ones(1) if call.gamma is None else call.gamma.reshape(shape) + (1.0 - spec.first_gain)
    # A normalized value is known to eps * condition in units of 1, even where it is 0 and only beta is left.
    bounds: dict[str, float | Array] = {"y": limit(_peak(ref.y), max(_peak(ref.y), _peak(gain)))}
    if call.dy is not None and ref.dx is not None and ref.dgamma is not None and ref.dbeta is not None:
        real = subject.over_channels(call.mask, call.x.shape)
        dy = call.dy if real is None else np.where(real, call.dy, 0.0)
        others = tuple(axis for axis in range(call.x.ndim) if axis not in axes)
        shift = np.zeros(1) if call.beta is None else call.beta.reshape(shape)
        normalized = (ref.y - shift) / np.where(gain == 0, 1.0, gain)
        stretch = 1.0 if call.schedule is None or not call.training else call.schedule.r_max
        # Each sum of the backward pass is as large as what it adds up.
        bounds["dx"] = limit(_peak(ref.dx), _peak(dy * gain) * stretch / float(np.min(std)))
        sums = np.sum(np.abs(dy) * np.maximum(np.abs(normalized), 1.0), axis=others), np.sum(np.abs(dy), axis=others)
        for name, terms in zip(("dgamma", "dbeta"), sums, strict=True):
            bounds[name] = limit(_peak(getattr(ref, name)), float(np.max(terms, initial=0.0)))
    exact: dict[str, Any] = {"output": subject.accumulator, "accumulator": subject.accumulator}
    for name, after in expected.kept.items():
        before = _peak(np.asarray((call.kept or {}).get(name, 1.0)))
        if name == "mean":
            # The rounding of a mean goes with its own magnitude, whatever the spread.
            bounds[name] = tolerance(max(_peak(after), before), terms=max(_peak(mean + std), before), **exact)
        else:
            bounds[name] = tolerance(max(_peak(after), before), condition=condition, **exact)
    return bounds


def bound(subject: Subject, call: Call, field: str = "y") -> float | Array:
    """Return the tolerance of one field of a call."""
    return allowed(subject, call, subject.expected(call))[field]


def moved(call: Call, a: float, b: float = 0.0) -> dict[str, Array]:
    """Return what would be kept had all data been a x + b."""
    rules = {"mean": lambda v: a * v + b, "var": lambda v: a * a * v, "std": lambda v: a * v}
    return {name: rules[name](value) for name, value in (call.kept or {}).items()}


def same(subject: Subject, label: str, actual: Array | None, expected: Array, bound: float | Array = 0.0) -> None:
    """Compare two results of the subject itself; each may be `bound` off."""
    assert_close(_label(subject, label), actual, expected, 2.0 * np.asarray(bound))


def _flat(values: Array | None) -> Array | None:
    return None if values is None else values.reshape(-1)


def _peak(values: Array) -> float:
    finite = np.abs(values[np.isfinite(values)])
    return float(np.max(finite, initial=0.0))


def _label(subject: Subject, what: str) -> str:
    return f"{what} of {subject.name}"
