"""The formulas of the core as subjects: what every layer is made of, run by a namespace of arrays."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from normkit.core import catalog, formula
from normkit.core.axes import Sizes
from normkit.core.plan import NormPlan, check_lengths, parts, plan
from normkit.core.plan import count as values_behind
from normkit.core.spec import NormSpec
from normkit.errors import NormValueError, message
from normkit.testing.precision import EPS, rounded
from normkit.testing.subject import LAYOUTS, Call, Outcome, Shape, Subject, arranged, chosen

__all__ = ["ENTRIES", "Made", "capabilities", "formula_subject", "formula_subjects", "forward", "run_formula"]

Array = np.ndarray

IMAGES: tuple[Shape, ...] = ((5, 6, 3, 2), (4, 6), (3, 2, 7))
ROWS: tuple[Shape, ...] = ((4, 3, 6), (5, 17), (2, 1, 3, 5))


def _channels(shape: Shape) -> Sizes:
    return (("c", shape[1]),)


def _pairs_of_samples(shape: Shape) -> Sizes:
    return (("c", shape[1]), ("n", 2))


def _three_groups(shape: Shape) -> Sizes:
    return (("g", math.gcd(3, shape[1])),)


def _last_axis(shape: Shape) -> Sizes:
    return (("*c", shape[-1:]),)


def _last_two_axes(shape: Shape) -> Sizes:
    return (("*c", shape[-2:]),)


# name -> spec, static sizes, shapes
ENTRIES: dict[str, tuple[NormSpec, Any, tuple[Shape, ...]]] = {
    "batch": (catalog.BATCH, _channels, IMAGES),
    "ghost": (catalog.GHOST, _pairs_of_samples, ((5, 6, 3, 2), (7, 4), (6, 2, 7))),
    "renorm": (catalog.RENORM, _channels, IMAGES),
    "instance": (catalog.INSTANCE, _channels, ((5, 6, 3, 2), (3, 2, 7))),
    "instance_tracked": (catalog.INSTANCE_TRACKED, _channels, ((5, 6, 3, 2), (3, 2, 7))),
    "group": (catalog.GROUP, _three_groups, IMAGES),
    "one_group": (catalog.GROUP, lambda _: (("g", 1),), IMAGES),
    "layer": (catalog.LAYER, _last_axis, ROWS),
    "layer_two_axes": (catalog.LAYER, _last_two_axes, (ROWS[0], ROWS[2])),
    "layer_2d": (catalog.LAYER_2D, _channels, IMAGES),
    "rms": (catalog.RMS, _last_axis, ROWS),
    "rms_2d": (catalog.RMS_2D, _channels, IMAGES),
}


def formula_subject(entry: str, *, dtype: str = "float64", gain: str = "w", affine: bool = True) -> Subject:
    """Return the NumPy formula of an entry as a subject, accumulating in float32 or wider, with closed gradients."""
    spec, sizes, shapes = ENTRIES[entry]
    spec = spec if gain == spec.gain else replace(spec, gain=gain)  # type: ignore[arg-type]
    accumulator = "float64" if dtype == "float64" else "float32"
    marks = ("" if gain == "w" else "_1+w") + ("" if affine else "_plain")
    return Subject(
        name=f"numpy-{entry}{marks}-{dtype}",
        spec=spec,
        run=lambda call: run_formula(spec, sizes, dtype, accumulator, call),
        shapes=shapes,
        sizes=sizes,
        dtype=dtype,
        accumulator=accumulator,
        gamma=affine,
        gradients="training",
        **capabilities(spec, affine),
    )


def capabilities(spec: NormSpec, affine: bool = True) -> dict[str, Any]:
    """Return what the formulas of a spec can do."""
    over_positions = spec.axes[0] != ("*n",) and not spec.name.endswith("_2d")
    return {
        "beta": affine and spec.center,
        "layouts": LAYOUTS,
        "masks": over_positions,
        "weights": over_positions,
        "bessel": any(t.name == "var" for t in spec.tracked),
        "nonfinite": ("skip", "update") if spec.tracked else (),
        "cumulative": bool(spec.tracked),
    }


def formula_subjects() -> list[Subject]:
    """Return every entry in float64 and float32, with the variants that take another path, and half types."""
    subjects = [formula_subject(entry, dtype=dtype) for entry in ENTRIES for dtype in ("float64", "float32")]
    subjects += [formula_subject(entry, gain="1+w", dtype=dtype) for entry in ("rms", "layer") for dtype in EPS]
    subjects += [formula_subject(entry, affine=False) for entry in ("batch", "renorm", "instance", "layer")]
    subjects += [formula_subject(entry, dtype=dtype) for entry in ENTRIES for dtype in ("float16", "bfloat16")]
    return subjects


@dataclass(frozen=True)
class Made:
    """What one pass through the formulas gave, in arrays of their namespace."""

    y: Any
    moments: list[formula.Moments]
    kept: dict[str, Any]
    count: int


def forward(
    xp: Any,
    spec: NormSpec,
    p: NormPlan,
    call: Call,
    x: Any,
    gamma: Any,
    beta: Any,
    *,
    kept: Mapping[str, Any],
    count: int,
    training: bool,
    real: Any = None,
    weight: Any = None,
    stop: Any = lambda value: value,
) -> Made:
    """Run the formulas as a layer does: refuse too few values, hide what is masked, normalize, keep.

    `real` and `weight` have the shape of x with a channel axis of length 1.
    """
    check_lengths(spec, p, tuple(x.shape))
    if real is not None:
        x = xp.where(real, x, xp.zeros_like(x))
        weight = real * (xp.ones_like(x[:, :1]) if weight is None else weight)
    if spec.tracked and not training:
        y = formula.evaluate(xp, spec, p, x, kept, gamma, beta, eps=call.eps)
        return Made(y if real is None else xp.where(real, y, xp.zeros_like(y)), [], dict(kept), count)
    _require_values(spec, p, tuple(x.shape))
    correct = None
    if spec.renorm:
        r_max, d_max = (1.0, 0.0) if call.schedule is None else call.schedule.at(np, count)
        correct = formula.renorm(xp, kept, float(r_max), float(d_max), stop)
    y, moments = formula.normalize(xp, spec, p, x, gamma, beta, eps=call.eps, weight=weight, correct=correct)
    if real is not None:
        y = xp.where(real, y, xp.zeros_like(y))
    if not spec.tracked:
        return Made(y, moments, {}, count)
    batch, known = formula.merged(xp, spec, p, moments, eps=call.eps)
    finite = all(bool(xp.all(xp.isfinite(value))) for value in batch.values())
    if not bool(xp.any(known) if hasattr(known, "shape") else known) or (not finite and call.nonfinite != "update"):
        return Made(y, moments, dict(kept), count)
    rate = 1.0 / (count + 1) if call.rate is None else call.rate
    return Made(y, moments, formula.updated(xp, spec, kept, batch, known, rate), count + 1)


def _require_values(spec: NormSpec, p: NormPlan, shape: Shape) -> None:
    if math.prod(shape) == 0:
        return
    least = min(values_behind(p, view) for _, _, view in parts(p, shape))
    if least < spec.minimum:
        must = f"{spec.name}: a statistic needs at least {spec.minimum} values in training"
        raise NormValueError(message(must, f"{least} from shape {shape}"))


def run_formula(
    spec: NormSpec,
    sizes: Any,
    dtype: str,
    accumulator: str,
    call: Call,
    *,
    normalize: Any = forward,
    backward: Any = formula.backward,
) -> Outcome:
    """Run a call through the NumPy formulas. `normalize` and `backward` may be exchanged, for broken twins."""
    made_for = call.x.shape if call.made_for is None else call.made_for
    spec = chosen(spec, call.bessel)
    p = plan(spec, call.x.ndim, sizes(made_for))
    wide = np.float64 if accumulator == "float64" else np.float32

    def array(values: Array | None) -> Any:
        return None if values is None else np.asarray(values).astype(wide)

    shape = call.x.shape
    positions = (shape[0], 1, *shape[2:])
    real = None if call.mask is None else call.mask.reshape(positions)
    weight = None
    if call.weight is not None:
        each = call.weight.ndim == 1
        weight = array(np.broadcast_to(call.weight.reshape(-1, *(1 for _ in shape[1:])), positions) if each
                       else call.weight.reshape(positions))  # fmt: skip
    gamma, beta = array(call.gamma), array(call.beta)
    kept = _first(spec, call, made_for, array)
    count = call.count
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of no samples and inf - inf are part of the tests
        for x in call.history:
            made = normalize(np, spec, p, call, array(x), gamma, beta, kept=kept, count=count, training=True)
            kept, count = made.kept, made.count
        x, dy = arranged(array(call.x), call.layout), array(call.dy)
        made = normalize(
            np, spec, p, call, x, gamma, beta, kept=kept, count=count, training=call.training, real=real, weight=weight
        )
        gradients = formula.Gradients(None, None, None)
        if dy is not None:
            dy = arranged(dy, call.layout, gradient=True)
            if real is not None:
                x, dy = np.where(real, x, 0), np.where(real, dy, 0)
                weight = real * (wide(1.0) if weight is None else weight)
            gradients = backward(np, spec, p, dy, x, gamma, beta, made.moments, eps=call.eps, weight=weight)
    dx, dgamma, dbeta = (None if value is None else rounded(value, dtype) for value in gradients)
    after = {name: np.asarray(value, dtype=np.float64) for name, value in made.kept.items()}
    return Outcome(rounded(made.y, dtype), dx, dgamma, dbeta, after, made.count if spec.tracked else None)


def _first(spec: NormSpec, call: Call, made_for: Shape, array: Any) -> dict[str, Any]:
    """Return what is kept before the call."""
    if call.kept is not None:
        return {name: array(value) for name, value in call.kept.items()}
    return {t.name: array(np.full(made_for[1], t.init)) for t in spec.tracked}
