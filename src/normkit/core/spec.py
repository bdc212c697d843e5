"""What a normalizer is: named axes, which of them each statistic is taken over, and what is kept between calls."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from normkit.core.constraints import Constraint, Flag, Integer, OneOf, Optional, Real, check
from normkit.errors import NormValueError, message

__all__ = ["ARGUMENTS", "NormSpec", "Tracked", "parse"]

Formula = Literal["standard", "filter_response", "evonorm_b0", "evonorm_s0", "dynamic_tanh", "global_response"]
# The papers of these give an activation up for them.
_ACTIVATING = ("filter_response", "evonorm_b0", "evonorm_s0")

_TOKEN = re.compile(r"\((\w+) (\w+)\)|(\*?\w+)")


def parse(pattern: str) -> tuple[tuple[str, ...], ...]:
    """Split a pattern in one tuple of names per axis: `"n (g k) *s"` -> `(("n",), ("g", "k"), ("*s",))`.

    `*s` stands for any number of axes and `(g k)` for one axis split in an outer and an inner part.
    """
    if _TOKEN.sub("", pattern).strip():
        raise NormValueError(message("axes must be names, `*name` or `(outer inner)`", repr(pattern)))
    return tuple((m[1], m[2]) if m[1] else (m[3],) for m in _TOKEN.finditer(pattern))


@dataclass(frozen=True)
class Tracked:
    """A statistic kept between calls: its first value, its update and its correction, so that they cannot disagree.

    The kept value follows `kept + rate * (batch - kept)`, where `rate` is the weight of the new batch: PyTorch calls
    that `momentum`, Keras and Flax call one minus it `momentum`. After T steps the first value still weighs
    (1 - rate)^T, which :meth:`debiased` takes out.
    """

    name: Literal["mean", "var", "std"]
    init: float
    bessel: bool = False  # keep n/(n-1) times the variance of the batch, the unbiased estimate

    def updated(self, kept: Any, batch: Any, rate: Any) -> Any:
        """Return the kept value after one more batch."""
        return (1 - rate) * kept + rate * batch

    def debiased(self, kept: Any, remaining: Any) -> Any:
        """Return the kept value without its first one, which still weighs `remaining` (below 1)."""
        return (kept - remaining * self.init) / (1 - remaining)


@dataclass(frozen=True)
class NormSpec:
    """One normalizer, as mathematics: y = (x - mean) / sqrt(var + eps) * gamma + beta, with named axes.

    Attributes:
        name: the field's name for it.
        x: axes of the input; `*s` is any number of axes, `(g k)` one axis split in two.
        over: axes each statistic is taken over.
        affine: axes of gamma and beta, and of what is kept.
        center: subtract the mean; without it `var` is the mean square.
        gain: multiply by gamma (`"w"`) or by 1 + gamma (`"1+w"`, with gamma starting at 0).
        eps: default of the constant added to the variance, inside the root.
        tracked: what is kept between calls; in evaluation the kept values replace those of the batch.
        renorm: correct the batch statistics towards the kept ones (batch renormalization).
        formula: `standard` is the one above; `core.activated` holds the others, which have further parameters, are
            activations as well, or use no mean and variance.
        others: name and first value of the parameters besides gamma and beta: one value per channel, except for alpha
            of dynamic tanh, which is one number.
        minimum: values a statistic needs in training. One value has no variance: where the values are samples or
            positions, that is a mistake in the data (2); where they are features, the output is beta (1).
        paper: where it comes from.
    """

    name: str
    x: str
    over: str
    affine: str
    center: bool = True
    gain: Literal["w", "1+w"] = "w"
    eps: float = 1e-5
    tracked: tuple[Tracked, ...] = ()
    renorm: bool = False
    formula: Formula = "standard"
    others: tuple[tuple[str, float], ...] = ()
    minimum: int = 1
    paper: str = ""
    # Read off the patterns once: `x`, one tuple of names per axis, and the names in `over` and `affine`.
    axes: tuple[tuple[str, ...], ...] = field(init=False, repr=False, compare=False)
    over_names: tuple[str, ...] = field(init=False, repr=False, compare=False)
    affine_names: tuple[str, ...] = field(init=False, repr=False, compare=False)

    CONSTRAINTS: ClassVar[Mapping[str, Constraint]] = {
        "center": Flag(),
        "gain": OneOf(("w", "1+w")),
        "eps": Real(0.0),
        "renorm": Flag(),
        "formula": OneOf(get_args(Formula)),
        "minimum": Integer(1),
    }

    def __post_init__(self) -> None:
        check(self.name, self.CONSTRAINTS, {name: getattr(self, name) for name in self.CONSTRAINTS})
        object.__setattr__(self, "axes", parse(self.x))
        object.__setattr__(self, "over_names", tuple(token[0] for token in parse(self.over)))
        object.__setattr__(self, "affine_names", tuple(token[0] for token in parse(self.affine)))
        known = {part.lstrip("*") for token in self.axes for part in token}
        for which, names in (("over", self.over_names), ("affine", self.affine_names)):
            unknown = {name for name in names if name.lstrip("*") not in known}
            if unknown:
                must = f"{self.name}: axes in `{which}` must stand in `{self.x}`"
                raise NormValueError(message(must, ", ".join(sorted(unknown))))
        if sum(len(token) == 1 and token[0].startswith("*") for token in self.axes) > 2:
            raise NormValueError(message(f"{self.name}: `x` must have at most two `*` axes", repr(self.x)))

    @property
    def first_gain(self) -> float:
        """The first value of gamma."""
        return 0.0 if self.gain == "1+w" or self.formula == "global_response" else 1.0

    @property
    def activates(self) -> bool:
        """Whether it is an activation as well, and stands where norm and activation stood."""
        return self.formula in _ACTIVATING


# Constraints that constructors of layers share, by the name of the argument.
ARGUMENTS: Mapping[str, Constraint] = {
    "num_features": Integer(1),
    "num_channels": Integer(1),
    "num_groups": Integer(1),
    "virtual_batch_size": Integer(2),
    "momentum": Optional(Real(0.0, 1.0)),
    "eps": Real(0.0),
    "affine": Flag(),
    "elementwise_affine": Flag(),
    "bias": Flag(),
    "track_running_stats": Flag(),
    "learn_eps": Flag(),
    "apply_act": Flag(),
    "channels_last": Flag(),
    "alpha_init_value": Real(),
    "bessel": Flag(),
    "nonfinite": OneOf(("skip", "update")),
    "gain": OneOf(("w", "1+w")),
    "cast": OneOf(("llama", "gemma", "none")),
}
